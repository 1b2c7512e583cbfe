"""Checks and times grouped_matmul and layer_matmul on a Hopper GPU: python benchmarks/kernels_grouped_matmul.py [check]
[prefill] [decode] [dense], all of them by default.

Device time is the sum of the kernels of one call (CUPTI, median of 8), wall a synchronised call. Prefill: 2*N*D*F FLOP
against a measured bf16 product (limits.py). Decode and dense: one program that goes through all layers, so that no
matrix is found in the cache; time a layer, and bytes of the matrices read against a measured copy. Ends with JSON.
tokamax is timed beside if it is installed.
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from kernels_sparse_mla import LIMITS, clock

from pallas_kernels import grouped_matmul_gpu, layer_matmul_gpu, matvec_gpu, reference

LAYERS, EXPERTS = 46, 64
DENSE = {  # [F, D] of a decode step's products at the 30B shape, and how many layers
    "q_a": (768, 2048, 47), "q_b": (5120, 768, 47), "kv_a": (576, 2048, 47), "o": (2048, 5120, 47),
    "shared gate": (1536, 2048, 46), "shared down": (2048, 1536, 46), "head": (154880, 2048, 2),
}  # fmt: skip
GATE, DOWN, RECORDED = (2048, 1536), (1536, 2048), (2048, 3072)
PEERS = {"recorded": 1610, "recorded xla": 34_400, "four rows": 128, "four rows xla": 373}  # us, tokamax untuned and XLA


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def stack(layers, experts, D, F, seed=0):
    """Matrices of the last layer and of layer 0 random, the rest zeros; bf16."""
    draw = jax.random.normal(jax.random.key(seed), (2, experts, D, F), jnp.bfloat16) * D**-0.5
    return jnp.zeros((layers, experts, D, F), jnp.bfloat16).at[0].set(draw[0]).at[layers - 1].set(draw[1])


def group_sizes(kind, N, experts=EXPERTS):
    """Rows of each expert: even, as a random router draws them, or few experts that take most."""
    rng = np.random.default_rng(0)
    share = {"even": None, "random": np.ones(experts), "skewed": 1 / np.arange(1, experts + 1)}[kind]
    if share is None:
        return jnp.full(experts, N // experts, jnp.int32).at[0].add(N % experts)
    return jnp.asarray(np.bincount(rng.choice(experts, N, p=share / share.sum()), minlength=experts), jnp.int32)


CHECKS = [  # layers, experts, D, F, rows, kind
    (2, 8, 64, 128, 300, "random"),
    (2, 8, 2048, 1536, 1000, "skewed"),
    (3, 64, 1536, 2048, 64, "random"),
    (LAYERS, EXPERTS, 2048, 1536, 4099, "random"),  # 9.3e9 elements
    (LAYERS, EXPERTS, 1536, 2048, 8192, "skewed"),
    *((LAYERS, EXPERTS, *shape, rows, "random") for shape in (GATE, DOWN) for rows in (1, 4, 16)),
]


def check():
    good = True
    wanted = jax.jit(lambda x, w, layer, sizes: jax.lax.ragged_dot(x, w[layer], sizes, preferred_element_type=jnp.float32))
    for layers, experts, D, F, N, kind in CHECKS:
        w, sizes, layer = stack(layers, experts, D, F), group_sizes(kind, N, experts), jnp.int32(layers - 1)
        x = jax.random.normal(jax.random.key(N), (N, D), jnp.bfloat16)
        f = jax.jit(grouped_matmul_gpu.grouped_matmul)
        y, again, want = f(x, w, layer, sizes), f(x, w, layer, sizes), wanted(x, w, layer, sizes)
        error = float(jnp.abs(y.astype(jnp.float32) - want).max() / jnp.abs(want).max())
        ok = error < 2**-7 and bool((y == again).all())
        good &= ok
        print(f"{N} {kind} rows, [{layers}, {experts}, {D}, {F}]: {error:.1e} {'ok' if ok else 'WRONG'}", flush=True)
    for N, F, D, layers in ((1, 768, 2048, 47), (4, 5120, 768, 47), (2, 2048, 5120, 220), (1, 154880, 2048, 1)):
        w = stack(layers, 1, F, D)[:, 0]  # 220 layers are 2.3e9 elements
        x, layer = jax.random.normal(jax.random.key(N), (N, D), jnp.bfloat16), jnp.int32(layers - 1)
        f = jax.jit(layer_matmul_gpu.layer_matmul)
        y, again = f(x, w, layer), f(x, w, layer)
        want = jnp.einsum("nd,fd->nf", x, w[layer], preferred_element_type=jnp.float32)
        error = float(jnp.abs(y.astype(jnp.float32) - want).max() / jnp.abs(want).max())
        ok = error < 2**-7 and bool((y == again).all())
        good &= ok
        print(f"{N} rows, [{layers}, {F}, {D}]: {error:.1e} {'ok' if ok else 'WRONG'}", flush=True)
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    layer, heads = jnp.int32(46), draw(0, 47, 20, 192, 512)
    pair = [draw(f, 47, f, 2048) for f in (768, 576)]
    experts = [stack(2, EXPERTS, *GATE), -stack(2, EXPERTS, *GATE)]
    for N in (1, 4):
        x, by_head, expert = draw(N, N, 2048), draw(N, N, 20, 192), jax.random.randint(jax.random.key(N), (N, 4), 0, EXPERTS)
        cases = {  # (op, arguments, a float32 einsum of layers' matrices)
            "two matrices": (layer_matmul_gpu.layer_matmul, (x, pair, layer), "nd,fd->nf"),
            "heads, [out, in]": (layer_matmul_gpu.layer_matmul, (draw(N, N, 20, 512), heads, layer), "nhd,hfd->nhf"),
            "heads, [in, out]": (matvec_gpu.expert_matmul, (by_head, heads, layer), "nhd,hdf->nhf"),
            "experts": (matvec_gpu.expert_matmul, (x, experts, jnp.int32(1), expert), "nd,nxdf->nxf"),
        }
        for name, (op, (x, w, *at), spec) in cases.items():
            f, at = jax.jit(op), tuple(at)
            y, again = (jax.tree.leaves(f(x, w, *at)) for _ in range(2))
            ref = lambda w, x=x, at=at, spec=spec: jnp.einsum(spec, x, w[at], preferred_element_type=jnp.float32)
            want = [jax.jit(ref)(a) for a in jax.tree.leaves(w)]
            off = [float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()) for a, b in zip(y, want, strict=True)]
            error, alike = max(off), all(bool((a == b).all()) for a, b in zip(y, again, strict=True))
            ok = error < 2**-7 and alike
            good &= ok
            print(f"{N} rows, {name}: {error:.1e} {'ok' if ok else 'WRONG'}", flush=True)
    return {"checks": "ok" if good else "WRONG"}


def line(name, timing, flops=0, moved=0, peer=None):
    device, spread, wall, _ = timing
    text = f"| {name} | {device:.1f} ({spread:.1f}) | {wall:.0f} | {peer or '-'} |"
    if flops:
        text += f" {flops / device / 1e6:.0f} TFLOP/s ({flops / device / LIMITS.bf16 * 1e8:.0f} %) |"
    if moved:
        text += f" {moved / device / 1e6:.2f} TB/s ({moved / device / LIMITS.copy * 1e8:.0f} %) |"
    print(text, flush=True)
    return {name: round(device, 1)}


def tokamax_peers(x, w, sizes):
    """{name: timing} of tokamax on one layer's matrices: as it comes, and with larger tiles."""
    try:
        from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu
        from tokamax._src.ops.ragged_dot.pallas_mosaic_gpu_common import Config
    except ImportError as e:
        print(f"tokamax left out: {e}")
        return {}
    tiles = dict(block_m=128, block_n=128, block_k=64, num_stages=4, split_k=1, persistent=True, grid_tile_width=4)
    configs = {"untuned": None, "128 x 128": Config(**tiles), "128 x 256": Config(**tiles | {"block_n": 256})}
    out = {}
    for name, config in configs.items():
        op = pallas_mosaic_gpu.PallasMosaicGpuRaggedDot(config=config)
        try:
            out[f"tokamax {name}"] = clock(jax.jit(lambda x, w, s, op=op: op(x, w, group_sizes=s)), x, w, sizes)
        except Exception as e:  # a peer that fails must not end the run
            print(f"tokamax {name} failed: {str(e)[:120]}")
    return out


def prefill():
    out = {}
    N, (D, F) = 32768, RECORDED
    x, w, sizes = jax.random.normal(jax.random.key(1), (N, D), jnp.bfloat16), stack(1, EXPERTS, D, F), group_sizes("even", N)
    work = 2 * N * D * F
    ours = {f"{width} columns": functools.partial(grouped_matmul_gpu.ragged, width=width) for width in (256, 128)}
    for name, f in ours.items():
        timing = clock(jax.jit(f), x, w, jnp.int32(0), sizes)
        out |= line(f"[{N}, {D}] x [64, {D}, {F}], {name}", timing, work, peer=PEERS["recorded"])
    for name, timing in tokamax_peers(x, w[0], sizes).items():
        out |= line(f"the same, {name}", timing, work, peer=PEERS["recorded"])
    xla = clock(jax.jit(reference.grouped_matmul), x, w, jnp.int32(0), sizes, calls=3)
    out |= line("the same, XLA", xla, work, peer=PEERS["recorded xla"])
    for D, F in (GATE, DOWN):
        w = stack(LAYERS, EXPERTS, D, F)
        for N, kind in ((32768, "random"), (16384, "random"), (16384, "skewed"), (4096, "random"), (64, "random")):
            x, sizes = jax.random.normal(jax.random.key(N), (N, D), jnp.bfloat16), group_sizes(kind, N)
            moved = 2 * (N * (D + F) + int((sizes > 0).sum()) * D * F)
            for name, f in ours.items():
                timing = clock(jax.jit(f), x, w, jnp.int32(LAYERS - 1), sizes)
                out |= line(f"layer of 46, {N} {kind} x {D} x {F}, {name}", timing, 2 * N * D * F, moved)
    return out


def through_layers(product):
    """All layers one after the other, each product of the same x rows to experts that differ from layer to layer."""

    def run(x, w, experts_LN):
        def layer(total, at):
            l, expert_N = at
            sizes = jnp.bincount(expert_N, length=EXPERTS).astype(jnp.int32)
            return total + product(x, w, l, sizes).astype(jnp.float32), None

        start = jnp.zeros((x.shape[0], w.shape[3]), jnp.float32)
        return jax.lax.scan(layer, start, (jnp.arange(w.shape[0]), experts_LN))[0]

    return jax.jit(run)


def by_splits(splits):
    def product(x, w, layer, sizes):
        expert_N = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right", method="compare_all")
        return matvec_gpu.matvec(x, [w], layer, expert_N.astype(jnp.int32), splits=splits)[0].astype(x.dtype)

    return product


def decode():
    out = {}
    rng = np.random.default_rng(1)
    for D, F in (GATE, DOWN):
        w = stack(LAYERS, EXPERTS, D, F)
        for N in (4, 8, 16, 32, 64):
            x = jax.random.normal(jax.random.key(N), (N, D), jnp.bfloat16)
            experts = np.sort(np.stack([rng.choice(EXPERTS, N, replace=False) for _ in range(LAYERS)]), -1)
            moved = 2 * N * D * F
            paths = {"single rows": by_splits(None), "tiles": grouped_matmul_gpu.ragged}
            if N == 4:
                steps = D // 64
                paths |= {f"single rows, {s} splits": by_splits(s) for s in (steps // 4, steps // 2) if steps % s == 0}
                paths |= {"XLA": reference.grouped_matmul}
            for name, f in paths.items():
                device, spread, wall, _ = clock(through_layers(f), x, w, jnp.asarray(experts, jnp.int32), calls=4)
                timing = device / LAYERS, spread / LAYERS, wall / LAYERS, None
                out |= line(f"a layer, {N} rows x {D} x {F}, {name}", timing, moved=moved)
    D, F = RECORDED
    w, x = stack(8, EXPERTS, D, F), jax.random.normal(jax.random.key(4), (4, D), jnp.bfloat16)
    experts = jnp.asarray(np.sort(np.stack([rng.choice(EXPERTS, 4, replace=False) for _ in range(8)]), -1), jnp.int32)
    device, spread, wall, _ = clock(through_layers(by_splits(None)), x, w, experts, calls=4)
    return out | line(
        "a layer, 4 rows x 2048 x 3072, single rows", (device / 8, spread / 8, wall / 8, None), moved=8 * D * F,
        peer=PEERS["four rows"],
    )  # fmt: skip


def through_matrices(product):
    def run(x, w):
        layer = lambda total, l: (total + product(x, w, l).astype(jnp.float32), None)
        return jax.lax.scan(layer, jnp.zeros((x.shape[0], w.shape[1]), jnp.float32), jnp.arange(w.shape[0]))[0]

    return jax.jit(run)


def dense():
    out = {}
    for what, (F, D, layers) in DENSE.items():
        w = stack(layers, 1, F, D)[:, 0]
        for N in (1, 4):
            x = jax.random.normal(jax.random.key(N), (N, D), jnp.bfloat16)
            for name, f in {"in place": layer_matmul_gpu.layer_matmul, "XLA": reference.layer_matmul}.items():
                device, spread, wall, kernels = clock(through_matrices(f), x, w, calls=4)
                timing = device / layers, spread / layers, wall / layers, None
                out |= line(f"{what}: {N} x {D} x {F}, {name}, {len(kernels) / layers:.1f} kernels", timing, moved=2 * F * D)
    return out


if __name__ == "__main__":
    modes = {"check": check, "prefill": prefill, "decode": decode, "dense": dense}
    chosen = sys.argv[1:] or list(modes)
    if unknown := set(chosen) - set(modes):
        sys.exit(f"unknown {', '.join(unknown)}: choose from {', '.join(modes)}")
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    peaks = f"of {LIMITS.bf16 / 1e12:.0f} TFLOP/s, of {LIMITS.copy / 1e12:.1f} TB/s"
    print(f"| case | device us (spread) | wall us | peer | {peaks} |")
    results = {}
    for mode in chosen:
        results |= modes[mode]()
    print(json.dumps(results))
