"""Checks of a training batch, inside the graph, with plain sentences.

Errors of the input pipeline show up in the middle of a run, where the values
are known to the graph alone. TensorFlow can stop there; `plain_errors` turns
what it raises into a `ValueError`. On other backends, and under `jit_compile`,
only arrays given directly to `fit` or `predict` are checked.
"""

import contextlib

import keras
import numpy as np
from keras import ops

MARK = "keras_resnest:"
MAX_RELATIVE = 10.0  # a larger "fraction" of the picture is a pixel


def check_same_classes(data, class_names) -> None:
    """`ValueError` if a data set of `keras_resnest.data` has other classes than the model."""
    names = getattr(data, "class_names", None)
    if names and class_names and list(names) != list(class_names):
        raise ValueError(
            "The data set and the model must have the same classes in the same order: read "
            f"the data with class_names={list(class_names)}. Received: {list(names)}"
        )


def checked_images(images):
    """Pictures (batch, height, width, 3) that are finite and were not scaled to 0-1."""
    values = ops.cast(images, "float32")
    highest, lowest = ops.max(values, initial=0.0), ops.min(values, initial=0.0)
    # A dark picture holds zeros and ones; a scaled one hardly anything but fractions.
    fractions = ops.mean(ops.cast(values != ops.floor(values), "float32")) > 0.5
    finite = ops.isfinite(ops.sum(values))
    images = _require(images, finite, "`images` must be finite, 0 to 255. Received NaN or infinity")
    return _require(
        images,
        ops.logical_not((highest <= 1.0) & fractions),
        "`images` must be 0 to 255. Received values within 0 to 1: do not scale pictures; "
        "the network normalises them itself. Lowest and highest value:",
        lowest,
        highest,
    )


def checked_ground_truth(images, boxes, labels, relative, num_classes: int, box_format: str):
    """The pictures, once their ground truth has been looked at.

    Args:
        images: pictures of the batch, any shape.
        boxes: `"xyxy"` in pixels, (batch, objects, 4).
        labels: int, (batch, objects), padding is -1.
        relative: `boxes` as fractions of the picture.
        num_classes: classes of the model.
        box_format: the format that was declared, for the messages.

    Returns:
        `images`. What is computed from them waits for the checks, so that a faulty
        batch changes no weight.
    """
    real = (labels >= 0)[..., None]
    boxes, relative = ops.where(real, boxes, 0.0), ops.where(real, relative, 0.0)
    declared = f"bounding_box_format={box_format!r} was declared"
    images = _require(
        images,
        ops.all((labels >= -1) & (labels < num_classes)),
        f"`labels` must be 0 to {num_classes - 1}, or -1 for padding. Received lowest and highest:",
        ops.min(labels, initial=0),
        ops.max(labels, initial=0),
    )
    finite = ops.all(ops.isfinite(boxes))
    images = _require(images, finite, "`boxes` must be finite. Received NaN or infinity")
    smallest = ops.min(boxes[..., 2:] - boxes[..., :2], initial=0.0)
    images = _require(
        images,
        smallest >= 0.0,
        f"`boxes` must not have a negative width or height. {declared}: is it another one? "
        "Received a side, in pixels:",
        smallest,
    )
    extent = ops.max(ops.abs(relative), initial=0.0)
    return _require(images, *_unit_check(extent, boxes, real, box_format, declared))


def _unit_check(extent, boxes, real, box_format: str, declared: str):
    """Pixels where fractions were declared, or fractions where pixels were."""
    if box_format.startswith("rel_"):
        return (
            extent <= MAX_RELATIVE,
            f"`boxes` must be fractions of the picture, as {declared}. Received a coordinate:",
            extent,
        )
    return (
        ops.logical_not(ops.any(real) & (ops.max(ops.abs(boxes), initial=0.0) <= 1.0)),
        f"`boxes` must be in pixels, as {declared}. Received only numbers within 0 to 1: declare "
        "a rel_ format, or multiply by the picture's size",
    )


def _require(tensor, condition, message: str, *values):
    """`tensor`, if `condition` holds; otherwise an error with the message and the values."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        check = tf.debugging.Assert(condition, [f"{MARK} {message}", *values])
        with tf.control_dependencies([check] if check is not None else []):
            return tf.identity(tensor)
    if isinstance(condition, bool | np.bool_) and not condition:
        raise ValueError(" ".join([message, *map(str, values)]))
    return tensor


@contextlib.contextmanager
def plain_errors():
    """Turns an error of these checks, raised inside a TensorFlow graph, into a `ValueError`."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        text = str(error)
        if MARK not in text:
            raise
        # "assertion failed: [<mark> message] [value] [value]\n\t [[node ...", quotes escaped
        message = text[text.index(MARK) + len(MARK) :].split("\n")[0].replace("\\'", "'")
        raise ValueError(message.replace("]", "", 1).strip()) from None
