"""A diffusers `UNet2DModel` as a teacher: named feature maps at any timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachers import anatomy, loading
from teachers.anatomy import LayerInfo

Input = Literal["noised", "clean"]


class Flops(NamedTuple):
    """Floating-point operations for one image, two a multiply-add.

    Attributes:
        used: until the last asked layer is done, which is what `features` spends.
        whole: the complete forward pass.
    """

    used: int
    whole: int


class LastLayerReached(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


class DiffusersUNet:
    """A frozen unconditional `UNet2DModel` with its own noise schedule (a `protocol.Teacher`).

    Args:
        path: see `loading.locate`: a pipeline folder, a UNet folder, or a hub id.
        layers: module names in diffusers' own spelling (`mid_block`, `up_blocks.1`,
            `down_blocks.2.resnets.0`, ...), each giving a (B, C, H, W) map.
        input: `noised` shows the network x_t, what it was trained on; `clean` shows it the image
            itself with timestep t, as the published code of RepFusion does.
        image_size: images are resized to this before the noise; None keeps their size.
        dtype: of weights and arithmetic; features are float32 all the same.
        random_weights: a seed: the same architecture untrained, needing no weights file.
        revision: branch, tag or commit, for a hub id.

    Attributes:
        name: last part of the path, for tables and logs.
        channels: C of each layer's map.
        reductions: side of what the UNet sees over the side of each layer's map.
        noise_schedule: the scheduler's, from its own config.
        fingerprint: SHA-256 over configs and weights (before the cast to `dtype`).
        unet: the network, in eval mode and without gradients.

    Raises:
        ValueError: an unknown layer, an image size that does not fit, broken weights or configs.
        OSError: a missing folder or file, or the hub cannot give it.
    """

    def __init__(
        self,
        path: str,
        *,
        layers: Sequence[str],
        input: Input = "noised",
        image_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        random_weights: int | None = None,
        revision: str | None = None,
    ) -> None:
        if input not in get_args(Input):
            raise ValueError(f"input {input!r} is unknown; choose from noised, clean")
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"layers {list(layers)} must name at least one layer, and none twice")
        folder = loading.locate(path, revision)
        self.path = path
        self.layers = tuple(layers)
        self.input = input
        self.image_size = None if image_size is None else anatomy.height_width(image_size)
        self.config: Mapping[str, Any] = loading.read_config(folder.unet)
        self.noise_schedule = loading.load_schedule(folder.scheduler)

        self.total_reduction = anatomy.total_reduction(self.config)
        height = 2 * self.total_reduction
        traced = anatomy.trace(self.config, height)
        asked = {name: anatomy.find_layer(name, traced) for name in layers}
        self.channels = {name: layer.shape[1] for name, layer in asked.items()}
        self.reductions = {name: height // layer.shape[2] for name, layer in asked.items()}
        self.last_layer = max(asked.values(), key=traced.index).name
        if self.image_size is not None:
            anatomy.check_image_size(self.image_size, self.total_reduction)

        self.name = Path(path).name
        if random_weights is None:
            unet = loading.load_unet(folder.unet)
        else:
            self.name += f"-random{random_weights}"
            unet = loading.random_unet(self.config, random_weights)
        self.fingerprint = loading.fingerprint(folder, unet)
        self.dtype = dtype
        # oneDNN and cuDNN convolve 16-bit floats fastest in channels_last; float32 gains nothing
        low = dtype in (torch.bfloat16, torch.float16)
        self.memory_format = torch.channels_last if low else torch.contiguous_format
        with loading.quiet():
            unet = unet.to(dtype=dtype, memory_format=self.memory_format)
        self.unet = unet.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.unet.to(device)
        return self

    # no_grad, not inference_mode: a loss must be able to save these maps for its backward pass
    @torch.no_grad()
    def features(
        self, images: Tensor, timesteps: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The asked layers' maps, and no computation after the last of them.

        Args:
            images: (B, 3, H, W) RGB float in [0, 1], on the teacher's device.
            timesteps: (B,) int64 in 0..T-1, any mix; on the CPU they cost no synchronisation.
            generator: source of the noise, drawn in float32 on the generator's own device; None
                takes torch's default generator. Not used for `clean` input.

        Returns:
            Layer -> float32 (B, C, h, w), in the order of `layers`.

        Raises:
            ValueError: a timestep outside 0..T-1, or images of a shape that it cannot take.
        """
        self._check(images, timesteps)
        images = images.float()
        if self.image_size is not None and tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bilinear", antialias=True)
        x = 2 * images - 1  # (B, 3, H, W) in [-1, 1], what diffusers' pipelines train on
        if self.input == "noised":
            device = x.device if generator is None else generator.device
            noise = torch.randn(x.shape, generator=generator, device=device)
            x = self.noise_schedule.add_noise(x, noise.to(x.device), timesteps)
        return self._run(x, timesteps.to(x.device))

    def _check(self, images: Tensor, timesteps: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)} are not (B, 3, H, W) RGB")
        if timesteps.shape != images.shape[:1]:
            raise ValueError(
                f"timesteps of shape {tuple(timesteps.shape)} do not match {len(images)} images; "
                "one per image is needed"
            )
        self.noise_schedule.check(timesteps)
        if self.image_size is None:
            height, width = images.shape[-2:]
            anatomy.check_image_size((height, width), self.total_reduction)

    def _run(self, x: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """The forward pass on what the UNet sees, (B, 3, H, W), left after the last asked layer."""
        maps: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                maps[name] = anatomy.first_tensor(output).float()
                if name == self.last_layer:
                    raise LastLayerReached

            return hook

        with ExitStack() as scope:
            for name in self.layers:
                layer = self.unet.get_submodule(name)
                scope.enter_context(layer.register_forward_hook(keep(name)))
            # the student's autocast must not reach in: this network computes in its own dtype
            scope.enter_context(torch.autocast(x.device.type, enabled=False))
            scope.enter_context(suppress(LastLayerReached))
            self.unet(x.to(self.dtype, memory_format=self.memory_format), timesteps)
        return {name: maps[name] for name in self.layers}

    def layer_table(self, image_size: int | tuple[int, int]) -> list[LayerInfo]:
        """The UNet's blocks with their costs, for images of that size handed to `features`."""
        return anatomy.layer_table(self.config, self.image_size or image_size)

    def flops(self, image_size: int | tuple[int, int]) -> Flops:
        """What one image of that size costs, as `features` runs it and as the whole network."""
        traced = anatomy.trace(self.config, self.image_size or image_size)
        return Flops(anatomy.find_layer(self.last_layer, traced).flops, traced[-1].flops)
