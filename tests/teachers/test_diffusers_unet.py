"""The contract of a teacher, on a tiny real UNet saved as a real pipeline folder."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn import functional as F

from teachers.diffusers_unet import DiffusersUNet

LAYERS = ("up_blocks.0", "mid_block", "down_blocks.1.resnets.0")  # not in the order they run in


def tiny_pipeline(folder: Path, **scheduler) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
    settings = {"num_train_timesteps": 100, "beta_end": 0.05, "prediction_type": "v_prediction"}
    pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(**settings | scheduler))
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return tiny_pipeline(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture
def teacher(path) -> DiffusersUNet:
    return DiffusersUNet(path, layers=LAYERS)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand((4, 3, 16, 16), generator=torch.Generator().manual_seed(1))


TIMESTEPS = torch.tensor([0, 99, 40, 40])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def reference(path: str, images: torch.Tensor, noised: bool) -> dict[str, torch.Tensor]:
    """Features by diffusers alone: the complete forward pass, with hooks set by hand."""
    pipeline = DDPMPipeline.from_pretrained(path)
    maps = {}
    for name in LAYERS:

        def hook(module, args, output, name=name):
            maps[name] = output[0] if isinstance(output, tuple) else output

        pipeline.unet.get_submodule(name).register_forward_hook(hook)
    x = 2 * images - 1
    if noised:
        noise = torch.randn(x.shape, generator=seeded())
        x = pipeline.scheduler.add_noise(x, noise, TIMESTEPS)
    with torch.no_grad():
        pipeline.unet(x, TIMESTEPS)
    return maps


def test_clean_features_equal_a_complete_forward_to_the_bit(path, images):
    features = DiffusersUNet(path, layers=LAYERS, input="clean").features(images, TIMESTEPS)
    expected = reference(path, images, noised=False)
    assert list(features) == list(LAYERS)
    for name in LAYERS:
        assert torch.equal(features[name], expected[name])


def test_noised_features_equal_diffusers_own_noising(teacher, path, images):
    features = teacher.features(images, TIMESTEPS, seeded())
    expected = reference(path, images, noised=True)
    for name in LAYERS:
        # the schedule is kept in float64 here and in float32 there
        torch.testing.assert_close(features[name], expected[name], rtol=1e-4, atol=1e-5)


def test_nothing_runs_after_the_last_asked_layer(path, images):
    teacher = DiffusersUNet(path, layers=("mid_block", "down_blocks.0"))
    ran = []
    for name, module in teacher.unet.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: ran.append(name))
    teacher.features(images, TIMESTEPS, seeded())
    assert "down_blocks.1" in ran
    assert not any(name.startswith(("up_blocks", "conv_out", "conv_norm_out")) for name in ran)


def test_calls_leave_no_hooks_behind(teacher, images):
    for _ in range(2):
        teacher.features(images, TIMESTEPS, seeded())
    assert not any(module._forward_hooks for module in teacher.unet.modules())
    with torch.no_grad():
        assert teacher.unet(images, TIMESTEPS).sample.shape == images.shape


def test_shapes_are_as_declared(teacher, images):
    assert teacher.channels == {"up_blocks.0": 16, "mid_block": 16, "down_blocks.1.resnets.0": 16}
    assert teacher.reductions == {"up_blocks.0": 1, "mid_block": 2, "down_blocks.1.resnets.0": 2}
    for name, feature in teacher.features(images, TIMESTEPS, seeded()).items():
        side = 16 // teacher.reductions[name]
        assert feature.shape == (4, teacher.channels[name], side, side)
        assert feature.dtype == torch.float32


def test_mixed_timesteps_equal_one_image_at_a_time(path, images):
    teacher = DiffusersUNet(path, layers=LAYERS, input="clean")
    together = teacher.features(images, TIMESTEPS)
    for index in range(4):
        alone = teacher.features(images[index : index + 1], TIMESTEPS[index : index + 1])
        for name in LAYERS:
            torch.testing.assert_close(together[name][index], alone[name][0])


def test_timestep_changes_clean_features(path, images):
    teacher = DiffusersUNet(path, layers=("mid_block",), input="clean")
    early = teacher.features(images, torch.full((4,), 5))["mid_block"]
    late = teacher.features(images, torch.full((4,), 95))["mid_block"]
    assert not torch.allclose(early, late)


def test_generator_decides_the_noise(teacher, images):
    first = teacher.features(images, TIMESTEPS, seeded())["mid_block"]
    torch.manual_seed(123)  # the default generator plays no part
    again = teacher.features(images, TIMESTEPS, seeded())["mid_block"]
    other = teacher.features(images, TIMESTEPS, torch.Generator().manual_seed(8))["mid_block"]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_clean_input_draws_no_noise(path, images):
    generator = seeded()
    DiffusersUNet(path, layers=LAYERS, input="clean").features(images, TIMESTEPS, generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_frozen_is_frozen(teacher, images):
    before = {name: weight.clone() for name, weight in teacher.unet.state_dict().items()}
    teacher.features(images, TIMESTEPS, seeded())
    assert not teacher.unet.training
    assert not any(weight.requires_grad for weight in teacher.unet.parameters())
    for name, weight in teacher.unet.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_loss_on_the_features_can_be_differentiated(teacher, images):
    target = teacher.features(images, TIMESTEPS, seeded())["mid_block"]
    student = torch.zeros_like(target, requires_grad=True)
    (student * target).sum().backward()  # saves the target for backward
    assert torch.equal(student.grad, target)


def test_images_are_resized_before_the_noise(path):
    images = torch.rand((2, 3, 40, 24), generator=torch.Generator().manual_seed(2))
    teacher = DiffusersUNet(path, layers=("mid_block",), image_size=(16, 32))
    small = F.interpolate(images, (16, 32), mode="bilinear", antialias=True)
    timesteps = torch.tensor([3, 30])
    resized = teacher.features(images, timesteps, seeded())["mid_block"]
    assert resized.shape == (2, 16, 8, 16)
    assert torch.equal(resized, teacher.features(small, timesteps, seeded())["mid_block"])


def test_bfloat16_features_are_close_and_float32(teacher, path, images):
    low = DiffusersUNet(path, layers=LAYERS, dtype=torch.bfloat16)
    assert low.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    exact = teacher.features(images, TIMESTEPS, seeded())
    for name, feature in low.features(images, TIMESTEPS, seeded()).items():
        assert feature.dtype == torch.float32
        error = (feature - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 0.03


def test_students_autocast_does_not_reach_the_teacher(teacher, images):
    outside = teacher.features(images, TIMESTEPS, seeded())["mid_block"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher.features(images, TIMESTEPS, seeded())["mid_block"]
    assert torch.equal(outside, inside)


def test_random_weights_are_reproducible_and_not_the_trained_ones(teacher, path):
    first, again, other = (
        DiffusersUNet(path, layers=LAYERS, random_weights=seed) for seed in (3, 3, 4)
    )
    assert first.fingerprint == again.fingerprint
    assert len({teacher.fingerprint, first.fingerprint, other.fingerprint}) == 3
    assert first.name == "tiny-random3"


def test_random_weights_leave_the_default_generator_alone(path):
    state = torch.get_rng_state()
    DiffusersUNet(path, layers=LAYERS, random_weights=3)
    assert torch.equal(state, torch.get_rng_state())


def test_fingerprint_does_not_depend_on_use_but_on_the_schedule(teacher, path, tmp_path):
    low = DiffusersUNet(path, layers=("mid_block",), dtype=torch.bfloat16, input="clean")
    assert low.fingerprint == teacher.fingerprint
    other = DiffusersUNet(tiny_pipeline(tmp_path / "tiny", beta_end=0.02), layers=LAYERS)
    assert other.fingerprint != teacher.fingerprint


def test_noise_schedule_is_the_pipelines_own(teacher):
    assert len(teacher.noise_schedule) == 100
    assert teacher.noise_schedule.prediction_type == "v_prediction"
    betas = torch.linspace(1e-4, 0.05, 100, dtype=torch.float64)  # beta_end is not the default
    expected = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(teacher.noise_schedule.alphas_cumprod, expected, rtol=1e-4, atol=0)


def test_layer_table_lists_blocks_in_running_order(teacher):
    table = teacher.layer_table(32)
    assert [(layer.name, layer.channels, layer.reduction) for layer in table] == [
        ("conv_in", 8, 1),
        ("down_blocks.0", 8, 2),
        ("down_blocks.1", 16, 2),
        ("mid_block", 16, 2),
        ("up_blocks.0", 16, 1),
        ("up_blocks.1", 8, 1),
    ]
    costs = [layer.cost for layer in table]
    assert costs == sorted(costs)
    assert costs[0] > 0
    assert costs[-1] < 1


def test_flops_count_two_a_multiply_add_and_stop_with_the_features(path):
    teacher = DiffusersUNet(path, layers=("conv_in",))
    used, whole = teacher.flops(16)
    # the 3x3 convolution of 3 to 8 channels, and the embedding of t that runs before it
    assert used == 2 * (16 * 16 * 8 * 3 * 9 + 8 * 32 + 32 * 32)
    assert used < whole
    fixed_size = DiffusersUNet(path, layers=("conv_in",), image_size=16)
    assert fixed_size.flops(128).used == used


def test_unknown_layer_names_the_nearest(path):
    with pytest.raises(ValueError, match=r"layer 'mid_blok' is not .*did you mean 'mid_block'\?"):
        DiffusersUNet(path, layers=("mid_blok",))
    with pytest.raises(ValueError, match=r"choose from conv_in, down_blocks\.0, .*up_blocks\.1$"):
        DiffusersUNet(path, layers=("%%%",))


def test_layer_without_a_map_is_refused(path):
    with pytest.raises(ValueError, match=r"'time_embedding' gives 2 dimensions, not a \(B, C"):
        DiffusersUNet(path, layers=("time_embedding",))
    with pytest.raises(ValueError, match=r"nonlinearity' runs 3 times"):
        DiffusersUNet(path, layers=("mid_block.resnets.0.nonlinearity",))


@pytest.mark.parametrize("layers", [(), ("mid_block", "mid_block")])
def test_no_layer_or_one_twice_is_refused(path, layers):
    with pytest.raises(ValueError, match="at least one layer, and none twice"):
        DiffusersUNet(path, layers=layers)


def test_unknown_input_mode_is_refused(path):
    with pytest.raises(ValueError, match="input 'noisy' is unknown; choose from noised, clean"):
        DiffusersUNet(path, layers=LAYERS, input="noisy")


def test_image_size_that_does_not_divide_names_one_that_does(teacher, path, images):
    with pytest.raises(ValueError, match=r"15x16 does not fit .* reduces by 2; 16x16 would do"):
        teacher.features(images[..., :15, :], TIMESTEPS)
    with pytest.raises(ValueError, match=r"33x33 does not fit .* 32x32 would do"):
        DiffusersUNet(path, layers=LAYERS, image_size=33)


def test_images_and_timesteps_of_wrong_shape_are_refused(teacher, images):
    with pytest.raises(ValueError, match=r"\(4, 1, 16, 16\) are not \(B, 3, H, W\) RGB"):
        teacher.features(images[:, :1], TIMESTEPS)
    with pytest.raises(ValueError, match=r"shape \(3,\) do not match 4 images"):
        teacher.features(images, TIMESTEPS[:3])


def test_timestep_outside_is_refused_in_both_modes(path, images):
    for mode in ("noised", "clean"):
        teacher = DiffusersUNet(path, layers=LAYERS, input=mode)
        with pytest.raises(ValueError, match=r"timestep 100 is outside 0\.\.99"):
            teacher.features(images, torch.tensor([0, 1, 2, 100]))
