"""What index_topk_gpu does around its two kernels, which stand in here as jnp: chunks, batches, scores returned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import index_topk_gpu, reference
from pallas_kernels.index_scores_gpu import padded_queries, plan

PAGE, J = 64, 128


def index_scores(q, w, index_pool, slot, table, positions, lengths, *, page_size, min_limit=0):
    """Unwritten entries are NaN, as a workspace may hold anything; so is a whole block that sees <= min_limit keys."""
    keys, _ = index_pool
    T = table.shape[1] * page_size
    rows = reference.physical_rows(table, jnp.broadcast_to(jnp.arange(T), (len(table), T)), page_size)
    scores = jax.vmap(lambda q, w, rows: reference.index_scores(q, w, keys[slot, rows]))(q, w, rows)
    limit = jnp.minimum(positions + 1, lengths[:, None])
    blocks = plan(q.shape[1], q.shape[2], T, page_size, 2, len(q))
    pad = padded_queries(q.shape[1], blocks) - q.shape[1]
    most = jnp.pad(limit, ((0, 0), (0, pad))).reshape(len(q), -1, blocks.queries).max(-1)
    skipped = jnp.repeat(most <= min_limit, blocks.queries, 1)[:, : q.shape[1]]
    return jnp.where((jnp.arange(T) < limit[..., None]) & ~skipped[..., None], scores, jnp.nan)


def topk(scores, limit, *, k):
    at = jnp.arange(scores.shape[1])
    _, best = jax.lax.top_k(jnp.where(at < limit[:, None], reference.canonical(scores), -jnp.inf), k)
    best = jnp.sort(jnp.where(jnp.arange(k) < limit[:, None], best, scores.shape[1]), -1)
    short = jnp.where(jnp.arange(k) < limit[:, None], jnp.arange(k), -1)
    return jnp.where(limit[:, None] > k, best, short).astype(jnp.int32), jnp.minimum(limit, k)


@pytest.mark.parametrize("workspace", [2**29, 40 * 640 * 4, 1])
@pytest.mark.parametrize(("pages", "k"), [(10, 48), (1, 64)])
def test_scores_stand_beside_their_positions(monkeypatch, workspace, pages, k):
    """One chunk, several, and one sequence at a time; more cached tokens than k, and no more."""
    monkeypatch.setattr(index_topk_gpu, "index_scores", index_scores)
    monkeypatch.setattr(index_topk_gpu, "topk", topk)
    monkeypatch.setattr(index_topk_gpu, "WORKSPACE_BYTES", workspace)
    rng = np.random.default_rng(0)
    B, S, lengths = 2, 37, np.array([pages * PAGE - 5, PAGE - 20], np.int32)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    q, w, pool = draw(B, S, 8, J), draw(B, S, 8).astype(jnp.float32), (draw(2, 2 * pages * PAGE, J), None)
    table = rng.permutation(2 * pages).reshape(2, -1).astype(np.int32)
    positions = (lengths[:, None] - S + np.arange(S)).astype(np.int32)
    positions[1, :3] = -1
    args, how = (q, w, pool, jnp.int32(1), table, positions, lengths), dict(k=k, page_size=PAGE)
    selected, count, scores = index_topk_gpu.index_topk(*args, **how, return_scores=True)
    for got, want in zip(index_topk_gpu.index_topk(*args, **how), (selected, count), strict=True):
        np.testing.assert_array_equal(got, want)
    want, want_count = reference.index_topk(*args, **how)
    np.testing.assert_array_equal(selected, want)
    np.testing.assert_array_equal(count, want_count)
    there = np.asarray(selected) >= 0
    want = reference.scores_at(*args[:5], selected, PAGE)
    np.testing.assert_allclose(np.asarray(scores)[there], np.asarray(want)[there], atol=1e-4)
    assert there.any() and not there.all()
