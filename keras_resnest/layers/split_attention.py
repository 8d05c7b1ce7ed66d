"""Split-Attention, the unit of ResNeSt."""

import keras
from keras import ops

from keras_resnest.layers.convolution import GroupedConv2D
from keras_resnest.layers.normalization import BatchNormalization
from keras_resnest.layers.regularization import DropBlock2D


@keras.saving.register_keras_serializable("keras_resnest")
class RadixSoftmax(keras.layers.Layer):
    """Softmax across the splits of every channel; a sigmoid if there is one split only.

    A convolution with `groups=cardinality` gives its channels in the order (cardinality, radix,
    channel), feature maps of Split-Attention have (radix, cardinality, channel). The layer
    brings the first into the second.

    Args:
        radix: positive integer, number of splits.
        cardinality: positive integer, number of cardinal groups.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, 1, 1, channels)`, or `(batch, channels, 1, 1)`: logits, cardinality-major.

    Returns:
        Attention of the same shape, radix-major: channels `r * C` to `(r + 1) * C - 1`, with
        `C = channels / radix`, belong to split `r`.

    Raises:
        ValueError: if `radix` or `cardinality` is not positive, or the channels cannot be
            divided by their product.

    Example:
        >>> float(RadixSoftmax(radix=2)(keras.ops.zeros((1, 1, 1, 4)))[0, 0, 0, 0])
        0.5

    Source: ResNeSt, https://arxiv.org/abs/2004.08955, section 3.1.
    """

    def __init__(self, radix: int, cardinality: int = 1, data_format: str | None = None, **kwargs):
        super().__init__(**kwargs)
        _check_positive(radix=radix, cardinality=cardinality)
        self.radix = radix
        self.cardinality = cardinality
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        self.built = True

    def call(self, inputs):
        if self.radix == 1:
            return ops.sigmoid(inputs)
        channels = inputs.shape[-1 if self.data_format == "channels_last" else 1]
        if channels % (self.radix * self.cardinality):
            raise ValueError(
                "The number of channels must be divisible by radix * cardinality. Received: "
                f"{channels} channels, radix={self.radix}, cardinality={self.cardinality}"
            )
        width = channels // self.radix // self.cardinality
        x = ops.reshape(inputs, (-1, self.cardinality, self.radix, width))
        x = ops.softmax(x, axis=2)
        if self.cardinality > 1:
            x = ops.transpose(x, (0, 2, 1, 3))
        return ops.reshape(x, (-1, *inputs.shape[1:]))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "radix": self.radix,
            "cardinality": self.cardinality,
            "data_format": self.data_format,
        }


@keras.saving.register_keras_serializable("keras_resnest")
class SplitAttention(keras.layers.Layer):
    """Split-Attention convolution.

    One grouped convolution makes `radix` feature maps (splits) of `filters` channels. The
    average of their sum, passed through two small dense layers, says how much of each split
    goes into the result, channel by channel.

    Args:
        filters: positive integer, channels of the output.
        kernel_size: integer or pair of integers, size of the convolution.
        strides: integer or pair of integers, strides of the convolution.
        padding: `"same"` or `"valid"`, padding of the convolution.
        dilation_rate: integer or pair of integers, dilation of the convolution.
        radix: positive integer, number of splits. With 1 the attention is a sigmoid gate.
        cardinality: positive integer, number of cardinal groups.
        reduction_ratio: positive float. The attention has
            `max(int(input_channels * radix * reduction_ratio), 32)` hidden channels.
        use_bias: whether the convolution has a bias.
        use_batch_norm: whether batch normalization follows the convolution and the first dense
            layer.
        dropblock_rate: float in [0, 1), share of values dropped in blocks while training.
        dropblock_size: positive integer, side of these blocks.
        kernel_initializer: initializer of all kernels.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)`.

    Returns:
        Feature map with `filters` channels in the same layout.

    Raises:
        ValueError: if an argument is out of its range, or the input channels, the hidden
            channels or `filters` are not divisible as the groups ask for.

    Example:
        >>> layer = SplitAttention(64, radix=2)
        >>> layer(keras.ops.ones((1, 8, 8, 32))).shape
        (1, 8, 8, 64)

    Source: ResNeSt, https://arxiv.org/abs/2004.08955, section 3.1 and figure 2; radix-major
    layout as in its section 3.3.
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
        data_format: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_positive(
            filters=filters, radix=radix, cardinality=cardinality, reduction_ratio=reduction_ratio
        )
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
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        self._channel_axis = -1 if self.data_format == "channels_last" else 1
        self._spatial_axes = (1, 2) if self.data_format == "channels_last" else (2, 3)

        self.conv = GroupedConv2D(
            filters * radix,
            kernel_size,
            strides=strides,
            padding=padding,
            dilation_rate=dilation_rate,
            groups=radix * cardinality,
            use_bias=use_bias,
            kernel_initializer=self.kernel_initializer.clone(),
            data_format=self.data_format,
            dtype=self.dtype_policy,
            name="conv",
        )
        self.bn0 = self._batch_norm("bn0")
        self.dropblock = None
        if dropblock_rate > 0:
            self.dropblock = DropBlock2D(
                dropblock_rate,
                dropblock_size,
                data_format=self.data_format,
                dtype=self.dtype_policy,
                name="dropblock",
            )
        self.bn1 = self._batch_norm("bn1")
        self.fc2 = self._dense(filters * radix, "fc2")
        self.radix_softmax = RadixSoftmax(
            radix,
            cardinality,
            data_format=self.data_format,
            dtype=self.dtype_policy,
            name="radix_softmax",
        )

    def _batch_norm(self, name):
        if not self.use_batch_norm:
            return None
        return BatchNormalization(
            axis=self._channel_axis,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype_policy,
            name=name,
        )

    def _dense(self, units, name):
        # A grouped dense layer over (batch, 1, 1, channels) is a grouped 1x1 convolution.
        return GroupedConv2D(
            units,
            1,
            groups=self.cardinality,
            kernel_initializer=self.kernel_initializer.clone(),
            data_format=self.data_format,
            dtype=self.dtype_policy,
            name=name,
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
        maps_shape = self.conv.compute_output_shape(input_shape)
        self.fc1.build(self._pooled_shape(self.filters))
        self.fc2.build(self._pooled_shape(hidden))
        if self.use_batch_norm:
            self.bn0.build(maps_shape)
            self.bn1.build(self._pooled_shape(hidden))
        self.built = True

    def _pooled_shape(self, channels):
        shape = [None, 1, 1, 1]
        shape[self._channel_axis] = channels
        return tuple(shape)

    def call(self, inputs, training=None):
        maps = self._maps(inputs, training)  # (batch, height, width, radix * filters)
        attention = self._attention(maps, training)  # (batch, 1, 1, radix * filters)
        if self.radix == 1:
            return maps * attention
        # Splitting and adding is as fast as anything on a CPU, in the backward pass too.
        maps = ops.split(maps, self.radix, axis=self._channel_axis)
        attention = ops.split(attention, self.radix, axis=self._channel_axis)
        outputs = maps[0] * attention[0]
        for split, weight in zip(maps[1:], attention[1:], strict=True):
            outputs = outputs + split * weight
        return outputs

    def _maps(self, inputs, training):
        x = self.conv(inputs)
        if self.bn0 is not None:
            x = self.bn0(x, training=training)
        if self.dropblock is not None:
            x = self.dropblock(x, training=training)
        return ops.relu(x)

    def _attention(self, maps, training):
        # The average of the sum of the splits is the sum of their averages, which are small.
        x = ops.mean(maps, axis=self._spatial_axes, keepdims=True)
        if self.radix > 1:
            x = sum(ops.split(x, self.radix, axis=self._channel_axis))
        x = self.fc1(x)
        if self.bn1 is not None:
            x = self.bn1(x, training=training)
        return self.radix_softmax(self.fc2(ops.relu(x)))

    def compute_output_shape(self, input_shape):
        shape = list(self.conv.compute_output_shape(input_shape))
        shape[self._channel_axis] = self.filters
        return tuple(shape)

    def get_config(self):
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
            "data_format": self.data_format,
        }


def _check_positive(**arguments):
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive. Received: {name}={value}")
