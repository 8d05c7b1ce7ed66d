"""Runs a detector on a dataset and evaluates its detections."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.formats import check_box_format, convert_boxes
from keras_resnest.checks import (
    check_box_dictionary,
    check_counts,
    check_same_classes,
    checked,
    unpack_batch,
    value_errors,
)
from keras_resnest.evaluation.box_table import check_classes
from keras_resnest.evaluation.voc import AveragePrecision, Interpolation, voc_average_precision


@checked
def collect_detections(
    model, dataset: Iterable, *, bounding_box_format: str | None = None, steps: int | None = None
) -> tuple[list[dict], list[dict]]:
    """Runs a detector on batches and returns ground truth and detections of each image.

    Reads the dataset once, so it may reshuffle on each pass. Uses the model's compiled predict
    function, so later calls do not retrace.

    Args:
        model: a `RefineDet`, or any Keras model whose `predict_on_batch(images)` returns
            `{"boxes", "confidence", "labels"}`, padded with label -1. Its attribute
            `bounding_box_format` is the format of these boxes (default `"xyxy"`).
        dataset: batches `{"images": (B, H, W, 3), "bounding_boxes": {"boxes", "labels"}}` or
            `(images, {"boxes", "labels"})`, optionally with `"difficult"`, `"iscrowd"` and `"area"`
            in the box dictionary. A batch dictionary may also hold `"image_size"` (B, 2), height
            and width before resizing.
        bounding_box_format: format of the boxes in `dataset`; default the model's.
        steps: number of batches; required for an infinite dataset.

    Returns:
        `(ground_truth, detections)`: lists with one dictionary of arrays per image, without
        padding. Boxes are `"xyxy"` in pixels of the batch's images, or of the original images if
        the batch has `"image_size"`, which matters only for COCO's small, medium and large
        objects.

    Raises:
        ValueError: if a batch has another structure, or the dataset is infinite or empty.

    Example:
        >>> ground_truth, detections = collect_detections(model, validation_dataset)
        >>> coco_average_precision(ground_truth, detections, model.class_names).metrics["AP"]
    """
    ground_truth, detections = [], []
    for _, _, objects, found in detect_batches(model, dataset, bounding_box_format, steps):
        ground_truth += objects
        detections += found
    return ground_truth, detections


def detect_batches(model, dataset: Iterable, bounding_box_format: str | None, steps: int | None):
    """Runs a detector batch by batch; arguments as in `collect_detections`.

    Yields:
        `(images, sizes, ground_truth, detections)`: images (B, H, W, 3), their heights and widths
        (B, 2) in the pixels of the boxes, and lists of B dictionaries.
    """
    if not isinstance(dataset, Iterable):
        raise ValueError(f"`dataset` must be batches. Received: {type(dataset).__name__}")
    check_counts(steps=steps)
    cardinality = getattr(dataset, "cardinality", None)  # a tf.data.Dataset; -1: infinite
    if steps is None and cardinality is not None and int(cardinality()) == -1:
        raise ValueError("`steps` must be given for an infinite dataset. Received: steps=None")
    predicted_format = getattr(model, "bounding_box_format", None) or "xyxy"
    given_format = check_box_format(bounding_box_format or predicted_format)
    is_empty = True
    with value_errors():
        for batch in itertools.islice(dataset, steps):
            images, boxes = unpack_labeled_batch(batch)
            size = tuple(images.shape[1:3])
            own_sizes = batch.get("image_size") if isinstance(batch, Mapping) else None
            sizes = np.full((len(images), 2), size) if own_sizes is None else np.asarray(own_sizes)
            truth = _split_batch(boxes, given_format, size, own_sizes)
            found = _split_batch(_predict(model, images), predicted_format, size, own_sizes)
            is_empty = is_empty and not found
            yield np.asarray(images), sizes, truth, found
    if is_empty:
        raise ValueError(
            "`dataset` must yield at least one batch (an iterator can be read only once). "
            "Received: no batch"
        )


@checked
def evaluate_detections(
    model,
    dataset: Iterable,
    class_names: Sequence[str] | None = None,
    *,
    iou_threshold: float | Sequence[float] = 0.5,
    interpolation: Interpolation = "every_point",
    plus_one: bool = False,
    bounding_box_format: str | None = None,
    steps: int | None = None,
) -> AveragePrecision:
    """Measures the VOC average precision of a detector on a dataset.

    Calls `collect_detections` and `voc_average_precision`, with their arguments. `class_names` are
    by default those of the model, or the numbers 0 to `model.num_classes` - 1. Resizing does not
    change IoU, so the result equals that for the original images.

    Returns:
        `AveragePrecision`; printing it shows a table.

    Raises:
        ValueError: as in `collect_detections`, or if a dataset of `keras_resnest.data` has other
            classes than the model, or in another order.

    Example:
        >>> print(evaluate_detections(model, validation_dataset))
    """
    class_names = resolve_class_names(model, class_names, dataset)
    ground_truth, detections = collect_detections(
        model, dataset, bounding_box_format=bounding_box_format, steps=steps
    )
    return voc_average_precision(
        ground_truth,
        detections,
        class_names,
        iou_threshold=iou_threshold,
        interpolation=interpolation,
        plus_one=plus_one,
    )


def resolve_class_names(model, class_names: Sequence[str] | None, dataset=None) -> tuple[str, ...]:
    """Returns the names of the classes, by default the model's; checks those of the dataset."""
    own_names = getattr(model, "class_names", None)
    check_same_classes(dataset, own_names or class_names)
    class_names = own_names if class_names is None else class_names
    num_classes = getattr(model, "num_classes", None)
    if class_names is None and num_classes is None:
        raise ValueError(
            "`class_names` must be given for a model that has neither `class_names` nor "
            f"`num_classes`. Received: model={model}"
        )
    return check_classes(class_names, num_classes)


def unpack_labeled_batch(batch) -> tuple:
    """Returns (images, boxes) of a batch in either layout, checked."""
    images, boxes, _ = unpack_batch(batch)
    check_box_dictionary(boxes)
    if len(images.shape) != 4:
        raise ValueError(
            "`dataset` must yield batches of images, shape (batch, height, width, 3). "
            f"Received: images of shape {tuple(images.shape)}; use dataset.batch(...)"
        )
    return images, boxes


def _predict(model, images) -> dict[str, np.ndarray]:
    """Padded detections of one batch."""
    if not hasattr(model, "predict_on_batch"):
        raise ValueError(f"`model` must be a detector. Received: {model!r}")
    images = np.asarray(images)  # JAX does not accept the tensors of tf.data
    strategy = getattr(model, "distribute_strategy", None)
    overridden = type(model).predict_on_batch is not keras.Model.predict_on_batch
    if overridden or strategy is None or strategy.num_replicas_in_sync == 1:
        predicted = model.predict_on_batch(images)
    else:  # Keras' `predict_on_batch` would send the whole batch to every replica
        predicted = model.predict(images, batch_size=len(images), verbose=0)
    if not isinstance(predicted, Mapping):
        raise ValueError(
            "`model` must predict a dictionary of boxes, confidence and labels. "
            f"Received: {type(predicted).__name__}"
        )
    return {name: predicted[name] for name in ("boxes", "confidence", "labels")}


def _split_batch(batch: Mapping, source: str, size: tuple[int, int], original_sizes) -> list[dict]:
    """One dictionary per image, with "xyxy" boxes and without padding."""
    arrays = {name: np.asarray(values) for name, values in batch.items()}
    if source != "xyxy":
        boxes = convert_boxes(arrays["boxes"], source, "xyxy", height=size[0], width=size[1])
        arrays["boxes"] = ops.convert_to_numpy(boxes)
    if original_sizes is not None:
        scale = (np.asarray(original_sizes, "float32") / np.asarray(size))[:, None, [1, 0, 1, 0]]
        arrays["boxes"] = arrays["boxes"] * scale
    return [
        {name: values[image][keep] for name, values in arrays.items()}
        for image, keep in enumerate(arrays["labels"] != -1)
    ]
