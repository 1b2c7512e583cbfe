"""What ``bench`` measures: steps in which the pattern is data, timed side by side over the same weights and cache.

Flow: Engine -> Steps (programs and one cache) -> ``measure``: fill the cache to a depth, then time rounds over all patterns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch

from . import model, roofline, sharding
from .engine import chunks
from .eval_measures import overlap_counts
from .parallel import cache_specs
from .pattern import Pattern

DENSE = "dense"  # in place of a Pattern: attend to every token
PROBE = 64  # neighbouring queries of a measurement of overlap


class Steps:
    """Programs over an Engine's weights for ``batch`` sequences of random tokens, and the cache they work on.

    layers: the layers that hold the indexers. The pattern is an argument, so one program serves all of them; ``static``
    compiles each in instead. The cache has room for the tokens of ``reserve``, and for ``room`` at least. profiled: see
    ``dispatch.compiler_options``.
    """

    def __init__(
        self, engine, layers: tuple[int, ...], *, batch: int = 1, seed: int = 0, static=False, room: int = 0, profiled=False
    ):  # fmt: skip
        self.engine, self.config, self.layers, self.batch = engine, engine.config, layers, batch
        self.seed, self.static, self.room, self.profiled = seed, static, room, profiled
        self.compile_seconds, self.cache, self.ids_BT = 0.0, None, None
        self.programs: dict[tuple, jax.stages.Compiled] = {}
        self.latest: dict[tuple, jax.stages.Compiled] = {}

    def reserve(self, tokens: int, cache=None) -> None:
        """A fresh cache for ``tokens`` tokens a sequence (or the one given), and the tokens.

        UserError when memory does not hold it.
        """
        self.cache = None  # the old one goes before the new one comes
        self.cache = self.engine.new_cache(self.batch, max(tokens, self.room)) if cache is None else cache
        self.ids_BT = np.random.default_rng(self.seed).integers(3, self.config.vocab_size, (self.batch, tokens), np.int32)

    def prefill(self, pattern: Pattern | str, start: int, stop: int, chunk: int | None = None):
        """Run tokens start <= t < stop; returns the last chunk's logits, float32 [B,W], under way."""
        logits_BW = None
        for at, size in chunks(start, stop, chunk or self.engine.chunk(self.batch)):
            n = min(size, stop - at)
            ids_BS = np.pad(self.ids_BT[:, at : at + n], ((0, 0), (0, size - n)))
            positions_S = np.where(np.arange(size) < n, at + np.arange(size), -1).astype(np.int32)
            positions_BS = np.broadcast_to(positions_S, ids_BS.shape)
            logits_BW, self.cache = self._run("prefill", pattern, ids_BS, positions_BS)
        return logits_BW

    def decode(self, pattern: Pattern | str, start: int, n: int):
        """Generate ``n`` tokens from position ``start`` on, each the likeliest; returns the last, int32 [B], under way."""
        token_B, position_B = jnp.asarray(self.ids_BT[:, start]), jnp.full(self.batch, start, jnp.int32)
        for _ in range(n):
            token_B, position_B, self.cache = self._run("decode", pattern, token_B, position_B)
        return token_B

    def select(self, pattern: Pattern, start: int, stop: int):
        """What the queries start <= t < stop select, int32 [L,B,S,K], and logits of the last PROBE, float32 [B,PROBE,W].

        All before ``start`` is in the cache.
        """
        positions_BS = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (self.batch, stop - start))
        found, self.cache = self._run("select", pattern, self.ids_BT[:, start:stop], positions_BS)
        return found

    def overlap(self, pattern: Pattern | str, ends: list[int]) -> float | None:
        """The share of its selection that a query has in common with the one before it, mean over full layers and over
        PROBE queries before each of ``ends`` (which the cache holds); None where no query selects."""
        K, shares = self.config.index_topk, []
        for end in ends:
            start = max(end - PROBE, 0)
            if pattern == DENSE or start < K:
                continue
            selected_LBSK, _ = self.select(pattern, start, end)
            for layer in pattern.full_layers:
                a_BSK = selected_LBSK[layer]
                shares.append(float(overlap_counts(a_BSK[:, :-1], a_BSK[:, 1:]).mean()) / a_BSK.shape[-1])
        return statistics.mean(shares) if shares else None

    def slots(self, pattern: Pattern | str) -> np.ndarray:
        """The pattern as data, int32 [L]."""
        if pattern == DENSE:
            return np.full(self.config.num_hidden_layers, -1, np.int32)
        return np.array(pattern.slots(self.layers), np.int32)

    def program(self, kind: str, pattern: Pattern | str) -> jax.stages.Compiled:
        """The program of this kind that ran last with this pattern."""
        return self.latest[kind, self._static(pattern)]

    def memory_gb(self, kind: str, pattern: Pattern | str) -> float | None:
        """Device memory that the program needs at once, weights and cache included, as the compiler planned it."""
        if (m := self.program(kind, pattern).memory_analysis()) is None:
            return None
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return (held + m.temp_size_in_bytes) / 1e9

    def _static(self, pattern):
        """What of the pattern a program is compiled for."""
        return tuple(self.slots(pattern).tolist()) if self.static or pattern == DENSE else None

    def compile(self, kind: str, pattern: Pattern | str, *args) -> jax.stages.Compiled:
        """The program of kind "prefill", "decode" or "select" for these arguments; made when there is none yet."""
        static = self._static(pattern)
        key, slots_L = (kind, static, self.cache.capacity, *(a.shape for a in args)), self.slots(pattern)
        if key not in self.programs:
            options = self.engine.options | dict(dense=pattern == DENSE)
            options |= dict(queries=1 if kind == "decode" else args[0].shape[1])

            def forward(params, slots_L, cache, ids_BS, positions_BS, **more):
                slots = slots_L if static is None else static
                run = model.over_mesh(self.engine.mesh, self.config, slots, self.engine.axes, **options, **more)
                return run(params, ids_BS, positions_BS, cache)

            def prefill(*args):
                out = forward(*args)
                return out.logits, out.cache

            def decode(params, slots_L, cache, token_B, position_B):
                logits_BW, cache = prefill(params, slots_L, cache, token_B[:, None], position_B[:, None])
                return logits_BW.argmax(-1).astype(jnp.int32), position_B + 1, cache

            def select(*args):
                out = forward(*args, keep_selections=True, all_logits=True)
                return (out.selections_LBSK, out.logits[:, -PROBE:]), out.cache

            began = time.perf_counter()
            step = dict(prefill=prefill, decode=decode, select=select)[kind]
            step = jax.jit(step, donate_argnums=2, **self._placed(results=2 if kind == "decode" else 1))
            lowered = step.lower(self.engine.params, slots_L, self.cache, *args)
            self.programs[key] = lowered.compile(dispatch.compiler_options(options["queries"], self.profiled))
            self.compile_seconds += time.perf_counter() - began
        self.latest[kind, static] = self.programs[key]
        return self.programs[key]

    def _placed(self, results: int) -> dict:
        """Shardings of a step over a mesh; what the host gives and takes is on every device."""
        if self.engine.mesh is None:
            return {}
        weights, cache, same = sharding.param_specs(self.engine.axes), cache_specs(self.cache), PartitionSpec()
        specs = dict(in_shardings=(weights, same, cache, same, same), out_shardings=(*(same,) * results, cache))
        return sharding.shardings(self.engine.mesh, specs)

    def _run(self, kind: str, pattern: Pattern | str, *args):
        program = self.compile(kind, pattern, *args)
        return program(self.engine.params, self.slots(pattern), self.cache, *args)


@dataclasses.dataclass
class Row:
    """One pattern in one test; ``seconds`` are the repeats.

    test: "pp" (prefill) or "tg" (decode) of ``tokens`` tokens a sequence behind ``depth`` cached ones. indexer: share of
    the time that full layers cost more than shared ones. limit: seconds at the chip's limits, None for an unknown chip.
    """

    pattern: str
    full: int
    test: str
    tokens: int
    depth: int
    batch: int
    seconds: list[float]
    indexer: float | None = None
    limit: float | None = None
    overlap: float | None = None
    memory_gb: float | None = None
    flops: float = 0.0
    moved: float = 0.0
    gathered: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tps(self) -> float:
        """Median tokens a second, all sequences together."""
        return self.tokens * self.batch / self.median

    @property
    def spread(self) -> float:
        """Half the way from the slowest to the fastest repeat, in tokens a second."""
        return self.tokens * self.batch * (1 / min(self.seconds) - 1 / max(self.seconds)) / 2

    def to_json(self) -> dict:
        more = dict(median_s=self.median, tps=self.tps, tps_spread=self.spread)
        return dataclasses.asdict(self) | more | dict(roofline=self.limit and self.limit / self.median)


def measure(
    steps: Steps, patterns: list[Pattern | str], tests: list[tuple[str, int, int]], *, repeats: int,
    seconds: float = float("inf"), chip: roofline.Chip | None = None, overlap: bool = False,
) -> list[Row]:  # fmt: skip
    """Rows of every test for every pattern, over one cache with room for all; tests are (Row.test, tokens, depth).

    The cache is filled to a test's depth by prefilling it, once for all patterns, with every loaded indexer full. Then
    every program runs once unmeasured, and ``repeats`` rounds over all patterns are timed, so that drift hits all alike; no
    further round of a test begins after ``seconds``.

    The indexer's share comes from what each full layer adds to a step (index keys, scores, selection, plan): the
    difference to the pattern with the fewest full layers, times the full layers, over the step's time. Where no two
    patterns differ in their number, one in which only layer 0 is full joins the rounds.
    """
    n_layers = steps.config.num_hidden_layers
    sparse = [p for p in patterns if p != DENSE]
    counts = {p.n_full for p in sparse}
    extra = [Pattern("F" + "S" * (n_layers - 1))] if len(counts) == 1 and counts != {1} else []
    fullest = Pattern("".join("F" if i in steps.layers else "S" for i in range(n_layers))) if steps.layers else DENSE
    # The fullest comes last: it leaves the cache as a test behind those tokens wants it.
    order = sorted([*patterns, *extra], key=lambda p: p != DENSE and p.n_full)
    # The chunk of a timed prefill serves for filling too, unless it is small: one program less.
    chunk = min([steps.engine.chunk(steps.batch), *(n for test, n, _ in tests if test == "pp" and n >= 256)])
    rows, filled = [], 0
    steps.reserve(max(depth + n for _, n, depth in tests))
    _compile(steps, order, tests, chunk, overlap)
    for test, tokens, depth in tests:
        if filled != depth:
            jax.block_until_ready(steps.prefill(fullest, 0, depth, chunk) if depth else None)
        filled = depth
        if test == "pp":
            run = functools.partial(steps.prefill, start=depth, stop=depth + tokens)
            last = list(chunks(depth, depth + tokens, steps.engine.chunk(steps.batch)))[-2:]
            warm = functools.partial(run, start=last[0][0])
            ends = np.linspace(depth, depth + tokens, 5).astype(int)[1:].tolist()
            filled += tokens if order[-1] == fullest else 0
        else:
            run, ends = functools.partial(steps.decode, start=depth, n=tokens), [depth]
            warm = functools.partial(run, n=1)
        for pattern in order:
            jax.block_until_ready(warm(pattern))
        measure_overlap = (lambda p, ends=ends: p in patterns and steps.overlap(p, ends)) if overlap else None
        times, shares = _timed(run, order, repeats, seconds, measure_overlap)
        found = [_row(steps, p, test, tokens, depth, times[p], shares.get(p), chip) for p in patterns]
        _indexer_shares(found, times[extra[0]] if extra else None)
        rows += found
    return rows


def _compile(steps: Steps, patterns: list, tests: list, chunk: int, overlap: bool) -> None:
    """The programs that ``measure`` will run, compiled side by side; on a CPU, which one fills, one after another."""
    calls = {}  # (kind, what of the pattern is compiled in, tokens a sequence): a pattern
    for test, tokens, depth in tests:
        fill = {size for _, size in chunks(0, depth, chunk)}
        calls |= {("prefill", steps._static(patterns[-1]), size): patterns[-1] for size in fill}
        for p in patterns:
            whole = chunks(depth, depth + tokens, steps.engine.chunk(steps.batch))
            own = {size for _, size in whole} if test == "pp" else {1}
            calls |= {("prefill" if test == "pp" else "decode", steps._static(p), size): p for size in own}
            if overlap and p != DENSE and depth + tokens - PROBE >= steps.config.index_topk:
                calls["select", steps._static(p), PROBE] = p
    spec = lambda *shape: (jax.ShapeDtypeStruct((steps.batch, *shape), jnp.int32),) * 2
    began, before = time.perf_counter(), steps.compile_seconds
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else None) as pool:
        jobs = [
            pool.submit(steps.compile, kind, p, *(spec() if kind == "decode" else spec(size)))
            for (kind, _, size), p in calls.items()
        ]
        for job in jobs:
            job.result()
    steps.compile_seconds = before + time.perf_counter() - began


def _timed(run: Callable, patterns: list, repeats: int, seconds: float, after: Callable | None) -> tuple[dict, dict]:
    """({pattern: seconds of every repeat of ``run(pattern)``}, {pattern: ``after(pattern)``, called after its first})."""
    times, found, start = {p: [] for p in patterns}, {}, time.perf_counter()
    for i in range(repeats):
        if i and time.perf_counter() - start > seconds:
            break
        for pattern in patterns:
            with _no_collection():
                began = time.perf_counter()
                jax.block_until_ready(run(pattern))
                times[pattern].append(time.perf_counter() - began)
            if after and not i:
                found[pattern] = after(pattern)
    return times, found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Within it, Python collects no garbage: a tenth of a second once JAX has traced a model."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _indexer_shares(rows: list[Row], base_seconds: list[float] | None) -> None:
    """Fill in ``Row.indexer``; see ``measure``. base_seconds: repeats of a pattern of one full layer.

    Where full layers took no longer than shared ones, noise is larger than what they cost: None.
    """
    medians = {row.full: row.median for row in rows if row.full}
    if base_seconds:
        medians[1] = statistics.median(base_seconds)
    if len(medians) < 2:
        return
    least, most = min(medians), max(medians)
    for row in rows:
        if row.full:
            full, median = (row.full, row.median) if row.full > least else (most, medians[most])
            share = row.full * (median - medians[least]) / (full - least) / row.median
            row.indexer = share if share >= 0 else None


def _row(steps: Steps, pattern, test: str, tokens: int, depth: int, times: list[float], shared, chip) -> Row:
    work = work_of(steps, pattern, test, tokens, depth)
    sum_ = lambda field: float(sum(getattr(p, field) for p in work.values()))
    return Row(
        str(pattern), 0 if pattern == DENSE else pattern.n_full, test, tokens, depth, steps.batch, times,
        limit=roofline.seconds(work, chip) if chip else None, overlap=shared,
        memory_gb=steps.memory_gb("prefill" if test == "pp" else "decode", pattern),
        flops=sum_("flops"), moved=sum_("moved"), gathered=sum_("gathered"),
    )  # fmt: skip


def work_of(steps: Steps, pattern, test: str, tokens: int, depth: int) -> dict[str, roofline.Part]:
    """The roofline's Parts of a test: the sum over its chunks, or over its decode steps."""
    engine, stop = steps.engine, depth + tokens
    calls = chunks(depth, stop, engine.chunk(steps.batch)) if test == "pp" else ((at, 1) for at in range(depth, stop))
    sizes = dict(
        batch=steps.batch, itemsize=jnp.dtype(engine.dtype).itemsize,
        index_itemsize=jnp.dtype(engine.index_dtype or engine.dtype).itemsize,
    )  # fmt: skip
    sparse = None if pattern == DENSE else pattern
    return roofline.total(roofline.step(steps.config, sparse, min(n, stop - at), at, **sizes) for at, n in calls)
