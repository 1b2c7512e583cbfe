"""Radix select over a list of (key, position) entries in shared memory, by one block or by a cluster that shares a row.

The k best by (key descending, position ascending) are described by two words: a key edge and, where the edge is a tie,
the last position taken there. Histograms of a cluster are merged through distributed shared memory.
"""

import functools

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm
from jax.experimental.mosaic import gpu as mgpu

from .words_gpu import Shared, Word, asm, asm_i32, leading_zeros, loop, shuffle, when, when_values

WARPGROUPS = 4
THREADS = WARPGROUPS * 128
CAPACITY = 9728  # list entries (key, position), 76 KB: two blocks fit on a multiprocessor
BINS = 2048
COUNT, LOW, HIGH, BIN, NEED, HELD, PICKED, SCAN = 0, 1, 2, 3, 4, 5, 6, 16  # words of the control block


def sync():
    """A barrier of the whole block."""
    nvvm.barrier(barrier_id=Word(9).v, number_of_threads=Word(THREADS).v)


def sync_any(flag):
    """A barrier of the block that tells every thread whether some thread's flag is not zero."""
    text = f"{{ .reg .pred p, q; setp.ne.u32 p, $1, 0; bar.red.or.pred q, 9, {THREADS}, p; selp.u32 $0, 1, 0, q; }}"
    return asm_i32(text, "=r,r,~{memory}", flag)


def ordered_key(bits):
    """float32 bits -> unsigned key of the same order; NaN becomes -inf, -0.0 becomes +0.0."""
    bits = ((bits & 0x7FFFFFFF) > 0x7F800000).select(Word(-0x800000), bits)
    bits = bits.eq(-0x80000000).select(0, bits)
    return (bits >= Word(-0x80000000)).select(bits ^ -1, bits | -0x80000000)


def key_to_bits(key):
    """Inverse of `ordered_key`."""
    return (key >= Word(-0x80000000)).select(key ^ -0x80000000, key ^ -1)


def block_scan(value, ctl, lane, warp):
    """(exclusive prefix over the block's threads, total); one barrier inside, one needed before the next call."""

    def warp_scan(x):
        for d in (1, 2, 4, 8, 16):
            y = shuffle(x, d, nvvm.ShflKind.up, clamp=0)
            x = x + (lane >= d).select(y, 0)
        return x

    inclusive = warp_scan(value)
    when(lane.eq(31), lambda: ctl.__setitem__(warp + SCAN, inclusive))
    sync()
    warps = warp_scan((lane < THREADS // 32).select(ctl[(lane & (THREADS // 32 - 1)) + SCAN], 0))
    before = shuffle(warps, (warp - 1) & 31, nvvm.ShflKind.idx)
    before = warp.eq(0).select(0, before)
    return before + inclusive - value, shuffle(warps, 31, nvvm.ShflKind.idx)


class RadixList:
    """Code generator of one block's list; `peers` blocks of a cluster share a row and with it the selection."""

    def __init__(self, refs, peers, k):
        self.hist, self.keys, self.places, self.bits, self.ctl = (Shared(r) for r in refs)
        self.peers, self.k = peers, k
        self.tid = Word(arith.remui(mgpu.utils.thread_idx(), Word(THREADS).v))
        self.lane, self.warp = self.tid & 31, self.tid >> 5

    def cluster_sync(self):
        text = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
        llvm.inline_asm(None, [], text, "~{memory}", has_side_effects=True)

    def peer_word(self, buffer, offset, peer):
        """One word of another block of the cluster."""
        remote = asm_i32("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", buffer.address(offset), Word(peer))
        return asm_i32("ld.shared::cluster.u32 $0, [$1];", "=r,r,~{memory}", remote)

    def peer_sum4(self, buffer, offset):
        """Words [offset, offset + 4) of `buffer`, summed over the blocks of the cluster."""
        i32 = ir.IntegerType.get_signless(32)
        four = llvm.StructType.get_literal([i32] * 4)
        total = [Word(0)] * 4
        for p in range(self.peers):
            remote = asm_i32("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", buffer.address(offset), Word(p))
            v = asm(four, "ld.shared::cluster.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,~{memory}", remote).v
            total = [t + Word(llvm.extractvalue(i32, v, [j])) for j, t in enumerate(total)]
        return total

    def entries(self, n, body, carry=()):
        """Runs body(live, key, place, *carry) over the list, four neighbours a thread and step; returns the carry."""

        def step(b, *carry):
            at = b + self.tid * 4
            safe = at.min(CAPACITY - 4)
            for j, (key, place) in enumerate(zip(self.keys.load4(safe), self.places.load4(safe), strict=True)):
                carry = body(at + j < n, key, place, *carry) or ()
            return carry

        return loop(0, n, THREADS * 4, step, carry)

    def scan(self, value):
        """See `block_scan`."""
        return block_scan(value, self.ctl, self.lane, self.warp)

    def bounds(self, n, value_of, merged):
        """Least and largest value over the list (over the cluster's lists when merged)."""
        ctl = self.ctl

        def fold(live, key, place, low, high):
            live, value = value_of(live, key, place)
            return low.min(live.select(value, -1)), high.max(live.select(value, 0))

        low, high = self.entries(n, fold, (Word(-1), Word(0)))
        low = asm_i32("redux.sync.min.u32 $0, $1, -1;", "=r,r", low)
        high = asm_i32("redux.sync.max.u32 $0, $1, -1;", "=r,r", high)

        def first():
            ctl[LOW], ctl[HIGH] = -1, 0

        when(self.tid.eq(0), first)
        sync()

        def publish():
            ctl.update("min.u32", LOW, low)
            ctl.update("max.u32", HIGH, high)

        when(self.lane.eq(0), publish)
        if not merged:
            sync()
            return ctl[LOW], ctl[HIGH]
        self.cluster_sync()
        low, high = Word(-1), Word(0)
        for p in range(self.peers):
            low = low.min(self.peer_word(ctl, LOW, p))
            high = high.max(self.peer_word(ctl, HIGH, p))
        self.cluster_sync()
        return low, high

    def kth(self, n, value_of, need, merged):
        """(edge, ties to take, ties held): values > edge are all taken; of those == edge the first `ties to take`.

        When a whole bin is taken the edge is the bin's lower end and both counts agree: value >= edge is the selection.
        """
        low, high = self.bounds(n, value_of, merged)
        width = Word(32) - leading_zeros(high - low)
        hist, ctl = self.hist, self.ctl
        per = BINS // THREADS

        def digit(p, low, shift, span, need, held, done):
            # Values in [low, low + 2^span) are still open; a digit is the next 11 bits (or what is left).
            def run():
                take = span.min(11)
                down = span - take
                buffer = (p & 1) * BINS
                for j in range(per):
                    hist[buffer + self.tid * per + j] = 0
                sync()

                def tally(live, key, place):
                    live, value = value_of(live, key, place)
                    d = value - low
                    inside = live & (value >= low) & ((d >> (span - 1)) < 2)
                    when(inside, lambda: hist.update("add.u32", buffer + (d >> down), 1))

                self.entries(n, tally)
                top = Word(BINS - per) - self.tid * per
                if merged:
                    self.cluster_sync()
                    counts = self.peer_sum4(hist, buffer + top)
                else:
                    sync()
                    counts = hist.load4(buffer + top)
                mine = functools.reduce(lambda a, b: a + b, counts)
                above, _ = self.scan(mine)

                def find():
                    seen = above
                    for j in reversed(range(per)):
                        after = seen + counts[j]

                        def found(j=j, seen=seen):
                            ctl[BIN], ctl[NEED], ctl[HELD] = top + j, need - seen, counts[j]

                        when((seen < need) & (after >= need), found)
                        seen = after

                when((above < need) & (above + mine >= need), find)
                sync()
                new_need, new_held = ctl[NEED], ctl[HELD]
                new_low = low + (ctl[BIN] << down)
                finished = (down.eq(0) | new_need.eq(new_held)).to_int()
                return [new_low, shift, down, new_need, new_held, finished]

            out = when_values(done.eq(0), run, [low, shift, span, need, held, done])
            return out

        # A range of one value needs no digit; its count is not known, so it is taken as more than needed.
        start = width.eq(0).to_int()
        low, _, _, need, held, _ = loop(0, 3, 1, digit, (low, Word(0), width.max(1), need, Word(-1), start))
        return low, need, held

    def threshold(self, n, merged):
        """(key edge, last position taken at the edge) of the k best by (key descending, position ascending)."""

        def by_key(live, key, place):
            return live, key

        edge, need, held = self.kth(n, by_key, Word(self.k), merged)
        sync()

        def break_ties():
            def by_place(live, key, place):
                return live & key.eq(edge), place ^ -1

            last, _, _ = self.kth(n, by_place, need, merged)
            sync()
            return [last ^ -1]

        (place,) = when_values(need.ne(held), break_ties, [Word(-1)])
        return edge, place

    @staticmethod
    def chosen(live, key, spot, edge, place):
        return live & ((key > edge) | (key.eq(edge) & (spot <= place)))

    def append(self, entries, keep, mine):
        """Adds the `mine` entries (key, position) whose flag in `keep` is set to the list, in any order."""
        to = self.ctl.fetch_add(COUNT, mine)
        for (key, spot), flag in zip(entries, keep, strict=True):

            def put(key=key, spot=spot, to=to):
                self.keys[to], self.places[to] = key() if callable(key) else key, spot

            when(flag, put)
            to = to + flag.to_int()
        return to

    def compact(self, n, edge, place):
        """Moves the chosen entries to the front of the list; ctl[COUNT] becomes their number."""
        when(self.tid.eq(0), lambda: self.ctl.__setitem__(COUNT, 0))

        def batch(b):
            at = b + self.tid * 4
            safe = at.min(CAPACITY - 4)
            four = list(zip(self.keys.load4(safe), self.places.load4(safe), strict=True))
            keep = [self.chosen(at + j < n, key, spot, edge, place) for j, (key, spot) in enumerate(four)]
            mine = functools.reduce(lambda a, b: a + b, [x.to_int() for x in keep])
            sync()
            when(mine.ne(0), lambda: self.append(four, keep, mine))

        loop(0, n, THREADS * 4, batch)
        sync()

    def count_chosen(self, n, edge, place):
        """Publishes the number of chosen entries of this block to the cluster in ctl[PICKED]."""

        def add(live, key, spot, c):
            return (c + self.chosen(live, key, spot, edge, place).to_int(),)

        (mine,) = self.entries(n, add, (Word(0),))
        mine = asm_i32("redux.sync.add.u32 $0, $1, -1;", "=r,r", mine)
        when(self.tid.eq(0), lambda: self.ctl.__setitem__(PICKED, 0))
        sync()
        when(self.lane.eq(0), lambda: self.ctl.update("add.u32", PICKED, mine))
        self.cluster_sync()
