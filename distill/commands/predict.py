"""`distill predict`: masks or classes of images, by a student in any of its forms."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from distill import checkpoint
from distill.benchmarks.files import IMAGE_SUFFIXES, images_below, read_image
from distill.data import as_float
from distill.deployment.folder import load_student
from distill.deployment.formats import Deployed, describe
from distill.deployment.runtimes import ModelFile, load_predictor, torch_run
from distill.drawing.overlays import indexed, overlay
from distill.errors import UserError
from distill.evaluation.counting import predicted_classes
from distill.progress import Progress

BATCH = 8
TABLES = ("predictions.csv", "predictions.json")
MASKS = ("masks", "overlays")


class InputImage(NamedTuple):
    """An image to predict, and the name of its results."""

    path: Path
    name: Path
    """Path of the results below their folder, without suffix."""


def predict(
    model: str, images: Sequence[str], *, out: str, force: bool = False, trust: bool = False
) -> str:
    """Predict images, and write what was seen in them.

    For segmentation `out` gets `masks/NAME.png`, class numbers with a palette at the image's own
    size, upright, and `overlays/NAME.png`; for classification `predictions.csv` and
    `predictions.json`. Images in folders keep their place below them in NAME.

    Args:
        model: A run folder, an exported student, or a file that `distill export` wrote.
        images: Files, and folders that are searched to any depth.
        out: A folder.
        force: Replace results that are there.
        trust: Open a TorchScript file too, see `open_model`.

    Returns:
        What to print.

    Raises:
        UserError: A mistake, before anything is written; or, once all others are predicted, images
            that could not be read.
    """
    folder = Path(out)
    checkpoint.check_folder("--out", folder)
    opened = open_model(model, trust=trust)
    what = opened.metadata["what"]
    results = [folder / kind for kind in MASKS] if what == "segmenter" else []
    pictures = find_pictures(images, results)
    _check_free(folder, pictures, what, force)
    made = _make(folder)
    broken: list[Path] = []
    rows: dict[str, Tensor] = {}
    with Progress("predict", len(pictures)) as progress:
        for group in _groups(pictures, broken, progress):
            seen = logits_of(opened, [pixels for _, pixels in group])
            for (picture, pixels), logits in zip(group, seen, strict=True):
                if what == "segmenter":
                    _write_masks(folder, picture, pixels, logits, opened.metadata)
                else:
                    rows[str(picture.path)] = logits.softmax(0)
                progress.update(1, {})
    if rows:
        _write_tables(folder, rows, opened.metadata["class_names"])
    done = len(pictures) - len(broken)
    if broken:
        if made and not done:
            folder.rmdir()
        names = ", ".join(map(str, broken[:3])) + (", ..." if len(broken) > 3 else "")
        rest = f"the results of the other {done} are in {folder}" if done else "nothing was written"
        raise UserError(
            f"{len(broken)} of {len(pictures)} images could not be read: {names}; {rest}"
        )
    return f"{done} images predicted into {folder}"


def open_model(path: str, *, trust: bool = False) -> ModelFile:
    """A student in any of its forms, as a function of arrays: a segmenter or a classifier.

    Args:
        path: A run folder, an exported student, or a file that `distill export` wrote.
        trust: Whether a TorchScript file is opened, which is a program.
    """
    if Path(path).is_dir():
        student, card = load_student(path)
        if card.task == "landmarks":
            raise UserError(
                f"{path} finds landmarks, but predict writes masks or classes; to draw its points "
                f"use `distill evaluate {path} --out scores.json`"
            )
        model = Deployed(student, "classifier" if student.head is None else "segmenter")
        return ModelFile(describe(model, card, "fp32"), torch_run(model, 0))
    return load_predictor(Path(path), trust=trust)


def find_pictures(images: Sequence[str], results: Sequence[Path] = ()) -> list[InputImage]:
    """The image files among files and folders, each once.

    Args:
        images: Files and folders.
        results: Folders of earlier results, which are not searched.

    Raises:
        UserError: A file is missing, a folder has no images, or two have the same name.
    """
    found: dict[Path, InputImage] = {}
    own = {folder.resolve() for folder in results}
    for image in map(Path, images):
        if image.is_dir():
            files = images_below(image)
            if own:
                files = [f for f in files if own.isdisjoint(f.resolve().parents)]
            if not files:
                raise UserError(f"{image} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            pictures = [InputImage(f, f.relative_to(image).with_suffix("")) for f in files]
        elif image.is_file():
            pictures = [InputImage(image, Path(image.stem))]
        else:
            raise UserError(f"there is no image {image}")
        for picture in pictures:
            found.setdefault(picture.path.resolve(), picture)
    names: dict[Path, Path] = {}
    for picture in found.values():
        if other := names.get(picture.name):
            raise UserError(
                f"{other} and {picture.path} have the same name; predict them separately"
            )
        names[picture.name] = picture.path
    return list(found.values())


def logits_of(model: ModelFile, images: Sequence[Tensor]) -> Tensor:
    """Outputs (B, C[, h, w]) for images (3, H, W) uint8 of any sizes, resized like held-out
    ones."""
    size = list(model.metadata["image_size"])
    resized = [F.resize(x, size, InterpolationMode.BILINEAR, antialias=True) for x in images]
    (logits,) = model.run(as_float(torch.stack(resized)).numpy())
    return torch.from_numpy(logits)


def mask_of(logits: Tensor, size: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The best class of every pixel. logits: (C, h, w) -> (H, W) = size."""
    return predicted_classes(logits, size).to(torch.uint8).numpy()


def _targets(folder: Path, picture: InputImage) -> list[Path]:
    file = picture.name.with_name(f"{picture.name.name}.png")  # a name may hold dots
    return [folder / kind / file for kind in MASKS]


def _check_free(folder: Path, pictures: Sequence[InputImage], what: str, force: bool) -> None:
    """Refuse to replace results, unless that was asked for."""
    targets = [folder / table for table in TABLES]
    if what == "segmenter":
        targets = [path for picture in pictures for path in _targets(folder, picture)]
    taken = [path for path in targets if path.exists()]
    if taken and not force:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise UserError(f"{taken[0]}{more} exist; replace with --force, or choose another --out")


def _groups(
    pictures: Sequence[InputImage], broken: list[Path], progress: Progress
) -> Iterator[list[tuple[InputImage, Tensor]]]:
    """Images in batches; those that cannot be read are named and left out."""
    group: list[tuple[InputImage, Tensor]] = []
    for picture in pictures:
        try:
            group.append((picture, read_image(picture.path, upright=True)))
        except UserError as error:
            print(f"skipped {error}", file=sys.stderr)
            broken.append(picture.path)
            progress.update(1, {})
        if len(group) == BATCH:
            yield group
            group = []
    if group:
        yield group


def _write_masks(
    folder: Path, picture: InputImage, pixels: Tensor, logits: Tensor, metadata: dict[str, Any]
) -> None:
    names, palette = metadata["class_names"], metadata["palette"]
    mask = mask_of(logits, tuple(pixels.shape[1:]))
    image = pixels.permute(1, 2, 0).numpy()
    shown = (indexed(mask, palette), overlay(image, mask, names, palette))
    for path, result in zip(_targets(folder, picture), shown, strict=True):
        _write(path, result)


def _make(folder: Path) -> bool:
    """Make a folder; False if it was there."""
    found = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot create {folder}: {error.strerror}") from error
    return not found


def _write(path: Path, picture: Image.Image) -> None:
    _make(path.parent)
    with checkpoint.replacing(path) as file:
        picture.save(file, format="png")


def _write_tables(folder: Path, rows: dict[str, Tensor], names: Sequence[str]) -> None:
    """The best class and all probabilities of every image."""
    tree: dict[str, dict[str, Any]] = {
        image: {
            "class": names[int(shares.argmax())],
            "probability": round(float(shares.max()), 6),
            "probabilities": {
                name: round(share, 6) for name, share in zip(names, shares.tolist(), strict=True)
            },
        }
        for image, shares in rows.items()
    }
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["image", "class", "probability", *names])
    for image, row in tree.items():
        table.writerow([image, row["class"], row["probability"], *row["probabilities"].values()])
    for name, content in zip(TABLES, (text.getvalue(), json.dumps(tree, indent=2)), strict=True):
        checkpoint.write_text(folder / name, content)
