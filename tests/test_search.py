"""Layer search: greedy against exhaustive full forwards, resuming, blocks, the other methods, pattern files, errors."""

import itertools
import json

import jax
import numpy as np
import pytest
import small_models as small

import ic_jax
from ic_jax import calibration, pattern_file, search
from ic_jax import search_methods as methods
from ic_jax.config import Config
from ic_jax.errors import UserError
from ic_jax.pattern import Pattern
from ic_jax.search_evaluate import Evaluator, Log


@pytest.fixture(scope="module")
def lm():
    return small.random_lm()


IDS = small.random_windows()


def full_loss(lm, pattern):
    return small.forward_losses(lm, IDS, pattern).mean()


def run(lm, **options):
    return search.search(lm, IDS, **(dict(keep=2, seq_len=40, batch=2) | options))


@pytest.fixture(scope="module")
def result(lm):
    return run(lm)


def test_greedy_equals_exhaustive_evaluation_of_each_step(lm, result):
    pattern = Pattern.all_full(6)
    for step in result.history:
        layers = [i for i in range(1, 6) if pattern.layers[i] == "F"]
        losses = {i: full_loss(lm, methods.flip(pattern, i)) for i in layers}
        assert list(step["candidates"]) == [str(i) for i in layers]
        np.testing.assert_allclose(list(step["candidates"].values()), list(losses.values()), atol=1e-5)
        assert step["layer"] == min(layers, key=lambda i: (losses[i], i))
        pattern = methods.flip(pattern, step["layer"])
        assert step["pattern"] == str(pattern)
    assert result.pattern == pattern and pattern.n_full == 2 and len(result.history) == 4
    np.testing.assert_allclose(result.start_loss, full_loss(lm, Pattern.all_full(6)), atol=1e-5)
    assert result.loss == result.history[-1]["loss"]
    spread = [max(s["candidates"].values()) - min(s["candidates"].values()) for s in result.history[:3]]
    assert min(spread) > 1e-4  # the choice was a choice, far above rounding


def test_given_windows_say_how_long_sequences_are(lm, result):
    other = run(lm, seq_len=None, keep=np.int64(2))
    assert (other.calibration, other.history) == (result.calibration, result.history)


@pytest.mark.parametrize("options", [dict(together=2), dict(batch=1, together=2), dict(batch=10**24)])
def test_batching_changes_no_loss(lm, result, options):
    other = run(lm, **options)
    assert other.pattern == result.pattern
    for a, b in zip(result.history, other.history, strict=True):
        assert a["candidates"].keys() == b["candidates"].keys()
        np.testing.assert_allclose(list(a["candidates"].values()), list(b["candidates"].values()), atol=1e-5)


def test_prefix_reuse_equals_whole_passes_and_saves_layers(lm, result):
    layers, found, ran = [1, 2, 4, 5], [], []
    for reuse in (True, False):
        e = Evaluator(lm.engine, range(6), IDS[:2], batch=2, reuse_prefix=reuse)
        count, original = [], e.runner.advance

        def advance(state, slots, start=0, stop=None, count=count, original=original):
            count.append((6 if stop is None else stop) - start)
            return original(state, slots, start, stop)

        e.runner.advance = advance
        compiled = calibration._advance._cache_size()
        found.append(e.candidates(Pattern("FFFSFF"), layers))
        ran.append(sum(count))
        # One compilation, made by the searches before, serves every pattern and every start layer.
        assert calibration._advance._cache_size() == compiled
    np.testing.assert_allclose(list(found[0].values()), list(found[1].values()), atol=1e-5)
    assert ran == [5 + 5 + 4 + 2 + 1, 4 * 6]  # the walk to layer 5, then what each candidate leaves


class Stop(Exception):
    pass


def test_a_killed_search_resumes_to_the_same_result_without_repeating(lm, tmp_path, result):
    whole = run(lm, log=tmp_path / "whole.jsonl", together=2)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines[1:]]
    assert len({(e["pattern"], e["batch"]) for e in entries}) == len(entries) == 2 * (1 + 5 + 4 + 3 + 2)
    for cut in (3, 11):

        def kill(done, total, note, cut=cut):
            if done >= cut:
                raise Stop

        log = tmp_path / f"cut{cut}.jsonl"
        with pytest.raises(Stop):
            run(lm, log=log, together=2, report=kill)
        kept = log.read_bytes()
        log.write_bytes(kept + b'{"pattern": "FFFSF')  # torn by the kill
        again = run(lm, log=log, resume=True)  # takes ``together`` from the log
        assert (again.pattern, again.loss, again.history) == (whole.pattern, whole.loss, whole.history)
        assert log.read_bytes().startswith(kept)
        assert log.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    # A finished one evaluates nothing; a smaller --keep goes on from it, and solutions are nested.
    size = (tmp_path / "whole.jsonl").stat().st_size
    assert run(lm, log=tmp_path / "whole.jsonl", resume=True).history == whole.history
    assert (tmp_path / "whole.jsonl").stat().st_size == size
    one = run(lm, log=tmp_path / "whole.jsonl", resume=True, keep=1)
    assert one.history[:4] == whole.history and one.pattern == Pattern("FSSSSS")


def test_a_log_of_something_else_is_refused(lm, tmp_path):
    log = tmp_path / "log.jsonl"
    run(lm, log=log, keep=6)
    with pytest.raises(UserError, match="log of an earlier search; continue it with --resume"):
        run(lm, log=log, keep=6)
    with pytest.raises(UserError, match="was made with sequences 3, now it is 2"):
        run(lm, log=log, keep=6, samples=2, resume=True)
    good = log.read_bytes()
    header, entry = (json.loads(line) for line in good.splitlines()[:2])
    deep = b"[" * 100_000
    lines = [{}, [], 3, *(entry | change for change in (dict(loss=["x"]), dict(loss="12"), dict(loss=[]), dict(batch=[])))]
    for line in [deep, b"\xff", *(json.dumps(line).encode() for line in lines)]:
        log.write_bytes(good + line + b"\n{}\n")
        with pytest.raises(UserError, match=r"line 4 is damaged"):
            run(lm, log=log, keep=6, resume=True)
    headers = [[], 3, header | dict(together="x"), header | dict(together=0)]
    for line in [b"nonsense", b"\xff", deep, *(json.dumps(line).encode() for line in headers)]:
        log.write_bytes(line + b"\n")
        with pytest.raises(UserError, match="the log of a search .* (cannot be read|does not hold|is damaged)"):
            run(lm, log=log, keep=6, resume=True)


def test_a_log_has_one_search(lm, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    with Log({}, log):
        for resume in (False, True):
            with pytest.raises(UserError, match="log.jsonl is in use by another run"):
                run(lm, log=log, resume=resume)
        assert search.main(["--out", str(log.with_suffix(".json")), "-q"]) == 2
        assert "is in use by another run" in capsys.readouterr().err
    log.unlink()
    with Log({"together": 1}, log) as book:
        log.unlink()  # by the user, while it runs
        with pytest.raises(UserError, match="log.jsonl cannot be written: No such file"):
            book.add([dict(pattern="F", batch=0, loss=[1.0])])
    log.write_text('{"pattern": "F", "batch": 0, "loss": [1.0]}\n')
    with pytest.raises(UserError, match="has lost its first line"):
        run(lm, log=log, resume=True)


def test_a_loss_that_is_no_number_stops_the_search_and_keeps_the_log(lm, tmp_path):
    params = lm.engine.params
    broken = jax.tree.map(lambda a: a, params)
    broken["norm"] = params["norm"].at[0].set(np.nan)
    lm.engine.params = broken
    try:
        with pytest.raises(UserError, match=r"the loss of pattern FFFFFF on mini-batch 0 is nan.*log\.jsonl"):
            run(lm, log=tmp_path / "log.jsonl")
    finally:
        lm.engine.params = params
    header, entry = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert header["model"] == "mixed" and entry == dict(pattern="FFFFFF", batch=0, loss=[None, None])
    # Not a finished evaluation: a resumed search computes it again.
    assert ("FFFFFF", 0) not in Log(header, tmp_path / "log.jsonl", resume=True)


def toy(pattern, layers):
    """A made-up loss that depends on the layer and on how many are shared."""
    return {i: (i * 7 % 5) + 0.1 * (len(pattern.layers) - pattern.n_full) for i in layers}


def test_blocks_flip_in_turn_and_keep_their_first_layers():
    steps = list(methods.greedy(toy, Pattern.all_full(12), 5, blocks=3))
    assert [s["layer"] // 4 for s in steps] == [0, 1, 2, 0, 1, 2, 0]
    pattern = Pattern.all_full(12)
    for step in steps:  # each sees what the blocks before it have committed
        block = step["layer"] // 4
        layers = [i for i in range(4 * block + 1, 4 * block + 4) if pattern.layers[i] == "F"]
        losses = toy(pattern, layers)
        assert {int(k): v for k, v in step["candidates"].items()} == losses
        assert step["layer"] == min(layers, key=lambda i: (losses[i], i))
        pattern = Pattern(step["pattern"])
    assert pattern.n_full == 5 and {0, 4, 8} <= set(pattern.full_layers)
    assert methods.n_evaluations(Pattern.all_full(47), 12, 1) == sum(range(12, 47))
    assert methods.n_evaluations(Pattern.all_full(47), 12, 4) < 0.3 * sum(range(12, 47))


def test_blocks_on_a_model(lm):
    assert "the first layer of each stays full" in " ".join(search._parser().format_help().split())
    found = run(lm, blocks=2, keep=3)
    assert [s["layer"] // 3 for s in found.history] == [0, 1, 0]
    for step in found.history:
        np.testing.assert_allclose(step["loss"], full_loss(lm, Pattern(step["pattern"])), atol=1e-5)


def test_ties_go_to_the_lowest_layer_and_solutions_are_nested():
    same = lambda pattern, layers: dict.fromkeys(layers, 1.0)
    assert [s["layer"] for s in methods.greedy(same, Pattern.all_full(5), 1)] == [1, 2, 3, 4]
    patterns = [s["pattern"] for s in methods.greedy(toy, Pattern.all_full(9), 2)]
    for more, fewer in itertools.pairwise(patterns):
        assert set(Pattern(fewer).full_layers) < set(Pattern(more).full_layers)


@pytest.mark.parametrize("allowed", [range(7), (0, 2, 3, 6)])
def test_similarity_equals_brute_force(allowed):
    similar = np.random.default_rng(5).uniform(size=(7, 7))

    def value(full):
        source = Pattern("".join("F" if i in full else "S" for i in range(7))).source
        return sum(similar[m, j] for m, j in enumerate(source) if m != j)

    for keep in range(1, len(allowed) + 1):
        best = max(value((0, *rest)) for rest in itertools.combinations(allowed[1:], keep - 1))
        found = methods.similarity(similar, keep, allowed)
        assert found.n_full == keep and set(found.full_layers) <= set(allowed)
        assert value(found.full_layers) == pytest.approx(best)
    assert str(methods.similarity(np.ones((5, 5)), 3, range(5))) == "FFFSS"  # all equal: the lowest layers
    with pytest.raises(UserError, match="5 full layers"):
        methods.similarity(similar, 5, (0, 2, 3, 6))


def test_similarity_on_a_model(lm):
    e = Evaluator(lm.engine, range(6), IDS, batch=2)
    similar = e.similarities(Pattern.all_full(6))
    lower = np.tril(np.ones((6, 6), bool), -1)
    assert (np.abs(similar[lower]) <= 1).all() and (similar[~lower] == 0).all() and (similar[lower] != 0).all()
    assert similar[lower].max() < 1 - 1e-6  # other selections give other outputs
    found = run(lm, method="similarity", keep=3)
    assert found.pattern == methods.similarity(similar, 3, range(6))
    np.testing.assert_allclose(found.loss, full_loss(lm, found.pattern), atol=1e-5)


def test_uniform(lm):
    assert methods.uniform(47, 12) == Pattern.uniform(47, 4)
    assert methods.uniform(78, 20) == Pattern.uniform(78, 4)
    assert str(methods.uniform(8, 3)) == "FSSFSSFS"
    for n in range(1, 30):
        for keep in range(1, n + 1):
            assert methods.uniform(n, keep).n_full == keep
    with pytest.raises(UserError, match="F on layers 3, but"):
        search.check(Pattern("FFFSFF"), 2, "uniform", 1)
    found = run(lm, method="uniform", keep=0.5)
    assert str(found.pattern) == "FSFSFS" and not found.history
    np.testing.assert_allclose(found.increase, full_loss(lm, found.pattern) - full_loss(lm, lm.pattern), atol=2e-5)


@pytest.mark.parametrize(
    ("keep", "n", "want"),
    [(0.25, 47, 12), (0.5, 47, 24), (0.125, 47, 6), (1.0, 5, 5), (1, 5, 1), (0.1, 30, 3), (1e-9, 5, 1)],
)
def test_keep(keep, n, want):
    assert methods.kept_layers(keep, n) == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep=0.0), "--keep 0 is a share of the layers and must be more than 0"),
        (dict(keep=1.5), "--keep 1.5 is a share"),
        (dict(keep=-0.5), "--keep -0.5 is a share"),
        (dict(keep=0), "must lie in 1..6"),
        (dict(keep=7), "must lie in 1..6"),
        (dict(keep=float("nan")), "--keep must be"),
        (dict(keep=True), "--keep must be"),
        (dict(method="random"), "--method must be one of greedy, uniform, similarity"),
        (dict(blocks=7), "--blocks must lie in 1..6"),
        (dict(blocks=3), "2 full layers cannot be reached with --blocks 3"),
        (dict(blocks=2, method="uniform"), "--blocks divides the greedy search"),
        (dict(seq_len=8), "--seq-len 8 is within top-k 8"),
        (dict(seq_len=1025), "--seq-len must lie in 2..1024"),
        (dict(text=[1, 2, 3]), "the text has 3 tokens, one sequence needs 41"),
        (dict(text=IDS[:, :30]), "windows of 30 tokens were given, sequences of 40 need 41"),
        (dict(samples=0), "samples must be at least 1"),
        (dict(together=0), "--together must be at least 1"),
    ],
)
def test_bad_arguments(lm, options, message):
    options = dict(text=IDS, keep=2, seq_len=40) | options
    with pytest.raises(UserError, match=message):
        search.search(lm, options.pop("text"), **options)


def test_quality_gate_says_what_is_within_it(result):
    costs = [0.0, *(s["loss"] - result.start_loss for s in result.history)]
    patterns = [result.start, *(Pattern(s["pattern"]) for s in result.history)]
    for limit in (-1.0, 0.0, min(costs), max(costs), *costs):
        able = [p for cost, p in zip(costs, patterns, strict=True) if cost <= limit]
        assert result.within(limit) == (min(able, key=lambda p: p.n_full) if able else None)


def test_pattern_files(tmp_path):
    config, other = small.random_lm().config, Config.load(small.GOLDEN / "glm_all_full")
    path, pattern = tmp_path / "pattern.json", Pattern("FSSFSS")
    pattern_file.write(path, pattern, config, "mixed", loss=1.5)
    assert search.read_pattern_file(path, config) == search.read_pattern_file(path, config, "mixed") == pattern
    assert pattern_file.parse(str(path), config) == pattern
    assert pattern_file.parse("uniform:3", config) == Pattern.uniform(6, 3)
    assert list(tmp_path.iterdir()) == [path]  # nothing left over from the atomic write
    for call, message in (
        (lambda: pattern_file.read(path, other), "is for 6 layers, the model has 4"),
        (lambda: pattern_file.read(path, config.replace(hidden_size=48)), "mixed has hidden_size 40, this one 48"),
        (lambda: pattern_file.read(path, config, "tiny"), "searched on mixed, this model is tiny.*--index-pattern FSSFSS"),
        (lambda: pattern_file.read(tmp_path / "none.json", config), "cannot be read: No such file"),
        (lambda: pattern_file.write(tmp_path / "no" / "p.json", pattern, config, "mixed"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    damaged = {"{": "cannot be read", "[" * 100_000: "nested too deeply", "[]": "does not hold", "{}": "is not a pattern"}
    for content, message in damaged.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            pattern_file.read(path, config)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (None, "demo"),
        ("zai-org/GLM-5", "GLM-5"),
        ("models/tiny/", "tiny"),
        ("models/tiny/.", "tiny"),
        ("/cache/hub/models--zai-org--GLM-5/snapshots/0123abcd", "GLM-5"),
    ],
)
def test_model_names(path, name):
    assert pattern_file.model_name(path) == name


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small.directory(tmp_path)
    (tmp_path / "text").write_text(small.text(200))
    base = "--text text --seq-len 40 --batch 2 --dtype float32 --keep 0.5 --model".split() + [str(model)]
    assert search.main(base) == 0
    out, err = capsys.readouterr()
    letters = out.strip()
    assert Pattern(letters).n_full == 2 and "step 2/2: layer" in err
    assert f"--hf-overrides '{{\"use_index_cache\": true, \"index_topk_pattern\": \"{letters}\"}}'" in err
    assert f"--json-model-override-args '{{\"index_topk_pattern\": \"{letters}\"}}'" in err
    assert search.read_pattern_file("pattern.json", Config.load(model), "glm_all_full") == Pattern(letters)
    saved = json.loads((tmp_path / "pattern.json").read_text())
    assert saved["full"] == 2 and saved["calibration"]["text"] == "text" and len(saved["history"]) == 2
    assert search.main(base) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert search.main([*base, "--resume", "--json", "-q", "--max-loss-increase", "-1"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["pattern"] == letters and "nats a token, more than -1; nothing is within it" in err
    assert json.loads((tmp_path / "pattern.json").read_text())["max_loss_increase"] == -1
    found = ic_jax.load(str(model), pattern=pattern_file.parse("pattern.json", Config.load(model)), dtype="float32")
    assert found.pattern == Pattern(letters)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "none"], "none cannot be read: No such file"),
        (["--text", "short"], "the text has 3 tokens, one sequence needs 129"),
        (["--text", "latin"], "latin is not UTF-8 text: byte 0xe4 at offset 1"),
        ([], "there is no text; give one with --text FILE"),
        (["--dense"], "--dense runs no indexer"),
        (["--out", "no/p.json"], "no does not exist"),
        (["--out", "p.jsonl"], "give a name that ends in .json"),
        (["--out", "/proc/p.json"], "/proc cannot be written"),
        (["--out", "p"], "--out p: give a name that ends in .json"),
        (["--keep", "x"], "--keep: must be a finite number, not 'x'"),
        (["--max-loss-increase", "nan"], "--max-loss-increase: must be a finite number, not 'nan'"),
        (["--max-loss-increase", "inf"], "--max-loss-increase: must be a finite number, not 'inf'"),
        (["--index-pattern", "FS"], "--index-pattern has 2 characters, the model has 4 layers"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("w1 w2 w3")
    (tmp_path / "latin").write_bytes(b"w\xe4")
    assert search.main(["--model", str(small.directory(tmp_path)), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_model_without_indexer(capsys):
    assert search.main(["--model", str(small.GOLDEN / "glm4_lite_dense"), "--text", __file__]) == 2
    assert "has no indexer, so there is nothing to share" in capsys.readouterr().err
