"""Device time of a compiled step by phase: the profiler's events, joined to the scopes of the program that ran.

Every operation of the program carries the ``jax.named_scope`` path it came from; an event names its operation. With
CUDA graphs events lose that name: compile without them, as ``Steps(profiled=True)`` does.
"""

from __future__ import annotations

import collections
import re
import tempfile
import warnings
from pathlib import Path

import jax

# The innermost of these scopes decides; what stands in none of them is "the rest".
PHASES = {
    "scores": "scoring", "select": "selection", "index_topk": "index queries and plan", "index_keys": "index keys",
    "sparse_mla": "attention", "q_proj": "projections", "kv_proj": "projections", "o_proj": "projections",
    "write_latent": "cache writes", "router": "router", "routed_experts": "experts", "shared_experts": "shared experts",
    "dense": "dense ffn", "embed": "embed and head", "head": "embed and head",
}  # fmt: skip
REST, COPIES = "the rest", "copies"
# Their events span those of the operations inside them.
_CONTAINERS = ("while", "conditional", "call", "async-start", "async-done")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[\])}] ([a-z][\w\-]*)\(")


def operations(hlo: str) -> dict[str, tuple[str, str]]:
    """{operation: (opcode, phase)} of an optimised program's text."""
    found = {}
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            name, opcode = match.groups()
            scope = re.search(r'op_name="([^"]*)"', line)
            found[name] = opcode, phase(scope.group(1) if scope else "", opcode)
    return found


def phase(op_name: str, opcode: str = "") -> str:
    """The phase of an operation by its scope path; a copy outside all scopes is one that the compiler put in."""
    inner = next((part for part in reversed(op_name.split("/")) if part in PHASES), None)
    return PHASES[inner] if inner else COPIES if opcode.startswith("copy") else REST


def times(run, program: jax.stages.Compiled, steps: int) -> tuple[dict[str, float], float]:
    """({phase: device seconds a step}, operations a step) of ``run()``, which runs ``program`` ``steps`` times.

    On a CPU operations of several threads overlap, so the phases may add up to more than the time that passed.
    """
    known = operations(program.as_text())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        (path,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    total, count = collections.Counter(), 0
    for op, seconds in _events(data):
        opcode, name = known.get(op, ("", REST))
        if opcode not in _CONTAINERS:
            total[name] += seconds / steps
            count += 1
    return dict(total), count / steps


def _events(data):
    """(operation, seconds) of everything a device did; of the host's threads where there is no other device."""
    # libtpu, once loaded, adds an empty "/device:CUSTOM:Megascale Trace".
    devices = [p for p in data.planes if p.name.startswith(("/device:GPU", "/device:TPU"))]
    planes = devices or [p for p in data.planes if p.name == "/host:CPU"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the binding that reads the file
        for plane in planes:
            lines = list(plane.lines)
            # A TPU repeats its operations in other lines, a GPU has a line a stream.
            for line in [x for x in lines if x.name == "XLA Ops"] or lines:
                for event in line.events:
                    op = dict(event.stats).get("hlo_op")
                    if op is None and line.name == "XLA Ops":
                        op = event.name.split(" ")[0].lstrip("%")
                    if op is not None:
                        yield str(op), event.duration_ns / 1e9
                    elif line.name.startswith("Stream"):
                        yield event.name, event.duration_ns / 1e9
