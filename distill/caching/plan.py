"""From a recipe to its feature cache: what it would hold, whether there is room, and its folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from distill.build import TrainingSet
from distill.caching.cache import FeatureCache, Plan, Stored, check_origin
from distill.config import Arm, RunConfig
from distill.errors import UserError
from distill.matching.distiller import Distiller
from distill.precision import computes_bfloat16
from distill.teacher import teacher_dtype
from teachers.arithmetic import FEATURES
from teachers.protocol import Teacher


class PlannedCache(NamedTuple):
    """An arm's feature cache that is not open yet; the fields are those of `FeatureCache`."""

    folder: Path
    teacher: Teacher
    plan: Plan
    examples: NDArray[np.int64]
    timesteps: Tensor
    origin: Mapping[str, Any]
    chunk: int

    def check(self) -> None:
        """Raises UserError if the folder is there and holds other features."""
        check_origin(self.folder, self.origin)

    def open(self) -> FeatureCache:
        """Find or make the folder. Raises UserError as `FeatureCache` does."""
        return FeatureCache(**self._asdict())


def plan_cache(
    config: RunConfig,
    arm: Arm,
    data: TrainingSet,
    distiller: Distiller,
    teacher: Teacher,
    timesteps: Tensor,
    maps: Mapping[str, Tensor],
    accelerator: Accelerator,
) -> PlannedCache | None:
    """An arm's feature cache, which runs that differ in their seed share; None without one.

    Args:
        config: The recipe.
        arm: Of the recipe, with a teacher.
        data: The training images.
        distiller: What looks at the features.
        teacher: What shows them.
        timesteps: (K,) int64, those on offer.
        maps: What the teacher shows of a batch; their shapes count.
        accelerator: The device and the processes.

    Raises:
        UserError: The recipe leaves nothing to cache, or asks for more than `teacher.cache_gb`.
    """
    if config.teacher.cache is None:
        return None
    examples = np.array(cached_examples(config, data))
    plan = _plan(config, data, distiller, maps, len(examples), len(timesteps))
    batch = (config.train.batch + config.train.unlabelled_batch) // accelerator.num_processes
    return PlannedCache(
        _cache_folder(config, arm),
        teacher,
        plan,
        examples=examples,
        timesteps=timesteps,
        origin=_origin(config, data, teacher, examples, timesteps, plan, accelerator),
        chunk=min(8 if accelerator.device.type == "cpu" else 64, batch),
    )


def _plan(
    config: RunConfig,
    data: TrainingSet,
    distiller: Distiller,
    maps: Mapping[str, Tensor],
    images: int,
    bins: int,
) -> Plan:
    """What the cache is to hold. Raises UserError as `plan_cache` does."""
    teacher, strength = config.teacher, config.data.augment
    if strength not in ("none", "flip"):
        raise UserError(
            f"teacher.cache: with data.augment={strength} no image appears twice; use flip or "
            "none, or no cache"
        )
    if teacher.labels:
        raise UserError(
            "teacher.cache: cannot be combined with teacher.labels, as an image's features then "
            "depend on its label; use one of the two"
        )

    def stored(dtype: torch.dtype, could: bool) -> dict[str, Stored]:
        averaged = {layer: _averaged(distiller, layer, could) for layer in maps}
        return {
            layer: Stored((x.shape[1], 1, 1), torch.float32)
            if averaged[layer]
            else Stored(tuple(x.shape[1:]), dtype)
            for layer, x in maps.items()
        }

    dtype, flips = getattr(torch, teacher_dtype(config)), 1 if strength == "none" else 2
    plan = Plan(images, flips, bins, stored(dtype, could=False))
    pooled = [
        f"pairs.{index}.pooled=true"
        for index, pair in enumerate(config.pairs)
        if not pair.pooled and _averaged(distiller, pair.teacher, could=True)
    ]
    smaller = {" ".join(pooled): plan._replace(layers=stored(dtype, could=True))}
    if computes_bfloat16(next(iter(maps.values())).device.type):
        half = plan._replace(layers=stored(torch.bfloat16, could=False))
        smaller["teacher.dtype=bfloat16"] = half
    smaller["data.augment=none"] = plan._replace(flips=1)
    share = min(1.0, teacher.cache_gb / plan.gb)
    if bins_left := int(bins * share):
        smaller[f"policy.bins={bins_left}"] = plan._replace(bins=bins_left)
    images_left = int(plan.images * share)
    if (unlabelled := images_left - len(data.labelled_indices)) >= 0:
        smaller[f"data.unlabelled={unlabelled}"] = plan._replace(images=images_left)
    check_budget(plan, teacher.cache_gb, smaller)
    return plan


def check_budget(plan: Plan, gb: float, smaller: Mapping[str, Plan]) -> None:
    """Refuse a plan that needs more than `gb`.

    Args:
        plan: What the recipe asks for.
        gb: What it allows.
        smaller: Changes of the recipe, and the plans that they would lead to.

    Raises:
        UserError: It is too large; the line names those changes that fit.
    """
    if plan.gb <= gb:
        return
    fitting = [f"{change} ({p.gb:.3g} GB)" for change, p in smaller.items() if p.gb <= gb]
    raise UserError(
        f"teacher.cache: {plan} exceeds teacher.cache_gb={gb:g}; what fits: "
        + ", ".join([*fitting, f"teacher.cache_gb={math.ceil(plan.gb)} or more"])
    )


def _averaged(distiller: Distiller, layer: str, could: bool) -> bool:
    """Whether no more than the average of a teacher's map is looked at, or (`could`) has to be."""
    head = distiller.reward_head
    if layer == distiller.reward_layer and head is not None and head.dense:
        return False
    pairs = zip(distiller.matches, distiller.losses, strict=True)
    losses: list[Any] = [loss for match, loss in pairs if match.teacher == layer]
    return all(loss.measure.poolable if could else loss.pooled for loss in losses)


def cached_examples(config: RunConfig, data: TrainingSet) -> list[int]:
    """The training images whose features a run asks for, in ascending order."""
    unlabelled = data.unlabelled_indices if config.train.unlabelled_batch else []
    return sorted({*data.labelled_indices, *unlabelled})


def _cache_folder(config: RunConfig, arm: Arm) -> Path:
    """The folder of an arm's feature cache."""
    assert config.teacher.cache is not None
    name = arm if arm == "distilled" else f"{arm}{config.seed}"  # whose weights the seed decides
    return Path(config.teacher.cache) / name


def _origin(
    config: RunConfig,
    data: TrainingSet,
    teacher: Teacher,
    examples: NDArray[np.int64],
    timesteps: Tensor,
    plan: Plan,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Everything that decides the features, in readable form."""
    return {
        "features": FEATURES,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": accelerator.device.type,
        "teacher.name": config.teacher.name,
        "teacher": teacher.fingerprint,
        "teacher.input": config.teacher.input,
        "teacher.draws": config.teacher.draws if config.teacher.input == "average" else 1,
        "teacher.image_size": config.teacher.image_size,
        "teacher.dtype": teacher_dtype(config),
        "teacher.compile": config.teacher.compile,
        "teacher.options": config.teacher.options,
        "layers": {name: [*x.shape, str(x.dtype)] for name, x in plan.layers.items()},
        "timesteps": timesteps.tolist(),
        "data.benchmark": config.data.benchmark,
        "data.options": config.data.options,
        "data.size": data.size,
        "data.augment": config.data.augment,
        "data": data.fingerprint,
        "images": hashlib.sha256(examples.tobytes()).hexdigest(),
    }
