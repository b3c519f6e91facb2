"""Any timm model as a teacher without timesteps: DINOv2, DINOv3, MAE, supervised ViTs, ConvNets.

These are the baseline that shows whether a diffusion model is the right teacher for a task.
"""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import timm
import torch
from safetensors import SafetensorError
from timm.models import resolve_model_input_args
from torch import Tensor, nn

from teachers import anatomy, loading
from teachers.diffusion import DiffusionTeacher, View
from teachers.noise import NoiseSchedule
from teachers.tap import first_tensor

LOCAL_FOLDER = "'local-dir:FOLDER', a folder written by timm.models.save_for_hf"
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    SafetensorError,
)


def timm_model(
    path: str,
    *,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    **view: Unpack[View],
) -> DiffusionTeacher:
    """A timm model that sees the image itself: its only timestep is 0, and there is no noise.

    Args:
        path: a timm model's name (`vit_small_patch14_dinov2.lvd142m`), `local-dir:FOLDER` as
            `timm.models.save_for_hf` writes it, or `hf-hub:ID`.
        kwargs: further arguments of the timm model.
        view: see `teachers.diffusion.View`; layers are timm's module names: `blocks.11`, `norm`,
            `layer3`, `stages.2`. Without noise every `input` is equal, and one draw is enough. A
            ViT's position embedding is resized once if `image_size` is given, otherwise every time.

    Raises:
        ValueError, OSError: see `DiffusionTeacher` and `TimmModel`.
    """
    return DiffusionTeacher(TimmModel(path, view.get("image_size"), kwargs), **view)


class TimmModel:
    """The family of `timm_model`, with its arguments (a `diffusion.Family`).

    Raises:
        OSError: its config cannot be read.
        ValueError: an unknown model or argument, or a model without feature maps.
    """

    def __init__(
        self, path: str, image_size: int | tuple[int, int] | None, kwargs: Mapping[str, Any]
    ) -> None:
        if re.fullmatch(r"[\w.]+", path) and not timm.is_model(path):
            close = difflib.get_close_matches(path.split(".")[0], timm.list_models(), n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see timm's list"
            raise ValueError(f"timm has no model {path!r}; {hint} (or give {LOCAL_FOLDER})")
        size = {} if image_size is None else {"img_size": anatomy.height_width(image_size)}
        try:
            self.arguments = resolve_model_input_args(path, size, **kwargs)
        except UNREADABLE as error:
            raise _unreadable("config", path, error) from error
        config: dict[str, Any] = self.arguments["pretrained_cfg"]
        _check_input(path, config)
        if image_size is None and config.get("fixed_input_size"):
            self.arguments["dynamic_img_size"] = True
        self.path, self.name = path, Path(path.split(":")[-1]).name
        self.noise_schedule = NoiseSchedule.without_noise()
        self.mean, self.std = torch.tensor(config["mean"]), torch.tensor(config["std"])
        own = {k: v for k, v in self.arguments.items() if not k.startswith("pretrained_")}
        self.configs: Mapping[str, Any] = own | {k: config[k] for k in ("mean", "std")}

        try:
            with torch.device("meta"):
                network: Any = self.build()["network"]
        except (TypeError, AssertionError, RuntimeError) as error:
            if "dynamic_img_size" in str(error):
                raise ValueError(
                    f"{path!r} works at a fixed image size, so image_size must be given; "
                    f"its own is {config['input_size'][-1]}"
                ) from error
            wrong = f"does not accept {dict(kwargs)}" if kwargs else "cannot be built as configured"
            raise ValueError(f"{path!r} {wrong}: {error}") from error
        if getattr(network, "in_chans", 3) != 3 or not getattr(network, "feature_info", None):
            raise ValueError(f"{path!r} does not turn RGB images into feature maps; choose another")
        self.image_size: int | tuple[int, int] | None = anatomy.height_width(
            config["input_size"][1:]
        )
        self.classes = 0
        self.coarsest = max(int(info["reduction"]) for info in network.feature_info)
        # Of its own size as well, which some networks do not divide but round up
        self.multiple = math.gcd(self.coarsest, *config["input_size"][1:])
        self.prefix: int = getattr(network, "num_prefix_tokens", 0)
        self.channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"

    def build(self) -> nn.ModuleDict:
        """The parts without trained weights: only the network, with its classifier."""
        network = timm.create_model(pretrained=False, **self.arguments)
        return nn.ModuleDict({"network": network})

    def load(self, random_weights: int | None) -> nn.ModuleDict:
        """The parts with trained weights or, with a seed, fresh ones."""
        if random_weights is not None:
            return loading.randomly(self.build, random_weights)
        try:
            network = timm.create_model(pretrained=True, **self.arguments)
        except UNREADABLE as error:
            raise _unreadable("weights", self.path, error) from error
        loading.check_finite(network, Path(self.path))
        return nn.ModuleDict({"network": network})

    def encode(self, parts: nn.ModuleDict, images: Tensor) -> Tensor:
        """The input of the network: the pixels themselves."""
        return images

    def forward(self, parts: nn.ModuleDict, x: Tensor, times: Tensor, labels: Tensor | None) -> Any:
        """Run the network on images normalised as in its training."""
        mean, std = (values.to(x)[:, None, None] for values in (self.mean, self.std))
        return parts["network"](((x + 1) / 2 - mean) / std)

    def feature_map(self, output: Any, x: Tensor) -> Any:
        """Turn tokens (B, prefix + h w, C) or maps (B, h, w, C) into (B, C, h, w), without prefix.

        The prefix is timm's: class token and registers precede the patches.
        """
        output = first_tensor(output)
        if not isinstance(output, Tensor):
            return output
        grid = -(-x.shape[-2] // self.coarsest), -(-x.shape[-1] // self.coarsest)
        count = grid[0] * grid[1]
        if output.ndim == 3 and output.shape[1] in (count, self.prefix + count):
            return output[:, -count:].mT.reshape(len(output), -1, *grid)
        if output.ndim != 4:
            return output
        # A map has the aspect of the image. Where both readings have, the network's word counts.
        first, last = (
            high * x.shape[-1] == wide * x.shape[-2]
            for high, wide in (output.shape[2:], output.shape[1:3])
        )
        if first == last:
            last = self.channels_last
        return output.permute(0, 3, 1, 2) if last else output


def _check_input(path: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError if a config does not say how to normalise RGB images."""
    for key, least in (("mean", -math.inf), ("std", 0), ("input_size", 0)):
        numbers = config.get(key)
        if (
            not isinstance(numbers, list | tuple)
            or len(numbers) != 3
            or not all(isinstance(x, int | float) and least < x < math.inf for x in numbers)
        ):
            wanted = "three numbers" + (" above 0" if least == 0 else "")
            raise ValueError(f"the config of {path!r}: {key} must be {wanted}, got {numbers!r}")


def _unreadable(what: str, path: str, error: Exception) -> OSError:
    reason = textwrap.shorten(str(error), 200) or type(error).__name__
    return OSError(f"cannot read the {what} of {path!r}: {reason}; give {LOCAL_FOLDER}")
