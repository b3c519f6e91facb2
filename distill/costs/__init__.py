"""What a step and a network cost."""
