"""Compiles the TPU kernels for every generation without a TPU and prints what libtpu's schedules say about them.

    python benchmarks/tpu_static.py [--chips v5e v5p v6e 7x] [--works NAME ...] [--write FILE]

These are STATIC schedules: one VLIW bundle is counted as one cycle, stalls (DMA latency, memory contention, a matrix unit
that is still busy) are not seen, and loop counts are those written in this file. A bound is the largest of the schedule's
time, the arithmetic at the data sheet's rate and the HBM traffic at the data sheet's bandwidth: no run can be faster than
the last two, and the first is what the compiler plans. Nothing here was run. Figures are for one TensorCore.

Needs libtpu. With tokamax installed its public TPU kernels are compiled for the same work, where they take it.
The last line is JSON.
"""

import argparse
import glob
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
# One TensorCore: bf16 FLOP/s and HBM bytes/s as in jax's table of chips; the clock is FLOP/s over FLOPs a bundle
# (v5e, v5p: 4 matrix units of 128 x 128; v6e, 7x: 2 of 256 x 256 that take two rows a bundle).
FLOPS = {"v5e": 197e12, "v5p": 229.5e12, "v6e": 920e12, "7x": 1155e12}
BANDWIDTH = {"v5e": 820e9, "v5p": 1230e9, "v6e": 1640e9, "7x": 3700e9}
CLOCK = {c: FLOPS[c] / (131072 if c in ("v5e", "v5p") else 524288) for c in FLOPS}
PAGE, T, K, U, C = 256, 200_704, 2048, 576, 512
PASSES, PUTS = 18, 29  # of the threshold search (simulated, 8 rows at once); slot tiles met while compacting: 16 + 13
SELECT = ["extremes", "search", "count", "ties", "count ties", "group", "put"]


def index_topk(many, heads, dtype="bfloat16", batch=1):
    """index_topk of ``many`` queries at the end of each of ``batch`` sequences of 200,704 positions, k = 2,048."""
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct as S

    from pallas_kernels import index_topk_tpu as kernel

    fp8 = dtype == "float8_e4m3fn"
    shapes = (
        S((batch, many, heads, 128), dtype), S((batch, many, heads), jnp.float32), S((2, batch * T, 128), dtype),
        S((2, batch * T), jnp.float32), S((), jnp.int32), S((batch, T // PAGE), jnp.int32), S((batch, many), jnp.int32),
        S((batch,), jnp.int32),
    )  # fmt: skip

    def run(q, w, keys, scales, *rest):
        return kernel.index_topk(q, w, (keys, scales if fp8 else None), *rest, k=K, page_size=PAGE)

    p = kernel.plan(many, heads, T, PAGE)
    blocks = batch * -(-many // (8 * p.eights))
    select = blocks * p.eights
    loops = ["grid", "score", "clear", *(["choose"] if p.eights > 1 else []), *SELECT]
    trips = {"grid": blocks, "score": blocks * -(-T // p.tile), "clear": 0, "choose": select}
    trips |= _selection(select)
    padded = blocks * p.eights * 8
    return dict(
        name="index_topk", f=run, shapes=shapes, loops=loops, trips=trips,
        flops=2 * padded * heads * 128 * T,
        bytes=blocks * T * (128 * (1 if fp8 else 2) + 4 * fp8) + batch * many * (heads * 256 + K * 4),
        hot="score", note=f"{p.eights * 8} queries x {p.tile} keys a step",
    )  # fmt: skip


def _selection(eights):
    from pallas_kernels.topk_tpu import UNROLL

    runs = -(-T // (UNROLL * 128))
    return {
        "extremes": eights * runs, "search": eights * PASSES, "count": eights * PASSES * runs, "ties": 0, "count ties": 0,
        "group": eights * -(-T // 16384), "put": eights * PUTS,
    }  # fmt: skip


def topk(rows):
    """topk of ``rows`` x 200,704 float32 scores, k = 2,048."""
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct as S

    from pallas_kernels import topk_tpu

    eights = rows // 8
    return dict(
        name="topk", f=lambda s, n: topk_tpu.topk(s, n, k=K), shapes=(S((rows, T), jnp.float32), S((rows,), jnp.int32)),
        loops=["grid", "fill", *SELECT], trips={"grid": eights, "fill": eights * T // 128, **_selection(eights)},
        flops=0, bytes=rows * (T + K) * 4, hot="count", note=f"{PASSES} passes of the search",
    )  # fmt: skip


def sparse_mla(many, heads):
    """sparse_mla of ``many`` queries over 2,048 of 200,704 rows, 47 layers in the pool."""
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct as S

    from pallas_kernels import sparse_mla_tpu as kernel

    chunks = K // kernel.CHUNK
    issue = kernel.CHUNK // kernel.UNROLL
    row = kernel.row_shape(U)
    return dict(
        name="sparse_mla", f=lambda q, p, l, r: kernel._gather(q, p, l, r, 0.05, C),
        shapes=(
            S((1, many, heads, U), jnp.bfloat16), S((47, T, *row), jnp.bfloat16), S((), jnp.int32),
            S((1, many, K), jnp.int32),
        ),
        loops=["grid", "first issue", "step", "issue"],
        trips={"grid": many, "first issue": many * issue, "step": many * chunks, "issue": many * (chunks - 1) * issue},
        flops=2 * many * K * heads * (640 + 512), bytes=many * (K * row[0] * 512 + K * 8 + heads * (640 + 512) * 2),
        hot="issue", note=f"chunks of {kernel.CHUNK} rows", per_row=(many * K, kernel.UNROLL),
    )  # fmt: skip


def sweep(heads, span, many=256):
    """The sweep of sparse_mla: ``many`` queries over 2,048 rows each, within ``span`` rows of the pool."""
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct as S

    from pallas_kernels import sparse_mla_sweep_tpu as swept
    from pallas_kernels import sparse_mla_tpu as kernel

    row, tile, e = kernel.row_shape(U), swept.tile_for(span), swept.eights(heads, many)
    groups = many // (8 * e)

    def f(q, pool, layer, rows):
        extent = dict(pool_rows=span, lines_of_row=row[0], columns=kernel._columns)
        return swept.sweep(q, kernel._lines(pool), layer, rows, 0.05, C, **extent)

    return dict(
        name="sparse_mla_sweep", f=f, loops=["grid", "step"], trips={"grid": groups, "step": groups * span // tile},
        shapes=(
            S((1, many, heads, U), jnp.bfloat16), S((47, span, *row), jnp.bfloat16), S((), jnp.int32),
            S((1, many, K), jnp.int32),
        ),
        flops=2 * many * span * heads * (640 + 512), hot="step", note=f"{8 * e} queries x {tile} rows a step",
        bytes=groups * span * row[0] * 512 + many * (span / 8 + heads * (640 + 512) * 2), per_query=many,
    )  # fmt: skip


def row_bits(many=256, pool_rows=65_536):
    """The masks of a sweep, from the rows of ``many`` queries."""
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct as S

    from pallas_kernels import sparse_mla_sweep_tpu as swept

    words = -(-pool_rows // (swept.WORD * 8)) * 8
    return dict(
        name="row_bits", f=lambda r: swept.row_bits(r, pool_rows), shapes=(S((many, K), jnp.int32),), loops=["grid"],
        trips={"grid": many // 8}, flops=2 * many * 4 * words * K * 128, bytes=many * (K * 4 + pool_rows / 8), hot="grid",
        note="8 queries a step", per_query=many,
    )  # fmt: skip


def scores(kind, queries=32, heads=64, keys=1024):
    """One [32 queries, 1,024 keys, 64 heads] scoring step, four ways; only "eights" is shipped.

    eights: rows (head, 8 queries), head sum by register additions. naive: rows (query, head), reduced along sublanes.
    product: head sum as a second product with block-diagonal weights. product^T: the same with keys as rows. The last two
    round relu(q k) to bf16, which float32 scores do not allow.
    """
    import jax
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct as S
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, nt = queries * heads, (((1,), (1,)), ((), ()))
    dot = lambda a, b, dims: lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    def kernel(q_ref, w_ref, k_ref, o_ref):
        if kind == "product^T":
            x = jnp.maximum(dot(k_ref[...], q_ref[...], nt), 0.0).astype(jnp.bfloat16)
            o_ref[...] = dot(x, w_ref[...], nt)
            return
        x = jnp.maximum(dot(q_ref[...], k_ref[...], nt), 0.0)
        if kind == "product":
            o_ref[...] = dot(w_ref[...], x.astype(jnp.bfloat16), (((1,), (0,)), ((), ())))
        elif kind == "naive":
            o_ref[...] = (x.reshape(queries, heads, keys) * w_ref[...][:, :, None]).sum(1)
        else:
            for e in range(queries // 8):
                total = None
                for h in range(heads):
                    r = (e * heads + h) * 8
                    term = [x[r : r + 8, c : c + 128] * w_ref[e * heads + h] for c in range(0, keys, 128)]
                    total = term if total is None else [a + b for a, b in zip(total, term, strict=True)]
                o_ref[e * 8 : (e + 1) * 8] = jnp.concatenate(total, 1)

    w = {"naive": S((queries, heads), jnp.float32), "eights": S((rows // 8, 8, 128), jnp.float32)}
    w = w.get(kind, S((queries, rows), jnp.bfloat16))
    out = (keys, queries) if kind == "product^T" else (queries, keys)
    zero = lambda n: lambda i: (0,) * n
    step_out = (4 * out[0], out[1]) if kind == "product^T" else (out[0], 4 * out[1])
    f = lambda *a: pl.pallas_call(
        kernel, grid=(4,), out_shape=jax.ShapeDtypeStruct(step_out, jnp.float32), name="scores",
        in_specs=[
            pl.BlockSpec((rows, 128), zero(2)), pl.BlockSpec(w.shape, zero(len(w.shape))),
            pl.BlockSpec((keys, 128), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec(out, (lambda i: (i, 0)) if kind == "product^T" else (lambda i: (0, i))),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=50 * 2**20),
    )(*a)  # fmt: skip
    shapes = (S((rows, 128), jnp.bfloat16), w, S((4 * keys, 128), jnp.bfloat16))
    return dict(name="scores", f=f, shapes=shapes, loops=["step"], trips={"step": 1}, flops=2 * rows * keys * 128,
                bytes=keys * 256 + queries * keys * 4, hot="step", note="one step")  # fmt: skip


def tokamax(kernel):
    """tokamax's public kernels on the same work, where they take it."""
    import jax.numpy as jnp
    from jax import ShapeDtypeStruct as S

    if kernel == "topk":
        from tokamax._src.ops.topk.pallas_mosaic_tpu_kernel import sparsecore_topk

        f, shapes = (lambda s, n: sparsecore_topk(s, K, n)), (S((64, T), jnp.float32), S((64,), jnp.int32))
    else:
        from tokamax._src.ops.lightning_indexer.kernel import config, streamindex_topk

        many, heads = 256, 64
        layout = config.KVLayout.SEQ_ALONG_LANE
        f = lambda *a: streamindex_topk.streamindex_topk(
            *a,
            k=K,
            compression_ratio=1,
            num_kv_pages_per_block=(4, 4, 4),
            num_queries_per_block=(1, 16, 16),
            kv_layout=layout,
        )
        shapes = (
            S((many, heads, 128), jnp.float8_e4m3fn), S((many, heads), jnp.float32), S((T // PAGE, 33, 4, PAGE), jnp.uint8),
            S((1,), jnp.int32), S((T // PAGE,), jnp.int32), S((2,), jnp.int32), S((3,), jnp.int32),
        )  # fmt: skip
    return dict(name=None, f=f, shapes=shapes, loops=None, trips={}, flops=0, bytes=0, hot=None, note="tokamax")


WORKS = {
    "scoring step, naive": lambda: scores("naive"),
    "scoring step, eights (shipped)": lambda: scores("eights"),
    "scoring step, second product": lambda: scores("product"),
    "scoring step, second product^T": lambda: scores("product^T"),
    "index_topk 256 queries, 64 heads": lambda: index_topk(256, 64),
    "index_topk 256 queries, 32 heads": lambda: index_topk(256, 32),
    "index_topk 256 queries, 64 heads, e4m3": lambda: index_topk(256, 64, "float8_e4m3fn"),
    "index_topk decode, 8 sequences, 32 heads": lambda: index_topk(1, 32, batch=8),
    "topk 64 rows": lambda: topk(64),
    "sparse_mla 64 queries, 20 heads": lambda: sparse_mla(64, 20),
    "sparse_mla 64 queries, 64 heads": lambda: sparse_mla(64, 64),
    "sparse_mla 64 queries, 128 heads": lambda: sparse_mla(64, 128),
    "sweep of 65,536 rows, 256 queries, 20 heads": lambda: sweep(20, 65_536),
    "sweep of 65,536 rows, 256 queries, 64 heads": lambda: sweep(64, 65_536),
    "sweep of 65,536 rows, 256 queries, 128 heads": lambda: sweep(128, 65_536),
    "masks of a sweep of 65,536 rows, 256 queries": lambda: row_bits(),
    "tokamax lightning_indexer 256 queries, 64 heads, fp8": lambda: tokamax("indexer"),
    "tokamax sparsecore_topk 64 rows": lambda: tokamax("topk"),
}


def compile_one(work, chip):
    """Child process: compiles one work for one chip; prints a JSON line of what the executable says."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

    w = WORKS[work]()
    mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip]).devices[:1]), ("x",))
    args = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, PartitionSpec())) for s in w["shapes"]]
    start = time.perf_counter()
    with use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(w["f"]).trace(*args).lower().compile()
    memory = compiled.memory_analysis()
    keep = {k: v for k, v in w.items() if k not in ("f", "shapes")}
    keep |= dict(compile_s=time.perf_counter() - start, temp=memory.temp_size_in_bytes, jax=jax.__version__)
    print("RESULT " + json.dumps(keep), flush=True)


def regions(folder, name):
    """[(depth, bundles without inner loops, utilisation of the same)] of every loop of a kernel, in program order."""
    table = sorted(glob.glob(f"{folder}/*-{glob.escape(name)}*final_hlo-static-per-bundle-utilization.txt"))
    if not table:
        raise FileNotFoundError(f"no schedule of {name}")
    stem = re.sub(r"-\d+-final_hlo.*", "", table[0])
    code = next(f for f in sorted(glob.glob(glob.escape(stem) + "-*-final_bundles.txt")) if "schedule" not in f)
    lines = open(table[0]).read().splitlines()
    units = [u.strip() for u in lines[1].split(",")]
    capacity = dict(zip(units, map(int, lines[2].split()), strict=True))
    used = [list(map(int, l.split())) for l in lines[4:] if l.strip()]
    loops, open_loops = [], []
    for line in open(code):
        m = re.match(r"\s*0x([0-9a-f]+)\s*(\w\w)?\s*:\s*(>*)\s*\{(\s*\})?", line)
        if not m or (not m[3] and m[4]):  # an empty bundle carries no depth
            continue
        at, depth = int(m[1], 16), len(m[3])
        while open_loops and (depth < open_loops[-1][0] or (m[2] == "LB" and depth == open_loops[-1][0])):
            loops.append((*open_loops.pop(), at))
        if m[2] == "LB":
            open_loops.append((depth, at))
    loops += [(*l, len(used)) for l in open_loops]
    loops.sort(key=lambda l: l[1])
    out = []
    for depth, first, end in loops:
        inner = [l for l in loops if first < l[1] < end and l[0] == depth + 1]
        mine = [i for i in range(first, end) if not any(a <= i < b for _, a, b in inner)]
        out.append((depth, len(mine), {u: sum(used[i][j] for i in mine) for j, u in enumerate(units)}))
    return out, capacity, used


def measure(work, chip):
    """Compiles ``work`` for ``chip`` in a child process and reads the schedule dump; a dict, with "error" if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | dict(
            JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        )  # fmt: skip
        child = subprocess.run([sys.executable, __file__, "--one", work, chip], env=env, capture_output=True, text=True)
        found = re.search(r"^RESULT (.*)$", child.stdout, re.M)
        if not found:
            last = [l for l in child.stderr.splitlines() if re.match(r"\S*(Error|Exception)", l)]
            return dict(work=work, chip=chip, error=(last or ["no result"])[-1][:160])
        w = json.loads(found[1]) | dict(work=work, chip=chip)
        if w["name"] is None:
            dumped = glob.glob(f"{folder}/*final_hlo-static-per-bundle-utilization.txt")
            names = {re.sub(r"^\d+-|-\d+-final_hlo.*", "", pathlib.Path(f).name) for f in dumped}
            loops = {n: _largest(*regions(folder, n)) for n in sorted(names) if not n.startswith(("<late", "TLP"))}
            w["kernels"] = {n: k for n, k in loops.items() if k["share"]["MATMUL"]}
            if not w["kernels"]:
                w["error"] = "compiled; SparseCore programs are not in the bundle tables"
            return w
        loops, capacity, used = regions(folder, w["name"])
    if len(loops) != len(w["loops"]):
        if w["loops"] == ["step"]:  # the grid's loop alone
            loops = loops[:1]
        else:
            return w | dict(error=f"{len(loops)} loops in the schedule, {len(w['loops'])} expected")
    named = dict(zip(w["loops"], loops, strict=True))
    bundles = {n: named[n][1] * w["trips"][n] for n in named}
    _, hot, busy = named[w["hot"]]
    total = sum(bundles.values())
    times = dict(schedule=total / CLOCK[chip], matrix=w["flops"] / FLOPS[chip], hbm=w["bytes"] / BANDWIDTH[chip])
    bound = max(times, key=times.get)
    return w | dict(
        code=len(used), loop_bundles={n: named[n][1] for n in named}, total=total, hot_bundles=hot,
        share={u: busy[u] / (capacity[u] * hot) for u in ("MATMUL", "VALU", "VLOAD", "VSTORE", "SALU")},
        matmul=sum(named[n][2]["MATMUL"] * w["trips"][n] for n in named) / (capacity["MATMUL"] * total),
        us={k: v * 1e6 for k, v in times.items()}, bound=bound,
    )  # fmt: skip


def _largest(loops, capacity, used):
    """The loop with the most bundles of a kernel that this file has no trip counts for; the whole kernel if it has none."""
    units = list(capacity)
    whole = (0, len(used), {u: sum(row[j] for row in used) for j, u in enumerate(units)})
    _, n, busy = max(loops, key=lambda l: l[1], default=whole)
    return dict(loop=n, share={u: busy[u] / (capacity[u] * n) for u in ("MATMUL", "VALU", "VLOAD", "VSTORE", "SALU")})


def table(results):
    percent = lambda share: " | ".join(f"{100 * share[u]:.0f}" for u in ("MATMUL", "VALU", "VLOAD", "VSTORE", "SALU"))
    columns = "work, chip, loop, bundles, matrix %, VALU %, load %, store %, scalar %, total bundles, schedule us, matrix us"
    columns += ", HBM us, HBM MB, bound us, by, note"
    yield "| " + columns.replace(", ", " | ") + " |"
    yield "|" + "---|" * (columns.count(",") + 1)
    for r in results:
        head = f"| {r['work']} | {r['chip']} | "
        if "error" in r:
            yield head + f"{r['error']} |" + " |" * 14
        elif r["name"] is None:
            for name, k in r["kernels"].items():
                yield head + f"largest of {name} | {k['loop']} | {percent(k['share'])} |" + " |" * 8
        else:
            us = " | ".join(f"{r['us'][k]:,.1f}" for k in ("schedule", "matrix", "hbm"))
            note = r["note"]
            if r.get("per_row"):
                rows, unroll = r["per_row"]
                note += f"; {r['hot_bundles'] / unroll:.1f} bundles a row to issue, {r['total'] / rows:.1f} in all"
            if r.get("per_query"):
                note += f"; {r['total'] / r['per_query']:,.0f} bundles a query"
            yield (
                f"{head}{r['hot']} | {r['hot_bundles']} | {percent(r['share'])} | {r['total']:,} | {us} | "
                f"{r['bytes'] / 1e6:,.1f} | {max(r['us'].values()):,.1f} | {r['bound']} | {note} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", default=list(TOPOLOGY), choices=list(TOPOLOGY))
    parser.add_argument("--works", nargs="*", default=list(WORKS), help="names or parts of names")
    parser.add_argument("--write", type=pathlib.Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return compile_one(*args.one)
    works = [w for w in WORKS if any(part in w for part in args.works)]
    results = []
    for work in works:
        for chip in args.chips:
            results.append(measure(work, chip))
            print(f"{work}, {chip}: {results[-1].get('error', 'compiled')}", file=sys.stderr, flush=True)
    versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    try:
        versions["tokamax"] = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        pass
    head = "Static schedules by " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "; nothing was run."
    text = "\n".join([head, "", *table(results)])
    print(text)
    if args.write:
        args.write.write_text(text + "\n")
    print(json.dumps(dict(versions=versions, results=results)))


if __name__ == "__main__":
    main()
