"""See each stage of sd.py on a prompt of one's own: one HTML page, with all its pictures in it.

    python examples/explain.py "a red house" -o explain.html
    python examples/explain.py "a blue boat at night" --exchange night=sunset --words blue,night
    python examples/explain.py "a castle" --model sd-v1-4.ckpt --low-memory --reference 100

Whoever reads sd.py can hold the page beside it: each section of the page says which functions made
what it shows. It reaches inside where sd.py lets others in, and copies nothing of it:

    Watched          a task (section 8) that notes what was asked at each step, and the answer
    RecordingCore    a module in the place of a cross-attention's core (section 3)
    StableDiffusion  its predict, generate_latents and decode, called once more

    options  ->  study: text model and UNet  ->  sections of the page: VAE  ->  the files
"""

import argparse
import contextlib
import functools
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from explain_page import COLUMNS, pick, write_page

import sd
from sd_more import options
from sd_more.app import choose_habits, load_model
from sd_more.console import command
from sd_more.noise import GENERATORS
from sd_more.output import check_output
from sd_more.prompts import without_loras
from sd_more.safety import check_safety, load_checker

STEPS = 20  # of each run, by default
# With the miniature 50 steps of it end within 0.03 % of 200, and 200 of dpm++ within 0.3 %.
REFERENCE, REFERENCE_STEPS = "dpm++-karras", 50
MOST_WORDS = 8  # with a map each, unless --words says which
MOST_MAP = 32  # positions along a map's longer side
NO_NOUN = "on|in|at|by|with|and|under|over|near|behind|from|to|for|during|before|after"

# %% Options ---------------------------------------------------------------------------------------

KNOWN = {  # of sd.py's options those that mean something here
    "prompt", "seed", "steps", "cfg", "sampler", "spacing", "rescale", "rng", "width", "height",
    "model", "dtype", "device", "low_memory", "lora", "embedding", "vae", "clip_skip", "folder",
    "converted", "safety_check", "quiet", "plain_prompt",
}  # fmt: skip
HELP = """Explain how sd.py paints a prompt: one HTML page that needs no network.
Besides the options below it takes these of sd.py, see python sd.py --help:
  {}
It takes {} steps where --steps says nothing else. The prompt is read as with
--plain-prompt. With a large model most of the time goes into some {} x
steps UNet calls, and as many as --reference says. --low-memory works, too."""


def make_parser():
    names = {*KNOWN, "no_safety_check"} - {"safety_check", "plain_prompt"}
    theirs = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
    theirs = textwrap.fill(theirs, 76, break_on_hyphens=False, subsequent_indent="  ")
    p = options.Parser(
        "explain.py",
        usage="explain.py [PROMPT] [options]",
        description=HELP.format(theirs, STEPS, len(compared("plms")) + 4),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # fmt: off
    p.add_argument("-o", "--output", type=Path, default=Path("explain.html"), metavar="FILE",
                   help="NAME.html; if it exists, -2, -3 ... is added; default explain.html")
    p.add_argument("--png", type=Path, metavar="FOLDER",
                   help="also save its pictures there, as PNGs in their full size")
    p.add_argument("--words", metavar="A,B",
                   help=f"which words get a map of what they drew; default the first {MOST_WORDS}")
    p.add_argument("--exchange", metavar="OLD=NEW",
                   help="which word to exchange, and for what; default the last word of the first "
                        "phrase, which is mostly a noun, for tree or house")
    p.add_argument("--reference", type=int, default=REFERENCE_STEPS, metavar="N",
                   help=f"steps of the {REFERENCE} run that all samplers are compared with; "
                        f"default {REFERENCE_STEPS}, at most 999")
    # fmt: on
    return p


def parse(argv):
    """-> sd.py's options, and our own among them. Raises SDError."""
    own, theirs = make_parser().parse_known_args(argv)
    args = options.parse(theirs)
    if foreign := sorted(set(args.given) - KNOWN):
        raise sd.SDError(f"--{foreign[0].replace('_', '-')} is not for explain.py. See --help.")
    sd.expect(len(args.seed) == 1, "--seed", args.seed, "one number")
    sd.expect(own.output.suffix in (".html", ".htm"), "--output", own.output, "NAME.html")
    sd.expect(1 <= own.reference <= 999, "--reference", own.reference, "1 to 999")
    vars(args).update(vars(own), plain_prompt=True, n_images=1)
    args.steps = STEPS if args.steps is None else args.steps
    args.prompt = options.DEFAULT_PROMPT if args.prompt is None else args.prompt
    if any(mark in args.prompt for mark in "()[]") or without_loras(args.prompt)[1]:
        sd.say_once("brackets and LoRAs in the prompt are read as text here.")
    return args


def check(args):
    """SDError for whatever can be found wrong without a model, and for files not writable."""
    args.output, page = f"{args.output.parent}/", args.output  # a page is no picture
    options.check(args)
    args.output = page
    if args.png is not None:
        check_output(f"{args.png}/")


class Word:
    def __init__(self, text):
        self.text, self.positions = text, []  # those of its tokens among the 77


def find_words(tokenizer, prompt):
    """-> [Word], each once, that CLIP reads; of one that stands there twice all tokens."""
    words, at = {}, 1
    for text, _, ids in tokenizer.split(prompt):
        positions = [i for i in range(at, at + len(ids)) if i <= 75]
        if positions and any(map(str.isalnum, text)):
            words.setdefault(text, Word(text)).positions.extend(positions)
        at += len(ids)
    if not words:
        raise sd.SDError("the prompt has no word to explain: give one, such as a red house.")
    return [*words.values()]


def choose_words(words, wanted):
    """wanted: --words, or None for the first ones."""
    if wanted is None:
        left_out = " ".join(word.text for word in words[MOST_WORDS:])
        if left_out:
            sd.say_once(f"no maps for: {left_out}. --words chooses which words get one.")
        return words[:MOST_WORDS]
    known = {word.text: word for word in words}
    names = [name.strip().lower() for name in wanted.split(",")]
    for name in names:
        sd.expect(name in known, "--words", name, f"of the prompt's: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def choose_exchange(words, prompt, wanted):
    """-> the word, what it is exchanged for, the prompt with that. wanted: --exchange, or None"""
    if wanted is None:
        before = re.split(rf"[,.;:]|\b(?:{NO_NOUN})\b", prompt.lower())[0]
        phrase = [word.text for word in words if re.search(whole(word.text), before)]
        old = phrase[-1] if phrase else words[-1].text
        new = "house" if old == "tree" else "tree"
    else:
        old, _, new = (part.strip() for part in wanted.partition("="))
        sd.expect(old and new and old != new, "--exchange", wanted, "OLD=NEW, two words")
    pattern = re.compile(whole(old), re.IGNORECASE)
    sd.expect(pattern.search(prompt), "--exchange", old, "a word of the prompt")
    return old, new, pattern.sub(lambda _: new, prompt, count=1)


def whole(word):
    return rf"(?<!\w){re.escape(word)}(?!\w)"


# %% Looking inside --------------------------------------------------------------------------------


@dataclass
class Answer:
    """What the UNet was asked, and what follows from its answer with guidance. Arrays are
    (1, h, w, 4); maps: how much each position looked at each token, see Recorder, or None."""

    t: float
    x: mx.array
    x0: mx.array
    eps: mx.array
    maps: np.ndarray | None


class Watched(sd.TextToImage):
    """Text to image that notes all answers. recorder: of the attention, or None"""

    def __init__(self, recorder=None):
        self.answers, self.recorder = [], recorder

    def constrain(self, denoise, schedule, x0):
        def noted(x, t):
            x0, eps = denoise(x, t)
            mx.eval(x0, eps)  # only then has the attention been computed
            maps = None if self.recorder is None else self.recorder.mean()
            self.answers.append(Answer(t, x, x0, eps, maps))
            return x0, eps

        return noted


class Recorder:
    """Where the UNet's positions looked, in the call that was the last. h, w: the latents' size."""

    def __init__(self, h, w):
        levels = [(-(-h // 2**i), -(-w // 2**i)) for i in range(4)]  # halved, and rounded up
        self.sizes = {h * w: (h, w) for h, w in levels}
        self.grid = next(size for size in [*levels, levels[-1]] if max(size) <= MOST_MAP)
        self.maps = {}  # {layer: (grid's h, grid's w, 77)}

    def note(self, layer, weights):  # (n, 77)
        h, w = self.sizes[len(weights)]
        down, across = resizing(h, self.grid[0]), resizing(w, self.grid[1])
        maps = np.tensordot(down, weights.reshape(h, w, -1), 1)
        self.maps[layer] = np.tensordot(maps, across, (1, 1)).transpose(0, 2, 1)

    def mean(self):  # over all layers: (grid's h, grid's w, 77)
        return np.mean([*self.maps.values()], axis=0, dtype=np.float32)


@functools.cache
def resizing(n, m):
    """-> (m, n): the matrix that makes m numbers of n, by straight lines; its rows sum to 1."""
    at = (np.arange(m) + 0.5) * n / m - 0.5
    return np.stack([np.interp(at, np.arange(n), row) for row in np.eye(n)], axis=1)


class RecordingCore(nn.Module):
    """In the place of an AttentionCore, which computes the result as before. note: a function of
    the weights (n, 77), the mean over the heads, each row of which sums to 1."""

    def __init__(self, core, note):
        super().__init__()
        self.core, self.note = core, note

    def __call__(self, q, k, v):
        self.note(attention_weights(q[-1], k[-1], self.core.heads))  # the last is with the prompt
        return self.core(q, k, v)


def attention_weights(q, k, heads):
    """softmax(Q K^T / sqrt(d)), the mean over the heads: q (n, c), k (m, c) -> (n, m)"""
    q, k = (np.array(y.astype(mx.float32)) for y in (q, k))
    d = q.shape[1] // heads
    q, k = (y.reshape(len(y), heads, d).transpose(1, 0, 2) for y in (q, k))  # (heads, n, d)
    scores = mx.array(q @ k.transpose(0, 2, 1) / math.sqrt(d))
    return np.array(sd.softmax(scores)).mean(0)


@contextlib.contextmanager
def recording(model, recorder):
    """The cross-attention of the model's UNet is noted. What has been compiled runs no Python: on a
    GPU the UNet runs as it stands in the file for as long."""
    gpu = model.gpu
    with model.network("unet") as unet:
        found = unet.named_modules()
        layers = {path: m.attn2 for path, m in found if isinstance(m, sd.TransformerBlock)}
        cores = {path: layer.core for path, layer in layers.items()}
        try:
            model.gpu = False
            for path, layer in layers.items():
                layer.core = RecordingCore(layer.core, functools.partial(recorder.note, path))
            yield
        finally:
            model.gpu = gpu
            for path, layer in layers.items():
                layer.core = cores[path]


# %% The runs --------------------------------------------------------------------------------------


@dataclass
class Run:
    path: list  # x (1, h, w, 4), at the start and after every step
    calls: int  # of the UNet
    answers: dict  # {t: Answer}; of PLMS, which asks twice for its second timestep, the last


def walk(model, prompt, context, recorder=None, **sampling):
    """context: (2, 77, width), without and with the prompt"""
    task = Watched(recorder)
    context = context[1:] if sampling["cfg"] == 1 else context
    path = [*model.generate_latents(prompt, task=task, context=context, **sampling)]
    answers = {answer.t: answer for answer in task.answers}
    return Run([task.answers[0].x, *path], len(task.answers), answers)


@dataclass
class Study:
    """All that the text model and the UNet have to say. The first run is the picture's."""

    model: sd.StableDiffusion
    checker: nn.Module | None
    prompt: str
    words: list  # [Word] with a map
    sampling: dict  # the options of generate_latents
    run: Run
    layers: int  # whose attention was noted
    asked: dict  # {t: ((x0, eps) without the prompt, (x0, eps) with it)}
    cfgs: dict  # {cfg: Run}
    samplers: dict  # {name: Run}
    reference: Run
    exact: dict  # the reference's sampler, steps and spacing
    exchange: tuple  # the word, the other one, the prompt with that, its Run

    def size(self):  # of a picture
        return self.sampling["width"], self.sampling["height"]

    def decode(self, latents):
        """Latents (1, h, w, 4) each -> list of PIL pictures, black where the model's safety checker
        wants it."""
        pictures = self.model.to_pictures(mx.concatenate(latents))
        if self.checker is None:
            return pictures
        pictures, flagged = check_safety(self.model, pictures, self.checker)
        if flagged:
            sd.say_once("the safety checker blacked out pictures of the page.")
        return pictures


def study(model, args):
    """Run whatever needs the text model and the UNet; that order suits LowMemory."""
    tell = lambda text: None if args.quiet else sd.say(text)
    words = find_words(model.tokenizer, args.prompt)
    old, new, other = choose_exchange(words, args.prompt, args.exchange)
    words = choose_words(words, args.words)
    width, height = sd.TextToImage().size(model.config, args.width, args.height)
    habits = choose_habits(args, model.config)
    sampling = habits | {"seed": args.seed[0], "rng": GENERATORS[args.rng]}
    sampling |= {"width": width, "height": height}
    without, told, exchanged = mx.split(model.encode_prompts(["", args.prompt, other]), 3)
    context = mx.concatenate([without, told])
    run = functools.partial(walk, model, args.prompt, context)

    tell(f"painting, {args.steps} steps of {habits['sampler']}")
    recorder = Recorder(height // 8, width // 8)
    with recording(model, recorder):
        first = run(recorder, **sampling)
    asked = {t: ask(model, first.answers[t], context) for t in pick([*first.answers], COLUMNS)}
    cfgs = {}
    for cfg in guidances(habits["cfg"]):
        tell(f"painting with cfg {cfg:g}")
        cfgs[cfg] = first if cfg == habits["cfg"] else run(**sampling | {"cfg": cfg})
    samplers = {}
    for name in compared(habits["sampler"]):
        tell(f"painting with {name}")
        with left_out(name):
            own = name == habits["sampler"]
            samplers[name] = first if own else run(**sampling | {"sampler": name})
    tell(f"painting the reference, {args.reference} steps of {REFERENCE}")
    exact = {"sampler": REFERENCE, "steps": args.reference, "spacing": "karras"}
    reference = run(**sampling | exact)
    tell(f"painting with {new} for {old}; --exchange takes other words")
    last = walk(model, other, mx.concatenate([without, exchanged]), **sampling)
    return Study(
        model, load_checker(model) if args.safety_check else None, args.prompt, words, sampling,
        first, len(recorder.maps), asked, cfgs, samplers, reference, exact, (old, new, other, last),
    )  # fmt: skip


@contextlib.contextmanager
def left_out(name):  # plms and lms, for models that start without any x0
    try:
        yield
    except sd.SDError as error:
        sd.say_once(f"{name} is left out: {error}")


def ask(model, answer, context):
    """The same question again, for the UNet's two answers before guidance mixes them."""
    condition = sd.Condition(context)
    both = model.predict(answer.x.astype(model.dtype), answer.t, condition).astype(mx.float32)
    convert = functools.partial(model.schedule.x0_and_eps, x=answer.x, t=answer.t)
    pairs = [convert(part, prediction=model.config.prediction) for part in mx.split(both, 2)]
    mx.eval(pairs)
    return pairs


def guidances(cfg):  # how far to follow the prompt, this run's among them
    usual = 2 if cfg in (0, 1) else cfg
    return sorted({1, cfg, usual, 1.5 * usual, 2 * usual})


def compared(sampler):  # lcm is for models that were distilled for it
    return [name for name in sd.SAMPLERS if name != "lcm" or name == sampler]


# %% Main ------------------------------------------------------------------------------------------


def main(argv=None):
    with command("explain.py"):
        args = parse(sys.argv[1:] if argv is None else argv)
        check(args)
        options.choose_device(args.device)
        page, pictures = write_page(study(load_model(args), args))
        write = lambda file: file.write(page.encode(errors="replace"))
        sd.say(f"saved {sd.write_complete(args.output, write, overwrite=False)}", sys.stdout)
        if args.png is not None:
            for name, picture in pictures.items():
                save = functools.partial(picture.save, format="PNG")
                sd.write_complete(args.png / f"{name}.png", save, overwrite=False)
            sd.say(f"saved {len(pictures)} pictures in {args.png}", sys.stdout)


if __name__ == "__main__":
    main()
