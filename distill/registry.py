"""Names in a recipe: plain tables name -> "module:attribute", a syntax recipes may use too."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from distill.errors import UserError, nearest, one_line

TABLES: dict[str, dict[str, str]] = {
    "teachers": {
        "diffusers_unet": "teachers.diffusers_unet:diffusers_unet",
        "stable_diffusion": "teachers.stable_diffusion:stable_diffusion",
        "flow": "teachers.flow:flow",
        "timm": "teachers.timm_model:timm_model",
        "ensemble": "teachers.ensemble:ensemble",
        "dit": "teachers.dit:dit",
        "guided_diffusion": "teachers.guided_diffusion:guided_diffusion",
    },
    "students": {
        "resnet18": "timm:resnet18",
        "resnet50": "timm:resnet50",
        "vit_tiny_patch16_224": "timm:vit_tiny_patch16_224",
        "vit_small_patch16_224": "timm:vit_small_patch16_224",
        "convnext_atto": "timm:convnext_atto",
    },
    "policies": {
        "a2c": "rl_policy.sb3:A2CPolicy",
        "ppo": "rl_policy.sb3:PPOPolicy",
        "reinforce": "rl_policy.reinforce:Reinforce",
        "dqn": "rl_policy.dqn:DQNPolicy",
        "thompson": "rl_policy.bandits:Thompson",
        "ucb": "rl_policy.bandits:UCB",
        "fixed": "rl_policy.simple:Fixed",
        "uniform": "rl_policy.simple:Uniform",
        "linear_decay": "rl_policy.simple:LinearDecay",
        "grid": "rl_policy.simple:Grid",
        "soft_mix": "rl_policy.soft_mix:SoftMix",
    },
    "rewards": {
        "teacher_task": "rl_policy.reward:TeacherTaskReward",
        "student_progress": "rl_policy.reward:student_progress",
        "label_free": "rl_policy.label_free:LabelFreeReward",
    },
    "losses": {
        "mse": "distill.matching.measures:mse",
        "l1": "distill.matching.measures:l1",
        "smooth_l1": "distill.matching.measures:smooth_l1",
        "cosine": "distill.matching.measures:cosine",
        "at": "distill.matching.measures:attention_transfer",
        "rkd": "distill.matching.measures:relational",
        "infonce": "distill.matching.measures:infonce",
        "mse_at": "distill.matching.measures:mse_at",
    },
    "benchmarks": {
        "shapes": "distill.benchmarks.shapes:Shapes",
        "camvid": "distill.benchmarks.camvid:camvid",
        "voc2012": "distill.benchmarks.voc2012:voc2012",
        "ade20k": "distill.benchmarks.ade20k:ade20k",
        "cityscapes": "distill.benchmarks.cityscapes:cityscapes",
        "coco_stuff": "distill.benchmarks.coco_stuff:coco_stuff",
        "oxford_pets": "distill.benchmarks.oxford_pets:oxford_pets",
        "celebamask_hq": "distill.benchmarks.celebamask_hq:celebamask_hq",
        "wflw": "distill.benchmarks.wflw:wflw",
        "cifar10": "distill.benchmarks.cifar10:cifar10",
        "cifar100": "distill.benchmarks.cifar100:cifar100",
        "tiny_imagenet": "distill.benchmarks.tiny_imagenet:tiny_imagenet",
        "imagenet": "distill.benchmarks.imagenet:imagenet",
        "image_folder": "distill.benchmarks.image_folder:image_folder",
        "folder": "distill.benchmarks.folder:Folder",
        "images": "distill.benchmarks.images:Images",
    },
    "correspondence": {
        "shapes": "distill.benchmarks.shapes:Shapes",
        "spair71k": "distill.benchmarks.spair71k:SPair71k",
    },
    "depth": {
        "shapes": "distill.benchmarks.shapes:Shapes",
        "nyuv2": "distill.benchmarks.nyuv2:NYUv2",
    },
}


_own: set[str] = set()
"""Files imported because a recipe named them."""


def own_error(error: Exception) -> str | None:
    """The message and place of an error raised in a user's own code; None for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename in _own]
    return f"{places[-1]}: {type(error).__name__}: {one_line(error)}" if places else None


def resolve(table: str, name: str, key: str) -> Any:
    """The object that a name stands for; `module:attribute` works wherever a name does.

    Args:
        table: One of `TABLES`.
        name: A name of that table, or `module:attribute`.
        key: The recipe's key, for the error line.
    """
    target = name if ":" in name else TABLES[table].get(name)
    if target is None:
        other = next((other for other, names in TABLES.items() if name in names), None)
        problem = f"unknown name {name!r}"
        if other is not None:
            problem = f"{name!r} is one of {other}, not of {table}"
        raise UserError(f"{key}: {problem}; {nearest(name, TABLES[table])} (or module:attribute)")
    module, _, attribute = target.partition(":")
    if ":" in name:
        _search_here()
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a file of one's own can fail in any way at all
        raise UserError(
            f"{key}: {target!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    file = getattr(imported, "__file__", None) or "no file"
    if not hasattr(imported, attribute):
        close = difflib.get_close_matches(attribute, vars(imported), n=1)
        hint = f"; did you mean {f'{module}:{close[0]}'!r}?" if close else ""
        raise UserError(f"{key}: module {module!r} has no {attribute!r} ({file}){hint}")
    found = getattr(imported, attribute)
    if ":" in name:
        _own.update({file, getattr(getattr(found, "__code__", None), "co_filename", file)})
    if not callable(found):
        raise UserError(f"{key}: {target!r} is not callable")
    return found


def lacks(found: object, protocol: type[Any]) -> str:
    """The members of a protocol that an object lacks, as a list in words; empty if none."""
    members = [name for name in vars(protocol) if not name.startswith("_")]
    return ", ".join(name for name in members if not hasattr(found, name))


def is_own(name: str, received: Path) -> bool:
    """Whether `module:attribute` is the user's own file; nothing is imported to find out.

    It is if the module, or its package, is below the working directory and not installed there (as
    in a virtual environment).

    Args:
        name: `module:attribute`.
        received: A folder that may come from somebody else: files in it, and packages that contain
            it, are not the user's own.
    """
    _search_here()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0].partition(".")[0])
    except ValueError:  # an empty name, or a module that knows no place
        return False
    if spec is None:
        return False
    places = spec.submodule_search_locations or ([spec.origin or ""] if spec.has_location else [])
    roots = [Path(str(place)).resolve() for place in places]
    here, theirs = Path.cwd().resolve(), received.resolve()
    python = Path(sysconfig.get_path("stdlib")).resolve()
    return bool(roots) and all(
        root.is_relative_to(here)
        and not root.is_relative_to(python)
        and not {"site-packages", "dist-packages"} & set(root.parts)
        and not root.is_relative_to(theirs)
        and not theirs.is_relative_to(root)
        for root in roots
    )


def _search_here() -> None:
    """Add the working directory to Python's search path: last, so that it hides nothing."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
