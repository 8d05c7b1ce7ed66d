"""Geometric operations on an image and its boxes, as TensorFlow graph code.

A window is an int32 vector (x1, y1, x2, y2) in pixels of the source image. Elements are
`{"images": (h, w, 3), "bounding_boxes": {"boxes": (n, 4), "labels": (n,), ...}}`.
"""

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from keras_resnest.images import MEAN_COLOR

#: Values of the box entries in a padding row.
PADDING = {"boxes": 0.0, "labels": -1, "difficult": False}


# === Arguments ===


def checked_call(call: Callable) -> Callable:
    """Decorates `__call__` of an augmentation: another image, element or seed is a `ValueError`."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def wrapper(*args, **kwargs):
        for name, value in list(signature.bind(*args, **kwargs).arguments.items())[1:]:
            if name in ("element", "batch"):
                fits = isinstance(value, Mapping) and {"images", "bounding_boxes"} <= set(value)
                wanted = 'a dictionary of "images" and "bounding_boxes"'
            elif name == "image":
                fits, wanted = _fits(value, (None, None, 3), False), "an array (h, w, 3)"
            else:
                is_default = value is None and signature.parameters[name].default is None
                fits, wanted = is_default or _fits(value, (2,), True), "two integers"
            if not fits:
                received = textwrap.shorten(repr(value), 100)
                raise ValueError(f"`{name}` must be {wanted}. Received: {name}={received}")
        return call(*args, **kwargs)

    return wrapper


def _fits(value, shape: tuple, is_integer: bool) -> bool:
    """Whether a value is a tensor of numbers of a shape."""
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError):
        return False
    is_number = tensor.dtype.is_integer or (tensor.dtype.is_floating and not is_integer)
    return is_number and tensor.shape.is_compatible_with(shape)


# === Images and boxes ===


def view(
    element: dict,
    window: tf.Tensor,
    size: tf.Tensor | None = None,
    fill_color: Sequence[float] = MEAN_COLOR,
    antialias: bool = False,
    distort: Callable = tf.identity,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Crops a window out of an image and resizes it to `size` (height, width).

    The window must overlap the image; its part outside is filled with `fill_color`. `distort` is
    applied to the visible part (float32, at its final size). For `antialias` see
    `TrainingAugmentation`.

    Returns:
        The float32 image (height, width, 3), and all boxes, clipped to the window, in its pixels.
    """
    image, boxes = element["images"], element["bounding_boxes"]["boxes"]
    image_extent, extent = size_of(image)[::-1], window[2:] - window[:2]  # (width, height)
    size = extent if size is None else size[::-1]
    low, high = tf.maximum(window[:2], 0), tf.minimum(window[2:], image_extent)

    # Align the visible part with output pixels, so that no edge needs blending.
    scale = tf.cast(size, tf.float32) / tf.cast(extent, tf.float32)
    start = tf.round(tf.cast(low - window[:2], tf.float32) * scale)
    end = tf.round(tf.cast(high - window[:2], tf.float32) * scale)
    start = tf.minimum(tf.cast(start, tf.int32), size - 1)
    end = tf.maximum(tf.cast(end, tf.int32), start + 1)

    image = image[low[1] : high[1], low[0] : high[0]]
    is_zoomed_out = tf.reduce_prod(extent) > tf.reduce_prod(image_extent)
    use_area = bool(antialias) & is_zoomed_out & (tf.reduce_max(scale) <= 0.5)
    visible_size = (end - start)[::-1]
    image = tf.cond(
        use_area,
        lambda: tf.image.resize(image, visible_size, method="area"),
        lambda: tf.image.resize(image, visible_size, method="bilinear"),
    )
    image = distort(image)
    # tf.pad takes only a scalar: pad `image - color` with zeros instead.
    paddings = tf.stack([start[::-1], (size - end)[::-1]], axis=1)
    image = tf.pad(image - fill_color, tf.concat([paddings, [[0, 0]]], axis=0)) + fill_color

    low, high, start, end = (tf.cast(v, tf.float32) for v in (low, high, start, end))
    boxes = tf.clip_by_value(boxes, tf.tile(low, [2]), tf.tile(high, [2]))
    boxes = (boxes - tf.tile(low, [2])) * tf.tile((end - start) / (high - low), [2])
    return image, boxes + tf.tile(start, [2])


def orient(image: tf.Tensor, boxes: tf.Tensor, transpose, flip_x, flip_y) -> tuple:
    """Transposes, then flips an image and its boxes, each step only if its flag is set."""
    if transpose is not False:  # a tensor, known only when the graph runs
        image = apply_if(transpose, lambda image: tf.transpose(image, [1, 0, 2]), image)
        boxes = tf.where(transpose, tf.gather(boxes, [1, 0, 3, 2], axis=1), boxes)
    image = tf.raw_ops.Reverse(tensor=image, dims=tf.stack([flip_y, flip_x, False]))
    height, width = tf.unstack(tf.cast(size_of(image), tf.float32))
    x1, y1, x2, y2 = tf.unstack(boxes, axis=1)
    x1, x2 = tf.where(flip_x, width - x2, x1), tf.where(flip_x, width - x1, x2)
    y1, y2 = tf.where(flip_y, height - y2, y1), tf.where(flip_y, height - y1, y2)
    return image, tf.stack([x1, y1, x2, y2], axis=1)


def update_element(element: dict, image: tf.Tensor, boxes: tf.Tensor, keep=None) -> dict:
    """Replaces the image and the boxes of an element; `keep` (n,) filters all box entries."""
    rows = dict(element["bounding_boxes"], boxes=boxes)
    if keep is not None:
        rows = {name: tf.boolean_mask(values, keep) for name, values in rows.items()}
    return dict(element, images=image, bounding_boxes=rows)


def pad_rows(rows: dict, count: tf.Tensor, axis: int = 0) -> dict:
    """Appends `count` padding rows to all box entries along `axis`."""

    def pad(name, values):
        paddings = [[0, 0]] * values.shape.rank
        paddings[axis] = [0, count]
        return tf.pad(values, paddings, constant_values=tf.cast(PADDING[name], values.dtype))

    return {name: pad(name, values) for name, values in rows.items()}


# === Windows ===


def size_of(image: tf.Tensor) -> tf.Tensor:
    """(height, width) of an image, int32."""
    return tf.shape(image)[:2]


def whole_window(size: tf.Tensor) -> tf.Tensor:
    """The window of a whole image of `size` (height, width)."""
    return tf.stack([0, 0, size[1], size[0]])


def centers_inside(boxes: tf.Tensor, windows: tf.Tensor) -> tf.Tensor:
    """Whether the centers of (n, 4) boxes are in (..., 4) windows."""
    windows = tf.cast(windows, tf.float32)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2.0
    inside = (centers >= windows[..., :2]) & (centers < windows[..., 2:])
    return tf.reduce_all(inside, axis=-1)


def intersection(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Area of the intersection of boxes (..., 4), broadcast."""
    a, b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
    sides = tf.minimum(a[..., 2:], b[..., 2:]) - tf.maximum(a[..., :2], b[..., :2])
    return tf.reduce_prod(tf.maximum(sides, 0.0), axis=-1)


def window_iou(windows: tf.Tensor, boxes: tf.Tensor) -> tf.Tensor:
    """IoU (..., n) of nonempty windows (..., 4) and boxes (n, 4)."""
    windows = tf.cast(windows[..., None, :], tf.float32)
    common = intersection(windows, boxes)
    return common / (intersection(windows, windows) + intersection(boxes, boxes) - common)


# === Helpers ===


def check_range(name: str, values: tuple, low: float, high: float) -> None:
    """Raises ValueError unless `values` are (lower, upper), ordered and within low to high."""
    if not low <= values[0] <= values[1] <= high:
        received = values[1] if values[0] == low else values
        raise ValueError(f"`{name}` must be within {low} to {high}. Received: {name}={received!r}")


def split_seed(seed, count: int) -> tf.Tensor:
    """Splits a seed into independent ones (count, 2); int32 and int64 seeds give the same."""
    return tf.random.split(tf.cast(seed, tf.int64), count)


def apply_if(condition, change: Callable, image: tf.Tensor) -> tf.Tensor:
    return tf.cond(condition, lambda: change(image), lambda: image)


def between(low, high, fraction: tf.Tensor) -> tf.Tensor:
    return low + (high - low) * fraction
