"""The pattern file that ``search`` writes and every command's ``--index-pattern`` takes: one JSON object.

Holds the pattern with what it was made for and what it costs, so that it cannot end up on another model unnoticed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from . import json_file
from . import pattern as patterns
from .config import Config
from .errors import UserError
from .pattern import Pattern

FORMAT = "ic-jax index pattern 1"
# Fields in which a model differs from another for which a pattern was searched.
_FIELDS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "n_routed_experts", "index_topk")


def model_name(path: str | None) -> str:
    """What files and messages call the model at ``path``: the last part of it, in a hub's cache the repository's name;
    None is the demo."""
    if path is None:
        return "demo"
    *_, owner, folder, name = ("", "", *Path(os.path.abspath(path)).parts)
    return owner.split("--")[-1] if owner.startswith("models--") and folder == "snapshots" else name


def describe(config: Config, name: str) -> dict:
    """What a pattern file says about its model."""
    return {"name": name} | {field: getattr(config, field) for field in _FIELDS}


def write(path: str | Path, pattern: Pattern, config: Config, name: str, **results) -> None:
    """Write a pattern file, whole or not at all; ``results`` are further JSON values."""
    from convert.store import write_text

    content = {"format": FORMAT, "model": describe(config, name), "pattern": str(pattern), **results}
    try:
        write_text(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror or e}") from None


def read(path: str | Path, config: Config, name: str | None = None) -> Pattern:
    """The Pattern of a file that ``write`` made, for a model of Config ``config`` called ``name`` (None: not compared).

    Raises UserError when it cannot be read, is no pattern file, or was made for another model.
    """
    data = json_file.read(path, f"pattern file {path}")
    if data.get("format") != FORMAT or not isinstance(data.get("pattern"), str):
        raise UserError(f"{path} is not a pattern file of ic-jax search")
    pattern = Pattern(data["pattern"])
    if len(pattern.layers) != config.num_hidden_layers:
        raise UserError(
            f"pattern file {path} is for {len(pattern.layers)} layers, the model has {config.num_hidden_layers}"
        )
    made_for = data.get("model") if isinstance(data.get("model"), dict) else {}
    for field in _FIELDS:
        if field in made_for and made_for[field] != getattr(config, field):
            raise UserError(
                f"pattern file {path} is for another model: {made_for.get('name')} has {field} {made_for[field]}, "
                f"this one {getattr(config, field)}"
            )
    if name is not None and made_for.get("name", name) != name:
        raise UserError(
            f"pattern file {path} was searched on {made_for['name']}, this model is {name}; "
            f"to use it all the same: --index-pattern {pattern}"
        )
    return pattern


def parse(text: str, config: Config, name: str | None = None, hint: str = "") -> Pattern:
    """``pattern.parse``, which also takes the path of a pattern file (it ends in ``.json``)."""
    if text.endswith(".json"):
        return read(text, config, name)
    return patterns.parse(text, config.num_hidden_layers, hint)
