"""The timesteps that a finished run's policy prefers by image, computed from its checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill import checkpoint
from distill.benchmarks import Examples
from distill.build import TrainingSet, build_distiller, build_training_set
from distill.config import RunConfig
from distill.data import Resized, as_float, in_order, spread
from distill.errors import UserError, blame, one_line
from distill.matching.distiller import Distiller
from distill.matching.losses import class_shares
from distill.policies import policy_over
from distill.studies.comparison import FinishedRun
from distill.tasks import traits
from distill.training.loop import checkpoint_path, taught_path
from rl_policy.protocol import MixingPolicy, TimestepPolicy

IMAGES = 500  # asked about at most: enough for means by class, and quick on a CPU


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A policy's distribution over timesteps for each of N images."""

    split: str
    """Description of the images in words."""
    step: int
    """The training step of the student and policy that were asked."""
    examples: Examples
    """The N images, (3, H, W) uint8."""
    shares: Tensor
    """(N, L): share of each class in an image's label; 0 if labels are not classes."""
    class_names: tuple[str, ...]
    probabilities: Tensor
    """(N, K)."""
    timesteps: Tensor
    """(K,) int64."""

    @property
    def expected(self) -> Tensor:
        """(N,): the mean timestep of each image."""
        return self.probabilities @ self.timesteps.float()

    @property
    def by_class(self) -> Tensor:
        """(L, K): mean distribution of the images of a class, each by the share that it has of it;
        NaN for a class that does not occur."""
        return self.shares.T @ self.probabilities / self.shares.sum(dim=0)[:, None]


def load_state(run: FinishedRun, arm: str) -> dict[str, Any]:
    """The checkpoint of an arm when its policy last chose, or else the last one.

    Raises:
        UserError: It is gone.
    """
    taught = taught_path(run.folder, arm)
    path = taught if taught.exists() else checkpoint_path(run.folder, arm)
    return checkpoint.load(path, "policy", "data", "distiller", "step")


def load_policy(
    run: FinishedRun, arm: str, state: dict[str, Any], context_size: int
) -> TimestepPolicy | MixingPolicy:
    """The policy of a checkpoint, without the teacher.

    Raises:
        UserError: It is of another version of this program, or sees other contexts.
    """
    timesteps = torch.tensor(run.results[arm]["policy"]["timesteps"])
    unlabelled = run.config.data.unlabelled != 0
    built = policy_over(run.config, timesteps, context_size, unlabelled=unlabelled)
    try:
        built.load_state_dict(state["policy"])
    except (RuntimeError, ValueError, KeyError) as error:
        line = one_line(error, 200)
        raise UserError(
            f"{checkpoint_path(run.folder, arm)}: its policy cannot be rebuilt: {line}"
        ) from error
    return built


def recall_choices(run: FinishedRun, arm: str, config: RunConfig) -> Choices:
    """Ask the policy about held-out images, as the student saw them when it last chose.

    Args:
        run: A finished run.
        arm: One with a teacher.
        config: The run's recipe, where need be with another `data.root`.

    Returns:
        The distributions for up to `IMAGES` images of the val split, evenly spread; where there is
        none, of the labelled training images.

    Raises:
        UserError: The data cannot be opened or are others, or the checkpoint does not fit.
    """
    data = build_training_set(dataclasses.replace(config.data, augment="none"))
    state = load_state(run, arm)
    if state["data"] != data.fingerprint:
        raise UserError("data.root: these are not the images that the run was trained on")
    split, examples = _examples(data)
    config = dataclasses.replace(
        config, student=dataclasses.replace(config.student, pretrained=False)
    )
    distiller = build_distiller(config, data.benchmark, data.size, None)
    inside = "student."
    weights = {
        name.removeprefix(inside): weight
        for name, weight in state["distiller"].items()
        if name.startswith(inside)
    }
    try:
        distiller.student.load_state_dict(weights)
    except RuntimeError as error:
        line = one_line(error, 200)
        raise UserError(
            f"{checkpoint_path(run.folder, arm)}: has another student: {line}"
        ) from error
    contexts, shares = _look(distiller.eval(), examples, data, config.evaluate.batch)
    policy = load_policy(run, arm, state, distiller.context_size)
    return Choices(
        split=split,
        step=state["step"],
        examples=examples,
        shares=shares,
        class_names=data.benchmark.class_names,
        probabilities=policy.probabilities(contexts),
        timesteps=torch.tensor(run.results[arm]["policy"]["timesteps"]),
    )


def _examples(data: TrainingSet) -> tuple[str, Examples]:
    """Up to `IMAGES` labelled images, of val where there are any."""
    with blame("data"):
        examples, split = data.benchmark.dataset("val"), "validation images"
        indices = list(range(len(examples)))
        if not indices:
            examples, split = data.benchmark.dataset("train"), "labelled training images"
            indices = data.labelled_indices
    chosen = [indices[index] for index in spread(len(indices), IMAGES)]
    resized = Resized(examples, data.size, masks=data.benchmark.task == "segmentation")
    return f"{len(chosen)} {split}", torch.utils.data.Subset(resized, chosen)  # type: ignore[arg-type]


@torch.no_grad()
def _look(
    distiller: Distiller, examples: Examples, data: TrainingSet, batch: int
) -> tuple[Tensor, Tensor]:
    """Contexts (N, D), and shares of the classes (N, L)."""
    contexts, shares = [], []
    for items in in_order(examples, range(len(examples)), batch):
        images = as_float(torch.stack([image for image, _ in items]))
        _, maps = distiller.student(images, labelled=0)
        contexts.append(distiller.contexts(images, maps))
        if not traits(data.benchmark).classes:
            shares.append(torch.zeros(len(items), data.benchmark.num_classes))
            continue
        targets = torch.stack([torch.as_tensor(target).long() for _, target in items])
        shares.append(
            class_shares(targets, data.benchmark.num_classes, data.benchmark.ignore_index)
        )
    return torch.cat(contexts), torch.cat(shares)
