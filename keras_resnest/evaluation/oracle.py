"""What average precision would be if boxes, classes or confidence were right."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from keras_resnest.checks import checked
from keras_resnest.evaluation.box_table import check_classes, read_tables
from keras_resnest.evaluation.matching import (
    average_precision,
    by_confidence,
    of_same_class,
    overlapping_pairs,
)
from keras_resnest.evaluation.voc import nan_mean

MATCHED = 0.5  # a detection belongs to the object of its class with the highest IoU, if above
BACKGROUND = 0.1  # a detection with less IoU with every object is on background (TIDE)


@dataclasses.dataclass(frozen=True, eq=False)
class OracleDecomposition:
    """Result of `oracle_decomposition` for C classes."""

    class_names: tuple[str, ...]
    # (10, C) values in [0, 1] by name of the replacement, for the IoU thresholds 0.50, 0.55, ...,
    # 0.95; nan for a class without objects
    average_precision: dict[str, np.ndarray]
    most_confident_iou: float  # mean of the most confident detection of each object that has one
    best_iou: float  # mean of the best detection of each of these objects

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """COCO's `{"AP", "AP50", "AP75"}` by name of the replacement; nan without objects."""
        return {
            name: {"AP": nan_mean(values), "AP50": nan_mean(values[0]), "AP75": nan_mean(values[5])}
            for name, values in self.average_precision.items()
        }

    def __str__(self) -> str:
        """A table with one line per replacement, and the mean IoUs last."""
        width = max(map(len, self.average_precision))
        lines = [f"{'replaced':{width}}       AP     AP50     AP75"]
        for name, values in self.metrics.items():
            lines.append(f"{name:{width}}" + "".join(f"  {v:7.4f}" for v in values.values()))
        lines.append(
            f"mean IoU of an object's most confident box {self.most_confident_iou:.4f}, "
            f"of its best box {self.best_iou:.4f}"
        )
        return "\n".join(lines)


@checked
def oracle_decomposition(
    ground_truth: Sequence[Mapping] | Mapping,
    detections: Sequence[Mapping] | Mapping,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> OracleDecomposition:
    """Computes COCO's AP with one property of the detections at a time replaced by the truth.

    What a replacement gains is what the network loses there. Each starts from the detections as
    they are:

    - `"as it is"`: nothing, the AP of `coco_average_precision`.
    - `"boxes"`: a detection has the box of the object of its class with the highest IoU, if that
      is above 0.5.
    - `"classes"`: a detection has the class of the object of any class with the highest IoU, if
      that is at least 0.5; its own class wins a tie.
    - `"confidence times IoU"`: confidence times the highest IoU with an object of its class.
    - `"confidence is IoU"`: this IoU, 0 without such an object.
    - `"no duplicates"`: of the detections whose best object of their class is the same, with an
      IoU above 0.5, only the most confident one.
    - `"no background"`: without detections whose IoU with every object is below 0.1.

    As in COCO, detections on an `iscrowd` object are ignored; such objects replace nothing.

    Args:
        ground_truth: as in `coco_average_precision`.
        detections: as in `coco_average_precision`.
        class_names: names in the order of the labels.
        num_classes: number of classes, if there are no names.

    Returns:
        `OracleDecomposition`; printing it shows a table.

    Raises:
        ValueError: if a box, label, confidence or argument is invalid.

    Example:
        >>> truth = [{"boxes": [[0, 0, 10, 10]], "labels": [0]}]
        >>> found = [{"boxes": [[0, 0, 10, 8]], "labels": [0], "confidence": [0.9]}]
        >>> oracle_decomposition(truth, found, num_classes=1).metrics["boxes"]["AP"]
        1.0

    Source: the threshold of background: Bolya et al., TIDE (arXiv 2008.08115).
    """
    class_names = check_classes(class_names, num_classes)
    objects, found = read_tables(ground_truth, detections, len(class_names))
    found = by_confidence(found)
    regular = objects.take(~objects.iscrowd)
    pairs = overlapping_pairs(regular, found)
    iou, best = of_same_class(pairs, regular, found).best(len(found.labels))
    any_iou, any_best = pairs.best(len(found.labels))

    matched = np.flatnonzero(iou > MATCHED)
    first = matched[_first_of_each(best[matched])]
    by_iou = matched[np.argsort(-iou[matched], kind="stable")]
    boxes, labels = found.boxes.copy(), found.labels.copy()
    boxes[matched] = regular.boxes[best[matched]]
    overlapping = np.flatnonzero((any_iou >= 0.5) & (any_iou > iou))
    labels[overlapping] = regular.labels[any_best[overlapping]]
    unique = iou <= MATCHED
    unique[first] = True

    tables = {
        "as it is": found,
        "boxes": dataclasses.replace(found, boxes=boxes),
        "classes": dataclasses.replace(found, labels=labels),
        "confidence times IoU": dataclasses.replace(found, confidence=found.confidence * iou),
        "confidence is IoU": dataclasses.replace(found, confidence=iou),
        "no duplicates": found.take(unique),
        "no background": found.take(any_iou >= BACKGROUND),
    }
    return OracleDecomposition(
        class_names,
        {
            name: average_precision(objects, table, len(class_names))
            for name, table in tables.items()
        },
        most_confident_iou=nan_mean(iou[first]),
        best_iou=nan_mean(iou[by_iou[_first_of_each(best[by_iou])]]),
    )


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """Index of the first occurrence of each value."""
    return np.unique(values, return_index=True)[1]
