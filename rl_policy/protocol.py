"""The interface of a timestep policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor


@runtime_checkable
class TimestepPolicy(Protocol):
    """A contextual bandit over K timestep bins, on the CPU.

    A policy is built as `Policy(context_size, bins, batch, seed, **options)`: contexts have
    `context_size` = D numbers, there are `bins` = K choices, `learn` receives `batch` rewards per
    step (of all processes together), and `options` are the recipe's options for this policy; one
    out of range raises ValueError. A policy with a keyword `timesteps` also gets the timesteps of
    its bins, (K,) int64; one with a keyword `image_size` gets the side S in px if contexts are
    images, (3, S, S) in [0, 1] flattened, otherwise None.

    The seed, the generators and the calls determine everything a policy does, so processes that
    each call `learn` with the same gathered transitions stay identical. `progress` in [0, 1] is the
    share of the steps in which the policy acts that are done.
    """

    def act(self, context: Tensor, generator: Generator, progress: float) -> Tensor:
        """Choose one bin per image: context (B, D) float32, any B -> (B,) int64 in 0..K-1.

        Changes nothing that `learn` depends on; `generator` is the only randomness.
        """
        ...

    def learn(
        self, context: Tensor, bins: Tensor, rewards: Tensor, progress: float
    ) -> dict[str, float]:
        """Learn from the step's rewards, and return finite figures to log (possibly none).

        context (batch, D) float32 and bins (batch,) int64 as in this step's `act`; rewards
        (batch,) float32 on any scale: policies that need it standardise them themselves.
        """
        ...

    def probabilities(self, context: Tensor) -> Tensor:
        """The distribution that `act` draws from: context (B, D) -> (B, K) float32."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as tensors, numbers and plain containers of them.

        `torch.load(weights_only=True)` can read it. The tensors may be the policy's own: save them
        at once, or copy what must outlast the next `learn`.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the policy that returned `state` was."""
        ...


@runtime_checkable
class MixingPolicy(Protocol):
    """A policy that mixes the features at all bins into the target instead of choosing a bin.

    Otherwise it is like `TimestepPolicy`. The teacher looks K times at every image. The weights get
    their gradient only from the reward head's loss on the mixed feature; that head does not know
    the bin.
    """

    def mix(self, context: Tensor, progress: float) -> Tensor:
        """Weights of the bins: context (B, D) float32 -> (B, K) float32, rows that sum to 1."""
        ...

    def learn(
        self, context: Tensor, weights: Tensor, gradients: Tensor, progress: float
    ) -> dict[str, float]:
        """Descend the gradients, and return finite figures to log (possibly none).

        context (N, D) and weights (N, K) of the labelled images as in this step's `mix`; gradients
        (N, K) float32, of the reward head's loss for each image with respect to its weights.
        """
        ...

    def probabilities(self, context: Tensor) -> Tensor:
        """The weights, for display: context (B, D) -> (B, K) float32."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """See `TimestepPolicy.state_dict`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TimestepPolicy.load_state_dict`."""
        ...
