"""Students that leave: a folder that plain timm opens, and the head and card beside it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm.models
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import checkpoint, package_version
from distill.benchmarks import IGNORE_INDEX, Task
from distill.errors import UserError, blame, one_line
from students.student import Student

CARD = "student.json"
HEAD = "head.safetensors"
WEIGHTS = "model.safetensors"


Pair = Annotated[Sequence[int], Field(min_length=2, max_length=2)]
Colour = Annotated[Sequence[int], Field(min_length=3, max_length=3)]


@dataclass(frozen=True, kw_only=True)
class StudentCard:
    """An exported student: the arguments of `Student`, its classes, and where it came from."""

    model: str
    classes: int
    dense: bool
    image_size: Pair
    layers: Sequence[str]
    head: str
    head_layers: Sequence[str]
    input_size: Pair
    kwargs: dict[str, Any]
    class_names: Sequence[str]
    palette: Sequence[Colour]
    """The RGB colour of each class."""
    ignore_index: int = IGNORE_INDEX
    task: Task
    recipe: dict[str, Any]
    """The resolved recipe of the run."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Arm, step, teacher, commit."""
    version: str = field(default_factory=package_version)


def export_student(
    student: Student,
    card: StudentCard,
    folder: Path,
    check: Callable[[Path], object] = lambda new: None,
) -> None:
    """Write `model.safetensors` and `config.json` (plain timm's), the head, and `student.json`.

    The folder appears complete or not at all; an older export of that name is replaced.

    Args:
        student: The student.
        card: Its card.
        folder: The folder to write; it is made, or replaced as a whole.
        check: Called with the new folder before it takes its place; if it raises, nothing changes.

    Raises:
        UserError: The folder holds something else, or the disk is full.
    """
    if folder.exists() and not (folder / CARD).is_file():
        raise UserError(f"{folder} exists and is not an exported student; choose another folder")
    # safetensors writes contiguous tensors only, and training may have left others.
    student = copy.deepcopy(student).to("cpu").to(memory_format=torch.contiguous_format)
    try:
        with checkpoint.replacing_folder(folder) as new:
            timm.models.save_for_hf(student.backbone, new, **student.backbone_config())
            if student.head is not None:
                save_file(student.head.state_dict(), new / HEAD)
            checkpoint.write_text(new / CARD, json.dumps(asdict(card), indent=2) + "\n")
            check(new)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the student to {folder}: {error}") from error


def load_student(path: str | Path) -> tuple[Student, StudentCard]:
    """The whole student of an exported folder or of a run, on the CPU, in eval mode."""
    folder = student_folder(path)
    card = read_card(folder)
    student = untrained(card, folder)
    _load(student.backbone, folder / WEIGHTS)
    if student.head is not None:
        _load(student.head, folder / HEAD)
    return student.eval(), card


def untrained(card: StudentCard, folder: Path) -> Student:
    """The student that a card describes, on random weights; `folder` is where the card lies.

    Raises:
        UserError: timm lacks the model, or a library its head.
    """
    with blame(str(folder / CARD)):
        return Student(
            card.model,
            classes=card.classes,
            dense=card.dense,
            image_size=_pair(card.image_size),
            layers=card.layers,
            head=card.head,
            head_layers=card.head_layers,
            input_size=_pair(card.input_size),
            kwargs=card.kwargs,
        )


def read_card(folder: Path) -> StudentCard:
    """The card of an exported student."""
    path = folder / CARD
    content = checkpoint.read_json(path, kind=StudentCard)
    try:
        card = StudentCard(**content)
    except TypeError as error:
        raise UserError(
            f"{path} was written by another version of distill: {one_line(error)}"
        ) from error
    for key, least in (("class_names", card.classes), ("palette", 0)):
        if len(getattr(card, key)) not in (least, card.classes):
            raise UserError(
                f"{path} is damaged: {key} must have {card.classes} entries, as classes has"
            )
    return card


def student_folder(path: str | Path) -> Path:
    """The exported student that `path` (such a folder, or a run's) holds."""
    for folder in (Path(path), Path(path) / "student"):
        if (folder / CARD).is_file():
            return folder
    raise UserError(
        f"{path} contains no exported student; name a finished run folder, or its student/"
    )


def load_backbone(student: Student, path: str | Path) -> None:
    """Give a student the backbone weights of an exported one; a classifier stays as it is.

    Raises:
        UserError: The weights are of another architecture.
    """
    folder = student_folder(path)
    weights = _read(folder / WEIGHTS)
    classifier = student.backbone.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = student.backbone.state_dict()
    prefixes = tuple(f"{name}." for name in names)
    kept = {
        name: weights[name] if name in weights and not name.startswith(prefixes) else own[name]
        for name in own
        if name in weights or name.startswith(prefixes)
    }
    try:
        student.backbone.load_state_dict(kept)
    except RuntimeError as error:
        raise UserError(
            f"student.init_from: {folder} is a {read_card(folder).model!r}, which does not match "
            f"student.model: {one_line(error, 200)}..."
        ) from error


def without_paths(card: dict[str, Any]) -> dict[str, Any]:
    """The tree of a card without the places of its maker's data, teachers and runs.

    Of a teacher the last part of its path is left, unless it is relative, as of an embedded one and
    on the hub. Options that are paths become None.
    """
    kept: dict[str, Any] = _without_paths(card, False)
    recipe = kept["recipe"]
    recipe["output"] = "runs"
    for section, key in (("data", "root"), ("teacher", "cache"), ("student", "init_from")):
        if key in recipe.get(section, {}):
            recipe[section][key] = None
    teacher = recipe.get("teacher", {})
    if _is_absolute(teacher.get("path", "")):
        teacher["path"] = Path(teacher["path"]).name
    return kept


def _without_paths(tree: Any, options: bool) -> Any:
    """A copy of a tree, None in place of paths among its `options`."""
    if isinstance(tree, dict):
        return {
            key: _without_paths(value, options or key in ("options", "kwargs"))
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [_without_paths(value, options) for value in tree]
    if options and isinstance(tree, str):
        local = os.sep in tree and os.path.exists(tree)
        return None if local or _is_absolute(tree) else tree
    return tree


def _is_absolute(path: str) -> bool:
    return os.path.isabs(path) or path.startswith(("~", ".."))


def usage(folder: Path) -> str:
    """The three lines that load an export in plain timm."""
    return (
        "import timm\n"
        f'model = timm.create_model("local-dir:{folder}", pretrained=True)\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )


def _load(module: torch.nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(_read(path))
    except RuntimeError as error:
        line = one_line(error, 200)
        raise UserError(
            f"{path} does not match the student that its card describes: {line}"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.exists() and not os.access(path, os.R_OK):
        raise UserError(f"permission denied: {path} (ask its owner for read access)")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or broken: {error}") from error


def _pair(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    return height, width
