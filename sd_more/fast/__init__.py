"""The same layers, faster: accelerate() exchanges a network's layers for those of cpu.py or gpu.py.

Nothing here knows what the network is for. It gets modules and a table of classes, such as

    accelerate(network, {Linear: cpu.Linear, GroupNorm: cpu.GroupNorm}, mx.float32)

and whatever a fast layer computes is what the plain one would, up to rounding.

    layer.py     what all fast layers are: a plain layer's arrays, computed in another way
    cpu.py       layers that hand their arrays to NumPy, and take the results back
    kernels.py   what these compute, on NumPy arrays
    palettes.py  weights that are indices of a table
    parallel.py  work on all cores; what that asks of OpenBLAS and of malloc
    gpu.py       attention through MLX's own fused function
"""

import mlx.core as mx

from . import cpu, gpu
from .layer import FastLayer
from .palettes import Palettised, join
from .parallel import release_memory

__all__ = ["FastLayer", "accelerate", "cpu", "gpu", "join", "release_memory"]


def accelerate(network, faster, dtype):
    """-> the network, in which each module whose class is a key of faster stands exchanged for
    faster[class](module), and whose weights have the type dtype, unless a fast layer keeps them.

    faster: {class: fast class}; a subclass is something else, and stays unless it is a key itself.
    The network is changed in place. Nothing is computed: weights that are still on the disk are
    read, and cast, when they are first used.
    """
    if type(network) in faster:
        network = faster[type(network)](network)
    for name, part in [*network.items()]:
        if not (isinstance(network, FastLayer) and network.keep(name, dtype)):
            network[name] = convert(part, faster, dtype)
    return network


def convert(part, faster, dtype):
    """What accelerate does, for anything that a module may hold."""
    if isinstance(part, mx.array):
        return part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part
    if isinstance(part, Palettised):
        return part.astype(dtype)
    if isinstance(part, (list, tuple)):
        return type(part)(convert(each, faster, dtype) for each in part)
    return accelerate(part, faster, dtype) if isinstance(part, dict) else part  # a module is a dict
