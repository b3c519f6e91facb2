"""Studies: a recipe, its variants (the arms) and seeds, and the runs that they come down to."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from distill.config import STRICT, Arm, RunConfig
from distill.errors import UserError, nearest
from distill.recipe import apply_override, build_config, flat, load_config, read_tree, to_tree
from distill.studies.comparison import NOT_THE_RECIPE, main_arm, scored_on
from distill.teacher_config import TeacherTrainConfig


def _file_name(name: str, mend: str = "") -> str:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(
            f"must have only letters, digits and . + - _, and not start with . + -{mend}"
        )
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
StudyName = Annotated[
    str, AfterValidator(partial(_file_name, mend="; set name=, or rename the file"))
]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ArmConfig:
    """One row of a study: a variant of its recipe."""

    name: FileName
    """Its name in results and run folders."""
    overrides: list[str] = Field(default_factory=list)
    """What it changes in the recipe: `section.key=value`, as on the command line; `{seed}` in it
    stands for the run's seed."""
    seeds: Seeds | None = None
    """Its own seeds; by default those of the study."""
    take: Arm | None = None
    """Which of its run's arms is scored; by default `distilled`, or else the first."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudyConfig:
    """A study file: `distill sweep`."""

    name: StudyName
    """Names its folder of runs and its results; by default the name of the file."""
    recipe: str
    """The recipe of all arms, relative to the study file."""
    seeds: Seeds
    """Seeds of every arm that has none of its own."""
    baselines: list[str] = Field(default_factory=list)
    """Arms that all others are compared with, in pairs of equal seeds."""
    overrides: list[str] = Field(default_factory=list)
    """What all arms change in the recipe; those of an arm and of the command line come later.
    `data.split_seed={seed}`: every seed draws labelled images of its own."""
    arms: Annotated[list[ArmConfig], Field(min_length=1)]
    """The rows."""


class Cell(NamedTuple):
    """One score of a study."""

    arm: str
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study that is checked: every recipe in it can be read, and all are comparable.

    Attributes:
        config: The study file.
        path: Where that is.
        overrides: Of the command line, `name=` included.
        cells: The run of every arm and seed, all of a seed together. Cells whose runs would be
            the same have one run.
        takes: Which of its run's arms each arm of the study is scored by.
        recipe: What all arms start from, overrides of the study and of the command line included:
            the value of every key that can change a score, but for seeds.
    """

    config: StudyConfig
    path: Path
    overrides: Sequence[str]
    cells: Mapping[Cell, RunConfig]
    takes: Mapping[str, Arm]
    recipe: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The folder of its runs."""
        return Path(next(iter(self.cells.values())).output)

    def choose(self, arms: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
        """The cells of some arms and seeds; of all where none are named.

        Raises:
            UserError: An arm or a seed is not in the study.
        """
        known = sorted({cell.seed for cell in self.cells})
        for arm in arms:
            if arm not in self.takes:
                raise UserError(
                    f"--only: {arm!r} is not an arm of study {self.path}; "
                    f"{nearest(arm, self.takes)}"
                )
        for seed in seeds:
            if seed not in known:
                raise UserError(
                    f"--seeds: {seed} is not a seed of study {self.path}; "
                    f"choose from {', '.join(map(str, known))}"
                )
        chosen = [
            cell
            for cell in self.cells
            if (not arms or cell.arm in arms) and (not seeds or cell.seed in seeds)
        ]
        if not chosen:
            raise UserError("--only and --seeds: none of these arms has one of these seeds")
        return chosen


def run_folder(run: RunConfig | TeacherTrainConfig) -> Path:
    """The folder of a run."""
    return Path(run.output) / run.name


def load_study(file: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and the recipes of all its arms.

    Args:
        file: The study.
        overrides: `section.key=value` for the recipe of every arm, after all others; `name=` is
            the study's own.

    Raises:
        UserError: A mistake in the file or in the recipe of an arm; the line names the study, the
            arm and the key.
    """
    path = Path(file)
    tree = read_tree(path, "study")
    common = []
    for override in overrides:
        if override.startswith("name="):
            apply_override(tree, override)
        else:
            common.append(override)
    study = build_config(StudyConfig, tree, where=f"study {path}")
    _check_names(study, path)
    seeds = {arm.name: arm.seeds or study.seeds for arm in study.arms}
    runs = {
        Cell(arm.name, seed): _run(study, arm, seed, path, common)
        for seed in dict.fromkeys(seed for own in seeds.values() for seed in own)
        for arm in study.arms
        if seed in seeds[arm.name]
    }
    _check_comparable(runs, path)
    takes = {
        arm.name: _taken(arm, runs[Cell(arm.name, seeds[arm.name][0])], path) for arm in study.arms
    }
    start = flat(to_tree(_run(study, ArmConfig(name="all"), 0, path, common)))
    return Study(
        config=study,
        path=path,
        overrides=overrides,
        cells=_shared(runs),
        takes=takes,
        recipe={key: value for key, value in start.items() if key not in NOT_THE_RECIPE},
    )


def _check_names(study: StudyConfig, path: Path) -> None:
    names = [arm.name for arm in study.arms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"study {path}: two arms are named {name!r}")
    for baseline in study.baselines:
        if baseline not in names:
            raise UserError(
                f"study {path}: baselines: {baseline!r} is not an arm; {nearest(baseline, names)}"
            )
    for seeds in (study.seeds, *(arm.seeds or [] for arm in study.arms)):
        for seed in seeds:
            if seeds.count(seed) > 1:
                raise UserError(f"study {path}: seeds: {seed} appears twice in {seeds}")


def _run(
    study: StudyConfig, arm: ArmConfig, seed: int, path: Path, common: Sequence[str]
) -> RunConfig:
    """The recipe of an arm's run."""
    where = f"study {path}, arm {arm.name}"
    for overrides, own in (
        (study.overrides, ("name", "seed")),
        (arm.overrides, ("name", "seed", "output")),
        (common, ("seed",)),
    ):
        for override in overrides:
            key = override.partition("=")[0]
            if key in own:
                raise UserError(f"{where}: override {override!r}: {key} is set by the study itself")
    recipe = os.path.normpath(path.parent / study.recipe)
    changes = [*study.overrides, *arm.overrides, *common]
    try:
        config = load_config(RunConfig, recipe, [x.replace("{seed}", str(seed)) for x in changes])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    output = str(Path(config.output) / study.name)
    return dataclasses.replace(config, output=output, name=f"{arm.name}-{seed}", seed=seed)


def _check_comparable(runs: Mapping[Cell, RunConfig], path: Path) -> None:
    """Refuse arms that would be scored on other images than the first, or in another way."""
    first = next(iter(runs))
    expected = scored_on(runs[first]) | {"data.root": runs[first].data.root}
    for cell, run in runs.items():
        for key, value in (scored_on(run) | {"data.root": run.data.root}).items():
            if value != expected[key]:
                raise UserError(
                    f"study {path}, arm {cell.arm}: {key} is {value!r}, but {expected[key]!r} in "
                    f"arm {first.arm}; all arms of a study must be scored alike"
                )


def _taken(arm: ArmConfig, recipe: RunConfig, path: Path) -> Arm:
    trained = recipe.train.arms
    if arm.take is not None and arm.take not in trained:
        raise UserError(
            f"study {path}, arm {arm.name}: take: {arm.take!r} is not among its train.arms, "
            f"{', '.join(trained)}"
        )
    return arm.take or main_arm(trained)


def _shared(runs: Mapping[Cell, RunConfig]) -> dict[Cell, RunConfig]:
    """Give cells whose runs would be equal one run."""
    same: dict[str, list[RunConfig]] = {}  # by what they train, under whatever name
    groups = {}
    for cell, run in runs.items():
        content = json.dumps(to_tree(dataclasses.replace(run, name="any")))
        groups[cell] = same.setdefault(content, [])
        same[content].append(run)
    # One that was begun keeps its folder, whatever arms the study has come to name before it.
    return {
        cell: next((run for run in group if run_folder(run).exists()), group[0])
        for cell, group in groups.items()
    }
