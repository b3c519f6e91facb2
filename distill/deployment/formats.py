"""The files that a student leaves in: ONNX, `torch.export`, TorchScript.

Whatever the format and the precision, an exported file takes RGB images, float32 in [0, 1],
(B, 3, H, W), normalises them itself, and gives float32.
"""

from __future__ import annotations

import copy
import io
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from distill.benchmarks import distinct_colours
from distill.deployment.folder import StudentCard
from distill.deployment.runtimes import METADATA, needs
from distill.errors import UserError, one_line
from students.heads import resize_logits
from students.student import Student

Format = Literal["timm", "hub", "onnx", "torchexport", "torchscript"]
What = Literal["backbone", "segmenter", "classifier"]
Precision = Literal["fp32", "fp16", "int8"]

OPSET = 18
"""The oldest ONNX opset with antialiased resizing like PIL's and torch's."""
OUTPUTS: Mapping[What, tuple[str, ...]] = MappingProxyType(
    {"segmenter": ("logits",), "classifier": ("logits",), "backbone": ("features", "pooled")}
)
SUFFIXES: Mapping[str, str] = MappingProxyType(
    {"onnx": ".onnx", "torchexport": ".pt2", "torchscript": ".ts"}
)
PRECISIONS: Mapping[str, tuple[Precision, ...]] = MappingProxyType(
    {"onnx": get_args(Precision), "torchexport": ("fp32", "fp16")}
)
"""Precisions of each format; other formats only have fp32."""


class Deployed(nn.Module):
    """A student with one job, ready to leave.

    Args:
        student: It is copied.
        what: `segmenter`: logits (B, classes, H, W) at the size of the images; `classifier`:
            logits (B, classes); `backbone`: the last feature map (B, C, h, w) and timm's pooled
            feature (B, D).
        half: Weights and everything after the normalisation in float16; outputs are float32 anyway.

    Attributes:
        any_size: Whether it takes images of any size, or of the student's `image_size` alone.
            Vision transformers have one size; so has a student whose images are resized first, and
            one whose smallest map has a single position, which torch exports as a case of its own.

    Raises:
        UserError: The student has another task.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student, what: What, half: bool = False) -> None:
        super().__init__()
        task: What = "classifier" if student.head is None else "segmenter"
        if what not in ("backbone", task):
            raise UserError(f"--what {what}: the student is a {task}; choose that, or backbone")
        student = copy.deepcopy(student).eval().to("cpu")
        student = student.to(memory_format=torch.contiguous_format)
        self.what = what
        self.image_size, self.input_size = student.image_size, student.input_size
        self.dtype = torch.float16 if half else torch.float32
        self.backbone = student.backbone.to(self.dtype)
        self.head = student.head.to(self.dtype) if student.head and what == "segmenter" else None
        reductions = {info["module"]: info["reduction"] for info in self.backbone.feature_info}
        self.any_size = self.input_size == self.image_size and _is_free(
            self.backbone, min(self.image_size), list(reductions.values())
        )
        self.taken = [list(reductions).index(name) for name in student.head_layers]
        if self.head is not None:  # what lies behind the last map that it reads stays here
            self.taken = self.backbone.prune_intermediate_layers(self.taken, prune_head=True)
        self.register_buffer("mean", student.mean)
        self.register_buffer("std", student.std)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) float32 in [0, 1] -> the outputs of `what`, float32."""
        x = images
        if self.input_size != self.image_size:
            x = F.interpolate(x, self.input_size, mode="bilinear", antialias=True)
        x = ((x - self.mean) / self.std).to(self.dtype)
        if self.head is not None:
            maps = self.backbone.forward_intermediates(
                x, indices=self.taken, output_fmt="NCHW", stop_early=True, intermediates_only=True
            )
            return resize_logits(self.head(maps), (images.shape[-2], images.shape[-1]))
        if self.what == "classifier":
            logits: Tensor = self.backbone(x).float()
            return logits
        final, maps = self.backbone.forward_intermediates(x, indices=1, output_fmt="NCHW")
        return maps[-1].float(), self.backbone.forward_head(final, pre_logits=True).float()


def _is_free(backbone: nn.Module, side: int, reductions: Sequence[int]) -> bool:
    """Whether a backbone takes images of any size; `side` is the shorter one of its own."""
    fixed = get_model_input_config(backbone)["fixed_input_size"]
    # Maps of one reduction: a plain vision transformer, which not all say of themselves.
    plain = len(set(reductions)) == 1
    return not fixed and not plain and side >= 2 * max(reductions)


def describe(model: Deployed, card: StudentCard, precision: Precision) -> dict[str, Any]:
    """The metadata of an exported file: what it takes, what it gives, where it came from.

    Args:
        model: What is exported.
        card: Of the student.
        precision: Of the file.
    """
    return {
        "what": model.what,
        "precision": precision,
        "input": "images: float32, (B, 3, H, W), RGB in [0, 1]",
        "image_size": list(model.image_size),
        "any_size": model.any_size,
        "normalisation": {
            "inside": True,
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
        },
        "outputs": list(OUTPUTS[model.what]),
        "class_names": list(card.class_names),
        "palette": [list(c) for c in card.palette or distinct_colours(card.classes).tolist()],
        "ignore_index": card.ignore_index,
        "provenance": {
            **card.provenance,
            "run": card.recipe.get("name"),
            "teacher_name": card.recipe.get("teacher", {}).get("name"),
            "model": card.model,
            "version": card.version,
        },
    }


def write(
    model: Deployed,
    path: Path,
    metadata: Mapping[str, Any],
    calibration: Sequence[Tensor] | None = None,
) -> None:
    """Write the format that the suffix of `path` names.

    Args:
        model: In the precision that it leaves in, or for int8 in float32.
        path: `.onnx`, `.pt2` or `.ts`.
        metadata: From `describe`; travels in the file.
        calibration: Batches (B, 3, H, W) in [0, 1]; with them the ONNX file becomes int8.

    Raises:
        UserError: A library is missing, or torch cannot export this architecture.
    """
    text = json.dumps(metadata)
    example = torch.rand(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    through_memory = io.BytesIO()  # on a full disk torch's own zip writer aborts the process
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # traced shapes and deprecations; parity is checked
            if path.suffix == ".ts":
                traced = torch.jit.trace(model, (example,), check_trace=False)  # type: ignore[no-untyped-call]
                torch.jit.save(traced, through_memory, _extra_files={METADATA: text})
                path.write_bytes(through_memory.getbuffer())
                return
            program = _captured(model, example)
            if path.suffix == ".pt2":
                program.example_inputs = None  # they would be the only pickle in the file
                torch.export.save(program, through_memory, extra_files={METADATA: text})
                path.write_bytes(through_memory.getbuffer())
                return
            _write_onnx(program, example, model, path, text)
    except (UserError, OSError):
        raise
    except Exception as error:  # architectures fail under tracing in any way at all
        raise UserError(
            f"torch cannot export this student as {path.suffix}: {_reason(error)}; try "
            "another --format"
        ) from error
    if calibration is not None:
        try:
            _quantise(path, text, calibration)
        except (UserError, OSError):
            raise
        except Exception as error:  # onnxruntime has its own, some of them bare Exceptions
            reason = one_line(error, 200)
            raise UserError(
                f"onnxruntime cannot quantise this student to int8: {reason}"
            ) from error


def _reason(error: BaseException) -> str:
    """One line about an error's first cause, without what exporters wrap around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error, 200) or type(error).__name__


def _captured(model: Deployed, example: Tensor) -> ExportedProgram:
    free = (0, 2, 3) if model.any_size else (0,)
    program = torch.export.export(
        model, (example,), dynamic_shapes=(dict.fromkeys(free, Dim.DYNAMIC),)
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it tells where the program's source lies
    return program


def _write_onnx(
    program: ExportedProgram, example: Tensor, model: Deployed, path: Path, text: str
) -> None:
    needs("onnxscript", "deploy")
    axes = {0: "batch", 2: "height", 3: "width"} if model.any_size else {0: "batch"}
    written = torch.onnx.export(
        program, (example,), input_names=["images"], output_names=OUTPUTS[model.what],
        dynamic_shapes=(axes,), opset_version=OPSET, dynamo=True, verbose=False,
    )  # fmt: skip
    assert written is not None
    written.model.metadata_props[METADATA] = text
    written.save(path, external_data=False)


class _Batches:
    """Calibration images as onnxruntime reads them."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The inputs of one run, None after the last."""
        batch = next(self._left, None)
        return None if batch is None else {"images": batch.numpy()}


def _quantise(path: Path, text: str, calibration: Sequence[Tensor]) -> None:
    """Turn an ONNX file into int8: static, weights by channel, activations by their range.

    Weights are of 7 bits: on CPUs without VNNI sums of products of 8 bits overflow the int16 that
    onnxruntime adds them in.
    Layer normalisation stays in float: its weights have one axis, no channels of their own.
    """
    quantization = needs("onnxruntime.quantization", "deploy")
    prepare = needs("onnxruntime.quantization.shape_inference", "deploy").quant_pre_process
    onnx = needs("onnx", "deploy")
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        prepared, quantised = Path(scratch, "prepared.onnx"), Path(scratch, "int8.onnx")
        # Its symbolic shapes stop at resizing to a map's size; onnx's own suffice.
        prepare(path, prepared, skip_symbolic_shape=True)
        nodes = onnx.load(prepared).graph.node
        norms = [node.name for node in nodes if node.op_type == "LayerNormalization"]
        quantization.quantize_static(
            prepared, quantised, _Batches(calibration), quant_format=quantization.QuantFormat.QDQ,
            per_channel=True, activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8, reduce_range=True, nodes_to_exclude=norms,
        )  # fmt: skip
        model = onnx.load(quantised)
        onnx.helper.set_model_props(model, {METADATA: text})
        onnx.save(model, path)
