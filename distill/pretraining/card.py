"""The model card of a teacher that was trained here: what it is, and how to make it again."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.pretraining.judge import TeacherProbe, TimestepLosses
from distill.provenance import commit
from distill.recipe import to_yaml
from distill.run_folder import read_metrics
from distill.teacher_config import TeacherTrainConfig

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {name}

A denoising diffusion model, trained with `distill teacher train` to be a teacher. It loads with
`DDPMPipeline.from_pretrained`. It was trained on images alone: no label, no val or test image.

| | |
|---|---|
| data | `{benchmark}`, train split, {images} images at {height}x{width} px, without labels |
| terms | those of the data hold for these weights |
| parameters | {parameters:.2f} M, stored as {dtype} |
| seed | {seed} |{started}
| steps | {steps} of {batch} images ({seen:,} images seen) |
| loss | {curve} (means over equal parts of the training, first to last) |
| speed | {rate:.1f} images per second (waiting for data and sampling included) |
| hardware | {hardware}{processes} |
| commit | `{commit}` |
| sha256 of the weights | `{sha256}` |

## Loss by timestep

{losses}

## Linear probe

{probe}

## How to make it

Made by saving this as `recipe.yaml` and running `distill teacher train recipe.yaml
data.root=FOLDER`:

```yaml
{recipe}```
"""

PROBE = """{metric} on val: **{trained:.1%}** for this teacher, {random:.1%} for the same
architecture with random weights. A ridge regression on the features of `{layer}` at timestep
{timestep}, fitted to {train} labelled train images and scored on {val} val images (for mIoU: at the
positions of that feature map). Labels were used for this probe alone, after the training."""

LOSSES = """Mean squared error of the predicted {prediction} on {images} {split} images, from
timesteps with little noise to those with much; the noise is the same for every teacher.

{table}"""

PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "image"}


def teacher_card(
    config: TeacherTrainConfig,
    folder: Path,
    *,
    images: int,
    size: tuple[int, int],
    parameters: int,
    schedule: Mapping[str, Any],
    hardware: str,
    processes: int,
    losses: TimestepLosses | str,
    probe: TeacherProbe | str,
) -> str:
    """The card of a run's pipeline.

    Args:
        config: The recipe.
        folder: The run folder, with its log and `pipeline/`.
        images: Number of training images.
        size: (H, W) that they were trained at.
        parameters: Of the network.
        schedule: The config of its noise schedule, a `DDPMScheduler`.
        hardware: The machine in words.
        processes: How many trained together.
        losses: Loss at each noise level, or the reason for having none.
        probe: Scores of the probe, or the reason for having none.

    Raises:
        UserError: The log is lost.
    """
    # The maker's folders of data and runs mean nothing to others.
    data = dataclasses.replace(config.data, root=None)
    begun = config.init_from
    if begun is not None and Path(begun).is_absolute():
        begun = Path(begun).name
    recipe = dataclasses.replace(config, data=data, output="runs", init_from=begun)
    rows = read_metrics(folder)
    if not rows:
        raise UserError(
            f"{folder / 'metrics.jsonl'} has no rows: the teacher in {folder / 'pipeline'} is "
            "complete, but its card cannot be written without them"
        )
    curve = means([row["loss/denoising"] for row in rows])
    return CARD.format(
        name=config.name,
        benchmark=config.data.benchmark,
        images=images,
        height=size[0],
        width=size[1],
        parameters=parameters / 1e6,
        dtype=config.save_dtype,
        seed=config.seed,
        started=f"\n| started from | `{begun}` |" if begun else "",
        steps=config.steps,
        batch=config.batch,
        seen=config.steps * config.batch,
        curve=", ".join(f"{loss:.3f}" for loss in curve),
        rate=rows[-1]["images_per_second"],
        commit=commit(),
        hardware=hardware,
        processes=f", {processes} processes" if processes > 1 else "",
        sha256=hashlib.sha256((folder / "pipeline" / WEIGHTS).read_bytes()).hexdigest(),
        losses=_losses(losses, schedule),
        probe=_missing(probe) if isinstance(probe, str) else PROBE.format(**probe._asdict()),
        recipe=to_yaml(recipe),
    )


def means(values: Sequence[float]) -> list[float]:
    """Means over ten equal parts, fewer where there are fewer values."""
    parts = min(10, len(values))
    edges = [part * len(values) // parts for part in range(parts + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _losses(losses: TimestepLosses | str, schedule: Mapping[str, Any]) -> str:
    if isinstance(losses, str):
        return _missing(losses)
    parts = len(losses.values)
    edges = [part * schedule["num_train_timesteps"] // parts for part in range(parts + 1)]
    columns = [
        ("timesteps", "---", "loss"),
        *(
            (f"{low} to {high - 1}", "---", f"{loss:.4f}")
            for low, high, loss in zip(edges[:-1], edges[1:], losses.values, strict=True)
        ),
    ]
    return LOSSES.format(
        prediction=PREDICTIONS[schedule["prediction_type"]],
        images=losses.images,
        split=losses.split,
        table="\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)),
    )


def _missing(reason: str) -> str:
    return f"Not measured: {reason}."
