"""OpenAI's guided diffusion: one file of weights from which the architecture is inferred."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from teachers import loading
from teachers.diffusion import DiffusionTeacher, View
from teachers.guided_unet import Architecture, GuidedUNet
from teachers.noise import NoiseSchedule, ddpm_scheduler

Schedule = Literal["linear", "cosine"]
Shapes = Mapping[str, tuple[int, ...]]


def guided_diffusion(
    path: str,
    *,
    schedule: Schedule = "linear",
    timesteps: int = 1000,
    rescale_timesteps: bool = False,
    head_channels: int = 64,
    heads: int | None = None,
    new_attention_order: bool = False,
    **view: Unpack[View],
) -> DiffusionTeacher:
    """An unconditional model of guided-diffusion, such as OpenAI's 256x256_diffusion_uncond.pt.

    The options are what the weights do not show; the defaults are those of OpenAI's unconditional
    256x256 models (ImageNet and LSUN). With wrong ones a model still runs, but its features are
    worth little. Any image size works that the network can halve often enough.

    Args:
        path: a state dict, `.safetensors`, or what `torch.save` wrote.
        schedule: `linear` (Ho et al. 2020), or `cosine` (Nichol & Dhariwal 2021), which OpenAI's
            64x64 models have.
        timesteps: T, the length of the schedule.
        rescale_timesteps: give the network 1000 t / T instead of t (`--rescale_timesteps`). This is
            the default of improved diffusion's training script, which made the 64x64 models.
        head_channels: channels per attention head (`--num_head_channels`); not used with `heads`.
        heads: number of attention heads (`--num_heads`); the training script's default is 4.
        new_attention_order: order of the attention's channels (`--use_new_attention_order`).
        view: see `teachers.diffusion.View`; layers are `input_blocks.7`, `middle_block`,
            `output_blocks.3`, ...

    Raises:
        ValueError, OSError: see `DiffusionTeacher` and `GuidedDiffusion`.
    """
    time_scale = 1000 / timesteps if rescale_timesteps and timesteps else 1.0
    options = {
        "head_channels": head_channels,
        "heads": heads,
        "new_attention_order": new_attention_order,
    }
    return DiffusionTeacher(GuidedDiffusion(path, schedule, timesteps, options, time_scale), **view)


class GuidedDiffusion:
    """The family of `guided_diffusion` (a `diffusion.Family`).

    Args:
        path, schedule, timesteps: as in `guided_diffusion`.
        options: the options that `Architecture` has.
        time_scale: the network's input for timestep 1.

    Raises:
        OSError: no such file.
        ValueError: a damaged file, another or a conditional network, or unsuitable options.
    """

    def __init__(
        self,
        path: str,
        schedule: Schedule,
        timesteps: int,
        options: Mapping[str, Any],
        time_scale: float = 1.0,
    ) -> None:
        self.time_scale = time_scale
        self.path = Path(path).expanduser()
        self.name = self.path.stem
        self.noise_schedule = noise_schedule(schedule, timesteps)
        shapes = {name: tuple(weight.shape) for name, weight in read(self.path).items()}
        try:
            self.architecture = dataclasses.replace(infer(shapes), **options)
            with torch.device("meta"):
                check_shapes(shapes, GuidedUNet(self.architecture))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        self.configs: Mapping[str, Any] = {
            "architecture": dataclasses.asdict(self.architecture),
            "schedule": schedule,
            "timesteps": timesteps,
            **({} if time_scale == 1 else {"time_scale": time_scale}),
        }
        self.multiple = 2 ** (len(self.architecture.level_channels) - 1)
        self.coarsest = self.multiple
        self.image_size: int | tuple[int, int] | None = None
        self.classes = 0

    def build(self) -> nn.ModuleDict:
        """The parts without trained weights: only the UNet."""
        return nn.ModuleDict({"network": GuidedUNet(self.architecture)})

    def load(self, random_weights: int | None) -> nn.ModuleDict:
        """The parts with trained weights or, with a seed, fresh ones."""
        if random_weights is not None:
            return loading.randomly(self.build, random_weights)
        parts = self.build()
        parts["network"].load_state_dict(read(self.path), strict=True)
        loading.check_finite(parts["network"], self.path)
        return parts

    def encode(self, parts: nn.ModuleDict, images: Tensor) -> Tensor:
        """The input of the network: the pixels themselves."""
        return images

    def forward(self, parts: nn.ModuleDict, x: Tensor, times: Tensor, labels: Tensor | None) -> Any:
        """Run the UNet."""
        return parts["network"](x, times * self.time_scale)

    def feature_map(self, output: Any, x: Tensor) -> Any:
        """A module's output, which is a map (B, C, h, w) already."""
        return output


def noise_schedule(schedule: Schedule, timesteps: int) -> NoiseSchedule:
    """The schedule of a name, of T timesteps.

    Raises:
        ValueError: an unknown name, or too few timesteps.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"unknown schedule {schedule!r}; choose from linear, cosine")
    beta_schedule = "linear" if schedule == "linear" else "squaredcos_cap_v2"
    return NoiseSchedule.from_scheduler(ddpm_scheduler(beta_schedule, timesteps))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or contains something other than tensors by name.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; give the state dict of a guided-diffusion model"
        )
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way at all
        raise ValueError(
            f"{path} is damaged or contains more than tensors; save only the weights: "
            "torch.save(model.state_dict(), ...)"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(x, Tensor) and x.layout == torch.strided
        for name, x in state.items()
    ):
        raise ValueError(f"{path} is not a state dict; save only the weights: model.state_dict()")
    tensors = dict(state)
    consume_prefix_in_state_dict_if_present(tensors, "module.")  # of DistributedDataParallel
    return tensors


def infer(shapes: Shapes) -> Architecture:
    """Infer the architecture from the shapes of a state dict.

    Raises:
        ValueError: the network is conditional, or not a guided-diffusion UNet.
    """
    if "label_emb.weight" in shapes:
        raise ValueError("the network is class-conditional (label_emb); it must be unconditional")
    inputs = _indices(r"input_blocks\.(\d+)\.", shapes)
    if missing := {*range(max(inputs, default=0))} - inputs:
        raise ValueError(
            f"input_blocks.{min(missing)} has no weights; networks that resample by pooling alone "
            "(conv_resample=False) are not supported"
        )
    ups = r"output_blocks\.(\d+)\.(?:\d\.conv|[12]\.in_layers\.0)\.weight"
    levels = 1 + len(_indices(ups, shapes))
    outputs = len(_indices(r"output_blocks\.(\d+)\.", shapes))
    res_blocks = outputs // levels - 1
    if res_blocks < 1:
        raise ValueError(
            f"{levels} levels with {outputs} output_blocks do not make a guided-diffusion UNet "
            "(a classifier has no output_blocks)"
        )
    taken = _shape("input_blocks.0.0.weight", shapes)[1]
    out_channels = _shape("out.2.weight", shapes)[0]
    if taken != 3 or out_channels not in (3, 6):
        raise ValueError(
            f"the network turns {taken} channels into {out_channels}; a teacher needs 3 inputs "
            "(RGB) and 3 outputs, or 6 with the variance"
        )
    first = [f"input_blocks.{1 + level * (res_blocks + 1)}" for level in range(levels)]
    widths = tuple(_shape(f"{name}.0.out_layers.3.weight", shapes)[0] for name in first)
    emb = _shape("middle_block.0.emb_layers.1.weight", shapes)[0]
    return Architecture(
        channels=_shape("time_embed.0.weight", shapes)[1],
        level_channels=widths,
        attention=tuple(f"{name}.1.qkv.weight" in shapes for name in first),
        res_blocks=res_blocks,
        scale_shift=emb == 2 * widths[-1],
        residual_resampling=not _indices(r"output_blocks\.(\d+)\.\d\.conv\.weight", shapes),
        out_channels=out_channels,
    )


def check_shapes(shapes: Shapes, network: nn.Module) -> None:
    """Raises ValueError naming the first tensors whose shapes differ from the network's."""
    expected = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    wrong = [
        f"{name} is {shapes.get(name, 'missing')}, not {expected.get(name, 'expected at all')}"
        for name in sorted(expected.keys() | shapes.keys())
        if expected.get(name) != shapes.get(name)
    ]
    if wrong:
        raise ValueError(
            f"not a guided-diffusion UNet: {len(wrong)} tensors differ ({'; '.join(wrong[:3])})"
        )


def _shape(name: str, shapes: Shapes) -> tuple[int, ...]:
    """The shape of a weight with at least two dimensions; raises ValueError without one."""
    shape = shapes.get(name, ())
    if len(shape) < 2:
        raise ValueError(f"not a guided-diffusion UNet: it has no weight {name}")
    return shape


def _indices(pattern: str, shapes: Shapes) -> set[int]:
    """The numbers that the pattern's group matches at the start of the tensors' names."""
    return {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
