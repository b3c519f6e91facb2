"""What every family of teachers keeps to, on a small model in its own layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from teachers import loading


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def timesteps_of(teacher: Any, count: int = 4) -> Tensor:
    """A mix of timesteps, both ends among them."""
    last = len(teacher.noise_schedule) - 1
    return torch.tensor([0, last, last // 3, last // 2])[:count]


def noisy(teacher: Any) -> bool:
    return len(teacher.noise_schedule) > 1


def test_timesteps_noise_fractions_and_log_snr_are_one_scale(case: Any, path: str) -> None:
    """From each to each of the others and back, and as `add_noise` mixes."""
    schedule = case.build(path).noise_schedule
    timesteps = torch.arange(len(schedule))
    fractions = schedule.noise_fraction(timesteps)
    assert bool((fractions.diff() > 0).all())
    assert torch.equal(schedule.nearest(fractions), timesteps)
    ratio = fractions / (1 - fractions)  # noise over signal
    torch.testing.assert_close(schedule.log_snr(timesteps), -2 * ratio.log())
    torch.testing.assert_close(schedule.alpha_bar(timesteps), 1 / (1 + ratio**2))
    one = torch.ones((len(schedule), 1, 1, 1), dtype=torch.float64)
    signal = schedule.add_noise(one, 0 * one, timesteps)
    noise = schedule.add_noise(0 * one, one, timesteps)
    torch.testing.assert_close((noise / (signal + noise)).flatten(), fractions)


def members_of(teacher: Any) -> list[Any]:
    """The teachers in an ensemble; otherwise the teacher itself."""
    return list(getattr(teacher, "members", {"": teacher}).values())


def test_features_equal_a_complete_forward_with_hooks(case: Any, path: str) -> None:
    """Early exit gives what the whole network gives, to the bit."""
    whole = case.build(path, input="clean")
    images = case.images()
    assert list(whole.features(images, timesteps_of(whole))) == list(case.layers)
    for teacher in members_of(whole):
        timesteps = timesteps_of(teacher)
        outputs: dict[str, Any] = {}
        for name in teacher.layers:
            teacher.network.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, outputs=outputs: outputs.update(
                    {name: output}
                )
            )
        times = teacher.noise_schedule.network_times(timesteps)
        with torch.no_grad():
            x = teacher.family.encode(teacher.parts, 2 * images - 1)
            teacher.family.forward(teacher.parts, x, times, None)
        expected = {name: teacher.family.feature_map(outputs[name], x) for name in teacher.layers}
        for name, feature in teacher.features(images, timesteps).items():
            assert torch.equal(feature, expected[name].float())


def test_nothing_runs_after_the_last_asked_layer(case: Any, path: str) -> None:
    whole = case.build(path)
    for teacher in members_of(whole):
        done: list[str] = []
        for name, module in teacher.network.named_modules():
            module.register_forward_hook(
                lambda module, args, output, name=name, done=done: done.append(name)
            )
        expected = teacher.features(case.images(), timesteps_of(teacher), seeded())
        inside = [name for name in done if not name.startswith(f"{teacher.last_layer}.")]
        assert inside
        assert "" not in done  # the network itself never came to its end
        teacher.early_exit = False
        complete = teacher.features(case.images(), timesteps_of(teacher), seeded())
        assert "" in done
        for name, feature in complete.items():
            assert torch.equal(feature, expected[name])
    flops = whole.flops(case.size)
    assert 0 < flops.used < flops.whole


@pytest.mark.parametrize(
    ("saved", "name"),
    [
        ("diffusers_unet", "mid_block.resnets.1.conv2"),
        ("sd1", "mid_block.resnets.1.conv2"),
        ("sdxl", "mid_block.resnets.1.conv2"),
        ("guided_diffusion", "middle_block.2.out_layers.3"),
    ],
    indirect=["saved"],
)
def test_the_residual_branch_of_a_mid_block_is_a_layer_where_all_ends(
    saved: Any, name: str
) -> None:
    """RepFusion's layer: what the second residual block adds."""
    case, path = saved
    teacher = case.build(path, input="clean", layers=(name,))
    images, timesteps = case.images(), timesteps_of(teacher)
    kept: dict[str, Tensor] = {}
    teacher.network.get_submodule(name).register_forward_hook(
        lambda module, args, output: kept.update(map=output)
    )
    times = teacher.noise_schedule.network_times(timesteps)
    with torch.no_grad():
        x = teacher.family.encode(teacher.parts, 2 * images - 1)
        teacher.family.forward(teacher.parts, x, times, None)
    expected = kept.pop("map")
    begun: list[str] = []
    for other, module in teacher.network.named_modules():
        module.register_forward_pre_hook(lambda module, args, other=other: begun.append(other))
    assert torch.equal(teacher.features(images, timesteps)[name], expected)
    assert begun[-1] == name


def test_shapes_are_as_declared(case: Any, path: str) -> None:
    teacher = case.build(path)
    images = case.images()
    for name, feature in teacher.features(images, timesteps_of(teacher), seeded()).items():
        side = case.size // teacher.reductions[name]
        assert feature.shape == (4, teacher.channels[name], side, side)
        assert feature.dtype == torch.float32
        assert bool(feature.isfinite().all())
        assert feature.std() > 0


def test_mixed_timesteps_equal_one_image_at_a_time(case: Any, path: str) -> None:
    teacher = case.build(path, input="clean")
    images, timesteps = case.images(), timesteps_of(teacher)
    together = teacher.features(images, timesteps)
    for index in range(4):
        alone = teacher.features(images[index : index + 1], timesteps[index : index + 1])
        for name in teacher.layers:
            torch.testing.assert_close(together[name][index], alone[name][0], rtol=1e-4, atol=1e-4)


def test_timesteps_change_the_features(case: Any, path: str) -> None:
    teacher = case.build(path, input="clean")
    if not noisy(teacher):
        return
    last, images = len(teacher.noise_schedule) - 1, case.images()
    early, late = (teacher.features(images, torch.full((4,), t)) for t in (0, last))
    for name in teacher.layers:
        assert not torch.allclose(early[name], late[name])


def test_generator_decides_the_noise(case: Any, path: str) -> None:
    teacher = case.build(path)
    images, timesteps = case.images(), timesteps_of(teacher)
    first = teacher.features(images, timesteps, seeded())
    torch.manual_seed(123)  # the default generator plays no part
    again = teacher.features(images, timesteps, seeded())
    other = teacher.features(images, timesteps, seeded(8))
    for name in teacher.layers:
        assert torch.equal(first[name], again[name])
        assert torch.allclose(first[name], other[name]) is not noisy(teacher)


def test_average_is_the_mean_over_draws(case: Any, path: str) -> None:
    images = case.images()
    averaging, plain = case.build(path, input="average", draws=3), case.build(path)
    for teacher, single in zip(members_of(averaging), members_of(plain), strict=True):
        timesteps, generator = timesteps_of(teacher), seeded()
        draws = [single.features(images, timesteps, generator) for _ in range(3)]
        for name, mean in teacher.features(images, timesteps, seeded()).items():
            expected = torch.stack([draw[name] for draw in draws]).mean(0)
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)


def test_features_teach_but_are_not_taught(case: Any, path: str) -> None:
    teacher = case.build(path)
    parts = [member.parts for member in members_of(teacher)]
    before = [loading.weights_hash(part) for part in parts]
    features = teacher.features(case.images(), timesteps_of(teacher), seeded())
    for feature in features.values():
        assert not feature.requires_grad
        student = torch.ones_like(feature, requires_grad=True)
        (student * feature).sum().backward()  # saves the target for backward
    for part in parts:
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())
    assert [loading.weights_hash(part) for part in parts] == before


def test_random_weights_are_the_same_architecture_with_another_fingerprint(
    case: Any, path: str
) -> None:
    trained, first, again, other = (
        case.build(path, random_weights=seed) for seed in (None, 3, 3, 4)
    )
    assert first.channels == trained.channels
    assert first.fingerprint == again.fingerprint
    assert len({trained.fingerprint, first.fingerprint, other.fingerprint}) == 3


def test_bfloat16_features_are_close_and_float32(case: Any, path: str) -> None:
    exact, low = case.build(path), case.build(path, dtype=torch.bfloat16)
    images, timesteps = case.images(), timesteps_of(exact)
    expected = exact.features(images, timesteps, seeded())
    for name, feature in low.features(images, timesteps, seeded()).items():
        assert feature.dtype == torch.float32
        assert (feature - expected[name]).norm() < 0.05 * expected[name].norm()


def test_students_autocast_does_not_reach_the_teacher(case: Any, path: str) -> None:
    teacher = case.build(path)
    images, timesteps = case.images(), timesteps_of(teacher)
    outside = teacher.features(images, timesteps, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher.features(images, timesteps, seeded())
    for name in teacher.layers:
        assert torch.equal(outside[name], inside[name])


def test_timestep_outside_and_wrong_shapes_are_refused(case: Any, path: str) -> None:
    teacher = case.build(path)
    images, timesteps = case.images(), timesteps_of(teacher)
    end = len(teacher.noise_schedule)
    with pytest.raises(ValueError, match=rf"timestep {end} is outside 0\.\.{end - 1}"):
        teacher.features(images, torch.full((4,), end))
    with pytest.raises(ValueError, match=r"must have shape \(B, 3, H, W\)"):
        teacher.features(images[:, :1], timesteps)
    with pytest.raises(ValueError, match=r"must have shape \(4,\), one per image"):
        teacher.features(images, timesteps[:3])


def test_unknown_layer_is_named_with_what_there_is(case: Any, path: str) -> None:
    with pytest.raises(ValueError, match=r"^no layer '%%%'; choose from \w+"):
        case.build(path, layers=("%%%",))


def test_the_layer_table_names_layers_that_can_be_asked_for(case: Any, path: str) -> None:
    if not case.single_network:
        pytest.skip("an ensemble has the layers of its members, whose families have this test")
    table = case.build(path).layer_table(case.size)
    assert len(table) >= 2
    costs = [row.cost for row in table]
    assert costs == sorted(costs)
    row = table[-1]
    teacher = case.build(path, layers=(row.name,))
    feature = teacher.features(case.images(1), timesteps_of(teacher, 1), seeded())[row.name]
    assert feature.shape[1:] == (row.channels, *[case.size // row.reduction] * 2)


def test_early_exit_survives_compilation(
    case: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one graph, without a break: traced in full, and run by the plain backend."""
    compile = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **options: compile(f, backend="eager", fullgraph=True, **options),
    )
    torch._dynamo.reset()
    plain, compiled = case.build(path), case.build(path, compile=True)
    images, timesteps = case.images(), timesteps_of(plain)
    expected = plain.features(images, timesteps, seeded())
    for name, feature in compiled.features(images, timesteps, seeded()).items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-4)
