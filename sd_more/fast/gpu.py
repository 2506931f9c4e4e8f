"""The one layer that is exchanged on a GPU. MLX has good kernels there for all others."""

import mlx.core as mx

from .layer import FastLayer


class AttentionCore(FastLayer):
    """Attention whose scores, n x m numbers for each head, are never all in memory."""

    def __call__(self, q, k, v):
        b, n, c = q.shape
        d = c // self.heads
        q, k, v = (y.reshape(b, -1, self.heads, d).transpose(0, 2, 1, 3) for y in (q, k, v))
        mask = "causal" if self.causal else None
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=d**-0.5, mask=mask)
        return y.transpose(0, 2, 1, 3).reshape(b, n, c)
