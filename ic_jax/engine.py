"""Load a model and generate: prefill in fixed chunks, then one compiled step a token with sampling on the device.

    lm = ic_jax.load("path-or-repo", pattern="uniform:4")
    for piece in lm.stream("Hello", max_tokens=64, seed=0): print(piece.text, end="")
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pallas_kernels import dispatch

from . import cache as caches
from . import checkpoint, model, pattern_file, sampling, sharding
from .config import DEMO_DIRECTORY, Config
from .errors import UserError, not_finite
from .parallel import Parallel, cache_specs
from .pattern import Pattern
from .sampling import SamplingParams, is_int
from .tokenizer import StopMatcher, StreamDecoder, Tokenizer

CHUNK = dict(cpu=512, gpu=8192, tpu=4096)  # prompt tokens of one step and device


@dataclasses.dataclass(frozen=True)
class Piece:
    """One step of a stream: new text (may be empty while a character or a stop string is incomplete) and its token.

    finish_reason is None until the last piece, then "stop" or "length". Rates are tokens per second so far; the first
    token belongs to the prompt, so one token alone has no rate of generation (0).
    """

    text: str
    token: int
    finish_reason: str | None
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float


class Engine:
    """Compiled steps over one model: ``prefill`` and ``decode`` for a batch of sequences of different lengths.

    slots: the pattern as ``Pattern.slots`` gives it, compiled in if a tuple, data if an int32 array.
    Programs are compiled once per (batch, chunk, cache size); cache sizes grow in steps of at most a quarter.
    """

    def __init__(
        self, params, config: Config, slots, *, max_context: int, prefill_chunk: int, dtype, index_dtype=None,
        dense=False, implementation="auto", mesh=None,
    ):  # fmt: skip
        self.params, self.config, self.slots = params, config, slots
        self.max_context, self.prefill_chunk = max_context, prefill_chunk
        self.dtype, self.index_dtype, self.mesh = dtype, index_dtype, mesh
        self.n_slots = 0 if dense or not config.has_indexer else params["indexer"]["wk"].shape[0]
        self.axes = model.abstract_params(config, self.n_slots, dtype)[1]
        self.options = dict(dense=dense, implementation=implementation)
        self.compile_seconds = 0.0
        self._programs: dict[tuple, Callable] = {}

    def new_cache(self, batch: int, tokens: int) -> caches.Cache:
        """A Cache for ``batch`` sequences (more, where ``data`` divides them) of up to ``tokens`` tokens.

        Raises UserError when it cannot fit in memory.
        """
        pages, parallel = _round_up(caches.pages_for(tokens)), Parallel.of(self.mesh, 1)
        make = lambda: caches.allocate(
            self.config, self.n_slots, batch, pages * caches.PAGE_SIZE, dtype=self.dtype, index_dtype=self.index_dtype,
            implementation=self.options["implementation"], parallel=parallel,
        )  # fmt: skip
        how = self.dtype, self.index_dtype, self.options["implementation"]
        per_token = caches.bytes_per_token(self.config, self.n_slots, *how)
        held = -(-batch // parallel.data)  # sequences of a device
        _check_memory(tokens, per_token * held // parallel.parts, _free_bytes())
        if self.mesh is None:
            return jax.jit(make)()
        return jax.jit(make, out_shardings=sharding.shardings(self.mesh, cache_specs(jax.eval_shape(make))))()

    def chunk(self, rows: int) -> int:
        """Tokens of each of ``rows`` sequences in one step of a prefill: ``prefill_chunk`` is what a device runs at once."""
        parallel = Parallel.of(self.mesh, 1)
        return chunk_of_each(self.prefill_chunk, -(-rows // parallel.data), parallel.parts)

    def prefill(self, prompts: Sequence[Sequence[int]], cache: caches.Cache, *, keep: Callable | None = None):
        """Run whole prompts, a chunk at a time: (logits float32 [B,W] after each prompt's last token, cache).

        ``keep``: called with every chunk's (start, logits [B,S,W]) instead of computing last logits only.
        """
        lengths, rows = np.array([len(p) for p in prompts]), len(cache.page_table_BP)
        last = [None] * len(prompts)
        for start, size in chunks(0, int(lengths.max()), self.chunk(rows)):
            ids, positions = np.zeros((rows, size), np.int32), np.full((rows, size), -1, np.int32)
            for b, prompt in enumerate(prompts):
                part = prompt[start : start + size]
                ids[b, : len(part)] = part
                positions[b, : len(part)] = np.arange(start, start + len(part))
            out = self._run("prefill", ids, positions, cache, all_logits=keep is not None)
            cache = out.cache
            if keep is not None:
                keep(start, out.logits)
                continue
            for b in np.flatnonzero((lengths > start) & (lengths <= start + size)):
                last[b] = out.logits[b]
        return (None if keep is not None else jnp.stack(last)), cache

    def decode(self, token_B, positions_B, cache, params_B: sampling.Batch):
        """One token a sequence: (next ids int32 [B], logits float32 [B,W], cache); position -1 marks an idle row.

        The next id is -1 where logits are not finite.
        """
        return self._run("decode", token_B, positions_B, cache, params_B)

    def sample(self, logits_BW, positions_B, params_B: sampling.Batch):
        """Token ids int32 [B] drawn for the positions after ``positions_B``."""
        return self._run("sample", logits_BW, positions_B, params_B)

    def _run(self, kind: str, *args, all_logits=False):
        key = (kind, all_logits, *(a.shape for a in jax.tree.leaves(args)))
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = self._compile(kind, all_logits, args)
            self.compile_seconds += time.perf_counter() - start
        return self._programs[key](*(() if kind == "sample" else (self.params,)), *args)

    def _compile(self, kind, all_logits, args):
        queries = args[0].shape[1] if kind == "prefill" else 1
        prefill = model.over_mesh(
            self.mesh, self.config, self.slots, self.axes, queries=queries, all_logits=all_logits, **self.options
        )

        def decode(params, token_B, positions_B, cache, params_B):
            B, idle = len(token_B), len(cache.page_table_BP) - len(token_B)
            ids_BS = jnp.pad(token_B, (0, idle))[:, None]
            out = prefill(params, ids_BS, jnp.pad(positions_B, (0, idle), constant_values=-1)[:, None], cache)
            ids_B, finite_B = sample(out.logits[:B], positions_B, params_B), jnp.isfinite(out.logits[:B]).all(-1)
            return jnp.where(finite_B, ids_B, -1), out.logits[:B], out.cache

        def sample(logits_BW, positions_B, params_B):
            seeds_B2, *filters = params_B
            return sampling.sample(logits_BW, sampling.keys_at(seeds_B2, positions_B + 1), *filters)

        if kind == "sample":
            return jax.jit(sample).lower(*args).compile()
        step = {"prefill": prefill, "decode": decode}[kind]
        lowered = jax.jit(step, donate_argnums=3, **self._placed(kind, args)).lower(self.params, *args)
        return lowered.compile(compiler_options=dispatch.compiler_options(queries))

    def _placed(self, kind, args) -> dict:
        """Shardings of a step's arguments and results: what the host gives and takes is on every device."""
        if self.mesh is None:
            return {}
        place = functools.partial(sharding.shardings, self.mesh)
        weights, cache, same = sharding.param_specs(self.axes), cache_specs(args[2]), PartitionSpec()
        if kind == "prefill":
            return place(dict(in_shardings=(weights, same, same, cache), out_shardings=model.Output(same, cache)))
        return place(dict(in_shardings=(weights, same, same, cache, same), out_shardings=(same, same, cache)))


class LM:
    """A loaded model with its tokenizer: ``stream``, ``chat``, ``generate`` and ``logits``. Made by ``ic_jax.load``."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, pattern: Pattern | None, name: str):
        self.engine, self.tokenizer, self.pattern, self.name = engine, tokenizer, pattern, name
        self.config, self.max_context = engine.config, engine.max_context
        self.eos_ids = frozenset(tokenizer.eos_ids) | frozenset(self.config.eos_token_id)

    @property
    def compile_seconds(self) -> float:
        return self.engine.compile_seconds

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a text, or the given ids checked against the vocabulary; UserError when empty or unknown."""
        if not isinstance(prompt, str):
            try:
                ids = np.asarray(prompt)
            except ValueError:  # lists of several lengths
                raise UserError("a prompt is a text or a flat sequence of integer token ids") from None
            if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
                raise UserError("a prompt is a text or a flat sequence of integer token ids")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else ids.tolist()
        if not ids:
            raise UserError("the prompt is empty")
        if bad := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise UserError(f"token id {bad[0]} is outside the vocabulary of {self.config.vocab_size}")
        return ids

    def stream(
        self, prompt: str | Sequence[int], *, max_tokens: int = 256, sampling: SamplingParams | None = None, **fields
    ) -> Iterator[Piece]:
        """Yield Pieces of the continuation of ``prompt``; ``fields`` are SamplingParams' (temperature, top_p, seed…).

        Raises UserError for an empty or too long prompt, unknown ids, or bad sampling values, before anything runs.
        """
        ids, params = self._check([self.encode(prompt)], max_tokens, sampling, fields)
        return (pieces[0] for pieces in self._steps(ids, max_tokens, [params]) if pieces[0] is not None)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], *, max_tokens: int = 256,
        sampling: SamplingParams | None = None, **fields,
    ) -> list[str]:  # fmt: skip
        """Texts of the continuations of several prompts of any lengths, run as one batch; arguments as ``stream``.

        All have the same seed: of equal prompts the texts are equal.
        """
        if isinstance(prompts, str):
            raise UserError("generate takes a list of prompts; for one, use stream")
        prompts = list(prompts)
        if not prompts:
            return []
        ids, params = self._check([self.encode(p) for p in prompts], max_tokens, sampling, fields)
        texts = [""] * len(ids)
        for pieces in self._steps(ids, max_tokens, [params] * len(ids)):
            for b, piece in enumerate(pieces):
                texts[b] += piece.text if piece else ""
        return texts

    def chat(self, messages: list[dict], **options) -> str:
        """The assistant's answer to ``messages`` ({"role", "content"}); options as ``stream``."""
        return "".join(piece.text for piece in self.stream_chat(messages, **options))

    def stream_chat(self, messages: list[dict], **options) -> Iterator[Piece]:
        """``chat``, streamed. UserError when the tokenizer has no chat template."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self.stream(self.tokenizer.encode(text, add_special_tokens=False), **options)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits, float32 [T, vocabulary], of every position of ``token_ids``."""
        ids = self.encode(token_ids)
        self._check_length(len(ids), 0)
        logits_TW = np.empty((len(ids), self.config.vocab_size), np.float32)

        def keep(start, logits_BSW):
            stop = min(start + logits_BSW.shape[1], len(ids))
            logits_TW[start:stop] = np.asarray(logits_BSW[0, : stop - start])

        self.engine.prefill([ids], self.engine.new_cache(1, len(ids)), keep=keep)
        return logits_TW

    def search(self, text, **options):
        """Which layers can share their selection on ``text``; arguments and Result as ``ic_jax.search.search``."""
        from .search import search

        return search(self, text, **options)

    def _check(self, prompts, max_tokens, sampling, fields):
        if not is_int(max_tokens) or max_tokens < 1:
            raise UserError(f"max_tokens must be an integer >= 1, not {max_tokens!r}")
        if not isinstance(sampling, SamplingParams | None):
            raise UserError(f"sampling must be one SamplingParams, for all prompts, not {sampling!r}")
        params = dataclasses.replace(sampling or SamplingParams(), **fields)
        for ids in prompts:
            self._check_length(len(ids), 1)
        return prompts, params

    def _check_length(self, prompt: int, new: int):
        if prompt + new > self.max_context:
            raise UserError(f"the prompt has {prompt} tokens, the context holds {self.max_context}")

    def _steps(self, prompts, max_tokens, params) -> Iterator[list[Piece | None]]:
        """For every step, one Piece a sequence, or None where it had already finished."""
        B, lengths = len(prompts), np.array([len(p) for p in prompts])
        budget = np.minimum(min(max_tokens, self.max_context), self.max_context - lengths)
        cache = self.engine.new_cache(B, int((lengths + budget).max()))
        batch = sampling.batch(params)
        compiled, start = self.engine.compile_seconds, time.perf_counter()
        logits_BW, cache = self.engine.prefill(prompts, cache)
        if not np.isfinite(logits_BW).all():
            raise not_finite("the prompt")
        token_B = self.engine.sample(logits_BW, jnp.asarray(lengths - 1, jnp.int32), batch)
        token_B.block_until_ready()
        prompt_seconds = time.perf_counter() - start - (self.engine.compile_seconds - compiled)
        compiled, start = self.engine.compile_seconds, time.perf_counter()
        texts = [_Text(self, ids, p) for ids, p in zip(prompts, params, strict=True)]
        done = np.zeros(B, bool)
        for step in range(int(budget.max())):
            # The next step is under way while this one's token is fetched and turned into text.
            positions = np.where(done | (step + 1 >= budget), -1, lengths + step).astype(np.int32)
            ahead = None
            if (positions >= 0).any():
                ahead, _, cache = self.engine.decode(token_B, positions, cache, batch)
            tokens = np.asarray(token_B)
            if (tokens[~done] < 0).any():
                raise not_finite(f"token {step} of the answer")
            seconds = time.perf_counter() - start - (self.engine.compile_seconds - compiled)
            pieces: list[Piece | None] = [None] * B
            for b in np.flatnonzero(~done):
                text, reason = texts[b].add(int(tokens[b]), last=step + 1 >= budget[b])
                done[b] = reason is not None
                pieces[b] = Piece(
                    text, int(tokens[b]), reason, int(lengths[b]), step + 1,
                    float(lengths.sum() / prompt_seconds), float(step * B / seconds) if seconds > 0 else 0.0,
                )  # fmt: skip
            yield pieces
            if done.all():
                return
            token_B = ahead


class _Text:
    """Tokens of one sequence to text, with stop tokens and stop strings."""

    def __init__(self, lm: LM, prompt: Sequence[int], params: SamplingParams):
        self.decoder, self.stops = StreamDecoder(lm.tokenizer, prompt), StopMatcher(params.stop)
        self.end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else lm.eos_ids)

    def add(self, token: int, last: bool) -> tuple[str, str | None]:
        """(text to emit now, finish reason or None)."""
        if token in self.end_ids:
            return self.stops.feed(self.decoder.flush()) + self.stops.flush(), "stop"
        text = self.stops.feed(self.decoder.add(token))
        if not self.stops.stopped and last:
            text += self.stops.feed(self.decoder.flush())
        if self.stops.stopped:
            return text, "stop"
        return (text + self.stops.flush(), "length") if last else (text, None)


def load(
    path: str | os.PathLike | None = None,
    *,
    pattern: Pattern | str | os.PathLike | None = None,
    mesh: str | None = None,
    dtype: str = "bfloat16",
    index_dtype: str | None = None,
    implementation: str = "auto",
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    dense: bool = False,
    progress: Callable | None = None,
) -> LM:
    """The LM at ``path``: a Hugging Face or converted directory, a hub repository, or None for the embedded demo.

    Args:
      pattern: which layers select (see ``pattern.parse``; or a file of ``ic-jax search``), None for the checkpoint's own.
      mesh: "data=2,tensor=4", None for one device. dtype: of weights and latents.
      index_dtype: of the index keys, "float8_e4m3fn" to halve them; None for ``dtype``.
      dense: attend to every token, with no indexer. max_context: tokens a sequence may reach.

    Raises UserError, before any weight is read (or fetched from a hub, where possible), for everything that can be known
    by then; NotImplementedError when a forced implementation cannot run the model here.
    """
    directory = DEMO_DIRECTORY if path is None else checkpoint.find(os.fspath(path), weights=False)
    name = pattern_file.model_name(None if path is None else os.fspath(path))
    config = Config.load(directory)
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype must be bfloat16 or float32, not {dtype!r}")
    if index_dtype not in (None, "bfloat16", "float32", "float8_e4m3fn"):
        raise UserError(f"index_dtype must be bfloat16, float32 or float8_e4m3fn, not {index_dtype!r}")
    most = config.max_position_embeddings
    if max_context is not None and not (is_int(max_context) and 1 <= max_context <= most):
        raise UserError(f"max_context must lie in 1..{most}, not {max_context!r}")
    if prefill_chunk is not None and not (is_int(prefill_chunk) and prefill_chunk >= 1):
        raise UserError(f"prefill_chunk must be an integer >= 1, not {prefill_chunk!r}")
    max_context, prefill_chunk = (n and int(n) for n in (max_context, prefill_chunk))  # NumPy's know less
    chosen, layers = None, ()
    if not dense and config.has_indexer:
        chosen = config.pattern
        if pattern is not None:
            own = f"this checkpoint ships {chosen.n_full}F/{len(chosen.layers) - chosen.n_full}S; omit the flag to use it"
            if isinstance(pattern, str | os.PathLike):
                pattern = pattern_file.parse(os.fspath(pattern), config, name, own)
            if not isinstance(pattern, Pattern):
                raise UserError(f"pattern must be a Pattern, a text or a file, not {pattern!r}")
            chosen = pattern.for_layers(config.num_hidden_layers, own)
        layers = chosen.full_layers
    elif pattern is not None:
        why = "--dense runs no indexer" if dense else f"{config.model_type} at {directory} has no indexer"
        raise UserError(f"an index pattern makes no sense here: {why}")
    if implementation not in dispatch.IMPLEMENTATIONS:
        raise UserError(f"implementation must be one of {', '.join(dispatch.IMPLEMENTATIONS)}, not {implementation!r}")
    if implementation in ("gpu", "tpu"):
        from . import info

        info.implementations(config, implementation, dense=dense, dtype=dtype, index_dtype=index_dtype)
    device_mesh = shardings = None
    shapes, axes = model.abstract_params(config, len(layers), dtype)
    sizes = {} if mesh is None else sharding.parse_mesh(mesh)
    if mesh is not None:
        sharding.check_mesh(config, sizes)
        device_mesh = sharding.make_mesh(sizes)
        shardings = sharding.shardings(device_mesh, sharding.param_specs(axes))
    elif jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes run: say with --mesh how they divide the model")
    if (free := _free_bytes()) is not None:
        weights = sharding.bytes_per_device(shapes, axes, sizes)
        if weights > free:
            raise UserError(f"the weights need {weights / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; --mesh divides them")
        if max_context is not None:
            per_token = caches.bytes_per_token(config, len(layers), dtype, index_dtype, implementation)
            _check_memory(max_context, per_token // Parallel(**sizes).parts, free - weights)
    tokenizer = Tokenizer(directory)
    if path is not None:
        directory = checkpoint.find(os.fspath(path))  # everything cheap is checked: now a repository's weights
    if chosen:
        chosen.slots(checkpoint.indexer_layers(directory, config))  # F only where there are indexer weights
    params = checkpoint.load_params(directory, config, layers, dtype=dtype, shardings=shardings, progress=progress)
    slots = chosen.slots(layers) if chosen else (-1,) * config.num_hidden_layers
    if -1 in slots and chosen:
        # A mixed pattern runs as data: measured no slower than compiled in, and it compiles in half the time.
        slots = np.array(slots, np.int32)
    engine = Engine(
        params, config, slots,
        max_context=max_context or config.max_position_embeddings,
        prefill_chunk=prefill_chunk or default_chunk(sizes),
        dtype=jnp.dtype(dtype), index_dtype=index_dtype, dense=dense, implementation=implementation, mesh=device_mesh,
    )  # fmt: skip
    return LM(engine, tokenizer, chosen, name)


def chunk_of_each(chunk: int, sequences: int, parts: int) -> int:
    """Tokens of each of a device's ``sequences`` in a step of ``chunk`` tokens: where they share it, a power of two for
    each of the ``parts`` into which tokens are divided."""
    each = max(chunk // (sequences * parts), -(-8 // parts))
    return chunk if sequences == 1 else parts << (each.bit_length() - 1)


def chunks(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(first token, size) of the steps of a prefill; the last one is cut to a power of two: short prompts cost little."""
    for at in range(start, stop, chunk):
        yield at, min(chunk, 1 << max((stop - at - 1).bit_length(), 3))


def default_chunk(sizes: dict[str, int]) -> int:
    """Prompt tokens of one step on a mesh of these axes: as many for each device that has a part of them."""
    backend = jax.default_backend()
    return CHUNK.get(backend, 4096) * (1 if backend == "cpu" else Parallel(**sizes).parts)


def _check_memory(tokens: int, bytes_per_token: int, free: int | None) -> None:
    """UserError when a cache of ``tokens`` positions exceeds the ``free`` bytes of a device."""
    need = bytes_per_token * _round_up(caches.pages_for(tokens)) * caches.PAGE_SIZE
    if free is not None and need > free:
        fits = max(free, 0) // bytes_per_token
        raise UserError(
            f"context {tokens} needs {need / 1e9:.1f} GB of cache per device, {max(free, 0) / 1e9:.1f} GB are free; "
            f"try --max-context {max(fits // 1000 * 1000, 1)}"
        )


def _round_up(pages: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20…: at most a quarter more."""
    step = 1 << max(pages.bit_length() - 3, 0)
    return -(-pages // step) * step


def _free_bytes() -> int | None:
    """Memory left on the first device (for a CPU, its share of the host's), None when unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as f:
            available = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
        return available // jax.local_device_count()
    except (OSError, StopIteration):
        return None
