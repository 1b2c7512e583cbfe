"""What one GPU does at its best in the simplest programs: python benchmarks/limits.py [--out FILE.json].

A copy in device memory (bytes read and written), bf16 and fp8 products of 8,192 x 8,192 matrices of random numbers, and
rows of a latent cache gathered at random and added up, out of a pool that fits the L2 cache and out of one that does not.
MEASURED is what the other benchmarks divide by; figures of one run each, see benchmarks/results/limits.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Limits(NamedTuple):
    """bf16, fp8: FLOP/s. copy: bytes/s."""

    bf16: float
    copy: float
    fp8: float = 1979e12  # of the data sheet: kernels here come nearer to it than XLA's product (1,450 on an H100)


# Measured; but for the H100's products the H200's figure, the same processor (this script found 710 TFLOP/s there).
MEASURED = {
    "NVIDIA H200": Limits(790e12, 4.3e12),
    "NVIDIA H100 80GB HBM3": Limits(790e12, 3.0e12),
}


def seconds(f, *args, repeats=20) -> float:
    """Median of a call of jitted f, many queued together, so that the host's part is hidden."""
    import jax

    f = jax.jit(f)
    jax.block_until_ready(f(*args))
    found = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(repeats):
            out = f(*args)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - began) / repeats)
    return statistics.median(found)


def measure() -> dict:
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    out = {}
    x = jax.random.normal(keys[0], (1 << 30,), jnp.float32)
    out["copy TB/s"] = 2 * x.nbytes / seconds(lambda x: -x, x) / 1e12
    del x
    n = 8192
    a, b = (jax.random.normal(k, (n, n), jnp.bfloat16) for k in keys[:2])
    out["bf16 TFLOP/s"] = 2 * n**3 / seconds(jnp.dot, a, b) / 1e12

    def fp8(a, b, scale):  # the form that XLA hands to cuBLASLt's fp8 product
        a, b = (x.astype(jnp.bfloat16) * scale for x in (a, b))
        return jnp.einsum("mk,nk->mn", a, b)

    a, b = (x.astype(jnp.float8_e4m3fn) for x in (a, b))
    out["fp8 TFLOP/s"] = 2 * n**3 / seconds(fp8, a, b, jnp.bfloat16(0.5)) / 1e12
    for where, rows in (("L2", 16384), ("memory", 1 << 20)):
        pool = jax.random.normal(keys[2], (rows, 576), jnp.bfloat16)
        at = jax.random.randint(keys[3], (2048, 2048), 0, rows)
        gather = lambda pool, at: pool[at].astype(jnp.float32).sum(1)
        out[f"gather TB/s, pool in {where}"] = at.size * 1152 / seconds(gather, pool, at, repeats=3) / 1e12
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write JSON here too")
    args = parser.parse_args()
    import jax

    found = dict(device=jax.devices()[0].device_kind, jax=jax.__version__) | {k: round(v, 2) for k, v in measure().items()}
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
