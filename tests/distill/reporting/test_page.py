"""A page is one file that loads nothing, and what users wrote stays text in it."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.reporting.page import Code, Finding, Heading, Picture, Section, Table, Text, render

CHECKOUT = Path(__file__).resolve().parents[3]
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'


def test_names_from_files_are_escaped_everywhere(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"picture")
    blocks = [
        Text(HOSTILE),
        Heading(HOSTILE),
        Table(HOSTILE, [HOSTILE], [[HOSTILE, HOSTILE]]),
        Picture(tmp_path / "x.png", HOSTILE, HOSTILE),
        Code(HOSTILE, HOSTILE),
    ]
    section = Section("first", HOSTILE, blocks, [Finding(HOSTILE, HOSTILE)])
    page = render(HOSTILE, HOSTILE, [section])
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;") >= 14


def test_pictures_are_inlined(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    page = render("title", "", [Section("a", "A", [Picture(tmp_path / "x.png", "alt", "line")])])
    encoded = base64.b64encode(b"\x89PNG").decode()
    assert f'<img src="data:image/png;base64,{encoded}" alt="alt">' in page


def test_contents_lead_to_the_sections_and_findings_stand_by_recipe() -> None:
    sections = [
        Section("one", "One", findings=[Finding("a", "first"), Finding("b", "second")]),
        Section("two", "Two", findings=[Finding("a", "third")]),
    ]
    page = render("title", "lead", sections)
    assert re.findall(r'<a href="#(\w+)">', page) == ["one", "two"]
    assert re.findall(r'<h2 id="(\w+)">', page) == ["findings", "one", "two"]
    assert re.findall(r"<li>(\w+)</li>", page) == ["first", "third", "second"]


def test_the_template_is_part_of_the_wheel(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    build = (
        "from setuptools import Distribution\n"
        "packages = Distribution({'script_name': 'setup.py'})\n"
        "packages.parse_config_files()\n"
        "command = packages.get_command_obj('build_py')\n"
        f"command.build_lib = {str(tmp_path)!r}\n"
        "command.ensure_finalized()\n"
        "command.run()\n"
    )
    subprocess.run([sys.executable, "-c", build], cwd=CHECKOUT, check=True, capture_output=True)
    use = (
        "from distill.reporting import page\n"
        "print(page.__file__)\n"
        "print(page.render('title of it', '', []))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", use],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert output.startswith(str(tmp_path))
    assert "<h1>title of it</h1>" in output
