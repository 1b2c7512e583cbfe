"""Groups of neighbouring queries: what they hold, that attention over them is exact, and their place in the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simt
import small_models

from ic_jax import cache as caches
from ic_jax import model
from pallas_kernels import (
    dispatch,
    radix_gpu,
    reference,
    row_groups_gpu,
    row_plan,
    sparse_mla,
    sparse_mla_grouped_gpu,
)

PAGE = 16


def selections(rng, B, S, K, T, share=0.7):
    """positions [B,S,K], ascending, of which neighbours keep the share; holes, an empty and a short query."""
    positions = np.full((B, S, K), -1, np.int32)
    for b in range(B):
        chosen = rng.permutation(T)[:K]
        for s in range(S):
            fresh = np.setdiff1d(np.arange(T), chosen)
            chosen = np.concatenate([rng.permutation(chosen)[: int(share * K)], rng.permutation(fresh)])[:K]
            positions[b, s] = np.sort(chosen)
    positions[0, 1, ::3] = -1
    positions[-1, 0] = -1
    positions[-1, S - 1, K // 2 :] = -1
    table = rng.permutation(B * (T // PAGE) + 2)[: B * (T // PAGE)].reshape(B, -1).astype(np.int32)
    return positions, table


def expected(positions, table, g):
    """(rows, owners, count) of every group, in sequence order, by sets."""
    B, S, K = positions.shape
    for b in range(B):
        for first in range(0, S, g):
            owners = {}
            for s, chosen in enumerate(positions[b, first : first + g]):
                for t in chosen[chosen >= 0].tolist():
                    owners[t] = owners.get(t, 0) | 1 << s
            union = sorted(owners)
            tail = g * K - len(union)
            rows = [table[b, t // PAGE] * PAGE + t % PAGE for t in union]
            yield rows + [-1] * tail, [owners[t] for t in union] + [0] * tail, len(union)


CASES = [(1, 7, 12, 64, 3), (2, 7, 12, 64, 3), (3, 4, 8, 48, 16), (2, 6, 8, 48, 2)]  # B, S, K, T, g: ragged last groups


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_are_unions_with_their_owners(case):
    *shape, g = case
    positions, table = selections(np.random.default_rng(0), *shape)
    groups = row_plan.sort_groups(jnp.asarray(positions), jnp.asarray(table), g, page_size=PAGE)
    rows, owners, count = (np.array(x) for x in zip(*expected(positions, table, g), strict=True))
    np.testing.assert_array_equal(groups.rows_GU, rows)
    np.testing.assert_array_equal(groups.owners_GU, owners)
    np.testing.assert_array_equal(groups.count_G, count)
    lists = row_plan.physical_rows(jnp.asarray(table), jnp.asarray(positions), PAGE)
    again = np.sort(row_plan.ungroup(groups, positions.shape), -1)
    np.testing.assert_array_equal(again[..., -shape[2] :], np.sort(lists, -1))
    assert (again[..., : -shape[2]] == -1).all()


def test_attention_over_groups_is_exact():
    rng = np.random.default_rng(1)
    B, S, K, T, g = CASES[1]
    positions, table = selections(rng, B, S, K, T)
    groups = row_plan.sort_groups(jnp.asarray(positions), jnp.asarray(table), g, page_size=PAGE)
    rows = row_plan.physical_rows(jnp.asarray(table), jnp.asarray(positions), PAGE)
    q = jnp.asarray(rng.standard_normal((B, S, 3, 24)), jnp.float32)
    pool = jnp.asarray(rng.standard_normal((2, 160, 24)), jnp.float32)
    run = functools.partial(sparse_mla, q, pool, 1, scale=0.3, value_dim=16, implementation="reference")
    want, got = run(rows), run(row_plan.RowPlan(rows, groups))
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)
    assert (np.asarray(got[0][-1, 0]) == 0).all() and (np.asarray(got[1][-1, 0]) == -np.inf).all()
    wrong = groups._replace(owners_GU=groups.owners_GU | 1)  # the comparison can fail
    assert np.abs(run(row_plan.RowPlan(rows, wrong))[0] - want[0]).max() > 1e-2


@pytest.mark.parametrize("static", [True, False])
def test_model_builds_groups_once_a_full_layer_and_gives_the_same(monkeypatch, static):
    """Chunks of 11 tokens of two sequences, beyond top-k, groups of 3: as without groups, to rounding."""
    built, pattern = [], "FSSFSS"

    def grouped(positions_BSK, page_table_BP, heads, pool, *, page_size):
        jax.debug.callback(lambda: built.append(1))
        rows = reference.physical_rows(page_table_BP, positions_BSK, page_size)
        return row_plan.RowPlan(rows, row_plan.sort_groups(positions_BSK, page_table_BP, 3, page_size=page_size))

    lm = small_models.random_lm()
    c, params = lm.config, lm.engine.params
    slots = tuple(i if kind == "F" else -1 for i, kind in enumerate(pattern))
    ids = np.random.default_rng(2).integers(3, 96, (2, 33)).astype(np.int32)

    def run():
        cache = caches.allocate(c, c.num_hidden_layers, 2, 48, dtype=jnp.float32, page_size=PAGE)
        cache = cache.replace(page_table_BP=jnp.asarray([[5, 0, 3], [4, 1, 2]], jnp.int32))
        options = dict(all_logits=True, keep_selections=True, implementation="reference")
        f = jax.jit(functools.partial(model.forward, c=c, **options, **(dict(slots=slots) if static else {})))
        outs, start = [], 0
        for stop in (11, 22, 33):
            positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (2, stop - start))
            given = {} if static else dict(slots=np.array(slots, np.int32))
            out = f(params, ids_BS=ids[:, start:stop], positions_BS=positions, cache=cache, **given)
            cache, start = out.cache, stop
            outs.append((np.asarray(out.logits), np.asarray(out.selections_LBSK)))
        jax.effects_barrier()
        return outs

    with jax.default_matmul_precision("highest"):  # a GPU would round products to TF32, and select other tokens
        want = run()
        monkeypatch.setattr(reference, "plan_rows", grouped)
        got = run()
    assert len(built) == 3 * pattern.count("F")
    for (logits, selected), (want_logits, want_selected) in zip(got, want, strict=True):
        np.testing.assert_array_equal(selected, want_selected)
        np.testing.assert_allclose(logits, want_logits, atol=1e-4 * np.abs(want_logits).max())


def test_why_queries_are_not_grouped():
    spec = lambda *s, kind=jnp.int32: jax.ShapeDtypeStruct(s, kind)
    pool = spec(2, 4096, 576, kind=jnp.bfloat16)

    def why(S, heads, pool=pool):
        return sparse_mla_grouped_gpu.supported(spec(1, S, 2048), spec(1, 16), heads, pool, page_size=256)

    assert why(4096, 20) is None
    assert "nothing to share" in why(4096, 64)
    assert "no neighbour" in why(1, 20)
    assert "bfloat16" in why(4096, 20, spec(2, 4096, 576, kind=jnp.float32))
    assert dispatch.choose("plan_rows", "auto", spec(1, 1, 8), spec(1, 1), 20, pool, page_size=256) == "reference"


@pytest.mark.parametrize("g", [1, 3, 7, 16])
def test_bitmaps_of_the_hopper_kernel_give_the_same_groups(monkeypatch, g):
    """Its code, word for word, over a simulated block (tests/simt.py): three windows, ties, holes, ragged groups."""
    simt.patch(monkeypatch, radix_gpu, row_groups_gpu)
    K, T, S = 600, 3 * 65536 - 4096, g + (g + 1) // 2
    rng = np.random.default_rng(g)
    lists = np.sort(rng.permuted(np.tile(rng.permutation(T)[: 2 * K], (S, 1)), axis=-1)[:, :K], -1).astype(np.int32)
    lists[0] = np.arange(K) + 65536 - K // 2  # a dense run across two windows
    lists[:, ::7] = -1
    lists[S - 1] = -1
    words = row_groups_gpu.window_words(g, 65536)
    want = list(expected(lists[None], np.arange(T // PAGE, dtype=np.int32)[None], g))
    for group, (rows, owners, count) in enumerate(want):
        mine = lists[group * g : (group + 1) * g]
        flat = mine.view(np.uint32).ravel()
        shared = (simt.Shared(n) for n in (g * words, words, 64))
        builder = row_groups_gpu.GroupBuilder(*shared, simt.Word(np.arange(512)), g=g, K=K, words=words)
        got = np.full((2, g * K), -1)

        def load4(at, flat=flat):
            return [simt.Word(flat[np.minimum(at.v + j, flat.size - 1)]) for j in range(4)]

        def store(rank, position, bits, got=got):
            at = rank.v[simt.active()]
            assert (got[:, at] == -1).all()  # every entry is written once
            got[:, at] = position.v[simt.active()], bits.v[simt.active()]

        found = builder.build(simt.Word(len(mine)), load4, T, store)
        assert (found.v == count).all()
        np.testing.assert_array_equal(got[:, :count], np.array([rows, owners])[:, :count])
        assert (got[:, count:] == -1).all()
