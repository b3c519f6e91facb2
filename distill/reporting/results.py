"""Two sections of a report: the scores of the arms with intervals, and how they were made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.drawing import charts
from distill.intervals import Interval, interval
from distill.metrics import LOWER_IS_BETTER, TITLES, in_points
from distill.recipe import to_yaml
from distill.reporting.page import Block, Code, Finding, Heading, Picture, Section, Table, Text
from distill.studies.comparison import Group, arm_label, baselines, differences, gains

DRAWN = 200  # classes at most: browsers show no picture as tall as a thousand need
ONE_SEED = (
    "One run has one seed, so that there is no interval: what another seed would change is not "
    "known. Train the recipe with other seeds (seed=1 name=...) and report the runs together."
)


def picture_path(pictures: Path, groups: Sequence[Group], group: Group, name: str) -> Path:
    """The path of a group's picture, numbered if there are several groups."""
    return pictures / (name if len(groups) == 1 else f"{groups.index(group) + 1}-{name}")


def heading(groups: Sequence[Group], group: Group) -> list[Block]:
    """The recipe that is meant, if there are several."""
    return [Heading(group.label)] if len(groups) > 1 else []


def finding_of(groups: Sequence[Group], group: Group, sentence: str) -> Finding:
    """A sentence for the top of the page, about one of several recipes if there are several."""
    about = group.label if len(groups) > 1 else ""
    return Finding(about, f"{sentence[0].upper()}{sentence[1:]}.")


def results(groups: Sequence[Group], pictures: Path) -> Section:
    """The scores of every recipe, arm and class."""
    section = Section("results", "Results")
    title, first = TITLES[groups[0].metric], groups[0].first.summary
    unit = in_points(groups[0].metric)
    scored = f"{title} {unit} on {first['benchmark']} ({first['split']} split)"
    if len(groups) > 1:
        section.blocks.append(_recipes(groups))
        path = pictures / "recipes.png"
        charts.scores(path, {group.label: _points(group) for group in groups}, f"{title}, points")
        alt = f"{title} of each recipe and arm, as in the tables below"
        section.blocks.append(Picture(path, alt, f"{scored}: {_legend(groups)}"))
    for group in groups:
        section.blocks += heading(groups, group)
        section.blocks.append(_arms(groups, group, scored))
        if len(group.runs) == 1:
            section.blocks.append(Text(ONE_SEED))
        section.blocks += _classes(groups, group, pictures)
        predictions = group.first.folder / "predictions.png"
        if predictions.is_file():
            alt = "Held-out images beside their labels and the student's predictions"
            caption = f"What the {arm_label(group.first.arm)} student of seed {group.first.seed} "
            section.blocks.append(Picture(predictions, alt, f"{caption}predicts."))
        section.findings.extend(
            finding_of(groups, group, text) for text in _findings(groups, group)
        )
    return section


def _points(group: Group) -> dict[str, list[float]]:
    return {
        arm_label(arm): [100 * x for x in group.values(arm).values()]
        for arm in group.first.summary["metrics"]
    }


def _legend(groups: Sequence[Group]) -> str:
    if any(len(group.runs) > 1 for group in groups):
        return "means, 95% intervals over the seeds (Student's t), and pale each seed."
    return "one seed each."


def _recipes(groups: Sequence[Group]) -> Table:
    """The keys in which the recipes differ."""
    found = [differences(groups[0].first.config, group.first.config) for group in groups]
    keys = dict.fromkeys(key for other in found for key in other)
    first = {key: pair[0] for other in found for key, pair in other.items()}
    rows = [
        [key, *(str(other[key][1] if key in other else first[key]) for other in found)]
        for key in keys
    ]
    return Table("What the recipes differ in", ["key", *(group.label for group in groups)], rows)


def _arms(groups: Sequence[Group], group: Group, caption: str) -> Table:
    arms = list(group.first.summary["metrics"])
    bases = {name: base for name, base in baselines(group, groups).items() if arms != [name]}
    head = ["arm", "score" if len(group.runs) == 1 else "each seed"]
    head += ["mean (95% interval)"] if len(group.runs) > 1 else []
    head += [f"over {arm_label(base)}, paired" for base in bases]
    compared = group is not groups[0]
    head += ["over the first recipe, paired by seed"] if compared else []
    rows = []
    for arm in arms:
        values = group.values(arm)
        row = [arm_label(arm), ", ".join(f"{100 * value:.1f}" for value in values.values())]
        row += [str(interval(list(values.values())))] if len(group.runs) > 1 else []
        row += [
            "" if arm == name else _gain(group.metric, values, base) for name, base in bases.items()
        ]
        if compared:
            others = groups[0].first.summary["metrics"]
            row.append(_gain(group.metric, values, groups[0].values(arm)) if arm in others else "")
        rows.append(row)
    seeds = ", ".join(str(run.seed) for run in group.runs)
    return Table(f"{caption}, seed{'s'[: len(group.runs) - 1]} {seeds}", head, rows)


def _gain(metric: str, values: dict[int, float], base: dict[int, float]) -> str:
    """The paired gain in points, with its interval where there are several seeds."""
    paired = gains(metric, values, base)
    return str(interval(list(paired.values()))) if paired else "no seed in common"


def _classes(groups: Sequence[Group], group: Group, pictures: Path) -> list[Block]:
    """The score of each class and arm."""
    arms = list(group.first.results)
    names = list(group.first.by_class(arms[0]))
    measure = "IoU" if group.metric == "miou" else "accuracy"
    rows: dict[str, dict[str, list[float]]] = {}
    for name in names:
        rows[name] = {}
        for arm in arms:
            found = [run.by_class(arm).get(name) for run in group.runs]
            values = [100 * x for x in found if x is not None]
            if values:
                rows[name][arm_label(arm)] = values
    rows = {name: row for name, row in rows.items() if row}
    if not rows:
        return []
    table = [
        [name, *(_mean(row.get(arm_label(arm), [])) for arm in arms)] for name, row in rows.items()
    ]
    caption = f"{measure} by class, in points"
    blocks: list[Block] = [Table(caption, ["class", *map(arm_label, arms)], table)]
    if len(rows) <= DRAWN:
        path = picture_path(pictures, groups, group, "classes.png")
        charts.scores(path, rows, f"{measure}, points")
        legend = f"{caption}: {_legend([group])}"
        blocks.insert(0, Picture(path, f"{caption}, as in the table below", legend))
    return blocks


def _mean(points: list[float]) -> str:
    if len(points) > 1:
        return str(interval([x / 100 for x in points]))
    return f"{points[0]:.1f}" if points else "–"


def _findings(groups: Sequence[Group], group: Group) -> list[str]:
    """Sentences that compare the main arm with the others, and with the first recipe's."""
    main = group.first.arm

    def compared(other: str, base: Mapping[int, float]) -> list[str]:
        paired = gains(group.metric, group.values(main), base)
        return [_compared(group.metric, arm_label(main), other, paired)] if paired else []

    found: list[str] = []
    for name, base in baselines(group, groups).items():
        if name != main:
            found += compared(arm_label(name), base)
    if group is not groups[0] and main in groups[0].first.summary["metrics"]:
        found += compared(f"that of {groups[0].label}", groups[0].values(main))
    return found


def _compared(metric: str, mine: str, other: str, paired: Mapping[int, float]) -> str:
    found = interval(list(paired.values()))
    lower = metric in LOWER_IS_BETTER
    sides = ("better than", "worse than") if lower else ("above", "below")
    side = sides[found.mean < 0]
    if found.bounds is None:
        points = f"{100 * abs(found.mean):.1f} points"
        return f"{mine} is {points} {side} {other}; with one seed it is not known how sure that is"
    low, high = found.bounds
    if low <= 0 <= high:
        return f"{mine} against {other}: {found} points, which may be chance"
    size = found if found.mean > 0 else Interval(-found.mean, -high, -low)
    return f"{mine} is {side} {other} by {size} points, paired over {len(paired)} seeds"


def making(groups: Sequence[Group]) -> Section:
    """The source of the figures: runs, commit, hardware, recipe, command."""
    rows = [
        [
            str(run.folder),
            str(run.seed),
            str(run.summary["date"]),
            str(run.summary["commit"])[:12],
            str(run.summary["hardware"]),
        ]
        for group in groups
        for run in group.runs
    ]
    section = Section("making", "How it was made")
    section.blocks.append(Table("Runs", ["folder", "seed", "date", "commit", "hardware"], rows))
    for group in groups:
        run = group.first
        recipe, name = run.folder / "config.yaml", f"name={run.config.name}-again"
        section.blocks += [
            *heading(groups, group),
            Text("The resolved recipe, with every default. This makes the run again:"),
            Code("Command", shlex.join(["distill", "train", str(recipe), name])),
            Code("Resolved recipe", to_yaml(run.config)),
        ]
    return section
