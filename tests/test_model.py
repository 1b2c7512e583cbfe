"""The model against transformers (golden files) and against itself: chunks, batches, patterns, plans."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

from ic_jax import cache as caches
from ic_jax import checkpoint, model, moe
from ic_jax.config import Config
from ic_jax.pattern import Pattern
from pallas_kernels import dispatch

WITH_INDEXER = ["glm_all_full", "glm_freq4_off3", "glm_pattern", "glm_indexer_types", "deepseek_yarn"]
# Products of other shapes round otherwise; the enlarged weights of these checkpoints amplify that to 0.4 to 1.1e-5 of
# the logits' scale (measured, jax 0.11.2 and 0.12.0). A wrong selection moves them by 1e-2 and more.
ROUNDING = 3e-5
TOLERANCE = 2e-4  # largest logit difference to transformers, float32; logits reach about 7


@functools.cache
def load(case, layers=None):
    """(config, float32 params, golden arrays) of a case; ``layers`` restricts the indexers held."""
    directory = GOLDEN / case
    config = Config.load(directory)
    held = checkpoint.indexer_layers(directory, config) if layers is None else layers
    params = checkpoint.load_params(directory, config, held, dtype="float32")
    return config, params, held, dict(np.load(directory / "golden.npz")) if (directory / "golden.npz").exists() else {}


STATIC = ("c", "all_logits", "dense", "implementation", "keep_selections")
forward_dynamic = jax.jit(model.forward, static_argnames=STATIC)
forward_static = jax.jit(model.forward, static_argnames=(*STATIC, "slots"))


def run(config, params, slots, ids, positions=None, cache=None, page_size=16, **options):
    """One call over whole sequences: (logits [B,S,W], selections [L,B,S,K], cache)."""
    ids = np.asarray(ids, np.int32)
    if positions is None:
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    if cache is None:
        n = 0 if "indexer" not in params else params["indexer"]["wk"].shape[0]
        cache = caches.allocate(config, n, len(ids), ids.shape[1], dtype=jnp.float32, page_size=page_size)
    f = forward_static if isinstance(slots, tuple) else forward_dynamic
    options = {"keep_selections": "indexer" in params, "all_logits": True} | options
    out = f(params, config, slots, ids, positions, cache, **options)
    return np.asarray(out.logits), None if out.selections_LBSK is None else np.asarray(out.selections_LBSK), out.cache


def sets(selections):
    """Selections as comparable sorted rows."""
    return np.sort(selections, -1)


@pytest.mark.parametrize("case", WITH_INDEXER)
@pytest.mark.parametrize("form", ["static", "data"])
def test_parity_with_transformers(case, form):
    config, params, held, golden = load(case)
    assert str(config.pattern) == str(golden["layer_types"])
    assert golden["input_ids"].shape[1] > 3 * config.index_topk
    slots = config.pattern.slots(held)
    slots = slots if form == "static" else np.array(slots, np.int32)
    logits, selections, _ = run(config, params, slots, golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE)
    full = list(config.pattern.full_layers)
    np.testing.assert_array_equal(sets(selections[full]), sets(golden["selected"]))
    np.testing.assert_array_equal(selections, selections[list(config.pattern.source)])


def test_dense_mla_parity_with_transformers():
    config, params, _, golden = load("glm4_lite_dense")
    assert not config.has_indexer
    logits, _, _ = run(config, params, (-1,) * config.num_hidden_layers, golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE)


def test_glm4_lite_with_an_indexer_is_the_same_model(tmp_path):
    """The architecture has no public implementation with an indexer: GLM-5's weights and fields under its name."""
    shutil.copytree(GOLDEN / "glm_all_full", tmp_path / "lite")
    path = tmp_path / "lite" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "glm4_moe_lite"}))
    config, params, held, _ = load(tmp_path / "lite")
    golden = load("glm_all_full")[3]
    assert config.has_indexer and config.model_type == "glm4_moe_lite" and held == (0, 1, 2, 3)
    logits, selections, _ = run(config, params, config.pattern.slots(held), golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE)
    np.testing.assert_array_equal(sets(selections), sets(golden["selected"]))


@pytest.mark.parametrize("case", ["glm_fused_experts", "glm_sharded"])
def test_other_storage_layouts_give_the_same_logits(case):
    config, params, held, _ = load(case)
    golden = load("glm_all_full")[3]
    logits, _, _ = run(config, params, config.pattern.slots(held), golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE)


def test_batch_of_different_lengths():
    golden = dict(np.load(GOLDEN / "glm_padded" / "golden.npz"))
    config, params, held, _ = load(str(golden["checkpoint"]))
    ids, lengths = golden["input_ids"], golden["lengths"]
    positions = np.where(np.arange(ids.shape[1]) < lengths[:, None], np.arange(ids.shape[1]), -1).astype(np.int32)
    assert lengths.min() < config.index_topk < lengths.max()
    slots = config.pattern.slots(held)
    logits, selections, _ = run(config, params, slots, ids, positions)
    full = list(config.pattern.full_layers)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(logits[b, :n], golden["logits"][b, :n], atol=TOLERANCE)
        np.testing.assert_array_equal(sets(selections[full, b, :n]), sets(golden["selected"][:, b, :n]))
        assert (selections[:, b, n:] == -1).all()
    last, _, _ = run(config, params, slots, ids, positions, all_logits=False)
    np.testing.assert_allclose(last, logits[np.arange(len(ids)), lengths - 1], atol=ROUNDING)


def reference_loop(config, params, held, ids):
    """All-full forward as a plain per-layer loop, with its own masks and softmax: what the scan must equal."""
    from ic_jax import attention, moe

    ids = jnp.asarray(ids)
    B, T = ids.shape
    tables = attention.rope_tables(config, jnp.broadcast_to(jnp.arange(T), (B, T)))
    x = params["embed_tokens"][ids]
    causal = jnp.tril(jnp.ones((T, T), bool))
    counts = {"dense": 0, "sparse": 0}
    selections = []
    for i, kind in enumerate(config.mlp_layer_types):
        p = {k: v[i] for k, v in params["layers"].items()}
        h, qa, q, latent = attention.project(config, p, x, tables)
        ip = {k: v[held.index(i)] for k, v in params["indexer"].items()}
        iq, w = attention.index_queries(config, ip, h, qa, tables)
        dots = jnp.einsum("bsij,btj->bsit", iq, attention.index_keys(config, ip, h, tables))
        scores = jnp.einsum("bsit,bsi->bst", jax.nn.relu(dots), w)
        scores = jnp.where(causal, scores, -jnp.inf)
        kth = jnp.sort(scores, -1)[..., -config.index_topk, None]
        mask = causal & (scores >= kth)
        selections.append(np.asarray(mask))
        s = jnp.einsum("bshu,btu->bhst", q, latent) * config.softmax_scale
        a = jax.nn.softmax(jnp.where(mask[:, None], s, -jnp.inf), -1)
        x = x + attention.output(p, jnp.einsum("bhst,btc->bshc", a, latent[..., : config.kv_lora_rank]))
        h = attention.rms_norm(x, p["post_attention_layernorm"], config.rms_norm_eps)
        n, counts[kind] = counts[kind], counts[kind] + 1
        if kind == "dense":
            x = x + moe.mlp({k: v[n] for k, v in params["dense"].items()}, h)
        else:
            one = jax.tree.map(lambda v, n=n: v[n], params["experts"])
            x = x + moe.experts(config, one, params["experts"], n, h)
    logits = attention.rms_norm(x, params["norm"], config.rms_norm_eps) @ params["lm_head"].T
    return np.asarray(logits), selections


def test_all_full_equals_an_unrolled_loop():
    config, params, held, golden = load("glm_all_full")
    want, masks = reference_loop(config, params, held, golden["input_ids"])
    logits, selections, _ = run(config, params, config.pattern.slots(held), golden["input_ids"])
    for layer, mask in enumerate(masks):
        for b, s in np.ndindex(mask.shape[:2]):
            row = selections[layer, b, s]
            np.testing.assert_array_equal(row[row >= 0], np.flatnonzero(mask[b, s]))
    # 1e-6 of the logits' scale; the loop sums in another order.
    np.testing.assert_allclose(logits, want, atol=1e-6 * np.abs(want).max() * 8)


def chunked(config, params, slots, ids, sizes, page_size=16, width=None, **options):
    """Logits and selections of a sequence fed in pieces of ``sizes``, padded to ``width`` (the largest)."""
    n, width = params["indexer"]["wk"].shape[0], width or max(sizes)
    cache = caches.allocate(config, n, len(ids), ids.shape[1] + width, dtype=jnp.float32, page_size=page_size)
    logits, selections, at = [], [], 0
    for size in sizes:
        part = np.zeros((len(ids), width), np.int32)
        part[:, :size] = ids[:, at : at + size]
        positions = np.where(np.arange(width) < size, at + np.arange(width), -1)
        positions = np.broadcast_to(positions, part.shape).astype(np.int32)
        out, chosen, cache = run(config, params, slots, part, positions, cache, **options)
        logits.append(out[:, :size]), selections.append(chosen[:, :, :size])
        at += size
    return np.concatenate(logits, 1), np.concatenate(selections, 2)


@pytest.mark.parametrize("size", [1, 7, 55])
def test_chunked_prefill_equals_one_pass(size):
    config, params, held, golden = load("glm_freq4_off3")
    ids, slots = golden["input_ids"], config.pattern.slots(held)
    T = ids.shape[1]
    want, chosen, _ = run(config, params, slots, ids)
    sizes = [size] * (T // size) + ([T % size] if T % size else [])
    logits, selections = chunked(config, params, slots, ids, sizes)
    np.testing.assert_allclose(logits, want, atol=ROUNDING * np.abs(want).max())
    np.testing.assert_array_equal(selections, chosen)


@settings(max_examples=6, derandomize=True, deadline=None)
@given(st.integers(0, 7), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_any_pattern_any_chunks(bits, sizes):
    """Patterns as data, on one compilation: chunked equals whole, and an S layer has its F layer's plan."""
    config, params, held, golden = load("glm_all_full")
    pattern = Pattern("F" + "".join("FS"[bits >> i & 1] for i in range(config.num_hidden_layers - 1)))
    ids = golden["input_ids"][:1]
    T, cuts = ids.shape[1], np.cumsum(sizes)
    sizes = [s for s, end in zip(sizes, cuts, strict=True) if end < T]
    sizes.append(T - sum(sizes))
    slots = np.array(pattern.slots(held), np.int32)
    want, chosen, _ = run(config, params, slots, ids)
    np.testing.assert_array_equal(chosen, chosen[list(pattern.source)])
    logits, selections = chunked(config, params, slots, ids, sizes, width=56)
    np.testing.assert_allclose(logits, want, atol=ROUNDING * np.abs(want).max())
    np.testing.assert_array_equal(selections, chosen)


def test_one_compilation_serves_every_pattern():
    config, params, held, golden = load("glm_all_full")
    ids = golden["input_ids"][:1]
    f = jax.jit(functools.partial(model.forward, c=config), static_argnames=())
    cache = caches.allocate(config, len(held), 1, ids.shape[1], dtype=jnp.float32, page_size=16)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    results = set()
    for letters in ("FFFF", "FSFS", "FSSS"):
        slots = np.array(Pattern(letters).slots(held), np.int32)
        out = f(params, slots=slots, ids_BS=ids, positions_BS=positions, cache=cache)
        results.add(np.asarray(out.logits).tobytes())
    assert f._cache_size() == 1 and len(results) == 3


def test_selections_per_step_are_counted():
    """An S layer that recomputes is a bug others shipped: the compiled program runs one selection a full layer."""
    config, params, held, golden = load("glm_freq4_off3")
    calls = []
    original = model.index_topk

    def counting(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return original(*args, **kwargs)

    model.index_topk = counting
    try:
        ids = golden["input_ids"]
        cache = caches.allocate(config, len(held), len(ids), ids.shape[1], dtype=jnp.float32, page_size=16)
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        for slots in (config.pattern.slots(held), np.array(config.pattern.slots(held), np.int32)):
            calls.clear()
            # A function of its own, so that it is traced with the counter in place.
            step = jax.jit(lambda *a, slots=slots: model.forward(a[0], config, slots, *a[1:]).logits)
            step(params, ids, positions, cache).block_until_ready()
            jax.effects_barrier()
            assert len(calls) == config.pattern.n_full
    finally:
        model.index_topk = original


def test_shared_layers_hold_nothing():
    config, params, held, _ = load("glm_freq4_off3")
    assert params["indexer"]["wk"].shape[0] == config.pattern.n_full == 5 < config.num_hidden_layers
    cache = caches.allocate(config, len(held), 1, 64, dtype=jnp.float32)
    assert cache.index_keys_GMJ.shape[0] == 5 and cache.latent_LMU.shape[0] == 12


def test_topk_at_least_context_equals_dense():
    config, params, held, golden = load("glm_pattern")
    wide, slots = config.replace(index_topk=4096), config.pattern.slots(held)
    sparse, _, _ = run(wide, params, slots, golden["input_ids"])
    dense, _, _ = run(config, params, slots, golden["input_ids"], dense=True, keep_selections=False)
    np.testing.assert_allclose(sparse, dense, atol=ROUNDING * np.abs(dense).max())
    assert np.abs(dense - golden["logits"]).max() > 0.1  # and the sparse path was really sparse


def test_rows_of_a_batch_and_pages_are_independent():
    """A sequence gives the same logits alone and beside others, whatever physical pages it lies on."""
    config, params, held, golden = load("glm_all_full")
    ids, slots = golden["input_ids"], config.pattern.slots(held)
    together, _, _ = run(config, params, slots, ids)
    for b in range(len(ids)):
        alone, _, _ = run(config, params, slots, ids[b : b + 1])
        np.testing.assert_allclose(together[b], alone[0], atol=ROUNDING * np.abs(alone).max())
    cache = caches.allocate(config, len(held), 2, ids.shape[1], dtype=jnp.float32, page_size=16)
    shuffled = np.random.default_rng(0).permutation(cache.page_table_BP.size).reshape(cache.page_table_BP.shape)
    moved, _, _ = run(config, params, slots, ids, cache=cache.replace(page_table_BP=jnp.asarray(shuffled, jnp.int32)))
    np.testing.assert_array_equal(moved, together)


def test_fp8_index_keys_select_almost_the_same():
    config, params, held, golden = load("glm_all_full")
    ids, slots = golden["input_ids"], config.pattern.slots(held)
    cache = caches.allocate(
        config, len(held), len(ids), ids.shape[1], dtype=jnp.float32, page_size=16, index_dtype=jnp.float8_e4m3fn
    )
    _, selections, out = run(config, params, slots, ids, cache=cache)
    assert out.index_keys_GMJ.dtype == jnp.float8_e4m3fn and out.index_scales_GM.shape == (4, out.latent_LMU.shape[1])
    want = golden["selected"][0]  # layer 0: later layers also see the first ones' differences
    hits = [len(np.intersect1d(a[a >= 0], b[b >= 0])) / (b >= 0).sum() for a, b in
            zip(selections[0].reshape(-1, 16), want.reshape(-1, 16), strict=True)]  # fmt: skip
    assert 0.9 < np.mean(hits) < 1.0


def test_config_of_every_golden_case_round_trips():
    for case in (*WITH_INDEXER, "glm4_lite_dense"):
        config = Config.load(GOLDEN / case)
        assert Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2)])
def test_router_against_numpy(norm, groups, kept):
    rng = np.random.default_rng(0)
    config = load("deepseek_yarn")[0].replace(norm_topk_prob=norm, n_group=groups, topk_group=kept)
    E, X = config.n_routed_experts, config.num_experts_per_tok
    x, gate, bias = rng.standard_normal((9, 12)), rng.standard_normal((E, 12)), rng.standard_normal(E)
    p = {"e_score_correction_bias": jnp.asarray(bias, jnp.float32)}
    experts, weights = moe.route(config, p, jnp.asarray(x @ gate.T, jnp.float32))
    for n in range(len(x)):
        scores = 1 / (1 + np.exp(-gate @ x[n]))
        steered = scores + bias  # the bias chooses, and does not weigh
        best_two = np.sort(steered.reshape(groups, -1), -1)[:, -2:].sum(-1)
        allowed = np.isin(np.arange(E) // (E // groups), np.argsort(-best_two)[:kept])
        chosen = np.argsort(-np.where(allowed, steered, -np.inf))[:X]
        np.testing.assert_array_equal(experts[n], chosen)
        want = scores[chosen] / (scores[chosen].sum() if norm else 1) * config.routed_scaling_factor
        np.testing.assert_allclose(weights[n], want, rtol=1e-5)


def test_few_tokens_choose_their_experts_as_top_k_does():
    """Ties, also of all, in one order whichever way they are found."""
    from ic_jax import moe

    rng = np.random.default_rng(0)
    biased, scores = (jnp.asarray(rng.integers(0, 5, (16, 12)) / 8 - 0.25, jnp.float32) for _ in range(2))
    biased = biased.at[0].set(0.5).at[1, 3:].set(-jnp.inf)
    experts, weights = moe._top(biased, scores, 4)
    np.testing.assert_array_equal(experts, jax.lax.top_k(biased, 4)[1])
    np.testing.assert_array_equal(weights, jnp.take_along_axis(scores, experts, -1))
    many = moe._top(jnp.tile(biased, (2, 1)), jnp.tile(scores, (2, 1)), 4)
    for few, all_of_them in zip((experts, weights), many, strict=True):
        np.testing.assert_array_equal(jnp.tile(few, (2, 1)), all_of_them)


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize("rows", [[[5]], [[24]], [[7, 24], [24, 2]]])
def test_writes_reach_their_rows_and_no_other(monkeypatch, rows, platform):
    """One row, one out of range, some of both, in each platform's way: the rest of the pools stays as it was."""
    cache = caches.allocate(load("deepseek_yarn")[0], 2, 1, 24, index_dtype="float8_e4m3fn", page_size=8)
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target(platform, ""))
    rows, rng = np.asarray(rows, np.int32), np.random.default_rng(0)
    draw = lambda a: rng.standard_normal((*rows.shape, *a.shape[2:])).astype(np.float32)
    values = [draw(a) for a in (cache.latent_LMU, cache.index_keys_GMJ, cache.index_scales_GM)]
    keys = jnp.asarray(values[1], jnp.float8_e4m3fn)
    got = jax.jit(lambda c: c.write_latents(1, rows, values[0]).write_index_keys(1, rows, keys, values[2]))(cache)
    values[:2] = jnp.asarray(values[0], jnp.bfloat16), keys
    for name, value in zip(("latent_LMU", "index_keys_GMJ", "index_scales_GM"), values, strict=True):
        want, value = np.array(getattr(cache, name), np.float32), np.asarray(value, np.float32)
        for at in np.ndindex(rows.shape):
            if rows[at] < 24:
                want[1, rows[at]] = value[at].reshape(want.shape[2:])
        np.testing.assert_array_equal(np.asarray(getattr(got, name), np.float32), want)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (257, 4), (1024, 2)])
def test_rows_are_sorted_by_expert(shape):
    held = 5
    experts_NX = np.random.default_rng(0).integers(0, held + 1, shape, np.int32)
    order_M = np.argsort(experts_NX.reshape(-1), kind="stable")
    token_M, place_NX, sizes_E = jax.jit(moe.by_expert, static_argnums=1)(experts_NX, held)
    np.testing.assert_array_equal(token_M, order_M // shape[1])
    np.testing.assert_array_equal(place_NX.reshape(-1), np.argsort(order_M))
    np.testing.assert_array_equal(sizes_E, np.bincount(experts_NX.reshape(-1), minlength=held + 1)[:held])


@pytest.mark.parametrize("interleave", [True, False])
def test_rope_is_a_rotation_of_the_named_pairs(interleave):
    from ic_jax import attention

    config = load("deepseek_yarn")[0]
    config = config.replace(rope=dataclasses.replace(config.rope, mscale=0.5, mscale_all_dim=1.0))
    R, position = config.qk_rope_head_dim, 37
    x = np.random.default_rng(1).standard_normal(R)
    tables = attention.rope_tables(config, jnp.full((1, 1), position))
    got = attention.rope(jnp.asarray(x, jnp.float32)[None, None], tables, interleave)
    factor = (0.05 * np.log(config.rope.factor) + 1) / (0.1 * np.log(config.rope.factor) + 1)
    assert config.rope.attention_factor == pytest.approx(factor)
    want = np.empty(R)
    for i, frequency in enumerate(config.rope.inv_freq(R)):
        a, b = (2 * i, 2 * i + 1) if interleave else (i, i + R // 2)
        turned = (x[a] + 1j * x[b]) * np.exp(1j * position * float(frequency)) * factor
        want[a], want[b] = turned.real, turned.imag
    np.testing.assert_allclose(got[0, 0], want, atol=1e-5)
