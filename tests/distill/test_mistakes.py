"""What a user may get wrong in a recipe or its data: one line that names it, and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from distill import checkpoint
from distill.cli import main
from distill.errors import UserError
from distill.precision import resolve_dtype
from distill.training.loop import checkpoint_path

Refuse = Callable[..., str]


def test_a_run_folder_that_exists_is_left_alone(stopped_run: Path, refuse: Refuse) -> None:
    before = {path: path.read_bytes() for path in stopped_run.rglob("*") if path.is_file()}
    line = refuse("train", stopped_run / "config.yaml")
    assert (
        line == f"run folder {stopped_run} exists; continue with --resume, or choose another name="
    )
    assert {p: p.read_bytes() for p in stopped_run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.benchmark=shape", "data.benchmark: unknown name 'shape'; did you mean 'shapes'?"),
        ("data.benchmark=nyuv2", "data.benchmark: 'nyuv2' is one of depth, not of benchmarks; "),
        (
            "data.options={sizee: 32}",
            "unknown key 'data.options.sizee'; did you mean 'data.options.size'?",
        ),
        ("data.options={size: big}", "data.options.size: input should be a valid integer"),
        ("data.options={size: 20}", "data.options.size: must be 32 to 128 px, got 20"),
        (
            "data.labelled=17",
            "data.labelled: must be between 1 and 16 (the training images), got 17",
        ),
        ("data.unlabelled=17", "data.unlabelled: 17 requested, but there are only 16 images"),
        (
            "train.accumulate=3",
            "train.batch: 4 images per process are not divisible by train.accumulate=3",
        ),
        ("data.benchmark=camvid", "'data.options.size'; there are none (data.options={})"),
        ("data.benchmark=nothing:Here", "data.benchmark: 'nothing:Here' cannot be imported"),
        (
            "data.benchmark=distill.matching.losses:Here",
            "module 'distill.matching.losses' has no 'Here'",
        ),
        ("data.benchmark=:Here", "data.benchmark: ':Here' cannot be imported"),
        ("data={benchmark: folder, root: /none, options: {num_classes: 2}}", "no folder /none"),
        ("data={benchmark: cifar10, root: /none}", "/none"),
        ("teacher.path=/none", "teacher: '/none' is not a folder"),
        ("teacher.name=unet", "teacher.name: unknown name 'unet'"),
        ("teacher.options={revisoin: 1}", "unknown key 'teacher.options.revisoin'; did you mean"),
        ("teacher.options={layers: []}", "unknown key 'teacher.options.layers'"),
        (
            "teacher={name: guided_diffusion, path: a.pt, options: {timesteps: many}}",
            "teacher.options.timesteps: input should be a valid integer, ",
        ),
        (
            "teacher={name: timm, path: test_vit, options: {kwargs: 5}}",
            "teacher.options.kwargs: input should be a valid dictionary, got 5",
        ),
        ("teacher.cache=''", "teacher.cache: string should have at least 1 character"),
        ("teacher.name=os:sep", "teacher.name: 'os:sep' is not callable"),
        (
            "pairs.0.teacher=mid_blok",
            "pairs.0.teacher: no layer 'mid_blok'; did you mean 'mid_block'?",
        ),
        ("policy.reward_layer=mid_blok", "policy.reward_layer: no layer 'mid_blok'; did you mean"),
        ("pairs.0.student=layr4", "pairs.0.student: no layer 'layr4'; did you mean 'layer4'?"),
        ("pairs.0.student=[layer3,layer9]", "pairs.0.student: no layer 'layer9'; did you mean"),
        ("pairs.0.loss=msee", "pairs.0.loss: unknown name 'msee'; did you mean 'mse'?"),
        (
            "pairs.0.options={beta: 2}",
            "pairs.0.options.beta: feature loss 'mse' has no option 'beta'",
        ),
        (
            "pairs.0={student: layer3, teacher: mid_block, loss: infonce, "
            "options: {temperature: hot}}",
            "pairs.0.options.temperature must be a number, got 'hot'",
        ),
        ("pairs.0.projector=none", "pairs.0.projector: feature loss 'mse' compares "),
        ("student.model=test_resnt", "timm has no model 'test_resnt'; did you mean 'test_resnet'?"),
        ("student.kwargs={foo: 1}", "student: 'test_resnet' does not accept {'foo': 1}"),
        ("student.head_layers=[layer9]", "student.head_layers: no layer 'layer9'; did you mean"),
        ("policy.name=a2", "policy.name: unknown name 'a2'; did you mean 'a2c'?"),
        (
            "policy.options={rate: 1}",
            "policy.options.rate is not an option of A2CPolicy; choose from",
        ),
        ("policy.options={hidden: 0}", "policy.options.hidden must be a whole number at least 1"),
        (
            "policy.options={bins: 9}",
            "policy.options.bins is not an option: the run itself sets it",
        ),
        ("policy.bins=1000", "policy: 1000 timestep bins do not fit"),
        (
            "policy.highest=1000",
            "policy: timesteps from 0 to 1000 are not a range within the teacher's schedule, 0",
        ),
        ("data.size=33", "image size 33x33 does not suit this teacher"),
        ("teacher.image_size=[32, 33]", "image size 32x33 does not suit this teacher"),
        ("data.size=16", "'test_resnet' does not accept images of 16x16 px: each side must be"),
        ("train.batch=1", "train.batch: 1 is too small: batch norm needs two labelled images"),
        ("train.finetune_steps=5", "train.finetune_steps: must be between 0 and 4 with"),
        ("train.finetune_steps=6", "train.finetune_steps: must be between 0 and 4 with"),
        ("data.split_seed=99999999999999999999", "data.split_seed: input should be less than"),
        (
            "train.schedule=distill_then_finetune",
            "must be between 1 and 4 with train.schedule=distill_then_finetune",
        ),
        ("student.kwargs={num_classes: 4}", "kwargs: num_classes is the benchmark's; leave it out"),
        ("teacher.random_weights=-1", "teacher.random_weights: input should be greater than or"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    recipe: Path, refuse: Refuse, change: str, words: str
) -> None:
    changes = [change, "policy.highest=900"] if change == "policy.bins=1000" else [change]
    assert words in refuse("train", recipe, *changes)
    # Mistakes show before there is a folder, so that the mended run keeps its name.
    assert not (recipe.parent / "runs").exists()


def test_a_batch_too_small_for_the_loss_is_named(recipe: Path, refuse: Refuse) -> None:
    small = ["train.batch=2", "train.unlabelled_batch=0", "pairs.0.loss=rkd"]
    line = refuse("train", recipe, *small)
    assert line == (
        "pairs.0.loss: rkd compares the images of a batch, so it needs at least 3 per process and "
        "part, got 2"
    )
    assert not (recipe.parent / "runs").exists()


def test_a_layer_that_a_member_of_an_ensemble_lacks_names_its_pair(
    recipe: Path, teacher_folder: Path, refuse: Refuse
) -> None:
    member = f"{{name: diffusers_unet, path: {teacher_folder}}}"
    line = refuse(
        *("train", recipe, "teacher.name=ensemble", "teacher.path=''"),
        *(
            f"teacher.options={{members: {{a: {member}}}}}",
            "pairs.0.teacher=a/mid_block+a/mid_blok",
        ),
    )
    assert line == ("pairs.0.teacher: member 'a': no layer 'mid_blok'; did you mean 'mid_block'?")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("name: 5", "name: input should be a valid string, got 5"),
        ("options: 5", "options: input should be a valid dictionary, got 5"),
        ("random_weights: x", "random_weights: input should be a valid integer, "),
        ("image_size: big", "image_size: input should be a valid integer, "),
    ],
)
def test_what_a_member_of_an_ensemble_is_given_has_a_type(
    recipe: Path, refuse: Refuse, wrong: str, words: str
) -> None:
    member = {"name": "diffusers_unet", "path": "here"} | yaml.safe_load(wrong)
    line = refuse(
        *("train", recipe, "teacher.name=ensemble", "teacher.path=''"),
        *(f"teacher.options={{members: {{a: {member}}}}}", "pairs.0.teacher=a/mid_block"),
    )
    assert line.startswith(f"teacher.options.members.a.{words}")


def test_an_ensemble_is_no_member_of_another(recipe: Path, refuse: Refuse) -> None:
    members = "teacher.options={members: {a: {name: ensemble, path: '', options: {members: {}}}}}"
    line = refuse(
        *("train", recipe, "teacher.name=ensemble", "teacher.path=''", members),
        "pairs.0.teacher=a/mid_block",
    )
    assert line.endswith("ensemble has members itself; name those in its place")


def test_an_own_file_that_fails_says_why(
    recipe: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe.parent / "own_broken.py").write_text("import torch\ntorch.nothing_such\n")
    monkeypatch.syspath_prepend(recipe.parent)
    line = refuse("train", recipe, "pairs.0.loss=own_broken:loss")
    words = "'own_broken:loss' cannot be imported: AttributeError: module 'torch' has"
    assert line.startswith(f"pairs.0.loss: {words}")


def test_a_teacher_that_leaves_float16_is_said_to(
    recipe: Path,
    teacher_folder: Path,
    refuse: Refuse,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(teacher_folder, tmp_path / "large")
    weights = tmp_path / "large" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"conv_in.weight": 1e6 * tensors["conv_in.weight"]}, weights)
    large = [f"teacher.path={tmp_path / 'large'}", "teacher.dtype=float16"]
    remedy = f"start a new run (name=...) with teacher.dtype={resolve_dtype('auto', 'cpu')}"
    assert f"is not finite at step 0; {remedy}" in refuse("train", recipe, *large)
    cache = ["data.augment=none", f"teacher.cache={tmp_path / 'cache'}"]
    assert main(["teacher", "extract", str(recipe), *large, *cache]) == 2
    line = "is not finite; try teacher.dtype=bfloat16, or float32"
    assert line in capsys.readouterr().err
    marks = (tmp_path / "cache" / "distilled" / "marks.bin").read_bytes()
    assert not any(marks)


def test_images_without_labels_are_no_benchmark_to_score(
    recipe: Path, folder: Path, refuse: Refuse
) -> None:
    line = refuse("train", recipe, f"data={{benchmark: images, root: {folder}}}")
    assert "data.benchmark: 'images' has no labels" in line
    assert "use it only for `distill teacher train`" in line


def test_what_is_not_finite_at_once_is_not_blamed_on_the_learning_rate(
    recipe: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe.parent / "own_void.py").write_text(
        "def void(student, teacher):\n"
        "    return (student - teacher).mean(dim=(1, 2, 3)) * float('nan')\n"
    )
    monkeypatch.syspath_prepend(recipe.parent)
    assert refuse("train", recipe, "pairs.0.loss=own_void:void") == (
        "distilled: the feature loss is not finite at step 0; start a new run (name=...) with "
        "another loss, teacher or student"
    )


def test_a_loss_that_is_not_finite_is_one_line_and_the_run_can_go_on(
    recipe: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    (recipe.parent / "own_wild.py").write_text(
        "calls = 0\n"
        "def wild(student, teacher):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    loss = (student - teacher).square().mean(dim=(1, 2, 3))\n"
        "    return loss * float('nan') if calls == 4 else loss\n"
    )
    monkeypatch.syspath_prepend(recipe.parent)
    arguments = ["train", str(recipe), "pairs.0.loss=own_wild:wild", "train.arms=[distilled]"]
    assert refuse(*arguments) == (
        "distilled: the feature loss is not finite at step 3; start a new run (name=...) "
        "with a smaller train.lr"
    )
    run = recipe.parent / "runs" / "tiny"
    assert checkpoint.load(checkpoint_path(run, "distilled"))["step"] == 2
    assert main([*arguments, "--resume"]) == 0


def test_a_run_that_fails_at_its_first_image_keeps_its_name(
    recipe: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(shapes: Any, index: int) -> Any:
        raise UserError(f"{index}.png: cannot be decoded")

    run = recipe.parent / "runs" / "tiny"
    with monkeypatch.context() as patch:
        patch.setattr("distill.data.Augmented.__getitem__", torn)
        assert "cannot be decoded" in refuse("train", recipe)
        assert not run.exists()
    run.mkdir(parents=True)
    (run / "mine.txt").touch()
    refuse("train", recipe)
    assert (run / "mine.txt").exists()


def test_a_missing_gpu_is_named(
    recipe: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refuse("train", recipe, "device=cuda")
    assert line == "device: cuda was asked for, but torch sees no GPU; use device=cpu or auto"


def test_a_hub_that_cannot_be_reached_asks_for_a_folder(
    recipe: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refuse("train", recipe, "teacher.path=distill-tests/no-such-teacher")
    assert "'distill-tests/no-such-teacher' is not a local folder, and could not be fetched" in line
    assert "give a local folder" in line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of 32 px with masks of two classes, in the layout of `folder`."""
    root = tmp_path / "mine"
    random = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    names = [f"photo{number}" for number in range(12)]
    for name in names:
        image = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        Image.fromarray((image[..., 0] > 127).astype(np.uint8)).save(root / "masks" / f"{name}.png")
    (root / "train.txt").write_text("\n".join(names[:8]))
    (root / "test.txt").write_text("\n".join(names[8:]))
    return root


def of_folder(recipe: Path, root: Path) -> list[str]:
    data = f"data={{benchmark: folder, root: {root}, options: {{classes: [off, on]}}}}"
    return ["train", str(recipe), data, "train.arms=[scratch]"]


def test_ones_own_images_and_masks_train(recipe: Path, folder: Path) -> None:
    assert main(of_folder(recipe, folder)) == 0
    summary = json.loads((recipe.parent / "runs" / "tiny" / "summary.json").read_text())
    assert set(summary["metrics"]["scratch"]["iou"]) == {"off", "on"}


def test_images_without_a_mask_serve_unlabelled(
    recipe: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "images" / "bare.png")
    assert main([*of_folder(recipe, folder), "--dry-run"]) == 0
    # Of the eight listed, one is held out for validation.
    assert (
        "# data: folder, 7 images with labels, 8 to distil on, labelled ones included"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("photo", ["photo0", "photo11"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("image", "images/{}.png: cannot be decoded"),
        ("size", "masks/{}.png: the mask is 16x16 px (height x width), but its image is 32x32"),
        ("value", "masks/{}.png: mask value 7 is not a class; allowed: 0, 1, 255"),
        ("colours", "masks/{}.png: a mask must have one channel"),
        ("missing", "{}.png has no mask file"),
    ],
)
def test_a_damaged_file_is_named_in_training_and_in_evaluation(
    recipe: Path, folder: Path, refuse: Refuse, damage: str, words: str, photo: str
) -> None:
    image, mask = folder / "images" / f"{photo}.png", folder / "masks" / f"{photo}.png"
    if damage == "image":
        image.write_bytes(image.read_bytes()[:60])
    elif damage == "missing":
        mask.unlink()
    else:
        shape = {"size": (16, 16), "value": (32, 32), "colours": (32, 32, 3)}[damage]
        Image.fromarray(np.full(shape, 7, dtype=np.uint8)).save(mask)
    assert words.format(photo) in refuse(*of_folder(recipe, folder))


def test_a_teacher_without_timesteps_asks_for_the_fixed_policy_and_then_runs(
    recipe: Path, refuse: Refuse
) -> None:
    teacher = "teacher={name: timm, path: test_vit, random_weights: 0, dtype: float32}"
    changes = [str(recipe), teacher, "pairs.0.teacher=blocks.3", "train.arms=[distilled]"]
    assert refuse("train", *changes) == (
        "policy.name: 'a2c' chooses timesteps, but teacher 'test_vit-random0' has none; "
        "use policy.name=fixed"
    )
    other_bin = refuse("train", *changes, "policy.name=fixed", "policy.options={bin: 1}")
    assert other_bin.startswith("policy.options.bin must be a whole number")
    assert main(["train", *changes, "policy.name=fixed", "policy.spacing=log_snr"]) == 0


def test_a_dense_head_needs_two_labelled_images_in_each_part(recipe: Path, refuse: Refuse) -> None:
    alone = ("train.arms=[distilled]", "policy.name=uniform")
    told = "is too small: batch norm needs two labelled images per step and process"
    assert told in refuse("train", recipe, *alone, "train.batch=1")
    assert told in refuse("train", recipe, *alone, "train.accumulate=4", "--dry-run")
