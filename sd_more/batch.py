"""Many pictures: prompts from a file, and processes that paint a part of the pictures each."""

import itertools

import mlx.core as mx

from sd import SDError

MOST_BYTES = 1 << 24  # of a file of prompts


def read_prompts(path):
    """-> the lines of a text, without empty ones."""
    if not path.is_file():
        raise SDError(f"--prompts: there is no file {path}. Is the name right?")
    if path.stat().st_size > MOST_BYTES:
        raise SDError(f"--prompts {path}: it has more than {MOST_BYTES:,} bytes, too many.")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SDError(f"--prompts {path}: it is not a text in UTF-8 ({error}).") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SDError(f"--prompts {path}: it is empty. Write one prompt on each line.")
    return prompts


def count_processes():
    """How many there are: with mlx.launch -n 2 python sd.py ... 2, else 1."""
    return mx.distributed.init().size()


def share_of_this_process(prompts, n_images):
    """Yield (prompt, number of its first picture, how many, number of that among all): all of the
    pictures, or of several processes each a part.
    """
    group = mx.distributed.init()
    everything = list(itertools.product(range(len(prompts)), range(n_images)))
    start, end = (len(everything) * (group.rank() + k) // group.size() for k in (0, 1))
    mine = enumerate(everything[start:end], start)
    for k, pictures in itertools.groupby(mine, key=lambda picture: picture[1][0]):
        pictures = list(pictures)
        number, (_, first) = pictures[0]
        yield prompts[k], first, len(pictures), number
