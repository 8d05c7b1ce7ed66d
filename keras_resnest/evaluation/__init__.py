"""Measures of detections."""

from keras_resnest.evaluation.average_precision import (
    AveragePrecision,
    COCOAveragePrecision,
    coco_average_precision,
    collect_detections,
    evaluate_detections,
    voc_average_precision,
)

__all__ = [
    "AveragePrecision",
    "COCOAveragePrecision",
    "coco_average_precision",
    "collect_detections",
    "evaluate_detections",
    "voc_average_precision",
]
