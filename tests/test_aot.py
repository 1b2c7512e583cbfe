"""Every Hopper kernel and block size compiles through ptxas on a machine without a GPU, with the registers
and spills recorded (tests/data/hopper_registers.json; ``python tests/hopper.py --update`` after a change that is meant)."""

import importlib.util
import json
import os
import subprocess
import sys

import hopper
import pytest

MISSING = [m for m in ("jax_cuda13_plugin", "nvidia.cu13") if importlib.util.find_spec(m.split(".")[0]) is None]


@pytest.mark.skipif(bool(MISSING), reason="needs jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc to compile")
def test_hopper_kernels_compile_within_their_recorded_registers():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, hopper.__file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    recorded = json.loads(hopper.RECORD.read_text())
    assert found.keys() == recorded.keys()
    for name, kernels in found.items():
        assert len(kernels) == len(recorded[name]) > 0, name
        for (registers, spills), (most, most_spills) in zip(kernels, recorded[name], strict=True):
            # Another ptxas may choose a few registers more; spills are never welcome.
            assert registers <= most + 8 and spills <= most_spills, (name, kernels, recorded[name])
