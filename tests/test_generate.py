"""What a user types: every command on the demo model, the README's blocks, and the one-line errors."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from convert import __main__ as convert
from ic_jax import generate

ROOT = Path(__file__).parent.parent
PROMPT = "The function returns a list of the names of the files in the directory, and a list of the values. " * 4


def run(*argv, stdin=None, module="ic_jax.generate"):
    """The command in a process of its own, warnings as errors."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *argv], input=stdin, capture_output=True, text=True, env=env, cwd=ROOT
    )


def test_generate_streams_text_and_keeps_the_pipe_clean():
    done = run("-p", PROMPT, "-m", "8", "--no-chat-template")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"demo · 16 layers · IndexCache 16 full / 0 shared  F{16} · top-k 64", lines[0])
    assert re.fullmatch(r"1 x cpu · index_topk=reference sparse_mla=reference · compiled in [\d.]+ s", lines[1])
    assert lines[2] == lines[3] == "=========="
    assert re.fullmatch(r"Prompt: \d+ tokens, [\d.]+ tokens-per-sec", lines[4])
    assert re.fullmatch(r"Generation: \d tokens, [\d.]+ tokens-per-sec", lines[5])
    assert re.fullmatch(r"Peak memory: [\d.]+ GB", lines[6])
    assert done.stdout.strip() and "tokens-per-sec" not in done.stdout


def test_json_from_stdin_with_a_pattern(tmp_path):
    done = run("-p", "-", "-m", "5", "--json", "-q", "--index-freq", "4", "--index-offset", "3", stdin=PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = json.loads(done.stdout.splitlines()[-1])
    assert set(out) == {
        "text", "tokens", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps", "finish_reason", "pattern",
        "peak_memory_gb",
    }  # fmt: skip
    assert out["pattern"] == "FFFSSSFSSSFSSSFS" and out["prompt_tokens"] > 64
    assert len(out["tokens"]) == out["generation_tokens"] <= 5 and out["finish_reason"] in ("length", "stop")


ERRORS = [
    (["-p", ""], "the prompt is empty"),
    (["-p", "x", "--index-pattern", "F" * 15], "--index-pattern has 15 characters, the model has 16 layers"),
    (["-p", "x", "--index-pattern", "S" * 16], "layer 0 is S, but there is no earlier F layer to reuse"),
    (["-p", "x", "--index-pattern", "FX"], "only F and S"),
    (["-p", "x", "--index-freq", "0"], "must be an integer >= 1"),
    (["-p", "x", "--temp", "-1"], "temperature must be"),
    (["-p", "x", "--temp", "nan"], "temperature must be"),
    (["-p", "x", "--mesh", "tensor=3"], "mesh tensor=3 does not divide 4 attention heads; valid: 1,2,4"),
    (["-p", PROMPT, "--max-context", "10"], "tokens, the context holds 10"),
    (["-p", "x", "--model", "no/such/dir"], "no/such/dir"),
    (["-p", "x", "--file", "y"], "not allowed with"),
    (["--file", "/nonexistent.txt"], "/nonexistent.txt cannot be read"),
    (["-p", "x", "--dense", "--index-pattern", "all-full"], "not allowed with"),
    (["-p", "x", "--implementation", "gpu"], "implementation=gpu: needs a GPU"),
    ([], "there is no prompt"),
]


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "")
def test_errors_are_one_line_and_exit_2(argv, message, capsys):
    assert generate.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def blocks(name):
    text = (ROOT / "README.md").read_text()
    return re.search(rf"<!-- {name} -->\n```bash\n(.*?)```", text, re.S).group(1).strip().splitlines()


@pytest.fixture
def no_pattern_file():
    written = [ROOT / "pattern.json", ROOT / "pattern.jsonl"]
    for path in written:
        path.unlink(missing_ok=True)
    yield
    for path in written:
        path.unlink(missing_ok=True)


def test_readme_commands_run(no_pattern_file):
    for line in blocks("demo"):
        program, *argv = shlex.split(line, comments=True)
        module = {"python": None, "ic-jax": "ic_jax"}[program]
        if module is None:
            assert argv.pop(0) == "-m"
            module = argv.pop(0)
        done = run(*argv, module=module)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout


def test_readme_library_block_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert '"path-or-repo"' in code
    names = {}
    exec(code.replace('"path-or-repo"', "None"), names)
    assert capsys.readouterr().out and names["logits_TW"].dtype == "float32" and names["logits_TW"].shape[1] == 4096


def test_readme_commands_that_need_other_weights_are_written_right():
    """They are parsed, not run."""
    (block,) = re.findall(r"(?<!-->)\n\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    for first, second, *argv in filter(None, lines):
        if first == "ic-jax":
            importlib.import_module(f"ic_jax.{second}")._parser().parse_args(argv)
        elif second == "-m":
            {"ic_jax.generate": generate, "convert": convert}[argv[0]]._parser().parse_args(argv[1:])
        else:
            assert first == "python" and (ROOT / second).is_file()


def test_readme_setup_blocks_name_the_tested_commands():
    assert blocks("run")[1].startswith(".venv/bin/python -m ic_jax.generate -p")
    assert blocks("test")[1] == ".venv/bin/python -m pytest -q -n auto --dist loadfile"


def test_readme_tree_names_every_file():
    tree = (ROOT / "README.md").read_text()
    for folder in ("ic_jax", "pallas_kernels", "convert", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            kind = re.sub("_.*", "_<op>.py", path.stem)  # kernels_<op>.py stands for several
            assert path.name in tree or kind in tree, path
