"""Other VAEs: of the same kind, and TAESD's, against diffusers' AutoencoderTiny."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file

import convert_weights
import sd
from convert_weights import ConversionError, convert
from sd_more import app
from sd_more.low_memory import LowMemory
from sd_more.vae import other_vae, read_kind, with_tiny_vae
from tests.reference import assert_close, checked, quiet

OPTIONS = {"steps": 1, "cfg": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(5)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4
    ).eval()
    for p in (p for p in vae.parameters() if p.ndim == 1):
        p.uniform_(-0.3, 0.3)
    return vae


def original(vae):
    """-> {half: {name: tensor}}, as its author names them; in the decoder a Clamp comes first"""
    halves = {"encoder": {}, "decoder": {}}
    for name, tensor in vae.state_dict().items():
        half, _, place, rest = name.split(".", 3)
        halves[half][f"{int(place) + (half == 'decoder')}.{rest}"] = tensor.clone()
    return halves


def forms(vae, folder):
    """Write all forms in which it is shared. -> {form: what to give}"""
    vae.save_pretrained(folder / "folder")
    halves = original(vae)
    both = {f"taesd_{half}.{n}": t for half, ts in halves.items() for n, t in ts.items()}
    save_file(both, folder / "both.safetensors")
    for half, tensors in halves.items():
        torch.save(tensors, folder / f"taesd_{half}.pth")
    return {
        "folder": folder / "folder",
        "its file": folder / "folder" / "diffusion_pytorch_model.safetensors",
        "both": folder / "both.safetensors",
        "decoder": folder / "taesd_decoder.pth",
        "encoder": folder / "taesd_encoder.pth",
    }


@pytest.mark.parametrize("form", ["folder", "its file", "both", "decoder", "encoder"])
def test_a_tiny_vae_is_that_of_diffusers(theirs, tmp_path, form):
    flat = convert(forms(theirs, tmp_path)[form], tmp_path / "a.flat.safetensors", dtype="float32",
                   log=quiet)  # fmt: skip
    assert read_kind(flat) == "tiny vae" and read_kind(sd.TINY) == "model"
    plain = sd.StableDiffusion()
    model = with_tiny_vae(plain, flat)
    assert model.unet is plain.unet and plain.config.vae["scale"] != 1
    x, picture = 3 * torch.randn(2, 4, 5, 3), torch.rand(2, 3, 40, 24)
    ours = model.decode(mx.array(x.permute(0, 2, 3, 1).numpy()))
    truth = (theirs.decode(x).sample / 2 + 0.5).clamp(0, 1)
    errors = [assert_close(ours, truth.permute(0, 2, 3, 1), 1e-5)]
    latents = theirs.encode(picture * 2 - 1).latents.permute(0, 2, 3, 1)
    errors.append(assert_close(model.encode(picture.permute(0, 2, 3, 1).numpy()), latents, 1e-5))
    checked("TAESD, both ways", "diffusers", max(errors))


def test_pictures_are_painted_with_it_in_little_memory_too(theirs, tmp_path):
    flat = convert(forms(theirs, tmp_path)["folder"], tmp_path / "a.safetensors", log=quiet)
    a, b = (
        with_tiny_vae(kind(), flat).txt2img("a tree", **OPTIONS)[0]
        for kind in (sd.StableDiffusion, LowMemory)
    )
    own = sd.StableDiffusion().txt2img("a tree", **OPTIONS)[0]
    difference = np.abs(np.int16(a) - np.int16(b)).max()
    assert a.size == (64, 64) and difference <= 1 and np.abs(np.int16(a) - np.int16(own)).max() > 20
    assert with_tiny_vae(LowMemory(), flat).img2img("a tree", a, steps=2, cfg=1)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_of_it_needs_the_other_half(theirs, tmp_path, half):
    given = forms(theirs, tmp_path)[half]
    other = tmp_path / f"taesd_{'decoder' if half == 'encoder' else 'encoder'}.pth"
    other.unlink()
    with pytest.raises(ConversionError, match=f"{other.name} does not exist"):
        convert(given, log=quiet)
    given.rename(tmp_path / "small.pth")
    with pytest.raises(ConversionError, match="says neither encoder nor decoder"):
        convert(tmp_path / "small.pth", log=quiet)


@pytest.mark.parametrize(
    "name", ["taesdxl.safetensors", "taesd3.safetensors", "taef1-flux.safetensors"]
)
def test_one_for_other_latents_is_refused(theirs, tmp_path, name):
    forms(theirs, tmp_path)["both"].rename(tmp_path / name)
    with pytest.raises(ConversionError, match="a small VAE for"):
        convert(tmp_path / name, log=quiet)


@pytest.mark.parametrize("field", ["latent_magnitude", "num_decoder_blocks", "scaling_factor"])
def test_a_config_that_says_otherwise_is_refused(theirs, tmp_path, field):
    odd = {"latent_magnitude": 2, "num_decoder_blocks": (1, 1, 1, 1), "scaling_factor": 0.5}[field]
    theirs.save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: odd}))
    with pytest.raises(ConversionError, match=f"its {field} is"):
        convert(tmp_path / "a", log=quiet)


@pytest.mark.parametrize("change", ["missing", "narrow", "type"])
def test_what_does_not_fit_is_refused(theirs, tmp_path, change):
    tensors = {name: t.clone() for name, t in theirs.state_dict().items()}
    name = "decoder.layers.12.conv.2.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:1] if change == "narrow" else tensors[name].int()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(
        ConversionError, match=r"decoder.layers.12.conv.2.weight is (missing|.*expected)"
    ):
        convert(tmp_path / "a.safetensors", log=quiet)


def test_a_vae_of_the_same_kind_is_the_change_that_the_converter_would_make(
    networks, weights, tmp_path, capsys
):
    """--vae of either program: the same file of a model, and the same picture."""
    save_file(weights, tmp_path / "model.safetensors")
    networks[0].save_pretrained(tmp_path / "folder")
    start = "first_stage_model."
    alone = {n.removeprefix(start): 1.1 * t for n, t in weights.items() if n.startswith(start)}
    torch.save({"state_dict": alone}, tmp_path / "mse.vae.pt")
    flat = convert(tmp_path / "mse.vae.pt", dtype="float32", log=quiet)
    assert read_kind(flat) == "vae" and sd.read_header(flat)["format"] == "sd.py 2"
    whole = convert(tmp_path / "model.safetensors", tmp_path / "whole.safetensors",
                    dtype="float32", vae=tmp_path / "mse.vae.pt", log=quiet)  # fmt: skip
    convert(tmp_path / "model.safetensors", dtype="float32", log=quiet)
    model = sd.StableDiffusion(tmp_path / "model.flat.safetensors", changes=[other_vae(flat)])
    x = mx.random.normal((1, 8, 8, 4), key=mx.random.key(1))
    assert np.array_equal(model.decode(x), sd.StableDiffusion(whole).decode(x))
    convert_weights.main(["--info", str(flat)])
    assert "a VAE" in capsys.readouterr().out
    same = convert(tmp_path / "folder", tmp_path / "same.safetensors", dtype="float32", log=quiet)
    model = sd.StableDiffusion(tmp_path / "model.flat.safetensors", changes=[other_vae(same)])
    plain = sd.StableDiffusion(tmp_path / "model.flat.safetensors")
    assert np.array_equal(model.decode(x), plain.decode(x))
    (tmp_path / "mse.vae.pt").rename(tmp_path / "sdxl_vae.pt")
    with pytest.raises(ConversionError, match="a VAE for SDXL"):
        convert(tmp_path / "sdxl_vae.pt", log=quiet)


def test_the_command_line_takes_both_and_makes_them_again(theirs, weights, tmp_path, capsys):
    given = forms(theirs, tmp_path)
    start = "first_stage_model."
    save_file(
        {n: t for n, t in weights.items() if n.startswith(start)}, tmp_path / "full.safetensors"
    )
    save_file(weights, tmp_path / "model.safetensors")
    options = ["--model", str(tmp_path / "model.safetensors"), "--steps", "1", "--cfg", "1"]
    options += ["--sampler", "ddim", "--width", "64", "--height", "64"]
    options += ["--output", str(tmp_path / "out.png"), "--prompt", "a tree"]
    for more in ([], ["--vae", str(tmp_path / "full.safetensors")], ["--vae", str(given["both"])]):
        app.main(options + more)
    app.main(["--from-png", str(tmp_path / "out-3.png"), "--output", str(tmp_path / "out.png")])
    pictures = [Image.open(tmp_path / f"out{end}.png") for end in ("", "-2", "-3", "-4")]
    same, full, tiny, again = (np.asarray(p) for p in pictures)
    assert np.array_equal(same, full) and not np.array_equal(full, tiny)
    assert np.array_equal(tiny, again) and "VAE file: " in pictures[3].text["parameters"]
    capsys.readouterr()
    save_file({"emb_params": torch.zeros(1, 64)}, tmp_path / "word.safetensors")
    with pytest.raises(SystemExit):
        app.main([*options, "--vae", str(tmp_path / "word.safetensors")])
    assert "it is a words, where a vae is needed" in capsys.readouterr().err


def test_a_whole_model_lends_its_vae(networks, weights, tmp_path):
    """Any checkpoint's will do, of a flat file or of one that becomes one."""
    start = "first_stage_model."
    other = {name: 1.1 * t if name.startswith(start) else t for name, t in weights.items()}
    save_file(weights, tmp_path / "a.safetensors")
    save_file(other | {"scale_factor": torch.tensor(0.5)}, tmp_path / "b.safetensors")
    a, b = (convert(tmp_path / f"{x}.safetensors", dtype="float32", log=quiet) for x in "ab")
    x = mx.random.normal((1, 8, 8, 4), key=mx.random.key(1))
    for kind in (sd.StableDiffusion, LowMemory):
        model = kind(a, changes=[other_vae(b)])
        assert model.config.vae["scale"] == 0.5 and model.config.name == "Stable Diffusion 1.x"
        assert np.array_equal(model.decode(x), kind(b).decode(x))
        assert not np.array_equal(model.decode(x), kind(a).decode(x))
