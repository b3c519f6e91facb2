"""`distill bench`: a distillation step beside the naive one, in turn, in one process."""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill import checkpoint
from distill.build import build_training_set, single_process
from distill.config import (
    DataConfig,
    PairConfig,
    PolicyConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from distill.costs.flops import operations
from distill.costs.naive import WholeTeacher, write_cifar10_ddpm
from distill.drawing import plots
from distill.errors import UserError
from distill.evaluation.footprint import part_memory
from distill.provenance import commit, hardware
from distill.teacher import build_teacher, teacher_dtype
from distill.training.batch import Batch
from distill.training.clock import Clock, Timed, untimed, wait
from distill.training.loop import batches
from distill.training.trainer import Trainer
from rl_policy.reward import TeacherTaskReward
from teachers.diffusion import DiffusionTeacher


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


def bench(
    *, batch: int, rounds: int, layer: str, teacher: str | None, compile: bool, out: str | None
) -> str:
    """Time our step against the naive one at 32 px, with a UNet and a resnet18.

    Ours: bfloat16 where the machine has it, channels_last, the UNet left after the layer; once with
    a filled feature cache too. Naive: float32, the complete UNet. Student, losses, policy and
    images are the same.

    Args:
        batch: Images per step.
        rounds: How often all take their turn, after one round to warm up.
        layer: The teacher's layer.
        teacher: A path as in a recipe; None: the network of CIFAR-10's DDPM, its weights random.
        compile: Our teacher and student compiled.
        out: A JSON file for the figures, with a bar chart beside it.

    Returns:
        The table to print.
    """
    if batch < 2 or rounds < 1:
        raise UserError(f"bench: needs at least 2 images and 1 round, got {batch} and {rounds}")
    if out is not None:
        checkpoint.check_json("--out", Path(out))
    with tempfile.TemporaryDirectory() as scratch:
        config = _config(Path(scratch), batch, layer, teacher, compile)
        build_teacher(config, layers=[layer], asked_by="--layer")  # a wrong one shows here
        cases = {
            "ours": _case(config),
            "cached": _case(_cached(config, Path(scratch))),
            "naive": _case(_naive(config), whole=True),
        }
        figures = _figures(cases, rounds)
    given = {"batch": batch, "teacher": teacher, "layer": layer, "compile": compile}
    figures = given | figures
    if out is not None:
        checkpoint.write_text(out, json.dumps(figures, indent=2) + "\n")
        milliseconds = {
            name: {part: 1e3 * x for part, x in figures[_key("parts", name)].items()}
            for name in cases
        }
        plots.bars(Path(out).with_suffix(".png"), milliseconds, f"milliseconds, {batch} images")
    return _table(figures, rounds)


def _figures(cases: Mapping[str, Case], rounds: int) -> dict[str, Any]:
    """The costs of the cases, measured in turn, and how near the machine's limit our step is."""
    ours, naive = cases["ours"].trainer, cases["naive"].trainer
    device, batch = ours.accelerator.device, len(cases["ours"].batch.labelled)
    repeat = 10 if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        if sys.stderr.isatty():
            print(f"round {number} of {rounds}", end="\r", file=sys.stderr, flush=True)
        for name, case in cases.items():
            seconds[name].append(_seconds(case.step, device, repeat))
    taken = {name: values[1:] for name, values in seconds.items()}
    middle = {name: statistics.median(values) for name, values in taken.items()}
    parts = {name: _parts(case, repeat=max(3, repeat)) for name, case in cases.items()}
    assert isinstance(ours.teacher, DiffusionTeacher)
    used, whole = ours.teacher.flops(32)
    student = _student_flops(cases["ours"]) / batch
    dtype = teacher_dtype(ours.config)
    peak = _product_rate(device, getattr(torch, dtype))
    mine = parts["ours"]
    policy = mine["policy"] + _reward_seconds(ours, cases["ours"].batch)
    error = _feature_error(ours, naive, cases["ours"].batch)
    memory = {name: _memory(case) for name, case in cases.items()}  # last: it is not timed
    return {
        "images_per_second": batch / middle["ours"],
        "images_per_second_cached": batch / middle["cached"],
        "naive_images_per_second": batch / middle["naive"],
        "ratio": middle["naive"] / middle["ours"],
        "ratios": _quotients(taken["naive"], taken["ours"]),
        "ratio_cached": middle["naive"] / middle["cached"],
        "ratios_cached": _quotients(taken["naive"], taken["cached"]),
        "policy_share": policy / sum(mine.values()),
        "feature_error": error,
        "share_of_peak": batch * (used + student) / middle["ours"] / peak,
        "share_of_peak_teacher": batch * used / mine["teacher"] / peak,
        "share_of_peak_student": batch * student / (mine["student"] + mine["backward"]) / peak,
        "peak_tflops": peak / 1e12,
        "dtype": dtype,
        "teacher_gflop": used / 1e9,
        "naive_teacher_gflop": whole / 1e9,
        "student_gflop": student / 1e9,
        **{_key("parts", name): of for name, of in parts.items()},
        **{_key("parts_memory_mib", name): of for name, of in memory.items()},
        "memory_gib": {name: case.memory for name, case in cases.items()},
        "hardware": hardware(device),
        "commit": commit(),
    }


def _key(figure: str, name: str) -> str:
    """Name of a case's figure: the case is appended, except for ours."""
    return figure if name == "ours" else f"{figure}_{name}"


def _table(figures: Mapping[str, Any], rounds: int) -> str:
    def line(name: str, rate: float, note: str, ratios: list[float] | None = None) -> str:
        row = f"  {name:7} {rate:8.1f} images/s"
        if ratios:
            spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
            row += f"  {statistics.median(ratios):5.1f} x naive ({spread})"
        return f"{row:60}  {note}"

    of_naive, of_ours = figures["naive_teacher_gflop"], figures["teacher_gflop"]
    parts = ", ".join(f"{name} {1e3 * x:.3g}" for name, x in figures["parts"].items())
    memory = ", ".join(f"{name} {x:.2f}" for name, x in figures["memory_gib"].items())
    held = ", ".join(f"{name} {x:.3g}" for name, x in figures["parts_memory_mib"].items())
    return "\n".join(
        [
            f"one step: {figures['batch']} images of 32 px, {figures['layer']} of "
            f"{figures['teacher'] or 'the CIFAR-10 DDPM'}, resnet18, median of {rounds} rounds, "
            f"{figures['hardware']}",
            line("naive", figures["naive_images_per_second"], f"float32, {of_naive:.1f} GFLOP"),
            line(
                "ours",
                figures["images_per_second"],
                f"{figures['dtype']}, {of_ours:.1f} GFLOP",
                figures["ratios"],
            ),
            line(
                "cached",
                figures["images_per_second_cached"],
                "features kept",
                figures["ratios_cached"],
            ),
            f"  parts   {parts} ms",
            f"  policy  {figures['policy_share']:.1%} of our step: choosing, learning, reward head",
            f"  peak    {figures['share_of_peak']:.0%} of the {figures['peak_tflops']:.3g} TFLOP/s "
            f"of {figures['dtype']} products; teacher {figures['share_of_peak_teacher']:.0%}, "
            f"student {figures['share_of_peak_student']:.0%}",
            f"  memory  {memory} GiB at most so far",
            f"          {held} MiB while that part runs, beside the weights",
            f"  error   {figures['feature_error']:.2%} of the float32 features (relative L2)",
        ]
    )


def _config(folder: Path, batch: int, layer: str, teacher: str | None, compile: bool) -> RunConfig:
    write_cifar10_ddpm(folder)
    return RunConfig(
        data=DataConfig(options={"size": 32, "train": batch}, augment="none"),
        teacher=TeacherConfig(
            path=teacher or str(folder),
            random_weights=None if teacher else 0,
            compile=compile,
        ),
        student=StudentConfig(model="resnet18", compile=compile),
        pairs=[PairConfig(student=["layer2"], teacher=layer)],
        policy=PolicyConfig(bins=10),
        train=TrainConfig(batch=batch, unlabelled_batch=0, floor_every=0, steps=10**9),
    )


def _cached(config: RunConfig, folder: Path) -> RunConfig:
    teacher = dataclasses.replace(config.teacher, cache=str(folder / "cache"))
    return dataclasses.replace(config, teacher=teacher)


def _naive(config: RunConfig) -> RunConfig:
    train = dataclasses.replace(config.train, precision="no", channels_last=False)
    teacher = dataclasses.replace(config.teacher, dtype="float32", compile=False)
    student = dataclasses.replace(config.student, compile=False)
    return dataclasses.replace(config, train=train, teacher=teacher, student=student)


def _case(config: RunConfig, whole: bool = False) -> Case:
    """A trainer that took a step, its cache filled for every timestep of its images."""
    accelerator = single_process(config.device, "bench")
    device = accelerator.device
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    trainer = Trainer(config, "distilled", build_training_set(config.data), accelerator)
    if whole:
        assert isinstance(trainer.teacher, DiffusionTeacher)
        trainer.teacher = WholeTeacher(trainer.teacher)  # type: ignore[assignment]
    trainer.open_cache()
    batch = next(batches(trainer))
    if trainer.cache is not None:
        assert batch.tags is not None
        for number in range(len(trainer.timesteps)):
            bins = torch.full((len(batch.tags),), number)
            trainer.cache.fill(batch.labelled, batch.tags, bins)
    trainer.train_step(batch)
    if device.type == "cuda":
        memory = (torch.cuda.max_memory_allocated(device) - before) / 2**30
    else:  # Linux counts in KiB, macOS in bytes
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return Case(trainer, batch, memory)


def _parts(case: Case, repeat: int) -> dict[str, float]:
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


def _memory(case: Case) -> dict[str, float]:
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


def _student_flops(case: Case) -> int:
    """Floating-point operations of the student's forward and backward pass for the case's
    images."""
    student, train = case.trainer.student, case.trainer.config.train
    assert train.unlabelled_batch == 0

    def step() -> None:
        logits, maps = student(case.batch.labelled, labelled=len(case.batch.labelled))
        total = logits.sum() + sum(x.float().sum() for x in maps.values())
        total.backward()

    counted = operations(step)
    student.zero_grad()
    return counted


def _feature_error(ours: Trainer, naive: Trainer, batch: Batch) -> float:
    """Relative L2 distance of our features from those of the complete float32 network."""
    images = batch.labelled
    assert ours.teacher is not None
    timesteps = torch.linspace(0, len(ours.teacher.noise_schedule) - 1, len(images)).long()
    maps = []
    for trainer in (ours, naive):
        assert trainer.teacher is not None
        noise = torch.Generator().manual_seed(0)
        maps.append(next(iter(trainer.teacher.features(images, timesteps, noise).values())))
    mine, theirs = (x.float() for x in maps)
    return float((mine - theirs).norm() / theirs.norm())


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    x = torch.rand(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(_seconds(lambda: x @ x, device, 3) for _ in range(10))


def _reward_seconds(trainer: Trainer, batch: Batch) -> float:
    """Forward and backward of the reward head alone, which belongs to the policy."""
    head, device = trainer.distiller.reward_head, trainer.accelerator.device
    assert isinstance(head, TeacherTaskReward)
    assert trainer.teacher is not None
    maps = trainer.teacher.features(batch.labelled, torch.zeros(len(batch.labelled)).long())
    feature = next(iter(maps.values()))
    bins = torch.zeros(len(feature), dtype=torch.int64, device=device)
    seconds = min(
        _seconds(lambda: head(feature, bins).sum().backward(), device, 3) for _ in range(5)
    )
    head.zero_grad()
    return seconds


def _quotients(above: list[float], below: list[float]) -> list[float]:
    return [x / y for x, y in zip(above, below, strict=True)]


def _seconds(step: Callable[[], Any], device: torch.device, repeat: int) -> float:
    """Seconds of one step, the mean of several in a row."""
    wait(device)
    began = time.perf_counter()
    for _ in range(repeat):
        step()
    wait(device)
    return (time.perf_counter() - began) / repeat
