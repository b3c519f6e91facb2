"""Training pieces: the loss against its formula, and samples."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from teachers import ddpm


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
        ({"block_out_channels": (8, 12)}, r"multiples of 8, got \[8, 12\]"),
        ({"block_out_channels": ()}, r"multiples of 8, got \[\]"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1, got 0"),
        ({"attention_levels": (2,)}, r"attention level 2 is outside 0\.\.1"),
        ({"image_size": 31}, "31x31 does not suit .*; try 32x32"),
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
    with pytest.raises(ValueError, match="'score'; choose from epsilon"):
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
