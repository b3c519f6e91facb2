"""Finding and reading a diffusers UNet and its scheduler, on disk or on the Hugging Face hub.

Strict where diffusers is lenient (missing weights, NaN), silent where it chats, and every mistake
is one line that names the file. Weights are safetensors, or a `.bin` that diffusers reads with
`torch.load(weights_only=True)`, which runs no code from the file.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import SchedulerMixin, UNet2DModel
from diffusers.utils import logging as chatter
from huggingface_hub import snapshot_download

from teachers.noise import NoiseSchedule

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAFETENSORS = "diffusion_pytorch_model.safetensors"
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", "diffusion_pytorch_model.bin")
LOCAL_FOLDER = (
    "a local folder written by DDPMPipeline.save_pretrained or UNet2DModel.save_pretrained"
)


class TeacherFolder(NamedTuple):
    """Where the two halves of a teacher lie.

    Attributes:
        unet: folder of `config.json` and the weights.
        scheduler: folder of `scheduler_config.json`.
    """

    unet: Path
    scheduler: Path


def locate(path: str, revision: str | None = None) -> TeacherFolder:
    """Find a teacher's files.

    Args:
        path: a pipeline folder (`unet/` and `scheduler/`, or both flat in it as in the first
            pipelines on the hub), a UNet's folder with the scheduler in it or beside it, or a hub
            id.
        revision: branch, tag or commit, for a hub id.

    Raises:
        OSError: no such folder or file, or the hub cannot give it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or not HUB_ID.fullmatch(path):
            raise FileNotFoundError(f"{path!r} is not a folder; give {LOCAL_FOLDER}, or a hub id")
        folder = download(path, revision)
    folder = folder.resolve()
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (unet / "config.json").is_file():
        raise FileNotFoundError(f"{path!r} holds no {unet / 'config.json'}; give {LOCAL_FOLDER}")
    for scheduler in (unet / "scheduler", unet, unet.parent / "scheduler", unet.parent):
        if (scheduler / "scheduler_config.json").is_file():
            return TeacherFolder(unet, scheduler)
    raise FileNotFoundError(
        f"no scheduler_config.json in {unet} or beside it, and a noise schedule cannot be guessed; "
        f"save the one that the UNet was trained with: scheduler.save_pretrained({str(unet)!r})"
    )


def download(hub_id: str, revision: str | None) -> Path:
    """Fetch configs and weights (safetensors where there are any) into the hub's own cache.

    Raises:
        OSError: offline and not in the cache, or no such repository or revision.
    """

    def fetch(weights: str) -> Path:
        patterns = ["*config.json", f"*{weights}"]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch(SAFETENSORS)
        if not any(folder.rglob(SAFETENSORS)):
            folder = fetch("diffusion_pytorch_model.bin")
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise OSError(
            f"{hub_id!r}{at} is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}); check the name and the connection, or give {LOCAL_FOLDER}"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is not a JSON object."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The architecture in `folder/config.json`, every key of `UNet2DModel` filled in.

    Raises:
        ValueError: not an unconditional RGB `UNet2DModel`.
    """
    path = folder / "config.json"
    content = read_json(path)
    kind = content.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{path} describes a {kind}; a teacher must be a UNet2DModel")
    try:
        with quiet(), torch.device("meta"):
            known, _, _ = UNet2DModel.extract_init_dict(content)
            config = dict(UNet2DModel(**known).config)
    except (TypeError, ValueError, AttributeError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"{path} does not describe a UNet2DModel: {reason}") from error
    if config["in_channels"] != 3:
        raise ValueError(
            f"{path}: the UNet takes {config['in_channels']} channels; a teacher must take 3 (RGB)"
        )
    if config["class_embed_type"] is not None or config["num_class_embeds"] is not None:
        raise ValueError(f"{path}: the UNet is conditioned on classes; a teacher must not be")
    return config


def load_schedule(folder: Path) -> NoiseSchedule:
    """The noise schedule that `folder/scheduler_config.json` describes.

    Raises:
        ValueError: an unknown scheduler, or one without a variance-preserving schedule.
    """
    path = folder / "scheduler_config.json"
    kind = read_json(path).get("_class_name")
    scheduler_class: Any = getattr(diffusers, str(kind), None)
    known = isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)
    if not known:
        raise ValueError(f"{path} names {kind!r}, which is not a scheduler of diffusers")
    try:
        with quiet():
            return NoiseSchedule.from_scheduler(scheduler_class.from_pretrained(folder))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_unet(folder: Path) -> UNet2DModel:
    """The trained UNet of that folder, in float32, every weight from the file and finite.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: they are truncated, of another architecture, incomplete, or not finite.
    """
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"no weights in {folder}: it should hold {SAFETENSORS}")
    try:
        with quiet():
            # low_cpu_mem_usage leaves missing weights on the meta device instead of reporting them
            unet, report = UNet2DModel.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=weights.suffix != ".bin",
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{weights} is truncated, or does not fit config.json beside it; copy both again "
            f"({textwrap.shorten(str(error), 200)})"
        ) from error
    for what in ("missing", "unexpected"):
        if keys := report[f"{what}_keys"]:
            names = ", ".join(sorted(keys)[:3])
            raise ValueError(
                f"{weights} does not fit config.json beside it: {len(keys)} {what} weights, "
                f"such as {names}"
            )
    for name, weight in unet.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{weights}: {name} holds values that are not finite")
    return unet


def random_unet(config: Mapping[str, Any], seed: int) -> UNet2DModel:
    """The same architecture with fresh weights: the control that a trained teacher must beat."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        return UNet2DModel.from_config(config)


def fingerprint(folder: TeacherFolder, unet: UNet2DModel) -> str:
    """SHA-256 over both config files and all weights; diffusers' own bookkeeping keys left out."""
    digest = hashlib.sha256()
    for path in (folder.unet / "config.json", folder.scheduler / "scheduler_config.json"):
        config = {key: value for key, value in read_json(path).items() if key[0] != "_"}
        digest.update(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers' log lines off the terminal: what matters is raised."""
    verbosity = chatter.get_verbosity()
    chatter.set_verbosity(chatter.CRITICAL)
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
