"""The user's own folders: paired images and masks, and plain images."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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


def test_an_image_that_a_list_names_twice_is_refused(root: Path) -> None:
    """Held out for val, it would be in train as well."""
    (root / "train.txt").write_text("cell.0\ncell.1.png\ncell.0.png\n")
    with pytest.raises(UserError, match=r"train\.txt, line 3: 'cell\.0' is also in line 1"):
        Folder(str(root), num_classes=3)


def test_images_that_train_shares_with_another_list_are_told(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "test.txt").write_text("cell.9\ncell.3\n")
    (root / "val.txt").write_text("cell.9\n")
    Folder(str(root), num_classes=3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "1 images of test are also in train, such as cell.3.png" in lines[0]


def test_lists_may_begin_with_a_byte_order_mark_and_are_utf8(root: Path) -> None:
    (root / "test.txt").write_bytes(b"\xef\xbb\xbfcell.9\n")
    assert Folder(str(root), num_classes=3).dataset("test").names == ["cell.9"]
    (root / "test.txt").write_bytes(b"cell.9\n\xe9\n")
    with pytest.raises(UserError, match=r"test\.txt is not UTF-8 text"):
        Folder(str(root), num_classes=3)


def test_masks_of_other_names_than_their_images_are_named(root: Path) -> None:
    (root / "train.txt").unlink()
    (root / "test.txt").unlink()
    for mask in list((root / "masks").iterdir()):
        mask.rename(mask.with_name(f"{mask.stem}_mask.png"))
    told = r"images/ has cell\.0\.png, .*masks/ has cell\.0_mask\.png"
    with pytest.raises(UserError, match=told):
        Folder(str(root), num_classes=3)


def test_masks_that_hold_0_and_255_alone_are_told(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Folder(str(root), num_classes=3)
    assert capsys.readouterr().err == ""
    values = np.repeat(np.array([[0], [255]], dtype=np.uint8), 4, axis=0).repeat(4, axis=1)
    for name in NAMES:
        Image.fromarray(values[2:6]).save(root / "masks" / f"{name}.png")
    Folder(str(root), num_classes=2)
    assert "data.options.value_map={0: 0, 255: 1}" in capsys.readouterr().err
    Folder(str(root), num_classes=2, value_map={0: 0, 255: 1})
    assert capsys.readouterr().err == ""
    Folder(str(root), num_classes=2, ignore_values=[255])
    assert "the first masks contain only 'class 0'; if there" in capsys.readouterr().err
    Folder(str(root), num_classes=2, value_map={0: 255, 1: 1})
    assert "the first masks contain no class; if" in capsys.readouterr().err


def test_masks_that_hold_255_alone_are_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        Image.new("L", (4, 4), 255).save(root / "masks" / f"{name}.png")
    Folder(str(root), num_classes=2)
    assert "the first masks contain only 255, and 255 means no label" in capsys.readouterr().err


def test_photographs_are_upright_below_their_masks(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = np.zeros((4, 8, 3), dtype=np.uint8)
    image[:, :4] = 255  # upright: white above black
    name = NAMES[8]
    Image.fromarray(image).save(root / "images" / f"{name}.png", exif=exif)
    mask = np.repeat([0, 1], 4).astype(np.uint8)[:, None].repeat(4, axis=1)
    Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    shown, labels = Folder(str(root), num_classes=3).dataset("test")[0]
    assert torch.equal(shown[0] == 0, labels == 1)
    Image.fromarray(mask.T.copy()).save(root / "masks" / f"{name}.png")
    with pytest.raises(UserError, match=r"rotated by its EXIF orientation; save both upright"):
        Folder(str(root), num_classes=3).dataset("test")[0]


def test_missing_test_list_is_named_when_test_is_asked_for(root: Path) -> None:
    (root / "test.txt").unlink()
    folder = Folder(str(root), num_classes=3)
    with pytest.raises(UserError, match="no test list"):
        folder.dataset("test")


def test_missing_train_list_is_named(root: Path) -> None:
    (root / "train.txt").unlink()
    with pytest.raises(UserError, match=r"no list file .*train\.txt"):
        Folder(str(root), num_classes=3)


def test_without_lists_the_pairs_are_split_by_ratio_and_seed_and_it_is_said(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "train.txt").unlink()
    (root / "test.txt").unlink()
    (root / "masks" / "cell.9.png").unlink()

    def names(seed: int) -> list[list[str]]:
        folder = Folder(str(root), num_classes=3, test_ratio=0.33, val_ratio=0.5, split_seed=seed)
        return [folder.dataset(split).names for split in ("train", "val", "test")]

    assert [len(split) for split in names(0)] == [3, 3, 3]
    assert "made 3 images train, 3 val and 3 test" in capsys.readouterr().err
    assert sorted(name for split in names(0) for name in split) == NAMES[:9]
    assert names(0) == names(0) != names(1)
    unlabelled = Folder(str(root), num_classes=3).unlabelled()
    assert unlabelled is not None
    assert unlabelled.names == ["images/cell.9.png"]


def test_a_named_list_is_never_replaced_by_a_ratio(root: Path) -> None:
    (root / "train.txt").unlink()
    (root / "test.txt").unlink()
    with pytest.raises(UserError, match=r"^data\.options\.train_list: there is no .*mine\.txt;"):
        Folder(str(root), num_classes=3, train_list="mine.txt")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_named_list_that_is_not_there_is_named(root: Path, split: str) -> None:
    """Left out, its images would be trained on."""
    key = f"{split}_list"
    with pytest.raises(UserError, match=rf"^data\.options\.{key}: there is no file .*/vall\.txt;"):
        Folder(str(root), num_classes=3, **{key: "vall.txt"})  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_masks_are_upright_as_their_photographs_are(coloured: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image = np.zeros((4, 8, 3), dtype=np.uint8)
    image[:, :4] = 255  # upright: white above black
    Image.fromarray(image).save(coloured / "images" / "cell.8.png", exif=exif)
    (coloured / "masks" / "cell.8.png").unlink()
    mask = coloured / "masks" / f"cell.8.{suffix}"
    Image.fromarray((image[..., 0] == 0).astype(np.uint8)).save(mask, exif=exif)
    shown, labels = Folder(str(coloured), num_classes=3).dataset("test")[0]
    assert torch.equal(shown[0] == 0, labels == 1)
    black_is_grass = np.where(image == 0, (10, 20, 30), (64, 128, 64)).astype(np.uint8)
    Image.fromarray(black_is_grass).save(mask, exif=exif)
    shown, labels = Folder(str(coloured), palette="colours.txt").dataset("test")[0]
    assert torch.equal(shown[0] == 0, labels == 1)


def test_palette_files_are_read_as_indices(root: Path) -> None:
    values = np.repeat(np.array([[0], [1], [2], [255]], dtype=np.uint8), 4, axis=1)
    picture = Image.fromarray(values)
    picture.putpalette([7] * 768)  # colours that say nothing
    picture.save(root / "masks" / "cell.8.png")
    assert first_column(root, num_classes=3) == [0, 1, 2, 255]


def test_sixteen_bit_masks_keep_their_values(root: Path) -> None:
    values = np.repeat(np.array([[0], [255], [256], [40_000]], dtype=np.uint16), 4, axis=1)
    Image.fromarray(values).save(root / "masks" / "cell.8.png")
    options = {"num_classes": 3, "value_map": {0: 0, 256: 1, 40_000: 2}}
    assert first_column(root, **options) == [0, 255, 1, 2]
    with pytest.raises(UserError, match="value 256 is not a class; allowed: 0 to 2, 255"):
        first_column(root, num_classes=3)


PALETTE = """# as label_colors.txt
64 128 64\tAnimal
0 0 0  Void
10 20 30 tall grass
192 0 128 Animal
"""


@pytest.fixture
def coloured(root: Path) -> Path:
    colours = np.array([(64, 128, 64), (0, 0, 0), (10, 20, 30), (192, 0, 128)], dtype=np.uint8)
    for mask in (root / "masks").iterdir():
        Image.fromarray(np.repeat(colours[:, None], 4, axis=1)).save(mask)
    (root / "colours.txt").write_text(PALETTE)
    return root


def test_a_palette_file_names_classes_and_colours(coloured: Path) -> None:
    folder = Folder(str(coloured), palette="colours.txt")
    assert folder.class_names == ("Animal", "tall grass")
    assert folder.num_classes == 2
    assert folder.palette.tolist() == [[64, 128, 64], [10, 20, 30]]
    assert folder.dataset("test")[0][1][:, 0].tolist() == [0, 255, 1, 0]


def test_colours_are_found_through_a_files_own_palette(coloured: Path) -> None:
    path = coloured / "masks" / "cell.8.png"
    Image.open(path).quantize(4).save(path)
    assert Image.open(path).mode == "P"
    assert first_column(coloured, palette="colours.txt") == [0, 255, 1, 0]


def test_a_colour_outside_the_palette_names_file_and_colour(coloured: Path) -> None:
    Image.new("RGB", (4, 4), (1, 2, 3)).save(coloured / "masks" / "cell.8.png")
    with pytest.raises(UserError, match=r"cell\.8\.png: colour 1 2 3 is not one of the 4"):
        first_column(coloured, palette="colours.txt")


def test_colours_without_a_palette_file_point_to_it(coloured: Path) -> None:
    with pytest.raises(UserError, match=r"'RGB' \(.*data\.options\.palette"):
        first_column(coloured, num_classes=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3 a\n4 5 b\n", "line 2: expected 'R G B name'"),
        ("1 2 256 a\n", "line 1: expected 'R G B name'"),
        ("1 2 3\n", "line 1: expected 'R G B name'"),
        ("1 2 3 a\n1 2 3 b\n", "line 2: duplicate colour .already used by 'a'."),
        ("1 2 3 a\n0 0 0 void\n", "must be 2 to 255 classes, got 1"),
    ],
)
def test_a_broken_palette_file_is_named(coloured: Path, text: str, message: str) -> None:
    (coloured / "colours.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        Folder(str(coloured), palette="colours.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name the classes"),
        ({"num_classes": 1}, "2 to 255 classes"),
        ({"classes": ["a", "a"]}, "occurs twice"),
        ({"classes": ["a", "b"], "num_classes": 3}, "3, but 2 classes"),
        ({"num_classes": 2, "value_map": {7: 2}}, "7: 2 is not one of the classes, 0 to 1"),
        ({"num_classes": 3, "val_ratio": 1.0}, "val_ratio"),
        ({"palette": "colours.txt"}, "no file .*colours.txt; write 'R G B name'"),
        ({"palette": "colours.txt", "num_classes": 3}, "leave out classes, num_classes"),
    ],
)
def test_wrong_options_are_refused(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Folder(str(root), **options)


def test_two_images_of_one_stem_are_refused(root: Path) -> None:
    Image.new("RGB", (4, 4)).save(root / "images" / "cell.0.jpg")
    with pytest.raises(UserError, match="have the same name"):
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


def test_images_may_lie_outside_the_root(root: Path, tmp_path_factory: Any) -> None:
    away = tmp_path_factory.mktemp("away") / "photos"
    (root / "images").rename(away)
    Image.new("RGB", (4, 4)).save(away / "more.png")
    for folder in (str(away), os.path.relpath(away, root)):
        benchmark = Folder(str(root), num_classes=3, images=folder)
        assert benchmark.dataset("train")[0][0].shape == (3, 4, 4)
        unlabelled = benchmark.unlabelled()
        assert unlabelled is not None
        assert unlabelled.names[0].endswith("photos/more.png")


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
    (tmp_path / "images" / "bare.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"bare\.png: .* at most 0 may be"):
        unlabelled[0]
    Image.new("RGB", (8, 8), (7, 7, 7)).save(tmp_path / "images" / "bare2.png")
    skipping = Folder(str(tmp_path), classes=["x", "y"], skip=0.5).unlabelled()
    assert skipping is not None
    assert skipping[0][0].eq(7).all()
    with pytest.raises(UserError, match="skip: must be a share"):
        Folder(str(tmp_path), classes=["x", "y"], skip=2)
