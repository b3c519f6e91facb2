"""A run with its page, a reader for pages, and runs of which only the figures are left."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from distill.cli import main
from distill.config import RunConfig
from distill.recipe import load_config
from distill.studies.comparison import FinishedRun
from tests.distill.conftest import write_recipe

EXPERIMENTS = Path(__file__).resolve().parents[3] / "experiments"


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, tag: str, attribute: str) -> list[str | None]:
        return [found.get(attribute) for name, found in self.tags if name == tag]


def copied(run: Path, folder: Path, seed: int, score: float) -> Path:
    """The run once more as another seed's."""
    shutil.copytree(run, folder)
    for name, load, dump in (
        ("config.yaml", yaml.safe_load, yaml.safe_dump),
        ("summary.json", json.loads, json.dumps),
    ):
        content = load((folder / name).read_text()) | {"seed": seed}
        if "metrics" in content:
            content["metrics"]["distilled"]["miou"] = score
            content["metrics"]["scratch"]["miou"] = 0.1 + seed / 100
        (folder / name).write_text(dump(content))
    return folder


@pytest.fixture(scope="package")
def run(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy came to prefer something in its few steps, with its page."""
    recipe = write_recipe(tmp_path_factory.mktemp("report"), teacher_folder)
    seen = ["policy.context=image", "policy.image_size=4", "policy.options={learning_rate: 0.02}"]
    assert main(["train", str(recipe), *seen]) == 0
    folder = recipe.parent / "runs" / "tiny"
    assert main(["report", str(folder)]) == 0
    return folder


def taught(*changes: str, **distilled: object) -> FinishedRun:
    """What is left of a run of the quickstart's recipe, whose policy chose among 0, 333, 666."""
    bins = {"timesteps": [0, 333, 666], "noise_fraction": [0.0, 0.5, 0.9]}
    return FinishedRun(
        folder=Path("nowhere"),
        config=load_config(RunConfig, EXPERIMENTS / "quickstart.yaml", changes),
        summary={"task": "segmentation", "policy": bins | {"probabilities": [0.25, 0.5, 0.25]}},
        results={"distilled": {"policy": bins, "teacher": "of the run", **distilled}},
        rows=[{"arm": "distilled", "step": 1, "loss/feature": 2.0}],
    )
