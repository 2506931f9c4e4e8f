r"""Prompts as AUTOMATIC1111's program reads them, for which many are written.

    StableDiffusion(reader=read_weighted)

    (word) ((word)) (word:1.3)   more of it: 1.1 times, 1.21 times, 1.3 times
    [word]                       less: 1 / 1.1
    \( \) \[ \]                  the brackets themselves
    BREAK                        begin the next 75 tokens here
    more than 75 tokens          are read 75 at a time, and the contexts put one behind the other

A weight multiplies the vectors that CLIP gives for these tokens. Then the whole context is
multiplied by one factor that gives it back the mean that it had before. With that the other tokens
change a little, too, with the miniature and "a (red:1.5) house" by 3 percent. There is no good
reason for it, for the mean is nearly 0 and means nothing, but so it is done there, and prompts were
tried out with it.

Where 75 tokens are full in the middle of a phrase, the words behind the last comma, if it is one of
the last 20, move into the next 75, as there by default. A loaded word (textual inversion) is found
whatever its case, as there, and also as embedding:word, which is how ComfyUI writes it.

Two things are otherwise there. That the shorter one of prompt and negative prompt is filled up with
chunks without words is an option there; here it is always so. And what has a meaning only there, or
for its extensions, is read as text, and said: [a:b:0.5] and [a|b], which change the prompt on the
way, AND between two prompts, {a|b} and __a__ for chance; and the marks of other programs, such as
a++, (a)1.3, {a}, a::2, --ar 16:9 and an embedding: that is not loaded. <lora:name:0.8> is no part
of a prompt: without_loras() leaves it out.
"""

import re
import sys

import mlx.core as mx

import sd

PROMPT_MARKS = re.compile(
    r"""
      \\ [()\[\]\\]                                      # a bracket or backslash that is meant
    | [()\[\]]                                          # a bracket that weighs
    | : \s* [+-]? (?: \d+ (?: \.\d* )? | \.\d+ ) \s* \) # :1.3)
    | [^\\()\[\]:]+                                     # text
    | [\\:]                                             # a character that means nothing here
    """,
    re.VERBOSE,
)
LORA = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")
STRANGE = re.compile(
    r"""
      (?<! \\) \[ [^\[\]]* \]             # [a|b]  [a:b:0.5], or only [a], see changes()
    | [^\[\]]{0,100} : \s* \d* \.? \d+ \s* \] # the end of [[a] b:c:0.5]
    | \{ [^{}]+ \}                         # {a|b}, or {a}, which is more in NovelAI
    | \b embedding : [\w.-]+              # a word that is not loaded
    | [\w)] (?: \+\+ | -- ) (?! [\w-] )    # a++, compel's
    | \) \d+ (?: \.\d+ )?                 # (a)1.3, likewise
    | :: \s* -? [\d.]+                    # a::2
    | (?<! \S) --? [a-z]+ \s+ [\d.:]+     # --ar 16:9
    | (?<! \w) __ \w \S{0,100}? __ (?! \w) # __a__
    | \b AND \b
    """,
    re.VERBOSE,
)
FACTORS = {"(": 1.1, "[": 1 / 1.1}
DEEPEST = 100  # of brackets in brackets
MOST_CHUNKS = 100
COMMA_WITHIN = 20  # so many tokens from the end of 75, words behind it move on


def parse_weights(text):
    """-> [(piece of text, weight)], None as weight of BREAK.

    parse_weights("a (red:1.5) [small] house")
    ->  [("a ", 1.0), ("red", 1.5), (" ", 1.0), ("small", 0.909...), (" house", 1.0)]
    """
    sd.expect(len(text) <= 20_000, "the prompt", text, "at most 20,000 characters long")
    pieces = []  # [text, weight]
    opened = {"(": [], "[": []}  # for each bracket that is not closed, how many pieces came before

    def close(bracket, factor):
        for piece in pieces[opened[bracket].pop() :]:
            if piece[1] is not None:
                piece[1] *= factor

    for token in PROMPT_MARKS.findall(text):
        if token in opened:
            opened[token].append(len(pieces))
            depth = len(opened["("]) + len(opened["["])
            sd.expect(depth <= DEEPEST, "brackets", depth, f"at most {DEEPEST} deep")
        elif token[0] == ":" and token[-1] == ")" and opened["("]:
            weight = float(token[1:-1])
            sd.expect(abs(weight) <= 1000, "a weight in the prompt", weight, "at most 1,000")
            close("(", weight)
        elif token == ")" and opened["("]:
            close("(", FACTORS["("])
        elif token == "]" and opened["["]:
            close("[", FACTORS["["])
        elif token[0] == "\\" and len(token) > 1:  # an escaped bracket
            pieces.append([token[1:], 1.0])
        else:
            pieces += split_breaks(token)
    for bracket, factor in FACTORS.items():  # those that are never closed
        while opened[bracket]:
            close(bracket, factor)
    return join_equal(pieces)


def split_breaks(text):
    """ "a BREAK b" -> [["a", 1.0], ["BREAK", None], ["b", 1.0]]"""
    first, *rest = re.split(r"\bBREAK\b", text)
    pieces = [[first.rstrip() if rest else first, 1.0]]
    for i, part in enumerate(rest, 1):
        part = part.lstrip()
        pieces += [["BREAK", None], [part.rstrip() if i < len(rest) else part, 1.0]]
    return [piece for piece in pieces if piece[0]]


def join_equal(pieces):
    """Neighbours of the same weight become one piece."""
    joined = []
    for text, weight in pieces:
        if joined and weight is not None and joined[-1][1] == weight:
            joined[-1] = joined[-1][0] + text, weight
        else:
            joined.append((text, weight))
    return joined


def find_strange(text):
    """-> what a prompt says to other programs, and is read as text here.

    find_strange("a {red|blue} [cat:dog:0.5] AND [grey] sky")
    ->  ["{red|blue}", "[cat:dog:0.5]", "AND"]
    """
    found = dict.fromkeys(match[0] for match in [*STRANGE.finditer(text), *LORA.finditer(text)])
    return [mark for mark in found if not mark.startswith("[") or changes(mark)]


def changes(mark):
    """Is it [a|b] or [a:b:0.5], and not [a], which is a text with less weight?"""
    _, colon, end = mark[:-1].rpartition(":")
    return "|" in mark or bool(colon and re.fullmatch(r"\s*\d*\.?\d+\s*", end))


def name_strange(text):
    for mark in find_strange(text)[:20]:
        sd.say_once(f'"{mark[:60]}" in the prompt is read as text here.')


def without_loras(text):
    """-> the prompt without <lora:name:0.8> and the like, and the tags: [(kind, [name, "0.8"])]."""
    tags = [(match[1], match[2].split(":")) for match in LORA.finditer(text)]
    return LORA.sub("", text), tags


def spell_words(tokenizer, text):
    """Loaded words as the tokenizer knows them: "Embedding:CAT-TOY" -> "cat-toy"."""
    if not tokenizer.words:
        return text
    spelled = {word.lower(): word for word in tokenizer.words} | {w: w for w in tokenizer.words}
    longest = sorted(tokenizer.words, key=len, reverse=True)
    any_word = "|".join(map(re.escape, longest))
    pattern = rf"(?<!\w)(?:embedding:({any_word})(?:\.(?:pt|bin|safetensors))?|({any_word}))(?!\w)"

    def spell(match):
        word = match[1] or match[2]
        return spelled.get(word, spelled.get(word.lower(), match[0]))

    return re.sub(pattern, spell, text, flags=re.IGNORECASE)


def name_unused(model, texts):
    """Say which loaded words stand in none of the prompts."""
    unused = dict.fromkeys(model.tokenizer.words)
    for text in texts if unused else ():
        if model.reader is read_weighted:
            words = read_words(model.tokenizer, text)
        else:
            words = model.tokenizer.split(text)
        for word, *_ in words:
            unused.pop(word, None)
    for word in unused:
        sd.say_once(f'the embedding "{word}" is loaded, but no prompt has this word.')


def read_words(tokenizer, text):
    """Yield (word, its pieces, their ids, weight); weight None and no ids for BREAK."""
    for piece, weight in parse_weights(spell_words(tokenizer, text)):
        if weight is None:
            yield "BREAK", (), [], None
        else:
            for word in tokenizer.split(piece):
                yield *word, weight


def split_chunks(tokenizer, text):
    """-> [[(id, weight)]] with at most 75 in each, at least one."""
    chunks, comma, after = [[]], tokenizer.ids[",</w>"], 0  # after: where the last comma ends
    for word, _, ids, weight in read_words(tokenizer, text):
        if weight is None:
            chunks.append([])
            after = 0
        # A word may be cut between two pieces, but not a loaded one between its vectors.
        loaded = word in tokenizer.words and len(ids) <= 75
        for together in [ids] if loaded else [[i] for i in ids]:
            full = len(chunks[-1]) == 75 and together != [comma]
            if full and after > 75 - COMMA_WITHIN:
                chunks[-1:] = [chunks[-1][:after], chunks[-1][after:]]
                after = 0
            if len(chunks[-1]) + len(together) > 75:
                chunks.append([])
                after = 0
            chunks[-1] += [(i, weight) for i in together]
            if together == [comma]:
                after = len(chunks[-1])
    return chunks


def read_weighted(model, sentences):
    """-> (number of sentences, 77 k, width), k for the longest; the others get empty chunks."""
    each = [split_chunks(model.tokenizer, sentence) for sentence in sentences]
    for sentence in sentences:
        name_strange(spell_words(model.tokenizer, sentence))
    k = max(map(len, each))
    sd.expect(
        k <= MOST_CHUNKS, "the prompt", f"{k} times as many", f"75 tokens {MOST_CHUNKS} times"
    )
    chunks = [chunk for found in each for chunk in found + [[]] * (k - len(found))]
    ids, weights = [], []
    for chunk in chunks:
        fill_up = 75 - len(chunk)
        ids.append([sd.START, *(i for i, _ in chunk), sd.END, *[model.tokenizer.pad] * fill_up])
        weights.append([1.0, *(weight for _, weight in chunk), 1.0, *[1.0] * fill_up])
    with model.network("text_encoder") as text_encoder:
        context = text_encoder(mx.array(ids))
    weights = mx.array(weights)[:, :, None].astype(context.dtype)
    if (weights != 1).any():
        mean = context.mean((1, 2), keepdims=True)
        context = context * weights
        context = context * (mean / context.mean((1, 2), keepdims=True))
    return context.reshape(len(sentences), 77 * k, -1)


def show_tokens(model, text):
    """Print how a StableDiffusion reads a prompt, word by word."""
    if model.reader is read_weighted:
        words = read_words(model.tokenizer, text)
        counts = [len(chunk) for chunk in split_chunks(model.tokenizer, text)]
    else:
        words = [(*word, 1.0) for word in model.tokenizer.split(text)]
        counts = [sum(len(ids) for _, _, ids, _ in words)]
    for word, pieces, ids, weight in words:
        times = "" if weight in (None, 1.0) else f"  x {weight:.3g}"
        line = f"{word:20s} {' '.join(pieces):30s} {' '.join(map(str, ids))}{times}"
        sd.say(line.rstrip(), sys.stdout)
    sd.say(f"{' + '.join(map(str, counts))} of 75 tokens", sys.stdout)
