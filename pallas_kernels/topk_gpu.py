"""Exact deterministic top-k of float32 rows on Hopper, output in ascending position order (Pallas Mosaic GPU).

A row is read once. Each block streams its segment past a gate and appends what passes to a list in shared memory. The
gate comes from a sample of the row; a gate that lets fewer than k pass is dropped and the row read again. When the
list is nearly full, a radix select cuts it back to its k best and raises the gate, so that plateaus and rising rows
cost time but never entries. A cluster of blocks shares a long row when rows are few. A bitmap over positions ranks the
unordered survivors.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from .radix_gpu import (
    BINS,
    CAPACITY,
    COUNT,
    PICKED,
    THREADS,
    WARPGROUPS,
    RadixList,
    key_to_bits,
    ordered_key,
    sync,
    sync_any,
)  # fmt: skip
from .words_gpu import Word, loop, popcount, when, when_values

UNROLL = 2  # float4 loads per thread and chunk; the next chunk is in flight
CHUNK = THREADS * 4 * UNROLL
AHEAD = 4  # chunks asked for in advance
WINDOW = 4096  # bitmap words: 131,072 positions ranked at a time
MAX_K = 4096
SAMPLE = THREADS * 4
ALL_PASS = 0x7FC00000  # NaN as a gate: the unordered comparison lets everything through


class RowSelector(RadixList):
    """Code generator of one block's share of one row: streams scores into the list and ranks what is left."""

    def stream(self, load4, prefetch, low, high, gate):
        """Reads positions [low, high) once; the list then holds the candidates above `gate` (float bits).

        load4(position) gives four int32 words of float bits; a position past the row is clamped and its lanes ignored.
        prefetch(position) asks for the chunk there to come into the L2 cache.
        """

        def load(chunk):
            at = low + chunk * CHUNK + self.tid * 4
            return [w for u in range(UNROLL) for w in load4(at + u * THREADS * 4)]

        def step(chunk, gate, *words):
            at = low + chunk * CHUNK + self.tid * 4
            left = (at < high).select(high - at, 0)
            after = load(chunk + 1)
            when(self.tid.eq(0), lambda: prefetch(low + (chunk + AHEAD) * CHUNK))
            f32 = ir.F32Type.get()
            spots, passes = [(j // 4) * THREADS * 4 + j % 4 for j in range(4 * UNROLL)], []
            for w, spot in zip(words, spots, strict=True):
                above = Word(arith.cmpf(arith.CmpFPredicate.UGT, arith.bitcast(f32, w.v), arith.bitcast(f32, gate.v)))
                passes.append(above & (left > spot))

            def append():
                found = [(lambda w=w: ordered_key(w), at + spot) for w, spot in zip(words, spots, strict=True)]
                mine = functools.reduce(lambda a, b: a + b, [x.to_int() for x in passes])
                return [(self.append(found, passes, mine) > CAPACITY - CHUNK).to_int()]

            (full,) = when_values(functools.reduce(lambda a, b: a | b, passes), append, [Word(0)])

            def cut():
                held = self.ctl[COUNT]
                edge, place = self.threshold(held, merged=False)
                self.compact(held, edge, place)
                return [key_to_bits(edge)]

            (gate,) = when_values(sync_any(full).ne(0), cut, [gate])
            return (gate, *after)

        chunks = (high - low + (CHUNK - 1)) >> (CHUNK.bit_length() - 1)
        loop(0, chunks, 1, step, (gate, *load(Word(0))))
        sync()
        held = self.ctl[COUNT]
        sync()
        return held

    def guess(self, load4, low, high):
        """Float bits of a gate that about 2.5 k positions pass, from 2,048 of them; NaN if the range is short."""
        length = high - low

        def sample():
            stride = Word(arith.divui(length.v, Word(THREADS).v)) & -4
            for j, w in enumerate(load4(low + self.tid * stride)):
                self.keys[self.tid * 4 + j] = ordered_key(w)
            sync()
            rank = Word(arith.divui(Word(SAMPLE * self.k * 5 // 2).v, length.v)) + 4
            edge, _, _ = self.kth(Word(SAMPLE), lambda live, key, place: (live, key), rank.min(SAMPLE), merged=False)
            sync()
            # Two keys lower, so that a plateau at the edge passes (one lower than +0.0 would be -0.0, its equal).
            return [key_to_bits(edge - 2)]

        return when_values(length > 4 * CHUNK, sample, [Word(ALL_PASS)])[0]

    def candidates(self, load4, prefetch, low, high):
        """Leaves a superset of the k best of [low, high) in the list; drops a guessed gate that let too few pass."""

        def attempt(_, gate, n):
            def run():
                when(self.tid.eq(0), lambda: self.ctl.__setitem__(COUNT, 0))
                sync()
                return [Word(ALL_PASS), self.stream(load4, prefetch, low, high, gate)]

            again = (n < self.k) & (n < high - low)
            return when_values(again, run, [gate, n])

        return loop(0, 2, 1, attempt, (self.guess(load4, low, high), Word(0)))[1]

    def emit(self, n, edge, place, low, high, base, store):
        """Writes the chosen positions in ascending order from rank `base`: a bitmap per window gives each its rank."""

        def window(start, base):
            def inside(live, key, spot):
                return self.chosen(live, key, spot, edge, place) & (spot - start < WINDOW * 32)

            per = WINDOW // THREADS
            loop(self.tid, WINDOW, THREADS, lambda i: self.bits.__setitem__(i, 0))
            sync()

            def mark(live, key, spot):
                at = spot - start
                when(inside(live, key, spot), lambda: self.bits.update("or.b32", at >> 5, Word(1) << (at & 31)))

            self.entries(n, mark)
            sync()
            counts = [popcount(self.bits[self.tid * per + j]) for j in range(per)]
            before, total = self.scan(functools.reduce(lambda a, b: a + b, counts))
            for j in range(per):
                self.hist[self.tid * per + j] = before
                before = before + counts[j]
            sync()

            def write(live, key, spot):
                at = spot - start

                def put():
                    under = popcount(self.bits[at >> 5] & ((Word(1) << (at & 31)) - 1))
                    store(base + self.hist[at >> 5] + under, spot)

                when(inside(live, key, spot), put)

            self.entries(n, write)
            sync()
            return (base + total,)

        loop(low, high, WINDOW * 32, window, (base,))


def _row(ctx, scores, limits, out, counts, hist, keys, places, bits, ctl, row, rank, *, peers, k, width):
    """One block's work on one row: see RowSelector."""
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    row, rank = Word(row.registers.item()), Word(rank.registers.item())
    s = RowSelector((hist, keys, places, bits, ctl), peers, k)
    limit = Word(memref.load(limits, [row.index()]))
    base = mgpu.utils.memref_ptr(scores)
    origin = arith.muli(arith.extui(i64, row.v), mgpu.c(width, i64))
    vec = ir.VectorType.get((4,), i32)

    def load4(position):
        offset = arith.addi(origin, arith.extui(i64, position.min(width - 4).v))
        ptr = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.getelementptr(base, [offset], i32))
        v = llvm.load(vec, ptr, alignment=16)
        return [Word(llvm.extractelement(v, Word(j).v)) for j in range(4)]

    def prefetch(position):
        def ask():
            offset = arith.addi(origin, arith.extui(i64, position.v))
            ptr = llvm.addrspacecast(
                llvm.PointerType.get(address_space=1), mgpu.utils.getelementptr(base, [offset], i32)
            )
            llvm.inline_asm(
                None, [ptr], f"cp.async.bulk.prefetch.L2.global [$0], {CHUNK * 4};", "l", has_side_effects=True
            )

        when(position + CHUNK <= limit, ask)

    def store(at, value):
        memref.store(value.v, out, [row.index(), at.index()])

    def short():
        step = THREADS * peers
        loop(rank * THREADS + s.tid, k, step, lambda i: store(i, (i < limit).select(i, -1)))

    when(limit <= k, short)

    def full():
        per = ((limit + (4 * peers - 1)) >> (1 + peers.bit_length())) << 2
        low = (rank * per).min(limit)
        high = (low + per).min(limit)
        n = s.candidates(load4, prefetch, low, high)
        edge, place = s.threshold(n, merged=peers > 1)
        first = Word(0)
        if peers > 1:
            s.count_chosen(n, edge, place)
            for p in range(peers - 1):
                first = first + (Word(p) < rank).select(s.peer_word(s.ctl, PICKED, p), 0)
            s.cluster_sync()
        s.emit(n, edge, place, low, high, first, store)

    when(limit > k, full)
    when(rank.eq(0) & s.tid.eq(0), lambda: memref.store(limit.min(k).v, counts, [row.index()]))


def _blocks_per_row(rows, width, processors=132):
    """Blocks that share a row: as many as have a multiprocessor each, while each has a few chunks to read."""
    for peers in (8, 4, 2):
        if rows * peers <= processors and width >= peers * 2 * CHUNK:
            return peers
    return 1


def topk(scores_RT, limit_R, *, k, peers=None):
    """The k best of the first limit_R[r] scores of each row: (positions_RK int32 ascending, -1 padded; count_R int32).

    Order: score descending, then position ascending, in float32; -0.0 equals +0.0, NaN equals -inf. limit_R is clipped
    to [0, T]. `peers` (1, 2, 4 or 8 blocks a row) defaults to what fills the device. Raises ValueError for k above
    MAX_K.
    """
    rows, width = scores_RT.shape
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k is {k}; this kernel takes 1 to {MAX_K}")
    limit_R = jnp.clip(limit_R.astype(jnp.int32), 0, width)
    if width % 4:
        scores_RT = jnp.pad(scores_RT, ((0, 0), (0, -width % 4)))
        width = scores_RT.shape[1]
    peers = peers or _blocks_per_row(rows, width)

    def body(scores, limits, out, counts, hist, keys, places, bits, ctl):
        rank = lax.axis_index("peer") if peers > 1 else jnp.int32(0)
        ref, splat = plgpu.RefType(), plgpu.Layout.WG_SPLAT
        call = plgpu.inline_mgpu(arg_types=(ref,) * 9 + (splat, splat))
        call(functools.partial(_row, peers=peers, k=k, width=width))(
            scores, limits, out, counts, hist, keys, places, bits, ctl, lax.axis_index("row"), rank
        )

    word = functools.partial(plgpu.SMEM, dtype=jnp.int32)
    run = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((rows, k), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)),
        grid=(rows,),
        grid_names=("row",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=dict(
            hist=word((2 * BINS,)),
            keys=word((CAPACITY,)),
            places=word((CAPACITY,)),
            bits=word((WINDOW,)),
            ctl=word((64,)),
        ),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
        **(dict(cluster=(peers,), cluster_names=("peer",)) if peers > 1 else {}),
    )
    return run(scores_RT, limit_R)
