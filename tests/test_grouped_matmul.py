"""The Hopper kernels of grouped and other matrix products in GPU interpret mode, against the oracle."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import small_models
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_kernels
from ic_jax import cache as caches
from ic_jax import model
from ic_jax.config import Config
from pallas_kernels import dispatch, grouped_matmul_gpu, layer_matmul_gpu, matvec_gpu, reference

E, LAYERS = 6, 2
GROUPS = {  # rows of each expert
    "ragged": [3, 0, 70, 130, 17, 0],
    "whole tiles": [0, 128, 0, 256, 0, 0],
    "one row each": [1, 1, 1, 1, 1, 1],
    "one expert": [0, 0, 0, 0, 0, 77],
    "begins at every eighth": [9, 8, 7, 57, 63, 129],
}


def inputs(sizes, D, F, of_none=0):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    return draw(sum(sizes) + of_none, D), draw(LAYERS, E, D, F), jnp.int32(1), jnp.asarray(sizes, jnp.int32)


def check(got, x, w, layer, sizes):
    assert got.dtype == x.dtype and len(got) == len(x)
    x, got = x[: sizes.sum()], got[: sizes.sum()]
    want = oracle.grouped_matmul(np.asarray(x, np.float32), np.asarray(w[layer], np.float64), np.asarray(sizes))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=2**-8 * np.abs(want).max(), rtol=2**-8)


@pytest.mark.parametrize("name", GROUPS)
def test_tiles(monkeypatch, name):
    """Two blocks walk all tiles; two column tiles; a stage is used again; rows of other experts stay untouched."""
    monkeypatch.setattr(grouped_matmul_gpu, "SMS", 2)
    args = inputs(GROUPS[name], 320 if name == "ragged" else 64, 256 if name == "one expert" else 384)
    check(grouped_matmul_gpu.ragged(*args, interpret=plgpu.InterpretGPUParams()), *args)


@pytest.mark.parametrize(("name", "D", "F"), [("ragged", 320, 256), ("begins at every eighth", 64, 128)])
def test_gate_and_up_share_a_launch(monkeypatch, name, D, F):
    """The bits of two products and silu(gate) * up, as in test_tiles; no group has the last three rows."""
    monkeypatch.setattr(grouped_matmul_gpu, "SMS", 2)
    x, gate, layer, sizes = inputs(GROUPS[name], D, F, of_none=3)
    args = x / 8, gate, gate[:, ::-1], layer, sizes  # gates on both sides of zero
    ragged = functools.partial(grouped_matmul_gpu.ragged, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(grouped_matmul_gpu, "ragged", ragged)
    got, want = grouped_matmul_gpu.grouped_swiglu(*args), reference.grouped_swiglu(*args)
    assert got.dtype == x.dtype and got.shape == (len(x), F)
    got, want = (np.asarray(a, np.float32)[: sum(GROUPS[name])] for a in (got, want))
    assert (got != want).mean() < 1e-3  # where the other order of a sum rounds a gate or an up otherwise
    np.testing.assert_allclose(got, want, rtol=2**-6, atol=1e-5)  # a GPU's exp is its own


@pytest.mark.parametrize("name", GROUPS)
def test_tile_table_covers_every_row_once(name):
    sizes, columns = GROUPS[name], 3
    table, tiles = grouped_matmul_gpu.tile_table(jnp.asarray(sizes, jnp.int32), sum(sizes), columns)
    assert len(table) >= tiles
    seen = np.zeros((sum(sizes), columns), int)
    for expert, row, low, high, column in np.asarray(table)[: int(tiles)]:
        assert row % 8 == 0 and 0 <= low < high <= 128
        rows = np.arange(row + low, row + high)
        np.testing.assert_array_equal(np.repeat(np.arange(E), sizes)[rows], expert)
        seen[rows, column] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("splits", [None, 1])
def test_single_rows(splits):
    """Four rows, two of them to one expert; sums of a split and of an unsplit launch."""
    x, w, layer, sizes = inputs([0, 1, 0, 2, 0, 1], 256, 512)
    expert = jnp.asarray([1, 3, 3, 5], jnp.int32)
    found = matvec_gpu.matvec(x, [w, -w], layer, expert, splits=splits, interpret=plgpu.InterpretGPUParams())
    for y, sign in zip(found, (1, -1), strict=True):
        check(sign * y.astype(x.dtype), x, w, layer, sizes)


def test_few_and_many_rows_take_their_path_and_differentiate(monkeypatch):
    interpret = plgpu.InterpretGPUParams()
    monkeypatch.setattr(grouped_matmul_gpu, "SMS", 2)
    taken = []
    for module, name in ((grouped_matmul_gpu, "ragged"), (matvec_gpu, "matvec")):
        run = functools.partial(getattr(module, name), interpret=interpret)
        monkeypatch.setattr(module, name, lambda *a, run=run, name=name: (taken.append(name), run(*a))[1])
    for sizes in ([1, 0, 2, 0, 1, 0], [9, 0, 8, 0, 3, 0]):
        args = inputs(sizes, 64, 256, of_none=3)  # of the last layer: what follows its last expert is no matrix
        check(grouped_matmul_gpu.grouped_matmul(*args), *args)
    assert taken == ["matvec", "ragged"]
    x, w, layer, sizes = inputs([1, 0, 2, 0, 1, 0], 64, 256)

    def gradient(f, *args):
        loss = lambda *args: (f(*args, layer, sizes).astype(jnp.float32) ** 2).sum()
        return jax.grad(loss, tuple(range(len(args))))(*args)

    for op, args in (("grouped_matmul", (x, w)), ("grouped_swiglu", (x / 8, w, w[:, ::-1]))):
        for a, b in zip(*(gradient(getattr(m, op), *args) for m in (grouped_matmul_gpu, reference)), strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b) > 0


def test_refused_with_a_reason():
    spec = jax.ShapeDtypeStruct
    args = spec((64, 128), jnp.bfloat16), spec((2, 4, 128, 256), jnp.bfloat16), spec((), jnp.int32), spec((4,), jnp.int32)
    ask = functools.partial(dispatch.reason_against, "grouped_matmul", "gpu", on=dispatch.CHIPS["h200"])
    assert ask(*args) is None
    assert "bfloat16" in ask(spec((64, 128), jnp.float32), *args[1:])
    assert "64 x 128" in ask(args[0], spec((2, 4, 128, 100), jnp.bfloat16), *args[2:])
    ask = functools.partial(dispatch.reason_against, "grouped_swiglu", "gpu", on=dispatch.CHIPS["h200"])
    assert ask(*args[:2], *args[1:]) is None
    assert "bfloat16 and float32 matrices" in ask(*args[:2], spec(args[1].shape, jnp.float32), *args[2:])
    assert "one shape" in ask(*args[:2], spec((2, 4, 128, 384), jnp.bfloat16), *args[2:])
    # Forced where it cannot run: the reference, as for ops without a kernel.
    x, w, layer, sizes = inputs([1, 0, 2, 0, 1, 0], 64, 256)
    check(pallas_kernels.grouped_matmul(x, w, layer, sizes, implementation="gpu"), x, w, layer, sizes)


@pytest.mark.parametrize(("N", "F", "D"), [(1, 48, 768), (3, 24, 256)])
def test_layer_matmul(monkeypatch, N, F, D):
    """Several rows a block, and one; D that leaves two and six elements a thread; two matrices in a launch."""
    monkeypatch.setattr(layer_matmul_gpu, "BLOCKS", 8)
    assert layer_matmul_gpu.rows_of_block(D, F) > 1 and layer_matmul_gpu.rows_of_block(D, F, 5) == 1
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((N, D), (3, F, D)))
    run = functools.partial(layer_matmul_gpu.product, interpret=plgpu.InterpretGPUParams())
    want = np.asarray(x, np.float64) @ np.asarray(w[2], np.float64).T
    tolerance = dict(atol=2**-8 * np.abs(want).max(), rtol=2**-8)
    for implementation in ("auto", "gpu", "reference"):
        got = pallas_kernels.layer_matmul(x[None], w, 2, implementation=implementation)
        np.testing.assert_allclose(np.asarray(got[0], np.float64), want, **tolerance)
    monkeypatch.setattr(layer_matmul_gpu, "product", run)
    for dtype in (jnp.bfloat16, jnp.float32):
        got = layer_matmul_gpu.layer_matmul(x, [w[:, :16], w], jnp.int32(2), dtype)
        for y, columns in zip(got, (want[:, :16], want), strict=True):
            assert y.dtype == dtype
            np.testing.assert_allclose(np.asarray(y, np.float64), columns, **tolerance)
    add = jnp.asarray(8 * rng.standard_normal((N, F)), jnp.bfloat16)
    product, more = (layer_matmul_gpu.layer_matmul(x, w, jnp.int32(2), None, None, None, a) for a in (None, add))
    np.testing.assert_array_equal(more, product + add)
    loss = lambda f: lambda x, w: sum((y.astype(jnp.float32) ** 2).sum() for y in f(x, [w, 2 * w], jnp.int32(2)))
    got = jax.grad(loss(layer_matmul_gpu.layer_matmul), (0, 1))(x, w)
    for a, b in zip(got, jax.grad(loss(pallas_kernels.layer_matmul), (0, 1))(x, w), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b) > 0


@pytest.mark.parametrize("N", [1, 3])
def test_layer_matmul_of_a_normed_x(monkeypatch, N):
    """The norm of another layer than the matrices', in the same launch; a dtype for each; every block norms for itself."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    x, stacks, weights = 8 * draw(N, 256), [draw(2, 8, 256), draw(2, 4, 256)], draw(3, 256)
    args = x, stacks, jnp.int32(1), (None, jnp.float32), (weights, jnp.int32(2)), 0.5
    x64 = np.asarray(x, np.float64)
    normed = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 0.5) * np.asarray(weights[2], np.float64)
    run = functools.partial(layer_matmul_gpu.product, interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(layer_matmul_gpu, "product", run)
    for f in (layer_matmul_gpu.layer_matmul, reference.layer_matmul):
        y, h = f(*args)
        np.testing.assert_allclose(np.asarray(h, np.float64), normed, rtol=2**-6)
        for a, w, dtype in zip(y, stacks, (jnp.bfloat16, jnp.float32), strict=True):
            assert a.dtype == dtype
            want = np.asarray(h, np.float64) @ np.asarray(w[1], np.float64).T  # of the rounded x, as the other backends
            np.testing.assert_allclose(np.asarray(a, np.float64), want, rtol=2**-8, atol=1e-2 * np.abs(want).max())

    def loss(f):
        def of(x, stacks, weights):
            y, h = f(x, stacks, *args[2:4], (weights, args[4][1]), args[5])
            return sum((a.astype(jnp.float32) ** 2).sum() for a in (*y, h))

        return jax.grad(of, (0, 1, 2))(x, stacks, weights)

    got, want = jax.tree.leaves(loss(layer_matmul_gpu.layer_matmul)), jax.tree.leaves(loss(reference.layer_matmul))
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b) > 0


def test_why_layer_matmul_cannot():
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    why = lambda N, L, F, D: layer_matmul_gpu.supported(spec(1, N, D), spec(L, F, D), 0)
    assert why(1, 47, 2048, 5120) is None
    assert "5 rows" in why(5, 47, 2048, 5120)
    assert "multiple of 256" in why(1, 47, 2048, 640)


@pytest.mark.parametrize("op", ["layer_matmul", "expert_matmul"])
def test_products_by_head(monkeypatch, op):
    """Two rows of three heads, each head its own matrix; expert_matmul leaves out what stands beside them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    module, inner, shape = {
        "layer_matmul": (layer_matmul_gpu, "product", (3, 16, 256)),
        "expert_matmul": (matvec_gpu, "matvec", (3, 64, 256)),
    }[op]
    x, w = draw(2, 3, shape[2] if op == "layer_matmul" else shape[1] + 32), draw(2, *shape)
    run = functools.partial(getattr(module, inner), interpret=plgpu.InterpretGPUParams())
    monkeypatch.setattr(module, inner, run)
    spec = "bhd,hfd->bhf" if op == "layer_matmul" else "bhd,hdf->bhf"
    D = x.shape[-1] if op == "layer_matmul" else shape[1]
    want = np.einsum(spec, np.asarray(x[..., :D], np.float64), np.asarray(w[1], np.float64))
    # A CPU adds up products by head in bfloat16.
    for f, tolerance in ((getattr(module, op), 2**-8), (getattr(pallas_kernels, op), 2**-5)):
        got = np.asarray(f(x, w, jnp.int32(1)), np.float64)
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=tolerance)


def test_experts_of_tokens(monkeypatch):
    """Two tokens with two experts each: rows shared by neighbours; no such expert: finite; gradients; why not."""
    x, w, layer, _ = inputs([2], 64, 256)
    expert = jnp.asarray([[4, 1], [E, 4]], jnp.int32)
    monkeypatch.setattr(matvec_gpu, "matvec", functools.partial(matvec_gpu.matvec, interpret=plgpu.InterpretGPUParams()))
    got, twice = matvec_gpu.expert_matmul(x, [w, 2 * w], layer, expert, jnp.float32)
    want = np.einsum("nd,nxdf->nxf", np.asarray(x, np.float64), np.asarray(w[1], np.float64)[np.minimum(expert, E - 1)])
    some = np.asarray(expert) < E
    assert got.dtype == jnp.float32 and np.isfinite(got).all()
    np.testing.assert_allclose(np.asarray(got)[some], want[some], atol=1e-4 * np.abs(want).max())
    np.testing.assert_array_equal(2 * got, twice)
    expert = jnp.minimum(expert, E - 1)
    loss = lambda f: lambda x, w: (f(x, w, layer, expert).astype(jnp.float32) ** 2).sum()
    found, wanted = (jax.grad(loss(f), (0, 1))(x, w) for f in (matvec_gpu.expert_matmul, pallas_kernels.expert_matmul))
    for a, b in zip(found, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b) > 0
    assert "17 rows" in matvec_gpu.supported(x, w, layer, jnp.zeros((17, 1), jnp.int32))
    assert "64 x 256" in matvec_gpu.supported(x, w[..., :128], layer, expert)
    assert "bfloat16" in matvec_gpu.supported(x.astype(jnp.float32), w, layer, expert)


def test_a_model_of_few_rows_reads_its_weights_in_place(monkeypatch):
    """Every product that the kernels can take goes there, with the reference's logits and caches."""
    sizes = dict(
        hidden_size=256, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=16, v_head_dim=128,
        intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=2, mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip
    c = Config.from_hf(small_models.MIXED | sizes)
    params = model.init_params(c, 1)
    cache, slots = caches.allocate(c, 1, 2, 16), np.array([0, -1], np.int32)
    ids, positions = jnp.asarray([[5, 9], [8, 2]]), jnp.asarray([[0, 1], [0, -1]])
    step = functools.partial(model.forward, params, c, slots, ids, positions, cache)
    want = step(implementation="reference")

    # The kernels themselves are interpreted above; here they are what they compute.
    taken, modules = collections.Counter(), {"layer_matmul": layer_matmul_gpu, "expert_matmul": matvec_gpu}

    def product(x_ND, w, layer, dtypes, norm, eps, add):
        taken["layer_matmul"] += 1
        x = x_ND if w[0].ndim == 3 else x_ND.reshape(-1, w[0].shape[1], x_ND.shape[-1])
        add = None if add is None else add.reshape(len(x), -1)
        y = reference.layer_matmul(x, w, layer, tuple(dtypes), norm, eps, add)
        y = y if norm is None else [*y[0], y[1]]
        return [a.reshape(a.shape[0], -1) for a in y]

    def matvec(x_ND, w, layer, expert_N=None):
        taken["expert_matmul"] += 1
        if expert_N is None:
            expert_N = jnp.arange(len(x_ND)) % w[0].shape[1]
        x_ND = jnp.repeat(x_ND, len(expert_N) // len(x_ND), 0)
        return reference.expert_matmul(x_ND, w, layer, expert_N, jnp.float32)

    def reason_against(op, backend, *args):
        return modules[op].supported(*args) if op in modules and backend == "gpu" else "left out"

    monkeypatch.setattr(layer_matmul_gpu, "product", product)
    monkeypatch.setattr(matvec_gpu, "matvec", matvec)
    monkeypatch.setattr(dispatch, "reason_against", lambda *args, **how: reason_against(*args))
    got = step(implementation="auto")
    # Traced are the dense layer, full, and the sparse one twice, shared and full. Of each q_a with kv_a, q_b, v_b, o and the
    # two of a SwiGLU; of a full one wk, wq_b and weights_proj; at last the head. The keys by head, and two of the experts.
    assert taken == {"layer_matmul": 3 * (4 + 2) + 2 * 3 + 1, "expert_matmul": 3 * 1 + 2 * 2}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)
