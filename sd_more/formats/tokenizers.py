"""What the files in a diffusers folder's tokenizer/ say.

CLIP's merges, which must be those. Which words were added and with what ids, in three files of
three generations; and which token fills what a prompt leaves empty of the 77 places.
"""

from .tensors import require

FILES = ("added_tokens.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LAST = 49407  # CLIP's own tokens end there, with the one that ends a text
PADS = {"!": 0, "<|startoftext|>": 49406, "<|endoftext|>": LAST}  # CLIP's, as a pad_token


def find_words(files, rows):
    """{name: JSON} -> {word: [its id]}. CLIP's own, and what the table has no row for, are not
    among them."""
    found = dict(files.get("added_tokens.json", {}))
    added = files.get("tokenizer.json", {}).get("added_tokens")
    for entry in added if type(added) is list else []:
        if type(entry) is dict:
            found[content(entry)] = entry.get("id")
    decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for key, entry in decoder.items() if type(decoder) is dict else []:
        found[content(entry)] = int(key) if key.isdecimal() and len(key) < 9 else None
    known = lambda word, i: (
        type(word) is str and word.strip() and type(i) is int and LAST < i < rows
    )
    return {word: [i] for word, i in found.items() if known(word, i)}


def content(entry):
    """A token is its text, or a dict that has it."""
    text = entry.get("content") if type(entry) is dict else entry
    return text if type(text) is str else ""


def find_pad(files):
    """-> the pad_token, who says so; None where nobody does."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if text := content(files.get(name, {}).get("pad_token")):
            return text, f"tokenizer/{name} says so"
    return None


def find_merges(files):
    """-> CLIP's merges as tokenizer.json has them, "a b" or [a, b] each; None"""
    model = files.get("tokenizer.json", {}).get("model")
    merges = model.get("merges") if type(model) is dict else None
    if type(merges) is not list or not merges:
        return None
    return "\n".join(" ".join(map(str, m)) if type(m) is list else str(m) for m in merges)


def read_merges(text):
    """CLIP's 48,894 merges, "a b" per line, as bytes. Headers go, and lines CLIP never used."""
    lines = text.split("\n")
    lines = lines[1:] if lines[0].startswith("#version") else lines
    pairs = [line.split() for line in lines[:48894]]
    good = len(pairs) == 48894 and all(len(pair) == 2 for pair in pairs)
    good = good and "\ufffd" not in str(pairs)
    require(good, "it is not CLIP's, expected 48,894 lines of two pieces")
    return "".join(f"{a} {b}\n" for a, b in pairs).encode()
