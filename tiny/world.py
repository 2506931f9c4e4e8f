"""The miniature's world: picture-book scenes drawn by script, and sentences that describe them.

    python tiny/world.py look.png         draws 48 scenes into a file and prints their sentences

A scene is one to three things with colours, a ground, and a time or weather. draw() makes its
picture, sentence() is one of many ways to describe it. An eighth of all combinations of thing,
colour, ground and time is held_out(): never drawn for training, so that evaluate.py can ask for it.
"""

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128

# %% Words and colours -----------------------------------------------------------------------------

# What a thing of that colour is drawn in, and its second colour, for roofs, stripes and so on.
COLOURS = {
    "red": ((214, 40, 44), (142, 22, 34)),
    "orange": ((245, 130, 30), (184, 84, 16)),
    "yellow": ((250, 208, 48), (206, 154, 20)),
    "green": ((44, 160, 68), (22, 100, 48)),
    "blue": ((44, 96, 216), (24, 54, 140)),
    "purple": ((138, 62, 184), (88, 34, 126)),
    "pink": ((250, 140, 186), (212, 84, 140)),
    "brown": ((136, 84, 48), (88, 52, 30)),
    "white": ((248, 248, 246), (178, 184, 198)),
    "black": ((36, 36, 42), (100, 102, 114)),
}
COLOUR_WORDS = {"purple": ("purple", "purple", "violet")}
GROUNDS = {
    "grass": ((104, 176, 78), ("on the grass", "on grass", "in the meadow", "on a green meadow")),
    "sand": ((234, 210, 150), ("on the sand", "on sand", "on the beach", "in the desert")),
    "snow": ((238, 244, 252), ("on the snow", "in the snow", "on snow", "on a snowy field")),
    "sea": ((40, 116, 190), ("on the sea", "on the water", "at sea", "on the waves")),
    "street": ((128, 130, 138), ("on the street", "on the road", "in the street", "on a street")),
}
# The sky above, the sky at the horizon, how much light falls on the ground, words for it.
TIMES = {
    "day": ((108, 178, 240), (206, 232, 250), (1.0, 1.0, 1.0),
            ("by day", "in daylight", "during the day", "in the sunshine")),
    "sunset": ((124, 70, 150), (252, 172, 88), (0.90, 0.74, 0.66),
               ("at sunset", "at dusk", "in the evening", "at sundown")),
    "night": ((14, 18, 66), (56, 64, 134), (0.40, 0.46, 0.66),
              ("at night", "by night", "in the night", "under the moon")),
    "rain": ((104, 114, 130), (172, 182, 192), (0.72, 0.77, 0.82),
             ("in the rain", "on a rainy day", "when it rains", "in rainy weather")),
}  # fmt: skip
SIZES = {"big": ("big", "large", "huge"), "small": ("small", "little", "tiny")}
WOOD, GLASS, STEM, DARK = (104, 68, 42), (206, 232, 250), (46, 122, 56), (34, 34, 40)

# %% Things ----------------------------------------------------------------------------------------


class Pen:
    """Draws in units of the thing's own size: x from -1 to 1, y from 0 (the ground) up to 2.

    The backdrop's unit is the picture: there both go from 0 to 1.
    """

    def __init__(self, draw, x, y, size):
        self.draw, self.x, self.y, self.size = draw, x, y, size

    def at(self, x, y):
        return self.x + x * self.size, self.y - y * self.size

    def polygon(self, points, colour):
        self.draw.polygon([self.at(*p) for p in points], fill=colour)

    def box(self, left, bottom, right, top, colour):
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], colour)

    def disc(self, x, y, rx, colour, ry=None):
        (a, b), (c, d) = self.at(x - rx, y + (ry or rx)), self.at(x + rx, y - (ry or rx))
        self.draw.ellipse((a, b, c, d), fill=colour)

    def half_disc(self, x, y, rx, ry, colour):
        """The upper half."""
        (a, b), (c, d) = self.at(x - rx, y + ry), self.at(x + rx, y - ry)
        self.draw.pieslice((a, b, c, d), 180, 360, fill=colour)


# Each draws with the colour asked for, c, and its second one, e. Windows, wheels and the like have
# neither, and are the same in every colour.


def house(pen, c, e):
    pen.box(-0.8, 0, 0.8, 1.0, c)
    pen.polygon([(-1, 0.95), (1, 0.95), (0, 1.75)], e)
    pen.box(-0.2, 0, 0.2, 0.6, WOOD)
    for x in (-0.52, 0.52):
        pen.box(x - 0.17, 0.4, x + 0.17, 0.74, GLASS)


def castle(pen, c, e):
    pen.box(-0.55, 0, 0.55, 1.0, c)
    for x in (-0.4, 0, 0.4):
        pen.box(x - 0.12, 1.0, x + 0.12, 1.18, c)
    for x in (-0.75, 0.75):
        pen.box(x - 0.25, 0, x + 0.25, 1.35, c)
        pen.polygon([(x - 0.34, 1.3), (x + 0.34, 1.3), (x, 1.95)], e)
        pen.box(x - 0.09, 0.75, x + 0.09, 1.05, GLASS)
    pen.box(-0.2, 0, 0.2, 0.4, WOOD)
    pen.half_disc(0, 0.39, 0.2, 0.24, WOOD)


def tree(pen, c, e):
    pen.box(-0.16, 0, 0.16, 0.9, WOOD)
    pen.disc(-0.45, 1.0, 0.48, e)
    pen.disc(0.45, 1.0, 0.48, e)
    pen.disc(0, 1.35, 0.62, c)


def mushroom(pen, c, e):
    pen.box(-0.26, 0, 0.26, 0.8, (246, 226, 190))
    pen.half_disc(0, 0.66, 0.95, 0.95, c)
    for x, y, r in ((-0.5, 0.92, 0.15), (0.05, 1.3, 0.17), (0.5, 0.95, 0.15)):
        pen.disc(x, y, r, e)


def flower(pen, c, e):
    pen.box(-0.07, 0, 0.07, 1.1, STEM)
    pen.disc(0.3, 0.4, 0.28, STEM, ry=0.13)
    for k in range(6):
        a = math.pi / 3 * k
        pen.disc(0.42 * math.cos(a), 1.3 + 0.42 * math.sin(a), 0.31, c)
    pen.disc(0, 1.3, 0.27, e)


def apple(pen, c, e):
    pen.disc(-0.3, 0.72, 0.6, c, ry=0.72)
    pen.disc(0.3, 0.72, 0.6, c, ry=0.72)
    pen.disc(0.45, 0.95, 0.18, e, ry=0.26)
    pen.box(-0.06, 1.3, 0.06, 1.75, WOOD)
    pen.disc(0.34, 1.6, 0.28, STEM, ry=0.14)


def boat(pen, c, e):
    pen.box(-0.06, 0.4, 0.06, 1.9, WOOD)
    pen.polygon([(0.1, 0.62), (0.1, 1.85), (0.85, 0.62)], e)
    pen.polygon([(-0.1, 0.62), (-0.1, 1.55), (-0.65, 0.62)], e)
    pen.polygon([(-1, 0.52), (1, 0.52), (0.65, 0), (-0.65, 0)], c)


def car(pen, c, e):
    pen.polygon([(-0.64, 0.6), (-0.4, 1.1), (0.4, 1.1), (0.7, 0.6)], e)
    pen.polygon([(-0.46, 0.62), (-0.31, 0.97), (-0.05, 0.97), (-0.05, 0.62)], GLASS)
    pen.polygon([(0.07, 0.62), (0.07, 0.97), (0.33, 0.97), (0.5, 0.62)], GLASS)
    pen.box(-1, 0.2, 1, 0.66, c)
    for x in (-0.55, 0.55):
        pen.disc(x, 0.23, 0.25, DARK)
        pen.disc(x, 0.23, 0.1, (170, 170, 176))


def rocket(pen, c, e):
    pen.polygon([(-0.22, 0.3), (0.22, 0.3), (0, -0.1)], (255, 190, 60))
    pen.polygon([(-0.3, 0.85), (-0.7, 0.15), (-0.3, 0.32)], e)
    pen.polygon([(0.3, 0.85), (0.7, 0.15), (0.3, 0.32)], e)
    pen.box(-0.33, 0.28, 0.33, 1.35, c)
    pen.polygon([(-0.33, 1.34), (0.33, 1.34), (0, 2.0)], e)
    pen.disc(0, 1.0, 0.18, GLASS)


def balloon(pen, c, e):
    pen.polygon([(-0.5, 0.85), (0.5, 0.85), (0.2, 0.4), (-0.2, 0.4)], e)
    pen.disc(0, 1.28, 0.75, c)
    pen.disc(0, 1.28, 0.28, e, ry=0.75)
    pen.box(-0.24, 0.06, 0.24, 0.36, WOOD)


def umbrella(pen, c, e):
    pen.box(-0.06, 0.15, 0.06, 1.0, WOOD)
    pen.box(-0.06, 0.05, 0.28, 0.17, WOOD)
    pen.half_disc(0, 0.85, 1.0, 0.95, c)
    pen.half_disc(0, 0.85, 0.36, 0.95, e)


def cup(pen, c, e):
    pen.disc(0.62, 0.72, 0.4, e)
    pen.disc(0.62, 0.72, 0.2, c)
    pen.polygon([(-0.75, 1.4), (0.65, 1.4), (0.45, 0.1), (-0.55, 0.1)], c)
    pen.disc(-0.05, 1.4, 0.7, e, ry=0.16)
    pen.disc(-0.05, 0.1, 0.5, c, ry=0.1)


def fish(pen, c, e):
    pen.polygon([(0.45, 0.8), (1.0, 1.3), (1.0, 0.3)], e)
    pen.polygon([(-0.3, 1.2), (0.3, 1.2), (0.15, 1.6)], e)
    pen.disc(-0.15, 0.8, 0.8, c, ry=0.52)
    pen.disc(-0.55, 0.92, 0.15, (250, 250, 250))
    pen.disc(-0.57, 0.92, 0.08, DARK)


def duck(pen, c, e):
    pen.polygon([(0.5, 0.5), (1.05, 1.0), (0.9, 0.35)], c)
    pen.disc(0.15, 0.46, 0.82, c, ry=0.46)
    pen.disc(-0.45, 1.2, 0.43, c)
    pen.box(-0.7, 0.5, -0.25, 1.05, c)
    pen.disc(0.25, 0.52, 0.42, e, ry=0.24)
    pen.polygon([(-0.8, 1.3), (-0.8, 1.0), (-1.2, 1.12)], (248, 160, 30))
    pen.disc(-0.56, 1.3, 0.08, DARK)


def cat(pen, c, e):
    pen.disc(0.62, 0.35, 0.38, e, ry=0.2)
    pen.disc(0, 0.5, 0.56, c, ry=0.52)
    for x in (-1, 1):
        pen.polygon([(x * 0.52, 1.3), (x * 0.08, 1.6), (x * 0.48, 1.95)], e)
    pen.disc(0, 1.28, 0.54, c, ry=0.46)
    for x in (-0.22, 0.22):
        pen.disc(x, 1.34, 0.12, (250, 250, 250))
        pen.disc(x, 1.34, 0.06, DARK)
    pen.disc(0, 1.12, 0.08, (240, 130, 140))


def star(pen, c, e):
    for r, colour in ((1.0, c), (0.5, e)):
        corners = [(r if k % 2 == 0 else 0.45 * r, math.pi * (0.5 + k / 5)) for k in range(10)]
        pen.polygon([(q * math.cos(a), 0.95 + q * math.sin(a)) for q, a in corners], colour)


# How to draw it, and what people call it; a name that is listed twice is used twice as often.
THINGS = {
    "house": (house, ("house", "house", "cottage")),
    "castle": (castle, ("castle",)),
    "tree": (tree, ("tree",)),
    "mushroom": (mushroom, ("mushroom", "mushroom", "toadstool")),
    "flower": (flower, ("flower", "flower", "blossom")),
    "apple": (apple, ("apple",)),
    "boat": (boat, ("boat", "boat", "sailing boat", "ship")),
    "car": (car, ("car",)),
    "rocket": (rocket, ("rocket", "rocket", "spaceship")),
    "balloon": (balloon, ("balloon", "balloon", "hot-air balloon")),
    "umbrella": (umbrella, ("umbrella", "umbrella", "parasol")),
    "cup": (cup, ("cup", "cup", "mug")),
    "fish": (fish, ("fish",)),
    "duck": (duck, ("duck",)),
    "cat": (cat, ("cat", "cat", "kitten")),
    "star": (star, ("star",)),
}  # fmt: skip

# %% Scenes ----------------------------------------------------------------------------------------


@dataclass
class Scene:
    """What is in a picture. things: (thing, colour) from left to right, or the back one first."""

    things: list
    ground: str
    time: str
    layout: str = "one"  # or "row"; "behind": the first of two behind the second
    count: int = 1  # 2 or 3: that many of the one thing, in a row
    size: str = ""  # of one thing: "big", "small"


def held_out(thing, colour, ground, time):
    """One in eight, spread so that each pair, such as a red house, is seen elsewhere."""
    tables = (THINGS, COLOURS, GROUNDS, TIMES)
    i, j, k, m = (list(table).index(x) for table, x in zip(tables, (thing, colour, ground, time)))
    return (i + 3 * j + 5 * k + 2 * m + i * j // 4) % 8 == 0


def random_scene(rng, everything=False):
    """A scene for training, with nothing in it held out; with everything, any scene."""
    ground, time = rng.choice(list(GROUNDS)), rng.choice(list(TIMES))
    kinds = {"one": 46, "several": 10, "row of two": 24, "behind": 12, "row of three": 8}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    number = {"row of two": 2, "row of three": 3, "behind": 2}.get(kind, 1)
    things = []
    while len(things) < number:
        thing, colour = rng.choice(list(THINGS)), rng.choice(list(COLOURS))
        allowed = everything or not held_out(thing, colour, ground, time)
        if allowed and thing not in [t for t, _ in things]:
            things.append((thing, colour))
    layout = "behind" if kind == "behind" else "one" if kind == "one" else "row"
    count = rng.choice((2, 3)) if kind == "several" else 1
    size = rng.choice(("", "", "", "big", "small")) if kind == "one" else ""
    return Scene(things, ground, time, layout, count, size)


def places(rng, scene):
    """-> [(thing, colour, x, y of its foot, size)], 1 the whole picture; the back one first."""
    if scene.layout == "one":
        size = {"": 0.23, "big": 0.31, "small": 0.135}[scene.size] * rng.uniform(0.94, 1.06)
        x = rng.uniform(0.36, 0.64)
        return [(*scene.things[0], x, rng.uniform(0.84, 0.9), size)]
    if scene.layout == "behind":
        side, x = rng.choice((-1, 1)), rng.uniform(0.47, 0.53)
        apart = rng.uniform(0.12, 0.14) * side
        return [
            (*scene.things[0], x + apart, rng.uniform(0.71, 0.73), rng.uniform(0.16, 0.17)),
            (*scene.things[1], x - apart, rng.uniform(0.91, 0.94), rng.uniform(0.18, 0.19)),
        ]
    things = scene.things * scene.count
    middle, size = ((0.26, 0.74), 0.19) if len(things) == 2 else ((0.185, 0.5, 0.815), 0.142)
    foot, size = rng.uniform(0.83, 0.88), size * rng.uniform(0.95, 1.05)
    return [
        (*t, x + rng.uniform(-0.02, 0.02), foot + rng.uniform(-0.02, 0.02), size)
        for t, x in zip(things, middle)
    ]


def backdrop(rng, scene, n):
    """-> the n x n picture of sky, horizon and ground without the things."""
    top, low, light, _ = TIMES[scene.time]
    horizon = int(n * rng.uniform(0.58, 0.64))
    near = np.array(GROUNDS[scene.ground][0]) * light
    rows = np.linspace(0, 1, horizon)[:, None]
    pixels = np.zeros((n, n, 3), np.uint8)
    pixels[:horizon] = (np.array(top) * (1 - rows) + np.array(low) * rows)[:, None]
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    pen = Pen(draw, 0, n, n)
    side = rng.choice((-1, 1))  # sun or moon left or right, what else is in the sky opposite
    x, y = 0.5 + side * rng.uniform(0.32, 0.38), rng.uniform(0.82, 0.87)
    if scene.time == "day":
        pen.disc(x, y, 0.075, (255, 226, 110))
        for k in (-1, 0, 1):
            pen.disc(1 - x + 0.07 * k, y - 0.015, 0.062 - 0.016 * abs(k), (250, 252, 255))
    elif scene.time == "sunset":
        pen.disc(x, 1 - horizon / n + 0.02, 0.1, (255, 222, 116))
    elif scene.time == "night":
        pen.disc(x, y, 0.07, (246, 240, 210))
        pen.disc(x + 0.032, y + 0.018, 0.06, tuple(int(v) for v in top))
        for star_x, star_y in ((0.2, 0.02), (0.36, 0.08), (0.5, -0.04), (0.62, 0.06)):
            pen.disc(x - side * star_x, y + star_y, 0.012, (236, 236, 250))
    else:
        for k, (cloud_x, r) in enumerate(((0.12, 0.1), (0.34, 0.13), (0.58, 0.11), (0.82, 0.13))):
            pen.disc(cloud_x + 0.06 * side, 0.98, r, (82, 90, 104), ry=0.085 + 0.01 * (k % 2))
        for k in range(15):
            drop = 0.04 + 0.2 * (k % 5) + 0.08 * (k // 5 % 2) + 0.02 * side, 0.82 - 0.13 * (k // 5)
            slant = ((0, 0), (0.022, 0), (-0.01, -0.07))
            pen.polygon([(drop[0] + dx, drop[1] + dy) for dx, dy in slant], (206, 220, 234))

    def lit(k):  # the ground's own colour, lighter or darker
        return tuple(int(v) for v in np.clip(near * k, 0, 255))

    edge = 1 - horizon / n  # what stands there is drawn before the ground, which covers its foot
    if scene.ground == "street":  # a row of houses far away
        for k in range(6):
            roof = edge + (0.1, 0.16, 0.12)[(k + side) % 3]
            pen.box(k / 6 + 0.01, edge, k / 6 + 0.13, roof, lit(0.82))
    elif scene.ground == "snow":  # mountains
        for x in (0.2, 0.5, 0.8):
            peak = x + 0.03 * side, edge + 0.15
            pen.polygon([(x - 0.24, edge), (x + 0.24, edge), peak], lit(0.88))
    elif scene.ground != "sea":  # a hill or a dune
        pen.disc(
            0.5 - 0.3 * side, edge, 0.45, lit(0.9), ry=0.09 if scene.ground == "grass" else 0.05
        )
    rows = np.clip(np.linspace(1.04, 0.88, n - horizon)[:, None] * near, 0, 255).astype(np.uint8)
    image.paste(Image.fromarray(np.repeat(rows[:, None], n, axis=1)), (0, horizon))
    if scene.ground == "sea":
        for row, i in np.ndindex(3, 4):
            x = 0.13 * (row % 2) + 0.27 * i + 0.04 * side
            pen.disc(x, edge * (0.82 - 0.3 * row), 0.085, lit(1.3), ry=0.013)
    elif scene.ground == "street":
        for i in range(4):
            x = 0.05 + 0.27 * i + 0.04 * side
            pen.box(x, 0.05, x + 0.13, 0.08, lit(1.55))
        pen.box(0, edge - 0.03, 1, edge, lit(1.3))
    return image


def draw(scene, seed):
    """-> the 128 x 128 picture. The seed decides what the scene leaves open.

    (With the scene's own seed, as in training, the same numbers choose the ground and the horizon,
    so the two are a little correlated.)
    """
    return draw_placed(scene, seed)[0]


def draw_placed(scene, seed):
    """-> the picture, and its things as places() describes them.

    Drawn four times as large and shrunk, which makes the edges smooth.
    """
    rng, n = random.Random(seed), 4 * SIZE
    image = backdrop(rng, scene, n)
    placed = places(rng, scene)
    for thing, colour, x, y, size in placed:
        THINGS[thing][0](Pen(ImageDraw.Draw(image), x * n, y * n, size * n), *COLOURS[colour])
    return image.resize((SIZE, SIZE), Image.BOX), placed


# %% Sentences -------------------------------------------------------------------------------------


def phrase(rng, thing, colour, size="", count=1):
    """Such as "a big red house" or "two violet fish"."""
    words = [rng.choice(THINGS[thing][1])]
    if count > 1 and words[0] != "fish":
        words[0] += "s"
    if rng.random() > 0.04:
        words.insert(0, rng.choice(COLOUR_WORDS.get(colour, (colour,))))
    if size and rng.random() < 0.85:
        words.insert(0, rng.choice(SIZES[size]))
    if count > 1:
        return " ".join([("two", "three")[count - 2], *words])
    article = rng.choice(("a", "a", "a", "a", "the", "one", ""))
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words]).strip()


def sentence(rng, scene):
    """One of the ways to describe it. Parts are left out at random, so that prompts may leave them
    out, too. But if no time is named, it is by day.
    """
    named = [phrase(rng, *t, scene.size, scene.count) for t in scene.things]
    if scene.layout == "behind":
        first, second = named
        what = rng.choice((f"{first} behind {second}", f"{second} in front of {first}"))
    elif len(named) == 2:
        left, right = named
        one, other = rng.sample(named, 2)
        what = rng.choice((
            f"{left} and {right}", f"{left} and {right}", f"{left} left of {right}",
            f"{left} to the left of {right}", f"{right} to the right of {left}",
            f"{right} right of {left}", f"{left} on the left and {right} on the right",
            f"{one} next to {other}", f"{one} beside {other}", f"{one} with {other}",
        ))  # fmt: skip
    elif len(named) == 3:
        what = f"{named[0]}, {named[1]} and {named[2]}"
    else:
        what = named[0]
    where = rng.choice(GROUNDS[scene.ground][1]) if rng.random() < 0.75 else ""
    said = scene.time != "day" or rng.random() < 0.5
    time = rng.choice(TIMES[scene.time][3]) if said else ""
    start = rng.choice(("", "", "", "", "", "a picture of ", "a drawing of "))
    text = rng.choice((
        f"{start}{what} {where} {time}", f"{start}{what} {where} {time}",
        f"{start}{what} {time} {where}", f"{time}, {what} {where}", f"{where}, {what} {time}",
    ))  # fmt: skip
    return " ".join(text.split()).strip(" ,")


def folder(path):
    """For argparse: the folder of that name, made if it does not exist."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} is not usable: {error.strerror}") from None
    return Path(path)


def main(argv=None):
    p = argparse.ArgumentParser(description="Draw 48 scenes, and print a sentence for each.")
    p.add_argument("file", help="a .png for the drawings")
    args = p.parse_args(argv)
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(48)]
    sheet = np.stack([np.asarray(draw(scene, i)) for i, scene in enumerate(scenes)])
    sheet = sheet.reshape(6, 8, SIZE, SIZE, 3).swapaxes(1, 2).reshape(6 * SIZE, 8 * SIZE, 3)
    try:
        Image.fromarray(sheet).save(args.file, format="PNG")
    except OSError as error:
        p.error(f"{args.file} cannot be written: {error.strerror}")
    for scene in scenes:
        print(sentence(rng, scene))


if __name__ == "__main__":
    main()
