"""The model on TPU kernels without a TPU: interpreted end to end, and its steps compiled by libtpu."""

import importlib
import importlib.util
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted
from jax.sharding import use_abstract_mesh

import ic_jax
from ic_jax import cache as caches
from ic_jax import model
from ic_jax.config import Config
from pallas_kernels import dispatch

# The least that the kernels take: 128 latent columns, index heads of 128; both kinds of layers and of feed-forward.
SMALL = dict(
    model_type="glm_moe_dsa", vocab_size=256, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=32,
    kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32, intermediate_size=128,
    moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=128,
    index_topk=8, max_position_embeddings=512, mlp_layer_types=["dense", "sparse", "sparse"],
    indexer_types=["full", "shared", "full"],
)  # fmt: skip


def test_prefill_and_decode_run_the_kernels_and_agree_with_the_reference():
    """A chunk of 16 queries and a token after it, top-k 8: selections and logits, and each side reads the other's cache."""
    c = Config.from_hf(SMALL)
    params = jax.tree.map(lambda a: a * 4 if a.ndim > 2 else a, model.init_params(c, 2, seed=1))
    ids = np.random.default_rng(0).integers(0, 256, (1, 17)).astype(np.int32)
    positions = np.arange(17, dtype=np.int32)[None]
    assert c.pattern.slots(c.pattern.full_layers) == (0, -1, 1)

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(ids, positions, cache, implementation):
        slots = jnp.array((0, -1, 1), jnp.int32)
        options = dict(keep_selections=True, implementation=implementation)
        return model.forward(params, c, slots, ids, positions, cache, **options)

    def steps(first, second):
        cache = caches.allocate(c, 2, 1, 256, implementation="auto")
        chunk = run(ids[:, :16], positions[:, :16], cache, first)
        return cache, chunk, run(ids[:, 16:], positions[:, 16:], chunk.cache, second)

    with dispatch.interpreted():
        cache, *kernels = jax.block_until_ready(steps("auto", "auto"))
        _, *mixed = jax.block_until_ready(steps("reference", "auto"))
    plain, *want = steps("reference", "reference")
    assert cache.latent_LMU.shape == (3, 256, 1, 2, 128) and plain.latent_LMU.shape == (3, 256, 192)
    for got in (kernels, mixed):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a.selections_LBSK, b.selections_LBSK)
            np.testing.assert_allclose(a.logits, b.logits, atol=0.03 * np.abs(b.logits).max())
            rows = np.asarray(a.cache.latent_LMU, np.float32).reshape(3, 256, -1)[..., :192]
            np.testing.assert_allclose(rows, np.asarray(b.cache.latent_LMU, np.float32), atol=0.1)


@pytest.mark.slow
def test_the_demo_model_says_what_the_reference_says():
    """Text of the embedded model, greedy, longer than its top-k of 64: the same tokens from the interpreted kernels."""

    def tokens(implementation):
        lm = ic_jax.load(pattern="uniform:4", implementation=implementation, prefill_chunk=32, max_context=256)
        ids = lm.encode((Path(__file__).parents[1] / "README.md").read_text())[:96]
        return [piece.token for piece in lm.stream(ids, max_tokens=4, temperature=0)]

    with interpreted():
        found = tokens("auto")
    assert found == tokens("reference")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("chip", "mesh"), [("7x", ""), ("v6e", "expert=2")])
def test_steps_compile_without_copies_of_caches_or_weights(chip, mesh, monkeypatch):
    """The engine's two steps of a model with wide enough stacks; what the full-size ones need is in benchmarks/results."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    tpu_model = importlib.import_module("tpu_model")
    topology = {place[0]: place[1] for place in tpu_model.PLACES}[chip]
    wide = dict(num_hidden_layers=8, mlp_layer_types=["dense"] + ["sparse"] * 7, indexer_types=["full", "shared"] * 4)
    wide |= dict(hidden_size=1024, moe_intermediate_size=512, n_routed_experts=16, num_attention_heads=4)
    c, chunk = Config.from_hf(SMALL | wide | dict(num_experts_per_tok=8)), 512
    abstract, engine = tpu_model.engine_for(c, topology, mesh, chunk, 65536)
    for kind in ("prefill", "decode"):
        with use_abstract_mesh(abstract):
            compiled, cache = tpu_model.compile_step(engine, kind, chunk, 65536)
        memory = compiled.memory_analysis()
        gathered = 2**22 * 12 if mesh and kind == "prefill" else 0  # one layer's cache rows of all devices, by design
        # Room for the experts' rows in bfloat16, before and after their products, but not for float32 ones.
        routed = 2 * chunk * 8 * 1024 * 2 if kind == "prefill" else 2**22
        assert memory.temp_size_in_bytes < gathered + routed
        if not gathered:
            assert tpu_model.copies(compiled, engine, cache) == []
        text = compiled.as_text()
        assert all(name in text for name in ("index_topk", "sparse_mla", "gmm"))
