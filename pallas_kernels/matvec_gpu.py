"""Products of a few single rows on Hopper, at memory speed: each reads its own matrix of a stack, in place.

A block takes one row of x and a slab of columns; its warpgroups walk stretches of the matrix's rows, all loads of a
step in flight at once, and add up in float32. Short stretches keep every multiprocessor busy; their sums, `splits` of
them, are added by XLA in one fixed order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUPS, UNROLL, SMS = 4, 16, 132


def plan(N, D, F):
    """(columns of a slab, splits of D) of one launch: two blocks a multiprocessor where the matrix allows it."""
    slab = 512 if F % 512 == 0 else 256
    steps = D // (WARPGROUPS * UNROLL)
    fits = [s for s in range(1, steps + 1) if steps % s == 0]
    return slab, next((s for s in fits if N * (F // slab) * s >= 2 * SMS), steps)


def _kernel(x_ND, w_MF, base_N, out_SNF, *, sums, ready, depth, slab):
    """The kernel body: rows base_N[n] and on of w times x[n]. sums [warpgroups, slab] float32 is shared."""
    n, column, split, wg = (lax.axis_index(a) for a in ("row", "slab", "split", "wg"))
    columns = column * slab
    first = (split * WARPGROUPS + wg) * depth
    start = base_N[n] + first
    layout = plgpu.Layout.WG_STRIDED((slab,), vec_size=slab // 128)

    def step(i, total):
        at = [i * UNROLL + j for j in range(UNROLL)]
        x = [x_ND[n, first + d].astype(jnp.float32) for d in at]
        w = [plgpu.load(w_MF.at[start + d, pl.ds(columns, slab)], layout=layout) for d in at]
        for x_d, w_d in zip(x, w, strict=True):
            total = total + w_d.astype(jnp.float32) * x_d
        return total

    total = plgpu.layout_cast(jnp.zeros((slab,), jnp.float32), layout)
    sums[wg] = lax.fori_loop(0, depth // UNROLL, step, total)
    plgpu.barrier_arrive(ready)
    plgpu.barrier_wait(ready)

    @pl.when(wg == 0)
    def _():
        parts = [plgpu.load(sums.at[i], layout=layout) for i in range(WARPGROUPS)]
        out_SNF[split, n, pl.ds(columns, slab)] = functools.reduce(jnp.add, parts)


def matvec(x_ND, w_MF, base_N, *, splits=None, interpret=None):
    """x[n] times rows base_N[n] to base_N[n] + D of w_MF: [N, F] in x's dtype. D a multiple of 64, F of 256."""
    (N, D), F = x_ND.shape, w_MF.shape[1]
    slab, suggested = plan(N, D, F)
    splits = splits or suggested
    kernel = plgpu.kernel(
        functools.partial(_kernel, depth=D // (splits * WARPGROUPS), slab=slab),
        out_type=jax.ShapeDtypeStruct((splits, N, F), jnp.float32),
        grid=(N, F // slab, splits),
        grid_names=("row", "slab", "split"),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=dict(
            sums=plgpu.SMEM((WARPGROUPS, slab), jnp.float32), ready=plgpu.Barrier(num_arrivals=WARPGROUPS)
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return kernel(x_ND, w_MF, base_N).sum(0).astype(x_ND.dtype)
