"""Results of a study so far, one row per arm: JSON, a Markdown table and a picture."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from distill import checkpoint
from distill.config import Arm, RunConfig
from distill.drawing import charts
from distill.errors import UserError, one_line
from distill.intervals import Interval
from distill.metrics import LOWER_IS_BETTER, TITLES, in_points
from distill.recipe import differs
from distill.studies.comparison import arm_label, estimate, gains, main_arm
from distill.studies.records import METRICS, is_score, read_result, read_summary
from distill.studies.study import Cell, Study, run_folder
from distill.training.loop import checkpoint_path


class Score(NamedTuple):
    """The result of one arm of a finished run, its seconds of training, and those of all arms.

    Of one that was kept, commits and hardware are those of all its arm's seeds together.
    """

    benchmark: str
    split: str
    metric: str
    value: float
    seconds: float
    images_per_second: float
    commits: tuple[str, ...]
    hardware: tuple[str, ...]
    run_seconds: float
    split_seed: int | None = None
    """Seed of its choice of labelled images; like the next two, None if unknown."""
    timestep: float | None = None
    """Mean timestep of the final policy."""
    teacher: str | None = None
    """Fingerprint of the trained teacher."""


SCORE = TypeAdapter(Score)
Scores = dict[Cell, Score]

COLUMNS = {
    "values": "value",
    "seconds": "seconds",
    "images_per_second": "images_per_second",
    "split_seeds": "split_seed",
    "mean_timesteps": "timestep",
    "teachers": "teacher",
}
"""Columns per seed in NAME.json, and the fields of `Score` that they hold."""


def finished(run: RunConfig) -> bool:
    """Whether a run has come to its end: its summary is what it writes last."""
    return (run_folder(run) / "summary.json").is_file()


def read_scores(study: Study, kept: Scores) -> Scores:
    """The scores of all finished runs, in the study's order; `kept` ones where there is no run.

    Raises:
        UserError: A file of a finished run is missing or damaged, or two were taught by different
            teachers of one path.
    """
    scores = {}
    for cell, run in study.cells.items():
        if finished(run):
            scores[cell] = _read_score(run, study.takes[cell.arm])
        elif cell in kept:
            scores[cell] = kept[cell]
    check_teachers(study, {cell: score.teacher for cell, score in scores.items()})
    return scores


def check_teachers(study: Study, teachers: Mapping[Cell, str | None]) -> None:
    """Refuse scores of one recipe whose teacher was another each time: its files have changed.

    Args:
        study: The study.
        teachers: Fingerprints by cell; those of None are not known.
    """
    known: dict[str, tuple[Cell, str]] = {}
    for cell, teacher in teachers.items():
        if teacher is None:
            continue
        config = study.cells[cell].teacher
        recipe = repr(dataclasses.replace(config, cache=None))
        other, before = known.setdefault(recipe, (cell, teacher))
        if teacher != before:
            runs = [f"arm {arm}, seed {seed}" for arm, seed in (other, cell)]
            raise UserError(
                f"study {study.path}: {runs[0]} used teacher {before[:12]}, but {runs[1]} used "
                f"{teacher[:12]}: {config.path or 'the paths of its members'} changed between "
                "them; change it back, or give the study another name= to train it all again"
            )


def kept_scores(study: Study, file: str) -> Scores:
    """The scores in NAME.json of an earlier sweep of the study, here or on another machine.

    Raises:
        UserError: It is not such a file, or its arms, the study or the recipe had other settings.
    """
    try:
        results = json.loads(Path(file).read_text(encoding="utf-8"))
        about: dict[str, Any] = {key: results[key] for key in ("benchmark", "split", "metric")}
        if about["metric"] not in METRICS.values():
            raise ValueError(f"metric is {about['metric']!r}")
        before = {"the study": results["overrides"]}
        recipe = results.get("recipe") or study.recipe  # older files tell of the overrides alone
        changed = [
            key
            for key in recipe | study.recipe
            if differs(key, recipe.get(key), study.recipe.get(key))
        ]
        scores = {}
        for arm, row in results["arms"].items():
            before[f"arm {arm}"] = [row["take"], *row["overrides"]]
            made = {key: tuple(row[key]) for key in ("commits", "hardware")}
            for index, seed in enumerate(row["seeds"]):
                # older files lack some
                fields = {of: row[name][index] for name, of in COLUMNS.items() if name in row}
                if not is_score(about["metric"], fields["value"]):
                    raise ValueError(
                        f"arm {arm}: {fields['value']!r} is not a valid {about['metric']}"
                    )
                fields |= about | made | {"run_seconds": fields["seconds"]}
                scores[Cell(arm, seed)] = SCORE.validate_python(fields)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"--keep: {file} is not the JSON of a sweep ({one_line(error)}); name the "
            f"{study.config.name}.json that a sweep wrote"
        ) from error
    now = {"the study": study.config.overrides}
    now |= {f"arm {arm.name}": [study.takes[arm.name], *arm.overrides] for arm in study.config.arms}
    for where, overrides in before.items():
        if where in now and now[where] != overrides:
            raise UserError(
                f"--keep: {file} has other settings: {where} had {overrides}, but has "
                f"{now[where]} in {study.path}"
            )
    if changed:
        key = changed[0]
        raise UserError(
            f"--keep: {file} has another recipe: {key} was {recipe.get(key)!r}, but is "
            f"{study.recipe.get(key)!r} now"
        )
    for cell, score in scores.items():
        drawn = study.cells[cell].data.split_seed if cell in study.cells else None
        if None not in (score.split_seed, drawn) and score.split_seed != drawn:
            raise UserError(
                f"--keep: {file} has other labelled images: data.split_seed of arm {cell.arm}, "
                f"seed {cell.seed} was {score.split_seed}, but is {drawn} now"
            )
    return scores


def _read_score(run: RunConfig, arm: Arm) -> Score:
    folder = run_folder(run)
    try:
        summary = read_summary(folder)
        result = read_result(checkpoint_path(folder, arm).with_name("result.json"))
        metric = METRICS[summary["task"]]
        if not is_score(metric, score := result["scores"][metric]):
            raise UserError(f"{arm}: {score!r} is not a valid {metric}")
        return Score(
            summary["benchmark"],
            summary["split"],
            metric,
            score,
            result["seconds"],
            result["images_per_second"],
            (result["commit"],),
            (result["hardware"],),
            summary["wall_seconds"],
            run.data.split_seed,
            _mean_timestep(summary["policy"])
            if result.get("policy")
            and summary["policy"]  # None where no step of the policy was logged
            and arm == main_arm(list(summary["metrics"]))
            else None,
            result.get("teacher") if arm == "distilled" else None,  # random ones are of the seed
        )
    except (UserError, KeyError) as error:
        raise UserError(
            f"{folder} is not a complete run ({one_line(error)}); remove it to train it again"
        ) from error


def _mean_timestep(policy: Mapping[str, Any]) -> float:
    """The mean timestep of the final policy, from summary.json."""
    return float(np.dot(policy["timesteps"], policy["probabilities"]))


def write_results(study: Study, folder: Path, scores: Scores) -> str:
    """Write NAME.json, NAME.md and NAME.png of a study with one score or more.

    Returns:
        The table, as it stands in NAME.md.
    """
    results = study_results(study, scores)
    table = markdown(results)
    name = study.config.name
    checkpoint.write_text(folder / f"{name}.json", json.dumps(results, indent=2) + "\n")
    checkpoint.write_text(folder / f"{name}.md", table + "\n")
    _draw(folder / f"{name}.png", results)
    return table


def _draw(path: Path, results: Mapping[str, Any]) -> None:
    """A panel of the scores, and one of the paired gains over each baseline."""
    metric, arms = results["metric"], results["arms"]
    title = TITLES[metric] + " (lower is better)" * (metric in LOWER_IS_BETTER)
    found = {f"{title}, {results['benchmark']} {results['split']}": arms}
    for baseline in results["baselines"]:
        key = f"gain_over_{baseline}"
        if over := {arm: row[key] for arm, row in arms.items() if key in row}:
            found[f"gain over {arm_label(baseline)}, paired"] = over
    charts.panels(
        path,
        {
            title: {arm_label(arm): [100 * x for x in row["values"]] for arm, row in rows.items()}
            for title, rows in found.items()
        },
        [arm_label(baseline) for baseline in results["baselines"]],
    )


def study_results(study: Study, scores: Scores) -> dict[str, Any]:
    """The results so far, one row per arm with a score. Scores are in [0, 1].

    A mean has a 95% interval (`low`, `high`), null where it is of one seed alone.
    """
    first = next(iter(scores.values()))
    runs = {run_folder(run): True for run in study.cells.values()}
    for cell, run in study.cells.items():
        runs[run_folder(run)] &= cell in scores
    rows = {arm: _row(study, arm, scores, first.metric) for arm in study.takes if _of(scores, arm)}
    return {
        "study": study.config.name,
        "command": shlex.join(["distill", "sweep", str(study.path), *study.overrides]),
        "benchmark": first.benchmark,
        "split": first.split,
        "metric": first.metric,
        "seeds": sorted({cell.seed for cell in scores}),
        "split_seeds": sorted({study.cells[cell].data.split_seed for cell in scores}),
        "baselines": study.config.baselines,
        "overrides": study.config.overrides,
        "recipe": study.recipe,
        "runs": {"finished": sum(runs.values()), "planned": len(runs)},
        "arms": rows,
        "commits": _distinct(score.commits for score in scores.values()),
        "hardware": _distinct(score.hardware for score in scores.values()),
    }


def _of(scores: Mapping[Cell, Score], arm: str) -> dict[int, Score]:
    """The scores of an arm by seed."""
    return {cell.seed: score for cell, score in scores.items() if cell.arm == arm}


def _row(study: Study, arm: str, scores: Mapping[Cell, Score], metric: str) -> dict[str, Any]:
    own = _of(scores, arm)
    values = {seed: score.value for seed, score in own.items()}
    row: dict[str, Any] = {
        "take": study.takes[arm],
        "overrides": next(one.overrides for one in study.config.arms if one.name == arm),
        "seeds": list(own),
        metric: estimate(values),
    }
    for baseline in study.config.baselines:
        base = {seed: score.value for seed, score in _of(scores, baseline).items()}
        paired = gains(metric, values, base)
        if baseline != arm and (found := estimate(paired)):
            row[f"gain_over_{baseline}"] = {
                "seeds": list(paired),
                "values": list(paired.values()),
                **found,
            }
    return row | {
        **{name: [getattr(score, of) for score in own.values()] for name, of in COLUMNS.items()},
        "commits": _distinct(score.commits for score in own.values()),
        "hardware": _distinct(score.hardware for score in own.values()),
    }


def _distinct(words: Iterable[Sequence[str]]) -> list[str]:
    return sorted({word for some in words for word in some})


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table, in points, with what is needed to repeat them."""
    metric, baselines, arms = results["metric"], results["baselines"], results["arms"]
    heads = [
        *("arm", "each seed", "mean"),
        *(f"gain over {arm_label(baseline)}" for baseline in baselines),
        *("mean t", "seconds", "images/s"),
    ]
    lines = [
        f"{TITLES[metric]} {in_points(metric)} on {results['benchmark']} {results['split']}: means "
        "over seeds (95% confidence intervals); gains are paired by seed",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    others = [arm for arm in arms if _made_otherwise(arms, arm, baselines)]
    for arm, row in arms.items():
        cells = [
            arm_label(arm) + " †" * (arm in others),
            ", ".join(f"{100 * value:.1f}" for value in row["values"]),
            _in_points(row[metric]),
            *(_in_points(row.get(f"gain_over_{baseline}")) for baseline in baselines),
            _mean_of_means(row.get("mean_timesteps", [])),
            f"{_mean(row['seconds']):.0f}",
            f"{_mean(row['images_per_second']):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if others:
        lines += ["", "† of another commit or machine than a baseline"]
    runs = results["runs"]
    unfinished = runs["planned"] - runs["finished"]
    lines += ["", f"* runs: {runs['planned']}" + (f", {unfinished} unfinished" * bool(unfinished))]
    if len(results["seeds"]) > 1:
        lines.append(f"* seeds: {_about_seeds(results)}")
    changed = {"all arms": results["overrides"]}
    changed |= {arm_label(arm): row["overrides"] for arm, row in arms.items()}
    lines += [
        f"* {name}: {', '.join(f'`{override}`' for override in overrides)}"
        for name, overrides in changed.items()
        if overrides
    ]
    lines.append(f"* command: `{results['command']}`")
    lines.append(f"* commit: {', '.join(results['commits'])}")
    lines.append(f"* hardware: {', '.join(results['hardware'])}")
    return "\n".join(lines)


def _made_otherwise(arms: Mapping[str, Any], arm: str, baselines: Sequence[str]) -> bool:
    """Whether an arm's gains may be those of another version of the program, or another CPU."""
    compared = [arms[base] for base in baselines if f"gain_over_{base}" in arms[arm]]
    return any(base[key] != arms[arm][key] for base in compared for key in ("commits", "hardware"))


def _about_seeds(results: Mapping[str, Any]) -> str:
    """Say what varies between seeds, which the intervals cover."""
    drawn = "weights, order of the data, noise and policy"
    if len(results["split_seeds"]) > 1:
        return f"{drawn}, and which images have labels: the intervals are over all of these"
    return (
        f"{drawn}; all have the same labelled images, so that the intervals leave out what other "
        "labels would change"
    )


def _in_points(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else str(Interval(found["mean"], found["low"], found["high"]))


def _mean_of_means(timesteps: Sequence[float | None]) -> str:
    known = [timestep for timestep in timesteps if timestep is not None]
    return f"{_mean(known):.0f}" if known else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
