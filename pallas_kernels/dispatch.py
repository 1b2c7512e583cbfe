"""Which implementation of an op runs, and why the others do not.

A backend is a module with the op's function and ``supported(...) -> str | None``, the reason why it cannot run these
arguments. ``auto`` takes the first backend that can; a forced one that cannot raises NotImplementedError.

What a program will run on is ``target()``: this process's device, or that of the abstract mesh under which it is
compiled ahead of time, or, inside ``interpreted()``, Pallas's interpreter of TPU kernels.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from typing import NamedTuple

import jax

IMPLEMENTATIONS = ("auto", "reference", "gpu", "tpu")
_OPS = {
    "index_topk": {"gpu": "index_topk_gpu", "tpu": "index_topk_tpu"},
    "plan_rows": {"gpu": "sparse_mla_grouped_gpu"},
    "sparse_mla": {"gpu": "sparse_mla_gpu", "tpu": "sparse_mla_tpu"},
    "dense_mla": {},
    "grouped_matmul": {"gpu": "grouped_matmul_gpu", "tpu": "grouped_matmul_tpu"},
    "grouped_swiglu": {"gpu": "grouped_matmul_gpu", "tpu": "grouped_matmul_tpu"},
    "layer_matmul": {"gpu": "layer_matmul_gpu"},
    "expert_matmul": {"gpu": "matvec_gpu"},
}

_TPUS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "TPU7x": "v7x",
}  # fmt: skip
_GPUS = {"NVIDIA H100 80GB HBM3": "9.0", "NVIDIA H200": "9.0"}  # of programs compiled ahead of time
_interpreting = contextvars.ContextVar("interpreting", default=False)


class Target(NamedTuple):
    """platform: "cpu", "gpu" or "tpu". chip: a TPU's generation ("v6e"), a GPU's compute capability ("9.0")."""

    platform: str
    chip: str


# What the kernels are written for, by the names that ``ic-jax info --chip`` takes.
CHIPS = {"h100": Target("gpu", "9.0"), "h200": Target("gpu", "9.0")}
CHIPS |= {chip: Target("tpu", chip) for chip in ("v5e", "v5p", "v6e", "v7x")}


def target() -> Target:
    """What a program traced here will run on."""
    if _interpreting.get():
        return Target("tpu", "interpreter")
    device = jax.devices()[0]
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.device_kind != device.device_kind:
        device = abstract  # compiled ahead of time
    kind = device.device_kind
    platform = "gpu" if device.platform == "cuda" else device.platform
    chip = _TPUS.get(kind) if platform == "tpu" else getattr(device, "compute_capability", _GPUS.get(kind))
    return Target(platform, chip or kind)


def compiler_options(queries: int, profiled: bool = False) -> dict[str, str] | None:
    """What XLA must be told when it compiles a model's step of ``queries`` tokens a sequence for ``target()``.

    ``profiled``: operations must keep their names in a profile, which CUDA graphs take away.
    """
    if target().platform == "tpu" and not interpreting():
        # Else it changes the tiling of whole weight stacks in front of the layers' loop: 3 GB of copies a step at 30B.
        return {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"}
    if target().platform == "gpu" and profiled:
        return {"xla_gpu_enable_command_buffer": ""}
    if target().platform == "gpu" and queries == 1:
        # The layers' loop within one CUDA graph, independent kernels side by side: a fifth off a decode step at 30B.
        kinds = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
        return {"xla_gpu_enable_command_buffer": kinds, "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    return None


def interpreting() -> bool:
    """Whether TPU kernels traced here run in Pallas's interpreter."""
    return _interpreting.get()


@contextlib.contextmanager
def interpreted(params=None):
    """Inside, this process counts as a TPU, and TPU kernels run in Pallas's interpreter, on any platform.

    ``params`` is a ``pltpu.InterpretParams``.
    """
    from jax.experimental.pallas import tpu as pltpu

    token = _interpreting.set(True)
    try:
        with pltpu.force_tpu_interpret_mode(params or pltpu.InterpretParams()):
            yield
    finally:
        _interpreting.reset(token)


def reason_against(op: str, backend: str, *args, on: Target | None = None, **kwargs) -> str | None:
    """Why ``backend`` ("gpu" or "tpu") cannot run ``op`` on these arguments (arrays or ShapeDtypeStructs); None if it can.

    ``on`` is what to answer for, one of CHIPS; None asks for ``target()``.
    """
    if backend not in _OPS[op]:
        return f"no {backend} kernel for {op} yet"
    platform, chip = on or target()
    if platform != backend:
        return f"needs a {backend.upper()}, this process runs on {platform}"
    if platform == "gpu" and chip != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), found {chip}"
    if platform == "tpu" and chip not in ("interpreter", *CHIPS):
        return f"needs a TPU v5e, v5p, v6e or v7x, found {chip}"
    return importlib.import_module(f".{_OPS[op][backend]}", __package__).supported(*args, **kwargs)


def choose(op: str, implementation: str, *args, **kwargs) -> str:
    """The backend that runs ``op``: "reference", "gpu" or "tpu".

    Raises NotImplementedError when a forced implementation cannot run, ValueError for an unknown name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {implementation!r}")
    if implementation == "reference":
        return "reference"
    if implementation == "auto":
        able = [b for b in _OPS[op] if reason_against(op, b, *args, **kwargs) is None]
        return able[0] if able else "reference"
    reason = reason_against(op, implementation, *args, **kwargs)
    if reason is not None:
        raise NotImplementedError(f"{op}: implementation={implementation}: {reason}")
    return implementation


def call(op: str, implementation: str, *args, **kwargs):
    """Run ``op`` through the chosen backend."""
    backend = choose(op, implementation, *args, **kwargs)
    name = "reference" if backend == "reference" else _OPS[op][backend]
    return getattr(importlib.import_module(f".{name}", __package__), op)(*args, **kwargs)
