"""notebook.py: the plain class's pictures, and the comfort around them."""

import base64
import inspect
import io
import itertools
import re
import sys

import mlx.core as mx
import numpy as np
import pytest
import tqdm.auto
from PIL import Image

import sd
from sd_more.infotext import read_parameters
from sd_more.low_memory import LowMemory
from sd_more.noise import GENERATORS, philox_normal
from sd_more.notebook import RIGHT, LowMemoryStudio, Studio, gallery, save
from sd_more.pictures import grid
from sd_more.prompts import read_weighted
from tests.reference import as_mask, cli, raising

SMALL = {"steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def studio():
    return Studio()


@pytest.fixture(scope="module")
def frugal():
    return LowMemoryStudio()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd.say_once.cache_clear()


def same(pictures, truth):
    """Two lists of pictures, or arrays of pixels, equal in every bit."""
    assert len(pictures) == len(truth)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(pictures, truth))


def settings(picture):
    return picture.info["parameters"].splitlines()[-1]


# %% The same pictures -----------------------------------------------------------------------------


def test_pictures_are_those_of_the_plain_class(studio, tiny, drawn, hole):
    options = SMALL | {"seed": 3, "negative_prompt": "a tree"}
    assert same(studio.txt2img("a red house", **options), tiny.txt2img("a red house", **options))
    few = {"seed": 3, "steps": 4}
    for name, more in (("img2img", {"strength": 0.5}), ("inpaint", {"mask": as_mask(hole)})):
        ours, plain = (
            getattr(model, name)("a boat", drawn, **more, **few) for model in (studio, tiny)
        )
        assert same(ours, plain)


def test_of_a_list_each_prompt_is_painted_as_if_it_were_alone(studio, tiny):
    """In one flat list, the seeds of each prompt from the first on."""
    options = SMALL | {"seed": 5, "n_images": 2, "cfg": 1}
    prompts = "a red house", "a green tree"
    truth = [tiny.txt2img(prompt, **options) for prompt in prompts]
    pictures = studio.txt2img(list(prompts), **options)
    assert same(pictures, [*itertools.chain(*truth)])
    seeds = [re.search(r"Seed: (\d+)", settings(picture))[1] for picture in pictures]
    assert seeds == ["5", "6", "5", "6"]
    assert [p.info["parameters"].split("\n")[0] for p in pictures] == [
        p for p in prompts for _ in "12"
    ]
    assert studio.txt2img([]) == []


def test_low_memory_is_the_same_comfort(frugal):
    options = SMALL | {"n_images": 2, "cfg": 1}
    seen = []
    pictures = frugal.txt2img(
        ["a red house", "a boat"], progress=lambda *args: seen.append(args), **options
    )
    plain = LowMemory(reader=read_weighted)
    assert same(pictures[:2], plain.txt2img("a red house", **options))
    assert len(seen) == 4 and len(frugal.loaded) == 1
    assert "Low memory: True" in settings(pictures[0])
    assert type(frugal.controlled()) is LowMemoryStudio


def test_brackets_are_weights_unless_told_otherwise(studio, tiny):
    prompt, options = "a (red:1.5) house", SMALL | {"progress": False}
    plain = Studio(reader=None).txt2img(prompt, **options)
    weighted = studio.txt2img(prompt, **options)
    assert same(plain, tiny.txt2img(prompt, **SMALL)) and not same(plain, weighted)
    assert same(weighted, sd.StableDiffusion(reader=read_weighted).txt2img(prompt, **SMALL))
    assert "Plain prompt: True" in settings(plain[0]) and "Plain" not in settings(weighted[0])


@pytest.mark.parametrize("name", ["img2img", "inpaint"])
def test_what_is_overridden_takes_the_same_options(name):
    ours, plain = (inspect.signature(getattr(c, name)) for c in (Studio, sd.StableDiffusion))
    assert ours == plain


# %% The text --------------------------------------------------------------------------------------


def again(path):
    """What the text in a file says -> the pictures that a Studio paints from it."""
    told = read_parameters(path)
    make = LowMemoryStudio if told.pop("low_memory", False) else Studio
    reader = None if told.pop("plain_prompt", False) else read_weighted
    model = make(told.pop("model", sd.TINY), told.pop("dtype"), reader=reader)
    prompt = told.pop("prompt")
    if "image" not in told:
        return model.txt2img(prompt, **told)
    image = told.pop("image")
    paint = model.inpaint if "mask" in told else model.img2img
    return paint(prompt, image, **told)


def test_a_saved_text_paints_the_same_picture_again(studio, frugal, drawn, hole):
    """Every bit of it, for all that can be told."""
    drawn.save("drawn.png")
    as_mask(hole).save("mask.png")
    plain = Studio(dtype="float16", reader=None)
    usual = {"seed": 8}
    painted = {
        "prompt": studio.txt2img("(a) house,\nred", negative_prompt="a: tree", **usual, **SMALL),
        "sampler": studio.txt2img("a boat", sampler="dpm++-karras", **usual, **SMALL),
        "spacing": studio.txt2img("a boat", sampler="euler", spacing="trailing", **usual, **SMALL),
        "usual": studio.txt2img("a boat", sampler="euler", **usual, **SMALL),
        "rng": studio.txt2img("a boat", rng=philox_normal, cfg=2.5, rescale=0.7, **usual, **SMALL),
        "plain": plain.txt2img("a (red:1.5) house", **usual, **SMALL),
        "low": frugal.txt2img("a boat", **usual, **SMALL),
        "image": studio.img2img("a boat", "drawn.png", 0.6, steps=4, **usual),
        "mask": studio.inpaint("a boat", "drawn.png", "mask.png", steps=2, **usual),
    }
    for name, pictures in painted.items():
        path = save(pictures[0], f"{name}.png")
        once_more = again(path)
        assert same(once_more, pictures), name
        assert once_more[0].info["parameters"] == pictures[0].info["parameters"], name
        assert same([Image.open(path)], pictures)
    assert not any("Besides" in settings(p) for p in itertools.chain(*painted.values()))


def test_the_text_of_a_second_picture_is_its_own(studio):
    """Painted alone it is the same to rounding, for products of another size round otherwise."""
    _, second = studio.txt2img("a boat", seed=8, n_images=2, **SMALL)
    (alone,) = again(save(second, "second.png"))
    assert alone.info["parameters"] == second.info["parameters"]
    assert np.abs(np.asarray(alone, int) - np.asarray(second, int)).max() <= 1


def test_the_text_is_that_of_the_command_line(studio, drawn):
    """To the letter, with what is asked for and with what is usual."""
    drawn.save("drawn.png")
    options = {"seed": 4, "steps": 2, "width": 64, "height": 64}
    words = [f"--{name}={value}" for name, value in options.items()]
    for i, (ours, more) in enumerate((
        (studio.txt2img("a (red) house", sampler="euler", **options), ["--sampler=euler"]),
        (
            studio.img2img("a (red) house", "drawn.png", 0.5, rng="philox", **options),
            ["--image=drawn.png", "--strength=0.5", "--rng=philox"],
        ),
    )):  # fmt: skip
        done = cli("--prompt", "a (red) house", f"--output=cli{i}.png", *words, *more, cwd=".")
        assert done.returncode == 0, done.stderr
        theirs = Image.open(f"cli{i}.png")
        assert ours[0].info["parameters"] == theirs.info["parameters"]
        assert same(ours, [theirs])


def test_what_the_text_has_no_words_for_is_named_in_it(studio, drawn, hole, capsys):
    """And said by whoever reads it."""
    changed = Studio(changes=[sd.clip_skip(1)])
    mask = as_mask(hole)
    latents = mx.zeros((1, 8, 8, 4))
    size = {"width": 64, "height": 64}
    task = sd.ImageToImage(np.zeros((64, 64, 3), np.float32))
    for pictures, besides in (
        (changed.txt2img("a", steps=1, **size), "changes"),
        (studio.txt2img("a", steps=1, latents=latents, **size), "latents"),
        (studio.txt2img("a", steps=1, rng=lambda seed: GENERATORS["mlx"](seed), **size), "rng"),
        (studio.img2img("a", drawn, steps=2, **size), "image"),
        (studio.paint("a", task, steps=2), "image"),
        (studio.inpaint("a", drawn, mask, steps=2, **size), '"image, mask"'),
    ):
        assert settings(pictures[0]).endswith(f", Besides: {besides}")
    path = save(pictures[0], "a.png")
    read_parameters(path)
    assert "Besides image, mask\n" in capsys.readouterr().err


def test_a_controlnet_is_named_and_its_picture_is_not(studio, control):
    model = studio.controlled((control, np.zeros((64, 64, 3), np.float32), 0.5))
    (picture,) = model.txt2img("a house", **SMALL)
    assert f"ControlNet: {control.path}:0.5" in settings(picture).replace('"', "")
    assert settings(picture).endswith("Besides: control image")


def test_saving_takes_no_others_place(studio):
    (picture,) = studio.txt2img("a house", **SMALL)
    paths = [str(save(picture, "a.png")) for _ in range(2)] + [str(save(picture, "b.jpg"))]
    assert paths == ["a.png", "a-2.png", "b.jpg"]
    for path in paths:
        assert read_parameters(path)["seed"] == 42
    bare = Image.open(save(Image.new("RGB", (8, 8)), "c.png"))
    assert not bare.info["parameters"]
    with pytest.raises(sd.SDError, match=r"the path must be NAME\.png, .* got a\.gif"):
        save(picture, "a.gif")
    with pytest.raises(sd.SDError, match="there/a.png was not saved"):
        save(picture, "there/a.png")


# %% Progress --------------------------------------------------------------------------------------


def test_progress_hears_of_every_step(studio, drawn):
    seen = []
    options = {"progress": lambda *args: seen.append(args), "n_images": 2}
    studio.txt2img(["a", "b"], seed=1, **SMALL, **options)
    assert [args[:2] for args in seen] == [(1, 2), (2, 2)] * 2
    *_, x = studio.generate_latents("b", seed=1, n_images=2, **SMALL)
    assert seen[-1][2].shape == (2, 8, 8, 4) and np.array_equal(seen[-1][2], x)
    seen.clear()
    studio.img2img("a", drawn, 0.5, width=64, height=64, steps=6, **options)
    assert [args[:2] for args in seen] == [(1, 3), (2, 3), (3, 3)]


class Bar:
    """In tqdm's place: what is done with it."""

    def __init__(self, total, unit):
        self.total, self.n, self.closed = total, 0, False

    def update(self):
        self.n += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    made = []

    def make(**options):
        made.append(Bar(**options))
        return made[-1]

    monkeypatch.setattr(tqdm.auto, "tqdm", make)
    return made


@pytest.mark.parametrize("progress, terminal, notebook, shown", [
    (None, False, False, False), (None, True, False, True), (None, False, True, True),
    (True, False, False, True), (False, True, True, False),
])  # fmt: skip
def test_a_bar_is_shown_where_somebody_looks(
    studio, bars, monkeypatch, progress, terminal, notebook, shown
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    studio.txt2img(["a", "b"], progress=progress, **SMALL)
    assert [(bar.total, bar.n, bar.closed) for bar in bars] == ([(4, 4, True)] if shown else [])


def test_the_real_bar_ends_at_all_steps(studio, capsys):
    studio.txt2img(["a", "b"], progress=True, **SMALL)
    assert re.search(r"100%.* 4/4 ", capsys.readouterr().err)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_bar_is_closed_when_painting_ends_early(studio, bars, monkeypatch, error):
    monkeypatch.setattr(studio, "to_pictures", raising(error), raising=False)
    with pytest.raises(error):
        studio.txt2img("a", progress=True, **SMALL)
    assert [(bar.n, bar.closed) for bar in bars] == [(2, True)]


@pytest.mark.parametrize("progress", [None, True])
def test_without_tqdm_it_paints_all_the_same(studio, tiny, capsys, monkeypatch, progress):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    pictures = studio.txt2img("a house", progress=progress, **SMALL)
    assert same(pictures, tiny.txt2img("a house", **SMALL))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["studio", "frugal"])
def test_what_a_callback_raises_ends_the_painting_and_nothing_else(request, kind):
    model, seen = request.getfixturevalue(kind), []

    def stop(step, steps, x):
        seen.append(step)
        if step == 2:
            raise ZeroDivisionError("enough")

    with pytest.raises(ZeroDivisionError, match="enough"):
        model.txt2img(["a house", "a boat"], progress=stop, **SMALL | {"steps": 3})
    assert seen == [1, 2]
    first, second = (model.txt2img("a house", **SMALL) for _ in range(2))
    assert same(first, second)


# %% What is wrong ---------------------------------------------------------------------------------

WRONG = {
    "num_inference_steps": "steps", "guidance_scale": "cfg", "num_images_per_prompt": "n_images",
    "generator": "seed", "manual_seed": "seed", "scheduler": "sampler", "sampler_name": "sampler",
    "denoising_strength": "strength", "negative": "negative_prompt", "stpes": "steps",
    "negativ_prompt": "negative_prompt", "n_image": "n_images", "Sampler": "sampler",
    "progres": "progress", "guidance_scal": "cfg", "hight": "height",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_name_is_answered_with_the_right_one(studio, drawn, name):
    message = f"^{name} is called {WRONG[name]} here.$"
    with pytest.raises(sd.SDError, match=message):
        studio.txt2img("a house", **{name: 1})
    with pytest.raises(sd.SDError, match=message):
        studio.img2img("a house", drawn, **{name: 1})


def test_all_wrong_names_are_said_at_once(studio):
    message = "num_inference_steps is called steps here. zzz is not known here; there are "
    with pytest.raises(sd.SDError, match=message + "negative_prompt, seed, .*progress.$"):
        studio.txt2img("a house", num_inference_steps=5, zzz=1)
    with pytest.raises(sd.SDError, match="^strength is for img2img and inpaint.$"):
        studio.txt2img("a house", strength=0.5)


def test_the_right_names_are_right():
    plain = sd.StableDiffusion
    known = {*inspect.signature(plain.generate_latents).parameters, "progress"}
    known |= {*inspect.signature(plain.inpaint).parameters}
    assert set(RIGHT.values()) <= known and not RIGHT.keys() & known


@pytest.mark.parametrize("prompt, options, message", [
    ("a", {"progress": "yes"}, "progress must be a function of .step, steps, x., True or False"),
    ("a", {"rng": "dice"}, "rng must be one of torch, numpy, philox, mlx, or a function, got dice"),
    (5, {}, "prompt must be one text, got 5"), (["a", None], {}, "prompt must be one text"),
    (["a", "b"], {"sampler": "fast"}, "sampler must be one of plms, .*lcm"),
    ("a", {"steps": "5"}, "steps must be 1 to 999, got 5"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_painted(studio, prompt, options, message):
    seen = []
    with pytest.raises(sd.SDError, match=message):
        studio.txt2img(prompt, **{"progress": lambda *args: seen.append(args)} | options)
    assert not seen


# %% Gallery ---------------------------------------------------------------------------------------


def test_a_gallery_shows_the_pictures_and_no_tags_of_prompts(studio):
    """Whatever a prompt or a negative prompt says is text."""
    evil = '<script>alert("1")</script>&amp;\n</td><img src=x onerror=1>'
    pictures = studio.txt2img([evil, "a house"], negative_prompt="<b>", cfg=2, **SMALL)
    shown = gallery(pictures, columns=1)._repr_html_()
    tags = re.findall(r"<(/?\w+)", shown)
    assert set(tags) == {"table", "/table", "tr", "/tr", "td", "/td", "img", "div", "/div", "br"}
    assert tags.count("tr") == tags.count("td") == tags.count("img") == 2
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;amp;" in shown
    assert shown.count("seed 42") == 2
    codes = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    assert same([Image.open(io.BytesIO(base64.b64decode(code))) for code in codes], pictures)
    bare = gallery(pictures, captions=False)
    assert "seed" not in bare._repr_html_() and repr(bare) == "<gallery of 2 pictures>"


def test_a_gallery_is_a_text_where_there_is_no_notebook(studio):
    pictures = studio.txt2img("a red\x1b[2J house", seed=7, n_images=2, **SMALL)
    told = r"seed 7: a red\x1b[2J house; seed 8: a red\x1b[2J house"
    assert repr(gallery(pictures)) == f"<gallery of 2 pictures: {told}>"
    assert len(repr(gallery(pictures * 99))) < 400
    assert repr(gallery([])) == "<gallery of 0 pictures>"
    assert grid(pictures, 1).size == (128, 64)


def test_a_gallery_takes_any_pictures(studio):
    """One, without a text, of another program, with a text that is none, or read from a file."""
    (picture,) = studio.txt2img("a house", **SMALL)
    read = Image.open(save(picture, "a.png"))
    plain, other, odd = (Image.new("RGB", (600, 40)) for _ in range(3))
    other.info["parameters"] = "a cat\nSteps: 2, Version: v1"
    odd.info["parameters"] = "a\nb\nSteps: 2, Prompt lines: x, Version: sd.py"
    shown = gallery([read, plain, other, odd])._repr_html_()
    assert shown.count("<tr>") == 1 and shown.count("width=\"256\"") == 3  # fmt: skip
    assert "seed 42<br>a house" in shown and ">a cat<" in shown
    assert repr(gallery(picture)) == "<gallery of 1 picture: seed 42: a house>"
    for columns in (0, 1.5, "2"):
        with pytest.raises(sd.SDError, match="columns must be a whole number"):
            gallery(picture, columns)
