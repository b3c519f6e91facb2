"""One way to take a step, and measurements of it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from distill.build import build_training_set, single_process
from distill.config import RunConfig
from distill.costs.flops import operations
from distill.costs.memory import part_memory
from distill.tasks import traits
from distill.training.batch import Batch
from distill.training.clock import Clock, Timed, untimed, wait
from distill.training.fit import check_schedule
from distill.training.loop import batches
from distill.training.trainer import Trainer
from teachers.protocol import Teacher


class Case(NamedTuple):
    """One way to take the step, and what it takes it with."""

    trainer: Trainer
    batch: Batch
    memory: float
    """Largest memory in GiB: on a GPU of this way alone, otherwise of the program so far, including
    the ways before it."""

    def step(self) -> None:
        """Take the step."""
        self.trainer.train_step(self.batch)


def prepare(config: RunConfig, whole: bool = False) -> Case:
    """A trainer that took a step, its cache filled for every timestep of its images.

    Args:
        config: The recipe, whose next steps all teach.
        whole: Whether the teacher computes its complete network.

    Raises:
        UserError: A mistake in the recipe.
    """
    accelerator = single_process(config.device, "bench")
    device = accelerator.device
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    data = build_training_set(config.data)
    check_schedule(config, 1, traits(data.benchmark).dense)
    trainer = Trainer(config, "distilled", data, accelerator)
    assert trainer.teacher is not None
    if whole:
        _compute_all(trainer.teacher)
    trainer.open_cache()
    batch = next(batches(trainer))
    if trainer.cache is not None:
        assert batch.tags is not None
        for number in range(len(trainer.timesteps)):
            bins = torch.full((len(batch.tags),), number)
            trainer.cache.fill(batch.images, batch.tags, bins)
    trainer.train_step(batch)
    if device.type == "cuda":
        memory = (torch.cuda.max_memory_allocated(device) - before) / 2**30
    else:  # Linux counts in KiB, macOS in bytes
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return Case(trainer, batch, memory)


def _compute_all(teacher: Teacher) -> None:
    """Have it compute its network to the end, as far as it is one of ours."""
    for member in getattr(teacher, "members", {"": teacher}).values():
        if hasattr(member, "early_exit"):
            member.early_exit = False


def part_seconds(case: Case, repeat: int) -> dict[str, float]:
    """Seconds of the parts of a step, and of its data."""
    trainer = case.trainer
    clock = trainer.clock = Clock(trainer.accelerator.device)
    stream = batches(trainer)
    for _ in range(repeat):
        with clock("data"):
            batch = next(stream)
        trainer.train_step(batch)
    trainer.clock = untimed
    return {part: seconds / repeat for part, seconds in clock.seconds.items()}


def part_mib(case: Case) -> dict[str, float]:
    """MiB that tensors hold at most in the parts of a step, above those between steps."""
    trainer = case.trainer
    stream = batches(trainer)

    def step(part: Timed) -> None:
        trainer.clock = part
        with part("data"):
            batch = next(stream)
        trainer.train_step(batch)
        trainer.clock = untimed

    return part_memory(step, trainer.accelerator.device)


def student_operations(case: Case) -> int:
    """Floating-point operations of the student's forward and backward pass for the case's
    images."""
    student, batch = case.trainer.student, case.batch

    def step() -> None:
        logits, maps = student(batch.images, labelled=len(batch.labelled))
        total = logits.sum() + sum(x.float().sum() for x in maps.values())
        total.backward()

    counted = operations(step)
    student.zero_grad()
    return counted


def feature_error(ours: Trainer, naive: Trainer, batch: Batch) -> float:
    """Relative L2 distance of our features from those of the complete float32 network, of the layer
    where it is largest."""
    images = batch.images
    assert ours.teacher is not None
    assert naive.teacher is not None
    timesteps = torch.linspace(0, len(ours.teacher.noise_schedule) - 1, len(images)).long()
    mine, theirs = (
        teacher.features(images, timesteps, torch.Generator().manual_seed(0))
        for teacher in (ours.teacher, naive.teacher)
    )
    return max(float((mine[name] - x).norm() / x.norm()) for name, x in theirs.items())


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    x = torch.rand(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(seconds_of(lambda: x @ x, device, 3) for _ in range(10))


def reward_seconds(case: Case) -> float:
    """Forward and backward of the reward head alone, which belongs to the policy; 0 without one."""
    distiller, teacher = case.trainer.distiller, case.trainer.teacher
    head, images = distiller.reward_head, case.batch.labelled
    if head is None:
        return 0.0
    assert teacher is not None
    bins = torch.zeros(len(images), dtype=torch.int64)
    feature = teacher.features(images, case.trainer.timesteps[bins])[distiller.reward_layer]
    bins = bins.to(images.device)
    seconds = min(
        seconds_of(lambda: head(feature, bins).sum().backward(), images.device, 3) for _ in range(5)
    )
    head.zero_grad()
    return seconds


def seconds_of(step: Callable[[], Any], device: torch.device, repeat: int) -> float:
    """Seconds of one step, the mean of several in a row."""
    wait(device)
    began = time.perf_counter()
    for _ in range(repeat):
        step()
    wait(device)
    return (time.perf_counter() - began) / repeat
