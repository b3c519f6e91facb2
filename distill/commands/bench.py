"""`distill bench`: a distillation step beside the naive one, in turn, in one process."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill import checkpoint
from distill.config import RunConfig
from distill.costs import step
from distill.costs.flops import teacher_flops
from distill.costs.published import published_case
from distill.costs.step import Case
from distill.drawing import plots
from distill.errors import UserError
from distill.policies import mixes
from distill.provenance import commit, hardware
from distill.teacher import build_teacher, teacher_dtype
from distill.training.trainer import Trainer

RECIPE_KEYS = {
    "batch": "train.batch=N",
    "layer": "pairs.0.teacher=LAYER",
    "teacher": "teacher.path=PATH",
    "compile": "teacher.compile=true student.compile=true",
}
"""What options of the published case are called in a recipe."""


def bench(
    config: RunConfig | None = None,
    *,
    rounds: int = 5,
    out: str | None = None,
    batch: int | None = None,
    layer: str | None = None,
    teacher: str | None = None,
    compile: bool = False,
) -> str:
    """Time our step against the naive one: while a student is taught, both losses or the first.

    Ours: as the recipe says, by default in bfloat16 where the machine has it, in channels_last, and
    the teacher left after its last layer; once with a filled feature cache too. Naive: float32, the
    complete teacher. Student, losses, policy and images are the same.

    Args:
        config: A recipe. None: the published case, with the arguments from `batch` on, see
            `costs.published.published_case`.
        rounds: How often all take their turn, after one round to warm up.
        out: A JSON file for the figures, with a bar chart beside it.

    Returns:
        The table to print.

    Raises:
        UserError: A mistake in the recipe or the arguments.
    """
    given = {"batch": batch, "layer": layer, "teacher": teacher, "compile": compile or None}
    for option, value in given.items():
        if config is not None and value is not None:
            raise UserError(f"--{option}: with a recipe, give {RECIPE_KEYS[option]} instead")
    batch = 64 if batch is None else batch
    if batch < 2 or rounds < 1:
        raise UserError(f"bench: needs at least 2 images and 1 round, got {batch} and {rounds}")
    if out is not None:
        checkpoint.check_json("--out", Path(out))
    with tempfile.TemporaryDirectory() as scratch:
        if config is None:
            layer = layer or "mid_block"
            config = published_case(Path(scratch), batch, layer, teacher, compile)
            build_teacher(config, layers=[layer], asked_by="--layer")  # a wrong one shows here
        figures = _figures(_cases(_taught(config), Path(scratch)), rounds)
    if out is not None:
        checkpoint.write_text(out, json.dumps(figures, indent=2) + "\n")
        milliseconds = {
            name: {part: 1e3 * x for part, x in figures[_key("parts", name)].items()}
            for name in ("ours", "cached", "naive")
            if _key("parts", name) in figures
        }
        title = f"milliseconds, {figures['batch']} images"
        plots.bars(Path(out).with_suffix(".png"), milliseconds, title)
    return _table(figures, rounds)


def _taught(config: RunConfig) -> RunConfig:
    """The recipe of steps that all teach, without a cache and measurements of the floor."""
    if not config.train.batch:
        raise UserError("train.batch: bench needs a number, not auto")
    train = dataclasses.replace(config.train, steps=10**9, floor_every=0)
    teacher = dataclasses.replace(config.teacher, cache=None)
    return dataclasses.replace(config, train=train, teacher=teacher)


def _cases(config: RunConfig, scratch: Path) -> dict[str, Case]:
    """Our step, the naive one and, if the recipe's features can be kept, the cached one."""
    _show("our step")
    ours = step.prepare(config)
    cases = {"ours": ours}
    _show("filling a cache for one batch")
    try:
        cases["cached"] = step.prepare(_cached(ours.trainer, scratch))
    except UserError as error:
        print(f"distill: no step with cached features: {error}", file=sys.stderr)
    _show("the naive step")
    return {**cases, "naive": step.prepare(_naive(config), whole=True)}


def _show(doing: str) -> None:
    """On a terminal, in place of what it said before."""
    if sys.stderr.isatty():
        print(f"\r{doing:40}", end="\r", file=sys.stderr, flush=True)


def _figures(cases: Mapping[str, Case], rounds: int) -> dict[str, Any]:
    """The costs of the cases, measured in turn, and how near the machine's limit our step is.

    None for what is relative to a teacher's operations, of a teacher that does not count them.
    """
    ours, naive = cases["ours"].trainer, cases["naive"].trainer
    device, batch, size = ours.accelerator.device, len(cases["ours"].batch.images), ours.data.size
    repeat = 10 if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        _show(f"round {number} of {rounds}")
        for name, case in cases.items():
            seconds[name].append(step.seconds_of(case.step, device, repeat))
    taken = {name: values[1:] for name, values in seconds.items()}
    middle = {name: statistics.median(values) for name, values in taken.items()}
    _show("the parts of the steps")
    parts = {name: step.part_seconds(case, max(3, repeat)) for name, case in cases.items()}
    assert ours.teacher is not None
    passes = len(ours.timesteps) if mixes(ours.config) else 1
    counted = teacher_flops(ours.teacher, size)
    used, whole = (None, None) if counted is None else (passes * x for x in counted)
    student = step.student_operations(cases["ours"]) / batch
    dtype = teacher_dtype(ours.config)
    peak = step.product_rate(device, getattr(torch, dtype))
    mine = parts["ours"]
    policy = mine["policy"] + step.reward_seconds(cases["ours"])
    figures = {
        "batch": batch,
        "image_size": size,
        "teacher": ours.teacher.name,
        "layers": ours.teacher.layers,
        "student": ours.config.student.model,
        "compile": ours.config.teacher.compile,
        "images_per_second": batch / middle["ours"],
        "naive_images_per_second": batch / middle["naive"],
        "ratio": middle["naive"] / middle["ours"],
        "ratios": _quotients(taken["naive"], taken["ours"]),
        "policy_share": policy / sum(mine.values()),
        "feature_error": step.feature_error(ours, naive, cases["ours"].batch),
        "share_of_peak": used and batch * (used + student) / middle["ours"] / peak,
        "share_of_peak_teacher": used and batch * used / mine["teacher"] / peak,
        "share_of_peak_student": batch * student / (mine["student"] + mine["backward"]) / peak,
        "peak_tflops": peak / 1e12,
        "dtype": dtype,
        "teacher_gflop": used and used / 1e9,
        "naive_teacher_gflop": whole and whole / 1e9,
        "student_gflop": student / 1e9,
        **{_key("parts", name): of for name, of in parts.items()},
        "memory_gib": {name: case.memory for name, case in cases.items()},
        "hardware": hardware(device),
        "commit": commit(),
    }
    if "cached" in cases:
        figures |= {
            "images_per_second_cached": batch / middle["cached"],
            "ratio_cached": middle["naive"] / middle["cached"],
            "ratios_cached": _quotients(taken["naive"], taken["cached"]),
        }
    held = {name: step.part_mib(case) for name, case in cases.items()}  # last: it is not timed
    _show("")
    return figures | {_key("parts_memory_mib", name): of for name, of in held.items()}


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

    def counted(dtype: str, gflop: float | None) -> str:
        return dtype if gflop is None else f"{dtype}, {gflop:.3g} GFLOP"

    parts = ", ".join(f"{name} {1e3 * x:.3g}" for name, x in figures["parts"].items())
    memory = ", ".join(f"{name} {x:.2f}" for name, x in figures["memory_gib"].items())
    held = ", ".join(f"{name} {x:.3g}" for name, x in figures["parts_memory_mib"].items())
    size, dtype = "x".join(str(side) for side in figures["image_size"]), figures["dtype"]
    peak = f"of the {figures['peak_tflops']:.3g} TFLOP/s of {dtype} products"
    student = f"student {figures['share_of_peak_student']:.0%}"
    if figures["share_of_peak"] is None:
        reached = f"{student} {peak}"
    else:
        teacher = f"teacher {figures['share_of_peak_teacher']:.0%}"
        reached = f"{figures['share_of_peak']:.0%} {peak}; {teacher}, {student}"
    lines = [
        f"one step: {figures['batch']} images of {size} px, {' and '.join(figures['layers'])} of "
        f"{figures['teacher']}, {figures['student']}, median of {rounds} rounds, "
        f"{figures['hardware']}",
        line(
            "naive",
            figures["naive_images_per_second"],
            counted("float32", figures["naive_teacher_gflop"]),
        ),
        line(
            "ours",
            figures["images_per_second"],
            counted(dtype, figures["teacher_gflop"]),
            figures["ratios"],
        ),
    ]
    if "ratios_cached" in figures:
        rate = figures["images_per_second_cached"]
        lines.append(line("cached", rate, "features kept", figures["ratios_cached"]))
    return "\n".join(
        [
            *lines,
            f"  parts   {parts} ms",
            f"  policy  {figures['policy_share']:.1%} of our step: choosing, learning, reward head",
            f"  peak    {reached}",
            f"  memory  {memory} GiB at most so far",
            f"          {held} MiB while that part runs, beside the weights",
            f"  error   {figures['feature_error']:.2%} of the float32 features (relative L2)",
        ]
    )


def _cached(ours: Trainer, folder: Path) -> RunConfig:
    """The recipe with a feature cache, and no more images than a step has."""
    config, data = ours.config, ours.data
    few = dataclasses.replace(
        config.data,
        augment="none",
        labelled=min(len(data.labelled_indices), config.train.batch),
        unlabelled=min(len(data.unlabelled_indices), config.train.unlabelled_batch),
    )
    teacher = dataclasses.replace(config.teacher, cache=str(folder / "cache"))
    return dataclasses.replace(config, data=few, teacher=teacher)


def _naive(config: RunConfig) -> RunConfig:
    train = dataclasses.replace(config.train, precision="no", channels_last=False)
    teacher = dataclasses.replace(config.teacher, dtype="float32", compile=False)
    student = dataclasses.replace(config.student, compile=False)
    return dataclasses.replace(config, train=train, teacher=teacher, student=student)


def _quotients(above: list[float], below: list[float]) -> list[float]:
    return [x / y for x, y in zip(above, below, strict=True)]
