"""The training loop: one arm of a run, from its first step, or from its checkpoint, to its last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor

from distill import checkpoint, seeding
from distill.build import TrainingSet, autocast, build_distiller, build_policy, build_teacher
from distill.config import Arm, RunConfig
from distill.data import Augmented, StepSampler, loader
from distill.distiller import Lesson, Losses
from distill.errors import Interrupted, UserError, blame
from distill.export import load_backbone
from distill.optim import build_optimizer, lr_factor
from distill.recipe import to_tree
from distill.tracking import Progress, RunLog, StopSignal
from rl_policy.summary import policy_summary
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
            return self._lesson(images, context)

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
        return losses

    def _lr_factor(self) -> float:
        """Share of the largest learning rate; the two stages of the paper each have a schedule."""
        train = self.config.train
        first, last = 0, train.steps
        if train.schedule == "distill_then_finetune" and self.teacher is not None:
            border = train.steps - train.finetune_steps
            first, last = (0, border) if self.step < border else (border, train.steps)
        return lr_factor(train.lr_schedule, self.step - first, last - first, train.warmup)

    def _lesson(self, images: Tensor, context: Tensor) -> Lesson:
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
        noise = seeding.generator(seed, "noise", self.step, rank)
        maps = self.teacher.features(images, timesteps, noise)
        return Lesson(bins.to(images.device), timesteps.to(images.device), maps)

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


def train_arm(
    trainer: Trainer,
    folder: Path,
    stop: StopSignal,
    observe: Callable[[Trainer, RunLog | None], None],
) -> None:
    """Train an arm to its last step, with log, progress and checkpoints.

    Args:
        trainer: The arm, new or where its checkpoint left it.
        folder: The run folder.
        stop: Looked at after every step.
        observe: Called every `evaluate_every` steps, and after the last.

    Raises:
        Interrupted: The user stopped it; the checkpoint is written.
        UserError: A loss is not finite, or the disk is full; the last checkpoint is intact.
    """
    train, main = trainer.config.train, trainer.accelerator.is_main_process
    log = RunLog(folder, trainer.arm, trainer.step) if main else None
    stream = batches(trainer)
    # A short run that ends with labels alone shows its policy all the same.
    shown = {train.steps, train.steps - train.finetune_steps}
    with Progress(trainer.arm, train.steps, trainer.step, show=main) as progress:
        while trainer.step < train.steps:
            began = time.monotonic()
            batch = next(stream)
            waited = time.monotonic() - began
            losses = trainer.train_step(*batch)
            images = sum(len(x) for x in batch[::2] if x is not None)
            images *= trainer.accelerator.num_processes
            trainer.images += images
            trainer.seconds += time.monotonic() - began
            figures = _figures(losses)
            progress.update(images, {n.split("/")[-1]: v for n, v in figures.items()}, waited)
            last = trainer.step == train.steps
            if log and (trainer.step % train.log_every == 0 or trainer.step in shown):
                _write(log, trainer, losses, figures | {"images_per_second": progress.rate})
            if last or (train.evaluate_every and trainer.step % train.evaluate_every == 0):
                observe(trainer, log)
            if main and (last or stop or trainer.step % train.checkpoint_every == 0):
                checkpoint.save(checkpoint_path(folder, trainer.arm), trainer.state())
            if stop and not last:
                raise Interrupted(
                    f"stopped at step {trainer.step} of {train.steps} ({trainer.arm})"
                )
    if log:
        log.close()
    trainer.accelerator.wait_for_everyone()


def checkpoint_path(folder: Path, arm: str) -> Path:
    """Where an arm's newest checkpoint is."""
    return folder / "checkpoints" / arm / "last.pt"


def batches(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Labelled images, targets, unlabelled images, on the device, from the arm's next step."""
    train, data, device = trainer.config.train, trainer.data, trainer.accelerator.device
    labelled = _stream(trainer, data.labelled, data.labelled_indices, train.batch, "labelled")
    wants_unlabelled = trainer.teacher is not None and train.unlabelled_batch > 0
    unlabelled = None
    if wants_unlabelled and data.unlabelled_indices:
        unlabelled = _stream(
            trainer, data.unlabelled, data.unlabelled_indices, train.unlabelled_batch, "unlabelled"
        )
    for step, (images, targets) in enumerate(labelled, trainer.step):
        more = None
        if unlabelled is not None and trainer.phase(step).teach:
            more = next(unlabelled)[0].to(device, non_blocking=True)
        yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True), more


def _stream(
    trainer: Trainer,
    examples: Augmented,
    indices: list[int],
    batch: int,
    stream: Literal["labelled", "unlabelled"],
) -> Iterator[Any]:
    accelerator = trainer.accelerator
    sampler = StepSampler(
        indices,
        batch // accelerator.num_processes,
        seed=seeding.derive_seed(trainer.config.seed, stream),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start_step=trainer.step,
        stop_step=trainer.config.train.steps,
    )
    return iter(loader(examples, sampler, trainer.config.data.workers))


def _figures(losses: Losses) -> dict[str, float]:
    """The losses of a step, and the mean reward, as numbers."""
    figures = {"loss/task": losses.task.item()}
    if len(losses.rewards):
        figures["loss/feature"] = losses.feature.item()
        figures["policy/reward"] = losses.rewards.mean().item()
    return figures


def _write(log: RunLog, trainer: Trainer, losses: Losses, figures: dict[str, float]) -> None:
    """One row of the log; with a policy its distribution over the timesteps too."""
    figures["lr"] = trainer.optimizer.param_groups[0]["lr"]
    if not len(losses.rewards) or trainer.policy is None:
        log.scalars(trainer.step, figures)
        return
    summary = policy_summary(trainer.policy.probabilities(losses.context.float().cpu()))
    figures["loss/reward_head"] = losses.reward_head.item()
    figures["policy/entropy"] = summary.entropy
    figures["policy/effective_arms"] = summary.effective_arms
    chosen = trainer.timesteps[losses.bins.cpu()]
    figures["policy/timestep"] = chosen.float().mean().item()
    log.scalars(trainer.step, figures, probabilities=summary.mean.tolist())
    log.distribution(trainer.step, "policy/timesteps", chosen)
