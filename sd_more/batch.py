"""Many pictures: prompts from a file, and processes that paint a part of the pictures each."""

import copy
import itertools
import re
import shlex
import sys
from pathlib import Path

import mlx.core as mx

from sd import SDError

MOST_BYTES, MOST_LINES = 1 << 24, 10_000  # of a file of prompts
MOST_LETTERS = 50_000  # of a line
OPTION = re.compile(r"(?:^|\s)(?=--[a-z]|-[pnsoWH]\s)")  # where a line's options begin
OWN = {  # what a line may say for itself; the rest is the model's, or would have to be loaded anew
    "prompt", "negative_prompt", "seed", "steps", "cfg", "sampler", "spacing", "rescale",
    "width", "height", "n_images", "rng", "output", "upscale", "upscale_strength", "save_every",
}  # fmt: skip


def read_lines(path):
    """-> (number, text) of each line of a text, or of standard input (-), without empty ones and
    comments.
    """
    if path == "-":
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
    else:
        if not Path(path).is_file():
            raise SDError(f"--prompts: there is no file {path}. Is the name right?")
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise SDError(f"--prompts {path}: it has more than {MOST_BYTES:,} bytes, too many.")
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SDError(f"--prompts {path}: it is not a text in UTF-8 ({error}).") from None
    lines = [(i, line.strip()) for i, line in enumerate(lines, 1)]
    lines = [(i, line) for i, line in lines if line and not line.startswith("#")]
    if len(lines) > MOST_LINES or max((len(line) for _, line in lines), default=0) > MOST_LETTERS:
        most = f"{MOST_LINES:,} lines of {MOST_LETTERS:,} characters"
        raise SDError(
            f"--prompts {path}: it has too many prompts, or too long ones; {most} will do."
        )
    if not lines:
        raise SDError(f"--prompts {path}: it is empty. Write one prompt on each line.")
    return lines


def read_prompts(args, parse_line):
    """-> the options of each line of args.prompts: args, but for the prompt and what the line says
    itself, such as "a red house --seed 3 -n night". parse_line(words, args) -> options, given.
    """
    found = []
    for number, line in read_lines(args.prompts):
        prompt, rest = line, ""
        if match := OPTION.search(line):
            prompt, rest = line[: match.start()].strip(), line[match.start() :].strip()
        own = copy.copy(args)
        try:
            own, given = parse_line(shlex.split(rest), args) if rest else (own, {})
            if odd := sorted(set(given) - OWN):
                name = "--" + odd[0].replace("_", "-")
                raise SDError(f"{name} is for all lines: give it before the file.")
        except (SDError, ValueError) as error:
            raise SDError(f"--prompts {args.prompts}, line {number}: {error}") from None
        own.prompt = own.prompt if rest and "prompt" in given and not prompt else prompt
        found.append(own)
    return found


def count_processes():
    """How many there are: with mlx.launch -n 2 python sd.py ... 2, else 1."""
    return mx.distributed.init().size()


def share_of_this_process(lines):
    """Yield (options, first seed, how many, number of the first among all): the pictures that are
    painted together. Each seed of a line begins such a group of n_images; of several processes
    each has a part of all pictures.
    """
    group = mx.distributed.init()
    everything = [
        (i, line, seed, k)
        for i, line in enumerate(lines)
        for seed in line.seed
        for k in range(line.n_images)
    ]
    everything = list(enumerate(everything, 1))
    start, end = (len(everything) * (group.rank() + k) // group.size() for k in (0, 1))
    together = lambda item: (item[1][0], item[1][2], item[0] - item[1][3])
    for _, pictures in itertools.groupby(everything[start:end], key=together):
        pictures = list(pictures)
        number, (_, line, seed, k) = pictures[0]
        yield line, seed + k, len(pictures), number
