"""`preprocess_input` and `decode_predictions`, as in `keras.applications`."""

from collections.abc import Sequence

import keras
import numpy as np

from keras_resnest.checks import checked, one_line


@checked
def preprocess_input(x, data_format: str | None = None, mode: str | None = None):
    """Prepares a batch of images for a network of this package.

    By default this does nothing, because the networks normalize images themselves. It exists for
    programs written for `keras.applications`.

    Args:
        x: images (batch, height, width, 3), RGB, 0 to 255, uint8 or float.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        mode: None to return `x` unchanged, or `"torch"` to normalize by ImageNet's mean and
            standard deviation, for networks with `include_rescaling=False`.

    Returns:
        `x`, or a normalized float copy.

    Raises:
        ValueError: if `mode` is anything else.

    Example:
        >>> model.predict(preprocess_input(images))
    """
    if mode is None:
        return x
    if mode != "torch":
        raise ValueError(f"`mode` must be None or 'torch'. Received: mode={mode!r}")
    if isinstance(x, np.ndarray):
        x = x.astype("float32")  # a copy: Keras works in place
    return keras.applications.imagenet_utils.preprocess_input(
        x, data_format=data_format, mode="torch"
    )


@checked
def decode_predictions(preds, top: int = 5, class_names: Sequence[str] | None = None):
    """Returns the most probable classes of each image, by name.

    Args:
        preds: class probabilities (batch, classes).
        top: positive integer, number of classes per image.
        class_names: class names in order. None for ImageNet's, which Keras downloads once.

    Returns:
        For each image, a list of (class id, class name, probability) by falling probability.
        The id is the index into `class_names`, or ImageNet's WordNet id.

    Raises:
        ValueError: if the shapes do not match.
        ConnectionError: if ImageNet's names cannot be downloaded.

    Example:
        >>> decode_predictions(model.predict(images), top=1, class_names=["cat", "dog"])
        [[(1, 'dog', 0.93)]]
    """
    preds = keras.ops.convert_to_numpy(preds)
    classes = 1000 if class_names is None else len(class_names)
    if preds.ndim != 2 or preds.shape[1] != classes:
        source = "of ImageNet" if class_names is None else "in `class_names`"
        raise ValueError(
            f"`preds` must have shape (batch, {classes}), one column per name {source}. "
            f"Received: {preds.shape}"
        )
    if not isinstance(top, int) or not 0 < top <= classes:
        raise ValueError(f"`top` must be an integer from 1 to {classes}. Received: top={top!r}")
    if class_names is None:
        return _decode_imagenet(preds, top)
    order = np.argsort(-preds, axis=1, kind="stable")[:, :top]
    return [
        [(int(i), str(class_names[i]), float(row[i])) for i in best]
        for row, best in zip(preds, order, strict=True)
    ]


def _decode_imagenet(preds, top):
    try:
        return keras.applications.imagenet_utils.decode_predictions(preds, top=top)
    except Exception as error:
        raise ConnectionError(
            f"The names of ImageNet's classes could not be fetched: {one_line(error)} "
            "(pass `class_names` to avoid the download)"
        ) from error
