"""What lies beside a file and is asked about it, and what a file or a folder is called.

A file is seldom alone: a yaml of its name, the config.json of the folder that it was taken from, a
LoRA's adapter_config.json, the other half of a TAESD. All of them are listed by find, so that who
asks them and who wants to know whether they have changed agree.
"""

import os
import re
from pathlib import Path

from . import taesd

# What libraries call the weights in each of their folders, whatever these are of.
GENERIC = re.compile(r"^(diffusion_pytorch_model|pytorch_lora_weights|adapter_model)(?=[.-]|$)")
LORAS = [f"{name}.{end}" for name in ("adapter_model", "pytorch_lora_weights")
         for end in ("safetensors", "bin")]  # fmt: skip
FOLDERS = ("model_index.json", "config.json", "unet", "adapter_config.json", *LORAS)


def find(path):
    """-> {what it is: the file}, of those beside a file that are there."""
    names = {
        "yaml": path.stem + ".yaml", "config": "config.json", "adapter": "adapter_config.json",
        "half": taesd.other_half(path.name),
    }  # fmt: skip
    found = {what: next(beside(path, name), None) for what, name in names.items() if name}
    return {what: file for what, file in found.items() if file}


def beside(path, name):
    """Yield the files of that name beside a file; and, if it is a link, beside what it leads to."""
    for place in dict.fromkeys((path.parent, Path(os.path.realpath(path)).parent)):
        if (place / name).is_file():
            yield place / name


def find_files(path):
    """-> all that a conversion of this file or folder may read, sorted."""
    if path.is_dir():
        return sorted(f for part in ("*", "*/*") for f in path.glob(part) if f.is_file())
    return [path, *find(path).values()]


def find_vae(path):
    """-> a VAE that other programs would use with this model, by its name; None"""
    ends = "vae.pt", "vae.ckpt", "vae.safetensors"
    return next((file for end in ends for file in beside(path, f"{path.stem}.{end}")), None)


def is_folder(path):
    """Is it one of a model, a network or a LoRA?"""
    return any((path / name).exists() for name in FOLDERS)


def find_lora(folder):
    """-> the file of a LoRA's folder, as PEFT or diffusers writes it; None for other folders"""
    if (folder / "model_index.json").exists():
        return None
    return next((folder / name for name in LORAS if (folder / name).is_file()), None)


def title(path):
    """Its name, and where that says nothing its folder's in place of it.

    inpaint/diffusion_pytorch_model.fp16.bin  ->  inpaint.fp16.bin
    """
    folder = Path(os.path.abspath(path)).parent.name
    return GENERIC.sub(lambda _: folder, path.name, count=1) if folder else path.name


def full_name(path):
    """The same, with nothing left out: inpaint/diffusion_pytorch_model.fp16.bin"""
    folder = Path(os.path.abspath(path)).parent.name
    return f"{folder}/{path.name}" if GENERIC.match(path.name) else path.name
