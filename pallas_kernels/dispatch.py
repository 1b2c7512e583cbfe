"""Which implementation of an op runs, and why the others do not.

A backend is a module with the op's function and ``supported(...) -> str | None``, the reason why it cannot run these
arguments. ``auto`` takes the first backend that can; a forced one that cannot raises NotImplementedError.
"""

from __future__ import annotations

import importlib

import jax

IMPLEMENTATIONS = ("auto", "reference", "gpu", "tpu")
_OPS = {
    "index_topk": {"gpu": "index_topk_gpu", "tpu": "index_topk_tpu"},
    "plan_rows": {"gpu": "sparse_mla_grouped_gpu"},
    "sparse_mla": {"gpu": "sparse_mla_gpu", "tpu": "sparse_mla_tpu"},
    "dense_mla": {},
    "grouped_matmul": {"gpu": "grouped_matmul_gpu"},
    "layer_matmul": {"gpu": "layer_matmul_gpu"},
}
# Kernels that compile but have not run on a device yet: "auto" leaves them out, implementation="gpu" takes them.
ON_TRIAL = {("grouped_matmul", "gpu"), ("layer_matmul", "gpu")}


def reason_against(op: str, backend: str, *args, platform: str | None = None, forced=False, **kwargs) -> str | None:
    """Why ``backend`` ("gpu" or "tpu") cannot run ``op`` on these arguments (arrays or ShapeDtypeStructs); None if it can.

    ``platform`` is the JAX platform to ask for; None asks for this process's own device, its chip included. ``forced``:
    kernels on trial count too.
    """
    if backend not in _OPS[op]:
        return f"no {backend} kernel for {op} yet"
    here = platform is None
    platform = platform or jax.default_backend()
    if platform not in (backend, {"gpu": "cuda"}.get(backend)):
        return f"needs a {backend.upper()}, this process runs on {platform}"
    if here and backend == "gpu":
        capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
        if capability != "9.0":
            return f"needs a Hopper GPU (compute capability 9.0), found {capability}"
    reason = importlib.import_module(f".{_OPS[op][backend]}", __package__).supported(*args, **kwargs)
    if reason is None and not forced and (op, backend) in ON_TRIAL:
        return f"the kernel has not run on a device yet: only implementation={backend} takes it"
    return reason


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
    reason = reason_against(op, implementation, *args, forced=True, **kwargs)
    if reason is not None:
        raise NotImplementedError(f"{op}: implementation={implementation}: {reason}")
    return implementation


def call(op: str, implementation: str, *args, **kwargs):
    """Run ``op`` through the chosen backend."""
    backend = choose(op, implementation, *args, **kwargs)
    name = "reference" if backend == "reference" else _OPS[op][backend]
    return getattr(importlib.import_module(f".{name}", __package__), op)(*args, **kwargs)
