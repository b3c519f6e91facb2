"""Distances between a student's and a teacher's map, one value per image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Measure(NamedTuple):
    """A distance between a student's and a teacher's map, and its requirements.

    Attributes:
        function: (student (B, C, H, W), teacher (B, C, H, W)) float32 -> (B,); its keyword-only
            parameters are the options.
        same_channels: Whether it compares channel with channel, so that a projector must align
            them.
        poolable: Whether it is meaningful for maps averaged to one position.
        smallest_batch: The fewest images it can compare.
    """

    function: Callable[..., Tensor]
    same_channels: bool = True
    poolable: bool = True
    smallest_batch: int = 1

    def __call__(self, student: Tensor, teacher: Tensor, **options: float) -> Tensor:
        """Call `function`."""
        return self.function(student, teacher, **options)


@Measure
def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error. student, teacher: (B, C, H, W) -> (B,)."""
    return (student - teacher).square().mean(dim=(1, 2, 3))


@Measure
def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute error. student, teacher: (B, C, H, W) -> (B,)."""
    return (student - teacher).abs().mean(dim=(1, 2, 3))


@Measure
def smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Squared below `beta`, absolute above. student, teacher: (B, C, H, W) -> (B,)."""
    error = F.smooth_l1_loss(student, teacher, beta=beta, reduction="none")
    return error.mean(dim=(1, 2, 3))


@Measure
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine over channels, mean over positions. student, teacher: (B, C, H, W) -> (B,)."""
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean(dim=(1, 2))


@partial(Measure, same_channels=False, poolable=False)
def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """Squared distance of unit-length attention maps (Zagoruyko & Komodakis 2017, eq. 2).

    The attention of a position is the sum over channels of |activation|^power. The paper's distance
    is squared here, as in its authors' code, but summed over positions: 0 to 2 at every map size.

    student: (B, C, H, W), teacher: (B, C', H, W) -> (B,).
    """
    attention = [
        F.normalize(x.abs().pow(power).sum(dim=1).flatten(1), dim=1) for x in (student, teacher)
    ]
    return (attention[0] - attention[1]).square().sum(dim=1)


@partial(Measure, same_channels=False, smallest_batch=3)
def relational(student: Tensor, teacher: Tensor, *, angle_weight: float = 2.0) -> Tensor:
    """Relational knowledge distillation, distances and angles (Park et al. 2019, section 3.2).

    An image's value is the mean over the pairs that contain it, plus `angle_weight` times the mean
    over the triplets with it as vertex; the mean over the batch is the paper's loss. Memory grows
    with B cubed, not with the maps.

    student: (B, C, H, W), teacher: (B, C', H', W'), B >= 3 -> (B,).
    """
    student_distances, student_cosines = _relations(student.flatten(1))
    teacher_distances, teacher_cosines = _relations(teacher.flatten(1))
    distance = F.smooth_l1_loss(student_distances, teacher_distances, reduction="none").sum(dim=1)
    angle = F.smooth_l1_loss(student_cosines, teacher_cosines, reduction="none").sum(dim=(1, 2))
    others = len(student) - 1
    return distance / others + angle_weight * angle / (others * (others - 1))


def _relations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances over their mean, (B, B), and cosines (B, B, B) of i, vertex, k; x: (B, D)."""
    x = (x - x.mean(dim=0)).double()  # differences of products lose digits
    gram = x @ x.T
    # (vertex, i, k): the inner product of x_i - x_vertex and x_k - x_vertex.
    inner = gram - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    inner, norms = inner.float(), gram.diagonal().float()
    # Images that coincide, as each with itself, have no direction: the floor makes their cosines 0
    # and keeps the gradients finite.
    floor = 1e-6 * norms.detach().mean() + 1e-12
    lengths = inner.diagonal(dim1=1, dim2=2).clamp(min=floor).sqrt()
    cosines = inner / (lengths[:, :, None] * lengths[:, None, :])
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return lengths / lengths[others].mean(), cosines


@partial(Measure, poolable=False)
def mse_at(student: Tensor, teacher: Tensor, *, attention_weight: float = 10.0) -> Tensor:
    """Whitened squared error plus attention transfer (Li et al. 2023, DreamTeacher, eqs. 1 and 2).

    The teacher's map of each image is whitened, to zero mean and unit variance over all its values
    (LayerNorm without parameters): no image outweighs another, and where its attention lies stays.

    student, teacher: (B, C, H, W) -> (B,).
    """
    whitened = F.layer_norm(teacher, teacher.shape[1:])
    return mse(student, whitened) + attention_weight * attention_transfer(student, whitened)


@partial(Measure, smallest_batch=2)
def infonce(student: Tensor, teacher: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Contrastive loss: find the teacher's vector at one's own position (Oord et al. 2018, eq. 4).

    The other candidates are the other positions of the same image, and the same position of the
    batch's other images; of pooled maps only the images remain. B x HW x (HW + B) similarities.

    student, teacher: (B, C, H, W), B >= 2 -> (B,), the mean over positions.
    """
    student = F.normalize(student.flatten(2), dim=1) / temperature  # (B, C, N)
    teacher = F.normalize(teacher.flatten(2), dim=1)
    positions = torch.einsum("bcn,bcm->bnm", student, teacher)
    images = torch.einsum("bcn,kcn->bnk", student, teacher)
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)[:, None, :]
    candidates = torch.cat([positions, images.masked_fill(itself, -torch.inf)], dim=2)
    return (candidates.logsumexp(dim=2) - positions.diagonal(dim1=1, dim2=2)).mean(dim=1)
