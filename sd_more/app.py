"""`python sd.py`'s command line, whole: sd.py's own options and all that sd_more/ knows besides.

    options  ->  check  ->  prepare: a model, a task, what generate_latents is told  ->  Painter

Whatever can be wrong is found out before the painting begins, and said in one message: what, with
which value, and what to do now. No file that is there is overwritten.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import convert_weights
import sd
import sd_more.samplers  # noqa: F401  it adds samplers to sd.SAMPLERS
from sd import ImageToImage, SDError, StableDiffusion, TextToImage, expect
from sd_more.batch import count_processes, read_prompts, share_of_this_process
from sd_more.infotext import read_parameters, write_parameters
from sd_more.low_memory import LowMemory
from sd_more.noise import GENERATORS
from sd_more.output import check_output, name_step, save_png
from sd_more.pictures import grid
from sd_more.prompts import read_weighted, show_tokens
from sd_more.safety import SafetyChecker, check_safety, load_checker
from sd_more.textual_inversion import textual_inversion

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
    g.add_argument("--embedding", "--words", action="append", default=[], metavar="FILE",
                   help="a textual inversion, whose name becomes a word of the prompt; may be "
                        "repeated")
    g.add_argument("--clip-skip", type=int, metavar="N",
                   help="2: leave out the text model's last layer, and so on; in 2.x the last one "
                        "is left out anyway, and does not count; default 1")
    g.add_argument("--no-safety-check", dest="safety_check", action="store_false",
                   help="show what the model's safety checker, if it has one, would black out")
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
    """-> the options, those of --from-png included."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.from_png is None:
        return args
    # Options that may be repeated replace the picture's; argparse alone would add to them.
    repeated = {name: [] for name, value in vars(args).items() if isinstance(value, list) and value}
    parser.set_defaults(**read_parameters(args.from_png) | repeated)
    return parser.parse_args(argv)


def check(args):
    """SDError for whatever can be found wrong without a model."""
    size = [64 if n is None else n for n in (args.width, args.height)]  # what is not given is right
    cfg = 1.0 if args.cfg is None else args.cfg
    sd.check_options("", "", args.seed, args.steps, cfg, args.sampler, *size, args.n_images)
    sd.choose_dtype(args.dtype)
    expect(args.rng in GENERATORS, "rng", args.rng, f"one of {', '.join(GENERATORS)}")
    for name, n in (("--save-every", args.save_every), ("--decode-batch", args.decode_batch)):
        expect(n is None or n >= 1, name, n, "at least 1")
    if args.n_rows is not None:
        good = 1 <= args.n_rows <= args.n_images
        expect(good, "--n-rows", args.n_rows, f"1 to {args.n_images} (--n-images)")
        if count_processes() > 1:
            raise SDError("--n-rows needs all pictures: paint with one process, not several.")
    if args.prompt is not None and args.prompts and not args.from_png:
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
    if not args.show_tokens:
        check_output(args.output)


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


# %% Model and task --------------------------------------------------------------------------------


def prepare(args):
    """-> the model, the task, and what generate_latents is told of every picture."""
    model = load_model(args)
    task = make_task(args, model.config)
    if args.controlnet:
        model = model.controlled(*load_controls(args, model, task))
    names = "negative_prompt", "steps", "sampler", "width", "height"
    sampling = {name: vars(args)[name] for name in names} | {"rng": GENERATORS[args.rng]}
    sampling["cfg"] = model.config.cfg if args.cfg is None else args.cfg
    return model, task, sampling


def load_model(args):
    loras = [(flat_file(path), strength) for path, strength in map(path_and_number, args.lora)]
    changes = [sd.lora(path, strength) for path, strength in loras]
    changes += [textual_inversion(flat_file(Path(path))) for path in args.embedding]
    changes += [] if args.clip_skip is None else [sd.clip_skip(args.clip_skip)]
    # LowMemory reads no weights before they are used, and for tokens none are.
    model = LowMemory if args.low_memory or args.show_tokens else StableDiffusion
    reader = None if args.plain_prompt else read_weighted
    return model(flat_file(args.model), args.dtype, changes, reader=reader)


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
    width, height = task.size(model.config, args.width, args.height)
    for text, image in zip(args.controlnet, args.control_image):
        path, weight = path_and_number(text)
        picture, _ = sd.load_picture(image, width, height)
        yield sd.ControlNet(flat_file(path), model.dtype), picture, weight


def flat_file(path):
    """path, or for another program's file what convert_weights.py makes of it, once."""
    ours = sd.read_header(path).get("format", "").startswith("sd.py")
    if ours or not path.exists():  # a path that is not there gets its message from read_flat
        return path
    return convert_weights.flat_file(path, sd.say)


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
        walk = self.model.generate_latents(
            prompt, seed=seed, n_images=count, task=self.task, **self.sampling
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


def make_painter(args):
    model, task, sampling = prepare(args)
    recipe = vars(args) | {
        "cfg": sampling["cfg"],
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "strength": task.strength if isinstance(task, ImageToImage) else None,
    }
    checker = load_checker(model) if args.safety_check else None
    saving = args.output, args.decode_batch, args.n_rows, args.save_every
    return Painter(model, task, sampling, recipe, checker, *saving)


# %% Main ------------------------------------------------------------------------------------------


def main(argv=None):
    with convert_weights.command("sd.py"):
        run(parse(argv))


def run(args):
    check(args)
    prompts = choose_prompts(args)
    if args.show_tokens:
        model = load_model(args)
        for prompt in prompts:
            show_tokens(model, prompt)
        return
    painter = make_painter(args)
    for prompt, first, count, number in share_of_this_process(prompts, args.n_images):
        painter.paint(prompt, args.seed + first, count, number)
