"""Writes parameters as a Hugging Face checkpoint: config.json, shards and their index, through convert's one table."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from convert import mapping

from ..config import Config

SHARD_BYTES = 14 * 10**6


def hf_tensors(c: Config, params: dict) -> dict[str, np.ndarray]:
    """Every tensor under its Hugging Face name and in its layout."""
    out: dict[str, np.ndarray] = {}
    for rule in mapping.TABLE:
        stack = np.asarray(functools.reduce(lambda tree, key: tree[key], rule.leaf.split("."), params))
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


def save_hf(directory: Path, c: Config, params: dict) -> None:
    """Writes config.json, model-0000x-of-0000y.safetensors (each under 15 MB) and model.safetensors.index.json."""
    from safetensors.numpy import save

    tensors, shards, size = hf_tensors(c, params), [{}], 0
    for name, value in tensors.items():
        if size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (directory / file).write_bytes(save(shard, metadata={"format": "pt"}))
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in tensors.values())}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")
    # transformers needs the number of key heads spelt out; MLA has one latent for all.
    config = c.to_hf() | {"dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
