"""Fetch from the Hugging Face hub: the files of a model, of one network, or one file.

    org/name                        a diffusers folder, of a model or of one network; or the only
                                    file that is a LoRA, an embedding, a checkpoint
    org/name/FILE, org/name/FOLDER  one file or one network's folder of a repository
    ...@revision                    as it is in a branch, at a tag or at a commit

The caller says which folders a model has, and what weights are called in them. It takes the package
huggingface_hub, which nothing else here does: without it there is a message that says how to get
the files by hand. Where the hub is not reached, what its cache holds is used.
"""

import glob
import os
import posixpath
import re
from pathlib import Path

from . import taesd

SECONDS = 30  # without an answer, and the hub is not reached
ENDINGS = (".safetensors", ".ckpt", ".pt", ".bin", ".pth", ".gguf")  # of files with weights
PLACE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([^@]+))?(?:@(\w[\w./-]*))?", re.ASCII)
CACHED = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/[^/]+((?:/[^/]+)*)")
ALONE = (  # what the files of repositories with one LoRA or one embedding are called
    "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin",
    "adapter_model.bin", "learned_embeds.safetensors", "learned_embeds.bin",
)  # fmt: skip


class HubError(Exception):
    """The text is the whole message."""


# %% Names -----------------------------------------------------------------------------------------


def parse(text):
    """-> the repository, what of it ("": all), the revision (None: the newest). None: no such name.

    parse("org/name/a.ckpt@main")  ->  ("org/name", "a.ckpt", "main")
    """
    match = PLACE.fullmatch(text)
    if not match or not text.isprintable() or {"", ".", ".."} & set(re.split("[/@]", text)):
        return None
    name, inside, revision = match.groups()
    if not inside and name.lower().endswith(ENDINGS):  # a file in a folder that is not there
        return None
    return name, inside or "", revision


def whence(path):
    """-> "org/name" or "org/name/file" for what lies in the hub's cache; "" for all else"""
    match = CACHED.fullmatch(Path(os.path.abspath(path)).as_posix())
    return f"{match[1]}/{match[2]}{match[3]}" if match else ""


# %% Fetching --------------------------------------------------------------------------------------


def fetch(text, weights, log):
    """-> the folder or file that a name of parse's stands for, in the hub's cache.

    Of a model that is a folder with its configs and the smallest complete form of its weights.
    weights: {folder: (name of a weight file, the same in a second format)}.
    """
    name, inside, revision = parse(text)
    hub = import_hub(name, inside, weights)
    try:
        listed = hub.model_info(name, revision=revision, timeout=SECONDS).siblings or []
    except Exception as error:  # noqa: BLE001  what the network's library raises differs by version
        return use_cache(hub, text, weights, log, error)
    there = [each.rfilename for each in listed if is_inside(each.rfilename)]
    needed, place = choose(text, there, weights)
    log(f"taking {len(needed)} files of {name} from the Hugging Face hub, or from its cache")
    patterns = [glob.escape(file) for file in needed]
    try:
        folder = hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:  # noqa: BLE001  likewise
        raise HubError(explain(error, name, revision)) from None
    if lost := [file for file in needed if not Path(folder, file).is_file()]:
        raise HubError(f"{name} came from the Hugging Face hub without {lost[0]}. Try again.")
    return Path(folder, place)


def import_hub(name, inside, weights):
    try:
        import huggingface_hub
    except ImportError:
        folders = [f"{part}/*" for part in weights]
        by_hand = inside or ", ".join(["model_index.json", *folders, "scheduler/*"])
        raise HubError(
            f"{name} is no file here. To fetch it from the Hugging Face hub: pip install "
            f"huggingface_hub; or download by hand from https://huggingface.co/{name} what is "
            f"needed, and give the file or its folder: {by_hand}"
        ) from None
    return huggingface_hub


def is_inside(file):
    """Is a name that the hub says one in the repository's folder?"""
    return not file.startswith("/") and ".." not in file.split("/")


def explain(error, name, revision):
    """-> a sentence about what the hub's package raised, by names that all its versions have"""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    page, start = f"https://huggingface.co/{name}", f"{name} was not fetched from the Hugging Face"
    login = "log in here with the command: hf auth login"
    if "GatedRepoError" in kinds or status == 403:
        return f"{start} hub: it is gated. Accept the conditions on its page {page}, then {login}"
    if "RepositoryNotFoundError" in kinds or status == 401:
        return (
            f"{start} hub: there is none of that name, or it is private. Look at {page}; if it is "
            f"there, accept its conditions, if it has any, and {login}"
        )
    if "RevisionNotFoundError" in kinds:
        return f"{start} hub: it has no revision {revision}. Those that it has: {page}/tree/main"
    why = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
    return f"{start} hub: {why}"


def use_cache(hub, text, weights, log, error):
    """What was fetched before, where the hub did not answer."""
    name, _, revision = parse(text)
    status = getattr(getattr(error, "response", None), "status_code", None)
    folder = None if status and status < 500 else find_cached(hub, name, revision)
    if folder is None:
        raise HubError(explain(error, name, revision))
    log(f"the Hugging Face hub is not reached: using what its cache here has of {name}")
    there = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    return folder / choose(text, there, weights)[1]


def find_cached(hub, name, revision):
    """-> the folder of a revision in the cache, which is documented; None if there is none"""
    home = Path(hub.constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    branch = home / "refs" / (revision or "main")
    commit = branch.read_text().strip() if branch.is_file() else revision
    folder = home / "snapshots" / (commit or "")
    return folder if commit and is_inside(commit) and folder.is_dir() else None


# %% Which files? ----------------------------------------------------------------------------------


def choose(text, there, weights):
    """-> the files that are needed of those that are there, and what is meant: one of them, or a
    folder"""
    (name, inside, _), there = parse(text), sorted(there)
    if inside in there:
        if not inside.lower().endswith(ENDINGS):
            ends = ", ".join(ENDINGS)
            raise HubError(f"{inside} of {name} holds no weights: such files end in {ends}.")
        return with_neighbours(inside, there), inside
    if not inside and {"model_index.json", "unet/config.json"} & set(there):
        return choose_model(there, weights), ""
    config, network = posixpath.join(inside, "config.json"), weights["vae"]
    if config in there and (found := choose_weights(there, inside, network)):
        return [config, *found], inside
    file = choose_file(text, there)
    return with_neighbours(file, there), file


def choose_model(there, weights):
    few = ["model_index.json"]
    few += [f"tokenizer/{name}" for name in ("merges.txt", "added_tokens.json", "tokenizer.json")]
    few += ["tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json"]
    needed = [file for file in there if file in few]
    needed += [f for f in there if re.fullmatch(r"\w+/(scheduler_)?config\.json", f)]
    for part, names in weights.items():
        needed += choose_weights(there, part, names)
    return needed


def choose_weights(there, part, names):
    """One network's files: half precision before full, the first format before the second."""
    start = re.escape(posixpath.join(part, ""))
    for name in names:
        stem, _, end = name.rpartition(".")
        for variant in (".fp16", ""):
            pattern = rf"{start}{stem}{variant}(-\d+-of-\d+)?\.{end}(\.index(\.fp16)?\.json)?"
            pattern += rf"|{start}{stem}\.{end}\.index{variant}\.json"
            if found := [f for f in there if re.fullmatch(pattern, f)]:
                return found
    return []


def choose_file(text, there):
    """-> the file that a repository or a folder of it was made for; HubError if that is not one"""
    name, inside, revision = parse(text)
    folder = posixpath.join(inside, "")
    files = [f for f in there if f.lower().endswith(ENDINGS)]
    within = [f for f in files if f.startswith(folder)]
    known = [folder + alone for alone in ALONE if folder + alone in within]
    at_top = [f for f in within if "/" not in f.removeprefix(folder)] or within
    safe = [f for f in at_top if f.lower().endswith(".safetensors")]
    whole = [f for f in at_top if not f.lower().endswith(".gguf")]  # else it is mostly quantised
    for found in (known[:1], safe, [] if safe else whole or at_top):
        if len(found) == 1:
            return found[0]
    if not files:
        raise HubError(f"{name} on the Hugging Face hub holds no weights that are read here.")
    after = f"@{revision}" if revision else ""
    listed = ", ".join(file[:60] for file in (within or files)[:6])
    more = f" and {len(within or files) - 6} more" if len(within or files) > 6 else ""
    what = "several files and is no diffusers folder" if within else f"no {inside[:60]}"
    example = f"{name}/{(within or files)[0][:60]}{after}"
    raise HubError(f"{name} has {what}. Name one, such as {example}. It has {listed}{more}")


def with_neighbours(file, there):
    """The file, and what formats/neighbours.py finds beside it."""
    folder, name = posixpath.split(file)
    names = [posixpath.splitext(name)[0] + ".yaml", "config.json", "adapter_config.json"]
    names += filter(None, [taesd.other_half(name)])
    beside = [posixpath.join(folder, each) for each in names]
    return [file, *(each for each in beside if each in there)]
