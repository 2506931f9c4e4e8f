"""Timesteps and schedules that other programs, and some models, have: against diffusers."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

import sd
import sd_more.samplers  # noqa: F401  it adds samplers
from test_sd import BETAS, MORE_SAMPLERS, SCHEDULE, curved, denoiser, random_x
from tests.reference import assert_close, checked


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("steps", [2, 4, 10, 28, 38])  # for which linspace's timesteps are whole
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", ["euler", "euler-a", "lms"])
def test_the_spacings_are_those_of_diffusers(name, spacing, steps):
    """linspace is Euler's and LMS's own there, as in k-diffusion; where it has fractions diffusers
    interpolates sigma, and k-diffusion, as we do, its logarithm. trailing is that of Turbo models.
    """
    assert sd.SAMPLERS[name].spacing == "linspace"
    timesteps = SCHEDULE.timesteps(spacing, steps)
    their_walk = MORE_SAMPLERS[name][0](**BETAS, timestep_spacing=spacing)
    their_walk.set_timesteps(steps)
    assert np.allclose(timesteps, their_walk.timesteps, atol=1e-4, rtol=0)
    truth, generator = random_x() * their_walk.init_noise_sigma, torch.Generator().manual_seed(5)
    for t in their_walk.timesteps:
        more = {} if name == "lms" else {"generator": generator}
        answer = curved(their_walk.scale_model_input(truth, t), round(float(t)))
        truth = their_walk.step(answer, t, truth, **more).prev_sample
    generator = torch.Generator().manual_seed(5)
    draw = lambda: random_x(generator)
    # With leading spacing noise is the first x there, as here; else noise of variance 1 - abar is.
    first = (1 - SCHEDULE.abar(timesteps[0])) ** 0.5 * random_x()
    *_, x = sd.SAMPLERS[name].walk(denoiser(), first, timesteps, SCHEDULE, draw)
    checked(
        "Euler, Euler ancestral, LMS in 2 to 38 steps of their own spacing, and Turbo's",
        "diffusers, which has sigmas in float32",
        assert_close(x, truth, 1e-5),
    )


@pytest.mark.parametrize("name, steps", [("ddim", 1), ("ddim", 10), ("ddim", 50), ("euler", 10)])
def test_zero_terminal_snr_is_that_of_diffusers(name, steps):
    """Nothing of x0 is in the first x; so x0 is only in the network's answer, a v."""
    kinds = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
    numbers = BETAS | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    numbers |= {"clip_sample": False, "set_alpha_to_one": False} if name == "ddim" else {}
    their_walk = kinds[name](**numbers, prediction_type="v_prediction")
    their_walk.set_timesteps(steps)
    schedule = sd.Schedule(sd.scaled_linear(), zero_snr=True)
    assert schedule.abar(999) == 0 and schedule.abar(0) == SCHEDULE.abar(0)
    timesteps = schedule.timesteps("trailing", steps)
    truth = random_x() * their_walk.init_noise_sigma
    for t in their_walk.timesteps:
        answer = curved(their_walk.scale_model_input(truth, t), float(t))
        truth = their_walk.step(answer, t, truth).prev_sample
    denoise = lambda x, t: schedule.x0_and_eps(curved(x, t), x, t, "v")
    *_, x = sd.SAMPLERS[name].walk(denoise, random_x(), timesteps, schedule)
    # In Euler diffusers has a last sigma of 4096, not an infinite one: 1 / 4096 of x is x0 there.
    error = assert_close(x, truth, 1e-5 if name == "ddim" else 5e-4)
    checked("zero terminal SNR, DDIM and Euler", "diffusers", error)


def test_rescaled_guidance_is_that_of_diffusers(tiny, monkeypatch):
    answers = np.random.default_rng(3).standard_normal((4, 8, 8, 4), np.float32)
    monkeypatch.setattr(tiny, "predict", lambda x, t, condition: mx.array(answers))
    uncond, text = torch.tensor(answers).split(2)
    guided = uncond + 7.5 * (text - uncond)
    for rescale in (0, 0.3, 0.7, 1):
        truth = rescale_noise_cfg(guided, text, rescale)
        _, eps = tiny.denoiser(None, 7.5, rescale)(mx.zeros((2, 8, 8, 4)), 500)
        checked("rescaled guidance", "diffusers", assert_close(eps, truth, 1e-6))


def test_the_unet_is_told_fractions_as_they_are(tiny, monkeypatch):
    told, predict = [], tiny.predict
    monkeypatch.setattr(tiny, "predict", lambda x, t, c: told.append(t) or predict(x, t, c))
    list(tiny.generate_latents("a red house", steps=4, sampler="dpm++-karras", cfg=1))
    assert told[0] == pytest.approx(999) and any(t % 1 > 0.01 for t in told)


def test_a_models_own_habits_are_the_defaults(tiny, monkeypatch):
    """And what is given wins, a 0 too."""
    config = sd.replace(tiny.config, steps=2, sampler="euler", spacing="trailing", cfg=1.0)
    model = sd.StableDiffusion.from_networks(
        config, tiny.tokenizer, tiny.text_encoder, tiny.unet, tiny.vae
    )
    told, predict = [], model.predict

    def tell(x, t, condition):
        told.append((t, len(condition.context)))
        return predict(x, t, condition)

    monkeypatch.setattr(model, "predict", tell)
    list(model.generate_latents("a red house"))
    assert told == [(999, 1), (499, 1)]
    told.clear()
    list(model.generate_latents("a red house", steps=1, spacing="leading", cfg=0, sampler="ddim"))
    assert told == [(1, 2)]
    with pytest.raises(sd.SDError, match="spacing must be one of leading, .*, got odd"):
        model.generate_latents("a red house", spacing="odd")
    with pytest.raises(sd.SDError, match="steps must be 1 to 999, got 0"):
        model.generate_latents("a red house", steps=0)


def test_noise_alone_is_no_beginning_for_plms(tiny):
    config = sd.replace(tiny.config, zero_snr=True, prediction="v", spacing="trailing")
    model = sd.StableDiffusion.from_networks(
        config, tiny.tokenizer, tiny.text_encoder, tiny.unet, tiny.vae
    )
    for sampler in ("plms", "lms"):
        with pytest.raises(sd.SDError, match="sampler must be ddim, euler or dpm"):
            model.generate_latents("a red house", steps=2, sampler=sampler)
    for sampler in ("ddim", "euler", "euler-a", "dpm++", "dpm++-karras"):
        *_, x = model.generate_latents("a red house", steps=3, sampler=sampler, rescale=0.7)
        assert np.isfinite(np.array(x)).all()
