"""Projectors from a student's maps to the shape of a teacher's, trained along and not exported.

Every projector is called with one or more maps of the student, the grid (h, w) of the output, and
the timesteps of the teacher's maps, and returns (B, channels of the teacher, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]


class Linear(nn.Conv2d):
    """A 1x1 convolution. student: channels of the single map; teacher: output channels."""

    def __init__(self, student: Sequence[int], teacher: int) -> None:
        super().__init__(_only(student, "linear"), teacher, 1)

    def forward(self, maps: Sequence[Tensor], grid: Grid, timesteps: Tensor) -> Tensor:  # type: ignore[override]
        """maps: one (B, C, H, W) -> (B, teacher, *grid)."""
        return super().forward(resize_map(maps[0], grid))


class FiLM(nn.Module):
    """A 1x1 convolution of channels that the timestep scales and shifts (Perez et al. 2018).

    The teacher's map depends on the timestep, but the student does not know it: the projector
    learns the difference between timesteps, so that the student need not average over them. It
    starts as a plain 1x1 convolution.

    Args:
        student: Channels of the one map.
        teacher: Output channels.
        width: Channels of the embedding of timesteps (Vaswani et al. 2017, section 3.5).
    """

    def __init__(self, student: Sequence[int], teacher: int, width: int = 64) -> None:
        super().__init__()
        channels = _only(student, "film")
        self.width = width
        last = nn.Linear(width, 2 * channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.modulation = nn.Sequential(nn.Linear(width, width), nn.SiLU(), last)
        self.convolution = nn.Conv2d(channels, teacher, 1)

    def forward(self, maps: Sequence[Tensor], grid: Grid, timesteps: Tensor) -> Tensor:
        """maps: one (B, C, H, W); timesteps: (B,) int64 -> (B, teacher, *grid)."""
        embedding = get_timestep_embedding(timesteps.to(maps[0].device), self.width)
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        projected: Tensor = self.convolution(resize_map(maps[0], grid) * (1 + scale) + shift)
        return projected


class PyramidRegressor(nn.Module):
    """A feature pyramid with pyramid pooling over several student maps (DreamTeacher's regressor).

    Li et al. 2023, "DreamTeacher", section 3.1: the deepest map is pooled at four scales (Zhao et
    al. 2017), and merged top-down with the shallower ones (Lin et al. 2017); a 3x3 convolution and
    a 1x1 convolution to the teacher's channels follow, here at the grid that is asked for.

    Args:
        student: Channels of the maps, shallowest first.
        teacher: Output channels.
        width: Channels inside.
    """

    SCALES = (1, 2, 3, 6)

    def __init__(self, student: Sequence[int], teacher: int, width: int = 128) -> None:
        super().__init__()
        deepest = student[-1]
        self.pooled = nn.ModuleList(nn.Conv2d(deepest, width // 4, 1) for _ in self.SCALES)
        self.context = _block(deepest + len(self.SCALES) * (width // 4), width)
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in student[:-1])
        self.smooth = _block(width, width)
        self.convolution = nn.Conv2d(width, teacher, 1)

    def forward(self, maps: Sequence[Tensor], grid: Grid, timesteps: Tensor) -> Tensor:
        """maps: (B, C_i, h_i, w_i), in the order of `student` -> (B, teacher, *grid)."""
        deepest = maps[-1]
        size = deepest.shape[-2:]
        scales = [
            _upsample(convolve(F.adaptive_avg_pool2d(deepest, scale)), size)
            for scale, convolve in zip(self.SCALES, self.pooled, strict=True)
        ]
        merged = self.context(torch.cat([deepest, *scales], dim=1))
        for lateral, x in reversed(list(zip(self.laterals, maps[:-1], strict=True))):
            merged = lateral(x) + _upsample(merged, x.shape[-2:])
        projected: Tensor = self.convolution(self.smooth(resize_map(merged, grid)))
        return projected


PROJECTORS = MappingProxyType({"linear": Linear, "film": FiLM, "fpn_ppm": PyramidRegressor})


def resize_map(x: Tensor, grid: Grid) -> Tensor:
    """(B, C, H, W) -> (B, C, *grid): averaged where the sizes divide, otherwise bilinear."""
    height, width = x.shape[-2:]
    if (height, width) == grid:
        return x
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(x, (height // grid[0], width // grid[1]))
    return F.interpolate(x, grid, mode="bilinear", antialias=True)


def _upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _block(inside: int, outside: int) -> nn.Sequential:
    """3x3 convolution, normalised by groups: batches mix timesteps, and may be small."""
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1, bias=False),
        nn.GroupNorm(8, outside),
        nn.ReLU(inplace=True),
    )


def _only(student: Sequence[int], name: str) -> int:
    if len(student) != 1:
        raise ValueError(
            f"projector {name!r} needs one student map, got {len(student)}; use fpn_ppm for several"
        )
    return student[0]
