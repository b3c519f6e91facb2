"""`distill compare`: several subjects under one protocol, with what each costs beside its score."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from distill import checkpoint
from distill.build import single_process
from distill.commands.evaluate import evaluate_subject, subject_recipe
from distill.config import RunConfig
from distill.deployment.folder import read_card, student_folder
from distill.errors import UserError, blame
from distill.evaluation import pictures
from distill.evaluation.backbones import parse_subject
from distill.evaluation.footprint import Footprint, measure
from distill.evaluation.subjects import open_backbone, refuse_file
from distill.intervals import Interval
from distill.metrics import ERRORS, LOWER_IS_BETTER, TITLES, figure_text, in_points
from distill.provenance import hardware
from distill.recipe import build_config, refuse_foreign, to_tree
from distill.studies.comparison import NOT_THE_RECIPE

COSTS = ("parameters (M)", "GFLOP", "images/s", "MiB")


def compare(
    subjects: Sequence[str],
    overrides: Sequence[str],
    *,
    protocol: str | None,
    benchmark: str | None,
    out: str | None,
    batch: int,
    rounds: int,
) -> str:
    """Draw one table of several subjects.

    Args:
        subjects: Results of `distill evaluate --out` (FILE.json), and subjects, which are evaluated
            first. Those without a recipe take seed, images and scoring from the first that has one.
        overrides: Changes to the recipes of the subjects.
        protocol: Of the subjects, by default `own`; results bring theirs.
        benchmark: Of the subjects.
        out: A folder for table.md, table.csv, compare.json and speed.png.
        batch: Images per pass, where speed and memory are measured.
        rounds: How often all take their turn.

    Returns:
        The table to print.

    Raises:
        UserError: A mistake; other images are refused before anything is fitted.
    """
    if len(subjects) < 2:
        raise UserError(f"compare: needs at least two results or subjects, got {len(subjects)}")
    for option, number in (("--batch", batch), ("--rounds", rounds)):
        if number < 1:
            raise UserError(f"{option}: must be at least 1, got {number}")
    if out is not None:
        checkpoint.check_folder("--out", Path(out))
    given = {word: _read(Path(word), overrides) for word in subjects if word.endswith(".json")}
    if given.keys() == {*subjects}:
        _refuse_idle(overrides, protocol, benchmark)
    protocol = protocol or "own"
    how = (overrides, protocol, benchmark, _first_recipe(subjects, given))
    planned = [given[word] if word in given else _plan(word, *how) for word in subjects]
    _check(planned, subjects)
    results = [
        given[word] if word in given else evaluate_subject(word, *how).result for word in subjects
    ]
    _check(results, subjects)
    costs, machine = _measure(results, batch, rounds)
    rows = [_row(result, cost) for result, cost in zip(results, costs, strict=True)]
    method = f"{batch} images per pass, median and range of {rounds} rounds in turn"
    notes = [*_differences(results), f"{machine}, {method}"]
    table = _markdown(rows)
    if out is not None:
        _write(Path(out), results, costs, rows, table, notes)
    return "\n".join([_title(results), "", table, "", *notes])


def _refuse_idle(overrides: Sequence[str], protocol: str | None, benchmark: str | None) -> None:
    """Refuse options without effect on results; overrides that trust a recipe's code have one."""
    options = {"--protocol": protocol, "--benchmark": benchmark}
    idle = [f"{option} {given}" for option, given in options.items() if given is not None]
    code = ("benchmark", "name", "loss")
    idle += [o for o in overrides if not o.partition("=")[0].endswith(code)]
    if idle:
        raise UserError(
            f"compare: {idle[0]} has no effect on results that are already evaluated; leave it "
            "out, or name subjects instead"
        )


def _first_recipe(
    subjects: Sequence[str], given: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The recipe of the first subject that has one."""
    for word in subjects:
        if word in given:
            recipe: Mapping[str, Any] = given[word]["recipe"]
            return recipe
        subject = parse_subject(word)
        if subject.kind == "student":
            return read_card(student_folder(subject.path)).recipe
    return None


def _plan(
    text: str,
    overrides: Sequence[str],
    protocol: str,
    benchmark: str | None,
    beside: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The entries about the scored images that a subject's result will have."""
    subject, config = subject_recipe(text, overrides, protocol, benchmark, beside)
    refuse_file(subject)
    return {
        "benchmark": config.data.benchmark,
        "split": config.evaluate.split,
        "recipe": to_tree(config),
    }


class _Result(BaseModel):
    """The part of a result of `distill evaluate --out` that is read here."""

    subject: str
    protocol: str
    benchmark: str
    split: str
    metric: str
    size: tuple[int, int]
    figures: Annotated[dict[str, float], Field(min_length=1)]
    intervals: dict[str, Interval | None] = {}
    """None for a single choice of labels."""
    recipe: dict[str, Any]


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        result = checkpoint.read_json(path, kind=_Result)
    except UserError as error:
        raise UserError(f"{error}; name a result of `distill evaluate --out`") from error
    refuse_foreign(build_config(RunConfig, result["recipe"], where=str(path)), overrides, path)
    refuse_file(parse_subject(result["subject"]))
    return result


def _check(results: Sequence[Mapping[str, Any]], words: Sequence[str]) -> None:
    """Check that all results score the same images; the error says what differs."""
    for word, result in zip(words, results, strict=True):
        mine, first = _scored_on(result), _scored_on(results[0])
        for key in mine:
            if key in first and mine[key] != first[key]:
                raise UserError(
                    f"compare: {word} has {key} {mine[key]!r}, but {words[0]} has {first[key]!r}"
                )
        images = [one.get("images") for one in (result, results[0])]
        if None not in images and images[0] != images[1]:
            roots = [one["recipe"]["data"].get("root") for one in (result, results[0])]
            raise UserError(
                f"compare: {word} and {words[0]} were scored on different images "
                f"(data.root={roots[0]} and {roots[1]})"
            )


def _scored_on(result: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that decide which images are scored and how, and the metric once it is known."""
    of_recipe = {
        f"{section}.{key}": result["recipe"].get(section, {}).get(key)
        for section, key in (("data", "options"), ("evaluate", "images"))
    }
    keys = ("benchmark", "split", "metric")
    return {key: result[key] for key in keys if key in result} | of_recipe


def _differences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on settings that differ but should be equal."""
    settings = [_setting(result) for result in results]
    notes = []
    for key in dict.fromkeys(key for setting in settings for key in setting):
        given = [setting[key] for setting in settings if key in setting]
        values = list(dict.fromkeys(map(str, given)))
        if len(values) > 1:
            notes.append(f"note: {key} differs: {', '.join(values)}")
    return notes


def _setting(result: Mapping[str, Any]) -> dict[str, Any]:
    """The settings behind a score: what the subject saw, and every key that its protocol reads."""
    recipe, finetuned = result["recipe"], result["protocol"] == "finetune"
    sections = ("data", "evaluate", "train") if finetuned else ("data", "evaluate")
    keys = {
        f"{section}.{key}": value
        for section in sections
        for key, value in recipe.get(section, {}).items()
    }
    keys = {key: value for key, value in keys.items() if key not in NOT_THE_RECIPE}
    keys["seed"] = recipe.get("seed")
    if finetuned:
        keys["student.head"] = recipe.get("student", {}).get("head")
    if result["protocol"] != "own":
        keys.pop("data.unlabelled", None)  # of a student's own training
    # The results of these two keys are given instead.
    keys.pop("data.size", None)
    known = {"protocol": result["protocol"], "size": result["size"]}
    if result.get("labelled") is not None:
        keys.pop("data.labelled", None)
        known["labelled"] = result["labelled"]
    return known | keys


def _measure(
    results: Sequence[Mapping[str, Any]], batch: int, rounds: int
) -> tuple[list[Footprint], str]:
    """The cost of each backbone until the last map that was read, all measured side by side."""
    backbones, sizes = [], []
    for result in results:
        config = build_config(RunConfig, result["recipe"], where=f"recipe of {result['subject']}")
        accelerator = single_process(config.device, "compare")
        height, width = result["size"]
        subject = parse_subject(result["subject"])
        backbones.append(open_backbone(subject, config, (height, width), accelerator.device))
        sizes.append((height, width))
    costs = measure(backbones, sizes, accelerator.device, batch=batch, rounds=rounds)
    return costs, hardware(accelerator.device)


def _row(result: Mapping[str, Any], cost: Footprint) -> dict[str, str]:
    """The cells of a subject, by column."""
    intervals = result.get("intervals", {})
    cells = {"subject": result["subject"], "protocol": result["protocol"]}
    for name, value in result["figures"].items():
        spread = intervals.get(name)
        cells[name] = str(Interval(**spread)) if spread else figure_text(name, value)
    figures = (
        None if cost.parameters is None else cost.parameters / 1e6,
        None if cost.flops is None else cost.flops / 1e9,
        cost.images_per_second,
        cost.memory,
    )
    cells |= {name: _short(figure) for name, figure in zip(COSTS, figures, strict=True)}
    cells["images/s"] += f" ({_short(cost.slowest)} to {_short(cost.fastest)})"
    return cells


def _short(figure: float | None) -> str:
    """A figure with three digits; empty if it is unknown."""
    return "" if figure is None else f"{figure:.3g}" if figure < 100 else f"{figure:.0f}"


def _columns(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """All columns, costs last."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in COSTS] + list(COSTS)


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table, aligned so that it reads on a terminal."""
    columns = _columns(rows)
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    drawn = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([drawn[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *drawn[1:]])


def _title(results: Sequence[Mapping[str, Any]]) -> str:
    metric = results[0]["metric"]
    name = TITLES.get(metric, metric)
    title = name if metric in ERRORS else f"{name} {in_points(metric)}"
    return f"{title} on {results[0]['benchmark']} {results[0]['split']}"


def _write(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    costs: Sequence[Footprint],
    rows: Sequence[Mapping[str, str]],
    table: str,
    notes: Sequence[str],
) -> None:
    """The table as Markdown, CSV and JSON, and the plot."""
    text = "\n".join([_title(results), "", table, "", *notes, ""])
    with blame("--out"):
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(folder / "table.md", text)
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_text(folder / "table.csv", sheet.getvalue())
    figures = [
        {**result, "cost": cost._asdict()} for result, cost in zip(results, costs, strict=True)
    ]
    checkpoint.write_text(folder / "compare.json", json.dumps(figures, indent=2) + "\n")
    name = list(results[0]["figures"])[-1]
    points = [
        (result["subject"], cost.images_per_second, 100 * result["figures"][name])
        for result, cost in zip(results, costs, strict=True)
        if name in result["figures"]
    ]
    names, speeds, scores = zip(*points, strict=True)
    metric, at, labels = name.partition(" at ")
    pictures.against_speed(
        folder / "speed.png",
        names,
        speeds,
        scores,
        f"{TITLES.get(metric, metric)}{at}{labels}, points",
        falling=metric in LOWER_IS_BETTER,
    )
