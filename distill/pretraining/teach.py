"""`distill teacher train`: a denoising diffusion model on unlabelled images."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torchvision.utils import make_grid, save_image

from distill import checkpoint, seeding
from distill.build import (
    Unlabelled,
    build_accelerator,
    build_benchmark,
    embedded,
    image_size,
    training_examples,
)
from distill.data import StepSampler, choose_labelled, fingerprint, loader
from distill.errors import Interrupted, UserError, blame
from distill.precision import autocast
from distill.pretraining.card import teacher_card
from distill.pretraining.config import DiffusionConfig, TeacherTrainConfig, UNetConfig
from distill.pretraining.judge import judge_features, judge_losses
from distill.pretraining.pipeline import save_pipeline
from distill.recipe import PLACES, check_recipe, load_config, refuse_changes, to_tree, to_yaml
from distill.tracking import (
    Progress,
    RunLog,
    hardware,
    open_run_folder,
    remove_if_bare,
    stop_of_any,
    stop_on_signals,
)
from distill.training.late import Late
from distill.training.optim import lr_factor
from teachers.ddpm import (
    build_unet,
    denoising_loss,
    load_pipeline,
    sample_images,
)

Judgement = TypeVar("Judgement")
SHOWN = 128
"""Width in px up to which samples are enlarged in their picture."""


class TeacherTraining:
    """The state of one teacher's training: network, average, optimiser, step."""

    def __init__(self, config: TeacherTrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        if config.batch % accelerator.num_processes:
            raise UserError(
                f"batch: {config.batch} is not divisible by {accelerator.num_processes} processes"
            )
        self.benchmark = build_benchmark(config.data)
        train, data = self.benchmark.dataset("train"), config.data
        if data.labelled is not None:
            raise UserError(
                "data.labelled: teachers are trained without labels; limit their images with "
                "data.unlabelled=N"
            )
        self.fingerprint, examples = fingerprint(train), Unlabelled(train)
        count = len(examples) if data.unlabelled is None else data.unlabelled
        if not 0 < count <= len(examples):
            raise UserError(
                f"data.unlabelled: must be between 1 and {len(examples)} (the training images), "
                f"got {count}"
            )
        self.indices = choose_labelled(len(examples), count, data.split_seed)
        """Indices of the examples that it is trained on."""
        self.size = image_size(config.data, examples)
        self.examples = training_examples(examples, config.data, self.benchmark, self.size)
        self.unet, self.scheduler = _network(config, self.size)
        timesteps = self.scheduler.config["num_train_timesteps"]
        if config.samples and config.sample_steps > timesteps:
            raise UserError(
                f"sample_steps: must be at most {timesteps} (the timesteps), got "
                f"{config.sample_steps}"
            )
        if (
            accelerator.device.type == "cuda"
        ):  # where 16-bit convolutions are faster so; on a CPU this gains nothing in training
            self.unet.to(memory_format=torch.channels_last)
        self.model = accelerator.prepare_model(self.unet)
        if config.compile:
            self.model = torch.compile(self.model, dynamic=False)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=config.lr, weight_decay=0.01, fused=True
        )
        self.average = EMAModel(
            self.unet.parameters(), decay=config.ema, use_ema_warmup=True, foreach=True
        )
        self.step, self.loss = 0, math.nan
        self.total, self.logged = torch.zeros((), device=accelerator.device), 0
        """Sum of the losses since the step of the last row of the log, and that step."""
        self._late: Late | None = None

    def train_step(self, images: Tensor) -> Tensor:
        """One optimiser step. images: (B, 3, H, W) in [0, 1] -> the loss, a scalar.

        That it was finite shows a step later on a GPU, but always before a checkpoint.
        """
        config = self.config
        # For what draws from torch's default generator: the dropout of a network that was given.
        torch.manual_seed(seeding.derive_seed(config.seed, "network", 1 + self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * lr_factor("cosine", self.step, config.steps, config.warmup)
        noise = seeding.generator(
            config.seed, "noise", self.step, self.accelerator.process_index, images.device
        )
        with autocast(self.accelerator.device, config.precision):
            loss = denoising_loss(self.model, self.scheduler, images, noise)
        self.accelerator.backward(loss)
        loss = loss.detach()
        if self.accelerator.num_processes > 1:  # what is logged is of all of them
            loss = self.accelerator.reduce(loss, "mean")
        norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.unet.parameters())
        self.settle()
        self._late = Late(self.step, loss=loss, gradient=norm)
        if self._late.arrived:
            self.settle()
        self.step += 1
        return loss

    def settle(self) -> None:
        """Read the newest step's loss into `loss`. Raises UserError if it is not finite."""
        if self._late is not None:
            late, self._late = self._late, None
            also = ", or precision=no" if self.config.precision == "bf16" else ""
            self.loss = late.read_finite(lambda step: f"a smaller lr{also}")["loss"]

    def averaged(self) -> UNet2DModel:
        """The future teacher: a copy of the network with the averaged weights."""
        unet = copy.deepcopy(self.unet)
        self.average.copy_to(unet.parameters())
        return unet

    def sample_grid(self, unet: UNet2DModel) -> Tensor:
        """Samples in a square, (3, H, W) in [0, 1]; of the same noise at every step."""
        config = self.config
        samples = sample_images(
            unet,
            self.scheduler,
            config.samples,
            steps=config.sample_steps,
            generator=seeding.generator(config.seed, "samples"),
        )
        larger = max(1, SHOWN // samples.shape[-1])  # by whole factors, so that pixels stay sharp
        samples = samples.cpu().repeat_interleave(larger, -1).repeat_interleave(larger, -2)
        grid: Tensor = make_grid(samples, nrow=math.ceil(math.sqrt(config.samples)))
        return grid

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, to be saved by `checkpoint.save`."""
        self.settle()
        return {
            "config": to_tree(self.config),
            "data": self.fingerprint,
            "step": self.step,
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "total": self.total.cpu(),
            "logged": self.logged,
        }

    def load_state(self, state: dict[str, Any], source: Path) -> None:
        """Continue from `state`, read from `source`. Raises UserError if it is of another run."""
        check_recipe(self.config, state["config"], source)
        if state["data"] != self.fingerprint:
            raise UserError(
                f"{source}: the training images are not those that this run started with"
            )
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.average.to(self.accelerator.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.total, self.logged = state["total"].to(self.total), state["logged"]


def _network(
    config: TeacherTrainConfig, size: tuple[int, int]
) -> tuple[UNet2DModel, DDPMScheduler]:
    """The network to train for images of (H, W), and its noise schedule."""
    torch.manual_seed(seeding.derive_seed(config.seed, "network"))
    unet, diffusion = config.unet, config.diffusion
    if config.init_from is not None:
        for key, given in (
            ("unet", unet != UNetConfig()),
            ("diffusion", diffusion != DiffusionConfig()),
        ):
            if given:
                raise UserError(
                    f"{key}: init_from already sets it; leave the section out ({key}={{}})"
                )
        with blame("init_from"):
            return load_pipeline(embedded(config.init_from), size)
    with blame("unet"):
        network = build_unet(
            image_size=size,
            block_out_channels=unet.block_out_channels,
            layers_per_block=unet.layers_per_block,
            attention_levels=unet.attention_levels,
        )
    if diffusion.beta_schedule == "linear" and diffusion.timesteps <= 20:
        raise UserError(
            "diffusion.timesteps: must be above 20 for a linear schedule, got "
            f"{diffusion.timesteps}"
        )
    stretch = 1000 / diffusion.timesteps
    return network, DDPMScheduler(
        num_train_timesteps=diffusion.timesteps,
        beta_start=1e-4 * stretch,
        beta_end=0.02 * stretch,
        beta_schedule=diffusion.beta_schedule,
        prediction_type=diffusion.prediction_type,
    )


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
            loss = training.train_step(images)
            training.total += loss
            step = training.step
            count = len(images) * accelerator.num_processes
            progress.update(count, {"loss": training.loss}, waited)
            if log and (step % config.log_every == 0 or step == config.steps):
                training.settle()
                rate = training.optimizer.param_groups[0]["lr"]
                mean = training.total.item() / (step - training.logged)
                log.scalars(
                    step, {"loss/denoising": mean, "lr": rate, "images_per_second": progress.rate}
                )
                training.total, training.logged = torch.zeros_like(training.total), step
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
        images=len(training.indices),
        size=size,
        parameters=sum(p.numel() for p in unet.parameters()),
        schedule=training.scheduler.config,
        hardware=hardware(device),
        processes=training.accelerator.num_processes,
        losses=_tried(lambda: judge_losses(unet, training.scheduler, benchmark, data, size)),
        probe=_tried(
            lambda: judge_features(
                folder / "pipeline", benchmark, data, size, count=config.probe, device=device
            )
        ),
    )
    checkpoint.write_text(folder / "pipeline" / "README.md", card)


def _tried(judge: Callable[[], Judgement]) -> Judgement | str:
    """The result of `judge`, or why it failed: unreadable files must not cost the teacher."""
    try:
        return judge()
    except UserError as error:
        print(f"distill: not judged: {error}", file=sys.stderr, flush=True)
        return "images or labels could not be read"
