"""Grouped matrix product on Hopper: rows sorted by expert times their expert's matrix, read in place by layer.

Many rows: a persistent grid walks tiles of 128 rows x 256 columns, a warpgroup loading and two computing 64 rows each.
Tiles of one expert are neighbours, so its matrix comes from memory once. They start at a multiple of eight rows, as
swizzled copies must: a tile may hold rows of other experts, which are not stored; half a tile without own rows is not
computed. Two matrices, gate and up, share a launch and its x: 128 columns of each in the place of 256, and silu(gate) * up
is what is stored. A few rows, as in decode, read their matrices through `matvec_gpu.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import matvec_gpu, reference

HALF, DEPTH, CHUNK = 64, 64, 64  # rows of a computing warpgroup, of the matrices a stage, columns stored at a time
ROWS, SMS = 2 * HALF, 132
RING = 192 * 1024  # bytes of the stages: four at 256 columns, six at 128
SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ROW_SWIZZLE = (plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128))  # the same bytes, rows of it can be stored


def tile_table(group_sizes_E, N, columns):
    """(table int32 [tiles, 5], how many of them there are) for N rows: what the expert of a tile is, its first row, which
    rows of the tile are the expert's (from, to), and the column tile.

    An expert's tiles are neighbours, its row tiles the fastest, so that they share a stretch of the matrix.
    """
    E = group_sizes_E.shape[0]
    most = (N // ROWS + 2 * min(E, N)) * columns
    stops_E = jnp.cumsum(group_sizes_E)
    starts_E = stops_E - group_sizes_E
    down_E = jnp.where(group_sizes_E > 0, -(-(stops_E - starts_E // 8 * 8) // ROWS), 0)
    ends_E = jnp.cumsum(down_E * columns)
    t = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends_E, t, side="right", method="compare_all"), E - 1)
    down = jnp.maximum(down_E[expert], 1)
    local = t - (ends_E[expert] - down * columns)
    row = starts_E[expert] // 8 * 8 + local % down * ROWS
    low, high = (jnp.clip(x[expert] - row, 0, ROWS) for x in (starts_E, stops_E))
    table = jnp.stack([expert, row, low, high, local // down], -1)
    return table.astype(jnp.int32), ends_E[-1].astype(jnp.int32)


def _swiglu(gate, up):
    """silu(gate) * up in bfloat16, rounded after every step as XLA does on a GPU; the exponential is a fast float32 one."""
    exp = jnp.exp((-gate).astype(jnp.float32)).astype(gate.dtype)  # negated first: packed, whose conversions are fast
    return gate * (1 / (1 + exp)) * up


def _kernel(x_ND, table_T5, meta_2, *refs, x_smem, w_smem, out_smem, full, empty, depth, first_row):
    """The kernel body; meta: the layer and the number of tiles; refs: one or two stacks [layers * E * D, F], in which a
    matrix begins at first_row(layer, expert), and the result."""
    *stacks_MF, y_NF = refs
    worker, wg = lax.axis_index("worker"), lax.axis_index("wg")
    steps, (stages, _, _, width) = depth // DEPTH, w_smem.shape
    mine = lax.div(meta_2[1] - worker + SMS - 1, SMS)
    stage_of = lambda step: lax.rem(step, stages)

    @pl.when(wg == 2)
    def _load():
        plgpu.set_max_registers(40, action="decrease")

        def tile(n, done):
            expert, row, column = (table_T5[worker + n * SMS, i] for i in (0, 1, 4))
            row, base = pl.multiple_of(row, 8), pl.multiple_of(first_row(meta_2[0], expert), DEPTH)

            def step(k, _):
                stage = stage_of(done + k)

                @pl.when(done + k >= stages)
                def _():
                    plgpu.barrier_wait(empty.at[stage])

                x_tile = x_ND.at[pl.ds(row, ROWS), pl.ds(k * DEPTH, DEPTH)]
                plgpu.copy_gmem_to_smem(x_tile, x_smem.at[stage], full.at[stage])
                for i, w_MF in enumerate(stacks_MF):
                    w_tile = w_MF.at[pl.ds(base + k * DEPTH, DEPTH), pl.ds(column * width, width)]
                    plgpu.copy_gmem_to_smem(w_tile, w_smem.at[stage, i], full.at[stage])

            lax.fori_loop(0, steps, step, None)
            return done + steps

        done = lax.fori_loop(0, mine, tile, jnp.int32(0))
        for last in range(1, stages + 1):  # leaves no barrier in a phase that nobody has seen
            pl.when(done >= last)(functools.partial(plgpu.barrier_wait, empty.at[stage_of(done - last)]))

    @pl.when(wg < 2)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def products(done):
            def body(*accs):
                def step(k, _):
                    stage = stage_of(done + k)
                    plgpu.barrier_wait(full.at[stage])
                    half = x_smem.at[stage, pl.ds(pl.multiple_of(wg * HALF, HALF), HALF)]
                    for i, acc in enumerate(accs):
                        plgpu.wgmma(acc, half, w_smem.at[stage, i])
                    plgpu.wgmma_wait(len(accs))  # the step before is done with its buffers
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[stage_of(done + k - 1)]))

                lax.fori_loop(0, steps, step, None)
                return [acc[...] for acc in accs]

            accs = pl.run_scoped(body, *[plgpu.ACC((HALF, width), jnp.float32)] * len(stacks_MF))
            plgpu.barrier_arrive(empty.at[stage_of(done + steps - 1)])
            return accs

        def store(accs, row, low, rows, column):
            """Stores rows low, low + 1, ... of the half tile to `row` and on."""
            for c in range(width // CHUNK):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                chunks = [acc[:, c * CHUNK : (c + 1) * CHUNK].astype(y_NF.dtype) for acc in accs]
                out_smem[2 * wg + c % 2] = chunks[0] if len(chunks) == 1 else _swiglu(*chunks)
                plgpu.commit_smem()
                for size in (64, 32, 16, 8, 4, 2, 1):  # the number of rows in binary: a copy's size is static
                    at = rows & (2 * HALF - 2 * size)

                    @pl.when((rows & size) > 0)
                    def _(size=size, at=at, c=c):
                        to = y_NF.at[pl.ds(row + at, size), pl.ds(column * width + c * CHUNK, CHUNK)]
                        out = out_smem.at[2 * wg + c % 2, pl.ds(low + at, size)]
                        plgpu.copy_smem_to_gmem(out, to, commit_group=False)

                plgpu.commit_smem_to_gmem_group()

        def tile(n, done):
            row, low, high, column = (table_T5[worker + n * SMS, i] for i in range(1, 5))
            low, high = (jnp.clip(x - wg * HALF, 0, HALF) for x in (low, high))
            rows, row = high - low, row + wg * HALF + low
            pl.when(rows > 0)(lambda: store(products(done), row, low, rows, column))

            @pl.when(rows == 0)
            def _():
                def step(k, _):
                    plgpu.barrier_wait(full.at[stage_of(done + k)])
                    plgpu.barrier_arrive(empty.at[stage_of(done + k)])

                lax.fori_loop(0, steps, step, None)

            return done + steps

        lax.fori_loop(0, mine, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def ragged(x_ND, w, layer, group_sizes_E, *, width=None, interpret=None):
    """`grouped_matmul` by tiles of `width` columns, 256 or 128: [N, F] bfloat16. D a multiple of 64, F of `width`.

    w: a stack, or a list of gate and up for `grouped_swiglu`, which takes tiles of 128.
    """
    stacks_LEDF = jax.tree.leaves(w)
    (N, D), (L, E, _, F), count = x_ND.shape, stacks_LEDF[0].shape, len(stacks_LEDF)
    width = width or (256 if F % 256 == 0 and count == 1 else 128)
    stages = RING // (2 * DEPTH * (ROWS + count * width))
    table_T5, tiles = tile_table(group_sizes_E, N, F // width)
    smem = functools.partial(plgpu.SMEM, dtype=x_ND.dtype)
    kernel = plgpu.kernel(
        functools.partial(_kernel, depth=D, first_row=lambda layer, expert: (layer * E + expert) * D),
        out_type=jax.ShapeDtypeStruct((N, F), x_ND.dtype),
        grid=(SMS,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            x_smem=smem((stages, ROWS, DEPTH), transforms=SWIZZLE),
            w_smem=smem((stages, count, DEPTH, width), transforms=SWIZZLE),
            out_smem=smem((4, HALF, CHUNK), transforms=ROW_SWIZZLE),
            full=plgpu.Barrier(num_arrivals=1 + count, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0, approx_math=True),
        interpret=interpret,
    )
    meta = jnp.stack([jnp.asarray(layer, jnp.int32), tiles])
    x_ND = jnp.pad(x_ND, ((0, -N % 8), (0, 0)))
    return kernel(x_ND, table_T5, meta, *(w_LEDF.reshape(L * E * D, F) for w_LEDF in stacks_LEDF))


def supported(x_ND, *stacks_layer_sizes) -> str | None:
    """Why grouped_matmul or grouped_swiglu cannot take these arguments on a Hopper GPU, or None."""
    *stacks_LEDF, _, _ = stacks_layer_sizes
    (N, D), (L, E, _, F) = x_ND.shape, stacks_LEDF[0].shape
    if any(a.dtype != jnp.bfloat16 for a in (x_ND, *stacks_LEDF)):
        return f"needs bfloat16, got {x_ND.dtype} rows and {' and '.join(str(w.dtype) for w in stacks_LEDF)} matrices"
    if stacks_LEDF[-1].shape != stacks_LEDF[0].shape:
        return f"needs stacks of one shape, got {stacks_LEDF[0].shape} and {stacks_LEDF[-1].shape}"
    if D % DEPTH or F % 128:
        return f"needs matrices in multiples of {DEPTH} x 128, got {D} x {F}"
    if L * E * D >= 2**31 or N == 0:
        return f"needs at least one row and fewer than 2^31 rows of matrices, got {N} and {L * E * D}"
    return None


@jax.custom_vjp
def grouped_matmul(x_ND, w_LEDF, layer, group_sizes_E):
    """See `pallas_kernels.grouped_matmul`; float32 sums. Raises NotImplementedError with the reason of `supported`.

    The gradient is the reference's.
    """
    if reason := supported(x_ND, w_LEDF, layer, group_sizes_E):
        raise NotImplementedError(reason)
    N, F = x_ND.shape[0], w_LEDF.shape[-1]
    if N > matvec_gpu.FEW or F % 256:
        return ragged(x_ND, w_LEDF, layer, group_sizes_E)
    expert_N = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(N), side="right", method="compare_all")
    return matvec_gpu.expert_matmul(x_ND, w_LEDF, layer, expert_N.astype(jnp.int32))


def _forward(*args):
    return grouped_matmul(*args), args


def _backward(args, dy_NF):
    x_ND, w_LEDF, layer, group_sizes_E = args
    _, pullback = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, layer, group_sizes_E), x_ND, w_LEDF)
    return *pullback(dy_NF), None, None


grouped_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def grouped_swiglu(x_ND, gate_LEDF, up_LEDF, layer, group_sizes_E):
    """See `pallas_kernels.grouped_swiglu`; float32 sums. Raises NotImplementedError with the reason of `supported`.

    Equal to two launches and XLA's silu(gate) * up, but for gates whose exponential lies next to a rounding: one or two of
    all bfloat16 numbers, two ulp at most (simulated). The gradient is that of the composition.
    """
    if reason := supported(x_ND, gate_LEDF, up_LEDF, layer, group_sizes_E):
        raise NotImplementedError(reason)
    return ragged(x_ND, [gate_LEDF, up_LEDF], layer, group_sizes_E)


def _backward_swiglu(args, dy_NF):
    products = lambda *xgu: reference.grouped_swiglu(*xgu, *args[3:], product=grouped_matmul)
    return *jax.vjp(products, *args[:3])[1](dy_NF), None, None


grouped_swiglu.defvjp(lambda *args: (grouped_swiglu(*args), args), _backward_swiglu)
