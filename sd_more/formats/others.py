"""What a file is instead of a model: by its first bytes, or by the names of its tensors; and
which tensors of a model are not needed."""

import re

FIRST_BYTES = (  # where they stand, what they are, and what carries them
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a rar archive; unpack it first"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"PK", "a zip archive that is empty or in parts"),
    (257, b"ustar", "a tar archive; if PyTorch 0.1 made it, save it again with a newer one"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the weights: run git lfs pull"),
    (0, b"\x89PNG", "a picture; if it is an embedding in pixels, give the .pt of it"),
    (0, b"\xff\xd8\xff", "a picture"),
    (0, b"<", "a web page, not the weights: download it again"),
)
MODELS = (  # what it is, and a name that only it has
    (
        "Stable Diffusion XL",
        r"(conditioner\.embedders|cond_stage_model|te)\.1\.|text_encoder_2[./]",
    ),
    ("the refiner of SDXL", r"conditioner\.embedders\.0\.model\.transformer\.resblocks\.31\."),
    ("SD 3, Flux or a relative", r"(.*\.)?(joint|double|single)_blocks\."),
    ("a video model", r".*(time_stack|motion_modules)\."),
    ("the x4 upscaler", r"low_scale_model\.|model\.diffusion_model\.label_emb\.weight$"),
    ("unCLIP", r"embedder\.|noise_augmentor\.|model\.diffusion_model\.label_emb\."),
    ("depth-to-image", r"depth_model\."),
    ("GLIGEN", r"(.*\.)?position_net\."),
    ("an IP-Adapter", r"(image_proj|ip_adapter)\."),
    ("part of a ControlNet, or one in a form not known here", r"control_|lora_control|difference$"),
)
CHANNELS = {5: "depth-to-image", 7: "the x4 upscaler", 8: "instruct-pix2pix"}  # of its UNet
PARTS = (  # the same, of files without a UNet
    ("a LoRA without names", r"(text_encoder|unet):\d"),
    ("a textual inversion of SDXL", r"clip_g$"),
    ("a T2I-Adapter", r"(adapter\.)?body\.\d+\.(block1|block2|resnets|in_conv|down)"),
    (
        "an upscaler like ESRGAN",
        r"model\.\d+\.(sub\.\d+\.|weight$)|(.*\.)?body\.\d+\.rdb\d|conv_first\.",
    ),
    ("a safety checker", r"(.*\.)?concept_embeds$"),
    ("a UNet alone, cut out of a diffusers folder", r"(unet\.)?down_blocks\."),
    ("a UNet alone", r"(model\.)?(diffusion_model\.)?input_blocks\."),
    (
        "a text encoder alone",
        r"(.*\.)?embeddings\.token_embedding\.|(.*\.)?token_embedding\.weight$",
    ),
    ("a picture encoder (CLIP vision) alone", r"(.*\.)?vision_model\."),
)
NOT_NEEDED = (  # what it is, how its name begins
    # The original, too, loads the raw weights where a file has both (use_ema is False there). The
    # files that people share mostly have one kind, and the averages are stored as if they were raw.
    ("averaged copies (EMA)", r"(first_stage_model\.)?model_ema\."),
    ("noise schedule", r"(betas|alphas_cumprod|sqrt_|log_one_minus_|posterior_|lvlb_weights)"),
    ("noise schedule", r"(denoiser\.|logvar$|scale_factor$|v_pred$|ztsnr$)"),
    ("position numbers", r".*position_ids$"),
    ("scales of 8 bits", r".*[._](scaled_fp8|comfy_quant|scale_weight|scale_input)$"),
    ("scales of 8 bits", r".*[._](weight|input)_scale$"),
    ("training losses", r"(first_stage_model\.)?loss\.|embedding_manager\."),
    ("the text encoder's unread end", r".*\.model\.transformer\.resblocks\.23\."),
    (
        "the text encoder's unread end",  # by stable-diffusion.cpp's name
        r"cond_stage_model\.transformer\.text_model\.encoder\.layers\.23\.",
    ),
    ("the text encoder's unread end", r".*\.model\.(text_projection|logit_scale|attn_mask)"),
    ("CLIP's other half", r"(cond_stage_model|text_encoder).*[./](vision_model|visual_projection)"),
    ("CLIP's other half", r"(cond_stage_model|text_encoder).*[./](text_projection|logit_scale)"),
    ("safety checker", r"safety_checker\."),
)


def name_file(head):
    """By its first 512 bytes; None if they are those of nothing known here."""
    return next((what for at, mark, what in FIRST_BYTES if head[at:].startswith(mark)), None)


def name_model(names):
    return next((what for what, mark in MODELS if any(re.match(mark, n) for n in names)), None)


def name_part(names):
    return next((what for what, mark in PARTS if any(re.match(mark, n) for n in names)), None)


def name_vae(channels, names):
    """-> a model whose latents are others, by the shape of a VAE and what it is called; None"""
    if channels != 4:
        return f"another model, such as SD 3 or Flux ({channels} channels)"
    xl = any(re.search("sd[-_]?xl|stable-diffusion-xl", name, re.IGNORECASE) for name in names)
    return "SDXL, by its name" if xl else None
