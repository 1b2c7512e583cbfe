"""Loading: a Hugging Face directory of any kind gives the parameters its raw bytes say, and a bad one is refused."""

import json
import math
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    BF16,
    CONFIG,
    FP8,
    dequantized,
    expected,
    read_directory,
    tensors,
    write,
    write_file,
    write_raw,
)  # fmt: skip
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert import mapping, safetensors
from ic_jax import checkpoint
from ic_jax.config import Config
from ic_jax.errors import UserError
from ic_jax.model import abstract_params

# Small stacks are put together on the host, large ones on the device: both ways must give the same.
both_ways = pytest.mark.parametrize("small", [0, 1 << 30], ids=["device", "host"])
DSA = ["deepseek_yarn", "glm_all_full", "glm_freq4_off3", "glm_fused_experts", "glm_indexer_types", "glm_pattern"]


def load(directory, dtype="float32", layers=None, **kwargs):
    config = Config.load(directory)
    layers = checkpoint.indexer_layers(directory, config) if layers is None else layers
    return checkpoint.load_params(directory, config, layers, dtype, **kwargs)


def assert_same(params, want, dtype=np.float32):
    """The tree holds ``want`` (flat, float64), rounded once to float32 and once more to ``dtype``."""
    got = dict(checkpoint.flatten(params))
    assert set(got) == set(want)
    for leaf, array in got.items():
        to = np.float32 if mapping.keeps_dtype(leaf) else dtype
        assert array.dtype == to, leaf
        np.testing.assert_array_equal(np.asarray(array), want[leaf].astype(np.float32).astype(to), err_msg=leaf)


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("name", [*DSA, "glm_sharded", "glm4_lite_dense"])
def test_golden_checkpoints_load_as_their_bytes_say(golden, name):
    directory = golden / name
    config, weights = Config.load(directory), read_directory(directory)
    layers = checkpoint.indexer_layers(directory, config)
    assert layers == (config.pattern.full_layers if config.has_indexer else ())
    params = load(directory)
    assert_same(params, expected(weights, config, layers))
    shapes = abstract_params(config, len(layers), jnp.float32)[0]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)


@pytest.mark.parametrize("name", ["glm_fused_experts", "glm_sharded"])
def test_layouts_of_the_same_weights_load_alike(golden, name):
    jax.tree.map(np.testing.assert_array_equal, load(golden / name), load(golden / "glm_all_full"))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stored", [BF16, np.dtype(np.float16), np.dtype(np.float32), FP8], ids=str)
@pytest.mark.parametrize("dtype, small", [(np.dtype(np.float32), 0), (BF16, 1 << 30)], ids=["device", "host"])
def test_stored_dtypes(tmp_path, monkeypatch, stored, fused, dtype, small):
    monkeypatch.setattr(checkpoint, "SMALL", small)
    weights = tensors(stored, fused)
    directory = write(tmp_path, weights, shards=3)
    config = Config.load(directory)
    assert_same(load(directory, dtype), expected(weights, config, (0, 1, 3)), dtype)


def test_fp8_blocks_are_partial_where_576_rows_end(tmp_path):
    weights = tensors(FP8)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert weights[name].shape == (576, 160) and weights[name + "_scale_inv"].shape == (5, 2)
    got = np.asarray(load(write(tmp_path, weights))["layers"]["kv_a_proj_with_mqa"][0], np.float64)
    want = dequantized(weights, name)
    assert np.abs(got - want).max() <= 2**-24 * np.abs(want).max()
    # The last 64 rows and 32 columns have scales of their own.
    scale = float(weights[name + "_scale_inv"][4, 1])
    np.testing.assert_allclose(got[512:, 128:], weights[name][512:, 128:].astype(np.float64) * scale, rtol=1e-7)


@pytest.mark.parametrize("layers", [(0,), (0, 3), (3, 1, 0), ()])
def test_indexers_asked_for_are_stacked_in_order(tmp_path, layers):
    weights = tensors(np.dtype(np.float32))
    directory = write(tmp_path, weights)
    params = load(directory, layers=layers)
    assert_same(params, expected(weights, Config.load(directory), layers))
    assert ("indexer" in params) == bool(layers)


def test_notes_and_progress(tmp_path):
    weights = tensors(mtp=True)
    weights["model.rotary.inv_freq"] = np.zeros(4, np.float32)
    weights["model.layers.2.self_attn.indexer.wk.weight"] = np.zeros((64, 160), BF16)  # of an S layer: silent
    calls = []
    load(write(tmp_path, weights), layers=(0, 1, 3), progress=lambda *a: calls.append(a))
    notes = [note for *_, note in calls if note]
    mtp = sum(n.startswith("model.layers.4.") for n in weights)
    assert notes == [
        f"left out {mtp} tensors of multi-token-prediction layer 4",
        "left out 1 tensors this model does not use: model.rotary.inv_freq",
    ]
    done = [done for done, _, note in calls if not note]
    assert done == sorted(done) and done[-1] == calls[-1][1]


def test_the_host_holds_a_few_small_pieces_at_a_time(tmp_path, monkeypatch):
    """The bound on host memory: AHEAD pieces, that being placed included, of at most PIECE bytes or one expert."""
    directory = write(tmp_path, tensors(FP8))
    whole = load(directory)
    monkeypatch.setattr(checkpoint, "PIECE", 20_000)
    monkeypatch.setattr(checkpoint, "SMALL", 0)
    read, put, held, sizes = checkpoint._Job.read, checkpoint._Stack.put, [], []

    def reading(job):
        held.append(1)
        sizes.append(job.nbytes)
        return read(job)

    def putting(stack, job, pieces):
        assert len(held) <= checkpoint.AHEAD
        put(stack, job, pieces)
        held.pop()

    monkeypatch.setattr(checkpoint._Job, "read", reading)
    monkeypatch.setattr(checkpoint._Stack, "put", putting)
    jax.tree.map(np.testing.assert_array_equal, load(directory), whole)
    assert len(sizes) > 100 and max(sizes) <= 272 * 160 and not held


# ------------------------------------------------------------------------------------------------ shards


def shardings(config, slots, axes, sizes):
    """A NamedSharding a leaf: logical axes in ``axes`` go to the mesh axis of the same size's name."""
    devices = np.array(jax.devices()[: math.prod(sizes.values())]).reshape(*sizes.values())
    mesh = Mesh(devices, tuple(sizes))
    logical = abstract_params(config, slots)[1]
    specs = jax.tree.map(lambda a: PartitionSpec(*map(axes.get, a)), logical, is_leaf=lambda a: isinstance(a, tuple))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


@pytest.mark.parametrize("stored", [BF16, FP8], ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "axes",
    [
        {"heads": "a", "mlp": "a", "vocab": "a"},
        {"expert": "a", "mlp": "b", "heads": "b", "embed": "c"},
        {"embed": "b", "vocab": "a", "heads": "c"},
        {},
    ],
    ids=["heads", "experts", "embed", "replicated"],
)
@both_ways
def test_sharded_load_equals_unsharded(tmp_path, monkeypatch, stored, fused, axes, small):
    directory = write(tmp_path, tensors(stored, fused), shards=2)
    config = Config.load(directory)
    placed = shardings(config, 3, axes, {"a": 2, "b": 2, "c": 2})
    whole = load(directory)
    monkeypatch.setattr(checkpoint, "SMALL", small)
    params = load(directory, shardings=placed)
    jax.tree.map(lambda a, s: None if a.sharding == s else pytest.fail(f"{a.sharding} is not {s}"), params, placed)
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_a_process_reads_only_the_bytes_of_its_shards(tmp_path):
    """Two real processes share a mesh of 8 devices; each reads its half of what is sharded, once."""
    hf = CONFIG | dict(num_attention_heads=8, vocab_size=4096)
    weights = tensors(BF16, hf=hf)
    directory = write(tmp_path / "model", weights, hf=hf)
    code = textwrap.dedent("""
        import json, sys
        sys.path.insert(0, sys.argv[4])
        import jax, numpy as np
        jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
        from ic_jax import checkpoint, sharding
        from ic_jax.config import Config
        from ic_jax.model import abstract_params
        sources = []
        opened = checkpoint.open_source
        checkpoint.open_source = lambda d: sources.append(opened(d)) or sources[-1]
        c = Config.load(sys.argv[1])
        mesh = sharding.make_mesh({"tensor": 8})
        places = sharding.shardings(mesh, sharding.param_specs(abstract_params(c, 3)[1]))
        params = checkpoint.load_params(sys.argv[1], c, (0, 1, 3), "bfloat16", places)
        own = 0
        for leaf in jax.tree.leaves(params):
            shards = {str(s.index): s for s in leaf.addressable_shards}
            # The checkpoint holds k_norm in bfloat16, which the model keeps in float32.
            size = 2 if leaf.shape[-1] == c.index_head_dim and leaf.ndim == 2 else leaf.dtype.itemsize
            own += sum(s.data.size * size for s in shards.values())
        mine = params["lm_head"].addressable_shards[0]
        digest = float(np.asarray(mine.data, np.float64).sum()), mine.index[0].start or 0, mine.data.shape[0]
        print(json.dumps([sources[-1].bytes_read, own, digest]))
    """)
    port = free_port()
    root = str(Path(__file__).parent.parent)
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"}
    pipes = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", code, directory, str(port)]
    processes = [subprocess.Popen([*command, str(i), root], **pipes) for i in (0, 1)]
    total = sum(a.nbytes for a in weights.values())
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        read, own, (digest, row, rows) = json.loads(out.splitlines()[-1])
        assert read == own
        assert total / 2 < read < 0.62 * total  # norms, indexers and down projections to the latent are replicated
        np.testing.assert_allclose(digest, weights["lm_head.weight"][row : row + rows].astype(np.float64).sum())


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@hypothesis.settings(max_examples=60, derandomize=True, deadline=None)
@hypothesis.given(data=st.data())
def test_any_block_of_a_tensor_is_read_with_no_other_bytes(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    path = tmp_path_factory.mktemp("block")
    write_file(path / "model.safetensors", {"first": np.ones(3, np.float32), "x": array})
    bounds = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
    out = np.empty([b - a for a, b in bounds], np.float32)
    with safetensors.Reader(path) as reader:
        reader.read_into("x", tuple(a for a, _ in bounds), out)
        assert reader.bytes_read == out.nbytes
    np.testing.assert_array_equal(out, array[tuple(slice(a, b) for a, b in bounds)])


# ------------------------------------------------------------------------------------------------ what is refused


def header(**changes):
    """A header of two float32 tensors of 4 bytes, with changes to the second."""
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return {"a": one, "b": one | {"data_offsets": [4, 8]} | changes}


HOSTILE = {
    "too short": (b"\x00" * 4, "header is missing"),
    "huge length": (struct.pack("<Q", 2**63) + b"{}", "header of 9,223,372,036,854,775,808 bytes exceeds"),
    "length beyond the file": (struct.pack("<Q", 1000) + b"{}", "header of 1,000 bytes exceeds"),
    "not JSON": (b"{nope", "header is not valid"),
    "not UTF-8": (b'{"\xff": 1}', "header is not valid"),
    "deep nesting": (b"[" * 100_000, "header is not valid"),
    "a list": (b"[]", "not a JSON object"),
    "duplicate names": (b'{"a": 1, "a": 2}', "duplicate name a"),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, "exactly dtype, shape and data_offsets"),
    "unknown dtype": (header(dtype="F33"), "unknown dtype 'F33'"),
    "dtype that is no name": (header(dtype=["F32"]), "unknown dtype"),
    "negative offset": (header(data_offsets=[-4, 0]), "negative or non-integer"),
    "float offset": (header(data_offsets=[4.0, 8.0]), "negative or non-integer"),
    "boolean shape": (header(shape=[True]), "negative or non-integer"),
    "negative shape": (header(shape=[-1, -1]), "negative or non-integer"),
    "offsets in reverse": (header(data_offsets=[8, 4]), "needs 4 bytes"),
    "three offsets": (header(data_offsets=[4, 8, 12]), "negative or non-integer"),
    "shape against bytes": (header(shape=[2]), "needs 8 bytes"),
    "overflowing shape": (header(shape=[2**62, 2**62]), "bytes, its offsets"),
    "odd bits": (header(dtype="F4", shape=[3]), "bytes, its offsets"),
    "overlap": (header(data_offsets=[0, 4]), "overlaps another"),
    "partial overlap": (header(data_offsets=[2, 6]), "overlaps another"),
    "gap": (header(data_offsets=[6, 10]), "leaves a gap"),
    "beyond the file": ({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}}, "is truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path, case):
    head, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    if case in ("too short", "huge length", "length beyond the file"):
        path.write_bytes(head)
    else:
        write_raw(path, head, bytes(8))
    with pytest.raises(UserError, match="model.safetensors.*" + message) as e:
        safetensors.read_headers(tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_bytes_behind_the_last_tensor(tmp_path):
    write_raw(tmp_path / "model.safetensors", header(), bytes(9))
    with pytest.raises(UserError, match="1 bytes follow its last tensor"):
        safetensors.read_headers(tmp_path)


@hypothesis.settings(max_examples=300, derandomize=True, deadline=None)
@hypothesis.given(st.binary(max_size=200), st.integers(0, 220))
def test_random_bytes_never_raise_anything_else(tmp_path_factory, data, length):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + data)
    with pytest.raises(UserError):
        safetensors.read_header(path)


def test_truncated_shard(tmp_path):
    directory = write(tmp_path, tensors(), shards=3)
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"shard model-00002-of-00003.safetensors is truncated \(expected .*, found "):
        load(directory, layers=(0,))


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(tmp_path, index):
    directory = write(tmp_path, tensors(), shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    if not index:
        (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors.* not in "):
        load(directory, layers=(0,))


def edit_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    edit(data["weight_map"])
    path.write_text(json.dumps(data))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m.update({"x": "model-00009.safetensors"}), "names model-00009.safetensors, which is not in"),
        (lambda m: m.update({"x": FIRST}), "puts tensor x into model-00001.*no shard has it"),
        (lambda m: m.update({"lm_head.weight": FIRST}), "puts tensor lm_head.weight into .*1-of-.* it is in .*2-of-"),
        (lambda m: m.pop("lm_head.weight"), "holds tensor lm_head.weight, not in"),
        (lambda m: m.update({"x": "../x.safetensors"}), "only .safetensors files beside it"),
        (lambda m: m.update({"x": "/etc/passwd"}), "only .safetensors files beside it"),
        (lambda m: m.update({"x": ["a"]}), "cannot be read: TypeError"),
        (lambda m: m.update({"x": 3}), "cannot be read: TypeError"),
    ],
)
def test_index_against_the_shards(tmp_path, edit, message):
    directory = write(tmp_path, tensors(), shards=2)
    edit_index(directory, edit)
    with pytest.raises(UserError, match=message):
        load(directory, layers=(0,))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "b", "a": "c"}}'])
def test_malformed_index(tmp_path, text):
    directory = write(tmp_path, tensors(), shards=2)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="model.safetensors.index.json cannot be read"):
        load(directory, layers=(0,))


def test_no_weights_at_all(tmp_path):
    with pytest.raises(UserError, match="holds no safetensors files"):
        safetensors.read_headers(tmp_path)


def test_same_tensor_in_two_files_without_an_index(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        write_file(tmp_path / name, {"x": np.ones(1, np.float32)})
    with pytest.raises(UserError, match="tensor x is in both a.safetensors and b.safetensors"):
        safetensors.read_headers(tmp_path)


Q_A = "model.layers.2.self_attn.q_a_proj.weight"
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def change(name, array):
    return lambda w: w.update({name: array})


BAD = {
    "missing tensor": (lambda w: w.pop(Q_A), f"tensor {Q_A} is missing from"),
    "missing expert": (lambda w: w.pop(EXPERT), f"tensor {EXPERT} is missing from"),
    "missing indexer part": (
        lambda w: w.pop("model.layers.1.self_attn.indexer.k_norm.bias"),
        "tensor model.layers.1.self_attn.indexer.k_norm.bias is missing",
    ),
    "wrong shape": (
        change(Q_A, np.zeros((160, 32), BF16)),
        rf"tensor {Q_A} in model.safetensors has shape \[160, 32\], config.json asks for \[32, 160\]",
    ),
    "wrong rank": (change(EXPERT, np.zeros((1, 136, 160), BF16)), r"has shape \[1, 136, 160\]"),
    "wrong dtype": (
        change(Q_A, np.zeros((32, 160), np.int32)),
        f"tensor {Q_A} in model.safetensors has dtype I32, which is not supported",
    ),
    "e5m2": (change(Q_A, np.zeros((32, 160), ml_dtypes.float8_e5m2)), "has dtype F8_E5M2, which is not supported"),
    "packed dtype": (
        change(Q_A, np.zeros((32, 80), np.int32)),
        f"tensor {Q_A} in model.safetensors has dtype I32, which is not supported",
    ),
    "mixed experts": (change(EXPERT, np.zeros((136, 160), np.float16)), "is float16, but .* is bfloat16"),
    "fp8 without scales": (change(Q_A, np.zeros((32, 160), FP8)), f"{Q_A}_scale_inv are missing"),
    "fp8 norm": (change("model.norm.weight", np.zeros(160, FP8)), "block scales .* are missing"),
    "fp8 scale shape": (
        lambda w: w.update({Q_A: np.zeros((32, 160), FP8), Q_A + "_scale_inv": np.zeros((1, 1), np.float32)}),
        r"is F32 \[1, 1\], expected F32 \[1, 2\]",
    ),
    "fp8 scale dtype": (
        lambda w: w.update({Q_A: np.zeros((32, 160), FP8), Q_A + "_scale_inv": np.zeros((1, 2), BF16)}),
        r"is BF16 \[1, 2\], expected F32",
    ),
    "GPTQ": (
        lambda w: w.update({Q_A[:-6] + "qweight": w.pop(Q_A).astype(np.int32)}),
        "q_a_proj.qweight in model.safetensors is of a quantisation that is not supported; supported: fp8",
    ),
    "compressed tensors": (
        lambda w: w.update({Q_A[:-6] + "weight_packed": w.pop(Q_A).astype(np.int32)}),
        "weight_packed in model.safetensors is of a quantisation that is not supported",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused_before_any_is_read(tmp_path, case, monkeypatch):
    edit, message = BAD[case]
    weights = tensors()
    edit(weights)
    directory = write(tmp_path, weights)
    monkeypatch.setattr(safetensors.Reader, "read_into", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message) as e:
        load(directory, layers=(0, 1, 3))
    assert "\n" not in str(e.value)


def test_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    directory = write(tmp_path, tensors())
    read_header = safetensors.read_header

    def then_cut(path):
        tensors = read_header(path)
        path.write_bytes(path.read_bytes()[:100_000])
        return tensors

    monkeypatch.setattr(safetensors, "read_header", then_cut)
    with pytest.raises(UserError, match="became shorter"):
        load(directory, layers=(0, 1, 3))


# ------------------------------------------------------------------------------------------------ finding


def test_find_a_directory(tmp_path):
    assert checkpoint.find(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        checkpoint.find(str(tmp_path / "file"))
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.find(str(tmp_path / "nothing"))


def test_find_a_repository(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'ic-jax\[hf\]'"):
        checkpoint.find("owner/no-such-model")

    class Hub:
        @staticmethod
        def snapshot_download(repo, allow_patterns):
            if repo == "owner/there":
                return str(tmp_path)
            raise OSError("404 Not Found\nfor url: …")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert checkpoint.find("owner/there") == tmp_path
    with pytest.raises(UserError, match="owner/gone is not a local directory.*: 404 Not Found$"):
        checkpoint.find("owner/gone")
