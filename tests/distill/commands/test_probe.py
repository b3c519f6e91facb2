"""`distill probe`: a planted layer and timestep are found, and the rest of its promises."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from distill import checkpoint
from distill.cli import main
from distill.commands import probe as command
from distill.config import RunConfig
from distill.data import choose_labelled
from distill.probing.files import best_recipe
from rl_policy import ENVIRONMENT_ID
from teachers.noise import NoiseSchedule

Refuse = Callable[..., str]
Load = Callable[..., RunConfig]

PLANTED = '''
"""A teacher that tells the class in one layer, at middle noise, and a benchmark of brightness."""
import torch
from diffusers import DDPMScheduler

from distill.benchmarks import distinct_colours
from teachers.noise import NoiseSchedule


class Planted:
    name, fingerprint = "planted", "0" * 64
    reductions = {"first": 4, "second": 8}
    noise_schedule = NoiseSchedule.variance_preserving(DDPMScheduler().alphas_cumprod, "epsilon")

    def __init__(self, path, *, layers, random_weights, signal=True, still=False, **view):
        if still:
            self.noise_schedule = NoiseSchedule.without_noise()
        self.layers, self.channels = tuple(layers), dict.fromkeys(layers, 6)
        self.signal = signal and random_weights is None

    def features(self, images, timesteps, generator=None, labels=None):
        maps, each = {}, torch.arange(len(images))
        here = (timesteps > 100) & (timesteps < 900)
        shade = (images.mean((1, 2, 3))[:, None] * 255 - torch.tensor([60, 120, 180])).abs() < 9
        for name in self.layers:
            noise = torch.randn(len(images), 11, 6, generator=generator)
            x = noise[each, timesteps % 11]  # another part of it at another timestep
            if self.signal and name == "second":
                x[:, :3] += 20 * shade * here[:, None]
            side = images.shape[-1] // self.reductions[name]
            maps[name] = x[:, :, None, None].expand(-1, -1, side, side).clone()
        return maps

    def to(self, device):
        return self


class Brightness:
    name, task, ignore_index = "brightness", "classification", 255
    num_classes, class_names, palette = 3, ("dark", "grey", "bright"), distinct_colours(3)

    def __init__(self, root, *, val=40):
        self.val = val

    def dataset(self, split):
        return Shades(self.val if split == "val" else 60)


class Shades:
    def __init__(self, count):
        self.targets = [index % 3 for index in range(count)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        target = self.targets[index]
        return torch.full((3, 32, 32), 60 + 60 * target, dtype=torch.uint8), target
'''


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with the planted teacher and its benchmark."""
    (tmp_path / "survey_parts.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    tree = {
        "output": str(tmp_path / "runs"),
        "device": "cpu",
        "data": {"benchmark": "survey_parts:Brightness"},
        "teacher": {"name": "survey_parts:Planted", "path": ""},
        "student": {"model": "test_resnet"},
        "pairs": [
            {"student": "layer2", "teacher": "first"},
            {"student": "layer3", "teacher": "second", "loss": "cosine"},
        ],
        "policy": {"name": "a2c", "bins": 4, "spacing": "log_snr", "reward_layer": "first"},
        "train": {"steps": 2, "batch": 4, "unlabelled_batch": 4, "warmup": 1},
    }
    path = tmp_path / "planted.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def probe(recipe: Path, *words: object) -> dict[str, Any]:
    """The figures of a map that is written beside the recipe's runs."""
    assert main(["probe", str(recipe), *map(str, words)]) == 0
    out = words[words.index("--out") + 1] if "--out" in words else None
    folder = Path(str(out)) if out else recipe.parent / "runs" / f"{recipe.stem}-probe"
    return json.loads((folder / "probe.json").read_text())  # type: ignore[no-any-return]


def test_a_planted_layer_and_timestep_are_found(
    planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = probe(planted, "--timesteps", 3)
    folder = planted.parent / "runs" / "planted-probe"
    assert found["layers"] == ["first", "second"]
    assert (found["timesteps"][0], found["timesteps"][2]) == (0, 999)
    assert found["noise_fraction"][1] == pytest.approx(0.5, abs=0.01)
    best = found["best"]
    assert (best["layer"], best["timestep"]) == ("second", found["timesteps"][1])
    assert best["score"] == 1
    others = [*found["score"][0], found["score"][1][0], found["score"][1][2], *found["random"][1]]
    assert max(others) < 0.65
    room = found["head_room"]["second"]
    assert room["fixed_timestep"] == found["timesteps"][1]
    assert room["fixed_gain"][1] > 0.5
    assert room["honest_gain"][1] <= 0
    out = capsys.readouterr().out
    assert f"best: second at t={best['timestep']}, 100.0; random weights there" in out
    lines = (folder / "probe.csv").read_text().splitlines()
    assert lines[0] == "layer,timestep,noise_fraction,log_snr,score,random,effective_rank"
    assert len(lines) == 1 + 2 * 3
    assert lines[5].startswith(f"second,{best['timestep']},0.5")
    assert (folder / "probe.png").read_bytes()[:4] == b"\x89PNG"


def test_a_teacher_that_knows_nothing_leaves_no_head_room(planted: Path) -> None:
    many = "data.options={val: 900}"
    found = probe(planted, many, "teacher.options={signal: false}", "--timesteps", 4)
    for room in found["head_room"].values():
        assert room["fixed"][0] == pytest.approx(-math.log(3), abs=0.1)
        assert room["honest_gain"][0] < 0.03
        assert room["oracle_gain"][1] > 0 < room["chance"][1]


def test_repetitions_have_their_own_noise_and_random_weights(planted: Path, tmp_path: Path) -> None:
    once = probe(planted, "--timesteps", 3, "--out", tmp_path / "once")
    twice = probe(planted, "--timesteps", 3, "--repeats", 2)
    first, second = np.array(twice["score_by_seed"])
    assert first.tolist() == once["score"]
    assert (first != second).any()
    np.testing.assert_allclose(twice["score"], (first + second) / 2)
    control = 2 * np.array(twice["random"]) - once["random"]  # of the second repetition
    assert (control != np.array(once["random"])).any()
    np.testing.assert_allclose(40 * control, (40 * control).round(), atol=1e-9)  # 40 val images


def test_the_best_cell_trains(planted: Path) -> None:
    found = probe(planted, "--timesteps", 3)
    best = planted.parent / "runs" / "planted-probe" / "best.yaml"
    tree = yaml.safe_load(best.read_text())
    timestep = found["best"]["timestep"]
    assert [pair["teacher"] for pair in tree["pairs"]] == ["second", "second"]
    assert tree["pairs"][1]["loss"] == "cosine"
    assert main(["train", str(best), "data.options={val: 4}"]) == 0
    summary = json.loads((planted.parent / "runs/planted-best/summary.json").read_text())
    assert summary["policy"]["timesteps"] == [timestep]


def test_the_table_replays_in_the_environment(planted: Path) -> None:
    found = probe(planted, "--timesteps", 3, "--images", 30)
    file = planted.parent / "runs" / "planted-probe" / "table.safetensors"
    table = safetensors.torch.load_file(file)
    assert {name: tuple(x.shape) for name, x in table.items()} == {
        "rewards": (30, 3),
        "timesteps": (3,),
        "contexts": (30, 192),
    }
    assert table["rewards"].dtype == table["contexts"].dtype == torch.float32
    assert table["timesteps"].tolist() == found["timesteps"]
    means = table["rewards"].mean(0)
    assert means[1].item() == pytest.approx(found["head_room"]["second"]["fixed"][0])
    assert means.mean().item() == pytest.approx(found["head_room"]["second"]["uniform"][0])
    environment = gymnasium.make(ENVIRONMENT_ID, source=str(file))
    context, info = environment.reset(seed=0)
    assert set(np.round(255 * context)) <= {60, 120, 180}
    assert environment.step(1)[1] == pytest.approx(table["rewards"][info["image"], 1].item())


@pytest.fixture
def whole(recipe: Path) -> list[object]:
    """A quick look at the tiny UNet and segmentation, all layers of its table."""
    return [recipe, "data.labelled=10", "data.options.val=6", "--timesteps", 2, "evaluate.batch=4"]


def test_a_stopped_and_resumed_map_equals_an_uninterrupted_one(
    whole: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = probe(*whole, "--out", tmp_path / "whole")  # type: ignore[arg-type]
    assert "mid_block" in expected["layers"]
    assert expected["metric"] == "mIoU"
    measure, calls = command.measure, []

    def interrupted(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*arguments, **more)

    monkeypatch.setattr(command, "measure", interrupted)
    words = ["probe", *map(str, whole), "--out", str(tmp_path / "stopped")]
    capsys.readouterr()
    assert main(words) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "distill: stopped with 1 of 4 columns of the map; continue with --resume"
    assert len(calls) == 2
    resumed = probe(*whole, "--out", tmp_path / "stopped", "--resume")  # type: ignore[arg-type]
    assert len(calls) == 2 + 3
    assert resumed == expected
    for name in ("probe.csv", "table.safetensors"):
        parts = [(tmp_path / which / name).read_bytes() for which in ("whole", "stopped")]
        assert parts[0] == parts[1]


def test_other_settings_are_not_gone_on_with(planted: Path, refuse: Refuse) -> None:
    probe(planted, "--timesteps", 2, "--images", 20)
    line = refuse("probe", planted, "--timesteps", 2, "--images", 30, "--resume")
    assert "state.pt was made with another images: [20, 20], but now it is [30, 30]; use" in line
    line = refuse("probe", planted, "--timesteps", 2, "data.labelled=20", "--resume")
    assert "state.pt was made with another data.labelled: None, but now it is 20; use" in line
    assert "planted-probe exists; continue with --resume" in refuse("probe", planted)
    checkpoint.save(next(planted.parent.rglob("state.pt")), {"step": 3})
    line = refuse("probe", planted, "--timesteps", 2, "--images", 20, "--resume")
    assert line.endswith("state.pt is another kind of checkpoint: it has no 'settings'")


def test_the_best_recipe_of_an_ensemble_has_the_members_of_its_layer(load: Load) -> None:
    options = "teacher.options={members: {a: {name: x, path: x}, b: {name: x, path: x}}}"
    config = load("teacher.name=ensemble", "teacher.path=''", options)
    found = SimpleNamespace(best_layer="b/mid+b/up", best_timestep=5)
    best = best_recipe(config, found)  # type: ignore[arg-type]
    assert best.teacher.options == {"members": {"b": {"name": "x", "path": "x"}}}
    assert config.teacher.options["members"].keys() == {"a", "b"}


def test_the_best_recipe_fits_the_channels_of_its_layer(load: Load) -> None:
    config = load("pairs.0.projector=none", "pairs.0.teacher=mid_block")
    for layer, projector in (("mid_block", "none"), ("up_blocks.0", "auto")):
        found = SimpleNamespace(best_layer=layer, best_timestep=5)
        best = best_recipe(config, found)  # type: ignore[arg-type]
        assert (best.pairs[0].teacher, best.pairs[0].projector) == (layer, projector)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--timesteps", "0"], "--timesteps: must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats: must be at least 1, got 0"),
        (["--timesteps", "few"], "argument --timesteps: invalid int value: 'few'"),
        (["--images", "4"], "data.labelled, or --images: must be at least 5"),
        (["--layers", "mid_blok"], "--layers: no layer 'mid_blok'; did you mean 'mid_block'?"),
        (
            ["--layers", "mid_block", "data.size=9"],
            "data.size, or teacher.image_size: image size 9x9",
        ),
        (["--probe", "logistic"], "--probe logistic: masks have too many positions"),
        (["--resume"], "there is no run "),
        (["data.options.val=0"], "val"),
        (["data.labelled=4"], "data.labelled, or --images: must be at least 5"),
        (["teacher.options={a: 1}"], "unknown key 'teacher.options.a'"),
    ],
)
def test_mistakes_are_one_line(
    recipe: Path, words: list[str], part: str, refuse: Refuse, tmp_path: Path
) -> None:
    assert part in refuse("probe", recipe, "data.labelled=10", *words)
    assert not (tmp_path / "runs").exists()


def test_a_probe_without_images_to_score_it_on_says_where_they_come_from(
    planted: Path, refuse: Refuse
) -> None:
    line = refuse("probe", planted, "data.options.val=0")
    assert line.endswith(
        "no val images to score the probe on; hold some out of train with data.options.val"
    )


def test_timesteps_that_coincide_count_once_and_logistic_probes_images(planted: Path) -> None:
    found = probe(
        planted, "--layers", "second", "--timesteps", 3, "--probe", "logistic", "--images", 30
    )
    assert found["layers"] == ["second"]
    assert found["best"]["score"] == 1
    short = NoiseSchedule.variance_preserving(torch.tensor([0.9, 0.5, 0.1]), "epsilon")
    assert command._timesteps(short, 5).tolist() == [0, 1, 2]


def test_a_teacher_without_timesteps_has_one_column(
    planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = probe(planted, "teacher.options={still: true}", "--images", 20)
    assert "--timesteps 12: 1 of the teacher's 1 are measured" in capsys.readouterr().err
    assert (found["timesteps"], found["noise_fraction"], found["log_snr"]) == ([0], [0], [None])
    assert found["head_room"]["second"]["oracle_gain"] == [0, 0, 0]
    best = planted.parent / "runs" / "planted-probe" / "best.yaml"
    assert main(["train", str(best), "--dry-run"]) == 0


def test_the_held_out_images_are_of_all_classes_alike() -> None:
    targets = torch.randint(10, (5000,), generator=torch.Generator().manual_seed(1)).tolist()
    chosen = choose_labelled(len(targets), 1000, 0, targets)
    for seed in range(5):
        fit, held = command._split(chosen, seed)
        assert sorted(fit + held) == sorted(chosen)
        counts = torch.bincount(torch.tensor([targets[index] for index in held]), minlength=10)
        assert counts.sum() == 200
        assert counts.min() >= 8  # 20 are expected, with a spread of 4
        assert counts.max() <= 34
