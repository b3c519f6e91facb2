"""The noise schedule against hand-computed numbers and against diffusers' own arithmetic."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from teachers.noise import NoiseSchedule


def schedule(*alphas_cumprod: float) -> NoiseSchedule:
    table = torch.tensor(alphas_cumprod, dtype=torch.float64)
    return NoiseSchedule(alphas_cumprod=table, prediction_type="epsilon")


def test_quantities_equal_hand_computed_numbers():
    # sqrt(0.64) = 0.8 of the image and sqrt(0.36) = 0.6 of noise
    noise_schedule, timesteps = schedule(0.9, 0.64), torch.tensor([1])
    assert len(noise_schedule) == 2
    assert noise_schedule.alpha_bar(timesteps).item() == 0.64
    assert noise_schedule.snr(timesteps).item() == pytest.approx(0.64 / 0.36)
    assert noise_schedule.log_snr(timesteps).item() == pytest.approx(math.log(0.64 / 0.36))
    assert noise_schedule.noise_fraction(timesteps).item() == pytest.approx(0.6 / 1.4)


def test_ends_of_the_schedule_have_no_nan():
    noise_schedule, timesteps = schedule(1.0, 0.0), torch.tensor([0, 1])
    assert noise_schedule.log_snr(timesteps).tolist() == [math.inf, -math.inf]
    assert noise_schedule.noise_fraction(timesteps).tolist() == [0.0, 1.0]


def test_noise_is_added_image_by_image():
    images, noise = torch.full((2, 1, 1, 1), 0.5), torch.full((2, 1, 1, 1), -1.0)
    noisy = schedule(1.0, 0.64).add_noise(images, noise, torch.tensor([1, 0]))
    torch.testing.assert_close(noisy.flatten(), torch.tensor([0.8 * 0.5 - 0.6, 0.5]))


def test_noised_images_equal_the_schedulers_own():
    scheduler = DDPMScheduler(beta_start=0.001, beta_end=0.05, num_train_timesteps=200)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((5, 3, 4, 4), generator=generator)
    noise = torch.randn((5, 3, 4, 4), generator=generator)
    timesteps = torch.tensor([0, 1, 77, 150, 199])
    ours = NoiseSchedule.from_scheduler(scheduler).add_noise(images, noise, timesteps)
    torch.testing.assert_close(ours, scheduler.add_noise(images, noise, timesteps))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_everything_comes_from_the_scheduler(prediction_type):
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", num_train_timesteps=50, prediction_type=prediction_type
    )
    noise_schedule = NoiseSchedule.from_scheduler(scheduler)
    assert len(noise_schedule) == 50
    assert noise_schedule.prediction_type == prediction_type
    assert torch.equal(noise_schedule.alphas_cumprod, scheduler.alphas_cumprod.double())


def test_schedule_does_not_share_memory_with_the_scheduler():
    scheduler = DDPMScheduler()
    noise_schedule = NoiseSchedule.from_scheduler(scheduler)
    before = noise_schedule.alphas_cumprod.clone()
    scheduler.alphas_cumprod.zero_()
    assert torch.equal(noise_schedule.alphas_cumprod, before)


@pytest.mark.parametrize("timestep", [-1, 2, 1000])
def test_timestep_outside_names_value_and_range(timestep):
    with pytest.raises(ValueError, match=rf"timestep {timestep} is outside 0\.\.1"):
        schedule(0.9, 0.64).check(torch.tensor([0, timestep, 1]))
    with pytest.raises(ValueError, match=rf"timestep {timestep} is outside 0\.\.1"):
        schedule(0.9, 0.64).alpha_bar(torch.tensor([timestep]))


def test_fractional_timesteps_are_refused():
    with pytest.raises(ValueError, match="must be integers"):
        schedule(0.9, 0.64).check(torch.tensor([0.5]))


def test_scheduler_without_a_variance_preserving_schedule_is_refused():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())


def test_alphas_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match=r"leaves \[0, 1\]"):
        schedule(0.9, 1.1)
