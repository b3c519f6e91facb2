"""`train.batch: auto`; the memory that runs out is a pretence, but for a test on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from distill.build import build_accelerator, build_training_set
from distill.cli import main
from distill.config import RunConfig
from distill.errors import UserError
from distill.training.fit import check_equal_memory, fit_batch, largest_batch

Load = Callable[..., RunConfig]
Refuse = Callable[..., str]


def room_for(images: int, tried: list[int]) -> Callable[[int], None]:
    """A step that has memory for so many images."""

    def step(batch: int) -> None:
        tried.append(batch)
        if batch > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return step


@pytest.mark.parametrize(
    ("room", "most", "tries"),
    [(1000, 100, [64]), (100, 1000, [512, 256, 128, 64]), (2, 9, [8, 4, 2]), (9, 2, [2])],
)
def test_the_largest_power_of_two_that_fits_is_found(
    room: int, most: int, tries: list[int]
) -> None:
    tried: list[int] = []
    assert largest_batch(room_for(room, tried), most) == tries[-1]
    assert tried == tries


def test_no_room_for_two_images_is_a_mistake_that_is_named() -> None:
    with pytest.raises(
        UserError, match=r"train\.batch: auto found no batch of at least two labelled"
    ):
        largest_batch(room_for(1, []), 64)


def test_another_error_of_the_step_is_not_taken_for_too_little_memory() -> None:
    def broken(batch: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot"):
        largest_batch(broken, 64)


def test_gpus_that_would_run_out_at_different_batches_are_refused() -> None:
    check_equal_memory([80 * 2**30, 78 * 2**30])
    with pytest.raises(UserError, match=r"equally much free memory, got 80\.0, 24\.0 GiB; give a"):
        check_equal_memory([80 * 2**30, 24 * 2**30])


@pytest.mark.parametrize("auto", ["auto", "0"])
def test_without_a_gpu_auto_asks_for_a_number(recipe: Path, refuse: Refuse, auto: str) -> None:
    line = refuse("train", str(recipe), f"train.batch={auto}")
    assert "train.batch: auto needs a GPU to measure; give a number on the CPU" in line


def test_a_number_stays_as_it_is(load: Load) -> None:
    config = load("train.batch=4")
    data = build_training_set(config.data)
    assert fit_batch(config, data, build_accelerator("cpu")) is config


def test_a_run_that_found_its_number_resumes_with_auto(
    recipe: Path, interrupt: Callable[..., None]
) -> None:
    interrupt("distilled", 3)
    assert main(["train", str(recipe)]) == 130
    assert main(["train", str(recipe), "train.batch=auto", "--resume"]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: none here")
def test_on_a_gpu_all_labelled_images_of_a_small_recipe_fit(load: Load) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a test before may have used the CPU
    config = load("device=cuda", "train.batch=auto", "data.labelled=6")
    fitted = fit_batch(config, build_training_set(config.data), build_accelerator("cuda"))
    assert fitted.train.batch == 4
    AcceleratorState._reset_state(reset_partial_state=True)
