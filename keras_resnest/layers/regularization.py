"""Regularization of feature maps."""

import keras
from keras import ops

from keras_resnest.checks import check_counts, check_fractions, checked
from keras_resnest.layers.base import DataFormat, FeatureMapLayer


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class DropBlock2D(FeatureMapLayer):
    """Zeroes square blocks of a feature map during training.

    Blocks are drawn per channel and image. The remaining values are scaled up to preserve the
    expected sum. On maps smaller than the block, the block shrinks to the map.

    Args:
        rate: float in [0, 1), expected fraction of dropped values. The actual fraction is a
            little smaller on maps only a few times as large as the block.
        block_size: positive integer, side of the blocks in cells.
        seed: optional integer, for repeatable blocks.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Returns:
        Feature map of the input's shape.

    Raises:
        ValueError: if `rate` is not in [0, 1) or `block_size` is not a positive integer.

    Example:
        >>> layer = DropBlock2D(rate=0.1, block_size=3)
        >>> layer(keras.ops.ones((1, 8, 8, 4)), training=True).shape
        (1, 8, 8, 4)

    Source: DropBlock, https://arxiv.org/abs/1810.12890, algorithm 1.
    """

    def __init__(
        self,
        rate: float,
        block_size: int = 7,
        seed: int | None = None,
        data_format: DataFormat | None = None,
        **kwargs,
    ):
        super().__init__(data_format, **kwargs)
        check_fractions(rate=rate)
        if rate == 1.0:
            raise ValueError("`rate` must be below 1. Received: rate=1")
        check_counts(block_size=block_size)
        self.rate = rate
        self.block_size = int(block_size)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True

    def call(self, inputs, training=None):
        if not training or self.rate == 0.0:
            return inputs
        kept = 1.0 - self._dropped_blocks(ops.shape(inputs))
        # Avoid dividing by zero when everything is dropped.
        kept_fraction = ops.maximum(ops.mean(kept), 1e-6)
        return inputs * ops.cast(kept / kept_fraction, inputs.dtype)

    def _dropped_blocks(self, shape):
        """Returns a float mask of `shape` that is 1 inside dropped blocks."""
        height, width = (shape[axis] for axis in self._spatial_axes)
        rows, row_count, block_height = self._block_centers(height)
        columns, column_count, block_width = self._block_centers(width)
        # A value is kept if no center within reach of it is drawn. The average number of such
        # centers determines the center rate that drops a fraction `rate` of the values.
        reach = ops.cast(block_height * row_count * block_width * column_count, "float32")
        reach = reach / ops.cast(height * width, "float32")
        center_rate = 1.0 - ops.power(1.0 - self.rate, 1.0 / reach)
        allowed = ops.expand_dims(rows, 1) & ops.expand_dims(columns, 0)  # (height, width)
        allowed = ops.expand_dims(allowed, 0 if self.data_format == "channels_first" else -1)
        noise = keras.random.uniform(shape, seed=self.seed_generator)
        centers = ops.cast((noise < center_rate) & allowed, "float32")
        return ops.max_pool(
            centers, self.block_size, strides=1, padding="same", data_format=self.data_format
        )

    def _block_centers(self, size):
        """Returns, for one axis, the mask of valid centers, their number and the block's side."""
        before, after = self.block_size // 2, (self.block_size - 1) // 2
        first = ops.minimum(before, size // 2)
        last = ops.maximum(size - 1 - after, first)
        positions = ops.arange(size)
        mask = (positions >= first) & (positions <= last)
        return mask, last - first + 1, ops.minimum(self.block_size, size)

    def get_config(self) -> dict:
        config = {"rate": self.rate, "block_size": self.block_size, "seed": self.seed}
        return {**super().get_config(), **config}
