"""Attention as it is on a GPU, run on MLX's CPU device: any width of a head, in 16 bits, too."""

import mlx.core as mx
import numpy as np
import pytest

import sd
from sd_more.fast import gpu
from tests.reference import assert_close


def numbers(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("n, m", [(64, 64), (300, 77), (2100, 77)])  # 2100: in several blocks
@pytest.mark.parametrize("d", [8, 40, 64, 72, 80, 96, 128, 160, 512])
def test_a_head_of_any_width_attends_alike(d, n, m):
    """Stable Diffusion has 40, 64, 80 and 160, the VAE 512. MLX has kernels for some of these."""
    heads = 1 if d > 160 else 2
    q, k, v = (numbers(2, size, heads * d, seed=i) for i, size in enumerate((n, m, m)))
    plain = sd.AttentionCore(heads)
    fast = gpu.AttentionCore(plain)
    assert_close(fast(q, k, v), plain(q, k, v), 2e-6)
    half = [y.astype(mx.float16) for y in (q, k, v)]
    truth = plain(*(y.astype(mx.float32) for y in half))
    out = fast(*half)
    assert out.dtype == mx.float16
    assert_close(out.astype(mx.float32), truth, 2e-3)  # float16 has 11 bits, and here d sums


@pytest.mark.parametrize("d", [40, 64, 80, 160])
def test_a_causal_head_sees_none_after_it(d):
    q, k, v = (numbers(1, 77, 2 * d, seed=i) for i in range(3))
    plain = sd.AttentionCore(2, causal=True)
    assert_close(gpu.AttentionCore(plain)(q, k, v), plain(q, k, v), 2e-6)


@pytest.mark.parametrize("d", [160, 512])
def test_scores_that_float16_does_not_have_are_no_nan(d):
    """Queries and keys whose products are 100 times its largest number, in wide heads."""
    q, k, v = (numbers(1, 32, d, seed=i) * 200 for i in range(3))
    half = [y.astype(mx.float16) for y in (q, k, v)]
    scores = (np.array(q[0]) @ np.array(k[0]).T) * d**-0.5
    assert abs(scores).max() > 65_504
    plain = sd.AttentionCore(1)
    out = gpu.AttentionCore(plain)(*half)
    assert mx.isfinite(out).all()
    truth = plain(*(y.astype(mx.float32) for y in half))
    assert_close(out.astype(mx.float32), truth, 2e-3)
