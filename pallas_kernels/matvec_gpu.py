"""Products of a few single rows on Hopper, at memory speed: each reads its own matrix of a stack, in place.

A block takes one row of x and a slab of columns; its warpgroups walk stretches of the matrix's rows, all loads of a
step in flight at once, and add up in float32. Short stretches keep every multiprocessor busy; their sums, `splits` of
them, are added by XLA in one fixed order. Matrices of the same rows share a launch.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import reference

FEW = 16  # rows up to which each reads its own matrix
FEW_BY_HEAD = 4  # of every head
WARPGROUPS, UNROLL, SMS = 4, 16, 132


def plan(N, D, F):
    """(columns of a slab, splits of D) of one launch: two blocks a multiprocessor where the matrix allows it."""
    slab = 512 if F % 512 == 0 else 256
    steps = D // (WARPGROUPS * UNROLL)
    fits = [s for s in range(1, steps + 1) if steps % s == 0]
    return slab, next((s for s in fits if N * (F // slab) * s >= 2 * SMS), steps)


def _kernel(x_ND, layer_1, *refs, sums, ready, depth, slab, D, experts, count):
    """The kernel body; refs: each row's expert, unless they go by turns, `count` stacks [layers * experts * D, F], and
    as many results [splits, N, F]. sums [warpgroups, slab] float32 is shared."""
    n, which, column, split, wg = (lax.axis_index(a) for a in ("row", "stack", "slab", "split", "wg"))
    expert_N, stacks, outs = refs[: -2 * count], refs[-2 * count : -count], refs[-count:]
    rows, N = outs[0].shape[1], x_ND.shape[0]
    expert = jnp.clip(expert_N[0][n], 0, experts - 1) if expert_N else lax.rem(n, experts)
    x_row, columns = lax.div(n, rows // N), column * slab
    first = (split * WARPGROUPS + wg) * depth
    start = (layer_1[0] * experts + expert) * D + first
    layout = plgpu.Layout.WG_STRIDED((slab,), vec_size=slab // 128)

    def multiply(w_MF, out_SNF):
        def step(i, total):
            at = [i * UNROLL + j for j in range(UNROLL)]
            x = [x_ND[x_row, first + d].astype(jnp.float32) for d in at]
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

    for i, refs in enumerate(zip(stacks, outs, strict=True)):
        pl.when(which == i)(functools.partial(multiply, *refs))


def matvec(x_ND, w, layer, expert_N=None, *, splits=None, interpret=None):
    """Each expert's row times its matrix of w[layer], for every stack [L, E, D, F] of the list w: float32 [N, F].

    Rows of x are shared by as many neighbours of expert_N; None: they go to expert 0, 1, ... by turns. D, up to the width
    of x, is a multiple of 64, F of 256.
    """
    L, E, D, F = w[0].shape
    N = len(x_ND) if expert_N is None else len(expert_N)
    slab, suggested = plan(N * len(w), D, F)
    splits = splits or suggested
    kernel = plgpu.kernel(
        functools.partial(_kernel, depth=D // (splits * WARPGROUPS), slab=slab, D=D, experts=E, count=len(w)),
        out_type=[jax.ShapeDtypeStruct((splits, N, F), jnp.float32)] * len(w),
        grid=(N, len(w), F // slab, splits),
        grid_names=("row", "stack", "slab", "split"),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=dict(
            sums=plgpu.SMEM((WARPGROUPS, slab), jnp.float32), ready=plgpu.Barrier(num_arrivals=WARPGROUPS)
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    given = [] if expert_N is None else [expert_N]
    parts = kernel(x_ND, jnp.asarray(layer, jnp.int32).reshape(1), *given, *(a.reshape(L * E * D, F) for a in w))
    return [functools.reduce(jnp.add, part) for part in parts]  # unlike one reduction, fused into what follows


def supported(x, w, layer, expert=None, dtype=None) -> str | None:
    """Why expert_matmul cannot take these arguments on a Hopper GPU, or None."""
    del layer, dtype
    stacks = jax.tree.leaves(w)
    L, E, D, F = stacks[0].shape
    N, few = (x.size // (E * x.shape[-1]), FEW_BY_HEAD) if expert is None else (expert.size, FEW)
    if x.dtype != jnp.bfloat16 or stacks[0].dtype != jnp.bfloat16:
        return f"needs bfloat16, got {x.dtype} rows and {stacks[0].dtype} matrices"
    if not 1 <= N <= few:
        return f"{N} rows: the kernel is for 1 to {few}"
    if D % (WARPGROUPS * UNROLL) or F % 256 or L * E * D >= 2**31:
        return f"needs matrices in multiples of 64 x 256, fewer than 2^31 rows, got {L * E} of {D} x {F}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def expert_matmul(x, w, layer, expert=None, dtype=None):
    """See `pallas_kernels.expert_matmul`; float32 sums. Raises NotImplementedError with the reason of `supported`.

    The gradient is the reference's.
    """
    if reason := supported(x, w, layer, expert, dtype):
        raise NotImplementedError(reason)
    stacks, tree = jax.tree.flatten(w)
    shape = x.shape[:-1] if expert is None else expert.shape
    y = matvec(x.reshape(-1, x.shape[-1]), stacks, layer, None if expert is None else expert.reshape(-1))
    return tree.unflatten(a.reshape(*shape, -1).astype(dtype or x.dtype) for a in y)


def _forward(x, w, layer, expert, dtype):
    return expert_matmul(x, w, layer, expert, dtype), (x, w, layer, expert)


def _backward(dtype, args, dy):
    x, w, layer, expert = args
    return *jax.vjp(lambda x, w: reference.expert_matmul(x, w, layer, expert, dtype), x, w)[1](dy), None, None


expert_matmul.defvjp(_forward, _backward)
