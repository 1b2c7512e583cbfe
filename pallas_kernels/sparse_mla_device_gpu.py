"""Device code of the Hopper sparse MLA kernels for which Pallas has no primitive: gathers, masked stores, atomics.

Every function here is called by all threads of a warpgroup and inlines MLIR or PTX (`plgpu.inline_mgpu`). Rows move by
cp.async, eight lanes to the 128 bytes of one row and column tile, into SMEM tiled (8, 64) with 128-byte swizzle: the
16-byte chunk c of row r of a tile stands at chunk c ^ (r % 8).
"""

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

LATENT, WIDTH, BLOCK = 512, 576, 64
COLUMNS = ((0, 4), (4, 9))  # column tiles of 64 that land together; the score starts on the first group
SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
ROW, COL = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
IDX = plgpu.Layout.WG_STRIDED((4 * 128,), vec_size=1)
SCALAR = plgpu.Layout.WG_SPLAT
REF, TILE = plgpu.RefType(), plgpu.RefType(SWIZZLE)


def i32(v):
    return mgpu.c(v, ir.IntegerType.get_signless(32))


def i64(v):
    return mgpu.c(v, ir.IntegerType.get_signless(64))


def wide(v):
    return arith.extsi(ir.IntegerType.get_signless(64), v)


def add(*terms):
    total, *rest = terms
    for term in rest:
        total = arith.addi(total, term)
    return total


def asm(text, operands, constraints, result=None):
    """Inline PTX, kept in order with its neighbours; `result` is the MLIR type of $0, if any."""
    result = result or ir.Type.parse("!llvm.void")
    return llvm.inline_asm(result, operands, text, constraints, has_side_effects=True, asm_dialect=0)


def address(ref):
    """The address of a ref: 32 bits in SMEM, 64 bits in global memory."""
    pointer = mgpu.utils.memref_ptr(ref)
    bits = 32 if mgpu.utils.is_smem_ref(ref) else 64
    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), pointer)


def thread():
    """The thread's number in its warpgroup."""
    return arith.remui(mgpu.utils.thread_idx(), i32(128))


def fresh_thread():
    """As thread(), but read anew: what derives from it stays where it is used; hoisted, it would fill the registers."""
    return arith.remui(asm("mov.u32 $0, %tid.x;", [], "=r", ir.IntegerType.get_signless(32)), i32(128))


def value(scalar):
    """The register of a scalar argument."""
    return scalar.registers.item()


def element(register, i=0):
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))


def indices(rows):
    """An IDX array of four int32 a thread."""
    registers = [vector.broadcast(ir.VectorType.get((1,), row.type), row) for row in rows]
    return mgpu.FragmentedArray(_registers=np.array(registers, dtype=object), _layout=IDX.to_mgpu(), _is_signed=True)


def opaque_zero():
    """A zero that LLVM cannot see through: addresses that depend on it stay in the loop; hoisted, they would spill."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def body(ctx):
        zero = asm("mov.b32 $0, 0;", [], "=r", ir.IntegerType.get_signless(32))
        return mgpu.FragmentedArray.splat(zero, (), is_signed=True)

    return body()


def init_barriers(bars, counts):
    """Sets mbarrier i, at bars[i] ([n, 2] int32 in SMEM), to counts[i] arrivals; every thread of the block calls it."""

    @plgpu.inline_mgpu(arg_types=(REF,))
    def body(ctx, ref):
        for i, count in enumerate(counts):
            init = f"@p mbarrier.init.shared::cta.b64 [$1 + {8 * i}], {count};"
            asm(f"{{.reg .pred p; setp.eq.s32 p, $0, 0; {init}}}", [mgpu.utils.thread_idx(), address(ref)], "r,r")
        asm("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta; bar.sync 0;", [], "")

    body(bars)


def wait_full(bars, which, parity):
    """Waits for a phase of each mbarrier in `which` and makes what was gathered visible to wgmma."""

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR))
    def body(ctx, ref, parity):
        for i in which:
            wait = "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n@!p bra WAIT;"
            asm(f"{{\n.reg .pred p;\n{wait}\n}}", [add(address(ref), i32(8 * i)), value(parity)], "r,r")
        asm("fence.proxy.async.shared::cta;", [], "")

    body(bars, parity)


def meet(copies=False):
    """The whole block meets; SMEM written before (with `copies`, by started copies too) is visible to wgmma after."""

    @plgpu.inline_mgpu()
    def body(ctx):
        asm(("cp.async.wait_all; " if copies else "") + "fence.proxy.async.shared::cta; bar.sync 0;", [], "")

    body()


def load_rows(rows_ref, query, base, limit, bound):
    """The 64 entries from `base` of rows_ref[query], as the gathering threads need them: [512] int32, four a thread.

    -1 at and after `limit`, and for entries outside [0, bound).
    """

    @plgpu.inline_mgpu(
        arg_types=(REF, SCALAR, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((512,), jnp.int32, layout=IDX),
    )
    def body(ctx, ref, query, base, limit):
        width = ir.MemRefType(ref.type).shape[1]
        first = add(value(base), arith.divui(thread(), i32(8)))
        offset = add(arith.muli(wide(value(query)), i64(width)), wide(first))
        at = add(address(ref), arith.muli(offset, i64(4)))
        rows = []
        for p in range(4):
            load = f"setp.lt.s32 p, $1, $2; mov.b32 $0, -1; @p ld.global.nc.b32 $0, [$3 + {64 * p}];"
            text = f"{{.reg .pred p; {load} setp.ge.u32 p, $0, {bound}; @p mov.b32 $0, -1;}}"
            args = [add(first, i32(16 * p)), value(limit), at]
            rows.append(asm(text, args, "=&r,r,r,l", ir.IntegerType.get_signless(32)))
        return indices(rows)

    return body(rows_ref, query, base, limit)


def count_rows(first, count):
    """Like load_rows, for the rows first, first + 1, ... first + count - 1."""

    @plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR), return_type=plgpu.ShapeDtypeStruct((512,), jnp.int32, layout=IDX))
    def body(ctx, first, count):
        rows = []
        for p in range(4):
            row = add(arith.divui(thread(), i32(8)), i32(16 * p))
            inside = arith.cmpi(arith.CmpIPredicate.slt, row, value(count))
            rows.append(arith.select(inside, add(row, value(first)), i32(-1)))
        return indices(rows)

    return body(first, count)


def _copies(src, offset, rows, dst, tid):
    """A function that starts copying column tiles first..stop of src[offset + rows] into dst; -1 becomes zeros."""
    pitch, tiles = 2 * ir.MemRefType(src.type).shape[-1], ir.MemRefType(dst.type).shape[1]
    row, chunk = arith.divui(tid, i32(8)), arith.remui(tid, i32(8))
    inside = arith.remui(row, i32(8))
    swizzled = add(arith.muli(inside, i32(128)), arith.muli(arith.xori(chunk, inside), i32(16)))
    to = add(address(dst), arith.muli(arith.divui(row, i32(8)), i32(1024 * tiles)), swizzled)
    base = add(address(src), wide(arith.muli(chunk, i32(16))))
    at, size = [], []
    for register in rows.registers.flat:
        there = arith.cmpi(arith.CmpIPredicate.sge, element(register), i32(0))
        size.append(arith.select(there, i32(16), i32(0)))
        number = add(wide(arith.select(there, element(register), i32(0))), wide(value(offset)))
        at.append(add(base, arith.muli(number, i64(pitch))))

    def start(first, stop):
        for p in range(4):
            copy = "cp.async.cg.shared.global.L2::128B [$0 + {}], [$1 + {}], 16, $2;\n"
            text = "".join(copy.format(2048 * tiles * p + 1024 * c, 128 * c) for c in range(first, stop))
            asm(text, [to, at[p], size[p]], "r,l,r")

    return start


def _keep(values, dst, tid):
    """Writes the step's 64 entries, four registers a thread, to dst [64] of 32-bit words in SMEM."""
    row, chunk = arith.divui(tid, i32(8)), arith.remui(tid, i32(8))
    at = add(address(dst), arith.muli(row, i32(4)))
    for p, word in enumerate(values):
        text = f"{{.reg .pred p; setp.eq.s32 p, $0, 0; @p st.shared.b32 [$1 + {64 * p}], $2;}}"
        asm(text, [chunk, at, word], "r,r,r")


def gather(src, offset, rows, dst, bars, first_bar, word=None, owners=None):
    """Starts copying src[offset + rows] ([n, 576] bf16) into dst [64, 576], one mbarrier per group of COLUMNS.

    Rows of -1 become zeros; `word` [64] tells the consumers: -inf there and 0.0 elsewhere or, given `owners`, the owner
    bits as int32 (0 for no row). Two arrivals a thread on each mbarrier: one when its copies are done (noinc), one that
    publishes `word`.
    """
    optional = [(word, REF), (owners, IDX)]
    given = [(arg, kind) for arg, kind in optional if arg is not None]

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR, IDX, TILE, REF, *(kind for _, kind in given)))
    def body(ctx, src, offset, rows, dst, bars, word=None, owners=None):
        start = _copies(src, offset, rows, dst, thread())
        if word is not None:
            there = [arith.cmpi(arith.CmpIPredicate.sge, element(r), i32(0)) for r in rows.registers.flat]
            if owners is None:
                words = [arith.select(ok, i32(0), i32(-8388608)) for ok in there]  # the bits of 0.0 and -inf
            else:
                bits = [element(r) for r in owners.registers.flat]
                words = [arith.select(ok, bit, i32(0)) for ok, bit in zip(there, bits, strict=True)]
            _keep(words, word, thread())
        for n, columns in enumerate(COLUMNS):
            start(*columns)
            arrive = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];\n"
            publish = "{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [$0];}"
            asm(arrive + publish, [add(address(bars), i32(8 * (first_bar + n)))], "r")

    body(src, offset, rows, dst, bars, *(arg for arg, _ in given))


def copy_columns(src, offset, rows, dst, first, count):
    """Starts copying column tiles first..first + count of src[offset + rows] into dst [64, n]; `meet` waits."""

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR, IDX, TILE))
    def body(ctx, src, offset, rows, dst):
        _copies(src, offset, rows, dst, fresh_thread())(first, first + count)

    body(src, offset, rows, dst)


def keep_rows(rows, dst):
    """Writes the step's 64 row numbers to dst [64] int32 in SMEM."""

    @plgpu.inline_mgpu(arg_types=(IDX, REF))
    def body(ctx, rows, dst):
        _keep([element(r) for r in rows.registers.flat], dst, fresh_thread())

    body(rows, dst)


def keep_stat(src, dst, first, count):
    """dst[i] = src[first + i] for i < count, else 0: a float32 per row of the tile, from global memory to SMEM."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, SCALAR, SCALAR))
    def body(ctx, src, dst, first, count):
        at = add(address(src), arith.muli(wide(add(value(first), fresh_thread())), i64(4)))
        to = add(address(dst), arith.muli(fresh_thread(), i32(4)))
        load = "mov.b32 x, 0; setp.lt.s32 p, $0, $1; @p ld.global.nc.b32 x, [$2];"
        text = f"{{.reg .pred p; .reg .b32 x; {load} setp.lt.s32 p, $0, 64; @p st.shared.b32 [$3], x;}}"
        asm(text, [fresh_thread(), value(count), at, to], "r,r,l,r")

    body(src, dst, first, count)


def _fragment_row(tid):
    """The first of the two rows (the other is 8 below) that a thread holds of a 64-row wgmma accumulator."""
    warp, lane = arith.divui(tid, i32(32)), arith.remui(tid, i32(32))
    return add(arith.muli(warp, i32(16)), arith.divui(lane, i32(4)))


def store_rows(array, dst, first, count, column):
    """Writes the first `count` rows of array [64, n] (or [64]) to dst[first:, column:column + n] (or dst[first:])."""
    layout = plgpu.Layout.WGMMA if array.ndim == 2 else ROW

    @plgpu.inline_mgpu(arg_types=(layout, REF, SCALAR, SCALAR))
    def body(ctx, array, dst, first, count):
        row, lane = _fragment_row(thread()), arith.remui(thread(), i32(4))
        kind = ir.MemRefType(dst.type)
        size = mgpu.utils.bytewidth(kind.element_type)
        pitch = size * (kind.shape[1] if len(kind.shape) == 2 else 1)
        at = add(address(dst), arith.muli(wide(add(row, value(first))), i64(pitch)))
        below = [add(row, i32(8 * h)) for h in range(2)]
        if len(array.shape) == 1:
            for h, register in enumerate(array.registers.flat):
                mask = "setp.lt.s32 p, $0, $1; setp.eq.and.s32 p, $4, 0, p;"
                text = f"{{.reg .pred p; {mask} @p st.global.b32 [$2 + {8 * h * pitch}], $3;}}"
                asm(text, [below[h], value(count), at, element(register), lane], "r,r,l,f,r")
            return
        at = add(at, wide(arith.muli(lane, i32(2 * size))))
        word, constraint = ("b32", "r") if size == 2 else ("b64", "l")
        for g, pair in enumerate(array.registers.reshape(-1, 2)):  # 8 columns, both rows
            for h, register in enumerate(pair):
                to = 8 * h * pitch + (column + 8 * g) * size
                text = f"{{.reg .pred p; setp.lt.s32 p, $0, $1; @p st.global.{word} [$2 + {to}], $3;}}"
                bits = llvm.bitcast(ir.IntegerType.get_signless(16 * size), register)
                asm(text, [below[h], value(count), at, bits], f"r,r,l,{constraint}")

    body(array, dst, first, count)


def store_columns(array, dst, column):
    """Writes array [64, n] bf16 to columns column..column + n of dst [64, 64] in SMEM."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, TILE))
    def body(ctx, array, dst):
        tid = fresh_thread()
        row = _fragment_row(tid)
        inside = arith.remui(row, i32(8))
        within = add(arith.muli(inside, i32(128)), arith.muli(arith.remui(tid, i32(4)), i32(4)))
        base = add(address(dst), arith.muli(arith.divui(row, i32(8)), i32(1024)), within)
        for g, pair in enumerate(array.registers.reshape(-1, 2)):
            at = add(base, arith.muli(arith.xori(i32(column // 8 + g), inside), i32(16)))
            for h, register in enumerate(pair):
                bits = llvm.bitcast(ir.IntegerType.get_signless(32), register)
                asm(f"st.shared.b32 [$0 + {1024 * h}], $1;", [at, bits], "r,r")

    body(array, dst)


def scatter_add(array, dst, rows, column):
    """dst[rows[i], column + j] += array[i, j] but for rows of -1; array [64, n], dst [m, 576] float32; atomic."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, REF, ROW, SCALAR))
    def body(ctx, array, dst, rows, column):
        lane = arith.remui(fresh_thread(), i32(4))
        base = add(address(dst), wide(add(arith.muli(value(column), i32(4)), arith.muli(lane, i32(8)))))
        registers = array.registers.reshape(-1, 2)
        for h, register in enumerate(rows.registers.flat):
            row = element(register)
            at = add(base, arith.muli(wide(row), i64(4 * WIDTH)))
            for g in range(len(registers)):
                text = f"{{.reg .pred p; setp.ge.s32 p, $0, 0; @p red.global.add.v2.f32 [$1 + {32 * g}], {{$2, $3}};}}"
                asm(text, [row, at, element(registers[g, h], 0), element(registers[g, h], 1)], "r,l,f,f")

    body(array, dst, rows, jnp.int32(column))
