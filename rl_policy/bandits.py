"""Bandits that know no context: which bin is best for all images together, and how sure that is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from rl_policy.options import check_range
from rl_policy.scaling import RunningScale


class GaussianBandit:
    """What Thompson and UCB share: a Gaussian posterior of the mean reward of each bin.

    Rewards are taken to be normal around their bin's mean, with the variance that rewards have as
    a whole; the prior of the means is normal too, around the mean of all rewards. Sums are kept
    in units of the rewards and standardised where they are read: with the bins all on the scale of
    one moment, a mean that rises as the policy improves favours no bin.

    Args:
        bins: K.
        discount: what past rewards weigh after a step, so that the posterior follows rewards that
            drift (Garivier and Moulines 2011); 1 never forgets.
        prior: deviation of the bins' means before there are rewards, in deviations of a reward.
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
        scale = self.reward_scale.state_dict()
        return {"counts": self.counts, "sums": self.sums, "reward_scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
        self.reward_scale.load_state_dict(state["reward_scale"])


class Thompson(GaussianBandit):
    """Thompson sampling: each bin as often as it is, by the posterior, the best (Thompson 1933).

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
        return torch.multinomial(self._best(), len(context), True, generator=generator)

    def probabilities(self, context: Tensor) -> Tensor:
        return self._best().float().expand(len(context), -1)

    def _best(self) -> Tensor:
        """The probability (K,) of each bin to be the best: the integral of p_k prod_j!=k F_j."""
        mean, deviation = self.posterior()
        low, high = (mean - 8 * deviation).max(), (mean + 8 * deviation).max()
        edges = torch.linspace(low.item(), high.item(), 2001, dtype=torch.float64)[:, None]
        below = torch.special.ndtr((edges - mean) / deviation)
        log_below = torch.special.log_ndtr(((edges[1:] + edges[:-1]) / 2 - mean) / deviation)
        others_below = (log_below.sum(dim=1, keepdim=True) - log_below).exp()
        best: Tensor = (below.diff(dim=0) * others_below).sum(dim=0)
        return best / best.sum()


class UCB(GaussianBandit):
    """Upper confidence bounds (Auer et al. 2002), for many choices between two looks at rewards.

    Images of one step choose before any of them is rewarded. As in GP-BUCB (Desautels et al. 2014)
    a choice narrows its bin's bound as if the reward were the mean it has, and the step's choices
    are shared out so that the bounds of all chosen bins end up equal. Each image draws from those
    shares.

    Args:
        exploration: how many deviations the bound lies above the mean.
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
        return torch.multinomial(self._shares(), len(context), True, generator=generator)

    def probabilities(self, context: Tensor) -> Tensor:
        return self._shares().float().expand(len(context), -1)

    def _shares(self) -> Tensor:
        """Shares (K,) of the bins in the next `batch` choices, by bisection of the common bound."""
        mean, deviation = self.posterior()
        low, high = mean.max(), (mean + self.exploration * deviation).max()
        choices = torch.ones_like(mean)
        for _ in range(50):
            bound = (low + high) / 2
            # A bin reaches the bound with this precision, of which it has some already
            wanted = (self.exploration / (bound - mean)).square() - deviation.pow(-2)
            choices = wanted.clamp(min=0)
            low, high = (bound, high) if choices.sum() > self.batch else (low, bound)
        return choices / choices.sum()
