"""Two sections of a report from the log: losses with target noise, and cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.drawing import charts, plots
from distill.policies import mixes
from distill.reporting.page import Block, Picture, Section, Table, Text
from distill.reporting.results import finding_of, heading, picture_path
from distill.studies.comparison import FinishedRun, Group, arm_label
from distill.training.loop import TIMED


def losses(groups: Sequence[Group], pictures: Path) -> Section:
    """Losses over training, and how much of the feature loss no student can avoid."""
    section = Section("losses", "Losses and target noise")
    for group in groups:
        run = group.first
        path = picture_path(pictures, groups, group, "curves.png")
        plots.curves(path, run.rows)
        alt = "Losses, rewards and learning rate over the steps of training, one line per arm"
        caption = f"Training of seed {run.seed}; pale single steps, strong their running mean."
        section.blocks += [*heading(groups, group), Picture(path, alt, caption)]
        path = picture_path(pictures, groups, group, "floor.png")
        blocks, finding = _floor(run, path)
        section.blocks += blocks
        section.findings.extend(finding_of(groups, group, text) for text in finding)
    return section


def _floor(run: FinishedRun, path: Path) -> tuple[list[Block], list[str]]:
    """The target-noise floor beside the feature loss of the last tenth of the log."""
    if run.taught is None:
        return [Text("No arm had a teacher: there is no feature loss.")], []
    result = run.results[run.taught]
    floor = result.get("noise_floor") or {}
    ended = final(run, run.taught, "loss/feature")
    if not floor.get("mean"):
        why = "no target-noise floor was measured (clean input, a feature cache, or floor_every=0)"
        return [Text(f"Feature loss at the end: {_number(ended)}; {why}.")], []
    charts.noise_floor(path, floor["bins"], **result["policy"])
    weights = [pair.weight for pair in run.config.pairs]
    when = "" if mixes(run.config) else " at the timesteps preferred then"
    late = _late_floor(run, floor).values()
    total = sum(weight * mean for weight, mean in zip(weights, late, strict=True))
    rows = [
        [pair, pick.teacher, f"{pick.weight:g}", pick.loss, f"{mean:.3f}"]
        for (pair, mean), pick in zip(floor["mean"].items(), run.config.pairs, strict=True)
    ]
    caption = "Variance of each pair's target over draws of the noise, in the units of its loss"
    where = "of mixtures, by their mean timestep" if mixes(run.config) else "at each timestep"
    blocks: list[Block] = [
        Picture(
            path,
            "Target-noise floor of each pair over the timesteps",
            f"{caption}, {where}. No student can predict that part.",
        ),
        Table(
            "Its mean over the timesteps that were chosen, from the first step to the last",
            ["pair", "teacher's layer", "weight", "loss", "floor"],
            rows,
        ),
    ]
    if any(pair.loss != "mse" or not pair.standardise for pair in run.config.pairs):
        blocks.append(
            Text(
                f"Feature loss at the end: {_number(ended)}. It is not all a mean squared error of "
                "standardised targets, so that the floor does not compare with it."
            )
        )
        return blocks, []
    blocks.append(
        Text(
            f"Feature loss at the end: {_number(ended)}, of which noise alone would leave "
            f"{total:.3f}{when}, both summed over the pairs with their "
            f"weights; a student that predicts nothing is left with {sum(weights):.3g}."
        )
    )
    if ended is None:
        return blocks, []
    return blocks, [
        f"the feature loss ended at {ended:.2f}, of which the targets' noise makes {total:.2f}"
    ]


def _late_floor(run: FinishedRun, floor: dict[str, Any]) -> dict[str, float]:
    """The floor of each pair at the finally preferred timesteps, where it was measured: over all of
    training it includes timesteps given up since. A mixture is less noisy than its parts, so the
    mean over all of training is the only figure for it."""
    late: dict[str, float] = dict(floor["mean"])
    if mixes(run.config):
        return late
    shares = run.summary["policy"]["probabilities"] if run.summary["policy"] else []
    for pair, bins in floor["bins"].items():
        known = [(p, x) for p, x in zip(shares, bins, strict=False) if x is not None]
        if weight := sum(p for p, _ in known):
            late[pair] = sum(p * x for p, x in known) / weight
    return late


def final(run: FinishedRun, arm: str, key: str) -> float | None:
    """Mean of a logged figure over the last tenth of an arm's rows that have it."""
    values = [row[key] for row in run.rows if row["arm"] == arm and row.get(key) is not None]
    return statistics.fmean(values[-max(1, len(values) // 10) :]) if values else None


def _number(value: float | None) -> str:
    return "not logged" if value is None else f"{value:.3f}"


def cost(groups: Sequence[Group], pictures: Path) -> Section:
    """Time, its parts, and operations."""
    section = Section("cost", "Cost")
    rows = [
        [
            f"{run.folder.name}, {arm_label(arm)}",
            str(run.config.train.steps),
            f"{result['seconds']:.0f} s",
            f"{result['images_per_second'] * result['seconds']:,.0f}",
            f"{result['images_per_second']:.1f}",
            f"{_waiting(result):.0%}" if result["parts"] else "not recorded",
        ]
        for group in groups
        for run in group.runs
        for arm, result in run.results.items()
    ]
    head = ["run, arm", "steps", "time", "images", "images/s", "waiting for data"]
    section.blocks.append(Table("Time of training, evaluation not counted", head, rows))
    for group in groups:
        path = picture_path(pictures, groups, group, "parts.png")
        section.blocks += [*heading(groups, group), *_parts(group.first, path)]
        section.blocks.append(_operations(group.first))
    return section


def _waiting(result: dict[str, Any]) -> float:
    return float(result["parts"].get("data", 0.0))


def _parts(run: FinishedRun, path: Path) -> list[Block]:
    """The share of a step's time by part."""
    shares = {
        arm_label(arm): {part: 100 * share for part, share in result["parts"].items()}
        for arm, result in run.results.items()
        if result["parts"]
    }
    if not shares:
        return [
            Text(
                "The parts of a step were not recorded: the run is too short (every "
                f"{TIMED}th step is timed)."
            )
        ]
    plots.bars(path, shares, "% of the time of a step")
    parts = list(dict.fromkeys(part for row in shares.values() for part in row))
    rows = [
        [arm, *(f"{row[part]:.1f}%" if part in row else "" for part in parts)]
        for arm, row in shares.items()
    ]
    caption = f"Share of a step's time by part, seed {run.seed}"
    alt = f"{caption}, as in the table below"
    table = Table("The same in figures", ["arm", *parts], rows)
    return [Picture(path, alt, f"{caption}, in every {TIMED}th step."), table]


def _operations(run: FinishedRun) -> Block:
    """Floating-point operations, counted and not measured."""
    rows = []
    for arm, result in run.results.items():
        train, flops = run.config.train, result["flops"]
        passes = 3 * result["images_per_second"] * result["seconds"]
        if arm != "scratch" and "student_progress" in run.config.policy.rewards:
            passes += 2 * (train.steps - train.finetune_steps) * train.batch
        total = passes * flops["student"] + result["teacher_images"] * (flops["teacher"] or 0)
        known = arm == "scratch" or flops["teacher"] is not None
        rows.append(
            [
                arm_label(arm),
                f"{flops['student'] / 1e9:.3f}",
                _giga(flops["teacher"]),
                _giga(flops["teacher_whole"]),
                f"{result['teacher_images']:,}",
                f"{total / 1e12:,.2f}" if known else "–",
            ]
        )
    caption = (
        "Operations (two per multiply-add): GFLOP of one image forward; images that the teacher "
        "looked at, those whose features were in a cache not counted; and TFLOP of training "
        "student and teacher, a backward pass taken as twice its forward pass, without policy and "
        "reward heads"
    )
    head = ["arm", "student", "teacher, as far as needed", "whole teacher", "looks", "training"]
    return Table(caption, head, rows)


def _giga(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e9:.3f}"
