"""``ic-jax info``: which kernel runs where, and why the others do not."""

import functools
import json

import jax
import pytest
from test_cli import CONFIG

import pallas_kernels
from ic_jax import info
from ic_jax.config import DEMO_DIRECTORY, Config
from pallas_kernels import dispatch


def test_info_as_json(capsys):
    assert info.main(["--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert not err and {"jax", "jaxlib", "flax", "ic-jax"} <= result["versions"].keys()
    assert result["devices"][0]["platform"] == "cpu" and result["devices"][0]["count"] >= 1
    ops = {(e["op"], e["step"]): e for e in result["ops"] if e["model"] == "glm-4.7-flash-dsa"}
    assert len(ops) == 16
    assert all(e["runs"] == "reference" and set(e["against"]) == {"gpu", "tpu"} for e in ops.values())


def test_info_as_a_table(capsys):
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert "| op " in out and "needs a GPU, this process runs on cpu" in out


def test_info_knows_the_chips_of_the_kernels():
    assert info.CHIPS == tuple(dispatch.CHIPS)


@pytest.mark.parametrize("chip", info.CHIPS)
def test_info_for_another_chip(chip, capsys):
    assert info.main(["--chip", chip, "--json"]) == 0
    backend = dispatch.CHIPS[chip].platform
    for entry in json.loads(capsys.readouterr().out)["ops"]:
        attention = entry["op"] in ("index_topk", "sparse_mla")
        assert entry["runs"] == backend if attention else entry["runs"] in ("reference", backend)
        assert "this process runs on" not in str(entry["against"])
        assert entry["runs"] == backend or entry["against"][backend]


def test_a_chip_without_kernels_is_refused_by_name():
    c = Config.load(DEMO_DIRECTORY)
    args, kwargs = info.op_arguments(c, 1)["index_topk"]
    reason = dispatch.reason_against("index_topk", "tpu", *args, on=dispatch.Target("tpu", "TPU v4"), **kwargs)
    assert reason == "needs a TPU v5e, v5p, v6e or v7x, found TPU v4"
    reason = dispatch.reason_against("index_topk", "gpu", *args, on=dispatch.Target("gpu", "8.0"), **kwargs)
    assert reason == "needs a Hopper GPU (compute capability 9.0), found 8.0"


def test_op_arguments_are_those_of_the_model():
    """The shapes asked about run: the reference takes them (evaluated abstractly)."""
    c = Config.from_hf(CONFIG)
    for queries in (1, 16):
        for op, (args, kwargs) in info.op_arguments(c, queries, context=512).items():
            call = functools.partial(getattr(pallas_kernels, op), implementation="reference", **kwargs)
            out = jax.tree.leaves(jax.eval_shape(call, *args))
            sorted_rows, by_token = (queries * 2, c.moe_intermediate_size), (queries, 2)
            shapes = dict(grouped_matmul=sorted_rows, grouped_swiglu=sorted_rows, expert_matmul=by_token)
            assert out[0].shape[:2] == shapes.get(op, (1, queries))


def test_forced_implementation_says_why_not():
    c = Config.from_hf(CONFIG)
    with pytest.raises(NotImplementedError, match="index_topk: implementation=tpu"):
        info.implementations(c, "tpu")
    assert info.implementations(c, "tpu", dense=True) == {"dense_mla": "reference"}
