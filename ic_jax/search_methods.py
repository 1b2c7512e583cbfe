"""The ways to choose layers, without a model: greedy (Algorithm 1), uniform, and the similarity programme of App. C.

Source: IndexCache paper (arXiv 2603.12201). ``search`` gives them losses and similarities.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .errors import UserError
from .pattern import Pattern


def flip(pattern: Pattern, layer: int) -> Pattern:
    """The pattern with ``layer`` shared."""
    return Pattern(pattern.layers[:layer] + "S" + pattern.layers[layer + 1 :])


def kept_layers(keep: float | int, n: int) -> int:
    """How many of ``n`` layers stay full: a float is a share of them, rounded up, an int a count.

    Raises UserError for a share of 0 or more than 1, or a count outside 1..n.
    """
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real) or not math.isfinite(keep):
        raise UserError(f"--keep must be a share such as 0.25 or a count of layers, not {keep!r}")
    if isinstance(keep, numbers.Integral):
        if not 1 <= keep <= n:
            raise UserError(f"--keep {keep} is a count of layers and must lie in 1..{n}; write 0.25 for a quarter")
        return int(keep)
    if not 0 < keep <= 1:
        raise UserError(f"--keep {keep:g} is a share of the layers and must be more than 0 and at most 1")
    return math.ceil(keep * n - 1e-9)


def rounds(start: Pattern, keep: int, blocks: int) -> list[list[int]]:
    """The candidates of each block: its full layers but the first layer. UserError when ``keep`` cannot be reached."""
    n = len(start.layers)
    if not 1 <= blocks <= n:
        raise UserError(f"--blocks must lie in 1..{n}, the number of layers, not {blocks}")
    parts = [[int(i) for i in part[1:] if start.layers[i] == "F"] for part in np.array_split(np.arange(n), blocks)]
    least = start.n_full - sum(map(len, parts))
    if keep < least:
        why = "the first layer of each block stays full" if blocks > 1 else "the first layer stays full"
        raise UserError(f"{keep} full layers cannot be reached with --blocks {blocks}: {why}, at least {least} remain")
    return parts


def greedy(
    evaluate: Callable[[Pattern, list[int]], dict[int, float]], start: Pattern, keep: int, blocks: int = 1
) -> Iterator[dict]:
    """Yield the steps of Algorithm 1 until ``keep`` layers are full; see ``Result.history``.

    ``evaluate(pattern, layers)``: the loss of ``pattern`` with each one of ``layers`` shared. The lowest layer wins a
    tie. With blocks, each in its turn commits its best flip before the next one looks.
    """
    parts, pattern, step = rounds(start, keep, blocks), start, 0
    while pattern.n_full > keep:
        for part in parts:
            layers = [i for i in part if pattern.layers[i] == "F"]
            if not layers or pattern.n_full <= keep:
                continue
            losses = evaluate(pattern, layers)
            layer = min(layers, key=lambda i: (losses[i], i))
            pattern, step = flip(pattern, layer), step + 1
            candidates = {str(i): losses[i] for i in layers}
            yield dict(step=step, layer=layer, pattern=str(pattern), loss=losses[layer], candidates=candidates)


def n_evaluations(start: Pattern, keep: int, blocks: int) -> int:
    """How many candidates a greedy search evaluates."""
    steps = greedy(lambda _, layers: dict.fromkeys(layers, 0.0), start, keep, blocks)
    return sum(len(step["candidates"]) for step in steps)


def uniform(n: int, keep: int) -> Pattern:
    """``keep`` full layers at equal distances: the paper's FSSS… when a period gives this number, else the nearest."""
    for period in range(1, n + 1):
        if -(-n // period) == keep:
            return Pattern.uniform(n, period)
    full = {-(-i * n // keep) for i in range(keep)}
    return Pattern("".join("F" if i in full else "S" for i in range(n)))


def similarity(similarity_LL: np.ndarray, keep: int, allowed: Sequence[int]) -> Pattern:
    """The pattern of ``keep`` full layers out of ``allowed`` whose shared layers resemble their own selves most.

    similarity_LL[m, j]: how alike layer m's attention output is under its own and under layer j's selection. Maximises
    the sum over shared layers by dynamic programming (IndexCache paper, App. C); the lowest layers win ties.
    """
    n = len(similarity_LL)
    # gain[j, i]: layers j+1..i-1 share the selection of j.
    gain = np.zeros((n + 1, n + 1))
    for j in range(n):
        gain[j, j + 1 :] = np.concatenate([[0.0], np.cumsum(similarity_LL[j + 1 :, j])])
    ends = [i for i in sorted(allowed) if i > 0] + [n]
    best, back = {0: {1: 0.0}}, {}
    for i in ends:
        best[i] = {}
        for j in [0, *ends]:
            for k, value in best[j].items() if j < i else ():
                if value + gain[j, i] > best[i].get(k + 1, -np.inf):
                    best[i][k + 1], back[i, k + 1] = value + gain[j, i], j
    if keep + 1 not in best[n]:
        raise UserError(f"--keep asks for {keep} full layers, the model has indexers in {len(ends)}")
    full, at = [], (n, keep + 1)
    while at[0]:
        at = (back[at], at[1] - 1)
        full.append(at[0])
    return Pattern("".join("F" if i in full else "S" for i in range(n)))
