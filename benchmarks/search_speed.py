"""Seconds a candidate in the greedy layer search: what prefix reuse gives, and apart from it batching and blocks.

    python benchmarks/search_speed.py [--preset glm-4.7-flash-dsa] [--seq-len 8192] [--together 4] [--blocks 4] [--out FILE]

Random weights; time does not depend on them. The default is 47 small layers, for a CPU. Every way evaluates the
candidates of whole steps of one search, each on the same mini-batch; compile time apart, median of --repeat rounds.
Layer passes are counted: they say what the times should be. ``--clock cpu`` is for a machine that others use too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ic_jax import config as configs  # noqa: E402
from ic_jax import model  # noqa: E402
from ic_jax.engine import Engine  # noqa: E402
from ic_jax.pattern import Pattern  # noqa: E402
from ic_jax.search_evaluate import Evaluator  # noqa: E402
from ic_jax.search_methods import flip, greedy, n_evaluations  # noqa: E402

# The layers of the paper's 30B model with every width cut down.
SMALL = dict(
    model_type="glm4_moe_lite", vocab_size=4096, hidden_size=192, num_attention_heads=4, q_lora_rank=96,
    kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, intermediate_size=384,
    moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=1, index_n_heads=4,
    index_head_dim=64, index_topk=64, rope_theta=1e6,
)  # fmt: skip


def engine(args) -> Engine:
    if args.preset == "small":
        c = configs.Config.from_hf(SMALL | dict(num_hidden_layers=args.layers or 47))
    else:
        c = configs.preset(args.preset)
        if args.layers:
            n = args.layers
            c = c.replace(num_hidden_layers=n, mlp_layer_types=c.mlp_layer_types[:n])
    dtype = jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    pattern = Pattern.all_full(c.num_hidden_layers)
    params = model.init_params(c, c.num_hidden_layers, dtype=dtype)
    return Engine(
        params, c.replace(pattern=pattern), pattern.slots(pattern.full_layers), max_context=args.seq_len,
        prefill_chunk=args.seq_len, dtype=dtype,
    )  # fmt: skip


def spread_steps(n: int, keep: int, count: int) -> list[tuple[Pattern, list[int]]]:
    """(pattern, candidates) of ``count`` steps spread over a greedy search from ``n`` full layers to ``keep``."""
    steps, start = [], Pattern.all_full(n)
    order = np.random.default_rng(0).permutation(np.arange(1, n))[: n - keep]
    for layer in order:
        steps.append((start, [i for i in range(1, n) if start.layers[i] == "F"]))
        start = flip(start, int(layer))
    return [steps[round(i)] for i in np.linspace(0, len(steps) - 1, count)]


class Counted(Evaluator):
    """An Evaluator that counts layers times sequences."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passes, advance = 0, self.runner.advance

        def counting(state, slots, start=0, stop=None):
            self.passes += ((self.runner.n_layers if stop is None else stop) - start) * len(state.x_BSD)
            return advance(state, slots, start, stop)

        self.runner.advance = counting


def run_blocks(e: Evaluator, start: Pattern, keep: int, blocks: int) -> int:
    """Let every block commit one flip; returns how many candidates were tried."""
    return sum(len(step["candidates"]) for step in itertools.islice(greedy(e.candidates, start, keep, blocks), blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=("small", *configs.PRESETS))
    parser.add_argument("--layers", type=int, help="instead of the preset's own")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1, help="sequences of the mini-batch")
    parser.add_argument("--samples", type=int, default=16, help="sequences of the search that is projected")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--together", type=int, default=4, help="candidates in one batch")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps of the search that are timed, spread over it")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: of all threads of this process")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()

    lm = engine(args)
    c = lm.config
    n, start = c.num_hidden_layers, lm.config.pattern
    keep = -(-n * int(args.keep * 1000) // 1000)
    ids = np.random.default_rng(0).integers(0, c.vocab_size, (args.batch, args.seq_len + 1)).astype(np.int32)
    make = lambda **options: Counted(lm, range(n), ids, batch=args.batch, **options)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    ways = {
        "full forwards": dict(reuse_prefix=False),
        "prefix reuse": dict(),
        f"prefix reuse, {args.together} together": dict(together=args.together),
    }
    steps = spread_steps(n, keep, args.steps)
    for name, options in ways.items():
        began, (pattern, layers) = time.perf_counter(), steps[-1]
        make(**options).candidates(pattern, layers[-1 - options.get("together", 1) :])
        print(f"{name}: warmed up in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    losses, passes, tried = {}, {}, sum(len(layers) for _, layers in steps)
    for _ in range(args.repeat):  # the ways in turn, so that drift of the machine meets all of them
        for name, options in ways.items():
            e, began = make(**options), clock()
            losses[name] = [e.candidates(*step) for step in steps]
            times[name].append((clock() - began) / tried)
            passes[name] = e.passes / tried / args.batch
            print(f"{name}: {times[name][-1]:.4f} s a candidate", file=sys.stderr, flush=True)
    base = losses["full forwards"]
    differ = max(abs(base[i][k] - v[i][k]) for v in losses.values() for i in range(len(steps)) for k in base[i])
    median = {name: statistics.median(t) for name, t in times.items()}
    batches = -(-args.samples // args.batch)
    evaluations, with_blocks = (n_evaluations(start, keep, p) for p in (1, args.blocks))
    e, began = make(), clock()
    candidates = run_blocks(e, start, keep, args.blocks)
    each = (clock() - began) / candidates
    whole = median["full forwards"] * evaluations
    rows = [
        (name, passes[name], median[name], min(times[name]), max(times[name]), median["full forwards"] / median[name],
         evaluations, median[name] * evaluations * batches / 3600) for name in ways
    ]  # fmt: skip
    rows.append(
        (f"prefix reuse, {args.blocks} blocks", e.passes / candidates / args.batch, each, each, each,
         whole / (each * with_blocks), with_blocks, each * with_blocks * batches / 3600)
    )  # fmt: skip
    device = jax.devices()[0].device_kind
    flags = " ".join(sys.argv[1:])
    lines = [
        f"## {args.preset}, {n} layers, {device}",
        "",
        f"`python benchmarks/search_speed.py{' ' if flags else ''}{flags}`; jax {jax.__version__}, {args.batch} x "
        f"{args.seq_len} tokens a candidate, top-k {c.index_topk}, {lm.dtype}; {args.steps} steps of the search, median "
        f"of {args.repeat}, {args.clock} clock; largest difference of losses {differ:.1e}. Projected: keep {keep} of {n} "
        f"layers, {args.samples} sequences. The speed-up with blocks is that of the whole search, candidates it need not "
        "try included.",
        "",
        "| way | layers a candidate | s a candidate | min | max | speed-up | candidates of a search | hours of a search |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {w} | {p:.1f} | {s:.4f} | {low:.4f} | {high:.4f} | {x:.2f} | {m} | {h:.3f} |"
            for w, p, s, low, high, x, m, h in rows
        ),
        "",
    ]
    print("\n".join(lines))
    print(json.dumps(dict(device=device, jax=jax.__version__, args=vars(args) | dict(out=None), rows=rows, differ=differ)))
    if args.out:
        with open(args.out, "a", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
