"""`distill policy fit`: train a policy on a recorded table of rewards, and say what it is worth."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill import checkpoint, seeding
from distill.errors import UserError, blame
from distill.intervals import interval
from distill.matching.distiller import SMALL
from distill.provenance import commit
from distill.recipe import apply_override
from distill.registry import resolve
from rl_policy.baseline import ImageBaseline
from rl_policy.options import create
from rl_policy.protocol import MixingPolicy, TimestepPolicy
from rl_policy.summary import policy_summary
from rl_policy.table import ReplayTable


def fit_policy(
    table: str,
    *,
    policy: str = "a2c",
    options: Sequence[str] = (),
    steps: int = 300,
    batch: int = 64,
    seeds: Sequence[int] = (0,),
    raw: bool = False,
    out: str | None = None,
) -> str:
    """Train a policy on half of a table's images, and compare what it earns on the other half.

    The halves are the same for every seed: a seed changes the policy and what it sees, so that
    means over seeds are means over policies.

    Args:
        table: A file that `ReplayTable.read` reads.
        policy: A name of `distill list policies`, or `module:attribute`.
        options: `name=value`, options of the policy.
        steps: Steps of each training.
        batch: Images per step, drawn with replacement.
        seeds: One training each.
        raw: Use raw rewards; otherwise minus each image's baseline, as in training.
        out: A JSON file for the figures.

    Returns:
        The table to print, a plain sentence at its end.

    Raises:
        UserError: The table or the policy is not usable.
    """
    if steps < 1 or batch < 1:
        raise UserError(f"--steps and --batch: must be at least 1, got {steps} and {batch}")
    if out is not None:
        checkpoint.check_json("--out", Path(out))
    with blame("--table"):
        rewards = ReplayTable.read(table)
    if rewards.images < 4:
        raise UserError(f"--table: {table} has {rewards.images} images; it needs at least 4")
    given: dict[str, Any] = {}
    for option in options:
        apply_override(given, option)
    factory = resolve("policies", policy, "--policy")
    timesteps = np.arange(rewards.bins) if rewards.timesteps is None else rewards.timesteps
    # A probe's table holds small images; their size has a meaning to a convolution alone
    size = SMALL if rewards.context_size == 3 * SMALL * SMALL else None
    training, held_out = halves(rewards)
    began = time.perf_counter()
    fitted = []
    for seed in seeds:
        with blame("--policy"):
            facts = rewards.context_size, torch.from_numpy(timesteps), batch, seed
            built = create(factory, *facts, given, size)
            if isinstance(built, MixingPolicy):
                raise UserError(
                    f"--policy: {policy} mixes the features of all timesteps, but a table has the "
                    "rewards of one at a time; try it with `distill train`"
                )
            train_policy(built, training, steps=steps, batch=batch, seed=seed, raw=raw)
        fitted.append(built.probabilities(torch.from_numpy(held_out.contexts)))
    figures = {
        "table": str(table),
        "policy": policy,
        "options": given,
        "images": {"train": training.images, "held_out": held_out.images},
        "steps": steps,
        "batch": batch,
        "seeds": list(seeds),
        "raw": raw,
        **compare(training, held_out, fitted),
        "seconds_a_step": (time.perf_counter() - began) / steps / len(seeds),
        "commit": commit(),
    }
    if out is not None:
        checkpoint.write_text(out, json.dumps(figures, indent=2) + "\n")
    return show(figures)


def halves(table: ReplayTable) -> tuple[ReplayTable, ReplayTable]:
    """The images to train on, and as many (or one more) to judge by; always the same ones."""
    order = np.random.default_rng(0).permutation(table.images)
    return tuple(  # type: ignore[return-value]
        ReplayTable(
            contexts=table.contexts[part], rewards=table.rewards[part], timesteps=table.timesteps
        )
        for part in (order[: table.images // 2], order[table.images // 2 :])
    )


def train_policy(
    policy: TimestepPolicy,
    table: ReplayTable,
    *,
    steps: int,
    batch: int,
    seed: int,
    raw: bool = False,
) -> None:
    """The trainer's loop with a look-up in place of the teacher."""
    contexts, rewards = torch.from_numpy(table.contexts), torch.from_numpy(table.rewards)
    baseline = None if raw else ImageBaseline(table.images)
    for step in range(steps):
        drawn = seeding.generator(seed, "labelled", step)
        images = torch.randint(table.images, (batch,), generator=drawn)
        seen, progress = contexts[images], step / steps
        bins = policy.act(seen, seeding.generator(seed, "policy", step), progress)
        earned = rewards[images, bins]
        if baseline is not None:
            earned = baseline(images, earned)
        policy.learn(seen, bins, earned, (step + 1) / steps)


def compare(
    training: ReplayTable, held_out: ReplayTable, fitted: Sequence[Tensor]
) -> dict[str, Any]:
    """Mean rewards of policies on the held-out images, beside those of choices without a policy.

    Args:
        training: Half of the images; the best fixed timestep is chosen on it.
        held_out: The other half (M, K).
        fitted: The distributions (M, K) of each seed's policy.

    Returns:
        Mean rewards, regrets, intervals over the held-out images (95%, Student's t, paired), and
        the entropy of the policies. `gap_closed` is None where there is no head-room.
    """
    rewards = held_out.rewards.astype(np.float64)
    # What is less is rounding
    least = 1e-6 * float(rewards.std()) + 1e-12 * float(np.abs(rewards).mean())
    best = int(training.rewards.mean(axis=0, dtype=np.float64).argmax())
    uniform, fixed, oracle = rewards.mean(axis=1), rewards[:, best], rewards.max(axis=1)  # (M,)
    weights = [p.double() / p.double().sum(dim=1, keepdim=True) for p in fitted]  # to float64's 1
    earned = [(p.numpy() * rewards).sum(axis=1) for p in weights]
    mine = np.mean(earned, axis=0)
    # Did each choose as it does on average, whatever the image
    blind = np.mean([rewards @ p.mean(dim=0).numpy() for p in weights], axis=0)
    timesteps = np.arange(held_out.bins) if held_out.timesteps is None else held_out.timesteps
    headroom = _paired(fixed, uniform, least)
    gap = headroom["mean"] if headroom["low"] > 0 else None
    by_seed = []
    for reward, probabilities in zip(earned, fitted, strict=True):
        summary = policy_summary(probabilities)
        by_seed.append(
            {
                "reward": float(reward.mean()),
                "regret_to_best_fixed": float((fixed - reward).mean()),
                "regret_to_oracle": float((oracle - reward).mean()),
                "gap_closed": None if gap is None else float((reward - uniform).mean() / gap),
                "entropy": summary.entropy,
                "effective_arms": summary.effective_arms,
                "image_entropy": summary.image_entropy,
                "probabilities": summary.mean.tolist(),
            }
        )
    names = ("reward", "regret_to_best_fixed", "regret_to_oracle", "entropy", "effective_arms")
    means = {name: float(np.mean([row[name] for row in by_seed])) for name in names}
    closed = None if gap is None else float((mine - uniform).mean() / gap)
    return {
        "timesteps": timesteps.tolist(),
        "uniform": float(uniform.mean()),
        "best_fixed": {
            "timestep": int(timesteps[best]),
            "bin": best,
            "reward": float(fixed.mean()),
        },
        "oracle": float(oracle.mean()),
        "head_room": headroom,
        "mean": {**means, "gap_closed": closed},
        "policy_over_uniform": _paired(mine, uniform, least),
        "policy_over_best_fixed": _paired(mine, fixed, least),
        "policy_over_its_mean": _paired(mine, blind, least),
        "by_seed": by_seed,
    }


def _paired(one: NDArray[np.float64], other: NDArray[np.float64], least: float) -> dict[str, Any]:
    """Mean and interval of the difference of two (M,); a smaller one than `least` counts as 0."""
    differences = one - other
    differences[np.abs(differences) < least] = 0
    return interval(differences.tolist())._asdict()


def decimals(figures: Mapping[str, Any]) -> int:
    """Number of decimals: 4, or more if rounding would hide the whole range of rewards."""
    span = figures["oracle"] - figures["uniform"]
    return max(4, 3 - math.floor(math.log10(span))) if span > 0 else 4


def show(figures: dict[str, Any]) -> str:
    """The figures as a table for the terminal, and what they say in a sentence."""
    digits = decimals(figures)
    mean, best, images = figures["mean"], figures["best_fixed"], figures["images"]
    bins, seeds = len(figures["timesteps"]), figures["seeds"]
    raw = "raw rewards, " if figures["raw"] else ""
    closed = "" if mean["gap_closed"] is None else f", {mean['gap_closed']:.0%} of the gap closed"
    rows = [
        ("uniform", figures["uniform"], ""),
        (f"best fixed, t={best['timestep']}", best["reward"], "chosen on the other half"),
        (
            figures["policy"],
            mean["reward"],
            f"regret {mean['regret_to_best_fixed']:.{digits}f} to the best fixed, "
            f"{mean['regret_to_oracle']:.{digits}f} to the oracle{closed}",
        ),
        ("oracle", figures["oracle"], "the best of every image, chance included"),
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"  {name:<{width}}  {reward:{digits + 5}.{digits}f}  {note}".rstrip()
        for name, reward, note in rows
    ]
    return "\n".join(
        [
            f"{figures['policy']} on {figures['table']}: {images['train']} images to train on, "
            f"{images['held_out']} to judge by, {figures['steps']} steps of {figures['batch']}, "
            f"{raw}seed {', '.join(map(str, seeds))}, "
            f"{1e3 * figures['seconds_a_step']:.1f} ms per step",
            *lines,
            f"  entropy {mean['entropy']:.2f} of {np.log(bins):.2f}, "
            f"{mean['effective_arms']:.1f} effective arms of {bins}",
            verdict(figures),
        ]
    )


def verdict(figures: dict[str, Any]) -> str:
    """One plain sentence: whether there is something to win, and whether the policy wins it."""
    room, gain = figures["head_room"], figures["policy_over_uniform"]
    digits = decimals(figures)

    def signed(of: Mapping[str, float]) -> str:
        low, high = (f"{of[end]:.{digits}f}" for end in ("low", "high"))
        return f"{of['mean']:+.{digits}f} ({low} to {high})"

    over_best = figures["policy_over_best_fixed"]
    t = figures["best_fixed"]["timestep"]
    if len(figures["timesteps"]) == 1:
        return f"with t={t} alone there was nothing to choose"
    worse = f", and is worse than uniform: {signed(gain)}" if gain["high"] < 0 else ""
    if over_best["low"] > 0 and gain["low"] > 0:
        more = f"the policy earns {signed(over_best)} more than the best fixed timestep, t={t}"
        if figures["policy_over_its_mean"]["low"] > 0:
            return f"{more}: which one is best depends on the image"
        return f"{more}, that of the other half of the images; it does not tell images apart"
    if room["low"] <= 0:
        by_image = figures["oracle"] - figures["best_fixed"]["reward"]
        return (
            f"no head-room: the best fixed timestep, t={t}, earns {signed(room)} more than "
            "uniform, which may be chance; the best for each image, chance included, earns "
            f"{by_image:.{digits}f} more; the policy has "
            f"{figures['mean']['effective_arms']:.1f} effective arms of {len(figures['timesteps'])}"
            f"{worse}"
        )
    if gain["low"] <= 0:
        return f"t={t} earns {signed(room)} more than uniform; the policy has not found it{worse}"
    return (
        f"t={t} earns {signed(room)} more than uniform, and the policy closes "
        f"{figures['mean']['gap_closed']:.0%} of that"
    )
