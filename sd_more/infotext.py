"""What makes a picture again, as a text in the PNG: the "parameters" that AUTOMATIC1111's program
introduced and others read and write, too.

    a red house, at night
    Negative prompt: a tree
    Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: sd15, RNG: torch, ...
"""

import json
import re
import shlex
from pathlib import Path

from sd import TINY, SDError, open_picture

MOST_TEXT = 100_000
OUR_NAMES = {  # of what has another name in other programs
    "euler a": "euler-a",
    "dpm++ 2m": "dpm++",
    "dpm++ 2m karras": "dpm++-karras",
    "cpu": "torch",
    "nv": "philox",
    "gpu": "philox",
}


def read_name(text):
    return OUR_NAMES.get(text.lower(), text.lower())


def read_flag(text):
    return text == "True"


PARAMETERS = {  # name in the text: (option of the command line, how to read its value)
    "Steps": ("steps", int),
    "Sampler": ("sampler", read_name),
    "CFG scale": ("cfg", float),
    "Seed": ("seed", int),
    "RNG": ("rng", read_name),
    "dtype": ("dtype", str),
    "Denoising strength": ("strength", float),
    "Image": ("image", Path),
    "Mask": ("mask", Path),
    "Clip skip": ("clip_skip", int),
    "Lora": ("lora", shlex.split),
    "Words": ("embedding", shlex.split),
    "ControlNet": ("controlnet", shlex.split),
    "Control image": ("control_image", shlex.split),
    "Model file": ("model", Path),
    "Plain prompt": ("plain_prompt", read_flag),
    "Low memory": ("low_memory", read_flag),
}


def write_parameters(options, prompt, seed, width, height, images=1):
    """-> the text. options: {option: value}, of which all in PARAMETERS are there, and "seed" and
    "negative_prompt"; images: how many, or which, are in this file.
    """
    found = {
        "Steps": options["steps"],
        "Sampler": options["sampler"].upper(),
        "CFG scale": options["cfg"],
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": options["model"].stem,
    }
    for name, (option, _) in PARAMETERS.items():
        value = options[option]
        if name not in found and value not in (None, [], False, TINY):
            found[name] = shlex.join(value) if isinstance(value, list) else value
    found |= {"Images": images, "Version": "sd.py"}
    negative = options["negative_prompt"]
    negative = f"\nNegative prompt: {negative}" if negative else ""
    line = ", ".join(f"{name}: {quote(value)}" for name, value in found.items())
    return f"{prompt}{negative}\n{line}"


def quote(value):
    return json.dumps(str(value)) if set(str(value)) & set(',:"\n') else value


def read_parameters(path):
    """-> {option: value} from such a PNG, or SDError."""
    text = read_text(path)
    if "\nSteps: " not in text:
        raise SDError(f"--from-png {path}: it does not say how it was made.")
    text, _, line = text.rpartition("\nSteps: ")
    prompt, _, negative = text.partition("\nNegative prompt: ")
    options = {"prompt": prompt, "negative_prompt": negative}
    try:
        for name, value in split_fields("Steps: " + line):
            if name == "Size":
                options["width"], options["height"] = map(int, value.split("x"))
            elif name in PARAMETERS:
                option, read = PARAMETERS[name]
                options[option] = read(value)
    except ValueError as error:
        raise SDError(f"--from-png {path}: its parameters are not readable ({error}).") from None
    if "image" not in options:  # AUTOMATIC1111's, for a step that enlarges ("hires fix")
        options.pop("strength", None)
    return options


FIELD = re.compile(r'\s*([^:,\s][^:,]*): ("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def split_fields(line):
    """Yield (name, value) of "Steps: 20, Model: "a, b"", each looked for behind the last one."""
    at = 0
    while at < len(line):
        if match := FIELD.match(line, at):
            name, value = match.groups()
            yield name, json.loads(value) if value.startswith('"') else value
            at = match.end()
        else:
            at = (line.find(",", at) + 1) or len(line)


def read_text(path):
    """-> a PNG's text; "" if it has none."""
    try:
        text = open_picture(path).info.get("parameters")
    except SDError as error:
        raise SDError(f"--from-png: {error}") from None
    text = text if isinstance(text, str) else ""
    if len(text) > MOST_TEXT:
        raise SDError(f"--from-png {path}: its text has {len(text):,} characters, too many.")
    return text
