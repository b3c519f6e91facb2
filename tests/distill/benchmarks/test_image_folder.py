"""Any images in one folder a class."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.benchmarks.image_folder import image_folder
from distill.build import build_training_set
from distill.config import DataConfig
from distill.errors import UserError


def test_the_folders_of_train_are_the_classes_of_all_splits(
    build: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = build("image_folder")
    assert benchmark.class_names == ("cat", "dog")
    assert benchmark.dataset("train").names == ["train/cat/deeper/1.png", "train/dog/deeper/1.png"]
    assert benchmark.dataset("train").targets == [0, 1]
    for split in ("val", "test"):
        assert benchmark.dataset(split).targets == [1]  # though there is no cat
    assert capsys.readouterr().err == ""


def test_names_are_whole_where_the_root_is_the_working_directory(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("image_folder")
    monkeypatch.chdir(tmp_path)
    for root in (".", "./", "train/.."):
        names = image_folder(root).dataset("val").names
        assert names == ["val/dog/deeper/1.png"], root


def test_a_class_that_train_lacks_is_named(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    build("image_folder")
    (tmp_path / "val" / "bird").mkdir()
    assert "val/bird is not one of the 2 classes" in refusal("image_folder")


def test_photographs_are_upright(build: Callable[..., Any], tmp_path: Path) -> None:
    build("image_folder")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "val" / "dog" / "deeper" / "1.png", exif=exif)
    assert build("image_folder").dataset("val")[0][0].shape == (3, 8, 4)


def test_class_folders_without_images_are_told(
    build: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("image_folder")
    (tmp_path / "train" / "empty").mkdir()
    assert build("image_folder").num_classes == 3
    assert "train/empty contains no images (1 class folders are empty)" in capsys.readouterr().err


def test_hidden_files_and_folders_are_left_out(build: Callable[..., Any], tmp_path: Path) -> None:
    build("image_folder")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / "._1.png").write_bytes(b"")
    benchmark = build("image_folder")
    assert benchmark.num_classes == 2
    assert len(benchmark.dataset("train")) == 2


def test_without_a_test_folder_there_is_no_test_split(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    build("image_folder")
    (tmp_path / "test").rename(tmp_path / "unused")
    assert "no split 'test'; choose from train, val" in refusal("image_folder", "test")


def add(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (8, 4)).save(folder / f"{index}.png")


def test_images_without_a_class_are_distilled_too(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    assert build("image_folder").unlabelled() is None
    add(tmp_path / "unlabelled" / "deep", 3)
    assert build("image_folder").unlabelled().names == [
        f"unlabelled/deep/{i}.png" for i in range(3)
    ]
    data = build_training_set(
        DataConfig(benchmark="image_folder", root=str(tmp_path), size=(32, 32))
    )
    assert (sorted(data.labelled_indices), len(data.unlabelled_indices)) == ([0, 1], 5)
    (tmp_path / "unlabelled" / "deep" / "1.png").write_bytes(b"no image")
    assert build("image_folder", skip=0.4).unlabelled()[1][0].shape == (3, 4, 8)
    with pytest.raises(UserError, match=r"1\.png: cannot be decoded .* 1 of 3 .* at most 0 may be"):
        build("image_folder").unlabelled()[1]
    line = refusal("image_folder", unlabelled="nowhere")
    assert "data.options.unlabelled: there is no folder" in line
    add(tmp_path / "more", 0)
    assert "there is no image in " in refusal("image_folder", unlabelled="more")


def test_without_val_some_of_train_are_held_out(
    build: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("image_folder")
    shutil.rmtree(tmp_path / "val")
    add(tmp_path / "train" / "cat", 8)
    benchmark = build("image_folder", val_ratio=0.2)
    train, val = (set(benchmark.dataset(split).names) for split in ("train", "val"))
    assert (len(train), len(val), train & val) == (8, 2, set())
    assert "split_seed=0 made 8 train, 1 test, 2 val images" in capsys.readouterr().err


def test_class_folders_alone_are_split(
    build: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog", "unlabelled"):
        add(tmp_path / name, 10)
    benchmark = image_folder(str(tmp_path))
    assert benchmark.class_names == ("cat", "dog")
    names = [benchmark.dataset(split).names for split in ("train", "val", "test")]
    assert [len(of) for of in names] == [14, 2, 4]
    assert len(set().union(*names)) == 20
    assert image_folder(str(tmp_path), split_seed=1).dataset("test").names != names[2]
    unlabelled = benchmark.unlabelled()
    assert unlabelled is not None
    assert len(unlabelled) == 10


def test_a_class_called_unlabelled_is_told(
    build: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("image_folder")
    add(tmp_path / "train" / "unlabelled", 1)
    assert build("image_folder").num_classes == 3
    assert "train/unlabelled is a class; put images without a class" in capsys.readouterr().err


def test_one_class_is_too_few(
    build: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    build("image_folder")
    (tmp_path / "train" / "cat").rename(tmp_path / "train" / "dog" / "cat")
    assert "has 1 class folders" in refusal("image_folder")


def test_links_multiply_no_image(build: Callable[..., Any], tmp_path: Path) -> None:
    build("image_folder")
    cat = tmp_path / "train" / "cat"
    (cat / "again").symlink_to(cat)
    (cat / "same").symlink_to(cat / "deeper")
    assert build("image_folder").dataset("train").targets == [0, 1]


def test_images_come_folder_by_folder(build: Callable[..., Any], tmp_path: Path) -> None:
    build("image_folder")
    cat = tmp_path / "train" / "cat"
    for name in ("z.png", "deeper/a/2.png", "deeper/b.png"):
        (cat / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 4)).save(cat / name)
    names = build("image_folder").dataset("train").names[:-1]
    expected = ["z.png", "deeper/1.png", "deeper/b.png", "deeper/a/2.png"]
    assert names == [f"train/cat/{name}" for name in expected]
