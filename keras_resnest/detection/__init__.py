"""Anchors, matching, losses, decoding, and the detector made of them."""

from keras_resnest.detection.anchors import AnchorGenerator
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.losses import MultiBoxLoss
from keras_resnest.detection.matching import BoxMatcher

__all__ = ["AnchorGenerator", "BoxMatcher", "DetectionDecoder", "MultiBoxLoss"]
