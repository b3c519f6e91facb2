"""Finished runs side by side: groups of seeds of one recipe, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from distill.config import RunConfig
from distill.errors import UserError
from distill.intervals import interval
from distill.metrics import more_is_better
from distill.recipe import flat, load_config, to_tree
from distill.run_folder import read_metrics
from distill.studies.records import METRICS, read_result, read_summary
from distill.training.loop import checkpoint_path

Name = TypeVar("Name", bound=str)

# What two runs of one recipe may differ in: the seeds, names and places, and how fast it went.
NOT_THE_RECIPE = frozenset(
    (
        *("name", "output", "seed", "data.split_seed", "device"),
        *("data.root", "data.workers", "data.memory_gb"),
        *("teacher.compile", "student.compile", "teacher.cache_gb", "evaluate.batch"),
        *("train.log_every", "train.checkpoint_every", "train.evaluate_every"),
    )
)

NO_PART = {
    "scratch": ("train.arms", "train.feature_weight", "teacher.", "pairs.", "policy."),
    "random_teacher": ("train.arms", "policy."),
}
"""Keys without effect on the controls: runs that differ only in these share their controls. The
policy also picks what the random teacher shows, but any choice would do there."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """The content of a finished run's folder."""

    folder: Path
    config: RunConfig
    summary: dict[str, Any]
    """Content of summary.json."""
    results: dict[str, dict[str, Any]]
    """Content of checkpoints/ARM/result.json, by arm."""
    rows: list[dict[str, Any]]
    """Rows of metrics.jsonl."""

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def arm(self) -> str:
        """See `main_arm`."""
        return main_arm(list(self.results))

    @property
    def taught(self) -> str | None:
        """See `taught_arm`."""
        return taught_arm(self.results)

    def by_class(self, arm: str) -> dict[str, float | None]:
        """IoU or accuracy by class name; None for a class that does not occur."""
        scores = self.results[arm]["scores"]
        found: dict[str, float | None] = scores.get("iou") or scores.get("accuracy") or {}
        return found


def main_arm(arms: Sequence[Name]) -> Name:
    """The arm that a run is about, whose student is exported: `distilled`, or else its first."""
    return next((arm for arm in arms if arm == "distilled"), arms[0])


def taught_arm(results: Mapping[Name, Mapping[str, Any]]) -> Name | None:
    """The arm whose policy is looked at: the main one, or else the first that has a teacher.

    Args:
        results: Of each arm, in the run's order.
    """
    arms = [arm for arm, result in results.items() if result.get("policy")]
    return main_arm(arms) if arms else None


def arm_label(arm: str) -> str:
    """An arm's name in a sentence."""
    return arm.replace("_", " ")


def scored_on(config: RunConfig) -> dict[str, Any]:
    """On which images a run is scored, and how they are looked at, by key: equal where two scores
    compare. Where the data lie plays no part."""
    data, scoring = config.data, config.evaluate
    return {
        "data.benchmark": data.benchmark,
        "data.options": data.options,
        "evaluate.split": scoring.split,
        "evaluate.images": scoring.images,
        "evaluate.scales": scoring.scales,
        "evaluate.flip": scoring.flip,
        "evaluate.window": scoring.window,
    }


class Group(NamedTuple):
    """Runs of one recipe with different seeds."""

    label: str
    """The keys that set its recipe apart from the other groups', or its first run's name or
    folder."""
    runs: tuple[FinishedRun, ...]

    @property
    def first(self) -> FinishedRun:
        return self.runs[0]

    @property
    def metric(self) -> str:
        """Key of the main score."""
        return METRICS[self.first.summary["task"]]

    def values(self, arm: str) -> dict[int, float]:
        """The main score of an arm, by seed."""
        return {run.seed: run.summary["metrics"][arm][self.metric] for run in self.runs}


def read_run(folder: str | Path) -> FinishedRun:
    """Read a run folder. Raises UserError if it is not one, or not finished."""
    run = Path(folder)
    if not (run / "summary.json").is_file():
        raise UserError(f"{run} has no summary.json; name a finished run folder")
    summary = read_summary(run)
    results = {
        arm: read_result(checkpoint_path(run, arm).with_name("result.json"))
        for arm in summary["metrics"]
    }
    return FinishedRun(
        folder=run,
        config=load_config(RunConfig, run / "config.yaml"),
        summary=summary,
        results=results,
        rows=read_metrics(run),
    )


def group_runs(runs: Sequence[FinishedRun]) -> list[Group]:
    """Gather the runs that differ in the seed alone, in the order given.

    Raises:
        UserError: They cannot be compared: other images are scored or have labels, or a recipe has
            a seed twice.
    """
    for run in runs:
        _check_equal(run, runs[0], scored_on)
        twin = next(other for other in runs if other.seed == run.seed)
        _check_equal(run, twin, lambda config: {"data.split_seed": config.data.split_seed})
        if not _same_images(run, runs[0], "scored"):
            roots = run.config.data.root, runs[0].config.data.root
            raise UserError(
                f"report: {run.folder} and {runs[0].folder} cannot be compared: they were scored "
                f"on different images (data.root={roots[0]} and {roots[1]})"
            )
    members: list[list[FinishedRun]] = []
    for run in runs:
        for group in members:
            alike = _same_images(group[0], run, "train") and _same_teacher(group[0], run)
            if alike and not differences(group[0].config, run.config):
                group.append(run)
                break
        else:
            members.append([run])
    for group in members:
        if len({run.seed for run in group}) < len(group):
            raise UserError(
                "report: two runs have the same recipe and seed; name runs that differ in either "
                f"({', '.join(str(run.folder) for run in group)})"
            )
    return [
        Group(label, tuple(group)) for label, group in zip(_labels(members), members, strict=True)
    ]


def _same_images(run: FinishedRun, other: FinishedRun, what: Literal["train", "scored"]) -> bool:
    """Whether both runs used images of the same names."""
    return bool(run.results[run.arm]["data"][what] == other.results[other.arm]["data"][what])


def _same_teacher(run: FinishedRun, other: FinishedRun) -> bool:
    """Whether both runs of one recipe used the same trained teacher, whose file may have changed;
    true where a run has no arm `distilled`."""
    teachers = [x.results.get("distilled", {}).get("teacher") for x in (run, other)]
    return None in teachers or teachers[0] == teachers[1]


def _check_equal(
    run: FinishedRun, other: FinishedRun, of: Callable[[RunConfig], Mapping[str, Any]]
) -> None:
    theirs = of(other.config)
    for key, value in of(run.config).items():
        if value != theirs[key]:
            raise UserError(
                f"report: {run.folder} and {other.folder} cannot be compared: {key} is {value} and "
                f"{theirs[key]}"
            )


def differences(one: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The differing values of two recipes by key; None where one lacks it."""
    before, now = flat(to_tree(one)), flat(to_tree(other))
    return {
        key: (before.get(key), now.get(key))
        for key in before | now
        if key not in NOT_THE_RECIPE
        and before.get(key) != now.get(key)
        # Where the features are kept plays no part, but that their noise is fixed does.
        and not (key == "teacher.cache" and before[key] and now[key])
    }


def _labels(groups: Sequence[Sequence[FinishedRun]]) -> list[str]:
    """Short names of groups, the first that are unique: the one or two keys that differ, the names
    of their first runs, their folders."""
    configs = [group[0].config for group in groups]
    keys = dict.fromkeys(key for config in configs for key in differences(configs[0], config))
    if 1 <= len(keys) <= 2:
        trees = [flat(to_tree(config)) for config in configs]
        labels = [", ".join(f"{key}={tree.get(key)}" for key in keys) for tree in trees]
        if len({*labels}) == len(labels):
            return labels
    names = [config.name for config in configs]
    return names if len({*names}) == len(names) else [str(group[0].folder) for group in groups]


def gains(metric: str, values: Mapping[int, float], base: Mapping[int, float]) -> dict[int, float]:
    """By how much scores are better than `base`, of the seeds that both have, by seed."""
    return {
        seed: more_is_better(metric, values[seed]) - more_is_better(metric, base[seed])
        for seed in values
        if seed in base
    }


def estimate(values: Mapping[int, float]) -> dict[str, float | None] | None:
    """Mean and 95% interval of what the seeds gave, for JSON: `low` and `high` are None of a single
    one, and all is None of none."""
    return interval(list(values.values()))._asdict() if values else None


def baselines(group: Group, groups: Sequence[Group]) -> dict[str, dict[int, float]]:
    """The scores of the controls, by seed: the group's own, or those of the one that has them and
    differs in nothing that plays a part in them."""
    found = {}
    for base, apart in NO_PART.items():
        having = [
            other
            for other in groups
            if base in other.first.summary["metrics"]
            and _same_images(group.first, other.first, "train")
            and all(
                key.startswith(apart) for key in differences(group.first.config, other.first.config)
            )
        ]
        if base in group.first.summary["metrics"]:
            having = [group]
        if len(having) == 1:
            found[base] = having[0].values(base)
    return found


def figures(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """A group's scores as plain numbers, for JSON; `groups` may have its baseline."""
    rows: dict[str, Any] = {}
    scratch = baselines(group, groups).get("scratch")
    for arm in group.first.summary["metrics"]:
        values = group.values(arm)
        rows[arm] = {"values": list(values.values()), group.metric: estimate(values)}
        if arm != "scratch" and scratch:
            paired = gains(group.metric, values, scratch)
            rows[arm]["gain_over_scratch"] = estimate(paired)
    return {
        "benchmark": group.first.summary["benchmark"],
        "split": group.first.summary["split"],
        "metric": group.metric,
        "seeds": [run.seed for run in group.runs],
        "arms": rows,
        "commits": sorted({run.summary["commit"] for run in group.runs}),
        "hardware": sorted({run.summary["hardware"] for run in group.runs}),
    }


def compare_groups(groups: Sequence[Group]) -> dict[str, Any]:
    """Several groups as plain numbers, each arm with its paired difference to the first group's."""
    described = []
    for group in groups:
        row: dict[str, Any] = {
            "label": group.label,
            "runs": [str(run.folder) for run in group.runs],
            **figures(group, groups),
        }
        if group is not groups[0]:
            for arm, arm_row in row["arms"].items():
                if arm in groups[0].first.summary["metrics"]:
                    paired = gains(groups[0].metric, group.values(arm), groups[0].values(arm))
                    arm_row["difference_to_first"] = estimate(paired)
        described.append(row)
    return {"groups": described}
