"""Generators of noise: the same seed gives the same picture only where the same numbers are drawn.

Each is a function of a seed that returns draw(shape) -> float32 array; draw goes on where it left
off when it is called again. Any of them can be StableDiffusion's rng=.
"""

import itertools
import math

import mlx.core as mx
import numpy as np

from sd import torch_normal


def numpy_normal(seed):
    """np.random.RandomState's, which Apple's Core ML programs use."""
    state = np.random.RandomState(seed % 2**32)

    def draw(shape):
        return state.standard_normal(shape).astype(np.float32)

    return draw


def philox_normal(seed):
    """What torch.randn gives on an NVIDIA GPU, for arrays no larger than the number of threads that
    the GPU runs at once: the latents of 512 x 512 always, those of 1024 x 1024 not on small ones.

    Philox 4x32-10, by Salmon et al., SC 2011, has no state to wind on: number i of call j comes
    from scrambling (j, i) with the seed. (For larger arrays PyTorch makes a thread's first four
    numbers of one scrambling, of which only the first is taken here.)
    """
    calls = itertools.count()

    def draw(shape):
        n = math.prod(shape)
        counter = np.zeros((4, n), np.uint32)
        counter[0], counter[2] = next(calls), np.arange(n)
        words = philox(counter, seed % 2**64).astype(np.float64)
        unit = np.float32(2.0**-32)
        u, angle = (words[0] + 0.5) * unit, (words[1] + 0.5) * np.float32(unit * 2 * np.pi)
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


GENERATORS = {
    "torch": torch_normal,
    "numpy": numpy_normal,
    "philox": philox_normal,
    "mlx": mlx_normal,
}
