"""What the documents promise: recipes that load, commands that parse, files that exist."""

from __future__ import annotations

import configparser
import hashlib
import json
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torchvision.utils import save_image

from distill.arguments import build_parser
from distill.cli import main
from distill.config import RunConfig
from distill.intervals import Interval
from distill.pretraining.card import WEIGHTS
from distill.pretraining.pipeline import save_pipeline
from distill.recipe import apply_override, load_config
from distill.studies.study import load_study, run_folder
from distill.teacher_config import TeacherTrainConfig
from teachers.ddpm import build_unet

CHECKOUT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    *sorted(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md")),
)
STUDIES = sorted((CHECKOUT / "experiments" / "studies").glob("*.yaml"))
TEACHERS = sorted(
    path.parent for path in (CHECKOUT / "teachers" / "pretrained").glob("*/README.md")
)
RECIPES = sorted({*(CHECKOUT / "experiments").rglob("*.yaml")} - {*STUDIES})


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language in a document."""
    text = (CHECKOUT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for document in DOCUMENTS
    for block in blocks(document, "bash")
    for line in block.splitlines()
    if line.startswith("distill ")
]


def kind_of(recipe: Path) -> type[RunConfig] | type[TeacherTrainConfig]:
    return TeacherTrainConfig if recipe.parent.name == "teachers" else RunConfig


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda path: path.name)
def test_embedded_teacher_is_the_one_of_its_card(teacher, tmp_path):
    card, weights = (teacher / "README.md").read_text(), teacher / WEIGHTS
    assert weights.stat().st_size < 16 * 2**20
    assert f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`" in card
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.findall(r"^```yaml\n(.*?)^```", card, re.DOTALL | re.MULTILINE)[0])
    unet = DDPMPipeline.from_pretrained(teacher).unet
    asked = load_config(TeacherTrainConfig, recipe).unet
    assert unet.config["block_out_channels"] == asked.block_out_channels


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(recipe):
    load_config(kind_of(recipe), recipe)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_study_loads(study):
    loaded = load_study(study)
    # No recipe has its own run where a study has its runs.
    assert loaded.folder not in {run_folder(load_config(kind_of(path), path)) for path in RECIPES}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_in_a_document_is_understood(words, tmp_path):
    options, rest = build_parser().parse_known_args(words)
    overrides = [*getattr(options, "overrides", ()), *rest]
    for override in overrides:
        apply_override({"pairs": [{}]}, override)
    if (getattr(options, "recipe", None) or "").startswith("experiments/"):
        recipe = CHECKOUT / options.recipe
        load_config(kind_of(recipe), recipe, overrides)
    if hasattr(options, "study"):
        load_study(CHECKOUT / options.study, overrides)


def test_documents_have_commands():
    assert {words[0] for words in COMMANDS} >= {"train", "evaluate", "export", "teacher", "list"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_a_document_exist(document):
    path = CHECKOUT / document
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not re.match("https?:|#", link)]
    files = re.findall(r"`((?:distill|teachers|students|rl_policy|tests)/[\w/]+\.py)`", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [file for file in files if not (CHECKOUT / file).exists()]
    assert missing == []


@pytest.mark.parametrize(
    ("document", "folder"),
    [("README.md", "experiments/results/"), ("experiments/README.md", "results/")],
)
def test_results_in_the_readme_are_those_of_the_studies(document, folder):
    path = CHECKOUT / document
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in path.read_text().splitlines()
        if line.startswith("| ")
    ]
    header = next(row for row in rows if f"({folder}" in row[-1])
    links = [re.findall(rf"\(({folder}[\w-]+)\.md\)", cell) for cell in header[1:]]
    studies = [json.loads((path.parent / f"{name}.json").read_text()) for (name,) in links]
    below = rows[rows.index(header) + 1 :]
    for label, *cells in takewhile(lambda row: "`" in row[0], below):
        names = re.findall(r"`(\w+)`", label)
        for study, cell in zip(studies, cells, strict=True):
            (arm,) = [study["arms"][name] for name in names if name in study["arms"]] or [None]
            if arm is None:
                assert cell == "not run"
                continue
            is_gain = names != ["scratch"]
            told = arm["gain_over_scratch"] if is_gain else arm[study["metric"]]
            assert cell == str(Interval(told["mean"], told["low"], told["high"])), label


def test_gains_at_the_top_of_the_readme_are_those_of_its_table():
    text = (CHECKOUT / "README.md").read_text()
    headline, table = text.split("## Results", maxsplit=1)
    (row,) = re.findall(r"^\| `a2c` \(default policy.*$", table, re.MULTILINE)
    gains = [cell.strip() for cell in row.strip("|").split("|")[1:]]
    assert re.findall(r"\*\*(\d+\.\d \([^)]*\))\*\*", headline) == gains


def test_changelog_names_the_version():
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    first = re.search(r"^## .*$", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert setup["metadata"]["version"] in first.group()


def test_parts_of_ones_own_work_as_the_document_shows(tmp_path, monkeypatch, capsys):
    source = next(
        block for block in blocks("docs/extending.md", "python") if "class Averaged" in block
    )
    (tmp_path / "document_parts.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    unet = build_unet(image_size=16, block_out_channels=[8, 8])
    save_pipeline(unet, DDPMScheduler(), tmp_path / "teacher")
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (tmp_path / "classes" / split / name).mkdir(parents=True)
        image = torch.full((3, 40, 48), 0.2 if name == "a" else 0.8)
        save_image(image, tmp_path / "classes" / split / name / "0.png")
    (tmp_path / "own.yaml").write_text(
        "pairs: [{student: layer2, teacher: mid_block, loss: 'document_parts:power'}]\n"
        f"teacher: {{name: 'document_parts:Averaged', path: {tmp_path / 'teacher'}}}\n"
        "policy: {name: 'document_parts:LowNoise', bins: 5}\n"
        f"data: {{benchmark: 'document_parts:Classes', root: {tmp_path / 'classes'}, size: 32}}\n"
        "train: {steps: 2, batch: 2, unlabelled_batch: 2, arms: [distilled]}\n"
    )
    assert main(["train", str(tmp_path / "own.yaml"), "--dry-run"]) == 0
    assert (
        "classes, 2 images with labels, 2 to distil on, labelled ones included, of 32x32 px"
        in capsys.readouterr().out
    )
