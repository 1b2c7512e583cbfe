"""The F/S pattern: which layers run their indexer (F, full) and which reuse the latest selection (S, shared).

Every form in which checkpoints and people state a pattern resolves here, once, to one explicit string.
Flow: config.json or --index-pattern -> Pattern -> the arrays the layer scan reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Sequence

from .errors import UserError


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One letter a layer: ``F`` runs its indexer, ``S`` reuses the selection of the nearest earlier F layer.

    Raises UserError for an empty pattern, other letters, or a first layer that is not F.
    """

    layers: str

    def __post_init__(self):
        if not isinstance(self.layers, str):
            raise UserError(f"the index pattern must be a text of F and S, not {self.layers!r}")
        if not self.layers:
            raise UserError("the index pattern is empty: give one F or S for every layer")
        wrong = sorted(set(self.layers) - {"F", "S"})
        if wrong:
            raise UserError(f"the index pattern may hold only F and S, found {', '.join(map(repr, wrong))}")
        if self.layers[0] != "F":
            raise UserError("layer 0 is S, but there is no earlier F layer to reuse")

    @classmethod
    def all_full(cls, n: int) -> Pattern:
        """Every one of ``n`` layers runs its own indexer (plain DSA)."""
        return cls("F" * n)

    @classmethod
    def uniform(cls, n: int, period: int) -> Pattern:
        """The paper's uniform interleaving, F where ``layer % period == 0``: ``FSSSFSSS…`` for period 4."""
        _check_freq(period)
        return cls("".join("F" if i % period == 0 else "S" for i in range(n)))

    @classmethod
    def from_freq(cls, n: int, freq: int, offset: int = 2) -> Pattern:
        """The Hugging Face rule: F where ``max(layer - offset + 1, 0) % freq == 0``.

        Source: transformers' GlmMoeDsaConfig, fields ``index_topk_freq`` and ``index_skip_topk_offset``;
        freq 4 with offset 3 is GLM-5.2's ``FFFSSSF…``.
        """
        _check_freq(freq)
        if not isinstance(offset, numbers.Integral) or isinstance(offset, bool) or offset < 0:
            raise UserError(f"the index offset must be an integer >= 0, not {offset!r}")
        return cls("".join("F" if max(i - offset + 1, 0) % freq == 0 else "S" for i in range(n)))

    @property
    def n_full(self) -> int:
        return self.layers.count("F")

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(i for i, c in enumerate(self.layers) if c == "F")

    @property
    def source(self) -> tuple[int, ...]:
        """For every layer, the F layer whose selection it uses (itself when it is F)."""
        return tuple(itertools.accumulate((i if c == "F" else -1 for i, c in enumerate(self.layers)), max))

    def slots(self, indexer_layers: Sequence[int]) -> tuple[int, ...]:
        """For every layer: an F layer's place among ``indexer_layers``, the layers that hold indexer weights; -1 for S.

        This is the form the model takes: as a tuple the pattern is compiled in, as an int32 array it is data.
        Raises UserError when an F layer has no indexer weights.
        """
        missing = sorted(set(self.full_layers) - set(indexer_layers))
        if missing:
            raise UserError(
                f"the pattern asks for F on layers {_some(missing)}, but this checkpoint has indexer weights only "
                f"for layers {_some(indexer_layers)}"
            )
        place = {layer: slot for slot, layer in enumerate(indexer_layers)}
        return tuple(place[i] if c == "F" else -1 for i, c in enumerate(self.layers))

    def for_layers(self, n: int, hint: str = "") -> Pattern:
        """This pattern, checked against a model of ``n`` layers; UserError (with ``hint``) when the length differs."""
        if len(self.layers) != n:
            tail = f" ({hint})" if hint else ""
            raise UserError(f"--index-pattern has {len(self.layers)} characters, the model has {n} layers{tail}")
        return self

    def __str__(self) -> str:
        return self.layers

    def summary(self) -> str:
        """``12 full / 35 shared  FSFSFSSSSFSS…`` for status lines."""
        shown = self.layers if len(self.layers) <= 16 else self.layers[:12] + "…"
        return f"{self.n_full} full / {len(self.layers) - self.n_full} shared  {shown}"


def parse(text: str, n: int, hint: str = "") -> Pattern:
    """Pattern of a flag: ``FFSS…``, ``uniform:4`` or ``all-full``, for a model of ``n`` layers.

    Raises UserError for anything else, or for a string of another length.
    """
    if text == "all-full":
        return Pattern.all_full(n)
    if text.startswith("uniform:"):
        try:
            period = int(text.removeprefix("uniform:"))
        except ValueError:
            raise UserError(f"'{text}': write uniform:N with an integer N, for instance uniform:4") from None
        return Pattern.uniform(n, period)
    return Pattern(text.strip()).for_layers(n, hint)


def resolve(n: int, config: dict) -> Pattern:
    """The pattern that a config.json states for its ``n`` layers.

    Precedence: ``indexer_types`` > ``index_topk_pattern`` > (``index_topk_freq``, ``index_skip_topk_offset``) >
    all full. Raises UserError when two given forms disagree, or a form is malformed.
    """
    found: dict[str, Pattern] = {}
    if (types := config.get("indexer_types")) is not None:
        found["indexer_types"] = Pattern(_letters("indexer_types", types, n))
    if (letters := config.get("index_topk_pattern")) is not None:
        found["index_topk_pattern"] = Pattern(_letters("index_topk_pattern", letters, n))
    if (freq := config.get("index_topk_freq")) is not None:
        offset = config.get("index_skip_topk_offset")
        # Freq 1 is the stored default of all-full checkpoints: next to an explicit list it states nothing.
        if freq != 1 or not found:
            found["index_topk_freq"] = Pattern.from_freq(n, freq, 2 if offset is None else offset)
    if not found:
        return Pattern.all_full(n)
    (name, first), *others = found.items()
    for other, pattern in others:
        if pattern != first:
            raise UserError(f"config.json: {name} gives {first}, but {other} gives {pattern}; remove one of them")
    return first


def _letters(name: str, value: str | Sequence, n: int) -> str:
    names = {"full": "F", "shared": "S", "f": "F", "s": "S", "F": "F", "S": "S"}
    if not isinstance(value, str | list | tuple) or not all(isinstance(v, str) and v in names for v in value):
        raise UserError(f"config.json: {name} must be a string of F and S or a list of 'full' and 'shared'")
    if len(value) != n:
        raise UserError(f"config.json: {name} has {len(value)} entries, the model has {n} layers")
    return "".join(names[v] for v in value)


def _check_freq(freq) -> None:
    if not isinstance(freq, numbers.Integral) or isinstance(freq, bool) or freq < 1:
        raise UserError(f"the index frequency must be an integer >= 1, not {freq!r}")


def _some(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers[:5])) + ("…" if len(layers) > 5 else "") if layers else "none"
