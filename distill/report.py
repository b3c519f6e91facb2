"""What a finished run says: summary.json, two pictures, and the table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats

from distill import checkpoint, plots
from distill.benchmarks import Benchmark
from distill.config import RunConfig
from distill.errors import UserError
from distill.export import usage
from distill.tracking import read_metrics
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
        "noise_floor": results[first].get("noise_floor"),
        "images_per_second": results[first]["images_per_second"],
        "wall_seconds": sum(result["seconds"] for result in results.values()),
        "student": str(folder / "student"),
        "seed": config.seed,
        **{key: results[first][key] for key in ("commit", "hardware", "date")},
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
    if floor := (summary["noise_floor"] or {}).get("mean"):
        shares = ", ".join(f"{value:.2f} ({pair})" for pair, value in floor.items())
        rows.append(("target noise", f"{shares} of a variance of 1"))
    rows.append(("time", f"{summary['wall_seconds']:.0f} s, {summary['hardware']}"))
    rows.append(("student", summary["student"]))
    width = max(len(name) for name, _ in rows)
    head = f"{summary['name']}: {summary['benchmark']} {summary['split']}, seed {summary['seed']}"
    lines = [head, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join([*lines, "", usage(summary["student"])])


class Interval(NamedTuple):
    """A mean over seeds with its 95% confidence interval (Student's t)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def interval(values: Sequence[float]) -> Interval:
    """The mean of two or more values, and how sure it is."""
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return Interval(sum(values) / len(values), float(low), float(high))


def compare(runs: Sequence[str], out: str | None = None) -> str:
    """`distill report`: runs of one recipe with different seeds, arm by arm and paired.

    Args:
        runs: Run folders that are finished, two or more.
        out: A JSON file for the figures.

    Returns:
        The table to print: means with 95% intervals, differences to scratch seed by seed.
    """
    summaries = [_read_summary(Path(run)) for run in runs]
    _check_comparable(summaries, runs)
    metric = "top1" if summaries[0]["task"] == "classification" else "miou"
    seeds = [summary["seed"] for summary in summaries]
    rows: dict[str, Any] = {}
    for arm in summaries[0]["metrics"]:
        values = [summary["metrics"][arm][metric] for summary in summaries]
        rows[arm] = {"values": values, metric: interval(values)._asdict()}
        if arm != "scratch" and "scratch" in summaries[0]["metrics"]:
            scratch = [summary["metrics"]["scratch"][metric] for summary in summaries]
            gains = [value - base for value, base in zip(values, scratch, strict=True)]
            rows[arm]["gain_over_scratch"] = interval(gains)._asdict()
    first = summaries[0]
    result = {
        "benchmark": first["benchmark"],
        "split": first["split"],
        "metric": metric,
        "seeds": seeds,
        "arms": rows,
        "commits": sorted({summary["commit"] for summary in summaries}),
        "hardware": sorted({summary["hardware"] for summary in summaries}),
    }
    if out is not None:
        checkpoint.write_text(out, json.dumps(result, indent=2) + "\n")
    lines = [
        f"{metric} in points on {first['benchmark']} {first['split']}, seeds "
        f"{', '.join(map(str, seeds))}: mean (95% confidence interval)",
        "",
        "| arm | each seed | mean | gain over scratch, paired |",
        "|---|---|---|---|",
    ]
    for arm, row in rows.items():
        each = ", ".join(f"{100 * value:.1f}" for value in row["values"])
        gain = Interval(**row["gain_over_scratch"]) if "gain_over_scratch" in row else ""
        lines.append(f"| {arm.replace('_', ' ')} | {each} | {Interval(**row[metric])} | {gain} |")
    return "\n".join(lines)


def _read_summary(run: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run} has no summary.json: name a run folder that is finished") from error
    return summary


def _check_comparable(summaries: Sequence[Mapping[str, Any]], runs: Sequence[str]) -> None:
    """Several seeds of the same thing, or a line that says what differs."""
    if len(summaries) < 2:
        raise UserError("report: name two runs or more, of one recipe with different seeds")
    if len({summary["seed"] for summary in summaries}) < len(summaries):
        raise UserError("report: two runs have the same seed; name runs with different seeds")
    for run, summary in zip(runs, summaries, strict=True):
        for key in ("benchmark", "split"):
            if summary[key] != summaries[0][key]:
                raise UserError(
                    f"report: {run} has {key} {summary[key]!r}, {runs[0]} {summaries[0][key]!r}"
                )
        if summary["metrics"].keys() != summaries[0]["metrics"].keys():
            raise UserError(f"report: {run} has other arms than {runs[0]}")
