"""Section of a report on the policy's choices over training, by class and by image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.config import RunConfig
from distill.drawing import charts, plots
from distill.errors import UserError
from distill.reporting.choices import Choices, recall_choices
from distill.reporting.page import Block, Picture, Section, Table, Text
from distill.reporting.results import finding_of, heading, picture_path
from distill.reporting.summary import is_even, preferred
from distill.studies.comparison import FinishedRun, Group
from rl_policy.summary import policy_summary

YARDSTICKS = ("fixed", "uniform", "linear_decay", "grid")
DIFFUSE = 0.75  # of the timesteps on offer are effective: the policy has hardly chosen
SETTLED = 0.75  # of the choices, at least, fall on one timestep
FEW = 200  # steps in which no policy learns much
TOLD = 0.01  # of the entropy: less of the choice is not decided by the image
SHOWN = 16  # images of the smallest, and of the largest timesteps
PANELS = {
    "policy/entropy": "entropy over all images, nats",
    "policy/effective_arms": "effective number of timesteps",
    "policy/reward": "mean reward",
    "policy/timestep": "mean timestep chosen",
}


def policy(groups: Sequence[Group], configs: Mapping[str, RunConfig], pictures: Path) -> Section:
    """The policies of all recipes.

    Args:
        groups: Of runs.
        configs: By run folder, the recipe to open the data with.
        pictures: Folder for the pictures.
    """
    section = Section("policy", "The policy")
    for group in groups:
        section.blocks += heading(groups, group)
        run = group.first
        if run.taught is None:
            section.blocks.append(Text("No arm had a teacher, so that nothing was to be chosen."))
            continue
        if run.summary["policy"] is None:
            section.blocks.append(Text("The log has no row of it."))
            continue
        section.blocks += _over_training(groups, group, pictures)
        section.findings.append(finding_of(groups, group, _preference(group)))
        blocks, findings = _by_image(
            run, configs[str(run.folder)], partial(picture_path, pictures, groups, group)
        )
        section.blocks += blocks
        section.findings.extend(finding_of(groups, group, text) for text in findings)
    return section


def history(run: FinishedRun) -> list[dict[str, Any]]:
    """The rows of the log in which the policy's distribution stands."""
    rows = [row for row in run.rows if row["arm"] == run.taught and "probabilities" in row]
    count = len(run.summary["policy"]["timesteps"])
    if wrong := [row["step"] for row in rows if len(row["probabilities"]) != count]:
        raise UserError(
            f"{run.folder / 'metrics.jsonl'}: the row of step {wrong[0]} must have {count} "
            "probabilities; restore the file from a backup, or remove the line"
        )
    return rows


def _over_training(groups: Sequence[Group], group: Group, pictures: Path) -> list[Block]:
    """The preferred timesteps, their spread and their reward."""
    blocks = [_map(group.first, picture_path(pictures, groups, group, "policy.png"))]
    bins = len(group.first.summary["policy"]["timesteps"])
    if moving := [run for run in group.runs if not _nothing_to_map(run)]:
        path = picture_path(pictures, groups, group, "policy-trend.png")
        trend = [row | {"arm": f"seed {run.seed}"} for run in moving for row in history(run)]
        plots.curves(path, trend, PANELS)
        blocks.append(
            Picture(
                path,
                "Entropy, effective number of timesteps, mean reward and mean timestep over "
                "training",
                f"The entropy lies between 0 (one timestep for all images) and "
                f"{math.log(bins):.2f} (all {bins} alike); the effective number of timesteps is "
                "its exponential.",
            )
        )
    table = []
    for one in group.runs:
        if late := one.summary["policy"]:
            table.append(
                [
                    str(one.seed),
                    preferred(late),
                    f"{late['effective_arms']:.1f} of {bins}",
                    f"{late['entropy']:.2f} of {math.log(bins):.2f}",
                    "–" if late["mean_reward"] is None else f"{late['mean_reward']:.3f}",
                ]
            )
    head = ["seed", "preferred timesteps", "effective", "entropy, nats", "mean reward"]
    blocks.append(Table("The policy over the last tenth of the steps it chose in", head, table))
    return blocks


def _map(run: FinishedRun, path: Path) -> Block:
    """The preferred timesteps over training, or why there is nothing to show."""
    if nothing := _nothing_to_map(run):
        return Text(nothing)
    rows, of = history(run), run.summary["policy"]
    plots.policy(
        path,
        steps=[row["step"] for row in rows],
        history=[row["probabilities"] for row in rows],
        timesteps=of["timesteps"],
        noise_fraction=of["noise_fraction"],
    )
    return Picture(
        path,
        f"Heat map of the policy's probability of each timestep over training; "
        f"in the end {_best(of)} is preferred",
        f"Which timesteps the policy ({of['name']}) preferred over training, seed {run.seed}, "
        "and in the end; on the right their noise fractions.",
    )


def _nothing_to_map(run: FinishedRun) -> str:
    """Why a run's policy needs no map over training; nothing where it does."""
    of, rows = run.summary["policy"], history(run)
    who = f"The policy ({of['name']}) of seed {run.seed}"
    if not rows:
        return f"{who} has no row in the log, so that there is nothing to show over training."
    if all(is_even(row["probabilities"]) for row in rows):
        return (
            f"{who} chose all {len(of['timesteps'])} timesteps alike, or nearly so, from the first "
            f"to the last step: there is no preference to show. {_why_even(of['name'], rows)}"
        )
    if len(rows) < 3:
        return (
            f"The log has {len(rows)} row{'s'[: len(rows) - 1]} of the policy, too few for a map "
            f"over training; rows are train.log_every={run.config.train.log_every} steps apart."
        )
    if all(row["probabilities"] == rows[0]["probabilities"] for row in rows):
        return f"{who} chose the same from the first to the last step: {preferred(of)}."
    return ""


def _why_even(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if name in YARDSTICKS:
        return "It is a yardstick that learns nothing."
    if rows[-1]["step"] < FEW:
        return f"It chose in {rows[-1]['step']} steps only; policies take some hundreds to learn."
    return (
        "Either no timestep earns more than another, which a probe can tell (below), or it learns "
        "too slowly."
    )


def _best(late: Mapping[str, Any]) -> str:
    best = max(range(len(late["timesteps"])), key=lambda i: late["probabilities"][i])
    return f"t={late['timesteps'][best]} (noise fraction {late['noise_fraction'][best]:.2f})"


def _preference(group: Group) -> str:
    """One sentence on whether the policy settled, and on which timesteps."""
    late = [run.summary["policy"] for run in group.runs if run.summary["policy"]]
    bins, name = len(late[0]["timesteps"]), late[0]["name"]
    effective = sum(of["effective_arms"] for of in late) / len(late)
    count = f"{effective:.1f} effective of {bins} timesteps"
    if name in YARDSTICKS:
        return f"the policy is {name}, a yardstick that learns nothing ({count})"
    best = ", ".join(dict.fromkeys(_best(of) for of in late))
    if bins == 1:
        return f"the policy ({name}) had {best} alone"
    if effective >= DIFFUSE * bins:
        return f"the policy ({name}) stayed diffuse: {count}"
    if all(max(of["probabilities"]) >= SETTLED for of in late):
        return f"the policy ({name}) settled on {best}: {count}"
    return f"the policy ({name}) leans to {best}, without settling: {count}"


def _by_image(
    run: FinishedRun, config: RunConfig, picture_path: Callable[[str], Path]
) -> tuple[list[Block], list[str]]:
    """The preferred timesteps by class and image, or why they cannot be shown."""
    assert run.taught is not None
    try:
        choices = recall_choices(run, run.taught, config)
    except UserError as error:
        why = f"What the policy prefers by class and by image cannot be shown: {error}."
        return [
            Text(why),
            Text("Other places of the data: distill report RUN data.root=FOLDER."),
        ], []
    everyone = choices.probabilities
    if bool((everyone - everyone[0]).abs().max() < 1e-6):
        return [Text(f"Asked about {choices.split}, it chooses alike for all, whatever class.")], []
    summary = policy_summary(everyone)
    by_image = summary.entropy - summary.image_entropy
    share = by_image / max(summary.entropy, 1e-9)
    moved = _moved(run, choices.step, summary.mean)
    if share < TOLD:
        return [
            Text(
                f"Asked about {choices.split}, as the student of step {choices.step} sees them, it "
                f"chooses nearly alike for all: the image decides less than {TOLD:.0%} of the "
                f"choice, so that there is nothing to show by class or by image. {moved}"
            )
        ], [] if moved else ["its choice does not depend on the image"]
    blocks: list[Block] = [
        Text(
            f"Asked about {choices.split}, as the student of step {choices.step} sees them: the "
            f"image decides {by_image:.3f} of the {summary.entropy:.2f} nats of the choice "
            f"({share:.0%}); mean timesteps of single images run from {choices.expected.min():.0f} "
            f"to {choices.expected.max():.0f}. {moved}"
        ),
        *_classes(run, choices, picture_path),
        _extremes(choices, picture_path("images.png")),
    ]
    if moved:  # then these figures are not of the training
        return blocks, []
    verdict = "barely depends" if share < 0.1 else "depends in part" if share < 0.5 else "depends"
    return blocks, [f"its choice {verdict} on the image ({share:.0%} of the entropy)"]


def _moved(run: FinishedRun, step: int, mean: torch.Tensor) -> str:
    """A warning if the policy, asked again, chooses, or may choose, otherwise than in training."""
    rows = history(run)
    if not rows:
        return ""
    distance = 0.5 * (mean - torch.tensor(rows[-1]["probabilities"])).abs().sum().item()
    if step == rows[-1]["step"] and distance < 0.2:
        return ""
    return (
        f"Take that with care: the policy last chose in step {rows[-1]['step']}, and over all "
        f"images it chose otherwise then (total variation {distance:.2f} of 1); here it sees other "
        "images, without augmentation."
    )


def _classes(
    run: FinishedRun, choices: Choices, picture_path: Callable[[str], Path]
) -> list[Block]:
    distribution = choices.by_class
    present = [i for i, row in enumerate(distribution) if not bool(row.isnan().any())]
    if not present:
        return [Text("No label of these images names a class.")]
    names = [choices.class_names[i] for i in present]
    path = picture_path("classes-policy.png")
    charts.by_class(
        path,
        distribution=distribution[present].numpy(),
        names=names,
        timesteps=choices.timesteps.numpy(),
        noise_fraction=run.summary["policy"]["noise_fraction"],
    )
    expected = distribution @ choices.timesteps.float()
    rows = [
        [
            choices.class_names[i],
            str(int((choices.shares[:, i] > 0).sum())),
            f"{expected[i]:.0f}",
            str(int(choices.timesteps[distribution[i].argmax()])),
        ]
        for i in present
    ]
    caption = alt = "Which timesteps the policy prefers by class"
    if choices.shares.max(dim=1).values.min() < 1:
        caption += "; an image counts for each class by its share of the labelled pixels"
    return [
        Picture(path, f"{alt}, as a heat map", f"{caption}."),
        Table("The same in figures", ["class", "images", "mean t", "most likely t"], rows),
    ]


Captioned = tuple[torch.Tensor, str]
"""An image (3, H, W) and its caption."""


def extremes(choices: Choices) -> tuple[list[Captioned], list[Captioned]]:
    """The images with the smallest mean timesteps, and those with the largest, outermost first."""
    order = choices.expected.argsort(stable=True).tolist()
    count = min(SHOWN, max(1, len(order) // 2))

    def shown(index: int) -> Captioned:
        caption = f"t = {choices.expected[index]:.0f}"
        if float(choices.shares[index].max()) == 1.0:  # of one class
            caption += f"\n{choices.class_names[int(choices.shares[index].argmax())]}"
        return choices.examples[index][0], caption

    return [shown(i) for i in order[:count]], [shown(i) for i in order[::-1][:count]]


def _extremes(choices: Choices, path: Path) -> Block:
    charts.extremes(path, *extremes(choices))
    text = "Images for which the policy prefers the smallest and the largest timesteps"
    return Picture(path, text, f"{text}; above each its mean timestep.")
