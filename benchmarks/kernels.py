"""The kernels on a Hopper GPU, checked and timed: one table, with the recorded peers and the targets beside ours.

    python benchmarks/kernels.py                                      every case
    python benchmarks/kernels.py index_topk sparse_mla.backward       cases whose names begin so
    python benchmarks/kernels.py grouped_matmul --check               only what is compared; --time: only what is timed
    python benchmarks/kernels.py --list                               names, peers and targets; runs anywhere
    python benchmarks/kernels.py --out DIR                            also DIR/kernels.md and kernels.json, after every case

Checks come first. The last line is JSON. Exit status 1: a check was wrong or a case of ours failed, the others ran.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ic_jax.errors import UserError  # noqa: E402

OPS = ("index_topk", "sparse_mla", "grouped_matmul")
HEAD = """\
| case | device us (spread) | queued / wall us | peer us | to reach, us | rate, share of the limit |
|---|---|---|---|---|---|"""
NOTES = """\
Device: sum of the kernels of a call (CUPTI), median of 8 calls and largest less smallest. Queued: a call of 8 issued back to
back, gaps and host included. Wall: one synchronised call. Peers were recorded on an H200, between CUDA events (XLA and
tokamax: wall), and are not run here unless a case is named after them. Limits: benchmarks/limits.py, fp8's from the data
sheet; attention's bytes are those gathered, partly from the L2 cache."""


def every_case() -> list:
    """All checks, then all timings, op by op."""
    from kernel_cases import Check

    cases = [case for op in OPS for case in importlib.import_module(f"kernels_{op}").cases()]
    return sorted(cases, key=lambda case: not isinstance(case, Check))


def choose(cases: list, names: list[str], check: bool, time: bool) -> list:
    """The cases that ``names`` begin, of the kinds asked for (both, if neither); UserError for a name that begins none."""
    from kernel_cases import Check

    begins = lambda name, case: f"{case.name}.".startswith(f"{name}.")
    for name in names:
        if not any(begins(name, case) for case in cases):
            raise UserError(f"no case is called {name}; --list names them")
    wanted = [case for case in cases if not names or any(begins(name, case) for name in names)]
    return [case for case in wanted if check == time or check == isinstance(case, Check)]


def about(command: str) -> dict:
    """Device, driver, versions and command; UserError where the kernels cannot run."""
    import jax

    from ic_jax import info
    from pallas_kernels import dispatch

    if (found := dispatch.target()) != dispatch.CHIPS["h200"]:
        raise UserError(f"the kernels need a Hopper GPU, this process runs on {found.platform}; --list needs none")
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        driver = "unknown"
    kept = {name: version for name, version in info.versions().items() if name in ("jax", "jaxlib", "python")}
    return dict(device=jax.devices()[0].device_kind, driver=driver, versions=kept, command=command)


def line(row: dict) -> str:
    """A row as text: an item of the list of checks, or a row of the table."""
    if row["kind"] == "check":
        return f"- {'ok' if row['ok'] else 'FAILED'} `{row['name']}`: {row['note']}"
    if not row["ok"]:
        return f"| {row['name']} | {'FAILED' if row['ours'] else 'left out'}: {row['note'].replace('|', '/')} | | | | |"
    us = lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    share = lambda r: f", {100 * r['share']:.0f} % of {r['limit']:,.4g}" if "share" in r else ""
    rate = lambda r: f"{r['rate']:,.{0 if r['rate'] >= 100 else 2}f} {r['unit']}{share(r)}"
    beside = [row["note"]] * bool(row["note"]) + [f"{row['launches']:.3g} kernels"] * (row["launches"] > 1)
    cells = (
        row["name"] + (f" ({', '.join(beside)})" if beside else ""),
        f"{us(row['device_us'])} ({us(row['spread_us'])})",
        f"{us(row['queued_us'])} / {us(row['wall_us'])}",
        ", ".join(f"{value:,} {whose}" for value, whose in row["peers"]),
        ", ".join(f"{value:,} {verdict}" for value, verdict in row["reach"]),
        "; ".join(map(rate, row["rates"])),
    )
    return "| " + " | ".join(cell or "–" for cell in cells) + " |"


def header(facts: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['device']}, driver {facts['driver']}, {versions}. Command: `{facts['command']}`.\n\n{NOTES}\n"


def summary(rows: list[dict], total: int) -> str:
    failed = [row["name"] for row in rows if not row["ok"] and row["ours"]]
    text = f"\n{len(rows)} of {total} cases run, {len(failed)} failed"
    return text + (": " + ", ".join(f"`{name}`" for name in failed) if failed else "") + "."


def write(out: Path, result: dict, total: int) -> None:
    """kernels.md and kernels.json of the rows there are, each whole or not at all."""
    from convert.store import write_text

    facts, rows = result["about"], result["cases"]
    lines = {kind: [line(row) for row in rows if row["kind"] == kind] for kind in ("check", "time")}
    table = ["", HEAD, *lines["time"]] if lines["time"] else []
    text = [f"# Kernels on one {facts['device']}\n", header(facts), *lines["check"], *table, summary(rows, total)]
    write_text(out / "kernels.md", "\n".join(text) + "\n")
    write_text(out / "kernels.json", json.dumps(result | dict(complete=len(rows) == total), indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", metavar="OP", help=f"what names begin with: {', '.join(OPS)}, op.part… (all)")
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--time", action="store_true", help="only time")
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the report there too")
    args = parser.parse_args(argv)
    import kernel_cases

    try:
        cases = choose(every_case(), args.op, args.check, args.time)
        if args.list:
            for case in cases:
                peers = [f"{whose} {us:,} us" for us, whose in getattr(case, "peers", ())]
                reach = [f"to reach {us:,} us" for us in getattr(case, "reach", ())]
                kind = "check" if isinstance(case, kernel_cases.Check) else "time"
                print(f"{kind:5} {', '.join([case.name, *peers, *reach])}")
            sys.stdout.flush()
            return 0
        flags = [flag for flag, given in (("--check", args.check), ("--time", args.time)) if given]
        facts = about(shlex.join(["python", "benchmarks/kernels.py", *args.op, *flags]))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the list left; at exit Python would complain about what is buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    print(header(facts))
    result = dict(about=facts, cases=[])
    for case in cases:
        row = kernel_cases.run(case, facts["device"])
        if row["kind"] == "time" and not any(r["kind"] == "time" for r in result["cases"]):
            print(f"\n{HEAD}")
        result["cases"].append(row)
        print(line(row), flush=True)
        if args.out:
            write(args.out, result, len(cases))
    print(summary(result["cases"], len(cases)))
    print(json.dumps(result))
    return int(any(not row["ok"] and row["ours"] for row in result["cases"]))


if __name__ == "__main__":
    sys.exit(main())
