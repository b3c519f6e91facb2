"""The linear protocol: one linear layer on frozen features, many learning rates at once.

The protocol of DINOv2 (Oquab et al. 2023, section 7): heads with other learning rates are trained
side by side on the same features, the best on val is tested once. For masks it is BatchNorm and a
1x1 convolution at every position, upsampled logits; for classes the same of pooled features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill import seeding
from distill.evaluation.backbones import Backbone
from distill.metrics import more_is_better
from distill.training.optim import lr_factor
from students.heads import LinearHead

WEIGHT_DECAY = 1e-4


class LinearProbe(nn.Module):
    """Linear heads on the maps of a frozen backbone.

    Args:
        backbone: Not a part of this module.
        rates: Learning rates, one per head.
        classes: Number of classes.
        dense: One class per position instead of one per image.
        seed: Seed of the heads' initial weights, which are equal.
    """

    def __init__(
        self, backbone: Backbone, rates: Sequence[float], classes: int, dense: bool, seed: int
    ) -> None:
        super().__init__()
        self.look, self.rates, self.dense = backbone.maps, tuple(rates), dense
        channels = [backbone.channels[layer] for layer in backbone.layers]
        heads = []
        for _ in rates:
            with seeding.seeded_torch(seed):
                heads.append(LinearHead(channels, classes))
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> logits of each head, (B, K), or (B, K, h, w) if dense,
        at the finest map's resolution."""
        maps = list(self.look(images).values())
        if self.dense:
            return [head(maps) for head in self.heads]
        pooled = [x.mean((2, 3), keepdim=True) for x in maps]
        return [head(pooled)[:, :, 0, 0] for head in self.heads]

    def keep_best(self, metric: str, found: Sequence[float]) -> dict[str, Any]:
        """Drop all heads but that of the best figure on val; the rate, and how it was chosen."""
        best = max(range(len(found)), key=lambda index: more_is_better(metric, found[index]))
        chosen = {
            "lr": self.rates[best],
            "chosen_on": "val",
            "val": dict(zip(map(str, self.rates), found, strict=True)),
        }
        self.heads = nn.ModuleList([self.heads[best]])
        self.rates = (self.rates[best],)
        return chosen


def fit(
    probe: LinearProbe,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    progress: Callable[[int], object] = lambda images: None,
) -> None:
    """Train all heads, each with AdamW at its own rate, which falls to 0 with a cosine.

    The heads share no weight, so that each one's gradient in the sum of losses is its own.

    Args:
        probe: In eval mode afterwards.
        batches: Images and targets on the probe's device, (B,) classes or (B, H, W) masks.
        steps: Number of batches.
        loss: From a head's output and the targets to one value, or one per image.
        progress: Called with the number of images after each step.
    """
    groups = [
        {"params": list(head.parameters()), "lr": rate}
        for head, rate in zip(probe.heads, probe.rates, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    probe.train()
    for step, (images, targets) in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, probe.rates, strict=True):
            group["lr"] = rate * lr_factor("cosine", step, steps, warmup=0)
        losses = [loss(output, targets).mean() for output in probe(images)]
        torch.autograd.backward(losses)  # the gradient of their sum
        optimizer.step()
        optimizer.zero_grad()
        progress(len(images))
    probe.eval()
