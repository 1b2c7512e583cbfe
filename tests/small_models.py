"""Small models for the tests of search and eval: a golden checkpoint with a tokenizer, and a random one in memory."""

import functools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from conftest import GOLDEN
from tokenizers import models, pre_tokenizers

from ic_jax import cache as caches
from ic_jax import model
from ic_jax.config import Config
from ic_jax.engine import Engine
from ic_jax.pattern import Pattern

# Both kinds of feed-forward layers, in turns, so that spans begin and end in runs of either kind.
MIXED = dict(
    model_type="glm_moe_dsa", vocab_size=96, hidden_size=40, num_hidden_layers=6, num_attention_heads=2,
    q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=12, intermediate_size=24,
    moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, index_n_heads=8, index_head_dim=16,
    index_topk=8, max_position_embeddings=1024,
    mlp_layer_types=["dense", "sparse", "sparse", "sparse", "dense", "dense"],
)  # fmt: skip


def directory(tmp_path, case="glm_all_full"):
    """A golden checkpoint with a tokenizer of the words w0 to w95, in a directory of its own."""
    where = tmp_path / case
    where.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / case / name, where / name)
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(where / "tokenizer.json"))
    return where


def text(tokens, seed=0):
    """Words for ``tokens`` random tokens."""
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(3, 96, tokens))


@functools.cache
def random_lm(scale=4.0):
    """An LM of MIXED, float32, without tokenizer; weights large enough that selections matter."""
    config = Config.from_hf(json.loads(json.dumps(MIXED)))
    params = model.init_params(config, config.num_hidden_layers, seed=3, dtype=jnp.float32)
    params = jax.tree.map(lambda a: a * scale if a.ndim > 2 else a, params)
    pattern = Pattern.all_full(config.num_hidden_layers)
    engine = Engine(
        params, config, pattern.slots(pattern.full_layers), max_context=1024, prefill_chunk=64, dtype=jnp.dtype("float32"),
        implementation="reference",
    )  # fmt: skip
    return SimpleNamespace(
        engine=engine, config=config, pattern=pattern, name="mixed", max_context=1024, encode=lambda ids: list(ids)
    )


def random_windows(n=3, seq_len=40, seed=1):
    return np.random.default_rng(seed).integers(0, 96, (n, seq_len + 1)).astype(np.int32)


@functools.cache
def _forward(config):
    return jax.jit(functools.partial(model.forward, c=config, all_logits=True))


def forward_losses(lm, ids_NT, pattern):
    """float64 [N,S] losses of whole forward passes of the model, softmax in NumPy."""
    S = ids_NT.shape[1] - 1
    cache = caches.allocate(lm.config, lm.pattern.n_full, len(ids_NT), S, dtype=jnp.float32)
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (len(ids_NT), S))
    slots = np.array(pattern.slots(lm.pattern.full_layers), np.int32)
    ids = ids_NT[:, :-1]
    out = _forward(lm.config)(lm.engine.params, slots=slots, ids_BS=ids, positions_BS=positions, cache=cache)
    logits = np.asarray(out.logits, np.float64)
    top = logits.max(-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -np.take_along_axis(logp, ids_NT[:, 1:, None], -1)[..., 0]
