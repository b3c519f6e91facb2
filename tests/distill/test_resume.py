"""A run that was stopped, killed or out of disk ends as one that was not, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill import checkpoint
from distill.cli import main
from distill.config import RunConfig
from distill.recipe import load_config
from distill.run_folder import read_metrics
from distill.training import loop
from distill.training.loop import checkpoint_path
from distill.training.trainer import Trainer

Refuse = Callable[..., str]
Interrupter = Callable[[str, int], None]


def copy_run(run: Path, folder: Path) -> Path:
    """A copy of a run that believes to have been made where it lies."""
    copied = folder / "runs" / run.name
    shutil.copytree(run, copied)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["output"] = str(folder / "runs")
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    return copied


def assert_same_end(
    run: Path, other: Path, arms: tuple[str, ...] = ("distilled", "scratch")
) -> None:
    """Both runs came to the same state to the bit, and to the same log and figures."""
    for arm in arms:
        states = [checkpoint.load(checkpoint_path(folder, arm)) for folder in (run, other)]
        assert states[0]["distiller"]
        for part in ("step", "distiller", "average", "optimizer", "policy"):
            torch.testing.assert_close(*(state[part] for state in states), rtol=0, atol=0)
    rows = [
        [
            {k: v for k, v in row.items() if k != "images_per_second" and "memory/" not in k}
            for row in read_metrics(folder)
        ]
        for folder in (run, other)
    ]
    assert rows[0] == rows[1]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, other)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert summaries[0]["policy"] == summaries[1]["policy"]


def test_the_resolved_recipe_trains_again_to_the_same_end(
    finished_run: Path, tmp_path: Path
) -> None:
    config = finished_run / "config.yaml"
    assert load_config(RunConfig, config).name == "tiny"
    assert main(["train", str(config), f"output={tmp_path}"]) == 0
    assert_same_end(finished_run, tmp_path / "tiny")


@pytest.mark.parametrize(("arm", "step"), [("distilled", 1), ("distilled", 3), ("scratch", 4)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    recipe: Path,
    finished_run: Path,
    interrupt: Interrupter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arm: str,
    step: int,
) -> None:
    interrupt(arm, step)
    assert main(["train", str(recipe)]) == 130
    monkeypatch.undo()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"distill: stopped at step {step} of 5 ({arm}); continue with --resume"
    run = recipe.parent / "runs" / "tiny"
    assert checkpoint.load(checkpoint_path(run, arm))["step"] == step
    assert not (run / "summary.json").exists()
    assert main(["train", str(recipe), "--resume"]) == 0
    assert_same_end(run, finished_run)


def test_the_times_of_the_parts_are_those_of_the_whole_run(
    recipe: Path, interrupt: Interrupter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "TIMED", 2)  # the second and the fourth step
    changes = ["train.arms=[distilled]", "train.finetune_steps=2"]
    interrupt("distilled", 3)
    assert main(["train", str(recipe), *changes]) == 130
    monkeypatch.undo()
    assert main(["train", str(recipe), *changes, "--resume"]) == 0
    result = recipe.parent / "runs" / "tiny" / "checkpoints" / "distilled" / "result.json"
    parts = json.loads(result.read_text())["parts"]
    assert {"teacher", "policy", "student"} <= parts.keys()  # none is asked after step 3
    assert sum(parts.values()) == pytest.approx(1)


@pytest.mark.parametrize("policy", ["ppo", "reinforce"])
def test_other_policies_resume_to_the_bit_too(
    recipe: Path, interrupt: Interrupter, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    changes = [f"policy.name={policy}", "train.arms=[distilled]", "train.precision=bf16"]
    if policy == "ppo":
        changes.append("policy.options={steps: 2}")  # an update falls on both sides of the stop
    assert main(["train", str(recipe), *changes, "name=whole"]) == 0
    interrupt("distilled", 3)
    assert main(["train", str(recipe), *changes]) == 130
    monkeypatch.undo()
    runs = recipe.parent / "runs"
    assert main(["train", str(runs / "tiny" / "config.yaml"), "--resume"]) == 0
    assert_same_end(runs / "tiny", runs / "whole", arms=("distilled",))


def test_an_interrupt_in_the_last_step_of_an_arm_stops_before_the_next_is_done(
    recipe: Path, finished_run: Path, interrupt: Interrupter, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt("distilled", 5)
    assert main(["train", str(recipe)]) == 130
    monkeypatch.undo()
    assert main(["train", str(recipe), "--resume"]) == 0
    assert_same_end(recipe.parent / "runs" / "tiny", finished_run)


def test_a_finished_arm_is_not_trained_again(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(finished_run, tmp_path)
    parts = [*run.rglob("last.pt"), *run.rglob("result.json"), *run.rglob("*.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in parts}
    trained: list[str] = []
    monkeypatch.setattr(Trainer, "train_step", lambda trainer, *_: trained.append(trainer.arm))
    assert main(["train", str(run / "config.yaml"), "--resume"]) == 0
    assert trained == []
    assert {path: path.stat().st_mtime_ns for path in parts} == before
    assert_same_end(run, finished_run)


KILLED = """
import os, signal
calls = 0

def mse(student, teacher):
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_IN_STEP", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return (student - teacher).square().mean(dim=(1, 2, 3))
"""


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(
    recipe: Path, tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killed_loss.py").write_text(KILLED)
    arguments = ["train", str(recipe), "pairs.0.loss=killed_loss:mse"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "KILL_IN_STEP": "4",
        "OMP_NUM_THREADS": "1",
    }
    killed = subprocess.run(
        [sys.executable, "-m", "distill.cli", *arguments], env=environment, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = recipe.parent / "runs" / "tiny"
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    assert checkpoint.load(checkpoint_path(run, "distilled"))["step"] == 2
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*arguments, "--resume"]) == 0
    assert_same_end(run, finished_run)


def test_resume_needs_a_run(recipe: Path, refuse: Refuse) -> None:
    assert "there is no run" in refuse("train", recipe, "--resume")


def test_resume_refuses_another_recipe(stopped_run: Path, refuse: Refuse) -> None:
    for change, words in (
        ("train.lr=0.1", "resume: train.lr was 0.001 in "),
        ("pairs.0.weight=2", "resume: pairs.0.weight was 1.0 in "),
        ("train.optimizer=sgd", "resume: train.optimizer was 'adamw' in "),
        ("student.model=test_vit", "resume: student.model was 'test_resnet' in "),
        ("train.arms=[distilled]", "resume: train.arms.1 was 'scratch' in "),
    ):
        line = refuse("train", stopped_run / "config.yaml", change, "--resume")
        assert line.startswith(words)
        assert "new run (student.init_from reuses weights)" in line


def test_resume_refuses_a_truncated_and_a_foreign_checkpoint(
    stopped_run: Path, refuse: Refuse
) -> None:
    path = checkpoint_path(stopped_run, "distilled")
    content = path.read_bytes()
    for broken, words in (
        (content[: len(content) // 2], "last.pt is damaged or not a checkpoint"),
        (b"not a checkpoint", "last.pt is damaged or not a checkpoint"),
    ):
        path.write_bytes(broken)
        assert words in refuse("train", stopped_run / "config.yaml", "--resume")
    torch.save({"state_dict": {}}, path)
    line = refuse("train", stopped_run / "config.yaml", "--resume")
    assert "last.pt was not written by distill" in line
    checkpoint.save(path, {"unet": {}})
    line = refuse("train", stopped_run / "config.yaml", "--resume")
    assert "last.pt is another kind of checkpoint: it has no 'config'" in line


@pytest.mark.parametrize("finished", [True, False])
def test_a_recipe_that_was_edited_in_the_run_folder_is_refused(
    finished_run: Path, tmp_path: Path, refuse: Refuse, finished: bool
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "runs" / "tiny"))
    if not finished:
        for path in [run / "summary.json", *run.glob("checkpoints/*/result.json")]:
            path.unlink()
    recipe = run / "config.yaml"
    tree = yaml.safe_load(recipe.read_text()) | {"output": str(run.parent)}
    tree["train"]["lr"] = 0.5
    recipe.write_text(yaml.safe_dump(tree))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = refuse("train", recipe, "--resume")
    assert line.startswith("resume: train.lr was 0.001 in ")
    assert "last.pt, but is 0.5 now; change it back" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_full_disk_keeps_the_old_checkpoint_and_the_run_goes_on(
    recipe: Path, finished_run: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, run = Trainer.train_step, recipe.parent / "runs" / "tiny"
    last = checkpoint_path(run, "distilled")

    def fill(trainer: Trainer, batch: Any) -> Any:
        if trainer.step == 3:
            last.with_name(f".{last.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
        return train_step(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", fill)
    line = refuse("train", recipe)
    assert line.startswith(f"disk full while saving {last}; the previous one is intact at {last}")
    assert checkpoint.load(last)["step"] == 2
    monkeypatch.undo()
    assert main(["train", str(recipe), "--resume"]) == 0
    assert_same_end(run, finished_run)


def test_what_a_killed_run_left_half_written_is_removed(stopped_run: Path) -> None:
    left = stopped_run / "checkpoints" / "distilled" / ".last.pt.123.tmp"
    left.write_bytes(b"half")
    folder = stopped_run / ".student-abcdefgh"
    (folder / "new").mkdir(parents=True)
    own = stopped_run / ".my-notes000"
    own.mkdir()
    assert main(["train", str(stopped_run / "config.yaml"), "--resume"]) == 0
    assert not left.exists()
    assert not folder.exists()
    assert own.exists()


def test_a_run_whose_images_were_moved_is_resumed(stopped_run: Path, refuse: Refuse) -> None:
    config = str(stopped_run / "config.yaml")
    line = refuse("train", config, "--resume", "--dry-run", "seed=3")
    assert "seed was 0" in line
    assert main(["train", config, "--resume", "data.root=/elsewhere"]) == 0  # of shapes no matter
    assert "root: /elsewhere" in (stopped_run / "config.yaml").read_text()
