"""The report of study.py: tables with mean and spread over seeds, and which of the paper's claims hold here.

A claim is judged by the differences of paired seeds and their 95 % interval (Student's t): with its sign it holds, with
the other it does not, and where the interval holds zero the study leaves it open.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from pathlib import Path

from ic_jax import cli

T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # by degrees of freedom
# |rank correlation| that chance exceeds in 5 % of the cases, by number of pairs (two-sided table of Spearman's rho).
RHO95 = {5: 1.0, 6: 0.886, 7: 0.786, 8: 0.738, 9: 0.700, 10: 0.648, 11: 0.618, 12: 0.587, 13: 0.560, 14: 0.538, 15: 0.521}
DISTANCES = (0, 128, 512, 10**9)  # upper edges of the recall columns, tokens between fact and question
SHARE_OF_GAP = 0.2  # trained patterns are equal when they differ by less than this share of what untrained ones do
HOLDS, FAILS, OPEN = "holds", "does not hold", "open"


# Numbers. ------------------------------------------------------------------------------------------------------------
def interval(values) -> tuple[float, float | None]:
    """(mean, half width of its 95 % interval; None for one value)."""
    values, n = list(values), len(values)
    if n < 2:
        return values[0], None
    return statistics.mean(values), T95.get(n - 1, 1.96) * statistics.stdev(values) / n**0.5


def by_sign(mean: float, half: float | None, want: int) -> str:
    """The verdict on a difference that the claim expects to be positive (``want`` 1) or negative (-1)."""
    if half is None or abs(mean) <= half:
        return OPEN
    return HOLDS if mean * want > 0 else FAILS


def within(mean: float, half: float | None, margin: float) -> str:
    """The verdict on "equal": the whole interval lies within the margin, or the whole of it without."""
    if half is None or margin <= 0:
        return OPEN
    if abs(mean) + half <= margin:
        return HOLDS
    return FAILS if abs(mean) - half > margin else OPEN


def ranks(values) -> list[float]:
    """1 for the smallest; ties share the mean of their ranks."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def spearman(a, b) -> float:
    """Rank correlation; 0 when one of them is constant."""
    a, b = ranks(a), ranks(b)
    return statistics.correlation(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0


def recall(row: dict, chosen=lambda cell: True) -> float | None:
    """Mean share of answers over the cells that are chosen."""
    cells = [c["recall"] for c in row["recall"] if chosen(c)]
    return statistics.mean(cells) if cells else None


METRICS = {"loss": (lambda row: row["dloss"], 1), "recall": (recall, -1)}  # value of a row, and the sign of "worse"


# Claims. -------------------------------------------------------------------------------------------------------------
def pick(rows, **want) -> dict:
    """{seed: row} of the rows with these values; a row without a seed (the uniform patterns untrained) serves all."""
    return {r["seed"]: r for r in rows if all(r[k] == v for k, v in want.items())}


def differences(a: dict, b: dict, value) -> list[float]:
    """value(a) - value(b) for every seed that both have."""
    seeds = sorted({s for s in a.keys() | b.keys() if s is not None})
    pairs = [(a.get(s, a.get(None)), b.get(s, b.get(None))) for s in seeds]
    return [value(x) - value(y) for x, y in pairs if x and y]


def claims(rows: list[dict], searches: list[dict]) -> list[dict]:
    """One dict a claim and metric: claim, keep, metric, mean, half (None for one seed), n, verdict."""
    out = []

    def add(claim, keep, metric, values, judge):
        if values:
            mean, half = interval(values)
            verdict = judge(mean, half)
            out.append(dict(claim=claim, keep=keep, metric=metric, mean=mean, half=half, n=len(values), verdict=verdict))

    keeps = sorted({r["keep"] for r in rows if r["keep"] > 1}, key=lambda k: (k != 4, k))
    for keep in keeps:
        for metric, (value, worse) in METRICS.items():
            free = {m: pick(rows, stage="free", method=m, keep=keep) for m in ("uniform", "searched", "similarity")}
            trained = {
                (m, loss): pick(rows, stage="trained", method=m, keep=keep, loss_kind=loss)
                for m in ("uniform", "searched") for loss in ("multi", "own")
            }  # fmt: skip
            better = lambda mean, half, worse=worse: by_sign(mean, half, -worse)
            gap = differences(free["uniform"], free["searched"], value)
            add("untrained, searched beats uniform", keep, metric, [-d for d in gap], better)
            # Not better than uniform: an interval that is not wholly on the better side.
            no_better = lambda mean, half, worse=worse: (
                OPEN if half is None else FAILS if by_sign(mean, half, -worse) == HOLDS else HOLDS
            )
            alike = differences(free["similarity"], free["uniform"], value)
            add("untrained, similarity is no better than uniform", keep, metric, alike, no_better)
            margin = SHARE_OF_GAP * abs(statistics.mean(gap)) if gap else 0.0
            equal = differences(trained["uniform", "multi"], trained["searched", "multi"], value)
            claim = f"trained, uniform equals searched (within {margin:.3g}, a fifth of their untrained gap)"
            add(claim, keep, metric, equal, lambda mean, half, margin=margin: within(mean, half, margin))
            for method in ("uniform", "searched"):
                losses = differences(trained[method, "multi"], trained[method, "own"], value)
                add(f"trained {method}, the cross-layer loss beats the own-layer loss", keep, metric, losses, better)
    if searches:
        rho = [spearman(s["overlap"], s["cost"]) for s in searches]
        limit = RHO95.get(len(searches[0]["cost"]), 1.96 / max(len(searches[0]["cost"]) - 1, 1) ** 0.5)
        mean = statistics.mean(rho)
        # More overlap would have to mean less cost.
        verdict = FAILS if max(rho) < -limit else HOLDS if all(abs(r) < limit for r in rho) else OPEN
        verdict = OPEN if len(rho) < 2 else verdict
        claim = f"overlap with the layer before does not predict what sharing a layer costs (|rho| < {limit:.3g})"
        half = (max(rho) - min(rho)) / 2 if len(rho) > 1 else None
        out.append(
            dict(claim=claim, keep=None, metric="rank correlation", mean=mean, half=half, n=len(rho), verdict=verdict)
        )
    return out


# The report. ---------------------------------------------------------------------------------------------------------
def load(out: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """(parts, flat rows with stage, loss_kind and seed, search parts)."""
    parts = [p for p in (json.loads(f.read_text()) for f in sorted(out.glob("*-*.json"))) if "about" in p]
    rows = [
        dict(stage="trained" if p["kind"] == "train" else "free", loss_kind=None, seed=p["seed"]) | r
        for p in parts for r in p.get("rows", ())
    ]  # fmt: skip
    return parts, rows, [p for p in parts if p["kind"] == "search"]


def write(out: Path) -> int:
    """Write study.md, study.csv and study.png into ``out`` from its parts; 2 when there are none or they differ."""
    parts, rows, searches = load(out)
    if not parts:
        print(f"error: {out} holds no parts yet", file=sys.stderr)
        return 2
    devices = {p["about"].pop("device"): None for p in parts}
    about = parts[0]["about"]
    if any(p["about"] != about for p in parts):
        print(f"error: the parts in {out} differ in versions, model or sizes", file=sys.stderr)
        return 2
    found, s = claims(rows, searches), about["sizes"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    tokens = f"{rows[0]['tokens']:,} held-out tokens" if rows else "held-out tokens"
    lines = [
        f"# Which layers to keep, {about['layers']} layers, {' and '.join(devices)}", "",
        f"`python benchmarks/study.py --data DATA --out DIR`; {versions}; weights {about['weights']}, top-k "
        f"{about['topk']}. Search: {s['samples']} sequences of {s['seq_len']} tokens of the demo's training corpus, a "
        f"quarter of them recall tasks; another sample for every seed. Training: {s['warmup_steps']} warm-up and "
        f"{s['steps'] - s['warmup_steps']} sparse steps of {s['batch']} x {s['seq_len']} tokens at {s['lr'][0]:g} and "
        f"{s['lr'][1]:g}, another order for every seed. Perplexity, loss and KL: {tokens}, against the given model "
        "with every layer full. Recall: share of hidden facts answered exactly, mean of the cells (lengths "
        f"{', '.join(map(str, s['lengths']))}, five depths, 1 and 4 facts, {s['trials']} prompts a cell). "
        "Numbers are means over seeds ± standard deviation; uniform patterns untrained have no seed.", "",
        "## What holds here", "", _claims(found), "",
        "Intervals are 95 % of paired differences over seeds (Student's t). Loss in nats a token, lower is better; recall "
        "is a share, higher is better. *Open*: the interval holds zero (or straddles the margin), or there is one seed. "
        "Seeds that found the same pattern give the same untrained figures: they agree, but are not several samples.", "",
    ]  # fmt: skip
    tables = [
        ("Untrained", _table([r for r in rows if r["stage"] == "free"])),
        ("Trained", _table([r for r in rows if r["stage"] == "trained"])),
        ("Recall by length and by distance of the fact", _recalls(rows)),
        ("Overlap with the layer before, and the cost of sharing a layer alone", _overlaps(searches)),
        ("Patterns", _patterns(rows)),
    ]
    for title, body in tables:
        lines += [f"## {title}", "", cli.table(list(body[0]), [list(r.values()) for r in body]), ""] if body else []
    lines += ["```json", json.dumps(dict(about=about | dict(devices=list(devices)), claims=found)), "```", ""]
    from convert.store import write_text

    write_text(out / "study.csv", _csv(rows))
    write_text(out / "study.md", "\n".join(lines))
    if rows:
        _plot(rows, searches, out / "study.png")
    return 0


def _claims(found: list[dict]) -> str:
    show = lambda c: f"{c['mean']:+.4f}" + ("" if c["half"] is None else f" ± {c['half']:.4f}")
    share = lambda k: "" if k is None else f"1/{k}"
    body = [[c["claim"], share(c["keep"]), c["metric"], show(c), c["n"], f"**{c['verdict']}**"] for c in found]
    return cli.table(["claim", "full", "measure", "difference", "seeds", "verdict"], body) if body else "Nothing yet."


def groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows that differ in their seed alone, by (stage, keep, method, loss_kind)."""
    order = {"full": 0, "uniform": 1, "similarity": 2, "searched": 3}
    key = lambda r: (r["stage"], r["keep"], r["method"], r["loss_kind"])
    found: dict[tuple, list[dict]] = {}
    for r in sorted(rows, key=lambda r: (r["stage"], r["keep"], order[r["method"]], r["loss_kind"] or "")):
        found.setdefault(key(r), []).append(r)
    return found


def _spread(values, digits: int = 4, sign: str = "") -> str:
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"


def _first(key: tuple) -> dict:
    stage, keep, method, loss_kind = key
    name = {"full": "all full"}.get(method, method) if keep > 1 or stage == "free" else "all full"
    columns = {"full": "all" if keep == 1 else f"1/{keep}", "pattern": name}
    return columns | ({"loss": "–" if keep == 1 else loss_kind} if stage == "trained" else {})


def _table(rows: list[dict]) -> list[dict]:
    out = []
    for key, group in groups(rows).items():
        of = lambda name, group=group: [r[name] for r in group]
        out.append(_first(key) | {
            "seeds": len(group), "perplexity": _spread(of("ppl"), 3), "standard error": f"{max(of('ppl_error')):.3f}",
            "Δ loss": _spread(of("dloss"), 4, "+"), "mean KL": _spread(of("kl")),
            "same top-1": _spread([100 * v for v in of("same_top1")], 1) + " %",
            "recall": _spread([recall(r) for r in group], 3),
        })  # fmt: skip
    return out


def distance(cell: dict) -> int:
    """Tokens between the fact and the question, about."""
    return round((1 - cell["depth"]) * cell["length"])


def _recalls(rows: list[dict]) -> list[dict]:
    lengths = sorted({c["length"] for r in rows for c in r["recall"]})
    bins, low = [], -1
    for high in DISTANCES:
        label = "at once" if high == 0 else f"{low + 1}–{high}" if high < 10**9 else f"> {low}"
        if any(low < distance(c) <= high for r in rows for c in r["recall"]):
            bins.append((label, low, high))
        low = high
    out = []
    for key, group in groups(rows).items():
        row = {"trained": {"free": "no", "trained": "yes"}[key[0]], "loss": "–"} | _first(key)
        for n in lengths:
            row[f"length {n}"] = _spread([recall(r, lambda c, n=n: c["length"] == n) for r in group], 2)
        for label, low, high in bins:
            chosen = lambda c, low=low, high=high: low < distance(c) <= high
            row[f"distance {label}"] = _spread([recall(r, chosen) for r in group], 2)
        out.append(row)
    return out


def _overlaps(searches: list[dict]) -> list[dict]:
    if not searches:
        return []
    layers = range(len(searches[0]["cost"]))
    return [
        {"layer": i + 1, "overlap": _spread([s["overlap"][i] for s in searches], 3),
         "cost, nats": _spread([s["cost"][i] for s in searches], 4, "+")}
        for i in layers
    ]  # fmt: skip


def _patterns(rows: list[dict]) -> list[dict]:
    free = [r for r in rows if r["stage"] == "free" and r["keep"] > 1]
    return [
        {"full": f"1/{r['keep']}", "method": r["method"], "seed": "–" if r["seed"] is None else r["seed"],
         "layers": r["pattern"], "Δ loss": f"{r['dloss']:+.4f}"}
        for r in sorted(free, key=lambda r: (r["keep"], r["method"], r["seed"] or 0))
    ]  # fmt: skip


def _csv(rows: list[dict]) -> str:
    flat = []
    for r in rows:
        cells = {f"recall {c['length']} depth {c['depth']:g} keys {c['keys']}": c["recall"] for c in r["recall"]}
        flat.append({k: v for k, v in r.items() if k not in ("recall", "name")} | {"recall": recall(r)} | cells)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(n for r in flat for n in r)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _plot(rows: list[dict], searches: list[dict], path: Path) -> None:
    """Loss above all-full untrained and trained by share of full layers, and overlap against cost of every layer."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is missing", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    colours = {"uniform": "tab:red", "searched": "tab:blue", "similarity": "tab:green", "full": "black"}
    lines: dict[tuple, list] = {}
    for (stage, keep, method, loss), group in groups(rows).items():
        method = "full" if keep == 1 else method
        values = [r["dloss"] for r in group]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.setdefault((stage, method, loss if keep > 1 else None), []).append((keep, statistics.mean(values), spread))
    for (stage, method, loss), points in lines.items():
        keeps, means, spreads = zip(*sorted(points), strict=True)
        label = "all full" if method == "full" else method if loss is None else f"{method}, {loss} loss"
        axes[int(stage == "trained")].errorbar(
            keeps, means, spreads, label=label, color=colours[method], capsize=3,
            marker="x" if loss == "own" else "o", linestyle="--" if loss == "own" else "-",
        )  # fmt: skip
    for axis, title in zip(axes, ("untrained", "trained"), strict=False):
        axis.set(xlabel="one full layer in", ylabel="loss above all-full, nats a token", title=title)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    for s in searches:
        axes[2].plot(s["overlap"], s["cost"], "o", alpha=0.7, label=f"seed {s['seed']}")
    axes[2].set(xlabel="overlap with the layer before", ylabel="cost of sharing it alone, nats", title="layers")
    axes[2].grid(alpha=0.3)
    if searches:
        axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)
