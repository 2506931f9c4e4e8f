"""Textual inversions: how other programs name the vectors of new words.

diffusers names a tensor by its word, <cat-toy>, or several by several. AUTOMATIC1111's program has
string_to_param with a placeholder, "*", emb_params is a third's, and clip_l (with clip_g beside it
in SDXL's) those of programs for several models; there the file's name is the word.
"""

import re

KEYED = re.compile(r"(string_to_param|emb_params)(\.|$)|clip_l$")
PLAIN = re.compile(r"(?!(weight|bias)$)<?[\w -]+>?")


def find_words(names, stem):
    """-> the word of each name: its own, or where that is no word the file's, then file-2, ..."""
    words, count = [], 0
    for name in names:
        own = name.removeprefix("string_to_param.")
        if len(names) > 1 and re.search(r"\w", own) and not KEYED.match(own):
            words.append(own)
        elif KEYED.match(name):
            count += 1
            words.append(stem if count == 1 else f"{stem}-{count}")
        else:
            words.append(own)
    return words
