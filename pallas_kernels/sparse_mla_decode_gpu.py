"""Merge of partial sparse MLA results on Hopper: what decode, which splits one list over many blocks, does last."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .sparse_mla_device_gpu import LATENT

MOST_SPLITS = 16  # parts of one list: the merge holds them all in registers


def _kernel(o_SRC, lse_SR, o_RC, lse_R1):
    """Merges the parts of one row; all loads come before the first use, since each is one memory latency away."""
    r = lax.axis_index("row")
    parts = range(o_SRC.shape[0])
    wide = plgpu.Layout.WG_STRIDED((LATENT,), vec_size=4)
    lse = [lse_SR[s, r] for s in parts]
    o = [plgpu.load(o_SRC.at[s, r], layout=wide) for s in parts]
    top = functools.reduce(jnp.maximum, lse)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp(x - base) for x in lse]
    total = functools.reduce(jnp.add, weights)
    share = 1 / jnp.where(total > 0, total, 1.0)
    o_RC[r] = functools.reduce(jnp.add, [o[s] * (weights[s] * share) for s in parts]).astype(o_RC.dtype)
    lse_R1[r, 0] = base + jnp.log(total)


def merge(o_SRC, lse_SR, dtype):
    """Results over disjoint key sets as one: (o [R, 512] of `dtype`, lse [R] float32).

    o [splits, R, 512] float32, lse [splits, R]; lse -inf marks an empty part; all empty gives zeros and -inf.
    """
    R = lse_SR.shape[1]
    out = jax.ShapeDtypeStruct((R, LATENT), dtype), jax.ShapeDtypeStruct((R, 1), jnp.float32)
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    kernel = plgpu.kernel(_kernel, out_type=out, grid=(R,), grid_names=("row",), compiler_params=params)
    o_RC, lse_R1 = kernel(o_SRC, lse_SR)
    return o_RC, lse_R1[:, 0]
