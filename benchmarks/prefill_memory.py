"""Peak memory and time of a long prefill of the demo model (``python benchmarks/prefill_memory.py --tokens 32768``).

The target of the reference kernels: 32K tokens under 8 GiB on a CPU, whatever the platform's own kernels do.
"""

import argparse
import platform
import resource
import time

import jax
import numpy as np

import ic_jax


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--pattern", default=None)
    args = parser.parse_args()
    lm = ic_jax.load(pattern=args.pattern, implementation="reference")
    ids = np.random.default_rng(0).integers(3, lm.config.vocab_size, args.tokens).tolist()
    start = time.perf_counter()
    logits, _ = lm.engine.prefill([ids], lm.engine.new_cache(1, args.tokens))
    assert np.isfinite(np.asarray(logits)).all()
    seconds = time.perf_counter() - start - lm.compile_seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"jax {jax.__version__} on {platform.machine()}, {jax.devices()[0].device_kind}; pattern {lm.pattern}")
    print("| tokens | seconds | tokens/s | peak GiB (whole process) |\n|---:|---:|---:|---:|")
    print(f"| {args.tokens} | {seconds:.1f} | {args.tokens / seconds:.0f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
