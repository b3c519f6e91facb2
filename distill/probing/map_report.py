"""The map of layers and timesteps as figures: best cell, head-room, effective rank, tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.probing.head_room import HeadRoom, head_room, written
from distill.probing.layer_map import ProbeResult
from teachers.noise import NoiseSchedule

Column = dict[str, ProbeResult]


class LayerMap:
    """The results of `layer_map.measure` at every timestep, with those for random weights.

    Args:
        trained: Columns of every seed (S) and timestep (K).
        random: Columns of the control, with random weights.
        timesteps: (K,) int64.
        schedule: What they index.
        contexts: (N, D), what a policy may see of each val image.
        metric: What the score is called.

    Attributes:
        layers: L names.
        score, random_score: (L, K) in [0, 1], means over the seeds.
        rank, random_rank: (L, K) effective rank, means over the seeds.
        best: Row and column of the best score.
        rooms: The head-room of every layer.
    """

    def __init__(
        self,
        trained: Sequence[Sequence[Column]],
        random: Sequence[Sequence[Column]],
        timesteps: Tensor,
        schedule: NoiseSchedule,
        contexts: Tensor,
        metric: str,
    ) -> None:
        self.layers, self.timesteps, self.metric = list(trained[0][0]), timesteps, metric
        self.noise_fraction = schedule.noise_fraction(timesteps)
        self.log_snr = schedule.log_snr(timesteps)
        self.scores = self._table(trained, "score")  # (S, L, K)
        self.score, self.random_score = self.scores.mean(0), self._mean(random, "score")
        self.rank = self._mean(trained, "effective_rank")
        self.random_rank = self._mean(random, "effective_rank")
        self.held_loss = self._mean(trained, "held_loss")
        self.best = divmod(int(self.score.argmax()), len(timesteps))
        self.contexts, self._trained = contexts, trained
        self.rooms: dict[str, HeadRoom] = {
            layer: head_room(self.rewards(layer), self.held_loss[row], contexts)
            for row, layer in enumerate(self.layers)
        }

    def _table(self, columns: Sequence[Sequence[Column]], field: str) -> Tensor:
        values = [
            [[getattr(column[layer], field) for column in seed] for layer in self.layers]
            for seed in columns
        ]
        return torch.tensor(values, dtype=torch.float64)

    def _mean(self, columns: Sequence[Sequence[Column]], field: str) -> Tensor:
        return self._table(columns, field).mean(0)

    def rewards(self, layer: str) -> Tensor:
        """Rewards by draw and seed, image and timestep: (S * R, N, K)."""
        return torch.cat(
            [torch.stack([x[layer].rewards for x in seed], dim=2) for seed in self._trained]
        )

    @property
    def best_layer(self) -> str:
        return self.layers[self.best[0]]

    @property
    def best_timestep(self) -> int:
        return int(self.timesteps[self.best[1]])

    @property
    def rewarded_timestep(self) -> int:
        """The one of the largest mean reward in the best layer, which the policy `grid` takes."""
        return int(self.timesteps[self.best_rewards[0].mean(0).argmax()])

    @property
    def best_rewards(self) -> tuple[Tensor, Tensor]:
        """Rewards (M, K) of the images with one in the best layer, and which images, (N,) bool."""
        rewards = self.rewards(self.best_layer).mean(0)
        known = ~rewards.isnan().any(1)
        return rewards[known], known

    def figures(self) -> dict[str, Any]:
        """All of it as plain lists, for JSON; tables are layers x timesteps."""
        row, column = self.best
        return {
            "metric": self.metric,
            "layers": self.layers,
            "timesteps": self.timesteps.tolist(),
            "noise_fraction": self.noise_fraction.tolist(),
            "log_snr": [x if math.isfinite(x) else None for x in self.log_snr.tolist()],
            "best": {
                "layer": self.best_layer,
                "timestep": self.best_timestep,
                "noise_fraction": self.noise_fraction[column].item(),
                "score": self.score[row, column].item(),
                "random": self.random_score[row, column].item(),
                "rewarded_timestep": self.rewarded_timestep,
            },
            "score": self.score.tolist(),
            "score_by_seed": self.scores.tolist(),
            "random": self.random_score.tolist(),
            "effective_rank": self.rank.tolist(),
            "random_effective_rank": self.random_rank.tolist(),
            "held_loss": self.held_loss.tolist(),
            "head_room": {
                layer: {
                    "images": room.images,
                    "fixed_timestep": int(self.timesteps[room.fixed]),
                    **{name: list(estimate) for name, estimate in room.estimates.items()},
                }
                for layer, room in self.rooms.items()
            },
        }

    def csv(self) -> str:
        """A line for each layer and timestep."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ("layer", "timestep", "noise_fraction", "log_snr", "score", "random", "effective_rank")
        )
        for row, layer in enumerate(self.layers):
            for column, timestep in enumerate(self.timesteps.tolist()):
                values = (
                    self.noise_fraction[column],
                    self.log_snr[column],
                    self.score[row, column],
                    self.random_score[row, column],
                    self.rank[row, column],
                )
                writer.writerow((layer, timestep, *(f"{value.item():.6g}" for value in values)))
        return text.getvalue()

    def text(self) -> str:
        """Text for the terminal: the map in points, the best cell, and its layer's head-room."""
        width = max(len(layer) for layer in [*self.layers, "noise fraction"])
        lines = [
            f"{self.metric} of a linear probe, in points",
            f"{'timestep':{width}} " + " ".join(f"{t:5}" for t in self.timesteps.tolist()),
            f"{'noise fraction':{width}} "
            + " ".join(f"{x:5.2f}" for x in self.noise_fraction.tolist()),
        ]
        for layer, scores in zip(self.layers, (100 * self.score).tolist(), strict=True):
            lines.append(f"{layer:{width}} " + " ".join(f"{score:5.1f}" for score in scores))
        row, column = self.best
        room = self.rooms[self.best_layer]
        lines += [
            "",
            f"best: {self.best_layer} at t={self.best_timestep}, "
            f"{100 * self.score[row, column]:.1f}; "
            f"random weights there {100 * self.random_score[row, column]:.1f}, "
            f"their best {100 * self.random_score.max():.1f}",
        ]
        if self.rewarded_timestep != self.best_timestep:
            lines.append(
                f"the mean reward is largest at t={self.rewarded_timestep}, which the policy "
                "`grid` takes"
            )
        lines.append(
            f"head-room of {self.best_layer}, minus the cross-entropy in nats, mean of "
            f"{room.images} images (95%):"
        )
        meanings = {
            "uniform": "every t alike",
            "fixed": f"t={int(self.timesteps[room.fixed])} for all, chosen on the training images",
            "constant": "the best t for all, chosen by the rewards of other images here",
            "learnt": "by a linear rule on the 8x8 image, from other images",
            "honest": "best t of each image, chosen on other draws of the noise; needs the label",
            "oracle": "best t of each image and draw",
            "chance": "oracle over honest: noise that the oracle takes for a gain",
            "learnt_gain": "over constant: what choosing by image brings, at least",
            "honest_gain": "over constant: the same, at most (up to the noise of its choice)",
        }
        figures = written(room.estimates[name] for name in meanings)
        lines += [
            f"  {name:11} {figure}  {meaning}"
            for (name, meaning), figure in zip(meanings.items(), figures, strict=True)
        ]
        return "\n".join(lines)
