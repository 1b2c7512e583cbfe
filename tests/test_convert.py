"""Conversion: bitwise both ways, and whatever interrupts it, nothing loads that is not whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import BF16, FP8, dequantized, expected, read_directory, tensors, write
from test_checkpoint import assert_same, load, shardings

from convert import store, transfer
from convert.__main__ import main
from ic_jax import checkpoint
from ic_jax.config import Config
from ic_jax.errors import UserError

ROOT = Path(__file__).parent.parent
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Several Orbax groups and pieces even for a test's checkpoint."""
    monkeypatch.setattr(store, "GROUP", 1_000_000)


def convert(*args) -> None:
    assert main([str(a) for a in args]) == 0


def fails(capsys, *args) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]) and "Traceback" not in err
    return lines[0].removeprefix("error: ")


def assert_equal_tensors(a: dict, b: dict):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("stored", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("fused, mtp", [(False, True), (True, False), (True, True)])
def test_round_trip_is_bitwise(tmp_path, monkeypatch, stored, fused, mtp):
    monkeypatch.setattr(checkpoint, "PIECE", 100_000)
    monkeypatch.setattr(transfer, "PIECE", 70_000)
    weights = tensors(stored, fused, mtp)
    source = write(tmp_path / "hf", weights, shards=2)
    convert("hf-to-jax", source, tmp_path / "ours")
    convert("jax-to-hf", tmp_path / "ours", tmp_path / "back", "--max-shard-size", "400kB")
    back = tmp_path / "back"
    assert_equal_tensors(read_directory(back), weights)
    for name in ("config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    largest = max(a.nbytes for a in weights.values())
    assert all(f.stat().st_size < max(400_000, largest) + 50_000 for f in back.glob("*.safetensors"))
    convert("verify", back, "--against", source)
    convert("verify", tmp_path / "ours", "--against", source)


@pytest.mark.parametrize("name", ["glm_freq4_off3", "glm_fused_experts", "deepseek_yarn", "glm4_lite_dense"])
def test_golden_round_trip(golden, tmp_path, name):
    convert("hf-to-jax", golden / name, tmp_path / "ours")
    convert("jax-to-hf", tmp_path / "ours", tmp_path / "back")
    assert_equal_tensors(read_directory(tmp_path / "back"), read_directory(golden / name))
    assert (tmp_path / "back" / "config.json").read_bytes() == (golden / name / "config.json").read_bytes()


def test_small_files_come_along_and_programs_do_not(golden, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(golden / "glm_all_full", source)
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (source / "modeling.py").write_text("raise SystemExit")
    convert("hf-to-jax", source, tmp_path / "ours")
    assert (tmp_path / "ours" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    assert not (tmp_path / "ours" / "modeling.py").exists()


def test_indexers_of_shared_layers_and_odd_bits_survive(tmp_path):
    weights = tensors(BF16)
    for name, array in list(weights.items()):
        if ".layers.1.self_attn.indexer." in name:
            weights[name.replace("layers.1", "layers.2")] = array  # layer 2 is S
    bits = np.arange(48 * 160, dtype=np.uint16) * 8  # NaNs with payloads, infinities, subnormals
    weights["lm_head.weight"] = bits.view(BF16).reshape(48, 160)
    source = write(tmp_path / "hf", weights)
    convert("hf-to-jax", source, tmp_path / "ours")
    assert checkpoint.indexer_layers(tmp_path / "ours", Config.load(source)) == (0, 1, 2, 3)
    convert("jax-to-hf", tmp_path / "ours", tmp_path / "back")
    assert_equal_tensors(read_directory(tmp_path / "back"), weights)


def test_fp8_is_dequantised_once(tmp_path):
    weights = tensors(FP8, mtp=True)
    source = write(tmp_path / "hf", weights)
    convert("hf-to-jax", source, tmp_path / "ours")
    convert("jax-to-hf", tmp_path / "ours", tmp_path / "back")
    back = read_directory(tmp_path / "back")
    assert set(back) == {n for n in weights if not n.endswith("_scale_inv")}
    for name, array in back.items():
        want = weights[name] if weights[name].dtype != FP8 else dequantized(weights, name).astype(F32).astype(BF16)
        assert array.dtype == want.dtype and array.tobytes() == want.tobytes(), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "ours", BF16), load(source, BF16))
    convert("verify", tmp_path / "ours", "--against", source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(tmp_path, dtype):
    weights = tensors(F32, mtp=True)
    source = write(tmp_path / "hf", weights)
    convert("hf-to-jax", source, tmp_path / "ours", "--dtype", dtype)
    convert("jax-to-hf", tmp_path / "ours", tmp_path / "back")
    to = BF16 if dtype == "bfloat16" else F32
    for name, array in read_directory(tmp_path / "back").items():
        kept = "k_norm" in name or "e_score" in name
        assert array.dtype == (F32 if kept else to), name
        assert array.tobytes() == weights[name].astype(array.dtype).tobytes(), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == dtype


def test_destination_may_be_an_empty_directory(golden, tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    convert("hf-to-jax", golden / "glm_pattern", ".")
    convert("verify", tmp_path / "x")


# ------------------------------------------------------------------------------------------------ our directories


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(Hugging Face directory, its conversion, its tensors); not to be changed."""
    path = tmp_path_factory.mktemp("converted")
    weights = tensors(BF16, mtp=True)
    source = write(path / "hf", weights, shards=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "GROUP", 1_000_000)
        patch.setattr(checkpoint, "PIECE", 100_000)
        convert("hf-to-jax", source, path / "ours")
    return source, path / "ours", weights


@pytest.mark.parametrize("small", [0, 1 << 30], ids=["device", "host"])
def test_our_directory_loads_like_its_source(converted, monkeypatch, small):
    source, ours, weights = converted
    monkeypatch.setattr(checkpoint, "SMALL", small)
    config = Config.load(ours)
    assert checkpoint.indexer_layers(ours, config) == (0, 1, 3)
    notes = []
    params = load(ours, BF16, progress=lambda done, total, note: note and notes.append(note))
    assert_same(params, expected(weights, config, (0, 1, 3)), BF16)
    assert len(notes) == 1 and "multi-token-prediction layer 4" in notes[0]
    placed = shardings(config, 3, {"expert": "a", "mlp": "b", "heads": "b", "embed": "c"}, {"a": 2, "b": 2, "c": 2})
    jax.tree.map(np.testing.assert_array_equal, load(ours, BF16, shardings=placed), params)


def test_entries_are_one_layer_each_and_plain_orbax_restores_them(converted):
    import orbax.checkpoint as ocp

    _, ours, weights = converted
    manifest = json.loads((ours / store.MANIFEST).read_text())
    assert len(list((ours / "weights").iterdir())) > 3
    assert manifest["entries"]["experts.2.gate_proj"]["shape"] == [4, 160, 136]
    piece = manifest["entries"]["layers.2.q_a_proj"]["pieces"][0]
    with ocp.PyTreeCheckpointer() as checkpointer:
        group = checkpointer.restore(ours.resolve() / "weights" / piece["group"])
    want = weights["model.layers.2.self_attn.q_a_proj.weight"]
    np.testing.assert_array_equal(np.asarray(group["layers.2.q_a_proj"]), want)


def files(directory: Path) -> dict[str, int]:
    return {str(f.relative_to(directory)): f.stat().st_size for f in directory.rglob("*") if f.is_file()}


def test_verify_finds_a_flipped_byte_anywhere_in_the_data(converted, tmp_path, capsys):
    _, ours, _ = converted
    large = [(name, size) for name, size in files(ours).items() if "/d/" in name and size >= 10_000]
    assert large
    for name, size in large:
        copy = tmp_path / "copy"
        shutil.copytree(ours, copy)
        data = bytearray((copy / name).read_bytes())
        data[size // 2] ^= 1
        (copy / name).write_bytes(data)
        for command in (["verify", copy], ["jax-to-hf", copy, tmp_path / "back"]):
            message = fails(capsys, *command)
            assert "is damaged" in message or "cannot be read" in message
        shutil.rmtree(copy)
        shutil.rmtree(tmp_path / "back.incomplete")


@pytest.mark.parametrize(
    "damage", [lambda path: os.truncate(path, path.stat().st_size // 2), Path.unlink], ids=["cut", "gone"]
)
def test_damaged_data_does_not_load_as_zeros(converted, tmp_path, damage):
    _, ours, _ = converted
    # The first group holds embeddings and layer 0 only; how Orbax spreads a group over files differs from run to run.
    manifest = json.loads((ours / store.MANIFEST).read_text())
    held = {n for n, e in manifest["entries"].items() if any(p["group"] == "00000" for p in e["pieces"])}
    assert "layers.0.o_proj" in held and not any(n.startswith("model.") for n in held)
    data = [n for n, size in files(ours).items() if n.startswith("weights/00000/") and "/d/" in n and size > 10_000]
    assert data
    for i, name in enumerate(data):
        shutil.copytree(ours, copy := tmp_path / str(i))
        damage(copy / name)
        with pytest.raises(UserError, match="weights/00000 cannot be read"):
            load(copy, BF16)


def test_a_chunk_that_is_not_there_does_not_load_as_zeros(converted, tmp_path):
    import tensorstore

    _, ours, _ = converted
    shutil.copytree(ours, tmp_path / "copy")
    base = {"driver": "file", "path": f"{tmp_path}/copy/weights/00000/"}
    group = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    (chunk,) = (key for key in group.list().result() if key.startswith(b"layers.0.o_proj/") and not key.endswith(b".zarray"))
    group.write(chunk, None).result()
    with pytest.raises(UserError, match="layers.0.o_proj in .*weights/00000 cannot be read"):
        load(tmp_path / "copy", BF16)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m.update(format=9), "has format 9"),
        (lambda m: m.pop("entries"), "cannot be read: KeyError"),
        (lambda m: m["entries"].pop("layers.2.q_a_proj"), "tensor layers.2.q_a_proj is missing"),
        (lambda m: m["entries"]["norm"].update(shape=[161]), "the pieces of norm do not make"),
        (lambda m: m["entries"]["norm"].update(dtype="int4"), "the pieces of norm do not make int4"),
        (lambda m: m["entries"]["norm"]["pieces"][0].update(group="../x"), "the pieces of norm"),
        (lambda m: m["entries"]["norm"]["pieces"][0].update(group="99999"), "lacks weights/99999"),
        (lambda m: m["entries"]["norm"]["pieces"][0].update(key="lm_head"), "norm|lm_head"),
        (lambda m: m["entries"]["norm"].update(pieces=[]), "the pieces of norm|IndexError"),
        (lambda m: m["entries"].update(norm=3), "cannot be read: TypeError"),
        (lambda m: m["entries"]["norm"]["pieces"][0].pop("key"), "cannot be read: KeyError"),
        (lambda m: m["entries"]["norm"]["pieces"][0].update(crc="x"), "the pieces of norm do not follow"),
    ],
)
def test_bad_manifests(converted, tmp_path, edit, message):
    _, ours, _ = converted
    shutil.copytree(ours, tmp_path / "copy")
    manifest = json.loads((ours / store.MANIFEST).read_text())
    edit(manifest)
    (tmp_path / "copy" / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "copy", BF16)


# ------------------------------------------------------------------------------------------------ commands


def test_dry_run_checks_and_writes_nothing(converted, tmp_path, capsys):
    source, ours, _ = converted
    convert("hf-to-jax", source, tmp_path / "x", "--dry-run")
    out, err = capsys.readouterr()
    assert "would write 5 MB in" in out and "carrying 35 tensors of the multi-token" in err
    convert("jax-to-hf", ours, tmp_path / "x", "--dry-run", "--max-shard-size", "1MB")
    assert "would write 5 MB in 6 shards" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_inspect(converted, capsys):
    source, ours, weights = converted
    for directory, kind, count in ((source, "safetensors", len(weights)), (ours, "orbax", None)):
        convert("inspect", directory)
        text = capsys.readouterr().out
        assert "pattern: 3 full / 1 shared  FFSF" in text and "indexer weights on 3 layers: 0,1,3" in text
        convert("inspect", directory, "--json")
        report = json.loads(capsys.readouterr().out)
        assert report["format"] == kind and report["indexer_layers"] == [0, 1, 3] and report["pattern"] == "FFSF"
        assert report["bytes"] == sum(a.nbytes for a in weights.values())
        assert count is None or report["tensors"] == count == sum(k["count"] for k in report["kinds"])


def test_verify_against_another(converted, tmp_path, capsys):
    source, ours, weights = converted
    other = {n: a.copy() for n, a in weights.items()}
    other["model.layers.3.mlp.experts.2.up_proj.weight"][-1, -1] += 1
    write(tmp_path / "changed", other)
    message = fails(capsys, "verify", ours, "--against", tmp_path / "changed")
    assert message == "1 tensors differ, the first is experts.3.up_proj"
    write(tmp_path / "fewer", {n: a for n, a in weights.items() if ".layers.4." not in n})
    assert "are in one checkpoint only" in fails(capsys, "verify", source, "--against", tmp_path / "fewer")


def test_errors_are_one_line(converted, tmp_path, capsys):
    source, ours, _ = converted
    dst = tmp_path / "x"
    assert "does not exist" in fails(capsys, "hf-to-jax", tmp_path / "nothing", dst)
    assert "already converted" in fails(capsys, "hf-to-jax", ours, dst)
    assert "is not one of our directories" in fails(capsys, "jax-to-hf", source, dst)
    assert "already exists and is not empty" in fails(capsys, "hf-to-jax", source, ours)
    assert "has no config.json" in fails(capsys, "inspect", tmp_path)
    assert "two lines does not exist" in fails(capsys, "inspect", tmp_path / "two\nlines")
    assert list(tmp_path.iterdir()) == []
    assert main(["hf-to-jax", str(ours), str(dst), "--debug"]) == 2 and "Traceback" in capsys.readouterr().err
    assert "'big' is not a size such as" in fails(capsys, "jax-to-hf", ours, dst, "--max-shard-size", "big")
    assert "unrecognized arguments: --dry" in fails(capsys, "jax-to-hf", ours, dst, "--dry")
    assert "required" in fails(capsys, "hf-to-jax", source)


def test_without_a_command_it_prints_its_usage(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert main([]) == 2 and capsys.readouterr() == ("", usage)


def test_bad_sources_are_refused_before_anything_is_written(tmp_path, capsys):
    weights = tensors()
    weights.pop("model.layers.2.self_attn.q_a_proj.weight")
    source = write(tmp_path / "hf", weights)
    assert "is missing from" in fails(capsys, "hf-to-jax", source, tmp_path / "ours")
    weights = {n: a for n, a in tensors().items() if ".layers.3.self_attn.indexer" not in n}
    source = write(tmp_path / "hf2", weights)
    assert "the pattern asks for F on layers 3" in fails(capsys, "hf-to-jax", source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and not (tmp_path / "ours.incomplete").exists()


# ------------------------------------------------------------------------------------------------ interruptions

# A conversion in a process of its own that dies, or may write no file beyond LIMIT bytes.
CHILD = """
import os, resource, signal, sys
sys.path.insert(0, {root!r})
from convert import __main__, safetensors, store
store.GROUP = 1_000_000
calls = 0
def dying(module, name, before):
    original = getattr(module, name)
    def call(*args):
        global calls
        calls += 1
        if calls == 3 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args)
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, call)
{setup}
sys.exit(__main__.main(sys.argv[1:]))
"""


def child(setup: str, *args) -> subprocess.CompletedProcess:
    code = CHILD.format(root=str(ROOT), setup=setup)
    env = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True)


def assert_unfinished(capsys, destination, command):
    """Nothing that loads is there, and the errors say what to do."""
    unfinished = destination.with_name(destination.name + ".incomplete")
    assert not destination.exists() and unfinished.is_dir()
    with pytest.raises(UserError, match="does not exist, but .* is an unfinished conversion; finish it with --resume"):
        checkpoint.find(str(destination))
    with pytest.raises(UserError, match="is an unfinished conversion"):
        checkpoint.open_source(unfinished)
    assert "continue it with --resume, or delete it" in fails(capsys, *command)


@pytest.mark.parametrize(
    "setup",
    [
        "dying(store, 'write_group', before=True)",
        "dying(store.Work, 'note', before=True)",  # data on the disk, journal not
        "dying(store.Work, 'note', before=False)",
        "dying(store, 'write_text', before=True)",  # the manifest
        "dying(store.Work, 'rename', before=False); calls = 2",
        "store.Work.rename = lambda self: os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_killed_then_resumed_equals_uninterrupted(converted, tmp_path, capsys, monkeypatch, setup):
    source, _, weights = converted
    destination = tmp_path / "ours"
    command = ["hf-to-jax", source, destination]
    assert child(setup, *command).returncode == -signal.SIGKILL
    if "dying(store.Work, 'rename'" in setup:
        convert("verify", destination, "--against", source)
        return
    if "lambda" not in setup:
        assert_unfinished(capsys, destination, command)
    written = []
    original = store.write_group
    monkeypatch.setattr(store, "write_group", lambda *args: written.append(args[1]) or original(*args))
    convert(*command, "--resume")
    groups = sorted(p.name for p in (destination / "weights").iterdir())
    assert len(groups) > 3 and len(written) < len(groups)  # it went on instead of starting again
    assert not (destination / store.JOURNAL).exists()
    convert("verify", destination, "--against", source)
    convert("hf-to-jax", source, tmp_path / "straight")
    assert (destination / store.MANIFEST).read_bytes() == (tmp_path / "straight" / store.MANIFEST).read_bytes()
    assert set(files(destination)) - {f for f in files(destination) if "/d/" in f} == set(
        f for f in files(tmp_path / "straight") if "/d/" not in f
    )


@pytest.mark.parametrize(
    "setup", ["dying(safetensors, 'write', before=True)", "dying(safetensors, 'write', before=False)"]
)
def test_back_conversion_killed_then_resumed(converted, tmp_path, capsys, setup):
    _, ours, weights = converted
    destination = tmp_path / "back"
    command = ["jax-to-hf", ours, destination, "--max-shard-size", "500kB"]
    assert child(setup, *command).returncode == -signal.SIGKILL
    assert_unfinished(capsys, destination, command)
    convert(*command, "--resume")
    assert_equal_tensors(read_directory(destination), weights)
    assert not (destination / store.JOURNAL).exists()


def test_resume_rewrites_what_is_damaged(converted, tmp_path, caplog):
    source, _, _ = converted
    destination = tmp_path / "ours"
    command = ["hf-to-jax", source, destination]
    assert child("dying(store.Work, 'note', before=False)", *command).returncode == -signal.SIGKILL
    work = tmp_path / "ours.incomplete"
    name, size = max(((n, s) for n, s in files(work).items() if "/00001/" in n), key=lambda item: item[1])
    data = bytearray((work / name).read_bytes())
    data[size // 2] ^= 1
    (work / name).write_bytes(data)
    shutil.rmtree(work / "weights" / "00000")
    (work / "weights" / "00003.orbax-checkpoint-tmp").mkdir()  # the group it was writing
    with open(work / store.JOURNAL, "a") as f:
        f.write('{"unit": "000')  # the line it was writing
    convert(*command, "--resume")
    assert "already exists" not in caplog.text  # Orbax would warn of what it finds
    convert("verify", destination, "--against", source)


def test_resume_needs_the_same_source_and_options(converted, tmp_path, capsys):
    source, _, _ = converted
    command = ["hf-to-jax", source, tmp_path / "ours"]
    assert child("dying(store, 'write_group', before=True)", *command).returncode == -signal.SIGKILL
    assert "other options" in fails(capsys, *command, "--resume", "--dtype", "float32")
    write(tmp_path / "other", tensors(BF16, seed=1))
    assert "another source" in fails(capsys, "hf-to-jax", tmp_path / "other", tmp_path / "ours", "--resume")


def test_what_is_finished_but_for_its_name_is_of_its_source_too(converted, tmp_path, capsys):
    source, _, _ = converted
    command = ["hf-to-jax", source, tmp_path / "ours"]
    killed = "store.Work.rename = lambda self: os.kill(os.getpid(), signal.SIGKILL)"
    assert child(killed, *command).returncode == -signal.SIGKILL
    assert "other options" in fails(capsys, *command, "--resume", "--dtype", "float32")
    convert(*command, "--resume")
    assert not any(name.startswith(".") for name in files(tmp_path / "ours"))


@pytest.mark.parametrize("line", [b"3", b"[]", b"\xff", b"{}", b"[" * 100_000, b'{"unit": [], "crc": 1}'], ids=range(6))
def test_a_damaged_journal(tmp_path, line):
    """What it does not say is written again; without a first line, nothing is known of what is there."""
    work = store.Work(tmp_path / "ours", "a", resume=False)
    with work:
        work.note("00000", {"crc": {"x": 1}})
        good = work.journal.read_bytes()
        work.journal.write_bytes(good + line + b"\n")
    with store.Work(tmp_path / "ours", "a", resume=True) as again:
        assert list(again.done) == ["00000"] and again.journal.read_bytes() == good
        again.journal.write_bytes(line + b"\n" + good)
    with pytest.raises(UserError, match="was begun from another source"):
        store.Work(tmp_path / "ours", "a", resume=True)
    assert not transfer._intact(work, "00000", [], 3)


def test_an_output_has_one_run(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    with store.Work(tmp_path / "ours", "a", resume=False) as work:
        for resume in (False, True):
            with pytest.raises(UserError, match="ours.incomplete is in use by another run"):
                store.Work(tmp_path / "ours", "a", resume)
        work.finish(tmp_path / "source", "{}", {})
    with pytest.raises(UserError, match="already exists"):  # had looked before the first one ended
        store.Work(tmp_path / "ours", "a", resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "source"]
    for ended in (lambda *_: (tmp_path / "ours").rename(tmp_path / "theirs"), lambda *_: (tmp_path / "ours").rmdir()):
        monkeypatch.setattr(store.fcntl, "flock", ended)
        with pytest.raises(UserError, match="in use by another run"), store.claimed(tmp_path / "ours"):
            pass
        (tmp_path / "ours").mkdir()
    monkeypatch.setattr(store, "fcntl", None)  # Windows: unguarded, and a directory cannot be opened
    monkeypatch.setattr(store.os, "open", lambda *_: pytest.fail("opened"))
    with store.claimed(tmp_path / "ours"), store.claimed(tmp_path / "ours"):
        pass


@pytest.mark.parametrize("direction", ["hf-to-jax", "jax-to-hf"])
def test_full_disk(converted, tmp_path, capsys, direction):
    source, ours, _ = converted
    command = [direction, source if direction == "hf-to-jax" else ours, tmp_path / "x"]
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    done = child(limit, *command)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "make room and continue with --resume" in errors[0]
    assert "Traceback" not in done.stderr
    assert_unfinished(capsys, tmp_path / "x", command)
    convert(*command, "--resume")
    convert("verify", tmp_path / "x", "--against", source)


def test_too_little_room_is_seen_before_it_starts(converted, tmp_path, capsys, monkeypatch):
    source, _, _ = converted
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    message = fails(capsys, "hf-to-jax", source, tmp_path / "x")
    assert message.endswith("needs 5 MB more, 1 MB are free there")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(converted, tmp_path, capsys):
    source, ours, _ = converted
    (tmp_path / "file").touch()
    for command in (["hf-to-jax", source], ["jax-to-hf", ours]):
        assert fails(capsys, *command, tmp_path / "file" / "x") == f"{tmp_path}/file/x cannot be written: Not a directory"


def test_an_interrupted_group_is_written_whole(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    original = ocp.PyTreeCheckpointer.save

    def save(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        original(*args, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", save)
    array, out = np.arange(6, dtype=np.float32), np.empty(6, np.float32)
    with pytest.raises(KeyboardInterrupt):
        store.write_group(tmp_path, "00000", {"a": array})
    store.Arrays(tmp_path).read_into("00000", "a", (6,), (0,), out)
    np.testing.assert_array_equal(out, array)


def test_closed_streams(converted):
    source, _, _ = converted
    command = [sys.executable, "-m", "convert", "inspect", str(source)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    os.close(write)
    assert (done.stderr, done.returncode) == (b"", 141)
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    assert (done.stderr, done.returncode) == (b"", 0)


@pytest.mark.parametrize(
    ("command", "message"),
    [("hf-to-jax", "interrupted; the same command with --resume goes on\n"), ("verify", "interrupted\n")],
)
def test_interrupts_say_how_to_go_on(converted, tmp_path, capsys, monkeypatch, command, message):
    source, ours, _ = converted

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_group", interrupted)
    monkeypatch.setattr(store, "checksum", interrupted)
    capsys.readouterr()
    assert main([command, str(source), str(tmp_path / "x")] if command == "hf-to-jax" else [command, str(ours)]) == 130
    assert capsys.readouterr().err.endswith(message)
