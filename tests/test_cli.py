"""`python sd.py`: options, messages and files, by calling the command line in this process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sd
from sd_more import app
from sd_more import options as its_options
from sd_more.output import save_picture
from tests.reference import CONFIGS, ROOT, cli, kohya_names, reference_models, shake, train

WIDTH = 40  # of the miniature's context
RED_HOUSE = ROOT / "tiny" / "red-house.png"


@pytest.fixture
def paint(tmp_path, monkeypatch, capsys):
    """The command line in an empty folder -> (out, err), what it said. status: how it is to end."""
    monkeypatch.chdir(tmp_path)

    def paint(*options, status=0):
        sd.say_once.cache_clear()
        capsys.readouterr()
        try:
            app.main([str(option) for option in options])
            ended = 0
        except SystemExit as stop:
            ended = stop.code
        said = capsys.readouterr()
        assert ended == status, said.err
        return said

    return paint


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), int)


def text_of(path):
    with Image.open(path) as picture:
        return picture.text["parameters"]


def names(folder):
    return {file.name for file in folder.iterdir()}


# %% What is painted, and where it is saved --------------------------------------------------------


def test_sd_py_itself_hands_over_to_this_command_line(tmp_path):
    done = cli("--steps", 1, "--n-images", 2, "--n-rows", 1, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "saved out.png\n", done.stderr
    assert Image.open(tmp_path / "out.png").size == (256, 128)


def test_the_options_of_the_first_version_are_all_there_with_their_defaults():
    args = vars(its_options.make_parser().parse_args([]))
    assert args == {
        "prompt": None, "negative_prompt": "", "prompts": None, "plain_prompt": False,
        "width": None, "height": None, "n_images": 1, "n_rows": None, "seed": [42], "steps": None,
        "cfg": None, "sampler": None, "spacing": None, "rescale": None,  # the model's: 50 of plms
         "rng": "torch", "from_png": None, "image": None,
        "strength": None, "mask": None, "controlnet": [], "control_image": [], "model": sd.TINY,
        "lora": [], "embedding": [], "clip_skip": None, "safety_check": True,
        "dtype": None,
        "low_memory": False, "output": "out.png", "save_every": None, "decode_batch": 1,
        "show_tokens": False, "converted": None, "vae": None,
        # and the newer ones
        "words": [], "upscale": None, "upscale_strength": None, "folder": [], "list": False,
        "clear": False, "device": None, "quiet": False, "version": False, "preview": False,
    }  # fmt: skip
    assert app.parse(["--words", "a", "--embedding", "b"]).embedding == ["a", "b"]
    prompts = lambda *words: [line.prompt for line in app.choose_lines(app.parse(words))]
    assert prompts() == ["a red house on the grass at sunset"]
    assert prompts("--image", "a.png") == [""]


def test_each_option_says_what_it_does():
    for action in its_options.make_parser()._actions:
        assert action.help, action


def test_a_picture_carries_what_makes_it_again(paint, tmp_path):
    options = (
        "--prompt", "a red house, at night", "--negative-prompt", "a tree: café", "--seed", 0,
        "--cfg", 0.5, "--steps", 3, "--width", 192, "--sampler", "ddim",
    )  # fmt: skip
    out, err = paint(*options, "--output", "a.png")
    assert "step 3/3" in err and "s left" in err and "a.png" in out
    picture = Image.open(tmp_path / "a.png")
    prompt, negative, settings = picture.text["parameters"].split("\n")
    told = dict(re.findall(r"(\w[\w ]*): ([^,]+)", settings))
    width, height = told["Size"].split("x")
    paint(
        "--prompt", prompt, "--negative-prompt", negative.removeprefix("Negative prompt: "),
        "--seed", told["Seed"], "--cfg", told["CFG scale"], "--steps", told["Steps"],
        "--width", width, "--height", height, "--sampler", told["Sampler"].lower(),
        "--rng", {"CPU": "torch"}[told["RNG"]],
        "--dtype", told["dtype"], "--output", "b.png",
    )  # fmt: skip
    assert Image.open(tmp_path / "b.png") == picture and picture.size == (192, 128)


def test_the_text_has_the_names_that_other_programs_read(paint, tmp_path):
    """How older versions of this one wrote them is in test_infotext.py."""
    paint("--prompt", "a tree", "--steps", 2, "--n-images", 2, "--save-every", 1)
    line = "Steps: 2, Sampler: PLMS, CFG scale: 2.0, Seed: {}, Size: 128x128, Model: tiny, "
    line += "RNG: CPU, dtype: float32, Images: {}, Version: sd.py"
    assert text_of(tmp_path / "out.png") == "a tree\n" + line.format(42, 1)
    assert text_of(tmp_path / "out-2.png") == "a tree\n" + line.format(43, 1)
    step = text_of(tmp_path / "out-step-001.png")
    assert step == "a tree\n" + line.format(42, '"step 1"').replace('"', "")
    save_file({"emb_params": torch.zeros(1, WIDTH)}, tmp_path / "a thing.safetensors")
    Image.new("L", (128, 128), 255).save(tmp_path / "mask.png")
    options = ("--image", RED_HOUSE, "--mask", "mask.png", "--words", "a thing.safetensors")
    options += ("--negative-prompt", "b", "--plain-prompt", "--low-memory", "--clip-skip", 2)
    paint(*options, "--steps", 1, "--sampler", "euler-a", "--rng", "numpy", "--output", "c.png")
    assert text_of(tmp_path / "c.png") == (
        "\nNegative prompt: b\nSteps: 1, Sampler: Euler a, CFG scale: 2.0, Seed: 42, "
        "Size: 128x128, Model: tiny, RNG: numpy, Spacing: linspace, dtype: float32, "
        "Denoising strength: 1.0, "
        f"Image: {RED_HOUSE}, Mask: mask.png, Clip skip: 2, Words: 'a thing.safetensors', "
        "Plain prompt: True, Low memory: True, Images: 1, Version: sd.py"
    )


def test_low_memory_is_an_option(paint, tmp_path):
    paint("--steps", 2, "--output", "a.png")
    paint("--steps", 2, "--output", "b.png", "--low-memory")
    assert np.abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() <= 1


def test_an_existing_picture_is_never_lost(paint, tmp_path):
    (tmp_path / "out.png").write_text("mine")
    paint("--steps", 1)
    assert (tmp_path / "out.png").read_text() == "mine"
    assert Image.open(tmp_path / "out-2.png").size == (128, 128)
    assert names(tmp_path) == {"out-2.png", "out.png"}


def test_several_pictures_come_as_files_or_as_one_grid(paint, tmp_path):
    options = ("--steps", 1, "--n-images", 3, "--seed", 5)
    paint(*options, "--output", "a.png")
    files = [tmp_path / name for name in ("a.png", "a-2.png", "a-3.png")]
    assert [re.search(r"Seed: (\d+)", text_of(f))[1] for f in files] == ["5", "6", "7"]
    paint(*options, "--n-rows", 2, "--output", "g.png")
    sheet = pixels(tmp_path / "g.png")
    assert sheet.shape == (256, 256, 3)
    assert np.array_equal(sheet[128:, :128], pixels(files[2]))
    assert not sheet[128:, 128:].any()
    assert "Images: 3 in 2 rows" in text_of(tmp_path / "g.png")
    assert "Size: 128x128" in text_of(tmp_path / "g.png")


def test_a_file_of_prompts_is_painted_line_by_line(paint, tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa red house\n\na blue boat\n", "utf-8")
    paint("--prompts", "p.txt", "--steps", 2, "--n-images", 2)
    said = [text_of(tmp_path / f) for f in ("out.png", "out-2.png", "out-3.png")]
    assert [text.split("\n")[0] for text in said] == ["a red house", "a red house", "a blue boat"]
    assert ["Seed: 42" in text for text in said] == [True, False, True]


def test_pictures_on_the_way_are_kept(paint, tmp_path):
    paint("--steps", 5, "--save-every", 2, "--n-images", 2, "--decode-batch", 2)
    assert names(tmp_path) == {
        "out.png", "out-2.png", "out-step-002.png", "out-step-002-2.png",
        "out-step-004.png", "out-step-004-2.png",
    }  # fmt: skip


def test_two_processes_paint_the_pictures_of_one(paint, tmp_path):
    options = ["--steps", "2", "--n-images", "3", "--width", "64", "--height", "64"]
    launch = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", sys.executable]
    command = [*launch, ROOT / "sd.py", *options, "--output", "two.png"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert names(tmp_path) == {"two-2.png", "two-3.png", "two.png"}, done
    paint(*options, "--output", "one.png")
    ends = (".png", "-2.png", "-3.png")  # for two processes in the order in which they are saved
    for one, two in zip(
        *(
            sorted((tmp_path / f"{name}{end}" for end in ends), key=text_of)
            for name in ("one", "two")
        )
    ):
        assert text_of(one) == text_of(two)
        assert np.abs(pixels(one) - pixels(two)).max() <= 1


def test_a_grid_needs_all_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(its_options, "count_processes", lambda: 2)
    with pytest.raises(sd.SDError, match="--n-rows"):
        app.check(app.parse(["--n-rows", "1", "--output", str(tmp_path / "a.png")]))


@pytest.mark.parametrize(
    "module, name", [(sd.tempfile, "mkstemp"), (Image.Image, "save"), (sd.os, "fsync")]
)
def test_a_picture_that_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch, module, name):
    """Neither half a picture nor the empty file that keeps a name free."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(sd.SDError, match=r"out\.png.*No space"):
        patch.setattr(module, name, full)
        save_picture(Image.new("RGB", (64, 64)), tmp_path / "out.png", "x")
    assert list(tmp_path.iterdir()) == []


# %% Numbers and prompts ---------------------------------------------------------------------------


def test_zero_is_a_value(paint, tmp_path):
    paint("--cfg", 0, "--seed", 0, "--steps", 2)
    assert "CFG scale: 0.0, Seed: 0," in text_of(tmp_path / "out.png")


def test_an_empty_prompt_paints(paint, tmp_path):
    paint("--prompt", "", "--steps", 1)
    assert names(tmp_path) == {"out.png"}


def test_a_long_prompt_is_cut_with_a_warning_only_when_read_as_clip_does(paint):
    options = ("--prompt", "a red house " * 25 + "at the very end", "--steps", 1)
    assert '"at the very end"' in paint(*options, "--plain-prompt").err
    assert "end" not in paint(*options).err


def test_brackets_are_read_unless_the_prompt_is_plain(paint, tmp_path):
    for name, options in {
        "a": ["--prompt", "a (red:1.4) house"],
        "b": ["--prompt", "a (red:1.4) house", "--plain-prompt"],
        "c": ["--prompt", r"a \(red:1.4\) house"],
    }.items():
        paint(*options, "--steps", 2, "--output", f"{name}.png")
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(b, c) and np.abs(a - b).max() > 10


def test_a_loaded_word_is_known_however_the_prompt_is_read(paint, tmp_path):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, WIDTH, generator=generator)
    save_file({"emb_params": vectors}, tmp_path / "thing.safetensors")
    word = ("--words", "thing.safetensors")
    for name, options in {
        "a": word, "b": [*word, "--plain-prompt"], "c": ["--embedding", "thing.safetensors"],
        "d": [],
    }.items():  # fmt: skip
        paint("--prompt", "a thing", *options, "--steps", 2, "--output", f"{name}.png")
    a, b, c, d = (pixels(tmp_path / f"{name}.png") for name in "abcd")
    assert np.array_equal(a, b) and np.array_equal(a, c) and np.abs(a - d).max() > 10


def test_tokens_are_shown(paint, tmp_path):
    out, _ = paint("--show-tokens", "--prompt", "a househunter")
    word, pieces, more, *ids = out.splitlines()[1].split()
    assert (word, pieces, more) == ("househunter", "house", "hunter</w>") and len(ids) == 2
    assert out.splitlines()[-1] == "3 of 75 tokens"
    assert not names(tmp_path)


def test_tokens_are_shown_as_they_are_read(paint, tmp_path):
    prompt = "a (red:1.5) house BREAK [cat] " + "dog " * 80
    lines = [line.split() for line in paint("--show-tokens", "--prompt", prompt).out.splitlines()]
    assert lines[1] == ["red", "red</w>", "736", "x", "1.5"] and ["BREAK"] in lines
    assert lines[-1] == ["3", "+", "75", "+", "6", "of", "75", "tokens"]
    plain = paint("--show-tokens", "--plain-prompt", "--prompt", prompt).out.splitlines()
    assert plain[1].startswith("(") and plain[-1].startswith("9")
    (tmp_path / "prompts.txt").write_text("a cat\na dog and a cat\n")
    both = paint("--show-tokens", "--prompts", "prompts.txt").out
    assert both.count("of 75 tokens") == 2


def test_what_a_stream_cannot_show_does_not_end_the_program(tmp_path):
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = cli("--show-tokens", "--prompt", "富嶽 café", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "\\u5bcc" in done.stdout, done.stderr


# %% From pictures, and other programs' files ------------------------------------------------------


def test_image_to_image_from_python_is_that_of_the_command_line(paint, tiny, drawn, tmp_path):
    drawn.save(tmp_path / "a.png")
    options = {"strength": 0.6, "seed": 3, "steps": 5}
    (picture,) = tiny.img2img("a blue house", tmp_path / "a.png", **options)
    words = [x for name, value in options.items() for x in (f"--{name}", value)]
    paint("--image", "a.png", "--prompt", "a blue house", *words)
    assert np.array_equal(np.asarray(picture), pixels(tmp_path / "out.png"))


def test_a_picture_can_be_begun_with_and_painted_into(paint, tmp_path, hole):
    paint("--steps", 2, "--output", "start.png")
    start = tmp_path / "start.png"
    said = paint("--image", start, "--steps", 8, "--strength", 0.5, "--output", "b.png")
    assert "step 4/4" in said.err
    text = text_of(tmp_path / "b.png")
    assert "Denoising strength: 0.5" in text and str(start) in text and text.startswith("\nSteps")
    Image.fromarray((hole * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    said = paint("--image", start, "--mask", "mask.png", "--steps", 2, "--output", "c.png")
    assert "painting 25% of start.png" in said.err
    a, c = pixels(start), pixels(tmp_path / "c.png")
    assert np.array_equal(a[:30], c[:30]) and not np.array_equal(a, c)


@pytest.mark.parametrize("share, painted", [(0.004, False), (0.006, True)])
def test_a_few_transparent_pixels_do_not_make_a_hole(paint, tmp_path, share, painted):
    picture = Image.open(RED_HOUSE).convert("RGBA")
    picture.putalpha(255)
    count = round(share * 128 * 128)
    for i in range(count):
        picture.putpixel((i % 8, i // 8), (0, 0, 0, 0))
    picture.save(tmp_path / "a.png")
    said = paint("--image", "a.png", "--steps", 2)
    assert ("painting 1% of a.png" in said.err) == painted
    strength = "1.0" if painted else "0.75"
    assert f"Denoising strength: {strength}," in text_of(tmp_path / "out.png")


def test_files_of_others_are_converted_and_used(paint, tmp_path, lora, controlnet):
    save_file(kohya_names(lora), tmp_path / "style.safetensors")
    controlnet.save_pretrained(tmp_path / "edges")
    save_file({"emb_params": torch.randn(2, WIDTH)}, tmp_path / "thing.safetensors")
    options = (
        "--lora", "style.safetensors:0.5", "--words", "thing.safetensors", "--clip-skip", 2,
        "--controlnet", "edges:0.7", "--control-image", RED_HOUSE,
        "--prompt", "a (thing:1.2)", "--steps", 2,
    )  # fmt: skip
    said = paint(*options, "--output", "a.png")
    assert (tmp_path / "style.flat.safetensors").is_file() and "Converting" in said.err
    assert "Converting" not in paint(*options, "--output", "b.png").err
    paint("--prompt", "a (thing:1.2)", "--steps", 2, "--output", "c.png")
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b) and np.abs(a - c).mean() > 3
    # And all of it again from the picture alone, with one thing changed.
    paint("--from-png", "a.png", "--output", "d.png")
    assert np.array_equal(a, pixels(tmp_path / "d.png"))
    assert text_of(tmp_path / "d.png") == text_of(tmp_path / "a.png")
    paint("--from-png", "a.png", "--seed", 1, "--output", "e.png")
    assert np.abs(a - pixels(tmp_path / "e.png")).mean() > 3
    # What may be repeated takes the picture's place, too.
    paint("--from-png", "a.png", "--lora", "style.safetensors:0.1", "--output", "f.png")
    assert "Lora: style.safetensors:0.1" in text_of(tmp_path / "f.png").replace('"', "")


def test_a_checkpoint_is_converted_once_and_again_when_it_changed(paint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, unet, vae = (shake(m) for m in reference_models(CONFIGS["sd1"]))
    models = tmp_path / "models"
    models.mkdir()
    numbers = {"size": 64, "text": {"heads": 4}}

    def painted(source, name):
        _, err = paint("--model", source, "--steps", 1, "--output", name, "--cfg", 1)
        return err, pixels(tmp_path / name)

    def save_as(path, seed):
        state = train.original_names(vae, shake(unet, seed=seed), text)
        torch.save({"state_dict": state, "sd_config": numbers}, path)

    save_as(models / "a.ckpt", 1)
    said, first = painted(models / "a.ckpt", "1.png")
    assert "Converting it once" in said and (models / "a.flat.safetensors").exists()
    said, again = painted(models / "a.ckpt", "2.png")
    assert "made from a.ckpt before" in said and np.array_equal(again, first)
    save_as(models / "a.ckpt", 2)
    said, other = painted(models / "a.ckpt", "3.png")
    assert "Converting it once" in said and not np.array_equal(other, first)
    save_as(models / "a.pt", 1)  # another checkpoint, whose flat file would have the same name
    assert np.array_equal(painted(models / "a.pt", "4.png")[1], first)
    mine = models / "b.flat.safetensors"
    mine.write_text("mine")
    save_as(models / "b.ckpt", 1)
    assert np.array_equal(painted(models / "b.ckpt", "5.png")[1], first)
    assert mine.read_text() == "mine"
    assert list((tmp_path / "cache" / "sd.py").glob("*-b.flat.safetensors"))


def test_a_picture_is_made_again_from_what_it_says(paint, tmp_path):
    """Also from the text of other programs; whatever stands in a prompt."""
    prompt = 'a "red" house, Steps: 3, at night\nNegative thoughts\nSteps: two'
    options = ("--prompt", prompt, "--negative-prompt", "a: b, c", "--seed", 7, "--steps", 2)
    options += ("--cfg", 2.5, "--sampler", "euler-a", "--rng", "philox", "--width", 192)
    paint(*options, "--output", "a.png")
    paint("--from-png", "a.png", "--output", "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert text_of(tmp_path / "a.png") == text_of(tmp_path / "b.png")
    info = PngInfo()
    line = "Steps: 2, Sampler: Euler a, Seed: 5, Size: 64x64, RNG: NV, Denoising strength: 0.4"
    info.add_text("parameters", f"a tree\n{line}")
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png", pnginfo=info)
    paint("--from-png", "other.png", "--output", "c.png")
    assert Image.open(tmp_path / "c.png").size == (64, 64)
    said = text_of(tmp_path / "c.png")
    assert all(x in said for x in ("Seed: 5", "Sampler: Euler a", "RNG: NV"))


# %% Messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        (["--width", "500"], ["500", "a multiple of 8"]),
        (["--height", "0"], ["0", "64"]),
        (["--width", "-64"], ["-64"]),
        (["--steps", "0"], ["steps must be 1 to 999, got 0"]),
        (["--steps", "1000"], ["1000"]),
        (["--steps", "many"], ["many"]),
        (["--cfg", "nan"], ["nan"]),
        (["--n-images", "0"], ["0"]),
        (["--n-images", "2", "--n-rows", "3"], ["--n-rows", "3", "2"]),
        (["--n-rows", "0"], ["0"]),
        (["--sampler", "euler9"], ["euler9", "plms"]),
        (["--rng", "dice"], ["dice", "torch"]),
        (["--dtype", "int8"], ["int8", "float16"]),
        (["--model", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--model", "."], []),
        (["--output", "picture.gif"], ["picture.gif", ".png", ".webp"]),
        (["--output", "{colour}.png"], ["{colour} is not known", "{seed}"]),
        (["--output", ""], [".png"]),
        (["--output", "/proc/a.png"], ["--output /proc/a.png"]),
        (["--image", "nowhere.png"], ["no file nowhere.png"]),
        (["--clip-skip", "9"], ["clip_skip", "to 4, got 9"]),
        (["--image", RED_HOUSE, "--steps", "1"], ["strength", "0.75", "1 step"]),
        (["--output", "x" * 250 + ".png"], ["too long"]),
        (["--output", "x" * 300 + "/a.png"], ["xxx"]),
        (["--width", "6400000", "--height", "6400000"], ["at most 4096 x 4096"]),
        (["--nonsense"], ["--nonsense"]),
        (["--image", "nowhere.png"], ["nowhere.png"]),
        (["--image", ROOT / "sd.py"], ["sd.py"]),
        (["--image", RED_HOUSE, "--strength", "0"], ["0", "at most 1"]),
        (["--image", RED_HOUSE, "--strength", "nan"], ["nan"]),
        (["--image", RED_HOUSE, "--strength", "0.01"], ["0.01", "steps"]),
        (["--image", RED_HOUSE, "--width", "100"], ["100", "a multiple of 8"]),
        (["--image", RED_HOUSE, "--width", "0"], ["width", "got 0"]),
        (["--image", RED_HOUSE, "--height", "-64"], ["height", "got -64"]),
        (["--control-image", RED_HOUSE, "--controlnet", "a:nan"], ["a:nan"]),
        (["--lora", "a:inf"], ["a:inf"]),
        (["--mask", "a.png"], ["--mask", "--image"]),
        (["--strength", "0.5"], ["--strength", "--image"]),
        (["--image", RED_HOUSE, "--mask", "nowhere.png"], ["nowhere.png"]),
        (["--lora", "nowhere.safetensors:0.5"], ["nowhere.safetensors"]),
        (["--lora", sd.TINY], ["tiny.safetensors", "lora"]),
        (["--controlnet", "a.safetensors"], ["--control-image"]),
        (["--control-image", "a.png"], ["--controlnet"]),
        (["--controlnet", "a.safetensors", "--control-image", RED_HOUSE], ["a.safetensors"]),
        (["--words", "nowhere.pt"], ["nowhere.pt"]),
        (["--clip-skip", "0"], ["clip_skip", "got 0"]),
        (["--save-every", "0"], ["--save-every", "at least 1, got 0"]),
        (["--decode-batch", "-1"], ["--decode-batch", "at least 1, got -1"]),
        (["--prompts", "nowhere.txt"], ["no file nowhere.txt"]),
        (["--prompts", os.devnull], ["no file /dev/null"]),
        (["--prompts", RED_HOUSE], ["red-house.png"]),
        (["--prompts", "a.txt", "--prompt", "b"], ["--prompts"]),
        (["--from-png", "nowhere.png"], ["no file nowhere.png"]),
        (["--from-png", ROOT / "sd.py"], ["sd.py"]),
        (["--from-png", ROOT / "tiny" / "twelve.png"], ["twelve.png"]),
        (["--sampler", "lcm", "--steps", "51"], ["lcm", "50"]),
        (["--seed", "1.5"], ["1.5"]),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_message_and_status_2(paint, options, says, tmp_path):
    _, err = paint(*options, status=2)
    assert "Traceback" not in err and "sd.py: " in err
    assert all(text in err for text in says), err
    assert not names(tmp_path)


@pytest.mark.parametrize("line", ["Steps: x", "Steps: 3, Size: 64", 'Steps: 3, Lora: "\'a"'])
def test_a_pictures_text_that_is_damaged_gets_a_message(paint, tmp_path, line):
    info = PngInfo()
    info.add_text("parameters", f"a tree\n{line}")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=info)
    assert "--from-png a.png: its parameters" in paint("--from-png", "a.png", status=2).err


@pytest.mark.parametrize(
    "line, says",
    [
        ("Sampler: UniPC", "sampler must be"),
        ("dtype: int8", "dtype must be"), ("Size: 100x64", "width must be"),
        ("Mask: a.png", "--mask needs"), ("Model file: gone.ckpt", "gone.ckpt"),
    ],
)  # fmt: skip
def test_what_a_picture_says_is_checked_as_if_it_was_typed(paint, tmp_path, line, says):
    info = PngInfo()
    info.add_text("parameters", f"a tree\nSteps: 1, {line}")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=info)
    assert says in paint("--from-png", "a.png", status=2).err
    assert names(tmp_path) == {"a.png"}


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"], ["--dtype", "int8"], ["--output", "a.gif"], ["--mask", "a.png"],
        ["--lora", "a:nan"], ["--controlnet", "a"], ["--prompts", "nowhere.txt"],
    ],
    ids=str,
)  # fmt: skip
def test_numbers_and_names_are_checked_before_a_model_is_loaded(paint, monkeypatch, options):
    monkeypatch.setattr(app, "load_model", lambda args: pytest.fail("it was loaded"))
    paint(*options, status=2)


@pytest.mark.parametrize(
    "error, status, says",
    [
        (sd.SDError("mend it"), 2, "sd.py: mend it\n"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "there is no file a.txt"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "sd.py: stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_can_be_mended_is_a_message(paint, monkeypatch, error, status, says):
    monkeypatch.setattr(app, "load_model", raising(error))
    assert says in paint(status=status).err


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(paint, monkeypatch, error):
    monkeypatch.setattr(app, "load_model", raising(error))
    with pytest.raises(type(error), match="a bug"):
        paint()


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_picture_that_is_no_number_is_not_painted(tiny):
    with pytest.raises(sd.SDError, match="float32"):
        tiny.to_pictures(mx.full((1, 8, 8, 4), mx.nan))
