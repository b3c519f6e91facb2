"""`distill export`: a student in the form that is asked for, checked before it is in place."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill import checkpoint
from distill.build import build_benchmark, build_student, image_size
from distill.commands.train import make_card
from distill.config import RunConfig
from distill.data import Resized, as_float, spread
from distill.deployment import hub
from distill.deployment.folder import (
    CARD,
    StudentCard,
    export_student,
    load_student,
    read_card,
    untrained,
    usage,
)
from distill.deployment.formats import (
    PRECISIONS,
    SUFFIXES,
    Deployed,
    Format,
    Precision,
    What,
    describe,
    write,
)
from distill.errors import UserError, one_line
from distill.evaluation import parity
from distill.evaluation.scoring import held_out_examples
from distill.recipe import apply_override, build_config, load_config, refuse_foreign, to_tree
from distill.training.loop import checkpoint_path
from students.student import Student

BATCH = 8
COMPARED = 100  # held-out images at most, and calibration images too
LARGEST_OUTPUT = 2**29  # bytes of outputs that a comparison keeps


class Source(NamedTuple):
    """The student to export, and where it comes from."""

    student: Student
    card: StudentCard
    config: RunConfig
    scores: dict[str, Any]
    """Scores of the run by name; empty if unknown."""
    where: Path
    """Default folder of exports."""
    exported: str = ""
    """Name of the exported folder that it was read from; empty if it comes from a run."""

    def default(self, format: Format, what: What, precision: Precision) -> Path:
        """Inside of the run; beside an exported folder, and named after it."""
        if format in ("timm", "hub"):
            of_run = "student" if format == "timm" else "hub"
            return self.where / (f"{self.exported}-{format}" if self.exported else of_run)
        parts = [self.exported or str(self.card.provenance["arm"]), what]
        parts += [] if precision == "fp32" else [precision]
        return self.where / ("-".join(parts) + SUFFIXES[format])


def export_run(
    path: str,
    *,
    arm: str | None = None,
    out: str | None = None,
    format: Format = "timm",
    what: What | None = None,
    precision: Precision = "fp32",
    push: str | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Export a student, check the export in a fresh process, and only then put it in its place.

    Args:
        path: A run folder, whose newest checkpoint is taken, or an exported student.
        arm: Of a run; None: `distilled`.
        out: A folder for timm and hub, otherwise a file.
        format: See `docs/export.md`.
        what: None: what the student was trained for.
        precision: fp16 for onnx and torchexport, int8 for onnx.
        push: With hub: the repository to upload to.
        overrides: Changes to the recipe, such as `data.root=...`, for the images that the export is
            compared on; what the export says of itself is as it was trained.

    Returns:
        What to print.

    Raises:
        UserError: A mistake, or an export that is not the student; there is nothing new at `out`.
    """
    _check_options(format, what, precision, out, push)
    token = hub.token_for(push) if push else None
    source = _source(Path(path), arm, overrides)
    task: What = "classifier" if source.student.head is None else "segmenter"
    if source.card.task == "landmarks" and format not in ("timm", "hub") and what != "backbone":
        raise UserError(
            f"--format {format}: a landmark student can be exported whole only as timm or hub; "
            "choose one of these, or --what backbone"
        )
    target = Path(out) if out else source.default(format, what or task, precision)
    if format in ("timm", "hub"):
        text = _export_folder(source, target, format, push)
        if push and token:
            text = f"{text}\n\n{hub.push(target, push, token=token)}"
        return text
    return _export_file(source, target, what or task, precision)


def _check_options(
    format: Format, what: What | None, precision: Precision, out: str | None, push: str | None
) -> None:
    """Refuse what does not go together, before anything is loaded."""
    known = PRECISIONS.get(format, ("fp32",))
    if precision not in known:
        able = [name for name, all_of in PRECISIONS.items() if precision in all_of]
        raise UserError(
            f"--precision {precision}: {format} supports only {', '.join(known)}; for {precision} "
            f"use --format {' or '.join(able)}"
        )
    if format in ("timm", "hub") and what is not None:
        raise UserError(
            f"--what {what}: the {format} folder always contains the whole student; leave it out"
        )
    if push and format != "hub":
        raise UserError(f"--push needs --format hub, got {format}")
    if out and format in SUFFIXES and Path(out).suffix != SUFFIXES[format]:
        raise UserError(f"--out {out}: {format} files must end in {SUFFIXES[format]}")


def _source(path: Path, arm: str | None, overrides: Sequence[str]) -> Source:
    """The student, from an exported folder or from a run's newest checkpoint."""
    if (path / CARD).is_file():
        source = _of_folder(path, arm, overrides)
    elif (path / "config.yaml").is_file():
        source = _of_run(path, arm or "distilled", overrides)
    else:
        raise UserError(f"{path} is not a run folder or an exported student")
    if source.config.evaluate.window is not None:
        raise UserError("evaluate.window: exports are compared on whole images; leave it out")
    return source


def _of_folder(path: Path, arm: str | None, overrides: Sequence[str]) -> Source:
    student, card = load_student(path)
    made = card.provenance.get("arm")
    if arm not in (None, made):
        raise UserError(f"--arm {arm}: {path} is an exported student of {made}; name a run folder")
    tree = copy.deepcopy(card.recipe)
    for override in overrides:
        apply_override(tree, override)
    config = build_config(RunConfig, tree, str(path))
    refuse_foreign(config, overrides, path)
    path = path if path.name not in ("", "..") else path.resolve()
    return Source(student, card, config, {}, path.parent, path.name)


def _of_run(path: Path, arm: str, overrides: Sequence[str]) -> Source:
    """The average of a checkpoint; needs no teacher, and of a finished run no data."""
    recipe = path / "config.yaml"
    made, config = load_config(RunConfig, recipe), load_config(RunConfig, recipe, overrides)
    refuse_foreign(config, overrides, path)
    if arm not in made.train.arms:
        raise UserError(f"--arm {arm}: {path} has only {', '.join(made.train.arms)}")
    saved = checkpoint_path(path, arm)
    state = checkpoint.load(saved, "step", "teacher", "average")
    provenance = {"arm": arm, "step": state["step"], "teacher": state["teacher"] or None}
    card = _card_of_run(path, made, config)
    card = dataclasses.replace(card, provenance={**card.provenance, **provenance})
    student = untrained(card, path / "student")
    try:
        student.load_state_dict(state["average"])
    except RuntimeError as error:
        line = one_line(error, 200)
        raise UserError(f"{saved} does not match the student of {recipe}: {line}") from error
    result = saved.with_name("result.json")  # written at the end of training
    scores = checkpoint.read_json(result, "scores")["scores"] if result.exists() else {}
    return Source(student.eval(), card, config, scores, path)


def _card_of_run(path: Path, made: RunConfig, config: RunConfig) -> StudentCard:
    """The card of a run's students: that of the exported one, or else after the data.

    Args:
        path: The run folder.
        made: Its recipe.
        config: The same, where the data lie today.
    """
    if (path / "student" / CARD).is_file():
        card = read_card(path / "student")
        if card.recipe == to_tree(made):
            return card
    benchmark = build_benchmark(config.data)
    size = made.data.size or image_size(config.data, benchmark.dataset("train"))
    built = dataclasses.replace(made, student=dataclasses.replace(made.student, pretrained=False))
    return make_card(made, benchmark, build_student(built, benchmark, size), {})


def _check_replaced(target: Path, card: StudentCard) -> None:
    """Refuse to replace another student by this one."""
    if (target / CARD).is_file() and _origin(read_card(target)) != _origin(card):
        raise UserError(f"{target} contains another student; choose another folder with --out")


def _origin(card: StudentCard) -> tuple[Any, ...]:
    """The properties that identify a student at any step."""
    recipe = card.recipe
    named = (recipe.get("name"), recipe.get("seed"), recipe.get("data", {}).get("benchmark"))
    made = (card.provenance.get("arm"), card.provenance.get("teacher"))
    return (card.model, *named, *made)


def _export_folder(source: Source, target: Path, format: Format, push: str | None) -> str:
    """The folder that timm opens; for the hub with its model card."""
    _check_replaced(target, source.card)
    model = Deployed(source.student, "classifier" if source.student.head is None else "backbone")
    sample, note = _sample(source, model)
    rows: list[parity.Row] = []

    def check(new: Path) -> None:
        ours = parity.run_student(source.student, model, sample)
        rows.extend([ours.row, parity.compare(new, "timm", model, "fp32", sample, ours)])
        parity.check_logits(source.student, load_student(new)[0], sample)
        if format == "hub":
            opened_as = f"hf-hub:{push}" if push else f"local-dir:{target.name}"
            hub.write_card(new, source.card, source.scores, opened_as)

    export_student(source.student, source.card, target, check)
    step, arm = source.card.provenance.get("step"), source.card.provenance.get("arm")
    written = f"student of {arm} at step {step} written to {target}"
    checked = f"{parity.table(rows, sample)}\n{note}"
    return f"{written}\n\n{checked}\n\nload it with\n\n{usage(target)}"


def _export_file(source: Source, target: Path, what: What, precision: Precision) -> str:
    """One file; the table shows the student, the file, and for int8 the float file too."""
    model = Deployed(source.student, what)
    sample, note = _sample(source, model, labelled=precision == "int8")
    calibration = _calibration(source, model) if precision == "int8" else None
    metadata = describe(model, source.card, precision)
    ours = parity.run_student(source.student, model, sample)
    rows = [ours.row]
    try:
        around = checkpoint.existing_parent(target)
        with tempfile.TemporaryDirectory(dir=around, prefix=f".{target.name}-") as scratch:
            new = Path(scratch, target.name)
            if precision == "int8":
                float_file = Path(scratch, f"fp32{target.suffix}")
                write(model, float_file, metadata)
                name = f"{target.suffix[1:]} fp32"
                rows.append(parity.compare(float_file, name, model, "fp32", sample, ours))
            leaving = Deployed(source.student, what, half=True) if precision == "fp16" else model
            write(leaving, new, metadata, calibration)
            name = f"{target.suffix[1:]} {precision}"
            rows.append(parity.compare(new, name, model, precision, sample, ours))
            checkpoint.sync(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(new, target)
    except OSError as error:
        raise UserError(f"cannot write the export to {target}: {error}") from error
    size = "any height and width" if model.any_size else "{} x {} px".format(*model.image_size)
    written = f"{what} of {source.card.model} in {precision} written to {target}"
    takes = f"takes RGB images in [0, 1], float32 (B, 3, H, W), any B, {size}"
    return f"{written}\n{takes}\n\n{parity.table(rows, sample)}\n{note}"


def _sample(source: Source, model: Deployed, labelled: bool = False) -> tuple[parity.Sample, str]:
    """Held-out images, or random ones where there are none, and a line that says so.

    Args:
        source: The student.
        model: How it leaves; says the size of images.
        labelled: Whether random images will not do.
    """
    benchmark = None
    try:
        benchmark = build_benchmark(source.config.data)
        examples = held_out_examples(source.config, benchmark, model.image_size)
    except UserError as error:
        if labelled:
            raise
        noise = torch.rand(
            2 * BATCH, 3, *model.image_size, generator=torch.Generator().manual_seed(0)
        )
        note = f"  on {len(noise)} images of noise, as no held-out ones could be read: {error}"
        return parity.Sample(_batches(noise), [], None), note
    items = [examples[index] for index in spread(len(examples), _count(model, source.card))]
    truths = [torch.as_tensor(target) for _, target in items]
    known = model.what != "backbone" and benchmark.num_classes == source.card.classes
    note = (
        f"  on {len(items)} images of {benchmark.name} {source.config.evaluate.split}, "
        f"{BATCH} at a time, {torch.get_num_threads()} CPU thread(s)"
    )
    batches = _batches(torch.stack([as_float(image) for image, _ in items]))
    return parity.Sample(batches, truths if known else [], benchmark if known else None), note


def _calibration(source: Source, model: Deployed) -> list[Tensor]:
    """Batches of the train split, without its labels."""
    benchmark = build_benchmark(source.config.data)
    images = Resized(benchmark.dataset("train"), model.image_size, masks=False)
    items = [as_float(images[index][0]) for index in spread(len(images), COMPARED)]
    return _batches(torch.stack(items))


def _batches(images: Tensor) -> list[Tensor]:
    return list(torch.split(images, BATCH))


def _count(model: Deployed, card: StudentCard) -> int:
    """Number of images for a comparison; fewer if their logits are large."""
    height, width = model.image_size
    each = 4 * height * width * card.classes if model.what == "segmenter" else 1
    return max(BATCH, min(COMPARED, LARGEST_OUTPUT // each))
