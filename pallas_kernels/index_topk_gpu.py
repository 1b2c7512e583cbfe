"""index_topk on Hopper: indexer scores (index_scores_gpu) and exact selection (topk_gpu), chunked over queries.

Scores of one chunk of queries live in a workspace of at most WORKSPACE_BYTES, whatever the context and the prompt; a
chunk is scored by one launch and selected by the next.
"""

import jax
import jax.numpy as jnp
from jax import lax

from . import index_scores_gpu, topk_gpu
from .index_scores_gpu import index_scores
from .reference import canonical
from .topk_gpu import topk

__all__ = ["index_scores", "index_topk", "supported", "topk"]
WORKSPACE_BYTES = 2**30  # four chunks of 1,024 queries at 200K tokens; with half of it eight, each with a last wave
UNROLLED_CHUNKS = 8


def supported(
    q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B, *, k, page_size, return_scores=False
):
    """None when index_topk can run these arguments on a Hopper GPU, else the reason why not."""
    keys, scales = index_pool
    heads, dim = q_BSIJ.shape[-2:]
    if q_BSIJ.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"queries are {q_BSIJ.dtype}; bfloat16 or float8_e4m3fn is needed"
    if keys.dtype != q_BSIJ.dtype:
        return f"keys are {keys.dtype} but queries are {q_BSIJ.dtype}"
    if dim != index_scores_gpu.HEAD_DIM or keys.shape[-1] != dim:
        return f"the indexer head has {dim} dimensions; {index_scores_gpu.HEAD_DIM} are needed"
    if heads > 64:
        return f"{heads} indexer heads; at most 64 are supported"
    if page_size % 64:
        return f"page size {page_size} is not a multiple of 64"
    if k > topk_gpu.MAX_K:
        return f"k is {k}; at most {topk_gpu.MAX_K} is supported"
    if scales is not None and scales.dtype != jnp.float32:
        return f"key scales are {scales.dtype}; float32 is needed"
    return None


def _rows_per_chunk(batch, queries, capacity, step):
    """Queries of every sequence per chunk: within the workspace, in whole blocks of `step`, chunks about equal."""
    most = max(step, WORKSPACE_BYTES // (4 * capacity * batch) // step * step)
    chunks = -(-queries // most)
    return -(-queries // (chunks * step)) * step if chunks > 1 else queries


def index_topk(
    q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B, *, k, page_size, return_scores=False
):
    """Positions of the k best keys of each query, ascending, -1 padded, and their number: positions_BSK, count_BS.

    q [B,S,I,128] bf16 or float8_e4m3fn; w [B,S,I] float32, all scale factors folded in; index_pool (keys [G,rows,128],
    scales None or float32 [G,rows]); slot: traced int32 scalar; page_table [B,P]; positions [B,S], -1 for padding;
    lengths [B]. Order: (score descending, position ascending) in float32, NaN as -inf. A query with position < k takes
    every position. return_scores adds their float32 scores [B,S,k], undefined where there is none; no query is then spared
    the scoring. Raises NotImplementedError with the reason of `supported`.
    """
    reason = supported(
        q_BSIJ, w_BSI, index_pool, slot, page_table_BP, positions_BS, lengths_B, k=k, page_size=page_size
    )
    if reason:
        raise NotImplementedError(reason)
    batch, queries, heads, _ = q_BSIJ.shape
    capacity = page_table_BP.shape[1] * page_size
    itemsize = jnp.dtype(q_BSIJ.dtype).itemsize
    step = index_scores_gpu.plan(queries, heads, capacity, page_size, itemsize, batch).queries
    together = max(1, WORKSPACE_BYTES // (4 * capacity * step))
    if batch > together:  # one block of queries of every sequence at once is already too much
        parts = []
        for b in range(0, batch, together):
            q, w, pages, positions, lengths = (
                x[b : b + together] for x in (q_BSIJ, w_BSI, page_table_BP, positions_BS, lengths_B)
            )
            how = dict(k=k, page_size=page_size, return_scores=return_scores)
            parts.append(index_topk(q, w, index_pool, slot, pages, positions, lengths, **how))
        return tuple(jnp.concatenate(x) for x in zip(*parts, strict=True))
    rows = _rows_per_chunk(batch, queries, capacity, step)

    def limits(positions):
        return jnp.clip(jnp.minimum(positions + 1, lengths_B[:, None]), 0, capacity).astype(jnp.int32)

    def everything(positions):
        every, limit = jnp.arange(k, dtype=jnp.int32), limits(positions)
        return jnp.where(every < limit[..., None], every, -1), limit

    @jax.jit  # traced once for all chunks
    def chunk(q, w, positions):
        unseen = 0 if return_scores else k  # queries that see no more are not scored
        where = (index_pool, slot, page_table_BP, positions, lengths_B)
        with jax.named_scope("scores"):
            scores = index_scores(q, w, *where, page_size=page_size, min_limit=unseen)
        if capacity <= k:
            selected, count = everything(positions)
        else:
            with jax.named_scope("select"):
                found = topk(scores.reshape(-1, capacity), limits(positions).reshape(-1), k=k)
            selected, count = (x.reshape(*positions.shape, *x.shape[1:]) for x in found)
        if not return_scores:
            return selected, count
        return selected, count, canonical(jnp.take_along_axis(scores, jnp.maximum(selected, 0), -1, mode="clip"))

    if capacity <= k and not return_scores:
        return everything(positions_BS)
    with jax.named_scope("index_topk"):
        chunks = -(-queries // rows)
        pad = chunks * rows - queries
        q, w = (jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) if pad else x for x in (q_BSIJ, w_BSI))
        positions = jnp.pad(positions_BS, ((0, 0), (0, pad)), constant_values=-1) if pad else positions_BS
        if chunks <= UNROLLED_CHUNKS:
            parts = [chunk(*(x[:, i * rows : (i + 1) * rows] for x in (q, w, positions))) for i in range(chunks)]
            found = [jnp.concatenate(x, axis=1) if chunks > 1 else x[0] for x in zip(*parts, strict=True)]
        else:
            split = [jnp.moveaxis(x.reshape(batch, chunks, rows, *x.shape[2:]), 1, 0) for x in (q, w, positions)]
            found = lax.map(lambda x: chunk(*x), split)
            found = [jnp.moveaxis(x, 0, 1).reshape(batch, chunks * rows, *x.shape[3:]) for x in found]
    return tuple(x[:, :queries] for x in found)
