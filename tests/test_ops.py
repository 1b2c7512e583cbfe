"""One body for every implementation of every op, against the float64 oracle; cases of reference/kernels' known traps.

The Hopper kernels gather inside inline_mgpu, which no interpreter runs: on a CPU they are compiled (test_aot.py) and
skipped here; on a GPU this same file runs them. The TPU kernels run in Pallas's interpreter with race detection; a
race between DMAs and accesses fails the test; on a TPU they run there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from interpreted import interpreted
from jax.test_util import check_grads

import pallas_kernels
from pallas_kernels import dispatch, reference

PAGE = 256
J, U, C = 128, 576, 512  # the widths that every kernel takes
_WHY = {
    "gpu": "Hopper kernels gather inside inline_mgpu, which cannot be interpreted: needs a GPU",
    "tpu": "the interpreter of TPU kernels runs on a CPU",
}


def _params():
    able = {"gpu": ("gpu",), "tpu": ("tpu", "cpu")}
    for name in ("reference", "gpu", "tpu"):
        skip = name != "reference" and jax.default_backend() not in able[name]
        yield pytest.param(name, marks=pytest.mark.skipif(skip, reason=_WHY.get(name, "")))


implementations = pytest.mark.parametrize("implementation", list(_params()))


@pytest.fixture(autouse=True)
def _interpreter(request):
    """TPU cases on a CPU: in the interpreter, where a race raises."""
    chosen = getattr(request.node, "callspec", None) and request.node.callspec.params.get("implementation")
    if chosen == "tpu" and jax.default_backend() == "cpu":
        with interpreted():
            yield
    else:
        yield


def _laid_out(latent_LMU, implementation):
    """The pool with its rows as ``implementation`` wants them."""
    shape = pallas_kernels.latent_row_shape(latent_LMU.shape[-1], latent_LMU.dtype, implementation)
    return pallas_kernels.pack_rows(latent_LMU, shape)


def _pool(rng, lengths, keys_for, width, dtype, slots=3, slot=1, spare=3):
    """A pool whose pages are shuffled over more pages than needed; every other slot and row holds noise."""
    pages = max(-(-max(lengths) // PAGE), 1)
    table = rng.permutation(len(lengths) * pages + spare)[: len(lengths) * pages].reshape(len(lengths), pages)
    pool = rng.standard_normal((slots, (len(lengths) * pages + spare) * PAGE, width)).astype(np.float32)
    for b, n in enumerate(lengths):
        rows = table[b, np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE
        pool[slot, rows] = keys_for(b, n)
    return jnp.asarray(pool, dtype), table.astype(np.int32)


def _signed(scores_T, dtype):
    """Keys and the query that score exactly ``scores_T``: relu(x) - relu(-x) = x."""
    keys = np.zeros((len(scores_T), J), np.float32)
    keys[:, 0] = scores_T
    q = np.zeros((2, J), np.float32)
    q[0, 0], q[1, 0] = 1, -1
    return keys, jnp.asarray(q, dtype), np.array([1.0, -1.0], np.float32)


def _rows():
    rng = np.random.default_rng(0)
    n = 700
    bf16 = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)
    yield "normal", bf16(rng.standard_normal(n))
    yield "relu plateau", bf16(np.maximum(rng.standard_normal(n), 0))
    yield "zeros of both signs", np.where(rng.random(n) < 0.5, -0.0, 0.0).astype(np.float32)
    yield "narrow range", bf16(rng.uniform(1.0, 1.245, n))
    yield "all equal", np.full(n, 0.5, np.float32)
    yield "mostly negative", bf16(-np.abs(rng.standard_normal(n)) * 1e30)
    yield "-inf tail", np.where(np.arange(n) < 40, bf16(rng.standard_normal(n)), -np.inf).astype(np.float32)
    yield "nan tail", np.where(np.arange(n) < 40, bf16(rng.standard_normal(n)), np.nan).astype(np.float32)
    yield "huge", np.where(np.arange(n) % 90 == 0, bf16(3e38), bf16(rng.standard_normal(n))).astype(np.float32)


@implementations
@pytest.mark.parametrize("k", [64, 128])
@pytest.mark.parametrize(("name", "row"), list(_rows()), ids=lambda v: v if isinstance(v, str) else "")
def test_selection_is_exact_on_given_scores(implementation, name, row, k):
    rng = np.random.default_rng(1)
    keys, q, w = _signed(row, jnp.bfloat16)
    pool, table = _pool(rng, [len(row)], lambda b, n: keys, J, jnp.bfloat16)
    # Query positions around the k boundary (T < K, T = K, T = K + 1), a padding query, and the whole row.
    positions = np.array([[0, k - 2, k - 1, k, 300, -1, len(row) - 1]], np.int32)
    S = positions.shape[1]
    found, count = pallas_kernels.index_topk(
        jnp.tile(q, (1, S, 1, 1)), jnp.tile(w, (1, S, 1)), (pool, None), 1, table, positions,
        np.array([len(row)], np.int32), k=k, page_size=PAGE, implementation=implementation,
    )  # fmt: skip
    for s, position in enumerate(positions[0]):
        want = oracle.select(row[: position + 1], k)
        np.testing.assert_array_equal(np.asarray(found)[0, s], want, err_msg=f"{name}, position {position}")
        assert count[0, s] == min(position + 1, k)


def test_nan_scores_rank_lowest_and_keep_their_order():
    scores = np.array([1.0, np.nan, -np.inf, 2.0, np.nan, -1.0], np.float32)
    clean = np.asarray(reference.canonical(jnp.asarray(scores)))
    assert list(np.argsort(-clean, kind="stable")) == [3, 0, 5, 1, 2, 4]
    np.testing.assert_array_equal(oracle.select(scores, 4), [0, 1, 3, 5])


@implementations
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("heads", [4, 32])
def test_scores_and_selection_on_random_keys(implementation, dtype, heads):
    rng = np.random.default_rng(2)
    lengths, k, S = [900, 37, 520], 64, 5  # ragged, one shorter than k, S no multiple of a block
    pool, table = _pool(rng, lengths, lambda b, n: rng.standard_normal((n, J)), J, dtype)
    scales = jnp.asarray(rng.uniform(0.5, 2, pool.shape[:2]), jnp.float32) if dtype.startswith("float8") else None
    q = jnp.asarray(rng.standard_normal((3, S, heads, J)), dtype)
    w = jnp.asarray(rng.standard_normal((3, S, heads)), jnp.float32)
    positions = np.stack([np.arange(n - S, n) for n in lengths]).astype(np.int32)
    positions[2, 3:] = -1
    select = lambda: pallas_kernels.index_topk(
        q, w, (pool, scales), 1, table, positions, np.array(lengths, np.int32), k=k, page_size=PAGE,
        implementation=implementation,
    )  # fmt: skip
    if implementation != "reference" and dtype == "float32":
        with pytest.raises(NotImplementedError, match="queries are float32; bfloat16 or float8_e4m3fn is needed"):
            select()
        return
    found, count = select()
    for b, n in enumerate(lengths):
        rows = table[b, np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE
        keys = np.asarray(pool[1, rows], np.float64) * (1 if scales is None else np.asarray(scales)[1, rows, None])
        for s in range(S):
            limit = positions[b, s] + 1
            assert count[b, s] == min(limit, k)
            scores = oracle.index_scores(np.asarray(q[b, s], np.float64), np.asarray(w[b, s]), keys[:limit])
            got, want = np.asarray(found)[b, s], oracle.select(scores, k)
            assert (got[count[b, s] :] == -1).all() and (np.diff(got[: count[b, s]]) > 0).all()
            # Rows that differ from float64 lie within float32 rounding of the k-th score.
            wrong = np.setxor1d(got[got >= 0], want[want >= 0])
            kth = np.sort(scores)[::-1][min(limit, k) - 1] if limit > 0 else 0.0
            bound = 4e-6 * np.abs(np.asarray(w[b, s])).sum() * J
            assert (np.abs(scores[wrong] - kth) <= bound).all()
            assert len(wrong) <= 2


@implementations
@pytest.mark.parametrize("H", [1, 2, 5, 10, 20, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparse_mla(implementation, H, dtype):
    rng = np.random.default_rng(3)
    B, S, K, M = 2, 3, 128, 1024
    pool = jnp.asarray(rng.standard_normal((3, M, U)) * 0.5, dtype)
    q = jnp.asarray(rng.standard_normal((B, S, H, U)) * 0.5, dtype)
    rows = rng.permuted(np.tile(np.arange(M), (B, S, 1)), axis=-1)[..., :K].astype(np.int32)
    rows[0, 0, ::3] = -1  # holes anywhere
    rows[0, 1, 5:] = -1
    rows[1, 2] = -1  # an empty query
    laid_out = _laid_out(pool, implementation)
    attend = functools.partial(pallas_kernels.sparse_mla, q, laid_out, jnp.int32(1), rows, scale=0.05, value_dim=C)
    if implementation != "reference" and dtype == "float32":
        with pytest.raises(NotImplementedError, match="sparse_mla: .*bfloat16"):
            attend(implementation=implementation)
        return
    o, lse = attend(implementation=implementation)
    assert o.dtype == q.dtype and lse.dtype == jnp.float32
    assert (np.asarray(o[1, 2], np.float32) == 0).all() and (np.asarray(lse[1, 2]) == -np.inf).all()
    tolerance = {"float32": 2e-5, "bfloat16": 2e-2}[dtype]
    for b in range(B):
        for s in range(S):
            want, want_lse = oracle.sparse_mla(
                np.asarray(q[b, s], np.float64), np.asarray(pool[1], np.float64), rows[b, s], 0.05, C
            )
            np.testing.assert_allclose(np.asarray(o[b, s], np.float64), want, atol=tolerance * max(np.abs(want).max(), 1))
            np.testing.assert_allclose(np.asarray(lse[b, s]), want_lse, atol=1e-3 if dtype == "bfloat16" else 1e-4)


@implementations
def test_sparse_mla_merges_and_ignores_order(implementation):
    """Halves of a selection, merged by their lse, give the whole; the order of rows does not matter."""
    rng = np.random.default_rng(4)
    pool = jnp.asarray(rng.standard_normal((1, 512, U)) * 0.5, jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((1, 1, 20, U)) * 0.5, jnp.bfloat16)
    rows = rng.permutation(512)[:128].astype(np.int32)[None, None]
    run = functools.partial(
        pallas_kernels.sparse_mla, q, _laid_out(pool, implementation), 0, scale=0.05, value_dim=C,
        implementation=implementation,
    )
    o, lse = run(rows)
    o2, _ = run(np.sort(rows, -1))
    np.testing.assert_allclose(np.asarray(o, np.float32), np.asarray(o2, np.float32), atol=2e-2)
    left, right = rows.copy(), rows.copy()
    left[..., 64:], right[..., :64] = -1, -1
    (oa, la), (ob, lb) = run(left), run(right)
    total = np.logaddexp(np.asarray(la), np.asarray(lb))
    np.testing.assert_allclose(total, np.asarray(lse), atol=1e-3)
    merged = sum(np.asarray(o_, np.float32) * np.exp(np.asarray(l_) - total)[..., None] for o_, l_ in ((oa, la), (ob, lb)))
    np.testing.assert_allclose(merged, np.asarray(o, np.float32), atol=2e-2)


def test_dense_equals_sparse_over_everything():
    rng = np.random.default_rng(5)
    lengths, S, H = [300, 41], 4, 3
    pool, table = _pool(rng, lengths, lambda b, n: rng.standard_normal((n, U)) * 0.3, U, jnp.float32)
    q = jnp.asarray(rng.standard_normal((2, S, H, U)) * 0.3, jnp.float32)
    positions = np.stack([np.arange(n - S, n) for n in lengths]).astype(np.int32)
    positions[1, 3] = -1
    all_T = np.arange(max(lengths), dtype=np.int32)
    everything = np.where(all_T <= positions[..., None], all_T, -1)
    rows = reference.physical_rows(jnp.asarray(table), jnp.asarray(everything), PAGE)
    want, want_lse = pallas_kernels.sparse_mla(q, pool, 1, rows, scale=0.1, value_dim=C, implementation="reference")
    got, lse = pallas_kernels.dense_mla(
        q, pool, 1, table, positions, scale=0.1, value_dim=C, page_size=PAGE, implementation="reference"
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize("n", [3, 200])
def test_grouped_matmul(n):
    rng = np.random.default_rng(6)
    E, D, F = 8, 24, 40
    sizes = np.bincount(rng.integers(0, E - 1, n), minlength=E).astype(np.int32)  # the last expert gets nothing
    x, w = rng.standard_normal((n, D)).astype(np.float32), rng.standard_normal((2, E, D, F)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        got = pallas_kernels.grouped_matmul(jnp.asarray(x), jnp.asarray(w), jnp.int32(1), jnp.asarray(sizes))
        both = pallas_kernels.grouped_swiglu(jnp.asarray(x), jnp.asarray(w), jnp.asarray(-w), 1, jnp.asarray(sizes))
    want = oracle.grouped_matmul(x, w[1], sizes)
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_allclose(both, want / (1 + np.exp(-want)) * -want, atol=1e-3)


def test_sparse_mla_gradient_matches_finite_differences():
    rng = np.random.default_rng(7)
    q = jnp.asarray(rng.standard_normal((1, 2, 2, 24)), jnp.float32)
    pool = jnp.asarray(rng.standard_normal((1, 16, 24)), jnp.float32)
    rows = jnp.asarray([[[0, 3, -1, 5], [-1, -1, -1, -1]]], jnp.int32)  # the second query is empty

    def loss(q, pool):
        return pallas_kernels.sparse_mla(q, pool, 0, rows, scale=0.3, value_dim=16, implementation="reference")[0].sum()

    check_grads(loss, (q, pool), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@implementations
def test_sparse_mla_gradient(implementation):
    """Gradients of o and lse against the reference in float32; an empty query and -1 rows give zeros, not NaN."""
    rng = np.random.default_rng(8)
    B, S, H, K, M = 1, 3, 20, 128, 512
    q, pool = (jnp.asarray(rng.standard_normal(s) * 0.5, jnp.bfloat16) for s in ((B, S, H, U), (2, M, U)))
    rows = rng.permuted(np.tile(np.arange(M), (B, S, 1)), axis=-1)[..., :K].astype(np.int32)
    rows[0, 1, ::2], rows[0, 2] = -1, -1
    weight = jnp.asarray(rng.standard_normal((B, S, H, C)), jnp.float32)

    def loss(q, pool, implementation):
        pool = _laid_out(pool, implementation)
        o, lse = pallas_kernels.sparse_mla(q, pool, jnp.int32(1), rows, scale=0.05, implementation=implementation)
        return (o.astype(jnp.float32) * weight).sum() + jnp.where(lse > -jnp.inf, lse, 0.0).sum()

    got = jax.grad(loss, (0, 1))(q, pool, implementation)
    want = jax.grad(loss, (0, 1))(q.astype(jnp.float32), pool.astype(jnp.float32), "reference")
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b) > 0
    assert (np.asarray(got[0][0, 2], np.float32) == 0).all() and (np.asarray(got[1][0], np.float32) == 0).all()


def test_forced_implementation_says_why_it_cannot_run():
    q = jnp.zeros((1, 1, 4, U), jnp.bfloat16)
    pool, rows = jnp.zeros((1, 64, U), jnp.bfloat16), jnp.zeros((1, 1, 64), jnp.int32)
    missing = "tpu" if jax.default_backend() == "gpu" else "gpu"
    with pytest.raises(NotImplementedError, match=f"sparse_mla: implementation={missing}: needs a {missing.upper()}"):
        pallas_kernels.sparse_mla(q, pool, 0, rows, scale=1.0, implementation=missing)
    with pytest.raises(ValueError, match="implementation must be one of"):
        pallas_kernels.sparse_mla(q, pool, 0, rows, scale=1.0, implementation="cuda")
    assert dispatch.reason_against("dense_mla", "gpu").startswith("no gpu kernel")


@pytest.mark.parametrize(("last", "scored"), [(30, False), (63, False), (64, True)])
def test_nothing_is_scored_while_every_query_sees_at_most_k(last, scored, monkeypatch):
    """The last query sees ``last`` + 1 tokens, k is 64; a callback counts the tiles that are scored as the program runs."""
    tiles, scores = [], reference.index_scores

    def counted(*args):
        jax.debug.callback(lambda: tiles.append(1))
        return scores(*args)

    monkeypatch.setattr(reference, "index_scores", counted)
    rng = np.random.default_rng(7)
    pool, table = _pool(rng, [200], lambda b, n: rng.standard_normal((n, J)), J, jnp.float32)
    positions = np.array([[last - 2, last - 1, last, -1]], np.int32)
    run = jax.jit(functools.partial(reference.index_topk, k=64, page_size=PAGE))
    q, w = rng.standard_normal((1, 4, 2, J)).astype(np.float32), np.ones((1, 4, 2), np.float32)
    _, count = run(q, w, (pool, None), 1, table, positions, np.array([last + 1], np.int32))
    jax.effects_barrier()
    assert bool(tiles) == scored
    assert count.tolist() == [[min(last - 1, 64), min(last, 64), min(last + 1, 64), 0]]


def test_hopper_scoring_skips_blocks_that_see_at_most_k_keys(monkeypatch):
    """What the kernel is told: no keys for a block of queries that all see at most k, as index_topk_gpu passes it."""
    from pallas_kernels import index_scores_gpu, index_topk_gpu

    limits = []

    def kernel(body, out_type, **kwargs):
        def run(*operands):
            limits.append(np.asarray(operands[-1]))
            return jnp.zeros(out_type.shape, out_type.dtype)

        return run

    def topk(scores_RT, limit_R, *, k):
        return jnp.zeros((len(limit_R), k), jnp.int32), limit_R

    monkeypatch.setattr(index_scores_gpu.plgpu, "kernel", kernel)
    monkeypatch.setattr(index_topk_gpu, "topk", topk)
    k, S = 64, 128
    block = index_scores_gpu.plan(S, 32, 2 * PAGE, PAGE, 2, 1).queries
    assert S % block == 0
    q, w = jnp.zeros((1, S, 32, J), jnp.bfloat16), jnp.zeros((1, S, 32))
    pool = jnp.zeros((1, 2 * PAGE, J), jnp.bfloat16), None
    with jax.disable_jit():
        for start in (0, 10):
            positions = start + np.arange(S, dtype=np.int32)[None]
            index_topk_gpu.index_topk(
                q, w, pool, 0, np.arange(2, dtype=np.int32)[None], positions, np.array([S + start]), k=k, page_size=PAGE
            )
    for start, limit in zip((0, 10), limits, strict=True):
        seen = start + np.arange(block, S + 1, block)  # by the last query of each block
        np.testing.assert_array_equal(limit, np.where(seen <= k, 0, seen))
        assert (limit == 0).any() and (limit > 0).any()


def _small():
    """Arguments of index_topk and sparse_mla that fit together; for nothing but their shapes."""
    keys, pages = np.zeros((2, 64, 8), np.float32), np.arange(4, dtype=np.int32).reshape(2, 2)
    query = (np.zeros((2, 3, 2, 8), np.float32), np.zeros((2, 3, 2), np.float32))
    at = np.tile(np.arange(3, dtype=np.int32), (2, 1))
    topk = (*query, (keys, None), 1, pages, at, np.full(2, 3, np.int32))
    return topk, (np.zeros((2, 3, 4, 8), np.float32), keys, 1), pages, at


def _wrong_calls():
    topk, mla, pages, at = _small()
    swapped = lambda args, i, value: (*args[:i], value, *args[i + 1 :])
    select = lambda *args, k=2: pallas_kernels.index_topk(*args, k=k, page_size=16)
    sparse = lambda *args, value_dim=4: pallas_kernels.sparse_mla(*args, scale=1.0, value_dim=value_dim)
    dense = lambda *args, **how: pallas_kernels.dense_mla(*args, scale=1.0, page_size=16, value_dim=4, **how)
    x, w, one = np.zeros((2, 6), np.float32), np.zeros((2, 3, 6, 5), np.float32), np.zeros((2, 1), np.float32)
    stack, sizes = np.zeros((2, 5, 6), np.float32), np.array([1, 1, 0], np.int32)
    rows = np.zeros((2, 3, 2), np.int32)
    shapes = "shapes do not agree: q_BSIJ "
    yield "weights turned", select, swapped(topk, 1, topk[1].swapaxes(0, 1)), {}, shapes
    yield "one weight", select, swapped(topk, 1, topk[1][..., :1]), {}, shapes
    yield "a key of one column", select, swapped(topk, 2, (topk[2][0][..., :1], None)), {}, shapes
    yield "keys alone", select, swapped(topk, 2, topk[2][0]), {}, shapes
    yield "another batch", select, swapped(topk, 4, pages[:1]), {}, shapes
    yield "no such slot", select, swapped(topk, 3, 2), {}, "slot 2 is outside 0..1"
    yield "slot -1", select, swapped(topk, 3, np.int32(-1)), {}, "slot -1 is outside 0..1"
    yield "k of 0", select, topk, dict(k=0), "nothing to select: k is 0"
    empty = (*(a[:0] for a in topk[:2]), *topk[2:4], *(a[:0] for a in topk[4:]))
    yield "no sequence", select, empty, {}, r"nothing to select: k is 2, positions_BS \(0, 3\)"
    yield "rows turned", sparse, (*mla, rows.swapaxes(0, 1)), {}, "shapes do not agree: q_BSHU "
    yield "narrow queries", sparse, (mla[0][..., :6], *mla[1:], rows), {}, "shapes do not agree: q_BSHU "
    yield "wide values", sparse, (*mla, rows), dict(value_dim=512), "value_dim 512 is outside 1..8"
    yield "no such layer", sparse, (*mla[:2], 2, rows), {}, "layer 2 is outside 0..1"
    yield "positions turned", dense, (*mla, pages, at.T), {}, "shapes do not agree: q_BSHU "
    yield "unknown", dense, (*mla, pages, at), dict(implementation="cuda"), "implementation must be one of"
    yield "one table", pallas_kernels.plan_rows, (rows, pages[:1], 4, mla[1]), dict(page_size=16), "shapes do not agree"
    yield "one column", pallas_kernels.grouped_matmul, (one, w, 1, sizes), {}, "shapes do not agree: x_ND "
    yield "one up column", pallas_kernels.grouped_swiglu, (x, w, w[..., :1], 1, sizes), {}, "shapes do not agree: x_ND "
    yield "no such experts", pallas_kernels.grouped_matmul, (x, w, 2, sizes), {}, "layer 2 is outside 0..1"
    yield "one column of D", pallas_kernels.layer_matmul, (one, stack, 1), {}, r"x \(2, 1\) does not end in the \(6,\)"
    yield "one head", pallas_kernels.layer_matmul, (x[:, None], w.swapaxes(2, 3), 1), {}, r"does not end in the \(3, 6\)"
    more = dict(add=np.zeros((2, 5)), norm=(np.ones((2, 6)), 0), eps=1e-5)
    yield "add behind a norm", pallas_kernels.layer_matmul, (x, stack, 1), more, "add goes with a single stack"
    yield "one row", pallas_kernels.expert_matmul, (one, w, 1, np.zeros(2, int)), {}, r"x \(2, 1\) does not fit the 3"
    yield "two of three", pallas_kernels.expert_matmul, (x, w, 1), {}, r"x \(2, 6\) does not fit the 3 matrices of 6"


@pytest.mark.parametrize(("call", "args", "how", "message"), [pytest.param(*c, id=name) for name, *c in _wrong_calls()])
def test_arguments_that_do_not_fit_are_said(call, args, how, message):
    with pytest.raises(ValueError, match=message):
        call(*args, **how)


def test_dense_mla_takes_a_forced_kernel_that_it_has_not():
    _, mla, pages, at = _small()
    run = functools.partial(pallas_kernels.dense_mla, *mla, pages, at, scale=1.0, page_size=16, value_dim=4)
    np.testing.assert_array_equal(run(implementation="gpu")[1], run(implementation="reference")[1])


def test_numpy_pools_are_taken():
    (q, w, (keys, _), *rest), mla, pages, at = _small()
    rng = np.random.default_rng(9)
    keys, q, latent_q = (rng.standard_normal(a.shape).astype(np.float32) for a in (keys, q, mla[0]))
    for where in (np.asarray, jnp.asarray):
        pool = where(keys), where(np.ones(keys.shape[:2], np.float32))
        how = dict(k=2, page_size=16, return_scores=True, implementation="reference")
        positions, _, scores = pallas_kernels.index_topk(q, w + 1, pool, *rest, **how)
        how = dict(scale=1.0, page_size=16, value_dim=4, implementation="reference")
        _, lse = pallas_kernels.dense_mla(latent_q, where(keys), 1, pages, at, **how)
        if where is np.asarray:
            want = positions, scores, lse
    jax.tree.map(np.testing.assert_array_equal, (positions, scores, lse), want)


@pytest.mark.parametrize("n", [2, 200])
def test_results_have_the_dtype_of_x_whatever_that_of_the_weights(n):
    rng = np.random.default_rng(10)
    x = jnp.asarray(rng.standard_normal((n, 24)), jnp.bfloat16)
    w, stack, sizes = jnp.ones((2, 8, 24, 40)), jnp.ones((2, 40, 24)), np.array([n] + [0] * 7, np.int32)
    how = dict(implementation="reference")
    assert pallas_kernels.grouped_matmul(x, w, 1, sizes, **how).dtype == jnp.bfloat16
    assert pallas_kernels.layer_matmul(x, stack, 1, **how).dtype == jnp.bfloat16
    assert pallas_kernels.layer_matmul(x, stack, 1, dtype=jnp.float32, **how).dtype == jnp.float32
    assert pallas_kernels.expert_matmul(jnp.tile(x[:, None], (1, 8, 1)), w, 1, **how).dtype == jnp.bfloat16
    assert pallas_kernels.rms_norm(x, stack[0, 0], 1e-6).dtype == jnp.bfloat16
