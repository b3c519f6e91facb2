"""The command line: help at once, every command, and mistakes as one line and exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from distill import cli, package_version
from distill.arguments import parse
from distill.cli import main
from distill.commands.dry_run import _clock
from distill.registry import TABLES, resolve


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an exit with code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distill: error: ")
    assert err.count("\n") == 1
    return err.strip()


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["evaluate"], ["export"], ["bench"], ["teacher"], ["teacher", "train"],
     ["teacher", "layers"], ["policy", "fit"], ["list"]],
)  # fmt: skip
def test_every_command_explains_itself(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: distill" in capsys.readouterr().out


def test_mistakes_on_the_command_line_are_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["train"], "the following arguments are required: RECIPE.yaml"),
        (["train", "a.yaml", "--resum"], "recipe a.yaml: No such file"),
        (["train", "a.yaml", "--fast"], "unrecognised argument '--fast'"),
        (["list", "teachers", "seed=1"], "unrecognised argument 'seed=1'"),
        (["bench", "seed=1"], "recipe seed=1: No such file"),
        (["list", "teacher"], "invalid choice: 'teacher' (choose from"),
        (["teacher"], "the following arguments are required: COMMAND"),
        (["teacher", "layers", "/none"], "teacher: '/none' is not a folder"),
        (["teacher", "layers", "teachers/pretrained/shapes", "--size", "0"], "image size 0x0"),
        (
            ["teacher", "layers", "", "--name", "ensemble"],
            "--name: ensemble has no layers of its own",
        ),
        (["train", "/none.yaml"], "recipe /none.yaml: No such file or directory"),
        (["bench", "--batch", "many"], "argument --batch: invalid int value: 'many'"),
        (["train", recipe, "train.steps"], "override 'train.steps': expected section.key=value"),
        (["train", recipe, "seed=1", "--dry-run", "steps"], "unrecognised argument 'steps'"),
    ):
        assert words in refused(capsys, *arguments), arguments


def test_options_and_overrides_come_in_any_order(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for order in (
        ["train", "--dry-run", str(recipe), "seed=3"],
        ["train", str(recipe), "--dry-run", "seed=3"],
        ["train", str(recipe), "seed=3", "--dry-run"],
    ):
        assert main([*order, "train.steps=2", "train.arms=[scratch]"]) == 0
        assert "seed: 3" in capsys.readouterr().out


def test_overrides_among_the_words_of_a_list_keep_their_order() -> None:
    options = parse(["report", "a", "data.root=1", "b", "--out", "x.json", "data.root=2"])
    assert options.runs == ["a", "b"]
    assert options.overrides == ["data.root=1", "data.root=2"]
    options = parse(["policy", "fit", "--table", "t", "--seeds", "1", "2", "rate=3"])
    assert (options.seeds, options.overrides) == (["1", "2"], ["rate=3"])


def test_near_names_are_suggested_for_files_and_parts(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(capsys, "train", str(recipe)[:-1])
    assert line.endswith(f"No such file or directory; did you mean {str(recipe)!r}?")
    (tmp_path / "near_names.py").write_text("class LowNoise: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(capsys, "train", str(recipe), "policy.name=near_names:Lownoise")
    assert line.endswith("; did you mean 'near_names:LowNoise'?")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"distill {package_version()}\n")


def test_the_package_runs_as_the_program() -> None:
    words = [sys.executable, "-m", "distill", "--version"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert told == f"distill {package_version()}\n"


def test_an_interrupt_outside_of_training_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", stop)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "distill: stopped\n"


def test_a_disk_that_is_full_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl")

    monkeypatch.setitem(cli.COMMANDS, "list", write)
    line = refused(capsys, "list")
    assert line.endswith("No space left on device: 'runs/a/metrics.jsonl'")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys; from distill.cli import main; sys.exit(main(['list']))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_list_shows_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for table in TABLES.values() for name in table)
    assert main(["list", "policies"]) == 0
    only = capsys.readouterr().out
    assert "a2c" in only
    assert "resnet18" not in only


@pytest.mark.parametrize("table", [name for name in TABLES if name != "students"])
def test_every_name_leads_to_something(table: str) -> None:
    for name in TABLES[table]:
        assert callable(resolve(table, name, "key"))


def test_a_dry_run_shows_everything_and_trains_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pairs:" in out  # the resolved recipe
    assert "unlabelled_batch: 4" in out
    assert "# data: shapes, 6 images with labels, 12 to distil on" in out
    assert "# train.batch" not in out
    assert "#   layer3 (192, 2, 2) -> up_blocks.0 (16, 32, 32)  mse x 1" in out
    assert "GFLOP per image" in out
    assert "# scratch: 5 steps of" in out
    assert "nothing was trained" in out
    assert "it was trained on" not in out
    assert {path.name for path in recipe.parent.iterdir()} == {recipe.name}


def test_a_dry_run_tells_labels_by_class_and_a_teacher_at_another_size(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train/cat", 4), ("train/dog", 2), ("test/dog", 2), ("unlabelled", 3)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (64, 64)).save(tmp_path / "own" / name / f"{index}.png")
    own = f"data={{benchmark: image_folder, root: {tmp_path / 'own'}, size: 64}}"
    words = ["train", str(recipe), own, "train.arms=[distilled]", "train.batch=2", "--dry-run"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "# data: image_folder, 5 images with labels, 8 to distil on, labelled ones inc" in out
    assert "# labels: cat 3, dog 2\n" in out
    assert "it was trained on 32x32 px and sees 64x64; teacher.image_size=[32,32] resizes" in out
    assert "made 5 train, 2 test, 1 val images" in err
    assert main([*words, "teacher.image_size=32", "train.batch=6"]) == 0
    out = capsys.readouterr().out
    assert "it was trained on" not in out
    assert "# train.batch=6: a step shows all labelled images, some repeatedly\n" in out


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40.4, "40 s"), (200, "3 min 20 s"), (3_600 * 5.2, "5 h 12 min"), (2.76e6, "32 days")],
)
def test_a_time_is_as_exact_as_it_matters(seconds: float, words: str) -> None:
    assert _clock(seconds) == words


def test_a_dry_run_finds_what_a_run_would_stumble_over(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for change, words in (
        ("pairs.0.teacher=mid_blok", "did you mean 'mid_block'?"),
        ("data.size=33", "image size 33x33 does not suit this teacher"),
        ("data.labelled=17", "must be between 1 and 16 (the training images)"),
        ("train.batch=1", "batch norm needs two labelled images"),
        ("evaluate.split=tset", "input should be 'train', 'val' or 'test'"),
    ):
        assert words in refused(capsys, "train", recipe, change, "--dry-run")


def test_a_dry_run_says_that_the_run_exists(
    stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(stopped_run / "config.yaml")
    assert main(["train", config, "--dry-run", "train.arms=[scratch]"]) == 0
    assert f"# {stopped_run} exists: the run would need --resume" in capsys.readouterr().out


def test_a_dry_run_of_a_teacher_counts_its_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ddpm.yaml"
    path.write_text(
        "data: {options: {size: 32, train: 3}}\n"
        "unet: {block_out_channels: [8, 16]}\n"
        "batch: 4\n"
        f"output: {tmp_path / 'runs'}\n"
    )
    assert main(["teacher", "train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "# 3 images of 32x32 px, 0.0M parameters" in out
    assert "nothing was trained" in out
    assert not (tmp_path / "runs").exists()


def own_teacher(path: str, *, layers: tuple[str, ...]) -> object:
    """As much of `teachers.protocol.Teacher` as is asked for."""
    return object()


def test_teacher_layers_are_a_table(
    teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teacher", "layers", str(teacher_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert list(rows) == [
        "conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1",
    ]  # fmt: skip
    assert rows["mid_block"][:2] == ["16", "2"]
    assert rows["conv_in"][:2] == ["8", "1"]
    assert lines[-1] == "images of 32x32 px, timesteps 0 to 999"
    assert main(["teacher", "layers", str(teacher_folder), "--size", "16x64"]) == 0
    assert "images of 16x64 px" in capsys.readouterr().out
    assert main(["teacher", "layers", str(teacher_folder), "--size", "33"]) == 2
    for wrong in ("16x", "1x2x3", "a"):
        assert main(["teacher", "layers", str(teacher_folder), "--size", wrong]) == 2
        assert f"--size: must be a side or HEIGHTxWIDTH, got '{wrong}'" in capsys.readouterr().err
    assert main(["teacher", "layers", "x", "--name", f"{__name__}:own_teacher"]) == 2
    assert "own_teacher cannot list its layers" in capsys.readouterr().err


def test_teacher_layers_take_the_options_of_the_teacher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["teacher", "layers", "test_vit", "--name", "timm", "--size", "64"]
    assert main([*words, "kwargs={depth: 3}"]) == 0
    assert "\nblocks.2 " in capsys.readouterr().out
    assert main([*words, "kwargs={depth: 3}", "random_weights=0"]) == 2
    assert "unknown key 'teacher.options.random_weights'" in capsys.readouterr().err
    assert main([*words, "kwargs=3"]) == 2
    assert "teacher.options.kwargs: input should be" in capsys.readouterr().err


def test_a_command_that_a_scheduler_ends_leaves_no_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(options: object) -> str:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return "not reached"

    monkeypatch.setitem(cli.COMMANDS, "list", ended)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["list", "teachers"]) == 130
    assert capsys.readouterr().err == "distill: stopped\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
