"""What convert_weights.py promises: small random models written by torch.save, safetensors and
save_pretrained become the flat files that they should. Files that mean harm are in test_hostile.py.
"""

import ast
import contextlib
import copy
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import convert_weights
import sd
from convert_weights import DIFFUSERS, ORIGINAL, ConversionError, convert
from tests.reference import (
    ALPHA,
    CONFIGS,
    RANK,
    ROOT,
    assert_same,
    cli,
    dotted_names,
    kohya_names,
    original_controlnet,
    original_names,
    quiet,
    reference_models,
    shake,
    state,
    their_name,
    write_folder,
)

# %% Names -----------------------------------------------------------------------------------------

VERSIONS = {"SD 1.x": (768, 12, [8] * 4), "SD 2.x": (1024, 23, [5, 10, 20, 20])}


@functools.cache
def full_size_models(version):
    """-> diffusers' and transformers' models at their own sizes, without weights."""
    width, layers, heads = VERSIONS[version]
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            cross_attention_dim=width, use_linear_projection=version == "SD 2.x",
            attention_head_dim=heads,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=width // 64,
            )
        )  # fmt: skip
    return {"vae": vae, "unet": unet, "text": text}


def full_size_specs(version, kind, layout, prefix=""):
    width, layers, heads = VERSIONS[version]
    networks = {
        "unet": sd.UNet([320, 640, 1280, 1280], heads, 32, width),
        "vae": sd.VAE([128, 256, 512, 512], 32),
        "text": sd.TextEncoder(width, layers, width // 64, "gelu", 49408),
    }
    part = convert_weights.Part(kind, {}, prefix, layout)
    return convert_weights.make_specs(kind, networks[kind].parameters(), part)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["unet", "vae", "text"])
def test_the_table_is_every_tensor_of_diffusers_models_with_its_shape(kind, version):
    specs = full_size_specs(version, kind, DIFFUSERS)
    truth = {n: tuple(t.shape) for n, t in state(full_size_models(version)[kind]).items()}
    found = {next(n for n in spec.names if n in truth): spec.shape for spec in specs}
    assert found == {n: s[:2] if s[2:] == (1, 1) else s for n, s in truth.items()}
    count = {"unet": 686, "vae": 248, "text": 4 + 16 * VERSIONS[version][1]}[kind]
    assert len(specs) == count == len({spec.flat for spec in specs})


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_the_original_layout_has_the_same_table(kind):
    models = full_size_models("SD 1.x")
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[kind]
    truth = original_names(models["vae"], models["unet"], models["text"])
    specs = full_size_specs("SD 1.x", kind, ORIGINAL, prefix)
    found = {next(n for n in spec.names if n in truth) for spec in specs}
    assert found == {name for name in truth if name.startswith(prefix)}


LAYERS = {  # each kind of layer in the flat file, and in diffusers' and transformers' models
    "unet.time1.bias": "time_embedding.linear_1.bias",
    "unet.time2.weight": "time_embedding.linear_2.weight",
    "unet.down.0.0.weight": "conv_in.weight",
    "unet.down.3.0.conv.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "unet.down.7.0.norm1.weight": "down_blocks.2.resnets.0.norm1.weight",
    "unet.down.7.0.conv1.weight": "down_blocks.2.resnets.0.conv1.weight",
    "unet.down.7.0.time.bias": "down_blocks.2.resnets.0.time_emb_proj.bias",
    "unet.down.7.0.norm2.bias": "down_blocks.2.resnets.0.norm2.bias",
    "unet.down.7.0.conv2.weight": "down_blocks.2.resnets.0.conv2.weight",
    "unet.down.7.0.shortcut.weight": "down_blocks.2.resnets.0.conv_shortcut.weight",
    "unet.down.4.1.norm.bias": "down_blocks.1.attentions.0.norm.bias",
    "unet.down.4.1.proj_in.weight": "down_blocks.1.attentions.0.proj_in.weight",
    **{
        f"unet.down.4.1.{ours}": f"down_blocks.1.attentions.0.transformer_blocks.0.{theirs}"
        for ours, theirs in {
            "norm1.weight": "norm1.weight",
            "attn1.to_k.weight": "attn1.to_k.weight",
            "norm2.weight": "norm2.weight",
            "attn2.to_q.weight": "attn2.to_q.weight",
            "attn2.to_v.weight": "attn2.to_v.weight",
            "attn2.to_out.bias": "attn2.to_out.0.bias",
            "norm3.bias": "norm3.bias",
            "ff_in.weight": "ff.net.0.proj.weight",
            "ff_out.weight": "ff.net.2.weight",
        }.items()
    },
    "unet.down.4.1.proj_out.bias": "down_blocks.1.attentions.0.proj_out.bias",
    "unet.middle.0.conv1.weight": "mid_block.resnets.0.conv1.weight",
    "unet.middle.2.conv1.weight": "mid_block.resnets.1.conv1.weight",
    "unet.up.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "unet.up.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
    "unet.up.11.0.shortcut.weight": "up_blocks.3.resnets.2.conv_shortcut.weight",
    "unet.up.11.1.attn1.to_q.weight": (
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q.weight"
    ),
    "unet.norm_out.weight": "conv_norm_out.weight",
    "unet.conv_out.weight": "conv_out.weight",
    "vae.encoder.0.weight": "encoder.conv_in.weight",
    "vae.encoder.5.conv2.weight": "encoder.down_blocks.1.resnets.1.conv2.weight",
    "vae.encoder.6.conv.weight": "encoder.down_blocks.1.downsamplers.0.conv.weight",
    "vae.encoder.13.norm.weight": "encoder.mid_block.attentions.0.group_norm.weight",
    "vae.encoder.13.attention.to_k.weight": "encoder.mid_block.attentions.0.to_k.weight",
    "vae.encoder.14.norm2.bias": "encoder.mid_block.resnets.1.norm2.bias",
    "vae.encoder_norm.bias": "encoder.conv_norm_out.bias",
    "vae.encoder_out.weight": "encoder.conv_out.weight",
    "vae.quant.weight": "quant_conv.weight",
    "vae.post_quant.weight": "post_quant_conv.weight",
    "vae.decoder.2.attention.to_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
    "vae.decoder.4.conv1.weight": "decoder.up_blocks.0.resnets.0.conv1.weight",
    "vae.decoder.11.conv.bias": "decoder.up_blocks.1.upsamplers.0.conv.bias",
    "vae.decoder.12.shortcut.weight": "decoder.up_blocks.2.resnets.0.conv_shortcut.weight",
    "vae.decoder.18.conv2.weight": "decoder.up_blocks.3.resnets.2.conv2.weight",
    "vae.decoder_out.bias": "decoder.conv_out.bias",
    "text_encoder.token_embedding.weight": "embeddings.token_embedding.weight",
    "text_encoder.position_embedding.weight": "embeddings.position_embedding.weight",
    "text_encoder.layers.1.norm1.weight": "encoder.layers.1.layer_norm1.weight",
    "text_encoder.layers.1.attention.to_v.weight": "encoder.layers.1.self_attn.v_proj.weight",
    "text_encoder.layers.1.attention.to_out.bias": "encoder.layers.1.self_attn.out_proj.bias",
    "text_encoder.layers.1.norm2.bias": "encoder.layers.1.layer_norm2.bias",
    "text_encoder.layers.1.fc1.weight": "encoder.layers.1.mlp.fc1.weight",
    "text_encoder.layers.1.fc2.weight": "encoder.layers.1.mlp.fc2.weight",
    "text_encoder.norm.bias": "final_layer_norm.bias",
}


@pytest.fixture(scope="module")
def their_weights(networks):
    """-> {network in the flat file: {name in diffusers' or transformers' model: tensor}}"""
    return dict(zip(("vae", "unet", "text_encoder"), map(state, networks)))


def flattened(tensor):
    """As the flat file has it: channels last, and a 1x1 convolution as the linear layer it is."""
    if tensor.ndim < 4:
        return tensor
    return tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_arrives_at_its_place(their_weights, flat, name):
    network = name.split(".")[0]
    assert torch.equal(flat[name], flattened(their_weights[network][LAYERS[name]]))


def test_every_tensor_arrives_at_its_place(their_weights, flat):
    found = {name: tensor for name, tensor in flat.items() if name != "tokenizer.merges"}
    truth = {name: flattened(their_weights[name.split(".")[0]][their_name(name)]) for name in found}
    assert_same(found, truth)
    assert len(found) == sum(map(len, their_weights.values()))


def test_the_merges_are_clips_48894_lines(flat):
    text = bytes(flat["tokenizer.merges"].numpy()).decode()
    assert text.startswith("i n\nt h\n") and text.endswith("\njeky ll</w>\n")
    assert text.count("\n") == 48894


# %% PyTorch's files -------------------------------------------------------------------------------

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class ModelCheckpoint:
    """A class as a dict's key, which Lightning's training files have."""


PREFIX = {
    "unet": "model.diffusion_model.",
    "text": "cond_stage_model.transformer.text_model.",
    "vae": "first_stage_model.",
}
DISTORTIONS = {  # a tensor, and how else a checkpoint may hold the same numbers
    "channels last": (
        PREFIX["unet"] + "input_blocks.1.0.in_layers.2.weight",
        lambda t: t.to(memory_format=torch.channels_last),
    ),
    "1 x 1 with strides of any kind": (
        PREFIX["unet"] + "middle_block.1.proj_in.weight",
        lambda t: t.to(memory_format=torch.channels_last),
    ),
    "transposed": (PREFIX["unet"] + "time_embed.0.weight", lambda t: t.t().contiguous().t()),
    "a Parameter": (PREFIX["unet"] + "time_embed.0.bias", torch.nn.Parameter),
    "an offset into a storage": (
        PREFIX["text"] + "embeddings.position_embedding.weight",
        lambda t: torch.cat([torch.zeros(3, 64), t, torch.zeros(5, 64)])[3:80],
    ),
    "every second row": (
        PREFIX["text"] + "final_layer_norm.weight",
        lambda t: torch.stack([t, torch.zeros(64)], dim=1)[:, 0],
    ),
    "float64": (PREFIX["vae"] + "quant_conv.weight", torch.Tensor.double),
}


@both_formats
@pytest.mark.parametrize("how", [*DISTORTIONS, "plain"])
def test_a_tensor_is_the_same_however_it_lies_in_the_checkpoint(
    tmp_path, weights, flat, run, how, zipped
):
    state = dict(weights)
    if how != "plain":
        name, distort = DISTORTIONS[how]
        state[name] = distort(state[name])
        assert torch.equal(state[name].float(), weights[name])
    torch.save(state, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    assert_same(run(tmp_path / "model.bin"), flat)


@both_formats
def test_a_training_checkpoint_is_read_and_nothing_in_it_loaded(
    tmp_path, weights, flat, run, zipped
):
    """With Lightning's other entries, and what is in a state_dict besides the model."""
    shared, big = torch.zeros(85, 64), torch.randn(3, 40, 64)
    name = PREFIX["text"] + "embeddings.position_embedding.weight"
    shared[3:80] = weights[name]
    state = (
        weights
        | {
            name: shared[3:80],  # a storage that
            "first_stage_model.loss.shared": shared[80:],  # another tensor uses, too
            "first_stage_model.loss.slice": big[1, ::2],
            PREFIX["text"] + "embeddings.position_ids": torch.arange(77)[None],
            "model_ema.decay": torch.tensor(0.999),
        }
    )
    top = {
        "epoch": 6, "global_step": 470000, "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.25)}},
        "lr_schedulers": [{}],
    }  # fmt: skip
    torch.save(top, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    assert_same(run(tmp_path / "model.bin"), flat)
    assert "ModelCheckpoint" in run.said and "which was not loaded" in run.said
    assert "3 not needed" not in run.said and "2 not needed (training losses)" in run.said


@both_formats
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_written_to_the_bit(tmp_path, weights, flat, run, dtype, zipped):
    state = {name: tensor.to(dtype) for name, tensor in weights.items()}
    torch.save(state, tmp_path / "half.pt", _use_new_zipfile_serialization=zipped)
    out = run(tmp_path / "half.pt", dtype=str(dtype).removeprefix("torch."))
    assert_same(out, {n: t if t.dtype == torch.uint8 else t.to(dtype) for n, t in flat.items()})


def test_bfloat16_rounds_as_torch_does_and_keeps_nan_a_nan():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.uint32([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800000])
    values = np.concatenate([bits, ties]).view(np.float32)
    ours = torch.from_numpy(convert_weights.cast(values, "bfloat16")).view(torch.bfloat16).float()
    truth = torch.from_numpy(values).bfloat16().float()
    assert torch.equal(ours.nan_to_num(7), truth.nan_to_num(7))
    assert torch.equal(ours.isnan(), torch.from_numpy(values).isnan())


def test_a_checkpoint_without_checksums_is_read(tmp_path, weights, flat, run):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "no_crc.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(run(tmp_path / "no_crc.ckpt"), flat)


def test_the_checkpoints_own_numbers_count(tmp_path, weights, run):
    config = {
        "name": "mine", "size": 128, "cfg": 2, "text": {"heads": 4},
        "unet": {"heads": [2, 2, 4, 4], "groups": 16},
        "vae": {"groups": 8, "scale": 0.5},
    }  # fmt: skip
    torch.save({"state_dict": weights, "sd_config": config}, tmp_path / "mine.ckpt")
    run(tmp_path / "mine.ckpt")
    assert run.config == {
        "kind": "model", "name": "mine", "size": 128, "cfg": 2, "prediction": "eps",
        "text": {
            "width": 64, "layers": 2, "heads": 4, "activation": "quick_gelu",
            "vocabulary": 49408, "pad": 49407,
        },
        "unet": {"widths": [64, 64, 128, 128], "heads": [2, 2, 4, 4],
                 "groups": 16, "context_width": 64},
        "vae": {"widths": [32, 32, 64, 64], "groups": 8, "scale": 0.5},
    }  # fmt: skip
    assert run.metadata["format"] == "sd.py 1" and run.metadata["source"] == "mine.ckpt"


# %% Original names, and what people made of them --------------------------------------------------

RENAMES = {
    "group_norm, query, key, value": [
        (".transformer.text_model.", ".transformer."),
        (".attn_1.norm.", ".attn_1.group_norm."), (".attn_1.q.", ".attn_1.query."),
        (".attn_1.k.", ".attn_1.key."), (".attn_1.v.", ".attn_1.value."),
        (".attn_1.proj_out.", ".attn_1.proj_attn."),
    ],
    "to_q, to_k, to_v": [
        (".attn_1.q.", ".attn_1.to_q."), (".attn_1.k.", ".attn_1.to_k."),
        (".attn_1.v.", ".attn_1.to_v."), (".attn_1.proj_out.", ".attn_1.to_out.0."),
    ],
}  # fmt: skip


@pytest.mark.parametrize("names", RENAMES)
def test_what_people_renamed_is_found(tmp_path, weights, flat, run, names):
    state = weights
    for old, new in RENAMES[names]:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    assert state.keys() != weights.keys()
    save_file(state, tmp_path / "renamed.safetensors")
    assert_same(run(tmp_path / "renamed.safetensors"), flat)


def test_linear_layers_for_1x1_convolutions_and_merged_position_ids_are_read(
    tmp_path, weights, flat, run
):
    state = {n: t[:, :, 0, 0] if t.shape[2:] == (1, 1) else t for n, t in weights.items()}
    state[PREFIX["text"] + "embeddings.position_ids"] = torch.arange(77.0)[None].half()
    name = PREFIX["unet"] + "out.2.weight"
    state[name] = state[name].double()
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "merged.safetensors")
    assert_same(run(tmp_path / "merged.safetensors"), flat)
    assert "1 not needed (position numbers)" in run.said


@pytest.fixture(scope="module")
def averaged(weights):
    """The UNet's averaged copies (EMA), here twice the weights, under their names without dots."""
    return {
        "model_ema." + name.removeprefix("model.").replace(".", ""): 2 * tensor
        for name, tensor in weights.items()
        if name.startswith(PREFIX["unet"])
    }


def test_raw_weights_are_taken_where_there_are_averaged_ones_too(
    tmp_path, weights, averaged, flat, run
):
    save_file(weights | averaged, tmp_path / "both.safetensors")
    assert_same(run(tmp_path / "both.safetensors"), flat)
    assert f"{len(averaged)} not needed (averaged copies (EMA))" in run.said
    assert "raw ones, as the original loads them (use_ema: False)" in run.said


def test_averaged_weights_are_taken_if_there_are_no_others(tmp_path, weights, averaged, flat, run):
    rest = {n: t for n, t in weights.items() if not n.startswith(PREFIX["unet"])}
    save_file(rest | averaged, tmp_path / "only.safetensors")
    doubled = {n: 2 * t if n.startswith("unet.") else t for n, t in flat.items()}
    assert_same(run(tmp_path / "only.safetensors"), doubled)
    assert "unknown" not in run.said and "averaged ones" in run.said


def test_every_tensor_is_accounted_for(tmp_path, weights, run):
    state = weights | {
        "betas": torch.zeros(1000, dtype=torch.float64),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "somebody.new\x1b[31m": torch.zeros(3), "sqrt_alphas_cumprod": torch.zeros(1000),
    }  # fmt: skip
    save_file(state, tmp_path / "extra.safetensors")
    run(tmp_path / "extra.safetensors")
    assert (
        f"{len(weights)} tensors used, 2 not needed (noise schedule), 1 not needed (training"
        in run.said
    )
    assert "1 tensors are unknown and were left out: somebody.new\\x1b[31m" in run.said


def scaled_linear(dtype, zero_snr=False):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    if zero_snr:
        alphas[-1] = 0
    return alphas.to(dtype)


@pytest.mark.parametrize(
    "alphas, differs",
    [
        (scaled_linear(torch.float16), False),
        (scaled_linear(torch.bfloat16), False),
        (scaled_linear(torch.float32, zero_snr=True), True),
    ],
    ids=["float16", "bfloat16", "zero SNR"],
)
def test_another_noise_schedule_is_noticed_and_half_precision_is_not_one(
    tmp_path, weights, run, alphas, differs
):
    save_file(weights | {"alphas_cumprod": alphas}, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors")
    assert ("another noise schedule" in run.said) == differs


# %% SD 2.x ----------------------------------------------------------------------------------------


def test_sd2_gets_its_numbers_its_23_layers_and_q_k_v_apart(tmp_path, networks_v2, weights_v2, run):
    _, unet, text = networks_v2
    save_file(weights_v2, tmp_path / "v2.safetensors")
    out = run(tmp_path / "v2.safetensors")
    assert run.config["name"] == "Stable Diffusion 2.x"
    assert run.config["text"]["layers"] == 23 and run.config["text"]["pad"] == 0
    assert run.config["text"]["activation"] == "gelu" and run.config["text"]["heads"] == 1
    assert run.config["unet"]["heads"] == [1, 1, 2, 2]
    theirs = state(text)
    for x in "qkv":
        for leaf in ("weight", "bias"):
            truth = theirs[f"encoder.layers.22.self_attn.{x}_proj.{leaf}"]
            assert torch.equal(out[f"text_encoder.layers.22.attention.to_{x}.{leaf}"], truth)
    assert "text_encoder.layers.23.fc1.weight" not in out
    truth = unet.up_blocks[1].attentions[0].proj_in.weight
    assert torch.equal(out["unet.up.3.1.proj_in.weight"], truth)
    assert "14 not needed (the text encoder's unread end)" in run.said and "unknown" not in run.said


YAML_V = 'model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n'
YAML = "model:\n  params:\n    linear_start: 0.00085\n"


@pytest.mark.parametrize(
    "scale, yaml, asked, prediction, why",
    [
        (1.0, None, None, "v", "a guess"),
        (0.99, None, None, "eps", "a guess"),  # 0.0896, just below; a sample's would be 0.0903
        (0.99, YAML_V, None, "v", "v2.yaml beside it says so"),
        (1.0, YAML, None, "eps", "v2.yaml beside it does not say v"),
        (1.0, YAML, "v", "v", "--prediction"),
        (1.0, YAML_V, "eps", "eps", "--prediction"),
    ],
)
def test_sd2_predictions_are_decided_by_option_then_yaml_then_deviation(
    tmp_path, weights_v2, run, scale, yaml, asked, prediction, why
):
    path = tmp_path / "v2.safetensors"
    biases = torch.tensor([-1.0, 1.0] * 32) * 0.0905  # population 0.0905, of a sample 0.0912
    name = PREFIX["unet"] + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    save_file(weights_v2 | {name: scale * biases}, path)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    run(path, prediction=asked)
    size = 768 if prediction == "v" else 512
    assert (run.config["prediction"], run.config["size"]) == (prediction, size)
    assert why in run.said and why in run.metadata["notes"]


# %% diffusers folders -----------------------------------------------------------------------------


def test_a_diffusers_folder_gives_the_same_file_as_the_original_layout(folder, flat, run):
    assert_same(run(folder), flat)
    assert run.config["unet"]["heads"] == [8] * 4 and run.config["size"] == 512
    assert run.config["text"]["heads"] == 1 and run.config["text"]["activation"] == "quick_gelu"
    assert run.config["name"] == "Stable Diffusion 1.x" and run.config["prediction"] == "eps"


def test_shards_are_put_together(tmp_path, networks, flat, run):
    path = write_folder(tmp_path / "sharded", networks, max_shard_size="6MB")
    assert len(list((path / "unet").glob("*.safetensors"))) > 1
    assert len(list((path / "text_encoder").glob("*.safetensors"))) > 1
    assert_same(run(path), flat)


@pytest.fixture(scope="module")
def bin_folder(networks, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("bin") / "bin", networks, safe_serialization=False)


def test_bin_files_and_their_old_names_are_read(tmp_path, bin_folder, flat, run):
    path = shutil.copytree(bin_folder, tmp_path / "bin")
    text = load_file(path / "text_encoder" / "model.safetensors")
    text = {"text_model." + n.removeprefix("text_model."): t for n, t in text.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(text, path / "text_encoder" / "pytorch_model.bin")
    (path / "text_encoder" / "model.safetensors").unlink()
    vae = torch.load(path / "vae" / "diffusion_pytorch_model.bin")
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in new_to_old.items():
        new, old = f"attentions.0.{new}.", f"attentions.0.{old}."
        vae = {name.replace(new, old): tensor for name, tensor in vae.items()}
    torch.save(vae, path / "vae" / "diffusion_pytorch_model.bin")
    assert_same(run(path), flat)


@pytest.mark.parametrize("full_precision", [True, False])
def test_full_precision_comes_before_half(tmp_path, bin_folder, flat, run, full_precision):
    path = shutil.copytree(bin_folder, tmp_path / "bin")
    weights = path / "unet" / "diffusion_pytorch_model.bin"
    half = {name: tensor.half() for name, tensor in torch.load(weights).items()}
    save_file(half, path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    if full_precision:
        assert_same(run(path), flat)
    else:
        weights.unlink()
        bias = flat["unet.norm_out.bias"]
        assert not torch.equal(bias, bias.half().float())
        assert torch.equal(run(path)["unet.norm_out.bias"], bias.half().float())


def test_an_sd2_folder_and_the_sd2_file_are_the_same(tmp_path, networks_v2, weights_v2, run):
    vae, unet, text = networks_v2
    text = copy.deepcopy(text)
    encoder = text.encoder if hasattr(text, "encoder") else text.text_model.encoder
    encoder.layers = encoder.layers[:23]
    text.config.num_hidden_layers = 23
    path = write_folder(tmp_path / "v2", (vae, unet, text), prediction="v_prediction")
    out, config = run(path), run.config
    save_file(weights_v2, tmp_path / "v2.safetensors")
    assert_same(run(tmp_path / "v2.safetensors", prediction="v"), out)
    assert config | {"size": 768} == run.config and config["size"] == 512  # sample_size was 64


@pytest.fixture(scope="module")
def half_folder(networks, tmp_path_factory):
    """A folder of a few megabytes, to be spoiled in copies."""
    half = [copy.deepcopy(network).half() for network in networks]
    return write_folder(tmp_path_factory.mktemp("half") / "half", half)


@pytest.fixture
def changed_folder(half_folder, tmp_path):
    """The folder again, with other fields in one of its JSON files; None takes a field out."""

    def change(file, fields):
        path = shutil.copytree(half_folder, tmp_path / "folder", copy_function=os.link)
        config = json.loads((path / file).read_text()) | fields
        config = {name: value for name, value in config.items() if value is not MISSING}
        (path / file).unlink()  # the copy is the same file under a second name
        (path / file).write_text(json.dumps(config))
        return path

    return change


MISSING = object()
UNET, VAE, TEXT, SCHEDULER = (
    "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip


@pytest.mark.parametrize(
    "file, field, value, says",
    [
        (UNET, "class_embed_type", "projection", "projection"),
        (UNET, "only_cross_attention", [True, True, True, False], "[True, True, True, False]"),
        (UNET, "transformer_layers_per_block", [1, 2, 10, 1], "[1, 2, 10, 1]"),
        (UNET, "in_channels", 8, "in_channels is 8, expected 4 or 9"),
        (UNET, "time_cond_proj_dim", 256, "256"),
        (UNET, "attention_head_dim", 7, "'heads': [7, 7, 7, 7]"),
        (UNET, "norm_num_groups", "x", "groups in unet in the folder's config files is a str"),
        (VAE, "latent_channels", 16, "16"),
        (VAE, "_class_name", "AutoencoderTiny", "AutoencoderTiny"),
        (VAE, "scaling_factor", 0, "vae.scale must be 0 to a million, got 0"),
        # A field that is not there has its class's default.
        (VAE, "layers_per_block", MISSING, "layers_per_block is 1, expected 2"),
        (VAE, "down_block_types", MISSING, "down_block_types is ['DownEncoderBlock2D'], expected"),
        (VAE, "up_block_types", MISSING, "up_block_types is ['UpDecoderBlock2D'], expected"),
        (SCHEDULER, "beta_start", MISSING, "beta_start is 0.0001, expected 0.00085"),
        (SCHEDULER, "beta_schedule", MISSING, "beta_schedule is linear"),
        (TEXT, "model_type", "bert", "bert"),
        (TEXT, "hidden_act", "relu", "text.activation"),
        (SCHEDULER, "beta_schedule", "linear", "expected scaled_linear"),
        (SCHEDULER, "prediction_type", "sample", "expected epsilon or v_prediction"),
        (SCHEDULER, "prediction_type", None, "None"),
        ("model_index.json", "_class_name", "StableDiffusionXLPipeline", "StableDiffusionXL"),
    ],
)
def test_a_folder_that_says_it_is_something_else_is_refused_by_field_and_value(
    changed_folder, refused, file, field, value, says
):
    path = changed_folder(file, {field: value})
    message = refused(path, says)
    assert field in message or says in message


def test_a_field_that_is_not_there_has_its_default_where_that_is_right(changed_folder, run):
    path = changed_folder(UNET, {"act_fn": MISSING, "norm_eps": MISSING, "attention_type": MISSING})
    run(path)
    assert run.config["unet"]["heads"] == [8] * 4


def lose(path, part):
    shutil.rmtree(path / part)
    return path


def lose_weights(path, part):
    (path / part / "diffusion_pytorch_model.safetensors").unlink()
    return path


def lose_all(path, part):
    (path / part / "empty").mkdir()
    return path / part / "empty"


@pytest.mark.parametrize(
    "lack, part, says",
    [
        (lose, "unet", "no unet folder"),
        (lose, "text_encoder", "no text_encoder folder"),
        (lose, "vae", "has no VAE"),
        (lose_weights, "unet", "has no weights"),
        (lose_weights, "vae", "download"),
        (lambda path, part: path / part, "unet", "one part of a model (UNet2DConditionModel)"),
        (lose_all, "unet", "no unet folder"),
    ],
)
def test_a_folder_says_which_part_it_lacks(changed_folder, refused, lack, part, says):
    refused(lack(changed_folder("model_index.json", {}), part), says)


# %% The Hugging Face hub --------------------------------------------------------------------------


@contextlib.contextmanager
def local_hub(repositories):
    """A hub on this machine; -> its address, what was asked.

    repositories: {"org/name" or "org/name@revision": {file: its path; None: only listed}}, or in
    place of the files "gated" or "private".
    """
    asked, names = [], {}
    for key in repositories:
        name, _, revision = key.partition("@")
        sha = hashlib.sha1(key.encode()).hexdigest()
        names |= {(name, revision or "main"): (key, sha), (name, sha): (key, sha)}

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, body, **headers):
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def refuse(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self):
            path = urllib.parse.unquote(self.path.split("?")[0])
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(tree|revision)/(.+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name, revision = api.group(1, 3) if api else file.group(1, 2)
            key, sha = names.get((name, revision or "main"), ("", ""))
            files = repositories.get(key, "missing")
            if files == "gated" and file:
                self.refuse(403, "GatedRepo")
            elif files == "private":
                self.refuse(401, "RepoNotFound")
            elif files == "missing":
                known = any(each == name for each, _ in names)
                self.refuse(404, "RevisionNotFound" if known else "RepoNotFound")
            elif api:
                listed = ["a.safetensors"] if files == "gated" else list(files)
                tree = [{"type": "file", "path": f, "size": 1, "oid": "b" * 40} for f in listed]
                info = {"id": name, "sha": sha, "siblings": [{"rfilename": f} for f in listed]}
                body = json.dumps(tree if api[2] == "tree" else info).encode()
                self.answer(body, Content_Type="application/json")
            else:
                asked.append(file[3])
                body = files[file[3]].read_bytes()
                self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=sha)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}, asked
        server.shutdown()


def files_of(folder):
    """-> {its name: its path} of each file in a folder, for local_hub"""
    return {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def hub(folder):
    """A hub on this machine with the one repository org/name; -> its address, what was asked."""
    more = ["unet/flax_model.msgpack", "unet/diffusion_pytorch_model.fp16.bin", "README.md"]
    with local_hub({"org/name": files_of(folder) | dict.fromkeys(more)}) as there:
        yield there


@pytest.fixture
def convert_from_hub(hub, tmp_path):
    """The command line in a process of its own: huggingface_hub reads its address only once."""

    def convert_from_hub(name, offline="0"):
        env = os.environ | hub[0] | {"HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "hf")}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        options = ("--dtype", "float32")
        return cli(name, *options, cwd=tmp_path, script="convert_weights.py", env=env)

    return convert_from_hub


def test_a_name_on_the_hub_is_fetched_and_converted(hub, convert_from_hub, flat, tmp_path):
    done, (_, asked) = convert_from_hub("org/name"), hub
    assert done.returncode == 0, done.stderr
    assert_same(load_file(tmp_path / "name.flat.safetensors"), flat)
    assert "README.md" not in asked and not any("flax" in f or "fp16" in f for f in asked)
    asked.clear()
    (tmp_path / "name.flat.safetensors").unlink()
    done = convert_from_hub("org/name", offline="1")  # what was fetched before is enough
    assert done.returncode == 0 and not asked and "is not reached" in done.stdout
    assert_same(load_file(tmp_path / "name.flat.safetensors"), flat)


def test_a_name_that_the_hub_does_not_know_gets_one_message(convert_from_hub):
    done = convert_from_hub("org/other")
    assert done.returncode == 2 and "org/other was not fetched" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_hub_that_can_not_be_reached_gets_one_message(refused, monkeypatch):
    class OfItsOwn(Exception):
        """httpx's errors are no OSErrors."""

    def fails(name, revision, timeout):
        raise OfItsOwn("Name or service not known\nand more")

    monkeypatch.setattr("huggingface_hub.model_info", fails)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")
    refused("org/name", "org/name was not fetched", "not known")


def test_without_the_hubs_package_it_says_what_to_fetch(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(
        "org/name", "pip install", "model_index.json", "unet/*", "https://huggingface.co/org/name"
    )


@pytest.mark.parametrize(
    "there, chosen",
    [
        (["a.safetensors", "a.bin", "a.fp16.bin"], ["a.safetensors"]),
        (["a.safetensors", "a.fp16.safetensors"], ["a.fp16.safetensors"]),
        (["a.bin", "a.fp16.bin", "a.msgpack"], ["a.fp16.bin"]),
        (
            ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors",
             "a.safetensors.index.json", "a.bin"],
            ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors",
             "a.safetensors.index.json"],
        ),
        (["b.safetensors"], []),
    ],
)  # fmt: skip
def test_the_smallest_complete_form_of_the_weights_is_fetched(there, chosen):
    from sd_more.formats.hub import choose_weights

    there = [f"unet/{name}" for name in there]
    found = choose_weights(there, "unet", ("a.safetensors", "a.bin"))
    assert found == [f"unet/{name}" for name in chosen]


# %% --vae -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_sources(tmp_path_factory, folder, weights, networks):
    """The same VAE in all forms that --vae takes, and a model without one."""
    path = tmp_path_factory.mktemp("vae")
    vae = {
        n.removeprefix(PREFIX["vae"]): t for n, t in weights.items() if n.startswith(PREFIX["vae"])
    }
    rest = {n: t for n, t in weights.items() if not n.startswith(PREFIX["vae"])}
    save_file(rest, path / "no_vae.safetensors")
    torch.save({"state_dict": vae | {"loss.x": torch.zeros(2)}}, path / "vae.pt")
    save_file(networks[0].state_dict(), path / "vae.safetensors")
    torch.save(weights, path / "full.ckpt")
    shutil.copytree(folder, path / "folder", copy_function=os.link)
    return path


@pytest.mark.parametrize("vae", ["vae.pt", "vae.safetensors", "full.ckpt", "folder", "folder/vae"])
def test_a_vae_can_come_from_anywhere(vae_sources, flat, run, vae):
    assert_same(run(vae_sources / "no_vae.safetensors", vae=vae_sources / vae), flat)


def test_another_vae_takes_the_models_place(tmp_path, vae_sources, weights, flat, run):
    save_file({n: 2 * t for n, t in weights.items()}, tmp_path / "doubled.safetensors")
    out = run(tmp_path / "doubled.safetensors", vae=vae_sources / "vae.pt")
    merges = flat["tokenizer.merges"]
    doubled = {n: t if n.startswith("vae.") else 2 * t for n, t in flat.items()}
    assert_same(out, doubled | {"tokenizer.merges": merges})
    count = sum(name.startswith("vae.") for name in flat)
    assert f"{count} not needed (the VAE that --vae replaces)" in run.said


@pytest.mark.parametrize(
    "source, vae, says",
    [
        ("no_vae.safetensors", None, ["has no VAE", "--vae"]),
        ("no_vae.safetensors", "no_vae.safetensors", ["no VAE in"]),
        ("full.ckpt", "nothing.pt", ["does not exist"]),
    ],
)
def test_what_is_no_vae_and_what_has_none_is_said(vae_sources, refused, source, vae, says):
    refused(vae_sources / source, *says, options=["--vae", vae_sources / vae] if vae else [])


# %% What is not a Stable Diffusion ----------------------------------------------------------------

OTHERS = (  # names of tensors and their shapes, and what the message calls such a file
    ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "LoRA"),
    ({"unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight": (4, 320)}, "LoRA"),
    ({"base_model.model.down.to_q.lora_A.default.weight": (4, 320)}, "LoRA"),
    ({"unet:0": (4, 320)}, "LoRA without names"),
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "textual inversion of SDXL"),
    (
        {"control_model.zero_convs.0.0.weight": (3,), "model.diffusion_model.out.0.bias": (3,)},
        "ControlNet",
    ),
    ({"zero_convs.0.0.weight": (3,)}, "ControlNet"),
    ({"controlnet_down_blocks.0.weight": (3,)}, "ControlNet"),
    ({"concept_embeds": (17, 768)}, "safety checker"),
    ({"down_blocks.0.resnets.0.conv1.weight": (3,)}, "UNet alone"),
    ({"text_model.embeddings.token_embedding.weight": (3,)}, "text encoder alone"),
    ({"conditioner.embedders.1.model.ln_final.weight": (1280,)}, "Stable Diffusion XL"),
    ({"conditioner.embedders.0.model.transformer.resblocks.31.ln_1.bias": (3,)}, "refiner"),
    ({"model.diffusion_model.joint_blocks.0.x_block.bias": (3,)}, "SD 3"),
    ({"double_blocks.0.img_attn.bias": (3,)}, "Flux"),
    ({"model.diffusion_model.time_stack.0.bias": (3,)}, "video model"),
    ({"model.diffusion_model.label_emb.weight": (1000, 4)}, "upscaler"),
    ({"model.diffusion_model.label_emb.0.0.weight": (3,)}, "unCLIP"),
    ({"depth_model.model.bias": (3,)}, "depth-to-image"),
    (
        {"model.diffusion_model.input_blocks.0.0.weight": (32, 8, 3, 3)},
        "instruct-pix2pix (a UNet of 8 channels)",
    ),
    ({"model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3)}, "no text encoder"),
    ({"fc.weight": (3,)}, "no Stable Diffusion. Of its 1 tensors the first are: fc.weight"),
    ({"fc": ()}, "no Stable Diffusion"),
    ({}, "0 tensors"),
)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("names, says", OTHERS, ids=[says for _, says in OTHERS])
def test_other_files_are_called_by_their_name(tmp_path, refused, names, says, ending):
    tensors = {name: torch.zeros(shape) for name, shape in names.items()}
    path = tmp_path / f"other.{ending}"
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    refused(path, says)


def test_missing_and_misshapen_tensors_are_named(tmp_path, weights, refused):
    state = dict(weights)
    del state["model.diffusion_model.middle_block.1.norm.bias"]
    state["model.diffusion_model.out.0.bias"] = torch.zeros(63)
    state["model.diffusion_model.out.0.weight"] = torch.zeros(64, dtype=torch.int32)
    save_file(state, tmp_path / "broken.safetensors")
    refused(
        tmp_path / "broken.safetensors", "1 of", "tensors are missing, 2 are not as expected",
        "middle_block.1.norm.bias is missing", "out.0.bias is (63,), expected (64,)",
        "type I32",
    )  # fmt: skip


def test_a_channels_last_checkpoint_is_refused_by_its_shapes(tmp_path, weights, refused):
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    nhwc = weights[name].permute(0, 2, 3, 1).contiguous()
    save_file(weights | {name: nhwc}, tmp_path / "nhwc.safetensors")
    refused(tmp_path / "nhwc.safetensors", "(64, 3, 3, 64), expected (64, 64, 3, 3)")


@pytest.mark.parametrize(
    "number, says",
    [(1e5, ["unet.norm_out.bias", "--dtype bfloat16"]), (float("nan"), ["unet.norm_out.bias"])],
)
def test_numbers_that_float16_cannot_hold_are_not_written(tmp_path, weights, refused, number, says):
    state = weights | {"model.diffusion_model.out.0.bias": torch.full((64,), number)}
    save_file(state, tmp_path / "large.safetensors")
    refused(tmp_path / "large.safetensors", *says)


def test_large_numbers_are_written_as_bfloat16(tmp_path, weights, run):
    state = weights | {"model.diffusion_model.out.0.bias": torch.full((64,), 1e5)}
    save_file(state, tmp_path / "large.safetensors")
    assert run(tmp_path / "large.safetensors", dtype="bfloat16")["unet.norm_out.bias"][0] > 9e4


# %% LoRAs -----------------------------------------------------------------------------------------

LATER = "lora_linear_layer.up", "lora_linear_layer.down"
SPELLINGS = {
    "te1": lambda lora: kohya_names(lora, "lora_te1"),
    "diffusers": lambda lora: dotted_names(lora, ("lora.up", "lora.down"), LATER),
    "peft": lambda lora: dotted_names(lora, ("lora_B", "lora_A"), ("lora_B", "lora_A")),
    "adapter": lambda lora: dotted_names(
        lora, ("lora_B.default", "lora_A.default"), ("lora_B", "lora_A")
    ),
}


@pytest.fixture(scope="module")
def flat_lora(lora, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    save_file(kohya_names(lora), path)
    return load_file(convert(path, dtype="float32", log=quiet))


def test_a_lora_becomes_a_flat_file(lora, run, flat_lora, tmp_path):
    save_file(kohya_names(lora), tmp_path / "kohya.safetensors")
    assert_same(run(tmp_path / "kohya.safetensors"), flat_lora)
    assert run.config == {"kind": "lora"} and len(flat_lora) == 2 * len(lora)
    assert f"{len(lora)} layers" in run.said
    for (network, layer), (up, down) in lora.items():  # alpha is put into up
        if (network, layer) == ("unet", "mid_block.attentions.0.proj_in"):
            ours = flat_lora["unet.middle.1.proj_in.up"], flat_lora["unet.middle.1.proj_in.down"]
            assert torch.allclose(ours[0], up * ALPHA / RANK, rtol=1e-6)
            assert torch.equal(ours[1], down.reshape(ours[1].shape))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_a_lora_are_the_same_flat_file(lora, run, flat_lora, tmp_path, spelling):
    save_file(SPELLINGS[spelling](lora), tmp_path / "other.safetensors")
    other = run(tmp_path / "other.safetensors")
    factor = 1 if spelling == "te1" else ALPHA / RANK  # the others tell no alpha, so it is the rank
    assert other.keys() == flat_lora.keys()
    for name, tensor in other.items():
        tensor = tensor * factor if name.endswith(".up") else tensor
        assert torch.allclose(tensor, flat_lora[name], rtol=1e-6), name


@pytest.mark.parametrize("place", ["metadata", "file beside"])
@pytest.mark.parametrize("times", [1, 3])
def test_each_network_of_a_peft_lora_has_an_alpha_of_its_own(
    lora, run, flat_lora, tmp_path, times, place
):
    told = {"unet.r": RANK, "unet.lora_alpha": ALPHA}
    told |= {"text_encoder.r": RANK, "text_encoder.lora_alpha": times * ALPHA}
    metadata = None
    if place == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps(told)}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    path = tmp_path / "adapter_model.safetensors"
    save_file(SPELLINGS["peft"](lora), path, metadata=metadata)
    for name, tensor in run(path).items():
        text = name.startswith("text_encoder.") and name.endswith(".up")
        assert torch.allclose(tensor, flat_lora[name] * (times if text else 1), rtol=1e-6), name


def test_a_rank_stabilised_lora_is_scaled_by_the_root_of_its_rank(lora, run, flat_lora, tmp_path):
    told = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": True}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    save_file(SPELLINGS["peft"](lora), tmp_path / "rs.safetensors", metadata=metadata)
    for name, tensor in run(tmp_path / "rs.safetensors").items():
        factor = RANK**0.5 if name.endswith(".up") else 1
        assert torch.allclose(tensor, flat_lora[name] * factor, rtol=1e-6), name


def test_diffusers_first_loras_are_read(lora, run, flat_lora, tmp_path):
    """Those that were attention processors."""
    ends, old = ("to_q", "to_k", "to_v", "to_out.0"), {}
    for (_, layer), (up, down) in lora.items():
        if layer.endswith(ends):
            place, _, which = layer.removesuffix(".0").rpartition(".")
            name = f"{place}.processor.{which}_lora"
            old[f"{name}.up.weight"] = up * ALPHA / RANK
            old[f"{name}.down.weight"] = down.clone()
    save_file(old, tmp_path / "old.safetensors")
    found = run(tmp_path / "old.safetensors")
    assert len(found) == len(old) > 0
    for name, tensor in found.items():
        assert torch.allclose(tensor, flat_lora[name], rtol=1e-6), name


def test_a_lora_with_the_originals_names_is_read(lora, run, flat_lora, tmp_path):
    """kohya's, with the names of CompVis' UNet."""
    theirs, ours = "down_blocks_0_attentions_1_", "input_blocks_2_1_"
    compvis = {n.replace(theirs, ours): t for n, t in kohya_names(lora).items() if theirs in n}
    save_file(compvis, tmp_path / "compvis.safetensors")
    found = run(tmp_path / "compvis.safetensors")
    assert len(found) == len(compvis) * 2 // 3 > 0
    for name, tensor in found.items():
        assert torch.equal(tensor, flat_lora[name]) and ".2.1." in name


@pytest.mark.parametrize(
    "shapes, says",
    [
        ({"lora_unet_a_b.lora_up": 4, "lora_unet_a_b.lora_down": 4}, ["another model", "a_b"]),
        ({"lora_unet_time_embedding_linear_1.lora_up": 4}, ["only up"]),
        ({"lora_te2_text_model_x.lora_up": 4}, ["SDXL"]),
        ({"lora_unet_conv_in.hada_w1_a": 4}, ["LoHa"]),
        ({"lora_unet_conv_in.dora_scale": 4}, ["DoRA"]),
        ({"lora_unet_conv_in.lora_up": 3, "lora_unet_conv_in.lora_down": 4},
         ["do not go together", "(4, 3)"]),
        ({"lora_unet_conv_in.lora_up": 4, "lora_unet_conv_in.lora_mid": 4,
          "lora_unet_conv_in.lora_down": 4}, ["do not go together", "middle is (4, 4)"]),
    ],
    ids=["another model", "up alone", "SDXL", "LoHa", "DoRA", "ranks", "middle"],
)  # fmt: skip
def test_a_lora_that_does_not_add_up_is_refused(shapes, says, tmp_path, refused):
    tensors = {f"{name}.weight": torch.ones(4, width) for name, width in shapes.items()}
    save_file(tensors, tmp_path / "bad.safetensors")
    refused(tmp_path / "bad.safetensors", *says)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "JSON"), ("[1]", "JSON"), ('{"alpha_pattern": {"a": 1}}', "LoRA"),
        ('{"r": 4, "lora_alpha": 1e9}', "alpha 1e+09"),
    ],
)  # fmt: skip
def test_a_lora_with_an_odd_config_is_refused(lora, text, says, tmp_path, refused):
    metadata = {"lora_adapter_metadata": text}
    save_file(SPELLINGS["peft"](lora), tmp_path / "bad.safetensors", metadata=metadata)
    refused(tmp_path / "bad.safetensors", says)


def test_a_lora_of_rank_nothing_is_refused(lora, tmp_path, refused):
    tensors = kohya_names(dict(list(lora.items())[:1]))
    tensors = {name: t[:0] if t.ndim else torch.ones(0) for name, t in tensors.items()}
    save_file(tensors, tmp_path / "empty.safetensors")
    refused(tmp_path / "empty.safetensors", "alpha")


# %% Textual inversions, ControlNets ---------------------------------------------------------------

VECTORS = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
PARAMETERS = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "my"}


@pytest.mark.parametrize(
    "name, save, content",
    [
        ("<my-cat>.pt", torch.save, PARAMETERS),
        ("learned_embeds.bin", torch.save, {"<my-cat>": VECTORS}),
        ("learned.safetensors", save_file, {"<my-cat>": VECTORS}),
        ("<my-cat>.safetensors", save_file, {"emb_params": VECTORS}),
    ],
)
def test_all_forms_of_a_textual_inversion_are_the_same_flat_file(
    tmp_path, run, name, save, content
):
    save(content, tmp_path / name)
    assert_same(run(tmp_path / name), {"<my-cat>": VECTORS})
    assert run.config == {"kind": "words"} and run.metadata["format"] == "sd.py 1"
    assert "a textual inversion: <my-cat>, 2 vectors" in run.said


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(76, 40), torch.ones(0, 40), torch.ones(2, 40).int(), torch.ones(1, 2, 40)],
    ids=["76 vectors", "none", "whole numbers", "three axes"],
)
def test_an_odd_textual_inversion_is_refused(tmp_path, refused, tensor):
    save_file({"emb_params": tensor}, tmp_path / "cat.safetensors")
    refused(tmp_path / "cat.safetensors", "expected 1 to 75 vectors")


@pytest.fixture(scope="module")
def flat_network(controlnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("control") / "folder"
    controlnet.save_pretrained(path)
    return load_file(convert(path, dtype="float32", log=quiet))


@pytest.mark.parametrize("kind", ["folder", "control.pth", "shuffle.pth"])
def test_all_forms_of_a_controlnet_are_the_same_flat_file(
    controlnet, flat_network, run, tmp_path, kind
):
    names = original_controlnet(controlnet)
    if kind == "shuffle.pth":  # without the prefix; and its name says that it pools
        names = {name.removeprefix("control_model."): t.contiguous() for name, t in names.items()}
    if kind == "folder":
        controlnet.save_pretrained(tmp_path / kind)
    else:
        numbers = {"unet": {"heads": [2] * 4, "groups": 16}}
        torch.save({"state_dict": names, "sd_config": numbers}, tmp_path / kind)
    assert_same(run(tmp_path / kind), flat_network)
    assert run.config == {
        "kind": "controlnet",
        "unet": {"widths": [64] * 4, "heads": [2] * 4, "groups": 16, "context_width": 40},
        "pool": kind == "shuffle.pth",
    }


@pytest.mark.parametrize(
    "numbers, says",
    [
        ({"heads": [3] * 4}, "heads"),
        ({"groups": "x"}, "groups"),
        ({"haeds": 1}, "haeds"),
    ],
)
def test_a_controlnet_whose_numbers_do_not_fit_is_refused(
    controlnet, tmp_path, refused, numbers, says
):
    content = {"state_dict": original_controlnet(controlnet), "sd_config": {"unet": numbers}}
    torch.save(content, tmp_path / "control.pth")
    refused(tmp_path / "control.pth", says)


@pytest.mark.parametrize("options", [("--prediction", "v"), ("--vae", "cat.safetensors")])
def test_options_for_models_are_refused_for_other_kinds(tmp_path, refused, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    save_file({"emb_params": VECTORS}, tmp_path / "cat.safetensors")
    refused(tmp_path / "cat.safetensors", "no whole model", options=options)


# %% The command line, and the cache ---------------------------------------------------------------


@pytest.fixture
def source(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "options, says",
    [
        (["-o", "model.safetensors"], "is what is being converted"),
        (["-o", "no/out"], "folder that does not exist"),
        (["-o", "."], "is a folder"),
        (["--vae", "vae.pt"], "does not exist"),
        (["--dtype", "float8"], "float8"),
        (["--prediction", "x0"], "x0"),
    ],
)
def test_the_command_line_ends_in_one_message(source, monkeypatch, capsys, options, says):
    monkeypatch.chdir(source.parent)
    with pytest.raises(SystemExit) as stop:
        convert_weights.main([source.name, *options])
    assert stop.value.code == 2 and says in capsys.readouterr().err
    assert [file.name for file in source.parent.iterdir()] == [source.name]


@pytest.mark.parametrize("name, says", [("none.ckpt", "does not exist"), (None, "is not a file")])
def test_a_source_that_is_no_file_gets_one_message(tmp_path, refused, name, says):
    refused(tmp_path / name if name else "/dev/null", says)


@pytest.mark.parametrize("option", [{"dtype": "float8"}, {"prediction": "x0"}])
def test_options_of_the_function_are_checked(source, option):
    with pytest.raises(ConversionError, match="float8|x0"):
        convert(source, **option)


def test_errors_are_those_of_sd_py():
    assert issubclass(ConversionError, sd.SDError)


def test_the_command_line_writes_beside_the_source(source, refused, capsys):
    convert_weights.main([str(source)])
    flat = source.with_name("model.flat.safetensors")
    with safe_open(flat, "np") as file:
        assert "unet.time1.bias" in list(file.keys())
    said = capsys.readouterr().out
    assert "because its text encoder is CLIP's, 64 wide" in said and "965 tensors, float16" in said
    refused(flat, "a flat file already")


def test_a_folder_is_written_beside_from_within_it_too(changed_folder, monkeypatch):
    path = changed_folder("model_index.json", {})
    monkeypatch.chdir(path)
    written = convert(".", log=quiet)
    assert written.resolve() == path.with_name("folder.flat.safetensors").resolve()
    assert written.is_file()


def test_a_full_disk_leaves_the_old_file_and_no_new_one(source, refused, monkeypatch):
    output = convert(source, source.with_name("out"), log=quiet)
    before = output.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(source, "No space left", options=["-o", output, "--dtype", "bfloat16"])
    assert output.read_bytes() == before


@pytest.mark.parametrize("name, options", [("model.flat.safetensors", []), ("notes.txt", ["-o"])])
def test_what_is_no_flat_file_is_not_overwritten(source, refused, name, options):
    precious = source.with_name(name)
    precious.write_text("precious")
    refused(source, name, "exists", options=[*options, precious] if options else [])
    assert precious.read_text() == "precious"


def test_converting_needs_no_torch_and_little_memory(tmp_path, weights):
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    unneeded = {f"model_ema.x{k}": torch.zeros(10_000_000) for k in range(6)}  # 240 MB
    torch.save(weights | unneeded, tmp_path / "model.ckpt")
    assert weights[name].numel() * 4 < 13e6  # the largest
    code = (
        "import sys, resource, convert_weights as c;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        f"c.convert({str(tmp_path / 'model.ckpt')!r}, log=lambda line: None);"
        "assert 'torch' not in sys.modules;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 110_000  # KiB


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """flat_file() on checkpoints in a folder of its own, with what it says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    text, unet, vae = (shake(m) for m in reference_models(CONFIGS["sd1"]))

    def save(name, seed):
        numbers = {"size": 64, "text": {"heads": 4}}
        names = original_names(vae, shake(unet, seed=seed), text)
        torch.save({"state_dict": names, "sd_config": numbers}, tmp_path / "models" / name)

    def read(name):
        said = []
        path = convert_weights.flat_file(tmp_path / "models" / name, said.append)
        return path, "\n".join(said)

    read.save, read.folder, read.cache = save, tmp_path / "models", tmp_path / "cache" / "sd.py"
    return read


def test_a_checkpoint_is_converted_once_and_again_when_it_changed(cached):
    cached.save("a.ckpt", seed=1)
    path, said = cached("a.ckpt")
    assert "Converting it once" in said and path == cached.folder / "a.flat.safetensors"
    first, before = load_file(path), path.stat()
    path, said = cached("a.ckpt")
    assert "made from a.ckpt before" in said and path.stat() == before
    cached.save("a.ckpt", seed=2)
    path, said = cached("a.ckpt")
    assert "Converting it once" in said and path == cached.folder / "a.flat.safetensors"
    assert not torch.equal(load_file(path)["unet.time1.weight"], first["unet.time1.weight"])


def test_two_checkpoints_of_one_name_are_not_mixed_up(cached):
    cached.save("a.ckpt", seed=2)
    other = load_file(cached("a.ckpt")[0])
    cached.save("a.pt", seed=1)  # whose flat file would have the same name
    path, _ = cached("a.pt")
    assert path == cached.folder / "a.flat.safetensors"
    assert not torch.equal(load_file(path)["unet.time1.weight"], other["unet.time1.weight"])


def test_a_file_of_somebody_else_is_left_alone_and_the_cache_used(cached):
    mine = cached.folder / "b.flat.safetensors"
    mine.write_text("mine")
    cached.save("b.ckpt", seed=1)
    path, said = cached("b.ckpt")
    assert mine.read_text() == "mine" and str(path) in said
    assert [path] == list(cached.cache.glob("*-b.flat.safetensors"))
    assert "made from b.ckpt before" in cached("b.ckpt")[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_left_alone_and_the_cache_used(cached):
    cached.save("a.ckpt", seed=1)
    cached.folder.chmod(0o555)
    path, _ = cached("a.ckpt")
    assert path.parent == cached.cache


# %% The file itself -------------------------------------------------------------------------------


def test_the_contents_in_the_docstring_are_the_sections():
    contents = convert_weights.__doc__[convert_weights.__doc__.index("     1 Files") :] + "\n"
    contents = re.findall(r"(\d+) ([A-Z\w][^\d\n]*?)(?=  |\n)", contents)
    source = (ROOT / "convert_weights.py").read_text("utf-8")
    sections = re.findall(r"^# %% (\d+)\. (.*?) -+$", source, re.MULTILINE)
    assert sorted(contents, key=lambda c: int(c[0])) == sections


def imports(path):
    """-> the top-level modules that a file imports, anywhere in it"""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sd_more" / "formats").glob("*.py")), ids=lambda path: path.name
)
def test_the_formats_know_nothing_of_this_project(path):
    allowed = set(sys.stdlib_module_names) | {"numpy", "huggingface_hub"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed
