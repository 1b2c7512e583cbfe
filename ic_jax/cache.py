"""The caches: a latent pool for every layer, an index-key pool for full layers only, and a page table over both.

A pool is ``[layers or slots, rows, width]``; the page table maps position ``t`` of sequence ``b`` to row
``page_table[b, t // page_size] * page_size + t % page_size``. A contiguous cache is the table that counts upwards.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch, latent_row_shape, pack_rows

from .config import Config
from .parallel import ALONE, Parallel

PAGE_SIZE = 256


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["latent_LMU", "index_keys_GMJ", "index_scales_GM", "page_table_BP"],
    meta_fields=["page_size"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Device state of a batch of sequences; updated functionally, donated to every step.

    latent_LMU: latent and rope key of every layer; a row's shape is the kernel package's affair. index_keys_GMJ: one
    slot for each full layer; bf16/float32, or float8_e4m3fn with index_scales_GM. page_table_BP: int32 physical page of
    each logical page.
    """

    latent_LMU: jax.Array
    index_keys_GMJ: jax.Array
    index_scales_GM: jax.Array | None
    page_table_BP: jax.Array
    page_size: int = PAGE_SIZE

    @property
    def capacity(self) -> int:
        """Tokens of a sequence that fit, on one device."""
        return self.page_table_BP.shape[1] * self.page_size

    def replace(self, **changes) -> Cache:
        return dataclasses.replace(self, **changes)

    def write_latents(self, layer, rows_BS, latent_BSU) -> Cache:
        """With ``latent_BSU`` in the rows ``rows_BS`` of ``layer``, each another one; what is out of range is dropped."""
        pool = self.latent_LMU
        packed = pack_rows(latent_BSU.astype(pool.dtype), pool.shape[2:])
        return self.replace(latent_LMU=_written(pool, layer, rows_BS, packed))

    def write_index_keys(self, slot, rows_BS, keys_BSJ, scales_BS=None) -> Cache:
        """With index keys (and their scales) in the rows ``rows_BS`` of ``slot``; what is out of range is dropped."""
        cache = self.replace(index_keys_GMJ=_written(self.index_keys_GMJ, slot, rows_BS, keys_BSJ))
        if scales_BS is None:
            return cache
        return cache.replace(index_scales_GM=_written(self.index_scales_GM, slot, rows_BS, scales_BS))


def _written(pool, layer, rows_BS, values):
    """The pool with ``values`` [B,S,...] in rows of a layer. On a GPU one row is written along with one that is dropped:
    XLA makes two or three launches of a scatter of one there, and one of any other."""
    on_gpu = dispatch.target().platform == "gpu"
    rows, values = rows_BS.reshape(-1), values.reshape(-1, *values.shape[2:])
    if on_gpu and len(rows) == 1:
        values = lax.optimization_barrier(values)
        rows, values = jnp.append(rows, pool.shape[1]), jnp.concatenate([values, jnp.zeros_like(values)])
    rows = jnp.where(rows < pool.shape[1], rows, pool.shape[1] + jnp.arange(len(rows)))  # no two alike, dropped or not
    # Unless told that they are distinct, XLA's GPU compiler stores 16-bit values by compare-and-swap.
    # Its TPU compiler copies the pool when it is told.
    return pool.at[layer, rows].set(values, mode="drop", unique_indices=on_gpu)


def pages_for(tokens: int, page_size: int = PAGE_SIZE) -> int:
    return -(-tokens // page_size)


def allocate(
    config: Config, slots: int, batch: int, context: int, *, dtype=jnp.bfloat16, index_dtype=None, page_size=PAGE_SIZE,
    implementation="auto", parallel: Parallel = ALONE,
) -> Cache:  # fmt: skip
    """A zeroed contiguous Cache for ``batch`` sequences of ``context`` tokens and ``slots`` full layers.

    ``index_dtype`` is the dtype of the index keys (``dtype`` by default); float8_e4m3fn adds a scale a token.
    ``implementation`` will read it: its kernels decide the layout of latent rows. Divided over a mesh, every device holds
    its pages of its sequences, and page numbers count its own rows.
    """
    pages = pages_for(context, page_size * parallel.parts)
    batch = -(-batch // parallel.data) * parallel.data
    own = batch // parallel.data * pages  # pages of one device
    rows = own * page_size * parallel.data * parallel.parts
    index_dtype = jnp.dtype(index_dtype or dtype)
    row_shape = latent_row_shape(config.latent_dim, dtype, implementation)
    return Cache(
        latent_LMU=jnp.zeros((config.num_hidden_layers, rows, *row_shape), dtype),
        index_keys_GMJ=jnp.zeros((slots, rows, config.index_head_dim), index_dtype),
        index_scales_GM=jnp.ones((slots, rows), jnp.float32) if index_dtype.itemsize == 1 else None,
        page_table_BP=(jnp.arange(batch * pages, dtype=jnp.int32) % own).reshape(batch, pages),
        page_size=page_size,
    )


def bytes_per_token(config: Config, slots: int, dtype=jnp.bfloat16, index_dtype=None, implementation="auto") -> int:
    """Cache bytes one token takes over all layers."""
    index_dtype = jnp.dtype(index_dtype or dtype)
    columns = math.prod(latent_row_shape(config.latent_dim, dtype, implementation))
    latent = config.num_hidden_layers * columns * jnp.dtype(dtype).itemsize
    scale = 4 if index_dtype.itemsize == 1 else 0
    return latent + slots * (config.index_head_dim * index_dtype.itemsize + scale)
