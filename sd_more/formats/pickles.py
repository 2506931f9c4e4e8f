"""Pickles, not executed.

A pickle is a program for a small stack machine. Most instructions push a number or a string or
collect what is on the stack into a list. But some name a function and others call it, which is how
a checkpoint can run anything on the machine of whoever loads it. Here a name is looked up in a list
of five functions, for tensors and dicts, and the names of the storages. Any other stays a Name, and
to call a Name does nothing.

Python's own pickle.Unpickler with a find_class that refuses is not enough: it must be given
*something* to call, it hashes dictionary keys (a tuple nested a million deep overflows the C stack,
no exception, the process is gone) and it allocates whatever a length field claims.
"""

import math
import struct
from typing import NamedTuple

from .tensors import MOST_BYTES, NotConvertible, require

MOST_OPCODES = 1_000_000  # a tensor takes 32, a whole training checkpoint about 100,000

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8", "QInt8Storage": "I8", "QUInt8Storage": "U8", "QInt32Storage": "I32",
}  # fmt: skip
REBUILD_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
REBUILD_PARAMETER = tuple(f"torch._utils._rebuild_parameter{end}" for end in ("", "_with_state"))
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


class Name(NamedTuple):
    """Something the pickle calls by name. Never imported; calling it gives the Name again."""

    text: str


class Storage(NamedTuple):
    key: str  # the name of its bytes in the file, see torch_files.py
    dtype: str
    count: int


class View(NamedTuple):
    storage: Storage
    offset: int
    shape: tuple
    strides: tuple


class Pickles:
    """Reads the pickles of a file, one after the other: run() gives the next. Only dicts, lists,
    tuples, strings, numbers come out, with Name and View among them. Storages and Names met on the
    way are added to the two collections. All pickles of a file share its limits.
    """

    def __init__(self, file):
        self.file, self.storages, self.mentions = file, {}, set()
        self.opcodes_left, self.bytes_left = MOST_OPCODES, MOST_BYTES

    def run(self):
        # A mark starts a new stack on top of the old ones, so nothing can reach below it.
        self.stack, self.below, self.memo = [], [], {}
        while self.opcodes_left:
            self.opcodes_left -= 1
            opcode = self.read(1)
            if opcode == b".":
                return self.pop()
            self.step(opcode)
        raise NotConvertible("its pickle does not come to an end")

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
                self.read(1 if op == b"\x80" else 8)
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
                raise NotConvertible(
                    f"its pickle holds the instruction {op!r}, which no weights need"
                )

    def recall(self, key):
        require(key in self.memo, "its pickle refers to what it never stored")
        return self.memo[key]

    def read(self, count):
        require(count <= self.bytes_left, f"its pickle claims a field of {count} bytes")
        self.bytes_left -= count
        data = self.file.read(count)
        require(len(data) == count, "its pickle is cut off")
        return data

    def number(self, form):
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def counted(self, form, kind):
        data = self.read(self.number(form))
        if kind == "bytes":
            return data
        if kind == "integer":
            return int.from_bytes(data, "little", signed=True)
        return data.decode(kind, "replace")

    def line(self):
        line = self.file.readline(1024)
        require(line.endswith(b"\n"), "its pickle is cut off")
        self.bytes_left -= len(line)
        return line[:-1].decode("utf-8", "replace")

    def top(self):
        require(self.stack, "its pickle takes from an empty stack")
        return self.stack[-1]

    def pop(self):
        self.top()
        return self.stack.pop()

    def to_mark(self):
        require(self.below, "its pickle has an end without a beginning")
        items, self.stack = self.stack, self.below.pop()
        return items

    def name(self, module, name):
        require(type(module) is type(name) is str, "its pickle names something without a name")
        text = f"{module}.{name}"
        if text not in KNOWN and self.dtype(text) is None:
            self.mentions.add(text)
        return Name(text)

    def dtype(self, text):
        module, _, name = text.rpartition(".")
        return STORAGES.get(name) if module in ("torch", "torch.storage", "torch.cuda") else None

    def call(self, function, args):
        require(type(function) is Name and type(args) is tuple, "its pickle calls what has no name")
        if function.text == "collections.OrderedDict" and len(args) == 0:
            return {}
        if function.text in REBUILD_TENSOR and len(args) >= 4:
            # A seventh argument flags numbers still to be conjugated or negated. No weights are.
            return Name("complex tensor") if len(args) > 6 and args[6] else self.view(*args[:4])
        if function.text in REBUILD_PARAMETER and len(args) >= 1:
            return args[0]
        return function

    def view(self, storage, offset, shape, strides):
        good = type(storage) is Storage and type(shape) is type(strides) is tuple
        require(good, "its pickle builds a tensor out of something else")
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        good = whole and len(shape) == len(strides) <= 8
        require(good, "its pickle holds a tensor of an impossible shape")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
        inside = last < storage.count or not math.prod(shape)
        require(inside, "its pickle holds a tensor that reaches beyond its bytes")
        # 16 bytes can be "expanded" to a million times a million. No weights are.
        expanded = math.prod(shape) > storage.count
        return Name("expanded tensor") if expanded else View(storage, offset, shape, strides)

    def storage(self, key):
        """("storage", torch.FloatStorage, "17", "cpu", 1000) and, in old files, one None more"""
        good = type(key) is tuple and len(key) in (5, 6) and all(k is None for k in key[5:])
        require(good, "its pickle refers to data in an unknown way")
        program = type(key[0]) is str and key[0] == "module"
        require(not program, "it holds a program, not a dict of tensors; save state_dict()")
        _, kind, name, _, count = key[:5]
        dtype = self.dtype(kind.text) if type(kind) is Name else None
        good = dtype and type(name) is str and type(count) is int and count >= 0
        require(good, "its pickle refers to data of an unknown type")
        storage = Storage(name, dtype, count)
        # PyTorch silently goes by the first claim. Two claims about one storage: no honest file.
        same = self.storages.setdefault(name, storage) == storage
        require(same, f"its pickle calls storage {name} two different things")
        return storage

    def set_items(self, items):
        target = self.top()
        good = len(items) % 2 == 0 and type(target) in (dict, Name)
        require(good, "its pickle puts items into what is not a dict")
        if type(target) is dict:
            for key, value in zip(items[::2], items[1::2]):
                if type(key) in (str, int):  # anything else (classes, in Lightning's files) would
                    target[key] = value  # have to be hashed

    def extend(self, items):
        target = self.top()
        require(type(target) in (list, Name), "its pickle appends to what is not a list")
        if type(target) is list:
            target.extend(items)
