"""From a subject of `distill evaluate` to its recipe and its backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict

from distill import seeding
from distill.config import RunConfig, StudentConfig
from distill.deployment.folder import load_backbone, read_card, student_folder
from distill.errors import UserError, blame, one_line
from distill.evaluation.backbones import (
    SCRATCH,
    Backbone,
    NetworkBackbone,
    Subject,
    TeacherBackbone,
)
from distill.evaluation.inference import scaled
from distill.recipe import apply_override, build_config, flat, refuse_foreign
from distill.teacher import build_teacher
from students.student import Student

TAKEN_OVER = ("seed", "data", "evaluate")


def subject_config(
    subject: Subject,
    overrides: Sequence[str],
    given: Mapping[str, Mapping[str, Any]],
    beside: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The recipe to evaluate a subject with.

    Args:
        subject: A student brings the recipe that it was made with, others the defaults.
        overrides: Changes to it, such as `data.root=...`.
        given: What a protocol sets, by section; overrides count more.
        beside: A recipe whose seed, images and scoring a subject without recipe takes over.
    """
    where, tree = subject.text, dict[str, Any]()
    if subject.kind == "student":
        folder = student_folder(subject.path)
        where, tree = f"recipe of {folder}", read_card(folder).recipe
    else:  # nothing is distilled, so that the pair plays no part
        tree["pairs"] = [{"student": "none", "teacher": "none"}]
        tree |= {key: value for key, value in (beside or {}).items() if key in TAKEN_OVER}
    if subject.kind == "teacher":
        tree["teacher"] = {"path": subject.path, "name": subject.family}
    if subject.kind == "timm":
        tree["student"] = {"model": subject.path}
    _drop_of_another(tree, overrides)
    for section, values in given.items():
        tree[section] = {**tree.get(section, {}), **values}
    for override in overrides:
        apply_override(tree, override)
    config = build_config(RunConfig, tree, where=where, overrides=overrides)
    if subject.kind == "student":
        refuse_foreign(config, overrides, Path(subject.path))
    if subject.kind in ("student", "timm"):
        config = dataclasses.replace(config, student=_student_config(subject, config))
    return config


def _drop_of_another(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Where a recipe's benchmark is overridden, leave out where its images lie and its options."""
    wanted = dict[str, Any]()
    for override in overrides:
        apply_override(wanted, override)
    data, name = tree.get("data"), flat(wanted).get("data.benchmark")
    if isinstance(data, dict) and name not in (None, data.get("benchmark")):
        tree["data"] = {k: v for k, v in data.items() if k not in ("root", "options")}


def _student_config(subject: Subject, config: RunConfig) -> StudentConfig:
    """The student section with the subject's weights."""
    student = config.student
    if subject.kind == "student":
        folder = str(student_folder(subject.path))
        return dataclasses.replace(student, init_from=folder, pretrained=False)
    kwargs = student.kwargs
    if subject.weights not in ("", SCRATCH):
        kwargs = kwargs | {"pretrained_cfg_overlay": {"file": subject.weights}}
    return dataclasses.replace(
        student, pretrained=subject.weights != SCRATCH, init_from=None, kwargs=kwargs
    )


def refuse_file(subject: Subject) -> None:
    """Refuse an exported file, which has no maps to read."""
    if subject.kind == "file":
        raise UserError(
            f"{subject.text} only works with `distill evaluate --protocol own`; for other "
            "protocols and for compare, name the run folder or the exported folder"
        )


def open_backbone(
    subject: Subject, config: RunConfig, size: tuple[int, int], device: torch.device
) -> Backbone:
    """The frozen backbone of a subject.

    Args:
        subject: The subject, as `parse_subject` read it.
        config: Its recipe, of `subject_config`.
        size: (H, W) of the images that it is to see.
        device: Where it goes.

    Raises:
        UserError: It cannot be read, has no such layer, or takes no images of that size; or it is
            a file, which runs as a whole.
    """
    refuse_file(subject)
    if subject.kind == "teacher":
        teacher = build_teacher(config, layers=subject.layers)
        backbone: Backbone = TeacherBackbone(teacher, subject.timestep, config.seed)
        backbone.to(device)
        with blame(f"{subject.text} at data.size {size[0]}x{size[1]}, or teacher.image_size"):
            backbone.maps(torch.zeros(1, 3, *size, device=device))
        _try_scales(backbone, subject, config, size, device)
        return backbone
    with blame(subject.text), seeding.seeded_torch(config.seed):
        student = _network(subject, config.student, size)
    if config.student.init_from is not None:
        load_backbone(student, config.student.init_from)
    backbone = NetworkBackbone(student).to(device)
    _try_scales(backbone, subject, config, size, device)
    return backbone


def _try_scales(
    backbone: Backbone,
    subject: Subject,
    config: RunConfig,
    size: tuple[int, int],
    device: torch.device,
) -> None:
    """Refuse scales that the network does not take before anything is fitted; windows have one."""
    for scale in config.evaluate.scales if config.evaluate.window is None else ():
        try:
            if scale != 1:
                backbone.maps(torch.zeros(1, 3, *scaled(size, scale), device=device))
        except (AssertionError, RuntimeError, ValueError) as error:  # networks know all three
            line = one_line(error, 200)
            raise UserError(f"{subject.text} at evaluate.scales {scale:g}: {line}") from error


def _network(subject: Subject, config: StudentConfig, size: tuple[int, int]) -> Student:
    """The timm model with its weights, and the maps asked for or the last one."""

    def build(layers: Sequence[str], pretrained: bool) -> Student:
        return Student(
            config.model,
            classes=1,
            dense=True,  # without timm's classifier; the head is not used
            image_size=size,
            layers=layers,
            input_size=config.input_size,
            pretrained=pretrained,
            kwargs=config.kwargs,
        )

    with torch.device("meta"):
        layers = subject.layers or build((), False).head_layers[-1:]
        if subject.weights not in ("", SCRATCH):
            _check_weights(build(layers, False), Path(subject.weights))
    return build(layers, config.pretrained)


def _check_weights(student: Student, path: Path) -> None:
    """timm loads what fits; this refuses a file of something else."""
    if not path.is_file():
        raise OSError(f"there is no file {path}")
    try:
        names = load_state_dict(str(path)).keys()
    except Exception as error:  # a damaged file can fail in any way at all
        raise ValueError(f"{path} has no weights that can be read safely") from error
    missing = [name for name, _ in student.backbone.named_parameters() if name not in names]
    if missing:
        raise ValueError(
            f"{path} has no weight {missing[0]!r}; it must be a state dict with timm's names"
        )
