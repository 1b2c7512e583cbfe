"""The parts of benchmarks/study.py that need no model: order and needs of the parts, statistics, verdicts, report."""

import csv
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import study
import study_report as report
from study_report import FAILS, HOLDS, OPEN

SIZES = dict.fromkeys(study.SIZES, 1) | dict(steps=6, warmup_steps=2, lr=[1e-3, 1e-4], lengths=[512, 1024])
ABOUT = dict(device="a device", versions={"jax": "1"}, layers=8, topk=4, weights="ab", sizes=SIZES)


def row(method, keep, dloss, found, loss_kind=None):
    cells = [dict(length=n, depth=d, keys=1, recall=found) for n in (512, 1024) for d in (0.0, 1.0)]
    out = dict(method=method, keep=keep, dloss=dloss, kl=0.1, ppl=9.0, ppl_error=0.1, same_top1=0.8, recall=cells)
    return out | dict(pattern="FSSSFSSS", tokens=100) | ({} if loss_kind is None else dict(loss_kind=loss_kind))


def parts(own=0.10, searched=0.05, trained_gap=0.001, seeds=3):
    """JSON of a study's parts: untrained uniform costs 0.4 nats, searched ``searched``, all with a little spread."""
    wobble = lambda s: 0.002 * (s - 1)
    out = {"free-uniform": dict(kind="free", seed=None, rows=[row("full", 1, 0.0, 1.0), row("uniform", 4, 0.4, 0.1)])}
    for s in range(seeds):
        history = dict(searched={"4": "FFSSSSSS"}, cost=[0.1, 0.3, 0.2, 0.5, 0.4, 0.0, 0.6])
        out[f"search-{s}"] = dict(kind="search", seed=s, overlap=[0.5, 0.7, 0.6, 0.55, 0.65, 0.45, 0.52]) | history
        free = [row("searched", 4, searched + wobble(s), 0.8), row("similarity", 4, 0.41 + wobble(s), 0.1)]
        out[f"free-{s}"] = dict(kind="free", seed=s, rows=free)
        for method, gap in (("uniform", trained_gap), ("searched", 0.0)):
            for kind, loss in (("multi", 0.04), ("own", own)):
                rows = [row(method, 4, loss + gap + wobble(s) + 0.0001 * s, 0.9, kind)]
                out[f"train-4-{method}-{kind}-{s}"] = dict(kind="train", seed=s, rows=rows)
    return {name: dict(name=name, about=ABOUT) | part for name, part in out.items()}


def written(folder, made):
    for name, part in made.items():
        (folder / f"{name}.json").write_text(json.dumps(part))
    _, rows, searches = report.load(folder)
    return {(c["claim"].split(" (")[0], c["metric"]): c for c in report.claims(rows, searches)}


def test_parts_come_in_order_and_after_what_they_read():
    names = study.names(3)
    assert len(names) == len(set(names)) == 3 + 4 + 3 * 12 + 3 + 4
    assert all(names.index(need) < i for i, n in enumerate(names) for need in study.needs(n))
    assert study.needs("train-4-searched-own-2") == ["search-2", "warm-4"] and study.needs("free-2") == ["search-2"]
    assert study.needs("free-uniform") == [] and study.needs("train-8-uniform-multi-1") == ["warm-8"]
    assert max(i for i, n in enumerate(names) if "train-4" in n) < names.index("train-2-uniform-multi-0")


def test_statistics():
    assert report.interval([2.0]) == (2.0, None)
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.30 / 3**0.5)
    assert report.ranks([3, 1, 1]) == [3, 1.5, 1.5]
    assert report.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert report.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert report.spearman([1, 1, 1], [1, 2, 3]) == 0


@pytest.mark.parametrize(
    ("mean", "half", "want", "verdict"),
    [(-1, 0.5, -1, HOLDS), (1, 0.5, -1, FAILS), (-1, 1.5, -1, OPEN), (-1, None, -1, OPEN), (1, 0.5, 1, HOLDS)],
)
def test_a_sign_is_judged_with_its_interval(mean, half, want, verdict):
    assert report.by_sign(mean, half, want) == verdict


def test_equal_means_the_whole_interval_within_the_margin():
    assert report.within(0.01, 0.02, 0.05) == HOLDS
    assert report.within(0.04, 0.02, 0.05) == OPEN
    assert report.within(-0.09, 0.02, 0.05) == FAILS
    assert report.within(0.0, None, 0.05) == report.within(0.0, 0.0, 0.0) == OPEN


def test_claims_that_hold(tmp_path):
    found = written(tmp_path, parts())
    for claim, metric, mean in [
        ("untrained, searched beats uniform", "loss", -0.35),
        ("untrained, searched beats uniform", "recall", 0.7),
        ("untrained, similarity is no better than uniform", "loss", 0.01),
        ("trained, uniform equals searched", "loss", 0.001),
        ("trained uniform, the cross-layer loss beats the own-layer loss", "loss", -0.06),
        ("trained searched, the cross-layer loss beats the own-layer loss", "loss", -0.06),
    ]:
        assert found[claim, metric]["verdict"] == HOLDS, claim
        assert found[claim, metric]["mean"] == pytest.approx(mean) and found[claim, metric]["n"] == 3
    overlap = found["overlap with the layer before does not predict what sharing a layer costs", "rank correlation"]
    assert overlap["verdict"] == HOLDS and abs(overlap["mean"]) < 0.786


def test_claims_that_do_not_hold_are_said_plainly(tmp_path):
    made = parts(own=0.02, searched=0.5, trained_gap=0.3)
    for s in range(3):  # the more overlap, the cheaper
        made[f"search-{s}"]["cost"] = [1 - v for v in made[f"search-{s}"]["overlap"]]
        made[f"free-{s}"]["rows"][1]["dloss"] -= 0.3
    found = written(tmp_path, made)
    assert {claim: c["verdict"] for (claim, metric), c in found.items() if metric != "recall"} == {
        "untrained, searched beats uniform": FAILS,
        "untrained, similarity is no better than uniform": FAILS,
        "trained, uniform equals searched": FAILS,
        "trained uniform, the cross-layer loss beats the own-layer loss": FAILS,
        "trained searched, the cross-layer loss beats the own-layer loss": FAILS,
        "overlap with the layer before does not predict what sharing a layer costs": FAILS,
    }


def test_one_seed_leaves_everything_open(tmp_path):
    found = written(tmp_path, parts(seeds=1))
    assert {c["verdict"] for c in found.values()} == {OPEN}


def test_data_is_looked_for_before_any_part_begins(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        study.main(["--data", "nope", "--out", str(tmp_path / "out")])
    assert "error: --data nope has no text.npy" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_report_of_the_parts_there_are(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert report.write(tmp_path) == 2 and "holds no parts" in capsys.readouterr().err
    made = parts()
    written(tmp_path, {n: p for n, p in made.items() if "own" not in n})
    assert report.write(tmp_path) == 0
    text = (tmp_path / "study.md").read_text()
    assert "untrained, searched beats uniform" in text and "cross-layer" not in text
    assert "+0.0500 ± 0.0020" in text and (tmp_path / "study.png").stat().st_size > 10_000
    with open(tmp_path / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 + 6 + 6 and {r["seed"] for r in rows} == {"", "0", "1", "2"}
    made["free-0"]["about"] = ABOUT | dict(device="another chip")  # a study may go on elsewhere, and says so
    written(tmp_path, made)
    assert report.write(tmp_path) == 0 and "another chip" in (tmp_path / "study.md").read_text()
    made["free-0"]["about"] = ABOUT | dict(weights="other")
    written(tmp_path, made)
    assert report.write(tmp_path) == 2 and "differ" in capsys.readouterr().err
