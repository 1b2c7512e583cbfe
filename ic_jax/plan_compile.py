"""The real programs of a plan, compiled for TPUs that are not here: the compiler's own memory and collectives.

Needs libtpu, which compiles on a CPU. The pattern is data, as ``ic_jax.load`` runs it.
"""

from __future__ import annotations

import collections
import math
import os
import re
import time

from .errors import UserError

# Names of topologies and how many dimensions they have; a JAX device is a chip, or half of a v7x.
TOPOLOGIES = {"v5e": ("v5e", 2, 1), "v6e": ("v6e", 2, 1), "v5p": ("v5p", 3, 1), "v7x": ("tpu7x", 3, 2)}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def topology(chip: str, devices: int) -> str:
    """The name of the most even topology of so many devices; UserError where there is none."""
    if chip not in TOPOLOGIES:
        raise UserError(f"--compile compiles for TPUs ({', '.join(TOPOLOGIES)}), not for {chip}")
    name, dimensions, per_chip = TOPOLOGIES[chip]
    chips = devices // per_chip
    if devices < 4 * per_chip or chips & (chips - 1) or chips * per_chip != devices:
        raise UserError(f"--compile takes meshes of a power of two of devices, {4 * per_chip} or more, not {devices}")
    power = chips.bit_length() - 1
    sides = [1 << (power // dimensions + (i < power % dimensions)) for i in range(dimensions)]
    return f"{name}:{'x'.join(map(str, sorted(sides)))}" if dimensions == 2 else f"{name}:{'x'.join(map(str, sides))}"


def programs(config, pattern, sizes: dict[str, int], chip: str, layout) -> dict[str, dict]:
    """For a prefill chunk and a decode step: seconds of compilation, bytes of a device, and collectives.

    ``layout``: plan.Layout. Collectives map a kind to (number in a step, bytes that leave them on a device); those of
    full layers are counted for full layers only.
    """
    name = topology(chip, math.prod(sizes.values()))
    # Compiling touches no TPU: no need of a cloud machine's metadata, nor of being the only process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    import jax

    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, PartitionSpec, use_abstract_mesh

    from pallas_kernels import dispatch

    from . import cache, model, sharding
    from .parallel import Parallel, cache_specs

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ModuleNotFoundError) as e:
        why = str(e).splitlines()[0][:160]
        raise UserError(f"--compile needs libtpu (pip install 'ic-jax[tpu]'), and it said: {why}") from None
    shape = [sizes.get(axis, 1) for axis in sharding.MESH_AXES]
    mesh = Mesh(np.array(devices).reshape(shape), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    slots = (-1,) * config.num_hidden_layers if pattern is None else pattern.slots(pattern.full_layers)
    shapes, axes = model.abstract_params(config, layout.slots, jnp.dtype(layout.dtype))
    place = lambda tree, specs: jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, sharding.shardings(mesh, specs)
    )
    out = {}
    with use_abstract_mesh(mesh.abstract_mesh):
        make = lambda: cache.allocate(
            config, layout.slots, layout.batch * layout.p.data, layout.context, dtype=jnp.dtype(layout.dtype),
            index_dtype=layout.index_dtype, parallel=Parallel.of(mesh, 1),
        )  # fmt: skip
        caches = jax.eval_shape(make)
        caches = place(caches, cache_specs(caches))
        weights = place(shapes, sharding.param_specs(axes))
        for step, queries in (("prefill of a chunk", layout.chunk), ("decode of a token", 1)):
            ids = place(jax.ShapeDtypeStruct((layout.batch * layout.p.data, queries), jnp.int32), PartitionSpec())
            run = model.over_mesh(
                mesh, config, np.array(slots, np.int32), axes, queries=queries, dense=pattern is None, implementation="auto"
            )
            start = time.perf_counter()
            lowered = jax.jit(run, donate_argnums=3).trace(weights, ids, ids, caches).lower()
            compiled = lowered.compile(compiler_options=dispatch.compiler_options(queries))
            memory = compiled.memory_analysis()
            out[step] = dict(
                seconds=time.perf_counter() - start,
                bytes={
                    "arguments": memory.argument_size_in_bytes,
                    "results beside them": memory.output_size_in_bytes - memory.alias_size_in_bytes,
                    "temporaries": memory.temp_size_in_bytes,
                },
                collectives=collectives(compiled.as_text(), pattern),
            )
    return out


def collectives(text: str, pattern) -> dict[str, tuple[int, int]]:
    """(number, result bytes) of each kind of collective that a run of this optimised HLO executes with ``pattern``.

    Loops count as often as they turn: those over layers (``model.run_layers`` names them) as the pattern says.
    """
    bodies = {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S)}
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

    def turns(line: str) -> int:
        named = re.search(r'op_name="[^"]*layers_(\d+)_(\d+)/(?:while/body/)?(?:(shared|full)/)?while"', line)
        if pattern and named:
            layers = pattern.layers[int(named[1]) : int(named[2]) + 1]
            return dict(shared=layers.count("S"), full=layers.count("F")).get(named[3], 1)
        # The CPU's compiler states how often a loop turns, the TPU's leaves it to the condition's constant.
        trips = re.findall(r'known_trip_count":\{"n":"(\d+)"', line)
        trips = trips or re.findall(r" constant\((\d+)\)", bodies[re.search(r"condition=%?([\w.\-]+)", line)[1]])
        return max(map(int, trips), default=1)

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, "").splitlines():
            kind = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
            if kind:
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", kind[1])
                sizes = [_BYTES.get(t, 4) * math.prod(int(d) for d in dims.split(",") if d) for t, dims in shapes]
                # An asynchronous start lists its operands too.
                nbytes = max(sizes) if "-start(" in line and len(sizes) > 1 else sum(sizes)
                found[kind[2]][0] += times
                found[kind[2]][1] += times * nbytes
            if " while(" in line:
                visit(re.search(r"body=%?([\w.\-]+)", line)[1], times * turns(line))
            elif " conditional(" in line:
                branches = re.findall(r"(?:branch_computations=\{|(?:true|false)_computation=)([^}=]*)", line)
                for branch in re.findall(r"%?([\w.\-]+)", " ".join(branches)):
                    visit(branch, times)
            elif "-done(" not in line:  # a 7x leaves collectives to its SparseCores, in computations of their own
                for called in re.findall(r"(?:calls=|to_apply=|called_computations=\{)%?([\w.\-]+)", line):
                    visit(called, times)

    visit(entry, 1)
    return {kind: (n, size) for kind, (n, size) in sorted(found.items())}
