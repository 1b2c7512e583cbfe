"""The embedded demo model: its files, and that it learnt what it is there for (text, recall, its own selection)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ic_jax import cache, checkpoint, model
from ic_jax.config import DEMO_DIRECTORY, Config, preset
from ic_jax.demo import corpus, evaluate, train
from ic_jax.pattern import Pattern

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DEMO_DIRECTORY / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def demo():
    c = preset("demo")
    return c, checkpoint.load_params(DEMO_DIRECTORY, c, checkpoint.indexer_layers(DEMO_DIRECTORY, c))


@functools.cache
def program(c, slots, dense, S):
    @jax.jit
    def forward(params, ids_BS):
        positions = jnp.arange(S, dtype=jnp.int32)[None]
        kv = cache.allocate(c, c.num_hidden_layers, 1, S)
        return model.forward(params, c, slots, ids_BS, positions, kv, all_logits=True, dense=dense).logits[0]

    return forward


def predict(c, params, rows, slots, dense=False):
    """Mean nats a token and predictions [N,S] of rows [N,S+1], through the model's own forward."""
    forward, loss, predictions = program(c, slots, dense, rows.shape[1] - 1), [], []
    for row in rows.astype(np.int32):
        logits = jax.nn.log_softmax(forward(params, row[None, :-1]), -1)
        loss.append(-np.asarray(jnp.take_along_axis(logits, row[1:, None], -1)).mean())
        predictions.append(np.asarray(logits.argmax(-1)))
    return float(np.mean(loss)), np.stack(predictions)


def test_files_are_small_and_licensed():
    sizes = {p.name: p.stat().st_size for p in DEMO_DIRECTORY.iterdir() if p.is_file()}
    assert sum(sizes.values()) <= 25e6
    shards = [n for n in sizes if n.endswith(".safetensors")]
    assert shards and all(sizes[n] < 15e6 for n in shards)
    for name, word in (("python-docs", "PSF"), ("postgresql-docs", "PostgreSQL"), ("public-domain", "public domain")):
        assert word in (DEMO_DIRECTORY / f"LICENSE-{name}").read_text()


def test_shape_fits_the_kernels(demo):
    c, params = demo
    assert (c.model_type, c.kv_lora_rank, c.qk_rope_head_dim, c.index_head_dim) == ("glm_moe_dsa", 512, 64, 128)
    assert c.index_topk % 64 == 0 and c.index_topk * 8 <= train.CONTEXT
    assert c.num_hidden_layers >= 12 and set(c.mlp_layer_types) == {"dense", "sparse"}
    assert c.pattern == Pattern.all_full(c.num_hidden_layers)
    assert sum(a.size for a in jax.tree.leaves(params)) == RECORDED["parameters"]
    assert c == train.demo_config(c.num_hidden_layers, c.index_topk, c.moe_intermediate_size)


def test_tokenizer_round_trips_and_keeps_its_chat_form():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == preset("demo").vocab_size
    for text in ("The code is 4711.\n\tdef f(x):\n", "naïve — 漢字 🙂", " two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.token_to_id(s) for s in corpus.SPECIAL] == [0, 1, 2, 3]
    assert preset("demo").eos_token_id == (0,)
    settings = json.loads((DEMO_DIRECTORY / "tokenizer_config.json").read_text())
    assert "<|assistant|>" in settings["chat_template"] and settings["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize("mode", ["all full", pytest.param("dense attention", marks=pytest.mark.slow)])
def test_held_out_loss_beats_a_bigram_model(demo, mode):
    """On the embedded windows, through the model's own forward, and equal to what training recorded."""
    c, params = demo
    rows = np.load(DATA / "demo_heldout.npz")["text"]
    recorded = RECORDED["sample nats per token"]
    loss, _ = predict(c, params, rows, c.pattern.slots(range(c.num_hidden_layers)), mode == "dense attention")
    assert loss < recorded["bigram"] - 1
    assert abs(loss - recorded[mode]) < 0.01


def test_recall_reaches_far_back(demo):
    """Answers stand more than 4 x top-k tokens behind their facts, so the indexers have to find them."""
    c, params = demo
    rows = np.load(DATA / "demo_heldout.npz")["recall"]
    ids = rows & (corpus.ANSWER - 1)
    _, predictions = predict(c, params, ids, c.pattern.slots(range(c.num_hidden_layers)))
    assert evaluate.exact(predictions, rows) >= 0.75


def tiny(layers=3):
    """A small demo with weights as training starts from, moved off their symmetric values."""
    c, rng = train.demo_config(layers, 16), np.random.default_rng(0)
    return c, jax.tree.map(lambda a: a + 0.05 * rng.standard_normal(a.shape, np.float32), train.init(c, 0))


@pytest.mark.parametrize("letters, dense, as_data", [("FFF", True, False), ("FFF", False, False), ("FSF", False, True)])
def test_training_forward_is_the_model(letters, dense, as_data):
    c, params = tiny()
    slots = Pattern(letters).slots(range(3))
    ids = jax.random.randint(jax.random.key(1), (2, 64), 0, c.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (2, 64))
    kv = cache.allocate(c, 3, 2, 64, dtype=jnp.float32, page_size=32)
    run = jax.jit(lambda p: model.forward(p, c, slots, ids, positions, kv, all_logits=True, dense=dense).logits)
    given = jnp.asarray(slots, jnp.int32) if as_data else slots
    train_forward = functools.partial(train.train_forward, c=c, ids_BS=ids, slots=given, sparse=not dense)
    logits, signals = jax.jit(lambda p: train_forward(p, block=24))(params)  # 24, 24 and 16 queries
    np.testing.assert_allclose(logits, run(params), atol=2e-5)
    whole = jax.jit(train_forward)(params)[1].index_loss_L
    np.testing.assert_allclose(signals.index_loss_L, whole, rtol=1e-4)
    assert signals.index_loss_L.shape == (3,) and (signals.index_loss_L > 0).all()


def test_index_loss_trains_the_indexers_alone():
    c, params = tiny(2)
    ids = jax.random.randint(jax.random.key(2), (1, 48), 0, c.vocab_size)
    loss = lambda p: train.train_forward(p, c, ids, slots=(0, 1), sparse=True)[1].index_loss_L.sum()
    grads = jax.jit(jax.grad(loss))(params)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads.pop("indexer")))
    assert all(jnp.abs(g).max() == 0 for g in jax.tree.leaves(grads))


def test_index_loss_over_every_sixteenth_query_is_the_mean_of_these():
    c, params = tiny(2)
    ids = jax.random.randint(jax.random.key(3), (1, 32), 0, c.vocab_size)
    loss = lambda n, taught, block: train.train_forward(
        params, c, ids[:, :n], slots=(0, 1), sparse=True, taught=taught, block=block
    )[1].index_loss_L
    last = [loss(n, n, 32) for n in (16, 32)]  # of the last query alone
    np.testing.assert_allclose(loss(32, 16, 16), np.mean(last, 0), rtol=1e-4)


def test_select_is_exact_under_ties():
    rng = np.random.default_rng(0)
    scores = (rng.integers(-3, 4, (2, 90, 90)) / 2).astype(np.float32)
    scores[0, :, 20:50] = 0.0
    scores[0, :, 30] = -0.0
    scores[1, :, 7] = -np.inf
    mask = np.asarray(train.select(jnp.asarray(scores), jnp.tril(jnp.ones((90, 90), bool)), 16))
    for b in range(2):
        for s in range(90):
            best = sorted(range(s + 1), key=lambda t: (-scores[b, s, t], t))[:16]
            assert sorted(best) == np.flatnonzero(mask[b, s]).tolist()


def test_export_is_what_the_loader_reads(tmp_path):
    c, params = tiny(2)
    params = train.cast(params)
    train.save(tmp_path, c, params)
    assert Config.load(tmp_path) == c
    loaded = checkpoint.load_params(tmp_path, c, checkpoint.indexer_layers(tmp_path, c))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_ngrams_are_distributions():
    tokens = np.random.default_rng(0).integers(0, 12, 500)
    ngrams = evaluate.Ngrams(tokens, 16)
    for before in (3, 14):  # seen and never seen
        pairs = np.array([[before, after] for after in range(16)])
        assert np.isclose(sum(np.exp(-ngrams.losses(pair[None])[1]) for pair in pairs), 1, atol=1e-6)
        assert np.isclose(sum(np.exp(-ngrams.losses(pair[None])[0]) for pair in pairs), 1, atol=1e-6)


def test_recall_rows_mark_their_answers():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json"))
    text = np.array(tokenizer.encode("Some plain words to hide things in. " * 400).ids, np.uint16)
    recall = corpus.Recall(tokenizer, text, seed=0)
    rows = recall.rows(12)
    assert rows.shape == (12, corpus.ROW) and (rows & (corpus.ANSWER - 1)).max() < corpus.VOCABULARY
    for distance in (100, 700):
        row = np.array(recall.probe(distance))
        answer = np.flatnonzero(row & corpus.ANSWER)
        said = tokenizer.decode((row[answer] & (corpus.ANSWER - 1)).tolist())
        behind = tokenizer.decode(row[: answer[0] - distance + 20].tolist())
        assert len(row) <= corpus.ROW and said and said in behind
