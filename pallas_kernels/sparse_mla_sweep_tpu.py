"""Sparse MLA prefill on TPU, below the crossover: neighbouring queries sweep the cache together, each under its own mask.

Issuing one DMA a row costs the scalar unit 5 bundles, whatever the number of heads; 16 neighbours that together read whole
tiles of the cache pay one DMA a tile, and the matrix unit masks what a query has not selected. The result is that of
``sparse_mla_tpu``, to rounding. It costs a term linear in the span of the selected rows, so that ``cheaper`` decides on the
device. Rows of the score product are (head, 8 queries): one 8 x 128 mask register serves all heads.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import dispatch

LANES, ROWS = 128, 8
TILE = 2048  # cache rows a step, at most
PAGE = 256  # the least
WORD = 32 * LANES  # cache rows whose mask one int32 of 128 lanes holds: bit j of lane l is row 128 j + l
MOST_ROWS = 2**18  # of a pool: the masks of 8 queries take a bit a row, 256 KiB
LOWEST = -1e30
# Static schedules (benchmarks/results/tpu_static.md): bundles for a cache row and 8 queries, at 0 heads and for each head;
# for a selected row, to set its bit, and to fetch and use it.
SWEEP = {"v5e": (0.1, 0.13), "v5p": (0.1, 0.13), "v6e": (0.1, 0.051), "v7x": (0.1, 0.036), "interpreter": (0.1, 0.051)}
MASK, GATHER, GATHER_HEAD = 0.12, 5.7, 0.008
_NT = (((1,), (1,)), ((), ()))


def eights(heads: int, queries: int) -> int:
    """Groups of 8 queries that sweep together."""
    most = max(1, min(640 // (heads * ROWS), -(-queries // ROWS)))
    return 1 << (min(most, 4).bit_length() - 1)


def tile_for(pool_rows: int) -> int:
    """Cache rows a step: a power of two that divides the pool."""
    return min(TILE, pool_rows & -pool_rows)


def supported(q_BSHU, pool) -> str | None:
    """Why a sweep cannot serve this call, or None."""
    if q_BSHU.shape[1] < ROWS:
        return f"{q_BSHU.shape[1]} queries a sequence; a sweep is for {ROWS} or more"
    if pool.shape[1] % PAGE or pool.shape[1] > MOST_ROWS:
        return f"the pool has {pool.shape[1]} rows; a sweep needs a multiple of {PAGE}, at most {MOST_ROWS}"
    return None


def cheaper(rows_BSK, heads: int, pool_rows: int):
    """Whether a sweep over the span of each group's rows costs less than one DMA a row: a boolean scalar."""
    B, S, _ = rows_BSK.shape
    group, tile = eights(heads, S) * ROWS, tile_for(pool_rows)
    least = jnp.where(rows_BSK >= 0, rows_BSK, pool_rows).min(-1) // tile
    most = rows_BSK.max(-1) // tile
    pad = lambda a, fill: jnp.pad(a, ((0, 0), (0, -S % group)), constant_values=fill).reshape(B, -1, group)
    tiles = jnp.maximum(pad(most, -1).max(-1) - pad(least, pool_rows).min(-1) + 1, 0).sum()
    fetched = (rows_BSK >= 0).sum(dtype=jnp.float32)
    base, a_head = SWEEP[dispatch.target().chip]
    sweep = tiles.astype(jnp.float32) * (tile * (group // ROWS)) * (base + a_head * heads)
    return sweep + fetched * MASK < fetched * (GATHER + GATHER_HEAD * heads)


def _bits_kernel(rows_ref, out_ref):
    words, K = out_ref.shape[0], rows_ref.shape[1]
    part = lax.broadcasted_iota(jnp.int32, (4 * words, K), 0)
    lane = lax.broadcasted_iota(jnp.int32, (LANES, K), 0)
    for r in range(ROWS):
        row = rows_ref[r : r + 1, :]
        byte = jnp.where(row >= 0, ((row >> 10) & 3) * words + (row >> 12), -1)
        value = (1 << ((row >> 7) & 7)).astype(jnp.float32)
        left = jnp.where(part == byte, value, 0.0).astype(jnp.bfloat16)
        right = jnp.where(lane == (row & (LANES - 1)), 1.0, 0.0).astype(jnp.bfloat16)
        found = lax.dot_general(left, right, _NT, preferred_element_type=jnp.float32).astype(jnp.int32)
        quarters = [found[i * words : (i + 1) * words] << (8 * i) for i in range(4)]
        out_ref[:, r, :] = functools.reduce(jnp.bitwise_or, quarters)


def row_bits(rows_NK, pool_rows: int):
    """int32 [N / 8, words, 8, 128] masks of the cache rows that each query selects (see WORD); N a multiple of 8.

    A row's byte of the mask is a sum of distinct powers of two over its K entries, two one-hot matrices multiplied: exact.
    """
    N, K = rows_NK.shape
    words = -(-pool_rows // (WORD * ROWS)) * ROWS
    rows_NK = jnp.pad(rows_NK, ((0, 0), (0, -K % LANES)), constant_values=-1)
    return pl.pallas_call(
        _bits_kernel,
        grid=(N // ROWS,),
        in_specs=[pl.BlockSpec((ROWS, rows_NK.shape[1]), lambda n: (n, 0))],
        out_specs=pl.BlockSpec((None, words, ROWS, LANES), lambda n: (n, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((N // ROWS, words, ROWS, LANES), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=40 * 2**20),
        name="row_bits",
    )(rows_NK)


def _touched(bits, tile: int, pool_rows: int):
    """(int32 [groups, tiles] numbers of the tiles in which a group selects, first ones first; int32 [groups] how many)."""
    chunks = tile // LANES
    any_of = jax.lax.reduce(bits, jnp.int32(0), lax.bitwise_or, (1, 3, 4))  # [groups, words]
    shifts = jnp.arange(32 // chunks, dtype=jnp.int32) * chunks
    hit = ((any_of[..., None] >> shifts) & ((1 << chunks) - 1)) != 0
    hit = hit.reshape(hit.shape[0], -1)[:, : pool_rows // tile]
    return jnp.argsort(~hit, axis=-1, stable=True).astype(jnp.int32), hit.sum(-1, dtype=jnp.int32)


def _kernel(first_ref, counts_ref, tiles_ref, q_ref, bits_ref, pool_ref, o_ref, lse_ref, buffer_ref, m_ref, sum_ref,
            sums_ref, sems, *, columns, lines, scale):  # fmt: skip
    count = counts_ref[pl.program_id(0)]
    words_ref = pool_ref if pool_ref.dtype == jnp.int32 else pool_ref.bitcast(jnp.int32)  # [lines, 1, 128]
    rows, width = q_ref.shape
    tile, value_dim = buffer_ref.shape[1] // lines, o_ref.shape[1]
    chunks = tile // LANES
    heads = rows // (bits_ref.shape[0] * ROWS)
    m_ref[...] = jnp.full(m_ref.shape, LOWEST, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

    def fetch(i, slot):
        at = pl.ds(first_ref[0] + tiles_ref[0, i] * (tile * lines), tile * lines)
        return pltpu.make_async_copy(words_ref.at[at, 0], buffer_ref.at[slot], sems.at[slot])

    @pl.when(count > 0)
    def _():
        fetch(0, 0).start()

    def step(i, carry):
        slot = lax.rem(i, 2)

        @pl.when(i + 1 < count)
        def _():
            fetch(i + 1, 1 - slot).start()

        word, first = tiles_ref[0, i] // (32 // chunks), lax.rem(tiles_ref[0, i], 32 // chunks) * chunks
        held = []
        for e in range(bits_ref.shape[0]):
            bits = bits_ref[e, word] >> first
            mask = jnp.concatenate([(bits >> c) & 1 for c in range(chunks)], 1)
            held.append(jnp.broadcast_to(mask[None], (heads, ROWS, tile)).reshape(heads * ROWS, tile))
        fetch(i, slot).wait()
        latent = jnp.concatenate([columns(buffer_ref[slot, pl.ds(t, tile, stride=lines), :]) for t in range(lines)], 1)
        scores = lax.dot_general(q_ref[...], latent[:, :width], _NT, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.concatenate(held) != 0, scores * scale, -jnp.inf)
        m = m_ref[...]
        new = jnp.maximum(m, scores.max(1, keepdims=True))
        p = jnp.exp(scores - new)
        fade = jnp.exp(m - new)
        m_ref[...] = new
        sum_ref[...] = sum_ref[...] * fade + p.sum(1, keepdims=True)
        pv = jnp.dot(p.astype(jnp.bfloat16), latent[:, :value_dim], preferred_element_type=jnp.float32)
        sums_ref[...] = sums_ref[...] * fade + pv
        return carry

    lax.fori_loop(0, count, step, 0)
    total = sum_ref[...]
    safe = jnp.where(total > 0, total, 1.0)
    o_ref[...] = (sums_ref[...] / safe).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(total > 0, m_ref[...] + jnp.log(safe), -jnp.inf)


def sweep(q_BSHU, lines, layer, rows_BSK, scale, value_dim, *, pool_rows: int, lines_of_row: int, columns):
    """(o [B,S,H,value_dim], lse float32 [B,S,H]) of queries over distinct rows.

    Args:
      lines: the pool as ``sparse_mla_tpu`` hands it to its kernels; ``lines_of_row`` of them hold a row, ``columns`` turns
        words into bf16 columns. pool_rows: rows of a layer.
    """
    B, S, H, U = q_BSHU.shape
    K, E = rows_BSK.shape[-1], eights(H, S)
    G = -(-S // (E * ROWS))  # groups of a sequence
    tile = tile_for(pool_rows)
    pad = ((0, 0), (0, G * E * ROWS - S))
    rows_NK = jnp.pad(rows_BSK, (*pad, (0, 0)), constant_values=-1).reshape(-1, K)
    bits = row_bits(rows_NK, pool_rows)
    bits = bits.reshape(B * G, E, *bits.shape[1:])
    order, counts = _touched(bits, tile, pool_rows)
    width = -(-U // LANES) * LANES
    q = jnp.pad(q_BSHU, (*pad, (0, 0), (0, width - U))).reshape(B * G, E, ROWS, H, width)
    q = q.swapaxes(2, 3).reshape(B * G, E * H * ROWS, width)
    R = q.shape[1]
    block = lambda *shape: pl.BlockSpec((None, *shape), lambda n, *_: (n,) + (0,) * len(shape))
    o, lse = pl.pallas_call(
        functools.partial(_kernel, columns=columns, lines=lines_of_row, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B * G,),
            in_specs=[
                pl.BlockSpec((None, 1, order.shape[1]), lambda n, *_: (n, 0, 0), memory_space=pltpu.SMEM),
                block(R, width),
                block(*bits.shape[1:]),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[block(R, value_dim), block(R, 1)],
            scratch_shapes=[
                pltpu.VMEM((2, tile * lines_of_row, LANES), jnp.int32),
                pltpu.VMEM((R, 1), jnp.float32),
                pltpu.VMEM((R, 1), jnp.float32),
                pltpu.VMEM((R, value_dim), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B * G, R, value_dim), q_BSHU.dtype), jax.ShapeDtypeStruct((B * G, R, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=50 * 2**20, disable_bounds_checks=True
        ),
        name="sparse_mla_sweep",
    )((layer * (pool_rows * lines_of_row)).reshape(1), counts, order[:, None], q, bits, lines)  # fmt: skip
    undo = lambda a: a.reshape(B, G, E, H, ROWS, -1).swapaxes(3, 4).reshape(B, -1, H, a.shape[-1])[:, :S]
    return undo(o), undo(lse)[..., 0]
