"""Several pictures as one."""

from PIL import Image


def grid(pictures, rows):
    """PIL pictures of one size in rows, left to right, top to bottom; black where some lack."""
    columns = -(-len(pictures) // rows)
    w, h = pictures[0].size
    sheet = Image.new("RGB", (columns * w, rows * h))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    return sheet
