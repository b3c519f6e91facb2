"""Operations are counted as by hand."""

import torch
from torch import Tensor, nn

from distill.costs.flops import flops


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.layer(images), {}


class Teacher:
    def flops(self, size: tuple[int, int]) -> tuple[int, int]:
        return 3 * size[0], 5 * size[1]


def test_a_multiply_add_counts_two() -> None:
    counted = flops(Convolution(), Teacher(), (8, 6))  # type: ignore[arg-type]
    assert counted == {"student": 2 * 3 * 3 * 3 * 4 * 8 * 6, "teacher": 24, "teacher_whole": 30}


def test_a_teacher_that_cannot_tell_has_none() -> None:
    counted = flops(Convolution(), torch.nn.Identity(), (8, 6))  # type: ignore[arg-type]
    assert counted["teacher"] is None
