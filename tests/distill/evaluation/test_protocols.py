"""The protocols learn what can be learnt, leave the backbone alone, and choose on val."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from distill.cli import main
from distill.commands.evaluate import evaluate_subject, subject_recipe
from distill.errors import UserError
from distill.evaluation.linear import LinearProbe, fit
from distill.evaluation.neighbours import NearestNeighbours, pooled
from distill.evaluation.protocols import label_counts
from distill.matching.losses import task_loss


class Colours:
    """A backbone of two maps that are the image itself, at two resolutions."""

    layers, parameters = ("coarse", "fine"), 0
    channels = {"coarse": 3, "fine": 3}  # noqa: RUF012

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        return {"coarse": torch.nn.functional.avg_pool2d(images, 4), "fine": images}


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose red pixels are class 1 and whose blue ones are class 2; some have no label."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 3, (count, 8, 8), generator=generator)
    images = 0.1 * torch.rand(count, 3, 8, 8, generator=generator)
    images[:, 0] += 0.8 * (masks == 1)
    images[:, 2] += 0.8 * (masks == 2)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = 255
    return images, masks


def test_heads_of_several_rates_learn_side_by_side_as_they_would_alone() -> None:
    data = [scenes(4, seed) for seed in range(40)]
    rates = [1e-6, 3e-2]
    probe = LinearProbe(Colours(), rates, 3, dense=True, seed=0)  # type: ignore[arg-type]
    fit(probe, data, steps=len(data), loss=task_loss)
    alone = LinearProbe(Colours(), rates[1:], 3, dense=True, seed=0)  # type: ignore[arg-type]
    fit(alone, data, steps=len(data), loss=task_loss)
    images, masks = scenes(8, 99)
    with torch.no_grad():
        slow, fast = probe(images)
        assert torch.allclose(fast, alone(images)[0], atol=1e-6)
    known = masks != 255
    assert (fast.argmax(1) == masks)[known].float().mean() > 0.95
    assert (slow.argmax(1) == masks)[known].float().mean() < 0.8
    chosen = probe.keep_best("miou", [0.2, 0.9])
    assert chosen == {"lr": 3e-2, "chosen_on": "val", "val": {"1e-06": 0.2, "0.03": 0.9}}
    with torch.no_grad():
        assert torch.equal(probe(images)[0], fast)


def test_the_head_of_classes_reads_pooled_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, 8, 8, generator=generator)
    classes = images.mean((2, 3)).argmax(1)
    probe = LinearProbe(Colours(), [3e-2], 3, dense=False, seed=0)  # type: ignore[arg-type]
    fit(probe, [(images, classes)] * 150, steps=150, loss=task_loss)
    with torch.no_grad():
        assert probe(images)[0].shape == (32, 3)
        assert (probe(images)[0].argmax(1) == classes).float().mean() > 0.95


def test_neighbours_vote_as_scikit_learns_do() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(60, 3, 8, 8, generator=generator)
    images[:, :, 0, 0] += 20 * torch.rand(60, 3, generator=generator)
    classes = torch.randint(0, 4, (60,), generator=generator)
    backbone: Any = Colours()
    voters = NearestNeighbours(
        backbone, [(images[:40], classes[:40])], classes=4, neighbours=7, temperature=0.07
    )
    features = pooled(backbone, images).double().numpy()

    def weigh(distances: Any) -> Any:  # cosine distance to DINO's weight
        return torch.exp((1 - torch.as_tensor(distances)) / 0.07).numpy()

    reference = KNeighborsClassifier(7, weights=weigh, metric="cosine")
    reference.fit(features[:40], classes[:40])
    expected = torch.from_numpy(reference.predict_proba(features[40:])).float()
    assert torch.allclose(voters(images[40:]).exp(), expected, atol=1e-4)


def test_fewer_images_than_neighbours_all_vote() -> None:
    images = torch.rand(3, 3, 8, 8)
    backbone: Any = Colours()
    labelled = [(images, torch.tensor([0, 1, 1]))]
    voters = NearestNeighbours(backbone, labelled, classes=2, neighbours=20, temperature=0.07)
    assert voters.neighbours == 3
    assert torch.allclose(voters(images).exp().sum(1), torch.ones(3))


def test_numbers_of_labels_are_numbers_shares_or_all() -> None:
    assert label_counts([20, "1/8", "1/16", "all", 20], 160) == [10, 20, 160]
    assert label_counts(["1/16"], 3) == [1]
    with pytest.raises(UserError, match="50 requested, but there are 40 training images"):
        label_counts([50], 40)


def evaluated(subject: object, protocol: str, *changes: str) -> SimpleNamespace:
    return SimpleNamespace(**evaluate_subject(str(subject), changes, protocol)[0])


SMALL = ("evaluate.steps=3", "evaluate.lrs=[1e-3, 3e-2]", "evaluate.train_batch=4")
SHAPES = "data={benchmark: shapes, options: {size: 32, train: 16, val: 3, test: 5}}"


def test_one_protocol_takes_students_teachers_and_others(
    finished_run: Path, teacher_folder: Path
) -> None:
    for subject in (
        f"{finished_run},layers=layer3+layer4",
        f"teacher:{teacher_folder},layers=up_blocks.0,timestep=100",
        "timm:test_resnet:scratch",
    ):
        result = evaluated(subject, "linear", SHAPES, *SMALL)
        val = result.details["val"]
        assert max(val.values()) == val[str(result.details["lr"])]
        assert result.figures["miou"] == result.scores["miou"]
        assert len(result.layers) == 1 + subject.count("+")
    again = evaluated(subject, "linear", SHAPES, *SMALL)
    assert again.scores == result.scores


def test_what_a_student_was_distilled_on_plays_no_part_on_other_data(finished_run: Path) -> None:
    """Its recipe has 12 unlabelled images, more than there are here."""
    fewer = "data.options={size: 32, train: 8, val: 3, test: 5}"
    assert evaluated(finished_run, "linear", fewer, *SMALL).labelled == 6
    few = ["evaluate.labels=[2]", "evaluate.splits=1"]
    assert "2" in evaluated(finished_run, "label_efficient", fewer, *SMALL, *few).choices


def test_labels_that_a_student_has_seen_are_told(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--protocol", "label_efficient", "evaluate.labels=[2]", "evaluate.splits=1", *SMALL]
    assert main(["evaluate", str(finished_run), *few, "data.labelled=3"]) == 0
    assert capsys.readouterr().out.endswith("note: this student was trained on 6 labels before\n")
    assert main(["evaluate", "timm:test_resnet:scratch", *few, SHAPES]) == 0
    assert "note:" not in capsys.readouterr().out


def test_fine_tuning_starts_from_the_subjects_weights_and_fits(finished_run: Path) -> None:
    """On its own training images, with time, a whole network beats what it began with by far."""
    train = [SHAPES, "evaluate.split=train", "data.augment=none", "train.batch=16"]
    steps = ["train.lr=0.003", "train.warmup=1", "train.ema=0"]
    accuracy = []
    for count in (1, 40):
        result = evaluated(finished_run, "finetune", *train, *steps, f"train.steps={count}")
        assert result.details == {"head": "fpn", "steps": count}
        assert result.recipe["train"]["lr_schedule"] == "poly"
        assert result.recipe["student"]["init_from"] == str(finished_run / "student")
        accuracy.append(result.scores["pixel_accuracy"])
    assert accuracy[1] > accuracy[0] + 0.1


def test_what_fine_tuning_cannot_do_is_refused_before_it_starts() -> None:
    small = (SHAPES, "train.steps=1", "train.warmup=1")
    for changes, pattern in (
        (["train.batch=4", "train.accumulate=3"], "are not divisible by train.accumulate=3"),
        (["train.batch=auto", "device=cpu"], "auto needs a GPU to measure"),
    ):
        with pytest.raises(UserError, match=pattern):
            evaluated("timm:test_resnet:scratch", "finetune", *small, *changes)
    with pytest.raises(UserError, match=r"layers=layer3 names maps to read, but --protocol fine"):
        evaluated("timm:test_resnet:scratch,layers=layer3", "finetune", *small)


def test_fine_tuning_with_a_second_head_gives_another_student(classes: str) -> None:
    changes = (SHAPES, "train.steps=2", "train.batch=2", "train.warmup=1")
    results = [
        evaluated("timm:test_resnet:scratch", "finetune", *changes, f"train.auxiliary={weight}")
        for weight in (0, 5)
    ]
    assert results[0].scores != results[1].scores
    other = ("finetune", f"data.benchmark={classes}", "train.batch=2", "train.auxiliary=0.4")
    with pytest.raises(UserError, match=r"train.auxiliary: .* colours has classes of whole images"):
        evaluated("timm:test_resnet:scratch", *other)


def test_windows_and_flips_are_no_matter_of_fine_tuning() -> None:
    changes = (SHAPES, "train.steps=1", "train.batch=2", "train.warmup=1", "evaluate.window=16")
    assert evaluated("timm:test_resnet:scratch", "finetune", *changes).scores


@pytest.mark.parametrize("head", ["upernet", "deeplabv3plus", "segformer"])
def test_fine_tuning_takes_decoders_of_the_library(head: str) -> None:
    changes = (SHAPES, f"student.head={head}", "train.steps=1", "train.batch=2", "train.warmup=1")
    result = evaluated("timm:test_resnet:scratch", "finetune", *changes)
    assert result.details["head"] == head


def test_few_labels_are_chosen_several_times_and_named() -> None:
    changes = (SHAPES, *SMALL, "evaluate.labels=[3, 1/4, all]", "evaluate.splits=2")
    result = evaluated("timm:test_resnet:scratch", "label_efficient", *changes)
    assert list(result.choices) == ["3", "4", "16"]
    assert [len(choices) for choices in result.choices.values()] == [2, 2, 1]
    three, four, all_of_them = result.choices.values()
    assert all(len(choice["names"]) == 3 for choice in three)
    assert three[0]["names"] != three[1]["names"]
    assert set(three[0]["names"]) < set(four[0]["names"])  # a smaller choice is part of a larger
    assert all_of_them[0]["names"] is None  # all of them
    spread = result.intervals["miou at 3"]
    assert spread["low"] <= result.figures["miou at 3"] <= spread["high"]
    assert result.intervals["miou at 16"] is None


def test_finetune_trains_all_subjects_alike_whatever_a_students_recipe_says(
    finished_run: Path, tmp_path: Path
) -> None:
    card = json.loads((finished_run / "student" / "student.json").read_text())
    card["recipe"]["train"] |= {
        **{"optimizer": "momentum", "weight_decay": 1e-4, "decay_all": True, "clip": None},
        **{"ema": 0.999, "accumulate": 2, "lr_schedule": "step", "lr": 0.1},
    }
    (tmp_path / "student.json").write_text(json.dumps(card))
    trained = [
        dataclasses.asdict(subject_recipe(subject, [], "finetune", None)[1].train)
        for subject in (str(tmp_path), "timm:test_resnet:scratch")
    ]
    beside = {"precision", "channels_last", "log_every", "checkpoint_every"}  # do not teach
    mine, timms = ({k: v for k, v in train.items() if k not in beside} for train in trained)
    assert mine == timms


@pytest.fixture
def classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A benchmark of one's own: red, green and blue images."""
    (tmp_path / "own_colours.py").write_text(
        "import numpy as np, torch\n"
        "class Colours:\n"
        "    name, task, ignore_index = 'colours', 'classification', 255\n"
        "    class_names, num_classes = ('red', 'green', 'blue'), 3\n"
        "    palette = np.eye(3, dtype=np.uint8) * 255\n"
        "    def __init__(self, root): pass\n"
        "    def dataset(self, split):\n"
        "        seed = ('train', 'val', 'test').index(split)\n"
        "        generator = torch.Generator().manual_seed(seed)\n"
        "        images = torch.randint(0, 90, (12, 3, 32, 32), generator=generator).byte()\n"
        "        for index in range(12): images[index, index % 3] += 120\n"
        "        return [(image, index % 3) for index, image in enumerate(images)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_colours:Colours"


def test_neighbours_and_linear_classify_images(classes: str, tmp_path: Path) -> None:
    changes = (f"data.benchmark={classes}", "data.augment=none", "evaluate.lrs=[3e-2]")
    for protocol in ("knn", "linear"):
        result = evaluated("timm:test_resnet:scratch", protocol, *changes, "evaluate.steps=40")
        assert result.metric == "top1"
        assert result.scores["top1"] > 0.9


def test_windows_have_no_meaning_for_classes_of_images(classes: str) -> None:
    changes = (f"data.benchmark={classes}", "evaluate.window=16")
    with pytest.raises(UserError, match=r"evaluate.window: colours has classes of whole images"):
        evaluated("timm:test_resnet:scratch", "linear", *changes)


def test_classes_have_pictures_too(classes: str, tmp_path: Path) -> None:
    words = ["timm:test_resnet:scratch", "--protocol", "knn", "--benchmark", classes]
    assert main(["evaluate", *words, "--out", str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a-overlays.png").exists()
    assert (tmp_path / "a-confusion.png").exists()
