"""Foreign, damaged and hostile files are refused in one line, and run no code of their own."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.deployment.folder import load_student
from distill.deployment.formats import Deployed, describe, write
from distill.deployment.runtimes import load
from distill.errors import UserError

Edit = Callable[[bytes], bytes]


class Touch:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def changed(file: Path, to: Path, end: str, edit: Edit, more: Mapping[str, str] = {}) -> Path:
    """A copy of an archive with the content of the entries replaced whose names end so."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, edit(content) if name.endswith(end) else content)
        for name, text in more.items():
            new.writestr(f"{file.stem}/{name}", text)
    return to


def imports_by_its_container(content: bytes) -> bytes:
    """The inputs become an enumeration, whose class torch imports from any module."""
    graph = json.loads(content)
    signature = graph["graph_module"]["module_call_graph"][0]["signature"]
    spec = json.loads(signature["in_spec"])
    spec[1]["context"] = json.dumps({"__enum__": True, "fqn": "this:x", "name": "y"})
    signature["in_spec"] = json.dumps(spec)
    return json.dumps(graph).encode()


def test_a_pt2_file_that_brings_code_is_not_opened(exported: Path, tmp_path: Path) -> None:
    student, card = load_student(exported)
    model = Deployed(student, "segmenter")
    good, canary = tmp_path / "good.pt2", tmp_path / "canary"
    write(model, good, describe(model, card, "fp32"))
    load(changed(good, tmp_path / "same.pt2", "", lambda content: content))
    relu = rb"torch\.ops\.aten\.relu\w*\.default"
    odd = json.dumps({"config": {"x": {"path_name": "custom_obj_0", "use_pickle": False}}}).encode()
    graph = "models/model.json"
    bad: list[tuple[str, Edit]] = [
        ("sample_inputs/model.pt", lambda content: pickle.dumps(Touch(canary))),
        ("weights_config.json", lambda c: c.replace(b'_pickle": false', b'_pickle": true', 1)),
        ("constants_config.json", lambda content: odd),
        (graph, lambda c: re.sub(relu, b"torch.os.system", c)),
        (graph, lambda c: re.sub(relu, b"torch.ops.aten.from_file.default", c)),
        (graph, lambda c: c.replace(b'"expr_str": "', b'"expr_str": "open(', 1)),
        (graph, lambda c: c.replace(b'"images"', b'"images=open(7)"')),  # an argument's name
        (graph, imports_by_its_container),
    ]
    for end, edit in bad:
        file = changed(good, tmp_path / "bad.pt2", end, edit)
        assert file.read_bytes() != good.read_bytes()
        with pytest.raises(UserError, match=r"might run code of its own \(.*\); it is not opened"):
            load(file)
    more = {"models/more_config.json": json.dumps({"config": {}, "target": "torch.os.system"})}
    with pytest.raises(UserError, match="might run code of its own"):
        load(changed(good, tmp_path / "bad.pt2", "", lambda content: content, more))
    assert not canary.exists()


@pytest.mark.parametrize("suffix", [".ts", ".pt"])
def test_torchscript_is_a_program_and_opened_on_trust_alone(
    exported: Path, tmp_path: Path, suffix: str
) -> None:
    student, card = load_student(exported)
    model, file = Deployed(student, "segmenter"), tmp_path / "student.ts"
    write(model, file, describe(model, card, "fp32"))
    file = file.rename(tmp_path / f"student{suffix}")
    with pytest.raises(UserError, match="a program that may do anything to this machine"):
        load(file)
    assert load(file, trust=True).metadata["what"] == "segmenter"


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".ts", ".pt"])
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"broken{suffix}"
    file.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="is damaged or was not written by distill export"):
        load(file, trust=True)


def test_a_foreign_file_says_so(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), str(tmp_path / "foreign.pt"))
    with pytest.raises(UserError, match=r"was not written by distill export"):
        load(tmp_path / "foreign.pt", trust=True)
    with pytest.raises(UserError, match=r"there is no file"):
        load(tmp_path / "missing.onnx")
    (tmp_path / "x.pth").touch()
    with pytest.raises(UserError, match=r"is not an exported file: .onnx, .pt2, .ts, .pt"):
        load(tmp_path / "x.pth")
