"""A student: any timm backbone, its feature maps by name, and a head for the task."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.models import get_model_input_config, resolve_model_input_args
from torch import Tensor, nn
from torch.nn import functional as F

from students.decoders import DecoderHead
from students.heads import FullyConvolutionalHead, LinearHead, PyramidHead

HEADS: Mapping[str, Callable[[Sequence[int], int], nn.Module]] = MappingProxyType(
    {
        "linear": LinearHead,
        "fpn": PyramidHead,
        "fcn": FullyConvolutionalHead,
        "upernet": partial(DecoderHead, "upernet"),
        "deeplabv3plus": partial(DecoderHead, "deeplabv3plus"),
        "segformer": partial(DecoderHead, "segformer"),
    }
)


class LayerError(ValueError):
    """A feature map that a student does not have.

    Args:
        layer: Its name, as requested.
        problem: One line that includes the name.
    """

    def __init__(self, layer: str, problem: str) -> None:
        super().__init__(problem)
        self.layer = layer


class Student(nn.Module):
    """A timm model that returns logits and named feature maps from one forward pass.

    Small images: timm's ResNets and ConvNeXts have no argument for a small stem, and at 32 px their
    last map has one position. Give them `input_size`, which plain timm reproduces by resizing the
    image, or `kwargs={"output_stride": 8}`, which dilates the last stages. A ViT takes
    `kwargs={"patch_size": 4}`.

    Args:
        model: A timm model's name, or `local-dir:FOLDER`, `hf-hub:NAME`.
        classes: Number of classes.
        dense: One prediction per position (segmentation) instead of one per image.
        image_size: Height and width of the images given.
        layers: The feature maps to return, by timm's own module names (`layer4`, `blocks.11`,
            `stages.3`).
        head: One of `HEADS`; used if dense. The classification head is timm's own.
        head_layers: The feature maps that the dense head reads. Empty: the last four stages, or
            four evenly spaced blocks if all have one size, as in a plain ViT.
        input_size: Height and width that the backbone sees: images are resized to it. None:
            `image_size`.
        pretrained: Start from timm's pretrained weights of that name.
        kwargs: Further arguments of the timm model.

    Attributes:
        backbone: The plain timm model.
        head: The dense head, None in classification.
        layers: The feature maps returned, shallowest first.
        channels: Channels of each feature map returned.

    Raises:
        LayerError: On an unknown layer.
        ValueError: On an unknown model, head or argument, or a size that does not fit.
        OSError: If the pretrained weights cannot be read.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str,
        *,
        classes: int,
        dense: bool,
        image_size: tuple[int, int],
        layers: Sequence[str] = (),
        head: str = "fpn",
        head_layers: Sequence[str] = (),
        input_size: tuple[int, int] | None = None,
        pretrained: bool = False,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; {_nearest(head, HEADS)}")
        if head_layers and not dense:
            raise ValueError(
                "head_layers is for dense heads, not for classification; set head_layers=[]"
            )
        self.image_size = (*image_size,)
        self.input_size = (*(input_size or image_size),)
        # Any: timm's models share these methods, but no typed base class.
        self.backbone: Any = _create_backbone(
            model, 0 if dense else classes, self.input_size, pretrained, kwargs
        )
        feature_info = {info["module"]: info for info in self.backbone.feature_info}
        available = list(feature_info)
        reductions = {name: int(info["reduction"]) for name, info in feature_info.items()}
        channels = {name: int(info["num_chs"]) for name, info in feature_info.items()}
        _check_size(self.input_size, list(reductions.values()), self.backbone, model)

        self.layers = _in_order(layers, available)
        self.channels = {name: channels[name] for name in self.layers}
        self.head: nn.Module | None = None
        self.head_layers: tuple[str, ...] = ()
        if dense:
            self.head_layers = _in_order(head_layers or _spread(reductions), available)
            self.head = HEADS[head]([channels[name] for name in self.head_layers], classes)
        self._available = available
        # timm needs at least one map; the last one is there anyway.
        self._taken = _in_order((*self.layers, *self.head_layers) or available[-1:], available)

        for name in ("mean", "std"):
            values = torch.tensor(self.backbone.pretrained_cfg[name])
            # Not persistent: constants of the model's config, no weights.
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)

    def forward(
        self, images: Tensor, labelled: int | None = None, head_maps: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict, and return the maps in `layers`.

        Args:
            images: (B, 3, *image_size) in [0, 1].
            labelled: L, the number of images (the first of B) to predict; the others only give
                maps. 0: the backbone stops after the last of `layers`. None: all.
            head_maps: Also return the maps that the dense head reads, if it predicts.

        Returns:
            Logits in float32: (L, classes); if dense (L, classes, h, w) at the finest map that the
            head reads (`resize_logits` resizes them to the mask); (0,) if L is 0. And the feature
            maps by name, each (B, C, h, w).

        Raises:
            ValueError: If the images have another size than the student was built for.
        """
        if images.shape[-2:] != self.image_size:
            raise ValueError(
                f"the images are {_text(tuple(images.shape[-2:]))} px, but the student was built "
                f"for {_text(self.image_size)} px; build it with that image_size"
            )
        taken = self.layers if labelled == 0 else self._taken
        classify = self.head is None and labelled != 0
        output = self.backbone.forward_intermediates(
            self._normalise(images),
            indices=[self._available.index(name) for name in taken],  # not second in all models
            output_fmt="NCHW",
            stop_early=not classify,
            intermediates_only=not classify,
        )
        named = dict(zip(taken, output[1] if classify else output, strict=True))
        if classify:
            logits = self.backbone.forward_head(output[0][:labelled])
        elif self.head is not None and labelled != 0:
            logits = self.head([named[name][:labelled] for name in self.head_layers])
        else:
            logits = images.new_zeros(0)
        return logits.float(), named if head_maps else {name: named[name] for name in self.layers}

    def backbone_config(self) -> dict[str, Any]:
        """The keywords of `timm.models.save_for_hf(student.backbone, folder, **config)`.

        timm records the model's arguments itself; this adds the preprocessing, so that timm's own
        transform gives the images that this student's backbone sees.
        """
        return {
            "safe_serialization": True,
            "data_config": {
                "input_size": (3, *self.input_size),
                "mean": tuple(self.mean.flatten().tolist()),
                "std": tuple(self.std.flatten().tolist()),
                # Resize both sides to the input size, without a crop.
                "interpolation": "bilinear",
                "crop_pct": 1.0,
                "crop_mode": "squash",
            },
        }

    def _normalise(self, images: Tensor) -> Tensor:
        """(B, 3, *image_size) in [0, 1] -> (B, 3, *input_size) with timm's mean and deviation."""
        if self.input_size != self.image_size:
            # antialias is how PIL, and so timm's transform, resizes.
            images = F.interpolate(images, self.input_size, mode="bilinear", antialias=True)
        return (images - self.mean) / self.std


def _create_backbone(
    model: str, classes: int, size: tuple[int, ...], pretrained: bool, kwargs: Mapping[str, Any]
) -> Any:
    """Build the timm model for images of `size`, turning timm's errors into one clear line."""
    if ":" not in model and not timm.is_model(model):
        raise ValueError(f"timm has no model {model!r}; {_nearest(model, timm.list_models())}")
    _check_kwargs(kwargs)
    try:
        arguments = resolve_model_input_args(
            model, {"img_size": size}, num_classes=classes, **kwargs
        )
        backbone = timm.create_model(pretrained=pretrained, **arguments)
    except (TypeError, AssertionError, ArithmeticError, KeyError, OSError, RuntimeError) as error:
        named = isinstance(error, KeyError) and error.args[0] in kwargs.values()
        if named or isinstance(error, TypeError | AssertionError | ArithmeticError):
            reason = f"timm has no {error}" if named else str(error) or "timm rejects it"
            raise ValueError(f"{model!r} does not accept {dict(kwargs)}: {reason}") from error
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise OSError(
            f"cannot read the model or weights of {model!r}: {reason}; give "
            "'local-dir:FOLDER', or do without pretrained weights"
        ) from error
    if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "feature_info"):
        raise ValueError(f"timm has no feature maps for {model!r}; choose another model")
    return backbone


def _check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse what is not the user's to set, and rates that show only in training."""
    for name, why in (
        ("num_classes", "is the benchmark's"),
        ("in_chans", "is always 3"),
        ("features_only", "is not needed: the student takes the maps that it is asked for"),
    ):
        if name in kwargs:
            raise ValueError(f"kwargs: {name} {why}; leave it out")
    for name, value in kwargs.items():
        if name.endswith("_rate") and isinstance(value, int | float) and not 0 <= value < 1:
            raise ValueError(f"kwargs: {name} must be from 0 to below 1, got {value}")


def _in_order(names: Sequence[str], available: list[str]) -> tuple[str, ...]:
    """The names without duplicates, shallowest first; LayerError if the model lacks one."""
    for name in names:
        if name not in available:
            near = _nearest(name, available)
            listed = f" It has {', '.join(available)}" if "did you mean" in near else ""
            raise LayerError(name, f"no layer {name!r}; {near}{listed}")
    return tuple(name for name in available if name in names)


def _spread(reductions: Mapping[str, int]) -> list[str]:
    """The default maps of a dense head: the last four stages, or four evenly spaced blocks."""
    names = list(reductions)
    pyramid = len(set(reductions.values())) > 1
    step = 1 if pyramid else max(len(names) // 4, 1)
    return names[::-step][:4]


def _check_size(size: tuple[int, ...], reductions: list[int], backbone: Any, model: str) -> None:
    """Raise ValueError unless each map has a position, and a ViT's patches tile the image."""
    deepest = max(reductions)
    if get_model_input_config(backbone)["fixed_input_size"] or min(reductions) == deepest:
        rule = f"a multiple of {deepest}"
        fitting = tuple(max(round(side / deepest), 1) * deepest for side in size)
    else:
        rule = f"at least {deepest}"
        fitting = tuple(max(side, deepest) for side in size)
    if size != fitting:
        raise ValueError(
            f"{model!r} does not accept images of {_text(size)} px: each side must be {rule}; "
            f"try {_text(fitting)} as input_size or image_size"
        )


def _nearest(name: str, choices: Iterable[str]) -> str:
    known = list(choices)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"


def _text(size: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in size)
