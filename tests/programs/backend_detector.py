"""Predict with a saved detector on another backend, and with a third argument train it.

KERAS_BACKEND=jax python backend_detector.py FOLDER DECODERS [train]

Reads detector.keras, images.npy, raw.npz (outputs) and truth.npz of FOLDER, writes predicted.npz,
and NAME.npz for each of DECODERS, JSON of settings by name.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_resnest as kr

folder = sys.argv[1]
model = keras.saving.load_model(folder + "/detector.keras")
images = np.load(folder + "/images.npy")
predicted = model.predict(images, verbose=0)
np.savez(folder + "/predicted.npz", **predicted)
default = model.decoder
raw = dict(np.load(folder + "/raw.npz"))
for name, settings in json.loads(sys.argv[2]).items():
    model.decoder = kr.detection.DetectionDecoder(**settings)
    found = {k: keras.ops.convert_to_numpy(v) for k, v in model.decode(raw).items()}
    np.savez(f"{folder}/{name}.npz", **found)
model.decoder = default
try:
    model.predict(images / 255.0, verbose=0)
except ValueError as error:
    assert "must be 0 to 255" in str(error)
else:
    raise AssertionError("images scaled to 0-1 were accepted")
# The same images in a batch of tf.data, with predictions as ground truth.
assert predicted["num_detections"].min() > 0
truth = {"boxes": predicted["boxes"][:, :1], "labels": predicted["labels"][:, :1]}
batches = tf.data.Dataset.from_tensors({"images": images, "bounding_boxes": truth})
pair = kr.evaluation.collect_detections(model, batches)
for n, (given, found) in enumerate(zip(*pair, strict=True)):
    np.testing.assert_array_equal(given["boxes"], truth["boxes"][n])
    count = predicted["num_detections"][n]
    np.testing.assert_allclose(found["boxes"], predicted["boxes"][n, :count])
assert len(pair[0]) == len(images)
if len(sys.argv) > 3:
    # Step by step: XLA would compile for longer than the rest takes.
    model.compile(keras.optimizers.SGD(1e-3, global_clipnorm=10.0), jit_compile=False)
    truth = dict(np.load(folder + "/truth.npz"))
    logs = model.fit(images, truth, batch_size=2, epochs=2, verbose=0).history
    assert np.isfinite(logs["loss"]).all() and logs["loss"][1] < logs["loss"][0], logs
