"""Checks of ground truth: what is declared is compared with what came, before training on it."""

from typing import Any

import numpy as np

from keras_resnest.boxes.formats import check_box_format


def check_ground_truth(
    boxes: Any,
    labels: Any,
    num_classes: int,
    image_size: tuple[int, int] | None = None,
    bounding_box_format: str = "xyxy",
    name: str = "bounding_boxes",
) -> None:
    """Raises an error where boxes and labels cannot be what they are said to be.

    Rows of padding (label -1) are not looked at. Boxes without area pass.

    Args:
        boxes: (M, 4) or (B, M, 4), in `bounding_box_format`; pixels, or parts of the picture (0 to
            1) for the formats that begin with "rel_".
        labels: (M,) or (B, M), integers 0 to `num_classes - 1`, or -1 for padding.
        num_classes: Number of classes, without background.
        image_size: (height, width) of the pictures in pixels; with it, boxes that lie wholly
            outside are found too.
        bounding_box_format: One of the formats of Keras: "xyxy", "yxyx", "xywh", "center_xywh",
            "center_yxhw", "rel_xyxy", "rel_yxyx", "rel_xywh", "rel_center_xywh".
        name: Name of the argument, for the messages.

    Raises:
        ValueError: Wrong shapes, NaN or infinite numbers, labels that are no integers or out of
            range, negative widths or heights, relative coordinates where pixels are declared and
            the other way round, boxes outside the picture.

    Example:

    >>> check_ground_truth([[10, 20, 50, 60]], [0], num_classes=3, image_size=(100, 100))
    """
    bounding_box_format = check_box_format(bounding_box_format)
    boxes, labels = _check_shapes(boxes, labels, name)
    _check_labels(labels, num_classes, name)
    used = labels != -1
    rows, boxes = np.argwhere(used), boxes[used]
    if not len(boxes):
        return

    def check(wrong, message):
        if np.any(wrong):
            first = int(np.argmax(wrong))
            place = "".join(f"[{index}]" for index in rows[first])
            raise ValueError(
                f'{name}["boxes"] {message}. Received: {boxes[first].tolist()} at boxes{place}, '
                f"declared as {bounding_box_format!r} ({np.count_nonzero(wrong)} such boxes)"
            )

    check(~np.isfinite(boxes).all(axis=1), "must be finite numbers")
    corners = _to_corners(boxes, bounding_box_format)
    _check_units(boxes, bounding_box_format, image_size, check)
    negative = (corners[:, 2:] < corners[:, :2]).any(axis=1)
    hint = " (are they xywh?)" if bounding_box_format.endswith(("xyxy", "yxyx")) else ""
    check(negative, f"must not have a negative width or height{hint}")
    if image_size is not None and not bounding_box_format.startswith("rel_"):
        # A pixel of tolerance: an augmentation may leave an empty box on the border.
        size = np.asarray([image_size[1], image_size[0]])
        outside = ((corners[:, :2] > size + 1) | (corners[:, 2:] < -1)).any(axis=1)
        check(outside, f"must lie in the picture of {size[0]} x {size[1]} (width x height) pixels")


def _check_shapes(boxes: Any, labels: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        boxes, labels = np.asarray(boxes, "float64"), np.asarray(labels, "float64")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must hold arrays of numbers, padded with label -1 to equal lengths. "
            f"Received: {error}"
        ) from error
    if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4:
        raise ValueError(
            f'{name}["boxes"] must have the shape (M, 4) or (B, M, 4). Received: {boxes.shape}'
        )
    if labels.shape != boxes.shape[:-1]:
        raise ValueError(
            f'{name}["labels"] must have one label for each box: the shape {boxes.shape[:-1]}. '
            f"Received: {labels.shape}"
        )
    return boxes, labels


def _check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    wrong = ~np.isin(labels, np.arange(-1, num_classes))
    if np.any(wrong):
        hint = " Labels begin with 0." if np.any(labels == num_classes) else ""
        raise ValueError(
            f'{name}["labels"] must be integers 0 to {num_classes - 1}, or -1 for padding '
            f"({num_classes} classes without background).{hint} "
            f"Received: {np.unique(labels[wrong])[:10].tolist()}"
        )


def _check_units(boxes, bounding_box_format: str, image_size, check) -> None:
    """Pixels where parts of the picture are declared, and the other way round."""
    largest, smallest = boxes.max(), boxes.min()
    if bounding_box_format.startswith("rel_"):
        # Up to 2: boxes may reach over the border, as long as nobody takes them for pixels.
        check(np.abs(boxes).max(axis=1) > 2, "must be parts of the picture, 0 to 1, not pixels")
    elif largest <= 1.01 and smallest >= -0.01 and (image_size is None or min(image_size) > 2):
        check(np.ones(len(boxes), bool), "must be in pixels, but all numbers are between 0 and 1")


def _to_corners(boxes: np.ndarray, bounding_box_format: str) -> np.ndarray:
    """(n, 4) in any format -> "xyxy" in the same unit."""
    layout = bounding_box_format.removeprefix("rel_")
    if layout in ("yxyx", "center_yxhw"):
        boxes = boxes[:, [1, 0, 3, 2]]
    first, second = boxes[:, :2], boxes[:, 2:]
    if layout == "xywh":
        return np.concatenate([first, first + second], axis=1)
    if layout.startswith("center"):
        return np.concatenate([first - second / 2, first + second / 2], axis=1)
    return boxes
