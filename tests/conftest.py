"""Shared fixtures. Tests run on a CPU with 8 simulated devices; 2 would do for one-device work, 8 serve the mesh tests."""

import os
import signal

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from pathlib import Path

import jax
import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins with Ctrl-C ignored

GOLDEN = Path(__file__).parent / "golden"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """``-n auto``: a worker a core, and four at most: each may take some gigabytes."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Compiled programs are dropped after each file: those of a thousand tests are more than a process can map."""
    yield
    jax.clear_caches()


@pytest.fixture
def golden() -> Path:
    return GOLDEN
