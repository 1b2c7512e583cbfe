"""Grouped sparse MLA on Hopper: g neighbouring queries share one gather over the union of their selections.

The kernel of `sparse_mla_gpu.py` fills its 64-row tile with g*H (query, head) rows of a group of `row_plan.py` and masks
by owner. Exact: the result is that of the lists one by one. For 4,096 queries it is faster than those even where nothing
is shared (benchmarks/results/kernels_h200.md): a tile begins and ends once for three queries, and presumably blocks side
by side find each other's rows in the L2 cache, since three lists in one are denser. So what can be grouped is.
"""

import jax

from .row_groups_gpu import bitmap_groups
from .row_plan import RowPlan, group_size, physical_rows
from .sparse_mla_gpu import BLOCK, LATENT, SMS, WIDTH, Plan, launch, unsupported


def supported(positions_BSK, page_table_BP, heads, latent_pool_LMU, *, page_size) -> str | None:
    """Why neighbouring queries of these shapes would not be grouped on a Hopper GPU, or None."""
    del page_table_BP, page_size
    B, S, _ = positions_BSK.shape
    q = jax.ShapeDtypeStruct((B, S, heads, WIDTH), latent_pool_LMU.dtype)
    g = group_size(heads)
    if g < 2:
        return f"{heads} heads fill a tile by themselves: nothing to share"
    if S == 1 or B * S <= SMS:
        return f"{B} x {S} queries: each has a multiprocessor to itself, or no neighbour"
    return unsupported(q, latent_pool_LMU, positions_BSK)


def plan_rows(positions_BSK, page_table_BP, heads, latent_pool_LMU, *, page_size):
    """See `pallas_kernels.plan_rows`: rows, and groups of as many queries as fill a tile."""
    del latent_pool_LMU
    rows_BSK = physical_rows(page_table_BP, positions_BSK, page_size)
    return RowPlan(rows_BSK, bitmap_groups(positions_BSK, page_table_BP, group_size(heads), page_size=page_size))


def sparse_mla_grouped(q_BSHW, latent_pool_LMW, layer, groups, *, scale):
    """`sparse_mla` of the selections that `groups` were built from, group_size(H) queries each: o [B, S, H, 512], lse.

    Raises NotImplementedError for more than 32 heads, groups of another size, or what `sparse_mla` does not take.
    """
    B, S, H, _ = q_BSHW.shape
    g, (G, width) = group_size(H), groups.rows_GU.shape
    if g < 2 or G != B * -(-S // g):
        raise NotImplementedError(f"needs at most 32 heads and B * ceil(S / g) groups, got {H} heads, {G} groups of {g}")
    rows_BSK = jax.ShapeDtypeStruct((B, S, width), groups.rows_GU.dtype)
    if reason := unsupported(q_BSHW, latent_pool_LMW, rows_BSK):
        raise NotImplementedError(reason)
    span = -(-width // (2 * BLOCK)) * 2 * BLOCK
    o_SRC, lse_SR = launch(
        q_BSHW.reshape(B * S * H, WIDTH), latent_pool_LMW, layer, groups.rows_GU, groups.owners_GU, groups.count_G,
        H=H, plan=Plan(1, g * H, 1, span, min(SMS, G), g, G // B), scale=scale,
    )  # fmt: skip
    return o_SRC[0].reshape(B, S, H, LATENT), lse_SR[0].reshape(B, S, H)
