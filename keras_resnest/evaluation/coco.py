"""COCO's average precision, computed by pycocotools."""

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np

from keras_resnest.checks import checked
from keras_resnest.evaluation.box_table import BoxTable, check_classes, read_tables
from keras_resnest.evaluation.voc import nan_mean

COCO_METRICS = (
    *(f"AP{kind}" for kind in ("", "50", "75", "small", "medium", "large")),
    *(f"AR{kind}" for kind in ("1", "10", "100", "small", "medium", "large")),
)


@dataclasses.dataclass(frozen=True, eq=False)
class COCOAveragePrecision:
    """Result of `coco_average_precision`.

    Attributes:
        class_names: the C names.
        iou_thresholds: 0.50, 0.55, ..., 0.95.
        average_precision: (10, C) values in [0, 1]; nan for a class without objects.
        metrics: COCO's twelve metrics by name, `"AP"`, `"AP50"`, ..., `"ARlarge"`; nan if
            undefined.
    """

    class_names: tuple[str, ...]
    iou_thresholds: tuple[float, ...]
    average_precision: np.ndarray
    metrics: dict[str, float]

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
    """Computes COCO's twelve box metrics with pycocotools.

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
    evaluation = _evaluate(*read_tables(ground_truth, detections, len(class_names)), class_names)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    metrics = {
        name: float("nan") if value < 0 else float(value)
        for name, value in zip(COCO_METRICS, evaluation.stats, strict=True)
    }
    thresholds = tuple(float(value) for value in evaluation.params.iouThrs.round(2))
    return COCOAveragePrecision(class_names, thresholds, _precision(evaluation), metrics)


def _evaluate(objects: BoxTable, found: BoxTable, class_names: Sequence[str]):
    """Returns a pycocotools `COCOeval` after matching and accumulation."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every step
        tables = (_to_coco(table, len(class_names)) for table in (objects, found))
        evaluation = COCOeval(*tables, "bbox")
        # Include images without objects: their detections are false positives.
        evaluation.params.imgIds = list(range(objects.num_images))
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _precision(evaluation) -> np.ndarray:
    """AP by IoU threshold and class; nan if undefined."""
    # (IoU, recall, class, area range, max detections), -1 if undefined.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(axis=1))


def _to_coco(table: BoxTable, num_classes: int):
    """Returns the table as a pycocotools `COCO` object; unlike `loadRes`, it may be empty."""
    from pycocotools.coco import COCO

    sizes = table.boxes[:, 2:] - table.boxes[:, :2]
    columns = {
        "image_id": table.image,
        "category_id": table.labels,
        "bbox": np.concatenate([table.boxes[:, :2], sizes], axis=1),  # xywh
        "area": table.area,
        "iscrowd": table.iscrowd.astype(int),
        "score": table.confidence,
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    index = COCO()
    index.dataset = {
        "images": [{"id": image} for image in range(table.num_images)],
        "categories": [{"id": label} for label in range(num_classes)],
        # From 1: pycocotools takes a match with id 0 for no match.
        "annotations": [
            {"id": number, **dict(zip(columns, row, strict=True))}
            for number, row in enumerate(rows, 1)
        ],
    }
    index.createIndex()
    return index
