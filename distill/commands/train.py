"""`distill train`: the arms of a run one after the other, then summary, pictures, student."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from distill import checkpoint
from distill.benchmarks import Benchmark, Examples
from distill.build import TrainingSet, build_accelerator, build_training_set
from distill.config import Arm, RunConfig
from distill.costs.flops import flops
from distill.data import as_float, fingerprint, spread
from distill.deployment.folder import StudentCard, export_student
from distill.errors import Interrupted, UserError
from distill.evaluation import pictures, scoring
from distill.evaluation.backbones import predictor
from distill.evaluation.counting import predicted
from distill.evaluation.pictures import Prediction
from distill.evaluation.scoring import held_out_examples
from distill.precision import resolve_precision
from distill.provenance import commit, hardware
from distill.recipe import PLACES, check_recipe, load_config, refuse_changes, to_tree, to_yaml
from distill.reporting.summary import summarise
from distill.run_folder import RunLog, open_run_folder, remove_if_bare
from distill.stopping import StopSignal, stop_on_signals
from distill.studies.comparison import main_arm
from distill.tasks import traits
from distill.teacher import teacher_dtype
from distill.training.fit import check_schedule, fit_batch, with_batch
from distill.training.loop import checkpoint_path, train_arm
from distill.training.trainer import Trainer
from students.student import Student

SHOWN = 8  # images in predictions.png


def train(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Train and score every arm of the recipe, export the distilled student.

    Returns:
        What is written to summary.json.

    Raises:
        UserError: A mistake in the recipe, the data or the teacher; or a run that failed.
        Interrupted: The user stopped it; `resume=True` goes on.
    """
    folder = Path(config.output) / config.name
    accelerator, written = build_accelerator(config.device), folder / "config.yaml"
    begun = written.exists()
    if resume and begun:
        config = resumed(config, written)
    data = build_training_set(config.data)
    config = fit_batch(config, data, accelerator)
    check_schedule(config, accelerator.num_processes, traits(data.benchmark).dense)
    held_out = held_out_examples(config, data.benchmark, data.size)
    validation = held_out
    if config.train.evaluate_every:
        validation = held_out_examples(config, data.benchmark, data.size, "val")
    arms = config.train.arms
    left = [arm for arm in arms if not (resume and _result_path(folder, arm).exists())]
    if resume:
        _check_checkpoints(config, folder)
    # The first is built before there is a folder: its mistakes leave none behind. So are, one at a
    # time, those whose feature caches may be stale or find no room.
    for arm in left[1:]:
        if config.teacher.cache is not None and arm != "scratch":
            _trainer(config, arm, data, accelerator)
            accelerator.free_memory()
    trainers = {arm: _trainer(config, arm, data, accelerator) for arm in left[:1]}
    if accelerator.is_main_process:
        open_run_folder(folder, resume)
        checkpoint.write_text(written, to_yaml(config))
    accelerator.wait_for_everyone()
    with stop_on_signals() as stop:
        for arm in left:
            trainer = trainers.pop(arm, None) or _trainer(config, arm, data, accelerator)
            try:
                parts = _train_arm(trainer, folder, validation, stop, resume=resume)
            except Interrupted as error:
                raise Interrupted(f"{error}; continue with --resume") from None
            except Exception:  # code of one's own may raise anything
                if accelerator.is_main_process and not begun:
                    remove_if_bare(folder)
                raise
            _finish_arm(trainer, folder, held_out, parts)
            del trainer
            accelerator.free_memory()  # for the next arm
    accelerator.wait_for_everyone()
    return summarise(config, folder, data.benchmark) if accelerator.is_main_process else {}


def _result_path(folder: Path, arm: Arm) -> Path:
    """Of a finished arm."""
    return checkpoint_path(folder, arm).with_name("result.json")


def _check_checkpoints(config: RunConfig, folder: Path) -> None:
    """Raises UserError if an arm was begun with another recipe."""
    for arm in config.train.arms:
        path = checkpoint_path(folder, arm)
        if path.exists():
            check_recipe(config, checkpoint.load(path, "config")["config"], path)


def _trainer(config: RunConfig, arm: Arm, data: TrainingSet, accelerator: Accelerator) -> Trainer:
    """Build a new arm with its feature cache open."""
    trainer = Trainer(config, arm, data, accelerator)
    with accelerator.main_process_first():  # one makes the folder, the others find it
        trainer.open_cache()
    return trainer


def _train_arm(
    trainer: Trainer, folder: Path, validation: Examples, stop: StopSignal, *, resume: bool
) -> dict[str, float]:
    """Train an arm from where it is. Returns the share of the time by part, see `train_arm`."""
    cache, path = trainer.cache, checkpoint_path(folder, trainer.arm)
    if cache is not None and trainer.accelerator.is_main_process:
        print(f"{trainer.arm}: {cache}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume and path.exists():
        trainer.load_state(checkpoint.load(path), path)
    try:
        return train_arm(trainer, folder, stop, partial(_observe, examples=validation))
    finally:
        if cache is not None:
            cache.flush()


def score(
    student: Student,
    examples: Examples,
    benchmark: Benchmark,
    config: RunConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Score a student on a split, over all processes."""
    student.eval()
    for buffer in student.buffers():  # of batch norm every process has its own statistics
        broadcast(buffer)
    look, size = predictor(student), student.image_size
    return scoring.score(look, size, examples, benchmark, config, accelerator).scores


def _observe(trainer: Trainer, log: RunLog | None, *, examples: Examples) -> None:
    """Score the student during training, and write predictions to TensorBoard."""
    benchmark, student = trainer.data.benchmark, trainer.average.module
    if trainer.step < trainer.config.train.steps:
        scores = score(student, examples, benchmark, trainer.config, trainer.accelerator)
        if log:
            numbers = {f"val/{k}": v for k, v in scores.items() if isinstance(v, float)}
            log.scalars(trainer.step, numbers)
    if log and benchmark.task == "segmentation":
        colours = torch.as_tensor(benchmark.palette)
        for index, (_, image, _, guess) in enumerate(predict(student, examples)):
            mask = as_float(colours[guess].permute(2, 0, 1))
            shown = torch.stack(
                [image, torch.nn.functional.interpolate(mask[None], image.shape[-2:])[0]]
            )
            log.images(trainer.step, f"predictions/{index}", shown)


def resumed(config: RunConfig, path: Path) -> RunConfig:
    """The recipe of a resumed run, of which only `PLACES` and the device may have changed."""
    saved = load_config(RunConfig, path)
    if not config.train.batch:  # the number that `auto` found
        config = with_batch(config, saved.train.batch)
    refuse_changes(saved, config, path, PLACES)
    return config


def _finish_arm(
    trainer: Trainer, folder: Path, examples: Examples, parts: Mapping[str, float]
) -> None:
    """Score an arm, over all processes, and write its files.

    Raises:
        UserError: An image cannot be read; the arm is trained, and resuming scores it.
    """
    config, benchmark = trainer.config, trainer.data.benchmark
    student = trainer.average.module
    try:
        scores = score(student, examples, benchmark, config, trainer.accelerator)
    except UserError as error:
        raise UserError(f"{error}; {trainer.arm} is trained, --resume scores it") from error
    if trainer.accelerator.is_main_process:
        _write_arm(trainer, folder, examples, scores, parts)


def _write_arm(
    trainer: Trainer,
    folder: Path,
    examples: Examples,
    scores: Mapping[str, Any],
    parts: Mapping[str, float],
) -> None:
    """Write an arm's result and, for the main arm, the student and a picture."""
    config, benchmark = trainer.config, trainer.data.benchmark
    student = trainer.average.module.cpu().eval()
    if trainer.arm == main_arm(config.train.arms):
        provenance = {
            "arm": trainer.arm,
            "step": trainer.step,
            "teacher": trainer.teacher.fingerprint if trainer.teacher else None,
        }
        card = make_card(config, benchmark, student, provenance)
        export_student(student, card, folder / "student")
        pictures.overlays(
            folder / "predictions.png",
            predict(student, examples),
            benchmark.class_names,
            benchmark.palette,
        )
    result = {
        "scores": scores,
        "data": {
            "train": trainer.data.fingerprint,
            "scored": fingerprint(benchmark.dataset(config.evaluate.split)),
        },
        "teacher": trainer.teacher.fingerprint if trainer.teacher else None,
        "images_per_second": trainer.images / max(trainer.seconds, 1e-9),
        "teacher_images": trainer.teacher_images,
        "seconds": trainer.seconds,
        "parts": parts,
        "flops": flops(student, trainer.teacher, trainer.data.size),
        "hardware": hardware(trainer.accelerator.device),
        "computed_in": {
            "teacher": teacher_dtype(config) if trainer.teacher else None,
            "student": resolve_precision(config.train.precision, trainer.accelerator.device.type),
        },
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if trainer.teacher is not None:
        result["policy"] = {
            "timesteps": trainer.timesteps.tolist(),
            "noise_fraction": trainer.teacher.noise_schedule.noise_fraction(
                trainer.timesteps
            ).tolist(),
        }
        result["noise_floor"] = {"mean": trainer.floor.means(), "bins": trainer.floor.by_bin()}
    checkpoint.write_text(_result_path(folder, trainer.arm), json.dumps(result))


def predict(student: Student, examples: Examples) -> list[Prediction]:
    """A few examples with truth and prediction, evenly spread, as neighbouring frames are alike."""
    items = [examples[index] for index in spread(len(examples), SHOWN)]
    images = [as_float(image) for image, _ in items]
    device = next(student.parameters()).device
    with torch.no_grad():
        logits = student(torch.stack(images).to(device))[0].cpu()
    truths = [torch.as_tensor(target) for _, target in items]
    return [
        Prediction("", image, truth, predicted(one, truth))
        for image, truth, one in zip(images, truths, logits, strict=True)
    ]


def make_card(
    config: RunConfig, benchmark: Benchmark, student: Student, provenance: Mapping[str, Any]
) -> StudentCard:
    """The card of an exported student.

    Args:
        config: The recipe.
        benchmark: Names the classes.
        student: The student built from the recipe.
        provenance: Arm, step and the teacher's fingerprint; the commit is added.
    """
    assert benchmark.task is not None  # a student has labels to learn
    return StudentCard(
        model=config.student.model,
        classes=benchmark.num_classes,
        dense=traits(benchmark).dense,
        image_size=student.image_size,
        layers=student.layers,
        head=config.student.head,
        head_layers=student.head_layers,
        input_size=student.input_size,
        kwargs=config.student.kwargs,
        class_names=benchmark.class_names,
        palette=benchmark.palette.tolist(),
        ignore_index=benchmark.ignore_index,
        task=benchmark.task,
        recipe=to_tree(config),
        provenance={**provenance, "commit": commit()},
    )
