"""The safety checker that came with Stable Diffusion.

CLIP's other half is a transformer that turns a picture into one vector, matched in training with
the vectors of captions. The checker compares it with the vectors of 17 things not to be shown and 3
that call for more caution, each with a threshold.

    in   a picture, 224 x 224, in 256 squares of 14 x 14       out   a vector (768), then yes or no

It errs in both directions. (diffusers' pipelines/stable_diffusion/safety_checker.py. As there, what
is not to be shown becomes black; the original puts another picture in its place.)
"""

import functools

import mlx.core as mx
import numpy as np
from mlx import nn
from PIL import Image

import sd


class SafetyChecker(nn.Module):
    def __init__(self, width, layers, heads, projection):
        super().__init__()
        self.patch = mx.zeros((width, 14, 14, 3))
        self.first = mx.zeros((width,))  # a position of no square, where the result is read
        self.position_embedding = {"weight": mx.zeros((257, width))}
        self.norm_in = sd.LayerNorm(width)
        layer = functools.partial(sd.TextLayer, width, heads, "quick_gelu", causal=False)
        self.layers = [layer() for _ in range(layers)]
        self.norm = sd.LayerNorm(width)
        self.projection = sd.Linear(width, projection, bias=False)
        self.concepts, self.thresholds = mx.zeros((17, projection)), mx.zeros((17,))
        self.special, self.special_thresholds = mx.zeros((3, projection)), mx.zeros((3,))

    def embed(self, picture):
        """A PIL picture -> (1, 768)"""
        x = mx.array(cut_into_squares(picture))
        x = sd.matmul(x, self.patch.reshape(len(self.patch), -1).T)
        x = mx.concatenate([self.first[None, None], x], axis=1)
        x = self.norm_in(x + self.position_embedding["weight"])
        for layer in self.layers:
            x = layer(x)
        return self.projection(self.norm(x[:, :1])[:, 0])

    def __call__(self, picture):
        """Is it not to be shown? The rounding decides what is just at a threshold."""
        e, caution = sd.view(self.embed(picture)[0]), 0.0

        def exceed(concepts, thresholds):
            c = sd.view(concepts)
            cosine = (c @ e) / (np.linalg.norm(c, axis=1) * np.linalg.norm(e))
            return np.round(cosine - sd.view(thresholds) + caution, 3) > 0

        for i in range(len(self.special)):
            if exceed(self.special[i : i + 1], self.special_thresholds[i : i + 1]).any():
                caution = 0.01
        return bool(exceed(self.concepts, self.thresholds).any())


def cut_into_squares(picture):
    """The middle of a PIL picture, 224 x 224 -> (1, 256, 588), with CLIP's mean and variance."""
    w, h = picture.size
    scale = 224 / min(w, h)
    size = max(224, int(w * scale)), max(224, int(h * scale))
    picture = picture.convert("RGB").resize(size, Image.BICUBIC)
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    x = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32) / 255
    # The mean and standard deviation of the pictures that CLIP was trained on.
    x = (x - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    return np.float32(x.reshape(16, 14, 16, 14, 3).swapaxes(1, 2).reshape(1, 256, -1))


def load_checker(model):
    """The checker in a StableDiffusion's file, None if there is none. Raises SDError.

    Its weights are read from the disk when it first looks at a picture.
    """
    numbers = model.config.safety
    if numbers is None:
        return None
    checker = SafetyChecker(**numbers)
    sd.load_weights(checker, sd.read_flat(model.path)[1], "safety")
    sd.accelerate(checker, mx.float32)
    return checker


def check_safety(model, pictures, checker=None):
    """-> PIL pictures, black where they are not to be shown, and the indices of these.

    checker: what load_checker(model) gave, so as not to read it again for each call.
    """
    checker = load_checker(model) if checker is None else checker
    if checker is None:
        return pictures, []
    flagged = [i for i, picture in enumerate(pictures) if checker(picture)]
    shown = list(pictures)
    for i in flagged:
        shown[i] = Image.new("RGB", pictures[i].size)
    return shown, flagged
