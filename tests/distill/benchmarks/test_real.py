"""The real data sets beside the checkout, every image and mask once; skipped where they are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import jaccard_score

from distill.benchmarks.camvid import camvid
from distill.benchmarks.cifar10 import cifar10
from distill.benchmarks.folder import Folder
from distill.benchmarks.oxford_pets import oxford_pets
from distill.metrics import ConfusionMatrix, segmentation_scores

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "unpack.py").exists(), reason="no shared/data")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, DATA / "unpack.py", folder], check=True, capture_output=True)
    return folder


def values(benchmark: Any, split: str) -> set[int]:
    """All targets of a split; reading them checks every file."""
    found: set[int] = set()
    for index in range(len(examples := benchmark.dataset(split))):
        found |= set(examples[index][1].flatten().bincount().nonzero().flatten().tolist())
    return found


def test_scores_of_real_masks_agree_with_scikit_learn(unpacked: Path) -> None:
    """Each mask is scored as a prediction of the frame before it."""
    masks = [camvid(str(unpacked / "camvid")).dataset("test")[index][1] for index in range(8)]
    matrix = ConfusionMatrix(11, 255)
    truth, guess = torch.stack(masks[:-1]).flatten(), torch.stack(masks[1:]).flatten()
    guess = guess.where(guess != 255, 0)
    matrix.update(guess, truth)
    scores = segmentation_scores(matrix.counts)
    labelled = truth != 255
    truth, guess = truth[labelled], guess[labelled]
    present = sorted(set(truth.tolist()) | set(guess.tolist()))
    expected = jaccard_score(truth, guess, labels=present, average="macro", zero_division=0)
    assert scores.miou == pytest.approx(expected, abs=1e-6)
    right = (truth == guess).double().mean().item()
    assert scores.pixel_accuracy == pytest.approx(right, abs=1e-6)


def test_camvid_is_complete(unpacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = camvid(str(unpacked / "camvid"))
    assert capsys.readouterr().err == ""
    assert [len(benchmark.dataset(split)) for split in benchmark.splits] == [367, 101, 233]
    for split in benchmark.splits:
        assert values(benchmark, split) == {*range(11), 255}


def test_three_breeds_of_the_pets_are_said_to_be_few(
    unpacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = oxford_pets(str(unpacked / "pets"))
    assert "of 3312 images" in capsys.readouterr().err
    assert sum(len(benchmark.dataset(split)) for split in benchmark.splits) == 598  # as listed
    for split in benchmark.splits:
        assert values(benchmark, split) == {0, 1, 255}


def test_nuclei_are_read_as_a_folder_of_ones_own(unpacked: Path) -> None:
    benchmark = Folder(str(unpacked / "nuclei"), classes=["background", "nucleus", "border"])
    for split in ("train", "val", "test"):
        assert values(benchmark, split) == {0, 1, 2}
    assert sum(len(benchmark.dataset(split)) for split in ("train", "val", "test")) == 664


def test_cifar10_is_complete(unpacked: Path) -> None:
    benchmark = cifar10(str(unpacked / "cifar10"))
    assert [len(benchmark.dataset(split)) for split in ("train", "val", "test")] == [
        *(45_000, 5_000, 10_000)
    ]
    test = benchmark.dataset("test")
    assert sorted(set(test.targets)) == list(range(10))
    assert all(test.targets.count(number) == 1_000 for number in range(10))
