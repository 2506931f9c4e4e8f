"""What all formats come down to: a tensor is a place in a file, a type, a shape and strides.

A checkpoint has gigabytes; of a Tensor only these few numbers are in memory, until somebody reads
it. Nothing that a file says is believed: what it claims to be large is refused, and what is not
known is never read as if it were something else.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np


class NotConvertible(Exception):
    """Half a sentence, "it is ...", for the caller to put the file's name before."""


def require(good, problem):
    if not good:
        raise NotConvertible(problem)


# %% Files -----------------------------------------------------------------------------------------

MOST_BYTES = 16 << 20  # of what describes tensors: a header, a directory, a pickle; 1 MB is usual
MOST_TENSORS = 20_000  # a whole training checkpoint has some 5,000


def open_file(path):
    """Open a regular file for reading. A pipe would wait for ever, and a device never end."""
    require(path.is_file(), f"{path.name} is no file" if path.exists() else "it does not exist")
    return open(path, "rb")


def read_small(path, most=MOST_BYTES):
    """-> the bytes of a file that is not to be large."""
    with open_file(path) as file:
        data = file.read(most + 1)
    require(len(data) <= most, f"{path.name} has more than {most} bytes, far too many for it")
    return data


def read_part(path, start, length):
    """-> that many bytes of a large file. No memory map: a disk that fails then raises, and does
    not kill the process."""
    with open_file(path) as file:
        file.seek(start)
        data = file.read(length)
    early = f"{path.name} ends early: it was cut off, or is being written"
    require(len(data) == length, early)
    return data


# %% Tensors ---------------------------------------------------------------------------------------

# Names of types as safetensors writes them. NumPy has no bfloat16, it gets the 16 bits; what is
# neither in FLOATS nor in WHOLE is only ever skipped, so of those just the size matters.
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2",
    "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
WHOLE = ("I64", "I32", "I16", "I8")
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # what is written


def itemsize(dtype):
    return np.dtype(NUMPY[dtype]).itemsize


class Tensor(NamedTuple):
    path: Path
    start: int  # of its first element, in bytes
    dtype: str
    shape: tuple
    strides: tuple  # in elements, as PyTorch counts them

    def raw(self):
        """-> the bytes in which it lies"""
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides)]
        length = (sum(steps) + 1) * itemsize(self.dtype) if math.prod(self.shape) else 0
        return read_part(self.path, self.start, length)

    def float32(self):
        require(self.dtype in FLOATS + WHOLE, f"it has numbers of the type {self.dtype}")
        if not math.prod(self.shape):
            return np.zeros(self.shape, "<f4")
        size, data = itemsize(self.dtype), self.raw()
        # np.ndarray checks that the strides stay inside the data; as_strided would not.
        strides = [s * size if n > 1 else 0 for n, s in zip(self.shape, self.strides)]
        array = np.ndarray(self.shape, NUMPY[self.dtype], data, strides=strides)
        if self.dtype == "BF16":  # the upper half of a float32
            return (array.astype("<u4") << 16).view("<f4")
        if self.dtype == "F8_E5M2":  # the upper half of a float16
            return (array.astype("<u2") << 8).view("<f2").astype("<f4")
        if self.dtype == "F8_E4M3":
            return E4M3[array]
        with np.errstate(all="ignore"):  # what is too large for float32 is found by the caller
            return array.astype("<f4")

    def rows(self, first, count):
        start = self.start + first * self.strides[0] * itemsize(self.dtype)
        return self._replace(start=start, shape=(count, *self.shape[1:]))


def cast(array, dtype):
    """float32 -> what is stored; bfloat16 as its 16 bits"""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return array.astype(NUMPY[CODES[dtype]])
    bits = array.view("<u4")
    # Round half to even: add just less than half, and one more if the last kept bit is odd.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    # A NaN with all bits set would have wrapped around to a number.
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded.astype("<u2"))


class Computed(NamedTuple):
    """In place of a Tensor: one that is computed of others when it is written."""

    path: Path
    function: object
    parts: dict  # {name: Tensor}

    def float32(self):
        return self.function(**{name: tensor.float32() for name, tensor in self.parts.items()})


def e4m3():
    """The 256 numbers of PyTorch's float8_e4m3fn: no infinities, and NaN where all bits are set.
    (Micikevicius et al. 2022, arXiv 2209.05433, table 1)
    """
    bits = np.arange(256)
    exponent, fraction = (bits >> 3) & 15, bits & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    size = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal)
    size[bits & 127 == 127] = np.nan
    return np.where(bits < 128, size, -size).astype("<f4")


E4M3 = e4m3()


@dataclass
class Contents:
    """What a file holds, by the name of each tensor, and what it says besides."""

    tensors: dict
    mentions: set = field(default_factory=set)  # things a pickle wanted imported
    config: dict = field(default_factory=dict)  # a checkpoint's "sd_config"
    metadata: dict = field(default_factory=dict)  # text, from a safetensors header
    unreadable: dict = field(default_factory=dict)  # names of tensors of unknown kinds: their kind
    remarks: list = field(default_factory=list)  # what is to be said of it, in sentences

    def __post_init__(self):
        names = [*self.tensors, *self.unreadable]
        count, longest = len(names), max(map(len, names), default=0)
        require(count <= MOST_TENSORS, f"it has {count} tensors, far more than any model here")
        require(longest <= 300, f"it has a tensor's name of {longest} characters")
