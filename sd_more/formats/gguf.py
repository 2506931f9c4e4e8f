"""GGUF, in which stable-diffusion.cpp keeps models: the same names as in a .ckpt, mostly quantised.

    head      "GGUF", a version, how many tensors there are, how many values
    values    of each a name, a type, and a number, a text or an array
    tensors   of each a name, how many axes, their lengths, a type, where its data begins
    data      each tensor begins at a multiple of the alignment, 32 bytes if no value says another

Lengths stand in the order opposite to PyTorch's, (kw, kh, in, out), and ggml leaves out those of 1
at that end: (1, 320) is (320,). A quantised row is cut into blocks of 32 or 256 numbers, and each
block has scales and small whole numbers; what the bits of a block mean is in ggml's ggml-quants.c.
A row whose length is no multiple of the block's, such as a 3x3 convolution's, is not quantised.
(The format is described in docs/gguf.md of github.com/ggml-org/ggml.)
"""

import collections
import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .tensors import (
    MOST_BYTES,
    MOST_TENSORS,
    Contents,
    Tensor,
    itemsize,
    open_file,
    read_part,
    require,
)

# %% Blocks ----------------------------------------------------------------------------------------
# Each function has a uint8 array (n, bytes of a block) and returns n blocks of numbers in float32,
# with the same roundings as ggml's: equal to the bit.


def half(blocks, at):
    """The float16 that begins at a byte of each block -> (n, 1) in float32."""
    return blocks[:, at : at + 2].copy().view("<f2").astype("<f4")


def unpack(data, bits, group):
    """(n, bytes) -> (n, 8 bytes / bits), the numbers of a few bits that are in them.

    The lowest bits of `group` bytes come first, then the next ones of the same bytes.
    """
    n, size = data.shape
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    numbers = data.reshape(n, size // group, 1, group) >> shifts & (1 << bits) - 1
    return numbers.reshape(n, size * 8 // bits)


def signed(numbers, zero):
    return numbers.view("i1") - np.int8(zero)


def grouped(numbers, scales):
    """(n, 256) by (n, groups) -> (n, groups, 256 / groups)"""
    return numbers.reshape(*scales.shape, -1) * scales[..., None]


def q4_0(blocks):
    return half(blocks, 0) * signed(unpack(blocks[:, 2:], 4, 16), 8)


def q4_1(blocks):
    return half(blocks, 0) * unpack(blocks[:, 4:], 4, 16) + half(blocks, 2)


def five_bits(high, low):
    return unpack(low, 4, 16) | unpack(high, 1, 1) << 4


def q5_0(blocks):
    return half(blocks, 0) * signed(five_bits(blocks[:, 2:6], blocks[:, 6:]), 16)


def q5_1(blocks):
    return half(blocks, 0) * five_bits(blocks[:, 4:8], blocks[:, 8:]) + half(blocks, 2)


def q8_0(blocks):
    return half(blocks, 0) * blocks[:, 2:].view("i1")


def q2_k(blocks):
    scales, numbers = blocks[:, :16], unpack(blocks[:, 16:80], 2, 32)
    least = half(blocks, 82) * (scales >> 4)
    return grouped(numbers, half(blocks, 80) * (scales & 15)) - least[..., None]


def q3_k(blocks):
    high, low = unpack(blocks[:, :32], 1, 32), unpack(blocks[:, 32:96], 2, 32)
    scales = unpack(blocks[:, 96:104], 4, 8) | unpack(blocks[:, 104:108], 2, 4) << 4
    numbers = signed(low | high << 2, 4)  # 4 is taken off where the high bit is not set
    return grouped(numbers, half(blocks, 108) * signed(scales, 32))


def scales_and_least(blocks):
    """Of Q4_K and Q5_K -> (n, 8), (n, 8): 6 bits each, of which two are in bytes of others."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, rest & 15 | first >> 2 & 48], axis=1)
    least = np.concatenate([second & 63, rest >> 4 | second >> 2 & 48], axis=1)
    return half(blocks, 0) * scales, half(blocks, 2) * least


def q4_k(blocks):
    scales, least = scales_and_least(blocks)
    return grouped(unpack(blocks[:, 16:], 4, 32), scales) - least[..., None]


def q5_k(blocks):
    scales, least = scales_and_least(blocks)
    numbers = unpack(blocks[:, 48:], 4, 32) | unpack(blocks[:, 16:48], 1, 32) << 4
    return grouped(numbers, scales) - least[..., None]


def q6_k(blocks):
    numbers = unpack(blocks[:, :128], 4, 64) | unpack(blocks[:, 128:192], 2, 32) << 4
    scales = half(blocks, 208) * blocks[:, 192:208].view("i1")
    return grouped(signed(numbers, 32), scales)


BLOCKS = {  # numbers and bytes of a block, and how it is read
    "Q4_0": (32, 18, q4_0), "Q4_1": (32, 20, q4_1), "Q5_0": (32, 22, q5_0),
    "Q5_1": (32, 24, q5_1), "Q8_0": (32, 34, q8_0),
    "Q2_K": (256, 84, q2_k), "Q3_K": (256, 110, q3_k), "Q4_K": (256, 144, q4_k),
    "Q5_K": (256, 176, q5_k), "Q6_K": (256, 210, q6_k),
}  # fmt: skip
PLAIN = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
TYPES = {  # ggml's numbers for types
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


class Quantised(NamedTuple):
    """In place of a Tensor: one that is kept in blocks."""

    path: Path
    start: int  # of its first block, in bytes
    kind: str  # a key of BLOCKS
    shape: tuple
    dtype: str = "F32"  # of the numbers, once they are read

    def float32(self):
        if not math.prod(self.shape):
            return np.zeros(self.shape, "<f4")
        numbers, size, read = BLOCKS[self.kind]
        data = read_part(self.path, self.start, math.prod(self.shape) // numbers * size)
        with np.errstate(all="ignore"):  # what is not finite is found by the caller
            return read(np.frombuffer(data, "u1").reshape(-1, size)).reshape(self.shape)

    def rows(self, first, count):
        """Some of its rows, which begin and end with whole blocks."""
        numbers, size, _ = BLOCKS[self.kind]
        start = self.start + first * math.prod(self.shape[1:]) // numbers * size
        return self._replace(start=start, shape=(count, *self.shape[1:]))


# %% The header ------------------------------------------------------------------------------------

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9  # the other types of values
MOST_WORDS = 1 << 19  # in an array; a language model's vocabulary has half of that


class Header:
    """The beginning of a file, read piece by piece. Nothing beyond its end is asked for."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        left = len(self.data) - self.at
        require(
            count <= left, "its GGUF header has no end: it was cut off, or its counts are wrong"
        )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code="Q"):
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self):
        return self.take(self.number()).decode()

    def value(self):
        """-> a number or a text; None for an array, which nothing here needs"""
        kind = self.number("I")
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(find_code(kind))
        kind, count = self.number("I"), self.number()
        if kind != TEXT:
            self.take(count * struct.calcsize("<" + find_code(kind)))
            return None
        require(count <= MOST_WORDS, f"its header has an array of {count} texts, far too many")
        for _ in range(count):
            self.take(self.number())
        return None


def find_code(kind):
    require(kind in CODES, f"its header has a value of the type {kind}, which is not known here")
    return CODES[kind]


def read_gguf(path):
    with open_file(path) as file:
        header, size = Header(file.read(MOST_BYTES)), os.fstat(file.fileno()).st_size
    tensor_count, value_count = read_head(header)
    values = {}
    for _ in range(value_count):
        name = header.text()
        require(name not in values, "its header has two entries of one name")
        values[name] = header.value()
    parts = values.get("split.count")
    require(parts in (None, 1), f"it is a part of {parts}; join them with gguf-split --merge")
    alignment = values.get("general.alignment", 32)
    good = type(alignment) is int and alignment in [1 << k for k in range(17)]
    require(good, f"its alignment is {str(alignment)[:40]}, expected 32 or another power of two")
    entries = {}
    for _ in range(tensor_count):
        name, *entry = read_entry(header)
        require(name not in entries, "its header has two entries of one name")
        entries[name] = entry
    data = pad(header.at, alignment)
    places = [(offset, measure(*entry) or 0, entry[0]) for *entry, offset in entries.values()]
    check_places(places, data, alignment, size)
    return make_contents(path, data, entries, values)


def read_head(header):
    """-> how many tensors there are, how many values"""
    header.take(4)
    version = header.number("I")
    swapped = version and not version & 0xFFFF
    require(not swapped, "it is a GGUF file of a big-endian machine; make it again on another")
    known = f"it is a GGUF file of version {version}, of which 2 and 3 are read here"
    require(version in (2, 3), f"{known}. Make it again from the original")
    counts = header.number(), header.number()
    good = max(counts) <= MOST_TENSORS
    require(good, f"its header has {counts[0]} tensors and {counts[1]} values, far too many")
    return counts


def read_entry(header):
    """-> name, type, shape, where its data begins, counted from the first tensor's"""
    name, axes = header.text(), header.number("I")
    lengths = [header.number() for _ in range(axes)] if axes <= 8 else [1 << 63]
    kind, offset = header.number("I"), header.number()
    kind, shape = TYPES.get(kind, str(kind)), tuple(reversed(lengths))
    good = all(n < 2**48 for n in (*lengths, offset))
    if kind in BLOCKS:
        good = good and lengths and lengths[0] % BLOCKS[kind][0] == 0
    require(good, f"its header has an impossible entry for {name[:80]}")
    return name, kind, shape, offset


def measure(kind, shape):
    """-> the bytes that a tensor takes; None if its type is not known"""
    if kind in BLOCKS:
        numbers, size, _ = BLOCKS[kind]
        return math.prod(shape) // numbers * size
    return math.prod(shape) * itemsize(kind) if kind in PLAIN else None


def pad(n, alignment):
    return -(-n // alignment) * alignment


def check_places(places, data, alignment, size):
    """Each tensor begins where the one before ended; only what those of unknown types take is open.

    places: (offset, length, type) of each. data: where the first begins. size: the file's.
    """
    reached, end, known = 0, 0, True
    for offset, length, kind in sorted(places):
        good = offset == reached if known else offset >= reached and offset % alignment == 0
        require(good, "its tensors overlap, or leave a hole")
        end, known = offset + length, kind in BLOCKS or kind in PLAIN
        reached = pad(end, alignment)
    there = f"its header describes {data + end} bytes, it has {size}"
    require(data + end <= size and (not known or size <= data + reached), there)


def make_contents(path, data, entries, values):
    tensors, unreadable, kinds = {}, {}, collections.Counter()
    for name, (kind, shape, offset) in entries.items():
        if kind in BLOCKS:
            tensors[name] = Quantised(path, data + offset, kind, shape)
            kinds[kind] += 1
        elif kind in PLAIN:
            strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
            tensors[name] = Tensor(path, data + offset, kind, shape, tuple(strides))
        else:
            unreadable[name] = f"tensor of the type {kind}"
    metadata = {name: value for name, value in values.items() if type(value) is str}
    each = ", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items()))
    lost = f"{sum(kinds.values())} of its {len(entries)} tensors are quantised ({each}): what that "
    remarks = [lost + "rounded away stays lost"] if kinds else []
    return Contents(tensors, metadata=metadata, unreadable=unreadable, remarks=remarks)
