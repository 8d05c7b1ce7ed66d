"""Anchors, matching, losses, decoding, and the detector made of them."""

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.matching import ATSSMatcher, BoxMatcher
from keras_resnest.boxes.suppression import lower_confidence, suppress_boxes, vote_boxes
from keras_resnest.detection.anchor_fit import AnchorCoverage, anchor_coverage, fit_anchors
from keras_resnest.detection.class_transfer import class_sources
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.detect import (
    REFINEDET320_PLUS,
    REFINEDET512_PLUS,
    MultiScaleDetector,
    TiledDetector,
    to_supervision,
)
from keras_resnest.detection.heads import RefineDetHeads
from keras_resnest.detection.loss import RefineDetLoss

__all__ = [
    "REFINEDET320_PLUS",
    "REFINEDET512_PLUS",
    "ATSSMatcher",
    "AnchorCoverage",
    "AnchorGenerator",
    "BoxMatcher",
    "DetectionDecoder",
    "MultiScaleDetector",
    "RefineDetHeads",
    "RefineDetLoss",
    "TiledDetector",
    "anchor_coverage",
    "class_sources",
    "fit_anchors",
    "lower_confidence",
    "suppress_boxes",
    "to_supervision",
    "vote_boxes",
]
