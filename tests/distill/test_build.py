"""From names to objects: what a benchmark's options may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.build import build_benchmark, open_data
from distill.config import DataConfig
from distill.errors import UserError


@pytest.mark.parametrize(
    ("benchmark", "options", "told"),
    [
        (
            "folder",
            {"classes": "cat,dog"},
            "data.options.classes: must be a list, such as [cat,dog], got",
        ),
        ("folder", {"classes": [0, 1]}, "data.options.classes.0: input should be a valid"),
        ("folder", {"num_classes": 2, "value_map": [0, 1]}, "data.options.value_map: input should"),
        ("folder", {"num_classes": 2, "value_map": {9: 0.5}}, "data.options.value_map.9: input"),
        ("folder", {"num_classes": 2, "split_seed": "a"}, "data.options.split_seed: input should"),
        ("shapes", {"size": "large"}, "data.options.size: input should be a valid integer"),
    ],
)
def test_an_option_of_another_type_is_named(
    tmp_path: Path, benchmark: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as caught:
        build_benchmark(DataConfig(benchmark=benchmark, root=str(tmp_path), options=options))
    assert str(caught.value).startswith(told)


def test_types_that_nobody_else_knows_are_left_to_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_types.py").write_text(
        "from __future__ import annotations\n"
        "class Mine: pass\n"
        "def odd(root, *, one: Mine): return one\n"
        "def lazy(root, *, one: Elsewhere): return one\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("odd", "lazy"):
        config = DataConfig(benchmark=f"own_types:{name}", options={"one": 1})
        assert open_data(config, "benchmarks") == 1
