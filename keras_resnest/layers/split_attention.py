"""Split-Attention, the building block of ResNeSt."""

import keras
from keras import ops

from keras_resnest.checks import check_fractions, check_positive, checked
from keras_resnest.layers.base import DataFormat, FeatureMapLayer
from keras_resnest.layers.regularization import DropBlock2D


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class RadixSoftmax(FeatureMapLayer):
    """Softmax across the splits of every channel, or a sigmoid for a single split.

    Reorders the channels: a convolution with `groups=cardinality` emits them as (cardinality,
    radix, channel), but the feature maps of Split-Attention are (radix, cardinality, channel).

    Args:
        radix: positive integer, number of splits.
        cardinality: positive integer, number of cardinal groups.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, 1, 1, channels)`, or `(batch, channels, 1, 1)`: cardinality-major logits.

    Returns:
        Radix-major attention of the same shape: with `C = channels / radix`, channels `r * C`
        to `(r + 1) * C - 1` belong to split `r`.

    Raises:
        ValueError: if `radix` or `cardinality` is not positive, or their product does not
            divide the number of channels.

    Example:
        >>> float(RadixSoftmax(radix=2)(keras.ops.zeros((1, 1, 1, 4)))[0, 0, 0, 0])
        0.5

    Source: ResNeSt, https://arxiv.org/abs/2004.08955, section 3.1.
    """

    def __init__(
        self, radix: int, cardinality: int = 1, data_format: DataFormat | None = None, **kwargs
    ):
        super().__init__(data_format, **kwargs)
        check_positive(radix=radix, cardinality=cardinality)
        self.radix = radix
        self.cardinality = cardinality
        self.built = True

    def call(self, inputs):
        if self.radix == 1:
            return ops.sigmoid(inputs)
        channels = inputs.shape[self._channel_axis]
        if channels % (self.radix * self.cardinality):
            raise ValueError(
                "The number of channels must be divisible by radix * cardinality. Received: "
                f"{channels} channels, radix={self.radix}, cardinality={self.cardinality}"
            )
        width = channels // self.radix // self.cardinality
        x = ops.reshape(inputs, (-1, self.cardinality, self.radix, width))
        x = ops.softmax(x, axis=2)
        if self.cardinality > 1:
            x = ops.transpose(x, (0, 2, 1, 3))  # (batch, radix, cardinality, width)
        return ops.reshape(x, (-1, *inputs.shape[1:]))

    def get_config(self) -> dict:
        return {**super().get_config(), "radix": self.radix, "cardinality": self.cardinality}


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class SplitAttention(FeatureMapLayer):
    """Split-Attention convolution.

    A grouped convolution makes `radix` feature maps (splits) of `filters` channels. Two small
    dense layers turn the global average of their sum into an attention over the splits, channel
    by channel, and the output is the weighted sum of the splits.

    Args:
        filters: positive integer, channels of the output.
        kernel_size: integer or pair of integers.
        strides: integer or pair of integers.
        padding: `"same"` or `"valid"`.
        dilation_rate: integer or pair of integers.
        radix: positive integer, number of splits. With 1, the attention is a sigmoid gate.
        cardinality: positive integer, number of cardinal groups.
        reduction_ratio: positive float. The attention has
            `max(int(input_channels * radix * reduction_ratio), 32)` hidden channels.
        use_bias: whether the convolution has a bias.
        use_batch_norm: whether to normalize after the convolution and the first dense layer.
        dropblock_rate: float in [0, 1), see `DropBlock2D`.
        dropblock_size: positive integer, side of the dropped blocks.
        kernel_initializer: initializer of all kernels.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Returns:
        Feature map with `filters` channels, in the layout of the input.

    Raises:
        ValueError: if an argument is out of range, or the groups do not divide the input
            channels, the hidden channels or `filters`.

    Example:
        >>> layer = SplitAttention(64, radix=2)
        >>> layer(keras.ops.ones((1, 8, 8, 32))).shape
        (1, 8, 8, 64)

    Source: ResNeSt, https://arxiv.org/abs/2004.08955, section 3.1 and figure 2, with the
    radix-major layout of section 3.3.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, int] = 3,
        strides: int | tuple[int, int] = 1,
        padding: str = "same",
        dilation_rate: int | tuple[int, int] = 1,
        radix: int = 2,
        cardinality: int = 1,
        reduction_ratio: float = 0.25,
        use_bias: bool = False,
        use_batch_norm: bool = True,
        dropblock_rate: float = 0.0,
        dropblock_size: int = 3,
        kernel_initializer="he_normal",
        data_format: DataFormat | None = None,
        **kwargs,
    ):
        super().__init__(data_format, **kwargs)
        check_positive(
            filters=filters, radix=radix, cardinality=cardinality, reduction_ratio=reduction_ratio
        )
        check_fractions(dropblock_rate=dropblock_rate)
        self.filters = filters
        self.kernel_size = kernel_size
        self.strides = strides
        self.padding = padding
        self.dilation_rate = dilation_rate
        self.radix = radix
        self.cardinality = cardinality
        self.reduction_ratio = reduction_ratio
        self.use_bias = use_bias
        self.use_batch_norm = use_batch_norm
        self.dropblock_rate = dropblock_rate
        self.dropblock_size = dropblock_size
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

        self.conv = self._convolution(
            filters * radix,
            kernel_size,
            "conv",
            strides=strides,
            padding=padding,
            dilation_rate=dilation_rate,
            groups=radix * cardinality,
            use_bias=use_bias,
            kernel_initializer=self.kernel_initializer.clone(),
        )
        self.bn0 = self._batch_norm("bn0") if use_batch_norm else None
        options = {"data_format": self.data_format, "dtype": self.dtype_policy}
        self.dropblock = None
        if dropblock_rate > 0:
            self.dropblock = DropBlock2D(
                dropblock_rate, dropblock_size, name="dropblock", **options
            )
        self.bn1 = self._batch_norm("bn1") if use_batch_norm else None
        self.fc2 = self._dense(filters * radix, "fc2")
        self.radix_softmax = RadixSoftmax(radix, cardinality, name="radix_softmax", **options)
        self._layers_made()

    def _dense(self, units, name):
        # A grouped dense layer over (batch, 1, 1, channels) is a grouped 1x1 convolution.
        kernel_initializer = self.kernel_initializer.clone()
        return self._convolution(
            units, 1, name, groups=self.cardinality, kernel_initializer=kernel_initializer
        )

    def build(self, input_shape):
        channels = input_shape[self._channel_axis]
        hidden = max(int(channels * self.radix * self.reduction_ratio), 32)
        for what, size in (("filters", self.filters), ("hidden channels", hidden)):
            if size % self.cardinality:
                raise ValueError(
                    f"The number of {what} must be divisible by the cardinality. Received: "
                    f"{size} {what}, cardinality={self.cardinality}"
                )
        self.fc1 = self._dense(hidden, "fc1")
        self.conv.build(input_shape)
        self.fc1.build(self._pooled_shape(self.filters))
        self.fc2.build(self._pooled_shape(hidden))
        if self.use_batch_norm:
            self.bn0.build(self.conv.compute_output_shape(input_shape))
            self.bn1.build(self._pooled_shape(hidden))
        self._layers_made()
        self.built = True

    def call(self, inputs, training=None):
        splits = self._splits(inputs, training)  # (batch, height, width, radix * filters)
        attention = self._attention(splits, training)  # (batch, 1, 1, radix * filters)
        if self.radix == 1:
            return splits * attention
        splits = ops.split(splits, self.radix, axis=self._channel_axis)
        attention = ops.split(attention, self.radix, axis=self._channel_axis)
        outputs = splits[0] * attention[0]
        for split, weight in zip(splits[1:], attention[1:], strict=True):
            outputs = outputs + split * weight
        return outputs

    def _splits(self, inputs, training):
        x = self.conv(inputs)
        if self.bn0 is not None:
            x = self.bn0(x, training=training)
        if self.dropblock is not None:
            x = self.dropblock(x, training=training)
        return ops.relu(x)

    def _attention(self, splits, training):
        # Averaging before summing gives the same result on much smaller arrays.
        x = ops.mean(splits, axis=self._spatial_axes, keepdims=True)
        if self.radix > 1:
            x = sum(ops.split(x, self.radix, axis=self._channel_axis))
        x = self.fc1(x)
        if self.bn1 is not None:
            x = self.bn1(x, training=training)
        return self.radix_softmax(self.fc2(ops.relu(x)))

    def compute_output_shape(self, input_shape):
        return self._with_channels(self.conv.compute_output_shape(input_shape), self.filters)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "radix": self.radix,
            "cardinality": self.cardinality,
            "reduction_ratio": self.reduction_ratio,
            "use_bias": self.use_bias,
            "use_batch_norm": self.use_batch_norm,
            "dropblock_rate": self.dropblock_rate,
            "dropblock_size": self.dropblock_size,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
