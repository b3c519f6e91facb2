"""The state of one arm of a run, and its training step: Algorithm 1 of RepFusion."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F

from distill import seeding
from distill.build import TrainingSet, autocast, build_distiller, build_policy, build_teacher
from distill.config import Arm, RunConfig
from distill.distiller import Lesson, Losses
from distill.errors import UserError, blame
from distill.export import load_backbone
from distill.floor import NoiseFloor
from distill.optim import build_optimizer, lr_factor
from distill.recipe import to_tree
from students.student import Student


class Phase(NamedTuple):
    """What a step trains on."""

    teach: bool
    task_weight: float


class Trainer:
    """The state of one arm: student and losses, policy, optimiser, average, step.

    Args:
        config: The recipe.
        arm: `distilled`, `random_teacher` (the control with a teacher of random weights), or
            `scratch` (the control without teacher: labels alone, the same batches and budget).
        data: The training images.
        accelerator: Device, autocast and processes.
    """

    def __init__(
        self, config: RunConfig, arm: Arm, data: TrainingSet, accelerator: Accelerator
    ) -> None:
        self.config, self.arm, self.data, self.accelerator = config, arm, data, accelerator
        device = accelerator.device
        self.teacher = None
        if config.teacher.labels and data.benchmark.task != "classification":
            raise UserError(
                "teacher.labels: a mask is no class that a teacher could be told; leave it false "
                "for segmentation"
            )
        if arm != "scratch":
            random_weights = config.seed if arm == "random_teacher" else None
            self.teacher = build_teacher(config, random_weights).to(device)
            with blame("data.size, or teacher.image_size"):  # a size that does not fit shows here
                image = torch.zeros(1, 3, *data.size, device=device)
                self.teacher.features(image, torch.zeros(1, dtype=torch.int64))
        # Every arm starts from the same student.
        torch.manual_seed(seeding.derive_seed(config.seed, "network"))
        self.distiller = build_distiller(config, data.benchmark, data.size, self.teacher)
        if config.train.channels_last:
            self.distiller.to(memory_format=torch.channels_last)
        self._prepare_student()
        self.model = accelerator.prepare_model(self.distiller)
        self.optimizer = build_optimizer(self.distiller, config.train)
        self.average = ModelEmaV3(self.student, decay=config.train.ema, use_warmup=True)
        self.policy, self.timesteps = None, torch.zeros(0, dtype=torch.int64)
        if self.teacher is not None:
            context_size = self.student.channels[self.student.layers[-1]]
            self.policy, self.timesteps = build_policy(config, self.teacher, context_size)
        self.floor = NoiseFloor([str(m) for m in self.distiller.matches], len(self.timesteps))
        self.step, self.images, self.seconds = 0, 0, 0.0

    def _prepare_student(self) -> None:
        """Training mode, the weights that the recipe starts from, and what of them is frozen."""
        self.distiller.train()
        student = self.config.student
        if student.init_from is not None:
            load_backbone(self.student, student.init_from)
        if student.freeze:
            freeze_backbone(self.student)

    @property
    def student(self) -> Student:
        """The student that is being trained; `average` holds the one that is scored."""
        return self.distiller.student

    def phase(self, step: int) -> Phase:
        """What a step trains on, by the recipe's schedule."""
        train = self.config.train
        labels_only = step >= train.steps - train.finetune_steps
        if self.teacher is None or labels_only:
            return Phase(teach=False, task_weight=1.0)
        return Phase(teach=True, task_weight=float(train.schedule == "joint"))

    def train_step(self, labelled: Tensor, targets: Tensor, unlabelled: Tensor | None) -> Losses:
        """One step of Algorithm 1: choose t, look at the teacher, learn, reward the policy.

        Args:
            labelled: (L, 3, H, W) in [0, 1].
            targets: Their classes (L,) or masks (L, H, W), int64.
            unlabelled: (U, 3, H, W), or None.
        """
        train, phase = self.config.train, self.phase(self.step)
        # For what draws from torch's default generator, such as dropout.
        torch.manual_seed(seeding.derive_seed(self.config.seed, "network", 1 + self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * self._lr_factor()
        images = labelled
        if phase.teach and unlabelled is not None:
            images = torch.cat([labelled, unlabelled])
        if train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)

        def teach(context: Tensor) -> Lesson:
            return self._lesson(images, targets, context)

        with autocast(self.accelerator.device, train.precision):
            losses: Losses = self.model(
                images, targets, teach if phase.teach else None, phase.task_weight
            )
        self._check_finite(
            task_loss=losses.task, feature_loss=losses.feature, reward_head_loss=losses.reward_head
        )
        self.accelerator.backward(losses.total)
        norm = self.accelerator.clip_grad_norm_(
            self.distiller.parameters(), math.inf if train.clip is None else train.clip
        )
        self._check_finite(gradient=norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.average.update(self.student, step=self.step)
        if phase.teach:
            self._reward_policy(losses)
        if len(losses.floor):
            measured = self.accelerator.gather((losses.floor.T.contiguous(), losses.bins))
            self.floor.add(*(x.cpu() for x in measured))
        return losses

    def _lr_factor(self) -> float:
        """Share of the largest learning rate; the two stages of the paper each have a schedule."""
        train = self.config.train
        first, last = 0, train.steps
        if train.schedule == "distill_then_finetune" and self.teacher is not None:
            border = train.steps - train.finetune_steps
            first, last = (0, border) if self.step < border else (border, train.steps)
        return lr_factor(train.lr_schedule, self.step - first, last - first, train.warmup)

    def _lesson(self, images: Tensor, targets: Tensor, context: Tensor) -> Lesson:
        """Let the policy choose a timestep an image, and the teacher show its features there."""
        assert self.teacher is not None
        assert self.policy is not None
        seed, rank = self.config.seed, self.accelerator.process_index
        self._check_finite(student_feature_map=context)
        with torch.autocast("cpu", enabled=False):  # the policy computes in float32
            bins = self.policy.act(
                context.float().cpu(),
                seeding.generator(seed, "policy", self.step, rank),
                self.progress,
            )
        timesteps = self.timesteps[bins]
        labels: tuple[Tensor, ...] = ()
        if self.config.teacher.labels:
            labels = (F.pad(targets, (0, len(images) - len(targets)), value=-1),)
        noise = seeding.generator(seed, "noise", self.step, rank)
        maps, again = self.teacher.features(images, timesteps, noise, *labels), None
        if self._measures_floor():
            noise = seeding.generator(seed, "floor", self.step, rank)
            again = self.teacher.features(images, timesteps, noise, *labels)
        return Lesson(bins.to(images.device), timesteps.to(images.device), maps, again)

    def _measures_floor(self) -> bool:
        """Whether this step measures the target-noise floor; without noise there is none."""
        assert self.teacher is not None
        every, clean = self.config.train.floor_every, self.config.teacher.input == "clean"
        return (
            every > 0
            and self.step % every == 0
            and not clean
            and self.teacher.noise_schedule.has_noise
        )

    def _reward_policy(self, losses: Losses) -> None:
        """Every process learns the same from the rewards of all: their policies stay identical."""
        assert self.policy is not None
        rewarded = len(losses.rewards)
        context, bins, rewards = self.accelerator.gather(
            (losses.context[:rewarded], losses.bins[:rewarded], losses.rewards)
        )
        self.policy.learn(context.float().cpu(), bins.cpu(), rewards.float().cpu(), self.progress)

    @property
    def progress(self) -> float:
        """Share of the arm's steps that are done."""
        return self.step / self.config.train.steps

    def _check_finite(self, **values: Tensor) -> None:
        """Stop before what is not finite reaches the policy, the weights and the checkpoint."""
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"{self.arm}: the {name.replace('_', ' ')} is not finite at step {self.step}; "
                    "the last checkpoint is intact; try a smaller train.lr, or train.precision=no"
                )

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs; randomness is a function of seed and step."""
        return {
            "config": to_tree(self.config),
            "arm": self.arm,
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "distiller": self.distiller.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "policy": self.policy.state_dict() if self.policy else {},
            "floor": self.floor.state_dict(),
            "teacher": self.teacher.fingerprint if self.teacher else "",
            "data": self.data.fingerprint,
        }

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Go on where `state` was taken. Raises UserError if it is of something else."""
        teacher = self.teacher.fingerprint if self.teacher else ""
        for what, mine in (
            ("arm", self.arm),
            ("teacher", teacher),
            ("data", self.data.fingerprint),
        ):
            if state.get(what) != mine:
                raise UserError(f"{source}: the {what} is not the one this run began with")
        try:
            self.distiller.load_state_dict(state["distiller"])
            self.average.module.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.policy:
                self.policy.load_state_dict(state["policy"])
            self.floor.load_state_dict(state["floor"])
            self.step, self.images = state["step"], state["images"]
            self.seconds = state["seconds"]
        except (RuntimeError, ValueError, KeyError) as error:
            line = " ".join(str(error).split())
            raise UserError(
                f"{source} is of another architecture: {line[:200]}; resume with the recipe that "
                "the run began with"
            ) from error


def freeze_backbone(student: Student) -> None:
    """Leave only the head to train; batch norms keep their statistics."""
    student.backbone.requires_grad_(False).eval()
    if student.head is None:
        student.backbone.get_classifier().requires_grad_(True)
