"""Stable Diffusion, from the sentence to the picture, in one file.

    python sd.py --prompt "a red house on the grass at sunset" --seed 42

The networks below are empty until a file of weights fills them: by default that of a miniature,
trained on drawn scenes, in tiny/ beside this file; with --model that of Stable Diffusion 1.x or
2.x. The code is the same. Sizes in comments are those of 1.x for a 512 x 512 picture.

    "a red house ..."                          noise x (b, 64, 64, 4)
          |                                       |
          |  2 tokenizer                          v
          v                              +---> 5 UNet: what is the noise in x?  <---+
    77 token ids                         |        |                                 |
          |                              |        |  eps (b, 64, 64, 4)             |
          |  4 CLIP                      |        v                                 |
          v                              |     7 PLMS: take some of it away         | x, t
    context (b, 77, 768) ----------------+        |                                 |
                                                  +-- 50 steps, 51 calls with PLMS -+
                                                  |
    picture (b, 512, 512, 3) <--- 6 VAE decoder <-+

Part I is Stable Diffusion; part II can be read in any order. What is written is what runs, with two
exceptions where sd_more/ is there: a line in section 9 exchanges leaf layers for faster ones of the
same meaning (fast=False does not), and its app.py runs in the place of section 14.

Letters, the same throughout part I (inside a layer h, w and c are those of its own input):
    t        the timestep, 0 to 999: how much noise was added, nearly none to nearly nothing else
    x        the latents at time t, which the UNet sees.  x0: the clean ones
    eps      the noise in x, of variance 1, and what the UNet answers for it
    abar     "alpha bar", the share of the clean signal's variance left at t: 0.99915 to 0.0047
    sigma    sqrt((1 - abar) / abar), the ratio of noise to signal: 0.03 to 14.6
    context  what the text model says of the prompt, a vector for each of 77 tokens
    b        pictures in the batch
    h, w     height and width of the latents, 1/8 of the picture's: 64, 64
    c, o     channels: the numbers at one position; those that come out of a layer
    q, k, v  attention's queries, keys and values.  n, m: how many queries; how many keys and values
    d        the channels of one attention head
    cfg      classifier-free guidance: at 1 the prompt's own answer counts, above 1 more than that

I    1 The idea  2 Tokenizer  3 Layers  4 CLIP  5 UNet  6 VAE  7 DDIM and PLMS  8 Text to image
     9 Flat files, PyTorch's noise  (the ground that this stands on)
II   10 Image to image, inpainting   11 More samplers   12 LoRA, clip skip   13 ControlNet
III  14 Command line

[1] Rombach et al. 2022, arXiv 2112.10752 (latent diffusion)  [2] Ho et al. 2020, 2006.11239 (DDPM)
[3] Song et al. 2021, 2010.02502 (DDIM)      [4] Liu et al. 2022, 2202.09778 (PLMS)
[5] Radford et al. 2021, 2103.00020 (CLIP)   [6] Ho, Salimans 2022, 2207.12598 (guidance)
[7] Salimans, Ho 2022, 2202.00512 (v)        [8] Meng et al. 2021, 2108.01073 (image to image)
[9] Karras et al. 2022, 2206.00364           [10] Song et al. 2021, 2011.13456 (score)
[11] Zhang et al. 2023, 2302.05543           [12] Hu et al. 2021, 2106.09685 (LoRA)
[13] Lin et al. 2023, 2305.08891 (no black pictures)
File names in parentheses: CompVis/stable-diffusion on GitHub at 21f890f, mostly under ldm/.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["mlx; sys_platform == 'darwin'", "mlx[cpu]; sys_platform == 'linux'", "numpy",
#                 "safetensors", "regex", "pillow"]
# ///

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all this is imported: no traceback

import argparse
import contextlib
import fcntl
import functools
import importlib.util
import itertools
import json
import math
import os
import reprlib
import sys
import tempfile
import unicodedata
import warnings
from collections import namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx  # arrays, on the GPU where MLX has one
import numpy as np  # the noise, and matrix products on a CPU
import regex  # like re, but knows which characters of the world are letters: \p{L}
from mlx import nn  # only its Module, a tree of arrays that knows their names; none of its layers
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image, ImageOps  # pictures as files
from safetensors import SafetensorError, safe_open  # checks a file's header before MLX reads it

# Where this file is, and the miniature. A notebook's cell is no file: there, the working folder.
SOURCE = Path((lambda: None).__code__.co_filename).resolve()
HERE = SOURCE.parent if SOURCE.is_file() else Path.cwd()
PLACES = [HERE / folder / "tiny.safetensors" for folder in ("tiny", "sd_tiny")]  # pip's is the last
TINY = next((path for path in PLACES if path.is_file()), PLACES[0])


def printable(text):  # without what a terminal would obey; names, too, come from strangers' files
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class SDError(ValueError):
    """What the user can fix. The text is the whole message: what, which value, what to do now."""

    def __init__(self, text):
        super().__init__(printable(text)[:2000])


# =================================================================================== I. The picture

# %% 1. The idea -----------------------------------------------------------------------------------
# Add a little noise to a picture, a thousand times over, until only noise is left. That needs no
# network. But a network that tells what in a picture is noise can go the other way: take a little
# of it away, ask again, and arrive at a picture nobody has seen. This is diffusion [2].
#
# Here the picture is a small array of numbers, its latents x0 (section 6). All steps up to t can be
# done at once, with normal random numbers eps. This is the forward process [2, eq. 4]:
#
#     x = sqrt(abar) x0 + sqrt(1 - abar) eps
#
# abar falls from nearly 1 at t = 0 to nearly 0 at t = 999. The squares of the two factors sum to 1,
# so x keeps variance 1 if x0 has it. Training (of the UNet; CLIP and the VAE were trained before,
# and stay as they are) asks for the noise in such mixtures [2, eq. 14]:
#
#     repeat:  x0, text = the latents of a picture; its caption, or "" one time in ten (section 8)
#              t, eps   = a random timestep, random normal numbers
#              x        = sqrt(abar(t)) x0 + sqrt(1 - abar(t)) eps
#              loss     = mean of (unet(x, t, text) - eps)^2      (models/diffusion/ddpm.py:1012)
#              change the weights a little so that the loss falls (averages of them are published)
#
# Many pictures, each with its own noise, could have made the same x, some likelier than others. The
# answer of least squared error is the mean of them all: at a large t, the x0 that follows from it
# is a blur of all pictures that x might come from; at the smallest t fine grain and noise look
# alike, and the answered eps has a variance well below the noise's 1. The blur is why there are
# many steps. A single one from 999 to 0 would land on it. Instead take only a part of the noise
# away and ask again: with less noise fewer pictures are possible, and their mean is sharper. A
# thousand steps are not needed, either; section 7 says why 50 will do.
#
# Two more ways to say the same. The mean eps points away from where pictures are: -eps / sqrt(1 -
# abar) is the gradient of log p(x), the score [10], p being how probable x is at this t. And since
# x is known, eps, x0 and their mixture v = sqrt(abar) eps - sqrt(1 - abar) x0 [7] are the same
# knowledge, but the loss weighs them differently: near t = 999 eps is almost x itself, and guessing
# it teaches little about x0; v is nearly -x0 there, and nearly eps at t = 0. (2.x at 768 says v.)


def scaled_linear():  # (modules/diffusionmodules/util.py:21, where it is called "linear")
    """-> betas (1000,), whose square roots are evenly spaced between two values of the authors'."""
    return np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def leading(schedule, steps):
    """leading(schedule, 50) -> [981, 961, ..., 21, 1]: evenly spaced, as many as asked for.

    Few steps begin far from 999, two at 501, one at 1, where much or all of x should be picture,
    and paint badly. (modules/diffusionmodules/util.py:46, where some steps make more than asked.)
    """
    return [1000 // steps * i + 1 for i in reversed(range(steps))]


SPACINGS = {"leading": leading, "linspace": lambda _, n: np.linspace(999, 0, n).tolist()}
SPACINGS["trailing"] = lambda schedule, n: [round(1000 - 1000 / n * i) - 1 for i in range(n)]


class Schedule:
    """How much of x is noise at each t. Step t adds noise of variance betas[t] and keeps 1 -
    betas[t] of the variance so far; abar (in [3] alpha) is the product of all these up to t.
    Between two whole t the logarithm of sigma is interpolated."""

    def __init__(self, betas, zero_snr=False):
        abar = np.cumprod(1 - np.asarray(betas, np.float64))
        if zero_snr:  # moved so that at 999 nothing of x0 is left in x [13, algorithm 1]
            root = np.sqrt(abar)
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        with np.errstate(divide="ignore"):  # then the last sigma is infinite
            self.log_sigmas = np.log((1 - abar) / abar) / 2

    def sigma(self, t):  # sqrt((1 - abar) / abar)
        return math.exp(np.interp(t, np.arange(len(self.log_sigmas)), self.log_sigmas))

    def abar(self, t):
        return 1 / (1 + self.sigma(t) ** 2)

    def timesteps(self, spacing, steps):  # of a run, the largest first
        expect(spacing in SPACINGS, "spacing", spacing, f"one of {', '.join(SPACINGS)}")
        return SPACINGS[spacing](self, steps)

    def add_noise(self, x0, eps, t):
        """The forward process: x0 as it is at time t. (models/diffusion/ddpm.py:274)"""
        return math.sqrt(self.abar(t)) * x0 + math.sqrt(1 - self.abar(t)) * eps

    def remove_noise(self, x, eps, t):
        """add_noise solved for x0: the clean latents, if eps is right."""
        return (x - math.sqrt(1 - self.abar(t)) * eps) / math.sqrt(self.abar(t))

    def x0_and_eps(self, answer, x, t, prediction):
        """What the UNet answered, eps or v -> the x0 and the eps that x is made of."""
        if prediction == "eps":
            return self.remove_noise(x, answer, t), answer
        signal, noise = math.sqrt(self.abar(t)), math.sqrt(1 - self.abar(t))
        return signal * x - noise * answer, noise * x + signal * answer


# %% 2. Tokenizer ----------------------------------------------------------------------------------
# Cuts a sentence into pieces that the text model has a vector for, and numbers them.
#
#   in   "a red house"           out   77 ids: [49406, 320, 736, 1212, 49407, 49407, ...]
#
# Common words are one piece, rare ones several. The pieces were found on a large text: start from
# single bytes and join the most frequent pair of neighbours, 48,894 times (byte pair encoding).
# That list of merges is all the tokenizer knows. Three things to watch:
#
#   - It works on the bytes of UTF-8, so every writing system is covered. Each byte is written as
#     one printable character, so that the file of merges is readable.
#   - "</w>" marks the end of a word: "house</w>" is the word, "house" the start of "houseboat".
#   - The result is always 77 long: CLIP was given so many positions, to save time, two of them for
#     the marks of start and end. What is left over is padded as it was in training: with the end
#     mark again in 1.x, with 0 in 2.x. The UNet looks at the padding, too; no mask hides it.
#
# Source: clip/simple_tokenizer.py of OpenAI's CLIP [5], with the cleaning of the transformers
# library: NFC, lower case. (CLIP also mends quotes, ligatures and HTML's entities.)

# Ids: 256 bytes, the same 256 at a word's end, what each of the 48,894 merges makes, the two marks.
START, END = 49406, 49407
MARKS = {"<|startoftext|>": START, "<|endoftext|>": END}
ANY_MARK = "|".join(map(regex.escape, MARKS))
WORD = regex.compile(ANY_MARK + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def byte_characters():
    """-> {byte: printable character}. 188 bytes stand for themselves, the others get a stand-in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip([*printable, *others], map(chr, [*printable, *range(256, 256 + len(others))])))


class Tokenizer:
    """CLIP's byte pair encoding. merges: text, one merge per line; pad: the id to fill up with;
    words: {word: its ids}, for words with vectors of their own (textual inversion).
    """

    def __init__(self, merges, pad=END, words=None):
        self.pad, self.words = pad, words or {}
        self.characters = byte_characters()
        merges = [tuple(line.split(" ")) for line in merges.strip("\n").split("\n")]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        ends = [character + "</w>" for character in self.characters.values()]
        vocabulary = [*self.characters.values(), *ends, *("".join(pair) for pair in merges)]
        self.ids = {piece: i for i, piece in enumerate(vocabulary)}
        self.bpe = functools.lru_cache(maxsize=10_000)(self.bpe)
        self.units = {mark: [i] for mark, i in MARKS.items()} | self.words  # never cut into pieces
        loaded = [regex.escape(word) for word in sorted(self.words, key=len, reverse=True)]
        self.any_unit = regex.compile("|".join([ANY_MARK, *(rf"(?<!\w){w}(?!\w)" for w in loaded)]))

    def bpe(self, word):
        """Join the pair of neighbours that comes first in the merges, until no pair is in them.

        bpe("lighthouse")  ->  ("lighthouse</w>",)
        bpe("househunter") ->  ("house", "hunter</w>")
        """
        pieces, never = [*word[:-1], word[-1] + "</w>"], len(self.ranks)
        ranks = [self.ranks.get(pair, never) for pair in itertools.pairwise(pieces)]
        while (best := min(ranks, default=never)) < never:
            i = ranks.index(best)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
            around = itertools.pairwise(pieces[max(0, i - 1) : i + 2])
            ranks[max(0, i - 1) : i + 2] = [self.ranks.get(pair, never) for pair in around]
        return tuple(pieces)

    def split(self, text):
        """split("2 cats")  ->  [("2", ("2</w>",), [273]), ("cats", ("cats</w>",), [3989])]"""
        expect(len(text) <= 20_000, "the prompt", text, "at most 20,000 characters long")
        found, at = [], 0
        for match in self.any_unit.finditer(text):
            found += self.split_plain(text[at : match.start()])
            found.append((match[0], (match[0],), self.units[match[0]]))
            at = match.end()
        return found + self.split_plain(text[at:])

    def split_plain(self, text):
        found = []
        # Lower case letter by letter: str.lower() would write a Greek sigma by its neighbours.
        text = "".join(letter.lower() for letter in unicodedata.normalize("NFC", text))
        for word in WORD.findall(text):
            # <|ENDOFTEXT|> is no mark, and looks like one only in lower case: it is three words.
            for w in (word[:2], word[2:-2], word[-2:]) if word in MARKS else (word,):
                expect(len(w) <= 500, "a word of the prompt", w, "at most 500 characters long")
                pieces = self.bpe("".join(self.characters[x] for x in w.encode(errors="replace")))
                found.append((w, pieces, [self.ids[piece] for piece in pieces]))
        return found

    def encode(self, text):
        """Text -> list of 77 ids: START, at most 75 pieces, END, and the pad id to fill up."""
        ids = [i for _, _, ids in self.split(text) for i in ids][:75]
        return [START, *ids, END] + [self.pad] * (75 - len(ids))

    def unread(self, text):
        """The words from the 76th piece on, which encode() drops; "" if there are none."""
        words = self.split(text)
        ends = itertools.accumulate(len(ids) for _, _, ids in words)
        return " ".join(word for (word, _, _), end in zip(words, ends) if end > 75)


# %% 3. Layers -------------------------------------------------------------------------------------
# What the three networks are made of. Arrays are (b, n, c) for sequences and (b, h, w, c) for
# pictures: channels last, as MLX wants them. PyTorch has (b, c, h, w), and its convolution weights
# (out, in, kh, kw) are (out, kh, kw, in) here. So a 1 x 1 convolution is a Linear.
#
# Watch the epsilons, the small numbers that keep a norm from dividing by 0. GroupNorm has 1e-6 in
# the VAE and in front of each transformer, but 1e-5 in the UNet's residual blocks and before its
# last convolution; LayerNorm has 1e-5.
#
# The text model and the UNet may compute in float16: 11 bits of precision, numbers up to 65,504. It
# is too little for sums over thousands of numbers: matrix products add up in float32 inside MLX;
# means, variances and softmax are written here, and must say so. An nn.Module is a dict of its
# arrays and sub-modules; zeros and ones are placeholders, until section 9 fills them.


def on_gpu():
    return mx.default_device().type == mx.gpu


def view(x):  # an array as NumPy sees it, in float32; no copy if it has that type
    return np.array(x.astype(mx.float32), copy=False)


def matmul(a, b):
    """a @ b. On a CPU through NumPy: MLX's build for Linux multiplies with plain loops there, tens
    of times slower than NumPy's library.
    """
    return a @ b if on_gpu() else mx.array(np.matmul(view(a), view(b))).astype(a.dtype)


# (..., c) -> (..., o): each output is a weighted sum of the inputs, plus a bias.
class Linear(nn.Module):
    def __init__(self, c_in, c_out, bias=True):
        super().__init__()
        self.weight = mx.zeros((c_out, c_in))
        if bias:
            self.bias = mx.zeros((c_out,))

    def __call__(self, x):
        y = matmul(x, self.weight.T)
        return y + self.bias if "bias" in self else y


# A 3 x 3 window slides over the picture, stride apart: (b, h, w, c) -> (b, h', w', o).
class Conv(nn.Module):
    def __init__(self, c_in, c_out, stride=1, padding=1):
        super().__init__()
        self.weight, self.bias = mx.zeros((c_out, 3, 3, c_in)), mx.zeros((c_out,))
        self.stride, self.padding = stride, padding

    def __call__(self, x):
        if on_gpu():
            return mx.conv2d(x, self.weight, self.stride, self.padding) + self.bias
        # By definition: for each place in the window a linear layer, which looks at the picture
        # shifted by as much, and the sum of all nine.
        s, p, weight = self.stride, self.padding, view(self.weight)
        x, dtype = view(mx.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))), x.dtype
        h, w, window = x.shape[1] - 2, x.shape[2] - 2, itertools.product(range(3), range(3))
        y = sum(x[:, i : i + h : s, j : j + w : s] @ weight[:, i, j].T for i, j in window)
        return mx.array(y).astype(dtype) + self.bias


# Give each group of c / groups channels mean 0 and variance 1, over all positions; then each
# channel a learned factor (weight) and shift (bias): (b, h, w, c) -> same.
class GroupNorm(nn.Module):
    def __init__(self, c, groups, epsilon):
        super().__init__()
        self.weight, self.bias = mx.ones((c,)), mx.zeros((c,))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x):
        b, h, w, c = x.shape
        y = x.astype(mx.float32).reshape(b, h * w, self.groups, c // self.groups)
        variance = y.var((1, 3), keepdims=True)
        y = (y - y.mean((1, 3), keepdims=True)) * mx.rsqrt(variance + self.epsilon)
        return y.reshape(b, h, w, c).astype(x.dtype) * self.weight + self.bias


# Mean 0 and variance 1 for each vector by itself, then weight and bias: (b, n, c) -> same.
class LayerNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = mx.ones((c,)), mx.zeros((c,))

    def __call__(self, x):
        y = x.astype(mx.float32)
        y = (y - y.mean(-1, keepdims=True)) * mx.rsqrt(y.var(-1, keepdims=True) + 1e-5)
        return y.astype(x.dtype) * self.weight + self.bias


def softmax(x):
    """exp(x) / sum of exp(x), over the last axis, in float32; for MLX's exp, too, is slow there."""
    if on_gpu():
        return mx.softmax(x, axis=-1, precise=True)
    y = view(x)
    y = np.exp(y - y.max(-1, keepdims=True))  # the largest as 0, or exp might be infinite
    return mx.array(y / y.sum(-1, keepdims=True)).astype(x.dtype)


# 0 far on the left, x far on the right, and a smooth bend between: without it two layers in a row
# would be no more than one. gelu is x times the probability that a standard normal number is below
# x; quick_gelu, which the first CLIP had, differs from it by up to 0.02.
ACTIVATIONS = {
    "silu": lambda x: x * mx.sigmoid(x),
    "gelu": lambda x: x * (1 + mx.erf(x / math.sqrt(2))) / 2,
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
}


class Activation(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def __call__(self, x):
        return ACTIVATIONS[self.name](x)


class NormSilu(GroupNorm):  # before nearly every convolution: to one scale, bend, then mix
    def __call__(self, x):
        return ACTIVATIONS["silu"](super().__call__(x))


# A Linear to twice the channels, of which one half, through GELU, is a gate that says how much to
# let through of the other: (..., c) -> (..., c_out / 2). (modules/attention.py:37)
class GEGLU(Linear):
    def __call__(self, x):
        y, gate = mx.split(super().__call__(x), 2, axis=-1)
        return y * ACTIVATIONS["gelu"](gate)


class AttentionCore(nn.Module):
    """softmax(Q K^T / sqrt(d)) V for each head, on its own d of the c channels.

    q (b, n, c), k (b, m, c), v (b, m, c) -> (b, n, c). Each of n positions has a query, what it
    looks for; each of m a key, what it offers, and a value, what it gives. The better a query fits
    a key (their product), the more it takes of that value. causal: i sees 0 ... i only (n = m).
    """

    def __init__(self, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal

    def __call__(self, q, k, v):
        b, n, c = q.shape
        d = c // self.heads
        q, k, v = (y.reshape(b, -1, self.heads, d).transpose(0, 2, 1, 3) for y in (q, k, v))
        # A sum of d products of variance 1 has variance d. Without the division the softmax would
        # see numbers so far apart that one key wins and the others give nothing.
        scores = matmul(q * d**-0.5, k.transpose(0, 1, 3, 2))  # (b, heads, n, m)
        if self.causal:
            later = mx.arange(n)[:, None] < mx.arange(n)
            scores = mx.where(later, -mx.inf, scores)  # exp(-inf) is 0
        return matmul(softmax(scores), v).transpose(0, 2, 1, 3).reshape(b, n, c)


# attention(x) is self-attention: positions of x look at each other, m = n. attention(x, context)
# is cross-attention: they look at context, m = 77. (modules/attention.py:152)
class Attention(nn.Module):
    def __init__(self, c, heads, context_width=None, bias=False, causal=False):
        super().__init__()
        self.to_q = Linear(c, c, bias)
        self.to_k = Linear(context_width or c, c, bias)
        self.to_v = Linear(context_width or c, c, bias)
        self.to_out = Linear(c, c)
        self.core = AttentionCore(heads, causal)

    def __call__(self, x, context=None):
        context = x if context is None else context
        return self.to_out(self.core(self.to_q(x), self.to_k(context), self.to_v(context)))


# %% 4. CLIP ---------------------------------------------------------------------------------------
# Turns the ids into one vector per token that says what the token means in this sentence.
#
#   in   ids (b, 77)           out   context (b, 77, 768)
#
# A transformer: look up a vector for each id and add one for its position. Then, twelve times, let
# each token look at itself and those before it (attention), and a small network work on each vector
# alone. Both add to x what they find; a last norm brings all to one scale. It was trained with a
# network for pictures: the vectors of a picture and of its caption, at the END mark, had to match
# [5], and not those of other pairs. So it knows what words look like. The other 76 vectors were
# never matched with anything; the UNet looks at them all the same.
#
# Watch: no token sees those after it (causal). The vector of "house" in "red house" knows about
# red, and the padding after the sentence knows all of it. 2.x has another, larger CLIP, OpenCLIP's
# ViT-H/14, and takes the vectors before its last layer, through the last norm; the converter leaves
# that layer out. (modules/encoders/modules.py:137)


class TextLayer(nn.Module):
    def __init__(self, c, heads, activation, causal=True):
        super().__init__()
        self.norm1 = LayerNorm(c)
        self.attention = Attention(c, heads, bias=True, causal=causal)
        self.norm2 = LayerNorm(c)
        self.fc1 = Linear(c, 4 * c)
        self.activation = Activation(activation)
        self.fc2 = Linear(4 * c, c)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):  # skip: how many of the last layers to leave out, see section 12
    def __init__(self, width, layers, heads, activation, vocabulary, skip=0):
        super().__init__()
        self.token_embedding = {"weight": mx.zeros((vocabulary, width))}
        self.position_embedding = {"weight": mx.zeros((77, width))}
        self.layers = [TextLayer(width, heads, activation) for _ in range(layers)]
        self.norm, self.skip = LayerNorm(width), skip

    def __call__(self, ids):
        x = self.token_embedding["weight"][ids] + self.position_embedding["weight"]  # (b, 77, 768)
        for layer in self.layers[: len(self.layers) - self.skip]:
            x = layer(x)
        return self.norm(x)


# %% 5. UNet ---------------------------------------------------------------------------------------
# Given latents x, the time t that tells how noisy they are, and the sentence, it answers one
# question: what is the noise in x? (Unscaled, as eps; the time tells how much of it is in x.)
#
#   in   x (b, h, w, 4)    t    context (b, 77, 768)          out   eps (b, h, w, 4), or v
#
# It is a U: down over four levels, each half as high and wide as the one above and, except the
# last, with twice the channels; then up again. On a small map a 3 x 3 window sees far, and many
# channels are affordable. On the way up each level is handed what was there on the way down, where
# the edges still are: these skip connections concatenate, so that the next convolution can choose.
#
# Two kinds of blocks alternate. A ResBlock works on the picture, by convolution, and is told the
# time. A TransformerBlock lets positions look at each other and at the sentence. Nothing else sees
# the time or the sentence. Nearly all the time a picture takes is spent here: 50 steps of PLMS are
# 51 calls (section 7), each for two sentences (section 8). Everything else is called once.


def time_features(t, c):  # (modules/diffusionmodules/util.py:151)
    """A timestep as a vector (c,): the cosines, then the sines, of t at c / 2 speeds, which fall
    from 1 to nearly 1/10000 by equal factors. Like the hands of a clock, the fast ones tell 17 from
    18 and the slow ones 17 from 900.
    """
    speed = mx.exp(-math.log(10000) * mx.arange(c // 2) / (c // 2))
    return mx.concatenate([mx.cos(t * speed), mx.sin(t * speed)])


# x plus what two convolutions make of it: (b, h, w, c_in) -> (b, h, w, c_out). time (1, time_width)
# becomes a number per channel, added everywhere, which decides what passes the next activation.
# (The VAE's blocks have no time. modules/diffusionmodules/openaimodel.py:163)
class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, groups, epsilon, time_width=None):
        super().__init__()
        self.norm1 = NormSilu(c_in, groups, epsilon)
        self.conv1 = Conv(c_in, c_out)
        if time_width is not None:
            self.time = Linear(time_width, c_out)
        self.norm2 = NormSilu(c_out, groups, epsilon)
        self.conv2 = Conv(c_out, c_out)
        if c_in != c_out:
            self.shortcut = Linear(c_in, c_out)

    def __call__(self, x, time=None):
        y = self.conv1(self.norm1(x))
        if time is not None:
            y = y + self.time(time)[:, None, None, :]
        y = self.conv2(self.norm2(y))
        return (self.shortcut(x) if "shortcut" in self else x) + y


def once_per_sentence(x, context):
    """Repeat x (b, ...) if there are two sentences for it in context (2b, 77, c): guidance, section
    8. Until the first cross-attention x has seen neither, so all that is computed once for both.
    """
    return mx.concatenate([x] * (len(context) // len(x)))


# Look at each other, look at the sentence, work on it: (b, h, w, c) -> same, b as context's. The
# picture is read as a sequence of n = h * w positions. (modules/attention.py:196, 218)
class TransformerBlock(nn.Module):
    def __init__(self, c, heads, groups, context_width):
        super().__init__()
        self.norm = GroupNorm(c, groups, epsilon=1e-6)
        self.proj_in = Linear(c, c)
        self.norm1 = LayerNorm(c)
        self.attn1 = Attention(c, heads)
        self.norm2 = LayerNorm(c)
        self.attn2 = Attention(c, heads, context_width)
        self.norm3 = LayerNorm(c)
        self.ff_in = GEGLU(c, 8 * c)
        self.ff_out = Linear(4 * c, c)
        self.proj_out = Linear(c, c)

    def __call__(self, x, context):
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x).reshape(b, h * w, c))  # (b, n, c)
        y = y + self.attn1(self.norm1(y))
        x, y = once_per_sentence(x, context), once_per_sentence(y, context)
        y = y + self.attn2(self.norm2(y), context)
        y = y + self.ff_out(self.ff_in(self.norm3(y)))  # (b, n, c) -> (b, n, 4c) -> (b, n, c)
        return x + self.proj_out(y).reshape(x.shape)


# Half the height and width: a convolution that takes every second step, over a picture with zeros
# added: in the VAE (zeros_before=0) below and right of it, in the UNet (1) all round. Either, in
# the other's place, shifts it by one. (modules/diffusionmodules/openaimodel.py:134, model.py:60)
class Downsample(nn.Module):
    def __init__(self, c, zeros_before=1):
        super().__init__()
        self.conv, self.zeros = Conv(c, c, stride=2, padding=0), (zeros_before, 1)

    def __call__(self, x):
        return self.conv(mx.pad(x, ((0, 0), self.zeros, self.zeros, (0, 0))))


# Twice the height and width: every position becomes 2 x 2, then a convolution smooths them. size:
# (h, w) to cut it to, as the skip connection that comes next is one smaller if halved from odd.
class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = Conv(c, c)

    def __call__(self, x, size=(None, None)):
        x = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x[:, : size[0], : size[1]])


class UNet(nn.Module):
    """x (b, h, w, 4), t a number, context (b or 2b, 77, context_width) -> (b or 2b, h, w, 4).

    widths: the channels of the four levels; heads: attention's on each (the lowest has attention in
    the middle only); channels: 9 for inpainting models (section 10); corrections: what section 13
    adds to the skip connections and to x in the middle. The rows are those of
    input_blocks and output_blocks in modules/diffusionmodules/openaimodel.py:413."""

    def __init__(self, widths, heads, groups, context_width, channels=4):
        super().__init__()
        c1, c2, c3, c4 = widths
        heads1, heads2, heads3, heads4 = heads
        self.c1, time_width = c1, 4 * c1
        res = functools.partial(ResBlock, groups=groups, epsilon=1e-5, time_width=time_width)
        attend = functools.partial(TransformerBlock, groups=groups, context_width=context_width)
        self.time1 = Linear(c1, time_width)
        self.time2 = Linear(time_width, time_width)
        # fmt: off
        self.down = [               # right: x after the row, which is also its skip connection
            [Conv(channels, c1)],                                       # 64 x 64 x  320
            [res(c1, c1), attend(c1, heads1)],                          # 64 x 64 x  320
            [res(c1, c1), attend(c1, heads1)],                          # 64 x 64 x  320
            [Downsample(c1)],                                           # 32 x 32 x  320
            [res(c1, c2), attend(c2, heads2)],                          # 32 x 32 x  640
            [res(c2, c2), attend(c2, heads2)],                          # 32 x 32 x  640
            [Downsample(c2)],                                           # 16 x 16 x  640
            [res(c2, c3), attend(c3, heads3)],                          # 16 x 16 x 1280
            [res(c3, c3), attend(c3, heads3)],                          # 16 x 16 x 1280
            [Downsample(c3)],                                           #  8 x  8 x 1280
            [res(c3, c4)],                                              #  8 x  8 x 1280
            [res(c4, c4)],                                              #  8 x  8 x 1280
        ]
        self.middle = [res(c4, c4), attend(c4, heads4), res(c4, c4)]    #  8 x  8 x 1280
        self.up = [                 # in: c from below + c of a skip, last one first; 3 rows a level
            [res(c4 + c4, c4)],                                         #  8 x  8 x 1280
            [res(c4 + c4, c4)],                                         #  8 x  8 x 1280
            [res(c4 + c3, c4), Upsample(c4)],                           # 16 x 16 x 1280
            [res(c4 + c3, c3), attend(c3, heads3)],                     # 16 x 16 x 1280
            [res(c3 + c3, c3), attend(c3, heads3)],                     # 16 x 16 x 1280
            [res(c3 + c2, c3), attend(c3, heads3), Upsample(c3)],       # 32 x 32 x 1280
            [res(c3 + c2, c2), attend(c2, heads2)],                     # 32 x 32 x  640
            [res(c2 + c2, c2), attend(c2, heads2)],                     # 32 x 32 x  640
            [res(c2 + c1, c2), attend(c2, heads2), Upsample(c2)],       # 64 x 64 x  640
            [res(c2 + c1, c1), attend(c1, heads1)],                     # 64 x 64 x  320
            [res(c1 + c1, c1), attend(c1, heads1)],                     # 64 x 64 x  320
            [res(c1 + c1, c1), attend(c1, heads1)],                     # 64 x 64 x  320
        ]
        # fmt: on
        self.norm_out = NormSilu(c1, groups, epsilon=1e-5)
        self.conv_out = Conv(c1, 4)

    def __call__(self, x, t, context, corrections=()):
        x, skips, time = go_down(self, x, t, context)
        if corrections:
            *for_skips, for_middle = corrections
            skips, x = [a + b for a, b in zip(skips, for_skips)], x + for_middle
        for row in self.up:
            skip = once_per_sentence(skips.pop(), context)  # the very first has seen no sentence
            x = mx.concatenate([x, skip], axis=-1)
            x = run_row(row, x, time, context, (skips or [x])[-1].shape[1:3])
        return self.conv_out(self.norm_out(x))


def go_down(network, x, t, context, hint=0):
    """The way down and the middle, of a UNet or a ControlNet (section 13), which adds a hint to x
    after the first row. -> x, 12 skip connections, the time (1, 4 c1) as the ResBlocks want it."""
    silu = ACTIVATIONS["silu"]
    time = network.time1(time_features(t, network.c1).astype(x.dtype)[None])
    time = silu(network.time2(silu(time)))
    x = run_row(network.down[0], x, time, context) + hint
    skips = [x]
    for row in network.down[1:]:
        x = run_row(row, x, time, context)
        skips.append(x)
    return run_row(network.middle, x, time, context), skips, time


def run_row(row, x, time, context, size=None):
    told = {"ResBlock": [time], "TransformerBlock": [context], "Upsample": [size]}
    for layer in row:
        x = layer(x, *told.get(type(layer).__name__, []))  # faster layers have the same names
    return x


# %% 6. VAE ----------------------------------------------------------------------------------------
# An autoencoder: between the picture and its latents, 1/8 as high and wide, 4 numbers per position.
#
#   encode   picture (b, 512, 512, 3) in [-1, 1]  ->  latents (b, 64, 64, 4)
#   decode   latents (b, 64, 64, 4)               ->  picture (b, 512, 512, 3), about [-1, 1]
#
# This is what "latent diffusion" [1] means: the UNet works on 48 times fewer numbers. Text to
# image uses the decoder alone; the encoder is for starting from a picture.
#
# It was trained first, by itself, to give pictures back, and judged by two more networks: one that
# compares as people do, one that was learning to tell its pictures from real ones. So it is sharp,
# and invents texture where 48 to 1 has lost it. And it is a variational autoencoder: the encoder
# answers with a mean and a variance for each latent, the decoder was shown numbers drawn from
# there, and a weak penalty (KL, weight 1e-6) drew them to a standard normal distribution. Otherwise
# latents might lie anywhere, and what the UNet gets slightly wrong would decode to nonsense.
#
# Outside these networks the latents are multiplied by a scale, 0.18215: 1 over the standard
# deviation they had in the first batch of training (models/diffusion/ddpm.py:480). Section 1 wants
# x0 to have variance 1: with the standard deviation of 5.5 that they come with, 12 % of x's
# variance would still be picture at t = 999, instead of half a percent. (The original's networks:
# modules/diffusionmodules/model.py:368, 462)


# Self-attention over all positions, with one head. (modules/diffusionmodules/model.py:150)
class AttentionBlock(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.norm = GroupNorm(c, groups, epsilon=1e-6)
        self.attention = Attention(c, heads=1, bias=True)

    def __call__(self, x):
        b, h, w, c = x.shape
        return x + self.attention(self.norm(x).reshape(b, h * w, c)).reshape(b, h, w, c)


class VAE(nn.Module):
    """widths: the channels of the four levels, from the picture's down. There are no skip
    connections: only the latents get through. (models/autoencoder.py:285)"""

    def __init__(self, widths, groups):
        super().__init__()
        c1, c2, c3, c4 = widths
        res = functools.partial(ResBlock, groups=groups, epsilon=1e-6)
        # fmt: off
        self.encoder = [                                            # after this row
            Conv(3, c1),                                            # 512 x 512 x 128
            res(c1, c1), res(c1, c1), Downsample(c1, 0),            # 256 x 256 x 128
            res(c1, c2), res(c2, c2), Downsample(c2, 0),            # 128 x 128 x 256
            res(c2, c3), res(c3, c3), Downsample(c3, 0),            #  64 x  64 x 512
            res(c3, c4), res(c4, c4),                               #  64 x  64 x 512
            res(c4, c4), AttentionBlock(c4, groups), res(c4, c4),   #  64 x  64 x 512
        ]
        self.encoder_norm = NormSilu(c4, groups, epsilon=1e-6)
        self.encoder_out = Conv(c4, 8)
        self.quant = Linear(8, 8)                                   #  64 x  64 x   8

        self.post_quant = Linear(4, 4)
        self.decoder = [
            Conv(4, c4),                                            #  64 x  64 x 512
            res(c4, c4), AttentionBlock(c4, groups), res(c4, c4),   #  64 x  64 x 512
            res(c4, c4), res(c4, c4), res(c4, c4), Upsample(c4),    # 128 x 128 x 512
            res(c4, c3), res(c3, c3), res(c3, c3), Upsample(c3),    # 256 x 256 x 512
            res(c3, c2), res(c2, c2), res(c2, c2), Upsample(c2),    # 512 x 512 x 256
            res(c2, c1), res(c1, c1), res(c1, c1),                  # 512 x 512 x 128
        ]
        self.decoder_norm = NormSilu(c1, groups, epsilon=1e-6)
        self.decoder_out = Conv(c1, 3)
        # fmt: on

    def encode(self, x):
        """Picture (b, 8h, 8w, 3) in [-1, 1] -> mean, log variance of its latents (b, h, w, 4)."""
        for layer in self.encoder:
            x = layer(x)
        x = self.quant(self.encoder_out(self.encoder_norm(x)))
        mean, log_variance = mx.split(x, 2, axis=-1)
        return mean, mx.clip(log_variance, -30, 20)  # its exp() is neither 0 nor infinite

    def decode(self, x):
        """Latents (b, h, w, 4) -> picture (b, 8h, 8w, 3), mostly in [-1, 1]."""
        x = self.post_quant(x)
        for layer in self.decoder:
            x = layer(x)
        return self.decoder_out(self.decoder_norm(x))


# %% 7. DDIM and PLMS ------------------------------------------------------------------------------
# Section 1 said: take a little of the noise away, ask again. This is what a step is.
#
# DDIM [3] takes the UNet at its word: solve the forward process for x0, then add the same eps back,
# but only as much as belongs to the next, smaller t. In numbers, for a single latent: x = 1.00 at
# t = 501, where sqrt(abar) = 0.524 and sqrt(1 - abar) = 0.851, and the UNet says eps = 0.40. So x0
# = (1.00 - 0.851 * 0.40) / 0.524 = 1.26; at t = 481, where these are 0.550 and 0.835, x = 0.550 *
# 1.26 + 0.835 * 0.40 = 1.03, a small step towards 1.26. New noise instead of the same would give
# the right mixture for that t as well. But x0 is a blur; what was decided so far is in eps.
#
# Why it works is easier to see after division by sqrt(abar). Let y = x / sqrt(abar) = x0 + sigma
# eps, with sigma = sqrt((1 - abar) / abar), the ratio of noise to signal. Then a DDIM step is
#
#     y_next = x0 + sigma_next eps = y + (sigma_next - sigma) eps
#
# which is Euler's method for the differential equation dy/dsigma = eps(y, sigma): follow the slope
# to the next point. By section 1 eps points away from where pictures are, so on the way down each
# noise is led to one of them, along a curve; the straighter it is, the fewer steps will do: 50, of
# 20 timesteps each, instead of 1000. The samplers here and in section 11 are better and worse
# ways to follow it. (Ancestral ones are something else: they add new noise on the way.)
#
# A sampler is a generator that yields x once for each timestep, so that whoever runs it can show
# progress, keep what is there or stop. denoise(x, t) -> (x0, eps) is the UNet with the prompt built
# in (section 8); draw() gives new noise.


def sample_ddim(denoise, x, timesteps, schedule, draw=None):
    """One UNet call a step [3]. As in the original (models/diffusion/ddim.py:166) the last goes to
    t = 0, the least noise of training: abar is 0.99915, a standard deviation of 0.03 is left in."""
    for t, t_next in itertools.pairwise([*timesteps, 0]):
        x0, eps = denoise(x, t)
        x = schedule.add_noise(x0, eps, t_next)
        yield x


# A DDIM step assumes that eps is constant from t to t_next, but it changes as t falls. PLMS [4]
# looks back at the last three answers and lays a curve through them:
#
#     slope = w0 eps(now) + w1 eps(one step ago) + w2 eps(two ago) + w3 eps(three ago)
#
# then takes a DDIM step with slope instead of eps. The old answers cost nothing. With one of them
# the curve is a straight line, and in the middle of the coming step it is at eps + (eps - old) / 2
# = 3/2 eps - 1/2 old: the second row below. In general a row is the mean, over the coming step, of
# the polynomial through the known answers (Adams and Bashforth, 1883), so it sums to 1. All steps
# count as equally long, even the last, from 1 to 0.
ADAMS_BASHFORTH = (
    (1,),  # row i: with i old answers. Row 0: a run of one step (the original asks twice there)
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def sample_plms(denoise, x, timesteps, schedule, draw=None):
    """One UNet call a step, two in the first: 51 for 50 steps. (models/diffusion/plms.py:173)

    The first step has no old answers: it looks one step ahead and averages the answers here and
    there, as Heun did (1900). The first of the two becomes history. (Crowson's way; [4] differs.)
    """
    old = []  # newest first, at most three
    for t, t_next in itertools.pairwise([*timesteps, 0]):
        x0, eps = denoise(x, t)
        if not old and t_next > 0:
            _, ahead = denoise(schedule.add_noise(x0, eps, t_next), t_next)
            slope = (eps + ahead) / 2
        else:
            slope = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(old)], [eps, *old]))
        x = schedule.add_noise(schedule.remove_noise(x, slope, t), slope, t_next)
        old = [eps, *old][:3]
        yield x


Sampler = namedtuple("Sampler", "walk spacing", defaults=["leading"])  # the latter: of SPACINGS
SAMPLERS = {"plms": Sampler(sample_plms), "ddim": Sampler(sample_ddim)}


# %% 8. Text to image ------------------------------------------------------------------------------


class Condition(NamedTuple):  # all that the UNet is told besides x and t
    context: mx.array  # (b, 77, width); with guidance (2b, 77, width), without and with the prompt
    extra: mx.array | None = None  # (b, h, w, 5): what inpainting models see besides (section 10)


class TextToImage:
    # A task: what a run begins with and what is known besides the prompt; here nothing is. Those of
    # section 10 override some of it. generate_latents calls these in order, to_pictures the last.
    channels = 4  # that the UNet must take

    def size(self, config, width, height):  # -> what was asked for, or where that is None the usual
        return (config.size if n is None else n for n in (width, height))

    def timesteps(self, timesteps):  # -> those that are walked
        return timesteps

    def begin(self, sd, t, draw):  # -> x at the first timestep t; x0, if known; Condition.extra
        # Pure noise passes for x. It nearly is: at t = 981 sqrt(abar) is 0.08, but even from that
        # the UNet has learned to read the mean colour. From pure noise it reads grey, and so paints
        # no really dark or bright pictures [13].
        return draw(), None, None

    def constrain(self, denoise, schedule, x0):  # -> a denoise that answers with what is known
        return denoise

    def settle(self, x, x0):  # -> the last x, with what is known in its place
        return x

    def finish(self, pictures):  # -> the PIL pictures, with what is known pasted in
        return pictures


class StableDiffusion:
    """A model: tokenizer, text_encoder, unet and vae, and what they do together.

        sd = StableDiffusion("model.safetensors", dtype="float16")
        pictures = sd.txt2img("a red house", seed=42)

    path: a flat file (default: the miniature). dtype: of DTYPES, for the text model and the UNet;
    default float16 on a GPU, float32 on a CPU; the VAE's numbers may outgrow float16, it has
    float32. changes: section 12's; only a DoRA's place among them matters. fast: see section 9.
    reader: (sd, sentences) -> context, to read prompts otherwise. SDError: what a user can fix."""

    def __init__(self, path=TINY, dtype=None, changes=(), *, fast=True, reader=None):
        config, weights = read_flat(path)
        for change in changes:
            config, weights = change(config, weights)
        dtype, tokenizer = choose_dtype(dtype), read_tokenizer(config, weights)
        networks = [load_network(n, config, weights, dtype, fast) for n in build_networks(config)]
        self.set_up(config, tokenizer, *networks, dtype, reader, path)

    @classmethod
    def from_networks(cls, config, tokenizer, text_encoder, unet, vae, dtype=None, reader=None):
        """A model of networks in hand. config: a Config (section 9); dtype: that of the weights."""
        sd = cls.__new__(cls)
        sd.set_up(config, tokenizer, text_encoder, unet, vae, choose_dtype(dtype), reader, "it")
        return sd

    def set_up(self, config, tokenizer, text_encoder, unet, vae, dtype, reader, path):
        self.config, self.tokenizer, self.path = config, tokenizer, path
        self.text_encoder, self.unet, self.vae = text_encoder, unet, vae
        self.dtype, self.reader = dtype, reader
        self.schedule = Schedule(scaled_linear(), config.zero_snr)
        self.gpu, self.compiled = on_gpu(), (None, None)  # a UNet, and what it was compiled to
        self.controls = ()  # (ControlNet, hint, weight) each, see section 13

    @contextlib.contextmanager
    def network(self, name):
        yield getattr(self, name)  # sd_more/low_memory.py overrides this, to load and to forget

    def encode_prompts(self, sentences):
        """-> context (number of sentences, 77, width), or what the reader makes of them."""
        if self.reader is not None:
            return self.reader(self, sentences)
        for unread in filter(None, map(self.tokenizer.unread, sentences)):
            say_once(f'the prompt is longer than CLIP\'s 75 tokens. Not read: "{unread[:200]}"')
        with self.network("text_encoder") as text_encoder:
            return text_encoder(mx.array([self.tokenizer.encode(s) for s in sentences]))

    def predict(self, x, t, condition):
        """x (b, h, w, 4) -> the UNet's answer (b or 2b, h, w, 4). The only call of the UNet."""
        t = mx.array(t, mx.float32)  # a plain number would mean to compile anew for each t
        corrections = correct(self.controls, x, t, condition.context)
        if condition.extra is not None:
            x = mx.concatenate([x, condition.extra.astype(x.dtype)], axis=-1)
        with self.network("unet") as unet:
            if self.gpu:  # there one call's many small operations are joined into larger ones
                if self.compiled[0] is not unet:
                    self.compiled = unet, mx.compile(unet)
                unet = self.compiled[1]
            return unet(x, t, condition.context, corrections)

    def denoiser(self, condition, cfg, rescale=0):
        """-> denoise(x, t) -> (x0, eps): the UNet, with the prompt built in.

        Classifier-free guidance [6]: ask without the prompt, which is "" (in training it stood in a
        caption's place now and then), and with it, and go from the first answer to the second and
        beyond: eps = eps_uncond + cfg (eps_text - eps_uncond). Why beyond? A prompt names little of
        what is in a picture, so it changes the answer little. What it changes is, by Bayes' rule
        and up to a factor, the gradient of log p(prompt | x): the way to where the prompt fits
        better. cfg says how many times as far to go. 1 is the second answer itself, and the first
        is not asked for; 3 is loose, 7.5 usual, at 15 colours may burn out. It costs variety, and
        twice the time. ([6]'s w is cfg - 1.)
        """

        def denoise(x, t):
            answer = self.predict(x.astype(self.dtype), t, condition).astype(mx.float32)
            if len(answer) > len(x):
                uncond, text = mx.split(answer, 2)
                answer = uncond + cfg * (text - uncond)  # linear: the same for v as for eps
                if rescale:  # towards the answer's own standard deviation [13, eq. 15, 16]
                    spread = lambda y: y.std((1, 2, 3), keepdims=True)
                    answer = answer * (1 - rescale + rescale * spread(text) / spread(answer))
            return self.schedule.x0_and_eps(answer, x, t, self.config.prediction)

        return denoise

    def generate_latents(
        self, prompt, *, negative_prompt="", seed=42, steps=None, cfg=None, sampler=None,
        width=None, height=None, n_images=1, rng=None, task=None, latents=None, context=None,
        spacing=None, rescale=None,
    ):  # fmt: skip
        """-> an iterator over the latents x (n_images, h, w, 4) after every step; the last ones
        make the pictures: to_pictures(x, task). Options are checked now, not at the first x.

        Picture i starts from the noise of seed + i, so that each can be made again alone. steps;
        sampler, of SAMPLERS; spacing, of SPACINGS; cfg; rescale, how much of what guidance adds to
        the standard deviation to take away: default the model's own. negative_prompt: what to go
        away from, in the place of ""; not asked for at cfg 1. width, height: in pixels, multiples
        of 8; default what the model was trained on, or the task's. rng: a function of a seed that
        returns draw(shape), default section 9's torch_normal. latents: x to begin with. context:
        (2, 77, width), without and with the prompt, at cfg 1 (1, 77, width); instead of prompts."""
        own = lambda name, value: vars(self.config)[name] if value is None else value
        task, cfg, steps = task or TextToImage(), own("cfg", cfg), own("steps", steps)
        sampler, rescale = own("sampler", sampler), own("rescale", rescale)
        width, height = task.size(self.config, width, height)
        check_options(prompt, negative_prompt, seed, steps, cfg, sampler, width, height, n_images)
        if self.config.unet.get("channels", 4) != task.channels:
            raise SDError(f"{self.path} paints into pictures only: give it a picture and a mask.")
        b, h, w = n_images, height // 8, width // 8
        sentences = [prompt] if cfg == 1 else [negative_prompt, prompt]
        if cfg == 0 or negative_prompt and cfg == 1:
            say_once(f"at cfg {cfg:g} the {'negative ' * bool(cfg)}prompt is not used.")
        expect(np.shape(latents) in ((), (b, h, w, 4)), "latents", np.shape(latents), (b, h, w, 4))
        if context is not None:
            expect(len(context) == len(sentences), "context", context.shape, "one row a sentence")
        walk, usual = SAMPLERS[sampler]
        timesteps = task.timesteps(self.schedule.timesteps(own("spacing", spacing) or usual, steps))
        good = self.schedule.abar(timesteps[0]) > 0 or sampler not in ("plms", "lms")
        expect(good, "sampler", sampler, "ddim, euler or dpm++, for this model starts from no x0")
        each = [(rng or torch_normal)(seed + i) for i in range(b)]

        def draw():  # noise (b, h, w, 4), in the order (b, 4, h, w), which is PyTorch's
            noise = np.concatenate([normal((1, 4, h, w)) for normal in each])
            return mx.array(noise.transpose(0, 2, 3, 1))

        def run():
            told = self.encode_prompts(sentences) if context is None else mx.array(context)
            start, x0, extra = task.begin(self, timesteps[0], draw)
            start = start if latents is None else mx.array(latents)
            # All pictures without the prompt, then all with it.
            condition = Condition(mx.repeat(told, b, axis=0), extra)
            denoise = task.constrain(self.denoiser(condition, cfg, rescale), self.schedule, x0)
            for i, x in enumerate(walk(denoise, start, timesteps, self.schedule, draw), 1):
                x = task.settle(x, x0) if i == len(timesteps) else x
                mx.eval(x)  # MLX only notes what is to be computed, until it is told to do it
                yield x

        return run()

    def paint(self, prompt, task, **options):
        """-> list of PIL pictures. options: those of generate_latents, here and below."""
        *_, x = self.generate_latents(prompt, task=task, **options)
        return self.to_pictures(x, task)

    def txt2img(self, prompt, **options):
        return self.paint(prompt, TextToImage(), **options)

    def img2img(self, prompt, image, strength=0.75, width=None, height=None, **options):
        """image: see load_picture; holes in it get the colours around; strength: see section 10."""
        picture, _ = picture_and_mask(image, None, width, height, self.config.size)
        return self.paint(prompt, ImageToImage(picture, strength), **options)

    def inpaint(self, prompt, image, mask=None, strength=1.0, width=None, height=None, **options):
        """image, mask: see picture_and_mask."""
        picture, mask = picture_and_mask(image, mask, width, height, self.config.size)
        return self.paint(prompt, inpainting(self.config, picture, mask, strength), **options)

    def controlled(self, *controls):
        """(ControlNet, picture (8h, 8w, 3) in [0, 1], weight) each -> a StableDiffusion that has
        the same networks, and follows these pictures, too (section 13)."""
        other = object.__new__(type(self))
        vars(other).update(vars(self), controls=(*self.controls, *read_controls(self, controls)))
        return other

    def decode(self, x):
        """Latents (b, h, w, 4) -> pictures (b, 8h, 8w, 3) in [0, 1]."""
        with self.network("vae") as vae:
            y = vae.decode(x.astype(mx.float32) / self.config.vae["scale"])
        return mx.clip(y / 2 + 0.5, 0, 1)

    def encode(self, pictures, noise=0):
        """Pictures (b, 8h, 8w, 3) in [0, 1] -> latents (b, h, w, 4): the means, if noise is 0."""
        with self.network("vae") as vae:
            mean, log_variance = vae.encode(mx.array(pictures).astype(mx.float32) * 2 - 1)
        return (mean + mx.exp(log_variance / 2) * noise) * self.config.vae["scale"]

    def to_pictures(self, x, task=None, batch=1):
        """Latents (b, h, w, 4) -> list of PIL pictures, for the task x was painted for, batch at a
        time. Rounded to 8 bits, as in diffusers; the original cuts off."""
        parts = [np.array(self.decode(part)) for part in mx.split(x, range(batch, len(x), batch))]
        pixels = np.concatenate(parts)
        if not np.isfinite(pixels).all():
            raise SDError("the picture has pixels that are not a number (NaN). Try dtype float32.")
        pictures = [Image.fromarray((p * 255 + 0.5).astype(np.uint8)) for p in pixels]
        return (task or TextToImage()).finish(pictures)


# How to extend it. A sampler: a generator such as sample_ddim, and a row in SAMPLERS. A task: a
# subclass of TextToImage, for paint(prompt, task). A change of the weights: a function, for
# StableDiffusion(changes=[...]), such as this one, which halves those of the UNet's last layer:
#
#     def doubtful(config, weights):
#         return config, weights | {LAST: weights[LAST] / 2}  # LAST = "unet.conv_out.weight"
#
# That is Stable Diffusion. The rest is optional: the noise to start from could be any library's
# normal random numbers, and the weights could come from anywhere.

# ==================================================================================== The ground

# %% 9. Flat files, PyTorch's noise ----------------------------------------------------------------
# A flat file is one safetensors file: every network's weights under the attribute paths of the
# classes above (unet.down.1.0.conv1.weight), the tokenizer's merges as bytes, and in its header a
# "config". Loading is four steps: read the file, and let section 12's changes change it; build the
# networks, still empty; put the weights in, after a check of every name and shape; exchange leaf
# layers for faster ones, and cast the rest.

FORMAT, FORMATS = "sd.py 1", ("sd.py 1", "sd.py 2")  # 2: with what the first version did not know
DTYPES = ("float32", "float16", "bfloat16")
PART = ".sd-part"  # how a file ends that is being written
RECONVERT = "Convert the checkpoint again, with convert_weights.py."


def say(text, stream=None, end="\n"):  # a line for whoever reads it, by default on stderr
    print(printable(text), end=end, file=stream or sys.stderr, flush=True)


@functools.cache
def say_once(message):  # what is not done, or is done differently from what one may expect
    say(f"sd.py: {message}")


def expect(good, name, value, rule):
    if not good:
        value = value if isinstance(value, (str, Path)) else reprlib.repr(value)
        raise SDError(f"{name} must be {rule}, got {str(value)[:80]}.")


@dataclass
class Config:
    """A model's numbers, as they stand in its flat file; in comments those of 1.5."""

    kind: str  # model
    name: str  # Stable Diffusion 1.x
    size: int  # 512
    prediction: str  # eps
    cfg: float  # 7.5
    text: dict  # {"width": 768, "layers": 12, "heads": 12, "activation": "quick_gelu",
    #              "vocabulary": 49408, "pad": 49407}
    unet: dict  # {"widths": [320, 640, 1280, 1280], "heads": [8, 8, 8, 8], "groups": 32,
    #              "context_width": 768}, and for inpainting models "channels": 9
    vae: dict  # {"widths": [128, 256, 512, 512], "groups": 32, "scale": 0.18215}
    safety: dict | None = None  # the safety checker's numbers, where there is one
    steps: int = 50
    sampler: str = "plms"
    spacing: str | None = None  # the sampler's
    rescale: float = 0
    zero_snr: bool = False
    words: dict = field(default_factory=dict)  # words with ids of their own, as Tokenizer has them

    def check(self):
        """SDError for numbers that would fail later, or paint something wrong in silence."""
        text, unet, vae, safety = self.text, self.unet, self.vae, self.safety
        ids, n = {0, *(i for w in dict.values(self.words) for i in w)}, text["vocabulary"]
        known = all(self.words) and {*map(type, ids)} <= {int} and 0 <= min(ids) <= max(ids) < n
        scale, widths, together = vae["scale"], vae["widths"], "whole numbers that go together"
        for name, good, rule in (
            ("size", divides(64, self.size), "a multiple of 64"),
            ("prediction", self.prediction in ("eps", "v"), "eps or v"),
            ("cfg", type(self.cfg) in (int, float) and 0 <= self.cfg <= 100, "0 to 100"),
            ("unet", unet_is_whole(unet), together),
            ("text.width", text["width"] == unet["context_width"], "unet.context_width"),
            ("text", clip_is_whole(text, "vocabulary", "activation", "pad"), together),
            ("text.activation", text["activation"] in ("gelu", "quick_gelu"), "gelu or quick_gelu"),
            # MLX does not check the rows it takes from a table: beyond its end is other memory.
            ("text.vocabulary", divides(1, text["vocabulary"] - END), f"above {END}"),
            ("text.pad", type(text["pad"]) is int and 0 <= text["pad"] <= END, f"0 to {END}"),
            ("vae", len(widths) == 4 and divides(vae["groups"], *widths), together),
            ("vae.scale", type(scale) in (int, float) and 0 < scale < 1e6, "0 to a million"),
            ("spacing", self.spacing in (None, *SPACINGS), f"one of {', '.join(SPACINGS)}"),
            ("rescale", type(self.rescale) in (int, float) and 0 <= self.rescale <= 1, "0 to 1"),
            ("words", known, "words with ids of the vocabulary"),
            ("safety", safety is None or clip_is_whole(safety, "projection"), together),
        ):
            expect(good, name, functools.reduce(dict.get, name.split("."), vars(self)), rule)


def clip_is_whole(clip, *others):
    layers, projection = clip["layers"], clip.get("projection", 1)
    good = divides(clip["heads"], clip["width"]) and divides(1, layers, projection)
    return good and layers <= 100 and clip.keys() == {"heads", "width", "layers", *others}


def unet_is_whole(unet):  # or a ControlNet
    widths, heads, channels = unet["widths"], unet["heads"], unet.get("channels", 4)
    good = len(unet) - ("channels" in unet) == 4 and divides(1, channels) and channels in (4, 9)
    good = good and len(widths) == len(heads) == 4 and divides(1, unet["context_width"])
    # The first width is also that of time's sines and cosines, half of it each.
    good = good and divides(unet["groups"], *widths) and divides(2, widths[0])
    return good and all(map(divides, heads, widths))


def divides(n, *numbers):  # and are all whole numbers of a sensible size?
    whole = all(type(i) is int and 0 < i <= 1 << 13 for i in (n, *numbers))
    return whole and not any(number % n for number in numbers)


def read_header(path):  # -> {name: text}, a safetensors file's metadata; {} for any other file
    with contextlib.suppress(SafetensorError, OSError):
        if Path(path).is_file():  # a pipe would wait for ever
            with safe_open(path, framework="numpy") as file:
                return file.metadata() or {}
    return {}


def read_flat(path, kind="model"):
    """-> (config, {name: array, read when first used}) of a flat file; SDError, if it is wrong.
    kind: "model", with a Config; "lora", "words" (textual inversion), "controlnet": with a dict."""
    path, what = Path(path), kind.replace("words", "textual inversion")
    if not path.is_file():
        raise SDError(f"there is no {what} at {path}: give a flat file, see convert_weights.py.")
    expect(str(path).encode(errors="ignore").decode() == str(path), "its name", path.name, "UTF-8")
    # MLX trusts what the header says about sizes; safetensors checks it. So that goes first.
    metadata = read_header(path)
    if (found := metadata.get("format")) not in FORMATS:
        why = f"is damaged, or no flat file (not {FORMAT!r} but {found!r}). To make one:"
        raise SDError(f"{path} {why} python convert_weights.py {path}")
    try:
        weights, config = mx.load(str(path), format="safetensors"), json.loads(metadata["config"])
        weights = more.join(weights) if (more := find_more()) else weights  # those of --bits
        if config["kind"] != kind:
            raise SDError(f"it is a {config['kind']}, where a {what} is needed.")
        if kind == "model":
            config = Config(**config)
            config.check()
        elif kind == "controlnet":
            good = unet_is_whole(config["unet"]) and type(config["pool"]) is bool
            expect(good, "its config", config, "of a network that can be built")
        types = {w.dtype for name, w in weights.items() if name != "tokenizer.merges"}
        rule = f"one of {', '.join(DTYPES)}; packed ones need sd_more/"
        expect(types <= {choose_dtype(name) for name in DTYPES}, "its tensors' type", types, rule)
    except SDError as error:
        raise SDError(f"{path} is of no use here: {error} {RECONVERT}") from None
    except (ValueError, TypeError, LookupError, RecursionError, RuntimeError) as error:
        raise SDError(f"{path} is damaged ({str(error)[:150]!r}). {RECONVERT}") from None
    return config, weights


def choose_dtype(name=None):  # -> MLX's type; None: the device's best
    name = str(name or ("float16" if on_gpu() else "float32")).removeprefix("mlx.core.")
    expect(name in DTYPES, "dtype", name, f"one of {', '.join(DTYPES)}")
    return getattr(mx, name)


def build_networks(config):  # -> {name: network}, still empty: MLX is lazy, it costs nothing
    text = {name: n for name, n in config.text.items() if name != "pad"}
    vae = VAE(config.vae["widths"], config.vae["groups"])
    return {"text_encoder": TextEncoder(**text), "unet": UNet(**config.unet), "vae": vae}


def load_network(name, config, weights, dtype, fast=True):
    network = build_networks(config)[name]
    load_weights(network, weights, name)
    accelerate(network, mx.float32 if name == "vae" else dtype, fast)
    mx.eval(network.parameters())  # until here they were only known to be in the file
    return network


def load_weights(network, weights, prefix):
    """Put in the weights as they lie in the file: one tensor for each parameter, none left over."""
    start = prefix + "."
    given = {name[len(start) :]: w for name, w in weights.items() if name.startswith(start)}
    wanted = {name: p.shape for name, p in tree_flatten(network.parameters())}
    there = {name: w.shape for name, w in given.items()}
    if wrong := sorted(n for n in wanted.keys() | there.keys() if wanted.get(n) != there.get(n)):
        first = f"{wrong[0]} is {there.get(wrong[0], 'missing')}, expected {wanted.get(wrong[0])}"
        raise SDError(f"{len(wrong)} tensors of the {prefix} do not fit: {first}. {RECONVERT}")
    network.update(tree_unflatten(list(given.items())), strict=False)


def accelerate(network, dtype, fast=True):
    """Exchange leaf layers for faster ones of the same meaning, where sd_more/ is there; cast. On a
    CPU these work on all cores and widen 16-bit weights block by block, on a GPU attention's do."""
    if not (faster := find_more()):
        say_once("sd_more/ is not there: slower, no brackets in prompts, no safety checker.")
        network.apply(lambda weight: weight.astype(dtype))
        return
    layers = Linear, GEGLU, Conv, GroupNorm, NormSilu, LayerNorm, Upsample, Activation
    table = {layer: getattr(faster.cpu, layer.__name__) for layer in (*layers, AttentionCore)}
    table = {AttentionCore: faster.gpu.AttentionCore} if on_gpu() else table
    faster.accelerate(network, table if fast else {}, dtype)


def find_more():  # -> sd_more.fast; None where this file is alone
    if importlib.util.find_spec("sd_more"):
        from sd_more import fast

        return fast


def read_tokenizer(config, weights):
    merges = weights.get("tokenizer.merges", mx.zeros(0))
    good = merges.dtype == mx.uint8 and merges.size < 1 << 20  # CLIP's are half of that
    text = bytes(np.array(merges)) if good else b""
    expect(text.count(b"\n") == START - 512, "tokenizer.merges", "others", "CLIP's")
    return Tokenizer(text.decode(errors="replace"), config.text["pad"], config.words)


def write_complete(path, write, overwrite=True):
    """write(file) under another name, locked, then rename it: complete or not there at all. -> its
    path; without overwrite path-2 ..., if it is taken. A killed process leaves what is unlocked."""
    number, part = tempfile.mkstemp(PART, ".", path.parent)
    try:
        with open(part, "wb", opener=lambda *_: number) as file:  # for write, its name is file.name
            with contextlib.suppress(OSError):  # not every file system knows locks and rights
                fcntl.flock(file, fcntl.LOCK_EX)
                os.fchmod(number, 0o644)  # mkstemp's files are for their owner only
            write(file)
            file.flush()
            os.fsync(number)
            if overwrite:
                os.replace(part, path)
            return path if overwrite else link_free(part, path)
    finally:  # after Ctrl-C, too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def link_free(part, path):  # -> the name at which the file is now
    for i in itertools.count(1):
        name = path.with_stem(f"{path.stem}-{i}") if i > 1 else path
        try:
            os.link(part, name)
        except OSError:  # it is taken, or a USB stick's file system knows no second names
            if os.path.lexists(name):
                continue
            os.replace(part, name)
        return name


def torch_normal(seed):
    """-> draw(shape), for 16 numbers and more: what torch.randn gives on a CPU after
    torch.manual_seed(seed), to float32 rounding. Only the same numbers make the same picture.

    NumPy's old generator is PyTorch's: a Mersenne twister of 32-bit words. Their low 24 bits make
    uniform numbers in [0, 1). Of 16 at a time the first 8 are paired with the last 8, and each pair
    becomes two normal numbers (Box and Muller: a radius and an angle). If the size is no multiple
    of 16, the last 16 are drawn once more. (PyTorch's ATen/native/cpu/DistributionTemplates.h)"""
    twister = np.random.RandomState(seed % 2**32)

    def uniform(count):
        words = twister.randint(0, 2**32, count, dtype=np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def normal(u):  # (16 k,) -> same
        u = u.reshape(-1, 2, 8)
        radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), np.float32(2 * np.pi) * u[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

    def draw(shape):
        n = math.prod(shape)
        expect(n >= 16, "the size of PyTorch's noise", n, "at least 16")
        u, whole = uniform(n), n - n % 16
        out = np.concatenate([normal(u[:whole]), u[whole:]])
        if n % 16:
            out[-16:] = normal(uniform(16))
        return out.reshape(shape)

    return draw


def check_options(prompt, negative_prompt, seed, steps, cfg, sampler, width, height, n_images):
    integer, number = (int, np.integer), (int, float, np.number)
    for name, value, good, rule in (
        ("prompt", prompt, isinstance(prompt, str), "one text"),
        ("negative_prompt", negative_prompt, isinstance(negative_prompt, str), "one text"),
        ("seed", seed, isinstance(seed, integer), "a whole number"),
        ("steps", steps, isinstance(steps, integer) and 1 <= steps <= 999, "1 to 999"),
        ("n_images", n_images, isinstance(n_images, integer) and 1 <= n_images <= 999, "1 to 999"),
        ("cfg", cfg, isinstance(cfg, number) and math.isfinite(cfg), "a finite number"),
        ("sampler", sampler, sampler in [*SAMPLERS], f"one of {', '.join(SAMPLERS)}"),
    ):
        expect(good, name, value, rule)
    for name, n in (("width", width), ("height", height)):
        good = isinstance(n, integer) and n % 8 == 0 and n >= 64  # 8 pixels a latent
        expect(good, name, n, "a multiple of 8, and 64 at least")
    expect(width * height <= MOST_PIXELS, "the size", (width, height), "at most 4096 x 4096")


# ================================================================================= II. Variations

# %% 10. Image to image, inpainting ----------------------------------------------------------------
# Image to image: begin not with pure noise but with a picture to which noise was added only so far,
# and walk the rest of the way with a prompt. What is large in it stays, as so little noise cannot
# hide it; what is small is painted anew [8]. strength is how much of the way is walked: 0.3 touches
# up, 0.75 keeps the layout, 1 keeps next to nothing.
#
# Watch: the noise must be that of the first timestep that is run. (scripts/img2img.py:259 differs.)


class ImageToImage(TextToImage):
    """picture: (8h, 8w, 3) in [0, 1], sides multiples of 8; strength: above 0, at most 1."""

    def __init__(self, picture, strength=0.75):
        expect(0 < strength <= 1, "strength", strength, "more than 0 and at most 1")
        self.picture, self.strength = mx.array(picture)[None], strength

    def size(self, config, width, height):
        own = self.picture.shape[2], self.picture.shape[1]
        expect((width or own[0], height or own[1]) == own, "the size", (width, height), own)
        return own

    def timesteps(self, timesteps):  # the last ones, as many as strength says
        count, most = int(self.strength * len(timesteps)), f"{len(timesteps)} steps"
        expect(count, f"strength for {most}", self.strength, "enough for 1 step")
        return timesteps[-count:]

    def begin(self, sd, t, draw):
        # As in diffusers the latents are drawn from the encoder's mean and variance: the first
        # noise is for that, the second is what is added.
        x0 = sd.encode(self.picture, draw())
        return sd.schedule.add_noise(x0, draw(), t), x0, None


# Inpainting: paint anew only where a mask says so. Elsewhere the clean latents x0 are known, and
# with them the noise in x: eps = (x - sqrt(abar) x0) / sqrt(1 - abar). With that for an answer any
# sampler walks the known part along to x0, while the UNet sees it around the part that it paints.
# In the end the known pixels are pasted, with a soft edge, because the VAE changes them a little.


class Inpaint(ImageToImage):
    """mask: (8h, 8w), 1 where to paint."""

    def __init__(self, picture, mask, strength=1.0):
        super().__init__(picture, strength)
        if not mask.any():  # without a mask: the picture is nowhere transparent or pure green
            raise SDError("nothing is to be painted: no white in the mask, no hole in the picture.")
        # A position of the latents is painted if any of its 8 x 8 pixels is.
        small = mask.reshape(len(mask) // 8, 8, -1, 8).max((1, 3))
        self.mask, self.small = mask, mx.array(small)[None, :, :, None]

    def begin(self, sd, t, draw):
        x0, noise = sd.encode(self.picture, draw()), draw()
        x = sd.schedule.add_noise(x0, noise, t)
        # At strength 1 nothing is kept of what is to be replaced.
        return (mx.where(self.small > 0, noise, x) if self.strength == 1 else x), x0, None

    def constrain(self, denoise, schedule, x0):
        def known_or_asked(x, t):
            known = x0, (x - math.sqrt(schedule.abar(t)) * x0) / math.sqrt(1 - schedule.abar(t))
            return [mx.where(self.small > 0, a, k) for a, k in zip(denoise(x, t), known)]

        return known_or_asked

    def settle(self, x, x0):
        return mx.where(self.small > 0, x, x0)

    def finish(self, pictures):
        mask = self.mask[..., None]
        soft = np.maximum(mask, np.clip(2 * blur(mask, 4), 0, 1))  # 1 inside, 0 from 5 pixels on
        known = np.array(self.picture[0]) * 255
        mixed = [soft * np.asarray(picture) + (1 - soft) * known for picture in pictures]
        return [Image.fromarray((pixels + 0.5).astype(np.uint8)) for pixels in mixed]


# For models that were trained to inpaint (RunwayML's): their UNet sees nine channels, x, the mask,
# and the latents of the picture with a grey hole. Its answers need no correction.
class InpaintNine(Inpaint):
    channels = 9

    def begin(self, sd, t, draw):
        x = draw() if self.strength == 1 else ImageToImage.begin(self, sd, t, draw)[0]
        hole = mx.array(self.mask)[None, :, :, None]
        seen = sd.encode(mx.where(hole > 0.5, 0.5, self.picture), draw())  # (b, h, w, 4)
        # Trained with one pixel of each 8 x 8 for the mask, not with the largest.
        small = mx.repeat(hole[:, ::8, ::8], len(seen), axis=0)
        return x, None, mx.concatenate([small, seen], axis=-1)

    constrain, settle = TextToImage.constrain, TextToImage.settle


def inpainting(config, picture, mask, strength=1.0):
    """-> the task of inpainting for a model with this Config."""
    nine = config.unet.get("channels", 4) == 9
    return (InpaintNine if nine else Inpaint)(picture, mask, strength)


MOST_PIXELS = 1 << 24  # 4096 x 4096, of a picture to paint; one to be resized may have 3 times that
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def open_picture(file):
    """A path, an open file or a PIL picture -> a PIL picture, turned as its EXIF note says. Only of
    formats that people paint from: Pillow goes by what is in a file, and starts a program for some.
    """
    if isinstance(file, (str, Path)) and not Path(file).is_file():
        raise SDError(f"there is no file {file}. Is the name right?")
    try:
        with warnings.catch_warnings(action="ignore"):
            image = file if isinstance(file, Image.Image) else Image.open(file, formats=PICTURES)
            if math.prod(image.size) > 3 * MOST_PIXELS or max(image.size) > 1 << 16:
                raise OverflowError(f"{image.size} are too many pixels: at most 50 million can be")
            return ImageOps.exif_transpose(image)
    except Exception as error:  # noqa: BLE001  Pillow raises all kinds for damaged files
        raise SDError(f"{file} is not readable as a picture: {error}") from None


def load_picture(file, width=None, height=None, side=None, green_is_hole=False):
    """file, as for open_picture -> (RGB (h, w, 3), what is opaque (h, w)), float32 in [0, 1];
    resized to width and height, and cropped where they need it; by default see fit. green_is_hole:
    pure green counts as transparent, which is not for masks and poses, where green is a colour."""
    image = open_picture(file)
    if image.mode.startswith("I"):  # grey with 16 bits; Pillow would cut it off at 255
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    pixels = np.array(image.convert("RGBA"))
    if green_is_hole:  # before resizing mixes it with others
        pixels[(pixels[..., :3] == (0, 255, 0)).all(2), 3] = 0
    image = Image.fromarray(pixels)
    size = fit(image.size, width, height, side)
    name = Path(file).name if isinstance(file, (str, Path)) else "the picture"
    expect(math.prod(size) <= MOST_PIXELS, f"the size of {name}", size, "at most 4096 x 4096")
    if size != image.size:
        say("{}: resized {} x {} to {} x {}".format(name, *image.size, *size))
        image = ImageOps.fit(image, size, Image.LANCZOS)
    pixels = np.asarray(image, np.float32) / 255
    return pixels[..., :3], pixels[..., 3]


def fit(size, width, height, side):
    """-> (width, height): what is given; else in the proportions of size; if neither is, of side^2
    pixels, unless size has from half to twice as many."""
    w, h = size
    share = w * h / side**2 if side else 1
    scale = 1 if 0.5 <= share <= 2 else share**-0.5
    scale = width / w if width else height / h if height else scale
    return tuple(n or max(64, round(m * scale / 8) * 8) for n, m in zip((width, height), size))


def picture_and_mask(image, mask=None, width=None, height=None, side=None):
    """-> picture (8h, 8w, 3), mask (8h, 8w), 1 where to paint: where the mask is white, or opaque
    if some of it is clear. Without one where the picture is transparent or pure green, and there it
    gets the colours around."""
    picture, opaque = load_picture(image, width, height, side, green_is_hole=True)
    if mask is not None:
        white, there = load_picture(mask, *opaque.shape[::-1])
        return picture, np.float32((white.mean(2) if there.min() > 0.5 else there) > 0.5)
    hole = np.float32(opaque < 0.5)
    if not hole.any():
        return picture, hole
    known = (1 - hole)[..., None]
    mean = (picture * known).sum((0, 1)) / max(1, known.sum())  # far from the hole's edge
    around = (blur(picture * known, 16) + 1e-3 * mean) / (blur(known, 16) + 1e-3)
    return picture * known + around * hole[..., None], hole


def blur(x, radius):
    """(h, w, c) -> the average over the square of that radius around each pixel."""
    for axis in (0, 1):
        n, total = x.shape[axis], np.insert(np.cumsum(x, axis, dtype=np.float64), 0, 0, axis)
        last, first = np.minimum(np.arange(n) + radius + 1, n), np.maximum(np.arange(n) - radius, 0)
        count = (last - first).reshape(-1, *[1] * (2 - axis))
        x = (total.take(last, axis) - total.take(first, axis)) / count
    return np.float32(x)


# %% 11. More samplers -----------------------------------------------------------------------------
# All ask the same question, denoise(x, t), and differ in how they go on from the answer, in the
# coordinates of section 7 [9]: y = x / sqrt(abar) = x0 + sigma eps, where dy/dsigma is eps, and
# hypot(1, sigma) is 1 / sqrt(abar). As in k-diffusion, where they are from, their timesteps go in
# equal steps to 0 (sigma is 14.6 at 999, 1.6 at 500), then to sigma 0. More: sd_more/samplers.py.


def in_sigmas(walk):  # walk(ask, y, sigmas, draw), in these coordinates; ask(y, i) -> (x0, eps)
    def sample(denoise, x, timesteps, schedule, draw=None):
        sigmas = [*(min(schedule.sigma(t), 4096) for t in timesteps), 0.0]  # zero_snr's is infinite
        scales = [math.hypot(1, sigma) for sigma in sigmas]

        ask = lambda y, i: denoise(y / scales[i], timesteps[i])
        for i, y in enumerate(walk(ask, x * scales[0], sigmas, draw), 1):
            yield y / scales[i]

    return sample


@in_sigmas
def sample_euler(ask, y, sigmas, draw):
    """DDIM, but for its last step, which goes all the way to x0."""
    for i, then in enumerate(sigmas[1:]):
        x0, eps = ask(y, i)
        y = x0 + then * eps
        yield y


SAMPLERS["euler"] = Sampler(sample_euler, "linspace")


# %% 12. LoRA, clip skip ---------------------------------------------------------------------------
# What changes a model when it is loaded: functions from and to (config, {name: array}), for
# StableDiffusion(changes=[...]). A LoRA [12] adds a product of two thin matrices to a large one,
# W + strength up @ down, with up (o, r), down (r, c) and r from 4 to 128; alpha / r is in up. A
# convolution's down is (r, k, k, c), read as (r, k k c), or split: down (m, c), middle (r, 3, 3,
# m). Others hold the whole change, diff. DoRA gives the rows, or columns, of the sum the lengths m,
# its magnitude (2402.09353, eq. 5). Clip skip leaves out the text model's last layers.


def lora(path, strength=1.0):
    """path: a flat file. Changed weights are float32; float16 if they were packed. -> SDError"""

    def change(config, weights):
        parts = {n: part.astype(mx.float32) for n, part in read_flat(path, "lora")[1].items()}
        changed, kinds = {}, ("up", "down", "middle", "diff", "magnitude")
        try:
            for name in sorted({name.rpartition(".")[0] for name in parts}):
                up, down, middle, diff, m = (parts.get(f"{name}.{kind}") for kind in kinds)
                place = name if name in weights else f"{name}.weight"  # it may be a bias
                old, weight = weights[place], weights[place].astype(mx.float32)
                down = down if middle is None else middle @ down
                diff = up @ down.reshape(len(down), -1) if diff is None else diff
                if weight.shape[-1] == 9 and 9 * diff.size == 4 * weight.size:  # inpainting's conv
                    diff = mx.pad(diff.reshape(*weight.shape[:3], 4), [(0, 0)] * 3 + [(0, 5)])
                weight = weight + strength * diff.reshape(weight.shape)
                if m is not None:
                    axes = [axis for axis, n in enumerate(m.shape) if n == 1]
                    weight = weight * m / mx.sqrt((weight**2).sum(axes, keepdims=True) + 1e-24)
                changed[place] = weight if type(old) is mx.array else weight.astype(mx.float16)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise SDError(f"{path} is for another model or damaged: {name} does not fit.") from None
        return config, weights | changed

    return change


def clip_skip(count):
    """End the text model at its count-th layer from the end: 1 leaves out none."""

    def change(config, weights):
        layers = config.text["layers"]
        good = type(count) is int and 1 <= count <= layers
        expect(good, "clip_skip", count, f"1 (all layers) to {layers}")
        return replace(config, text=config.text | {"skip": count - 1}), weights

    return change


# %% 13. ControlNet --------------------------------------------------------------------------------
# A second network that sees a picture (1, 8h, 8w, 3), of edges, depth or a pose, beside x, t and
# context, and corrects the UNet [11]: a copy of its way down and middle, trained further, whose
# results pass through 1 x 1 layers and are added to the 12 skip connections and to x in the middle.
# Those layers began as zeros, so that at first nothing changed. Several can be added, each with a
# weight. (github.com/lllyasviel/ControlNet, cldm/cldm.py)


class ControlNetwork(nn.Module):
    def __init__(self, widths, heads, groups, context_width):
        super().__init__()
        c1, c2, c3, c4 = widths
        copied = UNet(widths, heads, groups, context_width)
        self.c1, self.time1, self.time2 = c1, copied.time1, copied.time2
        self.down, self.middle = copied.down, copied.middle
        sees, strides = (3, 16, 16, 32, 32, 96, 96, 256, c1), (1, 1, 2, 1, 2, 1, 2, 1)
        self.picture = [Conv(*cs, stride) for *cs, stride in zip(sees, sees[1:], strides)]
        self.zero = [Linear(c, c) for c in (c1, c1, c1, c1, c2, c2, c2, c3, c3, c3, c4, c4, c4)]

    def look(self, picture):  # (1, 8h, 8w, 3) -> a hint (1, h, w, c1), the same at all steps
        for layer in self.picture[:-1]:
            picture = ACTIVATIONS["silu"](layer(picture))
        return self.picture[-1](picture)

    def __call__(self, x, t, context, hint):
        x, skips, _ = go_down(self, x, t, context, hint.astype(x.dtype))
        return [zero(y) for zero, y in zip(self.zero, [*skips, x])]


class ControlNet:
    """path: a flat file; dtype: as StableDiffusion's. Raises SDError."""

    def __init__(self, path, dtype=None):
        config, weights = read_flat(path, "controlnet")
        self.path, self.unet, self.pool = path, config["unet"], config["pool"]
        self.network = ControlNetwork(**self.unet)
        load_weights(self.network, weights, "controlnet")
        accelerate(self.network, choose_dtype(dtype))


def read_controls(sd, controls):  # (ControlNet, picture, weight) each -> with hint for picture
    for net, _, _ in controls:
        if any(net.unet[name] != sd.config.unet[name] for name in ("widths", "context_width")):
            raise SDError(f"{net.path} is a ControlNet for another model than {sd.path}.")
    return [(net, net.network.look(mx.array(picture)[None]), w) for net, picture, w in controls]


def correct(controls, x, t, context):  # -> the sums of all corrections, 13 arrays, or ()
    each = []
    for net, hint, weight in controls:
        corrections = net.network(x, t, context, hint)
        if net.pool:  # some, such as shuffle's, correct all positions alike
            corrections = [y.mean((1, 2), keepdims=True) for y in corrections]
        each.append([weight * y for y in corrections])
    return tuple(sum(ys).astype(x.dtype) for ys in zip(*each))


# ================================================================================ III. Command line

# %% 14. Command line ------------------------------------------------------------------------------
# A dozen options. Where sd_more/ is there, sd_more/app.py runs in place of main, with many more.

OPTIONS = (  # name, type, default, what it means
    ("--prompt", str, "a red house on the grass at sunset", "what to paint"),
    ("--negative-prompt", str, "", "what to keep away from, where --cfg is not 1; default nothing"),
    ("--seed", int, 42, "which noise to start from"),
    ("--steps", int, None, "UNet calls, with PLMS one more; default the model's own, or 50"),
    ("--cfg", float, None, "how far to follow the prompt, 1 for no guidance; default the model's"),
    ("--sampler", str, None, "how to get there: SAMPLERS; default the model's own, or plms"),
    ("--width", int, None, "in pixels, a multiple of 8; default what the model was trained on"),
    ("--height", int, None, "likewise"),
    ("--n-images", int, 1, "how many; the second has seed + 1, and so on"),
    ("--model", Path, TINY, "a flat file, or with sd_more/ a checkpoint; default the miniature"),
    ("--dtype", str, None, "float32, float16 or bfloat16; the default is the device's best"),
    ("--output", Path, Path("out.png"), "a .png; if it exists, -2, -3 ... is added to its name"),
)  # fmt: skip


def make_parser(make=argparse.ArgumentParser):
    parser = make("sd.py", description="Paint a prompt with Stable Diffusion.")
    nouns = {str: "TEXT", int: "N", float: "S", Path: "FILE"}
    for name, kind, default, text in OPTIONS:
        text = text.replace("SAMPLERS", ", ".join(SAMPLERS))
        text = text if default in (None, "", TINY) else f"{text}; default {default}"
        parser.add_argument(name, type=kind, default=default, metavar=nouns[kind], help=text)
    return parser


def main(argv=None):
    args = vars(make_parser().parse_args(argv))
    model, dtype, output = (args.pop(name) for name in ("model", "dtype", "output"))
    try:
        expect(output.suffix == ".png", "--output", output, "NAME.png")
        sd = StableDiffusion(model, dtype)
        for i, x in enumerate(sd.generate_latents(**args), 1):
            say(f"step {i}")
        for picture in sd.to_pictures(x):
            save = functools.partial(picture.save, format="PNG")
            say(f"saved {write_complete(output, save, overwrite=False)}", sys.stdout)
    except (SDError, OSError) as error:
        say(f"sd.py: {error}")
        sys.exit(2)


if __name__ == "__main__" and Path(sys.argv[0]).resolve() == SOURCE:  # no notebook's cell
    if importlib.util.find_spec("sd_more"):
        from sd_more.app import main

    main()
