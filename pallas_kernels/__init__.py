"""Kernels for DeepSeek Sparse Attention, usable alone: ``from pallas_kernels import index_topk, sparse_mla``.

Every op is one public function here, exact semantics in ``reference.py``, and one file a backend. Caches are pools:
``[layers or slots, rows, width]``, read in place by layer number, with a page table that maps positions to rows.
"""

from __future__ import annotations

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
      page_table_BP: int32 physical page of each logical page.
      positions_BS: int32 absolute position of each query; -1 marks padding (count 0, all -1).
      lengths_B: int32 cached tokens of each sequence, this call's included.
      k: how many to select. page_size: rows a page.
      implementation: "auto", "reference", "gpu" or "tpu".
      return_scores: also return float32 [B,S,K] scores of the positions (undefined where -1), for a merge with others.

    Raises NotImplementedError if a forced implementation cannot run. Source: DeepSeek-V3.2 report, section 2.1.
    """
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
    args, given = (q_BSHU, latent_pool_LMU, layer, rows_BSK), {} if groups is None else {"groups": groups}
    return dispatch.call("sparse_mla", implementation, *args, scale=scale, value_dim=value_dim, **given)


def dense_mla(
    q_BSHU, latent_pool_LMU, layer, page_table_BP, positions_BS, *, scale, page_size, value_dim=512,
    implementation="auto",
):  # fmt: skip
    """Causal attention of each query over every cached position <= its own; shapes and results as ``sparse_mla``."""
    args = (q_BSHU, latent_pool_LMU, layer, page_table_BP, positions_BS)
    return dispatch.call(
        "dense_mla", implementation if implementation == "reference" else "auto", *args,
        scale=scale, value_dim=value_dim, page_size=page_size,
    )  # fmt: skip


def grouped_matmul(x_ND, w_LEDF, layer, group_sizes_E, *, implementation="auto"):
    """Rows of ``x``, sorted by expert, times their expert's matrix of layer ``layer``: [N, F] in x's dtype.

    ``group_sizes_E`` int32: the first ``group_sizes[0]`` rows go to expert 0, and so on; rows beyond their sum, at most N,
    belong to none and come out undefined. "gpu" and "tpu" mean that kernel where it can run, as a model's other ops may
    have one that this has not.
    """
    return _where_it_can("grouped_matmul", implementation, x_ND, w_LEDF, layer, group_sizes_E)


def grouped_swiglu(x_ND, gate_LEDF, up_LEDF, layer, group_sizes_E, *, implementation="auto"):
    """silu(x · gate) * (x · up) of rows sorted by expert, as in ``grouped_matmul``: [N, F] in x's dtype.

    Both products are rounded to that dtype first. Where a kernel can do it the products share a launch and are not stored.
    """
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
    return _where_it_can("expert_matmul", implementation, x, w, layer, expert, dtype)


def has_kernel(op: str, implementation: str, *args) -> bool:
    """Whether a kernel would run a grouped op, ``layer_matmul`` or ``expert_matmul`` on these arguments."""
    backends = dict(auto=["gpu", "tpu"], reference=[]).get(implementation, [implementation])
    return any(dispatch.reason_against(op, b, *args) is None for b in backends)


def _where_it_can(op, implementation, *args):
    if implementation in ("gpu", "tpu") and dispatch.reason_against(op, implementation, *args):
        implementation = "auto"
    return dispatch.call(op, implementation, *args)
