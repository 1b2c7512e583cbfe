"""Cases of index_topk for kernels.py: exact selection alone (topk), scores alone, and the whole op (whole).

FLOPs are 2*128 a head and causal pair; bytes are the float32 scores that are selected from, or the keys that decode reads.
Peers on one H200: SGLang's topk_v2, and DeepGEMM's fp8 logits (causal offset, 32 heads).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import Check, Timing, Work, repeated

from pallas_kernels import index_scores_gpu, index_topk_gpu, topk_gpu

PAGE = 256
FP8, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
SHORT = {FP8: "fp8", BF16: "bf16"}
ROUNDING = {FP8: 2.0**-12, BF16: 2.0**-20}  # of sum |w| |q|.|k|: fp8 products are added with about 14 bits
scores_of = functools.partial(index_scores_gpu.index_scores, page_size=PAGE)
index_topk_of = functools.partial(index_topk_gpu.index_topk, k=2048, page_size=PAGE)

TOPK = {(1, 200704): 43, (64, 200704): 50, (1024, 32768): 80, (1024, 131072): 271, (1024, 200704): 404}  # SGLang, us
SCORES = {(2048, 65536): 1110, (4096, 131072): 4380}  # DeepGEMM fp8, us
WHOLE_PEER = ((4380 + 1080, "DeepGEMM + SGLang"),)
WHOLE_REACH = {FP8: (5400, 4500), BF16: (9000,)}  # 4,096 queries x 131,072
DECODE_REACH = 45  # one query x 200,704


def selection(scores, limit, k):
    """The contract in NumPy, one row at a time."""
    scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float32) + 0.0
    out = np.full((len(scores), k), -1, np.int32)
    for r, n in enumerate(limit):
        best = np.sort(np.argsort(-scores[r, :n], kind="stable")[:k])
        out[r, : len(best)] = best
    return out, np.minimum(limit, k)


KINDS = {  # rows of scores from (normal numbers, their generator)
    "normal": lambda x, rng: x,
    "plateau": lambda x, rng: np.maximum(x - 2.5, 0),
    "narrow": lambda x, rng: rng.uniform(1.0, 1.245, x.shape),
    "equal": lambda x, rng: np.full(x.shape, x[0, 0]),
    "zeros": lambda x, rng: np.where(x > 0, 0.0, -0.0),
    "inf_tail": lambda x, rng: np.where(np.arange(x.shape[1]) >= 1000, -np.inf, x),
    "nan": lambda x, rng: np.where(x > 0.5, np.nan, x),
    "all_nan": lambda x, rng: np.full(x.shape, np.nan),
    "rising": lambda x, rng: np.sort(x, axis=1),
    "falling": lambda x, rng: np.sort(x, axis=1)[:, ::-1],
    "denormal": lambda x, rng: x * 1e-39,
    "few": lambda x, rng: rng.integers(0, 7, x.shape),
    "huge": lambda x, rng: x * 1e38,
}
TOPK_CHECKS = [  # kind, width, k, blocks a row
    *((kind, *how) for kind in KINDS for how in ((40001, 2048, 8), (150000, 2048, 1))),
    ("normal", 600, 8, 1),
    ("few", 600, 8, 1),
    ("normal", 30000, 4096, 4),
]
SCORES_CHECKS = [  # batch, queries, capacity, heads, dtype, scaled
    *((*shape, dtype, dtype == FP8) for dtype in (FP8, BF16)
      for shape in ((1, 64, 4096, 32), (2, 37, 2048, 64), (2, 9, 1024, 5), (3, 2, 2048, 32))),
    (1, 16, 1024, 32, FP8, False),
]  # fmt: skip
WHOLE_CHECKS = {  # (batch, queries, capacity, dtype, k, slots, spare pages)
    **{f"{SHORT[dtype]}.{name}": (*shape[:3], dtype, *shape[3:]) for dtype in (FP8, BF16) for name, shape in {
        "prefill": (1, 70, 16384, 2048, 2, 1),
        "prefill_from_0": (2, 600, 768, 128, 2, 1),
        "decode": (3, 1, 32768, 2048, 2, 1),
    }.items()},
    "fp8.large_pool": (1, 5, 8192, FP8, 512, 3, 24000),  # beyond 2^31 elements
}  # fmt: skip


def rows_of(kind, rows, width):
    rng = np.random.default_rng(rows * width)
    with np.errstate(over="ignore"):  # some huge ones are infinite
        return KINDS[kind](rng.standard_normal((rows, width), dtype=np.float32), rng).astype(np.float32)


def check_topk(kind, width, k, peers):
    """The selection of rows of every length: whole, one less, k + 1, k and some other; of normal ones 0, 1, k - 1, k + 2."""
    limit = [width, width - 1, k + 1, k, width // 3] + ([0, 1, k - 1, k + 2] if kind == "normal" else [])
    limit = np.clip(limit, 0, width).astype(np.int32)
    scores = rows_of(kind, len(limit), width)
    got, count = jax.jit(functools.partial(topk_gpu.topk, k=k, peers=peers))(scores, limit)
    want, want_count = selection(scores, limit, k)
    bad = [
        f"row of {n}: {len(set(a) ^ set(b))} differ"
        for n, a, b in zip(limit, np.asarray(got), want, strict=True)
        if any(a != b)
    ]
    return {"equal to a stable sort" + "".join(f", {b}" for b in bad): not bad, "counts": np.array_equal(count, want_count)}


def check_repeat(peers):
    scores, limit = jnp.asarray(rows_of("few", 4, 60000)), jnp.full((4,), 60000, jnp.int32)
    return {"100 runs alike": repeated(functools.partial(topk_gpu.topk, k=2048, peers=peers), scores, limit, calls=100)[1]}


@functools.partial(jax.jit, static_argnums=range(7))
def _arrays(batch, queries, pages, heads, dtype, slots, spare):
    keys = jax.random.split(jax.random.key(0), 5)
    pool_rows = (batch * pages + spare) * PAGE
    pool = jax.random.normal(keys[0], (slots, pool_rows, 128), BF16).astype(dtype)
    scales = jax.random.uniform(keys[1], (slots, pool_rows), minval=0.5, maxval=1.5)
    q = jax.random.normal(keys[2], (batch, queries, heads, 128), BF16).astype(dtype)
    return q, jax.random.normal(keys[3], (batch, queries, heads)), pool, scales


def problem(batch, queries, capacity, heads, dtype, slots=2, scaled=None, spare=1):
    """Random arguments of index_topk with shuffled pages; positions are the last of each sequence."""
    pages = capacity // PAGE
    q, w, pool, scales = _arrays(batch, queries, pages, heads, dtype, slots, spare)
    scaled = dtype == FP8 if scaled is None else scaled
    table = np.random.default_rng(0).permutation(batch * pages + spare)[: batch * pages].reshape(batch, pages)
    positions = np.broadcast_to(capacity - queries + np.arange(queries), (batch, queries))
    integers = (jnp.asarray(x, jnp.int32) for x in (table, positions, np.full(batch, capacity)))
    return q, w, (pool, scales if scaled else None), jnp.int32(slots - 1), *integers


@jax.jit
def scores_ref(q, w, pool, slot, table, positions, lengths):
    """float32 scores and the sum of |terms|, which bounds their rounding."""
    rows = (table[:, :, None] * PAGE + jnp.arange(PAGE)).reshape(len(table), -1)
    # The barrier keeps XLA from turning the float32 product into an fp8 one.
    q, k = jax.lax.optimization_barrier((q.astype(jnp.float32), pool[0][slot][rows].astype(jnp.float32)))
    dots = jnp.einsum("bsij,btj->bsit", q, k, precision="highest")
    terms = w[..., None] * jax.nn.relu(dots)
    size = jnp.einsum("bsij,btj->bsit", jnp.abs(q), jnp.abs(k), precision="highest")
    total, bound = terms.sum(2), (jnp.abs(w)[..., None] * size).sum(2)
    if pool[1] is not None:
        scale = pool[1][slot][rows][:, None]
        total, bound = total * scale, bound * scale
    return total, bound


def check_scores(batch, queries, capacity, heads, dtype, scaled):
    args = problem(batch, queries, capacity, heads, dtype, scaled=scaled)
    lengths = jnp.asarray(np.random.default_rng(1).integers(capacity // 2, capacity + 1, batch), jnp.int32)
    args = (*args[:6], lengths)
    f = jax.jit(scores_of)
    got, (want, bound) = f(*args), scores_ref(*args)
    q, w, pool, slot, table, positions, _ = args
    live = jnp.arange(capacity) < jnp.minimum(positions + 1, lengths[:, None])[..., None]
    error = jnp.where(live, jnp.abs(got - want) / bound, 0)
    worst = float(jnp.where(jnp.isnan(error), jnp.inf, error).max())
    same = True
    for s in {0, queries // 2, queries - 1}:
        single = f(q[:, s : s + 1], w[:, s : s + 1], pool, slot, table, positions[:, s : s + 1], lengths)
        same &= bool(jnp.where(live[:, s], single[:, 0] == got[:, s], True).all())
    error = f"within 2^{np.log2(max(worst, 1e-30)):.1f} of sum |w||q||k|"
    return {error: worst < ROUNDING[dtype], "decode scores bitwise equal to prefill": same}


def check_whole(batch, queries, capacity, dtype, k, slots, spare):
    args = problem(batch, queries, capacity, 32, dtype, slots=slots, spare=spare)
    positions = args[5] if queries == 1 else args[5].at[:, -1].set(-1)
    args = (*args[:5], positions, args[6])
    op = functools.partial(index_topk_of, k=k)
    flat = lambda x: np.asarray(x).reshape(batch * queries, -1)
    found, count = jax.jit(op)(*args)
    again, _, scores = jax.jit(functools.partial(op, return_scores=True))(*args)
    own, (ref, bound) = flat(jax.jit(scores_of)(*args)), map(flat, scores_ref(*args))
    limit, got = flat(jnp.minimum(positions + 1, args[6][:, None]))[:, 0], flat(found)
    some = np.random.default_rng(2).integers(0, len(got), 12)
    some = np.unique(np.concatenate([some, [0, len(got) - 1]]))
    (best, best_count), (want, _) = (selection(x[some], limit[some], k) for x in (own, ref))
    at = np.take_along_axis(own[some], np.maximum(got[some], 0), 1)
    differ, outside = 0, 0
    for i, r in enumerate(some):
        odd = np.array(sorted(set(got[r]) ^ set(want[i])), int)
        if len(odd):
            kth = np.sort(ref[r, : limit[r]])[-k]
            differ += 1
            outside += bool((np.abs(ref[r, odd] - kth) > 2 * ROUNDING[dtype] * bound[r, : limit[r]].max()).any())
    return {
        "selection of its own scores": np.array_equal(got[some], best) and np.array_equal(flat(count)[some, 0], best_count),
        "returns the scores it selected by": bool(
            (again == found).all() and ((got[some] < 0) | (flat(scores)[some] == at)).all()
        ),
        f"{differ} of {len(some)} rows differ from float32, within rounding of the k-th score": outside == 0,
    }


def topk(rows, width, change=lambda x: x):
    scores = change(jax.random.normal(jax.random.key(rows), (rows, width)))
    select = functools.partial(topk_gpu.topk, k=2048, peers=None)
    return Work(select, (scores, jnp.full((rows,), width, jnp.int32)), moved=rows * width * 4)


def over_pool(f, dtype, queries, capacity, batch=1):
    """Scores or the whole op: many queries of one sequence by their FLOPs, single ones of `batch` by the bytes of keys."""
    args = problem(batch, queries, capacity, 32, dtype, slots=1 if batch > 1 else 2)
    if queries == 1:
        return Work(f, args, moved=batch * capacity * 128 * jnp.dtype(dtype).itemsize)
    pairs = queries * capacity - queries * (queries - 1) / 2
    return Work(f, args, flops=pairs * 32 * 128 * 2, fp8=dtype == FP8)


def cases():
    make = functools.partial
    for kind, width, k, peers in TOPK_CHECKS:
        yield Check(f"index_topk.topk.{kind}.{k}_of_{width}", make(check_topk, kind, width, k, peers))
    for peers in (1, 8):
        yield Check(f"index_topk.topk.repeat_{peers}", make(check_repeat, peers))
    for shape in SCORES_CHECKS:
        name = "x".join(map(str, shape[:4])) + ("" if shape[5] == (shape[4] == FP8) else ".no_scales")
        yield Check(f"index_topk.scores.{SHORT[shape[4]]}.{name}", make(check_scores, *shape))
    for name, shape in WHOLE_CHECKS.items():
        yield Check(f"index_topk.whole.{name}", make(check_whole, *shape))
    for (rows, width), us in TOPK.items():
        yield Timing(f"index_topk.topk.{rows}x{width}", make(topk, rows, width), ((us, "SGLang"),), (us,))
    for kind, change in {
        "normal": lambda x: x, "plateau": lambda x: jnp.maximum(x - 2.5, 0), "equal": lambda x: x * 0 + 1,
        "rising": lambda x: jnp.arange(131072) + x * 1e-3,
    }.items():  # fmt: skip
        yield Timing(f"index_topk.topk.264x131072.{kind}", make(topk, 264, 131072, change))
    for dtype in (FP8, BF16):
        for shape, us in SCORES.items():
            peers = ((us, "DeepGEMM"),) if dtype == FP8 else ()
            yield Timing(
                f"index_topk.scores.{SHORT[dtype]}.{shape[0]}x{shape[1]}", make(over_pool, scores_of, dtype, *shape), peers
            )
        peers = WHOLE_PEER if dtype == FP8 else ()
        whole = make(over_pool, index_topk_of, dtype, 4096, 131072)
        yield Timing(f"index_topk.whole.{SHORT[dtype]}.4096x131072", whole, peers, WHOLE_REACH[dtype])
        for batch in (1, 16):
            reach, shape = (DECODE_REACH,) if batch == 1 else (), (dtype, 1, 200704, batch)
            name = f"{SHORT[dtype]}.decode_{batch}x200704"
            yield Timing(f"index_topk.scores.{name}", make(over_pool, scores_of, *shape))
            yield Timing(f"index_topk.whole.{name}", make(over_pool, index_topk_of, *shape), reach=reach)
