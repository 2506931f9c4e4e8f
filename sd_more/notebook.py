"""Comfort for Python and notebooks: lists of prompts, a bar, pictures that know how they were made.

    studio = Studio("model.flat.safetensors")  # or LowMemoryStudio, with the same methods
    pictures = studio.txt2img(["a red house", "a (green:1.2) tree"], seed=7, n_images=2)
    gallery(pictures)  # shows them, as the last line of a notebook's cell
    save(pictures[0], "house.png")  # with its settings, which --from-png reads

What is painted is what StableDiffusion paints. The samplers of samplers.py are there.
"""

import base64
import contextlib
import difflib
import html
import inspect
import io
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sd
import sd_more.samplers  # noqa: F401  it adds samplers to sd.SAMPLERS
from sd_more.infotext import quote, read_text, shorten, write_parameters
from sd_more.low_memory import LowMemory
from sd_more.noise import GENERATORS
from sd_more.output import KINDS, save_picture
from sd_more.preview import previewed
from sd_more.prompts import read_weighted

# %% Painting --------------------------------------------------------------------------------------


class Studio(sd.StableDiffusion):
    """StableDiffusion, the same pictures, and for txt2img, img2img, inpaint and paint besides:

    prompt: one text or a list of them; -> a flat list of PIL pictures, n_images for each prompt, of
    which the first of each has the seed. progress: a function of (step, steps, x) that is called
    after every step of each prompt, x (n_images, h, w, 4) being the latents; what it raises ends
    the painting. By default a bar, where tqdm is installed and the session is a notebook or has a
    terminal; True: also elsewhere; False: nothing. preview: likewise, of (step, steps, picture),
    the picture being a small one of what the step expects, all n_images in a grid (preview.py).
    rng may be a name: torch, numpy, philox, mlx. A wrong name of an option raises an SDError that
    says the right one.

    Each picture has the text in picture.info["parameters"] that the command line writes. What that
    has no words for, such as changes, or pictures that are no files, stands in it as "Besides".

    Brackets in prompts are weights, see prompts.py; with reader=None they are characters. As a base
    before another class it gives that the same: class Mine(Studio, Other).
    """

    changes = ()  # of a model made by from_networks

    def __init__(self, path=sd.TINY, dtype=None, changes=(), *, fast=True, reader=read_weighted):
        self.changes = tuple(changes)
        super().__init__(path, dtype, self.changes, fast=fast, reader=reader)

    def img2img(self, prompt, image, strength=0.75, width=None, height=None, **options):
        """As StableDiffusion's; an image that is a path is named in the pictures' text."""
        options["source"] = {"image": image}
        return super().img2img(prompt, image, strength, width, height, **options)

    def inpaint(self, prompt, image, mask=None, strength=1.0, width=None, height=None, **options):
        """As StableDiffusion's; an image and a mask that are paths are named in the text."""
        check_names(options)  # before a mask of another name is missed
        options["source"] = {"image": image} | ({} if mask is None else {"mask": mask})
        return super().inpaint(prompt, image, mask, strength, width, height, **options)

    def paint(self, prompt, task, *, progress=None, preview=None, source=None, **options):
        """-> list of PIL pictures, see the class. source: {"image": path, "mask": path} of the
        task's, for the text. Raises SDError, before anything is painted.
        """
        check_names(options)
        options = OPTIONS | options | {"rng": find_generator(options.get("rng"))}
        prompts = prompt if isinstance(prompt, (list, tuple)) else [prompt]
        walk = self.generate_latents if preview is None else partial(previewed, self, show=preview)
        walks = [walk(text, task=task, **options) for text in prompts]
        recipe, besides = describe(self, task, source, options)
        steps, pictures = len(task.timesteps(range(recipe["steps"]))), []
        with follow(progress, steps * len(prompts)) as tell:
            for text, walk in zip(prompts, walks):
                for step, x in enumerate(walk, 1):
                    tell(step, steps, x)
                painted = self.to_pictures(x, task)
                label(painted, recipe, text, options["seed"], besides)
                pictures += painted
        return pictures


class LowMemoryStudio(Studio, LowMemory):
    """The same with one network in memory at a time, see low_memory.py."""


# %% Names -----------------------------------------------------------------------------------------

OPTIONS = {  # of generate_latents: {name: default}
    name: option.default
    for name, option in inspect.signature(sd.StableDiffusion.generate_latents).parameters.items()
    if option.kind is option.KEYWORD_ONLY and name != "task"
}
OF_PICTURES = ("image", "mask", "strength")  # what img2img and inpaint take besides
OF_PAINT = ("preview", "progress")  # what all of them take
RIGHT = {  # a name elsewhere, mostly in diffusers and AUTOMATIC1111's program: the name here
    "num_inference_steps": "steps", "num_steps": "steps",
    "guidance_scale": "cfg", "cfg_scale": "cfg", "guidance": "cfg", "scale": "cfg",
    "guidance_rescale": "rescale",
    "num_images_per_prompt": "n_images", "num_images": "n_images", "batch_size": "n_images",
    "generator": "seed", "manual_seed": "seed",
    "scheduler": "sampler", "sampler_name": "sampler",
    "denoising_strength": "strength", "mask_image": "mask",
    "negative": "negative_prompt", "uncond": "negative_prompt",
    "prompt_embeds": "context",
    "callback": "progress", "callback_on_step_end": "progress",
}  # fmt: skip


def check_names(options):
    """SDError that says the right name for each wrong one."""
    if wrong := [name for name in options if name not in (*OPTIONS, *OF_PAINT)]:
        raise sd.SDError(" ".join(map(name_right, wrong)))


def name_right(name):
    """ "num_inference_steps" -> "num_inference_steps is called steps here." """
    if name in OF_PICTURES:
        return f"{name} is for img2img and inpaint."
    known = [*OPTIONS, *OF_PICTURES, *OF_PAINT]
    similar = difflib.get_close_matches(name.lower(), [*known, *RIGHT], 1)
    if not similar:
        return f"{name} is not known here; there are {', '.join(known)}."
    return f"{name} is called {RIGHT.get(similar[0], similar[0])} here."


def find_generator(rng):
    """A name of a generator of noise -> the generator; any other as it is."""
    if not isinstance(rng, str):
        return rng
    sd.expect(rng in GENERATORS, "rng", rng, f"one of {', '.join(GENERATORS)}, or a function")
    return GENERATORS[rng]


# %% Progress --------------------------------------------------------------------------------------


@contextlib.contextmanager
def follow(progress, total):
    """Yields what is to be called after every step. total: of how many steps a bar is."""
    if callable(progress):
        yield progress
        return
    good = progress in (None, True, False)
    sd.expect(good, "progress", progress, "a function of (step, steps, x), True or False")
    wanted = is_watched() if progress is None else progress
    bar = find_bar() if wanted else None
    if bar is None:
        yield lambda step, steps, x: None
        return
    with bar(total=total, unit="step") as shown:  # it is closed whatever happens
        yield lambda step, steps, x: shown.update()


def is_watched():
    """Does somebody look on, in a notebook or at a terminal?"""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def find_bar():
    """-> tqdm's class for where this runs, or None: tqdm is none of the packages needed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm


# %% The text --------------------------------------------------------------------------------------


def describe(model, task, source, options):
    """-> the recipe for write_parameters, [what paints along, and has no field in the text]"""
    source = find_source(task) if source is None else source
    paths = {name: file for name, file in source.items() if isinstance(file, (str, Path))}
    # What is not given is the model's own, as in generate_latents.
    own = {name: vars(model.config).get(name) if n is None else n for name, n in options.items()}
    names = "steps", "sampler", "spacing", "cfg", "rescale", "negative_prompt"
    recipe = {name: own[name] for name in names} | {
        "rng": name_generator(own["rng"] or sd.torch_normal),
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "strength": task.strength if isinstance(task, sd.ImageToImage) else None,
        "model": Path(model.path),
        "controlnet": [f"{net.path}:{weight}" for net, _, weight in model.controls],
        "plain_prompt": model.reader is None,
        "low_memory": isinstance(model, LowMemory),
    }
    besides = {
        "changes": model.changes,
        "reader": model.reader not in (None, read_weighted),
        "VAE": not isinstance(model.vae, (sd.VAE, type(None))),  # None: LowMemory loads its own
        "control image": model.controls,
        "task": type(task) not in TASKS,
        "latents": options["latents"] is not None,
        "context": options["context"] is not None,
        "rng": recipe["rng"] == OWN,
    }
    besides |= {name: name not in paths for name in source}
    return recipe | paths, [name for name, unsaid in besides.items() if unsaid]


TASKS = (sd.TextToImage, sd.ImageToImage, sd.Inpaint, sd.InpaintNine)
OWN = "own"  # of a generator that is none of GENERATORS


def name_generator(rng):
    return next((name for name, make in GENERATORS.items() if make is rng), OWN)


def find_source(task):
    """What a task that somebody made paints from; of which files is not known."""
    kinds = {"image": sd.ImageToImage, "mask": sd.Inpaint}
    return {name: None for name, kind in kinds.items() if isinstance(task, kind)}


def label(pictures, recipe, prompt, seed, besides):
    """Give each of the pictures its text. seed: the first one's."""
    for i, picture in enumerate(pictures):
        text = write_parameters(recipe, prompt, seed + i, *picture.size)
        text += f", Besides: {quote(', '.join(besides))}" if besides else ""
        picture.info["parameters"] = text


def save(picture, path):
    """Saves a PIL picture, with its text if it has one, as .png, or as .jpg or .webp.

    -> the path: the given one, or if that is taken, the first of path-2, path-3 ... that is free.
    Raises SDError.
    """
    path = Path(path)
    good = path.suffix.lower() in KINDS
    sd.expect(good, "the path", path, ", ".join(f"NAME{end}" for end in KINDS))
    return save_picture(picture, path, picture.info.get("parameters", ""))


# %% Gallery ---------------------------------------------------------------------------------------

WIDTH = 1024  # pixels, of a gallery


def gallery(pictures, columns=None, captions=True):
    """PIL pictures of any sizes, or one -> what shows them in a notebook, as the last line of a
    cell or with display(). columns: by default up to four; captions: with the seed and the prompt
    of those that have a text. For one picture of all, see pictures.grid. Raises SDError.
    """
    pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    columns = max(1, min(4, len(pictures))) if columns is None else columns
    sd.expect(sd.divides(1, columns), "columns", columns, "a whole number, at least 1")
    return Gallery(pictures, columns, captions)


@dataclass(repr=False)
class Gallery:
    """See gallery()."""

    pictures: list
    columns: int
    captions: bool

    def __repr__(self):
        lines = [": ".join(filter(None, read_caption(picture))) for picture in self.pictures]
        told = shorten("; ".join(filter(None, lines)) if self.captions else "", 300)
        count = f"{len(self.pictures)} picture{'s' * (len(self.pictures) != 1)}"
        return sd.printable(f"<gallery of {count}{': ' * bool(told)}{told}>")

    def _repr_html_(self):
        cells = [self.write_cell(picture) for picture in self.pictures]
        rows = [cells[i : i + self.columns] for i in range(0, len(cells), self.columns)]
        # A table, not a grid of CSS: where others show notebooks, styles are often taken out.
        return "<table>" + "".join(f"<tr>{''.join(row)}</tr>" for row in rows) + "</table>"

    def write_cell(self, picture):
        file, width = io.BytesIO(), min(picture.width, max(1, WIDTH // self.columns))
        picture.save(file, "PNG")
        code = base64.b64encode(file.getvalue()).decode()
        lines = filter(None, read_caption(picture)) if self.captions else ()
        told = "<br>".join(html.escape(shorten(line, 300)) for line in lines)
        return (
            f'<td style="text-align: left; vertical-align: top">'
            f'<img width="{width}" src="data:image/png;base64,{code}">'
            f'<div style="max-width: {width}px; white-space: normal">{told}</div></td>'
        )


def read_caption(picture):
    """-> "seed 42", its prompt; both empty where the picture has no text that says so."""
    try:
        prompts, fields, _ = read_text(picture.info.get("parameters", ""))
    except ValueError:
        return "", ""
    return f"seed {fields['seed'][1]}" if "seed" in fields else "", prompts["prompt"]
