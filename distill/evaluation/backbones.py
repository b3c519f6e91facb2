"""The subjects of `distill evaluate` as backbones: a student, a timm model, or a teacher.

All of them turn images in [0, 1] into named feature maps, so that one protocol fits all.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, Self

import torch
from timm.models import get_model_input_config
from torch import Tensor

from distill.costs.flops import operations, teacher_flops
from distill.errors import UserError, nearest
from students.student import Student
from teachers.protocol import Teacher

SCRATCH = "scratch"
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
EXPORTED = (".onnx", ".pt2")
"""Files of `distill export` that run no code of their own."""


class Subject(NamedTuple):
    """A subject as it is written on the command line."""

    text: str
    kind: Literal["student", "file", "timm", "teacher"]
    path: str
    """A folder; an exported file; a timm name; what a recipe gives as `teacher.path`."""
    weights: str = ""
    """Weights of a timm model: a file, `scratch`, or empty for timm's published ones."""
    layers: tuple[str, ...] = ()
    """Feature maps to read; by default the last one."""
    timestep: int = 0
    family: str = ""
    """The `teacher.name` of a teacher."""


def parse_subject(text: str) -> Subject:
    """Read one subject.

    Args:
        text: `runs/NAME`, an exported student, `FILE.onnx` or `FILE.pt2`; `timm:NAME`,
            `timm:NAME:scratch`, `timm:NAME:FILE`; `teacher:PATH`. Options follow after commas:
            `layers=A+B`, and of a teacher `timestep=T` and `family=NAME`.

    Raises:
        UserError: An unknown or misplaced option.
    """
    source, words = _divided(text)
    kind: Literal["student", "file", "timm", "teacher"] = "student"
    if source.startswith("timm:"):
        kind, source = "timm", source.removeprefix("timm:")
    elif source.startswith("teacher:"):
        kind, source = "teacher", source.removeprefix("teacher:")
    elif source.endswith(EXPORTED):
        kind = "file"
    elif source.endswith(".ts"):
        raise UserError(
            f"{text}: a TorchScript file is a program and is not evaluated; name the run or the "
            f"exported student that it came from, or a {' or '.join(EXPORTED)} file"
        )
    known = ("layers", "timestep", "family") if kind == "teacher" else ("layers",)
    options = dict(word.partition("=")[::2] for word in words)
    for name in options:
        if name not in known:
            raise UserError(f"{text}: unknown option {name!r} of a {kind}; {nearest(name, known)}")
    timestep = options.get("timestep", "0")
    if not timestep.isdecimal():
        raise UserError(
            f"{text}: timestep={timestep} must be an index of the noise schedule, 0..T-1"
        )
    weights = ""
    if kind == "timm" and source.endswith((f":{SCRATCH}", *WEIGHT_FILES)):
        source, _, weights = source.rpartition(":")
    layers = tuple(filter(None, options.get("layers", "").split("+")))
    if not source:
        raise UserError(f"{text}: a {kind} needs a name or a folder, as in timm:resnet18")
    if kind == "teacher" and not layers:
        raise UserError(
            f"{text}: name the feature maps, for example teacher:{source},layers=up_blocks.1,"
            "timestep=50 "
            f"(`distill teacher layers {source}` lists them)"
        )
    return Subject(
        text, kind, source, weights, layers, int(timestep), options.get("family", "diffusers_unet")
    )


def _divided(text: str) -> tuple[str, list[str]]:
    """A subject's place and its options; a file or folder that exists may have commas itself."""
    parts = text.split(",")
    for count in range(len(parts), 1, -1):
        source = ",".join(parts[:count])
        if os.path.exists(re.sub("^(teacher:|timm:[^:]*:)", "", source)):
            return source, parts[count:]
    return parts[0], parts[1:]


class Backbone(Protocol):
    """A frozen network with named feature maps; it never gets gradients.

    Attributes:
        layers: The maps it gives, shallowest first.
        channels: C of each map.
        parameters: Number of weights of the whole network; None if unknown.
    """

    layers: Sequence[str]
    channels: Mapping[str, int]
    parameters: int | None

    def flops(self, size: tuple[int, int]) -> int | None:
        """Floating-point operations until the last map for one image of (H, W), two per
        multiply-add; None if unknown."""
        ...

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> layer -> (B, C, h, w) float32, in order of `layers`."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        ...


class NetworkBackbone:
    """The backbone of a student, or of any timm model in a student's place (a `Backbone`).

    Args:
        student: Gives at least one map.
    """

    def __init__(self, student: Student) -> None:
        self.student = student.eval().requires_grad_(False)
        self.layers: Sequence[str] = student.layers
        self.channels: Mapping[str, int] = student.channels
        weights = student.backbone.parameters()
        self.parameters: int | None = sum(weight.numel() for weight in weights)

    def flops(self, size: tuple[int, int]) -> int | None:
        """See `Backbone`."""
        image = torch.zeros(1, 3, *size, device=self.student.mean.device)
        return operations(lambda: self.maps(image))

    @torch.no_grad()
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone`; images of another size than the student's too, if it is convolutional."""
        height, width = images.shape[-2:]
        maps = at_size(self.student, (height, width))(images, labelled=0)[1]
        return {name: x.float() for name, x in maps.items()}

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.student.to(device)
        return self


class TeacherBackbone:
    """A teacher's features at one timestep (a `Backbone`).

    Every image gets the same draw of the noise, whatever batch it comes in.

    Args:
        teacher: Gives the maps wanted.
        timestep: Of all images, 0..T-1.
        seed: Seed of the noise, the same for every image.
    """

    def __init__(self, teacher: Teacher, timestep: int, seed: int = 0) -> None:
        self.teacher, self.timestep, self.seed = teacher, timestep, seed
        self.layers: Sequence[str] = teacher.layers
        self.channels: Mapping[str, int] = teacher.channels
        self.parameters: int | None = getattr(teacher, "parameters", None)

    def flops(self, size: tuple[int, int]) -> int | None:
        """See `Backbone`."""
        flops = teacher_flops(self.teacher, size)
        return flops and flops.used

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone`."""
        noise = [torch.Generator().manual_seed(self.seed) for _ in images]
        return self.teacher.features(images, torch.full((len(images),), self.timestep), noise)

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, in place."""
        self.teacher.to(device)
        return self


def at_size(student: Student, size: tuple[int, int]) -> Student:
    """A student that shares its weights with the given one, for images of another (H, W).

    Raises:
        UserError: Its backbone takes images of one size alone, as a plain ViT does, or its deepest
            map would have no position.
    """
    if student.image_size == size:
        return student
    if get_model_input_config(student.backbone)["fixed_input_size"]:
        height, width = student.image_size
        raise UserError(
            f"evaluate.scales: this network only accepts images of {height}x{width} px; leave the "
            "scales at [1.0], or cut larger images with evaluate.window"
        )
    view = copy.copy(student)
    pairs = zip(student.input_size, size, student.image_size, strict=True)
    height, width = (round(seen * now / given) for seen, now, given in pairs)
    view.input_size, view.image_size = (height, width), size
    deepest = max(info["reduction"] for info in student.backbone.feature_info)
    if min(view.input_size) < deepest:
        raise UserError(
            f"evaluate.scales: images of {size[0]}x{size[1]} px are too small for this network, "
            f"whose reduction is {deepest}; leave the smallest scale out"
        )
    return view


def predictor(student: Student) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, H, W) in [0, 1] -> the student's logits, for images of any size."""

    def predict(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        logits: Tensor = at_size(student, (height, width))(images)[0]
        return logits

    return predict
