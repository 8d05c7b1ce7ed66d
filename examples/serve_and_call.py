"""Export a detector, call the export, and compare it with the model.

    python examples/serve_and_call.py runs/train/detector.keras photo.jpg
    python examples/serve_and_call.py runs/train/detector.keras photo.jpg --url http://localhost:8501

The second command also calls a server that runs the export:

    docker run -p 8501:8501 -e MODEL_NAME=detector -e TF_ONEDNN_ASSUME_FROZEN_WEIGHTS=1 \\
        -v "$PWD/serving/detector:/models/detector" tensorflow/serving
"""

import argparse
import base64
import json
import urllib.request
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_resnest as kr  # noqa: F401 (registers the detector with Keras)


def call_server(url: str, encoded: bytes) -> dict:
    """Sends an encoded image to TensorFlow Serving and returns the detections."""
    instance = {"image_bytes": {"b64": base64.b64encode(encoded).decode()}}
    body = json.dumps({"signature_name": "serve_bytes", "instances": [instance]}).encode()
    with urllib.request.urlopen(f"{url}/v1/models/detector:predict", body) as response:
        return json.load(response)["predictions"][0]


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
    parser.add_argument("--url", help="TensorFlow Serving's REST interface")
    arguments = parser.parse_args()

    model = keras.saving.load_model(arguments.model)
    model.export(arguments.output)
    found = model.detect(arguments.image, confidence_threshold=0.3)
    show("The Keras model:", found["boxes"], found["confidence"], found["labels"])

    # The export needs only TensorFlow. Boxes are in pixels of the image.
    serve_bytes = tf.saved_model.load(str(arguments.output)).signatures["serve_bytes"]
    encoded = arguments.image.read_bytes()
    served = serve_bytes(image_bytes=tf.constant([encoded]))
    served = {name: value.numpy()[0] for name, value in served.items()}
    show("The SavedModel:", served["boxes"], served["confidence"], served["labels"])

    count = len(found["labels"])
    np.testing.assert_allclose(served["boxes"][:count], found["boxes"], atol=0.05)
    np.testing.assert_allclose(served["confidence"][:count], found["confidence"], atol=1e-3)
    print("Both find the same objects.")

    if arguments.url:
        answer = call_server(arguments.url, encoded)
        show("The server:", answer["boxes"], answer["confidence"], answer["labels"])


if __name__ == "__main__":
    main()
