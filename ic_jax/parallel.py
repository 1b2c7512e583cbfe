"""What the devices of a mesh exchange inside one forward pass: every collective of the model is a method here.

The forward runs under one ``jax.shard_map`` over all axes, so nothing is partitioned behind its back:

- ``data`` divides the sequences of a batch.
- ``tensor`` divides attention heads, feed-forward columns and the vocabulary; partial sums are added up.
- ``context`` and ``expert`` together divide the tokens of every sequence. Caches lie divided by pages: page p on device
  p % parts, so they grow evenly and local order is global order. A *split* call (prefill) also divides its queries: each
  device gathers a layer's cache rows and serves its own block of queries. Any other call (decode) keeps the queries
  whole: each device looks at its own rows, candidates are merged by score and outputs by their log-sum-exp.
- ``expert`` also divides the experts: their tokens are gathered and the results added up where the tokens came from.

With every axis 1 (ALONE) each method returns what it was given.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

SEQUENCE = ("context", "expert")
_LAST = jnp.iinfo(jnp.int32).max
_LEAST = float(jnp.finfo(jnp.float32).min)  # of a sum: finite, so that no rows at all leave no NaN


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Sizes of the mesh axes; ``split``: whether the queries of this call are divided over the sequence axes."""

    data: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    split: bool = False

    @classmethod
    def of(cls, mesh: Mesh | None, queries: int) -> Parallel:
        """For a call with ``queries`` tokens a sequence: split when the sequence axes divide them."""
        if mesh is None:
            return cls()
        whole = cls(**mesh.shape)
        return dataclasses.replace(whole, split=whole.parts > 1 and queries > 1 and queries % whole.parts == 0)

    @property
    def parts(self) -> int:
        """Into how many the tokens of a sequence, and with them its caches, are divided."""
        return self.context * self.expert

    # ------------------------------------------------------------------------------------------ tokens and partial sums

    def sum(self, x, *axes: str):
        """Partial sums added up over those of ``axes`` that are divided."""
        axes = tuple(a for a in axes if getattr(self, a) > 1)
        return lax.psum(x, axes) if axes else x

    def all_tokens(self, x, axes=SEQUENCE):
        """x [B,S/parts,...] of a split call from all devices: [B,S,...]."""
        axes = tuple(a for a in axes if getattr(self, a) > 1)
        return lax.all_gather(x, axes, axis=1, tiled=True) if self.split and axes else x

    def share(self, tree):
        """This tensor rank's share of the tokens of arrays [B,S,...], for work that all ranks would do alike."""
        return jax.tree.map(self._share, tree)

    def _share(self, x):
        if not self._shared(x.shape[1]):
            return x
        mine = x.shape[1] // self.tensor
        return lax.dynamic_slice_in_dim(x, lax.axis_index("tensor") * mine, mine, axis=1)

    def unshare(self, tree, tokens: int):
        """The tokens of all tensor ranks: undoes ``share`` of arrays that had ``tokens`` tokens."""
        if not self._shared(tokens):
            return tree
        return jax.tree.map(lambda x: lax.all_gather(x, "tensor", axis=1, tiled=True), tree)

    def _shared(self, tokens: int) -> bool:
        return self.tensor > 1 and tokens > 1 and tokens % self.tensor == 0

    def last_token(self, x_BSD, positions_BS):
        """x [B,D] of each sequence's last token of this call."""
        at_B = jnp.argmax(positions_BS, -1)
        x_BD = x_BSD[jnp.arange(x_BSD.shape[0]), at_B]
        if not self.split:
            return x_BD
        here_B = positions_BS.max(-1)
        # A sequence without a token in this call has none anywhere: the first device's stands for it.
        first = (here_B >= 0) | (lax.axis_index(SEQUENCE) == 0)
        mine_B = (here_B == lax.pmax(here_B, SEQUENCE)) & first
        return lax.psum(jnp.where(mine_B[:, None], x_BD, 0), SEQUENCE)

    # ------------------------------------------------------------------------------------------------- weights by row

    def embed(self, table_WD, ids_BS):
        """Rows of an embedding whose vocabulary is divided over ``tensor``."""
        if self.tensor == 1:
            return table_WD[ids_BS]
        local = ids_BS - lax.axis_index("tensor") * table_WD.shape[0]
        mine = (local >= 0) & (local < table_WD.shape[0])
        return lax.psum(jnp.where(mine[..., None], table_WD[jnp.where(mine, local, 0)], 0), "tensor")

    def first_expert(self, held: int):
        """Number of this device's first expert, of ``held``."""
        return lax.axis_index("expert") * held if self.expert > 1 else 0

    def return_tokens(self, routed_BSD, shared_BSD):
        """Partial results of the routed experts for the tokens of all expert ranks, and of the shared one for this
        rank's, added up where each token is served."""
        if self.expert == 1:
            return self.sum(routed_BSD + shared_BSD, "tensor")
        if self.split:
            routed_BSD = lax.psum_scatter(routed_BSD, "expert", scatter_dimension=1, tiled=True)
            return self.sum(routed_BSD + shared_BSD, "tensor")
        # All expert ranks have the same tokens: the first one's shared expert counts.
        shared_BSD = jnp.where(lax.axis_index("expert") == 0, shared_BSD, 0)
        return self.sum(routed_BSD + shared_BSD, "expert", "tensor")

    # --------------------------------------------------------------------------------------------------------- caches

    def own(self, positions, page_size: int):
        """``positions`` [B,...] in this device's own order; -1 where another device has them, and for -1."""
        if self.parts == 1:
            return positions
        page, within = positions // page_size, positions % page_size
        mine = (positions >= 0) & (page % self.parts == lax.axis_index(SEQUENCE))
        return jnp.where(mine, page // self.parts * page_size + within, -1)

    def seen(self, positions_BS, page_size: int):
        """Query positions as causal limits in the order of the rows that this device reads."""
        if self.parts == 1 or self.split:
            return positions_BS
        # How many of this device's tokens a query sees, less one.
        page, within = positions_BS // page_size, positions_BS % page_size
        before = (page - lax.axis_index(SEQUENCE) + self.parts - 1) // self.parts
        own = page % self.parts == lax.axis_index(SEQUENCE)
        return jnp.where(positions_BS < 0, -1, before * page_size + jnp.where(own, within + 1, 0) - 1)

    def page_table(self, page_table_BP, rows: int, page_size: int):
        """The page table of the rows that this device reads, of pools with ``rows`` rows a device."""
        if not self.split:
            return page_table_BP
        first = jnp.arange(self.parts, dtype=jnp.int32) * (rows // page_size)  # of each device, in gathered pools
        return (page_table_BP[:, :, None] + first).reshape(page_table_BP.shape[0], -1)

    def pool(self, pool, layer):
        """(pool, layer) to read: the given ones, or that layer's rows of all devices and 0."""
        if not self.split:
            return pool, layer
        whole = lambda a: lax.all_gather(lax.dynamic_index_in_dim(a, layer), SEQUENCE, axis=1, tiled=True)
        return jax.tree.map(whole, pool), 0

    def merge_selections(self, positions_BSK, scores_BSK, page_size: int):
        """The K best of all devices' candidates, in ascending global position: exact, ties to the lowest position."""
        page, within = positions_BSK // page_size, positions_BSK % page_size
        at = (page * self.parts + lax.axis_index(SEQUENCE)) * page_size + within
        none = positions_BSK < 0
        worst_first, at = jnp.where(none, jnp.inf, -scores_BSK), jnp.where(none, _LAST, at)
        both = jnp.stack([lax.bitcast_convert_type(worst_first, jnp.int32), at])  # one exchange instead of two
        worst_first, at = lax.all_gather(both, SEQUENCE, axis=3, tiled=True)
        worst_first = lax.bitcast_convert_type(worst_first, jnp.float32)
        _, at = lax.sort((worst_first, at), dimension=-1, num_keys=2)
        at = lax.sort(at[..., : positions_BSK.shape[-1]], dimension=-1)
        return jnp.where(at == _LAST, -1, at)

    def weigh_outputs(self, o_BSHC, lse_BSH):
        """Attention over this device's rows as its summand of attention over all devices' rows (``add_outputs``)."""
        if self.parts == 1 or self.split:
            return o_BSHC
        # A query that sees no row anywhere has outputs of zero.
        all_ZBSH = lax.all_gather(lse_BSH, SEQUENCE)
        whole_BSH = jax.nn.logsumexp(jnp.where(all_ZBSH == -jnp.inf, _LEAST, all_ZBSH), 0)
        return (o_BSHC.astype(jnp.float32) * jnp.exp(lse_BSH - whole_BSH)[..., None]).astype(o_BSHC.dtype)

    def add_outputs(self, x_BSD, project):
        """x and what ``weigh_outputs`` gave, projected, of all heads and all rows: one sum for both.

        ``project(add)``: the projection of this device's, plus ``add`` unless it is None.
        """
        axes = "tensor", *(() if self.split else SEQUENCE)
        divided = any(getattr(self, axis) > 1 for axis in axes)
        return x_BSD + self.sum(project(None), *axes) if divided else project(x_BSD)

    def tokens_spec(self) -> PartitionSpec:
        """Of arrays [B,S]."""
        return PartitionSpec("data" if self.data > 1 else None, SEQUENCE if self.split else None)


ALONE = Parallel()  # one device: nothing is divided, nothing exchanged


def cache_specs(cache):
    """PartitionSpecs of a Cache: rows over data and the sequence axes, page tables over data."""
    rows = PartitionSpec(None, ("data", *SEQUENCE))
    return cache.replace(
        latent_LMU=rows,
        index_keys_GMJ=rows,
        index_scales_GM=None if cache.index_scales_GM is None else rows,
        page_table_BP=PartitionSpec("data"),
    )
