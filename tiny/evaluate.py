"""How often does the miniature paint what it was asked for? On combinations it has never seen.

    pip install -e '.[test]'
    python tiny/evaluate.py                     1,000 pictures, some 20 minutes on two cores
    python tiny/evaluate.py --number 100 --cfg 1

Half of the prompts name one thing, half two. Each (thing, colour, ground, time) in them was held
out of training (world.held_out). sd.py paints, 25 PLMS steps; the judge (judge.py) looks.
"""

import argparse
import multiprocessing
import random
import sys
from pathlib import Path

import judge
import numpy as np
import world

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def held_out_scene(rng, number):
    """One thing, or two side by side, of which everything is held out, and all of it said."""
    ground, time = rng.choice(list(world.GROUNDS)), rng.choice(list(world.TIMES))
    things = []
    while len(things) < number:
        thing, colour = rng.choice(list(world.THINGS)), rng.choice(list(world.COLOURS))
        if world.held_out(thing, colour, ground, time) and thing not in [t for t, _ in things]:
            things.append((thing, colour))
    return world.Scene(things, ground, time, "one" if number == 1 else "row")


def full_sentence(rng, scene):
    """A sentence that names every part of the scene."""
    while True:
        text = world.sentence(rng, scene)
        colours = [world.COLOUR_WORDS.get(c, (c,)) for _, c in scene.things]
        parts = [*colours, world.GROUNDS[scene.ground][1], world.TIMES[scene.time][3]]
        if all(any(word in text for word in words) for words in parts):
            return text


def paint(job):
    """-> uint8 (128, 128, 3)"""
    import sd

    model, prompt, seed, options = job
    paint.model = getattr(paint, "model", None) or sd.StableDiffusion(model)
    return np.asarray(paint.model.txt2img(prompt, seed=seed, **options)[0])


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=HERE / "tiny.safetensors", metavar="FILE")
    p.add_argument("--number", type=int, default=1000, metavar="N", help="pictures (default: 1000)")
    p.add_argument("--steps", type=int, default=25, metavar="N", help="(default: 25)")
    p.add_argument("--cfg", type=float, metavar="S", help="guidance (default: the model's)")
    p.add_argument("--negative-prompt", default="", metavar="TEXT")
    p.add_argument("--folder", type=Path, default=HERE / "run", help="where the judge is kept")
    p.add_argument("--errors", action="store_true", help="print what was wrong")
    args = p.parse_args(argv)
    options = {"steps": args.steps, "cfg": args.cfg, "negative_prompt": args.negative_prompt}
    looks = judge.load(args.folder)
    rng = random.Random(1)
    scenes = [held_out_scene(rng, 1 + i % 2) for i in range(args.number)]
    prompts = [full_sentence(rng, scene) for scene in scenes]
    with multiprocessing.get_context("spawn").Pool() as pool:
        jobs = [(args.model, prompt, seed, options) for seed, prompt in enumerate(prompts)]
        pictures = np.stack(list(pool.imap(paint, jobs, chunksize=4)))
    seen = judge.read(looks, pictures)
    marks = [judge.right(scene, what) for scene, what in zip(scenes, seen)]
    print("| | thing | and its colour | ground | time |\n|---|---|---|---|---|")
    for number, name in ((1, "one thing"), (2, "two things")):
        parts = [m for m, scene in zip(marks, scenes) if len(scene.things) == number]
        print(f"| {name} ({len(parts)}) |", " | ".join(f"{x:.1%}" for x in np.mean(parts, 0)), "|")
    if args.errors:
        for seed, (prompt, what, mark) in enumerate(zip(prompts, seen, marks)):
            if not all(mark):
                print(f"seed {seed}: {prompt!r} -> {what}")


if __name__ == "__main__":
    main()
