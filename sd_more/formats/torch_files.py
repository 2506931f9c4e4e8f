"""PyTorch's two formats.

Since version 1.6 (2020) a zip: NAME/data.pkl is the pickle, NAME/data/17 the bytes of storage "17",
not compressed. Before that five pickles one after the other, the fourth is the object, and then the
storages in the order of the fifth. The file's ending (.ckpt .pt .pth .bin) says nothing.
"""

import io
import os
import re
import struct
import zipfile
import zlib

from .pickles import Name, Pickles, View
from .tensors import MOST_BYTES, MOST_TENSORS, Contents, Tensor, itemsize, open_file, require

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
CHUNK = 1 << 20
BIG_ENDIAN = "it was written on a big-endian machine; save it on another"


class LimitedFile(io.FileIO):
    """For zipfile, which reads a directory of any size in one piece."""

    def read(self, size=-1):
        require(size <= MOST_BYTES, f"its zip directory has {size} bytes, far too many")
        return super().read(MOST_BYTES if size < 0 else size)


def read_zip(path):
    with LimitedFile(path) as file, zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        good = len(members) == len(archive.infolist()) <= 200_000
        require(good, "its zip directory has two members of one name, or too many")
    roots = [name[: -len("data.pkl")] for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    require(len(roots) == 1, "it is a zip archive, but not one that PyTorch made")
    root = roots[0]
    require(root + "constants.pkl" not in members, "it is TorchScript; a state dict is needed")
    with open_file(path) as file:
        start, size = find_payload(file, members[root + "data.pkl"])
        require(size <= MOST_BYTES, f"its pickle has {size} bytes, far more than any weights need")
        file.seek(start)
        pickles = Pickles(io.BytesIO(file.read(size)))
        top = pickles.run()
        if root + "byteorder" in members:
            file.seek(find_payload(file, members[root + "byteorder"])[0])
            require(file.read(6) == b"little", BIG_ENDIAN)
        starts = {}
        for key, storage in pickles.storages.items():
            name = f"its storage {key}"
            require(f"{root}data/{key}" in members, f"{name} is missing")
            starts[key], size = find_payload(file, members[f"{root}data/{key}"])
            expected = storage.count * itemsize(storage.dtype)
            require(size == expected, f"{name} has {size} bytes, expected {expected}")
    return unwrap_state_dict(path, top, starts, pickles.mentions)


def find_payload(file, member):
    """-> (start, size) of a member's bytes. zipfile would read them too, but in one piece, and it
    insists on checksums, which PyTorch can be told to leave out."""
    plain = not member.flag_bits & 1 and member.compress_type == zipfile.ZIP_STORED
    require(plain, "it is compressed or encrypted; PyTorch's own files never are")
    require(0 <= member.header_offset < file_size(file), "its zip directory contradicts itself")
    file.seek(member.header_offset)
    # The local header repeats the name, and may pad: only it knows where the bytes begin.
    mark, name_length, padding = struct.unpack("<4s22xHH", file.read(30))
    encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
    same = file.read(name_length) == member.orig_filename.encode(encoding)
    require(same and mark == b"PK\3\4", "its zip directory contradicts itself")
    start, size = file.tell() + padding, member.file_size
    require(member.compress_size == size and start + size <= file_size(file), "it is cut off")
    return start, size


def read_legacy(path):
    starts = {}
    with open_file(path) as file:
        pickles = Pickles(file)
        magic = pickles.run()
        known = type(magic) is int and magic == LEGACY_MAGIC
        require(known, "it is a pickle, but not one that PyTorch made")
        pickles.run()  # the version, 1001 ever since
        system = pickles.run()
        require(type(system) is dict and system.get("little_endian") is True, BIG_ENDIAN)
        top, keys, storages = pickles.run(), pickles.run(), pickles.storages
        good = type(keys) is list and all(type(k) is str and k in storages for k in keys)
        require(good, "its list of storages is not that of its pickle")
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            name, expected = f"its storage {key}", storages[key].count
            require(count == expected, f"{name} has {count} numbers, expected {expected}")
            starts[key] = file.tell()
            end = file.tell() + count * itemsize(storages[key].dtype)
            require(end <= file_size(file), "it is cut off")
            file.seek(end)
        require(len(starts) == len(storages), "some of its storages are missing")
    return unwrap_state_dict(path, top, starts, pickles.mentions)


def file_size(file):
    return os.fstat(file.fileno()).st_size


WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params")


def unwrap_state_dict(path, top, starts, mentions):
    """Unwrap {"state_dict": {...}}, at most twice: a dict can hold itself under that name."""
    config = {}
    for _ in range(3):
        what = top.text if type(top) is Name else type(top).__name__
        require(
            type(top) is not View, "it holds one tensor that has no name, not a dict of tensors"
        )
        require(type(top) is dict, f"it holds a {what} and not a dict of tensors")
        config = config or top.get("sd_config") or {}
        bare = any(type(value) is View for value in top.values())
        names = [name for name in WRAPPERS[: 1 if bare else None] if type(top.get(name)) is dict]
        if not names:
            break
        top = top[names[0]]
    top = top if bare or "string_to_param" in top else flatten(top)
    layers = any(type(key) is int and type(value) in (tuple, list) for key, value in top.items())
    require(not layers, "it is a hypernetwork. Those are not done here")
    if "string_to_param" in top:  # textual inversion, as AUTOMATIC1111's program writes it
        good = type(top["string_to_param"]) is dict
        require(good, "its string_to_param is not a plain dict; save it again as one")
        top = {f"string_to_param.{name}": v for name, v in top["string_to_param"].items()}
    tensors, unreadable = {}, {}
    for name, view in top.items():
        if type(name) is str and type(view) is Name:
            unreadable[name] = view.text
        if type(name) is str and type(view) is View:
            storage = view.storage
            start = starts[storage.key] + view.offset * itemsize(storage.dtype)
            tensors[name] = Tensor(path, start, storage.dtype, view.shape, view.strides)
    require(type(config) is dict, "its sd_config is not a dict of numbers")
    return Contents(tensors, mentions, config, unreadable=unreadable)


def flatten(top):
    """{"unet": {"conv_in.weight": ...}} -> {"unet.conv_in.weight": ...}, where no tensor is at the
    top; all else stays."""
    inner = {key: value for key, value in top.items() if type(value) is dict}
    count = sum(map(len, inner.values()))  # one dict can be there under many names
    require(count <= 10 * MOST_TENSORS, f"it has {count} entries, far more than any model here")
    rest = {key: value for key, value in top.items() if key not in inner}
    return rest | {f"{key}.{name}": v for key, value in inner.items() for name, v in value.items()}


def check_sums(path):
    """Read all of a zip -> how many of its members have the checksum that is said for each, and how
    many say none: PyTorch can be told to leave them out, and writes 0.
    """
    with LimitedFile(path) as file, zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if member.file_size]
    with open_file(path) as file:
        for member in (member for member in members if member.CRC):
            start, size = find_payload(file, member)
            file.seek(start)
            crc = 0
            for at in range(0, size, CHUNK):
                crc = zlib.crc32(file.read(min(CHUNK, size - at)), crc)
            damaged = f"its part {member.filename} is damaged: the checksum is another"
            require(crc == member.CRC, f"{damaged}. Download it again")
    none = sum(not member.CRC for member in members)
    return len(members) - none, none
