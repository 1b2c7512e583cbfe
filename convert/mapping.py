"""The one table that maps Hugging Face tensors to our parameters; loading and both directions of conversion read it.

A *leaf* is a stack in the parameter tree (``layers.q_a_proj``), an *entry* one layer of it (``layers.17.q_a_proj``).
An entry's *view* is the entry in Hugging Face's orientation (routed experts are stored transposed by us); ``parts``
says which rows of which Hugging Face tensor fill which rows of the view. No other place knows a tensor's name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the table itself needs nothing of the model
    from ic_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Rule:
    """A leaf and the Hugging Face tensors of one layer of it.

    ``rows``: "all", or the "key" or "value" half of every head's rows. A template with ``{expert}`` is one tensor an
    expert; ``fused`` is the alternative name that holds all experts, where ``rows`` may be the "gate" or "up" half.
    """

    leaf: str
    template: str
    rows: str = "all"
    fused: str | None = None

    @property
    def group(self) -> str:
        """The first part of the leaf's path when it is a stack over layers, else ""."""
        return self.leaf.split(".")[0] if "." in self.leaf else ""

    @property
    def transposed(self) -> bool:
        """Whether the last two axes of the entry are those of the view swapped."""
        return self.fused is not None

    def entry(self, layer: int | None) -> str:
        """Name of one layer of the leaf, the unit our checkpoints store."""
        return self.leaf if layer is None else f"{self.group}.{layer}.{self.leaf.removeprefix(self.group + '.')}"

    def view_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The view's shape for an entry of ``shape``, and the other way round."""
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else tuple(shape)

    def layers(self, c: Config, indexer_layers: Iterable[int]) -> tuple[int | None, ...]:
        """The model layers that the leaf stacks, in order; (None,) for a leaf that is no stack."""
        kinds = {"dense": "dense", "experts": "sparse"}
        if not self.group:
            return (None,)
        if self.group == "indexer":
            return tuple(indexer_layers)
        kind = kinds.get(self.group)
        return tuple(i for i in range(c.num_hidden_layers) if kind in (None, c.mlp_layer_types[i]))


def _layer(leaf: str, name: str, fused: str | None = None, **kwargs) -> Rule:
    prefix = "model.layers.{layer}."
    return Rule(leaf, prefix + name, fused=fused and prefix + fused, **kwargs)


TABLE: tuple[Rule, ...] = (
    Rule("embed_tokens", "model.embed_tokens.weight"),
    Rule("norm", "model.norm.weight"),
    Rule("lm_head", "lm_head.weight"),
    _layer("layers.input_layernorm", "input_layernorm.weight"),
    _layer("layers.post_attention_layernorm", "post_attention_layernorm.weight"),
    _layer("layers.q_a_proj", "self_attn.q_a_proj.weight"),
    _layer("layers.q_a_layernorm", "self_attn.q_a_layernorm.weight"),
    _layer("layers.q_b_proj", "self_attn.q_b_proj.weight"),
    _layer("layers.kv_a_proj_with_mqa", "self_attn.kv_a_proj_with_mqa.weight"),
    _layer("layers.kv_a_layernorm", "self_attn.kv_a_layernorm.weight"),
    _layer("layers.k_b_proj", "self_attn.kv_b_proj.weight", rows="key"),
    _layer("layers.v_b_proj", "self_attn.kv_b_proj.weight", rows="value"),
    _layer("layers.o_proj", "self_attn.o_proj.weight"),
    _layer("indexer.wq_b", "self_attn.indexer.wq_b.weight"),
    _layer("indexer.wk", "self_attn.indexer.wk.weight"),
    _layer("indexer.k_norm_weight", "self_attn.indexer.k_norm.weight"),
    _layer("indexer.k_norm_bias", "self_attn.indexer.k_norm.bias"),
    _layer("indexer.weights_proj", "self_attn.indexer.weights_proj.weight"),
    _layer("dense.gate_proj", "mlp.gate_proj.weight"),
    _layer("dense.up_proj", "mlp.up_proj.weight"),
    _layer("dense.down_proj", "mlp.down_proj.weight"),
    _layer("experts.gate", "mlp.gate.weight"),
    _layer("experts.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
    _layer("experts.shared.gate_proj", "mlp.shared_experts.gate_proj.weight"),
    _layer("experts.shared.up_proj", "mlp.shared_experts.up_proj.weight"),
    _layer("experts.shared.down_proj", "mlp.shared_experts.down_proj.weight"),
    *(
        _layer(f"experts.{n}_proj", f"mlp.experts.{{expert}}.{n}_proj.weight", "mlp.experts.gate_up_proj", rows=n)
        for n in ("gate", "up")
    ),
    _layer("experts.down_proj", "mlp.experts.{expert}.down_proj.weight", "mlp.experts.down_proj"),
)
RULES = {rule.leaf: rule for rule in TABLE}


def keeps_dtype(name: str) -> bool:
    """Whether a tensor or entry steers a selection and is therefore never rounded below what the checkpoint holds."""
    return "k_norm" in name or name.endswith("e_score_correction_bias")


@dataclasses.dataclass(frozen=True)
class Part:
    """A block of an entry's view: ``size`` elements of tensor ``name`` (of ``shape``) from ``start`` on, put at ``at``.

    ``at`` counts the view's axes; leading axes that the tensor lacks (head, expert) have extent 1.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    at: tuple[int, ...]


def parts(rule: Rule, layer: int | None, view: tuple[int, ...], c: Config, fused: bool) -> list[Part]:
    """The blocks of Hugging Face tensors that make up one entry's view of shape ``view``."""
    view = tuple(view)
    origin = (0,) * len(view)
    if rule.rows in ("key", "value"):
        H, rows, C = view
        N, V = c.qk_nope_head_dim, c.v_head_dim
        first = 0 if rule.rows == "key" else N
        name = rule.template.format(layer=layer)
        shape = (H * (N + V), C)
        return [Part(name, shape, (h * (N + V) + first, 0), (rows, C), (h, 0, 0)) for h in range(H)]
    if not rule.fused:
        return [Part(rule.template.format(layer=layer), view, origin, view, origin)]
    E, rows, columns = view
    if not fused:
        names = [rule.template.format(layer=layer, expert=e) for e in range(E)]
        return [Part(name, view[1:], (0, 0), view[1:], (e, 0, 0)) for e, name in enumerate(names)]
    halves = 1 if rule.rows == "all" else 2
    first = rows if rule.rows == "up" else 0
    return [Part(rule.fused.format(layer=layer), (E, halves * rows, columns), (0, first, 0), view, origin)]


def scale_name(name: str) -> str:
    """The tensor that holds the block scales of an FP8 tensor."""
    return f"{name}_scale_inv"


def is_fused(names: Iterable[str]) -> bool:
    """Whether the routed experts of a checkpoint with these tensors are stored fused."""
    return any(n.endswith(".mlp.experts.gate_up_proj") for n in names)


def layer_of(name: str) -> int | None:
    """The layer number in a Hugging Face tensor name."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def is_mtp(name: str, c: Config) -> bool:
    """Whether the tensor belongs to a multi-token-prediction layer, stored behind the model's own layers."""
    layer = layer_of(name)
    return layer is not None and 0 <= layer - c.num_hidden_layers < max(1, c.num_nextn_predict_layers)


def known_names(c: Config) -> set[str]:
    """Every Hugging Face tensor name, scales apart, that the model of ``c`` has a use for."""
    experts = range(c.n_routed_experts)
    names = set()
    for rule in TABLE:
        for layer in rule.layers(c, range(c.num_hidden_layers)):
            names.update(rule.template.format(layer=layer, expert=e) for e in (experts if rule.fused else (0,)))
            if rule.fused:
                names.add(rule.fused.format(layer=layer))
    return names


def indexer_layers(names: Iterable[str], c: Config) -> tuple[int, ...]:
    """The model's layers for which an indexer tensor is among ``names``, Hugging Face's or our entries'."""
    patterns = (r"model\.layers\.(\d+)\.self_attn\.indexer\.", r"indexer\.(\d+)\.")
    found = {int(m[1]) for n in names for p in patterns if (m := re.match(p, n))}
    return tuple(i for i in range(c.num_hidden_layers) if i in found)
