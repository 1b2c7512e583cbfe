"""The groups of `row_plan.py` on Hopper, without a sort: bitmaps over positions give each entry of a union its rank.

One block makes one group. Each of its g selections becomes a bitmap in shared memory, a window of positions at a time;
their OR is the union, a prefix sum of its population counts ranks the entries, and the g bits at a position are its
owners. Lists need not be sorted. The result is that of `row_plan.sort_groups`, element for element.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from .radix_gpu import THREADS, WARPGROUPS, block_scan, sync
from .row_plan import Groups
from .words_gpu import Shared, Word, loop, popcount, when

QUAD = 4 * THREADS  # words of a bitmap come in multiples of it: a thread owns whole quads of neighbours


def window_words(g, capacity):
    """Words of one bitmap, 32 positions each: 64 KB for three selections, which leaves room for three blocks."""
    return min(4096 if g <= 3 else 2048, -(-capacity // (32 * QUAD)) * QUAD)


class GroupBuilder:
    """Code generator of one block: see the module docstring. `bits` [g * words], `before` [words] and `ctl` are shared."""

    def __init__(self, bits, before, ctl, tid, *, g, K, words):
        self.bits, self.before, self.ctl, self.tid = bits, before, ctl, tid
        self.g, self.K, self.words = g, K, words

    def entries(self, lists, load4, body):
        """Runs body(list, position) over the first `lists` selections, which lie one behind the other."""

        def step(quad):
            for position in load4(quad * 4):
                body(quad // (self.K // 4), position)

        loop(self.tid, lists * (self.K // 4), THREADS, step)

    def held(self, word):
        """The g bitmaps' words there."""
        return [self.bits[word + s * self.words] for s in range(self.g)]

    def rank_words(self):
        """Sets before[w] to the union's population in the words below w; returns the whole."""
        per = self.words // THREADS
        counts = []
        for quad in range(per // 4):
            four = [self.bits.load4(self.tid * per + (quad * 4 + s * self.words)) for s in range(self.g)]
            counts += [popcount(functools.reduce(operator.or_, words)) for words in zip(*four, strict=True)]
        below, total = block_scan(functools.reduce(operator.add, counts), self.ctl, self.tid & 31, self.tid >> 5)
        for j, count in enumerate(counts):
            self.before[self.tid * per + j] = below
            below = below + count
        return total

    def build(self, lists, load4, capacity, store):
        """Calls store(rank, position, owners) for every entry of the union of positions below capacity; returns how many."""
        span = self.words * 32

        def window(start, base):
            loop(self.tid, self.g * self.words, THREADS, lambda i: self.bits.__setitem__(i, 0))
            sync()

            def mark(s, position):
                at = position - start  # -1, no position, is beyond every window
                word = s * self.words + (at >> 5)
                when(at < span, lambda: self.bits.update("or.b32", word, Word(1) << (at & 31)))

            self.entries(lists, load4, mark)
            sync()
            total = self.rank_words()
            sync()

            def write(s, position):
                at = position - start

                def put():
                    held, below = self.held(at >> 5), (Word(1) << (at & 31)) - 1
                    owners = [((word >> (at & 31)) & 1) << n for n, word in enumerate(held)]
                    owners = functools.reduce(operator.or_, owners)
                    rank = self.before[at >> 5] + popcount(functools.reduce(operator.or_, held) & below)
                    first = (owners & ((Word(1) << s) - 1)).eq(0)  # of the owners, the first writes
                    when(first, lambda: store(base + rank, position, owners))

                when(at < span, put)

            self.entries(lists, load4, write)
            sync()
            return (base + total,)

        return loop(0, capacity, span, window, (Word(0),))[0]


def _group(ctx, positions, pages, rows, owners, counts, bits, before, ctl, group, *, g, n, S, page_size, words):
    """One block's work on group `group` of n a sequence; positions [B * S, K], rows and owners [G, g * K]."""
    group = Word(group.registers.item())
    K, P = (ir.MemRefType(ref.type).shape[1] for ref in (positions, pages))
    tid = Word(arith.remui(mgpu.utils.thread_idx(), Word(THREADS).v))
    sequence, place = group // n, group % n * g
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    base = mgpu.utils.memref_ptr(positions)
    origin = arith.muli(arith.extui(i64, (sequence * S + place).v), mgpu.c(K, i64))

    def load4(at):
        offset = arith.addi(origin, arith.extui(i64, at.v))
        ptr = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.getelementptr(base, [offset], i32))
        four = llvm.load(ir.VectorType.get((4,), i32), ptr, alignment=16)
        return [Word(llvm.extractelement(four, Word(j).v)) for j in range(4)]

    def put(rank, row, bits):
        memref.store(row.v, rows, [group.index(), rank.index()])
        memref.store(bits.v, owners, [group.index(), rank.index()])

    def store(rank, position, bits):
        page = Word(memref.load(pages, [sequence.index(), (position // page_size).index()]))
        put(rank, page * page_size + position % page_size, bits)

    builder = GroupBuilder(*(Shared(r) for r in (bits, before, ctl)), tid, g=g, K=K, words=words)
    found = builder.build((Word(S) - place).min(g), load4, P * page_size, store)
    loop(found + tid, g * K, THREADS, lambda i: put(i, Word(-1), Word(0)))
    when(tid.eq(0), lambda: memref.store(found.v, counts, [group.index()]))


def bitmap_groups(positions_BSK, page_table_BP, g: int, *, page_size: int) -> Groups:
    """`row_plan.sort_groups` by bitmaps; g at most 16, page_table_BP in the range of the pool."""
    B, S, K = positions_BSK.shape
    if K % 4:
        positions_BSK = jnp.pad(positions_BSK, ((0, 0), (0, 0), (0, -K % 4)), constant_values=-1)
    wide, n = positions_BSK.shape[2], -(-S // g)
    words = window_words(g, page_table_BP.shape[1] * page_size)

    def body(*refs):
        call = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 8 + (plgpu.Layout.WG_SPLAT,))
        call(functools.partial(_group, g=g, n=n, S=S, page_size=page_size, words=words))(*refs, lax.axis_index("group"))

    lists = jax.ShapeDtypeStruct((B * n, g * wide), jnp.int32)
    word = functools.partial(plgpu.SMEM, dtype=jnp.int32)
    kernel = plgpu.kernel(
        body,
        out_type=(lists, lists, jax.ShapeDtypeStruct((B * n,), jnp.int32)),
        grid=(B * n,),
        grid_names=("group",),
        num_threads=WARPGROUPS,
        thread_name="wg",
        scratch_types=[word((g * words,)), word((words,)), word((64,))],
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),
    )
    rows_GU, owners_GU, count_G = kernel(positions_BSK.reshape(B * S, wide), page_table_BP.astype(jnp.int32))
    return Groups(rows_GU[:, : g * K], owners_GU[:, : g * K], count_G)
