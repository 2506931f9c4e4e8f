"""Small files: a flat file whose large matrices are indices of a table, of 2, 4, 6 or 8 bits each.

    pack_flat(source, output, Size(6), log)

Linear layers and convolutions of the text model, the UNet or a ControlNet have one table a tensor.
Embeddings, norms, biases and the VAE stay as they are. sd_more/formats/palettes.py has how a table
is found, sd_more/fast/palettes.py how it is used.
"""

import contextlib
import fcntl
import functools
import heapq
import itertools
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import sd
from sd_more.check import FLOOR, Original, ask, build, check, inputs, psnr
from sd_more.formats import palettes
from sd_more.formats.tensor_files import make_header, read_safetensors
from sd_more.formats.tensors import NotConvertible, require
from sd_more.vae import read_kind

KINDS = ("model", "controlnet")  # that have palettes


def find_weights(plain):
    """-> {name: Tensor} of all of a flat file; which of them may become palettes; its metadata"""
    contents = read_safetensors(plain)
    packed = any(name.endswith(".palette") for name in contents.tensors)
    require(not packed, "it has palettes already. Give what it was made from")
    kind = json.loads(contents.metadata["config"])["kind"]
    require(kind in KINDS, f"palettes are for models and ControlNets, and this is a {kind}")
    may = [n for n, t in contents.tensors.items() if palettes.may_have(n, t.shape)]
    return contents.tensors, may, contents.metadata


class Size(NamedTuple):
    """How small a file is to be, and how like its source."""

    bits: object = None  # of BITS, or "auto", or None for no palettes
    min_psnr: float = FLOOR  # with auto, in dB
    check: bool = False  # compare it with its source


def make_size(bits, min_psnr, check):
    """-> a Size; SDError, if there is none of these numbers. bits may be text."""
    bits = int(bits) if isinstance(bits, str) and bits.isdecimal() else bits
    sd.expect(bits in (None, "auto", *palettes.BITS), "bits", bits, "2, 4, 6, 8 or auto")
    good = isinstance(min_psnr, (int, float)) and 0 < min_psnr < 200
    sd.expect(good, "min_psnr", min_psnr, "between 0 and 200 dB")
    if min_psnr != FLOOR and bits != "auto":
        sd.say_once("--min-psnr has no effect without --bits auto.")
    return Size(bits, min_psnr, check)


def write_sized(output, write_plain, size, original, log):
    """write_plain(file): writes the flat file without palettes; original: for check"""

    def write_small(file):
        with tempfile.NamedTemporaryFile(prefix=".", suffix=sd.PART, dir=output.parent) as plain:
            with contextlib.suppress(OSError):  # not every file system knows locks
                fcntl.flock(plain, fcntl.LOCK_EX)  # others remove what nobody holds
            write_plain(plain)
            plain.flush()
            write_packed(Path(plain.name), file, size, log)

    write_checked(output, write_small if size.bits else write_plain, size, original, log)


def write_checked(output, fill, size, original, log):
    """fill(file): writes it. What does not pass the check, if there is one, is not there."""

    def write(file):
        fill(file)
        if size.check:
            file.flush()
            config = json.loads(sd.read_header(Path(file.name))["config"])
            check(Path(file.name), config["kind"], config, original, log=log)

    sd.write_complete(output, write)


def pack_flat(source, output, size, log):
    """source: a flat file; -> output"""
    kind = read_kind(source)
    sd.read_flat(source, kind if isinstance(kind, str) else "model")  # what is wrong is said here
    tensors, _, _ = find_weights(source)
    arrays = {n: t.float32 for n, t in tensors.items() if n != "tokenizer.merges"}
    fill = functools.partial(write_packed, source, size=size, log=log)
    write_checked(output, fill, size, Original(arrays, {}), log)
    log(f"{output}: {output.stat().st_size / 1e6:.0f} MB")
    return output


def write_packed(plain, file, size, log):
    """Write the flat file plain as one with palettes."""
    tensors, may, metadata = find_weights(plain)
    if size.bits == "auto":
        chosen = choose_bits(plain, size.min_psnr, log)
    else:
        chosen = dict.fromkeys(may, size.bits)
    metadata |= {"format": sd.FORMATS[1]}
    last = "tokenizer.merges"  # no multiple of 8 bytes
    names = sorted(tensors, key=lambda name: (name == last, name not in chosen))
    entries = []
    for name in names:
        dtype, shape = tensors[name].dtype, tensors[name].shape
        if name in chosen:
            entries.append((name, "U8", (*shape[:-1], shape[-1] * chosen[name] // 8)))
            dtype, shape, name = "F32", (1 << chosen[name],), f"{name}.palette"
        entries.append((name, dtype, shape))

    def pack(name):
        tensor = tensors[name]
        return pack_tensor(name, tensor, chosen[name]) if name in chosen else [tensor.raw()]

    file.write(make_header(entries, metadata))
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        for i in range(0, len(names), 2 * cores):
            few = names[i : i + 2 * cores]
            file.writelines(itertools.chain.from_iterable(pool.map(pack, few)))


def pack_tensor(name, tensor, bits):
    """-> packed indices, table"""
    indices, table = palettes.palettise(read_half(name, tensor), bits)
    return palettes.pack(indices, bits), table


def read_half(name, tensor):  # -> float16
    with np.errstate(over="ignore"):
        weights = tensor.float32().astype(np.float16)
    require(np.isfinite(weights).all(), f"{name} has numbers too large for palettes, beyond 65504")
    return weights


# %% Bits for each ---------------------------------------------------------------------------------
# Apple's mixed-bit palettes (python_coreml_stable_diffusion/mixed_bit_compression_pre_analysis.py)
# ask the network once for each tensor and each number of bits. Here it is once for each tensor,
# with 4 bits: a network's error is in proportion to that of the tensor as long as both are small,
# and what different tensors cause adds up, as noise of independent sources does. That is only an
# estimate. So in the end the whole network is asked, and the limit lowered by what is missing.

TRIED, MOST_TIMES = 4, 50
LEVELS = (16, 8, 6, 4, 2)  # 16: no palette


def choose_bits(plain, floor, log):
    """-> {name: bits} for those tensors that get a palette. floor: the PSNR in dB that each
    network's answer keeps, compared with the plain file's.
    """
    tensors, may, metadata = find_weights(plain)
    config, chosen = json.loads(metadata["config"]), {}
    weights = sd.read_flat(plain, config["kind"])[1]
    for part in ("text_encoder", "unet", "controlnet"):
        halves = {n: functools.partial(read_half, n, tensors[n]) for n in may if n.startswith(part)}
        if halves:
            network, arguments = build(part, config, weights), inputs(part, config)
            answer = functools.partial(ask, part, network, *arguments)
            chosen |= choose_for_network(part, network, answer, halves, floor, log)
    return chosen


def choose_for_network(part, network, answer, halves, floor, log):
    """halves: {name: function -> its weights, float16}"""
    truth, errors = answer(), {}
    require(np.isfinite(truth).all(), f"its {part} answers with numbers that are none (NaN)")
    largest = float(np.abs(truth).max())
    for i, (name, half) in enumerate(halves.items(), 1):
        weights = half()
        table = palettes.squared_errors(weights)
        with exchanged(network, {name: look_up(weights, TRIED)}):
            error = float(np.mean((np.asarray(answer(), np.float64) - truth) ** 2))
        scale = error / table[TRIED] if table[TRIED] else np.inf
        errors[name] = {16: 0.0} | {bits: scale * e if e else 0.0 for bits, e in table.items()}
        if i % 20 == 0:
            log(f"{part}: tried {i} of {len(halves)} tensors")
    sizes = {name: half().size for name, half in halves.items()}
    limit = (largest / 10 ** (floor / 20)) ** 2
    for _ in range(MOST_TIMES):
        chosen = spend(errors, sizes, limit)
        changed = {name: look_up(halves[name](), bits) for name, bits in chosen.items()}
        with exchanged(network, changed):
            found = psnr(answer(), truth)
        mean = sum(sizes[n] * chosen.get(n, 16) for n in sizes) / sum(sizes.values())
        log(f"{part}: {mean:.2f} bits a weight, {found:.1f} dB")
        if found >= floor:
            return chosen
        limit *= 10 ** ((found - floor) / 10) * 0.9
    raise NotConvertible(f"no choice of bits was found for its {part} that keeps {floor:g} dB")


def look_up(half, bits):
    indices, table = palettes.palettise(half, bits)
    return mx.array(table.astype(np.float16)[indices])


@contextlib.contextmanager
def exchanged(network, weights):
    """Inside, these weights are the network's. weights: {name in the file: array}"""
    layers = {name: find_layer(network, name) for name in weights}
    before = {name: layer["weight"] for name, layer in layers.items()}
    for name, layer in layers.items():
        layer["weight"] = weights[name]
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer["weight"] = before[name]


def find_layer(network, name):
    _, *path, _ = name.split(".")
    for step in path:
        network = network[int(step)] if isinstance(network, list) else network[step]
    return network


def spend(errors, sizes, limit):
    """-> {name: bits}, so that the errors add up to limit at most: always the step to fewer bits
    that adds least for each bit that it saves.
    """
    level, total = dict.fromkeys(errors, 0), 0.0

    def step(name):
        now, new = (LEVELS[level[name] + i] for i in (0, 1))
        more = errors[name][new] - errors[name][now]
        return more / (sizes[name] * (now - new)), more, name

    steps = [step(name) for name in errors]
    heapq.heapify(steps)
    while steps:
        _, more, name = heapq.heappop(steps)
        if total + more > limit:
            continue
        total += more
        level[name] += 1
        if level[name] + 1 < len(LEVELS):
            heapq.heappush(steps, step(name))
    return {name: LEVELS[i] for name, i in level.items() if i}
