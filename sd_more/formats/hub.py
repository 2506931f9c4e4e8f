"""Fetch a diffusers repository from the Hugging Face hub: only the files that are needed.

The caller says which folders are needed, and what weights are called in them. It takes the package
huggingface_hub, which nothing else here does: without it there is a message that says how to get
the files by hand.
"""

import re
from pathlib import Path

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a repository: org/name


class HubError(Exception):
    """The text is the whole message."""


def fetch(name, weights, log):
    """-> a folder with the repository's configs and the smallest complete form of its weights.

    weights: {folder: (name of a weight file, the same in a second format)}.
    """
    try:
        import huggingface_hub
    except ImportError:
        by_hand = ", ".join(["model_index.json", *(f"{part}/*" for part in weights), "scheduler/*"])
        raise HubError(
            f"{name} is no file here. To fetch it from the Hugging Face hub: pip install "
            f"huggingface_hub; or download by hand from https://huggingface.co/{name} these, and "
            f"give their folder: {by_hand}"
        ) from None
    try:
        there = huggingface_hub.list_repo_files(name)
        wanted = [f for f in there if f in ("model_index.json", "tokenizer/merges.txt")]
        wanted += [f for f in there if re.fullmatch(r"\w+/(scheduler_)?config\.json", f)]
        for part, names in weights.items():
            wanted += choose_weights(there, part, names)
        log(f"fetching {len(wanted)} files of {name} from the Hugging Face hub")
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # noqa: BLE001  what the network's library raises differs by version
        why = str(error).strip().split("\n")[0][:200]
        raise HubError(f"{name} was not fetched from the Hugging Face hub: {why}") from None


def choose_weights(there, part, names):
    """One network's files: half precision before full, the first format before the second."""
    for name in names:
        stem, _, end = name.rpartition(".")
        for variant in (".fp16", ""):
            pattern = rf"{part}/{stem}{variant}(-\d+-of-\d+)?\.{end}(\.index(\.fp16)?\.json)?"
            pattern += rf"|{part}/{stem}\.{end}\.index{variant}\.json"
            if found := [f for f in there if re.fullmatch(pattern, f)]:
                return found
    return []
