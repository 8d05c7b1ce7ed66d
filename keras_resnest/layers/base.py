"""Base class of layers on feature maps."""

from typing import Literal

import keras

from keras_resnest.layers.changes import KeepsLayerChanges
from keras_resnest.layers.convolution import GroupedConv2D
from keras_resnest.layers.normalization import BatchNormalization

DataFormat = Literal["channels_last", "channels_first"]


class FeatureMapLayer(KeepsLayerChanges, keras.layers.Layer):
    """Base of layers on feature maps: `(batch, height, width, channels)` or channels first.

    Args:
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(self, data_format: DataFormat | None = None, **kwargs):
        super().__init__(**kwargs)
        self.data_format = data_format or keras.config.image_data_format()
        self.input_spec = keras.layers.InputSpec(ndim=4)

    @property
    def _channel_axis(self) -> int:
        return -1 if self.data_format == "channels_last" else 1

    @property
    def _spatial_axes(self) -> tuple[int, int]:
        return (1, 2) if self.data_format == "channels_last" else (2, 3)

    def _with_channels(self, shape, channels: int) -> tuple:
        """Returns `shape` with another number of channels."""
        shape = list(shape)
        shape[self._channel_axis] = channels
        return tuple(shape)

    def _pooled_shape(self, channels: int) -> tuple:
        """Returns the shape of a globally pooled map."""
        return self._with_channels((None, 1, 1, 1), channels)

    def _convolution(self, filters: int, kernel_size, name: str, **options) -> GroupedConv2D:
        options = {"data_format": self.data_format, "dtype": self.dtype_policy, **options}
        return GroupedConv2D(filters, kernel_size, name=name, **options)

    def _batch_norm(self, name: str) -> BatchNormalization:
        return BatchNormalization(
            axis=self._channel_axis, momentum=0.9, epsilon=1e-5, dtype=self.dtype_policy, name=name
        )

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "data_format": self.data_format}
