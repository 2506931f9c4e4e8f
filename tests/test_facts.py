"""What a source says about itself: who is asked, in which order, and what sd.py makes of it."""

import json

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import convert_weights
import sd
from convert_weights import ConversionError, convert, tell_facts
from sd_more import app
from sd_more.guidance import guided
from sd_more.safety import load_checker
from test_sd import BETAS
from tests.reference import assert_close, checked, quiet, write_file, write_folder


def source(tmp_path, name="a.safetensors", tensors=(), **more):
    path = tmp_path / name
    path.touch()
    return convert_weights.Source(path, dict(tensors), **more)


def first(tmp_path, asked=None, **more):
    """-> {what: the value that counts}"""
    facts = {}
    for what, value, _ in tell_facts(asked or {}, source(tmp_path, **more)):
        facts.setdefault(what, value)
    return facts


SAYS = {  # what a source has: what follows
    "nothing": ({}, {}),
    "a mark": ({"tensors": {"v_pred": None}}, {"prediction": "v"}),
    "two marks": ({"tensors": {"v_pred": 0, "ztsnr": 0}}, {"prediction": "v", "zero_snr": True}),
    "modelspec, v": ({"metadata": {"modelspec.prediction_type": "v"}}, {"prediction": "v"}),
    "upper case": ({"metadata": {"prediction_type": "EPSILON"}}, {"prediction": "eps"}),
    "the architecture": (
        {"metadata": {"modelspec.architecture": "stable-diffusion-v2-768-v"}}, {"prediction": "v"},
    ),
    "the resolution": ({"metadata": {"modelspec.resolution": "768x768"}}, {"size": 768}),
    "kohya": (
        {"metadata": {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}},
        {"prediction": "v", "zero_snr": True},
    ),
    "a config": ({"overrides": {"spacing": "trailing"}}, {"spacing": "trailing"}),
    "a name": (
        {"name": "sd_turbo.safetensors"},
        {"prediction": "eps", "spacing": "trailing", "sampler": "euler", "steps": 4, "cfg": 1.0},
    ),
    "a name that only sounds like it": ({"name": "turbocharger-v2.safetensors"}, {}),
    "a mark before a config": (
        {"tensors": {"v_pred": 0}, "overrides": {"prediction": "eps"}}, {"prediction": "v"},
    ),
    "a header before a config": (
        {"metadata": {"prediction_type": "epsilon"}, "overrides": {"prediction": "v"}},
        {"prediction": "eps"},
    ),
    "an option before all": (
        {"asked": {"prediction": "eps"}, "tensors": {"v_pred": 0}}, {"prediction": "eps"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAYS)
def test_who_says_what_and_who_counts_more(tmp_path, name):
    says, follows = SAYS[name]
    assert first(tmp_path, **says) == follows


@pytest.mark.parametrize(
    "text, follows",
    [
        ("    parameterization: v\n", {"prediction": "v"}),
        ("parameterization: 'eps'", {"prediction": "eps"}),
        ("  linear_start: 0.00085\n", {"prediction": "eps"}),
        ("  zsnr: true\n  parameterization: \"v\"\n", {"prediction": "v", "zero_snr": True}),
        ("# parameterization: v\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_a_yaml_beside_a_file_says_so(tmp_path, text, follows):
    (tmp_path / "a.yaml").write_text(text)
    assert first(tmp_path) == follows


def test_a_link_keeps_its_own_name_and_neighbours(tmp_path):
    """As in every hub cache: the file lies elsewhere, under a number."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f3a").touch()
    (tmp_path / "model.ckpt").symlink_to(tmp_path / "blobs" / "0f3a")
    (tmp_path / "model.yaml").write_text("parameterization: v")
    source = convert_weights.Source(tmp_path / "model.ckpt", {})
    assert [what for what, *_ in tell_facts({}, source)] == ["prediction"]
    (tmp_path / "model.yaml").rename(tmp_path / "blobs" / "model.yaml")
    assert [what for what, *_ in tell_facts({}, source)] == ["prediction"]


def converted(path, **options):
    said = []
    flat = convert(path, dtype="float32", log=said.append, **options)
    return sd.read_flat(flat)[0], "\n".join(said), sd.read_header(flat)["format"]


def test_marks_make_a_v_model_with_zero_terminal_snr(weights, tmp_path):
    """1.x, too, is a v model if it says so; the first version can't read such a file."""
    empty = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(weights | empty, tmp_path / "a.safetensors")
    config, said, version = converted(tmp_path / "a.safetensors")
    assert (config.prediction, config.zero_snr, config.rescale) == ("v", True, 0.7)
    assert (config.sampler, config.spacing, version) == ("ddim", "trailing", "sd.py 2")
    assert "it predicts v (it has a tensor v_pred)" in said and "zero_snr True (it has" in said
    model = sd.StableDiffusion(tmp_path / "a.flat.safetensors")
    assert model.schedule.abar(999) == 0
    *_, x = model.generate_latents("a house", steps=2, width=64, height=64)
    assert np.isfinite(np.array(x)).all()
    save_file(weights, tmp_path / "b.safetensors")
    config, _, version = converted(tmp_path / "b.safetensors")
    assert (config.prediction, config.zero_snr, version) == ("eps", False, "sd.py 1")
    config, said, _ = converted(tmp_path / "b.safetensors", prediction="v", zero_snr=True)
    assert config.zero_snr and "--zero-snr says so" in said


def test_a_schedule_that_ends_at_nothing_is_zero_terminal_snr(weights, tmp_path):
    schedule = sd.Schedule(sd.scaled_linear(), zero_snr=True)
    abar = torch.tensor([schedule.abar(t) for t in range(1000)], dtype=torch.float32)
    save_file(
        weights | {"alphas_cumprod": abar, "v_pred": torch.zeros(0)}, tmp_path / "a.safetensors"
    )
    config, said, _ = converted(tmp_path / "a.safetensors")
    assert config.zero_snr and "another noise schedule" not in said
    save_file(weights | {"alphas_cumprod": abar}, tmp_path / "b.safetensors")
    config, said, _ = converted(tmp_path / "b.safetensors")  # eps can say nothing at 999
    assert not config.zero_snr and "another noise schedule" in said
    assert "zero terminal SNR is not used" in said
    with pytest.raises(ConversionError, match="it predicts eps .* can't tell it"):
        convert(tmp_path / "b.safetensors", zero_snr=True, log=quiet)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_turbo_folder_paints_in_few_steps(networks, tmp_path):
    """Its scheduler says trailing, its name that it was distilled without guidance."""
    folder = write_folder(tmp_path / "sd-turbo", networks)
    edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing="trailing")
    config, said, version = converted(folder)
    assert (config.cfg, config.steps, config.sampler) == (1.0, 4, "euler")
    assert (config.spacing, version) == ("trailing", "sd.py 2")
    assert "spacing trailing (from the folder's config files)" in said
    assert "cfg 1.0 (its name says Turbo)" in said
    model = sd.StableDiffusion(tmp_path / "sd-turbo.flat.safetensors")
    assert model.schedule.timesteps(config.spacing, 1) == [999]
    assert model.schedule.timesteps(config.spacing, 4) == [999, 749, 499, 249]
    assert len(list(model.generate_latents("a house", width=64, height=64))) == 4


def test_a_folder_from_a_cache_is_known_by_its_published_name(networks, tmp_path):
    folder = write_folder(tmp_path / "2d7ec0e", networks)
    assert converted(folder)[0].steps == 50
    edit(folder / "model_index.json", _name_or_path="stabilityai/sd-turbo")
    assert converted(folder)[0].steps == 4


@pytest.mark.parametrize("given, size", [(60, 512), (64, 512), ([96, 96], 768), (8, 64), (1, 64)])
def test_a_size_becomes_one_that_can_be_painted(networks, tmp_path, given, size):
    folder = write_folder(tmp_path / "model", networks)
    edit(folder / "unet" / "config.json", sample_size=given)
    assert converted(folder)[0].size == size


def test_a_folders_added_words_are_words(networks, tmp_path):
    folder = write_folder(tmp_path / "model", networks)
    words = {"<cat-toy>": 49408, "<|endoftext|>": 49407, "far": 60_000, "odd": "x"}
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps(words))
    assert converted(folder)[0].words == {}  # the table has no row for it
    text = networks[2]
    old = text.get_input_embeddings().weight
    try:
        text.resize_token_embeddings(49409, mean_resizing=False)
        text.save_pretrained(folder / "text_encoder")
    finally:
        text.resize_token_embeddings(49408, mean_resizing=False)
        text.get_input_embeddings().weight.data[:] = old[:49408].data
    config, said, version = converted(folder)
    assert config.words == {"<cat-toy>": [49408]} and version == "sd.py 2"
    assert "1 more words: <cat-toy>" in said
    model = sd.StableDiffusion(tmp_path / "model.flat.safetensors")
    assert model.tokenizer.encode("a <cat-toy> here")[1:4] == [320, 49408, 763]


ODD_HABITS = [
    {"steps": 0}, {"steps": 10**9}, {"steps": "x"}, {"steps": None}, {"sampler": "unipc"},
    {"sampler": []}, {"sampler": {}}, {"spacing": "odd"}, {"spacing": []}, {"rescale": 2},
    {"rescale": "x"}, {"rescale": float("nan")}, {"habit": 1},
]  # fmt: skip


@pytest.mark.parametrize("habits", ODD_HABITS, ids=str)
def test_odd_habits_of_a_file_are_refused(small, tmp_path, capsys, habits):
    """When it is loaded, or when it is to paint; by the command line, too."""
    path = write_file(tmp_path / "odd.safetensors", small[1] | habits, small[2])
    with pytest.raises(sd.SDError, match=f"{next(iter(habits))}|habit"):
        sd.StableDiffusion(path).txt2img("a house", width=64, height=64)
    with pytest.raises(SystemExit) as stop:
        app.main(["--model", str(path), "--output", str(tmp_path / "a.png")])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "words", [{"": [3]}, {"a": [49408]}, {"a": [-1]}, {"a": [2.0]}, {"a": 1}, []]
)
def test_words_of_a_file_stay_within_its_table(small, tmp_path, words):
    path = write_file(tmp_path / "w.safetensors", small[1] | {"words": words}, {})
    with pytest.raises(sd.SDError, match=r"w\.safetensors is (of no use|damaged)"):
        sd.read_flat(path)


def test_a_safety_checker_is_added_to_a_single_file(weights, checker, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    checker.save_pretrained(tmp_path / "whole" / "safety_checker")
    for given in (tmp_path / "whole", tmp_path / "whole" / "safety_checker"):
        config, _, _ = converted(tmp_path / "a.safetensors", safety=given)
        assert config.safety["layers"] == 3
        assert load_checker(sd.StableDiffusion(tmp_path / "a.flat.safetensors"))
    with pytest.raises(ConversionError, match="has no weights"):
        convert(tmp_path / "a.safetensors", safety=tmp_path, log=quiet)


# %% What could not be read ------------------------------------------------------------------------


EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", EIGHT)
def test_8_bits_are_what_pytorch_reads(tmp_path, dtype):
    """All 256 of them, in both formats of a file."""
    bits = torch.arange(256, dtype=torch.uint8).view(dtype)
    save_file({"a": bits}, tmp_path / "a.safetensors")
    read = convert_weights.read_file(tmp_path / "a.safetensors").tensors["a"].float32()
    assert np.array_equal(read, bits.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", EIGHT)
def test_a_model_of_8_bits_is_converted(weights, tmp_path, dtype):
    eight = {name: t.to(dtype) if t.ndim > 1 else t for name, t in weights.items()}
    save_file(eight, tmp_path / "a.safetensors")
    save_file({name: t.float() for name, t in eight.items()}, tmp_path / "b.safetensors")
    flats = [convert(tmp_path / name, log=quiet) for name in ("a.safetensors", "b.safetensors")]
    a, b = (sd.read_flat(flat)[1] for flat in flats)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("start", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_are_those_of_the_wrapped(weights, flat, tmp_path, start):
    save_file(
        {start + name: tensor for name, tensor in weights.items()}, tmp_path / "a.safetensors"
    )
    _, ours = sd.read_flat(convert(tmp_path / "a.safetensors", dtype="float32", log=quiet))
    assert all(np.array_equal(ours[name], flat[name].numpy()) for name in flat)


def test_a_wrapper_inside_a_name_goes_too(tmp_path):
    strip = convert_weights.strip_names
    assert strip({"model.diffusion_model._orig_mod.out.0.bias": 1}) == {
        "model.diffusion_model.out.0.bias": 1
    }
    both = {"module.a": 1, "a": 2}
    assert strip(both) == both and strip({"modules.a": 1}) == {"modules.a": 1}


PLACES = ("model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.weight")


@pytest.mark.parametrize("name", PLACES)
def test_what_is_of_an_unknown_kind_is_not_called_missing(weights, tmp_path, name):
    odd = {name: torch.quantize_per_tensor(weights[name], 0.1, 0, torch.qint8)}
    torch.save(weights | odd, tmp_path / "a.ckpt")
    with pytest.raises(ConversionError, match="is a torch._utils._rebuild_qtensor, which can not"):
        convert(tmp_path / "a.ckpt", log=quiet)
    torch.save(odd, tmp_path / "b.ckpt")
    with pytest.raises(ConversionError, match="1 more can't be read here"):
        convert(tmp_path / "b.ckpt", log=quiet)


def test_a_distilled_unet_is_named(weights, tmp_path):
    rest = {
        name: tensor for name, tensor in weights.items()
        if "middle_block" not in name and "input_blocks.2." not in name
    }  # fmt: skip
    save_file(rest, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match="it is a distilled UNet"):
        convert(tmp_path / "a.safetensors", log=quiet)


SCALES = ("scale_weight", "weight_scale")


@pytest.mark.parametrize("dtype, bits", zip(EIGHT, (3, 2), strict=True))
@pytest.mark.parametrize("end", SCALES)
def test_8_bits_with_a_scale_are_multiplied_by_it(weights, flat, tmp_path, end, dtype, bits):
    """As ComfyUI writes them: a weight over its largest number, times the type's, and a number
    beside."""
    of = torch.finfo(dtype)
    eight = {}
    for name, tensor in weights.items():
        if tensor.ndim > 1 and name.endswith(".weight") and "embedding" not in name:
            scale = tensor.abs().max() / of.max
            eight[name] = (tensor / scale).to(dtype)
            eight[name.removesuffix("weight") + end] = scale
            eight[name.removesuffix("weight") + "scale_input"] = torch.ones(())
        else:
            eight[name] = tensor
    eight["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(eight, tmp_path / "a.safetensors")
    said = []
    _, ours = sd.read_flat(convert(tmp_path / "a.safetensors", dtype="float32", log=said.append))
    for name, tensor in flat.items():
        if tensor.ndim > 1:  # half of the fraction's last bit, and below the smallest normal number
            error, size = np.abs(np.array(ours[name]) - tensor.numpy()), np.abs(tensor.numpy())
            least = size.max() / of.max * of.smallest_normal * 1.01  # half of its last bit likewise
            assert (error <= (size + least) / 2 ** (bits + 1)).all(), name
    assert "(scales of 8 bits)" in "".join(said) and "unknown" not in "".join(said)


def test_a_scale_that_is_none_is_refused(weights, tmp_path):
    name = "model.diffusion_model.out.2.weight"
    odd = {name: weights[name].to(torch.float8_e4m3fn)}
    odd[name.removesuffix("weight") + "scale_weight"] = torch.ones(4, 1)
    save_file(weights | odd, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=r"out.2.scale_weight is \(4, 1\), F32, expected one"):
        convert(tmp_path / "a.safetensors", log=quiet)


def test_a_broken_encoder_is_a_warning_and_anything_else_an_error(weights, tmp_path, capsys):
    """The VAE's encoder is for pictures to start from; some published models have NaNs there."""
    for name, good in (("encoder.conv_in", True), ("decoder.conv_in", False)):
        name = f"first_stage_model.{name}.weight"
        broken = {name: torch.full_like(weights[name], torch.nan)}
        save_file(weights | broken, tmp_path / "a.safetensors")
        if not good:
            with pytest.raises(ConversionError, match="its weights are broken"):
                convert(tmp_path / "a.safetensors", log=quiet)
            continue
        sd.say_once.cache_clear()
        model = sd.StableDiffusion(convert(tmp_path / "a.safetensors", log=quiet))
        assert "vae.encoder.0.weight holds infinities or NaNs: pictures" in capsys.readouterr().err
        options = {"steps": 1, "cfg": 1, "sampler": "ddim"}
        assert model.txt2img("a house", width=64, height=64, **options)
        with pytest.raises(sd.SDError, match="not a number"):
            model.img2img(
                "a house", model.txt2img("", width=64, height=64, **options)[0], 1.0, **options
            )


# %% Models that have learned guidance -------------------------------------------------------------


@pytest.fixture(scope="module")
def consistent(networks, tmp_path_factory):
    """-> a latent consistency model's folder, with random weights, as diffusers writes it"""
    vae, _, text = networks
    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 64, 128, 128), attention_head_dim=8,
        cross_attention_dim=64, time_cond_proj_dim=32,
    )  # fmt: skip
    folder = write_folder(tmp_path_factory.mktemp("lcm") / "lcm", (vae, unet.eval(), text))
    index = {"_class_name": "LatentConsistencyModelPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = diffusers.LCMScheduler(**BETAS, original_inference_steps=50)
    scheduler.save_pretrained(folder / "scheduler")
    return folder, unet


@pytest.mark.parametrize("cfg", [None, 1.0, 3.5, 12.0])
def test_learned_guidance_is_that_of_diffusers(consistent, tmp_path, cfg):
    folder, unet = consistent
    flat = convert(folder, tmp_path / "a.safetensors", dtype="float32", log=quiet)
    config = sd.read_flat(flat)[0]
    assert (config.sampler, config.steps, config.cfg) == ("lcm", 4, 1.0)
    model = sd.StableDiffusion(flat, changes=[] if cfg is None else [guided(cfg)])
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64)
    w = torch.full((2,), (cfg or 8.5) - 1)
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    told = embed(None, w, embedding_dim=32)
    truth = unet(x, 499, context, timestep_cond=told).sample.permute(0, 2, 3, 1)
    ours = model.predict(
        mx.array(x.permute(0, 2, 3, 1).numpy()), 499, sd.Condition(mx.array(context.numpy()))
    )
    checked("a UNet that has learned guidance", "diffusers", assert_close(ours, truth, 1e-5))
    blind = unet(x, 499, context).sample.permute(0, 2, 3, 1)
    assert np.abs(np.array(ours) - blind.numpy()).max() > 1e-3 * np.abs(truth.numpy()).max()


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_consistency_models_latents_are_those_of_diffusers(
    consistent, networks, their_tokenizer, tmp_path, steps
):
    folder, unet = consistent
    vae, _, text = networks
    scheduler = diffusers.LCMScheduler(**BETAS, original_inference_steps=50)
    pipeline = diffusers.LatentConsistencyModelPipeline(
        vae, text, their_tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": 8.5, "output_type": "latent"}
    generator = torch.Generator().manual_seed(42)
    truth = pipeline("a house", 64, 64, generator=generator, **options).images
    flat = convert(folder, tmp_path / "a.safetensors", dtype="float32", log=quiet)
    *_, x = sd.StableDiffusion(flat).generate_latents("a house", steps=steps, width=64, height=64)
    error = assert_close(x, truth.permute(0, 2, 3, 1), 1e-4)
    checked("a latent consistency model's latents after 1 to 7 steps", "diffusers", error)


def test_the_command_line_tells_it_cfg(consistent, tmp_path, capsys):
    folder, _ = consistent
    options = ["--model", str(folder), "--prompt", "a house", "--output", str(tmp_path / "a.png")]
    options += ["--converted", str(tmp_path)]
    for more in ([], ["--cfg", "8.5"], ["--cfg", "2"], ["--from-png", str(tmp_path / "a-3.png")]):
        app.main([*options, *more])
    assert "the model's own steps 4, sampler lcm" in capsys.readouterr().err
    a, same, b, again = (Image.open(tmp_path / f"a{end}.png") for end in ("", "-2", "-3", "-4"))
    assert a.size == (64, 64) and "CFG scale: 8.5" in a.text["parameters"]
    assert a.tobytes() == same.tobytes() != b.tobytes() == again.tobytes()
    with pytest.raises(sd.SDError, match="has not learned guidance"):
        sd.StableDiffusion(changes=[guided()])


# %% Where converted files are ---------------------------------------------------------------------


def test_converted_files_are_kept_where_one_wants_listed_and_cleared(
    weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    (tmp_path / "kept").mkdir()
    save_file(weights, tmp_path / "models" / "a.safetensors")
    path, kept = tmp_path / "models" / "a.safetensors", tmp_path / "kept"
    assert convert_weights.flat_file(path, quiet, kept) == kept / "a.flat.safetensors"
    assert convert_weights.flat_file(path, quiet, kept) == kept / "a.flat.safetensors"
    assert len(list((tmp_path / "models").iterdir())) == 1
    (tmp_path / "models" / "a.flat.safetensors").write_text("mine")  # so it goes to the cache
    cached = convert_weights.flat_file(path, quiet)
    assert cached.parent == tmp_path / "cache" / "sd.py"
    (cached.parent / "mine.flat.safetensors").write_text("mine, too")
    convert_weights.main(["--list"])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(cached) in said and "from a.safetensors" in said
    convert_weights.main(["--clear"])
    assert [path.name for path in cached.parent.iterdir()] == ["mine.flat.safetensors"]
    assert (kept / "a.flat.safetensors").exists()
    with pytest.raises(ConversionError, match="no folder .* to keep it in"):
        convert_weights.flat_file(path, quiet, tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        convert_weights.main([])
    assert "give a SOURCE" in capsys.readouterr().err


def test_a_linked_file_is_converted_under_its_own_name(weights, tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file(weights, tmp_path / "blobs" / "0f3a")
    (tmp_path / "house.safetensors").symlink_to(tmp_path / "blobs" / "0f3a")
    flat = convert_weights.flat_file(tmp_path / "house.safetensors", quiet)
    assert flat == tmp_path / "house.flat.safetensors"
    assert sd.read_header(flat)["source"] == "house.safetensors"
