"""Build the policy, its timesteps and the reward heads from a recipe's policy section."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distill import checkpoint
from distill.benchmarks import Benchmark, notice
from distill.config import RunConfig
from distill.errors import UserError, blame, nearest
from distill.matching.targets import check_probabilities
from distill.registry import TABLES, lacks, resolve
from distill.tasks import traits
from rl_policy.bins import timestep_bins
from rl_policy.label_free import LabelFreeReward
from rl_policy.options import OptionError, create
from rl_policy.progress import WithProgress
from rl_policy.protocol import MixingPolicy, TimestepPolicy
from rl_policy.reward import TeacherTaskReward
from students.student import Student
from teachers.protocol import Teacher


def reward_layer(config: RunConfig) -> str:
    """The teacher layer whose feature the reward head reads."""
    return config.policy.reward_layer or config.pairs[0].teacher


def build_rewards(
    config: RunConfig, benchmark: Benchmark, student: Student, teacher: Teacher
) -> tuple[TeacherTaskReward | None, LabelFreeReward | None]:
    """Build the trained parts of `policy.rewards`: the reward heads on labels and on clusters."""
    check_rewards(config)
    channels, bins = teacher.channels[reward_layer(config)], config.policy.bins
    head = config.policy.reward_head
    reward_head = label_free = None
    if "teacher_task" in config.policy.rewards:
        task = traits(benchmark)
        reward_head = TeacherTaskReward(
            channels,
            bins,
            benchmark.num_classes * (1 if task.classes else 2),  # landmarks have x and y
            dense=task.dense and task.classes,
            hidden=head.hidden,
            conditioned=head.conditioned and not mixes(config),
            layers=head.layers,
            standardised=head.standardised,
            beyond_bin=head.beyond_bin and task.classes,
        )
    if "label_free" in config.policy.rewards:
        seen, clusters = student.channels[student.layers[-1]], config.policy.label_free.clusters
        label_free = LabelFreeReward(channels, seen, bins, clusters)
    return reward_head, label_free


def mixes(config: RunConfig) -> bool:
    """Whether the policy mixes the features of all timesteps (`MixingPolicy`)."""
    return hasattr(resolve("policies", config.policy.name, "policy.name"), "mix")


def check_rewards(config: RunConfig) -> None:
    """Check that the rewards exist, and that they are meaningful in this recipe."""
    for name in config.policy.rewards:
        if name not in TABLES["rewards"]:
            near = nearest(name, TABLES["rewards"])
            raise UserError(f"policy.rewards: unknown name {name!r}; {near}")
    if mixes(config) and list(config.policy.rewards) != ["teacher_task"]:
        raise UserError(
            f"policy.rewards: {config.policy.name} learns from the loss of teacher_task's reward "
            "head; leave policy.rewards out"
        )
    staged = config.train.schedule == "distill_then_finetune"
    if staged and "student_progress" in config.policy.rewards:
        raise UserError(
            "policy.rewards: student_progress needs a task loss, which the distillation stage of "
            "train.schedule=distill_then_finetune does not have; set train.schedule=joint"
        )


def build_policy(
    config: RunConfig, teacher: Teacher, context_size: int, *, unlabelled: bool
) -> tuple[TimestepPolicy | MixingPolicy, Tensor]:
    """Build the policy and the timesteps (K,) int64 of its bins.

    A teacher with a single timestep gets one bin, whatever the recipe's `bins` and `spacing` are.

    Args:
        config: The recipe.
        teacher: The teacher, with its schedule.
        context_size: D, the size of the policy's context.
        unlabelled: Whether there are unlabelled images.
    """
    policy, schedule = config.policy, teacher.noise_schedule
    single = len(schedule) == 1
    if single and policy.name != "fixed":
        raise UserError(
            f"policy.name: {policy.name!r} chooses timesteps, but teacher {teacher.name!r} has "
            "none; use policy.name=fixed"
        )
    with blame("policy"):
        timesteps = timestep_bins(
            schedule.log_snr(torch.arange(len(schedule))),
            count=1 if single else policy.bins,
            spacing="linear" if single else policy.spacing,
            lowest=policy.lowest,
            highest=policy.highest,
        )
    built = policy_over(config, timesteps, context_size, unlabelled=unlabelled)
    if policy.name == "grid":
        _tell_of_another_teacher(str(policy.options["table"]), teacher)
    return built, timesteps


def _tell_of_another_teacher(table: str, teacher: Teacher) -> None:
    """Warn on stderr if the probe that made a table was of another teacher."""
    probe = Path(table).with_name("probe.json")
    if not probe.is_file():
        return
    probed = checkpoint.read_json(probe).get("settings", {}).get("teacher (fingerprint)")
    if probed not in (None, teacher.fingerprint):
        notice(
            f"policy.options.table: {table} was recorded with another teacher than {teacher.name}; "
            "its timesteps may mean other noise levels there, and others may be best"
        )


def policy_over(
    config: RunConfig, timesteps: Tensor, context_size: int, *, unlabelled: bool
) -> TimestepPolicy | MixingPolicy:
    """Build a new policy for given timesteps (K,) int64; other arguments as in `build_policy`."""
    policy = config.policy
    rewarded = config.train.batch
    if unlabelled and "label_free" in policy.rewards:
        rewarded += config.train.unlabelled_batch
    factory = resolve("policies", policy.name, "policy.name")
    only_image = policy.context == "image" and not policy.progress
    with blame("policy"):
        try:
            built: TimestepPolicy | MixingPolicy = create(
                factory,
                context_size + policy.progress,
                timesteps,
                rewarded,
                config.seed,
                policy.options,
                policy.image_size if only_image else None,
            )
        except OptionError as error:
            raise UserError(f"policy.options.{error}") from error
    if isinstance(built, MixingPolicy) and not mixes(config):
        raise UserError(f"policy.name: {policy.name} mixes timesteps; name its class, MODULE:CLASS")
    if (lacking := lacks(built, TimestepPolicy)) and not isinstance(built, MixingPolicy):
        raise UserError(
            f"policy.name: {policy.name} is not a policy: it has no {lacking} "
            "(rl_policy/protocol.py)"
        )
    with blame(f"policy.name: {policy.name}"):
        seen = torch.zeros(1, context_size + policy.progress)
        check_probabilities(built, seen, len(timesteps))
    if not policy.progress:
        return built
    if isinstance(built, MixingPolicy):
        raise UserError(f"policy.progress: {policy.name} has one mixture for all contexts")
    return WithProgress(built)
