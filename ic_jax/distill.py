"""``ic-jax distill --pattern P --text FILE --steps N --out DIR``: train the indexers that are kept to serve several layers.

Warm-up: attention is dense and only the indexers of F layers learn, from the attention of all layers they serve. Sparse
stage: attention sees the selection only, the indexers go on learning on it, the LM loss trains everything else. Works
in DIR.incomplete, where the training state is saved; ``--resume`` continues from there to the same weights.
DIR appears at the end, a Hugging Face checkpoint without the indexers of S layers, which every command takes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import cli, pattern_file
from .config import Config
from .errors import UserError
from .pattern import Pattern

STAGES = ("warmup", "sparse", "both")
LOSSES = ("multi", "avg", "own")
WARMUP_LR, SPARSE_LR = 1e-3, 7.3e-6  # DeepSeek-V3.2's


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the weights that come out. lr: of warm-up and of the sparse stage. batch: sequences of one step."""

    pattern: Pattern
    steps: int
    warmup_steps: int
    loss: str = "multi"
    lr: tuple[float, float] = (WARMUP_LR, SPARSE_LR)
    batch: int = 4
    seq_len: int = 2048
    accumulate: int = 1
    dtype: str = "bfloat16"
    seed: int = 0
    remat: bool = False

    def stage(self, step: int) -> str:
        """The stage of a step, counted from 0."""
        return "warmup" if step < self.warmup_steps else "sparse"


def settings_for(
    config: Config, pattern: Pattern, *, stage="both", steps: int, warmup_steps: int | None = None, lr=None,
    seq_len: int | None = None, devices: int = 1, **rest,
) -> Settings:  # fmt: skip
    """Settings with defaults filled in, checked against the model; UserError for what cannot be.

    warmup_steps: a fifth of ``both``'s steps by default, as published. lr: one number for one stage, two for both.
    """
    if not config.has_indexer:
        raise UserError(f"this {config.model_type} has no indexer, so there is nothing to distill")
    if stage not in STAGES:
        raise UserError(f"--stage must be one of {', '.join(STAGES)}, not {stage!r}")
    if steps < 1:
        raise UserError(f"--steps must be >= 1, not {steps}")
    if stage != "both" and warmup_steps is not None:
        raise UserError(f"--warmup-steps divides --stage both; with --stage {stage} there is only one stage")
    if stage == "both" and steps == 1:
        raise UserError("--steps 1 are too few for both stages; give at least 2, or one stage with --stage")
    if stage == "both":
        warmup_steps = max(1, steps // 5) if warmup_steps is None else warmup_steps
        if not 0 < warmup_steps < steps:
            raise UserError(f"--warmup-steps must lie in 1..{steps - 1} with --steps {steps}, not {warmup_steps}")
    else:
        warmup_steps = steps if stage == "warmup" else 0
    rates = list(lr) if lr else [WARMUP_LR, SPARSE_LR]
    if lr and len(rates) != (2 if stage == "both" else 1):
        raise UserError("--lr takes one rate for one stage, and two for both: --lr WARMUP SPARSE")
    if not all(0 < r < float("inf") for r in rates):
        raise UserError(f"--lr must be positive, not {' '.join(map(str, rates))}")
    k, limit = config.index_topk, config.max_position_embeddings
    seq_len = min(8 * k, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise UserError(f"--seq-len must lie in 2..{limit}, not {seq_len}")
    if stage != "warmup" and seq_len <= k:
        raise UserError(f"--seq-len {seq_len} is within top-k {k}, where nothing is selected; make it longer")
    s = Settings(pattern, steps, warmup_steps, lr=(rates[0], rates[-1]), seq_len=seq_len, **rest)
    if s.batch % (s.accumulate * devices):
        parts = f"--accumulate {s.accumulate} x {devices} devices" if devices > 1 else f"--accumulate {s.accumulate}"
        raise UserError(f"--batch {s.batch} does not divide into {parts}")
    return s


# One step. -----------------------------------------------------------------------------------------------------------
def optimizer():
    """AdamW as DeepSeek-V3 sets it, but for the rate, which is data: clipped to norm 1; norms and biases do not decay."""
    import jax
    import optax

    matrices = lambda params: jax.tree.map_with_path(
        lambda path, a: not any(word in path[-1].key for word in ("norm", "bias")), params
    )
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    return optax.chain(optax.clip_by_global_norm(1.0), adam, optax.add_decayed_weights(0.1, matrices))


def split(params: dict, stage: str) -> dict[str, dict]:
    """What a stage trains, by optimizer: the indexers, and in the sparse stage the backbone."""
    parts = {"indexer": {"indexer": params["indexer"]}}
    if stage == "sparse":
        parts["backbone"] = {k: v for k, v in params.items() if k != "indexer"}
    return parts


def init_optimizers(params: dict, stage: str, sharding=None) -> dict:
    """Fresh optimizer states of a stage, placed by ``sharding``."""
    import jax

    init = lambda parts: {name: optimizer().init(part) for name, part in parts.items()}
    return jax.jit(init, out_shardings=sharding)(split(params, stage))


def make_step(c: Config, pattern: Pattern, stage: str, mesh, *, loss: str, dtype: str, remat: bool):
    """(state, ids int32 [A,B,S+1], lr) -> (state, metrics): one update from A micro-batches, sharded over ``data``.

    state: {"params", "optimizers"}, float32, donated. metrics: index_loss_G, lm, and ok, whether loss and gradients
    are finite; if they are not, the state comes back as it was.
    """
    from . import distill_loss

    program = _program(c, stage, mesh, average=loss == "avg", dtype=dtype, remat=remat)
    shares = distill_loss.shares(pattern, loss)
    return lambda state, ids_ABS, lr: program(state, ids_ABS, lr, shares)


@functools.lru_cache(maxsize=8)
def _program(c: Config, stage: str, mesh, *, average: bool, dtype: str, remat: bool):
    """``make_step`` with the pattern as data."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from . import distill_loss

    sparse = stage == "sparse"

    def loss_fn(parts, rest, ids_BS, shares):
        params = rest | {k: v for part in parts.values() for k, v in part.items()}
        params, options = distill_loss.cast(params, jnp.dtype(dtype)), dict(sparse=sparse, remat=remat)
        loss = "avg" if average else "multi"
        x_BSD, index_G = distill_loss.forward(params, c, shares, ids_BS[:, :-1], loss=loss, **options)
        lm = distill_loss.lm_loss(params, c, x_BSD, ids_BS[:, 1:]) if sparse else jnp.float32(0)
        return index_G.sum() + lm, {"index_loss_G": index_G, "lm": lm}

    def gradients(params, ids_ABS, shares):
        parts = split(params, stage)

        def add(total, ids_BS):
            grads, metrics = jax.grad(loss_fn, has_aux=True)(parts, params, ids_BS, shares)
            return jax.tree.map(jnp.add, total, (grads, metrics)), None

        metrics = {"index_loss_G": jnp.zeros(len(params["indexer"]["wk"])), "lm": jnp.float32(0)}
        total, _ = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, parts), metrics), ids_ABS)
        return jax.lax.pmean(jax.tree.map(lambda a: a / len(ids_ABS), total), "data")

    same, batch = PartitionSpec(), PartitionSpec(None, "data")
    gradients = jax.shard_map(gradients, mesh=mesh, in_specs=(same, batch, same), out_specs=same, check_vma=False)

    def step(state, ids_ABS, lr, shares):
        params = state["params"]
        grads, metrics = gradients(params, ids_ABS, shares)
        ok = jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves((grads, metrics))]).all()
        new = {"params": dict(params), "optimizers": {}}
        for name, part in split(params, stage).items():
            updates, new["optimizers"][name] = optimizer().update(grads[name], state["optimizers"][name], part)
            new["params"] |= jax.tree.map(lambda p, u: p - lr * u, part, updates)
        return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state), metrics | {"ok": ok}

    replicated = NamedSharding(mesh, same)
    inputs = (replicated, NamedSharding(mesh, batch), replicated, replicated)
    shardings = dict(in_shardings=inputs, out_shardings=replicated)
    return jax.jit(step, donate_argnums=0, **shardings)


def batch_at(ids_NT: np.ndarray, s: Settings, step: int) -> np.ndarray:
    """The ids [A, batch/A, S+1] of a step: every epoch is a permutation of the windows, a function of seed and step."""
    n, rows = len(ids_NT), np.arange(step * s.batch, (step + 1) * s.batch)
    orders = {e: np.random.default_rng([s.seed, e]).permutation(n) for e in np.unique(rows // n).tolist()}
    chosen = np.array([orders[r // n][r % n] for r in rows.tolist()])
    return ids_NT[chosen].reshape(s.accumulate, -1, ids_NT.shape[1])


# The run. ------------------------------------------------------------------------------------------------------------
def distill(
    directory: Path, out: Path, ids_NT: np.ndarray, s: Settings, *, mesh=None, resume=False, save_every=100,
    report: Callable[[int, int, str], None] | None = None,
) -> list[dict]:  # fmt: skip
    """Train the model of ``directory`` on windows ``ids_NT`` int32 [N, seq_len + 1], write ``out``; the loss table.

    Args:
      mesh: a Mesh whose ``data`` axis divides the batch; one device by default. save_every: steps between saved states.
      resume: continue what was interrupted; the weights are those of a run that was not. report: (done, all, note).

    Raises UserError when something is in the way, and when a loss is not finite: the last state saved before is kept then.
    """
    from . import checkpoint, distill_files, sharding

    config, report = Config.load(directory), report or (lambda done, total, note: None)
    s.pattern.slots(checkpoint.indexer_layers(directory, config))
    if s.batch > len(ids_NT):
        raise UserError(
            f"--batch {s.batch} is more than the {len(ids_NT)} sequences of {s.seq_len} tokens in the text; make it smaller"
        )
    with distill_files.Work(out, _about(directory, config, ids_NT, s), resume) as work:
        return _train(work, directory, config, ids_NT, s, mesh or sharding.make_mesh({}), save_every, report)


def _train(work, directory: Path, config: Config, ids_NT: np.ndarray, s: Settings, mesh, save_every: int, report):
    """``distill`` in its working directory."""
    import jax

    from . import checkpoint, distill_files, interrupts, model

    n = work.latest()
    shapes = model.abstract_params(config, s.pattern.n_full, "float32")[0]
    same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    if n is None:
        placed, n, rows = jax.tree.map(lambda _: same, shapes), 0, []
        loading = lambda done, total, note: report(0, s.steps, note)
        params = checkpoint.load_params(directory, config, s.pattern.full_layers, "float32", placed, progress=loading)
        state = {"params": params, "optimizers": init_optimizers(params, s.stage(0), same)}
    else:
        optimizers = jax.eval_shape(lambda params: init_optimizers(params, s.stage(n - 1)), shapes)
        state, rows = work.restore(n, {"params": shapes, "optimizers": optimizers}, same), work.rows(n)
        report(n, s.steps, f"continuing after step {n}")
    began, saved = time.perf_counter() - (rows[-1]["seconds"] if rows else 0), n
    try:
        while n < s.steps:
            with interrupts.deferred():  # a step has given its old state away before it has the new one
                stage = s.stage(n)
                if n and stage != s.stage(n - 1):
                    state["optimizers"] = init_optimizers(state["params"], stage, same)
                step = make_step(config, s.pattern, stage, mesh, loss=s.loss, dtype=s.dtype, remat=s.remat)
                lr = s.lr[stage == "sparse"]
                state, metrics = step(state, batch_at(ids_NT, s, n), np.float32(lr))
                metrics = jax.device_get(metrics)
                index, lm = float(metrics["index_loss_G"].sum()), float(metrics["lm"]) if stage == "sparse" else None
                if not metrics["ok"]:
                    raise _not_finite(work, n, stage, index, lm)
                work.forget_before(saved)
                n += 1
                values = (n, stage, lr, index, lm, round(time.perf_counter() - began, 3))
                rows.append(dict(zip(distill_files.COLUMNS, values, strict=True)))
                noted = n % max(1, s.steps // 20) == 0 or n in (1, s.steps)
                report(n, s.steps, _note(rows[-1], s) if noted else "")
                if n % save_every == 0 or n == s.steps or n == s.warmup_steps:
                    work.save(n, state, rows)
                    saved = n
    except KeyboardInterrupt:
        if saved < n:
            work.save(n, state, rows)
        raise KeyboardInterrupt(f"interrupted after step {n}; the same command with --resume goes on") from None
    work.finish(directory, config.replace(pattern=s.pattern), state["params"])
    return rows


def _not_finite(work, n: int, stage: str, index: float, lm: float | None) -> UserError:
    """What to say of step ``n + 1``: the update before it may have spoiled the state, so it goes back to an older one."""
    kept = work.forget_from(n)
    note = f"the state after step {kept} is kept in {work.directory}: continue with --resume and a lower --lr"
    return UserError(
        f"loss or gradient is not finite at step {n + 1} ({stage}: index {index:.4g}"
        f"{'' if lm is None else f', LM {lm:.4g}'}); {note if kept else 'no state before it was saved: lower --lr'}"
    )


def _about(directory: Path, config: Config, ids_NT: np.ndarray, s: Settings) -> dict:
    """What a resumed run has to have in common; the rates, remat and the mesh may change."""
    from . import checkpoint

    about = dataclasses.asdict(s) | {"pattern": str(s.pattern)}
    for name in ("lr", "remat"):
        del about[name]
    digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
    sample = checkpoint.sample(directory)
    return about | {"model": digest(repr(config).encode() + sample), "text": digest(ids_NT.astype("<i4").tobytes())}


def _note(row: dict, s: Settings) -> str:
    lm = "" if row["lm_loss"] is None else f" · LM {row['lm_loss']:.4f}"
    return f"step {row['step']}/{s.steps} {row['stage']} · index KL {row['index_loss']:.4f}{lm} · {row['seconds']:.0f} s"


# The command. --------------------------------------------------------------------------------------------------------
def _body(args) -> None:
    console, out = cli.Console(args.quiet), Path(args.out)
    directory = cli.model_directory(args)
    config = Config.load(directory)
    name = pattern_file.model_name(args.model)
    if not config.has_indexer:
        raise UserError(f"{config.model_type} at {directory} has no indexer, so there is nothing to distill")
    if args.save_every < 1 or args.batch < 1 or args.accumulate < 1:
        raise UserError("--save-every, --batch and --accumulate must be >= 1")
    pattern = pattern_file.parse(args.pattern, config, name if args.pattern.endswith(".json") else None)
    from . import calibration, checkpoint, sharding
    from .tokenizer import Tokenizer

    sizes = sharding.parse_mesh(args.mesh) if args.mesh else {}
    if set(sizes) - {"data"}:
        raise UserError(f"--mesh {args.mesh}: distill is sharded over data only, for instance data=2")
    s = settings_for(
        config, pattern, stage=args.stage, steps=args.steps, warmup_steps=args.warmup_steps, lr=args.lr,
        seq_len=args.seq_len, devices=sizes.get("data", 1), loss=args.loss, batch=args.batch,
        accumulate=args.accumulate, dtype=args.dtype, seed=args.seed, remat=args.remat,
    )  # fmt: skip
    pattern.slots(checkpoint.indexer_layers(directory, config))
    tokenizer, text = Tokenizer(directory), calibration.read_text(args.text, args.model)
    ids_NT = calibration.windows(tokenizer.encode(text), s.seq_len)
    if ids_NT.max() >= config.vocab_size:
        raise UserError(f"the tokenizer of {directory} makes ids beyond the model's {config.vocab_size}")
    mesh = sharding.make_mesh(sizes)
    console.status(
        f"{name} · {pattern.summary()} · {args.loss} loss · {s.warmup_steps} warm-up and {s.steps - s.warmup_steps} "
        f"sparse steps · {s.batch} x {s.seq_len} tokens a step of {len(ids_NT)} sequences"
    )
    with console.progress("distilling") as report:
        rows = distill(
            directory, out, ids_NT, s, mesh=mesh, resume=args.resume, save_every=args.save_every, report=report
        )
    if args.json:
        console.json({"out": str(out), "pattern": str(pattern), "losses": rows})
    else:
        shown = sorted(set(np.linspace(0, len(rows) - 1, 10).round().astype(int)))
        console.table(rows[0], [["-" if v is None else v for v in rows[i].values()] for i in shown])
    console.status(f"written to {out} ({pattern.summary()}); use it with --model {out}")


def _parser():
    parser = cli.Parser("distill", "Train the indexers that are kept to serve several layers.")
    add = parser.add_argument_group("distill").add_argument
    add("--model", metavar="DIR_OR_REPO", help="directory or Hugging Face repository (the embedded demo model)")
    add("--pattern", required=True, metavar="P", help="pattern.json of search, F or S for every layer, or uniform:N")
    add("--text", metavar="FILE", help="UTF-8 text to train on (the demo model brings a little)")
    add("--out", required=True, metavar="DIR", help="the new checkpoint; the training state lies in DIR.incomplete")
    add("--steps", required=True, type=int, metavar="N", help="steps in all")
    add("--warmup-steps", type=int, metavar="M", help="how many of them are warm-up (a fifth)")
    add("--stage", choices=STAGES, default="both", help="which stages to train (both)")
    add("--loss", choices=LOSSES, default="multi", help="what an indexer learns from (multi)")
    add("--lr", type=float, nargs="+", metavar="X", help=f"rate of the stage, or of both ({WARMUP_LR} {SPARSE_LR})")
    add("--batch", type=int, default=4, metavar="N", help="sequences of one step (4)")
    add("--seq-len", type=int, metavar="N", help="tokens of a sequence (8 times top-k)")
    add("--accumulate", type=int, default=1, metavar="N", help="compute a step's batch in so many parts (1)")
    add("--remat", action="store_true", help="keep less for the backward pass, compute it again")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of computation; masters are float32")
    add("--mesh", metavar="AXES", help="devices that share a batch, for instance data=2")
    add("--save-every", type=int, default=100, metavar="N", help="steps between saved states (100)")
    add("--resume", action="store_true", help="continue an interrupted run, to the same weights")
    add("--seed", type=cli.natural, default=0, help="the same seed takes the text in the same order (0)")
    add("--json", action="store_true", help="one JSON object on the last line of stdout")
    cli.add_common_flags(parser)
    return parser


def main(argv=None) -> int:
    """Exit status of ``ic-jax distill``."""
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
