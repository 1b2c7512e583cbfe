"""Convert, inspect and verify checkpoints.

    python -m convert hf-to-jax SRC DST [--dtype bfloat16|float32] [--dry-run] [--resume]
    python -m convert jax-to-hf SRC DST [--max-shard-size 5GB] [--dry-run] [--resume]
    python -m convert inspect DIR [--json]
    python -m convert verify DIR [--against OTHER]

SRC may be a hub repository. Status goes to stderr, results to stdout; a mistake is one line and exit status 2.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

from ic_jax import cli
from ic_jax.config import Config
from ic_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    return cli.run(lambda args: args.run(args), _parser(), argv)


class _Parser(cli.Parser):
    """A Parser that ``add_subparsers`` can make, too."""

    def __init__(self, **kwargs):
        argparse.ArgumentParser.__init__(self, allow_abbrev=False, **kwargs)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m convert", description=__doc__.splitlines()[0])
    parser.set_defaults(run=lambda args: _without_command(parser))
    commands = parser.add_subparsers(dest="command")
    directions = {
        "hf-to-jax": (hf_to_jax, "Hugging Face safetensors to one of our Orbax directories"),
        "jax-to-hf": (jax_to_hf, "one of our directories to Hugging Face safetensors"),
    }
    for name, (run, about) in directions.items():
        p = commands.add_parser(name, help=about, description=about)
        p.set_defaults(run=run)
        p.add_argument("src", metavar="SRC", help="model directory or hub repository")
        p.add_argument("dst", metavar="DST", type=Path, help="directory to make")
        p.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
        p.add_argument("--resume", action="store_true", help="continue an interrupted conversion")
        if name == "hf-to-jax":
            p.add_argument(
                "--dtype", choices=["bfloat16", "float32"], help="default: as stored, bfloat16 for FP8 weights"
            )
        else:
            p.add_argument("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="default: 5GB")
    p = commands.add_parser("inspect", help="what a checkpoint holds", description="What a checkpoint holds.")
    p.set_defaults(run=inspect)
    p.add_argument("dir", metavar="DIR")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    about = "Check headers, shapes and checksums; loading compares no checksums."
    p = commands.add_parser("verify", help="check a checkpoint", description=about)
    p.set_defaults(run=verify)
    p.add_argument("dir", metavar="DIR")
    p.add_argument("--against", metavar="OTHER", help="also compare all weights with this checkpoint's")
    for p in commands.choices.values():
        p.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _without_command(parser: argparse.ArgumentParser) -> None:
    parser.print_help(sys.stderr)
    sys.exit(2)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 500MB or 5GB")
    return size


def _progress(done: int, total: int, note: str) -> None:
    if note:
        print(note, file=sys.stderr)
    elif sys.stderr.isatty():
        print(f"\r{100 * done // max(total, 1):3d} %", end="" if done < total else "\n", file=sys.stderr, flush=True)


def hf_to_jax(args) -> None:
    from ic_jax import checkpoint

    from . import transfer

    Config.load(checkpoint.find(args.src, weights=False))
    source = checkpoint.find(args.src)
    _transfer(args, transfer.hf_to_jax(source, args.dst, args.dtype, args.resume, _progress))


def jax_to_hf(args) -> None:
    from ic_jax import checkpoint

    from . import transfer

    source = checkpoint.find(args.src)
    _transfer(args, transfer.jax_to_hf(source, args.dst, args.max_shard_size, args.resume, _progress))


def _transfer(args, plan) -> None:
    from .safetensors import human

    for note in plan.notes:
        print(note, file=sys.stderr)
    what = f"{human(plan.nbytes)} in {len(plan.units)} {'groups' if args.command == 'hf-to-jax' else 'shards'}"
    if args.dry_run:
        print(f"would write {what} to {args.dst}")
        return
    try:
        plan.write()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command with --resume goes on") from None
    print(f"wrote {what} to {args.dst}")


def inspect(args) -> None:
    """Print the kinds of tensor of a checkpoint, its indexer layers and its pattern."""
    from ic_jax import checkpoint

    from . import mapping, safetensors

    config = Config.load(checkpoint.find(args.dir, weights=False))
    directory = checkpoint.find(args.dir)
    with checkpoint.open_source(directory) as source:
        kinds = collections.defaultdict(list)
        for name, tensor in source.tensors.items():
            kinds[re.sub(r"\.\d+(?=\.)", ".*", name), str(tensor.dtype), tensor.shape].append(tensor)
        layers = mapping.indexer_layers(source.tensors, config)
        notes = list(checkpoint.notes(source, config))
    rows = [(n, len(ts), d, list(s), sum(t.nbytes for t in ts)) for (n, d, s), ts in kinds.items()]
    dtypes = collections.Counter()
    for _, count, dtype, _, _ in rows:
        dtypes[dtype] += count
    total = sum(size for *_, size in rows)
    pattern = config.pattern.layers if config.has_indexer else None
    if args.json:
        keys = ("name", "count", "dtype", "shape", "bytes")
        print(json.dumps({
            "directory": str(directory), "format": "orbax" if source.native else "safetensors",
            "model_type": config.model_type, "layers": config.num_hidden_layers, "pattern": pattern,
            "indexer_layers": layers, "tensors": sum(dtypes.values()), "bytes": total, "dtypes": dtypes,
            "kinds": [dict(zip(keys, row, strict=True)) for row in rows], "notes": notes,
        }))  # fmt: skip
        return
    width = max((len(row[0]) for row in rows), default=0)
    for name, count, dtype, shape, size in rows:
        print(f"{name:{width}}  {count:5} x {dtype:8} {str(shape):20} {safetensors.human(size):>8}")
    kind = "our format (Orbax)" if source.native else "Hugging Face safetensors"
    print(f"{config.model_type} · {config.num_hidden_layers} layers · {kind} · {safetensors.human(total)}")
    print(f"dtypes: {', '.join(f'{n} {d}' for d, n in dtypes.items())}")
    print(f"pattern: {config.pattern.summary() if pattern else 'none (no indexer)'}")
    print(f"indexer weights on {len(layers)} layers: {','.join(map(str, layers)) or 'none'}")
    for note in notes:
        print(note)


def verify(args) -> None:
    """Check a checkpoint against itself, its config.json and, if asked, another checkpoint; UserError on a failure."""
    from ic_jax import checkpoint

    from . import transfer

    config = Config.load(checkpoint.find(args.dir, weights=False))
    directory = checkpoint.find(args.dir)
    with checkpoint.open_source(directory) as source:
        entries = transfer.entries(source, config)
        for note in checkpoint.notes(source, config, mtp=False):  # MTP tensors are checked like all others
            print(note, file=sys.stderr)
        if source.native:
            source.check(_progress)
        checked = "headers, shapes and checksums" if source.native else "headers, index and shapes"
        print(f"{directory}: {len(source.tensors)} tensors, {checked} are right")
        if args.against:
            other = checkpoint.find(args.against)
            with checkpoint.open_source(other) as source:
                cast = _compare(entries, transfer.entries(source, Config.load(other)))
            print(f"{other}: all weights are equal" + (f" ({cast} of them after a cast)" if cast else ""))


def _compare(ours, theirs) -> int:
    """How many entries are equal only after a cast to the first one's dtype; UserError at any other difference."""
    others = {entry.name: entry for entry in theirs}
    lost = sorted({entry.name for entry in ours} ^ set(others))
    if lost:
        raise UserError(f"{len(lost)} tensors are in one checkpoint only, the first is {lost[0]}")
    different, cast = [], 0
    done, total = 0, sum(math.prod(e.view) for e in ours)
    for entry in ours:
        other = others[entry.name]
        if entry.oriented(entry.view) != other.oriented(other.view):
            raise UserError(f"{entry.name} has the shapes {entry.view} and {other.view}")
        # Weights that one side holds as FP8 or in more bits are compared in the narrower full dtype.
        widths = [d for d in (entry.dtype, other.dtype) if d.itemsize > 1]
        dtype = min(widths, key=lambda d: d.itemsize) if widths else np.dtype(np.float32)
        cast += entry.dtype != other.dtype
        for start, size in entry.blocks():
            a = entry.array(start, size, dtype)
            b = other.array(other.oriented(entry.oriented(start)), other.oriented(a.shape), dtype)
            if a.tobytes() != b.tobytes():
                different.append(entry.name)
                break
        done += math.prod(entry.view)
        _progress(done, total, "")
    if different:
        raise UserError(f"{len(different)} tensors differ, the first is {different[0]}")
    return cast


if __name__ == "__main__":
    # A conversion never needs an accelerator, and taking one would stop whoever uses it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main())
