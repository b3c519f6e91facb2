"""Every family of teachers distils a student through the command line, from files on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distill.cli import main
from distill.registry import TABLES, resolve
from tests.teachers.conftest import CASES

ALONE = {name: case for name, case in CASES.items() if case.single_network}
NAMES = {resolve("teachers", name, "name"): name for name in TABLES["teachers"]}


def write_recipe(folder: Path, teacher: dict[str, Any], layer: str) -> Path:
    """Two steps of distillation from one layer, on shapes."""
    tree = {
        "output": str(folder / "runs"),
        "device": "cpu",
        "data": {
            "labelled": 4,
            "unlabelled": 4,
            "options": {"size": 32, "train": 8, "val": 2, "test": 2},
        },
        "teacher": {"dtype": "float32", **teacher},
        "student": {"model": "test_resnet"},
        "pairs": [{"student": "layer3", "teacher": layer, "projector": "film"}],
        "policy": {"bins": 3},
        "train": {
            "arms": ["distilled"],
            "steps": 2,
            "batch": 2,
            "unlabelled_batch": 2,
            "log_every": 1,
        },
    }
    path = folder / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def saved(name: str, folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name].save(folder / name)


def check_trained(recipe: Path, *overrides: str) -> None:
    assert main(["train", str(recipe), *overrides]) == 0
    summary = json.loads((recipe.parent / "runs" / "family" / "summary.json").read_text())
    assert 0 <= summary["metrics"]["distilled"]["miou"] <= 1
    assert (recipe.parent / "runs" / "family" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ALONE)
def test_a_family_distils(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    teacher = {
        "name": NAMES[case.teacher],
        "path": saved(name, tmp_path),
        "image_size": case.size,
        "options": dict(case.options),
    }
    fixed = ["policy.name=fixed"] if name == "timm" else []
    check_trained(write_recipe(tmp_path, teacher, case.layers[0]), *fixed)


def test_an_ensemble_distils(tmp_path: Path) -> None:
    members = {
        "ddpm": {"name": "diffusers_unet", "path": saved("diffusers_unet", tmp_path)},
        "vit": {"name": "timm", "path": saved("timm", tmp_path)},
    }
    teacher = {"name": "ensemble", "path": "", "image_size": 32, "options": {"members": members}}
    check_trained(write_recipe(tmp_path, teacher, "ddpm/up_blocks.0+vit/blocks.1"))


def test_every_built_in_family_is_tried() -> None:
    assert {NAMES[case.teacher] for case in ALONE.values()} | {"ensemble"} == set(
        TABLES["teachers"]
    )
