"""One column of the map of layers and timesteps: linear probes on all layers at one timestep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distill import seeding
from distill.benchmarks import IGNORE_INDEX
from distill.errors import UserError
from distill.metrics import ConfusionMatrix
from distill.probing.linear_probe import Batches, Labelled, Ridge, labelled, probe_score
from teachers.protocol import Teacher

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TEMPERATURES = tuple(0.02 * 1.5**power for power in range(12))  # 0.02 to 1.7
WIDTH = 1536
"""Number of random directions that replace the channels of a wider layer, to bound memory."""


class Parts(NamedTuple):
    """Batches of images (B, 3, H, W) in [0, 1] and targets, (B,) or (B, H, W), in equal order at
    every call."""

    fit: Callable[[], Batches]
    """Training images that the probes are fitted on."""
    held: Callable[[], Batches]
    """Training images that choose penalty and temperature."""
    val: Callable[[], Batches]
    """Images that are scored."""


class ProbeResult(NamedTuple):
    """The results of a probe on one layer at one timestep."""

    score: float
    """mIoU or top-1 on val, in [0, 1]."""
    held_loss: float
    """Mean cross-entropy, in nats, on the held-out training images."""
    penalty: float
    """Penalty of the probe, chosen for the least held-out loss."""
    temperature: float
    """Divides the outputs before the softmax; chosen together with the penalty."""
    effective_rank: float
    """Effective rank of the training images' features, see `linear_probe.effective_rank`."""
    rewards: Tensor
    """(R, N) float32: minus each val image's mean cross-entropy, for each draw of the noise; NaN
    for an image without a label."""


def measure(
    teacher: Teacher,
    timestep: int,
    parts: Parts,
    *,
    classes: int,
    dense: bool,
    ignore_index: int = IGNORE_INDEX,
    device: torch.device | str = "cpu",
    seed: int = 0,
    draws: int = 1,
    probe: type[Ridge] = Ridge,
) -> dict[str, ProbeResult]:
    """Probe every layer of a teacher, each image seen once (val: once for each draw).

    The probe is fitted on one part of the training images, its penalty and temperature are chosen
    on the other, and it is fitted again on both. Nothing of the size of images x features is kept.

    Args:
        teacher: On `device`.
        timestep: Of all images.
        parts: The data.
        classes: Number of classes.
        dense: Whether targets are masks: positions are probed, and mIoU is the score.
        ignore_index: The target of what has no label.
        device: Where features are computed and sums are kept.
        seed: Of the noise, which is the same for every teacher and timestep: they are compared on
            equal images.
        draws: R, of the noise of val.
        probe: The kind of it.

    Raises:
        UserError: A part has no label.
    """
    looks = _Looks(teacher, timestep, ignore_index, device, seed)
    widths = {layer: min(teacher.channels[layer], WIDTH) for layer in teacher.layers}
    fitted = _fit(looks, parts, lambda layer: probe(widths[layer], classes, device), teacher.layers)
    matrices = {layer: ConfusionMatrix(classes, ignore_index, device) for layer in fitted}
    rewards: dict[str, list[list[Tensor]]] = {layer: [[] for _ in range(draws)] for layer in fitted}
    for draw in range(draws):
        for count, seen in looks(parts.val()):
            for layer, part in seen.items():
                outputs = _outputs(part, fitted[layer].solved)
                matrices[layer].update(outputs.argmax(1), part.classes)
                logits = outputs / fitted[layer].temperature
                loss = F.cross_entropy(logits, part.classes, reduction="none")
                rewards[layer][draw].append(-_image_means(loss, part.images, count))
    if not all(int(matrix.counts.sum()) for matrix in matrices.values()):
        raise UserError("there are no labelled examples to score the probe on")
    return {
        layer: ProbeResult(
            score=probe_score(matrices[layer].counts, dense),
            held_loss=fit.held_loss,
            penalty=fit.penalty,
            temperature=fit.temperature,
            effective_rank=fit.sums.effective_rank(),
            rewards=torch.stack([torch.cat(draw) for draw in rewards[layer]]).float().cpu(),
        )
        for layer, fit in fitted.items()
    }


class _Fitted(NamedTuple):
    sums: Ridge
    solved: tuple[Tensor, Tensor]
    held_loss: float
    penalty: float
    temperature: float


def _fit(
    looks: _Looks, parts: Parts, new: Callable[[str], Ridge], layers: Sequence[str]
) -> dict[str, _Fitted]:
    """Fit on one part, choose on the other, and fit on both; every layer by itself."""
    fits, helds = ({layer: new(layer) for layer in layers} for _ in range(2))
    for _, seen in looks(parts.fit()):
        for layer, part in seen.items():
            fits[layer].update(part.features, part.classes)
    candidates = {layer: [fit.solve(x) for x in PENALTIES] for layer, fit in fits.items()}
    losses = {
        layer: torch.zeros(len(PENALTIES), len(TEMPERATURES), dtype=torch.float64)
        for layer in layers
    }
    for _, seen in looks(parts.held()):
        for layer, part in seen.items():
            helds[layer].update(part.features, part.classes)
            losses[layer] += _losses(part, candidates[layer])
    fitted = {}
    for layer, fit in fits.items():
        if not helds[layer].count:
            raise UserError("there are no labelled examples in the held-out training images")
        row, column = divmod(int(losses[layer].argmin()), len(TEMPERATURES))
        held_loss = losses[layer].min().item() / helds[layer].count
        fit.add(helds[layer])
        solved = fit.solve(PENALTIES[row])
        fitted[layer] = _Fitted(fit, solved, held_loss, PENALTIES[row], TEMPERATURES[column])
    return fitted


def _outputs(part: Labelled, solved: tuple[Tensor, Tensor]) -> Tensor:
    """(N, K) float64."""
    weight, bias = solved
    return part.features.double() @ weight + bias


def _losses(part: Labelled, candidates: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Summed cross-entropy of every penalty at every temperature, (P, T) float64."""
    rows = []
    for solved in candidates:
        outputs = _outputs(part, solved)
        each = [
            F.cross_entropy(outputs / temperature, part.classes, reduction="sum")
            for temperature in TEMPERATURES
        ]
        rows.append(torch.stack(each))
    return torch.stack(rows).cpu()


def _image_means(values: Tensor, images: Tensor, count: int) -> Tensor:
    """Mean of values (N,) by image (N,) in 0..count-1 -> (count,), NaN where there is none."""
    sums = values.new_zeros(count).index_add(0, images, values)
    return sums / torch.bincount(images, minlength=count)


class _Looks:
    """Shows batches to a teacher at one timestep, with noise by the number of the batch."""

    def __init__(
        self,
        teacher: Teacher,
        timestep: int,
        ignore_index: int,
        device: torch.device | str,
        seed: int,
    ) -> None:
        self.teacher, self.timestep, self.ignore_index = teacher, timestep, ignore_index
        self.device, self.seed = device, seed
        self._directions: dict[str, Tensor] = {}
        self._seen = 0

    def __call__(self, batches: Batches) -> Iterator[tuple[int, dict[str, Labelled]]]:
        """The number of images in each batch, and what of it has a label, by layer."""
        for images, targets in batches:
            noise = seeding.generator(self.seed, "probe", self._seen, device=self.device)
            self._seen += 1
            timesteps = torch.full((len(images),), self.timestep)
            maps = self.teacher.features(images.to(self.device), timesteps, noise)
            for layer, feature in maps.items():
                if not bool(feature.isfinite().all()):
                    raise UserError(
                        f"a feature of layer {layer!r} is not finite at timestep {self.timestep}; "
                        "try teacher.dtype=bfloat16, or float32"
                    )
            parts = {
                layer: labelled(maps[layer], targets, self.ignore_index)
                for layer in self.teacher.layers
            }
            yield (
                len(images),
                {
                    layer: part._replace(features=self._narrowed(layer, part.features))
                    for layer, part in parts.items()
                },
            )

    def _narrowed(self, layer: str, x: Tensor) -> Tensor:
        """At most `WIDTH` features (N, C), each a fixed random sum of all channels.

        By the spread of the first batch all channels count alike: transformers have a few huge
        ones, which would be all that is left.
        """
        channels = x.shape[1]
        if channels <= WIDTH:
            return x
        if not len(x):
            return x.new_zeros(0, WIDTH)
        if layer not in self._directions:
            generator = torch.Generator().manual_seed(channels)
            directions = torch.randn(channels, WIDTH, generator=generator).to(x) / WIDTH**0.5
            spread = x.std(0, correction=0)
            directions[spread == 0] = 0
            spread[spread == 0] = 1
            self._directions[layer] = directions / spread[:, None]
        return x @ self._directions[layer]
