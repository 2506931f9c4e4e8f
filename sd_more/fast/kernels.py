"""What the layers of cpu.py compute, on NumPy arrays of float32. Channels come last.

One plan for all: the work is cut into blocks whose numbers fit a core's cache, and each core takes
the next block when it has finished one, doing everything to it that there is to do: a product, its
bias, its gelu. OpenBLAS must not start threads of its own inside; parallel_for sees to that.

Weights may have 16 bits, which takes half the memory, or be Packed, which takes less: each block
widens those it needs, or looks them up, and that costs little beside the product. Memory to compute
in comes from np.empty, which is nearly free once parallel.keep_memory has been called. Results are
written where the caller wants them: out.
"""

import functools
import math
import time

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from . import parallel
from .parallel import parallel_for, parallel_map, slices

BLOCK = 1 << 18  # numbers in a block, where an array is gone over once: 1 MB
BAND = 1 << 23  # numbers that a convolution lays out anew at a time: 32 MB


def empty(*shape):
    return np.empty(shape, np.float32)


def flat(x):  # (..., c) -> (n, c), the same memory
    return x.reshape(-1, x.shape[-1])


def turned(x):  # (..., n, c) -> (..., c, n), laid out so
    return np.ascontiguousarray(x.swapaxes(-1, -2))


def seconds(f):
    """The best of five calls, in one thread."""
    times = []
    with parallel.ONE_BLAS_THREAD:
        for _ in range(5):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
    return min(times)


# %% Matrix products -------------------------------------------------------------------------------
# OpenBLAS copies both sides of a product, to have them in the order in which it reads them. Of the
# 118 GFLOP/s that a core of a Zen 4 can do, its kernels for AVX-512 then reach 55 to 100. But they
# know another way: in products of at most MOST multiplications they read both sides where they lie,
# if the numbers of a row do lie in a row, and reach 100 to 116. So all products here are cut into
# such little ones; a single np.matmul, of arrays with more than two axes, does thousands of them.
# Other kernels know no such way, and the same code asks them for few and large products.

MOST = 10**6
LITTLE = {"SkylakeX": True, "Haswell": False, "Zen": False}  # OpenBLAS's names of its kernels


@functools.cache
def little():
    """Whether little products are the faster ones; for kernels not named above it is tried."""
    name = parallel.kernels()
    if name in LITTLE:
        return LITTLE[name]
    x, w = np.ones((512, 320), np.float32), np.ones((320, 640), np.float32)
    rows, columns = tiles(x, 32), w[:, :64].copy()
    return 10 * seconds(lambda: np.matmul(rows, columns)) < seconds(lambda: np.matmul(x, w))


def multiply(x, w, out):  # (..., n, c), (..., c, k), (..., n, k)
    """np.matmul, as many rows of x at a time as are best."""
    (n, c), k = x.shape[-2:], w.shape[-1]
    each = max(1, MOST // (c * k)) if little() else n
    whole = n // each * each
    for rows, r in ((slice(whole), each), (slice(whole, n), n - whole)):
        if r:
            x_rows, out_rows = x[..., rows, :], out[..., rows, :]
            np.matmul(tiles(x_rows, r), w[..., None, :, :], out=tiles(out_rows, r))
    return out


def tiles(x, r):  # (..., n, c) -> (..., n / r, r, c), the same memory
    return x.reshape(*x.shape[:-2], -1, r, x.shape[-1])


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


def second_sides(weight):  # (o, c) -> (t, c, o / t), float32
    """Weights as what rows are multiplied by: for little products 64 columns each, laid out so."""
    o, c = weight.shape
    if not little():
        return widen(weight).T[None]
    t = o // 64 if o % 64 == 0 else 1
    return np.ascontiguousarray(widen(weight.reshape(t, -1, c).swapaxes(1, 2)))


def blocks(n, o):
    """-> columns, rows: an (n, o) product's columns and rows in slices, some for each core."""
    rows = slices(n, 1024 if little() else 512)
    pieces = -(-(4 if little() else 2) * parallel.cores() // len(rows))
    return slices(o, min(max(-(-o // pieces // 64) * 64, 64), 512 if little() else 640)), rows


def linear(x, weight, bias, out):  # (n, c), (o, c), (o,) or None, (n, o)
    n, c = x.shape

    def block(columns, rows):
        y = out[rows, columns]
        if n < 64:
            np.matmul(x, widen(weight[columns]).T, out=y)
        else:
            wide = weight[columns]
            for some in slices(c, 2560):  # more would leave a little product few rows
                w = second_sides(wide[:, some])
                parts = y.reshape(len(y), len(w), -1).swapaxes(0, 1)
                if some.start == 0:
                    multiply(x[None, rows, some], w, parts)
                else:
                    parts += multiply(x[None, rows, some], w, empty(*parts.shape))
        if bias is not None:
            y += bias[columns]

    parallel_for(block, *blocks(*out.shape), work=(n + 16) * weight.size)


def geglu(x, weight, bias, out):  # (n, c), (2 o, c), (2 o,), (n, o)
    n, o = out.shape
    bias = bias.reshape(2, 1, o)

    def block(columns, rows):
        gates = slice(o + columns.start, o + columns.stop)
        w = np.stack([second_sides(weight[part]) for part in (columns, gates)])  # (2, t, c, k)
        for few in slices(rows.stop - rows.start, 512):
            few = slice(rows.start + few.start, rows.start + few.stop)
            both = empty(2, few.stop - few.start, columns.stop - columns.start)
            multiply(x[few], w, both.reshape(*both.shape[:2], w.shape[1], -1).swapaxes(1, 2))
            both += bias[..., columns]
            y, gate = both
            gelu(gate, out=gate)
            np.multiply(y, gate, out=out[few, columns])

    columns, rows = slices(o, 128 if little() else 512), slices(n, 2048)
    parallel_for(block, columns, rows, work=n * weight.size)


# %% Activations -----------------------------------------------------------------------------------
# f(x, out) for a block x; out may be x.


@functools.cache
def exponential():
    """-> f, k: f(k x) is exp(x), in the faster way. NumPy has exp in vector instructions of several
    kinds, exp2 in AVX-512's alone, where it takes half the time.
    """
    x = np.linspace(-8, 8, 1 << 14, dtype=np.float32)
    exp2_is_faster = seconds(lambda: np.exp2(x)) < seconds(lambda: np.exp(x))
    return (np.exp2, math.log2(math.e)) if exp2_is_faster else (np.exp, 1)


def sigmoid_times(x, out, coefficients):
    """x / (1 + exp(-x P(x^2))), P's highest coefficient first. Far on the left exp is infinite and
    the quotient 0.
    """
    exp, k = exponential()
    p, *others = (np.float32(-k * coefficient) for coefficient in coefficients)
    t = x * p
    if others:
        square = x * x
        np.multiply(square, p, out=t)
        for coefficient in others[:-1]:
            t += coefficient
            t *= square
        t += others[-1]
        t *= x
    with np.errstate(over="ignore", invalid="ignore"):
        exp(t, out=t)
        t += 1
        np.divide(x, t, out=out)


# gelu is x times a probability p, and log(p / (1 - p)) is x times a smooth function of x^2: nearly
# 1.6, for which quick_gelu has 1.702. With the polynomial below, a least squares fit of smallest
# largest error, gelu is off by 7e-8 at most.
GELU = (
    3.6112920622444656e-09,
    -2.6689548063998475e-07,
    7.938262329347151e-06,
    -0.00011048063709791922,
    -6.625890909646269e-05,
    0.07266856558120513,
    1.5957684327079913,
)
silu = functools.partial(sigmoid_times, coefficients=(1,))
gelu = functools.partial(sigmoid_times, coefficients=GELU)
quick_gelu = functools.partial(sigmoid_times, coefficients=(1.702,))
ACTIVATIONS = {"silu": silu, "gelu": gelu, "quick_gelu": quick_gelu}


def elementwise(f, x, out):
    flat, out = x.reshape(-1), out.reshape(-1)
    parallel_for(lambda at: f(flat[at], out[at]), slices(x.size, BLOCK), work=16 * x.size)


# %% Convolution -----------------------------------------------------------------------------------


def conv(x, weight, bias, stride, padding, out, twice=False):
    """(b, h, w, c), (o, k, k, c), (o,), (b, h', w', o). twice: as if x were twice as high and wide,
    each position being 2 x 2.
    """
    b, h, w, _ = out.shape
    many = b * h * w >= (512 if little() else 1024)  # of few positions 4 is no faster
    tile = 4 if h % 4 == 0 and w % 4 == 0 and many else 2
    fits = h % tile == 0 and w % tile == 0 and b * h * w >= 128 and x.shape[3] >= 16
    if (stride, padding, weight.shape[1]) == (1, 1, 3) and fits:
        conv_winograd(x, weight, bias, tile, out, twice)
    else:
        x = x.repeat(2, axis=1).repeat(2, axis=2) if twice else x
        conv_windows(x, weight, bias, stride, padding, out)


def conv_windows(x, weight, bias, stride, padding, out):
    """As one matrix product: each window laid out as a row, some rows of the picture at a time."""
    o, k, _, c = weight.shape
    if padding:
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = sliding_window_view(x, (k, k), axis=(1, 2))[:, ::stride, ::stride]
    windows = windows.transpose(0, 1, 2, 4, 5, 3)  # (b, h', w', k, k, c)
    b, h, w = windows.shape[:3]
    out = out.reshape(b * h, w, o)
    for band in slices(b * h, max(1, BAND // (w * k * k * c))):
        laid_out = empty(band.stop - band.start, w, k, k, c)

        def lay_out(row, start=band.start, to=laid_out):
            to[row] = windows[divmod(start + row, h)]

        parallel_for(lay_out, range(len(laid_out)), work=16 * laid_out.size)
        linear(laid_out.reshape(-1, k * k * c), weight.reshape(o, -1), bias, flat(out[band]))


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
WINOGRAD = {tile: [np.array(m, np.float32) for m in three] for tile, three in WINOGRAD.items()}


def conv_winograd(x, weight, bias, tile, out, twice):
    """For each tile of the output, which sees a window of side = tile + 2 rows and columns:

        v = forth window forth^T   (side, side, c)        u = weigh filter weigh^T   for each of o
        m[i, j] = u[i, j] v[i, j]  (side, side, o)        tile = back m back^T

    Of tiles and filters the fewer are transformed first, all of them, and laid out as second sides
    of products; kernels that lay out sides themselves want the filters there, if tiles are many.
    The more are transformed some at a time, and used while they are in the cache.
    """
    (b, h, w, o), c, side, back = out.shape, x.shape[3], tile + 2, WINOGRAD[tile][2]
    across, n = w // tile, b * h * w // tile**2
    filters_first = n >= o
    tiles_in_rows = filters_first or (not little() and n >= 100)  # or in columns
    tiles_each, columns_each = (64, 64) if little() else (256, 512)
    parts = 2 * parallel.cores()  # at least, where there is enough of it
    if filters_first:
        tiles_each = min(tiles_each, max(16, n // parts))
    elif tiles_in_rows:
        columns_each = min(columns_each, max(64, o // parts), max(64, 2**23 // (side * side * c)))
    else:
        columns_each = min(64, max(8, 40_000 // c // 8 * 8))
    bands = slices(b * h // tile, max(1, tiles_each // across))  # rows of tiles
    columns = slices(o, columns_each)
    out = out.reshape(b * h // tile, tile, across, tile, o)

    def finish(first, second, rows, columns):
        m = multiply(first, second, empty(side * side, first.shape[1], second.shape[2]))
        # back turns a number at this place into the same number all over the tile
        m[side + 1] += bias[columns] if tiles_in_rows else bias[columns, None]
        y = np.matmul(back, m.reshape(side, side, -1))
        y = np.matmul(back, y.swapaxes(0, 1))  # (tile across, tile down, ...)
        if tiles_in_rows:
            y = y.reshape(tile, tile, -1, across, m.shape[2])
        else:
            y = y.reshape(tile, tile, m.shape[1], -1, across).transpose(0, 1, 3, 4, 2)
        out[rows, ..., columns] = y.transpose(2, 1, 3, 0, 4)

    def seen(rows):
        return see(x, rows, tile, twice)

    def weigh(columns):
        return filters(weight[columns], tile, filters_first)

    if filters_first:
        u = parallel_map(weigh, columns, work=16 * weight.size)

        def rest(rows):
            v = seen(rows)
            for some, second in zip(columns, u):
                finish(v, second, rows, some)

        parallel_for(rest, bands, work=o * x.size)
    else:
        lay_out = seen if tiles_in_rows else lambda rows: turned(seen(rows))
        v = parallel_map(lay_out, bands, work=16 * x.size)

        def rest(some):
            u = weigh(some)
            for rows, tiles in zip(bands, v):
                sides = (tiles, u.swapaxes(1, 2)) if tiles_in_rows else (u, tiles)
                finish(*sides, rows, some)

        parallel_for(rest, columns, work=o * x.size)


def see(x, rows, tile, twice):  # (b, h, w, c) -> (side^2, n, c)
    """forth window forth^T for these rows of tiles, counted through all pictures. Around each
    picture are zeros. The rows of memory are a little longer than need be: with strides of a power
    of two, all that is read at once would compete for the same few lines of the cache.
    """
    forth, side, times = WINOGRAD[tile][0], tile + 2, 2 if twice else 1
    (_, h, w, c) = x.shape
    h, w = h * times, w * times
    down = h // tile
    v = empty(side, side, rows.stop - rows.start, w // tile, c + 16)[..., :c]
    for i in range(rows.start // down, -(-rows.stop // down)):  # pictures
        first, last = max(rows.start - i * down, 0), min(rows.stop - i * down, down)
        top, bottom = first * tile - 1, last * tile + 1
        area = np.zeros((bottom - top, w + 2, c), np.float32)
        inside = np.arange(max(0, top), min(bottom, h))
        for shift in range(times):
            area[inside - top, 1 + shift : w + 1 : times] = x[i, inside // times]
        area = area.reshape(len(area), -1)
        tall = sliding_window_view(area, side, axis=0)[::tile].swapaxes(1, 2)
        t = empty(*tall.shape)  # (rows of tiles, side, (w + 2) c)
        for at in slices(t.shape[2], MOST // side**2 // 2):
            np.matmul(forth, tall[..., at], out=t[..., at])
        t = t.reshape(-1, side, w + 2, c)
        square = sliding_window_view(t, side, axis=2)[:, :, ::tile].swapaxes(3, 4)
        at = slice(first + i * down - rows.start, last + i * down - rows.start)
        np.matmul(forth, square, out=v[:, :, at].transpose(2, 0, 3, 1, 4))
    return v.reshape(side * side, -1, c)


def filters(weight, tile, as_second):  # (k, 3, 3, c) -> (side^2, k, c), or (side^2, c, k)
    """weigh filter weigh^T, for both directions at once; rows of memory as in see."""
    weigh = np.kron(WINOGRAD[tile][1], WINOGRAD[tile][1])  # (side^2, 9)
    weight = weight.reshape(len(weight), 9, -1)
    k, _, c = weight.shape
    if not as_second:
        u = empty(len(weigh), k, c + 16)[..., :c]
        np.matmul(weigh, widen(weight), out=u.swapaxes(0, 1))
        return u
    f = np.ascontiguousarray(widen(weight.transpose(1, 2, 0))).reshape(9, -1)  # (9, c k)
    u = empty(len(weigh), c * k + 48)[:, : c * k]
    for at in slices(c * k, MOST // weigh.size):
        np.matmul(weigh, f[:, at], out=u[:, at])
    return as_strided(u, (len(u), c, k), (u.strides[0], 4 * k, 4))


# %% Norms -----------------------------------------------------------------------------------------


def group_norm(x, weight, bias, groups, epsilon, then, out):  # (b, h, w, c) -> same
    """then(block, out): what else to do to each block."""
    b, h, w, c = x.shape
    x, out = x.reshape(b, h * w, c), out.reshape(b, h * w, c)
    mean, scale = group_statistics(x, groups, epsilon)
    scale *= weight

    def apply(i, rows):
        y = np.subtract(x[i, rows], mean[i], out=out[i, rows])
        y *= scale[i]
        y += bias
        if then:
            then(y, out=y)

    parallel_for(apply, range(b), slices(h * w, max(1, BLOCK // c)), work=16 * x.size)


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


def layer_norm(x, weight, bias, epsilon, out):  # (..., c) -> same
    c = x.shape[-1]
    flat, out = x.reshape(-1, c), out.reshape(-1, c)

    def norm(rows):
        y = np.subtract(flat[rows], flat[rows].mean(1, keepdims=True), out=out[rows])
        variance = np.einsum("nc,nc->n", y, y)[:, None] / np.float32(c)
        y *= 1 / np.sqrt(variance + np.float32(epsilon))
        y *= weight
        y += bias

    parallel_for(norm, slices(len(flat), max(1, BLOCK // c)), work=16 * x.size)


# %% Attention -------------------------------------------------------------------------------------


def attention(q, k, v, heads, causal, out):  # (b, n, c), (b, m, c), (b, m, c), (b, n, c)
    """Some queries at a time, so that their scores stay in the cache: k q^T, for keys in pieces,
    then exp, then v^T times that. A row of ones below v^T makes the same product sum the weights.
    What the pieces give is added: softmax is a quotient of two sums over keys.
    """
    (b, n, c), m = q.shape, k.shape[1]
    if c % heads:
        raise ValueError(f"{c} channels do not divide into {heads} heads")
    d, (exp, unit) = c // heads, exponential()
    s, most = (64, min(128, MOST // (64 * d + 64))) if little() and d <= 256 else (256, 1024)
    pieces = -(-m // most)
    p = -(-m // pieces)
    keys, values = (
        empty(b, heads, pieces * p, d),
        np.zeros((b, heads, pieces, d + 1, p), np.float32),
    )
    longest = np.empty((b, heads))

    def lay_out(i, head):
        """The last piece is filled up with any key, whose value and weight are zeros."""
        at = slice(head * d, head * d + d)
        keys[i, head, :m], keys[i, head, m:] = k[i, :, at], k[i, 0, at]
        longest[i, head] = np.einsum("md,md->m", k[i, :, at], k[i, :, at]).max() ** 0.5
        for piece, part in zip(values[i, head], slices(m, p)):
            piece[:d, : part.stop - part.start] = v[i, part, at].T
            piece[d, : part.stop - part.start] = 1

    def block(i, head, rows):
        at, r = slice(head * d, head * d + d), rows.stop - rows.start
        queries = q[i, rows, at] * np.float32(unit * d**-0.5)
        queries = queries.reshape(-1, 1, s if r % s == 0 else r, d)
        queries = turned(queries)  # (g, 1, d, s)
        scores = np.matmul(keys[i, head].reshape(pieces, p, d), queries)  # (g, pieces, p, s)
        if causal:
            key = np.arange(pieces * p).reshape(pieces, p, 1)
            query = np.arange(rows.start, rows.stop).reshape(len(scores), 1, 1, -1)
            scores[np.broadcast_to(key > query, scores.shape)] = -np.inf
        # No score is larger than |q| |k|. Only where exp might leave float32's range, 1e-38 to
        # 1e38, each query's largest is taken from its scores: the softmax does not change.
        if np.einsum("gids,gids->gs", queries, queries).max() ** 0.5 * longest[i, head] > 60 * unit:
            scores -= scores.max((1, 2), keepdims=True)
        exp(scores, out=scores)
        mixed = np.matmul(values[i, head], scores).sum(1)  # (g, d + 1, s)
        mixed[:, :d] /= mixed[:, d:]
        out[i, rows, at] = mixed[:, :d].swapaxes(1, 2).reshape(r, d)

    parallel_for(lay_out, range(b), range(heads), work=16 * k.size)
    at_once = max(s, min(2 * BLOCK // m, n) // s * s)
    parallel_for(block, range(b), range(heads), slices(n, at_once), work=2 * b * n * m * c)
