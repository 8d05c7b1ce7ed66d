"""The detector on JAX and PyTorch, in their own process: trains, predicts as on TensorFlow."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import aligned_detector, rectangles
from exported_models import AWARE

from keras_resnest.detection.decoding import DetectionDecoder

DECODERS = {
    "soft": {
        **AWARE,
        "suppression": "soft",
        "class_agnostic": True,
        "alpha": 0.7,
        "voting_iou": 0.6,
        "exclusive_classes": True,
    }
}
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


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("training", [[], pytest.param(["train"], marks=SLOW)])
def test_predicts_as_on_tensorflow_and_trains(training, backend, tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("compares with the TensorFlow backend")
    model = aligned_detector((64, 64, 3), heads={"predict_iou": True})
    images, truth = rectangles(2, (64, 64, 3), objects=1)
    want = model.predict(images, verbose=0)
    model.save(tmp_path / "detector.keras")
    np.save(tmp_path / "images.npy", images)
    np.savez(tmp_path / "truth.npz", **truth)
    raw = {name: value.numpy() for name, value in model(images, training=False).items()}
    np.savez(tmp_path / "raw.npz", **raw)
    wants = {"predicted": want}
    for name, settings in DECODERS.items():
        model.decoder = DetectionDecoder(**settings)
        wants[name] = model.predict(images, verbose=0)
        assert (wants[name]["num_detections"] > 2).all()
    run(backend, "backend_detector.py", str(tmp_path), json.dumps(DECODERS), *training)
    for name, want in wants.items():
        got = np.load(tmp_path / f"{name}.npz")
        for output, value in want.items():
            atol = 1e-2 if output == "boxes" else 1e-4
            np.testing.assert_allclose(got[output], value, atol=atol, err_msg=name)


@SLOW  # XLA compiles the training step for minutes
def test_data_parallel_devices_train_as_one():
    run("jax", "jax_data_parallel.py", xla_flags="--xla_force_host_platform_device_count=2")
