"""Multi-head latent attention in its absorbed form, and the lightning indexer: projections, rope, and the kernels' call.

Weights keep Hugging Face's names and [out, in] layout; ``kv_b_proj`` is split by head into its key and value halves.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import expert_matmul, has_kernel, layer_matmul, rms_norm

from .config import Config


class Attention(nnx.Module):
    """MLA weights of ``n`` stacked layers, with the two norms of their decoder layer."""

    def __init__(self, c: Config, n: int, init):
        H, N, R, V = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        D, Q, C = c.hidden_size, c.q_lora_rank, c.kv_lora_rank
        self.input_layernorm = init.ones((n, D), (None, None))
        self.post_attention_layernorm = init.ones((n, D), (None, None))
        self.q_a_proj = init.normal((n, Q, D), (None, None, "embed"))
        self.q_a_layernorm = init.ones((n, Q), (None, None))
        self.q_b_proj = init.normal((n, H * (N + R), Q), (None, "heads", None))
        self.kv_a_proj_with_mqa = init.normal((n, C + R, D), (None, None, "embed"))
        self.kv_a_layernorm = init.ones((n, C), (None, None))
        self.k_b_proj = init.normal((n, H, N, C), (None, "heads", None, None))
        self.v_b_proj = init.normal((n, H, V, C), (None, "heads", None, None))
        self.o_proj = init.normal((n, D, H * V), (None, "embed", "heads"))


class Indexer(nnx.Module):
    """Lightning-indexer weights of ``n`` stacked full layers; the key norm is float32."""

    def __init__(self, c: Config, n: int, init):
        D, Q, I, J = c.hidden_size, c.q_lora_rank, c.index_n_heads, c.index_head_dim
        self.wq_b = init.normal((n, I * J, Q), (None, None, None))
        self.wk = init.normal((n, J, D), (None, None, "embed"))
        self.k_norm_weight = init.ones((n, J), (None, None), jnp.float32)
        self.k_norm_bias = init.zeros((n, J), (None, None), jnp.float32)
        self.weights_proj = init.normal((n, I, D), (None, None, "embed"))


def layer_norm(x, weight, bias, eps: float = 1e-6):
    """LayerNorm over the last axis, float32 throughout."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight + bias


class Stacked(NamedTuple):
    """Matrix or vector ``layer`` of a stack that nobody has sliced: the kernels of a decode step read it in place."""

    stack: jax.Array
    layer: jax.Array | int
    implementation: str

    @classmethod
    def of(cls, weight) -> Stacked:
        return weight if isinstance(weight, cls) else cls(weight[None], 0, "reference")

    @property
    def value(self):
        return self.stack[self.layer]


class Norm(NamedTuple):
    """An rms_norm still to be done: its weight, an array or Stacked, and eps."""

    weight: jax.Array | Stacked
    eps: float


def at_layer(params: dict, layer, implementation: str) -> dict:
    """One layer's weights of stacked ``params``, each Stacked."""
    return jax.tree.map(lambda a: Stacked(a, layer, implementation), params)


def linear(x, *weights, dtype=None, add=None):
    """x [..., in] times each weight [out, in], or by head x [..., H, in] times [H, out, in]; arrays or Stacked.

    One result or a list, in ``dtype`` or x's; ``add`` [..., out] is added to a single one.
    """
    stacks, (layer, *_), (implementation, *_) = zip(*map(Stacked.of, weights), strict=True)
    y = layer_matmul(x, list(stacks), layer, dtype=dtype, add=add, implementation=implementation)
    return y if len(y) > 1 else y[0]


def norm_linear(x, norm: Norm | None, *weights, dtype=None):
    """(the normed x, ``linear`` of it in a list), one launch in decode; without a norm, x is normed already."""
    stacks, (layer, *_), (implementation, *_) = zip(*map(Stacked.of, weights), strict=True)
    how = dict(dtype=dtype, implementation=implementation)
    if norm is None:
        return x, layer_matmul(x, list(stacks), layer, **how)
    weight = Stacked.of(norm.weight)
    y, x = layer_matmul(x, list(stacks), layer, norm=(weight.stack, weight.layer), eps=norm.eps, **how)
    return x, y


def rope_tables(c: Config, positions_BS):
    """cos and sin, float32 [B, S, R/2], at absolute positions (padding's -1 counts as 0)."""
    angles = jnp.maximum(positions_BS, 0)[..., None].astype(jnp.float32) * c.rope.inv_freq(c.qk_rope_head_dim)
    return jnp.cos(angles) * c.rope.attention_factor, jnp.sin(angles) * c.rope.attention_factor


def rope(x, tables, interleave: bool):
    """Rotate the last axis of x [B, S, ..., R] in float32; pairs are neighbours (interleave) or half an axis apart."""
    cos, sin = (t.reshape(*t.shape[:2], *(1,) * (x.ndim - 3), t.shape[-1]) for t in tables)
    x32 = x.astype(jnp.float32)
    a, b = (x32[..., 0::2], x32[..., 1::2]) if interleave else jnp.split(x32, 2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    out = jnp.stack([a, b], -1).reshape(x.shape) if interleave else jnp.concatenate([a, b], -1)
    return out.astype(x.dtype)


def project(c: Config, p, x_BSD, tables):
    """What one layer makes of its input: (normed input [B,S,D], normed query latent [B,S,Q], absorbed queries
    [B,S,H,U], latent cache rows [B,S,U])."""
    B, S, _ = x_BSD.shape
    N, C = c.qk_nope_head_dim, c.kv_lora_rank
    with jax.named_scope("q_proj"):
        norm = Norm(p["input_layernorm"], c.rms_norm_eps)
        h_BSD, (qa, kv) = norm_linear(x_BSD, norm, p["q_a_proj"], p["kv_a_proj_with_mqa"])
        qa_BSQ, (q,) = norm_linear(qa, Norm(p["q_a_layernorm"], 1e-6), p["q_b_proj"])
        q = q.reshape(B, S, -1, N + c.qk_rope_head_dim)
        q_rope = rope(q[..., N:], tables, c.rope_interleave)
        stack, layer, implementation = Stacked.of(p["k_b_proj"])
        if has_kernel("expert_matmul", implementation, q, stack, layer):
            q_latent = expert_matmul(q, stack, layer, implementation=implementation)  # of the first N columns
            q_BSHU = jnp.concatenate([q_latent, q_rope], -1)
        else:
            # Of many queries a concatenation would be a pass over 94 MB; columns of zeros make room beforehand.
            wide = jnp.pad(stack[layer], ((0, 0), (0, 0), (0, c.qk_rope_head_dim)))
            q_BSHU = expert_matmul(q, wide[None], 0, implementation="reference").at[..., C:].set(q_rope)
    with jax.named_scope("kv_proj"):
        latent = rms_norm(kv[..., :C], Stacked.of(p["kv_a_layernorm"]).value, 1e-6)
        latent_BSU = jnp.concatenate([latent, rope(kv[..., C:], tables, c.rope_interleave)], -1)
    return h_BSD, qa_BSQ, q_BSHU, latent_BSU


def output(p, o_BSHC, add_BSD=None):
    """Value up-projection and output projection of attention results in the latent space: [B,S,D], and ``add_BSD``."""
    with jax.named_scope("o_proj"):
        o = linear(o_BSHC, p["v_b_proj"])
        return linear(o.reshape(*o.shape[:2], -1), p["o_proj"], add=add_BSD)


def index_queries(c: Config, p, h_BSD, qa_BSQ, tables):
    """Indexer queries [B,S,I,J] and float32 head weights [B,S,I], with I^-1/2 · J^-1/2 folded into the weights."""
    B, S, _ = h_BSD.shape
    q = linear(qa_BSQ, p["wq_b"]).reshape(B, S, c.index_n_heads, c.index_head_dim)
    R = c.qk_rope_head_dim
    q_BSIJ = jnp.concatenate([rope(q[..., :R], tables, c.indexer_rope_interleave), q[..., R:]], -1)
    w_BSI = linear(h_BSD, p["weights_proj"], dtype=jnp.float32)
    return q_BSIJ, w_BSI * (c.index_n_heads * c.index_head_dim) ** -0.5


def index_keys(c: Config, p, h_BSD, tables):
    """Indexer keys [B,S,J] in h's dtype."""
    weight, bias = (Stacked.of(p[name]).value for name in ("k_norm_weight", "k_norm_bias"))
    k = layer_norm(linear(h_BSD, p["wk"]), weight, bias).astype(h_BSD.dtype)
    R = c.qk_rope_head_dim
    return jnp.concatenate([rope(k[..., :R], tables, c.indexer_rope_interleave), k[..., R:]], -1)


def quantize_e4m3(x):
    """(float8_e4m3fn values, float32 scales without the last axis) with x ≈ values · scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1), 1e-12) / 448.0
    return (x / scale[..., None]).astype(jnp.float8_e4m3fn), scale


