"""A user's mistake: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class UserError(Exception):
    """A mistake that a user can fix. The text is one line: what is wrong, where, what is right."""


class Interrupted(Exception):
    """The user stopped long work; everything is saved, and the text says how to continue."""


def nearest(name: str, choices: Iterable[str], section: str = "") -> str:
    """The end of an error line about an unknown name: the closest choice, or all choices.

    `section` is a prefix of the closest choice (`train.`), to give a key in full.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {section + close[0]!r}?" if close else f"choose from {', '.join(known)}"


def one_line(error: BaseException, most: int | None = None) -> str:
    """The message of an error without line breaks, cut to `most` characters."""
    return " ".join(str(error).split())[:most]


@contextmanager
def blame(where: str) -> Iterator[None]:
    """Turn a package's errors about its arguments into a `UserError` that names the recipe's key.

    `teachers`, `students` and `rl_policy` do not know recipes: they raise `ValueError` and
    `OSError`. Code that builds their objects from a recipe uses `with blame("teacher.path"):`.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error


def problem_line(problem: ErrorDetails, below: str = "") -> str:
    """One line for a problem found by pydantic: the key below `below`, the fault, the value."""
    key = ".".join(filter(None, [below, *map(str, key_path(problem))]))
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    if not key:  # a problem of the whole
        return str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
    if problem["type"] in ("list_type", "tuple_type") or "Sequence" in problem["msg"]:
        given = problem["input"]
        return f"{key}: must be a list, such as [{given}], got {given!r:.80}"
    if problem["type"] == "dataclass_type":
        return f"{key}: must be a section with keys, got {problem['input']!r:.80}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{key}: {message}, got {problem['input']!r:.80}"


def mistaken(given: Any, taken: Any) -> str | None:
    """What was meant where pydantic took `true` or a quoted number for a number, or the other way
    round; None if it took what was given."""
    if isinstance(given, bool) != isinstance(taken, bool):
        return "true or false" if isinstance(taken, bool) else "a number"
    quoted = isinstance(given, str) and given != "auto" and isinstance(taken, int | float)
    return "a number, without quotes" if quoted else None


def key_path(problem: ErrorDetails) -> list[int | str]:
    """Keys and indices, without the names of a union's members."""
    kinds = ("tuple[int, int]", "tuple", "int", "str", "[key]")
    return [part for part in problem["loc"] if part not in kinds]
