"""Exact jnp implementations: the meaning of every op, used wherever no kernel applies.

All are blocked, so their workspace stays bounded whatever the context, and their loops stop at the longest sequence,
so an empty cache costs nothing. They run on any platform and are differentiable (selection aside; ``dense_mla``, whose
loop ends where the data says, forwards only).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .layout import unpack_rows
from .row_plan import RowPlan, physical_rows, ungroup

WORKSPACE = 64 * 2**20  # bytes of scratch that a block may take
_LOWEST = float(jnp.finfo(jnp.float32).min)
_NO_POSITION = jnp.iinfo(jnp.int32).max


def _einsum(spec, *args):
    # fp8 has no products of its own here; bf16 holds every e4m3 value exactly.
    args = [a.astype(jnp.bfloat16) if a.dtype.itemsize == 1 else a for a in args]
    return jnp.einsum(spec, *args, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def index_scores(q_SIJ, w_SI, keys_TJ, scales_T=None):
    """float32 [S, T] lightning-indexer scores ``sum_i w·relu(q_i·k)`` (DeepSeek-V3.2 report, eq. 1)."""
    dots = _einsum("sij,tj->sit", q_SIJ, keys_TJ)
    scores_ST = _einsum("sit,si->st", jax.nn.relu(dots), w_SI.astype(jnp.float32))
    return scores_ST if scales_T is None else scores_ST * scales_T


def scores_at(q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BSK, page_size: int):
    """float32 [B,S,K] scores of chosen positions, in ``canonical`` form; the lowest where the position is -1."""
    keys_GMJ, scales_GM = jax.tree.map(jnp.asarray, tuple(index_pool))
    B, S, K = positions_BSK.shape
    rows_BSK = physical_rows(page_table_BP, positions_BSK, page_size)

    def one(args):
        q_IJ, w_I, rows_K = args
        at = jnp.maximum(rows_K, 0)
        scales_K = None if scales_GM is None else scales_GM[slot, at]
        scores_K = canonical(index_scores(q_IJ[None], w_I[None], keys_GMJ[slot, at], scales_K)[0])
        return jnp.where(rows_K < 0, _LOWEST, scores_K)

    each = jax.tree.map(lambda a: a.reshape(B * S, *a.shape[2:]), (q_BSIJ, w_BSI, rows_BSK))
    block = max(1, WORKSPACE // (4 * K * (q_BSIJ.shape[2] + q_BSIJ.shape[3])))
    return lax.map(one, each, batch_size=min(block, B * S)).reshape(B, S, K)


def canonical(scores):
    """Scores as selection orders them: -0 equals +0, NaN and -inf rank lowest (as the smallest float32)."""
    scores = jnp.where(jnp.isnan(scores), _LOWEST, jnp.maximum(scores, _LOWEST))
    return jnp.where(scores == 0, 0.0, scores)


def index_topk(q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B, *, k: int, page_size: int):
    """See ``pallas_kernels.index_topk``. Streams over key tiles, keeping the k best so far: exact, O(k + tile) memory."""
    keys_GMJ, scales_GM = jax.tree.map(jnp.asarray, tuple(index_pool))
    B, S, I, _ = q_BSIJ.shape
    capacity = page_table_BP.shape[1] * page_size
    tile = min(capacity, page_size * max(1, 2048 // page_size))
    block = min(S, max(1, WORKSPACE // (4 * I * tile)))

    def merge(best, tile_scores, tile_positions):
        scores = jnp.concatenate([best[0], tile_scores], -1)
        positions = jnp.concatenate([best[1], jnp.broadcast_to(tile_positions, tile_scores.shape)], -1)
        # top_k is stable and the running best holds the lower positions, so ties go to the lowest position.
        top, at = lax.top_k(scores, k)
        return top, jnp.take_along_axis(positions, at, -1)

    def select(q_SIJ, w_SI, positions_S, pages_P, length):
        limit_S = jnp.minimum(positions_S + 1, length)

        def step(i, best):
            at_T = i * tile + jnp.arange(tile, dtype=jnp.int32)
            rows_T = physical_rows(pages_P[None], jnp.minimum(at_T, capacity - 1)[None], page_size)[0]
            scales_T = None if scales_GM is None else scales_GM[slot, rows_T]
            with jax.named_scope("scores"):
                scores_ST = canonical(index_scores(q_SIJ, w_SI, keys_GMJ[slot, rows_T], scales_T))
            with jax.named_scope("select"):
                return merge(best, jnp.where(at_T < limit_S[:, None], scores_ST, -jnp.inf), at_T)

        best = (jnp.full((block, k), -jnp.inf), jnp.full((block, k), _NO_POSITION))
        scores_SK, positions_SK = lax.fori_loop(0, (limit_S.max() + tile - 1) // tile, step, best)
        return jnp.where(scores_SK == -jnp.inf, _NO_POSITION, positions_SK)

    def score_and_select():
        n = -(-S // block)
        pad = lambda a, fill: jnp.pad(a, ((0, 0), (0, n * block - S)) + ((0, 0),) * (a.ndim - 2), constant_values=fill)
        blocks = lambda a, fill=0: pad(a, fill).reshape(B * n, block, *a.shape[2:])
        each = (
            blocks(q_BSIJ), blocks(w_BSI), blocks(positions_BS, -1),
            jnp.repeat(page_table_BP, n, 0), jnp.repeat(lengths_B, n, 0),
        )  # fmt: skip
        per_step = max(1, WORKSPACE // (4 * I * tile * block))
        found = lax.map(lambda a: select(*a), each, batch_size=min(per_step, B * n))
        found_BSK = found.reshape(B, n * block, k)[:, :S]
        found_BSK = jnp.sort(found_BSK, -1)
        return jnp.where(found_BSK == _NO_POSITION, -1, found_BSK)

    def everything():
        at_K = jnp.arange(k, dtype=jnp.int32)
        return jnp.where(at_K < jnp.minimum(positions_BS + 1, lengths_B[:, None])[..., None], at_K, -1)

    # While no query sees more than k tokens there is nothing to choose, and nothing is scored.
    chosen_BSK = lax.cond(positions_BS.max() < k, everything, score_and_select)
    return chosen_BSK, (chosen_BSK >= 0).sum(-1, dtype=jnp.int32)


def plan_rows(positions_BSK, page_table_BP, heads, latent_pool_LMU, *, page_size: int):
    """See ``pallas_kernels.plan_rows``. Gathering one by one has no use for groups."""
    del heads, latent_pool_LMU
    return RowPlan(physical_rows(page_table_BP, positions_BSK, page_size))


def sparse_mla(q_BSHU, latent_pool_LMU, layer, rows_BSK, *, scale: float, value_dim: int, groups=None):
    """See ``pallas_kernels.sparse_mla``. Gathers a block of queries' rows at a time; groups are taken apart again."""
    latent_pool_LMU, rows_BSK = jnp.asarray(latent_pool_LMU), jnp.asarray(rows_BSK)
    rows_BSK = rows_BSK if groups is None else ungroup(groups, rows_BSK.shape)
    B, S, H, U = q_BSHU.shape
    K = rows_BSK.shape[-1]

    @jax.checkpoint
    def attend(q_HU, rows_K):
        latent_KU = unpack_rows(latent_pool_LMU[layer, jnp.maximum(rows_K, 0)], U)
        scores_HK = _einsum("hu,ku->hk", q_HU, latent_KU) * scale
        # Masks before exp and log keep the gradient of an empty query at zero, not NaN.
        m_H1 = lax.stop_gradient(jnp.where(rows_K >= 0, scores_HK, _LOWEST).max(-1, keepdims=True))
        p_HK = jnp.where(rows_K >= 0, jnp.exp(jnp.where(rows_K >= 0, scores_HK - m_H1, 0.0)), 0.0)
        sum_H = p_HK.sum(-1)
        safe_H = jnp.where(sum_H > 0, sum_H, 1.0)
        o_HC = _einsum("hk,kc->hc", p_HK.astype(latent_KU.dtype), latent_KU[:, :value_dim]) / safe_H[:, None]
        return o_HC.astype(q_HU.dtype), jnp.where(sum_H > 0, m_H1[:, 0] + jnp.log(safe_H), -jnp.inf)

    block = max(1, WORKSPACE // (K * (U * latent_pool_LMU.dtype.itemsize + 8 * H)))
    each = (q_BSHU.reshape(B * S, H, U), rows_BSK.reshape(B * S, K))
    o_NHC, lse_NH = lax.map(lambda a: attend(*a), each, batch_size=min(block, B * S))
    return o_NHC.reshape(B, S, H, value_dim), lse_NH.reshape(B, S, H)


def dense_mla(q_BSHU, latent_pool_LMU, layer, page_table_BP, positions_BS, *, scale, value_dim, page_size):
    """See ``pallas_kernels.dense_mla``. Online softmax over key tiles, up to the last position of the call."""
    latent_pool_LMU = jnp.asarray(latent_pool_LMU)
    B, S, H, U = q_BSHU.shape
    capacity = page_table_BP.shape[1] * page_size
    tile = min(capacity, page_size * max(1, 1024 // page_size))
    block = min(S, max(1, WORKSPACE // (8 * H * tile)))

    def attend(q_SHU, positions_S, pages_P):
        def step(i, carry):
            m_SH, sum_SH, o_SHC = carry
            at_T = i * tile + jnp.arange(tile, dtype=jnp.int32)
            rows_T = physical_rows(pages_P[None], jnp.minimum(at_T, capacity - 1)[None], page_size)[0]
            latent_TU = unpack_rows(latent_pool_LMU[layer, rows_T], U)
            scores_SHT = _einsum("shu,tu->sht", q_SHU, latent_TU) * scale
            scores_SHT = jnp.where(at_T <= positions_S[:, None, None], scores_SHT, -jnp.inf)
            new_SH = jnp.maximum(m_SH, scores_SHT.max(-1))
            safe_SH = jnp.where(new_SH == -jnp.inf, 0.0, new_SH)
            p_SHT = jnp.exp(scores_SHT - safe_SH[..., None])
            fade_SH = jnp.exp(m_SH - safe_SH)
            pv_SHC = _einsum("sht,tc->shc", p_SHT.astype(latent_TU.dtype), latent_TU[:, :value_dim])
            return new_SH, sum_SH * fade_SH + p_SHT.sum(-1), o_SHC * fade_SH[..., None] + pv_SHC

        start = (jnp.full((block, H), -jnp.inf), jnp.zeros((block, H)), jnp.zeros((block, H, value_dim)))
        m_SH, sum_SH, o_SHC = lax.fori_loop(0, (positions_S.max() + tile) // tile, step, start)
        safe_SH = jnp.where(sum_SH == 0, 1.0, sum_SH)
        return (o_SHC / safe_SH[..., None]).astype(q_SHU.dtype), m_SH + jnp.log(safe_SH)

    n = -(-S // block)
    pad = lambda a, fill: jnp.pad(a, ((0, 0), (0, n * block - S)) + ((0, 0),) * (a.ndim - 2), constant_values=fill)
    each = (
        pad(q_BSHU, 0).reshape(B * n, block, H, U),
        pad(positions_BS, -1).reshape(B * n, block),
        jnp.repeat(page_table_BP, n, 0),
    )
    per_step = max(1, WORKSPACE // (8 * H * tile * block))
    o, lse = lax.map(lambda a: attend(*a), each, batch_size=min(per_step, B * n))
    return o.reshape(B, n * block, H, value_dim)[:, :S], lse.reshape(B, n * block, H)[:, :S]


def grouped_matmul(x_ND, w_LEDF, layer, group_sizes_E):
    """See ``pallas_kernels.grouped_matmul``."""
    n, experts = x_ND.shape[0], w_LEDF.shape[1]
    if n <= experts:  # few rows: read only the experts that were chosen
        expert_N = jnp.repeat(jnp.arange(experts), group_sizes_E, total_repeat_length=n)
        y_NF = jnp.einsum("nd,ndf->nf", x_ND, w_LEDF[layer, expert_N], preferred_element_type=jnp.float32)
        return y_NF.astype(x_ND.dtype)
    return lax.ragged_dot(x_ND, w_LEDF[layer], group_sizes_E).astype(x_ND.dtype)


def grouped_swiglu(x_ND, gate_LEDF, up_LEDF, layer, group_sizes_E, product=grouped_matmul):
    """See ``pallas_kernels.grouped_swiglu``; ``product``: the ``grouped_matmul`` of a backend."""
    gate_NF, up_NF = (product(x_ND, w_LEDF, layer, group_sizes_E) for w_LEDF in (gate_LEDF, up_LEDF))
    return jax.nn.silu(gate_NF) * up_NF


def rms_norm(x, weight, eps: float):
    """x / rms(x) · weight over the last axis: statistics in float32, result in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (x32.astype(x.dtype) * weight).astype(x.dtype)


def each(dtype, stacks) -> tuple:
    """A dtype for each of the stacks: one for all, or a tuple of theirs."""
    return dtype if isinstance(dtype, tuple) else (dtype,) * len(stacks)


def layer_matmul(x, w, layer, dtype=None, norm=None, eps=None, add=None):
    """See ``pallas_kernels.layer_matmul``."""
    if norm is not None:
        x = rms_norm(x, norm[0][norm[1]], eps)
        return layer_matmul(x, w, layer, dtype), x
    if add is not None:
        return jax.tree.map(lambda y: y + add, layer_matmul(x, w, layer, dtype))
    spec = "...d,fd->...f" if jax.tree.leaves(w)[0].ndim == 3 else "...hd,hfd->...hf"
    # Where float32 is asked for, its factors are not rounded.
    precision = lambda dtype: "highest" if x.dtype == dtype == jnp.float32 else None
    einsum = lambda w, d: jnp.einsum(spec, x, w[layer], preferred_element_type=d, precision=precision(d))
    product = lambda w, d: einsum(w, d).astype(d or x.dtype)
    stacks, tree = jax.tree.flatten(w)
    return tree.unflatten(map(product, stacks, each(dtype, stacks)))


def expert_matmul(x, w, layer, expert=None, dtype=None):
    """See ``pallas_kernels.expert_matmul``."""
    x = x[..., : jax.tree.leaves(w)[0].shape[-2]]
    if expert is None:
        x_END = x.reshape(-1, *x.shape[-2:]).swapaxes(0, 1)

        def product(w):
            # Not an einsum by row: XLA's GPU compiler would lay that out as [E, F, rows], for somebody else to turn.
            y_ENF = jnp.matmul(x_END, w[layer], preferred_element_type=dtype).astype(dtype or x.dtype)
            return y_ENF.swapaxes(0, 1).reshape(*x.shape[:-1], -1)

    else:
        x = x.reshape(*x.shape[:-1], *(1,) * (expert.ndim - x.ndim + 1), x.shape[-1])
        product = lambda w: jnp.einsum(
            "...d,...df->...f", x, w[layer, expert], preferred_element_type=jnp.float32
        ).astype(dtype or x.dtype)  # fmt: skip
    return jax.tree.map(product, w)
