"""A teacher that knows the class at one of 20 timesteps, and at one of its layers: whether the
training loop finds it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.build import build_accelerator, build_training_set
from distill.config import RunConfig
from distill.training.loop import batches
from distill.training.trainer import Trainer
from rl_policy.summary import PolicySummary, policy_summary

Load = Callable[..., RunConfig]
STEPS, BINS, RIGHT = 300, 20, 13

PLANTED = '''
"""Noise at every timestep and layer, but the colour of the image at timestep 130 of `right`."""

import torch
from distill.benchmarks import distinct_colours
from teachers.noise import NoiseSchedule


class Teacher:
    name = fingerprint = "planted"
    layers = "left", "right"
    channels = dict.fromkeys(layers, 8)
    reductions = dict.fromkeys(layers, 4)
    noise_schedule = NoiseSchedule.variance_preserving(torch.linspace(0.99, 0.01, 191), "epsilon")

    def __init__(self, path, **view):
        pass

    def features(self, images, timesteps, generator=None, labels=None):
        shape = len(images), 8, 4, 4
        maps = {name: torch.randn(shape, generator=generator) for name in self.layers}
        knows = timesteps == 130
        maps["right"][knows, :3] += 4 * images[knows].mean((2, 3))[..., None, None]
        return maps

    def to(self, device):
        return self


class Tints:
    name, task, ignore_index = "tints", "classification", 255
    num_classes, class_names, palette = 3, ("red", "green", "blue"), distinct_colours(3)

    def __init__(self, root):
        self.targets = [index % 3 for index in range(192)]

    def dataset(self, split):
        return self

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(100, (3, 32, 32), generator=generator, dtype=torch.uint8)
        image[self.targets[index]] += 150
        return image, self.targets[index]
'''


@pytest.fixture
def train(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], PolicySummary]:
    """Train a student for 300 steps of batch 64. Returns what the policy came to prefer."""
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)

    def run(policy: str, reward_layer: str) -> PolicySummary:
        config = load(
            *("teacher.name=planted:Teacher", "data.benchmark=planted:Tints", "data.options={}"),
            *("pairs.0.teacher=left", "pairs.0.student=layer2", "student.kwargs={}"),
            *("data.labelled=null", "data.unlabelled=0", "data.augment=none"),
            *("train.batch=64", "train.unlabelled_batch=0", f"train.steps={STEPS}"),
            *("train.floor_every=0", f"policy.bins={BINS}"),
            *(f"policy.name={policy}", f"policy.reward_layer={reward_layer}"),
        )
        accelerator = build_accelerator(config.device)
        trainer = Trainer(config, "distilled", build_training_set(config.data), accelerator)
        assert trainer.timesteps[RIGHT] == 130
        for batch in batches(trainer):
            losses = trainer.train_step(batch)
        assert trainer.policy is not None
        return policy_summary(trainer.policy.probabilities(losses.context))

    return run


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    sys.modules.pop("planted", None)


# Measured: 0.998 or more, soft_mix 0.94; ucb 1.0, and dqn, which explores 0.05 to the end, 0.95.
@pytest.mark.parametrize("policy", ["a2c", "ppo", "reinforce", "thompson", "soft_mix"])
def test_policy_finds_the_planted_timestep_within_300_steps_of_64(
    train: Callable[[str, str], PolicySummary], policy: str
) -> None:
    assert train(policy, "right").mean[RIGHT] >= 0.9


def test_the_default_policy_stays_spread_at_a_layer_that_knows_nothing(
    train: Callable[[str, str], PolicySummary],
) -> None:
    """It sees the classes, and a bin for each of them would be one that the head could read."""
    assert train("a2c", "left").entropy > 0.9 * math.log(BINS)
