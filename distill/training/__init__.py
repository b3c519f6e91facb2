"""The training loop of a run: what a step sees, does and costs."""
