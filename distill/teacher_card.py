"""The model card of a teacher that was trained here: what it is, and how to make it again."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from distill.config import TeacherTrainConfig
from distill.recipe import to_yaml
from distill.tracking import commit, read_metrics

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {name}

A denoising diffusion model, trained with `distill teacher train` to be a teacher. It loads with
`DDPMPipeline.from_pretrained`. Nothing but images was seen: no label, and no val or test image.

| | |
|---|---|
| data | `{benchmark}`, train split, {images} images of {height}x{width} px, without labels |
| terms | those of the data hold for these weights |
| parameters | {parameters:.2f} M, stored as {dtype} |
| seed | {seed} |
| steps | {steps} of {batch} images ({seen:,} images seen) |
| final loss | {loss:.4f} (mean over the last tenth of the steps) |
| commit | `{commit}` |
| hardware | {hardware} |
| sha256 of the weights | `{sha256}` |

Made by saving this as `recipe.yaml` and running `distill teacher train recipe.yaml`:

```yaml
{recipe}```
"""


def teacher_card(
    config: TeacherTrainConfig,
    folder: Path,
    *,
    images: int,
    size: tuple[int, int],
    parameters: int,
    hardware: str,
) -> str:
    """The card of a run's pipeline.

    Args:
        config: The recipe.
        folder: The run folder, with its log and `pipeline/`.
        images: Number of training images.
        size: (H, W) that they were trained at.
        parameters: Of the network.
        hardware: The machine in words.
    """
    # Where its maker kept data and runs tells nobody anything.
    data = dataclasses.replace(config.data, root=None)
    recipe = dataclasses.replace(config, data=data, output="runs")
    losses = [row["loss/denoising"] for row in read_metrics(folder)]
    late = losses[-max(1, len(losses) // 10) :]
    return CARD.format(
        name=config.name,
        benchmark=config.data.benchmark,
        images=images,
        height=size[0],
        width=size[1],
        parameters=parameters / 1e6,
        dtype=config.save_dtype,
        seed=config.seed,
        steps=config.steps,
        batch=config.batch,
        seen=config.steps * config.batch,
        loss=sum(late) / max(1, len(late)),
        commit=commit(),
        hardware=hardware,
        sha256=hashlib.sha256((folder / "pipeline" / WEIGHTS).read_bytes()).hexdigest(),
        recipe=to_yaml(recipe),
    )
