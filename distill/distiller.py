"""The one trainable module: student, feature losses and reward head, with the paper's losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses import FeatureLoss, class_shares, task_loss
from rl_policy.reward import TeacherTaskReward
from students.student import Student

SMALL = 8
"""Side in px of the image that a policy may see."""


class Lesson(NamedTuple):
    """What the teacher shows for one batch."""

    bins: Tensor
    """(B,) int64, the policy's choice."""
    timesteps: Tensor
    """(B,) int64, the same as indices of the teacher's schedule."""
    maps: Mapping[str, Tensor]
    """Teacher layer -> (B, C, h, w)."""
    again: Mapping[str, Tensor] | None = None
    """The same under another draw of the noise, in steps that measure the target-noise floor."""


class Match(NamedTuple):
    """One pair of feature maps, and its weight; several student maps go into one."""

    student: tuple[str, ...]
    teacher: str
    weight: float

    def __str__(self) -> str:
        return f"{'+'.join(self.student)}-{self.teacher}"


class Losses(NamedTuple):
    """Of one step; scalars but the last four."""

    total: Tensor
    task: Tensor
    feature: Tensor
    reward_head: Tensor
    rewards: Tensor
    """(labelled,) what the reward head tells of an image's labels (`TeacherTaskReward`)."""
    context: Tensor
    """(B, D) what the policy saw."""
    bins: Tensor
    """(B,) what it chose."""
    floor: Tensor
    """(pairs, B) `FeatureLoss.noise_floor` in steps that measure it, otherwise (0,)."""


def merge(parts: Sequence[Losses]) -> Losses:
    """The losses of a step whose images came in equal parts: means, and the rows of all images,
    the rewarded ones first."""
    if len(parts) == 1:
        return parts[0]
    rewarded = [len(part.rewards) for part in parts]

    def rows(values: Sequence[Tensor]) -> Tensor:
        pairs = list(zip(values, rewarded, strict=True))
        return torch.cat([x[:n] for x, n in pairs] + [x[n:] for x, n in pairs])

    total, task, feature, reward_head = (
        torch.stack(values).mean(dim=0) for values in zip(*(p[:4] for p in parts), strict=True)
    )
    return Losses(
        total,
        task,
        feature,
        reward_head,
        rows([part.rewards for part in parts]),
        rows([part.context for part in parts]),
        rows([part.bins for part in parts]),
        rows([part.floor.movedim(-1, 0) for part in parts]).movedim(0, -1),
    )


def small_image(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) at 8x8 px, (B, 192): a context that needs no network."""
    return F.adaptive_avg_pool2d(images, SMALL).flatten(1)


class Distiller(nn.Module):
    """Task loss and feature loss together (RepFusion, Yang and Wang, ICCV 2023, Algorithm 1).

    One module, so that one wrapper synchronises all gradients. The teacher is no part of it.

    Args:
        student: The student, returning every map that `matches` names.
        matches: The pairs; empty for a student without a teacher.
        losses: One feature loss a pair.
        reward_head: Light head on the teacher's map `reward_layer`.
        reward_layer: Which map that is.
        context: What the policy sees: the student's last map, pooled, or the image at 8x8 px.
        feature_weight: Weight of the feature loss beside the task loss.
        ignore_index: Target value without label.
    """

    def __init__(
        self,
        student: Student,
        *,
        matches: Sequence[Match] = (),
        losses: Sequence[FeatureLoss] = (),
        reward_head: TeacherTaskReward | None = None,
        reward_layer: str = "",
        context: Literal["student", "image"] = "student",
        feature_weight: float = 1.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.student, self.losses, self.reward_head = student, nn.ModuleList(losses), reward_head
        self.matches, self.reward_layer = tuple(matches), reward_layer
        self.context = context
        self.feature_weight, self.ignore_index = feature_weight, ignore_index

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teach: Callable[[Tensor], Lesson] | None,
        task_weight: float = 1.0,
    ) -> Losses:
        """The losses of one step.

        Args:
            images: (B, 3, H, W) in [0, 1], the labelled ones first.
            targets: Of the labelled images: classes (L,), or masks (L, H, W), int64; L <= B.
            teach: From the policy's contexts (B, D) to what the teacher shows; None: labels alone.
            task_weight: 0 while only features are distilled.
        """
        labelled = len(targets)
        logits, maps = self.student(images, labelled=labelled if task_weight else 0)
        zero = images.new_zeros(())
        task = self._task(logits, targets).mean() if task_weight else zero
        if teach is None:
            nothing = images.new_zeros(0)
            return Losses(task, task, zero, zero, nothing, nothing, nothing, nothing)
        context = self._context(images, maps)
        lesson = teach(context)
        feature, floor = zero, []
        for match, loss in zip(self.matches, self.losses, strict=True):
            assert isinstance(loss, FeatureLoss)
            students, target = [maps[name] for name in match.student], lesson.maps[match.teacher]
            feature = feature + match.weight * loss(students, target, lesson.timesteps).mean()
            if lesson.again is not None:
                floor.append(loss.noise_floor(students[0], target, lesson.again[match.teacher]))
        assert self.reward_head is not None
        reward_logits = self.reward_head(
            lesson.maps[self.reward_layer][:labelled], lesson.bins[:labelled]
        )
        reward_losses = self._task(reward_logits, targets)
        rewards = self._rewards(reward_logits, targets, lesson.bins[:labelled])
        total = task_weight * task + self.feature_weight * feature + reward_losses.mean()
        return Losses(
            total,
            task.detach(),
            feature.detach(),
            reward_losses.mean().detach(),
            rewards,
            context,
            lesson.bins,
            torch.stack(floor) if floor else images.new_zeros(0),
        )

    @property
    def context_size(self) -> int:
        """D, of what the policy sees of an image."""
        if self.context == "image":
            return 3 * SMALL * SMALL
        return self.student.channels[self.student.layers[-1]]

    @torch.no_grad()
    def _context(self, images: Tensor, maps: Mapping[str, Tensor]) -> Tensor:
        if self.context == "image":
            return small_image(images)
        return maps[self.student.layers[-1]].float().mean(dim=(2, 3))

    @torch.no_grad()
    def _rewards(self, logits: Tensor, targets: Tensor, bins: Tensor) -> Tensor:
        """How much better the teacher's feature tells the labels than the bin alone: (L,)."""
        assert self.reward_head is not None
        by_feature, by_bin = self.reward_head.guesses(logits, bins)
        shares = class_shares(targets, logits.shape[1], self.ignore_index)
        if self.training:
            self.reward_head.count(shares, bins)
        return -(shares * by_bin).sum(dim=1) - self._task(by_feature, targets)

    def _task(self, logits: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            return task_loss(logits.float(), targets, self.ignore_index)
