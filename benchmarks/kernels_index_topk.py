"""Checks and times index_topk and its two halves on a Hopper GPU.

    python benchmarks/kernels_index_topk.py [--only topk scores end variants] [--no-check] [--no-time]

Kernel time is the sum of device kernels (CUPTI), queued is wall time per call of calls issued back to back (gaps
included), wall is one synchronised call; medians. The last line is JSON.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import limits
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import index_scores_gpu, index_topk_gpu, topk_gpu

PAGE = 256
FP8, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
PEAK = {FP8: 1979e12, BF16: 989.5e12}  # data sheet, dense
LIMITS = limits.of(jax.devices()[0].device_kind)
rng = np.random.default_rng()
results, failures = [], []
scores_of = functools.partial(index_scores_gpu.index_scores, page_size=PAGE)
index_topk_of = functools.partial(index_topk_gpu.index_topk, k=2048, page_size=PAGE)


def check(name, ok, note=""):
    print(f"{'ok  ' if ok else 'FAIL'} {name} {note}", flush=True)
    if not ok:
        failures.append(name)


def clock(name, f, *args, flops=0, moved=0, peak=None, peer=None, queue=20):
    """Times jitted f(*args); appends a row."""
    start = time.perf_counter()
    f = jax.jit(f).lower(*args).compile()
    compile_s = time.perf_counter() - start
    jax.block_until_ready(f(*args))
    walls, queued = [], []
    for _ in range(queue):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        walls.append(time.perf_counter() - start)
    for _ in range(3):
        start = time.perf_counter()
        last = None
        for _ in range(queue):
            last = f(*args)
        jax.block_until_ready(last)
        queued.append((time.perf_counter() - start) / queue)
    _, timings = profiler.Cupti(finalize=False).measure(f, aggregate=False, iterations=5)(*args)
    kernel = statistics.median(sum(t for _, t in run) for run in timings) * 1e-3
    parts = [f"{n[:28]} {t * 1e3:.0f}" for n, t in timings[2]]
    row = dict(
        name=name,
        kernel_us=kernel * 1e6,
        queued_us=statistics.median(queued) * 1e6,
        wall_us=statistics.median(walls) * 1e6,
        wall_min_us=min(walls) * 1e6,
        compile_s=compile_s,
        peer_us=peer,
    )
    if flops:
        row.update(tflops=flops / kernel / 1e12, share=flops / kernel / peak)
    elif moved:
        row.update(tb_s=moved / kernel / 1e12, share=moved / kernel / LIMITS.copy)
    results.append(row)
    print(
        "time",
        " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
        "|",
        "; ".join(parts),
        flush=True,
    )


def attempt(name, f, *args, **kwargs):
    try:
        f(name, *args, **kwargs)
    except Exception as error:
        traceback.print_exc(limit=-3)
        check(name, False, f"{type(error).__name__}: {str(error)[:300]}")


def selection(scores, limit, k):
    """The contract in NumPy, one row at a time."""
    scores = np.where(np.isnan(scores), -np.inf, scores).astype(np.float32) + 0.0
    out = np.full((len(scores), k), -1, np.int32)
    for r, n in enumerate(limit):
        best = np.sort(np.argsort(-scores[r, :n], kind="stable")[:k])
        out[r, : len(best)] = best
    return out, np.minimum(limit, k)


def rows_of(kind, rows, width):
    normal = rng.standard_normal((rows, width), dtype=np.float32)
    if kind == "plateau":
        return np.maximum(normal - 2.5, 0)
    if kind == "narrow":
        return rng.uniform(1.0, 1.245, (rows, width)).astype(np.float32)
    if kind == "equal":
        return np.full((rows, width), rng.standard_normal(), np.float32)
    if kind == "zeros":
        return np.where(normal > 0, np.float32(0.0), np.float32(-0.0))
    if kind == "inf_tail":
        return np.where(np.arange(width) >= 1000, -np.inf, normal).astype(np.float32)
    if kind == "nan":
        return np.where(normal > 0.5, np.nan, normal)
    if kind == "all_nan":
        return np.full((rows, width), np.nan, np.float32)
    if kind == "rising":
        return np.sort(normal, axis=1)
    if kind == "falling":
        return np.sort(normal, axis=1)[:, ::-1].copy()
    if kind == "denormal":
        return (normal * 1e-39).astype(np.float32)
    if kind == "few":
        return rng.integers(0, 7, (rows, width)).astype(np.float32)
    if kind == "huge":
        return (normal * 1e38).astype(np.float32)
    return normal


KINDS = ("normal plateau narrow equal zeros inf_tail nan all_nan rising falling denormal few huge").split()


@functools.cache
def topk_of(k, peers):
    return jax.jit(functools.partial(topk_gpu.topk, k=k, peers=peers))


def check_topk(name, kind, width, k, peers, rows=5):
    scores = rows_of(kind, rows, width)
    limit = np.array([width, width - 1, k + 1, k, rng.integers(1, width)][:rows], np.int32)
    limit = np.clip(limit, 0, width)
    if kind == "normal":
        limit = np.concatenate([limit, [0, 1, k - 1, k + 2]]).astype(np.int32).clip(0, width)
        scores = rows_of(kind, len(limit), width)
    f = topk_of(k, peers)
    got, count = (np.asarray(x) for x in f(scores, limit))
    want, want_count = selection(scores, limit, k)
    bad = [r for r in range(len(limit)) if not np.array_equal(got[r], want[r])]
    note = ""
    if bad:
        r = bad[0]
        note = (
            f"row {r} limit {limit[r]}: {len(set(got[r]) ^ set(want[r]))} differ; got {got[r][:6]} want {want[r][:6]}"
        )
    check(name, not bad and np.array_equal(count, want_count), note)


def check_repeat(name, peers):
    scores, limit = jnp.asarray(rows_of("few", 4, 60000)), jnp.full((4,), 60000, jnp.int32)
    f = topk_of(2048, peers)
    first = np.asarray(f(scores, limit)[0])
    check(name, all(np.array_equal(first, np.asarray(f(scores, limit)[0])) for _ in range(100)))


@functools.partial(jax.jit, static_argnums=range(1, 8))
def _arrays(key, batch, queries, pages, heads, dtype, slots, spare):
    keys = jax.random.split(key, 5)
    pool_rows = (batch * pages + spare) * PAGE
    pool = jax.random.normal(keys[0], (slots, pool_rows, 128), BF16).astype(dtype)
    scales = jax.random.uniform(keys[1], (slots, pool_rows), minval=0.5, maxval=1.5)
    q = jax.random.normal(keys[2], (batch, queries, heads, 128), BF16).astype(dtype)
    return q, jax.random.normal(keys[3], (batch, queries, heads)), pool, scales


def problem(batch, queries, capacity, heads, dtype, slots=2, scaled=None, seed=None, spare=1):
    """Random arguments of index_topk with shuffled pages; positions are the last of each sequence."""
    key = jax.random.key(int(rng.integers(1 << 30)) if seed is None else seed)
    pages = capacity // PAGE
    q, w, pool, scales = _arrays(key, batch, queries, pages, heads, dtype, slots, spare)
    scaled = dtype == FP8 if scaled is None else scaled
    table = rng.permutation(batch * pages + spare)[: batch * pages].reshape(batch, pages).astype(np.int32)
    positions = np.broadcast_to(capacity - queries + np.arange(queries), (batch, queries)).astype(np.int32)
    lengths = np.full((batch,), capacity, np.int32)
    return (
        q,
        w,
        (pool, scales if scaled else None),
        jnp.int32(slots - 1),
        *(jnp.asarray(x) for x in (table, positions, lengths)),
    )


@functools.partial(jax.jit, static_argnames="page_size")
def scores_ref(q, w, pool, slot, table, positions, lengths, *, page_size):
    """float32 scores and the sum of |terms|, which bounds their rounding."""
    rows = (table[:, :, None] * page_size + jnp.arange(page_size)).reshape(len(table), -1)
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


ROUNDING = {FP8: 2.0**-12, BF16: 2.0**-20}  # of sum |w| |q|.|k|: fp8 products are added with about 14 bits


def check_scores(name, batch, queries, capacity, heads, dtype, scaled=None):
    args = problem(batch, queries, capacity, heads, dtype, scaled=scaled)
    lengths = jnp.asarray(rng.integers(capacity // 2, capacity + 1, batch), jnp.int32)
    args = (*args[:6], lengths)
    got = jax.jit(scores_of)(*args)
    want, bound = scores_ref(*args, page_size=PAGE)
    limit = jnp.minimum(args[5] + 1, lengths[:, None])
    live = jnp.arange(capacity) < limit[..., None]
    error = jnp.where(live, jnp.abs(got - want) / bound, 0)
    worst = float(jnp.where(jnp.isnan(error), jnp.inf, error).max())
    check(name, worst < ROUNDING[dtype], f"worst error 2^{np.log2(max(worst, 1e-30)):.1f} of sum |w||q||k|")
    one = jax.jit(scores_of)
    q, w, pool, slot, table, positions, _ = args
    same = True
    for s in {0, queries // 2, queries - 1}:
        single = one(q[:, s : s + 1], w[:, s : s + 1], pool, slot, table, positions[:, s : s + 1], lengths)
        same &= bool(jnp.where(live[:, s], single[:, 0] == got[:, s], True).all())
    check(name + ": decode scores bitwise equal to prefill", same)


def check_end(name, batch, queries, capacity, heads, dtype, k=2048, scaled=None, slots=2, spare=1):
    args = problem(batch, queries, capacity, heads, dtype, scaled=scaled, slots=slots, spare=spare)
    positions = jnp.concatenate([args[5][:, :-1], jnp.full((batch, 1), -1, jnp.int32)], 1) if queries > 1 else args[5]
    args = (*args[:5], positions, args[6])
    got, count = jax.jit(functools.partial(index_topk_gpu.index_topk, k=k, page_size=PAGE))(*args)
    own = jax.jit(scores_of)(*args)
    limit = np.asarray(jnp.minimum(positions + 1, args[6][:, None])).reshape(-1)
    flat, own = np.asarray(got).reshape(-1, k), np.asarray(own).reshape(-1, capacity)
    some = np.unique(np.concatenate([rng.integers(0, len(flat), 12), [0, len(flat) - 1]]))
    want, want_count = selection(own[some], limit[some], k)
    check(
        name + ": selection of own scores",
        np.array_equal(flat[some], want) and np.array_equal(np.asarray(count).reshape(-1)[some], want_count),
    )
    again, _, scores = jax.jit(functools.partial(index_topk_gpu.index_topk, k=k, page_size=PAGE, return_scores=True))(*args)
    at, scores = np.maximum(flat[some], 0), np.asarray(scores).reshape(-1, k)[some]
    same = np.where(flat[some] < 0, True, scores == np.take_along_axis(own[some], at, 1)).all()
    check(name + ": scores returned are those it selected by", same and bool((again == got).all()))
    ref, bound = (np.asarray(x).reshape(-1, capacity) for x in scores_ref(*args, page_size=PAGE))
    want, _ = selection(ref[some], limit[some], k)
    differ, outside = 0, 0
    for i, r in enumerate(some):
        odd = np.array(sorted(set(flat[r]) ^ set(want[i])), int)
        if len(odd):
            kth = np.sort(ref[r, : limit[r]])[-k]
            differ += 1
            outside += bool((np.abs(ref[r, odd] - kth) > 2 * ROUNDING[dtype] * bound[r, : limit[r]].max()).any())
    check(
        name + ": differences from float32 lie within rounding of the k-th score",
        outside == 0,
        f"{differ} of {len(some)} rows differ",
    )


def run_checks(only):
    if "topk" in only:
        for kind in KINDS:
            for width, k, peers in ((40001, 2048, 8), (150000, 2048, 1)):
                attempt(f"topk {kind} {width} k={k} peers={peers}", check_topk, kind, width, k, peers)
        attempt("topk small", check_topk, "normal", 600, 8, 1)
        attempt("topk small few", check_topk, "few", 600, 8, 1)
        attempt("topk 4096", check_topk, "normal", 30000, 4096, 4)
        attempt("topk 100 runs equal, 1 block a row", check_repeat, 1)
        attempt("topk 100 runs equal, 8 blocks a row", check_repeat, 8)
    if "scores" in only:
        for dtype in (FP8, BF16):
            n = jnp.dtype(dtype).name[:6]
            for shape in ((1, 64, 4096, 32), (2, 37, 2048, 64), (2, 9, 1024, 5), (3, 2, 2048, 32)):
                attempt(f"scores {n} {shape}", check_scores, *shape, dtype)
        attempt("scores e4m3 without scales", check_scores, 1, 16, 1024, 32, FP8, scaled=False)
    if "end" in only:
        for dtype in (FP8, BF16):
            n = jnp.dtype(dtype).name[:6]
            attempt(f"end {n} prefill", check_end, 1, 70, 16384, 32, dtype)
            attempt(f"end {n} prefill from 0", check_end, 2, 600, 640 // PAGE * PAGE + PAGE, 32, dtype, k=128)
            attempt(f"end {n} decode", check_end, 3, 1, 32768, 32, dtype)
        attempt("end pool beyond 2^31 elements", check_end, 1, 5, 8192, 32, FP8, slots=3, spare=24000, k=512)


def time_topk():
    def case(name, scores, peer=None, peers=None):
        rows, width = scores.shape
        limit = jnp.full((rows,), width, jnp.int32)
        select = functools.partial(topk_gpu.topk, k=2048, peers=peers)
        attempt(name, clock, select, scores, limit, moved=rows * width * 4, peer=peer)

    for rows, width, peer in (
        (1, 200704, 43),
        (64, 200704, 50),
        (1024, 32768, 80),
        (1024, 131072, 271),
        (1024, 200704, 404),
    ):
        case(f"topk {rows} x {width}", jax.random.normal(jax.random.key(rows), (rows, width)), peer)
    normal = jax.random.normal(jax.random.key(2), (264, 131072))
    kinds = dict(
        normal=normal,
        plateau=jnp.maximum(normal - 2.5, 0),
        equal=normal * 0 + 1,
        rising=jnp.arange(131072) + normal * 1e-3,
    )
    for kind, scores in kinds.items():
        case(f"topk 264 x 131072 {kind}", scores)


def time_whole(only):
    sizes = ((2048, 65536, 1110, None), (4096, 131072, 4380, 5460))
    for dtype in (FP8, BF16):
        name = jnp.dtype(dtype).name[:6]
        for queries, capacity, peer, peer_end in sizes:
            args = problem(1, queries, capacity, 32, dtype, seed=0)
            pairs = queries * capacity - queries * (queries - 1) / 2
            count = dict(flops=pairs * 32 * 128 * 2, peak=PEAK[dtype], queue=10)
            if "scores" in only:
                attempt(
                    f"scores {name} {queries} x {capacity}",
                    clock,
                    scores_of,
                    *args,
                    peer=peer if dtype == FP8 else None,
                    **count,
                )
            if "end" in only and peer_end:
                attempt(
                    f"index_topk {name} {queries} x {capacity}",
                    clock,
                    index_topk_of,
                    *args,
                    peer=peer_end if dtype == FP8 else None,
                    **count,
                )
        for batch in (1, 16):
            args = problem(batch, 1, 200704, 32, dtype, seed=0, slots=1 if batch > 1 else 2)
            moved = dict(moved=batch * 200704 * 128 * jnp.dtype(dtype).itemsize)
            if "scores" in only:
                attempt(f"scores {name} decode {batch} x 200704", clock, scores_of, *args, **moved)
            if "end" in only:
                attempt(f"index_topk {name} decode {batch} x 200704", clock, index_topk_of, *args, **moved)


def time_variants():
    """Block sizes of the scoring kernel, and the same without its epilogue: what the matrix unit alone allows."""
    Plan = index_scores_gpu.Plan
    count = dict(flops=1024 * 130560 * 32 * 128 * 2, queue=10)

    def case(name, args, dtype, tile, stages):
        scores = functools.partial(scores_of, plan_=Plan(32, 2, 2, tile, stages, 8192))
        name = f"scores {name} 1024 x 131072, tile {tile}, {stages} stages"
        attempt(name, clock, scores, *args, peak=PEAK[dtype], **count)

    def no_sum(acc, weights, plan_):
        yield 0, 0, acc[0]

    args = problem(1, 1024, 131072, 32, FP8, seed=0)
    for tile, stages in ((128, 4), (128, 5), (128, 8), (256, 4)):
        case("fp8", args, FP8, tile, stages)
    head_sum, index_scores_gpu._head_sum = index_scores_gpu._head_sum, no_sum
    case("fp8 without head sums", args, FP8, 128, 5)
    index_scores_gpu._head_sum = head_sum
    args = problem(1, 1024, 131072, 32, BF16, seed=0)
    for stages in (4, 5, 6):
        case("bf16", args, BF16, 64, stages)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=["topk", "scores", "end"])
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    options = parser.parse_args()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    print(
        f"{jax.devices()[0].device_kind}, driver {driver}, jax {jax.__version__}, python {sys.version.split()[0]}",
        flush=True,
    )
    if not options.no_check:
        run_checks(options.only)
    if not options.no_time:
        if "topk" in options.only:
            time_topk()
        if "variants" in options.only:
            time_variants()
        if {"scores", "end"} & set(options.only):
            time_whole(options.only)
    print(f"\n{len(failures)} failed: {failures}")
    print("| case | kernel us | queued us | wall us | rate | share of limit | peer us |\n|---|---|---|---|---|---|---|")
    for r in results:
        rate = f"{r['tflops']:.0f} TFLOP/s" if "tflops" in r else f"{r['tb_s']:.2f} TB/s"
        times = f"{r['kernel_us']:.1f} | {r['queued_us']:.1f} | {r['wall_us']:.1f}"
        print(f"| {r['name']} | {times} | {rate} | {r['share']:.0%} | {r['peer_us'] or '-'} |")
    print(json.dumps(results))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
