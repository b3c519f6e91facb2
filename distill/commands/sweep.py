"""`distill sweep`: all runs of a study, one after the other, and what they say together."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from distill import checkpoint
from distill.build import single_process
from distill.commands.dry_run import try_recipe
from distill.commands.train import train
from distill.config import RunConfig
from distill.errors import Interrupted, UserError, blame
from distill.recipe import first_difference, load_config
from distill.registry import own_error
from distill.stopping import stop_on_signals
from distill.studies.results import (
    Scores,
    check_teachers,
    finished,
    kept_scores,
    read_scores,
    write_results,
)
from distill.studies.study import Cell, Study, load_study, run_folder
from distill.training.fit import with_batch

GOES_ON = "rerun the command to continue"


def sweep(
    file: str,
    overrides: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    out: str | None = None,
    keep: str | None = None,
    dry_run: bool = False,
) -> str:
    """Train what a study has not trained yet, and write its results after every run.

    Before the first run, every recipe that is still to be trained is tried with two steps.

    Args:
        file: The study.
        overrides: `section.key=value` for all its arms; `name=` for the study.
        only: Train these arms alone.
        seeds: Train these seeds alone.
        out: Folder of the results, which are those of all finished runs of the study; by default
            that of its runs.
        keep: JSON of an earlier sweep of the study, whose scores are taken over where there is no
            run, and are not trained again.
        dry_run: Check everything and train nothing.

    Returns:
        What to print: the table of results, or of what would be trained.

    Raises:
        UserError: A mistake in the study or in a recipe; a run of an earlier version of the study;
            or, once all others are trained, runs that failed.
        Interrupted: The user stopped it; rerunning the command continues.
    """
    study = load_study(file, overrides)
    chosen = study.choose(only, seeds)
    single_process(next(iter(study.cells.values())).device, "sweep")
    option, folder = ("--out", Path(out)) if out else ("output", study.folder)
    checkpoint.check_folder(option, folder)
    _check_folders(study)
    kept = kept_scores(study, keep) if keep else {}
    scores = read_scores(study, kept)
    runs = _distinct(study, sorted(chosen, key=lambda cell: cell in scores))
    todo = [cell for cell in runs if cell not in scores]
    tried = _try_recipes(study, todo, scores)
    if dry_run:
        return _plan(study, chosen, runs, tried, scores)
    with blame(option):
        folder.mkdir(parents=True, exist_ok=True)
    failed = []
    with stop_on_signals() as stop:
        for index, cell in enumerate(todo):
            if stop:
                raise Interrupted(f"stopped before {study.cells[cell].name}; {GOES_ON}")
            number = len(runs) - len(todo) + index + 1
            left = _time_left(todo[index:], tried, scores)
            line = f"{study.config.name}: run {number} of {len(runs)}, {study.cells[cell].name}"
            print(f"{line}, ETA {left}", file=sys.stderr, flush=True)
            try:
                _train(study.cells[cell])
            except UserError as error:
                line = f"distill: {error}; continuing with the other runs"
                print(line, file=sys.stderr, flush=True)
                failed.append(str(error))
            else:
                scores = read_scores(study, kept)
                write_results(study, folder, scores)
    if failed:
        raise UserError(
            f"study {study.path}: {len(failed)} of {len(todo)} runs failed, the others finished: "
            + "; ".join(failed)
        )
    table = write_results(study, folder, scores)
    return f"{table}\n\nwritten to {folder / study.config.name}.{{json,md,png}}"


def _distinct(study: Study, cells: Iterable[Cell]) -> list[Cell]:
    """The first cell of every run."""
    runs: dict[Path, Cell] = {}
    for cell in cells:
        runs.setdefault(run_folder(study.cells[cell]), cell)
    return list(runs.values())


def _check_folders(study: Study) -> None:
    """Refuse a run that was begun with another recipe than the study gives it now, and a folder
    that holds something else."""
    for cell, config in study.cells.items():
        path = run_folder(config) / "config.yaml"
        if not path.exists():
            if path.parent.is_dir() and any(path.parent.iterdir()) and not finished(config):
                raise UserError(
                    f"study {study.path}, arm {cell.arm}: {path.parent} has no config.yaml and "
                    "cannot be continued; remove that folder"
                )
            continue
        saved = load_config(RunConfig, path)
        if not config.train.batch:  # the number that `auto` found
            config = with_batch(config, saved.train.batch)
        if changed := first_difference(saved, config):
            raise UserError(
                f"study {study.path}, arm {cell.arm}: {changed.key} is {changed.before!r} in "
                f"{path}, but {changed.now!r} in the study; remove that folder to train it again, "
                "or give the study another name="
            )


def _train(config: RunConfig) -> None:
    """Train a run, or go on with it."""
    folder = run_folder(config)
    try:
        train(config, resume=(folder / "config.yaml").exists())
    except Interrupted:
        raise Interrupted(f"stopped in {folder}, which is saved; {GOES_ON}") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except Exception as error:
        problem = own_error(error)
        if problem is None:  # a mistake of ours
            raise
        raise UserError(f"{folder}: {problem}") from error


def _try_recipes(study: Study, cells: Iterable[Cell], scores: Scores) -> dict[str, float]:
    """Two steps of the recipe of every arm among the cells: seconds of a run, by arm.

    Raises:
        UserError: A mistake in a recipe, or the teacher is not the one of the `scores`.
    """
    tried: dict[str, float] = {}
    teachers = {cell: score.teacher for cell, score in scores.items()}
    for cell in cells:
        if cell.arm not in tried:
            try:
                trials = try_recipe(study.cells[cell])
            except UserError as error:
                raise UserError(f"study {study.path}, arm {cell.arm}: {error}") from error
            tried[cell.arm] = sum(trial.seconds for trial in trials.values())
            teachers[cell] = trials["distilled"].teacher if "distilled" in trials else None
    check_teachers(study, teachers)
    return tried


def _seconds(tried: Mapping[str, float], scores: Scores) -> dict[str, float]:
    """Seconds of a run, by arm: what its other seeds took, or else what the trial said."""
    took: dict[str, list[float]] = {}
    for cell, score in scores.items():
        took.setdefault(cell.arm, []).append(score.run_seconds)
    return {**tried, **{arm: statistics.mean(seconds) for arm, seconds in took.items()}}


def _time_left(todo: Iterable[Cell], tried: Mapping[str, float], scores: Scores) -> str:
    seconds = _seconds(tried, scores)
    left: str = tqdm.format_interval(sum(seconds[cell.arm] for cell in todo))
    return left


def _plan(
    study: Study,
    chosen: Sequence[Cell],
    runs: Sequence[Cell],
    tried: Mapping[str, float],
    scores: Scores,
) -> str:
    """The table of a dry run: what would be trained, by arm."""
    seconds = _seconds(tried, scores)
    lines = [
        "| arm | scored | seeds | to train | seconds per run | overrides |",
        "|---|---|---|---|---|---|",
    ]
    for arm in study.config.arms:
        cells = [cell for cell in chosen if cell.arm == arm.name]
        own = [cell for cell in runs if cell.arm == arm.name]
        columns = [
            *(arm.name, study.takes[arm.name], " ".join(str(cell.seed) for cell in cells)),
            _to_train(study, cells, runs, scores),
            f"{seconds[arm.name]:.0f}" if own else "",
            ", ".join(f"`{override}`" for override in arm.overrides),
        ]
        if cells:
            lines.append(f"| {' | '.join(columns)} |")
    todo = [cell for cell in runs if cell not in scores]
    summary = f"{len(runs) - len(todo)} of {len(runs)} runs are done"
    if todo:
        left = _time_left(todo, tried, scores)
        summary += (
            f"; the other {len(todo)} would be trained below {study.folder}, in about {left} "
            "altogether, evaluation not counted"
        )
    return "\n".join([*lines, "", f"{summary}; nothing was trained"])


def _to_train(study: Study, cells: Sequence[Cell], runs: Sequence[Cell], scores: Scores) -> str:
    """The remaining runs of an arm in words: its own, those of other arms, or none."""
    left = [cell for cell in cells if cell not in scores]
    if not left:
        return "done"
    if own := [cell for cell in left if cell in runs]:
        return f"{len(own)} of {len(cells)} runs"
    folders = {run_folder(study.cells[cell]) for cell in left}
    others = dict.fromkeys(cell.arm for cell in runs if run_folder(study.cells[cell]) in folders)
    return f"in the runs of {' and '.join(others)}"
