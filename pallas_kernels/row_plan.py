"""What sparse attention derives from a selection: pool rows and, for few heads, groups of neighbouring queries.

Neighbouring queries select mostly the same tokens. A group of g queries holds the union of their selections and, for
each row of it, the bits of the queries that own it, so that a kernel fetches the row once for all of them. A selection's
plan is built once, at the full layer, and serves every layer that shares the selection.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Groups(NamedTuple):
    """Groups of g consecutive queries of one sequence, [G] = B * ceil(S / g) of them, [U] = g * K.

    rows_GU: int32 pool rows of the union in ascending position, -1 from count_G on. owners_GU: int32, bit s for query s
    of the group, 0 from count_G on.
    """

    rows_GU: jax.Array
    owners_GU: jax.Array
    count_G: jax.Array


class RowPlan(NamedTuple):
    """What ``sparse_mla`` reads: int32 pool rows of each query, -1 = none, and their groups where a backend has a use."""

    rows_BSK: jax.Array
    groups: Groups | None = None


def physical_rows(page_table_BP, positions, page_size: int):
    """int32 pool rows of ``positions`` [B, ...]; -1 stays -1."""
    flat = positions.reshape(positions.shape[0], -1)
    at = jnp.maximum(flat, 0)
    pages = jnp.take_along_axis(page_table_BP, at // page_size, axis=1, mode="clip")
    rows = jnp.where(flat < 0, -1, pages * page_size + at % page_size)
    return rows.reshape(positions.shape).astype(jnp.int32)


def group_size(heads: int) -> int:
    """How many neighbouring queries share a list: as many as fill a tile of 64 (query, head) rows, 16 at most."""
    return max(1, min(16, 64 // heads))


def by_group(positions_BSK, g: int):
    """[G, g, K]: the selections of each group; the last group of a sequence is filled up with empty ones."""
    B, S, K = positions_BSK.shape
    n = -(-S // g)
    padded = jnp.pad(positions_BSK, ((0, 0), (0, n * g - S), (0, 0)), constant_values=-1)
    return padded.reshape(B * n, g, K)


def sort_groups(positions_BSK, page_table_BP, g: int, *, page_size: int) -> Groups:
    """The Groups of g queries each, by one XLA sort. The positions of one query must be distinct; -1 anywhere is none."""
    B, S, K = positions_BSK.shape
    at_GU = by_group(positions_BSK, g).reshape(-1, g * K)
    G, none = at_GU.shape[0], jnp.iinfo(jnp.int32).max
    bits_GU = jnp.broadcast_to(jnp.repeat(1 << jnp.arange(g, dtype=jnp.int32), K), at_GU.shape)
    at_GU = jnp.where(at_GU < 0, none, at_GU)
    at_GU, bits_GU = lax.sort((at_GU, bits_GU), dimension=1, num_keys=1, is_stable=False)
    owners_GU = bits_GU
    for n in range(1, g):  # equal positions stand next to each other: the first collects the bits
        same = jnp.pad(at_GU[:, n:] == at_GU[:, :-n], ((0, 0), (0, n)))
        owners_GU = owners_GU | jnp.where(same, jnp.pad(bits_GU[:, n:], ((0, 0), (0, n))), 0)
    changes = jnp.pad(at_GU[:, 1:] != at_GU[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = changes & (at_GU != none)
    to = jnp.arange(G)[:, None], jnp.where(first, jnp.cumsum(first, 1) - 1, g * K)
    union_GU = jnp.full_like(at_GU, -1).at[to].set(at_GU, mode="drop", unique_indices=True)
    owners_GU = jnp.zeros_like(at_GU).at[to].set(owners_GU, mode="drop", unique_indices=True)
    rows_GU = physical_rows(page_table_BP, union_GU.reshape(B, -1, g * K), page_size).reshape(G, g * K)
    return Groups(rows_GU, owners_GU, first.sum(1, dtype=jnp.int32))


def ungroup(groups: Groups, shape):
    """The lists [B, S, U] that the groups of B sequences of S queries stand for, each with holes of -1."""
    B, S, K = shape
    g = groups.rows_GU.shape[1] // K
    owned = (groups.owners_GU[:, None] >> jnp.arange(g)[:, None]) & 1
    return jnp.where(owned == 1, groups.rows_GU[:, None], -1).reshape(B, -1, g * K)[:, :S]
