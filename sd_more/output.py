"""Where pictures are saved, and how."""

import functools
import os
import tempfile

from PIL.PngImagePlugin import PngInfo

from convert_weights import clear_stale
from sd import PART, SDError, write_complete


def check_output(path):
    """SDError if no picture could be saved there; found out before one is painted."""
    if not (path.name.lower().endswith(".png") and path.suffix):
        raise SDError(f"--output must be NAME.png, for no other kind is written, got {path}.")
    if not path.parent.is_dir():
        raise SDError(f"--output {path}: there is no folder {path.parent}. Make it first.")
    if len(os.fsencode(path.name)) > 220:  # systems allow 255, and numbers may have to go in
        raise SDError(f"--output {path}: the name is too long.")
    clear_stale(path.parent)
    try:
        tempfile.TemporaryFile(suffix=PART, prefix=".", dir=path.parent).close()
    except OSError as error:
        raise SDError(f"--output {path}: its folder is not writable ({error.strerror}).") from None


def name_step(path, step):
    """out.png -> out-step-010.png"""
    return path.with_stem(f"{path.stem}-step-{step:03d}")


def save_png(picture, path, text):
    """-> where it was saved: at path, or at the first of path-2, path-3 ... that is free. text: the
    PNG's "parameters".
    """
    info = PngInfo()
    info.add_text("parameters", text.encode(errors="replace").decode())
    save = functools.partial(picture.save, format="PNG", pnginfo=info)
    try:
        return write_complete(path, save, overwrite=False)
    except OSError as error:
        raise SDError(f"{path} was not saved: {error.strerror or error}.") from None
