"""Export a detector, call the export, and compare it with the model.

    python examples/serve_and_call.py runs/train/detector.keras photo.jpg

A server runs the export without Python, and `keras-resnest predict` calls it:

    docker run -p 8501:8501 -e MODEL_NAME=detector -e TF_ONEDNN_ASSUME_FROZEN_WEIGHTS=1 \\
        -v "$PWD/serving/detector:/models/detector" tensorflow/serving
    keras-resnest predict http://localhost:8501 photo.jpg
"""

import argparse
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_resnest as kr  # noqa: F401 (registers the detector with Keras)


def show(title: str, boxes, confidence, labels) -> None:
    print(title)
    for box, probability, label in zip(boxes, confidence, labels, strict=True):
        if label >= 0 and probability > 0.3:  # rows with label -1 are padding
            print(f"  class {label}, {probability:.2f}, box {np.round(box, 1).tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path, help="JPEG or PNG file")
    parser.add_argument("--output", type=Path, default=Path("serving/detector/1"))
    arguments = parser.parse_args()

    model = keras.saving.load_model(arguments.model)
    model.export(arguments.output)
    found = model.detect(arguments.image, confidence_threshold=0.3)
    show("The Keras model:", found["boxes"], found["confidence"], found["labels"])

    # The export needs only TensorFlow. Boxes are in pixels of the image.
    serve_bytes = tf.saved_model.load(str(arguments.output)).signatures["serve_bytes"]
    served = serve_bytes(image_bytes=tf.constant([arguments.image.read_bytes()]))
    served = {name: value.numpy()[0] for name, value in served.items()}
    show("The SavedModel:", served["boxes"], served["confidence"], served["labels"])

    count = len(found["labels"])
    np.testing.assert_allclose(served["boxes"][:count], found["boxes"], atol=0.05)
    np.testing.assert_allclose(served["confidence"][:count], found["confidence"], atol=1e-3)
    print("Both find the same objects.")


if __name__ == "__main__":
    main()
