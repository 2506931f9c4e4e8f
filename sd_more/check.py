"""Is a flat file what its source was? Its networks are asked, and their answers are compared.

    check(flat, kind, config, original)      raises NotConvertible below FLOOR

The measure is Apple's for its Core ML models (python_coreml_stable_diffusion/torch2coreml.py):
PSNR = 20 log10(largest number / root mean square error), in dB. With weights of 16 bits it is 70
and more; every 2 bits less cost some 12.
"""

import importlib.util
import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import sd
from sd_more.formats.tensors import NotConvertible, require

FLOOR = 35  # dB, Apple's
OTHER = 0.7  # the relative error of a tensor that is another one; 2 bits make 0.35, mixing up 1.4
SIDE = 16  # of the latents that a network is asked for: large ones tell no more


def psnr(a, b):
    """In dB, infinite where a and b are equal."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    error = math.sqrt(np.mean((a - b) ** 2))
    if error == 0:
        return math.inf
    return 20 * math.log10(max(np.abs(b).max(), 1e-30) / error) if error < math.inf else -math.inf


# %% What the networks are asked -------------------------------------------------------------------


def inputs(name, config):
    """-> the arguments, NumPy arrays, channels last, the same each time."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    if name == "text_encoder":
        ids = rng.integers(0, sd.START, (1, 77))
        ids[:, 0], ids[:, 20:] = sd.START, sd.END
        return (ids,)
    if name in ("unet", "controlnet"):
        x = normal(1, SIDE, SIDE, config["unet"].get("channels", 4))
        context = normal(1, 77, config["unet"]["context_width"])
        picture = (rng.random((1, 8 * SIDE, 8 * SIDE, 3), np.float32),)
        return x, context, *(picture if name == "controlnet" else ())
    if name == "vae.decoder":
        return (normal(1, SIDE, SIDE, 4),)
    return (rng.random((1, 8 * SIDE, 8 * SIDE, 3), np.float32) * 2 - 1,)


def ask(name, network, *arguments):
    """-> the answer of one of sd.py's networks, as one NumPy array."""
    first, *more = map(mx.array, arguments)
    if name == "text_encoder":
        return np.array(network(first))
    if name == "unet":
        return np.array(network(first, 500, *more))
    if name == "controlnet":
        answers = network(first, 500, more[0], network.look(more[1]))
        return np.concatenate([np.array(y).reshape(-1) for y in answers])
    if name == "vae.decoder":
        return np.array(network.decode(first))
    return np.array(network.encode(first)[0])


VAE = ("vae.encoder", "vae.decoder")
NETWORKS = {"model": ("text_encoder", "unet", *VAE), "vae": VAE, "controlnet": ("controlnet",)}


def build(name, config, weights, fast=True):
    """-> one of sd.py's networks with these weights, in float32."""
    part = name.split(".")[0]
    if part == "controlnet":
        network = sd.ControlNetwork(**config["unet"])
    elif part == "vae":
        network = sd.VAE(config["vae"]["widths"], config["vae"]["groups"])
    else:
        network = sd.build_networks(sd.Config(**config))[part]
    sd.load_weights(network, weights, part)
    sd.accelerate(network, mx.float32, fast)
    return network


# %% Compare ---------------------------------------------------------------------------------------


class Original(NamedTuple):
    """What a flat file was made from."""

    arrays: dict  # {name in the flat file: function -> the array, float32, channels last}
    parts: dict  # {text_encoder, unet, vae or controlnet: (tensors by their names, LDM's or not)}


def check(flat, kind, config, original, floor=FLOOR, log=print):
    """Compare each network of a flat file with the original's."""
    weights = sd.read_flat(flat, kind)[1]
    worst = {}
    for name, read in original.arrays.items():
        ours, theirs = np.array(weights[name].astype(mx.float32)), read()
        worst[name] = psnr(ours, theirs)
        other = np.linalg.norm(ours - theirs) > OTHER * np.linalg.norm(theirs)
        require(not other, f"{name} is not what it is in the source: {worst[name]:.1f} dB")
    for name in NETWORKS.get(kind, ()):
        part, arguments = name.split(".")[0], inputs(name, config)
        log(f"checking {name}")
        ours = ask(name, build(name, config, weights), *arguments)
        theirs, who = answer(name, config, original, arguments)
        found = psnr(ours, theirs)
        bad = min((n for n in worst if n.startswith(part)), key=worst.get)
        report = f"{name}: {found:.1f} dB against {who}"
        low = f"less than {floor:g}. Its worst tensor is {bad}, {worst[bad]:.1f} dB"
        require(found >= floor, f"{report}, {low}")
        log(report)
    bad = min(worst, key=worst.get)
    log(f"{len(worst)} tensors, the worst is {bad}: {worst[bad]:.1f} dB")


def answer(name, config, original, arguments):
    """-> what the original's network answers; who says so"""
    part = name.split(".")[0]
    if part in original.parts and importlib.util.find_spec("diffusers"):
        from sd_more.references import answer_of, load

        tensors, layout = original.parts[part]
        try:
            read = {n: t.float32() for n, t in tensors.items()}
            return answer_of(name, load(part, config, read, layout), arguments), "diffusers"
        except NotConvertible as problem:
            sd.say_once(f"not compared with diffusers: {problem}")
    arrays = {n: mx.array(f()) for n, f in original.arrays.items() if n.startswith(f"{part}.")}
    return ask(name, build(name, config, arrays, fast=False), *arguments), "sd.py's plain layers"
