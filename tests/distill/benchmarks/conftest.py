"""Every data set in miniature, in the layout in which its publisher's archives unpack.

An image is 8 px wide; each row of its mask has one value, so that a mask is read off as a column.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import ArrayLike
from PIL import Image
from torchvision import datasets

from distill.benchmarks import Benchmark
from distill.errors import UserError
from distill.registry import resolve
from tests.distill.benchmarks import faces

WIDTH = 8
# What the rows of every mask hold, in the file's own convention.
ROWS: Mapping[str, tuple[int, ...]] = {
    "camvid": (0, 1, 10, 11),
    "voc2012": (0, 1, 20, 255),
    "ade20k": (0, 1, 2, 150),
    "cityscapes": (0, 7, 8, 11, 14, 31, 33),
    "coco_stuff": (0, 9, 10, 12, 89, 91, 181, 255),
    "oxford_pets": (1, 2, 3),
    "folder": (0, 1, 2, 255),
}


def save(path: Path, rows: ArrayLike, mode: str | None = None) -> None:
    """A picture whose rows have these values (or colours), in folders made for it."""
    values = np.asarray(rows)
    pixels = np.repeat(values[:, None], WIDTH, axis=1)
    picture = Image.fromarray(pixels if values.dtype == np.uint16 else pixels.astype(np.uint8))
    if mode == "P":
        picture.putpalette([channel for level in range(256) for channel in (level, 0, 255 - level)])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def photo(path: Path, height: int, grey: int = 40) -> None:
    save(path, np.full((height, 3), grey))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def camvid(root: Path) -> None:
    for split in ("train", "val", "test"):
        photo(root / split / f"{split}_a.png", 4)
        save(root / f"{split}annot" / f"{split}_a.png", ROWS["camvid"])
        write(root / f"{split}.txt", f"{split}_a\n")


def voc2012(root: Path) -> None:
    base = root / "VOCdevkit/VOC2012"
    for name in ("a", "b", "c"):
        photo(base / f"JPEGImages/{name}.jpg", 4)
    for name in ("a", "c"):
        save(base / f"SegmentationClass/{name}.png", ROWS["voc2012"], mode="P")
    save(base / "SegmentationClassAug/b.png", ROWS["voc2012"])
    for split, names in (("train", "a\n"), ("val", "c\n"), ("trainaug", "b\n")):
        write(base / f"ImageSets/Segmentation/{split}.txt", names)


def ade20k(root: Path) -> None:
    base = root / "ADEChallengeData2016"
    for folder, stem in (("training", "ADE_train"), ("validation", "ADE_val")):
        for number in (1, 2):
            photo(base / f"images/{folder}/{stem}_{number:08}.jpg", 4)
            save(base / f"annotations/{folder}/{stem}_{number:08}.png", ROWS["ade20k"])


def cityscapes(root: Path) -> None:
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        stem = f"{split}/{city}/{city}_000000_000019"
        photo(root / f"leftImg8bit/{stem}_leftImg8bit.png", 7)
        save(root / f"gtFine/{stem}_gtFine_labelIds.png", ROWS["cityscapes"])
        save(root / f"gtFine/{stem}_gtFine_instanceIds.png", ROWS["cityscapes"])


def coco_stuff(root: Path) -> None:
    for split in ("train", "val"):
        photo(root / f"{split}2017/000000000009.jpg", 8)
        save(root / f"stuffthingmaps/{split}2017/000000000009.png", ROWS["coco_stuff"])


def oxford_pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "Birman_2", "pug_3"):
        photo(base / f"images/{name}.jpg", 3)
        save(base / f"annotations/trimaps/{name}.png", ROWS["oxford_pets"])
        (base / f"annotations/trimaps/._{name}.png").write_bytes(b"as in the archive")
    write(base / "annotations/trainval.txt", "Abyssinian_1 1 1 1\nBirman_2 8 1 2\n")
    write(base / "annotations/test.txt", "pug_3 30 2 25\n")


def celebamask_hq(root: Path) -> None:
    """512 px become 4: rows of skin at 0 and 1, hair over the second, and nothing below."""
    base = root / "CelebAMask-HQ"
    lines = ["idx\torig_idx\torig_file"]
    for number, celeba in ((0, 162_770), (1, 162_771), (2, 182_637), (2_000, 182_638)):
        photo(base / f"CelebA-HQ-img/{number}.jpg", 16)
        stem = base / f"CelebAMask-HQ-mask-anno/{number // 2_000}/{number:05}"
        white, black = (255, 255, 255), (0, 0, 0)
        save(stem.with_name(f"{stem.name}_skin.png"), [white, white, black, black])
        save(stem.with_name(f"{stem.name}_hair.png"), [black, white, black, black])
        lines.append(f"{number}\t{celeba}\t{celeba + 1:06}.jpg")
    write(base / "CelebA-HQ-to-CelebA-mapping.txt", "\n".join(lines))


def pickled(path: Path, content: dict[str, Any]) -> list[str]:
    data = pickle.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return [path.name, hashlib.md5(data).hexdigest()]


def cifar10(root: Path) -> None:
    """Image n is filled with n and has class n % 10; torchvision is told the MD5 sums."""

    def batch(first: int, count: int) -> dict[str, Any]:
        values = np.arange(first, first + count)
        pixels = np.repeat(values[:, None], 3072, axis=1).astype(np.uint8)
        return {"data": pixels, "labels": (values % 10).tolist()}

    base = root / "cifar-10-batches-py"
    datasets.CIFAR10.train_list = [
        pickled(base / f"data_batch_{number + 1}", batch(10 * number, 10)) for number in range(5)
    ]
    datasets.CIFAR10.test_list = [pickled(base / "test_batch", batch(100, 2))]
    meta = pickled(base / "batches.meta", {"label_names": []})
    datasets.CIFAR10.meta = {"filename": meta[0], "key": "label_names", "md5": meta[1]}


def cifar100(root: Path) -> None:
    """As `cifar10`, but class 99 - n; and in one file each."""
    base = root / "cifar-100-python"

    def images(count: int) -> dict[str, Any]:
        pixels = np.repeat(np.arange(count)[:, None], 3072, axis=1).astype(np.uint8)
        fine = list(range(99, 99 - count, -1))
        return {"data": pixels, "fine_labels": fine, "coarse_labels": [0] * count}

    datasets.CIFAR100.train_list = [pickled(base / "train", images(50))]
    datasets.CIFAR100.test_list = [pickled(base / "test", images(2))]
    meta = pickled(base / "meta", {"fine_label_names": []})
    datasets.CIFAR100.meta = {"filename": meta[0], "key": "fine_label_names", "md5": meta[1]}


def tiny_imagenet(root: Path) -> None:
    base = root / "tiny-imagenet-200"
    write(base / "wnids.txt", "n03126707\nn02012849\nn01443537\n")
    words = ("n01443537\tgoldfish, Carassius auratus", "n02012849\tcrane", "n03126707\tcrane")
    write(base / "words.txt", "\n".join((*words, "n09999999\tnot one of the classes")))
    for wnid in ("n01443537", "n02012849", "n03126707"):
        photo(base / f"train/{wnid}/images/{wnid}_0.JPEG", 8)
        write(base / f"train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t8\t8\n")
    photo(base / "val/images/val_0.JPEG", 8)
    photo(base / "val/images/val_1.JPEG", 8, grey=90)
    boxes = "val_0.JPEG\tn03126707\t0\t0\t8\t8\nval_1.JPEG\tn01443537\t0\t0\t8\t8\n"
    write(base / "val/val_annotations.txt", boxes)


def imagenet(root: Path) -> None:
    for split in ("train", "val"):
        for wnid in ("n01440764", "n15075141"):
            photo(root / split / wnid / f"{wnid}_1.JPEG", 8)


def image_folder(root: Path) -> None:
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "dog"), ("test", "dog")):
        photo(root / split / name / "deeper" / "1.png", 8)
        write(root / split / name / "notes.txt", "no image")


def folder(root: Path) -> None:
    for name in ("a", "b", "c"):
        photo(root / f"images/{name}.png", 4)
        save(root / f"masks/{name}.png", ROWS["folder"], mode="P")
    write(root / "train.txt", "a\nb\n")
    write(root / "test.txt", "c\n")


class Miniature(NamedTuple):
    """Writes a data set below a folder; each of the `needed` parts, once gone, is missed."""

    write: Callable[[Path], None]
    needed: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}


VOC, ADE, FACES = "VOCdevkit/VOC2012", "ADEChallengeData2016", "CelebAMask-HQ"
PETS, TINY = "oxford-iiit-pet", "tiny-imagenet-200"
MINIATURES = {
    "shapes": Miniature(lambda root: None),
    "camvid": Miniature(camvid, ("val", "testannot", "train.txt")),
    "voc2012": Miniature(
        voc2012,
        (
            *(f"{VOC}/{part}" for part in ("JPEGImages", "JPEGImages/a.jpg", "SegmentationClass")),
            *(f"{VOC}/{part}" for part in ("SegmentationClass/c.png", "ImageSets")),
        ),
    ),
    "ade20k": Miniature(
        ade20k,
        (
            *(f"{ADE}/{part}" for part in ("images/validation", "annotations/training")),
            f"{ADE}/annotations/validation/ADE_val_00000001.png",
        ),
    ),
    "cityscapes": Miniature(
        cityscapes,
        (
            *("leftImg8bit/val", "gtFine/train"),
            "gtFine/train/bochum/bochum_000000_000019_gtFine_labelIds.png",
        ),
    ),
    "coco_stuff": Miniature(coco_stuff, ("train2017", "stuffthingmaps/val2017")),
    "oxford_pets": Miniature(
        oxford_pets,
        (
            *(f"{PETS}/{part}" for part in ("images", "images/pug_3.jpg", "annotations/test.txt")),
            *(f"{PETS}/annotations/{part}" for part in ("trainval.txt", "trimaps")),
        ),
    ),
    "celebamask_hq": Miniature(
        celebamask_hq,
        (
            *(f"{FACES}/{part}" for part in ("CelebA-HQ-img", "CelebA-HQ-img/2.jpg")),
            f"{FACES}/CelebAMask-HQ-mask-anno/1",
        ),
    ),
    "wflw": Miniature(
        faces.wflw,
        (
            *("WFLW_images", "WFLW_images/train--Event/1.png"),
            *(faces.LISTS.format(split) for split in ("train", "test")),
        ),
    ),
    "cifar10": Miniature(cifar10, ("cifar-10-batches-py",), {"val": 15}),
    "cifar100": Miniature(cifar100, ("cifar-100-python",), {"val": 15}),
    "tiny_imagenet": Miniature(
        tiny_imagenet,
        (
            *(f"{TINY}/{part}" for part in ("wnids.txt", "words.txt", "train", "val/images")),
            *(f"{TINY}/val/{part}" for part in ("val_annotations.txt", "images/val_1.JPEG")),
        ),
    ),
    "imagenet": Miniature(imagenet, ("train", "val")),
    "image_folder": Miniature(image_folder, ("train",)),
    "folder": Miniature(folder, (), {"num_classes": 3}),
}
Build = Callable[..., Benchmark]
Refusal = Callable[..., str]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Lay a data set out in `tmp_path`, the first time, and open it with options."""
    for source in (datasets.CIFAR10, datasets.CIFAR100):
        for attribute in ("train_list", "test_list", "meta"):
            monkeypatch.setattr(source, attribute, getattr(source, attribute))  # put back after

    laid_out: set[str] = set()

    def make(name: str, **options: Any) -> Benchmark:
        if name not in laid_out:
            MINIATURES[name].write(tmp_path)
            laid_out.add(name)
        factory = resolve("benchmarks", name, "data.benchmark")
        built: Benchmark = factory(str(tmp_path), **{**MINIATURES[name].options, **options})
        return built

    return make


@pytest.fixture
def refusal(build: Build) -> Refusal:
    """The one line with which a data set is refused, at the latest when it is read."""

    def check(name: str, split: str = "train", index: int = 0, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            build(name, **options).dataset(split)[index]
        line = str(caught.value)
        assert "\n" not in line
        return line

    return check


@pytest.fixture
def miniatures() -> Mapping[str, Miniature]:
    return MINIATURES


@pytest.fixture
def rows() -> Callable[..., None]:
    """`save`, for tests that write files of their own."""
    return save
