"""Transfer connection block (TCB) of RefineDet."""

import keras
from keras import ops

from keras_resnest.checks import check_positive, checked
from keras_resnest.layers.base import DataFormat, FeatureMapLayer


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class TransferConnectionBlock(FeatureMapLayer):
    """Turns features of the anchor refinement module into features of the detection module.

    3x3 convolution, ReLU, 3x3 convolution; plus the next coarser block, upsampled by a 2x2
    transposed convolution; ReLU, 3x3 convolution, ReLU.

    Args:
        filters: positive integer, channels of the output.
        use_batch_norm: whether to normalize after every convolution, which then has no bias.
            Helps training from scratch; the published VGG models have none.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        **kwargs: arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: feature map.
        upper: optional output of the next coarser block, half as high and wide, rounded up.
            Where a side of `inputs` is odd, the upsampled map is cropped at its end.

    Returns:
        Feature map with `filters` channels, in the layout of `inputs`.

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
        data_format: DataFormat | None = None,
        **kwargs,
    ):
        super().__init__(data_format, **kwargs)
        check_positive(filters=filters)
        self.filters = filters
        self.use_batch_norm = use_batch_norm
        options = {"use_bias": not use_batch_norm, "kernel_initializer": "he_normal"}
        self.conv1 = self._convolution(filters, 3, "conv1", padding="same", **options)
        self.conv2 = self._convolution(filters, 3, "conv2", padding="same", **options)
        self.conv3 = self._convolution(filters, 3, "conv3", padding="same", **options)
        self.upsample = keras.layers.Conv2DTranspose(
            filters,
            2,
            strides=2,
            # TensorFlow has no channels_first kernel for CPUs: `_upsample` transposes.
            data_format="channels_last",
            dtype=self.dtype_policy,
            name="upsample",
            **options,
        )
        self.bn1 = self._batch_norm("bn1") if use_batch_norm else None
        self.bn2 = self._batch_norm("bn2") if use_batch_norm else None
        self.bn3 = self._batch_norm("bn3") if use_batch_norm else None
        self.upsample_bn = self._batch_norm("upsample_bn") if use_batch_norm else None
        self._layers_made()

    def build(self, inputs_shape, upper_shape=None):
        output_shape = self.compute_output_shape(inputs_shape)
        self.conv1.build(inputs_shape)
        self.conv2.build(output_shape)
        self.conv3.build(output_shape)
        norms = [self.bn1, self.bn2, self.bn3]
        if upper_shape is not None:
            self.upsample.build((None, None, None, upper_shape[self._channel_axis]))
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
        """Removes the extra row or column of `x` where a side of `like` is odd."""
        if x.shape[1:] == like.shape[1:] and None not in x.shape[1:]:
            return x
        shape = ops.shape(like)
        if self.data_format == "channels_last":
            return x[:, : shape[1], : shape[2], :]
        return x[:, :, : shape[2], : shape[3]]

    def compute_output_shape(self, inputs_shape, upper_shape=None):
        return self._with_channels(inputs_shape, self.filters)

    def get_config(self) -> dict:
        config = {"filters": self.filters, "use_batch_norm": self.use_batch_norm}
        return {**super().get_config(), **config}


TCB = TransferConnectionBlock
