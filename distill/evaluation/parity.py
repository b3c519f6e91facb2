"""Whether an export still is the student: run in a fresh process, compared, and timed beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.benchmarks import Benchmark
from distill.deployment.formats import Deployed, Precision
from distill.deployment.runtimes import Array, images_per_second, torch_run
from distill.errors import UserError
from distill.evaluation.counting import predicted_classes
from distill.metrics import ConfusionMatrix, classification_scores, segmentation_scores
from students.heads import resize_logits
from students.student import Student

RUNTIMES = {".onnx": {"onnxruntime"}, ".pt2": {"torch"}, ".ts": {"torch"}}
TIMM = {"torch", "torchvision", "timm"}
LARGEST_DIFFERENCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest difference of an output: absolute for logits in fp32, otherwise relative to the largest
value if that is over 1."""
LARGEST_LOSS = 0.01
"""Loss of mIoU or top-1 that int8 may cost, as a share."""
FEWEST_EQUAL = 0.95
"""Least share of predictions that int8 must not change, if nothing is labelled."""
LARGEST_ERROR = 0.2
"""Largest relative error (L2) of int8 features, for which there is no score."""


class Sample(NamedTuple):
    """The images that an export is compared on."""

    batches: list[Tensor]
    """Batches (B, 3, H, W) in [0, 1]; only the last may have another B."""
    truths: list[Tensor]
    """The mask (h, w) or class () of each image, int64; empty if unknown."""
    benchmark: Benchmark | None


class Row(NamedTuple):
    """A line of the table: how one form of the student did on the sample."""

    name: str
    rate: float
    """Images per second."""
    score: float | None = None
    """mIoU or top-1, in [0, 1]."""
    difference: float | None = None
    """Largest absolute difference from the student's outputs."""
    equal: float | None = None
    """Share of the pixels, or images, that get the student's class."""


class Reference(NamedTuple):
    """The student's own outputs on a sample, by batch, and its line of the table."""

    outputs: list[tuple[Array, ...]]
    row: Row


def run_student(student: Student, model: Deployed, sample: Sample) -> Reference:
    """The student's own outputs, in this process and in float32, and its speed.

    Args:
        student: In eval mode, on the CPU.
        model: Made of it. A backbone's outputs are taken from here: a student has no pooled one.
        sample: The images.
    """

    def predict(images: Tensor) -> Tensor:
        logits = student(images)[0]
        size = (images.shape[-2], images.shape[-1])
        return resize_logits(logits, size) if logits.ndim == 4 else logits

    run = torch_run(model if model.what == "backbone" else predict, torch.get_num_threads())
    batches = [batch.numpy() for batch in sample.batches]
    outputs = [run(batch) for batch in batches]
    rate = images_per_second(run, _full(batches))
    return Reference(outputs, Row("student (torch)", rate, _score(outputs, sample)))


def compare(
    file: Path, name: str, model: Deployed, precision: Precision, sample: Sample, ours: Reference
) -> Row:
    """Run an export in a process of its own, with nothing but its runtime, and compare.

    Args:
        file: The export: a file, or a folder, which plain timm opens.
        name: For the table.
        model: The student in float32. If it takes any size, one more size is compared.
        precision: Of the export; decides what may differ.
        sample: The images.
        ours: The student on them.

    Raises:
        UserError: It does not run, or differs by more than its precision explains.
    """
    batches = list(sample.batches)
    free = model.any_size and file.is_file()
    if free:
        height, width = model.image_size
        batches.append(F.interpolate(batches[0][:1], (height + 32, width + 64), mode="bilinear"))
    theirs, report = _in_fresh_process(file, batches)
    loaded, expected = set(report["loaded"]), RUNTIMES.get(file.suffix, TIMM)
    assert loaded <= expected, f"{file.suffix} loads {loaded - expected}"
    outputs = list(ours.outputs)
    if free:
        outputs.append(torch_run(model, 0)(batches[-1].numpy()))
    pairs = [pair for both in zip(outputs, theirs, strict=True) for pair in _pairs(*both)]
    # Of numpy, as Python's max loses a NaN that is not the first.
    difference = float(np.max([np.abs(one - other).max() for one, other in pairs]))
    row = Row(name, report["rate"], _score(theirs, sample), difference)
    if model.what != "backbone":
        same = [one.argmax(1) == other.argmax(1) for one, other in pairs]
        row = row._replace(equal=float(np.concatenate([x.ravel() for x in same]).mean()))
    if problem := _problem(row, ours.row, pairs, precision):
        raise UserError(f"the export failed its comparison with the student: {problem}")
    return row


def check_logits(student: Student, again: Student, sample: Sample) -> None:
    """Refuse a folder whose student, head included, does not give the same logits.

    Raises:
        UserError: They differ by more than fp32 explains.
    """
    with torch.no_grad():
        mine, other = (one(sample.batches[0])[0] for one in (student, again))
    difference, limit = float((mine - other).abs().max()), LARGEST_DIFFERENCE["fp32"]
    if not difference <= limit:  # a NaN is no number that small
        raise UserError(
            "the export failed its comparison with the student: the logits of the folder are "
            f"{difference:.1e} off; the limit is {limit:.1e}"
        )


def table(rows: Sequence[Row], sample: Sample) -> str:
    """The lines to print."""
    classified = sample.benchmark is not None and sample.benchmark.task == "classification"
    columns = [
        ["", *(row.name for row in rows)],
        ["largest difference", *_figures("{:.1e}", [row.difference for row in rows])],
        ["equal predictions", *_figures("{:.2%}", [row.equal for row in rows])],
        ["top-1" if classified else "mIoU", *_figures("{:.2%}", [row.score for row in rows])],
        ["images/s", *_figures("{:.0f}", [row.rate for row in rows])],
    ]
    names, *figures = [column for column in columns if any(column[1:])]
    width = max(map(len, names))
    lines = [[f"  {name:{width}}"] for name in names]
    for column in figures:
        width = max(map(len, column))
        for line, figure in zip(lines, column, strict=True):
            line.append(f"{figure:>{width}}")
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _figures(form: str, values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else form.format(value) for value in values]


def _in_fresh_process(
    file: Path, batches: Sequence[Tensor]
) -> tuple[list[tuple[Array, ...]], dict[str, Any]]:
    """The export's outputs by batch, and what `distill.deployment.runtimes` reports."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.npz"), Path(scratch, "outputs.npz")
        np.savez(inputs, *(batch.numpy() for batch in batches))
        words = [str(file), str(inputs), str(outputs), str(torch.get_num_threads())]
        done = subprocess.run(
            [sys.executable, "-m", "distill.deployment.runtimes", *words],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise UserError(f"the export does not run in its own process: {reason}")
        with np.load(outputs) as found:
            arrays = [found[name] for name in found.files]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    each = len(arrays) // len(batches)
    return [tuple(arrays[i : i + each]) for i in range(0, len(arrays), each)], report


def _pairs(mine: Sequence[Array], other: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Outputs side by side. Plain timm gives the first of them alone."""
    for one, two in zip(mine, other, strict=False):
        if one.shape != two.shape:
            raise UserError(f"the export returns shape {two.shape}, but the student {one.shape}")
    return list(zip(mine, other, strict=False))


def _problem(
    row: Row, ours: Row, pairs: Sequence[tuple[Array, Array]], precision: Precision
) -> str | None:
    """The difference that the precision does not explain, in words; None if there is none."""
    assert row.difference is not None
    if not np.isfinite(row.difference):
        return "it returns values that are not finite"
    if precision != "int8":
        limit = LARGEST_DIFFERENCE[precision]
        if precision != "fp32" or row.equal is None:
            limit *= max(1.0, *(float(np.abs(one).max()) for one, _ in pairs))
        if row.difference > limit:
            return f"an output is {row.difference:.1e} off, the limit is {limit:.1e}"
    elif row.equal is None:
        norms = [(float(np.linalg.norm(a - b)), float(np.linalg.norm(a))) for a, b in pairs]
        error = max(wrong / max(right, 1e-12) for wrong, right in norms)
        if error > LARGEST_ERROR:
            return f"its features are {error:.0%} off, the limit is {LARGEST_ERROR:.0%}"
    elif row.score is not None and ours.score is not None:
        if ours.score - row.score > LARGEST_LOSS:
            lost, most = 100 * (ours.score - row.score), 100 * LARGEST_LOSS
            return f"its score is {lost:.1f} points lower, the limit is {most:.0f}"
    elif row.equal < FEWEST_EQUAL:
        share, fewest = f"{row.equal:.1%}", f"{FEWEST_EQUAL:.0%}"
        return f"only {share} of its predictions are the student's; the limit is {fewest}"
    return None


def _score(outputs: Iterable[tuple[Array, ...]], sample: Sample) -> float | None:
    """mIoU or top-1 of logits, None where nothing is labelled."""
    benchmark = sample.benchmark
    if benchmark is None or not sample.truths:
        return None
    matrix = ConfusionMatrix(benchmark.num_classes, benchmark.ignore_index)
    logits = (torch.from_numpy(one) for output in outputs for one in output[0])
    for one, truth in zip(logits, sample.truths, strict=False):
        matrix.update(predicted_classes(one, tuple(truth.shape)), truth)
    if not matrix.counts.any():
        return None
    if benchmark.task == "classification":
        return classification_scores(matrix.counts).top1
    return segmentation_scores(matrix.counts).miou


def _full(batches: Sequence[Array]) -> list[Array]:
    """The batches that are as large as the first."""
    return [batch for batch in batches if len(batch) == len(batches[0])]
