"""The arms of a run: what they share, what each sees, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import checkpoint
from distill.benchmarks import Examples
from distill.benchmarks.shapes import Shapes
from distill.build import build_accelerator, build_training_set
from distill.config import Arm, RunConfig
from distill.data import Draw
from distill.errors import UserError
from distill.training.loop import batches, checkpoint_path
from distill.training.trainer import Phase, Trainer
from teachers import loading
from teachers.diffusion import DiffusionTeacher

Load = Callable[..., RunConfig]


def build(config: RunConfig, arm: Arm = "distilled") -> Trainer:
    data = build_training_set(config.data)
    return Trainer(config, arm, data, build_accelerator(config.device))


def steps(trainer: Trainer, count: int = 1) -> list[Any]:
    """The losses of the next steps."""
    stream = batches(trainer)
    return [trainer.train_step(next(stream)) for _ in range(count)]


def tensors(tree: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested containers, with their places."""
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors(value, f"{prefix}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from tensors(value, f"{prefix}/{index}")


def assert_same(first: object, second: object) -> None:
    """Containers of tensors are equal to the bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_all_arms_start_from_the_same_student(load: Load) -> None:
    config = load()
    students = [build(config, arm).student for arm in ("distilled", "scratch", "random_teacher")]
    for student in students[1:]:
        assert_same(students[0].state_dict(), student.state_dict())
    other = build(load("seed=1")).student
    assert not torch.equal(students[0].backbone.conv1[0].weight, other.backbone.conv1[0].weight)


def test_all_arms_see_the_same_labelled_batches_and_scratch_no_others(load: Load) -> None:
    config = load("data.augment=strong")
    distilled, scratch = batches(build(config)), batches(build(config, "scratch"))
    for _ in range(config.train.steps):
        images, targets, more, *_ = next(distilled)
        assert torch.equal(images, (alone := next(scratch))[0])
        assert torch.equal(targets, alone[1])
        assert more is not None
        assert not torch.equal(images, more)
        assert alone[2] is None


def test_scratch_has_neither_teacher_nor_policy(load: Load) -> None:
    trainer = build(load(), "scratch")
    assert (trainer.teacher, trainer.policy, len(trainer.distiller.losses)) == (None, None, 0)
    losses = steps(trainer)[0]
    assert (losses.feature, len(losses.rewards)) == (0, 0)
    assert losses.total == losses.task


def test_the_random_teacher_is_another_of_the_same_architecture(load: Load) -> None:
    trained, random = build(load()).teacher, build(load(), "random_teacher").teacher
    assert trained is not None
    assert random is not None
    assert trained.fingerprint != random.fingerprint
    assert trained.channels == random.channels


def test_smaller_labelled_subsets_are_part_of_larger_ones(load: Load) -> None:
    chosen = [
        set(build_training_set(load(f"data.labelled={count}").data).labelled_indices)
        for count in (2, 6, 16)
    ]
    assert chosen[0] < chosen[1] < chosen[2] == set(range(16))
    other = build_training_set(load("data.labelled=6", "data.split_seed=1").data)
    assert set(other.labelled_indices) != chosen[1]


def test_an_image_with_a_label_is_kept_in_memory_once(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = Shapes.dataset

    def counting(self: Shapes, split: str) -> Examples:
        examples = plain(self, split)

        class Counting:
            def __len__(self) -> int:
                return len(examples)

            def __getitem__(self, index: int) -> tuple[Tensor, Tensor | int]:
                read.append(index)
                return examples[index]

        return Counting()

    monkeypatch.setattr(Shapes, "dataset", counting)
    data = build_training_set(load().data)
    read.clear()
    for examples in (data.labelled, data.unlabelled):
        for index in (3, 5):
            examples[Draw(index, seed=0)]
    assert read == [3, 5]


# Phases


def test_joint_teaches_in_every_step(load: Load) -> None:
    trainer = build(load())
    assert [trainer.phase(step) for step in range(5)] == [Phase(True, 1.0)] * 5


def test_distill_then_finetune_has_two_phases(load: Load) -> None:
    config = load("train.schedule=distill_then_finetune", "train.finetune_steps=2")
    trainer = build(config)
    phases = [trainer.phase(step) for step in range(5)]
    assert phases == [Phase(True, 0.0)] * 3 + [Phase(False, 1.0)] * 2
    assert [build(config, "scratch").phase(step) for step in (0, 4)] == [Phase(False, 1.0)] * 2


@pytest.mark.parametrize("schedule", ["joint", "distill_then_finetune"])
def test_the_average_holds_nothing_of_an_untrained_head(load: Load, schedule: str) -> None:
    options = ("train.steps=8", "train.finetune_steps=2", "train.ema=0.999")
    trainer = build(load(f"train.schedule={schedule}", *options))
    steps(trainer, 7)  # the first of fine-tuning is the last of them
    averaged, head = trainer.average.module.head, trainer.student.head
    assert averaged is not None
    assert head is not None
    same = [
        torch.equal(a, b) for a, b in zip(averaged.parameters(), head.parameters(), strict=True)
    ]
    assert all(same) == (schedule == "distill_then_finetune")
    first = [x.clone() for x in averaged.parameters()]
    steps(trainer)
    if schedule == "distill_then_finetune":  # the mean of the stage's two steps
        mean = [(a + b) / 2 for a, b in zip(first, head.parameters(), strict=True)]
        torch.testing.assert_close(mean, list(averaged.parameters()))


def test_distilling_leaves_the_head_alone_and_finetuning_the_teacher(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    features = DiffusionTeacher.features

    def counted(self: DiffusionTeacher, *arguments: Any) -> dict[str, Tensor]:
        calls.append(len(arguments[0]))
        return features(self, *arguments)

    trainer = build(
        load(
            "train.schedule=distill_then_finetune",
            "train.steps=3",
            "train.finetune_steps=1",
            "train.floor_every=0",
        )
    )
    monkeypatch.setattr(DiffusionTeacher, "features", counted)
    assert trainer.student.head is not None
    before = [parameter.clone() for parameter in trainer.student.head.parameters()]
    predicted: list[nn.Module] = []
    trainer.student.head.register_forward_hook(lambda head, *_: predicted.append(head))
    losses = steps(trainer, 2)
    assert predicted == []  # what no loss needs is not computed
    assert [loss.task.item() for loss in losses] == [0.0, 0.0]
    assert_same(before, list(trainer.student.head.parameters()))
    assert calls == [8, 8]
    learned = steps(trainer)[0]
    assert calls == [8, 8]
    assert learned.total == learned.task > 0
    after = list(trainer.student.head.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


# The teacher, and what else is frozen


def test_the_teacher_is_not_trained_and_in_no_state(load: Load) -> None:
    trainer = build(load())
    assert isinstance(trainer.teacher, DiffusionTeacher)
    before = loading.weights_hash(trainer.teacher.parts)
    steps(trainer, 3)
    assert not trainer.teacher.network.training
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for parameter in trainer.teacher.network.parameters()
    )
    assert loading.weights_hash(trainer.teacher.parts) == before
    theirs = {id(parameter) for parameter in trainer.teacher.network.parameters()}
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not theirs & (optimised | {id(parameter) for parameter in trainer.model.parameters()})
    weights = [x for x in trainer.teacher.network.parameters() if x.numel() > 100]
    saved = [x for _, x in tensors(trainer.state())]
    assert weights
    assert not any(torch.equal(mine, x) for x in saved for mine in weights)


def test_a_frozen_student_learns_with_its_head_alone(load: Load) -> None:
    trainer = build(load("student.freeze=true", "student.kwargs={}"), "scratch")
    before = {name: x.clone() for name, x in trainer.student.state_dict().items()}
    steps(trainer, 5)
    after = trainer.student.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head"}
    assert_same(
        {name: x for name, x in trainer.average.module.state_dict().items() if "backbone" in name},
        {name: x for name, x in before.items() if "backbone" in name},
    )


def test_init_from_takes_the_backbone_and_nothing_else(load: Load, finished_run: Path) -> None:
    fresh, warm = build(load()), build(load(f"student.init_from={finished_run}"))
    weights = checkpoint.load(checkpoint_path(finished_run, "distilled"))["average"]
    backbone = {n: x for n, x in weights.items() if n.startswith("backbone.")}
    assert_same(backbone, {n: x for n, x in warm.student.state_dict().items() if n in backbone})
    assert fresh.student.head is not None
    assert warm.student.head is not None
    assert_same(fresh.student.head.state_dict(), warm.student.head.state_dict())
    assert warm.step == 0


def test_init_from_another_architecture_names_both(load: Load, finished_run: Path) -> None:
    other = load(
        f"student.init_from={finished_run}",
        "student={model: test_vit}",
        f"student.init_from={finished_run}",
        "pairs.0.student=blocks.3",
    )
    with pytest.raises(
        UserError, match=r"student\.init_from: .* is a 'test_resnet', which does not match student"
    ):
        build(other)


def test_init_from_nothing_says_what_to_name(load: Load, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no exported student; name a finished run folder"):
        build(load(f"student.init_from={tmp_path}"))
