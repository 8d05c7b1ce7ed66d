"""L2 normalization with a learned scale."""

import keras
from keras import ops

from keras_resnest.checks import check_positive, checked


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class L2Normalization(keras.layers.Layer):
    """Scales the channel vector of every cell to unit length, then by a learned factor.

    Early feature maps have larger values than late ones; this layer equalizes the scale of the
    inputs of detection heads. A cell of zeros stays zero, with a gradient of zero, never NaN.

    Args:
        scale: float, initial factor of every channel (RefineDet: 10 on conv4_3, 8 on conv5_3).
        axis: integer, the channel axis. Use 1 with `channels_first`.
        epsilon: small positive float, added to the squared length.
        **kwargs: arguments of `keras.layers.Layer`.

    Input shape:
        Any shape with a known number of channels.

    Returns:
        Tensor of the same shape.

    Raises:
        ValueError: if `epsilon` is not positive or the number of channels is unknown.

    Example:
        >>> float(L2Normalization(scale=10.0)(keras.ops.ones((1, 1, 1, 4)))[0, 0, 0, 0])
        5.0

    Source: ParseNet, https://arxiv.org/abs/1506.04579, section 3.3; RefineDet,
    https://arxiv.org/abs/1711.06897, section 3.2.
    """

    def __init__(self, scale: float = 10.0, axis: int = -1, epsilon: float = 1e-6, **kwargs):
        super().__init__(**kwargs)
        check_positive(epsilon=epsilon)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.scale = scale
        self.axis = axis
        self.epsilon = epsilon

    def build(self, input_shape):
        channels = input_shape[self.axis]
        if channels is None:
            raise ValueError(
                f"The size of axis {self.axis} must be known. Received: input_shape={input_shape}"
            )
        self.gamma = self.add_weight(
            name="gamma", shape=(channels,), initializer=keras.initializers.Constant(self.scale)
        )
        self.built = True

    def call(self, inputs):
        # Squares of half-precision numbers overflow easily.
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        squared_length = ops.sum(ops.square(x), axis=self.axis, keepdims=True)
        inverse_length = ops.where(
            squared_length > 0.0, ops.rsqrt(squared_length + self.epsilon), 0.0
        )
        gamma_shape = [1] * len(inputs.shape)
        gamma_shape[self.axis] = -1
        gamma = ops.reshape(ops.cast(self.gamma, x.dtype), gamma_shape)
        return ops.cast(x * inverse_length * gamma, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self) -> dict:
        config = {"scale": self.scale, "axis": self.axis, "epsilon": self.epsilon}
        return {**super().get_config(), **config}
