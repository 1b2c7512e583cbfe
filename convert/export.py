"""Parameters in memory as a Hugging Face checkpoint: config.json, shards and their index, through the one table."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ic_jax.config import Config

from . import mapping, safetensors, store


@dataclasses.dataclass
class _Tensor:
    name: str
    value: np.ndarray

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    nbytes = property(lambda self: self.value.nbytes)

    def blocks(self) -> Iterator[np.ndarray]:
        yield np.ascontiguousarray(self.value)


def write(directory: Path, c: Config, params: dict, config_json: dict, shard_bytes: int) -> None:
    """Write ``params``, which the host can read whole, and ``config_json`` into ``directory``.

    params hold an indexer for each full layer of ``c``; files have at most ``shard_bytes``, or one tensor.
    """
    tensors = [_Tensor(name, value) for name, value in _hf_tensors(c, params).items()]
    files, index = safetensors.layout(tensors, shard_bytes)
    for name, run in files.items():
        safetensors.write(directory / name, run)
    for name, text in (index | {"config.json": json.dumps(config_json, indent=2)}).items():
        store.write_text(directory / name, text + "\n")


def _hf_tensors(c: Config, params: dict) -> dict[str, np.ndarray]:
    """Every tensor under its Hugging Face name and in its layout."""
    out: dict[str, np.ndarray] = {}
    for rule in mapping.TABLE:
        path = rule.leaf.split(".")
        if path[0] not in params:  # a model without dense layers, experts or indexers
            continue
        stack = np.asarray(functools.reduce(lambda tree, key: tree[key], path, params))
        for i, layer in enumerate(rule.layers(c, c.pattern.full_layers)):
            entry = stack if layer is None else stack[i]
            view = entry.swapaxes(-1, -2) if rule.transposed else entry
            for part in mapping.parts(rule, layer, view.shape, c, fused=False):
                block = view[tuple(slice(a, a + n) for a, n in zip(part.at, _extents(part, view), strict=True))]
                tensor = out.setdefault(part.name, np.zeros(part.shape, view.dtype))
                place = tuple(slice(s, s + n) for s, n in zip(part.start, part.size, strict=True))
                tensor[place] = block.reshape(part.size)
    return out


def _extents(part: mapping.Part, view: np.ndarray) -> tuple[int, ...]:
    """The part's size over the view's axes: leading axes that the tensor lacks have extent 1."""
    return (1,) * (view.ndim - len(part.size)) + tuple(part.size)
