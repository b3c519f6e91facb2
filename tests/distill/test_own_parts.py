"""Policies, losses, teachers and benchmarks of one's own that are broken, each in its own way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill import checkpoint
from distill.cli import main
from distill.errors import UserError

Refuse = Callable[..., str]

PARTS = """
import numpy as np
import torch
from rl_policy.simple import Uniform
from teachers.diffusers_unet import diffusers_unet


class Raises(Uniform):
    def act(self, context, generator, progress):
        raise RuntimeError("no way")


class Far(Uniform):
    def act(self, context, generator, progress):
        return torch.full((len(context),), 99)


class Below(Uniform):
    def act(self, context, generator, progress):
        return torch.full((len(context),), -1)


class Wide(Uniform):
    def act(self, context, generator, progress):
        return torch.zeros(len(context), 3, dtype=torch.int64)


class Nothing(Uniform):
    def act(self, context, generator, progress):
        return None


class NoNumbers(Uniform):
    def probabilities(self, context):
        return torch.full((len(context), self.bins), torch.nan)


class Flat(Uniform):
    def probabilities(self, context):
        return torch.ones(3)


class Bare:
    def __init__(self, context_size, bins, batch, seed):
        pass


class Unkept(Uniform):
    def state_dict(self):
        return {"memory": [object()]}


def failing(student, teacher):
    raise KeyError("key")


def mean(student, teacher):
    return (student - teacher).square().mean()


def nothing(student, teacher):
    return None


def detached(student, teacher):
    return (student - teacher).square().mean(dim=(1, 2, 3)).detach()


def alone(student):
    return student.mean(dim=(1, 2, 3))


def no_teacher(path, **view):
    return object()


def changed(change, path, view):
    teacher = diffusers_unet(path, **view)
    features = teacher.features
    teacher.features = lambda *given: change(features(*given))
    return teacher


def forgetful(path, **view):
    return changed(lambda maps: {}, path, view)


def narrow(path, **view):
    return changed(lambda maps: {name: x[:, :5] for name, x in maps.items()}, path, view)


def viewless(path, *, layers):
    return object()


def lightless(path, **view):
    teacher = diffusers_unet(path, **view)
    features = teacher.features
    teacher.features = lambda images, timesteps: features(images, timesteps)
    return teacher


class Data:
    name, task, ignore_index, num_classes = "data", "classification", 255, 2
    class_names, palette = ("a", "b"), None
    example = torch.zeros(3, 32, 32, dtype=torch.uint8), 1

    def __init__(self, root):
        pass

    def dataset(self, split):
        return [self.example] * 40


class NoNames(Data):
    class_names = property()


class Dancing(Data):
    task = "dancing"


class NoData(Data):
    def dataset(self, split):
        return None


class Grey(Data):
    example = torch.zeros(1, 32, 32, dtype=torch.uint8), 1


class Floating(Data):
    example = torch.zeros(3, 32, 32), 1


class Third(Data):
    example = torch.zeros(3, 32, 32, dtype=torch.uint8), 2


class Unpaired(Data):
    example = torch.zeros(3, 32, 32, dtype=torch.uint8)


class Empty(Data):
    def dataset(self, split):
        return []


class Scalar(Data):
    example = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.tensor(1)


class Numpy(Data):
    example = torch.zeros(3, 32, 32, dtype=torch.uint8), np.int64(1)


class Late(Data):
    def dataset(self, split):
        return [self.example] * 39 + [(self.example[0], 7)]


class OneSplit(Data):
    def dataset(self, split):
        if split != "train":
            raise FileNotFoundError("no other split")
        return [self.example] * 40


class WrongTest(Data):
    def dataset(self, split):
        return [self.example] * 39 + [(self.example[0], 7 if split == "test" else 1)]


class NoLabels(Data):
    task = None

    def dataset(self, split):
        return [(self.example[0], None)] * 39 + [(self.example[0][:1], None)]


class Listed(Data):
    def dataset(self, split):
        class Examples(list):
            targets = [1] * 39 + [7]

        return Examples([self.example] * 40)


class Masks(Data):
    task = "segmentation"
    example = Data.example[0], torch.full((32, 32), 255, dtype=torch.uint8)


class Grouped(Masks):
    def dataset(self, split):
        class Examples(list):
            targets = [9] * 40

        return Examples([self.example] * 40)


class Third32(Masks):
    example = Data.example[0], torch.full((32, 32), 2, dtype=torch.uint8)


class Deep(Masks):
    example = Data.example[0], torch.zeros(1, 32, 32, dtype=torch.uint8)


class Long(Masks):
    example = Data.example[0], torch.zeros(32, 32, dtype=torch.int64)


class Points(Data):
    task, eyes, mirrored = "landmarks", (0, 1), (1, 0)
    example = Data.example[0], torch.zeros(3, 2)
"""


@pytest.fixture
def parts(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe, its broken parts beside it."""
    (recipe.parent / "broken_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(recipe.parent)
    return recipe


@pytest.mark.parametrize(
    ("key", "part", "words"),
    [
        ("policy.name", "Raises", "broken_parts.py:10: RuntimeError: no way"),
        ("policy.name", "Far", "distilled: policy, at step 0: act chose bin 99 of 0 to "),
        ("policy.name", "Below", "act chose bin -1 of 0 to "),
        ("policy.name", "Wide", ", 3) torch.int64"),
        ("policy.name", "Nothing", "of torch.int64, not None"),
        ("policy.name", "NoNumbers", "broken_parts:NoNumbers: probabilities returned numbers that"),
        ("policy.name", "Flat", "of torch.float32, not (3,) torch.float32"),
        ("policy.name", "Bare", "is not a policy: it has no act, learn, probabilities, state_dict"),
        ("pairs.0.loss", "failing", "KeyError: 'key'"),
        ("pairs.0.loss", "mean", "'broken_parts:mean' must return one value per image, shape ("),
        ("pairs.0.loss", "nothing", "must return one value per image, shape"),
        ("pairs.0.loss", "detached", "returns values without a gradient to the student's map"),
        (
            "pairs.0.loss",
            "alone",
            "pairs.0.loss: broken_parts:alone cannot be called with a student's",
        ),
        ("teacher.name", "no_teacher", "broken_parts:no_teacher gives no teacher: it has no name"),
        ("teacher.name", "viewless", "viewless cannot be called with (path, layers=, input=, "),
        (
            "teacher.name",
            "lightless",
            "features of broken_parts:lightless cannot be called with",
        ),
        ("teacher.name", "forgetful", "broken_parts:forgetful: tiny gives nothing for layer"),
        ("teacher.name", "narrow", "broken_parts:narrow: tiny gives (1, 5, "),
        ("data.benchmark", "NoNames", "gives no benchmark: it has no class_names"),
        (
            "data.benchmark",
            "Dancing",
            "'data' has the unknown task 'dancing'; choose from classification",
        ),
        ("data.benchmark", "NoData", "gives no pairs of image and target by their number: "),
        ("data.benchmark", "Grey", "of torch.uint8, not (1, 32, 32) torch.uint8"),
        ("data.benchmark", "Floating", "of torch.uint8, not (3, 32, 32) torch.float32"),
        ("data.benchmark", "Third", "has a target 2, not a class from 0 to 1"),
        ("data.benchmark", "Unpaired", "gives no pairs of image and target by their number: "),
        ("data.benchmark", "Empty", "data: the training split of data is empty"),
        ("data.benchmark", "Scalar", "has a target tensor(1), not a class from 0 to 1 (an int)"),
        ("data.benchmark", "Numpy", "has a target np.int64(1), not a class from 0 to 1 (an int)"),
        ("data.benchmark", "Listed", "has a target 7, not a class from 0 to 1 (an int) or 255, in"),
        ("data.benchmark", "Third32", "has a target with 2, not a mask (H, W) of torch.uint8 with"),
        ("data.benchmark", "Deep", "has a target (1, 32, 32) torch.uint8, not a mask (H, W) of"),
        ("data.benchmark", "Long", "has a target (32, 32) torch.int64, not a mask (H, W) of"),
        ("data.benchmark", "Points", "(3, 2) torch.float32, not points (2, 2) of torch.float32"),
    ],
)
def test_a_broken_part_is_one_line_and_leaves_nothing(
    parts: Path, refuse: Refuse, key: str, part: str, words: str
) -> None:
    options = ["data.options={}"] if key == "data.benchmark" else []
    line = refuse("train", parts, f"{key}=broken_parts:{part}", "train.arms=[distilled]", *options)
    assert words in line
    assert not (parts.parent / "runs" / "tiny").exists()


def test_a_wrong_target_that_training_meets_is_one_line(parts: Path, refuse: Refuse) -> None:
    options = ("data.options={}", "train.arms=[distilled]", "data.labelled=40", "train.batch=40")
    line = refuse("train", parts, "data.benchmark=broken_parts:Late", *options)
    told = "has a target 7, not a class from 0 to 1 (an int) or 255, in example 39 of train"
    assert line == f"data.benchmark: broken_parts:Late {told}"


def test_wrong_images_and_splits_are_one_line_in_every_command(
    parts: Path, refuse: Refuse, tmp_path: Path
) -> None:
    own = ("data.options={}", "train.arms=[distilled]", "train.steps=5")
    line = refuse("train", parts, "data.benchmark=broken_parts:OneSplit", *own)
    told = "data.benchmark: dataset('test') of broken_parts:OneSplit: no other split"
    assert line == told
    line = refuse("train", parts, "data.benchmark=broken_parts:WrongTest", *own)
    assert "not a class from 0 to 1 (an int) or 255, in example 39 of test" in line
    assert line.endswith("; distilled is trained, --resume scores it")
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text("name: bare\ndata: {benchmark: broken_parts:NoLabels}\nunet: {size: tiny}\n")
    line = refuse("teacher", "train", teacher, f"output={tmp_path}", "batch=40", "steps=1")
    assert line.endswith("torch.uint8, not (1, 32, 32) torch.uint8, in example 39 of train")


def test_masks_may_come_in_groups_that_are_no_classes(parts: Path) -> None:
    own = ("data.benchmark=broken_parts:Grouped", "data.options={}", "train.arms=[distilled]")
    assert main(["train", str(parts), *own, "--dry-run"]) == 0


def test_what_is_no_part_at_all_is_one_line(parts: Path, refuse: Refuse) -> None:
    assert "cannot be built as a policy" in refuse("train", parts, "policy.name=os.path:join")
    assert "posixpath" in refuse("train", parts, "pairs.0.loss=os.path:join")
    (parts.parent / "leaving_part.py").write_text("raise SystemExit(3)")
    line = refuse("train", parts, "pairs.0.loss=leaving_part:loss")
    assert line == "pairs.0.loss: 'leaving_part:loss' cannot be imported: SystemExit: 3"
    line = refuse("train", parts, "pairs.0.loss=json:missing")
    assert "module 'json' has no 'missing' (" in line
    assert line.endswith("json/__init__.py)")


def test_a_state_that_could_not_be_read_back_keeps_the_checkpoint(
    parts: Path, refuse: Refuse, tmp_path: Path
) -> None:
    line = refuse("train", parts, "policy.name=broken_parts:Unkept", "train.arms=[distilled]")
    assert line.startswith("checkpoint: policy.memory.0 is a builtins.object, which cannot")
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(UserError, match=r"checkpoint: step is a builtins\.object"):
        checkpoint.save(path, {"step": object()})
    assert checkpoint.load(path) == {"step": 1}


def test_a_mistake_of_ours_is_not_blamed_on_others(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("distill.commands.train.train_arm", broken)
    with pytest.raises(AssertionError, match="ours"):
        main(["train", str(parts), "policy.name=broken_parts:Unkept"])
