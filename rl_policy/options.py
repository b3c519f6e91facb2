"""Checks of the options that a recipe gives to a policy: one clear line for what is wrong."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable


def refuse_unknown(policy: type, unknown: Iterable[str]) -> None:
    """Raise for option names that no keyword-only parameter of `policy` takes.

    Raises:
        ValueError: `unknown` is not empty.
    """
    for name in unknown:
        parameters = inspect.signature(policy).parameters.values()
        choices = [option.name for option in parameters if option.kind is option.KEYWORD_ONLY]
        close = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean {close[0]!r}?" if close else ""
        known = f"choose from {', '.join(choices)}" if choices else "it takes none"
        raise ValueError(f"{policy.__name__} has no option {name!r}; {hint or known}")


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
        ValueError: it is not such a number, or not a whole one although `whole` is set.
    """
    numeric = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if (
        numeric
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    ):
        return
    kind = "a whole number" if whole else "a number"
    limits = (("at least", least), ("above", above), ("at most", most))
    asked = " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)
    raise ValueError(f"{name} must be {kind} {asked}, got {value!r}")
