"""Compiles the whole model for TPUs that are not here: one prefill chunk and one decode step, as the engine runs them.

    python benchmarks/tpu_model.py [--model glm-4.7-flash-dsa] [--context 200704] [--chunk 4096] [--write FILE]

Every figure is the compiler's (libtpu): bytes of arguments and temporaries of one device, size of the program. Copies are
instructions of the optimised HLO, outside of fusions, whose result has as many elements (8 M at least) as a cache, a layer
of a cache, a stack of weights or a layer of the experts, and which neither update it in place nor bring it to VMEM. Nothing
here was run.

Needs libtpu. The last line is JSON.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import time

os.environ |= dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, use_abstract_mesh  # noqa: E402

from ic_jax import cache as caches  # noqa: E402
from ic_jax import config, model, sampling, sharding  # noqa: E402
from ic_jax.engine import Engine  # noqa: E402
from ic_jax.parallel import Parallel, cache_specs  # noqa: E402
from pallas_kernels import dispatch  # noqa: E402

# A 7x device is one TensorCore with half a chip's memory, 103 GB; a v6e has 34 GB, so that 60 GB of weights need four.
PLACES = (("7x", "tpu7x:2x2x1", ""), ("v6e", "v6e:2x2", "expert=4"), ("v6e", "v6e:2x2", ""))
SMALL = 2**23  # elements; activations have as many as the smallest stacks
IN_PLACE = {"parameter", "bitcast", "get-tuple-element", "tuple", "while", "conditional", "dynamic-update-slice", "scatter"}


def engine_for(c, topology: str, mesh: str, chunk: int, context: int):
    """(abstract mesh to compile under, an Engine whose weights are shapes alone)."""
    sizes = sharding.parse_mesh(mesh) if mesh else {}
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[: math.prod(shape)]
    placed = Mesh(np.array(devices).reshape(shape), sharding.MESH_AXES)
    shapes, axes = model.abstract_params(c, c.pattern.n_full)
    where = sharding.shardings(placed, sharding.param_specs(axes))
    params = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, where)
    slots = np.array(c.pattern.slots(c.pattern.full_layers), np.int32)
    engine = Engine(
        params, c, slots, max_context=context, prefill_chunk=chunk, dtype=jnp.dtype("bfloat16"),
        mesh=placed if mesh else None,
    )  # fmt: skip
    return placed.abstract_mesh, engine


def copies(compiled, engine, cache) -> list[str]:
    """Instructions that copy a cache, a layer of one, a stack of weights or a layer of the experts (module's docstring)."""
    parts = lambda s: s.sharding.shard_shape(s.shape) if s.sharding is not None else s.shape
    pools = [parts(s) for s in jax.tree.leaves(cache) if s.ndim > 2]
    stacks = [parts(s) for s in jax.tree.leaves(engine.params) if s.ndim > 2]
    experts = [parts(s) for s in jax.tree.leaves(engine.params["experts"]) if s.ndim == 4]
    sizes = {math.prod(s) for s in pools + stacks} | {math.prod(s[1:]) for s in pools + experts}
    sizes = {s for s in sizes if s >= SMALL}
    text = compiled.as_text()
    roots, inside, found = {}, None, []
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            inside = start[1]
        if root := re.match(r"\s+ROOT %\S+ = .*? ([\w\-]+)\(", line):
            roots[inside] = root[1]
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            inside = start[1]
        made = re.match(r"\s+(?:ROOT )?%\S+ = (\w+)\[([\d,]+)\]\{([^}]*)\} ([\w\-]+)\(", line)
        if not made or "fused" in inside or "S(1)" in made[3] or math.prod(map(int, made[2].split(","))) not in sizes:
            continue
        called = re.search(r"calls=%?([\w.\-]+)", line)
        op = roots[called[1]] if made[4] == "fusion" and called else made[4]
        if op not in IN_PLACE:
            found.append(f"{made[4]} {made[1]}[{made[2]}]")
    return found


def compile_step(engine, kind: str, chunk: int, context: int):
    """(compiled program, its cache's shapes) of one step for one sequence."""
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    parallel = Parallel.of(engine.mesh, 1)
    cache = jax.eval_shape(lambda: caches.allocate(engine.config, engine.n_slots, 1, context, parallel=parallel))
    if engine.mesh is not None:
        where = sharding.shardings(engine.mesh, cache_specs(cache))
        cache = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), cache, where)
    args = (i32(1, chunk), i32(1, chunk), cache)
    if kind == "decode":
        args = (i32(1), i32(1), cache, jax.eval_shape(lambda: sampling.batch([sampling.SamplingParams()])))
    return engine._compile(kind, False, args), cache


def measure(c, chip, topology, mesh, kind, chunk, context) -> dict:
    row = dict(chip=chip, mesh=mesh or "one device", step=kind)
    abstract, engine = engine_for(c, topology, mesh, chunk, context)
    start = time.perf_counter()
    with use_abstract_mesh(abstract):
        row["kernels"] = dispatch.target().chip
        try:
            compiled, cache = compile_step(engine, kind, chunk, context)
        except jax.errors.JaxRuntimeError as e:
            return row | dict(error=re.search(r"E\d+: (.*?)\. HLO module|$", str(e))[1] or str(e)[:200])
    memory = compiled.memory_analysis()
    return row | dict(
        compile_s=time.perf_counter() - start, arguments=memory.argument_size_in_bytes, temp=memory.temp_size_in_bytes,
        in_place=memory.alias_size_in_bytes, code=memory.generated_code_size_in_bytes,
        copies=copies(compiled, engine, cache),
    )  # fmt: skip


def table(rows):
    yield "| chip | mesh | step | compile s | arguments GB | updated in place GB | temporaries MB | program MB | copies |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for r in rows:
        if "error" in r:
            yield f"| {r['chip']} | {r['mesh']} | {r['step']} | {r['error']} |" + " |" * 5
            continue
        copied = "; ".join(sorted(set(r["copies"]))) or "none"
        yield (
            f"| {r['chip']} | {r['mesh']} | {r['step']} | {r['compile_s']:.0f} | {r['arguments'] / 1e9:.2f} | "
            f"{r['in_place'] / 1e9:.2f} | {r['temp'] / 1e6:.1f} | {r['code'] / 1e6:.1f} | {copied} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="glm-4.7-flash-dsa")
    parser.add_argument("--context", type=int, default=200_704)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--chips", nargs="*", default=["7x", "v6e"])
    parser.add_argument("--write", type=pathlib.Path)
    args = parser.parse_args()
    c, rows = config.preset(args.model), []
    for place in PLACES:
        for kind in ("prefill", "decode"):
            if place[0] in args.chips:
                rows.append(measure(c, *place, kind, args.chunk, args.context))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    head = ", ".join(f"{k} {v}" for k, v in versions.items())
    head = f"{args.model}, context {args.context}, prefill chunk {args.chunk}, one sequence, bf16; {head}; nothing was run."
    text = "\n".join([head, "", *table(rows)])
    print(text)
    if args.write:
        args.write.write_text(text + "\n")
    print(json.dumps(dict(versions=versions, results=rows)))


if __name__ == "__main__":
    main()
