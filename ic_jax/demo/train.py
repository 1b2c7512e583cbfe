"""Trains the demo model: a small DSA transformer whose indexers learn from the attention they serve.

    python -m ic_jax.demo.train --data DIR --out DIR [--minutes M | --steps N]

``--data`` is what ``corpus`` wrote. Dense attention and LM loss first; from some point on every indexer also learns, by
KL(p || softmax(scores)), p being the layer's attention averaged over heads; in the last part attention sees only the
indexer's own top-k, and the KL is taken over that set (DeepSeek-V3.2 report, section 2.1). Writes a Hugging Face
checkpoint (also four times on the way, and on SIGTERM), losses.csv, evaluation.json with the held-out numbers,
report.md, and the sample that the tests use.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from convert import export

from .. import attention, model, moe
from ..attention import linear, rms_norm
from ..config import Config, Rope
from ..distill import optimizer
from ..distill_loss import attend, cast, index_scores, keys_values, kl, queries, select
from ..pattern import Pattern
from . import corpus

CONTEXT = corpus.ROW - 1
SHARD_BYTES = 14 * 10**6
ANSWER_WEIGHT = 4.0  # of an answer's tokens in the loss; other tokens count 1
BLOCK = 256  # queries that are scored together, against no later keys than their own
TAUGHT = 4  # in training, every so many queries teach the indexer
LONGEST_JUMP = 8192  # half of the training rows skip positions, up to this many, so that far distances are seen


def demo_config(layers: int = 16, topk: int = 64, expert_width: int = 48) -> Config:
    """The demo's shape: head sizes are those GLM's kernels are made for, the rest is small; about 12 M parameters."""
    return Config(
        model_type="glm_moe_dsa", vocab_size=corpus.VOCABULARY, hidden_size=192, num_hidden_layers=layers,
        num_attention_heads=4, q_lora_rank=96, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64,
        v_head_dim=32, intermediate_size=384, moe_intermediate_size=expert_width, n_routed_experts=8,
        num_experts_per_tok=2, n_shared_experts=1, mlp_layer_types=("dense",) + ("sparse",) * (layers - 1),
        pattern=Pattern.all_full(layers), index_n_heads=4, index_head_dim=128, index_topk=topk, rope=Rope(theta=1e6),
        max_position_embeddings=65536, eos_token_id=(0,),
    )  # fmt: skip


# The training forward: the model's function over whole sequences, with masks in place of caches and kernels. ---------
class Signals(NamedTuple):
    """index_loss_L: mean KL of each layer, nats. load_LE: share of the tokens that each expert of each layer got."""

    index_loss_L: jax.Array
    load_LE: jax.Array


def experts(c: Config, p, x_BSD):
    """Routed plus shared experts with every expert computed for every token; (output, load [E])."""
    x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
    chosen_NX, weights_NX = moe.route(c, p, linear(x_ND, p["gate"], dtype=jnp.float32))
    gate_NE = (jax.nn.one_hot(chosen_NX, c.n_routed_experts) * weights_NX[..., None]).sum(1)
    load_E = jax.nn.one_hot(chosen_NX, c.n_routed_experts).sum(1).mean(0)
    gate, up = (jnp.einsum("nd,edf->nef", x_ND, p[name]) for name in ("gate_proj", "up_proj"))
    h = jax.nn.silu(gate) * up * gate_NE[..., None].astype(gate.dtype)
    routed = jnp.einsum("nef,efd->nd", h, p["down_proj"])
    return routed.reshape(x_BSD.shape) + moe.mlp(p["shared"], x_BSD), load_E


def train_forward(
    params: dict, c: Config, ids_BS, *, slots, sparse: bool, index_loss: bool = True, positions_BS=None, taught: int = 1,
    block: int = BLOCK,
):  # fmt: skip
    """(logits float32 [B,S,W], Signals) of whole sequences; differentiable, same parameters as ``model.forward``.

    Args:
      params: the tree of ``model.init_params``; computation is in its dtype.
      slots: the pattern as ``Pattern.slots`` gives it, tuple or int32 array. An S layer reuses scores and selection of
        the nearest F layer, and its KL trains that layer's indexer: weighted by 1/(m+1), the sum is L_multi.
      sparse: attend to the selected positions only; else to all, and no selection is made.
      index_loss: compute the KL terms (else zeros); indexer inputs are detached, so they train the indexers alone.
      positions_BS: rope positions, ascending; 0, 1, … by default. taught: the KL is the mean over every so many queries.
      block: queries of a block; keys behind a block are not touched, which saves most of the masked half.
    """
    B, S = ids_BS.shape
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S)) if positions_BS is None else positions_BS
    tables = attention.rope_tables(c, positions_BS)
    blocks = [slice(at, min(at + block, S)) for at in range(0, S, block)]
    causal = tuple(jnp.tril(jnp.ones((S, S), bool))[None, b, : b.stop] for b in blocks)
    rows = slice(taught - 1, None, taught)
    all_full = isinstance(slots, tuple) and min(slots) >= 0

    def layer_step(kind, carry, xs):
        x_BSD, scores, masks = carry  # the latter two by block, [B,s,t]; of scores only the taught rows
        p, p_ffn, slot = xs
        h_BSD = rms_norm(x_BSD, p["input_layernorm"], c.rms_norm_eps)
        qa_BSQ, q_BSHN = queries(c, p, h_BSD, tables)

        def refresh():
            p_index = jax.tree.map(lambda a: a[slot], params["indexer"])
            h, qa = lax.stop_gradient((h_BSD, qa_BSQ))
            indexer = (*attention.index_queries(c, p_index, h, qa, tables), attention.index_keys(c, p_index, h, tables))
            score = lambda q, w, k, at: [index_scores(q[:, b][:, at], w[:, b][:, at], k[:, : b.stop]) for b in blocks]
            found = score(*lax.stop_gradient(indexer), slice(None)) if sparse else ()
            chosen = tuple(select(s, mask, c.index_topk) for s, mask in zip(found, causal, strict=False))
            return tuple(score(*indexer, rows)) if index_loss else scores, chosen if sparse else masks

        if sparse or index_loss:
            scores, masks = refresh() if all_full else lax.cond(slot >= 0, refresh, lambda: (scores, masks))
        k_BTHN, v_BTHV = keys_values(c, p, h_BSD, tables)
        outputs, losses = [], []
        for i, b in enumerate(blocks):
            o, p_BST = attend(c, q_BSHN[:, b], k_BTHN[:, : b.stop], v_BTHV[:, : b.stop], masks[i])
            outputs.append(o)
            losses += [kl(p_BST[:, rows], scores[i], masks[i][:, rows])] if index_loss else []
        loss = jnp.concatenate(losses, 1).mean() if index_loss else jnp.float32(0)
        x_BSD = x_BSD + linear(jnp.concatenate(outputs, 1).reshape(B, S, -1), p["o_proj"])
        h_BSD = rms_norm(x_BSD, p["post_attention_layernorm"], c.rms_norm_eps)
        y_BSD, load = (moe.mlp(p_ffn, h_BSD), None) if kind == "dense" else experts(c, p_ffn, h_BSD)
        carried = carry[1:] if all_full else (scores, masks)
        return (x_BSD + y_BSD, *carried), (loss, load)

    x_BSD = params["embed_tokens"][ids_BS]
    carry = (x_BSD, (), causal)  # with every layer full, none reads what another selected: nothing travels
    if not all_full:
        masks = tuple(mask.repeat(B, 0) for mask in causal)
        carry = (x_BSD, tuple(jnp.zeros(m[:, rows].shape) for m in masks) if index_loss else (), masks)
    losses, loads, seen = [], [], {"dense": 0, "sparse": 0}
    for kind, run in itertools.groupby(range(c.num_hidden_layers), lambda i: c.mlp_layer_types[i]):
        layers, first = list(run), seen[kind]
        seen[kind] += len(layers)
        cut = lambda tree, at, n: jax.tree.map(lambda a: a[at : at + n], tree)
        ffn = cut(params["dense" if kind == "dense" else "experts"], first, len(layers))
        run_slots = jnp.asarray(slots, jnp.int32)[layers[0] : layers[-1] + 1]
        xs = (cut(params["layers"], layers[0], len(layers)), ffn, run_slots)
        carry, (loss_L, load_LE) = lax.scan(functools.partial(layer_step, kind), carry, xs)
        losses.append(loss_L)
        loads += [] if load_LE is None else [load_LE]
    x_BSD = rms_norm(carry[0], params["norm"], c.rms_norm_eps)
    logits = jnp.einsum("bsd,wd->bsw", x_BSD, params["lm_head"], preferred_element_type=jnp.float32)
    load = jnp.concatenate(loads) if loads else jnp.zeros((0, c.n_routed_experts))
    return logits, Signals(jnp.concatenate(losses), load)


# Parameters and optimiser. -------------------------------------------------------------------------------------------
def init(c: Config, seed: int) -> dict:
    """float32 parameters: normal with variance 1/fan-in, outputs of a layer scaled down by its depth."""
    shapes, _ = model.abstract_params(c, c.num_hidden_layers, jnp.float32)
    rng = np.random.default_rng(seed)

    def make(path, a):
        name = path[-1].key
        if "norm" in name or "bias" in name:
            return jnp.full(a.shape, 0.0 if "bias" in name else 1.0, a.dtype)
        fan_in = a.shape[-2] if a.ndim == 4 and name in moe.STACKS else a.shape[-1]
        std = {"embed_tokens": 0.05, "lm_head": 0.02}.get(name, fan_in**-0.5)
        std *= (2 * c.num_hidden_layers) ** -0.5 if name in ("o_proj", "down_proj") else 1.0
        return jnp.asarray(rng.standard_normal(a.shape, np.float32) * std)

    return jax.tree.map_with_path(make, shapes)


def save(directory: Path, c: Config, params: dict) -> None:
    """A Hugging Face checkpoint of bfloat16 params in files under 15 MB."""
    export.write(directory, c, params, c.to_hf() | {"dtype": "bfloat16"}, SHARD_BYTES)


def make_step(c: Config, sparse: bool, index_loss: bool):
    """One training step: (params, state, batch, lr) -> (params, state, [lm, answers, index, largest expert load]).

    When a gradient is not finite, params and state come back as they were.
    """
    slots = Pattern.all_full(c.num_hidden_layers).slots(range(c.num_hidden_layers))

    def loss_fn(params, ids, positions_BS, weight_BS):
        logits, signals = train_forward(
            cast(params), c, ids[:, :-1], slots=slots, sparse=sparse, index_loss=index_loss, positions_BS=positions_BS,
            taught=TAUGHT,
        )  # fmt: skip
        nll_BS = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        plain = jnp.where(weight_BS == 1, nll_BS, 0).sum() / (weight_BS == 1).sum()
        answers = jnp.where(weight_BS > 1, nll_BS, 0).sum() / jnp.maximum((weight_BS > 1).sum(), 1)
        lm = (nll_BS * weight_BS).sum() / weight_BS.sum()
        return lm + signals.index_loss_L.sum(), (plain, answers, signals)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, lr):
        grads, (plain, answers, signals) = jax.grad(loss_fn, has_aux=True)(params, *batch)
        updates, new_state = optimizer().update(grads, state, params)
        new = jax.tree.map(lambda p, u: p - lr * u, params, updates)
        if "experts" in params:
            # The router's bias follows the load, not a gradient (DeepSeek-V3 report, section 2.1.2).
            bias = params["experts"]["e_score_correction_bias"]
            new["experts"]["e_score_correction_bias"] = bias + 0.3 * lr * jnp.sign(
                c.num_experts_per_tok / c.n_routed_experts - signals.load_LE
            )
        ok = jnp.isfinite(optax.global_norm(grads))
        params, state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), (new, new_state), (params, state))
        return params, state, jnp.stack([plain, answers, signals.index_loss_L.mean(), signals.load_LE.max()])

    return step


# Data. ---------------------------------------------------------------------------------------------------------------
class Batches:
    """Rows of text and of recall tasks; digits of recall rows are permuted, so no answer can be learnt by heart."""

    def __init__(self, data: Path, batch: int, context: int, recall_share: float, seed: int):
        from tokenizers import Tokenizer

        self.text_T, self.recall = np.load(data / "text.npy"), np.load(data / "recall.npy")
        tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
        self.digits = np.array([tokenizer.token_to_id(d) for d in "0123456789"])
        self.batch, self.context, self.recalls = batch, context, round(batch * recall_share)
        self.rng = np.random.default_rng(seed)

    def next(self):
        """ids int32 [B,S+1], positions int32 [B,S] and loss weights float32 [B,S]."""
        rng, n, S = self.rng, self.batch - self.recalls, self.context
        at = rng.integers(0, len(self.text_T) - S - 1, n)[:, None] + np.arange(S + 1)
        rows = self.recall[rng.integers(0, len(self.recall), self.recalls), : S + 1]
        tables = np.tile(np.arange(corpus.VOCABULARY), (self.recalls, 1))
        tables[:, self.digits] = rng.permuted(np.tile(self.digits, (self.recalls, 1)), axis=1)
        tokens = np.take_along_axis(tables, (rows & (corpus.ANSWER - 1)).astype(np.int64), 1)
        ids = np.concatenate([self.text_T[at], tokens]).astype(np.int32)
        weight = np.ones((self.batch, S), np.float32)
        weight[n:][(rows[:, 1:] & corpus.ANSWER) > 0] = ANSWER_WEIGHT
        jumps = np.zeros((self.batch, S), np.int32)
        for row in np.flatnonzero(rng.random(self.batch) < 0.5):
            for cut in rng.integers(1, S, 2):
                jumps[row, cut:] += int(np.exp(rng.uniform(0, np.log(LONGEST_JUMP / 2))))
        return ids, np.arange(S, dtype=np.int32) + jumps, weight


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 4 %, then a cosine down to 3 % of the peak."""
    return peak * (min(progress / 0.04, 1.0) * (0.03 + 0.97 * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0)))))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ic_jax.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="length of the schedule in steps")
    parser.add_argument("--minutes", type=float, help="or in minutes from the program's start, compilation included")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--topk", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--recall-share", type=float, default=0.45, help="share of rows that are recall tasks")
    parser.add_argument(
        "--stages", type=float, nargs=2, default=(0.4, 0.7), metavar=("INDEX", "SPARSE"),
        help="progress at which the indexers start to learn, and at which attention becomes sparse",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from . import evaluate  # which needs train_forward

    if (args.steps is None) == (args.minutes is None):
        parser.error("give either --steps or --minutes")
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    c = demo_config(args.layers, args.topk)
    params = init(c, args.seed)
    state = jax.jit(optimizer().init)(params)
    batches = Batches(args.data, args.batch, args.context, args.recall_share, args.seed)
    stages = {"dense": (False, False), "indexer": (False, True), "sparse": (True, True)}
    shape_of = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    shapes = shape_of((params, state, batches.next(), np.float32(0)))
    eval_shapes = (jax.eval_shape(cast, params), shapes[2][0], jax.ShapeDtypeStruct((args.layers,), jnp.int32))
    pool = ThreadPoolExecutor()
    compile = lambda program, shapes: pool.submit(lambda: program.lower(*shapes).compile())
    steps = {"dense": compile(make_step(c, *stages["dense"]), shapes)}
    steps["dense"].result()  # the others compile while it trains
    steps |= {name: compile(make_step(c, *stages[name]), shapes) for name in ("indexer", "sparse")}
    predict = {sparse: compile(evaluate.make_predict(c, sparse), eval_shapes) for sparse in (False, True)}
    begun, saved, stopped = time.monotonic(), 0, []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    size = sum(a.size for a in jax.tree.leaves(params)) / 1e6
    print(f"parameters {size:.2f} M, first step compiled in {begun - start:.1f} s", flush=True)
    rows, pending, n = [], None, 0
    while True:
        now = time.monotonic()
        progress = n / args.steps if args.steps else (now - begun) / max(args.minutes * 60 - (begun - start), 1)
        stage = "dense" if progress < args.stages[0] else "indexer" if progress < args.stages[1] else "sparse"
        done = progress >= 1 or bool(stopped)
        if pending is not None and (done or n % 20 == 0):  # waiting for the one before keeps the device busy
            lm, answers, index, load = np.asarray(pending[3])
            numbers = [f"{lm:.4f}", f"{answers:.4f}", f"{index:.4f}", f"{load:.3f}"]
            rows.append([pending[0], pending[1], round(now - begun, 2), f"{pending[2]:.2e}", *numbers])
            if done or n % 200 == 0:
                print(*rows[-1], flush=True)
        if done:
            break
        if int(5 * progress) > saved:
            saved = int(5 * progress)
            save(args.out, c, cast(params))
        lr = learning_rate(progress, args.lr)
        params, state, metrics = steps[stage].result()(params, state, batches.next(), np.float32(lr))
        pending, n = (n, stage, lr, metrics), n + 1
    predict = {sparse: job.result() for sparse, job in predict.items()}
    with open(args.out / "losses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "stage", "seconds", "lr", "lm_loss", "answer_loss", "index_kl", "largest_load"])
        writer.writerows(rows)
    params = cast(params)
    save(args.out, c, params)
    run = {"steps": n, "tokens": n * args.batch * args.context, "seconds training": round(time.monotonic() - begun, 1),
           "seconds compiling": round(begun - start, 1), "batch": args.batch, "context": args.context, "lr": args.lr,
           "recall share": args.recall_share, "seed": args.seed}  # fmt: skip
    evaluate.evaluate(predict, params, c, args.data, args.out, run)


if __name__ == "__main__":
    main()
