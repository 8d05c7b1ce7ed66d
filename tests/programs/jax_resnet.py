"""Outputs of a small ResNet on JAX: `jax_resnet.py FOLDER OPTIONS` (JSON)."""

import json
import sys
from pathlib import Path

import jax
import keras
import numpy as np

from keras_resnest.backbones import ResNet

folder = Path(sys.argv[1])
x = np.load(folder / "pixels.npy")
model = ResNet(**json.loads(sys.argv[2]))
model.load_weights(folder / "small.weights.h5")
np.save(folder / "outputs.npy", jax.jit(model.call)(x))
training = jax.jit(lambda x: model.call(x, training=True))(x)
assert np.isfinite(training).all()
print(keras.backend.backend())
