"""Offsets between boxes and anchors: the regression targets of a detector.

Boxes and anchors are `"xyxy"`, both in pixels or both relative.
"""

import math
from collections.abc import Iterable

from keras import ops

from keras_resnest.checks import is_number

VARIANCES = (0.1, 0.2)  # of centers and log sizes (SSD, RefineDet)

# No box grows beyond 62.5 times its anchor, so untrained networks predict finite boxes.
MAX_LOG_SIZE_RATIO = math.log(1000.0 / 16.0)


def check_variances(variances) -> tuple[float, float]:
    """Returns variances as a tuple; raises `ValueError` unless they are two positive numbers."""
    pair = tuple(variances) if isinstance(variances, Iterable) else ()
    if len(pair) != 2 or not all(is_number(value) and value > 0 for value in pair):
        raise ValueError(f"`variances` must be two positive numbers. Received: {variances!r}")
    return pair


def center_form(boxes):
    """Converts `"xyxy"` boxes `(..., 4)` to centers `(..., 2)` and sizes `(..., 2)`."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return (top_left + bottom_right) / 2.0, bottom_right - top_left


def corner_form(centers, sizes):
    """Converts centers `(..., 2)` and sizes `(..., 2)` to `"xyxy"` boxes `(..., 4)`."""
    half = sizes / 2.0
    return ops.concatenate([centers - half, centers + half], axis=-1)


def encode_boxes(boxes, anchors, variances=VARIANCES, epsilon: float = 1e-5):
    """Returns the offsets that move anchors onto boxes.

    `((center - anchor_center) / (v0 * anchor_size), log(size / anchor_size + epsilon) / v1)`

    Args:
        boxes: `"xyxy"` boxes of shape `(..., 4)`.
        anchors: `"xyxy"` boxes of shape `(..., 4)`, broadcast against `boxes`.
        variances: divisors of the center offsets (v0) and of the log sizes (v1).
        epsilon: keeps boxes without area finite, as in the reference implementation.

    Returns:
        Tensor of shape `(..., 4)`: dx, dy, dw, dh.

    Source: SSD (arXiv 1512.02325) eq. 2, with the variances of its code.
    """
    boxes, anchors = ops.convert_to_tensor(boxes), ops.convert_to_tensor(anchors)
    centers, sizes = center_form(boxes)
    anchor_centers, anchor_sizes = center_form(anchors)
    # A refined anchor may have collapsed, and its size is a divisor here.
    anchor_sizes = ops.maximum(anchor_sizes, 1e-6)
    offsets = (centers - anchor_centers) / (variances[0] * anchor_sizes)
    log_sizes = ops.log(ops.maximum(sizes, 0.0) / anchor_sizes + epsilon) / variances[1]
    return ops.concatenate([offsets, log_sizes], axis=-1)


def decode_boxes(offsets, anchors, variances=VARIANCES):
    """Moves anchors by offsets. Inverts `encode_boxes`.

    Args:
        offsets: dx, dy, dw, dh of shape `(..., 4)`.
        anchors: `"xyxy"` boxes of shape `(..., 4)`, broadcast against `offsets`.
        variances: as in `encode_boxes`.

    Returns:
        `"xyxy"` boxes of shape `(..., 4)` in the unit of the anchors, not clipped.
    """
    offsets, anchors = ops.convert_to_tensor(offsets), ops.convert_to_tensor(anchors)
    anchor_centers, anchor_sizes = center_form(anchors)
    centers = anchor_centers + offsets[..., :2] * variances[0] * anchor_sizes
    log_sizes = ops.minimum(offsets[..., 2:] * variances[1], MAX_LOG_SIZE_RATIO)
    return corner_form(centers, anchor_sizes * ops.exp(log_sizes))
