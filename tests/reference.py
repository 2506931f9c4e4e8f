"""What the tests share: reference models, the same weights under sd.py's names, sources to convert.

The truth comes from outside: diffusers, transformers and PyTorch, on random weights. their_name()
is the table of names written out a second time, apart from convert_weights.py's, and
original_names() in tiny/train.py a third time, for the names of the original Stable Diffusion.
conftest.py makes the fixtures known to the tests in this folder; others may import them.
"""

import importlib
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from mlx.utils import tree_flatten
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

import convert_weights
import sd
from convert_weights import convert

ROOT = Path(__file__).resolve().parents[1]
MERGES = (ROOT / "tiny" / "merges.txt").read_text("utf-8")
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # of small models: several wait for each other, and use up the cores
sys.path.append(str(ROOT / "tiny"))
train = importlib.import_module("train")
original_names = train.original_names  # (vae, unet, text) -> {name in an original file: tensor}


def last(generator):
    *_, x = generator
    return x


def quiet(line):
    """A log for what is not to be printed."""


# %% Comparing -------------------------------------------------------------------------------------


def assert_close(ours, truth, most, what=""):
    """The largest difference, relative to the largest number, is at most `most`. -> it."""
    ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
    assert ours.shape == truth.shape, f"{what}: {ours.shape} for {truth.shape}"
    error = np.abs(ours - truth).max() / np.abs(truth).max()
    worst = np.argsort(-np.abs(ours - truth).ravel())[:5]
    pairs = ", ".join(f"{ours.ravel()[i]:.6g} for {truth.ravel()[i]:.6g}" for i in worst)
    assert error <= most, f"{what}: relative error {error:.1e}, allowed {most:.0e}; {pairs}"
    return error


def checked(what, against, how_close):
    """One line for README's "What was checked". A number is an error relative to the largest."""
    close = how_close if isinstance(how_close, str) else f"relative error {how_close:.1e}"
    print(f"checked: {what} | {against} | {close}")


def assert_same(a, b):
    """Two dicts of tensors: the same names, types and bits."""
    assert a.keys() == b.keys()
    different = [
        name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])
    ]
    assert not different


def nhwc(x):
    return mx.array(x.numpy().transpose(0, 2, 3, 1))


def nchw(x):
    return np.array(x).transpose(0, 3, 1, 2)


def cli(*args, cwd=None, script="sd.py", env=None):
    command = [sys.executable, ROOT / script, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300, check=False
    )


def raising(error):
    """A function that does nothing else."""

    def raise_it(*_, **__):
        raise error

    return raise_it


# %% Names -----------------------------------------------------------------------------------------

RESIDUAL = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
TRANSFORMER = {
    "attn1.to_out": "attn1.to_out.0", "attn2.to_out": "attn2.to_out.0",
    "ff_in": "ff.net.0.proj", "ff_out": "ff.net.2",
}  # fmt: skip


def their_name(name):
    """A tensor's name in a flat file -> its name in diffusers' or transformers' model."""
    part, rest = name.split(".", 1)
    rest, leaf = rest.rsplit(".", 1)
    translate = {"unet": their_unet, "vae": their_vae, "text_encoder": their_text}[part]
    return f"{translate(rest)}.{leaf}"


def their_unet(rest):
    top = {
        "time1": "time_embedding.linear_1", "time2": "time_embedding.linear_2",
        "down.0.0": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out",
    }  # fmt: skip
    if rest in top:
        return top[rest]
    side, *numbers = rest.split(".")
    if side == "middle":
        slot, inner = int(numbers[0]), ".".join(numbers[1:])
        block, layer = "mid_block", slot // 2
    else:
        row, slot, inner = int(numbers[0]), int(numbers[1]), ".".join(numbers[2:])
        level, layer = divmod(row - 1 if side == "down" else row, 3)
        block = f"{side}_blocks.{level}"
    if inner == "conv":
        return f"{block}.{side}samplers.0.conv"
    if slot != 1:
        return f"{block}.resnets.{layer}.{RESIDUAL.get(inner, inner)}"
    if inner not in ("norm", "proj_in", "proj_out"):
        inner = f"transformer_blocks.0.{TRANSFORMER.get(inner, inner)}"
    return f"{block}.attentions.{layer}.{inner}"


def their_vae(rest):
    top = {"quant": "quant_conv", "post_quant": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        top |= {f"{side}.0": f"{side}.conv_in", f"{side}_out": f"{side}.conv_out"}
        top |= {f"{side}_norm": f"{side}.conv_norm_out"}
    if rest in top:
        return top[rest]
    side, row, inner = rest.split(".", 2)
    row, middle = int(row), 12 if side == "encoder" else 1
    if middle <= row < middle + 3:
        if row == middle + 1:
            inner = {"norm": "group_norm", "attention.to_out": "to_out.0"}.get(inner, inner)
            return f"{side}.mid_block.attentions.0.{inner.removeprefix('attention.')}"
        return f"{side}.mid_block.resnets.{(row - middle) // 2}.{RESIDUAL.get(inner, inner)}"
    level, layer = divmod(row - 1, 3) if side == "encoder" else divmod(row - 4, 4)
    way = "down" if side == "encoder" else "up"
    block = f"{side}.{way}_blocks.{level}"
    if inner == "conv":
        return f"{block}.{way}samplers.0.conv"
    return f"{block}.resnets.{layer}.{RESIDUAL.get(inner, inner)}"


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


def openclip_names(weights, layers):
    """An original checkpoint's text encoder as SD 2.x files have it: OpenCLIP's names, q, k and v
    in one matrix."""
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


# %% Reference models ------------------------------------------------------------------------------
# Of diffusers and transformers, with random weights, and sd.py's networks with the same ones.

CONFIGS = {
    "sd1": {  # small relatives of Stable Diffusion 1.x and 2.x
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
FULL = {  # the real ones, for -m full
    "sd1": {
        "size": 512,
        "prediction": "eps",
        "text": CONFIGS["sd1"]["text"] | {"width": 768, "layers": 12, "heads": 12},
        "unet": {
            "widths": [320, 640, 1280, 1280],
            "heads": [8, 8, 8, 8],
            "groups": 32,
            "context_width": 768,
        },
        "vae": {"widths": [128, 256, 512, 512], "groups": 32, "scale": 0.18215},
    },
}
FULL["sd2"] = FULL["sd1"] | {
    "size": 768,
    "prediction": "v",
    "text": CONFIGS["sd2"]["text"] | {"width": 1024, "layers": 23, "heads": 16},
    "unet": FULL["sd1"]["unet"] | {"heads": [5, 10, 20, 20], "context_width": 1024},
}


def whole_config(config):
    """One of CONFIGS as the JSON of a flat file."""
    return config | {"kind": "model", "text": config["text"] | {"vocabulary": 49408}}


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
    """-> (text model, UNet, VAE) of diffusers and transformers for a config, a dict as CONFIGS'."""
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
        elif "norm" in name and name.endswith("weight"):
            p.copy_(1 + 0.2 * noise)
        else:
            p.copy_(0.1 * scale * noise)
    return model


def our_models(config, text, unet, vae):
    """-> sd.py's (TextEncoder, UNet, VAE) with the weights of these reference models."""
    c = {part: dict(config[part]) for part in ("text", "unet", "vae")}
    c["text"].pop("pad")
    c["vae"].pop("scale")
    return (
        ours_from(sd.TextEncoder(vocabulary=49408, **c["text"]), "text_encoder", text),
        ours_from(sd.UNet(**c["unet"]), "unet", unet),
        ours_from(sd.VAE(**c["vae"]), "vae", vae),
    )


def write_flat(path, config, ours):
    """A flat file, written by the test itself. ours: sd.py's (TextEncoder, UNet, VAE)."""
    weights = {
        f"{part}.{name}": p
        for part, network in zip(("text_encoder", "unet", "vae"), ours)
        for name, p in tree_flatten(network.parameters())
    }
    weights["tokenizer.merges"] = mx.array(np.frombuffer(MERGES.encode(), np.uint8))
    return write_file(path, whole_config(config), weights)


def write_file(path, config, weights):
    """A flat file of any kind. config: its JSON, a dict with the kind in it."""
    metadata = {"format": "sd.py 1", "config": json.dumps(config)}
    mx.save_safetensors(str(path), weights, metadata)
    return path


def words_file(path, words):
    arrays = {word: mx.array(vectors.numpy()) for word, vectors in words.items()}
    return write_file(path, {"kind": "words"}, arrays)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small model's flat file, its config and its weights."""
    config = CONFIGS["sd1"]
    networks = our_models(config, *reference_models(config))
    path = write_flat(tmp_path_factory.mktemp("flat") / "small.safetensors", config, networks)
    weights, metadata = mx.load(str(path), return_metadata=True)
    return path, json.loads(metadata["config"]), weights


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def pair(request):
    """-> (config, (text, unet, vae) of the reference, (text, unet, vae) of sd.py)."""
    config = CONFIGS[request.param]
    theirs = tuple(shake(m, seed=i) for i, m in enumerate(reference_models(config)))
    return config, theirs, our_models(config, *theirs)


@pytest.fixture(scope="session")
def exchanged(pair):
    """sd.py's networks of a pair again, with faster layers."""
    config, reference, _ = pair
    networks = our_models(config, *reference)
    for network in networks:
        sd.accelerate(network, mx.float32)
    return networks


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
def tiny_pipeline(their_tokenizer):
    """diffusers' own pipeline with the miniature's weights."""
    config, weights = sd.read_flat(sd.TINY)
    text, unet, vae = reference_models(vars(config))
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


@pytest.fixture(scope="session")
def drawn():
    """A picture of the miniature's world, 128 x 128."""
    return Image.fromarray(train.drawn(7))


@pytest.fixture(scope="session")
def picture(drawn):
    return sd.load_picture(drawn)[0]


@pytest.fixture(scope="session")
def hole():
    """A mask for it, 1 where to paint: a quarter, on the grid of the latents."""
    mask = np.zeros((128, 128), np.float32)
    mask[40:104, 32:96] = 1
    return mask


def as_mask(hole):
    return Image.fromarray((hole * 255).astype(np.uint8))


def scheduler(kind, **more):
    """diffusers' scheduler with the numbers of Stable Diffusion's own configuration."""
    more |= {"skip_prk_steps": True} if kind is PNDMScheduler else {"clip_sample": False}
    return kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, **more,
    )  # fmt: skip


def strings():
    """Some thousand strings of every kind that has broken a tokenizer."""
    rng = random.Random(0)
    kinds = [
        [chr(i) for i in range(32, 127)],
        ["a", "red", "house,", "night!", "househunter", "don't", "we'll", "3D", "1984"],
        [*"éèêëàâäöüßçñøåæœÀÉÎÕÜŸžščřďťňğışőű", "e\u0301", "n\u0303", "\u212b"],
        ["🚀", "👩‍🚀", "🏳️‍🌈", "❤️", "👍🏽", "🇩🇪", "😀"],
        [*"富嶽三十六景神奈川沖浪裏東京한국어그림ひらがなカタカナ"],
        [*"0123456789٣४五Ⅷ²½", "1,000.50", "007"],
        [
            "...", "!!!", "?!", "--", "((", "))", "'s", "'S", "''ll", "'", '"', "&amp;", "_", "#$%",
            "—", "“”",
        ],
        [
            "\x00", "\x01", "\x1b", "\x7f", "\x85", "\t", "\n", "\r", "\x0b", "\x1c",
            "\u200b", "\ufeff", "\u00a0", "\u3000", "\u2028",
        ],
        [
            *"ΣΑΣςΩЖщ", "السلام", "नमस्ते", "ไทย", "ǅ", "İ", "ﬁ", "\U0001d400", "\ud7a3",
            "<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>",
        ],
    ]  # fmt: skip
    for parts in kinds:
        yield from parts
        for _ in range(150):
            yield "".join(rng.choices(parts, k=rng.randint(1, 12)))
            yield " ".join(rng.choices(parts, k=rng.randint(1, 12)))
    everything = [part for parts in kinds for part in parts] + [" ", "  "]
    for _ in range(1000):
        yield "".join(rng.choices(everything, k=rng.randint(1, 40)))
    yield from ("", " ", "a" * 500, "lighthouse " * 1000)
    yield "".join(rng.choices(everything, k=10_000))


# %% Running them ----------------------------------------------------------------------------------


def run_text(theirs, ours):
    ids = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    return ours(mx.array(ids.numpy())), theirs(ids).last_hidden_state


def run_unet(theirs, ours, h=16, w=8, t=371):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, h, w, generator=generator)
    context = torch.randn(2, 77, theirs.config.cross_attention_dim, generator=generator)
    return nchw(ours(nhwc(x), t, mx.array(context.numpy()))), theirs(x, t, context).sample


def run_encoder(theirs, ours):
    x = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(2))
    mean, log_variance = ours.encode(nhwc(x))
    truth = theirs.encode(x).latent_dist
    return nchw(mx.concatenate([mean, log_variance], -1)), torch.cat([truth.mean, truth.logvar], 1)


def run_decoder(theirs, ours):
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(3))
    return nchw(ours.decode(nhwc(x))), theirs.decode(x).sample


RUNS = {  # name: function, which of the three networks
    "text model": (run_text, 0), "UNet": (run_unet, 1),
    "VAE encoder": (run_encoder, 2), "VAE decoder": (run_decoder, 2),
}  # fmt: skip


# %% LoRAs, ControlNets, the safety checker --------------------------------------------------------

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


@pytest.fixture(scope="session")
def lora(tiny_pipeline):
    """A LoRA for all that a LoRA may change: {(network, layer): (up, down)}."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for key, (o, c, *window) in lora_layers(tiny_pipeline).items():
        up = torch.randn(o, RANK, generator=generator) * 0.05
        down = torch.randn(RANK, c, *window, generator=generator) / math.sqrt(c * math.prod(window))
        out[key] = up, down
    return out


def kohya_names(lora, text_start="lora_te"):
    """A LoRA under the names that most files have: underscores, and an alpha for each layer."""
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


def dotted_names(lora, ends, text_ends):
    """A LoRA under diffusers' later names, with dots; these tell no alpha."""
    out = {}
    for (network, layer), (up, down) in lora.items():
        layer = layer if network == "unet" else "text_model." + layer.removeprefix("text_model.")
        more = (1,) * (down.ndim - 2)
        for end, tensor in zip(ends if network == "unet" else text_ends, (up, down)):
            tensor = tensor.reshape(*tensor.shape, *more) if tensor is up else tensor
            out[f"{network}.{layer}.{end}.weight"] = tensor.clone()
    return out


@pytest.fixture
def flat_lora(lora, tmp_path):
    """A LoRA for all layers, as most files are, converted."""
    save_file(kohya_names(lora), tmp_path / "lora.safetensors")
    return convert(tmp_path / "lora.safetensors", dtype="float32", log=quiet)


@pytest.fixture(scope="session")
def controlnet(tiny_pipeline):
    """A random ControlNet for the miniature, as diffusers' model."""
    theirs = ControlNetModel.from_unet(tiny_pipeline.unet)
    shake(theirs.controlnet_cond_embedding, seed=1)
    for i, layer in enumerate([*theirs.controlnet_down_blocks, theirs.controlnet_mid_block]):
        shake(layer, 0.3, seed=i)
    return theirs.eval()


def flat_controlnet(controlnet, folder):
    controlnet.save_pretrained(folder / "control")
    return convert(folder / "control", dtype="float32", log=quiet)


@pytest.fixture(scope="session")
def control(controlnet, tmp_path_factory):
    return sd.ControlNet(flat_controlnet(controlnet, tmp_path_factory.mktemp("control")))


def original_controlnet(controlnet):
    """A ControlNet's weights under the names of lllyasviel's files."""
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
    names = original_names(empty, shared, empty)
    out |= {n.replace("model.diffusion_model.", "control_model."): t for n, t in names.items()}
    return out


@pytest.fixture(scope="session")
def checker():
    """A random safety checker, as diffusers' model. Tests may fill in thresholds of their own."""
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 224, "patch_size": 14, "projection_dim": 48,
        "hidden_act": "quick_gelu",
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision, projection_dim=48)
    return shake(StableDiffusionSafetyChecker(config).eval())


# %% Sources to convert ----------------------------------------------------------------------------
# Small random models, as an original checkpoint's dict of weights and as a diffusers folder.


def small_networks(activation="quick_gelu", linear=False, layers=2, heads=8):
    """-> (VAE, UNet, text model) whose widths fit the rules of the published models: 64 to a head,
    32 groups."""
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
    # Norms start as ones and zeros, which would hide a swap.
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
    return load_file(convert(path, dtype="float32", log=quiet))


@pytest.fixture(scope="session")
def networks_v2():
    return small_networks("gelu", linear=True, layers=24, heads=(1, 1, 2, 2))


@pytest.fixture(scope="session")
def weights_v2(networks_v2):
    return openclip_names(original_names(*networks_v2), 24)


def write_folder(path, networks, prediction="epsilon", **options):
    vae, unet, text = networks
    unet.save_pretrained(path / "unet", **options)
    vae.save_pretrained(path / "vae", **options)
    options.pop("safe_serialization", None)
    text.save_pretrained(path / "text_encoder", **options)
    scheduler(PNDMScheduler, prediction_type=prediction).save_pretrained(path / "scheduler")
    (path / "tokenizer").mkdir()
    lines = f"#version: 0.2\n{MERGES}ha bib</w>\n"  # one more than CLIP uses
    (path / "tokenizer" / "merges.txt").write_text(lines, "utf-8")
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return path


@pytest.fixture(scope="session")
def folder(networks, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("diffusers") / "model", networks)


@pytest.fixture
def run(tmp_path):
    """convert(), in float32, keeping what it says and giving back the tensors that it wrote."""

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


@pytest.fixture
def refused(capsys):
    """A call of the command line that ends in one message with these words, status 2, no file."""

    def refused(source, *words, options=()):
        folder = Path(source).parent
        before = {p: p.stat().st_size for p in folder.rglob("*")}
        with pytest.raises(SystemExit) as stop:
            convert_weights.main([str(source), *map(str, options)])
        assert stop.value.code == 2
        _, err = capsys.readouterr()
        assert err.startswith("convert_weights.py: ") and "Traceback" not in err
        assert err.strip().count("\n") == 0
        for word in words:
            assert word in err
        assert {p: p.stat().st_size for p in folder.rglob("*")} == before
        return err

    return refused
