"""The protocols of `distill evaluate` that ask for places: correspondence and depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from distill import seeding
from distill.augmentation import Strength, augmentation
from distill.benchmarks import Examples
from distill.benchmarks.geometric import CorrespondenceBenchmark, DepthBenchmark, KeypointPairs
from distill.build import image_size, open_data
from distill.config import RunConfig
from distill.data import Augmented, InMemory, Resized, as_float, choose_labelled, fingerprint
from distill.errors import UserError
from distill.evaluation import geometry_pictures
from distill.evaluation.backbones import Subject
from distill.evaluation.correspondence import ALPHA, Matched, match_pairs, pck
from distill.evaluation.depth import (
    BINS,
    DepthScores,
    at_resolution,
    depth_probe,
    mean_scores,
    measure,
    scale_invariant_loss,
)
from distill.evaluation.geometry_pictures import ShownDepth, ShownPair
from distill.evaluation.linear import LinearProbe, fit
from distill.evaluation.protocols import drawn
from distill.evaluation.subjects import open_backbone
from distill.progress import Progress

SHOWN = 4  # best and worst each, in the picture


class Outcome(NamedTuple):
    """The results of a protocol."""

    result: dict[str, Any]
    """Setting, figures and scores, for JSON."""
    draw: Callable[[Path], None] | None
    """Writes the pictures beside a JSON file; none of `label_efficient`, which fits many."""


def correspondence(subject: Subject, config: RunConfig, accelerator: Accelerator) -> Outcome:
    """Keypoints found again by the backbone's features alone (`evaluation.correspondence`)."""
    _check(config, "correspondence")
    benchmark: CorrespondenceBenchmark = open_data(config.data, "correspondence")
    pairs = benchmark.pairs(config.evaluate.split)
    indices = range(min(config.evaluate.images or len(pairs), len(pairs)))
    height, width = config.data.size or pairs[0].source.shape[1:]
    size = (int(height), int(width))
    backbone = open_backbone(subject, config, size, accelerator.device)
    batch = config.evaluate.batch
    passes = math.ceil(len(indices) / max(1, batch // 2))
    with Progress("correspondence", passes, show=accelerator.is_main_process) as progress:
        matched = match_pairs(
            backbone,
            pairs,
            indices,
            size=size,
            device=accelerator.device,
            batch=batch,
            progress=lambda images: progress.update(images, {}),
        )
    scores = pck(matched)
    result = {
        **setting(config, "pck_box", size, None, backbone.layers),
        "details": {"alpha": ALPHA, "pairs": len(matched)},
        "images": fingerprint(pairs),  # type: ignore[arg-type]
        "figures": {name: scores[name] for name in ("pck_image", "pck_box")},
        "scores": scores,
    }
    return Outcome(result, partial(_draw_matches, pairs, matched))


def depth(subject: Subject, config: RunConfig, accelerator: Accelerator) -> Outcome:
    """A linear layer over bins of depth, its learning rate chosen on val (`evaluation.depth`)."""
    _check(config, "depth")
    benchmark: DepthBenchmark = open_data(config.data, "depth")
    examples, options = benchmark.depths("train"), config.evaluate
    size, device = image_size(config.data, examples), accelerator.device
    count = len(examples) if config.data.labelled is None else config.data.labelled
    indices = choose_labelled(len(examples), count, config.data.split_seed)
    backbone = open_backbone(subject, config, size, device)
    for split in ("val", options.split):  # what is wrong with them shows before the work
        benchmark.depths(split)[0]
    seed = seeding.derive_seed(config.seed, "network")
    probe = depth_probe(backbone, options.lrs, benchmark.depth_range, seed).to(device)
    with Progress("depth", options.steps, show=accelerator.is_main_process) as progress:
        fit(
            probe,
            drawn(config, _training_views(config, examples, size), indices, device),
            steps=options.steps,
            loss=scale_invariant_loss,
            progress=lambda images: progress.update(images, {}),
        )
    workers = config.data.workers
    predict = partial(measure, probe, device=device, batch=options.batch, workers=workers)
    tried = predict(Resized(benchmark.depths("val"), size, masks=False))
    found = [mean_scores(each, benchmark.name).rmse for each in tried]
    chosen = probe.keep_best("rmse", found)
    tested: Examples = Resized(benchmark.depths(options.split), size, masks=False)
    if options.images is not None:
        tested = Subset(tested, range(min(options.images, len(tested))))  # type: ignore[arg-type]
    (each,) = predict(tested)
    scores = mean_scores(each, benchmark.name)._asdict()
    result = {
        **setting(config, "rmse", size, count, backbone.layers),
        "details": {**chosen, "bins": BINS, "unit": benchmark.depth_unit},
        "images": fingerprint(benchmark.depths(options.split)),
        "figures": scores,
        "scores": scores,
    }
    return Outcome(result, partial(_draw_depths, probe, benchmark, tested, each, device))


def _check(config: RunConfig, protocol: str) -> None:
    """Refuse what has no meaning for places."""
    options = config.evaluate
    if options.window is not None or options.flip or list(options.scales) != [1.0]:
        raise UserError(
            f"--protocol {protocol} looks at each image once and whole; leave out evaluate.window, "
            "evaluate.flip and evaluate.scales"
        )


def _training_views(config: RunConfig, examples: Examples, size: tuple[int, int]) -> Augmented:
    """Resized, kept in memory as far as there is room, mirrored: a crop would change distances."""
    resized: Examples = Resized(examples, size, masks=True)
    if config.data.memory_gb:
        resized = InMemory(resized, config.data.memory_gb * 1e9 / max(1, config.data.workers))
    strength: Strength = "none" if config.data.augment == "none" else "flip"
    return Augmented(resized, augmentation(strength, None, size))


def setting(
    config: RunConfig,
    metric: str,
    size: tuple[int, int],
    labelled: int | None,
    layers: Sequence[str],
) -> dict[str, Any]:
    """The settings that must be equal for two results to be compared, and the layers."""
    return {
        "benchmark": config.data.benchmark,
        "split": config.evaluate.split,
        "metric": metric,
        "size": list(size),
        "labelled": labelled,
        "layers": list(layers),
    }


def best_and_worst(ranked: Sequence[int]) -> list[tuple[str, int]]:
    """The indices to show, given from best to worst: the best, and the worst in reverse order."""
    half = min(SHOWN, (len(ranked) + 1) // 2)
    best, worst = ranked[:half], list(reversed(ranked[half:]))[:SHOWN]
    return [*(("best", index) for index in best), *(("worst", index) for index in worst)]


def _draw_matches(pairs: KeypointPairs, matched: Sequence[Matched], out: Path) -> None:
    def share(index: int) -> float:
        return float(matched[index].in_box.double().mean())

    ranked = sorted(range(len(matched)), key=share, reverse=True)
    shown = []
    for kind, index in best_and_worst(ranked):
        one, pair = matched[index], pairs[matched[index].number]
        right = f"{int(one.in_box.sum())} of {len(one.in_box)}"
        shown.append(ShownPair(f"{kind}: {one.category}, {right}", pair, one.found, one.in_box))
    geometry_pictures.matches(out.with_name(f"{out.stem}-matches.png"), shown)


def _draw_depths(
    probe: LinearProbe,
    benchmark: DepthBenchmark,
    examples: Examples,
    each: Sequence[DepthScores],
    device: torch.device,
    out: Path,
) -> None:
    known = [index for index, scores in enumerate(each) if not math.isnan(scores.rmse)]
    shown = []
    for kind, index in best_and_worst(sorted(known, key=lambda index: each[index].rmse)):
        image, target = examples[index]
        pixels, truth = as_float(image), torch.as_tensor(target)
        with torch.no_grad():
            guess = probe(pixels[None].to(device))[0]
        guess = at_resolution(guess, (truth.shape[0], truth.shape[1]))[0]
        title = f"{kind}: RMSE {each[index].rmse:.2f} {benchmark.depth_unit}"
        shown.append(ShownDepth(title, pixels, truth, guess.cpu()))
    geometry_pictures.depths(
        out.with_name(f"{out.stem}-depths.png"), shown, benchmark.depth_range, benchmark.depth_unit
    )
