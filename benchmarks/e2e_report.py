"""The report of e2e.py: markdown, CSV and a plot of the parts that are there, the paper's figures beside ours."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from pathlib import Path

from ic_jax import cli

# Paper (arXiv 2603.12201): 30B, 47 layers, SGLang on 8 x H100. Tokens: prefill seconds, tokens/s of one request, and
# tokens/s with the cache full; all-full and 1/4 each.
PAPER = {
    10_000: (0.57, 0.45, 73.5, 91, 2700, 3310),
    60_000: (3.38, 2.59, 67, 89.5, 613, 840),
    120_000: (8.57, 5.66, 63, 88, 341, 498),
    200_000: (19.5, 10.7, 58, 86, 197, 297),
}
SHORT = {"float8_e4m3fn": "fp8", "bfloat16": "bf16"}
NONE = "–"


def write(out: Path) -> int:
    """Write e2e.md, e2e.csv and e2e.png into ``out`` from its parts; exit status 2 when there are none or they differ."""
    parts = [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]
    if not parts:
        print(f"error: {out} holds no parts yet", file=sys.stderr)
        return 2
    if any(p["about"] != parts[0]["about"] for p in parts):
        print(
            f"error: the parts in {out} differ in device, versions, seed or preset", file=sys.stderr
        )
        return 2
    of = lambda kind: [p for p in parts if p["kind"] == kind]
    about = parts[0]["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    layers = f", the first {about['layers']} layers only" if about["layers"] else ""
    mesh = f", {about['mesh']}" if about.get("mesh") else ""
    mesh += f", chunks of {about['prefill_chunk']} tokens" if about.get("prefill_chunk") else ""
    lines = [
        f"# {about['preset']} end to end, {about['device']}{mesh}", "",
        f"`python benchmarks/e2e.py`; {versions}; random bf16 weights, seed {about['seed']}{layers}. Wall time of whole "
        "calls, median of the repeats, compile time apart. Weights: *natural* as they are drawn; *alike* scaled so that "
        "neighbouring queries share most of their selections, as in trained models (`ic_jax/random_weights.py`), shown in "
        "every row. Both run the same program with exact selection. The paper's figures are of 8 x H100 under SGLang.", "",
    ]  # fmt: skip
    tables = sorted(of("table"), key=lambda p: (p["weights"], p["index_dtype"], p["tokens"]))
    prefill, decode = [_prefill(p) for p in tables], [_decode(p) for p in tables]
    sections = [
        ("Prefill of the whole prompt", prefill),
        ("Decode of one request behind it", decode),
        ("Against dense attention", [r for p in of("crossover") for r in _crossover(p)]),
        ("Device time by phase", [r for p in of("breakdown") for r in _breakdown(p)]),
        ("The cache full", _saturated(of("saturated"))),
        ("Kernels and reference against float32, and against each other", [r for p in of("correct") for r in _correct(p)]),
    ]
    for title, rows in sections:
        if rows:
            names = list(dict.fromkeys(n for r in rows for n in r))
            body = [[_cell(r.get(n)) for n in names] for r in rows]
            lines += [f"## {title}", "", cli.table(names, body), ""]
    from convert.store import write_text

    write_text(out / "e2e.md", "\n".join(lines))
    write_text(out / "e2e.csv", _csv([dict(section=title) | r for title, rows in sections for r in rows]))
    if prefill:
        _plot(prefill, decode, out / "e2e.png", f"{about['preset']}, {about['device']}")
    print(out / "e2e.md")
    return 0


def _cell(value) -> str:
    return NONE if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def _both(part: dict, test: str) -> tuple[dict, tuple[dict, dict]]:
    """(first columns, the rows of all-full and of 1/4) of a table's part."""
    full, quarter = (r for r in part["rows"] if r["test"] == test)
    of = dict(weights=part["weights"], tokens=part["tokens"], overlap=_percent(full["overlap"]))
    return {"index keys": SHORT[part["index_dtype"]]} | of | {"overlap 1/4": _percent(quarter["overlap"])}, (full, quarter)


def _prefill(part: dict) -> dict:
    """Seconds; a spread is half the way from the fastest to the slowest repeat."""
    first, (full, quarter) = _both(part, "pp")
    paper, half = PAPER.get(part["tokens"], (None,) * 6), lambda r: (max(r["seconds"]) - min(r["seconds"])) / 2
    return first | {
        "all-F s": full["median_s"], "±": half(full), "1/4 s": quarter["median_s"], "1/4 ±": half(quarter),
        "ratio": full["median_s"] / quarter["median_s"], "paper all-F s": paper[0], "paper 1/4 s": paper[1],
        "indexer": _percent(full["indexer"]), "indexer 1/4": _percent(quarter["indexer"]),
        "of the limit 1/4": _percent(quarter["roofline"]), "peak GB": quarter["memory_gb"],
    }  # fmt: skip


def _decode(part: dict) -> dict:
    """Tokens a second of one request."""
    first, (full, quarter) = _both(part, "tg")
    paper = PAPER.get(part["tokens"], (None,) * 6)
    return first | {
        "all-F t/s": full["tps"], "±": full["tps_spread"], "1/4 t/s": quarter["tps"], "1/4 ±": quarter["tps_spread"],
        "ratio": quarter["tps"] / full["tps"], "paper all-F t/s": paper[2], "paper 1/4 t/s": paper[3],
        "indexer": _percent(full["indexer"]), "indexer 1/4": _percent(quarter["indexer"]),
        "of the limit 1/4": _percent(quarter["roofline"]), "peak GB": quarter["memory_gb"],
    }  # fmt: skip


def _crossover(part: dict) -> list[dict]:
    rows = {}
    for r in part["rows"]:
        name = "dense" if r["full"] == 0 else "all-F" if set(r["pattern"]) == {"F"} else "1/4"
        row = rows.setdefault((r["test"], r["depth"]), {
            "weights": part["weights"], "test": f"{r['test']}{r['tokens']}", "depth": r["depth"],
        })  # fmt: skip
        row[f"{name} ms"] = 1e3 * r["median_s"]
    for row in rows.values():
        times = {name: row[f"{name} ms"] for name in ("all-F", "1/4", "dense")}
        row["fastest"] = min(times, key=times.get)
    return [rows[key] for key in sorted(rows)]


def _breakdown(part: dict) -> list[dict]:
    """Milliseconds of one chunk of prefill, or of one decode step."""
    out = []
    for r in part["rows"]:
        row = {
            "weights": part["weights"], "tokens": part["tokens"], "step": r["step"], "queries": r["queries"],
            "pattern": f"{r['full']}F", "wall ms": 1e3 * r["wall"], "device ms": 1e3 * sum(r["phases"].values()),
            "operations": round(r["operations"]),
        }  # fmt: skip
        out.append(row | {name: 1e3 * s for name, s in sorted(r["phases"].items(), key=lambda item: -item[1])})
    return out


def _saturated(parts: list[dict]) -> list[dict]:
    """All-full and 1/4 of a length in one row."""
    out = []
    for tokens in sorted({p["tokens"] for p in parts}):
        both = sorted((p for p in parts if p["tokens"] == tokens), key=lambda p: -p["full"])
        if len(both) != 2:
            continue
        full, quarter = both
        tps = [p["batch"] * p["generate"] / statistics.median(p["seconds"]) for p in both]
        paper = PAPER.get(tokens, (None,) * 6)
        out.append({
            "tokens": tokens, "batch all-F": full["batch"], "batch 1/4": quarter["batch"],
            "tokens held all-F": full["pool_tokens"], "tokens held 1/4": quarter["pool_tokens"],
            "tok/s all-F": tps[0], "tok/s 1/4": tps[1], "ratio": tps[1] / tps[0],
            "paper all-F": paper[4], "paper 1/4": paper[5],
            "M tokens/GPU-hour all-F": tps[0] * 3600 / 1e6, "M tokens/GPU-hour 1/4": tps[1] * 3600 / 1e6,
            "cost saved": _percent(1 - tps[0] / tps[1]),
        })  # fmt: skip
    return out


def _correct(part: dict) -> list[dict]:
    """Each of kernels and reference against float32, then against each other."""
    out = []
    for r in part["rows"]:
        row = {
            "weights": part["weights"], "layers": part["layers"], "tokens": part["tokens"],
            "index keys": SHORT[r["index_dtype"]], "step": r["step"], "queries": r["queries"],
        }  # fmt: skip
        pairs = {"reference": "float32, reference", "kernels": "float32, kernels", "both": "reference, kernels"}
        for what, of in (("selections", "selections"), ("logits off", "logits"), ("top-1", "top1")):
            values = {name: r[pair][of] for name, pair in pairs.items()}
            row |= {f"{what}, {name}": f"{100 * v:.2f} %" for name, v in values.items()}
        out.append(row)
    return out


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(n for r in rows for n in r)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plot(prefill: list[dict], decode: list[dict], path: Path, title: str) -> None:
    """Prefill seconds and decode tokens a second against length, fp8 index keys; the paper dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    panels = ((prefill, "s", "prefill, seconds"), (decode, "t/s", "decode, tokens a second"))
    for axis, (rows, unit, label) in zip(axes, panels, strict=True):
        for name, colour in (("all-F", "tab:red"), ("1/4", "tab:blue")):
            for weights, marker, alpha in (("natural", "o", 0.5), ("alike", "s", 1)):
                chosen = [r for r in rows if (r["weights"], r["index keys"]) == (weights, "fp8")]
                tokens, values = [r["tokens"] for r in chosen], [r[f"{name} {unit}"] for r in chosen]
                axis.plot(tokens, values, marker=marker, color=colour, alpha=alpha, label=f"{name}, {weights}")
            paper = sorted({(r["tokens"], v) for r in rows if (v := r[f"paper {name} {unit}"]) is not None})
            if paper:
                axis.plot(*zip(*paper, strict=True), "--", color=colour, label=f"{name}, paper (8 x H100)")
        axis.set(xlabel="tokens in the prompt", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=140)
    plt.close(figure)
