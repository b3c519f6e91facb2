"""`distill report` writes a page that needs nothing else and says what the run folders say."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from distill.cli import main
from distill.commands.report import write_report
from distill.reporting import training
from distill.reporting.page import Table, Text
from distill.reporting.policy import _nothing_to_map, _preference
from distill.reporting.results import DRAWN, _classes
from distill.reporting.training import _operations
from distill.studies.comparison import Group, group_runs, read_run
from tests.distill.reporting.conftest import Reader, copied, taught

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECTIONS = ["results", "policy", "regret", "losses", "cost", "making"]


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text()


def test_a_single_runs_page_lies_in_its_folder_with_all_sections(run: Path, page: str) -> None:
    reader = Reader(page)
    assert re.findall(r'<h2 id="(\w+)">', page) == ["findings", *SECTIONS]
    links = [link for link in reader.values("a", "href") if link]
    assert links == [f"#{name}" for name in SECTIONS]
    summary = json.loads((run / "summary.json").read_text())
    assert f"{100 * summary['metrics']['distilled']['miou']:.1f}" in reader.text
    assert "One run has one seed, so that there is no interval" in reader.text
    assert f"distill train {run / 'config.yaml'} name=tiny-again" in reader.text
    for told in (summary["hardware"], summary["commit"][:12], "labelled: 6", "distill probe"):
        assert told in reader.text, told
    assert "Asked about 3 validation images, as the student of step 5 sees them" in reader.text
    pictures = sorted(path.name for path in (run / "report-pictures").iterdir())
    assert pictures == [
        *("classes-policy.png", "classes.png", "curves.png", "floor.png", "images.png"),
        *("policy-trend.png", "policy.png"),
    ]


def test_the_page_loads_nothing_and_describes_its_pictures(page: str) -> None:
    reader = Reader(page)
    sources = [value for _, found in reader.tags for value in (found.get("src"),) if value]
    assert len(sources) == 8  # and the run's own predictions.png
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(len(alt or "") > 10 for alt in reader.values("img", "alt"))
    assert reader.values("link", "href") == ["data:,"]
    assert not {"script", "iframe", "object"} & {tag for tag, _ in reader.tags}
    assert "url(" not in page
    assert "@import" not in page


def test_of_a_policy_that_prefers_nothing_the_page_says_why_and_draws_nothing(
    finished_run: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    write_report([str(finished_run)], html=str(page))
    text = Reader(page.read_text()).text
    assert "The policy (a2c) stayed diffuse" in text
    assert "chose all 4 timesteps alike, or nearly so, from the first to the last step" in text
    assert "It chose in 5 steps only; policies take some hundreds to learn." in text
    assert "the image decides less than 1% of the choice" in text
    assert "Images for which the policy prefers" not in text
    pictures = {path.name for path in (tmp_path / "page-pictures").iterdir()}
    assert pictures == {"classes.png", "curves.png", "floor.png"}


@pytest.mark.parametrize(
    ("name", "distributions", "words"),
    [
        ("uniform", [[0.25] * 4] * 5, "It is a yardstick that learns nothing."),
        ("fixed", [[0.0, 1.0, 0.0, 0.0]] * 5, "chose the same from the first to the last step: t="),
        ("a2c", [[0.4, 0.2, 0.2, 0.2]] * 2, "The log has 2 rows of the policy, too few for a map"),
    ],
)
def test_a_policy_without_a_course_is_told_in_words(
    run: Path, name: str, distributions: list[list[float]], words: str
) -> None:
    finished = read_run(run)
    rows = [
        {"arm": "distilled", "step": step, "probabilities": shares}
        for step, shares in enumerate(distributions, 1)
    ]
    late = finished.summary["policy"] | {"name": name, "probabilities": distributions[-1]}
    summary = finished.summary | {"policy": late}
    assert words in _nothing_to_map(dataclasses.replace(finished, rows=rows, summary=summary))
    assert _nothing_to_map(finished) == ""


def test_names_of_a_run_stay_text(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a&b $x_{"
    shutil.copytree(run, folder)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(
        yaml.safe_dump(tree | {"name": "<script>alert(1)</script>"})
    )
    result = folder / "checkpoints" / "distilled" / "result.json"
    content = json.loads(result.read_text())
    content["scores"]["iou"] = {"$\\frac{<img src=x>": 0.5}
    result.write_text(json.dumps(content))
    write_report([str(folder)], ["data.options={size: 64}"])
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "$\\frac{&lt;img src=x&gt;" in page


def test_without_the_data_the_page_says_so_and_has_the_rest(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    words = ["data.benchmark=cifar10", f"data.root={tmp_path / 'nowhere'}", "data.options={}"]
    assert main(["report", str(run), *words, "--html", str(page)]) == 0
    assert f"page written to {page}" in capsys.readouterr().out
    text = page.read_text()
    assert "What the policy prefers by class and by image cannot be shown: " in text
    assert "nowhere" in text
    assert re.findall(r'<h2 id="(\w+)">', text) == ["findings", *SECTIONS]
    assert not (tmp_path / "page-pictures" / "images.png").exists()


def test_several_seeds_and_recipes_are_compared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [copied(run, tmp_path / f"s{i}", i, 0.3 + 0.01 * i) for i in (1, 2)]
    folders.append(copied(run, tmp_path / "other", 1, 0.25))
    tree = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    tree["train"]["lr"] = 0.5
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(tree))
    page = tmp_path / "all.html"
    assert main(["report", *map(str, folders), "--html", str(page)]) == 0
    assert "| train.lr=0.001 | distilled | 31.0, 32.0 |" in capsys.readouterr().out
    reader = Reader(page.read_text())
    # 20 points over scratch with both seeds; the other recipe 6 below in the seed they share
    assert "Distilled is above scratch by 20.0 (20.0 to 20.0) points, paired over 2" in reader.text
    assert "-6.0 (one seed)" in reader.text
    assert "What the recipes differ in" in reader.text
    assert (tmp_path / "all-pictures" / "2-policy.png").is_file()


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ([0.02, 0.9, 0.08], "the policy (a2c) settled on t=333 (noise fraction 0.50): "),
        ([0.0, 0.56, 0.44], "the policy (a2c) leans to t=333 (noise fraction 0.50), without"),
    ],
)
def test_a_policy_between_two_timesteps_has_not_settled(shares: list[float], words: str) -> None:
    run = taught()
    late = run.summary["policy"] | {"name": "a2c", "probabilities": shares, "effective_arms": 2}
    run = dataclasses.replace(run, summary=run.summary | {"policy": late})
    assert _preference(Group("", (run,))).startswith(words)


def test_a_policy_with_one_timestep_is_not_called_diffuse() -> None:
    run = taught()
    one = {"timesteps": [333], "noise_fraction": [0.5], "probabilities": [1.0]}
    late = run.summary["policy"] | one | {"name": "a2c", "effective_arms": 1.0}
    run = dataclasses.replace(run, summary=run.summary | {"policy": late})
    said = _preference(Group("", (run,)))
    assert said == "the policy (a2c) had t=333 (noise fraction 0.50) alone"


def test_the_floor_beside_the_last_feature_loss_is_that_of_the_last_timesteps(
    tmp_path: Path,
) -> None:
    pairs = ("a", "b", "c")
    floor = {
        "mean": dict.fromkeys(pairs, 0.7),
        "bins": {pair: [0.8, 0.2, None] for pair in pairs},
    }
    blocks, findings = training._floor(taught(noise_floor=floor), tmp_path / "floor.png")
    # A pair: (0.25 x 0.8 + 0.5 x 0.2) / 0.75, as of the last timestep nothing is known
    texts = [block.text for block in blocks if isinstance(block, Text)]
    assert texts[0].startswith("Feature loss at the end: 2.000, of which noise alone would leave ")
    assert "leave 1.200 at the timesteps preferred then, both summed" in texts[0]
    assert findings == ["the feature loss ended at 2.00, of which the targets' noise makes 1.20"]
    mixing = taught("policy.name=soft_mix", noise_floor=floor)
    _, findings = training._floor(mixing, tmp_path / "floor.png")
    assert findings == ["the feature loss ended at 2.00, of which the targets' noise makes 2.10"]


@pytest.mark.parametrize(
    ("rewards", "row"),
    [
        # 3 x 100 images x 2 GFLOP and 70 looks x 5 GFLOP
        ({"teacher_task": 1}, ["distilled", "2.000", "5.000", "9.000", "70", "0.95"]),
        # and 2 x 4 labelled images in each of 4 steps, forward alone
        ({"student_progress": 1}, ["distilled", "2.000", "5.000", "9.000", "70", "1.01"]),
    ],
)
def test_operations_of_training_are_those_that_were_counted(
    finished_run: Path, rewards: dict[str, float], row: list[str]
) -> None:
    run = read_run(finished_run)
    counted = {"student": 2 * 10**9, "teacher": 5 * 10**9, "teacher_whole": 9 * 10**9}
    result = {"images_per_second": 10.0, "seconds": 10.0, "flops": counted, "teacher_images": 70}
    config = dataclasses.replace(
        run.config,
        policy=dataclasses.replace(run.config.policy, rewards=rewards),
        train=dataclasses.replace(run.config.train, finetune_steps=1),
    )
    without = counted | {"teacher": None, "teacher_whole": None}
    results = {"distilled": result, "scratch": result | {"flops": without, "teacher_images": 0}}
    table = _operations(dataclasses.replace(run, config=config, results=results))
    assert isinstance(table, Table)
    assert table.rows == [row, ["scratch", "2.000", "–", "–", "0", "0.60"]]


def test_grid_is_a_yardstick(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    shutil.copytree(run, folder)
    summary = json.loads((folder / "summary.json").read_text())
    summary["policy"] |= {"name": "grid", "probabilities": [0, 1, 0, 0], "effective_arms": 1}
    (folder / "summary.json").write_text(json.dumps(summary))
    (group,) = group_runs([read_run(folder)])
    assert _preference(group).startswith("the policy is grid, a yardstick that learns nothing")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["policy.bins=5"], "only data.KEY=value can be set"),
        (["data.rot=x"], "unknown key 'data.rot'; did you mean 'data.root'?"),
        (["--html", "page.png"], "--html: page.png must be an HTML file, such as report.html"),
        (["--probe", "nowhere"], "--probe: "),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(refuse, finished_run, words, line):
    before = sorted(finished_run.iterdir())
    assert line in refuse("report", finished_run, *words)
    assert sorted(finished_run.iterdir()) == before


def test_a_page_that_cannot_be_written_is_named_before_the_figures_are(
    refuse: Any, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, access = tmp_path / "figures.json", os.access
    monkeypatch.setattr(os, "access", lambda at, mode: at != finished_run and access(at, mode))
    line = refuse("report", finished_run, "--out", figures)
    assert line.startswith(f"--html: cannot write to {finished_run}: {finished_run} is not")
    assert line.endswith("; choose another place")
    (tmp_path / "page.html").mkdir()
    assert "Is a directory" in refuse(
        "report", finished_run, "--html", tmp_path / "page.html", "--out", figures
    )
    assert not figures.exists()


def test_a_probe_without_a_page_is_refused(refuse, finished_run, tmp_path):
    other = copied(finished_run, tmp_path / "other", 3, 0.5)
    assert "give --html PAGE.html" in refuse("report", finished_run, other, "--probe", tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
def test_a_browser_shows_the_page_without_complaint(run: Path, tmp_path: Path) -> None:
    assert BROWSER
    shot = tmp_path / "shot.png"
    finished = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--window-size=500,1600", f"--screenshot={shot}"),
            (run / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [line for line in finished.stderr.splitlines() if "CONSOLE" in line] == []
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (1600, 500, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    # Text or pictures all the way down, and none cut off at the right edge.
    rows = (pixels != pixels[-1, -1]).any(-1).any(-1).reshape(16, -1).any(-1)
    assert rows.all()
    assert (pixels[:, -10:] == pixels[-1, -1]).all()


def test_more_classes_than_a_browser_shows_are_a_table_alone(tmp_path: Path) -> None:
    rows = {f"class {number}": 0.5 for number in range(DRAWN + 1)}
    first = SimpleNamespace(results={"scratch": {}}, by_class=lambda arm: rows)
    group: Any = SimpleNamespace(first=first, runs=(first,), metric="top1")
    (table,) = _classes([group], group, tmp_path)
    assert isinstance(table, Table)
    assert len(table.rows) == DRAWN + 1
    assert list(tmp_path.iterdir()) == []
