"""In little memory: one network at a time, one sentence at a time, the VAE in tiles.

With Stable Diffusion 1.5 at 512 x 512 it takes some 1.8 GiB, and 1.1 with palettes of 6 bits. The
price is to read the weights again for each run.
"""

import contextlib
import itertools

import mlx.core as mx
import numpy as np

import sd
from sd_more.fast import release_memory


class LowMemory(sd.StableDiffusion):
    """StableDiffusion with one network in memory at a time.

    The pictures are the same up to rounding where they fit one tile, the size that the model was
    trained on. text_encoder, unet and vae are None here: network(name) gives them. ControlNets stay
    in memory.
    """

    def __init__(self, path=sd.TINY, dtype=None, changes=(), *, fast=True, reader=None):
        self.changes, self.fast = tuple(changes), fast
        self.loaded = {}  # {name: network}, at most one; the same dict in what controlled() gives
        config, weights = read_changed(path, self.changes)
        for name, network in sd.build_networks(config).items():
            sd.load_weights(network, weights, name)  # what does not fit is found out now
        tokenizer, dtype = sd.read_tokenizer(config, weights), sd.choose_dtype(dtype)
        self.set_up(config, tokenizer, None, None, None, dtype, reader, path)

    @contextlib.contextmanager
    def network(self, name):
        """Loads it, and forgets the one that was in memory. It stays until another is needed. What
        somebody has put in here, such as a small VAE, is in memory always.
        """
        if vars(self)[name] is not None:
            yield vars(self)[name]
            return
        if name not in self.loaded:
            self.forget()
            self.loaded[name] = self.load(name)
        yield self.loaded[name]

    def load(self, name):
        """A network whose weights are read from the disk when they are first used, so that of the
        VAE only one half is; but compiling needs them to be there.
        """
        config, weights = read_changed(self.path, self.changes)
        network = sd.build_networks(config)[name]
        sd.load_weights(network, weights, name)
        sd.accelerate(network, mx.float32 if name == "vae" else self.dtype, self.fast)
        del weights  # or what was cast would stay in memory as it was, too
        if name != "vae":
            mx.eval(network.parameters())
        return network

    def forget(self):
        self.loaded.clear()
        self.compiled = None, None
        mx.clear_cache()
        release_memory()

    def controlled(self, *controls):
        self.forget()  # what was compiled for this model would stay while the other one is used
        return super().controlled(*controls)

    # What the networks give must be computed before the next one takes the place of their weights.

    def encode_prompts(self, sentences):
        context = super().encode_prompts(sentences)
        mx.eval(context)
        return context

    def predict(self, x, t, condition):
        """One sentence at a time, so with guidance two calls for each picture."""
        answers = []
        for i, context in enumerate(mx.split(condition.context, len(condition.context))):
            k = i % len(x)  # all pictures without the prompt, then all with it
            extra = None if condition.extra is None else condition.extra[k : k + 1]
            answers.append(super().predict(x[k : k + 1], t, sd.Condition(context, extra)))
            mx.eval(answers)
        return mx.concatenate(answers)

    def decode(self, x):
        with self.network("vae") as vae:
            x = x.astype(mx.float32) / self.config.vae["scale"]
            y = in_tiles(vae.decode, x, self.config.size // 8, 1, 8)
            y = mx.clip(y / 2 + 0.5, 0, 1)
            mx.eval(y)
        return y

    def encode(self, pictures, noise=0):
        with self.network("vae") as vae:

            def encode(pictures):  # -> (b, h, w, 8)
                return mx.concatenate(vae.encode(pictures), axis=-1)

            pictures = mx.array(pictures).astype(mx.float32) * 2 - 1
            both = in_tiles(encode, pictures, self.config.size // 8, 8, 1)
            mean, log_variance = mx.split(both, 2, axis=-1)
            x = (mean + mx.exp(log_variance / 2) * noise) * self.config.vae["scale"]
            mx.eval(x)
        return x


def read_changed(path, changes):
    """-> (config, {name: array}) as the changes make them; still on the disk."""
    config, weights = sd.read_flat(path)
    for change in changes:
        config, weights = change(config, weights)
    return config, weights


def in_tiles(f, x, size, step_in, step_out):
    """f(x) computed on overlapping squares, which are blended where they overlap.

    x (b, h, w, c); size: of a square, in latents; step_in, step_out: what one latent is in x and in
    f(x), so 1 and 8 to decode, 8 and 1 to encode. Up to size it is f(x) itself. Beyond, each square
    has its own GroupNorm, so that the result is not the same; the ramps hide where one ends.
    """
    h, w = x.shape[1] // step_in, x.shape[2] // step_in
    if max(h, w) <= size:
        return f(x)
    height, width = min(size, h), min(size, w)
    weight = (ramp(height * step_out)[:, None] * ramp(width * step_out))[:, :, None]
    total = None
    for top, left in itertools.product(starts(h, size), starts(w, size)):
        y = np.array(f(x[:, tile(top, height, step_in), tile(left, width, step_in)]))
        if total is None:
            total = np.zeros((len(y), h * step_out, w * step_out, y.shape[-1]), np.float32)
            weights = np.zeros((h * step_out, w * step_out, 1), np.float32)
        at = tile(top, height, step_out), tile(left, width, step_out)
        total[:, *at] += weight * y
        weights[at] += weight
    return mx.array(total / weights)


def starts(n, size):
    """Where squares begin, evenly, that cover n and overlap by a quarter or more."""
    if n <= size:
        return [0]
    last = -(-(n - size) // (size * 3 // 4))
    return [round(i * (n - size) / last) for i in range(last + 1)]


def tile(start, n, step):
    return slice(start * step, (start + n) * step)


def ramp(n):
    """1, 2 ... in the middle ... 2, 1"""
    return np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)).astype(np.float32)
