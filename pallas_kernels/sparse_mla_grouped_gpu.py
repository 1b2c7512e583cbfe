"""Grouped sparse MLA on Hopper: g neighbouring queries share one gather over the union of their row lists.

Neighbouring queries select mostly the same rows. A plan holds, per group of g queries, the union of their lists and for
each row the bits of the queries that own it; the kernel of `sparse_mla_gpu.py` then fills its 64-row tile with g*H
(query, head) rows and masks by owner. Exact: the result is that of the lists one by one. A plan depends on the
selection alone, so a full layer builds it and the layers that share its selection reuse it.
"""

import typing

import jax
import jax.numpy as jnp

from .sparse_mla_gpu import BLOCK, LATENT, SMS, WIDTH, Plan, launch, supported, unsupported

__all__ = ["GroupPlan", "group_size", "plan_groups", "sparse_mla_grouped", "supported"]


class GroupPlan(typing.NamedTuple):
    """Unions: rows [G, g*K] int32, -1 from `count` [G] on; owners [G, g*K] int32, bit s for query s of the group."""

    rows_GU: jax.Array
    owners_GU: jax.Array
    count_G: jax.Array


def group_size(heads):
    """How many neighbouring queries share a list: as many as fill a tile of 64 rows, 16 at most."""
    return max(1, min(16, 64 // heads))


def plan_groups(rows_BSK, g):
    """The GroupPlan of rows [B, S, K] for groups of g consecutive queries of [B*S]; the last may be smaller.

    Negative rows are none. The valid rows of one query must be distinct, as a selection's are.
    """
    K = rows_BSK.shape[-1]
    rows_QK = rows_BSK.reshape(-1, K)
    Q = rows_QK.shape[0]
    G = -(-Q // g)
    none = jnp.iinfo(jnp.int32).max
    rows_GU = jnp.pad(rows_QK, ((0, G * g - Q), (0, 0)), constant_values=-1).reshape(G, g * K)
    bits_GU = jnp.broadcast_to(jnp.repeat(1 << jnp.arange(g, dtype=jnp.int32), K), rows_GU.shape)
    rows_GU = jnp.where(rows_GU < 0, none, rows_GU)
    rows_GU, bits_GU = jax.lax.sort((rows_GU, bits_GU), dimension=1, num_keys=1, is_stable=False)
    owners_GU = bits_GU
    for n in range(1, g):  # equal rows stand next to each other: the first collects the bits
        same = jnp.pad(rows_GU[:, n:] == rows_GU[:, :-n], ((0, 0), (0, n)))
        owners_GU = owners_GU | jnp.where(same, jnp.pad(bits_GU[:, n:], ((0, 0), (0, n))), 0)
    changes = jnp.pad(rows_GU[:, 1:] != rows_GU[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = changes & (rows_GU != none)
    at = jnp.arange(G)[:, None], jnp.where(first, jnp.cumsum(first, 1) - 1, g * K)
    packed = jnp.full_like(rows_GU, -1).at[at].set(rows_GU, mode="drop", unique_indices=True)
    owners = jnp.zeros_like(rows_GU).at[at].set(owners_GU, mode="drop", unique_indices=True)
    return GroupPlan(packed, owners, first.sum(1, dtype=jnp.int32))


def sparse_mla_grouped(q_BSHW, latent_pool_LMW, layer, plan, *, scale):
    """`sparse_mla` of the lists that `plan` was built from with g = group_size(H): o [B, S, H, 512], lse [B, S, H].

    Raises NotImplementedError for more than 32 heads, a plan of another size, or what `sparse_mla` does not take.
    """
    B, S, H, _ = q_BSHW.shape
    g, (G, width) = group_size(H), plan.rows_GU.shape
    if g < 2 or G != -(-B * S // g):
        raise NotImplementedError(f"needs at most 32 heads and ceil(B*S / g) groups, got {H} heads, {G} groups of {g}")
    rows_BSK = jax.ShapeDtypeStruct((B, S, width), plan.rows_GU.dtype)
    if reason := unsupported(q_BSHW, latent_pool_LMW, rows_BSK):
        raise NotImplementedError(reason)
    span = -(-width // (2 * BLOCK)) * 2 * BLOCK
    o_SRC, lse_SR = launch(
        q_BSHW.reshape(B * S * H, WIDTH), latent_pool_LMW, layer, *plan,
        H=H, plan=Plan(1, g * H, 1, span, min(SMS, G), g), scale=scale,
    )  # fmt: skip
    return o_SRC[0].reshape(B, S, H, LATENT), lse_SR[0].reshape(B, S, H)
