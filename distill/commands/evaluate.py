"""`distill evaluate`: score a student, a timm model or a teacher under one protocol."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from distill import checkpoint
from distill.benchmarks import Benchmark
from distill.build import TrainingSet, build_benchmark, build_training_set, single_process
from distill.config import RunConfig
from distill.data import as_float, fingerprint
from distill.deployment.folder import read_card, student_folder
from distill.evaluation import pictures
from distill.evaluation.backbones import Subject, parse_subject
from distill.evaluation.counting import Tally, predicted
from distill.evaluation.geometry import Outcome, best_and_worst, correspondence, depth, setting
from distill.evaluation.pictures import Prediction
from distill.evaluation.protocols import (
    FINETUNE,
    Fitted,
    finetune,
    knn,
    label_efficient,
    linear,
    own,
)
from distill.evaluation.scoring import Scored, check_looks, held_out_examples, metric_of, score
from distill.evaluation.subjects import subject_config
from distill.intervals import Interval, interval
from distill.metrics import figure_text
from distill.provenance import commit, hardware
from distill.recipe import to_tree

TRIED = 4  # images that are read before anything is fitted


def evaluate(
    text: str,
    overrides: Sequence[str],
    *,
    protocol: str = "own",
    benchmark: str | None = None,
    out: str | None = None,
) -> str:
    """Evaluate a subject, and write what came out.

    Args:
        text: A subject, see `distill.evaluation.backbones.parse_subject`.
        overrides: Changes to the recipe: a student's own, for others the defaults.
        protocol: `own`, `linear`, `finetune`, `knn` or `label_efficient`, see `protocols`;
            `correspondence` or `depth`, see `geometry`.
        benchmark: Its `data.benchmark`.
        out: A JSON file for the result, with pictures beside it.

    Returns:
        The table to print.
    """
    if out is not None:
        checkpoint.check_json("--out", Path(out))
    result, draw = evaluate_subject(text, overrides, protocol, benchmark)
    if out is not None:
        checkpoint.write_text(out, json.dumps(result, indent=2) + "\n")
        if draw is not None:
            draw(Path(out))
    return _table(result)


def evaluate_subject(
    text: str,
    overrides: Sequence[str],
    protocol: str,
    benchmark: str | None = None,
    beside: Mapping[str, Any] | None = None,
) -> Outcome:
    """The outcome of one subject; for the arguments see `subject_recipe`."""
    began = time.monotonic()
    subject, config = subject_recipe(text, overrides, protocol, benchmark, beside)
    accelerator = single_process(config.device, "evaluate")
    outcome = PROTOCOLS[protocol](subject, config, accelerator)
    result = {
        "subject": text,
        "protocol": protocol,
        **outcome.result,
        "timestep": subject.timestep if subject.kind == "teacher" else None,
        "recipe": to_tree(config),
        "seconds": time.monotonic() - began,
        "commit": commit(),
        "hardware": hardware(accelerator.device),
    }
    return outcome._replace(result=result)


def subject_recipe(
    text: str,
    overrides: Sequence[str],
    protocol: str,
    benchmark: str | None,
    beside: Mapping[str, Any] | None = None,
) -> tuple[Subject, RunConfig]:
    """A subject, and the recipe that it is evaluated with; for the arguments see `evaluate` and
    `subject_config`."""
    subject = parse_subject(text)
    chosen = [f"data.benchmark={benchmark}", *overrides] if benchmark else overrides
    given = FINETUNE if protocol == "finetune" else {}
    return subject, subject_config(subject, chosen, given, beside)


def _own(subject: Subject, config: RunConfig, accelerator: Accelerator) -> Outcome:
    """A head that is there already."""
    benchmark = build_benchmark(config.data)
    check_looks(config.evaluate, benchmark)
    fitted = own(subject, config, benchmark, accelerator)
    return _evaluated(fitted, config, benchmark, None, accelerator)


def _with_head(
    fit: Callable[[Subject, RunConfig, TrainingSet, Accelerator], Fitted],
    subject: Subject,
    config: RunConfig,
    accelerator: Accelerator,
) -> Outcome:
    """A head that `fit` makes from labelled images."""
    data = build_training_set(dataclasses.replace(config.data, unlabelled=0))
    _try_held_out(config, data)
    fitted = fit(subject, config, data, accelerator)
    return _evaluated(fitted, config, data.benchmark, len(data.labelled_indices), accelerator)


def _evaluated(
    fitted: Fitted,
    config: RunConfig,
    benchmark: Benchmark,
    labelled: int | None,
    accelerator: Accelerator,
) -> Outcome:
    """The scores of a predictor that has seen so many labelled images."""
    scored, metric = _score(fitted, config, benchmark, accelerator), metric_of(benchmark)
    result = {
        **setting(config, metric, fitted.size, labelled, fitted.layers),
        "details": fitted.details,
        "images": fingerprint(benchmark.dataset(config.evaluate.split)),
        "figures": {metric: scored.scores[metric]},
        "scores": scored.scores,
        "scoring_seconds": dict(scored.seconds),
    }
    return Outcome(result, partial(_write_pictures, scored))


def _try_held_out(config: RunConfig, data: TrainingSet) -> None:
    """Read the first of the images to score: what is wrong with them shows before the work."""
    examples = held_out_examples(config, data.benchmark, data.size)
    for index in range(min(TRIED, len(examples))):
        examples[index]


def _score(
    fitted: Fitted, config: RunConfig, benchmark: Benchmark, accelerator: Accelerator
) -> Scored:
    examples = held_out_examples(config, benchmark, fitted.size)
    return score(fitted.predict, fitted.size, examples, benchmark, config, accelerator)


def _few_labels(subject: Subject, config: RunConfig, accelerator: Accelerator) -> Outcome:
    """Scores by number of labels, each with its choices of images."""
    data = build_training_set(dataclasses.replace(config.data, labelled=None, unlabelled=0))
    benchmark = data.benchmark
    _try_held_out(config, data)
    metric, rows = metric_of(benchmark), dict[int, list[dict[str, Any]]]()
    result: dict[str, Any] = {}
    for choice in label_efficient(subject, config, data, accelerator):
        scored = _score(choice.fitted, config, benchmark, accelerator)
        result = setting(config, metric, choice.fitted.size, None, choice.fitted.layers)
        result["images"] = fingerprint(benchmark.dataset(config.evaluate.split))
        rows.setdefault(choice.labels, []).append(
            {
                "seed": choice.seed,
                "names": choice.names,
                **choice.fitted.details,
                "scores": scored.scores,
            }
        )
    figures, intervals = dict[str, float](), dict[str, Any]()
    for labels, choices in rows.items():
        values = [choice["scores"][metric] for choice in choices]
        name = f"{metric} at {labels}"
        figures[name] = sum(values) / len(values)
        intervals[name] = interval(values)._asdict() if len(values) > 1 else None
    by_labels = {str(labels): choices for labels, choices in rows.items()}
    if subject.kind == "student":  # these may be among the labels that are scored here
        seen = read_card(student_folder(subject.path)).recipe["data"]["labelled"]
        result["seen_labels"] = "all" if seen is None else seen
    result |= {"figures": figures, "intervals": intervals, "choices": by_labels}
    return Outcome(result, None)


PROTOCOLS: Mapping[str, Callable[[Subject, RunConfig, Accelerator], Outcome]] = {
    "own": _own,
    "linear": partial(_with_head, linear),
    "finetune": partial(_with_head, finetune),
    "knn": partial(_with_head, knn),
    "label_efficient": _few_labels,
    "correspondence": correspondence,
    "depth": depth,
}


def _write_pictures(scored: Scored, out: Path) -> None:
    """The confusion matrix of classes, and the best and the worst images, beside the JSON file."""
    benchmark, tally = scored.benchmark, scored.tally
    if isinstance(tally, Tally):
        matrix = out.with_name(f"{out.stem}-confusion.png")
        pictures.confusion(matrix, tally.confusion, benchmark.class_names)
    each = [float(value) for value in tally.each]
    known = [index for index, value in enumerate(each) if not math.isnan(value)]
    # Captions give the share of right classes, or the error of points.
    ranked = sorted(known, key=each.__getitem__, reverse=isinstance(tally, Tally))
    shown = []
    for kind, index in best_and_worst(ranked):
        image, target = scored.examples[index]
        pixels, truth = as_float(image), torch.as_tensor(target)
        with torch.no_grad():
            logits = scored.predict(pixels[None].to(tally.device))[0].float()
        guess = predicted(logits, truth)
        text = f"{each[index]:.1%} NME"
        if isinstance(tally, Tally):
            text = f"{each[index]:.0%} {'of pixels right' if truth.ndim else 'for its class'}"
        shown.append(Prediction(f"{kind}: {text}", pixels, truth, guess))
    pictures.overlays(
        out.with_name(f"{out.stem}-overlays.png"), shown, benchmark.class_names, benchmark.palette
    )


def _table(result: Mapping[str, Any]) -> str:
    """The scores as a table, shares in points, with those of the classes below."""
    lines = [
        f"{result['subject']} on {result['benchmark']} {result['split']}, "
        f"protocol {result['protocol']}"
    ]
    if result["protocol"] == "label_efficient":
        for name, value in result["figures"].items():
            spread = result["intervals"][name]
            text = str(Interval(**spread)) if spread else f"{100 * value:.1f} (one choice)"
            lines.append(f"  {name:16} {text}")
        if "seen_labels" in result:
            lines.append(f"note: this student was trained on {result['seen_labels']} labels before")
        return "\n".join(lines)
    scores = dict(result["scores"])
    by_class = dict[str, float | None]()
    for name in ("iou", "accuracy", "category"):
        by_class |= scores.pop(name, {})
    lines += [f"  {name:22} {figure_text(name, value):>5}" for name, value in scores.items()]
    lines += [""] if by_class else []
    for name, value in by_class.items():
        lines.append(f"  {name:22} {'    -' if value is None else f'{100 * value:5.1f}'}")
    if "lr" in result["details"]:
        lines += ["", f"learning rate {result['details']['lr']:g}, chosen on val"]
    return "\n".join(lines)
