"""Finding and reading diffusers models and schedulers, on disk or on the Hugging Face hub.

Strict where diffusers is lenient (missing weights, NaN), silent where it logs, and every mistake
is one line that names the file. Weights are safetensors, or a `.bin` that diffusers reads with
`torch.load(weights_only=True)`, which runs no code from the file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from teachers.noise import NoiseSchedule

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAFETENSORS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
HALVES = ("fp16", "bf16")  # variants: the same weights again, rounded
NOT_AVERAGED = "*.non_ema*"  # a variant too, but worse weights
LOCAL_FOLDER = "a local folder written by save_pretrained of a diffusers pipeline or model"

FAMILIES = {
    "UNet2DModel": "diffusers_unet",
    "UNet2DConditionModel": "stable_diffusion",
    "DiTTransformer2DModel": "dit",
    "Transformer2DModel": "dit",
    "SD3Transformer2DModel": "flow",
    "FluxTransformer2DModel": "flow",
}
"""The teacher that reads each of diffusers' networks."""

Built = TypeVar("Built")


def pipeline_folder(
    path: str, revision: str | None = None, components: Sequence[str] = ("",)
) -> Path:
    """The folder of a pipeline: a local one, or one fetched from the hub into its cache.

    Args:
        path: a folder, or a hub id.
        revision: branch, tag or commit, for a hub id.
        components: the subfolders whose weights are needed; "" for the pipeline's own folder.

    Raises:
        OSError: no such folder, and the hub does not have it.
        ValueError: a revision was given for a local folder.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_file():
            raise FileNotFoundError(
                f"{path!r} is a single file; convert it to a folder by diffusers' "
                "from_single_file(...).save_pretrained(FOLDER); one of OpenAI's guided diffusion "
                "is read by teacher.name=guided_diffusion"
            )
        if folder.exists() or not HUB_ID.fullmatch(path):
            raise FileNotFoundError(
                f"{path!r} is not a folder{_near(folder)}; give {LOCAL_FOLDER}, or a hub id"
            )
        folder = download(path, revision, components)
    elif revision is not None:
        raise ValueError(
            f"revision {revision!r} is for hub ids, but {path!r} is a local folder; leave it out"
        )
    return folder.resolve()


def download(hub_id: str, revision: str | None, components: Sequence[str] = ("",)) -> Path:
    """Fetch configs and weights into the hub's own cache.

    Each component gets its best weights: full precision before half, safetensors before `.bin`.

    Raises:
        OSError: offline and not in the cache, or no such repository or revision.
    """

    def fetch(lacking: Sequence[str], suffix: str, ignored: Sequence[str]) -> Path:
        weights = [f"{component and component + '/'}*{suffix}" for component in lacking]
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=["*.json", "*.txt", "*tokenizer*/*", *weights],
                ignore_patterns=[NOT_AVERAGED, *ignored],
            )
        )

    lacking = list(components)
    try:
        for ignored in ([f"*.{half}*" for half in HALVES], []):
            for suffix in (".safetensors", ".bin"):
                folder = fetch(lacking, suffix, ignored)
                lacking = [name for name in lacking if not any((folder / name).rglob(f"*{suffix}"))]
                if not lacking:
                    return folder
    except (OSError, ValueError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise OSError(
            f"{hub_id!r}{at} is not a local folder{_near(Path(hub_id))}, and could not be fetched "
            f"from the hub ({type(error).__name__}); check the name and the connection, or give "
            f"{LOCAL_FOLDER}"
        ) from error
    return folder


def _near(folder: Path) -> str:
    """A question, in brackets, whether the folder of a like name beside it is meant."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    names = [path.name for path in beside if path.is_dir()]
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f" (did you mean {str(folder.with_name(near[0]))!r}?)" if near else ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError if it is not an object."""
    if not path.is_file():
        above = path.parents[min(2, len(path.parents) - 1)]
        whole = (above / "model_index.json").is_file()
        right = f"the folder of the whole pipeline, {above}" if whole else LOCAL_FOLDER
        raise FileNotFoundError(f"there is no {path}; give {right}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object")
    return content


def without_bookkeeping(path: Path) -> dict[str, Any]:
    """A config file without diffusers' own notes, the keys that begin with an underscore."""
    return {key: value for key, value in read_json(path).items() if key[0] != "_"}


def read_config(
    folder: Path, architecture: type[ModelMixin], former_names: Sequence[str] = ()
) -> dict[str, Any]:
    """The architecture in `folder/config.json`, with the class's defaults for missing keys.

    Args:
        folder: of the model.
        architecture: the expected class.
        former_names: older names of that class, which older files have.

    Raises:
        ValueError: another class, or values that the class does not accept.
    """
    path = folder / "config.json"
    content = read_json(path)
    name, found = architecture.__name__, content.get("_class_name")
    if found not in (name, *former_names):
        family = FAMILIES.get(str(found))
        hint = f"; a recipe reads it with teacher.name={family}" if family else ""
        if found is None and "architecture" in content:
            found = f"{content['architecture']} of timm"
            hint = f"; a recipe reads it with teacher.name=timm teacher.path=local-dir:{folder}"
        raise ValueError(f"{path} describes a {found}; it must describe a {name}{hint}")
    try:
        with quiet(), torch.device("meta"):
            known, _, _ = architecture.extract_init_dict(content)
            config = dict(architecture(**known).config)
    except Exception as error:  # a config may be wrong in any way at all
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"{path} does not describe a {name}: {reason}") from error
    return {key: value for key, value in config.items() if key[0] != "_"}


def load_schedule(folder: Path) -> NoiseSchedule:
    """The noise schedule that `folder/scheduler_config.json` describes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown or unsupported scheduler.
    """
    path = folder / "scheduler_config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    scheduler_class: Any = getattr(diffusers, str(kind), None)
    if lacking := getattr(scheduler_class, "_backends", None):  # diffusers' stand-in
        raise ValueError(f"{path}: {kind} needs the packages {', '.join(lacking)}; install them")
    known = isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)
    if not known:
        raise ValueError(f"{path} names {kind!r}, which is not a scheduler of diffusers")
    rescaled = "rescale_betas_zero_snr"
    if config.get(rescaled) and rescaled not in signature(scheduler_class.__init__).parameters:
        raise ValueError(
            f"{path}: {rescaled} is true, but {kind} does not support it; give the config of the "
            "scheduler that the model was trained with, such as DDIMScheduler"
        )
    try:
        with quiet():
            return NoiseSchedule.from_scheduler(scheduler_class.from_pretrained(folder))
    except Exception as error:  # it may be wrong in any way at all
        raise ValueError(f"{path}: {textwrap.shorten(str(error), 200)}") from error


def find_weights(folder: Path, safetensors: str, pickled: str) -> tuple[Path, str | None]:
    """The best weights in a model's folder, in the order of `download`.

    Args:
        folder: of the model.
        safetensors, pickled: the library's file names for each kind.

    Returns:
        The file, or the index of its shards, and its variant in the library's terms.

    Raises:
        FileNotFoundError: there are none.
    """
    for variant in (None, *HALVES):
        for whole in (safetensors, f"{safetensors}.index.json", pickled, f"{pickled}.index.json"):
            stem, ending = whole.rsplit(".", 1)
            path = folder / (f"{stem}.{variant}.{ending}" if variant else whole)
            if path.is_file():
                return path, variant
    raise FileNotFoundError(f"no weights in {folder}: expected {safetensors}")


def load_model(folder: Path, architecture: type[ModelMixin]) -> ModelMixin:
    """The trained model in a folder, in its file's precision, with every weight read and finite.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: they are truncated, of another architecture, incomplete, or not finite.
    """
    weights, variant = find_weights(folder, SAFETENSORS, PICKLED)
    try:
        with quiet():
            # low_cpu_mem_usage leaves missing weights on the meta device instead of reporting them
            model, report = architecture.from_pretrained(
                folder,
                torch_dtype=stored_dtype(weights),
                use_safetensors=".safetensors" in weights.name,
                variant=variant,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        pickled = "" if ".safetensors" in weights.name else ", contains more than tensors,"
        raise ValueError(
            f"{weights} is truncated{pickled} or does not match config.json beside it; copy both "
            f"again ({textwrap.shorten(str(error), 200)})"
        ) from error
    for what in ("missing", "unexpected"):
        if keys := report[f"{what}_keys"]:
            names = ", ".join(sorted(keys)[:3])
            raise ValueError(
                f"{weights} does not match config.json beside it: {len(keys)} {what} weights, "
                f"such as {names}"
            )
    check_finite(model, weights)
    return model


def stored_dtype(weights: Path) -> torch.dtype:
    """The 16-bit dtype that all tensors of a safetensors file share; otherwise float32.

    Large models are published in 16 bits; as float32 they would need twice the memory to load.

    Args:
        weights: the file, or the index of its shards.

    Raises:
        OSError, KeyError, ValueError, AttributeError: shards are missing, or the index is damaged.
    """
    if ".safetensors" not in weights.name:
        return torch.float32
    files = [weights]
    if weights.suffix == ".json":
        shards = {str(shard) for shard in read_json(weights)["weight_map"].values()}
        files = [weights.with_name(shard) for shard in sorted(shards)]
    kinds = set()
    for file in files:
        # a damaged one shows when it is read
        with suppress(SafetensorError), safe_open(file, framework="pt") as tensors:
            kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        if kinds == {name}:
            return dtype
    return torch.float32


def check_finite(model: nn.Module, source: Path) -> None:
    """Raises ValueError naming the file and the first weight that is not finite."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{source}: {name} has values that are not finite")


def randomly(build: Callable[[], Built], seed: int) -> Built:
    """The result of `build` with torch's default generator seeded, and restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        return build()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over all weights, as float32: names, shapes, dtypes and bytes; 64 hex digits."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        weight = weight.float() if weight.is_floating_point() else weight
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def quiet(chatter: Any = diffusers.utils.logging) -> Iterator[None]:
    """Keep a library's log lines and progress bars off the terminal; problems are raised.

    Args:
        chatter: `utils.logging` of diffusers or transformers.
    """
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(chatter.CRITICAL)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
