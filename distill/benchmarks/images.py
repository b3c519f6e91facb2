"""`images`: any folder of images, without labels, to train a teacher on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from distill.benchmarks import IGNORE_INDEX, Task, distinct_colours
from distill.benchmarks.files import IMAGE_SUFFIXES, read_image
from distill.errors import UserError


class UnlabelledImages(Dataset[tuple[Tensor, int]]):
    """Image files, decoded when asked for. Items: image (3, H, W) uint8, `IGNORE_INDEX`."""

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.names = [path.relative_to(root).as_posix() for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index]), IGNORE_INDEX


class Images:
    """All images below a folder, however deep, in the order of their paths. One split: train.

    Args:
        root: The folder. Files and folders that begin with a dot are left out.
    """

    name = "images"
    task: Task | None = None
    class_names: tuple[str, ...] = ()
    num_classes = 0
    ignore_index = IGNORE_INDEX
    palette = distinct_colours(0)

    def __init__(self, root: str | None) -> None:
        if root is None:
            raise UserError("images: no folder given; say where with data.root=FOLDER")
        folder = Path(root)
        if not folder.is_dir():
            raise UserError(f"images: there is no folder {folder}; say where with data.root=FOLDER")
        paths = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if not paths:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"images: no image file below {folder} (looked for {known})")
        self._examples = UnlabelledImages(folder, paths)

    def dataset(self, split: str) -> UnlabelledImages:
        """The images; the only split is `train`."""
        if split != "train":
            raise UserError(f"images has no split {split!r}: unlabelled images are for train only")
        return self._examples
