"""The cost of a training step and of a network."""
