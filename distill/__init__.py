"""Distil a diffusion model into a small, label-efficient vision backbone."""
