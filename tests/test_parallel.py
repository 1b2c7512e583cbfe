"""A model divided over a mesh is the model on one device: logits, selections, and nothing exchanged but what is meant."""

import collections
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models as small

from ic_jax import cache as caches
from ic_jax import model, parallel, sharding
from ic_jax.config import Config
from ic_jax.errors import UserError

CONFIG = Config.from_hf(
    small.MIXED
    | dict(num_hidden_layers=5, num_attention_heads=4, index_n_heads=32, index_topk=16, moe_intermediate_size=16,
           n_routed_experts=8, mlp_layer_types=["dense", "sparse", "sparse", "sparse", "dense"])
)  # fmt: skip
SLOTS = (0, -1, 1, -1, -1)
LENGTHS, CHUNK, STEPS, PAGE = (96, 61), 48, 3, 8
ROUNDING = 3e-5  # of the logits' scale: sums over devices are added up in another order
MESHES = [
    "data=2", "tensor=2", "expert=2", "context=2", "data=2,context=2", "tensor=2,expert=2,context=2", "context=5",
]  # fmt: skip
MORE_MESHES = [
    "tensor=4", "expert=8", "context=4", "data=2,tensor=2", "data=2,expert=2", "tensor=2,expert=2", "tensor=2,context=4",
    "expert=2,context=2", "data=2,tensor=2,context=2",
]  # fmt: skip


@functools.cache
def params():
    made = model.init_params(CONFIG, 2, seed=3, dtype=jnp.float32)
    return jax.tree.map(lambda a: a * 4 if a.ndim > 2 else a, made)  # large enough that selections matter


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, max(LENGTHS) + STEPS)).astype(np.int32)


def programs(mesh, slots, **options):
    """(jitted forward for a number of queries, an empty cache), divided over ``mesh`` or not."""
    axes = model.abstract_params(CONFIG, 2, "float32")[1]
    options = dict(all_logits=True, keep_selections=not options.get("dense"), implementation="reference") | options
    index_dtype = options.pop("index_dtype", None)
    step = functools.cache(
        lambda queries: jax.jit(model.over_mesh(mesh, CONFIG, slots, axes, queries=queries, **options), donate_argnums=3)
    )
    make = lambda: caches.allocate(
        CONFIG, 2, 2, max(LENGTHS) + STEPS, dtype=jnp.float32, index_dtype=index_dtype, page_size=PAGE,
        parallel=parallel.Parallel.of(mesh, 1),
    )  # fmt: skip
    specs = parallel.cache_specs(jax.eval_shape(make))
    place = None if mesh is None else sharding.shardings(mesh, specs)
    return step, jax.jit(make, out_shardings=place)()


def divided(mesh):
    axes = model.abstract_params(CONFIG, 2, "float32")[1]
    return params() if mesh is None else jax.device_put(params(), sharding.shardings(mesh, sharding.param_specs(axes)))


def run(mesh, slots, **options):
    """Logits and selections of every real token: prompts in chunks, then single tokens, in one list."""
    step, cache = programs(mesh, slots, **options)
    weights, out = divided(mesh), []
    lengths = np.array(LENGTHS)

    def call(start, n, stops):
        at = np.arange(start, start + n)
        positions = np.where(at < stops[:, None], at, -1).astype(np.int32)
        ids = tokens()[:, start : start + n]
        nonlocal cache
        result = step(n)(weights, ids, positions, cache)
        cache = result.cache
        selected = () if result.selections_LBSK is None else (np.asarray(result.selections_LBSK),)
        for b, row in enumerate(positions):
            real = row >= 0
            out.append((np.asarray(result.logits)[b, real], *(s[:, b, real][..., : CONFIG.index_topk] for s in selected)))

    for start in range(0, max(LENGTHS), CHUNK):
        call(start, CHUNK, lengths)
    for i in range(STEPS):
        call(max(LENGTHS) + i, 1, np.array([max(LENGTHS) + STEPS, 0]))  # one goes on, the other idles
    return out, cache


@functools.cache
def alone(**options):
    return run(None, np.array(SLOTS, np.int32), **options)[0]


def assert_same(found, wanted):
    scale = max(np.abs(w[0]).max() for w in wanted if w[0].size)
    for (logits, *selected), (want, *want_selected) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(logits, want, atol=ROUNDING * scale)
        for a, b in zip(selected, want_selected, strict=True):
            np.testing.assert_array_equal(a, b)


def mesh_of(text):
    sizes = sharding.parse_mesh(text)
    sharding.check_mesh(CONFIG, sizes)
    return sharding.make_mesh(sizes)


@pytest.mark.parametrize("text", [*MESHES, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE_MESHES)])
def test_every_mesh_gives_the_single_device_result(text):
    mesh = mesh_of(text)
    found, cache = run(mesh, np.array(SLOTS, np.int32))
    assert_same(found, alone())
    assert (alone()[0][1] >= 0).sum(-1).max() == CONFIG.index_topk < min(LENGTHS)  # selections do leave tokens out
    parts = [mesh.shape[axis] for axis in ("data", "context", "expert")]
    assert cache.latent_LMU.addressable_shards[0].data.shape[1] * np.prod(parts) == cache.latent_LMU.shape[1]


@pytest.mark.parametrize(
    "options", [dict(slots=SLOTS), dict(index_dtype="float8_e4m3fn"), dict(dense=True)], ids=["static", "fp8", "dense"]
)
def test_other_forms_are_divided_alike(options):
    options = dict(options)
    slots = options.pop("slots", np.array(SLOTS, np.int32))
    found, _ = run(mesh_of("tensor=2,expert=2,context=2"), slots, **options)
    assert_same(found, alone(**options))


@pytest.mark.parametrize("queries", [CHUNK, 1])
def test_a_shared_layer_selects_nothing(queries, monkeypatch):
    """On every device one selection a full layer, whichever form the pattern has: others shipped recomputation."""
    calls, original = [], model.index_topk

    def counting(*args, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "index_topk", counting)
    mesh = mesh_of("tensor=2,context=4")
    for slots in (SLOTS, np.array(SLOTS, np.int32)):
        calls.clear()
        step, cache = programs(mesh, slots)
        positions = np.broadcast_to(np.arange(queries, dtype=np.int32), (2, queries))
        jax.block_until_ready(step(queries)(divided(mesh), tokens()[:, :queries], positions, cache))
        jax.effects_barrier()
        assert len(calls) == 2 * mesh.size


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.mark.parametrize(
    ("text", "queries", "allowed"),
    [
        ("data=2", CHUNK, set()),
        ("data=2", 1, set()),
        ("tensor=2", CHUNK, {"all-reduce", "all-gather"}),  # gathered: the selections that ranks shared out
        ("tensor=2", 1, {"all-reduce"}),
        ("context=2", CHUNK, {"all-gather"}),
        ("context=2", 1, {"all-reduce", "all-gather"}),
        ("expert=2", CHUNK, {"all-gather", "reduce-scatter"}),
    ],
)
def test_collectives_are_those_intended(text, queries, allowed):
    mesh = mesh_of(text)
    step, cache = programs(mesh, SLOTS)
    specs = sharding.shardings(mesh, sharding.param_specs(model.abstract_params(CONFIG, 2, "float32")[1]))
    weights = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params(), specs)
    ids = jax.ShapeDtypeStruct((2, queries), np.int32)
    text = step(queries).lower(weights, ids, ids, cache).compile().as_text()
    found = collections.Counter(re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", text))
    assert set(found) == allowed, found


def test_search_and_eval_run_divided():
    """Spans of layers over whole sequences, as search and eval run them; one sequence is not divided over data."""
    from ic_jax.calibration import Runner
    from ic_jax.engine import Engine

    def losses(mesh, sequences):
        engine = Engine(divided(mesh), CONFIG, SLOTS, max_context=1024, prefill_chunk=64, dtype=np.dtype("float32"),
                        implementation="reference", mesh=mesh)  # fmt: skip
        runner, ids = Runner(engine, 96), np.tile(tokens()[:1, :97], (sequences, 1))
        ids[-1] = ids[-1, ::-1]
        state = runner.advance(runner.begin(ids[:, :-1]), SLOTS, 0, 2)
        state = runner.advance(state, (0, -1, -1, -1, -1), 2)
        return np.asarray(runner.sequence_losses(state, ids[:, 1:]))

    mesh = mesh_of("data=2,tensor=2,context=2")
    for sequences in (2, 1):
        np.testing.assert_allclose(losses(mesh, sequences), losses(None, sequences), rtol=1e-4)


def test_random_weights_are_drawn_where_they_lie():
    """A device makes its own part: parts differ from each other, copies of a part do not, and norms are ones."""
    made = model.init_params(CONFIG, 2, dtype=jnp.float32, mesh=mesh_of("tensor=2,expert=2,context=2"))
    assert jax.tree.map(lambda a: a.shape, made) == jax.tree.map(lambda a: a.shape, params())

    def parts(leaf):
        found = {}
        for shard in leaf.addressable_shards:
            found.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for copies in found.values():
            assert all(np.array_equal(c, copies[0]) for c in copies)
        return [copies[0] for copies in found.values()]

    heads, experts, norms = made["layers"]["q_b_proj"], made["experts"]["gate_proj"], made["layers"]["input_layernorm"]
    assert [len(parts(a)) for a in (heads, experts, norms)] == [2, 4, 1]
    assert len({p.tobytes() for a in (heads, experts) for p in parts(a)}) == 6
    assert (np.asarray(norms) == 1).all() and abs(np.asarray(experts).std() / 0.02 - 1) < 0.05


def test_bench_runs_divided(capsys):
    from ic_jax import bench

    flags = "--mesh tensor=2,context=2 -p 0 -n 4 -d 32 -r 1 --compare all-full uniform:4".split()
    assert bench.main(["--preset", "demo", *flags, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["devices"] == 4 and found["weights"] == "random, seed 0"
    assert [test["tokens"] for test in found["tests"]] == [4, 4] and all(min(test["seconds"]) > 0 for test in found["tests"])


def test_meshes_that_do_not_divide():
    for text, message in [
        ("tensor=3", "tensor=3 does not divide 4 attention heads; valid: 1,2,4"),
        ("expert=3", "expert=3 does not divide 8 experts; valid: 1,2,4,8"),
        ("tensor=4,expert=4", "needs 16 devices, 8 are there"),
        ("tensor=0", "write axis=size pairs"),
        ("pipeline=2", "write axis=size pairs"),
    ]:
        with pytest.raises(UserError, match=message):
            mesh_of(text)


# ------------------------------------------------------------------------------------------------ several processes

# The command as users type it, but less patient.
COMMAND = """
import sys
from ic_jax import sharding
sharding.ARRIVAL_SECONDS = int(sys.argv.pop(1))
sharding.SILENCE_SECONDS = 10
from ic_jax.generate import main
sys.exit(main())
"""


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes(directory, ids, count, *flags, devices=1, patience=120, first_flags=()):
    """Processes ``ids`` of a run of ``count``, started."""
    port = free_port()
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    started = []
    for i in ids:
        run = [sys.executable, "-c", COMMAND, str(patience), "--model", str(directory), "--dtype", "float32", *flags]
        run += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count), "--process-id", str(i)]
        run += first_flags if i == 0 else ()
        started.append(subprocess.Popen(run, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def ended(started, seconds=240):
    """(exit status, stdout, stderr) of each process."""
    return [(p.returncode, *texts) for p in started for texts in [p.communicate(timeout=seconds)]]


PROMPT = small.text(60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small.directory(tmp_path_factory.mktemp("processes"))


@functools.cache
def single_tokens(directory):
    import ic_jax

    lm = ic_jax.load(directory, dtype="float32")
    return [p.token for p in lm.stream(PROMPT, max_tokens=8, temperature=0.7, seed=3, ignore_eos=True)]


GENERATE = ("-p", PROMPT, "-m", "8", "--temp", "0.7", "--seed", "3", "--json")


@pytest.mark.parametrize("ours", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["ours", "safetensors"])
def test_two_processes_give_the_tokens_of_one(checkpoint, tmp_path, ours):
    """From either kind of checkpoint; only process 0 prints."""
    from convert.__main__ import main as convert

    directory = tmp_path / "ours" if ours else checkpoint
    assert not ours or convert(["hf-to-jax", str(checkpoint), str(directory)]) == 0
    first, second = ended(processes(directory, (0, 1), 2, *GENERATE, "--mesh", "context=2"))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert json.loads(first[1].splitlines()[-1])["tokens"] == single_tokens(checkpoint)
    assert "2 x cpu" in first[2] and second[1] == "" and "Prompt:" not in second[2]


def test_the_log_of_a_search_is_process_0s(tmp_path):
    """Each process has a directory of its own, as on hosts without a shared disk; the errors of process 0 are everyone's."""
    code = """
import sys
from pathlib import Path
from ic_jax import sharding
from ic_jax.errors import UserError
from ic_jax.search_evaluate import Log
port, i, directory = sys.argv[1:]
sharding.start(f"127.0.0.1:{port}", 2, int(i))
path = Path(directory, i, "log.jsonl")
path.parent.mkdir()
with Log({"together": 1}, path) as log:
    log.add([dict(pattern="FS", batch=0, loss=[1.5, 2.0])])
with Log({"together": 1}, path, resume=True) as log:
    print(sorted(log.losses.items()), path.exists())
try:
    Log({"together": 2}, path, resume=True)
except UserError as e:
    print(e)
"""
    port, env = free_port(), os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = [sys.executable, "-c", code, str(port)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for i, (status, out, err) in enumerate(ended([subprocess.Popen([*run, i, tmp_path], env=env, **pipes) for i in "01"])):
        assert status == 0, err
        losses, refused = out.splitlines()[-2:]  # Gloo says whom it met before
        assert losses == f"[(('FS', 0), [1.5, 2.0])] {i == 0}" and "was made with together 1, now it is 2" in refused


@pytest.mark.slow
def test_four_processes_with_all_four_axes(checkpoint):
    mesh = "data=2,tensor=2,expert=2,context=2"
    first, *others = ended(processes(checkpoint, range(4), 4, *GENERATE, "--mesh", mesh, devices=4), 600)
    assert first[0] == 0, first[2]
    assert json.loads(first[1].splitlines()[-1])["tokens"] == single_tokens(checkpoint)
    assert all(status == 0 and out == "" for status, out, _ in others)


def test_a_process_that_never_arrives(checkpoint):
    for present in (0, 1):
        ((status, out, err),) = ended(processes(checkpoint, (present,), 2, *GENERATE, "--mesh", "tensor=2", patience=5))
        assert status == 2 and out == ""
        assert err.splitlines()[-1].startswith("error: not all 2 processes arrived at 127.0.0.1:")


def test_processes_with_other_arguments(checkpoint):
    flags = (*GENERATE[:-3], "--json", "--mesh", "tensor=2")
    for status, _, err in ended(processes(checkpoint, (0, 1), 2, *flags, first_flags=("--seed", "4"))):
        assert status == 2 and "error: process 1 was started with other arguments than process 0: --seed\n" in err


def test_a_killed_process_ends_the_others(checkpoint):
    first, second = processes(checkpoint, (0, 1), 2, "-p", PROMPT, "-m", "100000", "--mesh", "tensor=2")
    while not (line := first.stderr.readline()).startswith("=="):  # generation has begun
        if not line:
            pytest.fail(str(ended((first, second))))
    second.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    ((status, _, err), _) = ended((first, second), 60)
    assert status != 0 and time.monotonic() - begun < 40
    assert "another task died" in err or err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--coordinator", "127.0.0.1:1"), "several processes need --coordinator, --num-processes and --process-id"),
        (("--num-processes", "2"), "several processes need"),
        (("--coordinator", "here", "--num-processes", "2", "--process-id", "0"), "write HOST:PORT"),
        (("--coordinator", "h:99999", "--num-processes", "2", "--process-id", "0"), "write HOST:PORT"),
        (("--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"), "must lie in 0..1"),
    ],
)
def test_arguments_without_sense(flags, message, capsys):
    from ic_jax.generate import main

    assert main(["-p", "Lists", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
