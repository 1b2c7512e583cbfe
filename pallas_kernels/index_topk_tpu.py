"""index_topk on TPU: indexer scores and exact selection in one TensorCore kernel; scores never leave VMEM.

A grid step takes a block of queries of one sequence. It walks the sequence's keys a tile at a time, fetched page by page
with a double buffer up to the block's last position, and keeps every score as an order-preserving int32 key in VMEM; then
``topk_tpu.select`` chooses. So nothing of size [queries, context] exists in HBM, whatever the prompt.

Rows of the score product are (head, 8 queries): the sum over heads is then a plain addition of registers, in ascending
head order, which no block size changes: prefill and decode scores are bitwise equal. A K = 128 product fills half the depth
of a 256-deep matrix unit (v6e, 7x), so a second product for the head sum would cost as much as the first; the vector unit
does it in three operations a register and stays below the matrix unit's time (see benchmarks/results/tpu_static.md).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import topk_tpu
from .topk_tpu import GROUP, LANES, LOWEST, ROWS, topk

__all__ = ["index_topk", "plan", "supported", "topk"]
HEAD_DIM = 128
MAX_K, MAX_HEADS = 2048, 128
KEY_BYTES = 34 * 2**20  # VMEM for the keys of one block of queries; v5p and 7x have 64 MiB in all
VMEM_BYTES = 60 * 2**20


class Plan(NamedTuple):
    """Block sizes of one launch."""

    eights: int  # groups of 8 queries a grid step
    tile: int  # keys a scoring step
    copy: int  # keys a DMA: a page, or a tile inside a larger page


def plan(queries: int, heads: int, capacity: int, page_size: int) -> Plan:
    """Block sizes for ``queries`` of a sequence with room for ``capacity`` positions.

    A step is up to 4,096 x 1,024 (rows x keys): large enough to hide the matrix unit's fill and drain, 230 bundles.
    """
    fits = KEY_BYTES // (-(-capacity // GROUP) * GROUP * 4 * ROWS)
    most = max(1, min(-(-queries // ROWS), 256 // heads, fits))
    eights = 1 << (most.bit_length() - 1)
    target = min(4096, max(256, 2**22 // (eights * ROWS * heads)), max(page_size, 1 << (capacity - 1).bit_length()))
    if page_size <= target:
        tile = page_size * (target // page_size)
        while GROUP % tile:
            tile -= page_size
    else:
        tile = next(t for t in range(target - target % LANES, 0, -LANES) if page_size % t == 0 and GROUP % t == 0)
    return Plan(eights, tile, min(tile, page_size))


def supported(q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B, *, k, page_size) -> str | None:
    """None when index_topk can run these arguments on a TPU of any generation from v5e on, else the reason why not."""
    keys, scales = index_pool
    heads, dim = q_BSIJ.shape[-2:]
    capacity = page_table_BP.shape[1] * page_size
    if q_BSIJ.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"queries are {q_BSIJ.dtype}; bfloat16 or float8_e4m3fn is needed"
    if keys.dtype != q_BSIJ.dtype:
        return f"keys are {keys.dtype} but queries are {q_BSIJ.dtype}"
    if dim != HEAD_DIM or keys.shape[-1] != dim:
        return f"the indexer head has {dim} dimensions; {HEAD_DIM} are needed"
    if heads > MAX_HEADS:
        return f"{heads} indexer heads; at most {MAX_HEADS} are supported"
    if page_size % LANES or (page_size & (page_size - 1)):
        return f"page size {page_size} is not a power of two from {LANES} up"
    if k > MAX_K:
        return f"k is {k}; at most {MAX_K} is supported"
    if -(-capacity // GROUP) * GROUP * 4 * ROWS > KEY_BYTES:
        return f"{capacity} positions; the keys of 8 queries over at most {KEY_BYTES // (GROUP * 32) * GROUP} fit in VMEM"
    if scales is not None and scales.dtype != jnp.float32:
        return f"key scales are {scales.dtype}; float32 is needed"
    return None


def _score(q_ref, weights_ref, k_JT, scales_1T, limits, keys_ref, first, *, heads):
    """Writes the ordered keys of one tile, whose first position is ``first``, for every query of the block."""
    eights, tile = len(limits), k_JT.shape[0]
    q = q_ref[...].reshape(eights * heads * ROWS, HEAD_DIM)
    nt = (((1,), (1,)), ((), ()))
    dots = lax.dot_general(q, k_JT, nt, preferred_element_type=jnp.float32)
    lane = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    for c in range(tile // LANES):
        columns = slice(c * LANES, (c + 1) * LANES)
        place = first + c * LANES + lane
        at = pl.ds(pl.multiple_of((first // LANES + c) * ROWS, ROWS), ROWS)
        for e, limit in enumerate(limits):
            total = None
            for h in range(heads):
                row = (e * heads + h) * ROWS
                term = jnp.maximum(dots[row : row + ROWS, columns], 0.0) * weights_ref[e * heads + h]
                total = term if total is None else total + term
            if scales_1T is not None:
                total = total * scales_1T[:, columns]
            keys_ref[e, at, :] = jnp.where(place < limit, topk_tpu.ordered(total), LOWEST)


def _kernel(slot_ref, most_ref, pages_ref, q_ref, w_ref, limit_ref, pool_ref, *rest, k, heads, plan_, page_size, scaled):
    scales_ref, rest = (rest[0], rest[1:]) if scaled else (None, rest)
    out_ref, keys_ref, weights_ref, buffer_ref, scale_buffer_ref, sems, *select_refs = rest
    most = most_ref[pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)]
    copies = plan_.tile // plan_.copy
    limits = [limit_ref[e] for e in range(plan_.eights)]

    def fetch(tile, slot):
        """The DMAs of a tile into buffer ``slot``."""
        out = []
        for i in range(copies):
            position = tile * plan_.tile + i * plan_.copy
            page, inside = pages_ref[0, position // page_size], lax.rem(position, page_size)
            row = pl.multiple_of(page * page_size + inside, plan_.copy)
            to = pl.ds(i * plan_.copy, plan_.copy)
            source = pool_ref.at[slot_ref[0], pl.ds(row, plan_.copy)]
            out.append(pltpu.make_async_copy(source, buffer_ref.at[slot, to], sems.at[slot]))
            if scaled:
                source = scales_ref.at[page, :, pl.ds(pl.multiple_of(inside, plan_.copy), plan_.copy)]
                out.append(pltpu.make_async_copy(source, scale_buffer_ref.at[slot, :, to], sems.at[slot]))
        return out

    @pl.when(most > k)
    def _():
        for copy in fetch(0, 0):
            copy.start()
        for e in range(plan_.eights):
            for h in range(heads):
                weights_ref[e * heads + h] = jnp.broadcast_to(w_ref[e, :, h : h + 1], (ROWS, LANES))
        tiles = pl.cdiv(most, plan_.tile)

        def step(tile, carry):
            slot = lax.rem(tile, 2)

            @pl.when(tile + 1 < tiles)
            def _():
                for copy in fetch(tile + 1, 1 - slot):
                    copy.start()

            for copy in fetch(tile, slot):
                copy.wait()
            scales = scale_buffer_ref[slot] if scaled else None
            keys = buffer_ref[slot].astype(jnp.bfloat16)
            _score(q_ref, weights_ref, keys, scales, limits, keys_ref, tile * plan_.tile, heads=heads)
            return carry

        lax.fori_loop(0, tiles, step, 0)
        # Selection reads whole groups of 16,384 positions: what was not scored cannot be chosen.
        per_tile = plan_.tile // LANES * ROWS

        def clear(i, carry):
            for e in range(plan_.eights):
                keys_ref[e, pl.ds(pl.multiple_of(i * per_tile, per_tile), per_tile), :] = jnp.full((per_tile, LANES), LOWEST)
            return carry

        lax.fori_loop(tiles, pl.cdiv(most, GROUP) * (GROUP // plan_.tile), clear, 0)

        def choose(e, carry):
            topk_tpu.select(keys_ref.at[e], out_ref.at[e], *select_refs, limit_ref[e], most, k=k)
            return carry

        lax.fori_loop(0, plan_.eights, choose, 0)

    @pl.when(most <= k)
    def _():
        for e in range(plan_.eights):
            slot = lax.broadcasted_iota(jnp.int32, out_ref.shape[1:], 1)
            out_ref[e] = jnp.where(slot < limits[e], slot, -1)


@functools.partial(jax.jit, static_argnames=("k", "page_size"))
def index_topk(q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B, *, k, page_size):
    """Positions of the k best keys of every query, ascending, -1 padded, and their number: (positions_BSK, count_BS) int32.

    Contract and shapes: ``pallas_kernels.index_topk``. Queries and keys bf16, or float8_e4m3fn with float32 key scales;
    products are bf16 with float32 sums, the sum over heads is float32. Raises NotImplementedError with the reason of
    ``supported``.
    """
    args = (q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B)
    if reason := supported(*args, k=k, page_size=page_size):
        raise NotImplementedError(reason)
    (keys_GMJ, scales_GM), (B, S, I, J) = index_pool, q_BSIJ.shape
    capacity = page_table_BP.shape[1] * page_size
    limit_BS = jnp.clip(jnp.minimum(positions_BS + 1, lengths_B[:, None]), 0, capacity).astype(jnp.int32)
    if capacity <= k:
        every_K = jnp.arange(k, dtype=jnp.int32)
        return jnp.where(every_K < limit_BS[..., None], every_K, -1), limit_BS
    p = plan(S, I, capacity, page_size)
    blocks = -(-S // (p.eights * ROWS))
    groups, slots = -(-capacity // GROUP), -(-k // LANES) * LANES

    def blocked(a, fill=0):
        pad = ((0, 0), (0, blocks * p.eights * ROWS - S)) + ((0, 0),) * (a.ndim - 2)
        return jnp.pad(a, pad, constant_values=fill).reshape(B, blocks, p.eights, ROWS, *a.shape[2:])

    q = blocked(q_BSIJ.astype(jnp.bfloat16)).swapaxes(3, 4).reshape(B, blocks, p.eights, I * ROWS, J)
    limit = blocked(limit_BS)[..., None]
    pages = jnp.pad(page_table_BP, ((0, 0), (0, -page_table_BP.shape[1] % max(1, p.tile // page_size))))
    block = lambda *shape: pl.BlockSpec((None, None, *shape), lambda b, i, *_: (b, i) + (0,) * len(shape))
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    operands = [pages.astype(jnp.int32)[:, None], q, blocked(w_BSI.astype(jnp.float32)), limit, keys_GMJ]
    if scales_GM is not None:  # one slot's scales, a page a row: 4 bytes a token are copied, so that a DMA can address them
        operands.append(scales_GM[slot].reshape(-1, 1, page_size))
    out = pl.pallas_call(
        functools.partial(_kernel, k=k, heads=I, plan_=p, page_size=page_size, scaled=scales_GM is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, blocks),
            in_specs=[
                pl.BlockSpec((None, 1, pages.shape[1]), lambda b, i, *_: (b, 0, 0), memory_space=pltpu.SMEM),
                block(p.eights, I * ROWS, J),
                block(p.eights, ROWS, I),
                block(p.eights, ROWS, 1),
                *[anywhere] * (len(operands) - 4),
            ],
            out_specs=block(p.eights, ROWS, slots),
            scratch_shapes=[
                pltpu.VMEM((p.eights, groups * LANES * ROWS, LANES), jnp.int32),
                pltpu.VMEM((p.eights * I, ROWS, LANES), jnp.float32),
                pltpu.VMEM((2, p.tile, J), keys_GMJ.dtype),
                pltpu.VMEM((2, 1, p.tile), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                *topk_tpu.scratch(k),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, blocks, p.eights, ROWS, slots), jnp.int32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
        ),
        name="index_topk",
    )(jnp.asarray(slot, jnp.int32).reshape(1), limit.max((2, 3, 4)).reshape(-1), *operands)
    return out.reshape(B, -1, slots)[:, :S, :k], jnp.minimum(limit_BS, k)
