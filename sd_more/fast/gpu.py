"""The one layer that is exchanged on a GPU. MLX has good kernels there for all others."""

import mlx.core as mx

from .layer import FastLayer

WIDTHS = (64, 80, 128)  # of a head, for which MLX has fused kernels; Stable Diffusion's: 40 to 160
BLOCK = 1024


class AttentionCore(FastLayer):
    """Attention whose scores, n x m numbers for each head, are never all in memory.

    Narrow heads are padded with zeros, which add nothing to any score. For wide ones MLX has no
    fused kernel: their scores are computed in float32, for in float16 none above 65,504 exists, and
    for some queries at a time.
    """

    def __call__(self, q, k, v):
        b, n, c = q.shape
        d, dtype = c // self.heads, q.dtype
        q, k, v = (y.reshape(b, -1, self.heads, d).transpose(0, 2, 1, 3) for y in (q, k, v))
        wider = next((width for width in WIDTHS if width >= d), None)
        if wider is None:
            q, k, v = (y.astype(mx.float32) for y in (q, k, v))
            parts = [q] if self.causal else mx.split(q, range(BLOCK, n, BLOCK), axis=2)
        else:
            q, k, v = (mx.pad(y, [(0, 0)] * 3 + [(0, wider - d)]) for y in (q, k, v))
            parts = [q]
        mask = "causal" if self.causal else None
        attend = mx.fast.scaled_dot_product_attention
        y = mx.concatenate([attend(q, k, v, scale=d**-0.5, mask=mask) for q in parts], axis=2)
        return y[..., :d].astype(dtype).transpose(0, 2, 1, 3).reshape(b, n, c)
