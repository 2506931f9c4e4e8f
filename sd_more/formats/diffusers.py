"""What the config files of a diffusers folder must say of Stable Diffusion 1.x and 2.x.

Each network has a folder with a config.json. Its fields can describe many other models whose
tensors still look alike, so every field that changes what is computed must have the value below.
"""

import re

DOWN_PATH = {  # what a UNet and a ControlNet share
    "layers_per_block": 2, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "only_cross_attention": False, "act_fn": "silu", "norm_eps": 1e-5, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "transformer_layers_per_block": 1, "encoder_hid_dim": None, "class_embed_type": None,
    "num_class_embeds": None, "addition_embed_type": None, "num_attention_heads": None,
    "resnet_time_scale_shift": "default",
}  # fmt: skip
EXPECTED = {  # a tuple: one of these
    "unet": {
        "_class_name": "UNet2DConditionModel", **DOWN_PATH,
        "in_channels": (4, 9),  # 9 in inpainting models
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "out_channels": 4, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "mid_block_only_cross_attention": False, "dual_cross_attention": False,
        "cross_attention_norm": None, "attention_type": "default",
        "reverse_transformer_layers_per_block": None, "center_input_sample": False,
        "time_embedding_type": "positional", "time_embedding_dim": None,
        "time_embedding_act_fn": None, "timestep_post_act": None, "class_embeddings_concat": False,
        "encoder_hid_dim_type": None, "resnet_skip_time_act": False, "resnet_out_scale_factor": 1,
    },
    "controlnet": {
        "_class_name": "ControlNetModel", **DOWN_PATH,
        "in_channels": 4, "conditioning_channels": 3,
        "controlnet_conditioning_channel_order": "rgb",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    },
    "vae": {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True,
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None,
        "latents_mean": None, "latents_std": None,
    },
    "tiny_vae": {
        "act_fn": "relu", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1],
        "upsampling_scaling_factor": 2, "latent_magnitude": 3, "scaling_factor": 1,
    },
    "text_encoder": {"model_type": "clip_text_model", "layer_norm_eps": 1e-5},
    "scheduler": {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "trained_betas": None, "rescale_betas_zero_snr": (False, True),
        "prediction_type": ("epsilon", "v_prediction"),
    },
}  # fmt: skip
CLASSES = {"vae": "AutoencoderKL", "tiny_vae": "AutoencoderTiny", "controlnet": "ControlNetModel"}
# A field that is not there has its class's default: the value above, or the first, except in these.
DEFAULTS = {
    "vae": {
        "layers_per_block": 1, "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    },
    "scheduler": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
}  # fmt: skip

NUMBERS = {  # that no tensor's shape shows: the field that holds each, its class's default
    # Subtle: attention_head_dim is the number of heads. The wrong name stuck.
    "unet": {"heads": ("attention_head_dim", 8), "groups": ("norm_num_groups", 32)},
    "controlnet": {"heads": ("attention_head_dim", 8), "groups": ("norm_num_groups", 32)},
    "vae": {"groups": ("norm_num_groups", 32), "scale": ("scaling_factor", 0.18215)},
    "text_encoder": {
        "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 8),
        "activation": ("hidden_act", "quick_gelu"),
    },
}  # fmt: skip
SCHEDULER = {  # what changes pictures by the folder's own sampler: the values that change nothing
    "use_karras_sigmas": (), "use_exponential_sigmas": (), "use_beta_sigmas": (),
    "use_flow_sigmas": (), "use_lu_lambdas": (), "thresholding": (), "clip_sample": (),
    "euler_at_final": (), "algorithm_type": ("dpmsolver++",), "solver_order": (2,),
    "solver_type": ("midpoint", "bh2"), "final_sigmas_type": ("zero",),
    "variance_type": ("fixed_small",), "interpolation_type": ("linear",),
}  # fmt: skip
OWN_SCHEDULERS = (None, "PNDMScheduler", "LCMScheduler")  # whose sampler sd.py takes by itself
PIPELINES = re.compile(
    "StableDiffusion(Img2Img|Inpaint|ControlNet)?Pipeline(Legacy|Safe)?"
    "|LatentConsistencyModel(Img2Img)?Pipeline"
)

NETWORK = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
CLIP = ("model.safetensors", "pytorch_model.bin")
WEIGHTS = {  # what a network's weights are called, in the two formats
    "unet": NETWORK, "vae": NETWORK, "text_encoder": CLIP,
    "controlnet": NETWORK, "safety_checker": CLIP,
}  # fmt: skip


def find_difference(config, kind):
    """-> the first field that says otherwise, its value and the expected one; None if none does."""
    for name, expected in EXPECTED[kind].items():
        choices = expected if type(expected) is tuple else (expected,)
        value = config.get(name, DEFAULTS.get(kind, {}).get(name, choices[0]))
        if kind in ("unet", "controlnet") and type(value) is list and type(expected) is not list:
            value = value[0] if value and all(v == value[0] for v in value) else value  # per level
        # null, false and 0 all mean: not there
        if not any((value or None) == (choice or None) for choice in choices):
            return name, value, " or ".join(map(str, choices))
    return None


def name_other_vae(config):
    """-> a model whose latents are others, by what its VAE's config says; None"""
    scale, channels = config.get("scaling_factor"), config.get("latent_channels", 4)
    if channels != 4:
        return f"another model, such as SD 3 or Flux (its latent_channels is {str(channels)[:40]})"
    if scale == 0.13025:
        return f"SDXL (its scaling_factor is {scale})"
    name = str(config.get("_name_or_path", ""))[:80]
    xl = re.search("sd[-_]?xl|stable-diffusion-xl", name, re.IGNORECASE)
    return f"SDXL (its _name_or_path is {name})" if xl else None


def name_unused(scheduler):
    """-> what a scheduler's config says of the sampler that is not asked, in words; "" """
    name = scheduler.get("_class_name")
    said = [] if name in OWN_SCHEDULERS else [str(name)]
    for field, usual in SCHEDULER.items():
        if (value := scheduler.get(field)) and value not in usual:
            said.append(field if value is True else f"{field} {value}")
    return ", ".join(text[:60] for text in said)


def read_numbers(config, kind):
    return {name: config.get(*field) for name, field in NUMBERS[kind].items()}


def find_weights(folder, kind):
    """The file of a network's weights, or the index of its shards; None if there is neither.
    Full precision first; the raw weights (non_ema) where there are no averaged ones."""
    for variant in ("", ".fp16", ".non_ema"):
        for name in WEIGHTS[kind]:
            stem, end = name.split(".")
            for file in (
                f"{stem}{variant}.{end}",
                f"{stem}.{end}.index{variant}.json",
                f"{stem}{variant}.{end}.index.json",
            ):
                if (folder / file).exists():
                    return folder / file
    return None
