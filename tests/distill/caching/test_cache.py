"""Cached features are the teacher's own, are never those of something else, and survive a crash."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import checkpoint
from distill.benchmarks.shapes import ShapesDataset
from distill.build import build_accelerator, build_training_set
from distill.caching import cache as cache_module
from distill.caching.cache import FeatureCache, Plan, Stored
from distill.caching.plan import check_budget
from distill.cli import main
from distill.config import RunConfig
from distill.data import Augmented, Draw, Tagged, as_float, augmentation
from distill.errors import UserError
from distill.tracking import read_metrics
from distill.training.loop import batches, checkpoint_path
from distill.training.trainer import Trainer

Load = Callable[..., RunConfig]
Refuse = Callable[..., str]
Interrupter = Callable[[str, int], None]

# 8 images x 2 flips x 2 bins: most of 12 steps of 8 images find their features in the cache
SMALL = [
    "data.augment=flip",
    "data.options.train=8",
    "data.labelled=4",
    "data.unlabelled=8",
    "policy.bins=2",
    "train.steps=12",
    "train.arms=[distilled]",
]


def build(config: RunConfig) -> Trainer:
    """The distilled arm, its cache open."""
    data = build_training_set(config.data)
    trainer = Trainer(config, "distilled", data, build_accelerator(config.device))
    trainer.open_cache()
    return trainer


def losses(trainer: Trainer) -> list[tuple[float, ...]]:
    """Of every step: task, feature and reward head, and the rewards."""
    found = []
    stream = batches(trainer)
    for _ in range(trainer.config.train.steps):
        step = trainer.train_step(*next(stream))
        rewards = step.rewards["teacher_task"]
        scalars = (step.task, step.feature, step.reward_head, *rewards)
        found.append(tuple(x.item() for x in scalars))
    return found


def refuse_to_look(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the teacher must not be asked."""

    def asked(*_: Any) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(trainer.teacher, "features", asked)


@pytest.fixture
def cached(tmp_path: Path) -> list[str]:
    """Overrides of the tiny recipe: a small data set, and a cache."""
    return [*SMALL, f"teacher.cache={tmp_path / 'cache'}"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("augment", ["flip", "none"])
def test_without_noise_a_cached_run_equals_an_uncached_one(
    load: Load, cached: list[str], dtype: str, augment: str
) -> None:
    changes = ["teacher.input=clean", f"teacher.dtype={dtype}", f"data.augment={augment}"]
    without, trainer = build(load(*SMALL, *changes)), build(load(*cached, *changes))
    assert without.cache is None
    assert losses(trainer) == losses(without)
    assert trainer.cache is not None
    assert 0 < len(trainer.cache) <= trainer.plan.rows < 12 * 8  # type: ignore[union-attr]


@pytest.mark.parametrize("look", ["noised", "average"])
def test_a_run_that_finds_its_cache_filled_equals_the_one_that_filled_it(
    load: Load, cached: list[str], monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    config = load(*cached, f"teacher.input={look}", "teacher.dtype=bfloat16")
    first = build(config)
    expected = losses(first)
    first.cache.flush()  # type: ignore[union-attr]
    again = build(config)
    refuse_to_look(again, monkeypatch)
    assert losses(again) == expected


def test_what_is_cached_depends_neither_on_order_nor_on_company(
    load: Load, recipe: Path, tmp_path: Path
) -> None:
    """A run with another seed fills some rows, `extract` the rest; or `extract` fills all."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    losses(trainer := build(load(*SMALL, f"teacher.cache={parts}", "seed=5", "train.steps=2")))
    assert trainer.cache is not None
    assert 0 < len(trainer.cache) < 32
    trainer.cache.flush()
    for folder in (whole, parts):
        assert main(["teacher", "extract", str(recipe), *SMALL, f"teacher.cache={folder}"]) == 0
    for name in ("features.bin", "marks.bin", "manifest.json"):
        one, other = (folder / "distilled" / name for folder in (whole, parts))
        assert one.read_bytes() == other.read_bytes()
    assert any((whole / "distilled" / "features.bin").read_bytes())


def test_the_teacher_sees_batches_of_one_size(
    load: Load, cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the size of a batch decides how its features are rounded."""
    trainer = build(load(*cached))
    teacher: Any = trainer.teacher
    features, sizes = teacher.features, []

    def watched(images: Tensor, *rest: Any) -> Any:
        sizes.append(len(images))
        return features(images, *rest)

    monkeypatch.setattr(teacher, "features", watched)
    losses(trainer)
    assert len(sizes) > 4
    assert set(sizes) == {8}


def test_the_noise_of_images_flips_and_timesteps_differs(load: Load, cached: list[str]) -> None:
    cache = build(load(*cached)).cache
    assert cache is not None
    image = torch.full((1, 3, 32, 32), 0.5)
    tags = torch.tensor([[0, 0, 7], [1, 0, 7], [0, 1, 7], [0, 0, 7]])
    maps = cache.features(image.expand(4, -1, -1, -1), tags, torch.tensor([0, 0, 0, 1]))
    x = maps["up_blocks.0"]
    assert all(not torch.equal(x[0], other) for other in x[1:])


def test_tags_tell_what_an_image_shows() -> None:
    examples = ShapesDataset("train", 4, 32, seed=0)
    tagged = Tagged(Augmented(examples, augmentation("flip", "segmentation", (32, 32))))
    seen = set()
    for seed in range(8):
        for example in range(4):
            image, _, tag = tagged[Draw(example, seed)]
            original = as_float(examples[example][0])
            assert tag[0] == example
            assert torch.equal(image, original.flip(-1) if tag[1] else original)
            seen.add(tuple(tag.tolist()))
    assert len(seen) == 4 * 2
    assert len({checksum for _, _, checksum in seen}) == 4


def test_labelled_and_unlabelled_streams_share_their_features(
    load: Load, cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All eight images are in both streams: what one has seen the other finds."""
    config = load(*cached, "data.labelled=8", "data.augment=none", "policy.bins=1")
    trainer = build(config)
    assert trainer.cache is not None
    assert trainer.plan.rows == 8  # type: ignore[union-attr]
    labelled, _, unlabelled, tags = next(batches(trainer))
    assert unlabelled is not None
    assert tags is not None
    bins = torch.zeros(8, dtype=torch.int64)
    maps = trainer.cache.features(torch.cat([labelled, unlabelled]), tags, bins)
    order = [tags[:, 0].tolist().index(example) for example in tags[:, 0].tolist()]
    for i, j in enumerate(order):
        assert torch.equal(maps["up_blocks.0"][i], maps["up_blocks.0"][j])
    assert len(trainer.cache) == len(set(tags[:, 0].tolist()))


def test_a_layer_whose_average_alone_counts_is_kept_as_that(load: Load, cached: list[str]) -> None:
    pairs = (
        "pairs=[{student: layer3, teacher: up_blocks.0}, "
        "{student: layer4, teacher: mid_block, pooled: true}]"
    )
    trainer = build(load(*cached, pairs, "teacher.input=clean", "teacher.dtype=bfloat16"))
    assert trainer.plan.layers == {  # type: ignore[union-attr]
        "up_blocks.0": Stored((16, 32, 32), torch.bfloat16),
        "mid_block": Stored((16, 1, 1), torch.float32),
    }
    without = build(load(*SMALL, pairs, "teacher.input=clean", "teacher.dtype=bfloat16"))
    assert losses(trainer) == losses(without)


def test_no_floor_is_measured_of_targets_that_do_not_change(load: Load, cached: list[str]) -> None:
    trainer = build(load(*cached, "train.floor_every=1"))
    losses(trainer)
    assert trainer.floor.means() == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("teacher.input=clean", 'teacher.input "noised", now "clean"'),
        ("teacher.dtype=bfloat16", 'teacher.dtype "float32", now "bfloat16"'),
        ("pairs.0.teacher=mid_block", "layers "),
        ("policy.bins=3", "timesteps [0, 999], now [0, 500, 999]"),
        ("data.augment=none", 'data.augment "flip", now "none"'),
        ("data.options.seed=1", "data.options "),
        ("data.unlabelled=7", "images "),
        ("teacher.random_weights=3", "teacher "),
    ],
)
def test_a_stale_cache_is_refused(
    recipe: Path, load: Load, cached: list[str], refuse: Refuse, change: str, words: str
) -> None:
    build(load(*cached))
    line = refuse("train", recipe, *cached, change)
    assert line.startswith("teacher.cache: ")
    assert f" is of other features ({words}" in line
    assert line.endswith("; delete it, or name another folder")
    assert not (recipe.parent / "runs").exists()


def test_an_image_that_was_replaced_is_refused(
    load: Load, cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(load(*cached))
    losses(trainer)
    trainer.cache.flush()  # type: ignore[union-attr]
    read = ShapesDataset.__getitem__

    def changed(dataset: ShapesDataset, index: int) -> tuple[Tensor, Tensor]:
        image, mask = read(dataset, index)
        if index == 5:
            image[0, 0, 0] ^= 1
        return image, mask

    monkeypatch.setattr(ShapesDataset, "__getitem__", changed)
    with pytest.raises(UserError, match="training image 5 is not the one whose features are in"):
        losses(build(load(*cached)))


def test_runs_with_other_seeds_share_a_cache_and_each_random_teacher_has_its_own(
    recipe: Path, cached: list[str], tmp_path: Path
) -> None:
    for seed in (0, 1):
        changes = [f"seed={seed}", f"name=seed{seed}", "train.arms=[distilled, random_teacher]"]
        assert main(["train", str(recipe), *cached, *changes]) == 0
    found = {path.name for path in (tmp_path / "cache").iterdir()}
    assert found == {"distilled", "random_teacher0", "random_teacher1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.augment=crop", "with data.augment=crop an image never comes twice; use flip"),
        ("teacher.labels=true", "a mask is no class"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    recipe: Path, cached: list[str], refuse: Refuse, change: str, words: str
) -> None:
    assert words in refuse("train", recipe, *cached, change)


def test_the_plan_says_what_a_cache_takes() -> None:
    layers = {"a": Stored((256, 8, 8), torch.bfloat16), "b": Stored((5, 1, 1), torch.float32)}
    plan = Plan(20000, 2, 20, layers)
    assert plan.row_bytes == 256 * 8 * 8 * 2 + 64  # every layer begins at a multiple of 64 bytes
    assert plan.gb == pytest.approx(20000 * 2 * 20 * (32768 + 64 + 4) / 1e9)
    text = "20000 images x 2 flips x 20 bins x 2 layers, bfloat16 and float32: 26.3 GB"
    assert str(plan) == text
    check_budget(plan, 27, {})
    smaller = {"one=1": plan._replace(flips=1), "two=2": plan._replace(bins=19)}
    with pytest.raises(UserError) as caught:
        check_budget(plan, 20, smaller)
    assert str(caught.value) == (
        f"teacher.cache: {text}, more than teacher.cache_gb=20 allows; what fits: "
        "one=1 (13.1 GB), teacher.cache_gb=27 or more"
    )


@pytest.mark.parametrize("gb", [0.00115, 0.0005, 0.00025, 0.00007])
def test_over_the_budget_whatever_is_suggested_fits(
    recipe: Path, load: Load, cached: list[str], refuse: Refuse, gb: float
) -> None:
    """32 rows of 16 x 32 x 32 float32 are 2.1 MB."""
    limit = f"teacher.cache_gb={gb}"
    line = refuse("train", recipe, *cached, limit)
    assert "8 images x 2 flips x 2 bins x 1 layers, float32: 0.0021 GB, more than" in line
    suggested = re.findall(r"([\w.]+=\w+) \(", line)
    assert ("teacher.dtype=bfloat16" in suggested) == (gb > 0.00105)
    assert ("data.augment=none" in suggested) == (gb > 0.00105)
    assert ("policy.bins=1" in suggested) == (gb > 0.00105)
    assert ("data.unlabelled=0" in suggested) == (gb > 0.00105)
    assert not any("pooled" in change for change in suggested)  # the reward reads a dense map
    for change in suggested:
        assert build(load(*cached, limit, change)).cache is not None
        shutil.rmtree(load(*cached).teacher.cache or "")
    assert not (recipe.parent / "runs").exists()


def test_the_budget_names_how_many_bins_and_images_fit(
    recipe: Path, cached: list[str], refuse: Refuse
) -> None:
    """8 images x 2 flips x 10 bins of 65 KB are 10.5 MB; 7.4 MB are 7 bins, or 5 images."""
    line = refuse("train", recipe, *cached, "policy.bins=10", "teacher.cache_gb=0.0074")
    assert line.partition("what fits: ")[2] == (
        "teacher.dtype=bfloat16 (0.00524 GB), data.augment=none (0.00524 GB), "
        "policy.bins=7 (0.00734 GB), data.unlabelled=1 (0.00655 GB), teacher.cache_gb=1 or more"
    )


def test_pooled_pairs_are_suggested_where_the_reward_reads_no_dense_map(
    load: Load, cached: list[str], tmp_path: Path
) -> None:
    changes = ["data.benchmark=tones:Tones", f"data.root={tmp_path}", "data.options={}"]
    (tmp_path / "tones.py").write_text(TONES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        changes += ["policy.reward_layer=mid_block", "teacher.cache_gb=0.00001"]
        with pytest.raises(UserError) as caught:
            build(load(*cached, *changes))
        assert "what fits: pairs.0.pooled=true (4.22e-06 GB), " in str(caught.value)
        trainer = build(load(*cached, *changes, "pairs.0.pooled=true"))
        losses(trainer)


TONES = """
import torch


class Tones:
    '''Grey images; how bright, is the class.'''

    name, task, num_classes, ignore_index = "tones", "classification", 2, 255
    class_names, palette = ("dark", "bright"), torch.zeros(2, 3).numpy()

    def __init__(self, root):
        pass

    def dataset(self, split):
        return [(torch.full((3, 32, 32), 20 * i, dtype=torch.uint8), i // 4) for i in range(8)]
"""


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
    assert re.match(
        r"teacher.cache: 8 images .*, but at .*/cache/distilled there is room for", line
    )
    assert list((tmp_path / "cache" / "distilled").iterdir()) == []
    monkeypatch.undo()
    assert main(["teacher", "extract", str(recipe), *cached]) == 0


def test_the_room_is_reserved_at_once(load: Load, cached: list[str], tmp_path: Path) -> None:
    trainer = build(load(*cached))
    status = (tmp_path / "cache" / "distilled" / "features.bin").stat()
    assert trainer.plan is not None
    assert status.st_size == trainer.plan.rows * trainer.plan.row_bytes
    assert status.st_blocks * 512 >= status.st_size


@pytest.mark.parametrize("name", ["features.bin", "marks.bin", "manifest.json"])
def test_a_damaged_cache_is_one_line(
    recipe: Path, load: Load, cached: list[str], tmp_path: Path, refuse: Refuse, name: str
) -> None:
    build(load(*cached))
    os.truncate(tmp_path / "cache" / "distilled" / name, 7)
    line = refuse("train", recipe, *cached)
    assert "is damaged; delete it" in line or "is not one of a cache" in line


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


def test_a_dry_run_shows_the_plan_and_makes_no_folder(
    recipe: Path, cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), *cached, "--dry-run"]) == 0
    plan = "# distilled: cache of 8 images x 2 flips x 2 bins x 1 layers, float32: 0.0021 GB in "
    assert plan in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_the_manifest_reads_as_the_recipe(load: Load, cached: list[str], tmp_path: Path) -> None:
    build(load(*cached))
    manifest = json.loads((tmp_path / "cache" / "distilled" / "manifest.json").read_text())
    assert manifest["teacher.input"] == "noised"
    assert manifest["timesteps"] == [0, 999]
    assert manifest["layers"] == {"up_blocks.0": [16, 32, 32, "torch.float32"]}
    assert manifest["data.benchmark"] == "shapes"
