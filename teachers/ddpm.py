"""The pieces for training a denoising diffusion model on unlabelled images, to be a teacher."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn import functional as F

from teachers import anatomy
from teachers.diffusers_unet import PixelUNet
from teachers.loading import quiet
from teachers.noise import NoiseSchedule


def build_unet(
    *,
    image_size: int | tuple[int, int],
    block_out_channels: Sequence[int],
    layers_per_block: int = 1,
    attention_levels: Sequence[int] = (),
) -> UNet2DModel:
    """A `UNet2DModel` for RGB images, its weights drawn from torch's default generator.

    Args:
        image_size: side, or (height, width), that it is trained and sampled at.
        block_out_channels: channels of each resolution, finest first; multiples of 8.
        layers_per_block: residual layers per level.
        attention_levels: levels with self-attention, 0 the finest; the middle always has it.

    Raises:
        ValueError: channels, levels or an image size that cannot be built.
    """
    levels = len(block_out_channels)
    if not levels or any(channels < 8 or channels % 8 for channels in block_out_channels):
        raise ValueError(
            f"block_out_channels must be one or more multiples of 8, got {list(block_out_channels)}"
        )
    if layers_per_block < 1:
        raise ValueError(f"layers_per_block must be at least 1, got {layers_per_block}")
    for level in attention_levels:
        if not 0 <= level < levels:
            raise ValueError(
                f"attention level {level} is outside 0..{levels - 1}; give attention_levels for "
                f"the {levels} block_out_channels"
            )
    height, width = anatomy.height_width(image_size)
    anatomy.check_image_size((height, width), 2 ** (levels - 1))
    attends = [level in attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=math.gcd(32, *block_out_channels),  # 32 as published, where that divides
    )


def load_pipeline(path: str, image_size: tuple[int, int]) -> tuple[UNet2DModel, DDPMScheduler]:
    """The UNet of a pipeline and its noise schedule, to be trained further.

    Args:
        path: see `diffusers_unet`.
        image_size: (height, width) that it is to be trained and sampled at.

    Raises:
        OSError, ValueError: see `PixelUNet`; or the UNet does not accept that size, or its
            schedule is not compatible with `DDPMScheduler`.
    """
    family = PixelUNet(path)
    if (channels := family.configs["unet"]["out_channels"]) != 3:
        raise ValueError(
            f"{path}: its UNet predicts {channels} channels; only one that predicts 3 (no learned "
            "variance) can be trained further"
        )
    anatomy.check_image_size(image_size, family.multiple)
    unet = family.load(None)["network"].float()
    assert isinstance(unet, UNet2DModel)
    height, width = image_size
    unet.register_to_config(sample_size=height if height == width else (height, width))
    with quiet():
        scheduler = DDPMScheduler.from_config(dict(family.configs["scheduler"]))
    if not torch.equal(
        family.noise_schedule.signal, NoiseSchedule.from_scheduler(scheduler).signal
    ):
        raise ValueError(f"{path}: its scheduler is not compatible with DDPMScheduler")
    return unet.train(), scheduler  # from_pretrained leaves it in eval mode


def denoising_loss(
    unet: UNet2DModel, scheduler: DDPMScheduler, images: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the prediction at uniform timesteps, a scalar (Ho et al. 2020, eq. 14).

    The scheduler's config says what is predicted: the noise, the velocity sqrt(abar) n -
    sqrt(1 - abar) x_0 (Salimans and Ho 2022), or the image.

    Args:
        images: (B, 3, H, W) RGB float in [0, 1], on the UNet's device.
        generator: timesteps and noise are drawn from it, on its own device.
    """
    total = scheduler.config["num_train_timesteps"]
    timesteps = torch.randint(total, (len(images),), generator=generator, device=generator.device)
    return F.mse_loss(*_prediction(unet, scheduler, images, timesteps, generator))


@torch.no_grad()
def loss_by_timestep(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: Iterable[Tensor],
    generator: torch.Generator,
) -> list[float]:
    """Mean `denoising_loss` in ten equal parts of the schedule, from little noise to much.

    Every image is seen once in every part, at a timestep drawn from that part.

    Args:
        unet: in eval mode.
        images: batches (B, 3, H, W) as for `denoising_loss`; at least one image.
        generator: for timesteps and noise; equal ones make the losses of two networks comparable.
    """
    total = scheduler.config["num_train_timesteps"]
    bins = min(10, total)
    edges = [part * total // bins for part in range(bins + 1)]
    sums, count = [0.0] * bins, 0
    for batch in images:
        count += len(batch)
        for part, (low, high) in enumerate(itertools.pairwise(edges)):
            timesteps = torch.randint(
                low, high, (len(batch),), generator=generator, device=generator.device
            )
            pair = _prediction(unet, scheduler, batch, timesteps, generator)
            sums[part] += len(batch) * F.mse_loss(*pair).item()
    return [value / count for value in sums]


def _prediction(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: Tensor,
    timesteps: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The network's prediction for noised images and its target, each (B, 3, H, W) float32."""
    x = 2 * images - 1  # (B, 3, H, W) in [-1, 1]
    noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    timesteps = timesteps.to(x.device)
    prediction_type = scheduler.config["prediction_type"]
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = scheduler.get_velocity(x, noise, timesteps)
    elif prediction_type == "sample":
        target = x
    else:
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}; "
            "choose from epsilon, v_prediction, sample"
        )
    prediction = unet(scheduler.add_noise(x, noise, timesteps), timesteps).sample
    return prediction.float(), target


def sample_images(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    count: int,
    *,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Generate images by DDIM (Song et al. 2021, eta 0), at the UNet's own `sample_size`.

    Returns:
        (count, 3, H, W) float32 in [0, 1], on the UNet's device.
    """
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    training = unet.training
    unet.eval()
    try:
        images: Tensor = pipeline(
            batch_size=count, generator=generator, num_inference_steps=steps, output_type="pt"
        ).images
    finally:
        unet.train(training)
    return images.float()
