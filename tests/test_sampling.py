"""Sampling against a NumPy oracle: which tokens a filter keeps, how often each is drawn, and what a draw depends on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ic_jax.errors import UserError
from ic_jax.sampling import Batch, SamplingParams, batch, keys_at, sample


def allowed(logits_W, p: SamplingParams):
    """float64 oracle: probability of each token after temperature, top-k, top-p and min-p, with loops."""
    x = np.asarray(logits_W, np.float64) / p.temperature
    weight = np.exp(x - x.max())
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    order = order[: p.top_k] if p.top_k else order
    total, running, kept = sum(weight[i] for i in order), 0.0, []
    for i in order:
        if p.top_p < 1 and running >= p.top_p * total:
            break
        running += weight[i]
        if weight[i] >= p.min_p:
            kept.append(i)
    out = np.zeros(len(x))
    out[kept] = weight[kept]
    return out / out.sum()


def draw(logits_BW, positions_B, b: Batch):
    return np.asarray(sample(np.float32(logits_BW), keys_at(b.seeds_B2, np.int32(positions_B)), *b[1:]))


def repeated(p: SamplingParams, n):
    return Batch(*(np.repeat(a, n, 0) for a in batch([p])))


def draws(logits_W, p: SamplingParams, n=20000):
    """Share of each token in ``n`` draws at different positions."""
    ids = draw(np.tile(np.float32(logits_W), (n, 1)), np.arange(n), repeated(p, n))
    return np.bincount(ids, minlength=len(logits_W)) / n


def one(logits_W, p: SamplingParams, position=0):
    return int(draw(np.asarray(logits_W)[None], [position], batch([p]))[0])


LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 3.0, 0.0, 1.5, -8.0])


@pytest.mark.parametrize(
    "fields",
    [
        {}, dict(temperature=0.5), dict(temperature=2.0), dict(top_k=1), dict(top_k=2), dict(top_k=3), dict(top_k=100),
        dict(top_p=0.3), dict(top_p=0.7), dict(top_p=0.999), dict(top_p=1e-6), dict(min_p=0.2), dict(min_p=1.0),
        dict(top_k=5, top_p=0.8), dict(top_k=4, top_p=0.9, min_p=0.3, temperature=1.7),
    ],
    ids=str,
)  # fmt: skip
def test_distribution_and_support(fields):
    p = SamplingParams(**{"temperature": 1.0, "seed": 3, **fields})
    expected, got = allowed(LOGITS, p), draws(LOGITS, p)
    assert (got[expected == 0] == 0).all()
    # 20,000 draws: five standard deviations of a share are below 0.018.
    assert np.abs(got - expected).max() < 0.018
    if (expected > 0).sum() > 1:
        assert (got > 0).sum() > 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-6, 6), min_size=16, max_size=16),
    st.integers(0, 17),
    st.floats(0.05, 1.0),
    st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    st.integers(0, 2**64 - 1),
)
def test_a_draw_comes_from_the_allowed_set(logits, top_k, top_p, min_p, seed):
    # Irrational steps keep cumulative sums off the threshold, where float32 and float64 may differ.
    logits = np.float32(np.array(logits) * 0.7310585)
    p = SamplingParams(temperature=1.3, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    ids = np.unique(draw(np.tile(logits, (64, 1)), np.arange(64), repeated(p, 64)))
    assert (allowed(logits, p)[ids] > 0).all()


def test_greedy_takes_the_lowest_of_equal_ids_and_ignores_filters():
    assert one(LOGITS, SamplingParams(top_k=3, top_p=0.1, seed=9)) == 1
    assert one(np.zeros(5), SamplingParams()) == 0
    assert one([-np.inf, -np.inf, -5.0], SamplingParams()) == 2


def test_equal_logits_rank_by_id():
    assert set(np.flatnonzero(draws(np.zeros(50), SamplingParams(temperature=1.0, top_k=3)))) == {0, 1, 2}
    assert set(np.flatnonzero(draws(np.zeros(50), SamplingParams(temperature=1.0, top_p=0.039)))) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e30])
def test_extreme_temperatures(temperature):
    got = draws([0.0, 5.0, 4.0, -np.inf], SamplingParams(temperature=temperature), n=3000)
    assert got[3] == 0
    if temperature < 1:
        assert got[1] == 1
    else:
        assert np.abs(got[:3] - 1 / 3).max() < 0.05


def test_masked_tokens_are_never_drawn():
    assert draws([-np.inf, 0.0, -np.inf, 0.0], SamplingParams(temperature=1.0, top_p=0.99))[[0, 2]].sum() == 0


def test_a_sequence_does_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(0)
    logits_BW = rng.normal(size=(7, 300)).astype(np.float32)
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k, min_p=m, seed=s)
        for t, p, k, m, s in [
            (0, 1, 0, 0, 0), (1, 1, 0, 0, 1), (1, 0.9, 0, 0, 1), (2, 1, 5, 0, 2**40 + 1), (1, 1, 0, 0.1, 7),
            (0.7, 0.8, 40, 0.05, 8), (1, 1, 0, 0, 2**64 - 1),
        ]
    ]  # fmt: skip
    positions_B = np.array([5, 0, 900, 3, 3, 2**20, 1], np.int32)
    together = draw(logits_BW, positions_B, batch(params))
    alone = [one(logits_BW[b], params[b], positions_B[b]) for b in range(7)]
    assert together.tolist() == alone
    order = np.array([3, 1, 6, 0, 5, 2, 4])
    shuffled = draw(logits_BW[order], positions_B[order], batch([params[b] for b in order]))
    assert shuffled.tolist() == together[order].tolist()
    assert together.dtype == np.int32


def test_seed_and_position_decide():
    flat = np.zeros(1000)
    hot = [SamplingParams(temperature=1.0, seed=s) for s in (0, 1, 2**32, 2**63)]
    assert len({one(flat, p) for p in hot}) == 4
    assert len({one(flat, hot[0], position) for position in range(20)}) > 15
    assert one(flat, hot[0], 4) == one(flat, hot[0], 4)


def test_an_unneeded_filter_changes_nothing():
    rng = np.random.default_rng(1)
    for position in range(20):
        logits = rng.normal(size=200)
        plain = SamplingParams(temperature=1.0, seed=5)
        assert one(logits, plain, position) == one(logits, SamplingParams(temperature=1.0, seed=5, top_k=200), position)


def test_values_are_data():
    before = sample._cache_size()
    for fields in ({}, dict(temperature=1.0), dict(temperature=0.5, top_p=0.5), dict(temperature=0.5, top_k=3)):
        draw(np.zeros((2, 11)), [0, 1], repeated(SamplingParams(**fields), 2))
    assert sample._cache_size() == before + 1


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=-0.1), dict(temperature=float("nan")), dict(temperature=float("inf")), dict(temperature="hot"),
        dict(temperature=None), dict(top_p=0), dict(top_p=1.01), dict(top_p=float("nan")), dict(top_k=-1),
        dict(top_k=1.5), dict(top_k=2**31), dict(min_p=-0.1), dict(min_p=1.5), dict(min_p=float("nan")), dict(seed=-1),
        dict(seed=2**64), dict(seed=1.0), dict(seed=True), dict(stop=("",)), dict(stop=None), dict(stop=(3,)),
        dict(stop_token_ids=(-1,)), dict(stop_token_ids=None), dict(stop=3), dict(temperature=1j), dict(ignore_eos="no"),
    ],
    ids=str,
)  # fmt: skip
def test_values_without_sense_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        SamplingParams(**fields)


def test_stop_may_be_one_string_or_a_list():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert hash(SamplingParams(stop=["a"], stop_token_ids=[3])) is not None


def test_stops_are_taken_from_anything_that_can_be_walked_once():
    params = SamplingParams(stop=iter(["a", "b"]), stop_token_ids=(i for i in (1, 2)))
    assert params.stop == ("a", "b") and params.stop_token_ids == (1, 2)
    assert SamplingParams(stop="end", stop_token_ids=np.int64(3)) == SamplingParams(stop=["end"], stop_token_ids=[3])
