"""Weights as indices of a table, packed (sd_more/formats/palettes.py makes them).

Palettised is such a tensor as it lies in a file; most ask it for an ordinary array. The layers of
cpu.py keep it as it is, and Packed looks up those of its weights that are needed just then.
"""

import math

import mlx.core as mx
import numpy as np

ENDING = ".palette"  # of the table's name, which begins with the name of its tensor
SIZES = {4: 2, 16: 4, 64: 6, 256: 8}  # of tables: bits


def join(weights):
    """{name: array} -> the same, with a Palettised in place of packed indices and their table."""
    tables = {n.removesuffix(ENDING): w for n, w in weights.items() if n.endswith(ENDING)}
    rest = {name: w for name, w in weights.items() if not name.endswith(ENDING)}
    return rest | {name: Palettised(name, rest.get(name), table) for name, table in tables.items()}


class Palettised:
    """A tensor of the shape and type that it has when it is looked up."""

    def __init__(self, name, packed, table):
        bits = SIZES.get(table.size) if table.ndim == 1 else None
        if bits is None or table.dtype != mx.float32:
            raise ValueError(f"the palette of {name} is {table.shape}, of type {table.dtype}")
        if packed is None or packed.dtype != mx.uint8 or packed.shape[-1] % bits:
            there = packed is not None and f"{packed.shape}, of type {packed.dtype}"
            raise ValueError(f"{name} has a palette, but no indices of {bits} bits: {there}")
        self.packed, self.table, self.bits = packed, table, bits
        self.told = f"of {bits} bits"  # what --info says of its type
        self.shape = (*packed.shape[:-1], packed.shape[-1] * 8 // bits)
        self.ndim, self.dtype = len(self.shape), table.dtype

    def astype(self, dtype):
        """-> an ordinary array; nothing is computed before it is used."""
        w = self.packed
        if self.bits == 6:
            w = join_pairs(w.reshape(len(w), -1).view(mx.uint16).reshape(len(w), 3, -1), mx)
            w = mx.stack([w & 63, w >> 6], axis=-1)
        elif self.bits < 8:
            mask = 2**self.bits - 1
            w = mx.stack([w >> shift & mask for shift in range(0, 8, self.bits)], axis=-1)
        return self.table.astype(dtype)[w.reshape(self.shape)]


def join_pairs(words, np):  # np: NumPy or MLX
    """(o, 3, n / 8) words of 16 bits -> (o, 4, n / 8), pairs of 6 bits, as pack() had them"""
    high = words >> 12
    last = high[:, :1] | high[:, 1:2] << 4 | high[:, 2:] << 8
    return np.concatenate([words & 4095, last], axis=1)


def looked_up(name):
    return lambda self, *others: getattr(self.astype(self.dtype), name)(*others)


for name in "add", "sub", "mul", "truediv", "radd", "rsub", "rmul", "neg", "matmul", "getitem":
    setattr(Palettised, f"__{name}__", looked_up(f"__{name}__"))


class Packed:
    """What a Palettised holds, for NumPy. It has what kernels.py asks of weights: shape, size,
    reshape, and slices of its outputs, which are arrays of float32.

    Several weights are looked up at once: a pair, or 4 of 2 bits, is one number of a longer table,
    whose entries are as many floats, copied as one.
    """

    def __init__(self, packed, lookup, bits, shape):
        self.packed, self.lookup, self.bits, self.shape = packed, lookup, bits, shape
        self.size = math.prod(shape)

    @classmethod
    def of(cls, packed, table):
        """packed, table: what a Palettised holds, as NumPy sees it."""
        bits = SIZES[table.size]
        each = 4 if bits == 2 else 2
        lookup = np.empty((len(table),) * each + (each,), np.float32)
        for i in range(each):  # the first weight is in the lowest bits
            lookup[..., i] = table.reshape(-1, *(1,) * i)
        lookup = lookup.view(np.complex128 if bits == 2 else np.float64).reshape(-1)
        shape = (*packed.shape[:-1], packed.shape[-1] * 8 // bits)
        return cls(packed.reshape(len(packed), -1), lookup, bits, shape)

    def __len__(self):
        return self.shape[0]

    def reshape(self, o, rest):  # rest: -1
        return Packed(self.packed, self.lookup, self.bits, (o, self.size // o))

    def __getitem__(self, outputs):
        """A slice of the first axis, looked up."""
        packed = self.packed[outputs]
        if self.bits == 6:
            packed = join_pairs(packed.view(np.uint16).reshape(len(packed), 3, -1), np)
        elif self.bits == 8:
            packed = packed.view(np.uint16)
        return self.lookup.take(packed).view(np.float32).reshape(-1, *self.shape[1:])
