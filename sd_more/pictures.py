"""Several pictures as one, larger ones, and pictures of numbers as grey ones."""

import numpy as np
from PIL import Image

import sd


def grid(pictures, rows):
    """PIL pictures of one size in rows, left to right, top to bottom; black where some lack."""
    columns = -(-len(pictures) // rows)
    w, h = pictures[0].size
    sheet = Image.new("RGB", (columns * w, rows * h))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    return sheet


def enlarge(pictures, factor):
    """PIL pictures of one size -> (b, 8h, 8w, 3) in [0, 1], factor times as wide and high, to the
    nearest multiples of 8, by Lanczos' filter.
    """
    size = [max(64, round(n * factor / 8) * 8) for n in pictures[0].size]
    sd.expect(size[0] * size[1] <= sd.MOST_PIXELS, "the size", size, "at most 4096 x 4096")
    large = [picture.resize(size, Image.LANCZOS) for picture in pictures]
    return np.stack([np.asarray(picture, np.float32) / 255 for picture in large])


def read_input(path, mask=False):
    """-> path, or where its numbers are not those of a picture the grey picture that they mean; of
    a mask the largest is white, be it 255 or 65535.
    """
    picture = sd.open_picture(path)
    if mask and picture.mode.startswith(("I", "F")):
        numbers = np.nan_to_num(np.asarray(picture, np.float64))
        return Image.fromarray(np.uint8(255 * (numbers > numbers.max() / 2)))
    return grey(picture) if picture.mode == "F" else path


def grey(picture):
    """A PIL picture of 32-bit numbers, such as a depth map -> one of 8 bits; any other as it is.

    What lies in 0 to 1, to 255 or to 65535 is taken for a part of that, whatever lies elsewhere is
    spread over all greys. What is no number counts as the lowest.
    """
    if picture.mode not in ("F", "I"):
        return picture
    numbers = np.asarray(picture, np.float64)
    finite = numbers[np.isfinite(numbers)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
    whole = (1, 255, 65535) if picture.mode == "F" else (65535,)
    top = next((top for top in whole if 0 <= low and high <= top), None)
    low, high = (low, high) if top is None else (0, top)
    numbers = np.where(np.isfinite(numbers), numbers, low)
    return Image.fromarray(np.uint8((numbers - low) / max(high - low, 1e-30) * 255 + 0.5))
