"""The first day: options, seeds, names, sizes and many prompts, as somebody would type them."""

import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

import sd
from sd_more import app
from sd_more import options as its_options
from sd_more.batch import share_of_this_process
from sd_more.infotext import read_parameters
from sd_more.output import choose_name, save_picture, slug
from tests.reference import ROOT
from tests.test_cli import names, paint, pixels, text_of  # noqa: F401

RED_HOUSE = ROOT / "tiny" / "red-house.png"
FAST = ("--steps", 1, "--sampler", "ddim", "--width", 64, "--height", 64)


@pytest.fixture(autouse=True)
def no_defaults(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))


# %% What is typed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["a red house"], ["a", "red", "house"], ["-p", "a red house"], ["--prompt=a red house"],
        ["a red house", "--negative_prompt", "", "--n_images=1"],
    ],
)  # fmt: skip
def test_the_prompt_may_stand_by_itself(words):
    (line,) = app.choose_lines(app.parse(words))
    assert line.prompt == "a red house" and "words" not in line.given


def test_two_prompts_are_one_too_many(paint):  # noqa: F811
    assert "two prompts" in paint("a", "--prompt", "b", status=2).err
    assert "two prompts" in paint("-promt", "a cat", status=2).err  # read as -p romt


@pytest.mark.parametrize(
    "words, says",
    [
        (["--promt", "a"], "Did you mean --prompt?"),
        (["--step", "3x"], "argument --steps"),
        (["--negative", "a", "--lora-dir", "x"], "--lora-dir"),
        (["--num-images", "2"], "Did you mean --n-images?"),
        (["--seed"], "expected one argument"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_a_wrong_option_is_one_line(paint, words, says):  # noqa: F811
    err = paint(*words, status=2).err
    assert err.count("\n") == 1 and says in err and "--help lists all options" in err


def test_help_and_version_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        app.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    own = str(its_options.defaults_file())
    assert max(len(line) for line in out.splitlines() if own not in line) <= 80
    app.main(["--version"])
    out = capsys.readouterr().out
    assert re.fullmatch(r"sd.py .*, mlx \d.*\n", out)


SHORT = {"p": "prompt", "n": "negative_prompt", "s": "seed", "o": "output", "W": "width",
         "H": "height"}  # fmt: skip


@pytest.mark.parametrize("letter", SHORT)
def test_short_options(letter):
    value = {"prompt": "a", "negative_prompt": "b", "output": "c.png"}.get(SHORT[letter], "72")
    args = vars(app.parse([f"-{letter}", value]))[SHORT[letter]]
    assert args == {"seed": [72], "width": 72, "height": 72}.get(SHORT[letter], value)


@pytest.mark.parametrize(
    "text, seeds",
    [
        ("7", [7]), ("1,2,7-9", [1, 2, 7, 8, 9]), ("5-5", [5]), (" 3 , 4 ", [3, 4]),
        ("-3", [-3]), ("0", [0]), ("18446744073709551615", [2**64 - 1]),
    ],
)  # fmt: skip
def test_seeds(text, seeds):
    assert app.parse([f"--seed={text}"]).seed == seeds


@pytest.mark.parametrize(
    "text", ["", "a", "1.5", "1,,2", "9-7", "0-10000", "1-2-3", "18446744073709551616", "٣"]
)
def test_what_is_no_seed(text):
    if text == "٣":  # a digit of Arabic is one
        assert app.parse([f"--seed={text}"]).seed == [3]
        return
    with pytest.raises(sd.SDError, match="seed"):
        app.parse([f"--seed={text}"])


def test_a_random_seed_is_another_each_time_and_stored(paint, tmp_path):  # noqa: F811
    assert len({app.parse(["--seed", "-1"]).seed[0] for _ in range(9)}) == 9
    paint("a tree", *FAST, "--seed", -1)
    seed = re.search(r"Seed: (\d+)", text_of(tmp_path / "out.png"))[1]
    paint("a tree", *FAST, "--seed", seed, "-o", "again.png")
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(tmp_path / "again.png"))


@pytest.mark.parametrize(
    "name, ours",
    [
        ("DPM++ 2M Karras", "dpm++-karras"), ("Euler a", "euler-a"), ("euler", "euler"),
        ("PLMS", "plms"), ("k_lms", "lms"), ("DPM++ 2M", "dpm++"),
    ],
)  # fmt: skip
def test_samplers_by_other_programs_names(name, ours):
    assert app.parse(["--sampler", name]).sampler == ours


@pytest.mark.parametrize(
    "name, ours", [("fp16", "float16"), ("BF16", "bfloat16"), ("fp32", "float32")]
)
def test_types_by_their_short_names(name, ours):
    assert app.parse(["--dtype", name]).dtype == ours


def test_a_device_that_is_not_there_is_said(paint, monkeypatch):  # noqa: F811
    if not sd.mx.is_available(sd.mx.gpu):
        assert "MLX has no GPU here" in paint("--device", "gpu", status=2).err
    asked = []
    monkeypatch.setattr(sd.mx, "set_default_device", asked.append)
    paint(*FAST, "--device", "cpu")
    assert asked == [sd.mx.cpu]


def test_quiet_says_nothing_of_the_progress(paint):  # noqa: F811
    said = paint(*FAST, "--quiet")
    assert said.err == "" and said.out == "saved out.png\n"
    said = paint(*FAST)
    assert "loading tiny" in said.err and "decoding" in said.err and "step 1/1" in said.err


# %% Defaults of one's own -------------------------------------------------------------------------


def own(text):
    path = its_options.defaults_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults_of_ones_own(paint, tmp_path):  # noqa: F811
    own('steps = 3\nsampler = "euler"\nnegative-prompt = "night"\nquiet = true\n'
        'low_memory = false\nfolder = ["."]\n')  # fmt: skip
    args = app.parse(["a tree", "--steps", "2"])
    assert (args.steps, args.sampler, args.negative_prompt, args.quiet) == (
        2,
        "euler",
        "night",
        True,
    )
    assert [str(path) for path in args.folder] == ["."] and not args.low_memory
    assert args.given == ["prompt", "steps"]
    paint("a tree", "--width", 64, "--height", 64, "-o", "a.png")
    # A picture's own settings count more, so that it comes out as it was.
    own('steps = 2\nnegative-prompt = "snow"\nwidth = 128\nquiet = true\n')
    said = paint("--from-png", "a.png", "-o", "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")) and not said.err


@pytest.mark.parametrize(
    "text, says",
    [
        ("steps = ", "not readable as TOML"), ("stepps = 3", "Did you mean --steps?"),
        ("steps = 'many'", "invalid int value"), ("[steps]\na = 1", "steps must be text"),
        ("steps = 0", "steps must be 1 to 999"), ('from-png = "a.png"', "for the command line"),
    ],
)  # fmt: skip
def test_wrong_defaults_are_said_with_their_place(paint, text, says):  # noqa: F811
    path = own(text)
    err = paint(*FAST[2:], status=2).err
    assert says in err and (str(path) in err or "steps must be 1" in err)


def test_the_home_folder_may_be_written_short(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    own('folder = ["~/models"]\nmodel = "~/a.ckpt"')
    args = app.parse([])
    assert [str(args.folder[0]), args.model] == ["/home/me/models", "/home/me/a.ckpt"]


def test_help_says_where_they_are(capsys):
    with pytest.raises(SystemExit):
        app.main(["--help"])
    assert str(its_options.defaults_file()) in capsys.readouterr().out


# %% Names of pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output, name",
    [
        ("out.png", "out.png"), ("a/b.JPG", "a/b.JPG"), ("pics/", "pics/a-cat-at-night-7.png"),
        ("pics", "pics/a-cat-at-night-7.png"), ("{seed}.webp", "7.webp"),
        ("{n}-{prompt}-{seed}.png", "3-a-cat-at-night-7.png"), ("x/{prompt}", None),
        ("{prompt}.png", "a-cat-at-night.png"),
    ],
)  # fmt: skip
def test_names_are_filled_in(output, name):
    found = str(choose_name(output, "A cat, at night!", 7, 3))
    assert found == (name or "x/a-cat-at-night/a-cat-at-night-7.png")


@pytest.mark.parametrize("output", ["", "a.gif", "a.txt", "{color}.png", "{}.png", "a.safetensors"])
def test_other_names_are_refused(output):
    with pytest.raises(sd.SDError, match="--output"):
        choose_name(output, "a", 1, 1)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", "untitled"), ("../../etc/passwd", "etc-passwd"), ("!!!", "untitled"),
        ("日本の城", "日本の城"), ("a\nb\x1b[31m", "a-b-31m"),
        ("(a:1.2) <lora:x:1>", "a-1-2-lora-x-1"),
        ("x" * 200, "x" * 60), ("城" * 50, "城" * 20), ("CON", "con"),
    ],
)  # fmt: skip
def test_a_prompt_becomes_a_name_that_any_disk_takes(prompt, expected):
    assert slug(prompt) == expected


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp", "WEBP"])
def test_each_kind_of_file_holds_the_settings(paint, tmp_path, kind):  # noqa: F811
    options = ("a tree, 日本 🐱", *FAST, "--seed", 3)
    paint(*options, "-o", f"pics/sub/a.{kind}")
    path = tmp_path / "pics" / "sub" / f"a.{kind}"
    found = read_parameters(path)
    assert (found["prompt"], found["seed"], found["width"]) == ("a tree, 日本 🐱", 3, 64)
    paint("--from-png", path, "-o", "again.png")
    paint(*options, "-o", "first.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "first.png"))


def test_settings_too_long_for_a_jpeg_are_said(tmp_path, capsys):
    sd.say_once.cache_clear()
    for end in ("jpg", "webp"):
        save_picture(
            Image.new("RGB", (64, 64)), tmp_path / f"a.{end}", "x\nSteps: 1" + "y" * 40_000
        )
    assert capsys.readouterr().err.count("too long for a JPEG") == 1
    assert Image.open(tmp_path / "a.jpg").size == (64, 64)


def test_a_folder_gets_names_that_tell(paint, tmp_path):  # noqa: F811
    for _ in range(2):
        paint("a tree", *FAST, "--seed", "5,6", "-o", "pics")
    assert names(tmp_path / "pics") == {
        "a-tree-5.png", "a-tree-6.png", "a-tree-5-2.png", "a-tree-6-2.png",
    }  # fmt: skip


# %% Many pictures ---------------------------------------------------------------------------------


def test_several_seeds_are_those_of_single_runs(paint, tmp_path):  # noqa: F811
    paint("a tree", *FAST, "--seed", "9,3-4", "-o", "{seed}.png")
    assert names(tmp_path) == {"9.png", "3.png", "4.png"}
    for seed in (9, 3):
        paint("a tree", *FAST, "--seed", seed, "-o", f"alone-{seed}.png")
        assert np.array_equal(
            pixels(tmp_path / f"{seed}.png"), pixels(tmp_path / f"alone-{seed}.png")
        )
    paint("a tree", *FAST, "--seed", "9,3-4", "--n-rows", 1, "-o", "row.png")
    row = pixels(tmp_path / "row.png")
    assert row.shape == (64, 192, 3) and np.array_equal(row[:, :64], pixels(tmp_path / "9.png"))


LINES = """# for the calendar
a tree
a blue boat  --seed 3,4 -n "at night" --steps 2

--prompt "a (red:1.2) house" --width 128
"""


def test_lines_may_have_options_of_their_own(paint, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "p.txt").write_text(LINES)
    paint("--prompts", "p.txt", *FAST, "-o", "{n}-{prompt}.png")
    assert names(tmp_path) == {
        "p.txt", "1-a-tree.png", "2-a-blue-boat.png", "3-a-blue-boat.png", "4-a-red-1-2-house.png",
    }  # fmt: skip
    boat = text_of(tmp_path / "3-a-blue-boat.png")
    assert (
        boat.startswith("a blue boat\nNegative prompt: at night\nSteps: 2,") and "Seed: 4" in boat
    )
    assert Image.open(tmp_path / "4-a-red-1-2-house.png").size == (128, 64)
    paint("a blue boat", *FAST, "--steps", 2, "--seed", 4, "-n", "at night", "-o", "one.png")
    assert np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "3-a-blue-boat.png"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    paint("--prompts", "-", *FAST, "-o", "stdin/{n}.png")
    assert len(names(tmp_path / "stdin")) == 4


@pytest.mark.parametrize(
    "line, says",
    [
        ("a --lora x", "line 1: --lora is for all lines"),
        ("a --steps 0", "steps must be 1 to 999"), ("a --step x", "line 1: argument --steps"),
        ("a --seed 1 'b", "line 1: No closing quotation"),
        ("a --seed 1 b", "line 1: b stands behind the options"), ("# nothing", "it is empty"),
        ("a --promt b", "Did you mean --prompt?"), ("a --model b", "--model is for all lines"),
    ],
)  # fmt: skip
def test_wrong_lines_are_said_by_number(paint, tmp_path, line, says):  # noqa: F811
    (tmp_path / "p.txt").write_text(line)
    assert says in paint("--prompts", "p.txt", *FAST, status=2).err
    assert names(tmp_path) == {"p.txt"}


def test_processes_share_all_pictures(monkeypatch):
    class Group:
        def __init__(self, rank):
            self.rank, self.size = (lambda: rank), (lambda: 2)

    lines = [app.parse(["--seed", "1,5,5", "--n-images", "2"]), app.parse([])]
    found = []
    for rank in range(2):
        monkeypatch.setattr(sd.mx.distributed, "init", lambda rank=rank: Group(rank))
        found += [(s, count, number) for _, s, count, number in share_of_this_process(lines)]
    assert found == [(1, 2, 1), (5, 1, 3), (6, 1, 4), (5, 2, 5), (42, 1, 7)]


def test_what_is_finished_stays_when_one_stops(paint, tmp_path, monkeypatch):  # noqa: F811
    seen, finish = [], app.Painter.finish

    def stop(*args):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return finish(*args)

    monkeypatch.setattr(app.Painter, "finish", stop)
    assert "stopped" in paint("a", *FAST, "--seed", "1-9", "-o", "{seed}.png", status=130).err
    assert names(tmp_path) == {"1.png"}


# %% Sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, side, fitted",
    [
        ((4032, 3024), 512, (592, 440)), ((3024, 4032), 512, (440, 592)),
        ((512, 512), 512, (512, 512)),
        ((640, 512), 512, (640, 512)), ((768, 768), 512, (512, 512)), ((64, 64), 128, (128, 128)),
        ((100, 140), None, (96, 144)), ((10_000, 100), 128, (1280, 64)), ((1, 1), 128, (128, 128)),
    ],
)  # fmt: skip
def test_a_picture_is_fitted_to_the_models_area(size, side, fitted):
    assert sd.fit(size, None, None, side) == fitted


def test_what_is_given_stays_and_the_rest_follows():
    assert sd.fit((400, 200), 512, None, 128) == (512, 256)
    assert sd.fit((400, 200), None, 512, 128) == (1024, 512)
    assert sd.fit((400, 200), 300, 300, 128) == (300, 300)


def test_a_phone_photo_is_painted_over_at_once(paint, tmp_path):  # noqa: F811
    Image.open(RED_HOUSE).resize((3000, 2000)).save(tmp_path / "photo.jpg")
    said = paint("a house", "--image", "photo.jpg", "--steps", 2)
    assert "photo.jpg: resized 3000 x 2000 to 160 x 104" in said.err
    assert Image.open(tmp_path / "out.png").size == (160, 104)
    (picture,) = sd.StableDiffusion().img2img("a house", tmp_path / "photo.jpg", steps=2, cfg=1)
    assert picture.size == (160, 104)


def test_both_sizes_crop_and_do_not_squash(tmp_path):
    image = Image.new("RGB", (300, 100), "white")
    image.paste("black", (100, 0, 200, 100))
    pixels, _ = sd.load_picture(image, 64, 64)
    assert pixels.shape == (64, 64, 3) and pixels.max() < 0.1  # the square in the middle


def test_a_size_far_beyond_the_models_is_said(paint):  # noqa: F811
    large = ("--steps", 1, "--sampler", "ddim", "--width", 256, "--height", 192)
    assert "256 x 192 is 3.0 times what the model was trained on" in paint("a", *large).err
    assert "trained on" not in paint("a", *large[:-2]).err


def test_upscale_paints_at_the_models_size_and_paints_over(paint, tmp_path):  # noqa: F811
    options = ("a red house", "--steps", 6, "--sampler", "ddim", "--seed", 3)
    paint(*options, "-o", "small.png")
    said = paint(*options, "--upscale", 1.5, "--upscale-strength", 0.5, "-o", "large.png")
    assert "painting over 192 x 192" in said.err and "step 3/3" in said.err
    small, large = (Image.open(tmp_path / f"{name}.png") for name in ("small", "large"))
    assert large.size == (192, 192)
    text = text_of(tmp_path / "large.png")
    assert "Hires upscale: 1.5, Upscale strength: 0.5" in text
    # It is image to image from the small one, enlarged.
    model = sd.StableDiffusion()
    seen = np.asarray(small.resize((192, 192), Image.LANCZOS), np.float32) / 255
    walk = model.generate_latents("a red house", task=sd.ImageToImage(seen, 0.5), steps=6, seed=3,
                                  sampler="ddim")  # fmt: skip
    *_, x = walk
    assert np.abs(np.int16(model.to_pictures(x)[0]) - np.int16(large)).max() <= 3
    paint("--from-png", "large.png", "-o", "again.png")
    assert np.array_equal(pixels(tmp_path / "large.png"), pixels(tmp_path / "again.png"))


@pytest.mark.parametrize(
    "options, says",
    [
        (["--upscale", "1"], "more than 1"), (["--upscale", "9"], "at most 8"),
        (["--upscale", "2", "--upscale-strength", "0"], "more than 0"),
        (["--upscale", "2", "--upscale-strength", "0.01"], "enough for 1 step"),
        (["--upscale", "8", "--width", "1024", "--height", "1024"], "at most 4096 x 4096"),
    ],
)  # fmt: skip
def test_wrong_upscales_are_refused(paint, tmp_path, options, says):  # noqa: F811
    assert says in paint("a", "--steps", 1, *options, status=2).err
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "field", ["Model file: org/name", "Lora: org/name:0.5", "VAE file: org/name"]
)
def test_nothing_is_fetched_because_a_picture_names_it(paint, tmp_path, monkeypatch, field):  # noqa: F811
    monkeypatch.setattr(app.convert_weights, "fetch", lambda *_: pytest.fail("it was fetched"))
    text = f"a\nSteps: 1, {field}, Version: sd.py"
    save_picture(Image.new("RGB", (64, 64)), tmp_path / "a.png", text)
    assert "org/name" in paint("--from-png", "a.png", status=2).err


def test_a_part_that_is_painted_anew_is_not_enlarged(paint, tmp_path):  # noqa: F811
    Image.new("L", (128, 128), 255).save(tmp_path / "mask.png")
    options = ("--image", RED_HOUSE, "--mask", "mask.png", "--upscale", 2, "--steps", 1)
    assert "--upscale is for whole pictures" in paint("a", *options, status=2).err
    assert names(tmp_path) == {"mask.png"}


def test_controlnets_that_are_not_asked_are_said(paint, tmp_path, controlnet):  # noqa: F811
    controlnet.save_pretrained(tmp_path / "edges")
    options = ("--controlnet", "edges", "--control-image", RED_HOUSE, "--steps", 2)
    assert "not asked while" in paint("a", *options, "--upscale", 1.5).err
    assert "not asked while" not in paint("a", *options).err
