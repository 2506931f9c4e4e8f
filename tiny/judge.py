"""A judge of pictures that is not the model: it has seen drawn pictures only.

    pip install -e '.[test]'
    python tiny/judge.py                  trains it, some ten minutes on two cores, and tests it

A small convolutional network. In each of 16 x 16 places it says how much there looks like a red
house, a red castle ..., for all 160 things and colours; the best place counts for the picture. The
ground and the time it reads off the average over all places.
"""

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
PAIRS = [(thing, colour) for thing in world.THINGS for colour in world.COLOURS]
GROUNDS, TIMES = list(world.GROUNDS), list(world.TIMES)
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
        self.see = nn.Conv2d(128, len(PAIRS), 3, padding=1)
        self.rest = nn.Linear(2 * 128, len(GROUNDS) + len(TIMES))

    def forward(self, x):
        """(b, 3, 128, 128) in [-1, 1] -> logits of each pair (b, 160), of grounds, of times"""
        y = self.layers(x)
        above, below = y[:, :, :8].mean((2, 3)), y[:, :, 8:].mean((2, 3))
        rest = self.rest(torch.cat([above, below], 1))
        return self.see(y).amax((2, 3)), *rest.split([len(GROUNDS), len(TIMES)], 1)


def read(judge, pictures):
    """uint8 (n, 128, 128, 3) -> [(pairs, the likeliest first, each thing once; ground; time)]"""
    out = []
    with torch.no_grad():
        for part in np.array_split(pictures, -(-len(pictures) // 64)):
            for pairs, ground, when in zip(*judge(train.to_torch(part))):
                seen = {}
                for i in pairs.argsort(descending=True)[:30]:
                    seen.setdefault(*PAIRS[i])
                found = list(seen.items())[:3]
                out.append((found, GROUNDS[ground.argmax()], TIMES[when.argmax()]))
    return out


def truths(scenes):
    pairs = torch.zeros(len(scenes), len(PAIRS))
    for i, scene in enumerate(scenes):
        for pair in scene.things:
            pairs[i, PAIRS.index(pair)] = 1
    grounds = torch.tensor([GROUNDS.index(s.ground) for s in scenes])
    return pairs, grounds, torch.tensor([TIMES.index(s.time) for s in scenes])


def drawn(seed):
    scene = world.random_scene(random.Random(seed), everything=True)
    return scene, np.asarray(world.draw(scene, seed))


def some(pool, first, count):
    """-> count scenes and their pictures, uint8 (count, 128, 128, 3)"""
    scenes, pictures = zip(*pool.map(drawn, range(first, first + count), chunksize=100))
    return list(scenes), np.stack(pictures)


def right(scene, seen):
    """-> (things right, their colours too, ground right, time right)"""
    pairs, ground, when = seen
    pairs = pairs[: len(scene.things)]
    things = {t for t, _ in pairs} == {t for t, _ in scene.things}
    return things, set(pairs) == set(scene.things), ground == scene.ground, when == scene.time


def learn(pool, path):
    torch.manual_seed(0)
    judge = Judge().to(train.DEVICE)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    scenes, pictures = some(pool, FIRST, PICTURES)
    truth = truths(scenes)
    start = time.time()
    for step in range(STEPS):
        i = torch.randint(PICTURES, (BATCH,))
        x = train.to_torch(pictures[i])
        # What a painted picture has and a drawn one not: some blur, grain, another brightness.
        if step % 2:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = x * (0.9 + 0.2 * torch.rand(BATCH, 1, 1, 1)).to(x) + 0.06 * torch.randn_like(x)
        x = x + 0.1 * torch.randn(BATCH, 3, 1, 1).to(x)
        with torch.autocast(train.DEVICE, torch.bfloat16):
            pairs, grounds, times = judge(x)
        pair_truth, ground_truth, time_truth = (t[i].to(train.DEVICE) for t in truth)
        loss = F.binary_cross_entropy_with_logits(pairs.float(), pair_truth) * 40
        loss = loss + F.cross_entropy(grounds.float(), ground_truth)
        loss = loss + F.cross_entropy(times.float(), time_truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            pace = (time.time() - start) / (step + 1)
            print(
                f"judge: step {step + 1}/{STEPS}  loss {loss:.3f}  {pace:.2f} s a step", flush=True
            )
    torch.save(judge.state_dict(), path)


def load(folder):
    """The judge, trained first where there is none. (In eval mode.)"""
    path = folder / "judge.pt"
    folder.mkdir(exist_ok=True)
    if not path.exists():
        with multiprocessing.get_context("spawn").Pool() as pool:
            learn(pool, path)
    judge = Judge().to(train.DEVICE)
    judge.load_state_dict(torch.load(path, map_location=train.DEVICE))
    return judge.eval()


def accuracy(judge, count=2000):
    """On drawn pictures that nobody has seen: {number of things: share of each part right}"""
    with multiprocessing.get_context("spawn").Pool() as pool:
        scenes, pictures = some(pool, FIRST + PICTURES, count)
    marks = [(len(s.things), right(s, seen)) for s, seen in zip(scenes, read(judge, pictures))]
    return {n: np.mean([m for k, m in marks if k == n], axis=0) for n in (1, 2, 3)}


if __name__ == "__main__":
    for n, parts in accuracy(load(HERE / "run")).items():
        shares = zip(("things", "things and colours", "ground", "time"), parts)
        print(f"{n} in the picture: ", ", ".join(f"{name} {share:.2%}" for name, share in shares))
