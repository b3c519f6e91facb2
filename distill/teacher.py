"""From a recipe's section `teacher` to the frozen teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch

from distill.build import blame_layer, build_accelerator
from distill.config import RunConfig
from distill.errors import UserError, blame
from distill.options import checked_options
from distill.policies import reward_layer
from distill.precision import resolve_dtype, warn_if_slow
from distill.registry import lacks, resolve
from teachers.diffusion import View
from teachers.protocol import Teacher

VIEW = tuple(get_type_hints(View))
CHECKOUT = Path(__file__).resolve().parent.parent


def build_teacher(
    config: RunConfig,
    random_weights: int | None = None,
    layers: Sequence[str] = (),
    asked_by: str = "teacher",
) -> Teacher:
    """The frozen teacher, with these layers, which `asked_by` named, or those that the pairs and
    the reward ask for."""
    teacher = config.teacher
    factory = resolve("teachers", teacher.name, "teacher.name")
    asked = dict.fromkeys(layers, asked_by)
    if not layers:
        for index, pair in enumerate(config.pairs):
            asked.setdefault(pair.teacher, f"pairs.{index}.teacher")
        asked.setdefault(reward_layer(config), "policy.reward_layer")
    kind = build_accelerator(config.device).device.type
    given = {
        "layers": list(layers or asked),
        "input": teacher.input,
        "draws": teacher.draws,
        "image_size": teacher.image_size,
        "dtype": getattr(torch, resolve_dtype(teacher.dtype, kind)),
        "random_weights": teacher.random_weights if random_weights is None else random_weights,
        "compile": teacher.compile,
    }
    if teacher.dtype == "bfloat16":
        warn_if_slow("teacher.dtype=bfloat16", "teacher.dtype=float32", kind)
    if has_members(factory):
        given["factory_of"] = member_factory
    options = checked_options(teacher.options, factory, "teacher.options", given)
    _check_call(teacher.name, factory, "path", **given, **options)
    try:
        with blame("teacher"), blame_layer(asked):
            built: Teacher = factory(embedded(teacher.path), **given, **options)
    except TypeError as error:  # of what lies deeper in the options, such as a member's name
        if not options:
            raise
        raise UserError(f"teacher.options: {teacher.name} with {options}: {error}") from error
    if lacking := lacks(built, Teacher):
        raise UserError(
            f"teacher.name: {teacher.name} gives no teacher: it has no {lacking} "
            "(teachers/protocol.py)"
        )
    labels = ["labels"] if teacher.labels else []
    inputs = "images", "timesteps", "generator", *labels
    _check_call(f"features of {teacher.name}", built.features, *inputs)
    return built


def teacher_to_list(
    factory: Callable[..., Any],
    path: str,
    image_size: int | tuple[int, int] | None,
    options: Mapping[str, Any],
) -> Any:
    """A teacher without layers, which can only list them: no weights are read.

    Args:
        factory: Of a teacher without members.
        path, image_size, options: As in a recipe's `teacher`.
    """
    given = checked_options(options, factory, "teacher.options", VIEW) | {"layers": ()}
    if image_size is not None:
        given["image_size"] = image_size
    _check_call(getattr(factory, "__name__", str(factory)), factory, "path", **given)
    with blame("teacher"):
        return factory(embedded(path), **given)


def _check_call(name: str, function: Callable[..., Any], *inputs: str, **given: Any) -> None:
    """Raises UserError if a teacher of one's own cannot be called as a recipe calls it."""
    try:
        inspect.signature(function).bind(*inputs, **given)
    except TypeError as error:
        words = ", ".join([*inputs, *(f"{word}=" for word in given)])
        raise UserError(
            f"teacher.name: {name} cannot be called with ({words}): {error}; see docs/extending.md"
        ) from error
    except ValueError:  # compiled code without a signature
        pass


def teacher_dtype(config: RunConfig) -> str:
    """The name of the dtype that the teacher computes in, on the device of the run."""
    return resolve_dtype(config.teacher.dtype, build_accelerator(config.device).device.type)


def has_members(factory: Callable[..., Any]) -> bool:
    """Whether what it builds is made of other teachers."""
    return "factory_of" in inspect.signature(factory).parameters


def member_factory(name: str) -> Callable[..., Teacher]:
    """What builds a teacher within another one, as `factory(path, **view, **options)`.

    Raises:
        ValueError: There is none of this name, or it has members itself; whoever asks says for what
            it was.
    """
    try:
        factory = resolve("teachers", name, "name")
    except UserError as error:
        raise ValueError(str(error)) from error
    if has_members(factory):
        raise ValueError(f"{name} has members itself; name those in its place")

    def build(path: str, **given: Any) -> Teacher:
        view = {key: value for key, value in given.items() if key in VIEW}
        options = {key: value for key, value in given.items() if key not in VIEW}
        try:
            options = checked_options(options, factory, "options", VIEW)
        except UserError as error:
            raise ValueError(str(error)) from error
        built: Teacher = factory(embedded(path), **view, **options)
        return built

    return build


def embedded(path: str) -> str:
    """The same path, or that of an embedded teacher, from whatever folder one works in."""
    inside = CHECKOUT / path
    return str(inside) if not Path(path).exists() and inside.exists() else path
