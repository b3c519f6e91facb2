"""Frozen networks that turn images and timesteps into named feature maps.

`protocol.Teacher` is what the rest of the program needs of one. `diffusion.DiffusionTeacher` is
that for every diffusion model; what a family of models adds is one file, such as `diffusers_unet`.
`ddpm` has the pieces to train one on your own images. This file imports nothing, so that listing
names does not load torch and diffusers.
"""
