"""Overlap of bounding boxes."""

import numpy as np
from keras import ops


def pairwise_iou(boxes1, boxes2):
    """Returns the intersection over union (IoU) of every pair of two sets of boxes.

    NumPy arrays are computed with NumPy, everything else with `keras.ops`.

    Args:
        boxes1: `"xyxy"` boxes of shape `(..., M, 4)`.
        boxes2: `"xyxy"` boxes of shape `(..., N, 4)` in the same unit; the leading axes
            broadcast.

    Returns:
        Array or tensor of shape `(..., M, N)` with values in [0, 1]. A box without area has
        IoU 0 with every box.

    Example:
        >>> pairwise_iou(np.array([[0, 0, 2, 2]]), np.array([[0, 0, 2, 1], [1, 1, 3, 3]]))
        array([[0.5       , 0.14285714]])
    """
    xp = np if isinstance(boxes1, np.ndarray) and isinstance(boxes2, np.ndarray) else ops
    # One coordinate at a time, so that no array of shape (..., M, N, 4) is needed.
    left1, top1, right1, bottom1 = (xp.expand_dims(boxes1[..., i], -1) for i in range(4))  # M x 1
    left2, top2, right2, bottom2 = (xp.expand_dims(boxes2[..., i], -2) for i in range(4))  # 1 x N
    width = xp.maximum(xp.minimum(right1, right2) - xp.maximum(left1, left2), 0)
    height = xp.maximum(xp.minimum(bottom1, bottom2) - xp.maximum(top1, top2), 0)
    intersection = width * height
    area1 = xp.maximum(right1 - left1, 0) * xp.maximum(bottom1 - top1, 0)
    area2 = xp.maximum(right2 - left2, 0) * xp.maximum(bottom2 - top2, 0)
    union = area1 + area2 - intersection
    return xp.where(intersection > 0, intersection / xp.where(union > 0, union, 1), 0)
