"""What accompanies a figure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from distill import provenance
from distill.provenance import commit, hardware


def test_the_commit_is_a_hash_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", commit())
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "distill" / "provenance.py"))
    assert commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert commit() == "unknown"


def test_hardware_names_cores_their_arithmetic_and_threads() -> None:
    words = hardware(torch.device("cpu"))  # such as 2 CPU cores (x86_64, AVX512, AMX), 1 thread
    assert re.fullmatch(r"\d+ CPU cores \(\w+, [\w ]+(, AMX)?\), \d+ threads?", words)
