"""The correctness check of e2e.py: the same weights and prompt through the reference and through the kernels."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from ic_jax.bench_measure import Steps
from ic_jax.eval_measures import overlap_counts


def compare(engine, pattern, tokens: int, index_dtype: str, seed: int = 0, generate: int = 8) -> dict:
    """How far ``auto`` is from ``reference``: shares of selections and rows that agree, logits, and greedy tokens.

    Selections of every query that sees more than top-k tokens, in every full layer of ``pattern``. They differ where
    scores lie within rounding of the k-th one; deeper layers see inputs that differ by as much.
    """
    runs = {}
    for implementation in ("reference", "auto"):
        each = copy.copy(engine)
        each.index_dtype, each.options = index_dtype, engine.options | dict(implementation=implementation)
        runs[implementation] = Steps(each, tuple(range(engine.config.num_hidden_layers)), seed=seed)
        runs[implementation].reserve(tokens + generate)
    size = min(tokens, engine.prefill_chunk)
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else None) as pool:  # compiled side by side
        spec = lambda *shape: (jax.ShapeDtypeStruct((1, *shape), jnp.int32),) * 2
        shapes = {"select": spec(size), "decode": spec()}
        jobs = [pool.submit(r.compile, kind, pattern, *args) for r in runs.values() for kind, args in shapes.items()]
        for job in jobs:
            job.result()
    found = {}
    for implementation, steps in runs.items():
        parts = [steps.select(pattern, at, min(at + size, tokens)) for at in range(0, tokens, size)]
        selected_LBSK = np.concatenate([selected for selected, _ in parts], 2)
        # A token a call, so that every one of them can be compared.
        made = [int(steps.decode(pattern, tokens, n)[0]) for n in range(1, generate + 1)]
        found[implementation] = np.asarray(parts[-1][1]), selected_LBSK, made
    (logits_a, selected_a, tokens_a), (logits_b, selected_b, tokens_b) = found["reference"], found["auto"]
    K, shared, same = engine.config.index_topk, [], []
    for layer in pattern.full_layers:
        a, b = (s[layer][:, K if tokens > K else 0 :] for s in (selected_a, selected_b))
        counts = np.maximum((a >= 0).sum(-1), 1)
        shared.append((np.asarray(overlap_counts(a, b)) / counts).mean())
        same.append((a == b).all(-1).mean())
    difference = np.abs(logits_a - logits_b)
    return dict(
        selections_shared=float(np.mean(shared)), rows_identical=float(np.mean(same)),
        mean_logit_difference=float(difference.mean()), largest_logit_difference=float(difference.max()),
        logit_std=float(logits_a.std()), same_tokens=tokens_a == tokens_b, generated=generate,
    )  # fmt: skip
