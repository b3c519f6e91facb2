"""The cost of a forward pass, counted operation by operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from students.student import Student
from teachers.diffusion import Flops
from teachers.protocol import Teacher


def operations(run: Callable[[], object]) -> int:
    """Floating-point operations of products and convolutions in `run`, two per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        run()
    total: int = counter.get_total_flops()
    return total


def flops(
    student: Student, teacher: Teacher | None, size: tuple[int, int]
) -> dict[str, int | None]:
    """The `operations` of one image.

    Args:
        student: In eval mode, on the CPU.
        teacher: Its pass ends at the last layer asked for.
        size: (H, W) of the image.

    Returns:
        `student`, `teacher`, and `teacher_whole` without the early end; None where there is no
        teacher or it does not count them.
    """
    with torch.no_grad():
        forward = operations(lambda: student(torch.zeros(1, 3, *size)))
    used, whole = teacher_flops(teacher, size) or (None, None)
    return {"student": forward, "teacher": used, "teacher_whole": whole}


def teacher_flops(teacher: Teacher | None, size: tuple[int, int]) -> Flops | None:
    """The teacher's operations for one image of (H, W); None if it does not count them."""
    count = getattr(teacher, "flops", None)
    return None if count is None else count(size)
