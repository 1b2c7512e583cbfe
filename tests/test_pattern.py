"""Every form of pattern resolves to one tuple by a named rule, and every guard speaks (indexcache.md sections 5 and 7)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ic_jax.config import PRESETS, Config, preset
from ic_jax.errors import UserError
from ic_jax.pattern import Pattern, parse, resolve

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

patterns = st.text("FS", min_size=0, max_size=80).map(lambda s: Pattern("F" + s))


def test_the_two_freq_rules_differ():
    assert str(Pattern.uniform(78, 4)).startswith("FSSSFSSS") and Pattern.uniform(78, 4).n_full == 20
    assert str(Pattern.from_freq(78, 4)).startswith("FFSSSF")
    glm52 = Pattern.from_freq(78, 4, 3)
    assert glm52.full_layers == (0, 1, 2, *range(6, 78, 4))
    assert (glm52.n_full, 78 - glm52.n_full) == (21, 57)


@given(patterns)
def test_every_form_round_trips(pattern):
    n = len(pattern.layers)
    names = {"F": "full", "S": "shared"}
    forms = [
        {"indexer_types": [names[c] for c in pattern.layers]},
        {"index_topk_pattern": pattern.layers},
        {"index_topk_pattern": list(pattern.layers)},
    ]
    for form in forms:
        assert resolve(n, form) == pattern
        assert resolve(n, form | forms[0] | {"index_topk_freq": 1}) == pattern
    assert parse(pattern.layers, n) == pattern


@given(patterns)
def test_source_is_the_nearest_earlier_full_layer(pattern):
    for i, source in enumerate(pattern.source):
        assert pattern.layers[source] == "F" and source <= i
        assert "F" not in pattern.layers[source + 1 : i + 1]


@given(st.integers(1, 90), st.integers(1, 9), st.integers(0, 6))
def test_freq_follows_the_hugging_face_rule(n, freq, offset):
    layers = ["F" if max(i - offset + 1, 0) % freq == 0 else "S" for i in range(n)]
    form = {"index_topk_freq": freq, "index_skip_topk_offset": offset}
    if layers[0] == "S":  # offset 0 leaves layer 0 without a selection: others read garbage there
        with pytest.raises(UserError, match="layer 0 is S"):
            resolve(n, form)
    else:
        assert str(resolve(n, form)) == "".join(layers)


def test_nothing_or_null_means_all_full():
    assert resolve(5, {}) == resolve(5, {"index_topk_freq": None, "index_skip_topk_offset": None}) == Pattern("FFFFF")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"indexer_types": ["full", "shared"], "index_topk_pattern": "FF"}, "gives FS, but index_topk_pattern gives FF"),
        ({"index_topk_pattern": "FF", "index_topk_freq": 2, "index_skip_topk_offset": 1}, "index_topk_freq gives FS"),
        ({"index_topk_pattern": "FFF"}, "3 entries, the model has 2 layers"),
        ({"index_topk_pattern": "FX"}, "string of F and S"),
        ({"indexer_types": ["full", "half"]}, "'full' and 'shared'"),
        ({"indexer_types": 7}, "'full' and 'shared'"),
        ({"index_topk_pattern": "SF"}, "layer 0 is S"),
        ({"index_topk_freq": 0}, "integer >= 1"),
        ({"index_topk_freq": 2.0}, "integer >= 1"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": -1}, "integer >= 0"),
    ],
)
def test_bad_forms_are_errors(form, message):
    with pytest.raises(UserError, match=message):
        resolve(2, form)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F" * 77, r"77 characters, the model has 78 layers \(hint\)"),
        ("uniform:x", "uniform:N"),
        ("uniform:0", ">= 1"),
        ("", "empty"),
        ("fs", "only F and S"),
    ],
)
def test_bad_flags_are_errors(text, message):
    with pytest.raises(UserError, match=message):
        parse(text, 78, "hint")


@pytest.mark.parametrize("layers", [["F", "S"], ("F", "S"), None, 5])
def test_a_pattern_is_a_text(layers):
    with pytest.raises(UserError, match="must be a text of F and S"):
        Pattern(layers)


def test_counts_may_be_numpy_integers():
    assert Pattern.uniform(np.int64(5), np.int64(2)) == Pattern("FSFSF")
    assert Pattern.from_freq(8, np.int32(4), np.int32(3)) == Pattern.from_freq(8, 4, 3)


def test_full_layers_need_indexer_weights():
    with pytest.raises(UserError, match=r"asks for F on layers 1,3, but .* only for layers 0,2$"):
        Pattern("FFSF").slots((0, 2))
    assert Pattern("FSFS").slots((0, 1, 2)) == (0, -1, 2, -1)


def test_presets_and_config_round_trip():
    assert preset("glm-5").pattern == Pattern.all_full(78)
    assert preset("glm-5.2").pattern == Pattern.from_freq(78, 4, 3)
    assert preset("glm-4.7-flash-dsa").pattern.n_full == 12
    assert preset("deepseek-v3.2").rope.softmax_factor == pytest.approx((0.1 * 3.688879454 + 1) ** 2)
    for name in PRESETS[:-1]:
        assert Config.from_hf(preset(name).to_hf()) == preset(name)
        shared = preset(name).replace(pattern=Pattern.uniform(preset(name).num_hidden_layers, 4))
        assert Config.from_hf(shared.to_hf()) == shared
    with pytest.raises(UserError, match="no preset"):
        preset("gpt-2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported; supported: glm_moe_dsa"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantisation 'awq' is not supported"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, r"\[64, 64\]"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope'"),
        ({"mlp_layer_types": ["dense"]}, "each of the 78 layers"),
        ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": {"type": "default"}}, "elsewhere it is 'default'"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}}, "elsewhere it is 500000"),
        ({"rope_parameters": {"full_attention": {}}}, "not implemented: full_attention"),
        ({"rope_scaling": "yarn"}, "rope_scaling is no object"),
        ({"rope_theta": float("nan")}, "rope must be a number"),
        ({"layer_types": ["sliding_attention"] * 78}, "sliding_attention are not implemented"),
        ({"layer_types": 7}, "layer_types 7 are not implemented"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be an integer in 1..10000"),
        ({"hidden_size": 10**30}, "hidden_size must be an integer in 1..2147483647"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"swiglu_limit": 7.0}, "swiglu_limit=7.0 is not implemented"),
        ({"quantization_config": "fp8"}, "quantisation 'fp8' is not"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "quantisation 'NVFP4'"),
        ({"quantization": {"bits": 4}}, "config.json's quantization is not supported"),
        ({"model_type": ["x"]}, "is not supported"),
        ({"first_k_dense_replace": "3"}, "first_k_dense_replace must be an integer"),
        ({"routed_scaling_factor": "x"}, "routed_scaling_factor must be a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number > 0"),
        ({"eos_token_id": ["x"]}, "token id 'x' is outside"),
        ({"eos_token_id": 10**9}, "token id 1000000000 is outside"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"hidden_size": "6144"}, "hidden_size must be an integer"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"num_key_value_heads": 8}, "one latent for all"),
        ({"num_experts_per_tok": 512}, "exceeds n_routed_experts"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        Config.from_hf(preset("glm-5.2").to_hf() | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        (b"{", "config.json cannot be read"),
        (b'{"model_type": "\xff"}', "config.json cannot be read"),
        (b"[" * 100_000, "config.json cannot be read"),
        (b"[]", "does not hold a JSON object"),
    ],
)
def test_config_files_that_are_none(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Config.load(tmp_path)
