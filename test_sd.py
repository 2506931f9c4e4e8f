"""What sd.py promises: a test for each row of README's "What was checked", in its order, and then
what can be asked of a model, and what is refused.

    pip install -e '.[test]' && pytest      this file and tests/, where the other files have theirs
    pytest -rP test_sd.py                   with the figures: lines that begin with "checked:"
    pytest -m full                          the networks at Stable Diffusion's own sizes

The truth comes from outside: diffusers, transformers, peft and PyTorch, on random weights and with
the miniature's. Errors are relative: the largest difference over the largest number. Float32
carries 6e-8 per operation, and the rounding of some dozens of layers adds up; 1e-5 leaves room for
that and for nothing else. With the faster layers, whose convolutions (Winograd's) add and subtract
larger numbers, it is 1e-4. Pixels go from 0 to 1.
"""

import copy
import dataclasses
import itertools
import math

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sd
import sd_more.samplers  # noqa: F401  two more, in sd.SAMPLERS
from convert_weights import convert
from sd_more.fast.parallel import ONE_BLAS_THREAD
from sd_more.textual_inversion import textual_inversion

# isort: off
from tests.reference import ALPHA, FULL, MERGES, RUNS, as_mask, assert_close, checked
from tests.reference import flat_controlnet, last, nchw, nhwc, our_models, ours_from
from tests.reference import quiet, raising, reference_models, run_encoder, run_unet, scheduler
from tests.reference import shake, strings, their_name, train, words_file, write_file, write_flat
# isort: on

pytest_plugins = ["tests.reference"]  # the fixtures in it

LIBRARIES, PIPELINE = "transformers, diffusers", "diffusers' pipeline"
WIDTH = 40  # of the miniature's context
SCHEDULE = sd.Schedule(sd.scaled_linear())
ABAR = np.cumprod(1 - sd.scaled_linear())
PLMS_AND_DDIM = {"plms": diffusers.PNDMScheduler, "ddim": diffusers.DDIMScheduler}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For the plain layers' small products: several threads would wait for each other."""
    with ONE_BLAS_THREAD:
        yield


def ours(model, prompt, **options):
    """The latents of a short run."""
    options = {"steps": 5, "cfg": 3, "seed": 3, "sampler": "ddim"} | options
    return last(model.generate_latents(prompt, **options))


def theirs(tiny_pipeline, prompt, kind="", *, parts=(), sampler="ddim", output="np", **options):
    """The same run by one of diffusers' pipelines: pixels, or with output="latent" its latents.
    parts: what to put into it in place of the miniature's.
    """
    components = {**tiny_pipeline.components, "scheduler": scheduler(PLMS_AND_DDIM[sampler])}
    components |= dict(parts, requires_safety_checker=False)
    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**components)
    options = {"steps": 5, "cfg": 3, "seed": 3} | options
    names = {"steps": "num_inference_steps", "cfg": "guidance_scale"}
    options = {names.get(name, name): value for name, value in options.items()}
    if kind != "Img2Img":
        options = {"width": 128, "height": 128} | options
    generator = torch.Generator().manual_seed(options.pop("seed"))
    return pipeline(prompt, generator=generator, output_type=output, **options).images


def assert_pixels(what, model, x, truth, against=PIPELINE):
    """Latents that decode to these pixels; 2e-4 is a twentieth of a level of 255."""
    error = np.abs(np.array(model.decode(x)) - truth).max()
    assert error <= 2e-4, f"{what}: a pixel is off by {error:.1e}"
    checked(what, against, f"no pixel off by more than {error:.1e}")


# %% Tokens ----------------------------------------------------------------------------------------


def test_tokens_are_those_of_transformers(tokenizer, their_tokenizer):
    """Words, scripts, emoji, control characters, marks, and strings of 10,000 characters."""
    texts = list(strings())
    assert len(texts) > 3000
    truth = their_tokenizer(texts, padding="max_length", truncation=True).input_ids
    wrong = [text for text, ids in zip(texts, truth) if tokenizer.encode(text) != ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first: {wrong[0]!r}"
    checked("token ids", "transformers' CLIP tokenizer", f"equal on {len(texts):,} strings")


def test_version_2_pads_with_0_and_reads_an_exclamation_mark_as_one():
    """transformers would take each "!" for padding; open_clip, with which 2.x was trained, not."""
    tokenizer = sd.Tokenizer(MERGES, pad=0)
    assert tokenizer.encode("hello!!!") == [49406, 3306, 995, 49407] + [0] * 73
    assert tokenizer.encode("!")[1] == 256


def test_what_does_not_fit_in_75_tokens_is_named(tiny, tokenizer, capsys):
    """The marks of start and end stay, what is left out is said once, and any text has tokens."""
    text = "one two three " * 25 + "and a café"
    ids = tokenizer.encode(text)
    assert len(ids) == 77 and ids[0] == 49406 and ids[-1] == 49407 and 49407 not in ids[1:-1]
    assert tokenizer.unread(text) == "and a café" and tokenizer.unread("a red house") == ""
    sd.say_once.cache_clear()
    for _ in range(2):
        tiny.encode_prompts([text])
    assert capsys.readouterr().err.count('"and a café"') == 1
    assert len(tokenizer.encode("no Unicode: \ud800")) == 77


# %% Text model, UNet, VAE -------------------------------------------------------------------------


@pytest.mark.parametrize("network", RUNS)
def test_each_network_is_that_of_transformers_and_diffusers(pair, exchanged, network):
    """Small relatives of 1.x's and 2.x's, with the plain layers as they stand in sd.py, and with
    the faster ones that take their place."""
    _, reference, plain = pair
    run, i = RUNS[network]
    assert {type(layer).__module__ for layer in plain[i].modules()} == {"sd"}
    error = assert_close(*run(reference[i], plain[i]), 1e-5, network)
    what = "text model, UNet, VAE encoder and decoder, small, like 1.x's and 2.x's"
    checked(what, LIBRARIES, error)
    assert len({type(layer).__module__ for layer in exchanged[i].modules()}) > 1
    error = assert_close(*run(reference[i], exchanged[i]), 1e-5 if i == 0 else 1e-4, network)
    checked("the same with the faster layers", LIBRARIES, error)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_unet_reads_the_time_as_diffusers_does(pair, t):
    """Cosines first, then sines, from the first timestep to the last."""
    assert_close(*run_unet(pair[1][1], pair[2][1], h=8, w=8, t=t), 1e-5)


def test_each_norms_epsilon_is_the_originals(pair):
    """By name, one by one: 1e-6 in the VAE and before transformers, else 1e-5."""
    counted = {}
    for part, model, network in zip(("text_encoder", "unet", "vae"), *pair[1:]):
        for name, norm in network.named_modules():
            if isinstance(norm, (sd.GroupNorm, sd.LayerNorm)):
                truth = their_name(f"{part}.{name}.weight").removesuffix(".weight")
                epsilon = norm.epsilon if isinstance(norm, sd.GroupNorm) else 1e-5
                assert epsilon == model.get_submodule(truth).eps, name
                counted[part, epsilon] = counted.get((part, epsilon), 0) + 1
    # The UNet's 1e-5: 45 in residual blocks and before the last convolution, and 48 LayerNorms.
    assert counted == {
        ("text_encoder", 1e-5): 7, ("unet", 1e-5): 45 + 48, ("unet", 1e-6): 16, ("vae", 1e-6): 52,
    }  # fmt: skip


def test_each_norm_uses_its_epsilon():
    """On numbers so small that another epsilon would be seen."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 12, 12, generator=generator) * 2e-3
    w, b = torch.rand(64, generator=generator) + 0.5, torch.randn(64, generator=generator)
    arrays = [("weight", mx.array(w.numpy())), ("bias", mx.array(b.numpy()))]
    for epsilon in (1e-5, 1e-6):
        truth = torch.nn.functional.group_norm(x, 32, w, b, epsilon)
        assert_close(nchw(sd.GroupNorm(64, 32, epsilon).load_weights(arrays)(nhwc(x))), truth, 1e-6)
        truth = torch.nn.functional.silu(truth)
        assert_close(nchw(sd.NormSilu(64, 32, epsilon).load_weights(arrays)(nhwc(x))), truth, 1e-6)
    x = x.permute(0, 2, 3, 1).reshape(2, -1, 64)
    y = sd.LayerNorm(64).load_weights(arrays)(mx.array(x.numpy()))
    assert_close(y, torch.nn.functional.layer_norm(x, (64,), w, b, 1e-5), 1e-6)
    with pytest.raises(AssertionError):
        assert_close(y, torch.nn.functional.layer_norm(x, (64,), w, b, 1e-6), 1e-6)


@pytest.mark.parametrize("network", RUNS)
def test_each_activation_is_the_originals(pair, network, monkeypatch):
    """Another one that is nearly the same, such as GELU by tanh, is noticed wherever it is used."""
    _, reference, plain = pair
    run, i = RUNS[network]
    used = set()
    wrong = {
        "silu": lambda x: x * mx.sigmoid(1.01 * x),
        "gelu": lambda x: 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x * mx.sigmoid(1.7 * x),
    }
    for name, other in wrong.items():

        def noticed(x, name=name, other=other):
            used.add(name)
            return other(x)

        with monkeypatch.context() as patch:
            patch.setitem(sd.ACTIVATIONS, name, noticed)
            result, truth = run(reference[i], plain[i])
        if name in used:
            with pytest.raises(AssertionError):
                assert_close(result, truth, 1e-5, name)
    activation = {"quick_gelu"} if pair[0]["prediction"] == "eps" else {"gelu"}
    assert used == {"text model": activation, "UNet": {"silu", "gelu"}}.get(network, {"silu"})


def test_no_token_sees_those_behind_it(pair, exchanged):
    """To the bit: nothing at all gets through the causal mask."""
    ids = np.random.default_rng(0).integers(0, 49408, (1, 77))
    other = ids.copy()
    other[0, 40:] = 7
    for text_encoder in (pair[2][0], exchanged[0]):
        a, b = (np.array(text_encoder(mx.array(i)))[0] for i in (ids, other))
        assert np.array_equal(a[:40], b[:40]) and not np.allclose(a[40:], b[40:])


def test_the_log_variance_is_clamped(pair):
    """To -30 ... 20, as diffusers does it."""
    config, reference, _ = pair
    vae = copy.deepcopy(reference[2])
    vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:] = 1000.0, -1000.0
    result, truth = run_encoder(vae, our_models(config, *reference[:2], vae)[2])
    assert truth[:, 4:].max() == 20 and truth[:, 4:].min() == -30
    assert_close(result, truth, 1e-5)


def test_guidance_computes_once_what_has_seen_no_sentence(pair, exchanged, monkeypatch):
    """The UNet with x once and the context for both answers what it answers to x twice."""
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((2, 16, 8, 4), np.float32))
    context = mx.array(rng.standard_normal((4, 77, pair[0]["unet"]["context_width"]), np.float32))
    # How large Winograd's tiles are goes by the number of positions, so by the batch: 1e-5.
    for unet, most in ((pair[2][1], 1e-6), (exchanged[1], 1e-5)):
        assert_close(unet(x, 371, context), unet(mx.concatenate([x, x]), 371, context), most)
    conv, rows = sd.Conv.__call__, []
    count = lambda layer, y: (rows.append(len(y)), conv(layer, y))[1]
    monkeypatch.setattr(sd.Conv, "__call__", count)
    pair[2][1](x, 371, context)
    assert rows[:3] == [2, 2, 2] and set(rows[3:]) == {4}  # conv_in, the first ResBlock; all others


@pytest.mark.full
@pytest.mark.parametrize("kind", FULL)
def test_each_network_at_full_size_is_that_of_transformers_and_diffusers(kind):
    """Random weights at the sizes of Stable Diffusion 1.5 and 2.1."""
    reference = [shake(model, seed=i) for i, model in enumerate(reference_models(FULL[kind]))]
    networks = our_models(FULL[kind], *reference)
    for run, i in RUNS.values():
        sd.accelerate(networks[i], mx.float32)
        more = {"h": 64, "w": 64} if run is RUNS["UNet"][0] else {}
        error = assert_close(*run(reference[i], networks[i], **more), 1e-4)
        checked("the same at full size, 1.5's and 2.1's", LIBRARIES, error)


# %% Schedule, PLMS and DDIM -----------------------------------------------------------------------

ALL_STEPS = [1, 2, 3, 20, 30, 50, 999]


def test_the_schedule_is_that_of_diffusers():
    """abar, the noise that is added, the timesteps; between them log sigma is a straight line."""
    abar = [SCHEDULE.abar(t) for t in range(1000)]
    assert_close(abar, ABAR, 1e-13)
    truth = scheduler(diffusers.DDIMScheduler)
    error = assert_close(abar, truth.alphas_cumprod, 3e-6)  # 1000 factors, there in float32
    checked("the noise schedule", "diffusers, in float32", error)
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (0, 500, 999):
        noisy = SCHEDULE.add_noise(x0, eps, t)
        assert_close(noisy, truth.add_noise(x0, eps, torch.tensor(t)), 3e-6)
        assert_close(SCHEDULE.remove_noise(noisy, eps, t), x0, 1e-5)
    between = math.sqrt(SCHEDULE.sigma(500) * SCHEDULE.sigma(501))
    assert SCHEDULE.sigma(500.5) == pytest.approx(between, rel=1e-12)
    assert SCHEDULE.abar(500.5) == pytest.approx(1 / (1 + between**2), rel=1e-12)
    for steps in ALL_STEPS:
        truth.set_timesteps(steps)
        assert SCHEDULE.timesteps("leading", steps) == truth.timesteps.tolist()


def curved(x, t):
    """Stands for the UNet: depends on x and t, bends, and is the same in NumPy, MLX and PyTorch."""
    return (1 + 0.3 * math.cos(t / 150)) * x / (1 + 0.1 * x * x) + 0.2 * math.sin(t / 40)


def denoiser(prediction="eps", answer=curved, asked=None):
    """denoise(x, t), as the samplers are given it. asked: a list, for the timesteps."""

    def denoise(x, t):
        if asked is not None:
            asked.append(t)
        return SCHEDULE.x0_and_eps(answer(x, round(t)), x, t, prediction)

    return denoise


def knowing(x0):
    """denoise(x, t) of one who knows x0, and so the noise."""
    noise = lambda x, t: (x - SCHEDULE.abar(t) ** 0.5 * x0) / (1 - SCHEDULE.abar(t)) ** 0.5
    return lambda x, t: SCHEDULE.x0_and_eps(noise(x, t), x, t, "eps")


def random_x(generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=generator)


def their_run(kind, steps, **more):
    """-> x after each call, all in float64, so that there is nothing but the formulas to differ."""
    walk = scheduler(kind, **more)
    walk.alphas_cumprod = torch.from_numpy(ABAR)
    walk.final_alpha_cumprod = walk.alphas_cumprod[0]
    walk.set_timesteps(steps)
    xs = [random_x()]
    for t in walk.timesteps:
        xs.append(walk.step(curved(xs[-1], int(t)), int(t), xs[-1]).prev_sample)
    return xs[1:]


@pytest.mark.parametrize("steps", ALL_STEPS)
@pytest.mark.parametrize("name", PLMS_AND_DDIM)
def test_plms_and_ddim_are_those_of_diffusers(name, steps):
    """x after each step, and the number of calls: one more with PLMS, unless it is one step."""
    truth, asked = their_run(PLMS_AND_DDIM[name], steps), []
    walk, spacing = sd.SAMPLERS[name]
    timesteps = SCHEDULE.timesteps(spacing, steps)
    xs = list(walk(denoiser(asked=asked), random_x(), timesteps, SCHEDULE))
    assert len(xs) == steps and len(asked) == len(truth)
    assert len(asked) == steps + (name == "plms" and steps > 1)
    errors = [assert_close(a, b, 1e-12) for a, b in zip(reversed(xs), reversed(truth))]
    checked("PLMS and DDIM in 1 to 999 steps", "diffusers, in float64", max(errors))


@pytest.mark.parametrize("steps", [1, 2, 30, 50])
def test_v_prediction_is_that_of_diffusers(steps):
    """With DDIM only: PLMS's history holds eps here, and v in diffusers."""
    truth = their_run(diffusers.DDIMScheduler, steps, prediction_type="v_prediction")[-1]
    timesteps = SCHEDULE.timesteps("leading", steps)
    x = last(sd.sample_ddim(denoiser("v"), random_x(), timesteps, SCHEDULE))
    checked("DDIM with v-prediction", "diffusers, in float64", assert_close(x, truth, 1e-12))


@pytest.mark.parametrize(
    "name, steps", [(n, s) for n in sd.SAMPLERS for s in ALL_STEPS if n != "lcm" or s <= 50]
)
def test_exact_noise_gives_back_the_picture_in_any_number_of_steps(name, steps):
    """Whoever knows the noise arrives at x0, however many steps it takes and whatever is drawn."""
    walk, spacing = sd.SAMPLERS[name]
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 1, 8, 8, 4))
    timesteps = SCHEDULE.timesteps(spacing, steps)
    x = SCHEDULE.add_noise(x0, eps, timesteps[0])
    x = last(walk(knowing(x0), x, timesteps, SCHEDULE, lambda: rng.standard_normal(x0.shape)))
    truth = SCHEDULE.add_noise(x0, eps, 0) if name in PLMS_AND_DDIM else x0
    assert_close(x, truth, 0.01 if name == "lcm" else 1e-9)  # lcm keeps a little of x


# %% Whole pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", PLMS_AND_DDIM)
def test_the_same_seed_gives_the_picture_of_diffusers_pipeline(tiny, tiny_pipeline, sampler):
    """A picture that is not square, 50 steps, a negative prompt, more than the usual guidance."""
    prompt = "a blue boat on the sea at sunset"
    options = {"steps": 50, "seed": 42, "negative_prompt": "a house", "height": 192}
    truth = theirs(tiny_pipeline, prompt, sampler=sampler, **options)
    x = ours(tiny, prompt, sampler=sampler, **options)
    assert_pixels("a picture of 50 steps, PLMS and DDIM, with the miniature", tiny, x, truth)


@pytest.mark.parametrize("cfg", [0, 1, 3.5, 7.5])
def test_guidance_is_that_of_diffusers_pipeline(tiny, tiny_pipeline, cfg):
    """diffusers leaves guidance out at 1 and below; 0 means "as if there were no prompt"."""
    truth = theirs(tiny_pipeline, "" if cfg == 0 else "a red car", steps=8, cfg=max(cfg, 1))
    x = ours(tiny, "a red car", steps=8, cfg=cfg)
    assert_pixels("guidance of 0 to 7.5, 8 DDIM steps", tiny, x, truth)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_whole_model_of_version_1_or_2_paints_what_diffusers_paints(
    pair, tiny_pipeline, prediction, tmp_path
):
    """From the file to the latents, also where each kind predicts what the other usually does."""
    config, (text, unet, vae), networks = pair
    config = config | {"prediction": prediction}
    model = sd.StableDiffusion(write_flat(tmp_path / "m.safetensors", config, networks), "float32")
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    ids = [sd.Tokenizer(MERGES, config["text"]["pad"]).encode(p) for p in ("", "a house")]
    context = text(torch.tensor(ids)).last_hidden_state
    parts = {"text_encoder": text, "unet": unet, "vae": vae}
    parts["scheduler"] = scheduler(diffusers.DDIMScheduler, prediction_type=kind)
    given = {"prompt_embeds": context[1:], "negative_prompt_embeds": context[:1]}
    options = {"steps": 6, "seed": 5, "cfg": 7.5, "width": 64, "height": 64}
    truth = theirs(tiny_pipeline, None, parts=parts, output="latent", **given, **options)
    # Random networks answer every rounding with a larger one; guidance multiplies it by 7.5 again.
    error = assert_close(nchw(ours(model, "a house", **options)), truth, 1e-3)
    checked("latents of small models like 1.x and 2.x, for eps and for v", PIPELINE, error)


def test_a_context_of_any_length_paints_as_in_diffusers(tiny, tiny_pipeline):
    """What a reader of long prompts makes, 77 k vectors, is looked at like 77."""
    context = tiny.encode_prompts(["", "a car", "a red house", "at night"]).reshape(2, 154, WIDTH)
    given = torch.from_numpy(np.array(context))
    given = {"prompt_embeds": given[1:], "negative_prompt_embeds": given[:1]}
    truth = theirs(tiny_pipeline, None, **given)
    assert_pixels("154 vectors of context", tiny, ours(tiny, "", context=context), truth)


def test_decode_and_encode_are_inverse_and_scaled_as_diffusers(tiny, tiny_pipeline):
    """A picture that was never trained on comes back, by latents of variance about 1."""
    x = train.drawn(99_999)[None].astype(np.float32) / 255
    latents = tiny.encode(x)
    truth = tiny_pipeline.vae.encode(torch.from_numpy(x.transpose(0, 3, 1, 2)) * 2 - 1)
    assert_close(nchw(latents), truth.latent_dist.mean * 0.18215, 1e-4)
    back = np.array(tiny.decode(latents))
    assert back.min() >= 0 and back.max() <= 1 and 0.5 < np.array(latents).std() < 2
    assert -10 * math.log10(((back - x) ** 2).mean()) > 26  # dB: the picture, if not every star


# %% Noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32 + 7, -3])
def test_noise_is_torchs(seed):
    """Of every size, and what comes after it; torch's own logarithm is an approximation."""
    errors = []
    for n in (16, 17, 31, 33, 100, 1023, 16384, 16389):
        generator, draw = torch.Generator().manual_seed(seed), sd.torch_normal(seed)
        for shape in ((n,), (n,), (1, 4, 3, 5), (16,)):
            truth, noise = torch.randn(shape, generator=generator).numpy(), draw(shape)
            assert noise.shape == truth.shape and noise.dtype == np.float32
            errors.append(np.abs(noise - truth).max())
            assert errors[-1] < 1e-6, f"{n} numbers"
    checked(
        "noise, 16 to 16,389 numbers",
        "torch.randn",
        f"no number off by more than {max(errors):.1e}",
    )


# %% More samplers ---------------------------------------------------------------------------------

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = BETAS | {"timestep_spacing": "leading", "steps_offset": 1}
DPM = LEADING | {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
MORE_SAMPLERS = {
    "euler": (diffusers.EulerDiscreteScheduler, LEADING),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, LEADING),
    "lms": (diffusers.LMSDiscreteScheduler, LEADING),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, DPM),
    "dpm++-karras": (diffusers.DPMSolverMultistepScheduler, DPM | {"use_karras_sigmas": True}),
    "lcm": (diffusers.LCMScheduler, BETAS),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, about PyTorch's arrays
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 50, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", MORE_SAMPLERS)
def test_more_samplers_are_those_of_diffusers(name, steps, prediction):
    """diffusers keeps its sigmas in float32; so the error, summed over the steps."""
    walk, spacing = sd.SAMPLERS[name]
    if name == "lcm" and steps > 50:
        with pytest.raises(sd.SDError, match="at most 50"):
            SCHEDULE.timesteps(spacing, steps)
        return
    timesteps = SCHEDULE.timesteps("leading" if spacing == "linspace" else spacing, steps)
    kind, numbers = MORE_SAMPLERS[name]
    their_walk = kind(**numbers, prediction_type=prediction)
    if name == "dpm++":  # diffusers' own spacing has no step at the end: 951 ... 20 for 50
        their_walk.set_timesteps(timesteps=timesteps)
    else:
        their_walk.set_timesteps(steps)
    assert [round(t) for t in timesteps] == [round(float(t)) for t in their_walk.timesteps]
    truth, generator = random_x() * their_walk.init_noise_sigma, torch.Generator().manual_seed(5)
    for t in their_walk.timesteps:
        answer = curved(their_walk.scale_model_input(truth, t), float(t))
        more = {} if name == "lms" else {"generator": generator}
        truth = their_walk.step(answer, t, truth, **more).prev_sample
    generator = torch.Generator().manual_seed(5)
    denoise = denoiser("eps" if prediction == "epsilon" else "v")
    xs = list(walk(denoise, random_x(), timesteps, SCHEDULE, lambda: random_x(generator)))
    assert len(xs) == steps
    what = "Euler, Euler ancestral, LMS, DPM-Solver++(2M), with Karras' spacing, LCM"
    checked(what, "diffusers, which has sigmas in float32", assert_close(xs[-1], truth, 1e-5))


# %% Image to image --------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_is_that_of_diffusers(tiny, tiny_pipeline, drawn, picture, strength):
    """DDIM: with PNDM diffusers' UNet is told other timesteps than x's."""
    prompt, more = "a blue house at night", {"image": drawn, "strength": strength}
    truth = theirs(tiny_pipeline, prompt, "Img2Img", steps=20, **more)
    x = ours(tiny, prompt, steps=20, task=sd.ImageToImage(picture, strength))
    assert_pixels("image to image, 20 DDIM steps", tiny, x, truth)


@pytest.mark.parametrize("name", sd.SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 1])
def test_every_sampler_begins_with_the_noise_of_its_first_timestep(tiny, picture, name, strength):
    """Whoever knows the picture gets it back; so the noise was that of the t asked first."""
    walk, spacing = sd.SAMPLERS[name]
    rng = np.random.default_rng(1)
    draw = lambda: mx.array(rng.standard_normal((1, 16, 16, 4), np.float32))
    task = sd.ImageToImage(picture, strength)
    timesteps = task.timesteps(SCHEDULE.timesteps(spacing, 10))
    x, x0, _ = task.begin(tiny, timesteps[0], draw)
    xs = list(walk(knowing(x0), x, timesteps, SCHEDULE, draw))
    assert len(xs) == int(10 * strength)
    assert_close(xs[-1], x0, 0.05)  # plms and ddim leave noise of 0.03 in


# %% Inpainting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 0.95])
def test_inpainting_is_that_of_diffusers(tiny, tiny_pipeline, drawn, picture, hole, strength):
    """The latents of 20 DDIM steps, before anything is pasted."""
    more = {"image": drawn, "mask_image": as_mask(hole), "strength": strength, "output": "latent"}
    truth = theirs(tiny_pipeline, "a green tree", "Inpaint", steps=20, **more)
    x = ours(tiny, "a green tree", steps=20, task=sd.Inpaint(picture, hole, strength))
    checked("inpainting, 20 DDIM steps, latents", PIPELINE, assert_close(nchw(x), truth, 1e-4))


@pytest.mark.parametrize("sampler", PLMS_AND_DDIM)
def test_inpainting_with_strength_1_is_that_of_diffusers_but_for_the_first_x(
    tiny, tiny_pipeline, drawn, picture, hole, sampler, monkeypatch
):
    """What is known begins as pure noise there, here with that noise on it: handed the same first
    x, diffusers goes on the same way, by the default sampler, too."""
    pipeline, differences = diffusers.StableDiffusionInpaintPipeline, []
    prepare = pipeline.prepare_latents

    def begin(self, *args, **options):
        x, noise, x0 = prepare(self, *args, **options)
        assert torch.equal(x, noise)
        known = self.scheduler.add_noise(x0, noise, self.scheduler.timesteps[:1])
        first = torch.where(torch.from_numpy(hole[::8, ::8]) > 0, noise, known)
        differences.append(float((first - x).abs().max()))
        return first, noise, x0

    monkeypatch.setattr(pipeline, "prepare_latents", begin)
    more = {"image": drawn, "mask_image": as_mask(hole), "strength": 1.0, "output": "latent"}
    truth = theirs(tiny_pipeline, "a green tree", "Inpaint", sampler=sampler, steps=20, **more)
    assert 0.05 < differences[0] < 0.5
    x = ours(tiny, "a green tree", sampler=sampler, steps=20, task=sd.Inpaint(picture, hole))
    what = "inpainting with strength 1, PLMS and DDIM, latents"
    checked(what, f"{PIPELINE}, from the same first x", assert_close(nchw(x), truth, 1e-4))


@pytest.mark.parametrize("name", sd.SAMPLERS)
def test_every_sampler_keeps_what_is_known(tiny, picture, hole, name):
    """After each step: the known latents with the noise that was drawn first, to the digit."""
    walk, spacing = sd.SAMPLERS[name]
    rng, noise = np.random.default_rng(1), []

    def draw():
        noise.append(mx.array(rng.standard_normal((1, 16, 16, 4), np.float32)))
        return noise[-1]

    task = sd.Inpaint(picture, hole, 0.8)
    timesteps = task.timesteps(SCHEDULE.timesteps(spacing, 10))
    x, x0, _ = task.begin(tiny, timesteps[0], draw)
    denoise = task.constrain(denoiser(answer=lambda x, t: 0.3 * x), SCHEDULE, x0)
    xs = list(walk(denoise, x, timesteps, SCHEDULE, draw))
    known = hole[::8, ::8] == 0
    if name not in ("euler-a", "lcm"):  # which bring new noise of their own
        for x, t in zip(xs[:-1], timesteps[1:], strict=True):
            truth = np.array(SCHEDULE.add_noise(x0, noise[1], t))
            assert_close(np.array(x)[:, known], truth[:, known], 1e-4)
    settled = np.array(task.settle(xs[-1], x0))
    assert np.array_equal(settled[:, known], np.array(x0)[:, known])
    assert np.array_equal(settled[:, ~known], np.array(xs[-1])[:, ~known])


def test_what_was_not_to_be_painted_does_not_change(tiny, drawn, hole):
    """Not by a level; and nothing is left of what was in the hole, be it masked, green or clear."""
    before, options = np.asarray(drawn, int), {"seed": 1, "steps": 6}
    near = sd.blur(hole[..., None], 4)[..., 0] > 0
    assert near.mean() < 0.4
    green, clear = np.asarray(drawn).copy(), np.dstack([drawn, 255 * (1 - hole)]).astype(np.uint8)
    green[hole > 0] = 0, 255, 0
    green, clear = Image.fromarray(green), Image.fromarray(clear)
    for image, mask in ((drawn, as_mask(hole)), (green, None), (clear, None)):
        (after,) = tiny.inpaint("", image, mask, **options)
        after = np.asarray(after, int)
        assert np.array_equal(before[~near], after[~near])
        assert np.abs(before - after)[hole > 0].mean() > 5
        r, g, b = after[hole > 0].T
        assert (g - r - b).max() < 200  # no green is left
    with pytest.raises(sd.SDError, match="nothing is to be painted"):
        tiny.inpaint("", drawn)
    for strength in (0, -1, 1.1, math.nan):
        with pytest.raises(sd.SDError, match=f"strength must be .*, got {strength}"):
            tiny.inpaint("", drawn, as_mask(hole), strength)


def test_pasting_is_soft_outside_the_mask_only_and_part_of_the_task(tiny):
    """Of a mask of any shape all is painted, also at the picture's border."""
    for hole in (np.s_[:, :], np.s_[20:21, 5:100], np.s_[0:30, 0:30], np.s_[40:41, 40:41]):
        mask = np.zeros((128, 128), np.float32)
        mask[hole] = 1
        task = sd.Inpaint(np.zeros((128, 128, 3), np.float32), mask)
        painted = {(i // 8, j // 8) for i, j in np.argwhere(mask)}  # positions of the latents
        assert set(map(tuple, np.argwhere(np.array(task.small[0, :, :, 0])))) == painted
        (after,) = map(np.asarray, task.finish([Image.new("RGB", (128, 128), "white")]))
        far = sd.blur(mask[..., None], 6)[..., 0] == 0
        assert (after[mask > 0] == 255).all() and not after[far].any()
        assert mask.all() or 0 < after[(mask == 0) & ~far].mean() < 255
        (after,) = map(np.asarray, tiny.to_pictures(mx.zeros((1, 16, 16, 4)), task))
        assert after[mask > 0].any() and not after[far].any()


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_model_of_nine_channels_is_run_as_in_diffusers(
    tiny, tiny_pipeline, drawn, picture, hole, strength
):
    """The mask and the picture with its hole go in beside x; nothing else holds what is known."""
    config = dict(tiny_pipeline.unet.config) | {"in_channels": 9}
    config.pop("_use_default_values")  # which would make it 4 again
    unet = diffusers.UNet2DConditionModel.from_config(config)
    weights = tiny_pipeline.unet.state_dict()
    more = torch.randn(64, 5, 3, 3, generator=torch.Generator().manual_seed(0)) / 20
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], more], 1)
    unet.load_state_dict(weights)
    more = {"image": drawn, "mask_image": as_mask(hole), "strength": strength, "output": "latent"}
    more["parts"] = {"unet": unet.eval()}
    truth = theirs(tiny_pipeline, "a green tree", "Inpaint", steps=10, **more)
    config = dataclasses.replace(tiny.config, unet=tiny.config.unet | {"channels": 9})
    unet = ours_from(sd.UNet(**config.unet), "unet", unet)
    sd.accelerate(unet, mx.float32)
    parts = config, tiny.tokenizer, tiny.text_encoder, unet, tiny.vae
    model = sd.StableDiffusion.from_networks(*parts)
    task = sd.inpainting(config, picture, hole, strength)
    error = assert_close(nchw(ours(model, "a green tree", steps=10, task=task)), truth, 1e-3)
    checked("inpainting with nine channels, latents", PIPELINE, error)
    with pytest.raises(sd.SDError, match="a picture and a mask"):
        model.generate_latents("a green tree")


# %% LoRA, textual inversion, clip skip ------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_lora_changes_the_picture_as_in_diffusers(tiny, tiny_pipeline, flat_lora, strength):
    """Which applies it, with peft, to all layers of the UNet and the text model while painting."""
    parts = {name: copy.deepcopy(getattr(tiny_pipeline, name)) for name in ("unet", "text_encoder")}
    pipeline = diffusers.StableDiffusionPipeline(
        **tiny_pipeline.components | parts, requires_safety_checker=False
    )
    folder, name = str(flat_lora.parent), "lora.safetensors"
    pipeline.load_lora_weights(folder, weight_name=name, adapter_name="it")
    pipeline.set_adapters("it", strength)
    truth = theirs(pipeline, "a red car")
    changed = sd.StableDiffusion(changes=[sd.lora(flat_lora, strength)])
    x, plain = (ours(model, "a red car") for model in (changed, tiny))
    assert np.abs(np.array(x) - np.array(plain)).max() > 0.1
    assert_pixels("a LoRA for all layers", changed, x, truth, "diffusers and peft")


def test_a_convolution_in_the_middle_is_applied_as_convolutions_are(tmp_path):
    """LoCon: down 1 x 1, the middle 3 x 3, up 1 x 1, one after the other."""
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 16, 1, 1), (6, 4, 3, 3), (32, 6, 1, 1), (1, 16, 9, 9)
    down, middle, up, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    conv = torch.nn.functional.conv2d
    truth = conv(conv(conv(x, down), middle, padding=1), up) * ALPHA / 4
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {"up": up, "mid": middle, "down": down}
    tensors = {f"{name}.lora_{part}.weight": t.float() for part, t in tensors.items()}
    save_file(tensors | {f"{name}.alpha": torch.tensor(ALPHA)}, tmp_path / "locon.safetensors")
    flat = convert(tmp_path / "locon.safetensors", dtype="float32", log=quiet)
    layer = sd.Conv(16, 32)
    weights = {"unet.middle.0.conv1.weight": layer.weight}
    (layer.weight,) = sd.lora(flat, 2.0)({}, weights)[1].values()
    error = assert_close(nchw(layer(nhwc(x.float()))), 2 * truth, 1e-5)
    checked("a LoRA with a convolution in the middle", "PyTorch's convolutions", error)


def test_a_textual_inversion_becomes_a_word(tiny_pipeline, their_tokenizer, tmp_path):
    """Of two vectors, in the middle of a sentence, and another one of one vector beside it."""
    parts = {"text_encoder": copy.deepcopy(tiny_pipeline.text_encoder)}
    parts["tokenizer"] = copy.deepcopy(their_tokenizer)
    pipeline = diffusers.StableDiffusionPipeline(
        **tiny_pipeline.components | parts, requires_safety_checker=False
    )
    vectors = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)) / 4
    words, changes = {"<my-cat>": vectors[:2], "<sketch>": vectors[2:]}, []
    for i, (word, its) in enumerate(words.items()):
        pipeline.load_textual_inversion({word: its}, token=word)
        path = words_file(tmp_path / f"{i}.safetensors", {word: its})
        changes.append(textual_inversion(path))
    prompt = "a red <my-cat> at night, <sketch>"
    ids = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    ids = pipeline.tokenizer(ids, padding="max_length", return_tensors="pt").input_ids
    truth = pipeline.text_encoder(ids).last_hidden_state
    for order in (changes, changes[::-1]):
        model = sd.StableDiffusion(changes=order)
        error = assert_close(model.encode_prompts([prompt]), truth, 1e-5)
    checked("textual inversion", "diffusers, transformers", error)


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_reads_fewer_layers(tiny, tiny_pipeline, skip):
    """The hidden states of that layer, through the last norm."""
    ids = torch.tensor([tiny.tokenizer.encode("a red house")])
    text = tiny_pipeline.text_encoder
    hidden = text(ids, output_hidden_states=True).hidden_states[-skip]
    norm = (text.text_model if hasattr(text, "text_model") else text).final_layer_norm
    model = sd.StableDiffusion(changes=[sd.clip_skip(skip)])
    truth = norm(hidden) if skip > 1 else text(ids)[0]
    error = assert_close(model.encode_prompts(["a red house"]), truth, 1e-5)
    checked("clip skip", "transformers", error)


def test_the_order_of_changes_does_not_matter(flat_lora, tmp_path):
    """Two LoRAs with strengths, a word and clip skip: 24 orders, the same context and weights."""
    _, tensors = sd.read_flat(flat_lora, "lora")
    names = sorted({name.rpartition(".")[0] for name in tensors})[::5]
    words = {"<my-cat>": torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))}
    words = words_file(tmp_path / "words.safetensors", words)
    changes = [sd.clip_skip(2), textual_inversion(words)]
    for i, strength in enumerate((0.5, -2)):
        part = {f"{n}.{end}": tensors[f"{n}.{end}"] for n in names[i:] for end in ("up", "down")}
        path = write_file(tmp_path / f"{i}.safetensors", {"kind": "lora"}, part)
        changes.append(sd.lora(path, strength))
    results = []
    for order in itertools.permutations(changes):
        config, weights = sd.read_flat(sd.TINY)
        for change in order:
            config, weights = change(config, weights)
        tokenizer = results[0][1] if results else sd.read_tokenizer(config, weights)
        text_encoder = sd.load_network("text_encoder", config, weights, mx.float32)
        context = text_encoder(mx.array([tokenizer.encode("a red <my-cat> house")]))
        results.append((config, tokenizer, context, [weights[f"{n}.weight"] for n in names]))
    (config, _, context, changed), *others = results
    assert len(others) == 23 and config.words == {"<my-cat>": [49408, 49409]}
    for other in others:
        assert other[0] == config
        assert_close(other[2], context, 1e-6)
        for a, b in zip(other[3], changed):
            assert_close(a, b, 1e-6)


# %% ControlNet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1, 3])
def test_two_controlnets_steer_as_in_diffusers(
    tiny, tiny_pipeline, controlnet, control, drawn, picture, tmp_path, cfg
):
    """With a weight each; with guidance and without."""
    second = copy.deepcopy(controlnet)
    shake(second.controlnet_cond_embedding, seed=9)
    other = sd.ControlNet(flat_controlnet(second, tmp_path))
    images = [drawn, drawn.transpose(Image.FLIP_LEFT_RIGHT)]
    more = {"image": images, "controlnet_conditioning_scale": [1.0, 0.4]}
    more["parts"] = {"controlnet": [controlnet, second]}
    truth = theirs(tiny_pipeline, "a red house", "ControlNet", cfg=cfg, **more)
    flipped, _ = sd.load_picture(images[1])
    steered = tiny.controlled((control, picture, 1.0), (other, flipped, 0.4))
    x, plain = (ours(model, "a red house", cfg=cfg) for model in (steered, tiny))
    assert np.abs(np.array(x) - np.array(plain)).max() > 0.1
    assert_pixels("two ControlNets with weights, with guidance and without", tiny, x, truth)


def test_a_controlnet_may_correct_all_positions_alike(tiny, controlnet, picture, tmp_path):
    """Where its folder says so (global_pool_conditions), for the mood of a picture."""
    pooled = copy.deepcopy(controlnet)
    pooled.register_to_config(global_pool_conditions=True)
    net = sd.ControlNet(flat_controlnet(pooled, tmp_path))
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(2, *s, generator=generator) for s in ((4, 16, 16), (77, WIDTH)))
    seen = torch.from_numpy(picture.transpose(2, 0, 1))[None].repeat(2, 1, 1, 1)
    down, middle = pooled(x, 500, context, seen, return_dict=False)
    steered = tiny.controlled((net, picture, 0.5), (net, picture, 0.25))
    told = nhwc(x), mx.array(500.0), mx.array(context.numpy())
    for result, truth in zip(sd.correct(steered.controls, *told), [*down, middle], strict=True):
        error = assert_close(nchw(result), 0.75 * truth.mean((2, 3), keepdim=True), 1e-5)
    checked("a ControlNet that corrects all positions alike", "diffusers", error)


def test_controls_add_up_and_go_with_tasks(tiny, control, picture, hole):
    """However they are given, also to a picture or a mask; what they were added to stays free."""
    one = tiny.controlled((control, picture, 0.3)).controlled((control, picture, 0.7))
    both = tiny.controlled((control, picture, 1.0))
    assert tiny.controls == () and len(one.controls) == 2
    for task in (sd.TextToImage(), sd.ImageToImage(picture, 0.6), sd.Inpaint(picture, hole)):
        options = {"steps": 4, "n_images": 2, "task": task}
        a, b, plain = (ours(model, "a tree", **options) for model in (one, both, tiny))
        assert_close(a, b, 1e-4)
        assert np.abs(np.array(a) - np.array(plain)).max() > 0.1


# %% What can be asked -----------------------------------------------------------------------------


def test_latents_come_after_every_step_and_the_last_is_the_picture(tiny):
    """Rounded to 8 bits, not cut off, decoded in batches; nothing that is no number is painted."""
    xs = list(tiny.generate_latents("a yellow flower", steps=5, seed=0))
    assert len(xs) == 5 and all(x.shape == (1, 16, 16, 4) for x in xs)
    (picture,) = tiny.to_pictures(xs[-1])
    assert picture == tiny.txt2img("a yellow flower", steps=5, seed=0)[0]
    levels = 255 * np.array(tiny.decode(xs[-1])[0])
    assert np.array_equal(picture, np.floor(levels + 0.5))
    assert not np.array_equal(picture, np.floor(levels))
    together = tiny.to_pictures(mx.concatenate(xs), batch=2)
    for one, x in zip(together, xs, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(tiny.to_pictures(x)[0], int)).max() <= 1
    with pytest.raises(sd.SDError, match="float32"):
        tiny.to_pictures(mx.full((1, 8, 8, 4), mx.nan))


def test_each_picture_of_a_batch_can_be_made_alone(tiny):
    """Picture i has the noise of seed + i, whichever generator it comes from."""
    together = tiny.txt2img("a green tree", seed=10, steps=4, n_images=3)
    together = [np.asarray(picture, int) for picture in together]
    for i in (1, 2):
        (alone,) = tiny.txt2img("a green tree", seed=10 + i, steps=4)
        assert np.abs(together[i] - alone).max() <= 1  # products of another size round otherwise
        assert np.abs(together[0] - alone).max() > 20
    seeds = []
    zeros = lambda seed: (seeds.append(seed), lambda shape: np.zeros(shape, np.float32))[1]
    tiny.generate_latents("a tree", seed=-3, n_images=3, rng=zeros)
    assert seeds == [-3, -2, -1]


@pytest.mark.parametrize("dtype, most", [("float16", 2), ("bfloat16", 12)])
def test_half_precisions_paint_nearly_the_same_picture(tiny, dtype, most):
    """most: the mean difference in levels of 255."""
    model = sd.StableDiffusion(dtype=dtype)
    half, whole = (
        np.asarray(m.txt2img("a red house", seed=1, steps=10)[0], int) for m in (model, tiny)
    )
    assert model.dtype == getattr(mx, dtype) and 0 < np.abs(half - whole).mean() < most


def test_the_plain_layers_paint_the_same_picture(tiny):
    """fast=False leaves the exchange out; then every line of part I is what runs."""
    plain = sd.StableDiffusion(fast=False)
    options = {"seed": 1, "steps": 3, "width": 64, "height": 64}
    a, b = (np.asarray(m.txt2img("a red house", **options)[0], int) for m in (plain, tiny))
    assert np.abs(a - b).max() <= 1


@pytest.mark.full
def test_what_runs_on_a_gpu_answers_the_same(tiny, monkeypatch):
    """The UNet as one compiled graph, here on MLX's CPU device, for which it needs a compiler."""
    monkeypatch.setattr(sd, "on_gpu", lambda: True)
    model = sd.StableDiffusion(dtype="float32")
    assert model.gpu and sd.StableDiffusion().dtype == mx.float16
    condition = sd.Condition(tiny.encode_prompts(["", "a red house"]))
    x = mx.array(np.random.default_rng(0).standard_normal((1, 16, 16, 4), np.float32))
    for t in (981, 1):
        error = assert_close(model.predict(x, t, condition), tiny.predict(x, t, condition), 1e-5)
    assert model.compiled[0] is model.unet and tiny.compiled[0] is None
    checked("the UNet as it runs on a GPU, on a CPU", "the UNet on a CPU", error)


def test_networks_noise_and_context_can_be_given(tiny):
    """from_networks, latents=, context= and reader= paint, to the bit, what the usual way does."""
    parts = tiny.config, tiny.tokenizer, tiny.text_encoder, tiny.unet, tiny.vae
    prompt, options = "a red house", {"steps": 2, "n_images": 2}
    truth = ours(tiny, prompt, **options)
    noise = np.concatenate([sd.torch_normal(seed)((1, 4, 16, 16)) for seed in (3, 4)])
    context, asked = tiny.encode_prompts(["", prompt]), []
    given = {"latents": noise.transpose(0, 2, 3, 1), "context": np.array(context), "seed": 0}

    def reader(model, sentences):
        asked.append(sentences)
        return tiny.encode_prompts(sentences)

    plain = sd.StableDiffusion.from_networks(*parts, "float32")
    reading = sd.StableDiffusion.from_networks(*parts, reader=reader)
    for x in (
        ours(plain, prompt, **options),
        ours(reading, prompt, **options),
        ours(tiny, "", **options | given),
    ):
        assert mx.array_equal(x, truth)
    ours(sd.StableDiffusion(reader=reader), prompt, cfg=1, steps=1, width=64)
    assert asked == [["", prompt], [prompt]]


# %% What is refused -------------------------------------------------------------------------------

SQUARE = sd.ImageToImage(np.zeros((64, 64, 3)))


@pytest.mark.parametrize(
    "options, says",
    [
        *(({"prompt": p}, "prompt must be one text, got ") for p in (3, None, ["a", "b"])),
        ({"negative_prompt": None}, "negative_prompt must be one text, got None"),
        *(({"steps": n}, f"steps must be 1 to 999, got {n}") for n in (0, 1000, 1.5, "9")),
        ({"sampler": "lcm", "steps": 51}, "steps must be at most 50"),
        ({"sampler": "euler9"}, "sampler must be one of plms, .*, got euler9"),
        *(({"seed": n}, f"seed must be a whole number, got {n}") for n in (0.5, None)),
        *(({"cfg": n}, f"cfg must be a finite number.*, got {n}") for n in (math.nan, "7")),
        ({"n_images": 0}, "n_images must be 1 to 999, got 0"),
        *(({"height": n}, f"height must be a multiple of 8, .* got {n}") for n in (0, -64, 500)),
        ({"latents": np.zeros((1, 4, 16, 16))}, "latents must be"),
        ({"latents": np.zeros((1, 16, 16, 4)), "n_images": 2}, "latents must be"),
        ({"context": np.zeros((1, 77, WIDTH)), "cfg": 3}, r"one row a sentence, got \(1, "),
        ({"context": np.zeros((2, 77, WIDTH)), "cfg": 1}, r"one row a sentence, got \(2, "),
        ({"task": SQUARE, "steps": 1}, "strength.*0.75"),
        ({"task": SQUARE, "width": 128}, r"must be \(64, 64\)"),
        ({"task": sd.ImageToImage(np.zeros((65, 64, 3)))}, "height must be a multiple of 8"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_options_are_checked_at_the_call(tiny, options, says):
    """Not at the first step; with the name, what it must be and what it was."""
    with pytest.raises(sd.SDError, match=says):
        tiny.generate_latents(**{"prompt": "a tree"} | options)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"down.1.0.conv1.weight": None}, "down.1.0.conv1.weight is missing"),
        ({"down.1.0.conv3.weight": mx.zeros(1)}, r"down.1.0.conv3.weight is \(1,\)"),
        ({"down.1.0.conv1.weight": mx.zeros((9, 3, 3, 31))}, r"conv1.weight is \(9, 3, 3, 31\)"),
        ({"middle.1.proj_in.bias": None, "x": mx.zeros(1)}, "2 tensors of the unet.*middle.1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(small, tmp_path, change, says):
    """Missing, unknown, of another shape: nothing is guessed and nothing left out."""
    _, config, weights = small
    weights = weights | {f"unet.{name}": w for name, w in change.items()}
    weights = {name: w for name, w in weights.items() if w is not None}
    with pytest.raises(sd.SDError, match=says):
        sd.StableDiffusion(write_file(tmp_path / "bad.safetensors", config, weights))


ODD = {  # the place of a number in a config: what cannot be there
    "kind": ["lora", None], "size": [72, 100, 0, -64, "64", None, 64.0, 1 << 20],
    "prediction": ["epsilon", None, []], "cfg": ["7", None, math.nan, -1, 1000],
    "text": [None, [], {}, "x"], "text.width": [128, 0, None, "64"],
    "text.layers": [0, 10**9, "3"], "text.heads": [0, 3, None, 4.0],
    "text.activation": ["relu", None, []], "text.vocabulary": [100, None, 1e9, 49408.0],
    "text.pad": [10**6, -1, "0", None], "text.more": [1],
    "unet": [None, [], {}], "unet.heads": [[8, 8, 8, 7], [0] * 4, [8] * 3, None, 8],
    "unet.groups": [7, 0, None, "x"], "unet.widths": [[1, 2], "wide", [32.0] * 4, [0] * 4, None],
    "unet.context_width": [0, -64, None], "unet.channels": [5, None, "4", 4.0], "unet.more": [1],
    "vae": [None, {}], "vae.scale": [0, "x", None, math.inf, math.nan], "vae.groups": [0, 7, None],
    "vae.widths": ["wide", [32, 32], None, [[32]] * 4],
}  # fmt: skip


@pytest.mark.parametrize("place, value", [(p, v) for p, values in ODD.items() for v in values])
def test_a_config_that_makes_no_sense_is_refused(small, tmp_path, place, value):
    """With the file's name, before anything is built of it."""
    config, (*inside, name) = copy.deepcopy(small[1]), place.split(".")
    (config[inside[0]] if inside else config)[name] = value
    with pytest.raises(sd.SDError, match=r"odd\.safetensors.*Convert the checkpoint again"):
        sd.StableDiffusion(write_file(tmp_path / "odd.safetensors", config, {"x": mx.zeros(1)}))


def test_what_the_user_can_mend_is_an_sderror_and_a_bug_is_a_bug(tiny, monkeypatch, capsys):
    """An error in a network or in somebody's change keeps its type and its traceback."""
    assert issubclass(sd.SDError, ValueError)
    for part, error in itertools.product(
        ("VAE", "UNet", "TextEncoder", "Tokenizer"), (TypeError, ValueError, KeyError)
    ):
        with monkeypatch.context() as patch, pytest.raises(error, match="a bug") as caught:
            patch.setattr(getattr(sd, part), "__init__", raising(error("a bug")))
            sd.StableDiffusion()
        assert caught.type is error
    with pytest.raises(ZeroDivisionError):
        sd.StableDiffusion(changes=[lambda config, weights: 1 / 0])
    for error in (TypeError, ValueError, KeyError, RuntimeError):
        with monkeypatch.context() as patch, pytest.raises(error, match="a bug") as caught:
            patch.setattr(sd.UNet, "__call__", raising(error("a bug")))
            ours(tiny, "a tree")
        assert caught.type is error
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="a bug"):
        patch.setattr(sd, "StableDiffusion", raising(ValueError("a bug")))
        sd.main([])
    with pytest.raises(SystemExit) as stop:
        sd.main(["--steps", "0"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "sd.py: steps must be 1 to 999, got 0."
