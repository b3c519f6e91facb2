"""The learning rate at hand-computed steps, and what the optimiser decays."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from distill.config import TrainConfig
from distill.training.optim import (
    build_optimizer,
    freeze_backbone,
    lr_factor,
    stage,
    stage_lr_factor,
)
from students.student import Student


def test_warm_up_is_linear_and_ends_at_the_largest_rate() -> None:
    assert [lr_factor("constant", step, 10, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_falls_from_the_end_of_the_warm_up() -> None:
    factors = [lr_factor("cosine", step, 10, 2) for step in (2, 4, 6, 8, 9)]
    # Eight steps: 0, 1/4, 1/2, 3/4 and 7/8 of half a cosine.
    assert factors == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.038060], abs=1e-6)


def test_steps_are_at_one_half_and_three_quarters() -> None:
    factors = [lr_factor("step", step, 8, 0) for step in range(8)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (3, 20), (7, 7), (50, 5)])
def test_every_step_learns_and_none_exceeds_the_rate(
    schedule: str, steps: int, warmup: int
) -> None:
    for step in range(steps):
        assert 0 < lr_factor(schedule, step, steps, warmup) <= 1  # type: ignore[arg-type]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("momentum", torch.optim.SGD)],
)
def test_norms_and_biases_are_not_decayed(model: nn.Module, name: str, kind: type) -> None:
    train = TrainConfig(optimizer=name, lr=0.3, weight_decay=0.2)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, train)
    assert isinstance(optimizer, kind)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {"0.weight": 0.2, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
    assert all(group["lr"] == 0.3 for group in optimizer.param_groups)


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", True), ("momentum", False)])
def test_sgd_has_nesterov_momentum_or_the_plain_one(
    model: nn.Module, name: str, nesterov: bool
) -> None:
    group = build_optimizer(model, TrainConfig(optimizer=name)).param_groups[0]  # type: ignore[arg-type]
    assert (group["momentum"], group["nesterov"]) == (0.9, nesterov)


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum"])
def test_decay_all_decays_norms_and_biases_too(model: nn.Module, name: str) -> None:
    train = TrainConfig(optimizer=name, weight_decay=0.2, decay_all=True)  # type: ignore[arg-type]
    groups = build_optimizer(model, train).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(4, 0.2)]


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum"])
def test_weights_may_get_their_first_gradient_late(model: nn.Module, name: str) -> None:
    """As the head of the task does where the features are distilled first."""
    optimizer = build_optimizer(model, TrainConfig(optimizer=name))  # type: ignore[arg-type]
    early, late = list(model[0].parameters()), list(model[1].parameters())  # type: ignore[index]
    for weights in (early, early + late):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        assert not any(torch.equal(x, y) for x, y in zip(before, weights, strict=True))


def test_frozen_parameters_are_left_out(model: nn.Module) -> None:
    model[0].requires_grad_(False)  # type: ignore[index]
    optimizer = build_optimizer(model, TrainConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_every_stage_of_an_arm_with_a_teacher_has_its_own_learning_rate() -> None:
    train = TrainConfig(
        schedule="distill_then_finetune", steps=10, finetune_steps=3, lr_schedule="cosine", warmup=1
    )
    assert [stage(train, step, True) for step in (0, 6, 7, 9)] == [(0, 7)] * 2 + [(7, 10)] * 2
    assert stage_lr_factor(train, 6, True) == lr_factor("cosine", 6, 7, 1)
    assert stage_lr_factor(train, 9, True) == lr_factor("cosine", 2, 3, 1)
    assert stage(train, 8, False) == (0, 10)
    assert stage(dataclasses.replace(train, schedule="joint"), 8, True) == (0, 10)


def test_of_a_frozen_student_of_whole_images_the_classifier_is_trained() -> None:
    student = Student("test_resnet", classes=3, dense=False, image_size=(32, 32))
    freeze_backbone(student)
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert trained == {"backbone.fc.weight", "backbone.fc.bias"}
    assert not student.backbone.training
