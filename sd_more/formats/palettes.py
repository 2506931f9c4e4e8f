"""Palettes: weights as small numbers, each the place of a float in a table of 4, 16, 64 or 256.

    indices, table = palettise(weights, bits)      weights ~ table[indices]
    packed = pack(indices, bits)                   bits / 8 of a byte for each weight

The table is the best that there is: of all tables of that length it has the least sum of squared
errors. To find it is k-means in one dimension, where each float of the table answers for an
interval of numbers. So it is enough to know where the intervals end; and float16 has only 65,536
numbers, of which a histogram tells how often each occurs, however many weights there are.
"""

import math

import numpy as np

BITS = (2, 4, 6, 8)
FEWEST = 4096  # weights; of fewer, a table and the indices save nothing to speak of
PART = 1 << 20  # weights that are gone over at a time
PLACES = 2048  # to each side of all ends of intervals that are tried at a time, 32 at most of each


def may_have(name, shape):
    """Whether a tensor of that name and shape (channels last) becomes a palette: the matrices of
    linear layers and convolutions. Not embeddings, which are read a row at a time, nor the VAE,
    whose errors would be seen as they are; nor what would not be a multiple of 8 bytes.
    """
    network, _, rest = name.partition(".")
    size = np.prod(shape, dtype=np.int64)
    good = network in ("text_encoder", "unet", "controlnet") and rest.endswith(".weight")
    good = good and "embedding" not in rest and len(shape) > 1
    return bool(good and shape[-1] % 8 == 0 == size % 32 and size >= FEWEST)


# %% The best table --------------------------------------------------------------------------------


def palettise(weights, bits):
    """-> indices (as weights), uint8; table (2^bits,), float32, ascending. weights: float16"""
    codes, numbers, counts = histogram(weights)
    table = best_table(numbers, counts, 1 << bits)
    nearest = np.zeros(1 << 16, np.uint8)
    nearest[codes] = places(table, numbers)
    flat = weights.reshape(-1).view(np.uint16)
    indices = np.empty(flat.shape, np.uint8)
    for part in range(0, flat.size, PART):
        nearest.take(flat[part : part + PART], out=indices[part : part + PART])
    return indices.reshape(weights.shape), table.astype(np.float32)


def places(table, numbers):
    """-> for each number where in the table the nearest is"""
    return np.searchsorted((table[1:] + table[:-1]) / 2, numbers)


def squared_errors(weights):
    """-> {bits: the mean squared error with a table of that many bits}. With 8 it is taken for a
    sixteenth of that with 6, which it is where intervals are short.
    """
    _, numbers, counts = histogram(weights)
    errors = {}
    for bits in BITS[:-1]:
        table = best_table(numbers, counts, 1 << bits)
        squares = (numbers - table[places(table, numbers)]) ** 2
        errors[bits] = float(np.average(squares, weights=counts))
    return errors | {8: errors[6] / 16}


def histogram(weights):
    """-> which float16 occur, as 16 bits; the same as numbers, ascending; how often they do"""
    flat = weights.reshape(-1).view(np.uint16)
    parts = (flat[start : start + PART] for start in range(0, flat.size, PART))
    counts = sum(np.bincount(part, minlength=1 << 16) for part in parts)
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    codes = np.flatnonzero(counts)
    codes = codes[np.argsort(numbers[codes], kind="stable")]
    return codes, numbers[codes], counts[codes]


def best_table(x, counts, k):
    """-> the k numbers for which the sum over all x of counts * (x - the nearest)^2 is least.

    x: ascending, without doubles. First an estimate: where many numbers lie intervals are best
    short, by the cube root of the density (Panter and Dite 1951). Then all ends are moved at once,
    each to one of many places around it, which dynamic programming chooses best. These are
    halves of intervals at first: so one interval fewer here and one more there are found, too. Then
    they come nearer. At last Lloyd's rule, as long as it moves anything: an interval ends halfway
    between two numbers of the table, and a number of the table is its interval's mean.
    """
    if len(x) <= k:
        return np.concatenate([x, np.full(k - len(x), x[-1])])
    sums = sum_up(x, counts)
    reached = np.cumsum(np.cbrt(counts * np.gradient(x) ** 2))
    ends = np.searchsorted(reached, reached[-1] * np.arange(k + 1) / k)
    ends[0], ends[-1] = 0, len(x)
    steps = 0.5 / 4.0 ** np.arange(math.log(len(x) / k, 4) + 2.5)
    better = True
    while better:
        better = False
        for step in steps:
            while total(moved := move(ends, step, sums), sums) < total(ends, sums) * (1 - 1e-7):
                ends, better = moved, True
    return settle(x, ends, sums)


def total(ends, sums):
    return cost(*sums, ends[:-1], ends[1:]).sum()


def sum_up(x, counts):
    """-> how many, their sum and their squares' sum, of the first 0, 1, 2 ... numbers"""
    start = np.zeros(1)
    powers = counts, counts * x, counts * x * x
    return [np.concatenate([start, np.cumsum(power, dtype=np.float64)]) for power in powers]


def cost(n, first, second, start, end):
    """The squared error of what lies from start to end, if all of it becomes its mean."""
    count = n[end] - n[start]
    error = second[end] - second[start] - (first[end] - first[start]) ** 2 / np.maximum(count, 1)
    return np.where(end < start, np.inf, np.maximum(error, 0))


def move(ends, step, sums):
    """-> the best ends among those that lie a whole number of steps from these. A step is a part of
    the interval that it falls into.
    """
    k = len(ends) - 1
    near = min(32, PLACES // k)
    places = np.arange(k + 1)[:, None] + step * np.arange(-near, near + 1)
    places = np.interp(places, np.arange(k + 1), ends).round().astype(np.int64)  # (k + 1, m)
    places[0], places[-1] = 0, ends[-1]
    costs = cost(*sums, places[:-1, :, None], places[1:, None, :])  # (k, m, m)
    best, came = costs[0, 0], np.zeros((k, places.shape[1]), np.int64)
    for i in range(1, k):
        total = best[:, None] + costs[i]
        came[i] = total.argmin(0)
        best = total.min(0)
    chosen, j = [], 0
    for i in range(k, 0, -1):
        chosen.append(places[i, j])
        j = came[i - 1, j]
    return np.array([0, *reversed(chosen)])


def settle(x, ends, sums):
    """Lloyd's rule, until nothing moves. -> the table"""
    (n, first, _), k = sums, len(ends) - 1
    while True:
        ends = ends[np.diff(ends, prepend=-1) > 0]  # an interval of nothing has no mean
        table = np.diff(first[ends]) / np.diff(n[ends])
        new = np.searchsorted(x, (table[1:] + table[:-1]) / 2)
        if np.array_equal(new, ends[1:-1]):
            return np.concatenate([table, np.full(k - len(table), table[-1])])
        ends = np.concatenate([[0], new, [len(x)]])


# %% Packed ----------------------------------------------------------------------------------------
# n weights become n bits / 8 bytes. With 2 and 4 bits the first weight of a byte has the lowest.
# With 6 bits, all n weights of an output are n / 2 pairs of 12 bits, in quarters. Words of 16 bits
# hold the first three in their lower parts, and the fourth's parts in what is left of each three.
# So whoever looks them up takes long runs of words, and a quarter's pairs are neighbours.


def pack(indices, bits):
    """(o, ..., c) -> (o, ..., c bits / 8), uint8"""
    if bits == 8:
        return indices
    if bits != 6:
        each = indices.reshape(*indices.shape[:-1], -1, 8 // bits)
        return (each << np.arange(0, 8, bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    pairs = indices.reshape(len(indices), 4, -1, 2).astype("<u2")
    pairs = pairs[..., 0] | pairs[..., 1] << 6  # (o, 4, n / 8)
    last = pairs[:, 3:] >> np.array([[0], [4], [8]], "<u2") & 15
    words = np.ascontiguousarray(pairs[:, :3] | last << 12)
    return words.view(np.uint8).reshape(*indices.shape[:-1], -1)
