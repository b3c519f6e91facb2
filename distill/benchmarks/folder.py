"""`folder`: your own images and masks, paired by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.benchmarks import IGNORE_INDEX, Task, distinct_colours, hold_out_share, notice
from distill.benchmarks.files import Pair, image_files, read_lines, read_pairs
from distill.benchmarks.images import SKIP, UnlabelledImages
from distill.benchmarks.masks import Colour, MaskedImages, MaskReader, read_colour_mask, read_mask
from distill.errors import UserError, nearest

LISTS = {"train": "train.txt", "val": "val.txt", "test": "test.txt"}
LOOKED_AT = 8  # masks, for what they hold
UNSCORED = frozenset({"void", "ignore", "unlabelled", "unlabeled"})


class Folder:
    """A segmentation benchmark from `root/images/`, `root/masks/` and `root/{train,val,test}.txt`.

    Without a val list, a share of the train list is held out; without a test list there is no test
    split. Without any list, all images that have a mask are split by `test_ratio` and `val_ratio`.
    Other images serve unlabelled.

    A mask is a file of one channel of up to 16 bits, or of palette indices, whose values are the
    classes; with `palette` it is a file of colours. A palette file has a line `R G B name` for each
    colour (0 to 255; the rest of the line is the name), as CamVid's label_colors.txt: classes come
    in the order of the lines, lines of one name make one class, and what is named void, ignore or
    unlabelled is not scored.

    Example, the options for Oxford Pets: `classes: [background, pet]`,
    `value_map: {1: 1, 2: 0, 3: 255}`, `masks: annotations/trimaps`,
    `train_list: annotations/trainval.txt`, `test_list: annotations/test.txt`.

    Args:
        root: The folder.
        classes: Names of the classes, in the order of their numbers.
        num_classes: Their number, where names do not matter.
        palette: Palette file in `root`; names the classes too.
        value_map: From a value in the mask files to its class, or to 255: ignored. Without it,
            the value is the class.
        ignore_values: More values that are ignored; 255 always is, unless `value_map` has it.
        images: Folder of the images in `root`.
        masks: Folder of the masks in `root`, of the stems of their images.
        train_list: List file in `root`, one image name per line.
        val_list: List file for val; val.txt may be missing.
        test_list: List file for test; test.txt may be missing.
        val_ratio: Share of the train images that is held out for val where there is no val list.
        test_ratio: Share of all images that is held out for test where there are no lists.
        split_seed: Chooses the held-out images.
        skip: Largest share of the images in no split that may be unreadable; each is named.
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
        palette: str | None = None,
        value_map: Mapping[int, int] | None = None,
        ignore_values: Sequence[int] = (),
        images: str = "images",
        masks: str = "masks",
        train_list: str = LISTS["train"],
        val_list: str = LISTS["val"],
        test_list: str = LISTS["test"],
        val_ratio: float = 0.1,
        test_ratio: float = 0.2,
        split_seed: int = 0,
        skip: float = SKIP,
    ) -> None:
        if root is None:
            raise UserError(
                "folder: no folder given; set data.root=FOLDER to where images/ and masks/ are, "
                "and train.txt if you have lists"
            )
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"data.root: there is no folder {root}")
        if palette is None:
            labels = _numbered(_class_names(classes, num_classes), value_map, ignore_values)
        elif classes or num_classes or value_map or ignore_values:
            raise UserError(
                "data.options.palette already names the classes and the ignored colours: leave out "
                "classes, num_classes, value_map and ignore_values"
            )
        else:
            labels = read_palette(self.root / palette)
        self.class_names, self.palette, self._read = labels
        self.num_classes = len(self.class_names)

        image_paths, mask_paths = image_files(self.root / images), image_files(self.root / masks)
        lists = {"train": train_list, "val": val_list, "test": test_list}
        if lists == LISTS and not any((self.root / file).exists() for file in lists.values()):
            pairs = _same_stems(image_paths, mask_paths)
            self._pairs = _split(pairs, val_ratio, test_ratio, split_seed)
        else:
            self._pairs = _listed(self.root, lists, image_paths, mask_paths)
        if "val" not in self._pairs:
            self._pairs["train"], self._pairs["val"] = hold_out_share(
                self._pairs["train"], val_ratio, split_seed, "data.options.val_ratio"
            )
        _tell_of_shared(self._pairs)
        plain = palette is None and value_map is None and IGNORE_INDEX not in ignore_values
        _tell_of_few_values(self.dataset("train"), self.class_names, plain)
        used = {pair.image for pairs in self._pairs.values() for pair in pairs}
        bare = [path for path in image_paths.values() if path not in used]
        self._bare = UnlabelledImages(self.root, bare, skip)

    def dataset(self, split: str) -> MaskedImages:
        """The pairs of `train`, `val` or, where there is a list for it, `test`."""
        if split not in LISTS:
            raise UserError(f"folder has no split {split!r}; {nearest(split, LISTS)}")
        if split not in self._pairs:
            raise UserError(f"{self.root} has no test list; write test.txt, or evaluate on val")
        return MaskedImages(self._pairs[split], self._read, upright=True)

    def unlabelled(self) -> UnlabelledImages | None:
        """The images that are in no split."""
        return self._bare if len(self._bare) else None


def _same_stems(images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[Pair]:
    """The images that have a mask, all by stem. Raises UserError if none has."""
    pairs = [Pair(images[stem], masks[stem]) for stem in images if stem in masks]
    if not pairs:
        image, mask = next(iter(images.values())), next(iter(masks.values()))
        raise UserError(
            f"folder: no image has a mask of the same name: {image.parent}/ has {image.name}, "
            f"{mask.parent}/ has {mask.name}; a mask must have its image's stem"
        )
    return pairs


def _listed(
    root: Path, lists: Mapping[str, str], images: Mapping[str, Path], masks: Mapping[str, Path]
) -> dict[str, list[Pair]]:
    """The pairs of each split's list file; of the published names only train.txt has to be there.
    Raises UserError."""
    for split, file in lists.items():
        if file != LISTS[split] and not (root / file).is_file():
            raise UserError(
                f"data.options.{split}_list: there is no file {root / file}; write one image name "
                "per line"
            )
    return {
        split: read_pairs(root / file, images, masks)
        for split, file in lists.items()
        if split == "train" or (root / file).exists()
    }


def _split(
    pairs: Sequence[Pair], val_ratio: float, test_ratio: float, seed: int
) -> dict[str, list[Pair]]:
    """Train, val and test of a folder without lists; one line on stderr says so."""
    rest, test = hold_out_share(pairs, test_ratio, seed, "data.options.test_ratio")
    train, val = hold_out_share(rest, val_ratio, seed, "data.options.val_ratio")
    notice(
        f"folder: no list files; data.options.split_seed={seed} made {len(train)} images train, "
        f"{len(val)} val and {len(test)} test"
    )
    return {"train": train, "val": val, "test": test}


def _tell_of_shared(splits: Mapping[str, Sequence[Pair]]) -> None:
    """A line on stderr where lists hold images of train out for val or test."""
    train = {pair.image for pair in splits["train"]}
    for split in ("val", "test"):
        shared = [pair.image for pair in splits.get(split, ()) if pair.image in train]
        if shared:
            notice(
                f"folder: {len(shared)} images of {split} are also in train, such as "
                f"{shared[0].name}; scores on {split} are not those of unseen images"
            )


def _tell_of_few_values(train: MaskedImages, class_names: Sequence[str], plain: bool) -> None:
    """A line on stderr where the first masks have one class, or none; with `plain` values 255 alone
    or with 0 may be a class."""
    seen: set[int] = set()
    for index in range(min(LOOKED_AT, len(train))):
        with suppress(UserError):  # a file that is wrong is named when it is used
            seen |= set(np.unique(train[index][1].numpy()).tolist())
        if len(seen - {IGNORE_INDEX}) > 1:
            return
    if plain and IGNORE_INDEX in seen and seen <= {0, IGNORE_INDEX}:
        held = f"0 and {IGNORE_INDEX}" if 0 in seen else str(IGNORE_INDEX)
        notice(
            f"folder: the first masks contain only {held}, and {IGNORE_INDEX} means no label; "
            f"if it is class 1, set data.options.value_map={{0: 0, {IGNORE_INDEX}: 1}}"
        )
    elif seen:
        held = "".join(f"only {class_names[x]!r}" for x in seen - {IGNORE_INDEX}) or "no class"
        notice(
            f"folder: the first masks contain {held}; if there should be more classes, check "
            "data.options.value_map"
        )


class Labels(NamedTuple):
    """The classes: their names, their (classes, 3) colours, and what reads their masks."""

    class_names: tuple[str, ...]
    palette: NDArray[np.uint8]
    read: MaskReader


def read_palette(path: Path) -> Labels:
    """Read lines `R G B name`. Raises UserError if the file is missing or a line is invalid."""
    if not path.is_file():
        raise UserError(f"data.options.palette: there is no file {path}; write 'R G B name' lines")
    names: dict[Colour, str] = {}
    for row, line in enumerate(read_lines(path), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        *levels, name = line.split(maxsplit=3)
        if len(levels) != 3 or not all(x.isdecimal() and int(x) < 256 for x in levels):
            raise UserError(
                f"{path}, line {row}: expected 'R G B name' with 0 to 255 each, got {line!r}"
            )
        colour = (int(levels[0]), int(levels[1]), int(levels[2]))
        if colour in names:
            raise UserError(
                f"{path}, line {row}: duplicate colour (already used by {names[colour]!r})"
            )
        names[colour] = name.strip()
    first = {
        name: colour for colour, name in reversed(names.items()) if name.lower() not in UNSCORED
    }
    scored = [name for name in dict.fromkeys(names.values()) if name in first]
    class_names = _class_names(scored, None)
    number = {name: number for number, name in enumerate(class_names)}
    classes = {colour: number.get(name, IGNORE_INDEX) for colour, name in names.items()}
    return Labels(
        class_names,
        np.array([first[name] for name in class_names], dtype=np.uint8),
        partial(read_colour_mask, classes=classes, upright=True),
    )


def _class_names(classes: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...]:
    if classes is None and num_classes is None:
        raise UserError("folder: name the classes: data.options.classes=[background, ...]")
    names = tuple(classes) if classes else tuple(f"class {i}" for i in range(num_classes or 0))
    if num_classes not in (None, len(names)):
        raise UserError(
            f"data.options.num_classes: is {num_classes}, but {len(names)} classes are named"
        )
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise UserError(
            f"data.options.classes: must be 2 to {IGNORE_INDEX} classes, got {len(names)}"
        )
    if len(set(names)) != len(names):
        raise UserError(f"data.options.classes: a name occurs twice in {', '.join(names)}")
    return names


def _numbered(
    class_names: tuple[str, ...],
    value_map: Mapping[int, int] | None,
    ignore_values: Sequence[int],
) -> Labels:
    """Masks of numbers: those that `value_map` has, by default the classes themselves."""
    count = len(class_names)
    chosen = value_map if value_map is not None else {i: i for i in range(count)}
    table = {IGNORE_INDEX: IGNORE_INDEX} | {int(value): int(to) for value, to in chosen.items()}
    for value, target in table.items():
        if value < 0 or not (0 <= target < count or target == IGNORE_INDEX):
            raise UserError(
                f"data.options.value_map: {value}: {target} is not one of the classes, 0 to "
                f"{count - 1}, or {IGNORE_INDEX} (ignored)"
            )
    table |= {int(value): IGNORE_INDEX for value in ignore_values}
    read = partial(read_mask, classes=table, upright=True)
    return Labels(class_names, distinct_colours(count), read)
