"""Options of an object that a recipe names, checked against its keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from distill.errors import UserError, mistaken, nearest, problem_line
from distill.recipe import flat


def checked_options(
    options: Mapping[str, Any], factory: Callable[..., Any], key: str, given: Iterable[str] = ()
) -> dict[str, Any]:
    """The options, converted to the types that `factory` is annotated with.

    Types unknown to pydantic are not checked; nor are names if the factory accepts any (`**`) and
    nothing is `given`.

    Args:
        options: By name.
        factory: Takes them by keyword.
        key: The recipe's key of the options.
        given: Other keywords of the factory, which are not options.

    Raises:
        UserError: An unknown option, or one of another type.
    """
    parameters = inspect.signature(factory).parameters.values()
    if given or not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - set(given)
        for option in options:
            if option not in known:
                near = (
                    nearest(option, known, f"{key}.") if known else f"there are none ({key}={{}})"
                )
                raise UserError(f"unknown key '{key}.{option}'; {near}")
    try:
        hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError):  # imported for type checkers alone; or no plain function
        hints = {}
    found = {}
    for name, value in options.items():
        try:
            found[name] = TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UserError(problem_line(problem, f"{key}.{name}")) from error
        except PydanticUserError:
            found[name] = value
    before = flat(dict(options), key)
    for name, value in flat(found, key).items():
        if name in before and (right := mistaken(before[name], value)):
            raise UserError(f"{name}: must be {right}, got {before[name]!r}")
    return found
