"""sd_more/fast: layers that compute what the plain ones do, and the exchange of one for the other.

The plain layers are sd.py's as they stand. Where PyTorch has the same operation, that is compared
with as well, in float64.
"""

import math
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn
from mlx.utils import tree_flatten
from torch.nn import functional

import sd
from sd_more import fast
from sd_more.fast import cpu, gpu, kernels, parallel
from tests.reference import ROOT, assert_close

CPU = {
    sd.Linear: cpu.Linear,
    sd.GEGLU: cpu.GEGLU,
    sd.Conv: cpu.Conv,
    sd.GroupNorm: cpu.GroupNorm,
    sd.NormSilu: cpu.NormSilu,
    sd.LayerNorm: cpu.LayerNorm,
    sd.Upsample: cpu.Upsample,
    sd.Activation: cpu.Activation,
    sd.AttentionCore: cpu.AttentionCore,
}
GPU = {sd.AttentionCore: gpu.AttentionCore}
# What a layer may be off by, relative to its largest number. Winograd's matrices hold numbers up to
# 8, and so lose some bits; a sum of squares loses what its square root does not win back. Scores up
# to 64, as exponents of 2, have steps of 8e-6, and a weight is off by ln 2 times half of that.
MOST = {sd.Conv: 2e-5, sd.Upsample: 2e-5, sd.GroupNorm: 1e-5, sd.NormSilu: 1e-5}
MOST[sd.AttentionCore] = 6e-6
ACTIVATIONS = ("silu", "gelu", "quick_gelu")
TYPES_16 = (mx.float16, mx.bfloat16)


def numbers(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


def randomly(layer, seed=0):
    """Random parameters, such that what comes out of a layer is about as large as what goes in."""
    rng = np.random.default_rng(seed)
    for name, old in tree_flatten(layer.parameters()):
        new = rng.standard_normal(old.shape, np.float32) / math.sqrt(math.prod(old.shape[1:]))
        layer.load_weights([(name, mx.array(new))], strict=False)
    return layer


def cases():
    """-> (a plain layer, its inputs): small and large ones, odd sizes, what is not contiguous."""
    yield randomly(sd.Linear(48, 96)), [numbers(2, 77, 48)]
    yield randomly(sd.Linear(48, 96, bias=False)), [numbers(5, 48)]
    yield randomly(sd.Linear(30, 1300)), [numbers(1, 30)]
    yield randomly(sd.Linear(33, 700)), [numbers(2, 601, 33)]
    yield randomly(sd.Linear(5200, 70)), [numbers(1, 90, 5200)]
    yield randomly(sd.Linear(40, 192)), [numbers(1, 1100, 40)]
    yield randomly(sd.GEGLU(48, 192)), [numbers(2, 77, 48)]
    yield randomly(sd.GEGLU(24, 1400)), [numbers(2, 700, 24)]
    sizes = [(16, 16, 32, 48), (32, 64, 64, 16), (20, 36, 16, 32), (10, 7, 32, 32), (8, 8, 4, 16)]
    for h, w, c, o in [*sizes, (32, 33, 16, 8), (33, 32, 16, 8)]:
        yield randomly(sd.Conv(c, o)), [numbers(2, h, w, c)]
        yield randomly(sd.Conv(c, o, padding=0)), [numbers(2, h, w, c)]
        yield randomly(sd.Conv(c, o, stride=2)), [numbers(1, h, w, c)]
        yield randomly(sd.Conv(c, o, stride=2, padding=0)), [numbers(1, h + 1, w + 1, c)]
    for b, h, w, c, o in (
        (1, 1, 1, 20, 30),
        (3, 12, 20, 20, 130),
        (3, 8, 6, 17, 5),
        (3, 7, 1, 9, 3),
    ):
        yield randomly(sd.Conv(c, o)), [numbers(b, h, w, c)]
    for b, h, w, c in (
        (1, 1, 1, 20),
        (2, 4, 4, 20),
        (3, 5, 7, 33),
        (2, 6, 10, 96),
        (1, 32, 64, 16),
    ):
        yield randomly(sd.Upsample(c)), [numbers(b, h, w, c)]
    turned = numbers(1, 32, 16, 36).transpose(0, 2, 3, 1)
    yield randomly(sd.Conv(16, 200)), [numbers(1, 16, 24, 16)]
    yield randomly(sd.Conv(32, 16)), [turned]
    yield randomly(sd.Conv(32, 16, stride=2, padding=0)), [turned]
    for scale, mean in ((1, 0), (1e-3, 0), (1, 10), (50, -3)):
        x = numbers(2, 40, 33, 64) * scale + mean
        yield randomly(sd.GroupNorm(64, 32, 1e-5)), [x]
        yield randomly(sd.GroupNorm(64, 8, 1e-6)), [x]
        yield randomly(sd.NormSilu(64, 32, 1e-5)), [x]
        yield randomly(sd.LayerNorm(64)), [x.reshape(2, -1, 64)]
    yield randomly(sd.NormSilu(32, 4, 1e-6)), [turned]
    yield randomly(sd.LayerNorm(4096)), [numbers(77, 4096)]
    sizes = [
        (77, 77, 64, 4),
        (600, 600, 32, 2),
        (1100, 77, 40, 8),
        (1, 1, 8, 1),
        (320, 1025, 24, 1),
    ]
    for n, m, c, heads in sizes:
        qkv = numbers(2, n, c) * 3, numbers(2, m, c, seed=1) * 3, numbers(2, m, c, seed=2)
        yield sd.AttentionCore(heads), qkv
    for n, m, c, heads in ((65, 300, 320, 1), (192, 129, 480, 3)):  # wide heads
        qkv = numbers(2, n, c), numbers(2, m, c, seed=1), numbers(2, m, c, seed=2)
        yield sd.AttentionCore(heads), qkv
    for n in (77, 300):
        yield sd.AttentionCore(4, causal=True), [numbers(2, n, 64, seed=seed) for seed in range(3)]
    for name in ACTIVATIONS:
        yield sd.Activation(name), [numbers(3, 50, 700) * 4]
        yield sd.Activation(name), [mx.array([-np.inf, -200, -88.8, -15, -1e-8, 0, 1e-8, 15, 200])]


def check_case(plain, inputs, faster):
    """One case's layer and its fast one agree to a few of float32's roundings."""
    ours, truth = (np.array(layer(*inputs)) for layer in (faster[type(plain)](plain), plain))
    assert np.array_equal(np.isnan(ours), np.isnan(truth))  # 0 * -inf
    most = MOST.get(type(plain), 3e-6)
    what = f"{type(plain).__name__} {vars(plain)} {[x.shape for x in inputs]}"
    assert_close(np.nan_to_num(ours), np.nan_to_num(truth), most, what)


# %% Each layer ------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["little", "large"])
def both_kinds(request, monkeypatch):
    """Products of both kinds, whatever OpenBLAS's kernels like; exp in both ways."""
    exp = (np.exp2, math.log2(math.e)) if request.param else (np.exp, 1)
    monkeypatch.setattr(kernels, "little", lambda: request.param)
    monkeypatch.setattr(kernels, "exponential", lambda: exp)


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 * -inf, in the plain layers too
@pytest.mark.parametrize("faster, small", [(CPU, parallel.SMALL), (CPU, 0), (GPU, 0)])
def test_fast_layers_equal_the_plain_ones(faster, small, monkeypatch, both_kinds):
    monkeypatch.setattr(parallel, "SMALL", small)  # 0: on all cores, however little it is
    seen = set()
    for plain, inputs in cases():
        if type(plain) in faster:
            check_case(plain, inputs, faster)
            seen.add(type(plain))
    assert seen == faster.keys()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_small_blocks_change_nothing(monkeypatch, both_kinds):
    """What has one block in the cases above has many here, and what has many has one."""
    for block, band, most in ((2**9, 2**12, 2**15), (2**24, 2**30, 2**22)):
        monkeypatch.setattr(kernels, "BLOCK", block)
        monkeypatch.setattr(kernels, "BAND", band)
        monkeypatch.setattr(kernels, "MOST", most)
        monkeypatch.setattr(cpu, "SMALL", block)
        for plain, inputs in cases():
            check_case(plain, inputs, CPU)


def theirs(plain, inputs):
    """What PyTorch makes of a case, in float64."""
    x, *others = (torch.tensor(np.array(y)).double() for y in inputs)
    w, b = (
        torch.tensor(np.array(plain[name])).double() if name in plain else None
        for name in ("weight", "bias")
    )
    kind = type(plain)
    if kind in (sd.Linear, sd.GEGLU):
        y = functional.linear(x, w, b)
        half = y.shape[-1] // 2
        return y if kind is sd.Linear else y[..., :half] * functional.gelu(y[..., half:])
    if kind is sd.Upsample:
        twice = plain.conv, [mx.repeat(mx.repeat(inputs[0], 2, 1), 2, 2)]
        return theirs(*twice)
    if kind is sd.Conv:
        x, w = x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2)
        return functional.conv2d(x, w, b, plain.stride, plain.padding).permute(0, 2, 3, 1)
    if kind in (sd.GroupNorm, sd.NormSilu):
        y = functional.group_norm(x.permute(0, 3, 1, 2), plain.groups, w, b, plain.epsilon)
        y = functional.silu(y) if kind is sd.NormSilu else y
        return y.permute(0, 2, 3, 1)
    if kind is sd.LayerNorm:
        return functional.layer_norm(x, x.shape[-1:], w, b, 1e-5)
    if kind is sd.AttentionCore:
        split = [y.unflatten(-1, (plain.heads, -1)).transpose(1, 2) for y in (x, *others)]
        y = functional.scaled_dot_product_attention(*split, is_causal=plain.causal)
        return y.transpose(1, 2).flatten(-2)
    quick = lambda x: x * torch.sigmoid(1.702 * x)
    return {"silu": functional.silu, "gelu": functional.gelu, "quick_gelu": quick}[plain.name](x)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_fast_layers_equal_pytorch():
    for plain, inputs in cases():
        ours = np.nan_to_num(np.array(CPU[type(plain)](plain)(*inputs)))
        truth = np.nan_to_num(theirs(plain, inputs).numpy())
        most = MOST.get(type(plain), 3e-6)
        assert_close(ours, truth, most, f"{type(plain).__name__} {[x.shape for x in inputs]}")


@pytest.mark.parametrize("dtype", TYPES_16)
def test_layers_give_back_the_type_that_they_get(dtype):
    """And compute in float32: one rounding at the end, of 11 bits or 8."""
    for plain, inputs in cases():
        if not math.isfinite(inputs[0].sum().item()):
            continue
        fast_layer = CPU[type(plain)](plain)
        narrow = [x.astype(dtype) for x in inputs]
        ours, truth = fast_layer(*narrow), fast_layer(*(x.astype(mx.float32) for x in narrow))
        assert ours.dtype == dtype and truth.dtype == mx.float32
        assert mx.array_equal(ours, truth.astype(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_exact_to_float32_everywhere(name, both_kinds):
    """gelu's polynomial is off by 7e-8, and the exponent by a rounding or two."""
    plain, x = sd.Activation(name), mx.linspace(-10, 10, 100_001)
    ours, truth = np.array(cpu.Activation(plain)(x)), theirs(plain, [x]).numpy()
    assert (np.abs(ours - truth) / np.maximum(np.abs(truth), 1)).max() < 4e-7


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_large_numbers_warn_of_nothing(name, both_kinds):
    x = mx.array([-1e18, -1e4, -200, 200, 1e18])
    ours = np.array(cpu.Activation(sd.Activation(name))(x))
    assert np.array_equal(ours, np.maximum(np.array(x), 0))


@pytest.mark.parametrize("dtype", TYPES_16)
def test_weights_of_16_bits_are_widened_exactly(dtype):
    """All 65,536 of them, but for infinities and what is not a number."""
    weights = mx.array(np.arange(2**16, dtype=np.uint16)).view(dtype)
    truth = np.array(weights.astype(mx.float32))
    finite = np.isfinite(truth)
    assert finite.sum() > 60_000
    assert np.array_equal(kernels.widen(cpu.as_stored(weights))[finite], truth[finite])


@pytest.mark.parametrize("dtype", TYPES_16)
def test_weights_of_16_bits_are_those_weights(dtype, both_kinds):
    """Layers that keep them compute, to the bit, what they do with the same numbers in float32."""
    for plain, inputs in cases():
        if type(plain) in (sd.Linear, sd.GEGLU, sd.Conv):
            narrow, wide = CPU[type(plain)](plain), CPU[type(plain)](plain)
            narrow.weight = plain.weight.astype(dtype)
            wide.weight = narrow.weight.astype(mx.float32)
            assert mx.array_equal(narrow(*inputs), wide(*inputs))
            assert narrow.weight.dtype == dtype


def test_products_of_unknown_kernels_are_tried(monkeypatch):
    """Little ones are chosen if a tenth of the work takes less than a tenth of the time. What is
    tried can be computed, too.
    """
    monkeypatch.setattr(kernels, "little", kernels.little.__wrapped__)
    for name, times, expected in (
        ("SkylakeX", [], True),
        ("Haswell", [], False),
        ("a later one", [1.0, 10.1], True),
        ("a later one", [1.0, 9.9], False),
        (None, [1.0, 10.1], True),
    ):
        left = iter(times)
        monkeypatch.setattr(parallel, "kernels", lambda name=name: name)
        monkeypatch.setattr(kernels, "seconds", lambda f, left=left: f() is None or next(left))
        assert kernels.little() is expected


def test_the_faster_exponential_is_taken(monkeypatch):
    for times, f in (([1.0, 2.0], np.exp2), ([2.0, 1.0], np.exp)):
        left = iter(times)
        monkeypatch.setattr(kernels, "seconds", lambda f, left=left: next(left))
        exp, unit = kernels.exponential.__wrapped__()
        assert exp is f and abs(exp(unit) - math.e) < 1e-6


def test_openblas_says_its_kernels(monkeypatch):
    assert parallel.kernels() or parallel.cores() == 1
    monkeypatch.setattr(parallel, "openblas", lambda name: None)
    assert parallel.kernels() is None


# %% What is hard about some -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [-60, 60])
@pytest.mark.parametrize("fast_class", [cpu.AttentionCore, gpu.AttentionCore])
def test_scores_beyond_what_exp_can_take(size, fast_class, both_kinds):
    """All scores near -170 or 170, where float32 has steps of 1.5e-5; so a share is off by that."""
    noise = [numbers(2, 300, 8, seed=seed) for seed in range(3)]
    plain, inputs = sd.AttentionCore(1), (size + noise[0] / 100, 1 + noise[1] / 100, noise[2])
    ours = fast_class(plain)(*inputs)
    assert_close(ours, plain(*inputs), 3e-5)
    assert_close(ours, theirs(plain, inputs), 6e-5)


def test_heads_that_do_not_divide_the_channels_are_refused():
    core = cpu.AttentionCore(sd.AttentionCore(3))
    with pytest.raises(ValueError, match="8 channels do not divide into 3 heads"):
        core(*[numbers(1, 5, 8)] * 3)


@pytest.mark.parametrize("mean, corner, most", [(100, 0, 3e-6), (-3000, 0, 1e-4), (0, 1000, 1e-5)])
def test_a_mean_far_from_zero_costs_the_norms_few_digits(mean, corner, most):
    """Against float64. x itself has steps of 8e-6 at 100, of 2e-4 at 3000; corner: one position
    with numbers quite unlike all others.
    """
    x = numbers(2, 40, 33, 64) + mean
    x[:, 0, 0] += corner
    for plain in (sd.GroupNorm(64, 32, 1e-5), sd.GroupNorm(64, 8, 1e-6), sd.LayerNorm(64)):
        assert_close(CPU[type(plain)](plain)(x), theirs(plain, [x]), most, str(vars(plain)))


def test_each_norm_has_its_epsilon():
    """Of numbers with variance 1e-6 an epsilon of 1e-6 leaves 0.71, one of 1e-5 leaves 0.30."""
    x = numbers(1, 32, 32, 64) / 1000
    for epsilon in (1e-5, 1e-6):
        expected = 1 / math.sqrt(1 + epsilon / 1e-6)
        for plain in (sd.GroupNorm(64, 4, epsilon), sd.NormSilu(64, 4, epsilon)):
            y = CPU[type(plain)](plain)(x)
            assert_close(y, theirs(plain, [x]), 1e-5)
            if type(plain) is sd.GroupNorm:
                assert abs(np.array(y).std() - expected) < 0.01
    assert abs(np.array(cpu.LayerNorm(sd.LayerNorm(64))(x)).std() - 0.30) < 0.01


def test_a_constant_picture_becomes_the_bias():
    """Nothing is divided by 0, however the sums are rounded."""
    for value in (0.0, 0.1, 1e4):
        layer = randomly(sd.GroupNorm(60, 4, 1e-6))
        y = np.array(cpu.GroupNorm(layer)(mx.full((1, 33, 31, 60), value)))
        assert np.abs(y - np.array(layer.bias)).max() < 1e-5


# %% Cores, threads and memory ---------------------------------------------------------------------


@pytest.fixture
def with_cores(monkeypatch):
    """-> set_cores(n): parallel_for then uses so many, however little there is to do."""

    def set_cores(count):
        monkeypatch.setattr(parallel, "cores", lambda: count)
        monkeypatch.setattr(parallel, "SMALL", 0)
        parallel.executor.cache_clear()

    yield set_cores
    parallel.executor.cache_clear()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("count", [3, 64])
def test_many_cores(count, with_cores):
    with_cores(count)
    for plain, inputs in cases():
        check_case(plain, inputs, CPU)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_without_openblas(monkeypatch):
    """With another library there is one core, and nobody's number of threads is touched."""
    monkeypatch.setattr(parallel, "openblas", lambda verb: None)
    monkeypatch.setattr(parallel, "SMALL", 0)
    monkeypatch.setattr(parallel, "cores", parallel.cores.__wrapped__)
    assert parallel.cores() == 1
    for plain, inputs in cases():
        check_case(plain, inputs, CPU)


def test_every_job_is_done_once(with_cores):
    for count in (1, 2, 5):
        with_cores(count)
        for jobs in ([], range(1), range(100)):
            done = queue.SimpleQueue()
            parallel.parallel_for(lambda *job, done=done: done.put(job), jobs, "ab", work=1)
            done = [done.get() for _ in range(done.qsize())]
            assert sorted(done) == [(i, j) for i in jobs for j in "ab"]


def test_the_other_cores_help(with_cores):
    """Three jobs that wait for each other end only if three threads work on them."""
    with_cores(3)
    meeting = threading.Barrier(3)
    parallel.parallel_for(lambda job: meeting.wait(timeout=10), range(3), work=1)


def test_work_inside_of_work_is_done_too(with_cores):
    with_cores(2)
    done = []
    parallel.parallel_for(
        lambda i: parallel.parallel_for(lambda j: done.append((i, j)), range(3), work=1),
        range(8),
        work=1,
    )
    assert len(set(done)) == len(done) == 24


@pytest.mark.skipif(parallel.cores() < 2, reason="needs NumPy with OpenBLAS, and two cores")
@pytest.mark.parametrize("work", [1, parallel.SMALL])
def test_matrix_products_keep_their_threads_outside(work):
    """During a block OpenBLAS has one thread; after it as many as before, also after an error."""
    get = parallel.openblas("get_num_threads")
    before, inside = get(), []
    parallel.parallel_for(lambda i: inside.append(get()), range(3), work=work)
    assert inside == [1, 1, 1] and get() == before == parallel.cores()
    with pytest.raises(ZeroDivisionError):
        parallel.parallel_for(lambda i: 1 / i, range(50), work=work)
    with parallel.ONE_BLAS_THREAD, parallel.ONE_BLAS_THREAD:
        assert get() == 1
    assert get() == before


def test_an_error_in_another_thread_is_raised(with_cores):
    with_cores(2)
    meeting, caller = threading.Barrier(2), threading.current_thread()

    def job(_):
        meeting.wait(timeout=10)
        if threading.current_thread() is not caller:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parallel.parallel_for(job, range(2), work=1)


def test_nothing_goes_on_after_an_error(with_cores):
    """When the error comes out, what was still being done in another thread has ended."""
    with_cores(2)
    meeting, caller, ended = threading.Barrier(2), threading.current_thread(), []

    def job(_):
        meeting.wait(timeout=10)
        if threading.current_thread() is caller:
            raise ZeroDivisionError
        time.sleep(0.2)
        ended.append(True)

    with pytest.raises(ZeroDivisionError):
        parallel.parallel_for(job, range(2), work=1)
    assert ended


@pytest.mark.filterwarnings("ignore:invalid value")
def test_threads_of_the_caller_do_not_disturb_each_other():
    """Four that compute at the same time get, to the bit, what each gets alone."""
    work = [(CPU[type(plain)](plain), inputs) for plain, inputs in cases()]
    truth = [np.array(layer(*inputs)) for layer, inputs in work]

    def all_of_it(start):
        order = [*range(start, len(work)), *range(start)]
        ours = {i: np.array(work[i][0](*work[i][1])) for i in order}
        return [np.array_equal(ours[i], truth[i], equal_nan=True) for i in range(len(work))]

    with ThreadPoolExecutor(4) as pool:
        for equal in pool.map(all_of_it, range(0, 40, 10)):
            assert all(equal), [work[i] for i, good in enumerate(equal) if not good]


def test_slices_and_blocks_cover_everything():
    for n in (1, 63, 64, 65, 512, 1300, 4096):
        for o in (1, 64, 1300, 10240):
            columns, rows = kernels.blocks(n, o)
            for total, parts in ((o, columns), (n, rows)):
                assert [i for part in parts for i in range(part.start, part.stop)] == [
                    *range(total)
                ]


def test_arrays_go_to_numpy_without_a_copy():
    for x, see in ((numbers(5, 7), cpu.as_float32), (numbers(5, 7), cpu.as_stored)):
        assert np.shares_memory(see(x), see(x))
    half = numbers(5, 7).astype(mx.bfloat16)
    assert np.shares_memory(cpu.as_stored(half), cpu.as_stored(half))
    assert not np.shares_memory(cpu.as_float32(half), cpu.as_float32(half))


@pytest.mark.parametrize("small", [0, 1 << 30])
def test_each_result_has_memory_of_its_own(small, monkeypatch):
    """Whether it was written into an MLX array's memory or copied, and whatever came before it."""
    monkeypatch.setattr(cpu, "SMALL", small)
    layer, x, zeros = CPU[sd.Linear](randomly(sd.Linear(8, 8))), numbers(3, 8), mx.zeros((3, 8))
    first = layer(x)
    before = np.array(first)
    second = layer(-x)
    assert np.array_equal(np.array(first), before) and not mx.any(zeros)
    assert not np.array_equal(np.array(second), before) and not mx.any(mx.zeros((3, 8)))


MEMORY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import mlx.core as mx, numpy as np, sd
from sd_more import fast
from sd_more.fast import cpu, parallel

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

layer = fast.accelerate(sd.Linear(64, 64), {sd.Linear: cpu.Linear}, mx.float32)
assert parallel.keep_memory.cache_info().currsize == 0, "to import and to exchange sets nothing"
before = megabytes()
np.ones(40 << 20)
assert megabytes() < before + 20, "glibc gives it back"
mx.eval(layer(mx.ones((1, 64))))
assert parallel.keep_memory.cache_info().currsize == 1
np.ones(40 << 20)
assert megabytes() > before + 300, "glibc keeps it"
fast.release_memory()
assert megabytes() < before + 20
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_is_kept_from_the_first_use_on_and_can_be_released():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# %% The exchange ----------------------------------------------------------------------------------


class OwnLinear(sd.Linear):
    """Someone's subclass, which computes something else."""


class Network(nn.Module):
    """Modules in lists, in lists of lists, and in a dict; one class that is in no table."""

    def __init__(self):
        super().__init__()
        self.first = sd.Linear(8, 8)
        self.rows = [[sd.Conv(8, 8, stride=2), sd.NormSilu(8, 2, 1e-6)], [OwnLinear(8, 8)]]
        self.named = {"norm": sd.GroupNorm(8, 4, 1e-5), "gate": sd.GEGLU(8, 16)}
        self.larger = sd.Upsample(8)
        self.table = nn.Embedding(5, 8)
        self.block = sd.TransformerBlock(8, 2, 4, 8)
        self.positions = mx.zeros((3, 8))
        self.count = 3


def classes(network):
    return {path or "network": type(module) for path, module in network.named_modules()}


def test_the_exchange_reaches_exactly_the_classes_of_the_table():
    for faster in (CPU, GPU, {sd.Linear: cpu.Linear}, {}):
        network = randomly(Network())
        before, weights = classes(network), dict(tree_flatten(network.parameters()))
        assert fast.accelerate(network, faster, mx.float32) is network
        expected = {path: faster.get(kind, kind) for path, kind in before.items()}
        assert classes(network) == expected
        assert expected["rows.1.0"] is OwnLinear and expected["block"] is sd.TransformerBlock
        assert len(expected) > 20
        after = dict(tree_flatten(network.parameters()))
        assert after.keys() == weights.keys()  # so a flat file's names still fit
        assert all(mx.array_equal(after[name], weights[name]) for name in weights)


def test_the_network_itself_may_be_exchanged():
    plain = sd.Linear(4, 4)
    assert type(fast.accelerate(plain, CPU, mx.float32)) is cpu.Linear


def test_fast_layers_have_the_plain_ones_numbers():
    plain = sd.Conv(4, 6, stride=2, padding=0), sd.GroupNorm(6, 3, 0.5), sd.AttentionCore(3, True)
    conv, norm, core = (CPU[type(layer)](layer) for layer in plain)
    assert (conv.stride, conv.padding) == (2, 0) and conv.weight.shape == (6, 3, 3, 4)
    assert (norm.groups, norm.epsilon) == (3, 0.5)
    assert (core.heads, core.causal) == (3, True)
    assert "bias" in cpu.Linear(sd.Linear(2, 2))
    assert "bias" not in cpu.Linear(sd.Linear(2, 2, bias=False))


@pytest.mark.parametrize("stored", [mx.float32, *TYPES_16])
@pytest.mark.parametrize("dtype", [mx.float32, *TYPES_16])
@pytest.mark.parametrize("faster", [CPU, GPU], ids=["cpu", "gpu"])
def test_only_what_can_be_widened_keeps_16_bits(stored, dtype, faster):
    """And only where float32 is asked for. All else has the type that is asked for."""
    network = Network()
    network.apply(lambda weight: weight.astype(stored))
    fast.accelerate(network, faster, dtype)
    kept = set()
    for path, module in network.named_modules():
        for name, array in module.items():
            if isinstance(array, mx.array) and array.dtype != dtype:
                kept.add((type(module), name))
                assert array.dtype == stored
    widened = {(kind, "weight") for kind in (cpu.Linear, cpu.GEGLU, cpu.Conv)}
    keeps = faster is CPU and dtype == mx.float32 and stored != mx.float32
    assert kept == (widened if keeps else set())


def test_what_is_no_weight_is_not_cast():
    network = nn.Module()
    network.indices, network.weight = mx.arange(3), mx.zeros(3)
    fast.accelerate(network, CPU, mx.float16)
    assert network.indices.dtype == mx.int32 and network.weight.dtype == mx.float16


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_weights_stay_on_the_disk_until_they_are_used(dtype, tmp_path):
    """The file is changed behind the exchange's back, and the layer has the new numbers."""
    file, x = tmp_path / "weights.safetensors", numbers(3, 8)
    mx.save_safetensors(str(file), dict(tree_flatten(randomly(sd.Linear(8, 8)).parameters())))
    layer = sd.Linear(8, 8)
    layer.load_weights(str(file))
    layer = fast.accelerate(layer, CPU, dtype)
    other = randomly(sd.Linear(8, 8), seed=1)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), dict(tree_flatten(other.parameters())))
    with open(file, "r+b") as old:  # the same file, not one of the same name
        old.write((tmp_path / "other.safetensors").read_bytes())
    assert_close(layer(x), other(x), 3e-6 if dtype == mx.float32 else 2e-3)


# %% Whole networks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature():
    """-> networks(faster): the miniature's three, exchanged by that table."""
    config, weights = sd.read_flat(sd.TINY)

    def networks(faster, dtype=mx.float32):
        built = sd.build_networks(config)
        for name, network in built.items():
            sd.load_weights(network, weights, name)
            fast.accelerate(network, faster, dtype)
        return built

    return networks


def all_answers(networks):
    """-> what three networks say, by name."""
    ids = mx.array([[49406, 320, 736, 1212] + 73 * [49407], [49406] + 76 * [49407]])
    x, unet, vae = numbers(1, 16, 24, 4), networks["unet"], networks["vae"]
    context = networks["text_encoder"](ids)
    return {
        "text": context,
        "unet": unet(x, mx.array(500.0), context),
        "unet without guidance": unet(x, mx.array(1.0), context[:1]),
        "decode": vae.decode(x),
        "encode": mx.concatenate(vae.encode(numbers(1, 64, 96, 3)), axis=-1),
    }


@pytest.fixture(scope="module")
def plain_answers(miniature):
    return all_answers(miniature({}))


@pytest.mark.parametrize("faster, small", [(CPU, parallel.SMALL), (CPU, 0), (GPU, 0)])
def test_whole_networks_agree_with_and_without_the_exchange(
    miniature, plain_answers, faster, small, monkeypatch
):
    monkeypatch.setattr(parallel, "SMALL", small)
    for what, ours in all_answers(miniature(faster)).items():
        assert_close(ours, plain_answers[what], 3e-5, what)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_sd_exchanges_these_classes_and_no_others(miniature, on_gpu, monkeypatch):
    monkeypatch.setattr(sd, "on_gpu", lambda: on_gpu)
    for name, network in miniature({}).items():
        before = classes(network)
        sd.accelerate(network, mx.float32)
        table = dict(GPU if on_gpu else CPU)
        assert classes(network) == {path: table.get(kind, kind) for path, kind in before.items()}
        assert set(classes(network).values()) & set(table.values()), name


@pytest.mark.parametrize("dtype, most", [(mx.float16, 5e-3), (mx.bfloat16, 5e-2)])
def test_networks_in_16_bits_agree(miniature, plain_answers, dtype, most):
    """float16 and bfloat16 round to 11 and 8 bits behind each layer."""
    context = plain_answers["text"].astype(dtype)
    x = numbers(1, 16, 24, 4).astype(dtype)
    ours = miniature(CPU, dtype)["unet"](x, mx.array(500.0), context)
    assert ours.dtype == dtype
    assert_close(ours.astype(mx.float32), plain_answers["unet"], most)
