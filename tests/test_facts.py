"""What a source says about itself: who is asked, in which order, and what sd.py makes of it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convert_weights
import sd
from convert_weights import ConversionError, convert, tell_facts
from sd_more import app
from sd_more.safety import load_checker
from tests.reference import quiet, write_file, write_folder


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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bits_are_what_pytorch_reads(tmp_path, dtype):
    """All 256 of them, in both formats of a file."""
    bits = torch.arange(256, dtype=torch.uint8).view(dtype)
    save_file({"a": bits}, tmp_path / "a.safetensors")
    read = convert_weights.read_file(tmp_path / "a.safetensors").tensors["a"].float32()
    assert np.array_equal(read, bits.float().numpy(), equal_nan=True)


def test_a_model_of_8_bits_is_converted(weights, tmp_path):
    eight = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in weights.items()}
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
