"""Where pictures are saved, and how: names, kinds of files, and the text that is in them."""

import functools
import os
import re
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from convert_weights import clear_stale
from sd import PART, SDError, say_once, write_complete
from sd_more.infotext import EXIF, USER_COMMENT

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FILLED = ("prompt", "seed", "n")
MOST_EXIF = 65_000  # bytes, of a JPEG's


def check_output(output):
    """SDError if no picture could be saved there; found out before one is painted. Folders that
    are not there are made.
    """
    path = choose_name(output, "a" * 60, 2**64, 10_000)  # no other is longer
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)  # another process may be faster
        clear_stale(path.parent)
        tempfile.TemporaryFile(suffix=PART, prefix=".", dir=path.parent).close()
    except OSError as error:
        what = error.strerror or error
        raise SDError(f"--output {output}: its folder is not writable ({what}).") from None


def choose_name(output, prompt, seed, n):
    """output, with what stands in {} filled in; in a folder {prompt}-{seed}.png. n: this picture's
    number among all.
    """
    path = Path(output)
    if str(output) == "-":
        raise SDError("--output - is not done: a picture is written to a file.")
    if str(output).endswith("/") or os.path.isdir(path) or (path.suffix == "" and path.name):
        path = path / "{prompt}-{seed}.png"
    if path.suffix.lower() not in KINDS or not str(output).strip():
        kinds = ", ".join(f"NAME{end}" for end in KINDS)
        raise SDError(f"--output must be {kinds} or a folder, got {output}.")
    values = {"prompt": slug(prompt), "seed": seed, "n": n}

    def fill(match):
        if match[1] not in FILLED:
            known = ", ".join(f"{{{name}}}" for name in FILLED)
            raise SDError(f"--output {output}: {match[0]} is not known; there are {known}.")
        return str(values[match[1]])

    path = Path(re.sub(r"\{(\w*)\}", fill, str(path)))
    if len(os.fsencode(path.name)) > 220:  # systems allow 255, and numbers may have to go in
        raise SDError(f"--output {output}: the name is too long.")
    return path


def slug(prompt, most=60):
    """ "A red house, at night!" -> "a-red-house-at-night": what any file system takes"""
    text = re.sub(r"\W+", "-", prompt.lower()).strip("-_")
    return text.encode()[:most].decode(errors="ignore").strip("-_") or "untitled"


def name_step(path, step):
    """out.png -> out-step-010.png"""
    return path.with_stem(f"{path.stem}-step-{step:03d}")


def save_picture(picture, path, text):
    """-> where it was saved: at path, or at the first of path-2, path-3 ... that is free, also if
    several processes save at once. text: the "parameters".
    """
    text = text.encode(errors="replace").decode()
    kind = KINDS[path.suffix.lower()]
    options = {"pnginfo": png_text(text)} if kind == "PNG" else {"exif": exif_text(text, kind)}
    options |= {} if kind == "PNG" else {"quality": 95}
    save = functools.partial(picture.save, format=kind, **options)
    try:
        return write_complete(path, save, overwrite=False)
    except OSError as error:
        raise SDError(f"{path} was not saved: {error.strerror or error}.") from None


def png_text(text):
    info = PngInfo()
    info.add_text("parameters", text)
    return info


def exif_text(text, kind):
    """As AUTOMATIC1111's program has it, in UTF-16."""
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    if kind == "JPEG" and len(comment) > MOST_EXIF:
        say_once("the settings are too long for a JPEG, and are not in it: take .png or .webp.")
        comment = b""
    exif = Image.Exif()
    exif.get_ifd(EXIF)[USER_COMMENT] = comment
    return exif.tobytes()
