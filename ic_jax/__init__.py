"""IndexCache for DeepSeek Sparse Attention on JAX.

    import ic_jax
    lm = ic_jax.load("path-or-repo")
    for piece in lm.stream("Hello", max_tokens=64): print(piece.text, end="")

Arrays carry their shape in their name, and einsums use the same letters:
B batch · S query tokens of this call · T cached tokens · K selected tokens · D hidden · H attention heads · N nope dim ·
R rope dim · V value dim · C latent (kv_lora_rank) · U latent cache row (C + R) · Q q_lora_rank · I indexer heads ·
J indexer head dim · L layers · G full layers (slots) · E experts · X experts per token · F ffn dim · W vocabulary ·
P pages · M pool rows. In the pattern, F is a full layer and S a shared one.
"""

from __future__ import annotations

import importlib

from .config import Config
from .errors import UserError
from .pattern import Pattern

__all__ = ["Config", "LM", "Pattern", "SamplingParams", "UserError", "load"]
__version__ = "0.1.0"
# These import jax; they are fetched when first used, so that `--help` and config work stay quick.
_LAZY = {"load": "engine", "LM": "engine", "SamplingParams": "sampling"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
