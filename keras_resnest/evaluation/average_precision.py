"""Average precision of detections: the PASCAL VOC rule and, through pycocotools, COCO's.

Both measures take plain arrays, so they work for any detector:
`collect_detections` runs a model over a dataset and gives those arrays,
`evaluate_detections` does both steps.
"""

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.formats import check_box_format, convert_boxes
from keras_resnest.checks import check_same_classes

INTERPOLATIONS = ("every_point", "eleven_point")
PAIRS_AT_ONCE = 1 << 20  # IoU is computed for so many pairs at a time, to bound the memory

COCO_METRICS = (
    "AP",
    "AP50",
    "AP75",
    "APsmall",
    "APmedium",
    "APlarge",
    "AR1",
    "AR10",
    "AR100",
    "ARsmall",
    "ARmedium",
    "ARlarge",
)


# --- Results ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AveragePrecision:
    """Result of `voc_average_precision` for T IoU thresholds and C classes.

    Attributes:
        class_names: the C names.
        iou_thresholds: the T thresholds.
        average_precision: (T, C) values in [0, 1]; nan for a class without objects.
        num_objects: (C,) objects of each class, `difficult` ones not counted.
        true_positives: (T, C) numbers of detections.
        false_positives: (T, C) numbers of detections; those matched to a
            `difficult` object are in neither.
        interpolation: the rule, `"every_point"` or `"eleven_point"`.
        curves: T lists of C dictionaries of `recall`, `precision` and
            `confidence`, one value per counted detection, most confident first.
    """

    class_names: tuple[str, ...]
    iou_thresholds: tuple[float, ...]
    average_precision: np.ndarray
    num_objects: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    interpolation: str
    curves: list[list[dict[str, np.ndarray]]]

    @property
    def mAP(self) -> float:  # the name of the field, capital letters included
        """Mean over all classes that have objects (and all thresholds); nan without objects."""
        return _mean_of_defined(self.average_precision)

    def at(self, iou_threshold: float) -> "AveragePrecision":
        """The same result for one of the thresholds only."""
        row = self._row(iou_threshold)
        row = slice(row, row + 1)
        return AveragePrecision(
            class_names=self.class_names,
            iou_thresholds=self.iou_thresholds[row],
            average_precision=self.average_precision[row],
            num_objects=self.num_objects,
            true_positives=self.true_positives[row],
            false_positives=self.false_positives[row],
            interpolation=self.interpolation,
            curves=self.curves[row],
        )

    def per_class(self, iou_threshold: float | None = None) -> dict[str, dict]:
        """Plain numbers of each class by its name; an undefined AP is None.

        Args:
            iou_threshold: which threshold; needed only where there are several.

        Returns:
            `{name: {"average_precision", "num_objects", "true_positives",
            "false_positives"}}`.
        """
        row = self._row(iou_threshold)
        columns = zip(
            self.class_names,
            self.average_precision[row].tolist(),
            self.num_objects.tolist(),
            self.true_positives[row].tolist(),
            self.false_positives[row].tolist(),
            strict=True,
        )
        return {
            name: {
                "average_precision": None if np.isnan(value) else value,
                "num_objects": num_objects,
                "true_positives": true_positives,
                "false_positives": false_positives,
            }
            for name, value, num_objects, true_positives, false_positives in columns
        }

    def curve(self, class_name: str, iou_threshold: float | None = None) -> dict[str, np.ndarray]:
        """`{"recall", "precision", "confidence"}` of one class, most confident first."""
        if class_name not in self.class_names:
            raise ValueError(
                f"`class_name` must be one of {', '.join(self.class_names)}. "
                f"Received: class_name={class_name!r}"
            )
        return self.curves[self._row(iou_threshold)][self.class_names.index(class_name)]

    def _row(self, iou_threshold: float | None) -> int:
        if iou_threshold is None and len(self.iou_thresholds) == 1:
            return 0
        if iou_threshold not in self.iou_thresholds:
            raise ValueError(
                f"`iou_threshold` must be one of {self.iou_thresholds}. "
                f"Received: iou_threshold={iou_threshold}"
            )
        return self.iou_thresholds.index(iou_threshold)

    def __str__(self) -> str:
        """A table: one line per class, the mean last."""
        width = max(len("mAP"), len("class"), *map(len, self.class_names))
        lines = []
        for threshold in self.iou_thresholds:
            result = self.at(threshold)
            title = f"AP{100 * threshold:g}"
            lines.append(f"{'class':{width}}  objects       TP       FP  {title:>7}")
            for name, numbers in result.per_class().items():
                average_precision = numbers["average_precision"]
                shown = "-" if average_precision is None else f"{average_precision:.4f}"
                lines.append(
                    f"{name:{width}}  {numbers['num_objects']:7d}  {numbers['true_positives']:7d}"
                    f"  {numbers['false_positives']:7d}  {shown:>7}"
                )
            totals = (self.num_objects, result.true_positives, result.false_positives)
            numbers = "  ".join(f"{int(total.sum()):7d}" for total in totals)
            lines.append(f"{'mAP':{width}}  {numbers}  {result.mAP:7.4f}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class COCOAveragePrecision:
    """Result of `coco_average_precision`.

    Attributes:
        class_names: the C names.
        iou_thresholds: 0.50, 0.55, ..., 0.95.
        average_precision: (10, C) values in [0, 1]; nan for a class without objects.
        metrics: COCO's twelve numbers by name, `"AP"`, `"AP50"`, ..., `"ARlarge"`;
            nan where undefined.
    """

    class_names: tuple[str, ...]
    iou_thresholds: tuple[float, ...]
    average_precision: np.ndarray
    metrics: dict[str, float]

    def per_class(self) -> dict[str, float | None]:
        """AP over IoU 0.50:0.95 by class name; None for a class without objects."""
        means = [_mean_of_defined(column) for column in self.average_precision.T]
        return {
            name: None if np.isnan(mean) else mean
            for name, mean in zip(self.class_names, means, strict=True)
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:9} {value:7.4f}" for name, value in self.metrics.items())


def _mean_of_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


# --- PASCAL VOC ---------------------------------------------------------------------------


def voc_average_precision(
    ground_truth: Sequence[Mapping] | Mapping,
    detections: Sequence[Mapping] | Mapping,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    *,
    iou_threshold: float | Sequence[float] = 0.5,
    interpolation: str = "every_point",
    plus_one: bool = False,
) -> AveragePrecision:
    """Average precision as the PASCAL VOC development kit defines it.

    The detections of a class, over all images, are taken by falling confidence
    (equal ones in the order given). Each belongs to the object of its class and
    image with the highest IoU. It is a true positive if that IoU reaches the
    threshold and the object is still free, else a false positive; it never falls
    back to a second-best object. A detection that belongs to a `difficult` object
    counts neither way.

    Args:
        ground_truth: one dictionary per image with `"boxes"` (n, 4), `"xyxy"` in
            pixels, `"labels"` (n,), 0 to num_classes-1, and if wanted `"difficult"`
            (n,) bool. Or one dictionary of arrays with images as first axis. Rows
            with label -1 are padding.
        detections: likewise, with `"boxes"`, `"labels"` and `"confidence"`, which is
            also what `RefineDet.predict` returns.
        class_names: names in the order of the labels.
        num_classes: number of classes, where there are no names.
        iou_threshold: lowest IoU of a true positive, in (0, 1]; or several.
        interpolation: `"every_point"` (VOC 2010 and later): area under the curve of
            the highest precision at this or higher recall. `"eleven_point"` (VOC
            2007): its mean at recall 0, 0.1, ..., 1, compared exactly (10 TP >= k
            objects, no rounding of 0.1).
        plus_one: whether a box is xmax - xmin + 1 pixels wide, as in the development
            kit and all published VOC figures. This package's boxes are continuous
            (xmax - xmin wide), which gives nearly the same numbers.

    Returns:
        `AveragePrecision`: `.mAP`, `.per_class()`, `.curve(name)`.

    Raises:
        ValueError: if a box, label, confidence or argument is invalid.

    Example:

    >>> truth = [{"boxes": [[0, 0, 10, 10]], "labels": [0]}]
    >>> found = [{"boxes": [[0, 0, 10, 8]], "labels": [0], "confidence": [0.9]}]
    >>> voc_average_precision(truth, found, class_names=["cell"]).mAP
    1.0

    Source: Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge,
    IJCV 2010, section 4.2.
    """
    class_names = _check_class_names(class_names, num_classes)
    thresholds = _check_thresholds(iou_threshold)
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}. "
            f"Received: interpolation={interpolation!r}"
        )
    objects, found = _flatten_both(ground_truth, detections, len(class_names))
    if plus_one and objects.boxes.size and objects.boxes.max() <= 1.0:
        raise ValueError(
            "`plus_one` counts pixels, but all coordinates of `ground_truth` are at most 1. "
            "Received: relative boxes; convert them to pixels or use plus_one=False"
        )
    # Class by class, most confident first; lexsort keeps the order of equal ones.
    found = found.take(np.lexsort((-found.confidence, found.labels)))
    iou, best = _best_object(objects, found, len(class_names), plus_one)
    outcomes = [_match(iou, best, objects.difficult, threshold) for threshold in thresholds]
    return _summarize(objects, found, outcomes, class_names, thresholds, interpolation)


def _best_object(
    objects: "_Boxes", found: "_Boxes", num_classes: int, plus_one: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Highest IoU of each detection with objects of its class and image, and their rows.

    Where there is no such object, IoU 0 and row -1.
    """
    object_group = objects.image * num_classes + objects.labels
    rows = np.argsort(object_group, kind="stable")
    found_group = found.image * num_classes + found.labels
    start = np.searchsorted(object_group[rows], found_group, side="left")
    count = np.searchsorted(object_group[rows], found_group, side="right") - start

    iou, best = np.zeros(len(found_group)), np.full(len(found_group), -1)
    candidates = np.flatnonzero(count)
    pairs = np.cumsum(count[candidates])
    chunks = np.searchsorted(pairs, np.arange(PAIRS_AT_ONCE, pairs.max(initial=0), PAIRS_AT_ONCE))
    for chunk in np.split(candidates, chunks):
        if not chunk.size:
            continue
        first = np.cumsum(count[chunk]) - count[chunk]  # where the pairs of a detection begin
        within = np.arange(count[chunk].sum()) - np.repeat(first, count[chunk])
        paired_rows = rows[np.repeat(start[chunk], count[chunk]) + within]
        paired_boxes = np.repeat(found.boxes[chunk], count[chunk], axis=0)
        values = _paired_iou(paired_boxes, objects.boxes[paired_rows], plus_one)
        iou[chunk] = np.maximum.reduceat(values, first)
        # Of several objects with the same IoU the first one given.
        is_best = np.flatnonzero(values == np.repeat(iou[chunk], count[chunk]))
        best[chunk] = paired_rows[is_best[np.searchsorted(is_best, first)]]
    return iou, best


def _paired_iou(boxes1: np.ndarray, boxes2: np.ndarray, plus_one: bool) -> np.ndarray:
    """IoU of row i of (N, 4) with row i of (N, 4)."""
    extra = 1.0 if plus_one else 0.0
    left, top = np.maximum(boxes1[:, 0], boxes2[:, 0]), np.maximum(boxes1[:, 1], boxes2[:, 1])
    right, bottom = np.minimum(boxes1[:, 2], boxes2[:, 2]), np.minimum(boxes1[:, 3], boxes2[:, 3])
    overlap = np.maximum(right - left + extra, 0.0) * np.maximum(bottom - top + extra, 0.0)
    area1 = (boxes1[:, 2] - boxes1[:, 0] + extra) * (boxes1[:, 3] - boxes1[:, 1] + extra)
    area2 = (boxes2[:, 2] - boxes2[:, 0] + extra) * (boxes2[:, 3] - boxes2[:, 1] + extra)
    return overlap / np.maximum(area1 + area2 - overlap, np.finfo(float).tiny)


def _match(
    iou: np.ndarray, best: np.ndarray, difficult: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are true positives and which count at all, both (N,) bool."""
    hits = np.flatnonzero(iou >= threshold)
    is_difficult = difficult[best[hits]]
    counted = np.ones(len(iou), dtype=bool)
    counted[hits[is_difficult]] = False
    hits = hits[~is_difficult]
    # Without falling back, an object goes to the first (most confident) of its detections.
    _, first = np.unique(best[hits], return_index=True)
    true_positive = np.zeros(len(iou), dtype=bool)
    true_positive[hits[first]] = True
    return true_positive, counted


def _summarize(objects, found, outcomes, class_names, thresholds, interpolation):
    """Per-class numbers from detections that are sorted by class and confidence."""
    num_classes = len(class_names)
    num_objects = np.bincount(objects.labels[~objects.difficult], minlength=num_classes)
    borders = np.searchsorted(found.labels, np.arange(num_classes + 1))
    shape = (len(thresholds), num_classes)
    average_precision = np.full(shape, np.nan)
    true_positives, false_positives = np.zeros(shape, int), np.zeros(shape, int)
    curves = []
    for row, (true_positive, counted) in enumerate(outcomes):
        curves.append([])
        for label in range(num_classes):
            rows = np.arange(borders[label], borders[label + 1])
            rows = rows[counted[rows]]
            tp = np.cumsum(true_positive[rows])
            precision = tp / np.arange(1, len(rows) + 1)
            recall = tp / num_objects[label] if num_objects[label] else np.full(len(rows), np.nan)
            true_positives[row, label] = tp[-1] if len(rows) else 0
            false_positives[row, label] = len(rows) - true_positives[row, label]
            if num_objects[label]:
                average_precision[row, label] = _area(
                    tp, precision, num_objects[label], interpolation
                )
            confidence = found.confidence[rows]
            curves[row].append({"recall": recall, "precision": precision, "confidence": confidence})
    return AveragePrecision(
        class_names=class_names,
        iou_thresholds=thresholds,
        average_precision=average_precision,
        num_objects=num_objects,
        true_positives=true_positives,
        false_positives=false_positives,
        interpolation=interpolation,
        curves=curves,
    )


def _area(tp: np.ndarray, precision: np.ndarray, num_objects: int, interpolation: str) -> float:
    """Average precision of one class from cumulated true positives and precision."""
    if not len(tp):
        return 0.0
    # Highest precision at this or any higher recall.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "every_point":
        return float(np.sum(np.diff(tp, prepend=0) * envelope) / num_objects)
    # Recall k/10 is reached where 10 TP >= k objects: whole numbers, so no rounding.
    reached = np.searchsorted(10 * tp, np.arange(11) * num_objects)
    return float(np.append(envelope, 0.0)[reached].mean())


# --- COCO ---------------------------------------------------------------------------------


def coco_average_precision(
    ground_truth: Sequence[Mapping] | Mapping,
    detections: Sequence[Mapping] | Mapping,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> COCOAveragePrecision:
    """COCO's twelve numbers for boxes, computed by pycocotools.

    AP is the mean over IoU thresholds 0.50, 0.55, ..., 0.95; at most 100 detections
    of a class and image count.

    Args:
        ground_truth: as in `voc_average_precision`; it may also hold `"iscrowd"`
            (n,) bool and `"area"` (n,) in square pixels, which decides about small
            (below 32 x 32), medium and large (above 96 x 96), by default the area of
            the box. COCO has no `difficult`: such objects count like all others.
        detections: as in `voc_average_precision`.
        class_names: names in the order of the labels.
        num_classes: number of classes, where there are no names.

    Returns:
        `COCOAveragePrecision`: `.metrics["AP50"]`, `.per_class()`.

    Raises:
        ValueError: if a box, label, confidence or argument is invalid.

    Example:

    >>> truth = [{"boxes": [[0, 0, 10, 10]], "labels": [0]}]
    >>> found = [{"boxes": [[0, 0, 10, 8]], "labels": [0], "confidence": [0.9]}]
    >>> coco_average_precision(truth, found, num_classes=1).metrics["AP75"]
    1.0

    Source: Lin et al., Microsoft COCO (arXiv 1405.0312); cocodataset.org, "Evaluate".
    """
    from pycocotools.cocoeval import COCOeval

    class_names = _check_class_names(class_names, num_classes)
    objects, found = _flatten_both(ground_truth, detections, len(class_names))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        evaluation = COCOeval(
            _coco_index(objects, len(class_names)), _coco_index(found, len(class_names)), "bbox"
        )
        # Images without any object count too: their detections are false positives.
        evaluation.params.imgIds = list(range(objects.num_images))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (IoU, recall, class, area range, most detections), -1 where undefined.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    average_precision = np.where(precision[:, 0] < 0, np.nan, precision.mean(axis=1))
    metrics = {
        name: float("nan") if value < 0 else float(value)
        for name, value in zip(COCO_METRICS, evaluation.stats, strict=True)
    }
    thresholds = tuple(float(value) for value in evaluation.params.iouThrs.round(2))
    return COCOAveragePrecision(class_names, thresholds, average_precision, metrics)


def _coco_index(rows: "_Boxes", num_classes: int):
    """The boxes as a pycocotools `COCO` object; unlike `loadRes` it may be empty."""
    from pycocotools.coco import COCO

    sizes = rows.boxes[:, 2:] - rows.boxes[:, :2]
    boxes = np.concatenate([rows.boxes[:, :2], sizes], axis=1).tolist()
    columns = zip(
        rows.image.tolist(),
        rows.labels.tolist(),
        boxes,
        rows.area.tolist(),
        rows.iscrowd.tolist(),
        rows.confidence.tolist(),
        strict=True,
    )
    index = COCO()
    index.dataset = {
        "images": [{"id": image} for image in range(rows.num_images)],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": [
            {
                "id": number,  # from 1: pycocotools takes a match with number 0 for none
                "image_id": image,
                "category_id": label,
                "bbox": box,
                "area": area,
                "iscrowd": int(iscrowd),
                "score": confidence,
            }
            for number, (image, label, box, area, iscrowd, confidence) in enumerate(columns, 1)
        ],
    }
    index.createIndex()
    return index


# --- A model over a dataset --------------------------------------------------------------


def collect_detections(
    model,
    dataset: Iterable,
    *,
    bounding_box_format: str | None = None,
    steps: int | None = None,
) -> tuple[list[dict], list[dict]]:
    """Runs a detector over batches; gives ground truth and detections of each image.

    Both are read in one pass, so a dataset that is shuffled anew at each pass does
    no harm. The model's compiled predict function is used, and never traced again
    for a later pass.

    Args:
        model: a `RefineDet`, or any Keras model whose `predict_on_batch(images)` gives
            `{"boxes", "confidence", "labels"}`, padded with label -1. Its attribute
            `bounding_box_format` is the format of these boxes (`"xyxy"` if absent).
        dataset: batches `{"images": (B, H, W, 3), "bounding_boxes": {"boxes",
            "labels"}}` or tuples `(images, {"boxes", "labels"})`; `"difficult"`,
            `"iscrowd"` and `"area"` beside the boxes are passed on. A dictionary may also
            hold `"image_size"` (B, 2), height and width before resizing.
        bounding_box_format: format of the ground truth in `dataset`; by default that
            of the model, as in training.
        steps: number of batches; needed for a dataset without end.

    Returns:
        `(ground_truth, detections)`: lists with one dictionary of arrays per image,
        without padding. Boxes are `"xyxy"` in pixels of the batch's images, or of the
        images before resizing where the batch has `"image_size"`. The latter matters
        only for COCO's small, medium and large objects.

    Raises:
        ValueError: if a batch has another structure, or the dataset has no end.

    Example:

    >>> ground_truth, detections = collect_detections(model, validation_dataset)
    >>> coco_average_precision(ground_truth, detections, model.class_names).metrics["AP"]
    """
    _check_finite(dataset, steps)
    predicted_format = getattr(model, "bounding_box_format", None) or "xyxy"
    given_format = check_box_format(bounding_box_format or predicted_format)
    ground_truth, detections = [], []
    for batch in itertools.islice(dataset, steps):
        images, given = unpack_batch(batch)
        size = tuple(images.shape[1:3])
        own_sizes = batch.get("image_size") if isinstance(batch, Mapping) else None
        ground_truth += _split_batch(given, given_format, size, own_sizes)
        detections += _split_batch(_predict(model, images), predicted_format, size, own_sizes)
    if not detections:
        raise ValueError(
            "`dataset` must yield at least one batch (an iterator can be read only once). "
            "Received: no batch"
        )
    return ground_truth, detections


def evaluate_detections(
    model,
    dataset: Iterable,
    class_names: Sequence[str] | None = None,
    *,
    iou_threshold: float | Sequence[float] = 0.5,
    interpolation: str = "every_point",
    plus_one: bool = False,
    bounding_box_format: str | None = None,
    steps: int | None = None,
) -> AveragePrecision:
    """VOC average precision of a detector on a dataset.

    `collect_detections` followed by `voc_average_precision`; arguments and errors are
    those of the two. IoU is measured in the batch's images; because stretching a
    image changes no IoU, this equals the measure in the original images.

    Args:
        model: as in `collect_detections`.
        dataset: as in `collect_detections`.
        class_names: names of the classes, by default `model.class_names`; where there
            are none, the numbers 0 to `model.num_classes` - 1 serve as names.
        iou_threshold: as in `voc_average_precision`.
        interpolation: as in `voc_average_precision`.
        plus_one: as in `voc_average_precision`.
        bounding_box_format: as in `collect_detections`.
        steps: as in `collect_detections`.

    Raises:
        ValueError: also if `dataset`, one of `keras_resnest.data`, has other classes than the
            model, or the same in another order.

    Returns:
        `AveragePrecision`; printing it gives a table.

    Example:

    >>> print(evaluate_detections(model, validation_dataset))
    """
    class_names = classes_of(model, class_names, dataset)
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


def classes_of(model, class_names: Sequence[str] | None, dataset=None) -> tuple[str, ...]:
    """Names of the classes: the argument, or what the model says of itself."""
    check_same_classes(dataset, getattr(model, "class_names", None) or class_names)
    if class_names is None:
        class_names = getattr(model, "class_names", None)
    num_classes = getattr(model, "num_classes", None)
    if class_names is None and num_classes is None:
        raise ValueError(
            "`class_names` must be given for a model that has neither `class_names` nor "
            f"`num_classes`. Received: model={model}"
        )
    return _check_class_names(class_names, num_classes)


def _predict(model, images) -> dict[str, np.ndarray]:
    """Padded detections of one batch."""
    images = np.asarray(images)  # JAX does not take the tensors of tf.data
    strategy = getattr(model, "distribute_strategy", None)
    own = type(model).predict_on_batch is not keras.Model.predict_on_batch
    if own or strategy is None or strategy.num_replicas_in_sync == 1:
        predicted = model.predict_on_batch(images)
    else:  # Keras' `predict_on_batch` would give the whole batch to every replica
        predicted = model.predict(images, batch_size=len(images), verbose=0)
    if not isinstance(predicted, Mapping):
        raise ValueError(
            "`model` must predict a dictionary of boxes, confidence and labels. "
            f"Received: {type(predicted).__name__}"
        )
    return {name: predicted[name] for name in ("boxes", "confidence", "labels")}


def _check_finite(dataset, steps: int | None) -> None:
    cardinality = getattr(dataset, "cardinality", None)  # of a tf.data.Dataset; -1: no end
    if steps is None and cardinality is not None and int(cardinality()) == -1:
        raise ValueError("`steps` must be given for a dataset without end. Received: steps=None")


def unpack_batch(batch):
    """`(images, ground truth)` of a batch in either of its two structures."""
    if isinstance(batch, Mapping):
        images, boxes = batch.get("images"), batch.get("bounding_boxes")
        received = f"a dictionary of {', '.join(map(str, batch))}"
    else:
        images, boxes = (*batch, None, None)[:2] if isinstance(batch, tuple | list) else (None,) * 2
        received = type(batch).__name__
    if images is None or not isinstance(boxes, Mapping) or not {"boxes", "labels"} <= set(boxes):
        raise ValueError(
            "`dataset` must yield {'images', 'bounding_boxes': {'boxes', 'labels'}} or "
            f"(images, {{'boxes', 'labels'}}). Received: {received}"
        )
    if len(images.shape) != 4:
        raise ValueError(
            "`dataset` must yield batches of images, shape (batch, height, width, 3). "
            f"Received: images of shape {tuple(images.shape)}; use dataset.batch(...)"
        )
    return images, boxes


def _split_batch(batch: Mapping, source: str, size: tuple[int, int], own_sizes) -> list[dict]:
    """One dictionary per image, boxes `"xyxy"`, rows with label -1 dropped."""
    arrays = {name: np.asarray(values) for name, values in batch.items()}
    if source != "xyxy":
        boxes = convert_boxes(arrays["boxes"], source, "xyxy", height=size[0], width=size[1])
        arrays["boxes"] = ops.convert_to_numpy(boxes)
    if own_sizes is not None:
        scale = (np.asarray(own_sizes, "float32") / np.asarray(size))[:, None, [1, 0, 1, 0]]
        arrays["boxes"] = arrays["boxes"] * scale
    return [
        {name: values[image][keep] for name, values in arrays.items()}
        for image, keep in enumerate(arrays["labels"] != -1)
    ]


# --- Input --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Boxes:
    """Boxes of all images in one table of N rows, without padding."""

    boxes: np.ndarray  # (N, 4) "xyxy"
    labels: np.ndarray  # (N,)
    image: np.ndarray  # (N,) number of the image
    confidence: np.ndarray  # (N,), 0 for objects
    difficult: np.ndarray  # (N,) bool
    iscrowd: np.ndarray  # (N,) bool
    area: np.ndarray  # (N,)
    num_images: int

    def take(self, rows: np.ndarray) -> "_Boxes":
        columns = {
            name: values[rows] if isinstance(values, np.ndarray) else values
            for name, values in vars(self).items()
        }
        return _Boxes(**columns)


def _flatten_both(ground_truth, detections, num_classes: int) -> tuple[_Boxes, _Boxes]:
    objects = _flatten(ground_truth, "ground_truth", ("boxes", "labels"), num_classes)
    found = _flatten(detections, "detections", ("boxes", "labels", "confidence"), num_classes)
    if objects.num_images != found.num_images:
        raise ValueError(
            "`ground_truth` and `detections` must be of the same images. Received: "
            f"{objects.num_images} and {found.num_images} images"
        )
    highest = [rows.boxes.max(initial=0.0) for rows in (objects, found)]
    if 0.0 < min(highest) <= 1.0 and max(highest) > 2.0:
        warnings.warn(
            "Either `ground_truth` or `detections` has all coordinates between 0 and 1, the other "
            f"has not (highest: {highest[0]:g} and {highest[1]:g}). Both must be in pixels.",
            stacklevel=3,
        )
    return objects, found


def _flatten(images, argument: str, required: tuple[str, ...], num_classes: int) -> _Boxes:
    """Checks the boxes of all images and puts them into one table."""
    if isinstance(images, Mapping):
        images = _one_by_one(images, argument, required)
    columns = [_columns(boxes, f"{argument}[{i}]", required) for i, boxes in enumerate(images)]
    image = np.repeat(np.arange(len(columns)), [len(c["labels"]) for c in columns])
    columns.append(_columns(dict.fromkeys(required, ()), argument, required))  # sets the shapes
    table = {name: np.concatenate([c[name] for c in columns]) for name in columns[-1]}
    keep = table["labels"] != -1
    table = {name: values[keep] for name, values in table.items()}
    _check_table(table, image[keep], argument, num_classes)
    own_area = (table["boxes"][:, 2:] - table["boxes"][:, :2]).prod(axis=1)
    table["area"] = np.where(np.isnan(table["area"]), own_area, table["area"])
    return _Boxes(**table, image=image[keep], num_images=len(columns) - 1)


def _one_by_one(batch: Mapping, argument: str, required: tuple[str, ...]) -> list[dict]:
    """A dictionary of arrays with images as first axis, as one dictionary per image."""
    names = [name for name in ("difficult", "iscrowd", "area") if name in batch]
    arrays = {}
    for name in (*required, *names):
        if name not in batch:
            raise ValueError(f"`{argument}` lacks {name!r}. Received: {', '.join(map(str, batch))}")
        arrays[name] = np.asarray(batch[name])
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"`{argument}` must hold as many images in every array. Received: {lengths}"
        )
    return [dict(zip(arrays, rows, strict=True)) for rows in zip(*arrays.values(), strict=True)]


def _columns(boxes: Mapping, where: str, required: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of one image, with defaults for the absent ones."""
    missing = [name for name in required if name not in boxes]
    if missing:
        raise ValueError(f"`{where}` lacks {', '.join(missing)}. Received: {sorted(boxes)}")
    coordinates = np.atleast_1d(np.asarray(boxes["boxes"], dtype="float64"))
    labels = np.atleast_1d(np.asarray(boxes["labels"]))
    if coordinates.size == 0:
        coordinates = coordinates.reshape(0, 4)
    if labels.size == 0:
        labels = labels.reshape(0).astype(int)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"`{where}['labels']` must be integers. Received: dtype={labels.dtype}")
    count = len(coordinates)
    columns = {"boxes": coordinates, "labels": labels}
    for name, default, dtype in (
        ("confidence", 0.0, "float64"),
        ("difficult", False, bool),
        ("iscrowd", False, bool),
        ("area", np.nan, "float64"),
    ):
        given = boxes.get(name)
        columns[name] = np.full(count, default) if given is None else np.asarray(given, dtype)
    for name, values in columns.items():
        wanted = (count, 4) if name == "boxes" else (count,)
        if values.shape != wanted:
            raise ValueError(
                f"`{where}[{name!r}]` must have shape {'(n, 4)' if name == 'boxes' else wanted}. "
                f"Received: shape={values.shape}"
            )
    return columns


def _check_table(table: dict, image: np.ndarray, argument: str, num_classes: int) -> None:
    """`ValueError` that names the first bad row, if there is one."""
    boxes, labels = table["boxes"], table["labels"]
    checks = (
        ("boxes", "finite", np.isfinite(boxes).all(axis=1)),
        ("boxes", "'xyxy' with x1 <= x2 and y1 <= y2", (boxes[:, :2] <= boxes[:, 2:]).all(axis=1)),
        ("labels", f"0 to {num_classes - 1}, or -1", (labels >= 0) & (labels < num_classes)),
        ("confidence", "finite", np.isfinite(table["confidence"])),
    )
    for name, wanted, good in checks:
        if not good.all():
            row = int(np.argmin(good))
            raise ValueError(
                f"`{argument}[{image[row]}][{name!r}]` must be {wanted}. "
                f"Received: {table[name][row].tolist()}"
            )


def _check_class_names(class_names, num_classes: int | None) -> tuple[str, ...]:
    if class_names is None:
        if num_classes is None or int(num_classes) != num_classes or num_classes < 1:
            raise ValueError(
                "`class_names` or a positive `num_classes` must be given. "
                f"Received: class_names=None, num_classes={num_classes}"
            )
        return tuple(str(label) for label in range(int(num_classes)))
    if isinstance(class_names, str) or not len(class_names):
        raise ValueError(f"`class_names` must be a list of names. Received: {class_names!r}")
    names = tuple(str(name) for name in class_names)
    if len(set(names)) < len(names):
        raise ValueError(f"`class_names` must differ from each other. Received: {names}")
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            "`num_classes` must be the number of `class_names`. "
            f"Received: num_classes={num_classes}, {len(names)} names"
        )
    return names


def _check_thresholds(iou_threshold) -> tuple[float, ...]:
    thresholds = tuple(float(value) for value in np.atleast_1d(iou_threshold))
    if not thresholds or not all(0.0 < value <= 1.0 for value in thresholds):
        raise ValueError(
            "`iou_threshold` must be above 0 and at most 1, or several such values. "
            f"Received: iou_threshold={iou_threshold}"
        )
    return thresholds
