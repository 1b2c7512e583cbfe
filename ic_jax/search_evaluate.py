"""Losses of many patterns over the same mini-batches: each computed once, logged, and never again.

A candidate restarts from the state that enters its layer. Flow: search -> Evaluator -> calibration.Runner, Log.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert import store
from pallas_kernels import physical_rows, sparse_mla

from . import attention, calibration, cli, json_file, sharding
from . import cache as caches
from .errors import UserError
from .pattern import Pattern
from .search_methods import flip

Report = Callable[[int, int, str], None]


class Log(store.Owner):
    """Losses by (pattern letters, mini-batch): in memory, and as lines of JSON in a file when ``path`` is given.

    The first line, the header, says what the losses depend on. Lines are appended whole and synced; a line torn by a
    kill is cut off on resuming. Raises UserError when the file exists and ``resume`` is not given, when its header
    is another one, when it is damaged, or when another run has it.
    """

    def __init__(self, header: dict, path: Path | None = None, resume: bool = False):
        self.path, self.losses, failed = path, {}, None
        if path is None:
            return
        if cli.is_first_process():
            try:
                self._open(header, resume)
            except UserError as e:
                failed = str(e)
        # The file is process 0's alone: others may not see its disk.
        failed, entries = sharding.from_each((failed, [[*key, loss] for key, loss in self.losses.items()]))[0]
        if failed:
            raise UserError(failed)
        self.losses = {(pattern, batch): loss for pattern, batch, loss in entries}

    def _open(self, header: dict, resume: bool) -> None:
        path, earlier = self.path, self.path.exists()
        try:
            path.touch()
        except OSError as e:
            raise UserError(f"{path} cannot be written: {e.strerror or e}") from None
        with self.claim(path):
            if earlier and not resume:
                raise UserError(f"{path} is the log of an earlier search; continue it with --resume, or delete it")
            self._begin(header)

    def _begin(self, header: dict) -> None:
        old, path = read_header(self.path), self.path
        if old is None:
            self._write([header], fresh=True)
            return
        for key in sorted(old.keys() | header.keys()):
            if old.get(key) != header.get(key):
                raise UserError(f"{path} was made with {key} {old.get(key)}, now it is {header.get(key)}; not resumed")
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[1:-1], 2):
            try:
                entry = json_file.parse(line, path)
                key, loss = (entry["pattern"], entry["batch"]), entry["loss"]
                if [type(part) for part in (*key, loss)] != [str, int, list] or not loss:
                    raise ValueError
                self.losses[key] = [None if v is None else float(v) for v in loss]
            except (ValueError, KeyError, TypeError, OverflowError):
                raise UserError(f"{path}, line {number} is damaged; delete the file to start anew") from None
        self.losses = {k: v for k, v in self.losses.items() if None not in v}
        if lines[-1]:
            os.truncate(path, path.stat().st_size - len(lines[-1]))

    def add(self, entries: list[dict]) -> None:
        """Remember and write {pattern, batch, loss: one number a sequence} entries, all in one write."""
        for entry in entries:
            self.losses[entry["pattern"], entry["batch"]] = entry["loss"]
        if self.path is not None:
            self._write(entries)

    def _write(self, entries: list[dict], fresh: bool = False) -> None:
        if not cli.is_first_process():
            return
        # A loss that is no number becomes null: kept as evidence, evaluated again on resuming.
        text = "".join(json.dumps(cli._finite(e), allow_nan=False) + "\n" for e in entries)
        try:
            with open(self.path, "wb" if fresh else "r+b", buffering=0) as f:  # not made anew, without its header
                f.seek(0, os.SEEK_END)
                f.write(text.encode())
                os.fsync(f.fileno())
        except OSError as e:
            raise UserError(f"{self.path} cannot be written: {e.strerror or e}") from None

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self.losses

    def __getitem__(self, key: tuple[str, int]) -> list[float]:
        return self.losses[key]


def read_header(path: Path | None) -> dict | None:
    """The header of a log, None when there is no whole one. Raises UserError when it is none of a search."""
    try:
        first, newline, _ = path.read_bytes().partition(b"\n") if path else (b"", b"", b"")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    header = json_file.parse(first, f"the log of a search {path}") if newline else None
    if header and "loss" in header:
        raise UserError(f"the log of a search {path} has lost its first line; delete it to start anew")
    together = (header or {}).get("together", 1)
    if type(together) is not int or together < 1:
        raise UserError(f"the log of a search {path} is damaged: together is {together!r}")
    return header


class Evaluator:
    """Losses, in nats a token, of patterns of a model over fixed mini-batches.

    ``together``: how many candidates run on as one batch once they have reached a common layer.
    ``reuse_prefix=False`` runs every candidate from the first layer on, for measurements.
    """

    def __init__(
        self, engine, held, ids_NT: np.ndarray, *, batch: int, together: int = 1, log: Log | None = None,
        report: Report | None = None, total: int = 0, reuse_prefix: bool = True,
    ):  # fmt: skip
        self.runner = calibration.Runner(engine, ids_NT.shape[1] - 1)
        self.held, self.batches = tuple(held), list(calibration.batches(ids_NT, batch))
        self.together, self.log, self.reuse_prefix = together, log or Log({}), reuse_prefix
        self.report, self.done, self.total = report or (lambda *_: None), 0, total * len(self.batches)

    def slots(self, pattern: Pattern) -> np.ndarray:
        """The pattern as data."""
        return np.array(pattern.slots(self.held), np.int32)

    def loss(self, pattern: Pattern) -> float:
        """The loss of one pattern. Raises UserError when it is not a finite number."""
        for b, (ids, n) in enumerate(self.batches):
            if (pattern.layers, b) not in self.log:
                state = self.runner.advance(self.runner.begin(ids[:, :-1]), self.slots(pattern))
                self._record([pattern], [self.runner.sequence_losses(state, ids[:, 1:])], b, n)
        return self._mean(pattern)

    def candidates(self, pattern: Pattern, layers: list[int]) -> dict[int, float]:
        """The loss of ``pattern`` with each one of ``layers`` (ascending) shared. Raises UserError as ``loss``."""
        # Groups depend on the layers alone, not on what the log holds, so that a resumed search rounds as the first.
        size = self.together
        whole = len(layers) // size * size
        groups = [layers[i : i + size] for i in range(0, whole, size)] + [[i] for i in layers[whole:]]
        for b, (ids, n) in enumerate(self.batches):
            missing = [g for g in groups if any((flip(pattern, i).layers, b) not in self.log for i in g)]
            self._count(len(layers) - sum(map(len, missing)))
            entering, at = self.runner.begin(ids[:, :-1]) if missing else None, 0
            for group in missing:
                states, common = [], group[-1] + 1 if len(group) > 1 else None
                for layer in group:
                    if self.reuse_prefix:
                        entering, at = self.runner.advance(entering, self.slots(pattern), at, layer), layer
                    states.append(self.runner.advance(entering, self.slots(flip(pattern, layer)), at, common))
                losses = self._finish(states, self.slots(pattern), common, ids[:, 1:])
                self._record([flip(pattern, i) for i in group], losses, b, n)
                self._count(len(group))
        return {i: self._mean(flip(pattern, i)) for i in layers}

    def _finish(self, states, slots, start: int | None, targets_BS) -> list:
        """The sequence losses of each state; several are first run, as one batch, from layer ``start`` to the end."""
        if len(states) == 1:
            return [self.runner.sequence_losses(states[0], targets_BS)]
        joined = jax.tree.map(lambda *a: jnp.concatenate(a), *states)
        joined = self.runner.advance(joined, slots, start)
        losses = self.runner.sequence_losses(joined, np.tile(targets_BS, (len(states), 1)))
        return np.split(np.asarray(losses), len(states))

    def _record(self, patterns: list[Pattern], losses: list, b: int, n: int) -> None:
        losses = [[float(x) for x in np.asarray(v)[:n]] for v in losses]
        self.log.add([dict(pattern=p.layers, batch=b, loss=v) for p, v in zip(patterns, losses, strict=True)])
        for p, v in zip(patterns, losses, strict=True):
            if not np.isfinite(v).all():
                kept = f"; every evaluation so far is in {self.log.path}" if self.log.path else ""
                raise UserError(f"the loss of pattern {p} on mini-batch {b} is {np.mean(v)}: the search stops{kept}")

    def _count(self, n: int) -> None:
        self.done += n
        if n:
            self.report(self.done, self.total, "")

    def _mean(self, pattern: Pattern) -> float:
        return float(np.mean(np.concatenate([self.log[pattern.layers, b] for b in range(len(self.batches))])))

    def similarities(self, pattern: Pattern) -> np.ndarray:
        """float64 [L,L]: at [m, j], j < m, the cosine of layer m's attention output under its own selection and under
        layer j's, mean over tokens (IndexCache paper, App. C); zero elsewhere."""
        n, out = self.runner.n_layers, []
        for b, (ids, count) in enumerate(self.batches):
            state, chosen, found_LL = self.runner.begin(ids[:, :-1]), [], np.zeros((n, n))
            for m in range(n):
                after = self.runner.advance(state, self.slots(pattern), m, m + 1)
                own = self._output(state, after, m)
                for j, positions_BSK in enumerate(chosen):
                    if pattern.layers[j] == "F":
                        cosine_B = _cosine(own, self._output(state, after._replace(positions_BSK=positions_BSK), m))
                        found_LL[m, j] = float(cosine_B[:count].mean())
                chosen.append(after.positions_BSK)
                state = after
                self.report(b * n + m + 1, len(self.batches) * n, "")
            out.append(found_LL * count)
        return np.sum(out, 0) / sum(count for _, count in self.batches)

    def _output(self, entering, selecting, layer: int):
        """Values that layer ``layer`` reads from the selection of the State ``selecting``, [B,S,H·V] before o_proj."""
        r = self.runner
        args = (entering.x_BSD, selecting.positions_BSK, np.int32(layer))
        # Kernels do not divide themselves over a mesh.
        implementation = "reference" if r.mesh is not None else r.implementation
        return _attention_output(r.params, r.config, *args, implementation=implementation)


@jax.jit
def _cosine(a_BSD, b_BSD):
    """float32 [B] cosine of the last axis, mean over tokens."""
    a, b = a_BSD.astype(jnp.float32), b_BSD.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return ((a * b).sum(-1) / jnp.maximum(norms, 1e-30)).mean(-1)


@functools.partial(jax.jit, static_argnames=("c", "implementation"))
def _attention_output(params, c, x_BSD, positions_BSK, layer, *, implementation):
    B, S, _ = x_BSD.shape
    p = jax.tree.map(lambda a: a[layer], params["layers"])
    at_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    _, _, q_BSHU, latent_BSU = attention.project(c, p, x_BSD, attention.rope_tables(c, at_BS))
    one_layer = c.replace(num_hidden_layers=1)
    cache = caches.allocate(one_layer, 0, B, S, dtype=latent_BSU.dtype, implementation=implementation)
    rows_BS = physical_rows(cache.page_table_BP, at_BS, cache.page_size)
    pool = cache.write_latents(0, rows_BS, latent_BSU).latent_LMU
    rows_BSK = physical_rows(cache.page_table_BP, positions_BSK, cache.page_size)
    kernel = dict(scale=c.softmax_scale, value_dim=c.kv_lora_rank, implementation=implementation)
    o_BSHC, _ = sparse_mla(q_BSHU, pool, 0, rows_BSK, **kernel)
    return jnp.einsum("bshc,hvc->bshv", o_BSHC, p["v_b_proj"]).reshape(B, S, -1)
