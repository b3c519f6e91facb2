"""CIFAR-100 is read as CIFAR-10, with its fine labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.benchmarks.cifar100 import NAMES


def test_an_item_is_its_own_image_and_fine_class(build: Callable[..., Any]) -> None:
    benchmark = build("cifar100")
    assert [(int(image[0, 0, 0]), target) for image, target in benchmark.dataset("test")] == [
        (0, 99),
        (1, 98),
    ]
    assert len(benchmark.dataset("train")) == 35
    assert len(benchmark.dataset("val")) == 15


def test_names_are_the_hundred_in_alphabetical_order() -> None:
    assert len(NAMES) == 100
    assert list(NAMES) == sorted(NAMES)


def test_an_altered_file_is_never_opened(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    build("cifar100")
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes() + b"x")
    assert "altered (MD5); unpack cifar-100-python.tar.gz" in refusal("cifar100")
