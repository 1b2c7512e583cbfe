"""Exact selection on a TPU TensorCore: a threshold by search on order-preserving keys, then compaction in ascending order.

Stands behind ``index_topk_tpu``, which calls ``select`` on keys that its scoring left in VMEM; ``topk`` is the same
selection over scores in HBM. Eight rows are selected together, one a sublane. There is no sort and no scatter: a search
counts keys above a pivot; then bit masks, prefix sums and one-hot products on the matrix unit bring each output slot the
mask of its 128-position segment, and the slot finds its own bit there. Every product is of small integers, hence exact.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, ROWS = 128, 8
GROUP = LANES * LANES  # positions a compaction step takes: 128 segments of 128
INFO = 24  # a segment's facts: 16 mask bytes, its first rank (two bytes), its number, its group
UNROLL = 64  # segments a step of the search counts
LOWEST = -(2**31)  # the key of a position that cannot be chosen
_NT = (((1,), (1,)), ((), ()))


def scratch(k: int) -> list:
    """VMEM that ``select`` needs beside its keys, for ``k`` output slots."""
    return [
        pltpu.VMEM((-(-k // LANES), INFO * ROWS, LANES), jnp.float32),  # facts of each slot's segment
        pltpu.VMEM((ROWS, 32, LANES), jnp.bfloat16),  # facts of one group's segments
        pltpu.VMEM((2, ROWS * ROWS, LANES), jnp.float32),  # ranks before and after each segment, eight times a row
    ]


def ordered(scores):
    """int32 keys in the order of selection: -0 equals +0, NaN and -inf are the smallest float32; all above LOWEST."""
    lowest = float(jnp.finfo(jnp.float32).min)
    scores = jnp.where(jnp.isnan(scores), lowest, jnp.maximum(scores, lowest))
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(keys):
    """The float32 that ``ordered`` mapped to each key."""
    return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ 0x7FFFFFFF, keys), jnp.float32)


def _load(keys_ref, i):
    """Keys of the i-th run of UNROLL segments: [UNROLL x 8, 128]."""
    return keys_ref[pl.ds(pl.multiple_of(i * (UNROLL * ROWS), UNROLL * ROWS), UNROLL * ROWS), :]


def _count(keys_ref, segments, chosen):
    """float32 [8, 1]: how many of each row's first ``segments`` x 128 keys ``chosen(keys, first position)`` holds for."""

    def step(i, sums):
        keys = _load(keys_ref, i)
        for j in range(UNROLL):
            hit = chosen(keys[j * ROWS : (j + 1) * ROWS], (i * UNROLL + j) * LANES)
            sums = sums[1:] + (sums[0] + jnp.where(hit, 1, 0),)
        return sums

    zero = jnp.zeros((ROWS, LANES), jnp.int32)
    sums = lax.fori_loop(0, segments // UNROLL, step, (zero,) * 4)
    return functools.reduce(jnp.add, sums).astype(jnp.float32).sum(1, keepdims=True)


def _extremes(keys_ref, segments):
    """int32 [8, 1] twice: the smallest and the largest key of each row, LOWEST left out of the first."""

    def step(i, carry):
        low, high = carry
        block = _load(keys_ref, i)
        for j in range(UNROLL):
            keys = block[j * ROWS : (j + 1) * ROWS]
            low, high = jnp.minimum(low, jnp.where(keys == LOWEST, 2**31 - 1, keys)), jnp.maximum(high, keys)
        return low, high

    start = jnp.full((ROWS, LANES), 2**31 - 1, jnp.int32), jnp.full((ROWS, LANES), LOWEST, jnp.int32)
    low, high = lax.fori_loop(0, segments // UNROLL, step, start)
    return low.min(1, keepdims=True), high.max(1, keepdims=True)


def _threshold(keys_ref, segments, limit, k):
    """(key, last position taken at that key), int32 [8, 1]: a row takes keys above ``key``, and some of those equal to it.

    Keeps count(keys >= low) >= k > count(keys >= high). Two pivots in three interpolate the logarithm of the count over
    scores, nearly straight in the tail of a distribution; the third halves the range of keys. A row is done when
    a pivot splits off exactly k keys (no ties) or when high is low + 1: at most 96 passes; 11 to 19 on average
    and 26 at most in simulations of normal, lognormal, uniform and relu-sum scores at 8,192 and 200,704 positions.
    """
    smallest, largest = _extremes(keys_ref, segments)
    everything = limit <= k
    low = jnp.where(everything, LOWEST + 1, smallest)
    high = largest + 1
    above_low = jnp.where(everything, k, limit).astype(jnp.float32)
    log_k = jnp.log(jnp.float32(k))

    def active(low, high, above_low):
        return (above_low != k) & (high != low + 1)

    def unfinished(carry):
        _, low, high, above_low, _ = carry
        return jnp.max(jnp.where(active(low, high, above_low), 1, 0)) > 0

    def step(carry):
        turn, low, high, above_low, above_high = carry
        half = (low & high) + ((low ^ high) >> 1)
        bottom, top = _value(low), _value(high)
        log_low, log_high = jnp.log(above_low), jnp.log(jnp.maximum(above_high, 0.5))
        guess = ordered(bottom + (top - bottom) * ((log_low - log_k) / (log_low - log_high)))
        usable = (guess > low) & (guess < high) & (turn % 3 != 2)
        pivot = jnp.where(usable, guess, half)
        above = _count(keys_ref, segments, lambda keys, _: keys >= pivot)
        live = active(low, high, above_low)
        up, down = live & (above >= k), live & (above < k)
        return (
            turn + 1, jnp.where(up, pivot, low), jnp.where(down, pivot, high),
            jnp.where(up, above, above_low), jnp.where(down, above, above_high),
        )  # fmt: skip

    start = (jnp.int32(0), low, high, above_low, jnp.zeros((ROWS, 1), jnp.float32))
    _, low, high, above_low, above_high = lax.while_loop(unfinished, step, start)
    tied = above_low > k
    need = k - above_high  # of the keys equal to low, in ascending position

    def any_tied(carry):
        first, last = carry
        return jnp.max(jnp.where(tied & (last - first > 1), 1, 0)) > 0

    def halve(carry):
        first, last = carry  # too few ties at or before first, enough at or before last
        middle = (first + last) >> 1

        def equal_by_middle(keys, start):
            return (keys == low) & (start + lax.broadcasted_iota(jnp.int32, keys.shape, 1) <= middle)

        enough = _count(keys_ref, segments, equal_by_middle) >= need
        return jnp.where(enough, first, middle), jnp.where(enough, middle, last)

    first = jnp.full((ROWS, 1), -1, jnp.int32)
    last = jnp.broadcast_to(segments * LANES, (ROWS, 1)).astype(jnp.int32)
    _, last = lax.while_loop(any_tied, halve, (first, last))
    return low, last


def _gather_facts(keys_ref, slots_ref, facts_ref, ranks_ref, groups, key, last):
    """Fills slots_ref [slots / 128, fact x row, 128] with the facts of each output slot's segment."""
    fact = lax.broadcasted_iota(jnp.int32, (32, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (32, LANES), 1)
    bit = jnp.where((fact < 16) & (lane // 8 == fact), 1 << (lane % 8), jnp.where((fact >= 16) & (fact < 24), 1, 0))
    to_facts = bit.astype(jnp.float32).astype(jnp.bfloat16)  # masks -> 16 bytes, then the count eight times
    at = lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), 0)
    of = lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), 1)
    to_ranks = jnp.where(at < of, 1.0, 0.0).astype(jnp.bfloat16)  # counts -> sums of those before, then of all
    place = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) * LANES + lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    row8 = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
    lane8 = lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
    slot = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0).astype(jnp.float32)

    for i in range(slots_ref.shape[0]):
        slots_ref[i] = jnp.zeros(slots_ref.shape[1:], jnp.float32)

    def group(g, base):
        facts, counts = [], []
        for r in range(ROWS):
            keys = keys_ref[pl.ds(g * (ROWS * LANES) + r, LANES, stride=ROWS), :]
            mask = (keys > key[r : r + 1]) | ((keys == key[r : r + 1]) & (place <= last[r : r + 1] - g * GROUP))
            mask = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
            both = lax.dot_general(to_facts, mask, _NT, preferred_element_type=jnp.float32)
            facts.append(both[:16])
            counts.append(both[16:24])
        counts = jnp.concatenate(counts)
        ranks = jnp.dot(counts.astype(jnp.bfloat16), to_ranks, preferred_element_type=jnp.float32)
        before = base + ranks[:, :LANES]
        ranks_ref[0] = before
        ranks_ref[1] = before + counts
        after = base + ranks[:, LANES:]
        for r in range(ROWS):
            rank = before[r * ROWS : (r + 1) * ROWS].astype(jnp.int32)
            rest = jnp.where(row8 == 0, rank >> 8, jnp.where(row8 == 1, rank & 255, jnp.where(row8 == 2, lane8, g)))
            rest = jnp.where(row8 < 4, rest, 0).astype(jnp.float32)
            facts_ref[r] = jnp.concatenate([facts[r], rest, jnp.zeros_like(rest)]).astype(jnp.bfloat16)

        def put(i, carry):
            nth = slot + (i * LANES).astype(jnp.float32)
            for r in range(ROWS):
                wide = lambda a, r=r: jnp.concatenate([a[r * ROWS : (r + 1) * ROWS]] * (LANES // ROWS))
                here = (wide(ranks_ref[0]) <= nth) & (wide(ranks_ref[1]) > nth)
                here = jnp.where(here, 1.0, 0.0).astype(jnp.bfloat16)
                got = lax.dot_general(facts_ref[r], here, _NT, preferred_element_type=jnp.float32)
                at = pl.ds(r, INFO, stride=ROWS)
                slots_ref[i, at, :] = slots_ref[i, at, :] + got[:INFO]
            return carry

        # Slots of this group's positions, of any row; a row without a position in such a tile adds zeros.
        first, end = jnp.min(base).astype(jnp.int32), jnp.max(after).astype(jnp.int32)
        lax.fori_loop(first // LANES, (end + LANES - 1) // LANES, put, 0)
        return after

    lax.fori_loop(0, groups, group, jnp.zeros((ROWS * ROWS, LANES), jnp.float32))


def _positions(facts, first):
    """int32 [8, 128] positions of slots ``first`` .. + 128, from the facts [24 x 8, 128] of their segments."""
    fact = [facts[i * ROWS : (i + 1) * ROWS].astype(jnp.int32) for i in range(20)]
    rank = first + lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1) - (fact[16] * 256 + fact[17])
    byte, at = jnp.zeros_like(rank), jnp.zeros_like(rank)
    for i in range(16):
        ones = fact[i] - ((fact[i] >> 1) & 0x55)
        ones = (ones & 0x33) + ((ones >> 2) & 0x33)
        ones = (ones + (ones >> 4)) & 15
        here = (rank >= 0) & (rank < ones)
        byte, at = jnp.where(here, fact[i], byte), jnp.where(here, i * 8, at)
        # Once found, the rank inside the byte is kept as rank - 2^20, out of reach of the bytes that follow.
        rank = jnp.where(here, rank - 2**20, jnp.where(rank >= 0, rank - ones, rank))
    rank = rank + 2**20
    for i in range(8):
        bit = (byte >> i) & 1
        at = jnp.where((bit == 1) & (rank == 0), at + i, at)
        rank = rank - bit
    return (fact[19] * LANES + fact[18]) * LANES + at


def select(keys_ref, out_ref, slots_ref, facts_ref, ranks_ref, limit, most, *, k: int):
    """Writes the positions of each row's k best keys to out_ref int32 [8, slots], ascending, -1 padded.

    keys_ref int32 [segments x 8, 128]: row s * 8 + r holds row r's keys at positions 128 s .. 128 s + 127, LOWEST where
    position >= limit, up to the end of the 16,384 positions that hold position ``most`` - 1. limit int32 [8, 1]; most: its
    largest, int32 scalar.
    """
    key, last = _threshold(keys_ref, pl.cdiv(most, UNROLL * LANES) * UNROLL, limit, k)
    _gather_facts(keys_ref, slots_ref, facts_ref, ranks_ref, pl.cdiv(most, GROUP), key, last)
    for i in range(slots_ref.shape[0]):
        slot = i * LANES + lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
        found = _positions(slots_ref[i], i * LANES)
        out_ref[:, i * LANES : (i + 1) * LANES] = jnp.where(slot < jnp.minimum(limit, k), found, -1)


def topk(scores_RT, limit_R, *, k: int):
    """The k best of the first limit_R[r] scores of each row: (positions_RK int32 ascending, -1 padded; count_R int32).

    Order: score descending, then position ascending, in float32; -0.0 equals +0.0, NaN equals -inf.
    """
    rows, width = scores_RT.shape
    groups = -(-width // GROUP)
    slots = -(-k // LANES) * LANES
    scores_RT = jnp.pad(scores_RT, ((0, -rows % ROWS), (0, groups * GROUP - width)))
    limit_R = jnp.clip(limit_R.astype(jnp.int32), 0, width)
    limit_R1 = jnp.pad(limit_R, (0, -rows % ROWS))[:, None]

    def kernel(scores_ref, limit_ref, out_ref, keys_ref, *rest):
        limit = limit_ref[...]
        most = jnp.max(limit)

        def fill(s, carry):
            scores = scores_ref[:, pl.ds(pl.multiple_of(s * LANES, LANES), LANES)]
            place = s * LANES + lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)
            keys_ref[pl.ds(pl.multiple_of(s * ROWS, ROWS), ROWS), :] = jnp.where(place < limit, ordered(scores), LOWEST)
            return carry

        lax.fori_loop(0, pl.cdiv(most, GROUP) * LANES, fill, 0)
        select(keys_ref, out_ref, *rest, limit, most, k=k)

    out = pl.pallas_call(
        kernel,
        grid=(scores_RT.shape[0] // ROWS,),
        in_specs=[pl.BlockSpec((ROWS, groups * GROUP), lambda i: (i, 0)), pl.BlockSpec((ROWS, 1), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((ROWS, slots), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((scores_RT.shape[0], slots), jnp.int32),
        scratch_shapes=[pltpu.VMEM((groups * LANES * ROWS, LANES), jnp.int32), *scratch(k)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=min(3 * groups * GROUP * 32 + 2**23, 60 * 2**20)
        ),
        name="topk",
    )(scores_RT, limit_R1)
    return out[:rows, :k], jnp.minimum(limit_R, k)
