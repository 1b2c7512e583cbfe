"""The commands' surface without a model: flags, one-line errors, where output goes, prompts, tables, JSON.

``ic_jax.load`` is replaced by a stand-in that echoes; the end-to-end tests on the demo model are elsewhere.
"""

import gc
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import ic_jax
from ic_jax import __main__, chat, cli, generate, interrupts
from ic_jax.config import Config
from ic_jax.errors import UserError

CONFIG = dict(
    model_type="glm_moe_dsa", vocab_size=300, hidden_size=64, num_hidden_layers=8, num_attention_heads=4,
    q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, intermediate_size=64,
    moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=16,
    index_topk=8, max_position_embeddings=64, index_topk_freq=4,
)  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def model(tmp_path):
    """A directory with config.json and a byte-level tokenizer, without template or weights."""
    t = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    directory = tmp_path / "tiny"
    directory.mkdir()
    t.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


class Echo:
    """Stands in for an LM: answers with its prompt in capitals, a token a piece; remembers how it was called."""

    def __init__(self, path, pattern=None, dense=False, progress=None, **kwargs):
        from ic_jax import pattern as patterns
        from ic_jax.tokenizer import Tokenizer

        progress(0, 1, "left out 3 tensors")
        self.kwargs, self.calls = kwargs | dict(pattern=pattern), []
        self.tokenizer, self.config, self.name = Tokenizer(path), Config.load(path), path.rpartition("/")[2]
        pattern = patterns.parse(pattern, 8) if isinstance(pattern, str) else pattern or self.config.pattern
        self.pattern, self.compile_seconds = None if dense else pattern, 1.25

    def stream(self, prompt, *, max_tokens, sampling):
        text = self.tokenizer.decode(prompt)
        self.calls.append(SimpleNamespace(prompt=text, max_tokens=max_tokens, sampling=sampling))
        ids = self.tokenizer.encode(text.upper())[:max_tokens]
        for i, token in enumerate(ids):
            reason = "length" if i + 1 == len(ids) else None
            yield SimpleNamespace(
                text=self.tokenizer.decode([token]), token=token, finish_reason=reason, prompt_tokens=len(prompt),
                generation_tokens=i + 1, prompt_tps=100.0, generation_tps=float("inf"),
            )  # fmt: skip

    def stream_chat(self, messages, **options):
        text = self.tokenizer.apply_chat_template(messages)
        if "too long" in text:
            raise UserError("the prompt has 99 tokens, the context holds 64")
        yield from self.stream(self.tokenizer.encode(text), **options)


@pytest.fixture
def loaded(monkeypatch):
    """The list of LMs that commands load."""
    lms = []

    def load(path, **kwargs):
        lms.append(Echo(path, **kwargs))
        return lms[-1]

    monkeypatch.setitem(vars(ic_jax), "load", load)
    return lms


@pytest.fixture
def stdin(monkeypatch):
    def give(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def error(capsys, status, expected=2):
    """The one line a failed command printed."""
    out, err = capsys.readouterr()
    assert status == expected and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


# Errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "there is no prompt"),
        (["-p", ""], "the prompt is empty"),
        (["-p", "a", "--file", "b"], "not allowed with"),
        (["-p", "a", "--temp", "-1"], "temperature must be a number >= 0"),
        (["-p", "a", "--temp", "nan"], "temperature must be a number >= 0"),
        (["-p", "a", "--temp", "hot"], "invalid float value"),
        (["-p", "a", "--top-p", "0"], "top_p must be above 0"),
        (["-p", "a", "--top-k", "-3"], "top_k must be"),
        (["-p", "a", "--min-p", "2"], "min_p must be"),
        (["-p", "a", "--seed", "-1"], "seed must be"),
        (["-p", "a", "--stop", ""], "stop must hold non-empty"),
        (["-p", "a", "-m", "0"], "must be an integer >= 1, not '0'"),
        (["-p", "a", "--max-context", "x"], "must be an integer >= 1, not 'x'"),
        (["-p", "a", "--implementation", "cuda"], "invalid choice"),
        (["-p", "a", "--dense", "--index-pattern", "all-full"], "not allowed with"),
        (["-p", "a", "--dense", "--index-freq", "4"], "not allowed with"),
        (["-p", "a", "--index-offset", "4"], "give --index-freq too"),
        # F where max(i + 1, 0) % 4 == 0: the first layer is shared.
        (["-p", "a", "--index-freq", "4", "--index-offset", "0"], "layer 0 is S"),
        (["-p", "a", "--tem", "1"], "unrecognized arguments"),
        (["-p", "a\udcff"], "not valid UTF-8"),
        (["--file", "/nonexistent/prompt"], "cannot be read: No such file"),
        (["-p", "a", "--system-prompt", "b"], "no chat template"),
        (["-p", "x" * 64], "the prompt has 64 tokens, the context holds 64\n"),
        (["-p", "x" * 20, "--max-context", "16"], "has 20 tokens, the context holds 16; raise --max-context"),
    ],
    ids=str,
)
def test_generate_errors_are_one_line_before_loading(argv, message, model, loaded, capsys):
    assert message in error(capsys, generate.main([*argv, "--model", str(model)]))
    assert not loaded


def test_prompt_files_that_are_no_text(model, loaded, capsys, tmp_path, stdin):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"abc\xff\xfe")
    line = error(capsys, generate.main(["--file", str(path), "--model", str(model)]))
    assert "prompt.txt is not UTF-8 text: byte 0xff at offset 3" in line
    path.write_bytes(b"")
    assert "the prompt is empty" in error(capsys, generate.main(["--file", str(path), "--model", str(model)]))
    stdin(b"")
    assert "the prompt is empty (stdin)" in error(capsys, generate.main(["-p", "-", "--model", str(model)]))
    assert "cannot be read" in error(capsys, generate.main(["--file", str(tmp_path), "--model", str(model)]))


def test_an_empty_model_is_named(capsys):
    assert "--model is empty" in error(capsys, generate.main(["-p", "a", "--model", ""]))


def test_a_tokenizer_of_another_model_is_noticed(model, loaded, capsys):
    (model / "config.json").write_text(json.dumps(CONFIG | dict(vocab_size=50)))
    assert "vocabulary has 50 entries" in error(capsys, generate.main(["-p", "zz", "--model", str(model)]))
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in error(capsys, generate.main(["-p", "zz", "--model", str(model)]))


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (NotImplementedError("no kernel"), 2, "error: no kernel\n"),
        (NotImplementedError(), 2, "error: this is not implemented\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "error: out of memory; try a smaller"),
        (MemoryError(), 2, "error: out of memory"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=repr,
)
def test_exit_status(raised, status, message, capsys):
    def body(args):
        raise raised

    parser = cli.Parser("x", "x")
    cli.add_common_flags(parser)
    assert cli.run(body, parser, []) == status
    err = capsys.readouterr().err
    assert err.startswith(message) if message else not err
    if status == 2:
        assert cli.run(body, parser, ["--debug"]) == 2
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0, 10])
def test_ctrl_c_is_not_lost_in_a_callback(seconds, capsys, monkeypatch):
    """Python drops what a callback of the garbage collector raises; JAX has one."""

    def callback(phase, info):
        if phase == "stop":
            gc.callbacks.remove(callback)
            signal.raise_signal(signal.SIGINT)

    def body(args):
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(seconds)

    assert cli.run(body, cli.Parser("x", "x"), []) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_ctrl_c_waits_where_it_is_deferred():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("platform", ["cuda", "foo"])
def test_a_platform_that_is_not_there_is_named(platform):
    code = "import sys\nfrom ic_jax import info\nsys.exit(info.main([]))"
    process = python(code, env=os.environ | dict(JAX_PLATFORMS=platform), stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and not out
    *said_by_jax, last = err.splitlines()  # its CUDA plugin, where installed, says which library it lacks
    assert last.startswith(b"error: JAX cannot start here what JAX_PLATFORMS=" + platform.encode())
    assert platform == "cuda" or not said_by_jax


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_commands_take_the_gpu_unless_told_otherwise(name, monkeypatch):
    of = lambda: {n: os.environ.get(n) for n in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")}
    for other in of():
        monkeypatch.delenv(other, raising=False)
    seen = []
    cli.run(lambda args: seen.append(of()), cli.Parser("", ""), [])
    assert seen == [{"XLA_CLIENT_MEM_FRACTION": ".95", "XLA_PYTHON_CLIENT_MEM_FRACTION": None}]
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv(name, ".3")
    cli.run(lambda args: seen.append(of()), cli.Parser("", ""), [])
    assert seen[1] == dict.fromkeys(of()) | {name: ".3"}  # both at once would be refused by JAX


def test_defects_are_not_hidden():
    def body(args):
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        cli.run(body, cli.Parser("x", "x"), [])


def python(code, **kwargs):
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], stderr=subprocess.PIPE, **kwargs)


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys\nfrom ic_jax import cli\n"
        "def body(args):\n    for i in range(100000): cli.Console().write('x' * 100)\n"
        "sys.exit(cli.run(body, cli.Parser('x', 'x'), []))"
    )
    process = python(code, stdout=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 141)
    process.stderr.close()


WRITER = (
    "import sys\nfrom ic_jax import cli\n"
    "def body(args):\n    cli.Console().write(sys.stdin.read() + 'x')\n    cli.Console().status('done')\n"
    "sys.exit(cli.run(body, cli.Parser('x', 'x'), []))"
)


def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        process = python(WRITER, stdin=subprocess.DEVNULL, stdout=full)
        assert (process.communicate()[1], process.returncode) == (b"error: [Errno 28] No space left on device\n", 2)


HELPS = [["ic_jax", "--help"], ["ic_jax", "--version"], ["ic_jax", "eval", "--help"], ["ic_jax", "plan", "--help"]]


@pytest.mark.parametrize("argv", [*HELPS, ["convert", "--help"]], ids=" ".join)
def test_help_into_a_closed_pipe_and_a_full_disk(argv):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        for stdout, expected in ((write, (b"", 141)), (full, (b"error: [Errno 28] No space left on device\n", 2))):
            command = [sys.executable, "-W", "error", "-m", *argv]
            done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=60)
            assert (done.stderr, done.returncode) == expected
    os.close(write)


@pytest.mark.parametrize(("closed", "expected"), [("<&-", b"x"), ("</dev/null >&-", b""), ("</dev/null 2>&-", b"x")])
def test_closed_streams_are_empty(closed, expected):
    command = ["sh", "-c", f'"$0" -W error -c "$1" {closed}', sys.executable, WRITER]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, expected) and b"Traceback" not in done.stderr


# Help and the list of commands


@pytest.mark.parametrize("name", ["generate", "chat", "info", "bench"])
def test_help_is_quick_and_silent(name):
    code = (
        f"import sys\nfrom ic_jax import {name}\n"
        f"try: {name}.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'jax' not in sys.modules and 'rich' not in sys.modules"
    )
    process = python(code, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err
    assert out.startswith(f"usage: ic-jax {name}".encode())


def test_modules_run_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", "ic_jax.generate", "--help"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert not done.stderr


def test_commands(capsys):
    assert __main__.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in ("generate", "chat", "info"))
    assert __main__.main([]) == 2
    assert capsys.readouterr().err == listed
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ic-jax {ic_jax.__version__}\n"
    assert "did you mean generate?" in error(capsys, __main__.main(["generat"]))
    assert "there are generate" in error(capsys, __main__.main(["zzz"]))
    assert "no prompt" in error(capsys, __main__.main(["generate"]))
    assert all(importlib.util.find_spec(f"ic_jax.{name}") for name in __main__.COMMANDS)


# generate


def run_generate(model, *argv):
    return generate.main(["--model", str(model), *argv])


def test_text_goes_to_stdout_and_the_rest_to_stderr(model, loaded, capsys):
    assert run_generate(model, "-p", "hi\\n you", "-m", "100") == 0
    out, err = capsys.readouterr()
    assert out == "HI\\N YOU\n"
    lines = err.splitlines()
    assert lines[0] == "left out 3 tensors"
    assert lines[1] == "tiny · 8 layers · IndexCache 3 full / 5 shared  FFSSSFSS · top-k 8"
    assert lines[2] == "1 x cpu · index_topk=reference sparse_mla=reference · compiled in 1.2 s"
    assert lines[3] == lines[4] == "=========="
    assert lines[5] == "Prompt: 8 tokens, 100.0 tokens-per-sec"
    assert lines[6] == "Generation: 8 tokens, inf tokens-per-sec"
    assert lines[7].startswith("Peak memory: ") and lines[7].endswith(" GB")


def test_quiet_prints_the_text_only(model, loaded, capsys):
    assert run_generate(model, "-q", "-p", "he") == 0
    assert capsys.readouterr() == ("HE\n", "")


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_json_is_one_object_on_the_last_line(quiet, model, loaded, capsys):
    assert run_generate(model, "--json", "-p", "abc", "-m", "2", *quiet) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result.pop("peak_memory_gb") > 0
    assert result == dict(
        text="AB", tokens=loaded[0].tokenizer.encode("AB"), prompt_tokens=3, generation_tokens=2, prompt_tps=100.0,
        generation_tps=None, finish_reason="length", pattern="FFSSSFSS",
    )  # fmt: skip
    assert bool(err) == (not quiet)


def interrupted(after=3):
    """Echo.stream with ctrl-c behind so many pieces."""
    whole = Echo.stream

    def stream(self, prompt, **options):
        for i, piece in enumerate(whole(self, prompt, **options)):
            if i == after:
                raise KeyboardInterrupt
            yield piece

    return stream


@pytest.mark.parametrize(("after", "argv", "said"), [(3, [], "HEL\n"), (0, [], ""), (3, ["--json"], "")])
def test_an_interrupted_line_is_ended(after, argv, said, model, loaded, capsys, monkeypatch):
    monkeypatch.setattr(Echo, "stream", interrupted(after))
    assert run_generate(model, "-q", "-p", "hello", *argv) == 130
    assert capsys.readouterr() == (said, "error: interrupted\n")


def test_flags_reach_the_model(model, loaded, capsys):
    argv = "-p a -m 7 --temp 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 9 --stop x --stop yz".split()
    argv += "--mesh tensor=2 --dtype float32 --index-dtype bfloat16 --max-context 32 --prefill-chunk 16".split()
    argv += ["--index-freq", "2"]
    assert run_generate(model, *argv) == 0
    (lm,) = loaded
    assert str(lm.kwargs.pop("pattern")) == "FFSFSFSF"
    dtypes = dict(dtype="float32", index_dtype="bfloat16")
    assert lm.kwargs == dtypes | dict(mesh="tensor=2", implementation="auto", max_context=32, prefill_chunk=16)
    (call,) = lm.calls
    assert (call.prompt, call.max_tokens) == ("a", 7)
    p = call.sampling
    assert (p.temperature, p.top_p, p.top_k, p.min_p, p.seed, p.stop) == (0.5, 0.9, 4, 0.1, 9, ("x", "yz"))
    assert "2 x cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["--index-pattern", "uniform:4"], "FSSSFSSS"),
        (["--index-pattern", "FSFSFSFF"], "FSFSFSFF"),
        (["--index-freq", "4", "--index-offset", "3"], "FFFSSSFS"),
        (["--dense"], "dense"),
    ],
)
def test_pattern_flags(argv, pattern, model, loaded, capsys):
    assert run_generate(model, "-p", "a", "--json", *argv) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["pattern"] == pattern
    if pattern == "dense":
        assert "dense attention, no indexer" in err and "dense_mla=reference" in err
    else:
        assert pattern in err


def test_prompt_from_file_and_stdin(model, loaded, capsys, tmp_path, stdin):
    path = tmp_path / "prompt.txt"
    path.write_bytes("é\\n\r\n".encode())
    assert run_generate(model, "-q", "--file", str(path)) == 0
    for argv in (["-p", "-"], ["--file", "-"]):
        stdin(b"from stdin\n")
        assert run_generate(model, "-q", *argv) == 0
    assert [lm.calls[0].prompt for lm in loaded] == ["é\\n\r\n", "from stdin\n", "from stdin\n"]


def test_chat_template(model, loaded, capsys):
    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert run_generate(model, "-q", "-p", "hi") == 0
    assert run_generate(model, "-q", "-p", "hi", "--system-prompt", "be brief") == 0
    assert run_generate(model, "-q", "-p", "hi", "--no-chat-template") == 0
    prompts = [lm.calls[0].prompt for lm in loaded]
    assert prompts == ["<user>hi<assistant>", "<system>be brief<user>hi<assistant>", "hi"]
    capsys.readouterr()
    argv = ["-p", "hi", "--no-chat-template", "--system-prompt", "x"]
    assert "--no-chat-template is given" in error(capsys, run_generate(model, *argv))


# chat


def test_conversation(model, loaded, capsys, stdin):
    (model / "chat_template.jinja").write_text(TEMPLATE)
    stdin(b"one\n\n/help\ntwo\ntoo long\n/reset\nthree\n/exit\nnever\n")
    assert chat.main(["--model", str(model), "-m", "60", "--system-prompt", "s"]) == 2  # one was too long
    (lm,) = loaded
    first = "<system>s<user>one"
    assert [c.prompt for c in lm.calls] == [
        first + "<assistant>",
        first + "<assistant>" + (first + "<assistant>").upper() + "<user>two<assistant>",
        "<system>s<user>three<assistant>",
    ]
    out, err = capsys.readouterr()
    assert out.startswith((first + "<assistant>\n").upper()) and "never" not in out
    assert "the context holds 64 (/reset begins anew)" in err and "forgotten" in err and "/exit or ctrl-d" in err


def test_chat_keeps_what_an_interrupted_answer_said(model, loaded, capsys, stdin, monkeypatch):
    (model / "chat_template.jinja").write_text(TEMPLATE)
    stdin(b"one\ntwo\n")
    monkeypatch.setattr(Echo, "stream", interrupted())
    assert chat.main(["--model", str(model)]) == 0
    first, second = (c.prompt for c in loaded[0].calls)
    assert first == "<user>one<assistant>" and second == first + "<US<user>two<assistant>"
    assert "(stopped)" in capsys.readouterr().err


def test_chat_names_what_is_no_utf8(model, loaded, capsys, stdin):
    (model / "chat_template.jinja").write_text(TEMPLATE)
    stdin("é\xff\none\n".encode("latin-1"))
    assert chat.main(["--model", str(model), "-q"]) == 2
    assert capsys.readouterr() == (
        "<USER>ONE<ASSISTANT>\n", "error: the message is not UTF-8 text: byte 0xe9 at offset 0\n"
    )  # fmt: skip
    stdin(b"\xc3\xa9\xff\n")
    assert chat.main(["--model", str(model), "-q"]) == 2
    assert "byte 0xff at offset 2" in capsys.readouterr().err
    stdin("é\n".encode())
    assert chat.main(["--model", str(model), "-q"]) == 0 and loaded[-1].calls[0].prompt == "<user>é<assistant>"


def test_chat_needs_a_template(model, loaded, capsys):
    assert "tiny has no chat template" in error(capsys, chat.main(["--model", str(model)]))
    assert not loaded


# Tables, JSON, progress


def test_table_is_aligned_markdown():
    text = cli.table(("model", "t/s", "note"), [("demo", 86.0, "a|b"), ("glm", "7.25 ± 0.1", "two\nlines")])
    assert text.splitlines() == [
        "| model |        t/s | note      |",
        "|-------|-----------:|-----------|",
        "| demo  |         86 | a\\|b      |",
        "| glm   | 7.25 ± 0.1 | two lines |",
    ]
    assert cli.table(("a",), []) == "| a   |\n|-----|"
    with pytest.raises(ValueError, match="cells"):
        cli.table(("a",), [(1, 2)])


def test_json_is_strict(capsys):
    cli.Console().json(dict(a=float("nan"), b=[float("inf"), 1.5], c="é"))
    assert json.loads(capsys.readouterr().out) == dict(a=None, b=[None, 1.5], c="é")


def test_progress_off_a_terminal_prints_notes_only(capsys):
    with cli.Console().progress("loading", bytes_=True) as report:
        report(1, 10)
        report(2, 10, "a note")
    with cli.Console(quiet=True).progress("loading") as report:
        report(2, 10, "unseen")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a note\n")


def test_progress_on_a_terminal_draws_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with cli.Console().progress("loading", bytes_=True) as report:
        report(5, 10, "a [note]")
    out, err = capsys.readouterr()
    assert not out and "a [note]" in err


def test_only_the_first_process_prints(capsys, monkeypatch):
    monkeypatch.setattr(cli, "is_first_process", lambda: False)
    console = cli.Console()
    console.status("a")
    console.write("b")
    console.json({})
    assert capsys.readouterr() == ("", "")


def test_peak_memory_is_a_plausible_number():
    assert 0.01 < cli.peak_memory_gb() < 1000
