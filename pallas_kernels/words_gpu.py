"""Integer code inside `plgpu.inline_mgpu`: words with Python operators, branches, loops, buffers in shared memory.

Pallas Mosaic GPU has no lowering for histograms, warp shuffles or compaction; written through these few classes such
code reads like Python and becomes plain MLIR. Used by the top-k and indexer kernels.
"""

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, nvvm, scf
from jax.experimental.mosaic import gpu as mgpu


class Word:
    """A 32-bit integer (or i1) in MLIR with Python operators; comparisons and shifts are unsigned."""

    def __init__(self, value):
        self.v = mgpu.c(value, ir.IntegerType.get_signless(32)) if isinstance(value, int) else value

    def _op(self, op, other):
        return Word(op(self.v, (other if isinstance(other, Word) else Word(other)).v))

    def _cmp(self, predicate, other):
        return Word(arith.cmpi(predicate, self.v, (other if isinstance(other, Word) else Word(other)).v))

    # fmt: off
    def __add__(self, o): return self._op(arith.addi, o)
    def __sub__(self, o): return self._op(arith.subi, o)
    def __mul__(self, o): return self._op(arith.muli, o)
    def __floordiv__(self, o): return self._op(arith.divui, o)
    def __mod__(self, o): return self._op(arith.remui, o)
    def __and__(self, o): return self._op(arith.andi, o)
    __radd__, __rmul__ = __add__, __mul__
    def __or__(self, o): return self._op(arith.ori, o)
    def __xor__(self, o): return self._op(arith.xori, o)
    def __lshift__(self, o): return self._op(arith.shli, o)
    def __rshift__(self, o): return self._op(arith.shrui, o)
    def min(self, o): return self._op(arith.minui, o)
    def max(self, o): return self._op(arith.maxui, o)
    def __lt__(self, o): return self._cmp(arith.CmpIPredicate.ult, o)
    def __le__(self, o): return self._cmp(arith.CmpIPredicate.ule, o)
    def __gt__(self, o): return self._cmp(arith.CmpIPredicate.ugt, o)
    def __ge__(self, o): return self._cmp(arith.CmpIPredicate.uge, o)
    def eq(self, o): return self._cmp(arith.CmpIPredicate.eq, o)
    def ne(self, o): return self._cmp(arith.CmpIPredicate.ne, o)
    # fmt: on

    def select(self, yes, no):
        yes, no = (x if isinstance(x, Word) else Word(x) for x in (yes, no))
        return Word(arith.select(self.v, yes.v, no.v))

    def to_int(self):
        return Word(arith.extui(ir.IntegerType.get_signless(32), self.v))

    def index(self):
        return arith.index_castui(ir.IndexType.get(), self.v)


def asm(result, text, constraints, *args):
    return Word(llvm.inline_asm(result, [a.v for a in args], text, constraints, has_side_effects=True))


def asm_i32(text, constraints, *args):
    return asm(ir.IntegerType.get_signless(32), text, constraints, *args)


def popcount(x):
    return asm_i32("popc.b32 $0, $1;", "=r,r", x)


def leading_zeros(x):
    return asm_i32("clz.b32 $0, $1;", "=r,r", x)


def shuffle(x, lane, kind, clamp=31):
    return Word(
        nvvm.shfl_sync(Word(-1).v, x.v, (lane if isinstance(lane, Word) else Word(lane)).v, Word(clamp).v, kind)
    )


def when(predicate, then):
    op = scf.IfOp(predicate.v)
    with ir.InsertionPoint(op.then_block):
        then()
        scf.yield_([])


def when_values(predicate, then, otherwise):
    """Both branches return lists of Words of one type; the result is that of the branch taken."""
    types = [w.v.type for w in otherwise]
    op = scf.IfOp(predicate.v, types, has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.yield_([w.v for w in then()])
    with ir.InsertionPoint(op.else_block):
        scf.yield_([w.v for w in otherwise])
    return [Word(r) for r in op.results]


def loop(low, high, step, body, carry=()):
    low, high, step = (x if isinstance(x, Word) else Word(x) for x in (low, high, step))
    op = scf.ForOp(low.v, high.v, step.v, [w.v for w in carry])
    with ir.InsertionPoint(op.body):
        out = body(Word(op.induction_variable), *[Word(a) for a in op.inner_iter_args])
        scf.yield_([w.v for w in (out or ())])
    return [Word(r) for r in op.results]


class Shared:
    """A one-dimensional int32 buffer in shared memory."""

    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, i):
        return Word(memref.load(self.ref, [(i if isinstance(i, Word) else Word(i)).index()]))

    def __setitem__(self, i, value):
        memref.store(
            (value if isinstance(value, Word) else Word(value)).v,
            self.ref,
            [(i if isinstance(i, Word) else Word(i)).index()],
        )

    def address(self, i=0):
        base = Word(llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(self.ref)))
        return base + (i if isinstance(i, Word) else Word(i)) * 4

    def update(self, op, i, value):
        """Atomic without a result; relaxed, because memref.atomic_rmw orders with system scope and a fence each."""
        value = value if isinstance(value, Word) else Word(value)
        llvm.inline_asm(
            None,
            [self.address(i).v, value.v],
            f"red.relaxed.cta.shared.{op} [$0], $1;",
            "r,r,~{memory}",
            has_side_effects=True,
        )

    def load4(self, i):
        """Words i .. i + 3, i a multiple of 4."""
        i32 = ir.IntegerType.get_signless(32)
        ptr = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(self.ref), [i.v], i32)
        v = llvm.load(ir.VectorType.get((4,), i32), ptr, alignment=16)
        return [Word(llvm.extractelement(v, Word(j).v)) for j in range(4)]

    def fetch_add(self, i, value):
        value = value if isinstance(value, Word) else Word(value)
        return asm_i32("atom.relaxed.cta.shared.add.u32 $0, [$1], $2;", "=r,r,r,~{memory}", self.address(i), value)
