"""Cases of sparse MLA for kernels.py: forward, with groups of neighbours, decode, backward.

FLOPs are 2*Q*K*H*1088 forward and 2*Q*K*H*2752 backward, of unpadded heads; gathered bytes are 1,152 a selected row.
Peers: sparse prefill attention of others on one H200, 4,096 queries x 2,048 of 65,536 rows, between CUDA events.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import Check, Timing, Work, repeated

from pallas_kernels import reference, row_groups_gpu, row_plan, sparse_mla_bwd_gpu, sparse_mla_gpu, sparse_mla_grouped_gpu

SCALE = 576**-0.5
QUERIES, SELECTED, TOKENS, LONG, PAGE = 4096, 2048, 65536, 200704, 256
TARGETS = {  # of prefill by heads: (peers, to reach), microseconds
    64: (((2210, "FlashMLA"),), (2210,)),  # 529 TFLOP/s
    128: (((4250, "TileLang"), (4270, "FlashMLA")), (4270,)),
    20: (((2010, "FlashMLA"),), (2000,)),
}
GROUPED_REACH, DECODE_REACH, BACKWARD_REACH = 1000, 12, 25_700  # neighbours share 85 %; one query; 115 TFLOP/s, 64 heads


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


def oracle(q, pool, layer, rows):
    """The reference in float32, which is exact: o [B, S, H, 512], lse [B, S, H]."""
    one_layer = pool[layer].astype(jnp.float32)[None]
    return reference.sparse_mla(q.astype(jnp.float32), one_layer, 0, rows, scale=SCALE, value_dim=512)


@jax.jit
def errors(q, pool, layer, rows, o, lse):
    """Largest error of o (relative to its query's largest) and of lse; whether empty queries gave zeros and -inf."""
    want_o, want_lse = oracle(q, pool, layer, rows)
    none = (rows < 0).all(-1)
    error_o = jnp.abs(o.astype(jnp.float32) - want_o).max((-1, -2)) / jnp.maximum(jnp.abs(want_o).max((-1, -2)), 1e-9)
    error_lse = jnp.where(none[..., None], 0, jnp.abs(lse - want_lse))
    neutral = jnp.where(none[..., None, None], o == 0, True).all()
    neutral &= jnp.where(none[..., None], lse == -jnp.inf, jnp.isfinite(lse)).all()
    return jnp.where(none, 0, error_o).max(), error_lse.max(), neutral


@jax.jit
def oracle_gradients(q, pool, layer, rows, do, dlse):
    def loss(q, latent):
        o, lse = oracle(q, latent[None], 0, rows)
        return (o * do.astype(jnp.float32)).sum() + (jnp.where(lse == -jnp.inf, 0, lse) * dlse).sum()

    return jax.grad(loss, (0, 1))(q.astype(jnp.float32), pool[layer].astype(jnp.float32))


plain = functools.partial(sparse_mla_gpu.sparse_mla, scale=SCALE)
grouped_of = functools.partial(sparse_mla_grouped_gpu.sparse_mla_grouped, scale=SCALE)
backward_of = functools.partial(sparse_mla_bwd_gpu.sparse_mla_bwd, scale=SCALE)


def mapped(q, pool, layer, rows):
    o, lse = jax.vmap(lambda q, r: plain(q[None], pool, layer, r[None]))(q, rows)
    return o[:, 0], lse[:, 0]


def build(rows, heads, make=row_plan.sort_groups):
    """The groups of rows [B, S, K], positions and pool rows alike."""
    table = jnp.broadcast_to(jnp.arange(LONG // PAGE, dtype=jnp.int32), (rows.shape[0], LONG // PAGE))
    return make(rows, table, row_plan.group_size(heads), page_size=PAGE)


def grouped(q, pool, layer, rows):
    return grouped_of(q, pool, layer, build(rows, q.shape[2]))


def gradients(q, pool, layer, rows, do, dlse):
    o, lse = plain(q, pool, layer, rows)
    return backward_of(q, pool, layer, rows, o, lse, do, dlse)


CHECKS = {  # kernel, (B, S, H, K, L, M, share of holes, empty queries)
    **{f"forward.{H}_heads": (plain, (2, 5, H, 192, 1, 4096, 0.2, 1)) for H in (1, 2, 5)},
    "forward.10_heads": (plain, (1, 9, 10, 77, 1, 4096, 0.9, 1)),
    "forward.20_heads": (plain, (1, 300, 20, 256, 1, 4096, 0.3, 2)),
    "forward.64_heads_47_layers": (plain, (1, 140, 64, 320, 47, 83000, 0.1, 1)),  # an offset beyond 2^31 elements
    "forward.128_heads": (plain, (1, 200, 128, 64, 2, 4096, 0.5, 3)),
    "forward.mapped": (mapped, (3, 4, 20, 192, 1, 1024, 0.2, 1)),
    "decode.1": (plain, (1, 1, 20, 2048, 1, 65536, 0.1, 0)),
    "decode.16": (plain, (16, 1, 20, 2048, 1, 65536, 0.1, 0)),
    "grouped.20_heads": (grouped, (2, 50, 20, 256, 1, 512, 0.2, 4)),
    "grouped.5_heads": (grouped, (1, 31, 5, 128, 1, 256, 0.2, 3)),
}
GRADIENTS = [
    (1, 40, 20, 192, 2, 512, 0.2, 1),
    (1, 150, 64, 128, 1, 1024, 0.2, 1),
    (2, 20, 128, 100, 1, 512, 0.5, 1),
    (1, 3, 5, 64, 1, 256, 0.5, 1),
]
GROUP_MAKERS = {"sort": row_plan.sort_groups, "bitmaps": row_groups_gpu.bitmap_groups}
GROUPS = [  # B, S, K, pages, g, holes
    (1, 4096, 2048, 256, 3, 0.0),
    (2, 301, 2048, 784, 3, 0.1),
    (3, 100, 77, 40, 16, 0.3),
    (2, 64, 2048, 4000, 6, 0.9),
    (1, 200, 512, 12, 2, 0.0),
]


def check_forward(kernel, case, seed):
    q, pool, layer, rows, _ = inputs(*case)(jax.random.key(seed))
    (o, lse), same = repeated(kernel, q, pool, layer, rows)
    error_o, error_lse, neutral = (float(x) for x in errors(q, pool, layer, rows, o, lse))
    return {
        f"o {error_o:.1e}": error_o < 1e-2,
        f"lse {error_lse:.1e}": error_lse < 1e-4,
        "empty queries neutral": neutral == 1,
        "repeats": same,
    }


def check_gradients(case, seed):
    q, pool, layer, rows, do = inputs(*case)(jax.random.key(seed))
    args = q, pool, layer, rows, do, jax.random.normal(jax.random.key(99), case[:3])
    distance = lambda a, b: float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
    error = map(distance, jax.jit(gradients)(*args), oracle_gradients(*args))
    return {f"{name} {e:.1e} (relative norm)": e < 1e-2 for name, e in zip(("dq", "d_latent"), error, strict=True)}


def check_groups(case, seed):
    """Both makers of groups agree element for element; permuted pages, ragged groups, repeated runs."""
    B, S, K, pages, g, holes = case
    kp, kt, kh = jax.random.split(jax.random.key(seed), 3)
    pick = lambda key: jnp.sort(jax.random.choice(key, pages * PAGE, (K,), replace=False))
    few = jax.lax.map(pick, jax.random.split(kp, 5)).astype(jnp.int32)  # neighbours agree or differ wholly
    positions = few[jnp.sort(jax.random.randint(kt, (B, S), 0, 5), -1)]
    positions = jnp.where(jax.random.uniform(kh, positions.shape) < holes, -1, positions).at[:, 1].set(-1)
    table = jax.random.permutation(kt, B * pages).reshape(B, pages).astype(jnp.int32)
    made = {n: repeated(functools.partial(f, g=g, page_size=PAGE), positions, table) for n, f in GROUP_MAKERS.items()}
    (want, _), (got, same) = made["sort"], made["bitmaps"]
    return {"equal": all(bool((a == b).all()) for a, b in zip(want, got, strict=True)), "repeats": same}


@functools.cache
def neighbours(share=0.85):
    """rows [1, Q, K]: each query keeps the share of its predecessor's rows, draws the rest, in ascending order."""
    rng, keep = np.random.default_rng(0), int(share * SELECTED)
    rows, lists = rng.permutation(TOKENS)[:SELECTED], []
    for _ in range(QUERIES):
        kept = rng.permutation(rows)[:keep]
        fresh = np.setdiff1d(rng.integers(0, TOKENS, SELECTED), kept)
        rows = np.concatenate([kept, rng.permutation(fresh)[: SELECTED - keep]])
        lists.append(np.sort(rows))
    return np.stack(lists)[None].astype(np.int32)


def lists_of(kind, rows):
    """The lists of a timing: independent random ones as drawn or "ascending", or those of `neighbours`."""
    return {
        "random": lambda: rows,
        "ascending": lambda: jnp.sort(rows, -1),
        "neighbours": lambda: jnp.asarray(neighbours()),
    }[kind]()


def work(queries, heads):
    return dict(flops=2 * queries * SELECTED * heads * 1088, moved=queries * SELECTED * 1152)


def forward(H, lists, tokens=TOKENS):
    q, pool, layer, rows, _ = inputs(1, QUERIES, H, SELECTED, 1, tokens)(jax.random.key(H))
    return Work(plain, (q, pool, layer, lists_of(lists, rows)), **work(QUERIES, H))


def plan(maker):
    return Work(functools.partial(build, heads=20, make=GROUP_MAKERS[maker]), (jnp.asarray(neighbours()),))


def by_groups(lists, tokens=TOKENS):
    q, pool, layer, rows, _ = inputs(1, QUERIES, 20, SELECTED, 1, tokens)(jax.random.key(21))
    groups = jax.jit(functools.partial(build, heads=20))(lists_of(lists, rows))
    note = f"union of 3 lists {float(groups.count_G.mean()):.0f} rows"
    return Work(grouped_of, (q, pool, layer, groups), note=note, **work(QUERIES, 20))


def decode(B):
    q, pool, layer, rows, _ = inputs(B, 1, 20, SELECTED, 1, LONG)(jax.random.key(B))
    return Work(plain, (q, pool, layer, rows), **work(B, 20))


def backward(H):
    q, pool, layer, rows, do = inputs(1, QUERIES, H, SELECTED, 1, TOKENS)(jax.random.key(H))
    o, lse = jax.jit(plain)(q, pool, layer, rows)
    flops = 2 * QUERIES * SELECTED * H * 2752
    return Work(backward_of, (q, pool, layer, rows, o, lse, do), flops=flops, moved=QUERIES * SELECTED * 1152)


def cases():
    make = functools.partial
    for n, (name, case) in enumerate(CHECKS.items()):
        yield Check(f"sparse_mla.{name}", make(check_forward, *case, n))
    for n, case in enumerate(GROUPS):
        yield Check(f"sparse_mla.plan.{case[1]}_queries", make(check_groups, case, n))
    for n, case in enumerate(GRADIENTS):
        yield Check(f"sparse_mla.backward.{case[2]}_heads", make(check_gradients, case, n))
    for H, targets in TARGETS.items():
        for lists in ("random", "ascending"):
            yield Timing(f"sparse_mla.forward.{H}_heads.{lists}", make(forward, H, lists), *targets)
    yield Timing("sparse_mla.forward.20_heads.neighbours", make(forward, 20, "neighbours"))
    yield Timing(f"sparse_mla.forward.20_heads.random_of_{LONG}", make(forward, 20, "random", LONG))
    for maker in GROUP_MAKERS:
        yield Timing(f"sparse_mla.plan.{maker}", make(plan, maker))
    peers, reach = TARGETS[20]
    yield Timing("sparse_mla.grouped.neighbours", make(by_groups, "neighbours"), peers, (GROUPED_REACH,))
    yield Timing("sparse_mla.grouped.random", make(by_groups, "random"), peers, reach)
    yield Timing(f"sparse_mla.grouped.random_of_{LONG}", make(by_groups, "random", LONG))
    for B in (1, 4, 16, 64):
        yield Timing(f"sparse_mla.decode.{B}x{LONG}", make(decode, B), reach=(DECODE_REACH,) if B == 1 else ())
    for H in (64, 20):
        yield Timing(f"sparse_mla.backward.{H}_heads.random", make(backward, H), reach=(BACKWARD_REACH,) if H == 64 else ())
