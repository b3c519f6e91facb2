"""CIFAR-10's files in miniature: ten training images and two test images a batch file."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from distill.benchmarks.cifar10 import cifar10
from distill.errors import UserError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The batches of torchvision's list, with torchvision told their MD5 sums.

    Training image n is filled with the value n and has class n % 10.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict[str, object]) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(first: int, count: int) -> dict[str, object]:
        values = np.arange(first, first + count)
        pixels = np.repeat(values[:, None], 3072, axis=1).astype(np.uint8)
        return {"data": pixels, "labels": (values % 10).tolist()}

    train = [write(f"data_batch_{number + 1}", batch(10 * number, 10)) for number in range(5)]
    test = [write("test_batch", batch(100, 2))]
    meta = write("batches.meta", {"label_names": []})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )
    return tmp_path


def test_train_and_val_share_the_training_images_without_overlap(root: Path) -> None:
    benchmark = cifar10(str(root), val=15)
    train, val = benchmark.dataset("train"), benchmark.dataset("val")
    assert (len(train), len(val)) == (35, 15)
    assert sorted(train.names + val.names) == sorted(f"train/{n}" for n in range(50))


def test_the_held_out_images_depend_on_the_split_seed_alone(root: Path) -> None:
    names = [cifar10(str(root), val=15, split_seed=seed).dataset("val").names for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_an_item_is_its_own_image_and_class(root: Path) -> None:
    train = cifar10(str(root), val=15).dataset("train")
    for index, name in enumerate(train.names):
        number = int(name.removeprefix("train/"))
        image, target = train[index]
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.uint8
        assert set(image.flatten().tolist()) == {number}
        assert target == train.targets[index] == number % 10


def test_test_split_is_the_test_batch(root: Path) -> None:
    test = cifar10(str(root)).dataset("test")
    assert [(int(image[0, 0, 0]), target) for image, target in (test[0], test[1])] == [
        (100, 0),
        (101, 1),
    ]


def test_missing_folder_says_how_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar-10-batches-py.*data\.root=") as caught:
        cifar10(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_altered_batch_is_never_opened(root: Path) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="MD5"):
        cifar10(str(root)).dataset("train")
