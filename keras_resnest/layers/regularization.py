"""Regularization of feature maps."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_resnest")
class DropBlock2D(keras.layers.Layer):
    """Sets square blocks of a feature map to zero while training.

    Every channel of every image draws its own blocks. What is kept is scaled up by the share of
    dropped values, so the expected sum of the map does not change. At inference the layer
    returns its input. On maps smaller than the block, the block shrinks to the map.

    Args:
        rate: float in [0, 1), the expected share of dropped values. On a map only a few times as
            large as the block it comes out a little smaller.
        block_size: positive integer, side of the blocks in cells of the map.
        seed: optional integer, for repeatable blocks.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)`.

    Returns:
        Feature map of the same shape.

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
        data_format: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"`rate` must be a number in [0, 1). Received: rate={rate}")
        if int(block_size) != block_size or block_size < 1:
            raise ValueError(
                f"`block_size` must be a positive integer. Received: block_size={block_size}"
            )
        self.rate = rate
        self.block_size = int(block_size)
        self.seed = seed
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True

    def call(self, inputs, training=None):
        if not training or self.rate == 0.0:
            return inputs
        kept = 1.0 - self._dropped_blocks(ops.shape(inputs))
        # Never divides by zero: even if all is dropped, the map stays finite.
        kept_share = ops.maximum(ops.mean(kept), 1e-6)
        return inputs * ops.cast(kept / kept_share, inputs.dtype)

    def _dropped_blocks(self, shape):
        """Float mask of `shape` that is 1 inside of the dropped blocks."""
        channels_first = self.data_format == "channels_first"
        axes = (2, 3) if channels_first else (1, 2)
        height, width = shape[axes[0]], shape[axes[1]]
        rows, row_count, block_height = self._block_centers(height)
        columns, column_count, block_width = self._block_centers(width)
        # A value is kept if none of the centers that reach it is drawn. This many reach it on
        # average, so that the share of dropped values comes out as `rate`.
        reach = ops.cast(block_height * row_count * block_width * column_count, "float32")
        reach = reach / ops.cast(height * width, "float32")
        center_rate = 1.0 - ops.power(1.0 - self.rate, 1.0 / reach)
        allowed = ops.expand_dims(rows, 1) & ops.expand_dims(columns, 0)  # (height, width)
        allowed = ops.expand_dims(allowed, 0 if channels_first else -1)
        noise = keras.random.uniform(shape, seed=self.seed_generator)
        centers = ops.cast((noise < center_rate) & allowed, "float32")
        return ops.max_pool(
            centers, self.block_size, strides=1, padding="same", data_format=self.data_format
        )

    def _block_centers(self, size):
        """Along one axis: mask of the places a block's center may take, their number, and the
        length of a block. Blocks lie inside of the map, and shrink to it if it is smaller."""
        before, after = self.block_size // 2, (self.block_size - 1) // 2
        first = ops.minimum(before, size // 2)
        last = ops.maximum(size - 1 - after, first)
        positions = ops.arange(size)
        mask = (positions >= first) & (positions <= last)
        return mask, last - first + 1, ops.minimum(self.block_size, size)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "rate": self.rate,
            "block_size": self.block_size,
            "seed": self.seed,
            "data_format": self.data_format,
        }
