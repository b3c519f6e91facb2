"""A checkpoint is the old one or the new one, never half of one; real full disks included."""

import os
import resource
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from distill import checkpoint
from distill.errors import UserError


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "last.pt"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_state_comes_back_as_it_was(path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "step": 7,
        "nested": [(1, 2.5), {"none": None, "text": "a"}],
    }
    checkpoint.save(path, state)
    loaded = checkpoint.load(str(path))
    assert list(loaded) == list(state)
    assert isinstance(loaded["model"], OrderedDict)
    assert torch.equal(loaded["model"]["weight"], model.weight)
    assert torch.equal(loaded["random"], state["random"])
    moments = loaded["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, optimizer.state_dict()["state"][0]["exp_avg"])
    assert (loaded["step"], loaded["nested"]) == (7, state["nested"])


def test_saving_again_replaces_and_leaves_nothing_beside_it(path):
    for step in (1, 2):
        checkpoint.save(path, {"step": step})
    assert checkpoint.load(path) == {"step": 2}
    assert names(path.parent) == ["last.pt"]


@pytest.fixture
def full_disk(path):
    """The temporary file's name leads to a device on which every write is out of space."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    def fill(target: Path) -> None:
        target.with_name(f".{target.name}.{os.getpid()}.tmp").symlink_to("/dev/full")

    return fill


def test_full_disk_keeps_the_old_checkpoint_byte_for_byte(path, full_disk):
    checkpoint.save(path, {"step": 1})
    before = path.read_bytes()
    full_disk(path)
    with pytest.raises(UserError, match=r"disk full while saving .*last\.pt; the previous one is"):
        checkpoint.save(path, {"step": 2, "weights": torch.zeros(100_000)})
    assert path.read_bytes() == before
    assert checkpoint.load(path) == {"step": 1}
    assert names(path.parent) == ["last.pt"]


def test_full_disk_on_the_first_save_leaves_nothing(path, full_disk):
    full_disk(path)
    with pytest.raises(UserError, match=r"disk full .*; nothing was written"):
        checkpoint.save(path, {"step": 1})
    assert names(path.parent) == []


def test_disk_that_fills_up_half_way_keeps_the_old_checkpoint(path):
    checkpoint.save(path, {"step": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"while saving .*last\.pt; the previous one is intact"):
            checkpoint.save(path, {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert names(path.parent) == ["last.pt"]


def test_disk_that_is_found_full_at_fsync_keeps_the_old_checkpoint(path, monkeypatch):
    checkpoint.save(path, {"step": 1})

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="disk full"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    assert names(path.parent) == ["last.pt"]


def test_interrupt_while_saving_keeps_the_old_checkpoint(path, monkeypatch):
    checkpoint.save(path, {"step": 1})

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    assert names(path.parent) == ["last.pt"]


def test_folder_that_is_gone_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"No such file or directory while saving .*gone/last\.pt"):
        checkpoint.save(tmp_path / "gone" / "last.pt", {})


def test_a_place_where_nothing_can_be_is_one_clear_line(path):
    path.write_text("a file")
    with pytest.raises(UserError, match=r"Not a directory while saving .*nothing was written"):
        checkpoint.write_text(path / "below.json", "{}")
    with pytest.raises(UserError, match="File name too long while saving"):
        checkpoint.write_text(path.with_name(250 * "n" + ".json"), "{}")


def test_missing_checkpoint_names_the_file(path):
    with pytest.raises(UserError, match=r"no checkpoint at .*last\.pt; start without --resume"):
        checkpoint.load(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_checkpoint_names_the_file(path, share):
    checkpoint.save(path, {"weights": torch.arange(10_000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"last\.pt is damaged or not a checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "content", [b"hello\n", b"\x80\x04garbage", b"\x89PNG\r\n\x1a\n", b"(" * 99]
)
def test_file_that_is_no_checkpoint_names_the_file(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt is damaged or not a checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(2)])
def test_checkpoint_of_another_program_is_refused(path, content):
    torch.save(content, path)
    with pytest.raises(UserError, match=r"last\.pt was not written by distill"):
        checkpoint.load(path)


def test_checkpoint_of_another_version_is_refused(path):
    torch.save({"format": checkpoint.FORMAT, "version": 99, "state": {}}, path)
    with pytest.raises(UserError, match="has checkpoint version 99, but this program reads 1"):
        checkpoint.load(path)


def test_loading_runs_no_code_from_the_file(path, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": checkpoint.FORMAT, "version": 1, "state": Touch()}, path)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_text_is_replaced_as_checkpoints_are(tmp_path, full_disk):
    path = tmp_path / "summary.json"
    checkpoint.write_text(path, "mIoU 0.5 ± 0.1")
    full_disk(path)
    with pytest.raises(UserError, match="disk full"):
        checkpoint.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "mIoU 0.5 ± 0.1"
    assert names(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("content", [None, b'{"scores": ', b"\xff"])
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    file = tmp_path / "result.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"result\.json is missing or damaged: ") as error:
        checkpoint.read_json(file)
    assert "\n" not in str(error.value)


def test_a_single_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"weights": torch.zeros(1000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt is damaged or not a checkpoint"):
        checkpoint.load(path)
