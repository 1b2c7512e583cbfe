"""Kernels for DeepSeek Sparse Attention, usable alone: ``from pallas_kernels import index_topk, sparse_mla``.

Every op is one public function here, exact semantics in ``reference.py``, and one file a backend. Caches are pools:
``[layers or slots, rows, width]``, read in place by layer number, with a page table that maps positions to rows.

Shapes that do not fit together raise ValueError. Values are not looked at: an index on the device that is out of range
gives undefined results. ``jax.shard_map`` around these ops needs ``check_vma=False``.
"""

from __future__ import annotations

import jax
import numpy as np

from . import dispatch
from .layout import latent_row_shape, pack_rows, unpack_rows
from .reference import rms_norm, scores_at
from .row_plan import RowPlan, physical_rows

__all__ = [
    "RowPlan", "dense_mla", "expert_matmul", "grouped_matmul", "grouped_swiglu", "has_kernel", "index_topk",
    "latent_row_shape", "layer_matmul", "pack_rows", "physical_rows", "plan_rows", "rms_norm", "sparse_mla", "unpack_rows",
]  # fmt: skip


def index_topk(
    q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B, *, k, page_size, implementation="auto",
    return_scores=False,
):  # fmt: skip
    """Positions of the ``k`` best earlier tokens of each query, and how many there are: int32 [B,S,K], int32 [B,S].

    ``score[t] = sum_i w_i·relu(q_i·k_t)`` in float32 over t <= position; the best by (score descending, position
    ascending), returned in ascending position, -1 padded. Queries with at most k earlier tokens get all of them.

    Args:
      q_BSIJ: index queries, bf16, float32 or float8_e4m3fn.
      w_BSI: float32 head weights with every scale factor folded in (fp8 query scales too).
      index_pool: ``(keys [G, M, J], scales float32 [G, M] or None)``, scales for float8 keys.
      slot: int32 scalar, the row of G to score against.
      page_table_BP: int32 physical page of each logical page, of as many as hold ``lengths_B``.
      positions_BS: int32 absolute position of each query; -1 marks padding (count 0, all -1).
      lengths_B: int32 cached tokens of each sequence, this call's included.
      k: how many to select. page_size: rows a page.
      implementation: "auto", "reference", "gpu" or "tpu".
      return_scores: also return float32 [B,S,K] scores of the positions (undefined where -1), for a merge with others.

    Raises NotImplementedError if a forced implementation cannot run. Source: DeepSeek-V3.2 report, section 2.1.
    """
    keys_GMJ, scales_GM = index_pool
    _agree(
        q_BSIJ=q_BSIJ, w_BSI=w_BSI, keys_GMJ=keys_GMJ, **({} if scales_GM is None else dict(scales_GM=scales_GM)),
        page_table_BP=page_table_BP, positions_BS=positions_BS, lengths_B=lengths_B,
    )  # fmt: skip
    _inside("slot", slot, keys_GMJ)
    if k < 1 or not np.size(positions_BS):
        raise ValueError(f"there is nothing to select: k is {k}, positions_BS {np.shape(positions_BS)}")
    args, how = (q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B), dict(k=k, page_size=page_size)
    if return_scores and dispatch.choose("index_topk", implementation, *args, **how) == "gpu":
        return dispatch.call("index_topk", "gpu", *args, **how, return_scores=True)  # those it has selected by
    positions_BSK, count_BS = dispatch.call("index_topk", implementation, *args, **how)
    if not return_scores:
        return positions_BSK, count_BS
    scores_BSK = scores_at(q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BSK, page_size)
    return positions_BSK, count_BS, scores_BSK


def plan_rows(positions_BSK, page_table_BP, heads, latent_pool_LMU, *, page_size, implementation="auto"):
    """The RowPlan of a selection: what ``sparse_mla`` reads, computed once for every layer that shares the selection.

    Pool rows and, where the backend of ``sparse_mla`` gains from it, groups of neighbouring queries that fetch the
    union of their selections once. A group never crosses sequences; decode has none. Exact: results do not depend on it.

    Args:
      positions_BSK: int32 distinct positions of each query, -1 = none, anywhere in the list.
      page_table_BP, page_size: as in ``index_topk``.
      heads: query heads that ``sparse_mla`` will be called with.
      latent_pool_LMU: the pool it will read (only shape and dtype matter).
    """
    _agree(positions_BSK=positions_BSK, page_table_BP=page_table_BP)
    implementation = "auto" if implementation == "gpu" else "reference" if implementation == "tpu" else implementation
    args = (positions_BSK, page_table_BP, heads, latent_pool_LMU)
    return dispatch.call("plan_rows", implementation, *args, page_size=page_size)


def sparse_mla(q_BSHU, latent_pool_LMU, layer, rows, *, scale, value_dim=512, implementation="auto"):
    """Attention of each query over its selected latent rows: o [B,S,H,value_dim] and lse float32 [B,S,H] (natural log).

    Args:
      q_BSHU: absorbed queries, ``value_dim`` latent columns then the rope columns.
      latent_pool_LMU: stacked latent cache, its rows laid out as ``latent_row_shape`` says (or plainly, for the reference);
        keys are whole rows, values their first ``value_dim`` columns.
      layer: int32 scalar, the layer to read.
      rows: int32 distinct pool rows [B,S,K], -1 = none, anywhere in the list, or a RowPlan. A query with no row gives
        zeros and lse -inf.
      scale: softmax scale.

    Raises NotImplementedError if a forced implementation cannot run. Source: DeepSeek-V2 report, section 2.1 (absorbed MLA).
    """
    rows_BSK, groups = rows if isinstance(rows, RowPlan) else (rows, None)
    _check_attention(q_BSHU, latent_pool_LMU, layer, value_dim, rows_BSK=rows_BSK)
    args, given = (q_BSHU, latent_pool_LMU, layer, rows_BSK), {} if groups is None else {"groups": groups}
    return dispatch.call("sparse_mla", implementation, *args, scale=scale, value_dim=value_dim, **given)


def dense_mla(
    q_BSHU, latent_pool_LMU, layer, page_table_BP, positions_BS, *, scale, page_size, value_dim=512,
    implementation="auto",
):  # fmt: skip
    """Causal attention of each query over every cached position <= its own; shapes and results as ``sparse_mla``.

    ``implementation`` as in ``grouped_matmul``. The reference has no reverse-mode gradient.
    """
    _check_attention(q_BSHU, latent_pool_LMU, layer, value_dim, page_table_BP=page_table_BP, positions_BS=positions_BS)
    args = (q_BSHU, latent_pool_LMU, layer, page_table_BP, positions_BS)
    return _where_it_can("dense_mla", implementation, *args, scale=scale, value_dim=value_dim, page_size=page_size)


def grouped_matmul(x_ND, w_LEDF, layer, group_sizes_E, *, implementation="auto"):
    """Rows of ``x``, sorted by expert, times their expert's matrix of layer ``layer``: [N, F] in x's dtype.

    ``group_sizes_E`` int32: the first ``group_sizes[0]`` rows go to expert 0, and so on; rows beyond their sum, at most N,
    belong to none and come out undefined. "gpu" and "tpu" mean that kernel where it can run, as a model's other ops may
    have one that this has not.
    """
    _agree(x_ND=x_ND, w_LEDF=w_LEDF, group_sizes_E=group_sizes_E)
    _inside("layer", layer, w_LEDF)
    return _where_it_can("grouped_matmul", implementation, x_ND, w_LEDF, layer, group_sizes_E)


def grouped_swiglu(x_ND, gate_LEDF, up_LEDF, layer, group_sizes_E, *, implementation="auto"):
    """silu(x · gate) * (x · up) of rows sorted by expert, as in ``grouped_matmul``: [N, F] in x's dtype.

    Both products are rounded to that dtype first. Where a kernel can do it the products share a launch and are not stored.
    """
    _agree(x_ND=x_ND, gate_LEDF=gate_LEDF, up_LEDF=up_LEDF, group_sizes_E=group_sizes_E)
    _inside("layer", layer, gate_LEDF)
    return _where_it_can("grouped_swiglu", implementation, x_ND, gate_LEDF, up_LEDF, layer, group_sizes_E)


def layer_matmul(x, w, layer, *, dtype=None, norm=None, eps=None, add=None, implementation="auto"):
    """x [..., D] times the transpose of matrix ``layer`` of a stack [L,F,D]: [..., F] in ``dtype`` or x's.

    A kernel reads the matrices of a decode step's few rows in place, at memory speed.

    Args:
      w: the stack, or a list of several for a list of products, one launch; stacks [L,H,F,D] are of matrices by head,
        for x [..., H, D].
      dtype: one for all products, or a tuple of theirs.
      norm: (weights [L,D], layer); then it is ``rms_norm(x, weights[layer], eps)`` that is multiplied, and the result is
        (product or products, normed x).
      add: [..., F], what is added to the rounded product of a single stack without a norm.
      implementation: "gpu" and "tpu" as in ``grouped_matmul``.
    """
    stacks = jax.tree.leaves(w)
    for stack in stacks:
        columns = stack.shape[-1:] if stack.ndim == 3 else stack.shape[1:4:2]
        if np.shape(x)[-len(columns) :] != columns:
            raise ValueError(f"x {np.shape(x)} does not end in the {columns} of w {stack.shape}")
        _inside("layer", layer, stack)
    if add is not None and (norm is not None or len(stacks) > 1):
        raise ValueError("add goes with a single stack and no norm")
    return _where_it_can("layer_matmul", implementation, x, w, layer, dtype, norm, eps, add)


def expert_matmul(x, w, layer, expert=None, *, dtype=None, implementation="auto"):
    """Each row of x times a matrix of its own of layer ``layer`` of a stack [L,E,D,F]: [..., F] in ``dtype`` or x's.

    Args:
      x: [..., D], a row for every entry of ``expert``, or for all entries that share its leading indices. Columns past D
        are left out.
      w: the stack, or a list of several for a list of products, one launch.
      expert: int32 matrix of each row; results of numbers outside 0..E-1 are undefined. None: x is [..., E, D].
      implementation: as in ``layer_matmul``; the reference copies the matrices of given experts.
    """
    for stack in jax.tree.leaves(w):
        _, E, D, _ = stack.shape
        if np.shape(x)[-1] < D or expert is None and np.shape(x)[-2:-1] != (E,):
            raise ValueError(f"x {np.shape(x)} does not fit the {E} matrices of {D} rows of w {stack.shape}")
        _inside("layer", layer, stack)
    return _where_it_can("expert_matmul", implementation, x, w, layer, expert, dtype)


def has_kernel(op: str, implementation: str, *args) -> bool:
    """Whether a kernel would run a grouped op, ``layer_matmul`` or ``expert_matmul`` on these arguments."""
    backends = dict(auto=["gpu", "tpu"], reference=[]).get(implementation, [implementation])
    return any(dispatch.reason_against(op, b, *args) is None for b in backends)


def _where_it_can(op, implementation, *args, **kwargs):
    if implementation in ("gpu", "tpu") and dispatch.reason_against(op, implementation, *args, **kwargs):
        implementation = "auto"
    return dispatch.call(op, implementation, *args, **kwargs)


def _agree(**arrays):
    """ValueError unless every array has as many axes as letters behind its name, of one size wherever letters are equal."""
    sizes = {}
    for name, array in arrays.items():
        letters, shape = name.rpartition("_")[2], np.shape(array)
        fits = len(letters) == len(shape)
        if not fits or any(sizes.setdefault(i, n) != n for i, n in zip(letters, shape, strict=True)):
            raise ValueError("shapes do not agree: " + ", ".join(f"{n} {np.shape(a)}" for n, a in arrays.items()))


def _inside(name, index, stack):
    """ValueError for a layer or slot that a Python integer says and the stack has not."""
    if isinstance(index, int | np.integer) and not 0 <= index < len(stack):
        raise ValueError(f"{name} {index} is outside 0..{len(stack) - 1}")


def _check_attention(q_BSHU, latent_pool_LMU, layer, value_dim, **others):
    plain = dict(latent_pool_LMU=latent_pool_LMU) if len(np.shape(latent_pool_LMU)) < 4 else {}  # else a backend's layout
    _agree(q_BSHU=q_BSHU, **plain, **others)
    _inside("layer", layer, latent_pool_LMU)
    if not 0 < value_dim <= q_BSHU.shape[-1]:
        raise ValueError(f"value_dim {value_dim} is outside 1..{q_BSHU.shape[-1]}, the columns of q_BSHU")
