"""One mesh with named axes, and the one table that says which logical axis of a parameter lies on which mesh axis."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .config import Config
from .errors import UserError

MESH_AXES = ("data", "tensor", "expert", "context")
# Logical axes of the parameters (model.py, attention.py, moe.py); what is not listed is replicated.
RULES = {"heads": "tensor", "vocab": "tensor", "mlp": "tensor", "expert": "expert"}


def parse_mesh(text: str) -> dict[str, int]:
    """``"data=2,tensor=4"`` -> {"data": 2, "tensor": 4}. Raises UserError for unknown axes or sizes below 1."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        axis = axis.strip()
        whole = size.strip().isascii() and size.strip().isdigit()
        if axis not in MESH_AXES or axis in sizes or not whole or int(size) < 1:
            raise UserError(f"--mesh {text!r}: write axis=size pairs of {', '.join(MESH_AXES)}, for instance tensor=2")
        sizes[axis] = int(size)
    return sizes


def check_mesh(config: Config, sizes: dict[str, int]) -> None:
    """Raises UserError naming the axis that does not divide the model, and the sizes that would."""
    for axis in ("data", "context"):
        if sizes.get(axis, 1) > 1:
            raise UserError(f"mesh {axis}={sizes[axis]}: only tensor and expert are divided yet; leave {axis} out")
    divided = {
        "tensor": [
            (config.num_attention_heads, "attention heads"),
            (config.intermediate_size, "intermediate_size"),
            (config.moe_intermediate_size, "moe_intermediate_size"),
            (config.vocab_size, "vocabulary entries"),
        ],
        "expert": [(config.n_routed_experts, "experts")],
    }
    for axis, limits in divided.items():
        size = sizes.get(axis, 1)
        for n, what in limits:
            if n % size:
                common = math.gcd(*(m for m, _ in limits))
                valid = ",".join(str(d) for d in range(1, common + 1) if common % d == 0)
                raise UserError(f"mesh {axis}={size} does not divide {n} {what}; valid: {valid}")


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """A Mesh of all four axes over the first devices; UserError when there are too few."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    need, have = int(np.prod(shape)), jax.device_count()
    if need > have:
        raise UserError(f"the mesh needs {need} devices, {have} are there")
    devices = np.array(jax.devices()[:need]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def param_shardings(mesh: Mesh, logical_axes: dict) -> dict:
    """NamedShardings for a tree of logical axes (``model.abstract_params``)."""
    spec = lambda axes: NamedSharding(mesh, PartitionSpec(*(RULES.get(a) for a in axes)))
    return jax.tree.map(spec, logical_axes, is_leaf=lambda a: isinstance(a, tuple))
