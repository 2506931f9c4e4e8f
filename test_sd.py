"""What is promised, as tests. Read the functions' names as the list.

    pip install -e '.[test]' && pytest            a few minutes on two cores
    pytest -m full                                the networks at Stable Diffusion's own sizes

The truth comes from outside: diffusers, transformers and PyTorch, on random weights. Errors are
relative: the largest difference over the largest number. Float32 carries 6e-8 per operation and
the rounding of some dozens of layers adds up; 1e-5 leaves room for that and for nothing else.
Where Winograd's convolution is used, which adds and subtracts larger numbers, it is 1e-4.
"""

import copy
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import tomllib
import urllib.parse
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from mlx.utils import tree_flatten
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel

import convert_weights
import sd
from convert_weights import ConversionError, convert

HERE = Path(__file__).resolve().parent
MERGES = (HERE / "tiny" / "merges.txt").read_text("utf-8")
torch.set_grad_enabled(False)
sys.path.append(str(HERE / "tiny"))
world, train, judge, evaluate = map(
    importlib.import_module, ("world", "train", "judge", "evaluate")
)
WIDTH = 40  # of the miniature's context


def assert_close(ours, truth, most, what=""):
    """The largest difference, relative to the largest number, is at most `most`."""
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    assert ours.shape == truth.shape, f"{what}: {ours.shape} for {truth.shape}"
    error = np.abs(ours - truth).max() / np.abs(truth).max()
    worst = np.argsort(-np.abs(ours - truth).ravel())[:5]
    pairs = ", ".join(f"{ours.ravel()[i]:.6g} for {truth.ravel()[i]:.6g}" for i in worst)
    assert error <= most, f"{what}: relative error {error:.1e}, allowed {most:.0e}; {pairs}"


def nhwc(x):
    return mx.array(x.numpy().transpose(0, 2, 3, 1))


def nchw(x):
    return np.array(x).transpose(0, 3, 1, 2)


# %% Reference models ------------------------------------------------------------------------------
# diffusers and transformers models with random weights, and the same weights under sd.py's names.
# The table of names below is written out a second time, apart from convert_weights.py's.

CONFIGS = {
    "sd1": {  # the miniature's relatives of Stable Diffusion 1.x and 2.x
        "name": "like Stable Diffusion 1.x",
        "size": 64,
        "cfg": 7.5,
        "prediction": "eps",
        "text": {"width": 64, "layers": 3, "heads": 4, "activation": "quick_gelu", "pad": 49407},
        "unet": {
            "widths": [32, 64, 96, 128],
            "heads": [8, 8, 8, 8],
            "groups": 32,
            "context_width": 64,
        },
        "vae": {"widths": [32, 32, 64, 96], "groups": 32, "scale": 0.18215},
    },
    "sd2": {
        "name": "like Stable Diffusion 2.x",
        "size": 64,
        "cfg": 7.5,
        "prediction": "v",
        "text": {"width": 128, "layers": 3, "heads": 2, "activation": "gelu", "pad": 0},
        "unet": {
            "widths": [64, 64, 128, 128],
            "heads": [1, 1, 2, 2],
            "groups": 32,
            "context_width": 128,
        },
        "vae": {"widths": [32, 64, 64, 64], "groups": 32, "scale": 0.18215},
    },
}
SIZES = {  # the real ones, for -m full
    "Stable Diffusion 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "Stable Diffusion 2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
}
RES = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
ATTEND = {
    "attn1.to_out": "attn1.to_out.0", "attn2.to_out": "attn2.to_out.0",
    "ff_in": "ff.net.0.proj", "ff_out": "ff.net.2",
}  # fmt: skip


def their_name(name):
    """A tensor's name in a flat file -> its name in diffusers' or transformers' model."""
    part, rest = name.split(".", 1)
    rest, leaf = rest.rsplit(".", 1)
    return {"unet": their_unet, "vae": their_vae, "text_encoder": their_text}[part](
        rest
    ) + f".{leaf}"


def their_unet(rest):
    top = {
        "time1": "time_embedding.linear_1",
        "time2": "time_embedding.linear_2",
        "down.0.0": "conv_in",
    }
    top |= {"norm_out": "conv_norm_out", "conv_out": "conv_out"}
    if rest in top:
        return top[rest]
    side, *numbers = rest.split(".")
    if side == "middle":
        slot, inner = int(numbers[0]), ".".join(numbers[1:])
        block, layer = "mid_block", slot // 2
    else:
        row, slot, inner = int(numbers[0]), int(numbers[1]), ".".join(numbers[2:])
        floor, layer = divmod(row - 1 if side == "down" else row, 3)
        block = f"{side}_blocks.{floor}"
    if inner == "conv":
        return f"{block}.{side}samplers.0.conv"
    if slot != 1:
        return f"{block}.resnets.{layer}.{RES.get(inner, inner)}"
    inner = (
        inner
        if inner in ("norm", "proj_in", "proj_out")
        else f"transformer_blocks.0.{ATTEND.get(inner, inner)}"
    )
    return f"{block}.attentions.{layer}.{inner}"


def their_vae(rest):
    top = {"quant": "quant_conv", "post_quant": "post_quant_conv"}
    top |= {f"{side}_norm": f"{side}.conv_norm_out" for side in ("encoder", "decoder")}
    top |= {f"{side}_out": f"{side}.conv_out" for side in ("encoder", "decoder")}
    top |= {f"{side}.0": f"{side}.conv_in" for side in ("encoder", "decoder")}
    if rest in top:
        return top[rest]
    side, row, inner = rest.split(".", 2)
    row, middle = int(row), 12 if side == "encoder" else 1
    if middle <= row < middle + 3:
        if row == middle + 1:
            inner = {"norm": "group_norm", "attention.to_out": "to_out.0"}.get(inner, inner)
            return f"{side}.mid_block.attentions.0.{inner.removeprefix('attention.')}"
        return f"{side}.mid_block.resnets.{(row - middle) // 2}.{RES.get(inner, inner)}"
    floor, layer = divmod(row - 1, 3) if side == "encoder" else divmod(row - 4, 4)
    block = f"{side}.{'down' if side == 'encoder' else 'up'}_blocks.{floor}"
    if inner == "conv":
        return f"{block}.{'down' if side == 'encoder' else 'up'}samplers.0.conv"
    return f"{block}.resnets.{layer}.{RES.get(inner, inner)}"


def their_text(rest):
    top = {"token_embedding": "embeddings.token_embedding", "norm": "final_layer_norm"}
    top |= {"position_embedding": "embeddings.position_embedding"}
    if rest in top:
        return top[rest]
    _, layer, inner = rest.split(".", 2)
    inner = {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
        "attention.to_q": "self_attn.q_proj", "attention.to_k": "self_attn.k_proj",
        "attention.to_v": "self_attn.v_proj", "attention.to_out": "self_attn.out_proj",
    }[inner]  # fmt: skip
    return f"encoder.layers.{layer}.{inner}"


def state(model):
    """-> {name without text_model.: tensor}. position_ids is 0 ... 76 and not a weight."""
    return {
        k.removeprefix("text_model."): v
        for k, v in model.state_dict().items()
        if "position_ids" not in k
    }


def ours_from(network, part, model):
    """Fill one of sd.py's networks with a reference model's weights; all of them must be used."""
    theirs, filled = state(model), []
    for name, parameter in tree_flatten(network.parameters()):
        w = theirs.pop(their_name(f"{part}.{name}")).numpy()
        w = w.transpose(0, 2, 3, 1) if w.ndim == 4 and parameter.ndim == 4 else w
        assert w.size == parameter.size, name
        filled.append((name, mx.array(w.reshape(parameter.shape))))
    assert not theirs, f"not used: {list(theirs)}"
    network.load_weights(filled)
    return network


def theirs_from(model, part, weights):
    """The other way round: a reference model with a flat file's weights."""
    theirs, given = model.state_dict(), {}
    prefix = "text_model." if any(k.startswith("text_model.") for k in theirs) else ""
    for name in [n for n in weights if n.startswith(part + ".")]:
        w, key = np.array(weights[name].astype(mx.float32)), prefix + their_name(name)
        w = w.transpose(0, 3, 1, 2) if w.ndim == 4 else w
        given[key] = torch.from_numpy(np.ascontiguousarray(w)).reshape(theirs[key].shape)
    missing, unknown = model.load_state_dict(given, strict=False)
    assert not unknown and all("position_ids" in name for name in missing)
    return model.eval()


def reference_models(config):
    """-> (text model, UNet, VAE) of diffusers and transformers for a config of sd.py's."""
    t, u, v = config["text"], config["unet"], config["vae"]
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=t["width"], intermediate_size=4 * t["width"], num_hidden_layers=t["layers"],
            num_attention_heads=t["heads"], hidden_act=t["activation"],
            bos_token_id=49406, eos_token_id=49407, pad_token_id=t["pad"],
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=config["size"] // 8, block_out_channels=tuple(u["widths"]),
        attention_head_dim=tuple(u["heads"]), norm_num_groups=u["groups"],
        cross_attention_dim=u["context_width"], use_linear_projection=config["prediction"] == "v",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=tuple(v["widths"]), norm_num_groups=v["groups"], layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4, sample_size=config["size"], scaling_factor=v["scale"],
    )  # fmt: skip
    return text.eval(), unet.eval(), vae.eval()


def shake(model, scale=1.0, seed=0):
    """Random weights, norms and biases included, of a size that keeps activations near `scale`."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.copy_(noise * scale / math.sqrt(p[0].numel()))
        else:
            p.copy_(
                (1 + 0.2 * noise)
                if "norm" in name and name.endswith("weight")
                else 0.1 * scale * noise
            )
    return model


def our_models(config, text, unet, vae):
    c = {part: dict(config[part]) for part in ("text", "unet", "vae")}
    c["text"].pop("pad")
    c["vae"].pop("scale")
    return (
        ours_from(sd.TextEncoder(vocabulary=49408, **c["text"]), "text_encoder", text),
        ours_from(sd.UNet(**c["unet"]), "unet", unet),
        ours_from(sd.VAE(**c["vae"]), "vae", vae),
    )


def write_flat(path, config, ours):
    """A flat file, written by the test itself."""
    weights = {
        f"{part}.{name}": p
        for part, network in zip(("text_encoder", "unet", "vae"), ours)
        for name, p in tree_flatten(network.parameters())
    }
    weights["tokenizer.merges"] = mx.array(np.frombuffer(MERGES.encode(), np.uint8))
    config = config | {"kind": "model", "text": config["text"] | {"vocabulary": 49408}}
    mx.save_safetensors(str(path), weights, {"format": "sd.py 1", "config": json.dumps(config)})
    return path


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def pair(request):
    """-> (config, (text, unet, vae) of the reference, (text, unet, vae) of sd.py)."""
    config = CONFIGS[request.param]
    theirs = tuple(shake(m, seed=i) for i, m in enumerate(reference_models(config)))
    return config, theirs, our_models(config, *theirs)


@pytest.fixture(scope="session")
def tiny():
    return sd.StableDiffusion()


@pytest.fixture(scope="session")
def tokenizer():
    return sd.Tokenizer(MERGES)


@pytest.fixture(scope="session")
def their_tokenizer(tmp_path_factory):
    return train.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_pipeline(tiny, their_tokenizer):
    """diffusers' own pipeline with the miniature's weights."""
    _, weights = sd.read_flat(sd.TINY)
    text, unet, vae = reference_models(tiny.config)
    return StableDiffusionPipeline(
        vae=theirs_from(vae, "vae", weights),
        text_encoder=theirs_from(text, "text_encoder", weights),
        unet=theirs_from(unet, "unet", weights),
        tokenizer=their_tokenizer,
        scheduler=scheduler(PNDMScheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def scheduler(kind, **more):
    """diffusers' scheduler with the numbers of Stable Diffusion's own configuration."""
    more |= {"skip_prk_steps": True} if kind is PNDMScheduler else {"clip_sample": False}
    return kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, **more,
    )  # fmt: skip


# %% 1. Tokenizer ----------------------------------------------------------------------------------


def strings():
    """Some thousand strings of every kind that has broken a tokenizer."""
    rng = random.Random(0)
    kinds = {
        "ascii": [chr(i) for i in range(32, 127)],
        "words": ["a", "red", "house,", "night!", "househunter", "don't", "we'll", "3D", "1984"],
        "accents": list("éèêëàâäöüßçñøåæœÀÉÎÕÜŸžščřďťňğışőű") + ["e\u0301", "n\u0303", "\u212b"],
        "emoji": ["🚀", "👩‍🚀", "🏳️‍🌈", "❤️", "👍🏽", "🇩🇪", "😀"],
        "cjk": list("富嶽三十六景神奈川沖浪裏東京한국어그림ひらがなカタカナ"),
        "digits": list("0123456789٣४五Ⅷ²½") + ["1,000.50", "007"],
        "punctuation": [
            "...", "!!!", "?!", "--", "((", "))", "'s", "'S", "''ll", "'", '"', "&amp;", "_", "#$%",
            "—", "“”",
        ],
        "control": [
            "\x00", "\x01", "\x1b", "\x7f", "\x85", "\t", "\n", "\r", "\x0b", "\x1c",
            "\u200b", "\ufeff", "\u00a0", "\u3000", "\u2028",
        ],
        "others": [
            *"ΣΑΣςΩЖщ", "السلام", "नमस्ते", "ไทย", "ǅ", "İ", "ﬁ", "\U0001d400", "\ud7a3",
            "<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>",
        ],
    }  # fmt: skip
    for parts in kinds.values():
        yield from parts
        for _ in range(150):
            yield "".join(rng.choices(parts, k=rng.randint(1, 12)))
            yield " ".join(rng.choices(parts, k=rng.randint(1, 12)))
    everything = [part for parts in kinds.values() for part in parts] + [" ", "  "]
    for _ in range(1000):
        yield "".join(rng.choices(everything, k=rng.randint(1, 40)))
    yield from (
        "",
        " ",
        "a" * 10_000,
        "lighthouse " * 1000,
        "".join(rng.choices(everything, k=10_000)),
    )


def test_tokens_are_those_of_transformers(tokenizer, their_tokenizer):
    texts = list(strings())
    assert len(texts) > 3000
    theirs = their_tokenizer(texts, padding="max_length", truncation=True).input_ids
    wrong = [text for text, ids in zip(texts, theirs) if tokenizer.encode(text) != ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first: {wrong[0]!r}"


def test_a_text_that_is_not_even_unicode_has_tokens(tokenizer):
    assert len(tokenizer.encode("a \ud800 house")) == 77


def test_the_examples_in_the_docstrings_are_true(tokenizer):
    for name in ("bpe", "words"):
        text = getattr(sd.Tokenizer, name).__doc__
        examples = re.findall(rf"{name}\((\".*?\")\) +-> +(.*)", text)
        assert examples
        for argument, result in examples:
            if name == "bpe":  # bpe() takes a word as letters; these are plain ASCII
                assert tokenizer.bpe(json.loads(argument)) == eval(result), argument
            else:
                assert tokenizer.words(json.loads(argument)) == eval(result), argument
    ids = re.search(
        r'"a red house"\s+out\s+77 ids: \[([\d, ]+), \.\.\.\]', (HERE / "sd.py").read_text("utf-8")
    )
    ids = [int(i) for i in ids[1].split(",")]
    assert tokenizer.encode("a red house")[: len(ids)] == ids
    assert sd.make_timesteps(50)[:2] == [981, 961] and sd.make_timesteps(50)[-2:] == [21, 1]


def test_version_2_pads_with_0_and_reads_an_exclamation_mark_as_one():
    tokenizer = sd.Tokenizer(MERGES, pad=0)
    ids = tokenizer.encode("hello!!!")
    assert ids == [49406, 3306, 995, 49407] + [0] * 73
    assert tokenizer.encode("!")[1] == 256


def test_what_does_not_fit_in_75_tokens_is_named(tokenizer):
    text = "one two three " * 25 + "and a café"
    ids = tokenizer.encode(text)
    assert len(ids) == 77 and ids[0] == 49406 and ids[-1] == 49407 and 49407 not in ids[1:-1]
    assert tokenizer.unread(text) == "and a café"
    assert tokenizer.unread("a red house") == ""


# %% 3-5. Networks ---------------------------------------------------------------------------------


def run_text(theirs, ours, seed=0):
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(seed))
    return ours(mx.array(ids.numpy())), theirs(ids).last_hidden_state


def run_unet(theirs, ours, h=16, w=8, t=371, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    c = theirs.config.cross_attention_dim
    x = torch.randn(2, 4, h, w, generator=generator) * scale
    context = torch.randn(2, 77, c, generator=generator) * scale
    return nchw(ours(nhwc(x), t, mx.array(context.numpy()))), theirs(x, t, context).sample


def run_encoder(theirs, ours, size=64, scale=1.0):
    x = torch.randn(2, 3, size, size + 64, generator=torch.Generator().manual_seed(2)) * scale
    mean, log_variance = ours.encode(nhwc(x))
    truth = theirs.encode(x).latent_dist
    return nchw(mx.concatenate([mean, log_variance], -1)), torch.cat([truth.mean, truth.logvar], 1)


def run_decoder(theirs, ours, scale=1.0):
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(3)) * scale
    return nchw(ours.decode(nhwc(x))), theirs.decode(x).sample


RUNS = {
    "text": (run_text, 0),
    "unet": (run_unet, 1),
    "encoder": (run_encoder, 2),
    "decoder": (run_decoder, 2),
}
KINDS = ["plain", "cpu", "gpu"]


@pytest.fixture
def kernels():
    """A function that chooses kernels for one test."""
    yield sd.use_kernels
    sd.use_kernels("cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", RUNS)
def test_each_network_is_that_of_diffusers(pair, network, kind, kernels):
    _, theirs, ours = pair
    run, i = RUNS[network]
    kernels(kind)
    assert_close(
        *run(theirs[i], ours[i]), 1e-4 if kind == "cpu" and network != "text" else 1e-5, network
    )


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_unet_reads_the_time_as_diffusers_does(pair, t):
    _, theirs, ours = pair
    assert_close(*run_unet(theirs[1], ours[1], t=t), 1e-4)


def test_the_log_variance_is_clamped(pair):
    _, theirs, _ = pair
    vae = reference_models(pair[0])[2]
    vae.load_state_dict(theirs[2].state_dict())
    vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:] = 1000.0, -1000.0
    ours, truth = run_encoder(vae, our_models(pair[0], theirs[0], theirs[1], vae)[2])
    assert truth[:, 4:].max() == 20 and truth[:, 4:].min() == -30
    assert_close(ours, truth, 1e-4)


def test_each_norms_epsilon_is_the_originals(pair):
    """By name, one by one; the next test shows that the functions use them."""
    _, theirs, ours = pair
    counted = {}
    for part, model, network in zip(("text_encoder", "unet", "vae"), theirs, ours):
        for name, norm in network.named_modules():
            if isinstance(norm, (sd.GroupNorm, sd.LayerNorm)):
                truth = model.get_submodule(
                    their_name(f"{part}.{name}.weight").removesuffix(".weight")
                )
                assert truth.eps == getattr(norm, "epsilon", 1e-5), name
                counted[part, truth.eps] = counted.get((part, truth.eps), 0) + 1
    # The UNet: 45 in residual blocks and before the last convolution, 48 LayerNorms; 16 of Attend.
    assert counted == {
        ("text_encoder", 1e-5): 7, ("unet", 1e-5): 45 + 48, ("unet", 1e-6): 16, ("vae", 1e-6): 52,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kernel_uses_its_epsilon(kind, kernels):
    kernels(kind)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 12, 12, generator=generator) * 2e-3
    w, b = torch.rand(64, generator=generator) + 0.5, torch.randn(64, generator=generator)
    for eps in (1e-5, 1e-6):
        truth = torch.nn.functional.group_norm(x, 32, w, b, eps)
        ours = sd.group_norm(nhwc(x), mx.array(w.numpy()), mx.array(b.numpy()), 32, eps)
        assert_close(nchw(ours), truth, 1e-6)
    x = x.permute(0, 2, 3, 1).reshape(2, -1, 64)
    truth = torch.nn.functional.layer_norm(x, (64,), w, b, 1e-5)
    ours = sd.layer_norm(mx.array(x.numpy()), mx.array(w.numpy()), mx.array(b.numpy()))
    assert_close(ours, truth, 1e-6)
    wrong = torch.nn.functional.layer_norm(x, (64,), w, b, 1e-6)
    with pytest.raises(AssertionError):
        assert_close(ours, wrong, 1e-6)


@pytest.mark.parametrize("network", RUNS)
def test_each_activation_is_the_originals(pair, network, kernels, monkeypatch):
    _, theirs, ours = pair
    kernels("plain")
    run, i = RUNS[network]
    used = set()
    wrong = {
        "silu": lambda x: x * mx.sigmoid(1.01 * x),
        "gelu": lambda x: 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": lambda x: x * mx.sigmoid(1.7 * x),
    }
    for name, other in wrong.items():
        right = getattr(sd, name)
        monkeypatch.setattr(sd, name, lambda x, f=right, name=name: (used.add(name), f(x))[1])
        run(theirs[i], ours[i])
        monkeypatch.setattr(sd, name, other)
        result, truth = run(theirs[i], ours[i])
        monkeypatch.setattr(sd, name, right)
        if name in used:
            with pytest.raises(AssertionError):
                assert_close(result, truth, 1e-5, name)
    activation = {"quick_gelu"} if pair[0]["prediction"] == "eps" else {"gelu"}
    assert used == {"text": activation, "unet": {"silu", "gelu"}}.get(network, {"silu"})


def test_no_token_sees_those_behind_it(pair):
    ids = np.random.default_rng(0).integers(0, 49408, (1, 77))
    other = ids.copy()
    other[0, 40:] = 7
    a, b = (np.array(pair[2][0](mx.array(i))) for i in (ids, other))
    assert np.array_equal(a[0, :40], b[0, :40]) and not np.allclose(a[0, 40:], b[0, 40:])


# %% 6. Schedule and samplers ----------------------------------------------------------------------

ALL_STEPS = [1, 2, 3, 20, 30, 50, 999]


def test_abar_is_that_of_diffusers():
    truth = scheduler(DDIMScheduler).alphas_cumprod
    assert_close(sd.ABAR, truth, 3e-6)  # diffusers multiplies 1000 factors in float32
    assert f"{sd.ABAR[0]:.4f}" == "0.9991" and f"{sd.ABAR[999]:.4f}" == "0.0047"


@pytest.mark.parametrize("steps", ALL_STEPS)
def test_timesteps_are_those_of_diffusers(steps):
    theirs = scheduler(DDIMScheduler)
    theirs.set_timesteps(steps)
    assert sd.make_timesteps(steps) == theirs.timesteps.tolist()


def curved(x, t):
    """Stands for the UNet: depends on x and t, bends, and is the same in NumPy, MLX and PyTorch."""
    return (1 + 0.3 * math.cos(t / 150)) * x / (1 + 0.1 * x * x) + 0.2 * math.sin(t / 40)


def their_run(theirs, steps, x, model=curved):
    theirs.set_timesteps(steps)
    xs, calls = [], 0
    for t in theirs.timesteps:
        x = theirs.step(model(x, int(t)), int(t), x).prev_sample
        xs.append(x)
        calls += 1
    return xs, calls


@pytest.mark.parametrize("steps", ALL_STEPS)
@pytest.mark.parametrize("name", ["plms", "ddim"])
def test_samplers_are_those_of_diffusers(name, steps):
    theirs = scheduler(PNDMScheduler if name == "plms" else DDIMScheduler)
    theirs.alphas_cumprod = torch.from_numpy(sd.ABAR)  # in float64, to compare the rest exactly
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth, calls = their_run(theirs, steps, x)
    asked = []

    def eps_at(x, t):
        asked.append(t)
        return curved(x, t)

    ours = list(sd.SAMPLERS[name](eps_at, x, sd.make_timesteps(steps)))
    assert len(ours) == steps and len(asked) == calls
    assert calls == steps + (1 if name == "plms" and steps > 1 else 0)
    assert_close(ours[-1], truth[-1], 1e-12)
    if name == "plms" and steps > 1:
        truth = truth[1:]  # diffusers counts the peek of the first step as one
    for a, b in zip(ours, truth):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("steps", [1, 2, 30, 50])
def test_v_prediction_is_that_of_diffusers(steps):
    """DDIM only: PLMS mixes eps here and v in diffusers (README, "Not the same")."""
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = scheduler(DDIMScheduler, prediction_type="v_prediction")
    theirs.alphas_cumprod = torch.from_numpy(sd.ABAR)
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    truth, _ = their_run(theirs, steps, x)
    eps_at = lambda x, t: sd.eps_from_v(curved(x, t), x, t)
    *_, ours = sd.sample_ddim(eps_at, x, sd.make_timesteps(steps))
    assert_close(ours, truth[-1], 1e-12)


LEADING = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip
DPM = LEADING | {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
MORE_SAMPLERS = {
    "euler": lambda: EulerDiscreteScheduler(**LEADING),
    "euler-a": lambda: EulerAncestralDiscreteScheduler(**LEADING),
    "lms": lambda: LMSDiscreteScheduler(**LEADING),
    "dpm++": lambda: DPMSolverMultistepScheduler(**DPM),
    "dpm++-karras": lambda: DPMSolverMultistepScheduler(**DPM, use_karras_sigmas=True),
    "lcm": lambda: LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, about PyTorch's arrays
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20, 50, 999])
@pytest.mark.parametrize("name", MORE_SAMPLERS)
def test_more_samplers_are_those_of_diffusers(name, steps):
    """diffusers keeps its sigmas in float32; so the error, summed over the steps."""
    if name == "lcm" and steps > 50:
        with pytest.raises(ValueError, match="at most 50"):
            sd.lcm_timesteps(steps)
        return
    timesteps = sd.SPACINGS.get(name, sd.make_timesteps)(steps)
    theirs = MORE_SAMPLERS[name]()
    if name == "dpm++":  # diffusers' own spacing has no step at the end: 951 ... 20 for 50
        theirs.set_timesteps(timesteps=timesteps)
    else:
        theirs.set_timesteps(steps)
    assert [round(t) for t in timesteps] == [round(float(t)) for t in theirs.timesteps]

    def dice():
        generator = torch.Generator().manual_seed(5)
        return lambda: torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=generator)

    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth, generator = x * theirs.init_noise_sigma, torch.Generator().manual_seed(5)
    for t in theirs.timesteps:
        eps = curved(theirs.scale_model_input(truth, t), float(t))
        more = {} if name == "lms" else {"generator": generator}
        truth = theirs.step(eps, t, truth, **more).prev_sample
    told = lambda x, t: curved(x, round(t))  # as the UNet is
    ours = list(sd.SAMPLERS[name](told, x, timesteps, dice()))
    assert len(ours) == steps
    assert_close(ours[-1], truth, 1e-5)


def test_every_adams_bashforth_row_sums_to_one():
    for row in sd.ADAMS_BASHFORTH:
        assert sum(row) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("steps", ALL_STEPS)
@pytest.mark.parametrize("name", sd.SAMPLERS)
def test_exact_noise_gives_back_the_picture_in_any_number_of_steps(name, steps):
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 1, 8, 8, 4))
    if steps > 50 and name == "lcm":
        return
    timesteps = sd.SPACINGS.get(name, sd.make_timesteps)(steps)
    x, noise = sd.spoil(x0, eps, timesteps[0]), [eps]

    def draw():
        noise.append(rng.standard_normal(x.shape))
        return noise[-1]

    def exact(x, t):  # of which the noise changes under way for euler-a and lcm
        abar = sd.abar_at(t)
        return (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)

    *_, last = sd.SAMPLERS[name](exact, x, timesteps, draw)
    if name in ("plms", "ddim"):
        assert_close(last, math.sqrt(sd.ABAR[0]) * x0 + math.sqrt(1 - sd.ABAR[0]) * eps, 1e-9)
    else:
        assert_close(last, x0, 1e-9 if name != "lcm" else 0.01)  # lcm keeps a little of x


# %% 7. Text to image ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["plms", "ddim"])
def test_the_same_seed_gives_the_picture_of_diffusers_pipeline(tiny, tiny_pipeline, sampler):
    tiny_pipeline.scheduler = scheduler(PNDMScheduler if sampler == "plms" else DDIMScheduler)
    prompt, negative = "a blue boat on the sea at sunset", "a house"
    truth = tiny_pipeline(
        prompt, negative_prompt=negative, num_inference_steps=50, guidance_scale=7.5,
        width=128, height=192, generator=torch.Generator().manual_seed(42), output_type="np",
    ).images  # fmt: skip
    *_, x = tiny.generate_latents(
        prompt, negative_prompt=negative, steps=50, cfg=7.5, width=128, height=192, sampler=sampler
    )
    error = np.abs(np.array(tiny.decode(x)) - truth).max()
    print(f"50 {sampler} steps against diffusers' pipeline: the worst pixel is off by {error:.1e}")
    assert error <= 1e-3


@pytest.mark.parametrize("cfg", [0, 1, 3.5])
def test_guidance_is_that_of_diffusers_pipeline(tiny, tiny_pipeline, cfg):
    """diffusers leaves guidance out at 1 and below; 0 means "as if there were no prompt"."""
    tiny_pipeline.scheduler = scheduler(DDIMScheduler)
    truth = tiny_pipeline(
        "" if cfg == 0 else "a red car", num_inference_steps=8, guidance_scale=max(cfg, 1),
        width=128, height=128, generator=torch.Generator().manual_seed(3), output_type="np",
    ).images  # fmt: skip
    *_, x = tiny.generate_latents("a red car", steps=8, cfg=cfg, seed=3, sampler="ddim")
    assert np.abs(np.array(tiny.decode(x)) - truth).max() <= 1e-3


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_whole_model_of_version_1_or_2_paints_what_diffusers_paints(
    pair, prediction, tmp_path, their_tokenizer
):
    config, theirs, ours = pair
    config = config | {"prediction": prediction}
    model = sd.StableDiffusion(write_flat(tmp_path / "m.safetensors", config, ours), "float32")
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    ids = [sd.Tokenizer(MERGES, config["text"]["pad"]).encode(p) for p in ("", "a house")]
    context = theirs[0](torch.tensor(ids)).last_hidden_state
    pipeline = StableDiffusionPipeline(
        vae=theirs[2], text_encoder=theirs[0], unet=theirs[1], tokenizer=their_tokenizer,
        scheduler=scheduler(DDIMScheduler, prediction_type=kind), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    truth = pipeline(
        prompt_embeds=context[1:], negative_prompt_embeds=context[:1], num_inference_steps=6,
        guidance_scale=7.5, width=64, height=64, generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images  # fmt: skip
    *_, x = model.generate_latents("a house", steps=6, seed=5, sampler="ddim")
    # Random networks answer every rounding with a larger one; guidance multiplies it by 7.5 again.
    assert_close(nchw(x), truth, 1e-3)


def test_decode_and_encode_are_inverse_and_scaled_as_diffusers(tiny, tiny_pipeline):
    x = train.drawn(99_999)[None].astype(np.float32) / 255  # never trained on
    latents = tiny.encode(x)
    truth = tiny_pipeline.vae.encode(
        torch.from_numpy(x.transpose(0, 3, 1, 2)) * 2 - 1
    ).latent_dist.mean
    assert_close(nchw(latents), truth * 0.18215, 1e-4)
    back = np.array(tiny.decode(latents))
    assert back.min() >= 0 and back.max() <= 1
    assert (
        -10 * math.log10(((back - x) ** 2).mean()) > 26
    )  # dB: it is the picture, if not every star
    assert 0.5 < np.array(latents).std() < 2


def test_each_picture_of_a_batch_can_be_made_alone(tiny):
    together = tiny.txt2img("a green tree", seed=10, steps=4, n_images=3)
    alone = tiny.txt2img("a green tree", seed=12, steps=4)[0]
    difference = np.abs(np.asarray(together[2], int) - np.asarray(alone, int))
    assert difference.max() <= 1  # a level of 255: matrix products of another size round otherwise
    assert np.abs(np.asarray(together[0], int) - np.asarray(alone, int)).max() > 20


def test_latents_come_after_every_step_and_the_last_is_the_picture(tiny):
    xs = list(tiny.generate_latents("a yellow flower", steps=5, seed=0))
    assert len(xs) == 5 and all(x.shape == (1, 16, 16, 4) for x in xs)
    assert tiny.to_pictures(xs[-1])[0] == tiny.txt2img("a yellow flower", steps=5, seed=0)[0]


def test_eight_bits_are_rounded(tiny, monkeypatch):
    levels = np.array([[[0, 0.49, 0.51], [254.4, 254.6, 255]]], np.float32) / 255
    monkeypatch.setattr(tiny, "decode", lambda x: mx.array(levels)[None])
    (picture,) = tiny.to_pictures(mx.zeros((1, 1, 1, 4)))
    assert np.asarray(picture).tolist() == [[[0, 0, 1], [254, 255, 255]]]


def colour_of(picture):
    """What stands out from the middle: the median colour of the pixels unlike their row's edge."""
    x = np.asarray(picture, np.float32)
    off = np.abs(x - np.median(x, axis=1, keepdims=True)).sum(2)
    middle = off[40:118, 24:104]
    r, g, b = x[40:118, 24:104][middle > 60].mean(0)
    return r, g, b


def test_a_red_house_is_red_and_a_blue_boat_blue(tiny):
    for seed in (1, 2, 3):
        r, g, b = colour_of(tiny.txt2img("a red house", seed=seed, steps=25)[0])
        assert r > 1.5 * g and r > 1.5 * b, f"seed {seed}: {r:.0f} {g:.0f} {b:.0f}"
        r, g, b = colour_of(tiny.txt2img("a blue boat", seed=seed, steps=25)[0])
        assert b > 1.2 * r and b > g, f"seed {seed}: {r:.0f} {g:.0f} {b:.0f}"


def test_night_is_darker_than_day(tiny):
    day, night = (
        np.asarray(tiny.txt2img(f"a green tree {t}", seed=4, steps=25)[0])
        for t in ("by day", "at night")
    )
    assert night[:40].mean() + 60 < day[:40].mean()


# %% 7. Loading ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_flat(tmp_path_factory):
    config = CONFIGS["sd1"]
    ours = our_models(config, *reference_models(config))
    return write_flat(tmp_path_factory.mktemp("flat") / "small.safetensors", config, ours)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_a_file_that_does_not_fit_is_refused_by_name(small_flat, tmp_path, damage):
    weights, metadata = mx.load(str(small_flat), return_metadata=True)
    name = "unet.down.1.0.conv1.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "unknown":
        name = "unet.down.1.0.conv3.weight"
        weights[name] = mx.zeros((1,))
    else:
        weights[name] = mx.zeros((32, 3, 3, 31))
    path = tmp_path / "damaged.safetensors"
    mx.save_safetensors(str(path), weights, metadata)
    with pytest.raises(ValueError, match=re.escape(name.removeprefix("unet."))):
        sd.StableDiffusion(path)


@pytest.mark.parametrize(
    "config",
    [
        "{", "{}", "[]", "[" * 100_000, '{"text": 1}', '{"unet": {}}', "merges", "stray",
        *({"size": x} for x in (100, 0, "64", None)), {"prediction": "epsilon"}, {"cfg": "7"},
        *({"text": {"pad": x}} for x in (10**6, -1, "0")), {"text": {"activation": "relu"}},
        {"text": {"vocabulary": 100}}, {"text": {"heads": 0}}, {"unet": {"heads": [8, 8, 8, 7]}},
        {"unet": {"groups": 7}}, {"unet": {"widths": [1, 2]}}, {"vae": {"scale": 0}},
        {"vae": {"scale": "x"}}, {"vae": {"groups": 0}}, {"vae": {"widths": "wide"}},
    ],
    ids=lambda config: str(config)[:30],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(small_flat, tmp_path, config):
    weights, metadata = mx.load(str(small_flat), return_metadata=True)
    path = tmp_path / "odd.safetensors"
    if config == "merges":
        del weights["tokenizer.merges"]
    elif config == "stray":
        weights["unett.weight"] = mx.zeros((1,))
    elif isinstance(config, dict):
        right = json.loads(metadata["config"])
        for key, value in config.items():
            right[key] = right[key] | value if isinstance(value, dict) else value
        metadata["config"] = json.dumps(right)
    else:
        metadata["config"] = config
    mx.save_safetensors(str(path), weights, metadata)
    with pytest.raises(ValueError, match=r"odd\.safetensors"):
        sd.StableDiffusion(path)


def crafted(header, data=b"\x00" * 64):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 not a model",
        b"\xff" * 100,
        crafted({"x": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 2**64 - 1]}}),
        crafted({"x": {"dtype": "F32", "shape": [65536] * 4 + [2], "data_offsets": [0, 0]}}, b""),
        crafted({"x": {"dtype": "U8", "shape": [4], "data_offsets": [2**64 - 8, 2**64 - 4]}}),
        crafted(
            {
                "__metadata__": {"format": "pt"},
                "x": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]},
            }
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_flat_file_is_refused_before_mlx_reads_it(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        sd.StableDiffusion(path)


# %% 8. From a picture -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """A picture of the miniature's world, 128 x 128."""
    return Image.fromarray(train.drawn(7))


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_is_that_of_diffusers(tiny, tiny_pipeline, drawn, strength):
    """DDIM: with others diffusers puts in the noise of another timestep (conventions differ)."""
    theirs = StableDiffusionImg2ImgPipeline(
        **{**tiny_pipeline.components, "scheduler": scheduler(DDIMScheduler)},
        requires_safety_checker=False,
    )
    truth = theirs(
        "a blue house at night", image=drawn, strength=strength, num_inference_steps=20,
        guidance_scale=3, generator=torch.Generator().manual_seed(9), output_type="np",
    ).images  # fmt: skip
    picture, _ = sd.load_picture(drawn)
    way = sd.FromPicture(tiny, picture, strength)
    xs = list(
        tiny.generate_latents(
            "a blue house at night", steps=20, cfg=3, seed=9, sampler="ddim", variations=[way.vary]
        )
    )
    assert len(xs) == int(20 * strength)
    error = np.abs(np.array(tiny.decode(xs[-1])) - truth).max()
    print(f"image to image, strength {strength}: the worst pixel is off by {error:.1e}")
    assert error <= 1e-3


def test_image_to_image_from_python_is_that_of_the_command_line(tiny, drawn, tmp_path):
    drawn.save(tmp_path / "a.png")
    options = {"strength": 0.6, "seed": 3, "steps": 5}
    (picture,) = tiny.img2img("a blue house", tmp_path / "a.png", **options)
    words = [x for name, value in options.items() for x in (f"--{name}", value)]
    done = cli("--image", "a.png", "--prompt", "a blue house", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(tmp_path / "out.png")))


@pytest.mark.parametrize("name", sd.SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 1])
def test_every_sampler_begins_with_the_noise_of_its_first_timestep(tiny, drawn, name, strength):
    """With the exact eps the picture comes back; so x was spoiled for the t that is asked first."""
    picture, _ = sd.load_picture(drawn)
    way = sd.FromPicture(tiny, picture, strength)
    rng = np.random.default_rng(1)
    draw = lambda: mx.array(rng.standard_normal((1, 16, 16, 4), np.float32))
    first = draw()
    x0 = np.array(tiny.encode(way.picture, first))
    timesteps = sd.SPACINGS.get(name, sd.make_timesteps)(10)
    asked = []

    def exact(x, t):
        asked.append(t)
        abar = sd.abar_at(t)
        return (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)

    xs = list(way.vary(sd.SAMPLERS[name])(exact, first, timesteps, draw))
    assert len(xs) == int(10 * strength) and asked[0] == timesteps[-len(xs)]
    assert_close(xs[-1], x0, 0.05)  # plms and ddim leave noise of 0.03 in


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16", "I", "F", "CMYK"])
def test_pictures_of_every_kind_are_read(mode, tmp_path):
    grey = np.tile(np.linspace(0, 255, 128).round().astype(np.uint8), (64, 1))
    if mode in ("I;16", "I"):
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
        picture = picture if mode == "I;16" else picture.convert("I")
    elif mode == "F":
        picture = Image.fromarray(grey.astype(np.float32))
    else:
        picture = Image.fromarray(grey).convert("RGB").convert(mode)
    if mode in ("I", "F", "CMYK"):
        picture.save(tmp_path / "a.tif")
    else:
        picture.save(tmp_path / "a.png")
    pixels, opaque = sd.load_picture(next(tmp_path.iterdir()))
    assert pixels.shape == (64, 128, 3) and pixels.dtype == np.float32 and opaque.min() == 1
    if mode not in ("1", "P"):
        assert np.abs(pixels - grey[..., None] / 255).max() < 0.01
    assert pixels[:, 0].mean() < 0.1 and pixels[:, -1].mean() > 0.9


def test_a_picture_that_is_a_bomb_is_refused(tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    for option in ("--image", "--from-png"):
        done = cli(option, "bomb.png", cwd=tmp_path)
        assert done.returncode == 2 and "bomb.png" in done.stderr and "limit" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_damaged_picture_is_refused_by_name(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        bad = bytearray(whole)
        for _ in range(3):
            bad[rng.randrange(8, len(bad))] = rng.randrange(256)
        (tmp_path / "bad.png").write_bytes(bad[: rng.choice((len(bad), len(bad) // 2))])
        try:
            sd.load_picture(tmp_path / "bad.png")
        except ValueError as error:
            assert "bad.png" in str(error)


def test_a_photo_is_turned_and_resized_with_a_message(tmp_path, capsys):
    picture = Image.new("RGB", (100, 140), "white")
    picture.paste("red", (0, 0, 100, 20))
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned right by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels, _ = sd.load_picture(tmp_path / "a.jpg")
    assert pixels.shape == (128, 128, 3) and "140 x 100" in capsys.readouterr().err
    assert pixels[:, -5:, 1].mean() < 0.1 and pixels[:, :-30, 1].mean() > 0.9


# %% 9. Inpainting ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hole():
    mask = np.zeros((128, 128), np.float32)
    mask[40:104, 32:96] = 1
    return mask


@pytest.mark.parametrize("strength", [0.5, 0.95])
def test_inpainting_is_that_of_diffusers(tiny, tiny_pipeline, drawn, hole, strength):
    theirs = StableDiffusionInpaintPipeline(
        **{**tiny_pipeline.components, "scheduler": scheduler(DDIMScheduler)},
        requires_safety_checker=False,
    )
    truth = theirs(
        "a green tree", image=drawn, mask_image=Image.fromarray((hole * 255).astype(np.uint8)),
        strength=strength, num_inference_steps=20, guidance_scale=3, width=128, height=128,
        generator=torch.Generator().manual_seed(9), output_type="latent",
    ).images  # fmt: skip
    picture, _ = sd.load_picture(drawn)
    way = sd.Inpainting(tiny, picture, hole, strength)
    *_, x = tiny.generate_latents(
        "a green tree", steps=20, cfg=3, seed=9, sampler="ddim", variations=[way.vary]
    )
    assert_close(nchw(x), truth, 1e-4)


@pytest.mark.parametrize("name", sd.SAMPLERS)
def test_every_sampler_keeps_what_is_known(tiny, drawn, hole, name):
    """After each step: the known latents with the noise that was drawn first, to the digit."""
    picture, _ = sd.load_picture(drawn)
    way = sd.Inpainting(tiny, picture, hole, 0.8)
    rng = np.random.default_rng(1)
    drawn_noise = []

    def draw():
        drawn_noise.append(mx.array(rng.standard_normal((1, 16, 16, 4), np.float32)))
        return drawn_noise[-1]

    first = draw()
    x0 = tiny.encode(way.picture, first)
    timesteps = sd.SPACINGS.get(name, sd.make_timesteps)(10)
    walk = way.vary(sd.SAMPLERS[name])(lambda x, t: 0.3 * x, first, timesteps, draw)
    xs = list(walk)
    known = np.array(way.small)[0, :, :, 0] == 0
    assert known.sum() == 256 - 64
    if name not in ("euler-a", "lcm"):  # which bring new noise of their own
        for x, t in zip(xs[:-1], timesteps[-len(xs) + 1 :]):
            truth = np.array(sd.spoil(x0, drawn_noise[1], t))
            assert_close(np.array(x)[:, known], truth[:, known], 1e-4)
    assert np.array_equal(np.array(xs[-1])[:, known], np.array(x0)[:, known])


def test_what_was_not_to_be_painted_does_not_change(tiny, drawn, hole):
    picture = Image.fromarray(np.asarray(drawn))
    options = {"seed": 1, "steps": 6}
    mask = Image.fromarray((hole * 255).astype(np.uint8))
    before, after = (
        np.asarray(p, int) for p in (drawn, *tiny.inpaint("", picture, mask, **options))
    )
    near = sd.blur(hole[..., None], 4)[..., 0] > 0
    assert np.array_equal(before[~near], after[~near]) and near.mean() < 0.4
    assert np.abs(before - after)[hole > 0].mean() > 5
    # The same hole, said in two other ways, with nothing of what was in it.
    green, clear = np.asarray(drawn).copy(), np.dstack([drawn, 255 * (1 - hole)]).astype(np.uint8)
    green[hole > 0] = 0, 255, 0
    for cut in (Image.fromarray(green), Image.fromarray(clear)):
        (again,) = tiny.inpaint("", cut, **options)
        again = np.asarray(again, int)
        assert np.array_equal(before[~near], again[~near])
        r, g, b = again[hole > 0].T
        assert (g - r - b).max() < 200  # no green is left
    with pytest.raises(ValueError, match="nothing is to be painted"):
        tiny.inpaint("", picture)


def test_the_edge_is_soft_outside_the_mask_only(tiny):
    """Of a mask of any shape all is painted, also at the picture's border."""
    for hole in (np.s_[:, :], np.s_[20:21, 5:100], np.s_[0:30, 0:30], np.s_[40:41, 40:41]):
        mask = np.zeros((128, 128), np.float32)
        mask[hole] = 1
        way = sd.Inpainting(tiny, np.zeros((128, 128, 3), np.float32), mask)
        (painted,) = way.finish([Image.new("RGB", (128, 128), "white")])
        assert (np.asarray(painted)[mask > 0] == 255).all()
        far = sd.blur(mask[..., None], 6)[..., 0] == 0
        assert (np.asarray(painted)[far] == 0).all()


def test_a_hole_gets_the_colours_around_it_at_any_size():
    picture = Image.new("RGB", (500, 500), (200, 30, 40))
    picture.paste((0, 255, 0), (100, 100, 420, 420))
    pixels, opaque = sd.load_picture(picture, green_is_hole=True)  # resized to 512 x 512
    hole, filled = sd.find_mask(pixels, opaque)
    assert 0.35 < hole.mean() < 0.45
    assert np.abs(filled - np.array([200, 30, 40]) / 255).max() < 0.15  # no green, no black


def test_green_is_a_colour_in_masks_and_poses():
    pose = Image.new("RGB", (100, 100), (0, 255, 0))
    pixels, opaque = sd.load_picture(pose)
    assert pixels.shape == (128, 128, 3) and opaque.min() == 1
    assert np.array_equal(pixels[64, 64], [0, 1, 0])


def test_img2img_begins_with_holes_filled(tiny, drawn, hole):
    """From Python as from the command line: not with whatever lies below a transparent part."""
    picture = np.asarray(drawn) * (1 - hole[..., None]).astype(np.uint8)
    cut = Image.fromarray(np.dstack([picture, 255 * (1 - hole)]).astype(np.uint8))
    filled = sd.find_mask(*sd.load_picture(cut))[1]
    options = {"strength": 0.5, "steps": 2, "seed": 1}
    (picture,) = tiny.img2img("", cut, **options)
    (same,) = sd.paint_with("", sd.FromPicture(tiny, filled, 0.5), {"steps": 2, "seed": 1})
    assert np.array_equal(picture, same)
    assert np.abs(filled[hole > 0]).min() > 0


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_model_of_nine_channels_is_recognised_and_run_as_in_diffusers(
    tiny_pipeline, tmp_path, drawn, hole, strength
):
    config = dict(tiny_pipeline.unet.config) | {"in_channels": 9}
    config.pop("_use_default_values")  # which would make it 4 again
    unet = UNet2DConditionModel.from_config(config).eval()
    weights = tiny_pipeline.unet.state_dict()
    more = torch.randn(64, 5, 3, 3, generator=torch.Generator().manual_seed(0)) / 20
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], more], dim=1)
    unet.load_state_dict(weights)
    parts = tiny_pipeline.components | {"unet": unet, "scheduler": scheduler(DDIMScheduler)}
    theirs = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    truth = theirs(
        "a green tree", image=drawn, mask_image=Image.fromarray((hole * 255).astype(np.uint8)),
        strength=strength, num_inference_steps=10, guidance_scale=3, width=128, height=128,
        generator=torch.Generator().manual_seed(9), output_type="latent",
    ).images  # fmt: skip
    theirs.save_pretrained(tmp_path / "inpainting")
    flat = convert(tmp_path / "inpainting", dtype="float32", log=lambda line: None)
    picture, _ = sd.load_picture(drawn)
    for model in (sd.StableDiffusion(flat), sd.LowMemory(flat)):
        assert model.config["unet"]["channels"] == 9
        way = sd.Inpainting(model, picture, hole, strength)
        *_, x = way.sd.generate_latents(
            "a green tree", steps=10, cfg=3, seed=9, sampler="ddim", variations=[way.vary]
        )
        assert_close(nchw(x), truth, 1e-3)
    done = cli("--model", flat, "--output", tmp_path / "a.png")
    assert done.returncode == 2 and "--mask" in done.stderr


# %% 11. LoRA, new words, fewer layers -------------------------------------------------------------

RANK, ALPHA = 4, 2.5


def lora_layers(pipeline):
    """-> {(network, its layer's name): (out, in, kh, kw) or (out, in)}"""
    layers = {}
    for start, network in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        for name, module in network.named_modules():
            known = isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
            if known and not name.startswith(("conv_", "time_emb")):
                layers[start, name] = tuple(module.weight.shape)
    return layers


@pytest.fixture(scope="module")
def lora(tiny_pipeline):
    """A LoRA for all that a LoRA may change: {(network, layer): (up, down)}."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for key, (o, c, *window) in lora_layers(tiny_pipeline).items():
        up = torch.randn(o, RANK, generator=generator) * 0.05
        down = torch.randn(RANK, c, *window, generator=generator) / math.sqrt(c * math.prod(window))
        out[key] = up, down
    return out


def kohya(lora, text_start="lora_te"):
    out = {}
    for (network, layer), (up, down) in lora.items():
        layer = layer if network == "unet" else "text_model." + layer.removeprefix("text_model.")
        start = {"unet": "lora_unet", "text_encoder": text_start}[network]
        name = f"{start}_{layer.replace('.', '_')}"
        more = (1,) * (down.ndim - 2)
        out[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *more).clone()
        out[f"{name}.lora_down.weight"] = down.clone()
        out[f"{name}.alpha"] = torch.tensor(ALPHA)
    return out


LATER = "lora_linear_layer.up", "lora_linear_layer.down"


def spelled(lora, ends, text_ends):
    """diffusers' later names, with dots; these tell no alpha."""
    out = {}
    for (network, layer), (up, down) in lora.items():
        layer = layer if network == "unet" else "text_model." + layer.removeprefix("text_model.")
        more = (1,) * (down.ndim - 2)
        for end, tensor in zip(ends if network == "unet" else text_ends, (up, down)):
            tensor = tensor.reshape(*tensor.shape, *more) if tensor is up else tensor
            out[f"{network}.{layer}.{end}.weight"] = tensor.clone()
    return out


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_lora_changes_the_picture_as_in_diffusers(
    tiny_pipeline, their_tokenizer, lora, tmp_path, strength
):
    save_file(kohya(lora), tmp_path / "lora.safetensors")
    pipeline = StableDiffusionPipeline(
        **{name: copy.deepcopy(part) for name, part in tiny_pipeline.components.items()},
        requires_safety_checker=False,
    )
    pipeline.scheduler = scheduler(DDIMScheduler)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="it")
    pipeline.set_adapters("it", strength)
    options = {"num_inference_steps": 5, "guidance_scale": 3, "output_type": "np"}
    options |= {"width": 128, "height": 128}
    truth = pipeline("a red car", generator=torch.Generator().manual_seed(3), **options).images
    flat = convert(tmp_path / "lora.safetensors", dtype="float32", log=lambda line: None)
    changed = sd.StableDiffusion(changes=[sd.lora(flat, strength)])
    *_, x = changed.generate_latents("a red car", steps=5, seed=3, cfg=3, sampler="ddim")
    error = np.abs(np.array(changed.decode(x)) - truth).max()
    print(f"LoRA, strength {strength}: the worst pixel is off by {error:.1e}")
    assert error <= 1e-3
    *_, plain = sd.StableDiffusion().generate_latents(
        "a red car", steps=5, seed=3, cfg=3, sampler="ddim"
    )
    assert np.abs(np.array(x) - np.array(plain)).max() > 0.1
    frugal = sd.LowMemory(changes=[sd.lora(flat, strength)])
    *_, again = frugal.generate_latents("a red car", steps=5, seed=3, cfg=3, sampler="ddim")
    assert_close(again, x, 1e-4)


def test_several_loras_add_up(lora, tmp_path):
    flats = []
    for i, part in enumerate((dict(list(lora.items())[:40]), dict(list(lora.items())[20:]))):
        save_file(kohya(part), tmp_path / f"{i}.safetensors")
        flats.append(convert(tmp_path / f"{i}.safetensors", dtype="float32", log=lambda line: None))
    _, plain = sd.read_flat(sd.TINY)
    _, one = sd.lora(flats[0], 0.5)({}, plain)
    _, other = sd.lora(flats[1], 2)({}, plain)
    _, both = sd.lora(flats[1], 2)(*sd.lora(flats[0], 0.5)({}, plain))
    for name, weight in plain.items():
        total = one[name].astype(mx.float32) + other[name].astype(mx.float32) - weight
        assert_close(both[name], total, 1e-5, name)


def test_all_spellings_of_a_lora_are_the_same_flat_file(lora, run, tmp_path):
    save_file(kohya(lora), tmp_path / "kohya.safetensors")
    truth = run(tmp_path / "kohya.safetensors")
    assert run.config == {"kind": "lora"} and len(truth) == 2 * len(lora)
    assert f"{len(lora)} layers" in run.said
    files = {
        "te1": kohya(lora, "lora_te1"),
        "diffusers": spelled(lora, ("lora.up", "lora.down"), LATER),
        "peft": spelled(lora, ("lora_B", "lora_A"), ("lora_B", "lora_A")),
        "adapter": spelled(lora, ("lora_B.default", "lora_A.default"), ("lora_B", "lora_A")),
    }  # fmt: skip
    for kind, tensors in files.items():
        save_file(tensors, tmp_path / "other.safetensors")
        other = run(tmp_path / "other.safetensors")
        factor = ALPHA / RANK if kind in ("diffusers", "peft", "adapter") else 1  # no alpha: rank
        assert other.keys() == truth.keys()
        for name, tensor in other.items():
            factor_here = factor if name.endswith(".up") else 1
            assert torch.allclose(tensor * factor_here, truth[name], rtol=1e-6), (kind, name)
    for times in (1, 3):  # each network has an alpha of its own
        told = {"unet.r": RANK, "unet.lora_alpha": ALPHA}
        told |= {"text_encoder.r": RANK, "text_encoder.lora_alpha": times * ALPHA}
        metadata = {"lora_adapter_metadata": json.dumps(told)}
        save_file(files["peft"], tmp_path / "other.safetensors", metadata=metadata)
        for name, tensor in run(tmp_path / "other.safetensors").items():
            text = name.startswith("text_encoder.") and name.endswith(".up")
            assert torch.allclose(tensor, truth[name] * (times if text else 1), rtol=1e-6), name


def test_old_attention_processors_and_the_originals_names_are_read(lora, run, tmp_path):
    """diffusers' first LoRAs; and kohya's with the names of CompVis' UNet."""
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    attention = {key: pair for key, pair in lora.items() if key[1].endswith(ends)}
    save_file(kohya(attention), tmp_path / "kohya.safetensors")
    truth = run(tmp_path / "kohya.safetensors")
    old = {}
    for (_, layer), (up, down) in attention.items():
        place, _, which = layer.removesuffix(".0").rpartition(".")
        for end, tensor in (("up", up), ("down", down)):
            name = f"{place}.processor.{which}_lora.{end}.weight"
            old[name] = tensor.clone() * (ALPHA / RANK if end == "up" else 1)
    save_file(old, tmp_path / "old.safetensors")
    for name, tensor in run(tmp_path / "old.safetensors").items():
        assert torch.allclose(tensor, truth[name], rtol=1e-6), name
    compvis = {
        name.replace("down_blocks_0_attentions_1_", "input_blocks_2_1_"): tensor
        for name, tensor in kohya(attention).items()
        if "down_blocks_0_attentions_1_" in name
    }
    save_file(compvis, tmp_path / "compvis.safetensors")
    found = run(tmp_path / "compvis.safetensors")
    assert len(found) == len(compvis) * 2 // 3 > 0
    for name, tensor in found.items():
        assert torch.equal(tensor, truth[name]) and ".2.1." in name


def test_a_convolution_in_the_middle_is_applied_as_convolutions_are(tmp_path, run):
    """LoCon: down 1 x 1, the middle 3 x 3, up 1 x 1, one after the other."""
    generator = torch.Generator().manual_seed(0)
    o, c = 32, 16
    down, middle, up, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((4, c, 1, 1), (6, 4, 3, 3), (o, 6, 1, 1), (1, c, 9, 9))
    )
    conv = torch.nn.functional.conv2d
    truth = conv(conv(conv(x, down), middle, padding=1), up) * ALPHA / 4
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {"up": up, "mid": middle, "down": down}
    tensors = {f"{name}.lora_{part}.weight": t.float() for part, t in tensors.items()}
    save_file(tensors | {f"{name}.alpha": torch.tensor(ALPHA)}, tmp_path / "locon.safetensors")
    flat = convert(tmp_path / "locon.safetensors", dtype="float32", log=lambda line: None)
    weights = {"unet.middle.0.conv1.weight": mx.zeros((o, 3, 3, c))}
    (weight,) = sd.lora(flat, 2.0)({}, weights)[1].values()
    ours = sd.KERNELS["plain"]["conv2d"](nhwc(x.float()), weight, mx.zeros((o,)))
    assert_close(nchw(ours), 2 * truth, 1e-5)


@pytest.mark.parametrize(
    "shapes, says",
    [
        ({"lora_unet_a_b.lora_up": 4, "lora_unet_a_b.lora_down": 4}, ["another model", "a_b"]),
        ({"lora_unet_time_embedding_linear_1.lora_up": 4}, ["only up"]),
        ({"lora_te2_text_model_x.lora_up": 4}, ["SDXL"]),
        ({"lora_unet_conv_in.hada_w1_a": 4}, ["LoHa"]),
        ({"lora_unet_conv_in.dora_scale": 4}, ["DoRA"]),
        ({"lora_unet_conv_in.lora_up": 3, "lora_unet_conv_in.lora_down": 4}, ["cannot be", "3"]),
    ],
)
def test_a_lora_that_can_not_be_is_refused(shapes, says, tmp_path, capsys):
    tensors = {f"{name}.weight": torch.ones(4, width) for name, width in shapes.items()}
    save_file(tensors, tmp_path / "bad.safetensors")
    refused(capsys, tmp_path / "bad.safetensors", *says)


@pytest.mark.parametrize("text", ["{", "[1]", '{"alpha_pattern": {"a": 1}}'])
def test_a_lora_with_an_odd_config_is_refused(lora, text, tmp_path, capsys):
    metadata = {"lora_adapter_metadata": text}
    tensors = spelled(lora, ("lora_B", "lora_A"), ("lora_B", "lora_A"))
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    refused(capsys, tmp_path / "bad.safetensors", "LoRA" if "alpha" in text else "JSON")
    tensors = kohya(dict(list(lora.items())[:1]))
    tensors = {name: t[:0] if t.ndim else torch.ones(0) for name, t in tensors.items()}
    save_file(tensors, tmp_path / "empty.safetensors")
    refused(capsys, tmp_path / "empty.safetensors", "alpha")


def test_a_lora_for_another_width_is_refused_by_name(lora, tmp_path):
    wide = {("unet", "mid_block.resnets.0.conv1"): (torch.ones(640, 4), torch.ones(4, 640, 3, 3))}
    save_file(kohya(wide), tmp_path / "wide.safetensors")
    flat = convert(tmp_path / "wide.safetensors", log=lambda line: None)
    with pytest.raises(ValueError, match=r"another model: unet\.middle\.0\.conv1"):
        sd.StableDiffusion(changes=[sd.lora(flat)])
    with pytest.raises(ValueError, match="a lora is needed"):
        sd.StableDiffusion(changes=[sd.lora(sd.TINY)])
    with pytest.raises(ValueError, match="a model is needed"):
        sd.StableDiffusion(flat)


def test_a_textual_inversion_becomes_a_word(tiny, tiny_pipeline, their_tokenizer, run, tmp_path):
    """Against diffusers' load_textual_inversion; all forms of file are the same."""
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)) / 4
    pipeline = StableDiffusionPipeline(
        **tiny_pipeline.components
        | {"text_encoder": copy.deepcopy(tiny_pipeline.text_encoder)}
        | {"tokenizer": copy.deepcopy(their_tokenizer)},
        requires_safety_checker=False,
    )
    pipeline.load_textual_inversion({"<my-cat>": vectors}, token="<my-cat>")
    prompt = pipeline.maybe_convert_prompt("a red <my-cat> at night", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    truth = pipeline.text_encoder(ids).last_hidden_state
    param = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "my"}
    torch.save(param, tmp_path / "<my-cat>.pt")
    torch.save({"<my-cat>": vectors}, tmp_path / "learned_embeds.bin")
    save_file({"<my-cat>": vectors}, tmp_path / "learned.safetensors")
    save_file({"emb_params": vectors}, tmp_path / "<my-cat>.safetensors")
    for name in (
        "<my-cat>.pt",
        "learned_embeds.bin",
        "learned.safetensors",
        "<my-cat>.safetensors",
    ):
        (read,) = run(tmp_path / name).items()
        assert read[0] == "<my-cat>" and torch.equal(read[1], vectors), name
        assert run.config == {"kind": "words"}
    model = sd.StableDiffusion(changes=[sd.words(tmp_path / "out.safetensors")])
    assert_close(model.contexts(["a red <my-cat> at night"]), truth, 1e-5)
    frugal = sd.LowMemory(changes=[sd.words(tmp_path / "out.safetensors")])
    for one in (model, frugal, model):
        assert_close(one.contexts(["a red <my-cat> at night"]), truth, 1e-5)
        one.txt2img("<my-cat>", steps=1)
    with pytest.raises(ValueError, match="another text model"):
        save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "wide.safetensors")
        flat = convert(tmp_path / "wide.safetensors", log=lambda line: None)
        sd.StableDiffusion(changes=[sd.words(flat)])


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_reads_fewer_layers(tiny, tiny_pipeline, skip):
    ids = torch.tensor([tiny.tokenizer.encode("a red house")])
    text = tiny_pipeline.text_encoder
    hidden = text(ids, output_hidden_states=True).hidden_states[-skip]
    norm = (text.text_model if hasattr(text, "text_model") else text).final_layer_norm
    model = sd.StableDiffusion(changes=[sd.clip_skip(skip)])
    assert_close(model.contexts(["a red house"]), norm(hidden) if skip > 1 else text(ids)[0], 1e-5)
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="clip_skip"):
            sd.StableDiffusion(changes=[sd.clip_skip(wrong)])


# %% 12. ControlNet --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlnet(tiny_pipeline):
    theirs = ControlNetModel.from_unet(tiny_pipeline.unet)
    shake(theirs.controlnet_cond_embedding, seed=1)
    for i, layer in enumerate([*theirs.controlnet_down_blocks, theirs.controlnet_mid_block]):
        shake(layer, 0.3, seed=i)
    return theirs.eval()


def flat_controlnet(controlnet, folder):
    controlnet.save_pretrained(folder / "control")
    return convert(folder / "control", dtype="float32", log=lambda line: None)


def original_controlnet(controlnet, tiny_pipeline):
    """Its weights under the names of lllyasviel's files."""
    out, rest = {}, {}
    for name, tensor in controlnet.state_dict().items():
        if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(\w+)", name):
            out[f"control_model.zero_convs.{match[1]}.0.{match[2]}"] = tensor
        elif name.startswith("controlnet_mid_block."):
            out[name.replace("controlnet_mid_block.", "control_model.middle_block_out.0.")] = tensor
        elif name.startswith("controlnet_cond_embedding."):
            place, leaf = name.split(".", 1)[1].rsplit(".", 1)
            number = {"conv_in": 0, "conv_out": 14}.get(place)
            number = 2 * int(place[7:]) + 2 if number is None else number
            out[f"control_model.input_hint_block.{number}.{leaf}"] = tensor
        else:
            rest[name] = tensor
    shared = type("Part", (), {"state_dict": lambda self: rest})()
    empty = type("Part", (), {"state_dict": lambda self: {}})()
    names = train.original_names(empty, shared, empty)
    out |= {n.replace("model.diffusion_model.", "control_model."): t for n, t in names.items()}
    return out


def test_a_controlnet_steers_as_in_diffusers(tiny, tiny_pipeline, controlnet, drawn, tmp_path):
    """Two of them, with a weight each; with guidance and without."""
    second = copy.deepcopy(controlnet)
    shake(second.controlnet_cond_embedding, seed=9)
    flats = []
    for i, net in enumerate((controlnet, second)):
        (tmp_path / str(i)).mkdir()
        flats.append(flat_controlnet(net, tmp_path / str(i)))
    pipeline = StableDiffusionControlNetPipeline(
        **{**tiny_pipeline.components, "scheduler": scheduler(DDIMScheduler)},
        controlnet=[controlnet, second], requires_safety_checker=False,
    )  # fmt: skip
    other = drawn.transpose(Image.FLIP_LEFT_RIGHT)
    nets = [sd.ControlNet(flat) for flat in flats]
    pictures = [sd.load_picture(image)[0] for image in (drawn, other)]
    steered = tiny.controlled((nets[0], pictures[0], 1.0), (nets[1], pictures[1], 0.4))
    for cfg in (1, 3):
        truth = pipeline(
            "a red house", image=[drawn, other], num_inference_steps=5, guidance_scale=cfg,
            controlnet_conditioning_scale=[1.0, 0.4], width=128, height=128,
            generator=torch.Generator().manual_seed(3), output_type="np",
        ).images  # fmt: skip
        *_, x = steered.generate_latents("a red house", steps=5, seed=3, cfg=cfg, sampler="ddim")
        error = np.abs(np.array(tiny.decode(x)) - truth).max()
        print(f"two ControlNets, cfg {cfg}: the worst pixel is off by {error:.1e}")
        assert error <= 1e-3
        *_, plain = tiny.generate_latents("a red house", steps=5, seed=3, cfg=cfg, sampler="ddim")
        assert np.abs(np.array(x) - np.array(plain)).max() > 0.1


def test_a_controlnet_goes_with_low_memory_pictures_and_masks(
    tiny, frugal, controlnet, drawn, hole, tmp_path
):
    net = sd.ControlNet(flat_controlnet(controlnet, tmp_path))
    picture, _ = sd.load_picture(drawn)
    options = {"steps": 5, "seed": 3, "n_images": 2}
    for model in (tiny, frugal):
        model = model.controlled((net, picture, 1.0))
        ways = sd.FromPicture(model, picture, 0.6), sd.Inpainting(model, picture, hole)
        xs = []
        for way in ways:
            *_, x = model.generate_latents("a red house", variations=[way.vary], **options)
            xs.append(x)
        if model.__class__ is sd.StableDiffusion:
            truth = xs
    for x, expected in zip(xs, truth):
        assert_close(x, expected, 1e-4)


def test_both_forms_of_a_controlnet_are_the_same_flat_file(
    controlnet, tiny_pipeline, run, tmp_path
):
    controlnet.save_pretrained(tmp_path / "folder")
    truth = run(tmp_path / "folder")
    names = original_controlnet(controlnet, tiny_pipeline)
    numbers = {"unet": {"heads": [2] * 4, "groups": 16}}
    torch.save({"state_dict": names, "sd_config": numbers}, tmp_path / "control.pth")
    same(run(tmp_path / "control.pth"), truth)
    bare = {name.removeprefix("control_model."): t.contiguous() for name, t in names.items()}
    torch.save({"state_dict": bare, "sd_config": numbers}, tmp_path / "shuffle.pth")
    same(run(tmp_path / "shuffle.pth"), truth)
    assert run.config["pool"] and run.config["kind"] == "controlnet"


@pytest.mark.parametrize("numbers", [{"heads": [0] * 4}, {"groups": "x"}, {"widths": [1e9] * 4}])
def test_a_controlnet_whose_config_makes_no_sense_is_refused(controlnet, numbers, tmp_path):
    path = flat_controlnet(controlnet, tmp_path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    config["unet"] |= numbers
    metadata["config"] = json.dumps(config)
    mx.save_safetensors(str(tmp_path / "bad.safetensors"), mx.load(str(path)), metadata)
    with pytest.raises(ValueError, match="bad.safetensors has a config that can't be"):
        sd.ControlNet(tmp_path / "bad.safetensors")


def test_a_controlnet_for_another_model_is_refused(tiny, drawn, tmp_path):
    other = ControlNetModel(
        block_out_channels=(32, 32, 32, 32), attention_head_dim=2, cross_attention_dim=32
    )
    net = sd.ControlNet(flat_controlnet(other, tmp_path))
    with pytest.raises(ValueError, match="another model"):
        tiny.controlled((net, sd.load_picture(drawn)[0], 1.0))


def test_controls_add_up_however_they_are_given(tiny, controlnet, drawn, tmp_path):
    net, (picture, _) = sd.ControlNet(flat_controlnet(controlnet, tmp_path)), sd.load_picture(drawn)
    one = tiny.controlled((net, picture, 0.3)).controlled((net, picture, 0.7))
    both = tiny.controlled((net, picture, 1.0))
    xs = [list(m.generate_latents("a tree", steps=2))[-1] for m in (one, both)]
    assert_close(*xs, 1e-4)


def test_a_controlnet_for_the_mood_corrects_all_places_alike(
    tiny_pipeline, controlnet, drawn, tmp_path
):
    pooled = copy.deepcopy(controlnet)
    pooled.register_to_config(global_pool_conditions=True)
    net = sd.ControlNet(flat_controlnet(pooled, tmp_path))
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, WIDTH)
    picture = torch.rand(1, 3, 128, 128)
    down, middle = pooled(x, 500, context, picture.repeat(2, 1, 1, 1), return_dict=False)
    ours = net(nhwc(x), 500, mx.array(context.numpy()), net.look(nhwc(picture)))
    for a, b in zip(ours, [*down, middle]):
        b = b.mean((2, 3), keepdim=True) if b.shape[2] > 1 else b
        assert_close(nchw(a), b, 1e-5)


# %% 13. Prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, pieces",
    [  # the first eight are the examples in AUTOMATIC1111's own documentation of its parser
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1),
                ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1),
            ],
        ),
        ("a cat BREAK a dog", [("a cat", 1.0), ("BREAK", None), ("a dog", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("a) b] c:1.3) 10:30", [("a) b] c:1.3) 10:30", 1.0)]),
        (r"\\ \( \n", [(r"\ ( \n", 1.0)]),
        ("", []),
        ("((((((", []),
        ("(a:0)", [("a", 0.0)]),
        ("(a:-.5)", [("a", -0.5)]),
    ],
)  # fmt: skip
def test_brackets_weigh_as_elsewhere(prompt, pieces):
    found = sd.weigh(prompt)
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces]
    for (_, weight), (_, truth) in zip(found, pieces):
        assert weight == truth or weight == pytest.approx(truth)


def test_a_prompt_without_marks_is_read_as_clip_reads_it(tiny):
    for prompt in ("", "a red house", "two cats, 3 dogs! " * 4):
        ours, plain = tiny.contexts([prompt, ""]), sd.plain_contexts(tiny, [prompt, ""])
        assert mx.array_equal(ours, plain)


def test_weights_scale_vectors_and_keep_their_mean(tiny):
    """(C z) m / m': written out in float64."""
    plain = np.array(sd.plain_contexts(tiny, ["a red house"]), np.float64)
    for prompt, weight in (("a (red:1.5) house", 1.5), ("a [red] house", 1 / 1.1)):
        weights = np.ones((1, 77, 1))
        weights[:, 2] = weight  # behind START and "a"
        truth = plain * weights * plain.mean() / (plain * weights).mean()
        assert_close(tiny.contexts([prompt]), truth, 1e-5)


def test_long_prompts_are_read_in_chunks_of_75(tiny, monkeypatch):
    words = [f"word {i % 10}" for i in range(60)]  # two tokens each
    context = tiny.contexts([" ".join(words), "a tree"])
    assert context.shape == (2, 154, WIDTH)
    text = " ".join(" ".join(words).split())
    ids = [i for _, _, word in tiny.tokenizer.words(text) for i in word]
    assert len(ids) == 120
    rows = [[49406, *ids[:75], 49407], [49406, *ids[75:], *[49407] * 31]]
    truth = tiny.text_encoder(mx.array(rows)).reshape(1, 154, WIDTH)
    assert_close(context[:1], truth, 1e-5)
    empty = sd.plain_contexts(tiny, ["a tree", ""])
    assert_close(context[1:], empty.reshape(1, 154, WIDTH), 1e-5)
    broken = tiny.contexts(["a red house BREAK at night"])
    assert_close(
        broken, sd.plain_contexts(tiny, ["a red house", "at night"]).reshape(1, 154, WIDTH), 1e-5
    )
    monkeypatch.setattr(tiny, "plain_prompt", True, raising=False)
    assert tiny.contexts([" ".join(words)]).shape == (1, 77, WIDTH)
    assert len(tiny.txt2img("(a tree) " * 90, steps=1)) == 1


def test_long_prompts_paint_as_in_diffusers_with_their_embeddings(tiny, tiny_pipeline):
    prompt = "a red house, " * 30
    context = torch.from_numpy(np.array(tiny.contexts([prompt, ""])))
    tiny_pipeline.scheduler = scheduler(DDIMScheduler)
    truth = tiny_pipeline(
        prompt_embeds=context[:1], negative_prompt_embeds=context[1:], num_inference_steps=5,
        guidance_scale=3, width=128, height=128, generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images  # fmt: skip
    *_, x = tiny.generate_latents(prompt, steps=5, seed=3, cfg=3, sampler="ddim")
    assert np.abs(np.array(tiny.decode(x)) - truth).max() <= 1e-3


# %% 14. Safety checker ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker():
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 224, "patch_size": 14, "projection_dim": 48,
        "hidden_act": "quick_gelu",
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision, projection_dim=48)
    return shake(StableDiffusionSafetyChecker(config).eval())


def test_the_safety_checker_is_that_of_diffusers(tiny_pipeline, checker, tmp_path):
    rng = np.random.default_rng(0)
    sizes = ((224, 224), (300, 200), (128, 128), (97, 251), (512, 768))
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for w, h in sizes]
    see = CLIPImageProcessor()  # the one that resizes with Pillow, as torchvision is not here
    pixels = see(pictures, return_tensors="pt").pixel_values
    seen = checker.visual_projection(checker.vision_model(pixels)[1])
    cosine = torch.nn.functional.cosine_similarity(seen[:, None], checker.concept_embeds, dim=2)
    special = torch.nn.functional.cosine_similarity(
        seen[:, None], checker.special_care_embeds, dim=2
    )
    path = None
    for case in range(6):  # thresholds so that some are flagged, some only by the extra caution
        checker.concept_embeds_weights.copy_(cosine.max(0).values + 0.004 * (case - 2))
        checker.special_care_embeds_weights.copy_(special.max(0).values - 0.002 * (case % 3 - 1))
        if path is None:
            tiny_pipeline.save_pretrained(tmp_path / "model")
        checker.save_pretrained(tmp_path / "model" / "safety_checker")
        path = convert(tmp_path / "model", dtype="float32", log=lambda line: None)
        model = sd.StableDiffusion(path)
        _, truth = checker(clip_input=pixels, images=np.zeros((len(pictures), 8, 8, 3)))
        shown, flagged = model.checked(pictures)
        assert flagged == [i for i, flag in enumerate(truth) if flag], case
        for i, (picture, before) in enumerate(zip(shown, pictures)):
            assert picture.getextrema() == ((0, 0),) * 3 if i in flagged else picture is before
    for picture, truth in zip(pictures, seen):
        assert_close(model.safety.look(picture)[0], truth, 1e-5)
    # From the command line: all is flagged, and it says so; and it can be turned off.
    checker.concept_embeds_weights.fill_(-2)
    checker.save_pretrained(tmp_path / "model" / "safety_checker")
    path = convert(tmp_path / "model", log=lambda line: None)
    done = cli("--model", path, "--steps", 1, "--seed", 5, "--output", tmp_path / "a.png")
    assert done.returncode == 0 and "blacked out seed 5" in done.stderr
    assert Image.open(tmp_path / "a.png").getextrema() == ((0, 0),) * 3
    more = ("--no-safety-check", "--output", tmp_path / "b.png")
    assert "black" not in cli("--model", path, "--steps", 1, *more).stderr
    assert Image.open(tmp_path / "b.png").getextrema() != ((0, 0),) * 3


# %% 15. Random numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 18), 31, 33, 100, 1023, 16384, 16389])
@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32 + 7, -3])
def test_noise_is_torchs(n, seed):
    """And what comes after it."""
    generator, draw = torch.Generator().manual_seed(seed), sd.RNGS["torch"](seed)
    for shape in ((n,), (n,), (1, 4, 3, 5), (3,)):
        truth = torch.randn(shape, generator=generator).numpy()
        noise = draw(shape)
        assert noise.shape == truth.shape
        assert np.abs(noise - truth).max() < 1e-6  # torch's own log is an approximation


def test_noise_is_numpys():
    truth, draw = np.random.RandomState(5), sd.RNGS["numpy"](5)
    for shape in ((1, 4, 8, 8), (3,)):
        assert np.array_equal(draw(shape), truth.standard_normal(shape).astype(np.float32))


def test_philox_is_the_papers_and_its_noise_that_of_a_gpu():
    """The first three: known answers published with Random123. The last: torch on a GPU, seed 0."""
    for counter, key, answer in (
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        words = sd.philox(np.array(counter, np.uint32)[:, None], key)[:, 0]
        assert " ".join(f"{word:08x}" for word in words) == answer
    draw = sd.RNGS["philox"](0)
    assert_close(draw((5,)), [-0.92466259, -0.42534415, -2.64384580, 0.14518388, -0.12086647], 1e-6)
    assert abs(draw((5,))[0] + 0.92466259) > 1e-3  # the second call is another


@pytest.mark.parametrize("name", sd.RNGS)
def test_noise_is_normal_and_another_for_each_seed_and_call(name):
    draw = sd.RNGS[name](1)
    a, b, c = draw((1, 4, 64, 64)), draw((1, 4, 64, 64)), sd.RNGS[name](2)((1, 4, 64, 64))
    for x in (a, b, c):
        assert x.dtype == np.float32 and abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.03
    for x, y in ((a, b), (a, c)):
        assert abs((x * y).mean()) < 0.03
    assert np.array_equal(a, sd.RNGS[name](1)((1, 4, 64, 64)))
    sd.RNGS[name](-1)((4,)), sd.RNGS[name](2**70)((4,))


# %% 16. The same, faster --------------------------------------------------------------------------


def kernel_cases():
    rng = np.random.default_rng(0)
    normal = lambda *shape: mx.array(rng.standard_normal(shape, dtype=np.float32))
    yield "linear", (normal(2, 77, 48), normal(96, 48) / 7, normal(96))
    yield "linear", (normal(5, 48), normal(96, 48) / 7)
    for h, w, c, o in (
        (16, 16, 32, 48),
        (32, 64, 64, 16),
        (20, 36, 16, 32),
        (10, 7, 32, 32),
        (8, 8, 4, 16),
    ):
        yield "conv2d", (normal(2, h, w, c), normal(o, 3, 3, c) / (3 * math.sqrt(c)), normal(o))
        yield (
            "conv2d",
            (normal(1, h, w, c), normal(o, 3, 3, c) / (3 * math.sqrt(c)), normal(o), 2, 1),
        )
        yield (
            "conv2d",
            (normal(1, h + 1, w + 1, c), normal(o, 3, 3, c) / (3 * math.sqrt(c)), normal(o), 2, 0),
        )
    for scale, offset in ((1, 0), (1e-3, 0), (1, 10), (50, -3)):
        x = normal(2, 40, 33, 64) * scale + offset
        yield "group_norm", (x, normal(64), normal(64), 32, 1e-5)
        yield "group_norm", (x, normal(64), normal(64), 8, 1e-6)
        yield "layer_norm", (x.reshape(2, -1, 64), normal(64), normal(64))
        yield "norm_silu", (x, normal(64), normal(64), 32, 1e-5)
    yield "geglu", (normal(2, 77, 48), normal(192, 48) / 7, normal(192))
    yield "geglu", (normal(2, 700, 24), normal(1400, 24) / 5, normal(1400))
    for n, m, c, heads in ((77, 77, 64, 4), (600, 600, 32, 2), (1100, 77, 40, 8), (1, 1, 8, 1)):
        yield "attention", (normal(2, n, c) * 3, normal(2, m, c) * 3, normal(2, m, c), heads)
    yield "attention", (normal(2, 77, 64), normal(2, 77, 64), normal(2, 77, 64), 4, True)
    x, w = normal(1, 32, 17, 33).transpose(0, 2, 3, 1), normal(16, 3, 3, 32) / 17
    for stride, padding in ((1, 1), (2, 1), (2, 0)):  # not contiguous
        yield "conv2d", (x, w, normal(16), stride, padding)
    for name in ("silu", "gelu", "quick_gelu"):
        yield name, (normal(3, 50, 700) * 4,)
        yield name, (mx.array([-np.inf, -200, -88.8, -15, -1e-8, 0, 1e-8, 15, 200]),)


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 * -inf, in the plain ones too
@pytest.mark.parametrize("kind, little", [("cpu", sd.LITTLE), ("cpu", 0), ("gpu", 0)])
def test_fast_functions_equal_the_plain_ones(kind, little, monkeypatch):
    monkeypatch.setattr(sd, "LITTLE", little)  # 0: on all cores, however little it is
    seen = set()
    for name, arguments in kernel_cases():
        if name not in sd.KERNELS[kind]:
            continue
        seen.add(name)
        fast, plain = (np.array(sd.KERNELS[k][name](*arguments)) for k in (kind, "plain"))
        assert np.array_equal(np.isnan(fast), np.isnan(plain)), name  # 0 * -inf
        fast, plain = np.nan_to_num(fast), np.nan_to_num(plain)
        most = {"conv2d": 2e-5, "group_norm": 1e-5, "norm_silu": 1e-5}.get(name, 3e-6)
        assert_close(fast, plain, most, f"{name} {[getattr(a, 'shape', a) for a in arguments]}")
    assert seen == set(sd.KERNELS[kind])


def test_a_mean_far_from_zero_costs_the_fast_norm_no_digits():
    """Against float64; the plain one, with its float32 sums, is off by some 1e-5 here."""
    x = torch.randn(2, 64, 40, 33, generator=torch.Generator().manual_seed(0)) + 100
    w, b = torch.full((64,), 1.5), torch.full((64,), 0.25)
    truth = torch.nn.functional.group_norm(x.double(), 32, w.double(), b.double(), 1e-5)
    ours = sd.cpu_group_norm(nhwc(x), mx.array(w.numpy()), mx.array(b.numpy()), 32, 1e-5)
    assert_close(nchw(ours), truth, 3e-6)  # 100 in float32 has steps of 8e-6; the largest y is 7


def test_half_precisions_paint_the_same_picture(tiny):
    truth = np.asarray(tiny.txt2img("a red house", seed=1, steps=10)[0], int)
    for dtype, most in (("float16", 2), ("bfloat16", 12)):  # mean difference in levels of 255
        picture = np.asarray(
            sd.StableDiffusion(dtype=dtype).txt2img("a red house", seed=1, steps=10)[0], int
        )
        assert np.abs(picture - truth).mean() < most, dtype


@pytest.mark.parametrize("size", [-60, 60])
def test_scores_beyond_what_exp_can_take(size):
    """All scores near -170 or 170, where float32 has steps of 1.5e-5; so a share is off by that."""
    rng = np.random.default_rng(0)
    noise = [mx.array(rng.standard_normal((2, 300, 8), np.float32)) for _ in range(3)]
    arguments = size + noise[0] / 100, 1 + noise[1] / 100, noise[2], 1
    fast, plain = (sd.KERNELS[kind]["attention"](*arguments) for kind in ("cpu", "plain"))
    assert_close(fast, plain, 3e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_16_bits_are_widened_exactly(dtype):
    """All 65,536 of them, but for infinities and what is not a number."""
    bits = np.arange(2**16, dtype=np.uint16)
    weights = mx.array(bits).view(getattr(mx, dtype))
    truth = np.array(weights.astype(mx.float32))
    finite = np.isfinite(truth)
    assert finite.sum() > 60_000
    assert np.array_equal(sd.widen(sd.raw(weights))[finite], truth[finite])
    for name, arguments in kernel_cases():
        if name in ("linear", "geglu", "conv2d"):
            x, weight, *rest = arguments
            weight = weight.astype(getattr(mx, dtype))
            fast = sd.KERNELS["cpu"][name](x, weight, *rest)
            wide = sd.KERNELS["cpu"][name](x, weight.astype(mx.float32), *rest)
            assert fast.dtype == mx.float32 and mx.array_equal(fast, wide)


def test_equal_halves_of_a_batch_are_computed_once():
    x = mx.random.normal((2, 50, 16))
    w = mx.random.normal((8, 16))
    seen = []
    once = sd.twins(lambda x, w: (seen.append(len(x)), x @ w.T)[1])
    for batch, expected in (
        (mx.concatenate([x, x]), 2),
        (x, 2),
        (x[:1], 1),
        (mx.concatenate([x, x[:1], x[1:] + 1e-6]), 4),
    ):
        assert mx.array_equal(once(batch, w), batch @ w.T) and seen.pop() == expected


def test_matrix_products_keep_their_threads_outside():
    """During a block OpenBLAS has one thread; after it as many as before, also after an error."""
    get = sd.openblas("get")
    before, inside = get(), []
    sd.share(lambda i, j: inside.append((get(), i, j)), range(3), "ab", work=sd.LITTLE)
    assert sorted(inside) == [(1, i, j) for i in range(3) for j in "ab"]
    with pytest.raises(ZeroDivisionError):
        sd.share(lambda i: 1 / i, range(50), work=sd.LITTLE)
    with sd.ONE_THREAD_EACH, sd.ONE_THREAD_EACH:
        assert get() == 1
    assert get() == before == sd.cores()


def test_the_fast_functions_do_without_openblas_and_with_many_cores(monkeypatch):
    cases = [case for case in kernel_cases() if case[0] in ("linear", "geglu", "conv2d")]
    truth = [sd.KERNELS["plain"][name](*arguments) for name, arguments in cases]
    monkeypatch.setattr(sd, "LITTLE", 0)
    for cores in (1, 3, 64):
        monkeypatch.setattr(sd, "cores", lambda cores=cores: cores)
        sd.pool.cache_clear()
        for (name, arguments), expected in zip(cases, truth):
            assert_close(sd.KERNELS["cpu"][name](*arguments), expected, 2e-5)
    sd.pool.cache_clear()


def test_threads_of_the_caller_do_not_disturb_each_other(tiny, monkeypatch):
    """Two pictures painted at the same time in one process are those painted one by one.

    To the bit where each product has one thread. Of little work OpenBLAS may use several, and then
    it adds up in another order.
    """
    options = {"steps": 3, "width": 64, "height": 64}

    def paint(seed):
        return np.asarray(tiny.txt2img("a tree", seed=seed, **options)[0], int)

    for little, most in ((0, 0), (sd.LITTLE, 1)):
        monkeypatch.setattr(sd, "LITTLE", little)
        truth = [paint(seed) for seed in (1, 2)]
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(paint, (1, 2))
            assert all(np.abs(a - b).max() <= most for a, b in zip(both, truth))


@pytest.mark.full
def test_the_unet_as_one_graph_is_the_unet(tiny, kernels, monkeypatch):
    """What runs on a GPU, here on MLX's CPU device, for which it needs a C++ compiler."""
    kernels("gpu")
    monkeypatch.setattr(sd, "on_cpu", lambda: False)
    rng = np.random.default_rng(0)
    x = mx.array(rng.standard_normal((2, 16, 16, 4), np.float32))
    context = tiny.text_encoder(mx.array([tiny.tokenizer.encode(p) for p in ("", "a red house")]))
    graph = sd.compiled(tiny.unet)
    assert graph is not tiny.unet
    for t in (981, 1):
        assert_close(graph(x, t, context), tiny.unet(x, t, context), 1e-5)


# %% 17. Files, and less memory --------------------------------------------------------------------


@pytest.fixture(scope="session")
def frugal():
    return sd.LowMemory()


@pytest.mark.parametrize("cfg", [1, 3])
def test_low_memory_paints_the_same_pictures(tiny, frugal, cfg):
    options = {"seed": 7, "steps": 4, "cfg": cfg, "n_images": 2, "negative_prompt": "a tree"}
    for _ in range(2):  # the second time with weights that were let go and read again
        *_, x = tiny.generate_latents("a red house", **options)
        *_, ours = frugal.generate_latents("a red house", **options)
        assert_close(ours, x, 1e-4)  # matrix products of another size round otherwise
        assert_close(frugal.decode(x), tiny.decode(x), 1e-4)
        pictures = tiny.decode(x)
        assert_close(frugal.encode(pictures), tiny.encode(pictures), 1e-4)


def test_low_memory_keeps_one_network_in_memory():
    """What MLX holds: first nothing, then the UNet, then the half of the VAE that decodes."""

    def size(network, *parts):
        named = tree_flatten(network.parameters())
        return sum(p.nbytes for name, p in named if name.startswith(parts or ""))

    mx.clear_cache()
    before = mx.get_active_memory()
    model = sd.LowMemory()
    text, unet = size(model.text_encoder.network), size(model.unet.network)
    decoder = size(model.vae.network, "decoder", "post_quant")
    little = 2**20  # latents, the context
    assert min(text, unet, decoder) > little
    assert mx.get_active_memory() - before < little
    for x in model.generate_latents("a red house", steps=2):
        assert unet <= mx.get_active_memory() - before < unet + little
    mx.eval(model.decode(x))
    assert decoder <= mx.get_active_memory() - before < decoder + little
    way = sd.FromPicture(model, np.zeros((128, 128, 3), np.float32), 1.0)
    for x in model.generate_latents("a red house", steps=2, variations=[way.vary]):
        assert unet <= mx.get_active_memory() - before < unet + little  # nor the half that encodes


def test_a_function_of_single_places_is_the_same_in_tiles():
    """So the ramps' weights sum to one at each place, whatever the sizes."""
    rng = np.random.default_rng(0)
    for h, w in ((8, 8), (9, 8), (16, 31), (8, 40), (50, 17)):
        x = mx.array(rng.standard_normal((2, h, w, 3), np.float32))
        double = lambda x: mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
        assert_close(sd.in_tiles(double, x, 8, 1, 2), double(x), 1e-6)
        halve = lambda x: x[:, ::2, ::2]
        assert_close(sd.in_tiles(halve, double(x), 8, 2, 1), x, 1e-6)


def test_no_tile_is_larger_than_asked():
    seen = set()
    sd.in_tiles(lambda x: (seen.add(x.shape[1:3]), x)[1], mx.zeros((1, 20, 12, 1)), 8, 1, 1)
    assert seen == {(8, 8)}


def test_tiles_of_the_vae_leave_no_seam(tiny, frugal):
    """What tiles change is small, and steps no more where a tile begins or ends than nearby."""
    *_, x = tiny.generate_latents("a red house", steps=10, width=256, height=256)
    whole, tiles = np.array(tiny.decode(x)), np.array(frugal.decode(x))
    error = tiles - whole
    print(f"decoded in tiles: off by {np.abs(error).mean() * 255:.1f} levels of 255 on average")
    assert 0 < np.abs(error).mean() < 4 / 255
    for axis in (1, 2):
        steps = np.abs(np.diff(error, axis=axis)).mean((0, 3 - axis, 3))
        for line in (63, 127, 191):  # tiles of 128 begin at 0, 64 and 128
            around = np.delete(steps[line - 4 : line + 5], 4)
            assert steps[line] < 1.5 * around.mean(), line
    latents, truth = np.array(frugal.encode(whole)), np.array(tiny.encode(whole))
    assert 0 < np.abs(latents - truth).mean() < 0.1 * np.abs(truth).mean()


# %% 18. Command line ------------------------------------------------------------------------------


def cli(*args, cwd=None, script="sd.py"):
    command = [sys.executable, HERE / script, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


def test_a_picture_carries_what_makes_it_again(tmp_path):
    options = (
        "--prompt", "a red house, at night", "--negative-prompt", "a tree: café", "--seed", 0,
        "--cfg", 0.5, "--steps", 3, "--width", 192, "--sampler", "ddim",
    )  # fmt: skip
    first = cli(*options, "--output", tmp_path / "a.png")
    assert first.returncode == 0, first.stderr
    assert "step 3/3" in first.stderr and "s left" in first.stderr and "a.png" in first.stdout
    picture = Image.open(tmp_path / "a.png")
    prompt, negative, settings = picture.text["parameters"].split("\n")
    told = dict(re.findall(r"(\w[\w ]*): ([^,]+)", settings))
    width, height = told["Size"].split("x")
    again = cli(
        "--prompt", prompt, "--negative-prompt", negative.removeprefix("Negative prompt: "),
        "--seed", told["Seed"], "--cfg", told["CFG scale"], "--steps", told["Steps"],
        "--width", width, "--height", height, "--sampler", told["Sampler"].lower(),
        "--rng", told["RNG"],
        "--dtype", told["dtype"], "--output", tmp_path / "b.png",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert Image.open(tmp_path / "b.png") == picture and picture.size == (192, 128)


def test_low_memory_is_an_option(tmp_path):
    for name, more in (("a.png", ()), ("b.png", ("--low-memory",))):
        done = cli("--steps", 2, "--output", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    a, b = (np.asarray(Image.open(tmp_path / name), int) for name in ("a.png", "b.png"))
    assert np.abs(a - b).max() <= 1


def test_an_existing_picture_is_never_lost(tmp_path):
    (tmp_path / "out.png").write_text("mine")
    assert cli("--steps", 1, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out.png").read_text() == "mine"
    assert Image.open(tmp_path / "out-2.png").size == (128, 128)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-2.png", "out.png"]


def test_several_pictures_come_as_files_or_as_one_grid(tmp_path):
    assert (
        cli("--steps", 1, "--n-images", 3, "--seed", 5, "--output", tmp_path / "a.png").returncode
        == 0
    )
    files = [Image.open(tmp_path / name) for name in ("a.png", "a-2.png", "a-3.png")]
    assert [re.search(r"Seed: (\d+)", f.text["parameters"])[1] for f in files] == ["5", "6", "7"]
    assert (
        cli(
            "--steps",
            1,
            "--n-images",
            3,
            "--n-rows",
            2,
            "--seed",
            5,
            "--output",
            tmp_path / "g.png",
        ).returncode
        == 0
    )
    sheet = Image.open(tmp_path / "g.png")
    assert sheet.size == (256, 256)
    assert np.array_equal(np.asarray(sheet.crop((0, 128, 128, 256))), np.asarray(files[2]))


RED_HOUSE = str(HERE / "tiny" / "red-house.png")


@pytest.mark.parametrize(
    "options, says",
    [
        (["--width", "500"], ["500", "448 or 512"]),
        (["--height", "0"], ["0", "64"]),
        (["--width", "-64"], ["-64"]),
        (["--steps", "0"], ["steps 0", "at most 999"]),
        (["--steps", "1000"], ["1000"]),
        (["--steps", "many"], ["many"]),
        (["--cfg", "nan"], ["nan"]),
        (["--n-images", "0"], ["0"]),
        (["--n-images", "2", "--n-rows", "3"], ["3", "2"]),
        (["--n-rows", "0"], ["0"]),
        (["--sampler", "euler9"], ["euler9", "plms"]),
        (["--rng", "dice"], ["dice", "torch"]),
        (["--dtype", "int8"], ["int8", "float16"]),
        (["--model", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--model", "."], []),
        (["--output", "a/b/c.png"], ["a/b"]),
        (["--output", "picture.jpg"], ["picture.jpg", ".png"]),
        (["--output", ""], [".png"]),
        (["--output", ".png"], [".png"]),
        (["--output", "/proc/a.png"], ["--output /proc/a.png"]),
        (["--image", "nowhere.png"], ["no file nowhere.png"]),
        (["--clip-skip", "9"], ["9", "at most 4"]),
        (["--image", RED_HOUSE, "--steps", "1"], ["strength 0.75", "steps 1"]),
        (["--output", "x" * 250 + ".png"], ["too long"]),
        (["--output", "x" * 300 + "/a.png"], ["xxx"]),
        (["--width", "6400000", "--height", "6400000"], ["memory"]),
        (["--nonsense"], ["--nonsense"]),
        (["--image", "nowhere.png"], ["nowhere.png"]),
        (["--image", str(HERE / "sd.py")], ["sd.py"]),
        (["--image", RED_HOUSE, "--strength", "0"], ["0", "at most 1"]),
        (["--image", RED_HOUSE, "--strength", "nan"], ["nan"]),
        (["--image", RED_HOUSE, "--strength", "0.01"], ["0.01", "steps"]),
        (["--image", RED_HOUSE, "--width", "100"], ["100", "64 or 128"]),
        (["--image", RED_HOUSE, "--width", "0"], ["width 0"]),
        (["--image", RED_HOUSE, "--height", "-64"], ["height -64"]),
        (["--control-image", RED_HOUSE, "--controlnet", "a:nan"], ["a:nan"]),
        (["--mask", "a.png"], ["--mask", "--image"]),
        (["--strength", "0.5"], ["--strength", "--image"]),
        (["--image", RED_HOUSE, "--mask", "nowhere.png"], ["nowhere.png"]),
        (["--lora", "nowhere.safetensors:0.5"], ["nowhere.safetensors"]),
        (["--lora", str(HERE / "tiny" / "tiny.safetensors")], ["tiny.safetensors", "lora"]),
        (["--controlnet", "a.safetensors"], ["--control-image"]),
        (["--controlnet", "a.safetensors", "--control-image", RED_HOUSE], ["a.safetensors"]),
        (["--words", "nowhere.pt"], ["nowhere.pt"]),
        (["--clip-skip", "0"], ["clip_skip 0"]),
        (["--clip-skip", "9"], ["clip_skip 9"]),
        (["--save-every", "0"], ["--save-every 0"]),
        (["--decode-batch", "-1"], ["--decode-batch -1"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["--prompts", os.devnull], ["empty"]),
        (["--prompts", RED_HOUSE], ["red-house.png"]),
        (["--prompts", "a.txt", "--prompt", "b"], ["--prompts"]),
        (["--from-png", "nowhere.png"], ["no file nowhere.png"]),
        (["--from-png", str(HERE / "sd.py")], ["sd.py"]),
        (["--from-png", str(HERE / "tiny" / "twelve.png")], ["twelve.png"]),
        (["--sampler", "lcm", "--steps", "51"], ["lcm", "50"]),
        (["--seed", "1.5"], ["1.5"]),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_message_and_status_2(options, says, tmp_path):
    result = cli(*options, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and "sd.py: " in result.stderr
    assert all(text in result.stderr for text in says), result.stderr
    assert not list(tmp_path.iterdir())


def test_a_picture_can_be_begun_with_and_painted_into(tmp_path, hole):
    start = tmp_path / "start.png"
    assert cli("--steps", 2, "--output", start).returncode == 0
    done = cli("--image", start, "--steps", 8, "--strength", 0.5, "--output", tmp_path / "b.png")
    assert done.returncode == 0 and "step 4/4" in done.stderr
    text = Image.open(tmp_path / "b.png").text["parameters"]
    assert "Denoising strength: 0.5" in text and str(start) in text and text.startswith("\nSteps")
    Image.fromarray((hole * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    mask = ("--mask", tmp_path / "mask.png", "--steps", 2)
    done = cli("--image", start, *mask, "--output", tmp_path / "c.png")
    assert done.returncode == 0 and "painting 25% of start.png" in done.stderr
    a, c = (
        np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("start.png", "c.png")
    )
    assert np.array_equal(a[:30], c[:30]) and not np.array_equal(a, c)


def test_files_of_others_are_converted_and_used(tmp_path, lora, controlnet):
    save_file(kohya(lora), tmp_path / "style.safetensors")
    controlnet.save_pretrained(tmp_path / "edges")
    save_file({"emb_params": torch.randn(2, WIDTH)}, tmp_path / "thing.safetensors")
    options = (
        "--lora", "style.safetensors:0.5", "--words", "thing.safetensors", "--clip-skip", 2,
        "--controlnet", "edges:0.7", "--control-image", RED_HOUSE,
        "--prompt", "a (thing:1.2)", "--steps", 2,
    )  # fmt: skip
    done = cli(*options, "--output", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "style.flat.safetensors").is_file() and "Converting" in done.stderr
    done = cli(*options, "--output", "b.png", cwd=tmp_path)
    assert done.returncode == 0 and "Converting" not in done.stderr
    done = cli("--prompt", "a (thing:1.2)", "--steps", 2, "--output", "c.png", cwd=tmp_path)
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in "abc")
    assert np.array_equal(a, b) and np.abs(a - c).mean() > 3
    # And all of it again from the picture alone, with one thing changed.
    done = cli("--from-png", "a.png", "--output", "d.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(a, np.asarray(Image.open(tmp_path / "d.png")))
    assert Image.open(tmp_path / "d.png").text == Image.open(tmp_path / "a.png").text
    cli("--from-png", "a.png", "--seed", 1, "--output", "e.png", cwd=tmp_path)
    assert np.abs(a - np.asarray(Image.open(tmp_path / "e.png"), int)).mean() > 3


def test_a_picture_is_made_again_from_what_it_says(tmp_path):
    """Also from the text of other programs; whatever stands in a prompt."""
    prompt = 'a "red" house, Steps: 3, at night\nNegative thoughts\nSteps: two'
    options = ("--prompt", prompt, "--negative-prompt", "a: b, c", "--seed", 7, "--steps", 2)
    options += ("--cfg", 2.5, "--sampler", "euler-a", "--rng", "philox", "--width", 192)
    assert cli(*options, "--output", "a.png", cwd=tmp_path).returncode == 0
    done = cli("--from-png", "a.png", "--output", "b.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    a, b = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert np.array_equal(np.asarray(a), np.asarray(b)) and a.text == b.text
    info = PngInfo()
    line = "Steps: 2, Sampler: Euler a, Seed: 5, Size: 64x64, RNG: NV, Denoising strength: 0.4"
    info.add_text("parameters", f"a tree\n{line}")
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png", pnginfo=info)
    assert cli("--from-png", "other.png", "--output", "c.png", cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "c.png").size == (64, 64)
    said = Image.open(tmp_path / "c.png").text["parameters"]
    assert all(x in said for x in ("Seed: 5", "Sampler: EULER-A", "RNG: philox"))


def test_a_file_of_prompts_is_painted_line_by_line(tmp_path):
    (tmp_path / "p.txt").write_text("a red house\n\na blue boat\n", "utf-8")
    done = cli("--prompts", "p.txt", "--steps", 2, "--n-images", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [
        Image.open(tmp_path / f).text["parameters"] for f in ("out.png", "out-2.png", "out-3.png")
    ]
    assert [text.split("\n")[0] for text in said] == ["a red house", "a red house", "a blue boat"]
    assert ["Seed: 42" in text for text in said] == [True, False, True]


def test_pictures_on_the_way_are_kept(tmp_path):
    done = cli("--steps", 5, "--save-every", 2, "--n-images", 2, "--decode-batch", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {f.name for f in tmp_path.iterdir()}
    assert names == {
        "out.png", "out-2.png", "out-step-002.png", "out-step-002-2.png",
        "out-step-004.png", "out-step-004-2.png",
    }  # fmt: skip


def test_two_processes_paint_the_pictures_of_one(tmp_path):
    options = ["--steps", "2", "--n-images", "3", "--width", "64", "--height", "64"]
    launch = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", sys.executable]
    command = [*launch, HERE / "sd.py", *options, "--output", "two.png"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == ["two-2.png", "two-3.png", "two.png"], done
    assert cli(*options, "--output", "one.png", cwd=tmp_path).returncode == 0
    for end in (".png", "-2.png", "-3.png"):
        one, two = (Image.open(tmp_path / f"{name}{end}") for name in ("one", "two"))
        assert one.text == two.text
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1


def test_a_checkpoint_is_converted_once_and_again_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, unet, vae = (shake(m) for m in reference_models(CONFIGS["sd1"]))
    models = tmp_path / "models"
    models.mkdir()
    numbers = {"size": 64, "text": {"heads": 4}}

    def paint(source, name):
        options = ("--model", source, "--steps", 1, "--output", tmp_path / name, "--cfg", 1)
        result = cli(*options)
        assert result.returncode == 0, result.stderr
        return result.stderr, np.asarray(Image.open(tmp_path / name))

    def save_as(path, seed):
        state = train.original_names(vae, shake(unet, seed=seed), text)
        torch.save({"state_dict": state, "sd_config": numbers}, path)

    save_as(models / "a.ckpt", 1)
    said, first = paint(models / "a.ckpt", "1.png")
    assert "Converting it once" in said and (models / "a.flat.safetensors").exists()
    said, again = paint(models / "a.ckpt", "2.png")
    assert "made from a.ckpt before" in said and np.array_equal(again, first)
    save_as(models / "a.ckpt", 2)
    said, other = paint(models / "a.ckpt", "3.png")
    assert "Converting it once" in said and not np.array_equal(other, first)
    save_as(models / "a.pt", 1)  # another checkpoint, whose flat file would have the same name
    assert np.array_equal(paint(models / "a.pt", "4.png")[1], first)
    mine = models / "b.flat.safetensors"
    mine.write_text("mine")
    save_as(models / "b.ckpt", 1)
    assert np.array_equal(paint(models / "b.ckpt", "5.png")[1], first)
    assert mine.read_text() == "mine"
    assert list((tmp_path / "cache" / "sd.py").glob("*-b.flat.safetensors"))


def test_a_picture_that_is_no_number_is_not_painted(tiny):
    with pytest.raises(ValueError, match="float32"):
        tiny.to_pictures(mx.full((1, 8, 8, 4), mx.nan))


def test_zero_is_a_value(tmp_path):
    result = cli("--cfg", 0, "--seed", 0, "--steps", 2, "--output", tmp_path / "a.png")
    assert result.returncode == 0
    assert "CFG scale: 0.0, Seed: 0," in Image.open(tmp_path / "a.png").text["parameters"]


def test_a_long_prompt_is_cut_with_a_warning_only_when_read_as_clip_does(tmp_path):
    options = ("--prompt", "a red house " * 25 + "at the very end", "--steps", 1)
    result = cli(*options, "--plain-prompt", "--output", tmp_path / "a.png")
    assert result.returncode == 0 and '"at the very end"' in result.stderr
    result = cli(*options, "--output", tmp_path / "b.png")
    assert result.returncode == 0 and "end" not in result.stderr


def test_an_empty_prompt_paints(tmp_path):
    assert cli("--prompt", "", "--steps", 1, "--output", tmp_path / "a.png").returncode == 0


def test_tokens_are_shown(tmp_path):
    result = cli("--show-tokens", "--prompt", "a househunter", cwd=tmp_path)
    assert result.returncode == 0 and not list(tmp_path.iterdir())
    word, pieces, more, *ids = result.stdout.splitlines()[1].split()
    assert (word, pieces, more) == ("househunter", "house", "hunter</w>") and len(ids) == 2
    assert result.stdout.splitlines()[-1] == "3 of 75 tokens"


def test_tokens_are_shown_as_they_are_read(tmp_path):
    prompt = "a (red:1.5) house BREAK [cat] " + "dog " * 80
    result = cli("--show-tokens", "--prompt", prompt)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1] == ["red", "red</w>", "736", "x", "1.5"] and ["BREAK"] in lines
    assert lines[-1] == ["3", "+", "75", "+", "6", "of", "75", "tokens"]
    plain = cli("--show-tokens", "--plain-prompt", "--prompt", prompt).stdout.splitlines()
    assert plain[1].startswith("(") and plain[-1].startswith("9")
    (tmp_path / "prompts.txt").write_text("a cat\na dog and a cat\n")
    both = cli("--show-tokens", "--prompts", tmp_path / "prompts.txt").stdout
    assert both.count("of 75 tokens") == 2


def test_a_picture_that_can_not_be_saved_leaves_nothing(tmp_path, monkeypatch):
    """Neither half a picture nor the empty file that keeps a name free."""
    picture = Image.new("RGB", (64, 64))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for module, name in ((sd.tempfile, "mkstemp"), (Image.Image, "save"), (sd.os, "chmod")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(module, name, full)
            sd.save(picture, tmp_path / "out.png", "x")
        assert list(tmp_path.iterdir()) == []


# %% tiny/ -----------------------------------------------------------------------------------------


def test_what_is_held_out_is_never_drawn_for_training_and_all_else_is():
    seen, pairs = set(), set()
    for seed in range(40_000):  # as many as the UNet learns from
        scene = train.scene_of(seed)
        for thing, colour in scene.things:
            seen.add((thing, colour, scene.ground, scene.time))
    assert not any(world.held_out(*each) for each in seen)
    tables = world.THINGS, world.COLOURS, world.GROUNDS, world.TIMES
    everything = set(itertools.product(*tables))
    out = {each for each in everything if world.held_out(*each)}
    assert 0.1 < len(out) / len(everything) < 0.15 and everything - out == seen
    for k in range(4):  # without any one of the four, every three occur in training
        pairs = {each[:k] + each[k + 1 :] for each in seen}
        assert pairs == {each[:k] + each[k + 1 :] for each in everything}


def test_every_picture_of_the_world_is_another_and_the_same_again():
    pictures = [train.drawn(seed) for seed in range(60)]
    assert len({picture.tobytes() for picture in pictures}) == 60
    assert np.array_equal(pictures[7], train.drawn(7)) and pictures[7].shape == (128, 128, 3)


def test_sentences_name_what_is_there_and_nothing_else():
    rng = random.Random(0)
    times = {name: words for name, (*_, words) in world.TIMES.items()}
    for _ in range(500):
        scene = world.random_scene(rng)
        text = world.sentence(rng, scene).replace("green meadow", "meadow")
        for thing, (_, names) in world.THINGS.items():
            named = any(re.search(rf"\b{name}s?\b", text) for name in names)
            assert named == (thing in [t for t, _ in scene.things]), (scene, text)
        colours = [c for c in world.COLOURS for w in world.COLOUR_WORDS.get(c, (c,)) if w in text]
        assert set(colours) <= {c for _, c in scene.things}, (scene, text)
        said = [name for name, words in times.items() if any(word in text for word in words)]
        assert said == [scene.time] or said == [] and scene.time == "day", (scene, text)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, capsys):
    @torch.enable_grad()
    def run(path, stop=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        average = copy.deepcopy(layer).requires_grad_(False)
        stage = train.Stage(path, 1200, train.usual(1e-2, 1200), [layer, average])
        for step in stage.left():
            if step == stop:
                return None
            stage.learn((layer(torch.randn(5, 3)) - 1).square().mean())
            average.weight.lerp_(layer.weight.detach(), 0.01)
        return layer.weight.tolist(), average.weight.tolist()

    whole = run(tmp_path / "whole.pt")
    run(tmp_path / "parts.pt", stop=777)
    assert run(tmp_path / "parts.pt") == whole
    assert "parts: resumed at step 500 of 1200" in capsys.readouterr().out


def test_the_miniature_is_trained_from_nothing_to_a_picture(tmp_path):
    """One step of each stage."""
    few = ["--folder", str(tmp_path / "run"), "--pictures", "40"]
    for stage in ("vae", "decoder", "text", "unet"):
        few += [f"--{stage}-steps", "1"]
    with torch.enable_grad():
        train.main(few)
    convert(tmp_path / "run" / "tiny.ckpt", tmp_path / "tiny.safetensors")
    model = sd.StableDiffusion(tmp_path / "tiny.safetensors")
    assert model.config["name"] == "the miniature"
    assert model.txt2img("a red house", steps=1)[0].size == (128, 128)
    pictures = np.stack([train.drawn(i) for i in range(40)]) / np.float32(255)
    deviation = np.std(np.array(model.encode(pictures)))
    assert abs(deviation - 1) < 0.02  # as Stable Diffusion's latents are, after x 0.18215
    with pytest.raises(SystemExit, match="try another --folder"):
        train.main([*few, "--vae-steps", "2"])


def test_the_miniature_s_scripts_refuse_what_they_can_not_do(tmp_path, capsys):
    for main, options, says in (
        (world.main, [], "file"),
        (evaluate.main, ["--number", "0"], "--number 0"),
        (evaluate.main, ["--model", "nowhere.safetensors"], "nowhere.safetensors"),
        (evaluate.main, ["--number", "2", "--steps", "0"], "steps 0"),
        (evaluate.main, ["--folder", RED_HOUSE], "red-house.png"),
        (judge.main, ["--folder", RED_HOUSE], "red-house.png"),
        (train.main, ["--folder", RED_HOUSE], "red-house.png"),
        (train.main, ["--folder", str(tmp_path), "--pictures", "0"], "--pictures 0"),
        (world.main, [str(tmp_path / "nowhere" / "look.png")], "nowhere"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(options)
        assert stop.value.code == 2 and says in capsys.readouterr().err
    world.main([str(tmp_path / "look.png")])
    assert Image.open(tmp_path / "look.png").size == (8 * 128, 6 * 128)
    assert len(capsys.readouterr().out.splitlines()) == 48


def test_the_judge_finds_what_was_drawn_where_its_answers_are_perfect():
    scenes, _, truths = zip(*(judge.drawn(seed) for seed in range(100)))
    things, colours, grounds, times = (torch.from_numpy(np.array(t)) for t in zip(*truths))
    things[things == judge.ANY] = judge.NOTHING
    colours[colours == judge.ANY] = 0
    sizes = (len(judge.THINGS) + 1, len(judge.COLOURS), len(judge.GROUNDS), len(judge.TIMES))
    answers = [
        torch.nn.functional.one_hot(truth, n).float().movedim(-1, 1) * 20
        for truth, n in zip((things, colours, grounds, times), sizes)
    ]
    read = []
    for answer in zip(*(a.split(1) for a in answers)):  # whatever the picture, this is said
        read += judge.read(lambda _, answer=answer: answer, np.zeros((1, 128, 128, 3)))
    assert all(all(judge.right(*both)) for both in zip(scenes, read))
    rows = [(s, found) for s, (found, _, _) in zip(scenes, read) if s.layout == "row"]
    assert rows and all(s.things * s.count == found for s, found in rows)  # from left to right
    scene, (found, ground, time) = scenes[0], read[0]
    assert not judge.right(scene, ([], ground, time))[0]
    assert not judge.right(scene, ([*found, found[0]], ground, time))[0]


def test_only_what_was_held_out_is_asked_for_and_all_of_it_is_said():
    rng = random.Random(0)
    grounds = [word for _, words in world.GROUNDS.values() for word in words]
    times = [word for *_, words in world.TIMES.values() for word in words]
    for i in range(300):
        scene, _, options = evaluate.text(rng, i)
        assert len(scene.things) == 1 + i % 2
        assert all(world.held_out(*each, scene.ground, scene.time) for each in scene.things)
        assert any(words in options["prompt"] for words in world.GROUNDS[scene.ground][1])
        assert any(words in options["prompt"] for words in world.TIMES[scene.time][3])
        _, _, options = evaluate.negative(rng, i)
        assert not any(word in options["prompt"] for word in grounds)
        scene, _, options = evaluate.undated(rng, i)
        assert scene.time == "day" and not any(word in options["prompt"] for word in times)
        assert all(world.held_out(*each, scene.ground, "day") for each in scene.things)


def test_the_readme_s_grid_is_what_its_lines_paint(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)
    (block,) = (b for b in blocks if "grid(" in b)
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    ours, readme = (
        np.asarray(Image.open(folder / "twelve.png"), float) for folder in (tmp_path, HERE / "tiny")
    )
    assert abs(ours - readme).mean() < 0.5


# %% convert_weights.py ----------------------------------------------------------------------------
# Small random models written by torch.save, safetensors and save_pretrained, and hostile files.

original_names = train.original_names


def small_networks(activation="quick_gelu", linear=False, layers=2, heads=8):
    """Random ones whose widths fit the rules of the published models: 64 to a head, 32 groups."""
    torch.manual_seed(7)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), latent_channels=4,
        layers_per_block=2, norm_num_groups=32,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(64, 64, 128, 128), attention_head_dim=heads,
        cross_attention_dim=64, use_linear_projection=linear,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=1,
            hidden_act=activation, bos_token_id=49406, eos_token_id=49407,
        )
    )  # fmt: skip
    with torch.no_grad():  # norms start as ones and zeros, which would hide a swap
        for p in (p for m in (vae, unet, text) for p in m.parameters() if p.ndim == 1):
            p.uniform_(-1, 1)
    return vae, unet, text


@pytest.fixture(scope="session")
def networks():
    return small_networks()


@pytest.fixture(scope="session")
def weights(networks):
    return original_names(*networks)


@pytest.fixture(scope="session")
def flat(weights, tmp_path_factory):
    """What the small model is, flat and in float32, by way of a .safetensors."""
    path = tmp_path_factory.mktemp("flat") / "small.safetensors"
    save_file(weights, path)
    return load_file(convert(path, dtype="float32", log=lambda line: None))


@pytest.fixture
def run(tmp_path):
    """convert(), keeping what it says and giving back what it wrote."""

    def run(source, **options):
        run.said = ""

        def log(line):
            run.said += line + "\n"

        options.setdefault("dtype", "float32")
        path = convert(source, tmp_path / "out.safetensors", log=log, **options)
        with safe_open(path, "pt") as file:
            run.metadata = file.metadata()
            run.config = json.loads(run.metadata["config"])
        return load_file(path)

    return run


def same(a, b):
    assert a.keys() == b.keys()
    different = [
        name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])
    ]
    assert not different


def refused(capsys, source, *words, options=()):
    """One message that holds these words, status 2, and no file more than before."""
    folder = Path(source).parent
    before = {p: p.stat().st_size for p in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        convert_weights.main([str(source), *options])
    assert stop.value.code == 2
    _, err = capsys.readouterr()
    assert err.startswith("convert_weights.py: ") and "Traceback" not in err
    assert err.strip().count("\n") == 0
    for word in words:
        assert word in err
    assert {p: p.stat().st_size for p in folder.rglob("*")} == before
    return err


# %% Converter: the table --------------------------------------------------------------------------


def meta_models(second):
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            cross_attention_dim=1024 if second else 768, use_linear_projection=second,
            attention_head_dim=[5, 10, 20, 20] if second else 8,
        )  # fmt: skip
        width, layers = (1024, 23) if second else (768, 12)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                num_attention_heads=width // 64,
            )
        )  # fmt: skip
    return vae, unet, text


@pytest.mark.parametrize("second", [False, True], ids=["SD 1.x", "SD 2.x"])
def test_the_table_is_every_tensor_of_diffusers_models_with_its_shape(second):
    vae, unet, text = meta_models(second)
    part = convert_weights.Part({}, "", convert_weights.DIFFUSERS)
    context, layers = (1024, 23) if second else (768, 12)
    tables = {
        686: (unet, convert_weights.unet_table(part, [320, 640, 1280, 1280], context)),
        248: (vae, convert_weights.vae_table(part, [128, 256, 512, 512])),
        4 + 16 * layers: (text, convert_weights.text_table(part, 49408, context, layers)),
    }
    for count, (model, wants) in tables.items():
        truth = {
            n.removeprefix("text_model."): tuple(t.shape) for n, t in model.state_dict().items()
        }
        squeezed = {
            n: s[:2] if s[2:] == (1, 1) else s
            for n, s in truth.items()
            if n[-12:] != "position_ids"
        }
        found = {next(n for n in want.names if n in truth): want.shape for want in wants}
        assert found == squeezed
        assert len(wants) == count == len({want.flat for want in wants})


def test_the_original_layout_has_the_same_table():
    vae, unet, text = meta_models(False)
    truth = original_names(vae, unet, text)
    part = lambda prefix: convert_weights.Part({}, prefix, convert_weights.ORIGINAL)
    wants = convert_weights.unet_table(part("model.diffusion_model."), [320, 640, 1280, 1280], 768)
    wants += convert_weights.vae_table(part("first_stage_model."), [128, 256, 512, 512])
    found = {next(n for n in want.names if n in truth) for want in wants}
    assert found == {name for name in truth if not name.startswith("cond_stage_model.")}


def test_every_kind_of_layer_arrives_at_its_place(networks, flat):
    vae, unet, text = networks
    layer = (text.encoder if hasattr(text, "encoder") else text.text_model.encoder).layers[1]
    block = unet.down_blocks[1].attentions[0].transformer_blocks[0]
    conv = lambda layer: layer.weight.permute(0, 2, 3, 1)
    one = lambda layer: layer.weight[:, :, 0, 0]
    truth = {
        "unet.time1.bias": unet.time_embedding.linear_1.bias,
        "unet.time2.weight": unet.time_embedding.linear_2.weight,
        "unet.down.0.0.weight": conv(unet.conv_in),
        "unet.down.3.0.conv.weight": conv(unet.down_blocks[0].downsamplers[0].conv),
        "unet.down.7.0.norm1.weight": unet.down_blocks[2].resnets[0].norm1.weight,
        "unet.down.7.0.conv1.weight": conv(unet.down_blocks[2].resnets[0].conv1),
        "unet.down.7.0.time.bias": unet.down_blocks[2].resnets[0].time_emb_proj.bias,
        "unet.down.7.0.norm2.bias": unet.down_blocks[2].resnets[0].norm2.bias,
        "unet.down.7.0.conv2.weight": conv(unet.down_blocks[2].resnets[0].conv2),
        "unet.down.7.0.shortcut.weight": one(unet.down_blocks[2].resnets[0].conv_shortcut),
        "unet.down.4.1.norm.bias": unet.down_blocks[1].attentions[0].norm.bias,
        "unet.down.4.1.proj_in.weight": one(unet.down_blocks[1].attentions[0].proj_in),
        "unet.down.4.1.norm1.weight": block.norm1.weight,
        "unet.down.4.1.attn1.to_k.weight": block.attn1.to_k.weight,
        "unet.down.4.1.norm2.weight": block.norm2.weight,
        "unet.down.4.1.attn2.to_q.weight": block.attn2.to_q.weight,
        "unet.down.4.1.attn2.to_v.weight": block.attn2.to_v.weight,
        "unet.down.4.1.attn2.to_out.bias": block.attn2.to_out[0].bias,
        "unet.down.4.1.norm3.bias": block.norm3.bias,
        "unet.down.4.1.ff_in.weight": block.ff.net[0].proj.weight,
        "unet.down.4.1.ff_out.weight": block.ff.net[2].weight,
        "unet.down.4.1.proj_out.bias": unet.down_blocks[1].attentions[0].proj_out.bias,
        "unet.middle.0.conv1.weight": conv(unet.mid_block.resnets[0].conv1),
        "unet.middle.2.conv1.weight": conv(unet.mid_block.resnets[1].conv1),
        "unet.up.2.1.conv.weight": conv(unet.up_blocks[0].upsamplers[0].conv),
        "unet.up.5.2.conv.weight": conv(unet.up_blocks[1].upsamplers[0].conv),
        "unet.up.11.0.shortcut.weight": one(unet.up_blocks[3].resnets[2].conv_shortcut),
        "unet.up.11.1.attn1.to_q.weight": unet.up_blocks[3]
        .attentions[2]
        .transformer_blocks[0]
        .attn1.to_q.weight,
        "unet.norm_out.weight": unet.conv_norm_out.weight,
        "unet.conv_out.weight": conv(unet.conv_out),
        "vae.encoder.0.weight": conv(vae.encoder.conv_in),
        "vae.encoder.5.conv2.weight": conv(vae.encoder.down_blocks[1].resnets[1].conv2),
        "vae.encoder.6.conv.weight": conv(vae.encoder.down_blocks[1].downsamplers[0].conv),
        "vae.encoder.13.norm.weight": vae.encoder.mid_block.attentions[0].group_norm.weight,
        "vae.encoder.13.attention.to_k.weight": vae.encoder.mid_block.attentions[0].to_k.weight,
        "vae.encoder.14.norm2.bias": vae.encoder.mid_block.resnets[1].norm2.bias,
        "vae.encoder_norm.bias": vae.encoder.conv_norm_out.bias,
        "vae.encoder_out.weight": conv(vae.encoder.conv_out),
        "vae.quant.weight": one(vae.quant_conv),
        "vae.post_quant.weight": one(vae.post_quant_conv),
        "vae.decoder.2.attention.to_out.weight": vae.decoder.mid_block.attentions[0]
        .to_out[0]
        .weight,
        "vae.decoder.4.conv1.weight": conv(vae.decoder.up_blocks[0].resnets[0].conv1),
        "vae.decoder.11.conv.bias": vae.decoder.up_blocks[1].upsamplers[0].conv.bias,
        "vae.decoder.12.shortcut.weight": one(vae.decoder.up_blocks[2].resnets[0].conv_shortcut),
        "vae.decoder.18.conv2.weight": conv(vae.decoder.up_blocks[3].resnets[2].conv2),
        "vae.decoder_out.bias": vae.decoder.conv_out.bias,
        "text_encoder.layers.1.norm1.weight": layer.layer_norm1.weight,
        "text_encoder.layers.1.attention.to_v.weight": layer.self_attn.v_proj.weight,
        "text_encoder.layers.1.attention.to_out.bias": layer.self_attn.out_proj.bias,
        "text_encoder.layers.1.norm2.bias": layer.layer_norm2.bias,
        "text_encoder.layers.1.fc1.weight": layer.mlp.fc1.weight,
        "text_encoder.layers.1.fc2.weight": layer.mlp.fc2.weight,
    }
    for name, tensor in truth.items():
        assert torch.equal(flat[name], tensor), name
    state = {n.removeprefix("text_model."): t for n, t in text.state_dict().items()}
    assert torch.equal(flat["text_encoder.norm.bias"], state["final_layer_norm.bias"])
    assert torch.equal(
        flat["text_encoder.token_embedding.weight"], state["embeddings.token_embedding.weight"]
    )
    assert torch.equal(
        flat["text_encoder.position_embedding.weight"],
        state["embeddings.position_embedding.weight"],
    )


def test_the_merges_are_clips_48894_lines(flat):
    text = bytes(flat["tokenizer.merges"].numpy()).decode()
    assert text.startswith("i n\nt h\n") and text.endswith("\njeky ll</w>\n")
    assert text.count("\n") == 48894


# %% Converter: PyTorch's files --------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_reads_the_same_in_both_of_pytorchs_formats(
    tmp_path, weights, flat, run, zipped
):
    class ModelCheckpoint:  # a class as a dict key, which Lightning's training files have
        pass

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = (
        "test_convert_lightning",
        "ModelCheckpoint",
    )
    sys.modules["test_convert_lightning"] = sys.modules[__name__]
    sys.modules[__name__].ModelCheckpoint = ModelCheckpoint
    state = dict(weights)
    big = torch.randn(3, 40, 64)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[
        None
    ]
    state["model_ema.decay"] = torch.tensor(0.999)
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    state[name] = state[name].to(memory_format=torch.channels_last)
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    state[name] = state[name].to(memory_format=torch.channels_last)  # 1 x 1: strides of any kind
    name = "model.diffusion_model.time_embed.0.weight"
    state[name] = state[name].t().contiguous().t()
    name = "model.diffusion_model.time_embed.0.bias"
    state[name] = torch.nn.Parameter(state[name])
    name = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
    whole = torch.cat([torch.zeros(3, 64), state[name], torch.zeros(5, 64)])
    state[name] = whole[3:80]  # an offset into a storage that
    state["first_stage_model.loss.shared"] = whole[80:]  # another tensor uses too
    state["first_stage_model.loss.slice"] = big[1, ::2]
    name = "first_stage_model.quant_conv.weight"
    state[name] = state[name].double()
    top = {
        "epoch": 6, "global_step": 470000, "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.25)}},
        "lr_schedulers": [{}],
    }  # fmt: skip
    torch.save(top, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    same(run(tmp_path / "model.bin"), flat)
    assert "ModelCheckpoint" in run.said and "which was not loaded" in run.said
    assert "3 not needed" not in run.said and "2 not needed (training losses)" in run.said


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_written_to_the_bit(tmp_path, weights, flat, run, dtype, zipped):
    state = {name: tensor.to(dtype) for name, tensor in weights.items()}
    torch.save(state, tmp_path / "half.pt", _use_new_zipfile_serialization=zipped)
    out = run(tmp_path / "half.pt", dtype=str(dtype).removeprefix("torch."))
    same(out, {n: t if t.dtype == torch.uint8 else t.to(dtype) for n, t in flat.items()})


def test_bfloat16_rounds_as_torch_does_and_keeps_nan_a_nan():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.uint32([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800000])
    values = np.concatenate([bits, ties]).view(np.float32)
    ours = torch.from_numpy(convert_weights.cast(values, "bfloat16")).view(torch.bfloat16).float()
    assert torch.equal(
        ours.nan_to_num(7), torch.from_numpy(values).bfloat16().float().nan_to_num(7)
    )
    assert torch.equal(ours.isnan(), torch.from_numpy(values).isnan())


def test_a_checkpoint_without_checksums_is_read(tmp_path, weights, flat, run):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "no_crc.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    same(run(tmp_path / "no_crc.ckpt"), flat)


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


@pytest.mark.parametrize(
    "config, word",
    [
        ({"text": {"haeds": 4}}, "may only hold"),
        ({"unet": {"heads": 2}}, "heads"),
        ({"unet": {"heads": [3, 3, 3, 3]}}, "heads of the UNet (3)"),
        ({"vae": {"groups": True}}, "groups"),
        ({"vae": {"scale": float("nan")}}, "scale"),
        ({"prediction": "x0"}, "prediction"),
        (["size"], "sd_config"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, weights, capsys, config, word):
    torch.save({"state_dict": weights, "sd_config": config}, tmp_path / "odd.ckpt")
    refused(capsys, tmp_path / "odd.ckpt", word)


# %% Converter: original names in .safetensors, and what people made of them -----------------------


def test_a_safetensors_file_is_believed_only_where_it_adds_up(tmp_path, capsys):
    good = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    bad = {
        "hole": {"a": good["a"], "b": {"dtype": "U8", "shape": [1], "data_offsets": [9, 10]}},
        "overlap": {"a": good["a"], "b": {"dtype": "U8", "shape": [6], "data_offsets": [4, 10]}},
        "short": good,
        "negative": {"a": {"dtype": "U8", "shape": [-1, -10], "data_offsets": [0, 10]}},
        "fraction": {"a": {"dtype": "U8", "shape": [10.0], "data_offsets": [0, 10]}},
        "bool": {"a": {"dtype": "U8", "shape": [10, True], "data_offsets": [0, 10]}},
        "overflow": {"a": {"dtype": "U8", "shape": [2**16] * 4 + [2], "data_offsets": [0, 0]}},
        "dtype": {"a": {"dtype": "F3", "shape": [10], "data_offsets": [0, 10]}},
        "unhashable": {"a": {"dtype": [], "shape": [10], "data_offsets": [0, 10]}},
        "metadata": {
            "__metadata__": {"format": 3},
            "a": {"dtype": "U8", "shape": [10], "data_offsets": [0, 10]},
        },
    }
    words = {"hole": "leave a hole", "overlap": "overlap", "short": "describes"}
    words["metadata"] = "metadata is not text"
    for name, header in bad.items():
        text = json.dumps(header).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(10))
        refused(capsys, path, words.get(name, "impossible entry for a"))
    texts = {b'{"a":1,"a":1}': "two entries", b'{"a":' + b"[" * 100_000: "RecursionError"}
    texts |= {
        b" [1]": "not a JSON object",
        b"{\xff": "damaged",
        b'{"n":' + b"9" * 5000 + b"}": "damaged",
    }
    for text, word in texts.items():
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        refused(capsys, path, word)


def variant(weights, *renames):
    out = dict(weights)
    for old, new in renames:
        out = {name.replace(old, new): tensor for name, tensor in out.items()}
    return out


def test_what_people_renamed_is_found(tmp_path, weights, flat, run):
    attention = [
        (".attn_1.norm.", ".attn_1.group_norm."), (".attn_1.q.", ".attn_1.query."),
        (".attn_1.k.", ".attn_1.key."),
        (".attn_1.v.", ".attn_1.value."), (".attn_1.proj_out.", ".attn_1.proj_attn."),
    ]  # fmt: skip
    state = variant(weights, (".transformer.text_model.", ".transformer."), *attention)
    state = {n: t[:, :, 0, 0] if t.shape[2:] == (1, 1) else t for n, t in state.items()}
    state["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77.0)[None].half()
    name = "model.diffusion_model.out.2.weight"
    state[name] = state[name].double()
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "renamed.safetensors")
    same(run(tmp_path / "renamed.safetensors"), flat)
    assert "1 not needed (position numbers)" in run.said

    newer = [
        (".attn_1.q.", ".attn_1.to_q."),
        (".attn_1.k.", ".attn_1.to_k."),
        (".attn_1.v.", ".attn_1.to_v."),
    ]
    newer.append((".attn_1.proj_out.", ".attn_1.to_out.0."))
    save_file(variant(weights, *newer), tmp_path / "newer.safetensors")
    same(run(tmp_path / "newer.safetensors"), flat)


def ema(name):
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def test_averaged_weights_are_taken_only_if_there_are_no_others(tmp_path, weights, flat, run):
    mark = "model.diffusion_model."
    copies = {ema(n): t * 2 for n, t in weights.items() if n.startswith(mark)}
    save_file(weights | copies, tmp_path / "both.safetensors")
    same(run(tmp_path / "both.safetensors"), flat)
    assert f"{len(copies)} not needed (averaged copies (EMA))" in run.said
    rest = {n: t for n, t in weights.items() if not n.startswith(mark)}
    save_file(rest | copies, tmp_path / "only.safetensors")
    out = run(tmp_path / "only.safetensors")
    assert torch.equal(out["unet.norm_out.bias"], 2 * flat["unet.norm_out.bias"])
    assert torch.equal(out["unet.down.10.0.conv1.weight"], 2 * flat["unet.down.10.0.conv1.weight"])
    assert torch.equal(out["vae.quant.bias"], flat["vae.quant.bias"])
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
    assert "1 tensors are unknown and were left out: somebody.new?[31m" in run.said


def test_another_noise_schedule_is_noticed_and_half_precision_is_not_one(tmp_path, weights, run):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    zero_snr = abar.clone()
    zero_snr[-1] = 0
    for alphas, differs in (
        (abar.half(), False),
        (abar.bfloat16(), False),
        (zero_snr.float(), True),
    ):
        save_file(weights | {"alphas_cumprod": alphas}, tmp_path / "a.safetensors")
        run(tmp_path / "a.safetensors")
        assert ("another noise schedule" in run.said) == differs


# %% Converter: SD 2.x -----------------------------------------------------------------------------


def openclip_names(weights, layers):
    """The text encoder as SD 2.x files have it: OpenCLIP's names, q, k and v in one matrix."""
    old = "cond_stage_model.transformer.text_model."
    new = "cond_stage_model.model."
    out = {n: t for n, t in weights.items() if not n.startswith(old)}
    text = {n.removeprefix(old): t for n, t in weights.items() if n.startswith(old)}
    out[new + "token_embedding.weight"] = text["embeddings.token_embedding.weight"]
    out[new + "positional_embedding"] = text["embeddings.position_embedding.weight"]
    out[new + "text_projection"] = torch.zeros(64, 64)
    out[new + "logit_scale"] = torch.zeros(())
    for leaf in ("weight", "bias"):
        out[f"{new}ln_final.{leaf}"] = text[f"final_layer_norm.{leaf}"]
        for k in range(layers):
            place, block = f"encoder.layers.{k}.", f"{new}transformer.resblocks.{k}."
            qkv = [text[f"{place}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            out[f"{block}attn.in_proj_{leaf}"] = torch.cat(qkv)
            for theirs, ours in (
                ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
            ):  # fmt: skip
                out[f"{block}{theirs}.{leaf}"] = text[f"{place}{ours}.{leaf}"]
    return {n: t.contiguous() for n, t in out.items()}


@pytest.fixture(scope="session")
def second():
    return small_networks("gelu", linear=True, layers=24, heads=(1, 1, 2, 2))


@pytest.fixture(scope="session")
def second_weights(second):
    return openclip_names(original_names(*second), 24)


def test_sd2_gets_its_numbers_its_23_layers_and_q_k_v_apart(tmp_path, second, second_weights, run):
    _, unet, text = second
    save_file(second_weights, tmp_path / "v2.safetensors")
    out = run(tmp_path / "v2.safetensors")
    assert run.config["name"] == "Stable Diffusion 2.x"
    assert run.config["text"]["layers"] == 23 and run.config["text"]["pad"] == 0
    assert run.config["text"]["activation"] == "gelu" and run.config["text"]["heads"] == 1
    assert run.config["unet"]["heads"] == [1, 1, 2, 2]
    state = {n.removeprefix("text_model."): t for n, t in text.state_dict().items()}
    for x in "qkv":
        for leaf in ("weight", "bias"):
            truth = state[f"encoder.layers.22.self_attn.{x}_proj.{leaf}"]
            assert torch.equal(out[f"text_encoder.layers.22.attention.to_{x}.{leaf}"], truth)
    assert "text_encoder.layers.23.fc1.weight" not in out
    assert torch.equal(
        out["unet.up.3.1.proj_in.weight"], unet.up_blocks[1].attentions[0].proj_in.weight
    )
    assert "14 not needed (the text encoder's unread end)" in run.said and "unknown" not in run.said


def test_sd2_predictions_are_decided_by_flag_then_yaml_then_deviation(
    tmp_path, second_weights, run
):
    path = tmp_path / "v2.safetensors"
    state = dict(second_weights)
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    state[name] = torch.tensor([-1.0, 1.0] * 32) * 0.0905  # population 0.0905, of a sample 0.0912
    for scale, prediction, size in (
        (1.0, "v", 768),
        (0.99, "eps", 512),
    ):  # 0.0896; a sample's is 0.0903
        save_file(state | {name: state[name] * scale}, path)
        run(path)
        assert (run.config["prediction"], run.config["size"]) == (prediction, size)
        assert "a guess" in run.said
    (tmp_path / "v2.yaml").write_text(
        'model:\n  params:\n    parameterization: "v"\n    linear_start: 0.00085\n'
    )
    run(path)
    assert run.config["prediction"] == "v" and "v2.yaml beside it says so" in run.said
    (tmp_path / "v2.yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")
    save_file(state, path)
    run(path)
    assert run.config["prediction"] == "eps"
    run(path, prediction="v")
    assert run.config["prediction"] == "v" and "--prediction" in run.metadata["notes"]


# %% Converter: diffusers folders ------------------------------------------------------------------


def write_folder(path, networks, prediction="epsilon", **options):
    from diffusers import PNDMScheduler

    vae, unet, text = networks
    unet.save_pretrained(path / "unet", **options)
    vae.save_pretrained(path / "vae", **options)
    options.pop("safe_serialization", None)
    text.save_pretrained(path / "text_encoder", **options)
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
    ).save_pretrained(path / "scheduler")
    (path / "tokenizer").mkdir()
    merges = (HERE / "tiny" / "merges.txt").read_text("utf-8")
    (path / "tokenizer" / "merges.txt").write_text(
        "#version: 0.2\n" + merges + "ha bib</w>\n", "utf-8"
    )
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return path


@pytest.fixture(scope="session")
def folder(networks, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("diffusers") / "model", networks)


def test_a_diffusers_folder_gives_the_same_file_as_the_original_layout(folder, flat, run):
    same(run(folder), flat)
    assert run.config["unet"]["heads"] == [8] * 4 and run.config["size"] == 512
    assert run.config["text"]["heads"] == 1 and run.config["text"]["activation"] == "quick_gelu"
    assert run.config["name"] == "Stable Diffusion 1.x" and run.config["prediction"] == "eps"


def test_shards_and_bin_files_and_old_names_are_read(tmp_path, networks, flat, run):
    path = write_folder(tmp_path / "sharded", networks, max_shard_size="6MB")
    assert len(list((path / "unet").glob("*.safetensors"))) > 1
    assert len(list((path / "text_encoder").glob("*.safetensors"))) > 1
    same(run(path), flat)
    path = write_folder(tmp_path / "bin", networks, safe_serialization=False)
    state = load_file(path / "text_encoder" / "model.safetensors")
    state = {"text_model." + n.removeprefix("text_model."): t for n, t in state.items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(state, path / "text_encoder" / "pytorch_model.bin")
    (path / "text_encoder" / "model.safetensors").unlink()
    state = torch.load(path / "vae" / "diffusion_pytorch_model.bin")
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        state = {
            n.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for n, t in state.items()
        }
    torch.save(state, path / "vae" / "diffusion_pytorch_model.bin")
    same(run(path), flat)
    weights = path / "unet" / "diffusion_pytorch_model.bin"
    half = {name: tensor.half() for name, tensor in torch.load(weights).items()}
    save_file(half, path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    same(run(path), flat)  # full precision first
    weights.unlink()
    assert torch.equal(run(path)["unet.norm_out.bias"], flat["unet.norm_out.bias"].half().float())


def test_an_sd2_folder_and_the_sd2_file_are_the_same(tmp_path, second, second_weights, run):
    vae, unet, text = second
    text = copy.deepcopy(text)
    encoder = text.encoder if hasattr(text, "encoder") else text.text_model.encoder
    encoder.layers = encoder.layers[:23]
    text.config.num_hidden_layers = 23
    path = write_folder(tmp_path / "v2", (vae, unet, text), prediction="v_prediction")
    out, config = run(path), run.config
    save_file(second_weights, tmp_path / "v2.safetensors")
    same(run(tmp_path / "v2.safetensors", prediction="v"), out)
    assert config | {"size": 768} == run.config and config["size"] == 512  # sample_size was 64


@pytest.fixture
def hub(folder):
    """A hub on this machine with the one repository org/name; -> its address, what was asked."""
    asked, sha = [], "a" * 40
    files = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    files += ["unet/flax_model.msgpack", "unet/diffusion_pytorch_model.fp16.bin", "README.md"]

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, body, **headers):
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = urllib.parse.unquote(self.path.split("?")[0])
            if path in ("/api/models/org/name/tree/main", f"/api/models/org/name/tree/{sha}"):
                tree = [{"type": "file", "path": f, "size": 1, "oid": "b" * 40} for f in files]
                self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            elif path == "/api/models/org/name/revision/main":
                info = {"id": "org/name", "sha": sha, "siblings": [{"rfilename": f} for f in files]}
                self.answer(json.dumps(info).encode(), Content_Type="application/json")
            elif path.startswith(f"/org/name/resolve/{sha}/"):
                name = path.split(sha + "/")[1]
                asked.append(name)
                body = (folder / name).read_bytes()
                self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=sha)
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}, asked
        server.shutdown()


def test_a_name_on_the_hub_is_fetched_and_converted(hub, flat, tmp_path):
    more, asked = hub
    env = os.environ | more | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def converted(name):
        command = [sys.executable, HERE / "convert_weights.py", name, "--dtype", "float32"]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300, check=False
        )

    done = converted("org/name")
    assert done.returncode == 0, done.stderr
    same(load_file(tmp_path / "name.flat.safetensors"), flat)
    assert "README.md" not in asked and not any("flax" in f or "fp16" in f for f in asked)
    done = converted("org/other")
    assert done.returncode == 2 and "org/other can't be fetched" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_hub_that_can_not_be_reached_gets_one_message(capsys, tmp_path, monkeypatch):
    class OfItsOwn(Exception):
        """httpx's errors are no OSErrors."""

    def fails(name):
        raise OfItsOwn("Name or service not known\nand more")

    monkeypatch.setattr("huggingface_hub.list_repo_files", fails)
    refused(capsys, "org/name", "org/name can't be fetched", "not known")


def test_without_the_hubs_package_it_says_what_to_fetch(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = refused(capsys, "org/name", "pip install", "model_index.json", "unet/*")
    assert "https://huggingface.co/org/name" in message


def copied(folder, to, changes):
    """The folder again, with other fields in some of its JSON files."""
    shutil.copytree(folder, to)
    for file, fields in changes.items():
        config = json.loads((to / file).read_text()) | fields
        (to / file).write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    "file, fields",
    [
        ("unet/config.json", {"class_embed_type": "projection"}),
        ("unet/config.json", {"only_cross_attention": [True, True, True, False]}),
        ("unet/config.json", {"transformer_layers_per_block": [1, 2, 10, 1]}),
        ("unet/config.json", {"in_channels": 8}),
        ("unet/config.json", {"time_cond_proj_dim": 256}),
        ("vae/config.json", {"latent_channels": 16}),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}),
        ("text_encoder/config.json", {"model_type": "bert"}),
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}),
    ],
)
def test_a_folder_that_says_it_is_something_else_is_refused_by_field_and_value(
    tmp_path, folder, capsys, file, fields
):
    (name, value), *_ = fields.items()
    words = name if name != "hidden_act" else "activation", str(value)
    refused(capsys, copied(folder, tmp_path / "other", {file: fields}), *words)


def test_a_folder_says_which_part_it_lacks(tmp_path, folder, capsys):
    for part in ("unet", "text_encoder"):
        path = copied(folder, tmp_path / f"no_{part}", {})
        shutil.rmtree(path / part)
        refused(capsys, path, f"no {part} folder")
        shutil.rmtree(path)
    path = copied(folder, tmp_path / "half", {})
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(capsys, path, "has no weights", "download")
    refused(capsys, path / "vae", "one part of a model (AutoencoderKL)")
    (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        '{"weight_map": {"conv_in.weight": "../../secret.safetensors"}}'
    )
    refused(capsys, path, "../../secret.safetensors", "plain names")
    (path / "unet" / "config.json").write_text("[" * 100_000)
    refused(capsys, path, "config.json is not readable JSON")
    (path / "empty").mkdir()
    refused(capsys, path / "empty", "no unet folder")


# %% Converter: --vae ------------------------------------------------------------------------------


def test_a_vae_can_come_from_anywhere(tmp_path, folder, weights, networks, flat, run, capsys):
    rest = {n: t for n, t in weights.items() if not n.startswith("first_stage_model.")}
    save_file(rest, tmp_path / "no_vae.safetensors")
    refused(capsys, tmp_path / "no_vae.safetensors", "has no VAE", "--vae")
    vae = {
        n.removeprefix("first_stage_model."): t
        for n, t in weights.items()
        if n.startswith("first_stage_model.")
    }
    torch.save({"state_dict": vae | {"loss.x": torch.zeros(2)}}, tmp_path / "vae.pt")
    save_file(networks[0].state_dict(), tmp_path / "vae.safetensors")
    refused(capsys, tmp_path / "vae.pt", "VAE alone", "--vae")
    torch.save(weights, tmp_path / "full.ckpt")
    for source in ("vae.pt", "vae.safetensors", "full.ckpt", folder, folder / "vae"):
        same(run(tmp_path / "no_vae.safetensors", vae=tmp_path / source), flat)
    doubled = {n: 2 * t for n, t in weights.items()}
    save_file(doubled, tmp_path / "doubled.safetensors")
    out = run(tmp_path / "doubled.safetensors", vae=tmp_path / "vae.pt")
    assert torch.equal(out["vae.quant.bias"], flat["vae.quant.bias"])
    assert torch.equal(out["unet.time1.bias"], 2 * flat["unet.time1.bias"])
    assert f"{len(vae)} not needed (the VAE that --vae replaces)" in run.said
    refused(
        capsys,
        tmp_path / "no_vae.safetensors",
        "no VAE in",
        options=["--vae", str(tmp_path / "no_vae.safetensors")],
    )


# %% Converter: what is not a Stable Diffusion -----------------------------------------------------


@pytest.mark.parametrize(
    "names, word",
    [
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320)}, "LoRA"),
        ({"unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight": (4, 320)}, "LoRA"),
        ({"base_model.model.down.to_q.lora_A.default.weight": (4, 320)}, "LoRA"),
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
        ({"model.diffusion_model.label_emb.weight": (1000, 4)}, "upscaler"),
        ({"model.diffusion_model.label_emb.0.0.weight": (3,)}, "unCLIP"),
        ({"depth_model.model.bias": (3,)}, "depth-to-image"),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (32, 8, 3, 3)},
            "instruct-pix2pix (a UNet of 8 channels)",
        ),
        ({"model.diffusion_model.input_blocks.0.0.weight": (32, 8, 3, 3)}, "instruct-pix2pix"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3)}, "no text encoder"),
        ({"fc.weight": (3,)}, "no Stable Diffusion. Of its 1 tensors the first are: fc.weight"),
        ({}, "0 tensors"),
    ],
)
def test_other_files_are_called_by_their_name(tmp_path, capsys, names, word):
    tensors = {name: torch.zeros(shape) for name, shape in names.items()}
    save_file(tensors, tmp_path / "other.safetensors")
    refused(capsys, tmp_path / "other.safetensors", word)
    torch.save(tensors, tmp_path / "other.ckpt")
    refused(capsys, tmp_path / "other.ckpt", word)


def test_missing_and_misshapen_tensors_are_named(tmp_path, weights, capsys):
    state = dict(weights)
    del state["model.diffusion_model.middle_block.1.norm.bias"]
    state["model.diffusion_model.out.0.bias"] = torch.zeros(63)
    state["model.diffusion_model.out.0.weight"] = torch.zeros(64, dtype=torch.int32)
    save_file(state, tmp_path / "broken.safetensors")
    refused(
        capsys, tmp_path / "broken.safetensors", "1 of", "tensors are missing, 2 do not fit",
        "middle_block.1.norm.bias is missing", "out.0.bias is (63,) and should be (64,)",
        "type I32",
    )  # fmt: skip
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    save_file(
        weights | {name: weights[name].permute(0, 2, 3, 1).contiguous()},
        tmp_path / "nhwc.safetensors",
    )
    refused(capsys, tmp_path / "nhwc.safetensors", "(64, 3, 3, 64) and should be (64, 64, 3, 3)")


def test_numbers_that_float16_cannot_hold_are_not_written(tmp_path, weights, run, capsys):
    name = "model.diffusion_model.out.0.bias"
    state = weights | {name: torch.full((64,), 1e5)}
    save_file(state, tmp_path / "large.safetensors")
    refused(capsys, tmp_path / "large.safetensors", "unet.norm_out.bias", "--dtype bfloat16")
    assert run(tmp_path / "large.safetensors", dtype="bfloat16")["unet.norm_out.bias"][0] > 9e4
    save_file(state | {name: torch.full((64,), float("nan"))}, tmp_path / "nan.safetensors")
    refused(capsys, tmp_path / "nan.safetensors", "unet.norm_out.bias", "in the source")


def test_the_command_line_ends_in_one_message(tmp_path, weights, capsys):
    source = tmp_path / "model.safetensors"
    save_file(weights, source)
    refused(capsys, tmp_path / "none.ckpt", "does not exist")
    refused(capsys, source, "is what is being converted", options=["-o", str(source)])
    refused(
        capsys, source, "folder that does not exist", options=["-o", str(tmp_path / "no" / "out")]
    )
    refused(capsys, source, "is a folder", options=["-o", str(tmp_path)])
    refused(capsys, source, "does not exist", options=["--vae", str(tmp_path / "vae.pt")])
    refused(capsys, "/dev/null", "is not a file")
    with pytest.raises(SystemExit) as stop:
        convert_weights.main([str(source), "--dtype", "float8"])
    assert stop.value.code == 2 and "float8" in capsys.readouterr().err
    with pytest.raises(ConversionError, match="float8"):
        convert(source, dtype="float8")
    convert_weights.main([str(source)])
    flat = tmp_path / "model.flat.safetensors"
    with safe_open(flat, "np") as file:
        assert "unet.time1.bias" in list(file.keys())
    refused(capsys, flat, "already is a flat file")


def test_a_full_disk_leaves_the_old_file_and_no_new_one(tmp_path, weights, capsys, monkeypatch):
    save_file(weights, tmp_path / "model.safetensors")
    output = convert(tmp_path / "model.safetensors", tmp_path / "out", log=lambda line: None)
    before = output.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_weights.os, "fsync", full)
    options = ["-o", str(output), "--dtype", "bfloat16"]
    refused(capsys, tmp_path / "model.safetensors", "No space left", options=options)
    assert output.read_bytes() == before


def test_what_is_no_flat_file_is_not_overwritten(tmp_path, weights, capsys):
    save_file(weights, tmp_path / "model.safetensors")
    for name, more in (("model.flat.safetensors", []), ("notes.txt", ["-o"])):
        (tmp_path / name).write_text("precious")
        options = more and [*more, str(tmp_path / name)]
        refused(capsys, tmp_path / "model.safetensors", name, "already", options=options)
        assert (tmp_path / name).read_text() == "precious"


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
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 110_000  # KiB


# %% Converter: files that mean harm ---------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def raw_checkpoint(path, data_pkl, members=(), **options):
    """A zip in PyTorch's format around any pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_a_pickle_that_calls_os_system_runs_nothing(tmp_path, weights, run, capsys):
    harm = tmp_path / "harm"
    calls = [Call(os.system, f"touch {harm}"), Call(exec, f"open({str(harm)!r}, 'w')")]
    torch.save({"state_dict": weights, "x": calls}, tmp_path / "evil.ckpt")
    run(tmp_path / "evil.ckpt")
    assert not harm.exists()
    assert "posix.system" in run.said and "exec" in run.said and "was not loaded" in run.said
    for protocol in (0, 1, 2, 4, 5):
        bare = tmp_path / f"bare{protocol}.pkl"
        bare.write_bytes(pickle.dumps(calls[0], protocol))
        refused(capsys, bare)
        refused(
            capsys, raw_checkpoint(tmp_path / f"zip{protocol}.pt", pickle.dumps(calls[0], protocol))
        )
    assert not harm.exists()


def test_an_attribute_is_never_set_and_a_name_never_imported(tmp_path, capsys):
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        code = b"\x80\x02ctrap_module\nf\n)R}X\x01\x00\x00\x00xK\x01sb."  # f(), then its x = 1
        refused(capsys, raw_checkpoint(tmp_path / "trap.pt", code), "trap_module.f", "not a dict")
    finally:
        sys.path.remove(str(tmp_path))
    assert "trap_module" not in sys.modules


def storage(kind="FloatStorage", key="0", count=4):
    """The instructions for one persistent id"""
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s.encode()
    count = b"\x8a\x09" + count.to_bytes(9, "little", signed=True)
    return (
        b"("
        + text("storage")
        + f"ctorch\n{kind}\n".encode()
        + text(key)
        + text("cpu")
        + count
        + b"tQ"
    )


def tensor(view, *, offset=0, shape=(4,), strides=(1,)):
    number = lambda n: b"\x8a\x09" + n.to_bytes(9, "little", signed=True)
    numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"
    rest = (
        number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89"
        + b"ccollections\nOrderedDict\n)R"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + rest + b"tR"


def hostile(*tensors):
    items = b"".join(b"X\x01\x00\x00\x00" + bytes([97 + k]) + t for k, t in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


HOSTILE = {  # what the message says, and the pickle
    "hash bomb": ("0 tensors", b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u."),
    "nested lists": ("a list", b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."),
    "nested tuples": ("a tuple", b"\x80\x02)" + b"\x85" * 100_000 + b"."),
    "memo index": ("0 tensors", b"\x80\x02}r\xff\xff\xff\x7f."),
    "unknown memo": ("never stored", b"\x80\x02h\x05."),
    "huge field": ("claims a field", b"\x80\x02\x8e" + struct.pack("<Q", 1 << 40) + b"x."),
    "huge text": ("claims a field", b"\x80\x02X\xff\xff\xff\xff."),
    "billion laughs": (
        "a list",
        b"\x80\x02]q\x00" + b"".join(b"(h%ch%clq%c" % (k, k, k + 1) for k in range(100)) + b".",
    ),
    "empty stack": ("empty stack", b"\x80\x020."),
    "no mark": ("end without", b"\x80\x02u."),
    "items on a tensor": ("what is not a dict", b"\x80\x02" + tensor(storage()) + b"K\x00K\x01s."),
    "append to a dict": ("not a list", b"\x80\x02}K\x01a."),
    "odd items": ("what is not a dict", b"\x80\x02}(K\x01u."),
    "calls a number": ("no name", b"\x80\x02K\x01)R."),
    "INST": ("instruction", b"\x80\x02(ios\nsystem\n."),
    "EXT": ("instruction", b"\x80\x02\x82\x01."),
    "DUP": ("instruction", b"\x80\x02}2."),
    "name without end": ("cut off", b"\x80\x02c" + b"a" * 100_000),
    "name of numbers": ("without a name", b"\x80\x04K\x01K\x02\x93."),
    "no stop": ("cut off", b"\x80\x02"),
    "beyond": ("beyond its bytes", hostile(tensor(storage(), offset=1))),
    "negative offset": ("impossible shape", hostile(tensor(storage(), offset=-1))),
    "negative stride": ("impossible shape", hostile(tensor(storage(), offset=3, strides=(-1,)))),
    "stride beyond": (
        "beyond its bytes",
        hostile(tensor(storage(), shape=(2,), strides=(1 << 60,))),
    ),
    "negative shape": (
        "impossible shape",
        hostile(tensor(storage(), shape=(-2, -2), strides=(1, 1))),
    ),
    "more strides": ("impossible shape", hostile(tensor(storage(), strides=(1, 1)))),
    "expanded": ("0 tensors", hostile(tensor(storage(), shape=(10**6, 10**6), strides=(0, 0)))),
    "larger than its bytes": ("another size", hostile(tensor(storage(count=5), shape=(5,)))),
    "smaller than its bytes": ("another size", hostile(tensor(storage(count=3), shape=(3,)))),
    "negative count": ("unknown type", hostile(tensor(storage(count=-4)))),
    "two types": (
        "two different things",
        hostile(tensor(storage()), tensor(storage("DoubleStorage", count=2), shape=(2,))),
    ),
    "two sizes": (
        "two different things",
        hostile(tensor(storage()), tensor(storage(count=8), shape=(8,))),
    ),
    "another file": ("etc/passwd is missing", hostile(tensor(storage(key="../../../etc/passwd")))),
    "unknown storage": ("unknown type", hostile(tensor(storage("system")))),
    "a module": ("a program", b"\x80\x02(X\x06\x00\x00\x00moduleK\x01K\x01K\x01K\x01tQ."),
    "an odd persistent id": ("unknown way", b"\x80\x02K\x01Q."),
    "a tensor of nothing": ("something else", hostile(tensor(b"N"))),
    "its own state_dict": ("0 tensors", b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s."),
    "a list": ("a list", b"\x80\x02]."),
    "a set as dict": ("a set", b"\x80\x04\x8f(K\x01\x90."),
    "a long state": ("0 tensors", b"\x80\x02}(" + b"K\x01K\x02" * 10_000 + b"u."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_with_one_message(tmp_path, capsys, name):
    word, attack = HOSTILE[name]
    path = raw_checkpoint(tmp_path / "x.ckpt", attack, [("archive/data/0", bytes(16))])
    refused(capsys, path, word)
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    info = pickle.dumps({"little_endian": True}, 2)
    storages = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)
    (tmp_path / "legacy.ckpt").write_bytes(magic + info + attack + storages)
    refused(capsys, tmp_path / "legacy.ckpt")


def test_only_text_and_whole_numbers_become_keys():
    """Anything else would have to be hashed, which is where a deep nest of tuples kills Python."""
    data = pickle.dumps({("a",): 1, 2: 3, "b": 4, 1.5: 5, True: 6, b"c": 7}, 2)
    assert convert_weights.Pickle(io.BytesIO(data), {}, set()).run() == {2: 3, "b": 4}


def test_the_hand_made_tensor_is_good_when_nothing_is_wrong(tmp_path, capsys):
    """or the attacks above would be refused for another reason"""
    path = raw_checkpoint(
        tmp_path / "x.ckpt", hostile(tensor(storage())), [("archive/data/0", bytes(16))]
    )
    source = convert_weights.read_file(path)
    assert source.tensors["a"].float32().tolist() == [0, 0, 0, 0]


def test_a_zip_that_contradicts_itself_is_refused(tmp_path, capsys):
    good = hostile(tensor(storage()))
    data = [("archive/data/0", bytes(16))]
    deflated = raw_checkpoint(
        tmp_path / "deflated.pt", good, data, compression=zipfile.ZIP_DEFLATED
    )
    refused(capsys, deflated, "compressed")
    refused(
        capsys,
        raw_checkpoint(tmp_path / "two.pt", good, [*data, ("b/data.pkl", good)]),
        "not one that PyTorch",
    )
    with pytest.warns(UserWarning):
        twice = raw_checkpoint(tmp_path / "twice.pt", good, data + data)
    refused(capsys, twice, "two members")
    script = raw_checkpoint(tmp_path / "script.pt", good, [*data, ("archive/constants.pkl", b"")])
    refused(capsys, script, "TorchScript")
    refused(capsys, raw_checkpoint(tmp_path / "missing.pt", good), "storage 0 is missing")
    refused(
        capsys,
        raw_checkpoint(tmp_path / "big.pt", good, [*data, ("archive/byteorder", b"big")]),
        "big-endian",
    )
    good_bytes = raw_checkpoint(tmp_path / "good.pt", good, data).read_bytes()
    (tmp_path / "junk.pt").write_bytes(b"junk" + good_bytes)
    refused(capsys, tmp_path / "junk.pt", "no format known")
    renamed = good_bytes.replace(b"archive/data/0", b"archive/data/1", 1)  # only the local header
    (tmp_path / "renamed.pt").write_bytes(renamed)
    refused(capsys, tmp_path / "renamed.pt", "contradicts itself")
    place = good_bytes.rindex(b"PK\1\2")
    encrypted = good_bytes[: place + 8] + b"\1" + good_bytes[place + 9 :]
    (tmp_path / "flag.pt").write_bytes(encrypted)
    refused(capsys, tmp_path / "flag.pt", "encrypted")
    later = good_bytes[: place + 6] + b"\xff" + good_bytes[place + 7 :]  # zip's version 25.5
    (tmp_path / "later.pt").write_bytes(later)
    refused(capsys, tmp_path / "later.pt", "version")


def test_things_that_are_no_weights_are_named(tmp_path, capsys):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"))
    for data, word in (
        (b"", "is empty"), (b"hello, this is a text", "no format known"),
        (b"<!DOCTYPE html>", "web page"),
        (b"7z\xbc\xaf\x27\x1c", "7z archive"),
        (buffer.getvalue(), "tar archive"), (b"\x1f\x8b\x08", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"GGUF\3", "GGUF"),
        (b"PK\3\4" + bytes(100), "damaged"), (pickle.dumps({"a": 1}), "not one that PyTorch made"),
        (struct.pack("<Q", 1 << 60) + b"{}", "no format known"), (b"\x80", "cut off"),
    ):  # fmt: skip
        (tmp_path / "x.ckpt").write_bytes(data)
        refused(capsys, tmp_path / "x.ckpt", word)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, capsys, kind):
    path = tmp_path / "whole"
    tensors = {f"t{k}": torch.ones(20 + k) for k in range(4)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    assert len(convert_weights.read_file(path).tensors) == 4
    for size in sorted({*range(64), *range(64, len(data), 61), *range(len(data) - 24, len(data))}):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ConversionError):
            convert_weights.read_file(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_with_any_byte_changed_gives_tensors_or_a_message(tmp_path, kind):
    path = tmp_path / "whole"
    tensors = {f"t{k}": torch.ones(2 + k) for k in range(3)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    data, rng = path.read_bytes(), np.random.default_rng(1)
    outcomes = set()
    for _ in range(700):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 2):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            for tensor in convert_weights.read_file(path).tensors.values():
                tensor.float32()
            outcomes.add("read")
        except ConversionError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# %% The file itself -------------------------------------------------------------------------------

SOURCE = (HERE / "sd.py").read_text("utf-8")


def test_the_contents_in_the_docstring_are_the_sections():
    contents = sd.__doc__[sd.__doc__.index("\nI    1") :].split("\n\n")[0] + "\n"
    contents = re.findall(r"(\d+) ([A-Z][^\d\n]*?)(?=  |\n)", contents)
    sections = re.findall(r"^# %% (\d+)\. (.*?) -+$", SOURCE, re.MULTILINE)
    told = [(n, title.strip()) for n, title in contents]
    assert [n for n, _ in told] == [n for n, _ in sections]
    for (_, a), (_, b) in zip(told, sections):
        assert a.startswith(b) or b.startswith(a), (a, b)


def test_the_dependencies_are_the_same_five_in_both_places():
    inline = re.search(r"# /// script\n(.*?)# ///", SOURCE, re.DOTALL)[1]
    inline = tomllib.loads("\n".join(line.removeprefix("# ") for line in inline.splitlines()))
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    assert inline["dependencies"] == project["dependencies"]
    assert inline["requires-python"] == project["requires-python"]
    names = {re.match(r"[a-z]+", d)[0] for d in project["dependencies"]}
    assert names == {"mlx", "numpy", "safetensors", "regex", "pillow"}


def test_nothing_else_is_imported():
    for name in ("sd", "convert_weights"):
        text = (HERE / f"{name}.py").read_text("utf-8")
        tops = re.findall(
            r"^ *(?:from|import) (\w+)(?:\.\w+)*(?: import .*| as .*)?(?:  #.*)?$",
            text,
            re.MULTILINE,
        )
        assert len(tops) > 8
        allowed = {"mlx", "numpy", "safetensors", "regex", "PIL", "convert_weights"}
        allowed |= {"huggingface_hub"} if name == "convert_weights" else set()  # where it is there
        assert set(tops) <= allowed | set(sys.stdlib_module_names)


# %% At full size ----------------------------------------------------------------------------------


def assert_full_size(name, result, truth):
    result, truth = np.array(result), truth.numpy()
    print(f"{name}: relative error {np.abs(result - truth).max() / np.abs(truth).max():.1e}")
    assert_close(result, truth, 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("name", SIZES)
def test_the_unet_at_full_size_is_that_of_diffusers(name):
    options = SIZES[name]
    theirs = shake(UNet2DConditionModel(**options).eval())
    heads = options["attention_head_dim"]
    heads = [heads] * 4 if isinstance(heads, int) else list(heads)
    ours = sd.UNet([320, 640, 1280, 1280], heads, 32, options["cross_attention_dim"])
    ours = ours_from(ours, "unet", theirs)
    assert_full_size(f"the UNet of {name}", *run_unet(theirs, ours, h=64, w=64))


@pytest.mark.full
@pytest.mark.parametrize("name", SIZES)
def test_the_text_model_at_full_size_is_that_of_transformers(name):
    width = SIZES[name]["cross_attention_dim"]
    config = CONFIGS["sd1" if width == 768 else "sd2"]["text"]
    config = config | {"width": width, "layers": 12 if width == 768 else 23, "heads": width // 64}
    theirs = shake(reference_models(CONFIGS["sd1"] | {"text": config})[0])
    config.pop("pad")
    ours = ours_from(sd.TextEncoder(vocabulary=49408, **config), "text_encoder", theirs)
    assert_full_size(f"the text model of {name}", *run_text(theirs, ours))


@pytest.mark.full
@pytest.mark.parametrize("network", ["encoder", "decoder"])
def test_the_vae_at_full_size_is_that_of_diffusers(network):
    config = {"widths": [128, 256, 512, 512], "groups": 32}
    theirs = reference_models(CONFIGS["sd1"] | {"vae": config | {"scale": 0.18215}})[2]
    ours = ours_from(sd.VAE(**config), "vae", shake(theirs))
    assert_full_size(f"the VAE's {network}", *RUNS[network][0](theirs, ours))
