"""Turn a Stable Diffusion checkpoint into the one flat file that sd.py reads. Without PyTorch.

    python convert_weights.py sd-v1-4.ckpt                    writes sd-v1-4.flat.safetensors

A checkpoint is a few hundred numbers' worth of names and two gigabytes of numbers, and there are
three customs of writing it down: PyTorch's .ckpt, the same names in .safetensors, and the folders
of the diffusers library, with names of their own. sd.py knows none of them. It reads one file in
which a tensor's name is its place in sd.py, a convolution's weight lies channels-last, (out, kh,
kw, in), every 1x1 convolution is the linear layer it is, and a little JSON tells the rest.
LoRAs, ControlNets and textual inversions become such files, too.

    source  ->  {name: where its bytes are}         nothing is read yet              1 - 5
            ->  which model is it?                  or a sentence why not            6, 8
            ->  the table of all that sd.py needs   name, shape, names in the source 7
            ->  one tensor at a time: read, transpose, round, check, write           9

Nothing in a checkpoint is believed. A .ckpt is a pickle, a little program that may call anything
at all; section 2 steps through it without ever calling anything. A tensor is read only if sd.py
needs it and its shape is the expected one. Whatever goes wrong ends in one sentence and no file.

     1 Tensors in their files     5 diffusers folders     9 Writing
     2 Pickles, not executed      6 Which model is it?   10 LoRAs, ControlNets, words
     3 PyTorch's two formats      7 What sd.py needs     11 Convert
     4 safetensors                8 Numbers              12 Command line
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

MERGES = Path(__file__).resolve().parent / "tiny" / "merges.txt"


class ConversionError(ValueError):
    """The text is the whole message: what is wrong, with which value, and what to do now."""


class Unfit(Exception):
    """Half a sentence, "it is ...", for about() to put the file's name before."""


@contextlib.contextmanager
def about(path):
    try:
        yield
    except Unfit as problem:
        raise ConversionError(f"{path} cannot be converted: {problem}.") from None


# %% 1. Tensors in their files ----------------------------------------------------------------
# All formats come down to the same thing: a tensor is a place in a file, a type, a shape and
# strides (how many elements further the next row is). A checkpoint has gigabytes; of a Tensor only
# these few numbers are in memory, until it is its turn to be written.

# Names of types as safetensors writes them. NumPy has no bfloat16, it gets the 16 bits; what
# is not in FLOATS is only ever skipped, so of those just the size matters.
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2",
    "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


def itemsize(dtype):
    return np.dtype(NUMPY[dtype]).itemsize


class Tensor(NamedTuple):
    path: Path
    start: int  # of its first element, in bytes
    dtype: str
    shape: tuple
    strides: tuple  # in elements, as PyTorch counts them

    def float32(self):
        """Read it. Plain reads, no memory map: a disk that fails then raises and does not kill."""
        size = itemsize(self.dtype)
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides)]
        length = (sum(steps) + 1) * size
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(length)
        if len(data) < length:
            raise ConversionError(f"{self.path} ends early: it was cut off, or is being written.")
        # np.ndarray checks that the strides stay inside the data; as_strided would not.
        strides = [s * size if n > 1 else 0 for n, s in zip(self.shape, self.strides)]
        array = np.ndarray(self.shape, NUMPY[self.dtype], data, strides=strides)
        if self.dtype == "BF16":  # the upper half of a float32
            return (array.astype("<u4") << 16).view("<f4")
        with np.errstate(over="ignore"):  # what float64 can say and float32 cannot is seen in 9
            return array.astype("<f4")


@dataclass
class Source:
    """What a file or a folder holds, and what it says about itself."""

    path: Path
    tensors: dict
    numbers: dict = field(default_factory=dict)  # see section 8
    told_by: str = ""  # who told those numbers
    mentions: set = field(default_factory=set)  # things a pickle wanted imported
    merges: Path = MERGES
    metadata: dict = field(default_factory=dict)  # text, from a safetensors header


def shown(text, most=80):
    """Names come from strangers: no control characters on the terminal, and no end to them."""
    text = "".join(c if c.isprintable() and ord(c) < 127 else "?" for c in str(text)[: most + 1])
    return text if len(text) <= most else text[:most] + "..."


# %% 2. Pickles, not executed -----------------------------------------------------------------
# A pickle is a program for a small stack machine. Most instructions push a number or a string or
# collect what is on the stack into a list; three of them name a function and call it, which is how
# a checkpoint can run anything on the machine of whoever loads it. Here those three look the name
# up in a list of five, for tensors and dicts. Any other name stays a Name, which does nothing.
#
# Python's own pickle.Unpickler with a find_class that refuses is not enough: it must be given
# *something* to call, it hashes dictionary keys (a tuple nested a million deep overflows the C
# stack, no exception, the process is gone) and it allocates whatever a length field claims.

MOST_OPCODES = 4_000_000  # a tensor takes 32, a whole training checkpoint about 100,000
MOST_BYTES = 64 << 20  # of one field, or of a whole pickle in a zip; 1 MB is usual

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}  # fmt: skip
REBUILD_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
REBUILD_PARAMETER = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
KNOWN = (*REBUILD_TENSOR, *REBUILD_PARAMETER, "collections.OrderedDict")

FRESH = {  # nothing, true, false, and the empty containers; a set would hash what is put in
    b"N": lambda: None, b"\x88": lambda: True, b"\x89": bool,
    b")": tuple, b"]": list, b"}": dict, b"\x8f": lambda: Name("set"),
}  # fmt: skip
FIXED = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}  # numbers of a fixed size
COUNTED = {  # a length, then that many bytes of: text, old text, bytes, or an integer
    b"X": ("<I", "utf-8"), b"\x8c": ("<B", "utf-8"), b"\x8d": ("<Q", "utf-8"),
    b"T": ("<I", "latin-1"), b"U": ("<B", "latin-1"), b"\x8a": ("<B", "integer"),
    b"B": ("<I", "bytes"), b"C": ("<B", "bytes"), b"\x8e": ("<Q", "bytes"),
    b"\x96": ("<Q", "bytes"),
}  # fmt: skip


class Name:
    """Something the pickle calls by name. Never imported; "calling" it gives the Name again."""

    def __init__(self, text):
        self.text = text


class Storage(NamedTuple):
    key: str  # where its bytes are, in the words of section 3
    dtype: str
    count: int


class View(NamedTuple):
    storage: Storage
    offset: int
    shape: tuple
    strides: tuple


class Pickle:
    """One pickle, stepped through. Only dicts, lists, tuples, strings, numbers come out, with Name
    and View among them. Storages and Names met on the way are added to the two collections."""

    def __init__(self, file, storages, mentions):
        self.file, self.storages, self.mentions = file, storages, mentions
        # A mark starts a new stack on top of the old ones, so nothing can reach below it.
        self.stack, self.below, self.memo = [], [], {}

    def run(self):
        for _ in range(MOST_OPCODES):
            opcode = self.take(1)
            if opcode == b".":
                return self.pop()
            self.step(opcode)
        raise Unfit("its pickle does not come to an end")

    def step(self, op):
        push = lambda value: self.stack.append(value)
        match op:
            case _ if op in FRESH:
                push(FRESH[op]())
            case _ if op in FIXED:
                push(self.number(FIXED[op]))
            case _ if op in COUNTED:
                push(self.counted(*COUNTED[op]))
            case b"\x80" | b"\x95":  # the protocol's version; the length of a frame
                self.take(1 if op == b"\x80" else 8)
            case b"(":
                self.below.append(self.stack)
                self.stack = []
            case b"t" | b"l":
                items = self.to_mark()
                push(tuple(items) if op == b"t" else items)
            case b"\x85" | b"\x86" | b"\x87":  # tuples of one, two, three
                items = [self.pop() for _ in range(op[0] - 0x84)]
                push(tuple(reversed(items)))
            case b"q" | b"r":
                self.memo[self.number("<B" if op == b"q" else "<I")] = self.top()
            case b"\x94":
                self.memo[len(self.memo)] = self.top()
            case b"h" | b"j":
                push(self.recall(self.number("<B" if op == b"h" else "<I")))
            case b"c":
                push(self.name(self.line(), self.line()))
            case b"\x93":
                name, module = self.pop(), self.pop()
                push(self.name(module, name))
            case b"R" | b"\x81":  # call a function; make an object of a class
                args, function = self.pop(), self.pop()
                push(self.call(function, args))
            case b"b" | b"0":  # an object's attributes, among which are no weights; drop the top
                self.pop()
            case b"s":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case b"u":
                self.set_items(self.to_mark())
            case b"a":
                self.extend([self.pop()])
            case b"e" | b"\x90":
                self.extend(self.to_mark())
            case b"Q":
                push(self.storage(self.pop()))
            case _:
                raise Unfit(f"its pickle holds an instruction, {op!r}, that no weights need")

    def recall(self, key):
        if key not in self.memo:
            raise Unfit("its pickle refers to what it never stored")
        return self.memo[key]

    def take(self, count):
        if count > MOST_BYTES:
            raise Unfit(f"its pickle claims a field of {count} bytes")
        data = self.file.read(count)
        if len(data) < count:
            raise Unfit("its pickle is cut off")
        return data

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def counted(self, form, kind):
        data = self.take(self.number(form))
        if kind == "bytes":
            return data
        if kind == "integer":
            return int.from_bytes(data, "little", signed=True)
        return data.decode(kind, "replace")

    def line(self):
        line = self.file.readline(1024)
        if not line.endswith(b"\n"):
            raise Unfit("its pickle is cut off")
        return line[:-1].decode("utf-8", "replace")

    def top(self):
        if not self.stack:
            raise Unfit("its pickle takes from an empty stack")
        return self.stack[-1]

    def pop(self):
        self.top()
        return self.stack.pop()

    def to_mark(self):
        if not self.below:
            raise Unfit("its pickle has an end without a beginning")
        items, self.stack = self.stack, self.below.pop()
        return items

    def name(self, module, name):
        if type(module) is not str or type(name) is not str:
            raise Unfit("its pickle names something without a name")
        text = f"{module}.{name}"
        if text not in KNOWN and self.dtype(text) is None:
            self.mentions.add(text)
        return Name(text)

    def dtype(self, text):
        module, _, name = text.rpartition(".")
        return STORAGES.get(name) if module in ("torch", "torch.storage", "torch.cuda") else None

    def call(self, function, args):
        if type(function) is not Name or type(args) is not tuple:
            raise Unfit("its pickle calls something that has no name")
        if function.text == "collections.OrderedDict" and len(args) == 0:
            return {}
        if function.text in REBUILD_TENSOR and len(args) >= 4:
            # A seventh argument flags numbers still to be conjugated or negated. No weights are.
            return Name("complex tensor") if len(args) > 6 and args[6] else self.view(*args[:4])
        if function.text in REBUILD_PARAMETER and len(args) >= 1:
            return args[0]
        return function

    def view(self, storage, offset, shape, strides):
        if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
            raise Unfit("its pickle builds a tensor out of something else")
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        if not whole or len(shape) != len(strides) or len(shape) > 8:
            raise Unfit("its pickle holds a tensor of an impossible shape")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
        if math.prod(shape) and last >= storage.count:
            raise Unfit("its pickle holds a tensor that reaches beyond its bytes")
        # 16 bytes can be "expanded" to a million times a million. No weights are.
        if math.prod(shape) > storage.count:
            return Name("expanded tensor")
        return View(storage, offset, shape, strides)

    def storage(self, key):
        """("storage", torch.FloatStorage, "17", "cpu", 1000) and, in old files, one None more"""
        if type(key) is not tuple or len(key) not in (5, 6) or any(k is not None for k in key[5:]):
            raise Unfit("its pickle refers to data in an unknown way")
        if type(key[0]) is str and key[0] == "module":
            raise Unfit("it holds a program, not a dict of tensors; save state_dict()")
        _, kind, name, _, count = key[:5]
        dtype = self.dtype(kind.text) if type(kind) is Name else None
        if dtype is None or type(name) is not str or type(count) is not int or count < 0:
            raise Unfit("its pickle refers to data of an unknown type")
        storage = Storage(name, dtype, count)
        # PyTorch silently goes by the first claim. Two claims about one storage: no honest file.
        if self.storages.setdefault(name, storage) != storage:
            raise Unfit(f"its pickle calls storage {shown(name)} two different things")
        return storage

    def set_items(self, items):
        target = self.top()
        if len(items) % 2 or type(target) not in (dict, Name):
            raise Unfit("its pickle puts items into what is not a dict")
        if type(target) is dict:
            for key, value in zip(items[::2], items[1::2]):
                if type(key) in (str, int):  # anything else (classes, in Lightning's files) would
                    target[key] = value  # have to be hashed

    def extend(self, items):
        target = self.top()
        if type(target) not in (list, Name):
            raise Unfit("its pickle appends to what is not a list")
        if type(target) is list:
            target.extend(items)


# %% 3. PyTorch's two formats -----------------------------------------------------------------
# Since version 1.6 (2020) a zip: NAME/data.pkl is the pickle, NAME/data/17 the bytes of storage
# "17", not compressed. Before that five pickles one after the other, the fourth is the object, and
# then the storages in the order of the fifth. The file's ending (.ckpt .pt .pth .bin) says nothing.

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_zip(path):
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) != len(archive.infolist()) or len(members) > 200_000:
            raise Unfit("its zip directory has two members of one name, or too many")
    roots = [name[: -len("data.pkl")] for name in members if re.fullmatch("[^/]+/data.pkl", name)]
    if len(roots) != 1:
        raise Unfit("it is a zip archive, but not one that PyTorch made")
    root = roots[0]
    if root + "constants.pkl" in members:
        raise Unfit("it is a TorchScript program; a state dict is needed")
    storages, mentions = {}, set()
    with open(path, "rb") as file:
        start, size = payload(file, members[root + "data.pkl"])
        if size > MOST_BYTES:
            raise Unfit(f"its pickle has {size} bytes, far more than any weights need")
        file.seek(start)
        top = Pickle(io.BytesIO(file.read(size)), storages, mentions).run()
        if root + "byteorder" in members:
            file.seek(payload(file, members[root + "byteorder"])[0])
            if file.read(6) != b"little":
                raise Unfit("it was written on a big-endian machine; save it on another")
        starts = {}
        for key, storage in storages.items():
            if f"{root}data/{key}" not in members:
                raise Unfit(f"its storage {shown(key)} is missing")
            starts[key], size = payload(file, members[f"{root}data/{key}"])
            if size != storage.count * itemsize(storage.dtype):
                raise Unfit(f"its storage {shown(key)} has another size than claimed")
    return state_dict(path, top, starts, mentions)


def payload(file, member):
    """-> (start, size) of a member's bytes. zipfile would read them too, but in one piece, and it
    insists on checksums, which PyTorch can be told to leave out."""
    if member.flag_bits & 1 or member.compress_type != zipfile.ZIP_STORED:
        raise Unfit("it is compressed or encrypted; PyTorch's own files never are")
    if not 0 <= member.header_offset < size_of(file):
        raise Unfit("its zip directory contradicts itself")
    file.seek(member.header_offset)
    # The local header repeats the name, and may pad: only it knows where the bytes begin.
    mark, name_length, padding = struct.unpack("<4s22xHH", file.read(30))
    encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
    if mark != b"PK\3\4" or file.read(name_length) != member.orig_filename.encode(encoding):
        raise Unfit("its zip directory contradicts itself")
    start = file.tell() + padding
    if member.compress_size != member.file_size or start + member.file_size > size_of(file):
        raise Unfit("it is cut off")
    return start, member.file_size


def read_legacy(path):
    storages, mentions, starts = {}, set(), {}
    with open(path, "rb") as file:
        magic = Pickle(file, {}, set()).run()
        if type(magic) is not int or magic != LEGACY_MAGIC:
            raise Unfit("it is a pickle, but not one that PyTorch made")
        Pickle(file, {}, set()).run()  # the version, 1001 ever since
        system = Pickle(file, {}, set()).run()
        if type(system) is not dict or system.get("little_endian") is not True:
            raise Unfit("it was written on a big-endian machine; save it on another")
        top = Pickle(file, storages, mentions).run()
        keys = Pickle(file, {}, set()).run()
        if type(keys) is not list or any(type(k) is not str or k not in storages for k in keys):
            raise Unfit("its list of storages does not fit its pickle")
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            if count != storages[key].count:
                raise Unfit(f"its storage {shown(key)} has another size than claimed")
            starts[key] = file.tell()
            end = file.tell() + count * itemsize(storages[key].dtype)
            if end > size_of(file):
                raise Unfit("it is cut off")
            file.seek(end)
        if len(starts) != len(storages):
            raise Unfit("some of its storages are missing")
    return state_dict(path, top, starts, mentions)


def size_of(file):
    return os.fstat(file.fileno()).st_size


def state_dict(path, top, starts, mentions):
    """Unwrap {"state_dict": {...}}, at most twice: a dict can hold itself under that name."""
    config = None
    for _ in range(3):
        if type(top) is not dict:
            what = shown(top.text) if type(top) is Name else type(top).__name__
            raise Unfit(f"it holds a {what} and not a dict of tensors")
        config = config or top.get("sd_config")
        if type(top.get("state_dict")) is not dict:
            break
        top = top["state_dict"]
    if "string_to_param" in top:  # textual inversion, as AUTOMATIC1111's program writes it
        if type(top["string_to_param"]) is not dict:
            raise Unfit("it is a textual inversion of PyTorch's ParameterDict; only a dict will do")
        top = {f"string_to_param.{name}": v for name, v in top["string_to_param"].items()}
    tensors = {}
    for name, view in top.items():
        if type(name) is str and type(view) is View:
            storage = view.storage
            start = starts[storage.key] + view.offset * itemsize(storage.dtype)
            tensors[name] = Tensor(path, start, storage.dtype, view.shape, view.strides)
    source = Source(path, tensors, mentions=mentions)
    if config is not None:
        source.numbers, source.told_by = config, "the checkpoint's sd_config"
    return source


# %% 4. safetensors ---------------------------------------------------------------------------
# Eight bytes of length, that much JSON, then the tensors back to back. A reader's only work is to
# distrust the JSON: the tensors must fill the rest of the file exactly, no hole and no overlap.


def read_safetensors(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length), object_pairs_hook=no_duplicates)
        data, size = 8 + length, size_of(file)
    if type(header) is not dict:
        raise Unfit("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if type(metadata) is not dict or any(type(v) is not str for v in metadata.values()):
        raise Unfit("its metadata is not text")
    if metadata.get("format", "").startswith("sd.py"):
        raise Unfit("it already is a flat file. Give it to sd.py as it is")
    tensors, ranges = {}, []
    for name, entry in header.items():
        dtype, shape, begin, end = checked_entry(name, entry)
        strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
        tensors[name] = Tensor(path, data + begin, dtype, shape, tuple(strides))
        ranges.append((begin, end))
    reached = 0
    for begin, end in sorted(ranges):
        if begin != reached:
            raise Unfit("its tensors overlap, or leave a hole")
        reached = end
    if data + reached != size:
        raise Unfit(f"its header describes {data + reached} bytes, it has {size}")
    return Source(path, tensors, metadata=metadata)


def no_duplicates(pairs):
    if len(dict(pairs)) != len(pairs):
        raise Unfit("its header has two entries of one name")
    return dict(pairs)


def checked_entry(name, entry):
    """-> dtype, shape, begin, end"""
    whole = lambda v: type(v) is list and all(type(n) is int and 0 <= n < 2**48 for n in v)
    if type(entry) is dict and set(entry) == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = type(dtype) is str and dtype in NUMPY
        fits = whole(shape) and len(shape) <= 8 and whole(offsets) and len(offsets) == 2
        if known and fits and offsets[1] - offsets[0] == math.prod(shape) * itemsize(dtype):
            return dtype, tuple(shape), *offsets
    raise Unfit(f"its header has an impossible entry for {shown(name)}")


# Other things that carry these endings, by their first bytes.
NOT_WEIGHTS = (
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (0, b"Rar!", "a rar archive; unpack it first"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"PK", "a zip archive that is empty or in parts"),
    (257, b"ustar", "a tar archive; if PyTorch 0.1 made it, save it again with a newer one"),
    (0, b"GGUF", "a GGUF file, already quantised; take the original it was made from"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the weights: run git lfs pull"),
    (0, b"<", "a web page, not the weights: download it again"),
)


DAMAGE = (
    ValueError, OverflowError, RecursionError, EOFError, struct.error, zipfile.BadZipFile,
    NotImplementedError,  # zipfile's, for a zip of a later version than it knows
)  # fmt: skip


def read_file(path):
    """Any of the formats, recognised by its first bytes."""
    if not path.is_file():
        there = "is not a file" if path.exists() else "does not exist"
        raise ConversionError(f"{path} {there}. Give a checkpoint or a diffusers folder.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    try:
        with about(path):
            if head.startswith(b"PK\3\4"):
                return read_zip(path)
            if size > 8 and length <= min(size - 8, 100_000_000) and head[8:9] in (b"{", b" "):
                return read_safetensors(path)
            if head.startswith(b"\x80"):
                return read_legacy(path)
            for place, mark, what in NOT_WEIGHTS:
                if head[place:].startswith(mark):
                    raise Unfit(f"it is {what}")
            raise Unfit("it is empty" if not size else "it is in no format known here")
    except ConversionError:
        raise
    except DAMAGE as error:
        why = f"{type(error).__name__}: {shown(error)}"
        raise ConversionError(f"{path} is damaged ({why}). Download it again.") from None


# %% 5. diffusers folders ---------------------------------------------------------------------
# One folder per network, each with a config.json. Its fields can describe many models that are not
# Stable Diffusion 1 or 2 and whose tensors still look alike, so every field that changes what is
# computed must have the value that sd.py's code has.

PARTS = {  # folder -> what its weights are called, in the two formats
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
    "controlnet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "safety_checker": ("model.safetensors", "pytorch_model.bin"),
}
MODEL = ("unet", "vae", "text_encoder")  # those that every model has
PIPELINES = re.compile("StableDiffusion(Img2Img|Inpaint|ControlNet)?Pipeline(Legacy|Safe)?")
MUST_BE = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "conv_in_kernel": 3,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "only_cross_attention": False, "mid_block_only_cross_attention": False,
        "dual_cross_attention": False, "cross_attention_norm": None, "attention_type": "default",
        "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
        "act_fn": "silu", "norm_eps": 1e-5, "mid_block_scale_factor": 1, "downsample_padding": 1,
        "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0,
        "time_embedding_type": "positional", "time_embedding_dim": None, "time_cond_proj_dim": None,
        "time_embedding_act_fn": None, "timestep_post_act": None, "conv_out_kernel": 3,
        "class_embed_type": None, "num_class_embeds": None, "class_embeddings_concat": False,
        "addition_embed_type": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
        "resnet_time_scale_shift": "default", "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1, "num_attention_heads": None,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "act_fn": "silu", "mid_block_add_attention": True, "shift_factor": None,
        "use_quant_conv": True, "use_post_quant_conv": True, "latents_mean": None,
        "latents_std": None,
    },
    "text_encoder": {"model_type": "clip_text_model", "layer_norm_eps": 1e-5},
    "controlnet": {
        "_class_name": "ControlNetModel", "in_channels": 4, "conditioning_channels": 3,
        "layers_per_block": 2, "mid_block_type": "UNetMidBlock2DCrossAttn",
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "only_cross_attention": False, "act_fn": "silu", "norm_eps": 1e-5,
        "mid_block_scale_factor": 1, "downsample_padding": 1, "flip_sin_to_cos": True,
        "freq_shift": 0, "transformer_layers_per_block": 1, "encoder_hid_dim": None,
        "class_embed_type": None, "num_class_embeds": None, "addition_embed_type": None,
        "resnet_time_scale_shift": "default", "num_attention_heads": None,
        "controlnet_conditioning_channel_order": "rgb",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    },
    "scheduler": {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "trained_betas": None, "rescale_betas_zero_snr": False,
    },
}  # fmt: skip
NUMBERS_IN = {  # section 8's number: the field that holds it, and its default
    # Subtle: attention_head_dim is the number of heads. The wrong name stuck.
    "unet": {"heads": ("attention_head_dim", 8), "groups": ("norm_num_groups", 32)},
    "controlnet": {"heads": ("attention_head_dim", 8), "groups": ("norm_num_groups", 32)},
    "vae": {"groups": ("norm_num_groups", 32), "scale": ("scaling_factor", 0.18215)},
    "text_encoder": {
        "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 8),
        "activation": ("hidden_act", "quick_gelu"),
    },
}  # fmt: skip
# A field that is not there has its class's default, which is the value above except in these.
DEFAULTS = {"scheduler": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}}


def read_folder(path, parts):
    check_pipeline(path)
    source = Source(path, {}, told_by="the folder's config files")
    for part in parts:
        if (path / part).is_dir():
            add_part(source, path / part, part)
        elif part != "vae":  # which --vae can supply, so that is asked for later
            raise ConversionError(f"{path} has no {part} folder; it is not a whole model.")
    if (path / "safety_checker").is_dir():
        for file in part_files(path / "safety_checker", "safety_checker"):
            read = read_file(file)
            source.tensors |= {f"safety_checker/{n}": t for n, t in read.tensors.items()}
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        source.numbers["prediction"] = read_prediction(scheduler)
    if (path / "tokenizer" / "merges.txt").exists():
        source.merges = path / "tokenizer" / "merges.txt"
    return source


def check_pipeline(path):
    index, config = path / "model_index.json", path / "config.json"
    if index.exists():
        name = read_json(index).get("_class_name")
        if type(name) is not str or not PIPELINES.fullmatch(name):
            raise ConversionError(
                f"{index}: _class_name is {shown(name)}. Only Stable Diffusion 1.x and 2.x, "
                "the StableDiffusionPipeline, can be converted."
            )
    elif config.exists():
        name = shown(read_json(config).get("_class_name", "one part"))
        raise ConversionError(f"{path} is one part of a model ({name}). Give the folder above it.")


def read_prediction(path):
    config = read_json(path)
    check_fields("scheduler", config, path)
    kinds = {"epsilon": "eps", "v_prediction": "v"}
    told = config.get("prediction_type", "epsilon")
    if type(told) is not str or told not in kinds:
        raise ConversionError(f"{path}: prediction_type is {shown(told)}; it can be {[*kinds]}.")
    return kinds[told]


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def fetch(name, log):
    """A diffusers repository on the Hugging Face hub -> the folder that its needed files are in."""
    by_hand = ", ".join(["model_index.json", *(f"{part}/*" for part in MODEL), "scheduler/*"])
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ConversionError(
            f"{name} is no file here. To fetch it from the Hugging Face hub: pip install "
            f"huggingface_hub; or download by hand from https://huggingface.co/{name} these, and "
            f"give their folder: {by_hand}"
        ) from None
    try:
        there = hub.list_repo_files(name)
        wanted = [f for f in there if f in ("model_index.json", "tokenizer/merges.txt")]
        wanted += [f for f in there if re.fullmatch(r"\w+/(scheduler_)?config\.json", f)]
        for part in (*MODEL, "safety_checker"):
            wanted += hub_weights(there, part)
        log(f"fetching {len(wanted)} files of {name} from the Hugging Face hub")
        return Path(hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # noqa: BLE001  what the network's library raises differs by version
        why = shown(str(error).strip().split("\n")[0], 200)
        raise ConversionError(f"{name} can't be fetched from the Hugging Face hub: {why}") from None


def hub_weights(there, part):
    """The smallest complete form of a network's weights: half precision, safetensors, shards."""
    for variant, ending in ((".fp16", 0), ("", 0), (".fp16", 1), ("", 1)):
        stem, _, end = PARTS[part][ending].rpartition(".")
        pattern = rf"{part}/{stem}{variant}(-\d+-of-\d+)?\.{end}(\.index(\.fp16)?\.json)?"
        pattern += rf"|{part}/{stem}\.{end}\.index{variant}\.json"
        if found := [f for f in there if re.fullmatch(pattern, f)]:
            return found
    return []


def add_part(source, folder, part):
    """Add one network's tensors, named "unet/conv_in.weight", and its config's numbers."""
    config = read_json(folder / "config.json")
    inpaints = part == "unet" and config.get("in_channels") == 9
    as_usual = config | {"in_channels": 4} if inpaints else config
    check_fields(part, as_usual, folder / "config.json")
    numbers = {key: config.get(*field) for key, field in NUMBERS_IN[part].items()}
    if type(numbers.get("heads")) is int and part != "text_encoder":
        numbers["heads"] = [numbers["heads"]] * 4
    source.numbers[{"text_encoder": "text", "controlnet": "unet"}.get(part, part)] = numbers
    if part == "unet" and type(config.get("sample_size")) is int:
        source.numbers["size"] = 8 * config["sample_size"]
    for file in part_files(folder, part):
        read = read_file(file)
        source.tensors |= {f"{part}/{name}": tensor for name, tensor in read.tensors.items()}
        source.mentions |= read.mentions


def part_files(folder, part):
    """The files of one network: one, or the shards that an index lists. Full precision first."""
    for variant in ("", ".fp16"):
        for name in PARTS[part]:
            stem, end = name.split(".")
            if (folder / f"{stem}{variant}.{end}").exists():
                return [folder / f"{stem}{variant}.{end}"]
            spellings = (f"{stem}.{end}.index{variant}.json", f"{stem}{variant}.{end}.index.json")
            for index in spellings:
                if (folder / index).exists():
                    return shards(folder / index)
    looked_for = " or ".join(PARTS[part])
    raise ConversionError(f"{folder} has no weights: no {looked_for}. Was the download complete?")


def shards(index):
    files = read_json(index).get("weight_map")
    files = set(files.values()) if type(files) is dict else {None}
    for name in files:  # a path in there could point anywhere
        if type(name) is not str or not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ConversionError(
                f"{index} names the file {shown(name)}; only plain names will do."
            )
    return [index.parent / name for name in sorted(files)]


def check_fields(part, config, path):
    for name, wanted in MUST_BE[part].items():
        value = config.get(name, DEFAULTS.get(part, {}).get(name, wanted))
        if type(value) is list and type(wanted) is not list and value:
            value = value[0] if all(v == value[0] for v in value) else value  # one per level
        if (value or None) != (wanted or None):  # null, false and 0 all mean: not there
            raise ConversionError(
                f"{path}: {name} is {shown(value)}, but sd.py only has {wanted}. "
                "This model is not a Stable Diffusion 1.x or 2.x that it can run."
            )


def read_json(path):
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConversionError(f"{path} is far too large for what it should hold.")
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable JSON: {shown(error)}") from None
    if type(value) is not dict:
        raise ConversionError(f"{path} is not a JSON object.")
    return value


# %% 6. Which model is it? --------------------------------------------------------------------
# Names tell. Each part of a model has a few places where it may be; a name that is always there
# shows which. ORIGINAL names are CompVis' and OpenCLIP's, DIFFUSERS those of the two libraries
# (whose text encoder SD 1.x had from the beginning).

ORIGINAL, DIFFUSERS = 0, 1
VAE_MARKS = ("decoder.up.0.block.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight")
CLIP_MARK, OPENCLIP_MARK = "embeddings.token_embedding.weight", "token_embedding.weight"
PLACES = {  # part: prefix, layout, the name that is always there
    "unet": (
        ("model.diffusion_model.", ORIGINAL, "input_blocks.0.0.weight"),
        ("unet/", DIFFUSERS, "conv_in.weight"),
        ("model_ema.diffusion_model", ORIGINAL, "input_blocks00weight"),
    ),
    "vae": (
        ("first_stage_model.", ORIGINAL, VAE_MARKS[0]),
        ("vae/", DIFFUSERS, VAE_MARKS[1]),
        ("vae.", ORIGINAL, VAE_MARKS[0]),
        ("", ORIGINAL, VAE_MARKS[0]),
        ("", DIFFUSERS, VAE_MARKS[1]),
    ),
    "controlnet": (
        ("control_model.", ORIGINAL, "zero_convs.0.0.weight"),
        ("", ORIGINAL, "zero_convs.0.0.weight"),
        ("controlnet/", DIFFUSERS, "controlnet_down_blocks.0.weight"),
        ("", DIFFUSERS, "controlnet_down_blocks.0.weight"),
    ),
    "text": (
        ("cond_stage_model.transformer.text_model.", DIFFUSERS, CLIP_MARK),
        ("cond_stage_model.transformer.", DIFFUSERS, CLIP_MARK),
        ("cond_stage_model.model.", ORIGINAL, OPENCLIP_MARK),
        ("conditioner.embedders.0.model.", ORIGINAL, OPENCLIP_MARK),
        ("text_encoder/text_model.", DIFFUSERS, CLIP_MARK),
        ("text_encoder/", DIFFUSERS, CLIP_MARK),
    ),
}
OTHER_MODELS = (  # what it is, and a name that only it has
    ("Stable Diffusion XL", r"conditioner\.embedders\.1\."),
    ("the refiner of SDXL", r"conditioner\.embedders\.0\.model\.transformer\.resblocks\.31\."),
    ("SD 3, Flux or a relative", r"(.*\.)?(joint|double|single)_blocks\."),
    ("a video model", r".*(time_stack|motion_modules)\."),
    ("the x4 upscaler", r"low_scale_model\.|model\.diffusion_model\.label_emb\.weight$"),
    ("unCLIP", r"embedder\.|noise_augmentor\.|model\.diffusion_model\.label_emb\."),
    ("depth-to-image", r"depth_model\."),
    ("part of a ControlNet, or one in a form not known here", r"control_|lora_control|difference$"),
)
CHANNELS = {5: "depth-to-image", 7: "the x4 upscaler", 8: "instruct-pix2pix"}
NO_MODELS = (  # files without a UNet
    ("a LoRA without names", r"(text_encoder|unet):\d"),
    ("a textual inversion of SDXL", r"(clip_l|clip_g)$"),
    ("a safety checker", r"(.*\.)?concept_embeds$"),
    ("a UNet alone, cut out of a diffusers folder", r"(unet\.)?down_blocks\."),
    ("a text encoder alone", r"(text_model\.)?embeddings\.token_embedding\."),
)


class Part(NamedTuple):
    tensors: dict
    prefix: str
    layout: int

    def name(self, inner):
        if self.prefix.startswith("model_ema."):  # where the dots were removed
            inner = inner.replace(".", "")
        return self.prefix + inner

    def size(self, original, diffusers, axis):
        name = self.name((original, diffusers)[self.layout])
        tensor = self.tensors.get(name)
        if tensor is None or len(tensor.shape) <= axis or not tensor.shape[axis]:
            raise Unfit(f"the tensor {shown(name)} is missing or has no such shape")
        return tensor.shape[axis]


def find_part(tensors, part):
    for prefix, layout, mark in PLACES[part]:
        if prefix + mark in tensors:
            return Part(tensors, prefix, layout)
    return None


def find_parts(source, vae_source):
    """-> the three parts, or a sentence about what this is instead."""
    tensors, kind = source.tensors, None
    for what, pattern in OTHER_MODELS:
        kind = kind or (any(re.match(pattern, name) for name in tensors) and what)
    unet, text, vae = (find_part(tensors, part) for part in ("unet", "text", "vae"))
    if unet and not kind:
        channels = unet.size("input_blocks.0.0.weight", "conv_in.weight", 1)
        if channels not in (4, 9):
            kind = CHANNELS.get(channels, "an unknown model") + f" (a UNet of {channels} channels)"
    if kind:
        raise Unfit(
            f"it is {kind}. Only Stable Diffusion 1.x and 2.x will do, and their inpainting models"
        )
    if unet is None:
        raise Unfit(without_unet(tensors, vae))
    if text is None:
        raise Unfit("it has no text encoder. A whole model is needed, not a UNet alone")
    if vae_source is not None:
        vae = find_part(vae_source.tensors, "vae")
        if vae is None:
            raise Unfit(f"there is no VAE in {vae_source.path}; give another to --vae")
    if vae is None:
        raise Unfit("it has no VAE. Give one with --vae FILE, any checkpoint's will do")
    return unet, text, vae


def without_unet(tensors, vae):
    if vae:
        return "it is a VAE alone. Convert a whole model and give this one to --vae"
    for what, pattern in NO_MODELS:
        if any(re.match(pattern, name) for name in tensors):
            return f"it is {what}, and a whole model is needed"
    few = ", ".join(shown(name) for name in list(tensors)[:3]) or "none at all"
    return f"it holds no Stable Diffusion. Of its {len(tensors)} tensors the first are: {few}"


# %% 7. What sd.py needs ----------------------------------------------------------------------
# The table of every tensor: its name in sd.py, its shape as PyTorch has it, and what the source
# calls it. 686 in the UNet, 248 in the VAE and 196 in the text encoder, for SD 1.x. The left names
# of each pair below are the original's, the right ones diffusers'. They agree on more than shows.


class Want(NamedTuple):
    flat: str
    shape: tuple  # (out, in, kh, kw); a 1x1 convolution is (out, in)
    names: tuple  # in the source, the likeliest first
    third: int | None = None  # of a tensor that holds q, k and v in one
    factor: float = 1.0  # to multiply it by


class Table:
    def __init__(self, flat, part):
        self.flat, self.part, self.wants = flat, part, []

    def add(self, flat, original, diffusers, shape, bias=True, third=None):
        """A layer, its weight and its bias. Two names with a | between them are the same thing."""
        names = (original, diffusers)[self.part.layout].split("|")
        for leaf, size in (("weight", shape), ("bias", shape[:1]))[: 2 if bias else 1]:
            found = tuple(self.part.name(with_leaf(name, leaf)) for name in names)
            self.wants.append(Want(f"{self.flat}.{flat}.{leaf}", size, found, third))

    def inside(self, *places):
        """The same add, for names below these three."""

        def add(*names_and_shape, **options):
            *names, shape = names_and_shape
            self.add(*(f"{place}.{n}" for place, n in zip(places, names)), shape, **options)

        return add


def with_leaf(name, leaf):
    """Nearly always name.weight; but OpenCLIP has in_proj_weight, and positional_embedding alone"""
    if name == "positional_embedding":
        return name
    return name + leaf if name.endswith("_") else f"{name}.{leaf}"


# A residual block has the same six layers everywhere; only the originals named them twice.
UNET_LAYERS = "in_layers.0 in_layers.2 emb_layers.1 out_layers.0 out_layers.3 skip_connection"
VAE_LAYERS = "norm1 conv1 - norm2 conv2 nin_shortcut"


def residual(add, originals, c_in, c_out, time=None):
    norm1, conv1, emb, norm2, conv2, skip = originals.split()
    add("norm1", norm1, "norm1", (c_in,))
    add("conv1", conv1, "conv1", (c_out, c_in, 3, 3))
    if time:
        add("time", emb, "time_emb_proj", (c_out, time))
    add("norm2", norm2, "norm2", (c_out,))
    add("conv2", conv2, "conv2", (c_out, c_out, 3, 3))
    if c_in != c_out:
        add("shortcut", skip, "conv_shortcut", (c_out, c_in))


def way_down(table, widths, context, channels):
    """time1 ... middle, which a ControlNet has too. -> row, for more; the channels of each row"""
    time = 4 * widths[0]

    def row(flat, old, new, k, c_in, c_out, attends):
        add = table.inside(f"{flat}.0", f"{old}.0", f"{new}.resnets.{k}")
        residual(add, UNET_LAYERS, c_in, c_out, time)
        if attends:
            add = table.inside(f"{flat}.1", f"{old}.1", f"{new}.attentions.{k}")
            transformer(add, c_out, context)

    table.add("time1", "time_embed.0", "time_embedding.linear_1", (time, widths[0]))
    table.add("time2", "time_embed.2", "time_embedding.linear_2", (time, time))
    table.add("down.0.0", "input_blocks.0.0", "conv_in", (widths[0], channels, 3, 3))
    c, kept = widths[0], [widths[0]]  # kept: what each row hands over to the way up
    for level, width in enumerate(widths):
        n, new = 3 * level + 1, f"down_blocks.{level}"
        for k in range(2):
            row(f"down.{n + k}", f"input_blocks.{n + k}", new, k, c, width, level < 3)
            c = width
            kept.append(c)
        if level < 3:
            add = table.inside(f"down.{n + 2}.0", f"input_blocks.{n + 2}.0", new)
            add("conv", "op", "downsamplers.0.conv", (c, c, 3, 3))
            kept.append(c)
    row("middle", "middle_block", "mid_block", 0, c, c, True)
    add = table.inside("middle.2", "middle_block.2", "mid_block.resnets.1")
    residual(add, UNET_LAYERS, c, c, time)
    return row, kept


def unet_table(part, widths, context, channels=4):
    table, c = Table("unet", part), widths[-1]
    row, kept = way_down(table, widths, context, channels)
    for level, width in enumerate(reversed(widths)):
        n, new = 3 * level, f"up_blocks.{level}"
        for k in range(3):
            into = c + kept.pop()
            row(f"up.{n + k}", f"output_blocks.{n + k}", new, k, into, width, level > 0)
            c = width
        if level < 3:
            slot = 2 if level > 0 else 1  # behind the transformer, where there is one
            add = table.inside(f"up.{n + 2}.{slot}", f"output_blocks.{n + 2}.{slot}", new)
            add("conv", "conv", "upsamplers.0.conv", (c, c, 3, 3))
    table.add("norm_out", "out.0", "conv_norm_out", (c,))
    table.add("conv_out", "out.2", "conv_out", (4, c, 3, 3))
    return table.wants


def controlnet_table(part, widths, context):
    table = Table("controlnet", part)
    _, kept = way_down(table, widths, context, 4)
    sees = (3, 16, 16, 32, 32, 96, 96, 256, widths[0])
    new = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    for i, (c_in, c_out) in enumerate(itertools.pairwise(sees)):
        names = f"input_hint_block.{2 * i}", f"controlnet_cond_embedding.{new[i]}"
        table.add(f"picture.{i}", *names, (c_out, c_in, 3, 3))
    for i, c in enumerate(kept):
        table.add(f"zero.{i}", f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}", (c, c))
    names = "middle_block_out.0", "controlnet_mid_block"
    table.add(f"zero.{len(kept)}", *names, (widths[-1], widths[-1]))
    return table.wants


def transformer(add, c, context):
    same = lambda flat, name, shape, bias=True: add(flat, name, name, shape, bias=bias)
    same("norm", "norm", (c,))
    same("proj_in", "proj_in", (c, c))
    for k, width in ((1, c), (2, context)):
        inner = f"transformer_blocks.0.attn{k}"
        same(f"norm{k}", f"transformer_blocks.0.norm{k}", (c,))
        same(f"attn{k}.to_q", f"{inner}.to_q", (c, c), bias=False)
        same(f"attn{k}.to_k", f"{inner}.to_k", (c, width), bias=False)
        same(f"attn{k}.to_v", f"{inner}.to_v", (c, width), bias=False)
        same(f"attn{k}.to_out", f"{inner}.to_out.0", (c, c))
    same("norm3", "transformer_blocks.0.norm3", (c,))
    same("ff_in", "transformer_blocks.0.ff.net.0.proj", (8 * c, c))  # 4c values and 4c gates
    same("ff_out", "transformer_blocks.0.ff.net.2", (c, 4 * c))
    same("proj_out", "proj_out", (c, c))


def vae_table(part, widths):
    table, c = Table("vae", part), widths[0]
    table.add("encoder.0", "encoder.conv_in", "encoder.conv_in", (c, 3, 3, 3))
    for level, width in enumerate(widths):
        n, old, new = 3 * level + 1, f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for k in range(2):
            add = table.inside(f"encoder.{n + k}", f"{old}.block.{k}", f"{new}.resnets.{k}")
            residual(add, VAE_LAYERS, c, width)
            c = width
        if level < 3:
            names = f"{old}.downsample.conv", f"{new}.downsamplers.0.conv"
            table.add(f"encoder.{n + 2}.conv", *names, (c, c, 3, 3))
    vae_middle(table, "encoder", 12, c)
    table.add("encoder_norm", "encoder.norm_out", "encoder.conv_norm_out", (c,))
    table.add("encoder_out", "encoder.conv_out", "encoder.conv_out", (8, c, 3, 3))
    table.add("quant", "quant_conv", "quant_conv", (8, 8))
    table.add("post_quant", "post_quant_conv", "post_quant_conv", (4, 4))
    table.add("decoder.0", "decoder.conv_in", "decoder.conv_in", (c, 4, 3, 3))
    vae_middle(table, "decoder", 1, c)
    for level, width in enumerate(reversed(widths)):
        # The original counts the decoder's levels from the picture, diffusers from the latent.
        n, old, new = 4 * level + 4, f"decoder.up.{3 - level}", f"decoder.up_blocks.{level}"
        for k in range(3):
            add = table.inside(f"decoder.{n + k}", f"{old}.block.{k}", f"{new}.resnets.{k}")
            residual(add, VAE_LAYERS, c, width)
            c = width
        if level < 3:
            names = f"{old}.upsample.conv", f"{new}.upsamplers.0.conv"
            table.add(f"decoder.{n + 3}.conv", *names, (c, c, 3, 3))
    table.add("decoder_norm", "decoder.norm_out", "decoder.conv_norm_out", (c,))
    table.add("decoder_out", "decoder.conv_out", "decoder.conv_out", (3, c, 3, 3))
    return table.wants


def vae_middle(table, side, n, c):
    for place, k in ((n, 1), (n + 2, 2)):
        names = f"{side}.mid.block_{k}", f"{side}.mid_block.resnets.{k - 1}"
        residual(table.inside(f"{side}.{place}", *names), VAE_LAYERS, c, c)
    old, new = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"

    def add(flat, names, shape):  # renamed twice, and files in the old layout got the new names too
        found = ["|".join(f"{place}.{name}" for name in names.split()) for place in (old, new)]
        table.add(f"{side}.{n + 1}.{flat}", *found, shape)

    add("norm", "norm group_norm", (c,))
    add("attention.to_q", "q to_q query", (c, c))
    add("attention.to_k", "k to_k key", (c, c))
    add("attention.to_v", "v to_v value", (c, c))
    add("attention.to_out", "proj_out to_out.0 proj_attn", (c, c))


def text_table(part, vocabulary, c, layers):
    table = Table("text_encoder", part)
    names = "token_embedding", "embeddings.token_embedding"
    table.add("token_embedding", *names, (vocabulary, c), bias=False)
    names = "positional_embedding", "embeddings.position_embedding"
    table.add("position_embedding", *names, (77, c), bias=False)
    for k in range(layers):
        place = f"layers.{k}", f"transformer.resblocks.{k}", f"encoder.layers.{k}"
        text_layer(table.inside(*place), c, fused=part.layout == ORIGINAL)
    table.add("norm", "ln_final", "final_layer_norm", (c,))
    return table.wants


def text_layer(add, c, fused):
    add("norm1", "ln_1", "layer_norm1", (c,))
    for third, x in enumerate("qkv"):  # OpenCLIP has one matrix, (3c, c), for all three
        names = f"attention.to_{x}", "attn.in_proj_", f"self_attn.{x}_proj"
        add(*names, (c, c), third=third if fused else None)
    add("attention.to_out", "attn.out_proj", "self_attn.out_proj", (c, c))
    add("norm2", "ln_2", "layer_norm2", (c,))
    add("fc1", "mlp.c_fc", "mlp.fc1", (4 * c, c))
    add("fc2", "mlp.c_proj", "mlp.fc2", (c, 4 * c))


def take(wants, part):
    """-> [(want, name in the source, tensor)], or one message about all that does not fit."""
    tensors, found, missing, wrong = part.tensors, [], [], []
    for want in wants:
        name = next((name for name in want.names if name in tensors), None)
        if name is None:
            missing.append(want.names[0])
            continue
        tensor, shape = tensors[name], want.shape
        if want.third is not None:
            tensor = third_of(tensor, want.third)
        if tensor.dtype not in FLOATS:
            wrong.append(f"{name} is of type {tensor.dtype}")
        elif tensor.shape != shape and not (len(shape) == 2 and tensor.shape == (*shape, 1, 1)):
            wrong.append(f"{name} is {tensor.shape} and should be {shape}")
        found.append((want, name, tensor))
    if missing or wrong:
        few = [f"{name} is missing" for name in missing[:3]] + wrong[:3]
        first = "; ".join(shown(line, 160) for line in few)
        counts = f"{len(missing)} of {len(wants)} tensors are missing, {len(wrong)} do not fit"
        raise Unfit(f"{counts}. First: {first}")
    return found


def safety_table(tensors):
    """-> (wants, part) of the safety checker in a diffusers folder; its vision model moved once."""
    marks = ("safety_checker/vision_model.vision_model.", "safety_checker/vision_model.")
    prefix = next((m for m in marks if m + "embeddings.class_embedding" in tensors), None)
    if prefix is None:
        return [], None
    whole = Part(tensors, "safety_checker/", DIFFUSERS)
    part = Part(tensors, prefix, DIFFUSERS)
    table, outer = Table("safety", part), Table("safety", whole)
    width = part.size("", "embeddings.class_embedding", 0)
    projection = whole.size("", "visual_projection.weight", 0)
    add = lambda flat, name, shape: table.add(flat, "", name, shape, bias=False)
    add("patch", "embeddings.patch_embedding", (width, 3, 14, 14))
    add("position_embedding", "embeddings.position_embedding", (257, width))
    table.add("norm_in", "", "pre_layrnorm", (width,))
    layer = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    layers = len({match[1] for match in map(layer.match, tensors) if match})
    for k in range(layers):
        text_layer(table.inside(f"layers.{k}", "", f"encoder.layers.{k}"), width, fused=False)
    table.add("norm", "", "post_layernorm", (width,))
    outer.add("projection", "", "visual_projection", (projection, width), bias=False)
    bare = {
        "first": (part, "embeddings.class_embedding", (width,)),
        "concepts": (whole, "concept_embeds", (17, projection)),
        "thresholds": (whole, "concept_embeds_weights", (17,)),
        "special": (whole, "special_care_embeds", (3, projection)),
        "special_thresholds": (whole, "special_care_embeds_weights", (3,)),
    }
    wants = [w._replace(flat="safety.patch") if w.flat == "safety.patch.weight" else w
             for w in table.wants + outer.wants]  # fmt: skip
    wants += [Want(f"safety.{f}", shape, (p.name(n),)) for f, (p, n, shape) in bare.items()]
    heads = width // 64 or 1
    return wants, {"width": width, "layers": layers, "heads": heads, "projection": projection}


def third_of(tensor, third):
    """q, k or v: rows 0 to c, c to 2c, 2c to 3c."""
    if not tensor.shape or tensor.shape[0] % 3:
        return tensor  # whose shape will not fit
    rows = tensor.shape[0] // 3
    start = tensor.start + third * rows * tensor.strides[0] * itemsize(tensor.dtype)
    return tensor._replace(start=start, shape=(rows, *tensor.shape[1:]))


# %% 8. Numbers -------------------------------------------------------------------------------
# Widths and depths are read from shapes. How many heads share a width, and the few other numbers
# below, leave no trace in any tensor. The published models follow a rule; a checkpoint may say
# otherwise under "sd_config", as our miniature's does, and a diffusers folder says it in config
# files. The hardest of them is the prediction: SD 2.x exists as a model that predicts the noise
# (eps) and as one that predicts a mixture of noise and picture (v), equal in every name and shape.

whole = lambda n: type(n) is int and 0 < n < 1 << 20
one_of = lambda *words: lambda value: type(value) is str and value in words
SCHEMA = {
    "name": lambda value: type(value) is str and len(value) < 100,
    "size": whole,
    "cfg": lambda value: type(value) in (int, float) and 0 <= value < 100,
    "prediction": one_of("eps", "v"),
    "text": {
        "layers": lambda value: whole(value) and value <= 100,
        "heads": whole,
        "activation": one_of("quick_gelu", "gelu"),
        "pad": lambda value: type(value) is int and 0 <= value < 49408,
    },
    "unet": {
        "heads": lambda value: type(value) is list and len(value) == 4 and all(map(whole, value)),
        "groups": whole,
    },
    "vae": {
        "groups": whole,
        "scale": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    },
}


def merged(guess, told, schema, told_by):
    """The guess, with what was told put in its place: known keys only, of the right type."""
    if type(told) is not dict or not set(told) <= set(schema):
        raise Unfit(f"{told_by} may only hold {', '.join(schema)}")
    out = dict(guess)
    for key, value in told.items():
        if type(schema[key]) is dict:
            value = merged(guess.get(key, {}), value, schema[key], f"{key} in {told_by}")
        elif not schema[key](value):
            raise Unfit(f"{key} in {told_by} is {shown(value)}, which cannot be")
        out[key] = value
    return out


def describe(unet, text, vae, source, vae_source):
    """-> config, all but the prediction and the size that follows from it; is it 2.x; why"""
    unet_widths, context = unet_numbers(unet)
    vae_widths = [
        vae.size(
            f"encoder.down.{k}.block.0.conv1.weight",
            f"encoder.down_blocks.{k}.resnets.0.conv1.weight",
            0,
        )
        for k in range(4)
    ]
    embedding = "token_embedding.weight", "embeddings.token_embedding.weight"
    vocabulary, width = text.size(*embedding, 0), text.size(*embedding, 1)
    if width != context:
        raise Unfit(f"its text encoder speaks in {width} numbers, its UNet hears {context}")
    if vocabulary < 49408:
        raise Unfit(f"its text encoder knows {vocabulary} tokens, CLIP's has 49408")

    told = merged({}, source.numbers, SCHEMA, source.told_by)
    openclip = text.layout == ORIGINAL
    gelu = width == 1024 or told.get("text", {}).get("activation") == "gelu"
    why = f"its text encoder is {'OpenCLIP' if openclip or gelu else 'CLIP'}'s, {width} wide"
    guess = rule(openclip or gelu, unet_widths, width, text_layers(text, width))
    config = merged(guess, told, SCHEMA, source.told_by)
    if vae_source is not None:
        told = merged({}, vae_source.numbers, SCHEMA, vae_source.told_by)
        config["vae"] |= told.get("vae", {})
    config["text"] |= {"width": width, "vocabulary": vocabulary}
    config["unet"] |= {"widths": unet_widths, "context_width": context}
    config["vae"] |= {"widths": vae_widths}
    check_divisions(config)
    return config, openclip or gelu, why


def unet_numbers(part):
    """-> widths of a UNet's floors, or of the copy of them in a ControlNet; the context's width"""
    widths = [
        part.size(
            f"input_blocks.{3 * k + 1}.0.in_layers.2.weight",
            f"down_blocks.{k}.resnets.0.conv1.weight",
            0,
        )
        for k in range(4)
    ]
    to_k = "transformer_blocks.0.attn2.to_k.weight"
    return widths, part.size(f"input_blocks.1.1.{to_k}", f"down_blocks.0.attentions.0.{to_k}", 1)


def rule(second, widths, text_width, layers):
    """How Stable Diffusion 1.x and 2.x were published."""
    text = {"layers": layers, "heads": text_width // 64, "activation": "quick_gelu", "pad": 49407}
    config = {
        "kind": "model",
        "name": "Stable Diffusion 1.x",
        "text": text,
        "unet": {"heads": [8] * 4, "groups": 32},
        "vae": {"groups": 32, "scale": 0.18215},
    }
    if second:
        config["name"] = "Stable Diffusion 2.x"
        config["unet"]["heads"] = [width // 64 for width in widths]
        text |= {"activation": "gelu", "pad": 0}
    return config


def text_layers(part, width):
    """SD 2.x reads its text before the last of 24 layers: the last one is not needed."""
    layer = r"transformer\.resblocks" if part.layout == ORIGINAL else r"encoder\.layers"
    pattern = re.compile(re.escape(part.prefix) + layer + r"\.(\d+)\.")
    found = {match[1] for match in map(pattern.match, part.tensors) if match}
    usual = {768: 12, 1024: 23}  # so that a file that lost a layer is noticed
    return usual.get(width) or min(len(found), 23 if part.layout == ORIGINAL else len(found))


def check_divisions(config):
    unet, vae, text = config["unet"], config["vae"], config["text"]
    pairs = [(width, unet["groups"], "groups of the UNet") for width in unet["widths"]]
    pairs += [(width, vae["groups"], "groups of the VAE") for width in vae["widths"]]
    pairs += [(w, heads, "heads of the UNet") for w, heads in zip(unet["widths"], unet["heads"])]
    for width, number, what in [
        *pairs,
        (text["width"], text["heads"], "heads of the text encoder"),
    ]:
        if number < 1 or width % number:
            raise Unfit(
                f"the {what} ({number}) do not divide a width of {width}. It is not one of the "
                'published sizes; such a model must bring its numbers, under "sd_config"'
            )


def find_prediction(asked, source, second, found):
    """-> "eps" or "v", and why"""
    if asked:
        return asked, "--prediction says so"
    if "prediction" in source.numbers:
        return source.numbers["prediction"], f"from {source.told_by}"
    yaml = source.path.with_suffix(".yaml")
    if source.path.is_file() and yaml.is_file():
        with open(yaml, encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
        line = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
        if line and line[1] in ("eps", "v"):
            return line[1], f"{yaml.name} beside it says so"
        if not line and "linear_start" in text:  # a config of the original's; eps is its default
            return "eps", f"{yaml.name} beside it does not say v"
    if not second:
        return "eps", "every Stable Diffusion 1.x does"
    # ComfyUI's observation, for want of anything better: training for v moves these biases more.
    tensor = next(t for want, _, t in found if want.flat == "unet.up.11.1.norm1.bias")
    spread = float(np.std(tensor.float32()))
    sign, prediction = (">", "v") if spread > 0.09 else ("<=", "eps")
    return prediction, (
        f"a guess: the last attention's biases have a deviation of {spread:.3f} {sign} 0.09; "
        "if the pictures are blots, convert again with the other --prediction"
    )


def other_schedule(tensors):
    """Does the source's own noise schedule differ from the one that sd.py computes?"""
    tensor = tensors.get("alphas_cumprod")
    if tensor is None or tensor.shape != (1000,) or tensor.dtype not in FLOATS:
        return False
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    computed = np.cumprod(1 - betas)
    return not np.all(np.abs(tensor.float32() - computed) <= computed / 256)  # bfloat16's error


def read_merges(path):
    """CLIP's 48,894 merges, "a b" per line, as bytes. Headers go, and lines CLIP never used."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing. It is part of this repository; get it again.")
    lines = path.read_text("utf-8", errors="replace").split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    pairs = [line.split() for line in lines[:48894]]
    if len(pairs) < 48894 or any(len(pair) != 2 or "\ufffd" in "".join(pair) for pair in pairs):
        raise ConversionError(f"{path} is not CLIP's: it should have 48,894 lines of two pieces.")
    return "".join(f"{a} {b}\n" for a, b in pairs).encode()


# %% 9. Writing -------------------------------------------------------------------------------
# A safetensors file by hand: all sizes are known beforehand, so the header comes first and the
# tensors follow one by one, each forgotten before the next is read. The file has another name
# until it is complete.

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def flat_shape(shape):
    return (shape[0], shape[2], shape[3], shape[1]) if len(shape) == 4 else shape


def header(found, dtype, merges, metadata):
    shapes = [(want.flat, DTYPES[dtype], flat_shape(want.shape)) for want, _, _ in found]
    # The bytes of the merges come last: nothing after them has to be aligned.
    entries, reached = {"__metadata__": metadata}, 0
    last = [("tokenizer.merges", "U8", (len(merges),))] if merges else []
    for name, code, shape in shapes + last:
        end = reached + math.prod(shape) * itemsize(code)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def flat_array(want, tensor, dtype):
    array = tensor.float32().reshape(want.shape) * np.float32(want.factor)
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    # Not a formality: transpose() only renames the axes, and the bytes are what is written.
    array = np.ascontiguousarray(array)
    result = cast(array, dtype)
    if not all_finite(result):
        if np.isfinite(array).all():
            what = (
                f"{want.flat} has numbers too large for {dtype}: take --dtype bfloat16 or float32"
            )
        else:
            what = f"{want.flat} holds infinities or NaNs in the source; its weights are broken"
        raise Unfit(what)
    return result


def cast(array, dtype):
    """float32 -> what is stored; bfloat16 as its 16 bits"""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return array.astype(NUMPY[DTYPES[dtype]])
    bits = array.view("<u4")
    # Round half to even: add just less than half, and one more if the last kept bit is odd.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    # A NaN with all bits set would have wrapped around to a number.
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded.astype("<u2"))


def all_finite(stored):
    if stored.dtype == np.uint16:
        return bool(((stored & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(stored).all())


def write(output, found, dtype, merges, metadata):
    part = output.with_name(f"{output.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            file.write(header(found, dtype, merges, metadata))
            file.writelines(flat_array(want, tensor, dtype) for want, _, tensor in found)
            file.write(merges)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, output)
    except BaseException:  # also Ctrl-C
        part.unlink(missing_ok=True)
        raise


# %% 10. LoRAs, ControlNets, words ------------------------------------------------------------
# Flat files of their own. A ControlNet is a part like the UNet, with a table. A LoRA holds two thin
# matrices for each layer it changes, and spells the layer's name in one of several ways, with dots,
# or with underscores for the dots, which cannot be undone: to_out_0 may be to_out.0 or to.out.0. So
# the way forth is computed instead, for every layer there is, in both layouts.

ENDS = {  # how the names of the parts of a pair end, and what they are
    "up": r"\.lora_up|\.lora\.up|\.lora_B(\.default)?|_lora\.up|\.lora_linear_layer\.up",
    "down": r"\.lora_down|\.lora\.down|\.lora_A(\.default)?|_lora\.down|\.lora_linear_layer\.down",
    "middle": r"\.lora_mid",
}
ENDS = {part: re.compile(rf"(.+?)({end})\.weight") for part, end in ENDS.items()}
LORA_MARK = re.compile(r"(lora_(unet|te\d?)_|.*[._]lora[._])")
STARTS = re.compile(r"(base_model\.model\.)?(lora_unet_|lora_te1?_|unet\.|text_encoder\.)?")
OTHER_LORAS = (
    ("a LoHa", r".*\.hada_"), ("a LoKr", r".*\.lokr_"), ("a DoRA", r".*\.(dora_scale|lora_magn)"),
    ("an (IA)3", r".*\.on_input"), ("OFT", r".*\.oft_"), ("a LoRA of SDXL", r"lora_te2_"),
    ("a full difference, no LoRA", r".*\.(diff|diff_b)$"), ("GLoRA", r".*\.[ab][12]\.weight$"),
)  # fmt: skip


def layer_names():
    """{a layer's name in a LoRA, dots for underscores: its name in sd.py}"""
    names = {}
    for layout in (ORIGINAL, DIFFUSERS):
        part = Part({}, "", layout)  # widths that all differ, so that every shortcut is there
        wants = unet_table(part, (1, 2, 3, 4), 5)
        wants += text_table(part, 1, 1, 23) if layout == DIFFUSERS else []
        for want in wants:
            for name in want.names:
                layer = name.removesuffix(".weight")
                if layer != name and len(want.shape) > 1:
                    names[layer.replace(".", "_")] = want.flat.removesuffix(".weight")
    return names


def find_lora(source):
    """-> [(want, name, tensor)] of a LoRA, its factors put into up; all its tensors must fit."""
    for what, pattern in OTHER_LORAS:
        if any(re.match(pattern, name) for name in source.tensors):
            raise Unfit(f"it is {what}, which sd.py does not know. A plain LoRA or LoCon will do")
    known, layers, unknown = layer_names(), {}, []
    for name, tensor in source.tensors.items():
        for part, pattern in ENDS.items():
            if match := pattern.fullmatch(name):
                layer = lora_layer(match[1] + "_lora" * match[2].startswith("_lora"))
                layers.setdefault(layer, {})[part] = name, tensor
                break
        else:
            if name.endswith(".alpha"):
                layers.setdefault(lora_layer(name.removesuffix(".alpha")), {})["alpha"] = (
                    name,
                    tensor,
                )
            else:
                unknown.append(name)
    unknown += [parts.popitem()[1][0] for name, parts in layers.items() if name not in known]
    if unknown:
        few = ", ".join(shown(name) for name in sorted(unknown)[:3])
        raise Unfit(
            f"it is a LoRA for another model, or one of a kind not known here: {len(unknown)} of "
            f"its names belong to no layer of Stable Diffusion 1.x or 2.x. First: {few}"
        )
    told = peft_alphas(source)
    found = []
    for layer, parts in sorted(layers.items()):
        found += pair(known[layer], layer, parts, told)
    return found


def lora_layer(name):
    """down_blocks.0...attn1.processor.to_q_lora -> down_blocks_0_..._attn1_to_q"""
    name = STARTS.sub("", name, count=1).removeprefix("text_model.").removeprefix("text_model_")
    name = name.replace(".processor.", ".")
    if name.endswith("_lora"):
        name = name.removesuffix("_lora")
        if ".self_attn." in name:
            name = name.replace("to_out", "out_proj").replace(".to_", ".") + "_proj"
            name = name.replace("out_proj_proj", "out_proj")
        elif name.endswith("to_out"):
            name += ".0"
    return name.replace(".", "_")


def pair(flat, layer, parts, told):
    if not {"up", "down"} <= parts.keys():
        raise Unfit(f"the LoRA's layer {shown(layer)} has only {', '.join(sorted(parts))}")
    (up_name, up), (down_name, down) = parts["up"], parts["down"]
    rank = down.shape[0] if down.shape else 0
    alpha = told.get(flat.split(".")[0] + ".", told.get("", rank))
    if "alpha" in parts:
        tensor = parts["alpha"][1]
        if math.prod(tensor.shape) != 1:
            raise Unfit(f"the alpha of the LoRA's layer {shown(layer)} is {tensor.shape}")
        alpha = float(tensor.float32().reshape(-1)[0]) or rank
    middle = parts.get("middle")
    inner = middle[1].shape[0] if middle and middle[1].shape else rank
    fits = len(up.shape) in (2, 4) and up.shape[1] == inner and set(up.shape[2:]) <= {1}
    fits = fits and len(down.shape) in (2, 4) and rank > 0 and math.isfinite(alpha)
    if not fits or any(t.dtype not in FLOATS for t in (up, down)):
        raise Unfit(
            f"the LoRA's layer {shown(layer)} cannot be: up is {up.shape}, down {down.shape}, "
            f"alpha {alpha}"
        )
    flatter = lambda shape: shape[:2] if set(shape[2:]) <= {1} else shape
    out = [(Want(f"{flat}.up", flatter(up.shape), (), None, alpha / rank), up_name, up)]
    out.append((Want(f"{flat}.down", flatter(down.shape), ()), down_name, down))
    if middle:
        out.append((Want(f"{flat}.middle", middle[1].shape, ()), *middle))
    return out


def peft_alphas(source):
    """{"unet." or "text_encoder." or "": alpha} as PEFT tells it beside the weights."""
    text = source.metadata.get("lora_adapter_metadata", "")
    beside = source.path.with_name("adapter_config.json")
    if text:
        try:
            config = json.loads(text)
        except (ValueError, RecursionError):
            config = None
        if type(config) is not dict:
            raise Unfit("its lora_adapter_metadata is no JSON object")
    elif beside.is_file() and source.path.name.startswith("adapter_model"):
        config = read_json(beside)
    else:
        return {}
    out = {}
    for start in ("", "unet.", "text_encoder."):
        alpha, rank = config.get(f"{start}lora_alpha"), config.get(f"{start}r")
        if config.get(f"{start}alpha_pattern") or config.get(f"{start}rank_pattern"):
            raise Unfit("it is a LoRA with another alpha or rank for some layers, in PEFT's config")
        if type(alpha) in (int, float) and type(rank) is int and rank > 0:
            if not (abs(alpha) < 1e6 and rank < 1e6):
                raise Unfit("it is a LoRA whose alpha or rank is far too large")
            if config.get(f"{start}use_rslora"):
                alpha *= math.sqrt(rank)  # so that alpha / rank is what it should be
            out[start] = alpha
    return out


WORD_MARKS = ("string_to_param", "emb_params")


def convert_words(source):
    """Textual inversion: vectors for new words. The word is the tensor's name, or the file's."""
    ((name, tensor),) = source.tensors.items()
    word = source.path.stem if name.split(".")[0] in WORD_MARKS else name
    shape = (1,) * (2 - len(tensor.shape)) + tensor.shape
    if len(shape) != 2 or tensor.dtype not in FLOATS or not 0 < shape[0] <= 75:
        raise Unfit(f"it is a textual inversion, but {shown(name)} is {tensor.shape}")
    kind = f"a textual inversion: {shown(word)}, {shape[0]} vectors"
    return kind, [(Want(word, shape, ()), name, tensor)], {"kind": "words"}


def is_words(source):
    if len(source.tensors) != 1:
        return False
    ((name, tensor),) = source.tensors.items()
    if name.split(".")[0] in WORD_MARKS:
        return True
    small = len(tensor.shape) in (1, 2) and tensor.shape[-1] < 2048
    known = any(re.match(pattern, name) for _, pattern in NO_MODELS)
    return small and not known and re.fullmatch(r"<?[\w -]+>?", name) is not None


def convert_other(source, options):
    """-> what it is, its tensors, its config; None for a whole model."""
    part = find_part(source.tensors, "controlnet")
    lora = any(LORA_MARK.match(n) for n in source.tensors) and not find_part(source.tensors, "unet")
    if (part or lora) and options:
        raise Unfit("it is no whole model, and --vae and --prediction are for those")
    if part:
        try:
            return convert_controlnet(source, part)
        except Unfit as problem:
            raise Unfit(f"it is a ControlNet, but {problem}") from None
    if not lora and is_words(source):
        return convert_words(source)
    return convert_lora(source) if lora else None


def convert_lora(source):
    found = find_lora(source)
    layers = [want.flat for want, _, _ in found if want.flat.endswith(".down")]
    text = sum(layer.startswith("text_encoder.") for layer in layers)
    kind = f"a LoRA for {len(layers)} layers, {text} of them the text encoder's"
    return kind, found, {"kind": "lora"}


def convert_controlnet(source, part):
    widths, context = unet_numbers(part)
    second = context == 1024
    numbers = rule(second, widths, context, None)["unet"]
    told = {"unet": source.numbers.get("unet", {})}
    numbers = merged({"unet": numbers}, told, SCHEMA, source.told_by)["unet"]
    config = {
        "kind": "controlnet",
        "unet": {"widths": widths, "context_width": context, **numbers},
        # Nothing in the tensors tells; it goes by the name, as everywhere.
        "pool": bool(source.numbers.get("pool", "shuffle" in source.path.stem)),
    }
    return (
        f"a ControlNet for {'2.x' if second else '1.x'}",
        take(controlnet_table(part, widths, context), part),
        config,
    )


# %% 11. Convert ------------------------------------------------------------------------------
# Every tensor of the source is used, or known not to be needed, or named as unknown. An unknown one
# is no error, but whoever trained something new into a model should hear that it was left behind.

NOT_NEEDED = (  # what it is, how its name begins
    ("averaged copies (EMA)", r"(first_stage_model\.)?model_ema\."),
    ("noise schedule", r"(betas|alphas_cumprod|sqrt_|log_one_minus_|posterior_|lvlb_weights)"),
    ("noise schedule", r"(denoiser\.|logvar$|scale_factor$|v_pred$|ztsnr$|edm_vpred\.)"),
    ("position numbers", r".*position_ids$"),
    ("training losses", r"(first_stage_model\.)?loss\.|embedding_manager\."),
    ("the text encoder's unread end", r".*\.model\.transformer\.resblocks\.23\."),
    ("the text encoder's unread end", r".*\.model\.(text_projection|logit_scale|attn_mask)"),
    ("CLIP's other half", r"(cond_stage_model|text_encoder).*[./](vision_model|visual_projection)"),
    ("CLIP's other half", r"(cond_stage_model|text_encoder).*[./](text_projection|logit_scale)"),
    ("safety checker", r"safety_checker\."),
)


def convert(
    source, output=None, *, dtype="float16", prediction=None, vae=None, log=print, made_from=""
):  # fmt: skip
    """Write the flat file, by default beside the source, and return its path.

    made_from: put into its header, for sd.py to recognise what it had converted by itself.

    Raises ConversionError, and then there is no output, and an older one is as it was.
    """
    if not Path(source).parent.is_dir() and HUB_NAME.fullmatch(str(source)):
        output = output or f"{str(source).split('/')[1]}.flat.safetensors"
        source = fetch(str(source), log)
    source = Path(source)
    if dtype not in DTYPES:
        raise ConversionError(f"dtype is {dtype}; it can be {', '.join(DTYPES)}.")
    if prediction not in (None, "eps", "v"):
        raise ConversionError(f"prediction is {prediction}; it can be eps or v.")
    if output is None:
        place = source.resolve()
        name = place.name if place.is_dir() else source.stem
        output = (place.parent if place.is_dir() else source.parent) / f"{name}.flat.safetensors"
    output = Path(output)
    try:
        vae = vae and Path(vae)
        return convert_to(output, source, dtype, prediction, vae, log, made_from)
    except OSError as error:
        where = error.filename or output
        raise ConversionError(f"{where}: {error.strerror or error}. Nothing was written.") from None


def convert_to(output, path, dtype, prediction, vae_path, log, made_from):
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else "is in a folder that does not exist"
        raise ConversionError(f"{output} {what}. Give -o the name of a file to write.")
    source = read_source(path, vae_path)
    vae_source = read_vae_source(vae_path) if vae_path else None
    if vae_source:
        source.mentions |= vae_source.mentions
    with about(path):
        if other := convert_other(source, vae_path or prediction):
            kind, found, config = other
            refuse_to_overwrite(output, path, found)
            log(f"{path}: {kind}")
            metadata = header_metadata(path, config, kind, made_from)
            return finish(output, found, dtype, b"", metadata, log)
        unet, text, vae = find_parts(source, vae_source)
        config, second, why = describe(unet, text, vae, source, vae_source)
        channels = unet.size("input_blocks.0.0.weight", "conv_in.weight", 1)
        config["unet"] |= {"channels": 9} if channels == 9 else {}
        numbers = config["unet"]["widths"], config["unet"]["context_width"], channels
        found = take(unet_table(unet, *numbers), unet)
        text_config = config["text"]
        sizes = text_config["vocabulary"], text_config["width"], text_config["layers"]
        found += take(text_table(text, *sizes), text)
        wants, safety = safety_table(source.tensors)
        if safety:
            found += take(wants, text._replace(tensors=source.tensors))
            config["safety"] = safety
    with about(vae_path or path):
        found += take(vae_table(vae, config["vae"]["widths"]), vae)
    refuse_to_overwrite(output, path, found)
    log(f"{path}: {config['name']}, because {why}")
    config["prediction"], why_prediction = find_prediction(prediction, source, second, found)
    log(f"it predicts {config['prediction']} ({why_prediction})")
    config.setdefault("cfg", 7.5)
    config.setdefault("size", 768 if second and config["prediction"] == "v" else 512)
    warnings(source, log)
    account(source, found, unet, vae_path, log)
    notes = f"{config['name']}: {why}. {config['prediction']}: {why_prediction}."
    metadata = header_metadata(path, config, notes, made_from)
    with about(path):
        return finish(output, found, dtype, read_merges(source.merges), metadata, log)


def header_metadata(path, config, notes, made_from):
    metadata = {
        "format": "sd.py 1",
        "config": json.dumps(config),
        "source": path.name.encode("utf-8", "replace").decode(),
        "notes": notes,
    }
    return metadata | ({"made_from": made_from} if made_from else {})


def finish(output, found, dtype, merges, metadata, log):
    write(output, found, dtype, merges, metadata)
    count = len(found) + bool(merges)
    log(f"{output}: {count} tensors, {dtype}, {output.stat().st_size / 1e6:.0f} MB")
    return output


def read_source(path, vae_path):
    if not path.is_dir():
        return read_file(path)
    config = path / "config.json"
    if config.exists() and read_json(config).get("_class_name") == "ControlNetModel":
        source = Source(path, {}, told_by=str(config))
        add_part(source, path, "controlnet")
        source.numbers["pool"] = read_json(config).get("global_pool_conditions")
        return source
    return read_folder(path, [part for part in MODEL if part != "vae" or not vae_path])


def read_vae_source(path):
    """A file; a diffusers folder, of which only the VAE is read; or just that VAE's folder."""
    if not path.is_dir():
        return read_file(path)
    source = Source(path, {}, told_by="the VAE's config.json")
    add_part(source, path / "vae" if (path / "vae").is_dir() else path, "vae")
    return source


def refuse_to_overwrite(output, path, found):
    used = {path, *(tensor.path for _, _, tensor in found)}
    if output.exists() and any(os.path.samefile(output, one) for one in used):
        raise ConversionError(f"{output} is what is being converted. Give -o another name.")
    if output.exists() and not flat_metadata(output).get("format", "").startswith("sd.py"):
        raise ConversionError(f"{output} is there already, and no flat file. Give -o another name.")


def warnings(source, log):
    if source.mentions:
        few = ", ".join(shown(name) for name in sorted(source.mentions)[:5])
        more = len(source.mentions) - 5
        more = f" and {more} more" if more > 0 else ""
        log(f"this file mentions {few}{more}, which was not loaded")
    if other_schedule(source.tensors):
        log(
            "warning: it was trained with another noise schedule than Stable Diffusion's (its "
            "alphas_cumprod differ); sd.py does not know that one and pictures may suffer"
        )


def account(source, found, unet, vae_path, log):
    """Say what became of each tensor of the source."""
    kinds, unknown, not_needed = {}, [], NOT_NEEDED
    used = {name for want, name, _ in found if not (vae_path and want.flat.startswith("vae."))}
    if vae_path:
        not_needed += (("the VAE that --vae replaces", r"first_stage_model\.|vae\."),)
    for name in source.tensors.keys() - used:
        kind = next((what for what, pattern in not_needed if re.match(pattern, name)), None)
        if kind is None:
            unknown.append(name)
        else:
            kinds[kind] = kinds.get(kind, 0) + 1
    parts = [f"{len(source.tensors.keys() & used)} tensors used"]
    parts += [f"{count} not needed ({kind})" for kind, count in sorted(kinds.items())]
    log(", ".join(parts))
    if unet.prefix.startswith("model_ema."):
        log("the UNet's weights are the averaged ones (EMA): there are no others")
    if unknown:
        few = ", ".join(shown(name) for name in sorted(unknown)[:5])
        log(f"warning: {len(unknown)} tensors are unknown and were left out: {few}")


def flat_file(path, log):
    """What sd.py reads in place of path: made from it before, or now.

    It is kept beside the source, or in the cache folder where that can't be written or the name is
    taken. It says in its header from which files it was made, with their sizes and times, and is
    used again only for these.
    """
    path = path.resolve()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    facts = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    made_from = hashlib.sha256(repr(facts).encode(errors="surrogateescape")).hexdigest()
    name = (path.name if path.is_dir() else path.stem) + ".flat.safetensors"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "sd.py"
    beside, cached = path.parent / name, cache / f"{made_from[:12]}-{name}"
    for place in (beside, cached):
        if flat_metadata(place).get("made_from") == made_from:
            log(f"using {place}, made from {path.name} before")
            return place
    # Only what was made in this way before may be replaced.
    free = not os.path.lexists(beside) or "made_from" in flat_metadata(beside)
    place = beside if free and os.access(path.parent, os.W_OK) else cached
    place.parent.mkdir(parents=True, exist_ok=True)
    log(f"{path.name} is not a flat file. Converting it once, to {place}")
    return convert(path, place, log=log, made_from=made_from)


def flat_metadata(path):
    """A flat file's metadata; {} for other files."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            found = json.loads(file.read(min(length, MOST_BYTES)))["__metadata__"]
            return {key: str(value) for key, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        return {}


# %% 12. Command line -------------------------------------------------------------------------


def main(argv=None):
    p = argparse.ArgumentParser(
        description="Turn a Stable Diffusion 1.x or 2.x checkpoint, a LoRA, a ControlNet or a "
        "textual inversion for one into the flat file sd.py reads."
    )
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="a .ckpt, .safetensors or diffusers folder, or org/name on the Hugging Face hub",
    )
    out = "the file to write (default: SOURCE's name with .flat.safetensors, beside it)"
    p.add_argument("-o", "--output", metavar="OUT", help=out)
    kept = "how exactly to keep the numbers (default: float16, as most models are shared)"
    p.add_argument("--dtype", choices=DTYPES, default="float16", help=kept)
    says = "what the UNet predicts, the noise or v (default: looked up or guessed, and printed)"
    p.add_argument("--prediction", choices=("eps", "v"), help=says)
    p.add_argument("--vae", metavar="FILE", help="take the VAE from this checkpoint or folder")
    args = p.parse_args(argv)
    options = {"dtype": args.dtype, "prediction": args.prediction, "vae": args.vae}
    try:
        convert(args.source, args.output, **options)
    except ConversionError as error:
        print(f"convert_weights.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
