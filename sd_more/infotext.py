"""What makes a picture again, as a text in the PNG: the "parameters" that AUTOMATIC1111's program
introduced and others read and write, too.

    a red house, at night
    Negative prompt: a tree
    Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: sd15, RNG: CPU, ...

What is written has the names that AUTOMATIC1111's program knows. What is read may be ours, of any
age, or that program's, Forge's, SD.Next's or stable-diffusion.cpp's, also in a JPEG or WebP, or
what workflows.py finds in a PNG of ComfyUI, InvokeAI or NovelAI. Of theirs each field that is not
done here is said, and so is who made a picture whose text is another.
"""

import json
import re
import shlex
from pathlib import Path

from sd import SAMPLERS, TINY, SDError, open_picture, say_once
from sd_more.workflows import read_workflow

MOST_TEXT = 100_000
EXIF, USER_COMMENT = 0x8769, 0x9286  # where a JPEG has the text
NEGATIVE = "Negative prompt:"
CHUNKS = (  # whose settings are another kind of text, and the chunks that only they write
    ("InvokeAI", ("invokeai_metadata", "invokeai_graph", "sd-metadata", "Dream", "dream")),
    ("Easy Diffusion", ("use_stable_diffusion_model", "Stable Diffusion model")),
    ("Fooocus", ("fooocus_scheme",)),
    ("ComfyUI", ("workflow", "prompt")),
)
MARKS = (  # likewise, and what stands in their text
    ("SwarmUI", "sui_image_params"), ("NovelAI", "NovelAI"), ("Draw Things", "Draw Things"),
    ("Fooocus", "Fooocus"),
)  # fmt: skip

# %% Names -----------------------------------------------------------------------------------------

THEIR_SAMPLERS = {  # ours: AUTOMATIC1111's name, its schedule
    "euler": ("Euler", None),
    "euler-a": ("Euler a", None),
    "dpm++": ("DPM++ 2M", None),
    "dpm++-karras": ("DPM++ 2M", "Karras"),
}
OUR_SAMPLERS = {  # theirs, without spaces, dots and dashes: ours; diffusers' classes, too
    "pndm": "plms", "eulerdiscrete": "euler", "eulerancestraldiscrete": "euler-a",
    "lmsdiscrete": "lms", "dpmsolvermultistep": "dpm++", "dpmpp": "dpm++",
    "eulera": "euler-a", "eulerancestral": "euler-a", "dpm++2m": "dpm++", "dpm2m++": "dpm++",
    "dpmpp2m": "dpm++",
}  # fmt: skip
PLAIN_SCHEDULES = "automatic", "uniform", "normal", "discrete", "default"
THEIR_RNG = {"torch": "CPU", "philox": "NV"}
OUR_RNG = {"cpu": "torch", "nv": "philox", "gpu": "philox", "cuda": "philox"}


def read_sampler(text):
    """ "DPM++ 2M Karras" -> "dpm++"; what is not known stays as it is, for the check to name."""
    name = text.strip().lower()
    if name in SAMPLERS:
        return name
    start, _, end = name.rpartition(" ")
    name = start if end in ("karras", *PLAIN_SCHEDULES) else name
    name = re.sub(r"[\s._-]", "", name.removeprefix("k_"))
    name = OUR_SAMPLERS.get(name, name)
    return name if name in SAMPLERS else text


def read_sampler_option(text):
    """As somebody may write it: also "DPM++ 2M Karras"."""
    name = re.sub(r"[\s_]karras$", " karras", text.lower().removesuffix("scheduler"))
    karras, name = name.endswith(" karras"), read_sampler(name)
    name = f"{name}-karras" if karras and f"{name}-karras" in SAMPLERS else name
    return name if name in SAMPLERS else text


def read_schedule(values):
    """A field of its own in AUTOMATIC1111's program since 1.9, before that the sampler's last word.
    "Automatic" is what suits the sampler.
    """
    last = values.get("sampler", "").lower().rpartition(" ")[2]
    schedule = values.get("schedule type", last).strip().lower()
    suits = schedule == "automatic" and read_sampler(values.get("sampler", "")) == "dpm++"
    return "karras" if suits else schedule


def read_key(name):
    """ "CFG Scale" and "cfg_scale" are one field."""
    return name.strip().lower().replace("_", " ")


def read_rng(text):
    name = text.strip().lower()
    return OUR_RNG.get(name, name)


def read_flag(text):
    return text == "True"


PARAMETERS = {  # name in the text: (option of the command line, how to read its value)
    "Steps": ("steps", int),
    "Sampler": ("sampler", read_sampler),
    "CFG scale": ("cfg", float),
    "Seed": ("seed", int),
    "RNG": ("rng", read_rng),
    "Model hash": ("model_hash", str),
    "Spacing": ("spacing", str),
    "CFG rescale": ("rescale", float),
    "dtype": ("dtype", str),
    "Denoising strength": ("strength", float),
    "Image": ("image", Path),
    "Mask": ("mask", Path),
    "Clip skip": ("clip_skip", int),
    "Lora": ("lora", shlex.split),
    "Words": ("embedding", shlex.split),
    "ControlNet": ("controlnet", shlex.split),
    "Control image": ("control_image", shlex.split),
    "Model file": ("model", str),
    "VAE file": ("vae", str),
    "Hires upscale": ("upscale", float),
    "Upscale strength": ("upscale_strength", float),
    "Plain prompt": ("plain_prompt", read_flag),
    "Low memory": ("low_memory", read_flag),
}
THEIRS = {
    "steps", "sampler", "cfg scale", "cfg rescale", "seed", "rng", "denoising strength",
    "clip skip", "model hash",
}  # fmt: skip
SCHEDULED = {"sampler", "spacing"}  # either says what the schedule is
KNOWN = {name.lower(): how for name, how in PARAMETERS.items()}
HARMLESS = {  # fields of others that change nothing here, or that are read with another one
    "model", "vae hash", "version", "size", "time", "user", "images",
    "batch size", "batch pos", "lora hashes", "ti hashes", "hashes", "app", "backend", "parser",
    "pipeline", "operations", "init image hash", "init image size", "created date", "guidance",
    "civitai resources", "civitai metadata", "pad conds", "prompt lines",
}  # fmt: skip
NOTHING = {"", "none", "false", "disable", "disabled", "original", "0", "0.0", "0.000000"}


# %% Writing ---------------------------------------------------------------------------------------


def write_parameters(options, prompt, seed, width, height, images=1):
    """-> the text. options: {option: value}, of which all in PARAMETERS are there, and "seed" and
    "negative_prompt"; images: how many, or which, are in this file.
    """
    sampler = options["sampler"]
    if SAMPLERS[sampler].spacing == "linspace" and not options.get("spacing"):
        options = options | {"spacing": "linspace"}  # the first version's was another
    sampler, schedule = THEIR_SAMPLERS.get(sampler, (sampler.upper(), None))
    schedule = "Karras" if options.get("spacing") == "karras" else schedule
    found = {"Steps": options["steps"], "Sampler": sampler}
    found |= {"Schedule type": schedule} if schedule else {}
    found |= {"CFG scale": options["cfg"], "Seed": seed, "Size": f"{width}x{height}"}
    found |= {"Model": Path(options["model"]).stem}
    found |= {"RNG": THEIR_RNG.get(options["rng"], options["rng"])}
    for name, (option, _) in PARAMETERS.items():
        value = options.get(option)
        if name not in found and value not in (None, [], False, TINY):
            found[name] = shlex.join(value) if isinstance(value, list) else value
    if f"\n{NEGATIVE} " in prompt:  # where it ends could not be told otherwise
        found["Prompt lines"] = prompt.count("\n") + 1
    found |= {"Images": images, "Version": "sd.py"}
    negative = options["negative_prompt"]
    negative = f"\n{NEGATIVE} {negative}" if negative else ""
    line = ", ".join(f"{name}: {quote(value)}" for name, value in found.items())
    return f"{prompt}{negative}\n{line}"


def quote(value):
    return json.dumps(str(value)) if set(str(value)) & set(',:"\n') else value


# %% Reading ---------------------------------------------------------------------------------------


def read_parameters(path, given=()):
    """-> {option: value} from such a picture, or SDError. given: {option: value} of the command
    line; nothing is said of what they settle.
    """
    given = dict(given)
    try:
        options, fields, known = find_settings(path, given)
        values = {key: value for key, (_, value) in fields.items()}
        options |= read_fields(values, known)
    except SDError:
        raise
    except ValueError as error:
        why = shorten(str(error), 200)
        raise SDError(f"--from-png {path}: its parameters are not readable ({why}).") from None
    settle(options, values, values.get("version") == "sd.py", given)
    not_done = name_not_done(fields, known, options, given)
    if not_done:
        say_once(f"--from-png {path}: not done here: {shorten(', '.join(not_done), 1000)}")
    name_model(path, values, options | given)
    return options


def find_settings(path, given):
    """-> {option: prompt}, {name in lower case: (name, text)}, which of these names are read"""
    texts, size = find_texts(path)
    if text := find_text(path, texts):
        return read_text(text)
    try:
        found = read_workflow(texts, size, given)
    except SDError as error:
        raise SDError(f"--from-png {path}: {error}") from None
    if found:
        prompts, fields = found
        fields = {read_key(name): (name, text) for name, text in fields.items()}
        return prompts, fields, {*THEIRS, "spacing"}
    if maker := find_maker(texts):
        raise SDError(
            f"--from-png {path}: {maker} made it, whose settings are not read here: give --prompt, "
            "--seed and the like."
        )
    raise SDError(f"--from-png {path}: it does not say how it was made.")


def read_text(text):
    """-> as find_settings"""
    lines = text.split("\n")
    at = max(i for i, line in enumerate(lines) if line.startswith("Steps: "))
    fields = {read_key(name): (name, value) for name, value in split_fields(lines[at].rstrip("\r"))}
    version = fields.get("version", (None, None))[1]
    ours = version == "sd.py"
    count = fields.get("prompt lines", (None, None))[1] if ours else None
    # A text that names another program has none of our own fields.
    known = KNOWN.keys() if ours or version is None else THEIRS
    return read_prompts(lines[:at], ours, count), fields, known


def read_prompts(lines, ours, count):
    """What stands above the settings -> {option: prompt}. Others strip each line. Ours may have a
    line in the prompt that looks like the mark, and then count says how many lines the prompt has.
    """
    lines = lines if ours else [line.strip() for line in "\n".join(lines).strip().split("\n")]
    mark, first = (f"{NEGATIVE} ", 1) if ours else (NEGATIVE, 0)
    marked = (i for i, line in enumerate(lines) if line.startswith(mark) and i >= first)
    at = next(marked, len(lines)) if count is None else int(count)
    negative = "\n".join(lines[at:]).removeprefix(mark)
    negative = negative if ours else negative.strip()
    return {"prompt": "\n".join(lines[:at]), "negative_prompt": negative}


def read_fields(values, known):
    """{name in lower case: text} -> {option: value}"""
    options = {}
    for key, value in values.items():
        if key == "size":
            options["width"], options["height"] = map(int, value.split("x"))
        elif key in known:
            option, read = KNOWN[key]
            options[option] = read(value)
    return options


def settle(options, values, ours, given):
    """What takes more than one field, and what others mean where they say nothing."""
    if not ours:
        options.setdefault("rng", "philox")  # AUTOMATIC1111's noise is the GPU's
        if options["rng"] not in OUR_RNG.values():
            say_once(f"its noise is {shorten(options['rng'])}'s, which is not done here.")
            options["rng"] = "torch"
    if read_schedule(values) == "karras":
        name = f"{options.get('sampler')}-karras"
        options |= {"sampler": name} if name in SAMPLERS else {"spacing": "karras"}
    sampler = SAMPLERS.get(options.get("sampler"))
    if ours and sampler and sampler.spacing == "linspace":  # the first version's was leading
        options.setdefault("spacing", "leading")
    enlarged = any(key.startswith("hires") for key in values)
    if "image" not in options and ("image" not in given or enlarged):
        options.pop("strength", None)  # of a step that enlarges, or of a picture not known here


def name_not_done(fields, known, options, given):
    """-> ["Hires upscale 2", ...]: each field that changed the picture, and does not here."""
    found, settled = [], options | given
    for key, (name, value) in fields.items():
        if key == "denoising strength":
            done = "strength" in settled
        elif key == "schedule type":
            done = value.lower() in ("karras", *PLAIN_SCHEDULES) or given.keys() & SCHEDULED
        else:
            done = key in known or key in HARMLESS or value.lower() in NOTHING
        found += [] if done else [f"{shorten(name)} {shorten(value)}"]
    loaded = {Path(path).stem.lower() for path in settled.get("embedding", ())}
    pairs = fields.get("ti hashes", ("", ""))[1].split(",")  # word: hash, word: hash
    used = dict.fromkeys(pair.partition(":")[0].strip() for pair in pairs)
    new = (word for word in used if word and word.lower() not in loaded)
    return found + [f"embedding {shorten(word)}" for word in new]


def name_model(path, values, settled):
    """Said where the picture's model is not the one that will paint."""
    name, code = values.get("model"), values.get("model hash")
    if "model" not in settled and name not in (None, TINY.stem):
        name = shorten(name) + (f", hash {shorten(code)}" if code else "")
        say_once(f"--from-png {path}: made with the model {name}; to paint with it, give --model.")


def shorten(text, most=60):
    return text if len(text) <= most else text[: most - 3] + "..."


FIELD = re.compile(
    r"""
    \s* ( [^:,\s"{\[] [^:,]* ) : [ ]                               # its name
    ( "(?: \\. | [^\\"] )*" | \{ [^{}]* \} | \[ [^\[\]]* \] | [^,]* )  # its value
    \s* (?: , | $ )
    """,
    re.VERBOSE,
)


def split_fields(line):
    """Yield (name, value) of "Steps: 20, Model: "a, b"", each looked for behind the last one."""
    at = 0
    while at < len(line):
        if match := FIELD.match(line, at):
            yield match[1], unquote(match[2])
            at = match.end()
        else:
            at = (line.find(",", at) + 1) or len(line)


def unquote(value):
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:  # half a quotation
        return value


# %% Where the text is, and whose ------------------------------------------------------------------


def find_texts(path):
    """-> {chunk: text} of a picture, its size"""
    try:
        image = open_picture(path)
    except SDError as error:
        raise SDError(f"--from-png: {error}") from None
    texts = {name: text for name, text in image.info.items() if isinstance(text, str)}
    return texts | {"comment": read_comment(image)}, image.size


def find_text(path, texts):
    """-> the text that has a line of settings, or None."""
    for text in (texts.get("parameters", ""), texts["comment"]):
        if len(text) > MOST_TEXT:
            raise SDError(f"--from-png {path}: its text has {len(text):,} characters, too many.")
        if "\nSteps: " in f"\n{text}":
            return text
    return None


def find_maker(texts):
    """{chunk: text} -> the name of a program, or None."""
    for maker, mark in MARKS:
        if any(mark in text[:MOST_TEXT] for text in texts.values()):
            return maker
    return next((maker for maker, chunks in CHUNKS if texts.keys() & set(chunks)), None)


def read_comment(image):
    """-> the text in a JPEG's or WebP's EXIF. Eight bytes say in which code it is, but of UTF-16
    not which of the two.
    """
    try:
        comment = image.getexif().get_ifd(EXIF).get(USER_COMMENT, "")
    except Exception:  # noqa: BLE001  Pillow raises all kinds for damaged files
        return ""
    if not isinstance(comment, bytes):
        return str(comment)
    code, text = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        text = text if code in (b"ASCII\0\0\0", bytes(8)) else comment
        return text.decode(errors="replace")
    both = [text.decode(order, "replace").lstrip("\ufeff") for order in ("utf-16-be", "utf-16-le")]
    return next((text for text in both if "Steps: " in text), both[0])
