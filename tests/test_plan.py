"""ic-jax plan: its bytes are those that loading takes, its exchanges those that compilers make, its errors one line."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parallel as divided

from ic_jax import cache, config, engine, model, parallel, plan, plan_compile, sharding
from ic_jax.errors import UserError

NO_LIBTPU = importlib.util.find_spec("libtpu") is None


def layout(sizes, c=divided.CONFIG, pattern=None, **options):
    options = dict(context=2048, batch=2, chunk=divided.CHUNK, dtype="float32") | options
    return plan.Layout(c, pattern or c.pattern, dict.fromkeys(sharding.MESH_AXES, 1) | sizes, "h200", **options)


@pytest.mark.parametrize("text", ["tensor=2", "data=2,expert=2,context=2", "tensor=2,context=4"])
def test_bytes_are_those_of_the_arrays(text):
    mesh, c = divided.mesh_of(text), divided.CONFIG
    found = layout(sharding.parse_mesh(text), index_dtype="float8_e4m3fn").memory()
    shapes, axes = model.abstract_params(c, c.pattern.n_full, jnp.float32)
    make = lambda: cache.allocate(
        c, c.pattern.n_full, 2, 2048, dtype=jnp.float32, index_dtype="float8_e4m3fn", parallel=parallel.Parallel.of(mesh, 1)
    )

    def held(tree, specs):
        placed = sharding.shardings(mesh, specs)
        one = lambda a, s: int(np.prod(s.shard_shape(a.shape))) * a.dtype.itemsize
        return jax.tree.map(one, tree, placed)

    made = jax.eval_shape(make)
    caches = held(made, parallel.cache_specs(made))
    assert found["weights"] == sum(jax.tree.leaves(held(shapes, sharding.param_specs(axes))))
    assert found["latent cache"] == caches.latent_LMU
    assert found["index keys"] == caches.index_keys_GMJ + caches.index_scales_GM


@pytest.mark.parametrize(
    ("text", "queries", "kinds"),
    [
        ("tensor=2", 1, {"all-reduce": 1 + 2 * 5}),  # the embedding, then attention and feed-forward of every layer
        ("tensor=2", divided.CHUNK, {"all-reduce": 1 + 2 * 5, "all-gather": 2}),  # and what two full layers selected
        ("context=2", divided.CHUNK, {"all-gather": 1 + 2 * 5 + 2 * 2}),  # positions; new rows and cache, latents and keys
        ("expert=2", divided.CHUNK, {"all-gather": 1 + 2 * 5 + 2 * 2 + 2 * 3, "reduce-scatter": 3}),
        ("context=2", 1, {"all-reduce": 5, "all-gather": 5 + 2}),  # outputs; their weights, and two layers' candidates
        ("tensor=2,context=2", 1, {"all-reduce": 1 + 2 * 5, "all-gather": 5 + 2}),  # heads and rows in one sum
        ("tensor=2,expert=2", 1, {"all-reduce": 1 + 2 * 5, "all-gather": 5 + 2}),
    ],
)
def test_exchanges_are_those_of_the_compiled_program(text, queries, kinds):
    """Counted through loops over layers, of the optimised program."""
    mesh = divided.mesh_of(text)
    step, made = divided.programs(mesh, np.array(divided.SLOTS, np.int32), keep_selections=False, all_logits=True)
    ids = jax.ShapeDtypeStruct((2, queries), np.int32)
    hlo = step(queries).lower(divided.divided(mesh), ids, ids, made).compile().as_text()
    found = {k: n for k, (n, _) in plan_compile.collectives(hlo, config.Pattern("FSFSS")).items()}
    assert found == kinds
    pattern = config.Pattern("FSFSS")
    _, counted = layout(sharding.parse_mesh(text), pattern=pattern).exchanged(queries)
    assert counted == sum(found.values()) - (queries > 1 and "tensor" not in text)  # positions are no matter of size


def test_work_is_divided_and_not_lost():
    c = config.preset("glm-4.7-flash-dsa")
    options = dict(context=65536, batch=1, chunk=8192, dtype="bfloat16")
    whole, halves = layout({}, c, **options), layout({"tensor": 2, "context": 2}, c, **options)
    flops = lambda parts: sum(p.flops for p in parts.values())
    assert flops(halves.prefill()[0]) == pytest.approx(flops(whole.prefill()[0]) / 4, rel=0.01)
    assert halves.decode()[0]["index_scores"].moved == whole.decode()[0]["index_scores"].moved / 2
    assert whole.prefill()[1:] == (0, 0) and halves.prefill()[1] > 0


def test_sequences_share_a_chunk_of_prefill():
    options = dict(context=65536, chunk=None, dtype="bfloat16")
    one, eight = (layout({}, config.preset("glm-4.7-flash-dsa"), batch=n, **options) for n in (1, 8))
    assert (one.chunk, eight.chunk) == (8192, 1024)
    assert [engine.chunk_of_each(8192 * 3, n, 3) for n in (1, 2, 5, 10**6)] == [24576, 12288, 3072, 6]  # tokens in 3 parts
    assert [engine.chunk_of_each(512, 100, parts) for parts in (1, 2, 16)] == [8, 8, 16]
    assert eight.memory()["workspace (estimate)"] == pytest.approx(one.memory()["workspace (estimate)"], rel=0.1)


def run(capsys, *flags):
    assert plan.main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_least_mesh_that_fits_is_named(capsys):
    flags = ["--model", "glm-5.2", "--context", "200000", "--chip", "h200"]
    found = run(capsys, *flags, "--mesh", "tensor=8")
    assert not found["fits"] and found["bytes"]["weights"] > 100e9
    least = run(capsys, *flags, "--mesh", found["least_mesh"])
    assert least["fits"] and least["devices"] == 16
    assert plan.main([*flags, "--mesh", "tensor=8"]) == 0
    out = capsys.readouterr().out
    assert "It does not fit: " in out and f"the least mesh that holds it is {found['least_mesh']}" in out
    small = run(capsys, "--model", "glm-4.7-flash-dsa", "--context", "200000", "--index-pattern", "all-full")
    quarter = run(capsys, "--model", "glm-4.7-flash-dsa", "--context", "200000")
    assert small["fits"] and small["bytes"]["index keys"] * 12 == quarter["bytes"]["index keys"] * 47
    assert small["steps"]["prefill"]["work"] > 1.5 * quarter["steps"]["prefill"]["work"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "glm-6"], "--model glm-6 is no directory, and no preset: glm-5, glm-5.2, deepseek-v3.2"),
        (["--model", "glm-5.2", "--mesh", "tensor=6"], "tensor=6 does not divide 64 attention heads; valid: 1,2,4,8,16"),
        (["--model", "glm-5", "--context", "300000"], "--context 300000 is more than the model's 202752 positions"),
        (["--index-pattern", "FS"], "has 2 characters, the model has 16 layers"),
        (["--mesh", "tensor"], "write axis=size pairs"),
        (["--compile"], "compiles for TPUs"),
        (["--compile", "--chip", "v6e", "--mesh", "context=3"], "a power of two of devices, 4 or more, not 3"),
    ],
)
def test_errors_are_one_line(flags, message, capsys):
    assert plan.main(flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_topologies():
    assert plan_compile.topology("v6e", 64) == "v6e:8x8" and plan_compile.topology("v5e", 32) == "v5e:4x8"
    assert plan_compile.topology("v5p", 128) == "v5p:8x4x4" and plan_compile.topology("v7x", 64) == "tpu7x:4x4x2"
    with pytest.raises(UserError, match="not for h200"):
        plan_compile.topology("h200", 8)


@pytest.mark.skipif(NO_LIBTPU, reason="libtpu is not installed")
def test_programs_compile_for_tpus(capsys):
    flags = ["--context", "4096", "--mesh", "tensor=2,context=2", "--chip", "v6e", "--prefill-chunk", "256"]
    found = run(capsys, *flags, "--compile")
    expected = {k: v for k, v in found["bytes"].items() if "estimate" not in k}
    for step in found["compiled"].values():
        # The compiler pads small arrays; nothing as large as a cache is copied.
        assert 0.95 < step["bytes"]["arguments"] / sum(expected.values()) < 1.3
        assert step["bytes"]["results beside them"] < 2**20
        assert set(step["collectives"]) <= {"all-gather", "all-reduce"}
    layers = config.preset("demo").num_hidden_layers
    assert found["compiled"]["prefill of a chunk"]["collectives"]["all-gather"][0] == 1 + (2 + 3) * layers
