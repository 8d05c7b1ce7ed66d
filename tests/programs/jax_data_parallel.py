"""Train on one JAX device and on two; the weights must be equal."""

import sys
from pathlib import Path

import keras
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from detectors import rectangles, small_detector

images, truth = rectangles(8, (64, 128, 3))
truth["labels"][2:4] = -1  # the share of one device in the first step has no objects
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
difference = max(np.abs(a - b).max() for a, b in zip(*weights, strict=True))
moved = np.abs(weights[0][0] - small_detector((64, 128, 3)).get_weights()[0]).max()
assert moved > 1e-6
assert difference < 1e-5, difference
