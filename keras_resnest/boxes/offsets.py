"""Offsets between boxes and anchors: the regression targets of a detector.

Boxes and anchors are `"xyxy"` in any one unit, pixels or fractions.
"""

import numpy as np
from keras import ops

VARIANCES = (0.1, 0.2)  # of centers and of log sizes (SSD, RefineDet)

# exp(4.135) = 62.5: no box grows beyond 62.5 times its anchor, so that an
# untrained or diverging network cannot produce infinite boxes.
MAX_LOG_SIZE_RATIO = float(np.log(1000.0 / 16.0))


def center_form(boxes):
    """`"xyxy"` (..., 4) to centers (..., 2) and sizes (..., 2)."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return (top_left + bottom_right) / 2.0, bottom_right - top_left


def corner_form(centers, sizes):
    """Centers (..., 2) and sizes (..., 2) to `"xyxy"` (..., 4)."""
    half = sizes / 2.0
    return ops.concatenate([centers - half, centers + half], axis=-1)


def encode_boxes(boxes, anchors, variances=VARIANCES, epsilon: float = 1e-5):
    """Offsets that turn anchors into boxes (the regression targets).

    `((center - anchor_center) / (v0 * anchor_size), log(size / anchor_size + epsilon) / v1)`,
    SSD paper eq. 2 with the variances of its code.

    Args:
        boxes: `"xyxy"`, shape (..., 4).
        anchors: `"xyxy"`, shape (..., 4), broadcast against `boxes`.
        variances: scale of center offsets and of log sizes.
        epsilon: added inside the logarithm, as the reference implementation
            does, so that a box without area stays finite; relative error 1e-5.

    Returns:
        Tensor of shape (..., 4): dx, dy, dw, dh.
    """
    centers, sizes = center_form(boxes)
    anchor_centers, anchor_sizes = center_form(anchors)
    # A refined anchor may have collapsed; its size is a divisor here.
    anchor_sizes = ops.maximum(anchor_sizes, 1e-6)
    offsets = (centers - anchor_centers) / (variances[0] * anchor_sizes)
    log_sizes = ops.log(ops.maximum(sizes, 0.0) / anchor_sizes + epsilon) / variances[1]
    return ops.concatenate([offsets, log_sizes], axis=-1)


def decode_boxes(offsets, anchors, variances=VARIANCES):
    """Applies predicted offsets to anchors; the inverse of `encode_boxes`.

    Args:
        offsets: dx, dy, dw, dh, shape (..., 4).
        anchors: `"xyxy"`, shape (..., 4), broadcast against `offsets`.
        variances: as in `encode_boxes`.

    Returns:
        `"xyxy"` boxes, shape (..., 4), in the unit of the anchors, not clipped.
    """
    anchor_centers, anchor_sizes = center_form(anchors)
    centers = anchor_centers + offsets[..., :2] * variances[0] * anchor_sizes
    log_sizes = ops.minimum(offsets[..., 2:] * variances[1], MAX_LOG_SIZE_RATIO)
    return corner_form(centers, anchor_sizes * ops.exp(log_sizes))
