"""Recipes: YAML files with dotted overrides, checked against the dataclasses of `config.py`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from distill.config import RunConfig
from distill.errors import UserError, key_path, mistaken, nearest, one_line, problem_line
from distill.registry import is_own
from distill.teacher_config import TeacherTrainConfig

Config = TypeVar("Config")
PLACES = ("name", "output", "data.root")
"""Keys that may be other ones where a run that was moved is resumed."""


class _Loader(yaml.SafeLoader):
    """YAML without surprises: `1e-4` is a number, `no` and a date are words, and a key given twice
    is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
        first: [
            pair
            for pair in pairs
            if not pair[0].endswith((":timestamp",) if first in "tTfF" else (":timestamp", ":bool"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=deep) for key in own]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice in its section", own[index].start_mark
                )
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def load_config(kind: type[Config], recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply `section.key=value` overrides, each value written as in YAML.

    Raises:
        UserError: The file is missing or not YAML, a key is unknown, or a value has the wrong type
            or is out of range; the message names file and key.
    """
    tree = read_tree(recipe, "recipe")
    for override in overrides:
        apply_override(tree, override)
    return build_config(kind, tree, where=str(Path(recipe)), overrides=overrides)


def read_tree(file: str | Path, what: str) -> dict[str, Any]:
    """The plain tree of a YAML file, with `name` taken from the file's name where it has none.

    Raises:
        UserError: The file is missing or not YAML, or has no sections; the message begins with
            `what` it is and its path.
    """
    path = Path(file)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        near = difflib.get_close_matches(path.name, _names_beside(path), n=1)
        hint = f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""
        raise UserError(f"{what} {path}: {error.strerror or error}{hint}") from error
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text, `!!int x`
        raise UserError(f"{what} {path} is not YAML: {_syntax(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{what} {path}: expected sections like `train:`, found {tree!r:.60}")
    tree.setdefault("name", path.stem)
    return tree


def _names_beside(path: Path) -> list[str]:
    """Names of the files in the folder that `path` should be in."""
    folder = path.parent
    return [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []


def _syntax(error: yaml.YAMLError | ValueError) -> str:
    """One line with a YAML error and its place."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return one_line(error)
    found = f"{_place(error.problem_mark)}: {error.problem}"
    begun = error.context_mark
    if error.context is None or begun is None or begun.line == error.problem_mark.line:
        return found
    return f"{found}, {error.context} that begins at {_place(begun)}"


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def build_config(
    kind: type[Config],
    tree: Mapping[str, Any],
    where: str = "recipe",
    overrides: Sequence[str] = (),
) -> Config:
    """Check a plain tree (as read from YAML) and freeze it. Raises as `load_config` does.

    Args:
        kind: The type of the config.
        tree: The tree.
        where: Its origin, for messages.
        overrides: Those that were applied to it: a wrong value of theirs is told as theirs.
    """
    try:
        config = TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        key, problem = _first_problem(kind, error)
        raise UserError(f"{_origin(key, overrides, where)}: {problem}") from error
    before = flat(dict(tree))
    for key, value in flat(to_tree(config)).items():  # type: ignore[arg-type]
        if key in before and (right := mistaken(before[key], value)):
            raise UserError(
                f"{_origin(key, overrides, where)}: {key}: must be {right}, got {before[key]!r}"
            )
    return config


def _origin(key: str, overrides: Sequence[str], where: str) -> str:
    """The last override that set a key or a part of it; `where` if none did."""
    for override in reversed(overrides):
        name = override.partition("=")[0]
        if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
            return f"override {override!r}"
    return where


def to_tree(config: RunConfig | TeacherTrainConfig) -> dict[str, Any]:
    """The plain tree of a config, as `build_config` takes it."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")  # type: ignore[no-any-return]


def to_yaml(config: RunConfig | TeacherTrainConfig) -> str:
    """The resolved recipe as YAML text; `load_config` of it gives the config back."""
    tree = to_tree(config)
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100)
    return text


class Difference(NamedTuple):
    """A key with different values in two recipes; None where one has no such entry."""

    key: str
    before: Any
    now: Any


def first_difference(
    before: RunConfig | TeacherTrainConfig,
    now: RunConfig | TeacherTrainConfig,
    places: Container[str] = (),
) -> Difference | None:
    """The first key in which two recipes differ, `places` aside; None if there is none.

    `device`, and how many files may be unreadable, do not change what a run computes.
    """
    old, new = flat(to_tree(before)), flat(to_tree(now))
    for key in old | new:
        if key in ("device", "data.options.skip") or key in places:
            continue
        if differs(key, old.get(key), new.get(key)):
            return Difference(key, old.get(key), new.get(key))
    return None


def differs(key: str, before: Any, now: Any) -> bool:
    """Whether the value of a key is another one now. A precision that is left to the machine
    (`auto`) is what any machine chose before."""
    left = key in ("teacher.dtype", "train.precision", "precision") and now == "auto"
    return bool(before != now) and not left


def refuse_changes(
    saved: RunConfig | TeacherTrainConfig,
    now: RunConfig | TeacherTrainConfig,
    path: Path,
    places: Sequence[str] = (),
) -> None:
    """Raises UserError where a run is resumed with another recipe than that in its config.yaml, the
    keys `places` aside."""
    if changed := first_difference(saved, now, places):
        raise UserError(
            f"resume: {changed.key} was {changed.before!r} in {path}, but is {changed.now!r} now; "
            f"use the run's own recipe, or start a new run ({_reuse(now)} reuses weights)"
        )


def _reuse(config: RunConfig | TeacherTrainConfig) -> str:
    """The key that takes over weights."""
    return "init_from" if isinstance(config, TeacherTrainConfig) else "student.init_from"


def check_recipe(
    config: RunConfig | TeacherTrainConfig, written: Mapping[str, Any], source: Path
) -> None:
    """Check that a checkpoint has the recipe's values, except for the `PLACES` of a moved run.

    Args:
        config: The recipe.
        written: The tree in the checkpoint.
        source: The checkpoint.

    Raises:
        UserError: The first key that differs.
    """
    # Rebuilt, so that a key newer than the file gets its default.
    before = build_config(type(config), written, where=str(source))
    if changed := first_difference(before, config, PLACES):
        raise UserError(
            f"resume: {changed.key} was {changed.before!r} in {source}, but is {changed.now!r} "
            f"now; change it back, or start a new run ({_reuse(config)} reuses weights)"
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


# The keys whose values may be `module:attribute`.
_CODE = re.compile(
    r"data\.benchmark|(teacher|policy)\.name|pairs\.\d+\.loss|teacher\.options\.members\..+\.name"
)


def refuse_foreign(config: RunConfig, overrides: Sequence[str], folder: Path) -> None:
    """Check that a recipe that came with weights or results names no foreign code.

    A run folder or an exported student may come from anybody, and opening it must not run code that
    it names. `module:attribute` is allowed if it is the user's own file (`registry.is_own`), or
    if an override gives the same name.

    Args:
        config: The recipe, with the overrides.
        overrides: Those of the command line.
        folder: The run folder or exported student.

    Raises:
        UserError: It names foreign code; the message says how to allow it.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    trusted = flat(given).values()
    for key, value in flat(to_tree(config)).items():
        name = str(value)
        if not _CODE.fullmatch(key) or ":" not in name or name in trusted or is_own(name, folder):
            continue
        raise UserError(
            f"{folder}: its recipe has {key}={name}, which is not a file of yours below the "
            f"working directory and could be anybody's code; if you trust it, add {key}={name}"
        )


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in a plain tree; list entries by index (`pairs.0.weight=2`)."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override {override!r}: expected section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override {override!r}: the value is not YAML") from error
    entries = value.items() if isinstance(value, dict) else ()
    tight = [key for key, entry in entries if entry is None and ":" in str(key)]
    if tight:  # YAML reads `{size:32}` as one key without a value
        raise UserError(f"override {override!r}: write a space after the colon of {tight[0]!r}")
    *parents, last = path.split(".")
    node: Any = tree
    for name in parents:
        node = _child(node, name, override)
    if isinstance(node, list):
        _child(node, last, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"override {override!r}: {'.'.join(parents)} has no keys")


def _child(node: Any, name: str, override: str) -> Any:
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise UserError(
                f"override {override!r}: no entry {name}; the {len(node)} entries count from 0"
            )
        return node[int(name)]
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {name!r} is below a value, not a section")
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _first_problem(kind: type[Any], error: ValidationError) -> tuple[str, str]:
    """The first key that is wrong, and one line: the key, what it got, what would be right."""
    problem = error.errors(include_url=False)[0]
    location = key_path(problem)
    key = ".".join(map(str, location))
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section, _, name = key.rpartition(".")
        known = _keys(kind, location[:-1])
        return key, f"unknown key {key!r}; {nearest(name, known, section and f'{section}.')}"
    return key, problem_line(problem)


def _keys(kind: type[Any], location: Sequence[int | str]) -> list[str]:
    """Names of the keys of the section at `location`."""
    for part in location:
        if isinstance(part, str):
            hint = get_type_hints(kind)[part]
            kind = get_args(hint)[0] if get_args(hint) else hint  # list[PairConfig] -> PairConfig
    return [field.name for field in dataclasses.fields(kind)]
