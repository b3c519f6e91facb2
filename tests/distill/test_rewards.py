"""Rewards and mixtures through the whole training step, on a tiny run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill import checkpoint
from distill.build import build_accelerator, build_training_set
from distill.cli import main
from distill.config import RunConfig
from distill.errors import UserError
from distill.matching.distiller import Losses
from distill.matching.losses import task_loss
from distill.registry import TABLES
from distill.run_folder import read_metrics
from distill.training.batch import Batch
from distill.training.loop import batches
from distill.training.trainer import Trainer
from rl_policy.soft_mix import SoftMix
from rl_policy.table import ReplayTable

Load = Callable[..., RunConfig]
ALL = "policy.rewards={teacher_task: 1, student_progress: 0.5, label_free: 2}"
FREE = "policy.rewards={label_free: 1}"


def build(config: RunConfig) -> Trainer:
    data = build_training_set(config.data)
    return Trainer(config, "distilled", data, build_accelerator(config.device))


def learning(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the policy is given to learn from, step by step; it learns all the same."""
    assert trainer.policy is not None
    learn, given = trainer.policy.learn, []

    def keep(*arguments: Any) -> Any:
        given.append(arguments)
        return learn(*arguments)

    monkeypatch.setattr(trainer.policy, "learn", keep)
    return given


@pytest.mark.parametrize(
    ("changes", "looks"),
    [
        ([], 8),
        (["train.floor_every=1"], 16),
        (["teacher.input=average", "teacher.draws=3"], 8),
        (["policy.name=soft_mix", "policy.bins=3"], 24),
        (["data.unlabelled=0"], 4),
        (["train.finetune_steps=5"], 0),
        # A chunk of 8 images at a time, and the second time all comes from the disk.
        (["teacher.cache={}", "data.augment=none", "policy.bins=1"], 8),
    ],
)
def test_looks_of_the_teacher_are_counted(
    load: Load, tmp_path: Path, changes: list[str], looks: int
) -> None:
    words = [change.format(tmp_path / "cache") for change in changes]
    trainer = build(load("train.floor_every=0", *words))
    trainer.open_cache()
    batch = next(batches(trainer))
    trainer.train_step(batch)
    assert trainer.teacher_images == looks
    trainer.train_step(batch)
    assert trainer.teacher_images == (looks if trainer.cache else 2 * looks)
    resumed = build(load("train.floor_every=0", *words))
    resumed.load_state(trainer.state(), tmp_path)
    assert resumed.teacher_images == trainer.teacher_images


def test_label_free_rewards_the_unlabelled_images_too(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(load(FREE, "policy.image_baseline=false"))
    given = learning(trainer, monkeypatch)
    losses = trainer.train_step(next(batches(trainer)))
    context, bins, rewards, _ = given[0]
    assert torch.equal(context, losses.context)
    assert torch.equal(bins, losses.bins)
    assert torch.equal(rewards, losses.rewards["label_free"])
    assert len(rewards) == 8
    assert trainer.distiller.reward_head is None


def test_the_number_of_clusters_stands_in_the_recipe(load: Load) -> None:
    for words, count in (([], 16), (["policy.label_free.clusters=5"], 5)):
        label_free = build(load(FREE, *words)).distiller.label_free
        assert label_free is not None
        assert len(label_free.prototypes) == count
        assert label_free.head.head[-1].out_features == count
    for word, told in (
        ("cluster=5", "'policy.label_free.cluster'; did you mean 'policy.label_free.clusters'?"),
        ("clusters=1", "policy.label_free.clusters: input should be greater than or equal to 2"),
    ):
        with pytest.raises(UserError) as raised:
            load(FREE, f"policy.label_free.{word}")
        assert told in str(raised.value)


def test_label_free_reads_no_label(load: Load) -> None:
    """Only the task loss does, which is off while features are distilled."""
    config = load(FREE, "train.schedule=distill_then_finetune", "train.finetune_steps=2")
    (labelled, targets, *more), rewards = next(batches(build(config))), []
    for labels in (targets, (targets + 1) % 5):
        losses = build(config).train_step(Batch(labelled, labels, *more))
        rewards.append(losses.rewards["label_free"])
    assert torch.equal(*rewards)


def test_progress_is_what_the_step_did_to_the_loss_of_each_labelled_image(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "policy.image_baseline=false"
    trainer = build(load("policy.rewards={student_progress: 1}", "train.lr=0.01", plain))
    given, distiller = learning(trainer, monkeypatch), trainer.distiller
    measure, measured = distiller.task_losses, []

    def keep(*arguments: Any) -> Tensor:
        weights = [x.clone() for x in distiller.student.parameters()]
        measured.append((measure(*arguments), weights))
        return measured[-1][0]

    monkeypatch.setattr(distiller, "task_losses", keep)
    batch = next(batches(trainer))
    modes = [module.training for module in distiller.modules()]
    first = [x.clone() for x in distiller.student.parameters()]
    trainer.train_step(batch)
    (before, old), (after, new) = measured
    assert torch.equal(given[0][2], before - after)
    torch.testing.assert_close(old, first, rtol=0, atol=0)
    torch.testing.assert_close(new, list(distiller.student.parameters()), rtol=0, atol=0)
    assert (before - after).abs().min() > 0
    assert [module.training for module in distiller.modules()] == modes
    distiller.student.eval()  # as it is scored: without dropout, and with its running statistics
    assert torch.equal(after, measure(batch.labelled, batch.targets))


@pytest.mark.parametrize("reward", TABLES["rewards"])
def test_any_reward_alone_leaves_a_trace_of_the_policy(recipe: Path, reward: str) -> None:
    words = [f"policy.rewards={{{reward}: 1}}", "train.arms=[distilled]", "train.steps=2"]
    assert main(["train", str(recipe), *words]) == 0
    folder = recipe.parent / "runs" / "tiny"
    for row in read_metrics(folder):
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert {"policy/reward", "policy/entropy", "policy/timestep"} <= row.keys()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["policy"]["mean_reward"] is not None
    assert (folder / "policy.png").is_file()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_rewards_together_resume_to_the_bit(
    load: Load, tmp_path: Path, accumulate: int
) -> None:
    config = load(ALL, f"train.accumulate={accumulate}", "train.precision=bf16")
    whole, first, resumed = (build(config) for _ in range(3))
    stream = [*batches(whole)]
    for batch in stream:
        whole.train_step(batch)
    for batch in stream[:3]:
        first.train_step(batch)
    checkpoint.save(tmp_path / "last.pt", first.state())
    resumed.load_state(checkpoint.load(tmp_path / "last.pt"), tmp_path)
    for batch in stream[3:]:
        resumed.train_step(batch)
    for part in ("distiller", "optimizer", "policy", "rewards"):
        torch.testing.assert_close(whole.state()[part], resumed.state()[part], rtol=0, atol=0)
    assert whole.state()["rewards"]["scales.1.updates"] == 5
    assert whole.figures.keys() >= {"reward", "reward/student_progress", "reward/label_free"}


def soft(context_size: int, bins: int, batch: int, seed: int) -> SoftMix:
    """A mixture, but no class that says so."""
    return SoftMix(context_size, bins, batch, seed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["policy.rewards={label_fre: 1}"], "unknown name 'label_fre'; did you mean 'label_free'?"),
        (
            [
                "policy.rewards={student_progress: 1}",
                *("train.schedule=distill_then_finetune", "train.finetune_steps=2"),
            ],
            "student_progress needs a task loss, which the distillation stage",
        ),
        (["policy.name=soft_mix", FREE], "soft_mix learns from the loss of teacher_task's reward"),
        (["policy.name=grid"], "policy.options.table must be the recorded rewards"),
        ([f"policy.name={__name__}:soft"], "mixes timesteps; name its class, MODULE:CLASS"),
        (["policy.rewards={teacher_task: 0}"], "greater than 0"),
        (["policy.rewards={}"], "policy.rewards"),
    ],
)
def test_rewards_without_meaning_are_refused(load: Load, changes: list[str], words: str) -> None:
    with pytest.raises(UserError, match="policy") as raised:
        build(load(*changes))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_grid_takes_the_bin_nearest_to_the_best_timestep(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = np.array([[0.0, 1.0, 0.5]], np.float32)
    table = ReplayTable(
        contexts=np.zeros((1, 2), np.float32), rewards=rewards, timesteps=np.array([0, 700, 999])
    )
    (tmp_path / "table.safetensors").write_bytes(table.to_bytes())
    options = f"policy.options={{table: {tmp_path / 'table.safetensors'}}}"
    trainer = build(load("policy.name=grid", options))
    assert trainer.timesteps.tolist() == [0, 333, 666, 999]
    losses = trainer.train_step(next(batches(trainer)))
    assert losses.bins.tolist() == [2] * 8
    assert trainer.teacher is not None
    for probed, told in ((trainer.teacher.fingerprint, False), ("another", True)):
        figures = {"settings": {"teacher (fingerprint)": probed}}
        (tmp_path / "probe.json").write_text(json.dumps(figures))
        build(load("policy.name=grid", options))
        assert ("was recorded with another teacher than tiny" in capsys.readouterr().err) is told


# The mixture of all timesteps


def mixing(load: Load, *changes: str) -> Trainer:
    return build(load("policy.name=soft_mix", "policy.bins=3", *changes))


def test_only_the_reward_heads_loss_moves_the_weights_of_a_mixture(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for changes in ((), ("train.feature_weight=50",), ("pairs.0.projector=film",)):
        trainer = mixing(load, *changes)
        given = learning(trainer, monkeypatch)
        trainer.train_step(next(batches(trainer)))
        found.append(given[0])
        assert trainer.floor.means()  # of the mixture, under another draw of the noise
    (context, weights, gradients, _), heavy, film = found
    assert weights.shape == gradients.shape == (4, 3)
    torch.testing.assert_close(weights, torch.full((4, 3), 1 / 3))
    assert gradients.abs().min() > 0
    assert torch.equal(gradients, heavy[2])
    torch.testing.assert_close(context, film[0])


def test_gradients_of_a_mixture_are_those_of_each_images_own_loss(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the differences of the losses themselves."""
    trainer = mixing(load, "teacher.input=clean")
    given = learning(trainer, monkeypatch)
    head = trainer.distiller.reward_head
    assert head is not None
    assert trainer.teacher is not None
    seen: list[Any] = []

    def look(_: Any, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        seen.append((*inputs, {name: x.clone() for name, x in head.state_dict().items()}))

    hook, batch = head.register_forward_hook(look), next(batches(trainer))
    trainer.train_step(batch)
    hook.remove()
    mixed, bins, state = seen[0]
    head.load_state_dict(state)
    head.eval()
    layer, step = trainer.distiller.reward_layer, 1e-2
    maps = [trainer.teacher.features(batch.labelled, t.expand(4))[layer] for t in trainer.timesteps]
    torch.testing.assert_close(mixed.detach(), torch.stack(maps).mean(0), rtol=1e-4, atol=1e-4)
    for k, feature in enumerate(maps):
        higher, lower = (
            task_loss(head((mixed + shift * feature).detach(), bins), batch.targets)
            for shift in (step, -step)
        )
        slope = (higher - lower).detach() / (2 * step)
        torch.testing.assert_close(given[0][2][:, k], slope, rtol=0.02, atol=1e-3)


def test_a_mixture_comes_from_the_cache_too_and_is_resumed_exactly(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(
        *("policy.name=soft_mix", "policy.bins=3", "teacher.input=clean", "data.augment=none"),
        *("train.accumulate=2", "data.labelled=6"),
    )
    cached = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, cache=str(tmp_path / "cache"))
    )

    def run(trainer: Trainer) -> list[Losses]:
        trainer.open_cache()
        return [trainer.train_step(batch) for batch in batches(trainer)]

    whole, other, resumed = build(config), build(cached), build(config)
    first, second = run(whole), run(other)
    assert other.cache is not None
    assert len(other.cache) > 0
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one.reward_head, two.reward_head, rtol=1e-4, atol=1e-5)
    assert isinstance(whole.policy, SoftMix)
    assert whole.policy.logits.abs().min() > 0.01
    stream = [*batches(resumed)]
    again = build(config)
    for batch in stream[:3]:
        again.train_step(batch)
    resumed.load_state(again.state(), tmp_path)
    for batch in stream[3:]:
        resumed.train_step(batch)
    for part in ("distiller", "policy"):
        torch.testing.assert_close(whole.state()[part], resumed.state()[part], rtol=0, atol=0)
