"""A student on the hub: the model card made from its run, and the upload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from distill import checkpoint
from distill.deployment.folder import CARD, StudentCard, without_paths
from distill.errors import UserError, one_line

README = "README.md"
NAMES = {  # a score -> its type and name in a model card
    "miou": ("mean_iou", "mIoU"),
    "pixel_accuracy": ("pixel_accuracy", "pixel accuracy"),
    "top1": ("accuracy", "top-1 accuracy"),
    "nme": ("nme", "NME (lower is better)"),
}

TEXT = """
# {name}

A {model} for {task}, {how}. Made with diffusion-distill {version}.

| | |
|---|---|
| data | `{benchmark}`, {labelled} labelled images, at {height}x{width} px |
| classes | {classes} |
| teacher | {teacher} |
| timestep policy | {policy} |
| steps | {steps} |
| seed | {seed} |
| commit | `{commit}` |

## Figures

{figures}

## Use

```python
import timm

model = timm.create_model("{source}", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`features_only=True` gives its feature maps, `num_classes=10` a new classifier.{head}

## Licence

To be filled in by whoever publishes it: the terms of the data and of the teacher hold for these
weights.
"""
HEAD = """
The segmentation head lies beside it in `head.safetensors`; with diffusion-distill,
`student, card = distill.deployment.folder.load_student(FOLDER)` gives backbone and head, and
`distill predict FOLDER IMAGE --out DIR` writes masks."""


def write_card(folder: Path, card: StudentCard, scores: Mapping[str, Any], source: str) -> None:
    """Write the model card beside an exported student, and take local paths out of `student.json`.

    Args:
        folder: The exported student.
        card: Of the student.
        scores: Of its run: `miou` or `top1` in [0, 1], and others; empty where they are not known.
        source: What timm is to be given.
    """
    recipe = card.recipe
    data, split = recipe["data"], recipe.get("evaluate", {}).get("split", "test")
    task = "image-segmentation" if card.dense else "image-classification"
    if card.task == "landmarks":
        task = "keypoint-detection"
    shown = [name for name in NAMES if isinstance(scores.get(name), float)]
    name = f"{recipe.get('name', 'student')}-{card.model}"
    fields = ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        # What the hub asks for where no standard licence is known to hold.
        license="other",
        license_name="terms-of-data-and-teacher",
        tags=["timm", "diffusion-distill", "knowledge-distillation", task],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=data["benchmark"],
                dataset_name=data["benchmark"],
                dataset_split=split,
                metric_type=NAMES[metric][0],
                metric_name=NAMES[metric][1],
                metric_value=round(scores[metric], 4),
            )
            for metric in shown
        ]
        or None,
    )
    taught = card.provenance.get("teacher")
    teacher = recipe.get("teacher", {})
    control = card.provenance.get("arm") == "random_teacher"
    of = f"distilled from a teacher (`{teacher.get('name')}`)" + (" of random weights" * control)
    text = TEXT.format(
        name=name,
        model=card.model,
        task=task.replace("-", " "),
        how=of if taught else "trained without a teacher",
        version=card.version,
        benchmark=data["benchmark"],
        labelled="all" if data.get("labelled") is None else data["labelled"],
        height=card.image_size[0],
        width=card.image_size[1],
        classes=", ".join(card.class_names),
        teacher=f"`{teacher.get('name')}`, features {taught[:12]}" if taught else "none",
        policy=f"`{recipe.get('policy', {}).get('name')}`" if taught else "none",
        steps=card.provenance.get("step"),
        seed=recipe.get("seed"),
        commit=card.provenance.get("commit"),
        figures="\n".join(
            f"- {NAMES[metric][1]} on {split}: {scores[metric]:.1%}" for metric in shown
        )
        or "The run has not been scored.",
        source=source,
        head=HEAD if card.dense and card.task != "landmarks" else "",
    )
    document = ModelCard(f"---\n{fields.to_yaml()}\n---\n{text}")
    checkpoint.write_text(folder / README, str(document))
    content = without_paths(json.loads((folder / CARD).read_text(encoding="utf-8")))
    checkpoint.write_text(folder / CARD, json.dumps(content, indent=2) + "\n")


def token_for(repository: str) -> str:
    """The token that huggingface_hub knows of.

    Raises:
        UserError: There is no token, or `repository` is not a valid name.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise UserError(f"--push {repository}: {error}") from error
    token = get_token()
    if token is None:
        raise UserError(
            "--push needs a token with write access: set HF_TOKEN, or log in with `hf auth login`"
        )
    return token


def push(folder: Path, repository: str, *, token: str, endpoint: str | None = None) -> str:
    """Upload a folder to a repository, made private where it is new. Returns what to print.

    Args:
        folder: An export of the format `hub`.
        repository: Its name, `user/name`.
        token: One that may write.
        endpoint: Of the hub; None: the library's own.

    Raises:
        UserError: The hub refused or cannot be reached; the folder is untouched.
    """
    api = HfApi(endpoint=endpoint, token=token)
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Add the exported student"
        )
    except Exception as error:  # its own, and those of whichever HTTP library it uses
        reason = one_line(error, 200)
        raise UserError(f"{folder} was written, but not uploaded: {reason}") from error
    return (
        f"uploaded to {address} (private if new; its page can make it public); open it with "
        f'timm.create_model("hf-hub:{repository}", pretrained=True)'
    )
