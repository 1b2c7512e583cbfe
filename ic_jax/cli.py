"""What every command shares: flags, one-line errors, status on stderr, tables, JSON, progress and peak memory.

A command module has ``main(argv=None) -> int`` that calls ``run`` with its parser and its body. JAX is imported only
when a command does its work, so ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from . import interrupts
from .errors import UserError

RULE = "=" * 10


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors and whose flags are never guessed from a prefix."""

    def __init__(self, command: str, description: str, **kwargs):
        super().__init__(prog=f"ic-jax {command}".strip(), description=description, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file)  # argparse would hide that stdout cannot be written


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """``--debug`` and ``-q``."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("-q", "--quiet", action="store_true", help="print the result only: no status, no statistics")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that ``load`` reads, and the common ones."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="DIR_OR_REPO", help="directory or Hugging Face repository (the embedded demo model)"
    )
    pattern = group.add_mutually_exclusive_group()
    pattern.add_argument("--index-pattern", metavar="P", help="F or S a layer, uniform:N, all-full, or a file of search")
    pattern.add_argument("--index-freq", type=positive, metavar="N", help="F every N layers, the Hugging Face rule")
    pattern.add_argument("--dense", action="store_true", help="attend to every token and run no indexer")
    group.add_argument("--index-offset", type=int, metavar="M", help="where --index-freq begins to count (2)")
    group.add_argument("--mesh", metavar="AXES", help="devices along named axes, for instance data=1,tensor=8")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 of a run of several processes, or auto")
    group.add_argument("--num-processes", type=positive, metavar="N", help="how many processes the run has")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--implementation", default="auto", choices=("auto", "reference", "gpu", "tpu"), help="kernels (auto)"
    )
    group.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of weights and latents (bfloat16)"
    )
    group.add_argument(
        "--index-dtype", choices=("bfloat16", "float32", "float8_e4m3fn"), help="of index keys (as --dtype)"
    )
    group.add_argument("--max-context", type=positive, metavar="N", help="tokens a sequence may reach (the model's)")
    group.add_argument("--prefill-chunk", type=positive, metavar="N", help="prompt tokens of one step (by device)")
    add_common_flags(parser)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that ``sampling`` reads, and ``-m``."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-m", "--max-tokens", type=positive, default=256, metavar="N", help="tokens to generate at most (256)"
    )
    group.add_argument(
        "--temp", type=float, default=0.0, metavar="T", help="temperature; 0 takes the likeliest token (0)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens of this probability (1)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep this many tokens; 0 keeps all (0)")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="keep tokens at least P as likely as the first (0)"
    )
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same tokens (0)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="STR", help="end before this text; may be repeated"
    )


def positive(text: str) -> int:
    """An integer >= 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, not {text!r}")
    return value


def natural(text: str) -> int:
    """An integer >= 0, for argparse."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, not {text!r}")
    return int(text)


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return value


def check_writable(folder: Path) -> None:
    """UserError when no file can be made in ``folder``."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror or e}") from None


def sampling(args: argparse.Namespace):
    """SamplingParams of the sampling flags; UserError for values without sense."""
    from .sampling import SamplingParams

    fields = dict(temperature=args.temp, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p, seed=args.seed)
    return SamplingParams(**fields, stop=tuple(args.stop))


def model_directory(args: argparse.Namespace) -> Path:
    """Where the files of ``--model`` lie; a repository is fetched."""
    if args.model is None:
        from .config import DEMO_DIRECTORY

        return DEMO_DIRECTORY
    if not args.model:
        raise UserError("--model is empty; give a directory or a repository, or leave it out for the demo model")
    from . import checkpoint

    return checkpoint.find(args.model, weights=False)


def pattern(args: argparse.Namespace, n_layers: int):
    """What the pattern flags ask for: a Pattern, text for ``pattern.parse``, or None for the checkpoint's own."""
    if args.index_offset is not None and args.index_freq is None:
        raise UserError("--index-offset says where --index-freq begins to count; give --index-freq too")
    if args.index_freq is None:
        return args.index_pattern
    from .pattern import Pattern

    return Pattern.from_freq(n_layers, args.index_freq, 2 if args.index_offset is None else args.index_offset)


def start(args: argparse.Namespace) -> None:
    """Join the other processes of a run, if the flags name any; before JAX looks for devices."""
    if _several_processes():
        return
    from . import sharding

    if args.coordinator or args.num_processes:
        _keep_stdout()
    sharding.start(args.coordinator, args.num_processes, args.process_id)
    own = ("process_id", "model", "prompt", "file", "debug", "quiet")  # what may differ between processes
    sharding.check_alike({f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in own})


def _keep_stdout() -> None:
    """Leave stdout to Python: what libraries below JAX print there (Gloo says whom it met) goes to stderr."""
    try:
        if sys.stdout.fileno() != 1:
            return
    except (OSError, ValueError):  # a stand-in without a descriptor
        return
    sys.stdout.flush()
    how = dict(encoding=sys.stdout.encoding, errors=sys.stdout.errors, newline="")
    sys.stdout = open(os.dup(1), "w", buffering=1 if sys.stdout.line_buffering else -1, **how)
    os.dup2(2, 1)


def load(args: argparse.Namespace, console: Console):
    """The LM that the model flags ask for, with progress on a terminal. Raises UserError before any weight is read."""
    import ic_jax

    from .config import Config

    start(args)
    chosen = pattern(args, Config.load(model_directory(args)).num_hidden_layers)
    with console.progress("loading", bytes_=True) as progress:
        return ic_jax.load(
            args.model, pattern=chosen, mesh=args.mesh, dtype=args.dtype,
            index_dtype=args.index_dtype, implementation=args.implementation, max_context=args.max_context,
            prefill_chunk=args.prefill_chunk, dense=args.dense, progress=progress,
        )  # fmt: skip


def take_gpu() -> None:
    """Let JAX, not started yet, have 95 % of a GPU's memory, unless the environment says otherwise.

    Its default of 75 % does not hold a 30B model and its caches on 80 GB.
    """
    if not any(os.environ.get(f"XLA_{name}MEM_FRACTION") for name in ("CLIENT_", "PYTHON_CLIENT_")):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = ".95"


def run(body: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv=None) -> int:
    """The exit status of a command: parse ``argv``, call ``body(args)``, and print a failure as one line on stderr.

    0 done, 2 a mistake of the user or something this machine cannot do, 130 interrupted, 141 the reader of stdout left.
    ``--debug`` prints the traceback as well. Other exceptions are defects and pass through.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    take_gpu()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller: nothing to read, nowhere to write
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    # Text of a model may hold characters that the terminal's encoding lacks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = 0
        with interrupts.kept():
            try:
                body(parser.parse_args(argv))
            except SystemExit as e:  # of --help
                status = e.code or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _drop_output()
        return 141
    except (Exception, KeyboardInterrupt) as e:
        found = _explain(e)
        if found is None:
            raise
        message, status = found
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        if _several_processes():
            os._exit(status)  # a regular exit would wait for the others, who may be waiting for this one
        return status


def _drop_output() -> None:
    """Send what stdout still buffers nowhere, or the interpreter complains about it at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(e: BaseException) -> tuple[str, int] | None:
    """(message, exit status) of an exception that is no defect of the program."""
    if isinstance(e, KeyboardInterrupt):
        return str(e) or "interrupted", 130
    if isinstance(e, UserError | NotImplementedError):
        return str(e) or "this is not implemented", 2
    if isinstance(e, OSError):
        return (f"{e.filename}: {e.strerror}" if e.filename else str(e)), 2
    if _several_processes() and type(e).__name__ == "JaxRuntimeError":
        reason = (str(e).strip().splitlines() or ["no reason given"])[0][:200]
        return f"an exchange with the other processes failed, most likely because one of them ended ({reason})", 2
    if (why := _no_platform()) is not None:
        return f"JAX cannot start here what {why}; unset it, or install what it needs", 2
    if "RESOURCE_EXHAUSTED" in str(e) or isinstance(e, MemoryError):
        return "out of memory; try a smaller --max-context or --prefill-chunk, or --mesh over more devices", 2
    return None


def _no_platform() -> str | None:
    """The platforms that JAX was told to use and why it cannot; None when it can, or was not told."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.config.jax_platforms:
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:  # the latter for a known platform without its plug-in
        reason = (str(e).strip().splitlines() or ["it is not installed"])[0].partition(" (set JAX_PLATFORMS=")[0]
        return f"JAX_PLATFORMS={jax.config.jax_platforms} asks for: {reason[:200].rstrip('.')}"
    return None


class Console:
    """Where a command writes: results to stdout, everything else to stderr, in process 0 only."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet

    def status(self, line: str = "") -> None:
        """A line of status or statistics on stderr; nothing when quiet."""
        if not self.quiet and is_first_process():
            print(line, file=sys.stderr, flush=True)

    def complain(self, message: str) -> None:
        """An ``error:`` line on stderr from which the command goes on; printed even when quiet."""
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        """Text to stdout as it is, at once."""
        if text and is_first_process():
            sys.stdout.write(text)
            sys.stdout.flush()

    def json(self, value) -> None:
        """One line of JSON on stdout; numbers that JSON lacks (NaN, infinity) become null."""
        self.write(json.dumps(_finite(value), allow_nan=False) + "\n")

    def table(self, header: Sequence[str], rows: Iterable[Sequence]) -> None:
        """A markdown table on stdout."""
        self.write(table(header, rows) + "\n")

    @contextlib.contextmanager
    def progress(self, title: str, bytes_: bool = False) -> Iterator[Callable[[int, int, str], None]]:
        """A callable ``report(done, total, note="")`` that draws a bar on a terminal; notes are lines."""
        if self.quiet or not is_first_process() or not sys.stderr.isatty():
            yield lambda done, total, note="": self.status(note) if note else None
            return
        from rich import console, progress

        amount = progress.DownloadColumn() if bytes_ else progress.MofNCompleteColumn()
        text = progress.TextColumn("{task.description}", markup=False)
        columns = (text, progress.BarColumn(), amount, progress.TimeRemainingColumn())
        screen = console.Console(stderr=True)
        with progress.Progress(*columns, console=screen, transient=True) as bar:
            task = bar.add_task(title, total=None)

            def report(done: int, total: int, note: str = "") -> None:
                bar.update(task, completed=done, total=total)
                if note:
                    bar.console.print(note, markup=False, highlight=False)

            yield report


def is_first_process() -> bool:
    """Whether this is process 0 of a distributed run (or the only one); does not start JAX."""
    return not _several_processes() or sys.modules["jax"].process_index() == 0


def _several_processes() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A markdown table with aligned columns; a column of numbers is right-aligned."""
    rows = [[_cell(v) for v in row] for row in rows]
    header = [_cell(v) for v in header]
    if any(len(row) != len(header) for row in rows):
        raise ValueError("every row needs as many cells as the header")
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(cells):
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _cell(value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _is_number(text: str) -> bool:
    # "86.02 ± 0.31" and "9.1 %" count; an empty cell or a dash is a missing number.
    first = text.split(" ")[0]
    try:
        float(first)
    except ValueError:
        return text in ("", "-", "–")
    return True


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def peak_memory_gb() -> float:
    """The most memory used so far, in GB (1e9 bytes): of the fullest local device, or of this process on a CPU."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
        return max(peaks) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
