"""The library on the demo model: streams are the greedy path of the teacher-forced logits, batches equal single runs."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import ic_jax.engine
from ic_jax.errors import UserError

TEXT = "The following functions are defined in this module and they return a new string object " * 8


@functools.cache
def demo(**options):
    return ic_jax.load(**dict(dtype="float32", max_context=1024, prefill_chunk=64) | options)


@pytest.fixture(scope="module")
def lm():
    return demo()


@pytest.fixture(scope="module")
def prompt(lm):
    ids = lm.encode(TEXT)[:100]
    assert len(ids) > lm.config.index_topk  # beyond top-k: the sparse path is what runs
    return ids


def tokens(lm, prompt, **options):
    return [piece.token for piece in lm.stream(prompt, **options)]


def test_greedy_stream_follows_the_teacher_forced_logits(lm, prompt):
    out = tokens(lm, prompt, max_tokens=12, ignore_eos=True)
    logits = lm.logits(prompt + out)
    assert logits.shape == (len(prompt) + 12, lm.config.vocab_size) and logits.dtype == np.float32
    np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(-1), out)


def test_stream_pieces_join_to_the_decoded_text(lm, prompt):
    pieces = list(lm.stream(prompt, max_tokens=12, ignore_eos=True))
    assert "".join(p.text for p in pieces) == lm.tokenizer.decode([p.token for p in pieces])
    assert [p.finish_reason for p in pieces] == [None] * 11 + ["length"]
    assert pieces[-1].prompt_tokens == len(prompt) and pieces[-1].generation_tokens == 12
    assert pieces[-1].prompt_tps > 0 and pieces[-1].generation_tps > 0


def test_batch_of_different_lengths_equals_single_runs(lm, prompt):
    prompts = [prompt, prompt[:10], prompt[:71]]
    together = lm.generate(prompts, max_tokens=8)
    alone = ["".join(p.text for p in lm.stream(ids, max_tokens=8)) for ids in prompts]
    assert together == alone


def test_seeds(lm, prompt):
    hot = dict(max_tokens=12, temperature=1.5, ignore_eos=True)
    assert tokens(lm, prompt, seed=1, **hot) == tokens(lm, prompt, seed=1, **hot) != tokens(lm, prompt, seed=2, **hot)


def test_stop_string_ends_the_text_and_is_not_shown(lm, prompt):
    whole = "".join(p.text for p in lm.stream(prompt, max_tokens=20, ignore_eos=True))
    stop = whole[5:8]
    pieces = list(lm.stream(prompt, max_tokens=20, ignore_eos=True, stop=(stop,)))
    assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_stop_token_ends_the_stream(lm, prompt):
    greedy = tokens(lm, prompt, max_tokens=6, ignore_eos=True)
    pieces = list(lm.stream(prompt, max_tokens=6, ignore_eos=True, stop_token_ids=(greedy[2],)))
    assert pieces[-1].finish_reason == "stop" and len(pieces) == greedy.index(greedy[2]) + 1


def test_patterns_change_the_result_and_dense_runs_no_indexer(lm, prompt):
    full = lm.logits(prompt)
    quarter, dense = demo(pattern="uniform:4"), demo(dense=True)
    assert quarter.pattern.layers.startswith("FSSSF") and dense.pattern is None
    assert quarter.engine.params["indexer"]["wk"].shape[0] == quarter.pattern.n_full < lm.pattern.n_full
    assert "indexer" not in dense.engine.params
    for other in (quarter.logits(prompt), dense.logits(prompt)):
        assert np.abs(other[lm.config.index_topk + 8 :] - full[lm.config.index_topk + 8 :]).max() > 1e-3
        # Before top-k is passed every variant attends to everything.
        np.testing.assert_allclose(other[: lm.config.index_topk], full[: lm.config.index_topk], atol=2e-3)


def test_weights_that_are_not_finite_are_said(lm, prompt, monkeypatch):
    params = lm.engine.params
    monkeypatch.setattr(lm.engine, "params", params | {"norm": params["norm"].at[0].set(np.nan)})
    with pytest.raises(UserError, match="the logits of the prompt are not finite: most likely weights .* eval audit"):
        list(lm.stream(prompt, max_tokens=2))


def test_logits_that_turn_nan_in_an_answer_are_said(lm, prompt, monkeypatch):
    pieces, params = lm.stream(prompt, max_tokens=8, ignore_eos=True), lm.engine.params
    next(pieces)
    monkeypatch.setattr(lm.engine, "params", params | {"norm": params["norm"].at[0].set(np.nan)})
    with pytest.raises(UserError, match="the logits of token 2 of the answer are not finite"):
        list(pieces)


def test_any_number_of_tokens_may_be_asked_for(lm, prompt):
    assert tokens(lm, prompt, max_tokens=10**23, stop_token_ids=range(lm.config.vocab_size)) != []


def test_end_of_text_token_ends_the_stream(lm, prompt, monkeypatch):
    greedy = tokens(lm, prompt, max_tokens=6, ignore_eos=True)
    monkeypatch.setattr(lm, "eos_ids", frozenset({greedy[3]}))
    pieces = list(lm.stream(prompt, max_tokens=6))
    assert len(pieces) == greedy.index(greedy[3]) + 1 and pieces[-1].finish_reason == "stop"
    assert lm.generate([]) == []


def test_sizes_may_be_numpy_integers():
    assert demo(max_context=np.int64(512), prefill_chunk=np.int32(64)).logits([5] * 70).shape == (70, 4096)


def test_chunk_size_moves_near_ties_only(lm, prompt):
    """Products of other shapes round otherwise: a selection may differ where scores tie within rounding, not elsewhere."""
    other = demo(prefill_chunk=24)
    a, b = lm.logits(prompt), other.logits(prompt)
    assert np.median(np.abs(a - b)) < 1e-4 and (a.argmax(-1) == b.argmax(-1)).mean() > 0.98


def test_chat(lm):
    want = "".join(piece.text for piece in lm.stream("<|user|>Hello<|assistant|>", max_tokens=4))
    assert want and lm.chat([{"role": "user", "content": "Hello"}], max_tokens=4) == want
    with pytest.raises(UserError, match="non-empty list"):
        lm.chat([])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.stream(""), "prompt is empty"),
        (lambda lm: lm.stream([]), "prompt is empty"),
        (lambda lm: lm.stream([10**6]), "outside the vocabulary"),
        (lambda lm: lm.stream([-1]), "outside the vocabulary"),
        (lambda lm: lm.stream([1] * 1024), "has 1024 tokens, the context holds 1024"),
        (lambda lm: lm.stream("x", max_tokens=0), "max_tokens"),
        (lambda lm: lm.stream("x", temperature=-1), "temperature"),
        (lambda lm: lm.stream("x", temperature=float("nan")), "temperature"),
        (lambda lm: lm.stream("x", max_tokens=True), "max_tokens"),
        (lambda lm: lm.stream([1.5]), "integer token ids"),
        (lambda lm: lm.logits([]), "prompt is empty"),
        (lambda lm: lm.logits(None), "integer token ids"),
        (lambda lm: lm.logits(np.zeros((2, 2), int)), "integer token ids"),
        (lambda lm: lm.stream([[1, 2], [3]]), "integer token ids"),
        (lambda lm: lm.generate("Hello"), "list of prompts"),
        (lambda lm: lm.generate(["a", "b"], sampling=[{}, {}]), "one SamplingParams, for all prompts"),
    ],
)
def test_bad_calls_fail_before_anything_runs(lm, call, message):
    with pytest.raises(UserError, match=message):
        call(lm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pattern="FS"), r"--index-pattern has 2 characters, the model has \d+ layers \(this checkpoint ships"),
        (dict(pattern="S" * 16), "layer 0 is S"),
        (dict(pattern=["F"] * 16), "pattern must be a Pattern, a text or a file"),
        (dict(pattern=Path("no.json")), "pattern file no.json cannot be read"),
        (dict(pattern="uniform:2", dense=True), "--dense runs no indexer"),
        (dict(path="/nonexistent/model"), "/nonexistent/model"),
        (dict(dtype="float16"), "dtype must be"),
        (dict(max_context=10**9), "max_context must lie in"),
        (dict(max_context="100"), "max_context must lie in"),
        (dict(prefill_chunk=64.0), "prefill_chunk must be an integer"),
        (dict(mesh={"tensor": 2}), "write axis=size pairs"),
        (dict(mesh="tensor=3"), "mesh tensor=3 does not divide 4 attention heads; valid: 1,2,4"),
        (dict(mesh="rows=2"), "write axis=size pairs"),
        (dict(mesh="tensor=4,expert=8"), "needs 32 devices"),
        (dict(mesh="tensor=²"), "write axis=size pairs"),
        (dict(implementation="cuda"), "implementation must be one of"),
    ],
)
def test_bad_loads_fail_before_weights(options, message, monkeypatch):
    monkeypatch.setattr(ic_jax.engine.checkpoint, "load_params", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        ic_jax.load(**options)


@pytest.mark.parametrize(("free", "message"), [(10**7, "the weights need 0.0 GB"), (10**8, "context 65536 needs 1.5 GB")])
def test_memory_is_checked_before_weights(free, message, monkeypatch):
    monkeypatch.setattr(ic_jax.engine, "_free_bytes", lambda: free)
    monkeypatch.setattr(ic_jax.engine.checkpoint, "load_params", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        ic_jax.load(max_context=65536)


@pytest.mark.parametrize(("batch", "free"), [(1, 1), (4, 1), (5, 2)])
def test_every_device_holds_whole_sequences(batch, free, monkeypatch):
    """Of a batch that ``data`` does not divide as well: memory is checked for what is allocated."""
    engine = demo(mesh="data=4").engine
    per_token = ic_jax.engine.caches.bytes_per_token(engine.config, engine.n_slots, engine.dtype, None, "auto")
    held = free * 256 * per_token  # one page is 256 tokens
    monkeypatch.setattr(ic_jax.engine, "_free_bytes", lambda: held - 1)
    with pytest.raises(UserError, match="GB of cache per device"):
        engine.new_cache(batch, 256)
    monkeypatch.setattr(ic_jax.engine, "_free_bytes", lambda: held)
    assert engine.new_cache(batch, 256).latent_LMU.addressable_shards[0].data.shape[1] == free * 256


def test_sequences_of_a_device_share_the_chunk(monkeypatch):
    engine = demo(prefill_chunk=64).engine
    assert [engine.chunk(rows) for rows in (1, 2, 3, 6, 8, 100)] == [64, 32, 16, 8, 8, 8]
    sizes, run = [], engine._run
    monkeypatch.setattr(engine, "_run", lambda kind, *args, **how: sizes.append(args[0].shape) or run(kind, *args, **how))
    prompts = [[5 + i] * n for i, n in enumerate((70, 40, 9))]
    together, _ = engine.prefill(prompts, engine.new_cache(3, 128))
    assert sizes == [(3, 16)] * 4 + [(3, 8)]
    for prompt, logits in zip(prompts, together, strict=True):
        alone, _ = engine.prefill([prompt], engine.new_cache(1, 128))
        np.testing.assert_allclose(logits, alone[0], atol=1e-4)


def test_workspace_of_a_long_prefill_is_bounded():
    """32K tokens, even in one chunk: 0.5 GB beside weights and cache as compiled, 4.8 GB if the reference did not block."""
    from ic_jax import cache as caches

    engine = demo(dtype="bfloat16", max_context=None, implementation="reference").engine
    ids = jax.ShapeDtypeStruct((1, 32768), np.int32)
    cache = jax.eval_shape(lambda: caches.allocate(engine.config, engine.n_slots, 1, 32768))
    memory = engine._compile("prefill", False, (ids, ids, cache)).memory_analysis()
    assert memory.temp_size_in_bytes < 1e9
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 8 * 2**30


def test_too_large_a_cache_is_refused_with_what_would_fit(lm, monkeypatch, prompt):
    monkeypatch.setattr(ic_jax.engine, "_free_bytes", lambda: 10**6)
    with pytest.raises(UserError, match=r"needs .* GB of cache per device, 0.0 GB are free; try --max-context"):
        list(lm.stream(prompt))


@pytest.mark.parametrize("mesh", ["tensor=2", "expert=4", "tensor=2,expert=2"])
def test_meshes_give_the_single_device_result(lm, prompt, mesh):
    divided = demo(mesh=mesh)
    for leaf in (divided.engine.params["layers"]["q_b_proj"], divided.engine.params["experts"]["gate_proj"]):
        sizes = {axis for axis in ("tensor", "expert") if axis in mesh}
        whole = leaf.addressable_shards[0].data.size == leaf.size
        assert whole == (leaf.ndim == 3 and sizes == {"expert"})  # attention is divided over tensor alone
    np.testing.assert_allclose(divided.logits(prompt), lm.logits(prompt), atol=2e-3)
