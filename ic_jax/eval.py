"""``ic-jax eval perplexity | needle | overlap | audit | harness``: quality, against every layer selecting for itself.

``--patterns a,b,c`` puts several patterns (letters, uniform:4, all-full, dense, a pattern file) in one table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import cli, pattern_file
from .errors import UserError
from .pattern import Pattern

COMMANDS = {
    "perplexity": "of a text; with several patterns, one table",
    "needle": "recall of hidden facts by length and depth",
    "overlap": "of the layers' selections, as CSV and heat map",
    "audit": "of a checkpoint: pattern, indexer weights, selections, FP8 index keys",
    "harness": "tasks of lm-eval (pip install lm-eval)",
}


class Session:
    """A model loaded with every indexer it holds, and the patterns the flags ask for: {name: Pattern or "dense"}."""

    def __init__(self, args, console: cli.Console, need_indexer: bool = False):
        from . import calibration, checkpoint
        from .config import Config

        directory = cli.model_directory(args)
        config = Config.load(directory)
        n = config.num_hidden_layers
        if not config.has_indexer and need_indexer:
            raise UserError(f"{config.model_type} at {directory} has no indexer, so it selects nothing")
        if args.dense and need_indexer:
            raise UserError("--dense runs no indexer, so nothing is selected")
        asked = None if args.dense or not config.has_indexer else cli.pattern(args, n)
        held, name = checkpoint.indexer_layers(directory, config), pattern_file.model_name(args.model)
        read = lambda text: "dense" if text == "dense" else pattern_file.parse(text, config, name)
        patterns = getattr(args, "patterns", None)
        names = [p.strip() for p in (patterns or "").split(",") if p.strip()]
        if patterns is not None and not names:
            raise UserError("--patterns names no pattern; give some, all-full,uniform:4 for instance, or leave it out")
        if names and (args.dense or asked is not None):
            raise UserError("give --patterns or one pattern flag, not both; dense may stand in --patterns")
        if args.dense or not config.has_indexer:
            self.patterns = {"dense": "dense"}
        elif names:
            self.patterns = {text: read(text) for text in names}
        elif asked is None:
            self.patterns = {"as shipped": config.pattern}
        else:
            self.patterns = {str(asked): asked if isinstance(asked, Pattern) else read(asked)}
        if not config.has_indexer and any(p != "dense" for p in map(read, names)):
            raise UserError(f"{config.model_type} at {directory} has no indexer; only the pattern dense makes sense")
        for pattern in self.patterns.values():
            if pattern != "dense":
                pattern.slots(held)
        if hasattr(args, "seq_len"):
            self.ids_NT = calibration.command_windows(args, directory, config)
            self.seq_len = self.ids_NT.shape[1] - 1
        # Loaded as data for every pattern: all indexers there are.
        args.index_freq = args.index_offset = None
        args.dense = not config.has_indexer
        args.index_pattern = "".join("F" if i in held else "S" for i in range(n)) if config.has_indexer else None
        self.lm = cli.load(args, console)
        full = "dense" if self.lm.pattern is None else f"{self.lm.pattern.n_full} full"
        self.reference = "all-full" if full == f"{n} full" else full

    def head(self) -> dict:
        """What every JSON result begins with."""
        return dict(model=self.lm.name, layers=self.lm.config.num_hidden_layers, reference=self.reference)


def _perplexity(args) -> None:
    from . import eval_measures

    console = cli.Console(args.quiet)
    s = Session(args, console)
    with console.progress("perplexity") as report:
        found = eval_measures.perplexity(s.lm, s.ids_NT, s.patterns, batch=args.batch, report=report)
    if args.json:
        console.json(s.head() | dict(seq_len=s.seq_len, sequences=len(s.ids_NT), results=found))
        return
    if len(found) > 1:
        rows = [
            (
                r["name"],
                r["full"],
                f"{r['ppl']:.4f} ± {r['ppl_error']:.4f}",
                f"{r['dppl']:+.4f}",
                f"{r['dloss']:+.4f} ± {r['dloss_error']:.4f}",
                f"{r['kl']:.4f}",
                f"{r['same_top1']:.1%}".replace("%", " %"),
            )
            for r in found
        ]
        console.table(("pattern", "full", "ppl", "dPPL", "dloss", "mean KL", "same top-1"), rows)
        console.status(f"against {s.reference}; {found[0]['tokens']} tokens, errors are standard errors over tokens")
        return
    (r,) = found
    running = ",".join(f"[{i}]{v:.2f}" for i, v in enumerate(r["running"], 1))
    console.write(f"ppl: {running}   Final estimate: PPL = {r['ppl']:.4f} +/- {r['ppl_error']:.4f}\n")
    console.write(
        f"vs {s.reference}: dPPL {r['dppl']:+.4f} · mean KL {r['kl']:.4f} · same top-1 {100 * r['same_top1']:.1f} %\n"
    )


def _needle(args) -> None:
    from . import calibration, eval_measures

    console = cli.Console(args.quiet)
    filler = None if args.text is None else calibration.read_text(args.text, args.model)
    s = Session(args, console)
    k = s.lm.config.index_topk if s.lm.config.has_indexer else 1024
    lengths = args.lengths or [n for n in (2 * k, 4 * k, 8 * k) if n <= s.lm.max_context] or [s.lm.max_context]
    with console.progress("needle") as report:
        found = eval_measures.recall(
            s.lm,
            s.patterns,
            lengths=lengths,
            depths=args.depths,
            keys=args.keys,
            trials=args.trials,
            seed=args.seed,
            filler=filler,
            batch=args.batch,
            report=report,
        )
    if args.json:
        console.json(s.head() | dict(trials=args.trials, results=found))
        return
    cells = {(r["name"], r["keys"], r["length"], r["depth"]): r["recall"] for r in found}
    rows = [
        (name, n_keys, n, *(f"{cells[name, n_keys, n, d]:.2f}" for d in args.depths))
        for name in s.patterns
        for n_keys in args.keys
        for n in lengths
    ]
    console.table(("pattern", "keys", "length", *(f"depth {d:g}" for d in args.depths)), rows)


def _overlap(args) -> None:
    from . import eval_measures

    if args.plot:
        _pyplot()
    if args.index_pattern is not None or args.index_freq is not None:
        raise UserError("overlap compares all indexers the checkpoint holds; leave the pattern flags out")
    console, out = cli.Console(args.quiet), Path(args.out)
    if out.suffix == ".png" or out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: give a .csv file in a directory that exists")
    cli.check_writable(out.parent)
    s = Session(args, console, need_indexer=True)
    with console.progress("overlap") as report:
        layers, matrix = eval_measures.overlap(s.lm, s.ids_NT, batch=args.batch or 1, report=report)
    lines = [",".join(["layer", *map(str, layers)])]
    lines += [",".join([str(i), *(f"{v:.4f}" for v in row)]) for i, row in zip(layers, matrix, strict=True)]
    if cli.is_first_process():
        from convert.store import write_text

        write_text(out, "\n".join(lines) + "\n")
        if args.plot:
            heat_map(out.with_suffix(".png"), layers, matrix)
    adjacent = float(matrix.diagonal(1).mean()) if len(layers) > 1 else 1.0
    if args.json:
        console.json(s.head() | dict(full_layers=layers, overlap=matrix.tolist(), adjacent=adjacent, file=str(out)))
        return
    console.write("\n".join(lines) + "\n")
    drawn = f" and {out.with_suffix('.png')}" if args.plot else ""
    console.status(f"neighbouring layers share {100 * adjacent:.1f} % of their selections; written to {out}{drawn}")


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'ic-jax[plot]'; without it the CSV is written") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def heat_map(path: Path, layers, matrix) -> None:
    """A PNG of an overlap matrix."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="layer", ylabel="layer", title="Share of selected positions in common")
    step = max(1, len(layers) // 12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(0, len(layers), step), [str(i) for i in layers[::step]])
    figure.colorbar(image)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _audit(args) -> None:
    from . import eval_measures

    console = cli.Console(args.quiet)
    s = Session(args, console, need_indexer=True)
    ((name, pattern),) = s.patterns.items()
    with console.progress("audit") as report:
        found, problems = eval_measures.audit(s.lm, s.ids_NT, pattern, report)
    unused = [r["layer"] for r in found if r["weights"] and r["kind"] == "S"]
    if args.json:
        result = dict(name=name, pattern=str(pattern), unused_indexers=unused, problems=problems, per_layer=found)
        console.json(s.head() | result)
    else:
        show = lambda v: "–" if v is None else f"{100 * v:.1f} %"
        rows = [
            (
                r["layer"],
                r["kind"],
                r["source"],
                "yes" if r["weights"] else "no",
                r["selected"],
                show(r["overlap"]),
                show(r["fp8_recall"]),
            )
            for r in found
        ]
        console.table(("layer", "kind", "reads", "indexer", "selected", "overlap", "FP8 recall"), rows)
        console.status(
            f"{pattern.summary()} ({name}) · {len(s.ids_NT)} x {s.seq_len} tokens, top-k {s.lm.config.index_topk}; overlap "
            "of a full layer is with the selection before it, of a shared one with what its own indexer would choose"
        )
        if unused:
            console.status(f"indexer weights that this pattern does not use: layers {', '.join(map(str, unused))}")
    if problems:
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)}: " + "; ".join(problems))


def _harness(args) -> None:
    console = cli.Console(args.quiet)
    from . import lm_eval_adapter

    lm_eval_adapter.require()
    results = lm_eval_adapter.evaluate(cli.load(args, console), args.tasks.split(","), limit=args.limit)
    if args.json:
        console.json(results)
        return
    rows = [(t, m, v) for t, metrics in results.items() for m, v in metrics.items() if isinstance(v, float)]
    console.table(("task", "metric", "value"), rows)


def numbers(kind):
    """An argparse type: numbers of ``kind`` between commas."""

    def read(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"list of {kind.__name__}"
    return read


def _parser(command: str):
    parser = cli.Parser(f"eval {command}", f"Measure: {COMMANDS[command]}.")
    group = parser.add_argument_group("measurement")
    if command in ("perplexity", "needle"):
        group.add_argument(
            "--patterns", metavar="A,B,C", help="patterns to compare: letters, uniform:N, all-full, dense, FILE"
        )
    if command in ("perplexity", "overlap", "audit"):
        group.add_argument("--text", metavar="FILE", help="UTF-8 text (the demo model brings a little)")
        group.add_argument("--seq-len", type=cli.positive, metavar="N", help="tokens of a sequence (8 times top-k)")
        samples = dict(perplexity=None, overlap=4, audit=1)[command]
        group.add_argument(
            "--samples", type=cli.positive, default=samples, metavar="N", help=f"sequences at most ({samples or 'all'})"
        )
    if command == "needle":
        group.add_argument("--text", metavar="FILE", help="UTF-8 text to hide the facts in (a built-in one)")
        group.add_argument(
            "--lengths", type=numbers(cli.positive), metavar="N,…", help="tokens (2, 4 and 8 times top-k)"
        )
        group.add_argument(
            "--depths",
            type=numbers(float),
            default=[0.0, 0.25, 0.5, 0.75, 1.0],
            metavar="D,…",
            help="where the fact stands (0,0.25,0.5,0.75,1)",
        )
        group.add_argument(
            "--keys", type=numbers(cli.positive), default=[1, 4], metavar="N,…", help="facts in a prompt (1,4)"
        )
        group.add_argument("--trials", type=cli.positive, default=4, metavar="N", help="prompts of a cell (4)")
        group.add_argument("--seed", type=cli.natural, default=0, help="of the prompts (0)")
    if command == "overlap":
        group.add_argument("--out", default="overlap.csv", metavar="FILE", help="the matrix (overlap.csv)")
        group.add_argument("--plot", action="store_true", help="also draw it, as a .png beside the CSV")
    if command == "harness":
        group.add_argument("--tasks", required=True, metavar="A,B", help="names of lm-eval tasks")
        group.add_argument("--limit", type=cli.positive, metavar="N", help="examples of a task at most")
    elif command != "audit":
        group.add_argument("--batch", type=cli.positive, metavar="N", help="sequences of one mini-batch (by length)")
    group.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    cli.add_model_flags(parser)
    return parser


def usage() -> str:
    """What ``ic-jax eval --help`` prints."""
    lines = [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: ic-jax eval <what> [flags]", "", *lines, "", "ic-jax eval <what> --help shows its flags."]
    )


def main(argv=None) -> int:
    """Exit status of ``ic-jax eval``."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [None]
    if name in COMMANDS:
        return cli.run(globals()[f"_{name}"], _parser(name), rest)
    return cli.run(lambda args: _without_measure(name), cli.Parser("eval", ""), [])


def _without_measure(name: str | None) -> None:
    if name in ("-h", "--help"):
        print(usage())
    elif name is None:
        print(usage(), file=sys.stderr)
        sys.exit(2)
    else:
        raise UserError(f"ic-jax eval measures {', '.join(COMMANDS)}, not {name!r}")


if __name__ == "__main__":
    sys.exit(main())
