"""Stable Diffusion, from the sentence to the picture, in one file.

    python sd.py --prompt "a red house on the grass at sunset" --seed 42

What the networks know is in a file of weights: by default that of a miniature, which lies in tiny/
beside this file; with --model that of Stable Diffusion 1.x or 2.x. They are the same code with
other numbers; sizes below are those of 1.x for a picture of 512 x 512.

    "a red house ..."                          noise x (b, 64, 64, 4)
          |                                       |
          |  1 tokenizer                          v
          v                              +---> 4 UNet: what is the noise in x?  <---+
    77 token ids                         |        |                                 |
          |                              |        |  eps (b, 64, 64, 4)             |
          |  3 CLIP                      |        v                                 |
          v                              |     6 PLMS: take some of it away         | x, t
    context (b, 77, 768) ----------------+        |                                 |
                                                  +------ 50 times -----------------+
                                                  |
    picture (b, 512, 512, 3) <--- 5 VAE decoder <-+

Beside Python's own modules it imports MLX, NumPy, safetensors, regex and Pillow. Not here:
training, and other people's file formats. convert_weights.py reads those once and writes a flat
file, so that this file knows one set of names and one layout.

Letters, the same throughout part I (but a layer's own x, h and w are those of its input):
    b        pictures in the batch; inside the UNet twice that, without and with the prompt
    h, w     height and width of the latents, 1/8 of the picture's: 64, 64
    c, o     channels: the numbers at one place; those that come out of a layer
    n, m     vectors that look, vectors that are looked at, in attention: h*w places or 77 tokens
    q, k, v  what each of them asks, offers and gives there; d: the channels of one head of it
    t        the timestep: 999 is nearly all noise, 0 nearly none
    abar     "alpha bar", the share of the signal's variance left at t: 0.9991 at 0, 0.0047 at 999
    x        the latents at time t.  x0: the clean ones.  eps: the noise in x, of variance 1
    cfg      classifier-free guidance: how far to go from eps without the prompt to eps with it

How to read: part I, sections 1 to 7, is Stable Diffusion; stop there and you have seen all of it.
Part II's sections can be read in any order. Part III holds no diffusion.

I    1 Tokenizer   2 Layers   3 CLIP   4 UNet   5 VAE   6 Schedule, DDIM, PLMS   7 Text to image
II   8 From a picture   9 Inpainting   10 More samplers   11 LoRA, new words, fewer layers
     12 ControlNet   13 Prompts   14 Safety checker
III  15 Random numbers   16 The same, faster   17 Files, and less memory   18 Command line

[1] Rombach et al. 2022, arXiv 2112.10752 (latent diffusion)  [2] Ho et al. 2020, 2006.11239 (DDPM)
[3] Song et al. 2021, 2010.02502 (DDIM)                       [4] Liu et al. 2022, 2202.09778 (PLMS)
[5] Radford et al. 2021, 2103.00020 (CLIP)                    [6] Ho et al. 2022, 2207.12598 (cfg)
[7] Salimans, Ho 2022, 2202.00512 (v-prediction)              [8] Meng et al. 2021, 2108.01073
[9] Karras et al. 2022, 2206.00364                           [10] Lu et al. 2022, 2211.01095
[11] Luo et al. 2023, 2310.04378 (LCM)                       [12] Hu et al. 2021, 2106.09685 (LoRA)
[13] Zhang et al. 2023, 2302.05543 (ControlNet)              [14] Gal et al. 2022, 2208.01618
In brackets behind a class: where the original has it, in CompVis' stable-diffusion under ldm/.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "mlx; sys_platform == 'darwin'",
#     "mlx[cpu]; sys_platform == 'linux'",
#     "numpy",
#     "safetensors",
#     "regex",
#     "pillow",
# ]
# ///

import argparse
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import shlex
import sys
import tempfile
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx  # arrays, on a GPU where there is one
import numpy as np  # the noise, and the fast paths on a CPU
import regex  # like re, but knows which characters of the world are letters: \p{L}
from mlx import nn  # Module: a tree of arrays that knows their names; no layer of it is used
from mlx.utils import tree_flatten, tree_map
from PIL import Image, ImageOps, PngImagePlugin  # pictures as files
from safetensors import SafetensorError, safe_open  # checks a file's header before MLX reads it

# =================================================================================== I. The picture

# %% 1. Tokenizer ----------------------------------------------------------------------------------
# Cuts a sentence into pieces the text model has a vector for, and numbers them.
#
#   in   "a red house"           out   77 ids: [49406, 320, 736, 1212, 49407, 49407, ...]
#
# Common words are one piece, rare ones several. The pieces were found on a large text by starting
# from single bytes and gluing the most frequent neighbours together, 48,894 times; that list of
# merges is all the tokenizer knows. Three things to watch:
#
#   - It works on bytes, so nothing in any script can be unknown. Each byte is written as one
#     printable character to make the merges a readable text file.
#   - "</w>" marks the end of a word: "house</w>" is the word, "house" the start of "houseboat".
#   - The result is always 77 long, since CLIP (section 3) has exactly 77 places. Those behind the
#     end of the sentence are filled with one id, and the UNet looks at them too, so it must be the
#     id used in training: the end mark again in Stable Diffusion 1.x, 0 in 2.x.
#
# Source: clip/simple_tokenizer.py of OpenAI's CLIP [5], with the transformers library's cleaning.

# An id is a place in the vocabulary: 256 letters, the same 256 at a word's end, what each of the
# 48,894 merges makes, and last the two marks.
START, END = 49406, 49407
MARKS = {"<|startoftext|>": START, "<|endoftext|>": END}
ANY_MARK = "|".join(map(regex.escape, MARKS))
WORDS = regex.compile(ANY_MARK + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def byte_letters():
    """-> {byte: printable character}. 188 bytes stand for themselves, the others get a stand-in."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """CLIP's byte pair encoding. merges: text, one merge per line; pad: the id that fills up."""

    def __init__(self, merges, pad=END):
        self.pad = pad
        self.letters = byte_letters()
        merges = [tuple(line.split(" ")) for line in merges.splitlines()]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}  # found first, glued first
        letters = list(self.letters.values())
        ends = [letter + "</w>" for letter in letters]
        vocabulary = [*letters, *ends, *("".join(pair) for pair in merges)]
        self.ids = {piece: i for i, piece in enumerate(vocabulary)}
        self.bpe = functools.lru_cache(maxsize=10_000)(self.bpe)

    def bpe(self, word):
        """Glue letters together, the pair first that was found first, until no known pair is left.

        bpe("house")       ->  ("house</w>",)
        bpe("lighthouse")  ->  ("lighthouse</w>",)
        bpe("househunter") ->  ("house", "hunter</w>")
        """
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = itertools.pairwise(pieces)
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            glued, i = [], 0
            while i < len(pieces):
                here = tuple(pieces[i : i + 2]) == best
                glued.append(pieces[i] + pieces[i + 1] if here else pieces[i])
                i += 2 if here else 1
            pieces = glued
        return tuple(pieces)

    def words(self, text):
        """Text -> [(word, its pieces, their ids)], neither padded nor cut.

        words("Two cats")  ->  [("two", ("two</w>",), [1237]), ("cats", ("cats</w>",), [3989])]
        """
        found = []
        for part in regex.split(f"({ANY_MARK})", text):
            if part in MARKS:  # written out in a prompt, they are the marks
                found.append((part, (part,), [MARKS[part]]))
                continue
            # Lower case letter by letter: str.lower() would look at neighbours (Greek sigma).
            part = "".join(letter.lower() for letter in unicodedata.normalize("NFC", part))
            for word in WORDS.findall(part):
                # As in transformers: <|ENDOFTEXT|> looks like a mark only now, in lower case. It
                # was not written as one, so it is read as the three words it consists of.
                for w in (word[:2], word[2:-2], word[-2:]) if word in MARKS else (word,):
                    pieces = self.bpe("".join(self.letters[x] for x in w.encode(errors="replace")))
                    found.append((w, pieces, [self.ids[piece] for piece in pieces]))
        return found

    def encode(self, text):
        """Text -> list of 77 ids: START, at most 75 pieces, END, and the pad id to fill up."""
        ids = [i for _, _, ids in self.words(text) for i in ids][:75]
        return [START, *ids, END] + [self.pad] * (75 - len(ids))

    def unread(self, text):
        """The pieces beyond the 75th, which encode() drops, as text; "" if there are none."""
        pieces = [piece for _, pieces, _ in self.words(text) for piece in pieces][75:]
        back = {letter: byte for byte, letter in self.letters.items()} | {" ": ord(" ")}
        written = "".join(pieces).replace("</w>", " ")
        return bytes(back[letter] for letter in written).decode(errors="replace").strip()


# %% 2. Layers -------------------------------------------------------------------------------------
# What the three networks are made of: ten functions, and small classes that keep weights for
# them. The functions stand apart because section 16 swaps them for faster ones of the same name;
# what you read here is what they mean.
#
# Arrays are (b, n, c) for sequences and (b, h, w, c) for pictures: channels last, as MLX wants
# them. PyTorch has (b, c, h, w), and its convolution weights (out, in, kh, kw) are (out, kh, kw,
# in) here. With channels last a 1 x 1 convolution is a Linear, and is stored as one.
#
# Watch the epsilons, the small numbers that keep a norm from dividing by 0 (they have nothing to do
# with eps, the noise). GroupNorm has 1e-6 in the VAE and in front of each transformer, but 1e-5 in
# the UNet's residual blocks; LayerNorm has 1e-5.
#
# Everything is computed in the type that section 7 is given, which may be float16. Its 11 bits are
# too few for sums over thousands of numbers: means, variances and softmax are taken in float32.


def linear(x, weight, bias=None):  # (..., c), (o, c), (o,) -> (..., o)
    y = x @ weight.T
    return y if bias is None else y + bias


def conv2d(x, weight, bias, stride=1, padding=1):  # (b, h, w, c), (o, k, k, c) -> (b, h', w', o)
    """Slide a k x k window over the picture; each place becomes o weighted sums of what it sees."""
    return mx.conv2d(x, weight, stride, padding) + bias


def group_norm(x, weight, bias, groups, epsilon):  # (b, h, w, c) -> same
    """Give each group of c / groups channels mean 0 and variance 1, over all places.

    Then each channel gets the deviation (weight) and the mean (bias) it has learned to want.
    """
    b, h, w, c = x.shape
    y = x.astype(mx.float32).reshape(b, h * w, groups, c // groups)
    y = (y - y.mean((1, 3), keepdims=True)) * mx.rsqrt(y.var((1, 3), keepdims=True) + epsilon)
    return y.reshape(b, h, w, c).astype(x.dtype) * weight + bias


def layer_norm(x, weight, bias):  # (b, n, c) -> same
    """The same for each vector by itself."""
    y = x.astype(mx.float32)
    y = (y - y.mean(-1, keepdims=True)) * mx.rsqrt(y.var(-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * weight + bias


def attention(q, k, v, heads, causal=False):  # (b, n, c), (b, m, c), (b, m, c) -> (b, n, c)
    """Let each of n places look at m others and take from each as much as it finds fitting.

        softmax(Q K^T / sqrt(d)) V        for each head, on its own d of the c channels

    A place has a query q, what it looks for; each of the m has a key k, what it offers, and a value
    v, what it gives. The better q and k fit (their product), the more of v is taken.
    causal: place i may look at places 0 ... i only (m = n).
    """
    b, n, c = q.shape
    d = c // heads
    q, k, v = (
        y.reshape(b, -1, heads, d).transpose(0, 2, 1, 3) for y in (q, k, v)
    )  # (b, heads, n, d)
    # d products of unit variance add up to variance d. Without the division the softmax would see
    # numbers so far apart that one place wins and the others give nothing.
    scores = (q * d**-0.5) @ k.transpose(0, 1, 3, 2)  # (b, heads, n, m)
    if causal:
        later = mx.arange(n)[:, None] < mx.arange(n)
        scores = mx.where(later, -mx.inf, scores)  # exp(-inf) = 0: takes exactly nothing
    shares = mx.softmax(scores, axis=-1, precise=True)  # each row sums to 1; precise: float32
    return (shares @ v).transpose(0, 2, 1, 3).reshape(b, n, c)


def silu(x):
    return x * mx.sigmoid(x)


def norm_silu(x, weight, bias, groups, epsilon):
    """What stands in front of nearly every convolution."""
    return silu(group_norm(x, weight, bias, groups, epsilon))


def gelu(x):
    """x times the chance that a normal random number is smaller than x."""
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


def quick_gelu(x):
    """What the first CLIP was trained with instead of gelu; they differ by up to 0.02."""
    return x * mx.sigmoid(1.702 * x)


def geglu(x, weight, bias):  # (b, n, c), (2 o, c), (2 o,) -> (b, n, o)
    """One half of the results says what, the other how much of it. (modules/attention.py:37)"""
    what, how_much = mx.split(linear(x, weight, bias), 2, axis=-1)
    return what * gelu(how_much)


# An nn.Module is a dict of its arrays and sub-modules, so one can ask it whether it has a bias. The
# zeros and ones are place-holders of the right shape until section 7 loads the weights.


class Linear(nn.Module):
    def __init__(self, c_in, c_out, bias=True):
        super().__init__()
        self.weight = mx.zeros((c_out, c_in))
        if bias:
            self.bias = mx.zeros((c_out,))

    def __call__(self, x):
        return linear(x, self.weight, self.get("bias"))


class GEGLU(Linear):
    """A Linear to twice the channels that come out."""

    def __call__(self, x):
        return geglu(x, self.weight, self.bias)


class Conv(nn.Module):
    """3 x 3 convolution. With stride 1 and padding 1, h and w stay what they are."""

    def __init__(self, c_in, c_out, stride=1, padding=1):
        super().__init__()
        self.weight = mx.zeros((c_out, 3, 3, c_in))
        self.bias = mx.zeros((c_out,))
        self.stride, self.padding = stride, padding

    def __call__(self, x):
        return conv2d(x, self.weight, self.bias, self.stride, self.padding)


class GroupNorm(nn.Module):
    def __init__(self, c, groups, epsilon):
        super().__init__()
        self.weight, self.bias = mx.ones((c,)), mx.zeros((c,))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x):
        return group_norm(x, self.weight, self.bias, self.groups, self.epsilon)


class NormSilu(GroupNorm):
    def __call__(self, x):
        return norm_silu(x, self.weight, self.bias, self.groups, self.epsilon)


class LayerNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = mx.ones((c,)), mx.zeros((c,))

    def __call__(self, x):
        return layer_norm(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table of vectors: ids (b, n) -> (b, n, c)."""

    def __init__(self, rows, c):
        super().__init__()
        self.weight = mx.zeros((rows, c))

    def __call__(self, ids):
        return self.weight[ids]


class Attention(nn.Module):
    """Attention with its four matrices; all three networks use it. (modules/attention.py:152)

    attention(x) is self-attention: the places of x look at each other, m = n.
    attention(x, context) is cross-attention: those of x look at context, m = 77.
    bias: of q, k and v; CLIP and the VAE were trained with one, the UNet without.
    """

    def __init__(self, c, heads, context_width=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(c, c, bias)
        self.to_k = Linear(context_width or c, c, bias)
        self.to_v = Linear(context_width or c, c, bias)
        self.to_out = Linear(c, c)

    def __call__(self, x, context=None, causal=False):
        context = x if context is None else context
        y = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, causal)
        return self.to_out(y)


# %% 3. CLIP ---------------------------------------------------------------------------------------
# Turns the ids into one vector per token that says what the token means in this sentence.
#
#   in   ids (b, 77)           out   context (b, 77, 768)
#
# A transformer: look up a vector for each id and add one for its place; then, twelve times, let
# each token look at itself and those before it (attention) and work on what it found (a small
# network on each vector alone). Both only ever add to x, so what a layer leaves alone stays.
# It was trained together with a network for pictures, to give matching vectors to a picture and
# its caption [5]; so it has learned of words what can be seen of them.
#
# Watch: no token sees those behind it (causal). So the vector of "house" in "red house" knows
# about red, and the padding behind the sentence knows all of it; the UNet looks at both.
# Stable Diffusion 2.x has a larger CLIP and takes the vectors before its last layer. The
# converter drops that layer, so that nothing here has to know.


class TextLayer(nn.Module):
    def __init__(self, c, heads, activation, causal=True):
        super().__init__()
        self.activation, self.causal = activation, causal
        self.norm1 = LayerNorm(c)
        self.attention = Attention(c, heads, bias=True)
        self.norm2 = LayerNorm(c)
        self.fc1 = Linear(c, 4 * c)
        self.fc2 = Linear(4 * c, c)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), causal=self.causal)
        y = self.fc1(self.norm2(x))
        y = quick_gelu(y) if self.activation == "quick_gelu" else gelu(y)
        return x + self.fc2(y)


class TextEncoder(nn.Module):
    """CLIP's text model: ids (b, 77) -> context (b, 77, width)."""

    def __init__(self, width, layers, heads, activation, vocabulary):
        super().__init__()
        self.token_embedding = Embedding(vocabulary, width)
        self.position_embedding = Embedding(77, width)
        self.layers = [TextLayer(width, heads, activation) for _ in range(layers)]
        self.norm = LayerNorm(width)

    def __call__(self, ids):
        x = self.token_embedding(ids) + self.position_embedding.weight  # (b, 77, 768)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


# %% 4. UNet ---------------------------------------------------------------------------------------
# Given latents x, the time t at which they were spoiled and the sentence, it answers one question:
# what is the noise in x? (The noise at full size, variance 1; how much of it is in x, t tells.)
#
#   in   x (b, h, w, 4)    t    context (b, 77, 768)          out   eps (b, h, w, 4)
#
# It is a U: four floors down, each half as high and wide and with more channels, then four floors
# up, and on the way up every floor is handed what was there on the way down. Going down is how it
# sees the whole picture at once; what is handed over is how it still knows where the edges were.
#
# Two kinds of blocks alternate. Res works on the picture, by convolution, and is told the time.
# Attend lets the places look at each other and at the sentence. Nothing else sees the time or the
# sentence.
#
# Nearly all the time a picture takes is spent here: 51 calls, and one of everything else.


def time_features(t, c):
    """A number as a vector of c waves: t (b,) -> (b, c), the cosines, then the sines, of t times
    1 ... 1/10000.

    (1/10000 itself is not reached: the last is one place before it, as in the original.) Like the
    hands of a clock, the fast waves tell 17 from 18 and the slow ones 17 from 900.
    (modules/diffusionmodules/util.py:151)
    """
    speed = mx.exp(-math.log(10000) * mx.arange(c // 2) / (c // 2))
    angle = t[:, None] * speed
    return mx.concatenate([mx.cos(angle), mx.sin(angle)], axis=-1)


class Res(nn.Module):
    """Residual block: x plus what two convolutions make of it. (openaimodel.py:163)

    The time comes in as a number added to each channel. The VAE uses this block too, without time
    (time_width=None). shortcut: gives x the channels that the sum needs, where they differ.
    """

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
            y = y + self.time(silu(time))[:, None, None, :]
        y = self.conv2(self.norm2(y))
        return (self.shortcut(x) if "shortcut" in self else x) + y


class Attend(nn.Module):
    """Transformer block: look at each other, look at the sentence, work on it.

    The picture is read as a sequence of n = h * w places, each a vector of c channels.
    (modules/attention.py:196, 218)
    """

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
        y = y + self.attn2(self.norm2(y), context)
        y = y + self.ff_out(self.ff_in(self.norm3(y)))  # (b, n, c) -> (b, n, 4c) -> (b, n, c)
        return x + self.proj_out(y).reshape(b, h, w, c)


class Halve(nn.Module):
    """Half the height and width, by a convolution that takes every second step."""

    def __init__(self, c, padding=1):
        super().__init__()
        self.conv = Conv(c, c, stride=2, padding=padding)

    def __call__(self, x):
        return self.conv(x)


class Double(nn.Module):
    """Twice the height and width: every place becomes 2 x 2, then a convolution smooths them."""

    def __init__(self, c):
        super().__init__()
        self.conv = Conv(c, c)

    def __call__(self, x):
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))


class UNet(nn.Module):
    """x (b, h, w, 4), t a number, context (b, 77, context_width) -> eps (b, h, w, 4).

    widths: the channels of the four floors; heads: those of attention on each floor, of which the
    last has it only in the middle. h and w must be multiples of 8. The tables' rows are the
    original's input_blocks, middle_block and output_blocks. (openaimodel.py:413)
    """

    def __init__(self, widths, heads, groups, context_width, channels=4):
        super().__init__()
        c1, c2, c3, c4 = widths
        heads1, heads2, heads3, heads4 = heads
        self.c1, time_width = c1, 4 * c1

        def res(c_in, c_out):
            return Res(c_in, c_out, groups, 1e-5, time_width)

        def attend(c, heads):
            return Attend(c, heads, groups, context_width)

        self.time1 = Linear(c1, time_width)
        self.time2 = Linear(time_width, time_width)
        # fmt: off
        self.down = [                           # right: after the row, kept for the way up
            [Conv(channels, c1)],                                       # 64 x 64 x  320
            [res(c1, c1), attend(c1, heads1)],                          # 64 x 64 x  320
            [res(c1, c1), attend(c1, heads1)],                          # 64 x 64 x  320
            [Halve(c1)],                                                # 32 x 32 x  320
            [res(c1, c2), attend(c2, heads2)],                          # 32 x 32 x  640
            [res(c2, c2), attend(c2, heads2)],                          # 32 x 32 x  640
            [Halve(c2)],                                                # 16 x 16 x  640
            [res(c2, c3), attend(c3, heads3)],                          # 16 x 16 x 1280
            [res(c3, c3), attend(c3, heads3)],                          # 16 x 16 x 1280
            [Halve(c3)],                                                #  8 x  8 x 1280
            [res(c3, c4)],                                              #  8 x  8 x 1280
            [res(c4, c4)],                                              #  8 x  8 x 1280
        ]
        self.middle = [res(c4, c4), attend(c4, heads4), res(c4, c4)]    #  8 x  8 x 1280
        self.up = [                             # c from below + c kept; right: after the row
            [res(c4 + c4, c4)],                                         #  8 x  8 x 1280
            [res(c4 + c4, c4)],                                         #  8 x  8 x 1280
            [res(c4 + c3, c4), Double(c4)],                             # 16 x 16 x 1280
            [res(c4 + c3, c3), attend(c3, heads3)],                     # 16 x 16 x 1280
            [res(c3 + c3, c3), attend(c3, heads3)],                     # 16 x 16 x 1280
            [res(c3 + c2, c3), attend(c3, heads3), Double(c3)],         # 32 x 32 x 1280
            [res(c3 + c2, c2), attend(c2, heads2)],                     # 32 x 32 x  640
            [res(c2 + c2, c2), attend(c2, heads2)],                     # 32 x 32 x  640
            [res(c2 + c1, c2), attend(c2, heads2), Double(c2)],         # 64 x 64 x  640
            [res(c2 + c1, c1), attend(c1, heads1)],                     # 64 x 64 x  320
            [res(c1 + c1, c1), attend(c1, heads1)],                     # 64 x 64 x  320
            [res(c1 + c1, c1), attend(c1, heads1)],                     # 64 x 64 x  320
        ]
        # fmt: on
        self.norm_out = NormSilu(c1, groups, epsilon=1e-5)
        self.conv_out = Conv(c1, 4)

    def time_vector(self, x, t):
        """-> (b, 4 c1), from which each Res takes what it needs to know of t."""
        t = mx.full((len(x),), t, mx.float32)  # the same for the whole batch
        return self.time2(silu(self.time1(time_features(t, self.c1).astype(x.dtype))))

    def __call__(self, x, t, context, control=None):
        """control: corrections that section 12 adds to what the way up will see."""
        time, kept = self.time_vector(x, t), []
        for row in self.down:
            x = run_row(row, x, time, context)
            kept.append(x)
        x = run_row(self.middle, x, time, context)
        if control:
            kept, x = [a + b for a, b in zip(kept, control)], x + control[-1]
        for row in self.up:
            x = run_row(row, mx.concatenate([x, kept.pop()], axis=-1), time, context)
        return self.conv_out(self.norm_out(x))


def run_row(row, x, time, context):
    for layer in row:
        if isinstance(layer, Res):
            x = layer(x, time)
        elif isinstance(layer, Attend):
            x = layer(x, context)
        else:
            x = layer(x)
    return x


# %% 5. VAE ----------------------------------------------------------------------------------------
# An autoencoder: between the picture and the latents, 1/8 as high and wide, 4 numbers a place.
#
#   encode   picture (b, 512, 512, 3) in [-1, 1]  ->  latents (b, 64, 64, 4)
#   decode   latents (b, 64, 64, 4)               ->  picture (b, 512, 512, 3), about [-1, 1]
#
# This is what "latent diffusion" [1] means: the UNet works on 48 times fewer numbers. Text to
# image uses the decoder alone; the encoder is for starting from a picture.
#
# It is a variational autoencoder: the encoder answers with a mean and a variance for each number,
# since in training the decoder was shown numbers drawn at random from there, so that it would not
# depend on the last digit. The mean would do; section 8 draws, too, as diffusers does. quant and
# post_quant are one more linear layer on either side of the latents; the name comes from another
# kind of autoencoder.
#
# Outside these networks the latents are multiplied by a scale, 0.18215: 1 over the deviation that
# the first of these encoders gave them, so that their variance is about 1, like the noise's.
# (modules/diffusionmodules/model.py:368, 462)


class AttendVAE(nn.Module):
    """Self-attention over all places, with one head as wide as c."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = GroupNorm(c, groups, epsilon=1e-6)
        self.attention = Attention(c, heads=1, bias=True)

    def __call__(self, x):
        b, h, w, c = x.shape
        return x + self.attention(self.norm(x).reshape(b, h * w, c)).reshape(b, h, w, c)


class HalveVAE(Halve):
    """As in the original, it pads below and on the right only, (0, 1); the UNet's pads all round.

    The other way would give the same shapes and other numbers. (model.py:60)
    """

    def __init__(self, c):
        super().__init__(c, padding=0)

    def __call__(self, x):
        return self.conv(mx.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))


class VAE(nn.Module):
    """widths: the channels of the four floors, from the picture's down."""

    def __init__(self, widths, groups):
        super().__init__()
        c1, c2, c3, c4 = widths

        def res(c_in, c_out):
            return Res(c_in, c_out, groups, epsilon=1e-6)

        # fmt: off
        self.encoder = [                                            # after this row
            Conv(3, c1),                                            # 512 x 512 x 128
            res(c1, c1), res(c1, c1), HalveVAE(c1),                 # 256 x 256 x 128
            res(c1, c2), res(c2, c2), HalveVAE(c2),                 # 128 x 128 x 256
            res(c2, c3), res(c3, c3), HalveVAE(c3),                 #  64 x  64 x 512
            res(c3, c4), res(c4, c4),                               #  64 x  64 x 512
            res(c4, c4), AttendVAE(c4, groups), res(c4, c4),        #  64 x  64 x 512
        ]
        self.encoder_norm = NormSilu(c4, groups, epsilon=1e-6)
        self.encoder_out = Conv(c4, 8)
        self.quant = Linear(8, 8)                                   #  64 x  64 x   8

        self.post_quant = Linear(4, 4)
        self.decoder = [
            Conv(4, c4),                                            #  64 x  64 x 512
            res(c4, c4), AttendVAE(c4, groups), res(c4, c4),        #  64 x  64 x 512
            res(c4, c4), res(c4, c4), res(c4, c4), Double(c4),      # 128 x 128 x 512
            res(c4, c3), res(c3, c3), res(c3, c3), Double(c3),      # 256 x 256 x 512
            res(c3, c2), res(c2, c2), res(c2, c2), Double(c2),      # 512 x 512 x 256
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


# %% 6. Schedule, DDIM, PLMS -----------------------------------------------------------------------
# How noise is added in training, and how it is taken away again, step by step.
#
# Training spoils clean latents x0 with noise eps, the more the larger t is [2, eq. 4]:
#
#     x = sqrt(abar[t]) x0 + sqrt(1 - abar[t]) eps
#
# The two weights' squares sum to 1, so x keeps variance 1. The UNet has learned to say eps when
# shown x and t, and from that x0 follows. But at a large t that x0 is a blur, an average of all
# the pictures that x might have been. So we go a small step in its direction, ask again, and
# repeat: that is sampling.

# Think of that noise as added in 1000 small steps. Step t adds noise of variance BETAS[t], and
# keeps 1 - BETAS[t] of the variance that was there; the square root of BETAS grows evenly. What is
# left of x0's variance after step t is the product of all factors so far, ABAR[t]; in float64, for
# there are up to 1000. The line above does these steps at once.
# (modules/diffusionmodules/util.py:21)
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
ABAR = np.cumprod(1 - BETAS)


def make_timesteps(steps):
    """The timesteps of a run, largest first: make_timesteps(50) -> [981, 961, ..., 21, 1].

    Evenly spaced, exactly as many as asked for, and the last one is 1, as in the original. At most
    999, for the first of a thousand would be 1000, beyond the table. The spacing is a whole number,
    so the first may be far from 999: 501 for two steps, and also for 501. Pure noise has to pass
    for x there; at 981 nearly all of the variance is noise and it does, at 501 only 73 %: one
    reason why very few steps paint badly.
    """
    return [1000 // steps * i + 1 for i in reversed(range(steps))]


def eps_from_v(v, x, t):
    """Some models, such as Stable Diffusion 2.x at 768, were trained to say v [7] instead of eps.

    v = sqrt(abar) eps - sqrt(1 - abar) x0, which is solved for eps with the line above for x.
    """
    abar = abar_at(t)  # ABAR[t]; but section 10 has a sampler that stops between two timesteps
    return math.sqrt(abar) * v + math.sqrt(1 - abar) * x


def ddim_step(x, eps, t, t_next):
    """From x at t to x at t_next, believing that eps is the noise in it [3, eq. 12, no new noise].

    Solve the line above for x0; then spoil that x0 again, with the same eps, but only as far as
    t_next says.
    """
    x0 = (x - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t])
    return math.sqrt(ABAR[t_next]) * x0 + math.sqrt(1 - ABAR[t_next]) * eps


# A sampler walks x down the timesteps, asking eps_at(x, t), which is the UNet with the prompt built
# in (section 7). It is a Python generator: it yields x after each step, so that its caller can show
# progress, save what is there or stop, and the sampler need not know about that. draw() gives new
# noise; these two need none.


def sample_ddim(eps_at, x, timesteps, draw=None):
    """One UNet call per step [3].

    As in the original, the last step goes to t = 0, where abar is 0.9991 and not 1: a little noise
    is left in.
    """
    for t, t_next in itertools.pairwise([*timesteps, 0]):
        x = ddim_step(x, eps_at(x, t), t, t_next)
        yield x


# A DDIM step takes eps for constant from t to t_next. But eps changes as t falls. PLMS [4] looks
# back at the last three answers and lays a curve through them:
#
#     slope = w0 eps(now) + w1 eps(one step ago) + w2 eps(two ago) + w3 eps(three ago)
#
# then takes the same DDIM step with slope instead of eps. The weights are Adams' and Bashforth's
# (1883): the average, over the coming step, of the polynomial through the known points. So each row
# sums to 1. Looking back costs nothing: the old answers are there already.
ADAMS_BASHFORTH = (
    (1,),  # row i: with i old answers (row 0: a run of one step, which has no past and no next)
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def sample_plms(eps_at, x, timesteps, draw=None):
    """One UNet call per step, two in the first: 51 for 50 steps. (models/diffusion/plms.py:174)"""
    old = []  # newest first, at most three
    for t, t_next in itertools.pairwise([*timesteps, 0]):
        eps = eps_at(x, t)
        if not old and t_next > 0:
            # No past yet: peek one step ahead and average what is said here and there, as Heun did
            # (1900). Not the average but the first eps becomes history.
            peek = ddim_step(x, eps, t, t_next)
            slope = (eps + eps_at(peek, t_next)) / 2
        else:
            slope = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(old)], [eps, *old]))
        x = ddim_step(x, slope, t, t_next)
        old = [eps, *old][:3]
        yield x


SAMPLERS = {"plms": sample_plms, "ddim": sample_ddim}
SPACINGS = {}  # samplers with timesteps of their own (section 10)


# %% 7. Text to image ------------------------------------------------------------------------------
# The parts put together as in the diagram at the top. From part III: section 17 builds the networks
# and fills them from the file, 18 refuses what can't be done, 15 draws the noise.

HERE = Path(globals().get("__file__", "sd.py")).resolve().parent  # notebooks have none
TINY = HERE / "tiny" / "tiny.safetensors"
DTYPES = ("float32", "float16", "bfloat16")


class StableDiffusion:
    """A model: tokenizer, text_encoder, unet and vae, and what they do together.

        sd = StableDiffusion("model.safetensors", dtype="float16")
        pictures = sd.txt2img("a red house", seed=42)

    path: a flat file (default: the miniature). dtype: what the text model and the UNet compute in,
    "float32", "float16" or "bfloat16"; default float16 on a GPU, float32 on a CPU. The VAE, whose
    numbers outgrow float16 in some models, always has float32. changes: part II's lora(...),
    words(...) and clip_skip(...). Raises ValueError.
    """

    def __init__(self, path=TINY, dtype=None, changes=()):
        self.path, self.changes = path, changes
        self.config, weights = self.open()
        dtype = dtype or ("float32" if on_cpu() else "float16")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} can't be. There are: {', '.join(DTYPES)}.")
        self.dtype = getattr(mx, dtype)
        self.text_encoder, self.unet, self.vae = networks(self.config, path)
        self.scale = self.config["vae"]["scale"]
        merges = bytes(np.array(weights["tokenizer.merges"])).decode()
        self.tokenizer = Tokenizer(merges, self.config["text"]["pad"])
        fill(self.text_encoder, weights, "text_encoder", self.dtype)
        fill(self.unet, weights, "unet", self.dtype)
        fill(self.vae, weights, "vae", mx.float32)
        self.read()

    def open(self):
        """-> config, {name: array}"""
        config, weights = read_flat(self.path)
        for change in self.changes:
            config, weights = change(config, weights)
        return config, weights

    def read(self):
        """Read the weights, which until here are only known to be in the file."""
        mx.eval([network.parameters() for network in (self.text_encoder, self.unet, self.vae)])

    def contexts(self, sentences):
        """-> (number of sentences, 77, width). Section 13 puts one that reads brackets here."""
        return self.text_encoder(mx.array([self.tokenizer.encode(s) for s in sentences]))

    def guided(self, prompt, negative_prompt, n_images, cfg):
        """-> the function eps_at(x, t) that the samplers ask, with the prompt built in.

        Guidance [6]: ask twice, without the prompt and with it, and go from the first answer to the
        second and beyond. 1 is the second answer itself, 7.5 overdoes what the prompt changes.

            eps = eps_uncond + cfg (eps_text - eps_uncond)

        The empty sentence stands for "without": in training the sentence was left out now and then.
        A negative prompt in its place is what to go away from.
        """
        sentences = [prompt] if cfg == 1 else [negative_prompt, prompt]
        context = self.contexts(sentences)
        context = mx.repeat(context, n_images, axis=0)  # all without, then all with

        unet = compiled(self.unet)  # the same network, on a GPU faster (section 16)

        def eps_at(x, t):
            both = mx.concatenate([x] * len(sentences)).astype(self.dtype)
            # round: t is whole, but for one sampler of section 10.
            out = unet(both, round(t), context).astype(mx.float32)
            if cfg != 1:
                uncond, text = mx.split(out, 2)
                out = uncond + cfg * (text - uncond)
            return out if self.config["prediction"] == "eps" else eps_from_v(out, x, t)

        return eps_at

    def generate_latents(
        self, prompt, *, negative_prompt="", seed=42, steps=50, cfg=None, sampler="plms",
        width=None, height=None, n_images=1, rng="torch", variations=(),
    ):  # fmt: skip
        """Yield the latents x (n_images, h, w, 4) after every step; the last ones are the picture.

        Picture i starts from the noise of seed + i, so each can be made again alone. width, height:
        in pixels, multiples of 64 (default: what the model was trained on). cfg: default the
        model's own, 7.5 for Stable Diffusion. Raises ValueError.
        """
        cfg = self.config["cfg"] if cfg is None else cfg
        width = self.config["size"] if width is None else width
        height = self.config["size"] if height is None else height
        check_options(steps, cfg, sampler, width, height, n_images, rng)
        normal = [RNGS[rng](seed + i) for i in range(n_images)]

        def draw():
            """More noise (b, h, w, 4), drawn as (b, 4, h, w): PyTorch's numbers fall that way."""
            noise = [one((1, 4, height // 8, width // 8)) for one in normal]
            return mx.array(np.concatenate(noise).transpose(0, 2, 3, 1))

        walk, timesteps = SAMPLERS[sampler], SPACINGS.get(sampler, make_timesteps)(steps)
        for vary in variations:  # part II: each makes a sampler of a sampler
            walk = vary(walk)
        eps_at = self.guided(prompt, negative_prompt, n_images, cfg)
        for x in walk(eps_at, draw(), timesteps, draw):
            mx.eval(x)  # MLX only notes what is to be computed, until it is told to do it
            yield x

    def decode(self, x):
        """Latents (b, h, w, 4) -> pictures (b, 8h, 8w, 3) in [0, 1]."""
        return mx.clip(self.vae.decode(x.astype(mx.float32) / self.scale) / 2 + 0.5, 0, 1)

    def encode(self, pictures, noise=0):
        """Pictures (b, 8h, 8w, 3) in [0, 1] -> latents (b, h, w, 4): the means, if noise is 0."""
        mean, log_variance = self.vae.encode(mx.array(pictures).astype(mx.float32) * 2 - 1)
        return (mean + mx.exp(log_variance / 2) * noise) * self.scale

    def txt2img(self, prompt, **options):
        """A sentence -> list of PIL pictures. Options: those of generate_latents."""
        for x in self.generate_latents(prompt, **options):
            pass
        return self.to_pictures(x)

    def to_pictures(self, x, batch=1):
        """Latents (b, h, w, 4) -> list of PIL pictures, decoded a batch at a time to save memory.

        To 8 bits by rounding, as diffusers does; the original cuts off, half a level darker.
        """
        parts = [np.array(self.decode(part)) for part in mx.split(x, range(batch, len(x), batch))]
        pictures = [picture for part in parts for picture in part]
        if not all(np.isfinite(p).all() for p in pictures):
            raise ValueError("the picture is not a number everywhere. Try dtype float32.")
        return [Image.fromarray((p * 255 + 0.5).astype(np.uint8)) for p in pictures]


# That is Stable Diffusion. The rest of this file is optional: the noise to start from (section 15)
# could be any library's normal random numbers.

# ================================================================================= II. Variations

# A variation of the sampling is a function from sampler to sampler, one of the weights a function
# from weights to weights; one of the network stands in the UNet's place. So they can be combined,
# and part I only has places for them: variations, SPACINGS, changes, control, channels.

# %% 8. From a picture -----------------------------------------------------------------------------
# Image to image: do not begin with pure noise, but with a picture that was spoiled only so far, and
# walk the rest of the way with a sentence. What is large in it stays, for that much noise did not
# hide it; what is small is painted anew. That is all there is to it [8].
#
#   strength   how much of the way is walked: 0.3 touches up, 0.75 keeps the layout, 1 keeps next
#              to nothing
#
# To watch: the noise must be that of the first timestep that is run. Several programs are one step
# off, and a little noise is left in the picture or too little was put in.


def spoil(x0, noise, t):
    """Section 6's line for x: clean latents as they are at time t."""
    abar = abar_at(t)
    return math.sqrt(abar) * x0 + math.sqrt(1 - abar) * noise


class FromPicture:
    """picture: (8h, 8w, 3) in [0, 1], 8h and 8w multiples of 64. As diffusers does, it is encoded
    with noise, the first that is drawn; what spoils it is the second.
    """

    def __init__(self, sd, picture, strength):
        if not 0 < strength <= 1:
            raise ValueError(f"strength {strength} can't be: more than 0, at most 1.")
        self.sd, self.picture, self.strength = sd, mx.array(picture)[None], strength

    def vary(self, walk):
        def run(eps_at, noise, timesteps, draw):
            x0, timesteps = self.sd.encode(self.picture, noise), self.rest(timesteps)
            return walk(eps_at, spoil(x0, draw(), timesteps[0]), timesteps, draw)

        return run

    def rest(self, timesteps):
        """The last ones, as many as strength says."""
        count = int(self.strength * len(timesteps))
        if count == 0:
            raise ValueError(
                f"strength {self.strength} and steps {len(timesteps)} can't be: together they make "
                "less than one step. Take more of either."
            )
        return timesteps[-count:]

    def finish(self, pictures):
        return pictures


# What Pillow raises for damaged files.
DAMAGED = (OSError, ValueError, SyntaxError, RuntimeError, TypeError, EOFError)
DAMAGED += (OverflowError, Image.DecompressionBombError)


def load_picture(file, width=None, height=None, green_is_hole=False):
    """A picture of any kind -> (RGB (h, w, 3), what is opaque (h, w)), float32 in [0, 1].

    file: a path, an open file or a PIL image. It is turned as its EXIF note says, and resized to
    width and height, by default the nearest multiples of 64. green_is_hole: pure green counts as
    transparent; not in a mask or a pose, where green is a colour.
    """
    try:
        image = ImageOps.exif_transpose(file if isinstance(file, Image.Image) else Image.open(file))
        if image.mode.startswith("I"):  # grey with 16 bits; Pillow would cut it off at 255
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
        pixels = np.array(image.convert("RGBA"))
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise ValueError(f"{file} can't be read as a picture: {error}") from None
    if green_is_hole:  # before resizing mixes it with others
        pixels[(pixels[..., :3] == (0, 255, 0)).all(2), 3] = 0
    image = Image.fromarray(pixels)
    near = [max(64, round(n / 64) * 64) for n in image.size]
    size = (width or near[0], height or near[1])
    if size != image.size:
        name = Path(file).name if isinstance(file, (str, Path)) else "the picture"
        print("{}: resized {} x {} to {} x {}".format(name, *image.size, *size), file=sys.stderr)
        image = image.resize(size, Image.LANCZOS)
    pixels = np.asarray(image, np.float32) / 255
    return pixels[..., :3], pixels[..., 3]


def img2img(self, prompt, image, strength=0.75, width=None, height=None, **options):
    """A sentence and a picture -> list of PIL pictures. Options: those of generate_latents.

    What is transparent or pure green in it gets the colours around (section 9).
    """
    picture = find_mask(*load_picture(image, width, height, green_is_hole=True))[1]
    return paint_with(prompt, FromPicture(self, picture, strength), options)


def paint_with(prompt, way, options):
    height, width, _ = way.picture.shape[1:]
    size = {"width": width, "height": height, "variations": [way.vary]}
    return way.finish(way.sd.txt2img(prompt, **size, **options))


StableDiffusion.img2img = img2img


# %% 9. Inpainting ---------------------------------------------------------------------------------
# Paint anew only where a mask says so. Elsewhere eps need not be asked of the UNet, for there the
# clean latents are known, and with them the noise in x:
#
#     eps = (x - sqrt(abar) x0) / sqrt(1 - abar)
#
# With that answer every sampler walks the known part along from noise to x0, while the UNet sees it
# around the part that it paints. (Others put the known part, with the noise of the beginning, into
# x after each step: the same, where a sampler adds no noise of its own.) In the end the known
# pixels are pasted back, with a soft edge, since the VAE changes them a little.
#
# Models trained for inpainting see more: nine channels, the noisy latents, the mask, and the
# latents of the picture with a grey hole. Of this they need only the pasting. [1]


class Inpainting(FromPicture):
    """mask: (h, w), 1 where to paint."""

    def __init__(self, sd, picture, mask, strength=1.0):
        super().__init__(sd, picture, strength)
        if not mask.any():
            raise ValueError(
                "nothing is to be painted: the mask is nowhere white, or, without a mask, the "
                "picture nowhere transparent or pure green."
            )
        self.mask = mask
        # A place of the latents is painted if any of its 8 x 8 pixels is.
        h, w = mask.shape[0] // 8, mask.shape[1] // 8
        self.small = mx.array(mask.reshape(h, 8, w, 8).max((1, 3)))[None, :, :, None]
        if sd.config["unet"].get("channels") == 9:
            self.sd, self.vary = copy.copy(sd), self.vary_nine
            if isinstance(sd.unet, Controlled):  # a ControlNet sees four channels
                self.beside = Beside(sd.unet.unet)
                self.sd.unet = Controlled(self.beside, sd.unet.controls)
            else:
                self.sd.unet = self.beside = Beside(sd.unet)

    def vary_nine(self, walk):
        def run(eps_at, noise, timesteps, draw):
            timesteps = self.rest(timesteps)
            if self.strength < 1:
                noise = spoil(self.sd.encode(self.picture, noise), draw(), timesteps[0])
            hole = mx.array(self.mask)[None, :, :, None] > 0.5
            seen = self.sd.encode(mx.where(hole, 0.5, self.picture), draw())
            small = mx.array(self.mask[::8, ::8])[None, :, :, None]  # as it was trained
            small = mx.broadcast_to(small, (len(seen), *small.shape[1:]))
            self.beside.more = mx.concatenate([small, seen], axis=-1)
            return walk(eps_at, noise, timesteps, draw)

        return run

    def vary(self, walk):
        def run(eps_at, noise, timesteps, draw):
            x0, timesteps = self.sd.encode(self.picture, noise), self.rest(timesteps)

            def known_eps(x, t):
                abar = abar_at(t)
                known = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
                return mx.where(self.small > 0, eps_at(x, t), known)

            noise = draw()
            start = spoil(x0, noise, timesteps[0])
            if self.strength == 1:  # then nothing of what is to be replaced
                start = mx.where(self.small > 0, noise, start)
            walked = walk(known_eps, start, timesteps, draw)
            for left, x in zip(reversed(range(len(timesteps))), walked):
                yield x if left else mx.where(self.small > 0, x, x0)

        return run

    def finish(self, pictures):
        mask = self.mask[..., None]
        soft = np.maximum(mask, np.clip(2 * blur(mask, 4), 0, 1))  # 1 inside, 0 from 5 pixels on
        known = np.array(self.picture[0]) * 255
        return [
            Image.fromarray((soft * np.asarray(p) + (1 - soft) * known + 0.5).astype(np.uint8))
            for p in pictures
        ]


class Beside:
    """Stands in the place of a UNet of nine channels, and gives it the five that x lacks."""

    def __init__(self, unet):
        self.unet = unet
        self.network = getattr(unet, "network", unet)  # the one inside, for section 17's LowMemory

    def __call__(self, x, *rest):
        more = mx.concatenate([self.more] * (len(x) // len(self.more))).astype(x.dtype)
        return self.unet(mx.concatenate([x, more], axis=-1), *rest)


def find_mask(picture, opaque, mask=None):
    """-> (h, w), 1 where to paint, and the picture. mask: a picture, white there; else where the
    picture itself is transparent or pure green, and there it gets the colours around the hole.
    """
    height, width, _ = picture.shape
    if mask is not None:
        return np.float32(load_picture(mask, width, height)[0].mean(2) > 0.5), picture
    hole = np.float32(opaque < 0.5)
    known = (1 - hole)[..., None]
    mean = (picture * known).sum((0, 1)) / max(1, known.sum())  # far from the hole's edge
    around = (blur(picture * known, 16) + 1e-3 * mean) / (blur(known, 16) + 1e-3)
    return hole, picture * known + around * hole[..., None]


def blur(x, radius):
    """(h, w, c) -> the average over the square of that radius around each place."""
    for axis in (0, 1):
        n = x.shape[axis]
        total = np.insert(np.cumsum(x, axis, dtype=np.float64), 0, 0, axis)
        last, first = np.minimum(np.arange(n) + radius + 1, n), np.maximum(np.arange(n) - radius, 0)
        count = (last - first).reshape(-1, *[1] * (2 - axis))
        x = (total.take(last, axis) - total.take(first, axis)) / count
    return np.float32(x)


def inpaint(self, prompt, image, mask=None, strength=1.0, width=None, height=None, **options):
    """A sentence, a picture, and where to paint -> list of PIL pictures."""
    picture, opaque = load_picture(image, width, height, green_is_hole=True)
    mask, picture = find_mask(picture, opaque, mask)
    return paint_with(prompt, Inpainting(self, picture, mask, strength), options)


StableDiffusion.inpaint = inpaint


# %% 10. More samplers -----------------------------------------------------------------------------
# All see the same x and eps; they differ in how they go on from there. Most are written in other
# coordinates, those of Karras et al. [9]: y = x / sqrt(abar) = x0 + sigma eps, a clean picture with
# noise of deviation sigma on it, from 14.6 down to 0. There the way is dy/dsigma = eps, and a DDIM
# step is Euler's: y + (sigma_next - sigma) eps. These go down to sigma 0, where nothing is left in.
# (hypot(1, sigma) is 1 / sqrt(abar).)


def sigma_at(t):
    """sqrt((1 - abar) / abar); between two timesteps evenly in its logarithm."""
    return math.exp(np.interp(t, np.arange(1000), LOG_SIGMAS))


def abar_at(t):
    return 1 / (1 + sigma_at(t) ** 2)


LOG_SIGMAS = np.log((1 - ABAR) / ABAR) / 2


def in_sigmas(step):
    """step(y, eps, i, sigmas, draw, old) -> y, as a sampler; old: a list that it may keep."""

    def sample(eps_at, x, timesteps, draw=None):
        sigmas, old = [*map(sigma_at, timesteps), 0.0], []
        y = x * math.hypot(1, sigmas[0])
        for i, t in enumerate(timesteps):
            eps = eps_at(y / math.hypot(1, sigmas[i]), t)
            y = step(y, eps, i, sigmas, draw, old)
            yield y / math.hypot(1, sigmas[i + 1])

    return sample


def euler(y, eps, i, sigmas, draw, old):
    return y + (sigmas[i + 1] - sigmas[i]) * eps


def euler_ancestral(y, eps, i, sigmas, draw, old):
    """Go down further than asked, come back with new noise. (k-diffusion's get_ancestral_step)"""
    now, then = sigmas[i], sigmas[i + 1]
    up = then * math.sqrt(max(0, 1 - (then / now) ** 2))
    down = math.sqrt(then**2 - up**2)
    return y + (down - now) * eps + up * draw()


def lms(y, eps, i, sigmas, draw, old):
    """Adams and Bashforth again, with the true distances between up to four sigmas: the integral,
    over the coming step, of the polynomial through the known eps. It is a sum of Lagrange's, each
    1 at one sigma and 0 at the others, times the eps there. (Crowson's, in k-diffusion)
    """
    old[:] = [eps, *old][:4]
    known = sigmas[i - len(old) + 1 : i + 1][::-1]  # where they were asked, newest first
    for j, e in enumerate(old):
        others = known[:j] + known[j + 1 :]
        scale = math.prod(known[j] - s for s in others)
        area = np.poly1d(others, r=True).integ()  # r: these are its roots
        y = y + float(area(sigmas[i + 1]) - area(sigmas[i])) / scale * e
    return y


def dpm_2m(y, eps, i, sigmas, draw, old):
    """DPM-Solver++(2M) [10]: follow x0, which changes less than eps, in steps of log sigma. The
    old x0 tells which way it goes. The last step, to sigma 0, is x0 itself.
    """
    now, then = sigmas[i], sigmas[i + 1]
    x0 = y - now * eps
    if then == 0:
        return x0
    toward = x0
    if old:
        r = math.log(sigmas[i - 1] / now) / math.log(now / then)
        toward = x0 + (x0 - old[0]) / (2 * r)
    old[:] = [x0]
    return then / now * y + (1 - then / now) * toward


def sample_lcm(eps_at, x, timesteps, draw=None):
    """For models distilled to say the clean picture at once [11]: believe x0, and spoil it anew.

    They were trained with d^2 / (s^2 + d^2) x + s / sqrt(s^2 + d^2) x0 for the answer, s = 10 t and
    d = 0.5, so that at t = 0 it is x itself. At these t it is nearly x0.
    """
    for t, t_next in itertools.pairwise([*timesteps, None]):
        abar, s, d = ABAR[t], 10 * t, 0.5
        x0 = (x - math.sqrt(1 - abar) * eps_at(x, t)) / math.sqrt(abar)
        x = s / math.hypot(s, d) * x0 + d**2 / (s**2 + d**2) * x
        if t_next is not None:
            x = spoil(x, draw(), t_next)
        yield x


def lcm_timesteps(steps):
    """Of the 50 timesteps 999, 979 ... 19 that it was distilled at, evenly so many."""
    if steps > 50:
        raise ValueError(f"steps {steps} can't be with lcm: at most 50. 4 to 8 are usual.")
    return [999 - 20 * int(50 * i / steps) for i in range(steps)]


def karras_timesteps(steps):
    """Sigmas evenly spaced in their 7th root [9, eq. 5]: smaller steps near the end. -> timesteps
    between whole numbers that have these sigmas; the UNet is told the nearest one.
    """
    high, low = math.exp(LOG_SIGMAS[-1]) ** (1 / 7), math.exp(LOG_SIGMAS[0]) ** (1 / 7)
    sigmas = [(high + (low - high) * i / max(1, steps - 1)) ** 7 for i in range(steps)]
    return [float(np.interp(math.log(s), LOG_SIGMAS, np.arange(1000))) for s in sigmas]


SAMPLERS |= {
    "euler": in_sigmas(euler),
    "euler-a": in_sigmas(euler_ancestral),
    "lms": in_sigmas(lms),
    "dpm++": in_sigmas(dpm_2m),
    "dpm++-karras": in_sigmas(dpm_2m),
    "lcm": sample_lcm,
}
SPACINGS |= {"dpm++-karras": karras_timesteps, "lcm": lcm_timesteps}


# %% 11. LoRA, new words, fewer layers -------------------------------------------------------------
# What changes a model when it is loaded: functions that take and give (config, {name: array}), for
# StableDiffusion(changes=[...]). None of it costs time when painting.
#
# A LoRA changes matrices by products of two thin ones [12]:
#
#     W + strength up @ down        up (o, r), down (r, c), with a rank r of 4 to 128
#
# So a style or a face is a file of some megabytes. A convolution's down is (r, k, k, c), read as
# (r, k k c); some split it in two, a 1 x 1 down (m, c) and then a 3 x 3 in the middle (r, 3, 3, m).
# convert_weights.py has put the file's own factor, alpha / r, into up.
#
# Textual inversion [14] leaves the model alone and learns vectors that the text model is given in
# place of a token's: a word for what no word says. They are put behind its table of vectors.


def lora(path, strength=1.0):
    """path: a flat file. The changed weights are float32. Raises ValueError."""

    def change(config, weights):
        _, parts = read_flat(path, "lora")
        changed = {}
        for name in sorted({name.rpartition(".")[0] for name in parts}):
            up, down, middle = (parts.get(f"{name}.{part}") for part in ("up", "down", "middle"))
            weight = weights.get(f"{name}.weight")
            if up is None or down is None:
                raise ValueError(f"{path} is damaged: {name} has not both, up and down. {AGAIN}")
            up, down = up.astype(mx.float32), down.astype(mx.float32)
            try:
                if middle is not None:  # (r, 3, 3, m)
                    middle = middle.astype(mx.float32)
                    down = (middle.reshape(-1, len(down)) @ down).reshape(len(middle), -1)
                product = up @ down.reshape(len(down), -1)
            except ValueError:
                raise ValueError(f"{path} is damaged: {name} has odd shapes. {AGAIN}") from None
            if weight is None or len(weight) != len(product) or weight.size != product.size:
                raise ValueError(f"{path} is a LoRA for another model: {name} does not fit.")
            product = strength * product.reshape(weight.shape)
            changed[f"{name}.weight"] = weight.astype(mx.float32) + product
        return config, weights | changed

    return change


def words(path):
    """path: a flat file, whose words stand for its vectors from now on. Raises ValueError."""

    def change(config, weights):
        name = "text_encoder.token_embedding.weight"
        known = dict(config.get("words", {}))
        for word, vectors in read_flat(path, "words")[1].items():
            table = weights[name]
            if vectors.ndim != 2 or vectors.shape[1] != table.shape[1]:
                raise ValueError(
                    f"{path} is for another text model: its vectors have {vectors.shape[-1]} "
                    f"numbers, this one's {table.shape[1]}."
                )
            known[word] = list(range(len(table), len(table) + len(vectors)))
            both = table.astype(mx.float32), vectors.astype(mx.float32)
            weights = weights | {name: mx.concatenate(both)}
        text = config["text"] | {"vocabulary": len(weights[name])}
        return config | {"text": text, "words": known}, weights

    return change


def clip_skip(count):
    """Stop reading count - 1 layers before the last, as some models were trained.

    Among changes it comes last: before a LoRA it would take away layers that the LoRA changes.
    """

    def change(config, weights):
        left = config["text"]["layers"] - (count - 1)
        if count < 1 or left < 1:
            most = config["text"]["layers"]
            raise ValueError(f"clip_skip {count} can't be: 1 for all layers, at most {most}.")
        gone = tuple(f"text_encoder.layers.{i}." for i in range(left, left + count - 1))
        kept = {name: w for name, w in weights.items() if not name.startswith(gone)}
        return config | {"text": config["text"] | {"layers": left}}, kept

    return change


# %% 12. ControlNet --------------------------------------------------------------------------------
# A second network that sees a picture, of edges, depth or a pose, beside x, and corrects the UNet
# [13]: a copy of its way down and middle, trained further, whose results pass through 1 x 1 layers
# (which began as zeros, so that at first nothing changed) and are added to what the UNet's way down
# hands to the way up. Several can be added, each with a weight.
#
#   in   x, t, context as the UNet; a picture (1, 8h, 8w, 3) in [0, 1]
#   out  13 corrections: of the 12 rows of the way down, and of the middle
#
# (lllyasviel's ControlNet, cldm/cldm.py)


class ControlNet(UNet):
    """path: a flat file. Raises ValueError."""

    def __init__(self, path, dtype=mx.float32):
        config, weights = read_flat(path, "controlnet")
        try:
            numbers, self.pool = config["unet"], config["pool"]
            check_unet(numbers)
            super().__init__(**numbers)
        except CAN_NOT_BE as error:
            raise ValueError(f"{path} has a config that can't be ({error!r}). {AGAIN}") from None
        self.path, self.fits = path, fits(numbers)
        del self.up, self.norm_out, self.conv_out
        widths, strides = (3, 16, 16, 32, 32, 96, 96, 256, self.c1), (1, 1, 2, 1, 2, 1, 2, 1)
        self.picture = [Conv(*cs, stride) for *cs, stride in zip(widths, widths[1:], strides)]
        c1, c2, c3, c4 = numbers["widths"]
        rows = c1, c1, c1, c1, c2, c2, c2, c3, c3, c3, c4, c4, c4
        self.zero = [Linear(c, c) for c in rows]
        fill(self, weights, "controlnet", dtype)

    def look(self, picture):  # (1, 8h, 8w, 3) -> (1, h, w, c1)
        for layer in self.picture[:-1]:
            picture = silu(layer(picture))
        return self.picture[-1](picture)

    def __call__(self, x, t, context, seen):
        time, kept = self.time_vector(x, t), []
        for row in self.down:
            x = run_row(row, x, time, context)
            if not kept:
                x = x + seen.astype(x.dtype)
            kept.append(x)
        kept.append(run_row(self.middle, x, time, context))
        out = [zero(y) for zero, y in zip(self.zero, kept)]
        # Some, for the mood of a picture, correct all places alike.
        return [y.mean((1, 2), keepdims=True) for y in out] if self.pool else out


def fits(numbers):
    return tuple(numbers["widths"]), numbers["context_width"]


class Controlled:
    """Stands in the UNet's place. controls: (ControlNet, what it saw, weight) each.

    On a GPU its steps are not compiled into one graph.
    """

    def __init__(self, unet, controls):
        self.unet, self.controls = unet, controls
        self.network = getattr(unet, "network", unet)  # as in Beside

    def __call__(self, x, t, context):
        each = [[w * y for y in net(x, t, context, seen)] for net, seen, w in self.controls]
        return self.unet(x, t, context, [sum(ys).astype(x.dtype) for ys in zip(*each)])


def controlled(self, *controls):
    """controls: (ControlNet, picture (h, w, 3) in [0, 1], weight) each -> a StableDiffusion that
    paints so. It shares its networks with this one.
    """
    for net, _, _ in controls:
        if net.fits != fits(self.config["unet"]):
            raise ValueError(f"{net.path} is a ControlNet for another model than {self.path}.")
    other = copy.copy(self)
    seen = [(net, net.look(mx.array(picture)[None]), w) for net, picture, w in controls]
    if isinstance(self.unet, Controlled):
        other.unet = Controlled(self.unet.unet, self.unet.controls + seen)
    else:
        other.unet = Controlled(self.unet, seen)
    return other


StableDiffusion.controlled = controlled


# %% 13. Prompts -----------------------------------------------------------------------------------
# What other programs understand in a prompt, and CLIP does not:
#
#   (word) ((word)) (word:1.3)   more of it: 1.1 times, 1.21 times, 1.3 times
#   [word]                       less: 1 / 1.1
#   \( \) \[ \]                  the brackets themselves
#   BREAK                        begin the next 75 tokens here
#   more than 75 tokens          are read 75 at a time, and the contexts put one behind the other
#   a word with a file           its vectors (section 11)
#
# A weight multiplies the vectors that CLIP gives for these tokens; then all are scaled back to the
# mean they had, so that the others do not become weaker or stronger. This is how AUTOMATIC1111's
# program does it, for which most of these prompts were written.

PROMPT_MARKS = regex.compile(
    r"""
      \\ [()\[\]\\]                                        # a bracket that is meant, or a \
    | [()\[\]]                                            # one that weighs
    | : \s* [+-]? (?: \d+\.?\d* | \.\d+ ) \s* \)           # :1.3)
    | \s* \b BREAK \b \s*
    | [^\\()\[\]:] (?: (?!\s*\bBREAK\b) [^\\()\[\]:] )*   # text, as far as none of these begins
    | [\\:]                                               # one that means nothing here
    """,
    regex.VERBOSE,
)


def weigh(text):
    """-> [(piece of text, weight)], None as weight of BREAK.

    weigh("a (red:1.5) [small] house")
    ->  [("a ", 1.0), ("red", 1.5), (" ", 1.0), ("small", 0.909...), (" house", 1.0)]
    """
    out, opened = [], {"(": [], "[": []}

    def close(bracket, factor):
        for piece in out[opened[bracket].pop() :]:
            if piece[1] is not None:
                piece[1] *= factor

    for token in PROMPT_MARKS.findall(text):
        if token in opened:
            opened[token].append(len(out))
        elif token[0] == ":" and token[-1] == ")" and opened["("]:
            close("(", float(token[1:-1]))
        elif token == ")" and opened["("]:
            close("(", 1.1)
        elif token == "]" and opened["["]:
            close("[", 1 / 1.1)
        elif token.strip() == "BREAK":
            out.append(["BREAK", None])
        else:
            out.append([token[1:] if token[0] == "\\" and len(token) > 1 else token, 1.0])
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)
    joined = []
    for piece, weight in out:
        if joined and weight is not None and joined[-1][1] == weight:
            joined[-1] = joined[-1][0] + piece, weight
        else:
            joined.append((piece, weight))
    return joined


def read_words(sd, text):
    """Yield (word, its pieces, their ids, weight); weight None and no ids for BREAK."""
    vectors = sd.config.get("words", {})
    names = sorted(vectors, key=len, reverse=True)
    known = regex.compile("|".join(rf"(?<!\w){regex.escape(n)}(?!\w)" for n in names) or r"(?!)")
    for piece, weight in weigh(text):
        if weight is None:
            yield "BREAK", (), [], None
            continue
        at = 0
        for match in known.finditer(piece):
            yield from ((*word, weight) for word in sd.tokenizer.words(piece[at : match.start()]))
            yield match[0], (match[0],), vectors[match[0]], weight
            at = match.end()
        yield from ((*word, weight) for word in sd.tokenizer.words(piece[at:]))


def chunks(sd, text):
    """-> [[(id, weight)]] with at most 75 in each, at least one."""
    out = [[]]
    for _, _, ids, weight in read_words(sd, text):
        if weight is None:
            out.append([])
        # Ids beyond the last mark are section 11's: the vectors of one word are not parted.
        for together in [ids] if ids and ids[0] > END else [[i] for i in ids]:
            if len(out[-1]) + len(together) > 75:
                out.append([])
            out[-1] += [(i, weight) for i in together]
    return out


def long_contexts(self, sentences):
    """-> (number of sentences, 77 k, width), k for the longest; the others get empty chunks."""
    if self.plain_prompt:
        return plain_contexts(self, sentences)
    each = [chunks(self, sentence) for sentence in sentences]
    count = max(map(len, each))
    rows, weights = [], []
    for found in each:
        for chunk in found + [[]] * (count - len(found)):
            fill_up = [END] + [self.tokenizer.pad] * (75 - len(chunk))
            rows.append([START, *(i for i, _ in chunk), *fill_up])
            weights.append([1.0, *(w for _, w in chunk), *[1.0] * len(fill_up)])
    context = self.text_encoder(mx.array(rows))
    weights = mx.array(weights)[:, :, None].astype(context.dtype)
    if (weights != 1).any():
        mean = context.mean((1, 2), keepdims=True)
        context = context * weights
        context = context * (mean / context.mean((1, 2), keepdims=True))
    return context.reshape(len(sentences), 77 * count, -1)


plain_contexts, StableDiffusion.plain_prompt = StableDiffusion.contexts, False
StableDiffusion.contexts = long_contexts  # section 13's reading is the usual one


# %% 14. Safety checker ----------------------------------------------------------------------------
# CLIP's other half: a transformer that turns a picture into one vector, matched in training with
# the vectors of captions. The checker that came with Stable Diffusion compares it with vectors of
# 17 things not to be shown and 3 that call for more caution, each with a threshold.
#
#   in   a picture, 224 x 224, in 256 squares of 14 x 14       out   a vector (768), then yes or no
#
# It errs in both directions. (diffusers' pipelines/stable_diffusion/safety_checker.py)


class Safety(nn.Module):
    def __init__(self, width, layers, heads, projection):
        super().__init__()
        self.patch = mx.zeros((width, 14, 14, 3))
        self.first = mx.zeros((width,))  # a place that belongs to no square, and reports in the end
        self.position_embedding = Embedding(257, width)
        self.norm_in = LayerNorm(width)
        self.layers = [TextLayer(width, heads, "quick_gelu", causal=False) for _ in range(layers)]
        self.norm = LayerNorm(width)
        self.projection = Linear(width, projection, bias=False)
        self.concepts, self.thresholds = mx.zeros((17, projection)), mx.zeros((17,))
        self.special, self.special_thresholds = mx.zeros((3, projection)), mx.zeros((3,))

    def look(self, picture):
        """A PIL picture -> (1, 768)"""
        w, h = picture.size
        scale = 224 / min(w, h)
        size = max(224, int(w * scale)), max(224, int(h * scale))
        picture = picture.convert("RGB").resize(size, Image.BICUBIC)
        left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
        x = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32) / 255
        # The mean and deviation of the pictures that CLIP was trained on.
        x = (x - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
        x = np.float32(x.reshape(16, 14, 16, 14, 3).swapaxes(1, 2).reshape(1, 256, -1))
        x = linear(mx.array(x), self.patch.reshape(len(self.patch), -1))
        x = mx.concatenate([self.first[None, None], x], axis=1) + self.position_embedding.weight
        x = self.norm_in(x)
        for layer in self.layers:
            x = layer(x)
        return self.projection(self.norm(x[:, :1])[:, 0])

    def __call__(self, picture):
        """Is it not to be shown? The rounding decides what is just at a threshold."""

        def scores(concepts, thresholds, more):
            c = view(concepts)
            cosine = (c @ e) / (np.linalg.norm(c, axis=1) * np.linalg.norm(e))
            return cosine - view(thresholds) + more

        e, more = view(self.look(picture)[0]), 0.0
        for one in zip(self.special, self.special_thresholds):
            if np.round(scores(one[0][None], one[1][None], more), 3)[0] > 0:
                more = 0.01
        return bool((np.round(scores(self.concepts, self.thresholds, more), 3) > 0).any())


def checked(self, pictures):
    """-> PIL pictures, those blacked out that are not to be shown; and the numbers of these."""
    if "safety" not in self.config:
        return pictures, []
    if not hasattr(self, "safety"):
        try:
            self.safety = Safety(**self.config["safety"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} has a damaged config ({error}). {AGAIN}") from None
        fill(self.safety, read_flat(self.path)[1], "safety", mx.float32)
    flagged = [i for i, picture in enumerate(pictures) if self.safety(picture)]
    black = lambda picture: Image.new("RGB", picture.size)
    return [black(p) if i in flagged else p for i, p in enumerate(pictures)], flagged


StableDiffusion.checked = checked


# ================================================================================== III. Plumbing

# %% 15. Random numbers ----------------------------------------------------------------------------
# The picture depends on the noise it starts from, so the same seed gives the same picture only in
# programs that draw the same numbers. Here each is a function of a seed that returns draw(shape) ->
# float32 array, which goes on where it left off when it is called again.


def torch_normal(seed):
    """What torch.randn gives on a CPU after torch.manual_seed(seed), to float32 rounding.

    A Mersenne twister yields 32-bit words; NumPy's old generator is the same twister. torch keeps
    each word's low 24 bits as a uniform number in [0, 1), takes them 16 at a time, pairs the first
    8 with the last 8 and turns each pair into two normal numbers (Box and Muller: a radius and an
    angle). That is all that latents need, whose size is always a multiple of 256. Elsewhere: if the
    size is no multiple of 16, the last 16 numbers are drawn once more; below 16 it takes 53 bits
    from two words, one number after the other, in float64, and keeps the second of a pair.
    (PyTorch's aten/src/ATen/native/cpu/DistributionTemplates.h, normal_fill)
    """
    twister, kept = np.random.RandomState(seed % 2**32), []

    def uniform(count):
        words = twister.randint(0, 2**32, count, dtype=np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def normal(u):  # (16 k,) -> same
        u = u.reshape(-1, 2, 8)
        radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), np.float32(2 * np.pi) * u[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)

    def one():
        if not kept:
            words = twister.randint(0, 2**32, (2, 2), dtype=np.uint32).astype(np.uint64)
            u = (words[:, 0] << 32 | words[:, 1]) % 2**53 * 2.0**-53
            angle, radius = 2 * np.pi * u[0], math.sqrt(-2 * math.log1p(-u[1]))
            kept[:] = radius * math.sin(angle), radius * math.cos(angle)
        return kept.pop()

    def draw(shape):
        n = math.prod(shape)
        if n < 16:
            return np.array([one() for _ in range(n)], np.float32).reshape(shape)
        u = uniform(n)
        out = np.empty(n, np.float32)
        out[: n // 16 * 16] = normal(u[: n // 16 * 16])
        if n % 16:
            out[-16:] = normal(uniform(16))
        return out.reshape(shape)

    return draw


def numpy_normal(seed):
    """np.random.RandomState's, which Apple's Core ML programs use."""
    state = np.random.RandomState(seed % 2**32)
    return lambda shape: state.standard_normal(shape).astype(np.float32)


def philox_normal(seed):
    """What torch.randn gives on an NVIDIA GPU: Philox 4x32-10, by Salmon et al., SC 2011.

    It has no state to wind on: number i of call j is a scrambled (j, i), scrambled with the seed.
    """
    calls = itertools.count()

    def draw(shape):
        n = math.prod(shape)
        counter = np.zeros((4, n), np.uint32)
        counter[0], counter[2] = next(calls), np.arange(n)
        words = philox(counter, seed % 2**64).astype(np.float64)
        tiny = np.float32(2.0**-32)
        u, angle = (words[0] + 0.5) * tiny, (words[1] + 0.5) * np.float32(tiny * 2 * np.pi)
        return (np.sqrt(-2 * np.log(u)) * np.sin(angle)).astype(np.float32).reshape(shape)

    return draw


def philox(counter, seed):
    """(4, n) words of 32 bits -> the same, scrambled in ten rounds of multiplying and swapping."""
    a, b, c, d = counter.astype(np.uint64)
    key0, key1 = seed % 2**32, seed >> 32
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = right >> 32 ^ b ^ key0, right % 2**32, left >> 32 ^ d ^ key1, left % 2**32
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return np.stack([a, b, c, d]).astype(np.uint32)


def mlx_normal(seed):
    """MLX's own, a new key for each call."""
    keys = [mx.random.key(seed % 2**64)]

    def draw(shape):
        keys[0], now = mx.random.split(keys[0])
        return np.array(mx.random.normal(shape, key=now))

    return draw


RNGS = {"torch": torch_normal, "numpy": numpy_normal, "philox": philox_normal, "mlx": mlx_normal}


# %% 16. The same, faster --------------------------------------------------------------------------
# Functions that take the place of section 2's, with the same names, arguments and results up to
# rounding (test_fast_functions_equal_the_plain_ones). On a GPU, MLX's fused attention and norm. On
# a CPU, NumPy: MLX's Linux wheel (0.32.4) multiplies matrices there with plain loops, some 50 times
# slower than the OpenBLAS that comes with NumPy, and computes exp and erf one number at a time.
# An evaluated MLX array can be read by NumPy without a copy; going back is one copy.
#
# All CPU functions have one plan. The work is cut into blocks whose numbers fit a core's cache, and
# each core takes the next block when it has finished one, doing everything to it that there is to
# do: a product, its bias, its gelu. For that OpenBLAS must not start threads of its own inside.
#
# Weights may stay in 16 bits: each block widens those it needs, which costs less than the memory
# they would take. Sums are float32 throughout.


def view(x):
    """An MLX array as NumPy sees it, in float32, not copied if it has that type."""
    return np.array(x.astype(mx.float32), copy=False)


def raw(weight):
    """Weights as NumPy sees them, never copied; bfloat16, which NumPy lacks, as uint16."""
    return np.array(weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight, copy=False)


def widen(w):
    """What raw gives, or a part of it, -> float32. 16 bits use memory that the next call reuses.

    A bfloat16 is the upper half of a float32. A float16 has its exponent's 5 lower bits only: moved
    to a float32's place, the number is 2^-112 of what it should be. So it is multiplied by 2^112,
    which is exact and right for subnormal numbers too, and five times as fast as NumPy's astype.
    """
    if w.dtype == np.float32:
        return w
    wide = scratch("wide", *w.shape)
    bits = wide.view(np.int32)
    if w.dtype == np.uint16:
        np.copyto(bits, w)
        bits <<= 16
    else:
        np.copyto(bits, w.view(np.int16))  # the sign comes along ...
        bits <<= 13
        bits &= ~0x70001FFF  # ... and leaves copies of itself
        wide *= np.float32(2.0**112)
    return wide


LOCAL = threading.local()


def scratch(name, *shape):
    """Memory to compute in, which the next call of that name in this thread uses again.

    New memory comes in pages that the system has to find and clear.
    """
    size = math.prod(shape)
    if getattr(LOCAL, name, np.empty(0)).size < size:
        setattr(LOCAL, name, np.empty(size, np.float32))
    return getattr(LOCAL, name)[:size].reshape(shape)


@functools.cache
def openblas(verb):
    """OpenBLAS's function {verb}_num_threads in the library that NumPy uses; None for others."""
    try:
        library = ctypes.CDLL(sys.modules["numpy._core._multiarray_umath"].__file__)
    except (KeyError, OSError):
        return None
    for name in (
        "scipy_openblas_{}_num_threads64_",
        "scipy_openblas_{}_num_threads",
        "openblas_{}_num_threads64_",
        "openblas_{}_num_threads",
    ):
        if hasattr(library, name.format(verb)):
            return getattr(library, name.format(verb))
    return None


@functools.cache
def cores():
    """How many threads compute: as many as OpenBLAS was told to use, which is one per core."""
    return openblas("get")() if openblas("get") and openblas("set") else 1


@functools.cache
def pool():
    return ThreadPoolExecutor(max(1, cores() - 1), "sd.py")


class OneThreadEach:
    """While any thread is inside, OpenBLAS computes each product in the thread that asks for it."""

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, 1

    def __enter__(self):
        with self.lock:
            if self.inside == 0 and cores() > 1:
                self.before = openblas("get")()
                openblas("set")(1)
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and cores() > 1:
                openblas("set")(self.before)


ONE_THREAD_EACH = OneThreadEach()


LITTLE = 1 << 23  # products of two numbers; to wake the other cores takes longer


def share(f, *jobs, work):
    """f(job) for each combination of jobs, on all cores. work: how many products, roughly; to go
    over an array once counts as 16 a number.

    Little work is done here and now, and OpenBLAS may use what threads it likes. The miniature's
    25 steps took 3.4 s on two cores, and take 1.9 s so.
    """
    jobs = list(itertools.product(*jobs))
    if work < LITTLE:
        for job in jobs:
            f(*job)
        return
    left = iter(jobs)

    def take():
        for job in left:
            f(*job)

    with ONE_THREAD_EACH:
        helpers = [pool().submit(take) for _ in range(min(len(jobs), cores()) - 1)]
        try:
            take()
        finally:  # one that has not begun need not; the others may still be at their last job
            for helper in helpers:
                helper.cancel() or helper.result()


def cut(n, size):
    """0 ... n in slices of that size; the last may be smaller."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def blocks(n, o, c):
    """(n, o) cut into columns and rows of blocks: narrower ones where there are few rows, so that
    each core gets some, and so that a block's weights, c for each column, take at most 4 MB.
    """
    rows = cut(n, 512)
    pieces = -(-2 * cores() // len(rows))
    return cut(o, min(max(-(-o // pieces), 64), 640, max(64, 2**20 // c))), rows


def elementwise(f):
    """f(piece, out) on flat float32 pieces -> a function of MLX arrays of any shape."""

    def run(x):
        y, flat = scratch("out", x.size), view(x).reshape(-1)
        share(lambda at: f(flat[at], y[at]), cut(x.size, 1 << 18), work=16 * x.size)
        return mx.array(y.reshape(x.shape)).astype(x.dtype)

    return run


def cpu_sigmoid_times(x, out, k):
    """x / (1 + exp(-k x)), out may be x. Far on the left exp is infinite and the quotient 0."""
    t = scratch("t", *x.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        np.exp(np.multiply(x, np.float32(-k), out=t), out=t)
        t += 1
        np.divide(x, t, out=out)


def cpu_gelu(x, out):
    """gelu(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with erfc as exp times a polynomial.

    Abramowitz and Stegun 7.1.26: erfc is off by at most 1.5e-7. out must not be x.
    """
    size, t = scratch("size", *x.shape), scratch("t", *x.shape)
    np.abs(x, out=size)
    np.multiply(size, np.float32(0.3275911 / math.sqrt(2)), out=t)
    t += 1
    np.divide(1, t, out=t)
    np.multiply(t, np.float32(-1.061405429 / 2), out=out)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        out += np.float32(-coefficient / 2)
        out *= t
    np.multiply(size, np.float32(-0.5), out=t)
    t *= size
    out *= np.exp(t, out=t)
    out *= size
    out += np.maximum(x, 0, out=t)


def products(x, weight, bias, out):
    """out = x @ weight.T + bias for (n, c), (o, c) as raw gives it, (o,), (n, o)."""

    def block(columns, rows):
        y = np.matmul(x[rows], widen(weight[columns]).T, out=out[rows, columns])
        if bias is not None:
            y += bias[columns]

    share(block, *blocks(len(x), *weight.shape), work=len(x) * weight.size)


def cpu_linear(x, weight, bias=None):
    flat, weight = view(x).reshape(-1, x.shape[-1]), raw(weight)
    out = scratch("out", len(flat), len(weight))
    products(flat, weight, None if bias is None else view(bias), out)
    return mx.array(out.reshape(*x.shape[:-1], -1)).astype(x.dtype)


def cpu_geglu(x, weight, bias):
    flat, weight, bias = view(x).reshape(-1, x.shape[-1]), raw(weight), view(bias)
    half = len(weight) // 2
    out = scratch("out", len(flat), half)

    def block(columns, rows):
        gate = slice(columns.start + half, columns.stop + half)
        shape = rows.stop - rows.start, columns.stop - columns.start
        what, how_much = scratch("what", *shape), scratch("how_much", *shape)
        for part, y in ((columns, what), (gate, how_much)):
            np.matmul(flat[rows], widen(weight[part]).T, out=y)
            y += bias[part]
        gated = scratch("gated", *shape)
        cpu_gelu(how_much, gated)
        np.multiply(what, gated, out=out[rows, columns])

    share(block, *blocks(len(flat), half, flat.shape[1]), work=len(flat) * weight.size)
    return mx.array(out.reshape(*x.shape[:-1], -1)).astype(x.dtype)


def cpu_conv2d(x, weight, bias, stride=1, padding=1):
    b, h, w, c = x.shape
    tile = 4 if b * h * w >= 1024 else 2  # at 2 x 16 x 16 places 4 is no faster, and less exact
    fits = h % tile == 0 and w % tile == 0 and b * h * w >= 256 and c >= 16
    if stride == 1 and padding == 1 and weight.shape[1] == 3 and fits:
        y = conv_winograd(view(x), raw(weight), view(bias), tile)
    else:
        y = conv_windows(view(x), raw(weight), view(bias), stride, padding)
    return mx.array(y).astype(x.dtype)


def conv_windows(x, weight, bias, stride, padding):
    """A convolution as one matrix product: each window laid out as a row, some rows at a time."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    b, h, w, c = x.shape
    o, k, _, _ = weight.shape
    h, w = (h - k) // stride + 1, (w - k) // stride + 1
    s = x.strides
    windows = np.lib.stride_tricks.as_strided(
        x, (b, h, w, k, k * c), (s[0], stride * s[1], stride * s[2], s[1], s[3])
    )
    out = scratch("out", b, h, w, o)
    band = max(1, 2**24 // (w * k * k * c))  # 64 MB of windows at a time
    for i, rows in itertools.product(range(b), cut(h, band)):
        laid_out = windows[i, rows].reshape(-1, k * k * c)
        products(laid_out, weight.reshape(o, -1), bias, out[i, rows].reshape(-1, o))
    return out


# Winograd's F(4x4, 3x3): 36 products make 4 x 4 outputs, where the definition takes 144; and
# F(2x2, 3x3): 16 for 36. The matrices are those of Lavin and Gray, arXiv 1509.09308.
# fmt: off
WINOGRAD = {
    4: ([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
         [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1/4, 0, 0], [-1/6, -1/6, -1/6], [-1/6, 1/6, -1/6],
         [1/24, 1/12, 1/6], [1/24, -1/12, 1/6], [0, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
    2: ([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1/2, 1/2, 1/2], [1/2, -1/2, 1/2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]]),
}
# fmt: on
# A matrix for down and across in one: kron(m, m) times what lies in a square, written as a row.
WINOGRAD = {
    tile: [np.kron(m, m).astype(np.float32) for m in three] for tile, three in WINOGRAD.items()
}


def conv_winograd(x, weight, bias, tile):  # (b, h, w, c), (o, 3, 3, c) -> (b, h, w, o)
    """For each tile of the output, with numbers in a row where they lie in a square:

        v = forth window      (side^2, c)       u = weigh filter      (side^2, c) for each of o
        m[i] = u[i] v[i]      (side^2, o)       tile = back m         (tile^2, o)

    A band of tiles at a time: v of all its tiles, shared by rows; then the rest, by columns of o.
    """
    forth, weigh, back = WINOGRAD[tile]
    b, h, w, c = x.shape
    o, side = len(weight), tile + 2  # windows of side x side make tiles of tile x tile
    down, across = h // tile, w // tile
    out = scratch("out", b * down, tile, across, tile, o)
    for band in cut(b * down, max(1, 2**23 // (side * side * across * c))):  # of rows of tiles
        rows = band.stop - band.start
        v = scratch("v", side * side, rows, across * c)

        def transform(row, v=v, start=band.start):
            i, top = divmod(start + row, down)
            top = top * tile - 1
            padded = scratch("padded", side, w + 2, c)
            padded[:, [0, -1]] = 0
            above, below = max(0, -top), max(0, top + side - h)
            padded[:above] = padded[side - below :] = 0
            padded[above : side - below, 1:-1] = x[i, top + above : top + side - below]
            s = padded.strides
            windows = np.lib.stride_tricks.as_strided(
                padded, (side, side, across, c), (s[0], s[1], tile * s[1], s[2])
            )
            t = scratch("t", side, side, across, c)
            np.copyto(t, windows)
            np.matmul(forth, t.reshape(side * side, -1), out=v[:, row])

        def multiply(columns, v=v, band=band):
            n, o = v.shape[1] * across, columns.stop - columns.start
            filters = widen(weight[columns]).reshape(o, 9, c)
            u = np.matmul(weigh, filters, out=scratch("u", o, side * side, c))
            m = scratch("m", side * side, n, o)
            np.matmul(v.reshape(side * side, n, c), u.transpose(1, 2, 0), out=m)
            y = np.matmul(back, m.reshape(side * side, -1), out=scratch("y", tile * tile, n * o))
            y = y.reshape(tile, tile, -1, across, o).transpose(2, 0, 3, 1, 4)
            np.add(y, bias[columns], out=out[band, ..., columns])

        share(transform, range(rows), work=side * side * v.size)
        share(multiply, cut(o, min(max(-(-o // cores()), 64), 640)), work=o * v.size)
    return out.reshape(b, h, w, o)


def cpu_group_norm(x, weight, bias, groups, epsilon, then=None):
    """then(piece, out): what else to do to each piece."""
    dtype, (b, h, w, c) = x.dtype, x.shape
    x, out = view(x).reshape(b, h * w, c), scratch("out", b, h * w, c)
    pieces = cut(h * w, max(1, (1 << 18) // c))
    # Sums of x - pivot: the first place's values, so that a mean far from 0 costs no digits.
    pivot, sums = x[:, :1], np.empty((2, b, len(pieces), c), np.float32)

    def add_up(i, number):
        off = x[i, pieces[number]] - pivot[i]
        off.sum(0, out=sums[0, i, number])
        off *= off
        off.sum(0, out=sums[1, i, number])

    share(add_up, range(b), range(len(pieces)), work=16 * x.size)
    first, second = sums.sum(2, dtype=np.float64) / (h * w)  # (b, c) each
    inside = (second - first**2).reshape(b, groups, -1)  # variance of each channel
    means = (first + pivot[:, 0]).reshape(b, groups, -1)
    middle = means.mean(2, keepdims=True)
    # Variance of a group: that inside its channels, and that of their means.
    variance = inside.mean(2, keepdims=True) + ((means - middle) ** 2).mean(2, keepdims=True)
    scale = np.broadcast_to(1 / np.sqrt(variance + epsilon), means.shape).reshape(b, c)
    scale = (scale * view(weight)).astype(np.float32)
    middle = np.broadcast_to(middle, means.shape).reshape(b, c).astype(np.float32)
    shift = view(bias)

    def apply(i, piece):
        y = np.subtract(x[i, piece], middle[i], out=out[i, piece])
        y *= scale[i]
        y += shift
        if then:
            then(y, y)

    share(apply, range(b), pieces, work=16 * x.size)
    return mx.array(out.reshape(b, h, w, c)).astype(dtype)


def cpu_layer_norm(x, weight, bias):
    c, weight, bias = x.shape[-1], view(weight), view(bias)
    flat = view(x).reshape(-1, c)
    out = scratch("out", *flat.shape)

    def norm(at):
        y = np.subtract(flat[at], flat[at].mean(1, keepdims=True), out=out[at])
        variance = np.einsum("nc,nc->n", y, y)[:, None] / np.float32(c)
        y *= 1 / np.sqrt(variance + np.float32(1e-5))
        y *= weight
        y += bias

    share(norm, cut(len(flat), max(1, (1 << 18) // c)), work=16 * x.size)
    return mx.array(out.reshape(x.shape)).astype(x.dtype)


def cpu_attention(q, k, v, heads, causal=False):
    """A few hundred rows of scores at a time, so that they stay in the cache.

    A column of ones beside v makes the product that mixes v also sum each row of weights.
    """
    dtype, (b, n, c) = q.dtype, q.shape
    if c % heads:
        raise ValueError(f"{c} channels can't be shared by {heads} heads.")
    q, k, v = view(q), view(k), view(v)
    m, d = k.shape[1], c // heads
    out, ones = scratch("out", b, n, c), np.ones((m, 1), np.float32)

    def block(i, head, rows):
        at = slice(head * d, head * d + d)
        scores = scratch("scores", rows.stop - rows.start, m)
        np.matmul(q[i, rows, at] * np.float32(d**-0.5), k[i, :, at].T, out=scores)
        if causal:
            scores[np.arange(rows.start, rows.stop)[:, None] < np.arange(m)] = -np.inf
        # The softmax does not change when a number is taken from a whole row. That is needed only
        # where exp would leave float32's range, 1e-38 to 1e38; a row's largest counts.
        top = scores.max(-1, keepdims=True)
        if top.max() > 60 or top.min() < -60:
            scores -= top
        mixed = np.exp(scores, out=scores) @ np.concatenate([v[i, :, at], ones], axis=1)
        np.divide(mixed[:, :-1], mixed[:, -1:], out=out[i, rows, at])

    share(block, range(b), range(heads), cut(n, 256), work=2 * b * n * m * c)
    return mx.array(out).astype(dtype)


def twins(f, count=1):
    """f, computed once where both halves of the batch are the same in its first arguments.

    With guidance that is so until the UNet's first cross-attention, which is the first to see the
    sentence: one of five self-attentions at full size among them, and three convolutions.
    """

    def same(x):
        first, second = np.split(view(x), 2)
        few = first.reshape(-1)[:64], second.reshape(-1)[:64]  # nearly always tells them apart
        return np.array_equal(*few) and np.array_equal(first, second)

    def run(*arguments):
        batch, rest = arguments[:count], arguments[count:]
        if len(batch[0]) % 2 or not all(same(x) for x in batch):
            return f(*arguments)
        y = f(*(x[: len(x) // 2] for x in batch), *rest)
        return mx.concatenate([y, y])

    return run


def gpu_layer_norm(x, weight, bias):
    return mx.fast.layer_norm(x, weight, bias, 1e-5)


def gpu_attention(q, k, v, heads, causal=False):
    b, n, c = q.shape
    q, k, v = (y.reshape(b, -1, heads, c // heads).transpose(0, 2, 1, 3) for y in (q, k, v))
    mask = "causal" if causal else None
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=(c // heads) ** -0.5, mask=mask)
    return y.transpose(0, 2, 1, 3).reshape(b, n, c)


PLAIN = linear, conv2d, group_norm, layer_norm, attention
PLAIN += silu, norm_silu, gelu, quick_gelu, geglu
SILU = functools.partial(cpu_sigmoid_times, k=1)
KERNELS = {
    "plain": {f.__name__: f for f in PLAIN},
    "cpu": {
        "linear": twins(cpu_linear),
        "geglu": cpu_geglu,
        "conv2d": twins(cpu_conv2d),
        "group_norm": cpu_group_norm,
        "norm_silu": functools.partial(cpu_group_norm, then=SILU),
        "layer_norm": cpu_layer_norm,
        "attention": twins(cpu_attention, 3),
        "silu": elementwise(SILU),
        "gelu": elementwise(cpu_gelu),
        "quick_gelu": elementwise(functools.partial(cpu_sigmoid_times, k=1.702)),
    },
    "gpu": {"layer_norm": gpu_layer_norm, "attention": gpu_attention},
}


def use_kernels(name):
    """From now on the names of section 2 mean these functions: "plain", "cpu" or "gpu"."""
    globals().update(KERNELS["plain"] | KERNELS[name])


def compiled(network):
    """On a GPU: the UNet as one graph, whose small steps MLX joins. t becomes an array, since each
    new number would mean a new graph. Else the network itself.
    """
    if on_cpu() or not isinstance(network, nn.Module):
        return network
    graph = mx.compile(network)
    return lambda x, t, context: graph(x, mx.array(t, mx.float32), context)


def on_cpu():
    return mx.default_device() == mx.Device(mx.cpu)


def keep_memory():
    """Ask glibc to keep the memory that one big array leaves for the next one.

    It would give it back to the system and ask for it anew, and the system clears every page:
    a VAE decode to 512 x 512 took 10 s that way, and takes 6.9 s so. Up to 1 GB stays.
    """
    M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
    call_glibc("mallopt", M_MMAP_MAX, 0)
    call_glibc("mallopt", M_TRIM_THRESHOLD, 1 << 30)


def call_glibc(name, *arguments):
    """Nothing where there is another C library."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return
    function(*arguments)


if on_cpu():
    use_kernels("cpu")
    keep_memory()
else:
    use_kernels("gpu")


# %% 17. Files, and less memory --------------------------------------------------------------------
# A flat file is one safetensors file: every network's weights under the attribute paths of the
# classes above (unet.down.1.0.conv1.weight), the tokenizer's merges as bytes, and in the header a
# "config" with the numbers. That of Stable Diffusion 1.5:
#
#   {"kind": "model", "name": "Stable Diffusion 1.x", "size": 512, "prediction": "eps",
#    "cfg": 7.5,
#    "text": {"width": 768, "layers": 12, "heads": 12, "activation": "quick_gelu",
#             "vocabulary": 49408, "pad": 49407},
#    "unet": {"widths": [320, 640, 1280, 1280], "heads": [8, 8, 8, 8], "groups": 32,
#             "context_width": 768},
#    "vae": {"widths": [128, 256, 512, 512], "groups": 32, "scale": 0.18215}}


FORMAT = "sd.py 1"


def read_flat(path, kind="model"):
    """-> (config, {name: array}) of a flat file, or ValueError saying what is wrong with it.

    The arrays are read from the disk only when they are first used.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no {kind} at {path}. Give one that is there, or make it with convert_weights.py."
        )
    try:
        # MLX trusts what the header says about sizes; safetensors checks it. So that goes first.
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}). {convert_it(path)}") from None
    if metadata.get("format", "").startswith("sd.py") and metadata["format"] != FORMAT:
        raise ValueError(f"{path} is of another version, {metadata['format']!r}. {AGAIN}")
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} was not made by convert_weights.py. {convert_it(path)}")
    try:
        weights = mx.load(str(path), format="safetensors")
    except RuntimeError as error:
        raise ValueError(f"{path} can't be read: {error}.") from None
    try:
        config = json.loads(metadata.get("config", ""))
        is_a = config["kind"]
        config.pop("words", None)  # these come from files of their own (section 11)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged config ({error}). {AGAIN}") from None
    if is_a != kind:
        raise ValueError(f"{path} is a {is_a}, and a {kind} is needed.")
    parts = {name.split(".")[0] for name in weights}
    whole = parts - {"safety"} == PARTS and "tokenizer.merges" in weights
    if kind == "model" and not whole:
        raise ValueError(f"{path} has the parts {', '.join(sorted(parts))}. {AGAIN}")
    return config, weights


PARTS = {"tokenizer", "text_encoder", "unet", "vae"}


def networks(config, path):
    """-> the TextEncoder, UNet and VAE that a config describes, still without weights."""
    try:
        check_config(config)
        numbers = {part: dict(config[part]) for part in ("text", "unet", "vae")}
        numbers["text"].pop("pad")
        numbers["vae"].pop("scale")
        return TextEncoder(**numbers["text"]), UNet(**numbers["unet"]), VAE(**numbers["vae"])
    except CAN_NOT_BE as error:
        raise ValueError(f"{path} has a config that can't be ({error!r}). {AGAIN}") from None


CAN_NOT_BE = (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError, RuntimeError)


def check_unet(unet):
    numbers = [*unet["widths"], *unet["heads"], unet["groups"], unet["context_width"]]
    numbers.append(unet.get("channels", 4))
    if not all(type(n) is int and 0 < n < 1 << 20 for n in numbers):
        raise ValueError("a number of the UNet")
    if any(c % unet["groups"] or c % heads for c, heads in zip(unet["widths"], unet["heads"])):
        raise ValueError("heads or groups of the UNet")


def check_config(config):
    """ValueError or TypeError for numbers that would fail later, or paint something wrong."""
    text, unet, vae = config["text"], config["unet"], config["vae"]
    check_unet(unet)
    right = {
        "size": config["size"] % 64 == 0 < config["size"],
        "cfg": math.isfinite(config["cfg"]),
        "prediction": config["prediction"] in ("eps", "v"),
        "activation": text["activation"] in ("quick_gelu", "gelu"),
        # MLX does not check the rows it takes from a table: beyond its end is beyond its memory.
        "vocabulary": text["vocabulary"] > END,
        "pad": 0 <= text["pad"] < text["vocabulary"],
        "text heads": text["width"] % text["heads"] == 0,
        "groups": all(c % vae["groups"] == 0 for c in vae["widths"]),
        "scale": 0 < vae["scale"] < math.inf,
    }
    if wrong := [name for name, good in right.items() if not good]:
        raise ValueError(", ".join(wrong))


AGAIN = "Make it again from the checkpoint, with convert_weights.py."


def convert_it(path):
    return (
        f"Make a flat file of it once:\n       python convert_weights.py {shlex.quote(str(path))}"
    )


def fill(network, weights, prefix, dtype):
    """Give a network its weights: each parameter one tensor of its shape, none left over.

    They are still on the disk: MLX reads each when it is first used. On a CPU matrices that have
    16 bits in the file keep them, for section 16 widens them in passing; it takes half the memory.
    """
    start = prefix + "."
    given = {name[len(start) :]: w for name, w in weights.items() if name.startswith(start)}
    wanted = {name: p.shape for name, p in tree_flatten(network.parameters())}
    missing = sorted(wanted.keys() - given.keys())
    unknown = sorted(given.keys() - wanted.keys())
    misfits = sorted(n for n in wanted.keys() & given.keys() if wanted[n] != given[n].shape)
    if missing or unknown or misfits:
        raise ValueError(
            f"the model file does not fit: {prefix} has {len(missing)} tensors missing, "
            f"{len(unknown)} unknown, {len(misfits)} of the wrong shape; the first: "
            f"{(missing + unknown + misfits)[0]}. {AGAIN}"
        )
    for name, w in given.items():
        narrow = on_cpu() and w.ndim > 1 and "embedding" not in name and w.dtype.size < dtype.size
        given[name] = w if narrow else w.astype(dtype)
    network.load_weights(list(given.items()))


def in_tiles(f, x, size, step_in, step_out):
    """f(x) computed on overlapping squares, which are blended where they overlap.

    x (b, h, w, c); size: of a square, in latents; step_in, step_out: what one latent is in x and in
    f(x), so 1 and 8 to decode, 8 and 1 to encode. Up to size it is f(x) itself. Beyond, each square
    has its own GroupNorm, so that the result is not the same; the ramps hide where one ends.
    """
    h, w = x.shape[1] // step_in, x.shape[2] // step_in
    if max(h, w) <= size:
        return f(x)

    def starts(n):  # evenly, overlapping by a quarter or more
        count = 1 if n <= size else -(-(n - size) // (size * 3 // 4)) + 1
        return [round(i * (n - size) / max(1, count - 1)) if n > size else 0 for i in range(count)]

    def ramp(n):  # 1, 2 ... in the middle ... 2, 1
        n *= step_out
        return np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)).astype(np.float32)

    total = None
    for top, left in itertools.product(starts(h), starts(w)):
        height, width = min(size, h), min(size, w)
        rows, columns = (
            slice(start * step_in, (start + n) * step_in)
            for start, n in ((top, height), (left, width))
        )
        y = np.array(f(x[:, rows, columns]))
        if total is None:
            total = np.zeros((len(y), h * step_out, w * step_out, y.shape[-1]), np.float32)
            weights = np.zeros((h * step_out, w * step_out, 1), np.float32)
        at = np.s_[
            top * step_out : (top + height) * step_out, left * step_out : (left + width) * step_out
        ]
        weight = (ramp(height)[:, None] * ramp(width))[:, :, None]
        total[:, *at] += weight * y
        weights[at] += weight
    return mx.array(total / weights)


class OneByOne:
    """A network, called for one picture of the batch after another."""

    def __init__(self, network):
        self.network = network

    def __call__(self, *arguments):
        out = []
        for i in range(len(arguments[0])):
            one = tree_map(lambda a, i=i: a[i : i + 1] if isinstance(a, mx.array) else a, arguments)
            out.append(self.network(*one))
            mx.eval(out)
        return mx.concatenate(out)


class InTiles:
    """A VAE that works on squares of the size it was trained on."""

    def __init__(self, network, size):
        self.network, self.size = network, size

    def decode(self, x):
        return in_tiles(self.network.decode, x, self.size, 1, 8)

    def encode(self, pictures):
        both = in_tiles(
            lambda p: mx.concatenate(self.network.encode(p), -1), pictures, self.size, 8, 1
        )
        return mx.split(both, 2, axis=-1)


class LowMemory(StableDiffusion):
    """StableDiffusion with one network in memory at a time, batches of one, and a VAE in tiles.

    The pictures are the same up to rounding where they fit one tile, the size the model was trained
    on. The price is reading the weights again for each run. ControlNets stay in memory.
    """

    def read(self):
        self.text_encoder, self.unet = OneByOne(self.text_encoder), OneByOne(self.unet)
        self.vae = InTiles(self.vae, self.config["size"] // 8)

    def let_go(self, name, network, dtype):
        """Forget a network's weights until it is called again."""
        fill(network, self.open()[1], name, dtype)
        mx.clear_cache()
        call_glibc("malloc_trim", 0)  # also what keep_memory keeps

    def guided(self, *arguments):
        self.let_go("vae", self.vae.network, mx.float32)
        eps_at = super().guided(*arguments)
        self.let_go("text_encoder", self.text_encoder.network, self.dtype)
        return eps_at

    def decode(self, x):
        self.let_go("unet", self.unet.network, self.dtype)
        return super().decode(x)

    def encode(self, *arguments):
        x = super().encode(*arguments)
        mx.eval(x)
        self.let_go("vae", self.vae.network, mx.float32)
        return x


# %% 18. Command line ------------------------------------------------------------------------------
# Options, messages, files. Whatever can be wrong is found out before the painting begins, and said
# in one message: what, with which value, and what to do now. No file that is there is overwritten.


def check_options(steps, cfg, sampler, width, height, n_images, rng):
    """ValueError for whatever generate_latents can't do."""
    for name, value in (("width", width), ("height", height)):
        if value % 64 or value < 64:
            low = max(64, value // 64 * 64)
            raise ValueError(
                f"{name} {value} is not a multiple of 64. The UNet halves the latents three times, "
                f"and they are 1/8 of the picture. Nearest: {low} or {low + 64}."
            )
    if not 1 <= steps <= 999:
        raise ValueError(f"steps {steps} can't be: at least 1, at most 999. 20 to 50 are usual.")
    if not math.isfinite(cfg):
        raise ValueError(f"cfg {cfg} can't be: a number, 1 for none, 7.5 for the usual.")
    if n_images < 1:
        raise ValueError(f"n_images {n_images} can't be: at least 1.")
    for name, value, known in (("sampler", sampler, SAMPLERS), ("rng", rng, RNGS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known. There are: {', '.join(known)}.")


def stop(message):
    """End with exit status 2 and no traceback."""
    print(f"sd.py: {message}", file=sys.stderr)
    sys.exit(2)


def header_of(path):
    """A flat file's metadata; {} for whatever is no safetensors file."""
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def flat_file(path):
    """path, or for another program's file what convert_weights.py makes of it, once."""
    if not path.exists() or header_of(path).get("format", "").startswith("sd.py"):
        return path  # a path that is not there gets its message from read_flat
    if not (HERE / "convert_weights.py").is_file():
        raise ValueError(f"{path} was not made by convert_weights.py. {convert_it(path)}")
    import convert_weights

    return convert_weights.flat_file(path, functools.partial(print, file=sys.stderr))


def free_name(path):
    """path, or the first of path-2, path-3 ... that is not taken: no picture is overwritten.

    It is taken at once, by an empty file, for other processes may be looking for names, too.
    """
    for i in range(1, 10**9):
        name = path.with_stem(f"{path.stem}-{i}") if i > 1 else path
        try:
            open(name, "xb").close()
        except FileExistsError:
            continue
        return name


def check_output(path):
    if not path.name.lower().endswith(".png") or path.suffix == "":
        raise ValueError(f"--output {path}: the one kind of file that is written is NAME.png.")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}. Make it first.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"--output {path}: its folder can't be written ({error.strerror})."
        ) from None
    if len(os.fsencode(path.name)) > 220:  # systems allow 255, and numbers may have to go in
        raise ValueError(f"--output {path}: the name is too long.")


# The names that other programs use for our options in a PNG, and how to read what stands there.
OTHER_NAMES = {
    "euler a": "euler-a", "dpm++ 2m": "dpm++", "dpm++ 2m karras": "dpm++-karras",
    "cpu": "torch", "nv": "philox", "gpu": "philox",
}  # fmt: skip
known_as = lambda name: OTHER_NAMES.get(name.lower(), name.lower())
PARAMETERS = {
    "Steps": ("steps", int), "Sampler": ("sampler", known_as), "CFG scale": ("cfg", float),
    "Seed": ("seed", int), "RNG": ("rng", known_as), "dtype": ("dtype", str),
    "Denoising strength": ("strength", float), "Image": ("image", Path), "Mask": ("mask", Path),
    "Clip skip": ("clip_skip", int), "Lora": ("lora", shlex.split), "Words": ("words", shlex.split),
    "ControlNet": ("controlnet", shlex.split), "Control image": ("control_image", shlex.split),
    "Model file": ("model", Path), "Plain prompt": ("plain_prompt", "True".__eq__),
    "Low memory": ("low_memory", "True".__eq__),
}  # fmt: skip


def parameters(args, prompt, seed, width, height, images=1):
    """What makes the picture again, as other tools write it: the PNG's "parameters" text."""
    found = {"Steps": args.steps, "Sampler": args.sampler.upper(), "CFG scale": args.cfg}
    found |= {"Seed": seed, "Size": f"{width}x{height}", "Model": args.model.stem}
    for name, (option, kind) in PARAMETERS.items():
        value = getattr(args, option)
        if value not in (None, [], False, TINY):
            found.setdefault(name, shlex.join(value) if kind is shlex.split else value)
    found |= {"Images": images, "Version": "sd.py"}
    quote = lambda v: json.dumps(str(v)) if set(str(v)) & set(',:"\n') else v
    negative = f"\nNegative prompt: {args.negative_prompt}" if args.negative_prompt else ""
    return f"{prompt}{negative}\n" + ", ".join(f"{name}: {quote(v)}" for name, v in found.items())


def read_parameters(path):
    """-> {option: value} from a PNG's "parameters"."""
    try:
        with Image.open(path) as image:
            text = image.info.get("parameters")
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise ValueError(f"--from-png {path}: {error}") from None
    if not isinstance(text, str) or "\nSteps: " not in text:
        raise ValueError(f"--from-png {path}: it does not say how it was made.")
    text, _, line = text.rpartition("\nSteps: ")
    prompt, _, negative = text.partition("\nNegative prompt: ")
    options = {"prompt": prompt, "negative_prompt": negative}
    pattern = r'\s*([^:,]+): ("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)'
    try:
        for name, value in regex.findall(pattern, "Steps: " + line):
            value = json.loads(value) if value.startswith('"') else value
            if name == "Size":
                options["width"], options["height"] = map(int, value.split("x"))
            elif name in PARAMETERS:
                option, kind = PARAMETERS[name]
                options[option] = kind(value)
    except ValueError as error:
        raise ValueError(f"--from-png {path}: its parameters can't be read ({error}).") from None
    if "image" not in options:  # AUTOMATIC1111's, for a step that enlarges ("hires fix")
        options.pop("strength", None)
    return options


def save(picture, path, text):
    """Write under another name first, so that a full disk can't leave half a picture."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text.encode(errors="replace").decode())
    number, part = tempfile.mkstemp(suffix=".part", dir=path.parent)
    try:
        with open(number, "wb") as file:
            picture.save(file, format="PNG", pnginfo=info)
        os.chmod(part, 0o644)  # mkstemp's files are for their owner only
        path = free_name(path)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    print(f"saved {path}")


def grid(pictures, rows):
    """Pictures of one size in rows, left to right, top to bottom; black where there are too few."""
    columns = -(-len(pictures) // rows)
    w, h = pictures[0].size
    sheet = Image.new("RGB", (columns * w, rows * h))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    return sheet


def show_tokens(sd, text):
    """How section 13 reads the prompt, or with --plain-prompt section 1."""
    if sd.plain_prompt:
        words = [(*word, 1.0) for word in sd.tokenizer.words(text)]
        counts = [sum(len(ids) for _, _, ids, _ in words)]
    else:
        words, counts = read_words(sd, text), map(len, chunks(sd, text))
    for word, pieces, ids, weight in words:
        times = "" if weight in (None, 1.0) else f"  x {weight:.3g}"
        print(f"{word:20s} {' '.join(pieces):30s} {' '.join(map(str, ids))}{times}".rstrip())
    print(" + ".join(map(str, counts)), "of 75 tokens")


PROMPT = "a red house on the grass at sunset"


def with_number(text):
    """FILE or FILE:NUMBER -> path, number; 1 if there is none."""
    if Path(text).exists():
        return Path(text), 1.0
    file, colon, number = text.rpartition(":")
    try:
        path, number = (file, float(number)) if colon and file else (text, 1.0)
    except ValueError:  # a colon in the name
        path, number = text, 1.0
    if not math.isfinite(number):
        raise ValueError(f"{text}: {number} can't be. Give a number, 1 for the usual.")
    return Path(path), number


def model_of(args):
    """-> the StableDiffusion that the options describe."""
    changes = [lora(flat_file(path), strength) for path, strength in map(with_number, args.lora)]
    changes += [words(flat_file(Path(path))) for path in args.words]
    changes += [clip_skip(args.clip_skip)] if args.clip_skip is not None else []
    model = LowMemory if args.low_memory else StableDiffusion
    sd = model(flat_file(args.model), args.dtype, changes)
    sd.plain_prompt = args.plain_prompt
    if args.safety_check:
        sd.checked([])  # so that a damaged one is noticed now
    args.dtype = str(sd.dtype).removeprefix("mlx.core.")
    args.cfg = sd.config["cfg"] if args.cfg is None else args.cfg
    return sd


def way_of(sd, args):
    """-> how to go from noise to picture, as section 8 or 9 does; None: the usual way."""
    nine = sd.config["unet"].get("channels") == 9
    if args.image is None:
        for option in ("mask", "strength"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option} needs a picture, --image FILE.")
        if nine:
            raise ValueError(f"{args.model} paints into pictures only: give --image and --mask.")
        return None
    picture, opaque = load_picture(args.image, args.width, args.height, green_is_hole=True)
    args.height, args.width, _ = picture.shape
    mask, picture = find_mask(picture, opaque, args.mask)
    if args.mask or mask.mean() > 0.005:  # not for a few green or transparent pixels
        args.strength = 1.0 if args.strength is None else args.strength
        way = Inpainting(sd, picture, mask, args.strength)
        print(f"painting {mask.mean():.0%} of {args.image.name}", file=sys.stderr)
        return way
    if nine:
        raise ValueError(f"{args.model} paints into pictures only: say where, with --mask.")
    args.strength = 0.75 if args.strength is None else args.strength
    return FromPicture(sd, picture, args.strength)


def with_controls(sd, args):
    if not args.controlnet and not args.control_image:
        return sd
    if len(args.controlnet) != len(args.control_image):
        raise ValueError(
            f"{len(args.controlnet)} --controlnet and {len(args.control_image)} --control-image: "
            "each of the first needs one of the second."
        )
    width, height = (n or sd.config["size"] for n in (args.width, args.height))
    controls = []
    for (path, weight), image in zip(map(with_number, args.controlnet), args.control_image):
        picture, _ = load_picture(image, width, height)
        controls.append((ControlNet(flat_file(path), sd.dtype), picture, weight))
    return sd.controlled(*controls)


def read_prompts(path):
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: it is no text in UTF-8 ({error}).") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {path}: it is empty. Write one prompt on each line.")
    return prompts


def share_of_this_process(prompts, n_images):
    """Yield (prompt, number of its first picture, how many, number of that among all).

    Started with mlx.launch -n 2 python sd.py ..., two processes paint half of the pictures each.
    """
    group = mx.distributed.init()
    everything = list(itertools.product(range(len(prompts)), range(n_images)))
    start, end = (len(everything) * (group.rank() + k) // group.size() for k in (0, 1))
    mine = enumerate(everything[start:end], start)
    for k, pictures in itertools.groupby(mine, key=lambda picture: picture[1][0]):
        pictures = list(pictures)
        yield prompts[k], pictures[0][1][1], len(pictures), pictures[0][0]


def paint(sd, args, way, prompts):
    """Every prompt's pictures, or this process's share of them."""
    for text in [*prompts, args.negative_prompt] if args.plain_prompt else []:
        if unread := sd.tokenizer.unread(text):
            print(f'sd.py: the prompt is too long. Not read: "{unread}"', file=sys.stderr)
    for prompt, first, count, number in share_of_this_process(prompts, args.n_images):
        paint_prompt(sd, args, way, prompt, args.seed + first, count, number)


def paint_prompt(sd, args, way, prompt, seed, count, number):
    """Run the generator, say after each step how long the rest will take, and save the pictures.

    number: that of the first picture among those of all processes.
    """

    def finished(x):
        pictures = sd.to_pictures(x, args.decode_batch)
        pictures = way.finish(pictures) if way else pictures
        pictures, flagged = sd.checked(pictures) if args.safety_check else (pictures, [])
        for i in flagged:
            print(f"sd.py: the safety checker blacked out seed {seed + i}", file=sys.stderr)
        return pictures

    def keep(picture, k, step=None, images=1, size=None):
        path = args.output
        if mx.distributed.init().size() > 1 and number + k:  # not the names of other processes
            path = path.with_stem(f"{path.stem}-{number + k + 1}")
        path = path if step is None else path.with_stem(f"{path.stem}-step-{step:03d}")
        save(picture, path, parameters(args, prompt, seed + k, *(size or picture.size), images))

    names = "negative_prompt", "steps", "cfg", "sampler", "width", "height", "rng"
    options = {name: getattr(args, name) for name in names}
    options["variations"] = [way.vary] if way else []
    steps = len(way.rest(range(args.steps))) if way else args.steps
    end = "\r" if sys.stderr.isatty() else "\n"
    start = time.perf_counter()
    walk = sd.generate_latents(prompt, seed=seed, n_images=count, **options)
    for i, x in enumerate(walk, 1):
        pace = (time.perf_counter() - start) / i
        line = f"step {i}/{steps}  {pace:.2f} s a step  {pace * (steps - i):.0f} s left "
        print(line, end=end if i < steps else "\n", file=sys.stderr, flush=True)
        if args.save_every and i % args.save_every == 0 and i < steps:
            for k, picture in enumerate(finished(x)):
                keep(picture, k, step=i, images=f"step {i}")
    pictures = finished(x)
    if args.n_rows:
        images, size = f"{count} in {args.n_rows} rows", pictures[0].size
        keep(grid(pictures, args.n_rows), 0, images=images, size=size)
    else:
        for k, picture in enumerate(pictures):
            keep(picture, k)


def make_parser():
    p = argparse.ArgumentParser(
        prog="sd.py",
        description="Paint a sentence with Stable Diffusion.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python sd.py --prompt "a blue boat at night" --seed 7
  python sd.py --prompt "a green tree" --n-images 4 --n-rows 2
  python sd.py --model sd-v1-4.ckpt --prompt "a lighthouse in a storm, oil on canvas" """,
    )
    # fmt: off
    g = p.add_argument_group("what to paint")
    g.add_argument("--prompt", metavar="TEXT",
                   help=f'what to paint (default: "{PROMPT}"; nothing with --image)')
    g.add_argument("--negative-prompt", default="", metavar="TEXT",
                   help="what not to paint (default: nothing)")
    g.add_argument("--prompts", type=Path, metavar="FILE",
                   help="paint each line of this text instead")
    g.add_argument("--plain-prompt", action="store_true",
                   help="read it as CLIP alone would: 75 tokens, brackets and all")
    g.add_argument("--width", type=int, metavar="N",
                   help="in pixels, a multiple of 64 (default: what the model was trained on)")
    g.add_argument("--height", type=int, metavar="N", help="likewise")
    g.add_argument("--n-images", type=int, default=1, metavar="N",
                   help="how many; the second has seed + 1, and so on (default: 1)")
    g.add_argument("--n-rows", type=int, metavar="N",
                   help="put all of them into one picture with N rows (default: a file each)")
    g = p.add_argument_group("how to paint it")
    g.add_argument("--seed", type=int, default=42, metavar="N",
                   help="the noise to start from, as torch.manual_seed(N) gives it on a CPU "
                        "(default: 42)")
    g.add_argument("--steps", type=int, default=50, metavar="N",
                   help="from noise to picture, a UNet call each, for PLMS one more (default: 50)")
    g.add_argument("--cfg", type=float, metavar="S",
                   help="how far to follow the prompt: 1 follows, 7.5 insists (default: the "
                        "model's, 7.5 for Stable Diffusion, 2 for the miniature)")
    g.add_argument("--sampler", default="plms", choices=SAMPLERS,
                   help="how to walk from noise to picture (default: plms)")
    g.add_argument("--rng", default="torch", choices=RNGS,
                   help="whose random numbers: PyTorch's on a CPU, NumPy's, those of NVIDIA GPUs, "
                        "MLX's (default: torch)")
    g.add_argument("--from-png", type=Path, metavar="FILE",
                   help="as this picture was made; other options given count more")
    g = p.add_argument_group("from a picture")
    g.add_argument("--image", type=Path, metavar="FILE",
                   help="begin with this; if a part is transparent or pure green, paint only that")
    g.add_argument("--strength", type=float, metavar="S",
                   help="how much of the way from noise to walk: 0.3 touches up, 1 keeps next to "
                        "nothing (default: 0.75, and 1 where only a part is painted)")
    g.add_argument("--mask", type=Path, metavar="FILE",
                   help="paint only where this picture is white")
    g.add_argument("--controlnet", action="append", default=[], metavar="FILE[:WEIGHT]",
                   help="a ControlNet; may be repeated")
    g.add_argument("--control-image", action="append", default=[], metavar="FILE",
                   help="what it is to follow, such as edges; one for each")
    g = p.add_argument_group("with what, and where to")
    g.add_argument("--model", type=Path, default=TINY, metavar="FILE",
                   help="a flat file; or a checkpoint or diffusers folder, which is converted once "
                        "(default: the miniature that comes with this program)")
    g.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                   help="a LoRA; may be repeated")
    g.add_argument("--words", action="append", default=[], metavar="FILE",
                   help="a textual inversion, whose name becomes a word; may be repeated")
    g.add_argument("--clip-skip", type=int, metavar="N",
                   help="2: leave out the text model's last layer, and so on (default: 1)")
    g.add_argument("--no-safety-check", dest="safety_check", action="store_false",
                   help="show what the model's safety checker, if it has one, would black out")
    g.add_argument("--dtype", choices=DTYPES,
                   help="to compute in (default: float32 on a CPU, float16 on a GPU)")
    g.add_argument("--low-memory", action="store_true",
                   help="one network in memory at a time, one picture at a time, the VAE in tiles")
    g.add_argument("--output", type=Path, default=Path("out.png"), metavar="FILE",
                   help="a .png; if it exists, -2, -3 ... is added to the name (default: out.png)")
    g.add_argument("--save-every", type=int, metavar="N",
                   help="also the picture after every N steps, as NAME-step-010.png")
    g.add_argument("--decode-batch", type=int, default=1, metavar="N",
                   help="how many to decode at once: faster on a GPU, more memory (default: 1)")
    g.add_argument("--show-tokens", action="store_true",
                   help="only print how the prompt is cut into tokens")
    # fmt: on
    return p


def check_arguments(args):
    if args.n_rows is not None and not 1 <= args.n_rows <= args.n_images:
        message = f"--n-rows {args.n_rows} can't be with {args.n_images} pictures."
        raise ValueError(f"{message} See --n-images.")
    if args.n_rows and mx.distributed.init().size() > 1:
        raise ValueError("--n-rows can't be with several processes: each paints some of them.")
    for name in ("n_images", "save_every", "decode_batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} can't be: at least 1.")
    if args.prompt is not None and args.prompts and not args.from_png:
        raise ValueError("--prompt and --prompts can't be together: add it to the file.")
    size = (64 if n is None else n for n in (args.width, args.height))  # what is not given is right
    cfg = 1.0 if args.cfg is None else args.cfg
    check_options(args.steps, cfg, args.sampler, *size, args.n_images, args.rng)


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a name or a prompt may hold what it can't show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if args.from_png:
            # Options that may be repeated replace the picture's; argparse alone would add to them.
            given = [name for name, value in vars(args).items() if type(value) is list and value]
            parser.set_defaults(**read_parameters(args.from_png) | {name: [] for name in given})
            args = parser.parse_args(argv)
        check_arguments(args)
        if args.prompt is None:
            args.prompt = "" if args.image else PROMPT
        if not args.show_tokens:
            check_output(args.output)
        sd = model_of(args)
        prompts = read_prompts(args.prompts) if args.prompts else [args.prompt]
        if args.show_tokens:
            for prompt in prompts:
                show_tokens(sd, prompt)
            return
        way = way_of(sd, args)
        paint(with_controls(way.sd if way else sd, args), args, way, prompts)
    except FileNotFoundError as error:
        stop(f"there is no file {error.filename}. Is the name right?")
    except (ValueError, OSError) as error:
        stop(error)
    except MemoryError:
        stop("there is not enough memory for this. Try a smaller --width, --height or --n-images.")
    except KeyboardInterrupt:
        print("\nsd.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__" and "ipykernel" not in sys.modules:
    main()
