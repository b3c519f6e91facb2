"""`folder`: your own images and masks, paired by name, with a list file a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.benchmarks import IGNORE_INDEX, Task, distinct_colours, hold_out
from distill.benchmarks.files import MaskedImages, Pair, image_files, read_pairs
from distill.benchmarks.images import UnlabelledImages
from distill.errors import UserError, nearest

SPLITS = ("train", "val", "test")


class Folder:
    """A segmentation benchmark from `root/images/`, `root/masks/` and `root/{train,val,test}.txt`.

    Without a val list, a share of the train list is held out; without a test list there is no test
    split. Images that no list names need no mask: they serve unlabelled.

    Example, the options for Oxford Pets: `classes: [background, pet]`,
    `value_map: {1: 1, 2: 0, 3: 255}`, `masks: annotations/trimaps`,
    `train_list: annotations/trainval.txt`, `test_list: annotations/test.txt`.

    Args:
        root: The folder.
        classes: Names of the classes, in the order of their numbers.
        num_classes: Their number, where names do not matter.
        value_map: From a value in the mask files to its class, or to 255: ignored. Without it,
            the value is the class.
        ignore_values: More values that are ignored; 255 always is, unless `value_map` has it.
        images: Folder of the images in `root`.
        masks: Folder of the masks in `root`: one channel, the stem of their image.
        train_list: List file in `root`, one image name a line.
        val_list: The same for val; may be missing.
        test_list: The same for test; may be missing.
        val_ratio: Share of the train list that is held out for val where there is no val list.
        split_seed: Chooses the held-out images.
    """

    name = "folder"
    task: Task = "segmentation"
    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        root: str | None,
        *,
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        value_map: Mapping[int, int] | None = None,
        ignore_values: Sequence[int] = (),
        images: str = "images",
        masks: str = "masks",
        train_list: str = "train.txt",
        val_list: str = "val.txt",
        test_list: str = "test.txt",
        val_ratio: float = 0.1,
        split_seed: int = 0,
    ) -> None:
        if root is None:
            raise UserError(
                "folder: no folder given; say with data.root=FOLDER where images/, masks/ and "
                "train.txt are"
            )
        self.class_names = _class_names(classes, num_classes)
        self.num_classes = len(self.class_names)
        self.palette = distinct_colours(self.num_classes)
        self.root = Path(root)
        self._classes = _class_of_value(self.num_classes, value_map, ignore_values)

        image_paths, mask_paths = image_files(self.root / images), image_files(self.root / masks)
        lists = {"train": train_list, "val": val_list, "test": test_list}
        self._pairs = {
            split: read_pairs(self.root / file, image_paths, mask_paths)
            for split, file in lists.items()
            if split == "train" or (self.root / file).exists()
        }
        listed = {pair.image for pairs in self._pairs.values() for pair in pairs}
        self._bare = [path for path in image_paths.values() if path not in listed]
        if "val" not in self._pairs:
            self._hold_out_val(val_ratio, split_seed)

    def _hold_out_val(self, ratio: float, seed: int) -> None:
        train = self._pairs["train"]
        if not 0.0 < ratio < 1.0 or len(train) < 2:
            raise UserError(
                f"data.options.val_ratio: {ratio} of {len(train)} images leaves no train or no val "
                "split; take a share between 0 and 1, or write val.txt"
            )
        count = min(max(round(ratio * len(train)), 1), len(train) - 1)
        kept, held = hold_out(len(train), count, seed)
        self._pairs["train"] = [train[index] for index in kept]
        self._pairs["val"] = [train[index] for index in held]

    def dataset(self, split: str) -> MaskedImages:
        """The pairs of `train`, `val` or, where there is a list for it, `test`."""
        if split not in SPLITS:
            raise UserError(f"folder has no split {split!r}; {nearest(split, SPLITS)}")
        if split not in self._pairs:
            raise UserError(f"{self.root} has no test list; write test.txt, or evaluate on val")
        pairs: list[Pair] = self._pairs[split]
        return MaskedImages(pairs, self._classes)

    def unlabelled(self) -> UnlabelledImages | None:
        """The images that no list names."""
        return UnlabelledImages(self.root, self._bare) if self._bare else None


def _class_names(classes: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...]:
    if classes is None and num_classes is None:
        raise UserError("folder: name the classes: data.options.classes=[background, ...]")
    names = tuple(classes) if classes else tuple(f"class {i}" for i in range(num_classes or 0))
    if num_classes not in (None, len(names)):
        raise UserError(
            f"data.options.num_classes: {num_classes}, but {len(names)} classes are named"
        )
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise UserError(f"data.options.classes: 2 to {IGNORE_INDEX} classes, not {len(names)}")
    if len(set(names)) != len(names):
        raise UserError(f"data.options.classes: a name occurs twice in {', '.join(names)}")
    return names


def _class_of_value(
    num_classes: int, value_map: Mapping[int, int] | None, ignore_values: Sequence[int]
) -> dict[int, int]:
    """The table that `read_mask` looks values up in."""
    chosen = value_map if value_map is not None else {i: i for i in range(num_classes)}
    table = {IGNORE_INDEX: IGNORE_INDEX} | {int(value): int(to) for value, to in chosen.items()}
    for value, target in table.items():
        if value < 0 or not (0 <= target < num_classes or target == IGNORE_INDEX):
            raise UserError(
                f"data.options.value_map: {value}: {target} is none of the classes 0 to "
                f"{num_classes - 1} and not {IGNORE_INDEX} (ignored)"
            )
    return table | {int(value): IGNORE_INDEX for value in ignore_values}
