"""A folder of images as it lies on somebody's disk: of all modes, and with broken files."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from distill.benchmarks.files import read_image
from distill.benchmarks.images import Images, UnlabelledImages
from distill.benchmarks.masks import read_colour_mask
from distill.errors import UserError


def truncate(path: Path) -> None:
    """Its header stays whole, so that only decoding shows it."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images, numbered by their grey level."""
    for number in range(10):
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / f"{number}.png")
    return tmp_path


def levels(examples: UnlabelledImages) -> list[int]:
    return [int(examples[index][0][0, 0, 0]) for index in range(len(examples))]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_every_8_bit_mode_are_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("L", (5, 3), 255).convert(mode).save(tmp_path / "a.tif")
    image, target = Images(str(tmp_path)).dataset("train")[0]
    assert (image.shape, image.dtype, target) == ((3, 3, 5), torch.uint8, 255)
    assert image.eq(255).all()


def test_a_transparent_palette_is_its_colours_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    picture = Image.new("P", (2, 2))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "a.png", transparency=b"\x00\x80")
    assert read_image(tmp_path / "a.png")[:, 0, 0].tolist() == [10, 20, 30]
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["bmp", "GIF", "jpeg", "pgm", "ppm", "tiff", "webp"])
def test_images_of_every_suffix_count(tmp_path: Path, suffix: str) -> None:
    Image.new("L", (5, 3), 200).save(tmp_path / f"a.{suffix}")
    image, _ = Images(str(tmp_path)).dataset("train")[0]
    assert image.shape == (3, 3, 5)
    assert image.int().sub(200).abs().max() <= 1


def test_photographs_are_upright_and_folders_are_no_files(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.jpg").mkdir()
    examples = Images(str(tmp_path), skip=0).dataset("train")
    assert [tuple(image.shape) for image, _ in map(examples.__getitem__, [0])] == [(3, 8, 4)]
    assert examples.names == ["a.jpg"]


def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        upright = read_image(tmp_path / "a.png", upright=True)
        assert np.array_equal(upright.permute(1, 2, 0), expected)


def test_a_photograph_whose_notes_are_damaged_is_taken_as_stored(tmp_path: Path) -> None:
    short, strange = tmp_path / "short.webp", tmp_path / "strange.jpg"
    Image.new("RGB", (8, 4)).save(short, exif=b"Exif\0\0II*\0")
    # A width that is text, which Pillow cannot write back, and orientation 6
    entries = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc"), struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    notes = b"II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4)
    Image.new("RGB", (8, 4)).save(strange, exif=b"Exif\0\0" + notes)
    assert read_image(short, upright=True).shape == (3, 4, 8)
    assert read_image(strange, upright=True).shape == (3, 8, 4)


def test_what_is_no_image_is_named_at_the_start_and_the_next_takes_its_place(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "3.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(root / "9.png")
    examples = Images(str(root), skip=0.2).dataset("train")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"distill: skipped {root / '3.png'}: cannot be decoded (")
    assert second == f"distill: skipped {root / '9.png'}: 'I;16' is not an 8-bit image"
    assert levels(examples) == [0, 1, 2, 4, 4, 5, 6, 7, 8, 0]
    assert capsys.readouterr().err == ""


def png(path: Path, size: tuple[int, int], kind: tuple[int, int], row: bytes) -> None:
    """(W, H) px of equal rows; (bits, colour type) that Pillow reads and does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", *size, *kind, 0, 0, 0)
    pixels = zlib.compress(size[1] * (b"\0" + row))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_colours_of_sixteen_bits_are_refused(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    png(elsewhere / "deep.png", (2, 2), (16, 2), 12 * b"\x12")
    (elsewhere / "deep.ppm").write_bytes(b"P6\n2 2\n65535\n" + 24 * b"\x12")
    (elsewhere / "plain.ppm").write_bytes(b"P3\n2 2\n4095\n" + 12 * b"300 ")
    for file in sorted(elsewhere.iterdir()):
        with pytest.raises(UserError, match=f"{file}: has 16-bit colours; convert it to 8-bit"):
            read_image(file)
        with pytest.raises(UserError, match="has 16-bit colours"):
            read_colour_mask(file, (2, 2), {(0, 0, 0): 0})
        shutil.copy(file, root / "0.png")
        with pytest.raises(UserError, match=f"{root / '0.png'}: has 16-bit colours; 1 of 10"):
            Images(str(root))


def test_plain_bitmaps_are_read(root: Path) -> None:
    (root / "bits.pgm").write_bytes(b"P1\n2 2\n1 0 0 1\n")
    (root / "levels.pgm").write_bytes(b"P2\n2 2\n255\n0 9 9 0\n")
    assert read_image(root / "bits.pgm")[0].tolist() == [[0, 255], [255, 0]]
    assert read_image(root / "levels.pgm")[0].tolist() == [[0, 9], [9, 0]]
    assert len(Images(str(root)).dataset("train")) == 12


def test_links_to_folders_are_followed_and_nothing_is_read_twice(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("linked")
    (folder / "data").symlink_to(root)
    (folder / "same").symlink_to(root)
    (folder / "loop").symlink_to(folder)
    names = Images(str(folder)).dataset("train").names
    assert names == [f"data/{index}.png" for index in range(10)]


def test_what_is_damaged_is_named_once_when_it_is_read(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(root / "3.png")
    truncate(root / "4.png")
    examples = Images(str(root), skip=0.2).dataset("train")
    assert capsys.readouterr().err == ""
    assert levels(examples) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9]
    lines = capsys.readouterr().err.splitlines()
    assert ["3.png: cannot be decoded" in lines[0], "4.png: cannot be decoded" in lines[1]] == [
        True
    ] * 2
    assert levels(examples)[3] == 5
    assert capsys.readouterr().err == ""


def test_what_an_index_gives_depends_on_the_files_alone(root: Path) -> None:
    truncate(root / "3.png")
    forwards, backwards = (Images(str(root), skip=0.1).dataset("train") for _ in range(2))
    last_first = [int(backwards[index][0][0, 0, 0]) for index in reversed(range(10))]
    assert levels(forwards) == last_first[::-1]


def test_too_many_that_are_no_images_stop_the_start_and_the_first_are_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2, 7):
        (root / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        Images(str(root), skip=0.4)
    line = str(caught.value)
    assert line.startswith(f"{root / '2.png'}: cannot be decoded (")
    assert line.endswith(
        "; 5 of 10 images are unreadable (2.png, 3.png, 4.png, ...), but at most 4 may be: fix "
        "or remove them before training begins, or raise data.options.skip"
    )
    assert capsys.readouterr().err == ""


def test_damaged_files_count_against_the_same_limit(root: Path) -> None:
    (root / "1.png").write_bytes(b"no image")
    truncate(root / "4.png")
    truncate(root / "6.png")
    examples = Images(str(root), skip=0.2).dataset("train")
    examples[4]
    with pytest.raises(
        UserError, match=r"6\.png: cannot be decoded .*3 of 10 .*\(1\.png, 4\.png, 6"
    ):
        examples[6]


def test_worker_processes_count_together(root: Path) -> None:
    truncate(root / "4.png")
    truncate(root / "7.png")

    def read(skip: float) -> list[Tensor]:
        examples = Images(str(root), skip=skip).dataset("train")
        return [images for images, _ in DataLoader(examples, batch_size=1, num_workers=2)]

    assert [int(image[0, 0, 0, 0]) for image in read(0.2)] == [0, 1, 2, 3, 5, 5, 6, 8, 8, 9]
    with pytest.raises(UserError, match="2 of 10 images are unreadable"):
        read(0.1)


@pytest.mark.parametrize("skip", [1, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(root: Path, skip: Any) -> None:
    with pytest.raises(UserError, match="skip: must be a share of the files, 0 to below 1"):
        Images(str(root), skip=skip)


def test_of_few_images_none_may_be_damaged(root: Path) -> None:
    truncate(root / "3.png")
    examples = UnlabelledImages(root, sorted(root.iterdir()))
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"3\.png: cannot be decoded .*; 1 of 10 images .* at most 0 may be"
        ):
            examples[3]
    with pytest.raises(IndexError):
        examples[10]
