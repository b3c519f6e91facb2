"""The protocols of `distill evaluate`: from a subject and labelled images to a predictor."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from distill import seeding
from distill.benchmarks import Benchmark
from distill.build import TrainingSet
from distill.config import EvaluateConfig, PairConfig, RunConfig
from distill.data import (
    Augmented,
    Resized,
    StepSampler,
    as_float,
    choose_labelled,
    in_order,
    loader,
)
from distill.deployment.folder import load_student
from distill.deployment.runtimes import load_predictor
from distill.errors import UserError
from distill.evaluation.backbones import Backbone, Subject, predictor
from distill.evaluation.counting import count
from distill.evaluation.inference import Predictor
from distill.evaluation.linear import LinearProbe, fit
from distill.evaluation.neighbours import NearestNeighbours
from distill.evaluation.scoring import metric_of
from distill.evaluation.subjects import open_backbone
from distill.matching.losses import task_loss
from distill.progress import Progress
from distill.stopping import stop_on_signals
from distill.tasks import traits
from distill.training.fit import check_schedule, fit_batch
from distill.training.loop import checkpoint_path, train_arm
from distill.training.trainer import Trainer

FINETUNE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "data": {"augment": "strong"},
        "student": {"freeze": False},
        "train": {
            "arms": ["scratch"],
            "schedule": "joint",
            "steps": 1000,
            "finetune_steps": 0,
            "batch": 16,
            "unlabelled_batch": 0,
            "accumulate": 1,
            "auxiliary": 0.0,
            "optimizer": "adamw",
            "weight_decay": 0.05,
            "decay_all": False,
            "clip": 1.0,
            "ema": 0.99,
            "lr": 2e-3,
            "lr_schedule": "poly",
            "warmup": 50,
            "evaluate_every": 0,
        },
    }
)
"""Settings of `finetune`, which replace those of a student's recipe; overrides take precedence."""


class Fitted(NamedTuple):
    """A predictor, and how it came about."""

    predict: Predictor
    """The predictor, on the device."""
    size: tuple[int, int]
    """(H, W) of the images that it sees."""
    layers: list[str]
    """Feature maps that it reads; empty for a whole network."""
    details: dict[str, Any]
    """Choices made while fitting, for the result."""


def own(
    subject: Subject, config: RunConfig, benchmark: Benchmark, accelerator: Accelerator
) -> Fitted:
    """A student with the head that it was exported with, or an exported file."""
    if subject.kind not in ("student", "file"):
        raise UserError(
            f"{subject.text} has no head of its own; choose --protocol linear, finetune, knn or "
            "label_efficient"
        )
    _whole(subject, "own")
    if subject.kind == "file":
        return _exported(subject, config, benchmark)
    student, card = load_student(subject.path)
    _check_classes(benchmark, card.class_names, dense=card.dense)
    _check_size(config, student.image_size)
    return Fitted(predictor(student.to(accelerator.device)), student.image_size, [], {})


def _exported(subject: Subject, config: RunConfig, benchmark: Benchmark) -> Fitted:
    """A file of `distill export`, run by its own runtime on the CPU."""
    file = load_predictor(Path(subject.path), torch.get_num_threads())
    metadata = file.metadata
    dense, remedy = metadata["what"] == "segmenter", "say with --benchmark what it is of"
    _check_classes(benchmark, metadata["class_names"], dense=dense, remedy=remedy)
    size = (metadata["image_size"][0], metadata["image_size"][1])
    _check_size(config, size)
    if config.evaluate.scales != [1.0] and not metadata["any_size"]:
        raise UserError(
            f"evaluate.scales: {subject.text} only accepts images of {size[0]}x{size[1]} px; leave "
            "it out"
        )

    def predict(images: Tensor) -> Tensor:
        (logits,) = file.run(images.cpu().numpy())
        return torch.from_numpy(logits).to(images.device)

    return Fitted(predict, size, [], {})


def _check_classes(
    benchmark: Benchmark,
    names: Sequence[str],
    *,
    dense: bool,
    remedy: str = "fit a new head with --protocol linear",
) -> None:
    """Refuse a head that predicts something else than the benchmark's classes."""
    if benchmark.num_classes != len(names):
        raise UserError(
            f"the student predicts {len(names)} classes, but {benchmark.name} has "
            f"{benchmark.num_classes}; {remedy}"
        )
    if dense != traits(benchmark).dense:
        raise UserError(
            f"the student predicts {'every position' if dense else 'whole images'}, but "
            f"{benchmark.name} has {traits(benchmark).labels}; {remedy}"
        )
    pairs = zip(names, benchmark.class_names, strict=True)
    if other := next((pair for pair in pairs if pair[0] != pair[1]), None):
        raise UserError(
            f"the student predicts {other[0]!r}, but {benchmark.name} has {other[1]!r}; {remedy}"
        )


def _check_size(config: RunConfig, size: tuple[int, int]) -> None:
    """Refuse images of another size than the student's."""
    if config.data.size not in (None, size):
        raise UserError(
            f"data.size: with its own head the student needs images of {size[0]}x{size[1]} px; "
            "leave it out, or choose --protocol linear"
        )


def _whole(subject: Subject, protocol: str) -> None:
    """Refuse a choice of feature maps where all of the network is used."""
    if subject.layers:
        raise UserError(
            f"{subject.text}: layers={'+'.join(subject.layers)} names maps to read, but --protocol "
            f"{protocol} uses the whole network; leave it out"
        )


def linear(
    subject: Subject, config: RunConfig, data: TrainingSet, accelerator: Accelerator
) -> Fitted:
    """A linear layer on the frozen backbone, its learning rate chosen on val (`linear`)."""
    backbone = open_backbone(subject, config, data.size, accelerator.device)
    return fit_linear(backbone, config, data, accelerator, "linear")


def fit_linear(
    backbone: Backbone, config: RunConfig, data: TrainingSet, accelerator: Accelerator, label: str
) -> Fitted:
    """`linear` for a backbone that is open already; `label` precedes the progress."""
    benchmark, options, device = data.benchmark, config.evaluate, accelerator.device
    val = benchmark.dataset("val")
    if not len(val):
        raise UserError(f"{benchmark.name}: split val has no images to choose the learning rate on")
    probe = LinearProbe(
        backbone,
        options.lrs,
        benchmark.num_classes,
        traits(benchmark).dense,
        seeding.derive_seed(config.seed, "network"),
    ).to(device)
    with Progress(label, options.steps, show=accelerator.is_main_process) as progress:
        fit(
            probe,
            drawn(config, data.labelled, data.labelled_indices, device),
            steps=options.steps,
            loss=partial(task_loss, ignore_index=benchmark.ignore_index),
            progress=lambda images: progress.update(images, {}),
        )
    tallies = count(
        probe,
        Resized(val, data.size, masks=False),
        benchmark,
        candidates=len(options.lrs),
        device=device,
        batch=options.batch,
        workers=config.data.workers,
    )
    metric = metric_of(benchmark)
    chosen = probe.keep_best(metric, [tally.scores()[metric] for tally in tallies])
    return Fitted(lambda images: probe(images)[0], data.size, list(backbone.layers), chosen)


def knn(subject: Subject, config: RunConfig, data: TrainingSet, accelerator: Accelerator) -> Fitted:
    """Votes of the most similar labelled images (`evaluation.neighbours`); trains nothing."""
    if data.benchmark.task != "classification":
        raise UserError(
            f"--protocol knn: {data.benchmark.name} has {traits(data.benchmark).labels}, but knn "
            "votes on whole images; choose linear"
        )
    backbone = open_backbone(subject, config, data.size, accelerator.device)
    classifier = NearestNeighbours(
        backbone,
        _once(config, data, accelerator.device),
        classes=data.benchmark.num_classes,
        neighbours=config.evaluate.neighbours,
        temperature=config.evaluate.temperature,
    )
    chosen = {"neighbours": classifier.neighbours, "temperature": classifier.temperature}
    return Fitted(classifier, data.size, list(backbone.layers), chosen)


def finetune(
    subject: Subject, config: RunConfig, data: TrainingSet, accelerator: Accelerator
) -> Fitted:
    """The whole network on labels alone, by the one training loop, in a scratch folder."""
    if subject.kind == "teacher":
        raise UserError(f"{subject.text}: teachers cannot be fine-tuned; choose --protocol linear")
    _whole(subject, "finetune")
    backbone = open_backbone(subject, config, data.size, torch.device("cpu"))
    pair = PairConfig(student=list(backbone.layers), teacher="none")  # a map that the network has
    # How it is scored plays no part in training.
    config = dataclasses.replace(config, pairs=[pair], evaluate=EvaluateConfig())
    config = fit_batch(config, data, accelerator)
    check_schedule(config, accelerator.num_processes, traits(data.benchmark).dense)
    trainer = Trainer(config, "scratch", data, accelerator)
    with tempfile.TemporaryDirectory() as scratch, stop_on_signals() as stop:
        checkpoint_path(Path(scratch), "scratch").parent.mkdir(parents=True)
        train_arm(trainer, Path(scratch), stop, lambda trainer, log: None)
    student = trainer.average.module.eval()
    return Fitted(
        predictor(student), data.size, [], {"head": config.student.head, "steps": trainer.step}
    )


class LabelSplit(NamedTuple):
    """One random choice of labelled images for `label_efficient`."""

    labels: int
    seed: int
    names: list[str] | None
    """Names of the images; None: all of them."""
    fitted: Fitted


def label_efficient(
    subject: Subject, config: RunConfig, data: TrainingSet, accelerator: Accelerator
) -> Iterator[LabelSplit]:
    """`linear` with few labelled images, several random choices of each number of them.

    The protocol of DDPM-seg (Baranchuk et al., ICLR 2022), with one linear classifier in place of
    its ensemble, and features computed as they are needed instead of kept. All choices share the
    images of `data`.
    """
    examples = data.benchmark.dataset("train")
    targets = getattr(examples, "targets", None)
    names = getattr(examples, "names", None) or [str(index) for index in range(len(examples))]
    counts = label_counts(config.evaluate.labels, len(examples))
    backbone = open_backbone(subject, config, data.size, accelerator.device)
    for labels in counts:
        seeds = range(config.evaluate.splits if labels < len(examples) else 1)
        for seed in seeds:
            chosen = choose_labelled(len(examples), labels, seed, targets)
            labelled_names = None if labels == len(examples) else [names[index] for index in chosen]
            title = f"{labels} labels, choice {seed + 1} of {len(seeds)}"
            labelled = data._replace(labelled_indices=chosen)
            yield LabelSplit(
                labels,
                seed,
                labelled_names,
                fit_linear(backbone, config, labelled, accelerator, title),
            )


def label_counts(labels: list[int | str], available: int) -> list[int]:
    """Numbers of labelled images, ascending, each once.

    Args:
        labels: Numbers, shares such as "1/16", or "all".
        available: Number of training images.
    """
    counts = set()
    for entry in labels:
        number = available
        if isinstance(entry, int):
            number = entry
        elif entry != "all":
            number = max(1, round(available * Fraction(entry)))
        if number > available:
            raise UserError(
                f"evaluate.labels: {entry} requested, but there are {available} training images; "
                "give a smaller number, or a share such as 1/4"
            )
        counts.add(number)
    return sorted(counts)


def drawn(
    config: RunConfig, examples: Augmented, indices: Sequence[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented images with their targets, those of `indices`, one batch per step of `linear`."""
    sampler = StepSampler(
        indices,
        config.evaluate.train_batch,
        seed=seeding.derive_seed(config.seed, "labelled"),
        stop_step=config.evaluate.steps,
    )
    for images, targets in loader(examples, sampler, config.data.workers):
        yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _once(
    config: RunConfig, data: TrainingSet, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every labelled image as it is, with its class."""
    examples, batch = data.labelled.examples, config.evaluate.batch
    for items in in_order(examples, data.labelled_indices, batch, config.data.workers):
        known = [item for item in items if item[1] != data.benchmark.ignore_index]
        if known:
            images = as_float(torch.stack([image for image, _ in known]).to(device))
            yield images, torch.tensor([target for _, target in known], device=device)
