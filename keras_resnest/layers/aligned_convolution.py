"""Convolution whose 3x3 sample points follow a box, one box per anchor."""

import keras
import numpy as np
from keras import ops

from keras_resnest.checks import check_counts, checked

# Sample points along a side of a box, as fractions of the side: centers of its thirds.
_THIRDS = np.array([1 / 6, 3 / 6, 5 / 6])


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class AlignedConvolution(keras.layers.Layer):
    """3x3 convolution that reads its features inside a box instead of around a cell.

    Every cell has `num_anchors` boxes. A box with left l, top t, width w and height h reads the
    points (l + w (2i - 1) / 6, t + h (2j - 1) / 6), i, j = 1, 2, 3, bilinearly; outside of the map
    features are zero. Each anchor shape has a 3x3 kernel of its own. For boxes of 3x3 pixels around
    the cells this is a `keras.layers.Conv2D` with padding "same", whose weights have the same
    shapes. There is no gradient into the boxes.

    Args:
        num_anchors: positive integer, boxes of one cell.
        filters: positive integer, outputs of one box.
        use_bias: whether to add a bias.
        kernel_initializer: initializer of the kernel; by default N(0, 0.01), as in the paper.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: list of features (batch, height, width, channels) and `"xyxy"` boxes
            (batch, height * width * num_anchors, 4), by row, column and anchor, in pixels of the
            map: pixel (0, 0) covers [0, 1) x [0, 1). Coordinates may have any value; what is
            infinite or not a number lies outside of the map.

    Returns:
        Tensor (batch, height * width * num_anchors, filters).

    Raises:
        ValueError: if `num_anchors` or `filters` is not a positive integer, the channels are
            unknown, or the numbers of boxes and cells do not fit.

    Example:
        >>> layer = AlignedConvolution(num_anchors=3, filters=4)
        >>> layer([keras.ops.ones((1, 40, 40, 64)), keras.ops.ones((1, 4800, 4))]).shape
        (1, 4800, 4)

    Source: RefineDet++, "Single-Shot Refinement Neural Network for Object Detection", IEEE TCSVT
    2020, section III, "Alignment convolution".
    """

    def __init__(
        self,
        num_anchors: int,
        filters: int,
        use_bias: bool = True,
        kernel_initializer=None,
        **kwargs,
    ):
        # Half precision cannot tell the pixels of a map apart: boxes are not cast.
        super().__init__(autocast=False, **kwargs)
        check_counts(num_anchors=num_anchors, filters=filters)
        self.input_spec = [keras.layers.InputSpec(ndim=4), keras.layers.InputSpec(ndim=3)]
        self.num_anchors = int(num_anchors)
        self.filters = int(filters)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(
            keras.initializers.RandomNormal(stddev=0.01)
            if kernel_initializer is None
            else kernel_initializer
        )

    def build(self, input_shape):
        features, boxes = input_shape
        if features[3] is None:
            raise ValueError(f"The channels must be known. Received: input_shape={input_shape}")
        known = None not in (*features[1:3], boxes[1])
        wanted = features[1] * features[2] * self.num_anchors if known else boxes[1]
        if tuple(boxes[1:]) != (wanted, 4):
            raise ValueError(
                f"Boxes must have shape (batch, height * width * {self.num_anchors}, 4). "
                f"Received: features of shape {features} and boxes of shape {boxes}"
            )
        outputs = self.num_anchors * self.filters
        self.kernel = self.add_weight(
            (3, 3, features[3], outputs), initializer=self.kernel_initializer, name="kernel"
        )
        self.bias = self.add_weight((outputs,), "zeros", name="bias") if self.use_bias else None
        self.built = True

    def call(self, inputs):
        features, boxes = inputs
        batch, height, width, channels = ops.shape(features)
        cells, anchors, filters = height * width, self.num_anchors, self.filters
        # Reading is linear, so the kernel is applied first: fewer numbers are read.
        kernel = ops.transpose(ops.cast(self.kernel, self.compute_dtype), (2, 0, 1, 3))
        kernel = ops.reshape(kernel, (channels, 9 * anchors * filters))
        features = ops.reshape(ops.cast(features, self.compute_dtype), (-1, channels))
        table = ops.reshape(ops.matmul(features, kernel), (-1, filters))  # (B * H * W * 9 * K, F)

        dtype = keras.backend.result_type(self.compute_dtype, "float32")
        boxes = ops.cast(ops.stop_gradient(boxes), dtype)
        boxes = ops.reshape(boxes, (-1, cells, anchors, 4))
        column, column_weight = _pixels(boxes[..., 0], boxes[..., 2], width)  # (B, H * W, K, 2, 3)
        row, row_weight = _pixels(boxes[..., 1], boxes[..., 3], height)
        taps = np.arange(3, dtype="int32")
        image = ops.reshape(ops.arange(batch, dtype="int32") * height, (-1, 1, 1, 1, 1))
        row = (image + row) * width * 9 * anchors + taps * 3 * anchors
        row = row + np.arange(anchors, dtype="int32")[:, None, None]
        column = ops.reshape(column * 9 * anchors + taps * anchors, (-1, 1, 6))
        column_weight = ops.reshape(column_weight, (-1, 1, 6))
        outputs = 0.0
        for side in range(2):  # the row above each point and the row below: half the memory
            index = ops.reshape(row[..., side, :], (-1, 3, 1)) + column
            weight = ops.reshape(row_weight[..., side, :], (-1, 3, 1)) * column_weight
            read = ops.take(table, ops.reshape(index, (-1, 18)), axis=0)
            weight = ops.cast(ops.reshape(weight, (-1, 18, 1)), read.dtype)
            outputs = outputs + ops.sum(read * weight, axis=1)  # (B * H * W * K, F)
        if self.use_bias:
            bias = ops.cast(self.bias, self.compute_dtype)
            outputs = ops.reshape(outputs, (-1, anchors * filters)) + bias
        return ops.reshape(outputs, (-1, cells * anchors, filters))

    def compute_output_shape(self, input_shape):
        features, boxes = input_shape
        return features[0], boxes[1], self.filters

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "num_anchors": self.num_anchors,
            "filters": self.filters,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def _pixels(start, stop, side):
    """The pixels on both sides of the three points between two edges, and their weights.

    Returns int32 indices and weights (..., 2, 3): before and after each point. Pixels outside of
    the map have weight 0.
    """
    points = start[..., None] + (stop - start)[..., None] * ops.cast(_THIRDS, start.dtype)
    points = points - 0.5  # from edges to centers of pixels
    points = ops.where(ops.isnan(points), -1.0, points)
    points = ops.clip(points, -1.0, ops.cast(side, points.dtype))
    before = ops.floor(points)
    after_weight = points - before
    weight = ops.stack([1.0 - after_weight, after_weight], axis=-2)
    before = ops.cast(before, "int32")
    pixel = ops.stack([before, before + 1], axis=-2)
    weight = ops.where(ops.logical_and(pixel >= 0, pixel < side), weight, 0.0)
    return ops.clip(pixel, 0, side - 1), weight
