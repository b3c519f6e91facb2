"""`distill teacher extract`: the feature cache of a recipe, filled before the training begins."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from distill.augmentation import augmentation
from distill.build import build_training_set, single_process
from distill.caching.cache import FeatureCache
from distill.caching.plan import cached_examples
from distill.config import RunConfig
from distill.data import Augmented, Draw, Tagged, loader
from distill.errors import Interrupted, UserError
from distill.progress import Progress
from distill.stopping import stop_on_signals
from distill.training.fit import fit_batch
from distill.training.trainer import Trainer


def extract(config: RunConfig) -> str:
    """Compute what is missing in the cache of the distilled arm, a few images at a time, and check
    that the rest is of the images that are there now.

    Memory does not grow with the number of images. What was computed stays, also after a crash
    (but `cache.BLOCK` rows), and a second call goes on with the rest.

    Returns:
        What to print.

    Raises:
        UserError: The recipe asks for no cache, or one that cannot be (see `plan_cache`), or there
            is one of other features or images.
        Interrupted: The user stopped it; rerunning the command continues.
    """
    if config.teacher.cache is None:
        raise UserError("teacher.cache: name the folder to fill, such as teacher.cache=caches/mine")
    data = build_training_set(dataclasses.replace(config.data, memory_gb=0.0))
    accelerator = single_process(config.device, "teacher extract")
    config = fit_batch(config, data, accelerator)
    trainer = Trainer(config, "distilled", data, accelerator)
    trainer.open_cache()
    cache = trainer.cache
    assert cache is not None
    plan = cache.plan
    print(cache, file=sys.stderr)
    found, device = len(cache), trainer.accelerator.device
    examples = cached_examples(config, data)  # those that are complete are checked
    per_image = plan.flips * plan.bins
    count = math.lcm(cache.chunk, per_image) // per_image  # images that make whole chunks
    draws = (
        [Draw(example, 0) for example in examples[start : start + count]]
        for start in range(0, len(examples), count)
    )
    plain = Augmented(data.unlabelled.examples, augmentation("none", None, data.size))
    steps = math.ceil(len(examples) / count)
    with stop_on_signals() as stop, Progress("extract", steps) as progress:
        try:
            for images, _, tags in loader(Tagged(plain), draws, config.data.workers):
                computed = 0
                for views, wanted, bins in _missing(cache, images, tags):
                    if stop:
                        break
                    cache.fill(views.to(device), wanted, bins)
                    computed += len(views)
                if stop:
                    raise Interrupted(
                        f"stopped with {len(cache)} of {plan.rows} rows; rerun the command for the "
                        "rest"
                    )
                progress.update(computed, {})
        finally:
            cache.flush()
        rate = progress.rate if len(cache) > found else 0.0
    return (
        f"{found} of {plan.rows} rows were there, {len(cache) - found} were computed at {rate:.0f} "
        f"images/s; {plan.gb:.3g} GB in {cache.folder}; use them with "
        f"teacher.cache={config.teacher.cache}"
    )


def _missing(
    cache: FeatureCache, images: Tensor, tags: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Missing rows of unflipped images (N, 3, H, W), in chunks of views, tags and bins."""
    index, flips, bins = torch.cartesian_prod(
        torch.arange(len(images)), torch.arange(cache.plan.flips), torch.arange(cache.plan.bins)
    ).T
    tags = torch.stack([tags[index, 0], flips, tags[index, 2]], dim=1)
    for part in torch.split(cache.missing(tags, bins), cache.chunk):
        views, flipped = images[index[part]], flips[part].bool()
        views[flipped] = views[flipped].flip(-1)
        yield views, tags[part], bins[part]
