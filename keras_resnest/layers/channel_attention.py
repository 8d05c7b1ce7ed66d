"""Attention over channels: squeeze-and-excitation and selective kernels."""

import keras
from keras import ops

from keras_resnest.layers.convolution import GroupedConv2D
from keras_resnest.layers.normalization import BatchNormalization
from keras_resnest.layers.split_attention import RadixSoftmax


@keras.saving.register_keras_serializable("keras_resnest")
class SqueezeExcitation(keras.layers.Layer):
    """Scales every channel by a gate that is computed from the averages of all channels.

    Global average pooling, a dense layer with ReLU and a dense layer with a sigmoid give one
    factor between 0 and 1 per image and channel.

    Args:
        hidden_channels: positive integer, units of the first dense layer.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)`.

    Returns:
        Feature map of the same shape.

    Raises:
        ValueError: if `hidden_channels` is not positive.

    Example:
        >>> SqueezeExcitation(16)(keras.ops.ones((1, 8, 8, 64))).shape
        (1, 8, 8, 64)

    Source: Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507, section 3.
    """

    def __init__(self, hidden_channels: int, data_format: str | None = None, **kwargs):
        super().__init__(**kwargs)
        if not hidden_channels > 0:
            raise ValueError(
                f"`hidden_channels` must be positive. Received: hidden_channels={hidden_channels}"
            )
        self.hidden_channels = hidden_channels
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        self._channel_axis = -1 if self.data_format == "channels_last" else 1
        self._spatial_axes = (1, 2) if self.data_format == "channels_last" else (2, 3)
        self.fc1 = self._dense(hidden_channels, "fc1")

    def _dense(self, units, name):
        return GroupedConv2D(
            units, 1, data_format=self.data_format, dtype=self.dtype_policy, name=name
        )

    def build(self, input_shape):
        shape = [None, 1, 1, 1]
        shape[self._channel_axis] = input_shape[self._channel_axis]
        self.fc1.build(tuple(shape))
        self.fc2 = self._dense(shape[self._channel_axis], "fc2")
        self.fc2.build(self.fc1.compute_output_shape(tuple(shape)))
        self.built = True

    def call(self, inputs):
        averages = ops.mean(inputs, axis=self._spatial_axes, keepdims=True)
        return inputs * ops.sigmoid(self.fc2(ops.relu(self.fc1(averages))))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_channels": self.hidden_channels,
            "data_format": self.data_format,
        }


@keras.saving.register_keras_serializable("keras_resnest")
class SelectiveKernel(keras.layers.Layer):
    """Selective kernel convolution: an attention chooses between receptive fields.

    Each path is a 3x3 convolution, batch normalization and ReLU; path `i` has dilation `i + 1`,
    so that two paths see 3x3 and 5x5 cells. A softmax over the paths, computed from the averages
    of their sum, says how much of each path goes into the result, channel by channel.

    Args:
        filters: positive integer, channels of the output.
        strides: integer, 1 or 2.
        num_paths: integer, number of paths. With `strides=2` at most 2.
        groups: positive integer, channel groups of the convolutions.
        reduction_ratio: positive float. The attention has `filters * reduction_ratio` hidden
            channels, rounded to a multiple of `divisor`.
        divisor: positive integer, see `reduction_ratio`.
        split_input: whether each path sees its own share of the input channels, or all of them.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)`.

    Returns:
        Feature map with `filters` channels in the same layout.

    Raises:
        ValueError: if an argument is out of its range, or the input channels are not divisible
            by the number of paths that share them.

    Example:
        >>> SelectiveKernel(64, strides=2)(keras.ops.ones((1, 8, 8, 32))).shape
        (1, 4, 4, 64)

    Source: Selective Kernel Networks, https://arxiv.org/abs/1903.06586, section 3.1.
    """

    def __init__(
        self,
        filters: int,
        strides: int = 1,
        num_paths: int = 2,
        groups: int = 1,
        reduction_ratio: float = 1 / 16,
        divisor: int = 8,
        split_input: bool = False,
        data_format: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if strides not in (1, 2) or num_paths < 1 or (strides == 2 and num_paths > 2):
            raise ValueError(
                "`strides` must be 1 or 2, and `num_paths` positive, at most 2 with `strides=2`. "
                f"Received: strides={strides}, num_paths={num_paths}"
            )
        self.filters = filters
        self.strides = strides
        self.num_paths = num_paths
        self.groups = groups
        self.reduction_ratio = reduction_ratio
        self.divisor = divisor
        self.split_input = split_input
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        channels_last = self.data_format == "channels_last"
        self._channel_axis = -1 if channels_last else 1
        self._spatial_axes = (1, 2) if channels_last else (2, 3)
        self._options = {"data_format": self.data_format, "dtype": self.dtype_policy}
        self.pads, self.convs, self.norms = [], [], []
        for i in range(num_paths):
            # A stride of 2 at dilation 2 only meets every second cell: see `_path_map`.
            dilation, path_strides = (1, 1) if strides == 2 and i == 1 else (i + 1, strides)
            self.pads.append(
                keras.layers.ZeroPadding2D(dilation, name=f"paths_{i}_pad", **self._options)
            )
            self.convs.append(
                GroupedConv2D(
                    filters,
                    3,
                    strides=path_strides,
                    dilation_rate=dilation,
                    groups=groups,
                    use_bias=False,
                    kernel_initializer="he_normal",
                    name=f"paths_{i}_conv",
                    **self._options,
                )
            )
            self.norms.append(self._batch_norm(f"paths_{i}_bn"))
        hidden = rounded_channels(filters * reduction_ratio, divisor)
        self.fc_reduce = self._dense(hidden, "attn_fc_reduce")
        self.attention_norm = self._batch_norm("attn_bn")
        self.fc_select = self._dense(filters * num_paths, "attn_fc_select")
        self.path_softmax = RadixSoftmax(num_paths, 1, name="path_softmax", **self._options)

    def _batch_norm(self, name):
        return BatchNormalization(
            axis=self._channel_axis,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype_policy,
            name=name,
        )

    def _dense(self, units, name):
        return GroupedConv2D(
            units,
            1,
            use_bias=False,
            kernel_initializer="he_normal",
            name=name,
            **self._options,
        )

    def build(self, input_shape):
        shape = list(input_shape)
        if self.split_input:
            if shape[self._channel_axis] % self.num_paths:
                raise ValueError(
                    "With `split_input` the input channels must be divisible by `num_paths`. "
                    f"Received: input_shape={tuple(input_shape)}, num_paths={self.num_paths}"
                )
            shape[self._channel_axis] //= self.num_paths
        for axis in self._spatial_axes:
            shape[axis] = None  # the padding is still to come
        output_shape = self.compute_output_shape(input_shape)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            conv.build(tuple(shape))
            norm.build(output_shape)
        pooled = [None, 1, 1, 1]
        pooled[self._channel_axis] = self.filters
        self.fc_reduce.build(tuple(pooled))
        hidden_shape = self.fc_reduce.compute_output_shape(tuple(pooled))
        self.attention_norm.build(hidden_shape)
        self.fc_select.build(hidden_shape)
        self.built = True

    def call(self, inputs, training=None):
        if self.split_input:
            parts = ops.split(inputs, self.num_paths, axis=self._channel_axis)
        else:
            parts = [inputs] * self.num_paths
        maps = [self._path_map(i, part, training) for i, part in enumerate(parts)]
        x = ops.mean(sum(maps), axis=self._spatial_axes, keepdims=True)
        x = self.attention_norm(self.fc_reduce(x), training=training)
        attention = self.path_softmax(self.fc_select(ops.relu(x)))
        attention = ops.split(attention, self.num_paths, axis=self._channel_axis)
        return sum(x * weight for x, weight in zip(maps, attention, strict=True))

    def _path_map(self, i, x, training):
        if self.strides == 2 and i == 1:
            last = self.data_format == "channels_last"
            x = x[:, ::2, ::2, :] if last else x[:, :, ::2, ::2]
        x = self.convs[i](self.pads[i](x))
        return ops.relu(self.norms[i](x, training=training))

    def compute_output_shape(self, input_shape):
        shape = list(input_shape)
        for axis in self._spatial_axes:
            shape[axis] = None if shape[axis] is None else -(-shape[axis] // self.strides)
        shape[self._channel_axis] = self.filters
        return tuple(shape)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "strides": self.strides,
            "num_paths": self.num_paths,
            "groups": self.groups,
            "reduction_ratio": self.reduction_ratio,
            "divisor": self.divisor,
            "split_input": self.split_input,
            "data_format": self.data_format,
        }


def rounded_channels(channels: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to a number of channels, at least one `divisor`.

    Example:
        >>> rounded_channels(100 / 16, 8)
        8
    """
    return max(divisor, int(channels + divisor / 2) // divisor * divisor)
