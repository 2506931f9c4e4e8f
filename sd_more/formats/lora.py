"""LoRAs and their relatives: how they spell the names of layers, and what their parts make.

kohya's scripts, LyCORIS, diffusers in four generations, PEFT, ComfyUI and A1111 all write a layer's
name with dots, or with underscores for the dots, which cannot be undone: to_out_0 may be to_out.0
or to.out.0. So all names are made underscores here, and the caller does the same with the layers
that it knows. What stands before the layer's name is taken off piece by piece, whatever the order.

What sd.py adds to a weight W (o, i, kh, kw) is, in the names of its flat files,

    up @ down                   LoRA (arXiv 2106.09685), LoCon: down (r, i, kh, kw), up (o, r)
    up @ middle @ down          LoCon's Tucker form: middle (r, r, kh, kw), down (r, i)
    diff                        the whole change, of a weight or a bias

and with a magnitude m (DoRA, arXiv 2402.09353, eq. 5) W' = m (W + change) / |W + change|. Strength
multiplies the change, as PEFT has it (scale_layer in peft/tuners/lora/layer.py); other programs mix
W with the W' of strength 1, where both are the same. LoHa and LoKr become a diff, in float32 while
the file is written, so that sd.py need not know them; the price is a file as large as their layers:

    (w1_a @ w1_b) * (w2_a @ w2_b)     LoHa, Hadamard's product (arXiv 2108.06098, prop. 1)
    w1 kron w2                        LoKr, Kronecker's; both may be such products of two

The files that LyCORIS writes are the reference (github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/
locon.py, loha.py, lokr.py, full.py, norms.py, as described in arXiv 2309.14859), and PEFT's.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from .tensors import FLOATS, WHOLE, Computed, NotConvertible, Tensor, require

# %% Names -----------------------------------------------------------------------------------------

MARK = re.compile(  # what one of its names looks like
    r"lora_(unet|te\d?)_|lycoris_|.*[._]lora[._]|.*\.(hada_|lokr_|dora_scale|ia3_|b?oft_|vera_)"
    r"|.*\.(diff|diff_b|w_norm|b_norm|on_input)$"
)
WEIGHT = r"(\.[^.]+)?\.weight"  # PEFT puts an adapter's name before it
MAYBE = r"(\.[^.]+){0,2}"
ENDS = (  # what a tensor is of its layer, and how its name ends
    ("up", r"[._]lora(_linear_layer)?[._](up|B)" + WEIGHT),
    ("down", r"[._]lora(_linear_layer)?[._](down|A)" + WEIGHT),
    ("middle", r"\.lora_mid" + WEIGHT),
    ("alpha", r"(_lora)?\.alpha"),
    ("scale", r"\.scale"),  # A1111's, in place of alpha / rank
    ("scalar", r"\.scalar"),  # LyCORIS', a learned factor besides
    ("up_bias", r"\.lora_B(\.[^.]+)?\.bias"),  # PEFT's, with lora_bias
    ("dora_scale", r"\.dora_scale" + MAYBE),
    ("magnitude", r"\.lora_magnitude_vector" + MAYBE),
    ("diff", r"\.(diff|w_norm)"),
    ("diff_b", r"\.(diff_b|b_norm)"),
    *((f"hada_{x}", rf"\.hada_{x}" + MAYBE) for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *((f"lokr_{x}", rf"\.lokr_{x}" + MAYBE) for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t2")),
    ("lokr_w1", r"\.lokr_w1" + MAYBE),
    ("lokr_w2", r"\.lokr_w2" + MAYBE),
)
ENDS = tuple((part, re.compile(f"(.+?)({end})")) for part, end in ENDS)  # fmt: skip
STARTS = re.compile(
    r"((module|base_model|model|diffusion_model|lora|lycoris|unet|te1?|text_encoders?|text_model"
    r"|clip_[lh]|cond_stage_model|transformer(?=_text_model))_)+"
)
OTHERS = (  # what it is, and a name that only it has
    ("an (IA)3", r".*\.(on_input|ia3_)"), ("OFT", r".*\.b?oft_"), ("VeRA", r".*\.vera_"),
    ("GLoRA", r".*\.[ab][12]\.weight$"), ("a LoRA of the MLX examples", r".*\.lora_[ab]$"),
    ("a LoRA of a video model", r".*(motion_modules|temporal_transformer|time_stack)"),
    ("a LoRA of SD 3, Flux or a relative", r"lora_transformer_|transformer\.(?!text_model)"),
    ("a LoRA of SD 3, Flux or a relative", r".*(joint|double|single)(_transformer)?_blocks[._]"),
    ("a LoRA of SDXL", r"lora_te2_|text_encoder_2\.|.*transformer_blocks[._][1-9]"),
)  # fmt: skip
BUNDLED = (("a textual inversion that comes with it", r"bundle_emb\."),)
FORMS = {"hada": "LoHa", "lokr": "LoKr", "diff": "full difference"}


def is_lora(names):
    return any(map(MARK.match, names))


def split(name):
    """-> the layer's name as it is written there, which part of the layer this is; or None"""
    matches = ((part, end.fullmatch(name)) for part, end in ENDS)
    return next(((match[1], part) for part, match in matches if match), None)


def group(names):
    """-> {layer: {part: name}}, and the names that belong to none."""
    for what, pattern in OTHERS:
        if any(re.match(pattern, name) for name in names):
            good = (
                "LoRA, LoCon, LoHa, LoKr, DoRA and full differences for Stable Diffusion 1.x, 2.x"
            )
            raise NotConvertible(f"it is {what}. Only {good} will do")
    layers, rest = {}, []
    for name in names:
        if (found := split(name)) is None:
            rest.append(name)
            continue
        layer, part = found
        same = layers.setdefault(normalize(layer), {}).setdefault(part, name)
        require(same == name, f"it has one tensor under two names: {same} and {name}")
    return layers, rest


def normalize(layer):
    """base_model.model.unet.down_blocks.0...attn1.processor.to_q -> down_blocks_0_..._attn1_to_q"""
    layer = re.sub(r"_orig_mod[._]", "", layer).replace(".", "_")  # torch.compile's
    layer = STARTS.sub("", layer, count=1) if STARTS.match(layer) else layer
    # diffusers' first LoRAs were attention processors, in the text encoder, too.
    layer = layer.replace("_processor_", "_")
    layer = re.sub(r"self_attn_to_([qkv])$", r"self_attn_\1_proj", layer)
    layer = re.sub(r"self_attn_to_out$", "self_attn_out_proj", layer)
    return re.sub(r"(attn[12]_to_out)$", r"\1_0", layer)


def drop_empty(layers):
    """Take the layers out that have no change, only numbers for one. -> the names of these; none
    where no other layers are left"""
    empty = [layer for layer, names in layers.items() if names.keys() <= set(SINGLE)]
    empty = empty if len(empty) < len(layers) else []
    return [name for layer in empty for name in layers.pop(layer).values()]


def is_peft(names):
    """Are these names as PEFT itself writes them? (What it tells is beside them.)"""
    return any(name.startswith("base_model.model.") for name in names)


def name_bundled(name):
    """What a tensor is that no layer has; None if it is unknown."""
    return next((what for what, mark in BUNDLED if re.match(mark, name)), None)


def name_forms(parts):
    """-> what else than a plain LoRA these parts of layers are, in words."""
    forms = {FORMS[part[:4]] for part in parts if part[:4] in FORMS}
    return sorted(forms | ({"DoRA"} if {"dora_scale", "magnitude"} & set(parts) else set()))


# %% Strength --------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """What PEFT's config says of alpha and rank. Patterns are for layers whose names end so."""

    alpha: float
    rank: int
    alphas: dict
    ranks: dict
    stable: bool  # rsLoRA (arXiv 2312.03732): divide by the root of the rank

    def of(self, layer, rank=None):
        """layer: its name, with dots; rank: as its shapes say, where they do."""
        find = lambda patterns: (n for key, n in patterns.items() if f".{layer}".endswith(key))
        rank = rank or next(find(self.ranks), self.rank)
        return next(find(self.alphas), self.alpha) / (math.sqrt(rank) if self.stable else rank)


def read_peft_scales(config):
    """PEFT's config -> {"unet" or "text_encoder" or, for both, "": Scale}."""
    scales = {}
    for network in ("", "unet", "text_encoder"):
        told = lambda *names: next((config[n] for n in names if config.get(n) is not None), None)
        start = network and f"{network}."
        alpha, rank = told(f"{start}lora_alpha", f"{start}alpha"), told(f"{start}r")
        patterns = [told(f"{start}{of}_pattern") or {} for of in ("alpha", "rank")]
        good = type(alpha) in (int, float) and type(rank) is int and rank > 0
        require(good or not any(patterns), "it is a LoRA with patterns, and no alpha or no rank")
        if good:
            alphas, ranks = map(read_pattern, patterns)
            for a, r in ((alpha, rank), *((a, rank) for a in alphas.values())):
                sane = abs(a) < 1e6 and r < 1e6
                a, r = (max(-1e300, min(n, 1e300)) for n in (a, r))  # to be printed
                require(sane, f"it is a LoRA of alpha {a:.3g} and rank {r:.3g}")
            scales[network] = Scale(alpha, rank, alphas, ranks, bool(told(f"{start}use_rslora")))
    return scales


def read_pattern(pattern):
    """-> {the end of a layer's name: number}

    To PEFT the keys are regular expressions for the end (get_pattern_key in peft/utils/other.py).
    The ones it writes are names, and a stranger's expression may take for ever to match.
    """
    good = type(pattern) is dict and len(pattern) <= 5000  # a model has some 700 layers
    good = good and all(type(n) in (int, float) and 0 < n < 1e6 for n in pattern.values())
    require(good, "it is a LoRA whose alpha_pattern or rank_pattern holds no numbers")
    ends = {key.removeprefix("^").removesuffix("$").replace("\\.", "."): key for key in pattern}
    odd = next((key for key in ends if not re.fullmatch(r"[\w.-]+", key)), None)
    require(odd is None, f"it is a LoRA with a pattern that is no name: {str(odd)[:80]}")
    return {f".{end}": pattern[key] for end, key in ends.items()}


# %% Layers ----------------------------------------------------------------------------------------

MOST = 1 << 26  # numbers in one layer; a UNet's largest has 29 million


class Piece(NamedTuple):
    """What becomes one tensor of a flat file."""

    part: str  # up, down, middle, diff, bias.diff or magnitude
    shape: tuple
    tensor: Tensor | Computed
    factor: float = 1.0


def read_layer(tensors, shape, scale):
    """-> [Piece]. tensors: {part: Tensor}. shape: as the layer's weight has it in some model, of
    which the number of axes counts, and a convolution's window. scale: rank or None -> factor.
    """
    tensors, window = dict(tensors), shape[2:]
    kinds = {tensor.dtype for part, tensor in tensors.items() if part not in SINGLE}
    there = ", ".join(f"{part} is {t.shape}, {t.dtype}" for part, t in tensors.items())
    what = "".join(f"{form} with " for form in name_forms(tensors))
    agree = f"{what}parts that do not go together: {there}"
    require(kinds <= set(FLOATS), agree)
    numbers = {part: read_number(part, tensors) for part in SINGLE if part in tensors}
    bias, up_bias = tensors.pop("diff_b", None), tensors.pop("up_bias", None)
    both = "magnitude", "dora_scale"
    magnitudes = {part: tensors.pop(part) for part in both if part in tensors}
    pieces, rank = [], None
    if forms := {"lora" if part in LORA else part[:4] for part in tensors}:
        require(len(forms) == 1, agree)
        read = {"lora": read_lora, "hada": read_loha, "lokr": read_lokr, "diff": read_diff}
        pieces, rank = read[forms.pop()](tensors, shape, agree)
        factor = choose_factor(numbers, rank, scale if "lokr_w1" in tensors or rank else None)
        require(math.isfinite(factor), f"{agree}, alpha is {numbers}")
        pieces[0] = pieces[0]._replace(factor=factor)
        if up_bias is not None:
            require(bias is None and pieces[0].part == "up" and len(up_bias.shape) == 1, agree)
            pieces.append(Piece("bias.diff", up_bias.shape, up_bias, factor))
    for name, tensor in magnitudes.items():
        require(pieces and len(shape) > 1, f"a magnitude (DoRA) and no change: {there}")
        out, inputs = pieces[0].shape[0], pieces[min(1, len(pieces) - 1)].shape[1]
        lengths = orient(name, tensor.shape, out, inputs)
        require(lengths, agree)
        pieces.append(Piece("magnitude", lengths + (1,) * len(window), tensor))
    if bias is not None:
        require(len(bias.shape) == 1, agree)
        pieces.append(Piece("bias.diff", bias.shape, bias))
    require(pieces, f"only {', '.join(numbers)}, expected up and down")
    return pieces


def choose_factor(numbers, rank, scale):
    """For the change. Alpha counts only where there is a rank; 0 is as good as none (kohya-ss/
    sd-scripts, networks/lora.py). LoKr without one has factor 1 in LyCORIS (lokr.py), and PEFT's
    whatever its config says.
    """
    scalar = numbers.get("scalar", 1.0)
    if "scale" in numbers:
        return scalar * numbers["scale"]
    if "alpha" in numbers:
        return scalar * numbers["alpha"] / rank if rank and numbers["alpha"] else scalar
    return scalar * scale(rank) if scale else scalar


SINGLE = ("alpha", "scale", "scalar")
LORA = ("up", "down", "middle")


def read_number(part, tensors):
    tensor = tensors.pop(part)
    one, known = math.prod(tensor.shape) == 1, tensor.dtype in FLOATS + WHOLE
    require(one, f"an {part} of the shape {tensor.shape}, expected one number")
    require(known, f"an {part} of the type {tensor.dtype}")
    number = tensor.float32().item()
    require(math.isfinite(number), f"the {part} {number}, which is no number")
    return number


def orient(name, shape, out, inputs):
    """-> (out, 1) or (1, in), as a magnitude is of rows or of columns; None if it is of neither.

    PEFT's is for the rows, a convolution's as (1, out, 1, 1). LyCORIS had one for the columns
    first, (1, in), and now one for the rows, (out, 1) (wd_on_out in lycoris/modules/locon.py).
    """
    n = math.prod(shape)
    columns = name == "dora_scale" and shape[:2] == (1, n) and n != 1
    right = n == (inputs if columns else out)
    return ((1, n) if columns else (n, 1)) if right else None


def read_lora(tensors, shape, agree):
    there = ", ".join(sorted(tensors))
    require({"up", "down"} <= tensors.keys(), f"only {there}, expected up and down")
    up, down, middle = (tensors[part].shape if part in tensors else None for part in LORA)
    rank, window = down[0] if down else 0, shape[2:]
    good = rank > 0 and len(down) in (2, 4) and len(shape) > 1
    good = good and (middle is None or len(middle) == 4 and middle[1] == rank)
    good = good and len(up) in (2, 4) and up[1] == (middle or down)[0] and set(up[2:]) <= {1}
    require(good, agree)
    if middle is None and len(down) == 2 and window:  # (r, i kh kw)
        require(down[1] % math.prod(window) == 0, agree)
        down = (rank, down[1] // math.prod(window), *window)
    if middle is not None:
        require(set(down[2:]) <= {1}, agree)
    flat = lambda shape: shape[:2] if set(shape[2:]) <= {1} else shape
    shapes = {"up": up[:2], "down": flat(down), "middle": middle}
    return [Piece(part, shapes[part], tensors[part]) for part in LORA if part in tensors], rank


def read_diff(tensors, shape, agree):
    """A whole change, of a weight of any kind; a 1x1 convolution's is a matrix here."""
    tensor, n = tensors["diff"], len(shape)
    whole = tensor.shape[:n] if set(tensor.shape[n:]) <= {1} else tensor.shape
    require(len(whole) == n and whole[2:] == shape[2:], agree)
    return [Piece("diff", whole, tensor)], None


def read_loha(tensors, shape, agree):
    names = ("w1_a", "w1_b", "w2_a", "w2_b", *(["t1", "t2"] if "hada_t1" in tensors else ()))
    parts = take("hada_", tensors, names)
    first, second = (measure(*pick(parts, k), shape, agree) for k in "12")
    require(first == second, agree)
    return [make_piece(first, shape, multiply, parts, agree)], parts["w1_b"].shape[0]


def read_lokr(tensors, shape, agree):
    names = [["w1"], ["w1_a", "w1_b"]]["lokr_w1_a" in tensors]
    second = ["w2_a", "w2_b", *["t2"] * ("lokr_t2" in tensors)]
    names = names + (second if "lokr_w2_a" in tensors else ["w2"])
    parts = take("lokr_", tensors, names)
    o, i = measure(*pick(parts, "1"), shape[:2], agree)
    rows, columns = measure(*pick(parts, "2"), shape, agree)
    rank = next((parts[f"w{k}_b"].shape[0] for k in "21" if f"w{k}_b" in parts), None)
    return [make_piece((o * rows, i * columns), shape, kron, parts, agree)], rank


def take(start, tensors, names):
    """-> {name without its start: Tensor}; there must be all of these and no others."""
    there, wanted = (
        ", ".join(sorted(name.removeprefix(start) for name in all)) for all in (tensors, names)
    )
    require(there == wanted, f"only {there}, expected {wanted}, for it is {FORMS[start[:4]]}")
    return {name: tensors[start + name] for name in names}


def pick(parts, k):
    """-> w, a, b and t of the first or second factor: an array or a Tensor each, or None"""
    return [parts.get(name) for name in (f"w{k}", f"w{k}_a", f"w{k}_b", f"t{k}")]


def measure(w, a, b, t, shape, agree):
    """-> (rows, columns) of a factor, whose columns have a convolution's window in them."""
    window = math.prod(shape[2:])
    w, a, b, t = (tensor and tensor.shape for tensor in (w, a, b, t))
    for one in (w, b):
        good = one is None or len(one) > 1 and math.prod(one[2:]) in (1, window)
        require(good and (not one or len(one) < 3 or math.prod(one[2:]) == window), agree)
    if w:
        size = w[0], math.prod(w[1:])
    elif t:
        good = len(a) == len(b) == 2 and len(t) == 4 and t[:2] == (a[0], b[0])
        require(good and math.prod(t[2:]) == window, agree)
        size = a[1], b[1] * window
    else:
        require(len(a) == 2 and a[1] == b[0], agree)
        size = a[0], math.prod(b[1:])
    require(all(0 < n <= MOST for n in size), agree)
    return size


def make_piece(size, shape, function, parts, agree):
    rows, columns = size
    require(columns % math.prod(shape[2:]) == 0 and len(shape) > 1, agree)
    require(rows * columns <= MOST, f"a change of {rows} x {columns}, far too large: {agree}")
    inputs = columns // math.prod(shape[2:])
    tensor = Computed(next(iter(parts.values())).path, function, parts)
    return Piece("diff", (rows, inputs, *shape[2:]), tensor)


def multiply(**parts):
    return product(*pick(parts, "1")) * product(*pick(parts, "2"))


def kron(**parts):
    w1, w2 = product(*pick(parts, "1")), product(*pick(parts, "2"))
    return np.kron(w1.reshape(w1.shape[:2] + (1,) * (w2.ndim - 2)), w2)


def product(w, a, b, t):
    """-> (rows, columns); with t, Tucker's form, or from a w of that shape (rows, in, kh, kw)"""
    if w is not None:
        return w
    if t is None:
        return a @ b.reshape(len(b), -1)
    return np.einsum("po,pqhw,qi->oihw", a, t, b, optimize=True)
