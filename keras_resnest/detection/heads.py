"""PredictionHead: box offsets and class logits of every anchor of every level."""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_resnest")
class PredictionHead(layers.Layer):
    """One 3x3 convolution for boxes and one for classes on each pyramid level.

    The same class serves both stages of RefineDet: two logits make the Anchor
    Refinement Module, `num_classes + 1` the Object Detection Module.

    Args:
        num_anchors: anchors of one cell, for each level.
        num_outputs: class logits of one anchor, the background included.
        **kwargs: see `keras.layers.Layer`.

    Call with a list of feature maps (batch, height, width, channels), one for each
    level. Returns offsets (batch, anchors, 4) and logits (batch, anchors,
    num_outputs); anchors run over level, row, column, anchor of the cell.

    Source: RefineDet (arXiv 1711.06897) section 3.1.

    Example:

    >>> offsets, logits = PredictionHead((3, 3), num_outputs=2)([p3, p4])
    """

    def __init__(self, num_anchors, num_outputs: int, **kwargs):
        super().__init__(**kwargs)
        self.num_anchors = tuple(int(n) for n in num_anchors)
        self.num_outputs = int(num_outputs)
        self.box_convolutions = self._convolutions("boxes", 4)
        self.class_convolutions = self._convolutions("classes", self.num_outputs)

    def _convolutions(self, name: str, outputs: int) -> list:
        return [
            layers.Conv2D(
                n * outputs, 3, padding="same", dtype=self.dtype_policy, name=f"{name}_{i}"
            )
            for i, n in enumerate(self.num_anchors)
        ]

    def build(self, input_shape):
        if len(input_shape) != len(self.num_anchors):
            raise ValueError(
                f"{self.name} wants one feature map per entry of `num_anchors`="
                f"{self.num_anchors}. Received: {len(input_shape)} feature maps"
            )
        for convolutions in (self.box_convolutions, self.class_convolutions):
            for convolution, shape in zip(convolutions, input_shape, strict=True):
                convolution.build(shape)
        super().build(input_shape)

    def call(self, features):
        return (
            self._flatten(self.box_convolutions, features, 4),
            self._flatten(self.class_convolutions, features, self.num_outputs),
        )

    @staticmethod
    def _flatten(convolutions, features, outputs: int):
        maps = [convolution(x) for convolution, x in zip(convolutions, features, strict=True)]
        rows = [ops.reshape(m, _rows_shape(m, outputs)) for m in maps]
        return ops.concatenate(rows, axis=1)  # (B, anchors, outputs)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "num_anchors": self.num_anchors,
            "num_outputs": self.num_outputs,
        }


def _rows_shape(feature_map, outputs: int) -> tuple:
    """(batch, anchors, outputs) of a map; one of the first two is open, -1."""
    sides = feature_map.shape[1:]
    if None in sides:
        return ops.shape(feature_map)[0], -1, outputs
    return -1, sides[0] * sides[1] * sides[2] // outputs, outputs
