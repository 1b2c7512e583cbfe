"""Checks and times the Hopper sparse MLA kernels: python benchmarks/kernels_sparse_mla.py [check] [forward] [grouped]
[decode] [backward], all of them by default; needs an H100 or H200.

Device time is the sum of the kernels of one call (CUPTI, median of 8 calls); wall is a synchronised call. FLOPs are
2*Q*K*H*1088 forward and 2*Q*K*H*2752 backward, of unpadded heads; gathered bytes are 1,152 a selected row. Ends with
one line of JSON.
"""

import functools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import limits
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pallas_kernels import (  # noqa: E402
    row_groups_gpu,
    row_plan,
    sparse_mla_bwd_gpu,
    sparse_mla_gpu,
    sparse_mla_grouped_gpu,
)

SCALE = 576**-0.5
QUERIES, SELECTED, TOKENS, PAGE = 4096, 2048, 65536, 256
LIMITS = limits.of(jax.devices()[0].device_kind)
TARGETS = {  # microseconds: (peer measured on the same kind of machine, to reach)
    "forward 64": (2210, 2210),
    "forward 128": (4270, 4270),
    "forward 20": (2010, 2000),
    "grouped 20": (2010, 1000),
    "decode 1": (None, 12),
    "backward 64": (None, 25700),
}


def inputs(B, S, H, K, L, M, holes=0.0, empty=0):
    """A jitted key -> (q, pool, layer, rows, do): random, the share `holes` of rows is -1, the first queries empty."""

    def make(key):
        kq, kp, kr, kh, kd = jax.random.split(key, 5)
        if M <= 1024:  # distinct rows, as the grouped kernel needs
            rows = jnp.argsort(jax.random.uniform(kr, (B, S, M)), -1)[..., :K].astype(jnp.int32)
        else:
            rows = jax.random.randint(kr, (B, S, K), 0, M, dtype=jnp.int32)
        none = (jax.random.uniform(kh, rows.shape) < holes) | (jnp.arange(S)[:, None] < empty)
        q = (jax.random.normal(kq, (B, S, H, 576)) * 0.7).astype(jnp.bfloat16)
        pool = jnp.zeros((L, M, 576), jnp.bfloat16).at[L - 1].set(jax.random.normal(kp, (M, 576), jnp.bfloat16))
        do = jax.random.normal(kd, (B, S, H, 512)).astype(jnp.bfloat16)
        return q, pool, jnp.int32(L - 1), jnp.where(none, -1, rows), do

    return jax.jit(make)


def oracle(q, latent_MW, rows):
    """Float32 attention by gathering: o [B, S, H, 512], lse [B, S, H]."""
    kv = latent_MW[jnp.maximum(rows, 0)]
    s = jnp.einsum("bshd,bskd->bshk", q, kv, precision="highest") * SCALE
    s = jnp.where((rows >= 0)[:, :, None], s, -jnp.inf)
    top = jnp.maximum(s.max(-1, keepdims=True), -1e30)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    share = p / jnp.where(total > 0, total, 1)
    o = jnp.einsum("bshk,bskd->bshd", share, kv[..., :512], precision="highest")
    return o, jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)[..., 0]


@jax.jit
def errors(q, pool, layer, rows, o, lse):
    """Largest error of o (relative to its query's largest) and of lse; whether empty queries gave zeros and -inf."""
    want_o, want_lse = oracle(q.astype(jnp.float32), pool[layer].astype(jnp.float32), rows)
    none = (rows < 0).all(-1)
    error_o = jnp.abs(o.astype(jnp.float32) - want_o).max((-1, -2)) / jnp.maximum(jnp.abs(want_o).max((-1, -2)), 1e-9)
    error_lse = jnp.where(none[..., None], 0, jnp.abs(lse - want_lse))
    neutral = jnp.where(none[..., None, None], o == 0, True).all()
    neutral &= jnp.where(none[..., None], lse == -jnp.inf, jnp.isfinite(lse)).all()
    return jnp.where(none, 0, error_o).max(), error_lse.max(), neutral


@jax.jit
def oracle_gradients(q, pool, layer, rows, do, dlse):
    def loss(q, latent):
        o, lse = oracle(q, latent, rows)
        return (o * do.astype(jnp.float32)).sum() + (jnp.where(lse == -jnp.inf, 0, lse) * dlse).sum()

    return jax.grad(loss, (0, 1))(q.astype(jnp.float32), pool[layer].astype(jnp.float32))


def plain(q, pool, layer, rows):
    return sparse_mla_gpu.sparse_mla(q, pool, layer, rows, scale=SCALE)


def mapped(q, pool, layer, rows):
    o, lse = jax.vmap(lambda q, r: plain(q[None], pool, layer, r[None]))(q, rows)
    return o[:, 0], lse[:, 0]


def table(rows):
    """The page table of a pool whose rows are the positions of every sequence."""
    return jnp.broadcast_to(jnp.arange(TOKENS // PAGE, dtype=jnp.int32), (rows.shape[0], TOKENS // PAGE))


def build(rows, heads, make=row_plan.sort_groups):
    """The groups of rows [B, S, K], positions and pool rows alike."""
    return make(rows, table(rows), row_plan.group_size(heads), page_size=PAGE)


def grouped(q, pool, layer, rows):
    return sparse_mla_grouped_gpu.sparse_mla_grouped(q, pool, layer, build(rows, q.shape[2]), scale=SCALE)


def gradients(q, pool, layer, rows, do, dlse):
    o, lse = plain(q, pool, layer, rows)
    return sparse_mla_bwd_gpu.sparse_mla_bwd(q, pool, layer, rows, o, lse, do, dlse, scale=SCALE)


FORWARD_CASES = [  # B, S, H, K, L, M, share of holes, empty queries
    *((2, 5, H, 192, 1, 4096, 0.2, 1) for H in (1, 2, 5)),
    (1, 9, 10, 77, 1, 4096, 0.9, 1),
    (1, 300, 20, 256, 1, 4096, 0.3, 2),
    (1, 140, 64, 320, 47, 83000, 0.1, 1),  # the layer's offset passes 2^31 elements
    (1, 200, 128, 64, 2, 4096, 0.5, 3),
    (1, 1, 20, 2048, 1, 65536, 0.1, 0),
    (16, 1, 20, 2048, 1, 65536, 0.1, 0),
]
CHECKS = [
    *((plain, case) for case in FORWARD_CASES),
    (mapped, (3, 4, 20, 192, 1, 1024, 0.2, 1)),
    (grouped, (2, 50, 20, 256, 1, 512, 0.2, 4)),
    (grouped, (1, 31, 5, 128, 1, 256, 0.2, 3)),
]
GRADIENT_CASES = [
    (1, 40, 20, 192, 2, 512, 0.2, 1),
    (1, 150, 64, 128, 1, 1024, 0.2, 1),
    (2, 20, 128, 100, 1, 512, 0.5, 1),
    (1, 3, 5, 64, 1, 256, 0.5, 1),
]


def check():
    good = True
    for n, (kernel, case) in enumerate(CHECKS):
        q, pool, layer, rows, _ = inputs(*case)(jax.random.key(n))
        f = jax.jit(kernel)
        o, lse = f(q, pool, layer, rows)
        same = bool((f(q, pool, layer, rows)[0] == o).all())
        error_o, error_lse, neutral = (float(x) for x in errors(q, pool, layer, rows, o, lse))
        ok = error_o < 1e-2 and error_lse < 1e-4 and neutral == 1 and same
        good &= ok
        print(f"{kernel.__name__} {case}: o {error_o:.1e}, lse {error_lse:.1e}, {'ok' if ok else 'WRONG'}", flush=True)
    for n, case in enumerate(GRADIENT_CASES):
        q, pool, layer, rows, do = inputs(*case)(jax.random.key(n))
        dlse = jax.random.normal(jax.random.key(99), case[:3])
        args = q, pool, layer, rows, do, dlse
        error = [distance(a, b) for a, b in zip(jax.jit(gradients)(*args), oracle_gradients(*args), strict=True)]
        good &= max(error) < 1e-2
        print(f"gradients {case}: dq {error[0]:.1e}, d_latent {error[1]:.1e} (relative norm)", flush=True)
    return {"checks": "ok" if good else "WRONG"}


def distance(got, want):
    """Norm of the difference over the norm."""
    return float(jnp.linalg.norm((got.astype(jnp.float32) - want).ravel()) / jnp.linalg.norm(want.ravel()))


def clock(f, *args, calls=8):
    """(median device microseconds of a call, their spread, median wall microseconds, kernels of one call)."""
    from jax.experimental.mosaic.gpu import profiler

    _, runs = profiler.measure(f, aggregate=False, iterations=calls)(*args)
    device = [1e3 * sum(t for _, t in run) for run in runs]
    walls = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        walls.append(1e6 * (time.perf_counter() - start))
    kernels = [(name[-32:], round(1e3 * t, 1)) for name, t in runs[0]]
    return statistics.median(device), max(device) - min(device), statistics.median(walls), kernels


def report(name, order, timing, flops=0, gathered=0):
    device, spread, wall, kernels = timing
    peer, reach = TARGETS.get(name, (None, None))
    line = f"| {name} | {order} | {device:.1f} ({spread:.1f}) | {wall:.0f} | {peer or '-'} | {reach or '-'} |"
    if flops:
        line += f" {flops / device / 1e6:.0f} TFLOP/s ({flops / device / LIMITS.bf16 * 1e8:.0f} %) |"
        line += f" {gathered / device / 1e6:.2f} TB/s ({gathered / device / LIMITS.copy * 1e8:.0f} %) |"
    print(line, kernels if len(kernels) > 1 else "", flush=True)
    return {f"{name} {order}".strip(): round(device, 1)}


def forward_work(queries, heads):
    return 2 * queries * SELECTED * heads * 1088, queries * SELECTED * 1152


def forward():
    out = {}
    cases = {H: inputs(1, QUERIES, H, SELECTED, 1, TOKENS) for H in (64, 128, 20)}
    for H, make in cases.items():
        q, pool, layer, rows, _ = make(jax.random.key(H))
        f = jax.jit(plain)
        for order, lists in (("random", rows), ("ascending", jnp.sort(rows, -1))):
            out |= report(f"forward {H}", order, clock(f, q, pool, layer, lists), *forward_work(QUERIES, H))
    return out


GROUP_CASES = [  # B, S, K, pages, g, holes
    (1, 4096, 2048, 256, 3, 0.0),
    (2, 301, 2048, 784, 3, 0.1),
    (3, 100, 77, 40, 16, 0.3),
    (2, 64, 2048, 4000, 6, 0.9),
    (1, 200, 512, 12, 2, 0.0),
]


def same_groups():
    """Whether both makers of groups agree element for element, permuted pages, ragged groups and repeats included."""
    good = True
    for n, (B, S, K, pages, g, holes) in enumerate(GROUP_CASES):
        kp, kt, kh = jax.random.split(jax.random.key(n), 3)
        pick = lambda key, T=pages * PAGE, K=K: jnp.sort(jax.random.choice(key, T, (K,), replace=False))
        few = jax.lax.map(pick, jax.random.split(kp, 5)).astype(jnp.int32)  # neighbours agree or differ wholly
        positions = few[jnp.sort(jax.random.randint(kt, (B, S), 0, 5), -1)]
        positions = jnp.where(jax.random.uniform(kh, positions.shape) < holes, -1, positions).at[:, 1].set(-1)
        table = jax.random.permutation(kt, B * pages).reshape(B, pages).astype(jnp.int32)
        make = [jax.jit(functools.partial(f, g=g, page_size=PAGE)) for f in GROUP_MAKERS.values()]
        want, *others = (f(positions, table) for f in (make[0], *make[1:], *make[1:]))
        ok = all(bool((a == b).all()) for other in others for a, b in zip(want, other, strict=True))
        good &= ok
        print(f"groups {(B, S, K, pages, g, holes)}: {'equal' if ok else 'DIFFERENT'}", flush=True)
    return good


GROUP_MAKERS = {"sort": row_plan.sort_groups, "bitmaps": row_groups_gpu.bitmap_groups}


def neighbours(share=0.85):
    """rows [1, Q, K]: each query keeps the share of its predecessor's rows, draws the rest, in ascending order."""
    rng, keep = np.random.default_rng(0), int(share * SELECTED)
    rows, lists = rng.permutation(TOKENS)[:SELECTED], []
    for _ in range(QUERIES):
        kept = rng.permutation(rows)[:keep]
        fresh = np.setdiff1d(rng.integers(0, TOKENS, SELECTED), kept)
        rows = np.concatenate([kept, rng.permutation(fresh)[: SELECTED - keep]])
        lists.append(np.sort(rows))
    return jnp.asarray(np.stack(lists)[None], jnp.int32)


def group():
    q, pool, layer, _, _ = inputs(1, QUERIES, 20, SELECTED, 1, TOKENS)(jax.random.key(20))
    rows = neighbours()
    plan_by = {name: jax.jit(functools.partial(build, heads=20, make=make)) for name, make in GROUP_MAKERS.items()}
    plan = plan_by["sort"](rows)
    kernel = jax.jit(functools.partial(sparse_mla_grouped_gpu.sparse_mla_grouped, scale=SCALE))
    print(f"neighbours share 85 %: union of 3 lists {float(plan.count_G.mean()):.0f} rows", flush=True)
    out = {"groups equal": same_groups()}
    for name, f in plan_by.items():
        out |= report("plan", name, clock(f, rows))
    out |= report("grouped 20", "neighbours", clock(kernel, q, pool, layer, plan), *forward_work(QUERIES, 20))
    either = jax.jit(lambda q, pool, layer, rows, groups: sparse_mla_gpu.sparse_mla(
        q, pool, layer, rows, scale=SCALE, groups=groups))  # fmt: skip
    out |= report("decided 20", "neighbours", clock(either, q, pool, layer, rows, plan))
    _, _, _, apart, _ = inputs(1, QUERIES, 20, SELECTED, 1, TOKENS)(jax.random.key(21))
    apart = jnp.sort(apart, -1)
    plan = plan_by["sort"](apart)
    print(f"random lists: union of 3 {float(plan.count_G.mean()):.0f} rows, groups cheaper: {bool(plan.cheaper)}")
    out |= report("grouped 20", "random", clock(kernel, q, pool, layer, plan), *forward_work(QUERIES, 20))
    out |= report("decided 20", "random", clock(either, q, pool, layer, apart, plan))
    return out | report("forward 20", "neighbours", clock(jax.jit(plain), q, pool, layer, rows))


def decode():
    out = {}
    for B in (1, 4, 16, 64):
        q, pool, layer, rows, _ = inputs(B, 1, 20, SELECTED, 1, 200704)(jax.random.key(B))
        out |= report(f"decode {B}", "", clock(jax.jit(plain), q, pool, layer, rows, calls=20), *forward_work(B, 20))
    return out


def backward():
    out = {}
    for H in (64, 20):
        q, pool, layer, rows, do = inputs(1, QUERIES, H, SELECTED, 1, TOKENS)(jax.random.key(H))
        o, lse = jax.jit(plain)(q, pool, layer, rows)
        f = jax.jit(functools.partial(sparse_mla_bwd_gpu.sparse_mla_bwd, scale=SCALE))
        flops, gathered = 2 * QUERIES * SELECTED * H * 2752, QUERIES * SELECTED * 1152
        timing = clock(f, q, pool, layer, rows, o, lse, do, calls=3)
        out |= report(f"backward {H}", "random", timing, flops, gathered)
    return out


if __name__ == "__main__":
    modes = {"check": check, "forward": forward, "grouped": group, "decode": decode, "backward": backward}
    chosen = sys.argv[1:] or list(modes)
    if unknown := set(chosen) - set(modes):
        sys.exit(f"unknown {', '.join(unknown)}: choose from {', '.join(modes)}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"| case | lists | device us (spread) | wall us | peer | reach | of {LIMITS.bf16 / 1e12:.0f} TFLOP/s | "
          f"gathered, of {LIMITS.copy / 1e12:.1f} TB/s |")
    results = {}
    for mode in chosen:
        results |= modes[mode]()
    print(json.dumps(results))
