"""What feature losses compare, against hand-computed numbers and independent numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.matching.losses import FeatureLoss
from distill.registry import TABLES
from tests.distill.matching.conftest import loss_of, maps


@pytest.mark.parametrize("name", sorted(set(TABLES["losses"]) - {"infonce", "mse_at"}))
def test_perfect_match_gives_zero(name):
    x = maps(4, 3, 2, 2)
    torch.testing.assert_close(loss_of(name, x, x.clone()), torch.zeros(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mse", {}, (9 + 0.25) / 2),
        ("l1", {}, (3 + 0.5) / 2),
        ("smooth_l1", {}, (3 - 0.5 + 0.5 * 0.25) / 2),
        ("smooth_l1", {"beta": 4.0}, (0.5 * 9 / 4 + 0.5 * 0.25 / 4) / 2),
    ],
)
def test_known_values_of_one_position(name, options, expected):
    student = torch.tensor([3.0, 0.5]).view(1, 2, 1, 1)
    loss = loss_of(name, student, torch.zeros(1, 2, 1, 1), options=options)
    assert loss.tolist() == pytest.approx([expected])


def test_cosine_is_a_mean_over_positions():
    student = torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])[None]  # (1, 2, 1, 2): (1, 0), (1, 1)
    teacher = torch.tensor([[[0.0, 5.0]], [[2.0, 5.0]]])[None]  # (0, 2), (5, 5)
    assert loss_of("cosine", student, teacher).tolist() == pytest.approx([0.5])


def test_attention_transfer_of_known_attention():
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    teacher = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    assert loss_of("at", student, teacher).tolist() == pytest.approx([2.0])


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attention_transfer_equals_numpy_with_different_channels(power):
    student, teacher = maps(3, 5, 4, 4), maps(3, 2, 4, 4, seed=1)
    expected = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        attention = [(np.abs(x) ** power).sum(axis=0).ravel() for x in (s, t)]
        unit = [a / np.sqrt((a**2).sum()) for a in attention]
        expected.append(((unit[0] - unit[1]) ** 2).sum())
    loss = loss_of("at", student, teacher, options={"power": power})
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def numpy_relational(student: np.ndarray, teacher: np.ndarray, weight: float) -> list[float]:
    """Park et al. 2019 with loops over pairs and triplets. student, teacher: (B, D), (B, D')."""
    batch = range(len(student))
    relations = []
    for x in (student.astype(np.float64), teacher.astype(np.float64)):
        distance = {(i, j): np.linalg.norm(x[i] - x[j]) for i in batch for j in batch if i != j}
        scale = np.mean(list(distance.values()))
        distance = {pair: value / scale for pair, value in distance.items()}
        angle = {}
        for vertex in batch:
            for i in batch:
                for k in batch:
                    if len({vertex, i, k}) == 3:
                        a, b = x[i] - x[vertex], x[k] - x[vertex]
                        angle[vertex, i, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        relations.append((distance, angle))
    (ds, as_), (dt, at) = relations
    return [
        float(np.mean([huber(ds[key] - dt[key]) for key in ds if key[0] == image]))
        + weight * float(np.mean([huber(as_[key] - at[key]) for key in as_ if key[0] == image]))
        for image in batch
    ]


@pytest.mark.parametrize("pooled", [False, True])
def test_relational_equals_loops_over_pairs_and_triplets(pooled):
    student, teacher = maps(5, 3, 2, 2) * 4, maps(5, 6, 2, 2, seed=1) + 2
    rows = [x.mean(dim=(2, 3)) if pooled else x.flatten(1) for x in (student, teacher)]
    expected = numpy_relational(rows[0].numpy(), rows[1].numpy(), weight=0.5)
    timesteps = torch.zeros(5, dtype=torch.int64)
    loss = FeatureLoss("rkd", 3, 6, pooled=pooled, standardise=False, options={"angle_weight": 0.5})
    result = loss(student, teacher, timesteps)
    assert result.tolist() == pytest.approx(expected, rel=1e-4)


def test_relational_knows_only_relations():
    x = maps(4, 3, 1, 1)
    turned = torch.stack([-x[:, 1], x[:, 0], x[:, 2]], dim=1) * 7 + 3
    assert loss_of("rkd", x, turned).abs().max() < 1e-6


def test_relational_of_equal_images_is_finite():
    x = torch.ones(3, 2, 2, 2, requires_grad=True)
    loss = loss_of("rkd", x, maps(3, 2, 2, 2))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()


def numpy_infonce(student: np.ndarray, teacher: np.ndarray, temperature: float) -> list[float]:
    """student, teacher: (B, N, C), one position after the other."""
    batch, positions, _ = student.shape
    unit = [x / np.linalg.norm(x, axis=2, keepdims=True) for x in (student, teacher)]
    result = []
    for b in range(batch):
        losses = []
        for n in range(positions):
            query = unit[0][b, n]
            keys = [unit[1][b, m] for m in range(positions)]
            keys += [unit[1][other, n] for other in range(batch) if other != b]
            scores = [math.exp(query @ key / temperature) for key in keys]
            losses.append(-math.log(scores[n] / sum(scores)))
        result.append(float(np.mean(losses)))
    return result


@pytest.mark.parametrize("pooled", [False, True])
def test_infonce_equals_loops_over_candidates(pooled):
    student, teacher = maps(3, 4, 2, 3), maps(3, 4, 2, 3, seed=1)
    rows = [
        x.mean(dim=(2, 3))[:, None] if pooled else x.flatten(2).transpose(1, 2)
        for x in (student, teacher)
    ]
    expected = numpy_infonce(rows[0].numpy(), rows[1].numpy(), 0.2)
    loss = loss_of("infonce", student, teacher, pooled=pooled, options={"temperature": 0.2})
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_infonce_of_orthogonal_images_by_hand():
    x = torch.eye(2).view(2, 2, 1, 1)
    expected = math.log(1 + math.exp(-10))
    assert loss_of("infonce", x, x.clone()).tolist() == pytest.approx([expected] * 2, abs=1e-6)


def test_pooled_compares_averages():
    student = torch.tensor([[0.0, 2.0], [4.0, 6.0]]).view(1, 1, 2, 2)
    teacher = torch.tensor([[1.0, 1.0]]).view(1, 1, 1, 2)
    assert loss_of("mse", student, teacher, pooled=True).tolist() == pytest.approx([(3 - 1) ** 2])


def test_mse_at_is_zero_for_the_whitened_map_and_adds_up():
    student, teacher = maps(2, 3, 4, 4), 5 * maps(2, 3, 4, 4, seed=1) + 2
    centred = teacher - teacher.mean(dim=(1, 2, 3), keepdim=True)
    whitened = centred / (teacher.var(dim=(1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(
        loss_of("mse_at", whitened, teacher), torch.zeros(2), atol=1e-6, rtol=0
    )
    expected = loss_of("mse", student, whitened) + 4 * loss_of("at", student, whitened)
    weighted = loss_of("mse_at", student, teacher, options={"attention_weight": 4.0})
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("at", {"power": 2.0}),
        ("rkd", {"angle_weight": 2.0}),
        ("mse_at", {"attention_weight": 10.0}),
        ("infonce", {"temperature": 0.1}),
    ],
)
def test_options_are_by_default_as_published(name, published):
    student, teacher = maps(4, 3, 4, 4), maps(4, 3, 4, 4, seed=1)
    default = loss_of(name, student, teacher)
    assert torch.equal(default, loss_of(name, student, teacher, options=published))
    other = {option: 1.5 * value for option, value in published.items()}
    assert not torch.allclose(default, loss_of(name, student, teacher, options=other))


@pytest.mark.parametrize(("name", "batch", "needed"), [("rkd", 2, 3), ("infonce", 1, 2)])
def test_batch_too_small_to_compare_images_is_named(name, batch, needed):
    x = maps(batch, 3, 2, 2)
    with pytest.raises(UserError, match=f"{name}.*needs at least {needed}, got {batch}"):
        loss_of(name, x, x)
