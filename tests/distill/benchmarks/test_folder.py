"""The user's own folders: paired images and masks, and plain images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.benchmarks.folder import Folder
from distill.benchmarks.images import Images
from distill.errors import UserError

NAMES = [f"cell.{number}" for number in range(10)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten 4x4 pairs; a mask's rows are 0, 1, 2 and 255. No val list."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    mask = np.repeat(np.array([[0], [1], [2], [255]], dtype=np.uint8), 4, axis=1)
    for name in NAMES:
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / f"images/{name}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    (tmp_path / "train.txt").write_text("\n".join(NAMES[:8]))
    (tmp_path / "test.txt").write_text("\n".join(f"{name}.png" for name in NAMES[8:]))
    return tmp_path


def first_column(root: Path, **options: Any) -> list[int]:
    column: list[int] = Folder(str(root), **options).dataset("test")[0][1][:, 0].tolist()
    return column


def test_values_are_classes_and_255_is_ignored(root: Path) -> None:
    assert first_column(root, classes=["a", "b", "c"]) == [0, 1, 2, 255]


def test_value_map_renames_values(root: Path) -> None:
    options = {"classes": ["a", "b"], "value_map": {0: 1, 1: 0, 2: 255, 255: 0}}
    assert first_column(root, **options) == [1, 0, 255, 0]


def test_ignore_values_are_ignored(root: Path) -> None:
    assert first_column(root, num_classes=2, ignore_values=[2]) == [0, 1, 255, 255]


def test_value_outside_the_classes_names_file_value_and_choices(root: Path) -> None:
    with pytest.raises(UserError, match=r"cell\.8\.png: mask value 2 .*0, 1, 255"):
        first_column(root, num_classes=2)


def test_val_is_held_out_of_train_by_ratio_and_seed(root: Path) -> None:
    def names(split: str, seed: int = 0) -> list[str]:
        folder = Folder(str(root), num_classes=3, val_ratio=0.25, split_seed=seed)
        return folder.dataset(split).names

    assert len(names("val")) == 2
    assert len(names("train")) == 6
    assert sorted(names("val") + names("train")) == NAMES[:8]
    assert names("val") == names("val")
    assert len({tuple(names("val", seed)) for seed in range(5)}) > 1


def test_a_val_list_is_used_where_there_is_one(root: Path) -> None:
    (root / "val.txt").write_text(f"{NAMES[9]}\n")
    folder = Folder(str(root), num_classes=3)
    assert folder.dataset("val").names == [NAMES[9]]
    assert folder.dataset("train").names == NAMES[:8]


def test_lists_with_further_columns_are_read(root: Path) -> None:
    (root / "trainval.txt").write_text("# name class species\ncell.3 1 1 1\ncell.0 1 1 1\n")
    folder = Folder(str(root), num_classes=3, train_list="trainval.txt", val_list="test.txt")
    assert folder.dataset("train").names == ["cell.3", "cell.0"]


def test_missing_test_list_is_named_when_test_is_asked_for(root: Path) -> None:
    (root / "test.txt").unlink()
    folder = Folder(str(root), num_classes=3)
    with pytest.raises(UserError, match="no test list"):
        folder.dataset("test")


def test_missing_train_list_is_named(root: Path) -> None:
    (root / "train.txt").unlink()
    with pytest.raises(UserError, match=r"no list file .*train\.txt"):
        Folder(str(root), num_classes=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name the classes"),
        ({"num_classes": 1}, "2 to 255 classes"),
        ({"classes": ["a", "a"]}, "occurs twice"),
        ({"classes": ["a", "b"], "num_classes": 3}, "3, but 2 classes"),
        ({"num_classes": 2, "value_map": {7: 2}}, "7: 2 is none of the classes 0 to 1"),
        ({"num_classes": 3, "val_ratio": 1.0}, "val_ratio"),
    ],
)
def test_wrong_options_are_refused(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Folder(str(root), **options)


def test_two_images_of_one_stem_are_refused(root: Path) -> None:
    Image.new("RGB", (4, 4)).save(root / "images" / "cell.0.jpg")
    with pytest.raises(UserError, match="have one name"):
        Folder(str(root), num_classes=3)


def test_unlabelled_images_are_found_at_any_depth_in_the_order_of_their_paths(
    tmp_path: Path,
) -> None:
    for name in ("b/c/two.JPG", "a.png", ".cache/hidden.png", "b/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.new("L", (5, 3), 7).save(path)
    dataset = Images(str(tmp_path)).dataset("train")
    assert dataset.names == ["a.png", "b/c/two.JPG"]
    image, target = dataset[1]
    assert image.shape == (3, 3, 5)
    assert target == 255


def test_unlabelled_images_have_no_val_split_and_need_a_folder_with_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image file below"):
        Images(str(tmp_path))
    with pytest.raises(UserError, match="there is no folder"):
        Images(str(tmp_path / "x"))
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="train only"):
        Images(str(tmp_path)).dataset("val")


def test_images_in_no_list_serve_unlabelled(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "c", "bare"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
        if name != "bare":
            Image.new("L", (8, 8)).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "test.txt").write_text("c\n")
    unlabelled = Folder(str(tmp_path), classes=["x", "y"]).unlabelled()
    assert unlabelled is not None
    assert unlabelled.names == ["images/bare.png"]
