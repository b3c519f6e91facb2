"""What a benchmark from outside the repository gives, checked wherever it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.augmentation import Item
from distill.benchmarks import Benchmark, Examples
from distill.errors import UserError, blame, one_line
from distill.registry import lacks


class OwnBenchmark:
    """A benchmark from outside the repository; whatever reads one of its splits has it checked.

    Args:
        benchmark: What an outsider's class or function gave.
        key: What the recipe calls it, for error lines.

    Raises:
        UserError: It is no benchmark.
    """

    def __init__(self, benchmark: Benchmark, key: str) -> None:
        if lacking := lacks(benchmark, Benchmark):
            raise UserError(
                f"data.benchmark: {key} gives no benchmark: it has no {lacking} "
                "(distill/benchmarks/__init__.py)"
            )
        self._benchmark, self._key = benchmark, key

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # and so never asks for `_benchmark` before there is one
            raise AttributeError(name)
        return getattr(self._benchmark, name)

    def dataset(self, split: str) -> Examples:
        """The examples of a split, each checked when it is read.

        Raises:
            UserError: There is no such split, the first example is wrong, or one of the `targets`.
        """
        where = f"data.benchmark: dataset({split!r}) of {self._key}"
        with blame(where):
            examples = self._benchmark.dataset(split)
        try:
            checked = CheckedExamples(examples, self._benchmark, self._key, split)
            if len(checked):
                checked[0]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where} gives no pairs of image and target by their number: {one_line(error)}"
            ) from error
        if checked.targets is not None:
            self._check_targets(checked.targets, len(checked), split)
        return checked

    def _check_targets(self, targets: Sequence[int], length: int, split: str) -> None:
        """Raises UserError unless there is a right target for each of so many examples."""
        benchmark, key = self._benchmark, self._key
        if len(targets) != length:
            raise UserError(
                f"data.benchmark: {key} has {len(targets)} targets for {length} examples of {split}"
            )
        for index, target in enumerate(targets):
            known = isinstance(target, int | np.integer)
            if not known or (
                benchmark.task == "classification" and not _in_range(int(target), benchmark)
            ):
                raise UserError(
                    f"data.benchmark: {key} has a target {target!r:.80}, not {_right(benchmark)}, "
                    f"in targets[{index}] of {split}"
                )


class CheckedExamples:
    """An outsider's examples; reading one that is wrong raises a UserError."""

    def __init__(self, examples: Examples, benchmark: Benchmark, key: str, split: str) -> None:
        self._examples, self._benchmark, self._key, self._split = examples, benchmark, key, split
        self.names: Sequence[str] = getattr(examples, "names", ())
        self.targets: Sequence[int] | None = getattr(examples, "targets", None)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Item:
        image, target = self._examples[index]
        here = f"in example {index} of {self._split}"
        if not (
            isinstance(image, Tensor)
            and image.ndim == 3
            and len(image) == 3
            and image.dtype == torch.uint8
        ):
            is_tensor = isinstance(image, Tensor)
            kind = f"{tuple(image.shape)} {image.dtype}" if is_tensor else type(image)
            raise UserError(
                f"data.benchmark: images of {self._key} must be tensors (3, H, W) of torch.uint8, "
                f"not {kind}, {here}"
            )
        if wrong := _wrong(image, target, self._benchmark):
            raise UserError(
                f"data.benchmark: {self._key} has a target {wrong:.80}, "
                f"not {_right(self._benchmark)}, {here}"
            )
        return image, target


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
    if benchmark.task is None:  # nobody looks at it
        return ""
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
