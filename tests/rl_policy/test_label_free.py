"""Pseudo-labels without labels: which bins they reward, and that they never collapse."""

import copy

import pytest
import torch
from torch import Generator, Tensor, nn

from rl_policy.label_free import LabelFreeReward

CHANNELS, STUDENT, BINS, CLUSTERS, BATCH = 12, 10, 3, 8, 64
NOISE, INFORMATIVE, OTHER = range(BINS)


def images(generator: Generator, count: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher features, bins and student features of images of four kinds, which nobody names.

    The kind shows in the student's feature, and in the teacher's at all bins but `NOISE`, where it
    is drowned; every bin has a mean of its own, so that it would be a fine cluster.
    """
    of = torch.randn(4, CHANNELS + STUDENT, generator=Generator().manual_seed(9))
    kinds = of[torch.randint(4, (count,), generator=generator)]
    bins = torch.randint(BINS, (count,), generator=generator)
    noise = torch.randn(count, CHANNELS, 2, 2, generator=generator)
    signal = kinds[:, :CHANNELS] * (bins != NOISE)[:, None] + 5 * bins[:, None]
    student = kinds[:, CHANNELS:] + 0.3 * torch.randn(count, STUDENT, generator=generator)
    return signal[:, :, None, None] + noise, bins, student


def build() -> LabelFreeReward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LabelFreeReward(CHANNELS, STUDENT, BINS, CLUSTERS)


def train(reward: LabelFreeReward, steps: int) -> None:
    generator = Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(reward.parameters(), lr=1e-2)
    for _ in range(steps):
        losses, _ = reward(*images(generator))
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained() -> LabelFreeReward:
    """After 100 steps, in evaluation mode; for reading only."""
    reward = build()
    train(reward, 100)
    return reward.eval()


def test_a_bin_of_noise_earns_less_than_one_that_tells_the_images_apart(
    trained: LabelFreeReward,
) -> None:
    feature, bins, student = images(Generator().manual_seed(2), 2000)
    _, rewards = trained(feature, bins, student)
    noise, *others = (rewards[bins == k].mean().item() for k in range(BINS))
    # Measured: -0.015, and 1.2 for both others, of log 4 = 1.39 that the kinds are worth
    assert noise < 0.1
    assert min(others) > 0.8
    assert not rewards.requires_grad


def test_pseudo_labels_are_distributions_in_which_a_cluster_stands_out(
    trained: LabelFreeReward,
) -> None:
    _, _, student = images(Generator().manual_seed(2), 2000)
    predicted = trained.regression(trained.student_scale(student))
    codes = trained.codes(predicted)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(2000))
    assert codes.max(dim=1).values.mean() > 0.5  # two clusters may share a kind


def test_what_is_predicted_does_not_tell_the_bin(trained: LabelFreeReward) -> None:
    feature, bins, _ = images(Generator().manual_seed(2), 2000)
    pooled = feature.mean(dim=(2, 3))
    scaled, centred = trained.scale(pooled), trained._centred(pooled, bins)
    means = [
        torch.stack([x[bins == k].mean(dim=0) for k in range(BINS)]) for x in (scaled, centred)
    ]
    assert means[0].abs().max() > 1  # every bin has a mean of its own
    assert means[1].abs().max() < 0.1


def test_images_are_spread_over_the_clusters(trained: LabelFreeReward) -> None:
    _, _, student = images(Generator().manual_seed(2), 2000)
    codes = trained.codes(trained.regression(trained.student_scale(student)))
    share = codes.mean(dim=0)
    assert share.min() > 0.3 / CLUSTERS  # these images are new
    assert share.max() < 2 / CLUSTERS
    # With the centres at rest the shares of the last images become equal, slowly
    rest = copy.deepcopy(trained)
    for _ in range(50):
        rest._balance(torch.zeros(0, CHANNELS))
    last = rest.codes(rest.queue).mean(dim=0)
    torch.testing.assert_close(last, torch.full((CLUSTERS,), 1 / CLUSTERS), rtol=0.05, atol=0)


def test_all_images_in_one_cluster_is_left_again() -> None:
    reward = build()
    reward.potentials[0] = 100.0
    _, _, student = images(Generator().manual_seed(2), BATCH)
    assert reward.codes(reward.regression(student))[:, 0].min() > 0.999
    train(reward, 30)
    predicted = reward.regression(reward.student_scale(student))
    assert reward.codes(predicted).mean(dim=0).max() < 3 / CLUSTERS


def test_images_that_are_all_alike_earn_nothing() -> None:
    """There is nothing to tell: no image is given a cluster of its own by chance."""
    reward = build()
    generator = Generator().manual_seed(3)
    for _ in range(20):
        feature, bins, _ = images(generator)
        _, rewards = reward(feature, bins, torch.ones(BATCH, STUDENT))
    assert rewards.abs().max() < 0.05


def test_evaluation_changes_nothing_and_a_copy_goes_on_to_the_bit(
    trained: LabelFreeReward,
) -> None:
    state = copy.deepcopy(trained.state_dict())
    resumed = build()
    resumed.load_state_dict(state)
    resumed.eval()
    seen = images(Generator().manual_seed(4))
    torch.testing.assert_close(resumed(*seen), trained(*seen), rtol=0, atol=0)
    torch.testing.assert_close(trained.state_dict(), state, rtol=0, atol=0)
    first, second = copy.deepcopy(trained).train(), resumed.train()
    for _ in range(3):
        torch.testing.assert_close(first(*seen), second(*seen), rtol=0, atol=0)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_it_computes_in_float32_whatever_autocast_says(trained: LabelFreeReward) -> None:
    seen, dtypes = images(Generator().manual_seed(4)), []
    products = [trained.regression, *(x for x in trained.head.head if isinstance(x, nn.Linear))]
    hooks = [
        product.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
        for product in products
    ]
    with torch.autocast("cpu", torch.bfloat16):
        losses, rewards = trained(*seen)
    for hook in hooks:
        hook.remove()
    assert dtypes == [torch.float32] * len(products)
    torch.testing.assert_close((losses, rewards), trained(*seen), rtol=0, atol=0)
