"""TAESD, a small autoencoder in the place of the VAE: what its tensors are called.

Its author's files (github.com/madebyollin/taesd, taesd.py) are two, an encoder and a decoder, whose
tensors have numbers for names: places in a list that has entries without tensors, too. The decoder
begins with one more such entry than in diffusers (models/autoencoders/vae.py, DecoderTiny).
"""

import re

import numpy as np

BLOCKS = ["block"] * 3
HALVES = {  # the list, as diffusers has it; what is called "new" here has no bias
    "encoder": ["conv", "block", *["new", *BLOCKS] * 3, "conv"],
    "decoder": ["conv", "relu", *[*BLOCKS, "larger", "new"] * 3, "block", "conv"],
}
FILE = re.compile(r"(.*taesd.*)(encoder|decoder)(.*)", re.IGNORECASE)  # the other has that word
OTHERS = re.compile(r"taesd(xl|3|_?sd3|f1|_?flux)|sd_?xl|flux|sd3", re.IGNORECASE)


def layers(c):
    """Yield (its name in sd_more/vae.py, its names in files, (out, in), has it a bias) of each
    convolution. c: the channels of nearly all.
    """
    for half, kinds in HALVES.items():
        own = 0  # of our list, in which what has no tensors is no entry
        for i, kind in enumerate(kinds):
            k, last = i + (half == "decoder"), i + 1 == len(kinds)
            if kind == "block":
                for j in (1, 2, 3):
                    place = f"conv.{2 * j - 2}"
                    names = name_layer(half, f"{i}.{place}", f"{k}.{place}")
                    yield f"{half}.{own}.conv{j}", names, (c, c), True
            elif kind in ("conv", "new"):
                inner = ".conv" if (half, kind) == ("decoder", "new") else ""
                ends = (3, 4) if half == "encoder" else (4, 3)
                size = (c if not last else ends[1], c if i else ends[0])
                yield f"{half}.{own}{inner}", name_layer(half, i, k), size, kind == "conv"
            own += kind not in ("relu", "larger")


def name_layer(half, place, original):
    return f"vae/{half}.layers.{place}", f"{half}.layers.{place}", f"taesd_{half}.{original}"


FIRST = [f"{name}.weight" for name in name_layer("decoder", 0, 1)]  # by which it is known


def other_half(name):
    """taesd_encoder.pth -> taesd_decoder.pth; None for what has no such name"""
    if (named := FILE.fullmatch(name)) is None:
        return None
    start, half, end = named.groups()
    return start + ("decoder" if half.lower() == "encoder" else "encoder") + end


def zero_bias(weight):
    return np.zeros(len(weight), np.float32)


def is_half(names):
    """Are these the tensors of one of its author's files?"""
    return bool(names) and all(re.fullmatch(r"\d+\.(conv\.\d\.)?(weight|bias)", n) for n in names)
