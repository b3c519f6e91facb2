"""Cached features are the teacher's own, and never those of something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.augmentation import augmentation
from distill.benchmarks.shapes import ShapesDataset
from distill.caching.cache import Stored
from distill.cli import main
from distill.commands.extract import extract
from distill.config import RunConfig
from distill.data import Augmented, Draw, Tagged, as_float
from distill.errors import UserError
from distill.training.loop import batches
from distill.training.trainer import Trainer
from tests.distill.caching.conftest import SMALL, build, losses

Load = Callable[..., RunConfig]
Refuse = Callable[..., str]


def refuse_to_look(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the teacher must not be asked."""

    def asked(*_: Any) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(trainer.teacher, "features", asked)


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
    assert 0 < len(trainer.cache) <= trainer.planned_cache.plan.rows < 12 * 8  # type: ignore[union-attr]


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
    assert trainer.planned_cache.plan.rows == 8  # type: ignore[union-attr]
    labelled, _, unlabelled, tags, _ = next(batches(trainer))
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
    assert trainer.planned_cache.plan.layers == {  # type: ignore[union-attr]
        "up_blocks.0": Stored((16, 32, 32), torch.bfloat16),
        "mid_block": Stored((16, 1, 1), torch.float32),
    }
    without = build(load(*SMALL, pairs, "teacher.input=clean", "teacher.dtype=bfloat16"))
    assert losses(trainer) == losses(without)


def test_no_floor_is_measured_of_targets_that_do_not_change(load: Load, cached: list[str]) -> None:
    trainer = build(load(*cached, "train.floor_every=1"))
    losses(trainer)
    assert trainer.floor.means() == {}


# Whose features they are


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("teacher.input=clean", 'teacher.input "noised", now "clean"'),
        ("teacher.dtype=bfloat16", 'teacher.dtype "float32", now "bfloat16"'),
        ("pairs.0.teacher=mid_block", "layers."),
        ("policy.bins=3", "timesteps [0, 999], now [0, 500, 999]"),
        ("data.augment=none", 'data.augment "flip", now "none"'),
        ("data.options.seed=1", "data.options.seed "),
        ("data.unlabelled=7", "images "),
        ("teacher.random_weights=3", "teacher "),
        # One of one's own around a built-in one has its fingerprint
        ("teacher.name=teachers.diffusers_unet:diffusers_unet", 'teacher.name "diffusers_unet"'),
    ],
)
def test_a_stale_cache_is_refused(
    recipe: Path, load: Load, cached: list[str], refuse: Refuse, change: str, words: str
) -> None:
    build(load(*cached))
    line = refuse("train", recipe, *cached, change)
    assert line.startswith("teacher.cache: ")
    assert f" has other features ({words}" in line
    assert line.endswith("; delete it, or choose another folder")
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize("command", [["train", "--dry-run"], ["teacher", "extract"]])
def test_a_stale_cache_is_refused_before_the_training_too(
    recipe: Path, load: Load, cached: list[str], refuse: Refuse, command: list[str]
) -> None:
    build(load(*cached))
    line = refuse(*command, recipe, *cached, "teacher.input=clean")
    assert ' has other features (teacher.input "noised", now "clean")' in line


def test_a_cache_may_be_used_with_another_batch(
    load: Load, cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(load(*cached))
    losses(first)
    assert first.cache is not None
    first.cache.flush()
    again = build(load(*cached, "train.batch=2", "train.unlabelled_batch=1"))
    assert again.cache is not None
    assert (again.cache.chunk, len(again.cache)) == (first.cache.chunk, len(first.cache))
    assert first.cache.chunk > 3
    losses(again)


def test_features_of_an_older_version_are_stale(
    recipe: Path, load: Load, cached: list[str], refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(load(*cached))
    monkeypatch.setattr("distill.caching.plan.FEATURES", 99)
    assert " has other features (features 1, now 99" in refuse("train", recipe, *cached)


def test_a_stale_cache_of_a_later_arm_is_refused_before_the_first_is_trained(
    recipe: Path, cached: list[str], tmp_path: Path, refuse: Refuse
) -> None:
    both = [*cached, "train.arms=[distilled,random_teacher]"]
    later = tmp_path / "cache" / "random_teacher0"
    later.mkdir(parents=True)
    (later / "manifest.json").write_text("{}")
    line = refuse("train", recipe, *both)
    assert line.startswith(f"teacher.cache: {later} has other features (")
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
    with pytest.raises(UserError, match="training image 5 is not the one whose features are in"):
        extract(load(*cached))


def test_runs_with_other_seeds_share_a_cache_and_each_random_teacher_has_its_own(
    recipe: Path, cached: list[str], tmp_path: Path
) -> None:
    for seed in (0, 1):
        changes = [f"seed={seed}", f"name=seed{seed}", "train.arms=[distilled, random_teacher]"]
        assert main(["train", str(recipe), *cached, *changes]) == 0
    found = {path.name for path in (tmp_path / "cache").iterdir()}
    assert found == {"distilled", "random_teacher0", "random_teacher1"}


def test_the_manifest_reads_as_the_recipe(load: Load, cached: list[str], tmp_path: Path) -> None:
    build(load(*cached))
    manifest = json.loads((tmp_path / "cache" / "distilled" / "manifest.json").read_text())
    assert manifest["teacher.input"] == "noised"
    assert manifest["timesteps"] == [0, 999]
    assert manifest["layers"] == {"up_blocks.0": [16, 32, 32, "torch.float32"]}
    assert manifest["data.benchmark"] == "shapes"
