"""Mixing channels between groups."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_resnest")
class ChannelShuffle(keras.layers.Layer):
    """Deals the channels of each group out over the map, as one deals cards.

    Seen as a table with a row per group, the channels are read column by column: with two groups
    `a b c d` becomes `a c b d`. The layer with `channels // groups` groups undoes it.

    Args:
        groups: positive integer, which divides the number of channels.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)`.

    Returns:
        Feature map of the same shape.

    Raises:
        ValueError: if `groups` is not positive or does not divide the number of channels.

    Example:
        >>> x = keras.ops.reshape(keras.ops.arange(4), (1, 1, 1, 4))
        >>> ChannelShuffle(2)(x)[0, 0, 0]
        [0, 2, 1, 3]

    Source: ShuffleNet, https://arxiv.org/abs/1707.01083, section 3.1.
    """

    def __init__(self, groups: int, data_format: str | None = None, **kwargs):
        super().__init__(**kwargs)
        if not groups > 0:
            raise ValueError(f"`groups` must be positive. Received: groups={groups}")
        self.groups = groups
        self.data_format = keras.config.image_data_format() if data_format is None else data_format

    def build(self, input_shape):
        channels = input_shape[-1 if self.data_format == "channels_last" else 1]
        if channels % self.groups:
            raise ValueError(
                "`groups` must divide the number of channels. "
                f"Received: groups={self.groups}, input_shape={tuple(input_shape)}"
            )
        self.built = True

    def call(self, inputs):
        shape = ops.shape(inputs)
        if self.data_format == "channels_last":
            channels = inputs.shape[-1]
            table = (*shape[:3], self.groups, channels // self.groups)
            order = (0, 1, 2, 4, 3)
        else:
            channels = inputs.shape[1]
            table = (shape[0], self.groups, channels // self.groups, *shape[2:])
            order = (0, 2, 1, 3, 4)
        return ops.reshape(ops.transpose(ops.reshape(inputs, table), order), shape)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "groups": self.groups, "data_format": self.data_format}
