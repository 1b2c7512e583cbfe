"""Sparse MLA forward on Hopper (Pallas Mosaic GPU): attention over a gathered set of latent rows.

Stands behind `sparse_mla` of the dispatch. One tile is up to 64 (query, head) rows that share one list of cache rows. A
block of three warpgroups walks the list 64 rows a step: one gathers into two swizzled buffers, two compute. The score
tile of even steps belongs to the first consumer, of odd steps to the second, so that one's softmax runs under the
other's products. Each accumulates half of the 512 output columns; the other's probabilities reach it through SMEM,
where they replace the rope columns, which only the score needed.

The kernel serves prefill (a persistent grid over tiles), decode (each list split over blocks, the parts merged by LSE
in `sparse_mla_decode_gpu.py`) and groups of queries that share a list (`sparse_mla_grouped_gpu.py`).
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .sparse_mla_decode_gpu import MOST_SPLITS, merge
from .sparse_mla_device_gpu import (
    BLOCK,
    COL,
    COLUMNS,
    LATENT,
    ROW,
    SWIZZLE,
    WIDTH,
    count_rows,
    gather,
    init_barriers,
    load_rows,
    opaque_zero,
    store_rows,
    wait_full,
)  # fmt: skip

HALF, PAIR = LATENT // 2, 2 * BLOCK
SMS = 132  # multiprocessors of an H100 or H200 SXM: the persistent grid
LOG2E = math.log2(math.e)
LOWEST = -1e30  # finite, so that a row without any key gives exp2(-inf) = 0 and not NaN
PARAMS = plgpu.CompilerParams(
    approx_math=True,
    reduction_scratch_bytes=0,  # SMEM is full
    unsafe_no_auto_barriers=True,  # every hand-over has its own barrier
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


class Plan(typing.NamedTuple):
    """One launch: `tiles_per_list` tiles of `heads` rows; each list in `splits` parts of `span` entries."""

    tiles_per_list: int
    heads: int
    splits: int
    span: int
    grid: int
    group: int = 1  # neighbouring queries that share a list
    groups: int = 1  # lists of one sequence then


def _kernel(
    q_RW, pool_LMW, layer_1, rows_QK, *refs,
    bars, empty, kv_smem, q_empty, q_smem, ready, stat_smem, swap, word_smem, plan, scale, H,
):  # fmt: skip
    """The kernel body, see the module docstring.

    q_RW [queries*H, 576]; rows_QK [lists, K]; refs: owners [lists, K] and counts [lists] of groups, then the outputs
    o [splits, queries*H, 512] and lse [splits, queries*H].
    """
    owners_QK, counts_Q, o_SRC, lse_SR = refs if plan.group > 1 else (None, None, *refs)
    Q, K = rows_QK.shape
    M = pool_LMW.shape[1]
    worker, wg = lax.axis_index("worker"), lax.axis_index("wg")
    mine = lax.div(Q * plan.tiles_per_list * plan.splits - worker + plan.grid - 1, plan.grid)
    parts = len(COLUMNS)
    init_barriers(bars, (256,) * (3 * parts))  # steps of even and odd number, queries

    def tile_of(n):
        """List, first row of q and how many, split, first entry, end of the entries, pairs of steps."""
        t = worker + n * plan.grid
        split, t = lax.rem(t, plan.splits), lax.div(t, plan.splits)
        part, query = lax.rem(t, plan.tiles_per_list), lax.div(t, plan.tiles_per_list)
        if plan.group > 1:
            of_sequence = q_RW.shape[0] // (Q // plan.groups)
            start, limit = lax.rem(query, plan.groups) * plan.heads, counts_Q[query]
            first, count = lax.div(query, plan.groups) * of_sequence + start, jnp.minimum(plan.heads, of_sequence - start)
            return query, first, count, 0, 0, limit, jnp.maximum(1, pl.cdiv(limit, PAIR))
        head, start = part * plan.heads, split * plan.span
        count, limit = jnp.minimum(plan.heads, H - head), jnp.minimum(K, start + plan.span)
        return query, query * H + head, count, split, start, limit, plan.span // PAIR

    @pl.when(wg == 2)
    def _producer():
        plgpu.set_max_registers(72, action="decrease")
        offset = layer_1[0] * M

        def fetch(query, start, step, limit):
            args = query, start + step * BLOCK, limit
            owners = load_rows(owners_QK, *args, 2**31 - 1) if plan.group > 1 else None
            return load_rows(rows_QK, *args, M), owners

        def tile(n, done):
            query, first, count, _, start, limit, pairs = tile_of(n)
            upcoming = fetch(query, start, 0, limit)

            @pl.when(n > 0)
            def _():
                plgpu.barrier_wait(q_empty)

            gather(q_RW, jnp.int32(0), count_rows(first, count), q_smem.at[0], bars, 2 * parts)

            def pair(j, upcoming):
                for slot in range(2):
                    rows, owners = upcoming
                    # The next step's row numbers arrive while this one waits for its buffer.
                    upcoming = fetch(query, start, 2 * j + slot + 1, limit)
                    pl.when(done + j > 0)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
                    gather(pool_LMW, offset, rows, kv_smem.at[slot], bars, slot * parts, word_smem.at[slot], owners)
                return upcoming

            lax.fori_loop(0, pairs, pair, upcoming)
            return done + pairs

        lax.fori_loop(0, mine, tile, jnp.int32(0))

    def consumer(me):
        """Consumer `me` of two: it scores the steps of its parity and accumulates columns 256*me and up."""
        plgpu.set_max_registers(216, action="increase")
        other = 1 - me
        columns, probs = pl.ds(me * HALF, HALF), pl.ds(LATENT, BLOCK)

        def score(slot, turn, bit):
            def body(acc):
                for n, (start, stop) in enumerate(COLUMNS):
                    wait_full(bars, (me * parts + n,), turn)
                    at = pl.ds(64 * start, 64 * (stop - start))
                    plgpu.wgmma(acc, q_smem.at[slot - me, :, at], kv_smem.at[slot, :, at].T)
                return acc[...]

            s = pl.run_scoped(body, plgpu.ACC((64, BLOCK), jnp.float32))
            word = lax.broadcast_in_dim(plgpu.load(word_smem.at[slot], layout=COL), s.shape, [1])
            if plan.group > 1:
                return jnp.where((word & bit) != 0, s * (scale * LOG2E), -jnp.inf)
            return s * (scale * LOG2E) + word

        def softmax(s, m, slot):
            """Probabilities under the maximum m, published to the other consumer, and their row sums."""
            p = jnp.exp2(s - lax.broadcast_in_dim(m, s.shape, [0]))
            p16 = p.astype(jnp.bfloat16)
            kv_smem.at[slot, :, probs][...] = p16
            stat_smem[me] = m
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready.at[me])
            return p16, p.sum(axis=1)

        def faded(o, fade):
            return plgpu.ACC.init(o * lax.broadcast_in_dim(fade, o.shape, [0]))

        def accumulate(o, p, slot):
            """o += p @ values; p None takes the other consumer's."""

            def body(acc):
                a = kv_smem.at[slot, :, probs] if p is None else p
                plgpu.wgmma(acc, a, kv_smem.at[slot, :, columns])

            return pl.run_state(body)(o)

        def pair(j, carry, done, pairs, bit):
            m, l, o = carry
            turn = lax.rem(done + j, 2)
            even = opaque_zero()
            odd = even + 1
            theirs = range(other * parts, (other + 1) * parts)
            s = score(even + me, turn, bit)
            pl.when(j == pairs - 1)(functools.partial(plgpu.barrier_arrive, q_empty))
            top = s.max(axis=1)
            if me == 0:
                m0 = jnp.maximum(m, top)
                p, total = softmax(s, m0, even)
                fade = jnp.exp2(m - m0)
                l = l * fade + total
                o = accumulate(faded(o, fade), p, even)
                plgpu.barrier_arrive(empty.at[0])
                plgpu.barrier_wait(ready.at[1])
                wait_full(bars, theirs, turn)
                m1 = plgpu.load(stat_smem.at[1], layout=ROW)
                fade = jnp.exp2(m0 - m1)
                o = accumulate(faded(o, fade), None, odd)
                l = l * fade
            else:
                plgpu.barrier_wait(ready.at[0])
                wait_full(bars, theirs, turn)
                m0 = plgpu.load(stat_smem.at[0], layout=ROW)
                m1 = jnp.maximum(m0, top)

                def body(refs):  # the softmax runs under the other step's product
                    acc, p_ref, total_ref = refs
                    plgpu.wgmma(acc, kv_smem.at[even, :, probs], kv_smem.at[even, :, columns])
                    p_ref[...], total_ref[...] = softmax(s, m1, odd)

                o = faded(o, jnp.exp2(m - m0))
                o, p, total = pl.run_state(body)((o, s.astype(jnp.bfloat16), top))
                plgpu.barrier_arrive(empty.at[0])
                l = l * jnp.exp2(m - m1) + total
                o = accumulate(faded(o, jnp.exp2(m0 - m1)), p, odd)
            plgpu.barrier_arrive(empty.at[1])
            return m1, l, o

        def tile(n, done):
            _, first, count, split, _, _, pairs = tile_of(n)
            m = plgpu.layout_cast(jnp.full((64,), LOWEST, jnp.float32), ROW)
            l = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROW)
            o = plgpu.layout_cast(jnp.zeros((64, HALF), jnp.float32), plgpu.Layout.WGMMA)
            wait_full(bars, range(2 * parts, 3 * parts), lax.rem(n, 2))
            row = plgpu.broadcasted_iota(jnp.int32, (64, BLOCK), 0, layout=plgpu.Layout.WGMMA)
            bit = 1 << lax.div(row, H) if plan.group > 1 else None
            m, l, o = lax.fori_loop(0, pairs, lambda j, c: pair(j, c, done, pairs, bit), (m, l, o))
            stat_smem[2 + me] = l
            plgpu.barrier_arrive(swap)
            plgpu.barrier_wait(swap)
            l = l + plgpu.load(stat_smem.at[2 + other], layout=ROW)
            o = o * lax.broadcast_in_dim(jnp.where(l > 0, 1 / l, 0.0), o.shape, [0])
            store_rows(o.astype(o_SRC.dtype), o_SRC.at[split], first, count, me * HALF)
            if me == 0:
                lse = jnp.where(l > 0, (m + jnp.log2(l)) / LOG2E, -jnp.inf)
                store_rows(lse, lse_SR.at[split], first, count, 0)
            return done + pairs

        lax.fori_loop(0, mine, tile, jnp.int32(0))

    pl.when(wg == 0)(functools.partial(consumer, 0))
    pl.when(wg == 1)(functools.partial(consumer, 1))


def launch(q_RW, pool_LMW, layer, rows_QK, *owned, H, plan, scale):
    """Runs the kernel: (o [splits, queries*H, 512], lse [splits, queries*H]); o is float32 if splits > 1."""
    total = q_RW.shape[0]
    dtype = q_RW.dtype if plan.splits == 1 else jnp.float32
    scratch = dict(
        bars=plgpu.SMEM((3 * len(COLUMNS), 2), jnp.int32),
        empty=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        kv_smem=plgpu.SMEM((2, BLOCK, WIDTH), jnp.bfloat16, transforms=SWIZZLE),
        q_empty=plgpu.Barrier(num_arrivals=2),
        q_smem=plgpu.SMEM((1, 64, WIDTH), jnp.bfloat16, transforms=SWIZZLE),
        ready=plgpu.Barrier(num_barriers=2),
        stat_smem=plgpu.SMEM((4, 64), jnp.float32),
        swap=plgpu.Barrier(num_arrivals=2),
        word_smem=plgpu.SMEM((2, BLOCK), jnp.int32 if owned else jnp.float32),
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, scale=scale, H=H),
        out_type=(
            jax.ShapeDtypeStruct((plan.splits, total, LATENT), dtype),
            jax.ShapeDtypeStruct((plan.splits, total), jnp.float32),
        ),
        grid=(plan.grid,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=PARAMS,
    )
    return kernel(q_RW, pool_LMW, jnp.asarray(layer, jnp.int32).reshape(1), rows_QK, *owned)


def plan_launch(queries, heads, width):
    """The Plan for `queries` lists of `width` rows and `heads` heads: lists are split while blocks would stand idle."""
    per_list = pl.cdiv(heads, 64)
    lists = queries * per_list
    splits = max(1, min(pl.cdiv(width, PAIR), SMS // lists, MOST_SPLITS))
    span = pl.cdiv(pl.cdiv(width, splits), PAIR) * PAIR
    splits = pl.cdiv(width, span)
    return Plan(per_list, pl.cdiv(heads, per_list), splits, span, min(SMS, lists * splits))


def unsupported(q, pool, rows, value_dim=LATENT) -> str | None:
    """Why the kernels cannot take these shapes and types, or None."""
    if q.ndim != 4 or pool.ndim != 3 or rows.ndim != 3 or rows.shape[:2] != q.shape[:2]:
        return f"needs q [B, S, H, 576], pool [L, M, 576] and rows [B, S, K], got {q.shape}, {pool.shape}, {rows.shape}"
    if q.shape[-1] != WIDTH or pool.shape[-1] != WIDTH or value_dim != LATENT:
        return (
            f"needs {LATENT} latent + {WIDTH - LATENT} rope columns, got {value_dim} of {q.shape[-1]}, {pool.shape[-1]}"
        )
    if q.dtype != jnp.bfloat16 or pool.dtype != jnp.bfloat16 or rows.dtype != jnp.int32:
        return f"needs bfloat16 queries and latents and int32 rows, got {q.dtype}, {pool.dtype} and {rows.dtype}"
    if not 1 <= q.shape[2] <= 128 or 0 in q.shape or 0 in pool.shape or 0 in rows.shape:
        return f"needs 1 to 128 heads and no empty dimension, got q {q.shape}, pool {pool.shape}, rows {rows.shape}"
    if max(pool.shape[0] * pool.shape[1], q.shape[0] * q.shape[1] * q.shape[2]) >= 2**31:
        return f"needs fewer than 2^31 rows over all layers, got q {q.shape}, pool {pool.shape}"
    return None


def supported(q_BSHW, latent_pool_LMW, layer, rows_BSK, *, scale, value_dim=LATENT, groups=None) -> str | None:
    """Why sparse_mla cannot take these arguments on a Hopper GPU, or None."""
    del layer, scale, groups
    return unsupported(q_BSHW, latent_pool_LMW, rows_BSK, value_dim)


def sparse_mla(q_BSHW, latent_pool_LMW, layer, rows_BSK, *, scale, value_dim=LATENT, groups=None):
    """Attention of each query over its own list of cache rows: o [B, S, H, 512] like q, lse [B, S, H] float32.

    Args:
      q_BSHW: bfloat16 absorbed queries, 512 latent and 64 rope columns; 1 to 128 heads.
      latent_pool_LMW: bfloat16 stacked cache; keys are whole rows, values their first 512 columns.
      layer: int32 scalar, may be traced: the layer to read, in place.
      rows_BSK: int32 rows of the pool; anything outside [0, M) is no row, anywhere in the list. A query without rows
        gives zeros and lse (natural log) -inf.
      scale: softmax scale. value_dim: 512.
      groups: row_plan.Groups of the same lists, attended to in their place.

    Differentiable in q and the pool (sparse_mla_bwd_gpu). Raises NotImplementedError for shapes or types it does not
    take. Source: DeepSeek-V2 report, section 2.1 (absorbed).
    """
    if reason := unsupported(q_BSHW, latent_pool_LMW, rows_BSK, value_dim):
        raise NotImplementedError(reason)
    return _attend(q_BSHW, latent_pool_LMW, layer, rows_BSK, groups, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BSHW, latent_pool_LMW, layer, rows_BSK, groups, scale):
    if groups is None:
        return _one_by_one(q_BSHW, latent_pool_LMW, layer, rows_BSK, scale)
    from .sparse_mla_grouped_gpu import sparse_mla_grouped  # it builds on this file

    return sparse_mla_grouped(q_BSHW, latent_pool_LMW, layer, groups, scale=scale)


def _one_by_one(q_BSHW, latent_pool_LMW, layer, rows_BSK, scale):
    B, S, H, _ = q_BSHW.shape
    plan = plan_launch(B * S, H, rows_BSK.shape[-1])
    q_RW, rows_QK = q_BSHW.reshape(B * S * H, WIDTH), rows_BSK.reshape(B * S, -1)
    o_SRC, lse_SR = launch(q_RW, latent_pool_LMW, layer, rows_QK, H=H, plan=plan, scale=scale)
    o_RC, lse_R = merge(o_SRC, lse_SR, q_BSHW.dtype) if plan.splits > 1 else (o_SRC[0], lse_SR[0])
    return o_RC.reshape(B, S, H, LATENT), lse_R.reshape(B, S, H)


def _attend_fwd(q_BSHW, latent_pool_LMW, layer, rows_BSK, groups, scale):
    o, lse = _attend(q_BSHW, latent_pool_LMW, layer, rows_BSK, groups, scale)
    return (o, lse), (q_BSHW, latent_pool_LMW, layer, rows_BSK, o, lse)


def _attend_bwd(scale, saved, cotangents):
    from .sparse_mla_bwd_gpu import sparse_mla_bwd  # it builds on this file

    q_BSHW, latent_pool_LMW, layer, rows_BSK, o, lse = saved
    dq, d_MW = sparse_mla_bwd(q_BSHW, latent_pool_LMW, layer, rows_BSK, o, lse, *cotangents, scale=scale)
    d_LMW = jnp.zeros_like(latent_pool_LMW).at[layer].set(d_MW.astype(latent_pool_LMW.dtype))
    return dq, d_LMW, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
