"""The networks of a source as diffusers and transformers have them, to compare sd.py's with.

Only what comes from these libraries counts here: their classes, and for an original checkpoint
their table of names. So a mistake in convert_weights.py's table would be seen.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModel

from sd_more.formats.tensors import NotConvertible


def build(name, config, linear):
    """-> their network, without weights. linear: of transformers' projections, which in other
    models are convolutions.
    """
    if name == "text_encoder":
        t = config["text"]
        return CLIPTextModel(
            CLIPTextConfig(
                hidden_size=t["width"], intermediate_size=4 * t["width"],
                num_hidden_layers=t["layers"], num_attention_heads=t["heads"],
                hidden_act=t["activation"], vocab_size=t.get("vocabulary", 49408),
            )
        )  # fmt: skip
    if name == "vae":
        v = config["vae"]
        return AutoencoderKL(
            block_out_channels=tuple(v["widths"]), norm_num_groups=v["groups"], layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4,
        )  # fmt: skip
    u = config["unet"]
    options = {
        "in_channels": u.get("channels", 4), "block_out_channels": tuple(u["widths"]),
        "attention_head_dim": tuple(u["heads"]), "norm_num_groups": u["groups"],
        "cross_attention_dim": u["context_width"], "use_linear_projection": linear,
    }  # fmt: skip
    return {"unet": UNet2DConditionModel, "controlnet": ControlNetModel}[name](**options)


def rename(name, tensors, network, original):
    """{name: tensor} of a source, without prefix, -> under the names of their network."""
    utils = single_file_utils
    if not original:
        old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        parts = lambda n: [old.get(part, part) if name == "vae" else part for part in n.split(".")]
        return {".".join(parts(n)): t for n, t in tensors.items()}
    if name == "unet":
        given = {utils.LDM_UNET_KEY + n: t for n, t in tensors.items()}
        return utils.convert_ldm_unet_checkpoint(given, network.config)
    if name == "controlnet":
        given = {utils.LDM_CONTROLNET_KEY + n: t for n, t in tensors.items()}
        return utils.convert_controlnet_checkpoint(given, network.config)
    if name == "vae":
        given = {utils.LDM_VAE_KEYS[0] + n: t for n, t in tensors.items()}
        return utils.convert_ldm_vae_checkpoint(given, network.config)
    if "token_embedding.weight" in tensors:  # OpenCLIP's
        prefix = "cond_stage_model.model."
        given = {prefix + n: t for n, t in tensors.items()}
        return utils.convert_open_clip_checkpoint(network, given, prefix)
    return tensors


def load(name, config, tensors, original):
    """-> their network with these weights. NotConvertible, if it lacks some."""
    tensors = {n: torch.from_numpy(np.ascontiguousarray(t)) for n, t in tensors.items()}
    projections = [t for n, t in tensors.items() if n.endswith("proj_in.weight")]
    network = build(name, config, any(t.ndim == 2 for t in projections))
    bare = lambda n: n.removeprefix("text_model.")
    given = {bare(n): t for n, t in rename(name, tensors, network, original).items()}
    wanted = {n: p for n, p in network.state_dict().items() if not n.endswith("position_ids")}
    lacking = [n for n in wanted if bare(n) not in given]
    if lacking:
        raise NotConvertible(f"diffusers finds no {lacking[0]} in the source")
    found = {n: given[bare(n)].reshape(p.shape) for n, p in wanted.items()}
    network.load_state_dict(found, strict=False, assign=True)
    return network.eval()


def answer_of(name, network, arguments):
    """-> its answer to arguments as sd_more/check.py makes them: channels last, before and after"""
    with torch.no_grad():
        x, *more = [
            torch.from_numpy(a).movedim(-1, 1) if a.ndim == 4 else torch.from_numpy(a)
            for a in arguments
        ]
        if name == "text_encoder":
            return network(x)[0].numpy()
        if name == "unet":
            y = network(x, 500, *more, return_dict=False)[0]
        elif name == "controlnet":
            down, middle = network(x, 500, *more, return_dict=False)
            answers = [y.movedim(1, -1).numpy().reshape(-1) for y in (*down, middle)]
            return np.concatenate(answers)
        elif name == "vae.decoder":
            y = network.decode(x, return_dict=False)[0]
        else:
            y = network.encode(x, return_dict=False)[0].mean
        return y.movedim(1, -1).numpy()
