"""A cache survives a full disk, a crash and a second process, and says when it is damaged."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import checkpoint
from distill.caching import cache as cache_module
from distill.caching.cache import FeatureCache, Plan, Stored
from distill.cli import main
from distill.config import RunConfig
from distill.run_folder import read_metrics
from distill.training.loop import checkpoint_path
from tests.distill.caching.conftest import build, losses

Load = Callable[..., RunConfig]
Refuse = Callable[..., str]
Interrupter = Callable[[str, int], None]


def test_a_full_disk_is_one_line_before_the_start(
    recipe: Path,
    cached: list[str],
    tmp_path: Path,
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    line = refuse("teacher", "extract", recipe, *cached)
    assert re.match(r"teacher.cache: 8 images .*, but .*/cache/distilled has only", line)
    assert list((tmp_path / "cache" / "distilled").iterdir()) == []
    monkeypatch.undo()
    assert main(["teacher", "extract", str(recipe), *cached]) == 0


def test_the_room_is_reserved_at_once(load: Load, cached: list[str], tmp_path: Path) -> None:
    trainer = build(load(*cached))
    status = (tmp_path / "cache" / "distilled" / "features.bin").stat()
    assert trainer.planned_cache is not None
    assert status.st_size == trainer.planned_cache.plan.rows * trainer.planned_cache.plan.row_bytes
    assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize("name", ["features.bin", "marks.bin", "manifest.json"])
def test_a_damaged_cache_is_one_line(
    recipe: Path, load: Load, cached: list[str], tmp_path: Path, refuse: Refuse, name: str
) -> None:
    build(load(*cached))
    os.truncate(tmp_path / "cache" / "distilled" / name, 7)
    line = refuse("train", recipe, *cached)
    assert "is damaged; delete it" in line or "is not a cache manifest" in line


@pytest.mark.parametrize("name", ["features.bin", "marks.bin"])
def test_a_cache_that_lacks_a_file_is_one_line(
    recipe: Path, load: Load, cached: list[str], tmp_path: Path, refuse: Refuse, name: str
) -> None:
    build(load(*cached))
    (tmp_path / "cache" / "distilled" / name).unlink()
    assert "is damaged; delete it" in refuse("train", recipe, *cached)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_one_changed_bit_of_a_feature_is_noticed(
    recipe: Path,
    load: Load,
    cached: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    share: float,
) -> None:
    planned = build(load(*cached)).planned_cache
    assert planned is not None
    assert main(["teacher", "extract", str(recipe), *cached]) == 0
    file = tmp_path / "cache" / "distilled" / "features.bin"
    rows = np.memmap(file, np.uint8, "r+").reshape(planned.plan.rows, -1)
    rows[:, int(share * planned.plan.row_bytes)] ^= 1
    rows.flush()
    assert main(["train", str(recipe), *cached]) == 2
    assert capsys.readouterr().err.endswith("/cache/distilled is damaged; delete it\n")
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


KILLED = """
import os, signal, sys
from distill.caching import cache
from distill.cli import main
from teachers.diffusion import DiffusionTeacher

cache.BLOCK = 8
features, calls = DiffusionTeacher.features, 0

def counted(*arguments):
    global calls
    calls += 1
    if calls == 4:  # the first was the trainer's, to see that the size fits
        os.kill(os.getpid(), signal.SIGKILL)
    return features(*arguments)

DiffusionTeacher.features = counted
main(sys.argv[1:])
"""


def test_a_process_killed_while_it_fills_leaves_a_cache_to_go_on_with(
    recipe: Path, cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = ["teacher", "extract", str(recipe), *cached]
    killed = subprocess.run(
        [sys.executable, tmp_path / "killed.py", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("16 of 32 rows were there, 16 were computed at ")
    assert main([*arguments, f"teacher.cache={tmp_path / 'whole'}"]) == 0
    for name in ("features.bin", "marks.bin"):
        one, other = (tmp_path / folder / "distilled" / name for folder in ("cache", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_no_row_is_marked_before_it_is_safe(
    load: Load, cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a mark must not stand beside features that never reached the disk."""
    monkeypatch.setattr(cache_module, "BLOCK", 10)
    trainer = build(load(*cached))
    cache = trainer.cache
    assert cache is not None
    marks = cache.folder / "marks.bin"
    synced: list[int] = []
    fsync = os.fsync

    def sync(file: int) -> None:
        synced.append(sum(map(bool, torch.from_file(str(marks), size=32, dtype=torch.int32))))
        fsync(file)

    monkeypatch.setattr(os, "fsync", sync)
    losses(trainer)
    assert synced[0] == 0
    assert sorted(synced) == synced
    on_disk = int(torch.from_file(str(marks), size=32, dtype=torch.int32).count_nonzero())
    assert 0 <= len(cache) - on_disk < 10


def test_two_processes_fill_one_folder(
    load: Load, cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = build(load(*cached)).cache, build(load(*cached)).cache
    assert isinstance(one, FeatureCache)
    assert isinstance(other, FeatureCache)
    images = torch.rand(4, 3, 32, 32)
    tags = torch.tensor([[example, 0, 9] for example in range(4)])
    bins = torch.zeros(4, dtype=torch.int64)
    first = one.features(images[:3], tags[:3], bins[:3])["up_blocks.0"]
    same = other.features(images[2:], tags[2:], bins[2:])["up_blocks.0"]
    assert torch.equal(first[2], same[0])
    one.flush()
    other.flush()
    assert (len(one), len(other)) == (3, 4)
    monkeypatch.setattr(other, "fill", None)
    assert torch.equal(other.features(images[:3], tags[:3], bins[:3])["up_blocks.0"], first)


def test_of_several_that_open_a_folder_at_once_one_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], cache_module._make

    def slowly(folder: Path, *args: Any) -> None:
        made.append(folder)
        time.sleep(0.2)
        make(folder, *args)

    monkeypatch.setattr(cache_module, "_make", slowly)

    def opened(_: int) -> int:
        cache = FeatureCache(
            tmp_path / "cache",
            None,  # type: ignore[arg-type]  # it is not asked
            Plan(1000, 2, 20, {"mid_block": Stored((8, 2, 2), torch.float32)}),
            examples=np.arange(1000),
            timesteps=torch.arange(20),
            origin={"of": "one thing"},
            chunk=4,
        )
        return len(cache._marks)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(opened, range(4))) == [40_000] * 4
    assert len(made) == 1


def test_an_interrupted_and_resumed_run_with_a_cache_equals_an_uninterrupted_one(
    recipe: Path,
    cached: list[str],
    tmp_path: Path,
    interrupt: Interrupter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = [*cached, f"teacher.cache={tmp_path / 'whole'}", "name=whole"]
    assert main(["train", str(recipe), *whole]) == 0
    interrupt("distilled", 7)
    assert main(["train", str(recipe), *cached]) == 130
    monkeypatch.undo()
    marks = torch.from_file(str(tmp_path / "cache/distilled/marks.bin"), size=32, dtype=torch.int32)
    assert marks.any()
    assert main(["train", str(recipe), *cached, "--resume"]) == 0
    runs = recipe.parent / "runs"
    states = [checkpoint.load(checkpoint_path(runs / n, "distilled")) for n in ("tiny", "whole")]
    for part in ("distiller", "average", "optimizer", "policy"):
        torch.testing.assert_close(*(state[part] for state in states), rtol=0, atol=0)
    tables = [
        [(row["loss/task"], row["loss/feature"]) for row in read_metrics(runs / name)]
        for name in ("tiny", "whole")
    ]
    assert tables[0] == tables[1]
