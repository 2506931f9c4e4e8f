"""The command line's options: which there are, where they come from, and what is wrong with them.

    the file of one's own defaults  <  the picture of --from-png  <  the command line

Whatever can be wrong is found out before a model is loaded, and said in one message.
"""

import argparse
import difflib
import functools
import importlib.metadata
import math
import os
import random
import re
import tomllib
from pathlib import Path

import mlx.core as mx

import sd
from sd import SDError, expect
from sd_more.batch import count_processes
from sd_more.infotext import PARAMETERS, read_parameters, read_sampler_option
from sd_more.noise import GENERATORS
from sd_more.output import check_output

DEFAULT_PROMPT = sd.make_parser().get_default("prompt")
EXAMPLES = """examples:
  python sd.py "a blue boat at night" --seed 7
  python sd.py "a green tree" --n-images 4 --n-rows 2
  python sd.py "a lighthouse, oil on canvas" --model sd-v1-4.ckpt -o pictures/
  python sd.py "a castle" --model sd-v1-4.ckpt --sampler dpm++-karras --steps 20

The last is what most people paint with: a picture in less than half the time of
the default, which is the reference: 50 steps of plms.
--model, --lora, --embedding, --controlnet and --vae also take other programs'
files, diffusers folders, and org/name on the Hugging Face hub, converted
once. Names are enough for what lies in a --folder.
Defaults of one's own, as name = value in TOML:
  {}
"""


def defaults_file():
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "sd.py" / "defaults.toml"


THEIRS = {  # what options are called elsewhere
    "--cfg-scale": "--cfg", "--guidance-scale": "--cfg", "--scale": "--cfg",
    "--num-inference-steps": "--steps", "--ddim-steps": "--steps", "--sampling-steps": "--steps",
    "--init-img": "--image", "--init-image": "--image", "--input-image": "--image",
    "--ckpt": "--model", "--checkpoint": "--model", "--hf-repo": "--model",
    "--batch-size": "--n-images", "--batch-count": "--n-images", "--n-iter": "--n-images",
    "--n-samples": "--n-images", "--num-images": "--n-images",
    "--sampling-method": "--sampler", "--sampler-name": "--sampler", "--scheduler": "--sampler",
    "--lora-dir": "--folder", "--lora-model-dir": "--folder", "--embeddings-dir": "--folder",
    "--denoising-strength": "--strength", "--outdir": "--output", "--control-net": "--controlnet",
    "--textual-inversion": "--embedding", "--negative": "--negative-prompt", "--fp16": "--dtype",
    "--half": "--dtype", "--lowvram": "--low-memory", "--medvram": "--low-memory",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """What is wrong is one line, and names the option that may have been meant."""

    def error(self, message):
        known = [name for action in self._actions for name in action.option_strings]
        wrong = re.findall(r"(?<!\S)--?[a-z][\w-]*", message)
        near = [THEIRS[w] for w in wrong if w in THEIRS]
        near += [n for w in wrong if w not in known for n in difflib.get_close_matches(w, known, 1)]
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SDError(f"{message}.{hint} --help lists all options.")


def make_parser():
    # Some of sd.py's options are more here, and replace them.
    p = sd.make_parser(functools.partial(Parser, conflict_handler="resolve"))
    p.formatter_class, p.epilog = (
        argparse.RawDescriptionHelpFormatter,
        EXAMPLES.format(defaults_file()),
    )
    p.usage = "sd.py [PROMPT] [options]"
    # fmt: off
    p.add_argument("words", nargs="*", metavar="PROMPT", help="the same as --prompt")
    p.add_argument("-p", "--prompt", metavar="TEXT",
                   help=f"what to paint; default {DEFAULT_PROMPT}, and nothing with --image")
    p.add_argument("-n", "--negative-prompt", metavar="TEXT", default="",
                   help="what to keep away from, where --cfg is not 1; default nothing")
    p.add_argument("-s", "--seed", type=read_seeds, metavar="N", default=[42],
                   help="which noise to start from; 1,2,7-9 paints five, -1 is a random one; "
                        "default 42")
    p.add_argument("--sampler", type=read_sampler_option, metavar="TEXT",
                   help=f"how to get there: {', '.join(sd.SAMPLERS)}; default the model's own, or "
                        "plms; other programs' names will do")
    p.add_argument("--dtype", type=read_dtype, metavar="TEXT",
                   help="float32, float16 or bfloat16; the default is the device's best")
    p.add_argument("-W", "--width", type=int, metavar="N",
                   help="in pixels, a multiple of 8; default the model's, or the picture's")
    p.add_argument("-H", "--height", type=int, metavar="N", help="likewise")
    p.add_argument("-o", "--output", metavar="FILE", default="out.png",
                   help="a .png, .jpg or .webp, or a folder; {prompt}, {seed} and {n} in it are "
                        "filled in; if it exists, -2, -3 ... is added; default out.png")
    p.add_argument("--model", metavar="FILE", default=sd.TINY,
                   help="a checkpoint, a folder, a name; default tiny, the miniature")
    g = p.add_argument_group("which prompts, and how they are read")
    g.add_argument("--prompts", metavar="FILE",
                   help="paint each line of this text, - for standard input; options may stand "
                        "behind a prompt; a line that begins with # is a comment")
    g.add_argument("--plain-prompt", action="store_true",
                   help="read it as CLIP alone does: 75 tokens, and brackets are characters")
    g.add_argument("--show-tokens", action="store_true",
                   help="paint nothing, only print how the prompt is cut into tokens")
    g = p.add_argument_group("which noise, and as in which picture")
    g.add_argument("--rng", default="torch", choices=GENERATORS,
                   help="what makes noise of the seed: PyTorch as on a CPU, NumPy, PyTorch as on "
                        "an NVIDIA GPU (philox), MLX; default torch")
    g.add_argument("--from-png", type=Path, metavar="FILE",
                   help="with the options that this picture was made with; those given here win; "
                        "another program's picture comes out only similar")
    g.add_argument("--spacing", choices=sd.SPACINGS,
                   help="which timesteps the sampler takes; default the model's or sampler's own")
    g.add_argument("--rescale", type=float, metavar="S",
                   help="how much of the contrast that guidance adds to take away, 0 to 1")
    g = p.add_argument_group("from a picture")
    g.add_argument("--image", type=Path, metavar="FILE",
                   help="begin with this; if a part is transparent or pure green, paint only that")
    g.add_argument("--strength", type=float, metavar="S",
                   help="how much of the way from noise to walk: 0.3 touches up, 1 keeps next to "
                        "nothing; default 0.75, and 1 where only a part is painted")
    g.add_argument("--mask", type=Path, metavar="FILE",
                   help="paint only where this picture is white, or if some of it is transparent "
                        "where it is not")
    g.add_argument("--controlnet", action="append", default=[], metavar="FILE[:WEIGHT]",
                   help="a ControlNet; may be repeated")
    g.add_argument("--control-image", action="append", default=[], metavar="FILE",
                   help="what it is to follow, such as edges; one for each")
    g.add_argument("--upscale", type=float, metavar="S",
                   help="enlarge what was painted by this factor, and paint over it; for pictures "
                        "larger than a model can paint at once")
    g.add_argument("--upscale-strength", type=float, metavar="S",
                   help="how much of the way that is to be walked again; default 0.5")
    g = p.add_argument_group("changes to the model")
    g.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                   help="a LoRA, for a style or a face; may be repeated")
    g.add_argument("--embedding", "--words", action="append", default=[], metavar="FILE",
                   help="a textual inversion, whose name becomes a word of the prompt; may be "
                        "repeated")
    g.add_argument("--vae", metavar="FILE",
                   help="another VAE, or TAESD's, which is small and fast")
    g.add_argument("--clip-skip", type=int, metavar="N",
                   help="2: leave out the text model's last layer, and so on; in 2.x the last one "
                        "is left out anyway, and does not count; default 1")
    g.add_argument("--no-safety-check", dest="safety_check", action="store_false",
                   help="show what the model's safety checker, if it has one, would black out")
    g = p.add_argument_group("where files are")
    g.add_argument("--folder", type=Path, action="append", default=[], metavar="FOLDER",
                   help="where models, LoRAs and so on are looked for by name, also those of "
                        "<lora:NAME:STRENGTH> in a prompt; may be repeated")
    g.add_argument("--converted", type=Path, metavar="FOLDER",
                   help="where converted files are kept; default beside what they are made of")
    g.add_argument("--list", action="store_true",
                   help="paint nothing, only say what is in the folders, and what was converted")
    g.add_argument("--clear", action="store_true",
                   help="paint nothing, only delete what was converted into the cache folder")
    g = p.add_argument_group("the machine, and what is said and saved")
    g.add_argument("--device", choices=("cpu", "gpu"), help="default a GPU where MLX has one")
    g.add_argument("--low-memory", action="store_true",
                   help="one network in memory at a time, one picture at a time, the VAE in tiles")
    g.add_argument("--decode-batch", type=int, default=1, metavar="N",
                   help="how many to decode at once: faster on a GPU, more memory; default 1")
    g.add_argument("--n-rows", type=int, metavar="N",
                   help="put all of a prompt into one picture with N rows; default a file each")
    g.add_argument("--save-every", type=int, metavar="N",
                   help="also the picture after every N steps, as NAME-step-010.png")
    g.add_argument("--preview", action="store_true",
                   help="show in the terminal what each step expects the picture to become")
    g.add_argument("--quiet", action="store_true", help="say nothing of the progress")
    g.add_argument("--version", action="store_true", help="say which version this is")
    # fmt: on
    return p


def read_dtype(text):
    short = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
    return short.get(text.lower(), text)


def version():
    try:
        own = importlib.metadata.version("sd-py")
    except importlib.metadata.PackageNotFoundError:
        own = "(not installed)"
    return f"sd.py {own}, mlx {importlib.metadata.version('mlx')}"


def read_seeds(text):
    """ "1,2,7-9" -> [1, 2, 7, 8, 9]; for -1 a random one"""
    seeds = []
    for part in text.split(","):
        span = re.fullmatch(r"\s*(\d{1,20})-(\d{1,20})\s*", part)
        if not span and not re.fullmatch(r"\s*[+-]?\d{1,20}\s*", part):
            raise argparse.ArgumentTypeError(f"{text[:60]} is no seed: a number, or 1,2,7-9")
        first, last = (int(n) for n in span.groups()) if span else (int(part),) * 2
        if last < first:
            raise argparse.ArgumentTypeError(f"the seeds {part} run backwards")
        if not last < first + 10_000 - len(seeds):
            raise argparse.ArgumentTypeError(f"{text[:60]} are no seeds, or more than 10,000")
        seeds += range(first, last + 1)
    seeds = [random.SystemRandom().randrange(2**32) if seed == -1 else seed for seed in seeds]
    if not all(-(2**63) <= seed < 2**64 for seed in seeds):
        raise argparse.ArgumentTypeError(f"{text[:60]} is too large for a seed, 2^64 - 1 at most")
    return seeds


# %% Where they come from --------------------------------------------------------------------------


def parse(argv):
    """-> the options, those of --from-png and one's own defaults included; given: the names of
    those on the command line.
    """
    argv = [hyphens(word) for word in argv]
    parser = make_parser()
    args, given = parser.parse_args(argv), read_given(argv)
    own, told = read_defaults(known=args.from_png is not None), {}
    if args.from_png is not None:
        # Options that may be repeated replace the picture's; argparse alone would add to them.
        repeated = {name: [] for name, value in given.items() if isinstance(value, list)}
        told = read_parameters(args.from_png, given)
        parser.set_defaults(**told | repeated)
    args = parser.parse_args([*own, *argv])
    if args.words:
        if "prompt" in given:
            raise SDError(f"two prompts: --prompt, and {' '.join(args.words)[:60]} by itself.")
        args.prompt, given["prompt"] = " ".join(args.words), ""
    args.model = sd.TINY if args.model == "tiny" else args.model
    args.seed = [args.seed] if isinstance(args.seed, int) else args.seed  # a picture's
    args.given, args.guidance = sorted(given.keys() - {"words"}), None
    args.model_hash = vars(args).get("model_hash")  # a picture's
    args.told = told.keys() - given.keys()  # by a picture, which may be a stranger's
    return args


def parse_line(words, args):
    """-> what a line of --prompts says behind its prompt, upon args; the names of its options"""
    words = [hyphens(word) for word in words]
    parser, given = make_parser(), read_given(words)
    parser.set_defaults(**vars(args))
    own = parser.parse_args(words)
    if own.words != args.words:
        raise SDError(f"{' '.join(own.words)[:60]} stands behind the options: put it before them.")
    if (args.image or args.controlnet) and given.keys() & {"width", "height"}:
        raise SDError("with --image or --controlnet all lines have one size: give it once.")
    return own, given


def hyphens(word):
    """--n_images=4 -> --n-images=4"""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.match(r"--[a-z]", word) else word


def read_given(argv):
    """-> {option: value}, of those on the command line."""
    parser, nothing = make_parser(), object()
    usual = vars(parser.parse_args([]))
    repeated = {name for name, value in usual.items() if isinstance(value, list)} - {"seed"}
    parser.set_defaults(**{name: [] if name in repeated else nothing for name in usual})
    found = vars(parser.parse_args(argv))
    return {name: value for name, value in found.items() if value is not nothing and value != []}


def read_defaults(known):
    """The file of one's own defaults as words of a command line. known: without what a picture
    tells, for that is to come out as it was.
    """
    path = defaults_file()
    if not path.is_file():
        return []
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # a number may be too long, too
        raise SDError(f"{path} is not readable as TOML: {error}") from None
    told = {option for option, _ in PARAMETERS.values()} | {"prompt", "negative_prompt"}
    told |= {"width", "height", "n_images", "n_rows", "prompts"}
    argv = []
    for name, value in table.items():
        name = name.replace("-", "_")
        if not (known and name in told):
            argv += write_option(name.replace("_", "-"), value, path)
    try:
        args = make_parser().parse_args(argv)
    except SDError as error:
        raise SDError(f"{path}: {error}") from None
    if args.words or args.from_png:
        raise SDError(f"{path}: from-png and plain words are for the command line.")
    return argv


def write_option(name, value, path):
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, (str, int, float)) for each in values):
        raise SDError(f"{path}: {name} must be text, a number, true or a list, got {value}.")
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    home = lambda each: os.path.expanduser(each) if isinstance(each, str) else each
    return [f"--{name}={home(each)}" for each in values]


def choose_device(name):
    """Where everything is computed from now on."""
    if name == "gpu" and not mx.is_available(mx.gpu):
        raise SDError("--device gpu: MLX has no GPU here; README says which package brings one.")
    if name is not None:
        mx.set_default_device(getattr(mx, name))


# %% What is wrong with them -----------------------------------------------------------------------


def check(args):
    """SDError for whatever can be found wrong without a model."""
    check_numbers(args)
    if args.n_rows is not None:
        most = args.n_images * len(args.seed)
        all_of_them = f"1 to {most}, the number of pictures (--n-images)"
        expect(1 <= args.n_rows <= most, "--n-rows", args.n_rows, all_of_them)
        if count_processes() > 1:
            raise SDError("--n-rows needs all pictures: paint with one process, not several.")
    if "prompt" in args.given and args.prompts:
        raise SDError("give --prompt or --prompts, not both: add it to the file.")
    if args.image is None and (args.mask is not None or args.strength is not None):
        option = "--strength" if args.mask is None else "--mask"
        raise SDError(f"{option} needs a picture: give --image, too.")
    if len(args.controlnet) != len(args.control_image):
        raise SDError(
            f"there are {len(args.controlnet)} --controlnet and {len(args.control_image)} "
            "--control-image: give one of the second for each of the first."
        )
    for text in [*args.lora, *args.controlnet]:
        path_and_number(text)
    for path in filter(None, (args.image, args.mask, *args.control_image)):
        if not Path(path).is_file():
            raise SDError(f"there is no file {path}. Is the name right?")
    for folder in args.folder:
        if not folder.is_dir():
            raise SDError(f"--folder: there is no folder {folder}. Is the name right?")
    if not args.show_tokens:
        check_output(args.output)
    for sentence in name_useless(args):
        sd.say_once(sentence)


def check_numbers(args):
    size = [64 if n is None else n for n in (args.width, args.height)]  # what is not given is right
    right = {"cfg": 1.0, "steps": 1, "sampler": "plms"}  # likewise
    right |= {name: vars(args)[name] for name in right if vars(args)[name] is not None}
    sd.check_options(
        "", "", args.seed[0], **right, width=size[0], height=size[1], n_images=args.n_images
    )
    sd.choose_dtype(args.dtype)
    expect(args.rng in GENERATORS, "rng", args.rng, f"one of {', '.join(GENERATORS)}")
    spacings = f"one of {', '.join(sd.SPACINGS)}"
    expect(args.spacing in (None, *sd.SPACINGS), "spacing", args.spacing, spacings)
    expect(args.rescale is None or 0 <= args.rescale <= 1, "rescale", args.rescale, "0 to 1")
    for name, n in (("--save-every", args.save_every), ("--decode-batch", args.decode_batch)):
        expect(n is None or n >= 1, name, n, "at least 1")
    factor, strength = args.upscale, args.upscale_strength
    expect(factor is None or 1 < factor <= 8, "--upscale", factor, "more than 1 and at most 8")
    good = strength is None or 0 < strength <= 1
    expect(good, "--upscale-strength", strength, "more than 0 and at most 1")


TOKENS = {"prompt", "prompts", "plain_prompt", "show_tokens", "model", "embedding", "from_png"}


def name_useless(args):
    """-> a sentence for each option on the command line that changes nothing."""
    options = {name: "--" + name.replace("_", "-") for name in args.given}
    options |= {"safety_check": "--no-safety-check"} if "safety_check" in options else {}
    if args.show_tokens:
        idle = ", ".join(options[name] for name in args.given if name not in {*TOKENS, "folder"})
        return [f"--show-tokens paints nothing; without effect: {idle}."] if idle else []
    share = args.strength if args.image and 0 < (args.strength or 0) <= 1 else 1
    steps = math.inf if args.steps is None else int(share * args.steps)  # or the model's own
    single = args.n_images == 1 == len(args.seed)
    one = "there is only one picture (--n-images)" if single else ""
    why = {
        "decode_batch": one if args.decode_batch > 1 else "",
        "n_rows": one,
        "save_every": f"of steps there are {steps}" if (args.save_every or 0) >= steps else "",
        "clip_skip": "1 leaves out no layer" if args.clip_skip == 1 else "",
        "rescale": "at cfg 1 there is no guidance" if args.cfg == 1 else "",
        "upscale_strength": "" if args.upscale else "there is no --upscale",
        "preview": "with --quiet nothing of the progress is shown" if args.quiet else "",
    }
    found = [(name, vars(args)[name], text) for name, text in why.items() if text]
    found += [("lora", text, "its strength is 0") for text in args.lora if is_zero(text)]
    found += [("controlnet", text, "its weight is 0") for text in args.controlnet if is_zero(text)]
    return [
        f"{options[name]}{'' if value is True else f' {value}'} has no effect: {text}."
        for name, value, text in found
        if name in options
    ]


def is_zero(text):
    return path_and_number(text)[1] == 0


def path_and_number(text):
    """FILE or FILE:NUMBER -> file, number; 1 if there is none."""
    if Path(text).exists():
        return text, 1.0
    file, _, number = text.rpartition(":")
    try:
        path, number = (file, float(number)) if file else (text, 1.0)
    except ValueError:  # a colon in the name
        path, number = text, 1.0
    if not math.isfinite(number):
        raise SDError(f"{text}: the number must be finite, mostly 0 to 1, got {number}.")
    return path, number
