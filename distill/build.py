"""From a config's names to objects; what the rooms refuse becomes a line that names the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from distill.augmentation import augmentation
from distill.benchmarks import IGNORE_INDEX, Benchmark, Examples
from distill.config import DataConfig, PairConfig, RunConfig
from distill.data import Augmented, InMemory, Resized, choose_labelled, fingerprint
from distill.errors import UserError, blame
from distill.matching.distiller import Distiller, Match
from distill.matching.losses import FeatureLoss
from distill.options import checked_options
from distill.own_benchmark import OwnBenchmark
from distill.policies import build_rewards, reward_layer
from distill.registry import resolve
from distill.tasks import traits
from students.student import LayerError as StudentLayerError
from students.student import Student
from teachers.anatomy import LayerError as TeacherLayerError
from teachers.protocol import Teacher


def build_accelerator(device: str) -> Accelerator:
    """The device and the processes of a run; accelerate keeps one such state a program."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU; use device=cpu or auto")
    # Some parameters rest in some phases: projectors while fine-tuning, the head while distilling.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # Unless it is told to use the CPU, accelerate joins no processes where there is nothing else
    cpu = device == "cpu" or not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[unused])


def single_process(device: str, command: str) -> Accelerator:
    """The device of a command that computes and writes in one process."""
    accelerator = build_accelerator(device)
    if accelerator.num_processes > 1:
        raise UserError(
            f"{command} needs one process, got {accelerator.num_processes}; start it without "
            "torchrun or accelerate launch"
        )
    return accelerator


def build_benchmark(data: DataConfig) -> Benchmark:
    """The benchmark that `data` names."""
    benchmark: Benchmark = open_data(data, "benchmarks")
    own = ":" in data.benchmark
    return cast(Benchmark, OwnBenchmark(benchmark, data.benchmark)) if own else benchmark


def open_data(data: DataConfig, table: str) -> Any:
    """What `data` names in a table of the registry."""
    factory = resolve(table, data.benchmark, "data.benchmark")
    options = checked_options(data.options, factory, "data.options")
    try:
        with blame("data"):
            return factory(data.root, **options)
    except TypeError as error:
        raise UserError(f"data.options: {data.benchmark} with {data.options}: {error}") from error


def image_size(data: DataConfig, examples: Examples) -> tuple[int, int]:
    """(H, W) of training images: `data.size`, otherwise that of the first example."""
    if data.size is not None:
        return data.size
    height, width = examples[0][0].shape[-2:]
    return int(height), int(width)


@contextmanager
def blame_layer(asked: Mapping[str, str]) -> Iterator[None]:
    """Blame a layer that is not to be had on the recipe's key that asked for it.

    `asked` maps layers to keys; what else asked for one is left to `blame` around this.
    """
    try:
        yield
    except (TeacherLayerError, StudentLayerError) as error:
        if error.layer not in asked:
            raise
        raise UserError(f"{asked[error.layer]}: {error}") from error


class Unlabelled:
    """`examples` whose labels nobody can see. Items: image uint8, `IGNORE_INDEX`."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.examples[index][0], IGNORE_INDEX


def training_examples(
    examples: Examples,
    data: DataConfig,
    benchmark: Benchmark,
    size: tuple[int, int],
    loaders: int = 1,
) -> Augmented:
    """Resized (unless to be cut), kept in memory as far as there is room, augmented.

    loaders: How many read them, each with worker processes of its own.
    """
    if data.augment != "patch":
        examples = Resized(examples, size, masks=benchmark.task == "segmentation")
    if data.memory_gb:
        examples = InMemory(examples, data.memory_gb * 1e9 / max(1, loaders * data.workers))
    change = augmentation(
        data.augment,
        benchmark.task,
        size,
        patch_scale=data.patch_scale,
        mirrored=getattr(benchmark, "mirrored", ()),
    )
    return Augmented(examples, change)


class TrainingSet(NamedTuple):
    """The training images of a run, and which of them show their labels."""

    benchmark: Benchmark
    size: tuple[int, int]
    labelled: Augmented
    labelled_indices: list[int]
    unlabelled: Augmented
    unlabelled_indices: list[int]
    fingerprint: str
    targets: Sequence[int] | None
    """The class of each training image, where the benchmark has that without reading it."""


def build_training_set(data: DataConfig) -> TrainingSet:
    """Choose which training images show their labels (nested in the count, by `split_seed`)."""
    benchmark = build_benchmark(data)
    traits(benchmark)  # refuses images without labels
    if data.augment == "patch":
        raise UserError(
            "data.augment: patch is for `distill teacher train`: students are scored on whole "
            "images, so that they must see things as large as there; use crop"
        )
    examples = benchmark.dataset("train")
    if not len(examples):
        raise UserError(f"data: the training split of {benchmark.name} is empty")
    size = image_size(data, examples)
    targets = getattr(examples, "targets", None)
    labelled = choose_labelled(
        len(examples), data.labelled, data.split_seed, targets, benchmark.ignore_index
    )
    origin, more = fingerprint(examples), getattr(benchmark, "unlabelled", lambda: None)()
    if more is not None:  # after the others, whose numbers stay
        examples = ConcatDataset([examples, more])  # type: ignore[list-item]
    unlabelled = len(examples) if data.unlabelled is None else data.unlabelled
    if unlabelled > len(examples):
        raise UserError(
            f"data.unlabelled: {unlabelled} requested, but there are only {len(examples)} images"
        )
    shown = training_examples(examples, data, benchmark, size, loaders=2)
    return TrainingSet(
        benchmark,
        size,
        shown,
        labelled,
        Augmented(Unlabelled(shown.examples), shown.augment),
        choose_labelled(len(examples), unlabelled, data.split_seed) if unlabelled else [],
        origin,
        targets,
    )


def build_student(config: RunConfig, benchmark: Benchmark, size: tuple[int, int]) -> Student:
    """The student for a benchmark's classes; weights from torch's default generator."""
    student = config.student
    asked = dict.fromkeys(student.head_layers, "student.head_layers")
    for index, pair in reversed(list(enumerate(config.pairs))):  # so that the first one counts
        asked |= dict.fromkeys(pair.student, f"pairs.{index}.student")
    with blame("student"), blame_layer(asked):
        return Student(
            student.model,
            classes=benchmark.num_classes,
            dense=traits(benchmark).dense,
            image_size=size,
            layers=[layer for pair in config.pairs for layer in pair.student],
            head=student.head,
            head_layers=student.head_layers,
            input_size=student.input_size,
            pretrained=student.pretrained,
            kwargs=student.kwargs,
        )


def in_order(student: Student, pair: PairConfig) -> tuple[str, ...]:
    """The student's side of a pair, shallowest first."""
    return tuple(layer for layer in student.layers if layer in pair.student)


def build_distiller(
    config: RunConfig, benchmark: Benchmark, size: tuple[int, int], teacher: Teacher | None
) -> Distiller:
    """The trainable module; without a teacher the student alone."""
    student, policy = build_student(config, benchmark, size), config.policy
    given: dict[str, Any] = {
        "auxiliary_weight": config.train.auxiliary,
        "context": policy.context,
        "image_size": policy.image_size,
        "ignore_index": benchmark.ignore_index,
    }
    if teacher is None:
        return Distiller(student, auxiliary=_auxiliary(config, student, benchmark), **given)
    losses = []
    for index, pair in enumerate(config.pairs):
        try:
            losses.append(
                FeatureLoss(
                    pair.loss,
                    [student.channels[layer] for layer in in_order(student, pair)],
                    teacher.channels[pair.teacher],
                    pooled=pair.pooled,
                    projector=pair.projector,
                    standardise=pair.standardise,
                    options=pair.options,
                )
            )
        except UserError as error:
            raise UserError(f"pairs.{index}.{error}") from error
    reward_head, label_free = build_rewards(config, benchmark, student, teacher)
    return Distiller(
        student,
        matches=[
            Match(in_order(student, pair), pair.teacher, pair.weight) for pair in config.pairs
        ],
        losses=losses,
        reward_head=reward_head,
        label_free=label_free,
        reward_layer=reward_layer(config),
        auxiliary=_auxiliary(config, student, benchmark),  # last: what else is drawn stays the same
        feature_weight=config.train.feature_weight,
        **given,
    )


def _auxiliary(config: RunConfig, student: Student, benchmark: Benchmark) -> nn.Module | None:
    """A second head, if asked for: torchvision's, on the last but one of the head's maps."""
    if not config.train.auxiliary:
        return None
    from torchvision.models.segmentation.fcn import FCNHead

    if student.head is None:
        raise UserError(
            f"train.auxiliary: a second head predicts at every position, and {benchmark.name} has "
            f"{traits(benchmark).labels}; leave it at 0"
        )
    if len(student.head_layers) < 2:
        raise UserError(
            "train.auxiliary: a second head reads the last but one of student.head_layers, and "
            f"there is only {student.head_layers[0]}; name two or more, or leave it at 0"
        )
    channels = {info["module"]: info["num_chs"] for info in student.backbone.feature_info}
    head: nn.Module = FCNHead(channels[student.head_layers[-2]], benchmark.num_classes)
    return head
