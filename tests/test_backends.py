"""The networks, the detector and their tools on JAX and PyTorch, as on TensorFlow.

One process of each backend runs several programs of `tests/programs`. `pytest -m slow` compares all
networks and trains.
"""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import aligned_detector, rectangles
from exported_models import AWARE

from keras_resnest.backbones import VARIANTS
from keras_resnest.detection.decoding import DetectionDecoder

if keras.backend.backend() != "tensorflow":
    pytest.skip("other backends are compared with TensorFlow", allow_module_level=True)

PROGRAMS = Path(__file__).parent / "programs"
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
        ),
    )
    for name in ("jax", "torch")
]
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
SLOW = pytest.mark.slow


def run(backend, folder, *commands, xla_flags="--xla_backend_optimization_level=0"):
    """Returns what each program prints. Without XLA's optimizations, compiling is far faster."""
    environment = {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    commands = [json.dumps([str(part) for part in command]) for command in commands]
    done = subprocess.run(
        [sys.executable, PROGRAMS / "run_together.py", folder, *commands],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: path.read_text() for path in folder.glob("*.py.txt")}


def outputs_on_tensorflow(folder, *names):
    """Writes what `backend_outputs.py` writes, but in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["backend_outputs.py", str(folder / "want.npz"), *names])
        runpy.run_path(str(PROGRAMS / "backend_outputs.py"), run_name="__main__")


def check_outputs(folder, backend, printed):
    assert printed["backend_outputs.py"].split() == [backend], printed["backend_outputs.py"]
    want, got = np.load(folder / "want.npz"), np.load(folder / "got.npz")
    assert set(want) == set(got) and len(want) > 0
    for name, value in want.items():
        largest = np.abs(value).max()
        assert np.isfinite(largest) and largest > 1e-3, name
        assert np.abs(got[name] - value).max() < 1e-4 * largest, name


def predict_on_tensorflow(folder):
    """Writes a detector with images and ground truth; returns its detections by decoder."""
    model = aligned_detector((64, 64, 3), heads={"predict_iou": True})
    images, truth = rectangles(2, (64, 64, 3), objects=1)
    wants = {"predicted": model.predict(images, verbose=0)}
    model.save(folder / "detector.keras")
    np.save(folder / "images.npy", images)
    np.savez(folder / "truth.npz", **truth)
    raw = {name: value.numpy() for name, value in model(images, training=False).items()}
    np.savez(folder / "raw.npz", **raw)
    for name, settings in DECODERS.items():
        model.decoder = DetectionDecoder(**settings)
        wants[name] = model.predict(images, verbose=0)
        assert (wants[name]["num_detections"] > 2).all()
    return wants


def check_predictions(folder, wants, printed):
    assert printed["backend_detector.py"] == "", printed["backend_detector.py"]
    for name, want in wants.items():
        got = np.load(folder / f"{name}.npz")
        for output, value in want.items():
            atol = 1e-2 if output == "boxes" else 1e-4
            np.testing.assert_allclose(got[output], value, atol=atol, err_msg=name)


@pytest.fixture(scope="module", params=BACKENDS)
def elsewhere(request, tmp_path_factory):
    """Backend, folder, detections on TensorFlow, and what each program prints."""
    folder = tmp_path_factory.mktemp(request.param)
    names = ("layers", "resnest14_tiny")
    outputs_on_tensorflow(folder, *names)
    wants = predict_on_tensorflow(folder)
    printed = run(
        request.param,
        folder,
        ("backend_outputs.py", folder / "got.npz", *names),
        ("backend_detector.py", folder, json.dumps(DECODERS)),
        ("count_operations.py",),
        ("diverging_training.py",),
        ("export_elsewhere.py", folder),
    )
    return request.param, folder, wants, printed


def test_layers_and_a_network_equal_tensorflow(elsewhere):
    backend, folder, _, printed = elsewhere
    check_outputs(folder, backend, printed)


def test_a_detector_predicts_as_on_tensorflow(elsewhere):
    _, folder, wants, printed = elsewhere
    check_predictions(folder, wants, printed)


def test_counting_does_not_depend_on_the_backend(elsewhere):
    assert int(elsewhere[3]["count_operations.py"]) == 16 * 6 * 9 * 2 + 4 * 6 * 9


def test_a_training_that_diverges_stops(elsewhere):
    printed = elsewhere[3]["diverging_training.py"]
    assert printed.startswith("Training stopped: `loss` or its gradient became NaN"), printed
    assert "at step 2 of epoch 1" in printed and "go back to the last checkpoint" in printed


def test_exports_are_refused(elsewhere):
    _, folder, _, printed = elsewhere
    assert printed["export_elsewhere.py"].strip() == "refused", printed["export_elsewhere.py"]
    assert not [path for path in folder.iterdir() if path.name.startswith(("1", "model"))]


@SLOW
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["layers", *VARIANTS])
def test_every_network_on_every_backend(backend, name, tmp_path):
    outputs_on_tensorflow(tmp_path, name)
    printed = run(backend, tmp_path, ("backend_outputs.py", tmp_path / "got.npz", name))
    check_outputs(tmp_path, backend, printed)


@SLOW
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_detector_trains_on_every_backend(backend, tmp_path):
    wants = predict_on_tensorflow(tmp_path)
    command = ("backend_detector.py", tmp_path, json.dumps(DECODERS), "train")
    check_predictions(tmp_path, wants, run(backend, tmp_path, command))


@SLOW  # XLA compiles the training step for minutes
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_data_parallel_devices_train_as_one(backend, tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    printed = run(backend, tmp_path, ("jax_data_parallel.py",), xla_flags=flags)
    assert printed == {"jax_data_parallel.py": ""}, printed
