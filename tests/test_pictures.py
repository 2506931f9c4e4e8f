"""Alpha and number range: one rule for a picture, one for a mask, one for a ControlNet's hint."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sd
from sd_more import app
from sd_more.pictures import grey


def square(mode, inside, outside, size=64):
    """A picture whose left half is one colour, and the right one another."""
    image = Image.new(mode, (size, size), outside)
    image.paste(inside, (0, 0, size // 2, size))
    return image


MASKS = {  # all mean: paint the left half
    "white": square("L", 255, 0),
    "white of one bit": square("1", 1, 0),
    "white of 16 bits": Image.fromarray(np.uint16(np.array(square("L", 255, 0))) * 257),
    "white in colour": square("RGB", (255, 255, 255), (0, 0, 0)),
    "grey": square("L", 129, 126),
    "white strokes on nothing": square("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)),
    "black strokes on nothing": square("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)),
    "coloured strokes on nothing": square("RGBA", (200, 0, 80, 200), (0, 0, 0, 10)),
    "white and opaque": square("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)),
    "grey with alpha": square("LA", (0, 255), (0, 0)),
    "with a palette": square("L", 255, 0).convert("P"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_its_alpha_where_it_has_one_else_its_white(name):
    """As AUTOMATIC1111's program has it (create_binary_mask in modules/processing.py)."""
    _, mask = sd.picture_and_mask(Image.new("RGB", (64, 64)), MASKS[name])
    assert mask[:, :32].all() and not mask[:, 32:].any()


@pytest.mark.parametrize(
    "name, hole", [("control_v11p_sd15_inpaint.pth", -1), ("control_v11p_sd15_openpose.pth", 0)]
)
def test_a_hole_in_a_hint_is_one_only_for_those_that_paint_into_holes(tmp_path, name, hole):
    square("RGBA", (255, 0, 0, 255), (0, 255, 0, 0)).save(tmp_path / "a.png")
    hint = app.load_hint(tmp_path / "a.png", (64, 64), Path(name))
    assert (hint[:, :32] == (1, 0, 0)).all() and (hint[:, 32:] == hole).all()
    square("RGB", (255, 0, 0), (0, 255, 0)).save(tmp_path / "b.png")
    hint = app.load_hint(tmp_path / "b.png", (64, 64), Path(name))
    assert (hint[:, 32:] == (0, 1, 0)).all()


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
DEPTHS = {  # one depth map, in numbers of many kinds
    "8 bits": np.uint8(RAMP * 255 + 0.5),
    "16 bits": np.uint16(RAMP * 65535),
    "32 bits, like 16": np.int32(RAMP * 65535),
    "32 bits": np.int32(RAMP * 2_000_000_000 - 1_000_000_000),
    "0 to 1": np.float32(RAMP),
    "0 to 255": np.float32(RAMP * 255),
    "0 to 65535": np.float32(RAMP * 65535),
    "metres": np.float32(RAMP * 80_000 + 3),
    "negative": np.float32(RAMP - 1),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_depth_map_of_any_numbers_is_the_same_hint(tmp_path, name):
    image = Image.fromarray(DEPTHS[name])
    image.save(tmp_path / "depth.tiff")
    hint = app.load_hint(tmp_path / "depth.tiff", (64, 64), Path("depth.pth"))
    assert abs(hint - RAMP[:, :, None]).max() <= 1.01 / 255


@pytest.mark.parametrize("numbers", [[np.nan, 0, 1], [np.inf, -np.inf, np.nan], [7, 7, 7]])
def test_what_is_no_depth_ends_in_a_picture(numbers):
    picture = grey(Image.fromarray(np.float32([numbers])))
    assert picture.mode == "L" and picture.size == (3, 1)
