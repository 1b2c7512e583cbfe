"""benchmarks/kernels.py without a GPU: its cases, selection, clock, verdicts and report, and that its checks can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import profiler

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import kernel_cases
import kernels
import kernels_grouped_matmul as grouped
import limits
from kernel_cases import Check, Timing, Work

from ic_jax import cache as caches
from ic_jax import config, model
from pallas_kernels import dispatch, layer_matmul_gpu, reference

H200 = "NVIDIA H200"
FACTS = dict(device=H200, driver="580.1", versions={"jax": "1", "python": "3"}, command="python benchmarks/kernels.py")


def test_every_case_is_listed_once_with_its_targets(capsys):
    assert kernels.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[6:].split(",")[0] for line in lines]
    assert len(set(names)) == len(names) > 200 and {name.split(".")[0] for name in names} == set(kernels.OPS)
    kinds = [line[:5] for line in lines]
    assert kinds == sorted(kinds) and {"check", "time "} == set(kinds)
    assert (
        "time  index_topk.whole.fp8.4096x131072, DeepGEMM + SGLang 5,460 us, to reach 5,400 us, to reach 4,500 us" in lines
    )
    assert "time  sparse_mla.backward.64_heads.random, to reach 25,700 us" in lines


def test_a_reader_of_the_list_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, kernels.__file__, "--list"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.stderr, done.returncode) == (b"", 141)


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["--list", "a"], ["a.x.1", "a.y.1", "a.x.2"]),
        (["--list", "a.x", "--check"], ["a.x.1"]),
        (["--list", "a.x", "b", "--time"], ["a.x.2", "b.x"]),
        (["--list", "a.x", "a.x.2", "--check", "--time"], ["a.x.1", "a.x.2"]),
    ],
)
def test_names_choose_by_whole_parts(monkeypatch, capsys, args, want):
    cases = [Check("a.x.1", None), Check("a.y.1", None), Timing("a.x.2", None), Timing("b.x", None), Timing("ab.x", None)]
    monkeypatch.setattr(kernels, "every_case", lambda: cases)
    assert kernels.main(args) == 0
    assert [line[6:] for line in capsys.readouterr().out.splitlines()] == want


@pytest.mark.parametrize(("args", "error"), [(["sparse"], "no case is called sparse"), ([], "need a Hopper GPU")])
def test_mistakes_are_one_line(capsys, args, error):
    assert kernels.main(args) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and error in told.err and told.err.count("\n") == 1


@pytest.mark.parametrize(
    ("us", "said"),
    [(90, "met"), (100, "met"), (100.04, "missed by 0.04 %"), (109.2, "missed by 9 %"), (250, "missed by 150 %")],
)
def test_verdict(us, said):
    assert kernel_cases.verdict(us, 100) == said


def test_the_clock_times_a_layer(monkeypatch):
    """Of three calls of two kernels over two layers: the median sum, the spread, shares of the limits."""
    calls = []

    def measure(f, aggregate, iterations):
        assert not aggregate
        runs = [[("scores", 0.002), ("merge", 0.001 * (n + 1))] for n in range(iterations)]
        return lambda *args: (calls.append(f(*args)), runs)

    monkeypatch.setattr(profiler, "measure", measure)
    work = Work(lambda x: 2 * x, (jnp.ones(8),), flops=79e6, moved=4.3e6, layers=2)
    found = kernel_cases.clock(work, calls=3)
    assert calls[0].tolist() == [2.0] * 8
    assert (found["device_us"], found["spread_us"], found["launches"]) == pytest.approx((2.0, 1.0, 1.0))
    assert found["queued_us"] > 0 < found["wall_us"] and found["kernels"] == []
    flops, moved = kernel_cases.rates(work, 2.0, H200)
    assert flops == dict(unit="TFLOP/s", rate=pytest.approx(39.5), share=pytest.approx(0.05), limit=790)
    assert moved == dict(unit="TB/s", rate=pytest.approx(2.15), share=pytest.approx(0.5), limit=pytest.approx(4.3))
    (fp8,) = kernel_cases.rates(Work(None, (), flops=79e6, fp8=True), 2.0, H200)
    assert fp8["limit"] == limits.MEASURED[H200].fp8 / 1e12 > 790
    assert "share" not in kernel_cases.rates(work, 2.0, "another")[0]


def timed(us, **beside):
    return Work(us, (), flops=us * 79e6, **beside)


def clock(work):
    us = dict(device_us=float(work.f), spread_us=1.0, queued_us=work.f + 5.0, wall_us=work.f + 50.0)
    return us | dict(compile_s=0.1, launches=1, kernels=[])


def broken():
    raise ValueError("a | b\nc")


CASES = [
    Check("op.right", lambda: {"error 1e-3": True, "repeats": True}),
    Check("op.wrong", lambda: {"error 1e-3": True, "repeats": False}),
    Check("op.broken", broken),
    Check("op.nothing", dict),
    Timing("op.met", lambda: timed(90), ((150, "Peer"), (160, "Other")), (100,)),
    Timing("op.missed", lambda: timed(1000, note="new"), reach=(2000, 800)),
    Timing("op.gone", broken),
    Timing("op.theirs", broken, ours=False),
]


def run(monkeypatch, cases, *args):
    monkeypatch.setattr(kernels, "every_case", lambda: cases)
    monkeypatch.setattr(kernels, "about", lambda command: FACTS | dict(command=command))
    monkeypatch.setattr(kernel_cases, "clock", clock)
    return kernels.main(list(args))


def test_the_report_holds_what_went_well_and_what_did_not(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, CASES, "op", "--out", str(tmp_path / "new")) == 1
    told = capsys.readouterr()
    *text, last = told.out.splitlines()
    assert "ValueError: a | b" in told.err
    assert "NVIDIA H200, driver 580.1, jax 1, python 3. Command: `python benchmarks/kernels.py op`." in text
    for line in (
        "- ok `op.right`: error 1e-3; repeats",
        "- FAILED `op.wrong`: error 1e-3; WRONG: repeats",
        "- FAILED `op.broken`: ValueError: a | b c",
        "- FAILED `op.nothing`: ",
        "| op.met | 90.0 (1.0) | 95.0 / 140 | 150 Peer, 160 Other | 100 met | 79.00 TFLOP/s, 10 % of 790 |",
        "| op.missed (new) | 1,000 (1.0) | 1,005 / 1,050 | – | 2,000 met, 800 missed by 25 % | 79.00 TFLOP/s, 10 % of 790 |",
        "| op.gone | FAILED: ValueError: a / b c | | | | |",
        "| op.theirs | left out: ValueError: a / b c | | | | |",
        "8 of 8 cases run, 4 failed: `op.wrong`, `op.broken`, `op.nothing`, `op.gone`.",
    ):
        assert text.count(line) == 1, line
    assert len({line.count("|") for line in text if line.startswith("|")}) == 1
    result = json.loads(last)
    assert [row["name"] for row in result["cases"]] == [case.name for case in CASES]
    assert json.loads((tmp_path / "new" / "kernels.json").read_text()) == result | dict(complete=True)
    kept = (tmp_path / "new" / "kernels.md").read_text().splitlines()
    assert [line for line in text if line[:1] in ("-", "|")] == [line for line in kept if line[:1] in ("-", "|")]


def test_only_the_others_failures_are_forgiven(monkeypatch, capsys):
    assert run(monkeypatch, [CASES[0], CASES[4], CASES[7]]) == 0
    assert "3 of 3 cases run, 0 failed." in capsys.readouterr().out
    assert run(monkeypatch, CASES, "op.right", "op.met") == 0
    assert run(monkeypatch, CASES, "--time") == run(monkeypatch, CASES, "--check") == 1


def test_a_killed_run_keeps_what_it_has(monkeypatch, tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, [*CASES[:2], CASES[4], Timing("op.killed", killed)], "--out", str(tmp_path))
    kept = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["name"] for row in kept["cases"]] == ["op.right", "op.wrong", "op.met"] and not kept["complete"]
    text = (tmp_path / "kernels.md").read_text()
    assert "| op.met | 90.0" in text and "3 of 4 cases run, 1 failed: `op.wrong`." in text


@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_every_product_of_a_decode_step_has_its_check(monkeypatch, sequences):
    """Those for which the 30B model takes a kernel, as it is traced for a Hopper GPU, at these shapes."""
    met, call = set(), dispatch.call

    def record(op, implementation, *args, **how):
        if op.endswith(("_matmul", "_swiglu")) and dispatch.choose(op, implementation, *args, **how) == "gpu":
            met.add((op, *form(op, *args)))
        return call(op, "reference", *args, **how)

    def form(op, x, w, layer, *rest):
        stacks = tuple(a.shape for a in jax.tree.leaves(w))
        if op == "layer_matmul":
            dtype, norm, eps, _ = rest
            return stacks, reference.each(dtype, stacks), eps, norm and norm[0].shape
        return (stacks, x.shape) if op.startswith("grouped") else (stacks, x.shape, rest[0] is not None, rest[1])

    monkeypatch.setattr(dispatch, "target", lambda: dispatch.CHIPS["h200"])
    monkeypatch.setattr(dispatch, "call", record)
    c = config.preset("glm-4.7-flash-dsa")
    cache = jax.eval_shape(lambda: caches.allocate(c, c.pattern.n_full, sequences, 4096))
    params, _ = model.abstract_params(c, c.pattern.n_full)
    tokens, slots = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((sequences, 1), (c.num_hidden_layers,)))
    jax.eval_shape(lambda *args: model.forward(args[0], c, *args[1:]), params, slots, tokens, tokens, cache)

    checked = set()
    for layers, inner, outs, dtype, eps in grouped.LINEAR.values():
        stacks = tuple((layers, *inner[:-1], F, inner[-1]) for F in outs)
        checked.add(("layer_matmul", stacks, reference.each(dtype, stacks), eps, eps and (47, inner[-1])))
    for shape, inner, count, each in grouped.EXPERT.values():
        checked.add(("expert_matmul", (shape,) * count, (sequences, *inner), each > 0, None))
    for *shape, N, _ in grouped.GROUPED:
        checked.add(("grouped_matmul", (tuple(shape),), (N, shape[2])))
    for N, _ in grouped.SWIGLU:
        checked.add(("grouped_swiglu", ((grouped.LAYERS, grouped.EXPERTS, *grouped.GATE),), (N, grouped.GATE[0])))
    assert met <= checked
    assert len(met) == (15 if sequences <= 4 else 2)


@pytest.mark.parametrize("fault", ["none", "eps", "layer", "norm layer", "dtype", "tiny"])
def test_the_check_of_a_normed_product_can_fail(monkeypatch, fault):
    """A product in the kernel's place: right, and with a fault in one thing (test_grouped_matmul has the kernel)."""

    def product(x, w, layer, dtypes, norm, eps, add=None):
        h = reference.rms_norm(x, norm[0][norm[1] - (fault == "norm layer")], 0.0 if fault == "eps" else eps)
        h = jax.lax.optimization_barrier(h)  # or XLA multiplies what has not been rounded
        y, logits = (h.astype(jnp.float32) @ a[layer - (fault == "layer")].astype(jnp.float32).T for a in w)
        y = y.at[0, 3].multiply(1.02) if fault == "tiny" else y
        return [y.astype(dtypes[0]), logits.astype(dtypes[fault != "dtype"]), h]

    monkeypatch.setattr(layer_matmul_gpu, "product", product)
    monkeypatch.setitem(grouped.LINEAR, "small", (3, (256,), (4, 2), (None, jnp.float32), 1e-5))
    found = grouped.check_linear(1, "small")
    wrong = {"none": [], "eps": [0], "layer": [1], "norm layer": [0], "dtype": [2], "tiny": [1]}[fault]
    assert [n for n, held in enumerate(found.values()) if not held] == wrong and len(found) == 4


def test_exchange_returns_every_token_both_ways(monkeypatch, capsys):
    import exchange

    monkeypatch.setattr(sys, "argv", "exchange.py --tokens 64 --width 16 --repeats 1".split())
    exchange.main()  # compares what came back
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == jax.device_count() > 1 and 0 < found["share_sent"] < 1
    assert found["gathered ms"] > 0 and found["sent ms"] > 0
