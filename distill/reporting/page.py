"""A page for a reader: sections of text, tables and pictures as one HTML file that needs no other.

Text is escaped by the template, so that names from users' files stay text; pictures are inlined.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Heading:
    """The heading of a part of a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Table:
    """Rows below a head; the first cell of each names it."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows, in words for those who cannot see it, and a line below."""

    kind: ClassVar[str] = "picture"
    path: Path
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The whole picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Code:
    """Lines as they are, such as a recipe."""

    kind: ClassVar[str] = "code"
    label: str
    text: str


class Finding(NamedTuple):
    """A sentence for the top of the page, and which of several recipes it is about, or nothing."""

    about: str
    text: str


Block = Text | Heading | Table | Picture | Code


@dataclass
class Section:
    """A part of the page with an entry in its table of contents, filled bit by bit."""

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """Its conclusions, for the top of the page."""


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as HTML.

    Args:
        title: Of the page.
        lead: A line below it.
        sections: In their order.
    """
    environment = Environment(
        loader=PackageLoader("distill.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    findings: dict[str, list[str]] = {}
    for finding in (finding for section in sections for finding in section.findings):
        findings.setdefault(finding.about, []).append(finding.text)
    return environment.get_template("page.html").render(
        title=title, lead=lead, sections=sections, findings=findings
    )
