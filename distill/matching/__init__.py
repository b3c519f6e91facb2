"""What a student learns from a teacher: projectors, feature losses, and their sum."""
