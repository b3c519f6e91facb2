"""Frozen networks that turn images and timesteps into named feature maps.

`protocol.Teacher` is the interface that the rest of the program uses. `diffusion.DiffusionTeacher`
implements it for every diffusion model; each model family adds one file, such as `diffusers_unet`.
`ddpm` has the pieces to train a teacher on your own images. This file imports nothing, so that
listing names does not load torch and diffusers.
"""
