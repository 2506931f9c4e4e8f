"""How LoRAs spell the names of layers: kohya's scripts, diffusers in four generations, PEFT.

A LoRA holds two thin matrices for each layer that it changes. It has the layer's name with dots, or
with underscores for the dots, which cannot be undone: to_out_0 may be to_out.0 or to.out.0. So all
names are made underscores here, and the caller does the same with the layers that it knows.
"""

import math
import re

from .tensors import NotConvertible, require

MARK = re.compile(r"lora_(unet|te\d?)_|.*[._]lora[._]")  # what a LoRA's first names look like
ENDS = {  # how the names of a layer's tensors end, and what they are
    "up": r"\.lora_up|\.lora\.up|\.lora_B(\.default)?|_lora\.up|\.lora_linear_layer\.up",
    "down": r"\.lora_down|\.lora\.down|\.lora_A(\.default)?|_lora\.down|\.lora_linear_layer\.down",
    "middle": r"\.lora_mid",
}
ENDS = {part: re.compile(rf"(.+?)({end})\.weight") for part, end in ENDS.items()}
ENDS["alpha"] = re.compile(r"(.+)(\.alpha)")
STARTS = re.compile(r"(base_model\.model\.)?(lora_unet_|lora_te1?_|unet\.|text_encoder\.)?")
OTHERS = (  # what it is, and a name that only it has
    ("a LoHa", r".*\.hada_"), ("a LoKr", r".*\.lokr_"), ("a DoRA", r".*\.(dora_scale|lora_magn)"),
    ("an (IA)3", r".*\.on_input"), ("OFT", r".*\.oft_"), ("a LoRA of SDXL", r"lora_te2_"),
    ("a full difference, no LoRA", r".*\.(diff|diff_b)$"), ("GLoRA", r".*\.[ab][12]\.weight$"),
)  # fmt: skip


def is_lora(names):
    return any(map(MARK.match, names))


def group(names):
    """-> {layer: {"up", "down", "middle" or "alpha": name}}, and the names that belong to none."""
    for what, pattern in OTHERS:
        if any(re.match(pattern, name) for name in names):
            raise NotConvertible(f"it is {what}. Only a plain LoRA or LoCon will do")
    layers, rest = {}, []
    for name in names:
        for part, end in ENDS.items():
            if match := end.fullmatch(name):
                layer = normalize(match[1] + "_lora" * match[2].startswith("_lora"))
                same = layers.setdefault(layer, {}).setdefault(part, name)
                require(same == name, f"it has one tensor under two names: {same} and {name}")
                break
        else:
            rest.append(name)
    return layers, rest


def normalize(layer):
    """down_blocks.0...attn1.processor.to_q_lora -> down_blocks_0_..._attn1_to_q"""
    layer = STARTS.sub("", layer, count=1).removeprefix("text_model.").removeprefix("text_model_")
    layer = layer.replace(".processor.", ".")
    if layer.endswith("_lora"):
        layer = layer.removesuffix("_lora")
        if ".self_attn." in layer:
            layer = layer.replace("to_out", "out_proj").replace(".to_", ".") + "_proj"
            layer = layer.replace("out_proj_proj", "out_proj")
        elif layer.endswith("to_out"):
            layer += ".0"
    return layer.replace(".", "_")


def read_peft_alphas(config):
    """PEFT's config -> {"unet" or "text_encoder" or, for both, "": alpha}."""
    alphas = {}
    for network in ("", "unet", "text_encoder"):
        start = network and f"{network}."
        alpha, rank = config.get(f"{start}lora_alpha"), config.get(f"{start}r")
        if config.get(f"{start}alpha_pattern") or config.get(f"{start}rank_pattern"):
            raise NotConvertible(
                "it is a LoRA that has another alpha or rank for some layers (PEFT)"
            )
        if type(alpha) in (int, float) and type(rank) is int and rank > 0:
            if not (abs(alpha) < 1e6 and rank < 1e6):
                raise NotConvertible(f"it is a LoRA of alpha {alpha:.3g} and rank {rank:.3g}")
            if config.get(f"{start}use_rslora"):
                alpha *= math.sqrt(rank)  # so that alpha / rank is what it should be
            alphas[network] = alpha
    return alphas
