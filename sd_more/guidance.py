"""A change of the weights, for models that have learned guidance: how far they follow the prompt.

    sd = StableDiffusion("lcm.flat.safetensors", changes=[guided(3.0)])
    sd.txt2img("a red house", sampler="lcm", steps=4)           # at cfg 1: that is the model's own

sd_more/formats/guidance.py says how it works.
"""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np

import sd
from sd_more.formats.guidance import NAME, USUAL, new_bias


def has_guidance(path):
    """Is it a model that has learned guidance?"""
    return NAME in sd.read_flat(path)[1]


def guided(cfg=USUAL):
    """-> a change, for StableDiffusion(changes=[...]), which raises SDError for other models."""
    good = isinstance(cfg, (int, float)) and math.isfinite(cfg)
    sd.expect(good, "cfg", cfg, "a finite number")

    def change(config, weights):
        if NAME not in weights:
            raise sd.SDError("this model has not learned guidance: give cfg when you paint.")
        layer = "unet.time1.bias", "unet.time1.weight", NAME
        bias, time1, guide = (np.array(weights[name].astype(mx.float32)) for name in layer)
        bias = mx.array(new_bias(bias, time1, guide, cfg, USUAL))
        return replace(config, cfg=1.0), weights | {"unet.time1.bias": bias}

    return change
