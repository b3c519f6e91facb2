"""What holds of every benchmark with labels, whatever its files look like."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.registry import TABLES, resolve

LABELLED = [name for name in TABLES["benchmarks"] if name != "images"]
ON_DISK = [name for name in LABELLED if name != "shapes"]
PUBLISHED = [name for name in ON_DISK if name != "folder"]


@pytest.mark.parametrize("name", LABELLED)
def test_attributes_agree_with_each_other(name: str, build: Callable[..., Any]) -> None:
    benchmark = build(name)
    assert benchmark.name == name
    assert benchmark.task in ("segmentation", "classification", "landmarks")
    assert len(benchmark.class_names) == benchmark.num_classes >= 2
    assert len(set(benchmark.class_names)) == benchmark.num_classes
    assert all(name and name == name.strip() for name in benchmark.class_names)
    assert benchmark.palette.shape == (benchmark.num_classes, 3)
    assert benchmark.palette.dtype == np.uint8
    if benchmark.task == "segmentation":
        assert len(np.unique(benchmark.palette, axis=0)) == benchmark.num_classes
    assert benchmark.ignore_index not in range(benchmark.num_classes)


@pytest.mark.parametrize("name", LABELLED)
def test_items_are_images_with_targets_in_range(name: str, build: Callable[..., Any]) -> None:
    benchmark = build(name)
    for split in ("train", "val"):
        examples = benchmark.dataset(split)
        assert len(getattr(examples, "names", range(len(examples)))) == len(examples) > 0
        image, target = examples[len(examples) - 1]
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3
        if benchmark.task == "segmentation":
            assert target.dtype == torch.uint8
            assert target.shape == image.shape[1:]
            allowed = {*range(benchmark.num_classes), benchmark.ignore_index}
            assert set(target.flatten().tolist()) <= allowed
        elif benchmark.task == "landmarks":
            assert target.dtype == torch.float32
            assert target.shape == (benchmark.num_classes, 2)
            assert image.shape[1] == image.shape[2]
            assert 0 <= target.min() < target.max() <= 1
        else:
            assert type(target) is int
            assert 0 <= target < benchmark.num_classes
            assert examples.targets[len(examples) - 1] == target


@pytest.mark.parametrize("name", LABELLED)
def test_splits_share_no_example(name: str, build: Callable[..., Any]) -> None:
    train, val = (build(name).dataset(split) for split in ("train", "val"))
    if name not in ("shapes", "coco_stuff"):  # no names; in the miniature one name in both folders
        assert not set(train.names) & set(val.names)


@pytest.mark.parametrize("name", LABELLED)
def test_an_unknown_split_names_the_nearest(name: str, refusal: Callable[..., str]) -> None:
    assert "no split 'trian'; did you mean 'train'" in refusal(name, "trian")


@pytest.mark.parametrize("name", LABELLED)
def test_arguments_after_the_root_are_options(name: str) -> None:
    parameters = inspect.signature(resolve("benchmarks", name, "key")).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["root"]


@pytest.mark.parametrize("name", ON_DISK)
def test_without_a_root_the_key_is_named(name: str, miniatures: Mapping[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{name}: no folder given; .*data\.root=FOLDER"):
        resolve("benchmarks", name, "key")(None, **miniatures[name].options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_root_that_is_not_there_shows_the_tree_and_the_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve("benchmarks", name, "key")(str(tmp_path / "nowhere"))
    line = str(caught.value)
    assert line.startswith(f"{name}: there is no folder {tmp_path / 'nowhere'}; expected in data.")
    assert ("; get it from " in line) == (name != "image_folder")  # one's own
    assert "\n" not in line


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_part_shows_the_tree_and_the_source(
    name: str,
    tmp_path: Path,
    miniatures: Mapping[str, Any],
    build: Callable[..., Any],
    refusal: Callable[..., str],
) -> None:
    build(name)
    assert miniatures[name].needed
    for part in miniatures[name].needed:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        miniatures[name].write(tmp_path)
        gone = tmp_path / part
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        line = refusal(name)
        assert line.startswith(f"{name}: "), part
        assert gone.stem[:20] in line, part
        assert "; expected in data.root=FOLDER: " in line, part
        assert ("; get it from " in line) == (name != "image_folder"), part


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "image_folder"])
def test_another_number_of_images_than_published_is_said(
    name: str, build: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    build(name)
    err = capsys.readouterr().err
    if name.startswith("cifar"):  # their files are checked as a whole
        assert err == ""
    else:
        assert err.count("\n") == 1
        assert err.startswith(f"distill: {name}: train has ")
        assert err.endswith(" images; scores will not compare with published ones\n")


@pytest.mark.parametrize(
    "name", ["voc2012", "ade20k", "cityscapes", "coco_stuff", "tiny_imagenet", "imagenet"]
)
def test_a_test_split_without_public_labels_points_to_val(
    name: str, refusal: Callable[..., str]
) -> None:
    assert "labels of test are not public; score on val" in refusal(name, "test")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("voc2012", "VOCdevkit/VOC2012"),
        ("ade20k", "ADEChallengeData2016"),
        ("oxford_pets", "oxford-iiit-pet"),
        ("celebamask_hq", "CelebAMask-HQ"),
        ("tiny_imagenet", "tiny-imagenet-200"),
    ],
)
def test_the_root_may_be_the_archives_own_folder(
    name: str, folder: str, tmp_path: Path, build: Callable[..., Any]
) -> None:
    names = build(name).dataset("val").names
    inside = resolve("benchmarks", name, "key")(str(tmp_path / folder))
    assert inside.dataset("val").names == names
