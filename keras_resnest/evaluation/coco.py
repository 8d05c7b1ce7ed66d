"""COCO's average precision and recall."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from keras_resnest.checks import checked
from keras_resnest.evaluation.box_table import check_classes, read_tables
from keras_resnest.evaluation.matching import (
    ANY_AREA,
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    SIZES,
    by_confidence,
    count_outcomes,
    of_same_class,
    overlapping_pairs,
    rank_in_group,
    sampled_precision,
)
from keras_resnest.evaluation.voc import nan_mean


@dataclasses.dataclass(frozen=True, eq=False)
class COCOAveragePrecision:
    """Result of `coco_average_precision` for C classes."""

    class_names: tuple[str, ...]
    iou_thresholds: tuple[float, ...]  # 0.50, 0.55, ..., 0.95
    average_precision: np.ndarray  # (10, C) values in [0, 1]; nan for a class without objects
    metrics: dict[str, float]  # COCO's twelve, "AP", "AP50", ..., "ARlarge"; nan if undefined

    def per_class(self) -> dict[str, float | None]:
        """Returns AP over IoU 0.50:0.95 by class name; None for a class without objects."""
        means = [nan_mean(column) for column in self.average_precision.T]
        return {
            name: None if np.isnan(mean) else mean
            for name, mean in zip(self.class_names, means, strict=True)
        }

    def __str__(self) -> str:
        """A table with AP, AP50 and AP75 of each class, then the twelve metrics."""
        width = max(len("class"), *map(len, self.class_names))
        columns = [self.per_class().values()]
        columns += [self.average_precision[self.iou_thresholds.index(t)] for t in (0.5, 0.75)]
        lines = [f"{'class':{width}}       AP     AP50     AP75"]
        for name, *values in zip(self.class_names, *columns, strict=True):
            shown = ("-" if v is None or np.isnan(v) else f"{v:.4f}" for v in values)
            lines.append(f"{name:{width}}  " + "  ".join(f"{text:>7}" for text in shown))
        for name, value in self.metrics.items():
            lines.append(f"{name:9} {'-' if np.isnan(value) else format(value, '.4f'):>7}")
        return "\n".join(lines)


@checked
def coco_average_precision(
    ground_truth: Sequence[Mapping] | Mapping,
    detections: Sequence[Mapping] | Mapping,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> COCOAveragePrecision:
    """Computes COCO's twelve box metrics, equal to those of pycocotools.

    AP is the mean over IoU thresholds 0.50, 0.55, ..., 0.95; at most 100 detections per class
    and image count.

    Args:
        ground_truth: as in `voc_average_precision`; optionally with `"iscrowd"` (n,) bool and
            `"area"` (n,) in square pixels (default: the area of the box), which separates small
            (below 32 x 32), medium and large (above 96 x 96) objects. COCO has no `difficult`:
            such objects count like all others.
        detections: as in `voc_average_precision`.
        class_names: names in the order of the labels.
        num_classes: number of classes, if there are no names.

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
    class_names = check_classes(class_names, num_classes)
    objects, found = read_tables(ground_truth, detections, len(class_names))
    found = by_confidence(found)
    pairs = of_same_class(overlapping_pairs(objects, found), objects, found)
    rank = rank_in_group(found.image, found.labels)
    precision, recall = {}, {}
    for size, area in {"": ANY_AREA, **SIZES}.items():
        outcomes = count_outcomes(objects, found, len(class_names), pairs, area)
        precision[size] = sampled_precision(found.labels, *outcomes)
        positive, _, num_objects = outcomes
        for most in (MAX_DETECTIONS,) if size else (1, 10, MAX_DETECTIONS):
            hits = positive & (rank < most)
            recall[size or str(most)] = _recall(found.labels, hits, num_objects)
    overall = precision[""]
    values = {"AP": overall, "AP50": overall[0], "AP75": overall[5]}
    values |= {f"AP{size}": precision[size] for size in SIZES}
    values |= {f"AR{name}": rows for name, rows in recall.items()}
    return COCOAveragePrecision(
        class_names,
        tuple(IOU_THRESHOLDS.tolist()),
        overall,
        {name: nan_mean(rows) for name, rows in values.items()},
    )


def _recall(labels: np.ndarray, hits: np.ndarray, num_objects: np.ndarray) -> np.ndarray:
    """Share of the objects of each class, (T, C), that hits (T, D) have found; nan without any."""
    counts = [np.bincount(labels[row], minlength=len(num_objects)) for row in hits]
    with np.errstate(invalid="ignore"):
        return np.array(counts) / num_objects
