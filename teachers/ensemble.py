"""Several teachers at once: their maps side by side, or joined over the channels."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Self, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import TypedDict  # in place of typing's, which pydantic reads from 3.12 on

from teachers.anatomy import LayerError
from teachers.diffusion import Flops, View
from teachers.noise import Randomness

OWN = ("image_size", "random_weights")  # otherwise the view's


class Member(TypedDict, total=False):
    """A teacher of an ensemble: `name`, `path`, and settings of its own."""

    name: str
    path: str
    image_size: int | tuple[int, int] | None
    random_weights: int | None
    options: dict[str, Any]


# Or pydantic would drop a misspelt key, where `_build` refuses it
Member.__pydantic_config__ = {"extra": "allow"}  # type: ignore[attr-defined]


class Part(NamedTuple):
    """A layer of one member."""

    member: str
    layer: str


def ensemble(
    path: str,
    *,
    factory_of: Callable[[str], Callable[..., Any]],
    members: Mapping[str, Member] | None = None,
    **view: Unpack[View],
) -> Ensemble:
    """Several teachers that look at the same images. In a recipe:

        teacher:
          name: ensemble
          path: ""
          options:
            members:
              ddpm: {name: diffusers_unet, path: A}
              dino: {name: timm, path: B, image_size: 224, options: {kwargs: {...}}}
        pairs:
          - {student: layer3, teacher: ddpm/up_blocks.1+dino/blocks.11}

    Args:
        path: must be empty; each member has its own.
        factory_of: from a teacher's name to its factory, `factory(path, **view, **options)`;
            raises ValueError for an unknown name.
        members: name -> `name` (as in `teacher.name`), `path`, and optionally `image_size`,
            `random_weights` (by default the view's) and `options`.
        view: of all members, see `teachers.diffusion.View`; layers are `member/layer`, or several
            joined by `+`, see `Ensemble.features`. Every member must be in one of them.

    Raises:
        ValueError, OSError: wrong `members` or layers, or an error of a member's factory.
    """
    if path:
        raise ValueError(f"path must be '' for an ensemble (each member has its own), got {path!r}")
    if not isinstance(members, Mapping) or not members:
        raise ValueError(f"members must map names to {{name: ..., path: ...}}, not {members!r}")
    if wrong := [name for name in members if "/" in name or "+" in name]:
        raise ValueError(f"member {wrong[0]!r}: / and + join names to layers; choose another name")
    layers = {layer: _parts(layer, members) for layer in view["layers"]}
    asked: dict[str, dict[str, None]] = {name: {} for name in members}  # ordered sets
    for parts in layers.values():
        for part in parts:
            asked[part.member][part.layer] = None
    built = {}
    for name, member in members.items():
        with _blame(f"member {name!r}"):
            if not asked[name]:
                raise ValueError("none of its layers is used; leave it out")
            try:
                built[name] = _build(member, factory_of, {**view, "layers": list(asked[name])})
            except LayerError as error:
                part = Part(name, error.layer)
                whole = next(layer for layer, parts in layers.items() if part in parts)
                raise LayerError(whole, f"member {name!r}: {error}") from error
    return Ensemble(built, layers)


class Ensemble:
    """Several teachers as one (a `protocol.Teacher`).

    Args:
        members: by name; teachers with `flops` and `parameters`. They draw noise in this order.
        layers: the layers to return, each with the parts that it joins.

    Attributes:
        channels: C of each layer's map, the sum over its parts.
        reductions: of each layer's map, the smallest of its parts.
        noise_schedule: that of the first member with noise.
    """

    def __init__(self, members: Mapping[str, Any], layers: Mapping[str, tuple[Part, ...]]) -> None:
        self.members, self._parts = dict(members), dict(layers)
        self.layers = tuple(layers)
        schedules = [member.noise_schedule for member in self.members.values()]
        self.noise_schedule = next((each for each in schedules if each.has_noise), schedules[0])
        self.name = "+".join(member.name for member in self.members.values())
        self.channels = {
            layer: sum(self.members[member].channels[name] for member, name in parts)
            for layer, parts in layers.items()
        }
        self.reductions = {
            layer: min(self.members[member].reductions[name] for member, name in parts)
            for layer, parts in layers.items()
        }

    @property
    def parameters(self) -> int:
        """Number of weights, those of all members."""
        return sum(member.parameters for member in self.members.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the members' names and fingerprints, in their order."""
        each = [(name, member.fingerprint) for name, member in self.members.items()]
        return hashlib.sha256(json.dumps(each).encode()).hexdigest()

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        for member in self.members.values():
            member.to(device)
        return self

    def features(
        self,
        images: Tensor,
        timesteps: Tensor,
        generator: Randomness = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The requested layers' maps, float32 (B, C, h, w) each.

        A member with another schedule sees the timestep with the nearest noise fraction, which is 0
        for one without noise. A layer of one part is that member's map. Joined parts are resized
        to the finest one and scaled to unit mean square over (C, h, w) for each image (RMSNorm,
        Zhang & Sennrich 2019): otherwise the member with the largest values would dominate a loss.
        Nothing is estimated, so nothing has to be stored.

        Args:
            images: (B, 3, H, W) RGB float in [0, 1], on the teacher's device.
            timesteps: (B,) int64 in 0..T-1 of the ensemble's schedule.
            generator: source of the noise, or one per image, used in the members' order.
            labels: (B,) int64 classes, passed to every member.

        Raises:
            ValueError: a timestep outside 0..T-1, or images of a shape unsuitable for a member.
        """
        fraction = self.noise_schedule.noise_fraction(timesteps)
        maps: dict[Part, Tensor] = {}
        for name, member in self.members.items():
            schedule = member.noise_schedule
            own = schedule.nearest(fraction) if schedule is not self.noise_schedule else timesteps
            features = member.features(images, own, generator, labels)
            maps |= {Part(name, layer): feature for layer, feature in features.items()}
        return {
            layer: _joined([maps[part] for part in parts]) for layer, parts in self._parts.items()
        }

    def flops(self, image_size: int | tuple[int, int]) -> Flops:
        """The cost of one image of `image_size`, summed over all members."""
        each = [member.flops(image_size) for member in self.members.values()]
        return Flops(sum(flops.used for flops in each), sum(flops.whole for flops in each))


def _joined(parts: list[Tensor]) -> Tensor:
    """Join maps (B, C_i, h_i, w_i) to (B, sum of C_i, h, w), the finest grid; keep a single one."""
    if len(parts) == 1:
        return parts[0]
    size = max((part.shape[-2:] for part in parts), key=torch.Size.numel)
    resized = [F.interpolate(part, size, mode="bilinear", antialias=True) for part in parts]
    unit = [x * x.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).rsqrt() for x in resized]
    return torch.cat(unit, dim=1)


def _parts(layer: str, members: Mapping[str, Any]) -> tuple[Part, ...]:
    """Split a layer's name into the parts that it joins."""
    parts = tuple(Part(*part.partition("/")[::2]) for part in layer.split("+"))
    for part in parts:
        if part.member not in members or not part.layer:
            choices = ", ".join(f"{name}/LAYER" for name in members)
            raise LayerError(layer, f"no layer {layer!r}; choose from {choices}")
    if len(set(parts)) < len(parts):
        raise LayerError(layer, f"layer {layer!r} names the same layer twice")
    return parts


def _build(
    member: Member,
    factory_of: Callable[[str], Callable[..., Any]],
    view: dict[str, Any],
) -> Any:
    """Build one member with its own factory."""
    needed, known = ("name", "path"), ("name", "path", *OWN, "options")
    if not isinstance(member, Mapping) or not set(needed) <= set(member):
        raise ValueError(f"{member!r} needs name and path")
    if unknown := sorted(set(member) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
        raise ValueError(f"unknown key {unknown[0]!r}; {hint}")
    options, factory = member.get("options", {}), factory_of(member["name"])
    if twice := sorted(view.keys() & options):
        raise ValueError(f"option {twice[0]!r} cannot be set per member")
    view |= {key: value for key, value in member.items() if key in OWN}
    try:
        return factory(member["path"], **view, **options)
    except TypeError as error:
        raise ValueError(f"{member['name']} with options {options}: {error}") from error


@contextmanager
def _blame(who: str) -> Iterator[None]:
    """Prefix errors with the member's name."""
    try:
        yield
    except LayerError:  # says so itself
        raise
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
    except OSError as error:
        raise OSError(f"{who}: {error}") from error
