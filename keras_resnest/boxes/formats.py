"""Bounding box formats: validation, conversion, scaling and clipping.

Inside the package, boxes are `"xyxy"` (left, top, right, bottom) in pixels. User-facing code
converts other formats once, with `convert_boxes`.
"""

import keras
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


def check_box_format(bounding_box_format: str) -> str:
    """Returns the format in lower case. Raises ValueError if it is not in `BOX_FORMATS`."""
    name = str(bounding_box_format).lower()
    if name not in BOX_FORMATS:
        raise ValueError(
            f"`bounding_box_format` must be one of {', '.join(BOX_FORMATS)}. "
            f"Received: bounding_box_format={bounding_box_format!r}"
        )
    return name


def convert_boxes(boxes, source: str, target: str, height: int, width: int):
    """Converts boxes from one of `BOX_FORMATS` to another.

    Args:
        boxes: tensor or array of shape `(..., 4)`.
        source: format of `boxes`.
        target: format of the result.
        height: image height in pixels, used by the `rel_*` formats.
        width: image width in pixels.

    Returns:
        float32 tensor of shape `(..., 4)`.
    """
    source, target = check_box_format(source), check_box_format(target)
    if source == target:
        return ops.cast(boxes, "float32")
    return keras.utils.bounding_boxes.convert_format(
        boxes, source=source, target=target, height=height, width=width
    )


def scale_boxes(boxes, bounding_box_format: str, scale_x, scale_y):
    """Scales boxes to a resized image.

    Args:
        boxes: tensor or array of shape `(..., 4)`.
        bounding_box_format: format of `boxes`. `rel_*` boxes do not change.
        scale_x: new width divided by old width, a number or a tensor of shape `(...)`.
        scale_y: new height divided by old height, likewise.

    Returns:
        Boxes of the same shape and format.
    """
    name = check_box_format(bounding_box_format)
    if name.startswith("rel_"):
        return boxes
    x_first = name in ("xyxy", "xywh", "center_xywh")
    pair = (scale_x, scale_y) if x_first else (scale_y, scale_x)
    return ops.multiply(boxes, ops.stack([*pair, *pair], axis=-1))


def clip_boxes(boxes, height: int, width: int):
    """Clips `"xyxy"` pixel boxes of shape `(..., 4)` to an image."""
    limits = ops.convert_to_tensor([width, height, width, height], dtype=boxes.dtype)
    return ops.clip(boxes, 0.0, limits)
