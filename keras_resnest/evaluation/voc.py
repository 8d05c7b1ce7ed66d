"""Average precision by the rules of PASCAL VOC."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from keras_resnest.checks import checked
from keras_resnest.evaluation.box_table import BoxTable, check_classes, read_tables

Interpolation = Literal["every_point", "eleven_point"]
MAX_PAIRS = 1 << 20  # of boxes whose IoU is computed at once; bounds the memory


# === Result ===


@dataclasses.dataclass(frozen=True, eq=False)
class AveragePrecision:
    """Result of `voc_average_precision` for T IoU thresholds and C classes."""

    class_names: tuple[str, ...]
    iou_thresholds: tuple[float, ...]
    average_precision: np.ndarray  # (T, C) values in [0, 1]; nan for a class without objects
    num_objects: np.ndarray  # (C,) objects of each class, without `difficult` ones
    # (T, C) numbers of detections; those matched to a `difficult` object count as neither
    true_positives: np.ndarray
    false_positives: np.ndarray
    interpolation: Interpolation
    # T lists of C dictionaries of `recall`, `precision` and `confidence`, one value per counted
    # detection, in order of decreasing confidence
    curves: list[list[dict[str, np.ndarray]]]

    @property
    def mAP(self) -> float:  # upper case as in the literature
        """Mean over thresholds and all classes with objects; nan without objects."""
        return nan_mean(self.average_precision)

    @checked
    def at(self, iou_threshold: float) -> "AveragePrecision":
        """Returns the result for one of the thresholds."""
        row = self._row(iou_threshold)
        names = ("iou_thresholds", "average_precision", "curves")
        names += ("true_positives", "false_positives")
        rows = {name: getattr(self, name)[row : row + 1] for name in names}
        return dataclasses.replace(self, **rows)

    @checked
    def per_class(self, iou_threshold: float | None = None) -> dict[str, dict]:
        """Returns the numbers of each class by name; an undefined AP is None.

        Args:
            iou_threshold: one of the thresholds; required if there are several.

        Returns:
            `{name: {"average_precision", "num_objects", "true_positives", "false_positives"}}`.
        """
        row = self._row(iou_threshold)
        values = self.average_precision[row].tolist()
        return {
            name: {
                "average_precision": None if np.isnan(values[i]) else values[i],
                "num_objects": int(self.num_objects[i]),
                "true_positives": int(self.true_positives[row, i]),
                "false_positives": int(self.false_positives[row, i]),
            }
            for i, name in enumerate(self.class_names)
        }

    @checked
    def curve(self, class_name: str, iou_threshold: float | None = None) -> dict[str, np.ndarray]:
        """Returns `{"recall", "precision", "confidence"}` of one class."""
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
        """A table with one line per class and the mean last."""
        width = max(len("class"), *map(len, self.class_names))
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


def nan_mean(values: np.ndarray) -> float:
    """Mean of the values that are not nan; nan (without NumPy's warning) if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


# === Metric ===


@checked
def voc_average_precision(
    ground_truth: Sequence[Mapping] | Mapping,
    detections: Sequence[Mapping] | Mapping,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    *,
    iou_threshold: float | Sequence[float] = 0.5,
    interpolation: Interpolation = "every_point",
    plus_one: bool = False,
) -> AveragePrecision:
    """Computes average precision as the PASCAL VOC development kit does.

    The detections of a class, over all images, are sorted by decreasing confidence (ties keep
    their order). Each is assigned to the object of its class and image with the highest IoU. It
    is a true positive if the IoU reaches the threshold and no earlier detection has this object,
    else a false positive; it never falls back to another object. Detections assigned to a
    `difficult` object are ignored.

    Args:
        ground_truth: one dictionary per image with `"boxes"` (n, 4), `"xyxy"` in pixels,
            `"labels"` (n,), 0 to num_classes-1, and optionally `"difficult"` (n,) bool; or one
            dictionary of arrays with images as first axis. Rows with label -1 are padding.
        detections: the same with `"boxes"`, `"labels"` and `"confidence"`, as returned by
            `RefineDet.predict`.
        class_names: names in the order of the labels.
        num_classes: number of classes, if there are no names.
        iou_threshold: lowest IoU of a true positive, in (0, 1]; or several.
        interpolation: `"every_point"` (VOC 2010 and later): area under the curve of the highest
            precision at this or higher recall. `"eleven_point"` (VOC 2007): its mean at recall
            0, 0.1, ..., 1, without rounding errors.
        plus_one: whether a box is xmax - xmin + 1 pixels wide, as in the development kit and
            all published VOC figures. The boxes of this package are xmax - xmin wide, which
            changes the result very little.

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
    class_names = check_classes(class_names, num_classes)
    thresholds = _check_thresholds(iou_threshold)
    objects, found = read_tables(ground_truth, detections, len(class_names))
    if plus_one and objects.boxes.size and objects.boxes.max() <= 1.0:
        raise ValueError(
            "`plus_one` counts pixels, but all coordinates of `ground_truth` are at most 1. "
            "Received: relative boxes; convert them to pixels or use plus_one=False"
        )
    # Class by class, by decreasing confidence; lexsort keeps the order of ties.
    found = found.take(np.lexsort((-found.confidence, found.labels)))
    iou, best = best_objects(objects, found, len(class_names), plus_one)
    outcomes = [_match(iou, best, objects.difficult, threshold) for threshold in thresholds]
    return _summarize(objects, found, outcomes, class_names, thresholds, interpolation)


def best_objects(
    objects: BoxTable, found: BoxTable, num_classes: int, plus_one: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """For each detection, the highest IoU with an object of its class and image, and its row.

    IoU 0 and row -1 if there is none; the first object if several have this IoU.
    """
    groups = [table.image * num_classes + table.labels for table in (objects, found)]
    iou, best = np.zeros(len(found.labels)), np.full(len(found.labels), -1)
    for rows, others, values in paired_boxes(objects, found, *groups, plus_one):
        first = np.flatnonzero(np.diff(rows, prepend=-1))
        iou[rows[first]] = np.maximum.reduceat(values, first)
        is_best = np.flatnonzero(values == iou[rows])
        own_rows, first = np.unique(rows[is_best], return_index=True)
        best[own_rows] = others[is_best[first]]
    return iou, best


def paired_boxes(
    objects: BoxTable,
    found: BoxTable,
    object_group: np.ndarray,
    found_group: np.ndarray,
    plus_one: bool = False,
):
    """Yields chunks `(rows of found, rows of objects, IoU)` of all pairs of the same group.

    The pairs of a detection are consecutive and in one chunk, its objects in their order.
    """
    rows = np.argsort(object_group, kind="stable")
    start = np.searchsorted(object_group[rows], found_group, side="left")
    count = np.searchsorted(object_group[rows], found_group, side="right") - start
    candidates = np.flatnonzero(count)
    pairs = np.cumsum(count[candidates])
    chunks = np.searchsorted(pairs, np.arange(MAX_PAIRS, pairs.max(initial=0), MAX_PAIRS))
    for chunk in np.split(candidates, chunks):
        first = np.cumsum(count[chunk]) - count[chunk]
        offset = np.arange(count[chunk].sum()) - np.repeat(first, count[chunk])
        own_rows = np.repeat(chunk, count[chunk])
        others = rows[np.repeat(start[chunk], count[chunk]) + offset]
        yield own_rows, others, _paired_iou(found.boxes[own_rows], objects.boxes[others], plus_one)


def _paired_iou(boxes1: np.ndarray, boxes2: np.ndarray, plus_one: bool) -> np.ndarray:
    """IoU of row i of (N, 4) with row i of (N, 4)."""
    extra = 1.0 if plus_one else 0.0
    overlap = np.minimum(boxes1[:, 2:], boxes2[:, 2:]) - np.maximum(boxes1[:, :2], boxes2[:, :2])
    overlap = np.maximum(overlap + extra, 0.0).prod(axis=1)
    area1, area2 = ((b[:, 2:] - b[:, :2] + extra).prod(axis=1) for b in (boxes1, boxes2))
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
    # An object belongs to the first, most confident, of its detections.
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
    curves = [[] for _ in thresholds]
    for row, (true_positive, counted) in enumerate(outcomes):
        for label in range(num_classes):
            rows = np.arange(borders[label], borders[label + 1])
            rows = rows[counted[rows]]
            tp = np.cumsum(true_positive[rows])
            precision = tp / np.arange(1, len(rows) + 1)
            recall = np.full(len(rows), np.nan)
            true_positives[row, label] = tp[-1] if len(rows) else 0
            false_positives[row, label] = len(rows) - true_positives[row, label]
            if num_objects[label]:
                recall = tp / num_objects[label]
                area = _area_under_curve(tp, precision, num_objects[label], interpolation)
                average_precision[row, label] = area
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


def _area_under_curve(tp, precision, num_objects: int, interpolation: str) -> float:
    """Average precision of one class, given cumulative true positives and precision."""
    if not len(tp):
        return 0.0
    # Highest precision at this or any higher recall.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if interpolation == "every_point":
        return float(np.sum(np.diff(tp, prepend=0) * envelope) / num_objects)
    # Recall k/10 is reached where 10 TP >= k objects: integers, so no rounding.
    reached = np.searchsorted(10 * tp, np.arange(11) * num_objects)
    return float(np.append(envelope, 0.0)[reached].mean())


def _check_thresholds(iou_threshold) -> tuple[float, ...]:
    thresholds = tuple(float(value) for value in np.atleast_1d(iou_threshold))
    if not thresholds or not all(0.0 < value <= 1.0 for value in thresholds):
        raise ValueError(
            "`iou_threshold` must be above 0 and at most 1, or several such values. "
            f"Received: iou_threshold={iou_threshold}"
        )
    return thresholds
