"""`distill report --probe`: what the policy left of what a probe's table says is to be had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill.cli import main
from distill.commands import report
from distill.commands.report import write_report
from distill.errors import UserError
from distill.reporting.choices import load_policy, load_state
from distill.reporting.page import Table, Text
from distill.studies.comparison import Group, read_run
from rl_policy.table import ReplayTable
from tests.distill.reporting.conftest import Reader, taught

AT = [100, 400, 900]  # timesteps of the probe's table; the policy's are 0, 333, 666 and 999
MIX = np.array(  # from the table to the policy's timesteps, beyond the ends as at the ends
    [[1, 0, 0], [67 / 300, 233 / 300, 0], [0, 234 / 500, 266 / 500], [0, 0, 1]]
)


def write_probe(folder: Path, **figures: object) -> ReplayTable:
    """A probe's folder with a table of 8 images, each with contexts and rewards of its own."""
    random = np.random.default_rng(5)
    table = ReplayTable(
        contexts=4 * random.random((8, 192), dtype=np.float32),
        rewards=random.random((8, 3), dtype=np.float32) + np.array([0, 0, 0.3], np.float32),
        timesteps=np.array(AT),
    )
    (folder / "table.safetensors").write_bytes(table.to_bytes())
    settings = {"data.benchmark": "shapes", "teacher (fingerprint)": "of the run"}
    if isinstance(given := figures.get("settings", {}), dict):
        figures["settings"] = settings | given
    whole = {"best": {"layer": "mid_block"}, "head_room": {}} | figures
    (folder / "probe.json").write_text(json.dumps(whole))
    return table


def expected(table: ReplayTable, probabilities: NDArray[np.float64]) -> list[str]:
    """The rows that the report has, from (4, 4): the policy's choice for the held-out images."""
    order = np.random.default_rng(0).permutation(8)
    rewards = table.rewards.astype(np.float64) @ MIX.T  # (8, 4)
    best = int(rewards[order[:4]].mean(0).argmax())
    held_out = rewards[order[4:]]
    fixed, oracle = held_out[:, best].mean(), held_out.max(1).mean()
    earned = {
        "uniform": held_out.mean(),
        f"best fixed, t={[0, 333, 666, 999][best]}": fixed,
        "the policy": (probabilities * held_out).sum(1).mean(),
        "oracle: the best of each image": oracle,
    }
    return [f"{name} {x:.4f} {fixed - x:.4f} {oracle - x:.4f}" for name, x in earned.items()]


def test_regret_is_that_of_the_late_policy_on_the_probes_table(run: Path, tmp_path: Path) -> None:
    table = write_probe(tmp_path, settings={"teacher.input": "clean"})
    write_report([str(run)], html=str(tmp_path / "page.html"), probe=str(tmp_path))
    text = " ".join(Reader((tmp_path / "page.html").read_text()).text.split())
    late = np.array(json.loads((run / "summary.json").read_text())["policy"]["probabilities"])
    for row in expected(table, np.tile(late, (4, 1))):
        assert row in text
    assert "The table is of layer mid_block, the policy was rewarded for up_blocks.0." in text
    assert "The probe has teacher.input=clean, the run teacher.input=noised." in text
    assert "Compared are the timesteps that the run had on offer (4); " in text
    assert "no yardstick" not in text


def test_a_mixture_of_timesteps_is_not_judged_by_the_rewards_of_single_ones(
    tmp_path: Path,
) -> None:
    write_probe(tmp_path, best={"layer": "up_blocks.1"})
    runs = [taught(f"policy.name={name}") for name in ("a2c", "soft_mix")]
    groups = [Group(run.config.policy.name, (run,)) for run in runs]
    probe = report._read_probe(str(tmp_path), groups)
    section = report._regret(groups, probe)
    assert [block.text for block in section.blocks if isinstance(block, Text)][-1] == (
        "The policy cannot be tried on the table: soft_mix mixes the features of all timesteps, "
        "but a table has the rewards of one at a time."
    )
    assert sum(isinstance(block, Table) for block in section.blocks) == 1
    assert [about for about, _ in section.findings] == ["a2c"]


def test_of_a_table_of_another_layer_no_finding_is_made(tmp_path: Path) -> None:
    write_probe(tmp_path)  # of mid_block; the policy is rewarded for up_blocks.1
    groups = [Group("", (taught("policy.name=a2c"),))]
    section = report._regret(groups, report._read_probe(str(tmp_path), groups))
    assert sum(isinstance(block, Table) for block in section.blocks) == 1
    assert section.findings == []


def test_a_probe_with_other_settings_is_told_and_of_other_images_refused(tmp_path: Path) -> None:
    settings = {
        "teacher.image_size": None,
        "teacher.dtype": "auto",
        "data.labelled": 200,
        "data.root": "elsewhere",
        "data.options": {"size": 64, "train": 8000, "test": 1000},
    }
    settings |= {"teacher (fingerprint)": "of the probe"}
    run = taught("policy.context=image", teacher="of the run")
    write_probe(tmp_path, settings=settings | {"data.benchmark": "shapes"})
    group = Group("", (run,))
    (text,) = report._cautions(run, report._read_probe(str(tmp_path), [group]))
    assert isinstance(text, Text)
    assert [sentence for sentence in text.text.split(". ") if "The probe has" in sentence] == [
        "The probe has teacher.image_size=None, the run teacher.image_size=[32, 32]",
        "The probe has data.labelled=200, the run data.labelled=100.",
    ]
    assert "The probe's teacher has other weights than the run's." in text.text
    write_probe(tmp_path, settings=settings | {"data.benchmark": "camvid"})
    with pytest.raises(UserError) as raised:
        report._read_probe(str(tmp_path), [group])
    assert f"--probe: {tmp_path} is for camvid, but nowhere was trained on shapes" in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ({"settings": None}, "settings: input should be a valid dictionary"),
        ({"best": None}, "best: input should be "),
        ({"head_room": {"a": {"images": 4}}}, "head_room.a.fixed_timestep is missing"),
        (
            {"head_room": {"a": {"images": 4, "fixed_timestep": 1, "oracle": [1, 2]}}},
            "head_room.a.oracle",
        ),
    ],
)
def test_a_probes_figures_that_were_edited_wrongly_are_named(
    run: Path, tmp_path: Path, figures: dict[str, object], line: str
) -> None:
    write_probe(tmp_path, **figures)
    with pytest.raises(UserError) as raised:
        report._read_probe(str(tmp_path), [Group("", (taught("policy.name=a2c"),))])
    assert f"{tmp_path / 'probe.json'} is damaged: {line}" in str(raised.value)


def test_rewards_between_the_timesteps_of_the_table_are_interpolated(run: Path) -> None:
    table = ReplayTable(
        contexts=np.zeros((1, 2), np.float32),
        rewards=np.array([[1.0, 4.0, -1.0]], np.float32),
        timesteps=np.array(AT),
    )
    at = report._at_bins(table, read_run(run))
    assert at.timesteps is not None
    assert at.timesteps.tolist() == [0, 333, 666, 999]
    # 1 + 3 * 233 / 300 and 4 - 5 * 266 / 500
    assert at.rewards[0].tolist() == pytest.approx([1.0, 3.33, 1.34, -1.0])


def test_a_policy_that_sees_what_the_table_holds_is_asked_by_image(
    recipe: Path, tmp_path: Path
) -> None:
    words = [
        *("policy.context=image", "policy.rewards={label_free: 1}", "train.arms=[distilled]"),
        # Two pairs of the same maps, each with a name of its own.
        "pairs=[{student: layer3, teacher: up_blocks.0}, "
        "{student: layer3, teacher: up_blocks.0, loss: cosine}]",
        *("policy.options={learning_rate: 0.01}", "train.floor_every=1"),
    ]
    assert main(["train", str(recipe), *words]) == 0
    folder = recipe.parent / "runs" / "tiny"
    table = write_probe(tmp_path)
    write_report([str(folder)], html=str(tmp_path / "page.html"), probe=str(tmp_path))
    text = " ".join(Reader((tmp_path / "page.html").read_text()).text.split())
    run = read_run(folder)
    state = load_state(run, "distilled")
    contexts = torch.from_numpy(table.contexts[np.random.default_rng(0).permutation(8)[4:]])
    probabilities = load_policy(run, "distilled", state, 192).probabilities(contexts).double()
    assert (probabilities - probabilities[0]).abs().max() > 0.001
    for row in expected(table, probabilities.numpy()):
        assert row in text
    assert "rewarded for label_free, the table has teacher_task alone: it is no yardstick" in text
    floor = run.summary["noise_floor"]["mean"]
    assert list(floor) == ["layer3-up_blocks.0-mse", "layer3-up_blocks.0-cosine"]
    for name, mean in floor.items():
        loss = name.rpartition("-")[2]
        assert f"{name} up_blocks.0 1 {loss} {mean:.3f}" in text
