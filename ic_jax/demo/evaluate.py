"""What the demo model is worth: held-out loss beside unigram and bigram models, recall by distance, shared patterns."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import jax
import numpy as np
import optax

from ..config import Config
from ..pattern import Pattern
from . import corpus
from .train import train_forward

DISTANCES = (32, 64, 128, 256, 512, 768, 960)
SAMPLE = 8  # held-out windows that travel with the tests


class Ngrams:
    """Unigram (add-one) and bigram (interpolated absolute discounting over it) models of a token stream."""

    def __init__(self, tokens_T, vocabulary: int, discount: float = 0.75):
        tokens_T = tokens_T.astype(np.int64)
        counts = np.bincount(tokens_T, minlength=vocabulary)
        self.unigram_W = (counts + 1) / (counts.sum() + vocabulary)
        pairs = np.bincount(tokens_T[:-1] * vocabulary + tokens_T[1:], minlength=vocabulary**2)
        self.pairs = pairs.reshape(vocabulary, vocabulary).astype(np.float32)
        total = np.maximum(self.pairs.sum(1), 1e-9)
        self.total_W, self.back_W = total, np.where(total < 1, 1.0, discount * (self.pairs > 0).sum(1) / total)
        self.discount = discount

    def losses(self, rows_NS):
        """(unigram, bigram) mean nats a token over rows' tokens but the first."""
        before, after = rows_NS[:, :-1].astype(np.int64), rows_NS[:, 1:].astype(np.int64)
        kept = np.maximum(self.pairs[before, after] - self.discount, 0) / self.total_W[before]
        bigram = kept + self.back_W[before] * self.unigram_W[after]
        return float(-np.log(self.unigram_W[after]).mean()), float(-np.log(bigram).mean())


def probes(tokenizer, text_T, distance: int, n: int, length: int, seed: int):
    """Recall rows [n, length+1] that ask for one fact each, ``distance`` tokens back (ids with their ANSWER bits)."""
    recall = corpus.Recall(tokenizer, text_T, seed + distance)
    rows = np.zeros((n, length + 1), np.uint16)
    for row in rows:
        ids = recall.probe(min(distance, length - 60), length)
        row[: len(ids)] = ids[: length + 1]
    return rows


def exact(predicted_NS, rows):
    """Share of rows whose answer tokens (their end excluded) are all predicted."""
    answer = (rows[:, 1:] & corpus.ANSWER) > 0
    target = rows[:, 1:] & (corpus.ANSWER - 1)
    return float(((predicted_NS == target) | ~answer | (target == 0)).all(1).mean())


def make_predict(c: Config, sparse: bool):
    """A program (params, ids [B,S+1], slots [L]) -> nats of every token after the first and its prediction, [B,S]."""

    @jax.jit
    def predict(params, ids, slots):
        logits, _ = train_forward(params, c, ids[:, :-1], slots=slots, sparse=sparse, index_loss=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]), logits.argmax(-1)

    return predict


def evaluate(predict: dict, params, c: Config, data: Path, out: Path, run: dict) -> dict:
    """Writes evaluation.json, report.md and heldout_sample.npz into ``out``; returns the numbers.

    ``predict[sparse]`` is ``make_predict``, compiled for batches of ``run["batch"]`` rows of ``run["context"]`` tokens.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    held_T, text_T, S = np.load(data / "heldout.npy"), np.load(data / "text.npy"), run["context"]
    batch = run["batch"]
    about = json.loads((data / "corpus.json").read_text())
    n = (len(held_T) - 1) // S
    held_NS = np.stack([held_T[i * S : (i + 1) * S + 1] for i in range(n)])
    token_bytes = np.array([len(tokenizer.decode([i]).encode()) for i in range(c.vocab_size)])
    per_token = token_bytes[held_NS[:, 1:]].mean()

    def over(rows, slots, sparse):
        rows = (rows & (corpus.ANSWER - 1)).astype(np.int32)
        padded = np.pad(rows, ((0, -len(rows) % batch), (0, 0)))
        parts = [predict[sparse](params, padded[i : i + batch], slots) for i in range(0, len(padded), batch)]
        return tuple(np.concatenate([np.asarray(p[k]) for p in parts])[: len(rows)] for k in (0, 1))

    L = c.num_hidden_layers
    slots = lambda pattern: np.array(pattern.slots(range(L)), np.int32)
    modes = {"dense attention": (slots(Pattern.all_full(L)), False)}
    modes |= {"all full": (slots(Pattern.all_full(L)), True)}
    modes |= {f"uniform:{k}": (slots(Pattern.uniform(L, k)), True) for k in (2, 4, 8) if k < L}
    reach = [d for d in DISTANCES if d + 60 <= S]
    asked = {d: probes(tokenizer, held_T, d, 64, S, seed=5) for d in reach}
    ngrams = Ngrams(text_T, c.vocab_size)
    sample = held_NS[np.linspace(0, n - 1, SAMPLE).astype(int)]
    losses, recalls, sampled = {}, {}, {}
    for name, mode in modes.items():
        losses[name] = float(over(held_NS, *mode)[0].mean())
        sampled[name] = float(over(sample, *mode)[0].mean())
        recalls[name] = {d: exact(over(rows, *mode)[1], rows) for d, rows in asked.items()}
    losses["unigram"], losses["bigram"] = ngrams.losses(held_NS)
    sampled["unigram"], sampled["bigram"] = ngrams.losses(sample)
    result = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "python": platform.python_version(), "run": run,
        "heldout nats per token": losses, "heldout bytes per token": float(per_token),
        "sample nats per token": sampled, "recall by distance": recalls, "corpus": about,
        "parameters": sum(a.size for a in jax.tree.leaves(params)),
    }  # fmt: skip
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = np.concatenate([asked[d][:2] for d in reach[len(reach) // 2 :]])
    np.savez_compressed(out / "heldout_sample.npz", text=sample, recall=rows)
    (out / "report.md").write_text(report(result, L))
    print((out / "report.md").read_text(), flush=True)
    return result


def report(r: dict, layers: int) -> str:
    """The numbers as markdown for people, then one JSON line."""
    run, reach = r["run"], list(next(iter(r["recall by distance"].values())))
    lines = [
        "# Training of the demo model", "",
        f"{r['device']}, jax {r['jax']}, Python {r['python']}; {r['parameters'] / 1e6:.2f} M parameters, {layers} "
        f"layers; {run['steps']} steps of {run['batch']} x {run['context']} tokens, {run['tokens'] / 1e6:.1f} M tokens "
        f"in {run['seconds training']} s, compilation {run['seconds compiling']} s. Held-out text: every 50th "
        f"document; {r['heldout bytes per token']:.3f} bytes a token. Recall: share of questions answered exactly, by "
        "the distance in tokens to the fact; 64 rows a cell, context full. Patterns are applied training-free.", "",
        "| model | nats/token | nats/byte | " + " | ".join(f"recall {d}" for d in reach) + " |",
        "|" + "---|" * (3 + len(reach)),
    ]  # fmt: skip
    for name, loss in r["heldout nats per token"].items():
        recall = [f"{v:.2f}" for v in r["recall by distance"].get(name, {}).values()] or [""] * len(reach)
        lines.append(f"| {name} | {loss:.4f} | {loss / r['heldout bytes per token']:.4f} | {' | '.join(recall)} |")
    return "\n".join([*lines, "", "```json", json.dumps(r), "```", ""])
