"""Sparse MLA forward on a TPU TensorCore: attention of each query over latent rows fetched one DMA a row.

Prefill takes ``sparse_mla_sweep_tpu`` instead where that is cheaper, decided on the device.

A grid step is one query. Its list of rows lies in SMEM; chunks of rows are fetched into two VMEM buffers in turn, so that
the scalar unit issues the next chunk's DMAs while the matrix unit works on this one. Online softmax in float32.

The row layout is this backend's own: ``row_shape(width)`` = (tiles, 2, 128) bf16 (576 columns -> 768 = 3 x 2 x 128). A TPU
packs two bf16 rows of 128 lanes into 128 words, so each such row is 1,536 contiguous bytes, in HBM and, as lines of 128
words, in VMEM: a DMA fetches it alone, its address is one shift, and no program needs a relayout of the pool.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import dispatch, reference
from . import sparse_mla_sweep_tpu as sweep_tpu

LANES = 128
CHUNK = 512  # rows a buffer holds
UNROLL = 16  # DMAs issued a loop step
MAX_HEADS = 256
LOWEST = -1e30  # finite, so that a chunk without any row gives exp(-inf) = 0 and not NaN
_NT = (((1,), (1,)), ((), ()))


def row_shape(width: int) -> tuple[int, int, int]:
    """Shape of a cache row that holds ``width`` bf16 columns: (tiles, 2, 128)."""
    return -(-width // (2 * LANES)), 2, LANES


def supported(q_BSHU, latent_pool_LMU, layer, rows_BSK, *, scale, value_dim) -> str | None:
    """None when sparse_mla can run these arguments on a TPU of any generation from v5e on, else the reason why not."""
    U, H = q_BSHU.shape[-1], q_BSHU.shape[-2]
    if q_BSHU.dtype != jnp.bfloat16 or latent_pool_LMU.dtype != jnp.bfloat16:
        return f"queries are {q_BSHU.dtype} and the pool {latent_pool_LMU.dtype}; bfloat16 is needed"
    if latent_pool_LMU.shape[2:] != row_shape(U):
        got, want = (list(s) for s in (latent_pool_LMU.shape[2:], row_shape(U)))
        return f"pool rows are {got}; {want} is needed (latent_row_shape), which a DMA fetches without a copy of the pool"
    lines = latent_pool_LMU.shape[0] * latent_pool_LMU.shape[1] * latent_pool_LMU.shape[2]
    if lines >= 2**31:
        return f"the pool has {lines} lines of 512 bytes; at most 2^31 - 1 are addressed"
    if value_dim % LANES or value_dim > U:
        return f"value_dim is {value_dim}; a multiple of {LANES} up to the width {U} is needed"
    if H > MAX_HEADS:
        return f"{H} heads; at most {MAX_HEADS} are supported"
    return None


def _columns(words):
    """[rows, 256] bf16 columns that [rows, 128] words pack: the low halves, then the high halves."""
    low = lax.bitcast_convert_type(words << 16, jnp.float32)
    high = lax.bitcast_convert_type(words & jnp.int32(-65536), jnp.float32)
    return jnp.concatenate([low.astype(jnp.bfloat16), high.astype(jnp.bfloat16)], 1)


def _kernel(chunks_ref, fetch_ref, rows_ref, q_ref, pool_ref, o_ref, lse_ref, buffer_ref, sems, *, tiles, scale):
    chunks = chunks_ref[pl.program_id(0)]
    chunk = buffer_ref.shape[1] // tiles
    words_ref = pool_ref if pool_ref.dtype == jnp.int32 else pool_ref.bitcast(jnp.int32)  # [lines, 1, 128]
    (heads, width), value_dim = q_ref.shape, o_ref.shape[1]

    def start(c, slot):
        def issue(i, carry):
            for j in range(UNROLL):
                at = i * UNROLL + j
                source = words_ref.at[pl.ds(fetch_ref[0, c * chunk + at], tiles), 0]
                pltpu.make_async_copy(source, buffer_ref.at[slot, pl.ds(at * tiles, tiles)], sems.at[slot]).start()
            return carry

        lax.fori_loop(0, chunk // UNROLL, issue, 0)

    @pl.when(chunks > 0)
    def _():
        start(0, 0)

    def step(c, carry):
        m, total, o = carry
        slot = lax.rem(c, 2)

        @pl.when(c + 1 < chunks)
        def _():
            start(c + 1, 1 - slot)

        # One wait for the bytes of the whole chunk.
        pltpu.make_async_copy(buffer_ref.at[slot], buffer_ref.at[slot], sems.at[slot]).wait()
        latent = [_columns(buffer_ref[slot, pl.ds(t, chunk, stride=tiles), :]) for t in range(tiles)]
        latent = jnp.concatenate(latent, 1)[:, :width]
        scores = lax.dot_general(q_ref[...], latent, _NT, preferred_element_type=jnp.float32)
        here = pl.ds(pl.multiple_of(c * chunk, chunk), chunk) if rows_ref.shape[1] > chunk else slice(None)
        held = rows_ref[:, here] >= 0
        scores = jnp.where(held, scores * scale, -jnp.inf)
        new = jnp.maximum(m, scores.max(1, keepdims=True))
        p = jnp.exp(scores - new)
        fade = jnp.exp(m - new)
        total = total * fade + p.sum(1, keepdims=True)
        o = o * fade + jnp.dot(p.astype(jnp.bfloat16), latent[:, :value_dim], preferred_element_type=jnp.float32)
        return new, total, o

    zeros = lambda n: jnp.zeros((heads, n), jnp.float32)
    begin = (jnp.full((heads, 1), LOWEST, jnp.float32), zeros(1), zeros(value_dim))
    m, total, o = lax.fori_loop(0, chunks, step, begin)
    safe = jnp.where(total > 0, total, 1.0)
    o_ref[...] = (o / safe).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(total > 0, m + jnp.log(safe), -jnp.inf)


def _lines(pool):
    """The pool as kernels take it: [lines, 2, 128] bf16, a view. The interpreter, which cannot bitcast it, takes words."""
    lines = pool.reshape(-1, *pool.shape[3:])
    return lax.bitcast_convert_type(lines.swapaxes(1, 2), jnp.int32)[:, None] if dispatch.interpreting() else lines


def _forward(q_BSHU, pool, layer, rows_BSK, scale, value_dim):
    rows_BSK = rows_BSK.astype(jnp.int32)
    gather = lambda: _gather(q_BSHU, pool, layer, rows_BSK, scale, value_dim)
    if sweep_tpu.supported(q_BSHU, pool):
        return gather()
    sweep = lambda: sweep_tpu.sweep(
        q_BSHU, _lines(pool), layer, rows_BSK, scale, value_dim, pool_rows=pool.shape[1], lines_of_row=pool.shape[2],
        columns=_columns,
    )  # fmt: skip
    return lax.cond(sweep_tpu.cheaper(rows_BSK, q_BSHU.shape[2], pool.shape[1]), sweep, gather)


def _gather(q_BSHU, pool, layer, rows_BSK, scale, value_dim):
    (B, S, H, U), K = q_BSHU.shape, rows_BSK.shape[-1]
    N, M, tiles = B * S, pool.shape[1], pool.shape[2]
    chunk = CHUNK if K > CHUNK else -(-K // UNROLL) * UNROLL
    rows_NK = jnp.pad(rows_BSK.reshape(N, K), ((0, 0), (0, -K % chunk)), constant_values=-1)
    slots = rows_NK.shape[1]
    at_K = jnp.arange(slots, dtype=jnp.int32)
    # Chunks after a query's last row are not fetched. Holes fetch some distinct row, which the mask then leaves out.
    chunks_N = (jnp.where(rows_NK >= 0, at_K + 1, 0).max(1) + chunk - 1) // chunk
    lines_NK = (layer * M + jnp.where(rows_NK >= 0, rows_NK, at_K % M)) * tiles
    lines = _lines(pool)
    width = -(-U // LANES) * LANES
    q_NHU = jnp.pad(q_BSHU.reshape(N, H, U), ((0, 0), (0, 0), (0, width - U)))
    block = lambda *shape: pl.BlockSpec((None, *shape), lambda n, *_: (n, 0, 0))
    o, lse = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N,),
            in_specs=[
                pl.BlockSpec((None, 1, slots), lambda n, *_: (n, 0, 0), memory_space=pltpu.SMEM),
                block(1, slots),
                block(H, width),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[block(H, value_dim), block(H, 1)],
            scratch_shapes=[pltpu.VMEM((2, chunk * tiles, LANES), jnp.int32), pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=[jax.ShapeDtypeStruct((N, H, value_dim), q_BSHU.dtype), jax.ShapeDtypeStruct((N, H, 1), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), disable_bounds_checks=True),
        name="sparse_mla",
    )(chunks_N, lines_NK[:, None], rows_NK[:, None], q_NHU, lines)
    return o.reshape(B, S, H, value_dim), lse.reshape(B, S, H)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_BSHU, pool, layer, rows_BSK, scale, value_dim):
    return _forward(q_BSHU, pool, layer, rows_BSK, scale, value_dim)


def _attend_fwd(q_BSHU, pool, layer, rows_BSK, scale, value_dim):
    return _forward(q_BSHU, pool, layer, rows_BSK, scale, value_dim), (q_BSHU, pool, layer, rows_BSK)


def _attend_bwd(scale, value_dim, saved, gradients):
    q_BSHU, pool, layer, rows_BSK = saved
    # The reference recomputes each block of queries under jax.checkpoint, so nothing of size [S, K] is kept.
    again = lambda q, pool: reference.sparse_mla(q, pool, layer, rows_BSK, scale=scale, value_dim=value_dim)
    return *jax.vjp(again, q_BSHU, pool)[1](gradients), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.jit, static_argnames=("scale", "value_dim"))
def sparse_mla(q_BSHU, latent_pool_LMU, layer, rows_BSK, *, scale, value_dim):
    """Attention of each query over its selected rows: o [B,S,H,value_dim], lse float32 [B,S,H] (natural log).

    Contract: ``pallas_kernels.sparse_mla``, with the pool in this backend's layout, bf16 [L, M, *row_shape(U)], read in
    place by layer number. The backward pass is the reference's. Raises NotImplementedError with ``supported``'s reason.
    """
    reason = supported(q_BSHU, latent_pool_LMU, layer, rows_BSK, scale=scale, value_dim=value_dim)
    if reason:
        raise NotImplementedError(reason)
    layer = jnp.asarray(layer, jnp.int32)
    return _attend(q_BSHU, latent_pool_LMU, layer, jnp.asarray(rows_BSK), float(scale), value_dim)
