"""Pictures in a terminal, each in the place of the last: kitty's graphics, iTerm2's, sixels, or
half blocks, of which any terminal with colours shows two pixels in a character.

    with screen(sys.stderr, os.environ) as show:  # which is None where nothing can be shown
        show(step, steps, picture)

What the terminal can show it is asked itself. Its answer would be taken for typed: so while it is
awaited, 0.3 s at most, the terminal is in another mode, which is taken back whatever happens.

    kitty     sw.kovidgoyal.net/kitty/graphics-protocol
    iTerm2    iterm2.com/documentation-images.html
    sixel     VT330/VT340 Programmer Reference Manual, volume 2, chapter 14
    answers   invisible-island.net/xterm/ctlseqs (DA1, XTVERSION)
"""

import base64
import contextlib
import fcntl
import io
import os
import re
import select
import struct
import termios
import time
from collections import namedtuple

import numpy as np
from PIL import Image

import sd

COLUMNS, LINES = 32, 16  # at most, of a picture
LEAST = 45  # columns that the line which tells the progress needs
CELL = (
    10,
    20,
)  # a character's width and height in pixels, where the terminal does not say: a VT340's
ESC, STRING_END = "\x1b", "\x1b\\"

# %% A picture as text for a terminal --------------------------------------------------------------


def write_png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def kitty(picture, columns, lines, number):
    """A PIL picture -> text that shows it on so many columns and lines, in the place of the last
    one with that number. q=2: without an answer; C=1: the cursor stays.
    """
    code = write_png(picture)
    parts = [code[i : i + 4096] for i in range(0, len(code), 4096)]
    first = f"a=T,f=100,i={number},p=1,c={columns},r={lines},C=1,q=2,"
    keys = [first, *[""] * (len(parts) - 1)]
    more = [1] * (len(parts) - 1) + [0]
    chunks = [f"{ESC}_G{key}m={m};{part}{STRING_END}" for key, m, part in zip(keys, more, parts)]
    return f"{ESC}_Ga=d,d=I,i={number},q=2{STRING_END}" + "".join(chunks)


def iterm2(picture, columns, lines):
    """A PIL picture -> text that shows it on so many columns and lines."""
    code = write_png(picture)
    size = len(base64.b64decode(code))
    shape = f"inline=1;size={size};width={columns};height={lines};preserveAspectRatio=0"
    return f"{ESC}]1337;File={shape}:{code}\a"


def sixel(picture):
    """A PIL picture -> text that shows it, pixel by pixel, in up to 128 colours.

    Bands of six rows; in each, for each colour in it, a character for each column, whose six bits
    above "?" are the pixels of that colour. !5~ is ~~~~~, $ goes back to the band's beginning, and
    - to the next band.
    """
    small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    pixels = np.asarray(small)
    h, w = pixels.shape
    percent = np.rint(np.reshape(small.getpalette("RGB"), (-1, 3)) / 2.55).astype(int)
    colours = [f"#{i};2;{r};{g};{b}" for i, (r, g, b) in enumerate(percent)]
    bands = "-".join(sixel_band(pixels[top : top + 6]) for top in range(0, h, 6))
    return f'{ESC}P0;1q"1;1;{w};{h}' + "".join(colours) + bands + STRING_END


def sixel_band(pixels):
    """Numbers of colours (up to 6, w) -> text. Zeros at a row's end are left out."""
    colours = np.unique(pixels)
    weights = 1 << np.arange(len(pixels))
    bits = np.einsum("r,crw->cw", weights, pixels == colours[:, None, None])
    rows, starts = np.nonzero(np.diff(bits, axis=1, prepend=-1))  # where runs begin, row by row
    ends = np.append(starts[1:], 0)
    ends[ends == 0] = pixels.shape[1]
    runs = zip(rows.tolist(), (ends - starts).tolist(), bits[rows, starts].tolist(), ends.tolist())
    text = [[f"#{colour}"] for colour in colours]
    for row, length, value, end in runs:
        if value or end < pixels.shape[1]:
            text[row].append(
                f"!{length}{chr(63 + value)}" if length > 3 else chr(63 + value) * length
            )
    return "$".join(map("".join, text))


def half_blocks(picture, true_colour):
    """A PIL picture, 2h high -> text of h lines of upper half blocks: the upper pixel is the colour
    of the block, the lower one that of what is behind it.
    """
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    if true_colour:
        names = [["2;{};{};{}".format(*colour) for colour in row] for row in pixels.tolist()]
    else:
        names = [[f"5;{number}" for number in row] for row in of_256(pixels).tolist()]
    pairs = [zip(*pair) for pair in zip(names[::2], names[1::2])]
    lines = ["".join(f"{ESC}[38;{a};48;{b}m\u2580" for a, b in pair) for pair in pairs]
    return "\r\n".join(f"{line}{ESC}[0m" for line in lines)


CUBE = np.array([0, 95, 135, 175, 215, 255])  # the levels of xterm's colours 16 to 231
GREYS = np.arange(8, 248, 10)  # 232 to 255


def of_256(pixels):
    """(h, w, 3) -> (h, w), the nearest of xterm's 256 colours; not of the first 16, which vary."""
    nearest = lambda levels, x: np.abs(x[..., None] - levels).argmin(-1)
    cube, grey = nearest(CUBE, pixels), nearest(GREYS, pixels.mean(-1))
    distance = lambda colours: ((pixels - colours) ** 2).sum(-1)
    closer = distance(GREYS[grey][..., None]) < distance(CUBE[cube])
    return np.where(closer, 232 + grey, 16 + cube @ [36, 6, 1])


# %% What a terminal can show ----------------------------------------------------------------------

TIMEOUT = 0.3  # seconds, for an answer
# Does it know kitty's graphics (here one pixel, not to be shown), what is its name, what is it?
# The last is answered by all, and answers come in order.
QUESTIONS = f"{ESC}_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA{STRING_END}{ESC}[>q{ESC}[c".encode()
ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")  # the answer to the last: DA1
NAMED = re.compile(rb"\x1bP>\|([^\x1b]*)\x1b\\")  # XTVERSION
WITH_ITERM2 = "iTerm", "WezTerm", "mintty"  # who know its pictures, as their names begin


def choose(answer, env):
    """-> how a terminal shows pictures that answered this: kitty, iterm2, sixel or half blocks."""
    attributes, name = ATTRIBUTES.search(answer), NAMED.search(answer)
    if attributes is None:
        return "half blocks"
    if b"\x1b_Gi=31;OK\x1b\\" in answer:
        return "kitty"
    name = name[1].decode("ascii", "replace") if name else env.get("TERM_PROGRAM", "")
    if name.startswith(WITH_ITERM2):
        return "iterm2"
    return "sixel" if b"4" in attributes[1].split(b";")[1:] else "half blocks"


def may_ask(env):
    """Would an answer be the terminal's that somebody sees? Multiplexers answer for themselves; on
    Linux's console there are no pictures, and it would print the question.
    """
    inside = {"TMUX", "STY"} & env.keys()
    return not inside and not env.get("TERM", "").startswith(("tmux", "screen", "linux"))


@contextlib.contextmanager
def asked(stream, env):
    """Yields what the terminal behind a stream answers, b"" if nothing. In the end an answer that
    came too late is thrown away, and with it what somebody may have typed.
    """
    with contextlib.ExitStack() as stack:
        answer = b""
        if may_ask(env):
            with contextlib.suppress(OSError, termios.error):  # it can't be opened, or is gone
                terminal = os.open(os.ttyname(stream.fileno()), os.O_RDWR | os.O_NOCTTY)
                stack.callback(os.close, terminal)
                answer = ask(terminal, stack)
        yield answer


def ask(terminal, stack):
    """-> the bytes of its answer. Nothing is asked where somebody has typed ahead, as that would be
    lost.
    """
    answer, end = bytearray(), time.monotonic() + TIMEOUT
    with raw(terminal):
        if select.select([terminal], [], [], 0)[0]:
            return b""
        try:
            write_all(terminal, QUESTIONS)
            listen(terminal, answer, end)
        finally:  # after Ctrl-C the answer comes all the same
            listen(terminal, answer, end)
            write_all(terminal, f"\r{ESC}[K".encode())  # some print what they don't understand
            if not ATTRIBUTES.search(answer):
                stack.callback(discard, terminal)
    return bytes(answer)


@contextlib.contextmanager
def raw(terminal):
    """What comes in is not shown, and is there at once, not only after Enter. Ctrl-C stays."""
    old, new = termios.tcgetattr(terminal), termios.tcgetattr(terminal)
    new[3] &= ~(termios.ICANON | termios.ECHO)
    new[6][termios.VMIN], new[6][termios.VTIME] = 0, 0
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, new)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, old)


def listen(terminal, answer, end):
    """Read into answer until it is complete, or the time is up."""
    while not ATTRIBUTES.search(answer) and (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            answer += os.read(terminal, 4096)


def discard(terminal):
    with contextlib.suppress(termios.error):  # it is gone
        termios.tcflush(terminal, termios.TCIFLUSH)


def write_all(terminal, data):
    while data:
        data = data[os.write(terminal, data) :]


Size = namedtuple("Size", "columns lines cell")  # cell: a character's (width, height) in pixels


def measure(stream):
    """-> the Size of the terminal behind a stream"""
    numbers = fcntl.ioctl(stream.fileno(), termios.TIOCGWINSZ, bytes(8))
    lines, columns, width, height = struct.unpack("4H", numbers)
    lines, columns = lines or 24, columns or 80
    cell = width // columns, height // lines
    return Size(columns, lines, cell if all(cell) else CELL)


def why_not(stream, env):
    """-> why no pictures can be shown there, or None."""
    if not stream.isatty():
        return "standard error is no terminal"
    if env.get("TERM", "") in ("dumb", ""):
        return "TERM says that the terminal shows text only"
    if measure(stream).columns < LEAST:
        return f"the terminal has fewer than {LEAST} columns"
    with contextlib.suppress(OSError):  # it may be another terminal than the one it was started at
        if os.tcgetpgrp(stream.fileno()) != os.getpgrp():
            return "the program runs in the background"
    return None


def why_no_blocks(stream, env):
    """-> why no half blocks can be shown there, or None."""
    if env.get("NO_COLOR"):
        return "NO_COLOR is set, and the terminal shows colours of text only"
    if "utf" not in (stream.encoding or "").lower():
        return f"half blocks are not in {stream.encoding}, and the terminal shows text only"
    return None


# %% Showing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def screen(stream, env, written=lambda: 0):
    """Yields show(step, steps, picture), for PIL pictures of any size, which raises nothing of the
    terminal's; or None, after it was said why.

    written: how many lines the program has written so far. Each picture but the first of a run
    takes the last one's place, unless lines were written in between.
    """
    problem = why_not(stream, env)
    with contextlib.nullcontext(b"") if problem else asked(stream, env) as answer:
        way = choose(answer, env)
        problem = problem or (why_no_blocks(stream, env) if way == "half blocks" else None)
        if problem:
            sd.say_once(f"no preview: {problem}.")
        true_colour = env.get("COLORTERM", "") in ("truecolor", "24bit")
        yield None if problem else Place(stream, way, true_colour, written).show


class Place:
    """Where pictures are shown: lines above the one that tells the progress."""

    def __init__(self, stream, way, true_colour, written):
        self.stream, self.way, self.true_colour, self.written = stream, way, true_colour, written
        self.last, self.gone = None, False
        self.number = int.from_bytes(os.urandom(3)) + 1  # kitty's, of a picture; others have theirs

    def show(self, step, steps, picture):
        if self.gone:
            return
        try:
            self.stream.flush()
            size = measure(self.stream)
            shape = fit_in(picture.size, size)
            now = size, shape, self.written()
            if step == 1 or now != self.last:
                self.number += 1
                self.begin(shape[1])
            self.last = now
            self.put(self.draw(picture, *shape, size.cell), shape[1])
        except OSError:  # the terminal is gone: a picture is no reason to stop, and none to say so
            self.gone = True

    def begin(self, lines):
        """Make room, also at the terminal's end. The cursor ends below."""
        write_all(self.stream.fileno(), f"\r{ESC}[K".encode() + b"\n" * lines)

    def put(self, text, lines):
        """Write the picture's text so many lines above the cursor, which stays where it is."""
        back = f"{ESC}8{ESC}[{lines}B\r"
        text = f"{ESC}[{lines}A\r{ESC}7{text}{back}"
        try:
            write_all(self.stream.fileno(), text.encode())
        except BaseException:  # Ctrl-C: or all that follows would be taken for the picture's
            write_all(self.stream.fileno(), f"{STRING_END}{ESC}[0m{back}".encode())
            raise

    def draw(self, picture, columns, lines, cell):
        """-> the text that shows a picture on so many columns and lines"""
        pixels = columns * cell[0], lines * cell[1]
        if self.way == "half blocks":
            return half_blocks(picture.resize((columns, 2 * lines)), self.true_colour)
        if self.way == "sixel":  # of squares, or it would be too much text
            return sixel(picture.resize((2 * columns, 4 * lines)).resize(pixels, Image.NEAREST))
        picture = picture.copy()
        picture.thumbnail(pixels)
        if self.way == "kitty":
            return kitty(picture, columns, lines, self.number)
        return iterm2(picture, columns, lines)


def fit_in(size, terminal):
    """A picture's (width, height), a terminal's Size -> on how many columns and lines to show it"""
    width, height = size
    shape = terminal.cell[1] / terminal.cell[0]
    most = min(COLUMNS, terminal.columns - 1), max(1, min(LINES, terminal.lines - 3))
    scale = min(most[0] / width, most[1] * shape / height)  # columns for a pixel
    return max(1, round(width * scale)), max(1, round(height * scale / shape))
