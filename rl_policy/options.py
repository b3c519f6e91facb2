"""The options that a recipe gives to a policy, checked with one clear line per mistake."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GIVEN = ("timesteps", "image_size")
"""Keywords of policies that are not options, as the run sets them."""
WIDEST = 2**16
"""Largest width of a layer that is accepted as intended."""


class OptionError(ValueError):
    """An unknown or wrong option of a policy; the message begins with its name."""


def create(
    policy: Callable[..., Any],
    context_size: int,
    timesteps: Tensor,
    batch: int,
    seed: int,
    options: Mapping[str, Any],
    image_size: int | None = None,
) -> Any:
    """Build a policy; `timesteps` and `image_size` are passed only if it has these keywords.

    `timesteps` (K,) int64 are those of its bins; `image_size` is the side in px if its contexts are
    images, (3, S, S) flattened, otherwise None.

    Raises:
        OptionError: the policy has no such option, or rejects its value.
        ValueError: the policy rejects another argument, or has another signature.
    """
    signature = inspect.signature(policy)
    parameters = signature.parameters
    given = {}
    for name, fact in zip(GIVEN, (timesteps, image_size), strict=True):
        if name in parameters and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY:
            given[name] = fact
    for name in (*list(parameters)[:4], *given):
        if name in options:
            raise OptionError(f"{name} is not an option: the run itself sets it")
    facts = context_size, len(timesteps), batch, seed
    try:
        signature.bind(*facts, **given)
    except TypeError as error:
        raise ValueError(
            f"{policy} cannot be called with context_size, bins, batch and seed, as policies are: "
            f"{error}"
        ) from error
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        _refuse_unknown(policy, options)
    try:
        return policy(*facts, **given, **options)
    except TypeError as error:
        raise ValueError(f"{policy} cannot be built as a policy: {error}") from error


def _refuse_unknown(policy: Callable[..., Any], options: Iterable[str]) -> None:
    parameters = inspect.signature(policy).parameters.values()
    keywords = [option.name for option in parameters if option.kind is option.KEYWORD_ONLY]
    choices = [name for name in keywords if name not in GIVEN]
    for name in options:
        if name in keywords:
            continue
        close = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        known = f"choose from {', '.join(choices)}" if choices else "it has none"
        who = getattr(policy, "__name__", policy)
        raise OptionError(f"{name} is not an option of {who}; {hint or known}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that `value` is one of the choices.

    Raises:
        OptionError: it is not.
    """
    if value not in choices:
        raise OptionError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Check that `value` is true or false.

    Raises:
        OptionError: it is neither; the text "no" would count as true.
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
    """Check that `value` is a number with least <= value <= most and value > above.

    Raises:
        OptionError: it is not, or `whole` is set and it is not a whole number.
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
