"""The paper's table on one accelerator: a 30B-shaped model whole, random weights, prefill and decode up to 200K tokens.

    python benchmarks/e2e.py                   everything, a part after another, then the report
    python benchmarks/e2e.py --minutes 5       begin parts until then; run it again to go on (exit status 3: more is left)
    python benchmarks/e2e.py table             the parts of one kind
    python benchmarks/e2e.py --preset demo --layers 2 --tokens 128,256 -n 2 -r 1 --memory-gb 0.2 --out DIR     on a CPU

Kinds of parts: ``table`` (prefill and decode, all-full beside 1/4; natural weights with fp8 index keys, alike ones with
bf16 too), ``crossover`` (against dense attention), ``breakdown`` (device time by phase), ``saturated`` (the largest batch
that memory holds), ``correct`` (kernels against the reference on a shortened stack), ``report``. A part is one JSON file
under --out; finished ones are not run again. The report is e2e.md, e2e.csv and e2e.png, made of the parts there are.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
KINDS = ("table", "crossover", "breakdown", "saturated", "correct")
FP8, BF16 = "float8_e4m3fn", "bfloat16"


class Bench:
    """The model of the flags, and its parts: a method for each kind, {part: call} in ``parts``."""

    def __init__(self, args):
        from ic_jax import config
        from ic_jax.pattern import Pattern

        self.args, c = args, config.preset(args.preset)
        n = args.layers or c.num_hidden_layers
        pattern = Pattern(c.pattern.layers[:n])
        quarter = pattern if pattern.n_full < n else Pattern.uniform(n, 4)
        self.config = c.replace(num_hidden_layers=n, mlp_layer_types=c.mlp_layer_types[:n], pattern=quarter)
        self.all, self.quarter = Pattern.all_full(n), quarter
        self._made, self._engine, self._programs = None, None, {FP8: {}, BF16: {}}

    def parts(self, kind: str) -> dict:
        """{name: a function that measures it and returns JSON values}; parts over the same weights are neighbours."""
        each = [(w, t) for w in ("natural", "alike") for t in self.args.tokens]
        last = self.args.tokens[-1]
        return {
            "table": {
                f"table-{w}-{d}-{t}": functools.partial(self.table, w, d, t)
                for w, t in each for d in (FP8, BF16) if (w, d) != ("natural", BF16)
            },
            "crossover": {f"crossover-{w}": functools.partial(self.crossover, w, last) for w in ("natural", "alike")},
            "breakdown": {f"breakdown-{w}-{t}": functools.partial(self.breakdown, w, t) for w, t in each},
            "saturated": {
                f"saturated-{t}-{name}": functools.partial(self.saturated, t, p)
                for t in self.args.tokens for name, p in (("all", self.all), ("quarter", self.quarter))
            },
            "correct": {
                f"correct-{w}-{d}": functools.partial(self.correct, w, d) for w in ("natural", "alike") for d in (FP8, BF16)
            },
        }[kind]  # fmt: skip

    def engine(self, weights: str, tokens: int, index_dtype: str, c=None):
        """An Engine with every indexer, its weights made when they are not those of the last call."""
        from ic_jax import random_weights
        from ic_jax.pattern import Pattern

        c = c or self.config
        ratio = 0.0 if weights == "natural" else random_weights.ratio_for(tokens, c.index_topk)
        if self._made != (c, ratio):
            self._engine = None  # the old weights go before the new ones come
            self._engine = random_weights.engine(
                c, Pattern.all_full(c.num_hidden_layers), seed=self.args.seed, neighbours=ratio,
                prefill_chunk=self.args.prefill_chunk, mesh=self.args.mesh,
            )  # fmt: skip
            self._made = c, ratio
        engine = copy.copy(self._engine)
        engine.index_dtype = index_dtype
        return engine, ratio

    def measure(self, engine, patterns, tests) -> list[dict]:
        import jax

        from ic_jax import bench_measure, roofline

        chip = roofline.chip_of(jax.devices()[0].device_kind)
        limits = roofline.limits(chip, 1 if engine.mesh is None else engine.mesh.size) if chip else None
        steps, often = self.steps(engine), dict(repeats=self.args.repeats, seconds=self.args.seconds)
        rows = bench_measure.measure(steps, patterns, tests, **often, chip=limits, overlap=True)
        return [row.to_json() | dict(compile_seconds=steps.compile_seconds) for row in rows]

    def steps(self, engine, **how):
        """Steps with every indexer; weights are arguments, and all lengths take the longest one's cache: few programs."""
        from ic_jax.bench_measure import Steps

        room = self.args.tokens[-1] + self.args.generate
        steps = Steps(engine, self.all.full_layers, seed=self.args.seed, room=room, static=self.args.static, **how)
        steps.programs = self._programs[engine.index_dtype]
        return steps

    def table(self, weights: str, index_dtype: str, tokens: int) -> dict:
        """Prefill of the whole prompt, and decode behind it."""
        engine, ratio = self.engine(weights, tokens, index_dtype)
        tests = [("pp", tokens, 0), ("tg", self.args.generate, tokens)]
        rows = self.measure(engine, [self.all, self.quarter], tests)
        return dict(weights=weights, ratio=ratio, index_dtype=index_dtype, tokens=tokens, rows=rows)

    def crossover(self, weights: str, most: int) -> dict:
        """A chunk of prefill and decode at depths from half of top-k on, sparse patterns beside dense attention."""
        depths = [d for i in range(8) if (d := self.config.index_topk // 2 << i) < most]
        engine, ratio = self.engine(weights, most, FP8)
        patterns, rows = [self.all, self.quarter, "dense"], []
        for depth in depths:
            tests = [("pp", min(engine.prefill_chunk, most - depth), depth), ("tg", self.args.generate, depth)]
            rows += (found := self.measure(engine, patterns, tests))
            slowest = [max((r for r in found if r["test"] == test), key=lambda r: r["median_s"]) for test in ("pp", "tg")]
            if not any(r["full"] for r in slowest):
                break  # dense attention loses from here on
        return dict(weights=weights, ratio=ratio, index_dtype=FP8, rows=rows)

    def breakdown(self, weights: str, tokens: int) -> dict:
        """Device time by phase of the last chunk of a prompt, and of decode steps behind it."""
        import jax
        import scopes

        engine, ratio = self.engine(weights, tokens, FP8)
        n, chunk = min(8, self.args.generate), min(engine.prefill_chunk, tokens)
        steps, rows = self.steps(engine, profiled=True), []
        steps.reserve(tokens + n)
        steps.prefill(self.all, 0, tokens)
        for pattern in (self.all, self.quarter):
            prefill = functools.partial(steps.prefill, pattern, tokens - chunk, tokens)
            decode = functools.partial(steps.decode, pattern, tokens, n)
            for kind, run, count in (("prefill", prefill, 1), ("decode", decode, n)):
                jax.block_until_ready(run())
                began = time.perf_counter()
                jax.block_until_ready(run())
                wall = (time.perf_counter() - began) / count
                phases, launched = scopes.times(run, steps.program(kind, pattern), count)
                step = dict(step=kind, queries=chunk if kind == "prefill" else 1)
                measured = dict(wall=wall, phases=phases, operations=launched)
                rows.append(dict(pattern=str(pattern), full=pattern.n_full) | step | measured)
        return dict(weights=weights, ratio=ratio, index_dtype=FP8, tokens=tokens, rows=rows)

    def saturated(self, tokens: int, pattern) -> dict:
        """Decode of the largest batch that memory holds behind ``tokens`` tokens, with the indexers of ``pattern`` only."""
        import jax
        import numpy as np
        import saturation

        engine, ratio = self.engine("alike", tokens, FP8)
        indexers = jax.tree.map(lambda a: a[np.array(pattern.full_layers)], engine.params["indexer"])
        engine.params, engine.n_slots = engine.params | dict(indexer=indexers), pattern.n_full
        limit = self.args.memory_gb and int(self.args.memory_gb * 1e9)
        found = saturation.decode(engine, pattern, tokens, self.args.generate, self.args.repeats, limit, self.args.seed)
        return dict(weights="alike", ratio=ratio, index_dtype=FP8, tokens=tokens, **found)

    def correct(self, weights: str, index_dtype: str) -> dict:
        """The kernels that ``auto`` chooses, the reference and float32: selections and logits of a few layers."""
        import agreement

        from ic_jax.pattern import Pattern

        n, tokens = min(4, self.config.num_hidden_layers), min(8192, self.args.tokens[-1])
        c = self.config.replace(num_hidden_layers=n, mlp_layer_types=self.config.mlp_layer_types[:n])
        engine, ratio = self.engine(weights, tokens, FP8, c.replace(pattern=Pattern.all_full(n)))
        rows = agreement.compare(engine, Pattern("FSFS"[:n]), tokens, index_dtype, self.args.seed)
        return dict(weights=weights, ratio=ratio, layers=n, tokens=tokens, rows=rows)


def about(args) -> dict:
    """What every part says of itself; parts that differ in it do not go into one report."""
    import jax

    from ic_jax import engine, info, sharding

    chunk = args.prefill_chunk or engine.default_chunk(sharding.parse_mesh(args.mesh) if args.mesh else {})
    shape = dict(preset=args.preset, layers=args.layers, seed=args.seed, mesh=args.mesh, prefill_chunk=chunk)
    return shape | dict(device=jax.devices()[0].device_kind, versions=info.versions())


def run_kind(args, kind: str) -> bool:
    """Measure the parts of ``kind`` that have no file yet; whether all have one now."""
    import jax

    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
    from convert.store import write_text

    bench, header = Bench(args), about(args)
    for name, part in bench.parts(kind).items():
        if not any(name.startswith(start) for start in args.only):
            continue
        path = args.out / f"{name}.json"
        if path.exists():
            if (other := json.loads(path.read_text())["about"]) != header:
                raise SystemExit(f"error: {path} was measured with {other}, this is {header}; choose another --out")
            continue
        if time.monotonic() > args.until:
            print(f"time is up before {name}; run again to go on", file=sys.stderr)
            return False
        print(f"{name} …", file=sys.stderr, flush=True)
        began = time.perf_counter()
        found = dict(kind=kind, about=header, **part(), part_seconds=time.perf_counter() - began)
        write_text(path, json.dumps(found, indent=1) + "\n")
    return True


def main() -> int:
    from ic_jax import cli
    from ic_jax.config import PRESETS
    from ic_jax.errors import UserError

    cli.take_gpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", default="all", choices=("all", *KINDS, "report"))
    parser.add_argument("--preset", default="glm-4.7-flash-dsa", choices=PRESETS)
    parser.add_argument("--layers", type=int, help="only the first layers of the model, for trials")
    lengths = lambda text: [int(t) for t in text.split(",")]
    parser.add_argument("--tokens", type=lengths, default=[10_000, 60_000, 120_000, 200_000])
    parser.add_argument("-n", "--generate", type=int, default=64, help="tokens decoded at each length (64)")
    parser.add_argument("-r", "--repeats", type=int, default=3, help="timed repeats (3)")
    parser.add_argument("--seconds", type=float, default=20, help="begin no further repeat after so many seconds (20)")
    parser.add_argument("--mesh", help="divide the model, context=2 for instance (one device)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefill-chunk", type=int, help="tokens of one step (by device)")
    parser.add_argument("--memory-gb", type=float, help="memory for the saturated case (the device's)")
    names = lambda text: text.split(",")
    parser.add_argument("--only", type=names, default=[""], help="parts whose names begin like this: table-alike,… (all)")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no part later than this")
    parser.add_argument("--static", action="store_true", help="compile each pattern in, rather than pass it as data")
    parser.add_argument("--cache", help="directory of compiled programs, for later calls")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "e2e")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.until = time.monotonic() + 60 * args.minutes
    if args.kind == "report":
        import e2e_report

        return e2e_report.write(args.out)
    if args.kind != "all":
        try:
            return 0 if run_kind(args, args.kind) else 3
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
    # A process for each kind: memory is handed back in between.
    rest, status = [a for a in sys.argv[1:] if a != "all"], 0
    for kind in KINDS:
        left = ["--minutes", f"{max(args.until - time.monotonic(), 0) / 60:.3f}"]
        status = subprocess.run([sys.executable, __file__, kind, *rest, *left]).returncode
        if status:
            break
    if status == 2 and not any(args.out.glob("*-*.json")):  # it said why, and there is nothing to report
        return status
    return subprocess.run([sys.executable, __file__, "report", *rest]).returncode or status


if __name__ == "__main__":
    sys.exit(main())
