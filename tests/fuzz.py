"""Broken and malicious files by the thousand: each is read, or refused with one message.

    python tests/fuzz.py [--cases 200] [--seconds N] [--seed 1] [--formats zip,png] [--log FILE]
    python tests/fuzz.py --replay zip:17

A case is a good file with a few changes, in its bytes or in its structure, and is known by a seed,
a format and a number. Worker processes try them, and note each case before it begins, so that one
which kills its process, hangs or takes too much memory has a name. In a case nothing may be
imported, no process or socket opened, and nothing changed outside the case's folder; what is said
must be printable; a refusal leaves no file, and what was converted must be of use to sd.py.
"""

import argparse
import codecs
import collections
import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickletools
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx.core as mx
import numpy as np
from PIL import Image

import convert_weights
import sd
from sd_more import app, prompts, textual_inversion
from sd_more.console import command
from sd_more.formats import gguf
from sd_more.guidance import guided, has_guidance
from sd_more.vae import other_vae, with_tiny_vae

MOST_SECONDS, MOST_MEMORY = 5, 1 << 30  # of one case
ESCAPE = "\x1b[31m\x07\u202e\r\n"
ODD = (
    -1, 0, 1, 2, 3, 7.5, 64, 65, 8192, 1 << 31, 1 << 63, 10**400, math.inf, math.nan, True, False,
    None, "", "8", ESCAPE, "x" * 3000, [], [[]], [8] * 4, [8] * 5, {}, {"a": {}}, "v_prediction",
    "__metadata__", "../../etc/passwd", "\0", "F8_E4M3", "I8", "U8", "BOOL", "F64", "F16",
)  # fmt: skip


# %% Changes ---------------------------------------------------------------------------------------


def change_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 100))
        match rng.randrange(6):
            case 0:
                data[at : at + length] = rng.randbytes(length)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 3:
                data[at : at + length] = rng.choice((b"\0", b"\xff", b"\x80")) * length
            case 4:
                del data[at + rng.choice((0, 0, 1000)) :]
            case _:
                number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, len(data)))
                data[at : at + 8] = struct.pack("<Q", number)[: rng.choice((1, 2, 4, 8))]
        data = data or bytearray(b"\0")
    return bytes(data)


def change_json(rng, value, times=None):
    """A copy with a few of its parts replaced, dropped, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        places = [(value, key) for key in keys(value)]
        while places and rng.random() < 0.75:
            inside, key = rng.choice(places)
            if not keys(inside[key]):
                break
            places = [(inside[key], k) for k in keys(inside[key])]
        if not places:
            return copy.deepcopy(rng.choice(ODD))
        inside, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1 | 2:
                inside[key] = copy.deepcopy(rng.choice(ODD))
            case 3:
                del inside[key]
            case 4 if isinstance(inside, dict):
                name = rng.choice((key + "x", ESCAPE, "", key.upper(), key.replace(".", "_")))
                inside[name] = inside.pop(key)
            case 5 if isinstance(inside[key], (int, float)):
                inside[key] = inside[key] * rng.choice((-1, 2, 1.5, 1000)) + rng.choice((0, 1))
            case _:
                inside[key] = [inside[key]] * rng.choice((1, 3, 200))
    return value


def keys(value):
    if isinstance(value, list):
        return range(len(value))
    return list(value) if isinstance(value, dict) else ()


def change_text(rng, text):
    bits = (" ", "\t", "\n", ",", ":", '"', "\\", "(", ")", "[", "]", "BREAK", "<|endoftext|>", "é",
            "\u0301", "\ud800", "\0", ESCAPE, "1", "9" * 400, "Size: 1x1", "猫" * 30, ":1.3)",
            "nan", "Steps: ", "-", "\U0001f600")  # fmt: skip
    for _ in range(rng.choice((1, 2, 4, 8))):
        at = rng.randrange(len(text) + 1)
        count = rng.choice((1, 1, 1, 2, 10, 1000, 30_000)) if rng.random() < 0.3 else 1
        bit = rng.choice(bits) * count
        cut = rng.choice((0, 0, 1, 5, 40))
        text = text[:at] + bit + text[at + cut :]
    return text[:500_000]


CODE = (
    b"cos\nsystem\n", b"cbuiltins\nexec\n", b"X\x02\x00\x00\x00ls\x85R", b")R", b"}", b"]", b")",
    b"(", b"t", b"u", b"s", b"a", b"e", b"b", b"0", b"N", b"Q", b"R", b"\x81", b"h\x00", b"q\x00",
    b"\x94", b"K\xff", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"\x85" * 2000,
    b"]" * 2000, b"X\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b".", b"2", b"i", b"o",
    b"X\x07\x00\x00\x00\x1b[31mab", b"(K\x01K\x02K\x03t", b"\x8f(\x90", b"G\x7f\xf0" + b"\0" * 6,
)  # fmt: skip


def change_pickle(rng, data):
    """A pickle with some of its instructions deleted, doubled, exchanged or put in."""
    with contextlib.suppress(Exception):  # what was changed before may be no pickle any more
        starts = [at for _, _, at in pickletools.genops(data)] + [len(data)]
        steps = [data[a:b] for a, b in itertools.pairwise(starts)]
        for _ in range(rng.choice((1, 1, 2, 4, 10))):
            at, other = rng.randrange(len(steps)), rng.randrange(len(steps))
            match rng.randrange(5):
                case 0:
                    del steps[at]
                case 1:
                    steps[at:at] = [steps[other]] * rng.choice((1, 1, 100))
                case 2:
                    steps[at] = steps[other]
                case 3:
                    steps[at:at] = [rng.choice(CODE)]
                case _:
                    steps[at] = rng.choice(CODE)
        return b"".join(steps)
    return change_bytes(rng, data)


# %% Files -----------------------------------------------------------------------------------------


def tensor_file(tensors, metadata=None, spoil=lambda header: header):
    """The bytes of a safetensors file of NumPy arrays. spoil: a change of its header."""
    names = {"float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8", "int64": "I64"}
    header, data = {"__metadata__": metadata or {}}, b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape),
                        "data_offsets": [len(data), end]}  # fmt: skip
        data += array.tobytes()
    text = json.dumps(spoil(header)).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def change_tensors(rng, tensors):
    """Arrays with names, shapes and types that do not quite go together any more."""
    tensors = dict(tensors)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not tensors:
            break
        name = rng.choice(list(tensors))
        array = tensors[name]
        match rng.randrange(8):
            case 0:
                del tensors[name]
            case 1:
                tensors[name] = array.astype(rng.choice(("float16", "uint8", "int8", "int64")))
            case 2:
                tensors[name] = array.reshape(-1)
            case 3:
                tensors[name] = np.atleast_1d(array)[..., : rng.randrange(8)]
            case 4:
                tensors[name] = array[None]
            case 5:
                tensors[
                    rng.choice((name + "x", name.replace(".", "_"), ESCAPE, "__metadata__"))
                ] = array
            case 6:
                tensors[name] = np.full_like(array, rng.choice((np.nan, np.inf, 1e30, 0)))
            case _:
                tensors[change_text(rng, name)] = tensors.pop(name)
    tensors.pop("__metadata__", None) if rng.random() < 0.5 else None
    return tensors


def make_bench(folder):
    """Good files to begin with: small random models, as other programs write them."""
    import torch
    from diffusers import AutoencoderTiny

    from tests.reference import ControlNetModel, original_names, small_networks, write_folder

    networks = small_networks()
    weights = original_names(*networks)
    torch.save(weights, folder / "whole.ckpt")
    write_folder(folder / "model", networks)
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    (folder / "whole.safetensors").write_bytes(tensor_file(arrays))
    words = {"string_to_param": {"*": torch.ones(2, 64)}, "name": "cat", "step": 5}
    for name, value in (("word.pt", words), ("few.pt", {"state_dict": few(torch)})):
        torch.save(value, folder / name)
        torch.save(value, folder / f"old-{name}", _use_new_zipfile_serialization=False)
    ControlNetModel.from_unet(networks[1]).save_pretrained(folder / "control")
    for kind, parts in RELATIVES.items():
        lora = {f"{layer}.{end}": array for layer in LAYERS for end, array in parts.items()}
        (folder / f"{kind}.safetensors").write_bytes(tensor_file(lora))
    (folder / "model" / "tokenizer" / "added_tokens.json").write_text('{"<cat>": 49408}')
    (folder / "word.safetensors").write_bytes(tensor_file({"cat": np.ones((2, 64), "f4")}))
    vae = {n: array for n, array in arrays.items() if n.startswith("first_stage_model.")}
    (folder / "vae.safetensors").write_bytes(tensor_file(vae))
    AutoencoderTiny(3, 3, (16,) * 4, (16,) * 4).save_pretrained(folder / "taesd")
    os.link(folder / "taesd" / "diffusion_pytorch_model.safetensors", folder / "taesd.safetensors")
    guide = {"model.diffusion_model.time_embed.cond_proj.weight": np.ones((64, 8), "f4")}
    (folder / "lcm.safetensors").write_bytes(tensor_file(arrays | guide))
    for name in (
        "whole.safetensors", "lora.safetensors", "word.safetensors", "control", "vae.safetensors",
        "taesd", "lcm.safetensors",
    ):  # fmt: skip
        target = folder / f"{Path(name).stem}.flat"
        convert_weights.convert(folder / name, target, dtype="float32", log=lambda line: None)
    packed = folder / "packed.flat"
    convert_weights.convert(folder / "whole.flat", packed, bits=6, log=lambda line: None)


def few(torch):
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.rand(i + 1, 3, generator=generator) for i in range(4)}


BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"
LAYERS = (f"lora_unet_{BLOCK}_attn1_to_q", f"lora_unet_{BLOCK}_attn2_to_v",
          "lora_te_text_model_encoder_layers_0_self_attn_q_proj")  # fmt: skip
SIDES = {"a": np.ones((64, 4), "f4"), "b": np.ones((4, 64), "f4")}
PARTS = {"lora_up.weight": SIDES["a"], "lora_down.weight": SIDES["b"], "alpha": np.float32(4)}
RELATIVES = {  # the parts of a layer of a LoRA, a LoHa, a LoKr, a DoRA, and a whole difference
    "lora": PARTS,
    "loha": {f"hada_w{k}_{side}": array for k in (1, 2) for side, array in SIDES.items()},
    "lokr": {"lokr_w1": np.ones((8, 8), "f4"), "lokr_w2": np.ones((8, 8), "f4")},
    "dora": PARTS | {"dora_scale": np.ones((64, 1), "f4")},
    "diff": {"diff": np.ones((64, 64), "f4"), "diff_b": np.ones(64, "f4")},
}


# %% Formats ---------------------------------------------------------------------------------------
# Each is a function (random numbers, bench, an empty folder) -> what to try, and writes the file.


def zip_case(rng, bench, folder):
    name = rng.choice(("word.pt",) * 10 + ("few.pt",) * 9 + ("whole.ckpt",))
    path, data = folder / "case.ckpt", (bench / name).read_bytes()
    if rng.random() < 0.3 or name == "whole.ckpt" and rng.random() < 0.5:
        directory = data.rfind(b"PK\1\2") if rng.random() < 0.5 else 0
        path.write_bytes(data[:directory] + change_bytes(rng, data[directory:]))
    else:
        with zipfile.ZipFile(bench / name) as good, zipfile.ZipFile(path, "w") as bad:
            for member in good.namelist():
                part = good.read(member)
                if member.endswith("data.pkl") or rng.random() < 0.02:
                    part = change_pickle(rng, part)
                if rng.random() < 0.02:
                    member = change_text(rng, member).encode(errors="replace").decode()[:9000]
                if member and rng.random() < 0.98:
                    bad.writestr(member, part)
    return lambda: convert(path, folder)


def legacy_case(rng, bench, folder):
    data = (bench / rng.choice(("old-word.pt", "old-few.pt"))).read_bytes()
    if rng.random() < 0.5:
        file, parts = io.BytesIO(data), []
        for _ in range(5):
            start = file.tell()
            list(pickletools.genops(file))
            parts.append(data[start : file.tell()])
        k = rng.choice((0, 1, 2, 3, 3, 3, 3, 4))
        parts[k] = change_pickle(rng, parts[k])
        data = b"".join(parts) + data[file.tell() :]
    else:
        data = change_bytes(rng, data)
    (folder / "case.pt").write_bytes(data)
    return lambda: convert(folder / "case.pt", folder)


def safetensors_case(rng, bench, folder):
    path = folder / "case.safetensors"
    name = rng.choice(
        ("word.safetensors",) * 10
        + ("lora.safetensors",) * 9
        + ("whole.safetensors", "lcm.safetensors", "taesd.safetensors")
    )
    data = (bench / name).read_bytes()
    if rng.random() < 0.4:
        data = change_bytes(rng, data[:4000]) + data[4000:]
    else:
        (length,) = struct.unpack("<Q", data[:8])
        header = change_json(rng, json.loads(data[8 : 8 + length]))
        text = json.dumps(header).encode()
        text = change_bytes(rng, text) if rng.random() < 0.1 else text
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(data)
    return lambda: convert(path, folder)


COUNTS = (0, 1, 2, 31, 33, 99, 20_001, 2**31, 2**32 - 1, 2**48, 2**60, 2**63, 2**64 - 1)
TYPES = {name: number for number, name in gguf.TYPES.items()}


def gguf_file(rng, tensors):
    """-> header, data of a GGUF file of float32 arrays, where some numbers are others"""
    chance = rng.choice((0, 0.3, 1)) / (10 * len(tensors) + 20)  # mostly none or one

    def number(n, size=8):
        n = rng.choice(COUNTS) if rng.random() < chance else n
        return (n % 256**size).to_bytes(size, "little")

    def text(value):
        value = value if rng.random() >= chance else change_text(rng, value)
        value = value.encode(errors="surrogatepass")
        return number(len(value)) + value

    data, infos, alignment = bytearray(), bytearray(), rng.choice((32, 32, 8, 4096))
    for name, array in tensors.items():
        kind, raw = quantised(rng, array)
        lengths = b"".join(map(number, array.shape[::-1]))
        infos += text(name) + number(array.ndim, 4) + lengths + number(kind, 4) + number(len(data))
        data += raw + bytes(-len(raw) % alignment)
    values = (("general.alignment", 4, number(alignment, 4)), ("prediction_type", 8, text("eps")),
              ("words", 9, number(8, 4) + number(2) + text("a") + text("b")),
              ("numbers", 9, number(5, 4) + number(3) + bytes(12)))  # fmt: skip
    head = b"GGUF" + number(3, 4) + number(len(tensors)) + number(len(values))
    head += b"".join(text(name) + number(kind, 4) + value for name, kind, value in values) + infos
    return head + bytes(-len(head) % alignment), bytes(data)


def quantised(rng, array):
    """-> ggml's number of a type, and an array's bytes in it; some are random, if it fits"""
    name = rng.choice(list(gguf.BLOCKS))
    numbers, size, _ = gguf.BLOCKS[name]
    row = array.shape[-1] if array.ndim else 1
    if rng.random() < 0.8 or not row or row % numbers:
        return TYPES["F32"], array.astype("<f4").tobytes()
    return TYPES[name], rng.randbytes(array.size // numbers * size)


def gguf_case(rng, bench, folder):
    name = rng.choice(("word",) * 6 + ("lora",) * 6 + ("vae", "taesd", "whole"))
    tensors = read_tensors(bench / f"{name}.safetensors")
    head, data = gguf_file(rng, change_tensors(rng, tensors) if rng.random() < 0.3 else tensors)
    head = change_bytes(rng, head) if rng.random() < 0.3 else head
    data = change_bytes(rng, data) if rng.random() < 0.1 else data
    (folder / "case.gguf").write_bytes(head + data)
    return lambda: convert(folder / "case.gguf", folder)


def tensors_case(name, ending):
    def case(rng, bench, folder):
        kinds = {"lora": list(RELATIVES), "vae": ["vae", "taesd"]}
        kind = rng.choice(kinds.get(name.split(".")[0], ["word"]))
        tensors = read_tensors(bench / f"{kind}.safetensors")
        metadata = change_json(rng, {"format": "pt", "lora_adapter_metadata": PEFT})
        metadata = metadata if isinstance(metadata, dict) else {}
        metadata = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        metadata = metadata if rng.random() < 0.2 else {}
        path = folder / ("shuffle" + ending if rng.random() < 0.2 else "case" + ending)
        path.write_bytes(tensor_file(change_tensors(rng, tensors), metadata))
        return lambda: convert(path, folder)

    return case


PEFT = json.dumps({"lora_alpha": 4, "r": 4, "unet.lora_alpha": 4, "unet.r": 4})


def read_tensors(path):
    from safetensors.numpy import load_file

    return load_file(path)


CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json",
           "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer/added_tokens.json",
           "unet/diffusion_pytorch_model.safetensors")  # fmt: skip


def folder_case(rng, bench, folder):
    model = folder / "model"
    for path in (bench / "model").rglob("*.*"):
        to = model / path.relative_to(bench / "model")
        to.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, to)
    path = model / rng.choice(CONFIGS)
    data = path.read_bytes() if path.stat().st_size < 1 << 20 else b"x"
    path.unlink()
    match rng.randrange(10):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(rng.choice((path.name, "/dev/zero", "/", "nowhere")))
        case 2:
            path.mkdir()
        case 3:
            path.write_bytes(change_bytes(rng, data))
        case 4:
            pass
        case _ if path.suffix == ".json":
            path.write_text(json.dumps(change_json(rng, json.loads(data))))
        case _:
            path.write_bytes(change_bytes(rng, data))
    return lambda: convert(model, folder)


def control_case(rng, bench, folder):
    control = folder / "control"
    shutil.copytree(bench / "control", control, copy_function=os.link)
    config = control / "config.json"
    text = change_json(rng, json.loads(config.read_text()))
    config.unlink()
    config.write_text(json.dumps(text))
    return lambda: convert(control, folder)


def flat_case(rng, bench, folder):
    """What convert_weights.py writes, changed; of a model one step is painted."""
    kind = rng.choice(("whole",) * 4 + ("lora", "word", "control", "vae", "taesd", "lcm"))
    path = change_flat(rng, bench, folder, kind)
    kinds = {"whole": "model", "lora": "lora", "word": "words", "control": "controlnet",
             "vae": "vae", "taesd": "tiny vae", "lcm": "model"}  # fmt: skip
    kind = kinds[kind] if rng.random() < 0.9 else rng.choice(list(kinds.values()))
    return lambda: use(path, kind, folder)


def packed_case(rng, bench, folder):
    """A model with palettes, changed; or another flat file, changed, which is to get them."""
    if rng.random() < 0.6:
        path = change_flat(rng, bench, folder, "packed")
        return lambda: use(path, "model", folder)
    path = change_flat(rng, bench, folder, rng.choice(("whole", "control", "lora", "lcm")))
    bits, output = rng.choice((2, 4)), folder / "out.flat.safetensors"
    return lambda: convert_weights.convert(path, output, bits=bits, log=sd.say)


def change_flat(rng, bench, folder, kind):
    """-> the path of a changed file"""
    data, path = (bench / f"{kind}.flat").read_bytes(), folder / "case.safetensors"
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata, choice = header["__metadata__"], rng.random()
    if choice < 0.5:
        metadata["config"] = json.dumps(change_json(rng, json.loads(metadata["config"])))
    elif choice < 0.6:
        metadata["config"] = change_text(rng, metadata["config"])
        metadata["config"] = metadata["config"].encode(errors="replace").decode()
    elif choice < 0.8:
        header = change_json(rng, header)
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    if choice > 0.9:
        data = change_bytes(rng, data)
    elif choice > 0.8:  # other weights, or merges
        at = rng.randrange(len(data))
        data = data[:at] + rng.randbytes(2000) + data[at + 2000 :]
    path.write_bytes(data)
    return path


def png_case(rng, bench, folder):
    """The text of a PNG, in each of the chunks that may hold it, as --from-png reads it."""
    name, text = (b"parameters", TEXT) if rng.random() < 0.5 else rng.choice(WORKFLOWS)
    if name != b"parameters" and rng.random() < 0.7:
        text = json.dumps(change_json(rng, json.loads(text)))
    elif rng.random() < 0.9:
        text = change_text(rng, text)
    raw = text.encode("utf-8", "replace")
    kind, body = rng.choice((
        (b"tEXt", name + b"\0" + raw), (b"iTXt", name + b"\0\0\0\0\0" + raw),
        (b"zTXt", name + b"\0\0" + zlib.compress(raw)), (b"zTXt", name + b"\0\0" + raw),
        (b"iTXt", name + b"\0\1\0\0\0" + zlib.compress(raw)),
    ))  # fmt: skip
    chunk = png_chunk(kind, body)
    chunk += png_chunk(b"tEXt", b"Software\0NovelAI") if name == b"Comment" else b""
    data = png_bytes()
    at = rng.choice((33, len(data) - 12))
    data = data[:at] + chunk + data[at:]
    path = folder / "case.png"
    path.write_bytes(change_bytes(rng, data) if rng.random() < 0.1 else data)
    return lambda: from_png(path)


TEXT = """a red house, (at night:1.2)
Negative prompt: a tree, "quoted"
Steps: 20, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: "a, b", RNG: torch, \
Denoising strength: 0.5, Image: photo.png, Lora: "a.safetensors:0.5 b", Clip skip: 2, Version: v1"""


WORKFLOWS = (  # ComfyUI's, InvokeAI's of two ages, NovelAI's
    (b"prompt", """{"3": {"class_type": "KSampler", "inputs": {"seed": 5, "steps": 20, "cfg": 8,
    "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 0.5, "model": ["1", 0],
    "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "1": {"class_type": "LoraLoader", "inputs": {"lora_name": "a.pt", "strength_model": 1,
    "strength_clip": 1, "model": ["4", 0], "clip": ["4", 1]}},
    "2": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["1", 1]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (red:1.2) [b]", "clip": ["2", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": ["8", 0], "clip": ["2", 0]}},
    "8": {"class_type": "PrimitiveString", "inputs": {"value": "embedding:c"}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}}}"""),
    (b"invokeai_metadata", """{"positive_prompt": "a red++ cat", "negative_prompt": "b", "seed": 5,
    "width": 768, "height": 432, "rand_device": "cpu", "cfg_scale": 7.5, "steps": 50,
    "scheduler": "euler_k", "clip_skip": 1, "model": {"model_name": "a"}, "strength": 0.5,
    "loras": [{"lora": {"model_name": "c"}, "weight": 0.5}], "vae": null, "seamless_x": true}"""),
    (b"sd-metadata", """{"app_version": "v2.2.4", "image": {"prompt": [{"prompt": "a [b]",
    "weight": 1.0}], "steps": 50, "cfg_scale": 7.5, "height": 512, "width": 512, "seed": 5,
    "type": "txt2img", "sampler": "k_lms", "variations": []}}"""),
    (b"Comment", """{"prompt": "a {{red}} cat", "steps": 28, "height": 1216, "width": 832,
    "scale": 5.0, "cfg_rescale": 0.4, "seed": 5, "noise_schedule": "karras", "sm": true,
    "sampler": "k_euler_ancestral", "uc": "b", "request_type": "PromptGenerateRequest"}"""),
)  # fmt: skip


def png_chunk(kind, body):
    crc = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + crc


def from_png(path):
    with command("sd.py"):
        app.check(app.parse(["--from-png", str(path), "--output", str(path.with_name("out.png"))]))


def png_bytes():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def picture_case(rng, bench, folder):
    kind = rng.choice(("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "EPS", "ICO", "TGA"))
    mode = rng.choice(("RGB", "RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "LA"))
    buffer = io.BytesIO()
    size = rng.choice(((64, 64), (1, 1), (3, 200), (1, 60_000)))
    try:
        Image.new(mode, size).save(buffer, kind)
    except (OSError, ValueError, KeyError):
        Image.new("RGB", (16, 16)).save(buffer, kind)
    data = buffer.getvalue()
    head = rng.choice((60, 200, len(data)))
    path = folder / f"case.{rng.choice(('png', 'jpg', 'eps'))}"
    path.write_bytes(change_bytes(rng, data[:head]) + data[head:])
    if kind == "PNG" and rng.random() < 0.5:  # the size, with its checksum mended
        data = (
            data[:16] + struct.pack(">II", *rng.choices((0, 1, 8, 9000, 1 << 24), k=2)) + data[24:]
        )
        path.write_bytes(data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:])
    size = rng.choice(((None, None), (64, 64), (64 * 70, 64 * 70)))
    return lambda: sd.picture_and_mask(path, None, *size)


def yaml_case(rng, bench, folder):
    text = 'model:\n  params:\n    linear_start: 0.00085\n    parameterization: "v"\n'
    text = change_text(rng, text).encode(errors="replace")
    (folder / "case.yaml").write_bytes(change_bytes(rng, text) if rng.random() < 0.3 else text)
    source = convert_weights.Source(folder / "case.safetensors", {})
    source.path.write_bytes(bytes(16))
    biases = convert_weights.Tensor(source.path, 0, "F32", (4,), (1,))
    spec = convert_weights.TensorSpec("unet.up.11.1.norm1.bias", (4,))
    found = [convert_weights.Found(spec, "x", biases)]
    return lambda: convert_weights.find_facts({}, source, True, found)


def prompt_case(rng, bench, folder):
    text = change_text(rng, rng.choice((TEXT, "a (red:1.5) [small] house BREAK \\(x\\)", "")))
    if rng.random() < 0.2:
        text = rng.choice(("(a", ")", " ", ":1", "(a:1)", "\u0301", "BREAK ", "x", "<|e")) * 10_000
    return lambda: read_prompt(text)


def read_prompt(text):
    prompts.show_tokens(tiny(), text)
    tiny().encode_prompts([text, ""])


LINES = """# a comment
a tree --seed 3,5-9 -n "at night" --steps 2
"a boat" --width 128 --output "{n}-{prompt}.webp"
--prompt "a house" --sampler "DPM++ 2M Karras" --upscale 1.5
"""
DEFAULTS = """steps = 3
negative-prompt = "night"
folder = ["."]
quiet = true
output = "{prompt}-{seed}.jpg"
seed = "1,2"
"""


def lines_case(rng, bench, folder):
    """A file of prompts with options, or one's own defaults, and the names that follow."""
    lines, own = folder / "lines.txt", folder / "sd.py" / "defaults.toml"
    own.parent.mkdir()
    text = change_text(rng, rng.choice((LINES, LINES.split("\n")[1])))
    lines.write_bytes(text.encode(errors="replace"))
    if rng.random() < 0.5:
        own.write_bytes(change_text(rng, DEFAULTS).encode(errors="replace"))
    return lambda: read_lines(lines)


def read_lines(path):
    os.environ["XDG_CONFIG_HOME"], before = str(path.parent), Path.cwd()
    os.chdir(path.parent)
    try:
        args = app.parse(["--prompts", str(path), "--output", str(path.parent / "out.png")])
        app.check(args)
        for line in app.choose_lines(args):
            for seed in line.seed[:3]:
                app.choose_name(line.output, line.prompt, seed, 1)
    finally:
        os.chdir(before)
        del os.environ["XDG_CONFIG_HOME"]


MODELS = {}


def tiny():
    if not MODELS:
        MODELS["tiny"] = sd.StableDiffusion(reader=prompts.read_weighted)
    return MODELS["tiny"]


FORMATS = {
    "zip": zip_case, "legacy": legacy_case, "safetensors": safetensors_case,
    "lora": tensors_case("lora.safetensors", ".safetensors"),
    "embedding": tensors_case("word.safetensors", ".safetensors"), "controlnet": control_case,
    "vae": tensors_case("vae.safetensors", ".safetensors"), "gguf": gguf_case,
    "folder": folder_case, "flat": flat_case, "packed": packed_case, "png": png_case,
    "picture": picture_case, "yaml": yaml_case, "prompt": prompt_case, "lines": lines_case,
}  # fmt: skip


def bad(target):
    return lambda rng, bench, folder: lambda: target(folder)


BAD = {  # what the fuzzer must find, to show that it can
    "leak": bad(lambda folder: 1 / 0),
    "harm-process": bad(lambda folder: subprocess.run(["true"], check=False)),
    "harm-import": bad(lambda folder: __import__("this")),
    "harm-file": bad(lambda folder: (folder.parent / "outside").touch()),
    "crash": bad(lambda folder: os.kill(os.getpid(), signal.SIGSEGV)),
    "hang": bad(lambda folder: time.sleep(100)),
    "memory": bad(lambda folder: np.ones(1200 << 20, np.uint8)),
    "escape": bad(lambda folder: sys.stderr.write(ESCAPE)),
    "warning": bad(lambda folder: warnings.warn("odd", stacklevel=1)),
    "leftover": bad(lambda folder: ((folder / "half").touch(), sd.expect(False, "a", 1, "b"))),
}  # fmt: skip
FORMATS_AND_BAD = FORMATS | BAD


# %% What to try -----------------------------------------------------------------------------------


class Unreadable(Exception):
    """What was converted is of no use to sd.py."""


def convert(path, folder):
    output = folder / "out.flat.safetensors"
    convert_weights.convert(path, output, dtype="float32", log=sd.say)
    kind = json.loads(sd.read_header(output)["config"])["kind"]
    try:
        use(output, kind, folder)
    except sd.SDError as error:
        if "another" not in str(error):  # model than the one of this bench, which is right
            raise Unreadable(str(error)) from None


def use(path, kind, folder):
    if kind in ("vae", "tiny vae"):
        model = sd.StableDiffusion(
            BENCH / "whole.flat", changes=[other_vae(path)] if kind == "vae" else ()
        )
        model = with_tiny_vae(model, path) if kind == "tiny vae" else model
        mx.eval(model.decode(mx.zeros((1, 8, 8, 4))))
    elif kind == "model":
        options = {"steps": 1, "width": 64, "height": 64, "sampler": "ddim", "context": None}
        model = sd.StableDiffusion(path, changes=[guided(3.0)] if has_guidance(path) else ())
        prompt = "a <|endoftext|> house \u732b 2"
        for x in model.generate_latents(prompt, **options):
            mx.eval(x)
        if model.config.safety:
            app.load_checker(model)
    elif kind == "lora":
        config, weights = sd.read_flat(BENCH / "whole.flat")
        _, changed = sd.lora(path)(config, weights)
        mx.eval({n: w for n, w in changed.items() if w is not weights.get(n)})
    elif kind == "words":
        weights = {"text_encoder.token_embedding.weight": mx.zeros((9, 64))}
        change = textual_inversion.textual_inversion(path)
        _, weights = change(sd.read_flat(BENCH / "whole.flat")[0], weights)
        mx.eval(weights)
    else:
        sd.ControlNet(path)


BENCH = None


# %% One case --------------------------------------------------------------------------------------


class Watch:
    """What the interpreter tells of every case: what is imported, opened, started, changed."""

    STARTS = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn",
              "socket.", "ctypes.", "pty.", "ftplib.", "urllib.", "webbrowser.")  # fmt: skip
    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink", "os.truncate",
               "os.chmod", "os.rmdir", "os.chown", "shutil.")  # fmt: skip

    def __init__(self):
        self.folder, self.harm = None, []
        sys.addaudithook(self.hear)

    def hear(self, event, args):
        if self.folder is None:
            return
        folder, self.folder = self.folder, None  # what is done here is no harm
        try:
            if harm := self.judge(event, args, str(folder)):
                self.harm.append(harm)
        finally:
            self.folder = folder

    def judge(self, event, args, folder):
        if event == "import" or event.startswith(self.STARTS):
            return f"{event} {str(args[:1])[:100]}"
        inside = lambda path: (
            not isinstance(path, (str, bytes, os.PathLike))
            or os.path.abspath(os.fsdecode(path)).startswith(folder)
        )
        if event == "open" and isinstance(args[2], int):
            writes = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not inside(args[0]) and args[0] != os.devnull:
                return f"open {args[0]!r} to write"
        if event.startswith(self.CHANGES) and not all(map(inside, args[:2])):
            return f"{event} {args[:2]}"
        return None


def memory():
    """-> the most that was used since clear_memory(), and what is used now, in bytes"""
    with open("/proc/self/status") as file:
        numbers = dict(line.split(":", 1) for line in file)
    return [int(numbers[name].split()[0]) << 10 for name in ("VmHWM", "VmRSS")]


def clear_memory():
    Path("/proc/self/clear_refs").write_text("5")


def run_case(target, watch, folder, most_memory=MOST_MEMORY):
    """-> outcome, detail. Good are "accepted" and "refused"."""
    said, before = io.StringIO(), listing(folder)
    sd.say_once.cache_clear()
    clear_memory()
    start = memory()[1]
    outcome, detail = "accepted", ""
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        warnings.simplefilter("always")
        # A file is closed when it is forgotten; the command line is silent about NumPy's.
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        watch.harm.clear()
        watch.folder = folder
        try:
            target()
        except sd.SDError as error:
            outcome, detail = "refused", str(error)
        except (convert_weights.NotConvertible, SystemExit) as error:
            outcome, detail = "refused", sd.printable(error)
        except Unreadable as error:
            outcome, detail = "UNREADABLE", str(error)
        except BaseException as error:  # noqa: BLE001  that is what is looked for
            last = traceback.extract_tb(error.__traceback__)[-1]
            detail = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}"
            outcome = "LEAK"
        finally:
            watch.folder = None
    text = said.getvalue() + detail
    took = memory()[0] - start
    if watch.harm:
        return "HARM", watch.harm[0]
    if outcome in ("accepted", "refused"):
        if any(not (c.isprintable() or c in "\n\t") for c in text):
            return "ESCAPE", ascii(text)[:300]
        if outcome == "refused" and len(detail) > 2500:
            return "LONG", f"a message of {len(detail)} characters: {detail[:200]}"
        if warned:
            return "WARNING", str(warned[0].message)
        if took > most_memory:
            return "MEMORY", f"{took >> 20} MiB; {detail[:100]}"
        if outcome == "refused" and listing(folder) != before:
            return "LEFTOVER", str(listing(folder) - before)
    return outcome, detail


def listing(folder):
    return {(str(path), path.lstat().st_ino) for path in folder.rglob("*")}


def make_case(bench, name, number, seed, folder):
    rng = random.Random(f"{seed} {name} {number}")
    return FORMATS_AND_BAD[name](rng, bench, folder)


# %% Workers ---------------------------------------------------------------------------------------


def worker(args):
    """Try the cases of one format, and note each before it begins and after it ended."""
    global BENCH
    BENCH = args.bench
    Image.init()
    for name in ("cp437", "utf-8-sig"):
        codecs.lookup(name)
    if args.worker in FORMATS:  # what is imported at first use, is by now
        use(BENCH / "whole.flat", "model", BENCH)
    watch, name = Watch(), args.worker
    print("ready", flush=True)
    for number in range(args.start, args.cases):
        print(f"{number} begins", flush=True)
        with tempfile.TemporaryDirectory(prefix="case", dir=args.bench) as folder:
            try:
                target = make_case(args.bench, name, number, args.seed, Path(folder))
            except (ArithmeticError, LookupError, RecursionError, ValueError, struct.error):
                outcome, detail = "not made", ""  # a change that no writer can write
            else:
                outcome, detail = run_case(target, watch, Path(folder))
        print(json.dumps([number, outcome, detail[:400]]), flush=True)
        if args.seconds and time.time() > args.end:
            break


def run_worker(args, name, start, note, end):
    """-> the number to go on with after this process, None if the format is done"""
    options = [
        sys.executable, __file__, "--worker", name, "--bench", args.bench, "--start", start,
        "--cases", args.cases, "--seed", args.seed, "--end", end, "--seconds", args.seconds,
    ]  # fmt: skip
    process = subprocess.Popen(
        list(map(str, options)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    number, seconds = start, 120
    while True:
        signal.alarm(seconds)
        try:
            line = process.stdout.readline()
        except TimeoutError:
            process.kill()
            process.wait()
            note(number, "HANG", f"more than {MOST_SECONDS} s")
            return number + 1
        finally:
            signal.alarm(0)
        if not line:
            break
        seconds = MOST_SECONDS
        if line.endswith(" begins\n"):
            number = int(line.split()[0])
        elif line.startswith("["):
            note(*json.loads(line))
    status = process.wait()
    if status:
        last = process.stderr.read().strip().splitlines()[-1:] or [""]
        note(number, "CRASH", f"status {status}: {last[0][:300]}")
        return number + 1
    return None


def too_long(*_):
    raise TimeoutError


@dataclass
class Report:
    """Outcomes by format, and the first of each way to fail."""

    log: object = None
    counts: dict = field(default_factory=collections.Counter)
    failures: dict = field(default_factory=dict)

    def note(self, name, number, outcome, detail):
        self.counts[name, outcome] += 1
        if outcome.isupper():
            signature = outcome + re.sub(r"/\S*/|\d+", "", detail)[:60]
            self.failures.setdefault(signature, []).append((name, number, detail))
        if self.log:
            print(json.dumps([name, number, outcome, detail]), file=self.log, flush=True)

    def lines(self):
        outcomes = sorted({outcome for _, outcome in self.counts}, key=str.swapcase)
        yield "format".ljust(14) + "".join(outcome.rjust(12) for outcome in outcomes)
        names = dict.fromkeys(name for name, _ in self.counts)
        for name in names:
            row = (self.counts[name, outcome] for outcome in outcomes)
            yield name.ljust(14) + "".join(str(count).rjust(12) for count in row)
        yield f"{sum(self.counts.values())} cases"
        for found in self.failures.values():
            name, number, detail = found[0]
            yield f"{name}:{number} ({len(found)} like it) {sd.printable(detail)}"


def fuzz(args):
    report = Report(open(args.log, "a") if args.log else None)  # noqa: SIM115
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        args.bench = Path(folder)
        if any(name in FORMATS for name in args.formats):
            make_bench(args.bench)
        for name in args.formats:
            end, start = time.time() + args.seconds / len(args.formats), 0
            note = lambda *found, name=name: report.note(name, *found)
            while start is not None and start < args.cases:
                start = run_worker(args, name, start, note, end)
                if args.seconds and time.time() > end:
                    break
    print("\n".join(report.lines()))
    return report


def replay(args):
    """One case, in this process, with its traceback."""
    global BENCH
    name, _, number = args.replay.partition(":")
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        BENCH = Path(folder)
        make_bench(BENCH)
        (BENCH / "case").mkdir()
        target = make_case(BENCH, name, int(number), args.seed, BENCH / "case")
        if args.keep:
            shutil.copytree(BENCH / "case", args.keep, symlinks=True)
        target()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="of each format; default 200")
    parser.add_argument("--seconds", type=float, default=0, help="in all; default: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    parser.add_argument("--log", help="add every outcome to this file")
    parser.add_argument("--replay", metavar="FORMAT:NUMBER", help="try one case")
    parser.add_argument("--keep", type=Path, help="where to put the files of --replay")
    for name, kind in (("worker", str), ("bench", Path), ("start", int), ("end", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
    elif args.replay:
        replay(args)
    else:
        sys.exit(any(name.isupper() for _, name in fuzz(args).counts))


if __name__ == "__main__":
    main()
