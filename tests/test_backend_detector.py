"""The detector on JAX and PyTorch, in their own process: trains, predicts as on TensorFlow."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import aligned_detector, rectangles, small_detector
from exported_models import DECODER

PROGRAMS = Path(__file__).parent / "programs"
SLOW = pytest.mark.slow


def run(backend, program, *arguments, xla_flags="--xla_backend_optimization_level=0"):
    """Run a program. Without XLA's optimizations, compiling takes far less time."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    environment = {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / program), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def few_detections(image_shape):
    return aligned_detector(image_shape, decoder=DECODER)


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("training", [[], pytest.param(["train"], marks=SLOW)])
@pytest.mark.parametrize("make", [small_detector, pytest.param(few_detections, marks=SLOW)])
def test_predicts_as_on_tensorflow_and_trains(make, training, backend, tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("compares with the TensorFlow backend")
    model = make((64, 64, 3))
    images, truth = rectangles(2, (64, 64, 3), objects=1)
    want = model.predict(images, verbose=0)
    model.save(tmp_path / "detector.keras")
    np.save(tmp_path / "images.npy", images)
    np.savez(tmp_path / "truth.npz", **truth)
    run(backend, "backend_detector.py", str(tmp_path), *training)
    got = np.load(tmp_path / "predicted.npz")
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-2 if name == "boxes" else 1e-4)


@SLOW  # XLA compiles the training step for minutes
def test_data_parallel_devices_train_as_one():
    run("jax", "jax_data_parallel.py", xla_flags="--xla_force_host_platform_device_count=2")
