"""Exported files, opened by nothing but the runtime that they are made for.

The module loads no heavy library itself: `python -m distill.deployment.runtimes` runs an ONNX file
with onnxruntime and numpy alone, a `.pt2` or TorchScript file with torch alone, and an exported
folder with timm, which is how a new export is checked.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.errors import UserError, one_line

METADATA = "student.json"
"""Place of an exported file's metadata: a key in ONNX, an extra file in torch's formats."""
RUNTIMES = frozenset({"onnxruntime", "torch", "torchvision", "timm", "diffusers", "students"})

Array = NDArray[np.float32]
Run = Callable[[Array], tuple[Array, ...]]


class ModelFile(NamedTuple):
    """An exported file, ready to run."""

    metadata: dict[str, Any]
    """The metadata that `formats.describe` wrote into it."""
    run: Run
    """Function from images (B, 3, H, W) float32 RGB in [0, 1] to the outputs named in the
    metadata."""


def load(path: Path, threads: int = 0, *, trust: bool = False) -> ModelFile:
    """Open an exported file. An `.onnx` or `.pt2` file runs no code of its own (`refuse_code`).

    Args:
        path: An `.onnx`, `.pt2`, `.ts` or `.pt` file.
        threads: Of the CPU; 0: as many as the runtime likes.
        trust: Whether TorchScript (`.ts`, `.pt`) is opened: a program that may do anything, such as
            to write files.

    Raises:
        UserError: The file is missing, damaged, not trusted or not written by `distill export`, or
            its runtime is not installed.
    """
    if not path.is_file():
        raise UserError(f"there is no file or folder {path}")
    loader = LOADERS.get(path.suffix)
    if loader is None:
        raise UserError(f"{path} is not an exported file: {', '.join(LOADERS)}")
    if loader is _torchscript and not trust:
        raise UserError(
            f"{path} is TorchScript, a program that may do anything to this machine; open it with "
            "--trust if you know where it comes from, otherwise use .onnx or .pt2"
        )
    text, run = loader(path, threads)
    try:
        metadata = json.loads(text)
        metadata["what"], metadata["outputs"], metadata["image_size"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} was not written by distill export: no {METADATA} in it") from error
    return ModelFile(metadata, run)


def load_predictor(path: Path, threads: int = 0, *, trust: bool = False) -> ModelFile:
    """Open an exported segmenter or classifier; otherwise as `load`.

    Raises:
        UserError: As of `load`, or the file gives features.
    """
    opened = load(path, threads, trust=trust)
    if opened.metadata["what"] == "backbone":
        raise UserError(f"{path} returns features; export a segmenter or classifier to predict")
    return opened


def _onnx(path: Path, threads: int) -> tuple[str, Run]:
    runtime = needs("onnxruntime", "deploy")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    with _readable(path):
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Array) -> tuple[Array, ...]:
        return tuple(session.run(None, {"images": images}))

    return session.get_modelmeta().custom_metadata_map.get(METADATA, ""), run


def _torch_export(path: Path, threads: int) -> tuple[str, Run]:
    import torch

    with _readable(path):
        refuse_code(path)
        extra = {METADATA: ""}
        program = torch.export.load(str(path), extra_files=extra)
        # The guards are Python source in the file; what they would say, the model says itself.
        module = program.module(check_guards=False)
    return extra[METADATA], torch_run(module, threads)


def _torchscript(path: Path, threads: int) -> tuple[str, Run]:
    import torch

    extra = {METADATA: ""}
    with _readable(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, as the documents say
        module = torch.jit.load(  # type: ignore[no-untyped-call]
            str(path), map_location="cpu", _extra_files=extra
        )
    text = extra[METADATA]
    return text.decode() if isinstance(text, bytes) else text, torch_run(module, threads)


LOADERS = {".onnx": _onnx, ".pt2": _torch_export, ".ts": _torchscript, ".pt": _torchscript}


def plain_timm(folder: Path, threads: int = 0) -> ModelFile:
    """The model that plain timm makes of an exported folder, with timm's own preprocessing.

    Its output are the logits where the model has a classifier, otherwise its last feature map.
    """
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    size = config["input_size"][1:]
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def forward(images: Any) -> Any:
        if images.shape[-2:] != size:
            images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        images = (images - mean) / std
        if model.num_classes:
            return model(images)
        return model.forward_intermediates(images, indices=1, intermediates_only=True)[0]

    return ModelFile({}, torch_run(forward, threads))


def torch_run(module: Callable[..., Any], threads: int) -> Run:
    """A module of torch as a function of arrays; threads: of the CPU, 0: as they are."""
    import torch

    if threads:
        torch.set_num_threads(threads)

    def run(images: Array) -> tuple[Array, ...]:
        with torch.no_grad():
            outputs = module(torch.from_numpy(images))
        outputs = outputs if isinstance(outputs, list | tuple) else (outputs,)
        return tuple(output.numpy() for output in outputs)

    return run


def needs(module: str, extra: str) -> Any:
    """A library of one of the extras, or a UserError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is not installed; pip install 'diffusion-distill[{extra}]'"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn a runtime's errors about a damaged or foreign file into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each runtime has its own, some of them bare Exceptions
        reason = one_line(error, 160)
        raise UserError(
            f"{path} is damaged or was not written by distill export: {reason}"
        ) from error


# What a graph may be made of: arithmetic and formulas of sizes, torch's core operators, which have
# no side effects, and these, which its exporter leaves whole in timm's models.
ARITHMETIC = re.compile(
    r"torch\.sym_\w+|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge)"
)
WHOLE = """
    _assert_tensor_metadata _upsample_bilinear2d_aa adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool2d addcmul alias arange avg_pool2d baddbmm batch_norm broadcast_to chunk
    clamp_max clamp_min concat contiguous conv1d conv2d conv_transpose2d detach dropout einsum
    expand_as feature_dropout flatten floor_divide glu group_norm hardsigmoid hardswish
    instance_norm layer_norm lerp lift_fresh_copy linalg_vector_norm linear linspace masked_fill
    matmul max_pool2d meshgrid mish movedim narrow new_ones new_zeros ones ones_like outer pad
    pixel_shuffle pixel_unshuffle prelu relu6 repeat_interleave reshape rms_norm roll rsub
    scaled_dot_product_attention selu silu softmax softplus split square stack std std_mean swapaxes
    t tensor_split tile to transpose tril triu type_as unbind unflatten unfold upsample_bicubic2d
    upsample_bilinear2d upsample_nearest2d var_mean view_as zeros zeros_like
"""
OPERATORS = frozenset(WHOLE.split())
FORMULA = re.compile(
    r"(Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv"
    r"|positive|nonnegative|integer|True|[su]\d+)"
)
NAME = re.compile(r"[\w.]*")
# Texts that torch only keeps, or writes as literals: not names in the source that it generates.
REMARKS = frozenset(
    (
        *("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"),
        *("guards_code", "torch_version", "as_string"),
    )
)
CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict")


def refuse_code(path: Path) -> None:
    """Raise UserError if opening or running a `.pt2` file might run code that it brings.

    `torch.export.load` unpickles what an archive declares pickled, loads compiled libraries,
    evaluates formulas of sizes, imports the classes of its containers, finds a graph's functions by
    name anywhere in torch, some of which write files, and makes Python source of the graph's names.
    An export holds plain tensors, the operators above, plain formulas, containers and names.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise UserError(f"{path} contains two files of the same name; it is not opened")
        for name in names:
            inner = name.partition("/")[2]
            if not inner or not _is_plain(inner, archive.read(name)):
                raise UserError(f"{path} might run code of its own ({name}); it is not opened")


def _is_plain(name: str, content: bytes) -> bool:
    """Whether a file of an archive holds tensors, text, or a graph without calls of its own."""
    if name.startswith("models/"):
        return all(_is_harmless(key, text) for key, text in _texts(json.loads(content)))
    if name.endswith("_config.json"):
        payloads = json.loads(content)["config"].values()
        plain = ("weight_", "tensor_")
        return all(p["path_name"].startswith(plain) and not p["use_pickle"] for p in payloads)
    if name.startswith("data/aotinductor/"):
        return False
    return not (name.startswith("data/") and name.endswith(".pt") and content)


def _is_harmless(key: str, text: str) -> bool:
    """Whether torch may be given that text under that key of a graph."""
    if key == "target":
        return _is_operator(text)
    if key == "expr_str":
        return all(map(FORMULA.fullmatch, re.findall(r"[^\W\d]\w*", text)))
    if key in ("in_spec", "out_spec"):
        return _is_container(json.loads(text)[1])
    return key in REMARKS or NAME.fullmatch(text) is not None


def _is_operator(target: str) -> bool:
    import torch

    if ARITHMETIC.fullmatch(target):
        return True
    called = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if called is None:
        return False
    name, overload = called[1].removesuffix("_"), called[2]  # with _ in place
    if name in OPERATORS:
        return True
    found = getattr(getattr(torch.ops.aten, name, None), overload, None)
    return torch.Tag.core in getattr(found, "tags", ())


def _is_container(tree: Any) -> bool:
    """Whether a tree of inputs or outputs is one of tensors, tuples, lists and empty dicts."""
    if tree["type"] is None:
        return tree["context"] is None
    plain = tree["type"] in CONTAINERS and tree["context"] in ("null", "[]")
    return plain and all(map(_is_container, tree["children_spec"]))


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON tree with the key that it stands under; keys are texts under none."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield "", name
            yield from _texts(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)
    elif isinstance(tree, str):
        yield key, tree


def images_per_second(run: Run, batches: Sequence[Array]) -> float:
    """The median rate over batches, after a first one that warms up."""
    run(batches[0])
    rates = []
    for batch in batches[:25]:
        began = time.perf_counter()
        run(batch)
        rates.append(len(batch) / (time.perf_counter() - began))
    return median(rates)


def main(model: str, inputs: str, outputs: str, threads: str) -> None:
    """Run an export on the arrays of an .npz file; what it gives goes into another.

    Outputs follow each other batch by batch. Prints a JSON line: images per second, the metadata,
    and which runtimes were loaded.
    """
    path = Path(model)
    # What it is given has just been written by this program.
    opened = (
        plain_timm(path, int(threads)) if path.is_dir() else load(path, int(threads), trust=True)
    )
    with np.load(inputs) as file:
        batches = [file[name] for name in file.files]
    results = [opened.run(batch) for batch in batches]
    np.savez(outputs, *(array for result in results for array in result))
    size = batches[0].shape
    rate = images_per_second(opened.run, [batch for batch in batches if batch.shape == size])
    loaded = sorted(RUNTIMES & sys.modules.keys())
    print(json.dumps({"rate": rate, "metadata": opened.metadata, "loaded": loaded}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as problem:
        sys.exit(str(problem))
