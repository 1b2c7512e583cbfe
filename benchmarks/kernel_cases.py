"""What a case of kernels.py is, how it is run, and the one clock that times all kernels.

Flow: a module of cases (kernels_<op>.py) -> Check or Timing -> ``run`` -> a row of JSON values, which kernels.py prints.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import limits

CALLS = 8  # of a timed program, each way it is timed


@dataclasses.dataclass(frozen=True)
class Check:
    """A comparison. name: op.part.case. run: () -> {what was compared: whether it held}, at least one."""

    name: str
    run: Callable[[], dict[str, bool]]


class Work(NamedTuple):
    """What is timed: f(*args), jitted by the clock.

    layers: equal pieces of work in one call; times are given for one. flops and moved (bytes): of such a piece.
    fp8: whether the FLOPs are fp8's. note: what the inputs turned out to be.
    """

    f: Callable
    args: tuple
    flops: float = 0
    moved: float = 0
    layers: int = 1
    fp8: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Timing:
    """A measurement. make: () -> Work, called when its turn comes.

    peers: (microseconds, whose) recorded elsewhere. reach: microseconds of device time to stay within. ours: False for
    another's kernel that is run beside ours: when it fails, the benchmark has not.
    """

    name: str
    make: Callable[[], Work]
    peers: tuple[tuple[float, str], ...] = ()
    reach: tuple[float, ...] = ()
    ours: bool = True


def repeated(f, *args, calls: int = 2) -> tuple[Any, bool]:
    """(what jitted f(*args) returns, whether it returned the same every time)."""
    f = jax.jit(f)
    first = f(*args)
    alike = lambda: all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(f(*args)), strict=True))
    return first, all(alike() for _ in range(calls - 1))


def clock(work: Work, calls: int = CALLS) -> dict:
    """Microseconds of a piece of ``work``: device (sum of its kernels by CUPTI; median), spread (largest less smallest),
    queued (calls issued back to back), wall (one synchronised call), and the kernels of one call."""
    from jax.experimental.mosaic.gpu import profiler

    began = time.perf_counter()
    program = jax.jit(work.f).lower(*work.args).compile()
    compile_s = time.perf_counter() - began

    def seconds(repeats):
        began = time.perf_counter()
        for _ in range(repeats):
            out = program(*work.args)
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / repeats

    seconds(1)
    wall = statistics.median(seconds(1) for _ in range(calls))
    queued = statistics.median(seconds(calls) for _ in range(3))
    _, runs = profiler.measure(program, aggregate=False, iterations=calls)(*work.args)
    device = [1e3 * sum(t for _, t in run) for run in runs]
    us = dict(device=statistics.median(device), spread=max(device) - min(device), queued=1e6 * queued, wall=1e6 * wall)
    found = {f"{name}_us": round(value / work.layers, 3) for name, value in us.items()}
    kernels = [(name[-32:], round(1e3 * t, 1)) for name, t in runs[0]] if work.layers == 1 else []
    return found | dict(compile_s=round(compile_s, 2), launches=len(runs[0]) / work.layers, kernels=kernels)


def rates(work: Work, device_us: float, device_kind: str) -> list[dict]:
    """What a piece of ``work`` reaches, and its share of the device's limit where that has been measured (limits.py)."""
    limit, found = limits.MEASURED.get(device_kind), []
    for amount, unit, peak in (
        (work.flops, "TFLOP/s", limit and (limit.fp8 if work.fp8 else limit.bf16)),
        (work.moved, "TB/s", limit and limit.copy),
    ):
        if amount:
            rate = amount / device_us * 1e6
            found.append(dict(unit=unit, rate=rate / 1e12) | (dict(share=rate / peak, limit=peak / 1e12) if peak else {}))
    return found


def verdict(device_us: float, reach: float) -> str:
    """Whether a target in microseconds is met, or missed by what part of it."""
    over = 100 * (device_us / reach - 1)
    return "met" if over <= 0 else f"missed by {over:{'.0f' if over >= 1 else '.1g'}} %"


def run(case: Check | Timing, device_kind: str) -> dict:
    """The row of a case: name, kind ("check" or "time"), ok, ours, note, seconds it took; a timing's figures besides.

    Whatever a case raises ends nobody else: it is noted in the row, its traceback goes to stderr.
    """
    timed = isinstance(case, Timing)
    row = dict(name=case.name, kind="time" if timed else "check", ok=False, ours=getattr(case, "ours", True))
    began = time.perf_counter()
    try:
        if timed:
            work = case.make()
            row |= clock(work)
            row |= dict(ok=True, note=work.note, rates=rates(work, row["device_us"], device_kind), peers=case.peers)
            row["reach"] = [(us, verdict(row["device_us"], us)) for us in case.reach]
        else:
            found = case.run()
            note = "; ".join(what if held else f"WRONG: {what}" for what, held in found.items())
            row |= dict(ok=bool(found) and all(found.values()), note=note)
    except Exception as error:
        traceback.print_exc(limit=-3, file=sys.stderr)
        row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return row | dict(seconds=round(time.perf_counter() - began, 2))
