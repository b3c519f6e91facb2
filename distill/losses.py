"""Feature losses and task losses, each one number an image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import UserError, nearest
from students.heads import resize_logits


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error. student, teacher: (B, C, H, W) -> (B,)."""
    return (student - teacher).square().mean(dim=(1, 2, 3))


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute error. student, teacher: (B, C, H, W) -> (B,)."""
    return (student - teacher).abs().mean(dim=(1, 2, 3))


def smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Squared below `beta`, absolute above. student, teacher: (B, C, H, W) -> (B,)."""
    error = F.smooth_l1_loss(student, teacher, beta=beta, reduction="none")
    return error.mean(dim=(1, 2, 3))


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine over channels, mean over positions. student, teacher: (B, C, H, W) -> (B,)."""
    return (1 - F.cosine_similarity(student, teacher, dim=1)).mean(dim=(1, 2))


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


def relational(student: Tensor, teacher: Tensor, *, angle_weight: float = 2.0) -> Tensor:
    """Relational knowledge distillation, distances and angles (Park et al. 2019, section 3.2).

    An image's share is the mean over the pairs that it is in, plus `angle_weight` times the mean
    over the triplets of which it is the vertex; the mean over the batch is the paper's loss. Memory
    grows with B cubed, not with the maps.

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
    x = x - x.mean(dim=0)
    gram = x @ x.T
    norms = gram.diagonal()
    # (vertex, i, k): the inner product of x_i - x_vertex and x_k - x_vertex.
    inner = gram - gram[:, :, None] - gram[:, None, :] + norms[:, None, None]
    # Images that coincide, as each with itself, have no direction: the floor makes their cosines 0
    # and keeps the gradients finite.
    floor = 1e-6 * norms.detach().mean() + 1e-12
    lengths = inner.diagonal(dim1=1, dim2=2).clamp(min=floor).sqrt()
    cosines = inner / (lengths[:, :, None] * lengths[:, None, :])
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return lengths / lengths[others].mean(), cosines


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


class Measure(NamedTuple):
    """How far a student's map is from a teacher's, and what it asks of them.

    Attributes:
        function: (student (B, C, H, W), teacher (B, C, H, W)) float32 -> (B,); its keyword-only
            parameters are the options.
        same_channels: It compares channels with channels, so that a projector must align them.
        poolable: It still says something of maps averaged to one position.
        smallest_batch: The fewest images it can compare.
    """

    function: Callable[..., Tensor]
    same_channels: bool = True
    poolable: bool = True
    smallest_batch: int = 1


MEASURES = MappingProxyType(
    {
        "mse": Measure(mse),
        "l1": Measure(l1),
        "smooth_l1": Measure(smooth_l1),
        "cosine": Measure(cosine),
        "at": Measure(attention_transfer, same_channels=False, poolable=False),
        "rkd": Measure(relational, same_channels=False, smallest_batch=3),
        "infonce": Measure(infonce, smallest_batch=2),
    }
)


class Standardise(nn.Module):
    """Zero mean and unit variance a channel, by running statistics.

    Cumulative over the first `window` batches, so right from the first one, exponential after. Only
    batches in training mode count. Under DistributedDataParallel every rank uses rank 0's buffers.

    Args:
        channels: Channels of the map.
        window: Batches over which the statistics run.
    """

    batches: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, window: int = 100) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) float32 -> the same shape, without gradient."""
        if self.training:
            self._update(x)
        scale = (self.variance + 1e-5).rsqrt()
        return (x - self.mean[:, None, None]) * scale[:, None, None]

    def _update(self, x: Tensor) -> None:
        """Mix the batch's moments in (Chan et al. 1979): exact, also where mean >> deviation."""
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        self.batches += 1
        share = 1 / self.batches.clamp(max=self.window)
        shift = mean - self.mean
        self.mean += share * shift
        self.variance += share * (variance - self.variance + (1 - share) * shift.square())


class FeatureLoss(nn.Module):
    """How far a student's feature map is from a teacher's, one number an image.

    The finer map is averaged down to the coarser grid (bilinear where the sizes do not divide), the
    student's goes through an own 1x1 projector, the teacher's is standardised.

    Args:
        measure: A name in `MEASURES`, a measure of one's own, or a function for one.
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        pooled: Compare the maps' averages over all positions.
        projector: Learn a 1x1 convolution to the teacher's channels. None: where channels differ
            and the measure compares them.
        standardise: Standardise the targets a channel.
        options: Options of the measure, such as `temperature`.

    Raises:
        UserError: On an unknown measure or option, or a combination that has no meaning.
    """

    def __init__(
        self,
        measure: str | Measure | Callable[..., Tensor],
        student_channels: int,
        teacher_channels: int,
        *,
        pooled: bool = False,
        projector: bool | None = None,
        standardise: bool = True,
        options: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if isinstance(measure, str):
            if measure not in MEASURES:
                raise UserError(f"no feature loss {measure!r}; {nearest(measure, MEASURES)}")
            self.name, self.measure = measure, MEASURES[measure]
        else:
            self.measure = measure if isinstance(measure, Measure) else Measure(measure)
            self.name = self.measure.function.__name__
        self.options = _checked(options, self.name, self.measure.function)
        self.pooled = pooled
        if pooled and not self.measure.poolable:
            raise UserError(f"feature loss {self.name!r} compares positions: it has no pooled form")
        align = self.measure.same_channels and student_channels != teacher_channels
        if align and projector is False:
            raise UserError(
                f"feature loss {self.name!r} compares {student_channels} channels with "
                f"{teacher_channels}: it needs a projector"
            )
        self.projector: nn.Module = nn.Identity()
        if align if projector is None else projector:
            self.projector = nn.Conv2d(student_channels, teacher_channels, 1)
        self.standardise = Standardise(teacher_channels) if standardise else nn.Identity()

    def forward(self, student_map: Tensor, teacher_map: Tensor, timesteps: Tensor) -> Tensor:
        """Compare; gradients reach the student and the projector, never the teacher.

        Args:
            student_map: (B, Cs, hs, ws), any float type.
            teacher_map: (B, Ct, ht, wt), any float type.
            timesteps: (B,) int64, for a projector that depends on them; none does yet.

        Returns:
            (B,) float32, computed in float32 (but the projector) whatever autocast says.

        Raises:
            UserError: If the batch is too small for the measure.
        """
        if len(student_map) < self.measure.smallest_batch:
            raise UserError(
                f"feature loss {self.name!r} compares the images of a batch: it needs "
                f"{self.measure.smallest_batch} or more, not {len(student_map)}"
            )
        student, target = student_map.float(), teacher_map.detach().float()
        grid = (1, 1) if self.pooled else _coarser(student, target)
        student = self.projector(_resize(student, grid))
        with torch.autocast(student.device.type, enabled=False):
            target = self.standardise(_resize(target, grid))
            return self.measure.function(student.float(), target, **self.options)


def task_loss(logits: Tensor, targets: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy, one number an image.

    Args:
        logits: (B, C), or (B, C, h, w), which is resized to the masks.
        targets: Classes (B,) int64, or masks (B, H, W) int64.
        ignore_index: Mask value that does not count.

    Returns:
        (B,) float32: of masks the mean over valid pixels, 0 if none is valid.
    """
    if targets.ndim == 1:
        return F.cross_entropy(logits.float(), targets, reduction="none")
    height, width = targets.shape[-2:]
    pixels = F.cross_entropy(
        resize_logits(logits, (height, width)), targets, ignore_index=ignore_index, reduction="none"
    )
    valid = (targets != ignore_index).sum(dim=(1, 2))
    return pixels.sum(dim=(1, 2)) / valid.clamp(min=1)


def _checked(
    options: Mapping[str, float], name: str, function: Callable[..., Tensor]
) -> dict[str, float]:
    """The options, if the function has them."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            near = nearest(option, known) if known else "it has none"
            raise UserError(f"feature loss {name!r} has no option {option!r}; {near}")
    return dict(options)


def _coarser(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    (hs, ws), (ht, wt) = student.shape[-2:], teacher.shape[-2:]
    return min(hs, ht), min(ws, wt)


def _resize(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *grid), a grid that is not finer."""
    height, width = x.shape[-2:]
    if (height, width) == grid:
        return x
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(x, (height // grid[0], width // grid[1]))
    return F.interpolate(x, grid, mode="bilinear", antialias=True)
