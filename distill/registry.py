"""Names in a recipe: plain tables name -> "module:attribute", a syntax recipes may use too."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from distill.errors import UserError, nearest

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
    },
    "losses": {
        "mse": "distill.measures:mse",
        "l1": "distill.measures:l1",
        "smooth_l1": "distill.measures:smooth_l1",
        "cosine": "distill.measures:cosine",
        "at": "distill.measures:attention_transfer",
        "rkd": "distill.measures:relational",
        "infonce": "distill.measures:infonce",
        "mse_at": "distill.measures:mse_at",
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
