"""A teacher that leaves its training: a folder that diffusers opens."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError

from distill import checkpoint
from teachers.loading import quiet


def save_pipeline(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` and `diffusers_unet` load.

    It is complete on disk before it takes its name; an older pipeline of that name is replaced, any
    other folder is left alone.

    Args:
        dtype: of the weights in the file; float16 halves it.

    Raises:
        FileExistsError: the folder holds something else than a pipeline.
        OSError: it cannot be written, such as for want of room.
        ValueError: a weight is not finite in `dtype`.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise FileExistsError(
            f"{folder} exists and is not a diffusers pipeline; name another folder"
        )
    with quiet():
        unet = copy.deepcopy(unet).to("cpu", dtype)
        unet = unet.to(memory_format=torch.contiguous_format)  # all that safetensors writes
    for name, weight in unet.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite in {dtype}; not saved")
    unet.register_to_config(
        _name_or_path=""
    )  # a path on the training machine means nothing to others
    try:
        with checkpoint.replacing_folder(folder) as new:
            DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(new)
    except SafetensorError as error:
        raise OSError(f"cannot write {folder}: {error}") from error
