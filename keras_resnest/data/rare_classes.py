"""Rare classes: weights for the loss, and how often an epoch repeats each image."""

from collections.abc import Mapping

import numpy as np

from keras_resnest.checks import checked
from keras_resnest.data.dataset import ClassificationDataset, DetectionDataset, nearest

METHODS = ("balanced", "effective")


@checked
def class_weights(
    dataset: DetectionDataset | ClassificationDataset,
    method: str | Mapping[str, float] = "balanced",
    beta: float = 0.999,
) -> list[float]:
    """Returns the weight of each class, for `RefineDetLoss(class_weights=...)`.

    With `count` boxes of a class and C classes that have boxes, its weight is

    - `"balanced"`: all boxes / (C * count), so that all classes have the same total and boxes a
      mean weight of 1;
    - `"effective"`: proportional to (1 - beta) / (1 - beta ** count), the inverse of the effective
      number of samples, with a sum of C. It is less extreme: classes of far more than
      1 / (1 - beta) boxes have about the same weight.

    A class without boxes gets 1.

    Args:
        dataset: boxes are counted, or the images of a `ClassificationDataset`. A shard has the
            weights of the whole.
        method: `"balanced"`, `"effective"`, or the weights by class name, 1 for other classes.
        beta: above 0 and below 1, for `"effective"`.

    Returns:
        One number for each class, in the order of the labels.

    Raises:
        ValueError: if an argument is out of range, or a class name unknown.

    Example:
        >>> weights = class_weights(train, "effective")
        >>> loss = kr.detection.RefineDetLoss(class_weights=weights)
        >>> model = kr.RefineDet(class_names=train.class_names, detection_loss=loss)

    Source: effective number of samples from arXiv 1901.05555 eq. 2 and section 4.
    """
    names = dataset.class_names
    if isinstance(method, Mapping):
        if unknown := [name for name in method if name not in names]:
            raise ValueError(
                f"`method` must have names of classes. Received: {unknown[0]!r}. "
                f"{nearest(str(unknown[0]), names)}"
            )
        return [method.get(name, 1.0) for name in names]
    if method not in METHODS:
        raise ValueError(
            f"`method` must be {' or '.join(map(repr, METHODS))}, or a dictionary of weights by "
            f"class name. Received: method={method!r}"
        )
    if not 0 < beta < 1:
        raise ValueError(f"`beta` must be above 0 and below 1. Received: beta={beta!r}")
    counts = np.array(list(dataset.whole.report.class_counts.values()), "float64")
    weights, known = np.ones(len(counts)), counts[counts > 0]
    if method == "balanced":
        weights[counts > 0] = known.sum() / (len(known) * known)
    else:
        inverse = (1 - beta) / (1 - beta**known)
        weights[counts > 0] = inverse * len(known) / inverse.sum()
    return weights.tolist()


@checked
def repeat_factors(
    dataset: DetectionDataset, threshold: float, use_difficult: bool = True
) -> np.ndarray:
    """Returns how often an epoch shows each image, on average, so that rare classes occur in more.

    A class in the fraction f of the images has the factor max(1, sqrt(threshold / f)), and an image
    the highest factor of its classes, or 1 without objects.

    Args:
        dataset: a shard has the fractions of the whole.
        threshold: fraction of images below which a class is rare, above 0 and up to 1.
        use_difficult: whether boxes marked as difficult count.

    Returns:
        float64 (images,), at least 1.

    Raises:
        ValueError: if `threshold` is out of range.

    Example:
        >>> repeat_factors(train, 0.1).sum()  # images per epoch

    Source: repeat factor sampling of LVIS (arXiv 1908.03195), eq. 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(
            "`repeat_threshold` must be a fraction of the images, above 0 and at most 1. "
            f"Received: {threshold!r}"
        )

    def classes(record):
        return np.unique(record.labels if use_difficult else record.labels[~record.difficult])

    records = dataset.whole.records
    found = np.concatenate([classes(record) for record in records])
    images = np.bincount(found, minlength=dataset.num_classes)
    factors = np.sqrt(np.maximum(1.0, threshold * len(records) / np.maximum(images, 1)))
    return np.array([factors[classes(r)].max(initial=1.0) for r in dataset.records])
