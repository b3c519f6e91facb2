"""The noise schedule against hand-computed numbers and against diffusers' own arithmetic."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from teachers.noise import NoiseSchedule, ddpm_scheduler, draw_noise


def schedule(*alphas_cumprod: float) -> NoiseSchedule:
    table = torch.tensor(alphas_cumprod, dtype=torch.float64)
    return NoiseSchedule.variance_preserving(table, "epsilon")


def test_quantities_equal_hand_computed_numbers():
    # sqrt(0.64) = 0.8 of the image and sqrt(0.36) = 0.6 of noise
    noise_schedule, timesteps = schedule(0.9, 0.64), torch.tensor([1])
    assert len(noise_schedule) == 2
    assert noise_schedule.alpha_bar(timesteps).item() == pytest.approx(0.64)
    assert noise_schedule.snr(timesteps).item() == pytest.approx(0.64 / 0.36)
    assert noise_schedule.log_snr(timesteps).item() == pytest.approx(math.log(0.64 / 0.36))
    assert noise_schedule.noise_fraction(timesteps).item() == pytest.approx(0.6 / 1.4)


def test_ends_of_the_schedule_have_no_nan():
    noise_schedule, timesteps = schedule(1.0, 0.0), torch.tensor([0, 1])
    assert noise_schedule.log_snr(timesteps).tolist() == [math.inf, -math.inf]
    assert noise_schedule.noise_fraction(timesteps).tolist() == [0.0, 1.0]


def test_images_with_generators_of_their_own_keep_their_noise_in_any_company():
    def noise(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return draw_noise(torch.zeros(len(seeds), 3, 4, 4), generators)

    together = noise(1, 2, 3)
    assert torch.equal(together[[2, 0]], noise(3, 1))
    assert not torch.equal(together[0], together[1])
    one = draw_noise(torch.zeros(1, 3, 4, 4), torch.Generator().manual_seed(2))
    assert torch.equal(one[0], together[1])
    with pytest.raises(ValueError, match="2 generators do not match 3 images"):
        draw_noise(torch.zeros(3, 1), [torch.Generator(), torch.Generator()])


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
    expected = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(noise_schedule.alpha_bar(torch.arange(50)), expected)
    assert torch.equal(
        noise_schedule.network_times(torch.tensor([0, 7, 49])), torch.tensor([0, 7, 49])
    )


def test_schedule_does_not_share_memory_with_the_scheduler():
    scheduler = DDPMScheduler()
    noise_schedule = NoiseSchedule.from_scheduler(scheduler)
    before = noise_schedule.alpha_bar(torch.arange(1000))
    scheduler.alphas_cumprod.zero_()
    assert torch.equal(noise_schedule.alpha_bar(torch.arange(1000)), before)


@pytest.mark.parametrize("timestep", [-1, 2, 1000])
def test_timestep_outside_names_value_and_range(timestep):
    with pytest.raises(ValueError, match=rf"timestep {timestep} is outside 0\.\.1"):
        schedule(0.9, 0.64).check(torch.tensor([0, timestep, 1]))
    with pytest.raises(ValueError, match=rf"timestep {timestep} is outside 0\.\.1"):
        schedule(0.9, 0.64).alpha_bar(torch.tensor([timestep]))


def test_fractional_timesteps_are_refused():
    with pytest.raises(ValueError, match="must be integers"):
        schedule(0.9, 0.64).check(torch.tensor([0.5]))


def test_flow_matching_interpolates_and_tells_the_network_its_own_times():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0)  # SD3's shift
    noise_schedule = NoiseSchedule.from_scheduler(scheduler)
    timesteps = torch.tensor([0, 49, 99])
    # s = 3 u / (1 + 2 u) at u = 0.01, 0.5, 1 (Esser et al. 2024, eq. 23)
    expected = torch.tensor([0.03 / 1.02, 0.75, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        noise_schedule.noise_fraction(timesteps), expected, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        noise_schedule.network_times(timesteps), 100 * expected.float(), atol=1e-3, rtol=0
    )
    assert noise_schedule.snr(torch.tensor([49])).item() == pytest.approx(
        (0.25 / 0.75) ** 2, rel=1e-5
    )
    image, noise = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), -1.0)
    noised = noise_schedule.add_noise(image, noise, timesteps).flatten()
    torch.testing.assert_close(noised, (2 - 3 * expected).float(), atol=1e-5, rtol=0)


def test_flow_schedule_outlives_a_thinned_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=1.0)
    assert len(NoiseSchedule.from_scheduler(scheduler)) == 50


@pytest.mark.parametrize("make", [DDPMScheduler, FlowMatchEulerDiscreteScheduler])
def test_index_noise_fraction_and_log_snr_go_round(make):
    noise_schedule = NoiseSchedule.from_scheduler(make())
    timesteps = torch.tensor([0, 1, 250, 500, 999])
    fraction, log_snr = noise_schedule.noise_fraction(timesteps), noise_schedule.log_snr(timesteps)
    assert noise_schedule.nearest(fraction).tolist() == timesteps.tolist()
    # SNR = ((1 - s) / s)^2, so s = 1 / (1 + exp(log SNR / 2))
    torch.testing.assert_close(1 / (1 + (log_snr / 2).exp()), fraction)


def test_equal_noise_fractions_of_two_schedules_have_equal_snr():
    ddpm = NoiseSchedule.from_scheduler(DDPMScheduler())
    flow = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    theirs = flow.nearest(ddpm.noise_fraction(torch.tensor([100, 400])))
    expected = ddpm.log_snr(torch.tensor([100, 400]))
    torch.testing.assert_close(flow.log_snr(theirs), expected, atol=0.02, rtol=0)


def test_published_noise_levels():
    """The linear schedule of Ho et al. 2020 ends at abar 4.0e-5; Stable Diffusion's at 0.0047."""
    last = torch.tensor([999])
    ddpm = NoiseSchedule.from_scheduler(DDPMScheduler())
    assert ddpm.alpha_bar(last).item() == pytest.approx(4.04e-5, rel=0.01)
    stable = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    # sqrt(0.00466) = 0.0683: the terminal SNR of Lin et al. 2024, table 1
    stable_last = NoiseSchedule.from_scheduler(stable).alpha_bar(last)
    assert stable_last.sqrt().item() == pytest.approx(0.068265, rel=1e-3)


def test_without_noise_there_is_one_timestep_the_image_itself():
    schedule = NoiseSchedule.without_noise()
    assert len(schedule) == 1
    image = torch.rand(2, 3, 2, 2)
    noised = schedule.add_noise(image, torch.randn(2, 3, 2, 2), torch.tensor([0, 0]))
    assert torch.equal(noised, image)
    assert schedule.log_snr(torch.tensor([0])).item() == math.inf


def test_scheduler_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod"):
        NoiseSchedule.from_scheduler(EDMEulerScheduler())


def test_alphas_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match=r"leaves \[0, 1\]"):
        schedule(0.9, 1.1)


@pytest.mark.parametrize("timesteps", [21, 200, 1000])
def test_linear_betas_are_those_of_ddpm_in_proportion_to_the_length(timesteps):
    betas = ddpm_scheduler("linear", timesteps).betas
    expected = torch.linspace(1e-4, 0.02, timesteps) * 1000 / timesteps
    torch.testing.assert_close(betas, expected)
    assert betas.max() < 1


@pytest.mark.parametrize(("schedule", "few"), [("linear", 20), ("squaredcos_cap_v2", 1)])
def test_schedules_too_short_for_a_signal_are_refused(schedule, few):
    with pytest.raises(ValueError, match=f"timesteps must be at least {few + 1} .*got {few}"):
        ddpm_scheduler(schedule, few)
