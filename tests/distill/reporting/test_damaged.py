"""A run whose files are damaged, or were edited wrongly, is one line with the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("metrics.jsonl", b"", None),
        (
            "metrics.jsonl",
            b'{"arm": "a", "st\n{"arm": "a", "step": 2}\n',
            "jsonl, line 1 is damaged",
        ),
        ("metrics.jsonl", b"\xff\xfe\n[1]\n", "metrics.jsonl, line 1 is damaged; restore"),
        (
            "metrics.jsonl",
            b'{"arm": "distilled", "step": 1, "loss/task": "q"}\n{"arm": "distilled", "step": 2}\n',
            "metrics.jsonl, line 1 is damaged; restore",
        ),
        (
            "metrics.jsonl",
            b'{"arm": "distilled", "step": 1, "probabilities": [0.5]}\n',
            "metrics.jsonl: the row of step 1 must have",
        ),
        (
            "metrics.jsonl",
            b'{"arm": "distilled", "step": 1, "probabilities": null}\n{"arm": "a", "step": 2}\n',
            "metrics.jsonl, line 1 is damaged; restore",
        ),
        (
            "metrics.jsonl",
            b'{"arm": "distilled", "step": []}\n{"arm": "a", "step": 2}\n',
            "metrics.jsonl, line 1 is damaged; restore",
        ),
        ("summary.json", b'{"metrics": {}}', "summary.json is damaged: name is missing"),
        ("summary.json", b'{"metrics"', "summary.json is missing or damaged: "),
        ("checkpoints/scratch/result.json", None, "scratch/result.json is missing or damaged: "),
        (
            "checkpoints/scratch/result.json",
            b"[]",
            "result.json is damaged: it does not contain a JSON obj",
        ),
    ],
)
def test_a_damaged_run_names_the_file(
    refuse: Any, finished_run: Path, tmp_path: Path, file: str, content: bytes | None, line: str
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
    if line:
        assert line in refuse("report", run)
    else:
        assert main(["report", str(run)]) == 0
        assert "has no row in the log" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("summary.json", {"task": "x"}, "task: input should be 'segmentation', "),
        ("summary.json", {"metrics": {}}, "metrics: dictionary should have at least 1 item"),
        ("summary.json", {"metrics": [1]}, "metrics: input should be a valid dictionary"),
        (
            "summary.json",
            {"metrics": {"scratch": {"miou": "high"}}},
            "metrics.scratch.miou must be a",
        ),
        (
            "summary.json",
            {"metrics": {"scratch": {"miou": 9}}},
            "metrics.scratch.miou must be a score",
        ),
        ("summary.json", {"policy": {}}, "policy.timesteps is missing"),
        ("summary.json", {"wall_seconds": "x"}, "wall_seconds: input should be a valid number"),
        ("checkpoints/scratch/result.json", {"scores": []}, "scores: input should be a valid dict"),
        ("checkpoints/scratch/result.json", {"hardware": 5}, "hardware: input should be a valid s"),
        (
            "checkpoints/distilled/result.json",
            {"noise_floor": {"mean": {"a": 1}}},
            "noise_floor: mean and bins must have the same pairs",
        ),
        (
            "checkpoints/distilled/result.json",
            {"noise_floor": {"mean": {}, "bins": {"a": [1], "b": [1, 2]}}},
            "noise_floor: the rows of bins must have equal lengths",
        ),
        (
            "checkpoints/distilled/result.json",
            {"noise_floor": {"mean": {}, "bins": {"a": [1]}}},
            "noise_floor.bins must have one number per entry of policy.timesteps",
        ),
        ("checkpoints/scratch/result.json", {"scores": {"iou": {"a": "x"}}}, "scores.iou.a: input"),
        ("checkpoints/scratch/result.json", {"parts": {"data": "x"}}, "parts.data: input should"),
        (
            "checkpoints/scratch/result.json",
            {"teacher_images": "x"},
            "teacher_images: input should be a valid int",
        ),
        ("checkpoints/scratch/result.json", {"flops": []}, "flops: input should be a valid dict"),
        ("summary.json", {"seed": "x"}, "seed: input should be a valid integer"),
        ("summary.json", {"noise_floor": 1}, "noise_floor: input should be "),
    ],
)
def test_a_run_file_that_was_edited_wrongly_is_named(
    refuse: Any, finished_run: Path, tmp_path: Path, file: str, change: Any, line: str
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | change))
    told = refuse("report", run)
    assert told.startswith(f"{run / file} is damaged: {line}")
