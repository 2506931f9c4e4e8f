"""Turn a Stable Diffusion checkpoint into the one flat file that sd.py reads. Without PyTorch.

    python convert_weights.py sd-v1-4.ckpt                    writes sd-v1-4.flat.safetensors

A checkpoint is a thousand names and a billion numbers, two gigabytes or four, and there are three
conventions for writing it down: PyTorch's .ckpt, the same names in .safetensors, and the folders of
the diffusers library, with names of their own. sd.py knows none of them. It reads one file in which
a tensor's name is its place in sd.py, a convolution's weight lies channels-last, (out, kh, kw, in),
every 1x1 convolution is the linear layer it is, and a little JSON tells the rest. LoRAs,
ControlNets and textual inversions become such files, too.

    source  ->  {name: where its bytes are}           nothing is read yet            1, 2
            ->  which model is it?                    or a sentence why not          3, 5
            ->  a plan: every tensor sd.py needs      name, shape, name in source    4, 7
            ->  one tensor at a time: read, transpose, round, check, write           6

Nothing in a checkpoint is trusted. A .ckpt is a pickle, a little program that may call anything at
all; sd_more/formats/pickles.py steps through it without ever calling anything. A tensor is read
only if sd.py needs it and its shape is the expected one. Whatever goes wrong ends in one sentence
and no file. sd_more/formats/ has what the files of others look like in detail.

     1 Files               4 Names      7 Plans
     2 diffusers folders   5 Config     8 Convert
     3 Which model is it?  6 Writing    9 Command line
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until command(): no traceback for Ctrl-C

import argparse
import collections
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import struct
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mlx.utils import tree_flatten

import sd
from sd_more.console import command
from sd_more.formats import (
    diffusers,
    embeddings,
    facts,
    gguf,
    guidance,
    hub,
    lora,
    neighbours,
    others,
    taesd,
    tokenizers,
)
from sd_more.formats.tensor_files import make_header, read_safetensors
from sd_more.formats.tensors import (
    CODES,
    FLOATS,
    Computed,
    NotConvertible,
    Tensor,
    cast,
    open_file,
    read_small,
    require,
)
from sd_more.formats.torch_files import check_sums, read_legacy, read_zip
from sd_more.palettes import FLOOR, Original, make_size, pack_flat, write_sized

MERGES = sd.TINY.with_name("merges.txt")


class ConversionError(sd.SDError):
    """The text is the whole message: what is wrong, with which value, and what to do now."""


@contextlib.contextmanager
def blame(path):
    try:
        yield
    except NotConvertible as problem:
        why = short(problem, 1200)
        end = "" if why.endswith((".", "?", "!")) else "."
        raise ConversionError(f"{path} was not converted: {why}{end}") from None


def short(text, most=80):  # what comes from a file may be of any length
    text = str(text)
    return text if len(text) <= most else text[:most] + "..."


# %% 1. Files --------------------------------------------------------------------------------------
# All formats come down to the same: names, and for each a tensor, which is a place in a file, a
# type, a shape and strides (sd_more/formats/tensors.py). Which format it is, the first bytes say.


@dataclass
class Source:
    """What a file or a folder holds, and what it says about itself."""

    path: Path
    tensors: dict
    overrides: dict = field(default_factory=dict)  # numbers that it tells, see section 5
    told_by: str = ""  # who told these numbers
    mentions: set = field(default_factory=set)  # things a pickle wanted imported
    merges: Path = MERGES
    files: set = field(default_factory=set)  # all that were read
    metadata: dict = field(default_factory=dict)  # text, from a safetensors header
    unreadable: dict = field(default_factory=dict)  # names of tensors of unknown kinds: their kind
    names: list = field(default_factory=list)  # what else it is called
    remarks: list = field(default_factory=list)  # what else is to be said of it, in the report

    @property
    def name(self):  # in the hub's cache a folder's own name is a number
        return hub.whence(self.path) or neighbours.full_name(self.path)

    @functools.cached_property
    def tokenizer(self):  # {name: JSON} of its files besides the merges
        files = {name: self.path / "tokenizer" / name for name in tokenizers.FILES}
        return {name: read_json(file) for name, file in files.items() if file.is_file()}


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
    with open_file(path) as file:
        head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    try:
        with blame(path):
            if head.startswith(b"PK\3\4"):
                read = read_zip
            elif head.startswith(b"GGUF"):
                read = gguf.read_gguf
            elif size > 8 and length <= size - 8 and head[8:9] in (b"{", b" "):
                read = read_safetensors
            elif head.startswith(b"\x80"):
                read = read_legacy
            else:
                what = others.name_file(head) or "in no format known here"
                raise NotConvertible(f"it is {what if size else 'empty'}")
            contents = read(path)
            flat = contents.metadata.get("format", "").startswith("sd.py")
            require(not flat, "it is a flat file already. Give it to sd.py as it is")
    except ConversionError:
        raise
    except DAMAGE as error:
        why = f"{type(error).__name__}: {short(error)}"
        raise ConversionError(f"{path} is damaged ({why}). Download it again.") from None
    return Source(
        path, strip_names(contents.tensors), contents.config, "the checkpoint's sd_config",
        contents.mentions, files={path}, metadata=contents.metadata,
        unreadable=strip_names(contents.unreadable), remarks=contents.remarks,
    )  # fmt: skip


def strip_names(tensors):
    """Without what PyTorch's wrappers put before names: DataParallel, torch.compile."""
    bare = {re.sub(r"^module\.|(?<![^.])_orig_mod\.", "", name): name for name in tensors}
    return (
        {name: tensors[old] for name, old in bare.items()} if len(bare) == len(tensors) else tensors
    )


def read_json(path):
    with blame(path):
        try:
            value = json.loads(read_small(path).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise NotConvertible(f"it is not readable JSON: {short(error)}") from None
        require(type(value) is dict, "it is not a JSON object")
    return value


# %% 2. diffusers folders --------------------------------------------------------------------------
# One folder per network, each with weights and a config.json, whose fields can describe many models
# that are not Stable Diffusion 1 or 2 and whose tensors still look alike. So every field that
# changes what is computed must have the value that sd.py's code has; sd_more/formats/diffusers.py
# has the list.

MODEL = {"unet": "unet", "vae": "vae", "text_encoder": "text"}  # folder: part of sd.py's config
OWN = "sd.py's own defaults are used, --sampler and --spacing choose others"


def read_source(path, vae_path):
    """Whatever may be given to convert: a file, the folder of a model, or one network's folder."""
    if not path.is_dir():
        return add_config(add_other_half(read_file(path)))
    if file := neighbours.find_lora(path):
        return read_file(file)
    source = Source(path, {}, told_by="the folder's config files")
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    if config and config.get("_class_name") in ("AutoencoderKL", "AutoencoderTiny"):
        return read_vae_source(path)
    if config and config.get("_class_name") == "ControlNetModel":
        add_network(source, path, "controlnet", "unet")
        return source
    with blame(path):
        source.names.append(check_pipeline(path, config))
        for folder, part in MODEL.items():
            if (path / folder).is_dir() and not (part == "vae" and vae_path):
                add_network(source, path / folder, folder, part)
            elif part != "vae":  # which --vae can supply, so that is asked for later
                raise NotConvertible(f"it has no {folder} folder; it is not a whole model")
    if (path / "safety_checker").is_dir():
        add_tensors(source, path / "safety_checker", "safety_checker")
    if (path / "scheduler" / "scheduler_config.json").exists():
        config = read_config(path / "scheduler" / "scheduler_config.json", "scheduler")
        if unused := diffusers.name_unused(config):
            source.remarks.append(
                f"the folder's scheduler says {unused}, which is not asked: {OWN}"
            )
        v = config.get("prediction_type") == "v_prediction"
        source.overrides["prediction"] = "v" if v else "eps"
        # leading and linspace count only for the sampler of that folder; the user chooses one.
        if config.get("_class_name") == "LCMScheduler":
            source.overrides |= facts.FEW_STEPS
        elif config.get("timestep_spacing") == "trailing":
            source.overrides["spacing"] = "trailing"
        if config.get("rescale_betas_zero_snr") is True:
            source.overrides["zero_snr"] = True
    if (path / "tokenizer" / "merges.txt").exists():
        source.merges = path / "tokenizer" / "merges.txt"
    return source


def check_pipeline(path, config):
    """-> what the folder was called where it was published; "" if it does not say"""
    if (path / "model_index.json").exists():
        index = read_json(path / "model_index.json")
        name = index.get("_class_name")
        known = type(name) is str and diffusers.PIPELINES.fullmatch(name)
        require(known, f"its _class_name is {short(name)}, expected StableDiffusionPipeline")
        return str(index.get("_name_or_path", ""))
    if config:
        name = short(config.get("_class_name", "one network"))
        raise NotConvertible(f"it is one part of a model ({name}). Give the folder above it")
    return ""


def read_vae_source(path):
    """A file; a diffusers folder, of which only the VAE is read; or just that VAE's folder."""
    if not path.is_dir():
        return add_config(read_file(path))
    source = Source(path, {}, told_by="the VAE's config.json")
    path = path / "vae" if (path / "vae").is_dir() else path
    if read_json(path / "config.json").get("_class_name") == "AutoencoderTiny":
        read_config(path / "config.json", "tiny_vae")
        add_tensors(source, path, "vae")
    else:
        add_network(source, path, "vae", "vae")
    return source


def add_other_half(source):
    """TAESD's author has its encoder and its decoder in two files, beside each other."""
    if not taesd.is_half(source.tensors):
        return source
    with blame(source.path):
        name = taesd.FILE.fullmatch(source.path.name)
        require(name, "it looks like TAESD, and its name says neither encoder nor decoder")
    start, half, end = name.groups()
    halves = {half.lower(): source}
    for other in {"encoder", "decoder"} - halves.keys():
        halves[other] = read_file(source.path.with_name(start + other + end))
    for half, read in halves.items():
        source.files |= read.files
        read.tensors = {f"taesd_{half}.{name}": tensor for name, tensor in read.tensors.items()}
    source.tensors = halves["encoder"].tensors | halves["decoder"].tensors
    return source


def add_config(source):
    """A network's own file, taken out of its diffusers folder, and the config.json beside it."""
    file = neighbours.find(source.path).get("config")
    parts = (find_part(source.tensors, kind) for kind in ("vae", "controlnet"))
    part = next(filter(None, parts), None)
    tiny = source.tensors.keys() & set(taesd.FIRST)
    if not file or not tiny and (part is None or (part.prefix, part.layout) != ("", DIFFUSERS)):
        return source
    config, kind = read_json(file), "tiny_vae" if tiny else part.kind
    if config.get("_class_name") != diffusers.CLASSES[kind]:
        return source
    if tiny:
        read_config(file, kind)
        return source
    with blame(source.path):
        widths = read_vae_widths(part) if kind == "vae" else read_unet_sizes(part)[0]
    if config.get("block_out_channels") == widths:  # else it is that of another file
        source.told_by = f"{file.name} beside it"
        add_numbers(source, file, kind, "vae" if kind == "vae" else "unet")
    return source


def add_network(source, folder, kind, part):
    """Add one network's tensors, and its numbers to a part of the config."""
    config = add_numbers(source, folder / "config.json", kind, part)
    add_tensors(source, folder, kind)
    with blame(folder):
        learned = f"{kind}/{guidance.LAYERS[1]}.weight" in source.tensors
        told = config.get("time_cond_proj_dim")
        require(
            learned or not told, f"its time_cond_proj_dim is {short(told)}, and it has no layer"
        )


def add_numbers(source, file, kind, part):
    config = read_config(file, kind)
    numbers = diffusers.read_numbers(config, kind)
    if part == "unet" and type(numbers["heads"]) is int:
        numbers["heads"] = [numbers["heads"]] * 4
    source.overrides[part] = numbers
    size = config.get("sample_size")
    size = size[0] if type(size) is list and len(size) == 2 and size[0] == size[1] else size
    if kind == "unet" and type(size) is int:  # of the latents; of the pictures the nearest that is
        source.overrides["size"] = max(64, round(size / 8) * 64)
    if kind == "controlnet":
        source.overrides["pool"] = config.get("global_pool_conditions")
    return config


def read_config(path, kind):
    config = read_json(path)
    with blame(path):
        other = diffusers.name_other_vae(config) if kind == "vae" else None
        require(not other, f"it is a VAE for {other}: its latents are others")
        if difference := diffusers.find_difference(config, kind):
            name, value, expected = difference
            raise NotConvertible(f"its {name} is {short(value)}, expected {expected}")
    return config


def add_tensors(source, folder, kind):
    """Under names like "unet/conv_in.weight"."""
    found, names = diffusers.find_weights(folder, kind), " or ".join(diffusers.WEIGHTS[kind])
    with blame(folder):
        require(found, f"it has no weights: no {names}. Was the download complete?")
    for file in read_index(found) if found.suffix == ".json" else [found]:
        read = read_file(file)
        tensors = {f"{kind}/{name}": tensor for name, tensor in read.tensors.items()}
        twice = ", ".join(sorted(tensors.keys() & source.tensors.keys())[:3])
        with blame(file):
            require(not twice, f"it holds what another part of the model holds, too: {twice}")
        source.tensors |= tensors
        source.mentions |= read.mentions
        source.unreadable |= {f"{kind}/{name}": what for name, what in read.unreadable.items()}
        source.files |= read.files


def read_index(index):
    """-> the files of the shards that an index lists."""
    files = read_json(index).get("weight_map")
    files = list(files.values()) if type(files) is dict else [None]
    with blame(index):
        for name in files:  # a path in there could point anywhere
            plain = type(name) is str and re.fullmatch(r"[\w-][\w.-]*", name)
            require(plain, f"it names the file {short(name)}, expected plain names")
    return [index.parent / name for name in sorted(set(files))]


# %% 3. Which model is it? -------------------------------------------------------------------------
# Names tell. Each part of a model has a few places where it may be; a name that is always there
# shows which. The ORIGINAL names are CompVis' and OpenCLIP's, the DIFFUSERS names those of the
# libraries diffusers and transformers (whose text encoder SD 1.x had from the beginning).

ORIGINAL, DIFFUSERS, AVERAGED = range(3)  # averaged (EMA): the original's names without dots
PLACES = {  # kind of network: a tensor that it always has; where it may be, the likeliest first
    "unet": ("down.0.0.weight", (
        ("model.diffusion_model.", ORIGINAL), ("unet/", DIFFUSERS), ("unet.", DIFFUSERS),
        ("diffusion_model.", ORIGINAL), ("model_ema.diffusion_model", AVERAGED),
    )),
    "vae": ("decoder.16.conv1.weight", (
        ("first_stage_model.", ORIGINAL), ("vae/", DIFFUSERS), ("vae.", ORIGINAL),
        ("vae.", DIFFUSERS), ("", ORIGINAL), ("", DIFFUSERS),
    )),
    "controlnet": ("zero.0.weight", (
        ("control_model.", ORIGINAL), ("", ORIGINAL), ("controlnet/", DIFFUSERS), ("", DIFFUSERS),
    )),
    "text": ("token_embedding.weight", (
        ("cond_stage_model.transformer.text_model.", DIFFUSERS),
        ("cond_stage_model.transformer.", DIFFUSERS), ("cond_stage_model.model.", ORIGINAL),
        ("conditioner.embedders.0.model.", ORIGINAL), ("text_encoder/text_model.", DIFFUSERS),
        ("text_encoder/", DIFFUSERS), ("text_encoder.text_model.", DIFFUSERS),
        ("text_encoder.", DIFFUSERS), ("te.text_model.", DIFFUSERS),
        ("text_encoders.clip_l.transformer.text_model.", DIFFUSERS),
    )),
    "vision": ("position_embedding.weight", (  # of a safety checker; it moved once
        ("safety_checker/vision_model.vision_model.", DIFFUSERS),
        ("safety_checker/vision_model.", DIFFUSERS),
    )),
}  # fmt: skip


class Part(NamedTuple):
    kind: str  # a key of PLACES
    tensors: dict
    prefix: str
    layout: int

    def names(self, path):
        """What the source may call a tensor, the likeliest first. path: its name in sd.py."""
        layer, _, leaf = path.rpartition(".")
        name_layer = {"text": name_text_layer, "vision": name_text_layer, "vae": name_vae_layer}
        original, theirs = name_layer.get(self.kind, name_unet_layer)(layer)
        names = (theirs if self.layout == DIFFUSERS else original).split("|")
        if names != ["positional_embedding"]:
            # Nearly always name.weight or name.bias; but OpenCLIP has in_proj_weight.
            names = [name + leaf if name.endswith("_") else f"{name}.{leaf}" for name in names]
        averaged = self.layout == AVERAGED
        return [self.prefix + (name.replace(".", "") if averaged else name) for name in names]

    def find(self, path):
        """-> the name that it has in the source; None if it is not there."""
        return next((name for name in self.names(path) if name in self.tensors), None)

    def size(self, path, axis):
        """The length of one tensor along an axis, by which widths are read."""
        name = self.find(path)
        require(name, f"the tensor {short(self.names(path)[0])} is missing")
        shape = self.tensors[name].shape
        good = len(shape) > axis and shape[axis]
        require(good, f"the tensor {short(name)} has the shape {shape}")
        return shape[axis]

    def count_layers(self):
        """Of a CLIP model, by its names."""
        return next(k for k in itertools.count() if not self.find(f"layers.{k}.norm1.bias"))


def find_part(tensors, kind):
    mark, places = PLACES[kind]
    parts = (Part(kind, tensors, prefix, layout) for prefix, layout in places)
    return next((part for part in parts if part.find(mark)), None)


def find_parts(source, vae_source):
    """-> the three parts, or a sentence about what this is instead."""
    tensors, known = source.tensors, "Only Stable Diffusion 1.x and 2.x can be converted"
    unet, text, vae = (find_part(tensors, kind) for kind in ("unet", "text", "vae"))
    other = others.name_model(tensors)
    require(not other, f"it is {other}. {known}")
    if unet is None:
        other, few = others.name_part(tensors), ", ".join(map(short, list(tensors)[:3]))
        require(not other, f"it is {other}, and a whole model is needed")
        few = f"Of its {len(tensors)} tensors the first are: {few or 'none at all'}"
        for name, what in source.unreadable.items():
            few += f". {len(source.unreadable)} more can't be read here; {short(name)} is a {what}"
            break
        raise NotConvertible(f"it holds no Stable Diffusion. {few}")
    channels = unet.size("down.0.0.weight", 1)
    other = others.CHANNELS.get(channels, "an unknown model")
    other = f"{other} (a UNet of {channels} channels)"
    require(channels in (4, 9), f"it is {other}. {known}, and their inpainting models")
    require(text, "it has no text encoder. A whole model is needed, not a UNet alone")
    if vae_source is not None:
        vae = find_part(vae_source.tensors, "vae")
        require(vae, f"there is no VAE in {vae_source.path}; give another to --vae")
        with blame(vae_source.path):
            check_vae(vae_source, vae)
    require(vae, "it has no VAE. Give one with --vae FILE, any checkpoint's will do")
    lacks = "it is a distilled UNet, which lacks layers that all of Stable Diffusion's have"
    require(unet.find("middle.0.conv1.weight") or unet.find("down.2.0.conv1.weight"), lacks)
    return unet, text, vae


def check_vae(source, vae):
    """Is it for other latents? Shapes and names tell; a diffusers config was asked before."""
    other = others.name_model(source.tensors)
    require(not other, f"it is {other}: its VAE is for other latents")
    alone = find_part(source.tensors, "unet") is None
    names = [source.name, source.metadata.get("modelspec.architecture", "")] if alone else []
    other = others.name_vae(vae.size("decoder.0.weight", 1), names)
    require(not other, f"it is a VAE for {other}: its latents are others")


# %% 4. Names --------------------------------------------------------------------------------------
# What sd.py needs is what its classes hold: built without weights, which costs nothing, they say
# each tensor's name and shape. For SD 1.x that is 686 in the UNet, 248 in the VAE and 196 in the
# text encoder. Missing are the names in the source: a layer's name in sd.py -> the original's,
# diffusers'. They agree on more than shows. A | stands between spellings of the same.

RESIDUAL = {  # a residual block's layers in the original's UNet, in its VAE, and in diffusers
    "norm1": ("in_layers.0", "norm1", "norm1"),
    "conv1": ("in_layers.2", "conv1", "conv1"),
    "time": ("emb_layers.1", None, "time_emb_proj"),
    "norm2": ("out_layers.0", "norm2", "norm2"),
    "conv2": ("out_layers.3", "conv2", "conv2"),
    "shortcut": ("skip_connection", "nin_shortcut", "conv_shortcut"),
}
TRANSFORMER = {  # those layers of a transformer block that have another name in sd.py
    "attn1.to_out": "attn1.to_out.0", "attn2.to_out": "attn2.to_out.0",
    "ff_in": "ff.net.0.proj", "ff_out": "ff.net.2",
}  # fmt: skip
UNET = {
    "time1": ("time_embed.0", "time_embedding.linear_1"),
    "time2": ("time_embed.2", "time_embedding.linear_2"),
    "down.0.0": ("input_blocks.0.0", "conv_in"),
    "norm_out": ("out.0", "conv_norm_out"),
    "conv_out": ("out.2", "conv_out"),
    "zero.12": ("middle_block_out.0", "controlnet_mid_block"),  # and the rest of a ControlNet:
    **{f"zero.{i}": (f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}") for i in range(12)},
    **{
        f"picture.{i}": (f"input_hint_block.{2 * i}", f"controlnet_cond_embedding.{name}")
        for i, name in enumerate(("conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out"))
    },
}
VAE = {
    "encoder.0": ("encoder.conv_in", "encoder.conv_in"),
    "encoder_norm": ("encoder.norm_out", "encoder.conv_norm_out"),
    "encoder_out": ("encoder.conv_out", "encoder.conv_out"),
    "quant": ("quant_conv", "quant_conv"),
    "post_quant": ("post_quant_conv", "post_quant_conv"),
    "decoder.0": ("decoder.conv_in", "decoder.conv_in"),
    "decoder_norm": ("decoder.norm_out", "decoder.conv_norm_out"),
    "decoder_out": ("decoder.conv_out", "decoder.conv_out"),
}
VAE_ATTENTION = {  # renamed twice, and files in the old layout got the new names, too
    "norm": ("norm", "group_norm"),
    "attention.to_q": ("q", "to_q", "query"),
    "attention.to_k": ("k", "to_k", "key"),
    "attention.to_v": ("v", "to_v", "value"),
    "attention.to_out": ("proj_out", "to_out.0", "proj_attn"),
}
TEXT = {
    "token_embedding": ("token_embedding", "embeddings.token_embedding"),
    "position_embedding": ("positional_embedding", "embeddings.position_embedding"),
    "norm1": ("ln_1", "layer_norm1"),
    # OpenCLIP has one matrix, (3c, c), for all three.
    **{f"attention.to_{x}": ("attn.in_proj_", f"self_attn.{x}_proj") for x in "qkv"},
    "attention.to_out": ("attn.out_proj", "self_attn.out_proj"),
    "norm2": ("ln_2", "layer_norm2"),
    "fc1": ("mlp.c_fc", "mlp.fc1"),
    "fc2": ("mlp.c_proj", "mlp.fc2"),
    "norm": ("ln_final", "final_layer_norm"),
}


def name_unet_layer(layer):
    if layer in UNET:
        return UNET[layer]
    side, row, *inner = layer.split(".")
    if side == "middle":
        slot, old, new, k = row, f"middle_block.{row}", "mid_block", int(row) // 2
    else:
        slot, *inner = inner
        level, k = divmod(int(row) - (side == "down"), 3)
        old = f"{'input' if side == 'down' else 'output'}_blocks.{row}.{slot}"
        new = f"{side}_blocks.{level}"
    inner = ".".join(inner)
    if inner == "conv":
        return f"{old}.{'op' if side == 'down' else 'conv'}", f"{new}.{side}samplers.0.conv"
    if slot != "1":
        return f"{old}.{RESIDUAL[inner][0]}", f"{new}.resnets.{k}.{RESIDUAL[inner][2]}"
    if inner not in ("norm", "proj_in", "proj_out"):
        inner = f"transformer_blocks.0.{TRANSFORMER.get(inner, inner)}"
    return f"{old}.{inner}", f"{new}.attentions.{k}.{inner}"


def name_vae_layer(layer):
    if layer in VAE:
        return VAE[layer]
    side, row, inner = layer.split(".", 2)
    row, middle = int(row), 12 if side == "encoder" else 1
    if row == middle + 1:
        places = f"{side}.mid.attn_1.", f"{side}.mid_block.attentions.0."
        return ["|".join(place + name for name in VAE_ATTENTION[inner]) for place in places]
    if row in (middle, middle + 2):
        k = (row - middle) // 2
        old, new = f"{side}.mid.block_{k + 1}", f"{side}.mid_block.resnets.{k}"
    else:
        # The original counts the decoder's levels from the picture, diffusers from the latents.
        level, k = divmod(row - 1, 3) if side == "encoder" else divmod(row - 4, 4)
        way, theirs = ("down", level) if side == "encoder" else ("up", 3 - level)
        if inner == "conv":
            old, new = f"{side}.{way}.{theirs}.{way}sample", f"{way}_blocks.{level}.{way}samplers.0"
            return f"{old}.conv", f"{side}.{new}.conv"
        old, new = f"{side}.{way}.{theirs}.block.{k}", f"{side}.{way}_blocks.{level}.resnets.{k}"
    return f"{old}.{RESIDUAL[inner][1]}", f"{new}.{RESIDUAL[inner][2]}"


def name_text_layer(layer):
    if layer in TEXT:
        return TEXT[layer]
    _, k, inner = layer.split(".", 2)
    theirs = f"encoder.layers.{k}.{TEXT[inner][1]}"
    in_one = re.sub("[qkv]_proj$", "in_proj", theirs)  # stable-diffusion.cpp's name for OpenCLIP's
    return f"transformer.resblocks.{k}.{TEXT[inner][0]}", f"{theirs}|{in_one}"


class TensorSpec(NamedTuple):
    """A tensor that sd.py needs."""

    flat: str  # its name in the flat file
    shape: tuple  # as PyTorch has it: (out, in, kh, kw); a 1x1 convolution is (out, in)
    names: tuple = ()  # in the source, the likeliest first
    qkv_index: int | None = None  # in a tensor that holds q, k and v in one, if it is there
    factor: float = 1.0  # to multiply it by


class Found(NamedTuple):
    spec: TensorSpec
    name: str  # in the source
    tensor: Tensor


def make_specs(prefix, parameters, part):
    """-> a TensorSpec for each array in a tree of sd.py's parameters."""
    specs = []
    for path, parameter in tree_flatten(parameters):
        (out, *rest), names, index = parameter.shape, part.names(path), None
        shape = (out, *rest[2:], *rest[:2])  # (out, kh, kw, in) -> (out, in, kh, kw)
        if ".in_proj" in names[-1]:  # path is like layers.0.attention.to_q.weight
            index = ("to_q", "to_k", "to_v").index(path.split(".")[-2])
        specs.append(TensorSpec(f"{prefix}.{path}", shape, names, index))
    return specs


def match(specs, tensors, unreadable=()):
    """-> [Found], or one message about all tensors that are missing or not as expected."""
    found, missing, wrong = [], [], []
    for spec in specs:
        name = next((name for name in spec.names if name in tensors), None)
        if name is None:
            other = next((name for name in spec.names if name in unreadable), None)
            if other:
                wrong.append(f"{other} is a {unreadable[other]}, which can not be read here")
            else:
                missing.append(f"{spec.names[0]} is missing")
            continue
        tensor, shape = tensors[name], spec.shape
        if spec.qkv_index is not None and ".in_proj" in name:
            tensor = slice_qkv(tensor, spec.qkv_index)
        if tensor.dtype not in FLOATS:
            wrong.append(f"{name} is of type {tensor.dtype}, expected {', '.join(FLOATS)}")
        elif tensor.shape != shape and not (len(shape) == 2 and tensor.shape == (*shape, 1, 1)):
            wrong.append(f"{name} is {tensor.shape}, expected {shape}")
        found.append(Found(spec._replace(factor=read_factor(name, tensors)), name, tensor))
    first = "; ".join(short(line, 160) for line in missing[:3] + wrong[:3])
    counts = f"{len(missing)} of {len(specs)} tensors are missing, {len(wrong)} are not as expected"
    require(not missing + wrong, f"{counts}. First: {first}")
    return found


SCALES = ("scale_weight", "weight_scale")  # of weights in 8 bits, as ComfyUI writes them


def read_factor(name, tensors):
    """The number that all of a tensor is to be multiplied by; 1 where the file has none for it."""
    layer, _, leaf = name.rpartition(".")
    for scale in (f"{layer}.{scale}" for scale in SCALES):
        if leaf == "weight" and scale in tensors and tensors[name].dtype.startswith("F8"):
            shape, dtype = tensors[scale].shape, tensors[scale].dtype
            good = math.prod(shape) == 1 and dtype in FLOATS
            require(good, f"{scale} is {shape}, {dtype}, expected one number")
            return tensors[scale].float32().item()
    return 1.0


def slice_qkv(tensor, index):
    """q, k or v: rows 0 to c, c to 2c, 2c to 3c."""
    rows, rest = divmod(tensor.shape[0], 3) if tensor.shape else (0, 1)
    return tensor if rest else tensor.rows(index * rows, rows)  # else its shape won't be expected


# %% 5. Config -------------------------------------------------------------------------------------
# Widths and depths are read from shapes. How many heads share a width, and a few other numbers,
# leave no trace in any tensor. The published models follow a rule; a checkpoint may say otherwise
# under "sd_config", as our miniature's does, and a diffusers folder in its config files. The
# hardest of them is the prediction: SD 2.x exists as a model that predicts the noise (eps) and as
# one that predicts a mixture of noise and picture (v), equal in every name and shape.


OVERRIDES = {  # what a source may tell, by the part of the config, and of which type it is
    "name": (str,), "size": (int,), "cfg": (int, float), "prediction": (str,),
    "steps": (int,), "sampler": (str,), "spacing": (str,), "rescale": (int, float),
    "zero_snr": (bool,),
    "text": {"layers": (int,), "heads": (int,), "activation": (str,), "pad": (int,)},
    "unet": {"heads": (list,), "groups": (int,)},
    "vae": {"groups": (int,), "scale": (int, float)},
}  # fmt: skip


INSIDE = {"pad": "text", "scale": "vae"}  # those that stand deeper: where
NEW = ("steps", "sampler", "spacing", "rescale", "zero_snr")  # what the first version did not know


ORIGIN = (
    'Such numbers are the published models\' unless "sd_config" or a config.json says otherwise'
)


def override(config, told, told_by, known=OVERRIDES):
    """The config, with what the source tells in its place. Is it right? That is checked later."""
    good = type(told) is dict and told.keys() <= known.keys()
    there = short([*told] if type(told) is dict else type(told).__name__)
    require(good, f"{told_by} may only hold {', '.join(known)}, got {there}")
    out = dict(config)
    for key, value in told.items():
        if type(known[key]) is dict:
            value = override(config.get(key, {}), value, f"{key} in {told_by}", known[key])
        else:
            good, expected = type(value) in known[key], known[key][0].__name__
            require(good, f"{key} in {told_by} is a {type(value).__name__}, expected {expected}")
        out[key] = value
    return out


def make_config(unet, text, vae, source, vae_source):
    """-> config, with eps and 512 where nothing is told about these; is it SD 2.x; why"""
    widths, context = read_unet_sizes(unet)
    vocabulary, width = (text.size("token_embedding.weight", axis) for axis in (0, 1))
    require(width == context, f"its text encoder is {width} wide, its UNet expects {context}")
    told = override({}, source.overrides, source.told_by)
    if vae_source is not None:
        other = {"vae": vae_source.overrides.get("vae", {})}
        told = override(told, other, vae_source.told_by)
    layers = text.count_layers()
    if text.layout == ORIGINAL:
        layers = min(layers, 23)  # the last of OpenCLIP's 24 layers is not read
    layers = {768: 12, 1024: 23}.get(width, layers)  # so that a file that lost one is noticed
    gelu = width == 1024 or told.get("text", {}).get("activation") == "gelu"
    is_v2 = text.layout == ORIGINAL or gelu
    config = published_defaults(is_v2, widths, width, layers)
    config = override(config, told, source.told_by)
    config["text"] |= {"width": width, "vocabulary": vocabulary}
    config["unet"] |= {"widths": widths, "context_width": context}
    config["unet"] |= {"channels": 9} if unet.size("down.0.0.weight", 1) == 9 else {}
    config["vae"]["widths"] = read_vae_widths(vae)
    if vision := find_part(source.tensors, "vision"):
        config["safety"] = read_safety_sizes(vision)
    return config, is_v2, f"its text encoder is {'OpenCLIP' if is_v2 else 'CLIP'}'s, {width} wide"


def check_config(config):
    """-> sd.py's Config, which knows what makes a model."""
    try:
        model = sd.Config(**config)
        model.check()
        return model
    except ValueError as problem:  # an SDError, or a number too long to be printed
        raise NotConvertible(f"{short(problem, 200)} {ORIGIN}") from None


def read_safety_sizes(vision):
    width, layers = vision.size("position_embedding.weight", 1), vision.count_layers()
    weight, heads = vision.tensors.get("safety_checker/visual_projection.weight"), width // 64 or 1
    projection = weight.shape[0] if weight and weight.shape else 0
    return {"width": width, "layers": layers, "heads": heads, "projection": projection}


def read_vae_widths(part):
    return [part.size(f"encoder.{row}.conv1.weight", 0) for row in (1, 4, 7, 10)]


def read_unet_sizes(part):
    """-> the widths of a UNet's levels, or of the copy of them in a ControlNet; the context's"""
    widths = [part.size(f"down.{row}.0.conv1.weight", 0) for row in (1, 4, 7, 10)]
    return widths, part.size("down.1.1.attn2.to_k.weight", 1)


def published_defaults(is_v2, widths, text_width, layers):
    """The numbers of Stable Diffusion 1.x and 2.x as they were published."""
    heads = [width // 64 for width in widths] if is_v2 else [8] * 4
    text = {"activation": "gelu", "pad": 0} if is_v2 else {"activation": "quick_gelu", "pad": 49407}
    return {
        "kind": "model", "name": f"Stable Diffusion {'2.x' if is_v2 else '1.x'}", "size": 512,
        "prediction": "eps", "cfg": 7.5,
        "text": {"layers": layers, "heads": text_width // 64, **text},
        "unet": {"heads": heads, "groups": 32},
        "vae": {"groups": 32, "scale": 0.18215},
    }  # fmt: skip


def tell_facts(asked, source, is_v2=False):
    """Yield (what, value, who says so) of what a source says of itself, what counts most first."""
    for what, value in asked.items():
        if value is not None:
            yield what, value, f"--{what.replace('_', '-')} says so"
    yield from facts.tell_tensors(source.tensors)
    yield from facts.tell_header(source.metadata)
    for what in ("prediction", "size", "cfg", *NEW):
        if what in source.overrides:
            yield what, source.overrides[what], f"from {source.told_by}"
    for what, part in INSIDE.items():
        if what in source.overrides.get(part, {}):
            yield what, source.overrides[part][what], f"from {source.told_by}"
    for name, text in read_yaml(source.path):
        yield from facts.tell_yaml(name, text)
    if told := tokenizers.find_pad(source.tokenizer):
        pad, who = told
        if pad in tokenizers.PADS:
            yield "pad", tokenizers.PADS[pad], who
    yield from facts.tell_names([source.name, *source.names], is_v2)
    if any(layer + ".weight" in name for name in source.tensors for layer in guidance.LAYERS):
        for what, value in facts.FEW_STEPS.items():
            yield what, value, "it has learned guidance"


def read_yaml(path):
    """Yield the name and the text of the yaml beside a file, if there is one."""
    if yaml := neighbours.find(path).get("yaml"):
        with blame(yaml):
            yield yaml.name, read_small(yaml, 1 << 20).decode(errors="replace")


def warn_of_facts(source, told):
    """Yield a line for each thing that a source says of itself and that is not done."""
    yield from source.remarks
    usual = sd.Schedule(sd.scaled_linear(), "zero_snr" in told)
    yield from facts.warn_of_schedule(
        source.tensors, np.array([usual.abar(t) for t in range(1000)])
    )
    yield from facts.warn_of_header(source.metadata)
    for name, text in read_yaml(source.path):
        yield from facts.warn_of_yaml(name, text)
    pad, who = tokenizers.find_pad(source.tokenizer) or ("!", "")
    if pad not in tokenizers.PADS:
        yield f"warning: its pad_token is {short(pad)} ({who}), which is none of CLIP's own tokens"
    if "steps" not in told:
        yield from facts.warn_of_names([source.name, *source.names])


def find_facts(asked, source, is_v2, found):
    """-> {what: (value, who says so)}, the prediction always, the rest where it is not the usual"""
    told = {}
    for what, value, who in tell_facts(asked, source, is_v2):
        told.setdefault(what, (value, who))
    if "prediction" not in told:
        told["prediction"] = guess_prediction(is_v2, found)
    if told.get("zero_snr", (False,))[0]:
        prediction, who = told["prediction"]
        if prediction == "eps":
            not_used = "where nothing of x0 is left eps can't tell it"
            require(not asked.get("zero_snr"), f"it predicts eps ({who}), and {not_used}")
            told["prediction"] = prediction, f"{who}; zero terminal SNR is not used: {not_used}"
            del told["zero_snr"]
            return told
        for what, value in facts.WITH_ZERO_SNR.items():
            told.setdefault(what, (value, "as is usual with zero terminal SNR"))
    return told


def guess_prediction(is_v2, found):
    if not is_v2:
        return "eps", "every Stable Diffusion 1.x does"
    shapes = {spec.flat: spec.shape for spec, _, _ in found}
    if shapes.get("unet.down.0.0.weight", (0, 4))[1] == 9:
        return "eps", "every inpainting model of 2.x does"
    # ComfyUI's observation, which it does not explain, for want of anything better: in models
    # trained for v the norm before the last block's self-attention has larger biases.
    biases = next(f.tensor for f in found if f.spec.flat == "unet.up.11.1.norm1.bias")
    spread = float(np.std(biases.float32()))
    sign, prediction = (">", "v") if spread > 0.09 else ("<=", "eps")
    guess = (
        f"a guess: the last block's first norm has biases that deviate by {spread:.3f} {sign} 0.09"
    )
    return prediction, f"{guess}; if pictures are blots, convert again with the other --prediction"


def read_merges(source):
    own = tokenizers.find_merges(source.tokenizer) if source.merges == MERGES else None
    with blame(source.merges if own is None else source.path):
        text = read_small(source.merges, 1 << 22).decode(errors="replace") if own is None else own
        return tokenizers.read_merges(text)


# %% 6. Writing ------------------------------------------------------------------------------------
# A safetensors file by hand: all sizes are known beforehand, so the header comes first and the
# tensors follow one by one, each forgotten before the next is read. sd.write_complete gives the
# file another name until it is complete.


def write(file, found, dtype, merges, metadata):
    flat = lambda shape: (shape[0], *shape[2:], *shape[1:2])  # (out, kh, kw, in)
    entries = [(spec.flat, CODES[dtype], flat(spec.shape)) for spec, _, _ in found]
    entries += [("tokenizer.merges", "U8", (len(merges),))] if merges else []
    file.write(make_header(entries, metadata))
    broken = []  # of the VAE's encoder, without which a model can still paint
    file.writelines(make_array(spec, tensor, dtype, broken) for spec, _, tensor in found)
    file.write(merges)


def lay_out(spec, tensor):
    """-> the array as the source has it, in float32, with channels last"""
    with np.errstate(all="ignore"):  # what is not finite is found when it is cast
        array = tensor.float32().reshape(spec.shape) * np.float32(spec.factor)
    if array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    # Not a formality: transpose() only renames the axes, and the bytes are what is written.
    return np.ascontiguousarray(array)


def make_array(spec, tensor, dtype, may_be_broken):
    array = lay_out(spec, tensor)
    result = cast(array, dtype)
    bits = result & 0x7F80 if dtype == "bfloat16" else None  # all of the exponent's are set
    good = np.isfinite(result).all() if bits is None else (bits != 0x7F80).all()
    broken = not good and not np.isfinite(array).all()
    if broken and spec.flat.startswith(("vae.encoder", "vae.quant.")):
        sd.say_once(f"{spec.flat} holds infinities or NaNs: pictures can't be started from.")
        may_be_broken.append(spec)
        return result
    if may_be_broken and spec.flat == "vae.quant.bias":  # its last, and added, so all becomes NaN:
        return np.full_like(result, 0x7FC0 if dtype == "bfloat16" else np.nan)  # 16 bits may not
    require(not broken, f"{spec.flat} holds infinities or NaNs; its weights are broken")
    other = f"numbers too large for {dtype}: take --dtype bfloat16 or float32"
    require(good, f"{spec.flat} has {other}")
    return result


# %% 7. Plans --------------------------------------------------------------------------------------
# What a source will become: one function for each kind, tried in order. LoRAs, ControlNets and
# textual inversions become flat files of their own.


@dataclass
class Plan:
    kind: str  # in words
    config: dict
    found: list
    notes: str = ""  # more about it, for the header
    report: list = field(default_factory=list)  # more about it, for the console
    merges: bytes = b""
    format: str = sd.FORMAT


def make_plan(source, vae_source, asked):
    with blame(source.path):
        for make in (plan_tiny_vae, plan_vae, plan_controlnet, plan_lora, plan_textual_inversion):
            if plan := make(source):
                whole = not vae_source and not any(asked.values())
                few = "--vae, --prediction, --zero-snr"
                require(whole, f"it is no whole model, and {few} are for those")
                plan.report += [*source.remarks, *report_unreadable(source)]
                return plan
        return plan_model(source, vae_source, asked)


def plan_model(source, vae_source, asked):
    unet, text, vae = find_parts(source, vae_source)
    config, is_v2, why = make_config(unet, text, vae, source, vae_source)
    networks = sd.build_networks(check_config(config))
    networks = {name: network.parameters() for name, network in networks.items()}
    odd = source.unreadable
    found = match(make_specs("unet", networks["unet"], unet), unet.tensors, odd)
    found += match(make_specs("text_encoder", networks["text_encoder"], text), text.tensors, odd)
    found = fold_guidance(found, unet)
    if vision := find_part(source.tensors, "vision"):
        found += match(make_safety_specs(vision, **config["safety"]), vision.tensors)
    with blame((vae_source or source).path):
        odd = (vae_source or source).unreadable
        found += match(make_specs("vae", networks["vae"], vae), vae.tensors, odd)
    told = find_facts(asked, source, is_v2, found)
    if vae_source and "scale" in (numbers := vae_source.overrides.get("vae", {})):
        told["scale"] = numbers["scale"], f"from {vae_source.told_by}"
    prediction, reason = told.pop("prediction")
    if is_v2 and prediction == "v":
        told.setdefault("size", (768, "as 2.x has it with v"))
    config["prediction"] = prediction
    told = add_facts(config, told, is_v2)
    rows = config["text"]["vocabulary"]
    if words := tokenizers.find_words(source.tokenizer, rows):
        config["words"] = words
    check_config(config)
    name = short(config["name"])
    report = [f"it predicts {prediction} ({reason})", *report_oddities(source)]
    report += warn_of_facts(source, told)
    report += [f"{what} {value} ({who})" for what, (value, who) in told.items()]
    report += [f"it knows {len(words)} more words: {', '.join(map(short, words))}"] if words else []
    if (nameless := rows - sd.END - 1 - len(words)) > 0:
        report += [f"warning: it knows {nameless} more words, but nothing here says which"]
    other = neighbours.find_vae(source.path) if not (vae_source or source.path.is_dir()) else None
    report += [f"there is {other.name} beside it: --vae takes that VAE"] if other else []
    report += report_unused(source, found, unet, vae_source)
    notes = f"{name}: {why}. {prediction}: {reason}."
    merges = read_merges(source)
    plan = Plan(f"{name}, because {why}", config, found, notes, report, merges)
    plan.format = sd.FORMATS[bool(config.keys() & {*NEW, "words"})]
    return plan


def add_facts(config, told, is_v2):
    """Put facts into the config. -> those that are to be reported: not the usual pad and scale"""
    usual = {"pad": 0 if is_v2 else sd.END, "scale": facts.SCALE}
    for what, (value, _) in told.items():
        (config[INSIDE[what]] if what in INSIDE else config)[what] = value
    return {
        what: fact for what, fact in told.items() if what not in usual or usual[what] != fact[0]
    }


def fold_guidance(found, unet):
    """The tensors of a UNet, made into those of an ordinary one where it has learned guidance."""
    name = f"{unet.prefix}{guidance.LAYERS[unet.layout == DIFFUSERS]}.weight"
    guide = unet.tensors.get(name)
    if guide is None:
        return found
    each = {one.spec.flat: one for one in found}
    bias, time1 = (each[f"unet.time1.{leaf}"] for leaf in ("bias", "weight"))
    good = len(guide.shape) == 2 and guide.shape[0] == time1.spec.shape[1] and guide.shape[1] > 1
    require(good and guide.dtype in FLOATS, f"{name} is {guide.shape}, of type {guide.dtype}")
    parts = {"bias": bias.tensor, "time1": time1.tensor, "guide": guide}
    computed = Computed(bias.tensor.path, guidance.usual_bias, parts)
    each[bias.spec.flat] = bias._replace(tensor=computed)
    return [*each.values(), Found(TensorSpec(guidance.NAME, guide.shape), name, guide)]


def make_safety_specs(vision, width, layers, heads, projection):
    inside, whole = vision.prefix, "safety_checker/"
    table = (  # name in sd.py, shape, name in the source
        ("patch", (width, 3, 14, 14), inside, "embeddings.patch_embedding.weight"),
        ("first", (width,), inside, "embeddings.class_embedding"),
        ("position_embedding.weight", (257, width), inside, "embeddings.position_embedding.weight"),
        ("norm_in.weight", (width,), inside, "pre_layrnorm.weight"),
        ("norm_in.bias", (width,), inside, "pre_layrnorm.bias"),
        ("norm.weight", (width,), inside, "post_layernorm.weight"),
        ("norm.bias", (width,), inside, "post_layernorm.bias"),
        ("projection.weight", (projection, width), whole, "visual_projection.weight"),
        ("concepts", (17, projection), whole, "concept_embeds"),
        ("thresholds", (17,), whole, "concept_embeds_weights"),
        ("special", (3, projection), whole, "special_care_embeds"),
        ("special_thresholds", (3,), whole, "special_care_embeds_weights"),
    )
    specs = [TensorSpec(f"safety.{ours}", s, (place + name,)) for ours, s, place, name in table]
    layer = sd.TextLayer(width, heads, "quick_gelu").parameters()
    return specs + make_specs("safety", {"layers": [layer] * layers}, vision)


def plan_tiny_vae(source):
    if not source.tensors.keys() & set(taesd.FIRST) or find_part(source.tensors, "unet"):
        return None
    other = taesd.OTHERS.search(source.name)
    require(not other, f"it is a small VAE for {short(other and other[0])}, by its name")
    first = next(source.tensors[name] for name in taesd.FIRST if name in source.tensors)
    channels = first.shape[0] if first.shape else 0
    require(sd.divides(1, channels), f"it is a small VAE of {channels} channels")
    specs = []
    for ours, names, size, has_bias in taesd.layers(channels):
        for leaf, shape in (("weight", (*size, 3, 3)), ("bias", size[:1]))[: 1 + has_bias]:
            named = tuple(f"{name}.{leaf}" for name in names)
            specs.append(TensorSpec(f"vae.{ours}.{leaf}", shape, named))
    found = match(specs, source.tensors, source.unreadable)
    there = {spec.flat for spec in specs}
    for spec, name, tensor in list(found):  # sd.py's convolutions all have biases
        bias = spec.flat.replace(".weight", ".bias")
        if bias not in there:
            zeros = Computed(tensor.path, taesd.zero_bias, {"weight": tensor})
            found.append(Found(TensorSpec(bias, spec.shape[:1]), name, zeros))
    config = {"kind": "tiny vae", "channels": channels}
    return Plan("a small VAE (TAESD)", config, found, format=sd.FORMATS[1])


def plan_vae(source):
    """A VAE alone."""
    vae = find_part(source.tensors, "vae")
    if not vae or any(find_part(source.tensors, kind) for kind in ("unet", "text")):
        return None
    check_vae(source, vae)
    config = published_defaults(False, [64] * 4, 64, 1) | {"text": {}, "unet": {}}
    config = override(config, source.overrides, source.told_by)["vae"]
    scales = ((value, who) for what, value, who in tell_facts({}, source) if what == "scale")
    config["scale"], who = next(scales, (facts.SCALE, ""))
    config["widths"] = read_vae_widths(vae)
    numbers = {"groups": config["groups"], "scale": config["scale"]}
    good = len(config["widths"]) == 4 and sd.divides(config["groups"], *config["widths"])
    require(
        good and 0 < config["scale"] < 1e6, f"no VAE has the numbers {short(numbers)}. {ORIGIN}"
    )
    network = sd.VAE(config["widths"], config["groups"]).parameters()
    found = match(make_specs("vae", network, vae), vae.tensors, source.unreadable)
    unusual = config["scale"] != facts.SCALE
    report = [f"scale {config['scale']} ({who})"] if unusual else []
    config = {"kind": "vae", "vae": config}
    return Plan("a VAE", config, found, report=report, format=sd.FORMATS[1])


def plan_controlnet(source):
    part = find_part(source.tensors, "controlnet")
    if part is None:
        return None
    try:
        widths, context = read_unet_sizes(part)
        is_v2 = context == 1024
        defaults, told = published_defaults(is_v2, widths, context, layers=None), source.overrides
        numbers = override(defaults, {"unet": told.get("unet", {})}, source.told_by)["unet"]
        numbers |= {"widths": widths, "context_width": context}
        there = f"no UNet has the numbers {short(numbers, 200)}. {ORIGIN}"
        require(sd.unet_is_whole(numbers), there)
        network = sd.ControlNetwork(**numbers).parameters()
        found = match(make_specs("controlnet", network, part), part.tensors, source.unreadable)
    except NotConvertible as problem:
        raise NotConvertible(f"it is a ControlNet, but {problem}") from None
    # Some, for the mood of a picture, correct all positions alike. The tensors do not say which;
    # other programs, too, go by the file's name.
    pool = bool(source.overrides.get("pool", "shuffle" in source.name.lower()))
    config = {"kind": "controlnet", "unet": numbers, "pool": pool}
    who = source.told_by if "pool" in source.overrides else "by its name"
    report = [f"it corrects all positions alike ({who})"] if pool else []
    return Plan(f"a ControlNet for {'2.x' if is_v2 else '1.x'}", config, found, report=report)


def plan_textual_inversion(source):
    """Vectors for new words, which are the tensors' names; or the file's, if these say nothing."""
    names = [*source.tensors]
    keyed = any(embeddings.KEYED.match(name) for name in names)
    small = all(len(t.shape) in (1, 2) and t.shape[-1] < 2048 for t in source.tensors.values())
    plain = small and all(map(embeddings.PLAIN.fullmatch, names))
    if not names or others.name_part(names) or not keyed and not plain:
        return None
    words, found = embeddings.find_words(names, source.path.stem), []
    for word, (name, tensor) in zip(words, source.tensors.items(), strict=True):
        good = word.strip() == word != "" and word.isprintable() and len(word) <= 100
        require(good, "it is a textual inversion, but its word is none: rename the file")
        shape = (1,) * (2 - len(tensor.shape)) + tensor.shape
        good = len(shape) == 2 and tensor.dtype in FLOATS and 0 < shape[0] <= 75
        there = f"{short(name)} is {tensor.shape}, of type {tensor.dtype}"
        require(good, f"it is a textual inversion, but {there}, expected 1 to 75 vectors")
        found.append(Found(TensorSpec(word, shape), name, tensor))
    each = [f"{short(spec.flat)}, {spec.shape[0]} vectors" for spec, _, _ in found]
    kind = f"a textual inversion: {'; '.join(each[:5])}"
    kind += f"; and {len(each) - 5} more words" if len(each) > 5 else ""
    return Plan(kind, {"kind": "words"}, found)  # a name that the first version's files have


def plan_lora(source):
    """What belongs to layers that there are, if that is half of it or more."""
    if not lora.is_lora(source.tensors) or find_part(source.tensors, "unet"):
        return None
    layers, rest = lora.group(source.tensors)
    empty = lora.drop_empty(layers)
    scales, known = lora.read_peft_scales(read_peft_config(source)), name_lora_layers()
    for layer, names in layers.items():
        there = {"diff_b": "bias", "up_bias": "bias"}  # and all other parts need a weight
        strange = [part for part in names if there.get(part, "weight") not in known.get(layer, ())]
        rest += [names.pop(part) for part in strange]
    layers = {layer: names for layer, names in sorted(layers.items()) if names}
    bundled = collections.Counter(filter(None, map(lora.name_bundled, rest)))
    unknown = sorted(name for name in rest if not lora.name_bundled(name))
    few = ", ".join(short(name) for name in unknown[:3])
    count = f"{len(unknown)} of its names belong to no layer of Stable Diffusion 1.x or 2.x"
    other = "it is a LoRA for another model, or one of a kind not known here"
    used = sum(map(len, layers.values()))
    require(used and used >= len(unknown), f"{other}: {count}. First: {few}")
    found = [
        piece
        for layer, names in layers.items()
        for piece in match_lora_layer(known[layer], names, source.tensors, scales)
    ]
    size = sum(math.prod(each.spec.shape) for each in found)
    require(size <= 1.5e9, f"it is a LoRA of {size} numbers, more than a whole model has")
    text = sum("text_encoder." in str(known[layer]) for layer in layers)
    forms = ", ".join(lora.name_forms({part for names in layers.values() for part in names}))
    kind = f"a LoRA{forms and f' ({forms})'} for {len(layers)} layers"
    report = [f"warning: {n} tensors were left out ({what})" for what, n in bundled.items()]
    if empty:
        few = ", ".join(map(short, sorted(empty)[:5]))
        report += [
            f"warning: {len(empty)} tensors, for layers with no change, were left out: {few}"
        ]
    if unknown:
        few = ", ".join(map(short, unknown[:5]))
        report += [f"warning: {len(unknown)} tensors are unknown and were left out: {few}"]
    report = [f"{used} tensors used", *report] if report else []
    plain = all(each.spec.flat.rpartition(".")[2] in lora.LORA for each in found)
    plan = Plan(f"{kind}, {text} of them the text encoder's", {"kind": "lora"}, found)
    plan.report, plan.format = report, sd.FORMATS[0 if plain else 1]
    return plan


def read_peft_config(source):
    """What PEFT tells beside the weights, or among them; {} where it tells nothing."""
    text = source.metadata.get("lora_adapter_metadata", "")
    named = source.path.name.startswith("adapter_model") or lora.is_peft(source.tensors)
    if not text and named and (file := neighbours.find(source.path).get("adapter")):
        source.remarks.append(f"alpha and rank are what {file.name} beside it says")
        return read_json(file)
    try:
        config = json.loads(text or "{}")
    except (ValueError, RecursionError):
        config = None
    require(type(config) is dict, "its lora_adapter_metadata is not a JSON object")
    return config


def name_lora_layers():
    """-> {a layer's name in a LoRA, in either layout: {"weight" and "bias", if any: TensorSpec}}"""
    # Widths that all differ, so that every residual block has its shortcut.
    unet = sd.UNet([8, 16, 24, 32], [1] * 4, 8, 8).parameters()
    text = sd.TextEncoder(8, 23, 1, "gelu", 8).parameters()
    specs = make_specs("unet", unet, Part("unet", {}, "", ORIGINAL))
    specs += make_specs("unet", unet, Part("unet", {}, "", DIFFUSERS))
    specs += make_specs("text_encoder", text, Part("text", {}, "", DIFFUSERS))
    layers = {}
    for spec in specs:
        layer, _, leaf = spec.names[0].rpartition(".")
        layers.setdefault(lora.normalize(layer), {})[leaf] = spec
    return layers


def match_lora_layer(specs, names, tensors, scales):
    """-> [Found]. specs: of the layer's weight and bias in some model; names: {part: name}"""
    flat = specs["weight"].flat.removesuffix(".weight")
    network = flat.split(".")[0]
    told = scales.get(network, scales.get(""))
    first = next(iter(names.values()))
    scale = lambda rank: told.of(lora.split(first)[0], rank) if told else 1.0
    parts = {part: tensors[name] for part, name in names.items()}
    try:
        pieces = lora.read_layer(parts, specs["weight"].shape, scale)
    except NotConvertible as problem:
        raise NotConvertible(f"the LoRA's layer {flat} has {problem}") from None
    return [
        Found(TensorSpec(f"{flat}.{part}", shape, factor=factor), first, tensor)
        for part, shape, tensor, factor in pieces
    ]


# %% 8. Convert ------------------------------------------------------------------------------------
# Read, plan, report, write. Every tensor of a whole model is used, or known not to be needed, or
# named as unknown. An unknown one is no error, but whoever trained something new into a model
# should hear that it was left behind.


def tell(line):
    sd.say(line, sys.stdout)


def convert(
    source, output=None, *, dtype="float16", prediction=None, vae=None, safety=None, zero_snr=None,
    verify=False, bits=None, min_psnr=FLOOR, check=False, log=tell, made_from="",
):  # fmt: skip
    """Write the flat file, by default beside the source, and return its path.

    vae, safety: a file or folder to take these from. zero_snr: True, if its training went down to
    noise alone. verify: first compare the checksums in a .ckpt with its bytes. bits: 2, 4, 6 or 8,
    or "auto" with min_psnr, see sd_more/palettes.py; the source may be a flat file then. check:
    compare networks with the source's. log: is called with each line of the report. made_from: put
    into the header, for flat_file to recognise what it had converted by itself. Raises
    ConversionError, and then there is no output, and an older one is as it was.
    """
    if dtype not in sd.DTYPES:
        raise ConversionError(f"dtype must be {', '.join(sd.DTYPES)}, got {dtype}.")
    if prediction not in (None, "eps", "v"):
        raise ConversionError(f"prediction must be eps or v, got {prediction}.")
    size = make_size(bits, min_psnr, check)
    source, vae = Path(source), vae and Path(vae)
    asked = {"prediction": prediction, "zero_snr": zero_snr or None}
    with what_was_not_done(source, output):
        source = fetch(source, log)
        place = Path(os.path.abspath(source)) if source.is_dir() else source  # "." has no name
        home = Path() if hub.whence(place) else place.parent  # not into the hub's cache
        output = Path(output or home / name_output(place, size.bits))
        check_output(output)
        if size.bits and sd.read_header(source).get("format", "").startswith("sd.py"):
            check_overwriting(output, source, [])
            with blame(source):
                more = vae or safety or verify or any(asked.values())
                require(not more, "it is flat already, and then only --bits and --check count")
                return pack_flat(source, output, size, log)
        plan, sources = read_plan(source, vae, safety and Path(safety), asked, verify, log)
        check_overwriting(output, source, plan.found)
        if made_from:
            name = hub.whence(source) or source.name
            log(f"{name} is not a flat file. Converting it once, to {output}")
        for line in (f"{source}: {plan.kind}", *plan.report):
            log(sd.printable(line))
        metadata = make_metadata(source, sources, plan)
        metadata |= {"made_from": made_from} if made_from else {}
        with blame(source):
            parts = plan.found, dtype, plan.merges, metadata
            clear_stale(output.parent)
            original = find_original(plan, sources) if check else None
            write_sized(output, lambda file: write(file, *parts), size, original, log)
    count = len(plan.found) + bool(plan.merges)
    log(f"{output}: {count} tensors, {dtype}, {output.stat().st_size / 1e6:.0f} MB")
    return output


@contextlib.contextmanager
def what_was_not_done(source, output=None):
    try:
        yield
    except hub.HubError as error:
        raise ConversionError(short(error, 500)) from None
    except OSError as error:
        where, what = error.filename or output or source, error.strerror or error
        raise ConversionError(f"{where}: {what}. Nothing was written.") from None
    except RecursionError:
        raise ConversionError(f"{source} holds data that is nested far too deep.") from None


def fetch(source, log):
    """-> source, or where it is a name on the hub what that names, a folder or a file."""
    if not hub.parse(str(source)) or Path(source.parts[0]).is_dir():
        return source
    weights = {part: diffusers.WEIGHTS[part] for part in (*MODEL, "safety_checker")}
    return hub.fetch(str(source), weights, log)


def read_plan(path, vae_path, safety_path, asked, verify, log):
    """-> what the source will become; the source, and where there is another for the VAE that"""
    sources = [read_source(path, vae_path)]
    if safety_path:
        inside = safety_path / "safety_checker"
        add_tensors(sources[0], inside if inside.is_dir() else safety_path, "safety_checker")
    sources += [read_vae_source(vae_path)] if vae_path else []
    for file in sorted(set.union(*(source.files for source in sources))) if verify else ():
        with blame(file):
            log(f"{file}: {verify_file(file)}")
    return make_plan(sources[0], sources[1] if vae_path else None, asked), sources


def verify_file(path):
    """-> what the checksums inside say; NotConvertible if they are not those of the bytes"""
    if not zipfile.is_zipfile(path):
        return "it has no checksums inside; its sizes add up"
    right, none = check_sums(path)
    return f"{right} checksums are right" + (f", {none} parts have none" if none else "")


def make_metadata(path, sources, plan):
    inside = lambda file: file != path and file.is_relative_to(path)
    name = lambda file: str(file.relative_to(path)) if inside(file) else file.name
    sums = {name(file): hash_file(file) for source in sources for file in source.files}
    metadata = {
        "format": plan.format, "config": json.dumps(plan.config),
        "source": hub.whence(path) or neighbours.full_name(path), "notes": plan.notes or plan.kind,
        "sha256": json.dumps(sums, sort_keys=True),
    }  # fmt: skip
    return {name: text.encode("utf-8", "replace").decode() for name, text in metadata.items()}


def hash_file(path):
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_output(path, bits=None):
    name = "-".join(hub.whence(path).split("/")[1:]) or neighbours.title(path)
    name = name if path.is_dir() else Path(name).stem.removesuffix(".flat")
    return f"{name}{f'-{bits}bit' if bits else ''}.flat.safetensors"


def find_original(plan, sources):
    arrays = {spec.flat: functools.partial(lay_out, spec, tensor) for spec, _, tensor in plan.found}
    parts = {}
    for kind in ("unet", "text", "vae", "controlnet"):
        tensors = sources[-1 if kind == "vae" else 0].tensors
        part = find_part(tensors, kind)
        if part and part.layout != AVERAGED:
            n, name = len(part.prefix), "text_encoder" if kind == "text" else kind
            bare = {key[n:]: each for key, each in tensors.items() if key.startswith(part.prefix)}
            parts[name] = bare, part.layout == ORIGINAL
    return Original(arrays, parts)


def check_output(output):
    if output.is_dir() or not output.parent.is_dir():
        what = "is a folder" if output.is_dir() else "is in a folder that does not exist"
        raise ConversionError(f"{output} {what}. Give -o the name of a file to write.")


def clear_stale(folder):
    """Remove what processes that were killed left half written; what others write is locked."""
    for part in folder.glob(f".*{sd.PART}"):
        with contextlib.suppress(OSError, NotConvertible), open_file(part) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - part.stat().st_mtime > 10:  # it may be just about to be locked
                part.unlink()


def check_overwriting(output, path, found):
    used = {path, *(tensor.path for _, _, tensor in found)}
    if output.exists() and any(os.path.samefile(output, one) for one in used):
        raise ConversionError(f"{output} is what is being converted. Give -o another name.")
    if output.exists() and not sd.read_header(output).get("format", "").startswith("sd.py"):
        raise ConversionError(f"{output} exists and is not a flat file. Give -o another name.")


def report_oddities(source):
    if source.mentions:
        few = ", ".join(short(name) for name in sorted(source.mentions)[:5])
        more = f" and {len(source.mentions) - 5} more" if len(source.mentions) > 5 else ""
        yield f"this file mentions {few}{more}, which was not loaded"
    yield from report_unreadable(source)


def report_unreadable(source):
    """Tensors that are not needed: without one that is, there is no plan."""
    needed = lambda name: not any(re.match(mark, name) for _, mark in others.NOT_NEEDED)
    if odd := sorted(filter(needed, source.unreadable)):
        few = ", ".join(f"{short(name)} ({source.unreadable[name]})" for name in odd[:5])
        yield f"warning: {len(odd)} tensors can not be read here and were left out: {few}"


def report_unused(source, found, unet, vae_source):
    """What became of each tensor of the source."""
    replaced = ("the VAE that --vae replaces", r"first_stage_model\.|vae\.")
    not_needed = (*others.NOT_NEEDED, replaced) if vae_source else others.NOT_NEEDED
    used = {name for spec, name, _ in found if not (vae_source and spec.flat.startswith("vae."))}
    reason = lambda name: next((what for what, mark in not_needed if re.match(mark, name)), None)
    reasons = {name: reason(name) for name in source.tensors.keys() - used}
    unknown = sorted(name for name, what in reasons.items() if what is None)
    kinds = collections.Counter(what for what in reasons.values() if what)
    parts = [f"{len(source.tensors.keys() & used)} tensors used"]
    parts += [f"{count} not needed ({kind})" for kind, count in sorted(kinds.items())]
    yield ", ".join(parts)
    if unet.layout == AVERAGED:
        yield "the UNet's weights are the averaged ones (EMA): there are no others"
    elif any(name.startswith("model_ema.diffusion_model") for name in source.tensors):
        yield (
            "the UNet's weights are the raw ones, as the original loads them (use_ema: False); "
            "the averaged copies (EMA) were left out"
        )
    if unknown:
        few = ", ".join(map(short, unknown[:5]))
        yield f"warning: {len(unknown)} tensors are unknown and were left out: {few}"


# %% 9. Command line -------------------------------------------------------------------------------


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "sd.py"


def kept_files():
    """Yield the files in the cache folder that were converted at first use, and their headers."""
    for path in sorted(cache_folder().glob("*.flat.safetensors")):
        if "made_from" in (header := sd.read_header(path)):
            yield path, header


def fingerprint(path):
    """-> what changes when one of the files of path does: of their names, sizes and times"""
    files = [f for f in neighbours.find_files(path) if not f.name.endswith(".flat.safetensors")]
    told = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(told).encode(errors="surrogateescape")).hexdigest()


def flat_file(path, log, folder=None):
    """What sd.py reads in place of path, or of a name on the hub: made from it before, or now.

    It is kept in the folder, by default beside the source, or in the cache folder where that is not
    writable or the name is taken, or what it is made from lies in the hub's cache. It says in its
    header from which files it was made, with their sizes and times, and is used again only for
    these.
    """
    with what_was_not_done(path):
        path = fetch(Path(path), log)
    path = Path(os.path.abspath(path))  # a link keeps its own name, and what lies beside it
    if path.is_dir() and not neighbours.is_folder(path):
        raise ConversionError(f"{path} is a folder, but not one of a model.")
    made_from, source = fingerprint(path), hub.whence(path)
    name, cache = name_output(path), cache_folder()
    cached = cache / f"{made_from[:12]}-{name}"
    home = cached if source and not folder else (folder or path.parent) / name
    if home != cached and not home.parent.is_dir():
        raise ConversionError(f"there is no folder {home.parent} to keep it in. Make it first.")
    clear_stale(home.parent)
    clear_stale(cache)
    for place in (home, cached):
        if sd.read_header(place).get("made_from") == made_from:
            log(f"using {place}, made from {source or path.name} before")
            return place
    # Only what was made in this way before may be replaced; repositories may share a name.
    old = sd.read_header(home)
    if folder and old.get("made_from", made_from) != made_from:  # of a file of this name elsewhere
        home = home.with_name(cached.name)
    free = "made_from" in old and source in ("", old.get("source")) or not os.path.lexists(home)
    place = home if free and os.access(home.parent, os.W_OK) else cached
    if place == cached:
        cache.mkdir(parents=True, exist_ok=True)
    return convert(path, place, log=log, made_from=made_from)


def describe(path, vae=None, safety=None, prediction=None, zero_snr=None, verify=False):
    """Yield lines that say what a file or a folder is, without converting it."""
    path = Path(path)
    metadata = sd.read_header(path)
    if metadata.get("format", "").startswith("sd.py"):
        yield from describe_flat(path, metadata)
        return
    lines = []
    with what_was_not_done(path):
        asked = {"prediction": prediction, "zero_snr": zero_snr or None}
        others = vae and Path(vae), safety and Path(safety)
        plan, sources = read_plan(path, *others, asked, verify, lines.append)
        yield from (*lines, f"{path}: {plan.kind}", *plan.report)
        yield f"config: {json.dumps(plan.config)}"
        for name, digest in json.loads(make_metadata(path, sources, plan)["sha256"]).items():
            yield f"sha256 {digest}  {name}"


def describe_flat(path, metadata):
    kinds = "model", "lora", "words", "controlnet", "vae", "tiny vae"
    kind = next((k for k in kinds if f'"kind": "{k}"' in metadata.get("config", "")), "model")
    _, weights = sd.read_flat(path, kind)
    dtype = lambda w: getattr(w, "told", str(w.dtype)).removeprefix("mlx.core.")
    types = collections.Counter(map(dtype, weights.values()))
    yield f"{path}: a flat file ({metadata['format']}): {metadata.get('notes', kind)}"
    yield ", ".join(f"{count} tensors {name}" for name, count in sorted(types.items()))
    yield f"config: {metadata['config']}"
    yield f"made from {metadata.get('source', 'a file that it does not name')}"
    for name, digest in read_sums(metadata).items():
        yield f"sha256 {digest}  {name}"


def read_sums(metadata):
    """-> {file: sha256} of what a flat file was made from; {} where it does not say"""
    try:
        sums = json.loads(metadata.get("sha256", "{}"))
    except (ValueError, RecursionError):
        sums = {}
    return sums if type(sums) is dict else {}


def make_parser():
    what = "Turn a Stable Diffusion 1.x or 2.x checkpoint, or a LoRA, a ControlNet or a textual "
    p = argparse.ArgumentParser(description=what + "inversion for one, into the file sd.py reads.")
    forms = "a .ckpt, .safetensors, .gguf or diffusers folder, or org/name on the Hugging Face hub"
    p.add_argument("source", metavar="SOURCE", nargs="?", help=forms)
    out = "the file to write (default: SOURCE's name with .flat.safetensors, beside it)"
    p.add_argument("-o", "--output", metavar="OUT", help=out)
    kept = "how exactly to keep the numbers (default: float16, as most models are shared)"
    p.add_argument("--dtype", choices=sd.DTYPES, default="float16", help=kept)
    says = "what the UNet predicts, the noise or v (default: looked up or guessed, and printed)"
    p.add_argument("--prediction", choices=("eps", "v"), help=says)
    p.add_argument("--vae", metavar="FILE", help="take the VAE from this checkpoint or folder")
    from_folder = "take the safety checker from this diffusers folder"
    p.add_argument("--safety", metavar="FOLDER", help=from_folder)
    p.add_argument("--zero-snr", action="store_true", help="trained down to noise alone (with v)")
    sums = "first compare the checksums inside a .ckpt with its bytes, which reading it does not"
    p.add_argument("--verify", action="store_true", help=sums)
    sized = (
        "pack the large matrices into 2, 4, 6 or 8 bits a weight, see README; a flat file may be"
    )
    p.add_argument("--bits", metavar="N", help=f"{sized} packed, too; auto: see --min-psnr")
    keeps = "with --bits auto, what each network's answer keeps, in dB (default: %(default)g)"
    p.add_argument("--min-psnr", type=float, default=FLOOR, metavar="DB", help=keeps)
    p.add_argument("--check", action="store_true", help="compare the networks with the source's")
    info = "convert nothing, only print what SOURCE is; a flat file may be given, too"
    p.add_argument("--info", action="store_true", help=info)
    p.add_argument("--list", action="store_true", help=f"list what is kept in {cache_folder()}")
    p.add_argument("--clear", action="store_true", help="delete what is kept there")
    return p


def list_kept(clear):
    if clear and not any(kept_files()):
        tell(f"nothing is kept in {cache_folder()}. Flat files beside models are yours to delete.")
    for path, header in kept_files():
        size, source = path.stat().st_size / 1e6, header.get("source", "an unknown file")
        if clear:
            path.unlink()
        tell(f"{'deleted ' if clear else ''}{path}: {size:.0f} MB, from {source}")


def main(argv=None):
    with command("convert_weights.py"):
        args = vars(make_parser().parse_args(argv))
        clear, listed = args.pop("clear"), args.pop("list")
        if clear or listed:
            list_kept(clear)
            return
        if args["source"] is None:
            raise ConversionError("give a SOURCE to convert; --help says more.")
        if not args.pop("info"):
            convert(**args)
            return
        asked = ("vae", "safety", "prediction", "zero_snr", "verify")
        for line in describe(args["source"], **{name: args[name] for name in asked}):
            tell(line)


if __name__ == "__main__":
    main()
