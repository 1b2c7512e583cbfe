"""The saturated case of e2e.py: decode with as many sequences as memory holds."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax import lax

from ic_jax import cache as caches
from ic_jax.bench_measure import Steps

SPARE = 0.02  # of memory, left to fragmentation and to what XLA keeps for itself


def decode(engine, pattern, tokens: int, n: int, repeats: int, limit: int | None = None, seed: int = 0) -> dict:
    """Tokens a second of ``n`` decode steps behind ``tokens`` tokens, all sequences together, and what fills memory.

    One sequence is really prefilled; the others get copies of its rows in memory of their own, and other tokens. Program
    memory is taken from the compiler. limit: bytes to fill, None for the device's.
    """
    layers = tuple(i for i, kind in enumerate(pattern.layers) if kind == "F")
    if limit is None:
        limit = jax.local_devices()[0].memory_stats()["bytes_limit"]
    weights = sum(a.nbytes for a in jax.tree.leaves(engine.params))
    pages = caches.pages_for(tokens + n)
    token_bytes = caches.bytes_per_token(engine.config, pattern.n_full, engine.dtype, engine.index_dtype)
    sequence = pages * caches.PAGE_SIZE * token_bytes
    room = int(limit * (1 - SPARE)) - weights
    batch, scratch = room // sequence, 0
    while batch > 0:
        scratch = _scratch(engine, pattern, layers, pages, batch)
        if (excess := batch * sequence + scratch - room) <= 0:
            break
        batch -= -(-excess // sequence)
    if batch < 1:
        held = f"{weights / 1e9:.1f} GB of weights"
        raise SystemExit(f"error: {limit / 1e9:.1f} GB hold no sequence of {tokens} tokens beside {held}")
    steps = _filled(engine, pattern, layers, pages, batch, tokens, seed)
    jax.block_until_ready(steps.decode(pattern, tokens, n))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(steps.decode(pattern, tokens, n))
        seconds.append(time.perf_counter() - began)
    return dict(
        pattern=str(pattern), full=pattern.n_full, batch=batch, generate=n, seconds=seconds,
        tps=batch * n / statistics.median(seconds), limit_gb=limit / 1e9, weights_gb=weights / 1e9,
        bytes_per_token=token_bytes, pool_tokens=(room - scratch) // token_bytes,
    )  # fmt: skip


def _allocate(engine, slots: int, pages: int, batch: int):
    kinds = dict(dtype=engine.dtype, index_dtype=engine.index_dtype)
    return caches.allocate(engine.config, slots, batch, pages * caches.PAGE_SIZE, **kinds)


def _scratch(engine, pattern, layers, pages: int, batch: int) -> int:
    """Bytes that a decode step, or a chunk of the prefill before it, needs beside weights and caches."""
    cache = jax.eval_shape(lambda: _allocate(engine, pattern.n_full, pages, batch))

    def needs(kind: str, rows: int, *shape: int) -> int:
        steps = Steps(engine, layers, batch=rows)
        steps.cache = cache.replace(page_table_BP=jax.ShapeDtypeStruct((rows, pages), jnp.int32))
        m = steps.compile(kind, pattern, *(jax.ShapeDtypeStruct((rows, *shape), jnp.int32),) * 2).memory_analysis()
        return m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes

    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else None) as pool:  # compiled side by side
        jobs = pool.submit(needs, "decode", batch), pool.submit(needs, "prefill", 1, engine.prefill_chunk)
        return max(job.result() for job in jobs)


def _filled(engine, pattern, layers, pages: int, batch: int, tokens: int, seed: int) -> Steps:
    """Steps of ``batch`` sequences whose cache is full to ``tokens``."""
    cache = jax.jit(lambda: _allocate(engine, pattern.n_full, pages, batch))()
    table_BP = cache.page_table_BP
    one = Steps(engine, layers, seed=seed)
    one.reserve(tokens, cache.replace(page_table_BP=table_BP[:1]))
    one.prefill(pattern, 0, tokens)
    steps = Steps(engine, layers, batch=batch, seed=seed + 1)
    steps.reserve(tokens + 1, _spread(one.cache.replace(page_table_BP=table_BP), batch))
    return steps


def _spread_pool(pool, batch: int):
    """The rows of the first sequence copied to all others, a layer at a time; pool [layers, rows, ...]."""
    rows, layers = pool.shape[1] // batch, pool.shape[0]

    def copy(i, pool):
        layer, b = i % layers, 1 + i // layers
        rest = (0,) * (pool.ndim - 2)
        part = lax.dynamic_slice(pool, (layer, 0, *rest), (1, rows, *pool.shape[2:]))
        return lax.dynamic_update_slice(pool, part, (layer, b * rows, *rest))

    return lax.fori_loop(0, layers * (batch - 1), copy, pool)


def _spread(cache, batch: int):
    pools = ("latent_LMU", "index_keys_GMJ", "index_scales_GM")
    spread = jax.jit(_spread_pool, static_argnums=1, donate_argnums=0)
    made = {name: spread(pool, batch) for name in pools if (pool := getattr(cache, name)) is not None}
    return cache.replace(**made)
