"""Training pieces: the loss against its formula, samples, and a folder that diffusers loads."""

import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from teachers import ddpm
from teachers.diffusers_unet import diffusers_unet


def tiny_unet() -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ddpm.build_unet(image_size=16, block_out_channels=(8, 16), attention_levels=(1,))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand((4, 3, 16, 16), generator=seeded(1))


def test_unet_is_built_as_asked():
    unet = ddpm.build_unet(
        image_size=(32, 64),
        block_out_channels=(48, 96, 192),
        layers_per_block=2,
        attention_levels=(1,),
    )
    assert unet.config.sample_size == (32, 64)
    assert unet.config.norm_num_groups == 16  # 32 does not divide 48
    assert unet.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    assert unet.config.up_block_types == ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    assert len(unet.down_blocks[0].resnets) == 2


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"block_out_channels": (8, 12)}, r"\[8, 12\] must be multiples of 8"),
        ({"block_out_channels": ()}, r"\[\] must be multiples of 8"),
        ({"layers_per_block": 0}, "layers_per_block 0 must be at least 1"),
        ({"attention_levels": (2,)}, r"attention level 2 is outside 0\.\.1"),
        ({"image_size": 31}, "31x31 does not fit .*; 32x32 would do"),
    ],
)
def test_unet_that_cannot_be_built_is_refused(changes, pattern):
    settings = {"image_size": 32, "block_out_channels": (8, 16)}
    with pytest.raises(ValueError, match=pattern):
        ddpm.build_unet(**settings | changes)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_equals_its_formula(images, prediction_type):
    unet, scheduler = tiny_unet(), DDPMScheduler(prediction_type=prediction_type, beta_end=0.03)
    loss = ddpm.denoising_loss(unet, scheduler, images, seeded())

    generator, x = seeded(), 2 * images - 1
    timesteps = torch.randint(1000, (4,), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    betas = torch.linspace(1e-4, 0.03, 1000)
    alpha_bar = torch.cumprod(1 - betas, 0)[timesteps].view(4, 1, 1, 1)
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    target = {"epsilon": noise, "v_prediction": signal * noise - spread * x, "sample": x}
    prediction = unet(signal * x + spread * noise, timesteps).sample
    expected = ((prediction - target[prediction_type]) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_unknown_prediction_type_is_refused(images):
    scheduler = DDPMScheduler(prediction_type="score")
    with pytest.raises(ValueError, match="'score' is unknown; choose from epsilon"):
        ddpm.denoising_loss(tiny_unet(), scheduler, images, seeded())


def test_a_few_steps_lower_the_loss(images):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    before = ddpm.denoising_loss(unet, scheduler, images, seeded(9)).item()
    for step in range(30):
        optimizer.zero_grad()
        ddpm.denoising_loss(unet, scheduler, images, seeded(step)).backward()
        optimizer.step()
    assert ddpm.denoising_loss(unet, scheduler, images, seeded(9)).item() < 0.8 * before


def test_samples_are_images_and_follow_the_generator(capfd):
    unet, scheduler = tiny_unet().train(), DDPMScheduler()
    first, again, other = (
        ddpm.sample_images(unet, scheduler, 2, steps=3, generator=seeded(seed))
        for seed in (5, 5, 6)
    )
    assert first.shape == (2, 3, 16, 16)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert unet.training
    assert not first.requires_grad
    assert capfd.readouterr() == ("", "")


def test_saved_pipeline_loads_in_diffusers_and_as_a_teacher(tmp_path, images):
    unet, scheduler = tiny_unet(), DDPMScheduler(prediction_type="v_prediction", beta_end=0.03)
    ddpm.save_pipeline(unet, scheduler, tmp_path / "made" / "teacher")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "made" / "teacher")
    for name, weight in pipeline.unet.state_dict().items():
        assert torch.equal(weight, unet.state_dict()[name])
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.beta_end == 0.03
    teacher = diffusers_unet(str(tmp_path / "made" / "teacher"), layers=("mid_block",))
    assert teacher.noise_schedule.prediction_type == "v_prediction"
    assert teacher.features(images, torch.arange(4), seeded())["mid_block"].shape == (4, 16, 8, 8)


def test_a_learned_variance_is_not_trained_further(tmp_path):
    unet = UNet2DModel(
        sample_size=16,
        out_channels=6,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "improved")
    with pytest.raises(ValueError, match=r"predicts 6 channels; .* \(no learned variance\)"):
        ddpm.load_pipeline(str(tmp_path / "improved"), (16, 16))


def test_the_memory_format_of_training_is_not_saved(tmp_path):
    unet = tiny_unet().to(memory_format=torch.channels_last)
    ddpm.save_pipeline(unet, DDPMScheduler(), tmp_path / "teacher")
    for weight in DDPMPipeline.from_pretrained(tmp_path / "teacher").unet.parameters():
        assert weight.is_contiguous()
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_file_is_half_the_size_and_leaves_the_model_alone(tmp_path):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    ddpm.save_pipeline(unet, scheduler, tmp_path / "full")
    ddpm.save_pipeline(unet, scheduler, tmp_path / "half", dtype=torch.float16)
    weights = "unet/diffusion_pytorch_model.safetensors"
    full, half = ((tmp_path / name / weights).stat().st_size for name in ("full", "half"))
    assert half < 0.7 * full
    assert unet.dtype == torch.float32
    unet, _ = ddpm.load_pipeline(str(tmp_path / "half"), (16, 16))
    assert unet.dtype == torch.float32  # to be trained further


def test_saved_pipeline_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    ddpm.save_pipeline(unet, scheduler, tmp_path / "teacher")
    with torch.no_grad():
        unet.conv_in.bias.fill_(7)
    ddpm.save_pipeline(unet, scheduler, tmp_path / "teacher")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "teacher")
    assert loaded.unet.conv_in.bias.eq(7).all()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_older_pipeline_survives_a_save_that_fails(tmp_path, monkeypatch):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    ddpm.save_pipeline(unet, scheduler, tmp_path / "teacher")
    before = {p: p.read_bytes() for p in (tmp_path / "teacher").rglob("*") if p.is_file()}

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        ddpm.save_pipeline(unet, scheduler, tmp_path / "teacher")
    after = {p: p.read_bytes() for p in (tmp_path / "teacher").rglob("*") if p.is_file()}
    assert after == before
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_older_pipeline_survives_an_interrupt_between_the_renames(tmp_path, monkeypatch):
    unet, scheduler = tiny_unet(), DDPMScheduler()
    ddpm.save_pipeline(unet, scheduler, tmp_path / "teacher")
    rename = Path.rename

    def interrupt(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ddpm.save_pipeline(unet, scheduler, tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model_index.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(FileExistsError, match="photos exists and is not a diffusers pipeline"):
        ddpm.save_pipeline(tiny_unet(), DDPMScheduler(), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


def test_weights_that_overflow_are_not_saved(tmp_path):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.bias[0] = 1e6
    with pytest.raises(
        ValueError, match=r"conv_in\.bias holds values .* torch\.float16; not saved"
    ):
        ddpm.save_pipeline(unet, DDPMScheduler(), tmp_path / "teacher", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # configs fit, weights do not
    try:
        with pytest.raises(OSError, match=r"teacher cannot be written: .*too large"):
            ddpm.save_pipeline(tiny_unet(), DDPMScheduler(), tmp_path / "teacher")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_saved_configs_name_no_path_of_the_training_machine(tmp_path):
    ddpm.save_pipeline(tiny_unet(), DDPMScheduler(), tmp_path / "first")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "first")
    ddpm.save_pipeline(loaded.unet, loaded.scheduler, tmp_path / "second")
    for path in (tmp_path / "second").rglob("*.json"):
        assert str(tmp_path) not in json.dumps(json.loads(path.read_text()))


class Clock(torch.nn.Module):
    """A network that says nothing but the timestep."""

    def forward(self, x, timesteps):
        return SimpleNamespace(sample=timesteps[:, None, None, None].expand(x.shape))


def test_loss_by_timestep_is_the_mean_over_each_part_of_the_schedule():
    # The image to predict is 0, so that the loss is the mean of the squared timesteps.
    grey = [torch.full((2, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), 0.5)]
    scheduler = DDPMScheduler(num_train_timesteps=3, prediction_type="sample")
    assert ddpm.loss_by_timestep(Clock(), scheduler, grey, seeded()) == [0, 1, 4]
    scheduler = DDPMScheduler(num_train_timesteps=25, prediction_type="sample")
    losses = ddpm.loss_by_timestep(Clock(), scheduler, grey, seeded())
    edges = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25]
    for loss, low, high in zip(losses, edges, edges[1:], strict=False):
        assert low**2 <= loss <= (high - 1) ** 2
    assert losses == ddpm.loss_by_timestep(Clock(), scheduler, grey, seeded())
    assert losses != ddpm.loss_by_timestep(Clock(), scheduler, grey, seeded(1))


def test_loss_by_timestep_weighs_images_not_batches(images):
    class Silent(torch.nn.Module):
        def forward(self, x, timesteps):
            return SimpleNamespace(sample=torch.zeros_like(x))

    scheduler = DDPMScheduler(num_train_timesteps=1)
    (loss,) = ddpm.loss_by_timestep(Silent(), scheduler, images.split([3, 1]), seeded())
    generator, expected = seeded(), 0.0
    for count in (3, 1):
        torch.randint(0, 1, (count,), generator=generator)
        noise = torch.randn((count, 3, 16, 16), generator=generator)
        expected += count / 4 * noise.square().mean().item()
    assert loss == pytest.approx(expected)
