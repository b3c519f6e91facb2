"""`distill probe`: which layer at which timestep knows most of the labels, and what choosing the
timestep of every image could bring."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distill.benchmarks import Benchmark, notice
from distill.build import (
    TrainingSet,
    build_accelerator,
    build_training_set,
    single_process,
    training_examples,
)
from distill.config import RunConfig
from distill.data import choose_labelled
from distill.errors import Interrupted, UserError, blame
from distill.matching.distiller import small_image
from distill.probing.files import Columns, ProbeImages, write_map
from distill.probing.layer_map import WIDTH, Parts, measure
from distill.probing.linear_probe import Batches, Logistic, Ridge
from distill.probing.map_report import Column, LayerMap
from distill.progress import Progress
from distill.provenance import commit, hardware
from distill.recipe import to_tree
from distill.registry import resolve
from distill.run_folder import open_run_folder
from distill.stopping import stop_on_signals
from distill.tasks import traits
from distill.teacher import build_teacher, has_members, teacher_dtype, teacher_to_list
from teachers.noise import NoiseSchedule
from teachers.protocol import Teacher

DRAWS = 2  # of the noise of val: one to choose by, one to score
HELD_OUT = 5  # one in so many training images chooses penalty and temperature
WEIGHTS = ("trained", "random")
PROBES: dict[str, type[Ridge]] = {"ridge": Ridge, "logistic": Logistic}


def probe_teacher(
    config: RunConfig,
    *,
    layers: Sequence[str] = (),
    timesteps: int = 12,
    images: int | None = None,
    repeats: int = 1,
    probe: Literal["ridge", "logistic"] = "ridge",
    out: str | None = None,
    resume: bool = False,
) -> str:
    """Probe a teacher with the labelled training images of a recipe, and score it on val.

    Args:
        config: Its teacher, data and input mode count, and `evaluate.batch`.
        layers: By default all blocks of the teacher's table of layers; of a teacher without such a
            table those of the recipe's pairs.
        timesteps: How many, evenly spaced in the noise fraction; equal ones count once.
        images: Largest number of training images, and of val images; by default all labelled ones.
        repeats: Repetitions with another noise, another part held out, and other random weights.
        probe: Of images also `logistic`, which keeps their pooled features in memory.
        out: The folder; by default `output`/`name`-probe.
        resume: Go on with what is in the folder.

    Returns:
        What to print.

    Raises:
        UserError: A mistake in the recipe, an option or the data.
        Interrupted: The user stopped it; `resume=True` goes on.
    """
    for option, value in (("timesteps", timesteps), ("repeats", repeats), ("images", images)):
        if value is not None and value < 1:
            raise UserError(f"--{option}: must be at least 1, got {value}")
    device = single_process(config.device, "probe").device
    data, train, val = _images(config, images)
    dense = _dense(data.benchmark, probe)
    teacher = _teacher(config, layers, data.size, device)
    grid = _timesteps(teacher.noise_schedule, timesteps)
    if len(grid) < timesteps:
        notice(
            f"--timesteps {timesteps}: {len(grid)} of the teacher's {len(teacher.noise_schedule)} "
            "are measured, as evenly spaced ones coincide"
        )
    settings = _settings(config, data, teacher) | {
        "timesteps": grid.tolist(),
        "images": [len(train.indices), len(val.indices)],
        "seeds": repeats,
        "probe": probe,
    }
    folder = Path(out) if out else Path(config.output) / f"{config.name}-probe"
    open_run_folder(folder, resume, "--out" if out else "name= or --out")
    state = Columns(folder / "state.pt", settings)

    def column(teacher: Teacher, parts: Parts, timestep: int, seed: int, draws: int) -> Column:
        return measure(
            teacher,
            timestep,
            parts,
            classes=data.benchmark.num_classes,
            dense=dense,
            ignore_index=data.benchmark.ignore_index,
            device=device,
            seed=config.seed + seed,
            draws=draws,
            probe=PROBES[probe],
        )

    _measure_all(config, state, column, teacher, train, val)
    columns = {
        weights: [[state.columns[weights, s, t] for t in grid.tolist()] for s in range(repeats)]
        for weights in WEIGHTS
    }
    shown = val.batches(config.evaluate.batch, config.data.workers)
    found = LayerMap(
        columns["trained"],
        columns["random"],
        grid,
        teacher.noise_schedule,
        torch.cat([small_image(images) for images, _ in shown]),
        "mIoU" if dense else "top-1",
    )
    return _write(config, folder, found, settings, teacher, device)


def _dense(benchmark: Benchmark, probe: str) -> bool:
    """Whether every position has a label. Raises UserError if that probe cannot be fitted."""
    task = traits(benchmark)
    if not task.classes:
        raise UserError(
            f"probe: {benchmark.name} has {task.labels}, but linear probes need classes; use a "
            "benchmark of masks or classes"
        )
    if probe == "logistic" and task.dense:
        raise UserError("--probe logistic: masks have too many positions to store; use ridge")
    return task.dense


def _settings(config: RunConfig, data: TrainingSet, teacher: Teacher) -> dict[str, Any]:
    """The keys of the recipe that decide the figures, with their values."""
    tree = to_tree(config)
    kept = {
        f"{section}.{key}": value
        for section in ("data", "teacher")
        for key, value in tree[section].items()
        if key not in ("augment", "unlabelled", "workers", "memory_gb", "cache", "cache_gb")
    }
    return kept | {
        "seed": config.seed,
        "evaluate.batch": config.evaluate.batch,
        "data (fingerprint)": data.fingerprint,
        "teacher (fingerprint)": teacher.fingerprint,
        "layers": list(teacher.layers),
        "computed in": teacher_dtype(config),
    }


def _images(config: RunConfig, most: int | None) -> tuple[TrainingSet, ProbeImages, ProbeImages]:
    """Labelled training images and val images, in an order that takes the classes in turn."""
    plain = dataclasses.replace(config.data, augment="none")
    data = build_training_set(plain)
    chosen = data.labelled_indices[:most]
    if len(chosen) < HELD_OUT:
        raise UserError(
            f"data.labelled, or --images: must be at least {HELD_OUT} labelled training images, as "
            f"one in {HELD_OUT} is held out to choose the penalty; got {len(chosen)}"
        )
    with blame("data"):
        val = data.benchmark.dataset("val")
    if not len(val):
        raise UserError(
            f"data: {data.benchmark.name} has no val images to score the probe on; hold some out "
            "of train with data.options.val"
        )
    count = len(val) if most is None else min(most, len(val))
    targets = getattr(val, "targets", None)
    return (
        data,
        ProbeImages(data.labelled, chosen),
        ProbeImages(
            training_examples(val, plain, data.benchmark, data.size),
            choose_labelled(len(val), count, plain.split_seed, targets),
        ),
    )


def _teacher(
    config: RunConfig, layers: Sequence[str], size: tuple[int, int], device: torch.device
) -> Teacher:
    """The teacher with the layers asked for, or with all of its blocks."""
    if not layers:
        teacher: Any = _to_list(config)
        if hasattr(teacher, "layer_table"):
            with blame("data.size, or teacher.image_size"):
                names = [row.name for row in teacher.layer_table(size)]
            layers = [name for name in names if names.count(name) == 1]  # what runs once
        else:
            layers = teacher.layers
    built = build_teacher(config, layers=layers, asked_by="--layers").to(device)
    with blame("data.size, or teacher.image_size"):  # a size that does not fit shows here
        image = torch.zeros(1, 3, *size, device=device)
        built.features(image, torch.zeros(1, dtype=torch.int64))
    return built


def _to_list(config: RunConfig) -> Any:
    """A teacher to ask for its layers, without weights if it is one of ours."""
    teacher = config.teacher
    factory = resolve("teachers", teacher.name, "teacher.name")
    if ":" in teacher.name or has_members(factory):
        return build_teacher(config)
    return teacher_to_list(factory, teacher.path, teacher.image_size, teacher.options)


def _timesteps(schedule: NoiseSchedule, count: int) -> Tensor:
    """(K,) int64 from 0 to T-1, evenly spaced in the noise fraction; those that coincide, once."""
    first, last = schedule.noise_fraction(torch.tensor([0, len(schedule) - 1])).tolist()
    evenly = torch.linspace(first, last, count, dtype=torch.float64)
    return torch.tensor(sorted(set(schedule.nearest(evenly).tolist())))


def _measure_all(
    config: RunConfig,
    state: Columns,
    column: Callable[[Teacher, Parts, int, int, int], Column],
    teacher: Teacher,
    train: ProbeImages,
    val: ProbeImages,
) -> None:
    """Whatever columns are missing: of the teacher, then of those with random weights."""
    size, workers = config.evaluate.batch, config.data.workers
    seeds, timesteps = range(state.settings["seeds"]), state.settings["timesteps"]
    wanted = [(weights, seed, t) for weights in WEIGHTS for seed in seeds for t in timesteps]
    missing = [key for key in wanted if key not in state.columns]
    draws = {"trained": DRAWS, "random": 1}

    def steps(key: tuple[str, int, int]) -> int:
        fit, held = _split(train.indices, key[1])
        looks = [fit, held, *[val.indices] * draws[key[0]]]
        return sum(-(-len(indices) // size) for indices in looks)

    total, left = sum(map(steps, wanted)), sum(map(steps, missing))
    built = ("trained", 0)
    with stop_on_signals() as stop, Progress("probe", total, total - left) as progress:

        def watched(images: ProbeImages) -> Callable[[], Batches]:
            def batches() -> Batches:
                for batch in images.batches(size, workers):
                    if stop:
                        raise Interrupted(
                            f"stopped with {len(state.columns)} of {len(wanted)} columns of the "
                            "map; continue with --resume"
                        )
                    yield batch
                    progress.update(len(batch[0]), {})

            return batches

        for weights, seed, timestep in missing:
            if weights == "random" and built != (weights, seed):
                built = weights, seed
                control = build_teacher(config, config.seed + seed, teacher.layers)
                teacher = control.to(build_accelerator(config.device).device)
            fit, held = _split(train.indices, seed)
            parts = Parts(
                watched(train._replace(indices=fit)),
                watched(train._replace(indices=held)),
                watched(val),
            )
            state.add(
                (weights, seed, timestep), column(teacher, parts, timestep, seed, draws[weights])
            )


def _split(indices: list[int], seed: int) -> tuple[list[int], list[int]]:
    """To fit on, and held out: another fifth for each seed. Drawn, as their order is one of classes
    in turn, and the classes of every fifth place need not be those of all."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0)).tolist()
    turn = seed % HELD_OUT
    fit = [indices[drawn] for index, drawn in enumerate(order) if index % HELD_OUT != turn]
    return fit, [indices[drawn] for drawn in order[turn::HELD_OUT]]


def _write(
    config: RunConfig,
    folder: Path,
    found: LayerMap,
    settings: dict[str, Any],
    teacher: Teacher,
    device: torch.device,
) -> str:
    """All files of the folder. Returns what to print."""
    figures = {
        "name": config.name,
        "teacher": teacher.name,
        "settings": settings,
        "narrowed": [layer for layer in teacher.layers if teacher.channels[layer] > WIDTH],
        **found.figures(),
        "commit": commit(),
        "hardware": hardware(device),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_map(folder, config, found, figures)
    lines = [found.text(), ""]
    if figures["narrowed"]:
        layers = ", ".join(figures["narrowed"])
        lines.append(f"probed in {WIDTH} random directions of the channels: {layers}")
    lines.append(f"written to {folder}; the best cell: distill train {folder / 'best.yaml'}")
    return "\n".join(lines)
