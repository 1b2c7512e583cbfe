"""How a backend wants the columns of a latent cache row laid out.

A latent row is its columns in order, zeros behind them, in whatever shape the backend's DMAs can fetch alone; the shape
of a pool tells which. Writers pack, readers unpack what they gathered, and nobody else knows the layout.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from . import dispatch


def latent_row_shape(width: int, dtype, implementation: str = "auto", *, on: dispatch.Target | None = None):
    """Shape of a latent cache row of ``width`` columns for what ``implementation`` runs: (width,), but on a TPU
    (tiles, 2, 128) if ``dtype`` is bf16. ``on``: as ``dispatch.reason_against``."""
    if implementation in ("auto", "tpu") and (on or dispatch.target()).platform == "tpu" and dtype == jnp.bfloat16:
        from . import sparse_mla_tpu

        return sparse_mla_tpu.row_shape(width)
    return (width,)


def pack_rows(latent, row_shape):
    """[..., width] -> [..., *row_shape], zeros behind the last column."""
    pad = ((0, 0),) * (latent.ndim - 1) + ((0, math.prod(row_shape) - latent.shape[-1]),)
    return jnp.pad(latent, pad).reshape(*latent.shape[:-1], *row_shape)


def unpack_rows(rows, width: int):
    """[n, *row_shape] -> [n, width]: the inverse of ``pack_rows``, for rows already gathered."""
    return rows.reshape(rows.shape[0], -1)[:, :width]
