"""What lies beside a file, what a folder's files say, and what a stranger's file is called.

Each was silently wrong, or called by a wrong name, in the hands of somebody who tried what people
really have.
"""

import json
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

import sd
from convert_weights import ConversionError, convert, flat_file
from sd_more.textual_inversion import textual_inversion
from tests.reference import quiet, write_folder


def edit(path, **changes):
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | changes))


def converted(path, **options):
    """-> the config, or of what is no model its JSON; what was said"""
    said = []
    flat = convert(path, path.parent / "out.flat.safetensors", log=said.append, **options)
    config = json.loads(sd.read_header(flat)["config"])
    if config["kind"] == "model":
        sd.read_flat(flat)
    return config, "\n".join(said)


# %% What lies beside a file -----------------------------------------------------------------------

PAIR = {
    "lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(64, 2),
}  # fmt: skip
LAYER = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."


def write_peft(folder, alpha, name="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({LAYER + part: tensor for part, tensor in PAIR.items()}, folder / name)
    edit(folder / "adapter_config.json", lora_alpha=alpha, r=2, peft_type="LORA")
    return folder / name


def strength(flat):
    """How much its only layer adds."""
    up, down = load_file(flat).values()
    return (up @ down if up.shape[1] == 2 else down @ up).mean().item()


@pytest.mark.parametrize("change", ["added", "changed", "removed"])
def test_what_was_made_before_is_made_again_when_a_neighbour_changes(weights_v2, tmp_path, change):
    """A yaml that says what the model predicts, and what PEFT says of alpha."""
    model, yaml = tmp_path / "a.safetensors", tmp_path / "a.yaml"
    save_file(weights_v2, model)
    adapter = write_peft(tmp_path / "peft", 2)
    if change != "added":
        yaml.write_text("parameterization: v\n")
        edit(tmp_path / "peft" / "adapter_config.json", lora_alpha=4)
    else:
        (tmp_path / "peft" / "adapter_config.json").unlink()
    first, lora = sd.read_flat(flat_file(model, quiet))[0], strength(flat_file(adapter, quiet))
    said = []
    flat_file(model, said.append)
    assert "made from a.safetensors before" in said[0]
    if change == "removed":
        yaml.unlink()
        (tmp_path / "peft" / "adapter_config.json").unlink()
    else:
        yaml.write_text("# so that the size changes, too\nparameterization: eps\n")
        edit(tmp_path / "peft" / "adapter_config.json", lora_alpha=16, r=2)
    again, other = sd.read_flat(flat_file(model, quiet))[0], strength(flat_file(adapter, quiet))
    told = {"added": (None, "eps"), "changed": ("v", "eps"), "removed": ("v", None)}[change]
    assert all(b in (None, a.prediction) for a, b in zip((first, again), told, strict=True))
    factors = {"added": (2, 16), "changed": (4, 16), "removed": (4, 2)}[change]
    assert (lora, other) == factors


def test_pefts_config_is_asked_whatever_the_file_is_called(tmp_path):
    for name in ("style.safetensors", "adapter_model.safetensors"):
        path = write_peft(tmp_path / name[:5], 16, name)
        config, said = converted(path)
        assert config["kind"] == "lora" and "alpha and rank are what adapter_config.json" in said
        assert strength(path.parent / "out.flat.safetensors") == 16
    path = tmp_path / "style" / "other.safetensors"  # of another kind, in the same folder
    names = {
        n.replace("base_model.model.", "unet."): t
        for n, t in load_file(path.parent / "style.safetensors").items()
    }
    save_file(names, path)
    assert "adapter_config" not in converted(path)[1]
    assert strength(path.parent / "out.flat.safetensors") == 2


def test_a_loras_folder_is_its_file(tmp_path):
    write_peft(tmp_path / "style", 16)
    flat = convert(tmp_path / "style", log=quiet)
    assert flat == tmp_path / "style.flat.safetensors" and strength(flat) == 16
    assert flat_file(tmp_path / "style", quiet, tmp_path / "style").name == flat.name
    (tmp_path / "other").mkdir()
    names = {LAYER.replace("base_model.model", "unet") + n: tensor for n, tensor in PAIR.items()}
    save_file(names, tmp_path / "other" / "pytorch_lora_weights.safetensors")
    assert strength(flat_file(tmp_path / "other", quiet)) == 2
    assert (tmp_path / "other.flat.safetensors").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_a_controlnets_file_in_its_folder_is_that_folder(controlnet, tmp_path, linked):
    """Its config is asked, and the folder's name is the file's."""
    folder = tmp_path / "control_v11e_sd15_shuffle"
    controlnet.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    if linked:
        shutil.move(file, tmp_path / "0f3a")
        file.symlink_to(tmp_path / "0f3a")
    config, said = converted(file)
    assert config["pool"] is False and "alike" not in said  # the config says more than a name
    edit(folder / "config.json", global_pool_conditions=True)
    config, said = converted(file)
    assert config["pool"] is True and "alike (config.json beside it)" in said
    flat = flat_file(file, quiet)
    assert flat == folder / "control_v11e_sd15_shuffle.flat.safetensors"
    assert sd.read_header(flat)["source"] == f"{folder.name}/{file.name}"
    edit(folder / "config.json", mid_block_scale_factor=2)
    with pytest.raises(ConversionError, match="mid_block_scale_factor is 2"):
        convert(file, log=quiet)
    (folder / "config.json").unlink()
    config, said = converted(file)
    assert config["pool"] is True and "alike (by its name)" in said
    sd.ControlNet(flat)


def test_a_config_of_another_network_is_not_asked(networks, controlnet, weights, tmp_path):
    controlnet.save_pretrained(tmp_path / "a")
    edit(tmp_path / "a" / "config.json", global_pool_conditions=True, block_out_channels=[1] * 4)
    assert converted(tmp_path / "a" / "diffusion_pytorch_model.safetensors")[0]["pool"] is False
    networks[0].save_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "b")
    file = tmp_path / "b" / "diffusion_pytorch_model.safetensors"
    assert converted(file)[0]["vae"]["scale"] == 0.18215
    save_file(weights, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text("[1]")  # a whole model has nothing to do with it
    assert converted(tmp_path / "b" / "model.safetensors")[0]["kind"] == "model"


def test_a_vaes_file_in_its_folder_asks_the_config(networks, weights, tmp_path):
    networks[0].save_pretrained(tmp_path / "mse")
    edit(tmp_path / "mse" / "config.json", scaling_factor=0.5)
    file = tmp_path / "mse" / "diffusion_pytorch_model.safetensors"
    config, said = converted(file)
    assert config["vae"]["scale"] == 0.5 and "scale 0.5 (from config.json beside it)" in said
    save_file(weights, tmp_path / "a.safetensors")
    config, said = converted(tmp_path / "a.safetensors", vae=file)
    assert config["vae"]["scale"] == 0.5 and "scale 0.5 (from config.json beside it)" in said


def test_a_vae_beside_a_model_is_named(weights, tmp_path):
    save_file(weights, tmp_path / "nai.safetensors")
    start = "first_stage_model."
    vae = {n.removeprefix(start): 1.1 * t for n, t in weights.items() if n.startswith(start)}
    torch.save({"state_dict": vae}, tmp_path / "nai.vae.pt")
    says = "there is nai.vae.pt beside it"
    assert says in converted(tmp_path / "nai.safetensors")[1]
    assert says not in converted(tmp_path / "nai.safetensors", vae=tmp_path / "nai.vae.pt")[1]


# %% VAEs for other latents ------------------------------------------------------------------------


@pytest.mark.parametrize("changes, says", [
    ({"scaling_factor": 0.13025}, "a VAE for SDXL .its scaling_factor is 0.13025"),
    ({"_name_or_path": "stabilityai/sdxl-vae", "force_upcast": True}, "a VAE for SDXL .its _name"),
    ({"latent_channels": 16}, "such as SD 3 or Flux .its latent_channels is 16"),
])  # fmt: skip
def test_a_config_tells_a_vae_for_other_latents(networks, weights, tmp_path, changes, says):
    folder = write_folder(tmp_path / "model", networks)
    edit(folder / "vae" / "config.json", **changes)
    save_file(weights, tmp_path / "a.safetensors")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for source, vae in (
        (folder, None), (folder / "vae", None), (file, None),
        (tmp_path / "a.safetensors", folder / "vae"), (tmp_path / "a.safetensors", file),
    ):  # fmt: skip
        with pytest.raises(ConversionError, match=says):
            convert(source, vae=vae, log=quiet)
    (tmp_path / "a.flat.safetensors").unlink(missing_ok=True)


def test_shapes_and_names_tell_a_vae_for_other_latents(networks, weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    vae = {name: t.clone() for name, t in networks[0].state_dict().items()}
    flux = vae | {"decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)}
    save_file(flux, tmp_path / "ae.safetensors")
    save_file(vae, tmp_path / "sdxl.vae.safetensors")
    sign = {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}
    save_file(vae, tmp_path / "fix.safetensors", metadata=sign)
    xl = {"conditioner.embedders.1.model.ln_final.weight": torch.zeros(2)}
    save_file(weights | xl, tmp_path / "whole.safetensors")
    for name, says in {
        "ae": "SD 3 or Flux .16 channels", "sdxl.vae": "VAE for SDXL", "fix": "VAE for SDXL",
        "whole": "it is Stable Diffusion XL",
    }.items():  # fmt: skip
        for source, other in ((name, None), ("a", tmp_path / f"{name}.safetensors")):
            with pytest.raises(ConversionError, match=says):
                convert(tmp_path / f"{source}.safetensors", vae=other, log=quiet)


# %% What a folder's other files say ---------------------------------------------------------------


@pytest.fixture(scope="module")
def longer(networks, tmp_path_factory):
    """-> a model's folder whose text encoder knows two more words"""
    folder = write_folder(tmp_path_factory.mktemp("longer") / "model", networks)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[name] = torch.cat([tensors[name], torch.ones(2, 64)])
    save_file(tensors, file)
    edit(folder / "text_encoder" / "config.json", vocab_size=49410)
    return folder


WORDS = {  # the file and what it holds
    "added_tokens.json": {"<cat-toy>": 49408},
    "tokenizer.json": {
        "added_tokens": [
            {"id": 49407, "content": "<|endoftext|>"}, {"id": 49408, "content": "<cat-toy>"},
            {"id": 60_000, "content": "far"}, {"id": "x", "content": "odd"}, {"id": 49409}, 3,
        ],
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            "49406": {"content": "<|startoftext|>"}, "49408": {"content": "<cat-toy>"},
            "-1": {"content": "odd"}, "49409": {"content": 3}, "9" * 5000: {"content": "far"},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("file", WORDS)
def test_added_words_are_those_of_all_three_files(longer, tmp_path, file):
    folder = shutil.copytree(longer, tmp_path / "model")
    (folder / "tokenizer" / file).write_text(json.dumps(WORDS[file]))
    config, said = converted(folder)
    assert config["words"] == {"<cat-toy>": [49408]}
    assert "1 more words: <cat-toy>" in said and "warning: it knows 1 more words" in said


def test_words_without_names_are_a_warning(weights, tmp_path):
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    more = {name: torch.cat([weights[name], torch.ones(2, 64)])}
    save_file(weights | more, tmp_path / "a.safetensors")
    config, said = converted(tmp_path / "a.safetensors")
    assert "words" not in config and "warning: it knows 2 more words" in said


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("form", [str, lambda pad: {"content": pad, "lstrip": False}])
def test_the_pad_token_is_the_tokenizers(networks, tmp_path, file, form):
    folder = write_folder(tmp_path / "model", networks)
    for pad, number in (("!", 0), ("<|endoftext|>", 49407), ("<pad>", 49407)):
        (folder / "tokenizer" / file).write_text(json.dumps({"pad_token": form(pad)}))
        config, said = converted(folder)
        assert config["text"]["pad"] == number
        assert (f"pad 0 (tokenizer/{file} says so)" in said) == (pad == "!")
        assert (f"warning: its pad_token is <pad> (tokenizer/{file}" in said) == (pad == "<pad>")


def test_a_tokenizer_in_one_file_has_the_merges(networks, tmp_path):
    """As transformers writes it today."""
    folder = write_folder(tmp_path / "model", networks)
    lines = (folder / "tokenizer" / "merges.txt").read_text("utf-8").split("\n")[1:48895]
    lines[:2] = lines[1::-1]
    (folder / "tokenizer" / "merges.txt").unlink()
    for merges in (lines, [line.split() for line in lines]):
        edit(folder / "tokenizer" / "tokenizer.json", model={"merges": merges})
        convert(folder, log=quiet)
        merges = load_file(tmp_path / "model.flat.safetensors")["tokenizer.merges"]
        assert bytes(merges.numpy()).startswith(b"t h\ni n\n")
    edit(folder / "tokenizer" / "tokenizer.json", model={"merges": lines[:9]})
    with pytest.raises(ConversionError, match="it is not CLIP's"):
        convert(folder, log=quiet)


@pytest.mark.parametrize("changes, says", [
    ({}, None),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
     "says DPMSolverMultistepScheduler, use_karras_sigmas, which"),
    ({"algorithm_type": "sde-dpmsolver++", "thresholding": True},
     "says thresholding, algorithm_type sde-dpmsolver[+]{2}, which"),
    ({"_class_name": "HeunDiscreteScheduler"}, "says HeunDiscreteScheduler, which is not asked"),
])  # fmt: skip
def test_what_a_scheduler_says_and_is_not_asked_is_named(networks, tmp_path, changes, says):
    folder = write_folder(tmp_path / "model", networks)
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    said = converted(folder)[1]
    assert ("scheduler says" in said) == bool(says)
    assert not says or re.search(says, said)


def test_a_folder_with_raw_weights_alone_is_read(networks, tmp_path):
    folder = write_folder(tmp_path / "model", networks)
    name = folder / "unet" / "diffusion_pytorch_model.safetensors"
    name.rename(name.with_suffix(".non_ema.safetensors"))
    assert converted(folder)[0]["kind"] == "model"
    shutil.rmtree(folder / "unet")
    (folder / "unet").mkdir()
    edit(folder / "unet" / "config.json", **json.loads("{}"))
    with pytest.raises(ConversionError) as problem:
        convert(folder, log=quiet)
    assert not str(problem.value).endswith((".?", "?.", ".."))


def test_a_hub_caches_folder_has_the_repositorys_name(networks, tmp_path):
    place = tmp_path / "models--stabilityai--sd-turbo" / "snapshots" / "b261bac"
    place.parent.mkdir(parents=True)
    config, said = converted(write_folder(place, networks))
    assert config["steps"] == 4 and "steps 4 (its name says Turbo)" in said


# %% What a file says of itself --------------------------------------------------------------------


@pytest.mark.parametrize("name, warned", [
    ("realistic-turbo", "turbo"), ("dreamshaper_LCM", "lcm"), ("turbocharger", None),
    ("a-hyper-sd-8", "hyper-sd"), ("house", None),
])  # fmt: skip
def test_a_name_alone_does_not_make_a_1x_model_one_of_few_steps(weights, tmp_path, name, warned):
    save_file(weights, tmp_path / f"{name}.safetensors")
    config, said = converted(tmp_path / f"{name}.safetensors")
    assert "steps" not in config and config["cfg"] == 7.5
    assert (f"warning: its name says {warned}, nothing else" in said) == bool(warned)


def test_a_2x_model_called_turbo_is_made_of_sd_turbo(weights_v2, tmp_path):
    save_file(weights_v2, tmp_path / "anime-turbo.safetensors")
    config, said = converted(tmp_path / "anime-turbo.safetensors")
    assert (config["steps"], config["cfg"]) == (4, 1.0) and "warning" not in said


def test_a_tensor_or_a_yaml_tells_the_scale(weights, tmp_path):
    path = tmp_path / "a.safetensors"
    for number, dtype in (
        (0.3, torch.float32),
        (0.18215, torch.float16),
        (0.18215, torch.bfloat16),
    ):
        save_file(weights | {"scale_factor": torch.tensor(number, dtype=dtype)}, path)
        config, said = converted(path)
        assert config["vae"]["scale"] == number
        assert ("scale 0.3 (its tensor scale_factor says so)" in said) == (number == 0.3)
    save_file(weights, path)
    (tmp_path / "a.yaml").write_text("model:\n  params:\n    scale_factor: 0.25\n")
    config, said = converted(path)
    assert config["vae"]["scale"] == 0.25 and "scale 0.25 (a.yaml beside it says so)" in said
    (tmp_path / "a.yaml").write_text("scale_factor: 0\n")
    with pytest.raises(ConversionError, match="scale"):
        convert(path, log=quiet)
    vae = {n: t for n, t in weights.items() if n.startswith("first_stage_model.")}
    save_file(vae | {"scale_factor": torch.tensor(0.5)}, tmp_path / "v.safetensors")
    assert converted(tmp_path / "v.safetensors")[0]["vae"]["scale"] == 0.5


@pytest.mark.parametrize("text, says", [
    ("linear_start: 0.00085\nlinear_end: 0.0120\ntimesteps: 1000", None),
    ("linear_start: 8.5e-4\nlinear_end: 12.0e-3", None),
    ("linear_start: 0.001\nlinear_end: 0.02", "says linear_start 0.001, linear_end 0.02"),
    ("beta_schedule: 'cosine'", "says beta_schedule cosine"),
    ("target: x.FrozenCLIPEmbedder\nlayer: hidden\nlayer_idx: 11", "layer hidden, layer_idx 11"),
    ("target: x.FrozenCLIPEmbedder\nlayer: last", None),
    ("target: x.FrozenOpenCLIPEmbedder\nlayer: last", "read at layer last, which"),
    ("target: x.FrozenOpenCLIPEmbedder\nlayer: \"penultimate\"", None),
])  # fmt: skip
def test_what_a_yaml_says_and_is_not_done_is_a_warning(weights, tmp_path, text, says):
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "a.yaml").write_text(text)
    said = converted(tmp_path / "a.safetensors")[1]
    assert ("warning" in said) == bool(says) and (says or "") in said


def test_betas_tell_the_schedule_where_nothing_else_does(weights, tmp_path):
    path, right = tmp_path / "a.safetensors", torch.tensor(np.float32(sd.scaled_linear()))
    for betas, says in (
        (right, False), (right.half(), False), (right.bfloat16(), False),
        (torch.linspace(1e-4, 0.02, 1000), True), (torch.full((1000,), torch.nan), True),
    ):  # fmt: skip
        save_file(weights | {"betas": betas}, path)
        assert ("its betas differ" in converted(path)[1]) == says
    end = torch.cat([right[:999], torch.ones(1)])
    save_file(weights | {"betas": end, "v_pred": torch.zeros(0)}, path)
    assert "zero_snr True (its betas end at 1)" in converted(path)[1]


@pytest.mark.parametrize("text, prediction", [
    ("v", "v"), ("epsilon", "eps"), ("V_Prediction", "v"), ("edm", None),
])  # fmt: skip
def test_the_header_tells_the_prediction_in_each_spelling(weights, tmp_path, text, prediction):
    for key in ("modelspec.predict_key", "modelspec.prediction_type", "prediction_type"):
        save_file(weights, tmp_path / "a.safetensors", metadata={key: text})
        config, said = converted(tmp_path / "a.safetensors")
        assert config["prediction"] == prediction or prediction is None
        assert (f"header says {key} 'edm', which is not known here" in said) == (text == "edm")


# %% Wrappers and prefixes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "model_state_dict", "module", "state_dict"])
def test_a_state_dict_is_unwrapped(weights, flat, run, tmp_path, name):
    torch.save(
        {"epoch": 3, name: weights, "optimizer": {"state": {0: weights}}}, tmp_path / "a.ckpt"
    )
    run(tmp_path / "a.ckpt")
    assert "964 tensors used" in run.said


def test_diffusers_names_in_one_file_are_a_model(networks, weights, tmp_path):
    """With a prefix each, or in a dict of dicts."""
    parts = zip(("vae.", "unet.", "text_encoder."), networks, strict=True)
    both = {
        start + n: t.contiguous() for start, part in parts for n, t in part.state_dict().items()
    }
    save_file(both, tmp_path / "a.safetensors")
    apart = zip(("vae", "unet", "text_encoder"), networks, strict=True)
    torch.save({name: part.state_dict() for name, part in apart}, tmp_path / "d.ckpt")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / "b.safetensors")  # ComfyUI's diffusion_model.
    save_file(weights, tmp_path / "c.safetensors")
    a, b, c = (load_file(convert(tmp_path / f"{x}.safetensors", log=quiet)) for x in "abc")
    assert a.keys() == b.keys() == c.keys()
    d = load_file(convert(tmp_path / "d.ckpt", log=quiet))
    assert all(torch.equal(x[n], c[n]) for x in (a, b, d) for n in c)


def of_unknown_type(tensors, name, path, dtype="F8_E8M0"):
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    offsets = [len(rest), len(rest) + 4]
    header[name] = {"dtype": dtype, "shape": [4], "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest + bytes(4))


def test_a_tensor_of_an_unknown_type_matters_only_if_it_is_needed(weights, tmp_path):
    path, needed = tmp_path / "a.safetensors", "model.diffusion_model.out.2.bias"
    of_unknown_type(weights, "extra.scale", path)
    said = converted(path)[1]
    assert "warning: 1 tensors can not be read here and were left out: extra.scale" in said
    assert "F8_E8M0" in said
    rest = {name: tensor for name, tensor in weights.items() if name != needed}
    of_unknown_type(rest, needed, path, "F4")
    with pytest.raises(
        ConversionError, match="out.2.bias is a tensor of the type F4, which can not"
    ):
        convert(path, log=quiet)
    layer = LAYER.replace("base_model.model", "unet")
    of_unknown_type({layer + n: t for n, t in PAIR.items()}, "extra", path)
    assert "extra (tensor of the type F8_E8M0)" in converted(path)[1]


# %% Words -----------------------------------------------------------------------------------------


def test_several_words_in_one_file_are_all_words(tmp_path):
    vectors = {"<s0>": torch.ones(1, 64), "<s1>": torch.full((3, 64), 2.0)}
    save_file(vectors, tmp_path / "a.safetensors")
    torch.save({name: tensor[0] for name, tensor in vectors.items()}, tmp_path / "b.bin")
    keyed = {"string_to_param": {"*": vectors["<s0>"], "&": vectors["<s1>"]}}
    torch.save(keyed, tmp_path / "two.pt")
    torch.save(
        {"string_to_param": {"cat": vectors["<s0>"], "dog": vectors["<s1>"]}}, tmp_path / "c.pt"
    )
    for name, words in {
        "a.safetensors": {"<s0>": 1, "<s1>": 3}, "b.bin": {"<s0>": 1, "<s1>": 1},
        "two.pt": {"two": 1, "two-2": 3}, "c.pt": {"cat": 1, "dog": 3},
    }.items():  # fmt: skip
        flat = convert(tmp_path / name, log=quiet)
        assert {n: len(t) for n, t in load_file(flat).items()} == words
    width = sd.read_flat(sd.TINY)[0].text["width"]
    save_file({n: torch.ones(2, width) for n in vectors}, tmp_path / "d.safetensors")
    embed = [textual_inversion(convert(tmp_path / "d.safetensors", log=quiet))]
    ids = sd.StableDiffusion(changes=embed).tokenizer.encode("a <s1> and <s0>")
    assert ids[2:4] != ids[5:7] and min(*ids[2:4], *ids[5:7]) > sd.END


def test_clip_l_alone_is_for_1x_and_with_clip_g_for_sdxl(tmp_path):
    """As ComfyUI has it. The width is compared when a model is there to compare it with."""
    save_file({"clip_l": torch.ones(2, 768)}, tmp_path / "cat.safetensors")
    assert load_file(convert(tmp_path / "cat.safetensors", log=quiet))["cat"].shape == (2, 768)
    both = {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}
    save_file(both, tmp_path / "xl.safetensors")
    with pytest.raises(ConversionError, match="a textual inversion of SDXL"):
        convert(tmp_path / "xl.safetensors", log=quiet)


def test_a_linear_layer_is_no_embedding(tmp_path):
    save_file({"weight": torch.ones(2, 64), "bias": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match="it holds no Stable Diffusion"):
        convert(tmp_path / "a.safetensors", log=quiet)


# %% What is called by its kind --------------------------------------------------------------------

V = torch.ones(3)
KINDS = {  # what is saved, and what the message calls it
    "hypernetwork": ({768: ({"linear.0.weight": V}, {"linear.0.weight": V}), "step": 3},
                     "it is a hypernetwork. Those are not done here."),
    "one tensor": (torch.ones(2, 64), "one tensor that has no name"),
    "IP-Adapter": ({"image_proj.proj.weight": V, "ip_adapter.1.to_k_ip.weight": V}, "IP-Adapter"),
    "IP-Adapter, bin": ({"image_proj": {"proj.weight": V}, "ip_adapter": {"1.to_k_ip": V}},
                        "IP-Adapter"),
    "T2I-Adapter": ({"conv_in.weight": V, "body.0.block1.weight": V}, "T2I-Adapter"),
    "ESRGAN": ({"model.0.weight": V, "model.1.sub.0.RDB1.conv1.0.weight": V}, "ESRGAN"),
    "RealESRGAN": ({"params_ema": {"conv_first.weight": V, "body.0.rdb1.conv1.weight": V}},
                   "ESRGAN"),
    "UNet": ({"input_blocks.0.0.weight": torch.ones(8, 4, 3, 3)}, "a UNet alone"),
    "text": ({"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": V},
             "a text encoder alone"),
    "text 2": ({"text_encoder.embeddings.token_embedding.weight": V}, "text encoder alone"),
    "vision": ({"vision_model.embeddings.class_embedding": V}, "CLIP vision"),
    "MLX": ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_a": V}, "MLX"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_can_not_be_used_is_called_by_its_kind(tmp_path, name):
    value, says = KINDS[name]
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(ConversionError) as problem:
        convert(tmp_path / "a.bin", log=quiet)
    text = str(problem.value)
    assert says in text and text.endswith(".") and not text.endswith("..")


def test_a_picture_is_called_one(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "word.png")
    with pytest.raises(ConversionError, match="it is a picture; if it is an embedding in pixels"):
        convert(tmp_path / "word.png", log=quiet)


def test_a_layer_that_has_only_an_alpha_is_left_out(tmp_path):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q."
    names = {"lora_down.weight": PAIR["lora_A.weight"], "lora_up.weight": PAIR["lora_B.weight"]}
    pair = {layer + name: tensor for name, tensor in names.items()}
    odd = {"lora_unet_down_blocks_0_attentions_0_proj_in.alpha": torch.tensor(4.0)}
    save_file(pair | odd, tmp_path / "a.safetensors")
    said = converted(tmp_path / "a.safetensors")[1]
    assert "a LoRA for 1 layers" in said and "2 tensors used" in said
    assert "warning: 1 tensors, for layers with no change, were left out: lora_unet_down" in said
    assert strength(tmp_path / "out.flat.safetensors") == 2
