"""Tries to export on JAX or PyTorch; a sentence must say why that is impossible."""

import pathlib
import sys

import keras

from keras_resnest.serving import export_model

backend = keras.backend.backend()
model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(2.0)])
for format, name in (("tf_saved_model", "1"), ("onnx", "model.onnx"), ("litert", "model.tflite")):
    try:
        export_model(model, pathlib.Path(sys.argv[1]) / name, format=format)
    except ValueError as error:
        message = str(error)
        assert f"backend={backend!r}" in message and "KERAS_BACKEND=tensorflow" in message, message
    else:
        raise AssertionError("exported")
print("refused")
