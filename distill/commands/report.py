"""`distill report`: finished runs as a table, and as one page for a reader."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill import checkpoint
from distill.commands import policy_fit
from distill.config import RunConfig
from distill.errors import UserError, blame
from distill.matching.distiller import SMALL
from distill.policies import mixes, reward_layer
from distill.probing.head_room import Estimate, written
from distill.recipe import apply_override, build_config, flat, refuse_foreign, to_tree
from distill.reporting.choices import load_policy, load_state
from distill.reporting.page import Block, Code, Picture, Section, Table, Text, render
from distill.reporting.policy import policy
from distill.reporting.results import finding_of, heading, making, results
from distill.reporting.summary import compare, report
from distill.reporting.training import cost, losses
from distill.studies.comparison import FinishedRun, Group, group_runs, read_run
from distill.studies.records import ProbeFigures
from distill.tasks import TASKS
from rl_policy.table import ReplayTable

NO_PROBE = (
    "How much there was to gain is not known without a probe of the teacher, which records the "
    "reward of every timestep for every validation image. These make one, and report it:"
)

COMPARED = ("options", "size", "labelled")
"""Keys of the data section that a probe's rewards depend on, besides the teacher section."""


class ProbeRun(NamedTuple):
    """The content of a folder of `distill probe`."""

    folder: Path
    table: ReplayTable
    figures: dict[str, Any]
    """Content of probe.json."""


def write_report(
    runs: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    html: str | None = None,
    probe: str | None = None,
    out: str | None = None,
) -> str:
    """Report finished runs.

    Args:
        runs: Run folders; those that differ in the seed alone are taken together.
        overrides: `data.KEY=value`, where the data lie today, to ask the policy about images; and
            what a recipe says anyway, to trust code that it names (`recipe.refuse_foreign`).
        html: The page; of a single run by default RUN/report.html, of several by default none. Its
            pictures lie beside it in a folder of its name with `-pictures`.
        probe: A folder of `distill probe`, to say what the policy left to be gained.
        out: A JSON file for the scores.

    Returns:
        What to print.

    Raises:
        UserError: A folder is not a finished run, the runs cannot be compared, or an argument is
            wrong.
    """
    if not runs:
        raise UserError("report: name at least one run folder")
    groups = group_runs([read_run(run) for run in runs])
    if html is None and len(runs) == 1:
        html = str(Path(runs[0]) / "report.html")
    if html is None and (probe or overrides):
        raise UserError("--probe and data.KEY=value need a page: give --html PAGE.html")
    if html is not None and Path(html).suffix not in (".html", ".htm"):
        raise UserError(f"--html: {html} must be an HTML file, such as report.html")
    if out is not None:
        checkpoint.check_json("--out", Path(out))
    for target in () if html is None else (Path(html).parent, _pictures(Path(html))):
        checkpoint.check_folder("--html", target)
    configs = {} if html is None else _opened(groups, overrides)
    known = None if probe is None else _read_probe(probe, groups)
    if html is not None:
        _write_page(Path(html), groups, configs, known)
    text = compare(groups, out)
    if len(runs) == 1:
        text = report(groups[0].first.summary)
    return text if html is None else f"{text}\n\npage written to {html}"


def _opened(groups: Sequence[Group], overrides: Sequence[str]) -> dict[str, RunConfig]:
    """Each run's recipe with the overrides, by run folder."""
    runs = [run for group in groups for run in group.runs]
    known = {f"{key}={value}" for run in runs for key, value in flat(to_tree(run.config)).items()}
    of_data = [override for override in overrides if override.startswith("data.")]
    for override in overrides:
        if override not in of_data and override not in known:  # the known trust code of their own
            raise UserError(
                f"report: {override!r}: the recipe of a finished run is fixed; only data.KEY=value "
                "can be set, for data that moved"
            )
    configs = {}
    for run in runs:
        tree = to_tree(run.config)
        for override in of_data:
            apply_override(tree, override)
        config = build_config(RunConfig, tree, where=str(run.folder))
        refuse_foreign(config, overrides, run.folder)
        configs[str(run.folder)] = config
    return configs


def _read_probe(path: str, groups: Sequence[Group]) -> ProbeRun:
    """Read a probe's folder. Raises UserError if it is not one, or of other images than the
    runs."""
    folder, run = Path(path), groups[0].first
    with blame("--probe"):
        table = ReplayTable.read(folder / "table.safetensors")
        figures = checkpoint.read_json(folder / "probe.json", kind=ProbeFigures)
    if table.images < 4:
        raise UserError(f"--probe: {folder} has {table.images} images; it needs at least 4")
    mine = run.config.data.benchmark
    theirs = figures["settings"]["data.benchmark"]
    if theirs != mine:
        raise UserError(
            f"--probe: {folder} is for {theirs}, but {run.folder} was trained on {mine}"
        )
    return ProbeRun(folder, table, figures)


def _pictures(page: Path) -> Path:
    """The folder of a page's pictures."""
    return page.with_name(f"{page.stem}-pictures")


def _write_page(
    page: Path, groups: Sequence[Group], configs: dict[str, RunConfig], probe: ProbeRun | None
) -> None:
    """The pictures, then the page that holds them."""
    pictures = _pictures(page)
    with blame("--html"):
        pictures.mkdir(parents=True, exist_ok=True)
    sections = [
        results(groups, pictures),
        policy(groups, configs, pictures),
        _regret(groups, probe),
        losses(groups, pictures),
        cost(groups, pictures),
        making(groups),
    ]
    first = groups[0].first
    names = [run.config.name for group in groups for run in group.runs]
    more = [f"{len(names) - 3} more runs"] if len(names) > 4 else names[3:]
    title = ", ".join([*names[:3], *more])
    lead = (
        f"{first.config.student.model} taught by {first.config.teacher.path or 'an ensemble'}, on "
        f"{first.summary['benchmark']}"
    )
    checkpoint.write_text(page, render(title, lead, sections))


def _regret(groups: Sequence[Group], probe: ProbeRun | None) -> Section:
    """Section on the policies' rewards on a probe's table, with fixed choices and the oracle."""
    section = Section("regret", "What there was to gain")
    if probe is None and not TASKS[groups[0].first.summary["task"]].classes:
        section.blocks.append(Text("A probe of the teacher tells classes; here there are none."))
        return section
    if probe is None:
        run, layer = groups[0].first.folder, reward_layer(groups[0].first.config)
        out = f"{run}-probe"
        commands = [
            [*("distill", "probe", str(run / "config.yaml"), "--layers", layer), "--out", out],
            ["distill", "report", str(run), "--probe", out],
        ]
        section.blocks += [Text(NO_PROBE), Code("Commands", "\n".join(map(shlex.join, commands)))]
        return section
    picture = probe.folder / "probe.png"
    if picture.is_file():
        caption = "The probe's map of layers and timesteps, beside that of random weights."
        section.blocks.append(Picture(picture, caption, caption))
    for group in groups:
        section.blocks += heading(groups, group)
        runs = [run for run in group.runs if run.taught and run.summary["policy"]]
        if not runs:
            section.blocks.append(Text("No policy to look at."))
            continue
        try:
            blocks, finding = _earned(runs, probe)
        except UserError as error:
            section.blocks.append(Text(f"The policy cannot be tried on the table: {error}."))
            continue
        section.blocks += blocks
        if _probed_layer(probe) == reward_layer(group.first.config):
            section.findings.append(finding_of(groups, group, f"on the probe's table: {finding}"))
    return section


def _earned(runs: Sequence[FinishedRun], probe: ProbeRun) -> tuple[list[Block], str]:
    """The table of rewards of one recipe's policies, and what it comes to."""
    if mixes(runs[0].config):
        raise UserError(
            f"{runs[0].config.policy.name} mixes the features of all timesteps, but a table has "
            "the rewards of one at a time"
        )
    training, held_out = policy_fit.halves(_at_bins(probe.table, runs[0]))
    contexts = torch.from_numpy(held_out.contexts)
    figures = policy_fit.compare(training, held_out, [_distribution(r, contexts) for r in runs])
    mean, best = figures["mean"], figures["best_fixed"]
    oracle = figures["oracle"]
    ways = {
        "uniform": figures["uniform"],
        f"best fixed, t={best['timestep']}": best["reward"],
        "the policy": mean["reward"],
        "oracle: the best of each image": oracle,
    }
    digits = policy_fit.decimals(figures)
    rows = [
        [way, *(f"{x:.{digits}f}" for x in (reward, best["reward"] - reward, oracle - reward))]
        for way, reward in ways.items()
    ]
    caption = (
        f"Mean reward of {held_out.images} images of the probe; the other {training.images} chose "
        "the best fixed timestep. The oracle takes chance for a property of the image."
    )
    head = ["way to choose", "reward", "regret to the best fixed", "regret to the oracle"]
    blocks: list[Block] = [*_cautions(runs[0], probe), Table(caption, head, rows)]
    blocks += _honest(probe)
    return blocks, policy_fit.verdict(figures)


def _at_bins(table: ReplayTable, run: FinishedRun) -> ReplayTable:
    """The table at the policy's own timesteps, linear between the probe's."""
    assert run.taught is not None
    assert table.timesteps is not None
    bins = run.results[run.taught]["policy"]["timesteps"]
    rewards = [np.interp(bins, table.timesteps, row) for row in table.rewards]
    return ReplayTable(
        contexts=table.contexts,
        rewards=np.array(rewards, dtype=np.float32),
        timesteps=np.array(bins, dtype=np.int64),
    )


def _distribution(run: FinishedRun, contexts: Tensor) -> Tensor:
    """(M, K): by image where the policy sees what the table holds, otherwise its late mean."""
    if _sees_the_table(run):
        assert run.taught is not None
        state = load_state(run, run.taught)
        return load_policy(run, run.taught, state, contexts.shape[1]).probabilities(contexts)
    late = torch.tensor(run.summary["policy"]["probabilities"])
    return (late / late.sum()).expand(len(contexts), -1)


def _sees_the_table(run: FinishedRun) -> bool:
    """Whether what the policy saw of an image is what a probe's table holds of it."""
    policy = run.config.policy
    return policy.context == "image" and policy.image_size == SMALL


def _probed_layer(probe: ProbeRun) -> str:
    """The layer whose rewards the table holds."""
    layer: str = probe.figures["best"]["layer"]
    return layer


def _cautions(run: FinishedRun, probe: ProbeRun) -> list[Block]:
    """Sentences about differences between the probe and what the policy was rewarded for."""
    assert run.taught is not None
    count = len(run.results[run.taught]["policy"]["timesteps"])
    said = [
        f"Compared are the timesteps that the run had on offer ({count}); the probe's rewards are "
        "interpolated between its own."
    ]
    if not _sees_the_table(run):
        said.append(
            "The policy saw something else of an image than the table holds: what counts is its "
            "mean distribution over the last tenth of the steps it chose in."
        )
    rewards = run.config.policy.rewards
    if list(rewards) != ["teacher_task"]:
        said.append(
            f"The policy was rewarded for {' and '.join(rewards)}, the table has teacher_task "
            "alone: it is no yardstick for this policy."
        )
    layer, probed = reward_layer(run.config), _probed_layer(probe)
    if probed != layer:
        said.append(f"The table is of layer {probed}, the policy was rewarded for {layer}.")
    tree = to_tree(run.config)
    mine = {f"teacher.{name}": value for name, value in tree["teacher"].items()}
    mine |= {f"data.{name}": tree["data"][name] for name in COMPARED}
    settings = probe.figures["settings"]
    if settings["teacher (fingerprint)"] != run.results[run.taught]["teacher"]:
        said.append("The probe's teacher has other weights than the run's.")
    for key, theirs in settings.items():
        if key in mine and mine[key] != theirs:
            said.append(f"The probe has {key}={theirs}, the run {key}={mine[key]}.")
    return [Text(" ".join(said))]


def _honest(probe: ProbeRun) -> list[Block]:
    """The probe's own head-room, which separates an honest oracle from chance."""
    layer = _probed_layer(probe)
    room = probe.figures["head_room"].get(layer)
    if not room:
        return []
    names = {
        "uniform": "uniform",
        "fixed": f"best fixed, t={room['fixed_timestep']}",
        "learnt": "a linear rule on the 8x8 image",
        "honest": "honest oracle: chosen by another draw of the noise",
        "oracle": "oracle",
    }
    known = [name for name in names if name in room]
    figures = written(Estimate(*room[name]) for name in known)
    rows = [[names[name], figure] for name, figure in zip(known, figures, strict=True)]
    caption = f"The probe's own head-room at all its timesteps ({layer}, {room['images']} images)"
    return [Table(caption, ["way to choose", "reward (95% interval)"], rows)]
