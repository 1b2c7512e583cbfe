"""Both directions of conversion: Hugging Face safetensors to our Orbax directories, and back.

Work is done in DST.incomplete, unit by unit (an Orbax group, a shard), each noted in a journal with checksums once it
is on the disk; DST appears by one rename at the end. So what is interrupted never loads, and ``resume`` goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ic_jax import checkpoint
from ic_jax.checkpoint import PIECE, Entry
from ic_jax.config import Config
from ic_jax.errors import UserError

from . import mapping, safetensors, store
from .mapping import Part


def entries(source, config: Config) -> list[Entry]:
    """Every entry of a checkpoint, ordered by layer: the model's, all indexers present, and the MTP tensors.

    Raises UserError for whatever loading would refuse.
    """
    from ic_jax.model import abstract_params

    present = mapping.indexer_layers(source.tensors, config)
    if config.has_indexer:
        config.pattern.slots(present)
    shapes = dict(checkpoint.flatten(abstract_params(config, len(present))[0]))
    found: list[tuple[int, Entry]] = []
    for rule in mapping.TABLE:
        if rule.leaf in shapes:
            shape = shapes[rule.leaf].shape[1:] if rule.group else shapes[rule.leaf].shape
            for layer in rule.layers(config, present):
                found.append((-1 if layer is None else layer, Entry.of(source, config, rule, layer, shape)))
    for name, tensor in source.tensors.items():
        scale = name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in source.tensors
        if mapping.is_mtp(name, config) and not scale:
            found.append((mapping.layer_of(name), Entry.whole(source, name, tensor.shape)))
    return [entry for _, entry in sorted(found, key=lambda pair: pair[0])]


class _Block(NamedTuple):
    """Rows of an entry that are stored as one array called ``key``."""

    entry: Entry
    start: tuple[int, ...]
    size: tuple[int, ...]
    dtype: np.dtype
    key: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        return self.entry.array(self.start, self.size, self.dtype)


def target_dtype(entry: Entry, dtype: str | None) -> np.dtype:
    """The dtype an entry is stored in: its own or ``dtype``; FP8 becomes bfloat16, what steers selection stays."""
    if entry.quantized:
        return store.STORED[dtype or "bfloat16"]
    return store.STORED[dtype] if dtype and not mapping.keeps_dtype(entry.name) else entry.dtype


@dataclasses.dataclass
class Plan:
    """What a conversion will write: ``units`` of (name, things, bytes), and the lines to tell the user."""

    units: list[tuple[str, list, int]]
    notes: list[str]
    write: Callable[[], None]

    @property
    def nbytes(self) -> int:
        return sum(size for *_, size in self.units)


def _prepare(source: Path, destination: Path, kind: str) -> None:
    native = (source / store.MANIFEST).exists()
    if native and kind == "hf-to-jax":
        raise UserError(f"{source} is already converted; hf-to-jax reads a Hugging Face directory")
    if not native and kind == "jax-to-hf":
        raise UserError(f"{source} is not one of our directories (it has no {store.MANIFEST}); jax-to-hf reads those")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} already exists and is not empty; give another directory")


def _fingerprint(reader, *options) -> str:
    """Changes when the source's tensors or files, or the options, do."""
    files = {t.file for t in reader.tensors.values() if t.file.is_file()} or {reader.directory / store.MANIFEST}
    stats = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    tensors = sorted((n, t.dtype, t.shape, t.offset) for n, t in reader.tensors.items())
    return hashlib.sha256(json.dumps([store.FORMAT, options, stats, tensors]).encode()).hexdigest()


def _work(destination: Path, fingerprint: str, resume: bool) -> store.Work:
    try:
        return store.Work(destination, fingerprint, resume)
    except OSError as e:
        raise UserError(f"{destination} cannot be written: {e.strerror or e}") from e


def _room(work: store.Work, needed: int) -> None:
    free = shutil.disk_usage(work.directory).free
    if needed * 1.01 > free:
        if not work.done:
            shutil.rmtree(work.directory)
        raise UserError(
            f"{work.destination} needs {safetensors.human(needed)} more, {safetensors.human(free)} are free there"
        )


def _guarded(work: store.Work, do: Callable, *args):
    """``do(*args)``, where a failure to write becomes one line; Orbax and TensorStore raise errors of many kinds."""
    try:
        return do(*args)
    except UserError:
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {store.first_line(e)}" if not isinstance(e, OSError) else e.strerror or e
        raise UserError(f"writing {work.directory} failed ({reason}); make room and continue with --resume") from e


def hf_to_jax(source: Path, destination: Path, dtype: str | None = None, resume=False, progress=None) -> Plan:
    """The Plan to convert a Hugging Face directory; its ``write()`` does it.

    Args:
      dtype: "bfloat16" or "float32" for all weights, None to keep each tensor's own (FP8 becomes bfloat16).
      resume: continue an interrupted conversion, after checking what it wrote.
    """
    _prepare(source, destination, "hf-to-jax")
    config, report = Config.load(source), progress or (lambda done, total, note: None)
    reader = safetensors.Reader(source)
    every = entries(reader, config)

    def blocks():
        for entry in every:
            boxes = list(entry.blocks())
            for start, size in boxes:
                key = entry.name if len(boxes) == 1 else f"{entry.name}@{start[0]}"
                block = _Block(entry, start, size, target_dtype(entry, dtype), key)
                yield block, block.nbytes

    units = [(f"{i:05}", run, size) for i, (run, size) in enumerate(safetensors.groups(blocks(), store.GROUP))]
    mtp = sum(mapping.is_mtp(e.name, config) for e in every)
    notes = [f"carrying {mtp} tensors of the multi-token-prediction layer"] if mtp else []
    notes += checkpoint.notes(reader, config, mtp=False)

    def write(work):
        for path in (work.directory / "weights").glob("*"):
            if path.name not in work.done:
                shutil.rmtree(path)  # what Orbax had not finished when it was killed
        done, total = 0, sum(size for *_, size in units)
        _room(work, total - sum(size for unit, _, size in units if unit in work.done))
        records = {}
        for unit, run, size in units:
            crc = work.done.get(unit, {}).get("crc")
            if not _intact(work, unit, run, crc):
                arrays = {block.key: block.read() for block in run}
                crc = _guarded(work, store.write_group, work.directory, unit, arrays)
                del arrays
                _guarded(work, work.note, unit, {"crc": crc})
            for b in run:
                whole = b.entry.oriented(b.entry.view)
                record = records.setdefault(b.entry.name, {"dtype": str(b.dtype), "shape": whole, "pieces": []})
                row, rows = (b.start[0], b.size[0]) if b.size else (0, 1)
                record["pieces"].append({"group": unit, "key": b.key, "row": row, "rows": rows, "crc": crc[b.key]})
            done += size
            report(done, total, "")
        manifest = {"format": store.FORMAT, "fused": reader.fused, "entries": records}
        config_json = _config_json(source, dtype, any(e.quantized for e in every))
        _guarded(work, work.finish, source, config_json, {store.MANIFEST: json.dumps(manifest)})

    return Plan(units, notes, _writing(write, reader, destination, resume, "hf-to-jax", dtype, store.GROUP))


def _intact(work: store.Work, unit: str, run: list[_Block], crc) -> bool:
    """Whether a group holds what was written, by the checksums in the journal; ``crc`` may be anything else."""
    if not isinstance(crc, dict):
        return False
    arrays = store.Arrays(work.directory)
    for block in run:
        out = np.empty(block.entry.oriented(block.size), block.dtype)
        try:
            arrays.read_into(unit, block.key, out.shape, (0,) * out.ndim, out)
        except UserError:
            return False
        if store.checksum(out) != crc.get(block.key):
            return False
    return True


def _writing(write: Callable[[store.Work], None], reader, destination: Path, resume: bool, *options):
    def run():
        with reader, _work(destination, _fingerprint(reader, *options), resume) as work:
            work.rename() if work.complete else write(work)

    return run


def _config_json(source: Path, dtype: str | None, dequantized: bool) -> str:
    """config.json as it is, or saying that the weights are no longer quantised or of another dtype."""
    text = (source / "config.json").read_text(encoding="utf-8")
    if dtype is None and not dequantized:
        return text
    data = json.loads(text)
    if dequantized:
        data.pop("quantization_config", None)
    for name in [n for n in ("dtype", "torch_dtype") if n in data] or ["dtype"]:
        data[name] = dtype or "bfloat16"
    return json.dumps(data, indent=2) + "\n"


@dataclasses.dataclass
class _Tensor:
    """A Hugging Face tensor to write: which parts of it come from which entries (whose view is transposed or not)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: list[tuple[Entry, bool, Part]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[np.ndarray]:
        """The tensor, row block by row block."""
        columns = self.shape[1:]
        step = max(1, PIECE // max(1, math.prod(columns) * self.dtype.itemsize))
        for row in range(0, self.shape[0], step) if self.shape else (None,):
            size = () if row is None else (min(step, self.shape[0] - row), *columns)
            out = np.empty(size, self.dtype)
            for entry, transposed, part in self.parts:
                self._fill(out, row, entry, transposed, part)
            yield out

    def _fill(self, out, row, entry, transposed, part) -> None:
        lead = len(part.at) - len(part.size)
        if row is None:
            low, high = part.start, part.start
        else:
            low = (max(row, part.start[0]), *part.start[1:])
            ends = tuple(s + n for s, n in zip(part.start, part.size, strict=True))
            high = (min(row + out.shape[0], ends[0]), *ends[1:])
            if low[0] >= high[0]:
                return
        at = (*part.at[:lead], *(a + lo - s for a, lo, s in zip(part.at[lead:], low, part.start, strict=True)))
        size = (*(1,) * lead, *(hi - lo for lo, hi in zip(low, high, strict=True)))
        swap = (lambda t: (*t[:-2], t[-1], t[-2])) if transposed else (lambda t: t)
        values = entry.read(swap(at), swap(size)).values
        values = values.swapaxes(-1, -2) if transposed else values
        where = tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True))
        where = () if row is None else (slice(low[0] - row, high[0] - row), *where[1:])
        out[where] = values.reshape(size[lead:])


def _tensors(reader: store.Store, config: Config) -> list[_Tensor]:
    """The Hugging Face tensors of one of our directories, in model order: the mapping table read backwards."""
    every = {entry.name: entry for entry in entries(reader, config)}
    found: dict[str, _Tensor] = {}
    present = mapping.indexer_layers(reader.tensors, config)
    for rule in mapping.TABLE:
        for layer in rule.layers(config, present):
            entry = every.pop(rule.entry(layer), None)
            if entry is None:
                continue
            for part in mapping.parts(rule, layer, rule.view_shape(entry.view), config, reader.fused):
                tensor = found.setdefault(part.name, _Tensor(part.name, part.shape, entry.dtype, []))
                tensor.parts.append((entry, rule.transposed, part))
    for name, entry in every.items():  # MTP tensors, under their own names
        found[name] = _Tensor(name, entry.view, entry.dtype, [(entry, False, entry.parts[0])])

    def place(tensor):
        layer = mapping.layer_of(tensor.name)
        return (-1 if "embed_tokens" in tensor.name else math.inf) if layer is None else layer

    return sorted(found.values(), key=place)


def jax_to_hf(source: Path, destination: Path, max_shard_size: int = 5 * 10**9, resume=False, progress=None) -> Plan:
    """The Plan to write one of our directories as Hugging Face safetensors; its ``write()`` does it."""
    _prepare(source, destination, "jax-to-hf")
    config, report = Config.load(source), progress or (lambda done, total, note: None)
    reader = checkpoint.open_source(source)
    files, index = safetensors.layout(_tensors(reader, config), max_shard_size)
    units = [(name, run, sum(t.nbytes for t in run)) for name, run in files.items()]

    def write(work):
        done, total = 0, sum(size for *_, size in units)
        _room(work, total - sum(size for unit, _, size in units if unit in work.done))
        reader.check(lambda done, total, note: report(done, 2 * total, note))  # what is written has no checksums
        for unit, run, size in units:
            path = work.directory / unit
            if unit not in work.done or not path.exists() or safetensors.file_crc(path) != work.done[unit]["crc"]:
                crc = _guarded(work, safetensors.write, path, run)
                _guarded(work, work.note, unit, {"crc": crc})
            done += size
            report(total + done, 2 * total, "")
        _guarded(work, work.finish, source, (source / "config.json").read_text(encoding="utf-8"), index)

    return Plan(units, [], _writing(write, reader, destination, resume, "jax-to-hf", max_shard_size))
