"""CamVid as SegNet and as Cambridge laid it out, in miniature, with its faults."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.benchmarks.camvid import COLOURS, ORIGINAL, ORIGINAL_CLASSES, camvid
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
        camvid(str(root)).dataset(split)[index]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_items_are_uint8_images_and_masks_in_list_order_with_void_ignored(root: Path) -> None:
    dataset = camvid(str(root)).dataset("val")
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


def test_the_class_tables_have_eleven_entries(root: Path) -> None:
    benchmark = camvid(str(root))
    assert len(benchmark.class_names) == benchmark.num_classes == 11
    assert benchmark.palette.shape == (11, 3)
    assert benchmark.class_names[3] == "road"
    assert benchmark.class_names[10] == "bicyclist"


def test_the_original_lists_of_two_paths_a_line_are_read(root: Path) -> None:
    lines = "/SegNet/CamVid/train/train_a.png /SegNet/CamVid/trainannot/train_a.png\n"
    (root / "train.txt").write_text(lines)
    assert camvid(str(root)).dataset("train").names == ["train_a"]


def test_missing_folder_shows_the_expected_tree_and_the_key(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert f"there is no folder {tmp_path / 'nowhere'}" in message
    assert "{train,val,test}annot/*.png" in message
    assert "data.root=" in message


def test_no_root_shows_the_expected_tree_and_the_key() -> None:
    with pytest.raises(UserError, match=r"data\.root="):
        camvid(None)


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
    assert "cannot be decoded" in message


def test_file_that_is_no_image_is_named(root: Path) -> None:
    path = root / "train" / "train_b.jpg"
    path.write_text("not an image")
    assert str(path) in refusal(root)


def test_mask_of_another_size_is_named_with_both_sizes(root: Path) -> None:
    path = root / "trainannot" / "train_b.png"
    Image.fromarray(np.zeros((HEIGHT, WIDTH - 1), dtype=np.uint8)).save(path)
    message = refusal(root)
    assert str(path) in message
    assert "6x7 px (height x width)" in message
    assert "6x8" in message


def test_mask_value_outside_the_classes_is_named_with_the_allowed_ones(root: Path) -> None:
    path = root / "trainannot" / "train_b.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 12, dtype=np.uint8)).save(path)
    message = refusal(root)
    assert str(path) in message
    assert "value 12" in message
    assert message.endswith("allowed: 0 to 11")


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
        camvid(str(root)).dataset("trian")


FRAMES = {
    "train": ["0001TP_008520", "0006R0_f00930", "0016E5_00390", "0016E5_08640"],
    "val": ["0016E5_07959", "0016E5_08159"],
    "test": ["0001TP_008550", "Seq05VD_f00000"],
}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A frame at each border of the splits; a mask has a column of each of the 32 colours."""
    colours = [colour for group in ORIGINAL.values() for colour in group.values()]
    mask = np.array([[*colours, (0, 0, 0)]] * HEIGHT, dtype=np.uint8)
    for folder in ("701_StillsRaw_full", "LabeledApproved_full"):
        (tmp_path / folder).mkdir()
    for name in (frame for frames in FRAMES.values() for frame in frames):
        Image.new("RGB", (32, HEIGHT)).save(tmp_path / f"701_StillsRaw_full/{name}.png")
        Image.fromarray(mask).save(tmp_path / f"LabeledApproved_full/{name}_L.png")
    return tmp_path


def test_the_original_colours_are_grouped_into_the_classes(original: Path) -> None:
    mask = camvid(str(original)).dataset("val")[0][1]
    sizes = [1, 5, 2, 3, 3, 2, 3, 1, 5, 4, 2]  # original classes a class
    expected = [number for number, size in enumerate(sizes) for _ in range(size)] + [255]
    assert mask[0].tolist() == mask[-1].tolist() == expected


def test_the_grouping_is_that_of_the_example_it_cites() -> None:
    names = list(COLOURS)
    assert ORIGINAL_CLASSES[128, 0, 192] == names.index("road")  # LaneMkgsDriv
    assert ORIGINAL_CLASSES[128, 128, 192] == names.index("pavement")  # RoadShoulder
    assert ORIGINAL_CLASSES[192, 128, 64] == names.index("pedestrian")  # Child
    assert ORIGINAL_CLASSES[192, 0, 192] == names.index("bicyclist")  # MotorcycleScooter
    assert len(ORIGINAL_CLASSES) == 32


def test_without_lists_the_original_frames_go_to_segnets_splits(original: Path) -> None:
    benchmark = camvid(str(original))
    assert {split: sorted(benchmark.dataset(split).names) for split in FRAMES} == FRAMES


def test_lists_beside_the_original_are_used(original: Path) -> None:
    for split, frame in (("train", 0), ("val", 1), ("test", 2)):
        (original / f"{split}.txt").write_text(f"{FRAMES['train'][frame]}\n")
    assert camvid(str(original)).dataset("test").names == ["0016E5_00390"]


def test_a_strange_frame_of_the_original_is_named(original: Path) -> None:
    for folder, name in (("701_StillsRaw_full", "x.png"), ("LabeledApproved_full", "x_L.png")):
        Image.new("RGB", (32, HEIGHT)).save(original / folder / name)
    assert "'x' is not one of the 701 frames" in refusal(original)


def test_a_split_without_frames_is_named(original: Path) -> None:
    for name in FRAMES["val"]:
        (original / f"701_StillsRaw_full/{name}.png").unlink()
    assert "701_StillsRaw_full has no frames of val" in refusal(original)


def test_a_colour_that_is_no_class_is_named(original: Path) -> None:
    path = original / "LabeledApproved_full" / "0016E5_07959_L.png"
    Image.new("RGB", (32, HEIGHT), (1, 2, 3)).save(path)
    line = refusal(original, "val")
    assert f"{path}: colour 1 2 3 is not one of the 32 in the palette" in line
