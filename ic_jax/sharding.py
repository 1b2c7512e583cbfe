"""One mesh with named axes, the one table that says which logical axis of a parameter lies on which mesh axis, and the
start of a run of several processes. What devices exchange during a forward pass is in ``parallel.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .config import Config
from .errors import UserError

ARRIVAL_SECONDS, SILENCE_SECONDS = 60, 20  # how long a process is waited for: at the start, and when it falls silent
MESH_AXES = ("data", "tensor", "expert", "context")
# Logical axes of the parameters (model.py, attention.py, moe.py); what is not listed is replicated.
RULES = {"heads": "tensor", "vocab": "tensor", "mlp": "tensor", "expert": "expert"}


def parse_mesh(text: str) -> dict[str, int]:
    """``"data=2,tensor=4"`` -> {"data": 2, "tensor": 4}. Raises UserError for unknown axes or sizes below 1."""
    sizes: dict[str, int] = {}
    for part in str(text).split(","):
        axis, _, size = part.partition("=")
        axis = axis.strip()
        whole = size.strip().isascii() and size.strip().isdigit()
        if axis not in MESH_AXES or axis in sizes or not whole or int(size) < 1:
            raise UserError(f"--mesh {text!r}: write axis=size pairs of {', '.join(MESH_AXES)}, for instance tensor=2")
        sizes[axis] = int(size)
    return sizes


def check_mesh(config: Config, sizes: dict[str, int]) -> None:
    """Raises UserError naming the axis that does not divide the model, and the sizes that would."""
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
    """A Mesh of all four axes over the first devices; UserError when there are too few, or processes without a part."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    need, have = int(np.prod(shape)), jax.device_count()
    if need > have:
        raise UserError(f"the mesh needs {need} devices, {have} are there")
    if need < have and jax.process_count() > 1:
        raise UserError(f"the mesh has {need} devices, the {jax.process_count()} processes have {have}: use them all")
    devices = np.array(jax.devices()[:need]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def param_specs(logical_axes: dict) -> dict:
    """PartitionSpecs for a tree of logical axes (``model.abstract_params``)."""
    spec = lambda axes: PartitionSpec(*(RULES.get(a) for a in axes))
    return jax.tree.map(spec, logical_axes, is_leaf=lambda a: isinstance(a, tuple))


def bytes_per_device(shapes: dict, logical_axes: dict, sizes: dict[str, int]) -> int:
    """Bytes of parameters of these ShapeDtypeStructs that one device of a mesh holds."""

    def one(shape, axes):
        parts = math.prod(sizes.get(RULES.get(axis), 1) for axis in axes)
        return shape.size * shape.dtype.itemsize // parts

    return sum(jax.tree.leaves(jax.tree.map(one, shapes, logical_axes)))


def shardings(mesh: Mesh, specs) -> dict:
    """NamedShardings for a tree of PartitionSpecs."""
    is_spec = lambda s: isinstance(s, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join a run of several processes; before JAX computes anything. Does nothing when no argument is given.

    Args:
      coordinator: "HOST:PORT" of process 0, or "auto" on a cluster that JAX knows (Slurm, Open MPI, Kubernetes, TPU).
      processes, process: how many there are, and which one this is; None leaves it to the cluster.

    Raises UserError for arguments without sense, and when not all processes arrive within ARRIVAL_SECONDS. Later, a
    process that falls silent for SILENCE_SECONDS ends the others.
    """
    given = coordinator, processes, process
    if given == (None, None, None):
        return
    auto = coordinator == "auto"
    if not auto:
        if None in given:
            raise UserError("several processes need --coordinator, --num-processes and --process-id, or --coordinator auto")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator {coordinator!r}: write HOST:PORT, for instance 10.0.0.1:8476, or auto")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process-id {process} must lie in 0..{processes - 1}, as --num-processes is {processes}")
    # JAX itself would abort with a stack trace when it has waited for long enough.
    alarm = threading.Timer(ARRIVAL_SECONDS, _give_up, [f"not all {processes or ''} processes arrived at {coordinator}"])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            None if auto else coordinator, processes, process, initialization_timeout=2 * ARRIVAL_SECONDS,
            heartbeat_timeout_seconds=SILENCE_SECONDS, shutdown_timeout_seconds=SILENCE_SECONDS,
            cluster_detection_method=None if auto else "deactivate",
        )  # fmt: skip
    except (RuntimeError, ValueError, TypeError) as e:
        if auto and not isinstance(e, RuntimeError):
            raise UserError("--coordinator auto: no cluster that JAX knows was found; give HOST:PORT") from None
        raise UserError(f"the processes cannot be joined at {coordinator}: {str(e).splitlines()[0][:200]}") from None
    finally:
        alarm.cancel()


def _give_up(why: str) -> None:
    print(f"error: {' '.join(why.split())} within {ARRIVAL_SECONDS} s", file=sys.stderr, flush=True)
    os._exit(2)


def from_each(value) -> list:
    """Every process's ``value``, which JSON can hold, on every process."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.int32(len(data)))
    rows = process_allgather(np.resize(data, sizes.max()))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def check_alike(arguments: dict[str, object]) -> None:
    """UserError when the processes of a run were started with different ``arguments`` (by their repr); it names them."""
    first, *others = from_each({name: hashlib.sha256(repr(v).encode()).hexdigest()[:16] for name, v in arguments.items()})
    for i, other in enumerate(others, 1):
        if different := [name for name in sorted(first | other) if first.get(name) != other.get(name)]:
            raise UserError(f"process {i} was started with other arguments than process 0: {', '.join(different)}")
