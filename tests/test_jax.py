"""The detector on the JAX backend, in its own process: it trains, and predicts as on TensorFlow."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from detectors import rectangles, small_detector

PROGRAM = """
import sys
import keras, numpy as np, tensorflow as tf
import keras_resnest
folder = sys.argv[1]
assert keras.backend.backend() == "jax"
model = keras.saving.load_model(folder + "/detector.keras")
images = np.load(folder + "/images.npy")
predicted = model.predict(images, verbose=0)
np.savez(folder + "/predicted.npz", **predicted)
# The same images in a batch of tf.data, with an own prediction as ground truth.
assert predicted["num_detections"].min() > 0
truth = {"boxes": predicted["boxes"][:, :1], "labels": predicted["labels"][:, :1]}
batches = tf.data.Dataset.from_tensors({"images": images, "bounding_boxes": truth})
pair = keras_resnest.evaluation.collect_detections(model, batches)
for n, (given, found) in enumerate(zip(*pair, strict=True)):
    np.testing.assert_array_equal(given["boxes"], truth["boxes"][n])
    count = predicted["num_detections"][n]
    np.testing.assert_allclose(found["boxes"], predicted["boxes"][n, :count])
assert len(pair[0]) == len(images)
if len(sys.argv) > 2:
    # Step by step: XLA would compile for longer than the rest takes.
    model.compile(keras.optimizers.SGD(1e-3, global_clipnorm=10.0), jit_compile=False)
    truth = dict(np.load(folder + "/truth.npz"))
    logs = model.fit(images, truth, batch_size=2, epochs=2, verbose=0).history
    assert np.isfinite(logs["loss"]).all() and logs["loss"][1] < logs["loss"][0], logs
"""


@pytest.mark.parametrize("training", [[], pytest.param(["train"], marks=pytest.mark.slow)])
def test_predicts_as_on_tensorflow_and_trains(training, tmp_path):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("compares with the TensorFlow backend")
    model = small_detector((64, 64, 3))
    images, truth = rectangles(2, (64, 64, 3), objects=1)
    want = model.predict(images, verbose=0)
    model.save(tmp_path / "detector.keras")
    np.save(tmp_path / "images.npy", images)
    np.savez(tmp_path / "truth.npz", **truth)
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *training],
        check=True,
        env=environment,
        cwd=Path(__file__).parent,
    )
    got = np.load(tmp_path / "predicted.npz")
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=1e-2 if name == "boxes" else 1e-4)


DATA_PARALLEL = """
import sys
import keras, numpy as np
from detectors import rectangles, small_detector
images, truth = rectangles(8, (64, 128, 3))
truth["labels"][2:4] = -1  # what one of the devices gets in the first step has no object
weights = []
for devices in (None, ["cpu:0", "cpu:1"]):
    if devices:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    model = small_detector((64, 128, 3), freeze_batch_norm=True)
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9, global_clipnorm=10.0))
    model.fit(images, truth, batch_size=4, shuffle=False, verbose=0)
    kernel = model.trainable_weights[0].value
    assert len(kernel.devices()) == (2 if devices else 1)
    weights.append(model.get_weights())
difference = max(np.abs(a - b).max() for a, b in zip(*weights))
moved = np.abs(weights[0][0] - small_detector((64, 128, 3)).get_weights()[0]).max()
assert moved > 1e-6
assert difference < 1e-5, difference
"""


@pytest.mark.slow  # XLA compiles the training step for minutes
def test_data_parallel_devices_train_as_one():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-c", DATA_PARALLEL]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
