"""Two processes on one CPU: one run, one student, one summary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from distill.cli import main
from distill.tracking import read_metrics

RANK = """
import sys
import torch
from distill import run
from distill.cli import main

score = run.score

def keep(student, examples, benchmark, config, accelerator):
    scores = score(student, examples, benchmark, config, accelerator)
    torch.save(student.state_dict(), f"scored{accelerator.process_index}.pt")
    return scores

train_arm = run.train_arm

def train(trainer, *rest):
    train_arm(trainer, *rest)
    parameters = dict(trainer.distiller.named_parameters())
    state = trainer.state()
    kept = {"parameters": {name: x.detach() for name, x in parameters.items()}}
    kept |= {part: state[part] for part in ("policy", "optimizer", "step")}
    torch.save(kept, f"trained{trainer.accelerator.process_index}.pt")

run.score, run.train_arm = keep, train
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_train_one_student(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    changes = ["train.arms=[distilled]", "train.evaluate_every=2", "train.lr=0.01"]
    ended = subprocess.run(
        [*launch, "rank.py", "train", str(recipe), *changes],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
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
