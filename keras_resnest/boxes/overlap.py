"""Overlap of boxes, `"xyxy"` in any one unit."""

from keras import ops


def pairwise_iou(boxes1, boxes2):
    """Intersection over union of every box of one set with every box of another.

    Args:
        boxes1: `"xyxy"`, shape (..., M, 4).
        boxes2: `"xyxy"`, shape (..., A, 4); leading axes broadcast.

    Returns:
        Tensor of shape (..., M, A), values in [0, 1]. A box without area has
        IoU 0 with everything.
    """
    # One coordinate at a time: (M, A) arrays only, never (M, A, 4).
    left1, top1, right1, bottom1 = (ops.expand_dims(boxes1[..., i], -1) for i in range(4))
    left2, top2, right2, bottom2 = (ops.expand_dims(boxes2[..., i], -2) for i in range(4))
    width = ops.minimum(right1, right2) - ops.maximum(left1, left2)
    height = ops.minimum(bottom1, bottom2) - ops.maximum(top1, top2)
    intersection = ops.maximum(width, 0.0) * ops.maximum(height, 0.0)
    area1 = ops.maximum(right1 - left1, 0.0) * ops.maximum(bottom1 - top1, 0.0)
    area2 = ops.maximum(right2 - left2, 0.0) * ops.maximum(bottom2 - top2, 0.0)
    union = area1 + area2 - intersection
    return ops.where(intersection > 0.0, intersection / ops.where(union > 0.0, union, 1.0), 0.0)
