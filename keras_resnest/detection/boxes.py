"""Box arithmetic: pairwise IoU, centre form, encoding against anchors.

Pure functions of arrays. Boxes are `"xyxy"` (left, top, right, bottom) in any
one unit, pixels or fractions, unless a name says otherwise. Formats other than
`"xyxy"` are converted at the border by `convert_boxes`.
"""

import keras
import numpy as np
from keras import ops

BOX_FORMATS = (
    "xyxy",
    "yxyx",
    "xywh",
    "center_xywh",
    "center_yxhw",
    "rel_xyxy",
    "rel_yxyx",
    "rel_xywh",
    "rel_center_xywh",
)

VARIANCES = (0.1, 0.2)  # of centres and of log sizes (SSD, RefineDet)

# exp(4.135) = 62.5: no box grows beyond 62.5 times its anchor, so that an
# untrained or diverging network cannot produce infinite boxes.
MAX_LOG_SIZE_RATIO = float(np.log(1000.0 / 16.0))


def check_box_format(bounding_box_format: str) -> str:
    """Returns the format in lower case; `ValueError` if it is not one of `BOX_FORMATS`."""
    name = str(bounding_box_format).lower()
    if name not in BOX_FORMATS:
        raise ValueError(
            f"`bounding_box_format` must be one of {', '.join(BOX_FORMATS)}. "
            f"Received: bounding_box_format={bounding_box_format!r}"
        )
    return name


def convert_boxes(boxes, source: str, target: str, height: int, width: int):
    """Converts boxes of shape (..., 4) between two of `BOX_FORMATS`.

    Args:
        boxes: tensor or array, shape (..., 4).
        source: format of `boxes`.
        target: wanted format.
        height: picture height in pixels, used by the `rel_*` formats.
        width: picture width in pixels.

    Returns:
        float32 tensor, shape (..., 4).
    """
    source, target = check_box_format(source), check_box_format(target)
    if source == target:
        return ops.cast(boxes, "float32")
    return keras.utils.bounding_boxes.convert_format(
        boxes, source=source, target=target, height=height, width=width
    )


def scale_boxes(boxes, bounding_box_format: str, scale_x, scale_y):
    """Moves boxes to a picture of another size.

    Args:
        boxes: shape (..., 4).
        bounding_box_format: format of `boxes`; `rel_*` boxes do not change.
        scale_x: new width over old width; a number, or a tensor of shape (...).
        scale_y: new height over old height, likewise.

    Returns:
        Boxes of the same shape and format.
    """
    name = check_box_format(bounding_box_format)
    if name.startswith("rel_"):
        return boxes
    x_first = name in ("xyxy", "xywh", "center_xywh")
    pair = (scale_x, scale_y) if x_first else (scale_y, scale_x)
    return ops.multiply(boxes, ops.stack([*pair, *pair], axis=-1))


def center_form(boxes):
    """`"xyxy"` (..., 4) to centres (..., 2) and sizes (..., 2)."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return (top_left + bottom_right) / 2.0, bottom_right - top_left


def corner_form(centers, sizes):
    """Centres (..., 2) and sizes (..., 2) to `"xyxy"` (..., 4)."""
    half = sizes / 2.0
    return ops.concatenate([centers - half, centers + half], axis=-1)


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


def encode_boxes(boxes, anchors, variances=VARIANCES, epsilon: float = 1e-5):
    """Offsets that turn anchors into boxes (the regression targets).

    `((center - anchor_center) / (v0 * anchor_size), log(size / anchor_size + epsilon) / v1)`,
    SSD paper eq. 2 with the variances of its code.

    Args:
        boxes: `"xyxy"`, shape (..., 4).
        anchors: `"xyxy"`, shape (..., 4), broadcast against `boxes`.
        variances: scale of centre offsets and of log sizes.
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


def clip_boxes(boxes, height: int, width: int):
    """Clips `"xyxy"` boxes (..., 4) in pixels to a picture of the given size."""
    limits = ops.convert_to_tensor([width, height, width, height], dtype=boxes.dtype)
    return ops.clip(boxes, 0.0, limits)
