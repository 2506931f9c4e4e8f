"""The files that sd.py reads and writes: pictures and masks, flat files of every kind."""

import json
import random

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

import sd
from sd_more.textual_inversion import textual_inversion
from tests.reference import last, raising, words_file, write_file

# %% Pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16", "I", "F", "CMYK"])
def test_pictures_of_every_kind_are_read(mode, tmp_path):
    """Grey of 16 bits, too, which Pillow would cut off at 255."""
    grey = np.tile(np.linspace(0, 255, 128).round().astype(np.uint8), (64, 1))
    if mode in ("I;16", "I"):
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32))
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    path = tmp_path / ("a.tif" if mode in ("I", "F", "CMYK") else "a.png")
    image.save(path)
    pixels, opaque = sd.load_picture(path)
    assert pixels.shape == (64, 128, 3) and pixels.dtype == np.float32 and opaque.min() == 1
    if mode not in ("1", "P"):
        assert np.abs(pixels - grey[..., None] / 255).max() < 0.01
    assert pixels[:, 0].mean() < 0.1 and pixels[:, -1].mean() > 0.9


def test_a_photo_is_turned_and_resized_with_a_message(tmp_path, capsys):
    """As its EXIF note says, to the nearest multiples of 8 or what is asked for."""
    photo = Image.new("RGB", (100, 141), "white")
    photo.paste("red", (0, 0, 100, 20))
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned right by a quarter
    photo.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels, _ = sd.load_picture(tmp_path / "a.jpg")
    assert pixels.shape == (96, 144, 3)
    said = capsys.readouterr().err
    assert "a.jpg" in said and "141 x 100 to 144 x 96" in said
    assert pixels[:, -5:, 1].mean() < 0.1 and pixels[:, :-30, 1].mean() > 0.9
    with open(tmp_path / "a.jpg", "rb") as file:
        assert sd.load_picture(file, 192, 64)[0].shape == (64, 192, 3)


def test_a_picture_that_cannot_be_read_is_refused_by_name(tmp_path):
    """Missing, no picture, or of so many pixels that it would fill the memory."""
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("a red house")
    for name in ("nowhere.png", "bomb.png", "text.png"):
        with pytest.raises(sd.SDError, match=name):
            sd.load_picture(tmp_path / name)


def test_a_damaged_picture_is_read_or_refused_by_name(tmp_path):
    """300 of them, each with three bytes changed, half of them cut off."""
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    whole, rng, refused = (tmp_path / "good.png").read_bytes(), random.Random(0), 0
    for _ in range(300):
        bad = bytearray(whole)
        for _ in range(3):
            bad[rng.randrange(8, len(bad))] = rng.randrange(256)
        (tmp_path / "bad.png").write_bytes(bad[: rng.choice((len(bad), len(bad) // 2))])
        try:
            sd.load_picture(tmp_path / "bad.png")
        except sd.SDError as error:
            assert "bad.png" in str(error)
            refused += 1
    assert 100 < refused < 300


def test_a_hole_gets_the_colours_around_it_at_any_size():
    """So that no green shines through, nor black from below what is transparent."""
    image = Image.new("RGB", (500, 500), (200, 30, 40))
    image.paste((0, 255, 0), (100, 100, 420, 420))
    filled, hole = sd.picture_and_mask(image)  # resized to 512 x 512
    assert 0.35 < hole.mean() < 0.45
    assert np.abs(filled - np.array([200, 30, 40]) / 255).max() < 0.15


def test_green_is_a_colour_in_masks_and_poses():
    """Only where a picture may have a hole it says where."""
    pixels, opaque = sd.load_picture(Image.new("RGB", (64, 64), (0, 255, 0)))
    assert opaque.min() == 1 and np.array_equal(pixels[32, 32], [0, 1, 0])


def test_image_to_image_begins_with_holes_filled(tiny, drawn, hole):
    """Not with whatever lies below a transparent part."""
    black = np.asarray(drawn) * (1 - hole[..., None]).astype(np.uint8)
    cut = Image.fromarray(np.dstack([black, 255 * (1 - hole)]).astype(np.uint8))
    filled, found = sd.picture_and_mask(cut)
    assert np.array_equal(found, hole) and filled[hole > 0].min() > 0
    options = {"steps": 4, "seed": 1}
    (a,) = tiny.img2img("", cut, strength=0.5, **options)
    (b,) = tiny.paint("", sd.ImageToImage(filled, 0.5), **options)
    (c,) = tiny.img2img("", Image.fromarray(black), strength=0.5, **options)
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_mask_is_where_it_is_white(drawn):
    """Of the picture's size, whatever size it has itself."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.paste(100, (32, 0, 64, 64))
    picture, where = sd.picture_and_mask(drawn, mask)
    assert where.shape == (128, 128) and set(where.ravel()) == {0, 1}
    assert where[:, :60].all() and not where[:, 68:].any()
    assert np.array_equal(picture, np.asarray(drawn, np.float32) / 255)


# %% Flat files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "{}", "[]", "[" * 100_000, "null", '{"kind": "model"}'])
def test_a_config_that_is_none_is_refused(small, tmp_path, text):
    """Damaged JSON, nested without end, empty, or not there at all."""
    for metadata in ({"format": "sd.py 1", "config": text}, {"format": "sd.py 1"}):
        mx.save_safetensors(str(tmp_path / "odd.safetensors"), small[2], metadata)
        with pytest.raises(sd.SDError, match=r"odd\.safetensors.*Convert"):
            sd.StableDiffusion(tmp_path / "odd.safetensors")


def crafted(header, data=bytes(64)):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


U8 = {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 not a model",
        b"\xff" * 100,
        crafted({"x": U8 | {"shape": [-1], "data_offsets": [0, 2**64 - 1]}}),
        crafted({"x": U8 | {"dtype": "F32", "shape": [65536] * 4 + [2], "data_offsets": [0, 0]}}),
        crafted({"x": U8 | {"shape": [4], "data_offsets": [2**64 - 8, 2**64 - 4]}}),
        crafted({"__metadata__": {"format": "sd.py 1"}, "x": U8 | {"shape": [65]}}),
        crafted({"__metadata__": {"format": "pt"}, "x": U8}),
        crafted({"__metadata__": {"format": "sd.py 9"}, "x": U8}),
    ],
)
def test_a_file_that_is_no_flat_file_is_refused_before_mlx_reads_it(content, tmp_path, monkeypatch):
    """MLX trusts what a header says about sizes, and would crash."""
    monkeypatch.setattr(mx, "load", raising(AssertionError("it was read")))
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(sd.SDError, match=r"(?s)bad\.safetensors .*(Convert|convert_weights)"):
        sd.StableDiffusion(tmp_path / "bad.safetensors")


def test_the_header_of_any_file_can_be_asked_for(small, tmp_path):
    """{} for what is no safetensors file, or is not there."""
    assert sd.read_header(small[0])["format"] == sd.FORMAT
    (tmp_path / "text").write_text("a red house")
    for path in (tmp_path / "text", tmp_path / "nowhere", tmp_path):
        assert sd.read_header(path) == {}


def test_files_of_another_kind_or_for_another_model_are_refused(small, flat_lora, tmp_path):
    """A LoRA is no model, a model no LoRA, and what changes a model must fit it."""
    path, config, weights = small
    bare = {name: w for name, w in weights.items() if name != "tokenizer.merges"}
    bare = write_file(tmp_path / "bare.safetensors", config, bare)
    words = words_file(tmp_path / "words.safetensors", {"<cat>": torch.zeros(1, 768)})
    for says, arguments in (
        (r"nowhere\.safetensors", (tmp_path / "nowhere.safetensors",)),
        (r"lora\.flat\.safetensors.* model", (flat_lora,)),
        (r"tiny\.safetensors.* lora", (sd.TINY, None, [sd.lora(sd.TINY)])),
        ("textual inversion", (sd.TINY, None, [textual_inversion(flat_lora)])),
        (r"lora\.flat\.safetensors is for another model", (path, None, [sd.lora(flat_lora)])),
        (r"words\.safetensors.*768.*40", (sd.TINY, None, [textual_inversion(words)])),
        (r"tokenizer\.merges", (bare,)),
        ("dtype must be one of float32, float16, bfloat16, got int8", (sd.TINY, "int8")),
        ("clip_skip must be .* to 4, got 0", (sd.TINY, None, [sd.clip_skip(0)])),
        ("clip_skip must be .* to 4, got 5", (sd.TINY, None, [sd.clip_skip(5)])),
        ("clip_skip must be .* to 4, got 1.5", (sd.TINY, None, [sd.clip_skip(1.5)])),
    ):
        with pytest.raises(sd.SDError, match=says):
            sd.StableDiffusion(*arguments)


@pytest.mark.parametrize(
    "name, parts",
    [
        ("unet.nowhere", {"up": (32, 4), "down": (4, 32)}),
        ("unet.down.1.1.proj_in", {"up": (32, 4)}),
        ("unet.down.1.1.proj_in", {"up": (32, 4), "down": (4, 31)}),
        ("unet.down.1.1.proj_in", {"up": (31, 4), "down": (4, 32)}),
        ("unet.down.1.1.proj_in", {"up": (32, 4), "down": (5, 32)}),
        ("unet.down.1.1.proj_in", {"up": (32, 0), "down": (0, 32)}),
        ("unet.down.1.1.proj_in", {"up": (32, 3), "down": (4, 32), "middle": (3, 3, 3, 4)}),
        ("unet.down.1.0.conv1", {"up": (32, 3), "down": (4, 1, 1, 32), "middle": (3, 3, 3, 5)}),
        ("unet.down.1.0.conv1", {"up": (32, 4), "down": (4, 3, 3, 32), "middle": (4, 3, 3, 5)}),
        ("unet.down.1.0.conv1", {"up": (32, 4), "down": (4, 3, 3, 32), "middle": ()}),
        ("unet.down.1.1.proj_in", {"up": (32, 4), "down": ()}),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_by_the_layers_name(small, tmp_path, name, parts):
    """Half of one, one of other widths or ranks, one for a layer that is not there."""
    tensors = {f"{name}.{part}": mx.zeros(shape) for part, shape in parts.items()}
    path = write_file(tmp_path / "bad.safetensors", {"kind": "lora"}, tensors)
    with pytest.raises(sd.SDError, match=rf"bad\.safetensors.*{name}"):
        sd.StableDiffusion(small[0], changes=[sd.lora(path)])


@pytest.mark.parametrize(
    "numbers",
    [{"heads": [0] * 4}, {"groups": "x"}, {"widths": [1e9] * 4}, {"widths": 3}, {"more": 1}],
    ids=str,
)
def test_a_controlnet_that_cannot_be_is_refused_by_name(control, tmp_path, numbers):
    """Before anything is built of it."""
    weights = mx.load(str(control.path))
    config = {"kind": "controlnet", "unet": control.unet | numbers, "pool": False}
    with pytest.raises(sd.SDError, match=r"bad\.safetensors"):
        sd.ControlNet(write_file(tmp_path / "bad.safetensors", config, weights))


def test_a_controlnet_for_another_model_is_refused(tiny, picture, tmp_path):
    """When it is given to the model, before anything is painted."""
    numbers = {"widths": [32] * 4, "heads": [2] * 4, "groups": 32, "context_width": 32}
    network = sd.ControlNetwork(**numbers)
    weights = {f"controlnet.{name}": w for name, w in sd.tree_flatten(network.parameters())}
    config = {"kind": "controlnet", "unet": numbers, "pool": False}
    net = sd.ControlNet(write_file(tmp_path / "other.safetensors", config, weights))
    with pytest.raises(sd.SDError, match=r"other\.safetensors is .* for another model"):
        tiny.controlled((net, picture, 1.0))


def test_several_loras_add_up(flat_lora, tmp_path):
    """Each with its strength; the weights they change become float32, the others stay."""
    _, tensors = sd.read_flat(flat_lora, "lora")
    names = sorted({name.rpartition(".")[0] for name in tensors})
    changes = []
    for i, (some, strength) in enumerate(((names[:40], 0.5), (names[20:], 2))):
        part = {f"{n}.{end}": tensors[f"{n}.{end}"] for n in some for end in ("up", "down")}
        path = write_file(tmp_path / f"{i}.safetensors", {"kind": "lora"}, part)
        changes.append(sd.lora(path, strength))
    config, plain = sd.read_flat(sd.TINY)
    (_, one), (_, other) = (change(config, plain) for change in changes)
    _, both = changes[1](*changes[0](config, plain))
    for name, weight in plain.items():
        total = one[name].astype(mx.float32) + other[name].astype(mx.float32) - weight
        assert mx.allclose(both[name], total, rtol=1e-5, atol=1e-6), name
        changed = name.removesuffix(".weight") in names
        assert both[name].dtype == (mx.float32 if changed else weight.dtype)


# %% Writing ---------------------------------------------------------------------------------------


def test_a_file_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    """What is there is not lost, a free name is found, and an error leaves nothing behind."""
    path, say = tmp_path / "a.png", lambda text: lambda file: file.write(text)
    names = [sd.write_complete(path, say(b"%d" % i), overwrite=False).name for i in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"0", b"1", b"2"]
    assert sd.write_complete(path, say(b"new")) == path and path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    full = raising(OSError(28, "No space left on device"))
    for module, name in ((sd.tempfile, "mkstemp"), (sd.os, "fsync")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(module, name, full)
            sd.write_complete(path, say(b"newer"), overwrite=False)
    with pytest.raises(KeyboardInterrupt):
        sd.write_complete(path, raising(KeyboardInterrupt()))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_that_is_stopped_and_one_beside_it_do_not_disturb_each_other(tiny):
    """Each run is an iterator of its own; none leaves anything behind in the model."""
    whole = last(tiny.generate_latents("a red house", steps=3))
    stopped, other = (tiny.generate_latents(p, steps=3) for p in ("a red house", "a boat at sea"))
    next(stopped), next(other), next(other)
    assert mx.array_equal(last(tiny.generate_latents("a red house", steps=3)), whole)
    assert mx.array_equal(last(stopped), whole)
