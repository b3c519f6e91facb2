"""Scoring, of runs and of `distill evaluate` alike: held-out images, and the figures on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch.utils.data import Subset

from distill.benchmarks import Benchmark, Examples
from distill.config import EvaluateConfig, RunConfig
from distill.data import Resized
from distill.errors import UserError
from distill.evaluation.counting import Tally, count
from distill.evaluation.inference import Predictor, several_looks
from distill.landmarks import LandmarkTally
from distill.progress import Progress
from distill.tasks import traits
from distill.training.clock import Clock


class Scored(NamedTuple):
    """A predictor on the split that is scored."""

    predict: Predictor
    """The predictor, with all looks that the recipe sets."""
    examples: Examples
    benchmark: Benchmark
    tally: Tally | LandmarkTally
    """The tally of this process's share of the images."""
    scores: dict[str, Any]
    """Scores over all processes, see `Tally.scores`."""
    seconds: Mapping[str, float]
    """Seconds of this process by part: `read`, `predict` (to the mask's size) and `score`."""


def metric_of(benchmark: Benchmark) -> str:
    """The main score, by which students are chosen and compared."""
    return traits(benchmark).metric


def check_looks(options: EvaluateConfig, benchmark: Benchmark) -> None:
    """Refuse looks at images that have no meaning for a benchmark, before anything is computed."""
    task = traits(benchmark)
    if options.window is not None and not (task.dense and task.classes):
        raise UserError(
            f"evaluate.window: {benchmark.name} has {task.labels}, but windows are for masks; "
            "leave it out"
        )
    if not task.classes and (options.flip or options.scales != [1.0]):
        key = "flip" if options.flip else "scales"
        raise UserError(
            f"evaluate.{key}: landmarks are not averaged over several looks; leave it out"
        )


def held_out_examples(
    config: RunConfig, benchmark: Benchmark, size: tuple[int, int], split: str | None = None
) -> Examples:
    """The images that are scored: resized as in training, unless they are cut into windows.

    Masks keep their own size.

    Args:
        config: Its section `evaluate` counts.
        benchmark: Has the images.
        size: (H, W).
        split: None: `evaluate.split`.
    """
    check_looks(config.evaluate, benchmark)
    split = split or config.evaluate.split
    examples = benchmark.dataset(split)
    if not len(examples):
        raise UserError(f"{benchmark.name}: split {split} has no images")
    if config.evaluate.window is None:
        examples = Resized(examples, size, masks=False)
    if config.evaluate.images is not None:
        kept = range(min(config.evaluate.images, len(examples)))
        examples = Subset(examples, kept)  # type: ignore[arg-type]
    return examples


def score(
    predict: Predictor,
    size: tuple[int, int],
    examples: Examples,
    benchmark: Benchmark,
    config: RunConfig,
    accelerator: Accelerator,
) -> Scored:
    """Predict a split and score it, over all processes.

    Args:
        predict: One look at images, on the accelerator's device.
        size: (H, W) that `predict` was built for.
        examples: Of `held_out_examples`.
        benchmark: Says the task and the classes.
        config: Its section `evaluate` counts.
        accelerator: Device and processes.
    """
    options = config.evaluate
    looks = several_looks(
        predict,
        size=size,
        window=options.window,
        flip=options.flip,
        mirrored=getattr(benchmark, "mirrored", ()),
        scales=options.scales,
    )
    clock = Clock(accelerator.device)
    # The logits of windows are as large as the image: of a batch they would fill the memory.
    batch = 1 if options.window else options.batch
    world, main = accelerator.num_processes, accelerator.is_main_process
    steps = math.ceil(math.ceil(len(examples) / world) / batch)
    with Progress("scoring", steps, show=main, last=False) as progress:
        (tally,) = count(
            lambda images: [looks(images)],
            examples,
            benchmark,
            device=accelerator.device,
            batch=batch,
            workers=config.data.workers,
            rank=accelerator.process_index,
            world=world,
            progress=lambda images: progress.update(images, {}),
            timed=clock,
        )
    with clock("score"):
        device = accelerator.device
        scores = tally.scores(lambda counts: accelerator.reduce(counts.to(device), "sum"))
    return Scored(looks, examples, benchmark, tally, scores, clock.seconds)
