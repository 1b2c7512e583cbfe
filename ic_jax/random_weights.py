"""Models without a checkpoint: the shapes of a preset with random weights, made on the device from a seed.

Speed depends on weights in one way only: which tokens are selected. With natural random weights neighbouring queries
have little in common, in trained models 80-90 % of their selections; ``alike`` rescales random weights until they do.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from . import info, model, sharding
from .config import Config
from .engine import Engine, _free_bytes, default_chunk
from .errors import UserError
from .pattern import Pattern


def engine(
    config: Config, pattern: Pattern | None, *, seed: int = 0, neighbours: float = 0.0, dtype: str = "bfloat16",
    index_dtype: str | None = None, implementation: str = "auto", max_context: int | None = None,
    prefill_chunk: int | None = None, mesh: str | None = None,
) -> Engine:  # fmt: skip
    """An Engine with random weights and an indexer for each F of ``pattern`` (None: no indexer, dense attention).

    neighbours: see ``alike``; 0 leaves the weights as they are drawn. Raises UserError when they cannot fit in memory.
    """
    if implementation in ("gpu", "tpu"):
        info.implementations(config, implementation, dense=pattern is None, dtype=dtype, index_dtype=index_dtype)
    slots = pattern.n_full if pattern else 0
    sizes = {} if mesh is None else sharding.parse_mesh(mesh)
    sharding.check_mesh(config, sizes)
    device_mesh = sharding.make_mesh(sizes) if sizes else None
    need = sharding.bytes_per_device(*model.abstract_params(config, slots, jnp.dtype(dtype)), sizes)
    free = _free_bytes()
    if free is not None and need > free:
        raise UserError(f"the weights need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    # The "rbg" generator is the device's own: twice as quick to compile as the default.
    params = model.init_params(config, slots, jax.random.key(seed, impl="rbg"), jnp.dtype(dtype), device_mesh)
    if neighbours:
        params = alike(params, config, neighbours)
    return Engine(
        params, config, pattern.slots(pattern.full_layers) if pattern else (-1,) * config.num_hidden_layers,
        max_context=max_context or config.max_position_embeddings,
        prefill_chunk=prefill_chunk or default_chunk(sizes),
        dtype=jnp.dtype(dtype), index_dtype=index_dtype, dense=pattern is None, implementation=implementation,
        mesh=device_mesh,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="config", donate_argnames="params")
def alike(params: dict, config: Config, ratio):
    """Random weights, rescaled in place so that neighbouring queries select alike: the indexer's query and its head
    weights become a constant plus the token's own part, the constant ``ratio`` times as large.

    Four scalings do it. Embeddings get unit size and what layers add to them stays small, so that every layer sees about
    the same input; channel 0 of every embedding is 1, a constant that passes through all layers; and the columns of
    ``q_a_proj`` and ``weights_proj`` that read it are enlarged. Routing sees one channel in ``hidden_size`` of this.
    Scores of neighbours then correlate by about r²/(1 + r²), less what rope turns in a step (0.987 for 64 of 128
    dimensions at theta 1e6), and selections still drift along the prompt. Layer 0 of the 30B shape: 89, 87 and 86 % shared
    over 60K, 120K and 200K tokens at ratio 64, 88 % over 10K at ratio 10 (benchmarks/results/neighbours.md).
    """
    D, L = config.hidden_size, config.num_hidden_layers
    unit, small, gain = 1 / 0.02, (2 * L) ** -0.5, ratio * D**0.5
    scale = lambda tree, name, by: tree | {name: (tree[name] * jnp.asarray(by, tree[name].dtype))}
    column = lambda tree, name: tree | {name: tree[name].at[..., 0].multiply(jnp.asarray(gain, tree[name].dtype))}
    params = dict(params)
    params["embed_tokens"] = (params["embed_tokens"] * jnp.asarray(unit, params["embed_tokens"].dtype)).at[:, 0].set(1)
    params["layers"] = column(scale(params["layers"], "o_proj", small), "q_a_proj")
    if "indexer" in params:
        params["indexer"] = column(params["indexer"], "weights_proj")
    if "dense" in params:
        params["dense"] = scale(params["dense"], "down_proj", small)
    if "experts" in params:
        experts = scale(params["experts"], "down_proj", small)
        params["experts"] = experts | {"shared": scale(experts["shared"], "down_proj", small)}
    return params


def ratio_for(tokens: int, top_k: int) -> float:
    """The ratio at which neighbours share 80-90 % on average over ``tokens`` tokens; short prompts share more anyway."""
    return 10.0 if tokens <= 8 * top_k else 64.0
