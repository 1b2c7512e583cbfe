"""Every Hopper kernel and block size compiles through ptxas on a machine without a GPU, with the registers
and spills recorded (tests/data/hopper_registers.json; ``python tests/hopper.py --update`` after a change that is meant)."""

import importlib.util
import json
import os
import subprocess
import sys

import hopper
import pytest

is_there = importlib.util.find_spec
MISSING = not (is_there("jax_cuda13_plugin") and is_there("nvidia") and is_there("nvidia.cu13"))


@pytest.mark.skipif(MISSING, reason="needs jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc to compile")
def test_hopper_kernels_compile_within_their_recorded_registers():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, hopper.__file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    recorded = json.loads(hopper.RECORD.read_text())
    assert found.keys() == recorded.keys()
    for name, kernels in found.items():
        # The record is of jax 0.12, which compiles equal kernels once. Where another jax reports more or fewer, it is not
        # known which is which, and the most of any counts.
        held = recorded[name]
        most = held if len(kernels) == len(held) else [[max(column) for column in zip(*held, strict=True)]] * len(kernels)
        assert kernels, name
        for (registers, spills), (most_registers, most_spills) in zip(kernels, most, strict=True):
            # Another ptxas may choose a few registers more; spills are never welcome.
            assert registers <= most_registers + 8 and spills <= most_spills, (name, kernels, held)


DIVIDED = """
import re, sys
import hopper, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, PartitionSpec, use_abstract_mesh
from ic_jax import cache, config, model, sharding
from ic_jax.parallel import Parallel, cache_specs
from ic_jax.pattern import Pattern

c = config.preset("glm-4.7-flash-dsa")
c = c.replace(num_hidden_layers=2, mlp_layer_types=c.mlp_layer_types[:2], pattern=Pattern("FS"))
devices = topologies.get_topology_desc(platform="cuda", target_config=hopper.H200, topology="1x1x2").devices
sizes = sharding.parse_mesh(sys.argv[1])
shape = [sizes.get(axis, 1) for axis in sharding.MESH_AXES]
mesh = Mesh(np.array(devices).reshape(shape), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 4)
struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
place = lambda tree, specs: jax.tree.map(struct, tree, sharding.shardings(mesh, specs))
with use_abstract_mesh(mesh.abstract_mesh):
    shapes, axes = model.abstract_params(c, 1)
    make = lambda: cache.allocate(c, 1, 1, 32768, index_dtype="float8_e4m3fn", parallel=Parallel.of(mesh, 1))
    kv = jax.eval_shape(make)
    args = place(shapes, sharding.param_specs(axes)), place(kv, cache_specs(kv))
    for queries in (1, 512):
        ids = place(jax.ShapeDtypeStruct((1, queries), jnp.int32), PartitionSpec())
        run = jax.jit(model.over_mesh(mesh, c, (0, -1), axes, queries=queries), donate_argnums=3)
        compiled = run.trace(args[0], ids, ids, args[1]).lower(lowering_platforms=("cuda",)).compile()
        text = compiled.as_text()
        print("kernels", len(re.findall("mosaic_gpu", text)))
        print("queries turned", len(re.findall(r"= bf16\\[[\\d,]*,576\\]\\S* transpose\\(", text)))
        print("contended stores", sum("unique_indices=true" not in l for l in re.findall(r"= bf16\\S* scatter\\(.*", text)))
"""


@pytest.mark.skipif(bool(MISSING), reason="needs jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc to compile")
@pytest.mark.parametrize("mesh", ["tensor=2", "context=2"])
def test_the_divided_model_compiles_with_its_kernels_for_two_gpus(mesh):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DIVIDED, mesh], capture_output=True, text=True, env=env, cwd=os.path.dirname(hopper.__file__)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = lambda what: [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith(what)]
    # Scores, selection and attention of a full layer, attention of a shared one; some take two launches.
    assert len(counts("kernels")) == 2 and min(counts("kernels")) >= 4
    # What XLA adds unless told otherwise: a pass over all queries, compare-and-swap for every cached value.
    assert counts("queries turned") == counts("contended stores") == [0, 0]
