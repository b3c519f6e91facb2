"""CamVid in the SegNet release's layout, in miniature, with its faults."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.benchmarks.camvid import CamVid
from distill.errors import UserError

HEIGHT, WIDTH = 6, 8


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images a split; mask pixel (0, 0) is void, all others the index of the image."""
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}annot").mkdir()
        names = [f"{split}_b", f"{split}_a"]
        for number, name in enumerate(names):
            image = np.full((HEIGHT, WIDTH, 3), 40 * number, dtype=np.uint8)
            mask = np.full((HEIGHT, WIDTH), number, dtype=np.uint8)
            mask[0, 0] = 11
            Image.fromarray(image).save(tmp_path / split / f"{name}.{('jpg', 'png')[number]}")
            Image.fromarray(mask).save(tmp_path / f"{split}annot" / f"{name}.png")
        (tmp_path / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return tmp_path


def refusal(root: Path, split: str = "train", index: int = 0) -> str:
    with pytest.raises(UserError) as caught:
        CamVid(str(root)).dataset(split)[index]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_items_are_uint8_images_and_masks_in_list_order_with_void_ignored(root: Path) -> None:
    dataset = CamVid(str(root)).dataset("val")
    assert dataset.names == ["val_b", "val_a"]
    image, mask = dataset[1]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == torch.uint8
    assert set(image.flatten().tolist()) == {40}
    assert mask.shape == (HEIGHT, WIDTH)
    assert mask.dtype == torch.uint8
    assert mask[0, 0] == 255
    assert mask[0, 1] == 1
    assert set(mask.flatten().tolist()) == {1, 255}


def test_the_class_tables_have_eleven_entries() -> None:
    assert len(CamVid.class_names) == CamVid.num_classes == 11
    assert CamVid.palette.shape == (11, 3)
    assert len(np.unique(CamVid.palette, axis=0)) == 11
    assert CamVid.class_names[3] == "road"
    assert CamVid.class_names[10] == "bicyclist"


def test_the_original_lists_of_two_paths_a_line_are_read(root: Path) -> None:
    lines = "/SegNet/CamVid/train/train_a.png /SegNet/CamVid/trainannot/train_a.png\n"
    (root / "train.txt").write_text(lines)
    assert CamVid(str(root)).dataset("train").names == ["train_a"]


def test_missing_folder_shows_the_expected_tree_and_the_key(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "train") in message
    assert "{train,val,test}annot/*.png" in message
    assert "data.root=" in message


def test_no_root_shows_the_expected_tree_and_the_key() -> None:
    with pytest.raises(UserError, match=r"data\.root="):
        CamVid(None)


def test_missing_list_file_is_named(root: Path) -> None:
    (root / "test.txt").unlink()
    assert str(root / "test.txt") in refusal(root)


def test_listed_name_without_image_is_named_with_its_line(root: Path) -> None:
    (root / "train.txt").write_text("train_a\ntrain_c\n")
    message = refusal(root)
    assert "train.txt, line 2" in message
    assert "train_c" in message


def test_image_without_mask_is_named(root: Path) -> None:
    (root / "trainannot" / "train_a.png").unlink()
    message = refusal(root)
    assert "train_a.png has no mask file" in message


def test_truncated_image_is_named(root: Path) -> None:
    path = root / "train" / "train_b.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    message = refusal(root)
    assert str(path) in message
    assert "does not decode" in message


def test_file_that_is_no_image_is_named(root: Path) -> None:
    path = root / "train" / "train_b.jpg"
    path.write_text("not an image")
    assert str(path) in refusal(root)


def test_mask_of_another_size_is_named_with_both_sizes(root: Path) -> None:
    path = root / "trainannot" / "train_b.png"
    Image.fromarray(np.zeros((HEIGHT, WIDTH - 1), dtype=np.uint8)).save(path)
    message = refusal(root)
    assert str(path) in message
    assert "7x6" in message
    assert "8x6" in message


def test_mask_value_outside_the_classes_is_named_with_the_allowed_ones(root: Path) -> None:
    path = root / "trainannot" / "train_b.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 12, dtype=np.uint8)).save(path)
    message = refusal(root)
    assert str(path) in message
    assert "value 12" in message
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11" in message


def test_coloured_mask_is_refused(root: Path) -> None:
    path = root / "trainannot" / "train_b.png"
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    assert "'RGB'" in refusal(root)


def test_sixteen_bit_image_is_refused_rather_than_clipped(root: Path) -> None:
    path = root / "train" / "train_a.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 4000, dtype=np.uint16)).save(path)
    assert "8-bit" in refusal(root, index=1)


def test_unknown_split_names_the_nearest(root: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'train'"):
        CamVid(str(root)).dataset("trian")
