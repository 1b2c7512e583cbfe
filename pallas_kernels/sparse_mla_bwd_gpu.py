"""Backward of sparse MLA on Hopper (Pallas Mosaic GPU): the gradient of the queries and, by scatter-add, of the rows.

Recomputes the probabilities from the forward's LSE. One tile is up to 64 heads of one query; three warpgroups walk its
list 64 rows a step. Two of them compute p and ds for 32 keys each; then each of the three owns 192 of the 576 columns:
it accumulates dq in registers and adds ds^T q + p^T do to the rows in global memory, under the gather of the next rows.
The sums over queries are float32 atomics: their order, and so the last bits of d_latent, can differ between runs.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .sparse_mla_device_gpu import (
    BLOCK,
    COL,
    LATENT,
    ROW,
    SWIZZLE,
    WIDTH,
    copy_columns,
    count_rows,
    keep_rows,
    keep_stat,
    load_rows,
    meet,
    opaque_zero,
    scatter_add,
    store_columns,
    store_rows,
)  # fmt: skip
from .sparse_mla_gpu import LOG2E, PARAMS, SMS, unsupported

THIRD = WIDTH // 3
KEYS = BLOCK // 2  # keys scored by one of the two scoring warpgroups


def _kernel(
    q_RW, do_RC, lse_R, delta_R, pool_LMW, layer_1, rows_QK, d_MW, dq_RW,
    q_smem, do_smem, kv_smem, p_smem, ds_smem, rows_smem, stat_smem, *, scale, H, parts, heads, grid,
):  # fmt: skip
    """The kernel body, see the module docstring. lse is in units of log2; d_MW [M, 576] float32 is added to."""
    Q, K = rows_QK.shape
    M = pool_LMW.shape[1]
    worker, wg = lax.axis_index("worker"), lax.axis_index("wg")
    mine = lax.div(Q * parts - worker + grid - 1, grid)

    def product(shape, *pairs):
        def body(acc):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
            return acc[...]

        return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))

    def role(me):
        offset = layer_1[0] * M
        columns, keys = pl.ds(me * THIRD, THIRD), pl.ds(KEYS * me, KEYS)

        def fetch(rows):
            copy_columns(pool_LMW, offset, rows, kv_smem.at[0], 3 * me, 3)
            if me == 0:
                keep_rows(rows, rows_smem)

        def score(q, do, kv, p_tile, ds_tile):
            s = product((64, KEYS), (q, kv.at[keys].T))
            dp = product((64, KEYS), (do, kv.at[keys, pl.ds(0, LATENT)].T))
            lse = lax.broadcast_in_dim(plgpu.load(stat_smem.at[0], layout=ROW), s.shape, [0])
            delta = lax.broadcast_in_dim(plgpu.load(stat_smem.at[1], layout=ROW), s.shape, [0])
            there = lax.broadcast_in_dim(plgpu.load(rows_smem.at[keys], layout=COL), s.shape, [1]) >= 0
            p = jnp.where(there, jnp.exp2(s * (scale * LOG2E) - lse), 0.0)
            store_columns(p.astype(jnp.bfloat16), p_tile, KEYS * me)
            store_columns((p * (dp - delta) * scale).astype(jnp.bfloat16), ds_tile, KEYS * me)

        def step(i, _, query, dq):
            zero = opaque_zero()
            q, do, kv, p_tile, ds_tile = (ref.at[zero] for ref in (q_smem, do_smem, kv_smem, p_smem, ds_smem))
            following = load_rows(rows_QK, query, (i + 1) * BLOCK, K, M)
            meet(copies=True)
            if me < 2:
                score(q, do, kv, p_tile, ds_tile)
            targets = plgpu.load(rows_smem, layout=ROW)
            meet()
            plgpu.wgmma(dq, ds_tile, kv.at[:, columns])
            plgpu.wgmma_wait(0)
            meet()
            fetch(following)

            def latents(c, _):
                at = pl.ds(pl.multiple_of(64 * c, 64), 64)

                def body(acc):
                    plgpu.wgmma(acc, ds_tile.T, q.at[:, at])
                    if me < 2:
                        plgpu.wgmma(acc, p_tile.T, do.at[:, at])
                    else:  # no p^T do for the rope columns: a loop of 0 or 1, as another product would spill
                        plgpu.wgmma_wait(0)
                        turns = jnp.where(c + opaque_zero() < LATENT // 64, 1, 0)
                        lax.fori_loop(0, turns, lambda *_: plgpu.wgmma(acc, p_tile.T, do.at[:, at]), None)
                    return acc[...]

                scatter_add(pl.run_scoped(body, plgpu.ACC((64, 64), jnp.float32)), d_MW, targets, 64 * c)

            lax.fori_loop(3 * me, 3 * me + 3, latents, None)

        def tile(n, _):
            t = worker + n * grid
            query, head = lax.div(t, parts), lax.rem(t, parts) * heads
            first, count = query * H + head, jnp.minimum(heads, H - head)
            meet()
            own = count_rows(first, count)
            copy_columns(q_RW, jnp.int32(0), own, q_smem.at[0], 3 * me, 3)
            copy_columns(do_RC, jnp.int32(0), own, do_smem.at[0], 3 * me, min(3, 8 - 3 * me))
            if me < 2:
                keep_stat((lse_R, delta_R)[me], stat_smem.at[me], first, count)
            fetch(load_rows(rows_QK, query, 0, K, M))

            def walk(dq):
                lax.fori_loop(0, pl.cdiv(K, BLOCK), functools.partial(step, query=query, dq=dq), None)
                return dq[...]

            dq = pl.run_scoped(walk, plgpu.ACC((64, THIRD), jnp.float32))
            store_rows(dq.astype(dq_RW.dtype), dq_RW, first, count, me * THIRD)
            meet(copies=True)

        lax.fori_loop(0, mine, tile, None)

    for me in range(3):
        pl.when(wg == me)(functools.partial(role, me))


def sparse_mla_bwd(q_BSHW, latent_pool_LMW, layer, rows_BSK, o, lse, do, dlse=None, *, scale):
    """Gradients of sparse_mla: dq [B, S, H, 576] like q, d_latent [M, 576] float32 (of the pool's layer `layer`).

    Args:
      q_BSHW, latent_pool_LMW, layer, rows_BSK, scale: the forward's arguments.
      o, lse: its results. do [B, S, H, 512], dlse [B, S, H] or None: their cotangents (do is rounded to bfloat16).

    Rows that no query selected get zeros. Raises NotImplementedError for what the forward does not take.
    """
    if reason := unsupported(q_BSHW, latent_pool_LMW, rows_BSK):
        raise NotImplementedError(reason)
    B, S, H, _ = q_BSHW.shape
    total, M = B * S * H, latent_pool_LMW.shape[1]
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1) - (0.0 if dlse is None else dlse)
    parts = pl.cdiv(H, 64)
    grid = min(SMS, B * S * parts)
    tiles = [plgpu.SMEM((1, 64, n), jnp.bfloat16, transforms=SWIZZLE) for n in (WIDTH, LATENT, WIDTH, 64, 64)]
    kernel = plgpu.kernel(
        functools.partial(_kernel, scale=scale, H=H, parts=parts, heads=pl.cdiv(H, parts), grid=grid),
        out_type=jax.ShapeDtypeStruct((total, WIDTH), q_BSHW.dtype),
        grid=(grid,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        scratch_types=[*tiles, plgpu.SMEM((BLOCK,), jnp.int32), plgpu.SMEM((2, 64), jnp.float32)],
        compiler_params=PARAMS,
    )
    d_MW = jax.new_ref(jnp.zeros((M, WIDTH), jnp.float32))
    dq_RW = kernel(
        q_BSHW.reshape(total, WIDTH),
        do.astype(jnp.bfloat16).reshape(total, LATENT),
        lse.reshape(total) * LOG2E,
        delta.reshape(total),
        latent_pool_LMW,
        jnp.asarray(layer, jnp.int32).reshape(1),
        rows_BSK.reshape(B * S, -1),
        d_MW,
    )
    return dq_RW.reshape(q_BSHW.shape), d_MW[...]
