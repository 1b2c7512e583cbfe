"""Safetensors files: strict headers, reads of exactly the bytes asked for, and writes in blocks.

Nothing is trusted: a file is read only after its header, and the index over several files, passed every check here.
Reading is plain file reads into one buffer. Memory maps would count whole shards as resident, and Orbax's safetensors
layout checks neither offsets nor the index, so it would load a damaged file as wrong weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from ic_jax.errors import UserError

from .mapping import is_fused

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Dtypes that a header may name beside those; such tensors are refused only if they are needed.
_OTHER_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | _OTHER_BITS


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``dtype`` is safetensors' name, ``offset`` counts from the start of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, after checking the header against itself and the file. Raises UserError."""

    def wrong(why):
        return UserError(f"{path.name}: {why}; the file is damaged, fetch it again")

    try:
        with open(path, "rb") as f:
            total = os.fstat(f.fileno()).st_size
            length = struct.unpack("<Q", f.read(8))[0] if total >= 8 else None
            if length is None or length > min(HEADER_LIMIT, total - 8):
                found = "is missing" if length is None else f"of {length:,} bytes exceeds the file or 100 MB"
                raise wrong(f"its safetensors header {found} (file: {total:,} bytes)")
            raw = f.read(length)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise wrong(f"its safetensors header is not valid: {str(e).splitlines()[0]}") from None
    if not isinstance(header, dict):
        raise wrong("its safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, value in header.items():
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise wrong(f"tensor {name} does not have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise wrong(f"tensor {name} has the unknown dtype {dtype!r}")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise wrong(f"tensor {name} has a negative or non-integer shape or offset")
        size, odd = divmod(math.prod(shape) * _BITS[dtype], 8)
        if odd or offsets[1] - offsets[0] != size:
            raise wrong(f"tensor {name} of {dtype} {shape} needs {size:,} bytes, its offsets are {offsets}")
        tensors[name] = Tensor(path, dtype, tuple(shape), 8 + length + offsets[0])
        spans.append((*offsets, name))
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            raise wrong(f"tensor {name} {'overlaps another' if start < position else 'leaves a gap before it'}")
        position = stop
    expected = 8 + length + position
    if expected > total:
        sizes = f"expected {human(expected)}, found {human(total)}"
        if human(expected) == human(total):
            sizes = f"expected {expected:,} bytes, found {total:,}"
        raise UserError(f"shard {path.name} is truncated ({sizes}); fetch it again")
    if expected < total:
        raise wrong(f"{total - expected:,} bytes follow its last tensor")
    return tensors


def _unique(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
        seen = set()
        raise ValueError(f"duplicate name {next(n for n, _ in pairs if n in seen or seen.add(n))}")
    return out


def _naturals(value) -> bool:
    return isinstance(value, list) and len(value) <= 32 and all(type(v) is int and 0 <= v < 2**63 for v in value)


def human(size: float) -> str:
    """``4.9 GB``, ``812 kB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory: its index checked against its shards, or its files without one."""
    index = directory / INDEX
    if not index.exists():
        tensors: dict[str, Tensor] = {}
        for path in _files(directory):
            for name, tensor in read_header(path).items():
                if name in tensors:
                    raise UserError(f"tensor {name} is in both {tensors[name].file.name} and {path.name}")
                tensors[name] = tensor
        return tensors
    try:
        data = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        weight_map = data["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{index} cannot be read: {type(e).__name__}: {e}") from None
    headers = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{INDEX} names the file {file!r}; only .safetensors files beside it are allowed")
        if not (directory / file).exists():
            raise UserError(f"{INDEX} names {file}, which is not in {directory}; fetch it again")
        headers[file] = read_header(directory / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            others = [f for f, h in headers.items() if name in h]
            where = f"it is in {others[0]}" if others else "no shard has it"
            raise UserError(f"{INDEX} puts tensor {name} into {file}, but {where}")
    for file, header in headers.items():
        for name in header:
            if weight_map.get(name) != file:
                says = f"which {INDEX} puts into {weight_map[name]}" if name in weight_map else f"not in {INDEX}"
                raise UserError(f"{file} holds tensor {name}, {says}")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _files(directory: Path) -> list[Path]:
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    files = sorted(directory.glob("*.safetensors"))
    present = {f.name for f in files}
    for name in sorted(present):
        if found := re.fullmatch(r"(.*-)(\d+)-of-(\d+)\.safetensors", name):
            stem, width, count = found[1], len(found[2]), int(found[3])
            absent = (f"{stem}{i:0{width}}-of-{found[3]}.safetensors" for i in range(1, min(count, 100_000) + 1))
            if (lost := next((f for f in absent if f not in present), None)) is not None:
                raise UserError(f"shard {lost} is not in {directory}, and neither is {INDEX}; fetch them again")
    if not files:
        raise UserError(f"{directory} holds no safetensors files")
    return files


class Reader:
    """Blocks of the tensors of a Hugging Face directory; use as a context manager.

    ``tensors``: name -> Tensor. ``bytes_read`` counts the bytes of tensor data read so far.
    """

    native = False

    def __init__(self, directory: Path):
        self.directory = directory
        self.tensors = read_headers(directory)
        self.fused = is_fused(self.tensors)
        self.bytes_read = 0
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def dtype(self, name: str) -> np.dtype:
        """The numpy dtype of a tensor; UserError when it is one we do not compute with."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"tensor {name} in {tensor.file.name} has dtype {tensor.dtype}, which is not supported; "
                f"supported: {', '.join(DTYPES)}"
            )
        return DTYPES[tensor.dtype]

    def read_into(self, name: str, start: tuple[int, ...], out: np.ndarray) -> None:
        """Fill contiguous ``out`` with the block of its shape that begins at ``start``; reads no other bytes."""
        tensor = self.tensors[name]
        flat = out.reshape(-1).view(np.uint8)
        # Axes behind `run_axis` are read whole, so a run along it is one contiguous read.
        run_axis = max(out.ndim - 1, 0)
        while run_axis and out.shape[run_axis] == tensor.shape[run_axis]:
            run_axis -= 1
        strides = [math.prod(tensor.shape[i + 1 :]) * out.itemsize for i in range(out.ndim)]
        base = tensor.offset + sum(s * stride for s, stride in zip(start, strides, strict=True))
        run = math.prod(out.shape[run_axis:]) * out.itemsize
        for i, outer in enumerate(np.ndindex(*out.shape[:run_axis])):
            offset = base + sum(k * strides[axis] for axis, k in enumerate(outer))
            self._read(tensor.file, offset, flat[i * run : (i + 1) * run])

    def _read(self, file: Path, offset: int, out: np.ndarray) -> None:
        try:
            with self._lock:
                self.bytes_read += len(out)
                if file not in self._descriptors:
                    self._descriptors[file] = os.open(file, os.O_RDONLY)
                descriptor = self._descriptors[file]
            view, done = memoryview(out), 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise UserError(f"shard {file.name} became shorter while it was read")
                done += count
        except OSError as e:
            raise UserError(f"{file} cannot be read: {e.strerror}") from None


class Writable(Protocol):
    """A tensor to write, which ``blocks`` gives row block by row block."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int

    def blocks(self) -> Iterator[np.ndarray]: ...


def groups(sized: Iterator[tuple], limit: int) -> Iterator[tuple[list, int]]:
    """Runs of (thing, bytes) of at most ``limit`` bytes, or of one thing."""
    run, total = [], 0
    for thing, size in sized:
        if run and total + size > limit:
            yield run, total
            run, total = [], 0
        run.append(thing)
        total += size
    if run:
        yield run, total


def layout(tensors: Iterable[Writable], limit: int) -> tuple[dict[str, list[Writable]], dict[str, str]]:
    """({file: its tensors}, at most ``limit`` bytes in each or one tensor; {index file: its text}, empty for one file)."""
    runs = [run for run, _ in groups(((t, t.nbytes) for t in tensors), limit)]
    if len(runs) == 1:
        return {"model.safetensors": runs[0]}, {}
    files = {f"model-{i:05}-of-{len(runs):05}.safetensors": run for i, run in enumerate(runs, 1)}
    places = {t.name: name for name, run in files.items() for t in run}
    total = sum(t.nbytes for run in runs for t in run)
    return files, {INDEX: json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)}


def write(path: Path, run: list[Writable]) -> int:
    """Write one safetensors file, flushed to the disk; returns its CRC-32."""
    run = sorted(run, key=lambda t: -t.dtype.itemsize)  # wide elements first keep every tensor aligned
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for t in run:
        header[t.name] = {
            "dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes],
        }  # fmt: skip
        offset += t.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as f:
        first = struct.pack("<Q", len(raw)) + raw
        f.write(first)
        crc = zlib.crc32(first)
        for t in run:
            for block in t.blocks():
                data = block.reshape(-1).view(np.uint8)
                f.write(data)
                crc = zlib.crc32(data, crc)
        f.flush()
        os.fsync(f.fileno())
    return crc


def file_crc(path: Path) -> int:
    """CRC-32 of a file, as ``write`` returns it."""
    crc = 0
    with open(path, "rb") as f:
        while data := f.read(1 << 24):
            crc = zlib.crc32(data, crc)
    return crc
