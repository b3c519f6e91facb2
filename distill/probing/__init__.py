"""What a teacher knows, by layer and timestep, and what choosing the timestep could bring."""
