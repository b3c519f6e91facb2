"""Every knob of a run: one frozen dataclass tree. `recipe.py` reads it from YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=8, le=4096)]


def _height_width(size: Any) -> Any:
    if isinstance(size, str | float):
        raise ValueError("must be a side in px, or [height, width]")
    return (size, size) if isinstance(size, int) else size


HeightWidth = Annotated[tuple[Size, Size], BeforeValidator(_height_width)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PatchScale = Annotated[float, Field(ge=0.05, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Options = dict[str, Any]


def _once(entries: list[Any]) -> list[Any]:
    twice = next((entry for entry in entries if entries.count(entry) > 1), None)
    if twice is not None:
        raise ValueError(f"must name {twice} only once, not {entries.count(twice)} times")
    return entries


def _below(name: str) -> str:
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise ValueError("must be a folder below output, without ..")
    return name


def _rising(scales: tuple[float, float]) -> tuple[float, float]:
    if scales[0] > scales[1]:
        raise ValueError("must be the smallest and then the largest")
    return scales


RunName = Annotated[str, AfterValidator(_below)]
Names = Annotated[
    list[str],
    BeforeValidator(lambda names: [names] if isinstance(names, str) else names),
    AfterValidator(_once),
    Field(min_length=1),
]


def _labels(entry: int | str) -> int | str:
    right = re.fullmatch(r"1/[1-9][0-9]*|all", entry) if isinstance(entry, str) else entry >= 1
    if not right:
        raise ValueError("must be a number of images, a share such as 1/16, or all")
    return entry


Labels = Annotated[int | str, AfterValidator(_labels)]
Arm = Literal["distilled", "scratch", "random_teacher"]

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """The images, their size, and how many of them have a label."""

    benchmark: str = "shapes"
    """A name of `distill list benchmarks`, or `module:attribute`."""
    root: str | None = None
    """Folder of the data set; not needed by `shapes`."""
    size: HeightWidth | None = None
    """Height and width at which images are trained on; by default their own."""
    labelled: Count | None = None
    """Number of labelled training images (the first n of a seeded order); all by default."""
    unlabelled: Annotated[int, Field(ge=0)] | None = None
    """Number of training images used without their label; all by default."""
    split_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Seed of the order from which the labelled images are taken; independent of `seed`."""
    augment: Literal["none", "flip", "crop", "strong", "patch"] = "crop"
    """Strength of the augmentation of training images. `patch`: flipped random patches of `size` px
    instead of whole images resized to it, to train a teacher on large images."""
    patch_scale: Annotated[tuple[PatchScale, PatchScale], AfterValidator(_rising)] = (1.0, 1.0)
    """Smallest and largest scale of patches; 1 is the image's own, 0.5 shows twice as much."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read data; 0: the training process reads it."""
    memory_gb: NonNegative = 4.0
    """GB of memory for decoded images, over all workers; images that do not fit are read again
    every time."""
    options: Options = Field(default_factory=dict)
    """Further arguments of the benchmark."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherConfig:
    """The frozen diffusion model, and how it looks at images."""

    name: str = "diffusers_unet"
    """A name of `distill list teachers`, or `module:attribute`."""
    path: Annotated[str, BeforeValidator(lambda path: "" if path is None else path)] = (
        "teachers/pretrained/shapes"
    )
    """A local diffusers folder (relative to here or to the checkout), or a hub id."""
    input: Literal["noised", "clean", "average"] = "noised"
    """What the teacher sees: x_t; the image itself beside t (as the official RepFusion code); or
    x_t several times, for the mean feature over `draws` of the noise."""
    draws: Annotated[int, Field(ge=1, le=1000)] = 4
    """Number of noise draws for `average`; the teacher's cost is proportional to it."""
    image_size: HeightWidth | None = None
    """Images are resized to this for the teacher; by default they keep their size."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the teacher's forward pass. `auto`: bfloat16 where the device has instructions
    for it, and float32 elsewhere."""
    compile: bool = False
    """Compile the teacher with `torch.compile`; slow to start, faster on a GPU."""
    labels: bool = False
    """Give the teacher the classes of labelled training images, if it is class-conditional (such as
    by `class_prompts`). Evaluation never does."""
    random_weights: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of fresh random weights instead of the trained ones: the control."""
    cache: Annotated[str, Field(min_length=1)] | None = None
    """Folder that stores the features of every image, flip and timestep, each computed once; needs
    `data.augment` flip or none. The noise of each is then fixed, and no target-noise floor is
    measured."""
    cache_gb: Positive = 20.0
    """Largest size of an arm's cache in GB of disk, reserved in full when it is made."""
    options: Options = Field(default_factory=dict)
    """Further arguments of the teacher."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudentConfig:
    """The timm backbone that is trained and exported, and its head."""

    model: str = "resnet18"
    """Any timm model with feature maps."""
    kwargs: Options = Field(default_factory=dict)
    """timm's own model arguments, for instance `{patch_size: 4}` for a ViT on small images."""
    input_size: HeightWidth | None = None
    """Images are resized to this inside the student, which plain timm can reproduce; it replaces a
    stem for small images."""
    compile: bool = False
    """Compile the student with `torch.compile`; slow to start, faster on a GPU."""
    pretrained: bool = False
    """Start from timm's pretrained weights; off, as the aim is to need few labels."""
    init_from: str | None = None
    """A finished run or exported student whose backbone weights this run starts from."""
    freeze: bool = False
    """Train only the head, on a frozen backbone."""
    head: Literal["fpn", "fcn", "linear", "upernet", "deeplabv3plus", "segformer"] = "fpn"
    """Head for segmentation, and for landmarks with one heat map per point; classification uses
    timm's own. The last three need the extra `segmentation`."""
    head_layers: list[str] = Field(default_factory=list)
    """Feature maps that this head reads; by default all stages."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PairConfig:
    """One pair of feature maps, of the student and of the teacher, to match."""

    student: Names
    """Layer of the student, timm's module name; several for `projector: fpn_ppm`."""
    teacher: str
    """Layer of the teacher, diffusers' module name."""
    loss: str = "mse"
    """A name of `distill list losses`, or `module:attribute`."""
    weight: NonNegative = 1.0
    """Weight of the pair's loss among the pairs."""
    projector: Literal["auto", "none", "linear", "film", "fpn_ppm"] = "auto"
    """From the student's channels to the teacher's: a 1x1 convolution (`linear`), one conditioned
    on t (`film`), or a feature pyramid over several maps (`fpn_ppm`). `auto`: `fpn_ppm` for several
    maps, `linear` where channels differ."""
    pooled: bool = False
    """Match global averages instead of dense maps."""
    standardise: bool = True
    """Standardise the teacher's channels with a running mean and variance."""
    options: Options = Field(default_factory=dict)
    """Further arguments of the loss."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardHeadConfig:
    """The light head whose loss on the labels rewards a choice (`teacher_task`).

    RepFusion's has three layers of 256, and false for the three keys that are true by default.
    """

    conditioned: bool = True
    """Condition the head on the timestep; a shared head is worse at each of them."""
    standardised: bool = True
    """Standardise the feature's channels with a running mean and variance."""
    beyond_bin: bool = True
    """Subtract what the choice of the timestep alone says about the label; otherwise, and always
    for landmarks, the reward is minus the head's loss."""
    hidden: Annotated[int, Field(ge=1, le=2**16)] = 64
    """Width of its hidden layers."""
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    """Number of its linear layers."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LabelFreeConfig:
    """The clusters that stand for labels in the reward `label_free`."""

    clusters: Annotated[int, Field(ge=2, le=512)] = 16
    """Number of clusters, which have equal shares of the last 512 images: about the number of kinds
    of images, if known."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PolicyConfig:
    """The policy that picks the timestep of every image."""

    name: str = "a2c"
    """A name of `distill list policies`, or `module:attribute`."""
    context: Literal["student", "image"] = "student"
    """What it sees of an image: the deepest of the student's maps in `pairs`, pooled, or a small
    version of the image itself."""
    image_size: Annotated[int, Field(ge=1, le=64)] = 8
    """Side in px of the image that it sees with `context: image`; 8 as in the table of `distill
    probe`."""
    progress: bool = False
    """Whether it also sees the progress of training, a number from 0 to 1."""
    bins: Annotated[int, Field(ge=1, le=1000)] = 20
    """Number of timesteps to choose from."""
    spacing: Literal["linear", "log_snr"] = "linear"
    """Whether bins are equally spaced in t or in log-SNR."""
    lowest: Annotated[int, Field(ge=0)] = 0
    """Smallest timestep to choose from."""
    highest: Annotated[int, Field(ge=0)] | None = None
    """Largest timestep to choose from; by default the schedule's last."""
    rewards: Annotated[dict[str, Positive], Field(min_length=1)] = Field(
        default_factory=lambda: {"teacher_task": 1.0}
    )
    """What a choice earns: names of `distill list rewards` with weights. `teacher_task`: what the
    teacher's feature says about the labels; `student_progress`: by how much the step lowered the
    student's task loss, which costs two more forward passes of the labelled images; `label_free`:
    what the feature says about clusters of images, including unlabelled ones. Several are
    standardised separately and summed with these weights."""
    image_baseline: bool = True
    """Subtract what a labelled image earned before from its reward, as most of a reward depends on
    the image, not on the choice (`rl_policy/baseline.py`). As published: false."""
    reward_layer: str | None = None
    """Teacher layer whose feature the rewards read; by default the first pair's."""
    reward_head: RewardHeadConfig = Field(default_factory=RewardHeadConfig)
    label_free: LabelFreeConfig = Field(default_factory=LabelFreeConfig)
    options: Options = Field(default_factory=dict)
    """Further arguments of the policy."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The loop: schedule, budget, optimiser."""

    arms: Annotated[list[Arm], AfterValidator(_once)] = Field(
        default=["distilled", "scratch"], min_length=1
    )
    """The students to train, one after the other, with equal seeds, data order and budget."""
    schedule: Literal["joint", "distill_then_finetune"] = "joint"
    """Task and feature loss together or, as in the paper, first the features and then the task."""
    steps: Count = 400
    """Optimiser steps per arm."""
    finetune_steps: Annotated[int, Field(ge=0)] = 0
    """Number of last steps that train on labels alone; with `joint`, 0 for none."""
    batch: Annotated[int, Field(ge=0), BeforeValidator(lambda b: 0 if b == "auto" else b)] = 32
    """Labelled images per step, over all processes. `auto` (or 0): the largest power of two with
    which a step fits into the GPU's memory beside `unlabelled_batch`."""
    unlabelled_batch: Annotated[int, Field(ge=0)] = 32
    """Unlabelled images per step, over all processes; they only contribute to the feature loss."""
    accumulate: Count = 1
    """Number of parts that a step's images are split into, with accumulated gradients, so that a
    large batch fits into little memory. Batch norms, running scales, and losses that compare the
    images of a batch (`rkd`, `infonce`) see one part at a time."""
    feature_weight: NonNegative = 1.0
    """Weight of the feature loss; that of the task loss is 1."""
    auxiliary: NonNegative = 0.0
    """Weight of the task loss of a second head (FCN's) on the last but one of the maps that the
    head reads; it is dropped after training. 0 for none; 0.4 in PSPNet (Zhao et al. 2017)."""
    optimizer: Literal["adamw", "sgd", "momentum"] = "adamw"
    """AdamW; `sgd`: SGD with Nesterov momentum 0.9; `momentum`: SGD with plain momentum 0.9."""
    lr: Positive = 1e-3
    """Largest learning rate."""
    weight_decay: NonNegative = 0.05
    """Weight decay, except on norms and biases."""
    decay_all: bool = False
    """Apply weight decay to norms and biases too."""
    lr_schedule: Literal["cosine", "step", "poly", "constant"] = "cosine"
    """How the rate falls after the warm-up; `step`: x 0.1 at one half and at three quarters;
    `poly`: with the power 0.9 of the share of steps left."""
    warmup: Annotated[int, Field(ge=0)] = 20
    """Steps of linear warm-up, at most half of a stage."""
    clip: Positive | None = 1.0
    """Largest gradient norm; null for no clipping."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the student's moving average, which is what is scored and exported; 0 for none. It
    begins anew with each stage of `distill_then_finetune`, as the mean of the stage's weights so
    far, up to 1 / (1 - ema) steps."""
    precision: Literal["auto", "bf16", "no"] = "auto"
    """Autocast of the student. `auto`: bf16 where the device has instructions for it."""
    channels_last: bool = True
    """Memory format of the student's images and weights."""
    log_every: Count = 10
    """Steps between two rows of metrics.jsonl."""
    floor_every: Annotated[int, Field(ge=0)] = 50
    """Steps between two measurements of the target-noise floor, each of which costs another forward
    pass of the teacher; 0 for none."""
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between two evaluations on the validation split; 0 for none. After the last step
    `evaluate.split` is scored."""
    checkpoint_every: Count = 100
    """Steps between two checkpoints."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """How trained arms are scored; the keys from `window` on are only for `distill evaluate`."""

    split: Literal["train", "val", "test"] = "test"
    """Split of the reported figures."""
    images: Count | None = None
    """Only the first n images of it; all by default."""
    batch: Count = 64
    """Images per forward pass."""
    scales: Annotated[list[Positive], AfterValidator(_once)] = Field(default=[1.0], min_length=1)
    """Relative sizes at which images are looked at, averaging the class probabilities."""
    flip: bool = False
    """Look at the mirrored images too."""
    window: HeightWidth | None = None
    """Height and width of overlapping windows that images of their own size are cut into, each
    resized to `data.size`; by default the whole image is resized."""
    lrs: Annotated[list[Positive], AfterValidator(_once)] = Field(
        default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], min_length=1
    )
    """Learning rates that `linear` tries; the best on val is tested."""
    steps: Count = 400
    """Optimiser steps of `linear`."""
    train_batch: Annotated[int, Field(ge=2)] = 16
    """Images per step of `linear`."""
    neighbours: Count = 20
    """Number of neighbours that vote in `knn`."""
    temperature: Positive = 0.07
    """Temperature of the votes in `knn`; the smaller, the more nearer ones count."""
    labels: Annotated[list[Labels], AfterValidator(_once)] = Field(
        default=[20, 50, "1/16", "1/8", "1/4", "all"], min_length=1
    )
    """Labelled training images in `label_efficient`: numbers, shares, or all."""
    splits: Count = 5
    """Number of random choices of these images."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """One distillation run: `distill train`."""

    name: RunName = "run"
    """Name of the run, its folder below `output`."""
    output: str = "runs"
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of weights, data order, noise and policy."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one; CUDA_VISIBLE_DEVICES chooses among several."""
    data: DataConfig = Field(default_factory=DataConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    student: StudentConfig = Field(default_factory=StudentConfig)
    pairs: list[PairConfig] = Field(min_length=1)
    """The pairs of feature maps to match."""
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
