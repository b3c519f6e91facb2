"""Checks whether a teacher can be given the labels of training images (`teacher.labels`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.benchmarks import Benchmark
from distill.config import TeacherConfig
from distill.errors import UserError, blame
from distill.tasks import traits
from teachers.protocol import Teacher


def check_task(config: TeacherConfig, benchmark: Benchmark) -> None:
    """Check, before a teacher is read, that labels are classes. Raises UserError."""
    if config.labels and benchmark.task != "classification":
        label = "a mask" if traits(benchmark).classes else "a set of points"
        raise UserError(
            f"teacher.labels: {label} is not a class that a teacher can be given; leave it "
            f"false for {benchmark.task}"
        )


def check_labels(config: TeacherConfig, teacher: Teacher, classes: int, image: Tensor) -> None:
    """Check that the teacher can be given the labels, and that its prompts are used.

    Args:
        classes: How many the benchmark has.
        image: (1, 3, H, W), of the size that the teacher will see.

    Raises:
        UserError: Names the recipe's key that does not fit.
    """
    members: dict[str, Any] = config.options.get("members") or {}
    options = {
        f"members.{name}.options.": member.get("options", {}) for name, member in members.items()
    }
    if not config.labels:
        for where, given in {"": config.options, **options}.items():
            for key in ("class_prompts", "class_labels"):
                if given.get(key):
                    raise UserError(
                        f"teacher.options.{where}{key}: the teacher is not given labels; set "
                        "teacher.labels=true, or leave it out"
                    )
        return
    teachers = getattr(teacher, "members", {"": teacher}).values()
    families = [getattr(one, "family", None) for one in teachers]
    known = {family.classes for family in families if family is not None and family.classes}
    if other := known - {classes}:
        raise UserError(
            f"teacher.labels: the teacher is conditioned on {other.pop()} classes, but the data "
            f"have {classes}; leave it false, or (stable_diffusion) give as many "
            "teacher.options.class_prompts"
        )
    if not known and None not in families:
        raise UserError(
            f"teacher.labels: {teacher.name} is not class-conditional; leave it false, or "
            "(stable_diffusion) give teacher.options.class_prompts, (dit) class_labels=true"
        )
    with blame("teacher.labels"):  # a class that it knows nothing of shows here
        last = torch.tensor([classes - 1])
        teacher.features(image, torch.zeros_like(last), None, last)
