"""Guidance that a model has learned, so that it needs no second answer for the empty prompt.

Some distilled models (LCM, arXiv 2310.04378, section 4.2; the idea is of arXiv 2210.03142) are told
how far to follow the prompt as they are told the time: w = cfg - 1 becomes a vector of sines and
cosines, a matrix makes it as long as the time's, and both are added before the first of the time's
two layers. For one w this is a constant, and what a constant does before a linear layer, another
bias of that layer does as well:

    time1 (t + guide @ w) + bias   =   time1 t + (bias + time1 guide w)

So such a model is an ordinary one, of cfg 1, for each strength; a flat file has that of USUAL, and
the matrix, as guidance.weight, for others.
"""

import numpy as np

USUAL = 8.5  # the cfg that diffusers' pipeline for such models takes by default
NAME = "guidance.weight"
LAYERS = ("time_embed.cond_proj", "time_embedding.cond_proj")  # the original's and diffusers' name


def features(cfg, count):
    """cfg -> (count,), sines and cosines of 1000 w at speeds from 1 to 1/10000.
    (get_guidance_scale_embedding in diffusers' LatentConsistencyModelPipeline)"""
    half = count // 2
    angles = 1000 * (cfg - 1) * np.exp(-np.log(10000) * np.arange(half) / max(1, half - 1))
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(count % 2)])


def new_bias(bias, time1, guide, cfg, old=None):
    """-> time1's bias for a cfg; old: the cfg that is in bias already, if any is."""
    change = features(cfg, guide.shape[1])
    change = change if old is None else change - features(old, guide.shape[1])
    return np.float32(bias + np.float64(time1) @ (np.float64(guide) @ change))


def usual_bias(bias, time1, guide):
    return new_bias(bias, time1, guide, USUAL)
