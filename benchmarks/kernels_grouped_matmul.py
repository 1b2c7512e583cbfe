"""Cases of the matrix products for kernels.py: experts of a prefill, and every product of decode.

FLOPs are 2*N*D*F; bytes those of the matrices read, and of the rows in prefill. Decode is timed as one program through
all layers, sums and loop included, so that no matrix is found in the cache; time a layer.
Peers on one H200, wall time of a synchronised call: tokamax as it comes, and XLA.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import Check, Timing, Work, repeated

from pallas_kernels import grouped_matmul_gpu, layer_matmul_gpu, matvec_gpu, reference

LAYERS, EXPERTS = 46, 64
GATE, DOWN, RECORDED = (2048, 1536), (1536, 2048), (2048, 3072)  # D x F
RECORDED_PEERS, RECORDED_XLA = ((1610, "tokamax"),), ((34_400, "XLA"),)  # 32,768 rows, 64 experts
FOUR_ROWS_PEERS = ((128, "tokamax"), (373, "XLA"))  # four rows to four experts
F32 = jnp.float32

# Every form in which a decode step of glm-4.7-flash-dsa calls layer_matmul, and a few more:
# layers, in (heads, in), out of each matrix of the launch, their dtypes, eps of the norm within.
LINEAR = {
    "q_a_and_kv_a_normed": (47, (2048,), (768, 576), None, 1e-5),
    "q_b_normed": (47, (768,), (5120,), None, 1e-6),
    "v_b_by_head": (47, (20, 512), (256,), None, None),
    "o": (47, (5120,), (2048,), None, None),
    "index_wq_b": (12, (768,), (4096,), None, None),
    "index_wk": (12, (2048,), (128,), None, None),
    "index_weights": (12, (2048,), (32,), F32, None),
    "dense_gate_and_up_normed": (1, (2048,), (10240, 10240), None, 1e-5),
    "dense_down": (1, (10240,), (2048,), None, None),
    "shared_gate_up_and_router_normed": (46, (2048,), (1536, 1536, 64), (None, None, F32), 1e-5),
    "shared_down": (46, (1536,), (2048,), None, None),
    "head": (1, (2048,), (154880,), F32, None),
    "q_a": (47, (2048,), (768,), None, None),
    "kv_a": (47, (2048,), (576,), None, None),
    "q_a_and_kv_a": (47, (2048,), (768, 576), None, None),
    "q_b": (47, (768,), (5120,), None, None),
    "shared_gate": (46, (2048,), (1536,), None, None),
    "large_stack": (220, (5120,), (2048,), None, None),  # beyond 2^31 elements
}
NOT_TIMED = ("index_wk", "index_weights", "dense_gate_and_up_normed", "dense_down", "large_stack")
# And expert_matmul: a stack's shape, x of a sequence, matrices of the launch, experts of a token (0: matrices by turns).
EXPERT = {
    "k_b_by_head": ((47, 20, 192, 512), (1, 20, 256), 1, 0),
    "gate_and_up": ((LAYERS, EXPERTS, *GATE), (2048,), 2, 4),
    "down": ((LAYERS, EXPERTS, *DOWN), (4, 1536), 1, 4),
}
GROUPED = [  # layers, experts, D, F, rows, kind: 20 and 64 rows are decode of 5 and 16 sequences
    (2, 8, 64, 128, 300, "random"),
    (2, 8, 2048, 1536, 1000, "skewed"),
    (3, 64, 1536, 2048, 64, "random"),
    (LAYERS, EXPERTS, 2048, 1536, 4099, "random"),  # 9.3e9 elements
    (LAYERS, EXPERTS, 1536, 2048, 8192, "skewed"),
    *((LAYERS, EXPERTS, *shape, rows, "random") for shape in (GATE, DOWN) for rows in (1, 4, 16, 20, 64)),
]
SWIGLU = ((64, "random"), (300, "random"), (4099, "random"), (8192, "skewed"))  # rows, kind


@functools.partial(jax.jit, static_argnums=0)
def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=0)
def stack(shape, seed=0):
    """Matrices [layers, ..., rows, columns]: the first and the last layer's random, the rest zeros; bf16."""
    first, last = draw((2, *shape[1:]), seed) * shape[-2] ** -0.5
    return jnp.zeros(shape, jnp.bfloat16).at[0].set(first).at[shape[0] - 1].set(last)


def group_sizes(kind, N, experts=EXPERTS):
    """Rows of each expert, NumPy int32: even, as a random router draws them, or few experts that take most."""
    if kind == "even":
        return np.diff(np.arange(experts + 1) * N // experts).astype(np.int32)
    share = {"random": np.ones(experts), "skewed": 1 / np.arange(1, experts + 1)}[kind]
    drawn = np.random.default_rng(0).choice(experts, N, p=share / share.sum())
    return np.bincount(drawn, minlength=experts).astype(np.int32)


def check_grouped(layers, experts, D, F, N, kind):
    sizes = jnp.asarray(group_sizes(kind, N, experts))
    args = draw((N, D), N), stack((layers, experts, D, F)), jnp.int32(layers - 1), sizes
    y, same = repeated(grouped_matmul_gpu.grouped_matmul, *args)
    wanted = lambda x, w, layer, sizes: jax.lax.ragged_dot(x, w[layer], sizes, preferred_element_type=F32)
    want = jax.jit(wanted)(*args)
    error = float(jnp.abs(y.astype(F32) - want).max() / jnp.abs(want).max())
    return {f"{error:.1e} of the largest": error < 2**-7, "repeats": same}


def gate_and_up(x, gate, up, layer, sizes):
    """What grouped_swiglu does in one launch, in two and a pass."""
    product = functools.partial(grouped_matmul_gpu.grouped_matmul, layer=layer, group_sizes_E=sizes)
    return jax.nn.silu(product(x, gate)) * product(x, up)


def swiglu(N, kind, layers=8):
    gate, sizes = stack((layers, EXPERTS, *GATE)), group_sizes(kind, N)
    return (draw((N, GATE[0]), N) / 8, gate, gate[:, ::-1], jnp.int32(layers - 1), jnp.asarray(sizes)), sizes


def check_swiglu(N, kind):
    """Against two launches: equal but for a few gates whose exponential another one rounds otherwise."""
    args, _ = swiglu(N, kind)
    y, same = repeated(grouped_matmul_gpu.grouped_swiglu, *args)
    want, y = jax.jit(gate_and_up)(*args).astype(F32), y.astype(F32)
    differ, largest = float((y != want).mean()), float((jnp.abs(y - want) / (jnp.abs(want) + 1e-9)).max())
    return {f"{differ:.1e} of them differ": differ < 1e-3, f"by {largest:.1e} at most": largest <= 2**-6, "repeats": same}


def swiglu_of_prefill(f, N, kind):
    args, sizes = swiglu(N, kind)
    D, F = GATE
    return Work(f, args, flops=4 * N * D * F, moved=2 * (N * (D + F) + 2 * int((sizes > 0).sum()) * D * F))


@functools.partial(jax.jit, static_argnums=3)
def off(y, x, w, spec):
    """Largest error of y against the float32 einsum, in what rounding allows: half a last place of y's dtype, and 2^-16 of
    sum |x||w| for the order of a float32 sum."""
    product = lambda f: jnp.einsum(spec, f(x.astype(F32)), f(w.astype(F32)), precision="highest")
    want, size = product(lambda a: a), product(jnp.abs)
    return (jnp.abs(y.astype(F32) - want) / (jnp.finfo(y.dtype).eps / 2 * jnp.abs(want) + 2**-16 * size)).max()


def compared(y, x, matrices, spec, dtypes):
    """{what: held} of products of the same x."""
    error = np.max([off(a, x, w, spec) for a, w in zip(y, matrices, strict=True)])  # unlike Python's, NaN if any is
    held = all(a.dtype == (d or x.dtype) for a, d in zip(y, dtypes, strict=True))
    return {f"{error:.2f} of rounding": error <= 1, "dtypes": held}


def linear(N, form):
    """(arguments, keywords) of layer_matmul; N sequences of one token, as in the model; the norm is the last layer's."""
    layers, inner, outs, dtype, eps = LINEAR[form]
    heads, D = inner[:-1], inner[-1]
    w = [stack((layers, *heads, F, D), n) for n, F in enumerate(outs)]
    if eps is None:
        return (draw((N, 1, *inner), N), w, jnp.int32(layers - 1)), dict(dtype=dtype)
    weights, x = 1 + draw((47, D), 98) / 2, draw((N, 1, D), N) * (2 * eps**0.5)  # so small that eps counts
    return (x, w, jnp.int32(layers - 1), (weights, jnp.int32(46))), dict(dtype=dtype, eps=eps)


def call_linear(x, w, layer, norm=None, *, f, dtype=None, eps=None):
    return f(x, w, layer, dtype, norm, eps)


def check_linear(N, form):
    """Products of a normed x are held against that x; its own rounding is that of the norm, then of its weights."""
    args, how = linear(N, form)
    y, same = repeated(functools.partial(call_linear, f=layer_matmul_gpu.layer_matmul, **how), *args, calls=8)
    (x, w, layer, *norm), found = args, {}
    if norm:
        y, x = y
        given, weights = args[0].astype(F32), norm[0][0][46].astype(F32)
        want = given * jax.lax.rsqrt(jnp.mean(given**2, -1, keepdims=True) + how["eps"]) * weights
        error = float((jnp.abs(x.astype(F32) - want) / (2**-7 * 1.01 * jnp.abs(want) + 1e-30)).max())
        found = {f"norm {error:.2f} of rounding": error <= 1}
    spec = "bsd,fd->bsf" if x.ndim == 3 else "bshd,hfd->bshf"
    return found | compared(y, x, [a[layer] for a in w], spec, reference.each(how["dtype"], w)) | {"repeats": same}


def check_added(N):
    """The output projection with the residual in its launch is the one without it, and a sum."""
    (x, w, layer), _ = linear(N, "o")
    add = draw((N, 1, w[0].shape[1]), 97)
    f = lambda x, w, layer, add=None: layer_matmul_gpu.layer_matmul(x, w, layer, None, None, None, add)
    (y, same), plain = repeated(f, x, w[0], layer, add, calls=8), jax.jit(f)(x, w[0], layer)
    return {"the sum": bool((y == plain + add).all()), "repeats": same}


def check_experts(N, form):
    shape, inner, count, each = EXPERT[form]
    w, layer, x = [stack(shape, n) for n in range(count)], jnp.int32(shape[0] - 1), draw((N, *inner), N)
    expert = jax.random.randint(jax.random.key(N), (N, each), 0, shape[1]) if each else None
    y, same = repeated(matvec_gpu.expert_matmul, x, w, layer, expert, calls=8)
    spec = "bshd,hdf->bshf" if expert is None else "nxd,nxdf->nxf" if x.ndim == 3 else "nd,nxdf->nxf"
    matrices = [a[layer] if expert is None else a[layer, expert] for a in w]
    return compared(y, x[..., : shape[2]], matrices, spec, (None,) * count) | {"repeats": same}


def experts_of_prefill(f, N, kind, D, F, layers=LAYERS):
    w, sizes = stack((layers, EXPERTS, D, F)), group_sizes(kind, N)
    args = draw((N, D), N), w, jnp.int32(layers - 1), jnp.asarray(sizes)
    return Work(f, args, flops=2 * N * D * F, moved=2 * (N * (D + F) + int((sizes > 0).sum()) * D * F))


def tokamax(block_n):
    """tokamax's kernel on one layer's matrices, as it comes or with tiles of 128 x block_n."""
    from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu
    from tokamax._src.ops.ragged_dot.pallas_mosaic_gpu_common import Config

    tiles = dict(block_m=128, block_n=block_n, block_k=64, num_stages=4, split_k=1, persistent=True, grid_tile_width=4)
    op = pallas_mosaic_gpu.PallasMosaicGpuRaggedDot(config=Config(**tiles) if block_n else None)
    f = lambda x, w, layer, sizes: op(x, w[0], group_sizes=sizes)
    return experts_of_prefill(f, 32768, "even", *RECORDED, layers=1)


def through_layers(product, layers):
    """One program that adds up product(*args, layer) over all layers."""

    def run(*args):
        def step(total, layer):
            return jax.tree.map(lambda a, y: a + y.astype(F32), total, product(*args, layer)), None

        zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, F32), jax.eval_shape(product, *args, jnp.int32(0)))
        return jax.lax.scan(step, zeros, jnp.arange(layers))[0]

    return run


def single_rows(x, w, layer, sizes):
    expert_N = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right", method="compare_all")
    return matvec_gpu.matvec(x, [w], layer, expert_N.astype(jnp.int32))[0].astype(x.dtype)


def experts_of_decode(f, N, D, F, layers=LAYERS):
    """Each row has an expert of its own, other ones in every layer."""

    def product(x, w, experts_LN, layer):
        return f(x, w, layer, jnp.bincount(experts_LN[layer], length=EXPERTS).astype(jnp.int32))

    rng = np.random.default_rng(N)
    experts = np.sort(np.stack([rng.choice(EXPERTS, N, replace=False) for _ in range(layers)]), -1)
    args = draw((N, D), N), stack((layers, EXPERTS, D, F)), jnp.asarray(experts, jnp.int32)
    return Work(through_layers(product, layers), args, moved=2 * N * D * F, layers=layers)


def dense(f, N, form):
    """Every layer's matrices on the same rows; the norm's weights are the last layer's."""
    (x, w, layer, *norm), how = linear(N, form)
    product = lambda x, w, *rest: call_linear(x, w, rest[-1], *rest[:-1], f=f, **how)
    layers, bytes_ = len(w[0]), sum(2 * math.prod(a.shape[1:]) for a in w)
    return Work(through_layers(product, layers), (x, w, *norm), moved=bytes_, layers=layers)


def cases():
    make, op = functools.partial, "grouped_matmul"
    for layers, experts, D, F, N, kind in GROUPED:
        name = f"{N}_{kind}.{layers}x{experts}x{D}x{F}"
        yield Check(f"{op}.{'prefill' if N > 64 else 'decode'}.{name}", make(check_grouped, layers, experts, D, F, N, kind))
    for N, kind in SWIGLU:
        yield Check(f"{op}.prefill.swiglu.{N}_{kind}", make(check_swiglu, N, kind))
    for form in LINEAR:
        for N in (1, 2, 4) if form.startswith("large") else (1, 4):
            yield Check(f"{op}.dense.{form}.{N}", make(check_linear, N, form))
    for N in (1, 4):
        yield Check(f"{op}.dense.o_added.{N}", make(check_added, N))
    for form in EXPERT:
        for N in (1, 2, 3, 4):
            yield Check(f"{op}.decode.{form}.{N}", make(check_experts, N, form))
    prefill = make(make, experts_of_prefill)
    name = f"{op}.prefill.32768_even.2048x3072"
    yield Timing(name, prefill(grouped_matmul_gpu.ragged, 32768, "even", *RECORDED, layers=1), RECORDED_PEERS)
    for block_n, how in {None: "", 128: "_128x128", 256: "_128x256"}.items():
        yield Timing(f"{name}.tokamax{how}", make(tokamax, block_n), RECORDED_PEERS, ours=False)
    xla = prefill(reference.grouped_matmul, 32768, "even", *RECORDED, layers=1)
    yield Timing(f"{name}.xla", xla, RECORDED_XLA, ours=False)
    for D, F in (GATE, DOWN):
        for N, kind in ((32768, "random"), (16384, "random"), (16384, "skewed"), (4096, "random"), (64, "random")):
            yield Timing(f"{op}.prefill.{N}_{kind}.{D}x{F}", prefill(grouped_matmul_gpu.ragged, N, kind, D, F))
    for N in (32768, 16384, 4096):
        for path, f in {"one_launch": grouped_matmul_gpu.grouped_swiglu, "two_launches": gate_and_up}.items():
            yield Timing(f"{op}.prefill.swiglu.{N}_random.{path}", make(swiglu_of_prefill, f, N, "random"))
    for D, F in (GATE, DOWN):
        for N in (4, 8, 16, 32, 64):
            paths = {"single_rows": single_rows, "tiles": grouped_matmul_gpu.ragged}
            for path, f in (paths | ({"xla": reference.grouped_matmul} if N == 4 else {})).items():
                yield Timing(f"{op}.decode.{N}x{D}x{F}.{path}", make(experts_of_decode, f, N, D, F), ours=path != "xla")
    four = make(experts_of_decode, single_rows, 4, *RECORDED, layers=8)
    yield Timing(f"{op}.decode.4x2048x3072.single_rows", four, FOUR_ROWS_PEERS)
    for form in LINEAR:
        for N in (1, 4) if form not in NOT_TIMED else ():
            yield Timing(f"{op}.dense.{form}.{N}.in_place", make(dense, layer_matmul_gpu.layer_matmul, N, form))
            yield Timing(f"{op}.dense.{form}.{N}.xla", make(dense, reference.layer_matmul, N, form), ours=False)
