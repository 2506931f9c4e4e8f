"""LoRAs and their relatives: PEFT's own layers and LyCORIS' formulas, in PyTorch, are the truth.

How close? A change of depth r is a sum of r products (r * r for Tucker's form), each rounded to
float32, 6e-8 of it; the changed weight is rounded once more. In sums of 64 numbers of mixed signs
roundings grow like the root, to some 5e-7 of the largest number. So 1e-6 is allowed, everywhere.
"""

import copy
import functools
import json
import math

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import sd
from convert_weights import ConversionError, convert, name_lora_layers
from sd_more.formats import lora
from tests.reference import RANK, assert_close, checked, kohya_names, quiet, their_name, write_file

pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match")

MOST = 1e-6
UNET = ["to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv_in", "conv1", "time_emb_proj", "conv"]
TEXT = ["q_proj", "out_proj", "fc1"]
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
W = torch.ones(8, 4), torch.ones(4, 8)
GOOD = {f"{KOHYA}.lora_up.weight": W[0], f"{KOHYA}.lora_down.weight": W[1]}


def random(*shape, seed=0, scale=0.2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def written(tensors, tmp_path, metadata=None, name="it.safetensors", log=quiet):
    """A file of these tensors, converted. -> the flat file's path"""
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / name, metadata=metadata)
    return convert(tmp_path / name, dtype="float32", log=log)


def changed(flat, strength=1.0):
    """-> {name: array}: the miniature's weights that a flat file changes, as PyTorch has them"""
    config, weights = sd.read_flat(sd.TINY)
    _, after = sd.lora(flat, strength)(config, weights)
    after = {name: np.array(w) for name, w in after.items() if w is not weights[name]}
    return {n: w.transpose(0, 3, 1, 2) if w.ndim == 4 else w for n, w in after.items()}


@functools.cache
def plain(name):
    """One of the miniature's weights, as PyTorch has it, in float64."""
    weight = np.array(sd.read_flat(sd.TINY)[1][name].astype(mx.float32), np.float64)
    return torch.tensor(weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight)


# %% PEFT ------------------------------------------------------------------------------------------

WITH_BIAS = ["to_out.0", "proj_in", "time_emb_proj", "out_proj", "fc1"]
ODD = {"rank_pattern": {"to_q": 3, "q_proj": 3}, "alpha_pattern": {"to_q": 7, "fc1": 5}}
PEFT = {
    "LoRA": (peft.LoraConfig, {"r": 4, "lora_alpha": 6}),
    "rsLoRA": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True, **ODD}),
    "LoRA, patterns": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, **ODD}),
    "LoRA, biases": (
        peft.LoraConfig,
        {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": WITH_BIAS},
    ),
    "DoRA": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "LoHa": (peft.LoHaConfig, {"r": 4, "alpha": 6}),
    "LoHa, patterns": (peft.LoHaConfig, {"r": 4, "alpha": 6, **ODD}),
    "LoHa, Tucker": (peft.LoHaConfig, {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "LoKr": (peft.LoKrConfig, {"r": 2, "alpha": 3}),
    "LoKr, full": (peft.LoKrConfig, {"r": 64, "alpha": 32}),
    "LoKr, both": (peft.LoKrConfig, {"r": 2, "alpha": 3, "decompose_both": True}),
    "LoKr, Tucker": (peft.LoKrConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True}),
}


@pytest.fixture(params=PEFT)
def adapted(request, tiny_pipeline):
    """-> what it is called; the miniature's UNet and text model with random adapters of a kind"""
    make, options = PEFT[request.param]
    start = "init_lora_weights" if make is peft.LoraConfig else "init_weights"
    torch.manual_seed(0)
    models = {}
    for name, layers in (("unet", UNET), ("text_encoder", TEXT)):
        model = copy.deepcopy(getattr(tiny_pipeline, name))
        config = make(**{"target_modules": layers, start: False, **copy.deepcopy(options)})
        models[name] = peft.get_peft_model(model, config)
        for key, parameter in models[name].named_parameters():
            if "magnitude" in key:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return request.param, models


@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_what_peft_saves_changes_what_it_changes(adapted, tmp_path, strength):
    """Every weight of both networks, after PEFT has merged them, with its factor on the change."""
    kind, models = adapted
    worst = 0
    for network, model in models.items():
        folder = tmp_path / network
        model.save_pretrained(folder)
        flat = convert(folder / "adapter_model.safetensors", dtype="float32", log=quiet)
        ours = changed(flat, strength)
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(strength)
        merged = model.merge_and_unload().state_dict()
        count = 0
        for name in sd.read_flat(sd.TINY)[1]:
            if name.startswith(network + "."):
                key = their_name(name)
                key = key if key in merged else f"text_model.{key}"
                truth = merged[key].reshape(plain(name).shape)
                if name in ours:
                    worst = max(worst, assert_close(ours[name], truth, MOST, name))
                    count += 1
                else:
                    assert torch.equal(plain(name).float(), truth), name
        assert count == len(ours) > 10
    checked(f"a {kind} of strength {strength:g}", "peft", worst)


def test_one_file_may_hold_both_networks(adapted, tmp_path):
    """As diffusers saves it: networks as prefixes, PEFT's config of each in the metadata."""
    _, models = adapted
    together, told, apart = {}, {}, {}
    for network, model in models.items():
        model.save_pretrained(tmp_path / network)
        path = tmp_path / network / "adapter_model.safetensors"
        apart |= load_file(convert(path, dtype="float32", log=quiet))
        start = "base_model.model."
        names = {n: n.replace(start, f"{network}.", 1) for n in load_file(path)}
        together |= {names[n]: tensor for n, tensor in load_file(path).items()}
        config = json.loads((path.parent / "adapter_config.json").read_text())
        told |= {f"{network}.{key}": value for key, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    flat = load_file(written(together, tmp_path, metadata))
    assert flat.keys() == apart.keys() and len(flat) > 20
    assert all(torch.equal(tensor, apart[name]) for name, tensor in flat.items())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"alpha_pattern": {"(a+)+$": 1}}, "a pattern that is no name"),
        ({"alpha_pattern": {"to_q": "x"}}, "no numbers"),
        ({"rank_pattern": [1]}, "no numbers"), ({"rank_pattern": {"to_q": 10**400}}, "no numbers"),
        ({"alpha_pattern": {str(i): 1 for i in range(9000)}}, "no numbers"),
        ({"lora_alpha": 10**400}, "alpha 1e+300"), ({"r": 10**400}, "rank 1e+300"),
        ({"r": None, "rank_pattern": {"to_q": 4}}, "no rank"),
        ({"alpha_pattern": {"to_q": 9e5}, "lora_alpha": 2e6}, "alpha 2e+06"),
    ],
)  # fmt: skip
def test_odd_patterns_are_refused(tmp_path, change, says):
    tensors = {f"{QUERY}.lora_A.weight": W[1], f"{QUERY}.lora_B.weight": W[0]}
    metadata = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 4, **change})}
    with pytest.raises(ConversionError) as error:
        written(tensors, tmp_path, metadata)
    assert says in str(error.value)


# %% LyCORIS ---------------------------------------------------------------------------------------
# The formulas once more, in float64, from the papers and from lycoris/functional/. Its rank is
# w1_b's or w2_b's rows, and LoKr of two full matrices has no factor, whatever its alpha says.

CONV, LINEAR, FIRST = (
    "unet.middle.0.conv1.weight", "unet.middle.1.ff_in.weight", "unet.down.0.0.weight"
)  # fmt: skip
LAYERS = {
    CONV: "lora_unet_mid_block_resnets_0_conv1", FIRST: "lora_unet_conv_in",
    LINEAR: "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
}  # fmt: skip


def lycoris(kind, o, i, *window, rank=3, seed=0):
    """-> {part: tensor}, and the change in float64"""
    n, k = [0], math.prod(window)

    def make(name, *shape):
        n[0] += 1
        tensors[name] = random(*shape, seed=100 * seed + n[0], scale=0.5)
        return tensors[name].double()

    tensors = {}
    if kind == "loha":
        first, second = (
            make(f"hada_w{j}_a", o, rank) @ make(f"hada_w{j}_b", rank, i * k) for j in "12"
        )
        return tensors, (first * second).reshape(o, i, *window)
    if kind == "loha-tucker":
        equation = "pqhw,po,qi->oihw"
        first, second = (
            torch.einsum(
                equation, make(f"hada_t{j}", rank, rank, *window), make(f"hada_w{j}_a", rank, o),
                make(f"hada_w{j}_b", rank, i),
            )
            for j in "12"
        )  # fmt: skip
        return tensors, first * second
    a, c = 4, 2  # the rows and columns of w1
    if kind == "lokr-both":
        w1 = make("lokr_w1_a", a, rank) @ make("lokr_w1_b", rank, c)
    else:
        w1 = make("lokr_w1", a, c)
    o, i = o // a, i // c
    if kind == "lokr-tucker":
        t, wa, wb = (
            make("lokr_t2", rank, rank, *window), make("lokr_w2_a", rank, o),
            make("lokr_w2_b", rank, i),
        )  # fmt: skip
        w2 = torch.einsum("pqhw,po,qi->oihw", t, wa, wb)
    elif kind == "lokr-full":
        w2 = make("lokr_w2", o, i, *window)
    elif kind == "lokr-4d":  # lycoris/functional/lokr.py keeps the window's axes
        w2 = make("lokr_w2_a", o, rank) @ make("lokr_w2_b", rank, i, *window).reshape(rank, -1)
    else:
        w2 = make("lokr_w2_a", o, rank) @ make("lokr_w2_b", rank, i * k)
    w2 = w2.reshape(o, i, *window)
    whole = torch.stack(  # kron, written out
        [torch.cat([w1[x, y] * w2 for y in range(c)], 1) for x in range(a)]
    )
    return tensors, whole.reshape(a * o, c * i, *window)


KINDS = ["loha", "loha-tucker", "lokr", "lokr-both", "lokr-tucker", "lokr-full", "lokr-4d"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [None, 0, 1.5])
def test_what_lycoris_saves_changes_as_its_formulas_say(tmp_path, kind, alpha):
    """A convolution's weight and a linear layer's, with a strength, under kohya's names."""
    tensors, truths = {}, {}
    for layer, start in LAYERS.items():
        if layer == LINEAR and kind in ("loha-tucker", "lokr-tucker"):
            continue
        weight = plain(layer)
        parts, change = lycoris(kind, *weight.shape, seed=len(truths))
        tensors |= {f"{start}.{part}": tensor for part, tensor in parts.items()}
        if alpha is not None:
            tensors[f"{start}.alpha"] = torch.tensor(alpha)
        factor = alpha / 3 if alpha and kind != "lokr-full" else 1
        truths[layer] = weight + 0.7 * factor * change
    ours = changed(written(tensors, tmp_path), 0.7)
    assert ours.keys() == truths.keys()
    worst = max(assert_close(ours[name], truth, MOST, name) for name, truth in truths.items())
    checked(f"{kind} with alpha {alpha}", "its formula in float64", worst)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_lycoris_dora_scales_rows_or_columns(tmp_path, kind, columns):
    """dora_scale of the shape (out, 1, 1, 1), or (1, in, 1, 1) as the first versions had it."""
    tensors, truths = {}, {}
    for layer in (CONV, LINEAR):
        weight, start = plain(layer), LAYERS[layer]
        if kind == "lora":
            o, i, *window = weight.shape
            up, down = random(o, 3, seed=1), random(3, i, *window, seed=2)
            tensors[f"{start}.lora_up.weight"] = up.reshape(o, 3, *[1] * len(window))
            tensors[f"{start}.lora_down.weight"] = down
            change = (up.double() @ down.double().reshape(3, -1)).reshape(weight.shape)
        else:
            parts, change = lycoris(kind, *weight.shape)
            tensors |= {f"{start}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{start}.alpha"] = torch.tensor(1.5)
        weight = weight + 0.5 * change
        axes = [axis for axis in range(weight.ndim) if axis != columns]
        lengths = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
        scale = 1 + random(*lengths.shape, seed=5).abs()
        tensors[f"{start}.dora_scale"] = scale
        truths[layer] = weight * scale / lengths
    flat = written(tensors, tmp_path)
    assert sd.read_header(flat)["format"] == "sd.py 2" and "DoRA" in sd.read_header(flat)["notes"]
    ours = changed(flat)
    worst = max(assert_close(ours[name], truth, MOST, name) for name, truth in truths.items())
    checked(f"DoRA on {kind}, {'columns' if columns else 'rows'}", "its formula", worst)


def test_full_differences_change_weights_biases_and_norms(tmp_path):
    """LyCORIS' full and norm modules, and what ComfyUI extracts, under the original's names."""
    _, weights = sd.read_flat(sd.TINY)
    names = {
        "lora_unet_mid_block_resnets_0_conv1.diff": CONV,
        "lora_unet_mid_block_resnets_0_conv1.diff_b": "unet.middle.0.conv1.bias",
        "lora_unet_mid_block_resnets_0_norm1.w_norm": "unet.middle.0.norm1.weight",
        "lora_unet_mid_block_resnets_0_norm1.b_norm": "unet.middle.0.norm1.bias",
        "lora_te_text_model_encoder_layers_0_layer_norm1.w_norm":
            "text_encoder.layers.0.norm1.weight",
        "diffusion_model.out.0.diff": "unet.norm_out.weight",
        "diffusion_model.out.2.diff_b": "unet.conv_out.bias",
        "diffusion_model.middle_block.1.proj_in.diff": "unet.middle.1.proj_in.weight",
    }  # fmt: skip
    tensors = {
        theirs: random(*plain(ours).shape, seed=i) for i, (theirs, ours) in enumerate(names.items())
    }
    proj = "diffusion_model.middle_block.1.proj_in.diff"
    tensors[proj] = tensors[proj][:, :, None, None]  # a 1x1 convolution's
    after = changed(written(tensors, tmp_path), 2)
    assert set(after) == set(names.values()) and set(after) < set(weights)
    for theirs, ours in names.items():
        truth = plain(ours) + 2 * tensors[theirs].double().reshape(plain(ours).shape)
        assert_close(after[ours], truth, MOST, ours)


def test_a111s_scale_takes_the_place_of_alpha(tmp_path):
    up, down = torch.ones(32, 4), torch.ones(4, 32)
    tensors = {f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down}
    tensors |= {f"{KOHYA}.alpha": torch.tensor(9.0), f"{KOHYA}.scale": torch.tensor(0.25)}
    flat = load_file(written(tensors, tmp_path))
    assert torch.equal(next(t for n, t in flat.items() if n.endswith("up")), up / 4)


def test_lycoris_scalar_multiplies_whatever_alpha_says(tmp_path):
    up, down = torch.ones(32, 4), torch.ones(4, 32)
    tensors = {f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down}
    for alpha, factor in ((None, 0.5), (2.0, 0.25)):
        tensors |= {} if alpha is None else {f"{KOHYA}.alpha": torch.tensor(alpha)}
        flat = load_file(written(tensors | {f"{KOHYA}.scalar": torch.tensor(0.5)}, tmp_path))
        assert torch.equal(next(t for n, t in flat.items() if n.endswith("up")), factor * up)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_lora_may_be_kept_in_eight_bits(tmp_path, dtype):
    up, down = random(32, 4).to(dtype), random(4, 32).to(dtype)
    tensors = {f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down}
    flat = load_file(written(tensors, tmp_path))
    assert torch.equal(next(t for n, t in flat.items() if n.endswith("up")), up.float())


def test_a_convolutions_down_may_be_a_matrix(tmp_path):
    """(r, i kh kw), whose order is PyTorch's and not that of the flat file."""
    o, i, *window = plain(CONV).shape
    up, down = random(o, 4), random(4, i, *window)
    tensors = {f"{LAYERS[CONV]}.lora_up.weight": up}
    flats = []
    for j, one in enumerate((down, down.reshape(4, -1))):
        parts = tensors | {f"{LAYERS[CONV]}.lora_down.weight": one}
        flats.append(load_file(written(parts, tmp_path, name=f"{j}.safetensors")))
    assert all(torch.equal(tensor, flats[1][name]) for name, tensor in flats[0].items())


# %% Names -----------------------------------------------------------------------------------------

UNDERSCORED = QUERY.replace(".", "_")
SELF = "encoder.layers.0.self_attn"
SPELLINGS = [
    *(f"{start}{QUERY}{{}}" for start in (
        "", "unet.", "base_model.model.", "base_model.model.unet.", "unet.base_model.model.",
        "module.", "module.unet.", "unet.module.", "_orig_mod.", "unet._orig_mod.",
        "_orig_mod.module.", "module._orig_mod.unet.", "base_model.model._orig_mod.",
    )),
    *(f"{start}{UNDERSCORED}{{}}" for start in (
        "lora_unet_", "lycoris_", "lora_unet__orig_mod_", "base_model.model.lora_unet_",
    )),
    f"unet.{QUERY.replace('.attn1', '._orig_mod.attn1')}{{}}",
    f"unet.{QUERY.replace('attn1.to_q', 'attn1.processor.to_q')}{{}}",
    *(f"{start}input_blocks.1.1.transformer_blocks.0.attn1.to_q{{}}" for start in (
        "", "diffusion_model.", "model.diffusion_model.",
    )),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q{}",
]  # fmt: skip
TEXTS = [
    *(f"{start}{SELF}.q_proj{{}}" for start in (
        "text_encoder.text_model.", "text_encoder.", "text_model.", "base_model.model.text_model.",
        "text_encoder.base_model.model.text_model.", "base_model.model.", "module.text_model.",
        "text_encoders.clip_l.transformer.text_model.", "text_encoder._orig_mod.text_model.",
        "cond_stage_model.transformer.text_model.",
    )),
    *(f"{start}text_model_{SELF.replace('.', '_')}_q_proj{{}}" for start in (
        "lora_te_", "lora_te1_", "lora_te_module_", "lora_text_encoder_", "lycoris_",
    )),
    f"text_encoder.text_model.{SELF}.to_q{{}}",
]  # fmt: skip
ENDS = [
    (".lora_up.weight", ".lora_down.weight"), (".lora.up.weight", ".lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"), ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B.my_adapter-2.weight", ".lora_A.my_adapter-2.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, layer",
    [*((name, "unet.down.1.1.attn1.to_q") for name in SPELLINGS),
     *((name, "text_encoder.layers.0.attention.to_q") for name in TEXTS)],
)  # fmt: skip
def test_prefixes_and_ends_go_together_in_any_way(tmp_path, name, layer):
    """All starts with all ends, by rules: none of the products is in a list."""
    up, down = random(8, 4), random(4, 8)
    for i, ends in enumerate(ENDS):
        tensors = {name.format(end): part for end, part in zip(ends, (up, down))}
        flat = load_file(written(tensors, tmp_path, name=f"{i}.safetensors"))
        assert torch.equal(flat[f"{layer}.up"], up) and torch.equal(flat[f"{layer}.down"], down)


def test_the_layers_own_names_are_not_shortened():
    """No layer of sd.py begins like a prefix, and no two become one in underscores."""
    layers = name_lora_layers()
    assert all(lora.normalize(layer) == layer for layer in layers)
    flats = [specs["weight"].flat for layer, specs in layers.items()]
    text = [flat for flat in flats if flat.startswith("text_encoder.")]
    assert len(text) == len(set(text)) == 23 * 8 + 3
    unet = [flat for flat in flats if flat.startswith("unet.")]
    assert len(unet) == 2 * len(set(unet)) > 600  # in both layouts


# %% What is left out, and what is refused ---------------------------------------------------------


def test_a_few_unknown_names_are_left_out_and_named(lora, tmp_path):
    names = kohya_names(lora)
    extra = {
        "lora_unet_mid_block_nowhere.lora_up.weight": torch.ones(4, 4),
        "lora_te_text_model_text_projection.lora_down.weight": torch.ones(4, 4),
        f"{KOHYA}.diff_b": torch.ones(4),
        "bundle_emb.cat.string_to_param.*": torch.ones(2, 40),
        "bundle_emb.dog.string_to_param.*": torch.ones(2, 40),
    }  # fmt: skip
    said = []
    some = written(names | extra, tmp_path, log=said.append)
    said = "\n".join(said)
    assert f"{len(names)} tensors used" in said
    assert "2 tensors were left out (a textual inversion that comes with it)" in said
    assert "warning: 3 tensors are unknown and were left out:" in said
    assert "mid_block_nowhere" in said and "text_projection" in said and "to_q.diff_b" in said
    (tmp_path / "all").mkdir()
    whole = written(names, tmp_path / "all")
    assert sd.read_header(whole)["format"] == "sd.py 1"
    some, whole = load_file(some), load_file(whole)
    assert some.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in some.items())


@pytest.mark.parametrize("unknown, good", [(2, True), (3, False)])
def test_half_must_be_known(tmp_path, unknown, good):
    tensors = dict(GOOD)
    tensors |= {f"lora_unet_other_{i}.lora_up.weight": torch.ones(8, 4) for i in range(unknown)}
    if good:
        assert len(load_file(written(tensors, tmp_path))) == 2
    else:
        with pytest.raises(ConversionError, match=r"another model.* 3 of its names .*other_0"):
            written(tensors, tmp_path)
    assert (tmp_path / "it.flat.safetensors").exists() == good


@pytest.mark.parametrize(
    "name, says",
    [
        (f"{KOHYA}.on_input", "(IA)3"), (f"base_model.model.{QUERY}.ia3_l", "(IA)3"),
        (f"{KOHYA}.oft_blocks", "OFT"), (f"base_model.model.{QUERY}.oft_R.weight", "OFT"),
        (f"{KOHYA}.a1.weight", "GLoRA"), (f"base_model.model.{QUERY}.vera_lambda_b", "VeRA"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", "SDXL"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "SDXL"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q.lokr_w1", "SDXL"),
        ("unet.up_blocks.0.attentions.0.transformer_blocks.9.attn1.to_q.lora_A.weight", "SDXL"),
        ("transformer.transformer_blocks.1.attn.to_q.lora_A.weight", "SD 3, Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "SD 3, Flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "SD 3, Flux"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "SD 3, Flux"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.processor.to_q_lora.up.weight",
         "video"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(tmp_path, name, says):
    """One such tensor in a file that is otherwise good."""
    tensors = dict(GOOD)
    with pytest.raises(ConversionError) as error:
        written(tensors | {name: torch.ones(4, 4)}, tmp_path)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "parts, says",
    [
        ({"hada_w1_a": W[0], "hada_w1_b": W[1]}, "only w1_a, w1_b, expected"),
        ({"hada_w1_a": W[0], "hada_w1_b": W[1], "hada_w2_a": W[0], "hada_w2_b": W[1],
          "hada_t1": torch.ones(4, 4, 3, 3)}, "expected t1, t2"),
        ({"hada_w1_a": W[0], "hada_w1_b": W[1], "hada_w2_a": W[0], "hada_w2_b": torch.ones(5, 8)},
         "do not go together"),
        ({"hada_w1_a": W[0], "hada_w1_b": W[1], "hada_w2_a": W[0], "hada_w2_b": torch.ones(4, 9)},
         "do not go together"),
        ({"lokr_w1": W[0]}, "only w1, expected w1, w2"),
        ({"lokr_w1": W[0], "lokr_w2": W[0], "lokr_t2": torch.ones(2, 2, 3, 3)},
         "only t2, w1, w2, expected w1, w2"),
        ({"lokr_w1": torch.ones(4), "lokr_w2": W[0]}, "do not go together"),
        ({"lokr_w1": W[0], "lokr_w1_a": W[0], "lokr_w1_b": W[0], "lokr_w2": W[0]}, "expected"),
        ({"lokr_w1": W[0], "lokr_w2": torch.ones(0, 4)}, "do not go together"),
        ({"lora_up.weight": W[0], "lora_down.weight": W[1], "diff": torch.ones(8, 8)},
         "do not go together"),
        ({"lora_up.weight": W[0], "lora_down.weight": W[1], "dora_scale": torch.ones(7, 1)},
         "do not go together"),
        ({"lora_up.weight": W[0], "lora_down.weight": W[1], "lora_magnitude_vector": torch.ones(3)},
         "do not go together"),
        ({"diff": torch.ones(8)}, "do not go together"),
        ({"diff": torch.ones(8, 8, 3, 3)}, "do not go together"),
        ({"lora_up.weight": W[0], "lora_down.weight": W[1], "alpha": torch.tensor(math.inf)},
         "no number"),
        ({"hada_w1_a": torch.ones(20_000, 1), "hada_w1_b": torch.ones(1, 20_000),
          "hada_w2_a": torch.ones(20_000, 1), "hada_w2_b": torch.ones(1, 20_000)}, "too large"),
        ({"lokr_w1": torch.ones(100, 100), "lokr_w2": torch.ones(100, 100)}, "too large"),
        ({"lokr_w1": torch.ones(4, 4, dtype=torch.uint8), "lokr_w2": W[0]}, "do not go together"),
        ({"diff": torch.full((8, 8), math.nan)}, "NaN"),
    ],
)  # fmt: skip
def test_parts_that_do_not_add_up_are_refused(tmp_path, parts, says):
    """Before anything large is computed, by the layer's name, and without a file."""
    with pytest.raises(ConversionError) as error:
        written({f"{KOHYA}.{part}": tensor for part, tensor in parts.items()}, tmp_path)
    assert says in str(error.value) and "unet.down.1.1.attn1.to_q" in str(error.value)
    assert not (tmp_path / "it.flat.safetensors").exists()


# %% What sd.py does with it -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["up", "diff"])
def test_a_lora_of_four_channels_changes_the_first_four_of_nine(tmp_path, kind):
    """conv_in of an inpainting model has 4 + 1 + 4; the rest stays what it was."""
    up, down = random(32, RANK), random(RANK, 4, 3, 3)
    change = torch.einsum("or,rihw->oihw", up, down)
    layer = LAYERS[FIRST]
    parts = {"up": {"lora_up.weight": up, "lora_down.weight": down}, "diff": {"diff": change}}
    flat = written({f"{layer}.{n}": t for n, t in parts[kind].items()}, tmp_path)
    weight = random(32, 9, 3, 3, seed=3)
    ours = mx.array(weight.permute(0, 2, 3, 1).contiguous().numpy())
    _, after = sd.lora(flat, 0.5)({}, {FIRST: ours})
    weight[:, :4] += 0.5 * change
    after = np.array(after[FIRST]).transpose(0, 3, 1, 2)
    assert_close(after, weight, MOST)
    assert np.array_equal(after[:, 4:], weight[:, 4:].numpy())


@pytest.mark.parametrize(
    "channels, shape", [(4, (32, 3, 3, 9)), (9, (32, 3, 3, 5)), (9, (32, 3, 3, 1)), (9, (9, 4))]
)
def test_other_numbers_of_channels_do_not_fit(tmp_path, channels, shape):
    diff = {"unet.down.0.0.diff": mx.zeros(shape)}
    path = write_file(tmp_path / "bad.safetensors", {"kind": "lora"}, diff)
    with pytest.raises(sd.SDError, match=r"bad\.safetensors.*unet\.down\.0\.0"):
        sd.lora(path)({}, {FIRST: mx.zeros((32, 3, 3, channels))})


def test_a_row_that_is_nothing_stays_nothing(tmp_path):
    """DoRA divides by its length."""
    parts = {"unet.a.diff": mx.zeros((2, 3)), "unet.a.magnitude": mx.ones((2, 1))}
    path = write_file(tmp_path / "zero.safetensors", {"kind": "lora"}, parts)
    _, after = sd.lora(path)({}, {"unet.a.weight": mx.array([[0.0, 0, 0], [0, 3, 4]])})
    assert np.allclose(after["unet.a.weight"], [[0, 0, 0], [0, 0.6, 0.8]])


@pytest.mark.parametrize("dtype, most", [("float16", 2**-10), ("bfloat16", 2**-7)])
def test_what_is_computed_can_be_kept_in_fewer_bits(tmp_path, dtype, most):
    parts, change = lycoris("lokr", *plain(LINEAR).shape)
    save_file({f"{LAYERS[LINEAR]}.{n}": t for n, t in parts.items()}, tmp_path / "it.safetensors")
    flat = convert(tmp_path / "it.safetensors", dtype=dtype, log=quiet)
    (diff,) = sd.read_flat(flat, "lora")[1].values()
    assert_close(diff.astype(mx.float32), change, most)


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora", "diff"])
def test_a_picture_can_be_painted_with_each(tiny, tmp_path, kind):
    weight, start = plain(LINEAR), LAYERS[LINEAR]
    if kind in ("lokr", "loha"):
        tensors, _ = lycoris(kind, *weight.shape)
    else:
        tensors = {"diff": random(*weight.shape)}
        tensors |= {"dora_scale": torch.ones(len(weight), 1)} if kind == "dora" else {}
    flat = written({f"{start}.{n}": t for n, t in tensors.items()}, tmp_path)
    options = {"seed": 1, "steps": 1, "width": 64, "height": 64}
    model = sd.StableDiffusion(changes=[sd.lora(flat)])
    (one,), (other,) = (m.txt2img("a red house", **options) for m in (tiny, model))
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 0
