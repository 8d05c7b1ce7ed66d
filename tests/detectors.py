"""A detector small enough to be trained inside a test, and images for it."""

import keras
import numpy as np

from keras_resnest.backbones import ResNet
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.heads import RefineDetHeads
from keras_resnest.detection.loss import RefineDetLoss
from keras_resnest.detection.refinedet import RefineDet

CLASS_NAMES = ["red", "green", "blue"]
# The heads of a detector that is trained from random weights. Without either, as the small detector
# is built, TensorFlow traces a training step in about two thirds of the time.
WHOLE = {"use_batch_norm": True, "use_transfer_connection": True}


def small_backbone(name="small", **kwargs):
    return ResNet(
        stackwise_num_filters=[8, 16, 16, 16],
        stackwise_num_blocks=[1, 1, 1, 1],
        block_type="basic",
        include_top=False,
        include_rescaling=True,
        image_shape=(None, None, 3),
        name=name,
        **kwargs,
    )


def small_detector(image_shape=(64, 128, 3), heads=None, switches=None, **kwargs):
    """`heads` are arguments of `RefineDetHeads`, `switches` of loss and decoder alike."""
    keras.utils.set_random_seed(1)
    heads = {"filters": 16, "use_transfer_connection": False, **(heads or {})}
    options = {
        "backbone": small_backbone(),
        "heads": RefineDetHeads(**heads),
        "detection_loss": RefineDetLoss(**(switches or {})),
        "decoder": DetectionDecoder(**(switches or {})),
        "anchor_generator": AnchorGenerator(sizes=(16, 32, 64, 128)),
        "class_names": CLASS_NAMES,
        **kwargs,
    }
    return RefineDet(3, image_shape=image_shape, **options)


def aligned_detector(image_shape=(64, 128, 3), heads=None, **kwargs):
    """RefineDet++ with a random ODM, so that every output depends on where it is read."""
    model = small_detector(image_shape, {**WHOLE, "use_alignment": True, **(heads or {})}, **kwargs)
    rng = np.random.default_rng(0)
    odm = model.get_layer("odm")
    odm.set_weights([rng.normal(size=w.shape) / 10 for w in odm.weights])
    return model


def rectangles(count, image_shape=(64, 128, 3), seed=0, objects=2):
    """Gray noise with one-colored rectangles; labels are the colors of CLASS_NAMES."""
    rng = np.random.default_rng(seed)
    height, width, _ = image_shape
    images = rng.integers(90, 130, (count, *image_shape)).astype("float32")
    boxes, labels = np.zeros((count, objects, 4), "float32"), np.full((count, objects), -1, "int32")
    for i in range(count):
        for j in range(objects):
            w, h = rng.integers(14, 40, 2)
            x = rng.integers(j * width // objects, max((j + 1) * width // objects - w, 1) + 1)
            x, y = min(x, width - w), rng.integers(0, height - h)
            label = rng.integers(0, 3)
            images[i, y : y + h, x : x + w] = np.eye(3)[label] * 220
            boxes[i, j], labels[i, j] = (x, y, x + w, y + h), label
    return images, {"boxes": boxes, "labels": labels}
