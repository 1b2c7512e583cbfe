"""Multi-layer distillation: a training forward over whole sequences, and the losses that teach retained indexers.

An F layer's indexer learns from the attention of every layer it serves (IndexCache, arXiv 2603.12201, section 3). Scores,
attention and targets exist for one block of queries at a time and are recomputed in the backward pass, so memory grows
with the context and not with its square; only the selections, one bit a pair, stay. Flow: ``distill`` -> here.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from . import attention, model, moe
from .attention import linear, rms_norm, rope
from .config import Config
from .pattern import Pattern

BLOCK_BYTES = 128 << 20  # float32 scores of all heads that exist at a time


# Parts that training of the demo model shares. -----------------------------------------------------------------------
def cast(params, dtype=jnp.bfloat16):
    """The dtypes of a checkpoint: the key norm and the router's bias stay float32."""
    keep = ("k_norm_weight", "k_norm_bias", "e_score_correction_bias")
    return jax.tree.map_with_path(lambda path, a: a if path[-1].key in keep else a.astype(dtype), params)


def select(scores_BST, causal_ST, k: int):
    """bool [B,S,T]: the k best earlier positions of each query by (score descending, position ascending).

    Finds the k-th score by bisection over the bits of the floats: no sort, and the memory of one counter.
    """
    bits = lax.bitcast_convert_type(jnp.where(scores_BST == 0, 0.0, scores_BST), jnp.uint32)
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    ordered = jnp.where(causal_ST, ordered, jnp.uint32(0))
    count = lambda mask: mask.sum(-1, dtype=jnp.int32)[..., None]

    def lower(i, kth):
        trial = kth | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(count(ordered >= trial) >= k, trial, kth)

    kth = lax.fori_loop(0, 32, lower, jnp.zeros_like(ordered[..., :1]))
    above, ties = ordered > kth, (ordered == kth) & causal_ST
    room, at_T = k - count(above), jnp.arange(scores_BST.shape[-1])

    def extend(i, end):  # the longest prefix of positions whose ties still have room
        trial = end + (1 << (at_T.size.bit_length() - 1 - i))
        return jnp.where(count(ties & (at_T < trial)) <= room, trial, end)

    end = lax.fori_loop(0, at_T.size.bit_length(), extend, jnp.zeros_like(room))
    return above | (ties & (at_T < end))


def index_scores(q_BSIJ, w_BSI, k_BTJ):
    """float32 [B,S,T] scores of an indexer's queries, head weights and keys."""
    dots = jnp.einsum("bsij,btj->bist", q_BSIJ, k_BTJ, preferred_element_type=jnp.float32)
    return (jax.nn.relu(dots) * w_BSI.transpose(0, 2, 1)[..., None]).sum(1)


def kl(p_BST, scores_BST, mask_BST):
    """float32 [B,S]: KL(p || softmax(scores)) over the mask, in nats; p is a constant that sums to 1 there."""
    log_q = jax.nn.log_softmax(jnp.where(mask_BST, scores_BST, -jnp.inf), -1)
    p_BST = lax.stop_gradient(p_BST)
    terms = jnp.where(mask_BST & (p_BST > 0), p_BST * (jnp.log(jnp.maximum(p_BST, 1e-30)) - log_q), 0.0)
    return terms.sum(-1)


def queries(c: Config, p, h_BSD, tables):
    """(normed query latent [B,S,Q], queries [B,S,H,N+R]) of MLA in its expanded form."""
    qa_BSQ = rms_norm(linear(h_BSD, p["q_a_proj"]), p["q_a_layernorm"], 1e-6)
    q = linear(qa_BSQ, p["q_b_proj"]).reshape(*h_BSD.shape[:2], c.num_attention_heads, -1)
    N = c.qk_nope_head_dim
    return qa_BSQ, jnp.concatenate([q[..., :N], rope(q[..., N:], tables, c.rope_interleave)], -1)


def keys_values(c: Config, p, h_BSD, tables):
    """(keys [B,T,H,N+R], values [B,T,H,V]) of MLA in its expanded form."""
    C = c.kv_lora_rank
    kv = linear(h_BSD, p["kv_a_proj_with_mqa"])
    latent_BTC = rms_norm(kv[..., :C], p["kv_a_layernorm"], 1e-6)
    k_rope = rope(kv[..., None, C:], tables, c.rope_interleave)
    k_rope = jnp.broadcast_to(k_rope, (*h_BSD.shape[:2], c.num_attention_heads, c.qk_rope_head_dim))
    k_BTHN = jnp.concatenate([jnp.einsum("btc,hnc->bthn", latent_BTC, p["k_b_proj"]), k_rope], -1)
    return k_BTHN, jnp.einsum("btc,hvc->bthv", latent_BTC, p["v_b_proj"])


def attend(c: Config, q_BSHN, k_BTHN, v_BTHV, mask_BST):
    """(output [B,S,H,V], attention averaged over heads, float32 [B,S,T]) over the positions of the mask."""
    scores = jnp.einsum("bshn,bthn->bhst", q_BSHN, k_BTHN, preferred_element_type=jnp.float32) * c.softmax_scale
    p_BHST = jax.nn.softmax(jnp.where(mask_BST[:, None], scores, -jnp.inf), -1)
    return jnp.einsum("bhst,bthv->bshv", p_BHST.astype(v_BTHV.dtype), v_BTHV), p_BHST.mean(1)


# Blocks of queries. --------------------------------------------------------------------------------------------------
def block_size(c: Config, B: int, S: int) -> int:
    """Queries of a block whose float32 scores of all heads take at most BLOCK_BYTES."""
    return max(1, min(S, BLOCK_BYTES // (4 * B * S * max(c.num_attention_heads, c.index_n_heads))))


def by_blocks(function, arrays, block: int):
    """``function(*block of each array)`` over blocks of axis 1 of [B,S,…] arrays, put together; zeros fill up the last.

    What a block computes inside is forgotten and computed again for the gradient. Arrays may be None.
    """
    S = jax.tree.leaves(arrays)[0].shape[1]
    n = -(-S // block)

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, n * block - S), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(a.shape[0], n, block, *a.shape[2:]).swapaxes(0, 1)

    join = lambda a: a.swapaxes(0, 1).reshape(a.shape[1], n * block, *a.shape[3:])[:, :S]
    one = jax.checkpoint(lambda parts: function(*parts), prevent_cse=False)
    return jax.tree.map(join, lax.map(one, jax.tree.map(split, arrays)))


# The forward. --------------------------------------------------------------------------------------------------------
class Shares(NamedTuple):
    """For every layer: the slot of its F layer, its share of that layer's target, whether it is F, and its group's last."""

    slot_L: np.ndarray
    share_L: np.ndarray
    full_L: np.ndarray
    last_L: np.ndarray


def shares(pattern: Pattern, loss: str) -> Shares:
    """A pattern and a loss as data: one program serves all patterns of as many F layers, with both "multi" and "own".

    The share is 1/(m+1) where an F layer serves m+1 layers; with ``own`` it is 1 for F layers and 0 for the others.
    """
    slot = np.cumsum([letter == "F" for letter in pattern.layers]) - 1
    share = 1 / np.bincount(slot)[slot]
    if loss == "own":
        share = np.array([float(letter == "F") for letter in pattern.layers])
    full = np.array([letter == "F" for letter in pattern.layers])
    return Shares(slot.astype(np.int32), share.astype(np.float32), full, np.append(np.diff(slot) > 0, True))


def forward(
    params: dict, c: Config, pattern: Pattern | Shares, ids_BS, *, sparse: bool, loss: str = "multi",
    block: int | None = None, remat: bool = False,
):  # fmt: skip
    """(x [B,S,D] behind the last layer, index loss of each F layer, float32 [G]); differentiable.

    Args:
      params: the tree of ``model.init_params`` with the indexers of the pattern's F layers; computation is in its dtype.
      pattern: with ``loss``, or both as the arrays of ``shares``.
      sparse: attend to the selected positions only, the index loss taken over them, p renormalised; else to all.
      loss: "multi", sum_j 1/(m+1) KL(p^(l+j) || q); "avg", KL(mean_j p^(l+j) || q); "own", KL(p^(l) || q). Means over
        queries, nats. The indexers' inputs are detached, so the index losses train the indexers alone, and since a
        selection has no gradient, a loss of x trains everything else. "avg" carries a target [B,S,T] from layer to layer.
      block: queries of a block, ``block_size`` by default. remat: recompute each layer in the backward pass.
    """
    B, S = ids_BS.shape
    block = min(block or block_size(c, B, S), S)
    at_T, average = jnp.arange(S, dtype=jnp.int32), loss == "avg"
    tables = attention.rope_tables(c, jnp.broadcast_to(at_T, (B, S)))
    n_BS = jnp.broadcast_to(at_T + 1, (B, S))  # how many positions a query sees; 0 in rows that fill up a block

    def visible(n_BS, bits=None):
        n_BS1 = n_BS[..., None]
        causal = at_T < jnp.maximum(n_BS1, 1)  # a row without any position would become NaN
        return causal if bits is None else causal & (jnp.unpackbits(bits, axis=-1, count=S).astype(bool) | (n_BS1 == 0))

    def layer_step(kind, carry, xs):
        x_BSD, (source_h, source_qa, bits, target_BST) = carry
        p, p_ffn, slot, share, full, last = xs
        h_BSD = rms_norm(x_BSD, p["input_layernorm"], c.rms_norm_eps)
        qa_BSQ, q_BSHN = queries(c, p, h_BSD, tables)
        k_BTHN, v_BTHV = keys_values(c, p, h_BSD, tables)
        # What the F layer's indexer read goes along, so that every served layer reaches that indexer's weights.
        source_h = jnp.where(full, lax.stop_gradient(h_BSD), source_h)
        source_qa = jnp.where(full, lax.stop_gradient(qa_BSQ), source_qa)
        p_index = jax.tree.map(lambda a: a[slot], params["indexer"])
        iq_BSIJ, iw_BSI = attention.index_queries(c, p_index, source_h, source_qa, tables)
        ik_BTJ = attention.index_keys(c, p_index, source_h, tables)

        if sparse:
            q, w, k = lax.stop_gradient((iq_BSIJ, iw_BSI, ik_BTJ))
            choose = lambda n, q, w: jnp.packbits(select(index_scores(q, w, k), visible(n), c.index_topk), axis=-1)
            bits = lax.cond(full, lambda: by_blocks(choose, (n_BS, q, w), block), lambda: bits)
            bits = checkpoint_name(bits, "selection")
        if average:
            target_BST = jnp.where(full, 0.0, target_BST)

        def one(n, q, bits, iq, iw, target):
            mask = visible(n, bits)
            o, p_BST = attend(c, q, k_BTHN, v_BTHV, mask)
            p_BST = lax.stop_gradient(p_BST)
            target = target + share * p_BST if average else p_BST
            measure = lambda: kl(target, index_scores(iq, iw, ik_BTJ), mask)
            loss = lax.cond(last if average else share > 0, measure, lambda: jnp.zeros(n.shape, jnp.float32))
            return o, loss, target if average else None

        arrays = (n_BS, q_BSHN, bits, iq_BSIJ, iw_BSI, target_BST)
        o_BSHV, loss_BS, target_BST = by_blocks(one, arrays, block)
        x_BSD = x_BSD + linear(o_BSHV.reshape(B, S, -1), p["o_proj"])
        h_BSD = rms_norm(x_BSD, p["post_attention_layernorm"], c.rms_norm_eps)
        if kind == "dense":
            y_BSD = moe.mlp(p_ffn, h_BSD)
        else:
            stacks = {name: p_ffn[name][None] for name in moe.STACKS}
            y_BSD = moe.experts(c, p_ffn, stacks, 0, h_BSD, implementation="reference")
        loss = loss_BS.mean() * (1.0 if average else share)
        return (x_BSD + y_BSD, (source_h, source_qa, bits, target_BST)), loss

    x_BSD = params["embed_tokens"][ids_BS]
    bits = jnp.zeros((B, S, -(-S // 8)), jnp.uint8) if sparse else None
    target_BST = jnp.zeros((B, S, S), jnp.float32) if average else None
    carry = (x_BSD, (jnp.zeros_like(x_BSD), jnp.zeros((B, S, c.q_lora_rank), x_BSD.dtype), bits, target_BST))
    plan = pattern if isinstance(pattern, Shares) else shares(pattern, loss)
    losses, seen = [], {"dense": 0, "sparse": 0}
    for kind, run in itertools.groupby(range(c.num_hidden_layers), lambda i: c.mlp_layer_types[i]):
        layers = list(run)
        first, n = (layers[0], seen[kind]), len(layers)
        seen[kind] += n
        cut = lambda tree, at, n=n: jax.tree.map(lambda array: array[at : at + n], tree)
        ffn = params["dense" if kind == "dense" else "experts"]
        xs = (cut(params["layers"], first[0]), cut(ffn, first[1]), *cut(tuple(plan), first[0]))
        step = functools.partial(layer_step, kind)
        if remat:
            keep = jax.checkpoint_policies.save_only_these_names("selection")
            step = jax.checkpoint(step, policy=keep, prevent_cse=False)
        carry, loss_L = lax.scan(step, carry, xs)
        losses.append(loss_L)
    return carry[0], jax.ops.segment_sum(jnp.concatenate(losses), jnp.asarray(plan.slot_L), len(params["indexer"]["wk"]))


def lm_loss(params: dict, c: Config, x_BSD, targets_BS):
    """Mean negative log likelihood of the next tokens, in nats, of what leaves the last layer; logits block by block."""
    B, S = targets_BS.shape
    block = max(1, min(S, BLOCK_BYTES // (4 * B * c.vocab_size)))

    def one(x, targets):
        logits = model.head(params, c, x)
        at = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - at

    return by_blocks(one, (x_BSD, targets_BS), block).mean()
