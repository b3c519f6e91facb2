"""`cifar10`: 32 px photographs of ten classes (Krizhevsky 2009), read by torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from distill.benchmarks import IGNORE_INDEX, Task, distinct_colours, hold_out
from distill.benchmarks.published import Layout, comma_separated
from distill.errors import UserError, nearest

SPLITS = ("train", "val", "test")
NAMES = comma_separated("airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck")
LAYOUT = Layout(
    name="cifar10",
    tree="cifar-10-batches-py/ with data_batch_1 to data_batch_5, test_batch and batches.meta",
    source="www.cs.toronto.edu/~kriz/cifar.html (cifar-10-python.tar.gz)",
)


class ImagesInMemory(Dataset[tuple[Tensor, int]]):
    """A part of torchvision's images. Items: image (3, 32, 32) uint8, class.

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


class CIFAR:
    """CIFAR-10 or CIFAR-100: train and val share its 50,000 training images, test has its 10,000.

    Args:
        source: torchvision's reader.
        layout: The files, for error lines.
        class_names: In the order of the files' numbers.
        root: The folder that holds them.
        val: Number of training images held out for val.
        split_seed: Chooses them.
    """

    task: Task = "classification"
    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        source: type[datasets.CIFAR10],
        layout: Layout,
        class_names: tuple[str, ...],
        root: str | None,
        val: int,
        split_seed: int,
    ) -> None:
        with layout.at(root) as base:
            if not (base / source.base_folder).is_dir():
                raise UserError(f"there is no folder {base / source.base_folder}")
        if not 0 <= val < 50_000:
            raise UserError(f"data.options.val: must be 0 to 49999 training images, got {val}")
        self.source, self.layout, self.class_names = source, layout, class_names
        self.name, self.num_classes = layout.name, len(class_names)
        self.palette = distinct_colours(self.num_classes)
        self.root, self.val, self.split_seed = root, val, split_seed

    def dataset(self, split: str) -> ImagesInMemory:
        """The images of `train`, `val` or `test`. A UserError on altered files."""
        if split not in SPLITS:
            raise UserError(f"{self.name} has no split {split!r}; {nearest(split, SPLITS)}")
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
        with self.layout.at(self.root) as base:
            try:
                return self.source(base, train=train, download=False)
            except RuntimeError as error:
                raise UserError(
                    f"files in {base / self.source.base_folder} are missing or altered (MD5); "
                    f"unpack {self.source.filename} there again"
                ) from error


def cifar10(root: str | None, *, val: int = 5_000, split_seed: int = 0) -> CIFAR:
    """CIFAR-10.

    Args:
        root: Folder that holds `cifar-10-batches-py/`.
        val: Number of training images held out for val.
        split_seed: Chooses them.
    """
    return CIFAR(datasets.CIFAR10, LAYOUT, NAMES, root, val, split_seed)
