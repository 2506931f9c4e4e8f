"""Small pictures on the way: what each step expects the picture to become, at next to no cost.

    def show(step, steps, picture):  # a small PIL picture
        ...

    for x in previewed(sd, "a red house", show, seed=42):  # instead of sd.generate_latents
        pass

The VAE needs as long as a step or longer. But eight by eight pixels' mean colour is nearly a linear
function of their latent: a matrix, that is fitted to each model's own VAE. What is shown is x0, the
clean latents that the UNet's last answer means, not x, in which there is noise.
"""

import math
import weakref

import mlx.core as mx
import numpy as np
from PIL import Image

import sd
from sd_more.pictures import grid

# %% The matrix ------------------------------------------------------------------------------------

FITTED = weakref.WeakKeyDictionary()  # {model: matrix}


def fit(model):
    """-> matrix (5, 3): latents (..., 4) and a 1, times it, are colours (..., 3), about [0, 1].

    By least squares, between latents and the colours of what they decode to. Random latents decode
    to nothing like a picture, so they are those of a picture of all colours, or random ones where
    the encoder has no sensible answer. It is computed once for each model.
    """
    known = (matrix for other, matrix in FITTED.items() if other.config is model.config)
    matrix = next(known, None)  # also of what controlled() gives, which has the same VAE
    if matrix is None:
        x = encode_drawn(model)
        x = random_latents() if x is None else x
        matrix = regress(x, block_means(np.array(model.decode(mx.array(x)))))
    FITTED[model] = matrix
    return matrix


def encode_drawn(model):
    """-> latents (1, 16, 16, 4) of a drawn picture, or None: without an encoder, or with one whose
    answer is no number, always the same, or far from what the UNet paints, whose variance is 1.
    """
    with model.network("vae") as vae:
        if not hasattr(vae, "encode"):
            return None
    x = np.array(model.encode(draw_colours()))
    deviation = x.std((0, 1, 2))
    return x if np.isfinite(x).all() and ((0.01 < deviation) & (deviation < 100)).all() else None


def draw_colours():
    """-> a picture (1, 128, 128, 3) in [0, 1]: 64 squares of 16 x 16, 4 levels of red times 4 of
    green times 4 of blue, in a random order.
    """
    levels = np.linspace(0.1, 0.9, 4, dtype=np.float32)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 3)
    squares = np.random.default_rng(0).permutation(colours).reshape(1, 8, 8, 3)
    return squares.repeat(16, axis=1).repeat(16, axis=2)


def random_latents():
    """-> (1, 16, 16, 4), of variance 1"""
    rng = np.random.default_rng(0)
    return rng.standard_normal((1, 16, 16, 4), np.float32)


def block_means(pictures):
    """(b, 8h, 8w, 3) -> (b, h, w, 3)"""
    b, h, w, c = pictures.shape
    return pictures.reshape(b, h // 8, 8, w // 8, 8, c).mean((2, 4))


def regress(x, colours):
    """(b, h, w, 4), (b, h, w, 3) -> matrix (5, 3)"""
    x, colours = x.reshape(-1, 4).astype(np.float64), colours.reshape(-1, 3)
    good = np.isfinite(colours).all(1)
    if not good.all():
        sd.say_once("the preview's colours are wrong: the VAE decodes to what is no number (NaN).")
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    return np.float32(np.linalg.lstsq(x[good], colours[good], rcond=None)[0])


def preview(x0, matrix):
    """Latents (b, h, w, 4) -> a PIL picture, w x h, or if there are several all of them in a grid,
    about as many rows as columns, black where some lack. What is no number is black.
    """
    colours = np.array(x0.astype(mx.float32)) @ matrix[:4] + matrix[4]
    pixels = np.clip(np.nan_to_num(colours, nan=0), 0, 1) * 255 + 0.5
    pictures = [Image.fromarray(each) for each in pixels.astype(np.uint8)]
    return grid(pictures, rows=round(math.sqrt(len(pictures))))


# %% Painting --------------------------------------------------------------------------------------


class Watched:
    """A task that keeps the last answer's x0; else it is the task that is given."""

    def __init__(self, task):
        self.task, self.matrix, self.x0 = task, None, None

    def __getattr__(self, name):
        return getattr(self.task, name)

    def begin(self, model, t, draw):
        # With LowMemory the VAE is loaded here anyway, if at all, and later the UNet would have to
        # be loaded anew.
        self.matrix = fit(model)
        return self.task.begin(model, t, draw)

    def constrain(self, denoise, schedule, x0):
        ask = self.task.constrain(denoise, schedule, x0)

        def watched(x, t):
            self.x0, eps = ask(x, t)
            return self.x0, eps

        return watched


def previewed(model, prompt, show, *, task=None, steps=None, **options):
    """What model.generate_latents gives, with the same options; and after each step, before its x
    is given, show(step, steps, picture) is called. What it raises ends the painting.
    """
    task = Watched(task or sd.TextToImage())
    steps = model.config.steps if steps is None else steps
    walk = model.generate_latents(prompt, task=task, steps=steps, **options)

    def run():
        count = len(task.timesteps(range(steps)))
        for i, x in enumerate(walk, 1):
            show(i, count, preview(task.x0, task.matrix))
            yield x

    return run()
