"""What the layers of cpu.py compute, on NumPy arrays of float32. Channels come last.

One plan for all: the work is cut into blocks whose numbers fit a core's cache, and each core takes
the next block when it has finished one, doing everything to it that there is to do: a product, its
bias, its gelu. OpenBLAS must not start threads of its own inside; parallel_for sees to that.

Weights may have 16 bits, which takes half the memory: each block widens those it needs, and that
costs little beside the product. Memory to compute in comes from np.empty, which is nearly free
once parallel.keep_memory has been called.
"""

import functools
import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from . import parallel
from .parallel import parallel_for, slices

BLOCK = 1 << 18  # numbers in a block, where an array is gone over once: 1 MB
BAND = 1 << 23  # numbers that a convolution lays out anew at a time: 32 MB


def empty(*shape):
    return np.empty(shape, np.float32)


# %% Matrix products -------------------------------------------------------------------------------


def widen(w):
    """Weights -> float32. w: float32, float16, or bfloat16 as the uint16 of the same bits.

    A bfloat16 is the upper half of a float32. A float16 has its exponent's 5 lower bits only: moved
    to a float32's place, the number is 2^-112 of what it should be. So it is multiplied by 2^112,
    which is exact and right for subnormal numbers too, and faster than NumPy's astype.
    """
    if w.dtype == np.float32:
        return w
    wide = empty(*w.shape)
    bits = wide.view(np.int32)
    if w.dtype == np.uint16:
        np.copyto(bits, w)
        bits <<= 16
    else:
        np.copyto(bits, w.view(np.int16))  # the sign comes along ...
        bits <<= 13
        bits &= ~0x70000000  # ... and leaves copies of itself
        wide *= np.float32(2.0**112)
    return wide


def blocks(n, o, c):
    """-> columns, rows: an (n, o) product's columns and rows in slices.

    Columns are narrower where there are few rows, so that each core gets some, and so that a
    block's weights, c for each column, take at most 4 MB.
    """
    rows = slices(n, 512)
    pieces = -(-2 * parallel.cores() // len(rows))
    return slices(o, min(max(-(-o // pieces), 64), 640, max(64, 2**20 // c))), rows


def linear(x, weight, bias=None):  # (..., c), (o, c), (o,) -> (..., o)
    flat, out = x.reshape(-1, x.shape[-1]), empty(x.size // x.shape[-1], len(weight))

    def block(columns, rows):
        y = np.matmul(flat[rows], widen(weight[columns]).T, out=out[rows, columns])
        if bias is not None:
            y += bias[columns]

    parallel_for(block, *blocks(*out.shape, flat.shape[1]), work=len(flat) * weight.size)
    return out.reshape(*x.shape[:-1], -1)


def geglu(x, weight, bias):  # (..., c), (2 o, c), (2 o,) -> (..., o)
    flat, o = x.reshape(-1, x.shape[-1]), len(weight) // 2
    weight, bias, out = weight.reshape(2, o, -1), bias.reshape(2, o), empty(len(flat), o)

    def block(columns, rows):
        both = []
        for i in range(2):
            both.append(flat[rows] @ widen(weight[i, columns]).T)
            both[i] += bias[i, columns]
        y, gate = both
        gelu(gate, out=gate)
        np.multiply(y, gate, out=out[rows, columns])

    parallel_for(block, *blocks(*out.shape, flat.shape[1]), work=len(flat) * weight.size)
    return out.reshape(*x.shape[:-1], -1)


# %% Activations -----------------------------------------------------------------------------------
# f(x, out) for a block x; out may be x.


def sigmoid_times(x, out, k):
    """x / (1 + exp(-k x)). Far on the left exp is infinite and the quotient 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        t = x * np.float32(-k)
        np.exp(t, out=t)
        t += 1
        np.divide(x, t, out=out)


def gelu(x, out):
    """max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with erfc as exp times a polynomial.

    Abramowitz and Stegun 7.1.26: erfc is off by at most 1.5e-7.
    """
    size = np.abs(x)
    t = size * np.float32(0.3275911 / math.sqrt(2))
    t += 1
    np.divide(1, t, out=t)
    y = t * np.float32(-1.061405429 / 2)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y += np.float32(-coefficient / 2)
        y *= t
    np.multiply(size, np.float32(-0.5), out=t)
    t *= size
    y *= np.exp(t, out=t)
    y *= size
    np.maximum(x, 0, out=t)
    np.add(y, t, out=out)


silu = functools.partial(sigmoid_times, k=1)
quick_gelu = functools.partial(sigmoid_times, k=1.702)
ACTIVATIONS = {"silu": silu, "gelu": gelu, "quick_gelu": quick_gelu}


def elementwise(f, x):
    flat, out = x.reshape(-1), empty(x.size)
    parallel_for(lambda at: f(flat[at], out[at]), slices(x.size, BLOCK), work=16 * x.size)
    return out.reshape(x.shape)


# %% Convolution -----------------------------------------------------------------------------------


def conv(x, weight, bias, stride=1, padding=1):  # (b, h, w, c), (o, k, k, c) -> (b, h', w', o)
    b, h, w, c = x.shape
    tile = 4 if b * h * w >= 1024 else 2  # of few positions 4 is no faster, and less exact
    fits = h % tile == 0 and w % tile == 0 and b * h * w >= 256 and c >= 16
    if (stride, padding, weight.shape[1]) == (1, 1, 3) and fits:
        return conv_winograd(x, weight, bias, tile)
    return conv_windows(x, weight, bias, stride, padding)


def conv_windows(x, weight, bias, stride, padding):
    """As one matrix product: each window laid out as a row, some rows of the picture at a time."""
    o, k, _, c = weight.shape
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = sliding_window_view(x, (k, k), axis=(1, 2))[:, ::stride, ::stride]
    windows = windows.transpose(0, 1, 2, 4, 5, 3)  # (b, h', w', k, k, c)
    b, h, w = windows.shape[:3]
    out = empty(b, h, w, o)
    for i in range(b):
        for rows in slices(h, max(1, BAND // (w * k * k * c))):
            laid_out = windows[i, rows].reshape(-1, w, k * k * c)
            out[i, rows] = linear(laid_out, weight.reshape(o, -1), bias)
    return out


# Winograd's F(4x4, 3x3): 36 products make 4 x 4 outputs, where the definition takes 144; and
# F(2x2, 3x3): 16 for 36. The matrices are those of Lavin and Gray, arXiv 1509.09308.
# fmt: off
WINOGRAD = {
    4: ([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
         [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
        [[1/4, 0, 0], [-1/6, -1/6, -1/6], [-1/6, 1/6, -1/6],
         [1/24, 1/12, 1/6], [1/24, -1/12, 1/6], [0, 0, 1]],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]),
    2: ([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1/2, 1/2, 1/2], [1/2, -1/2, 1/2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]]),
}
# fmt: on
# A matrix for down and across in one: kron(m, m) times what lies in a square, written as a row.
WINOGRAD = {
    tile: [np.kron(m, m).astype(np.float32) for m in three] for tile, three in WINOGRAD.items()
}


def conv_winograd(x, weight, bias, tile):  # (b, h, w, c), (o, 3, 3, c) -> (b, h, w, o)
    """For each tile of the output, with numbers in a row where they lie in a square:

        v = forth window      (side^2, c)       u = weigh filter      (side^2, c) for each of o
        m[i] = u[i] v[i]      (side^2, o)       tile = back m         (tile^2, o)

    A band of rows of tiles at a time: v of all of them, shared by rows; then the rest, by columns
    of o.
    """
    (b, h, w, c), o, square = x.shape, len(weight), (tile + 2) ** 2
    tile_rows, across = b * h // tile, w // tile
    out = empty(tile_rows, tile, across, tile, o)
    forth = WINOGRAD[tile][0]

    def transform(row):
        np.matmul(forth, windows_of_row(x, band.start + row, tile), out=v[:, row])

    def multiply(columns):
        y = filter_tiles(v.reshape(square, -1, c), weight[columns], tile)
        y = y.reshape(tile, tile, -1, across, y.shape[-1]).transpose(2, 0, 3, 1, 4)
        np.add(y, bias[columns], out=out[band, ..., columns])

    columns = slices(o, min(max(-(-o // parallel.cores()), 64), 640))
    for band in slices(tile_rows, max(1, BAND // (square * across * c))):
        v = empty(square, band.stop - band.start, across * c)
        parallel_for(transform, range(v.shape[1]), work=square * v.size)
        parallel_for(multiply, columns, work=o * v.size)
    return out.reshape(b, h, w, o)


def windows_of_row(x, row, tile):  # (b, h, w, c) -> (side^2, w / tile * c)
    """What a row of tiles sees: windows of side x side, tile apart, with zeros around x."""
    (_, h, w, c), side = x.shape, tile + 2
    i, top = divmod(row * tile, h)
    first, last = max(0, top - 1), min(h, top - 1 + side)
    padded = np.zeros((side, w + 2, c), np.float32)
    padded[first - top + 1 : last - top + 1, 1:-1] = x[i, first:last]
    windows = sliding_window_view(padded, side, axis=1)[:, ::tile]  # (side, w / tile, c, side)
    return windows.transpose(0, 3, 1, 2).reshape(side * side, -1)


def filter_tiles(v, weight, tile):  # (side^2, n, c), (o, 3, 3, c) -> (tile^2, n, o)
    _, weigh, back = WINOGRAD[tile]
    o, _, _, c = weight.shape
    u = np.matmul(weigh, widen(weight).reshape(o, 9, c))  # (o, side^2, c)
    m = np.matmul(v, u.transpose(1, 2, 0))  # (side^2, n, o)
    return np.matmul(back, m.reshape(len(m), -1)).reshape(tile * tile, -1, o)


# %% Norms -----------------------------------------------------------------------------------------


def group_norm(x, weight, bias, groups, epsilon, then=None):  # (b, h, w, c) -> same
    """then(block, out): what else to do to each block."""
    b, h, w, c = x.shape
    x, out = x.reshape(b, h * w, c), empty(b, h * w, c)
    mean, scale = group_statistics(x, groups, epsilon)
    scale *= weight

    def apply(i, rows):
        y = np.subtract(x[i, rows], mean[i], out=out[i, rows])
        y *= scale[i]
        y += bias
        if then:
            then(y, out=y)

    parallel_for(apply, range(b), slices(h * w, max(1, BLOCK // c)), work=16 * x.size)
    return out.reshape(b, h, w, c)


def group_statistics(x, groups, epsilon):  # (b, n, c) -> (b, c) twice
    """-> for each channel the mean of its group, and 1 / its standard deviation.

    The variance is the mean of squares less the square of the mean. Where the mean is far from 0
    these are large and nearly equal, so they are taken of x - pivot, the mean of some positions.
    """
    b, n, c = x.shape

    def of_groups(y):  # (b, c) -> (b, c), the group's mean in place of each channel's
        return y.reshape(b, groups, -1).mean(2).repeat(c // groups, axis=1)

    def add_up(i, number):
        y = x[i, pieces[number]] - pivot[i]
        y.sum(0, out=sums[0, number, i])
        y *= y
        y.sum(0, out=sums[1, number, i])

    pivot = of_groups(x[:, :: max(1, n // 16)].mean(1))
    pieces = slices(n, max(1, BLOCK // c))
    sums = empty(2, len(pieces), b, c)
    parallel_for(add_up, range(b), range(len(pieces)), work=16 * x.size)
    mean, square = map(of_groups, sums.sum(1, dtype=np.float64) / n)
    scale = 1 / np.sqrt(square - mean**2 + epsilon)
    return (mean + pivot).astype(np.float32), scale.astype(np.float32)


def layer_norm(x, weight, bias, epsilon):  # (..., c) -> same
    c = x.shape[-1]
    flat = x.reshape(-1, c)
    out = empty(*flat.shape)

    def norm(rows):
        y = np.subtract(flat[rows], flat[rows].mean(1, keepdims=True), out=out[rows])
        variance = np.einsum("nc,nc->n", y, y)[:, None] / np.float32(c)
        y *= 1 / np.sqrt(variance + np.float32(epsilon))
        y *= weight
        y += bias

    parallel_for(norm, slices(len(flat), max(1, BLOCK // c)), work=16 * x.size)
    return out.reshape(x.shape)


# %% Attention -------------------------------------------------------------------------------------


def attention(q, k, v, heads, causal=False):  # (b, n, c), (b, m, c), (b, m, c) -> (b, n, c)
    """A few hundred rows of scores at a time, so that they stay in the cache.

    A column of ones beside v makes the product that mixes v also sum each row of weights.
    """
    (b, n, c), m = q.shape, k.shape[1]
    if c % heads:
        raise ValueError(f"{c} channels do not divide into {heads} heads")
    d, out, ones = c // heads, empty(b, n, c), np.ones((m, 1), np.float32)

    def block(i, head, rows):
        at = slice(head * d, head * d + d)
        scores = (q[i, rows, at] * np.float32(d**-0.5)) @ k[i, :, at].T
        if causal:
            scores[np.arange(rows.start, rows.stop)[:, None] < np.arange(m)] = -np.inf
        mixed = exp_of_rows(scores) @ np.concatenate([v[i, :, at], ones], axis=1)
        np.divide(mixed[:, :-1], mixed[:, -1:], out=out[i, rows, at])

    parallel_for(block, range(b), range(heads), slices(n, 256), work=2 * b * n * m * c)
    return out


def exp_of_rows(scores):
    """exp(scores), in place, each row up to a factor: the softmax does not change when a number is
    taken from a whole row. That is needed only where exp would leave float32's range, 1e-38 to
    1e38; a row's largest counts.
    """
    top = scores.max(-1, keepdims=True)
    if top.max() > 60 or top.min() < -60:
        scores -= top
    return np.exp(scores, out=scores)
