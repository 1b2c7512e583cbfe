"""Dense products of one or a few rows on Hopper, at memory speed, from stacked weights read in place by layer.

A block of one warpgroup takes a few rows of a matrix [F, D], loads all of them at once, multiplies by x and sums over
its threads. Rows a block: so many that all blocks run at the same time. Matrices of one x share a launch.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import reference

MOST_X = 4  # rows of x: each is multiplied by what was loaded once
BLOCKS = 132 * 8  # that run at once
MOST_BYTES = 32 * 1024  # of the matrix in a block's registers


def rows_of_block(D, *F):
    """Rows of the matrices [F, D] in a block: a power of two that divides each F."""
    rows = 1
    while all(f % (2 * rows) == 0 for f in F) and sum(F) // rows > BLOCKS and 4 * rows * D <= MOST_BYTES:
        rows *= 2
    return rows


def _kernel(x_ND, layer_1, *refs, rows, layout):
    """The kernel body; refs: matrices [layers * F, D] and as many results [N, F]; x has rows of every head."""
    block, begin = lax.axis_index("block"), 0

    def multiply(first, w_MD, y_NF):
        N, F = y_NF.shape
        heads = x_ND.shape[0] // N
        w = [plgpu.load(w_MD.at[layer_1[0] * F + first + r], layout=layout) for r in range(rows)]
        for n in range(N):
            x = plgpu.load(x_ND.at[n * heads + lax.div(first, F // heads)], layout=layout).astype(jnp.float32)
            for r in range(rows):
                y_NF[n, first + r] = jnp.sum(w[r].astype(jnp.float32) * x).astype(y_NF.dtype)

    for w_MD, y_NF in zip(refs[: len(refs) // 2], refs[len(refs) // 2 :], strict=True):
        end = begin + y_NF.shape[1] // rows
        mine = (block >= begin) & (block < end)
        pl.when(mine)(functools.partial(multiply, (block - begin) * rows, w_MD, y_NF))
        begin = end


def supported(x, w, layer, dtype=None) -> str | None:
    """Why layer_matmul cannot take these arguments on a Hopper GPU, or None."""
    del layer, dtype
    D = x.shape[-1]
    for stack in jax.tree.leaves(w):
        N, rows = x.size // math.prod(stack.shape[1:-2]) // D, stack.size // D
        if x.dtype != jnp.bfloat16 or stack.dtype != jnp.bfloat16:
            return f"needs bfloat16, got {x.dtype} and {stack.dtype}"
        if not 1 <= N <= MOST_X:
            return f"{N} rows: the kernel is for 1 to {MOST_X}"
        if D % 256 or 2 * D > MOST_BYTES or rows >= 2**31:
            return f"needs rows of a multiple of 256 up to {MOST_BYTES // 2} and fewer than 2^31 of them, got {rows} of {D}"
    return None


def product(x_ND, w, layer, dtype, *, interpret=None):
    """x [N, D] times the transpose of each w[layer] of the list, [F, D] or [heads, F, D] for rows of x in turn.

    [N, F] or [N / heads, heads * F], float32 sums, one launch.
    """
    D, F, heads = x_ND.shape[1], [math.prod(a.shape[1:-1]) for a in w], math.prod(w[0].shape[1:-2])
    N, rows = x_ND.shape[0] // heads, rows_of_block(D, *(f // heads for f in F))
    vec = next(v for v in (8, 4, 2) if D % (128 * v) == 0)
    kernel = plgpu.kernel(
        functools.partial(_kernel, rows=rows, layout=plgpu.Layout.WG_STRIDED((D,), vec_size=vec)),
        out_type=[jax.ShapeDtypeStruct((N, f), dtype) for f in F],
        grid=(sum(F) // rows,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return kernel(x_ND, jnp.asarray(layer, jnp.int32).reshape(1), *(a.reshape(-1, D) for a in w))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_matmul(x, w, layer, dtype=None):
    """See `pallas_kernels.layer_matmul`; float32 sums. Raises NotImplementedError with the reason of `supported`.

    The gradient is the reference's.
    """
    if reason := supported(x, w, layer, dtype):
        raise NotImplementedError(reason)
    stacks, tree = jax.tree.flatten(w)
    y = product(x.reshape(-1, x.shape[-1]), stacks, layer, dtype or x.dtype)
    return tree.unflatten(a.reshape(*x.shape[:-1], -1) for a in y)


def _forward(x, w, layer, dtype):
    return layer_matmul(x, w, layer, dtype), (x, w, layer)


def _backward(dtype, args, dy):
    x, w, layer = args
    return *jax.vjp(lambda x, w: reference.layer_matmul(x, w, layer, dtype), x, w)[1](dy), None


layer_matmul.defvjp(_forward, _backward)
