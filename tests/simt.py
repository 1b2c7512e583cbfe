"""Runs code written with ``pallas_kernels.words_gpu`` on a CPU: every word is a NumPy vector over the block's threads.

Threads go in lockstep, a branch is a mask. Shared memory checks bounds and, between two barriers, that no thread reads
or overwrites what another one wrote or read: a missing barrier fails although lockstep would hide it.
"""

import numpy as np

THREADS = 512
_masks = [np.ones(THREADS, bool)]
_epoch = [0]


def active():
    return _masks[-1]


class Word:
    def __init__(self, value):
        value = value.v if isinstance(value, Word) else value
        if isinstance(value, int):
            value = np.full(THREADS, value & 0xFFFFFFFF, np.uint32)
        self.v = np.broadcast_to(value, THREADS)

    def _op(self, f, other):
        with np.errstate(over="ignore"):
            return Word(f(self.v, Word(other).v))

    # fmt: off
    def __add__(self, o): return self._op(np.add, o)
    def __sub__(self, o): return self._op(np.subtract, o)
    def __mul__(self, o): return self._op(np.multiply, o)
    def __floordiv__(self, o): return self._op(np.floor_divide, o)
    def __mod__(self, o): return self._op(np.remainder, o)
    def __and__(self, o): return self._op(np.bitwise_and, o)
    def __or__(self, o): return self._op(np.bitwise_or, o)
    __radd__, __rmul__ = __add__, __mul__
    def __lshift__(self, o): return self._op(np.left_shift, o)
    def __rshift__(self, o): return self._op(np.right_shift, o)
    def __lt__(self, o): return self._op(np.less, o)
    def __ge__(self, o): return self._op(np.greater_equal, o)
    def eq(self, o): return self._op(np.equal, o)
    def min(self, o): return self._op(np.minimum, o)
    # fmt: on

    def select(self, yes, no):
        return Word(np.where(self.v, Word(yes).v, Word(no).v))


def popcount(x):
    return Word(np.bitwise_count(x.v).astype(np.uint32))


def shuffle(x, lane, kind, clamp=31):
    del clamp
    own, lane = np.arange(THREADS) % 32, Word(lane).v
    source = np.where(own >= lane, own - lane, own) if str(kind).endswith("up") else lane
    return Word(x.v[np.arange(THREADS) // 32 * 32 + source])


def sync():
    assert active().all(), "a barrier that some threads do not reach"
    _epoch[0] += 1


def when(predicate, then):
    _masks.append(active() & predicate.v.astype(bool))
    if active().any():
        then()
    _masks.pop()


def loop(low, high, step, body, carry=()):
    at, high, step, carry = Word(low), Word(high), Word(step), [Word(c) for c in carry]
    while (active() & (at < high).v).any():
        _masks.append(active() & (at < high).v)
        out = body(at, *carry) or ()
        carry = [Word(np.where(active(), new.v, old.v)) for new, old in zip(out, carry, strict=True)]
        _masks.pop()
        at = at + step
    return carry


class Shared:
    """Words in shared memory, with who touched them since the last barrier; -1 stands for several threads."""

    def __init__(self, n):
        self.words = np.random.default_rng(0).integers(0, 2**32, n, np.uint32)  # as a kernel finds them
        self.written, self.read = np.full((2, n, 2), -1)  # (epoch, thread)

    def _touch(self, at, before, now):
        thread, at = np.arange(THREADS)[active()], at[active()].astype(np.int64)
        assert (at < len(self.words)).all(), "outside of the buffer"
        for log in before:
            assert ((log[at, 0] != _epoch[0]) | (log[at, 1] == thread)).all(), "no barrier since another thread's access"
        shared = (now[at, 0] == _epoch[0]) & (now[at, 1] != thread)
        now[at] = np.stack([np.full_like(thread, _epoch[0]), np.where(shared, -1, thread)], -1)
        several = np.bincount(at, minlength=len(self.words)) > 1
        now[several, 1] = -1
        return at

    def __getitem__(self, i):
        at = Word(i).v
        self._touch(at, [self.written], self.read)
        return Word(self.words[np.where(active(), at, 0)])

    def load4(self, i):
        return [self[i + j] for j in range(4)]

    def __setitem__(self, i, value):
        at = self._touch(Word(i).v, [self.written, self.read], self.written)
        assert len(np.unique(at)) == len(at), "two threads write one word"
        self.words[at] = Word(value).v[active()]

    def update(self, op, i, value):
        assert op == "or.b32"
        at = self._touch(Word(i).v, [self.read], self.written)
        np.bitwise_or.at(self.words, at, Word(value).v[active()])


def patch(monkeypatch, *modules):
    """Makes the modules' names of words_gpu those of this file."""
    for module in modules:
        for name in ("Word", "popcount", "shuffle", "sync", "when", "loop"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, globals()[name])
