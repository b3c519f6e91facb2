"""Checks of the training section, and the batch that fits into a GPU (`train.batch: auto`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size

from distill.build import TrainingSet
from distill.config import RunConfig
from distill.errors import UserError
from distill.registry import resolve
from distill.tasks import blank_targets
from distill.training.batch import Batch
from distill.training.trainer import Trainer


def fit_batch(config: RunConfig, data: TrainingSet, accelerator: Accelerator) -> RunConfig:
    """The recipe with a number in place of `auto`: at most the number of labelled images, and a
    power of two per process and part (`train.accumulate`).

    It tries two steps of the recipe's first arm with a teacher, as the first step allocates the
    optimiser's state.

    Raises:
        UserError: There is no GPU, those of several processes have not the same memory, or not
            even two labelled images fit.
    """
    if config.train.batch:
        return config
    device, processes = accelerator.device, accelerator.num_processes
    if device.type != "cuda":
        raise UserError("train.batch: auto needs a GPU to measure; give a number on the CPU")
    if processes > 1:
        free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
        check_equal_memory(accelerator.gather(free).tolist())
    arms = config.train.arms
    arm = next((arm for arm in arms if arm != "scratch"), arms[0])
    most = len(data.labelled_indices)

    def step(batch: int) -> None:
        trainer = Trainer(with_batch(config, batch), arm, data, accelerator)
        labelled = torch.zeros(batch // processes, 3, *data.size, device=device)
        targets = blank_targets(data.benchmark, len(labelled), data.size).to(device)
        count = config.train.unlabelled_batch // processes if data.unlabelled_indices else 0
        unlabelled = torch.zeros(count, 3, *data.size, device=device) if count else None
        for _ in range(2):
            trainer.train_step(Batch(labelled, targets, unlabelled))

    def trial(batch: int) -> None:
        try:
            step(batch)
        finally:
            accelerator.free_memory()  # it holds on to every model that it prepared

    parts = processes * config.train.accumulate
    largest = parts * largest_batch(lambda size: trial(parts * size), most // parts)
    fitting = torch.tensor(largest, device=device)
    return with_batch(config, int(accelerator.gather(fitting).min()))


def check_equal_memory(free: Sequence[int]) -> None:
    """Refuse GPUs that would run out at different batches, and so wait for each other for ever.

    free: Bytes that are free on the GPU of each process.

    Raises:
        UserError: One has more than a twentieth less than another.
    """
    if min(free) < 0.95 * max(free):
        each = ", ".join(f"{count / 2**30:.1f}" for count in free)
        raise UserError(
            f"train.batch: auto needs GPUs with equally much free memory, got {each} GiB; give a "
            "number"
        )


def check_schedule(config: RunConfig, processes: int, dense: bool) -> None:
    """Check that the keys of the training section fit together.

    dense: Whether the student predicts at every position, with a head that sees labelled images
        alone.
    """
    train = config.train
    if config.evaluate.window is not None:
        raise UserError(
            "evaluate.window: training scores whole images; set it in `distill evaluate` afterwards"
        )
    for key, batch in (("batch", train.batch), ("unlabelled_batch", train.unlabelled_batch)):
        if batch % processes:
            raise UserError(f"train.{key}: {batch} is not divisible by {processes} processes")
        if batch // processes % train.accumulate:
            raise UserError(
                f"train.{key}: {batch // processes} images per process are not divisible by "
                f"train.accumulate={train.accumulate}"
            )
    taught = {*train.arms} != {"scratch"}
    least = int(train.schedule == "distill_then_finetune")
    if taught and not least <= train.finetune_steps < train.steps:
        raise UserError(
            f"train.finetune_steps: must be between {least} and {train.steps - 1} with "
            f"train.schedule={train.schedule} and train.steps={train.steps}, got "
            f"{train.finetune_steps}"
        )
    # Whether something with batch norm sees labelled images alone.
    some = "scratch" in train.arms or train.finetune_steps > 0 or config.data.unlabelled == 0
    alone, parts = some or dense, processes * train.accumulate
    if train.batch + (0 if alone else train.unlabelled_batch) < 2 * parts:
        raise UserError(
            f"train.batch: {train.batch} is too small: batch norm needs two "
            f"{'labelled ' if alone else ''}images per step and process"
            + (" and part" if train.accumulate > 1 else "")
        )
    together = (
        train.batch + (train.unlabelled_batch if config.data.unlabelled != 0 else 0)
    ) // parts
    for index, pair in enumerate(config.pairs if taught else []):
        measure = resolve("losses", pair.loss, f"pairs.{index}.loss")
        fewest = getattr(measure, "smallest_batch", 1)
        if together < fewest:
            raise UserError(
                f"pairs.{index}.loss: {pair.loss} compares the images of a batch, so it needs "
                f"at least {fewest} per process and part, got {together}"
            )


def with_batch(config: RunConfig, batch: int) -> RunConfig:
    """A copy of the recipe with another number of labelled images per step."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch=batch))


def largest_batch(step: Callable[[int], None], most: int) -> int:
    """The largest power of two, at most `most`, with which a step does not run out of memory.

    Raises:
        UserError: Two images are too many.
    """
    sizes = iter([2**power for power in range(most.bit_length() - 1, 0, -1)])

    def attempt(batch_size: int) -> int:
        step(batch_size)
        return batch_size

    search = find_executable_batch_size(
        attempt,
        starting_batch_size=next(sizes, 0),
        reduce_batch_size_fn=lambda: next(sizes, 0),
    )
    try:
        fitting: int = search()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise UserError(
            "train.batch: auto found no batch of at least two labelled images per process and part "
            f"(there are {most} labelled images); give more labels, or reduce "
            "train.unlabelled_batch, data.size or the student"
        ) from error
    return fitting
