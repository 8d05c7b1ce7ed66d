"""Overlap of bounding boxes."""

import numpy as np
from keras import ops

EPSILON = 1e-7  # smallest area that divides


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


def pairwise_diou(boxes1, boxes2):
    """Returns the distance IoU (DIoU) of every pair of two sets of boxes; see `pairwise_iou`.

    The squared distance of the centers, relative to the diagonal of the smallest enclosing box,
    is subtracted: values are in [-1, 1].

    Source: Zheng et al., "Distance-IoU Loss", arXiv 1911.08287, eq. 7.
    """
    xp = np if isinstance(boxes1, np.ndarray) and isinstance(boxes2, np.ndarray) else ops
    distance = diagonal = 0.0
    for low, high in ((0, 2), (1, 3)):
        low1, high1 = (xp.expand_dims(boxes1[..., i], -1) for i in (low, high))  # M x 1
        low2, high2 = (xp.expand_dims(boxes2[..., i], -2) for i in (low, high))  # 1 x N
        distance += xp.square((low1 + high1 - low2 - high2) / 2)
        diagonal += xp.square(xp.maximum(high1, high2) - xp.minimum(low1, low2))
    return pairwise_iou(boxes1, boxes2) - distance / xp.maximum(diagonal, EPSILON)


def paired_iou(boxes1, boxes2, generalized: bool = False):
    """Returns the IoU of each box with its counterpart, with gradients.

    Args:
        boxes1: `"xyxy"` boxes of shape `(..., 4)`.
        boxes2: `"xyxy"` boxes of shape `(..., 4)` in the same unit.
        generalized: whether the part of the smallest enclosing box that neither box covers is
            subtracted (GIoU). Boxes that do not overlap then have a gradient too.

    Returns:
        Tensor of shape `(...)` with values in [0, 1], or in [-1, 1] if `generalized`. Boxes
        without area are finite.

    Example:
        >>> paired_iou(ops.array([[0.0, 0, 2, 2]]), ops.array([[1.0, 1, 3, 3]]), generalized=True)
        array([-0.07936508])  # 1 / 7 - 2 / 9

    Source: Rezatofighi et al., "Generalized Intersection over Union", arXiv 1902.09630, alg. 1.
    """
    top_left1, bottom_right1, top_left2, bottom_right2 = (
        x for boxes in (boxes1, boxes2) for x in (boxes[..., :2], boxes[..., 2:])
    )
    overlap = ops.minimum(bottom_right1, bottom_right2) - ops.maximum(top_left1, top_left2)
    intersection = _area(overlap)
    union = _area(bottom_right1 - top_left1) + _area(bottom_right2 - top_left2) - intersection
    iou = intersection / ops.maximum(union, EPSILON)
    if not generalized:
        return iou
    hull = ops.maximum(bottom_right1, bottom_right2) - ops.minimum(top_left1, top_left2)
    hull = ops.maximum(_area(hull), EPSILON)
    return iou - (hull - ops.minimum(union, hull)) / hull


def _area(sizes):
    sizes = ops.maximum(sizes, 0.0)
    return sizes[..., 0] * sizes[..., 1]
