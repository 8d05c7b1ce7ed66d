"""Channel attention: squeeze-and-excitation and selective kernels."""

import keras
from keras import ops

from keras_resnest.checks import check_positive, checked
from keras_resnest.layers.base import DataFormat, FeatureMapLayer
from keras_resnest.layers.split_attention import RadixSoftmax


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class SqueezeExcitation(FeatureMapLayer):
    """Scales every channel by a gate computed from the averages of all channels.

    Global average pooling, a dense layer with ReLU and a dense layer with a sigmoid give one
    factor between 0 and 1 per image and channel.

    Args:
        hidden_channels: positive integer, units of the first dense layer.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Returns:
        Feature map of the input's shape.

    Raises:
        ValueError: if `hidden_channels` is not positive.

    Example:
        >>> SqueezeExcitation(16)(keras.ops.ones((1, 8, 8, 64))).shape
        (1, 8, 8, 64)

    Source: Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507, section 3.
    """

    def __init__(self, hidden_channels: int, data_format: DataFormat | None = None, **kwargs):
        super().__init__(data_format, **kwargs)
        check_positive(hidden_channels=hidden_channels)
        self.hidden_channels = hidden_channels
        self.fc1 = self._convolution(hidden_channels, 1, "fc1")
        self._layers_made()

    def build(self, input_shape):
        channels = input_shape[self._channel_axis]
        self.fc1.build(self._pooled_shape(channels))
        self.fc2 = self._convolution(channels, 1, "fc2")
        self.fc2.build(self._pooled_shape(self.hidden_channels))
        self._layers_made()
        self.built = True

    def call(self, inputs):
        averages = ops.mean(inputs, axis=self._spatial_axes, keepdims=True)
        return inputs * ops.sigmoid(self.fc2(ops.relu(self.fc1(averages))))

    def get_config(self) -> dict:
        return {**super().get_config(), "hidden_channels": self.hidden_channels}


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class SelectiveKernel(FeatureMapLayer):
    """Selective kernel convolution: attention over paths with different receptive fields.

    Each path is a 3x3 convolution, batch normalization and ReLU. Path `i` has dilation `i + 1`,
    so that the first two see 3x3 and 5x5 cells. A softmax over the paths, computed from the
    global average of their sum, weights the paths channel by channel.

    Args:
        filters: positive integer, channels of the output.
        strides: integer, 1 or 2.
        num_paths: positive integer, at most 2 with `strides=2`.
        groups: positive integer, channel groups of the convolutions.
        reduction_ratio: positive float. The attention has `filters * reduction_ratio` hidden
            channels, rounded to a multiple of `divisor`.
        divisor: positive integer, see `reduction_ratio`.
        split_input: whether the input channels are divided among the paths.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Returns:
        Feature map with `filters` channels, in the layout of the input.

    Raises:
        ValueError: if an argument is out of range, or the input channels cannot be split
            evenly among the paths.

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
        data_format: DataFormat | None = None,
        **kwargs,
    ):
        super().__init__(data_format, **kwargs)
        check_positive(filters=filters, groups=groups)
        check_positive(reduction_ratio=reduction_ratio, divisor=divisor)
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
        options = {"data_format": self.data_format, "dtype": self.dtype_policy}
        no_bias = {"use_bias": False, "kernel_initializer": "he_normal"}
        self.pads, self.convs, self.norms = [], [], []
        for i in range(num_paths):
            name = f"paths_{i}"
            # A stride of 2 at dilation 2 only sees every second cell: `_path_map` slices instead.
            dilation, path_strides = (1, 1) if strides == 2 and i == 1 else (i + 1, strides)
            path = {"strides": path_strides, "dilation_rate": dilation, "groups": groups, **no_bias}
            self.pads.append(keras.layers.ZeroPadding2D(dilation, name=f"{name}_pad", **options))
            self.convs.append(self._convolution(filters, 3, f"{name}_conv", **path))
            self.norms.append(self._batch_norm(f"{name}_bn"))
        self._hidden_channels = round_channels(filters * reduction_ratio, divisor)
        self.fc_reduce = self._convolution(self._hidden_channels, 1, "attn_fc_reduce", **no_bias)
        self.attention_norm = self._batch_norm("attn_bn")
        self.fc_select = self._convolution(filters * num_paths, 1, "attn_fc_select", **no_bias)
        self.path_softmax = RadixSoftmax(num_paths, name="path_softmax", **options)
        self._layers_made()

    def build(self, input_shape):
        channels = input_shape[self._channel_axis]
        if self.split_input:
            if channels % self.num_paths:
                raise ValueError(
                    "With `split_input` the input channels must be divisible by `num_paths`. "
                    f"Received: input_shape={tuple(input_shape)}, num_paths={self.num_paths}"
                )
            channels //= self.num_paths
        padded_shape = self._with_channels((None, None, None, None), channels)
        output_shape = self.compute_output_shape(input_shape)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            conv.build(padded_shape)
            norm.build(output_shape)
        hidden_shape = self._pooled_shape(self._hidden_channels)
        self.fc_reduce.build(self._pooled_shape(self.filters))
        self.attention_norm.build(hidden_shape)
        self.fc_select.build(hidden_shape)
        self.built = True

    def call(self, inputs, training=None):
        if self.split_input:
            parts = ops.split(inputs, self.num_paths, axis=self._channel_axis)
        else:
            parts = [inputs] * self.num_paths
        maps = [self._path_map(i, part, training) for i, part in enumerate(parts)]
        x = ops.mean(sum(maps), axis=self._spatial_axes, keepdims=True)  # (batch, 1, 1, filters)
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
        return self._with_channels(shape, self.filters)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "filters": self.filters,
            "strides": self.strides,
            "num_paths": self.num_paths,
            "groups": self.groups,
            "reduction_ratio": self.reduction_ratio,
            "divisor": self.divisor,
            "split_input": self.split_input,
        }


def round_channels(channels: float, divisor: int) -> int:
    """Returns the multiple of `divisor` nearest to `channels`, at least one `divisor`."""
    return max(divisor, int(channels + divisor / 2) // divisor * divisor)
