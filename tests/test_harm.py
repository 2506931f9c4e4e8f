"""Hostile files and hostile moments: one part for each kind of harm, with cases of its own.

fuzz.py and kill.py try what nobody thought of; here stands what somebody did think of.
"""

import contextlib
import copy
import io
import json
import os
import re
import signal
import struct
import subprocess
import zipfile
import zlib

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import convert_weights
import sd
from convert_weights import ConversionError, convert
from sd_more import app
from sd_more.batch import read_lines
from sd_more.infotext import read_parameters, split_fields
from sd_more.output import save_picture
from sd_more.prompts import parse_weights, read_weighted
from sd_more.safety import SafetyChecker
from sd_more.textual_inversion import textual_inversion
from tests.reference import flat_controlnet, quiet, write_file, write_folder

STARTS = "sd.py: ", "convert_weights.py: ", "Traceback"
ESCAPE = "\x1b[31mred\x1b]0;title\x07\r\u202e"


@pytest.fixture
def soon():
    """Whatever hangs is stopped: a pipe that nobody writes to, work in squares of a length."""

    def stop(*_):
        raise AssertionError("this takes more than 20 s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture
def ends(tmp_path, monkeypatch, capsys):
    """The command line, which must end with status 2 and one line -> that line."""
    monkeypatch.chdir(tmp_path)

    def ends(*options, main=app.main):
        before = {path: path.lstat().st_size for path in tmp_path.rglob("*")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(option) for option in options])
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == "", said
        lines = [line for line in said.err.splitlines() if line.startswith(STARTS)]
        assert len(lines) == 1 and len(lines[0]) < 2500, said.err
        assert {path: path.lstat().st_size for path in tmp_path.rglob("*")} == before
        return lines[0]

    return ends


# %% 1. A picture starts a program -----------------------------------------------------------------


def picture_bytes(kind, size=(64, 64), color="red"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


WRITTEN = ("BMP", "DIB", "EPS", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "PCX", "PDF", "PNG",
           "PPM", "SGI", "SPIDER", "TGA", "TIFF", "WEBP")  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_only_formats_that_people_paint_from_are_opened(tmp_path, monkeypatch, kind):
    """Whatever the file is called; and no program is started."""
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(os, "system", None)
    path = tmp_path / "photo.png"
    try:
        path.write_bytes(picture_bytes(kind))
    except (OSError, ValueError, KeyError):
        pytest.skip(f"this Pillow does not write {kind}")
    if kind in sd.PICTURES:
        assert sd.load_picture(path)[0].shape == (64, 64, 3)
    else:
        with pytest.raises(sd.SDError, match=r"photo\.png is not readable as a picture"):
            sd.load_picture(path)


def test_a_dropped_picture_names_one_that_starts_a_program(tmp_path, ends, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    (tmp_path / "photo.png").write_bytes(picture_bytes("EPS"))
    text = "a house\nSteps: 1, Seed: 1, Image: photo.png, Denoising strength: 0.5"
    save_picture(Image.new("RGB", (64, 64)), tmp_path / "dropped.png", text)
    assert "photo.png is not readable" in ends("--from-png", "dropped.png", "--output", "a.png")


# %% 2. Numbers ------------------------------------------------------------------------------------

ODD = [10**9, 10**400, -1, 0, 2.5, float("inf"), True, None, "8", [], [8] * 5, {}, 1 << 40]


def places(config, *inside):
    """Yield the place of each number of a config."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from places(value, *inside, name)
        elif not isinstance(value, str):
            yield *inside, name


def changed(config, place, value):
    config = copy.deepcopy(config)
    *inside, name = place
    part = config
    for each in inside:
        part = part[each]
    part[name] = value
    return config


def test_no_odd_number_of_a_model_gets_past_the_check(small, tmp_path):
    """Each number of the config, replaced by each odd one; no weights are in the file, so that one
    that is let through is refused for that, in other words.
    """
    config = small[1] | {"safety": {"width": 8, "layers": 1, "heads": 2, "projection": 4}}
    fine = {("cfg",): (0, 2.5), ("vae", "scale"): (2.5,), ("safety",): (None,)}
    fine |= {("text", "pad"): (0,)}
    for place in places(config):
        for value in ODD:
            path = write_file(tmp_path / "odd.safetensors", changed(config, place, value), {})
            if value in fine.get(place, ()) and value is not True:
                continue
            with pytest.raises(sd.SDError, match=r"odd\.safetensors is (of no use|damaged)"):
                sd.read_flat(path)
                pytest.fail(f"{place} may be {value}")


def test_no_odd_number_of_a_controlnet_gets_past_the_check(controlnet, tmp_path):
    path = flat_controlnet(controlnet, tmp_path)
    config = json.loads(sd.read_header(path)["config"])
    for place in places(config):
        for value in ODD:
            if place == ("pool",) and value is True:
                continue
            write_file(path, changed(config, place, value), {})
            with pytest.raises(sd.SDError, match="is (of no use|damaged)"):
                sd.ControlNet(path)
                pytest.fail(f"{place} may be {value}")


@pytest.mark.parametrize("line", ["\x0c", "\x0b", "\x1c", "\u2028", "\x85", "\r"])
def test_merges_never_lead_beyond_the_table(tiny, line):
    """Python sees more ends of lines than "\\n"; each would be one more id, and a row of other
    memory. The merges are as many as CLIP's, whatever stands in them.
    """
    merges = f"a{line}a a{line}b\n" * 48894
    tokenizer = sd.Tokenizer(merges)
    assert max(tokenizer.ids.values()) < sd.START
    weights = {"tokenizer.merges": mx.array(list(merges.encode()), mx.uint8)}
    with contextlib.suppress(sd.SDError):  # too long, with some of these
        assert max(sd.read_tokenizer(tiny.config, weights).ids.values()) < sd.START


@pytest.mark.parametrize("change", ["one more", "one less", "floats", "a gigabyte"])
def test_other_merges_are_refused(small, tmp_path, change):
    _, config, weights = small
    merges = weights["tokenizer.merges"]
    weights = dict(weights)
    weights["tokenizer.merges"] = {
        "one more": mx.concatenate([merges, mx.array(list(b"a b\n"), mx.uint8)]),
        "one less": merges[: len(merges) - 8],
        "floats": merges.astype(mx.float32),
        "a gigabyte": mx.concatenate([merges, mx.zeros(1 << 20, mx.uint8)]),
    }[change]
    with pytest.raises(sd.SDError, match=r"tokenizer\.merges"):
        sd.StableDiffusion(write_file(tmp_path / "m.safetensors", config, weights))


def test_what_the_converter_writes_sd_reads(weights, tmp_path):
    """An odd number that a checkpoint brings is refused before anything is written."""
    numbers = {"text": {"heads": 4}, "unet": {"heads": [4] * 4}, "size": 64}
    for place in places(numbers):
        for value in ODD:
            if value in ([],) or place == ("unet", "heads") and value == [8] * 5:
                value = ["\x1b[31m", 2.5]
            told = changed(numbers, place, value)
            torch.save({"state_dict": weights, "sd_config": told}, tmp_path / "odd.ckpt")
            with pytest.raises(ConversionError, match=r"odd\.ckpt was not converted"):
                convert(tmp_path / "odd.ckpt", log=quiet)
                pytest.fail(f"{place} may be {value}")
            assert len(list(tmp_path.iterdir())) == 1


# %% 3. Pictures without a bound -------------------------------------------------------------------


def png_of(width, height):
    """A picture of a few bytes, all of one grey."""
    row = b"\0" + bytes(width)
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(row * height))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(2_000_000, 1), (1, 2_000_000), (9000, 9000), (20_000, 20_000)])
def test_a_picture_of_too_many_pixels_is_refused_with_their_number(tmp_path, size):
    (tmp_path / "large.png").write_bytes(png_of(size[0], 1) if size[1] > 1 else png_of(*size))
    if size[1] > 1:  # only the header says so; nobody gets as far as the pixels
        data = bytearray((tmp_path / "large.png").read_bytes())
        data[20:24] = struct.pack(">I", size[1])
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        (tmp_path / "large.png").write_bytes(data)
    with pytest.raises(sd.SDError, match=r"large\.png.*(at most 4096 x 4096|too many|limit)"):
        sd.load_picture(tmp_path / "large.png")


def test_a_size_to_paint_has_a_bound(tmp_path, ends, drawn):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    options = "--width", 64 * 1000, "--height", 64 * 1000
    assert "at most 4096 x 4096" in ends(*options)
    assert "at most 4096 x 4096" in ends("--image", "a.png", *options)
    with pytest.raises(sd.SDError, match="at most 4096 x 4096"):
        sd.load_picture(tmp_path / "a.png", 8192, 4096)
    assert "1 to 999" in ends("--n-images", 10**9)


def test_what_pillow_finds_odd_is_no_warning(tmp_path, recwarn):
    info = PngInfo()
    Image.new("P", (64, 64)).save(tmp_path / "a.png", transparency=b"\0\1", pnginfo=info)
    (tmp_path / "b.png").write_bytes(png_of(10_000, 9500))  # of which Pillow warns
    sd.load_picture(tmp_path / "a.png")
    with contextlib.suppress(sd.SDError):
        sd.load_picture(tmp_path / "b.png")
    # A file that is closed when it is forgotten is none that anybody sees.
    assert not [one for one in recwarn.list if one.category is not ResourceWarning]


# %% 4. Text that takes squares of its length ------------------------------------------------------

LONG = {
    "spaces": " " * 20_000,
    "digits after a colon": "(a:" + "1" * 19_000,
    "weights": "(a:1)" * 4000,
    "open": "(a" * 10_000,
    "closed": ")" * 20_000,
    "one long word": "a" * 20_000,
    "combining marks": "a" + "\u0323\u0301" * 9999,
    "breaks": " BREAK" * 3000,
    "marks": "<|endoftext|>" * 1500,
    "words": ("aeinst" * 80 + " ") * 41,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_prompt_is_read_or_refused_soon(tiny, soon, text):
    for read in (parse_weights, tiny.tokenizer.encode, lambda t: read_weighted(tiny, [t])):
        with contextlib.suppress(sd.SDError):
            read(text)
    with pytest.raises(sd.SDError, match=r"at most 20,000 characters long, got \S"):
        tiny.tokenizer.encode("a " * 400_000)


def test_breaks_are_where_they_were():
    assert parse_weights("a  BREAK (b BREAK c:2) BREAKER") == [
        ("a", 1.0), ("BREAK", None), ("b", 2.0), ("BREAK", None), ("c", 2.0), (" BREAKER", 1.0)
    ]  # fmt: skip


@pytest.mark.parametrize("weight", ["9" * 400, "1001", "-5000"])
def test_a_weight_is_a_number_that_can_be_multiplied_by(weight):
    with pytest.raises(sd.SDError, match="a weight in the prompt must be at most 1,000"):
        parse_weights(f"(house:{weight})")


def test_the_text_of_a_picture_is_read_soon(tmp_path, soon):
    for line in (" " * 90_000, "a" * 90_000, "a:" * 45_000, 'a: "' * 20_000, "a: b, " * 15_000):
        with contextlib.suppress(ValueError):  # for half a quotation
            list(split_fields(line))
        text = f"a\nSteps: 1, {line}"
        save_picture(Image.new("RGB", (64, 64)), tmp_path / f"{hash(line)}.png", text)
        with contextlib.suppress(sd.SDError):
            read_parameters(tmp_path / f"{hash(line)}.png")
    assert list(split_fields('A: 1, B: "x, \\"y\\": z", nothing, C: d')) == [
        ("A", "1"), ("B", 'x, "y": z'), ("C", "d")
    ]  # fmt: skip


def test_yaml_and_pickles_are_read_soon(weights_v2, tmp_path, soon):
    save_file(weights_v2, tmp_path / "a.safetensors")
    (tmp_path / "a.yaml").write_text("\n" * 500_000 + " " * 500_000)
    convert(tmp_path / "a.safetensors", log=quiet)
    long = b"\x80\x02" + b"N0" * 2_000_000 + b"N."
    (tmp_path / "b.ckpt").write_bytes(long * 5)
    with pytest.raises(ConversionError, match="does not come to an end|not one that PyTorch"):
        convert(tmp_path / "b.ckpt", log=quiet)


# %% 5. Special files ------------------------------------------------------------------------------


def special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(8 << 30)  # takes no room on the disk
    return path


KINDS = ["pipe", "device", "loop", "folder", "sparse"]
INPUTS = ["--model", "--image", "--lora", "--embedding", "--prompts", "--from-png"]


@pytest.mark.parametrize("kind", KINDS)
def test_special_files_are_refused_by_the_command_line(tmp_path, ends, soon, kind):
    odd = special(tmp_path / "odd.png", kind)
    for option in INPUTS:
        said = ends(option, odd)
        assert "odd.png" in said or "/dev/zero" in said
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert "odd.png" in ends("--image", "a.png", "--mask", odd)
    said = ends("--controlnet", odd, "--control-image", "a.png")
    assert "odd.png" in said or "/dev/zero" in said


@pytest.mark.parametrize("kind", KINDS)
def test_special_files_are_refused_by_the_converter(tmp_path, ends, soon, folder, weights, kind):
    main = convert_weights.main
    assert "odd" in ends(special(tmp_path / "odd", kind), main=main)
    save_file(weights, tmp_path / "a.safetensors")
    assert "odd" in ends("a.safetensors", "--vae", "odd", main=main)
    if kind != "loop":  # which leads nowhere, and is replaced
        assert "odd" in ends("a.safetensors", "-o", "odd", main=main)


NEIGHBOURS = ["unet/config.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json",
              "model_index.json", "vae/diffusion_pytorch_model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_special_files_beside_others_are_refused(tmp_path, soon, networks, neighbour, kind):
    folder = write_folder(tmp_path / "model", networks)
    (folder / neighbour).unlink()
    special(folder / neighbour, kind)
    with pytest.raises(ConversionError, match="was not converted|is not a file"):
        convert(folder, log=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_pipe_as_yaml_is_not_asked(tmp_path, soon, weights_v2):
    save_file(weights_v2, tmp_path / "a.safetensors")
    special(tmp_path / "a.yaml", "pipe")
    convert(tmp_path / "a.safetensors", log=quiet)


def test_prompts_have_a_bound(tmp_path):
    with pytest.raises(sd.SDError, match="too many"):
        read_lines(special(tmp_path / "a.txt", "sparse"))


# %% 6. A wrong file and status 0 ------------------------------------------------------------------


@pytest.mark.parametrize("word", ["__metadata__", " ", "a\nb", "\x1b[31m", "x" * 200])
def test_a_word_that_can_not_be_one_is_refused(tmp_path, word):
    path = tmp_path / "w.pt"
    torch.save({"string_to_param": {"*": torch.ones(1, 768)}, "name": word}, path)
    assert sd.read_flat(convert(path, log=quiet), "words")  # it is the file's name that counts
    named = tmp_path / f"{word}.pt"
    if "/" in word or len(word) > 100 or "\0" in word:
        return
    path.rename(named)
    with pytest.raises(ConversionError, match=r"not converted"):
        convert(named, tmp_path / "out.safetensors", log=quiet)


def test_a_lora_with_one_layer_under_two_names_is_refused(tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = f"lora_{layer.replace('.', '_')}", f"{layer}.lora"
    tensors = {f"{a}.lora_up.weight": torch.ones(8, 4), f"{a}.lora_down.weight": torch.ones(4, 8)}
    tensors |= {f"{b}.up.weight": torch.zeros(8, 4), f"{b}.down.weight": torch.zeros(4, 8)}
    save_file(tensors, tmp_path / "twice.safetensors")
    with pytest.raises(ConversionError, match="one tensor under two names"):
        convert(tmp_path / "twice.safetensors", log=quiet)


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint8, torch.bool])
def test_a_lora_of_a_type_that_is_not_read_is_refused(tmp_path, part, dtype):
    layer = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {
        "lora_up.weight": torch.ones(8, 4), "lora_down.weight": torch.ones(4, 8, 1, 1),
        "lora_mid.weight": torch.ones(4, 4, 3, 3), "alpha": torch.ones(()),
    }  # fmt: skip
    save_file({f"{layer}.{n}": t for n, t in tensors.items()}, tmp_path / "good.safetensors")
    convert(tmp_path / "good.safetensors", log=quiet)
    tensors[part] = tensors[part].to(dtype)
    save_file({f"{layer}.{n}": t for n, t in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(ConversionError, match="do not go together|of the type"):
        convert(tmp_path / "bad.safetensors", log=quiet)


@pytest.mark.parametrize("dtype", [mx.int8, mx.uint8, mx.int32, mx.bool_, mx.complex64])
def test_weights_are_floating_point(small, tmp_path, dtype):
    _, config, weights = small
    name = next(name for name in weights if name.startswith("unet."))
    weights = weights | {name: mx.zeros(weights[name].shape, dtype)}
    with pytest.raises(sd.SDError, match="its tensors' type"):
        sd.StableDiffusion(write_file(tmp_path / "int.safetensors", config, weights))


def test_two_parts_of_a_folder_may_not_hold_the_same(tmp_path, networks):
    folder = write_folder(tmp_path / "model", networks, max_shard_size="200KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    shards[1].unlink()
    shards[1].hardlink_to(shards[0])
    with pytest.raises(ConversionError, match="another part of the model holds, too"):
        convert(folder, log=quiet)


# %% 7. What is said is what happened --------------------------------------------------------------


def test_what_was_written_is_not_called_unwritten(weights, tmp_path):
    """The last line of the report comes when the file is there: whoever can't print it hears so."""
    save_file(weights, tmp_path / "a.safetensors")

    def log(line):
        if "tensors, float16" in line:
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        convert(tmp_path / "a.safetensors", log=log)
    assert sd.read_flat(tmp_path / "a.flat.safetensors")


class Broken(io.StringIO):
    """A stream that nobody reads any more."""

    encoding = "ascii"

    def __init__(self, error):
        super().__init__()
        self.error, self.file = error, open(os.devnull, "w")  # noqa: SIM115

    def write(self, text):
        raise self.error

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize(
    "number, status", [(32, 0), (28, 2)], ids=["nobody reads it", "its disk is full"]
)
def test_a_broken_standard_output_does_not_break_the_work(
    tmp_path, monkeypatch, capsys, number, status
):
    monkeypatch.chdir(tmp_path)
    ended = 0
    with contextlib.redirect_stdout(Broken(OSError(number, os.strerror(number)))):
        try:
            app.main(["--steps", "1", "--width", "64", "--height", "64"])
        except SystemExit as stop:
            ended = stop.code
    assert ended == status and Image.open("out.png").size == (64, 64)
    assert ("standard output is not writable" in capsys.readouterr().err) == (status == 2)


# %% 8. Names that are taken -----------------------------------------------------------------------


def test_a_name_is_taken_only_when_the_file_is_complete(tmp_path):
    path, seen = tmp_path / "a.png", []

    def write(file):
        seen.extend(path.name for path in tmp_path.iterdir())
        file.write(b"whole")

    assert sd.write_complete(path, write, overwrite=False) == path
    assert path.read_bytes() == b"whole" and len(seen) == 1
    assert seen[0].startswith(".") and seen[0].endswith(sd.PART)


def test_a_file_system_without_second_names_will_do(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "a.png"
    names = [sd.write_complete(path, lambda f: f.write(b"x"), overwrite=False) for _ in range(2)]
    assert [name.name for name in names] == ["a.png", "a-2.png"]
    assert all(name.read_bytes() == b"x" for name in names) and len(list(tmp_path.iterdir())) == 2


def test_only_what_nobody_holds_is_cleared_away(tmp_path):
    stale, young, held, other = (tmp_path / name for name in (
        f".a{sd.PART}", f".b{sd.PART}", f".c{sd.PART}", ".d.part"
    ))  # fmt: skip
    for path in (stale, young, held, other):
        path.write_bytes(b"half")
    for path in (stale, held, other):
        os.utime(path, (0, 0))
    with open(held, "rb") as file:
        convert_weights.fcntl.flock(file, convert_weights.fcntl.LOCK_EX)
        convert_weights.clear_stale(tmp_path)
        assert set(tmp_path.iterdir()) == {young, held, other}
    convert_weights.clear_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {young, other}


# %% 9. Names and terminals ------------------------------------------------------------------------


def test_a_name_that_is_not_utf8_is_named(weights, tmp_path, ends):
    name = os.fsdecode(b"caf\xe9.safetensors")
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / name)
    flat = convert(tmp_path / name, log=quiet)
    assert "caf\\udce9.flat.safetensors" in ends("--model", flat)
    assert sd.read_flat(flat.rename(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("wrong", ["--steps", "--nonsense", "--width"])
def test_an_option_that_is_wrong_ends_without_a_traceback(capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        app.main([wrong, f"x{ESCAPE}"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said and not controls(said)


def test_too_little_memory_is_said(monkeypatch, ends):
    def run(_):
        raise MemoryError

    monkeypatch.setattr(app, "run", run)
    assert "not enough memory" in ends()


# %% 10. What a terminal would obey ----------------------------------------------------------------


def controls(text):
    return re.findall(r"[^\n\t -~\u00a1-\u024f]", text)


def test_every_message_is_printable():
    for error in (sd.SDError, ConversionError):
        assert not controls(str(error(f"{ESCAPE} \udcff \x9b1m \n")))
    assert sd.printable("Bär, 猫, 'a' \\") == "Bär, 猫, 'a' \\"


def test_names_from_files_do_not_reach_the_terminal(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    strange = f"a{ESCAPE}.safetensors"
    save_file(weights | {f"somebody.{ESCAPE}": torch.zeros(1)}, strange)
    convert_weights.main([strange])
    for tensors in ({ESCAPE: torch.zeros(3)}, {f"{ESCAPE}\n{k}": torch.zeros(1) for k in range(9)}):
        save_file(tensors, strange)
        with pytest.raises(SystemExit):
            convert_weights.main([strange])
        with pytest.raises(SystemExit):
            convert_weights.main([strange, "--info"])
    text = f"a house\nSteps: 1, Image: {json.dumps('no' + ESCAPE)}, RNG: {ESCAPE}"
    save_picture(Image.new("RGB", (64, 64)), tmp_path / "b.png", text)
    with pytest.raises(SystemExit):
        app.main(["--from-png", "b.png"])
    app.main(["--prompt", f"a {ESCAPE}", "--show-tokens"])
    said = capsys.readouterr()
    assert "\\x1b[31mred" in said.out and "\\x1b[31mred" in said.err
    assert not controls(said.out + said.err)


# %% Checksums, and what a file is -----------------------------------------------------------------


def test_a_checksum_is_compared_when_asked_for(weights, tmp_path):
    torch.save(weights, tmp_path / "a.ckpt")
    said = []
    convert(tmp_path / "a.ckpt", verify=True, log=said.append)
    assert re.search(r"\d+ checksums are right", said[0])
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    data[member.header_offset + 200] ^= 1  # one bit of a weight
    (tmp_path / "b.ckpt").write_bytes(data)
    convert(tmp_path / "b.ckpt", log=quiet)  # is not noticed
    with pytest.raises(ConversionError, match="the checksum is another. Download it again"):
        convert(tmp_path / "b.ckpt", tmp_path / "c.safetensors", verify=True, log=quiet)
    assert not (tmp_path / "c.safetensors").exists()
    save_file(weights, tmp_path / "d.safetensors")
    convert(tmp_path / "d.safetensors", verify=True, log=said.append)
    assert any("no checksums inside" in line for line in said)


def test_a_file_says_what_it_was_made_from(weights, folder, tmp_path, capsys):
    save_file(weights, tmp_path / "a.safetensors")
    flat = convert(tmp_path / "a.safetensors", log=quiet)
    digest = convert_weights.hash_file(tmp_path / "a.safetensors")
    assert (
        subprocess.check_output(["sha256sum", tmp_path / "a.safetensors"]).decode()[:64] == digest
    )
    assert json.loads(sd.read_header(flat)["sha256"]) == {"a.safetensors": digest}
    before = set(tmp_path.iterdir())
    convert_weights.main([str(flat), "--info"])
    said = capsys.readouterr().out
    assert digest in said and "a flat file (sd.py 1): Stable Diffusion 1.x" in said
    assert "1131 tensors" in said or "tensors float16" in said
    convert_weights.main([str(tmp_path / "a.safetensors"), "--info", "--verify"])
    said = capsys.readouterr().out
    assert "Stable Diffusion 1.x, because" in said and digest in said and '"widths"' in said
    convert_weights.main([str(folder), "--info"])
    assert "unet/diffusion_pytorch_model.safetensors" in capsys.readouterr().out
    assert set(tmp_path.iterdir()) == before


def test_a_checker_and_a_word_with_odd_shapes_are_refused(tiny, small, tmp_path):
    """The numbers are confirmed by the tensors' shapes before anything is built."""
    _, config, weights = small
    numbers = {"width": 28, "layers": 1, "heads": 2, "projection": 4}
    there = dict(tree_flatten(SafetyChecker(**numbers).parameters()))
    more = {f"safety.{name}": tensor for name, tensor in there.items()}
    path = write_file(tmp_path / "s.safetensors", config | {"safety": numbers}, weights | more)
    assert sd.StableDiffusion(path).config.safety == numbers
    words = {"cat": mx.zeros((2, 3, 4)), "dog": mx.zeros((5,))}
    for word, vectors in words.items():
        path = write_file(tmp_path / "w.safetensors", {"kind": "words"}, {word: vectors})
        with pytest.raises(sd.SDError, match="another text model"):
            textual_inversion(path)(
                tiny.config, {"text_encoder.token_embedding.weight": np.zeros((9, 40))}
            )


@pytest.mark.parametrize("count, length", [(20_001, 8), (1, 301), (20_000, 300)])
def test_a_file_of_many_or_long_names_is_read_or_refused_soon(tmp_path, soon, count, length):
    names = [f"lora_unet_{i}".ljust(length, ".") for i in range(count)]
    data = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, data)).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ConversionError, match="far more than|name of 301|belong|known|has only"):
        convert(tmp_path / "a.safetensors", log=quiet)
