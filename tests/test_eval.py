"""Evaluation: perplexity against NumPy on the teacher-forced logits, recall prompts, overlap, audit, commands, errors."""

import builtins
import csv
import json
import re
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models as small

import ic_jax
from ic_jax import calibration, config, eval_measures, lm_eval_adapter, needle
from ic_jax import eval as evaluation
from ic_jax.errors import UserError
from ic_jax.pattern import Pattern
from pallas_kernels import dispatch

SEQ_LEN = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def load(model):
    return lambda pattern: ic_jax.load(str(model), pattern=pattern, dtype="float32", max_context=512, prefill_chunk=64)


@pytest.fixture(scope="module")
def lm(load):
    return load("FFFF")


@pytest.fixture(scope="module")
def ids(lm):
    return calibration.text_windows(lm, small.text(3 * SEQ_LEN + 20), SEQ_LEN)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_windows_predict_every_token_once(lm):
    tokens = np.arange(3, 83)
    rows = calibration.windows(tokens, 16)
    assert rows.shape == (4, 17) and (rows[:, -1][:-1] == rows[1:, 0]).all()
    np.testing.assert_array_equal(rows[:, 1:].ravel(), tokens[1:65])
    np.testing.assert_array_equal(calibration.windows(tokens, 16, 2), rows[[0, 3]])
    np.testing.assert_array_equal(calibration.text_windows(lm, rows, 16), rows)
    with pytest.raises(UserError, match="the text has 16 tokens, one sequence needs 17"):
        calibration.windows(tokens[:16], 16)
    with pytest.raises(UserError, match="samples must be at least 1, not 0"):
        calibration.windows(tokens, 16, 0)
    parts = list(calibration.batches(rows, 3))
    assert [n for _, n in parts] == [3, 1] and parts[1][0].shape == (3, 17)
    assert calibration.batch_size(16, 4, 10**24) == calibration.batch_size(16, 4) == 4
    assert calibration.fingerprint(rows) != calibration.fingerprint(rows.reshape(2, 34))


def test_losses_read_the_head_once_for_many_tokens(monkeypatch):
    """On a Hopper GPU, too: its kernel for one row, mapped over tokens, would read the head for every one of them."""
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.CHIPS["h200"])
    c = config.preset("glm-4.7-flash-dsa").replace(vocab_size=512, hidden_size=256)
    shape = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
    params = dict(norm=shape(256), lm_head=shape(512, 256))
    losses = lambda params, x, targets: calibration._per_token(params, x, targets, (params, x), c)
    text = str(jax.make_jaxpr(losses)(params, shape(1, 6, 256), shape(1, 6, dtype="int32")))
    assert "dot_general" in text and "layer_matmul" not in text


def test_perplexity_equals_numpy_on_the_logits(lm, load, ids):
    patterns = {"all-full": lm.pattern, "FSSF": Pattern("FSSF"), "dense": "dense"}
    found = eval_measures.perplexity(lm, ids, patterns, batch=2)
    logp = {}
    for name in patterns:
        other = lm if name == "all-full" else load(name) if name != "dense" else None
        if other is None:
            other = ic_jax.load(str(lm.tokenizer.directory), dense=True, dtype="float32", max_context=512, prefill_chunk=64)
        logp[name] = np.stack([log_softmax(other.logits(row[:-1])) for row in ids])
    base = logp["all-full"]
    for r in found:
        own = logp[r["name"]]
        loss = -np.take_along_axis(own, ids[:, 1:, None], -1)[..., 0]
        reference = -np.take_along_axis(base, ids[:, 1:, None], -1)[..., 0]
        error = loss.std(ddof=1) / np.sqrt(loss.size)
        want = dict(
            loss=loss.mean(), loss_error=error, ppl=np.exp(loss.mean()), ppl_error=np.exp(loss.mean()) * error,
            dloss=loss.mean() - reference.mean(), dppl=np.exp(loss.mean()) - np.exp(reference.mean()),
            dloss_error=(loss - reference).std(ddof=1) / np.sqrt(loss.size),
            kl=(np.exp(base) * (base - own)).sum(-1).mean(), same_top1=(own.argmax(-1) == base.argmax(-1)).mean(),
            top1=(own.argmax(-1) == ids[:, 1:]).mean(),
        )  # fmt: skip
        for key, value in want.items():
            assert r[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (r["name"], key)
        np.testing.assert_allclose(r["running"], [np.exp(loss[: i + 1].mean()) for i in range(3)], rtol=1e-5)
        assert r["tokens"] == 3 * SEQ_LEN
    assert [r["full"] for r in found] == [4, 2, 0]
    assert found[0]["kl"] == 0 and found[0]["same_top1"] == 1 and found[1]["kl"] > 1e-4 and found[2]["kl"] > 1e-4


def test_perplexity_against_another_model(lm, load, ids):
    other = load("FSSF")
    other.engine.params = other.engine.params | {"lm_head": other.engine.params["lm_head"] * 1.5}
    (found,) = eval_measures.perplexity(other, ids, {"x": other.pattern}, batch=2, against=lm)
    base, own = (np.stack([log_softmax(m.logits(row[:-1])) for row in ids]) for m in (lm, other))
    loss = lambda logp: -np.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0].mean()
    assert found["dloss"] == pytest.approx(loss(own) - loss(base), rel=1e-4, abs=1e-5)
    assert found["kl"] == pytest.approx((np.exp(base) * (base - own)).sum(-1).mean(), rel=1e-4) and found["kl"] > 1e-3


def test_a_loss_that_is_no_number_is_said(lm, ids):
    params = lm.engine.params
    lm.engine.params = jax.tree.map(lambda a: a, params) | {"norm": params["norm"].at[0].set(np.nan)}
    try:
        with pytest.raises(UserError, match="the loss of all-full is not a number on sequence 0"):
            eval_measures.perplexity(lm, ids, {"all-full": lm.pattern}, batch=2)
        options = dict(lengths=[100], depths=[0.0], keys=[1], trials=1)
        with pytest.raises(UserError, match="the logits of all-full on prompts of 100 tokens are not finite"):
            eval_measures.recall(lm, {"all-full": lm.pattern}, **options)
        with pytest.raises(UserError, match="the logits of a request are not finite"):
            lm_eval_adapter.score(lm, [3, 4], [5])
    finally:
        lm.engine.params = params


def test_overlap_counts_equal_sets():
    rng = np.random.default_rng(0)

    def some(n, k=8, top=20):
        out = np.full((n, k), -1, np.int32)
        for row in out:
            count = rng.integers(0, k + 1)
            row[:count] = np.sort(rng.choice(top, count, replace=False))
        return out

    a, b = some(64), some(64)
    want = [len(set(x[x >= 0]) & set(y[y >= 0])) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(eval_measures.overlap_counts(a[None], b[None])[0], want)


def test_overlap_matrix_equals_the_forward_pass_selections(lm, ids):
    from ic_jax import cache as caches
    from ic_jax import model as models

    layers, matrix = eval_measures.overlap(lm, ids, batch=2)
    assert layers == [0, 1, 2, 3]
    np.testing.assert_allclose(matrix.diagonal(), 1)
    np.testing.assert_allclose(matrix, matrix.T)
    assert ((matrix > 0.05) & (matrix <= 1)).all() and matrix[0, 1] < 1
    K, x = lm.config.index_topk, ids[:, :-1]
    cache = caches.allocate(lm.config, 4, len(x), SEQ_LEN, dtype=jnp.float32)
    positions = np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), x.shape)
    out = models.forward(lm.engine.params, lm.config, (0, 1, 2, 3), x, positions, cache, keep_selections=True)
    chosen = np.asarray(out.selections_LBSK)[:, :, K:].reshape(4, -1, K)
    for i, j in np.ndindex(4, 4):
        want = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(chosen[i], chosen[j], strict=True)])
        assert matrix[i, j] == pytest.approx(want, abs=1e-6)


def test_audit(lm, ids):
    pattern = Pattern("FSFS")
    rows, problems = eval_measures.audit(lm, ids[:1], pattern)
    assert not problems
    assert [(r["kind"], r["source"]) for r in rows] == [("F", 0), ("S", 0), ("F", 2), ("S", 2)]
    assert all(r["weights"] for r in rows)
    assert all(r["selected"] == lm.config.index_topk for r in rows) and rows[0]["overlap"] is None
    assert all(0.8 < r["fp8_recall"] <= 1 for r in rows) and min(r["fp8_recall"] for r in rows) < 1
    # Layer 1 under its own indexer against layer 0's selection: what the all-full overlap has there too.
    assert rows[1]["overlap"] == pytest.approx(eval_measures.overlap(lm, ids[:1], batch=1)[1][0, 1], abs=1e-5)


def test_audit_finds_dead_and_broken_indexers(lm, ids):
    params, indexer = lm.engine.params, lm.engine.params["indexer"]
    broken = indexer | {"wk": indexer["wk"].at[2].set(0), "wq_b": indexer["wq_b"].at[1, 0, 0].set(np.nan)}
    lm.engine.params = dict(params) | {"indexer": broken}
    try:
        _, problems = eval_measures.audit(lm, ids[:1], lm.pattern)
    finally:
        lm.engine.params = params
    assert "layer 2: indexer weight wk is all zero" in problems
    assert "layer 1: indexer weight wq_b holds values that are not finite" in problems
    chosen = np.array([[[0, -1, -1], [1, 0, -1], [0, 1, 3]]])  # not ascending; in the future
    found = list(eval_measures._problems(dict(x_rms=np.nan), chosen, np.arange(3)[None], 3, {}))
    assert len(found) == 3 and "future" in found[1] and "ascending" in found[2]
    assert "selects 1 to 1 positions" in list(
        eval_measures._problems(dict(x_rms=1.0), chosen[:, [0, 0, 0]], np.arange(3)[None], 3, {})
    )[0]  # fmt: skip


@pytest.mark.parametrize("template", [None, "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}"])
@pytest.mark.parametrize(("keys", "depth"), [(1, 0.0), (1, 1.0), (3, 0.5)])
def test_recall_prompts(template, keys, depth):
    """Exact length, the fact at its depth, the question and the answer at the end, with a tokenizer of characters."""
    encode = lambda text, add_special_tokens=True: [ord(c) for c in text]
    tokenizer = SimpleNamespace(
        encode=encode, has_chat_template=template is not None,
        apply_chat_template=lambda messages, add_generation_prompt: f"<u>{messages[0]['content']}<a>",
    )  # fmt: skip
    filler = encode("filler. ")
    ids, answer, depths = needle.rows(tokenizer, 400, [depth], keys, 2, 0, filler)
    assert ids.shape == (2, 401) and (depths == depth).all() and not np.array_equal(*ids)
    for row, mask in zip(ids, answer, strict=True):
        text = "".join(map(chr, row))
        name = re.search(r"What is the secret number of (\w+)\?", text)[1]
        value = text.split(f"number of {name} is ")[1][:4]
        assert text.endswith(("<a>" if template else "Answer: ") + value)
        assert "".join(chr(t) for t, m in zip(row[1:], mask, strict=True) if m).strip() == value
        assert text.count("The secret number of") == keys
        at = text.index(f"The secret number of {name}") / len(text)
        assert abs(at - depth) < 0.3
    again = needle.rows(tokenizer, 400, [depth], keys, 2, 0, filler)
    np.testing.assert_array_equal(again[0], ids)
    with pytest.raises(UserError, match="a prompt of 60 tokens is too short for 3 facts"):
        needle.rows(tokenizer, 60, [depth], 3, 1, 0, filler)
    with pytest.raises(UserError, match="--keys must lie in"):
        needle.rows(tokenizer, 60, [depth], 1000, 1, 0, filler)


def test_recall_counts_answers_that_are_all_likeliest(lm, monkeypatch):
    """Answers are replaced by what the model says itself, in every second row: half are found."""
    K = lm.config.index_topk
    ids = np.random.default_rng(0).integers(3, 96, (4, SEQ_LEN + 1)).astype(np.int32)
    mask = np.zeros((4, SEQ_LEN), bool)
    mask[:, -2:] = True
    for b in (0, 2):
        ids[b, -2] = lm.logits(ids[b, :-2])[-1].argmax()
        ids[b, -1] = lm.logits(ids[b, :-1])[-1].argmax()
    monkeypatch.setattr(needle, "rows", lambda *args: (ids, mask, np.array([0.0, 0.0, 1.0, 1.0])))
    options = dict(lengths=[SEQ_LEN], depths=[0.0, 1.0], keys=[1], trials=2, batch=2)
    found = eval_measures.recall(lm, {"all-full": lm.pattern}, **options)
    assert SEQ_LEN > K and [(r["depth"], r["recall"]) for r in found] == [(0.0, 0.5), (1.0, 0.5)]
    for options, message in ((dict(lengths=[513]), "--lengths 513: the context holds 512"), (dict(depths=[2]), "--depths")):
        with pytest.raises(UserError, match=message):
            eval_measures.recall(lm, {}, **(dict(lengths=[SEQ_LEN], depths=[0.0], keys=[1]) | options))


@pytest.fixture
def flags(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(small.text(3 * SEQ_LEN + 20))
    (tmp_path / "empty").touch()
    shape = ["--text", "text", "--seq-len", str(SEQ_LEN), "--dtype", "float32"]
    return lambda what, *more: [what, "--model", str(model), *(shape if what != "needle" else []), *more]


def test_commands(flags, capsys, ids, lm):
    assert evaluation.main(flags("perplexity", "--index-pattern", "FSSF", "--batch", str(10**24))) == 0
    first, second = capsys.readouterr().out.splitlines()
    (want,) = eval_measures.perplexity(lm, ids, {"x": Pattern("FSSF")}, batch=10**24)
    assert first.startswith("ppl: [1]") and first.endswith(f"PPL = {want['ppl']:.4f} +/- {want['ppl_error']:.4f}")
    assert second.startswith(f"vs all-full: dPPL {want['dppl']:+.4f} · mean KL {want['kl']:.4f} · same top-1 ")
    assert evaluation.main(flags("perplexity", "--batch", "2", "--patterns", "all-full,uniform:2,FSSS,dense")) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 6 and [line.split("|")[2].strip() for line in table[2:]] == ["4", "2", "1", "0"]
    assert evaluation.main(flags("perplexity", "--batch", "2", "--json", "-q")) == 0
    (only,) = json.loads(capsys.readouterr().out)["results"]
    assert only["name"] == "as shipped" and only["pattern"] == "FFFF" and only["dppl"] == 0
    assert evaluation.main(flags("overlap", "--out", "o.csv", "--batch", str(10**24))) == 0
    rows = list(csv.reader(open_text("o.csv").splitlines()))
    matrix = eval_measures.overlap(lm, ids, batch=2)[1]
    np.testing.assert_allclose(np.array([r[1:] for r in rows[1:]], float), matrix, atol=1e-4)
    assert rows[0] == ["layer", "0", "1", "2", "3"]
    capsys.readouterr()
    assert evaluation.main(flags("audit", "--index-pattern", "FSSF")) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6 and "does not use: layers 1, 2" in err and f"1 x {SEQ_LEN} tokens" in err
    assert evaluation.main(flags("audit", "--index-pattern", "FSSF", "--samples", "2", "--json")) == 0
    audited, _ = eval_measures.audit(lm, ids[[0, 2]], Pattern("FSSF"))
    assert json.loads(capsys.readouterr().out)["per_layer"] == json.loads(json.dumps(audited))


def open_text(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def test_heat_map(tmp_path):
    pytest.importorskip("matplotlib", reason="heat maps need the extra [plot]")
    evaluation.heat_map(tmp_path / "o.png", [0, 3, 5], np.eye(3))
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("perplexity", "--text", "none"), "none cannot be read"),
        (("perplexity", "--seq-len", "4000"), "--seq-len must lie in 2..1024"),
        (("perplexity", "--seq-len", "16"), "--seq-len 16 is within top-k 16"),
        (("perplexity", "--max-context", "12", "--seq-len"), "a context of 12 tokens is within top-k 16"),
        (("overlap", "--max-context", "12", "--seq-len"), "a context of 12 tokens is within top-k 16"),
        (("audit", "--max-context", "12", "--seq-len"), "a context of 12 tokens is within top-k 16"),
        (("perplexity", "--max-context", "1", "--seq-len"), "needs at least 2 tokens, the context holds 1"),
        (("perplexity", "--seq-len", "900"), "the text has 164 tokens, one sequence needs 901"),
        (("perplexity", "--patterns", "FFFF", "--dense"), "give --patterns or one pattern flag"),
        (("perplexity", "--patterns", "FFF"), "--index-pattern has 3 characters, the model has 4 layers"),
        (("perplexity", "--patterns", "none.json"), "pattern file none.json cannot be read"),
        (("perplexity", "--patterns", ""), "--patterns names no pattern"),
        (("needle", "--patterns", " ,"), "--patterns names no pattern"),
        (("overlap", "--dense"), "--dense runs no indexer"),
        (("overlap", "--index-pattern", "uniform:2"), "leave the pattern flags out"),
        (("overlap", "--index-freq", "2"), "leave the pattern flags out"),
        (("overlap", "--out", "o.png"), "--out o.png: give a .csv file"),
        (("overlap", "--out", "/proc/o.csv"), "/proc cannot be written"),
        (("audit", "--dense"), "--dense runs no indexer"),
        (("needle", "--lengths", "2000"), "--lengths 2000: the context holds 1024"),
        (("needle", "--lengths", "20", "--depths", "0"), "a prompt of 20 tokens is too short"),
        (("needle", "--seed", "-1"), "--seed: must be an integer >= 0, not '-1'"),
        (("needle", "--text", "empty"), "--text has no tokens to hide the facts in"),
        (("needle", "--text", ""), "cannot be read"),
        (("needle", "--depths", "x"), "invalid list of float value: 'x'"),
    ],
)
def test_mistakes_are_one_line(flags, capsys, monkeypatch, arguments, message):
    if arguments[0] in ("overlap", "audit"):
        monkeypatch.setattr(ic_jax.engine.checkpoint, "load_params", lambda *a, **k: pytest.fail("weights were read"))
    argv = flags(*arguments)
    if argv[-1] == "--seq-len":  # the default one
        argv = [a for a in argv[:-1] if a not in ("--seq-len", str(SEQ_LEN))]
    assert evaluation.main(argv) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and message in err


def test_help_and_unknown_measures(capsys):
    assert evaluation.main(["--help"]) == 0 and "perplexity" in capsys.readouterr().out
    assert evaluation.main([]) == 2 and evaluation.main(["speed"]) == 2
    assert "measures perplexity, needle, overlap, audit, harness, not 'speed'" in capsys.readouterr().err


def test_extras_that_are_missing_are_named(flags, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert evaluation.main(flags("overlap", "--plot")) == 2
    assert "pip install 'ic-jax[plot]'" in capsys.readouterr().err
    monkeypatch.setattr(lm_eval_adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        lm_eval_adapter.adapter(None)


def test_lm_eval_adapter(lm, monkeypatch):
    """Through a stand-in for lm-eval's base class: the numbers are those of the teacher-forced logits."""
    api = types.ModuleType("lm_eval.api.model")
    api.LM = object
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", api)
    monkeypatch.setattr(lm_eval_adapter.importlib.util, "find_spec", lambda name: True)
    adapter = lm_eval_adapter.adapter(lm)
    start = min(lm.eos_ids)
    ids = [start, 5, 6, 7, 8]
    logp = log_softmax(lm.logits(ids))
    request = lambda *args: SimpleNamespace(args=args)
    likelihood, greedy = adapter.loglikelihood([request("w5 w6", " w7 w8")])[0]
    assert likelihood == pytest.approx(logp[2, 7] + logp[3, 8], abs=1e-4) and not greedy
    best = int(logp[2].argmax())
    assert adapter.loglikelihood([request("w5 w6", f" w{best}")])[0][1]
    (rolling,) = adapter.loglikelihood_rolling([request("w5 w6 w7 w8")])
    assert rolling == pytest.approx(sum(logp[i, t] for i, t in enumerate(ids[1:])), abs=1e-4)
    long = list(np.random.default_rng(0).integers(3, 96, 20))
    short = SimpleNamespace(max_context=8, logits=lm.logits, encode=lm.encode, tokenizer=lm.tokenizer, eos_ids=lm.eos_ids)
    words = " ".join(f"w{i}" for i in long)
    (rolling,) = lm_eval_adapter.adapter(short).loglikelihood_rolling([request(words)])
    windows = [[start, *long][at : at + 8] for at in (0, 7, 14)]  # each token once, behind those of its window
    want = sum(log_softmax(lm.logits(w))[i, t] for w in windows for i, t in enumerate(w[1:]))
    assert rolling == pytest.approx(want, abs=1e-4)
    with pytest.raises(UserError, match="at least 2 tokens"):
        lm_eval_adapter.adapter(SimpleNamespace(max_context=1))
    asked = []
    lm.stream = lambda ids, **options: asked.append((ids, options)) or iter([SimpleNamespace(text="w9 ")] * 2)
    try:
        assert adapter.generate_until([request("w5 w6", {"until": ["w7"], "max_gen_toks": 3})]) == ["w9 w9 "]
    finally:
        del lm.stream
    assert asked == [([start, 5, 6], dict(max_tokens=3, stop=("w7",)))]
