"""What the losses of a step are made of, and whose labels they see."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.build import build_accelerator, build_training_set
from distill.commands.train import make_card
from distill.config import Arm, RunConfig
from distill.deployment.folder import export_student, load_student
from distill.errors import UserError
from distill.training.batch import Batch
from distill.training.loop import batches
from distill.training.trainer import Trainer
from rl_policy.progress import WithProgress
from rl_policy.simple import LinearDecay

Load = Callable[..., RunConfig]


def build(config: RunConfig, arm: Arm = "distilled") -> Trainer:
    data = build_training_set(config.data)
    return Trainer(config, arm, data, build_accelerator(config.device))


def steps(trainer: Trainer, count: int = 1) -> list[Any]:
    """The losses of the next steps."""
    stream = batches(trainer)
    return [trainer.train_step(next(stream)) for _ in range(count)]


HIDDEN_LABELS = '''
import torch
from distill.benchmarks.shapes import Shapes

class Hidden(Shapes):
    """Shapes whose masks are nonsense but for the visible ones."""

    def __init__(self, root, *, visible, **options):
        super().__init__(root, **options)
        self.visible = visible

    def dataset(self, split):
        scenes, visible = super().dataset(split), self.visible

        class Masked:
            def __len__(self):
                return len(scenes)

            def __getitem__(self, index):
                image, mask = scenes[index]
                return image, mask if index in visible else torch.full_like(mask, 6)

        return Masked()
'''


def test_labels_of_unlabelled_images_are_never_read(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hidden_labels.py").write_text(HIDDEN_LABELS)
    monkeypatch.syspath_prepend(tmp_path)
    visible = build_training_set(load().data).labelled_indices
    other = f"data.options.visible={visible}"
    runs = [build(load()), build(load("data.benchmark=hidden_labels:Hidden", other))]
    first, second = (steps(trainer, 3) for trainer in runs)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    states = [trainer.state()["distiller"] for trainer in runs]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_unlabelled_images_contribute_the_feature_loss_only(load: Load) -> None:
    # A ViT, whose images do not see each other as those of a batch norm do.
    config = load(
        "student={model: test_vit}",
        "pairs.0.student=blocks.3",
        "pairs.0.standardise=false",
        "policy.name=fixed",
    )
    labelled, targets, unlabelled, *_ = next(batches(build(config)))
    assert unlabelled is not None
    noise = torch.rand(unlabelled.shape, generator=torch.Generator().manual_seed(0))
    first, second, alone = (
        build(config).train_step(Batch(labelled, targets, more))
        for more in (unlabelled, noise, None)
    )
    assert first.task == pytest.approx(alone.task.item(), abs=1e-6)
    assert first.task == pytest.approx(second.task.item(), abs=1e-6)
    assert first.feature != pytest.approx(second.feature.item(), rel=1e-3)
    rewards = first.rewards["teacher_task"]
    assert torch.allclose(rewards, second.rewards["teacher_task"])
    assert (len(rewards), len(first.bins), len(alone.bins)) == (4, 8, 4)


def test_unlabelled_examples_come_without_label(load: Load) -> None:
    data = build_training_set(load().data)
    assert {data.unlabelled.examples[index][1] for index in data.unlabelled_indices} == {255}
    assert len(data.unlabelled_indices) == 12


def test_the_policy_learns_from_the_labelled_images(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[tuple[Tensor, ...]] = []
    trainer = build(load("policy.image_baseline=false"))
    assert trainer.policy is not None
    monkeypatch.setattr(trainer.policy, "learn", lambda *given: learned.append(given[:3]))
    losses = steps(trainer)[0]
    context, bins, rewards = learned[0]
    assert torch.equal(context, losses.context[:4])
    assert torch.equal(bins, losses.bins[:4])
    assert torch.equal(rewards, losses.rewards["teacher_task"])
    assert not torch.equal(losses.context[:4], losses.context[4:])


def test_the_total_is_the_weighted_sum(load: Load) -> None:
    config = load(
        "train.feature_weight=0.5",
        "pairs=[{student: layer3, teacher: mid_block, weight: 3}]",
    )
    single = load("pairs=[{student: layer3, teacher: mid_block}]")
    trainer, each = build(config), []
    trainer.distiller.losses[0].register_forward_hook(lambda *seen: each.append(seen[-1]))
    weighted, plain = steps(trainer)[0], steps(build(single))[0]
    assert weighted.feature.item() == pytest.approx(3 * each[0].mean().item(), rel=1e-6)
    assert plain.feature.item() == pytest.approx(each[0].mean().item(), rel=1e-6)
    expected = weighted.task + 0.5 * weighted.feature + weighted.reward_head
    assert weighted.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_pair_adds_its_loss(load: Load) -> None:
    one = "{student: layer2, teacher: up_blocks.0, loss: cosine, standardise: false}"
    two = "{student: layer3, teacher: mid_block, loss: mse, pooled: true}"
    both, first, second = (
        steps(build(load(f"pairs=[{pairs}]", "policy.name=fixed")))[0].feature.item()
        for pairs in (f"{one}, {two}", one, two)
    )
    # Not exactly: the projectors are drawn one after the other.
    assert both == pytest.approx(first + second, rel=0.05)


def test_rewards_are_what_the_head_tells_beyond_the_classes_of_the_bin(load: Load) -> None:
    trainer = build(load())
    head = trainer.distiller.reward_head
    assert head is not None
    losses = steps(trainer)[0]
    # Nothing was seen before, so that the bin alone tells no class from another; the first head
    # is about as wise, and a tenth of the same is mixed in
    classes = trainer.data.benchmark.num_classes
    gain = math.log(classes) - losses.reward_head.item()
    assert losses.rewards["teacher_task"].mean().item() == pytest.approx(gain, abs=0.05)
    # The labelled images, each with a share for every class
    assert head.seen.sum().item() == pytest.approx(4)
    assert (head.seen.sum(dim=1) > 0).tolist() == [
        bin in losses.bins[:4].tolist() for bin in range(4)
    ]


def test_the_policy_may_see_the_small_image_in_place_of_the_student(load: Load) -> None:
    trainer = build(load("policy.context=image", "policy.name=reinforce"))
    labelled, targets, unlabelled, *_ = next(batches(trainer))
    assert unlabelled is not None
    losses = trainer.train_step(Batch(labelled, targets, unlabelled))
    images = torch.cat([labelled, unlabelled])
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(-2, -1))  # 8x8 of 32 px
    torch.testing.assert_close(losses.context, patches.flatten(1))
    assert not losses.context.requires_grad


def test_the_policy_may_see_the_whole_image_through_convolutions(load: Load) -> None:
    options = "policy.options={network: conv}"
    image = ("policy.context=image", "policy.image_size=32")
    trainer = build(load("policy.name=reinforce", options, *image))
    labelled, targets, *_ = next(batches(trainer))
    losses = trainer.train_step(Batch(labelled, targets))
    torch.testing.assert_close(losses.context, labelled.flatten(1))
    for others in ((), (*image, "policy.progress=true")):
        with pytest.raises(UserError, match=r"^policy\.options\.network=conv reads only images; "):
            build(load("policy.name=reinforce", options, *others))


def test_the_policy_may_see_the_progress_of_training(load: Load) -> None:
    trainer = build(load("policy.name=reinforce", "policy.progress=true"))
    assert isinstance(trainer.policy, WithProgress)
    steps(trainer)
    assert trainer.policy.progress == trainer.progress > 0
    with pytest.raises(UserError, match=r"^policy\.progress: soft_mix has one mixture"):
        build(load("policy.name=soft_mix", "policy.progress=true"))


def test_the_reward_may_be_minus_the_loss_of_the_head(load: Load) -> None:
    plain = "{conditioned: false, standardised: false, beyond_bin: false, hidden: 24, layers: 3}"
    trainer = build(load(f"policy.reward_head={plain}"))
    head = trainer.distiller.reward_head
    assert head is not None
    widths = [tuple(weight.shape) for weight in head.parameters() if weight.ndim == 2]
    assert widths == [(24, 16), (24, 24), (trainer.data.benchmark.num_classes, 24)]
    losses = steps(trainer)[0]
    rewards = losses.rewards["teacher_task"]
    assert len(rewards) == 4
    assert rewards.mean().item() == pytest.approx(-losses.reward_head.item(), rel=1e-6)
    assert not rewards.requires_grad
    assert head.seen.sum() == 0


@pytest.mark.parametrize("arm", ["scratch", "distilled"])
def test_a_second_head_adds_its_weighted_task_loss_and_learns(load: Load, arm: Arm) -> None:
    plain, second = build(load(), arm), build(load("train.auxiliary=0.4"), arm)
    doubled = build(load("train.auxiliary=0.8"), arm)
    head = second.distiller.auxiliary
    assert plain.distiller.auxiliary is None
    assert head is not None
    assert head[0].in_channels == second.student.backbone.feature_info[-2]["num_chs"]
    before = [weight.clone() for weight in head.parameters()]
    one, two, twice = (steps(trainer)[0] for trainer in (plain, second, doubled))
    assert one.task == pytest.approx(two.task.item(), abs=1e-6)  # that of the head that leaves
    more = (two.total - one.total).item()
    assert more > 0.1
    assert (twice.total - one.total).item() == pytest.approx(2 * more, rel=1e-4)
    after = list(head.parameters())
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_second_head_stays_behind_at_export(load: Load, tmp_path: Path) -> None:
    config = load("train.auxiliary=0.4")
    trainer = build(config, "scratch")
    steps(trainer)
    assert any(name.startswith("auxiliary") for name in trainer.state()["distiller"])  # to resume
    student = trainer.average.module
    card = make_card(config, trainer.data.benchmark, student, {"arm": "scratch"})
    export_student(student, card, tmp_path / "student")
    loaded, _ = load_student(tmp_path / "student")
    assert loaded.state_dict().keys() == build(load(), "scratch").student.state_dict().keys()


def test_a_second_head_needs_a_second_map_of_masks(load: Load) -> None:
    with pytest.raises(UserError, match=r"train.auxiliary: .* there is only layer4; name two"):
        build(load("train.auxiliary=0.4", "student.head_layers=[layer4]"))


def test_progress_runs_over_the_steps_in_which_the_policy_acts(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(
        load(
            "policy.name=linear_decay",
            "train.schedule=distill_then_finetune",
            "train.steps=6",
            "train.finetune_steps=2",
        )
    )
    assert isinstance(trainer.policy, LinearDecay)
    told: list[float] = []
    act, learn = trainer.policy.act, trainer.policy.learn
    monkeypatch.setattr(trainer.policy, "act", lambda *x: (told.append(x[-1]), act(*x))[1])
    monkeypatch.setattr(trainer.policy, "learn", lambda *x: (told.append(x[-1]), learn(*x))[1])
    steps(trainer, 6)
    assert told == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]
    assert trainer.policy.allowed == 1  # of 4 bins: the decay comes to its end
