"""What ``search`` and ``eval`` share: text as windows of tokens, and programs that run whole sequences of one shape.

Flow: text -> windows -> Runner.begin -> Runner.advance over any span of layers -> losses, alone or against a reference.
Pattern and span are data, so a Runner compiles each program once a batch shape, whatever is evaluated with it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from . import cache as caches
from . import model, sharding
from .config import DEMO_DIRECTORY, Config
from .errors import UserError
from .parallel import Parallel

HEAD_BYTES = 256 << 20  # logits that exist at a time
BATCH_TOKENS = 8192  # of one mini-batch, unless a sequence alone is longer


class State(NamedTuple):
    """What enters a layer: the residual stream [B,S,D] and the current selection, int32 [B,S,K]."""

    x_BSD: jax.Array
    positions_BSK: jax.Array


class _Static(NamedTuple):
    """What programs are compiled for, beside shapes."""

    config: Config
    dtype: str
    index_dtype: str | None
    dense: bool
    implementation: str
    mesh: Mesh | None


class Runner:
    """Programs over whole sequences of ``seq_len`` tokens, for the parameters and options of an Engine.

    No cache outlives a call: a layer's latents and index keys matter to that layer alone, so one scratch layer serves
    all. ``dense`` and ``index_dtype`` replace the engine's own.
    """

    def __init__(self, engine, seq_len: int, *, dense: bool | None = None, index_dtype=None):
        self.params, self.config, self.seq_len, self.mesh = engine.params, engine.config, seq_len, engine.mesh
        self.n_layers, self.implementation = self.config.num_hidden_layers, engine.options["implementation"]
        index_dtype = index_dtype or engine.index_dtype
        self._static = _Static(
            self.config, jnp.dtype(engine.dtype).name, None if index_dtype is None else jnp.dtype(index_dtype).name,
            (engine.options["dense"] if dense is None else dense) or not self.config.has_indexer, self.implementation,
            self.mesh,
        )  # fmt: skip

    def begin(self, ids_BS) -> State:
        """The State that enters layer 0."""
        capacity = caches.pages_for(self.seq_len) * caches.PAGE_SIZE
        k = 0 if self._static.dense else min(self.config.index_topk, capacity)
        return _begin(self.params, np.asarray(ids_BS, np.int32), k=k)

    def advance(self, state: State, slots, start: int = 0, stop: int | None = None) -> State:
        """The State that enters layer ``stop``, from the one entering ``start``; by default, what leaves the last layer."""
        stop = self.n_layers if stop is None else stop
        if start == stop:
            return state
        span = np.int32(start), np.int32(stop)
        return _advance(self.params, state, np.asarray(slots, np.int32), *span, static=self._static)

    def sequence_losses(self, state: State, targets_BS):
        """float32 [B] mean negative log likelihood of each sequence, in nats, of a State that left the last layer."""
        return _sequence_losses(self.params, state.x_BSD, np.asarray(targets_BS, np.int32), config=self.config)

    def token_losses(self, state: State, targets_BS, reference: State | None = None, reference_params=None) -> dict:
        """Float32 [B,S] arrays: ``loss`` in nats and ``top1``, whether the target is the likeliest token.

        With a ``reference`` State, of ``reference_params`` when these are others than the Runner's, also ``kl``,
        KL(reference || this), and ``same``, whether the likeliest tokens agree.
        """
        reference = None if reference is None else (reference_params or self.params, reference.x_BSD)
        return _token_losses(self.params, state.x_BSD, np.asarray(targets_BS, np.int32), reference, config=self.config)


@functools.partial(jax.jit, static_argnames="k")
def _begin(params, ids_BS, *, k: int):
    return State(params["embed_tokens"][ids_BS], jnp.full((*ids_BS.shape, k), -1, jnp.int32))


@functools.partial(jax.jit, static_argnames="static")
def _advance(params, state, slots, start, stop, *, static: _Static):
    B, S, _ = state.x_BSD.shape
    positions_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    parallel, args = Parallel.of(static.mesh, S), (params, state, positions_BS, slots, start, stop)
    if B % parallel.data:  # every device along data then computes the same
        parallel = dataclasses.replace(parallel, data=1)
    run = functools.partial(_advance_here, static=static, parallel=parallel, pages=caches.pages_for(S))
    if static.mesh is None:
        return run(*args)
    indexers = params["indexer"]["wk"].shape[0] if "indexer" in params else 0
    weights = sharding.param_specs(model.abstract_params(static.config, indexers)[1])
    tokens, same = parallel.tokens_spec(), PartitionSpec()
    specs = dict(in_specs=(weights, State(tokens, tokens), tokens, same, same, same), out_specs=State(tokens, tokens))
    return jax.shard_map(run, mesh=static.mesh, **specs, check_vma=False)(*args)


def _advance_here(params, state, positions_BS, slots, start, stop, *, static: _Static, parallel: Parallel, pages: int):
    """The part of one device."""
    c, B, context = static.config, len(positions_BS), -(-pages // parallel.parts) * caches.PAGE_SIZE
    one_layer, dtypes = c.replace(num_hidden_layers=1), dict(dtype=static.dtype, index_dtype=static.index_dtype)
    cache = caches.allocate(one_layer, int(not static.dense), B, context, **dtypes, implementation=static.implementation)
    plan = model.index_plan(params, cache, state.positions_BSK, static.implementation, parallel)
    (x_BSD, plan, _), _ = model.run_layers(
        params, c, slots, (state.x_BSD, plan, cache), positions_BS, span=(start, stop), dense=static.dense,
        implementation=static.implementation, parallel=parallel,
    )  # fmt: skip
    return State(x_BSD, plan.positions_BSK)


@functools.partial(jax.jit, static_argnames="config")
def _token_losses(params, x_BSD, targets_BS, reference, *, config):
    return _per_token(params, x_BSD, targets_BS, reference, config)


@functools.partial(jax.jit, static_argnames="config")
def _sequence_losses(params, x_BSD, targets_BS, *, config):
    return _per_token(params, x_BSD, targets_BS, None, config)["loss"].mean(-1)


def _per_token(params, x_BSD, targets_BS, reference, config):
    """See ``Runner.token_losses``; ``reference``: None or (params, x_BSD).

    A block of tokens at a time: all logits of a long sequence do not fit.
    """

    reference_params, reference_BSD = reference or (None, None)
    # A token at a time is how this is written, not how it runs: a kernel for few rows would read the head for each.
    head = lambda params, x_D: model.head(params, config, x_D, "reference")

    def one(args):
        x_D, target, reference_D = args
        logits_W = head(params, x_D)
        logp_W = jax.nn.log_softmax(logits_W)
        top1 = logits_W.argmax()
        out = {"loss": -logp_W[target], "top1": (top1 == target).astype(jnp.float32)}
        if reference_D is not None:
            reference_W = jax.nn.log_softmax(head(reference_params, reference_D))
            out["kl"] = (jnp.exp(reference_W) * (reference_W - logp_W)).sum()
            out["same"] = (top1 == reference_W.argmax()).astype(jnp.float32)
        return out

    B, S, D = x_BSD.shape
    tokens = B * S
    flat = lambda a: None if a is None else a.reshape(tokens, *a.shape[2:])
    rows = max(1, min(tokens, HEAD_BYTES // (4 * config.vocab_size)))
    out = lax.map(one, (flat(x_BSD), flat(targets_BS), flat(reference_BSD)), batch_size=rows)
    return jax.tree.map(lambda a: a.reshape(B, S), out)


def command_windows(args, directory: Path, config: Config) -> np.ndarray:
    """``windows`` of the text that a command's flags ask for; UserError before any weight is read."""
    from .tokenizer import Tokenizer

    text = read_text(args.text, args.model)
    seq_len = check_seq_len(config, args.seq_len, args.max_context, args.dense)
    return windows(Tokenizer(directory).encode(text), seq_len, args.samples)


def read_text(path: str | None, model: str | None) -> str:
    """The text of a UTF-8 file; for the embedded demo model without a file, the texts that travel with it."""
    if path is None:
        if model is not None:
            raise UserError("there is no text; give one with --text FILE")
        return "\n".join(p.read_text(encoding="utf-8") for p in sorted(DEMO_DIRECTORY.glob("LICENSE*")))
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text: byte 0x{e.object[e.start]:02x} at offset {e.start}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None


def check_seq_len(config: Config, seq_len: int | None, max_context: int | None = None, dense: bool = False) -> int:
    """``seq_len``, or eight times top-k within the context.

    Raises UserError when either is too long, or so short that nothing is selected.
    """
    k, limit = config.index_topk, min(max_context or config.max_position_embeddings, config.max_position_embeddings)
    dense = dense or not config.has_indexer
    if limit < 2:
        raise UserError(f"a sequence needs at least 2 tokens, the context holds {limit}")
    what = f"a context of {limit} tokens" if seq_len is None else f"--seq-len {seq_len}"
    if seq_len is None:
        seq_len = min(2048 if dense else 8 * k, limit)
    if not 2 <= seq_len <= limit:
        raise UserError(f"--seq-len must lie in 2..{limit}, not {seq_len}")
    if not dense and seq_len <= k:
        raise UserError(f"{what} is within top-k {k}, where every pattern gives the same; make it longer")
    return seq_len


def windows(tokens: Sequence[int], seq_len: int, samples: int | None = None) -> np.ndarray:
    """int32 [N, seq_len + 1] consecutive windows of ``tokens``; neighbours share one token, so each is predicted once.

    ``samples``: at most so many, evenly spread. Raises UserError when there is not even one.
    """
    _checked(samples)
    tokens = np.asarray(tokens, np.int32).reshape(-1)
    n = (len(tokens) - 1) // seq_len
    if n < 1:
        raise UserError(f"the text has {len(tokens)} tokens, one sequence needs {seq_len + 1}; try a smaller --seq-len")
    count = n if samples is None else min(n, samples)
    starts = np.linspace(0, n - 1, count).astype(int) * seq_len
    return np.stack([tokens[s : s + seq_len + 1] for s in starts])


def _checked(samples: int | None) -> int | None:
    if samples is not None and samples < 1:
        raise UserError(f"samples must be at least 1, not {samples}")
    return samples


def text_windows(lm, text, seq_len: int, samples: int | None = None) -> np.ndarray:
    """``windows`` of a text, of token ids, or (as they are) of an array [N, seq_len + 1]."""
    if getattr(text, "ndim", 1) != 2:
        return windows(lm.encode(text), seq_len, samples)
    if text.shape[1] != seq_len + 1:
        raise UserError(f"windows of {text.shape[1]} tokens were given, sequences of {seq_len} need {seq_len + 1}")
    text = np.asarray(text)
    lm.encode(text.reshape(-1))
    return text[: _checked(samples)].astype(np.int32)


def fingerprint(ids_NT: np.ndarray) -> str:
    """A hash of calibration tokens and their shape."""
    return hashlib.sha256(repr(ids_NT.shape).encode() + ids_NT.astype("<i4").tobytes()).hexdigest()[:16]


def batch_size(seq_len: int, sequences: int, asked: int | None = None) -> int:
    """Sequences of one mini-batch: as many as were ``asked`` for, or by length, but not more than there are."""
    return max(1, min(sequences, asked or BATCH_TOKENS // seq_len))


def batches(ids_NT: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(rows [size, T], how many of them count); the last batch is filled up with its first row."""
    for start in range(0, len(ids_NT), size):
        part = ids_NT[start : start + size]
        yield np.concatenate([part, np.repeat(part[:1], size - len(part), 0)]), len(part)
