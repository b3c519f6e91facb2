"""A policy that is shown the progress of training beside its context."""

import copy

import torch
from torch import Generator, Tensor

from rl_policy.progress import WithProgress
from rl_policy.protocol import MixingPolicy, TimestepPolicy
from rl_policy.sb3 import A2CPolicy
from rl_policy.simple import Uniform


class Watched(Uniform):
    """Keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__(3, 4, 2, 0)
        self.shown: list[Tensor] = []

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        self.shown.append(context)
        return super().act(context, generator, progress)

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        self.shown.append(context)
        return super().learn(context, bins, rewards, progress)


def step(policy: TimestepPolicy, at: int, steps: int = 4) -> Tensor:
    generator = Generator().manual_seed(at)
    context = torch.randn(2, 2, generator=generator)
    bins = policy.act(context, generator, at / steps)
    policy.learn(context, bins, bins.float(), (at + 1) / steps)
    return policy.probabilities(context)


def test_a_step_is_chosen_and_learnt_with_the_progress_at_its_start() -> None:
    watched = Watched()
    policy = WithProgress(watched)
    assert isinstance(policy, TimestepPolicy)
    assert not isinstance(policy, MixingPolicy)
    for at in range(3):
        step(policy, at)
    assert [context.shape for context in watched.shown] == [(2, 3)] * 6
    last = torch.stack([context[:, -1] for context in watched.shown])
    assert last.tolist() == [[p, p] for p in (0.0, 0.0, 0.25, 0.25, 0.5, 0.5)]


def test_it_goes_on_to_the_bit_where_it_was() -> None:
    def new() -> WithProgress:
        return WithProgress(A2CPolicy(3, 4, 2, 0))

    policy, resumed = new(), new()
    step(policy, 0)
    resumed.load_state_dict(copy.deepcopy(policy.state_dict()))
    for at in range(1, 4):
        assert torch.equal(step(policy, at), step(resumed, at))


def test_what_it_prefers_moves_with_the_progress() -> None:
    policy = WithProgress(A2CPolicy(3, 4, 2, 0, learning_rate=0.1))
    for at in range(40):
        step(policy, at, 40)
    context = torch.zeros(1, 2)
    late = policy.probabilities(context)
    policy.progress = 0.0
    assert not torch.allclose(policy.probabilities(context), late, atol=1e-3)
