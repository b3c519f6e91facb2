"""A frozen diffusion model as a teacher: named feature maps at any timestep.

This file has what all model families share; each family's network, input and files are a `Family`
in a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, Self, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachers import anatomy, loading
from teachers.anatomy import LayerInfo
from teachers.arithmetic import FAST_ON_CPU, Replaced
from teachers.noise import NoiseSchedule, Randomness, draw_noise
from teachers.tap import Tap

Input = Literal["noised", "clean", "average"]
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Family(Protocol):
    """One family of diffusion models: `DiffusionTeacher` turns it into a teacher.

    `parts` holds all modules with weights, by name; users name the layers of `parts["network"]`.
    Families are built without weights, so that mistakes show before weights are read; `build`
    also works under `torch.device("meta")`.

    Attributes:
        name: for tables and logs.
        configs: everything that decides the architecture and the noise, for the fingerprint.
        noise_schedule: the schedule that the timesteps index.
        multiple: both sides of an image must be divisible by it.
        coarsest: reduction of its coarsest map.
        image_size: of the images that it was trained on, in pixels; None if unknown.
        classes: number of classes it is conditioned on; 0 if it ignores labels.
    """

    name: str
    configs: Mapping[str, Any]
    noise_schedule: NoiseSchedule
    multiple: int
    coarsest: int
    image_size: int | tuple[int, int] | None
    classes: int

    def build(self) -> nn.ModuleDict:
        """The parts, with weights of `network` drawn from torch's default generator."""
        ...

    def load(self, random_weights: int | None) -> nn.ModuleDict:
        """The parts with their trained weights; with a seed, those of `network` are fresh."""
        ...

    def encode(self, parts: nn.ModuleDict, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] into what noise is added to, (B, c, h, w) float32."""
        ...

    def forward(self, parts: nn.ModuleDict, x: Tensor, times: Tensor, labels: Tensor | None) -> Any:
        """Run `parts["network"]` once.

        Args:
            x: (B, c, h, w), in the teacher's dtype.
            times: (B,) from `NoiseSchedule.network_times`.
            labels: (B,) int64 below `classes`, negative for images without a label; or None.
        """
        ...

    def feature_map(self, output: Any, x: Tensor) -> Any:
        """A module's raw output as its map (B, C, h, w); anything else if it has no map."""
        ...


class View(TypedDict, total=False):
    """How a teacher looks at images: keywords that every family accepts.

    Attributes:
        layers: module names in the library's own spelling, each giving a (B, C, H, W) map. If
            empty, only the table of layers is available and no weights are read.
        input: `noised` shows the network x_t, what it was trained on; `clean` shows it the image
            itself with timestep t, as the published code of RepFusion does; `average` shows it x_t
            several times, and the features are the mean.
        draws: number of noise draws that `average` uses.
        image_size: images are resized to this before all else; None keeps their size.
        dtype: of weights and arithmetic; features are always float32.
        random_weights: seed of fresh weights for the untrained control.
        compile: compile the forward pass with `torch.compile`.
    """

    layers: Sequence[str]
    input: Input
    draws: int
    image_size: int | tuple[int, int] | None
    dtype: torch.dtype
    random_weights: int | None
    compile: bool


class Flops(NamedTuple):
    """Floating-point operations for one image, two per multiply-add, over all draws of the noise.

    Attributes:
        used: until the last requested layer is done, which is what `features` spends.
        whole: of complete forward passes.
    """

    used: int
    whole: int


class DiffusionTeacher:
    """A frozen network of a `Family` with its own noise schedule (a `protocol.Teacher`).

    Args:
        family: the model family. The other arguments are those of `View`.

    Attributes:
        name: for tables and logs.
        channels: C of each layer's map.
        reductions: side of the image over the side of each layer's map.
        noise_schedule: the model's own.
        parts: the modules, in eval mode and without gradients.
        early_exit: whether `features` ends after the last requested layer. To see what that saves,
            set it to False: the maps stay the same.

    Raises:
        ValueError: an unknown layer, an unsuitable image size, broken weights or configs.
        OSError: a missing file.
    """

    def __init__(
        self,
        family: Family,
        *,
        layers: Sequence[str],
        input: Input = "noised",
        draws: int = 1,
        image_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        random_weights: int | None = None,
        compile: bool = False,
    ) -> None:
        if input not in get_args(Input):
            raise ValueError(f"unknown input {input!r}; choose from {', '.join(get_args(Input))}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers {list(layers)} names a layer twice")
        self.family, self.layers, self.input = family, tuple(layers), input
        self.draws = draws if input == "average" and family.noise_schedule.has_noise else 1
        self.noise_schedule, self.early_exit = family.noise_schedule, True
        self.image_size = None if image_size is None else anatomy.height_width(image_size)
        if self.image_size is not None:
            anatomy.check_image_size(self.image_size, family.multiple)
        if not layers:
            return
        height, width = self.image_size or (2 * family.coarsest, 2 * family.coarsest)
        traced = self._trace((height, width))
        asked = {name: anatomy.find_layer(name, traced) for name in layers}
        self.channels = {name: layer.shape[1] for name, layer in asked.items()}
        self.reductions = {name: height // layer.shape[2] for name, layer in asked.items()}
        self.last_layer = max(asked.values(), key=traced.index).name

        self.name = family.name
        if random_weights is not None:
            self.name += f"-random{random_weights}"
        self.parts = family.load(random_weights)
        self._weights_hash = loading.weights_hash(self.parts)
        self.dtype = dtype
        # oneDNN and cuDNN convolve 16-bit floats fastest in channels_last; float32 gains nothing
        self._low = dtype in LOW_PRECISION
        self.memory_format = torch.channels_last if self._low else torch.contiguous_format
        with loading.quiet():
            self.parts.to(dtype=dtype).to(memory_format=self.memory_format)
        self.parts.eval().requires_grad_(False)
        self._tap = Tap(self.network, self.layers, self.last_layer)
        # On a GPU as a CUDA graph, as launching its many small kernels takes longer than they do
        self._forward = self._run
        if compile:
            self._forward = torch.compile(self._run, dynamic=False, mode="reduce-overhead")

    @property
    def network(self) -> nn.Module:
        """The network whose layers are named."""
        network: nn.Module = self.parts["network"]
        return network

    @property
    def parameters(self) -> int:
        """Number of weights, those of all parts."""
        return sum(weight.numel() for weight in self.parts.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over configs and weights (before the cast to `dtype`)."""
        configs = json.dumps(self.family.configs, sort_keys=True, default=str)
        return hashlib.sha256((configs + self._weights_hash).encode()).hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.parts.to(device)
        return self

    def features(
        self,
        images: Tensor,
        timesteps: Tensor,
        generator: Randomness = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The requested layers' maps; computation stops after the last of them (`early_exit`).

        Args:
            images: (B, 3, H, W) RGB float in [0, 1], on the teacher's device.
            timesteps: (B,) int64 in 0..T-1, any mix; on the CPU they cost no synchronisation.
            generator: one for the batch or one per image, on any device (noise is drawn there in
                float32); None uses torch's default generator. Not used for `clean` input.
            labels: (B,) int64 classes for a class-conditional family; a negative value, or None for
                all, is an image without a label.

        Returns:
            Layer -> float32 (B, C, h, w), in the order of `layers`.

        Raises:
            ValueError: a timestep outside 0..T-1, a label beyond the family's classes, or images of
                an unsuitable shape.
        """
        self._check(images, timesteps)
        images = images.float()
        if self.image_size is not None and tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bilinear", antialias=True)
        times = self.noise_schedule.network_times(timesteps)
        times = times.to(images.device, non_blocking=True)
        labels = self._labels(labels, images.device)
        # the student's autocast must not reach in: this network computes in its own dtype
        kind = images.device.type
        fast = Replaced(FAST_ON_CPU) if kind == "cpu" and self._low else nullcontext()
        with torch.inference_mode(), torch.autocast(kind, enabled=False), fast:
            x = self.family.encode(self.parts, 2 * images - 1)
            maps = self._forward(self._noised(x, timesteps, generator), times, labels)
            for draw in range(1, self.draws):
                maps = [x.clone() for x in maps]  # a CUDA graph writes over its last answer
                more = self._forward(self._noised(x, timesteps, generator), times, labels)
                maps = [a + (b.float() - a) / (draw + 1) for a, b in zip(maps, more, strict=True)]
        # Copies, made outside of inference mode: a loss may save them for its backward pass
        copies = [x.to(torch.float32, copy=True) for x in maps]
        return dict(zip(self.layers, copies, strict=True))

    def _labels(self, labels: Tensor | None, device: torch.device) -> Tensor | None:
        """The labels if the family uses any, checked against its classes; otherwise None."""
        classes = self.family.classes
        if labels is None or not classes:
            return None
        if bool((labels >= classes).any()):
            raise ValueError(
                f"label {int(labels.max())} is not one of the teacher's classes, 0..{classes - 1}"
            )
        return labels.to(device)

    def _noised(self, x: Tensor, timesteps: Tensor, generator: Randomness) -> Tensor:
        """The network's input in its dtype, noised as `input` says. x: (B, c, h, w) float32."""
        if self.input != "clean" and self.noise_schedule.has_noise:
            x = self.noise_schedule.add_noise(x, draw_noise(x, generator), timesteps)
        return x.to(self.dtype, memory_format=self.memory_format)

    def _run(self, x: Tensor, times: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The forward pass, ended after the last requested layer if `early_exit`."""
        outputs = self._tap(
            lambda: self.family.forward(self.parts, x, times, labels), self.early_exit
        )
        return [self.family.feature_map(output, x) for output in outputs]

    def _check(self, images: Tensor, timesteps: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if timesteps.shape != images.shape[:1]:
            raise ValueError(
                f"timesteps must have shape ({len(images)},), one per image, got "
                f"{tuple(timesteps.shape)}"
            )
        self.noise_schedule.check(timesteps)
        if self.image_size is None:
            height, width = images.shape[-2:]
            anatomy.check_image_size((height, width), self.family.multiple)

    def layer_table(self, image_size: int | tuple[int, int]) -> list[LayerInfo]:
        """The network's blocks with their costs, for images of `image_size` passed to `features`.

        Raises:
            ValueError: the image size is unsuitable.
        """
        size = anatomy.height_width(self.image_size or image_size)
        return anatomy.layer_table(self._trace(size), size[0])

    def flops(self, image_size: int | tuple[int, int]) -> Flops:
        """The cost of one image of `image_size`: in `features`, and in the whole network."""
        traced = self._trace(anatomy.height_width(self.image_size or image_size))
        used = anatomy.find_layer(self.last_layer, traced).flops
        return Flops(self.draws * used, self.draws * traced[-1].flops)

    def _trace(self, size: tuple[int, int]) -> list[anatomy.TracedLayer]:
        """Every module call of one forward pass, for one image of that size."""
        family = self.family
        anatomy.check_image_size(size, family.multiple)
        with torch.device("meta"), torch.no_grad():
            try:
                parts = family.build().eval().requires_grad_(False)
                images = torch.empty(1, 3, *size)
                first = torch.zeros(1, dtype=torch.int64, device="cpu")
                times = family.noise_schedule.network_times(first).to("meta")
                x = family.encode(parts, images)
                return anatomy.trace(
                    parts["network"],
                    lambda: family.forward(parts, family.encode(parts, images), times, None),
                    lambda output: family.feature_map(output, x),
                )
            except ValueError:
                raise
            except Exception as error:  # a config may be wrong in any way at all
                raise ValueError(
                    f"{family.name}: its configs do not fit together, or do not allow images of "
                    f"{size[0]}x{size[1]} ({type(error).__name__}: "
                    f"{textwrap.shorten(str(error), 200)})"
                ) from error
