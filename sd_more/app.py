"""`python sd.py`'s command line, whole: sd.py's own options and all that sd_more/ knows besides.

    options  ->  check  ->  prepare: a model, a task, what generate_latents is told  ->  Painter

Whatever can be wrong is found out before the painting begins, and said in one message: what, with
which value, and what to do now. No file that is there is overwritten.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import convert_weights
import sd
import sd_more.samplers  # noqa: F401  it adds samplers to sd.SAMPLERS
from sd import ImageToImage, SDError, StableDiffusion, TextToImage, expect
from sd_more.batch import count_processes, read_prompts, share_of_this_process
from sd_more.console import command
from sd_more.guidance import USUAL, guided, has_guidance
from sd_more.infotext import read_parameters, write_parameters
from sd_more.low_memory import LowMemory
from sd_more.noise import GENERATORS
from sd_more.output import check_output, name_step, save_png
from sd_more.pictures import grey, grid
from sd_more.prompts import name_unused, read_weighted, show_tokens, without_loras
from sd_more.safety import SafetyChecker, check_safety, load_checker
from sd_more.textual_inversion import textual_inversion
from sd_more.vae import other_vae, read_kind, with_tiny_vae

# %% Options ---------------------------------------------------------------------------------------

DEFAULT_PROMPT = sd.make_parser().get_default("prompt")
EXAMPLES = """examples:
  python sd.py --prompt "a blue boat at night" --seed 7
  python sd.py --prompt "a green tree" --n-images 4 --n-rows 2
  python sd.py --model sd-v1-4.ckpt --prompt "a lighthouse in a storm, oil on canvas"

--model, --lora, --embedding and --controlnet also take files of other programs, and diffusers
folders, which are converted once. With --image and no --prompt the prompt is empty.
"""


def make_parser():
    p = sd.make_parser()
    p.set_defaults(prompt=None)  # choose_prompts knows what it is then
    p.formatter_class, p.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    # fmt: off
    g = p.add_argument_group("which prompts, and how they are read")
    g.add_argument("--prompts", type=Path, metavar="FILE",
                   help="paint each line of this text")
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
                   help="paint only where this picture is white")
    g.add_argument("--controlnet", action="append", default=[], metavar="FILE[:WEIGHT]",
                   help="a ControlNet; may be repeated")
    g.add_argument("--control-image", action="append", default=[], metavar="FILE",
                   help="what it is to follow, such as edges; one for each")
    g = p.add_argument_group("changes to the model")
    g.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                   help="a LoRA, for a style or a face; may be repeated")
    g.add_argument("--lora-dir", type=Path, metavar="FOLDER",
                   help="where the files are that <lora:NAME:STRENGTH> in a prompt names")
    g.add_argument("--embedding", "--words", action="append", default=[], metavar="FILE",
                   help="a textual inversion, whose name becomes a word of the prompt; may be "
                        "repeated")
    g.add_argument("--vae", type=Path, metavar="FILE",
                   help="another VAE, or TAESD's, which is small and fast")
    g.add_argument("--clip-skip", type=int, metavar="N",
                   help="2: leave out the text model's last layer, and so on; in 2.x the last one "
                        "is left out anyway, and does not count; default 1")
    g.add_argument("--no-safety-check", dest="safety_check", action="store_false",
                   help="show what the model's safety checker, if it has one, would black out")
    g.add_argument("--converted", type=Path, metavar="FOLDER",
                   help="where converted files are kept; default beside what they are made of")
    g = p.add_argument_group("memory, and what is saved")
    g.add_argument("--low-memory", action="store_true",
                   help="one network in memory at a time, one picture at a time, the VAE in tiles")
    g.add_argument("--decode-batch", type=int, default=1, metavar="N",
                   help="how many to decode at once: faster on a GPU, more memory; default 1")
    g.add_argument("--n-rows", type=int, metavar="N",
                   help="put all into one picture with N rows; default a file each")
    g.add_argument("--save-every", type=int, metavar="N",
                   help="also the picture after every N steps, as NAME-step-010.png")
    # fmt: on
    return p


def parse(argv):
    """-> the options, those of --from-png included; given: names of those on the command line."""
    parser = make_parser()
    args, given = parser.parse_args(argv), read_given(argv)
    if args.from_png is not None:
        # Options that may be repeated replace the picture's; argparse alone would add to them.
        repeated = {name: [] for name, value in given.items() if isinstance(value, list)}
        parser.set_defaults(**read_parameters(args.from_png, given) | repeated)
        args = parser.parse_args(argv)
    args.given, args.guidance = sorted(given), None
    return args


def read_given(argv):
    """-> {option: value}, of those on the command line."""
    parser, nothing = make_parser(), object()
    usual = vars(parser.parse_args([]))
    parser.set_defaults(**{k: [] if isinstance(v, list) else nothing for k, v in usual.items()})
    found = vars(parser.parse_args(argv))
    return {name: value for name, value in found.items() if value is not nothing and value != []}


def check(args):
    """SDError for whatever can be found wrong without a model."""
    size = [64 if n is None else n for n in (args.width, args.height)]  # what is not given is right
    right = {"cfg": 1.0, "steps": 1, "sampler": "plms"}  # likewise
    right |= {name: vars(args)[name] for name in right if vars(args)[name] is not None}
    sd.check_options(
        "", "", args.seed, **right, width=size[0], height=size[1], n_images=args.n_images
    )
    sd.choose_dtype(args.dtype)
    expect(args.rng in GENERATORS, "rng", args.rng, f"one of {', '.join(GENERATORS)}")
    spacings = f"one of {', '.join(sd.SPACINGS)}"
    expect(args.spacing in (None, *sd.SPACINGS), "spacing", args.spacing, spacings)
    expect(args.rescale is None or 0 <= args.rescale <= 1, "rescale", args.rescale, "0 to 1")
    for name, n in (("--save-every", args.save_every), ("--decode-batch", args.decode_batch)):
        expect(n is None or n >= 1, name, n, "at least 1")
    if args.n_rows is not None:
        good = 1 <= args.n_rows <= args.n_images
        expect(good, "--n-rows", args.n_rows, f"1 to {args.n_images} (--n-images)")
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
    if args.lora_dir is not None and not args.lora_dir.is_dir():
        raise SDError(f"--lora-dir: there is no folder {args.lora_dir}. Is the name right?")
    if not args.show_tokens:
        check_output(args.output)
    for sentence in name_useless(args):
        sd.say_once(sentence)


TOKENS = {"prompt", "prompts", "plain_prompt", "show_tokens", "model", "embedding", "from_png"}


def name_useless(args):
    """-> a sentence for each option on the command line that changes nothing."""
    options = {name: "--" + name.replace("_", "-") for name in args.given}
    options |= {"safety_check": "--no-safety-check"} if "safety_check" in options else {}
    if args.show_tokens:
        idle = ", ".join(options[name] for name in args.given if name not in {*TOKENS, "lora_dir"})
        return [f"--show-tokens paints nothing; without effect: {idle}."] if idle else []
    share = args.strength if args.image and 0 < (args.strength or 0) <= 1 else 1
    steps = math.inf if args.steps is None else int(share * args.steps)  # or the model's own
    one = "there is only one picture (--n-images)" if args.n_images == 1 else ""
    why = {
        "decode_batch": one if args.decode_batch > 1 else "",
        "n_rows": one,
        "save_every": f"of steps there are {steps}" if (args.save_every or 0) >= steps else "",
        "clip_skip": "1 leaves out no layer" if args.clip_skip == 1 else "",
        "rescale": "at cfg 1 there is no guidance" if args.cfg == 1 else "",
    }
    found = [(name, vars(args)[name], text) for name, text in why.items() if text]
    found += [("lora", text, "its strength is 0") for text in args.lora if is_zero(text)]
    found += [("controlnet", text, "its weight is 0") for text in args.controlnet if is_zero(text)]
    return [
        f"{options[name]} {value} has no effect: {text}."
        for name, value, text in found
        if name in options
    ]


def is_zero(text):
    return path_and_number(text)[1] == 0


def choose_prompts(args):
    if args.prompts:
        return read_prompts(args.prompts)
    default = "" if args.image else DEFAULT_PROMPT
    return [default if args.prompt is None else args.prompt]


def path_and_number(text):
    """FILE or FILE:NUMBER -> path, number; 1 if there is none."""
    if Path(text).exists():
        return Path(text), 1.0
    file, _, number = text.rpartition(":")
    try:
        path, number = (file, float(number)) if file else (text, 1.0)
    except ValueError:  # a colon in the name
        path, number = text, 1.0
    if not math.isfinite(number):
        raise SDError(f"{text}: the number must be finite, mostly 0 to 1, got {number}.")
    return Path(path), number


def add_loras(args, prompts):
    """Put into args.lora what <lora:name:0.8> in the prompts says, or say why it is left out."""
    each = [[] if args.plain_prompt else without_loras(prompt)[1] for prompt in prompts]
    if any(tags != each[0] for tags in each):
        raise SDError("the lines of --prompts name different LoRAs: paint them one by one.")
    if args.lora_dir is not None and not each[0]:
        sd.say_once("--lora-dir has no effect: no prompt has <lora:NAME:STRENGTH>.")
    for kind, (name, *numbers) in each[0]:
        path, strength = find_lora(args, name), read_strength(numbers)
        if kind == "hypernet":
            problem = "hypernetworks are not done here"
        elif strength is None:
            problem = "its strength must be one number"
        elif path is None:
            problem = (
                "--lora-dir has no such file" if args.lora_dir else "give --lora-dir or --lora"
            )
        else:
            set_strength(args, path, strength)
            continue
        tag = ":".join([kind, name, *numbers])[:80]
        sd.say_once(f"<{tag}> in the prompt is left out: {problem}.")


def read_strength(numbers):
    """["0.8"] -> 0.8, [] -> 1.0; None for one in each network, or what is no number."""
    try:
        (strength,) = {float(number) for number in numbers or ["1"]}
    except ValueError:
        return None
    return strength if math.isfinite(strength) else None


def set_strength(args, path, strength):
    paths = [path_and_number(text)[0] for text in args.lora]
    new = f"{path}:{strength}"
    args.lora = [new if p == path else text for p, text in zip(paths, args.lora)]
    args.lora += [] if path in paths else [new]


def find_lora(args, name):
    """-> the file of that name, of --lora or in --lora-dir; None if there is none."""
    paths = [path_and_number(text)[0] for text in args.lora]
    if args.lora_dir is not None:
        found = sorted(args.lora_dir.rglob("*"), key=lambda path: (".flat" in path.suffixes, path))
        paths += [path for path in found if path.suffix in (".safetensors", ".pt", ".ckpt", ".bin")]
    same = (path for path in paths if path.stem.removesuffix(".flat").lower() == name.lower())
    return next(same, None)


# %% Model and task --------------------------------------------------------------------------------


def prepare(args):
    """-> the model, the task, and what generate_latents is told of every picture."""
    model = load_model(args)
    task = make_task(args, model.config)
    if args.controlnet:
        model = model.controlled(*load_controls(args, model, task))
    names = "negative_prompt", "width", "height"
    sampling = {name: vars(args)[name] for name in names} | {"rng": GENERATORS[args.rng]}
    return model, task, sampling | choose_habits(args, model.config)


HABITS = ("steps", "sampler", "spacing", "cfg", "rescale")


def choose_habits(args, config):
    """-> what is given, and for the rest what is the model's own, which is said once."""
    own = {name: vars(config)[name] for name in HABITS if vars(args)[name] is None}
    usual = {each.name: each.default for each in fields(config)} | {"cfg": 7.5}
    unusual = {name: value for name, value in own.items() if value != usual[name]}
    if unusual and args.model != sd.TINY:
        few = ", ".join(f"{name} {value}" for name, value in unusual.items())
        sd.say_once(f"the model's own {few}.")
    habits = {name: vars(args)[name] for name in HABITS} | own
    steps, sampler, cfg = (habits[name] for name in ("steps", "sampler", "cfg"))
    sd.check_options("", "", args.seed, steps, cfg, sampler, 64, 64, args.n_images)
    return habits


def load_model(args):
    kept = args.converted
    path = flat_file(args.model, kept)
    loras = [
        (flat_file(path, kept), strength) for path, strength in map(path_and_number, args.lora)
    ]
    changes = [sd.lora(path, strength) for path, strength in loras]
    changes += [textual_inversion(flat_file(Path(path), kept)) for path in args.embedding]
    changes += [] if args.clip_skip is None else [sd.clip_skip(args.clip_skip)]
    if has_guidance(path):  # then --cfg is what it is told, and there is no second answer
        args.guidance, args.cfg = USUAL if args.cfg is None else args.cfg, 1.0
        changes += [guided(args.guidance)]
    tiny = args.vae and flat_file(args.vae, kept)
    if args.vae and read_kind(tiny) != "tiny vae":
        changes, tiny = [*changes, other_vae(tiny)], None
    # LowMemory reads no weights before they are used, and for tokens none are.
    model = LowMemory if args.low_memory or args.show_tokens else StableDiffusion
    reader = None if args.plain_prompt else read_weighted
    model = model(path, args.dtype, changes, reader=reader)
    return with_tiny_vae(model, tiny) if tiny else model


def make_task(args, config):
    if args.image is None:
        return TextToImage()
    picture, mask = sd.picture_and_mask(args.image, args.mask, args.width, args.height)
    strength = {} if args.strength is None else {"strength": args.strength}
    if args.mask is None and mask.mean() <= 0.005:  # not for a few green or transparent pixels
        return ImageToImage(picture, **strength)
    task = sd.inpainting(config, picture, mask, **strength)
    sd.say(f"painting {mask.mean():.0%} of {args.image.name}")
    return task


def load_controls(args, model, task):
    """-> (ControlNet, picture, weight) each"""
    size = tuple(task.size(model.config, args.width, args.height))
    for text, image in zip(args.controlnet, args.control_image):
        path, weight = path_and_number(text)
        yield (
            sd.ControlNet(flat_file(path, args.converted), model.dtype),
            load_hint(image, size, path),
            weight,
        )


def load_hint(image, size, path):
    """What a ControlNet sees: where a picture is transparent black, or for one that was trained to
    inpaint -1, which says that there is a hole. (make_inpaint_condition, in diffusers' ControlNet
    examples)
    """
    picture, opaque = sd.load_picture(grey(sd.open_picture(image)), *size)
    picture[opaque < 0.5] = -1 if "inpaint" in path.name.lower() else 0
    return picture


def flat_file(path, folder=None):
    """path, or for another program's file what convert_weights.py makes of it, once."""
    ours = sd.read_header(path).get("format", "").startswith("sd.py")
    if ours or not path.exists():  # a path that is not there gets its message from read_flat
        return path
    return convert_weights.flat_file(path, sd.say, folder)


# %% Painting --------------------------------------------------------------------------------------


@dataclass
class Painter:
    """Paints prompts and saves the pictures."""

    model: StableDiffusion
    task: TextToImage
    sampling: dict  # what generate_latents is told of every picture
    recipe: dict  # all that makes them again, for the text in their files
    checker: SafetyChecker | None
    output: Path
    decode_batch: int = 1
    n_rows: int | None = None
    save_every: int | None = None

    def paint(self, prompt, seed, count, number):
        """count pictures, from this seed on. number: that of the first among all processes'."""
        steps = len(self.task.timesteps(range(self.sampling["steps"])))
        text = prompt if self.recipe["plain_prompt"] else without_loras(prompt)[0]
        walk = self.model.generate_latents(
            text, seed=seed, n_images=count, task=self.task, **self.sampling
        )
        for i, x in report_steps(walk, steps):
            if self.save_every and i % self.save_every == 0 and i < steps:
                for k, picture in enumerate(self.finish(x, seed)):
                    path = name_step(self.choose_name(number + k), i)
                    self.save(picture, path, prompt, seed + k, images=f"step {i}")
        pictures = self.finish(x, seed)
        if self.n_rows:
            images, size = f"{count} in {self.n_rows} rows", pictures[0].size
            self.save(grid(pictures, self.n_rows), self.output, prompt, seed, size, images)
        else:
            for k, picture in enumerate(pictures):
                self.save(picture, self.choose_name(number + k), prompt, seed + k)

    def finish(self, x, seed):
        """Latents -> PIL pictures, black where the safety checker wants it."""
        pictures = self.model.to_pictures(x, self.task, self.decode_batch)
        if self.checker is None:
            return pictures
        pictures, flagged = check_safety(self.model, pictures, self.checker)
        for i in flagged:
            sd.say(f"sd.py: the safety checker blacked out seed {seed + i}")
        return pictures

    def choose_name(self, number):
        """Processes keep away from each other's names; one alone takes what is free."""
        if count_processes() == 1 or number == 0:
            return self.output
        return self.output.with_stem(f"{self.output.stem}-{number + 1}")

    def save(self, picture, path, prompt, seed, size=None, images=1):
        width, height = size or picture.size
        text = write_parameters(self.recipe, prompt, seed, width, height, images)
        sd.say(f"saved {save_png(picture, path, text)}", sys.stdout)


def report_steps(walk, steps):
    """Yield (number, x) of each step, and say how long the rest will take."""
    end = "\r" if sys.stderr.isatty() else "\n"
    start = time.perf_counter()
    for i, x in enumerate(walk, 1):
        pace = (time.perf_counter() - start) / i
        line = f"step {i}/{steps}  {pace:.2f} s a step  {pace * (steps - i):.0f} s left "
        sd.say(line, end=end if i < steps else "\n")
        yield i, x


def name_spacing(sampler):
    """-> the sampler's own, where a picture must say so, for the first version's was another"""
    spacing = sd.SAMPLERS[sampler].spacing
    return spacing if spacing == "linspace" else None


def make_painter(args):
    model, task, sampling = prepare(args)
    recipe = vars(args) | {
        **{name: sampling[name] for name in HABITS},
        "cfg": sampling["cfg"] if args.guidance is None else args.guidance,
        "spacing": sampling["spacing"] or name_spacing(sampling["sampler"]),
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "strength": task.strength if isinstance(task, ImageToImage) else None,
    }
    checker = load_checker(model) if args.safety_check else None
    saving = args.output, args.decode_batch, args.n_rows, args.save_every
    return Painter(model, task, sampling, recipe, checker, *saving)


# %% Main ------------------------------------------------------------------------------------------


def main(argv=None):
    with command("sd.py"):
        run(parse(argv))


def run(args):
    check(args)
    prompts = choose_prompts(args)
    add_loras(args, prompts)
    read = [prompt if args.plain_prompt else without_loras(prompt)[0] for prompt in prompts]
    if args.show_tokens:
        model = load_model(args)
        for prompt in read:
            show_tokens(model, prompt)
        return
    painter = make_painter(args)
    name_unused(painter.model, [*read, args.negative_prompt])
    for prompt, first, count, number in share_of_this_process(prompts, args.n_images):
        painter.paint(prompt, args.seed + first, count, number)
