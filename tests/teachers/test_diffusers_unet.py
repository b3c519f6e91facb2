"""The contract of a teacher, on a tiny real UNet saved as a real pipeline folder."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn import functional as F

from teachers.diffusers_unet import diffusers_unet
from teachers.diffusion import DiffusionTeacher

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
def teacher(path) -> DiffusionTeacher:
    return diffusers_unet(path, layers=LAYERS)


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
    features = diffusers_unet(path, layers=LAYERS, input="clean").features(images, TIMESTEPS)
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


def test_the_network_is_whole_outside_of_a_call(teacher, images):
    teacher.features(images, TIMESTEPS, seeded())
    with torch.no_grad():
        assert teacher.network(images, TIMESTEPS).sample.shape == images.shape


def test_clean_input_draws_no_noise(path, images):
    generator = seeded()
    diffusers_unet(path, layers=LAYERS, input="clean").features(images, TIMESTEPS, generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


def test_a_loss_on_the_features_can_be_differentiated(teacher, images):
    target = teacher.features(images, TIMESTEPS, seeded())["mid_block"]
    student = torch.zeros_like(target, requires_grad=True)
    (student * target).sum().backward()  # saves the target for backward
    assert torch.equal(student.grad, target)


def test_images_are_resized_before_the_noise(path):
    images = torch.rand((2, 3, 40, 24), generator=torch.Generator().manual_seed(2))
    teacher = diffusers_unet(path, layers=("mid_block",), image_size=(16, 32))
    small = F.interpolate(images, (16, 32), mode="bilinear", antialias=True)
    timesteps = torch.tensor([3, 30])
    resized = teacher.features(images, timesteps, seeded())["mid_block"]
    assert resized.shape == (2, 16, 8, 16)
    assert torch.equal(resized, teacher.features(small, timesteps, seeded())["mid_block"])


def test_bfloat16_features_are_close_and_float32(teacher, path, images):
    low = diffusers_unet(path, layers=LAYERS, dtype=torch.bfloat16)
    assert low.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    exact = teacher.features(images, TIMESTEPS, seeded())
    for name, feature in low.features(images, TIMESTEPS, seeded()).items():
        assert feature.dtype == torch.float32
        error = (feature - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 0.03


def test_random_weights_leave_the_default_generator_alone(path):
    state = torch.get_rng_state()
    diffusers_unet(path, layers=LAYERS, random_weights=3)
    assert torch.equal(state, torch.get_rng_state())


def test_fingerprint_does_not_depend_on_use_but_on_the_schedule(teacher, path, tmp_path):
    low = diffusers_unet(path, layers=("mid_block",), dtype=torch.bfloat16, input="clean")
    assert low.fingerprint == teacher.fingerprint
    other = diffusers_unet(tiny_pipeline(tmp_path / "tiny", beta_end=0.02), layers=LAYERS)
    assert other.fingerprint != teacher.fingerprint


def test_noise_schedule_is_the_pipelines_own(teacher):
    assert len(teacher.noise_schedule) == 100
    assert teacher.noise_schedule.prediction_type == "v_prediction"
    betas = torch.linspace(1e-4, 0.05, 100, dtype=torch.float64)  # beta_end is not the default
    expected = torch.cumprod(1 - betas, 0)
    schedule = teacher.noise_schedule.alpha_bar(torch.arange(100))
    torch.testing.assert_close(schedule, expected, rtol=1e-4, atol=0)


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
    teacher = diffusers_unet(path, layers=("conv_in",))
    used, whole = teacher.flops(16)
    # the 3x3 convolution of 3 to 8 channels, and the embedding of t that runs before it
    assert used == 2 * (16 * 16 * 8 * 3 * 9 + 8 * 32 + 32 * 32)
    assert used < whole
    fixed_size = diffusers_unet(path, layers=("conv_in",), image_size=16)
    assert fixed_size.flops(128).used == used
    averaged = diffusers_unet(path, layers=("conv_in",), input="average", draws=3)
    assert averaged.flops(16) == (3 * used, 3 * whole)


def test_unknown_layer_names_the_nearest(path):
    with pytest.raises(ValueError, match=r"^no layer 'mid_blok'; did you mean 'mid_block'\?$"):
        diffusers_unet(path, layers=("mid_blok",))
    with pytest.raises(ValueError, match=r"choose from conv_in, down_blocks\.0, .*up_blocks\.1$"):
        diffusers_unet(path, layers=("%%%",))


def test_layer_without_a_map_is_refused(path):
    with pytest.raises(ValueError, match=r"'time_embedding' returns 2 dimensions, not a \(B, C"):
        diffusers_unet(path, layers=("time_embedding",))
    with pytest.raises(ValueError, match=r"nonlinearity' runs 3 times"):
        diffusers_unet(path, layers=("mid_block.resnets.0.nonlinearity",))


def test_a_layer_twice_is_refused(path):
    with pytest.raises(ValueError, match="names a layer twice"):
        diffusers_unet(path, layers=("mid_block", "mid_block"))


def test_without_layers_the_table_is_there_and_no_weights_are_read(path, tmp_path):
    shutil.copytree(path, tmp_path / "bare")
    (tmp_path / "bare" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert len(diffusers_unet(str(tmp_path / "bare"), layers=()).layer_table(16)) == 6


def test_unknown_input_mode_is_refused(path):
    with pytest.raises(ValueError, match=r"unknown input 'noisy'; choose from noised, clean, av"):
        diffusers_unet(path, layers=LAYERS, input="noisy")


def test_image_size_that_does_not_divide_names_one_that_does(teacher, path, images):
    with pytest.raises(ValueError, match=r"15x16 does not suit .* divisible by 2; try 16x16"):
        teacher.features(images[..., :15, :], TIMESTEPS)
    with pytest.raises(ValueError, match=r"33x33 does not suit .* try 32x32"):
        diffusers_unet(path, layers=LAYERS, image_size=33)
