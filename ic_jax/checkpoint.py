"""Checkpoints: find a directory, see what it holds, and load it straight into stacked, sharded parameters.

Two kinds of directory are read: Hugging Face safetensors, and our own (Orbax, one entry a layer and tensor, written by
``python -m convert``). Every layer is read in pieces of at most PIECE bytes, put on its device and written there into
the preallocated stack, so the host holds a few pieces whatever the size of the checkpoint.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert import mapping, safetensors
from convert.mapping import RULES, Part
from convert.store import INCOMPLETE, JOURNAL, MANIFEST, Store, first_line

from .config import Config
from .errors import UserError

PIECE = 128 << 20  # bytes of one read; AHEAD of them are in flight
AHEAD = 3
SMALL = 4 << 20  # shards of stacks up to this size are put together on the host: no program to compile
BLOCK = 128  # rows and columns that share one FP8 scale
Progress = Callable[[int, int, str], None]


def find(path_or_repo: str, weights: bool = True) -> Path:
    """The local directory of a model: an existing directory, or a Hugging Face repository, fetched to the hub's cache.

    ``weights=False`` leaves a repository's weights where they are: enough for config.json, tokenizer and index.
    Raises UserError when it is neither, or when huggingface_hub (extra ``[hf]``) is absent.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if (unfinished := path.with_name(path.name + INCOMPLETE)).is_dir():
        raise UserError(f"{path} does not exist, but {unfinished} is an unfinished conversion; finish it with --resume")
    if path.exists():
        raise UserError(f"{path_or_repo} is a file; give the directory that holds config.json and the weights")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path_or_repo)):
        raise UserError(f"{path_or_repo} does not exist; give a model directory or a repository such as zai-org/GLM-5")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{path_or_repo} is not a local directory; to fetch it from the hub: pip install 'ic-jax[hf]'"
        ) from None
    patterns = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(huggingface_hub.snapshot_download(path_or_repo, allow_patterns=patterns))
    except Exception as e:  # the hub raises its own, the network's and the file system's errors
        why = first_line(e)
        raise UserError(f"{path_or_repo} is not a local directory, and the hub did not give it: {why}") from None


def open_source(directory: str | Path):
    """A reader of either kind of directory: ``tensors``, ``dtype(name)``, ``read_into(name, start, out)``."""
    directory = Path(directory)
    if (directory / JOURNAL).exists():
        raise UserError(f"{directory} is an unfinished conversion; finish it with python -m convert … --resume")
    return Store(directory) if (directory / MANIFEST).exists() else safetensors.Reader(directory)


def indexer_layers(directory: str | Path, config: Config) -> tuple[int, ...]:
    """The layers whose indexer weights are present, ascending; reads headers only."""
    with open_source(directory) as source:
        return mapping.indexer_layers(source.tensors, config)


def sample(directory: str | Path) -> bytes:
    """A few weights, which tell apart checkpoints of one shape."""
    parts = []
    with open_source(directory) as source:
        for name in ("embed_tokens", "norm") if source.native else ("model.embed_tokens.weight", "model.norm.weight"):
            shape = source.tensors[name].shape
            out = np.empty((min(16, shape[0]), *shape[1:]), source.dtype(name))
            source.read_into(name, (0,) * len(shape), out)
            parts.append(out.tobytes())
    return b"".join(parts)


def load_params(
    directory: str | Path,
    config: Config,
    indexer_layers: Iterable[int],
    dtype="bfloat16",
    shardings: dict | None = None,
    progress: Progress | None = None,
) -> dict:
    """Parameters in the tree of ``model.abstract_params(config, len(indexer_layers), dtype)``, on their devices.

    Args:
      indexer_layers: the layers whose indexers are loaded, in the order of the stack.
      shardings: NamedShardings in the same tree; a host reads only the bytes of its own shards. Default: one device.
      progress: called with (bytes done, bytes in all, note); a note names tensors that are left out.

    Raises UserError, before any weight is read, naming the tensor and file that is missing, of another shape, or of a
    dtype or quantisation that is not supported.
    """
    from .model import abstract_params  # the model needs the kernels; listing a checkpoint does not

    indexer_layers = tuple(indexer_layers)
    shapes, _ = abstract_params(config, len(indexer_layers), jnp.dtype(dtype))
    placed = dict(flatten(shardings)) if shardings is not None else {}
    default = jnp.zeros(()).sharding
    report = progress or (lambda done, total, note: None)
    with open_source(directory) as source, concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
        stacks = {
            leaf: _Stack(source, config, RULES[leaf], struct, indexer_layers, placed.get(leaf, default))
            for leaf, struct in flatten(shapes)
        }
        small = [stack for stack in stacks.values() if stack.nbytes <= SMALL]
        jobs = [job for stack in stacks.values() if stack not in small for job in stack.jobs()]
        done, total = 0, sum(thing.nbytes for thing in (*small, *jobs))
        for note in notes(source, config):
            report(done, total, note)
        for stack, arrays in _ahead(pool, small, _Stack.read):
            stack.put_whole(arrays)
            done += stack.nbytes
            report(done, total, "")
        for job, pieces in _ahead(pool, jobs, _Job.read):
            job.stack.put(job, pieces)
            done += job.nbytes
            report(done, total, "")
        return unflatten({leaf: stack.array() for leaf, stack in stacks.items()})


def notes(source, config: Config, mtp: bool = True) -> Iterator[str]:
    """One line each about tensors that are left out: unknown ones, and those of MTP layers if ``mtp``."""
    known = None if source.native else mapping.known_names(config)
    predicting = [n for n in source.tensors if mapping.is_mtp(n, config)]
    if mtp and predicting:
        yield f"left out {len(predicting)} tensors of multi-token-prediction layer {mapping.layer_of(predicting[0])}"
    rest = (n for n in source.tensors if known and not mapping.is_mtp(n, config))
    unknown = [n for n in rest if n.removesuffix("_scale_inv") not in known]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        yield f"left out {len(unknown)} tensors this model does not use: {', '.join(unknown[:3])}{more}"


class Piece(NamedTuple):
    """A block of an entry's view; FP8 values come with their scales, a row of them for each row of values.

    ``column`` is how far the block's first column lies behind the first column of its first scale.
    """

    values: np.ndarray
    scales: np.ndarray | None = None
    column: int = 0


class Entry:
    """One layer of a leaf as it lies in a checkpoint; checked when made, read block by block.

    Raises UserError when a tensor is missing, or has another shape or a dtype or quantisation that is not supported.
    """

    def __init__(self, source, name: str, view: tuple[int, ...], parts: list[Part], transposed: bool = False):
        self.source, self.name, self.view, self.parts, self.transposed = source, name, tuple(view), parts, transposed
        for tensor, shape in dict.fromkeys((p.name, p.shape) for p in parts):
            self._check(tensor, shape)
        self.dtype = source.dtype(parts[0].name)
        self.quantized = self.dtype.itemsize == 1

    @classmethod
    def of(cls, source, config: Config, rule: mapping.Rule, layer: int | None, shape: tuple[int, ...]) -> Entry:
        """The entry of ``shape`` that ``rule`` describes, in either kind of checkpoint."""
        if source.native:
            return cls.whole(source, rule.entry(layer), tuple(shape))
        view = rule.view_shape(shape)
        parts = mapping.parts(rule, layer, view, config, source.fused)
        return cls(source, rule.entry(layer), view, parts, rule.transposed)

    @classmethod
    def whole(cls, source, name: str, shape: tuple[int, ...]) -> Entry:
        """A tensor of the checkpoint as it is."""
        zeros = (0,) * len(shape)
        return cls(source, name, shape, [Part(name, shape, zeros, shape, zeros)])

    def oriented(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A size in the view as a size in our orientation, and the other way round."""
        return (*size[:-2], size[-1], size[-2]) if self.transposed else tuple(size)

    def blocks(self, bounds=None, limit: int | None = None) -> Iterator[tuple[tuple, tuple]]:
        """(start, size) of blocks of whole rows that tile ``bounds`` (all), of at most ``limit`` (PIECE) bytes each."""
        bounds = tuple((0, n) for n in self.view) if bounds is None else bounds
        start, size = tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds)
        if not size:
            yield start, size
            return
        rows = max(1, (limit or PIECE) // max(1, math.prod(size[1:]) * self.dtype.itemsize))
        for row in range(0, size[0], rows):
            yield (start[0] + row, *start[1:]), (min(rows, size[0] - row), *size[1:])

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        tensors = self.source.tensors
        if name not in tensors:
            raise UserError(_why_missing(self.source, name))
        found, file = tensors[name].shape, tensors[name].file.name
        dtype = self.source.dtype(name)  # packed formats have other shapes: their dtype is the reason to name
        if found != expected:
            raise UserError(f"tensor {name} in {file} has shape {list(found)}, config.json asks for {list(expected)}")
        first = self.source.dtype(self.parts[0].name)
        if dtype != first:
            raise UserError(f"tensor {name} in {file} is {dtype}, but {self.parts[0].name} is {first}")
        if dtype.itemsize == 1:
            scale = mapping.scale_name(name)
            blocks = (*expected[:-2], *(-(-n // BLOCK) for n in expected[-2:]))
            if len(expected) < 2 or scale not in tensors:
                raise UserError(f"tensor {name} in {file} is FP8, but its block scales {scale} are missing")
            s = tensors[scale]
            if s.shape != blocks or s.dtype != "F32":
                raise UserError(
                    f"tensor {scale} in {s.file.name} is {s.dtype} {list(s.shape)}, expected F32 {list(blocks)} "
                    f"(blocks of {BLOCK}x{BLOCK})"
                )

    def read(self, start: tuple[int, ...], size: tuple[int, ...]) -> Piece:
        """The block of ``size`` elements of the view from ``start`` on, in the checkpoint's dtype."""
        values = np.empty(size, self.dtype)
        first = start[-1] // BLOCK if self.quantized else 0
        scales = None
        if self.quantized:
            columns = -(-(start[-1] + size[-1]) // BLOCK) - first
            # One column more than needed where blocks are aligned: the same shape for every shard.
            scales = np.ones((*size[:-1], -(-size[-1] // BLOCK) + 1), np.float32)
        for part in self.parts:
            lead = len(self.view) - len(part.size)
            extent = (1,) * lead + part.size
            low = tuple(map(max, start, part.at))
            high = tuple(min(s + n, a + e) for s, n, a, e in zip(start, size, part.at, extent, strict=True))
            if any(lo >= hi for lo, hi in zip(low, high, strict=True)):
                continue
            block = tuple(slice(lo - s, hi - s) for lo, hi, s in zip(low, high, start, strict=True))
            block = (*(s.start for s in block[:lead]), *block[lead:])
            at = tuple(lo - a + s for lo, a, s in zip(low[lead:], part.at[lead:], part.start, strict=True))
            self.source.read_into(part.name, at, values[block])
            if self.quantized:
                rows = self._scale_rows(part.name, at, values[block].shape, first, columns)
                scales[block[:-1]][..., :columns] = rows
        return Piece(values, scales, start[-1] - first * BLOCK if self.quantized else 0)

    def array(self, start: tuple[int, ...], size: tuple[int, ...], dtype) -> np.ndarray:
        """The block as an array of ``dtype`` in our orientation, dequantised on the host."""
        values, scales, column = self.read(start, size)
        values = values if scales is None else dequantize(values, scales, column, np)
        return np.asarray(values.swapaxes(-1, -2) if self.transposed else values, dtype, order="C")

    def _scale_rows(self, name, at, size, first, columns):
        """Scales of a tensor's block: for each of its rows ``columns`` scales from block ``first`` on."""
        top, bottom = at[-2] // BLOCK, -(-(at[-2] + size[-2]) // BLOCK)
        blocks = np.empty((*size[:-2], bottom - top, columns), np.float32)
        self.source.read_into(mapping.scale_name(name), (*at[:-2], top, first), blocks)
        return blocks[..., (at[-2] + np.arange(size[-2])) // BLOCK - top, :]


def _why_missing(source, name: str) -> str:
    stem = name.removesuffix(".weight")
    for suffix in ("qweight", "weight_packed", "scales", "qzeros", "g_idx", "weight_scale", "blocks", "SCB"):
        if (found := f"{stem}.{suffix}") in source.tensors:
            return (
                f"tensor {found} in {source.tensors[found].file.name} is of a quantisation that is not supported; "
                f"supported: fp8 with 128x128 blocks, or none"
            )
    return f"tensor {name} is missing from {source.directory}"


class _Job(NamedTuple):
    """One step of filling a stack: for each distinct shard (entry, start) of a block of ``size`` to put ``at``."""

    stack: _Stack
    reads: list[tuple[Entry, tuple[int, ...]]]
    size: tuple[int, ...]
    at: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(self.size) * entry.dtype.itemsize for entry, _ in self.reads)

    def read(self) -> list[Piece]:
        return [entry.read(start, self.size) for entry, start in self.reads]


class _Stack:
    """A leaf being loaded: every local device holds its shard of the stack, and all are filled in step.

    The shards lie behind each other in one array over this host's devices, so that one program places the pieces of
    all of them; devices with the same shard share what is read for it.
    """

    def __init__(self, source, config, rule, struct, indexer_layers, sharding):
        self.shape, self.dtype, self.sharding = struct.shape, struct.dtype, sharding
        self.layers = rule.layers(config, indexer_layers)
        self.stacked = self.layers != (None,)
        shape = struct.shape[1:] if self.stacked else struct.shape
        self.entries = [Entry.of(source, config, rule, layer, shape) for layer in self.layers]
        self.bounds = {}
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            self.bounds[device] = tuple(s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True))
        self.shards = list(dict.fromkeys(self.bounds.values()))
        self.local = NamedSharding(Mesh(np.array(list(self.bounds)), ("device",)), PartitionSpec("device"))
        self.buffer = None

    @property
    def nbytes(self) -> int:
        """Bytes of this host's distinct shards, as loaded."""
        return sum(math.prod(b - a for a, b in shard) for shard in self.shards) * self.dtype.itemsize

    def read(self) -> list[np.ndarray]:
        """Every distinct shard, put together on the host."""
        shards = []
        for shard in self.shards:
            out = np.empty([b - a for a, b in shard], self.dtype)
            layers, bounds = (range(*shard[0]), shard[1:]) if self.stacked else (range(1), shard)
            for layer, target in zip(layers, out if self.stacked else [out], strict=True):
                view = self.entries[layer].oriented(bounds)
                block = tuple(a for a, _ in view), tuple(b - a for a, b in view)
                target[...] = self.entries[layer].array(*block, self.dtype)
            shards.append(out)
        return shards

    def put_whole(self, shards: list[np.ndarray]) -> None:
        shards = dict(zip(self.shards, shards, strict=True))
        self.buffer = self._joined([jax.device_put(shards[b], device) for device, b in self.bounds.items()])

    def jobs(self) -> Iterator[_Job]:
        first = self.shards[0]
        for layer in range(first[0][1] - first[0][0] if self.stacked else 1):
            entries = [self.entries[shard[0][0] + layer if self.stacked else 0] for shard in self.shards]
            views = [e.oriented(s[1:] if self.stacked else s) for e, s in zip(entries, self.shards, strict=True)]
            for start, size in entries[0].blocks(views[0], PIECE // len(self.shards)):
                row = start[0] - views[0][0][0]
                starts = [(view[0][0] + row, *(a for a, _ in view[1:])) for view in views]
                at = (layer,) * self.stacked + (row,) + (0,) * (len(size) - 1)
                yield _Job(self, list(zip(entries, starts, strict=True)), size, at)

    def put(self, job: _Job, pieces: list[Piece]) -> None:
        """Place the pieces of one job; returns once the host's copies are no longer needed."""
        pieces = dict(zip(self.shards, pieces, strict=True))
        if self.buffer is None:
            self.buffer = self._zeros()
        parts = [
            tuple(jax.device_put(x, device) for x in (p.values, p.scales, np.array([p.column], np.int32)))
            for device, p in ((d, pieces[b]) for d, b in self.bounds.items())
        ]
        values, scales, column = (self._joined(arrays) for arrays in zip(*parts, strict=True))
        place = _placer(self.local.mesh, job.reads[0][0].transposed)
        self.buffer = jax.block_until_ready(place(self.buffer, values, scales, column, job.at))

    def _joined(self, arrays):
        if arrays[0] is None:
            return None
        shape = (len(arrays) * arrays[0].shape[0], *arrays[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self.local, list(arrays))

    def _zeros(self):
        shard = [b - a for a, b in self.shards[0]]
        return jnp.zeros((len(self.bounds) * shard[0], *shard[1:]), self.dtype, device=self.local)

    def array(self) -> jax.Array:
        """The loaded stack."""
        buffer = self._zeros() if self.buffer is None else self.buffer
        shards = [shard.data for shard in buffer.addressable_shards]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)


@functools.cache
def _placer(mesh: Mesh, transposed: bool):
    """place(stack, values, scales, column, at): on each device, write its piece into its shard of the stack.

    The piece is dequantised, transposed and cast there.
    """

    def place(stack, values, scales, column, at):
        values = dequantize(values, scales, column[0]) if scales is not None else values
        values = values.swapaxes(-1, -2) if transposed else values
        values = values.astype(stack.dtype).reshape((1,) * (stack.ndim - values.ndim) + values.shape)
        return lax.dynamic_update_slice(stack, values, at)

    own, same = PartitionSpec("device"), PartitionSpec()
    return jax.jit(
        jax.shard_map(place, mesh=mesh, in_specs=(own, own, own, own, same), out_specs=own), donate_argnums=0
    )


def dequantize(values, scales, column, xp=jnp):
    """float32 values of an FP8 Piece: every value times the scale of its 128x128 block."""
    columns = (column + xp.arange(values.shape[-1])) // BLOCK
    return values.astype(xp.float32) * xp.take(scales, columns, axis=-1)


def _ahead(pool, jobs: Iterable, do: Callable) -> Iterator[tuple]:
    """(job, do(job)) in order, with a few jobs being done ahead of the one handed out."""
    jobs, waiting = iter(jobs), collections.deque()
    while True:
        waiting.extend((job, pool.submit(do, job)) for job in itertools.islice(jobs, AHEAD - len(waiting)))
        if not waiting:
            return
        job, future = waiting.popleft()
        yield job, future.result()


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unflatten(flat: dict) -> dict:
    out: dict = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = functools.reduce(lambda d, k: d.setdefault(k, {}), parents, out)
        node[name] = value
    return out
