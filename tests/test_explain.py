"""examples/explain.py: the page is whole, what it shows is what sd.py computes, and no bit of that
changes because somebody looks."""

import ast
import base64
import functools
import html.parser
import importlib
import io
import json
import re
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image

import sd
from sd_more.low_memory import LowMemory
from tests.reference import ROOT, assert_close, cli, last

sys.path.append(str(ROOT / "examples"))
explain = importlib.import_module("explain")
page_of = importlib.import_module("explain_page")

PROMPT = "a red house"
FEW = ["--steps", 4, "--reference", 8, "--quiet"]
SMALL = [*FEW, "--width", 64, "--height", 64]
OPTIONS = {"seed": 42, "steps": 4, "cfg": 2.0, "width": 64, "height": 64}


def arguments(prompt, *words):
    return explain.parse([prompt, *map(str, words)])


@pytest.fixture(scope="module")
def study(tiny):
    """At the miniature's own size, where it knows what a house is."""
    return explain.study(tiny, arguments(PROMPT, *FEW))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of one call of the program, and what it said."""
    folder = tmp_path_factory.mktemp("made")
    options = [*SMALL, "-o", "page.html", "--png", "pictures", "--exchange", "house=boat"]
    done = cli(PROMPT, *options, cwd=folder, script="examples/explain.py")
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def page(made):
    return Page((made[0] / "page.html").read_text("utf-8"))


VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(html.parser.HTMLParser):
    """Tags must be closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.tags, self.data = text, [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"{tag} has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        self.data.append(([*self.open], data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def maps(self):
        (text,) = re.findall(r'<script type="application/json" id="maps">(.*?)</script>', self.text)
        return json.loads(text)


def decoded(uri):
    start, code = uri.split(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(code, validate=True)))
    assert start == f"data:image/{picture.format.lower()}"
    picture.load()
    return picture


# %% The page --------------------------------------------------------------------------------------


def test_the_page_is_well_formed(page):
    """Every tag is closed, no id is there twice, and the contents lead to the sections."""
    assert page.open == [] and page.text.startswith("<!DOCTYPE html>")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert links == [f"#{name}" for name in page_of.SECTIONS] and len(links) == 7
    assert {link[1:] for link in links} <= set(ids)
    assert "$" not in re.sub(r"<script.*?</script>", "", page.text, flags=re.DOTALL)


def test_every_picture_is_in_the_page_and_decodes(page):
    pictures = page.all("img")
    assert len(pictures) > 50
    for attributes in pictures:
        assert decoded(attributes["src"]).size <= (64, 64)
        assert attributes["alt"] or "grey" in attributes["class"]  # below a map, which has one
    maps = page.maps()
    assert len(maps["frames"]) == 3 and maps["times"] == [*map(page_of.at_time, (751, 501, 251, 1))]
    for frames in maps["frames"]:
        assert [decoded(uri).mode for uri in frames] == ["RGBA"] * 4


def test_nothing_is_loaded_from_elsewhere(page):
    """And a browser is told so, too."""
    text = re.sub(r"base64,[\w+/=]+", "", page.text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|<object", text)
    sources = {v[:5] for _, a in page.tags for name, v in a.items() if name in ("src", "srcset")}
    assert sources == {"data:"}
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len(page.text) < 5e6


def test_the_tokens_are_the_tokenizers(page, tokenizer):
    shown = []
    for tag, attributes in page.tags:
        assert tag != "li" or attributes.get("class") in (None, "token")
    for item in re.findall(r'<li class="token">(.*?)</li>', page.text):
        number, times = re.fullmatch(
            r"<b>.*</b> <span>(\d+)</span>(?: &times; (\d+))?", item
        ).groups()
        shown += [int(number)] * int(times or 1)
    assert shown == tokenizer.encode(PROMPT) and len(shown) == 77


@pytest.mark.parametrize("prompt", ["a" + " red" * 90, "x" * 300, "<b>&\"'"])
def test_other_prompts_have_77_tokens_too(study, tokenizer, prompt):
    """Longer ones than are read; and none is HTML."""
    other = explain.Study(**vars(study) | {"prompt": prompt})
    _, _, body = page_of.explain_tokens(other, page_of.Album())
    chips = re.findall(r"<span>(\d+)</span>(?: &times; (\d+))?", body)
    assert [int(i) for i, n in chips for _ in range(int(n or 1))] == tokenizer.encode(prompt)
    assert Page(body).open == [] and "<b>&<" not in body


def test_what_it_says_is_in_sd_py_is_there(page):
    """Each name in the section that stands beside it."""
    source = (ROOT / "sd.py").read_text("utf-8")
    marks = {m[1]: source[: m.start()].count("\n") for m in re.finditer(r"# %% (\d+)\. ", source)}
    places = set(re.findall(r'<code data-section="(\d+)">([\w.]+)</code>', page.text))
    assert len(places) > 20
    for number, name in places:
        body, line = ast.parse(source).body, 0
        for part in name.split("."):
            (node,) = [each for each in body if getattr(each, "name", None) == part]
            body, line = node.body, node.lineno
        section = max((n for n in marks if marks[n] < line), key=marks.get)
        assert section == number, f"{name} is in section {section}"


def test_the_pngs_are_the_pages_pictures(made, tiny):
    """Of the final picture every bit is as sd.py paints it."""
    folder, done = made
    files = sorted(folder.glob("pictures/*.png"))
    assert f"saved {len(files)} pictures in pictures" in done.stdout
    assert {"final", "x-t751", "eps-t001", "x0-t501", "word-house", "cfg-3", "sampler-dpm",
            "exchange-difference", "x0-without-t001"} <= {file.stem for file in files}  # fmt: skip
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (64, 64)
    (truth,) = tiny.txt2img(PROMPT, **OPTIONS)
    with Image.open(folder / "pictures" / "final.png") as picture:
        assert np.abs(np.asarray(picture, int) - np.asarray(truth, int)).max() <= 1


def test_the_command_says_what_it_does_and_overwrites_nothing(made):
    folder, done = made
    assert done.stdout.startswith("saved page.html\n") and done.stderr == ""
    assert {path.name for path in folder.iterdir()} == {"page.html", "pictures"}


# %% Attention -------------------------------------------------------------------------------------


def test_the_weights_are_attentions(tiny):
    """Against PyTorch's softmax; and with one head, and the unit vectors for values, what
    AttentionCore itself gives are the weights."""
    q, k = (torch.randn(n, 80, generator=torch.Generator().manual_seed(n)) for n in (64, 77))
    split = lambda y: y.reshape(-1, 4, 20).transpose(0, 1)
    truth = torch.softmax(split(q) @ split(k).transpose(1, 2) / 20**0.5, -1).mean(0)
    ours = explain.attention_weights(mx.array(q.numpy()), mx.array(k.numpy()), 4)
    assert_close(ours, truth, 1e-6)
    q, k, v = (mx.array(y)[None] for y in (q.numpy(), k.numpy(), np.eye(77, 80, dtype=np.float32)))
    assert_close(
        explain.attention_weights(q[0], k[0], 1), sd.AttentionCore(1)(q, k, v)[0, :, :77], 1e-6
    )


def test_recorded_attention_sums_to_one(study):
    """A sum of 77 numbers, each rounded to 24 bits some times: 77 * 2^-24 is 5e-6."""
    for answer in study.run.answers.values():
        assert answer.maps.shape == (16, 16, 77) and (answer.maps >= 0).all()
        assert np.abs(answer.maps.sum(-1) - 1).max() < 1e-5
    assert study.layers == 16


@pytest.mark.parametrize("n, m", [(64, 32), (8, 16), (1, 16), (5, 3), (16, 16), (9, 16)])
def test_resizing_keeps_sums_and_means(n, m):
    weights = explain.resizing(n, m)
    assert weights.shape == (m, n) and np.allclose(weights.sum(1), 1) and (weights >= 0).all()
    assert np.allclose(weights, weights[::-1, ::-1])  # neither end is favoured
    assert n != m or np.array_equal(weights, np.eye(n))


@pytest.mark.parametrize("h, w, grid", [(8, 8, (8, 8)), (64, 64, (32, 32)), (96, 64, (24, 16))])
def test_maps_are_of_a_modest_size(h, w, grid):
    recorder = explain.Recorder(h, w)
    assert recorder.grid == grid
    for n in recorder.sizes:
        recorder.note(n, np.full((n, 77), 1 / 77))
    assert recorder.mean().shape == (*grid, 77) and np.allclose(recorder.mean(), 1 / 77)


def test_a_level_that_is_halved_from_odd_is_found(tiny):
    """72 pixels are 9 latents, then 5, 3 and 2."""
    recorder = explain.Recorder(9, 12)
    with explain.recording(tiny, recorder):
        last(tiny.generate_latents(PROMPT, **OPTIONS | {"height": 72, "width": 96, "steps": 1}))
    assert recorder.mean().shape == (9, 12, 77)


@pytest.mark.parametrize(
    "kind", [sd.StableDiffusion, functools.partial(sd.StableDiffusion, fast=False), LowMemory]
)
@pytest.mark.parametrize("cfg", [1, 2.0])
def test_looking_changes_no_bit(kind, cfg):
    """Neither while it looks nor afterwards. And the prompt's weights are noted, not those of the
    answer without it: they are the same as in a call with the prompt alone, but for rounding."""
    model, options = kind(), OPTIONS | {"steps": 2, "cfg": cfg}
    context = model.encode_prompts(["", PROMPT])
    told = context[1:] if cfg == 1 else context
    paint = lambda task: [
        *map(np.array, model.generate_latents(PROMPT, context=told, task=task, **options))
    ]
    truth, recorder = paint(None), explain.Recorder(8, 8)
    with explain.recording(model, recorder):
        watched = explain.Watched(recorder)
        assert np.array_equal(paint(watched), truth)
        assert len(recorder.maps) == 16 and len(watched.answers) == 3
        answer = watched.answers[-1]
        model.predict(answer.x, answer.t, sd.Condition(context[1:]))
        assert_close(recorder.mean(), answer.maps, 1e-4)
    recorder.maps.clear()
    assert np.array_equal(paint(None), truth) and not recorder.maps


def test_the_cores_come_back_after_an_error_too(tiny):
    cores = [m.core for m in tiny.unet.modules() if isinstance(m, sd.Attention)]
    with pytest.raises(KeyError), explain.recording(tiny, explain.Recorder(8, 8)):
        raise KeyError
    again = [m.core for m in tiny.unet.modules() if isinstance(m, sd.Attention)]
    assert all(a is b for a, b in zip(cores, again, strict=True)) and tiny.gpu == sd.on_gpu()


def test_the_words_maps_mean_something(study):
    """A house is drawn where "house" is looked at: there the picture without the word differs most.
    "red" is looked at elsewhere."""
    words = [word.text for word in study.words]
    assert words == ["a", "red", "house"]
    assert [word.positions for word in study.words] == [[1], [2], [3]]
    a, red, house = page_of.word_maps(study).mean(1)  # (16, 16) each
    likeness = lambda x, y: np.corrcoef(x.ravel(), y.ravel())[0, 1]
    assert likeness(house, red) < 0.9 and likeness(house, a) < 0.9
    assert np.abs(house - red).max() > 0.2 * house.max()


# %% What is shown is what sd.py computes ----------------------------------------------------------


def test_paths_end_where_generate_latents_ends(study, tiny):
    """From the seed's noise. Here the prompts are encoded in another batch: hence the rounding,
    which few steps with guidance make little more of."""
    noise = sd.torch_normal(42)((1, 4, 16, 16)).transpose(0, 2, 3, 1)
    assert {"plms", "ddim", "euler", "dpm++"} <= study.samplers.keys()
    for name, run in study.samplers.items():
        steps = tiny.generate_latents(PROMPT, sampler=name, seed=42, steps=4)
        assert_close(run.path[0], noise, 1e-6)
        assert len(run.path) == 5 and run.calls == 4 + (name == "plms")
        assert_close(np.concatenate(run.path[1:]), np.concatenate([*map(np.array, steps)]), 1e-3)
    assert study.samplers["plms"] is study.run and study.cfgs[2.0] is study.run


def test_each_cfg_is_painted_with_it(study, tiny):
    assert [*study.cfgs] == [1, 2.0, 3.0, 4.0]
    for cfg, run in study.cfgs.items():
        x = last(tiny.generate_latents(PROMPT, cfg=cfg, seed=42, steps=4))
        assert_close(run.path[-1], x, 1e-3)


def test_the_answers_make_up_the_steps(study, tiny):
    """x is x0 and eps in the schedule's mixture; with guidance eps goes from the answer without the
    prompt to the one with it, and beyond."""
    for answer in study.run.answers.values():
        assert_close(tiny.schedule.add_noise(answer.x0, answer.eps, answer.t), answer.x, 1e-5)
    assert [*study.asked] == [*study.run.answers] == [751, 501, 251, 1]
    for t, ((_, without), (_, told)) in study.asked.items():
        assert_close(without + 2 * (told - without), study.run.answers[t].eps, 1e-4)
        assert page_of.rms(told - without) > 0


def test_the_exchange_differs_in_the_exchanged_word_only(study, tokenizer):
    old, new, other, run = study.exchange
    pairs = [*zip(tokenizer.encode(PROMPT), tokenizer.encode(other), strict=True)]
    (differs,) = [i for i, (a, b) in enumerate(pairs) if a != b]
    assert differs == 3 and (old, new, other) == ("house", "tree", "a red tree")
    assert np.array_equal(run.path[0], study.run.path[0])
    assert page_of.rms(run.path[-1] - study.run.path[-1]) > 0.05


@pytest.mark.parametrize(
    "prompt, wanted, found",
    [
        ("a red house on the grass at sunset", None, ("house", "tree", "a red tree on the")),
        ("A Tree", None, ("tree", "house", "A house")),
        ("a photo of a cat, grainy", None, ("cat", "tree", "a photo of a tree, grainy")),
        ("on a hill", None, ("hill", "tree", "on a tree")),
        ("a red boat and a red house", "red=blue", ("red", "blue", "a blue boat and a red")),
        ("a boathouse, a boat", r"boat=\1 x", ("boat", r"\1 x", r"a boathouse, a \1 x")),
    ],
)
def test_a_word_is_exchanged(tokenizer, prompt, wanted, found):
    words = explain.find_words(tokenizer, prompt)
    *pair, other = explain.choose_exchange(words, prompt, wanted)
    assert (*pair, other[: len(found[2])]) == found


def test_a_word_that_stands_there_twice_has_all_its_tokens(tokenizer):
    words = explain.find_words(tokenizer, "a househunter, a boat!")
    assert [(w.text, w.positions) for w in words] == [
        ("a", [1, 5]), ("househunter", [2, 3]), ("boat", [6]),
    ]  # fmt: skip
    chosen = explain.choose_words(words, "Boat,a,boat")
    assert [word.text for word in chosen] == ["boat", "a"]
    many = explain.find_words(tokenizer, " ".join("abcdefghijkl") + " red" * 90)
    assert len(explain.choose_words(many, None)) == explain.MOST_WORDS
    assert max(many[-1].positions) == 75


def test_the_two_directions_keep_what_lies_in_a_plane():
    """Distances of points in a plane of 50 dimensions, moved and turned there."""
    rng = np.random.default_rng(0)
    plane, _ = np.linalg.qr(rng.standard_normal((50, 2)))
    flat = {name: rng.standard_normal((n, 2)) for name, n in (("a", 5), ("b", 9))}
    high = {name: path @ plane.T + 3 for name, path in flat.items()}
    found, share = page_of.principal(high)
    assert share == pytest.approx(1)
    distance = lambda x, y: np.linalg.norm(x[:, None] - y, axis=-1)
    assert np.allclose(distance(found["a"], found["b"]), distance(flat["a"], flat["b"]))


def test_errors_are_those_of_the_last_x(study):
    errors = page_of.final_errors(study)
    exact = np.array(study.reference.path[-1]).ravel()
    for name, run in study.samplers.items():
        truth = np.linalg.norm(np.array(run.path[-1]).ravel() - exact) / np.linalg.norm(exact)
        assert errors[name] == pytest.approx(truth, rel=1e-5)
    assert errors["euler"] > 0 and errors["euler-a"] > errors["dpm++"]


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 4.1), (0.011, 0.013), (-2e-6, 2e-6)])
def test_ticks_are_few_and_in_the_range(low, high):
    numbers = [*page_of.ticks(low, high)]
    assert 2 <= len(numbers) <= 6 and low <= numbers[0] and numbers[-1] <= high + 1e-9


def test_one_step_and_low_memory_make_a_page(tmp_path, monkeypatch):
    """With a single step nothing is divided by the number of steps before it; and a prompt is no
    HTML."""
    monkeypatch.chdir(tmp_path)
    prompt = 'a <i>red</i> & "$house"'
    options = ["--steps", 1, "--reference", 1, "--cfg", 1, "--low-memory", "--quiet"]
    words = map(str, [prompt, *options, "--width", 64, "--height", 72])
    explain.main([*words, "--output=a.html", "--sampler=ddim", "--words=house"])
    made = Page((tmp_path / "a.html").read_text("utf-8"))
    assert made.open == [] and not made.all("i")
    assert (["html", "head", "title"], prompt) in made.data


def test_the_safety_checker_is_asked(study, capsys):
    sd.say_once.cache_clear()
    careful = explain.Study(**vars(study) | {"checker": lambda picture: True})
    (black,) = careful.decode(study.run.path[-1:])
    assert black.getextrema() == ((0, 0),) * 3 and "blacked out" in capsys.readouterr().err
    (shown,) = study.decode(study.run.path[-1:])
    assert shown.getextrema() != ((0, 0),) * 3


def test_a_model_that_starts_from_no_x0(capsys):
    """It answers v, and its first sigma is infinite: plms and lms are left out, which is said."""
    sd.say_once.cache_clear()
    numbers = {"prediction": "v", "zero_snr": True, "spacing": "trailing", "sampler": "ddim"}
    model = sd.StableDiffusion(changes=[lambda config, w: (replace(config, **numbers), w)])
    study = explain.study(model, arguments(PROMPT, *SMALL, "--steps", 2))
    said = capsys.readouterr().err
    assert "plms is left out: sampler must be" in said and "lms is left out:" in said
    assert study.run.answers.keys() == {999, 499} and "ddim" in study.samplers
    assert not study.samplers.keys() & {"plms", "lms"}
    for t, ((_, without), (_, told)) in study.asked.items():
        assert_close(without + 2 * (told - without), study.run.answers[t].eps, 1e-4)
    text, _ = page_of.write_page(study)
    assert Page(text).open == [] and "nan" not in text[: text.index("base64")]


# %% What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["a", "--steps", "0"], "steps must be 1 to 999, got 0."),
        (["a", "--sampler", "best"], "sampler must be one of plms,"),
        (["a", "-o", "page.png"], "--output must be NAME.html, got page.png."),
        (["a", "--reference", "1000"], "--reference must be 1 to 999, got 1000."),
        (["a", "--seed", "1,2"], "--seed must be one number, got [1, 2]."),
        (["a", "--n-images", "2"], "--n-images is not for explain.py."),
        (["a", "--show-tokens"], "--show-tokens is not for explain.py."),
        (["a", "--exchnge", "a=b"], "unrecognized arguments: --exchnge"),
        (["a red house", "--words", "red,boat"], "--words must be of the prompt's: a, red, house"),
        (["a red house", "--exchange", "boat=tree"], "--exchange must be a word of the prompt"),
        (["a red house", "--exchange", "house"], "--exchange must be OLD=NEW, two words"),
        (["?!"], "the prompt has no word to explain"),
        (["a", "--model", "none.safetensors"], "none.safetensors"),
        (["a", "-o", "file/page.html"], "its folder is not writable"),
        (["a", "--png", "file"], "its folder is not writable"),
    ],
)
def test_bad_arguments_end_with_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        explain.main([*words, "--quiet"])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.startswith("explain.py: ") and message in said.err
    assert said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_as_a_program_it_ends_with_status_2(tmp_path):
    done = cli("a", "--steps", "x", cwd=tmp_path, script="examples/explain.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    done = cli("--help", cwd=tmp_path, script="examples/explain.py")
    assert done.returncode == 0 and "--exchange OLD=NEW" in done.stdout
