"""Choosing the next token: validated parameters, and one jitted function for a batch of differing sequences.

Flow: engine's logits_BW + Batch -> ``sample`` -> ids_B. A sequence's tokens depend on its own logits, parameters, seed
and positions only, never on what else is in the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled; raises UserError for a value that makes no sense.

    temperature: 0 takes the likeliest token. top_p, top_k, min_p: keep the smallest set of tokens with that
    probability, that many tokens, those at least that fraction of the likeliest; 1, 0 and 0 keep all. seed: 64 bits;
    the same seed gives the same tokens. stop: strings that end the text and are not shown (one string: a list of one).
    stop_token_ids: ids that end it, beside the model's own, which ``ignore_eos`` disregards.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            several = isinstance(value, Iterable) and not isinstance(value, str)
            object.__setattr__(self, name, tuple(value) if several else (value,))
        if not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"stop must hold non-empty strings, not {self.stop!r}")
        if not all(is_int(i) and i >= 0 for i in self.stop_token_ids):
            raise UserError(f"stop_token_ids must hold token ids, not {self.stop_token_ids!r}")
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        if not (_is_number(self.temperature) and 0 <= self.temperature < 1e38):
            raise UserError(f"temperature must be a number >= 0, not {self.temperature!r} (0: the likeliest token)")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p!r} (1 keeps every token)")
        if not (is_int(self.top_k) and 0 <= self.top_k < 2**31):
            raise UserError(f"top_k must be an integer >= 0, not {self.top_k!r} (0 keeps every token)")
        if not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise UserError(f"min_p must be between 0 and 1, not {self.min_p!r} (0 keeps every token)")
        if not (is_int(self.seed) and 0 <= self.seed < 2**64):
            raise UserError(f"seed must be an integer between 0 and 2^64 - 1, not {self.seed!r}")


class Batch(NamedTuple):
    """The parameters of B sequences as arrays; rows may be replaced between steps without recompiling.

    seeds_B2: uint32 halves of the seeds, high one first. The others as in SamplingParams, float32 and int32.
    """

    seeds_B2: np.ndarray
    temperature_B: np.ndarray
    top_p_B: np.ndarray
    top_k_B: np.ndarray
    min_p_B: np.ndarray


def batch(params: Sequence[SamplingParams]) -> Batch:
    """The Batch of these sequences, as NumPy arrays."""
    return Batch(
        np.array([[int(p.seed) >> 32, int(p.seed) & 0xFFFFFFFF] for p in params], np.uint32).reshape(-1, 2),
        np.array([p.temperature for p in params], np.float32),
        np.array([p.top_p for p in params], np.float32),
        np.array([p.top_k for p in params], np.int32),
        np.array([p.min_p for p in params], np.float32),
    )


def keys_at(seeds_B2, positions_B):
    """The random keys [B] that decide the draw of the token at ``positions_B``, for ``Batch.seeds_B2``."""
    keys_B = jax.random.wrap_key_data(jnp.asarray(seeds_B2), impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys_B, jnp.asarray(positions_B))


@jax.jit
def sample(logits_BW, keys_B, temperature_B, top_p_B, top_k_B, min_p_B):
    """Sampled ids, int32 [B]; the likeliest one, lowest id first, where the temperature is 0.

    Logits are divided by the temperature, then filtered by top-k, top-p over what is left, and min-p (the order of
    transformers; min-p is relative to the likeliest token and so commutes with the other two). Equal logits rank by id.
    Sampling is Gumbel-max in vocabulary order: a filter changes a draw only by removing its token.

    Args:
      logits_BW: float32. keys_B: see ``keys_at``. The others: the fields of a Batch behind its seeds.
    """
    likeliest_B = jnp.argmax(logits_BW, -1).astype(jnp.int32)
    filtered_B = (top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0)

    def draw():
        # A row of temperature 0 is computed with 1 and thrown away.
        divisor_B = jnp.where(temperature_B > 0, temperature_B, 1)
        scaled_BW = (logits_BW - logits_BW.max(-1, keepdims=True)) / divisor_B[:, None]
        # Sorting the vocabulary costs more than the rest: skipped when no row needs it.
        kept_BW = lax.cond(
            jnp.any(filtered_B & (temperature_B > 0)),
            lambda: jnp.where(_kept(scaled_BW, top_p_B, top_k_B, min_p_B), scaled_BW, -jnp.inf),
            lambda: scaled_BW,
        )
        noise_BW = jax.vmap(lambda key: jax.random.gumbel(key, kept_BW.shape[1:], jnp.float32))(keys_B)
        drawn_B = jnp.argmax(kept_BW + noise_BW, -1).astype(jnp.int32)
        return jnp.where(temperature_B > 0, drawn_B, likeliest_B)

    return lax.cond(jnp.any(temperature_B > 0), draw, lambda: likeliest_B)


def _kept(scaled_BW, top_p_B, top_k_B, min_p_B):
    """bool [B,W]: the tokens that pass every filter. Each filter keeps a prefix of the descending order."""
    W = scaled_BW.shape[-1]
    ids_BW = lax.broadcasted_iota(jnp.int32, scaled_BW.shape, 1)
    descending_BW, order_BW = lax.sort((-scaled_BW, ids_BW), dimension=-1, is_stable=True, num_keys=1)
    weight_BW = jnp.exp(-descending_BW)  # unnormalised: the likeliest token has 1
    k_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, W), W)
    weight_BW = jnp.where(ids_BW < k_B[:, None], weight_BW, 0)
    sum_BW = jnp.cumsum(weight_BW, -1)
    before_BW = jnp.pad(sum_BW[:, :-1], ((0, 0), (1, 0)))
    # A comparison with the running sum could drop the last tokens of top_p 1 by rounding.
    in_top_p_BW = (before_BW < top_p_B[:, None] * sum_BW[:, -1:]) | (top_p_B >= 1)[:, None]
    prefix_BW = (ids_BW < k_B[:, None]) & in_top_p_BW & (weight_BW >= min_p_B[:, None])
    n_B = jnp.where(prefix_BW.all(-1), W, jnp.maximum(jnp.argmin(prefix_BW, -1), 1))
    last_B1 = n_B[:, None] - 1
    threshold_B1 = -jnp.take_along_axis(descending_BW, last_B1, -1)
    last_id_B1 = jnp.take_along_axis(order_BW, last_B1, -1)
    return (scaled_BW > threshold_B1) | ((scaled_BW == threshold_B1) & (ids_BW <= last_id_B1))


def is_int(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
