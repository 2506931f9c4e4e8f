"""Layers for a CPU: they hand their arrays to NumPy, compute with kernels.py, and hand back.

MLX's build for Linux multiplies matrices on a CPU with plain loops, and computes exp and erf one
number at a time. NumPy has OpenBLAS and vector instructions for both. It can read an evaluated MLX
array without a copy, and write into a new one of zeros; only small results are copied. So these
layers evaluate what they are given, and can be neither compiled nor differentiated.

All compute in float32 and give back the type that they were given.
"""

import math

import mlx.core as mx
import numpy as np

from . import kernels
from .kernels import flat
from .layer import FastLayer
from .palettes import Packed, Palettised
from .parallel import keep_memory

SMALL = 1 << 18  # numbers in a result: 1 MB


def as_float32(x):
    """An MLX array as NumPy sees it, in float32; not copied if it has that type."""
    return np.array(x.astype(mx.float32), copy=False)


def as_stored(weight):
    """An MLX array as NumPy sees it, never copied; bfloat16, which NumPy lacks, as uint16."""
    return np.array(weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight, copy=False)


def stored(layer):
    """A layer's weight as kernels.py takes it."""
    weight = as_stored(layer.weight)
    return Packed.of(weight, as_float32(layer.palette)) if "palette" in layer else weight


class CPULayer(FastLayer):
    """compute() is what a layer does, on NumPy arrays in float32."""

    def __call__(self, *inputs):
        keep_memory()
        shape, dtype = self.shape_for(inputs[0]), inputs[0].dtype
        small = math.prod(shape) < SMALL  # then to copy the result is faster than to ask for zeros
        y = np.empty(shape, np.float32) if small else mx.zeros(shape)
        with np.errstate(all="ignore"):  # what is not finite is seen in the picture
            self.compute(*(as_float32(x) for x in inputs), out=np.array(y, copy=False))
        return (mx.array(y) if small else y).astype(dtype)

    def shape_for(self, x):
        """The result's shape."""
        return x.shape

    def keep(self, name, dtype):
        """Matrices of 16 bits stay what they are: kernels.widen makes them float32 in passing. So
        do packed ones, which become two arrays.
        """
        weight = self[name]
        if dtype != mx.float32:
            return False
        if isinstance(weight, Palettised):
            self[name], self["palette"] = weight.packed, weight.table
            return True
        return isinstance(weight, mx.array) and weight.ndim > 1 and weight.dtype.size == 2


class Linear(CPULayer):
    def shape_for(self, x):
        return *x.shape[:-1], len(self.weight)

    def compute(self, x, out):
        bias = as_float32(self.bias) if "bias" in self else None
        kernels.linear(flat(x), stored(self), bias, flat(out))


class GEGLU(CPULayer):
    def shape_for(self, x):
        return *x.shape[:-1], len(self.weight) // 2

    def compute(self, x, out):
        kernels.geglu(flat(x), stored(self), as_float32(self.bias), flat(out))


class Conv(CPULayer):
    def shape_for(self, x):
        b, h, w, _ = x.shape
        o, k, _, _ = self.weight.shape
        h, w = ((n + 2 * self.padding - k) // self.stride + 1 for n in (h, w))
        return b, h, w, o

    def compute(self, x, out):
        kernels.conv(x, stored(self), as_float32(self.bias), self.stride, self.padding, out)


class Upsample(CPULayer):
    """Its convolution reads each position of x where the plain one reads 2 x 2 copies of it. If
    that is to be cut to a smaller size (h, w), the copies are made: what is cut off is not read.
    """

    def __call__(self, x, size=(None, None)):
        _, h, w, _ = x.shape
        if tuple(size) in ((None, None), (2 * h, 2 * w)):
            return super().__call__(x)
        x = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
        return self.conv(x[:, : size[0], : size[1]])

    def shape_for(self, x):
        b, h, w, _ = x.shape
        return b, 2 * h, 2 * w, len(self.conv.weight)

    def compute(self, x, out):
        conv, bias = self.conv, as_float32(self.conv.bias)
        kernels.conv(x, stored(conv), bias, conv.stride, conv.padding, out, twice=True)


class GroupNorm(CPULayer):
    then = None  # what else to do to each number

    def compute(self, x, out):
        weight, bias = as_float32(self.weight), as_float32(self.bias)
        kernels.group_norm(x, weight, bias, self.groups, self.epsilon, self.then, out)


class NormSilu(GroupNorm):
    then = staticmethod(kernels.silu)


class LayerNorm(CPULayer):
    def compute(self, x, out):
        kernels.layer_norm(x, as_float32(self.weight), as_float32(self.bias), 1e-5, out)


class Activation(CPULayer):
    def compute(self, x, out):
        kernels.elementwise(kernels.ACTIVATIONS[self.name], x, out)


class AttentionCore(CPULayer):
    def compute(self, q, k, v, out):
        kernels.attention(q, k, v, self.heads, self.causal, out)
