"""The parts of benchmarks/e2e.py that need no accelerator: phases from a profile, the fill of a batch, the report."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import agreement
import e2e
import e2e_report
import saturation
import scopes

from ic_jax import cache as caches
from ic_jax.config import Config

ABOUT = dict(preset="tiny", layers=None, seed=0, device="a device", versions={"jax": "1"})


@pytest.mark.parametrize(
    ("op_name", "opcode", "phase"),
    [
        ("jit(f)/while/body/index_topk/cond/branch_1_fun/while/body/scores/dot_general", "dot", "scoring"),
        ("jit(f)/while/body/index_topk/cond/branch_1_fun/select/top_k", "custom-call", "selection"),
        ("jit(f)/while/body/index_topk/cond/branch_1_fun/add", "add", "index queries and plan"),
        ("jit(f)/while/body/sparse/routed_experts/ragged_dot", "fusion", "experts"),
        ("jit(f)/while/body/dense/dot_general", "dot", "dense ffn"),
        ("jit(f)/while/body/scores_of_something/add", "add", "the rest"),
        ("", "copy-start", "copies"),
        ("", "fusion", "the rest"),
    ],
)
def test_phases_come_from_the_innermost_scope(op_name, opcode, phase):
    assert scopes.phase(op_name, opcode) == phase


def test_time_goes_to_the_scope_it_was_spent_in():
    def f(x):
        with jax.named_scope("routed_experts"):
            for _ in range(6):
                x = jnp.tanh(x @ x)
        with jax.named_scope("head"):
            return x + 1

    x = jnp.ones((384, 384))
    program = jax.jit(f).lower(x).compile()
    found, operations = scopes.times(lambda: [program(x) for _ in range(3)], program, 3)
    known = scopes.operations(program.as_text())
    assert {"experts", "embed and head"} >= set(found) >= {"experts"}
    assert 0 < found["experts"] < 1 and found["experts"] > 3 * found.get("embed and head", 0)
    assert 6 <= operations <= len(known)


def test_every_sequence_of_a_batch_gets_the_first_ones_rows():
    c = Config.from_hf(dict(
        model_type="glm_moe_dsa", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=16, n_routed_experts=2,
        moe_intermediate_size=8, num_experts_per_tok=1, index_n_heads=2, index_head_dim=16, index_topk=8,
    ))  # fmt: skip
    cache = caches.allocate(c, 2, 3, 300, dtype=jnp.float32, index_dtype=jnp.float8_e4m3fn)
    rows = cache.latent_LMU.shape[1] // 3
    first = np.random.default_rng(0).standard_normal((2, rows, c.latent_dim)).astype(np.float32)
    scales = np.arange(2 * rows, dtype=np.float32).reshape(2, rows)
    cache = cache.replace(
        latent_LMU=cache.latent_LMU.at[:, :rows].set(first), index_scales_GM=cache.index_scales_GM.at[:, :rows].set(scales)
    )
    full = saturation._spread(cache, 3)
    for name, want in (("latent_LMU", first), ("index_scales_GM", scales)):
        pool = np.asarray(getattr(full, name), np.float32)
        for b in range(3):
            np.testing.assert_array_equal(pool[:, b * rows : (b + 1) * rows], want)


def test_agreement_measures_rounding():
    from ic_jax import random_weights
    from ic_jax.config import preset
    from ic_jax.pattern import Pattern

    c = preset("demo")
    c = c.replace(num_hidden_layers=2, mlp_layer_types=c.mlp_layer_types[:2], pattern=Pattern("FF"))
    tokens = c.index_topk + 40
    engine = random_weights.engine(c, Pattern("FF"), prefill_chunk=tokens)
    rows = agreement.compare(engine, Pattern("FS"), tokens, "bfloat16", generate=3)
    assert [(r["step"], r["queries"]) for r in rows] == [("prefill", tokens), ("decode", 3)]
    for r in rows:
        # On a CPU the kernels are the reference; bfloat16 is off float32 by its rounding, and not by more.
        assert r["reference, kernels"] == dict(selections=1, logits=0, top1=1)
        assert r["float32, reference"] == r["float32, kernels"]
        assert 1e-3 < r["float32, kernels"]["logits"] < 0.05 and 0.9 < r["float32, kernels"]["selections"] < 1


def row(test, pattern, seconds, tokens, depth, overlap=0.85):
    full = pattern.count("F")
    return dict(
        pattern=pattern, full=full, test=test, tokens=tokens, depth=depth, seconds=[seconds, seconds * 1.2],
        median_s=seconds, tps=tokens / seconds, tps_spread=1.0, indexer=0.5 if full else None,
        roofline=0.25, overlap=overlap, memory_gb=100.0,
    )  # fmt: skip


def parts():
    for weights in ("natural", "alike"):
        for dtype, t in (("float8_e4m3fn", 200_000), ("bfloat16", 200_000), ("float8_e4m3fn", 10_000)):
            rows = [row("pp", "FFFF", t / 1e4, t, 0), row("pp", "FSSS", t / 2e4, t, 0),
                    row("tg", "FFFF", 1.0, 64, t, None), row("tg", "FSSS", 0.5, 64, t, None)]  # fmt: skip
            yield f"table-{weights}-{dtype}-{t}", dict(kind="table", weights=weights, index_dtype=dtype, tokens=t, rows=rows)
    times = {1024: dict(FFFF=3, FSSS=2, dense=1), 8192: dict(FFFF=4, FSSS=3, dense=9)}
    rows = [row("pp", p, s, 4096, depth) for depth, at in times.items() for p, s in at.items()]
    yield "crossover-alike", dict(kind="crossover", weights="alike", rows=rows)
    for name, full, seconds in (("all", 4, 2.0), ("quarter", 1, 1.0)):
        yield (
            f"saturated-10000-{name}",
            dict(
                kind="saturated",
                tokens=10_000,
                full=full,
                batch=10,
                generate=64,
                seconds=[seconds] * 3,
                pool_tokens=100_000 // full,
            ),
        )
    pair = lambda share: dict(selections=share, logits=(1 - share) / 2, top1=1.0)
    pairs = {"float32, reference": pair(0.96), "float32, kernels": pair(0.98), "reference, kernels": pair(0.94)}
    kinds = dict(prefill=8192, decode=16)
    rows = [dict(index_dtype="float8_e4m3fn", step=step, queries=n) | pairs for step, n in kinds.items()]
    yield "correct-alike", dict(kind="correct", weights="alike", layers=4, tokens=8192, rows=rows)


def test_report(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    assert e2e_report.write(tmp_path) == 2 and "holds no parts yet" in capsys.readouterr().err
    for name, part in parts():
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(about=ABOUT) | part))
    assert e2e_report.write(tmp_path) == 0
    text = (tmp_path / "e2e.md").read_text()
    tables = {s.split("\n")[0]: s.splitlines() for s in text.split("## ")[1:]}
    cells = lambda line: [c.strip() for c in line.strip("|").split("|")]
    prefill = tables["Prefill of the whole prompt"]
    names, rows = cells(prefill[2]), [cells(line) for line in prefill[4:] if line]
    found = dict(zip(names, next(r for r in rows if r[:3] == ["fp8", "alike", "200000"]), strict=True))
    assert (found["all-F s"], found["1/4 s"], found["ratio"], found["paper 1/4 s"]) == ("20", "10", "2", "10.7")
    assert found["overlap"] == "85 %" and found["of the limit 1/4"] == "25 %"
    assert [cells(line)[-1] for line in tables["Against dense attention"][4:6]] == ["dense", "1/4"]
    saturated = dict(zip(*(cells(tables["The cache full"][i]) for i in (2, 4)), strict=True))
    assert (saturated["tok/s all-F"], saturated["tok/s 1/4"], saturated["cost saved"]) == ("320", "640", "50 %")
    assert saturated["M tokens/GPU-hour 1/4"] == "2.304" and saturated["tokens held 1/4"] == "100000"
    correct = tables["Kernels and reference against float32, and against each other"]
    first = dict(zip(cells(correct[2]), cells(correct[4]), strict=True))
    assert [first[f"selections, {run}"] for run in ("reference", "kernels", "both")] == ["96.00 %", "98.00 %", "94.00 %"]
    assert [first[f"logits off, {run}"] for run in ("reference", "kernels")] == ["2.00 %", "1.00 %"]
    with open(tmp_path / "e2e.csv") as f:
        assert len(list(csv.DictReader(f))) == 6 + 6 + 2 + 1 + 2
    assert (tmp_path / "e2e.png").stat().st_size > 10_000
    other = json.loads((tmp_path / "crossover-alike.json").read_text()) | dict(about=ABOUT | dict(seed=1))
    (tmp_path / "crossover-alike.json").write_text(json.dumps(other))
    assert e2e_report.write(tmp_path) == 2 and "differ in device, versions, seed or preset" in capsys.readouterr().err


def test_an_unknown_preset_is_a_mistake(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["e2e.py", "--preset", "nope", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        e2e.main()
    assert "--preset: invalid choice: 'nope'" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["table", "all"])
def test_a_machine_that_is_too_small_is_one_line(kind, tmp_path):
    flags = ["--preset", "demo", "--layers", "2", "--tokens", "128", "--mesh", "tensor=4096", "--out", str(tmp_path)]
    command = [sys.executable, e2e.__file__, kind, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line.startswith("error: ") for line in done.stderr.splitlines() if "…" not in line] == [True]
