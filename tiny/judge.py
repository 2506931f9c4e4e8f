"""A judge of pictures, independent of the model: it was trained on drawn pictures only.

    pip install -e '.[test]'
    python tiny/judge.py       trains it, if there is none, in ten minutes on two cores; tests it

A small convolutional network. At each of 16 x 16 positions it says which of the 16 things has its
middle there, if any, and in which colour; it learns this from where world.py has drawn them. The
ground and the time it reads off two averages, over the upper and the lower half. How often it is
right can be measured on drawn pictures, but not on painted ones.
"""

import argparse
import math
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import train
import world
from torch import nn

HERE = Path(__file__).resolve().parent
THINGS, COLOURS = list(world.THINGS), list(world.COLOURS)
GROUNDS, TIMES = list(world.GROUNDS), list(world.TIMES)
NOTHING, ANY = len(THINGS), -100  # ANY: not asked for there (what cross_entropy ignores)
WEIGHT_OF_NOTHING = 0.2  # in the loss, because nearly all positions have nothing
STEPS, BATCH, PICTURES = 3000, 32, 12000
FIRST = 10**7  # its pictures' seeds start here, far from those the model is trained on


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (3, 32, 48, 64, 96, 128, 128)
        strides = (2, 2, 2, 1, 1, 1)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 5 if s == 2 else 3, s, 2 if s == 2 else 1),
                              nn.GroupNorm(8, b), nn.SiLU())
                for a, b, s in zip(widths, widths[1:], strides)
            )
        )  # fmt: skip
        self.see = nn.Conv2d(128, len(THINGS) + 1 + len(COLOURS), 3, padding=1)
        self.rest = nn.Linear(2 * 128, len(GROUNDS) + len(TIMES))

    def forward(self, x):
        """(b, 3, 128, 128) in [-1, 1] -> logits of things (b, 17, 16, 16), of their colours (b, 10,
        16, 16), of grounds (b, 5), of times (b, 4)"""
        y = self.layers(x)
        above, below = y[:, :, :8].mean((2, 3)), y[:, :, 8:].mean((2, 3))
        rest = self.rest(torch.cat([above, below], 1))
        things, colours = self.see(y).split([len(THINGS) + 1, len(COLOURS)], 1)
        return things, colours, *rest.split([len(GROUNDS), len(TIMES)], 1)


def middle(x, y, size):
    """The row and column, of 16 x 16, of the middle of a thing as world.places describes it."""
    return int(16 * (y - 0.85 * size)), int(16 * x)


def truth_of(scene, placed):
    """-> what forward should answer: things (16, 16), colours (16, 16), ground, time"""
    things = np.full((16, 16), NOTHING)
    colours = np.full((16, 16), ANY)
    for reach, known in ((2, False), (1, True)):  # around a middle anything; there, the thing
        for thing, colour, *where in placed:
            row, column = middle(*where)
            at = np.s_[row - reach : row + reach + 1, column - reach : column + reach + 1]
            things[at] = THINGS.index(thing) if known else ANY
            colours[at] = COLOURS.index(colour) if known else ANY
    return things, colours, GROUNDS.index(scene.ground), TIMES.index(scene.time)


@torch.no_grad()
def read(judge, pictures):
    """uint8 (n, 128, 128, 3) -> [([(thing, colour)] from left to right, ground, time)]"""
    out = []
    for part in np.array_split(pictures, -(-len(pictures) // 64)):
        things, colours, grounds, times = judge(train.to_torch(part))
        likely = things[:, :NOTHING].logsumexp(1) - things[:, NOTHING]  # that there is one: logit
        near = F.avg_pool2d(likely, 3, 1, 1)  # largest in the middle
        more_likely = likely > -math.log(WEIGHT_OF_NOTHING)  # than not
        peaks = more_likely & (near == F.max_pool2d(near, 5, 1, 2))
        things, colours = things[:, :NOTHING].argmax(1), colours.argmax(1)
        for i, (ground, when) in enumerate(zip(grounds.argmax(1), times.argmax(1))):
            at = [(i, row, column) for column, row in peaks[i].T.nonzero().tolist()]
            found = [(THINGS[things[k]], COLOURS[colours[k]]) for k in at]
            out.append((found, GROUNDS[ground], TIMES[when]))
    return out


def right(scene, seen):
    """-> four truth values: the things are right, and no others are there; so are their colours;
    the ground is; the time is. The order of the things does not matter.
    """
    found, ground, when = seen
    wanted = scene.things * scene.count
    things = sorted(t for t, _ in found) == sorted(t for t, _ in wanted)
    return things, sorted(found) == sorted(wanted), ground == scene.ground, when == scene.time


def drawn(seed):
    scene = world.random_scene(random.Random(seed), everything=True)
    picture, placed = world.draw_placed(scene, seed)
    return scene, np.asarray(picture), truth_of(scene, placed)


def some(pool, first, count):
    """-> count scenes, their pictures, uint8 (count, 128, 128, 3), and the truth about them"""
    scenes, pictures, truths = zip(*pool.map(drawn, range(first, first + count), chunksize=100))
    truths = [torch.from_numpy(np.array(part)) for part in zip(*truths)]
    return list(scenes), np.stack(pictures), truths


def learn(pool, path):
    torch.manual_seed(0)
    judge = Judge().to(train.DEVICE)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    _, pictures, truths = some(pool, FIRST, PICTURES)
    weights = torch.ones(len(THINGS) + 1, device=train.DEVICE)
    weights[NOTHING] = WEIGHT_OF_NOTHING
    start = time.time()
    for step in range(STEPS):
        i = torch.randint(PICTURES, (BATCH,))
        x = train.to_torch(pictures[i])
        # What painted pictures have and drawn ones do not: some blur, grain, another brightness.
        if step % 2:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = x * (0.9 + 0.2 * torch.rand(BATCH, 1, 1, 1)).to(x) + 0.06 * torch.randn_like(x)
        x = x + 0.1 * torch.randn(BATCH, 3, 1, 1).to(x)
        truth = [part[i].to(train.DEVICE) for part in truths]
        said = judge(x)
        loss = F.cross_entropy(said[0], truth[0], weights)
        loss = loss + sum(map(F.cross_entropy, said[1:], truth[1:]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            pace = (time.time() - start) / (step + 1)
            print(f"judge: step {step + 1}/{STEPS}  loss {loss:.3f}  {pace:.2f} s a step",
                  flush=True)  # fmt: skip
    part = path.with_suffix(".part")
    torch.save(judge.state_dict(), part)
    part.replace(path)


def load(folder):
    """The judge in that folder, trained first if there is none."""
    path = folder / f"judge_{train.mark()}.pt"
    if not path.exists():
        with multiprocessing.get_context("spawn").Pool() as pool:
            learn(pool, path)
    judge = Judge().to(train.DEVICE)
    judge.load_state_dict(torch.load(path, map_location=train.DEVICE))
    return judge


def accuracy(judge, count=2000):
    """On drawn pictures of no training: {number of things: the share of each part right}"""
    with multiprocessing.get_context("spawn").Pool() as pool:
        scenes, pictures, _ = some(pool, FIRST + PICTURES, count)
    marks = [(len(s.things * s.count), right(s, seen))
             for s, seen in zip(scenes, read(judge, pictures))]  # fmt: skip
    return {n: np.mean([m for k, m in marks if k == n], axis=0) for n in (1, 2, 3)}


def main(argv=None):
    p = argparse.ArgumentParser(description="Train the judge, and test it on drawn pictures.")
    p.add_argument("--folder", type=world.folder, default=str(HERE / "run"),
                   help="where it is kept (default: tiny/run)")  # fmt: skip
    for n, parts in accuracy(load(p.parse_args(argv).folder)).items():
        shares = zip(("things", "things and colours", "ground", "time"), parts)
        print(f"{n} in the picture: ", ", ".join(f"{name} {share:.2%}" for name, share in shares))


if __name__ == "__main__":
    main()
