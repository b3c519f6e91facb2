"""`--dry-run` and `distill teacher layers`: everything is checked and tried, nothing trained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from distill import checkpoint
from distill.benchmarks import Examples, notice
from distill.build import TrainingSet, build_accelerator, build_training_set, in_order
from distill.commands.train import resumed
from distill.config import Arm, RunConfig
from distill.costs.flops import teacher_flops
from distill.data import Draw
from distill.errors import UserError, blame
from distill.evaluation.scoring import held_out_examples
from distill.pretraining.teach import TeacherTraining
from distill.recipe import apply_override, to_yaml
from distill.registry import resolve
from distill.tasks import traits
from distill.teacher import has_members, teacher_dtype, teacher_to_list
from distill.teacher_config import TeacherTrainConfig
from distill.training.clock import wait
from distill.training.fit import check_schedule, fit_batch
from distill.training.loop import batches
from distill.training.trainer import Trainer
from rl_policy.protocol import MixingPolicy
from teachers import anatomy
from teachers.protocol import Teacher

SHOWN = 20
"""Classes up to which the number of labels is printed."""


def dry_run(config: RunConfig, *, resume: bool = False) -> str:
    """Check a recipe completely, with one batch of each arm, and estimate its cost."""
    folder = Path(config.output) / config.name
    if resume and (folder / "config.yaml").exists():
        config = resumed(config, folder / "config.yaml")
    checkpoint.check_folder("output", folder)
    if config.teacher.cache is not None:
        checkpoint.check_folder("teacher.cache", Path(config.teacher.cache))
    config, data, held_out, accelerator = _prepare(config)
    lines = [
        to_yaml(config).rstrip(),
        "",
        *_data(data, config.train.batch),
        f"# {len(held_out)} images held out ({config.evaluate.split})",
    ]
    total = 0.0
    for arm in config.train.arms:
        trial = _try_arm(config, arm, data, accelerator)
        steps, total = config.train.steps, total + trial.seconds
        lines += trial.lines
        lines.append(
            f"# {arm}: {steps} steps of {trial.seconds / steps:.2f} s, about "
            f"{_clock(trial.seconds)}"
        )
    lines.append(f"# in all about {_clock(total)}, evaluation not counted; nothing was trained")
    if folder.exists() and not resume:
        lines.append(f"# {folder} exists: the run would need --resume or another name=")
    return "\n".join(lines)


class Trial(NamedTuple):
    """What two steps of an arm show."""

    lines: list[str]
    """About its teacher and its cache, to be printed."""
    seconds: float
    """Estimated seconds to train it."""
    teacher: str | None
    """The fingerprint of its teacher."""


def try_recipe(config: RunConfig) -> dict[Arm, Trial]:
    """Check a recipe as `dry_run` does."""
    config, data, _, accelerator = _prepare(config)
    return {arm: _try_arm(config, arm, data, accelerator) for arm in config.train.arms}


def _try_arm(config: RunConfig, arm: Arm, data: TrainingSet, accelerator: Accelerator) -> Trial:
    """Build an arm and try two steps; its memory is free again afterwards."""
    trainer = Trainer(config, arm, data, accelerator)
    lines = [] if trainer.teacher is None else _pairs(trainer)
    if (planned := trainer.planned_cache) is not None:
        planned.check()
        lines.append(f"# {arm}: cache of {planned.plan} in {config.teacher.cache}; not counted")
    notice(f"{config.name}: trying two steps of {arm}")
    fingerprint = None if trainer.teacher is None else trainer.teacher.fingerprint
    trial = Trial(lines, config.train.steps * _step_seconds(trainer), fingerprint)
    del trainer
    accelerator.free_memory()  # it holds on to every model that it prepared
    return trial


def _prepare(config: RunConfig) -> tuple[RunConfig, TrainingSet, Examples, Accelerator]:
    """The recipe with `auto` resolved, its training and held-out images, and the accelerator."""
    accelerator = build_accelerator(config.device)
    data = build_training_set(config.data)
    config = fit_batch(config, data, accelerator)
    check_schedule(config, accelerator.num_processes, traits(data.benchmark).dense)
    held_out = held_out_examples(config, data.benchmark, data.size)
    held_out[0]  # it can be read
    return config, data, held_out, accelerator


def _step_seconds(trainer: Trainer) -> float:
    """Seconds of a step; of the second one if there are two, as the first one warms up."""
    stream = batches(trainer)
    for _ in range(min(2, trainer.config.train.steps)):
        batch = next(stream)
        began = time.monotonic()
        trainer.train_step(batch)
        wait(trainer.accelerator.device)
        trainer.settle()
        seconds = time.monotonic() - began
    return seconds


def teacher_dry_run(config: TeacherTrainConfig) -> str:
    """Check a teacher's recipe with one batch, and estimate its cost."""
    checkpoint.check_folder("output", Path(config.output) / config.name)
    training = TeacherTraining(config, build_accelerator(config.device))
    draws = [Draw(training.indices[i % len(training.indices)], i) for i in range(config.batch)]
    images = torch.stack([training.examples[draw][0] for draw in draws])
    images = images.to(training.accelerator.device)
    notice("trying two steps")
    for _ in range(2):
        began = time.monotonic()
        training.train_step(images)
        wait(training.accelerator.device)
        training.settle()
        seconds = time.monotonic() - began
    parameters = sum(p.numel() for p in training.unet.parameters())
    return (
        f"{to_yaml(config)}\n"
        f"# {len(training.indices)} images of {training.size[0]}x{training.size[1]} px, "
        f"{parameters / 1e6:.1f}M parameters\n"
        f"# {config.steps} steps of {seconds:.2f} s, about {_clock(seconds * config.steps)}; "
        "nothing was trained"
    )


def teacher_layers(
    name: str, path: str, size: tuple[int, int] | None, options: Sequence[str] = ()
) -> str:
    """A table of a network's blocks: channels, reduction, share of the forward pass done by then.

    Args:
        name, path: As in a recipe's `teacher`.
        size: Height and width of the images; None for the network's own.
        options: `name=value` of its `teacher.options`.
    """
    factory = resolve("teachers", name, "--name")
    if has_members(factory):
        raise UserError(
            f"--name: {name} has no layers of its own; list each of its members instead"
        )
    given: dict[str, Any] = {}
    for option in options:
        apply_override(given, option)
    teacher = teacher_to_list(factory, path, size, given)
    with blame("teacher"):
        if not hasattr(teacher, "layer_table"):
            raise UserError(f"--name: teacher {name} cannot list its layers")
        seen = size or teacher.family.image_size
        if seen is None:
            raise UserError(f"{path} does not state its image size; give --size")
        table = teacher.layer_table(seen)
    if not table:
        raise UserError(
            f"{path} has no blocks with the usual names; name layers by their module names"
        )
    width = max(len(row.name) for row in table)
    lines = [f"{'layer':{width}} {'channels':>8} {'reduction':>9} {'cost until here':>15}"]
    lines += [
        f"{row.name:{width}} {row.channels:8} {row.reduction:9} {row.cost:15.0%}" for row in table
    ]
    pixels = "x".join(str(x) for x in anatomy.height_width(seen))
    last = len(teacher.noise_schedule) - 1
    return "\n".join([*lines, f"images of {pixels} px, timesteps 0 to {last}"])


def _pairs(trainer: Trainer) -> list[str]:
    """The matched maps with their shapes, and the teacher's cost per image."""
    student, teacher = trainer.student, trainer.teacher
    assert teacher is not None
    lines = [f"# {trainer.arm}: teacher {teacher.name}, feature pairs"]
    lines += _size_notes(teacher, trainer.data.size)
    image = torch.zeros(1, 3, *trainer.data.size, device=trainer.accelerator.device)
    with torch.no_grad():
        student.eval()
        own = student(image)[1]
        student.train()
    theirs = teacher.features(image, torch.zeros(1, dtype=torch.int64))
    for pair in trainer.config.pairs:
        students = ", ".join(
            f"{layer} {tuple(own[layer].shape[1:])}" for layer in in_order(student, pair)
        )
        lines.append(
            f"#   {students} -> {pair.teacher} {tuple(theirs[pair.teacher].shape[1:])}  "
            f"{pair.loss}{' pooled' if pair.pooled else ''} x {pair.weight:g}"
        )
    if (cost := teacher_flops(teacher, trainer.data.size)) is not None:
        used, whole = (count / 1e9 for count in cost)
        lines.append(
            f"#   teacher: {used:.2f} of {whole:.2f} GFLOP per image, stops early; "
            f"{teacher_dtype(trainer.config)}"
        )
    if isinstance(trainer.policy, MixingPolicy):
        looks = len(trainer.timesteps)
        lines.append(
            f"#   {trainer.config.policy.name}: the teacher looks {looks} times at every image, "
            "once for each of policy.bins"
        )
    return lines


def _clock(seconds: float) -> str:
    """Rounded to what matters: 40 s, 3 min 20 s, 5 h 10 min, 32 days."""
    minutes, rest = divmod(round(seconds), 60)
    hours = minutes // 60
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    if hours:
        return f"{hours} h {minutes % 60:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _data(data: TrainingSet, batch: int) -> list[str]:
    """The training images, and how many labelled ones there are per class and in a batch."""
    labelled, distilled = data.labelled_indices, data.unlabelled_indices
    both = ", labelled ones included" if {*labelled} <= {*distilled} else ""
    lines = [
        f"# data: {data.benchmark.name}, {len(labelled)} images with labels, {len(distilled)} to "
        f"distil on{both}, of {data.size[0]}x{data.size[1]} px"
    ]
    if data.targets is not None and data.benchmark.task == "classification":  # else other groups
        names = data.benchmark.class_names
        counts = Counter(names[data.targets[index]] for index in labelled)
        shown = [f"{name} {counts[name]}" for name in names[:SHOWN]]
        rest = f", ... ({len(names)} classes)" if len(names) > SHOWN else ""
        lines.append(f"# labels: {', '.join(shown)}{rest}")
    if batch > len(labelled):
        lines.append(f"# train.batch={batch}: a step shows all labelled images, some repeatedly")
    return lines


def _size_notes(teacher: Teacher, size: tuple[int, int]) -> list[str]:
    """A line where the teacher sees images of another size than it was trained on."""
    own = getattr(getattr(teacher, "family", None), "image_size", None)
    if own is None or getattr(teacher, "image_size", None) is not None:
        return []
    height, width = anatomy.height_width(own)
    if (height, width) == size:
        return []
    return [
        f"#   it was trained on {height}x{width} px and sees {size[0]}x{size[1]}; "
        f"teacher.image_size=[{height},{width}] resizes images for it"
    ]
