"""The oracle: DSA in NumPy float64 and plain loops, no JAX. Slow, short, and what every implementation answers to."""

import numpy as np


def index_scores(q_IJ, w_I, keys_TJ):
    """Lightning-indexer scores of one query: sum_i w_i · relu(q_i · k_t)."""
    scores = np.zeros(len(keys_TJ))
    for t, key in enumerate(keys_TJ.astype(np.float64)):
        for q, w in zip(q_IJ.astype(np.float64), w_I.astype(np.float64), strict=True):
            scores[t] += w * max(q @ key, 0.0)
    return scores


def select(scores_T, k):
    """Positions of the k best by (score descending, position ascending), ascending, -1 padded; NaN and -inf rank lowest."""
    lowest = np.finfo(np.float32).min
    clean = [lowest if np.isnan(s) or s < lowest else s + 0.0 for s in scores_T]
    best = sorted(sorted(range(len(clean)), key=lambda t: (-clean[t], t))[:k])
    return np.array(best + [-1] * (k - len(best)), np.int32)


def sparse_mla(q_HU, latent_MU, rows_K, scale, value_dim):
    """(o [H, value_dim], lse [H]) of one query over the rows >= 0."""
    rows = [r for r in rows_K if r >= 0]
    o, lse = np.zeros((len(q_HU), value_dim)), np.full(len(q_HU), -np.inf)
    if rows:
        latent = latent_MU[rows].astype(np.float64)
        for h, q in enumerate(q_HU.astype(np.float64)):
            s = latent @ q * scale
            lse[h] = s.max() + np.log(np.exp(s - s.max()).sum())
            o[h] = np.exp(s - lse[h]) @ latent[:, :value_dim]
    return o, lse


def grouped_matmul(x_ND, w_EDF, group_sizes_E):
    expert_N = np.repeat(np.arange(len(w_EDF)), group_sizes_E)
    return np.stack([x @ w_EDF[e] for x, e in zip(x_ND.astype(np.float64), expert_N, strict=True)])
