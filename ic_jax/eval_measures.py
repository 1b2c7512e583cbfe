"""What ``eval`` measures, as functions of a loaded model: perplexity, recall grids, overlap of selections, audit.

The model is loaded with every indexer its checkpoint holds; ``lm.pattern`` (all of them full) is the reference, and
other patterns are data for the same programs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from . import calibration, needle
from .calibration import Runner
from .errors import UserError, not_finite
from .pattern import Pattern

DENSE = "dense"  # in place of a Pattern: attend to every token
Report = Callable[[int, int, str], None]


def slots_of(lm, pattern: Pattern) -> np.ndarray:
    """A pattern as data for ``lm``'s parameters: int32 [L]."""
    return np.array(pattern.slots(lm.pattern.full_layers), np.int32)


class _Runs:
    """Final States of patterns, over one Runner for all of them and one for dense attention."""

    def __init__(self, lm, seq_len: int):
        self.lm = lm
        self.sparse = Runner(lm.engine, seq_len) if lm.pattern else None
        self.dense = Runner(lm.engine, seq_len, dense=True)

    def __call__(self, pattern: Pattern | str, ids_BS):
        runner = self.dense if pattern == DENSE else self.sparse
        n = self.lm.config.num_hidden_layers
        slots = np.full(n, -1, np.int32) if pattern == DENSE else slots_of(self.lm, pattern)
        return runner.advance(runner.begin(ids_BS), slots)


def perplexity(
    lm,
    ids_NT: np.ndarray,
    patterns: dict[str, Pattern | str],
    *,
    batch: int | None = None,
    against=None,
    report: Report | None = None,
) -> list[dict]:
    """One dict a pattern: loss (nats a token) and ppl with standard errors over tokens, their running values, and
    against the reference (all full; dense without an indexer) dloss, dppl, mean KL(reference || pattern), same top-1.

    against: the LM that is the reference, with all it has full; ``lm`` itself by default. Raises UserError when a loss
    is not a number.
    """
    seq_len = ids_NT.shape[1] - 1
    against = against or lm
    runs, reference, params = _Runs(lm, seq_len), against.pattern or DENSE, against.engine.params
    reference_runs = runs if against is lm else _Runs(against, seq_len)
    chunks = list(calibration.batches(ids_NT, calibration.batch_size(seq_len, len(ids_NT), batch)))
    found: dict[str, list] = {name: [] for name in patterns}
    base = []
    for b, (ids, n) in enumerate(chunks):
        full = reference_runs(reference, ids[:, :-1])
        base.append(np.asarray(reference_runs.dense.token_losses(full, ids[:, 1:])["loss"])[:n])
        for i, (name, pattern) in enumerate(patterns.items()):
            state = full if against is lm and pattern == reference else runs(pattern, ids[:, :-1])
            out = runs.dense.token_losses(state, ids[:, 1:], full, params)
            found[name].append({k: np.asarray(v)[:n] for k, v in out.items()})
            if report:
                report(b * len(patterns) + i + 1, len(chunks) * len(patterns), "")
    base_NS = np.concatenate(base).astype(np.float64)
    return [
        _summary(name, patterns[name], {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, base_NS)
        for name, parts in found.items()
    ]


def _summary(name: str, pattern: Pattern | str, tokens: dict, base_NS: np.ndarray) -> dict:
    loss_NS = tokens["loss"].astype(np.float64)
    if not np.isfinite(loss_NS).all():
        raise UserError(f"the loss of {name} is not a number on sequence {int(np.argmin(np.isfinite(loss_NS).all(1)))}")
    error = lambda a: float(a.std(ddof=1) / np.sqrt(a.size))
    loss, running = float(loss_NS.mean()), np.cumsum(loss_NS.mean(1)) / np.arange(1, len(loss_NS) + 1)
    difference_NS = loss_NS - base_NS
    return dict(
        name=name, pattern=str(pattern), full=0 if pattern == DENSE else pattern.n_full, tokens=loss_NS.size,
        loss=loss, loss_error=error(loss_NS), ppl=float(np.exp(loss)), ppl_error=float(np.exp(loss)) * error(loss_NS),
        running=np.exp(running).tolist(), dloss=float(difference_NS.mean()), dloss_error=error(difference_NS),
        dppl=float(np.exp(loss) - np.exp(base_NS.mean())), kl=float(tokens["kl"].mean(dtype=np.float64)),
        same_top1=float(tokens["same"].mean(dtype=np.float64)), top1=float(tokens["top1"].mean(dtype=np.float64)),
    )  # fmt: skip


def recall(
    lm, patterns: dict[str, Pattern | str], *, lengths, depths, keys, trials: int = 4, seed: int = 0,
    filler: str | None = None, batch: int | None = None, report: Report | None = None,
) -> list[dict]:  # fmt: skip
    """Share of answers found, one dict for each pattern, number of keys, length and depth; see ``needle``.

    Raises UserError when a length exceeds the context or does not hold the facts, and for logits that are not finite.
    """
    if too_long := [n for n in lengths if n > lm.max_context]:
        raise UserError(f"--lengths {too_long[0]}: the context holds {lm.max_context}")
    if bad := [d for d in depths if not 0 <= d <= 1]:
        raise UserError(f"--depths must lie in 0..1, not {bad[0]:g}")
    text = lm.tokenizer.encode(needle.FILLER if filler is None else filler, add_special_tokens=False)
    if not text:
        raise UserError("--text has no tokens to hide the facts in")
    made = {
        (n, k): needle.rows(lm.tokenizer, n, depths, k, trials, seed, text) for n in lengths for k in keys
    }  # before anything runs, so that what does not fit is said at once
    out, done = [], 0
    for length in lengths:
        runs = _Runs(lm, length)
        for k in keys:
            ids_NT, answer_NS, depth_N = made[length, k]
            size = calibration.batch_size(length, len(ids_NT), batch)
            for name, pattern in patterns.items():
                hits = []
                for ids, n in calibration.batches(np.hstack([ids_NT, answer_NS]), size):
                    ids, answer = ids[:, : length + 1], ids[:, length + 1 :] > 0
                    losses = runs.dense.token_losses(runs(pattern, ids[:, :-1]), ids[:, 1:])
                    if not np.isfinite(losses["loss"]).all():
                        raise not_finite(f"{name} on prompts of {length} tokens")
                    hits.append(((np.asarray(losses["top1"]) > 0) | ~answer).all(1)[:n])
                hits_N, done = np.concatenate(hits), done + 1
                for depth in depths:
                    found = float(hits_N[depth_N == depth].mean())
                    out.append(dict(name=name, pattern=str(pattern), keys=k, length=length, depth=depth, recall=found))
                if report:
                    report(done, len(lengths) * len(keys) * len(patterns), "")
    return out


@jax.jit
def overlap_counts(a_BSK, b_BSK):
    """int32 [B,S]: how many positions two selections share (-1 is none; positions of one selection are distinct)."""
    both = jnp.sort(jnp.concatenate([a_BSK, b_BSK], -1), -1)
    return ((both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)).sum(-1, dtype=jnp.int32)


def overlap(lm, ids_NT: np.ndarray, *, batch: int = 1, report: Report | None = None) -> tuple[list[int], np.ndarray]:
    """(full layers, float64 [G,G]): the share of positions that two layers' own selections have in common, mean over
    the queries that see more than top-k tokens, every layer full."""
    layers, K = lm.pattern.full_layers, lm.config.index_topk
    runner, slots = Runner(lm.engine, ids_NT.shape[1] - 1), slots_of(lm, lm.pattern)
    chunks = list(calibration.batches(ids_NT, min(batch, len(ids_NT))))
    total = np.zeros((len(layers), len(layers)))
    for b, (ids, n) in enumerate(chunks):
        state, chosen = runner.begin(ids[:, :-1]), []
        for layer in range(runner.n_layers):
            state = runner.advance(state, slots, layer, layer + 1)
            if layer in layers:
                chosen.append(state.positions_BSK[:n, K:])
        for i in range(len(layers)):
            for j in range(i + 1):
                total[i, j] = total[j, i] = total[i, j] + float(overlap_counts(chosen[i], chosen[j]).mean()) / K * n
        if report:
            report(b + 1, len(chunks), "")
    return list(layers), total / len(ids_NT)


def audit(lm, ids_BT: np.ndarray, pattern: Pattern, report: Report | None = None) -> tuple[list[dict], list[str]]:
    """(one dict a layer, problems found) of running ``pattern`` on a short text, layer by layer.

    selected: positions of the last query. overlap: for a full layer with the selection before it, for a shared one of
    what it reuses with what its own indexer would choose. fp8_recall: share of a selection that FP8 index keys find
    too. Last two over the queries that see more than top-k tokens; None where there is nothing to compare.
    """
    held, K, S = lm.pattern.full_layers, lm.config.index_topk, ids_BT.shape[1] - 1
    runner, fp8 = Runner(lm.engine, S), Runner(lm.engine, S, index_dtype=jnp.float8_e4m3fn)
    slots, own_slots = slots_of(lm, pattern), slots_of(lm, lm.pattern)
    share = lambda a, b: float(overlap_counts(a.positions_BSK[:, K:], b.positions_BSK[:, K:]).mean()) / K
    state, out, problems, visible = runner.begin(ids_BT[:, :-1]), [], [], np.arange(S)[None]
    for layer, kind in enumerate(pattern.layers):
        after = runner.advance(state, slots, layer, layer + 1)
        own = after if kind == "F" else runner.advance(state, own_slots, layer, layer + 1) if layer in held else None
        row = dict(
            layer=layer, kind=kind, source=pattern.source[layer], weights=layer in held, selected=0, overlap=None,
            fp8_recall=None, x_rms=float(jnp.sqrt(jnp.mean(jnp.square(after.x_BSD.astype(jnp.float32))))),
        )  # fmt: skip
        chosen = np.asarray(after.positions_BSK)
        row["selected"] = int((chosen[:, -1] >= 0).sum(-1).min())
        if layer and own is not None:
            row["overlap"] = share(own, state)
        if own is not None:
            row["fp8_recall"] = share(own, fp8.advance(state, own_slots, layer, layer + 1))
        problems += [f"layer {layer}: {p}" for p in _problems(row, chosen, visible, K, _weights(lm, held, layer))]
        if kind == "S" and not np.array_equal(chosen, np.asarray(state.positions_BSK)):
            problems.append(f"layer {layer}: is shared, yet its selection is not that of layer {row['source']}")
        out.append(row)
        state = after
        if report:
            report(layer + 1, len(pattern.layers), "")
    return out, problems


def _weights(lm, held, layer: int) -> dict:
    return {k: v[held.index(layer)] for k, v in lm.engine.params["indexer"].items()} if layer in held else {}


def _problems(row: dict, chosen_BSK, visible_1S, K: int, weights: dict):
    """What is wrong with one layer of an audit."""
    for name, value in weights.items():
        if not bool(jnp.isfinite(value).all()):
            yield f"indexer weight {name} holds values that are not finite"
        elif name != "k_norm_bias" and not bool(jnp.any(value)):
            yield f"indexer weight {name} is all zero"
    if not np.isfinite(row["x_rms"]):
        yield "its output is not finite"
    counts = (chosen_BSK >= 0).sum(-1)
    if not (counts == np.minimum(visible_1S + 1, K)).all():
        yield f"selects {counts.min()} to {counts.max()} positions, not min(visible, {K})"
    if (chosen_BSK > visible_1S[..., None]).any():
        yield "selects positions that lie in the future"
    if (np.diff(chosen_BSK, axis=-1)[chosen_BSK[..., 1:] >= 0] <= 0).any():
        yield "its positions are not ascending and distinct"
