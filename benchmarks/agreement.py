"""The correctness check of e2e.py: the same weights and prompt through the reference and through the kernels."""

from __future__ import annotations

import copy

import numpy as np

from ic_jax.bench_measure import PROBE, Steps
from ic_jax.eval_measures import overlap_counts


def compare(engine, pattern, tokens: int, index_dtype: str, seed: int = 0, generate: int = 8) -> dict:
    """How far ``auto`` is from ``reference``: shares of selections and rows that agree, logits, and greedy tokens.

    Selections of PROBE queries before each quarter of the prompt, in every full layer of ``pattern``. They differ where
    scores lie within rounding of the k-th one; deeper layers see inputs that differ by as much.
    """
    found = {}
    for implementation in ("reference", "auto"):
        each = copy.copy(engine)
        each.index_dtype, each.options = index_dtype, engine.options | dict(implementation=implementation)
        steps = Steps(each, tuple(range(engine.config.num_hidden_layers)), seed=seed)
        steps.reserve(tokens + generate)
        logits_BW = np.asarray(steps.prefill(pattern, 0, tokens))
        selected = [steps.select(pattern, end - PROBE, end) for end in np.linspace(0, tokens, 5).astype(int)[1:].tolist()]
        # A token a call, so that every one of them can be compared.
        made = [int(steps.decode(pattern, tokens, n)[0]) for n in range(1, generate + 1)]
        found[implementation] = logits_BW, selected, made
    (logits_a, selected_a, tokens_a), (logits_b, selected_b, tokens_b) = found["reference"], found["auto"]
    shared, same = [], []
    for a, b in zip(selected_a, selected_b, strict=True):
        for layer in pattern.full_layers:
            counts = np.maximum(np.asarray((a[layer] >= 0).sum(-1)), 1)
            shared.append((np.asarray(overlap_counts(a[layer], b[layer])) / counts).mean())
            same.append(np.asarray((a[layer] == b[layer]).all(-1)).mean())
    difference = np.abs(logits_a - logits_b)
    return dict(
        selections_shared=float(np.mean(shared)), rows_identical=float(np.mean(same)),
        mean_logit_difference=float(difference.mean()), largest_logit_difference=float(difference.max()),
        logit_std=float(logits_a.std()), same_tokens=tokens_a == tokens_b, generated=generate,
    )  # fmt: skip
