"""Small checkpoints for the tests of loading and conversion: written and read back without the project's own code."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
NAMES = {
    BF16: "BF16", FP8: "F8_E4M3", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32",
    np.dtype(np.int32): "I32", np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, a in tensors.items():
        header[name] = {"dtype": NAMES[a.dtype], "shape": list(a.shape), "data_offsets": [offset, offset + a.nbytes]}
        offset += a.nbytes
    write_raw(path, header, b"".join(a.tobytes() for a in tensors.values()))


def write_raw(path: Path, header, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def read_directory(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of the safetensors files of a directory."""
    out = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, t in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                a, b = t["data_offsets"]
                values = np.frombuffer(data[8 + length + a : 8 + length + b], DTYPES[t["dtype"]])
                out[name] = values.reshape(t["shape"])
    return out


# Two heads of 72 + 40 rows cross the 128-row blocks; 576 latent rows and 160 columns leave partial ones.
CONFIG = dict(
    model_type="glm_moe_dsa", vocab_size=48, hidden_size=160, num_hidden_layers=4, num_attention_heads=2,
    q_lora_rank=32, kv_lora_rank=512, qk_nope_head_dim=72, qk_rope_head_dim=64, v_head_dim=40, intermediate_size=144,
    moe_intermediate_size=136, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, rope_theta=1e6,
    index_topk=8, index_n_heads=2, index_head_dim=64, indexer_types=["full", "full", "shared", "full"],
    num_nextn_predict_layers=1,
)  # fmt: skip


def tensors(dtype=BF16, fused=False, mtp=False, hf=CONFIG, seed=0) -> dict[str, np.ndarray]:
    """Random tensors of CONFIG under Hugging Face's names; FP8 ones come with their block scales."""
    rng, out = np.random.default_rng(seed), {}
    D, Q, C, F = hf["hidden_size"], hf["q_lora_rank"], hf["kv_lora_rank"], hf["moe_intermediate_size"]
    H, N, R, V = (hf[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    I, J, E = hf["index_n_heads"], hf["index_head_dim"], hf["n_routed_experts"]

    def add(name, *shape, quantized=True, float32=False):
        values = rng.normal(size=shape).astype(np.float32)
        if dtype == FP8 and quantized and len(shape) > 1:
            out[name] = values.astype(FP8)
            blocks = (*shape[:-2], *(-(-n // 128) for n in shape[-2:]))
            out[name + "_scale_inv"] = rng.uniform(0.5, 2, blocks).astype(np.float32)
        else:
            out[name] = values.astype(np.float32 if float32 else BF16 if dtype == FP8 else dtype)

    add("model.embed_tokens.weight", hf["vocab_size"], D, quantized=False)
    for i in range(hf["num_hidden_layers"] + mtp):
        p = f"model.layers.{i}."
        predicting = i == hf["num_hidden_layers"]
        if predicting:
            add(p + "eh_proj.weight", D, 2 * D)
            for name in ("enorm", "hnorm", "shared_head.norm"):
                add(p + name + ".weight", D)
        add(p + "input_layernorm.weight", D)
        add(p + "post_attention_layernorm.weight", D)
        a = p + "self_attn."
        add(a + "q_a_proj.weight", Q, D)
        add(a + "q_a_layernorm.weight", Q)
        add(a + "q_b_proj.weight", H * (N + R), Q)
        add(a + "kv_a_proj_with_mqa.weight", C + R, D)
        add(a + "kv_a_layernorm.weight", C)
        add(a + "kv_b_proj.weight", H * (N + V), C)
        add(a + "o_proj.weight", D, H * V)
        if predicting or hf["indexer_types"][i] == "full":
            add(a + "indexer.wq_b.weight", I * J, Q)
            add(a + "indexer.wk.weight", J, D)
            add(a + "indexer.k_norm.weight", J)
            add(a + "indexer.k_norm.bias", J)
            add(a + "indexer.weights_proj.weight", I, D, quantized=False)
        if i < hf["first_k_dense_replace"]:
            add_mlp(add, p + "mlp.", hf["intermediate_size"], D)
            continue
        add(p + "mlp.gate.weight", E, D, quantized=False)
        add(p + "mlp.gate.e_score_correction_bias", E, float32=True)
        add_mlp(add, p + "mlp.shared_experts.", F, D)
        if fused:
            add(p + "mlp.experts.gate_up_proj", E, 2 * F, D)
            add(p + "mlp.experts.down_proj", E, D, F)
        else:
            for e in range(E):
                add_mlp(add, f"{p}mlp.experts.{e}.", F, D)
    add("model.norm.weight", D)
    add("lm_head.weight", hf["vocab_size"], D, quantized=False)
    return out


def add_mlp(add, prefix, F, D):
    add(prefix + "gate_proj.weight", F, D)
    add(prefix + "up_proj.weight", F, D)
    add(prefix + "down_proj.weight", D, F)


def write(directory: Path, weights: dict[str, np.ndarray], shards: int = 1, hf=CONFIG) -> Path:
    """A Hugging Face directory of ``weights``, in one file or in shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    extra = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    quantized = any(a.dtype == FP8 for a in weights.values())
    (directory / "config.json").write_text(json.dumps(hf | (extra if quantized else {})))
    (directory / "tokenizer.json").write_text('{"model": "tests only"}')
    if shards == 1:
        write_file(directory / "model.safetensors", weights)
        return directory
    names = list(weights)
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_file(directory / file, {n: weights[n] for n in part})
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def dequantized(weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """float64 values of a tensor, by the definition: value times the scale of its 128x128 block."""
    values = weights[name].astype(np.float64)
    if weights[name].dtype == FP8:
        scales = weights[name + "_scale_inv"]
        rows, columns = values.shape[-2:]
        values *= np.kron(scales, np.ones((128, 128)))[..., :rows, :columns]
    return values


def expected(weights: dict[str, np.ndarray], config, layers) -> dict[str, np.ndarray]:
    """The parameter tree, flat and in float64, written out without the mapping table."""
    c, get = config, lambda name: dequantized(weights, name)
    every = range(c.num_hidden_layers)
    dense = [i for i in every if c.mlp_layer_types[i] == "dense"]
    sparse = [i for i in every if c.mlp_layer_types[i] == "sparse"]

    def stack(of, name):
        return np.stack([get(f"model.layers.{i}.{name}") for i in of])

    out = {
        "embed_tokens": get("model.embed_tokens.weight"), "norm": get("model.norm.weight"),
        "lm_head": get("lm_head.weight"),
    }  # fmt: skip
    for name in ("input_layernorm", "post_attention_layernorm"):
        out[f"layers.{name}"] = stack(every, f"{name}.weight")
    for name in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj"):
        out[f"layers.{name}"] = stack(every, f"self_attn.{name}.weight")
    kv = stack(every, "self_attn.kv_b_proj.weight")
    kv = kv.reshape(len(kv), c.num_attention_heads, -1, c.kv_lora_rank)
    out["layers.k_b_proj"], out["layers.v_b_proj"] = np.split(kv, [c.qk_nope_head_dim], axis=2)
    for name in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight") if layers else ():
        ours = name.replace(".", "_") if "norm" in name else name.removesuffix(".weight")
        out[f"indexer.{ours}"] = stack(layers, f"self_attn.indexer.{name}")
    for name in ("gate_proj", "up_proj", "down_proj"):
        if dense:
            out[f"dense.{name}"] = stack(dense, f"mlp.{name}.weight")
        out[f"experts.shared.{name}"] = stack(sparse, f"mlp.shared_experts.{name}.weight")
    out["experts.gate"] = stack(sparse, "mlp.gate.weight")
    out["experts.e_score_correction_bias"] = stack(sparse, "mlp.gate.e_score_correction_bias")
    if f"model.layers.{sparse[0]}.mlp.experts.down_proj" in weights:
        gate, up = np.split(stack(sparse, "mlp.experts.gate_up_proj"), 2, axis=2)
        down = stack(sparse, "mlp.experts.down_proj")
    else:
        experts = range(c.n_routed_experts)
        gate, up, down = (
            np.stack([stack(sparse, f"mlp.experts.{e}.{name}_proj.weight") for e in experts], axis=1)
            for name in ("gate", "up", "down")
        )
    for name, stacked in (("gate", gate), ("up", up), ("down", down)):
        out[f"experts.{name}_proj"] = stacked.swapaxes(2, 3)
    return out
