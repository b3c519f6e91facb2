"""`distill demo`: the command as a process of its own, asked as a browser asks it."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.cli import main
from distill.commands.demo import look
from distill.commands.predict import open_model
from distill.deployment.folder import export_student, load_student, read_card
from distill.deployment.formats import Deployed, describe, write
from distill.deployment.runtimes import ModelFile
from students.student import Student

Refuse = Callable[..., str]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_demo = pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra demo")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 48x40 px, the same lying on its side with a note to turn it, and a text."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    (folder / "bad.png").write_bytes(b"nothing")
    Image.fromarray(pixels[..., 0].astype(np.uint16)).save(folder / "deep.png")
    return folder


def served(model: Path, uploads: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page's address, and the process behind it."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "distill.cli", "demo", str(model), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(uploads)},
        # A shell's background jobs, such as these tests may be, are born deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout
        told = process.stdout.readline()
        assert told == f"{model} at http://127.0.0.1:{port}; press Ctrl-C to stop\n"
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def segmenter(
    finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    yield from served(finished_run, tmp_path_factory.mktemp("uploads"))


def ask(url: str, image: Path) -> Any:
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False, download_files=str(image.parent))
    return client.predict(handle_file(image), api_name="/predict")


@needs_demo
def test_the_page_gives_the_overlay_of_predict_and_its_legend(
    segmenter: tuple[str, Any], finished_run: Path, pictures: Path, tmp_path: Path
) -> None:
    image = pictures / "one.png"
    _, shown, told = ask(segmenter[0], image)
    assert main(["predict", str(finished_run), str(image), "--out", str(tmp_path / "out")]) == 0
    overlay = Image.open(tmp_path / "out" / "overlays" / "one.png")
    mixed = Image.open(shown).convert("RGB")
    assert mixed.size == (6 * 48, 6 * 40)  # enlarged to 256 px at least
    assert np.array_equal(np.array(mixed), np.array(overlay)[: mixed.height, : mixed.width])
    mask = np.array(Image.open(tmp_path / "out" / "masks" / "one.png"))
    card = read_card(finished_run / "student")
    classes, counts = np.unique(mask, return_counts=True)
    rows = re.findall(r"rgb\((\d+), (\d+), (\d+)\).*?</i>(.*?) <b>(.*?)%</b>", told)
    assert {(row[3], row[4]) for row in rows} == {
        (card.class_names[index], f"{100 * count / mask.size:.1f}")
        for index, count in zip(classes, counts, strict=True)
    }
    for *colour, name, _ in rows:
        assert list(map(int, colour)) == list(card.palette[card.class_names.index(name)])
    assert re.search(r"\d ms for 48 x 40 px, seen at 32 x 32 px", told)


@needs_demo
def test_a_photograph_is_turned_upright(segmenter: tuple[str, Any], pictures: Path) -> None:
    answers = (ask(segmenter[0], pictures / name) for name in ("one.png", "turned.png"))
    upright, turned = ([np.array(Image.open(x)) for x in answer[:2]] for answer in answers)
    assert np.array_equal(upright[0], np.array(Image.open(pictures / "one.png")))
    assert all(map(np.array_equal, upright, turned))


@needs_demo
@pytest.mark.parametrize("name", ["bad.png", "deep.png"])
def test_the_page_says_that_a_file_cannot_be_read(
    segmenter: tuple[str, Any], pictures: Path, name: str
) -> None:
    image, answer, told = ask(segmenter[0], pictures / name)
    assert image is answer is None
    assert f"{name} cannot be read as an 8-bit image" in told


@needs_demo
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
def test_a_browser_shows_the_page_without_the_network(
    segmenter: tuple[str, Any], tmp_path: Path
) -> None:
    assert BROWSER
    shot = tmp_path / "shot.png"
    finished = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--window-size=500,1000", f"--screenshot={shot}", "--virtual-time-budget=20000"),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            segmenter[0],
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    complaints = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
    assert [line for line in complaints if "Method not implemented" not in line] == []
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("L")).astype(int)
    rows = (pixels != pixels[-1, -1]).any(1)
    assert rows[:150].any()  # what the model is
    assert rows[500:].any()  # the frame of the mask, below that of the image


@needs_demo
def test_ctrl_c_ends_it_and_leaves_no_upload(
    segmenter: tuple[str, subprocess.Popen[str]], pictures: Path, tmp_path_factory: Any
) -> None:
    """The last of those that ask this process."""
    url, process = segmenter
    ask(url, pictures / "one.png")
    uploads = next(tmp_path_factory.getbasetemp().glob("uploads*"))
    assert [path for path in uploads.rglob("*") if path.is_file()]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "distill: stopped\n"
    assert not [path for path in uploads.rglob("*") if path.is_file()]


def test_the_legend_has_names_and_colours_of_the_classes_largest_first(pictures: Path) -> None:
    """A model to which the left quarter of every image is class 0, and the rest class 2."""
    logits = np.zeros((1, 3, 8, 8), np.float32)
    logits[:, 0, :, :2] = logits[:, 2, :, 2:] = 9.0
    metadata = {
        "what": "segmenter", "image_size": [8, 8], "class_names": ["sky", "car", "a <b> tree"],
        "palette": [[1, 2, 3], [40, 50, 60], [200, 100, 0]],
    }  # fmt: skip
    _, mixed, told = look(ModelFile(metadata, lambda images: (logits,)), str(pictures / "one.png"))
    assert re.findall(r"(rgb\(.*?\)).*?</i>(.*?) <b>(.*?)</b>", told) == [
        ("rgb(200, 100, 0)", "a &lt;b&gt; tree", "75.0%"),
        ("rgb(1, 2, 3)", "sky", "25.0%"),
    ]
    red, green, blue = mixed.getpixel((287, 239))  # half of the class's colour over grey
    assert (red - green, green - blue) == pytest.approx((50, 50), abs=1)


def test_a_classifier_tells_classes_with_probabilities(
    finished_run: Path, pictures: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = Student("test_resnet", classes=3, dense=False, image_size=(32, 32)).eval()
    card = dataclasses.replace(
        read_card(finished_run / "student"), classes=3, dense=False, kwargs={}, layers=(),
        head_layers=(), class_names=("cat", "dog", "cow"), palette=(),
    )  # fmt: skip
    export_student(student, card, tmp_path / "classifier")
    model = open_model(str(tmp_path / "classifier"))
    _, chances, told = look(model, str(pictures / "one.png"))
    assert set(chances) == {"cat", "dog", "cow"}
    assert sum(chances.values()) == pytest.approx(1.0)
    assert "48 x 40 px, seen at 32 x 32 px" in told


def test_a_taken_port_is_one_line(finished_run: Path, refuse: Refuse) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refuse("demo", finished_run, "--port", port)
    assert line == f"--port {port}: address already in use; choose another"


def test_mistakes_are_one_line(
    finished_run: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "a number from 1 to 65535" in refuse("demo", finished_run, "--port", "70000")
    assert "no exported student" in refuse("demo", tmp_path)
    student, card = load_student(finished_run / "student")
    backbone, file = Deployed(student, "backbone"), tmp_path / "backbone.pt2"
    write(backbone, file, describe(backbone, card, "fp32"))
    assert "returns features; export" in refuse("demo", file, "--trust")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refuse("demo", finished_run) == (
        "gradio is not installed; pip install 'diffusion-distill[demo]'"
    )
