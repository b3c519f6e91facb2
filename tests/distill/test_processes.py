"""Two processes on one CPU: one run, one student, one summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill import checkpoint
from distill.cli import main
from distill.run_folder import read_metrics
from distill.training.loop import checkpoint_path
from rl_policy.scaling import RunningScale

RANK = """
import sys
import torch
from distill.commands import train as command
from distill.cli import main

score = command.score

def keep(student, examples, benchmark, config, accelerator):
    scores = score(student, examples, benchmark, config, accelerator)
    torch.save(student.state_dict(), f"scored{accelerator.process_index}.pt")
    return scores

train_arm = command.train_arm

def train(trainer, *rest):
    parts = train_arm(trainer, *rest)
    parameters = dict(trainer.distiller.named_parameters())
    state = trainer.state()
    kept = {"parameters": {name: x.detach() for name, x in parameters.items()}}
    kept |= {part: state[part] for part in ("policy", "optimizer", "step")}
    torch.save(kept, f"trained{trainer.accelerator.process_index}.pt")
    return parts

command.score, command.train_arm = keep, train
sys.exit(main(sys.argv[1:]))
"""


POLICIES = """
import sys
import torch
from distill.build import build_accelerator, build_training_set
from distill.config import RunConfig
from distill.recipe import load_config
from distill.training.loop import batches
from distill.training.trainer import Trainer
from rl_policy.scaling import RunningScale

ALL = "policy.rewards={teacher_task: 1, student_progress: 1, label_free: 1}"
CASES = {
    "a2c": [],
    "ppo": ["policy.options={steps: 2}"],
    "dqn": [],
    "reinforce": [],
    "thompson": [],
    "ucb": [],
    "soft_mix": ["policy.bins=3"],
    "a2c of all rewards": ["policy.name=a2c", ALL, "train.accumulate=2", "train.batch=8"],
}
accelerator, kept = build_accelerator("cpu"), {}
for name, changes in CASES.items():
    changes = [f"policy.name={name}", "train.steps=2", "train.floor_every=0", *changes]
    config = load_config(RunConfig, sys.argv[1], changes)
    trainer = Trainer(config, "distilled", build_training_set(config.data), accelerator)
    learned, learn = [], trainer.policy.learn
    trainer.policy.learn = lambda *given: learned.append(given) or learn(*given)
    for batch in batches(trainer):
        trainer.train_step(batch)
    state = trainer.state()
    kept[name] = {"policy": state["policy"], "rewards": state["rewards"], "learned": learned}
    kept[name]["parameters"] = [x.detach() for x in trainer.distiller.parameters()]
    # All running figures but those of batch norms, which are the first process's as torch has it
    buffers = dict(trainer.distiller.named_buffers())
    kept[name]["buffers"] = {of: x for of, x in buffers.items() if not of.startswith("student.")}
    if trainer.distiller.label_free is not None:
        buffers = dict(trainer.distiller.label_free.named_buffers())
        names = ("counts", "queue", "prototypes", "potentials")
        kept[name]["clusters"] = {of: buffers[of] for of in names}
    accelerator.free_memory()
scale, rank = RunningScale(2, shared=True), accelerator.process_index
for samples in torch.arange(24.0).square().view(3, 4, 2):
    scale.update(samples[rank::2])
kept["scale"] = scale.state_dict()
torch.save(kept, f"rank{rank}.pt")
"""


STOPPED = """
import os
import signal
import sys
import torch
from distill.cli import main
from distill.training.trainer import Trainer

train_step = Trainer.train_step

def stepping(trainer, batch):
    if trainer.accelerator.process_index == 1 and trainer.step == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return train_step(trainer, batch)

Trainer.train_step = stepping
code = main(sys.argv[1:])
sys.exit(0 if code == 130 and not torch.distributed.is_initialized() else 1)
"""


def launch(tmp_path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes, in `tmp_path`."""
    (tmp_path / "rank.py").write_text(script)
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*runner, "rank.py", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def test_two_processes_hold_one_policy_of_every_kind(recipe: Path, tmp_path: Path) -> None:
    launch(tmp_path, POLICIES, str(recipe))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    # A scale that each was shown half of is that of one process that was shown all
    alone = RunningScale(2)
    for samples in torch.arange(24.0).square().view(3, 4, 2):
        alone.update(samples)
    for scale in (first.pop("scale"), second.pop("scale")):
        torch.testing.assert_close(scale, alone.state_dict())
    assert len(first) == 8
    for name, kept in first.items():
        torch.testing.assert_close(kept, second[name], rtol=0, atol=0, msg=lambda m, n=name: n + m)
        # Two steps, each with the four labelled images of both processes, or with all twelve
        count = 12 if "clusters" in kept else 4
        assert [len(given[0]) for given in kept["learned"]] == [count, count]
    # Four parts of six images of both processes, each part counting for 0.99 of the next
    counts = first["a2c of all rewards"]["clusters"]["counts"]
    assert counts.sum().item() == pytest.approx(6 * (1 + 0.99 + 0.99**2 + 0.99**3))


def test_two_processes_train_one_student(recipe: Path, tmp_path: Path) -> None:
    changes = ["train.arms=[distilled]", "train.evaluate_every=2", "train.lr=0.01"]
    ended = launch(tmp_path, RANK, "train", str(recipe), *changes)
    assert ended.stdout.count("mIoU distilled") == 1
    assert ended.stderr.count("distilled 5/5") == 1
    trained, scored = (
        [torch.load(tmp_path / f"{what}{rank}.pt", weights_only=True) for rank in (0, 1)]
        for what in ("trained", "scored")
    )
    assert trained[0]["step"] == 5
    torch.testing.assert_close(*trained, rtol=0, atol=0)
    torch.testing.assert_close(*scored, rtol=0, atol=0)
    run = recipe.parent / "runs" / "tiny"
    steps = [row["step"] for row in read_metrics(run) if "loss/task" in row]
    assert steps == [1, 2, 3, 4, 5]
    # What both processes scored in halves is what one process finds.
    summary = json.loads((run / "summary.json").read_text())
    assert main(["evaluate", str(run), "--out", str(tmp_path / "one.json")]) == 0
    alone = json.loads((tmp_path / "one.json").read_text())
    assert alone["scores"] == summary["metrics"]["distilled"]


def test_all_processes_stop_where_one_is_asked_to(recipe: Path, tmp_path: Path) -> None:
    ended = launch(tmp_path, STOPPED, "train", str(recipe))
    assert ended.stderr.count("stopped at step 2 of 5 (distilled); continue with --resume") == 2
    last = checkpoint_path(recipe.parent / "runs" / "tiny", "distilled")
    assert checkpoint.load(last)["step"] == 2
