"""`distill predict`: what it writes, and what it does with files that it cannot read."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.cli import main
from distill.commands import predict
from distill.data import as_float
from distill.deployment.folder import export_student, load_student, read_card
from distill.deployment.formats import Deployed, describe, write
from distill.drawing.overlays import blend, indexed, overlay
from distill.evaluation.counting import predicted_classes
from students.heads import resize_logits
from students.student import Student

Refuse = Callable[..., str]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two images of 48x40 px in folders inside of each other, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "a" / "b").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a/one.png", "a/b/two.jpg"):
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").touch()
    return folder


def test_masks_are_the_students_at_the_images_own_size(
    finished_run: Path, exported: Path, pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert main(["predict", str(finished_run), str(pictures), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"2 images predicted into {out}\n"
    assert "predict 2/2" in captured.err
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) == [
        "masks/a/b/two.png",
        "masks/a/one.png",
        "overlays/a/b/two.png",
        "overlays/a/one.png",
    ]
    student, card = load_student(exported)
    pixels = torch.from_numpy(np.array(Image.open(pictures / "a" / "one.png"))).permute(2, 0, 1)
    small = predict.F.resize(pixels, [32, 32], antialias=True)
    with torch.no_grad():
        logits = resize_logits(student(as_float(small)[None])[0], (32, 32))[0]
    mask = Image.open(out / "masks" / "a" / "one.png")
    assert (mask.mode, mask.size) == ("P", (48, 40))
    assert np.array_equal(np.array(mask), predicted_classes(logits, (40, 48)).numpy())
    palette = mask.getpalette()
    assert palette is not None
    assert palette[3:6] == list(card.palette[1])


def test_photographs_are_predicted_as_people_see_them(
    finished_run: Path, pictures: Path, tmp_path: Path
) -> None:
    image, exif = Image.open(pictures / "a" / "one.png"), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(pictures / "a" / "turned.png", exif=exif)
    out = tmp_path / "out"
    assert main(["predict", str(finished_run), str(pictures / "a"), "--out", str(out)]) == 0
    for kind in ("masks", "overlays"):
        turned, one = (out / kind / f"{name}.png" for name in ("turned", "one"))
        assert turned.read_bytes() == one.read_bytes()


def test_an_exported_file_predicts_the_same(
    finished_run: Path, exported: Path, pictures: Path, tmp_path: Path
) -> None:
    student, card = load_student(exported)
    deployed, file = Deployed(student, "segmenter"), tmp_path / "student.ts"
    write(deployed, file, describe(deployed, card, "fp32"))
    for model, out in ((finished_run, "one"), (file, "two")):
        words = ["predict", str(model), str(pictures), "--out", str(tmp_path / out), "--trust"]
        assert main(words) == 0
    for name in ("masks/a/one.png", "overlays/a/b/two.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_classes_and_probabilities_go_into_tables(
    exported: Path, pictures: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = Student("test_resnet", classes=3, dense=False, image_size=(32, 32)).eval()
    card = dataclasses.replace(
        read_card(exported), classes=3, dense=False, kwargs={}, layers=(), head_layers=(),
        class_names=("cat", "dog, wet", "cow"), palette=(),
    )  # fmt: skip
    export_student(student, card, tmp_path / "classifier")
    images = sorted(map(str, pictures.rglob("*.*g")))
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path / "classifier"), *images, "--out", str(out)]) == 0
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == images
    for row in rows:
        shares = {name: float(row[name]) for name in card.class_names}
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
        assert row["class"] == max(shares, key=lambda name: shares[name])
        assert float(row["probability"]) == max(shares.values())
    tree = json.loads((out / "predictions.json").read_text())
    assert tree[images[0]]["class"] == rows[0]["class"]
    assert main(["predict", str(tmp_path / "classifier"), *images, "--out", str(out)]) == 2


def test_unreadable_images_are_named_and_the_others_done(
    finished_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "a" / "bad.png").write_bytes(b"nothing")
    out = tmp_path / "out"
    assert main(["predict", str(finished_run), str(pictures), "--out", str(out)]) == 2
    skipped, *_, last = capsys.readouterr().err.splitlines()
    assert skipped.startswith(f"skipped {pictures / 'a' / 'bad.png'}: cannot be decoded")
    assert last == (
        f"distill: error: 1 of 3 images could not be read: {pictures / 'a' / 'bad.png'}; "
        f"the results of the other 2 are in {out}"
    )
    assert len(list(out.rglob("*.png"))) == 4
    bad = pictures / "a" / "bad.png"
    assert main(["predict", str(finished_run), str(bad), "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.endswith(f"not be read: {bad}; nothing was written\n")
    assert not (tmp_path / "none").exists()


def test_results_are_replaced_only_with_force(
    finished_run: Path, pictures: Path, tmp_path: Path, refuse: Refuse
) -> None:
    out = tmp_path / "out"
    words = ["predict", str(finished_run), str(pictures / "a" / "one.png"), "--out", str(out)]
    assert main(words) == 0
    (out / "masks" / "one.png").write_bytes(b"mine")
    line = refuse(*words)
    assert (
        line
        == f"{out}/masks/one.png and 1 more exist; replace with --force, or choose another --out"
    )
    assert (out / "masks" / "one.png").read_bytes() == b"mine"
    assert main([*words, "--force"]) == 0
    assert Image.open(out / "masks" / "one.png").size == (48, 40)


def test_an_interrupt_leaves_no_half_written_file(
    finished_run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Image.Image, file: object, format: str) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    words = ["predict", str(finished_run), str(pictures), "--out", str(tmp_path / "out")]
    assert main(words) == 130
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_mistakes_are_one_line_before_anything_is_written(
    finished_run: Path, exported: Path, pictures: Path, tmp_path: Path, refuse: Refuse
) -> None:
    out = ["--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    assert "there is no image" in refuse("predict", finished_run, tmp_path / "none.png", *out)
    assert "contains no images (.bmp" in refuse("predict", finished_run, tmp_path / "empty", *out)
    Image.new("RGB", (8, 8)).save(pictures / "a" / "one.bmp")
    line = refuse("predict", finished_run, pictures, *out)
    assert line.endswith("a/one.png have the same name; predict them separately")
    assert "contains no exported student" in refuse("predict", tmp_path / "empty", pictures, *out)
    assert "there is no file or folder runs/typo" in refuse("predict", "runs/typo", pictures, *out)
    (tmp_path / "x.pth").touch()
    assert "is not an exported file" in refuse("predict", tmp_path / "x.pth", pictures, *out)
    student, card = load_student(exported)
    backbone, file = Deployed(student, "backbone"), tmp_path / "backbone.pt2"
    write(backbone, file, describe(backbone, card, "fp32"))
    assert "returns features; export" in refuse("predict", file, pictures / "a" / "b", *out)
    script = tmp_path / "script.ts"
    script.touch()
    assert "open it with --trust" in refuse("predict", script, pictures / "a" / "b", *out)
    assert not (tmp_path / "out").exists()
    words = ("predict", finished_run, pictures / "a" / "b", "--out", pictures / "notes.txt")
    assert "notes.txt is not a writable directory" in refuse(*words)


def test_a_dot_in_a_name_makes_two_images_not_one(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("frame.001.png", "frame.002.png", ".hidden.png", ".cache/frame.003.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    out = tmp_path / "out"
    assert main(["predict", str(finished_run), str(tmp_path / "in"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"2 images predicted into {out}\n"
    masks = sorted(path.name for path in (out / "masks").iterdir())
    assert masks == ["frame.001.png", "frame.002.png"]


@pytest.mark.parametrize("place", ["results", "."])
def test_results_among_the_images_are_not_predicted_themselves(
    finished_run: Path, pictures: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = pictures / place
    for _ in range(2):
        words = ["predict", str(finished_run), str(pictures), "--out", str(out), "--force"]
        assert main(words) == 0
        assert capsys.readouterr().out == f"2 images predicted into {out}\n"
    assert len(list(pictures.rglob("*.png"))) == 1 + 2 * 2


def test_an_image_named_twice_is_predicted_once(pictures: Path) -> None:
    found = predict.find_pictures([str(pictures / "a"), str(pictures / "a" / "b" / "two.jpg")])
    assert [str(picture.name) for picture in found] == ["b/two", "one"]


def test_a_dark_image_stays_recognisable_under_its_classes_and_bare_where_it_has_none() -> None:
    ramp = np.linspace(0, 30, 256).astype(np.uint8)
    dark = np.repeat(np.tile(ramp, (40, 1))[..., None], 3, axis=2)
    mask = np.full((40, 256), 255, dtype=np.uint8)
    mask[20:] = 0
    bare, under = (np.asarray(blend(dark, mask, [(100, 0, 0)]), dtype=int)[y] for y in (5, 35))
    assert bare[:, 0].max() - bare[:, 0].min() > 240
    assert (bare == bare[:, :1]).all()  # grey
    assert 0.5 * 255 < bare.mean() < 0.7 * 255
    # Half the grey shows, half the colour.
    assert np.abs(2 * under - bare - np.array([100, 0, 0])).max() <= 1


def test_an_overlay_mixes_colours_and_lists_the_classes_that_occur() -> None:
    """Half the pixels of a 300x10 image are class 1, whose red mixes with black."""
    mask = np.zeros((10, 300), dtype=np.uint8)
    mask[:, 150:] = 1
    palette = [(0, 0, 0), (200, 0, 0), (0, 200, 0)]
    shown = overlay(
        np.zeros((10, 300, 3), dtype=np.uint8), mask, ("ground", "car", "tree"), palette
    )
    assert shown.getpixel((10, 5)) == (0, 0, 0)
    assert shown.getpixel((290, 5)) == (100, 0, 0)
    # Their common outline is a pixel wide on each side, in the pure colours.
    assert [shown.getpixel((x, 5))[0] for x in (149, 150, 151)] == [0, 200, 100]
    assert shown.width > 300
    assert shown.height == 50  # two rows of the legend
    colours = {shown.getpixel((x, y)) for x in range(310, 326) for y in range(50)}
    assert (200, 0, 0) in colours
    assert (0, 200, 0) not in colours
    assert indexed(mask, palette).convert("RGB").getpixel((299, 0)) == (200, 0, 0)
