"""Grouped and depthwise convolutions that train on every device and export without XLA."""

import functools

import keras
from keras import ops

from keras_resnest.checks import checked


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class GroupedConv2D(keras.layers.Conv2D):
    """Drop-in for `keras.layers.Conv2D` with fast, servable channel groups.

    On TensorFlow, Keras compiles every grouped convolution with XLA. That is slow on a CPU,
    especially its gradient, and remains in the SavedModel, where model servers reject it. This
    layer uses TensorFlow's grouped kernels instead. Where a CPU build has no gradient for them,
    it convolves group by group. With `channels_first` on a CPU it transposes. Other backends
    use Keras' implementation.

    Takes the arguments of `keras.layers.Conv2D`, with the same defaults.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)` with
        `data_format="channels_first"`. `groups` must divide `channels` and `filters`.

    Returns:
        Feature map with `filters` channels in the same layout.

    Raises:
        ValueError: if `groups` does not divide `channels` or `filters`.

    Example:
        >>> layer = GroupedConv2D(128, 3, padding="same", groups=2)
        >>> layer(keras.ops.ones((1, 32, 32, 64))).shape
        (1, 32, 32, 128)

    Source: ResNeXt, https://arxiv.org/abs/1611.05431, section 3.
    """

    def convolution_op(self, inputs, kernel):
        if keras.backend.backend() != "tensorflow":
            return super().convolution_op(inputs, kernel)
        if self.data_format == "channels_last":
            return self._tensorflow_convolution(inputs, kernel, "NHWC")
        if _has_gpu():
            return self._tensorflow_convolution(inputs, kernel, "NCHW")
        # Some of TensorFlow's CPU kernels do not support channels_first.
        inputs = ops.transpose(inputs, (0, 2, 3, 1))
        outputs = self._tensorflow_convolution(inputs, kernel, "NHWC")
        return ops.transpose(outputs, (0, 3, 1, 2))

    def _tensorflow_convolution(self, inputs, kernel, tensorflow_format):
        import tensorflow as tf

        strides = self.strides
        if tensorflow_format == "NHWC" and self._is_narrow_and_pointwise(kernel):
            inputs, strides = inputs[:, :: strides[0], :: strides[1]], 1
        # tf.nn.conv2d has no gradient for dilated kernels on some CPUs.
        convolve = functools.partial(
            tf.nn.convolution,
            strides=strides,
            padding=self.padding.upper(),
            data_format=tensorflow_format,
            dilations=self.dilation_rate,
        )
        if self.groups == 1 or _has_native_grouped_gradient(inputs.dtype.name):
            return convolve(inputs, kernel)
        channel_axis = tensorflow_format.index("C")
        groups = zip(
            tf.split(inputs, self.groups, axis=channel_axis),
            tf.split(kernel, self.groups, axis=-1),
            strict=True,
        )
        return tf.concat([convolve(x, k) for x, k in groups], axis=channel_axis)

    def _is_narrow_and_pointwise(self, kernel) -> bool:
        """Whether oneDNN's gradient would write out of bounds for a batch of one.

        Seen in TensorFlow 2.21 (oneDNN 3.7): strided 1x1, below 16 channels to at most 16.
        """
        height, width, channels, filters = kernel.shape
        strides = max(self.strides)
        return height == width == 1 and strides > 1 and channels < 16 and filters <= 16


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` that supports `channels_first` on every device.

    TensorFlow has no such CPU kernel, so this layer transposes there. Takes the arguments of
    `keras.layers.DepthwiseConv2D`, with the same defaults.

    Input shape:
        `(batch, height, width, channels)`, or `(batch, channels, height, width)`.

    Returns:
        Feature map with `channels * depth_multiplier` channels in the same layout.

    Example:
        >>> layer = DepthwiseConv2D(3, padding="same", data_format="channels_first")
        >>> layer(keras.ops.ones((1, 64, 32, 32))).shape
        (1, 64, 32, 32)

    Source: MobileNets, https://arxiv.org/abs/1704.04861, section 3.1.
    """

    def call(self, inputs):
        on_tensorflow = keras.backend.backend() == "tensorflow"
        if self.data_format == "channels_last" or not on_tensorflow or _has_gpu():
            return super().call(inputs)
        outputs = ops.depthwise_conv(
            ops.transpose(inputs, (0, 2, 3, 1)),
            self.kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format="channels_last",
        )
        if self.use_bias:
            outputs = outputs + self.bias
        outputs = ops.transpose(outputs, (0, 3, 1, 2))
        return outputs if self.activation is None else self.activation(outputs)


@functools.cache
def _has_gpu() -> bool:
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


@functools.cache
def _has_native_grouped_gradient(dtype: str) -> bool:
    """Whether TensorFlow can differentiate a grouped convolution of `dtype` on this machine.

    CPU builds without oneDNN (or with TF_ENABLE_ONEDNN_OPTS=0) only run the forward pass. There is
    no public flag, so try a tiny gradient once.
    """
    import tensorflow as tf

    # Run eagerly even while a graph is being traced.
    with tf.init_scope():
        try:
            tf.raw_ops.Conv2DBackpropInput(
                input_sizes=(1, 3, 3, 4),
                filter=tf.ones((3, 3, 2, 4), dtype),
                out_backprop=tf.ones((1, 3, 3, 4), dtype),
                strides=(1, 1, 1, 1),
                padding="SAME",
            )
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
            return False
    return True
