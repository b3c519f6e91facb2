"""NYUv2 in miniature: BTS's layout, millimetres, what is measured, and the Eigen crop."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.benchmarks.nyuv2 import NYUv2
from distill.errors import UserError


def write(folder: Path, depth: np.ndarray) -> None:
    """An image with depth in millimetres."""
    folder.mkdir(parents=True)
    height, width = depth.shape
    Image.fromarray(np.full((height, width, 3), 50, np.uint8)).save(folder / "rgb_00045.jpg")
    Image.fromarray(depth.astype(np.uint16)).save(folder / "sync_depth_00045.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four scenes of train and one of test, each of one image."""
    lines = []
    for number in range(4):
        depth = np.full((4, 6), 1_000 * (number + 1))
        depth[0] = [0, 1, 2, 9_999, 10_000, 65_535]
        write(tmp_path / f"sync/scene_{number}", depth)
        lines.append(f"/scene_{number}/rgb_00045.jpg /scene_{number}/sync_depth_00045.png 518.8")
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").write_text("\n".join(lines) + "\n")
    write(tmp_path / "official_splits/test/office", np.full((480, 640), 2_500))
    line = "office/rgb_00045.jpg office/sync_depth_00045.png 518.8579\n"
    (tmp_path / "nyudepthv2_test_files_with_gt.txt").write_text(line)
    return tmp_path


def test_depth_is_in_metres_and_nan_where_it_is_not_measured(root: Path) -> None:
    examples = NYUv2(str(root)).depths("train")
    image, depth = examples[0]
    assert (image.shape, image.dtype) == ((3, 4, 6), torch.uint8)
    assert (depth.shape, depth.dtype) == ((4, 6), torch.float32)
    assert depth[0].isnan().tolist() == [True, True, False, False, True, True]
    assert depth[0, 2:4].tolist() == pytest.approx([0.002, 9.999])
    scene = int(examples.names[0].removeprefix("scene_").removesuffix("/rgb_00045"))
    assert torch.equal(depth[1:], torch.full((3, 6), scene + 1.0))


def test_only_the_eigen_crop_of_test_is_scored(root: Path) -> None:
    image, depth = NYUv2(str(root)).depths("test")[0]
    assert image.shape == (3, 480, 640)
    known = ~depth.isnan()
    assert known.sum() == (471 - 45) * (601 - 41)
    assert known[45, 41]
    assert known[470, 600]
    assert not known[44, 41]
    assert not known[470, 601]
    assert (depth[known] == 2.5).all()


def test_val_is_scenes_of_train_that_are_held_out(root: Path) -> None:
    benchmark = NYUv2(str(root), val_ratio=0.5)
    train, val = (set(benchmark.depths(split).names) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 2)
    assert not train & val
    assert NYUv2(str(root), val_ratio=0.5).depths("val").names == benchmark.depths("val").names
    with pytest.raises(UserError, match=r"data\.options\.val_ratio: 1\.5 of 4"):
        NYUv2(str(root), val_ratio=1.5)


def test_another_number_of_images_than_published_is_said(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    NYUv2(str(root))
    err = capsys.readouterr().err
    assert err.startswith("distill: nyuv2: train has 4 of 24231 images, test has 1 of 654 images;")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "part",
    [
        *("sync", "official_splits/test/office/sync_depth_00045.png"),
        *("nyudepthv2_train_files_with_gt.txt", "nyudepthv2_test_files_with_gt.txt"),
    ],
)
def test_a_missing_part_shows_the_tree_and_the_source(root: Path, part: str) -> None:
    gone = root / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(UserError) as caught:
        NYUv2(str(root))
    line = str(caught.value)
    assert line.startswith("nyuv2: ")
    assert part in line
    assert "; expected in data.root=FOLDER: sync/SCENE/{rgb_*.jpg,sync_depth_*.png}" in line
    assert "; get it from github.com/cleinc/bts" in line


def test_a_depth_of_eight_bits_or_another_size_is_named(root: Path) -> None:
    path = root / "official_splits/test/office/sync_depth_00045.png"
    for pixels, told in (
        (np.zeros((480, 640), np.uint8), "one 16-bit channel; this file's mode is 'L'"),
        (np.zeros((4, 4), np.uint16), "4x4 px (height x width), but its image is 480x640"),
    ):
        Image.fromarray(pixels).save(path)
        with pytest.raises(UserError) as caught:
            NYUv2(str(root)).depths("test")[0]
        assert str(path) in str(caught.value)
        assert told in str(caught.value)


def test_a_line_without_two_files_is_named(root: Path) -> None:
    (root / "nyudepthv2_test_files_with_gt.txt").write_text("office/rgb_00045.jpg\n")
    with pytest.raises(
        UserError, match="line 1: expected an image and a depth file, got 'office/rgb_00045"
    ):
        NYUv2(str(root))


def test_an_unknown_split_names_the_nearest(root: Path) -> None:
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        NYUv2(str(root)).depths("trian")


def test_without_a_root_the_key_is_named() -> None:
    with pytest.raises(UserError, match=r"^nyuv2: no folder given; .*data\.root=FOLDER"):
        NYUv2(None)


def test_the_scenes_of_a_room_are_in_one_split(root: Path) -> None:
    names = root / "nyudepthv2_train_files_with_gt.txt"
    text = names.read_text()
    for old, new in zip("0123", ("0001a", "0001b", "0002a", "0002b"), strict=True):
        (root / f"sync/scene_{old}").rename(root / f"sync/scene_{new}")
        text = text.replace(f"scene_{old}/", f"scene_{new}/")
    names.write_bytes(b"\xef\xbb\xbf" + text.encode())
    for seed in range(4):
        benchmark = NYUv2(str(root), val_ratio=0.5, split_seed=seed)
        train, val = (
            {name.partition("/")[0][:-1] for name in benchmark.depths(split).names}  # type: ignore[attr-defined]
            for split in ("train", "val")
        )
        assert sorted([*train, *val]) == ["scene_0001", "scene_0002"]


def test_a_list_in_another_encoding_is_named(root: Path) -> None:
    (root / "nyudepthv2_test_files_with_gt.txt").write_bytes(b"caf\xe9/rgb_00045.jpg")
    with pytest.raises(UserError, match=r"test_files_with_gt\.txt is not UTF-8 text"):
        NYUv2(str(root))
