"""Feature losses and task losses: sizes, projector, statistics, settings; measures have a file."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.matching.losses import (
    FeatureLoss,
    Measure,
    class_shares,
    task_loss,
)
from distill.registry import TABLES
from tests.distill.matching.conftest import T, loss_of, maps


@pytest.mark.parametrize("finer", ["student", "teacher"])
def test_finer_map_is_averaged_down_to_the_coarser_grid(finer):
    fine = torch.arange(16.0).view(1, 1, 4, 4)
    coarse = torch.zeros(1, 1, 2, 2)
    pair = (fine, coarse) if finer == "student" else (coarse, fine)
    expected = (2.5**2 + 4.5**2 + 10.5**2 + 12.5**2) / 4
    assert loss_of("mse", *pair).tolist() == pytest.approx([expected])


def test_sizes_that_do_not_divide_meet_on_the_coarser_grid():
    constant = torch.full((2, 3, 5, 7), 2.0)
    torch.testing.assert_close(
        loss_of("mse", constant, torch.zeros(2, 3, 3, 8)), torch.full((2,), 4.0)
    )


def test_gradients_reach_student_and_projector_but_not_the_teacher():
    for name in TABLES["losses"]:
        student = maps(4, 3, 2, 2).requires_grad_()
        teacher = maps(4, 5, 2, 2, seed=1).requires_grad_()
        loss = FeatureLoss(name, 3, 5, projector="linear")
        loss(student, teacher, T).mean().backward()
        assert student.grad.abs().sum() > 0, name
        assert loss.projector.weight.grad.abs().sum() > 0, name
        assert teacher.grad is None, name


def test_projector_exists_only_where_channels_must_be_aligned():
    def parameters(*arguments: object) -> int:
        return sum(p.numel() for p in FeatureLoss(*arguments).parameters())

    assert parameters("mse", 3, 5) == 3 * 5 + 5
    assert parameters("mse", 5, 5) == 0
    assert parameters("at", 3, 5) == 0
    assert parameters("rkd", 3, 5) == 0


@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1", "cosine", "at"])
def test_batch_of_one(name):
    loss = FeatureLoss(name, 3, 3)(maps(1, 3, 2, 2), maps(1, 3, 2, 2, seed=1), T[:1])
    assert loss.shape == (1,)
    assert loss.isfinite().all()


@pytest.mark.parametrize("name", TABLES["losses"])
def test_bfloat16_maps_give_a_float32_loss_near_the_float32_one(name):
    torch.manual_seed(0)
    loss = FeatureLoss(name, 3, 5)
    student, teacher = maps(4, 3, 4, 4), maps(4, 5, 2, 2, seed=1)
    expected = loss(student, teacher, T)
    half = loss(student.bfloat16(), teacher.bfloat16(), T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = loss(student, teacher, T)
    assert half.dtype == autocast.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(autocast, expected, rtol=0.05, atol=0.05)


def test_one_image_does_not_change_the_loss_of_another():
    student, teacher = maps(4, 3, 2, 2), maps(4, 3, 2, 2, seed=1)
    together = loss_of("mse", student, teacher)
    torch.testing.assert_close(together[2:3], loss_of("mse", student[2:3], teacher[2:3]))


def passes(target: Tensor, loss: FeatureLoss) -> Tensor:
    """What the loss makes of a target: mse of a student without features is its square."""
    return loss(torch.zeros_like(target), target, torch.zeros(len(target)))


def test_statistics_of_several_batches_are_those_of_all_images():
    loss = FeatureLoss("mse", 2, 2)
    x = maps(12, 2, 3, 3) * 3 + torch.arange(12.0).view(12, 1, 1, 1)
    for batch in x.split(4):
        passes(batch, loss)
    deviation = x.var(dim=(0, 2, 3), correction=0).sqrt().view(2, 1, 1)
    expected = ((x - x.mean(dim=(0, 2, 3)).view(2, 1, 1)) / deviation).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(passes(x, loss.eval()), expected, rtol=1e-4, atol=0)


def test_statistics_rest_in_eval_mode_and_return_from_a_state_dict():
    loss, again = FeatureLoss("mse", 2, 2), FeatureLoss("mse", 2, 2).eval()
    passes(maps(4, 2, 3, 3), loss)
    again.load_state_dict(loss.state_dict())
    passes(maps(4, 2, 3, 3, seed=1) + 5, loss.eval())
    x = maps(2, 2, 3, 3)
    torch.testing.assert_close(passes(x, again), passes(x, loss), rtol=0, atol=0)


def test_constant_channel_stays_finite():
    assert passes(torch.full((2, 1, 2, 2), 7.0), FeatureLoss("mse", 1, 1)).tolist() == [0, 0]


def test_mse_of_a_constant_student_is_the_variance_of_the_standardised_target():
    loss = FeatureLoss("mse", 3, 3, projector="none")
    result = loss(torch.zeros(8, 3, 4, 4), maps(8, 3, 4, 4) * 9 + 4, torch.zeros(8))
    assert result.mean().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("wrap", [Measure, lambda function: function])
def test_own_measure_is_taken_as_it_is(wrap):
    def largest(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().amax(dim=(1, 2, 3))

    loss = FeatureLoss(wrap(largest), 1, 1, standardise=False)
    FeatureLoss(wrap(partial(largest)), 1, 1)  # without a name
    student = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    assert loss(student, torch.zeros(2, 1, 1, 1), T[:2]).tolist() == [1.0, 3.0]


def test_own_measure_may_be_named_and_ask_for_more(tmp_path, monkeypatch):
    (tmp_path / "own_measures.py").write_text(
        "from functools import partial\n"
        "from distill.matching.measures import Measure\n"
        "@partial(Measure, same_channels=False, smallest_batch=4)\n"
        "def spread(student, teacher, *, weight=1.0):\n"
        "    return weight * (student.std(dim=0) - teacher.std(dim=0)).square().sum((1, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    loss = FeatureLoss("own_measures:spread", 3, 5, options={"weight": 2.0})
    assert loss.projector is None
    with pytest.raises(UserError, match=r"'own_measures:spread' .* needs at least 4, got 3"):
        loss(maps(3, 3, 2, 2), maps(3, 5, 2, 2), T[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measure": "cosin"}, "unknown name 'cosin'; did you mean 'cosine'?"),
        ({"measure": "at", "pooled": True}, "'at' compares positions, so it has no pooled form"),
        ({"measure": "mse", "projector": "none"}, "'mse' compares 3 channels with 5"),
        (
            {"measure": "infonce", "options": {"temperatur": 1.0}},
            "no option 'temperatur'; did you mean 'temperature'?",
        ),
        ({"measure": "mse", "options": {"beta": 1.0}}, "no option 'beta'; it has none"),
        (
            {"measure": "infonce", "options": {"temperature": "hot"}},
            "options.temperature must be a number, got 'hot'",
        ),
        (
            {"measure": "infonce", "options": {"temperature": 0}},
            "options.temperature must be above 0",
        ),
        (
            {"measure": "smooth_l1", "options": {"beta": -1}},
            "options.beta must be a number from 0 up, got -1",
        ),
        ({"measure": "smooth_l1", "options": {"beta": math.nan}}, "from 0 up, got nan"),
        ({"measure": "infonce", "options": {"temperature": math.inf}}, "from 0 up, got inf"),
        ({"measure": "at", "options": {"power": 0.5}}, "options.power must be a number from 1 up"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError) as error:
        FeatureLoss(student_channels=3, teacher_channels=5, **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_classification_loss_is_cross_entropy_an_image():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    loss = task_loss(logits, torch.tensor([0, 1]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(4)])


def test_an_image_without_a_class_costs_nothing():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert task_loss(logits, torch.tensor([255, 1])).tolist() == pytest.approx([0, math.log(4)])


def test_segmentation_loss_is_the_mean_over_valid_pixels():
    logits = torch.zeros(2, 4, 2, 2)
    logits[0, 1, 0, 0] = math.log(5.0)
    targets = torch.tensor([[[1, 255], [255, 2]], [[0, 1], [2, 3]]])
    expected = [(math.log(8 / 5) + math.log(4)) / 2, math.log(4)]
    assert task_loss(logits, targets).tolist() == pytest.approx(expected)


def test_image_without_valid_pixel_costs_nothing():
    logits = maps(2, 3, 2, 2).requires_grad_()
    targets = torch.stack([torch.full((2, 2), 255), torch.zeros(2, 2, dtype=torch.int64)])
    loss = task_loss(logits, targets)
    loss.sum().backward()
    assert loss[0] == 0
    assert logits.grad.isfinite().all()
    assert logits.grad[0].abs().sum() == 0 < logits.grad[1].abs().sum()


def test_logits_are_resized_to_the_mask_in_float32():
    logits = maps(1, 3, 2, 2).bfloat16()
    targets = torch.zeros(1, 6, 4, dtype=torch.int64)
    full = F.interpolate(logits.float(), (6, 4), mode="bilinear", align_corners=False)
    loss = task_loss(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(full, targets)[None])


def test_a_channel_10_000_times_larger_has_its_share_of_the_loss_and_no_more():
    """As the massive activations of diffusion transformers (Sun et al. 2024)."""
    student, plain = maps(4, 4, 4, 4), maps(4, 4, 4, 4, seed=1)
    massive = plain.clone()
    massive[:, 2] = 10_000 * (plain[:, 2] + 3)

    def loss_and_gradient(teacher: Tensor, standardise: bool = True) -> tuple[Tensor, Tensor]:
        x = student.clone().requires_grad_()
        loss = FeatureLoss("mse", 4, 4, projector="none", standardise=standardise)(x, teacher, T)
        loss.sum().backward()
        return loss.detach(), x.grad

    for result, expected in zip(loss_and_gradient(massive), loss_and_gradient(plain), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    _, unchecked = loss_and_gradient(massive, standardise=False)
    assert unchecked[:, 2].norm() > 1000 * unchecked[:, [0, 1, 3]].norm()


def test_class_shares_are_of_what_is_labelled() -> None:
    assert class_shares(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    masks = torch.tensor([[[0, 0], [2, 255]], [[255, 255], [255, 255]], [[1, 1], [1, 0]]])
    assert class_shares(masks, 3).flatten().tolist() == pytest.approx(
        [2 / 3, 0, 1 / 3, 0, 0, 0, 0.25, 0.75, 0]
    )
