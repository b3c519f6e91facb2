"""From what a step's choices earned to what the policy learns, the same in every process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.matching.distiller import Losses
from distill.training.deferred import AsyncCopy
from rl_policy.baseline import ImageBaseline
from rl_policy.protocol import MixingPolicy, TimestepPolicy
from rl_policy.reward import WeightedRewards, student_progress

Gather = Callable[[Tensor], Tensor]
"""Rows of this process (N, ...) -> those of all, rank after rank."""


PROGRESS = "student_progress"


class Rows:
    """Columns of numbers, a row an image, gathered from the parts of a step and all processes.

    They are copied to the CPU while the device goes on; `take` waits for no more than that.
    """

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        self._parts: list[AsyncCopy] = []
        self._widths: list[int] = []

    def add(self, *columns: Tensor) -> None:
        """Take in one part: columns (N, W) each."""
        self._widths = [column.shape[1] for column in columns]
        joined = torch.cat([column.float() for column in columns], dim=1)
        self._parts.append(AsyncCopy(self._gather(joined)))

    def take(self) -> tuple[Tensor, ...]:
        """The columns of all parts, (N, W) float32 each on the CPU; none are left."""
        rows = torch.cat([part.read() for part in self._parts])
        self._parts = []
        return torch.split(rows, self._widths, dim=1)


class Feedback:
    """What the images of a step earned, collected part by part; then the policy learns once.

    Every process learns the same from the rewards of all: their policies stay identical.

    Args:
        policy: The policy that learns from the rewards.
        weights: Of each reward, by name.
        gather: Over the processes.
        images: How many labelled images there are, each with its own baseline (`ImageBaseline`);
            None for rewards as they come. A mixture has no use for one.

    Attributes:
        figures: Of the last step, to be logged: `reward`, the weighted sum of the rewards' means
            before they are standardised, where there are several each mean, `reward/NAME`, and
            what the policy tells of its learning, `learn/NAME`.
    """

    def __init__(
        self,
        policy: TimestepPolicy | MixingPolicy,
        weights: Mapping[str, float],
        gather: Gather,
        images: int | None = None,
    ) -> None:
        self.policy, self.rewards = policy, WeightedRewards(weights)
        self.baseline = None if images is None else ImageBaseline(images)
        self.figures: dict[str, float] = {}
        self._rows, self._progress = Rows(gather), Rows(gather)

    def add(self, losses: Losses, positions: Tensor | None, labelled: int, *mixed: Tensor) -> None:
        """The choices of a part of the step, and what is known by now of what they earned.

        Args:
            losses: Of that part.
            positions: (labelled,) int64, which of all labelled images these are; None: not known.
            labelled: How many of its images have labels; the first ones.
            *mixed: Of a mixture the weights (B, K), and the gradients (B, K) of each image's loss.
        """
        later = losses.context.new_zeros(labelled)  # of `watching`
        rewards = [losses.rewards.get(name, later) for name in self.rewards.weights]
        count = max(map(len, rewards))
        image = torch.arange(count, device=losses.context.device)
        earned = [F.pad(reward, (0, count - len(reward))) for reward in rewards]
        known = [image < len(reward) for reward in rewards]
        owners = image.new_full((labelled,), -1) if positions is None else positions
        chosen = mixed or (losses.bins[:, None],)
        self._rows.add(
            torch.stack(earned, dim=1),
            torch.stack(known, dim=1),
            F.pad(owners, (0, count - labelled), value=-1)[:, None],
            *(x[:count] for x in (losses.context, *chosen)),
        )

    @contextmanager
    def watching(self, measure: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
        """Around the update of the student: how much it progresses, if that is a reward.

        Args:
            measure: The task losses (labelled,) of every part, with the weights of the moment.
        """
        if PROGRESS not in self.rewards.weights:
            yield
            return
        losses = measure()
        yield
        for before, after in zip(losses, measure(), strict=True):
            self._progress.add(student_progress(before, after)[:, None])

    def learn(self, progress: float) -> bool:
        """Let the policy learn from what was added. False if some of it is not finite."""
        earned, flags, positions, context, *chosen = self._rows.take()
        known = flags.bool()
        names = list(self.rewards.weights)
        if PROGRESS in names:
            column = names.index(PROGRESS)
            earned[known[:, column], column] = self._progress.take()[0][:, 0]
        if not all(bool(x.isfinite().all()) for x in (earned, context, *chosen)):
            return False
        means = {name: earned[known[:, i], i].mean().item() for i, name in enumerate(names)}
        self.figures = {"reward": sum(self.rewards.weights[name] * means[name] for name in names)}
        if len(names) > 1:
            self.figures |= {f"reward/{name}": mean for name, mean in means.items()}
        rewards = self.rewards(earned, known)
        if isinstance(self.policy, MixingPolicy):
            weights, gradients = chosen
            learnt = self.policy.learn(context, weights, gradients, progress)
        else:
            if self.baseline is not None:
                rewards = self.baseline(positions[:, 0].long(), rewards)
            learnt = self.policy.learn(context, chosen[0][:, 0].long(), rewards, progress)
        self.figures |= {
            f"learn/{name}": value for name, value in (learnt or {}).items() if math.isfinite(value)
        }
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, at the end of a step."""
        baseline = {} if self.baseline is None else self.baseline.state_dict()
        return {"rewards": self.rewards.state_dict(), "baseline": baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where that was."""
        self.rewards.load_state_dict(state["rewards"])
        if self.baseline is not None:
            self.baseline.load_state_dict(state["baseline"])
