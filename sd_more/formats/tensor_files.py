"""safetensors: eight bytes of length, that much JSON, then the tensors back to back.

A reader's only work is to distrust the JSON: the tensors must fill the rest of the file exactly, no
hole and no overlap.
"""

import json
import math
import os
import struct
from itertools import accumulate

from .tensors import (
    MOST_BYTES,
    NUMPY,
    Contents,
    NotConvertible,
    Tensor,
    itemsize,
    open_file,
    require,
)


def read_safetensors(path):
    with open_file(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        require(length <= MOST_BYTES, f"its header has {length} bytes, far too many")
        header = json.loads(file.read(length).decode(), object_pairs_hook=refuse_duplicates)
        data, size = 8 + length, os.fstat(file.fileno()).st_size
    require(type(header) is dict, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    good = type(metadata) is dict and all(type(v) is str for v in metadata.values())
    require(good, "its metadata is not text")
    tensors, unreadable, ranges = {}, {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = check_entry(name, entry)
        ranges.append((begin, end))
        if dtype not in NUMPY:
            unreadable[name] = f"tensor of the type {dtype[:40]}"
            continue
        strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
        tensors[name] = Tensor(path, data + begin, dtype, shape, tuple(strides))
    reached = 0
    for begin, end in sorted(ranges):
        require(begin == reached, "its tensors overlap, or leave a hole")
        reached = end
    reached += data
    require(reached == size, f"its header describes {reached} bytes, it has {size}")
    return Contents(tensors, metadata=metadata, unreadable=unreadable)


def make_header(entries, metadata):
    """-> the bytes before those of the tensors. entries: (name, type, shape) each, in their order.

    Nothing after a tensor of single bytes is aligned, unless there are a multiple of 8 of them.
    """
    sizes = [math.prod(shape) * itemsize(dtype) for _, dtype, shape in entries]
    header, ends = {"__metadata__": metadata}, accumulate(sizes)
    for (name, dtype, shape), size, end in zip(entries, sizes, ends):
        require(name not in header, f"it has two tensors of the name {name}")
        offsets = [end - size, end]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def refuse_duplicates(pairs):
    require(len(dict(pairs)) == len(pairs), "its header has two entries of one name")
    return dict(pairs)


def check_entry(name, entry):
    """-> dtype, shape, begin, end"""
    are_whole = lambda v: type(v) is list and all(type(n) is int and 0 <= n < 2**48 for n in v)
    if type(entry) is dict and set(entry) == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = are_whole(shape) and len(shape) <= 8 and are_whole(offsets) and len(offsets) == 2
        if type(dtype) is str and good and offsets[0] <= offsets[1]:
            size = offsets[1] - offsets[0]
            # Of a type that is not known (4 bits, scales as powers of two) the size isn't, either.
            if dtype not in NUMPY or size == math.prod(shape) * itemsize(dtype):
                return dtype, tuple(shape), *offsets
    raise NotConvertible(f"its header has an impossible entry for {name}")
