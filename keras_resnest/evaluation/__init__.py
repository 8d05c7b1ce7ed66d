"""Average precision and error analysis of detections."""

from keras_resnest.evaluation.coco import COCOAveragePrecision, coco_average_precision
from keras_resnest.evaluation.collect import collect_detections, evaluate_detections
from keras_resnest.evaluation.oracle import OracleDecomposition, oracle_decomposition
from keras_resnest.evaluation.report import DetectionReport, analyze
from keras_resnest.evaluation.voc import AveragePrecision, voc_average_precision

__all__ = [
    "AveragePrecision",
    "COCOAveragePrecision",
    "DetectionReport",
    "OracleDecomposition",
    "analyze",
    "coco_average_precision",
    "collect_detections",
    "evaluate_detections",
    "oracle_decomposition",
    "voc_average_precision",
]
