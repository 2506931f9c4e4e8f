"""`python sd.py`'s command line, whole: sd.py's own options and all that sd_more/ knows besides.

    options  ->  check  ->  load: a model and a task  ->  Painter: each line, each seed

Whatever can be wrong is found out before the painting begins, and said in one message: what, with
which value, and what to do now. No file that is there is overwritten.
"""

import contextlib
import copy
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import convert_weights
import sd
import sd_more.samplers  # noqa: F401  it adds samplers to sd.SAMPLERS
from sd import ImageToImage, SDError, StableDiffusion, TextToImage
from sd_more import library
from sd_more.batch import read_prompts, share_of_this_process
from sd_more.console import command
from sd_more.formats.neighbours import full_name
from sd_more.guidance import USUAL, guided, has_guidance
from sd_more.infotext import write_parameters
from sd_more.low_memory import LowMemory
from sd_more.noise import GENERATORS
from sd_more.options import (
    DEFAULT_PROMPT,
    check,
    check_numbers,
    choose_device,
    parse,
    parse_line,
    path_and_number,
    version,
)
from sd_more.output import check_output, choose_name, name_step, save_picture
from sd_more.pictures import enlarge, grey, grid, read_input
from sd_more.preview import previewed
from sd_more.prompts import name_unused, read_weighted, show_tokens, without_loras
from sd_more.safety import SafetyChecker, check_safety, load_checker
from sd_more.terminal import screen
from sd_more.textual_inversion import textual_inversion
from sd_more.vae import other_vae, read_kind, with_tiny_vae

# %% Prompts and LoRAs -----------------------------------------------------------------------------


def choose_lines(args):
    """-> the options of each prompt that is to be painted."""
    if args.prompts:
        lines = read_prompts(args, parse_line)
        for line in lines:
            check_numbers(line)
            if line.output != args.output:
                check_output(line.output)
        return lines
    line = copy.copy(args)
    default = "" if args.image else DEFAULT_PROMPT
    line.prompt = default if args.prompt is None else args.prompt
    return [line]


def add_loras(args, prompts):
    """Put into args.lora what <lora:name:0.8> in the prompts says, or say why it is left out."""
    each = [[] if args.plain_prompt else without_loras(prompt)[1] for prompt in prompts]
    if any(tags != each[0] for tags in each):
        raise SDError("the lines of --prompts name different LoRAs: paint them one by one.")
    strengths = {}  # of one that stands there twice both count
    for kind, (name, *numbers) in each[0]:
        path, strength = find_lora(args, name), read_strength(numbers)
        if kind == "hypernet":
            problem = "hypernetworks are not done here"
        elif strength is None:
            problem = "its strength must be one number"
        elif path is None:
            problem = "no --folder has such a file" if args.folder else "give --folder or --lora"
        else:
            strengths[path] = strengths.get(path, 0) + strength
            set_strength(args, path, strengths[path])
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
    if path in paths and "lora" in args.given and set(args.lora) - {new}:
        sd.say_once(f"the prompt's strength {strength} of {Path(path).name} takes --lora's place.")
    args.lora = [new if p == path else text for p, text in zip(paths, args.lora)]
    args.lora += [] if path in paths else [new]


def find_lora(args, name):
    """-> the file of that name, of --lora or in a --folder; None if there is none."""
    for text in args.lora:
        path = path_and_number(text)[0]
        if Path(path).stem.removesuffix(".flat").lower() == name.lower():
            return path
    found = library.look_up(name, args.folder)
    if len(found) > 1:
        sd.say_once(f"of {len(found)} files called {name} the first is taken: {found[0]}.")
    return str(found[0]) if found else None


# %% Model and task --------------------------------------------------------------------------------

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
    sd.check_options("", "", args.seed[0], steps, cfg, sampler, 64, 64, args.n_images)
    if sampler == "plms" and habits["spacing"] in ("karras", "lcm"):
        unequal = f"which with {habits['spacing']} they are not: lms knows their lengths."
        sd.say_once(f"plms takes its steps for equally long, {unequal}")
    return habits


def load_model(args):
    find = lambda option, text: flat_file(find_file(args, option, text), args)
    path = find("model", args.model)
    loras = [path_and_number(text) for text in args.lora]
    changes = [sd.lora(find("lora", text), strength) for text, strength in loras]
    changes += [textual_inversion(find("embedding", text)) for text in args.embedding]
    changes += [] if args.clip_skip is None else [sd.clip_skip(args.clip_skip)]
    if has_guidance(path):  # then --cfg is what it is told, and there is no second answer
        args.guidance, args.cfg = USUAL if args.cfg is None else args.cfg, 1.0
        changes += [guided(args.guidance)]
    tiny = find("vae", args.vae) if args.vae else None
    if tiny and read_kind(tiny) != "tiny vae":
        changes, tiny = [*changes, other_vae(tiny)], None
    progress(args, f"loading {path.name}")
    # LowMemory reads no weights before they are used, and for tokens none are.
    model = LowMemory if args.low_memory or args.show_tokens else StableDiffusion
    reader = None if args.plain_prompt else read_weighted
    model = model(path, args.dtype, changes, reader=reader)
    return with_tiny_vae(model, tiny) if tiny else model


KINDS = {"model": "model", "lora": "LoRA", "embedding": "embedding", "vae": "VAE",
         "controlnet": "ControlNet"}  # fmt: skip


def find_file(args, option, text):
    """-> what the text of an option means; nothing is fetched because a picture names it."""
    return library.find(text, args.folder, KINDS[option], fetch=option not in args.told)


def flat_file(path, args):
    """path, or for another program's file what convert_weights.py makes of it, once."""
    ours = sd.read_header(path).get("format", "").startswith("sd.py")
    if ours or not path.exists():  # a path that is not there gets its message from read_flat
        return path
    return convert_weights.flat_file(path, sd.say, args.converted)


def make_task(args, config):
    if args.image is None:
        return TextToImage()
    image, mask = read_input(args.image), args.mask and read_input(args.mask, mask=True)
    if mask:
        name_mask(args.mask, *(sd.open_picture(path) for path in (args.image, args.mask)))
    picture, mask = sd.picture_and_mask(image, mask, args.width, args.height, config.size)
    strength = {} if args.strength is None else {"strength": args.strength}
    if args.mask is None and mask.mean() <= 0.005:  # not for a few green or transparent pixels
        return ImageToImage(picture, **strength)
    task = sd.inpainting(config, picture, mask, **strength)
    sd.say(f"painting {mask.mean():.0%} of {args.image.name}")
    return task


def name_mask(path, picture, mask):
    """Said where it may not mean what it looks like."""
    alpha = mask.convert("RGBA").getchannel("A").getextrema()[0]
    if alpha < 128:
        sd.say_once(f"{path.name} is clear in parts: where it is not is painted, white or black.")
    if abs(picture.width * mask.height / picture.height / mask.width - 1) > 0.02:
        sd.say_once(f"{path.name} has another shape than the picture, and is cropped to it.")


def load_controls(args, model, task):
    """-> (ControlNet, picture, weight) each"""
    size = tuple(task.size(model.config, args.width, args.height))
    for text, image in zip(args.controlnet, args.control_image):
        name, weight = path_and_number(text)
        path = find_file(args, "controlnet", name)
        network = sd.ControlNet(flat_file(path, args), model.dtype)
        yield network, load_hint(image, size, path), weight


def load_hint(image, size, path):
    """What a ControlNet sees: where a picture is transparent black, or for one that was trained to
    inpaint -1, which says that there is a hole. (make_inpaint_condition, in diffusers' ControlNet
    examples)
    """
    picture, opaque = sd.load_picture(grey(sd.open_picture(image)), *size)
    picture[opaque < 0.5] = -1 if "inpaint" in full_name(path).lower() else 0
    return picture


def read_hash(path):
    """-> how AUTOMATIC1111's program names a model: of its file's SHA-256 the first 10 digits; None
    where a flat file was made from several, or does not say.
    """
    sums = convert_weights.read_sums(sd.read_header(path))
    return str(next(iter(sums.values())))[:10] if len(sums) == 1 else None


def name_size(width, height, config):
    """Said where a picture is far larger than what the model was trained on."""
    times = width * height / config.size**2
    if times > 2:
        sd.say_once(
            f"{width} x {height} is {times:.1f} times what the model was trained on, "
            f"{config.size} x {config.size}: it takes more than {times:.0f} times as long, and "
            "more memory, and things may be there twice. --upscale avoids that."
        )


# %% Painting --------------------------------------------------------------------------------------


@dataclass
class Painter:
    """Paints prompts and saves the pictures."""

    model: StableDiffusion
    task: TextToImage
    recipe: dict  # what makes the pictures again besides what a line says, for the text in them
    checker: SafetyChecker | None
    rows: list  # pictures that wait for the rest of their prompt's, with --n-rows
    show: Callable | None  # (step, steps, picture), with --preview

    def paint(self, line, seed, count, number):
        """count pictures, from this seed on, as the options of their line say. number: that of the
        first among all processes' pictures.
        """
        habits = choose_habits(line, self.model.config)
        sampling = habits | {
            "negative_prompt": line.negative_prompt, "width": line.width, "height": line.height,
            "rng": GENERATORS[line.rng], "n_images": count, "seed": seed,
        }  # fmt: skip
        prompt = read_prompt(line)
        task, model = self.task, self.model
        name_size(*task.size(model.config, line.width, line.height), model.config)

        def keep(i, x):
            if line.save_every and i % line.save_every == 0 and i < len(steps):
                for k, picture in enumerate(self.finish(line, model, task, x, seed)):
                    path = name_step(choose_name(line.output, prompt, seed + k, number + k), i)
                    self.save(picture, path, line, seed + k, images=f"step {i}")

        steps = task.timesteps(range(habits["steps"]))
        walk = self.walk(model, prompt, task=task, **sampling)
        x = self.follow(line, walk, len(steps), keep)
        if line.upscale:
            model, task, x = self.paint_over(line, prompt, sampling, x)
        pictures = self.finish(line, model, task, x, seed)
        size = tuple(self.task.size(self.model.config, line.width, line.height))
        if line.n_rows:
            self.rows += pictures
            if len(self.rows) == line.n_images * len(line.seed):
                images = f"{len(self.rows)} in {line.n_rows} rows"
                path = choose_name(line.output, prompt, line.seed[0], number)
                sheet = grid(self.rows, line.n_rows)
                self.save(sheet, path, line, line.seed[0], size, images)
                self.rows.clear()
        else:
            for k, picture in enumerate(pictures):
                path = choose_name(line.output, prompt, seed + k, number + k)
                self.save(picture, path, line, seed + k, size)

    def walk(self, model, prompt, **options):
        """The latents after every step; with --preview each step's picture is shown first."""
        if self.show is None:
            return model.generate_latents(prompt, **options)
        return previewed(model, prompt, self.show, **options)

    def follow(self, line, walk, steps, keep=None):
        """Walk to the end, and say how long it takes. -> the last x"""
        end = "\r" if sys.stderr.isatty() else "\n"
        start = time.perf_counter()
        for i, x in enumerate(walk, 1):
            pace = (time.perf_counter() - start) / i
            text = f"step {i}/{steps}  {pace:.2f} s a step  {pace * (steps - i):.0f} s left "
            progress(line, text, end if i < steps else "\n")
            if keep is not None:
                keep(i, x)
        return x

    def paint_over(self, line, prompt, sampling, x):
        """Enlarge what was painted, and paint over it: a large picture that holds together, from a
        model that was trained on small ones. -> the model, the task, the latents
        """
        pictures = self.model.to_pictures(x, TextToImage(), line.decode_batch)
        picture = enlarge(pictures, line.upscale)
        strength = 0.5 if line.upscale_strength is None else line.upscale_strength
        task = Enlarged(picture, strength)
        steps = len(task.timesteps(range(sampling["steps"])))
        progress(line, "painting over {2} x {1}".format(*picture.shape))
        model = self.model.controlled()  # the same networks
        if model.controls:  # whose pictures have the smaller size
            sd.say_once("--upscale: the ControlNets are not asked while it is painted over.")
            model.controls = ()
        size = {"width": picture.shape[2], "height": picture.shape[1]}
        walk = self.walk(model, prompt, task=task, **sampling | size)
        return model, task, self.follow(line, walk, steps)

    def finish(self, line, model, task, x, seed):
        """Latents -> PIL pictures, black where the safety checker wants it."""
        progress(line, "decoding")
        pictures = model.to_pictures(x, task, line.decode_batch)
        if self.checker is None:
            return pictures
        pictures, flagged = check_safety(model, pictures, self.checker)
        for i in flagged:
            sd.say(f"sd.py: the safety checker blacked out seed {seed + i}")
        return pictures

    def save(self, picture, path, line, seed, size=None, images=1):
        """-> where it is."""
        width, height = size or picture.size  # before it was enlarged, or put into rows
        recipe = vars(line) | self.recipe | choose_habits(line, self.model.config)
        recipe |= {} if line.guidance is None else {"cfg": line.guidance}
        text = write_parameters(recipe, line.prompt, seed, width, height, images)
        path = save_picture(picture, path, text)
        sd.say(f"saved {path}", sys.stdout)
        return path


class Enlarged(ImageToImage):
    """Image to image, from one picture for each in the batch."""

    def __init__(self, pictures, strength):
        super().__init__(pictures[0], strength)
        self.picture = sd.mx.array(pictures)


def progress(args, text, end="\n"):
    if not args.quiet:
        sd.say(text, end=end)


def make_painter(args, show=None, load=None):
    """show: for --preview; load: in load_model's place, for who keeps a model between calls."""
    model = (load or load_model)(args)
    task = make_task(args, model.config)
    if args.controlnet:
        model = model.controlled(*load_controls(args, model, task))
    recipe = {
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "strength": task.strength if isinstance(task, ImageToImage) else None,
        "model_hash": read_hash(model.path),
    }
    told = args.model_hash if args.model != sd.TINY else None  # infotext.name_model says that
    if told and recipe["model_hash"] not in (None, told):
        sd.say_once(f"--from-png: the hash of its model is {told}, {args.model} is another.")
    checker = load_checker(model) if args.safety_check else None
    if checker and show:
        sd.say_once("--preview: the safety checker sees only what is saved.")
    if not args.safety_check and model.config.safety is None:
        sd.say_once("--no-safety-check has no effect: the model has no safety checker.")
    return Painter(model, task, recipe, checker, [], show)


# %% Main ------------------------------------------------------------------------------------------


def main(argv=None):
    with command("sd.py"):
        run(parse(sys.argv[1:] if argv is None else argv))


def run(args):
    if args.version:
        sd.say(version(), sys.stdout)
        return
    choose_device(args.device)
    if args.list or args.clear:
        if args.clear:
            convert_weights.list_kept(clear=True)
        for line in library.listing(args.folder) if args.list else ():
            sd.say(line, sys.stdout)
        return
    check(args)
    lines = choose_lines(args)
    add_loras(args, [line.prompt for line in lines])
    if args.show_tokens:
        model = load_model(args)
        for prompt in map(read_prompt, lines):
            show_tokens(model, prompt)
        return
    with open_preview(args) as show:
        painter = prepare(args, lines, show)
        total = sum(len(line.seed) * line.n_images for line in lines)
        for line, seed, count, number in share_of_this_process(lines):
            progress(line, f"painting {number} of {total}, seed {seed}")
            painter.paint(line, seed, count, number)


def open_preview(args):
    """-> a context in which the function is known that shows pictures, or None"""
    if not args.preview or args.quiet:
        return contextlib.nullcontext()
    return screen(sys.stderr, os.environ, lambda: sys.stdout.lines + sys.stderr.lines)


def read_prompt(line):
    return line.prompt if line.plain_prompt else without_loras(line.prompt)[0]


def prepare(args, lines, show=None, load=None):
    """-> a Painter, after the last checks, which need a model. show, load: see make_painter."""
    painter = make_painter(args, show, load)
    whole = type(painter.task) in (TextToImage, ImageToImage)
    if not whole and any(line.upscale for line in lines):
        raise SDError("--upscale is for whole pictures, not for a part that is painted anew.")
    for line in lines:
        line.lora, line.guidance = args.lora, args.guidance
        line.cfg = line.cfg if args.guidance is None else args.cfg
    prompts = [*map(read_prompt, lines), *(line.negative_prompt for line in lines)]
    name_unused(painter.model, prompts)
    return painter
