"""What a finished run says: summary.json, two pictures, and the table on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill import checkpoint, plots
from distill.benchmarks import Benchmark
from distill.config import RunConfig
from distill.export import usage
from distill.tracking import commit, read_metrics
from distill.train import checkpoint_path
from rl_policy.summary import policy_summary


def summarise(config: RunConfig, folder: Path, benchmark: Benchmark) -> dict[str, Any]:
    """Write summary.json, curves.png and policy.png from what the arms left in the folder."""
    results = {
        arm: json.loads((folder / "checkpoints" / arm / "result.json").read_text())
        for arm in config.train.arms
    }
    rows = read_metrics(folder)
    plots.curves(folder / "curves.png", rows)
    first = "distilled" if "distilled" in results else next(iter(results))
    summary = {
        "name": config.name,
        "task": benchmark.task,
        "benchmark": benchmark.name,
        "split": config.evaluate.split,
        "metrics": {arm: result["scores"] for arm, result in results.items()},
        "policy": _policy_figures(config, folder, rows),
        "images_per_second": results[first]["images_per_second"],
        "wall_seconds": sum(result["seconds"] for result in results.values()),
        "student": str(folder / "student"),
        "seed": config.seed,
        "commit": commit(),
        "hardware": results[first]["hardware"],
        "date": time.strftime("%Y-%m-%d"),
    }
    checkpoint.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _policy_figures(
    config: RunConfig, folder: Path, rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """What the distilled arm's policy preferred over the last tenth of its steps; policy.png."""
    taught = [row for row in rows if "probabilities" in row]
    if not taught:
        return None
    arm = "distilled" if "distilled" in config.train.arms else taught[0]["arm"]
    taught = [row for row in taught if row["arm"] == arm]
    bins = json.loads((checkpoint_path(folder, arm).with_name("result.json")).read_text())["policy"]
    history = torch.tensor([row["probabilities"] for row in taught])  # (S, K)
    plots.policy(
        folder / "policy.png",
        steps=[row["step"] for row in taught],
        history=history.numpy(),
        timesteps=bins["timesteps"],
        noise_fraction=bins["noise_fraction"],
    )
    late = policy_summary(history[-max(1, len(history) // 10) :])
    return {
        "name": config.policy.name,
        **bins,
        "probabilities": late.mean.tolist(),
        "entropy": late.entropy,
        "effective_arms": late.effective_arms,
        "mean_reward": taught[-1]["policy/reward"],
    }


def report(summary: Mapping[str, Any]) -> str:
    """A summary as a table for the terminal."""
    metric = "top1" if summary["task"] == "classification" else "miou"
    title = {"top1": "top-1", "miou": "mIoU"}[metric]
    scores = {arm: scores[metric] for arm, scores in summary["metrics"].items()}
    rows = [(f"{title} {arm.replace('_', ' ')}", f"{100 * x:.1f}") for arm, x in scores.items()]
    if {"distilled", "scratch"} <= scores.keys():
        gain = 100 * (scores["distilled"] - scores["scratch"])
        rows.append(("gain over scratch", f"{gain:+.1f} points"))
    if policy := summary["policy"]:
        best = sorted(zip(policy["probabilities"], policy["timesteps"], strict=True), reverse=True)
        preferred = ", ".join(f"t={t} ({p:.0%})" for p, t in best[:3])
        arms = f"{policy['effective_arms']:.1f} effective of {len(best)}"
        rows.append(("preferred timesteps", f"{preferred}; {arms} ({policy['name']})"))
    rows.append(("time", f"{summary['wall_seconds']:.0f} s, {summary['hardware']}"))
    rows.append(("student", summary["student"]))
    width = max(len(name) for name, _ in rows)
    head = f"{summary['name']}: {summary['benchmark']} {summary['split']}, seed {summary['seed']}"
    lines = [head, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join([*lines, "", usage(summary["student"])])
