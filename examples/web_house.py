"""What web.py's pages paint: their settings, their files, one queue, and one model.

    settings  ->  words of a command line  ->  sd_more/app.py: checks, paints, saves

Names that come from a page are compared with those that are there, and are never made a path.
"""

import base64
import contextlib
import functools
import hashlib
import io
import itertools
import os
import re
import secrets
import tempfile
import threading
import time
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

import sd
from sd import SDError
from sd_more import app, infotext, library, options, output, preview
from sd_more.batch import share_of_this_process
from sd_more.guidance import USUAL
from sd_more.pictures import grey

MOST_UPLOADS, MOST_WAITING, MOST_PICTURES = 100, 100, 100  # kept; in the queue; of one job
MOST_SHOWN = 300  # in the gallery
INPUTS = "inputs"  # the folder, in the output folder, of what was painted from

# %% Settings --------------------------------------------------------------------------------------

FIELDS = (  # of the page, and options of the command line
    "prompt", "negative_prompt", "seed", "n_images", "steps", "cfg", "sampler", "width", "height",
    "strength", "spacing", "rescale", "rng", "clip_skip", "upscale", "upscale_strength",
)  # fmt: skip
FLAGS = ("plain_prompt",)
CHOSEN = ("image", "mask", "loras", "controlnet")  # by an upload's or a file's name
OWN = {  # what may stand on the command line besides, for all that is painted
    "device", "dtype", "low_memory", "vae", "embedding", "converted", "safety_check",
    "decode_batch",
}  # fmt: skip
MODEL = (  # whatever changes what is loaded
    "model", "lora", "embedding", "clip_skip", "vae", "dtype", "low_memory", "plain_prompt",
)  # fmt: skip


def write_words(settings, house):
    """A page's settings -> words of the command line. Raises SDError."""
    known = {*FIELDS, *FLAGS, *CHOSEN}
    if not isinstance(settings, dict) or (odd := sorted(settings.keys() - known)):
        raise SDError(f"{odd[0] if isinstance(settings, dict) else 'this'} is no setting here.")
    given = {"prompt": ""} | {k: v for k, v in settings.items() if v not in (None, "")}
    words = [f"{option(k)}={write_value(k, given[k])}" for k in FIELDS if k in given]
    words += [option(name) for name in FLAGS if settings.get(name) is True]
    for name in ("image", "mask"):
        if settings.get(name):
            words.append(f"{option(name)}={house.files.keep(settings[name], name)}")
    for name, strength in table(settings, "loras").items():
        path = house.shelf.find("lora", name)
        words.append(f"--lora={path}:{read_number('loras', strength)}")
    if control := table(settings, "controlnet"):
        path = house.shelf.find("controlnet", control.get("name"))
        image = house.files.keep(control.get("image"), "picture for controlnet")
        weight = read_number("controlnet", control.get("weight", 1))
        words += [f"--controlnet={path}:{weight}", f"--control-image={image}"]
    return words


def option(name):
    return "--" + name.replace("_", "-")


def table(settings, name):
    value = settings.get(name) or {}
    sd.expect(isinstance(value, dict), name, value, "a table")
    return value


def write_value(name, value):
    good = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    sd.expect(good, name, value, "a text or a number")
    return str(value).replace("\0", " ").encode(errors="replace").decode()


def read_number(name, value):
    try:
        return float(write_value(name, value))
    except ValueError:
        raise SDError(f"{name} must be a number, got {str(value)[:80]}.") from None


def sentence(text):
    """What the command line says, for a page, which has fields for options."""
    text = str(text).removesuffix(" --help lists all options.").removeprefix("argument ")
    return re.sub(r"(?<!\S)(-\w/)?--(?=[a-z])", "", text)


def find_field(message):
    """ "steps must be 1 to 999, got 0." -> "steps", beside which it is to stand; or "" """
    words = re.findall(r"[a-z]\w*", message.lower().replace("-", "_"))[:5]
    words = [{"size": "width", "lora": "loras"}.get(word, word) for word in words]
    return next((word for word in words if word in (*FIELDS, *FLAGS, *CHOSEN)), "")


def read_settings(path, house):
    """A picture -> the settings that make it again, as far as what it names is here."""
    try:
        _, fields, _ = infotext.find_settings(path, {})
        own = house.is_own(fields.get("model", ("", ""))[1])
        told = infotext.read_parameters(path, {"model": house.base.model} if own else {})
    except SDError as error:
        raise SDError(name_picture(str(error), path)) from None
    except (ValueError, LookupError):
        raise SDError("the picture's settings are not readable.") from None
    found = {name: told[name] for name in (*FIELDS, *FLAGS) if name in told}
    for name in ("image", "mask"):
        if name in told and (key := house.files.recall(told[name], name)):
            found[name] = key
    if "image" not in found:
        found.pop("strength", None)
    if "seed" in found:  # JavaScript's numbers have 53 bits
        found["seed"] = str(found["seed"])
    loras = [house.shelf.recall("lora", text) for text in told.get("lora", [])]
    found["loras"] = dict(filter(None, loras))
    nets, images = told.get("controlnet", []), told.get("control_image", [])
    for net, image in itertools.islice(zip(nets, images), 1):
        name, weight = house.shelf.recall("controlnet", net) or (None, None)
        key = house.files.recall(image, "control picture")
        if name and key:
            found["controlnet"] = {"name": name, "weight": weight, "image": key}
    house.name_other(told)
    return found


def name_picture(text, path):
    """A message about a file that has no name -> about "the picture"."""
    return text.replace(f"--from-png {path}", "The picture").replace(str(path), "the picture")


# %% What is said ----------------------------------------------------------------------------------


class Ear:
    """Standard error, of which a thread may also keep what it says itself."""

    def __init__(self, stream):
        self.stream, self.local = stream, threading.local()

    def write(self, text):
        self.stream.write(text)
        if (kept := getattr(self.local, "kept", None)) is not None:
            kept.append(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    @contextlib.contextmanager
    def hear(self):
        """Yields a list of sentences, filled in at the end."""
        sd.say_once.cache_clear()  # once for each picture, not once for each server
        self.local.kept, notes = [], []
        try:
            yield notes
        finally:
            lines = "".join(self.local.kept).splitlines()
            notes += [sentence(line.removeprefix("sd.py: ")) for line in lines if line.strip()]
            del self.local.kept


# %% Files -----------------------------------------------------------------------------------------


class Files:
    """The pictures in the output folder, and what was uploaded.

    An upload is called by its bytes' hash. It is in a folder that goes with the server, and is
    copied into the output folder when something is painted from it, which then names it.
    """

    def __init__(self, folder):
        self.folder, self.inputs = Path(folder), Path(folder) / INPUTS
        self.temporary = tempfile.TemporaryDirectory(prefix="sd-web-")
        self.uploads, self.lock = OrderedDict(), threading.Lock()  # names, the oldest first

    def pictures(self):
        """-> [{"name", "seed", "prompt" ...}], the newest first"""
        found = [(path.stat().st_mtime_ns, path) for path in self.paths()]
        newest = sorted(found, reverse=True)[:MOST_SHOWN]
        return [{"name": path.name} | read_caption(path, changed) for changed, path in newest]

    def paths(self):
        """Links, which lead elsewhere, are left out."""
        with os.scandir(self.folder) as scan:
            names = [each.name for each in scan if each.is_file(follow_symlinks=False)]
        paths = [self.folder / name for name in names if not name.startswith(".")]
        return [path for path in paths if path.suffix.lower() in output.KINDS]

    def picture(self, name):
        """-> its path, or None"""
        return next((path for path in self.paths() if path.name == name), None)

    def add(self, data):
        """Bytes of a picture -> its name. Raises SDError."""
        with self.lock:  # one at a time: they may be large
            kind = picture_kind(data)
            name = f"{hashlib.sha256(data).hexdigest()[:20]}.{kind}"
            (Path(self.temporary.name) / name).write_bytes(data)
            self.uploads[name] = None
            self.uploads.move_to_end(name)
            while len(self.uploads) > MOST_UPLOADS:
                old, _ = self.uploads.popitem(last=False)
                (Path(self.temporary.name) / old).unlink(missing_ok=True)
        return name

    def find(self, name, what="image"):
        """An upload's name -> its path: the one in the output folder, if it was painted from."""
        if isinstance(name, str):
            if self.inputs.is_dir() and name in os.listdir(self.inputs):
                return self.inputs / name
            if name in self.uploads:
                return Path(self.temporary.name) / name
        raise SDError(f"the {what} is not here any more. Choose it again.")

    def keep(self, name, what):
        """-> its path in the output folder, where it is from now on"""
        path = self.find(name, what)
        if path.parent != self.inputs:
            self.inputs.mkdir(exist_ok=True)
            data = path.read_bytes()
            path = sd.write_complete(self.inputs / name, lambda file: file.write(data))
        return path

    def recall(self, path, what):
        """A path that a picture names -> the upload's name, if it is one of these."""
        name = Path(path).name
        if self.inputs.is_dir() and name in os.listdir(self.inputs):
            return name
        sd.say_once(f"the {what} it was made from, {infotext.shorten(name)}, is not here.")
        return None


def picture_kind(data):
    """-> "png" and so on. Raises SDError for what is no picture, or too large."""
    try:
        sd.open_picture(io.BytesIO(data)).load()
    except (OSError, ValueError, MemoryError, SyntaxError):
        raise SDError("this is not readable as a picture, or has too many pixels.") from None
    with Image.open(io.BytesIO(data), formats=sd.PICTURES) as picture:
        return picture.format.lower()


def small_copy(path, most=1024):
    """-> a PNG's bytes, as the model sees the picture, but smaller."""
    picture = grey(sd.open_picture(path))
    if picture.mode.startswith("I"):
        picture = picture.point(lambda n: n / 257).convert("L")
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((most, most))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@functools.lru_cache(4 * MOST_SHOWN)
def read_caption(path, changed):
    """-> {"seed", "prompt", "text", "width", "height"}, empty where the picture does not say."""
    caption = {"seed": "", "prompt": "", "text": ""}
    try:
        texts, (width, height) = infotext.find_texts(path)
        caption |= {"width": width, "height": height}
        text = infotext.find_text(path, texts)
        prompts, fields, _ = infotext.read_text(text or "")
    except ValueError:
        return caption
    seed = fields["seed"][1] if "seed" in fields else ""
    return caption | {"seed": seed, "prompt": prompts["prompt"], "text": text}


STARTS = {  # of what library.py says of them
    "lora": ("a lora", "a converted lora"),
    "controlnet": ("controlnet", "a converted controlnet"),
}


class Shelf:
    """The LoRAs and ControlNets in the folders, by the names that the page shows."""

    def __init__(self, folders):
        self.folders, self.known = folders, {}  # {(path, time, size): kind}

    def look(self, kind):
        """-> {name: path}; the name, without an ending, outlives that the file is converted"""
        entries, _ = library.walk(self.folders)
        flats, found = [(each.path, sd.read_header(each.path)) for each in entries], {}
        for each, (path, header) in zip(entries, flats):
            known = self.tell(path, header).startswith(STARTS[kind])
            if known and not library.is_converted(path, flats):
                short = library.spellings(each)[:3][-1]
                found[each.name if short in found else short] = path
        return found

    def tell(self, path, header):
        status = path.stat()
        key = path, status.st_mtime_ns, status.st_size
        if key not in self.known:
            self.known[key] = library.tell_kind(path, header).lower()
        return self.known[key]

    def find(self, kind, name):
        found = self.look(kind)
        if not isinstance(name, str) or name not in found:
            raise SDError(f"{kind} {infotext.shorten(str(name))} is not in the folder any more.")
        return found[name]

    def recall(self, kind, text):
        """FILE:NUMBER, as a picture has it -> (name, number), or None if it is not here."""
        file, _, number = text.rpartition(":")
        stem = Path(file or text).stem.removesuffix(library.FLAT)
        for name in self.look(kind):
            if library.fold(Path(name).name) == library.fold(stem):
                with contextlib.suppress(ValueError):
                    return name, float(number or 1)
        sd.say_once(f"the {kind} {infotext.shorten(stem)} is not in the folder.")
        return None


# %% The queue, and the painting -------------------------------------------------------------------


class Cancelled(Exception):
    """Nobody wants the picture any more."""


@dataclass
class Job:
    number: int
    client: str  # whose page it is
    args: object
    lines: list
    notes: list
    state: str = "waiting"  # loading, painting, decoding; done, cancelled, failed
    cancelled: bool = False
    step: int = 0
    steps: int = 0
    left: float | None = None  # seconds
    previews: list = field(default_factory=list)  # addresses with the PNGs in them
    pictures: list = field(default_factory=list)  # names
    message: str = ""

    def over(self):
        return self.state in ("done", "cancelled", "failed")

    def tell(self, client, place):
        told = {
            name: vars(self)[name]
            for name in ("number", "state", "step", "steps", "left", "pictures", "notes", "message",
                         "previews", "cancelled")
        }  # fmt: skip
        line = self.lines[0]
        told |= {"prompt": infotext.shorten(line.prompt, 200), "seed": str(line.seed[0])}
        told |= {"count": line.n_images * len(line.seed), "place": place}
        return told | {"mine": self.client == client, "field": find_field(self.message)}


class WebPainter(app.Painter):
    """A Painter whose steps are seen, and which can be stopped between two of them."""

    def watch(self, job, tell):
        self.job, self.tell, self.task = job, tell, preview.Watched(self.task)
        return self

    def follow(self, line, walk, steps, keep=None):
        return super().follow(line, self.watched(walk, steps), steps, keep)

    def watched(self, walk, steps):
        start = time.perf_counter()
        self.note(state="painting", step=0, steps=steps, left=None)
        for i, x in enumerate(walk, 1):
            left = (time.perf_counter() - start) / i * (steps - i)
            self.note(step=i, left=left, previews=self.previews())
            yield x
        self.note(state="decoding", left=None)

    def previews(self):
        x0, matrix = self.task.x0, self.task.matrix
        return [address(preview.preview(x0[k : k + 1], matrix)) for k in range(len(x0))]

    def note(self, **news):
        if self.job.cancelled:
            raise Cancelled
        vars(self.job).update(news)
        self.tell()

    def save(self, *args, **options):
        path = super().save(*args, **options)
        self.job.pictures.append(path.name)
        self.tell()
        return path


def address(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class House:
    """One model, one queue, and everybody's pages."""

    def __init__(self, words, model, folders, output_folder, ear):
        """words: what else the command line says, for all that is painted."""
        self.words = [*words, f"--model={model}", f"--output={output_folder}{os.sep}", "--quiet"]
        self.words += [f"--folder={folder}" for folder in folders]
        self.base = options.parse([*self.words, "--prompt="])
        options.check(self.base)
        self.files, self.shelf, self.ear = Files(output_folder), Shelf(folders), ear
        self.jobs, self.numbers = [], itertools.count(1)
        self.changed = threading.Condition()  # and the lock of all that is in here
        self.listeners = {}  # {function that tells a page: its client}
        self.name = secrets.token_hex(8)  # that of no other server
        self.model, self.key, self.guidance = None, None, None
        model = self.load(self.base)
        self.config, self.hash = model.config, app.read_hash(model.path)
        self.dtype = str(model.dtype).removeprefix("mlx.core.")

    # One model in memory

    def load(self, args):
        """-> the model with the LoRAs and so on of these options: the one that is there, or another
        in its place.
        """
        key = [vars(args)[name] for name in MODEL]
        wanted = USUAL if args.cfg is None else args.cfg  # of a model that has it built in
        if key != self.key or self.guidance not in (None, wanted):
            self.model = self.key = None
            sd.mx.clear_cache()
            self.model = app.load_model(args)
            self.key, self.guidance = key, args.guidance
        elif self.guidance is not None:
            args.guidance, args.cfg = wanted, 1.0
        return self.model

    def name_other(self, told):
        """Said where a picture was made with what is not what paints here."""
        own = vars(self.base)
        others = [name for name in ("model", "vae") if differ(told.get(name), own[name])]
        others += [name for name in ("embedding",) if told.get(name, own[name]) != own[name]]
        for name in others:
            other = told[name] if isinstance(told[name], str) else ", ".join(told[name])
            sd.say_once(f"it was made with the {name} {infotext.shorten(other, 200)}.")
        code, dtype = told.get("model_hash", self.hash), told.get("dtype", self.dtype)
        if self.hash not in (None, code):
            sd.say_once(f"the hash of its model is {code}, that of this one {self.hash}.")
        if dtype != self.dtype:
            sd.say_once(f"it was made in {dtype}, and here it is {self.dtype}.")

    def is_own(self, name):
        """Is the model here called so?"""
        return Path(self.base.model).stem == name

    # The queue

    def submit(self, settings, client):
        """-> a Job. Raises SDError for what can be found wrong before it is its turn."""
        with self.ear.hear() as notes:
            args = options.parse([*self.words, *write_words(settings, self)])
            options.check(args)
            lines = app.choose_lines(args)
            app.add_loras(args, [line.prompt for line in lines])
            for line in lines:
                app.choose_habits(line, self.config)
            count = sum(len(line.seed) * line.n_images for line in lines)
            sd.expect(count <= MOST_PICTURES, "n_images", count, f"at most {MOST_PICTURES} in all")
        with self.changed:
            if sum(not job.over() for job in self.jobs) >= MOST_WAITING:
                raise SDError(f"{MOST_WAITING} are waiting already. Try again later.")
            job = Job(next(self.numbers), client, args, lines, notes)
            over = [job for job in self.jobs if job.over()]
            self.jobs = [job for job in self.jobs if job not in over[:-20]] + [job]
            self.changed.notify()
        self.tell()
        return job

    def cancel(self, number):
        with self.changed:
            for job in self.jobs:
                if job.number == number and not job.over():
                    job.cancelled = True
                    job.state = "cancelled" if job.state == "waiting" else job.state
        self.tell()

    def leave(self, client):
        """Cancel what a page asked for that is no longer there."""
        if client not in self.listeners.values():
            for job in list(self.jobs):
                if job.client == client:
                    self.cancel(job.number)

    def tell(self):
        for listener in list(self.listeners):
            listener()

    def state(self, client):
        """-> what a page is told. place: 1 for who is painted, 2 for the next"""
        with self.changed:
            places = itertools.count(1)
            jobs = [job.tell(client, 0 if job.over() else next(places)) for job in self.jobs]
        return {"server": self.name, "jobs": jobs}

    def work(self):
        """Paint what is in the queue, for ever."""
        while True:
            with self.changed:
                self.changed.wait_for(self.next_job)
                job = self.next_job()
                job.state = "loading"
            self.tell()
            with self.ear.hear() as notes:
                state, message = self.paint(job)
            job.notes, job.previews = list(dict.fromkeys(job.notes + notes)), []
            job.message, job.state = sentence(message), state
            self.tell()

    def next_job(self):
        return next((job for job in self.jobs if job.state == "waiting"), None)

    def paint(self, job):
        """-> how it ended, and a message"""
        try:
            painter = app.prepare(job.args, job.lines, load=self.load)
            painter = WebPainter(**vars(painter)).watch(job, self.tell)
            for each in share_of_this_process(job.lines):
                painter.paint(*each)
            return "done", ""
        except Cancelled:
            return "cancelled", ""
        except (SDError, OSError) as error:
            return "failed", str(error)
        except MemoryError:
            return "failed", "there is not enough memory for this. Try smaller or fewer pictures."
        except Exception:  # noqa: BLE001  a mistake of ours must not end it for everybody
            traceback.print_exc()
            return "failed", "something went wrong here; the terminal says what."


def differ(told, own):
    """Are they paths of files that are called differently?"""
    return told is not None and Path(told).name != Path(own or "").name
