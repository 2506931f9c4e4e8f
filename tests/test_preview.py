"""Previews: the matrix against what the VAE decodes, and pictures in terminals, which are played
here at pseudo-terminals: what they are sent is decoded by readers written for these tests.
"""

import base64
import contextlib
import fcntl
import functools
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import tty

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import sd
import sd_more.samplers  # noqa: F401  it adds samplers to sd.SAMPLERS
from sd_more import app, terminal
from sd_more import preview as its_preview
from sd_more.low_memory import LowMemory
from sd_more.notebook import Studio
from sd_more.options import defaults_file
from sd_more.preview import block_means, fit, preview, previewed, random_latents, regress
from sd_more.terminal import choose, fit_in, half_blocks, iterm2, kitty, of_256, screen, sixel
from sd_more.vae import TinyVAE, with_tiny_vae
from tests.reference import ROOT, as_mask
from tests.test_cli import names, paint  # noqa: F401

SMALL = {"steps": 3, "width": 64, "height": 64}
QUICK = ("--steps", "3", "--width", "64", "--height", "64", "--sampler", "ddim")


def decoded(model, x):
    """Latents -> the mean colours of their 8 x 8 pixels"""
    return block_means(np.array(model.decode(mx.array(x))))


def shown(x, matrix):
    """(b, h, w, 4) -> (b, h, w, 3) in [0, 1]"""
    return np.stack([np.asarray(preview(x[i : i + 1], matrix)) / 255 for i in range(len(x))])


def other_model(model, vae):
    """A model with this VAE, all else the same."""
    return sd.StableDiffusion.from_networks(
        model.config, model.tokenizer, model.text_encoder, model.unet, vae
    )


# %% The matrix ------------------------------------------------------------------------------------


def test_the_matrix_of_a_linear_vae_is_found(tiny):
    """To float32 rounding; also where the encoder is missing or of no use."""
    truth = np.float32([[0.1, 0.02, -0.05], [0, 0.1, 0.03], [0.04, -0.1, 0.08], [0.02, 0.05, -0.1]])

    class Linear:
        def decode(self, x):
            colours = 2 * (0.02 * (x * tiny.config.vae["scale"]) @ mx.array(truth) + 0.5) - 1
            return mx.repeat(mx.repeat(colours, 8, axis=1), 8, axis=2)

    class Encoding(Linear):
        def __init__(self, answer):
            self.answer = answer

        def encode(self, x):
            x = x[:, ::8, ::8] @ mx.array(np.eye(3, 4, dtype=np.float32) + 0.3)
            return x * self.answer, mx.zeros(x.shape)

    expected = np.concatenate([0.02 * truth, np.full((1, 3), 0.5)])
    for vae in (Linear(), Encoding(mx.nan), Encoding(0), Encoding(1e9)):
        model = other_model(tiny, vae)
        model.config = sd.replace(tiny.config)  # another model, as far as can be known
        assert np.abs(fit(model) - expected).max() < 1e-6


def test_it_is_close_to_what_is_really_decoded(tiny):
    """On latents that were painted, which it has not seen: nearly as close as the best matrix for
    these very latents is, and closer than one that was fitted to random latents.
    """
    prompts = "a red house at sunset", "a blue boat at night", "a green tree", "an umbrella"
    x = []
    for seed, prompt in enumerate(prompts):
        *_, last = tiny.generate_latents(prompt, seed=seed, steps=6, sampler="ddim")
        x.append(last)
    x = mx.concatenate(x)
    truth = decoded(tiny, x)
    error = lambda matrix: float(
        ((shown(x, matrix) - truth) ** 2).mean() / truth.var((0, 1, 2)).mean()
    )
    best = regress(np.array(x), truth)
    random = regress(random_latents(), decoded(tiny, random_latents()))
    assert error(best) <= error(fit(tiny)) < min(1.3 * error(best), 0.8 * error(random))


def test_in_little_memory_and_with_controls_it_is_the_same(tiny, monkeypatch):
    frugal = LowMemory()
    assert np.abs(fit(frugal) - fit(tiny)).max() < 1e-3
    monkeypatch.setattr(its_preview, "regress", lambda *_: pytest.fail("it was computed again"))
    assert fit(tiny.controlled()) is fit(tiny)


def write_tiny_vae(path):
    """A flat file of random weights."""
    rng = np.random.default_rng(0)
    weights = {
        f"vae.{name}": mx.array(rng.standard_normal(p.shape, np.float32) / max(1, p[0].size) ** 0.5)
        for name, p in tree_flatten(TinyVAE(16).parameters())
    }
    told = {"format": "sd.py 1", "config": json.dumps({"kind": "tiny vae", "channels": 16})}
    mx.save_safetensors(str(path), weights, told)
    return path


def test_each_vae_has_its_own(tiny, tmp_path):
    """TAESD's kind, too: for what it was fitted to no other matrix is better."""
    own = fit(tiny)
    model = with_tiny_vae(tiny, write_tiny_vae(tmp_path / "a.safetensors"))
    matrix = fit(model)
    assert matrix.shape == (5, 3) and np.isfinite(matrix).all() and np.abs(matrix - own).max() > 0.1
    x = its_preview.encode_drawn(model)
    truth = decoded(model, x)
    residue = lambda matrix: ((x @ matrix[:4] + matrix[4] - truth) ** 2).mean()
    assert residue(matrix) < min(residue(own), truth.var((0, 1, 2)).mean())
    assert fit(tiny) is own


def test_a_vae_that_decodes_to_nothing_is_said_and_does_not_end_it(tiny, capsys):
    class Broken:
        def decode(self, x):
            return mx.full((len(x), 8 * x.shape[1], 8 * x.shape[2], 3), mx.nan)

    sd.say_once.cache_clear()
    model = other_model(tiny, Broken())
    model.config = sd.replace(tiny.config)
    assert not fit(model).any() and "(NaN)" in capsys.readouterr().err


def test_a_batch_is_a_grid():
    matrix = np.float32(np.eye(5, 3))
    matrix[4] = 0.25
    x = mx.zeros((5, 2, 3, 4))
    x[4, 1, 1], x[4, 1, 2] = mx.array([0, mx.nan, 0, 0]), mx.array([0.5, -2, 2, 0])
    for count, size in ((1, (3, 2)), (2, (6, 2)), (3, (6, 4)), (4, (6, 4)), (5, (9, 4))):
        picture = preview(x[5 - count :], matrix)
        assert picture.size == size and picture.mode == "RGB"
    colours = np.asarray(picture)
    assert (colours[0, 0] == 64).all() and not colours[2:, 6:].any()
    assert colours[3, 5].tolist() == [191, 0, 255] and not colours[3, 4].any()


# %% While it is painted ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sd.SAMPLERS)
@pytest.mark.parametrize("kind", ["text", "image", "inpaint"])
def test_what_is_painted_is_the_same_to_the_bit(tiny, drawn, hole, sampler, kind):
    picture, mask = np.asarray(drawn, np.float32) / 255, np.float32(hole)
    task = {
        "text": sd.TextToImage(), "image": sd.ImageToImage(picture, 0.7),
        "inpaint": sd.Inpaint(picture, mask),
    }[kind]  # fmt: skip
    options = {"task": task, "steps": 4, "sampler": sampler, "seed": 3, "cfg": 2}
    seen = []
    a = [*tiny.generate_latents("a house", **options)]
    b = [*previewed(tiny, "a house", lambda *told: seen.append(told), **options)]
    assert len(a) == len(b) and all(map(mx.array_equal, a, b))
    assert [told[:2] for told in seen] == [(i, len(a)) for i in range(1, len(a) + 1)]
    assert {told[2].size for told in seen} == {(16, 16)}
    final, last = shown(b[-1], fit(tiny))[0], np.asarray(seen[-1][2]) / 255
    assert np.abs(final - last).mean() < 0.05  # at the end what is expected is nearly what is there


def test_what_is_shown_is_the_expected_picture_not_the_noisy_one(tiny):
    """By the law of DDIM: x after a step is x0 and eps mixed for the next t, and x0 is what the
    VAE would show. So the last answer's x0 and eps make the x that was yielded."""
    task = its_preview.Watched(sd.TextToImage())
    options = {"steps": 3, "sampler": "ddim", "seed": 1}
    start = mx.array(sd.torch_normal(1)((1, 4, 16, 16)).transpose(0, 2, 3, 1))
    condition = sd.Condition(tiny.encode_prompts(["", "a tree"]))
    denoise = tiny.denoiser(condition, tiny.config.cfg)
    x, timesteps = start, tiny.schedule.timesteps("leading", 3)
    for t, then in zip(timesteps, tiny.generate_latents("a tree", task=task, **options)):
        x0, _ = denoise(x, t)
        assert np.abs(np.array(x0 - task.x0)).max() < 1e-4
        x = then


@pytest.mark.parametrize("kind", [Studio, sd.StableDiffusion])
def test_what_a_callback_raises_ends_the_painting(kind):
    def stop(step, steps, picture):
        if step == 2:
            raise ZeroDivisionError("enough")

    with pytest.raises(ZeroDivisionError, match="enough"):
        [*previewed(kind(), "a house", stop, **SMALL)]


def test_a_studio_shows_them_too(drawn, hole):
    studio, seen = Studio(), []
    show, follow = lambda *told: seen.append(told), lambda *told: None
    options = SMALL | {"n_images": 2, "seed": 4}
    a = studio.txt2img(["a house", "a boat"], preview=show, progress=follow, **options)
    b = studio.txt2img(["a house", "a boat"], progress=False, **options)
    assert a == b and [p.info for p in a] == [p.info for p in b]
    assert [told[:2] for told in seen] == [(1, 3), (2, 3), (3, 3)] * 2
    assert {told[2].size for told in seen} == {(16, 8)}
    seen.clear()
    studio.inpaint("a boat", drawn, as_mask(hole), steps=2, preview=show, progress=follow)
    studio.img2img("a boat", drawn, steps=2, strength=0.5, preview=show)
    assert [told[:2] for told in seen] == [(1, 2), (2, 2), (1, 1)]


# %% Pictures as text, read back -------------------------------------------------------------------


def noise(w, h, colours=None, seed=0):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 256, (colours or w * h, 3), np.uint8)
    return Image.fromarray(table[rng.integers(0, len(table), (h, w))])


def read_png(data):
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        return picture.convert("RGB")


def read_kitty(text):
    """-> [(keys, data)], chunks put together."""
    commands, open_keys, data = [], None, b""
    for keys, part in re.findall(r"\x1b_G([^;\x1b]*)(?:;([^\x1b]*))?\x1b\\", text):
        keys = dict(key.split("=") for key in keys.split(",") if key)
        assert len(part) <= 4096 and (len(part) % 4 == 0)
        open_keys = open_keys or keys
        assert open_keys is keys or keys.keys() <= {"m", "q"}
        data += base64.b64decode(part, validate=True)
        if keys.get("m", "0") == "0":
            commands.append((open_keys, data))
            open_keys, data = None, b""
    assert open_keys is None
    return commands


def read_sixel(text):
    """-> pixels (h, w, 3) in percent, -1 where none was painted."""
    body = re.fullmatch(r"\x1bP[\d;]*q(.*)\x1b\\", text, re.DOTALL)[1]
    colours, colour, x, y = {}, None, 0, 0
    size = re.match(r'"1;1;(\d+);(\d+)', body)
    w, h = map(int, size.groups())
    canvas = np.full((h + 6, w, 3), -1)
    for define, use, count, char, move in re.findall(
        r"#(\d+;2;\d+;\d+;\d+)|#(\d+)|(?:!(\d+))?([?-~])|([$-])", body[size.end() :]
    ):
        if define:
            number, _, *rgb = map(int, define.split(";"))
            assert max(rgb) <= 100
            colours[number] = rgb
        elif use:
            colour = colours[int(use)]
        elif char:
            for _ in range(int(count or 1)):
                assert x < w
                for bit in range(6):
                    if (ord(char) - 63) >> bit & 1:
                        canvas[y + bit, x] = colour
                x += 1
        else:
            x, y = 0, y + 6 * (move == "-")
    left = re.sub(r"#\d+(;2;\d+;\d+;\d+)?|(!\d+)?[?-~]|[$-]", "", body[size.end() :])
    assert left == "" and len(colours) <= 256 and (canvas[h:] == -1).all()
    return canvas[:h]


def xterm_256(n):
    """-> (r, g, b), as xterm's 256colres.pl computes them."""
    if n >= 232:
        return [8 + 10 * (n - 232)] * 3
    n -= 16
    return [i and 55 + 40 * i for i in (n // 36, n // 6 % 6, n % 6)]


COLOUR = r"(2;\d+;\d+;\d+|5;\d+)"
PAIR = f"38;{COLOUR};48;{COLOUR}"


def read_colour(code):
    kind, *numbers = map(int, code.split(";"))
    return numbers if kind == 2 else xterm_256(*numbers)


def read_blocks(text):
    """-> pixels (2h, w, 3)"""
    rows = []
    for line in text.split("\r\n"):
        cells = re.findall(rf"\x1b\[{PAIR}m▀", line)
        assert line.endswith("\x1b[0m") and line.count("▀") == len(cells)
        rows += [[read_colour(cell[k]) for cell in cells] for k in (0, 1)]
    return np.array(rows)


@pytest.mark.parametrize("size", [(1, 1), (16, 9), (64, 64)])
def test_kittys_and_iterm2s_chunks_are_the_picture(size):
    picture = noise(*size)
    delete, (keys, data) = read_kitty(kitty(picture, 20, 10, 77))
    assert delete == ({"a": "d", "d": "I", "i": "77", "q": "2"}, b"")
    told = {"a": "T", "f": "100", "i": "77", "c": "20", "r": "10", "C": "1", "q": "2"}
    assert told.items() <= keys.items() and read_png(data) == picture
    found = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\a]*)\a", iterm2(picture, 20, 10))
    data = base64.b64decode(found[2], validate=True)
    assert read_png(data) == picture
    assert {"inline=1", "width=20", "height=10", f"size={len(data)}"} <= set(found[1].split(";"))


@pytest.mark.parametrize("size", [(1, 1), (5, 6), (7, 13), (40, 24), (3, 100)])
def test_sixels_are_the_picture(size):
    """With few colours exactly, but for percents; with many to what a palette of them loses."""
    picture = noise(*size, colours=20)
    truth = np.asarray(picture) / 2.55
    assert np.abs(read_sixel(sixel(picture)) - truth).max() <= 0.5 + 1e-9
    picture = Image.linear_gradient("L").resize((60, 50)).convert("RGB")
    assert np.abs(read_sixel(sixel(picture)) - np.asarray(picture) / 2.55).max() < 2


@pytest.mark.parametrize("size", [(1, 2), (5, 6), (32, 32)])
def test_half_blocks_are_the_picture(size):
    picture = noise(*size)
    truth = np.asarray(picture).astype(int)
    assert np.array_equal(read_blocks(half_blocks(picture, true_colour=True)), truth)
    ours = read_blocks(half_blocks(picture, true_colour=False))
    table = np.array([xterm_256(n) for n in range(16, 256)])
    best = ((truth[:, :, None] - table) ** 2).sum(-1).min(-1)
    assert np.array_equal(((ours - truth) ** 2).sum(-1), best)  # no other colour is nearer


def test_of_256_colours_each_finds_itself():
    table = np.array([xterm_256(n) for n in range(16, 256)])
    assert np.array_equal(table[of_256(table[None])[0] - 16], table)


@pytest.mark.parametrize("size, columns, lines, cell, shape", [
    ((64, 64), 80, 24, (10, 20), (32, 16)), ((8, 8), 200, 60, (10, 20), (32, 16)),
    ((128, 64), 80, 24, (10, 20), (32, 8)), ((64, 128), 80, 24, (10, 20), (16, 16)),
    ((64, 64), 80, 24, (10, 10), (16, 16)), ((64, 64), 80, 11, (10, 20), (16, 8)),
    ((1000, 8), 80, 24, (10, 20), (32, 1)), ((64, 64), 80, 1, (10, 20), (2, 1)),
])  # fmt: skip
def test_a_picture_fits_and_keeps_its_shape(size, columns, lines, cell, shape):
    assert fit_in(size, terminal.Size(columns, lines, cell)) == shape


# %% Terminals, played -----------------------------------------------------------------------------

KITTY_OK, DA1 = b"\x1b_Gi=31;OK\x1b\\", b"\x1b[?62;22c"
SIXEL = b"\x1b[?62;4;22c"
NAMED = "\x1bP>|{}\x1b\\".format
ANSWERS = {  # what terminals answer: the way that is chosen
    "kitty": (KITTY_OK + NAMED("kitty(0.35)").encode() + b"\x1b[?62;c", "kitty"),
    "kitty and sixel": (KITTY_OK + SIXEL, "kitty"),
    "iTerm2": (NAMED("iTerm2 3.5.0").encode() + SIXEL, "iterm2"),
    "WezTerm": (NAMED("WezTerm 20240203").encode() + SIXEL, "iterm2"),
    "xterm -ti vt340": (NAMED("XTerm(390)").encode() + b"\x1b[?63;1;2;4;6;9;15;22c", "sixel"),
    "xterm": (NAMED("XTerm(390)").encode() + b"\x1b[?64;1;2;6;9;15;18;21;22c", "half blocks"),
    "class 4": (b"\x1b[?4;6c", "half blocks"),  # a VT132's: the first number is no attribute
    "refusal": (b"\x1b_Gi=31;ENOTSUPPORTED:no\x1b\\" + DA1, "half blocks"),
    "no end": (KITTY_OK, "half blocks"),
    "nothing": (b"", "half blocks"),
    "noise": (b"\x1b[\x1b[?\x1b_G;;\xff\xfe" + DA1, "half blocks"),
}
PLAIN = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_way_is_chosen_by_the_answer(name):
    answer, way = ANSWERS[name]
    assert choose(answer, {}) == way


def test_iterm2_before_it_had_an_answer_is_known_by_its_variable():
    env = {"TERM_PROGRAM": "iTerm.app"}
    assert choose(DA1, env) == "iterm2" and choose(b"", env) == "half blocks"
    assert choose(ANSWERS["xterm"][0], env) == "half blocks"  # started inside iTerm2


class Terminal:
    """The other side of a pseudo-terminal: answers the question, so late, and keeps what it is
    sent. stream: the program's.
    """

    def __init__(self, answer=b"", delay=0, size=(24, 80, 0, 0)):
        self.master, self.slave = os.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", *size))
        self.answer, self.delay, self.sent, self.marks = answer, delay, b"", 0
        self.asked = threading.Event()
        self.modes = termios.tcgetattr(self.slave)
        self.thread = threading.Thread(target=self.play, daemon=True)
        self.thread.start()

    def play(self):
        with contextlib.suppress(OSError):  # the end
            while data := os.read(self.master, 65536):
                self.sent += data
                if b"\x1b[c" in self.sent and not self.asked.is_set():
                    self.asked.set()
                    time.sleep(self.delay)
                    os.write(self.master, self.answer)

    @functools.cached_property
    def stream(self):
        return open(os.dup(self.slave), "w", encoding="utf-8")

    def check_left_in_order(self):
        """The modes are those of before, and nothing waits to be read."""
        assert termios.tcgetattr(self.slave) == self.modes
        tty.setcbreak(self.slave, termios.TCSANOW)
        new = termios.tcgetattr(self.slave)
        new[6][termios.VMIN] = 0
        termios.tcsetattr(self.slave, termios.TCSANOW, new)
        assert os.read(self.slave, 1000) == b""
        termios.tcsetattr(self.slave, termios.TCSANOW, self.modes)

    def settle(self):
        """-> all that was written, once it is read: a mark that is written behind it has come."""
        self.marks += 1
        os.write(self.slave, b"\0")
        end = time.monotonic() + 60
        while self.sent.count(b"\0") < self.marks and time.monotonic() < end:
            time.sleep(0.01)
        return self.sent.replace(b"\0", b"").decode()


@pytest.fixture
def play(monkeypatch):
    """Makes terminals. One that answers at once is waited for longer, as this machine may be busy;
    not by other processes.
    """
    made, usual = [], terminal.TIMEOUT

    def make(answer=b"", delay=0, **options):
        prompt = terminal.ATTRIBUTES.search(answer) and delay < usual
        monkeypatch.setattr(terminal, "TIMEOUT", 20 if prompt else usual)
        made.append(Terminal(answer, delay, **options))
        return made[-1]

    sd.say_once.cache_clear()
    yield make
    for each in made:
        os.close(each.slave)
        if "stream" in vars(each):
            each.stream.close()
        each.thread.join(5)
        os.close(each.master)


class Shown:
    """What somebody sees who sent this to a terminal: text in rows, and pictures, {(row, column):
    (kind, what, columns, lines)}. Rows count from the first one on, also after it scrolled away.
    """

    TOKEN = re.compile(
        r"\x1b_G[^\x1b]*\x1b\\|\x1bP.*?\x1b\\|\x1b\][^\a]*\a|\x1b\[[?>\d;]*[A-Za-z]|\x1b[78]|[^\x1b]",
        re.DOTALL,
    )

    def __init__(self, text, lines=24, columns=80):
        self.lines, self.columns, self.top = lines, columns, 0
        self.row = self.column = 0
        self.saved, self.colour, self.cells, self.pictures = (0, 0), "", {}, {}
        self.chunks = ""
        tokens = self.TOKEN.findall(text)
        assert "".join(tokens) == text
        for token in tokens:
            self.take(token)

    def take(self, token):
        if token.startswith("\x1b_G"):
            self.take_kitty(token)
        elif token.startswith("\x1bP"):
            pixels = read_sixel(token)
            self.pictures[self.row, self.column] = "sixel", pixels, None, None
        elif token.startswith("\x1b]1337"):
            shape = [int(n) for n in re.search(r"width=(\d+);height=(\d+)", token).groups()]
            data = base64.b64decode(token.partition(":")[2][:-1])
            self.pictures[self.row, self.column] = ("iterm2", read_png(data), *shape)
        elif token.startswith("\x1b["):
            self.take_control(token[2:-1], token[-1])
        elif token == "\x1b7":
            self.saved = self.row, self.column
        elif token == "\x1b8":
            self.row, self.column = self.saved
        elif token == "\r":
            self.column = 0
        elif token == "\n":
            self.down()
        else:
            if self.column == self.columns:
                self.column = 0
                self.down()
            self.cells[self.row, self.column] = token, self.colour
            self.column += 1

    def down(self):
        self.row += 1
        self.top = max(self.top, self.row - self.lines + 1)

    def take_control(self, numbers, letter):
        if letter == "A":
            self.row = max(self.top, self.row - int(numbers))
        elif letter == "B":
            self.row = min(self.top + self.lines - 1, self.row + int(numbers))
        elif letter == "m":
            self.colour = "" if numbers == "0" else numbers
        elif letter == "K":
            for column in range(self.column, self.columns):
                self.cells.pop((self.row, column), None)
        else:
            assert (numbers, letter) in {(">", "q"), ("", "c")}

    def take_kitty(self, token):
        if "a=q" in token:
            return
        self.chunks += token
        if "m=1" in token:
            return
        ((keys, data),) = read_kitty(self.chunks)
        self.chunks = ""
        if keys["a"] == "d":
            old = [at for at, told in self.pictures.items() if told[0] == "kitty" + keys["i"]]
            for at in old:
                del self.pictures[at]
            return
        told = read_png(data), int(keys["c"]), int(keys["r"])
        self.pictures[self.row, self.column] = ("kitty" + keys["i"], *told)

    def text(self, row):
        """A row's, without blocks."""
        cells = [self.cells.get((row, column), " ")[0] for column in range(self.columns)]
        return "".join(cells).replace("▀", "").rstrip()

    def texts(self):
        last = max(row for row, _ in self.cells)
        return [self.text(row) for row in range(last + 1) if self.text(row)]

    def blocks(self):
        """-> {first row: pixels (2h, w, 3)} of half blocks that stand together"""
        found, last = {}, None
        for row in sorted({row for (row, _), cell in self.cells.items() if cell[0] == "▀"}):
            cells = [c for (r, _), c in sorted(self.cells.items()) if r == row and c[0] == "▀"]
            pairs = [re.fullmatch(PAIR, colour).groups() for _, colour in cells]
            pair = [[read_colour(pair[k]) for pair in pairs] for k in (0, 1)]
            first = last if last is not None and row == last + len(found[last]) // 2 else row
            found[first] = found.get(first, []) + pair
            last = first
        return {row: np.array(pixels) for row, pixels in found.items()}


COLOURS = [Image.new("RGB", (16, 16), colour) for colour in ("red", "#204060", "#e0c010")]


def run(show, stream, pictures=COLOURS):
    """As the command line does it."""
    for i, picture in enumerate(pictures, 1):
        show(i, len(pictures), picture)
        stream.write(f"step {i}/{len(pictures)} ")
        stream.write("\r" if i < len(pictures) else "\n")
        stream.flush()


@pytest.mark.parametrize("at", [0, 20])  # the line where it begins; at the end it scrolls
@pytest.mark.parametrize("name", ANSWERS)
def test_each_terminal_shows_the_last_picture_above_the_progress(play, name, at):
    answer, way = ANSWERS[name]
    played = play(answer)
    stream = played.stream
    stream.write("\n" * at + "painting\n")
    with screen(stream, PLAIN) as show:
        played.check_left_in_order()
        run(show, stream)
    stream.write("saved\n")
    stream.flush()
    seen = Shown(played.settle())
    played.check_left_in_order()
    assert [seen.text(at + i) for i in (0, 17, 18)] == ["painting", "step 3/3", "saved"]
    assert seen.texts() == ["painting", "step 3/3", "saved"]
    assert (seen.row, seen.column) == (at + 19, 0)
    if way == "half blocks":
        ((row, pixels),) = seen.blocks().items()
        assert row == at + 1 and pixels.shape == (32, 32, 3) and not seen.pictures
        assert (pixels == (0xE0, 0xC0, 0x10)).all()
        return
    (((row, column), (kind, picture, *shape)),) = seen.pictures.items()
    assert (row, column) == (at + 1, 0) and kind.startswith(way) and not seen.blocks()
    if way == "sixel":
        assert picture.shape == (320, 320, 3)
        assert np.abs(picture * 2.55 - (0xE0, 0xC0, 0x10)).max() < 1.3
    else:
        assert picture == COLOURS[2] and shape == [32, 16]


@pytest.mark.parametrize("env, pixels", [
    ({"COLORTERM": "truecolor"}, (32, 64, 96)), ({"COLORTERM": "24bit"}, (32, 64, 96)),
    ({}, (0, 95, 95)),
])  # fmt: skip
def test_how_many_colours_half_blocks_have(play, env, pixels):
    played = play()
    with screen(played.stream, {"TERM": "tmux-256color"} | env) as show:
        run(show, played.stream, COLOURS[:2])
    (found,) = Shown(played.settle()).blocks().values()
    assert (found == pixels).all()


@pytest.mark.parametrize("more", [
    {"TMUX": "/tmp/tmux,1,0"}, {"STY": "1.a"}, {"TERM": "screen.xterm"}, {"TERM": "tmux-256color"},
    {"TERM": "linux"},
], ids=str)  # fmt: skip
def test_where_others_would_answer_nothing_is_asked(play, more):
    played = play(ANSWERS["kitty"][0])
    with screen(played.stream, PLAIN | {"TERM_PROGRAM": "iTerm.app"} | more) as show:
        run(show, played.stream)
    seen = Shown(played.settle())
    assert not played.asked.is_set() and not seen.pictures and len(seen.blocks()) == 1
    played.check_left_in_order()


def test_an_answer_that_takes_its_time_is_heard(play):
    played = play(SIXEL, delay=0.1)
    with screen(played.stream, PLAIN) as show:
        played.check_left_in_order()
        run(show, played.stream)
    assert Shown(played.settle()).pictures
    played.check_left_in_order()


def test_an_answer_that_comes_too_late_is_thrown_away(play):
    played = play(ANSWERS["kitty"][0], delay=0.6)
    with screen(played.stream, PLAIN) as show:
        assert termios.tcgetattr(played.slave) == played.modes
        time.sleep(0.7)
        run(show, played.stream)
    played.settle()
    played.check_left_in_order()


def test_what_was_typed_ahead_is_kept(play):
    played = play(ANSWERS["kitty"][0])
    os.write(played.master, b"make\n")
    time.sleep(0.1)
    with screen(played.stream, PLAIN) as show:
        run(show, played.stream)
    assert os.read(played.slave, 100) == b"make\n" and not played.asked.is_set()
    assert len(Shown(played.settle().replace("make\r\n", "")).blocks()) == 1


@pytest.mark.parametrize("env, size, encoding, why", [
    ({"TERM": "dumb"}, (24, 80), "utf-8", "text only"), ({}, (24, 80), "utf-8", "text only"),
    (PLAIN | {"NO_COLOR": "1"}, (24, 80), "utf-8", "NO_COLOR"),
    (PLAIN, (24, 44), "utf-8", "fewer than 45 columns"), (PLAIN, (24, 80), "ascii", "not in ascii"),
])  # fmt: skip
def test_where_nothing_can_be_shown_it_is_said_once(
    play, monkeypatch, capsys, env, size, encoding, why
):
    played = play(ANSWERS["xterm"][0], size=(*size, 0, 0))
    monkeypatch.setattr(terminal, "TIMEOUT", 0.3)  # it answers once
    with open(os.dup(played.slave), "w", encoding=encoding) as stream:
        for _ in range(2):
            with screen(stream, env) as show:
                assert show is None
    said = capsys.readouterr().err
    assert said.startswith("sd.py: no preview: ") and why in said and said.count("\n") == 1
    assert "▀" not in played.settle()
    played.check_left_in_order()


def test_no_color_is_of_no_matter_to_real_pictures(play):
    played = play(ANSWERS["kitty"][0])
    with screen(played.stream, PLAIN | {"NO_COLOR": "1"}) as show:
        run(show, played.stream)
    assert len(Shown(played.settle()).pictures) == 1


def test_a_terminal_without_a_size_has_the_usual_one(play):
    played = play(size=(0, 0, 0, 0))
    assert terminal.measure(played.stream) == (80, 24, (10, 20))
    assert terminal.measure(play(size=(50, 100, 900, 800)).stream) == (100, 50, (9, 16))


def test_what_is_written_in_between_is_not_painted_over(play):
    """Nor where the terminal got another size: then the next picture stands below."""
    played, lines = play(), []
    stream = played.stream
    with screen(stream, PLAIN, lambda: len(lines)) as show:
        for step in (1, 2, 3, 4):
            show(step, 4, COLOURS[0])
            stream.write(f"step {step}\r")
            if step == 2:
                stream.write("a message\n")
                lines.append(1)
            stream.flush()
    seen = Shown(played.settle())
    assert seen.texts() == ["a message", "step 4"] and [*seen.blocks()] == [0, 17]
    with screen(stream, PLAIN) as show:
        show(1, 2, COLOURS[0])
        before = len(played.settle())
        fcntl.ioctl(played.slave, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
        show(2, 2, COLOURS[0])
    assert "\x1b[K" in played.settle()[before:]


def test_a_terminal_that_is_gone_ends_nothing(play):
    played = play()
    with screen(played.stream, PLAIN) as show:
        show(1, 3, COLOURS[0])
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), played.stream.fileno())
        show(2, 3, COLOURS[0])
        show(3, 3, COLOURS[0])


def test_ctrl_c_inside_a_picture_does_not_swallow_what_follows(play, monkeypatch):
    played, write = play(ANSWERS["kitty"][0]), terminal.write_all

    def interrupted(fd, data):
        if b"_Ga=T" in data:
            write(fd, data[: len(data) // 2])
            raise KeyboardInterrupt
        write(fd, data)

    with screen(played.stream, PLAIN) as show:
        monkeypatch.setattr(terminal, "write_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            show(1, 3, noise(64, 64))
        played.stream.write("stopped\n")
    text = played.settle()
    start = text.index("\x1b_Ga=T")
    end = text.index("\x1b\\", text.rindex("\x1b_G"))
    seen = Shown(text[:start] + text[end + 2 :])
    assert seen.text(16) == "stopped" and start < end


# %% The command line ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_defaults(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))


@pytest.fixture
def at(monkeypatch, tmp_path):
    """The command line in this process, with a played terminal for its standard error, and if
    stdout is true for its output -> what is seen there. status: how it is to end.
    """

    def at(played, *options, stdout=True, status=0):
        monkeypatch.chdir(tmp_path)
        for name, value in (PLAIN | {"NO_COLOR": ""}).items():
            monkeypatch.setenv(name, value)
        for name in ("TMUX", "STY", "TERM_PROGRAM"):
            monkeypatch.delenv(name, raising=False)
        ended = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", played.stream)
            if stdout:
                patch.setattr(sys, "stdout", played.stream)
            try:
                app.main([str(option) for option in options])
            except SystemExit as stop:
                ended = stop.code
        assert ended == status
        seen = played.settle()
        played.check_left_in_order()
        return Shown(seen, lines=200)

    return at


@pytest.mark.parametrize("name", ["kitty", "iTerm2", "xterm -ti vt340", "nothing"])
@pytest.mark.parametrize("more", [(), ("--low-memory",), ("--sampler", "plms", "--upscale", "1.5")])
def test_the_file_is_the_same_with_and_without(play, paint, at, tmp_path, name, more):  # noqa: F811
    paint("a house", *QUICK, *more, "-o", "a.png")
    seen = at(play(ANSWERS[name][0]), "a house", *QUICK, *more, "-o", "b.png", "--preview")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    runs = 2 if "--upscale" in more else 1
    assert len(seen.pictures) + len(seen.blocks()) == runs
    lines = seen.texts()
    assert "saved b.png" in lines and sum("step" in line for line in lines) == runs
    assert any(line.startswith("step 3/3") for line in lines)
    assert not any(word in " ".join(lines) for word in ("step 1/3", "62;", "kitty", "no preview"))


def test_where_standard_error_is_no_terminal_it_is_off(paint, tmp_path):  # noqa: F811
    (tmp_path / "p.txt").write_text("a house\na boat\n")
    out, err = paint("--prompts", "p.txt", *QUICK, "--preview")
    assert err.count("no preview: standard error is no terminal.") == 1
    assert "\x1b" not in out + err and "step 3/3" in err
    assert names(tmp_path) == {"p.txt", "out.png", "out-2.png"}


def test_standard_output_may_be_a_file(play, at, capsys):
    seen = at(play(), "a house", *QUICK, "--preview", stdout=False)
    assert len(seen.blocks()) == 1 and capsys.readouterr().out == "saved out.png\n"


def test_each_prompt_of_a_file_keeps_its_last_picture(play, at, tmp_path):
    (tmp_path / "p.txt").write_text("a house\na boat --n-images 2\na tree -W 128\n")
    seen = at(play(), "--prompts", "p.txt", *QUICK, "--preview")
    shapes = [pixels.shape[:2] for pixels in seen.blocks().values()]
    assert shapes == [(32, 32), (16, 32), (16, 32)]
    assert sum(line.startswith("step 3/3") for line in seen.texts()) == 3
    assert sum(line.startswith("saved") for line in seen.texts()) == 4
    assert played_picture(seen, 0, tmp_path / "out.png") < 0.1


def played_picture(seen, number, path):
    """How far what is shown is from what was saved: the mean difference, from 0 to 1."""
    pixels_shown = [*seen.blocks().values()][number]
    with Image.open(path) as picture:
        small = picture.convert("RGB").resize(pixels_shown.shape[1::-1], Image.BOX)
    return np.abs(pixels_shown - np.asarray(small, float)).mean() / 255


def test_one_line_of_a_file_has_no_preview_of_its_own(paint, tmp_path):  # noqa: F811
    (tmp_path / "p.txt").write_text("a house --preview\n")
    assert "--preview is for all lines" in paint("--prompts", "p.txt", *QUICK, status=2).err


def test_pictures_that_are_kept_on_the_way_are_still_said(play, at):
    seen = at(play(), "a house", *QUICK, "--preview", "--save-every", "1")
    lines = seen.texts()
    assert lines.count("saved out-step-001.png") == lines.count("saved out-step-002.png") == 1
    assert len(seen.blocks()) == 3 and any(line.startswith("step 3/3") for line in lines)


def test_quiet_is_quiet(play, at):
    played = play()
    seen = at(played, "a house", *QUICK, "--preview", "--quiet")
    why = "sd.py: --preview has no effect: with --quiet nothing of the progress is shown."
    assert seen.texts() == [why, "saved out.png"] and not played.asked.is_set()
    assert not seen.blocks()


def test_defaults_of_ones_own_may_have_it(play, at, tmp_path):
    path = defaults_file()
    path.parent.mkdir(parents=True)
    path.write_text("preview = true\n")
    assert len(at(play(), "a house", *QUICK).blocks()) == 1
    seen = at(play(), "a house", *QUICK, "--quiet")
    assert seen.texts() == ["saved out-2.png"]
    path.write_text("quiet = true\n")
    seen = at(play(), "a house", *QUICK, "--preview")
    assert not seen.blocks() and "--quiet" in seen.texts()[0]


# %% As a program of its own, at its own terminal --------------------------------------------------


LAUNCH = """
import fcntl, os, subprocess, sys, termios

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal becomes that of this session
if sys.argv[1] == "foreground":
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
sys.exit(subprocess.run([sys.executable, *sys.argv[2:]], process_group=0).returncode)
"""


def start(played, *options, place="foreground"):
    """sd.py at a played terminal, with all three streams there."""
    words = [place, ROOT / "sd.py", "a house", *QUICK, "--preview", *options]
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), played.slave)
    command, env = [sys.executable, "-c", LAUNCH, *words], os.environ | PLAIN
    return subprocess.Popen(command, **ends, env=env, start_new_session=True)


@pytest.mark.parametrize("how, status", [("key", 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_when_it_is_ended_while_it_asks_the_terminal_is_as_before(play, tmp_path, how, status):
    """And the answer, which comes after that, does not stay for whoever reads next."""
    played = play(ANSWERS["kitty"][0], delay=0.15)
    process = start(played, "-o", tmp_path / "a.png")
    assert played.asked.wait(60)
    if how == "key":
        os.write(played.master, b"\x03")
    else:
        process.send_signal(how)
    assert process.wait(60) == status
    played.settle()
    played.check_left_in_order()
    assert not names(tmp_path)


@pytest.mark.parametrize("how, status", [("key", 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_when_it_is_ended_while_it_shows_the_terminal_is_as_before(play, tmp_path, how, status):
    played = play()
    process = start(played, "-o", tmp_path / "a.png", "--steps", "500")
    end = time.monotonic() + 60
    while played.sent.count("▀".encode()) < 1024 and time.monotonic() < end:
        time.sleep(0.01)
    if how == "key":
        os.write(played.master, b"\x03")
    else:
        process.send_signal(how)
    assert process.wait(60) == status
    text = played.settle()
    played.check_left_in_order()
    if how == "key":
        assert Shown(text.replace("^C", "")).texts()[-1] == "sd.py: stopped"


def test_in_the_background_it_is_off(play, tmp_path):
    """Asking would stop it. A child of the terminal's session in a group of its own."""
    played = play(ANSWERS["kitty"][0])
    process = start(played, "-o", tmp_path / "a.png", place="background")
    assert process.wait(120) == 0
    assert "the program runs in the background" in played.settle()
    assert not played.asked.is_set() and names(tmp_path) == {"a.png"}
    played.check_left_in_order()
