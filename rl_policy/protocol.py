"""What the training loop asks of a timestep policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor


@runtime_checkable
class TimestepPolicy(Protocol):
    """A contextual bandit over K timestep bins, on the CPU.

    A policy is built as `Policy(context_size, bins, batch, seed, **options)`: contexts have
    `context_size` = D numbers, there are `bins` = K choices, `learn` receives `batch` rewards a
    step (all processes together), and `options` are the recipe's own for this policy, its keywords;
    one out of range raises ValueError. One that has a keyword `timesteps` is also told
    what its bins stand for, (K,) int64; one that has a keyword `image_size` the side S in px of the
    images that contexts are, (3, S, S) in [0, 1] flattened, or None if they are something else.

    Given the seed, the generators and the calls, everything a policy does is determined. Several
    processes that each call `learn` with the same gathered transitions therefore stay identical.
    `progress`, the share that is done of the steps in which the policy acts, lies in [0, 1].
    """

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """Choose a bin an image: context (B, D) float32, any B -> (B,) int64 in 0..K-1.

        Changes nothing that `learn` depends on; `generator` is the only randomness.
        """
        ...

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """Learn from the step's rewards, and return finite figures to log (none is fine).

        context (batch, D) float32 and bins (batch,) int64 as in this step's `act`; rewards
        (batch,) float32 on any scale: the policies that need it standardise them themselves.
        """
        ...

    def probabilities(self, context: Tensor) -> Tensor:
        """The distribution that `act` draws from: context (B, D) -> (B, K) float32."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as tensors, numbers and plain containers of them, to be saved at once.

        It passes `torch.load(weights_only=True)`. The tensors may be the policy's own: copy what
        must outlast the next `learn`.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the policy that gave `state` was."""
        ...


@runtime_checkable
class MixingPolicy(Protocol):
    """A policy that chooses no bin: the target is the mixture of the features at all of them.

    Everything else is as of `TimestepPolicy`. The teacher looks K times at every image. The weights
    get their gradient through the loss of the reward head on the mixed feature, and from nothing
    else; that head is not told the bin.
    """

    def mix(self, context: Tensor, progress: float) -> Tensor:
        """Weights of the bins: context (B, D) float32 -> (B, K) float32, rows that sum to 1."""
        ...

    def learn(
        self, context: Tensor, weights: Tensor, gradients: Tensor, progress: float
    ) -> dict[str, float]:
        """Go against the gradients, and return finite figures to log (none is fine).

        context (N, D) and weights (N, K) of the labelled images as in this step's `mix`; gradients
        (N, K) float32, of each image's loss of the reward head by its weights.
        """
        ...

    def probabilities(self, context: Tensor) -> Tensor:
        """The weights, to be shown: context (B, D) -> (B, K) float32."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
