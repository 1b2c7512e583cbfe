"""What a step must compute and move, counted from a Config, and how fast a chip could do that at best.

Flow: Config + pattern + (queries, cached tokens, batch) -> ``step`` -> one Part a kind of work -> ``seconds`` on a Chip.
Plain Python: nothing here imports JAX, so memory and time of a model are known before anything loads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .config import Config
from .errors import UserError
from .pattern import Pattern


class Chip(NamedTuple):
    """Dense matrix rates in TFLOP/s, memory bandwidth in TB/s and memory in GB of one chip, as its maker states them."""

    bf16: float
    fp8: float
    hbm: float
    memory: float


# fp8 is the bf16 rate where the matrix unit has no fp8 of its own.
CHIPS = {
    "h100": Chip(989.4, 1978.9, 3.35, 80),  # NVIDIA H100 data sheet, SXM5, without sparsity
    "h200": Chip(989.4, 1978.9, 4.8, 141),  # NVIDIA H200 data sheet, SXM, without sparsity
    "v5e": Chip(197, 197, 0.819, 16),  # cloud.google.com/tpu/docs/v5e
    "v5p": Chip(459, 459, 2.765, 95),  # cloud.google.com/tpu/docs/v5p
    "v6e": Chip(918, 918, 1.64, 32),  # cloud.google.com/tpu/docs/v6e
    "v7x": Chip(2307, 4614, 7.38, 192),  # cloud.google.com/tpu/docs/tpu7x
}
_DEVICES = {"v7x": 2}  # JAX devices a chip, where not one
# What jax calls the devices of a chip, the first match counts ("TPU v5 lite" before "TPU v5").
_KINDS = {"h200": "h200", "h100": "h100", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e", "tpu7": "v7x"}


def chip_of(device_kind: str) -> str | None:
    """The name in CHIPS of a device as ``jax.Device.device_kind`` gives it; None for one that is not listed."""
    return next((chip for kind, chip in _KINDS.items() if kind in device_kind.lower()), None)


class Part(NamedTuple):
    """One kind of work of a step.

    flops: two a multiply-add. moved: bytes that memory must move at least, weights and caches read once.
    gathered: bytes that attention fetches if queries share nothing. fp8: whether the products may run in fp8.
    """

    flops: float = 0.0
    moved: float = 0.0
    gathered: float = 0.0
    fp8: bool = False


def parameters(c: Config, slots: int) -> dict[str, int]:
    """Number of parameters of each kind, all layers together, with ``slots`` indexers; norms and biases count."""
    L, D, Q, C, R = c.num_hidden_layers, c.hidden_size, c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim
    H, N, V, F, E = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.moe_intermediate_size, c.n_routed_experts
    dense, slots = c.mlp_layer_types.count("dense"), slots if c.has_indexer else 0
    sparse = L - dense
    return {
        "embed": c.vocab_size * D,
        "head": c.vocab_size * D,
        "projections": L * (Q * D + H * (N + R) * Q + (C + R) * D + H * (N + V) * C + D * H * V),
        "index_projections": slots * _indexer(c),
        "dense_ffn": dense * 3 * D * c.intermediate_size,
        "router": sparse * E * D,
        "experts": sparse * E * 3 * D * F,
        "shared_experts": sparse * 3 * D * F * c.n_shared_experts,
        "norms": L * (2 * D + Q + C) + D + slots * 2 * c.index_head_dim + sparse * E,
    }


def _indexer(c: Config) -> int:
    return c.index_n_heads * c.index_head_dim * c.q_lora_rank + (c.index_head_dim + c.index_n_heads) * c.hidden_size


def step(
    c: Config, pattern: Pattern | None, queries: int, start: int, *, batch: int = 1, itemsize: int = 2,
    index_itemsize: int = 2,
) -> dict[str, Part]:  # fmt: skip
    """The work of one call: ``queries`` tokens of each of ``batch`` sequences behind ``start`` cached ones.

    pattern: None attends to every token and runs no indexer. itemsize, index_itemsize: bytes of weights and latents, and
    of index keys (1: fp8 with a float32 scale a token). A query scores only where it sees more than top-k tokens.
    Routing is taken as uniform: of E experts, E·(1 - (1 - X/E)^tokens) are read.
    """
    L, D, U, H = c.num_hidden_layers, c.hidden_size, c.latent_dim, c.num_attention_heads
    tokens, stop = batch * queries, start + queries
    full = pattern.n_full if pattern else 0
    K = c.index_topk if pattern else stop
    count, key = parameters(c, full), c.index_head_dim * index_itemsize + (4 if index_itemsize == 1 else 0)
    visible = lambda first: (first + 1 + stop) * (stop - first) / 2 if first < stop else 0.0  # summed over queries >= first
    scored = visible(max(start, K))
    attended = visible(start) - scored + K * (stop - max(start, K) if stop > K else 0)
    X, E = c.num_experts_per_tok, c.n_routed_experts
    chosen = 1 - (1 - X / E) ** tokens
    product = lambda name: Part(2 * tokens * count[name], itemsize * count[name])
    parts = {
        "embed": Part(0, itemsize * tokens * D),
        "projections": product("projections"),
        "cache_writes": Part(0, tokens * (L * U * itemsize + full * key)),
        "index_projections": product("index_projections"),
        "index_scores": Part(
            2 * batch * full * c.index_n_heads * c.index_head_dim * scored,
            batch * full * stop * key if scored else 0, fp8=index_itemsize == 1,
        ),
        "attention": Part(
            2 * batch * L * H * (U + c.kv_lora_rank) * attended, batch * L * U * itemsize * min(stop, K * queries),
            batch * L * U * itemsize * attended,
        ),
        "dense_ffn": product("dense_ffn"),
        "router": product("router"),
        "experts": Part(2 * tokens * count["experts"] * X / E, itemsize * count["experts"] * chosen),
        "shared_experts": product("shared_experts"),
        "head": Part(2 * batch * count["head"], itemsize * count["head"]),
    }  # fmt: skip
    return {name: part for name, part in parts.items() if part.flops or part.moved}


def total(steps: Iterable[dict[str, Part]]) -> dict[str, Part]:
    """The work of several calls together."""
    out: dict[str, Part] = {}
    for parts in steps:
        for name, p in parts.items():
            q = out.get(name, Part())
            out[name] = Part(p.flops + q.flops, p.moved + q.moved, p.gathered + q.gathered, p.fp8)
    return out


def seconds(parts: dict[str, Part], chip: Chip) -> float:
    """The least time of these parts one after the other, each at the rate of the matrix unit or of memory."""
    rate = lambda p: (chip.fp8 if p.fp8 else chip.bf16) * 1e12
    return sum(max(p.flops / rate(p), p.moved / (chip.hbm * 1e12)) for p in parts.values())


def limits(name: str, devices: int = 1) -> Chip:
    """What ``devices`` JAX devices of the chip called ``name`` do together; UserError for one that is not listed."""
    if name not in CHIPS:
        raise UserError(f"no chip is called {name!r}; there are {', '.join(CHIPS)}")
    return Chip(*(v * devices / _DEVICES.get(name, 1) for v in CHIPS[name]))
