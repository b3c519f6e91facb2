"""Recipes: what is read is what was meant, and what cannot be meant is one clear line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from pydantic import TypeAdapter

from distill.config import RunConfig
from distill.errors import UserError
from distill.recipe import build_config, load_config, to_tree, to_yaml
from distill.teacher_config import TeacherTrainConfig

PAIR = {"student": "layer4", "teacher": "mid_block"}
SMALLEST: dict[type, dict[str, Any]] = {RunConfig: {"pairs": [PAIR]}, TeacherTrainConfig: {}}
DOTTED = "section.key=value"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write(tmp_path, "pairs: [{student: layer4, teacher: mid_block}]\n")


def refuse(path: Path, pattern: str, *overrides: str) -> None:
    """The recipe gives one line that matches."""
    with pytest.raises(UserError, match=pattern) as caught:
        load_config(RunConfig, path, overrides)
    assert "\n" not in str(caught.value)


def keys(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config that holds a value, dotted, with its type."""
    for name, hint in get_type_hints(kind).items():
        if name.startswith("__"):
            continue
        sections = [part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)]
        for section in sections:
            place = f"{name}." if section is hint else f"{name}.0."
            yield from keys(section, prefix + place)  # type: ignore[arg-type]
        if not sections:
            yield prefix + name, hint


EVERY_KEY = [
    pytest.param(kind, key, hint, id=f"{kind.__name__}-{key}")
    for kind in SMALLEST
    for key, hint in keys(kind)
]


def with_value(kind: type, key: str, value: object) -> dict[str, Any]:
    """The smallest recipe and one key more."""
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SMALLEST[kind]))
    node: Any = tree
    *parents, last = key.split(".")
    for name in parents:
        node = node[int(name)] if name.isdigit() else node.setdefault(name, {})
    node[last] = value
    return tree


def test_the_walk_over_the_keys_reaches_all_levels() -> None:
    names = {key for key, _ in keys(RunConfig)}
    assert {"seed", "pairs.0.weight", "data.options", "train.lr", "evaluate.split"} <= names
    assert "train" not in names


@pytest.mark.parametrize(("kind", "key", "hint"), EVERY_KEY)
def test_a_misspelled_key_names_the_nearest(kind: Any, key: str, hint: object) -> None:
    with pytest.raises(UserError) as caught:
        build_config(kind, with_value(kind, f"{key}x", 1), where="r.yaml")
    assert str(caught.value) == f"r.yaml: unknown key '{key}x'; did you mean '{key}'?"


@pytest.mark.parametrize(("kind", "key", "hint"), EVERY_KEY)
def test_a_value_of_the_wrong_type_names_key_and_value(kind: Any, key: str, hint: object) -> None:
    wrong: object = "wrong" if hint not in (str, str | None) else ["wrong"]
    if key == "pairs.0.student":  # one name stands for a list of it
        wrong = 3
    with pytest.raises(UserError) as caught:
        build_config(kind, with_value(kind, key, wrong), where="r.yaml")
    assert str(caught.value).startswith(f"r.yaml: {key}: ")
    assert str(caught.value).endswith(f", got {wrong!r}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("pairs.0.student=[layer2, layer3, layer2]", "must name layer2 only once, not 2 times"),
        ("train.arms=[scratch, scratch]", "must name scratch only once, not 2 times"),
        ("evaluate.lrs=[1e-3, 0.01, 0.001]", "must name 0.001 only once, not 2 times"),
        ("train.steps='7'", "must be a number, without quotes"),
        ("teacher.image_size=abc", "must be a side in px, or [height, width]"),
        ("train.lr='1e-3'", "must be a number, without quotes"),
        ("data.patch_scale=[2, 1]", "must be the smallest and then the largest"),
        ("name=../up", "must be a folder below output, without .."),
        ("name=/up", "must be a folder below output, without .."),
        ("name=''", "must be a folder below output, without .."),
        ("evaluate.labels=[1/0]", "must be a number of images, a share such as 1/16, or all"),
    ],
)
def test_values_that_make_no_sense_say_why(recipe: Path, change: str, reason: str) -> None:
    with pytest.raises(UserError, match=f": {re.escape(reason)}, got "):
        load_config(RunConfig, recipe, [change])


@pytest.mark.parametrize("kind", SMALLEST)
def test_every_key_says_what_it_is(kind: Any) -> None:
    schema = TypeAdapter(kind).json_schema()
    sections = {kind.__name__: schema, **schema["$defs"]}
    silent = [
        f"{section}.{name}"
        for section, content in sections.items()
        for name, value in content["properties"].items()
        if "description" not in value and "$ref" not in value
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2e2", 200.0), ("1.5e+1", 15.0), ("3", 3)]
)
def test_numbers_are_numbers_in_file_and_override(recipe: Path, text: str, value: float) -> None:
    written = write(recipe.parent, recipe.read_text() + f"train: {{lr: {text}}}\n")
    assert load_config(RunConfig, written).train.lr == value
    assert load_config(RunConfig, recipe, [f"train.lr={text}"]).train.lr == value
    untyped = load_config(RunConfig, recipe, [f"policy.options.learning_rate={text}"])
    assert untyped.policy.options == {"learning_rate": value}


def test_no_is_a_word_where_a_word_is_asked(recipe: Path) -> None:
    assert load_config(RunConfig, recipe, ["train.precision=no"]).train.precision == "no"


@pytest.mark.parametrize("date", ["2026-11-26", "2026-13-45"])
def test_a_date_is_a_word(recipe: Path, date: str) -> None:
    assert load_config(RunConfig, recipe, [f"name={date}"]).name == date
    written = write(recipe.parent, recipe.read_text() + f"name: {date}\n")
    config = load_config(RunConfig, written)
    assert config.name == date
    assert build_config(RunConfig, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
def test_true_and_false_are_booleans(recipe: Path, text: str, value: bool) -> None:
    assert (
        load_config(RunConfig, recipe, [f"train.channels_last={text}"]).train.channels_last is value
    )


def test_a_key_given_twice_is_refused(recipe: Path) -> None:
    twice = write(recipe.parent, recipe.read_text() + "train:\n  lr: 1\n  steps: 3\n  lr: 2\n")
    refuse(twice, r"line 5, column 3: key 'lr' appears twice in its section$")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "train:\n  steps: a: 3\n",
            "line 2, column 11: mapping values are not allowed here",
        ),
        (
            "train:\n\tsteps: 3\n",
            "line 2, column 1: found character '\\t' that cannot start any token",
        ),
        (
            "train:\n  steps 3\n  lr: 1\n",
            "line 3, column 5: mapping values are not allowed here",
        ),
        (
            "pairs: [1, 2\n\nname: a\n",
            "line 3, column 5: expected ',' or ']', but got ':', "
            "while parsing a flow sequence that begins at line 1, column 8",
        ),
    ],
)
def test_a_slip_in_the_syntax_is_one_line_with_its_place(
    tmp_path: Path, text: str, words: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(RunConfig, path)
    assert str(caught.value) == f"recipe {path} is not YAML: {words}"


def test_a_block_may_be_shared_by_anchor_and_merge(tmp_path: Path) -> None:
    shared = "pairs:\n- &a {student: layer3, teacher: mid_block}\n- {<<: *a, student: layer4}\n"
    pairs = load_config(RunConfig, write(tmp_path, shared)).pairs
    assert [(pair.student, pair.teacher) for pair in pairs] == [
        (["layer3"], "mid_block"),
        (["layer4"], "mid_block"),
    ]


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("train.steps=0", r"train\.steps: .*greater than or equal to 1, got 0"),
        ("train.ema=1", r"train\.ema: .*less than 1, got 1"),
        ("train.lr=.nan", r"train\.lr: .*got nan"),
        ("train.lr=.inf", r"train\.lr: .*got inf"),
        ("train.clip=0", r"train\.clip: .*greater than 0"),
        ("policy.bins=1001", r"policy\.bins: .*1000, got 1001"),
        ("seed=-1", "seed: .*greater than or equal to 0"),
        ("data.size=[64, 4]", r"data\.size\.1: .*greater than or equal to 8, got 4"),
        ("data.size=[64]", r"data\.size\.1 is missing"),
        ("train.arms=[]", r"train\.arms: .*at least 1 item"),
        ("train.arms=[distiled]", r"train\.arms\.0: .*'distilled', 'scratch' .*got 'distiled'"),
        ("train.optimizer=adam", r"train\.optimizer: .*'adamw', 'sgd' or 'momentum', got 'adam'"),
        ("pairs=[]", "pairs: .*at least 1 item"),
        ("train=5", "train: must be a section with keys, got 5"),
        ("train.lr=true", "override 'train.lr=true': train.lr: must be a number, got True"),
        ("train.channels_last=1", "train.channels_last: must be true or false, got 1"),
        ("train.arms=distilled", "must be a list, such as .distilled."),
        ("data.options={size:32}", "write a space after the colon of 'size:32'"),
    ],
)
def test_a_value_out_of_range_names_key_value_and_range(
    recipe: Path, override: str, pattern: str
) -> None:
    refuse(recipe, pattern, override)


def test_overrides_reach_sections_lists_and_free_options(recipe: Path) -> None:
    config = load_config(
        RunConfig,
        recipe,
        [
            "data.size=64",
            "teacher.image_size=[32, 48]",
            "train.arms=[scratch]",
            "pairs.0.weight=2",
            "data.options.train=9",
            "data.labelled=null",
            "train.unlabelled_batch=0",
            "name=other=name",
        ],
    )
    assert (config.data.size, config.teacher.image_size) == ((64, 64), (32, 48))
    assert (config.train.arms, config.train.unlabelled_batch) == (["scratch"], 0)
    assert (config.pairs[0].weight, config.pairs[0].student) == (2.0, ["layer4"])
    assert (config.data.options, config.data.labelled) == ({"train": 9}, None)
    assert config.name == "other=name"


def test_the_last_of_two_overrides_counts(recipe: Path) -> None:
    assert load_config(RunConfig, recipe, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "pattern"),
    [
        ("train.steps", f"override 'train.steps': expected {DOTTED}"),
        ("=3", f"override '=3': expected {DOTTED}"),
        ("pairs.1.weight=2", "override 'pairs.1.weight=2': no entry 1; the 1 entries count from 0"),
        ("pairs.first=2", "override 'pairs.first=2': no entry first; the 1 entries count from 0"),
        ("seed.a=1", "override 'seed.a=1': seed has no keys"),
        ("seed.a.b=1", "override 'seed.a.b=1': 'a' is below a value, not a section"),
        ("seed=[1", r"override 'seed=\[1': the value is not YAML"),
        ("seed=!!int x", "override 'seed=!!int x': the value is not YAML"),
        ("trian.steps=3", "unknown key 'trian'; did you mean 'train'"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(
    recipe: Path, override: str, pattern: str
) -> None:
    recipe = write(recipe.parent, recipe.read_text() + "seed: 1\n")
    refuse(recipe, pattern, override)


def test_the_run_takes_its_name_from_the_file_unless_it_has_one(recipe: Path) -> None:
    assert load_config(RunConfig, recipe).name == "recipe"
    assert load_config(RunConfig, recipe, ["name=mine"]).name == "mine"


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"pairs: [", "recipe.yaml is not YAML"),
        (b"\xff\xfe\x00", "recipe.yaml is not YAML"),
        (b"", "recipe.yaml: expected sections like `train:`, found None"),
        (b"- 1\n", "recipe.yaml: expected sections"),
        (b"seed: 1\n", "recipe.yaml: pairs is missing"),
        (b"pairs: [{student: layer4}]\n", r"pairs\.0\.teacher is missing"),
        (b"seed: !!int x\n", "recipe.yaml is not YAML"),
        (b"seed: !!python/object/apply:os.getpid []\n", "recipe.yaml is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, pattern: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    refuse(path, pattern)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refuse(tmp_path / "none.yaml", r"recipe .*none\.yaml: No such file")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            RunConfig,
            ["data.size=[64, 96]", "train.precision=no", "train.clip=null", "train.lr=1e-5"],
        ),
        (RunConfig, ["data.root=on", "name='1e3'", "data.options={a: [1, {b: null}]}"]),
        (TeacherTrainConfig, ["unet.attention_levels=[0, 1]", "lr=3e-4", "data.benchmark=images"]),
    ],
)
def test_the_resolved_recipe_gives_the_config_back(
    tmp_path: Path, kind: Any, changes: list[str]
) -> None:
    smallest = write(tmp_path, yaml.safe_dump(SMALLEST[kind] or {"seed": 1}))
    config = load_config(kind, smallest, changes)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(kind, tmp_path / "config.yaml") == config
    assert build_config(kind, to_tree(config)) == config


def test_the_resolved_recipe_states_every_key(recipe: Path) -> None:
    tree = yaml.safe_load(to_yaml(load_config(RunConfig, recipe)))
    for key, _ in keys(RunConfig):
        node = tree
        for name in key.split("."):
            node = node[int(name)] if name.isdigit() else node[name]


def test_a_config_cannot_be_changed(recipe: Path) -> None:
    config = load_config(RunConfig, recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3  # type: ignore[misc]
