"""The model on one page: embed -> loop over layers with the IndexPlan in the carry -> logits.

``forward`` is a pure function of arrays. A full (F) layer writes its index keys and selects; a shared (S) layer leaves
the plan as it found it: no indexer work, weights or memory. The pattern is ``slots``, one entry a layer (see
``Pattern.slots``): a tuple compiles it in, an int32 array makes it data, so that one program serves every pattern.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import RowPlan, dense_mla, index_topk, physical_rows, plan_rows, sparse_mla

from . import attention, moe, sharding
from .attention import Stacked, rms_norm
from .cache import Cache
from .config import Config
from .parallel import ALONE, Parallel, cache_specs


class Initializer:
    """Makes nnx.Params that carry their logical axes: normal (std 0.02), ones or zeros.

    With a ``mesh``, inside ``jax.shard_map``: this device's part of them, every part drawn by itself.
    """

    def __init__(self, rngs: nnx.Rngs, dtype, mesh: Mesh | None = None):
        self.rngs, self.dtype, self.mesh = rngs, dtype, mesh

    def normal(self, shape, axes):
        key = self.rngs.params()
        for axis in self._divided(axes):
            key = jax.random.fold_in(key, lax.axis_index(axis))
        return nnx.Param(normal_in_blocks(key, self._part(shape, axes), self.dtype, 0.02), logical_axes=axes)

    def ones(self, shape, axes, dtype=None):
        return nnx.Param(jnp.ones(self._part(shape, axes), dtype or self.dtype), logical_axes=axes)

    def zeros(self, shape, axes, dtype=None):
        return nnx.Param(jnp.zeros(self._part(shape, axes), dtype or self.dtype), logical_axes=axes)

    def _divided(self, axes):
        return [sharding.RULES[a] for a in axes if self.mesh is not None and a in sharding.RULES]

    def _part(self, shape, axes):
        if self.mesh is None:
            return shape
        return tuple(n // self.mesh.shape.get(sharding.RULES.get(a), 1) for n, a in zip(shape, axes, strict=True))


def normal_in_blocks(key, shape, dtype, std: float, block: int = 1 << 19):
    """Normal numbers of ``shape``, drawn at most ``block`` elements at a time (or one row), written in place.

    Random bits and their transform take several times the memory of what they make: too much for a stack of experts.
    """
    lead = next(i for i in range(len(shape)) if i == len(shape) - 1 or math.prod(shape[i:]) <= block)
    rows, rest = math.prod(shape[:lead]), shape[lead:]
    together = max(d for d in range(1, max(block // math.prod(rest), 1) + 1) if rows % d == 0)
    draw = lambda key, shape: (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
    if together == rows:
        return draw(key, shape)
    fill = lambda i, a: a.at[i].set(draw(jax.random.fold_in(key, i), (together, *rest)))
    # Filled first with a number of its own: stacks of one shape that begin as the same zeros would be copied.
    a = jnp.broadcast_to(draw(key, ()), (rows // together, together, *rest))
    return lax.fori_loop(0, rows // together, fill, a).reshape(shape)


class Transformer(nnx.Module):
    """Parameters of a DSA transformer, stacked by kind; ``slots`` is the number of indexers held."""

    def __init__(self, c: Config, slots: int, rngs: nnx.Rngs, dtype=jnp.bfloat16, mesh: Mesh | None = None):
        init = Initializer(rngs, dtype, mesh)
        dense = c.mlp_layer_types.count("dense")
        sparse = c.num_hidden_layers - dense
        self.embed_tokens = init.normal((c.vocab_size, c.hidden_size), ("vocab", "embed"))
        self.norm = init.ones((c.hidden_size,), (None,))
        self.lm_head = init.normal((c.vocab_size, c.hidden_size), ("vocab", "embed"))
        self.layers = attention.Attention(c, c.num_hidden_layers, init)
        if c.has_indexer and slots:
            self.indexer = attention.Indexer(c, slots, init)
        if dense:
            self.dense = moe.Mlp(c, dense, c.intermediate_size, init)
        if sparse:
            self.experts = moe.Experts(c, sparse, init)


def abstract_params(c: Config, slots: int, dtype=jnp.bfloat16) -> tuple[dict, dict]:
    """(ShapeDtypeStructs, logical axes): two nested dicts of the same keys; nothing is allocated."""
    state = nnx.state(nnx.eval_shape(lambda: Transformer(c, slots, nnx.Rngs(0), dtype)), nnx.Param)
    is_param = lambda v: isinstance(v, nnx.Variable)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype), state, is_leaf=is_param)
    axes = jax.tree.map(lambda v: tuple(v.get_metadata()["logical_axes"]), state, is_leaf=is_param)
    return nnx.to_pure_dict(shapes), nnx.to_pure_dict(axes)


def init_params(c: Config, slots: int, seed: int = 0, dtype=jnp.bfloat16, mesh: Mesh | None = None) -> dict:
    """Random parameters, made on their devices in little more memory than they take; other numbers on another mesh."""
    make = lambda: nnx.to_pure_dict(nnx.state(Transformer(c, slots, nnx.Rngs(seed), dtype, mesh), nnx.Param))
    if mesh is not None:
        specs = sharding.param_specs(abstract_params(c, slots, dtype)[1])
        make = jax.shard_map(make, mesh=mesh, in_specs=(), out_specs=specs, check_vma=False)
    return jax.jit(make)()


class IndexPlan(NamedTuple):
    """What an F layer computes once and every S layer behind it reuses.

    positions_BSK: selected positions, ascending, -1 padded. rows: what sparse attention reads, their physical cache rows
    and, on some backends, groups of neighbouring queries over the union of their selections.
    """

    positions_BSK: jax.Array
    rows: RowPlan


def index_plan(params, cache: Cache, positions_BSK, implementation: str = "auto", parallel=ALONE) -> IndexPlan:
    """The IndexPlan of a selection."""
    heads = params["layers"]["k_b_proj"].shape[1]
    pages_BP = parallel.page_table(cache.page_table_BP, cache.latent_LMU.shape[1], cache.page_size)
    own_BSK = positions_BSK if parallel.split else parallel.own(positions_BSK, cache.page_size)
    how = dict(page_size=cache.page_size, implementation=implementation)
    rows = plan_rows(own_BSK, pages_BP, heads, cache.latent_LMU, **how)
    return IndexPlan(positions_BSK, rows)


class Output(NamedTuple):
    """logits: float32 [B,W] of each sequence's last token, or [B,S,W]. selections_LBSK: see ``forward``."""

    logits: jax.Array
    cache: Cache
    selections_LBSK: jax.Array | None = None


def forward(
    params: dict,
    c: Config,
    slots,
    ids_BS,
    positions_BS,
    cache: Cache,
    *,
    all_logits: bool = False,
    dense: bool = False,
    implementation: str = "auto",
    keep_selections: bool = False,
    parallel: Parallel = ALONE,
) -> Output:
    """Run the tokens of this call through every layer, reading and extending the caches.

    Args:
      slots: the pattern (see the module's docstring); ignored when ``dense``.
      ids_BS: int32 token ids. positions_BS: int32 absolute positions, ascending along S; -1 marks padding.
      cache: holds every earlier token of the sequences; donate it.
      all_logits: logits of every token, else of each sequence's last one.
      dense: attend to every token and run no indexer.
      keep_selections: also return each layer's plan positions, int32 [L,B,S,K].
      parallel: how the arrays are divided, inside ``jax.shard_map`` (see ``over_mesh``).
    """
    B, S = ids_BS.shape
    with jax.named_scope("embed"):
        x_BSD = parallel.embed(params["embed_tokens"], ids_BS)
    K = 0 if dense or not c.has_indexer else min(c.index_topk, cache.capacity * parallel.parts)
    nothing, how = jax.ShapeDtypeStruct((B, S, K), jnp.int32), dict(implementation=implementation, parallel=parallel)
    shapes = jax.eval_shape(functools.partial(index_plan, **how), params, cache, nothing)
    plan = jax.tree.map(lambda s: jnp.full(s.shape, -1, s.dtype), shapes)  # no layer reads it before the first F
    options = dict(dense=dense, keep_selections=keep_selections, **how)
    (x_BSD, _, cache), selections = run_layers(params, c, slots, (x_BSD, plan, cache), positions_BS, **options)
    x = x_BSD if all_logits else parallel.last_token(x_BSD, positions_BS)
    return Output(head(params, c, x, implementation), cache, selections)


def over_mesh(mesh: Mesh | None, c: Config, slots, axes: dict, *, queries: int, **options):
    """``forward`` as a function of global arrays (params, ids_BS, positions_BS, cache), divided over ``mesh``.

    Args:
      axes: logical axes of the parameters (``abstract_params``). queries: tokens a sequence in the calls to come.
      options: those of ``forward``.
    """
    parallel = Parallel.of(mesh, queries)
    run = lambda slots, params, *args: forward(params, c, slots, *args, parallel=parallel, **options)
    if mesh is None:
        return functools.partial(run, slots)

    def divided(params, ids_BS, positions_BS, cache):
        tokens, caches = parallel.tokens_spec(), cache_specs(cache)
        of_rows = PartitionSpec(*(tokens if options.get("all_logits") else ("data",)), "tensor")
        kept = PartitionSpec(None, *tokens) if options.get("keep_selections") else None
        in_specs, out_specs = (sharding.param_specs(axes), tokens, tokens, caches), Output(of_rows, caches, kept)
        # Replication is by construction (sums and gathers); kernels do not tell the checker.
        how = dict(mesh=mesh, out_specs=out_specs, check_vma=False)
        args = params, ids_BS, positions_BS, cache
        if isinstance(slots, tuple):
            return jax.shard_map(functools.partial(run, slots), in_specs=in_specs, **how)(*args)
        return jax.shard_map(run, in_specs=(PartitionSpec(), *in_specs), **how)(slots, *args)

    return divided


def head(params: dict, c: Config, x, implementation: str = "auto"):
    """float32 logits [..., W] of what leaves the last layer, x [..., D]."""
    with jax.named_scope("head"):
        x = rms_norm(x, params["norm"], c.rms_norm_eps)
        return attention.linear(x, Stacked(params["lm_head"][None], 0, implementation), dtype=jnp.float32)


def run_layers(
    params: dict, c: Config, slots, carry, positions_BS, *, span=None, dense=False, implementation="auto",
    keep_selections=False, parallel=ALONE,
):  # fmt: skip
    """(carry, selections int32 [L,B,S,K] or None) after the layers; the carry is (x_BSD, IndexPlan, Cache).

    ``span``: run only layers start <= l < stop of (start, stop), which may be data, from the carry that enters
    ``start``; no selections then. A cache of one layer and one slot is scratch that every layer writes anew: enough
    for tokens that are a whole sequence.
    """
    dense, static = dense or not c.has_indexer, isinstance(slots, tuple)
    cache = carry[2]
    tables = attention.rope_tables(c, positions_BS)
    out_of_range = cache.latent_LMU.shape[1]
    pages_BP = parallel.page_table(cache.page_table_BP, out_of_range, cache.page_size)
    seen_BS = parallel.seen(positions_BS, cache.page_size)
    own_BS = parallel.own(parallel.all_tokens(positions_BS), cache.page_size)
    rows_BS = physical_rows(cache.page_table_BP, own_BS, cache.page_size)
    rows_BS = jnp.where(rows_BS < 0, out_of_range, rows_BS)  # padding, or another device's: writes are dropped
    scratch = cache.latent_LMU.shape[0] < c.num_hidden_layers

    def layer_step(kind, full, earlier, layer, carry):
        x_BSD, plan, cache, kept = carry
        # Looked up by arithmetic: XLA's GPU compiler would start a slice apart from a layer's other kernels.
        nth, slot = layer - earlier, jnp.where(jnp.arange(L) == layer, slots_L, 0).sum()
        at = 0 if scratch else layer
        p = attention.at_layer(params["layers"], layer, implementation)
        h_BSD, qa_BSQ, q_BSHU, latent_BSU = attention.project(c, p, x_BSD, tables)
        with jax.named_scope("write_latent"):
            cache = cache.write_latents(at, rows_BS, parallel.all_tokens(latent_BSU))
            pool, at = parallel.pool(cache.latent_LMU, at)
        kernel = dict(scale=c.softmax_scale, value_dim=c.kv_lora_rank, implementation=implementation)
        if dense:
            o_BSHC, lse_BSH = dense_mla(q_BSHU, pool, at, pages_BP, seen_BS, page_size=cache.page_size, **kernel)
        else:
            if full:
                plan, cache = _refresh(c, params, slot, plan, cache, h_BSD, qa_BSQ, tables,
                                       pages_BP, seen_BS, rows_BS, implementation, parallel)  # fmt: skip
            with jax.named_scope("sparse_mla"):
                o_BSHC, lse_BSH = sparse_mla(q_BSHU, pool, at, plan.rows, **kernel)
        o_BSHC = parallel.weigh_outputs(o_BSHC, lse_BSH)
        x_BSD = parallel.add_outputs(x_BSD, functools.partial(attention.output, p, o_BSHC))
        norm = attention.Norm(p["post_attention_layernorm"], c.rms_norm_eps)
        with jax.named_scope(kind):
            if kind == "dense":
                y_BSD = moe.mlp(attention.at_layer(params["dense"], nth, implementation), x_BSD, norm)
                x_BSD = x_BSD + parallel.sum(y_BSD, "tensor")
            else:
                stacks = {k: params["experts"][k] for k in moe.STACKS}
                p = {k: v for k, v in params["experts"].items() if k not in stacks}
                p = attention.at_layer(p, nth, implementation)
                how = dict(implementation=implementation, parallel=parallel)
                x_BSD = x_BSD + moe.experts(c, p, stacks, nth, x_BSD, norm, **how)
        if keep_selections:
            kept = kept.at[layer].set(plan.positions_BSK)
        return x_BSD, plan, cache, kept

    L, slots_L, seen = len(slots), jnp.asarray(slots, jnp.int32), {"dense": 0, "sparse": 0}
    kept = jnp.zeros((L, *carry[1].positions_BSK.shape), jnp.int32) if keep_selections else None
    # The first full layer at or after each, or L.
    next_full_L = lax.cummin(jnp.where(slots_L >= 0, jnp.arange(L), L), reverse=True)
    carry = *carry, kept
    # Of a pattern that is data the first layer is known: there is nothing yet that it could share.
    known = lambda i: slots[i] >= 0 if static else i == 0 or None
    for (kind, full), run in itertools.groupby(range(L), lambda i: (c.mlp_layer_types[i], None if dense else known(i))):
        layers = list(run)
        earlier = layers[0] - seen[kind]
        seen[kind] += len(layers)
        first, last = layers[0], layers[-1] + 1
        if span is not None:
            first, last = (jnp.clip(end, first, last) for end in span)

        def loop(first, last, full, carry, kind=kind, earlier=earlier):
            with jax.named_scope("full" if full else "shared"):
                return lax.fori_loop(first, last, functools.partial(layer_step, kind, full, earlier), carry)

        def group(at, loop=loop, last=last):
            """The shared layers up to the next full one, and that one: loops, as a branch would copy the caches."""
            layer, carry = at
            stop = jnp.minimum(jnp.where(jnp.arange(L) == layer, next_full_L, 0).sum(), last)
            carry = loop(layer, stop, False, carry)
            layer = jnp.minimum(stop + 1, last)
            return layer, loop(stop, layer, True, carry)

        with jax.named_scope(f"layers_{layers[0]}_{layers[-1]}"):
            if full is not None or dense:
                carry = loop(first, last, bool(full), carry)
            else:
                _, carry = lax.while_loop(lambda at, last=last: at[0] < last, group, (jnp.int32(first), carry))
    *carry, kept = carry
    return tuple(carry), kept


def _refresh(c, params, slot, plan, cache, h_BSD, qa_BSQ, tables, pages_BP, seen_BS, rows_BS, implementation, parallel):
    """Plan and cache after the indexer of an F layer."""
    quantized = cache.index_scales_GM is not None
    at = slot if cache.index_keys_GMJ.shape[0] == params["indexer"]["wk"].shape[0] else 0
    weights = attention.at_layer(params["indexer"], slot, implementation)
    with jax.named_scope("index_keys"):
        k_BSJ = attention.index_keys(c, weights, h_BSD, tables)
        k = attention.quantize_e4m3(k_BSJ) if quantized else (k_BSJ.astype(cache.index_keys_GMJ.dtype), None)
        cache = cache.write_index_keys(at, rows_BS, *jax.tree.map(parallel.all_tokens, k))
    with jax.named_scope("index_topk"):
        # The indexer's heads are not divided: in prefill each tensor rank selects for its share of the queries.
        S, merging = h_BSD.shape[1], parallel.parts > 1 and not parallel.split
        mine = parallel.share((h_BSD, qa_BSQ, tables, seen_BS))
        q_BSIJ, w_BSI = attention.index_queries(c, weights, *mine[:3])
        if quantized:
            q_BSIJ, q_scale_BSI = attention.quantize_e4m3(q_BSIJ)
            w_BSI = w_BSI * q_scale_BSI
        pool, layer = parallel.pool((cache.index_keys_GMJ, cache.index_scales_GM), at)
        found = index_topk(
            q_BSIJ, w_BSI, pool, layer, pages_BP, mine[3], mine[3].max(-1) + 1,
            k=plan.positions_BSK.shape[-1], page_size=cache.page_size, implementation=implementation,
            return_scores=merging,
        )  # fmt: skip
        positions_BSK, _, *scores = parallel.unshare(found, S)
        if merging:
            positions_BSK = parallel.merge_selections(positions_BSK, *scores, cache.page_size)
        return index_plan(params, cache, positions_BSK, implementation, parallel), cache
