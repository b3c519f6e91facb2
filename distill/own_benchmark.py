"""What a benchmark from outside the repository gives, checked before it is trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distill.augmentation import Item
from distill.benchmarks import Benchmark, Examples
from distill.errors import UserError, one_line
from distill.registry import lacks


def own_training_split(benchmark: Benchmark, name: str) -> Examples:
    """The training split, once the attributes, the first example and all `targets` are found right.

    Args:
        benchmark: Which; its task is a known one.
        name: What the recipe calls it.

    Raises:
        UserError: One of them is wrong.
    """
    if lacking := lacks(benchmark, Benchmark):
        raise UserError(
            f"data.benchmark: {name} gives no benchmark: it has no {lacking} "
            "(distill/benchmarks/__init__.py)"
        )
    examples = benchmark.dataset("train")
    try:
        if not len(examples):
            return examples
        image, target = examples[0]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.benchmark: dataset('train') of {name} gives no pairs of image and target by "
            f"their number: {one_line(error)}"
        ) from error
    kind = f"{tuple(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image)
    if not (isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3) or (
        image.dtype != torch.uint8
    ):
        raise UserError(
            f"data.benchmark: images of {name} must be tensors (3, H, W) of torch.uint8, not {kind}"
        )
    _check_target(image, target, benchmark, name, 0)
    targets = getattr(examples, "targets", None)
    if targets is None:
        return examples
    if len(targets) != len(examples):
        raise UserError(
            f"data.benchmark: {name} has {len(targets)} targets for {len(examples)} examples"
        )
    for index, target in enumerate(targets):
        known = isinstance(target, int | np.integer)
        if not known or (
            benchmark.task == "classification" and not _in_range(int(target), benchmark)
        ):
            raise UserError(
                f"data.benchmark: {name} has a target {target!r:.80}, not {_right(benchmark)}, "
                f"in targets[{index}] of train"
            )
    return examples


class Checked:
    """An outsider's training examples; reading one whose target is wrong raises a UserError."""

    def __init__(self, examples: Examples, benchmark: Benchmark, name: str) -> None:
        self.examples, self.benchmark, self.name = examples, benchmark, name

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Item:
        image, target = self.examples[index]
        _check_target(image, target, self.benchmark, self.name, index)
        return image, target


def _check_target(
    image: Tensor, target: object, benchmark: Benchmark, name: str, index: int
) -> None:
    if wrong := _wrong(image, target, benchmark):
        raise UserError(
            f"data.benchmark: {name} has a target {wrong:.80}, not {_right(benchmark)}, in example "
            f"{index} of train"
        )


def _right(benchmark: Benchmark) -> str:
    """What a target is, for error lines."""
    last, ignored = benchmark.num_classes - 1, benchmark.ignore_index
    if benchmark.task == "landmarks":
        return f"points ({last + 1}, 2) of torch.float32"
    if benchmark.task == "segmentation":
        return f"a mask (H, W) of torch.uint8 with classes from 0 to {last} and {ignored}"
    return f"a class from 0 to {last} (an int) or {ignored}"


def _in_range(target: int, benchmark: Benchmark) -> bool:
    return target in range(benchmark.num_classes) or target == benchmark.ignore_index


def _wrong(image: Tensor, target: object, benchmark: Benchmark) -> str:
    """What is wrong about a target; empty for nothing."""
    if benchmark.task == "classification":
        good = isinstance(target, int) and _in_range(target, benchmark)
        return "" if good else repr(target)
    if not isinstance(target, Tensor):
        return repr(target)
    points = benchmark.task == "landmarks"
    shape = (benchmark.num_classes, 2) if points else image.shape[1:]
    if target.shape != shape or target.dtype != (torch.float32 if points else torch.uint8):
        return f"{tuple(target.shape)} {target.dtype}"
    if points:
        return ""
    held = torch.bincount(target.flatten()).nonzero().flatten().tolist()
    strange = [value for value in held if not _in_range(value, benchmark)]
    return f"with {strange[0]}" if strange else ""
