"""Dense products of one or a few rows on Hopper, at memory speed, from stacked weights read in place by layer.

A block of one warpgroup takes a few rows of the matrix [F, D], loads all of them at once, multiplies by x and sums over
its threads. Rows a block: so many that all blocks run at the same time.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import reference

MOST_X = 4  # rows of x: each is multiplied by what was loaded once
BLOCKS = 132 * 8  # that run at once
MOST_BYTES = 32 * 1024  # of the matrix in a block's registers


def rows_of_block(F, D):
    """Rows of the matrix in a block: a power of two that divides F."""
    rows = 1
    while F % (2 * rows) == 0 and F // rows > BLOCKS and 4 * rows * D <= MOST_BYTES:
        rows *= 2
    return rows


def _kernel(x_ND, w_MD, layer_1, y_NF, *, rows, F, layout):
    """The kernel body; w_MD [layers * F, D]."""
    first = lax.axis_index("block") * rows
    w = [plgpu.load(w_MD.at[layer_1[0] * F + first + r], layout=layout) for r in range(rows)]
    for n in range(x_ND.shape[0]):
        x = plgpu.load(x_ND.at[n], layout=layout).astype(jnp.float32)
        for r in range(rows):
            y_NF[n, first + r] = jnp.sum(w[r].astype(jnp.float32) * x)


def supported(x, w_LFD, layer) -> str | None:
    """Why layer_matmul cannot take these arguments on a Hopper GPU, or None."""
    del layer
    L, F, D = w_LFD.shape
    N = x.size // D
    if x.dtype != jnp.bfloat16 or w_LFD.dtype != jnp.bfloat16:
        return f"needs bfloat16, got {x.dtype} and {w_LFD.dtype}"
    if not 1 <= N <= MOST_X:
        return f"{N} rows: the kernel is for 1 to {MOST_X}"
    if D % 256 or 2 * D > MOST_BYTES or L * F >= 2**31:
        return f"needs rows of a multiple of 256 up to {MOST_BYTES // 2} and fewer than 2^31 of them, got {L * F} of {D}"
    return None


def product(x_ND, w_LFD, layer, *, interpret=None):
    """x [N, D] times the transpose of w[layer]: [N, F] in x's dtype, float32 sums."""
    (N, D), (L, F, _) = x_ND.shape, w_LFD.shape
    rows = rows_of_block(F, D)
    vec = next(v for v in (8, 4, 2) if D % (128 * v) == 0)
    kernel = plgpu.kernel(
        functools.partial(_kernel, rows=rows, F=F, layout=plgpu.Layout.WG_STRIDED((D,), vec_size=vec)),
        out_type=jax.ShapeDtypeStruct((N, F), jnp.float32),
        grid=(F // rows,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )
    y_NF = kernel(x_ND, w_LFD.reshape(L * F, D), jnp.asarray(layer, jnp.int32).reshape(1))
    return y_NF.astype(x_ND.dtype)


@jax.custom_vjp
def layer_matmul(x, w_LFD, layer):
    """See `pallas_kernels.layer_matmul`. Raises NotImplementedError with the reason of `supported`.

    The gradient is the reference's.
    """
    if reason := supported(x, w_LFD, layer):
        raise NotImplementedError(reason)
    return product(x.reshape(-1, x.shape[-1]), w_LFD, layer).reshape(*x.shape[:-1], -1)


def _forward(*args):
    return layer_matmul(*args), args


def _backward(args, dy):
    x, w_LFD, layer = args
    return *jax.vjp(lambda x, w: reference.layer_matmul(x, w, layer), x, w_LFD)[1](dy), None


layer_matmul.defvjp(_forward, _backward)
