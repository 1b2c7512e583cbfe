"""Peak host memory of loading and converting a synthetic checkpoint of several GB.

    python benchmarks/load_memory.py [--directory DIR] [--layers 4] [--fp8] [--out benchmarks/results/load_memory.md]

Makes a checkpoint of random weights (deleted afterwards), then loads and converts it, each in a process of its own
whose peak resident memory the kernel tells. The bound to keep: beyond the imports and, on a CPU, the weights
themselves, no more than the largest tensor of one layer plus 2 GiB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARD = 2 * 10**9

# What the child processes run; each ends with its own peak resident memory in kB.
TASKS = {
    "import": "import jax, orbax.checkpoint, ic_jax.checkpoint, convert.transfer; jax.devices()",
    "load safetensors": "load({src!r})",
    "load ours": "load({dst!r})",
    "load safetensors, 8 devices tensor=8": "load({src!r}, tensor=8)",
    "hf-to-jax": "convert('hf-to-jax', {src!r}, {dst!r})",
    "jax-to-hf": "convert('jax-to-hf', {dst!r}, {back!r})",
    "verify against the source": "convert('verify', {back!r}, '--against', {src!r})",
}
CHILD = """
import resource, sys
sys.path.insert(0, {root!r})
def load(directory, tensor=0):
    import jax
    from ic_jax import checkpoint, model, sharding
    from ic_jax.config import Config
    c = Config.load(directory)
    layers = checkpoint.indexer_layers(directory, c)
    shardings = None
    if tensor:
        mesh = sharding.make_mesh(sharding.parse_mesh(f"tensor={{tensor}}"))
        shardings = sharding.shardings(mesh, sharding.param_specs(model.abstract_params(c, len(layers))[1]))
    jax.block_until_ready(checkpoint.load_params(directory, c, layers, shardings=shardings))
def convert(*args):
    from convert.__main__ import main
    assert main([*args]) == 0
{task}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def config(layers: int, fp8: bool) -> dict:
    """config.json of a GLM-shaped model: one dense layer, the rest with 64 experts."""
    quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}} if fp8 else {}
    return quantized | dict(
        model_type="glm_moe_dsa", vocab_size=154880, hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16,
        q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
        intermediate_size=10240, moe_intermediate_size=1536, n_routed_experts=64, num_experts_per_tok=4,
        first_k_dense_replace=1, rope_theta=1e6, index_topk_freq=2, index_skip_topk_offset=1,
    )  # fmt: skip


def make(directory: Path, layers: int, fp8: bool) -> tuple[int, int]:
    """Write the checkpoint; returns its bytes of weights and the bytes of the largest tensor of one layer, as bf16."""
    from convert import mapping
    from ic_jax.checkpoint import flatten
    from ic_jax.config import Config
    from ic_jax.model import abstract_params

    hf = config(layers, fp8)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    c = Config.from_hf(hf)
    shapes = dict(flatten(abstract_params(c, c.pattern.n_full)[0]))
    tensors, largest = {}, 0
    for rule in mapping.TABLE:
        shape = shapes[rule.leaf].shape[1:] if rule.group else shapes[rule.leaf].shape
        largest = max(largest, 2 * math.prod(shape))
        for layer in rule.layers(c, c.pattern.full_layers):
            for part in mapping.parts(rule, layer, rule.view_shape(shape), c, fused=False):
                kept = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "weights_proj")
                if "e_score_correction_bias" in part.name:
                    tensors[part.name] = ("F32", part.shape)
                elif not fp8 or any(k in part.name for k in kept):
                    tensors[part.name] = ("BF16", part.shape)
                else:
                    tensors[part.name] = ("F8_E4M3", part.shape)
                    blocks = tuple(-(-n // 128) for n in part.shape)
                    tensors[mapping.scale_name(part.name)] = ("F32", blocks)
    # Bits without a set exponent top: finite in every dtype, and not compressible.
    noise = np.random.default_rng(0).integers(0, 1 << 32, 1 << 24, np.uint32) & 0xBFBFBFBF
    noise, width, index, shard = noise.tobytes(), {"F32": 4, "BF16": 2, "F8_E4M3": 1}, {}, 0
    while tensors:
        header, size = {}, 0
        for name, (dtype, shape) in list(tensors.items()):
            if size > SHARD:
                break
            nbytes = width[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + nbytes]}
            index[name] = f"model-{shard:05}.safetensors"
            size += nbytes
            del tensors[name]
        raw = json.dumps(header).encode()
        with open(directory / f"model-{shard:05}.safetensors", "wb") as f:
            f.write(struct.pack("<Q", len(raw)) + raw)
            for at in range(0, size, len(noise)):
                f.write(noise[: min(len(noise), size - at)])
        shard += 1
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(f.stat().st_size for f in directory.glob("*.safetensors")), largest


def run(task: str, paths: dict) -> tuple[float, float]:
    """(seconds, peak resident GB) of one task in its own process."""
    code = CHILD.format(root=str(ROOT), task=TASKS[task].format(**paths))
    flags = "--xla_force_host_platform_device_count=8" if "8 devices" in task else ""
    start = time.perf_counter()
    env = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to make the checkpoint (default: a temporary directory)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--fp8", action="store_true", help="FP8 weights with block scales")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    import jax

    work = Path(tempfile.mkdtemp(prefix="load_memory-", dir=args.directory))
    try:
        if shutil.disk_usage(work).free < 25e9 * args.layers / 4:
            raise SystemExit(f"{work} has too little room")
        src, dst, back = (work / n for n in ("hf", "ours", "back"))
        size, largest = make(src, args.layers, args.fp8)
        paths = dict(src=str(src), dst=str(dst), back=str(back))
        weights, rows = sum_bf16(src), []
        device = jax.devices()[0]
        order = ["import", "load safetensors", "load safetensors, 8 devices tensor=8", "hf-to-jax", "load ours"]
        if device.platform != "cpu":
            order.remove("load safetensors, 8 devices tensor=8")
        for task in (*order, "jax-to-hf", "verify against the source"):
            seconds, peak = run(task, paths)
            rows.append((task, seconds, peak))
            base = rows[0][2]
            held = weights if task.startswith("load") and device.platform == "cpu" else 0
            allowed = base + held + largest / 1e9 + 2 * 1.073741824
            rows[-1] += (peak - base - held, allowed)
            print(f"{task}: {seconds:.0f} s, peak {peak:.2f} GB, allowed {allowed:.2f} GB", file=sys.stderr)
    finally:
        shutil.rmtree(work)
    names = ("jax", "orbax-checkpoint", "tensorstore", "numpy")
    versions = ", ".join(f"{n} {version(n)}" for n in names)
    fp8 = " --fp8" if args.fp8 else ""
    lines = [
        f"## {'FP8' if args.fp8 else 'BF16'} checkpoint, {args.layers} layers",
        "",
        f"`python benchmarks/load_memory.py --layers {args.layers}{fp8}`; {device.device_kind}, "
        f"Python {platform.python_version()}, {versions}.",
        "",
        f"On disk {size / 1e9:.2f} GB; weights in bfloat16 {weights:.2f} GB; largest tensor of one layer "
        f"{largest / 1e9:.2f} GB. Own: the peak less the imports and, where the CPU is the device, the weights.",
        "",
        "| task | s | peak GB | own GB | allowed peak GB |",
        "|---|---|---|---|---|",
        *(f"| {t} | {s:.0f} | {p:.2f} | {own:.2f} | {allowed:.2f} |" for t, s, p, own, allowed in rows),
        "",
    ]
    print("\n".join(lines))
    print(json.dumps({"rows": rows, "disk_gb": size / 1e9, "weights_gb": weights, "largest_gb": largest / 1e9}))
    if args.out:
        with open(args.out, "a", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")
    late = [t for t, _, peak, _, allowed in rows if peak > allowed]
    if late:
        raise SystemExit(f"over the bound: {', '.join(late)}")


def sum_bf16(directory: Path) -> float:
    """GB of the loaded parameters in bfloat16."""
    from convert.safetensors import read_headers

    counted = (t for n, t in read_headers(directory).items() if not n.endswith("_scale_inv"))
    return sum(math.prod(t.shape) * (4 if t.dtype == "F32" else 2) for t in counted) / 1e9


if __name__ == "__main__":
    main()
