"""From what a user calls images to arrays, for every `detect` of this package."""

import os
import warnings
from collections.abc import Callable

from keras_resnest.images import find_images, load_image


def detect_images(images, detect_batch: Callable[[list], list], batch_size: int):
    """Loads images and detects in them, some at a time.

    Args:
        images: a path, an encoded image (bytes), a PIL image, an array (height, width,
            channels) 0 to 255, a folder, or a list or 4-D array of images.
        detect_batch: from a list of arrays (height, width, 3) to a list of detections.
        batch_size: images that are loaded and handed over together.

    Returns:
        Detections of the one image, or a list of them, with None (and a warning) for a
        image that cannot be read.

    Raises:
        ValueError: if a single image cannot be read.
    """
    if isinstance(images, str | os.PathLike) and os.path.isdir(images):
        images = find_images(images)
    if not isinstance(images, list | tuple) and getattr(images, "ndim", 0) != 4:
        return detect_batch([load_image(images)])[0]
    results = []
    for start in range(0, len(images), batch_size):
        loaded = [_load_or_warn(image) for image in images[start : start + batch_size]]
        found = iter(detect_batch([image for image in loaded if image is not None]))
        results += [None if image is None else next(found) for image in loaded]
    return results


def _load_or_warn(image):
    try:
        return load_image(image)
    except ValueError as error:
        warnings.warn(f"skipped an image: {error}", stacklevel=4)
        return None
