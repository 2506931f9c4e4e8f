"""How often does the miniature paint what it was asked for? On combinations it has never seen.

    pip install -e '.[test]'
    python tiny/evaluate.py                     1,000 sentences, some 20 minutes on two cores
    python tiny/evaluate.py --cfg 1 --number 400
    python tiny/evaluate.py --task inpaint --number 400

sd.py paints in 25 PLMS steps, and the judge (judge.py) says what it sees. A picture is right if it
has the things asked for and no others, wherever they stand. Each (thing, colour, ground, time) that
is asked for was held out of training (world.held_out). Tasks:

    text       half of the sentences name one thing, half two
    undated    the same, but no sentence names a time: it should be by day
    negative   the sentence leaves the ground open, with the negative prompt "on the street" or none
    image      image to image, from a drawing of the same scene with the thing in another colour
    inpaint    from a drawing of two things: the area of the right one is painted anew

In the last two the ground and the time are given, in the last one the left thing, too.
"""

import argparse
import multiprocessing
import os
import random
import sys
from pathlib import Path

import judge
import numpy as np
import world
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
FIRST = 2 * 10**7  # the drawings' seeds start here, far from those that anybody has learned from


def held_out_scene(rng, number):
    """One thing, or two side by side, of which everything is held out."""
    ground, time = rng.choice(list(world.GROUNDS)), rng.choice(list(world.TIMES))
    things = []
    while len(things) < number:
        thing, colour = rng.choice(list(world.THINGS)), rng.choice(list(world.COLOURS))
        if world.held_out(thing, colour, ground, time) and thing not in [t for t, _ in things]:
            things.append((thing, colour))
    return world.Scene(things, ground, time, "one" if number == 1 else "row")


def mentions(text, words):
    return any(word in text for word in words)


def full_sentence(rng, scene, unsaid=None):
    """A sentence that names every part of the scene but unsaid, which may be "ground" or "time"."""
    where_and_when = {"ground": world.GROUNDS[scene.ground][1], "time": world.TIMES[scene.time][3]}
    things = []
    for thing, colour in scene.things:
        words = world.COLOUR_WORDS.get(colour, (colour,))
        things.append([f"{word} {name}" for word in words for name in world.THINGS[thing][1]])
    while True:
        text = world.sentence(rng, scene)
        fits = [mentions(text, words) == (part != unsaid) for part, words in where_and_when.items()]
        if all(fits) and all(mentions(text, words) for words in things):
            return text


# A task returns the scene that should be seen, the name of the method that paints, its arguments.


def text(rng, i):
    scene = held_out_scene(rng, 1 + i % 2)
    return scene, "txt2img", {"prompt": full_sentence(rng, scene)}


def undated(rng, i):
    while (scene := held_out_scene(rng, 1 + i % 2)).time != "day":
        pass
    return scene, "txt2img", {"prompt": full_sentence(rng, scene, unsaid="time")}


def negative(rng, i):
    """In pairs: the same sentence and seed, without the negative prompt and with it."""
    rng = random.Random(i // 2)
    scene = held_out_scene(rng, 1)
    options = {"negative_prompt": "on the street" if i % 2 else "", "seed": i // 2}
    return scene, "txt2img", {"prompt": full_sentence(rng, scene, unsaid="ground"), **options}


def image(rng, i):
    scene = held_out_scene(rng, 1)
    thing, colour = scene.things[0]
    other = rng.choice([c for c in world.COLOURS if c != colour])
    before = world.draw(world.Scene([(thing, other)], scene.ground, scene.time), FIRST + i)
    prompt = full_sentence(rng, scene)
    return scene, "img2img", {"prompt": prompt, "image": before, "strength": 0.75}


def inpaint(rng, i):
    scene = held_out_scene(rng, 2)
    left, right = scene.things
    other = rng.choice([t for t in world.THINGS if t not in (left[0], right[0])])
    things = [left, (other, rng.choice(list(world.COLOURS)))]
    before = world.draw(world.Scene(things, scene.ground, scene.time, "row"), FIRST + i)
    mask = Image.new("L", before.size)
    ImageDraw.Draw(mask).rectangle((66, 48, 127, 119), fill=255)
    return scene, "inpaint", {"prompt": full_sentence(rng, scene), "image": before, "mask": mask}


TASKS = {f.__name__: f for f in (text, undated, negative, image, inpaint)}


def paint(job):
    """-> uint8 (128, 128, 3)"""
    import sd

    path, function, options = job
    paint.model = getattr(paint, "model", None) or sd.StableDiffusion(path)
    return np.asarray(getattr(paint.model, function)(**options)[0])


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--task", default="text", choices=TASKS, help="(default: text)")
    p.add_argument("--model", type=Path, default=HERE / "tiny.safetensors", metavar="FILE")
    p.add_argument("--number", type=int, default=1000, metavar="N", help="pictures (default: 1000)")
    p.add_argument("--steps", type=int, default=25, metavar="N", help="(default: 25)")
    p.add_argument("--cfg", type=float, metavar="S", help="guidance (default: the model's)")
    p.add_argument(
        "--folder",
        type=world.folder,
        default=str(HERE / "run"),
        help="where the judge is kept; it is trained first where there is none",
    )
    p.add_argument("--errors", action="store_true", help="print what was wrong")
    args = p.parse_args(argv)
    if args.number < 2:
        p.error(f"--number must be at least 2, got {args.number}")
    rng = random.Random(1)
    scenes, functions, options = zip(*(TASKS[args.task](rng, i) for i in range(args.number)))
    more = {"steps": args.steps, "cfg": args.cfg}
    jobs = [
        (args.model, function, {"seed": seed, **given, **more})
        for seed, (function, given) in enumerate(zip(functions, options))
    ]
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one process on each core
    pictures = []
    with multiprocessing.get_context("spawn").Pool() as pool:
        try:
            for picture in pool.imap(paint, jobs, chunksize=4):
                pictures.append(picture)
                if len(pictures) % 100 == 0:
                    print(f"{len(pictures)} of {args.number}", file=sys.stderr, flush=True)
        except ValueError as error:  # sd.py's SDError, about the model or an option
            p.error(error)
    seen = judge.read(judge.load(args.folder), np.stack(pictures))
    prompts = [given["prompt"] for given in options]
    if args.task == "negative":
        for i, said in enumerate(("without", "with")):
            street = [ground == "street" for _, ground, _ in seen[i::2]]
            print(f"a street {said} the negative prompt: {np.mean(street):.1%} of {len(street)}")
        return
    marks = [judge.right(scene, what) for scene, what in zip(scenes, seen)]
    print("| | thing | and its colour | ground | time |\n|---|---|---|---|---|")
    for number, name in ((1, "one thing"), (2, "two things")):
        parts = [m for m, scene in zip(marks, scenes) if len(scene.things) == number]
        if parts:
            shares = " | ".join(f"{x:.1%}" for x in np.mean(parts, 0))
            print(f"| {name} ({len(parts)}) | {shares} |")
    sides = [i for i, prompt in enumerate(prompts) if "left" in prompt or "right" in prompt]
    if sides:
        share = np.mean([scenes[i].things == seen[i][0] for i in sides])
        print(f"sentences that say left or right, all of it right: {share:.1%} of {len(sides)}")
    for seed, (prompt, what, mark) in enumerate(zip(prompts, seen, marks)):
        if args.errors and not all(mark):
            print(f"seed {seed}: {prompt!r} -> {what}")


if __name__ == "__main__":
    main()
