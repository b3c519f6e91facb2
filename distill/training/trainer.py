"""The state of one arm of a run, and its training step: Algorithm 1 of RepFusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F

from distill import seeding
from distill.build import TrainingSet, build_distiller
from distill.caching.cache import FeatureCache
from distill.caching.plan import PlannedCache, plan_cache
from distill.config import Arm, RunConfig
from distill.deployment.folder import load_backbone
from distill.errors import UserError, blame, one_line
from distill.matching.distiller import Losses, merge
from distill.matching.targets import Choice, FeatureTargets, check_maps, choose, mixture
from distill.policies import build_policy
from distill.precision import autocast
from distill.recipe import check_recipe, to_tree
from distill.teacher import build_teacher
from distill.training.batch import Batch
from distill.training.clock import Clock, Timed, untimed
from distill.training.deferred import DeferredFigures, not_finite
from distill.training.feedback import Feedback
from distill.training.floor import NoiseFloor, distinct
from distill.training.labels import check_labels, check_task
from distill.training.optim import build_optimizer, freeze_backbone, stage, stage_lr_factor
from distill.training.remedies import remedy
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

    Attributes:
        images: How many images the student has seen, over all processes.
        teacher_images: How many the teacher has, every timestep of a mixture and measurement of the
            floor counted; none where features came from the cache.
        timings: Seconds by part of a step, of the steps that were timed.
    """

    def __init__(
        self, config: RunConfig, arm: Arm, data: TrainingSet, accelerator: Accelerator
    ) -> None:
        self.config, self.arm, self.data, self.accelerator = config, arm, data, accelerator
        device = accelerator.device
        self.teacher = None
        self.planned_cache: PlannedCache | None = None
        self.cache: FeatureCache | None = None
        if arm != "scratch":
            check_task(config.teacher, data.benchmark)
            random_weights = config.seed if arm == "random_teacher" else None
            self.teacher = build_teacher(config, random_weights)
            self.teacher.to(device)
            image = torch.zeros(1, 3, *data.size, device=device)
            first = torch.zeros(1, dtype=torch.int64)
            with blame("data.size, or teacher.image_size"):  # a size that does not fit shows here
                maps = self.teacher.features(image, first)
            with blame(f"teacher.name: {config.teacher.name}"):
                check_maps(self.teacher, maps)
            check_labels(config.teacher, self.teacher, data.benchmark.num_classes, image)
        # Every arm starts from the same student.
        torch.manual_seed(seeding.derive_seed(config.seed, "network"))
        self.distiller = build_distiller(config, data.benchmark, data.size, self.teacher)
        if config.train.channels_last:
            self.distiller.to(memory_format=torch.channels_last)
        self._prepare_student()
        self.model = accelerator.prepare_model(self.distiller)
        self.optimizer = build_optimizer(self.distiller, config.train)
        self._clip_groups = self.distiller.clip_groups()
        # Of a short stage the plain mean of its weights, which with power 1 it begins as
        power = 1.0 if config.train.schedule == "distill_then_finetune" else 2 / 3
        decay = config.train.ema
        self.average = ModelEmaV3(self.student, decay, use_warmup=True, warmup_power=power)
        if config.student.compile:
            self.student.compile(dynamic=False)
        self.policy, self.timesteps = None, torch.zeros(0, dtype=torch.int64)
        self.feedback: Feedback | None = None
        if self.teacher is not None:
            self.policy, self.timesteps = build_policy(
                config,
                self.teacher,
                self.distiller.context_size,
                unlabelled=bool(data.unlabelled_indices),
            )
            images = len(data.labelled_indices) if config.policy.image_baseline else None
            self.feedback = Feedback(self.policy, config.policy.rewards, accelerator.gather, images)
            self.planned_cache = plan_cache(
                config, arm, data, self.distiller, self.teacher, self.timesteps, maps, accelerator
            )
        names = [str(match) for match in self.distiller.matches]
        losses = [pair.loss for pair in config.pairs[: len(names)]]  # `scratch` has no match
        self.floor = NoiseFloor(distinct(names, losses), len(self.timesteps))
        self.step, self.images, self.teacher_images, self.seconds = 0, 0, 0, 0.0
        self.clock: Timed = untimed
        self.timings = Clock(device)
        self.figures: dict[str, float] = {}
        self._pending: DeferredFigures | None = None

    def _prepare_student(self) -> None:
        """Training mode, the weights that the recipe starts from, and what of them is frozen."""
        self.distiller.train()
        student = self.config.student
        if student.init_from is not None:
            load_backbone(self.student, student.init_from)
        if student.freeze:
            freeze_backbone(self.student)

    def open_cache(self) -> None:
        """Find or make the folder of the feature cache that the recipe asks for, if it does.

        Raises:
            UserError: It holds other features, or there is no room for it.
        """
        if self.planned_cache is not None:
            self.cache = self.planned_cache.open()

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

    def train_step(self, batch: Batch) -> Losses:
        """One step of Algorithm 1: choose t, look at the teacher, learn, reward the policy.

        That its figures were finite shows a step later on a GPU, but always before a checkpoint.

        Args:
            batch: On the device, but for its tags.
        """
        train, phase = self.config.train, self.phase(self.step)
        # For what draws from torch's default generator, such as dropout.
        torch.manual_seed(seeding.derive_seed(self.config.seed, "network", 1 + self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * stage_lr_factor(train, self.step, self.teacher is not None)
        if not phase.teach:
            batch = Batch(batch.labelled, batch.targets)
        losses = merge(
            [
                self._backward(index, micro_batch, phase)
                for index, micro_batch in enumerate(batch.micro_batches(train.accumulate))
            ]
        )
        with self.clock("optimizer"):
            most = math.inf if train.clip is None else train.clip
            norms = [
                self.accelerator.clip_grad_norm_(weights, most)
                for weights in self._clip_groups
                if any(weight.grad is not None for weight in weights)
            ]
            norm = torch.stack(norms).max()
            self._check_finite(losses, norm, phase)
            with self._watched(batch) if phase.teach else nullcontext():
                self.optimizer.step()
            self.optimizer.zero_grad()
            # A stage's first step sets the average to the student, whose head may begin only then
            first, _ = stage(train, self.step, self.teacher is not None)
            self.step += 1
            self.average.update(self.student, step=self.step - first)
        if phase.teach:
            with self.clock("policy"):
                self._reward_policy()
        if len(losses.floor):
            measured = self.accelerator.gather((losses.floor.T.contiguous(), losses.bins))
            self.floor.add(*(x.cpu() for x in measured))
        return losses

    def _backward(self, index: int, batch: Batch, phase: Phase) -> Losses:
        """Gradients of a micro-batch, the step's `index`-th."""
        train, labelled = self.config.train, len(batch.targets)
        images = batch.images
        if train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        teach = partial(self._teach, index, images, batch) if phase.teach else None
        last = index == train.accumulate - 1
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.clock("student"), autocast(self.accelerator.device, train.precision):
                losses: Losses = self.model(images, batch.targets, teach, phase.task_weight)
            weights = losses.weights
            if self.feedback and phase.teach and weights is None:
                # Copied while the device computes gradients
                self.feedback.add(losses, batch.positions, labelled)
            with self.clock("backward"):
                self.accelerator.backward(losses.total / train.accumulate)
            if self.feedback and weights is not None:
                assert weights.grad is not None
                each = weights.grad * (labelled * train.accumulate)  # of each image's own loss
                self.feedback.add(losses, None, labelled, weights.detach(), each)
        return losses

    def _teach(self, index: int, images: Tensor, batch: Batch, context: Tensor) -> FeatureTargets:
        """Let the policy choose a timestep for each image, and the teacher show its features there.

        Args:
            index: Which micro-batch of the step this is.
            images: (B, 3, H, W), those of the batch in the student's memory format.
            batch: The micro-batch.
            context: (B, D), what the policy sees.
        """
        rank = self.accelerator.process_index * self.config.train.accumulate + index
        choice = self._choose(context, rank)
        # Copied now, while the device is idle; after the teacher the copy would wait for it.
        chosen = choice.to(images.device)

        def look(stream: Literal["noise", "floor"]) -> Mapping[str, Tensor]:
            noise = seeding.generator(self.config.seed, stream, self.step, rank, images.device)
            at = partial(self._features, images, batch, noise)
            return at(choice.bins) if chosen.weights is None else mixture(chosen.weights, at)

        with self.clock("teacher"):
            maps = look("noise")
            redrawn = look("floor") if self._measures_floor() else None
        return FeatureTargets(chosen, maps, redrawn)

    def _choose(self, context: Tensor, rank: int) -> Choice:
        """What the policy chooses, on the CPU, where it computes in float32."""
        assert self.policy is not None
        with self.clock("policy"), torch.autocast("cpu", enabled=False):
            seen = context.float().cpu()
            if not bool(seen.isfinite().all()):
                tries = self._remedy(self.step)
                raise not_finite(self.step, "student feature map", tries, f"{self.arm}: ")
            draws = seeding.generator(self.config.seed, "policy", self.step, rank)
            with blame(f"{self.arm}: policy, at step {self.step}"):
                return choose(self.policy, self.timesteps, seen, draws, self.progress)

    def _features(
        self, images: Tensor, batch: Batch, noise: torch.Generator, bins: Tensor
    ) -> Mapping[str, Tensor]:
        """The teacher's maps of the images at the timesteps of (B,) bins, on the CPU."""
        assert self.teacher is not None
        if self.cache is not None:
            assert batch.tags is not None
            before = self.cache.teacher_images
            maps: Mapping[str, Tensor] = self.cache.features(images, batch.tags, bins)
            seen = self.cache.teacher_images - before
        else:
            labels: tuple[Tensor, ...] = ()
            if self.config.teacher.labels:
                missing = len(images) - len(batch.targets)
                labels = (F.pad(batch.targets, (0, missing), value=-1),)
            maps = self.teacher.features(images, self.timesteps[bins], noise, *labels)
            seen = len(images)
        self.teacher_images += seen * self.accelerator.num_processes  # as many as in this one
        return maps

    def _measures_floor(self) -> bool:
        """Whether this step measures the target-noise floor; without noise there is none."""
        every, clean = self.config.train.floor_every, self.config.teacher.input == "clean"
        if every == 0 or self.step % every or clean or self.cache is not None:
            return False
        assert self.teacher is not None
        return self.teacher.noise_schedule.has_noise

    def _watched(self, batch: Batch) -> AbstractContextManager[None]:
        """Around an update: what it does to the task losses of the labelled images, if asked."""
        train = self.config.train

        def measure() -> list[Tensor]:
            with self.clock("policy"), autocast(self.accelerator.device, train.precision):
                return [
                    self.distiller.task_losses(micro_batch.labelled, micro_batch.targets)
                    for micro_batch in batch.micro_batches(train.accumulate)
                ]

        assert self.feedback is not None
        return self.feedback.watching(measure)

    def _reward_policy(self) -> None:
        """Let the policy learn from what the step's choices earned."""
        assert self.feedback is not None
        with blame(f"{self.arm}: policy, at step {self.step - 1}"):
            learned = self.feedback.learn(self.progress)
        if not learned:
            tries = self._remedy(self.step - 1)
            raise not_finite(self.step - 1, "reward", tries, f"{self.arm}: ")
        ours = {name: value for name, value in self.figures.items() if "/" not in name}
        self.figures = ours | self.feedback.figures  # whose own, `learn/NAME`, are not of each step

    @property
    def progress(self) -> float:
        """Share that is done of the steps in which the policy acts: those before fine-tuning."""
        train = self.config.train
        return min(1.0, self.step / max(1, train.steps - train.finetune_steps))

    def _check_finite(self, losses: Losses, norm: Tensor, phase: Phase) -> None:
        """Have the step's figures read before the next one; now, where they are on the CPU."""
        self.settle()
        figures = {"task_loss": losses.task} if phase.task_weight else {}
        if phase.teach:
            figures |= {"feature_loss": losses.feature, "reward_head_loss": losses.reward_head}
        if self.accelerator.num_processes > 1:  # what is logged is of all of them
            figures = {
                name: self.accelerator.reduce(value, "mean") for name, value in figures.items()
            }
        self._pending = DeferredFigures(self.step, **figures, gradient=norm)
        if self._pending.arrived:
            self.settle()

    def settle(self) -> None:
        """Read the newest step's `figures`. Raises UserError if one of them is not finite."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.figures = pending.read_finite(self._remedy, where=f"{self.arm}: ")
            if self.feedback and "feature_loss" in self.figures:
                self.figures |= self.feedback.figures

    def _remedy(self, step: int) -> str:
        """What to try where something is not finite at a step."""
        taught, kind = self.teacher is not None, self.accelerator.device.type
        return remedy(self.config, taught=taught, kind=kind, step=step)

    @property
    def _origin(self) -> dict[str, str]:
        """What a checkpoint must share with the run that goes on from it."""
        teacher = self.teacher.fingerprint if self.teacher else ""
        return {"arm": self.arm, "teacher": teacher, "data": self.data.fingerprint}

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs; randomness is a function of seed and step."""
        self.settle()
        return {
            "config": to_tree(self.config),
            **self._origin,
            "step": self.step,
            "images": self.images,
            "teacher_images": self.teacher_images,
            "seconds": self.seconds,
            "parts": dict(self.timings.seconds),
            "distiller": self.distiller.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "policy": self.policy.state_dict() if self.policy else {},
            **(self.feedback.state_dict() if self.feedback else {}),
            "floor": self.floor.state_dict(),
        }

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Go on where `state` was taken. Raises UserError if it is of something else."""
        for what, mine in self._origin.items():
            if state.get(what) != mine:
                raise UserError(f"{source}: the {what} is not the one this run began with")
        check_recipe(self.config, state["config"], source)
        try:
            self.distiller.load_state_dict(state["distiller"])
            self.average.module.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.policy:
                self.policy.load_state_dict(state["policy"])
            if self.feedback:
                self.feedback.load_state_dict(state)
            self.floor.load_state_dict(state["floor"])
            self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
            self.teacher_images = state["teacher_images"]
            self.timings.seconds.update(state["parts"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{source} is of another architecture: {one_line(error, 200)}; resume with the "
                "recipe that the run began with"
            ) from error
