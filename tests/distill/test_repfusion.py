"""The RepFusion presets (Yang and Wang, ICCV 2023) against the method in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from distill.build import build_accelerator, build_training_set
from distill.config import RunConfig
from distill.recipe import load_config, to_tree
from distill.training.batch import Batch
from distill.training.loop import batches
from distill.training.trainer import Trainer
from rl_policy.reinforce import Reinforce

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
RECIPES = {
    "hint": EXPERIMENTS / "repfusion_cifar10.yaml",
    "at": EXPERIMENTS / "repfusion_cifar10_at.yaml",
    "rkd": EXPERIMENTS / "repfusion_cifar10_rkd.yaml",
}
N = 6  # images a step
POSITIONS = 2 * 2  # of the student's last map, the coarser one
TAUGHT, STEPS = 4, 8

PHOTOGRAPHS = '''
import torch
from distill.benchmarks import distinct_colours

class Photographs:
    """Random images of 32 px in three classes."""

    name, task, ignore_index = "photographs", "classification", 255
    num_classes, class_names, palette = 3, ("a", "b", "c"), distinct_colours(3)

    def __init__(self, root):
        self.targets = [index % 3 for index in range(48)]

    def dataset(self, split):
        return self

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8)
        return image, self.targets[index]
'''


@pytest.fixture
def small(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], RunConfig]:
    """A preset with a tiny teacher and student, and 6 images in place of 128."""
    (tmp_path / "photographs.py").write_text(PHOTOGRAPHS)
    monkeypatch.syspath_prepend(tmp_path)
    # The weights that the preset gives its own sizes, by the rules of the test below
    weights = {
        "hint": (),
        "at": (f"pairs.0.weight={1000 / POSITIONS}",),
        "rkd": (
            f"pairs.0.weight={25 * (N - 1) / N}",
            f"pairs.0.options.angle_weight={2 * (N - 2) / N}",
        ),
    }

    def load(preset: str) -> RunConfig:
        return load_config(
            RunConfig,
            RECIPES[preset],
            [
                *("data.benchmark=photographs:Photographs", "data.options={}", "device=cpu"),
                *(f"teacher.path={teacher_folder}", "student.model=test_resnet"),
                *("student.input_size=[64,64]", f"train.batch={N}", f"train.steps={STEPS}"),
                *(f"train.finetune_steps={STEPS - TAUGHT}", f"output={tmp_path}"),
                *weights[preset],
            ],
        )

    return load


def build(config: RunConfig) -> Trainer:
    """The trainer, its policy's network with weights that prefer some timesteps to others."""
    data = build_training_set(config.data)
    trainer = Trainer(config, "distilled", data, build_accelerator(config.device))
    generator = torch.Generator().manual_seed(4)
    for weight in policy_of(trainer).network[-1].parameters():
        weight.data.normal_(std=0.3, generator=generator)
    return trainer


def policy_of(trainer: Trainer) -> Reinforce:
    assert isinstance(trainer.policy, Reinforce)
    return trainer.policy


class Terms(NamedTuple):
    """The losses of a step, written out; `mlp` of each image."""

    feature: Tensor
    mlp: Tensor
    policy: Tensor


class ByHand:
    """RepFusion in plain torch: own copies of a trainer's weights, one SGD for all of them."""

    def __init__(self, trainer: Trainer, preset: str, teacher_folder: Path) -> None:
        self.preset = preset
        self.backbone = copy.deepcopy(trainer.student.backbone)
        self.policy = [copy.deepcopy(p) for p in policy_of(trainer).network.parameters()]
        head = trainer.distiller.reward_head
        assert head is not None
        self.mlp = [copy.deepcopy(p) for p in head.parameters()]
        assert [tuple(p.shape) for p in self.mlp[::2]] == [(256, 16), (256, 256), (3, 256)]
        self.projector = [copy.deepcopy(p) for p in trainer.distiller.losses.parameters()]
        assert len(self.projector) == (2 if preset == "hint" else 0)
        teacher = UNet2DModel.from_pretrained(teacher_folder / "unet", use_safetensors=True)
        assert isinstance(teacher, UNet2DModel)
        self.teacher, self.hooked = teacher.eval(), torch.empty(0)
        assert teacher.mid_block is not None

        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self.hooked = output

        teacher.mid_block.resnets[1].conv2.register_forward_hook(hook)
        self.sgd = torch.optim.SGD(self.weights(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def weights(self) -> list[Tensor]:
        return [*self.backbone.parameters(), *self.projector, *self.mlp, *self.policy]

    def student(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) as the backbone wants them."""
        data = timm.data.resolve_model_data_config(self.backbone)
        mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        return (F.interpolate(images, (64, 64), mode="bilinear", antialias=True) - mean) / std

    def act(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, 1000) of the policy on the 32 px images."""
        x = 2 * images - 1
        *convolutions, weight, bias = self.policy
        for kernel, shift in zip(convolutions[::2], convolutions[1::2], strict=True):
            x = F.relu(F.conv2d(x, kernel, shift, stride=2, padding=1))
        return F.log_softmax(x.mean((2, 3)) @ weight.T + bias, dim=1)

    def terms(self, images: Tensor, labels: Tensor, t: Tensor, entropy_weight: float) -> Terms:
        with torch.no_grad():
            self.teacher(2 * images - 1, t)  # the clean image
        g, f = self.hooked, self.backbone.forward_features(self.student(images))
        w1, b1, w2, b2, w3, b3 = self.mlp
        pooled = g.mean((2, 3))
        hidden = F.relu(F.relu(pooled @ w1.T + b1) @ w2.T + b2)
        cross_entropy = F.cross_entropy(hidden @ w3.T + b3, labels, reduction="none")
        log_p = self.act(images)
        chosen = log_p[torch.arange(len(t)), t]
        entropy = -(log_p.exp() * log_p).sum(1)
        reinforce = (cross_entropy.detach() * chosen).mean()  # the reward is minus it
        policy = reinforce - entropy_weight * entropy.mean()
        feature = {"hint": self.hint, "at": attention_transfer, "rkd": relational}[self.preset]
        return Terms(feature(f, g), cross_entropy, policy)

    def hint(self, f: Tensor, g: Tensor) -> Tensor:
        """Romero et al. 2015, pooled: 1x1 convolution, average over positions, squared error."""
        weight, bias = self.projector
        projected = F.conv2d(f, weight, bias).mean((2, 3))
        return (projected - g.mean((2, 3))).square().mean()

    def step(self, terms: Terms, rate: float) -> None:
        for group in self.sgd.param_groups:
            group["lr"] = rate
        self.sgd.zero_grad()
        torch.autograd.backward(terms.feature + terms.mlp.mean() + terms.policy)
        self.sgd.step()


def attention_transfer(f: Tensor, g: Tensor) -> Tensor:
    """Zagoruyko and Komodakis 2017, eq. 2 with p = 2, times 1000.

    As their code has it, the mean over positions; ours is the sum.
    """

    def attention(x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 2)
        return F.normalize(x.pow(2).mean(1).flatten(1))

    return 1000 * (attention(f) - attention(g)).pow(2).mean()


def relational(f: Tensor, g: Tensor) -> Tensor:
    """Park et al. 2019, section 3.2: distances x 25 and angles x 50.

    As their code has it, means over all N^2 pairs and N^3 triplets. Ours are over the N (N-1) pairs
    and N (N-1) (N-2) triplets of different images; the others differ by 0.
    """

    def distances(x: Tensor) -> Tensor:
        pairs = (x[:, None] - x[None]).norm(dim=2)
        return pairs / pairs[pairs > 0].mean()

    def angles(x: Tensor) -> Tensor:
        directions = F.normalize(x[None] - x[:, None], dim=2)  # from the vertex
        return torch.einsum("vid,vkd->vik", directions, directions)

    f, g = f.mean((2, 3)).double(), g.mean((2, 3)).double()
    distance = F.smooth_l1_loss(distances(f), distances(g))
    return (25 * distance + 50 * F.smooth_l1_loss(angles(f), angles(g))).float()


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Length of the difference, as a share of the length."""
    a, b = (torch.cat([x.detach().flatten() for x in side]) for side in (ours, theirs))
    return float((a - b).norm() / b.norm())


def weights_of(trainer: Trainer) -> list[Tensor]:
    """All that is trained, in the order of `ByHand.weights`."""
    assert trainer.distiller.reward_head is not None
    return [
        *trainer.student.parameters(),
        *trainer.distiller.losses.parameters(),
        *trainer.distiller.reward_head.parameters(),
        *policy_of(trainer).network.parameters(),
    ]


@pytest.mark.parametrize("preset", RECIPES)
def test_steps_are_those_of_the_method_written_out(
    small: Callable[[str], RunConfig], teacher_folder: Path, preset: str
) -> None:
    trainer = build(small(preset))
    hand, stream = ByHand(trainer, preset, teacher_folder), batches(trainer)
    for step, rate in enumerate((0.1, 0.1, 0.01, 0.001)):  # drops at half and three quarters
        images, labels, *_ = next(stream)
        losses = trainer.train_step(Batch(images, labels))
        t = trainer.timesteps[losses.bins]
        entropy_weight = {0: 0.05}.get(step, 0.0)  # from 0.1 to 0 over half of the four steps
        terms = hand.terms(images, labels, t, entropy_weight)
        hand.step(terms, rate)
        assert losses.feature.item() == pytest.approx(terms.feature.item(), rel=1e-5)
        assert losses.reward_head.item() == pytest.approx(terms.mlp.mean().item(), rel=1e-5)
        assert losses.task == 0
        assert apart([losses.rewards["teacher_task"]], [-terms.mlp]) < 1e-6
        mine, theirs = policy_of(trainer).network.parameters(), hand.policy
        for weight, expected in zip(mine, theirs, strict=True):
            assert weight.grad is not None
            assert expected.grad is not None
            assert apart([weight.grad], [expected.grad]) < 1e-6
        assert apart(weights_of(trainer), hand.weights()) < 1e-6
        # The next step begins with the same weights; the momentum is that of all steps
        for weight, expected in zip(weights_of(trainer), hand.weights(), strict=True):
            expected.data.copy_(weight)
    images, labels, *_ = next(stream)
    logits = hand.backbone(hand.student(images))
    fine_tuned = trainer.train_step(Batch(images, labels))
    assert fine_tuned.task.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert fine_tuned.feature == 0
    assert fine_tuned.reward_head == 0


def test_presets_differ_in_their_pair_alone() -> None:
    trees = {preset: to_tree(load_config(RunConfig, path)) for preset, path in RECIPES.items()}
    assert {preset: tree.pop("name") for preset, tree in trees.items()} == {
        preset: f"repfusion-{preset}" for preset in RECIPES
    }
    pairs = {preset: tree.pop("pairs") for preset, tree in trees.items()}
    assert [pair["loss"] for (pair,) in pairs.values()] == ["mse", "at", "rkd"]
    assert trees["hint"] == trees["at"] == trees["rkd"]


def test_presets_give_the_published_weights_and_epochs() -> None:
    """Weights as the authors' code defines its losses, whatever constants ours differ by."""
    hint, at, rkd = (load_config(RunConfig, path) for path in RECIPES.values())
    assert hint.pairs[0].weight == 1
    # A resnet's last map is 1/32 of its input; the teacher's mid block has 4x4 positions, too
    assert at.student.input_size == (128, 128)
    assert at.pairs[0].weight * (128 // 32) ** 2 == 1000
    images = rkd.train.batch
    distance, angle = rkd.pairs[0].weight, rkd.pairs[0].options["angle_weight"]
    assert distance == pytest.approx(25 * (images - 1) / images)
    assert distance * angle == pytest.approx(50 * (images - 1) * (images - 2) / images**2)
    train, options = hint.train, hint.policy.options
    taught = train.steps - train.finetune_steps
    assert taught * train.batch == 200 * 50_000
    assert options["rate_drops"] == [0.5, 0.75]
    assert options["entropy_until"] == 0.5
