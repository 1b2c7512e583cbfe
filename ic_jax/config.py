"""Model configuration: Hugging Face field names, every dialect of config.json resolved once, and the presets.

Flow: config.json -> Config.from_hf -> everything else. A field that would change the computation and is not implemented
is refused.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from . import json_file
from . import pattern as patterns
from .errors import UserError
from .pattern import Pattern


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: base ``theta``, plus yarn when ``factor`` > 1 (Peng et al. 2023, as DeepSeek-V3 applies it)."""

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def inv_freq(self, dim: int) -> np.ndarray:
        """float32 [dim/2] angular frequencies; yarn blends interpolated and plain ones over a ramp of pairs."""
        exponent = np.arange(0, dim, 2, dtype=np.float32) / dim
        plain = 1.0 / self.theta**exponent
        if self.factor <= 1:
            return plain.astype(np.float32)

        def pair(rotations):  # the pair that turns `rotations` times over the original context
            return dim * math.log(self.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low = max(math.floor(pair(self.beta_fast)), 0)
        high = min(math.ceil(pair(self.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
        return (plain / self.factor * ramp + plain * (1 - ramp)).astype(np.float32)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        if self.factor <= 1:
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale of the main attention is multiplied by."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


def _mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """A DSA transformer, under Hugging Face's field names; sizes in elements.

    ``pattern`` is the checkpoint's own F/S pattern; ``has_indexer`` is False for plain MLA models (dense attention
    only). ``mlp_layer_types`` holds "dense" or "sparse" for every layer. Source of the fields: the config classes of
    transformers' ``glm_moe_dsa``, ``deepseek_v32`` and ``glm4_moe_lite``.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    mlp_layer_types: tuple[str, ...]
    pattern: Pattern
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-5
    has_indexer: bool = True
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_topk: int = 2048
    rope: Rope = Rope()
    rope_interleave: bool = True
    indexer_rope_interleave: bool = True
    max_position_embeddings: int = 131072
    num_nextn_predict_layers: int = 0
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def latent_dim(self) -> int:
        """Width of a latent cache row: kv_lora_rank + qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * self.rope.softmax_factor

    def replace(self, **changes) -> Config:
        return dataclasses.replace(self, **changes)

    @classmethod
    def load(cls, directory: str | Path) -> Config:
        """The Config of ``directory``/config.json. Raises UserError when it is absent, malformed or unsupported."""
        path = Path(directory) / "config.json"
        try:
            return cls.from_hf(json_file.parse(path.read_bytes(), path))
        except FileNotFoundError:
            raise UserError(f"{directory} has no config.json; give a model directory") from None
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror or e}") from None

    @classmethod
    def from_hf(cls, hf: dict) -> Config:
        """The Config of a parsed config.json. Raises UserError naming the field that is missing, wrong or unsupported."""
        kind = hf.get("model_type")
        if not isinstance(kind, str) or kind not in _DEFAULTS:
            raise UserError(f"model_type {kind!r} is not supported; supported: {', '.join(_DEFAULTS)}")
        _refuse_unimplemented(hf)
        get = {**_COMMON, **_DEFAULTS[kind], **{k: v for k, v in hf.items() if v is not None}}

        def integer(name, least=1, most=2**31 - 1):
            if name not in get:
                raise UserError(f"config.json: {name} is missing")
            value = get[name]
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(f"config.json: {name} must be an integer in {least}..{most}, not {value!r}")
            return value

        def number(name):
            value = get[name]
            if not _is_number(value) or value <= 0:
                raise UserError(f"config.json: {name} must be a number > 0, not {value!r}")
            return float(value)

        def flag(name, default):
            value = get.get(name, default)
            if not isinstance(value, bool):
                raise UserError(f"config.json: {name} must be true or false, not {value!r}")
            return value

        n = integer("num_hidden_layers", most=10_000)  # a list of that length is made before anything else
        has_indexer = kind != "glm4_moe_lite" or hf.get("index_topk") is not None
        fields = {name: integer(name) for name in _INTEGERS}
        if fields["qk_rope_head_dim"] % 2:
            raise UserError("config.json: qk_rope_head_dim must be even")
        if has_indexer:
            fields |= {name: integer(name) for name in ("index_n_heads", "index_head_dim", "index_topk")}
            if fields["index_head_dim"] < fields["qk_rope_head_dim"]:
                raise UserError("config.json: index_head_dim is smaller than qk_rope_head_dim")
        if fields["num_experts_per_tok"] > fields["n_routed_experts"]:
            raise UserError("config.json: num_experts_per_tok exceeds n_routed_experts")
        if fields["n_routed_experts"] % fields["n_group"] or fields["topk_group"] > fields["n_group"]:
            raise UserError("config.json: n_group must divide n_routed_experts, and topk_group may not exceed it")
        eos = get.get("eos_token_id", [])
        eos = tuple(eos) if isinstance(eos, list) else (eos,)
        bos = get.get("bos_token_id")
        for token in (*eos, *(() if bos is None else (bos,))):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < fields["vocab_size"]:
                raise UserError(f"config.json: token id {token!r} is outside the vocabulary of {fields['vocab_size']}")
        return cls(
            model_type=kind,
            num_hidden_layers=n,
            mlp_layer_types=_mlp_layer_types(n, get, integer("first_k_dense_replace", 0)),
            pattern=patterns.resolve(n, hf) if has_indexer else Pattern.all_full(n),
            routed_scaling_factor=number("routed_scaling_factor"),
            norm_topk_prob=flag("norm_topk_prob", True),
            rms_norm_eps=number("rms_norm_eps"),
            has_indexer=has_indexer,
            rope=_rope(get, hf),
            rope_interleave=flag("rope_interleave", True),
            indexer_rope_interleave=flag("indexer_rope_interleave", kind != "deepseek_v32"),
            num_nextn_predict_layers=integer("num_nextn_predict_layers", 0),
            eos_token_id=eos,
            bos_token_id=bos,
            **fields,
        )

    def to_hf(self) -> dict:
        """A config.json object that ``from_hf`` reads back to an equal Config (released-checkpoint dialect)."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("pattern", "rope", "has_indexer"):
            del out[name]
        if not self.has_indexer:
            for name in ("index_n_heads", "index_head_dim", "index_topk"):
                del out[name]
        elif self.model_type != "deepseek_v32" or self.pattern.n_full < self.num_hidden_layers:
            out["indexer_types"] = ["full" if c == "F" else "shared" for c in self.pattern.layers]
        r = self.rope
        out["rope_theta"] = r.theta
        if r.factor > 1:
            out["rope_scaling"] = {
                "type": "yarn", "factor": r.factor, "original_max_position_embeddings": r.original_max_position,
                "beta_fast": r.beta_fast, "beta_slow": r.beta_slow, "mscale": r.mscale, "mscale_all_dim": r.mscale_all_dim,
            }  # fmt: skip
        out["num_key_value_heads"] = self.num_attention_heads  # transformers would assume another number
        out["mlp_layer_types"] = list(self.mlp_layer_types)
        out["eos_token_id"] = list(self.eos_token_id)
        names = {"glm_moe_dsa": "GlmMoeDsa", "deepseek_v32": "DeepseekV32", "glm4_moe_lite": "Glm4MoeLite"}
        out["architectures"] = [names[self.model_type] + "ForCausalLM"]
        return out


_INTEGERS = (
    "vocab_size", "hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "n_routed_experts",
    "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group", "max_position_embeddings",
)  # fmt: skip
_COMMON = dict(
    first_k_dense_replace=3, routed_scaling_factor=2.5, n_group=1, topk_group=1, norm_topk_prob=True, n_shared_experts=1,
    num_nextn_predict_layers=0, index_n_heads=32, index_head_dim=128, rope_theta=10000.0,
)  # fmt: skip
# What a config.json of each architecture means when it leaves a field out.
_DEFAULTS: dict[str, dict] = {
    "glm_moe_dsa": dict(rms_norm_eps=1e-5, max_position_embeddings=202752, index_topk=2048),
    "deepseek_v32": dict(
        rms_norm_eps=1e-6, max_position_embeddings=163840, index_topk=2048, index_n_heads=64, n_group=8, topk_group=4
    ),
    "glm4_moe_lite": dict(
        rms_norm_eps=1e-5, max_position_embeddings=202752, routed_scaling_factor=1.8, first_k_dense_replace=1
    ),
}


def _refuse_unimplemented(hf: dict) -> None:
    """UserError for a field that would change the computation in a way this model does not implement."""
    expected = {
        "attention_bias": (False,), "mlp_bias": (False,), "tie_word_embeddings": (False,), "hidden_act": ("silu",),
        "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,), "use_cache": (True, False),
        "sliding_window": (), "swiglu_limit": (), "hidden_activation": ("silu",), "index_kpool": (),
        "logit_scale": (1.0,), "final_logit_softcapping": (), "attn_logit_softcapping": (),
        "partial_rotary_factor": (1.0,), "index_topk_method": (), "embedding_multiplier": (1.0,),
    }  # fmt: skip
    for name, values in expected.items():
        value = hf.get(name)
        if value is not None and value not in values:
            known = f"; only {' or '.join(map(repr, values))} is" if values else ""
            raise UserError(f"config.json: {name}={value!r} is not implemented{known}")
    kinds = hf.get("layer_types") or []
    kinds = set(map(str, kinds if isinstance(kinds, list) else [kinds]))
    if kinds := sorted(kinds - {"indexed_attention", "full_attention"}):
        raise UserError(f"config.json: layer_types {', '.join(kinds)} are not implemented")
    for name in ("compression_config", "quantization"):
        if hf.get(name) is not None:
            raise UserError(f"config.json's {name} is not supported; supported: fp8 with 128x128 blocks, or none")
    heads = hf.get("num_attention_heads")
    if heads is not None and hf.get("num_key_value_heads") not in (None, heads):
        raise UserError("config.json: num_key_value_heads differs from num_attention_heads; MLA has one latent for all")
    quantization = hf.get("quantization_config")
    if quantization is not None:
        given = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
        method = given.get("quant_method", given.get("quant_algo", given.get("bits")))
        if method != "fp8" or given is not quantization:
            raise UserError(f"quantisation {method!r} is not supported; supported: fp8 with 128x128 blocks, or none")
        if quantization.get("weight_block_size", [128, 128]) != [128, 128]:
            raise UserError(f"fp8 weight_block_size {quantization['weight_block_size']} is not supported; only [128, 128]")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mlp_layer_types(n: int, get: dict, dense: int) -> tuple[str, ...]:
    types = get.get("mlp_layer_types")
    if types is None:
        return tuple("dense" if i < dense else "sparse" for i in range(n))
    if not isinstance(types, list | tuple) or len(types) != n or not set(types) <= {"dense", "sparse"}:
        raise UserError(f"config.json: mlp_layer_types must list 'dense' or 'sparse' for each of the {n} layers")
    return tuple(types)


# What a rope dict may say; anything else might change the computation.
_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "partial_rotary_factor", "max_position_embeddings",
}  # fmt: skip


def _rope(get: dict, hf: dict) -> Rope:
    # Two dialects: released checkpoints have rope_theta and rope_scaling, transformers 5 has rope_parameters.
    given: dict = {} if hf.get("rope_theta") is None else {"rope_theta": hf["rope_theta"]}
    for name in ("rope_scaling", "rope_parameters"):
        said = hf.get(name) or {}
        if not isinstance(said, dict) or (unknown := sorted(set(said) - _ROPE_KEYS)):
            what = f"has fields that are not implemented: {', '.join(unknown)}" if isinstance(said, dict) else "is no object"
            raise UserError(f"config.json: {name} {what}")
        said = {k: v for k, v in said.items() if v is not None}
        if "type" in said:
            said["rope_type"] = said.get("rope_type", said["type"])
            del said["type"]
        for key, value in said.items():
            if given.get(key, value) != value:
                other = f"elsewhere it is {given[key]!r}"
                raise UserError(f"config.json: {name} has {key} {value!r}, {other}; remove one of them")
        given |= said
    kind = given.get("rope_type", "default")
    for key, value in given.items():
        if key != "rope_type" and (not _is_number(value) or value < 0 or (value == 0 and not key.startswith("mscale"))):
            raise UserError(f"config.json: {key} of the rope must be a number > 0, not {value!r}")
    theta = float(given.get("rope_theta", get["rope_theta"]))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not implemented for MLA rope")
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        raise UserError(f"config.json: rope type {kind!r} is not supported; supported: default, yarn")
    if "factor" not in given:
        raise UserError("config.json: yarn rope needs a factor")
    return Rope(
        theta=theta,
        factor=float(given["factor"]),
        original_max_position=int(given.get("original_max_position_embeddings", get["max_position_embeddings"])),
        beta_fast=float(given.get("beta_fast", 32)),
        beta_slow=float(given.get("beta_slow", 1)),
        mscale=float(given.get("mscale", 0)),
        mscale_all_dim=float(given.get("mscale_all_dim", 0)),
    )


_GLM_5 = dict(
    model_type="glm_moe_dsa", vocab_size=154880, hidden_size=6144, num_hidden_layers=78, num_attention_heads=64,
    q_lora_rank=2048, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
    intermediate_size=12288, moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8,
    first_k_dense_replace=3, rope_theta=1e6, num_nextn_predict_layers=1,
)  # fmt: skip
_PRESETS: dict[str, dict] = {
    "glm-5": _GLM_5,
    "glm-5.2": _GLM_5
    | dict(rope_theta=8e6, max_position_embeddings=1048576, index_topk_freq=4, index_skip_topk_offset=3),
    "deepseek-v3.2": dict(
        model_type="deepseek_v32", vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128,
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8,
        first_k_dense_replace=3, rope_theta=1e4, num_nextn_predict_layers=1,
        rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
                          mscale=1.0, mscale_all_dim=1.0),
    ),
    # The "30B DSA" model of the paper; its weights are unpublished, so the pattern is the paper's searched 1/4.
    "glm-4.7-flash-dsa": dict(
        model_type="glm4_moe_lite", vocab_size=154880, hidden_size=2048, num_hidden_layers=47, num_attention_heads=20,
        q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256,
        intermediate_size=10240, moe_intermediate_size=1536, n_routed_experts=64, num_experts_per_tok=4,
        first_k_dense_replace=1, rope_theta=1e6, num_nextn_predict_layers=1, index_topk=2048,
        index_topk_pattern="FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS",
    ),
}  # fmt: skip
PRESETS = (*_PRESETS, "demo")
DEMO_DIRECTORY = Path(__file__).parent / "demo"


def preset(name: str) -> Config:
    """The Config called ``name`` (one of PRESETS), shapes only; UserError for another name."""
    if name == "demo":
        return Config.load(DEMO_DIRECTORY)
    if name not in _PRESETS:
        raise UserError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    return Config.from_hf(_PRESETS[name])
