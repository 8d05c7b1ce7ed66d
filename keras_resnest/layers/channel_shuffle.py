"""Channel shuffle of ShuffleNet."""

import keras
from keras import ops

from keras_resnest.checks import check_positive, checked
from keras_resnest.layers.base import DataFormat, FeatureMapLayer


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class ChannelShuffle(FeatureMapLayer):
    """Interleaves the channels of all groups.

    With two groups the channels `a b c d` become `a c b d`. A second shuffle with
    `channels // groups` groups restores the order.

    Args:
        groups: positive integer that divides the number of channels.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Returns:
        Feature map of the input's shape.

    Raises:
        ValueError: if `groups` is not positive or does not divide the number of channels.

    Example:
        >>> x = keras.ops.reshape(keras.ops.arange(4), (1, 1, 1, 4))
        >>> ChannelShuffle(2)(x)[0, 0, 0]
        [0, 2, 1, 3]

    Source: ShuffleNet, https://arxiv.org/abs/1707.01083, section 3.1.
    """

    def __init__(self, groups: int, data_format: DataFormat | None = None, **kwargs):
        super().__init__(data_format, **kwargs)
        check_positive(groups=groups)
        self.groups = groups

    def build(self, input_shape):
        if input_shape[self._channel_axis] % self.groups:
            raise ValueError(
                "`groups` must divide the number of channels. "
                f"Received: groups={self.groups}, input_shape={tuple(input_shape)}"
            )
        self.built = True

    def call(self, inputs):
        shape = ops.shape(inputs)
        width = inputs.shape[self._channel_axis] // self.groups
        if self.data_format == "channels_last":
            grouped, order = (*shape[:3], self.groups, width), (0, 1, 2, 4, 3)
        else:
            grouped, order = (shape[0], self.groups, width, *shape[2:]), (0, 2, 1, 3, 4)
        return ops.reshape(ops.transpose(ops.reshape(inputs, grouped), order), shape)

    def get_config(self) -> dict:
        return {**super().get_config(), "groups": self.groups}
