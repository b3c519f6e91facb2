"""Frozen diffusion models that turn images and timesteps into named feature maps.

`protocol.Teacher` is what the rest of the program needs of one; `diffusers_unet.DiffusersUNet` is
the one for diffusers' `UNet2DModel`; `ddpm` has the pieces to train one on your own images. This
file imports nothing, so that listing names does not load torch and diffusers.
"""
