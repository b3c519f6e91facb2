"""The options that a recipe gives to a policy: one clear line for what is wrong."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOLD = ("timesteps", "image_size")
"""Keywords of policies that are no options: what they stand for follows from the run."""
WIDEST = 2**16
"""Largest width of a layer that a policy takes for meant."""


class OptionError(ValueError):
    """An option that a policy does not take; the line begins with its name."""


def create(
    policy: Callable[..., Any],
    context_size: int,
    timesteps: Tensor,
    batch: int,
    seed: int,
    options: Mapping[str, Any],
    image_size: int | None = None,
) -> Any:
    """A policy, told those of these facts that it has a keyword for.

    `timesteps` (K,) int64 are those of its bins; `image_size` is the side in px of the images that
    its contexts are, (3, S, S) flattened, or None if they are something else.

    Raises:
        OptionError: the policy has no such option, or refuses its value.
        ValueError: what it is told, or it is called otherwise than policies are.
    """
    signature = inspect.signature(policy)
    parameters = signature.parameters
    told = {}
    for name, fact in zip(TOLD, (timesteps, image_size), strict=True):
        if name in parameters and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
            told[name] = fact
    for name in (*list(parameters)[:4], *told):
        if name in options:
            raise OptionError(f"{name} is not an option: the run itself sets it")
    facts = context_size, len(timesteps), batch, seed
    try:
        signature.bind(*facts, **told)
    except TypeError as error:
        raise ValueError(
            f"{policy} cannot be called with context_size, bins, batch and seed, as policies are: "
            f"{error}"
        ) from error
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        _refuse_unknown(policy, options)
    try:
        return policy(*facts, **told, **options)
    except TypeError as error:
        raise ValueError(f"{policy} cannot be built as a policy: {error}") from error


def _refuse_unknown(policy: Callable[..., Any], options: Iterable[str]) -> None:
    parameters = inspect.signature(policy).parameters.values()
    keywords = [option.name for option in parameters if option.kind is option.KEYWORD_ONLY]
    choices = [name for name in keywords if name not in TOLD]
    for name in options:
        if name in keywords:
            continue
        close = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        known = f"choose from {', '.join(choices)}" if choices else "it has none"
        who = getattr(policy, "__name__", policy)
        raise OptionError(f"{name} is not an option of {who}; {hint or known}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of the choices.

    Raises:
        OptionError: it is none of them.
    """
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is true or false.

    Raises:
        OptionError: it is neither; the text "no" would count as yes.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be true or false, got {value!r}")


def check_range(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    whole: bool = False,
) -> None:
    """Raise unless `value` is a number with least <= value <= most and value > above.

    Raises:
        OptionError: it is not such a number, or not a whole one although `whole` is set.
    """
    numeric = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if (
        numeric
        and math.isfinite(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    ):
        return
    kind = "a whole number" if whole else "a number"
    limits = (("at least", least), ("above", above), ("at most", most))
    asked = " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)
    raise OptionError(f"{name} must be {kind} {asked}, got {value!r}")
