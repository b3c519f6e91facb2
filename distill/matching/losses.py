"""The feature loss of a pair of maps and the task loss, with one value per image."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import UserError, blame, nearest
from distill.landmarks import landmark_loss
from distill.matching.measures import Measure
from distill.matching.projectors import PROJECTORS, resize_map
from distill.registry import TABLES, resolve
from rl_policy.scaling import RunningScale
from students.heads import resize_logits


class FeatureLoss(nn.Module):
    """How far a student's feature map is from a teacher's, one value per image.

    The finer map is averaged down to the coarser grid (bilinear where the sizes do not divide); the
    student's map passes through a projector, and the teacher's is standardised.

    Args:
        measure: A name (`distill list losses`), `module:attribute`, a `Measure`, or a function.
        student_channels: Channels of the student's map, or of several for `fpn_ppm`.
        teacher_channels: Channels of the teacher's map.
        pooled: Compare the maps' averages over all positions.
        projector: A name in `PROJECTORS`, or `none`. `auto`: `linear` where channels differ and the
            measure compares them, `fpn_ppm` for several maps, otherwise none.
        standardise: Standardise the targets per channel.
        options: Options of the measure, such as `temperature`.

    Raises:
        UserError: On an unknown measure, projector or option, or an invalid combination; the
            message begins with the key of the pair.
    """

    def __init__(
        self,
        measure: str | Measure | Callable[..., Tensor],
        student_channels: int | Sequence[int],
        teacher_channels: int,
        *,
        pooled: bool = False,
        projector: str = "auto",
        standardise: bool = True,
        options: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if isinstance(measure, str):
            self.name, found = measure, resolve("losses", measure, "loss")
        else:
            function = measure.function if isinstance(measure, Measure) else measure
            self.name, found = getattr(function, "__name__", type(function).__name__), measure
        self.measure = found if isinstance(found, Measure) else Measure(found)
        self.options = _checked(options, self.name, self.measure.function)
        self.pooled = pooled
        if pooled and not self.measure.poolable:
            raise UserError(
                f"pooled: feature loss {self.name!r} compares positions, so it has no pooled form"
            )
        channels = [student_channels] if isinstance(student_channels, int) else student_channels
        self.projector = self._projector(projector, channels, teacher_channels)
        self.scale = None
        if standardise:
            self.scale = RunningScale(teacher_channels, shared=True, floor=1e-5, clip=None)

    def _projector(self, name: str, student: Sequence[int], teacher: int) -> nn.Module | None:
        align = self.measure.same_channels and list(student) != [teacher]
        if name == "auto":
            name = "fpn_ppm" if len(student) > 1 else "linear" if align else "none"
        if name == "none":
            if align or len(student) > 1:
                raise UserError(
                    f"projector: feature loss {self.name!r} compares {_listed(student)} channels "
                    f"with {teacher}, so it needs a projector"
                )
            return None
        if name not in PROJECTORS:
            known = [*PROJECTORS, "auto", "none"]
            raise UserError(f"projector: unknown projector {name!r}; {nearest(name, known)}")
        with blame("projector"):
            projector: nn.Module = PROJECTORS[name](student, teacher)
        return projector

    def forward(
        self, student_maps: Tensor | Sequence[Tensor], teacher_map: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Compare; gradients reach the student and the projector, never the teacher.

        Args:
            student_maps: (B, Cs, hs, ws), any float type; or several, shallowest first.
            teacher_map: (B, Ct, ht, wt), any float type.
            timesteps: (B,) int64, for a projector that depends on them.

        Returns:
            (B,) float32, computed in float32 (but the projector) whatever autocast says.

        Raises:
            UserError: If the batch is too small for the measure, or the measure does not return one
                value per image with a gradient.
        """
        maps = [student_maps] if isinstance(student_maps, Tensor) else student_maps
        if len(maps[0]) < self.measure.smallest_batch:
            raise UserError(
                f"feature loss {self.name!r} compares the images of a batch, so it needs at "
                f"least {self.measure.smallest_batch}, got {len(maps[0])}"
            )
        students, target = [x.float() for x in maps], teacher_map.detach().float()
        grid = self._grid(maps[0], target)
        if self.projector is None:
            student = resize_map(students[0], grid)
        else:
            student = self.projector(students, grid, timesteps)
        with torch.autocast(student.device.type, enabled=False):
            target = resize_map(target, grid)
            if self.scale is not None:
                target = target.movedim(1, -1)  # sums then round alike in every layout
                if self.training:
                    self.scale.update(target.flatten(end_dim=2))
                target = self.scale(target).movedim(-1, 1)
            found: Tensor = self.measure(student.float(), target, **self.options)
        if getattr(found, "shape", None) != target.shape[:1]:
            kind = tuple(found.shape) if isinstance(found, Tensor) else repr(found)
            raise UserError(
                f"feature loss {self.name!r} must return one value per image, shape "
                f"{tuple(target.shape[:1])}, got {kind!s:.80}"
            )
        if torch.is_grad_enabled() and student.requires_grad and not found.requires_grad:
            raise UserError(
                f"feature loss {self.name!r} returns values without a gradient to the student's map"
            )
        return found

    @torch.no_grad()
    def noise_floor(self, student_map: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The target's variance over draws of the noise, which no student can predict.

        Half the mean squared difference of two draws estimates it without bias. It is the least
        `mse` that a perfect student is left with, and has that loss's units: if targets are
        standardised, those of their variance over all images and timesteps. (So it is not the
        share of the variance at one timestep, which may be smaller or larger than that.)

        Args:
            student_map: (B, Cs, hs, ws), the finest of the student's; only its size matters.
            first, second: (B, Ct, ht, wt) the teacher's maps of the same images and timesteps
                under two draws of the noise.

        Returns:
            (B,) float32.
        """
        grid = self._grid(student_map, first)
        difference = resize_map(first.float() - second.float(), grid)
        if self.scale is not None:
            difference = difference * self.scale.inverse_deviation()[:, None, None]
        return 0.5 * difference.square().mean(dim=(1, 2, 3))

    def _grid(self, student: Tensor, teacher: Tensor) -> tuple[int, int]:
        (hs, ws), (ht, wt) = student.shape[-2:], teacher.shape[-2:]
        return (1, 1) if self.pooled else (min(hs, ht), min(ws, wt))


def task_loss(logits: Tensor, targets: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy, or `landmark_loss` for landmarks, one value per image.

    Args:
        logits: (B, C), or (B, C, h, w), which is resized to the masks.
        targets: Classes (B,) int64, masks (B, H, W) int64, or landmarks (B, K, 2) floating.
        ignore_index: Class, or mask value, that does not count.

    Returns:
        (B,) float32; for masks the mean over valid pixels, 0 if there are none.
    """
    if targets.is_floating_point():
        return landmark_loss(logits, targets)
    if targets.ndim == 1:
        return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="none")
    height, width = targets.shape[-2:]
    pixels = F.cross_entropy(
        resize_logits(logits, (height, width)), targets, ignore_index=ignore_index, reduction="none"
    )
    valid = (targets != ignore_index).sum(dim=(1, 2))
    return pixels.sum(dim=(1, 2)) / valid.clamp(min=1)


def class_shares(targets: Tensor, classes: int, ignore_index: int = 255) -> Tensor:
    """The share of each class in each target.

    Args:
        targets: Classes (B,) int64, or masks (B, H, W) int64.
        classes: L, their number.
        ignore_index: Mask value that does not count.

    Returns:
        (B, L) float32, rows that sum to 1, or to 0 where nothing is valid.
    """
    flat = targets.flatten(1) if targets.ndim > 1 else targets[:, None]
    valid = flat != ignore_index
    shares = torch.zeros(len(flat), classes, device=flat.device)
    shares.scatter_add_(1, flat.where(valid, 0), valid.float())
    return shares / shares.sum(dim=1, keepdim=True).clamp(min=1)


def _checked(
    options: Mapping[str, float], name: str, function: Callable[..., Tensor]
) -> dict[str, float]:
    """Check that the function has these options, and that they are numbers like their defaults."""
    signature = inspect.signature(function)
    try:
        signature.bind("student map", "teacher map")
    except TypeError as error:
        raise UserError(
            f"loss: {name} cannot be called with a student's and a teacher's map, as losses are: "
            f"{error}"
        ) from error
    parameters = signature.parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            near = nearest(option, known) if known else "it has none"
            raise UserError(
                f"options.{option}: feature loss {name!r} has no option {option!r}; {near}"
            )
        if type(known[option]) in (int, float) and type(value) not in (int, float):
            raise UserError(f"options.{option} must be a number, got {value!r}")
        least = 1 if option == "power" else 0  # below 1 it has no gradient at 0
        if name in TABLES["losses"] and not (least <= value < math.inf):
            raise UserError(f"options.{option} must be a number from {least} up, got {value!r}")
        if option == "temperature" and value == 0:
            raise UserError("options.temperature must be above 0: similarities are divided by it")
    return dict(options)


def _listed(channels: Sequence[int]) -> str:
    return " and ".join(str(count) for count in channels)
