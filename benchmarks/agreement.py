"""The correctness check of e2e.py: kernels and reference on the same weights and prompt, and both against float32."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from ic_jax.bench_measure import PROBE, Steps
from ic_jax.eval_measures import overlap_counts

RUNS = ("float32", "reference", "kernels")


def compare(engine, pattern, tokens: int, index_dtype: str, seed: int = 0, generate: int = 16) -> list[dict]:
    """How far RUNS are from each other, a row for a prompt of ``tokens`` and one for ``generate`` decode steps behind it.

    The steps read the prompt's own next tokens, so that all runs see the same. "float32" is the reference with weights and
    caches in float32 (fp8 index keys stay fp8): what either of the others is off it is the rounding of bfloat16.
    Selections: the share in common, mean over the full layers and over queries that see more than top-k tokens. Logits:
    root mean square difference over the standard deviation, of the last PROBE tokens of the prompt, or of every step.
    """
    runs = {name: _steps(engine, name, index_dtype, seed) for name in RUNS}
    for steps in runs.values():
        steps.reserve(tokens + generate)
    size = min(tokens, engine.prefill_chunk)
    with ThreadPoolExecutor(1 if jax.default_backend() == "cpu" else None) as pool:  # compiled side by side
        spec = lambda n: (jax.ShapeDtypeStruct((1, n), jnp.int32),) * 2
        jobs = [pool.submit(_compile, name, runs[name], pattern, *spec(n)) for name in RUNS for n in (size, 1)]
        for job in jobs:
            job.result()
    found = {name: _run(steps, pattern, tokens, size, generate) for name, steps in runs.items()}
    K, rows = engine.config.index_topk, []
    for i, (step, queries) in enumerate((("prefill", tokens), ("decode", generate))):
        row = dict(index_dtype=index_dtype, step=step, queries=queries, logit_std=float(found["float32"][i][1].std()))
        for a, b in itertools.combinations(RUNS, 2):
            (selected_a, logits_a), (selected_b, logits_b) = found[a][i], found[b][i]
            skipped = K if i == 0 and tokens > K else 0
            shares = []
            for layer in pattern.full_layers:
                one, other = (s[layer][:, skipped:] for s in (selected_a, selected_b))
                shares.append((np.asarray(overlap_counts(one, other)) / np.maximum((one >= 0).sum(-1), 1)).mean())
            off = np.sqrt(np.square(logits_a - logits_b).mean()) / row["logit_std"]
            top1 = (logits_a.argmax(-1) == logits_b.argmax(-1)).mean()
            row[f"{a}, {b}"] = dict(selections=float(np.mean(shares)), logits=float(off), top1=float(top1))
        rows.append(row)
    return rows


def _steps(engine, name: str, index_dtype: str, seed: int) -> Steps:
    run = copy.copy(engine)
    run.index_dtype = index_dtype
    run.options = engine.options | dict(implementation="auto" if name == "kernels" else "reference")
    if name == "float32":
        run.params, run.dtype = jax.tree.map(lambda a: a.astype(jnp.float32), engine.params), jnp.dtype("float32")
        run.index_dtype = index_dtype if index_dtype.startswith("float8") else "float32"
    return Steps(run, tuple(range(engine.config.num_hidden_layers)), seed=seed)


def _compile(name: str, steps: Steps, *args) -> None:
    with jax.default_matmul_precision("highest" if name == "float32" else None):
        steps.compile("select", *args)


def _run(steps: Steps, pattern, tokens: int, size: int, generate: int) -> list[tuple]:
    """(selections [L,B,S,K], logits [...,W]) of the prompt, and of the steps behind it, on the host."""
    calls = [(at, min(at + size, tokens)) for at in range(0, tokens, size)]
    prompt = [jax.device_get(steps.select(pattern, *call)) for call in calls]
    after = [jax.device_get(steps.select(pattern, at, at + 1)) for at in range(tokens, tokens + generate)]
    joined = [np.concatenate([selected for selected, _ in parts], 2) for parts in (prompt, after)]
    return [(joined[0], prompt[-1][1][:, -PROBE:]), (joined[1], np.concatenate([logits for _, logits in after], 1))]
