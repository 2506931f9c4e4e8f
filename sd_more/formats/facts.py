"""What a model's file says of itself besides its weights, and what lies beside it says of it.

The prediction, the noise schedule, how many steps it was made for: no shape shows these. A sign may
be a tensor, a line of the header, a line of a yaml file, a name. Each function here knows one such
place and yields (what, value, who says so); which place counts more, the caller decides. What is
said and can't be done here is a warning, by warn_of_...
"""

import re

import numpy as np

from .tensors import FLOATS

TURBO = {"prediction": "eps", "spacing": "trailing", "sampler": "euler", "steps": 4, "cfg": 1.0}
FEW_STEPS = {"sampler": "lcm", "steps": 4, "cfg": 1.0}  # latent consistency models
WITH_ZERO_SNR = {"spacing": "trailing", "sampler": "ddim", "rescale": 0.7}  # as its authors have it
SCALE = 0.18215  # of the VAE's latents
OTHER_SCHEDULE = (
    "warning: it was trained with another noise schedule than Stable Diffusion's ({}); sd.py does "
    "not know that one and pictures may suffer"
)

# %% Tensors ---------------------------------------------------------------------------------------

MARKS = (("v_pred", "prediction", "v"), ("ztsnr", "zero_snr", True))  # tensors that are only signs


def tell_tensors(tensors):
    for mark, what, value in MARKS:
        if mark in tensors:
            yield what, value, f"it has a tensor {mark}"
    name, abar = read_schedule(tensors)
    if name and abar[-1] < 1e-6:
        yield "zero_snr", True, f"its {name} end at {'0' if name == 'alphas_cumprod' else '1'}"
    scale = tensors.get("scale_factor")
    if scale is not None and scale.shape in ((), (1,)) and scale.dtype in FLOATS:
        yield "scale", near_usual(scale.float32().item()), "its tensor scale_factor says so"


def near_usual(scale):
    """SCALE for what is that, rounded to 16 bits or not; else the number as a person writes it."""
    return SCALE if abs(scale - SCALE) < SCALE / 256 else float(f"{scale:.6g}")


def read_schedule(tensors):
    """-> the tensor that tells abar at 1000 timesteps, abar; "" and None where there is none."""
    for name in ("alphas_cumprod", "betas"):
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape == (1000,) and tensor.dtype in FLOATS:
            numbers = np.float64(tensor.float32())
            with np.errstate(all="ignore"):  # a stranger's numbers may be anything
                return name, numbers if name == "alphas_cumprod" else np.cumprod(1 - numbers)
    return "", None


def warn_of_schedule(tensors, usual):
    """usual: abar as it should be."""
    name, abar = read_schedule(tensors)
    # More than bfloat16 rounds away?
    if name and not np.all(np.abs(abar - usual) <= usual / 256 + 1e-7):
        yield OTHER_SCHEDULE.format(f"its {name} differ")


# %% Header ----------------------------------------------------------------------------------------

PREDICTIONS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
METADATA = (  # what a safetensors header may say: key, text, what that means
    *((key, "v|v[._-]?pred(iction)?", "prediction", "v") for key in PREDICTIONS),
    *((key, "eps|epsilon", "prediction", "eps") for key in PREDICTIONS),
    ("modelspec.architecture", "stable-diffusion-v2-768-v.*", "prediction", "v"),
    ("modelspec.resolution", "512(x512)?", "size", 512),
    ("modelspec.resolution", "768(x768)?", "size", 768),
    ("ss_v_parameterization", "true", "prediction", "v"),
    ("ss_zero_terminal_snr", "true", "zero_snr", True),
)


def tell_header(metadata):
    for key, text, what, value in METADATA:
        if re.fullmatch(text, metadata.get(key, "").lower()):
            yield what, value, f"its header says {key}"


def warn_of_header(metadata):
    for key in PREDICTIONS:
        known = {what for what, *_ in tell_header({key: metadata.get(key, "")})}
        if metadata.get(key) and not known:
            yield f"warning: its header says {key} {metadata[key][:80]!r}, which is not known here"


# %% A yaml file beside it -------------------------------------------------------------------------

YAML = (  # a line of the original's or another program's config
    (r"parameterization:[ \t]*[\"']?v\b", "prediction", "v"),
    (r"parameterization:[ \t]*[\"']?eps\b", "prediction", "eps"),
    (r"(rescale_betas_zero_snr|zero_terminal_snr|zsnr):[ \t]*[Tt]rue", "zero_snr", True),
)
SCHEDULE = {"linear_start": "0.00085", "linear_end": "0.012", "timesteps": "1000",
            "beta_schedule": "linear"}  # fmt: skip


def tell_yaml(name, text):
    """name: of the file, for who says so."""
    for line, what, value in YAML:
        if re.search(rf"^[ \t]*{line}", text, re.MULTILINE):
            yield what, value, f"{name} beside it says so"
    if "linear_start" in text and "parameterization:" not in text:
        # A config of the original's; eps is its default.
        yield "prediction", "eps", f"{name} beside it does not say v"
    scale = read_number(read_line(text, "scale_factor"))
    if scale is not None:
        yield "scale", near_usual(scale), f"{name} beside it says so"


def warn_of_yaml(name, text):
    there = {key: read_line(text, key) for key in SCHEDULE}
    same = lambda a, b: a == b or read_number(a) == read_number(b) is not None
    odd = [f"{k} {v[:40]}" for k, v in there.items() if v and not same(v, SCHEDULE[k])]
    if odd:
        yield OTHER_SCHEDULE.format(f"{name} beside it says {', '.join(odd)}")
    layer, index = read_line(text, "layer"), read_line(text, "layer_idx")
    usual = "penultimate" if "FrozenOpenCLIP" in text else "last"
    if layer and layer != usual and "Embedder" in text:
        more = f", layer_idx {index[:40]}" if index else ""
        yield (
            f"warning: {name} beside it says that its text encoder is read at layer {layer[:40]}"
            f"{more}, which is not done by itself; --clip-skip leaves out last layers"
        )


def read_line(text, key):
    """-> what follows the key, without quotes; None"""
    found = re.search(rf"^[ \t]*{key}:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
    return found and found[1]


def read_number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


# %% Names -----------------------------------------------------------------------------------------

HOW = {  # what a name says of a model that was distilled: how such a one is painted with
    "turbo": "--steps 4 --cfg 1 --sampler euler --spacing trailing",
    "lcm": "--steps 4 --cfg 1 --sampler lcm",
    "lightning": "--steps 4 --cfg 1 --sampler euler --spacing trailing",
    "hyper-sd": "--steps 4 --cfg 1 --sampler ddim --spacing trailing",
}


def tell_names(names, is_v2):
    """SD-Turbo was distilled from 2.1, and what was made of it has 2.x's text encoder, too. A 1.x
    whose name says turbo is a merge or a style, which a guess would spoil: see warn_of_names."""
    names = " ".join(names).lower()
    if find_word("sd[-_ ]?turbo", names) or is_v2 and find_word("turbo", names):
        for what, value in TURBO.items():
            yield what, value, "its name says Turbo"


def warn_of_names(names):
    names = " ".join(names).lower()
    word = next((word for word in HOW if find_word(word.replace("-", "[-_ ]?"), names)), None)
    if word:
        yield (
            f"warning: its name says {word}, nothing else says that it was made for few steps, and "
            f"a name is not enough. If it was: {HOW[word]}"
        )


def find_word(word, names):
    return re.search(rf"(?<![a-z]){word}(?![a-z])", names)
