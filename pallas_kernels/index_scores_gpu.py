"""Lightning-indexer scores on Hopper: sum over heads of w * relu(q . k), paged keys, causal tiles skipped.

Keys stand on the rows of a wgmma tile and (query, head) pairs on its columns, so that a thread holds whole head sums
in registers. Columns are permuted before the launch: in a prefill tile the four lanes that share a row own one query
each and need no shuffle; in a decode tile they own a quarter of the heads of one query each. Both add in one order
(see `_head_sum`), so prefill and decode scores are bitwise equal.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from .words_gpu import Word, shuffle, when

HEAD_DIM = 128
PROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Plan:
    """Block sizes of one launch. A warpgroup has `groups` x (4 queries x heads) columns, or 1 query x heads."""

    heads: int  # padded to a power of two, 8 to 64
    groups: int  # 0: decode, one query a block, the warpgroups split the keys
    warpgroups: int  # consumers
    tile: int  # keys per pipeline stage
    stages: int
    segment: int  # keys per block

    @property
    def columns(self):
        return self.heads * 4 * self.groups if self.groups else self.heads

    @property
    def queries(self):
        return 4 * self.groups * self.warpgroups if self.groups else 1


def plan(queries, heads, capacity, page_size, itemsize, batch):
    """Block sizes for `queries` (of each of `batch` sequences) x `heads` over `capacity` positions."""
    heads = max(8, 1 << (heads - 1).bit_length())
    tile = 128 if page_size % 128 == 0 else 64
    if queries <= 2:
        blocks = batch * queries
        segments = max(1, PROCESSORS // blocks)
        segment = max(4 * tile, -(-capacity // (segments * tile)) * tile)
        return Plan(heads, 0, tile // 64, tile, 8 // itemsize, segment)
    groups = 64 // heads
    per_block = 8 * groups
    blocks = batch * -(-queries // per_block)
    segments = max(1, -(-8 * PROCESSORS // blocks))
    segment = max(2048, -(-capacity // (segments * 1024)) * 1024)
    return Plan(heads, groups, 2, 64 if itemsize == 2 else tile, 5, segment)


def _f32(text, constraints, *args, pure=True):
    f32 = ir.F32Type.get()
    return llvm.inline_asm(f32, list(args), text, constraints, has_side_effects=not pure)


def _descriptor(ref, offset, itemsize):
    """wgmma matrix descriptor of a K-major tile of 128-byte-swizzled rows, `offset` bytes into `ref`."""
    i64 = ir.IntegerType.get_signless(64)
    address = arith.addi(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref)), mgpu.c(offset, i64))
    low = arith.shrui(arith.andi(address, mgpu.c(0x3FFFF, i64)), mgpu.c(4, i64))
    return arith.ori(low, mgpu.c((1 << 16) | ((8 * HEAD_DIM * itemsize >> 4) << 32) | (1 << 62), i64))


def _wgmma(keys, q, columns, itemsize):
    """64 keys x `columns` products (descriptors), waited for; the float32 accumulators, 4 per 8 columns.

    One asm block, so that the first step ignores the accumulators instead of adding to zeros written beforehand.
    """
    f32 = ir.F32Type.get()
    k_step, kind = (16, "bf16") if itemsize == 2 else (32, "e4m3")
    n = columns // 2
    out = "{" + ",".join(f"${i}" for i in range(n)) + "}"
    tail = ", 0, 0" if itemsize == 2 else ""
    lines = [
        "{ .reg .pred first, rest; .reg .b64 a, b;",
        f"setp.ne.b32 first, ${n + 2}, ${n + 2}; setp.eq.b32 rest, ${n + 2}, ${n + 2}; wgmma.fence.sync.aligned;",
    ]
    for step in range(HEAD_DIM // k_step):
        # A 128-byte swizzle atom holds four steps; bf16 rows span two atoms, 1,024 bytes apart.
        advance = (step % 4) * 2 + (step // 4) * 64
        lines.append(f"add.s64 a, ${n}, {advance}; add.s64 b, ${n + 1}, {advance};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{columns}k{k_step}.f32.{kind}.{kind} "
            f"{out}, a, b, {'rest' if step else 'first'}, 1, 1{tail};"
        )
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }")
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * n),
        [keys, q, Word(0).v],
        "\n".join(lines),
        ",".join(["=f"] * n + ["l", "l", "r", "~{memory}"]),
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, struct, [i]) for i in range(n)]


def _relu(x):
    return _f32("max.NaN.f32 $0, $1, 0f00000000;", "=f,f", x)


def _fma(a, b, c):
    return _f32("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)


def _mul(a, b):
    return _f32("mul.rn.f32 $0, $1, $2;", "=f,f,f", a, b)


def _add(a, b):
    return _f32("add.rn.f32 $0, $1, $2;", "=f,f,f", a, b)


def _head_sum(acc, weights, plan_):
    """Yields (column group, row half, score) of this thread.

    The order: heads with equal (h % 8) // 2 are added by fused multiply-add in ascending h, from w * relu of the first;
    then (chain 0 + chain 1) + (chain 2 + chain 3).
    """
    chains = 4 if plan_.groups else 1
    eights = plan_.columns // 8 // max(plan_.groups, 1)
    for group in range(max(plan_.groups, 1)):
        for half in range(2):
            sums = [None] * chains
            for j in range(eights):
                for e in range(2):
                    at, c = group * eights + j, j % chains
                    x, w = _relu(acc[at * 4 + half * 2 + e]), weights[at * 2 + e]
                    sums[c] = _mul(w, x) if sums[c] is None else _fma(w, x, sums[c])
            yield (
                group,
                half,
                _add(_add(sums[0], sums[1]), _add(sums[2], sums[3])) if chains == 4 else _quad_sum(sums[0]),
            )


def _quad_sum(total):
    """(chain 0 + chain 1) + (chain 2 + chain 3) where each of four neighbouring lanes holds a chain."""
    for lanes in (1, 2):
        other = shuffle(Word(arith.bitcast(ir.IntegerType.get_signless(32), total)), lanes, nvvm.ShflKind.bfly)
        total = _add(total, arith.bitcast(ir.F32Type.get(), other.v))
    return total


def _consume(ctx, keys, q, weights, scales, out, row, start, key_part, *, plan_, itemsize, capacity, parts):
    """Scores of one pipeline stage at position `start` -> out[row ...]: `parts` x 64 keys from 64 * `key_part` on.

    A value of `scales` is read per key where the pool has them.
    """
    i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
    row, start, key_part = (Word(x.registers.item()) for x in (row, start, key_part))
    thread = Word(arith.remui(mgpu.utils.thread_idx(), Word(128).v))
    lane, warp = thread & 31, thread >> 5
    w = [llvm.extractelement(p, Word(e).v) for p in weights.registers.flat for e in range(2)]
    base = mgpu.utils.memref_ptr(out)

    def put(here, group, half, value):
        if scales is not None:
            value = _mul(value, llvm.load(f32, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(scales), [here.v], f32)))
        query = row + (lane & 3) + 4 * group if plan_.groups else row
        line = arith.muli(arith.extui(i64, query.v), mgpu.c(capacity, i64))
        offset = arith.addi(line, arith.extui(i64, (start + here).v))
        ptr = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.getelementptr(base, [offset], f32))
        if plan_.groups:
            llvm.store(value, ptr, alignment=4)
        else:
            when((lane & 3).eq(half), lambda: llvm.store(value, ptr, alignment=4))

    for part in range(parts):
        key_tile = _descriptor(keys, part * 64 * HEAD_DIM * itemsize, itemsize)
        acc = _wgmma(key_tile, _descriptor(q, 0, itemsize), plan_.columns, itemsize)
        for group, half, value in _head_sum(acc, w, plan_):
            put(key_part * 64 + (part * 64 + warp * 16) + (lane >> 2) + 8 * half, group, half, value)


def _kernel(
    q, w, keys, scales, slot, pages, limits, out, *, smem, plan_, blocks_per_sequence, page_size, itemsize, transforms
):
    """One block: `plan_.queries` queries x one segment of keys. The last warpgroup loads, the others compute."""
    blocks = limits.shape[0]
    item, wg = lax.axis_index("item"), lax.axis_index("wg")
    block, first = lax.rem(item, blocks), lax.div(item, blocks) * plan_.segment
    sequence = lax.div(block, blocks_per_sequence)
    last = jnp.minimum(first + plan_.segment, limits[block])
    tiles = lax.div(jnp.maximum(last - first, 0) + plan_.tile - 1, plan_.tile)
    k_smem, q_smem, full, empty, q_full = (smem[n] for n in ("keys", "q", "full", "empty", "q_full"))

    @pl.when((wg == plan_.warpgroups) & (tiles > 0))
    def _load():
        plgpu.set_max_registers(40, action="decrease")
        for j in range(q_smem.shape[0]):
            plgpu.copy_gmem_to_smem(q.at[block * q_smem.shape[0] + j], q_smem.at[j], q_full)
        g = slot[0]

        def page_of(i):
            return pages[sequence, lax.div(jnp.minimum(first + i * plan_.tile, last - 1), page_size)]

        def step(i, page):
            stage = lax.rem(i, plan_.stages)
            following = page_of(i + 1)

            @pl.when(i >= plan_.stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])

            row = page * page_size + lax.rem(first + i * plan_.tile, page_size)
            plgpu.copy_gmem_to_smem(keys.at[g, pl.ds(row, plan_.tile)], k_smem.at[stage], full.at[stage])
            if scales is not None:
                plgpu.copy_gmem_to_smem(scales.at[g, pl.ds(row, plan_.tile)], smem["scales"].at[stage], full.at[stage])
            return following

        lax.fori_loop(0, tiles, step, page_of(0))

    @pl.when((wg < plan_.warpgroups) & (tiles > 0))
    def _score():
        plgpu.set_max_registers(232, action="increase")
        part = jnp.int32(0) if plan_.groups else wg
        mine = wg if plan_.groups else 0
        parts = plan_.tile // 64 if plan_.groups else 1
        layout = plgpu.Layout.WGMMA.reduce(0)
        weights = plgpu.load(w.at[block * q_smem.shape[0] + mine], layout=layout, optimized=False)
        row = block * plan_.queries + (wg * 4 * plan_.groups if plan_.groups else 0)
        plgpu.barrier_wait(q_full)
        ref, splat = plgpu.RefType(), plgpu.Layout.WG_SPLAT
        types = (plgpu.RefType(transforms), plgpu.RefType(transforms), layout)
        consume = functools.partial(_consume, plan_=plan_, itemsize=itemsize, capacity=out.shape[1], parts=parts)

        def step(i, _):
            stage = lax.rem(i, plan_.stages)
            plgpu.barrier_wait(full.at[stage])
            k_ref = k_smem.at[stage] if plan_.groups else k_smem.at[stage, pl.ds(wg * 64, 64)]
            tail = (row, first + i * plan_.tile, part)
            if scales is None:
                call = plgpu.inline_mgpu(arg_types=types + (ref, splat, splat, splat))
                call(lambda ctx, k, q, w, o, *t: consume(ctx, k, q, w, None, o, *t))(
                    k_ref, q_smem.at[mine], weights, out, *tail
                )
            else:
                call = plgpu.inline_mgpu(arg_types=types + (ref, ref, splat, splat, splat))
                call(consume)(k_ref, q_smem.at[mine], weights, smem["scales"].at[stage], out, *tail)
            plgpu.barrier_arrive(empty.at[stage])

        lax.fori_loop(0, tiles, step, None)


def _permute(x, plan_, batch, blocks):
    """[B, blocks * queries, heads, ...] -> [B * blocks * warpgroups, columns, ...] in the kernel's column order."""
    rest = x.shape[3:]
    if not plan_.groups:
        return x.reshape(batch * blocks, plan_.heads, *rest)
    x = x.reshape(batch * blocks, plan_.warpgroups, plan_.groups, 4, plan_.heads // 2, 2, *rest)
    order = (0, 1, 2, 4, 3, 5, *range(6, 6 + len(rest)))
    return x.transpose(order).reshape(-1, plan_.columns, *rest)


def padded_queries(queries, plan_):
    return -(-queries // plan_.queries) * plan_.queries


def index_scores(
    q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B, *, page_size, min_limit=0, plan_=None
):
    """Scores_BST float32 with T = P * page_size; entries at t > position or t >= length are undefined (not written).

    q [B,S,I,128] bf16 or e4m3; w [B,S,I] float32; index_pool (keys [G,rows,128], scales None or float32 [G,rows]);
    slot: traced int32 scalar. A block of queries that all see at most `min_limit` keys is skipped. Formula:
    DeepSeek-V3.2 report, section 2.1.
    """
    keys, scales = index_pool
    batch, queries, heads, _ = q_BSIJ.shape
    capacity = page_table_BP.shape[1] * page_size
    itemsize = jnp.dtype(q_BSIJ.dtype).itemsize
    plan_ = plan_ or plan(queries, heads, capacity, page_size, itemsize, batch)
    padded = padded_queries(queries, plan_)
    blocks = padded // plan_.queries
    pad = ((0, 0), (0, padded - queries), (0, plan_.heads - heads))
    q = _permute(jnp.pad(q_BSIJ, pad + ((0, 0),)), plan_, batch, blocks)
    w = _permute(jnp.pad(w_BSI.astype(jnp.float32), pad), plan_, batch, blocks)
    limit_BS = jnp.clip(jnp.minimum(positions_BS + 1, lengths_B[:, None]), 0, capacity).astype(jnp.int32)
    limit = jnp.pad(limit_BS, pad[:2]).reshape(batch * blocks, plan_.queries).max(axis=1)
    limit = jnp.where(limit <= min_limit, 0, limit)

    transforms = (plgpu.TilingTransform((8, 128 // itemsize)), plgpu.SwizzleTransform(128))
    consumers, copies = plan_.warpgroups, plan_.warpgroups if plan_.groups else 1
    smem = dict(
        keys=plgpu.SMEM((plan_.stages, plan_.tile, HEAD_DIM), keys.dtype, transforms=transforms),
        q=plgpu.SMEM((copies, plan_.columns, HEAD_DIM), q.dtype, transforms=transforms),
        full=plgpu.Barrier(num_barriers=plan_.stages, num_arrivals=1 if scales is None else 2),
        empty=plgpu.Barrier(num_barriers=plan_.stages, num_arrivals=consumers),
        q_full=plgpu.Barrier(num_arrivals=copies),
    )
    if scales is not None:
        smem["scales"] = plgpu.SMEM((plan_.stages, plan_.tile), jnp.float32)
    static = dict(
        plan_=plan_, blocks_per_sequence=blocks, page_size=page_size, itemsize=itemsize, transforms=transforms
    )
    has_scales = scales is not None

    def body(*refs, **smem):
        q, w, keys = refs[:3]
        sc = refs[3] if has_scales else None
        _kernel(q, w, keys, sc, *refs[3 + has_scales :], smem=smem, **static)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * padded, capacity), jnp.float32),
        grid=(-(-capacity // plan_.segment) * batch * blocks,),
        grid_names=("item",),
        num_threads=consumers + 1,
        thread_name="wg",
        scratch_types=smem,
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )
    operands = (q, w, keys) + ((scales,) if has_scales else ())
    scores = run(*operands, jnp.asarray(slot, jnp.int32).reshape(1), page_table_BP.astype(jnp.int32), limit)
    return scores.reshape(batch, padded, capacity)[:, :queries]
