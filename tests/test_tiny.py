"""tiny/: the miniature's world, training, judge and evaluation, and the pictures that it shows.

What they say is the miniature's own; nobody else has the same.
"""

import copy
import importlib
import itertools
import math
import random
import re
import runpy

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from convert_weights import convert
from tests.reference import ROOT, quiet, train

world, judge, evaluate = map(importlib.import_module, ("world", "judge", "evaluate"))
RED_HOUSE = str(ROOT / "tiny" / "red-house.png")


def test_what_is_held_out_is_never_drawn_for_training_and_all_else_is():
    """Of 40,000 scenes, as many as the UNet learns from."""
    seen = set()
    for seed in range(40_000):
        scene = train.scene_of(seed)
        for thing, colour in scene.things:
            seen.add((thing, colour, scene.ground, scene.time))
    assert not any(world.held_out(*each) for each in seen)
    everything = set(itertools.product(world.THINGS, world.COLOURS, world.GROUNDS, world.TIMES))
    out = {each for each in everything if world.held_out(*each)}
    assert 0.1 < len(out) / len(everything) < 0.15 and everything - out == seen
    for k in range(4):  # without any one of the four, every three occur in training
        threes = {each[:k] + each[k + 1 :] for each in seen}
        assert threes == {each[:k] + each[k + 1 :] for each in everything}


def test_every_picture_of_the_world_is_another_and_the_same_again():
    pictures = [train.drawn(seed) for seed in range(60)]
    assert len({picture.tobytes() for picture in pictures}) == 60
    assert np.array_equal(pictures[7], train.drawn(7)) and pictures[7].shape == (128, 128, 3)


def test_sentences_name_what_is_there_and_nothing_else():
    rng = random.Random(0)
    times = {name: words for name, (*_, words) in world.TIMES.items()}
    for _ in range(500):
        scene = world.random_scene(rng)
        text = world.sentence(rng, scene).replace("green meadow", "meadow")
        for thing, (_, names) in world.THINGS.items():
            named = any(re.search(rf"\b{name}s?\b", text) for name in names)
            assert named == (thing in [t for t, _ in scene.things]), (scene, text)
        colours = [c for c in world.COLOURS for w in world.COLOUR_WORDS.get(c, (c,)) if w in text]
        assert set(colours) <= {c for _, c in scene.things}, (scene, text)
        said = [name for name, words in times.items() if any(word in text for word in words)]
        assert said == [scene.time] or said == [] and scene.time == "day", (scene, text)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, capsys):
    @torch.enable_grad()
    def run(path, stop=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 3)
        average = copy.deepcopy(layer).requires_grad_(False)
        stage = train.Stage(path, 1200, train.usual(1e-2, 1200), [layer, average])
        for step in stage.left():
            if step == stop:
                return None
            stage.learn((layer(torch.randn(5, 3)) - 1).square().mean())
            average.weight.lerp_(layer.weight.detach(), 0.01)
        return layer.weight.tolist(), average.weight.tolist()

    whole = run(tmp_path / "whole.pt")
    run(tmp_path / "parts.pt", stop=777)
    assert run(tmp_path / "parts.pt") == whole
    assert "parts: resumed at step 500 of 1200" in capsys.readouterr().out


def test_the_miniature_is_trained_from_nothing_to_a_picture(tmp_path, monkeypatch):
    """One step of each stage, the converter, a picture. (How good it is takes time to tell.)"""
    monkeypatch.setattr(train, "SAMPLES", train.SAMPLES[:2])
    monkeypatch.setattr(train, "psnr", lambda *_: math.nan)
    few = ["--folder", str(tmp_path / "run"), "--pictures", "40"]
    for stage in ("vae", "decoder", "text", "unet"):
        few += [f"--{stage}-steps", "1"]
    with torch.enable_grad():
        train.main(few)
    convert(tmp_path / "run" / "tiny.ckpt", tmp_path / "tiny.safetensors", log=quiet)
    model = sd.StableDiffusion(tmp_path / "tiny.safetensors")
    assert model.config.name == "the miniature"
    assert model.txt2img("a red house", steps=1)[0].size == (128, 128)
    pictures = np.stack([train.drawn(i) for i in range(40)]) / np.float32(255)
    deviation = np.std(np.array(model.encode(pictures)))
    assert abs(deviation - 1) < 0.02  # as Stable Diffusion's latents are, after x 0.18215
    with pytest.raises(SystemExit, match="(?i)try another --folder"):
        train.main([*few, "--vae-steps", "2"])


@pytest.mark.parametrize(
    "script, options, says",
    [
        (world, [], "file"),
        (world, ["nowhere/look.png"], "nowhere"),
        (train, ["--folder", RED_HOUSE], "red-house.png"),
        (train, ["--folder", ".", "--pictures", "0"], "--pictures must be at least 1, got 0"),
        (judge, ["--folder", RED_HOUSE], "red-house.png"),
        (evaluate, ["--folder", RED_HOUSE], "red-house.png"),
        (evaluate, ["--number", "0"], "--number must be at least 2, got 0"),
        (evaluate, ["--number", "2", "--steps", "0"], "steps must be 1 to 999, got 0"),
    ],
    ids=lambda value: getattr(value, "__name__", "-")[:20],
)
def test_the_scripts_refuse_what_they_cannot_do(
    script, options, says, tmp_path, capsys, monkeypatch
):
    """One message, and the exit status of a wrong command line."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main(options)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_the_world_can_be_looked_at(tmp_path, capsys):
    world.main([str(tmp_path / "look.png")])
    assert Image.open(tmp_path / "look.png").size == (8 * 128, 6 * 128)
    assert len(capsys.readouterr().out.splitlines()) == 48


def test_the_judge_finds_what_was_drawn_where_its_answers_are_perfect():
    scenes, _, truths = zip(*(judge.drawn(seed) for seed in range(100)))
    things, colours, grounds, times = (torch.from_numpy(np.array(t)) for t in zip(*truths))
    things[things == judge.ANY] = judge.NOTHING
    colours[colours == judge.ANY] = 0
    sizes = (len(judge.THINGS) + 1, len(judge.COLOURS), len(judge.GROUNDS), len(judge.TIMES))
    answers = [
        torch.nn.functional.one_hot(truth, n).float().movedim(-1, 1) * 20
        for truth, n in zip((things, colours, grounds, times), sizes)
    ]
    read = []
    for answer in zip(*(a.split(1) for a in answers)):  # whatever the picture, this is said
        read += judge.read(lambda _, answer=answer: answer, np.zeros((1, 128, 128, 3)))
    assert all(all(judge.right(*both)) for both in zip(scenes, read))
    rows = [(s, found) for s, (found, _, _) in zip(scenes, read) if s.layout == "row"]
    assert rows and all(s.things * s.count == found for s, found in rows)  # from left to right
    scene, (found, ground, time) = scenes[0], read[0]
    assert not judge.right(scene, ([], ground, time))[0]
    assert not judge.right(scene, ([*found, found[0]], ground, time))[0]


def test_only_what_was_held_out_is_asked_for_and_all_of_it_is_said():
    rng = random.Random(0)
    grounds = [word for _, words in world.GROUNDS.values() for word in words]
    times = [word for *_, words in world.TIMES.values() for word in words]
    for i in range(300):
        scene, _, options = evaluate.text(rng, i)
        assert len(scene.things) == 1 + i % 2
        assert all(world.held_out(*each, scene.ground, scene.time) for each in scene.things)
        assert any(words in options["prompt"] for words in world.GROUNDS[scene.ground][1])
        assert any(words in options["prompt"] for words in world.TIMES[scene.time][3])
        _, _, options = evaluate.negative(rng, i)
        assert not any(word in options["prompt"] for word in grounds)
        scene, _, options = evaluate.undated(rng, i)
        assert scene.time == "day" and not any(word in options["prompt"] for word in times)
        assert all(world.held_out(*each, scene.ground, "day") for each in scene.things)


def test_every_task_of_the_evaluation_is_painted():
    """By a method that sd.py has, with arguments that it takes."""
    model, rng = sd.StableDiffusion(), random.Random(0)
    for task in evaluate.TASKS.values():
        _, method, options = task(rng, 0)
        (picture,) = getattr(model, method)(**options, steps=2)
        assert picture.size == (128, 128)


def colour_of(picture):
    """What stands out from the middle: the mean colour of the pixels unlike their row's median."""
    x = np.asarray(picture, np.float32)
    off = np.abs(x - np.median(x, axis=1, keepdims=True)).sum(2)
    return x[40:118, 24:104][off[40:118, 24:104] > 60].mean(0)


def test_the_miniature_paints_what_the_prompt_says(tiny):
    """A red house is red, a blue boat blue, and night is darker than day."""
    for seed, picture in enumerate(tiny.txt2img("a red house", seed=1, steps=15, n_images=3), 1):
        r, g, b = colour_of(picture)
        assert r > 1.5 * g and r > 1.5 * b, f"seed {seed}: {r:.0f} {g:.0f} {b:.0f}"
    for seed, picture in enumerate(tiny.txt2img("a blue boat", seed=1, steps=15, n_images=3), 1):
        r, g, b = colour_of(picture)
        assert b > 1.2 * r and b > g, f"seed {seed}: {r:.0f} {g:.0f} {b:.0f}"
    day, night = (
        np.asarray(tiny.txt2img(f"a green tree {time}", seed=4, steps=15)[0])
        for time in ("by day", "at night")
    )
    assert night[:40].mean() + 60 < day[:40].mean()


@pytest.mark.parametrize("count", [3, pytest.param(12, marks=pytest.mark.full)])
def test_the_grid_of_the_readme_is_what_its_lines_paint(tmp_path, monkeypatch, count):
    """Of the twelve pictures so many, spread evenly, in 25 steps; the others are copied."""
    text = (ROOT / "tiny" / "README.md").read_text("utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "twelve.png" in b)
    shown, asked = Image.open(ROOT / "tiny" / "twelve.png"), []
    paint = sd.StableDiffusion.txt2img

    def txt2img(self, prompt, **options):
        row, column = divmod(len(asked), 4)
        asked.append(prompt)
        if len(asked) % (12 // count) == 0:
            return paint(self, prompt, **options)
        return [shown.crop((128 * column, 128 * row, 128 * column + 128, 128 * row + 128))]

    monkeypatch.setattr(sd.StableDiffusion, "txt2img", txt2img)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(block)
    runpy.run_path("block.py")
    painted = np.asarray(Image.open("twelve.png"), float)
    assert len(set(asked)) == 12 and painted.shape == (3 * 128, 4 * 128, 3)
    difference = abs(painted - np.asarray(shown, float)).reshape(3, 128, 4, 128, 3)
    assert difference.mean((1, 3, 4)).max() < 0.5
