"""Names in a recipe: plain tables name -> "module:attribute", a syntax recipes may use too."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from distill.errors import UserError, nearest

TABLES: dict[str, dict[str, str]] = {
    "teachers": {"diffusers_unet": "teachers.diffusers_unet:diffusers_unet"},
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
        "fixed": "rl_policy.simple:Fixed",
        "uniform": "rl_policy.simple:Uniform",
        "linear_decay": "rl_policy.simple:LinearDecay",
    },
    "losses": {
        "mse": "distill.losses:mse",
        "l1": "distill.losses:l1",
        "smooth_l1": "distill.losses:smooth_l1",
        "cosine": "distill.losses:cosine",
        "at": "distill.losses:attention_transfer",
        "rkd": "distill.losses:relational",
        "infonce": "distill.losses:infonce",
    },
    "benchmarks": {
        "shapes": "distill.benchmarks.shapes:Shapes",
        "camvid": "distill.benchmarks.camvid:CamVid",
        "cifar10": "distill.benchmarks.cifar10:CIFAR10",
        "folder": "distill.benchmarks.folder:Folder",
        "images": "distill.benchmarks.images:Images",
    },
}


def resolve(table: str, name: str, key: str) -> Any:
    """What a name stands for. An outsider's `module:attribute` works wherever a name does.

    Args:
        table: One of `TABLES`.
        name: A name of that table, or `module:attribute`.
        key: The recipe's key, for the error line.
    """
    target = name if ":" in name else TABLES[table].get(name)
    if target is None:
        raise UserError(
            f"{key}: unknown name {name!r}; {nearest(name, TABLES[table])} (or module:attribute)"
        )
    module, _, attribute = target.partition(":")
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # one's own file, beside the recipe; last, so it hides nothing
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, ValueError) as error:
        raise UserError(f"{key}: {target!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise UserError(f"{key}: module {module!r} has no {attribute!r}") from error
