"""What a forward pass costs, counted operation by operation."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from students.student import Student
from teachers.protocol import Teacher


def flops(
    student: Student, teacher: Teacher | None, size: tuple[int, int]
) -> dict[str, int | None]:
    """Floating-point operations of products and convolutions for one image, two a multiply-add.

    Args:
        student: In eval mode, on the CPU.
        teacher: Its pass ends at the last layer asked for.
        size: (H, W) of the image.

    Returns:
        `student`, `teacher`, and `teacher_whole` without the early end; None where there is no
        teacher or it cannot tell.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(torch.zeros(1, 3, *size))
    used, whole = getattr(teacher, "flops", lambda size: (None, None))(size)
    return {"student": counter.get_total_flops(), "teacher": used, "teacher_whole": whole}
