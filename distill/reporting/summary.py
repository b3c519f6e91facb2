"""The summary of a finished run: summary.json, two pictures, and a table on the terminal."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distill import checkpoint
from distill.benchmarks import Benchmark
from distill.config import Arm, RunConfig
from distill.deployment.folder import usage
from distill.drawing import plots
from distill.intervals import Interval
from distill.metrics import TITLES, in_points, more_is_better
from distill.run_folder import read_metrics
from distill.studies.comparison import (
    Group,
    arm_label,
    compare_groups,
    figures,
    main_arm,
    taught_arm,
)
from distill.studies.records import METRICS, read_result
from rl_policy.summary import policy_summary

EVEN = 0.98  # this share of the timesteps is effective: a fifth above chance stays within it


def summarise(config: RunConfig, folder: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Write summary.json, curves.png and policy.png from what the arms left in the folder."""
    results: dict[Arm, dict[str, Any]] = {
        arm: read_result(folder / "checkpoints" / arm / "result.json") for arm in config.train.arms
    }
    rows = read_metrics(folder)
    plots.curves(folder / "curves.png", rows)
    main, taught = main_arm(config.train.arms), taught_arm(results)
    summary = {
        "name": config.name,
        "task": benchmark.task,
        "benchmark": benchmark.name,
        "split": config.evaluate.split,
        "metrics": {arm: result["scores"] for arm, result in results.items()},
        "policy": None,
        "noise_floor": None,
        "images_per_second": results[main]["images_per_second"],
        "wall_seconds": sum(result["seconds"] for result in results.values()),
        "student": str(folder / "student"),
        "seed": config.seed,
        **{key: results[main][key] for key in ("commit", "hardware", "date")},
    }
    if taught is not None:
        logged = [row for row in rows if row["arm"] == taught and "probabilities" in row]
        summary["policy"] = _policy_figures(config, folder, logged, results[taught]["policy"])
        summary["noise_floor"] = results[taught]["noise_floor"]
    checkpoint.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _policy_figures(
    config: RunConfig, folder: Path, rows: list[dict[str, Any]], bins: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The policy's mean preference over the last tenth of its logged rows; writes policy.png."""
    if not rows:
        return None
    history = torch.tensor([row["probabilities"] for row in rows])  # (S, K)
    plots.policy(
        folder / "policy.png",
        steps=[row["step"] for row in rows],
        history=history.numpy(),
        timesteps=bins["timesteps"],
        noise_fraction=bins["noise_fraction"],
    )
    last = rows[-max(1, len(rows) // 10) :]
    late = policy_summary(history[-len(last) :])
    rewards = [row["policy/reward"] for row in last if "policy/reward" in row]
    return {
        "name": config.policy.name,
        **bins,
        "probabilities": late.mean.tolist(),
        "entropy": late.entropy,
        "effective_arms": late.effective_arms,
        "mean_reward": statistics.fmean(rewards) if rewards else None,
    }


def is_even(probabilities: Sequence[float]) -> bool:
    """Whether no timestep is preferred: their effective number, exp(entropy), is near all K."""
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    return len(probabilities) > 1 and math.exp(entropy) >= EVEN * len(probabilities)


def preferred(late: Mapping[str, Any]) -> str:
    """The timesteps that a policy preferred in the end, `late` as in `summary.json`; or `none`."""
    if is_even(late["probabilities"]):
        return "none"
    best = sorted(zip(late["probabilities"], late["timesteps"], strict=True), reverse=True)[:3]
    return ", ".join(f"t={t} ({share:.0%})" for share, t in best if share >= 0.005)


def report(summary: Mapping[str, Any]) -> str:
    """A summary as a table for the terminal."""
    metric = METRICS[summary["task"]]
    title = TITLES[metric]
    scores = {arm: scores[metric] for arm, scores in summary["metrics"].items()}
    rows = [(f"{title} {arm_label(arm)}", f"{100 * x:.1f}") for arm, x in scores.items()]
    if {"distilled", "scratch"} <= scores.keys():
        gain = 100 * (
            more_is_better(metric, scores["distilled"]) - more_is_better(metric, scores["scratch"])
        )
        rows.append(("gain over scratch", f"{gain:+.1f} points"))
    if policy := summary["policy"]:
        arms = f"{policy['effective_arms']:.1f} effective of {len(policy['timesteps'])}"
        rows.append(("preferred timesteps", f"{preferred(policy)}; {arms} ({policy['name']})"))
    if floor := (summary["noise_floor"] or {}).get("mean"):
        least = ", ".join(f"{value:.2f} ({pair})" for pair, value in floor.items())
        rows.append(("target-noise floor", f"mse of at least {least}"))
    rows.append(("time", f"{summary['wall_seconds']:.0f} s, {summary['hardware']}"))
    rows.append(("student", summary["student"]))
    width = max(len(name) for name, _ in rows)
    head = f"{summary['name']}: {summary['benchmark']} {summary['split']}, seed {summary['seed']}"
    lines = [head, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join([*lines, "", usage(summary["student"])])


def compare(groups: Sequence[Group], out: str | None = None) -> str:
    """Runs of one recipe with different seeds, arm by arm and paired; or several such recipes.

    Args:
        groups: What `group_runs` gives.
        out: A JSON file for the figures.

    Returns:
        The table to print: means with 95% intervals, and differences to scratch, and to the first
        recipe, seed by seed.
    """
    several = len(groups) > 1
    result = compare_groups(groups) if several else figures(groups[0], groups)
    if out is not None:
        checkpoint.write_text(out, json.dumps(result, indent=2) + "\n")
    return "\n".join(_several(result["groups"]) if several else _one(result))


def _one(result: Mapping[str, Any]) -> list[str]:
    """The table of one recipe."""
    return [
        _heading(result),
        "",
        "| arm | each seed | mean | gain over scratch, paired |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in _rows(result)),
    ]


def _several(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of all recipes."""
    lines = [
        _heading({**results[0], "seeds": sorted({s for of in results for s in of["seeds"]})}),
        "",
        "| recipe | arm | each seed | mean | gain over scratch, paired | to the first, paired |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for row, of in zip(_rows(result), result["arms"].values(), strict=True):
            to_first = _text(of.get("difference_to_first"))
            lines.append(f"| {' | '.join([result['label'], *row, to_first])} |")
    return lines


def _heading(result: Mapping[str, Any]) -> str:
    return (
        f"{result['metric']} {in_points(result['metric'])} on {result['benchmark']} "
        f"{result['split']}, seeds "
        f"{', '.join(map(str, result['seeds']))}: mean (95% confidence interval)"
    )


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Arm, each seed, mean, gain over scratch."""
    return [
        [
            arm_label(arm),
            ", ".join(f"{100 * value:.1f}" for value in row["values"]),
            _text(row[result["metric"]]),
            _text(row.get("gain_over_scratch")),
        ]
        for arm, row in result["arms"].items()
    ]


def _text(of: Mapping[str, float] | None) -> str:
    return "" if of is None else str(Interval(**of))
