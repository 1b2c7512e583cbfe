"""Files of a distillation: the saved training state, the loss table, and the checkpoint that comes out.

    OUT.incomplete/distill.json    what the run was begun with
    OUT.incomplete/losses.csv      the table up to the last saved state
    OUT.incomplete/state/N         Orbax checkpoint of the state after step N; two until the step behind one was finite
    OUT.incomplete/model           the result while it is being written; renamed to OUT at the end
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert import export, store

from . import checkpoint, interrupts, json_file
from .config import Config
from .distill_loss import cast
from .errors import UserError

SETTINGS, TABLE = "distill.json", "losses.csv"
COLUMNS = ("step", "stage", "lr", "index_loss", "lm_loss", "seconds")
SHARD_BYTES = 5 * 10**9
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", "LICENSE*", "additional_chat_templates/*",
)  # fmt: skip


def one_line(write):
    """``write`` with failures of the file system and of Orbax, whose errors are of many kinds, as one UserError."""

    @functools.wraps(write)
    def guarded(self, *args):
        try:
            return write(self, *args)
        except UserError:
            raise
        except Exception as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else f"{type(e).__name__}: {store.first_line(e)}"
            what = f"{write.__name__} in {self.directory} failed ({reason})"
            raise UserError(f"{what}; make room and continue with --resume") from e

    return guarded


class Work(store.Owner):
    """The directory a distillation works in. ``about``: what a resumed run must have in common with it.

    Raises UserError when the destination, an unfinished run or another run is in the way, or it was begun with other
    settings.
    """

    def __init__(self, destination: Path, about: dict, resume: bool):
        self.destination = Path(destination).absolute()
        self.directory = self.destination.with_name(self.destination.name + store.INCOMPLETE)
        self.states, path = self.directory / "state", self.directory / SETTINGS
        if self.destination.exists():
            raise UserError(f"{destination} already exists; give another --out")
        if not self.destination.parent.is_dir():
            raise UserError(f"--out {destination}: {self.destination.parent} does not exist")
        if self.directory.exists() and not path.exists():
            raise UserError(f"{self.directory} is in the way, and no distillation; delete it or give another --out")
        if fresh := not self.directory.exists():
            aside = self.directory.with_name(self.directory.name + ".new")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            store.write_text(aside / SETTINGS, json.dumps(about, indent=1) + "\n")
            os.replace(aside, self.directory)
        with self.claim(self.directory):
            if self.destination.exists():  # another run has just ended
                if fresh:
                    shutil.rmtree(self.directory)
                raise UserError(f"{destination} already exists; give another --out")
            if not fresh:
                self._continue(about, resume)

    def _continue(self, about: dict, resume: bool) -> None:
        if not resume and self.latest() is None:  # it ended before it had saved anything
            return store.write_text(self.directory / SETTINGS, json.dumps(about, indent=1) + "\n")
        if not resume:
            raise UserError(f"{self.directory} holds an unfinished run; continue it with --resume, or delete it")
        begun = json_file.read(self.directory / SETTINGS)
        if other := [name for name in about if begun.get(name) != about[name]]:
            was = ", ".join(f"{name} was {begun.get(name)}, now {about[name]}" for name in other)
            raise UserError(f"{self.directory} was begun with other settings: {was}; delete it to start again")

    def latest(self) -> int | None:
        """The step after which the last state was saved whole; None when there is none."""
        return max(self._saved(), default=None)

    @interrupts.deferred()
    @one_line
    def save(self, n: int, state: dict, rows: list[dict]) -> None:
        """Save the table and the state after step ``n``. States before it stay until ``forget_before``."""
        import orbax.checkpoint as ocp

        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        store.write_text(self.directory / TABLE, text.getvalue())  # first: rows beyond a state are ignored, lost ones not
        for killed in self.states.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(killed)
        store.claim_room(self.directory, sum(a.nbytes for a in jax.tree.leaves(state)))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.states / str(n), state, force=True)

    def forget_before(self, n: int) -> None:
        """Delete the states before step ``n``: its own has proved good."""
        self._delete(lambda step: step < n)

    def forget_from(self, n: int) -> int | None:
        """Delete the states from step ``n`` on, which may be spoiled; the latest that is left."""
        self._delete(lambda step: step >= n)
        return self.latest()

    def _delete(self, which) -> None:
        for step in filter(which, self._saved()):
            shutil.rmtree(self.states / str(step))

    def _saved(self) -> list[int]:
        return [int(p.name) for p in self.states.iterdir() if p.name.isdecimal()] if self.states.is_dir() else []

    def restore(self, n: int, shapes: dict, sharding) -> dict:
        """The state after step ``n``, of ``shapes``, placed by ``sharding``."""
        import orbax.checkpoint as ocp

        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)
        path = self.states / str(n)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(path, target)
        except Exception as e:  # Orbax and TensorStore raise errors of many kinds
            raise UserError(f"{path} cannot be read: {store.first_line(e)}; delete {self.directory}") from e

    def rows(self, n: int) -> list[dict]:
        """The table up to step ``n``; a table that is not there is empty."""
        path = self.directory / TABLE
        if not path.exists():
            return []
        kinds = dict(zip(COLUMNS, (int, str, float, float, float, float), strict=True))
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [{k: kinds[k](v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]
            return [row for row in rows if row["step"] <= n]
        except (ValueError, KeyError, TypeError, csv.Error) as e:
            raise UserError(f"{path} is damaged ({store.first_line(e)}); delete it to go on with an empty table") from None

    @one_line
    def finish(self, source: Path, config: Config, params: dict) -> None:
        """Write the checkpoint of ``config``, put it in place, and delete the training state."""
        target = self.directory / "model"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        write_model(target, source, config, params)
        shutil.copyfile(self.directory / TABLE, target / TABLE)
        for path in target.rglob("*"):
            store.sync(path)
        store.sync(target)
        os.replace(target, self.destination)
        store.sync(self.destination.parent)
        shutil.rmtree(self.directory)


def write_model(target: Path, source: Path, config: Config, params: dict) -> None:
    """Write params as a Hugging Face checkpoint of ``config``: float32 where ``source`` is, else bfloat16."""
    with checkpoint.open_source(source) as reader:
        first = "embed_tokens" if reader.native else "model.embed_tokens.weight"
        dtype = "float32" if reader.dtype(first) == np.float32 else "bfloat16"
    export.write(target, config, cast(params, jnp.dtype(dtype)), config_json(source, config, dtype), SHARD_BYTES)
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            place = target / path.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)


def config_json(source: Path, config: Config, dtype: str) -> dict:
    """The source's config.json, which states the new pattern; of MTP layers and quantisation nothing is left."""
    data = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for name in ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "quantization_config"):
        data.pop(name, None)
    letters = config.pattern.layers
    if config.model_type == "deepseek_v32":  # the field that vLLM and SGLang read
        data["index_topk_pattern"] = "".join(letters)
    else:
        data["indexer_types"] = ["full" if letter == "F" else "shared" for letter in letters]
    if config.num_nextn_predict_layers:
        data["num_nextn_predict_layers"] = 0
    for name in [n for n in ("dtype", "torch_dtype") if n in data] or ["dtype"]:
        data[name] = dtype
    return data
