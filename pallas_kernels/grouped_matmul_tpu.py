"""grouped_matmul on TPU: jax's megablox kernel over the stack of all layers' experts, which it reads in place.

The stack [L, E, D, F] is L x E groups of which only one layer's have rows: the kernel visits no empty group, so nothing is
sliced or copied and decode reads the chosen experts alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from . import reference

LANES = 128
ROWS = 256  # rows of x a grid step takes, at most
WEIGHTS = 2**21  # columns x depth of an expert's matrix a grid step takes, at most: 4 MiB, twice in VMEM


def supported(x_ND, *stacks_layer_sizes) -> str | None:
    """None when grouped_matmul or grouped_swiglu can run these arguments on a TPU of any generation from v5e on, else the
    reason why not."""
    *stacks_LEDF, _, _ = stacks_layer_sizes
    for w_LEDF in stacks_LEDF:
        if x_ND.dtype != jnp.bfloat16 or w_LEDF.dtype != jnp.bfloat16:
            return f"rows are {x_ND.dtype} and weights {w_LEDF.dtype}; bfloat16 is needed"
        if w_LEDF.shape[2] % LANES or w_LEDF.shape[3] % LANES:
            return f"experts are {w_LEDF.shape[2]} x {w_LEDF.shape[3]}; multiples of {LANES} are needed"
    return None


def tiles(n: int, depth: int, columns: int) -> tuple[int, int, int]:
    """Rows, depth and columns of a grid step."""
    rows = min(ROWS, max(16, 1 << (n - 1).bit_length()))
    largest = lambda size, most: max(t for t in range(LANES, size + 1, LANES) if size % t == 0 and t <= max(most, LANES))
    deep = largest(depth, WEIGHTS // LANES)
    return rows, deep, largest(columns, WEIGHTS // deep)


@functools.partial(jax.custom_vjp)
def _product(x_ND, w_LEDF, layer, group_sizes_E):
    (n, depth), (L, E, _, columns) = x_ND.shape, w_LEDF.shape
    tiling = tiles(n, depth, columns)
    sizes = lax.dynamic_update_slice(jnp.zeros(L * E, jnp.int32), group_sizes_E, (layer * E,))
    x_ND = jnp.pad(x_ND, ((0, -n % tiling[0]), (0, 0)))
    return gmm(x_ND, w_LEDF.reshape(L * E, depth, columns), sizes, x_ND.dtype, tiling)[:n]


def _product_fwd(*args):
    return _product(*args), args


def _product_bwd(args, dy_NF):
    x_ND, w_LEDF, layer, group_sizes_E = args
    again = lambda x, w: reference.grouped_matmul(x, w, layer, group_sizes_E)
    return *jax.vjp(again, x_ND, w_LEDF)[1](dy_NF), None, None


_product.defvjp(_product_fwd, _product_bwd)


@jax.jit
def grouped_matmul(x_ND, w_LEDF, layer, group_sizes_E):
    """Rows of x, sorted by expert, times their expert's matrix of one layer. Contract: ``pallas_kernels.grouped_matmul``.

    Sums in float32. Rows behind the last group are not written. Raises NotImplementedError with ``supported``'s reason.
    """
    if reason := supported(x_ND, w_LEDF, layer, group_sizes_E):
        raise NotImplementedError(reason)
    return _product(x_ND, w_LEDF, jnp.asarray(layer, jnp.int32), group_sizes_E)


grouped_swiglu = functools.partial(reference.grouped_swiglu, product=grouped_matmul)
