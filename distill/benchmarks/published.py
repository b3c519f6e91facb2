"""Published data sets: where their files lie, what they should hold, and what to say if not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.benchmarks import IGNORE_INDEX, Examples, Task, distinct_colours, notice
from distill.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Published:
    """A `Benchmark` of splits that were found; those in `withheld` have no public labels."""

    name: str
    task: Task
    class_names: tuple[str, ...]
    palette: NDArray[np.uint8]
    splits: Mapping[str, Examples]
    withheld: tuple[str, ...] = ()
    mirrored: tuple[int, ...] = ()
    bare: Examples | None = None
    """More images for training, without targets."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def ignore_index(self) -> int:
        """`IGNORE_INDEX`, or -1 where that is a class."""
        return IGNORE_INDEX if self.num_classes <= IGNORE_INDEX else -1

    def dataset(self, split: str) -> Examples:
        """The examples of a split."""
        if split in self.withheld:
            raise UserError(
                f"{self.name}: the labels of {split} are not public; score on val, as the field "
                "does: evaluate.split=val"
            )
        if split not in self.splits:
            raise UserError(f"{self.name} has no split {split!r}; {nearest(split, self.splits)}")
        return self.splits[split]

    def unlabelled(self) -> Examples | None:
        """`bare`."""
        return self.bare


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of a data set's files once its archives are unpacked in one folder,
    `data.root`."""

    name: str
    tree: str
    """The files that are read, for error lines; relative to the folder."""
    source: str = ""
    """The publisher's page, if any."""
    folder: str = ""
    """The archive's own folder; `data.root` may be it or what holds it."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Published number of labelled images per split."""

    @contextmanager
    def at(self, root: str | None) -> Iterator[Path]:
        """The folder of the files; a UserError within goes on with the tree and the source."""
        try:
            if root is None:
                raise UserError("no folder given")
            if not Path(root).is_dir():
                raise UserError(f"there is no folder {root}")
            inside = Path(root, self.folder)
            yield inside if inside.is_dir() else Path(root)
        except UserError as error:
            source = f"; get it from {self.source}" if self.source else ""
            raise UserError(
                f"{self.name}: {error}; expected in data.root=FOLDER: {self.tree}{source}"
            ) from error

    def compare_sizes(
        self, found: Mapping[str, int], sizes: Mapping[str, int] | None = None, what: str = "images"
    ) -> None:
        """Say in one line on stderr which splits are not of their published size.

        Args:
            found: Number of examples per split.
            sizes: The published ones; by default the layout's own.
            what: The examples.
        """
        wrong = [
            f"{split} has {found[split]} of {size} {what}"
            for split, size in (self.sizes if sizes is None else sizes).items()
            if found[split] != size
        ]
        if wrong:
            notice(f"{self.name}: {', '.join(wrong)}; scores will not compare with published ones")

    def benchmark(
        self,
        splits: Mapping[str, Examples],
        *,
        task: Task,
        class_names: tuple[str, ...],
        palette: NDArray[np.uint8] | None = None,
        sizes: Mapping[str, int] | None = None,
        withheld: tuple[str, ...] = (),
        mirrored: tuple[int, ...] = (),
        bare: Examples | None = None,
    ) -> Published:
        """The benchmark of these splits; one line on stderr says which are not of their size.

        Args:
            splits: The examples found.
            task: What the targets are.
            class_names: One per class.
            palette: (classes, 3); by default distinct colours.
            sizes: Published number of images per split; by default the layout's own.
            withheld: Splits whose labels are not public.
            mirrored: Which class each becomes in the mirror image, if any becomes another.
            bare: More images for training, without targets.
        """
        self.compare_sizes({split: len(found) for split, found in splits.items()}, sizes)
        return Published(
            name=self.name,
            task=task,
            class_names=class_names,
            palette=distinct_colours(len(class_names)) if palette is None else palette,
            splits=splits,
            withheld=withheld,
            mirrored=mirrored,
            bare=bare,
        )


def comma_separated(names: str) -> tuple[str, ...]:
    """The entries of a long list of class names, as it is easy to read in a module."""
    return tuple(" ".join(name.split()) for name in names.split(","))
