"""Dense products of one or a few rows on Hopper, at memory speed, from stacked weights read in place by layer.

A block of one warpgroup takes a few rows of a matrix [F, D], loads all of them at once, multiplies by x and sums over
its threads. Rows a block: so many that all blocks run at the same time. Matrices of one x share a launch, and so does
the norm of x, which every block does for itself while its rows are on their way.
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


def _kernel(x_ND, layer_1, *refs, rows, layout, count, eps, added):
    """The kernel body; refs: `count` matrices [layers * F, D] and as many results [N, F]; x has rows of every head.

    With a norm, its weights [layers, D] and layer stand before the matrices, the normed x [N, D] after the results. What
    is added to a single product, [N, F], comes first.
    """
    block, begin = lax.axis_index("block"), 0
    add_NF, refs = (refs[0], refs[1:]) if added else (None, refs)
    norm, w, y, normed = refs[: -2 * count - 1], refs[-2 * count - 1 : -count - 1], refs[-count - 1 : -1], refs[-1]
    if not norm:
        w, y = refs[:count], refs[count:]

    def load_x(row):
        x = plgpu.load(x_ND.at[row], layout=layout).astype(jnp.float32)
        if not norm:
            return x
        # As reference.rms_norm: rounded before and after the weights.
        scale = lax.rsqrt(jnp.sum(x * x) / x.shape[0] + eps)
        weight = plgpu.load(norm[0].at[norm[1][0]], layout=layout).astype(jnp.float32)
        x = ((x * scale).astype(x_ND.dtype).astype(jnp.float32) * weight).astype(x_ND.dtype)
        pl.when(block == 0)(functools.partial(normed.__setitem__, row, x))
        return x.astype(jnp.float32)

    def multiply(first, w_MD, y_NF):
        N, F = y_NF.shape
        heads = x_ND.shape[0] // N
        w = [plgpu.load(w_MD.at[layer_1[0] * F + first + r], layout=layout) for r in range(rows)]
        for n in range(N):
            x = load_x(n * heads + lax.div(first, F // heads))
            for r in range(rows):
                y = jnp.sum(w[r].astype(jnp.float32) * x).astype(y_NF.dtype)
                y_NF[n, first + r] = y + add_NF[n, first + r] if added else y

    for w_MD, y_NF in zip(w, y, strict=True):
        end = begin + y_NF.shape[1] // rows
        mine = (block >= begin) & (block < end)
        pl.when(mine)(functools.partial(multiply, (block - begin) * rows, w_MD, y_NF))
        begin = end


def supported(x, w, layer, dtype=None, norm=None, eps=None, add=None) -> str | None:
    """Why layer_matmul cannot take these arguments on a Hopper GPU, or None."""
    del layer, dtype, eps, add
    if norm is not None and norm[0].dtype != jnp.bfloat16:
        return f"needs bfloat16, got norm weights of {norm[0].dtype}"
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


def product(x_ND, w, layer, dtypes, norm=None, eps=None, add_NF=None, *, interpret=None):
    """x [N, D] times the transpose of each w[layer] of the list, [F, D] or [heads, F, D] for rows of x in turn.

    [N, F] or [N / heads, heads * F], float32 sums, one launch. With norm (weights [L, D], layer): of the normed x, which
    is the last result. With add_NF: that much more, of a single matrix.
    """
    D, F, heads = x_ND.shape[1], [math.prod(a.shape[1:-1]) for a in w], math.prod(w[0].shape[1:-2])
    N, rows = x_ND.shape[0] // heads, rows_of_block(D, *(f // heads for f in F))
    vec = next(v for v in (8, 4, 2) if D % (128 * v) == 0)
    one = lambda layer: jnp.asarray(layer, jnp.int32).reshape(1)
    given, normed = ([], []) if norm is None else ([norm[0], one(norm[1])], [jax.ShapeDtypeStruct((N, D), x_ND.dtype)])
    layout, added = plgpu.Layout.WG_STRIDED((D,), vec_size=vec), add_NF is not None
    kernel = plgpu.kernel(
        functools.partial(_kernel, rows=rows, layout=layout, count=len(w), eps=eps, added=added),
        out_type=[jax.ShapeDtypeStruct((N, f), d) for f, d in zip(F, dtypes, strict=True)] + normed,
        grid=(sum(F) // rows,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    return kernel(x_ND, one(layer), *([add_NF] if added else []), *given, *(a.reshape(-1, D) for a in w))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 5))
def layer_matmul(x, w, layer, dtype=None, norm=None, eps=None, add=None):
    """See `pallas_kernels.layer_matmul`; float32 sums. Raises NotImplementedError with the reason of `supported`.

    The gradient is the reference's.
    """
    if reason := supported(x, w, layer, dtype, norm):
        raise NotImplementedError(reason)
    stacks, tree = jax.tree.flatten(w)
    dtypes = [d or x.dtype for d in reference.each(dtype, stacks)]
    flat = None if add is None else add.reshape(-1, add.shape[-1])
    y = product(x.reshape(-1, x.shape[-1]), stacks, layer, dtypes, norm, eps, flat)
    y = [a.reshape(*x.shape[:-1], -1) for a in y]
    return tree.unflatten(y) if norm is None else (tree.unflatten(y[:-1]), y[-1])


def _forward(x, w, layer, dtype, norm, eps, add):
    return layer_matmul(x, w, layer, dtype, norm, eps, add), (x, w, layer, norm, add)


def _backward(dtype, eps, args, dy):
    x, w, layer, norm, add = args
    weights, at = norm or (None, None)
    f = lambda x, w, weights, add: reference.layer_matmul(x, w, layer, dtype, norm and (weights, at), eps, add)
    dx, dw, d_weights, d_add = jax.vjp(f, x, w, weights, add)[1](dy)
    return dx, dw, None, norm and (d_weights, None), d_add


layer_matmul.defvjp(_forward, _backward)
