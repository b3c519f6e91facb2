"""The loop of one arm: its log and step, how it goes on, and what stops it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor

from distill import checkpoint
from distill.build import build_accelerator, build_training_set
from distill.config import Arm, RunConfig
from distill.errors import Interrupted, UserError
from distill.run_folder import read_metrics
from distill.stopping import StopSignal
from distill.training.loop import batches, checkpoint_path, train_arm
from distill.training.trainer import Trainer

Load = Callable[..., RunConfig]


def build(config: RunConfig, arm: Arm = "distilled") -> Trainer:
    data = build_training_set(config.data)
    return Trainer(config, arm, data, build_accelerator(config.device))


def train(trainer: Trainer, folder: Path) -> None:
    """To the last step, with log and checkpoints."""
    checkpoint_path(folder, trainer.arm).parent.mkdir(parents=True, exist_ok=True)
    train_arm(trainer, folder, StopSignal(), lambda trainer, log: None)


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
    """The tensors of two nested containers are equal to the bit."""
    torch.testing.assert_close(dict(tensors(first)), dict(tensors(second)), rtol=0, atol=0)


def test_the_log_has_losses_rate_and_policy(load: Load, tmp_path: Path) -> None:
    trainer = build(load("train.log_every=2"))
    train(trainer, tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert {"loss/task", "loss/feature", "loss/reward_head", "lr"} <= row.keys()
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert 1 <= row["policy/effective_arms"] <= 4.001
        assert 0 <= row["policy/timestep"] <= 999
    # Five steps, the first a warm-up, then four of half a cosine; a row has its own step's rate.
    assert [row["lr"] / 1e-3 for row in rows] == pytest.approx([1.0, 0.5, 0.146447], abs=1e-5)


def test_the_average_follows_the_student(load: Load) -> None:
    trainer = build(load("train.ema=0"))
    steps(trainer)
    assert_same(trainer.average.module.state_dict(), trainer.student.state_dict())


def test_clipping_limits_the_step(load: Load) -> None:
    free, clipped = (
        build(load("train.optimizer=sgd", "train.weight_decay=0", f"train.clip={clip}"))
        for clip in ("null", "1e-8")
    )
    before = [p.clone() for p in clipped.distiller.parameters()]
    for trainer in (free, clipped):
        steps(trainer)
    assert any(
        not torch.allclose(b, p, atol=1e-6)
        for b, p in zip(before, free.distiller.parameters(), strict=True)
    )
    for b, p in zip(before, clipped.distiller.parameters(), strict=True):
        assert torch.allclose(b, p, atol=1e-10, rtol=0)


def test_clipping_a_reward_head_does_not_slow_the_student_down(load: Load) -> None:
    plain, steep = (build(load("train.clip=0.1")) for _ in range(2))
    assert steep.distiller.reward_head is not None
    with torch.no_grad():
        for weight in steep.distiller.reward_head.parameters():
            weight.mul_(100)
    assert steps(plain)[0].reward_head < steps(steep)[0].reward_head
    assert_same(plain.student.state_dict(), steep.student.state_dict())


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("a2c", "infonce"),
        ("ppo", "mse"),
        ("reinforce", "rkd"),
        ("uniform", "at"),
        ("fixed", "l1"),
        ("linear_decay", "cosine"),
        ("dqn", "mse"),
        ("thompson", "mse"),
        ("ucb", "mse"),
    ],
)
def test_every_policy_trains_and_goes_on_to_the_bit(
    load: Load, tmp_path: Path, name: str, loss: str
) -> None:
    """Stopped at a checkpoint and taken up by a new trainer: the same numbers as in one go."""
    options = "policy.options={steps: 2}" if name == "ppo" else "policy.options={}"
    config = load(f"policy.name={name}", options, f"pairs.0.loss={loss}", "data.augment=strong")
    whole = build(config)
    steps(whole, 5)
    first = build(config)
    steps(first, 3)
    checkpoint.save(tmp_path / "last.pt", first.state())
    second = build(config)
    second.load_state(checkpoint.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert second.step == 3
    steps(second, 2)
    assert_same(whole.state(), second.state())


def test_bfloat16_and_sgd_go_on_to_the_bit_too(load: Load, tmp_path: Path) -> None:
    config = load("train.precision=bf16", "teacher.dtype=bfloat16", "train.optimizer=sgd")
    whole, first, second = (build(config) for _ in range(3))
    steps(whole, 4)
    steps(first, 2)
    checkpoint.save(tmp_path / "last.pt", first.state())
    second.load_state(checkpoint.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    steps(second, 2)
    assert_same(whole.state(), second.state())


# What goes wrong


def test_a_checkpoint_of_another_arm_teacher_or_data_is_refused(load: Load) -> None:
    state = build(load()).state()
    for what, other in (
        ("arm", build(load(), "random_teacher")),
        ("teacher", build(load("teacher.random_weights=3"))),
        ("data", build(load("data.options.train=20"))),
    ):
        with pytest.raises(UserError, match=f"last.pt: the {what} is not the one"):
            other.load_state(state, Path("last.pt"))


@pytest.mark.parametrize(
    "change",
    [
        ["student={model: test_convnext}", "pairs.0.student=stages.2"],
        ["pairs.0.teacher=mid_block", "pairs.0.student=layer2"],
        ["policy.name=reinforce"],
        ["policy.bins=5"],
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(load: Load, change: list[str]) -> None:
    trainer = build(load())
    steps(trainer, 2)
    other = build(load(*change))
    with pytest.raises(UserError, match=r"^resume: .* in last\.pt, but is .* now; change it back"):
        other.load_state(trainer.state(), Path("last.pt"))
    # As a version would have written it that built another from the same recipe
    state = trainer.state() | {"config": other.state()["config"]}
    with pytest.raises(UserError, match=r"last\.pt is of another architecture: .*; resume with"):
        other.load_state(state, Path("last.pt"))


OWN_LOSSES = '''
calls = 0

def distance(student, teacher):
    return (student - teacher).square().mean(dim=(1, 2, 3))

def infinite_at_three(student, teacher):
    global calls
    calls += 1
    return distance(student, teacher) / (calls != 3)

def kink_at_three(student, teacher):
    """Finite, with a gradient that is not, as that of a square root at 0."""
    global calls
    calls += 1
    loss = distance(student, teacher)
    if calls == 3:
        loss.register_hook(lambda gradient: gradient * float("nan"))
    return loss
'''


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        ("infinite_at_three", "feature loss"),
        ("kink_at_three", "gradient"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, what: str
) -> None:
    (tmp_path / f"own_{loss}.py").write_text(OWN_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    trainer = build(load(f"pairs.0.loss=own_{loss}:{loss}", "train.checkpoint_every=1"))
    line = f"distilled: the {what} is not finite at step 2; start a new run (name=...) with "
    with pytest.raises(UserError, match=re.escape(line)):
        train(trainer, tmp_path)
    kept = checkpoint.load(checkpoint_path(tmp_path, "distilled"))
    assert kept["step"] == 2
    assert all(bool(x.isfinite().all()) for _, x in tensors(kept) if x.is_floating_point())


@pytest.mark.parametrize("policy", ["a2c", "reinforce"])
def test_weights_that_explode_are_one_clear_line(load: Load, tmp_path: Path, policy: str) -> None:
    wild = ["train.lr=1e30", "train.clip=null", "train.warmup=0"]
    trainer = build(load(f"policy.name={policy}", *wild))
    with pytest.raises(UserError, match=r"distilled: the .* is not finite at step [1-4]; start a"):
        train(trainer, tmp_path)


def test_what_a_policy_says_of_its_learning_stands_in_the_row_of_its_update(
    load: Load, tmp_path: Path
) -> None:
    ppo = ("policy.name=ppo", "policy.options={steps: 2}", "train.log_every=1")
    train(build(load(*ppo)), tmp_path)
    rows = [row for row in read_metrics(tmp_path) if "policy/reward" in row]
    assert [("policy/learn/loss" in row) for row in rows] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("policy", "wild"),
    [
        ("a2c", "learning_rate: 1e30"),
        ("ppo", "learning_rate: 1e30, steps: 1, epochs: 9"),
        ("dqn", "learning_rate: 1e30, exploration_until: 0.1"),
        ("reinforce", "optimizer: sgd, learning_rate: 1, weight_decay: 1e9"),
    ],
)
def test_a_policy_that_explodes_is_one_clear_line(
    load: Load, tmp_path: Path, policy: str, wild: str
) -> None:
    trainer = build(load(f"policy.name={policy}", f"policy.options={{{wild}}}"))
    line = r"distilled: policy, at step [0-4]: the policy diverged: its outputs are"
    with pytest.raises(UserError, match=line):
        train(trainer, tmp_path)


def test_what_was_logged_before_ctrl_c_is_in_tensorboard(load: Load, tmp_path: Path) -> None:
    trainer, stop = build(load("train.log_every=1")), StopSignal()
    checkpoint_path(tmp_path, trainer.arm).parent.mkdir(parents=True)
    step = trainer.train_step

    def asked(batch: Any) -> Any:
        stop.set = trainer.step == 1
        return step(batch)

    trainer.train_step = asked  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="stopped at step 2 of 5"):
        train_arm(trainer, tmp_path, stop, lambda trainer, log: None)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "distilled"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/task")] == [1, 2]


def test_images_are_counted_as_they_are_seen(load: Load, tmp_path: Path) -> None:
    """Four labelled and four unlabelled a step, but the last two steps finetune on labels alone."""
    trainer = build(load("train.finetune_steps=2"))
    assert [more is not None for _, _, more, *_ in batches(trainer)] == [True] * 3 + [False] * 2
    train(trainer, tmp_path)
    assert trainer.images == 5 * 4 + 3 * 4
    none = build(load("data.unlabelled=0", "name=none"))
    train(none, tmp_path / "none")
    assert none.images == 5 * 4


def test_gradients_that_are_accumulated_are_those_of_the_whole_batch(load: Load) -> None:
    """Without what sees a part at a time: batch norms, and the reward head's standardisation."""
    changes = [
        "pairs=[{student: layer3, teacher: mid_block, standardise: false}]",
        *("policy.name=fixed", "policy.bins=1", "policy.lowest=100", "policy.highest=100"),
        *("teacher.input=clean", "train.precision=no", "teacher.dtype=float32"),
        *("train.optimizer=sgd", "train.clip=null", "train.schedule=joint", "student.kwargs={}"),
    ]
    whole, cut = build(load(*changes)), build(load(*changes, "train.accumulate=2"))
    for module in (*whole.distiller.modules(), *cut.distiller.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    first, second = steps(whole)[0], steps(cut)[0]
    assert first.task > 0 < first.feature
    torch.testing.assert_close(first.task, second.task)
    torch.testing.assert_close(first.feature, second.feature)
    torch.testing.assert_close(
        dict(whole.student.named_parameters()), dict(cut.student.named_parameters())
    )


@pytest.mark.parametrize("policy", ["a2c", "reinforce"])
def test_accumulation_rewards_the_policy_once_a_step_with_all_images(
    load: Load, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(load("train.accumulate=2", f"policy.name={policy}"))
    assert trainer.policy is not None
    learn, rewarded = trainer.policy.learn, []

    def count(context: Tensor, bins: Tensor, rewards: Tensor, progress: float) -> Any:
        rewarded.append((len(context), len(bins), len(rewards)))
        return learn(context, bins, rewards, progress)

    monkeypatch.setattr(trainer.policy, "learn", count)
    steps(trainer, 2)
    assert rewarded == [(trainer.config.train.batch,) * 3] * 2
