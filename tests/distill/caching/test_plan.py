"""What a cache takes is told before it is filled, and what would fit where that is too much."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distill.caching.cache import Plan, Stored
from distill.caching.plan import check_budget
from distill.cli import main
from distill.config import RunConfig
from distill.errors import UserError
from tests.distill.caching.conftest import build, losses

Load = Callable[..., RunConfig]
Refuse = Callable[..., str]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.augment=crop", "with data.augment=crop no image appears twice; use flip"),
        ("teacher.labels=true", "a mask is not a class"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    recipe: Path, cached: list[str], refuse: Refuse, change: str, words: str
) -> None:
    assert words in refuse("train", recipe, *cached, change)


def test_the_plan_says_what_a_cache_takes() -> None:
    layers = {"a": Stored((256, 8, 8), torch.bfloat16), "b": Stored((5, 1, 1), torch.float32)}
    plan = Plan(20000, 2, 20, layers)
    # Every layer begins at a multiple of 64 bytes, and a checksum follows
    assert plan.row_bytes == 256 * 8 * 8 * 2 + 64 + 4
    assert plan.gb == pytest.approx(20000 * 2 * 20 * (32768 + 64 + 4 + 4) / 1e9)
    text = "20000 images x 2 flips x 20 bins x 2 layers, bfloat16 and float32: 26.3 GB"
    assert str(plan) == text
    check_budget(plan, 27, {})
    smaller = {"one=1": plan._replace(flips=1), "two=2": plan._replace(bins=19)}
    with pytest.raises(UserError) as caught:
        check_budget(plan, 20, smaller)
    assert str(caught.value) == (
        f"teacher.cache: {text} exceeds teacher.cache_gb=20; what fits: "
        "one=1 (13.1 GB), teacher.cache_gb=27 or more"
    )


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the machine computes bfloat16 fast."""
    monkeypatch.setattr("distill.caching.plan.computes_bfloat16", lambda kind: request.param)
    return bool(request.param)


@pytest.mark.parametrize("gb", [0.00115, 0.0005, 0.00025, 0.00007])
def test_over_the_budget_whatever_is_suggested_fits(
    recipe: Path, load: Load, cached: list[str], refuse: Refuse, gb: float, fast: bool
) -> None:
    """32 rows of 16 x 32 x 32 float32 are 2.1 MB."""
    limit = f"teacher.cache_gb={gb}"
    line = refuse("train", recipe, *cached, limit)
    assert (
        "8 images x 2 flips x 2 bins x 1 layers, float32: 0.0021 GB exceeds teacher.cache_gb="
        in line
    )
    suggested = re.findall(r"([\w.]+=\w+) \(", line)
    assert ("teacher.dtype=bfloat16" in suggested) == (fast and gb > 0.00105)
    assert ("data.augment=none" in suggested) == (gb > 0.00105)
    assert ("policy.bins=1" in suggested) == (gb > 0.00105)
    assert ("data.unlabelled=0" in suggested) == (gb > 0.00105)
    assert not any("pooled" in change for change in suggested)  # the reward reads a dense map
    for change in suggested:
        assert build(load(*cached, limit, change)).cache is not None
        shutil.rmtree(load(*cached).teacher.cache or "")
    assert not (recipe.parent / "runs").exists()


def test_the_budget_names_how_many_bins_and_images_fit(
    recipe: Path, cached: list[str], refuse: Refuse, fast: bool
) -> None:
    """8 images x 2 flips x 10 bins of 65 KB are 10.5 MB; 7.4 MB are 7 bins, or 5 images."""
    line = refuse("train", recipe, *cached, "policy.bins=10", "teacher.cache_gb=0.0074")
    half = "teacher.dtype=bfloat16 (0.00524 GB), " if fast else ""
    assert line.partition("what fits: ")[2] == half + (
        "data.augment=none (0.00524 GB), "
        "policy.bins=7 (0.00734 GB), data.unlabelled=1 (0.00655 GB), teacher.cache_gb=1 or more"
    )


def test_pooled_pairs_are_suggested_where_the_reward_reads_no_dense_map(
    load: Load, cached: list[str], tmp_path: Path
) -> None:
    changes = ["data.benchmark=greys:Greys", f"data.root={tmp_path}", "data.options={}"]
    (tmp_path / "greys.py").write_text(GREYS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        changes += ["policy.reward_layer=mid_block", "teacher.cache_gb=0.00001"]
        with pytest.raises(UserError) as caught:
            build(load(*cached, *changes))
        assert "what fits: pairs.0.pooled=true (4.35e-06 GB), " in str(caught.value)
        trainer = build(load(*cached, *changes, "pairs.0.pooled=true"))
        losses(trainer)


GREYS = """
import torch


class Greys:
    '''Grey images; how bright, is the class.'''

    name, task, num_classes, ignore_index = "greys", "classification", 2, 255
    class_names, palette = ("dark", "bright"), torch.zeros(2, 3).numpy()

    def __init__(self, root):
        pass

    def dataset(self, split):
        return [(torch.full((3, 32, 32), 20 * i, dtype=torch.uint8), i // 4) for i in range(8)]
"""


def test_a_dry_run_shows_the_plan_and_makes_no_folder(
    recipe: Path, cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), *cached, "--dry-run"]) == 0
    plan = "# distilled: cache of 8 images x 2 flips x 2 bins x 1 layers, float32: 0.0021 GB in "
    assert plan in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
