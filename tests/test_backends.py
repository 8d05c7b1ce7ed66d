"""All networks give the same numbers on TensorFlow, JAX and PyTorch.

Each backend builds the networks in a process of its own, with the same random weights. A few always
run on JAX; `pytest -m slow` runs all of them, and on PyTorch where it is installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_resnest.backbones import VARIANTS

PROGRAM = Path(__file__).parent / "programs" / "backend_outputs.py"


def run(backend, path, names):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    # Compiling takes longer than running: the less XLA optimizes, the sooner it is done.
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(path), *names],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-1] == backend
    return np.load(path)


def check_equal(backend, names, folder):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    want = run("tensorflow", folder / "tensorflow.npz", names)
    got = run(backend, folder / f"{backend}.npz", names)
    assert set(want) == set(got) and len(want) > 0
    for name, value in want.items():
        largest = np.abs(value).max()
        assert np.isfinite(largest) and largest > 1e-3, name
        assert np.abs(got[name] - value).max() < 1e-4 * largest, name


def test_jax_equals_tensorflow(tmp_path):
    check_equal("jax", ["layers", "resnest14_tiny", "resnet18"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", ["layers", *VARIANTS])
def test_every_network_on_every_backend(backend, name, tmp_path):
    check_equal(backend, [name], tmp_path)
