"""Transfer connection block (TCB) of RefineDet."""

import keras
from keras import ops

from keras_resnest.layers.convolution import GroupedConv2D
from keras_resnest.layers.normalization import BatchNormalization


@keras.saving.register_keras_serializable("keras_resnest")
class TransferConnectionBlock(keras.layers.Layer):
    """Turns features of the anchor refinement module into those of the detection module.

    The map goes through a 3x3 convolution, ReLU and a 3x3 convolution. The block of the next
    coarser level, if there is one, is upsampled by a 2x2 transposed convolution and added. ReLU,
    a 3x3 convolution and ReLU follow.

    Args:
        filters: positive integer, channels of the output and of `upper`'s upsampled map.
        use_batch_norm: whether batch normalization follows every convolution, which then has no
            bias. Helps to train from scratch; the published networks have none.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: feature map `(batch, height, width, channels)`, or `(batch, channels, height,
            width)`.
        upper: optional output of the block one level above, about half as high and wide. Where
            `height` or `width` is odd, the upsampled map is cropped at its end.

    Returns:
        Feature map `(batch, height, width, filters)` in the same layout.

    Raises:
        ValueError: if `filters` is not positive.

    Example:
        >>> top = TransferConnectionBlock(256)(keras.Input((10, 10, 512)))
        >>> TransferConnectionBlock(256)(keras.Input((20, 20, 1024)), top).shape
        (None, 20, 20, 256)

    Source: RefineDet, https://arxiv.org/abs/1711.06897, section 3.1 and figure 2.
    """

    def __init__(
        self,
        filters: int = 256,
        use_batch_norm: bool = False,
        data_format: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not filters > 0:
            raise ValueError(f"`filters` must be positive. Received: filters={filters}")
        self.filters = filters
        self.use_batch_norm = use_batch_norm
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        self._channel_axis = -1 if self.data_format == "channels_last" else 1
        self.conv1 = self._convolution("conv1")
        self.conv2 = self._convolution("conv2")
        self.conv3 = self._convolution("conv3")
        self.upsample = keras.layers.Conv2DTranspose(
            filters,
            2,
            strides=2,
            # TensorFlow has no channels_first kernel for CPUs: `_upsample` transposes.
            **{**self._convolution_options("upsample"), "data_format": "channels_last"},
        )
        self.bn1 = self._batch_norm("bn1")
        self.bn2 = self._batch_norm("bn2")
        self.bn3 = self._batch_norm("bn3")
        self.upsample_bn = self._batch_norm("upsample_bn")

    def _convolution_options(self, name):
        return {
            "use_bias": not self.use_batch_norm,
            "kernel_initializer": "he_normal",
            "data_format": self.data_format,
            "dtype": self.dtype_policy,
            "name": name,
        }

    def _convolution(self, name):
        return GroupedConv2D(self.filters, 3, padding="same", **self._convolution_options(name))

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

    def build(self, inputs_shape, upper_shape=None):
        output_shape = self.compute_output_shape(inputs_shape)
        self.conv1.build(inputs_shape)
        self.conv2.build(output_shape)
        self.conv3.build(output_shape)
        norms = [self.bn1, self.bn2, self.bn3]
        if upper_shape is not None:
            channels = upper_shape[self._channel_axis]
            self.upsample.build((None, None, None, channels))
            norms.append(self.upsample_bn)
        if self.use_batch_norm:
            for norm in norms:
                norm.build(output_shape)
        self.built = True

    def call(self, inputs, upper=None, training=None):
        x = ops.relu(self._normalize(self.bn1, self.conv1(inputs), training))
        x = self._normalize(self.bn2, self.conv2(x), training)
        if upper is not None:
            upsampled = self._normalize(self.upsample_bn, self._upsample(upper), training)
            x = x + self._crop(upsampled, like=x)
        x = ops.relu(x)
        return ops.relu(self._normalize(self.bn3, self.conv3(x), training))

    def _upsample(self, upper):
        if self.data_format == "channels_last":
            return self.upsample(upper)
        upsampled = self.upsample(ops.transpose(upper, (0, 2, 3, 1)))
        return ops.transpose(upsampled, (0, 3, 1, 2))

    def _normalize(self, norm, x, training):
        return x if norm is None else norm(x, training=training)

    def _crop(self, x, like):
        """Cuts the last row or column that upsampling adds where the finer map's side is odd."""
        if x.shape[1:] == like.shape[1:] and None not in x.shape[1:]:
            return x
        shape = ops.shape(like)
        if self.data_format == "channels_last":
            return x[:, : shape[1], : shape[2], :]
        return x[:, :, : shape[2], : shape[3]]

    def compute_output_shape(self, inputs_shape, upper_shape=None):
        shape = list(inputs_shape)
        shape[self._channel_axis] = self.filters
        return tuple(shape)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "use_batch_norm": self.use_batch_norm,
            "data_format": self.data_format,
        }


TCB = TransferConnectionBlock
