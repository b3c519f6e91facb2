"""A user's mistake: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What a user can mend. Its text is one line: what is wrong, where, what would be right."""


class Interrupted(Exception):
    """The user stopped long work; everything is saved, and the text says how to go on."""


def nearest(name: str, choices: Iterable[str], section: str = "") -> str:
    """The end of an error line about an unknown name: the closest choice, or all of them.

    `section` is what stands before the closest one (`train.`), so that a key is given whole.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {section + close[0]!r}?" if close else f"choose from {', '.join(known)}"


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error of others says, without its line breaks; at most so many characters of it."""
    return " ".join(str(error).split())[:most]


@contextmanager
def blame(where: str) -> Iterator[None]:
    """Turn what a room raises about its arguments into a `UserError` that names the recipe's key.

    The rooms (`teachers`, `students`, `rl_policy`) do not know recipes: they raise `ValueError` and
    `OSError`. Whoever builds them from a recipe wraps that in `with blame("teacher.path"):`.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{where}: {one_line(error)}") from error
