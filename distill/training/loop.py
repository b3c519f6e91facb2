"""The one training loop: an arm from where it is to its last step, with log and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from distill import checkpoint, seeding
from distill.data import Augmented, StepSampler, Tagged, loader
from distill.errors import Interrupted, blame
from distill.matching.distiller import Losses
from distill.progress import Progress
from distill.provenance import memory
from distill.run_folder import RunLog
from distill.stopping import StopSignal, stop_of_any
from distill.training.batch import Batch
from distill.training.clock import untimed
from distill.training.trainer import Trainer
from rl_policy.summary import policy_summary

# Timing makes a GPU wait, so few steps are timed. A prime number, so that steps that log or measure
# the floor, mostly every 10th or 50th, are among them as often as among the others.
TIMED = 11


def train_arm(
    trainer: Trainer,
    folder: Path,
    stop: StopSignal,
    observe: Callable[[Trainer, RunLog | None], None],
) -> dict[str, float]:
    """Train an arm to its last step, with log, progress and checkpoints.

    Args:
        trainer: The arm, new or where its checkpoint left it.
        folder: The run folder.
        stop: Looked at after every step.
        observe: Called every `evaluate_every` steps, and after the last.

    Returns:
        Share of the time by part of a step (`Clock`), in every `TIMED`-th step; empty if there were
        fewer.

    Raises:
        Interrupted: The user stopped it; the checkpoint is written.
        UserError: A loss is not finite, or the disk is full; the last checkpoint is intact.
    """
    train, main = trainer.config.train, trainer.accelerator.is_main_process
    log = RunLog(folder, trainer.arm, trainer.step) if main else None
    stream = batches(trainer)
    # A short run that ends with labels alone shows its policy all the same.
    taught = train.steps - train.finetune_steps
    shown, told = {train.steps, taught}, (trainer.arm, train.steps, trainer.step)
    with closing(log) if log else nullcontext(), Progress(*told, show=main) as progress:
        while trainer.step < train.steps:
            began = time.monotonic()
            trainer.clock = trainer.timings if trainer.step % TIMED == TIMED - 1 else untimed
            with trainer.clock("data"):
                batch = next(stream)
            waited = time.monotonic() - began
            losses = trainer.train_step(batch)
            images = sum(len(x) for x in (batch.labelled, batch.unlabelled) if x is not None)
            images *= trainer.accelerator.num_processes
            trainer.images += images
            trainer.seconds += time.monotonic() - began
            progress.update(images, _shown(trainer.figures), waited)
            last = trainer.step == train.steps
            if log and (trainer.step % train.log_every == 0 or trainer.step in shown):
                trainer.settle()
                _write(log, trainer, losses, progress.rate)
            if last or (train.evaluate_every and trainer.step % train.evaluate_every == 0):
                trainer.settle()
                observe(trainer, log)
            if main and trainer.policy is not None and trainer.step == taught < train.steps:
                _keep_taught(trainer, folder)
            asked = stop_of_any(stop, trainer.accelerator)
            if main and (last or asked or trainer.step % train.checkpoint_every == 0):
                checkpoint.save(checkpoint_path(folder, trainer.arm), trainer.state())
            if asked and not last:
                raise Interrupted(
                    f"stopped at step {trainer.step} of {train.steps} ({trainer.arm})"
                )
    trainer.accelerator.wait_for_everyone()
    total = sum(trainer.timings.seconds.values())
    return {part: seconds / total for part, seconds in trainer.timings.seconds.items()}


def checkpoint_path(folder: Path, arm: str) -> Path:
    """Where an arm's newest checkpoint is."""
    return folder / "checkpoints" / arm / "last.pt"


def taught_path(folder: Path, arm: str) -> Path:
    """Where student and policy are as they were before fine-tuning, if there was any."""
    return checkpoint_path(folder, arm).with_name("taught.pt")


def _keep_taught(trainer: Trainer, folder: Path) -> None:
    """Keep what the policy saw and knew when it last chose: fine-tuning changes the student."""
    state = trainer.state()
    kept = {key: state[key] for key in ("step", "distiller", "policy", "data")}
    checkpoint.save(taught_path(folder, trainer.arm), kept)


def batches(trainer: Trainer) -> Iterator[Batch]:
    """The images of each step, on the device, from the arm's next one.

    Where there is a feature cache, with the tags of all these images (`data.Tagged`), on the CPU.
    """
    train, data, device = trainer.config.train, trainer.data, trainer.accelerator.device
    sampler = _sampler(trainer, data.labelled_indices, train.batch, "labelled")
    labelled = _stream(trainer, data.labelled, sampler)
    wants_unlabelled = trainer.teacher is not None and train.unlabelled_batch > 0
    unlabelled = None
    if wants_unlabelled and data.unlabelled_indices:
        more_of = data.unlabelled_indices, train.unlabelled_batch
        unlabelled = _stream(trainer, data.unlabelled, _sampler(trainer, *more_of, "unlabelled"))
    for step, (images, targets, *tags) in enumerate(labelled, trainer.step):
        more = None
        if unlabelled is not None and trainer.phase(step).teach:
            more, _, *more_tags = next(unlabelled)
            more, tags = more.to(device, non_blocking=True), [*tags, *more_tags]
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        positions = torch.tensor([draw.position for draw in sampler.batch(step)])
        positions = positions.to(device, non_blocking=True)
        yield Batch(images, targets, more, torch.cat(tags) if tags else None, positions)


def _sampler(
    trainer: Trainer, indices: list[int], batch: int, stream: Literal["labelled", "unlabelled"]
) -> StepSampler:
    accelerator = trainer.accelerator
    return StepSampler(
        indices,
        batch // accelerator.num_processes,
        seed=seeding.derive_seed(trainer.config.seed, stream),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start_step=trainer.step,
        stop_step=trainer.config.train.steps,
    )


def _stream(trainer: Trainer, examples: Augmented, sampler: StepSampler) -> Iterator[Any]:
    views = Tagged(examples) if trainer.cache is not None else examples
    return loader(views, sampler, trainer.config.data.workers)


# Those of a trainer's figures that are logged, and under which names.
LOGGED = {
    "loss/task": "task_loss",
    "loss/feature": "feature_loss",
    "policy/reward": "reward",
    "loss/reward_head": "reward_head_loss",
}


def _shown(figures: Mapping[str, float]) -> dict[str, float]:
    """What the progress display says of a step."""
    names = {"task": "task_loss", "feature": "feature_loss", "reward": "reward"}
    return {name: figures[key] for name, key in names.items() if key in figures}


def _write(log: RunLog, trainer: Trainer, losses: Losses, rate: float) -> None:
    """One row of the log; with a policy its distribution over the timesteps too."""
    figures = {name: trainer.figures[key] for name, key in LOGGED.items() if key in trainer.figures}
    each = (name for name in trainer.figures if name.startswith(("reward/", "learn/")))
    figures |= {f"policy/{name}": trainer.figures[name] for name in each}
    figures["images_per_second"] = rate
    figures["lr"] = trainer.optimizer.param_groups[0]["lr"]
    figures |= memory(trainer.accelerator.device)
    if trainer.policy is None or not len(losses.bins):  # the step had no teacher
        log.scalars(trainer.step, figures)
        return
    with blame(f"{trainer.arm}: policy, at step {trainer.step}"):
        probabilities = trainer.policy.probabilities(losses.context.float().cpu())
    summary = policy_summary(probabilities)
    figures["policy/entropy"] = summary.entropy
    figures["policy/effective_arms"] = summary.effective_arms
    figures |= {f"floor/{pair}": mean for pair, mean in trainer.floor.means().items()}
    chosen = trainer.timesteps[losses.bins.cpu()]
    figures["policy/timestep"] = chosen.float().mean().item()
    log.scalars(trainer.step, figures, probabilities=summary.mean.tolist())
    log.distribution(trainer.step, "policy/timesteps", chosen)
    for pair, row in trainer.floor.by_bin().items():
        for t, value in zip(trainer.timesteps.tolist(), row, strict=True):
            if value is not None:
                log.events.add_scalar(f"floor/{pair}/t={t}", value, trainer.step)
