"""Small models and their SavedModels, exported once per process for all serving tests."""

import atexit
import functools
import io
import shutil
import tempfile
from pathlib import Path

import keras
import numpy as np
from detectors import WHOLE, aligned_detector, small_detector

from keras_resnest.backbones import create_backbone
from keras_resnest.detection.decoding import DetectionDecoder

# So few detections that random weights leave no near ties, and all lists end with padding.
THRESHOLDS = {"blue": 0.92, "red": 0.9, "green": 0.96}
DECODER = DetectionDecoder(confidence_threshold=THRESHOLDS, max_detections=40)
DIOU = DetectionDecoder(
    confidence_threshold=0.9,
    iou_threshold=0.1,
    max_detections=40,
    suppression="diou",
    exclusive_classes=True,
)
# Random weights that predict the IoU: here too without near ties.
AWARE = {"iou_threshold": 0.1, "max_detections": 40}
AWARE["confidence_threshold"] = {"red": 0.65, "green": 0.7, "blue": 0.66}

# kind: (name of the model, options of its export)
KINDS = {
    "detector": ("detector", {}),
    "frozen": ("detector", {"freeze": True}),
    "bfloat16": ("detector", {"precision": "bfloat16"}),
    "relative": ("relative", {}),
    "aware": ("aware", {}),
    "classifier": ("classifier", {"image_shape": (64, 64, 3)}),
}
BUILDERS = {
    "detector": lambda: small_detector(heads=WHOLE, decoder=DECODER),
    "relative": lambda: aligned_detector(
        (128, 64, 3), decoder=DIOU, bounding_box_format="rel_yxyx", class_names=None
    ),
    "aware": lambda: small_detector(
        heads={**WHOLE, "predict_iou": True},
        decoder=DetectionDecoder(suppression="soft", class_agnostic=True, voting_iou=0.6, **AWARE),
    ),
    "aligned": lambda: aligned_detector(decoder=DIOU),
    "classifier": lambda: create_backbone("resnest14_tiny", include_top=True, classes=3),
}


@functools.cache
def _build(name):
    keras.utils.set_random_seed(1)
    return BUILDERS[name]()


def model_of(kind):
    return _build(KINDS[kind][0] if kind in KINDS else kind)


@functools.cache
def saved_model(kind) -> Path:
    """Returns the folder of an exported model, which must not be changed."""
    folder = Path(tempfile.mkdtemp(prefix="saved_model_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model_of(kind).export(folder / "1", **KINDS[kind][1])
    return folder / "1"


@functools.cache
def load(kind):
    import tensorflow as tf

    return tf.saved_model.load(str(saved_model(kind)))


def encode(image, image_format, mode=None, **options) -> bytes:
    """Encodes an array or a Pillow image."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.astype("uint8"))
    stream = io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, image_format, **options)
    return stream.getvalue()


def with_alpha(image, alpha=None):
    """Adds a channel: constant, or clear at the left and opaque at the right."""
    ramp = np.linspace(0, 255, image.shape[1]).round() if alpha is None else alpha
    return np.dstack([image, np.broadcast_to(ramp, image.shape[:2]).astype("uint8")])
