"""`cifar10`: 32 px photographs of ten classes (Krizhevsky 2009), read by torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from distill.benchmarks import IGNORE_INDEX, Task, distinct_colours, hold_out
from distill.errors import UserError, nearest

SPLITS = ("train", "val", "test")


class ImagesInMemory(Dataset[tuple[Tensor, int]]):
    """Some of torchvision's images. Items: image (3, 32, 32) uint8, class.

    Args:
        source: All images of the file set.
        indices: Those to show.
        prefix: "train" or "test", the file set's part in `names`.
    """

    def __init__(self, source: datasets.CIFAR10, indices: Sequence[int], prefix: str) -> None:
        self.images = torch.from_numpy(source.data[list(indices)]).permute(0, 3, 1, 2).contiguous()
        self.targets = [int(source.targets[index]) for index in indices]
        self.names = [f"{prefix}/{index}" for index in indices]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


class CIFAR10:
    """CIFAR-10: train and val share its 50,000 training images, test has its 10,000.

    Args:
        root: Folder that holds `cifar-10-batches-py/`.
        val: Number of training images held out for val.
        split_seed: Chooses them.
    """

    name = "cifar10"
    task: Task = "classification"
    class_names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    num_classes = len(class_names)
    ignore_index = IGNORE_INDEX
    palette = distinct_colours(num_classes)

    def __init__(self, root: str | None, *, val: int = 5_000, split_seed: int = 0) -> None:
        expected = "give the folder that holds cifar-10-batches-py/ with data.root=FOLDER"
        if root is None:
            raise UserError(f"cifar10: no folder given; {expected}")
        if not Path(root, datasets.CIFAR10.base_folder).is_dir():
            raise UserError(
                f"cifar10: there is no {root}/{datasets.CIFAR10.base_folder}; {expected}"
            )
        if not 0 <= val < 50_000:
            raise UserError(f"data.options.val: 0 to 49999 of the training images, not {val}")
        self.root, self.val, self.split_seed = root, val, split_seed

    def dataset(self, split: str) -> ImagesInMemory:
        """The images of `train`, `val` or `test`. A UserError on altered files."""
        if split not in SPLITS:
            raise UserError(f"cifar10 has no split {split!r}; {nearest(split, SPLITS)}")
        if split == "test":
            source = self._load(train=False)
            return ImagesInMemory(source, range(len(source.targets)), "test")
        source = self._training_files
        kept, held = hold_out(len(source.targets), self.val, self.split_seed)
        return ImagesInMemory(source, kept if split == "train" else held, "train")

    @cached_property
    def _training_files(self) -> datasets.CIFAR10:
        return self._load(train=True)

    def _load(self, train: bool) -> datasets.CIFAR10:
        # The files are pickles. torchvision compares their MD5 sums with the published ones before
        # it opens any, so that nobody's altered pickle is run.
        try:
            return datasets.CIFAR10(self.root, train=train, download=False)
        except RuntimeError as error:
            raise UserError(
                f"cifar10: files in {self.root}/{datasets.CIFAR10.base_folder} are missing or "
                "altered (MD5); unpack cifar-10-python.tar.gz there again"
            ) from error
