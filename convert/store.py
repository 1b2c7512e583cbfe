"""Our own checkpoints: Orbax data, one entry a layer and tensor, and the manifest that makes them loadable.

    DIR/config.json, tokenizer files…
    DIR/ic_jax.json         the manifest, written last: entries, and which rows of them lie where, with their CRC-32
    DIR/weights/00000/…     Orbax checkpoints of at most GROUP bytes, so that writing needs little memory

An entry larger than a piece is cut along its first axis. MTP tensors are entries under their Hugging Face names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ic_jax import interrupts, json_file
from ic_jax.errors import UserError

from .safetensors import DTYPES, INDEX, NAMES, Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MANIFEST = "ic_jax.json"
# A conversion works in NAME.incomplete beside its destination; while the journal is in there, it is not finished.
INCOMPLETE, JOURNAL = ".incomplete", "journal.jsonl"
FINISHED = ".finished.jsonl"  # the journal, while only the rename of the directory is missing
FORMAT = 1
GROUP = 256 << 20
CHUNK = 16 << 20  # what a sharded read fetches at least
CACHE = 128 << 20  # decoded chunks kept, since neighbouring heads and experts share them
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
STORED = {str(d): d for d in DTYPES.values() if d.itemsize > 1}  # dtypes of entries


class Arrays:
    """Arrays of the Orbax checkpoints under DIR/weights, read block by block.

    TensorStore, which Orbax itself reads through, is used directly: a host then reads just the chunks it needs.
    """

    def __init__(self, directory: Path):
        import tensorstore

        self.directory = directory
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE}})
        self._open = functools.lru_cache(maxsize=64)(self._open_array)

    def read_into(self, group: str, key: str, shape: tuple[int, ...], start: tuple[int, ...], out: np.ndarray) -> None:
        """Fill ``out`` with the block at ``start`` of the array ``key``, which must have ``shape`` and out's dtype."""
        try:
            array = self._open(group, key)
            if tuple(array.shape) != shape or array.dtype.numpy_dtype != out.dtype:
                raise ValueError(f"it is {array.dtype.name} {list(array.shape)}, expected {out.dtype} {list(shape)}")
            block = tuple(slice(s, s + n) for s, n in zip(start, out.shape, strict=True))
            out[...] = array[block].read().result()
        except (OSError, ValueError, IndexError, RuntimeError) as e:
            raise UserError(f"{key} in {self.directory}/weights/{group} cannot be read: {first_line(e)}") from None

    def _open_array(self, group: str, key: str):
        import tensorstore

        base = {"driver": "file", "path": f"{self.directory.resolve()}/weights/{group}/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"}}
        # A chunk that is not there would read as zeros.
        spec |= {"recheck_cached_data": False, "fill_missing_data_reads": False}
        return tensorstore.open(spec, read=True, context=self._context).result()


class Store:
    """Blocks of the entries of our own directory; the same interface as ``safetensors.Reader``.

    ``pieces``: for every entry its pieces, each {group, key, row, rows, crc}. ``bytes_read`` counts what was asked for.
    """

    native = True

    def __init__(self, directory: Path):
        self.directory, self.bytes_read = directory, 0
        self.arrays = Arrays(directory)
        self.tensors: dict[str, Tensor] = {}
        self.pieces: dict[str, list[dict]] = {}
        path = directory / MANIFEST
        manifest = json_file.read(path)
        try:
            format, self.fused = manifest["format"], bool(manifest["fused"])
            for name, entry in manifest["entries"].items():
                shape, pieces = tuple(entry["shape"]), entry["pieces"]
                row = 0
                for piece in pieces:
                    whole = isinstance(piece["key"], str) and isinstance(piece["crc"], int)
                    if piece["row"] != row or piece["rows"] < 0 or not piece["group"].isdecimal() or not whole:
                        raise ValueError(f"the pieces of {name} do not follow each other")
                    row += piece["rows"]
                if row != (shape[0] if shape else 1) or entry["dtype"] not in STORED:
                    raise ValueError(f"the pieces of {name} do not make {entry['dtype']} {list(shape)}")
                self.tensors[name] = Tensor(
                    directory / "weights" / pieces[0]["group"], NAMES[STORED[entry["dtype"]]], shape
                )
                self.pieces[name] = pieces
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
            raise UserError(f"{path} cannot be read: {type(e).__name__}: {first_line(e)}") from None
        if format != FORMAT:
            raise UserError(f"{directory} has format {format}, this version reads format {FORMAT}; convert it again")
        for group in sorted({p["group"] for pieces in self.pieces.values() for p in pieces}):
            if not (directory / "weights" / group).is_dir():
                raise UserError(f"{directory} lacks weights/{group}; convert it again")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.arrays._open.cache_clear()

    def check(self, progress) -> None:
        """Read everything; UserError where a checksum differs. progress: called with (bytes done, all, "")."""
        done, total = 0, sum(t.nbytes for t in self.tensors.values())
        for name, pieces in self.pieces.items():
            shape, dtype = self.tensors[name].shape, self.dtype(name)
            for piece in pieces:
                out = np.empty((piece["rows"], *shape[1:]) if shape else (), dtype)
                self.read_into(name, (piece["row"], *(0,) * (out.ndim - 1)) if shape else (), out)
                if checksum(out) != piece["crc"]:
                    raise UserError(f"{name} in {self.directory}/weights/{piece['group']} is damaged (checksum differs)")
                done += out.nbytes
                progress(done, total, "")

    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype of an entry."""
        return DTYPES[self.tensors[name].dtype]

    def read_into(self, name: str, start: tuple[int, ...], out: np.ndarray) -> None:
        """Fill ``out`` with the block of its shape that begins at ``start``."""
        shape = self.tensors[name].shape
        first, count = (start[0], out.shape[0]) if shape else (0, 1)
        for piece in self.pieces[name]:
            low, high = max(first, piece["row"]), min(first + count, piece["row"] + piece["rows"])
            if low < high:
                stored = (piece["rows"], *shape[1:]) if shape else ()
                at = (low - piece["row"], *start[1:]) if shape else ()
                target = out[low - first : high - first] if shape else out
                self.arrays.read_into(piece["group"], piece["key"], stored, at, target)
        self.bytes_read += out.nbytes


def first_line(error: Exception) -> str:
    """The first line of an exception's message, for an error of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@interrupts.deferred()
def write_group(directory: Path, group: str, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Write ``arrays`` as one Orbax checkpoint, flushed to the disk; returns the CRC-32 of each."""
    import orbax.checkpoint as ocp

    path = directory / "weights" / group
    claim_room(directory, sum(a.nbytes for a in arrays.values()))
    with ocp.PyTreeCheckpointer() as checkpointer:
        save_args = {key: ocp.SaveArgs(chunk_byte_size=CHUNK) for key in arrays}
        checkpointer.save(path.resolve(), arrays, save_args=save_args, force=True)
    for folder, _, files in os.walk(path):
        for name in (*files, "."):
            sync(Path(folder, name))
    sync(path.parent)
    return {key: checksum(array) for key, array in arrays.items()}


def claim_room(directory: Path, nbytes: int) -> None:
    """OSError when ``directory`` has no room for ``nbytes`` of arrays: Orbax would say so in pages of tracebacks."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with tempfile.TemporaryFile(dir=directory) as f:
        os.posix_fallocate(f.fileno(), 0, nbytes + nbytes // 32 + (1 << 20))


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in row order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Within it, the file or directory ``path`` belongs to this run; UserError when it belongs to another one."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.stat(path), os.fstat(descriptor))  # else it was renamed meanwhile
        except OSError as e:
            free = not isinstance(e, BlockingIOError | FileNotFoundError)  # some file systems have no locks
        if not free:
            raise UserError(f"{path} is in use by another run; wait for its end, or give another output")
        yield
    finally:
        os.close(descriptor)


class Owner:
    """What has a file or directory for itself; use as a context manager."""

    _claim = contextlib.ExitStack()

    @contextlib.contextmanager
    def claim(self, path: Path) -> Iterator[None]:
        """``claimed``, and beyond the end of this block to that of the object's own, unless something is raised here."""
        with contextlib.ExitStack() as claim:
            claim.enter_context(claimed(path))
            yield
            self._claim = claim.pop_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._claim.close()


class Work(Owner):
    """The directory that a conversion works in, and the journal of its finished units."""

    def __init__(self, destination: Path, fingerprint: str, resume: bool):
        self.destination = destination = destination.absolute()
        self.directory = destination.with_name(destination.name + INCOMPLETE)
        self.journal = self.directory / JOURNAL
        self.done: dict[str, dict] = {}
        self.complete = False  # all is written and only the rename is missing
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.claim(self.directory):
            self._begin(fingerprint, resume)

    def _begin(self, fingerprint: str, resume: bool) -> None:
        finished = self.directory / FINISHED
        self.complete = finished.exists()
        fresh = not self.complete and not self.journal.exists()
        if self.destination.exists() and any(self.destination.iterdir()):  # the run that made it has just ended
            if fresh:
                shutil.rmtree(self.directory)
            raise UserError(f"{self.destination} already exists and is not empty; give another directory")
        if not fresh and not resume:
            raise UserError(f"{self.directory} holds an unfinished conversion; continue it with --resume, or delete it")
        if fresh:
            for path in self.directory.iterdir():  # of a run that was killed before it had written anything that counts
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_text(self.journal, json.dumps({"fingerprint": fingerprint}) + "\n")
            return
        lines, journal = [], finished if self.complete else self.journal
        for line in journal.read_bytes().splitlines():
            try:
                lines.append(json_file.parse(line, journal))
            except UserError:
                break  # the line being written when it was killed
        if not lines or lines[0].get("fingerprint") != fingerprint:
            raise UserError(
                f"{self.directory} was begun from another source or with other options; delete it to start again"
            )
        if self.complete:
            return
        lines[1:] = [line for line in lines[1:] if isinstance(line.get("unit"), str) and "crc" in line]
        self.done = {line["unit"]: line for line in lines[1:]}
        write_text(self.journal, "".join(json.dumps(line) + "\n" for line in lines))

    def note(self, unit: str, record: dict) -> None:
        """Journal a unit that is safely on the disk."""
        with open(self.journal, "a", encoding="utf-8") as f:
            f.write(json.dumps({"unit": unit, **record}) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def finish(self, source: Path, config_json: str, last: dict[str, str]) -> None:
        """Copy the small files (tokenizer…), write config.json and ``last``, and put the directory in place."""
        templates = source / "additional_chat_templates"
        for path in sorted((*source.iterdir(), *(templates.iterdir() if templates.is_dir() else ()))):
            name = path.name
            skip = name in ("config.json", MANIFEST, INDEX) or name.endswith((*_WEIGHTS, ".py"))
            if path.is_file() and not skip and not name.startswith(".") and not name.endswith(".index.json"):
                to = self.directory / path.relative_to(source)
                to.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, to)
                sync(to)
        for name, text in {"config.json": config_json, **last}.items():
            write_text(self.directory / name, text)
        os.replace(self.journal, self.directory / FINISHED)
        sync(self.directory)
        self.rename()

    def rename(self) -> None:
        """The last step: the finished directory gets its name."""
        os.replace(self.directory, self.destination)
        sync(self.destination.parent)
        (self.destination / FINISHED).unlink()
