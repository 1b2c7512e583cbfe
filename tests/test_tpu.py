"""TPU kernels without a TPU: what test_ops.py, which runs them interpreted too, leaves out, and compilation by libtpu.

Interpret mode checks the algorithm on the CPU; libtpu compiles for v5e, v5p, v6e and 7x without a chip and checks every
constraint of the hardware. What a kernel cannot run it refuses with a reason, which is tested too.
"""

import functools
import importlib.util
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a metadata server which chip it runs on
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling takes no chip: several processes may

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from interpreted import interpreted
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from test_ops import C, J, U, _pool, _signed

import pallas_kernels
from pallas_kernels import (
    dispatch,
    index_topk_tpu,
    latent_row_shape,
    pack_rows,
    physical_rows,
    reference,
    sparse_mla_tpu,
    topk_tpu,
    unpack_rows,
)

PAGE = 256
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
S = jax.ShapeDtypeStruct
bf16 = jnp.bfloat16


def _index_topk(*args, **kwargs):
    with interpreted():
        return jax.tree.map(np.asarray, jax.block_until_ready(index_topk_tpu.index_topk(*args, **kwargs)))


def _sparse_mla(q, pool, layer, rows, scale):
    with interpreted():
        out = sparse_mla_tpu.sparse_mla(q, packed(pool), layer, rows, scale=scale, value_dim=C)
        return jax.tree.map(np.asarray, jax.block_until_ready(out))


def packed(latent):
    return pack_rows(latent, sparse_mla_tpu.row_shape(latent.shape[-1]))


# Interpret mode


def test_a_race_fails_a_test():
    """A buffer that is read while a DMA fills it: the interpreter as every test here uses it raises."""

    def kernel(x_ref, o_ref, buffer_ref, sem):
        copy = pltpu.make_async_copy(x_ref, buffer_ref, sem)
        copy.start()
        o_ref[...] = buffer_ref[...]
        copy.wait()

    tile = S((8, 128), jnp.float32)
    scratch = [pltpu.VMEM(tile.shape, tile.dtype), pltpu.SemaphoreType.DMA]
    in_specs = [pl.BlockSpec(memory_space=pltpu.HBM)]
    try:
        with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"), interpreted():
            run = pl.pallas_call(kernel, in_specs=in_specs, out_shape=tile, scratch_shapes=scratch)
            jax.block_until_ready(run(jnp.ones(tile.shape)))
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_topk_over_several_groups_and_bad_values():
    """33,000 positions (three compaction groups) with ties that straddle them, NaN, infinities and short rows."""
    rng = np.random.default_rng(2)
    n, k = 33_000, 256
    scores = rng.standard_normal((9, n)).astype(np.float32)
    scores[0, 5::7] = np.nan
    scores[1] = 0.5
    scores[2] = np.round(scores[2] * 4) / 4
    scores[3, 100:] = -np.inf
    scores[4, ::300] = np.inf
    scores[5] = np.float32(1) + rng.integers(0, 4, n).astype(np.float32) * np.float32(2**-23)
    limits = np.array([n, n, n, n, n, n, 20_000, k, 0], np.int32)
    with interpreted():
        found, count = topk_tpu.topk(jnp.asarray(scores), jnp.asarray(limits), k=k)
        found = np.asarray(found)
    canonical = np.asarray(reference.canonical(jnp.asarray(scores)))
    for r, limit in enumerate(limits):
        best = np.sort(np.argsort(-canonical[r, :limit], kind="stable")[:k])
        np.testing.assert_array_equal(found[r], np.pad(best, (0, k - len(best)), constant_values=-1), err_msg=f"row {r}")
    np.testing.assert_array_equal(count, np.minimum(limits, k))


def test_tiles_inside_a_page_and_scales_of_keys(monkeypatch):
    """Tiles of half a page; e4m3 keys and scales that are exact, so that the selection is."""
    monkeypatch.setattr(index_topk_tpu, "plan", lambda *_: index_topk_tpu.Plan(eights=1, tile=128, copy=128))
    rng = np.random.default_rng(5)
    n, k = 450, 32
    row = rng.integers(-8, 9, n).astype(np.float32)
    keys, q, w = _signed(row, jnp.float8_e4m3fn)
    pool, table = _pool(rng, [n], lambda b, n: keys, J, jnp.float8_e4m3fn)
    scales = 2.0 ** rng.integers(-3, 4, pool.shape[:2])
    positions = np.array([[n - 1, 200, 10]], np.int32)
    args = (jnp.tile(q, (1, 3, 1, 1)), jnp.tile(w, (1, 3, 1)), (pool, jnp.asarray(scales, jnp.float32)), 1, table)
    found, _ = _index_topk(*args, positions, np.array([n], np.int32), k=k, page_size=PAGE)
    at = table[0, np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE
    for s, position in enumerate(positions[0]):
        np.testing.assert_array_equal(found[0, s], oracle.select((row * scales[1, at])[: position + 1], k))


def test_decode_selects_as_prefill_does():
    """One query at a time gives bitwise the rows of the whole chunk, whatever the block of queries."""
    rng = np.random.default_rng(3)
    n, k, many, heads = 700, 64, 20, 3
    pool, table = _pool(rng, [n], lambda b, n: rng.standard_normal((n, J)), J, bf16)
    q = jnp.asarray(rng.standard_normal((1, many, heads, J)), bf16)
    w = jnp.asarray(rng.standard_normal((1, many, heads)), jnp.float32)
    positions = np.arange(n - many, n, dtype=np.int32)[None]
    run = lambda at: _index_topk(
        q[:, at], w[:, at], (pool, None), 1, table, positions[:, at], np.array([n], np.int32), k=k, page_size=PAGE
    )
    whole, _ = run(slice(None))
    np.testing.assert_array_equal(run(slice(13, 14))[0][:, 0], whole[:, 13])


def test_sparse_mla_over_several_chunks_merges_and_ignores_order(monkeypatch):
    """Chunks of 128 rows, the last one partly full; halves merged by their lse give the whole, in any order of rows."""
    monkeypatch.setattr(sparse_mla_tpu, "CHUNK", 128)
    rng = np.random.default_rng(4)
    M, K = 400, 300
    pool = jnp.asarray(rng.standard_normal((1, M, U)) * 0.5, bf16)
    q = jnp.asarray(rng.standard_normal((1, 1, 2, U)) * 0.5, bf16)
    rows = rng.permutation(M)[:K].astype(np.int32)[None, None]
    left, right = rows.copy(), np.sort(rows, -1)
    left[..., 100:] = -1  # the chunks behind are not fetched
    right[np.isin(right, left)] = -1  # holes in every chunk
    o, lse = _sparse_mla(jnp.tile(q, (1, 3, 1, 1)), pool, 0, np.concatenate([rows, left, right], 1), 0.05)
    o = o.astype(np.float32)
    want, want_lse = oracle.sparse_mla(np.asarray(q[0, 0], np.float64), np.asarray(pool[0], np.float64), rows[0, 0], 0.05, C)
    np.testing.assert_allclose(o[0, 0], want, atol=2e-2)
    np.testing.assert_allclose(lse[0, 0], want_lse, atol=1e-3)
    total = np.logaddexp(lse[0, 1], lse[0, 2])
    np.testing.assert_allclose(total, lse[0, 0], atol=1e-3)
    merged = sum(o[0, i] * np.exp(lse[0, i] - total)[:, None] for i in (1, 2))
    np.testing.assert_allclose(merged, o[0, 0], atol=2e-2)


@pytest.mark.parametrize(("H", "M"), [(3, 8192 + PAGE), (40, 4096)])
def test_sweep_equals_gather(H, M):
    """Ragged groups of two sequences: holes, an empty query, tiles of 256 and of 2,048 rows, a mask over three words."""
    rng = np.random.default_rng(9)
    B, many, K = 2, 19, 100
    pool = jnp.asarray(rng.standard_normal((2, M, U)) * 0.5, bf16)
    q = jnp.asarray(rng.standard_normal((B, many, H, U)) * 0.5, bf16)
    rows = rng.permuted(np.tile(np.arange(M), (B, many, 1)), axis=-1)[..., :K].astype(np.int32)
    rows[0, 0, ::3] = -1
    rows[1, 2] = -1
    rows[1, 8:] = np.sort(rows[1, 8:] % 300 + 3000, -1)  # a group that touches few tiles
    rows[1, 8:, 1:][rows[1, 8:, 1:] == rows[1, 8:, :-1]] = -1  # a selection has no row twice
    with interpreted():
        lines, swept = sparse_mla_tpu._lines(packed(pool)), sparse_mla_tpu.sweep_tpu
        o, lse = jax.block_until_ready(
            swept.sweep(q, lines, jnp.int32(1), jnp.asarray(rows), 0.05, C, pool_rows=M, lines_of_row=3,
                        columns=sparse_mla_tpu._columns)
        )  # fmt: skip
    want, want_lse = reference.sparse_mla(q, pool, 1, rows, scale=0.05, value_dim=C)
    assert o.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(o, np.float32), np.asarray(want, np.float32), atol=5e-3)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)
    assert (np.asarray(lse[1, 2]) == -np.inf).all() and (np.asarray(o[1, 2], np.float32) == 0).all()


def test_masks_of_a_sweep_are_the_selected_rows():
    rng = np.random.default_rng(10)
    M, K = 9000, 300
    rows = rng.permuted(np.tile(np.arange(M), (16, 1)), axis=-1)[:, :K].astype(np.int32)
    rows[3, 50:] = -1
    with interpreted():
        bits = np.asarray(sparse_mla_tpu.sweep_tpu.row_bits(jnp.asarray(rows), M))
    found = (bits[..., None, :] >> np.arange(32)[:, None]) & 1  # [eights, words, 8, bit, lane]
    found = found.transpose(0, 2, 1, 3, 4).reshape(16, -1)
    for query in range(16):
        np.testing.assert_array_equal(np.flatnonzero(found[query]), np.sort(rows[query][rows[query] >= 0]))


def test_the_cheaper_way_is_taken(monkeypatch):
    """Short spans are swept, long ones gathered, by the figures of each generation; few queries are always gathered."""
    cheaper = sparse_mla_tpu.sweep_tpu.cheaper
    near = np.tile(np.arange(2048, dtype=np.int32), (1, 32, 1))
    far = near * 97  # 2,048 of 198,656 rows
    for chip, middle in (("v6e", 30), ("v5e", 10)):
        monkeypatch.setattr(dispatch, "target", lambda chip=chip: dispatch.Target("tpu", chip))
        assert cheaper(near, 20, 200_704) and cheaper(near * middle, 20, 200_704) and not cheaper(far, 20, 200_704)
    assert not cheaper(near * 30, 20, 200_704)  # v5e: its matrix units need longer for the span
    assert sparse_mla_tpu.sweep_tpu.supported(S((1, 7, 20, U), bf16), S((2, 512, 3, 2, 128), bf16))
    assert "multiple of 256" in sparse_mla_tpu.sweep_tpu.supported(S((1, 8, 20, U), bf16), S((2, 300, 3, 2, 128), bf16))


@pytest.mark.parametrize("n", [3, 70])
def test_experts_are_read_in_their_stack(n):
    """The grouped ops of layer 1 and a gradient against the reference; one expert gets no rows."""
    rng = np.random.default_rng(11)
    E, D, F = 4, 128, 256
    sizes = jnp.asarray(np.bincount(rng.integers(0, E - 1, n), minlength=E), jnp.int32)
    x, w = (jnp.asarray(rng.standard_normal(shape), bf16) for shape in ((n, D), (2, E, D, F)))

    def run(op):
        loss = lambda x, w: (op(x, w, 1, sizes).astype(jnp.float32) ** 2).sum()
        return jax.block_until_ready((op(x, w, 1, sizes), *jax.grad(loss, (0, 1))(x, w)))

    swiglu = lambda op: op(x / 8, w, w[:, ::-1], 1, sizes)

    with interpreted():
        assert dispatch.choose("grouped_matmul", "auto", x, w, 1, sizes) == "tpu"
        assert dispatch.choose("grouped_swiglu", "auto", x, w, w, 1, sizes) == "tpu"
        found = *run(pallas_kernels.grouped_matmul), jax.block_until_ready(swiglu(pallas_kernels.grouped_swiglu))
    for got, want in zip(found, (*run(reference.grouped_matmul), swiglu(reference.grouped_swiglu)), strict=True):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())


def test_grouped_matmul_says_what_it_cannot_run():
    from pallas_kernels.grouped_matmul_tpu import supported

    sizes = S((4,), jnp.int32)
    assert supported(S((8, 128), bf16), S((2, 4, 128, 256), bf16), 0, sizes) is None
    assert "bfloat16 is needed" in supported(S((8, 128), jnp.float32), S((2, 4, 128, 256), bf16), 0, sizes)
    assert "experts are 96 x 256" in supported(S((8, 96), bf16), S((2, 4, 96, 256), bf16), 0, sizes)
    assert "experts are 128 x 96" in supported(S((8, 128), bf16), *(S((2, 4, 128, F), bf16) for F in (256, 96)), 0, sizes)


def test_rows_pack_and_unpack():
    latent = jnp.arange(6 * U, dtype=jnp.float32).reshape(2, 3, U)
    assert latent_row_shape(U, bf16) == latent_row_shape(U, bf16, "reference") == (U,)
    with interpreted():
        assert latent_row_shape(U, bf16) == latent_row_shape(U, bf16, "tpu") == (3, 2, 128)
        assert latent_row_shape(U, jnp.float32) == latent_row_shape(U, bf16, "reference") == (U,)
    assert packed(latent).shape == (2, 3, 3, 2, 128)
    for layout in ((3, 2, 128), (U,)):
        np.testing.assert_array_equal(unpack_rows(pack_rows(latent[0], layout), U), latent[0])


def test_the_reference_reads_packed_rows():
    """sparse_mla, its gradient and dense_mla give the same bits whatever the layout of the pool."""
    rng = np.random.default_rng(6)
    pool = jnp.asarray(rng.standard_normal((2, 2 * PAGE, U)) * 0.5, bf16)
    q = jnp.asarray(rng.standard_normal((1, 3, 2, U)) * 0.5, bf16)
    rows = rng.integers(-1, 2 * PAGE, (1, 3, 40)).astype(np.int32)
    table, positions = np.array([[1, 0]], np.int32), np.array([[300, 20, -1]], np.int32)

    @functools.partial(jax.jit, static_argnums=1)
    def run(pool, pack):
        laid_out = lambda pool: packed(pool) if pack else pool
        sparse = lambda pool: reference.sparse_mla(q, laid_out(pool), 1, rows, scale=0.1, value_dim=C)
        dense = reference.dense_mla(
            q, laid_out(pool), 1, table, positions, scale=0.1, value_dim=C, page_size=PAGE
        )
        return sparse(pool), jax.grad(lambda pool: sparse(pool)[0].astype(jnp.float32).sum())(pool), dense

    jax.tree.map(np.testing.assert_array_equal, run(pool, False), run(pool, True))


# Compilation


@functools.cache
def _mesh(chip):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    return Mesh(np.array(devices[:1]), ("x",))


def _compile(chip, f, *shapes, donate=()):
    """``f`` compiled for one chip of a generation that this machine lacks."""
    sharding = NamedSharding(_mesh(chip), PartitionSpec())
    args = jax.tree.map(lambda s: S(s.shape, s.dtype, sharding=sharding), shapes)
    with use_abstract_mesh(_mesh(chip).abstract_mesh):  # tells Pallas the generation
        return jax.jit(f, donate_argnums=donate).trace(*args).lower().compile()


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
chips = pytest.mark.parametrize("chip", list(CHIPS))


def _index_shapes(B, many, heads, capacity, dtype, slots):
    scales = (S((slots, B * capacity), jnp.float32),) if jnp.dtype(dtype).itemsize == 1 else (None,)
    shapes = (
        S((B, many, heads, J), dtype), S((B, many, heads), jnp.float32), (S((slots, B * capacity, J), dtype), *scales),
        S((), jnp.int32), S((B, capacity // PAGE), jnp.int32), S((B, many), jnp.int32), S((B,), jnp.int32),
    )  # fmt: skip
    return shapes


def _no_copy_of(compiled, shape, dtype):
    """No instruction of the optimised HLO but parameters and their views has the shape of the pool or of one layer."""
    name = {"bfloat16": "bf16", "float8_e4m3fn": "f8e4m3fn"}[jnp.dtype(dtype).name]
    sizes = {int(np.prod(shape)), int(np.prod(shape[1:]))}
    for line in compiled.as_text().splitlines():
        made = line.split(" = ")[-1].strip()
        if not made.startswith(name + "[") or any(f" {op}(" in line for op in ("parameter", "bitcast", "get-tuple-element")):
            continue
        dims = [int(d) for d in made[len(name) + 1 : made.index("]")].split(",") if d]
        assert int(np.prod(dims)) not in sizes, line.strip()[:200]


@needs_libtpu
@chips
def test_index_topk_compiles(chip):
    shapes = _index_shapes(1, 8, 4, 32 * PAGE, bf16, 5)
    f = functools.partial(index_topk_tpu.index_topk, k=256, page_size=PAGE)
    _no_copy_of(_compile(chip, f, *shapes), shapes[2][0].shape, bf16)


@needs_libtpu
@chips
def test_sparse_mla_compiles(chip):
    pool = (7, 4096, *sparse_mla_tpu.row_shape(U))
    f = functools.partial(sparse_mla_tpu.sparse_mla, scale=0.05, value_dim=C)
    shapes = (S((1, 4, 20, U), bf16), S(pool, bf16), S((), jnp.int32), S((1, 4, 1024), jnp.int32))
    _no_copy_of(_compile(chip, f, *shapes), pool, bf16)


@needs_libtpu
@pytest.mark.parametrize("chip", [c if c == "v6e" else pytest.param(c, marks=pytest.mark.slow) for c in CHIPS])
def test_caches_are_written_and_read_in_place(chip):
    """A scan over layers writes latents and index keys, selects and attends: donated pools, and no copy of either."""
    layers, rows, many, heads, k = 5, 32 * PAGE, 8, 4, 256
    latent_shape, keys_shape = (layers, rows, *sparse_mla_tpu.row_shape(U)), (layers, rows, J)

    def step(latents, keys, latent, key, at, q, w, table, positions, q_mla):
        def layer(carry, n):
            latents, keys, o = carry
            latents = latents.at[n, at].set(packed(latent + o.mean()), mode="drop")
            keys = keys.at[n, at].set(key + o.mean(), mode="drop")
            found, _ = index_topk_tpu.index_topk(
                q, w, (keys, None), n, table, positions, positions.max(-1) + 1, k=k, page_size=PAGE
            )
            selected = physical_rows(table, found, PAGE)
            return (latents, keys, sparse_mla_tpu.sparse_mla(q_mla, latents, n, selected, scale=0.1, value_dim=C)[0]), None

        start = (latents, keys, jnp.zeros((1, many, heads, C), bf16))
        return jax.lax.scan(layer, start, jnp.arange(layers, dtype=jnp.int32))[0]

    shapes = (
        S(latent_shape, bf16), S(keys_shape, bf16), S((1, many, U), bf16), S((1, many, J), bf16), S((1, many), jnp.int32),
        S((1, many, heads, J), bf16), S((1, many, heads), jnp.float32), S((1, rows // PAGE), jnp.int32),
        S((1, many), jnp.int32), S((1, many, heads, U), bf16),
    )  # fmt: skip
    memory = _compile(chip, step, *shapes, donate=(0, 1)).memory_analysis()
    pools = 2 * sum(int(np.prod(s)) for s in (latent_shape, keys_shape))
    assert memory.alias_size_in_bytes >= pools
    assert memory.temp_size_in_bytes < 2 * int(np.prod(keys_shape[1:]))  # less than one layer of the smaller pool


@pytest.mark.slow
@needs_libtpu
@chips
@pytest.mark.parametrize(
    ("B", "many", "heads", "dtype"),
    [(1, 256, 64, bf16), (1, 256, 32, bf16), (1, 256, 32, jnp.float8_e4m3fn), (8, 1, 32, bf16)],
    ids=["prefill-64", "prefill-32", "prefill-32-e4m3", "decode-32"],
)
def test_shipped_index_topk_compiles(chip, B, many, heads, dtype):
    shapes = _index_shapes(B, many, heads, 784 * PAGE, dtype, 12)
    f = functools.partial(index_topk_tpu.index_topk, k=2048, page_size=PAGE)
    _no_copy_of(_compile(chip, f, *shapes), shapes[2][0].shape, dtype)


@needs_libtpu
@chips
def test_sweep_compiles(chip):
    pool = (7, 4096, *sparse_mla_tpu.row_shape(U))
    f = functools.partial(sparse_mla_tpu.sparse_mla, scale=0.05, value_dim=C)
    shapes = (S((1, 16, 20, U), bf16), S(pool, bf16), S((), jnp.int32), S((1, 16, 256), jnp.int32))
    compiled = _compile(chip, f, *shapes)
    _no_copy_of(compiled, pool, bf16)
    assert "sparse_mla_sweep" in compiled.as_text()


@pytest.mark.slow
@needs_libtpu
@chips
@pytest.mark.parametrize("H", [1, 2, 5, 10, 20, 64, 128])
def test_shipped_sparse_mla_compiles(chip, H):
    pool = (47, 200_704, *sparse_mla_tpu.row_shape(U))
    f = functools.partial(sparse_mla_tpu.sparse_mla, scale=0.05, value_dim=C)
    shapes = (S((1, 256, H, U), bf16), S(pool, bf16), S((), jnp.int32), S((1, 256, 2048), jnp.int32))
    _no_copy_of(_compile(chip, f, *shapes), pool, bf16)


# Refusals


def _index_reason(q=(1, 8, 4, J), dtype=bf16, keys=bf16, page=PAGE, pages=4, k=64, scales=None):
    pool = (S((2, 4 * PAGE, q[-1]), keys), scales)
    args = (S(q, dtype), S(q[:3], jnp.float32), pool, 0, S((1, pages), jnp.int32), S((1, 8), jnp.int32), S((1,), jnp.int32))
    return index_topk_tpu.supported(*args, k=k, page_size=page)


def test_index_topk_says_what_it_cannot_run():
    assert _index_reason() is None
    assert "float32; bfloat16 or float8_e4m3fn is needed" in _index_reason(dtype=jnp.float32)
    assert "keys are float8_e4m3fn but queries are bfloat16" in _index_reason(keys=jnp.float8_e4m3fn)
    assert "64 dimensions; 128 are needed" in _index_reason(q=(1, 8, 4, 64))
    assert "129 indexer heads" in _index_reason(q=(1, 8, 129, J))
    assert "page size 64" in _index_reason(page=64)
    assert "page size 384" in _index_reason(page=384)
    assert "k is 4096" in _index_reason(k=4096)
    assert "fit in VMEM" in _index_reason(pages=8192)
    assert "key scales are bfloat16" in _index_reason(scales=S((2, 4 * PAGE), bf16))


def test_sparse_mla_says_what_it_cannot_run():
    def reason(q=(1, 1, 4, U), dtype=bf16, row=(3, 2, 128), value_dim=C):
        args = (S(q, dtype), S((2, 256, *row), dtype), 0, S((1, 1, 128), jnp.int32))
        return sparse_mla_tpu.supported(*args, scale=1.0, value_dim=value_dim)

    assert reason() is None
    assert "bfloat16 is needed" in reason(dtype=jnp.float32)
    assert "pool rows are [576]; [3, 2, 128] is needed" in reason(row=(U,))
    assert "value_dim is 500" in reason(value_dim=500)
    assert "257 heads" in reason(q=(1, 1, 257, U))
