"""What a file is instead of a model: by its first bytes, or by the names of its tensors."""

import re

FIRST_BYTES = (  # where they stand, what they are, and what carries them
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a rar archive; unpack it first"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"PK", "a zip archive that is empty or in parts"),
    (257, b"ustar", "a tar archive; if PyTorch 0.1 made it, save it again with a newer one"),
    (0, b"GGUF", "a GGUF file, already quantised; take the original it was made from"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the weights: run git lfs pull"),
    (0, b"<", "a web page, not the weights: download it again"),
)
MODELS = (  # what it is, and a name that only it has
    ("Stable Diffusion XL", r"conditioner\.embedders\.1\."),
    ("the refiner of SDXL", r"conditioner\.embedders\.0\.model\.transformer\.resblocks\.31\."),
    ("SD 3, Flux or a relative", r"(.*\.)?(joint|double|single)_blocks\."),
    ("a video model", r".*(time_stack|motion_modules)\."),
    ("the x4 upscaler", r"low_scale_model\.|model\.diffusion_model\.label_emb\.weight$"),
    ("unCLIP", r"embedder\.|noise_augmentor\.|model\.diffusion_model\.label_emb\."),
    ("depth-to-image", r"depth_model\."),
    ("part of a ControlNet, or one in a form not known here", r"control_|lora_control|difference$"),
)
CHANNELS = {5: "depth-to-image", 7: "the x4 upscaler", 8: "instruct-pix2pix"}  # of its UNet
PARTS = (  # the same, of files without a UNet
    ("a LoRA without names", r"(text_encoder|unet):\d"),
    ("a textual inversion of SDXL", r"(clip_l|clip_g)$"),
    ("a safety checker", r"(.*\.)?concept_embeds$"),
    ("a UNet alone, cut out of a diffusers folder", r"(unet\.)?down_blocks\."),
    ("a text encoder alone", r"(text_model\.)?embeddings\.token_embedding\."),
)


def name_file(head):
    """By its first 512 bytes; None if they are those of nothing known here."""
    return next((what for at, mark, what in FIRST_BYTES if head[at:].startswith(mark)), None)


def name_model(names):
    return next((what for what, mark in MODELS if any(re.match(mark, n) for n in names)), None)


def name_part(names):
    return next((what for what, mark in PARTS if any(re.match(mark, n) for n in names)), None)
