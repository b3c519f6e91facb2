"""Looking at what somebody else has sent runs none of the code that its recipe names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.commands.report import write_report
from distill.config import RunConfig
from distill.errors import UserError
from distill.recipe import build_config, refuse_foreign
from distill.registry import is_own

Refuse = Callable[..., str]


def name_code(run: Path, **data: Any) -> None:
    """Change the data section of the run's recipe, and of its student's card."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"] |= data
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    card = json.loads((run / "student" / "student.json").read_text())
    card["recipe"]["data"] |= data
    (run / "student" / "student.json").write_text(json.dumps(card))


@pytest.fixture
def run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run below the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, "received")
    return Path("received")


@pytest.mark.parametrize(
    "words",
    [
        ["report", "received"],
        ["evaluate", "received"],
        ["evaluate", "received/student", "--protocol", "linear"],
        ["export", "received", "--out", "exported"],
        ["export", "received/student", "--format", "onnx", "--out", "student.onnx"],
        ["compare", "received", "received"],
        ["compare", "result.json", "result.json"],
    ],
)
def test_a_command_that_a_run_folder_names_is_not_run(
    run: Path, refuse: Refuse, words: list[str]
) -> None:
    name_code(run, benchmark="os:system", root="echo pwned > canary", options={})
    result = {"subject": "received", "recipe": yaml.safe_load((run / "config.yaml").read_text())}
    known = dict.fromkeys(("protocol", "benchmark", "split", "metric"), "any")
    known |= {"size": [32, 32], "figures": {"miou": 0.5}}
    Path("result.json").write_text(json.dumps(known | result))
    before = sorted(Path().iterdir())
    line = refuse(*words)
    assert "its recipe has data.benchmark=os:system, which is not a file of yours" in line
    assert line.endswith("if you trust it, add data.benchmark=os:system")
    assert sorted(Path().iterdir()) == before


OWN = """
from distill.benchmarks.shapes import Shapes


def other(root, **options):
    return Shapes(root, **options)
"""


def test_a_file_of_ones_own_is_followed_and_other_code_once_it_is_trusted(
    run: Path, refuse: Refuse, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Path("own_below.py").write_text(OWN)
    name_code(run, benchmark="own_below:other")
    assert "page written to" in write_report(["received"])
    assert "Asked about 3 validation images" in (run / "report.html").read_text()

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "own_elsewhere.py").write_text(OWN)
    monkeypatch.syspath_prepend(elsewhere)
    name_code(run, benchmark="own_elsewhere:other")
    assert "add data.benchmark=own_elsewhere:other" in refuse("report", run)
    write_report(["received"], ["data.benchmark=own_elsewhere:other"])
    assert "Asked about 3 validation images" in (run / "report.html").read_text()


def test_what_is_received_installed_or_not_there_is_not_ones_own(run: Path) -> None:
    for path in ("own_file.py", "own_folder/part.py", "received/evil.py", "sent/evil.py"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    Path("packed").mkdir()
    Path("packed", "__init__.py").touch()
    run.rename("sent/run")
    assert is_own("own_file:X", Path("sent/run"))
    assert is_own("own_folder.part:X", Path("sent/run"))
    assert is_own("packed:X", Path("sent/run"))
    assert not is_own("packed.run:X", Path("packed"))
    assert not is_own("packed.part:X", Path("packed/run"))  # a folder that came with the run in it
    assert not is_own("sent.run.evil:X", Path("sent/run"))
    assert not is_own("sent.evil:X", Path("sent/run"))
    for name in ("os:system", "sys:exit", "torch:load", "json.tool:main", "nowhere:X", ":X"):
        assert not is_own(name, Path("sent/run")), name


def test_a_virtual_environment_below_the_working_directory_is_not_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "own_installed.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(packages)
    assert not is_own("own_installed:X", tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("data.benchmark", {"data": {"benchmark": "os:system"}}),
        ("teacher.name", {"teacher": {"name": "os:system"}}),
        ("policy.name", {"policy": {"name": "os:system"}}),
        (
            "pairs.0.loss",
            {"pairs": [{"student": "layer4", "teacher": "mid_block", "loss": "os:system"}]},
        ),
        (
            "teacher.options.members.a.name",
            {"teacher": {"name": "ensemble", "options": {"members": {"a": {"name": "os:system"}}}}},
        ),
    ],
)
def test_every_key_that_names_code_is_looked_at(key: str, change: dict[str, Any]) -> None:
    pair = {"student": "layer4", "teacher": "mid_block"}
    config = build_config(RunConfig, {"pairs": [pair]} | change)
    with pytest.raises(UserError, match=f"if you trust it, add {key}=os:system"):
        refuse_foreign(config, ["data.root=x"], Path("run"))
    refuse_foreign(config, [f"{key}=os:system"], Path("run"))
