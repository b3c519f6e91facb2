"""`distill evaluate`: score an exported student, with its own head or a frozen linear one."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill import checkpoint
from distill.build import build_accelerator, build_benchmark, build_training_set
from distill.config import RunConfig
from distill.errors import UserError
from distill.export import load_student, read_card, student_folder
from distill.recipe import apply_override, build_config
from distill.run import held_out_examples, score
from distill.tracking import commit, stop_on_signals
from distill.train import checkpoint_path, train_arm
from distill.trainer import Trainer


def rescore(path: str, overrides: Sequence[str], *, head: str, out: str | None) -> str:
    """Score a student on the benchmark of its own recipe, or on another given by overrides.

    Args:
        path: An exported student or a run folder.
        overrides: Changes to the recipe it was made with, such as `data.root=...`.
        head: `own`, or `linear`: a new linear head on the frozen backbone, trained on the labelled
            images of the recipe.
        out: A JSON file for the scores.

    Returns:
        The table to print.
    """
    folder = student_folder(path)
    tree = read_card(folder).recipe
    for override in overrides:
        apply_override(tree, override)
    config = build_config(RunConfig, tree, where=f"recipe of {folder}")
    scores = _own_head(config, folder) if head == "own" else _linear_head(config, folder)
    result = {
        "student": str(folder),
        "head": head,
        "benchmark": config.data.benchmark,
        "split": config.evaluate.split,
        "scores": scores,
        "commit": commit(),
    }
    if out is not None:
        checkpoint.write_text(out, json.dumps(result, indent=2) + "\n")
    return _table(result)


def _own_head(config: RunConfig, folder: Path) -> dict[str, Any]:
    benchmark = build_benchmark(config.data)
    student, card = load_student(folder)
    if benchmark.num_classes != card.classes:
        raise UserError(
            f"the student predicts {card.classes} classes, {benchmark.name} has "
            f"{benchmark.num_classes}; fit a new head with --head linear"
        )
    accelerator = build_accelerator(config.device)
    size = (student.image_size[0], student.image_size[1])
    examples = held_out_examples(config, benchmark, size)
    return score(student.to(accelerator.device), examples, benchmark, config, accelerator)


def _linear_head(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Train a linear head and nothing else, by the one training loop, in a scratch folder."""
    student = dataclasses.replace(
        config.student, init_from=str(folder), head="linear", head_layers=[], freeze=True
    )
    train = dataclasses.replace(config.train, arms=["scratch"], finetune_steps=0, evaluate_every=0)
    config = dataclasses.replace(config, student=student, train=train)
    accelerator = build_accelerator(config.device)
    data = build_training_set(config.data)
    trainer = Trainer(config, "scratch", data, accelerator)
    with tempfile.TemporaryDirectory() as scratch, stop_on_signals() as stop:
        checkpoint_path(Path(scratch), "scratch").parent.mkdir(parents=True)
        train_arm(trainer, Path(scratch), stop, lambda trainer, log: None)
    examples = held_out_examples(config, data.benchmark, data.size)
    return score(trainer.average.module, examples, data.benchmark, config, accelerator)


def _table(result: dict[str, Any]) -> str:
    """The scores in points, those of the classes below."""
    scores = dict(result["scores"])
    by_class = scores.pop("iou", None) or scores.pop("accuracy")
    head = f"{result['student']} on {result['benchmark']} {result['split']}, {result['head']} head"
    lines = [head, *(f"  {name:16} {100 * value:5.1f}" for name, value in scores.items()), ""]
    for name, value in by_class.items():
        lines.append(f"  {name:16} {'    -' if value is None else f'{100 * value:5.1f}'}")
    return "\n".join(lines)
