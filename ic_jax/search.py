"""``ic-jax search --text FILE --keep 0.25``: which layers can share their selection, without training.

Writes a pattern file that every command's ``--index-pattern`` takes, and beside it a log of every evaluation, from
which ``--resume`` continues after a kill. As a library: ``search(lm, tokens, keep=0.25).pattern``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert import store

from . import cli, pattern_file
from . import search_methods as methods
from .errors import UserError
from .pattern import Pattern
from .pattern_file import read as read_pattern_file

__all__ = ["METHODS", "Result", "overrides", "read_pattern_file", "search"]
METHODS = ("greedy", "uniform", "similarity")
SAMPLES = 16
TOGETHER_TOKENS = 65536  # tokens of the candidates that run as one batch on an accelerator


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found; losses are nats a token on the calibration text.

    start: the pattern it began with, every layer that has an indexer. history: one dict a step of a greedy search, with
    step, layer (the one flipped), pattern, loss, and candidates {layer: loss}. calibration: what it was measured on.
    """

    pattern: Pattern
    loss: float
    start: Pattern
    start_loss: float
    history: list[dict]
    calibration: dict
    method: str
    seconds: float

    @property
    def increase(self) -> float:
        """Loss of the pattern less that of the start."""
        return self.loss - self.start_loss

    def within(self, max_increase: float) -> Pattern | None:
        """Of start, steps and result, the pattern with the fewest full layers that costs at most this much more."""
        points = [(0.0, self.start), *((s["loss"] - self.start_loss, Pattern(s["pattern"])) for s in self.history)]
        points.append((self.increase, self.pattern))
        return min((p for cost, p in points if cost <= max_increase), key=lambda p: p.n_full, default=None)

    def to_json(self) -> dict:
        """Everything as JSON values."""
        return dataclasses.asdict(self) | dict(
            pattern=str(self.pattern), start=str(self.start), full=self.pattern.n_full, loss_increase=self.increase
        )


def search(
    lm,
    text,
    *,
    keep: float | int = 0.25,
    method: str = "greedy",
    blocks: int = 1,
    seq_len: int | None = None,
    samples: int = SAMPLES,
    batch: int | None = None,
    together: int | None = None,
    log: str | Path | None = None,
    resume: bool = False,
    report: Callable[[int, int, str], None] | None = None,
) -> Result:
    """The Result of choosing which of ``lm``'s full layers stay full, with the losses that say what it costs.

    Args:
      text: a text, token ids, or an array of windows int32 [N, seq_len + 1].
      keep: a share of all layers, rounded up, or an integer count. method: one of METHODS.
      blocks: pipeline blocks; each commits its best flip in turn, about this many times fewer forwards.
      seq_len: tokens of a sequence, by default as given windows have, else eight times top-k. samples: sequences at most.
      batch: of one mini-batch.
      together: candidates that run as one batch where they share layers; by device when None.
      log: file of every evaluation; ``resume`` continues from it. report: called with (done, all, note) of evaluations.

    Raises UserError for senseless arguments, a text that is too short, a model without indexer, and a loss that is not
    a number; evaluations that were finished are in the log by then.
    """
    if lm.pattern is None:
        raise UserError(f"{lm.name} runs no indexer, so there is nothing to share")
    start, began = lm.pattern, time.perf_counter()
    keep = check(start, keep, method, blocks)
    if together is not None and together < 1:
        raise UserError(f"--together must be at least 1, not {together}")

    from . import calibration, sharding
    from .search_evaluate import Evaluator, Log, read_header

    if seq_len is None and getattr(text, "ndim", 1) == 2:
        seq_len = text.shape[1] - 1
    seq_len = calibration.check_seq_len(lm.config, seq_len, lm.max_context)
    ids_NT = calibration.text_windows(lm, text, seq_len, samples)
    log = None if log is None else Path(log)
    batch = calibration.batch_size(seq_len, len(ids_NT), batch)
    if together is None:
        earlier = sharding.from_each((resume and read_header(log)) or {})[0]
        together = earlier.get("together") or _together(lm, batch * seq_len)
    about = dict(sha256=calibration.fingerprint(ids_NT), sequences=len(ids_NT), seq_len=seq_len)
    header = about | dict(
        model=lm.name,
        weights=_weights_hash(lm),
        start=str(start),
        batch=batch,
        together=together,
        dtype=str(lm.engine.dtype),
        index_dtype=lm.engine.index_dtype,
        implementation=lm.engine.options["implementation"],
    )
    report = report or (lambda done, total, note: None)
    total = methods.n_evaluations(start, keep, blocks) if method == "greedy" else 0
    with Log(header, log, resume) as book:
        evaluator = Evaluator(
            lm.engine, start.full_layers, ids_NT, batch=batch, together=together, log=book, report=report, total=total
        )
        start_loss = evaluator.loss(start)
        history, pattern, timer = [], start, time.perf_counter()
        if method == "greedy":
            for step in methods.greedy(evaluator.candidates, start, keep, blocks):
                history.append(step)
                pattern = Pattern(step["pattern"])
                left = (time.perf_counter() - timer) / evaluator.done * (evaluator.total - evaluator.done)
                note = (
                    f"step {step['step']}/{start.n_full - keep}: layer {step['layer']} shared, "
                    f"loss {step['loss']:.4f} ({step['loss'] - start_loss:+.4f}), {_clock(left)} left"
                )
                report(evaluator.done, evaluator.total, note)
        elif method == "uniform":
            pattern = methods.uniform(len(start.layers), keep)
        else:
            pattern = methods.similarity(evaluator.similarities(start), keep, start.full_layers)
        loss = history[-1]["loss"] if history else evaluator.loss(pattern)
    return Result(pattern, loss, start, start_loss, history, about, method, time.perf_counter() - began)


def check(start: Pattern, keep: float | int, method: str, blocks: int) -> int:
    """How many layers stay full; UserError for what no search that begins at ``start`` can reach."""
    n = len(start.layers)
    keep = methods.kept_layers(keep, n)
    if method not in METHODS:
        raise UserError(f"--method must be one of {', '.join(METHODS)}, not {method!r}")
    if blocks != 1 and method != "greedy":
        raise UserError(f"--blocks divides the greedy search; the {method} method has no steps")
    if keep > start.n_full:
        raise UserError(f"{keep} layers cannot stay full: only {start.n_full} of {n} have indexers")
    methods.rounds(start, keep, blocks)
    if method == "uniform":
        methods.uniform(n, keep).slots(start.full_layers)
    return keep


def overrides(pattern: Pattern) -> dict[str, str]:
    """What makes other engines use a pattern, ready to paste."""
    value = json.dumps({"index_topk_pattern": str(pattern)})
    for_vllm = json.dumps({"use_index_cache": True, "index_topk_pattern": str(pattern)})
    # transformers resolves index_topk_pattern before keyword arguments arrive, so it is given the resolved list.
    types = f'["full" if c == "F" else "shared" for c in "{pattern}"]'
    return {
        "vLLM": f"vllm serve MODEL --hf-overrides '{for_vllm}'",
        "SGLang": f"python -m sglang.launch_server --model-path MODEL --json-model-override-args '{value}'",
        "transformers": f"AutoModelForCausalLM.from_pretrained(MODEL, indexer_types={types})",
        "config.json": f"{value[1:-1]}   (and remove indexer_types, index_topk_freq, index_skip_topk_offset)",
    }


def _together(lm, batch_tokens: int) -> int:
    """Candidates in one batch: what memory and TOGETHER_TOKENS allow; one on a CPU, whose cores one already fills."""
    import jax

    from . import engine

    if jax.default_backend() == "cpu":
        return 1
    c = lm.config
    # The widest arrays of a layer, for each token; half the free memory is left to everything else.
    wide = 4 * c.hidden_size + 3 * c.num_attention_heads * c.latent_dim
    wide += 3 * c.num_experts_per_tok * c.moe_intermediate_size
    per_token = wide * lm.engine.dtype.itemsize + 16 * c.index_topk
    free = engine._free_bytes()
    fits = TOGETHER_TOKENS if free is None else min(TOGETHER_TOKENS, free // 2 // per_token)
    return max(1, min(8, int(fits // batch_tokens)))


def _weights_hash(lm) -> str:
    """Tells apart checkpoints of one name: a hash of the configuration and of a few weights."""
    digest = hashlib.sha256(repr(lm.config).encode())
    for weights in (lm.engine.params["norm"], lm.engine.params["indexer"]["k_norm_weight"]):
        if weights.is_fully_addressable:
            digest.update(np.asarray(weights).tobytes())
    return digest.hexdigest()[:16]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _keep(text: str) -> float | int:
    with contextlib.suppress(ValueError):
        return int(text)
    return cli.finite(text)


def _body(args) -> None:
    console = cli.Console(args.quiet)
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: {'it is a directory' if out.is_dir() else f'{out.parent} does not exist'}")
    if out.suffix != ".json":
        raise UserError(f"--out {out}: give a name that ends in .json, or --index-pattern would not take it for a file")
    cli.check_writable(out.parent)
    log = out.with_suffix(".jsonl")
    if log.exists() and not args.resume:
        with store.claimed(log):  # else it is that of a running one
            raise UserError(f"{log} is the log of an earlier search; continue it with --resume, or delete it")
    if args.dense:
        raise UserError("--dense runs no indexer, so there is nothing to search")
    lm, ids_NT = _prepare(args, console)
    with console.progress("searching") as report:
        result = search(
            lm, ids_NT, keep=args.keep, method=args.method, blocks=args.blocks, seq_len=ids_NT.shape[1] - 1,
            samples=args.samples, batch=args.batch, together=args.together, log=log, resume=args.resume, report=report,
        )  # fmt: skip
    gate = args.max_loss_increase
    within = None if gate is None else result.within(gate)
    ok = gate is None or result.increase <= gate
    about = result.to_json() | dict(max_loss_increase=gate, within_gate=None if within is None else str(within))
    about["calibration"]["text"] = Path(args.text).name if args.text else "demo"
    del about["pattern"]
    if cli.is_first_process():
        pattern_file.write(out, result.pattern, lm.config, lm.name, **about)
    if args.json:
        console.json(about | dict(pattern=str(result.pattern), file=str(out), overrides=overrides(result.pattern)))
    else:
        console.write(f"{result.pattern}\n")
        console.status(
            f"{result.pattern.summary()} · loss {result.loss:.4f}, with {result.start.n_full} full layers "
            f"{result.start_loss:.4f} ({result.increase:+.4f}) · {result.method} · {_clock(result.seconds)}"
        )
        console.status(f"written to {out}; use it with --index-pattern {out}, or elsewhere:")
        for engine, line in overrides(result.pattern).items():
            console.status(f"  {engine}: {line}")
    if not ok:
        least = f"the fewest full layers within it: {within.n_full}, {within}" if within else "nothing is within it"
        raise UserError(f"{result.pattern} costs {result.increase:+.4f} nats a token, more than {gate:g}; {least}")


def _prepare(args, console):
    """(LM with every indexer its checkpoint holds, unless a pattern flag says which; windows of the text)."""
    from . import calibration, checkpoint
    from .config import Config

    directory = cli.model_directory(args)
    config = Config.load(directory)
    n = config.num_hidden_layers
    if not config.has_indexer:
        raise UserError(f"{config.model_type} at {directory} has no indexer, so there is nothing to share")
    if args.index_pattern is None and args.index_freq is None:
        held = checkpoint.indexer_layers(directory, config)
        args.index_pattern = "".join("F" if i in held else "S" for i in range(n))
    elif args.index_pattern:
        name = pattern_file.model_name(args.model)
        args.index_pattern = str(pattern_file.parse(args.index_pattern, config, name))
    start = cli.pattern(args, n)
    check(start if isinstance(start, Pattern) else Pattern(start), args.keep, args.method, args.blocks)
    ids_NT = calibration.command_windows(args, directory, config)
    return cli.load(args, console), ids_NT


def _parser():
    parser = cli.Parser("search", "Find the layers that can share their selection, without training.")
    group = parser.add_argument_group("search")
    group.add_argument("--text", metavar="FILE", help="UTF-8 text to measure on (the demo model brings a little)")
    group.add_argument(
        "--keep",
        type=_keep,
        default=0.25,
        metavar="SHARE",
        help="layers that stay full: a share such as 0.25, or a count such as 12 (0.25)",
    )
    group.add_argument("--method", choices=METHODS, default="greedy", help="how they are chosen (greedy)")
    group.add_argument(
        "--blocks",
        type=cli.positive,
        default=1,
        metavar="P",
        help="blocks that each flip a layer in turn; about P times faster, but the first layer of each stays full (1)",
    )
    group.add_argument("--seq-len", type=cli.positive, metavar="N", help="tokens of a sequence (8 times top-k)")
    group.add_argument(
        "--samples", type=cli.positive, default=SAMPLES, metavar="N", help=f"sequences at most ({SAMPLES})"
    )
    group.add_argument("--batch", type=cli.positive, metavar="N", help="sequences of one mini-batch (by length)")
    group.add_argument("--together", type=cli.positive, metavar="N", help="candidates in one batch (by device)")
    group.add_argument(
        "--out", default="pattern.json", metavar="FILE", help="the result; the log stands beside it (pattern.json)"
    )
    group.add_argument("--resume", action="store_true", help="continue from the log beside --out")
    group.add_argument(
        "--max-loss-increase", type=cli.finite, metavar="X", help="fail when the pattern costs more nats a token than this"
    )
    group.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    cli.add_model_flags(parser)
    return parser


def main(argv=None) -> int:
    """Exit status of ``ic-jax search``."""
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
