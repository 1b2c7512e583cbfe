"""``ic-jax bench``: what it counts, the steps it times, random weights that select as asked, and what a user sees."""

import gc
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ic_jax import bench, bench_measure, checkpoint, config, model, moe, random_weights, roofline
from ic_jax.attention import linear
from ic_jax.bench_measure import DENSE, Row, Steps
from ic_jax.config import Config
from ic_jax.engine import Engine, chunks
from ic_jax.errors import UserError
from ic_jax.pattern import Pattern
from pallas_kernels import dispatch

TINY = dict(
    model_type="glm_moe_dsa", vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=2,
    q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=64, v_head_dim=16, intermediate_size=64,
    moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, index_n_heads=16, index_head_dim=128,
    index_topk=16, max_position_embeddings=2048, rope_theta=1e6, first_k_dense_replace=0,
)  # fmt: skip
ALL, QUARTER = Pattern.all_full(4), Pattern("FSSS")


@pytest.fixture(scope="module")
def steps():
    """Steps over natural random weights of TINY with a cache of 1,024 tokens; tests share its programs."""
    engine = random_weights.engine(Config.from_hf(TINY), ALL, seed=1, dtype="float32", prefill_chunk=64)
    steps = Steps(engine, ALL.full_layers, seed=2)
    steps.reserve(1024)
    return steps


# What is counted


@pytest.mark.parametrize(("name", "slots"), [("glm-4.7-flash-dsa", 12), ("glm-5.2", 21), ("deepseek-v3.2", 61), ("demo", 4)])
def test_counted_parameters_are_those_of_the_model(name, slots):
    c = config.preset(name)
    shapes, _ = model.abstract_params(c, slots)
    assert sum(roofline.parameters(c, slots).values()) == sum(s.size for s in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("queries", "start"), [(1, 5), (1, 40), (7, 12), (30, 0), (9, 60)])
@pytest.mark.parametrize("pattern", [QUARTER, None])
def test_counted_pairs(queries, start, pattern):
    c = Config.from_hf(TINY)
    parts = roofline.step(c, pattern, queries, start, batch=3, index_itemsize=1)
    seen = [t + 1 for t in range(start, start + queries)]
    attended = sum(min(n, 16) if pattern else n for n in seen)
    assert parts["attention"].flops == 3 * 4 * attended * 2 * 2 * (96 + 32)
    assert parts["attention"].gathered == 3 * 4 * attended * 96 * 2
    scored = sum(n for n in seen if n > 16) if pattern else 0
    if scored:
        assert parts["index_scores"] == (3 * scored * 2 * 16 * 128, 3 * seen[-1] * 132, 0, True)
    else:
        assert "index_scores" not in parts


def test_counts_of_the_30b_model():
    """Against figures computed by hand: GFLOP and GB of the paper's model at 200K tokens."""
    c, tokens = config.preset("glm-4.7-flash-dsa"), 200_000
    chunk = roofline.step(c.replace(num_hidden_layers=1, mlp_layer_types=("dense",)), Pattern("F"), tokens, 0)
    assert chunk["index_scores"].flops == pytest.approx(2 * 32 * 128 * tokens**2 / 2, rel=1e-3)
    assert chunk["attention"].flops / tokens == pytest.approx(89e6, rel=0.01)
    assert chunk["attention"].gathered / tokens == pytest.approx(2.36e6, rel=0.01)
    decode = roofline.step(c, c.pattern, 1, tokens, index_itemsize=1)
    weights = sum(p.moved for name, p in decode.items() if name not in ("attention", "index_scores", "cache_writes"))
    assert weights == pytest.approx(7.2e9, rel=0.01)  # 4 of 64 experts, everything else whole
    assert roofline.seconds(decode, roofline.CHIPS["h200"]) == pytest.approx(1.6e-3, rel=0.01)


def test_limits_take_the_slower_of_compute_and_memory():
    chip = roofline.Chip(bf16=1, fp8=2, hbm=1, memory=1)
    parts = dict(a=roofline.Part(flops=4e12, moved=1e12), b=roofline.Part(4e12, 3e12, fp8=True), c=roofline.Part(0, 5e12))
    assert roofline.seconds(parts, chip) == 4 + 3 + 5
    assert roofline.total([parts, dict(a=roofline.Part(1, 2, 3))])["a"] == (4e12 + 1, 1e12 + 2, 3, False)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"),
     ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "v7x"), ("cpu", None), ("NVIDIA A100", None)],
)  # fmt: skip
def test_chips_are_found_by_what_jax_calls_them(kind, chip):
    assert roofline.chip_of(kind) == chip


def test_limits_of_several_devices():
    assert roofline.limits("v6e", 4).bf16 == 4 * 918 and roofline.limits("v7x").memory == 96
    with pytest.raises(UserError, match="no chip is called 'a100'"):
        roofline.limits("a100")


# Random weights


def test_weights_are_made_in_blocks_of_bounded_memory():
    """Two stacks of one shape, in less memory beside them than one of their layers takes."""
    shape, dtype = (6, 8, 64, 96), jnp.bfloat16
    draw = lambda seed, *block: model.normal_in_blocks(jax.random.key(seed), shape, dtype, 0.02, *block)
    program = jax.jit(lambda: (draw(0, 1 << 12), draw(1, 1 << 12))).lower().compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 64 * 96 * 8 < memory.output_size_in_bytes / 6
    at_once = jax.jit(lambda: draw(0)).lower().compile().memory_analysis()
    assert at_once.temp_size_in_bytes > at_once.output_size_in_bytes
    values, other = (np.asarray(a, np.float32) for a in program())
    assert values.shape == shape and abs(values.std() / 0.02 - 1) < 0.01 and abs(values.mean()) < 2e-4
    # No block is drawn twice, and none keeps what the stack was filled with at first.
    assert len(np.unique(np.concatenate([values, other]).reshape(-1, 96), axis=0)) == 2 * 6 * 8 * 64
    np.testing.assert_array_equal(np.asarray(program()[0], np.float32), values)


@pytest.mark.slow
def test_init_of_the_30b_model_needs_a_hundredth_of_its_weights_beside_them():
    c = config.preset("glm-4.7-flash-dsa")
    memory = jax.jit(lambda: model.init_params(c, 47)).lower().compile().memory_analysis()
    assert memory.output_size_in_bytes > 60e9 and memory.temp_size_in_bytes < 0.6e9


def test_neighbours_share_what_the_ratio_says(steps, monkeypatch):
    """64 times top-k, two thirds of 200K tokens at 2,048."""
    natural, ends, shared = steps.engine.params, [256, 512, 768, 1024], {}
    for ratio in (0, 64):
        params = random_weights.alike(jax.tree.map(jnp.copy, natural), steps.config, ratio) if ratio else natural
        monkeypatch.setattr(steps.engine, "params", params)
        assert np.isfinite(np.asarray(steps.prefill(ALL, 0, 1024))).all()
        shared[ratio] = steps.overlap(ALL, ends)
    assert shared[0] < 0.5 and 0.8 <= shared[64] <= 0.9


def test_scaled_weights_route_as_natural_ones_do(steps):
    """The constant channel must not send all tokens to the same experts."""
    params = random_weights.alike(jax.tree.map(jnp.copy, steps.engine.params), steps.config, 64.0)
    x_WD = params["embed_tokens"] / jnp.sqrt(jnp.mean(params["embed_tokens"] ** 2, -1, keepdims=True))
    p = jax.tree.map(lambda a: a[0], params["experts"])
    experts_NX, _ = moe.route(steps.config, p, linear(x_WD, p["gate"], dtype=jnp.float32))
    load_E = np.bincount(np.asarray(experts_NX).ravel(), minlength=4) / experts_NX.size
    assert 0.15 < load_E.min() and load_E.max() < 0.35


# Steps


def test_rows_of_all_patterns_over_one_program(steps):
    patterns = [ALL, QUARTER, Pattern("FSFS"), DENSE]
    tests = [("pp", 64, 896), ("tg", 3, 896), ("tg", 3, 960)]
    rows = bench_measure.measure(steps, patterns, tests, repeats=2, chip=roofline.CHIPS["h200"], overlap=True)
    for kind in ("prefill", "decode"):
        assert steps.program(kind, ALL) is steps.program(kind, QUARTER) is not steps.program(kind, DENSE)
    assert [(r.test, r.tokens, r.depth, r.pattern) for r in rows] == [(*test, str(p)) for test in tests for p in patterns]
    for row in rows:
        assert len(row.seconds) == 2 and row.tps > 0 and 0 < row.limit < row.median and row.memory_gb > 0
        assert (row.indexer is None) == (row.overlap is None) == (row.pattern == DENSE) == (row.full == 0)


def test_steps_compute_what_the_engine_computes(steps):
    engine = steps.engine
    prompt = steps.ids_BT[0, :64].tolist()
    logits_BW, _ = engine.prefill([prompt], engine.new_cache(1, 1024))
    np.testing.assert_allclose(steps.prefill(ALL, 0, 64), logits_BW, atol=1e-5)
    # A pattern changes what is computed, whichever ran before.
    assert np.abs(np.asarray(steps.prefill(QUARTER, 0, 64)) - np.asarray(logits_BW)).max() > 1e-4
    # Decode takes its first token from the prompt, then its own.
    steps.prefill(ALL, 0, 40)
    last, prompt = steps.decode(ALL, 40, 3), prompt[:41]
    for _ in range(3):
        logits_BW, _ = engine.prefill([prompt], engine.new_cache(1, 1024))
        prompt.append(int(logits_BW.argmax(-1)[0]))
    assert last.tolist() == prompt[-1:]


def test_a_pattern_compiled_in_computes_the_same(steps):
    static = Steps(steps.engine, ALL.full_layers, seed=2, static=True)
    static.reserve(1024)
    pattern = Pattern("FSFS")
    np.testing.assert_allclose(static.prefill(pattern, 0, 64), steps.prefill(pattern, 0, 64), atol=1e-5)
    assert static._static(pattern) != static._static(QUARTER) and steps._static(pattern) == steps._static(QUARTER)


def test_overlap_is_that_of_the_selected_sets(steps):
    steps.prefill(ALL, 0, 128)
    sets = [[set(row.tolist()) for row in layer[0]] for layer in np.asarray(steps.select(ALL, 64, 128)[0])]
    want = [np.mean([len(a & b) / 16 for a, b in zip(layer, layer[1:], strict=False)]) for layer in sets]
    assert steps.overlap(ALL, [128]) == pytest.approx(np.mean(want))
    assert steps.overlap(QUARTER, [128]) == pytest.approx(want[0])
    assert steps.overlap(ALL, [16]) is None and steps.overlap(DENSE, [128]) is None


def test_the_indexer_share_is_what_full_layers_add():
    row = lambda p, s: Row(p, p.count("F"), "tg", 1, 0, 1, [s])
    rows = [row("FFFF", 1.6), row("FSFS", 1.2), row("FSSS", 1.0), row("dense", 9.0)]
    bench_measure._indexer_shares(rows, None)
    assert [r.indexer for r in rows] == [pytest.approx(v) for v in (0.8 / 1.6, 0.4 / 1.2, 0.2 / 1.0)] + [None]
    alone = [row("FFFF", 1.6)]
    bench_measure._indexer_shares(alone, [1.0, 5.0, 0.9])
    assert alone[0].indexer == pytest.approx(0.5)
    bench_measure._indexer_shares(alone, [5.0])  # slower with fewer full layers: noise
    assert alone[0].indexer is None


def test_speed_is_the_median_and_half_the_range():
    row = Row("FSSS", 1, "pp", 10, 0, 2, [1.0, 4.0, 2.0])
    assert (row.median, row.tps, row.spread) == (2.0, 10.0, (20 - 5) / 2)


@pytest.mark.parametrize(("start", "stop", "chunk"), [(0, 50, 16), (7, 8, 16), (5, 37, 32), (0, 9, 8)])
def test_chunks_cover_the_prompt(start, stop, chunk):
    found = list(chunks(start, stop, chunk))
    assert [at for at, _ in found] == list(range(start, stop, chunk))
    assert all(size == chunk for _, size in found[:-1]) and found[-1][0] + found[-1][1] >= stop


# What a user sees


ERRORS = [
    (["-r", "0"], "must be an integer >= 1, not '0'"),
    (["-b", "0"], "must be an integer >= 1, not '0'"),
    (["-p", "-1"], "must be an integer >= 0, not '-1'"),
    (["-p", "0", "-n", "0"], "-p 0 and -n 0 leave nothing to measure"),
    (["-d", "0,x"], "must be an integer >= 0, not 'x'"),
    (["-d", ""], "must be an integer >= 0, not ''"),
    (["-p", "70000"], "-d 0 and -p 70000 need 70000 tokens, the context holds 65536"),
    (["-d", "512,65500", "-n", "40", "-p", "1"], "-d 65500 and -n 40 need 65540 tokens, the context holds 65536"),
    (["-p", "64", "-d", "64", "--max-context", "100"], "need 128 tokens, the context holds 100"),
    (["--compare", "all-full", "sparse"], "the index pattern may hold only F and S"),
    (["--compare", "FS"], "has 2 characters, the model has 16 layers"),
    (["--compare", "all-full", "uniform:1"], "--compare uniform:1 gives the same pattern as all-full"),
    (["--compare", "dense", "--dense"], "--compare names every pattern"),
    (["--compare", "all-full", "--index-freq", "4"], "--compare names every pattern"),
    (["--compare", "S" * 16], "layer 0 is S"),
    (["--compare", "nosuch.json"], "nosuch.json cannot be read"),
    (["--preset", "nosuch"], "no preset is called 'nosuch'; there are"),
    (["--preset", "demo", "--model", "x"], "leave --model out"),
    (["--neighbours", "64"], "give --preset too"),
    (["--preset", "demo", "--neighbours", "-1"], "must be a number from 0 to 1e6, not '-1'"),
    (["--preset", "demo", "--neighbours", "nan"], "must be a number from 0 to 1e6, not 'nan'"),
    (["--chip", "a100"], "invalid choice"),
    (["--implementation", "gpu"], "implementation=gpu: needs a GPU"),
    (["--model", "no/such/dir"], "no/such/dir"),
    (["-o", "csv"], "invalid choice"),
]


def test_a_batch_beyond_all_memory(steps):
    with pytest.raises(UserError, match="GB of cache"):
        Steps(steps.engine, (0,), batch=10**23).reserve(64)


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "")
def test_errors_are_one_line_before_weights(argv, message, capsys, monkeypatch):
    for module, name in ((checkpoint, "load_params"), (model, "init_params")):
        monkeypatch.setattr(module, name, lambda *args, **how: pytest.fail("weights were loaded"))
    assert bench.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_weights_that_do_not_fit_are_refused_before_they_are_made(capsys, monkeypatch):
    monkeypatch.setattr(random_weights, "_free_bytes", lambda: 10**10)
    monkeypatch.setattr(model, "init_params", lambda *a, **k: pytest.fail("weights were made"))
    assert bench.main(["--preset", "glm-4.7-flash-dsa", "-q"]) == 2
    assert "the weights need 60.0 GB, 10.0 GB are free" in capsys.readouterr().err


def test_table_and_json(steps, capsys, monkeypatch):
    def engine(c, pattern, *, seed, neighbours, dtype, **options):
        assert c == steps.config and str(pattern) == "FFFS" and (seed, neighbours, dtype) == (0, 8, "bfloat16")
        params = steps.engine.params | dict(indexer=jax.tree.map(lambda a: a[:3], steps.engine.params["indexer"]))
        return Engine(params, c, (), max_context=2048, prefill_chunk=64, dtype=jnp.dtype("float32"))

    monkeypatch.setitem(config._PRESETS, "tiny", TINY)
    monkeypatch.setattr(random_weights, "engine", engine)
    argv = ["--preset", "tiny", "--neighbours", "8", "--chip", "v6e", "-p", "0", "-n", "2", "-r", "2", "-b", "2"]
    assert bench.main([*argv, "-d", "100", "--compare", "FSFS", "FFSS", "dense"]) == 0
    out, err = capsys.readouterr()
    *table, last = out.splitlines()
    assert [c.strip() for c in table[0].strip("|").split("|")] == list(bench.HEADER)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table[2:]]
    assert [row[3] for row in rows] == ["2F/2S FSFS", "2F/2S FFSS", "dense"]
    for row in rows:
        assert row[0] == "tiny" and re.fullmatch(r"0\.\d M", row[1]) and row[4] == "tg2 x 2 @ d100"
        assert re.fullmatch(r"[\d.]+ ± [\d.]+", row[5]) and re.fullmatch(r"[\d.]+ %", row[8])
        assert re.fullmatch("–" if row[3] == "dense" else r"[\d.]+ %|–", row[7])  # – where noise is larger
        assert re.fullmatch("–" if row[3] == "dense" else r"[\d.]+ %", row[9])
    found = json.loads(last)
    assert found["neighbours"] == 8 and found["weights"] == "random, seed 0" and found["chip"] == "v6e"
    assert [t["pattern"] for t in found["tests"]] == ["FSFS", "FFSS", "dense"]
    for test in found["tests"]:
        assert test["tps"] == pytest.approx(2 * 2 / np.median(test["seconds"]))
        assert test["roofline"] == pytest.approx(test["limit"] / test["median_s"])
    assert re.search(r"compiled in [\d.]+ s · peak memory [\d.]+ GB", err)


def test_json_alone_on_the_demo_model(capsys):
    assert bench.main(["-p", "0", "-n", "2", "-d", "0", "-r", "1", "-o", "json", "-q"]) == 0
    out, err = capsys.readouterr()
    assert not err and out.count("\n") == 1
    found = json.loads(out)
    assert found["model"] == "demo" and found["weights"] == "checkpoint" and found["params"] == 11906360
    (test,) = found["tests"]
    assert test["pattern"] == "F" * 16 and test["overlap"] is None and test["roofline"] is None


def test_no_garbage_is_collected_while_the_clock_runs():
    seen = []
    look = lambda pattern: seen.append(gc.isenabled()) or jnp.zeros(())
    bench_measure._timed(look, ["a"], 2, 9.0, look)
    assert seen == [False, True, False] and gc.isenabled()


def test_no_round_begins_after_its_time():
    calls, after = [], []
    run = lambda p: calls.append(p) or jnp.zeros(())
    times, found = bench_measure._timed(run, ["a", "b"], 3, 0.0, lambda p: after.append(p) or p.upper())
    assert calls == after == ["a", "b"] and found == dict(a="A", b="B") and [len(t) for t in times.values()] == [1, 1]
    times, _ = bench_measure._timed(run, ["a", "b"], 3, 1e9, None)
    assert [len(t) for t in times.values()] == [3, 3]


def test_only_decode_on_a_gpu_is_one_graph(monkeypatch):
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.CHIPS["h100"])
    graphs = "xla_gpu_enable_command_buffer"
    assert "WHILE" in dispatch.compiler_options(1)[graphs] and dispatch.compiler_options(4096) is None
    assert dispatch.compiler_options(1, profiled=True) == {graphs: ""}
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cpu", "cpu"))
    assert dispatch.compiler_options(1) is None
