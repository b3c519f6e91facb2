"""Training a diffusion teacher on one's own images."""
