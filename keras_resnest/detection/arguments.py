"""Checks of the arguments of `RefineDet`."""

import keras
import numpy as np

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.checks import check_class_names
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.heads import STRIDES, RefineDetHeads
from keras_resnest.detection.loss import RefineDetLoss


def check_classes(num_classes, class_names) -> tuple[int, list[str] | None]:
    if num_classes is None and class_names is not None:
        num_classes = len(class_names)
    if not isinstance(num_classes, int | np.integer) or num_classes < 1:
        raise ValueError(
            "`num_classes` must be a positive integer, or `class_names` given. "
            f"Received: num_classes={num_classes!r}"
        )
    names = None if class_names is None else check_class_names(class_names, int(num_classes))
    return int(num_classes), names


def check_channels_last() -> None:
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            'RefineDet is channels_last: call keras.config.set_image_data_format("channels_last")'
        )


def check_anchor_generator(anchor_generator) -> AnchorGenerator:
    anchor_generator = anchor_generator or AnchorGenerator()
    if anchor_generator.strides != STRIDES:
        raise ValueError(
            f"`anchor_generator` must have the strides of the feature maps, {STRIDES}. "
            f"Received: strides={anchor_generator.strides}"
        )
    return anchor_generator


def check_parts(heads, detection_loss, decoder) -> tuple:
    """The parts of a detector, by default new ones, checked against each other."""
    heads = heads or RefineDetHeads()
    detection_loss = detection_loss or RefineDetLoss()
    decoder = decoder or DetectionDecoder()
    check_same_offsets(detection_loss, decoder)
    check_alignment(heads, detection_loss)
    return heads, detection_loss, decoder


def check_same_offsets(detection_loss: RefineDetLoss, decoder: DetectionDecoder) -> None:
    """Training and decoding must interpret offsets in the same way."""
    for name in ("two_step_regression", "variances"):
        trained, decoded = getattr(detection_loss, name), getattr(decoder, name)
        if trained != decoded:
            raise ValueError(
                f"`detection_loss` and `decoder` must have the same `{name}`. "
                f"Received: {trained} and {decoded}"
            )


def check_alignment(heads: RefineDetHeads, detection_loss: RefineDetLoss) -> None:
    if heads.use_alignment and not detection_loss.two_step_regression:
        raise ValueError(
            "`heads` with use_alignment=True read refined anchors, which the loss and the decoder "
            "must then move on. Received: two_step_regression=False"
        )
