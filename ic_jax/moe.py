"""Feed-forward layers: dense SwiGLU, and routed experts with a shared one.

The router is DeepSeek-V3's "noaux_tc": sigmoid scores, a bias that only steers the choice, groups limited first.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels import expert_matmul, grouped_matmul, grouped_swiglu, has_kernel

from .attention import Stacked, linear, norm_linear
from .config import Config
from .parallel import ALONE

FEW = 16  # tokens of a call, up to which launches cost more than arithmetic
STACKS = ("gate_proj", "up_proj", "down_proj")  # the matrices of the routed experts


class Mlp(nnx.Module):
    """SwiGLU weights of ``n`` stacked layers and width ``width``."""

    def __init__(self, c: Config, n: int, width: int, init):
        D = c.hidden_size
        self.gate_proj = init.normal((n, width, D), (None, "mlp", "embed"))
        self.up_proj = init.normal((n, width, D), (None, "mlp", "embed"))
        self.down_proj = init.normal((n, D, width), (None, "embed", "mlp"))


class Experts(nnx.Module):
    """Router, routed and shared experts of ``n`` stacked layers; routed matrices are [in, out]."""

    def __init__(self, c: Config, n: int, init):
        D, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
        self.gate = init.normal((n, E, D), (None, None, "embed"))
        self.e_score_correction_bias = init.zeros((n, E), (None, None), jnp.float32)
        self.gate_proj = init.normal((n, E, D, F), (None, "expert", "embed", "mlp"))
        self.up_proj = init.normal((n, E, D, F), (None, "expert", "embed", "mlp"))
        self.down_proj = init.normal((n, E, F, D), (None, "expert", "mlp", "embed"))
        self.shared = Mlp(c, n, F * c.n_shared_experts, init)


def mlp(p, x, norm=None):
    """SwiGLU: down(silu(gate(x)) · up(x)); x [..., D], normed first where a Norm is given."""
    _, (gate, up) = norm_linear(x, norm, p["gate_proj"], p["up_proj"])
    return linear(jax.nn.silu(gate) * up, p["down_proj"])


def route(c: Config, p, logits_NE):
    """The experts each token goes to, int32 [N, X], and their float32 weights [N, X], from the router's product."""
    E = c.n_routed_experts
    scores_NE = jax.nn.sigmoid(logits_NE)
    biased_NE = scores_NE + Stacked.of(p["e_score_correction_bias"]).value
    if c.n_group > 1:
        groups = biased_NE.reshape(-1, c.n_group, E // c.n_group)
        group_scores = jax.lax.top_k(groups, min(2, E // c.n_group))[0].sum(-1)
        _, kept = jax.lax.top_k(group_scores, c.topk_group)
        keep = jax.nn.one_hot(kept, c.n_group, dtype=jnp.bool_).any(1)
        biased_NE = jnp.where(keep[..., None], groups, -jnp.inf).reshape(-1, E)
    experts_NX, weights_NX = _top(biased_NE, scores_NE, c.num_experts_per_tok)
    if c.norm_topk_prob:
        weights_NX = weights_NX / (_sum(lambda x: weights_NX[:, x], weights_NX.shape[1])[:, None] + 1e-20)
    return experts_NX, weights_NX * c.routed_scaling_factor


def _top(biased_NE, scores_NE, k: int):
    """The k experts of the largest biased scores as ``lax.top_k`` orders them, int32 [N, k], and their scores."""
    N, E = biased_NE.shape
    if N > FEW:
        _, experts_NX = jax.lax.top_k(biased_NE, k)
        return experts_NX, jnp.take_along_axis(scores_NE, experts_NX, -1)
    # Ranks by counting: fewer and shorter launches than a sort.
    expert_E, one, other = jnp.arange(E, dtype=jnp.int32), biased_NE[:, :, None], biased_NE[:, None, :]
    ahead_NEE = (other > one) | ((other == one) & (expert_E < expert_E[:, None]))
    is_NXE = ahead_NEE.sum(-1, dtype=jnp.int32)[:, None] == jnp.arange(k)[:, None]
    return tuple(jnp.where(is_NXE, a, 0).sum(-1) for a in (expert_E, scores_NE[:, None]))


def _sum(part, count: int):
    """part(0) + part(1) + ...: unlike a reduction, XLA fuses that with what comes before and next."""
    return functools.reduce(jnp.add, map(part, range(count)))


def experts(c: Config, p, stacks, layer, x_BSD, norm=None, *, implementation="auto", parallel=ALONE):
    """Routed plus shared experts on x [B,S,D], normed first where a Norm is given.

    ``p``: one layer's small weights; ``stacks``: the stacked expert matrices (STACKS), read at ``layer`` inside the
    product; of a divided model this device's experts and columns."""
    held, shared = stacks["down_proj"].shape[1], p["shared"]
    with jax.named_scope("router"):
        products = shared["gate_proj"], shared["up_proj"], p["gate"]
        h_BSD, (gate, up, logits_BSE) = norm_linear(x_BSD, norm, *products, dtype=(None, None, jnp.float32))
        x_ND, logits_NE = (parallel.all_tokens(a, ("expert",)).reshape(-1, a.shape[-1]) for a in (h_BSD, logits_BSE))
        experts_NX, weights_NX = route(c, p, logits_NE)
        local_NX = experts_NX
        if held < c.n_routed_experts:  # experts of other devices come last and belong to no group
            local_NX = experts_NX - parallel.first_expert(held)
            local_NX = jnp.where((local_NX >= 0) & (local_NX < held), local_NX, held)
    with jax.named_scope("routed_experts"):
        y_NXD = _routed(x_ND, [stacks[name] for name in STACKS], layer, local_NX, implementation)
        # A token's experts are added in the router's order: no scatter, so the sum is deterministic.
        here_NX1, weights_NX1 = (local_NX < held)[..., None], weights_NX[..., None]
        part = lambda x: jnp.where(here_NX1[:, x], y_NXD[:, x].astype(jnp.float32) * weights_NX1[:, x], 0)
        routed_ND = _sum(part, weights_NX.shape[1])
        routed_BSD = routed_ND.astype(x_BSD.dtype).reshape(x_BSD.shape[0], -1, x_BSD.shape[2])
    with jax.named_scope("shared_experts"):
        shared_BSD = linear(jax.nn.silu(gate) * up, shared["down_proj"])
    return parallel.return_tokens(routed_BSD, shared_BSD)


def _routed(x_ND, stacks, layer, experts_NX, implementation):
    """SwiGLU of each token by each of its experts, [N,X,D]; undefined where there is no such expert."""
    gate, up, down = stacks
    how = dict(implementation=implementation)
    if has_kernel("expert_matmul", implementation, x_ND, [gate, up], layer, experts_NX):  # decode: nothing to sort
        gate_NXF, up_NXF = expert_matmul(x_ND, [gate, up], layer, experts_NX, **how)
        return expert_matmul(jax.nn.silu(gate_NXF) * up_NXF, down, layer, experts_NX, **how)
    token_M, place_NX, group_sizes_E = by_expert(experts_NX, down.shape[1])
    hidden_MF = grouped_swiglu(x_ND[token_M], gate, up, layer, group_sizes_E, **how)
    return grouped_matmul(hidden_MF, down, layer, group_sizes_E, **how)[place_NX]


def by_expert(experts_NX, held: int):
    """(token of each row, int32 [N*X], row of each entry, int32 [N,X], rows of each expert, int32 [held]).

    The rows are the entries of ``experts_NX``, 0..held, in a stable sort; ``held`` stands for no expert.
    """
    # By counting: XLA's sort takes several launches.
    experts_M = experts_NX.reshape(-1)
    up_to_ME = jnp.cumsum(experts_M[:, None] == jnp.arange(held + 1), 0, dtype=jnp.int32)
    sizes_E = up_to_ME[-1]
    last_ME = up_to_ME + (jnp.cumsum(sizes_E) - sizes_E - 1)
    # Computed once: XLA would count again for every number that is gathered from the rows.
    place_M = lax.optimization_barrier(jnp.take_along_axis(last_ME, experts_M[:, None], 1)[:, 0])
    entry_M = jnp.arange(len(experts_M), dtype=jnp.int32)
    token_M = jnp.zeros_like(entry_M).at[place_M].set(entry_M // experts_NX.shape[1], unique_indices=True)
    return token_M, place_M.reshape(experts_NX.shape), sizes_E[:held]
