"""The paper's tables in miniature: which layers to keep, trained and untrained, three seeds, with their spread.

    python benchmarks/study.py --data DATA --out DIR [--model DIR] [--jobs 8] [--minutes 7]     parts, then the report
    python benchmarks/study.py report --out DIR                                               the report alone

DATA is what ``ic_jax.demo.corpus`` wrote: search and training read its training text and recall rows, the losses are of
its held-out text. A part is a process and one JSON file under --out; finished ones are not run again, after --minutes
none is begun, and one that fails does not stop the others (its log is DIR/logs/PART.log). Exit status 3: more is left.
Parts: ``search-SEED`` (greedy search, similarity, overlap), ``free-SEED`` (their patterns, untrained), ``free-uniform``,
``train-KEEP-METHOD-LOSS-SEED`` (distillation, then the same measures), in the order of ``names``; ``warm-KEEP`` compiles
what these trainings share. The seed chooses the calibration text and the order of training. What is trained all-full
shows what further training alone does.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
DATA = ("text.npy", "recall.npy", "heldout.npy")
KEEPS = (2, 4, 8)  # one layer in so many stays full
RECALL_SHARE = 0.25  # of the rows that search and training see
DEPTHS, KEYS = (0.0, 0.25, 0.5, 0.75, 1.0), (1, 4)


def names(seeds: int) -> list[str]:
    """All parts, the most important first."""
    each = range(seeds)
    trained = lambda keep: [
        f"train-{keep}-{m}-{loss}-{s}" for s, m, loss in itertools.product(each, ("uniform", "searched"), ("multi", "own"))
    ]
    out = [*(f"search-{s}" for s in each), "warm-4", "free-uniform", *(f"free-{s}" for s in each), "warm-1"]
    out += trained(4) + [f"train-1-uniform-own-{s}" for s in each]
    return [*out, "warm-2", *trained(2), "warm-8", *trained(8)]


def needs(name: str) -> list[str]:
    """The parts that come before one: the search that it reads, and what compiles its programs."""
    kind, *rest = name.split("-")
    searched = kind == "free" and rest[0] != "uniform" or kind == "train" and rest[1] == "searched"
    return [f"search-{rest[-1]}"] * searched + [f"warm-{rest[0]}"] * (kind == "train")


class Study:
    """The model, the texts and the sizes of the flags; ``run`` gives the JSON values of one part."""

    def __init__(self, args):
        import ic_jax
        from ic_jax.config import DEMO_DIRECTORY, Config

        self.args, self.directory = args, Path(args.model) if args.model else DEMO_DIRECTORY
        self.config = Config.load(self.directory)
        self.n = self.config.num_hidden_layers
        self.load = lambda path: ic_jax.load(path, implementation=args.implementation)
        self.text_T, self.recall, self.held_T = (np.load(args.data / name) for name in DATA)

    def about(self) -> dict:
        """What all parts of a study have in common."""
        import jax

        from ic_jax import info

        digest = hashlib.sha256()
        for path in sorted(self.directory.glob("*.safetensors")):
            digest.update(path.read_bytes())
        sizes = {k: getattr(self.args, k) for k in SIZES}
        return dict(
            device=jax.devices()[0].device_kind, versions=info.versions(), layers=self.n,
            topk=self.config.index_topk, weights=digest.hexdigest()[:16], sizes=sizes,
        )  # fmt: skip

    def sample(self, seed: int | None, n: int | None) -> np.ndarray:
        """int32 [N, seq_len + 1]: rows of training text with RECALL_SHARE rows of recall tasks; all of them, or ``n``."""
        from ic_jax import calibration
        from ic_jax.demo import corpus

        text = calibration.windows(self.text_T, self.args.seq_len)
        recall = (self.recall[:, : self.args.seq_len + 1] & (corpus.ANSWER - 1)).astype(np.int32)
        n = min(len(text), int(len(recall) / RECALL_SHARE)) if n is None else n
        n_recall, rng = round(n * RECALL_SHARE), np.random.default_rng(seed)
        pick = lambda rows, count: rows[rng.permutation(len(rows))[:count]]
        return np.concatenate([pick(text, n - n_recall), pick(recall, n_recall)])

    def keep(self, period: int) -> int:
        from ic_jax import search_methods

        return search_methods.kept_layers(1 / period, self.n)

    def search(self, seed: str) -> dict:
        """Greedy search down to 1/8, the similarity method's patterns, and how much neighbouring layers' choices overlap."""
        from ic_jax import eval_measures, search, search_evaluate, search_methods

        lm, ids = self.load(self.args.model), self.sample(int(seed), self.args.samples)
        counts, batch = {k: self.keep(k) for k in KEEPS}, min(self.args.batch, len(ids))
        log = self.args.out / "logs" / f"search-{seed}.jsonl"
        found = search.search(
            lm, ids, keep=min(counts.values()), seq_len=self.args.seq_len, samples=len(ids), batch=batch, log=log,
            resume=True, report=lambda done, total, note: note and print(note, flush=True),
        )  # fmt: skip
        after = {s["pattern"].count("F"): s["pattern"] for s in found.history}
        evaluator = search_evaluate.Evaluator(lm.engine, found.start.full_layers, ids, batch=batch)
        alike = evaluator.similarities(found.start)
        choose = lambda k: str(search_methods.similarity(alike, k, found.start.full_layers))
        _, overlap = eval_measures.overlap(lm, ids[: self.args.overlap], batch=min(4, batch))
        return dict(
            searched={k: after[count] for k, count in counts.items()},
            similarity={k: choose(count) for k, count in counts.items()},
            start_loss=found.start_loss, loss=found.loss, seconds=found.seconds, history=found.history,
            # Of sharing layer 1, 2, … alone: what it costs, and how much of its selection it has in common.
            cost=[found.history[0]["candidates"][str(i)] - found.start_loss for i in range(1, self.n)],
            overlap=[float(overlap[i, i - 1]) for i in range(1, self.n)], overlap_all=overlap.tolist(),
        )  # fmt: skip

    def measure(self, lm, patterns: dict, against=None, short: bool = False) -> list[dict]:
        """Held-out loss against the given model all-full, and recall by length and distance, one dict a pattern.

        ``short``: of one mini-batch only.
        """
        from ic_jax import calibration, eval_measures

        a = self.args
        held = calibration.windows(self.held_T, a.seq_len, a.batch if short else a.held_out)
        losses = eval_measures.perplexity(lm, held, patterns, batch=min(a.batch, len(held)), against=against)
        cells, filler = [], lm.tokenizer.decode(self.held_T[:20000].tolist())
        for length in a.lengths:
            size = max(1, a.batch * a.seq_len // length)
            cells += eval_measures.recall(
                lm, patterns, lengths=[length], depths=DEPTHS, keys=KEYS[:1] if short else KEYS,
                trials=1 if short else a.trials, filler=filler, batch=size,
            )  # fmt: skip
        for row in losses:
            del row["running"]
            found = [c for c in cells if c["name"] == row["name"]]
            row["recall"] = [{k: c[k] for k in ("length", "depth", "keys", "recall")} for c in found]
        return losses

    def free(self, seed: str) -> dict:
        """The patterns of a search, or the uniform ones and all-full, without training."""
        from ic_jax import search_methods
        from ic_jax.pattern import Pattern

        if seed == "uniform":
            found = {("uniform", k): search_methods.uniform(self.n, self.keep(k)) for k in KEEPS}
            found = {("full", 1): Pattern.all_full(self.n)} | found
        else:
            part = json.loads((self.args.out / f"search-{seed}.json").read_text())
            found = {(m, k): Pattern(part[m][str(k)]) for m in ("searched", "similarity") for k in KEEPS}
        rows = self.measure(self.load(self.args.model), {f"{m} {k}": p for (m, k), p in found.items()})
        return dict(rows=[dict(method=m, keep=k) | row for (m, k), row in zip(found, rows, strict=True)])

    def train(self, keep: str, method: str, loss: str, seed: str) -> dict:
        """One distillation, measured against the model it began with."""
        from ic_jax import distill, search_methods
        from ic_jax.pattern import Pattern

        a = self.args
        if method == "searched":
            pattern = Pattern(json.loads((a.out / f"search-{seed}.json").read_text())["searched"][keep])
        else:
            pattern = search_methods.uniform(self.n, self.keep(int(keep)))
        settings = distill.settings_for(
            self.config, pattern, steps=a.steps, warmup_steps=a.warmup_steps, lr=a.lr, seq_len=a.seq_len, batch=a.batch,
            seed=int(seed), loss=loss,
        )  # fmt: skip
        work = a.out / "work" / "-".join((keep, method, loss, seed))
        return self.trained(work, settings, dict(method=method, keep=int(keep)))

    def warm(self, keep: str) -> dict:
        """Two steps and all measures, for the compiled programs alone."""
        from ic_jax import distill, search_methods

        a, pattern = self.args, search_methods.uniform(self.n, self.keep(int(keep)))
        settings = distill.settings_for(
            self.config, pattern, steps=2, warmup_steps=1, lr=a.lr, seq_len=a.seq_len, batch=a.batch
        )
        self.trained(a.out / "work" / f"warm-{keep}", settings, {}, short=True)
        return {}

    def trained(self, work: Path, settings, about: dict, short: bool = False) -> dict:
        """Distills in ``work``, measures what comes out against the given model."""
        from ic_jax import distill

        for path in (work, work.with_name(work.name + ".incomplete")):  # of a process that was killed
            shutil.rmtree(path, ignore_errors=True)
        work.parent.mkdir(exist_ok=True)
        report = lambda done, total, note: note and print(note, flush=True)
        rows = distill.distill(
            self.directory, work, self.sample(0, None), settings, save_every=10**9, report=report
        )
        lm, against = self.load(str(work)), self.load(self.args.model)
        (row,) = self.measure(lm, {"trained": settings.pattern}, against=against, short=short)
        shutil.rmtree(work)
        table = [{k: r[k] for k in ("step", "stage", "index_loss", "lm_loss", "seconds")} for r in rows]
        thin = table[:: max(1, len(table) // 20)] + table[-1:]
        return dict(rows=[about | dict(loss_kind=settings.loss) | row], training=thin)

    def run(self, name: str) -> dict:
        kind, *rest = name.split("-")
        began = time.perf_counter()
        result = getattr(self, kind)(*rest)
        seed = int(rest[-1]) if kind != "warm" and rest[-1] != "uniform" else None
        wall = time.perf_counter() - began
        return dict(name=name, kind=kind, seed=seed, about=self.about(), wall_seconds=round(wall, 1)) | result


SIZES = (
    "seq_len", "samples", "overlap", "held_out", "trials", "lengths", "batch", "steps", "warmup_steps", "lr",
)  # fmt: skip


def place(args, name: str) -> Path:
    """The JSON file of a part; of what only compiles, beside the compiled programs."""
    return (args.cache if name.startswith("warm") else args.out) / f"{name}.json"


@dataclasses.dataclass
class Runs:
    """Runs parts as processes, ``jobs`` at a time, until ``until`` (monotonic seconds)."""

    args: argparse.Namespace
    rest: list[str]
    until: float
    began: float = dataclasses.field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def all(self) -> int:
        failed, running, done = set(), {}, lambda name: place(self.args, name).exists()
        todo = [n for n in names(self.args.seeds) if not done(n) and n.startswith(tuple(self.args.only.split(",")))]
        while True:
            for name in [n for n in todo if any(need in failed and need.startswith("search") for need in needs(n))]:
                self.say(f"{name}: left out, its search failed")
                todo.remove(name)
                failed.add(name)
            waits = lambda need: not done(need) and need not in failed and (need in {*todo, *running} or need[0] == "s")
            open_ = [n for n in todo if not any(map(waits, needs(n)))]
            while open_ and len(running) < self.args.jobs and time.monotonic() < self.until:
                running[open_[0]] = self.start(open_[0])
                todo.remove(open_.pop(0))
            if not running:
                break
            time.sleep(0.2)
            for name in [n for n, (process, _) in running.items() if process.poll() is not None]:
                process, began = running.pop(name)
                self.end(name, process.returncode, time.monotonic() - began)
                if not done(name):
                    failed.add(name)
        left = len([n for n in names(self.args.seeds) if not done(n) and not n.startswith("warm")])
        self.say(f"{left} parts are left, {len(failed)} of them failed: {', '.join(sorted(failed)) or 'none'}")
        return 3 if left else 0

    def start(self, name: str):
        log = self.args.out / "logs" / f"{name}.log"
        # Several processes share the device, and each other's compiled programs.
        env = os.environ | dict(
            XLA_PYTHON_CLIENT_PREALLOCATE="false", JAX_COMPILATION_CACHE_DIR=str(self.args.cache),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.5", PYTHONUNBUFFERED="1",
        )  # fmt: skip
        self.say(f"{name} begins")
        with open(log, "w") as file:
            command = [sys.executable, __file__, "part", *self.rest, "--name", name]
            return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT), time.monotonic()

    def end(self, name: str, status: int, seconds: float) -> None:
        import study_report

        path = place(self.args, name)
        if status or not path.exists():
            lines = (self.args.out / "logs" / f"{name}.log").read_text(errors="replace").splitlines()
            self.say(f"{name} failed with status {status} after {seconds:.0f} s: {lines[-1][:300] if lines else ''}")
            return
        part = json.loads(path.read_text())
        numbers = [f"{r['method']} 1/{r['keep']} {r['dloss']:+.4f} nats" for r in part.get("rows", ())]
        self.say(f"{name} done in {seconds:.0f} s: {', '.join(numbers) or json.dumps(part.get('searched', {}))}")
        try:  # after every part, so that a kill leaves a report behind
            study_report.write(self.args.out)
        except Exception as e:
            self.say(f"the report failed: {type(e).__name__}: {e}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("kind", nargs="?", default="all", choices=("all", "part", "report"))
    add("--data", type=Path, help="folder of ic_jax.demo.corpus")
    add("--out", type=Path, required=True)
    add("--model", help="directory of the model (the embedded demo)")
    add("--name", help="the part to run, with kind part")
    add("--only", default="", metavar="A,B", help="parts whose names begin like this (all)")
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=8, help="processes at a time (8)")
    add("--minutes", type=float, default=1e9, help="begin no part later than this")
    add("--cache", type=Path, help="folder of compiled programs (OUT/cache)")
    add("--implementation", default="auto")
    add("--seq-len", type=int, default=1024)
    add("--samples", type=int, default=64, help="calibration sequences of a search (64)")
    add("--overlap", type=int, default=8, help="sequences that overlap is measured on (8)")
    add("--held-out", type=int, default=None, help="held-out sequences at most (all)")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens of the recall prompts")
    add("--trials", type=int, default=16, help="prompts of a recall cell (16)")
    add("--batch", type=int, default=16)
    add("--steps", type=int, default=160, help="of a distillation (160)")
    add("--warmup-steps", type=int, default=40)
    add("--lr", type=float, nargs=2, default=[1e-3, 2e-4], metavar=("WARMUP", "SPARSE"))
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    until = time.monotonic() + 60 * args.minutes
    args.cache = (args.cache or args.out / "cache").absolute()
    if args.kind == "report":
        import study_report

        return study_report.write(args.out)
    if args.data is None:
        parser.error("--data is missing")
    if absent := [name for name in DATA if not (args.data / name).is_file()]:
        parser.error(f"--data {args.data} has no {absent[0]}; ic_jax.demo.corpus makes it")
    for folder in (args.out / "logs", args.cache):
        folder.mkdir(parents=True, exist_ok=True)
    if args.kind == "part":
        from convert.store import write_text

        part = Study(args).run(args.name)
        write_text(place(args, args.name), json.dumps(part, indent=1) + "\n")
        return 0
    return Runs(args, [a for a in argv if a != "all"], until).all()


if __name__ == "__main__":
    sys.exit(main())
