"""Layers for a CPU: they hand their arrays to NumPy, compute with kernels.py, and hand back.

MLX's build for Linux multiplies matrices on a CPU with plain loops, and computes exp and erf one
number at a time. NumPy has OpenBLAS and vector instructions for both. It can read an evaluated MLX
array without a copy; going back is one copy. So these layers evaluate what they are given, and can
be neither compiled nor differentiated.

All compute in float32 and give back the type that they were given.
"""

import mlx.core as mx
import numpy as np

from . import kernels
from .layer import FastLayer
from .parallel import keep_memory


def as_float32(x):
    """An MLX array as NumPy sees it, in float32; not copied if it has that type."""
    return np.array(x.astype(mx.float32), copy=False)


def as_stored(weight):
    """An MLX array as NumPy sees it, never copied; bfloat16, which NumPy lacks, as uint16."""
    return np.array(weight.view(mx.uint16) if weight.dtype == mx.bfloat16 else weight, copy=False)


class CPULayer(FastLayer):
    """compute() is what a layer does, on NumPy arrays in float32."""

    def __call__(self, *inputs):
        keep_memory()
        with np.errstate(all="ignore"):  # what is not finite is seen in the picture
            y = self.compute(*(as_float32(x) for x in inputs))
        return mx.array(y).astype(inputs[0].dtype)

    def keeps(self, name, dtype):
        """Matrices of 16 bits stay what they are: kernels.widen makes them float32 in passing."""
        return dtype == mx.float32 and self[name].ndim > 1 and self[name].dtype.size == 2


class Linear(CPULayer):
    def compute(self, x):
        bias = as_float32(self.bias) if "bias" in self else None
        return kernels.linear(x, as_stored(self.weight), bias)


class GEGLU(CPULayer):
    def compute(self, x):
        return kernels.geglu(x, as_stored(self.weight), as_float32(self.bias))


class Conv(CPULayer):
    def compute(self, x):
        weight, bias = as_stored(self.weight), as_float32(self.bias)
        return kernels.conv(x, weight, bias, self.stride, self.padding)


class GroupNorm(CPULayer):
    def compute(self, x, then=None):
        weight, bias = as_float32(self.weight), as_float32(self.bias)
        return kernels.group_norm(x, weight, bias, self.groups, self.epsilon, then)


class NormSilu(GroupNorm):
    def compute(self, x):
        return super().compute(x, then=kernels.silu)


class LayerNorm(CPULayer):
    def compute(self, x):
        return kernels.layer_norm(x, as_float32(self.weight), as_float32(self.bias), 1e-5)


class Activation(CPULayer):
    def compute(self, x):
        return kernels.elementwise(kernels.ACTIVATIONS[self.name], x)


class AttentionCore(CPULayer):
    def compute(self, q, k, v):
        return kernels.attention(q, k, v, self.heads, self.causal)
