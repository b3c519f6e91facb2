"""Bandits without context, which learn the best bin for all images together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from rl_policy.options import check_range
from rl_policy.scaling import RunningScale


class GaussianBandit:
    """Base of Thompson and UCB: a Gaussian posterior of each bin's mean reward.

    Rewards are assumed normal around their bin's mean, with the variance of all rewards; the prior
    of the means is normal too, around the mean of all rewards. Sums are stored in units of the
    rewards and standardised when they are read: all bins are then on the scale of one moment, and a
    mean that rises as the policy improves favours no bin.

    Args:
        bins: K.
        discount: weight of past rewards after each step, so that the posterior follows rewards that
            drift (Garivier and Moulines 2011); 1 never forgets.
        prior: prior standard deviation of the bins' means, in standard deviations of a reward.
    """

    def __init__(self, bins: int, discount: float, prior: float) -> None:
        check_range("discount", discount, above=0, most=1)
        check_range("prior", prior, least=1e-3, most=1e3)
        self.bins, self.discount, self.prior = bins, discount, prior
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.sums = torch.zeros(bins, dtype=torch.float64)
        self.reward_scale = RunningScale(floor=0).double()

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """See `TimestepPolicy.learn`."""
        self.reward_scale.update(rewards.double())
        self.counts.mul_(self.discount).index_add_(0, bins, torch.ones_like(rewards).double())
        self.sums.mul_(self.discount).index_add_(0, bins, rewards.double())
        mean, deviation = self.posterior()
        best = int(mean.argmax())
        return {"best_mean": mean[best].item(), "best_deviation": deviation[best].item()}

    def posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation (K,) float64 of each bin's mean reward, on the standardised scale."""
        precision = self.counts + 1 / self.prior**2
        centred = self.sums - self.counts * self.reward_scale.mean
        standardised = centred * self.reward_scale.inverse_deviation()
        return standardised / precision, precision.rsqrt()

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        scale = self.reward_scale.state_dict()
        return {"counts": self.counts, "sums": self.sums, "reward_scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
        self.reward_scale.load_state_dict(state["reward_scale"])


class Thompson(GaussianBandit):
    """Thompson sampling: choose each bin with its posterior probability of being best (1933).

    Args:
        discount: see `GaussianBandit`.
        prior: see `GaussianBandit`.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        discount: float = 0.99,
        prior: float = 1.0,
    ) -> None:
        super().__init__(bins, discount, prior)

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        return torch.multinomial(self._best(), len(context), True, generator=generator)

    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        return self._best().float().expand(len(context), -1)

    def _best(self) -> Tensor:
        """The probability (K,) that each bin is the best: the integral of p_k prod_j!=k F_j."""
        mean, deviation = self.posterior()
        low, high = (mean - 8 * deviation).max(), (mean + 8 * deviation).max()
        edges = torch.linspace(low.item(), high.item(), 2001, dtype=torch.float64)[:, None]
        below = torch.special.ndtr((edges - mean) / deviation)
        log_below = torch.special.log_ndtr(((edges[1:] + edges[:-1]) / 2 - mean) / deviation)
        others_below = (log_below.sum(dim=1, keepdim=True) - log_below).exp()
        best: Tensor = (below.diff(dim=0) * others_below).sum(dim=0)
        return best / best.sum()


class UCB(GaussianBandit):
    """Upper confidence bounds (Auer et al. 2002), for a batch of choices per step.

    A step's images choose before any of them is rewarded. As in GP-BUCB (Desautels et al. 2014) a
    choice narrows its bin's bound as if it earned the bin's mean, and the step's choices are
    distributed so that the bounds of all chosen bins become equal. Each image draws from these
    shares.

    Args:
        exploration: distance of the bound above the mean, in standard deviations.
        discount: see `GaussianBandit`.
        prior: see `GaussianBandit`.
    """

    def __init__(
        self,
        context_size: int,
        bins: int,
        batch: int,
        seed: int,
        *,
        exploration: float = 2.0,
        discount: float = 0.99,
        prior: float = 1.0,
    ) -> None:
        check_range("exploration", exploration, least=1e-3, most=1e3)
        super().__init__(bins, discount, prior)
        self.batch, self.exploration = batch, exploration

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """See `TimestepPolicy.act`."""
        return torch.multinomial(self._shares(), len(context), True, generator=generator)

    def probabilities(self, context: Tensor) -> Tensor:
        """See `TimestepPolicy.probabilities`."""
        return self._shares().float().expand(len(context), -1)

    def _shares(self) -> Tensor:
        """Shares (K,) of the bins among the next `batch` choices, by bisecting the common bound."""
        mean, deviation = self.posterior()
        low, high = mean.max(), (mean + self.exploration * deviation).max()
        choices = torch.ones_like(mean)
        for _ in range(50):
            bound = (low + high) / 2
            # A bin reaches the bound at this precision; it already has part of it
            wanted = (self.exploration / (bound - mean)).square() - deviation.pow(-2)
            choices = wanted.clamp(min=0)
            low, high = (bound, high) if choices.sum() > self.batch else (low, bound)
        return choices / choices.sum()
