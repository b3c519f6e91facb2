"""Every knob of `distill teacher train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from distill.config import STRICT, Count, DataConfig, Options, Positive, RunName

UNET_SIZES: dict[str, Options] = {
    "tiny": {
        "block_out_channels": [32, 64, 112, 128],
        "layers_per_block": 1,
        "attention_levels": [2],
    },
    "small": {
        "block_out_channels": [64, 128, 192, 256],
        "layers_per_block": 1,
        "attention_levels": [2],
    },
    "base": {  # Ho et al. 2020, appendix B: the network of CIFAR-10
        "block_out_channels": [128, 256, 256, 256],
        "layers_per_block": 2,
        "attention_levels": [1],
    },
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UNetConfig:
    """Architecture of a `UNet2DModel`: a size, or every number by itself."""

    size: Literal["tiny", "small", "base"] | None = None
    """Default of the keys below, for 4, 14 or 36 million weights."""
    block_out_channels: list[Count] = Field(default_factory=lambda: [32, 64, 128, 128])
    """Channels of each resolution, from the finest."""
    layers_per_block: Count = 1
    """Residual blocks per resolution."""
    attention_levels: list[int] = Field(default_factory=list)
    """Indices of the resolutions with self-attention."""

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, given: Any) -> Any:
        """Fill in what `size` says; a key that is given counts more."""
        values = given.kwargs if isinstance(given, ArgsKwargs) else given
        if not isinstance(values, dict) or values.get("size") not in list(UNET_SIZES):
            return given
        return UNET_SIZES[values["size"]] | values


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DiffusionConfig:
    """The forward process, as diffusers' `DDPMScheduler` takes it."""

    timesteps: Annotated[int, Field(ge=2)] = 1000
    """Length T of the schedule."""
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Linear (Ho et al. 2020), or cosine (Nichol and Dhariwal 2021)."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network predicts."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherTrainConfig:
    """Training a diffusion teacher on unlabelled images: `distill teacher train`."""

    name: RunName = "teacher"
    """Name of the run, its folder below `output`."""
    output: str = "runs"
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, data order and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one; CUDA_VISIBLE_DEVICES chooses among several."""
    data: DataConfig = Field(default_factory=DataConfig)
    init_from: str | None = None
    """A teacher to train further, on these or other images: a diffusers folder or a hub id. It has
    its own network and noise schedule, so that the next two sections must be left out."""
    unet: UNetConfig = Field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    steps: Count = 4000
    """Optimiser steps."""
    batch: Count = 64
    """Images per step."""
    lr: Positive = 4e-4
    """Learning rate of AdamW after the warm-up; falls to 0 with a cosine."""
    warmup: Annotated[int, Field(ge=0)] = 200
    """Steps of linear warm-up."""
    clip: Positive = 1.0
    """Largest gradient norm."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Largest decay of the moving average that becomes the teacher."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """Autocast. `auto`: bf16 where the device has instructions for it."""
    compile: bool = False
    """Compile the network with `torch.compile`; a minute to start, faster on a GPU."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights in the pipeline folder."""
    log_every: Count = 20
    """Steps between two rows of metrics.jsonl."""
    checkpoint_every: Count = 250
    """Steps between two checkpoints."""
    samples: Annotated[int, Field(ge=0)] = 36
    """Images in the sample grid; 0 for none."""
    sample_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two sample grids in TensorBoard; 0 for only after the last step."""
    sample_steps: Count = 50
    """DDIM steps per sample."""
    probe: Annotated[int, Field(ge=0)] = 1000
    """Labelled images of train, and of val, for the linear probe in the card, where the benchmark
    has labels; 0 for no probe. The teacher itself never sees a label."""
