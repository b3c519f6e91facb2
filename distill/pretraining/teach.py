"""A teacher in training: its step, its average, its samples and its state."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torchvision.utils import make_grid

from distill import seeding
from distill.build import Unlabelled, build_benchmark, image_size, training_examples
from distill.data import choose_labelled, fingerprint
from distill.errors import UserError, blame
from distill.precision import autocast, resolve_precision
from distill.recipe import check_recipe, to_tree
from distill.teacher import embedded
from distill.teacher_config import DiffusionConfig, TeacherTrainConfig, UNetConfig
from distill.training.deferred import DeferredFigures
from distill.training.optim import lr_factor
from teachers.ddpm import build_unet, denoising_loss, load_pipeline, sample_images
from teachers.noise import ddpm_scheduler

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
        self._train = train
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
        self._sum, self._asked = torch.zeros((), device=accelerator.device), 0  # of `mean_loss`
        self._pending: DeferredFigures | None = None

    @property
    def readable(self) -> int:
        """How many images it is trained on, less those that could not be read so far."""
        unreadable: frozenset[int] = getattr(self._train, "unreadable", frozenset())
        return len(self.indices) - len(unreadable.intersection(self.indices))

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
        self._pending = DeferredFigures(self.step, loss=loss, gradient=norm)
        if self._pending.arrived:
            self.settle()
        self.step += 1
        self._sum += loss
        return loss

    def mean_loss(self) -> float:
        """Mean loss of the steps since this was last asked."""
        mean = self._sum.item() / (self.step - self._asked)
        self._sum, self._asked = torch.zeros_like(self._sum), self.step
        return mean

    def settle(self) -> None:
        """Read the newest step's loss into `loss`. Raises UserError if it is not finite."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            low = resolve_precision(self.config.precision, self.accelerator.device.type) == "bf16"
            also = ", or precision=no" if low else ""
            self.loss = pending.read_finite(lambda step: f"a smaller lr{also}")["loss"]

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
            "total": self._sum.cpu(),
            "logged": self._asked,
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
        self._sum, self._asked = state["total"].to(self._sum), state["logged"]


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
    with blame("diffusion"):
        scheduler = ddpm_scheduler(
            diffusion.beta_schedule, diffusion.timesteps, diffusion.prediction_type
        )
    return network, scheduler
