"""What somebody wrote after --model, --lora and so on, found; and all that is there to be found.

    find("anime", [Path("loras")], "LoRA")   ->  loras/styles/Anime.safetensors
    find("org/name", [], "model")            ->  a folder in the Hugging Face hub's cache
    listing([Path("loras")])                 ->  a line for each file: name, what it is, size

A name is compared with those of the files that are in the folders, and is never made a path: so it
leads nowhere else, whoever wrote it.
"""

import collections
import difflib
import functools
import itertools
import json
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

import convert_weights
import sd
from sd_more.formats import hub, lora, neighbours
from sd_more.formats.hub import ENDINGS
from sd_more.formats.tensors import require

MOST = 20_000  # entries of the folders that are looked at
FLAT = ".flat"  # what stands before the ending of a converted file


# %% What is there ---------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A file with weights, or a diffusers folder."""

    path: Path
    name: str  # its path inside the folder that was looked through, with "/"


def walk(folders):
    """-> [Entry], the nearest first; a sentence for each place that was not looked at

    Hidden files are left out, and of folders that are there twice, by links, all but the first.
    """
    queue = collections.deque((Path(folder), "") for folder in folders)
    entries, problems, seen, left = [], [], set(), MOST
    while queue and left > 0:
        folder, name = queue.popleft()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as scan:
                inside = sorted(each.name for each in itertools.islice(scan, left))
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}.")
            continue
        left -= len(inside)
        if is_diffusers(folder, inside):
            entries.append(Entry(folder, name or folder.name))
            continue
        for each in inside:
            path, place = folder / each, f"{name}/{each}" if name else each
            if each.startswith("."):
                continue
            if os.path.isdir(path):
                queue.append((path, place))
            elif each.lower().endswith(ENDINGS) and os.path.isfile(path):  # no pipe, no device
                entries.append(Entry(path, place))
    if left <= 0:
        problems.append(f"only the first {MOST:,} entries of the folders were looked at.")
    return entries, problems


def is_diffusers(folder, inside):
    """Is it the folder of a model, or of one network, that the library diffusers wrote?"""
    if "model_index.json" in inside or os.path.isfile(folder / "unet" / "config.json"):
        return True
    if "config.json" not in inside:
        return False
    try:
        return "_class_name" in convert_weights.read_json(folder / "config.json")
    except (sd.SDError, OSError):
        return False


# %% Names -----------------------------------------------------------------------------------------


def find(text, folders, what, fetch=True):
    """-> the path that is meant: one that is there, a name in the folders, or one on the hub.

    what: the kind of thing, for messages. fetch: may it be fetched? Not if a stranger's picture
    names it. Raises SDError.
    """
    text = str(text)
    if not text.strip():
        raise sd.SDError(f"the name of the {what} is empty. Give its path, or its name.")
    if os.path.exists(text):
        return Path(text)
    entries, problems = walk(filter(os.path.isdir, folders))
    found = fitting(text, entries)
    if len(found) > 1:
        few = ", ".join(str(path) for path in found[:10])
        more = f" and {len(found) - 10} more" if len(found) > 10 else ""
        raise sd.SDError(f"{text} may be {len(found)} files: {few}{more}. Give one of these paths.")
    if found:
        return found[0]
    if fetch:
        with convert_weights.what_was_not_done(text):
            path = convert_weights.fetch(Path(text), sd.say)
        if path != Path(text):
            return path
    raise sd.SDError(explain(text, folders, what, entries, problems))


def look_up(name, folders):
    """-> the files in the folders that are called so, for a name that somebody else wrote: it is
    neither a path nor fetched."""
    return fitting(name, walk(filter(os.path.isdir, folders))[0])


def fitting(name, entries):
    """-> the paths of what is called so, without the files that a flat file there was made of

    Where one is spelled exactly so, only that: on many disks Anime and anime are two files.
    """
    wanted = fold(name)
    fits = [each for each in entries if any(ends(s, wanted) for s in map(fold, spellings(each)))]
    exact = [each for each in fits if any(ends(spelled, name) for spelled in spellings(each))]
    paths = {os.path.realpath(each.path): each.path for each in reversed(exact or fits)}
    unused = set(itertools.chain(*map(surplus, itertools.permutations(paths.values(), 2))))
    return [path for path in reversed(paths.values()) if path not in unused]


def ends(spelled, name):  # styles/anime is called anime, too
    return spelled == name or bool(name) and spelled.endswith("/" + name)


def fold(name):
    """Without upper case, and with one spelling for each letter: macOS has two for an umlaut."""
    return unicodedata.normalize("NFC", name).casefold()


def spellings(entry):
    """styles/anime.flat.safetensors -> itself, styles/anime.flat, styles/anime

    Where a file is called as in all folders of its kind, the folder's name will do, too.
    """
    stem, ending = os.path.splitext(entry.name)
    if entry.path.is_dir() or ending.lower() not in ENDINGS:
        return [entry.name]
    folder, name = os.path.split(entry.name)
    more = [folder] if folder and neighbours.GENERIC.match(name) else []
    return [entry.name, stem, stem.removesuffix(FLAT), *more]


def surplus(pair):
    """-> what is of no use beside the other: of a flat file and its source, the source; or, where
    that was changed since, the flat file, which will be made again."""
    flat, source = pair
    header = sd.read_header(flat)
    ours = header.get("format", "").startswith("sd.py")
    if not ours or header.get("source") not in sources(source):
        return []
    return [source if is_made_of(header, source) else flat]


def sources(path):
    """-> what a flat file may call what it was made of"""
    return path.name, neighbours.full_name(path)


def is_made_of(header, source):
    """By what convert_weights.flat_file writes; of what was converted by hand only names tell."""
    made_from = header.get("made_from")
    return made_from in (None, convert_weights.fingerprint(Path(os.path.abspath(source))))


def explain(text, folders, what, entries, problems):
    """-> a sentence for a name that is none"""
    text = convert_weights.short(text, 200)
    if "://" in text:
        return (
            f"{text} is an address. Download the {what} and give its path; from the Hugging Face "
            "hub, give org/name or org/name/FILE."
        )
    places = ", ".join(f"{f}{'' if os.path.isdir(f) else ' (not there)'}" for f in folders)
    start = f"there is no {what} {text}, here" + (f" or in {places}" if places else "")
    if hub.parse(text):  # and it was not asked for
        start += f"; nor is it looked for on the hub, for {Path(text).parts[0]} is a folder here"
    near = nearest(text, entries)
    advice = f"Did you mean {' or '.join(near)}?" if near else "Is the name right?"
    advice += "" if folders else " To find it by its name, say where with --folder."
    return " ".join([f"{start}. {advice}", *problems])


def nearest(text, entries):
    """-> at most three names that look like it"""
    wanted, by_name = fold(os.path.basename(text)), {}
    wanted = os.path.splitext(wanted)[0] if wanted.endswith(ENDINGS) else wanted
    for each in entries:
        name = spellings(each)[-1]
        by_name.setdefault(fold(os.path.basename(name)), name)
    return [by_name[name] for name in difflib.get_close_matches(wanted, by_name)]


# %% A list ----------------------------------------------------------------------------------------


def listing(folders):
    """Yield lines: what is in the folders, and what is kept in the cache folder. Only headers are
    read; a broken file gets a line like all others."""
    kept = list(convert_weights.kept_files())
    for folder in dict.fromkeys(map(Path, folders)):
        entries, problems = walk([folder])
        headers = {each.path: sd.read_header(each.path) for each in entries}
        yield f"{folder}: {len(entries)} models and other files"
        for path, name in sorted(entries, key=lambda each: fold(each.name)):
            done = is_converted(path, [*headers.items(), *kept])
            words = [tell_kind(path, headers[path]), f"{size(path) / 1e6:.1f} MB"]
            yield f"  {sd.printable(name)}: " + ", ".join(words + ["converted already"] * done)
        yield from (f"  {problem}" for problem in problems)
    yield from list_kept(kept)


def is_converted(path, flats):
    """Is one of these flat files made of it? flats: (path, header). Of those that were made by hand
    one beside it."""
    made = [
        header
        for flat, header in flats
        if header.get("source") in sources(path)
        and ("made_from" in header or flat.parent == path.parent)
    ]
    try:
        return any(is_made_of(header, path) for header in made)
    except OSError:  # it is gone
        return False


def list_kept(kept):
    """Yield what convert_weights.flat_file has put into the cache folder."""
    total, cache = sum(size(path) for path, _ in kept), convert_weights.cache_folder()
    yield f"{cache}: {len(kept)} converted files, {total / 1e6:.1f} MB in all"
    for path, header in kept:
        source = sd.printable(convert_weights.short(header.get("source", "an unknown file")))
        yield f"  {sd.printable(path.name)}: {size(path) / 1e6:.1f} MB, made from {source}"
    if kept:
        yield "  to delete all of these: python convert_weights.py --clear"


def size(path):
    """In bytes, of a file or of a diffusers folder; 0 for what is gone."""
    files = [path, *path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def tell_kind(path, header):
    """-> what a file or folder is, in a few words; or why it is of no use"""
    if header.get("format", "").startswith("sd.py"):
        return f"a converted {read_flat_kind(header)}"
    try:
        with convert_weights.what_was_not_done(path), convert_weights.blame(path):
            return read_kind(convert_weights.read_source(path, None))
    except sd.SDError as problem:
        why = str(problem).removesuffix(" Nothing was written.").rstrip(".")
        for start in (f"{path} was not converted: ", f"{path}: ", f"{path} "):
            why = why.removeprefix(sd.printable(start))
        return f"not for this program: {convert_weights.short(why, 200)}"


def read_flat_kind(header):
    try:
        config = json.loads(header.get("config", ""))
        kind = config["kind"]
        name = config["name"] if kind == "model" else kind.replace("words", "textual inversion")
        return sd.printable(convert_weights.short(name))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "file that is damaged: convert it again"


def read_kind(source):
    """As make_plan has it, but of a model and of a LoRA only what the header tells."""
    make_plans = (
        convert_weights.plan_tiny_vae, convert_weights.plan_vae, convert_weights.plan_controlnet,
        convert_weights.plan_textual_inversion,
    )  # fmt: skip
    for make in make_plans:
        if plan := make(source):
            return plan.kind
    if lora.is_lora(source.tensors) and not convert_weights.find_part(source.tensors, "unet"):
        return read_lora(source)
    unet, text, vae = convert_weights.find_parts(source, None)
    config, _, _ = convert_weights.make_config(unet, text, vae, source, None)
    convert_weights.check_config(config)
    inpainting = ", for inpainting" if config["unet"].get("channels") == 9 else ""
    return f"a model, {config['name']}{inpainting}"


def read_lora(source):
    layers, _ = lora.group(source.tensors)
    known = len(layers.keys() & lora_layers())
    require(
        2 * known >= len(layers) > 0, "it is a LoRA for another model, or of no kind known here"
    )
    return f"a LoRA for {known} layers"


@functools.cache
def lora_layers():
    return frozenset(convert_weights.name_lora_layers())
