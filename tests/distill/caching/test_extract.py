"""`distill teacher extract`: the cache of a recipe, filled before it is trained."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from distill.caching.cache import FeatureCache
from distill.cli import main
from teachers.diffusion import DiffusionTeacher

Refuse = Callable[..., str]
FLIPPED = ["data.augment=flip", "train.arms=[distilled]"]


@pytest.fixture
def cached(tmp_path: Path) -> list[str]:
    """Overrides of the tiny recipe: 12 or more of 16 images x 2 flips x 4 bins."""
    return [*FLIPPED, f"teacher.cache={tmp_path / 'cache'}"]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a teacher sees from now on."""
    features, calls = DiffusionTeacher.features, []

    def count(teacher, images, *rest):  # type: ignore[no-untyped-def]
        calls.append(len(images))
        return features(teacher, images, *rest)

    monkeypatch.setattr(DiffusionTeacher, "features", count)
    return calls


def test_training_asks_the_teacher_nothing_after_extract(
    recipe: Path,
    cached: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["teacher", "extract", str(recipe), *cached]) == 0
    printed = capsys.readouterr()
    rows = printed.out.split()[2]
    assert printed.out.startswith(f"0 of {rows} rows were there, {rows} were computed at ")
    assert "x 2 flips x 4 bins x 1 layers, float32: " in printed.err
    calls = counted(monkeypatch)
    assert main(["train", str(recipe), *cached]) == 0
    assert calls == [1]  # to see that the size fits
    assert main(["teacher", "extract", str(recipe), *cached]) == 0
    assert f"{rows} of {rows} rows were there, 0 were computed" in capsys.readouterr().out
    assert calls == [1, 1]


def test_a_run_after_extract_equals_one_that_fills_the_cache_itself(
    recipe: Path, cached: list[str], tmp_path: Path
) -> None:
    assert main(["teacher", "extract", str(recipe), *cached]) == 0
    assert main(["train", str(recipe), *cached, "name=before"]) == 0
    own = f"teacher.cache={tmp_path / 'own'}"
    assert main(["train", str(recipe), *cached, own, "name=own"]) == 0
    from distill.run_folder import read_metrics

    rows = [
        [(row["loss/task"], row["loss/feature"]) for row in read_metrics(tmp_path / "runs" / name)]
        for name in ("before", "own")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 5


def test_ctrl_c_saves_and_a_second_call_goes_on(
    recipe: Path,
    cached: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill, fills = FeatureCache.fill, []

    def interrupted(cache: FeatureCache, *arguments: object) -> None:
        fills.append(1)
        if len(fills) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        fill(cache, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureCache, "fill", interrupted)
    assert main(["teacher", "extract", str(recipe), *cached]) == 130
    monkeypatch.undo()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("distill: stopped with 24 of ")
    assert last.endswith(" rows; rerun the command for the rest")
    assert main(["teacher", "extract", str(recipe), *cached]) == 0
    assert capsys.readouterr().out.startswith("24 of ")


def test_extract_without_a_cache_says_what_to_name(recipe: Path, refuse: Refuse) -> None:
    line = refuse("teacher", "extract", recipe, *FLIPPED)
    assert line == "teacher.cache: name the folder to fill, such as teacher.cache=caches/mine"


def test_memory_does_not_grow_with_what_is_extracted(
    recipe: Path, cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1200 rows of 64 KB are 79 MB."""
    flush, resident = FeatureCache.flush, []

    def watched(cache: FeatureCache) -> None:
        flush(cache)
        resident.append(psutil.Process().memory_info().rss)

    monkeypatch.setattr(FeatureCache, "flush", watched)
    many = ["data.options.train=300", "data.unlabelled=null", "policy.bins=2"]
    assert main(["teacher", "extract", str(recipe), *cached, *many]) == 0
    assert len(resident) > 4
    assert resident[-1] - resident[0] < 8e6
