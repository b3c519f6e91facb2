"""`distill teacher train`: a denoising diffusion model on unlabelled images."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torchvision.utils import save_image

from distill import checkpoint, seeding
from distill.build import build_accelerator
from distill.data import StepSampler, loader
from distill.errors import Interrupted, UserError, blame
from distill.pretraining.card import teacher_card
from distill.pretraining.judge import judge_features, judge_losses
from distill.pretraining.pipeline import save_pipeline
from distill.pretraining.teach import TeacherTraining
from distill.progress import Progress
from distill.provenance import hardware
from distill.recipe import PLACES, load_config, refuse_changes, to_yaml
from distill.run_folder import RunLog, open_run_folder, remove_if_bare
from distill.stopping import stop_of_any, stop_on_signals
from distill.teacher_config import TeacherTrainConfig

Judgement = TypeVar("Judgement")


def train_teacher(config: TeacherTrainConfig, *, resume: bool = False) -> Path:
    """Train a teacher, and write `pipeline/`, a folder that `DDPMPipeline.from_pretrained` loads.

    Returns:
        The run folder, with config.yaml, metrics.jsonl, tensorboard/, checkpoints/, samples.png.

    Raises:
        UserError: a mistake in the recipe or its data, see `distill.errors`.
        Interrupted: the user stopped it; the checkpoint is written.
    """
    folder = Path(config.output) / config.name
    accelerator = build_accelerator(config.device)
    training = TeacherTraining(config, accelerator)
    last = folder / "checkpoints" / "last.pt"
    written = folder / "config.yaml"
    if begun := resume and written.exists():
        refuse_changes(load_config(TeacherTrainConfig, written), config, written, PLACES)
    if accelerator.is_main_process:
        open_run_folder(folder, resume)
        last.parent.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    if resume and last.exists():
        training.load_state(checkpoint.load(last), last)
    log = None
    if accelerator.is_main_process:
        checkpoint.write_text(written, to_yaml(config))
        log = RunLog(folder, "teacher", training.step)
    try:
        _loop(training, last, log)
        if log:
            _finish(training, folder, log)
    except Exception:  # code of one's own may raise anything
        if accelerator.is_main_process and not begun:
            remove_if_bare(folder)
        raise
    finally:
        if log:
            log.close()
    return folder


def _loop(training: TeacherTraining, last: Path, log: RunLog | None) -> None:
    """Train to the end. log: of the main process."""
    config, accelerator = training.config, training.accelerator
    main = accelerator.is_main_process
    batch = config.batch // accelerator.num_processes
    sampler = StepSampler(
        sorted(training.indices),
        batch,
        seed=seeding.derive_seed(config.seed, "unlabelled"),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start_step=training.step,
        stop_step=config.steps,
    )
    batches = loader(training.examples, sampler, config.data.workers)
    progress = Progress(config.name, config.steps, training.step, show=main)
    with stop_on_signals() as stop, progress:
        while training.step < config.steps:
            began = time.monotonic()
            images = next(batches)[0].to(accelerator.device, non_blocking=True)
            waited = time.monotonic() - began
            training.train_step(images)
            step = training.step
            count = len(images) * accelerator.num_processes
            progress.update(count, {"loss": training.loss}, waited)
            if log and (step % config.log_every == 0 or step == config.steps):
                training.settle()
                rate = training.optimizer.param_groups[0]["lr"]
                mean = training.mean_loss()
                log.scalars(
                    step, {"loss/denoising": mean, "lr": rate, "images_per_second": progress.rate}
                )
            asked = stop_of_any(stop, accelerator)
            if main and (step % config.checkpoint_every == 0 or step == config.steps or asked):
                checkpoint.save(last, training.state())
            if asked:
                raise Interrupted(
                    f"stopped at step {step} of {config.steps}; continue with --resume"
                )
            due = config.samples and config.sample_every and step < config.steps
            if log and due and step % config.sample_every == 0:
                log.images(step, "samples", training.sample_grid(training.averaged())[None])


def _finish(training: TeacherTraining, folder: Path, log: RunLog) -> None:
    """Write the averaged network as a pipeline folder, a grid of samples, and then its card."""
    config, unet = training.config, training.averaged()
    with blame(f"pipeline of {config.name}"):
        dtype = getattr(torch, config.save_dtype)
        save_pipeline(unet, training.scheduler, folder / "pipeline", dtype)
    if config.samples:
        grid = training.sample_grid(unet)
        log.images(config.steps, "samples", grid[None])
        with checkpoint.replacing(folder / "samples.png") as file:
            save_image(grid, file, format="png")
    benchmark, data, size = training.benchmark, config.data, training.size
    device = training.accelerator.device
    card = teacher_card(
        config,
        folder,
        images=training.readable,
        size=size,
        parameters=sum(p.numel() for p in unet.parameters()),
        schedule=training.scheduler.config,
        hardware=hardware(device),
        processes=training.accelerator.num_processes,
        losses=_or_reason(lambda: judge_losses(unet, training.scheduler, benchmark, data, size)),
        probe=_or_reason(
            lambda: judge_features(
                folder / "pipeline", benchmark, data, size, count=config.probe, device=device
            )
        ),
    )
    checkpoint.write_text(folder / "pipeline" / "README.md", card)


def _or_reason(judge: Callable[[], Judgement]) -> Judgement | str:
    """The result of `judge`, or why it failed: unreadable files must not cost the teacher."""
    try:
        return judge()
    except UserError as error:
        print(f"distill: not judged: {error}", file=sys.stderr, flush=True)
        return "images or labels could not be read"
