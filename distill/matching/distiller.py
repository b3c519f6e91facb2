"""The one trainable module: student, feature losses and reward head, with the paper's losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.matching.losses import FeatureLoss, class_shares, task_loss
from distill.matching.targets import FeatureTargets
from rl_policy.label_free import LabelFreeReward
from rl_policy.reward import TeacherTaskReward
from students.student import Student

SMALL = 8
"""Side in px of the image that a policy sees in a probe's table, and by default."""


class Match(NamedTuple):
    """One pair of feature maps, and its weight; several student maps go into one."""

    student: tuple[str, ...]
    teacher: str
    weight: float

    def __str__(self) -> str:
        return f"{'+'.join(self.student)}-{self.teacher}"


class Losses(NamedTuple):
    """Of one step; four scalars, and figures of each image."""

    total: Tensor
    task: Tensor
    feature: Tensor
    reward_head: Tensor
    """Of all rewards that are trained."""
    rewards: Mapping[str, Tensor]
    """By name (`distill list rewards`): of the labelled images, (L,), or of all, (B,)."""
    context: Tensor
    """(B, D) what the policy saw."""
    bins: Tensor
    """(B,) what it chose."""
    floor: Tensor
    """(pairs, B) `FeatureLoss.noise_floor` in steps that measure it, otherwise (0,)."""
    weights: Tensor | None = None
    """(B, K) of a mixture of all timesteps, which collect a gradient."""


def merge(parts: Sequence[Losses]) -> Losses:
    """The losses of a step whose images came in equal parts: means, and the rows of all images."""
    if len(parts) == 1:
        return parts[0]

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(part, name) for part in parts]).mean(dim=0)

    return Losses(
        total=mean("total"),
        task=mean("task"),
        feature=mean("feature"),
        reward_head=mean("reward_head"),
        rewards={
            name: torch.cat([part.rewards[name] for part in parts]) for name in parts[0].rewards
        },
        context=torch.cat([part.context for part in parts]),
        bins=torch.cat([part.bins for part in parts]),
        floor=torch.cat([part.floor for part in parts], dim=-1),
    )


def small_image(images: Tensor, size: int = SMALL) -> Tensor:
    """Images (B, 3, H, W) at SxS px, (B, 3 S S): a context that needs no network."""
    return F.adaptive_avg_pool2d(images, size).flatten(1)


class Distiller(nn.Module):
    """Task loss and feature loss together (RepFusion, Yang and Wang, ICCV 2023, Algorithm 1).

    One module, so that one wrapper synchronises all gradients. The teacher is no part of it.

    Args:
        student: The student, returning every map that `matches` names.
        matches: The pairs; empty for a student without a teacher.
        losses: One feature loss a pair.
        reward_head: Light head on the teacher's map `reward_layer`, for `teacher_task`.
        label_free: The same for clusters in place of labels, for `label_free`.
        reward_layer: Which map that is.
        auxiliary: Second head, on the last but one of the maps that the student's head reads.
        context: What the policy sees: the last matched map of the student, pooled, or the small
            image.
        image_size: Side in px of that image.
        feature_weight: Weight of the feature loss beside the task loss.
        auxiliary_weight: The same of the second head's task loss (Zhao et al. 2017, section 3.3).
        ignore_index: Target value without label.
    """

    def __init__(
        self,
        student: Student,
        *,
        matches: Sequence[Match] = (),
        losses: Sequence[FeatureLoss] = (),
        reward_head: TeacherTaskReward | None = None,
        label_free: LabelFreeReward | None = None,
        reward_layer: str = "",
        auxiliary: nn.Module | None = None,
        context: Literal["student", "image"] = "student",
        image_size: int = SMALL,
        feature_weight: float = 1.0,
        auxiliary_weight: float = 0.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.student, self.losses = student, nn.ModuleList(losses)
        self.reward_head, self.label_free = reward_head, label_free
        self.auxiliary, self.auxiliary_weight = auxiliary, auxiliary_weight
        self.matches, self.reward_layer = tuple(matches), reward_layer
        self.context, self.image_size = context, image_size
        self.feature_weight, self.ignore_index = feature_weight, ignore_index

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teach: Callable[[Tensor], FeatureTargets] | None,
        task_weight: float = 1.0,
    ) -> Losses:
        """The losses of one step.

        Args:
            images: (B, 3, H, W) in [0, 1], the labelled ones first.
            targets: Of the labelled images, L <= B, as for `losses.task_loss`.
            teach: From the policy's contexts (B, D) to what the teacher shows; None: labels alone.
            task_weight: 0 while only features are distilled.
        """
        labelled = len(targets)
        logits, maps = self.student(
            images, labelled if task_weight else 0, head_maps=self.auxiliary is not None
        )
        zero = images.new_zeros(())
        task = self._task(logits, targets).mean() if task_weight else zero
        supervised = task
        if self.auxiliary is not None and task_weight:
            second = self.auxiliary(maps[self.student.head_layers[-2]][:labelled])
            supervised = task + self.auxiliary_weight * self._task(second, targets).mean()
        if teach is None:
            nothing = images.new_zeros(0)
            return Losses(
                total=supervised,
                task=task.detach(),
                feature=zero,
                reward_head=zero,
                rewards={},
                context=nothing,
                bins=nothing,
                floor=nothing,
            )
        context = self.contexts(images, maps)
        features = teach(context)
        feature, floor = zero, []
        for match, loss in zip(self.matches, self.losses, strict=True):
            assert isinstance(loss, FeatureLoss)
            students, target = [maps[name] for name in match.student], features.maps[match.teacher]
            feature = (
                feature + match.weight * loss(students, target, features.choice.timesteps).mean()
            )
            if features.redrawn is not None:
                floor.append(loss.noise_floor(students[0], target, features.redrawn[match.teacher]))
        heads, rewards = self._rewards(features, maps, targets)
        total = task_weight * supervised + self.feature_weight * feature + heads
        return Losses(
            total=total,
            task=task.detach(),
            feature=feature.detach(),
            reward_head=heads.detach(),
            rewards=rewards,
            context=context,
            bins=features.choice.bins,
            floor=torch.stack(floor) if floor else images.new_zeros(0),
            weights=features.choice.weights,
        )

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """The weights of student, projectors and second head together, and of each reward head
        apart: clipped together, the gradients of a head would slow the student down."""
        heads = [head for head in (self.reward_head, self.label_free) if head is not None]
        apart = [list(head.parameters()) for head in heads]
        others = {id(weight) for weights in apart for weight in weights}
        return [[weight for weight in self.parameters() if id(weight) not in others], *apart]

    @torch.no_grad()
    def task_losses(self, images: Tensor, targets: Tensor) -> Tensor:
        """Of the student as it is, in evaluation mode: arguments as `forward`, (L, ...) -> (L,)."""
        modes = {module: module.training for module in self.student.modules()}
        self.student.eval()
        logits, _ = self.student(images)
        for module, training in modes.items():
            module.training = training
        return self._task(logits, targets)

    @property
    def context_size(self) -> int:
        """D, of what the policy sees of an image."""
        if self.context == "image":
            return 3 * self.image_size * self.image_size
        return self.student.channels[self.student.layers[-1]]

    @torch.no_grad()
    def contexts(self, images: Tensor, maps: Mapping[str, Tensor]) -> Tensor:
        """What the policy sees, (B, D), of images (B, 3, H, W) and the student's maps of them."""
        if self.context == "image":
            return small_image(images, self.image_size)
        return self._pooled(maps)

    @torch.no_grad()
    def _pooled(self, maps: Mapping[str, Tensor]) -> Tensor:
        """The last matched map of the student, pooled, (B, D)."""
        return maps[self.student.layers[-1]].float().mean(dim=(2, 3))

    def _rewards(
        self, features: FeatureTargets, maps: Mapping[str, Tensor], targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of what the rewards train, and what the choices earned, by reward."""
        feature, bins = features.maps[self.reward_layer], features.choice.bins
        loss, rewards = feature.new_zeros(()), {}
        if self.reward_head is not None:
            labelled = len(targets)
            logits = self.reward_head(feature[:labelled], bins[:labelled])
            loss = loss + self._task(logits, targets).mean()
            rewards["teacher_task"] = self._teacher_task(
                self.reward_head, logits, targets, bins[:labelled]
            )
        if self.label_free is not None:
            losses, rewards["label_free"] = self.label_free(feature, bins, self._pooled(maps))
            loss = loss + losses.mean()
        return loss, rewards

    @torch.no_grad()
    def _teacher_task(
        self, head: TeacherTaskReward, logits: Tensor, targets: Tensor, bins: Tensor
    ) -> Tensor:
        """How well the teacher's feature tells the labels, or better than the bin alone: (L,)."""
        if not head.beyond_bin:
            return -self._task(logits, targets)
        by_feature, by_bin = head.guesses(logits, bins)
        shares = class_shares(targets, logits.shape[1], self.ignore_index)
        if self.training:
            head.count(shares, bins)
        return -(shares * by_bin).sum(dim=1) - self._task(by_feature, targets)

    def _task(self, logits: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            return task_loss(logits.float(), targets, self.ignore_index)
