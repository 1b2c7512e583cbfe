"""``ic-jax bench -p 2048 -n 128 -d 0,32768 --compare all-full uniform:4 dense``: speed at depth, patterns side by side.

Prefill of ``-p`` tokens and decode of ``-n``, each behind ``-d`` tokens that are really in the cache. All patterns run
over the same weights in one program; ``--preset`` needs no checkpoint. A markdown table and one line of JSON on stdout;
what is measured and how: bench_measure.py.
"""

from __future__ import annotations

import argparse
import sys

from . import cli
from .errors import UserError

HEADER = ("model", "params", "device", "pattern", "test", "t/s", "ms/tok", "indexer", "roofline", "overlap", "peak GB")


def patterns_of(args, config, name: str) -> list:
    """The Patterns to compare, ``"dense"`` among them where asked for; UserError for an unknown or repeated one."""
    from . import pattern_file
    from .bench_measure import DENSE

    chosen = cli.pattern(args, config.num_hidden_layers)
    single = DENSE if args.dense else chosen
    if args.compare and single is not None:
        raise UserError("--compare names every pattern; leave --dense, --index-pattern and --index-freq out")
    given = args.compare or [single if single is not None else config.pattern if config.has_indexer else DENSE]
    parse = lambda p: p if p == DENSE or not isinstance(p, str) else pattern_file.parse(p, config, name)
    patterns = [parse(p) for p in given]
    for i, pattern in enumerate(patterns):
        if pattern in patterns[:i]:
            raise UserError(f"--compare {given[i]} gives the same pattern as {given[patterns.index(pattern)]}")
        if pattern != DENSE and not config.has_indexer:
            raise UserError(f"{name} has no indexer, so no pattern to run; only dense attention can be measured")
        if pattern != DENSE:
            pattern.for_layers(config.num_hidden_layers)
    return patterns


def check_lengths(args, config) -> None:
    """UserError when there is nothing to measure, or a test leaves the context."""
    if not args.prompt and not args.generate:
        raise UserError("-p 0 and -n 0 leave nothing to measure")
    context = min(args.max_context or config.max_position_embeddings, config.max_position_embeddings)
    longest, flag = max((args.prompt, "-p"), (args.generate, "-n"))
    if (need := max(args.depths) + longest) > context:
        raise UserError(f"-d {max(args.depths)} and {flag} {longest} need {need} tokens, the context holds {context}")


def union(patterns: list):
    """The Pattern whose full layers are those of all ``patterns``; None when every one is dense."""
    from .bench_measure import DENSE
    from .pattern import Pattern

    columns = zip(*(p.layers for p in patterns if p != DENSE), strict=True)
    return Pattern(layers) if (layers := "".join("F" if "F" in column else "S" for column in columns)) else None


def load(args, config, loaded, console):
    """(Engine, model name): the checkpoint, or a preset's shapes with random weights, with the indexers of ``loaded``."""
    options = dict(
        dtype=args.dtype, index_dtype=args.index_dtype, implementation=args.implementation,
        max_context=args.max_context, prefill_chunk=args.prefill_chunk, mesh=args.mesh,
    )  # fmt: skip
    if args.preset:
        from . import random_weights

        engine = random_weights.engine(config, loaded, seed=args.seed, neighbours=args.neighbours, **options)
        return engine, args.preset
    import ic_jax

    # Without an indexer there is no pattern to load; a dense run needs none.
    with console.progress("loading", bytes_=True) as progress:
        pattern = None if loaded is None else str(loaded)
        lm = ic_jax.load(args.model, pattern=pattern, dense=loaded is None, progress=progress, **options)
    return lm.engine, lm.name


def cells(row, about: dict, labels: dict[str, str]) -> tuple:
    """The cells of a table row."""
    percent = lambda x: "–" if x is None else f"{100 * x:.1f} %"
    depth = f" @ d{row.depth}" if row.depth else ""
    batch = f" x {row.batch}" if row.batch > 1 else ""
    size, unit = (1e9, "B") if about["params"] >= 1e9 else (1e6, "M")
    return (
        about["model"], f"{about['params'] / size:.1f} {unit}", about["device"], labels[row.pattern],
        f"{row.test}{row.tokens}{batch}{depth}", f"{row.tps:.2f} ± {row.spread:.2f}",
        f"{1e3 * row.median / row.tokens:.4g}", percent(row.indexer), percent(row.limit and row.limit / row.median),
        percent(row.overlap), "–" if row.memory_gb is None else f"{row.memory_gb:.2f}",
    )  # fmt: skip


def labels_of(patterns: list) -> dict[str, str]:
    """What the table calls each pattern: its counts, and its first letters where counts alone would be ambiguous."""
    from .bench_measure import DENSE

    counts = {str(p): DENSE if p == DENSE else f"{p.n_full}F/{len(p.layers) - p.n_full}S" for p in patterns}
    twice = {c for c in counts.values() if list(counts.values()).count(c) > 1}
    return {p: f"{c} {p if len(p) <= 16 else p[:16] + '…'}" if c in twice else c for p, c in counts.items()}


def _body(args) -> None:
    from . import config as configs
    from . import pattern_file, sharding

    if args.preset and args.model:
        raise UserError("--preset makes random weights; leave --model out")
    if args.neighbours and not args.preset:
        raise UserError("--neighbours shapes random weights; give --preset too")
    config = configs.preset(args.preset) if args.preset else configs.Config.load(cli.model_directory(args))
    name = args.preset or pattern_file.model_name(args.model)
    patterns = patterns_of(args, config, name)
    check_lengths(args, config)

    data = sharding.parse_mesh(args.mesh).get("data", 1) if args.mesh else 1
    if args.batch % data:
        raise UserError(f"--mesh data={data} does not divide --batch {args.batch}")
    cli.start(args)
    import jax

    from . import bench_measure, info, roofline

    loaded, console = union(patterns), cli.Console(args.quiet)
    engine, name = load(args, config, loaded, console)
    kind = jax.devices()[0].device_kind
    chip, devices = args.chip or roofline.chip_of(kind), 1 if engine.mesh is None else engine.mesh.size
    limits = roofline.limits(chip, devices) if chip else None
    steps = bench_measure.Steps(
        engine, loaded.full_layers if loaded else (), batch=args.batch, seed=args.seed, static=args.static
    )
    rows, shares = [], args.overlap or bool(args.preset)
    with console.progress("measuring") as report:
        for i, depth in enumerate(args.depths):  # a cache each, of the size that the depth needs
            tests = [(test, n, depth) for test, n in (("pp", args.prompt), ("tg", args.generate)) if n]
            rows += bench_measure.measure(steps, patterns, tests, repeats=args.repeats, chip=limits, overlap=shares)
            report(i + 1, len(args.depths), "")
    about = dict(model=name, params=sum(a.size for a in jax.tree.leaves(engine.params)), device=kind.removeprefix("NVIDIA "))
    console.status(f"compiled in {steps.compile_seconds:.1f} s · peak memory {cli.peak_memory_gb():.3f} GB")
    if args.output == "md":
        table = [cells(row, about, labels_of(patterns)) for row in rows]
        kept = [i for i in range(len(HEADER)) if i not in (8, 9) or any(cell[i] != "–" for cell in table)]
        console.table([HEADER[i] for i in kept], [[cell[i] for i in kept] for cell in table])
    console.json(
        about | dict(
            devices=devices, chip=chip, weights=f"random, seed {args.seed}" if args.preset else "checkpoint",
            neighbours=args.neighbours, seed=args.seed, dtype=args.dtype, index_dtype=args.index_dtype or args.dtype,
            pattern_is="compiled in" if args.static else "data", prefill_chunk=engine.prefill_chunk,
            compile_seconds=steps.compile_seconds, peak_memory_gb=cli.peak_memory_gb(), versions=info.versions(),
            tests=[row.to_json() for row in rows],
        )
    )  # fmt: skip


def _depths(text: str) -> list[int]:
    return sorted({cli.natural(part.strip()) for part in text.split(",")})


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1e6, not {text!r}")
    return value


def _parser():
    from .roofline import CHIPS

    parser = cli.Parser("bench", "Speed of prefill and decode behind a filled cache, patterns side by side.")
    parser.add_argument("-p", "--prompt", type=cli.natural, default=512, metavar="N", help="tokens to prefill, or 0 (512)")
    parser.add_argument("-n", "--generate", type=cli.natural, default=32, metavar="N", help="tokens to generate, or 0 (32)")
    parser.add_argument("-d", "--depths", type=_depths, default=[0], metavar="N,N…", help="tokens in the cache before (0)")
    parser.add_argument("-b", "--batch", type=cli.positive, default=1, metavar="N", help="sequences at a time (1)")
    parser.add_argument("-r", "--repeats", type=cli.positive, default=5, metavar="N", help="timed repeats (5)")
    parser.add_argument(
        "-o", "--output", choices=("md", "json"), default="md", help="a table and a line of JSON, or only that line (md)"
    )
    parser.add_argument("--compare", nargs="+", metavar="PATTERN", help="patterns to run side by side; also dense")
    parser.add_argument("--static", action="store_true", help="compile each pattern in, rather than pass it as data")
    parser.add_argument("--overlap", action="store_true", help="measure what neighbouring queries share, as with --preset")
    parser.add_argument("--chip", choices=CHIPS, help="the chip whose limits the roofline share refers to (the one found)")
    random = parser.add_argument_group("random weights")
    random.add_argument("--preset", metavar="NAME", help="shapes of this preset with random weights, in place of --model")
    random.add_argument("--seed", type=cli.natural, default=0, metavar="N", help="of the weights and of the tokens (0)")
    random.add_argument(
        "--neighbours", type=_ratio, default=0.0, metavar="R",
        help="make neighbouring queries select alike: R 64 gives 80-90 %% at long context (0: as they are drawn)",
    )  # fmt: skip
    cli.add_model_flags(parser)
    return parser


def main(argv=None) -> int:
    """Exit status of ``ic-jax bench``."""
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
