"""Compiles the shipped Hopper kernels down to ptxas without a GPU: ``python tests/hopper.py`` prints registers and spills.

Needs jax-cuda13-plugin, jax-cuda13-pjrt (jax's version) and nvidia-cuda-nvcc. One JSON line a kernel configuration;
``--update`` writes tests/data/hopper_registers.json, which test_aot.py holds the kernels to.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

RECORD = Path(__file__).parent / "data" / "hopper_registers.json"
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H200"
"""


def configurations():
    """(name, function, argument shapes) of every kernel at the shapes that choose its block sizes."""
    import functools

    import jax
    import jax.numpy as jnp

    sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
    import kernels_grouped_matmul as products

    from pallas_kernels import (
        grouped_matmul_gpu,
        index_topk_gpu,
        layer_matmul_gpu,
        matvec_gpu,
        row_groups_gpu,
        sparse_mla_gpu,
        sparse_mla_grouped_gpu,
    )

    def spec(shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    layer, f32, i32 = spec((), "int32"), "float32", "int32"
    pool = spec((47, 65536, 576))
    for name, S, H in [("20 heads", 4096, 20), ("64 heads", 4096, 64), ("128 heads", 4096, 128), ("decode", 1, 20)]:
        f = functools.partial(sparse_mla_gpu.sparse_mla, scale=0.1, value_dim=512)
        yield f"sparse_mla {name}", f, (spec((1, S, H, 576)), pool, layer, spec((1, S, 2048), i32))

    def grouped(q, pool, layer, positions, table):
        plan = sparse_mla_grouped_gpu.plan_rows(positions, table, q.shape[2], pool, page_size=256)
        return sparse_mla_gpu.sparse_mla(q, pool, layer, plan.rows_BSK, scale=0.1, groups=plan.groups)

    args = (spec((2, 4096, 20, 576)), pool, layer, spec((2, 4096, 2048), i32), spec((2, 128), i32))
    yield "sparse_mla grouped, with its plan", grouped, args

    from ic_jax import cache as caches
    from ic_jax import config, model

    c = config.preset("glm-4.7-flash-dsa").replace(
        num_hidden_layers=3, mlp_layer_types=("dense", "sparse", "sparse"), vocab_size=1024, n_routed_experts=8,
        moe_intermediate_size=256, intermediate_size=512,
    )  # fmt: skip
    cache = jax.eval_shape(lambda: caches.allocate(c, 2, 1, 4096))
    tokens = spec((1, 512), i32)
    args = (model.abstract_params(c, 2)[0], spec((3,), i32), tokens, tokens, cache)
    f = lambda params, slots, *a: model.forward(params, c, slots, *a, implementation="gpu").logits
    yield "model, pattern as data", f, args
    for g in (3, 6, 16):
        f = functools.partial(row_groups_gpu.bitmap_groups, g=g, page_size=256)
        yield f"groups of {g} by bitmaps", f, (spec((2, 4096, 2048), i32), spec((2, 784), i32))

    def gradient(q, pool, layer, rows):
        loss = lambda q, pool: sum(x.sum(dtype=f32) for x in sparse_mla_gpu.sparse_mla(q, pool, layer, rows, scale=0.1))
        return jax.grad(loss, (0, 1))(q, pool)

    for H in (20, 64):
        args = (spec((1, 1024, H, 576)), spec((1, 65536, 576)), layer, spec((1, 1024, 2048), i32))
        yield f"sparse_mla gradient {H} heads", gradient, args
    for N in (64, 32768):
        for D, F in ((2048, 1536), (1536, 2048)):
            args = (spec((N, D)), spec((46, 64, D, F)), layer, spec((64,), i32))
            yield f"grouped_matmul {N} x {D} x {F}", grouped_matmul_gpu.grouped_matmul, args
    for N in (64, 16384):
        args = (spec((N, 2048)), *[spec((46, 64, 2048, 1536))] * 2, layer, spec((64,), i32))
        yield f"grouped_swiglu {N} x 2048 x 1536", grouped_matmul_gpu.grouped_swiglu, args
    for N in (1, 4):  # every product of a decode step, as benchmarks/kernels.py checks them on a device
        for form, (layers, (*heads, D), outs, dtype, eps) in products.LINEAR.items():
            norm = None if eps is None else (spec((47, D)), layer)
            args = (spec((N, 1, *heads, D)), [spec((layers, *heads, F, D)) for F in outs], layer, norm)
            f = lambda x, w, layer, norm, dtype=dtype, eps=eps: layer_matmul_gpu.layer_matmul(x, w, layer, dtype, norm, eps)
            yield f"layer_matmul {form}, {N} sequences", f, args
        for form, (shape, inner, count, each) in products.EXPERT.items():
            args = (spec((N, *inner)), [spec(shape)] * count, layer, spec((N, each), i32) if each else None)
            yield f"expert_matmul {form}, {N} sequences", matvec_gpu.expert_matmul, args
    for dtype in ("bfloat16", "float8_e4m3fn"):
        for name, S, pages in [("prefill", 1024, 512), ("decode", 1, 784)]:
            keys = spec((12, pages * 256, 128), dtype)
            scales = spec((12, pages * 256), f32) if dtype != "bfloat16" else None
            args = (spec((1, S, 32, 128), dtype), spec((1, S, 32), f32), (keys, scales), layer, spec((1, pages), i32),
                    spec((1, S), i32), spec((1,), i32))  # fmt: skip
            f = functools.partial(index_topk_gpu.index_topk, k=2048, page_size=256, return_scores=name == "decode")
            yield f"index_topk {name} {dtype}", f, args


def compile_all():
    """{configuration: [[registers, spilled bytes] of each of its kernels]}, printed as they come."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

    from pallas_kernels import dispatch

    dispatch.target = lambda: dispatch.CHIPS["h200"]  # this process runs on a CPU
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    found = {}
    for name, f, args in configurations():
        placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), args)
        with use_abstract_mesh(mesh.abstract_mesh), _ptxas_report() as report:
            jax.jit(f).trace(*placed).lower(lowering_platforms=("cuda",)).compile()
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report.text)]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report.text)]
        found[name] = [list(pair) for pair in zip(registers, spills, strict=True)]
        print(json.dumps({name: found[name]}), flush=True)
    return found


class _ptxas_report:
    """What ptxas prints while the block runs; it writes to the process's own descriptors."""

    def __enter__(self):
        sys.stdout.flush()
        self.file = tempfile.TemporaryFile()
        self.saved = [os.dup(1), os.dup(2)]
        for fd in (1, 2):
            os.dup2(self.file.fileno(), fd)
        return self

    def __exit__(self, *error):
        for fd, saved in zip((1, 2), self.saved, strict=True):
            os.dup2(saved, fd)
            os.close(saved)
        self.file.seek(0)
        self.text = self.file.read().decode(errors="replace")
        if error[0]:
            sys.stderr.write(self.text)


if __name__ == "__main__":
    os.environ.update(JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_PTXAS="1")
    sys.path.insert(0, str(Path(__file__).parent.parent))
    result = compile_all()
    if "--update" in sys.argv:
        RECORD.write_text(json.dumps(result, indent=1) + "\n")
