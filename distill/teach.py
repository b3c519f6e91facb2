"""`distill teacher train`: a denoising diffusion model on unlabelled images."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torchvision.utils import make_grid, save_image

from distill import checkpoint, seeding
from distill.build import (
    Unlabelled,
    autocast,
    build_accelerator,
    build_benchmark,
    image_size,
    training_examples,
)
from distill.config import TeacherTrainConfig
from distill.data import StepSampler, loader
from distill.errors import Interrupted, UserError, blame
from distill.optim import lr_factor
from distill.recipe import to_tree, to_yaml
from distill.teacher_card import teacher_card
from distill.tracking import Progress, RunLog, hardware, open_run_folder, stop_on_signals
from teachers.ddpm import build_unet, denoising_loss, sample_images, save_pipeline


class TeacherTraining:
    """The state of one teacher's training: network, average, optimiser, step."""

    def __init__(self, config: TeacherTrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        benchmark = build_benchmark(config.data)
        examples = Unlabelled(benchmark.dataset("train"))
        self.size = image_size(config.data, examples)
        self.examples = training_examples(examples, config.data, benchmark, self.size)
        torch.manual_seed(seeding.derive_seed(config.seed, "network"))
        with blame("unet"):
            self.unet = build_unet(
                image_size=self.size,
                block_out_channels=config.unet.block_out_channels,
                layers_per_block=config.unet.layers_per_block,
                attention_levels=config.unet.attention_levels,
            )
        self.scheduler = DDPMScheduler(
            num_train_timesteps=config.diffusion.timesteps,
            beta_schedule=config.diffusion.beta_schedule,
            prediction_type=config.diffusion.prediction_type,
        )
        self.model = accelerator.prepare_model(self.unet)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=config.lr, weight_decay=0.01)
        self.average = EMAModel(self.unet.parameters(), decay=config.ema, use_ema_warmup=True)
        self.step = 0

    def train_step(self, images: Tensor) -> Tensor:
        """One optimiser step. images: (B, 3, H, W) in [0, 1] -> the loss, a scalar."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * lr_factor("cosine", self.step, config.steps, config.warmup)
        noise = seeding.generator(config.seed, "noise", self.step, self.accelerator.process_index)
        with autocast(self.accelerator.device, config.precision):
            loss = denoising_loss(self.model, self.scheduler, images, noise)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), config.clip)
        for name, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value.item()):
                raise UserError(
                    f"the {name} is not finite at step {self.step}; the last checkpoint is intact; "
                    "try a smaller lr, or precision=no"
                )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.unet.parameters())
        self.step += 1
        return loss.detach()

    def state(self) -> dict[str, Any]:
        return {
            "config": to_tree(self.config),
            "step": self.step,
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        if state.get("config") != to_tree(self.config):
            raise UserError(f"{source} is of another recipe; resume with the run's own config.yaml")
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.average.to(self.accelerator.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


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
    if accelerator.is_main_process:
        open_run_folder(folder, resume)
        last.parent.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    if resume and last.exists():
        training.load_state(checkpoint.load(last), last)
    if accelerator.is_main_process:
        checkpoint.write_text(folder / "config.yaml", to_yaml(config))
    _loop(training, folder, last)
    if accelerator.is_main_process:
        _finish(training, folder)
    return folder


def _loop(training: TeacherTraining, folder: Path, last: Path) -> None:
    config, accelerator = training.config, training.accelerator
    main = accelerator.is_main_process
    batch = config.batch // accelerator.num_processes
    sampler = StepSampler(
        range(len(training.examples)),
        batch,
        seed=seeding.derive_seed(config.seed, "unlabelled"),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        start_step=training.step,
        stop_step=config.steps,
    )
    batches = iter(loader(training.examples, sampler, config.data.workers))
    log = RunLog(folder, "teacher", training.step) if main else None
    progress = Progress(config.name, config.steps, training.step, show=main)
    total, logged = torch.zeros((), device=accelerator.device), training.step
    with stop_on_signals() as stop, progress:
        while training.step < config.steps:
            began = time.monotonic()
            images = next(batches)[0].to(accelerator.device, non_blocking=True)
            waited = time.monotonic() - began
            loss = training.train_step(images)
            total += loss
            step = training.step
            if log and step % config.log_every == 0:
                rate = training.optimizer.param_groups[0]["lr"]
                mean = total.item() / (step - logged)
                log.scalars(
                    step, {"loss/denoising": mean, "lr": rate, "images_per_second": progress.rate}
                )
                total, logged = torch.zeros_like(total), step
            progress.update(len(images) * accelerator.num_processes, {"loss": loss.item()}, waited)
            if main and (step % config.checkpoint_every == 0 or step == config.steps or stop):
                checkpoint.save(last, training.state())
            if stop:
                raise Interrupted(f"stopped at step {step} of {config.steps}; go on with --resume")
    if log:
        log.close()


def _finish(training: TeacherTraining, folder: Path) -> None:
    """Write the averaged network as a pipeline folder with its card, and a grid of samples."""
    config = training.config
    training.average.copy_to(training.unet.parameters())
    with blame(f"pipeline of {config.name}"):
        save_pipeline(
            training.unet,
            training.scheduler,
            folder / "pipeline",
            getattr(torch, config.save_dtype),
        )
    card = teacher_card(
        config,
        folder,
        images=len(training.examples),
        size=training.size,
        parameters=sum(p.numel() for p in training.unet.parameters()),
        hardware=hardware(training.accelerator.device),
    )
    checkpoint.write_text(folder / "pipeline" / "README.md", card)
    if config.samples:
        samples = sample_images(
            training.unet,
            training.scheduler,
            config.samples,
            steps=config.sample_steps,
            generator=seeding.generator(config.seed, "samples"),
        )
        with checkpoint.replacing(folder / "samples.png") as file:
            grid = make_grid(samples.cpu(), nrow=math.ceil(math.sqrt(config.samples)))
            save_image(grid, file, format="png")
