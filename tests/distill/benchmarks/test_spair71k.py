"""SPair-71k in miniature: its layout, its pixels' centres, and what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.benchmarks.spair71k import SPair71k
from distill.commands.evaluate import evaluate_subject
from distill.errors import UserError

ENTRY = {
    "filename": "000001-a-b",
    "src_imname": "a.jpg",
    "trg_imname": "b.jpg",
    "src_imsize": [20, 10, 3],
    "trg_imsize": [16, 12, 3],
    "src_bndbox": [0, 0, 19, 9],
    "trg_bndbox": [1, 2, 15, 11],
    "category": "cat",
    "src_kps": [[3, 4], [19, 9]],
    "trg_kps": [[5, 6], [0, 0]],
    "kps_ids": ["0", "7"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One pair a split, in the layout of the archive."""
    base = tmp_path / "SPair-71k"
    (base / "JPEGImages/cat").mkdir(parents=True)
    for name, size in (("a.jpg", (20, 10)), ("b.jpg", (16, 12))):
        Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(
            base / "JPEGImages/cat" / name
        )
    for folder in ("trn", "val", "test"):
        (base / "PairAnnotation" / folder).mkdir(parents=True)
        (base / "PairAnnotation" / folder / "000001-a-b:cat.json").write_text(json.dumps(ENTRY))
    return tmp_path


def test_a_pair_has_its_images_points_and_box(root: Path) -> None:
    for place in (root, root / "SPair-71k"):
        pairs = SPair71k(str(place)).pairs("train")
        assert len(pairs) == 1
        pair = pairs[0]
        assert pair.names == ("cat/a.jpg", "cat/b.jpg")
        assert (pair.source.shape, pair.target.shape) == ((3, 10, 20), (3, 12, 16))
        assert pair.source.dtype == torch.uint8
        assert pair.source_points.tolist() == [[3.5, 4.5], [19.5, 9.5]]  # the centres of pixels
        assert pair.target_points.tolist() == [[5.5, 6.5], [0.5, 0.5]]
        assert pair.box.tolist() == [1.0, 2.0, 15.0, 11.0]
        assert pair.category == "cat"


def test_another_number_of_pairs_than_published_is_said(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SPair71k(str(root)).pairs("test")
    err = capsys.readouterr().err
    assert err.startswith("distill: spair71k: test has 1 of 12234 pairs; scores will not compare")
    assert err.count("\n") == 1


@pytest.mark.parametrize("part", ["JPEGImages", "PairAnnotation", "PairAnnotation/test"])
def test_a_missing_part_shows_the_tree_and_the_source(root: Path, part: str) -> None:
    shutil.rmtree(root / "SPair-71k" / part)
    with pytest.raises(UserError) as caught:
        SPair71k(str(root)).pairs("test")
    line = str(caught.value)
    assert line.startswith("spair71k: there is no ")
    assert part in line
    assert "expected in data.root=FOLDER: PairAnnotation/{trn,val,test}/*.json" in line
    assert "get it from the data set's page at cvlab.postech.ac.kr" in line


def refused(root: Path, **changes: Any) -> str:
    file = root / "SPair-71k/PairAnnotation/val/000001-a-b:cat.json"
    file.write_text(json.dumps({**ENTRY, **changes}))
    with pytest.raises(UserError) as caught:
        SPair71k(str(root)).pairs("val")[0]
    return str(caught.value)


def test_a_damaged_annotation_is_named(root: Path) -> None:
    named = "val/000001-a-b:cat.json"
    assert "expected rows of 2 numbers" in refused(root, src_kps=[[1, 2, 3]])
    assert "at least one, got 2 and 1" in refused(root, trg_kps=[[5, 6]])
    for changes in ({"trg_bndbox": None}, {"trg_kps": "none"}, {"trg_bndbox": [1, 2]}):
        assert named in refused(root, **changes)
    assert "cat/c.jpg" in refused(root, trg_imname="c.jpg")
    file = root / "SPair-71k/PairAnnotation/val/000001-a-b:cat.json"
    file.write_text(json.dumps({key: ENTRY[key] for key in ENTRY if key != "trg_kps"}))
    with pytest.raises(UserError, match="no 'trg_kps'"):
        SPair71k(str(root)).pairs("val")[0]


def test_an_unknown_split_names_the_nearest(root: Path) -> None:
    with pytest.raises(UserError, match="no split 'tests'; did you mean 'test'"):
        SPair71k(str(root)).pairs("tests")


def test_without_a_root_the_key_is_named() -> None:
    with pytest.raises(UserError, match=r"^spair71k: no folder given; .*data\.root=FOLDER"):
        SPair71k(None)


def test_images_of_several_sizes_are_evaluated(root: Path) -> None:
    changes = [f"data.root={root}", "data.size=32"]
    result, _ = evaluate_subject("timm:test_resnet:scratch", changes, "correspondence", "spair71k")
    assert result["scores"]["category"].keys() == {"cat"}
    assert result["details"]["pairs"] == 1


def test_hidden_files_are_no_pairs(root: Path) -> None:
    for file in list(root.rglob("*.json")):
        file.with_name(f"._{file.name}").write_bytes(b"as in some archives")
    assert len(SPair71k(str(root)).pairs("val")) == 1
