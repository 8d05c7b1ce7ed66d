"""Convolutions in a process with another environment: `gradients` or `narrow`."""

import sys

import numpy as np
import tensorflow as tf

from keras_resnest.layers import GroupedConv2D


def gradients():
    """Prints the relative error of gradients; for a TensorFlow without oneDNN."""
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 9, 8, 8)), tf.float32)
    worst = 0.0
    first = {"data_format": "channels_first", "strides": 2}
    for options in ({}, {"dilation_rate": 2, "padding": "same"}, first):
        inputs = tf.transpose(x, (0, 3, 1, 2)) if "data_format" in options else x
        layer = GroupedConv2D(12, 3, groups=4, **options)
        layer.build(inputs.shape)

        # First called while a graph is traced, as in a functional model.
        @tf.function
        def differentiate(inputs, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(inputs)
                total = tf.reduce_sum(outputs**2) / 2
            return outputs, *tape.gradient(total, [inputs, layer.kernel.value])

        y, x_gradient, kernel_gradient = differentiate(inputs)
        # The sum is quadratic in both arguments: twice itself is its derivative along them.
        total = float(tf.reduce_sum(y**2))
        for gradient, value in ((x_gradient, inputs), (kernel_gradient, layer.kernel.value)):
            worst = max(worst, abs(float(tf.reduce_sum(gradient * value)) / total - 1))
    print(worst)


def narrow():
    """Strided 1x1 convolutions of few channels; glibc checks the memory."""
    for channels, filters in ((3, 16), (8, 16), (15, 16), (8, 8)):
        layer = GroupedConv2D(filters, 1, strides=2, padding="same", use_bias=False)
        x = tf.random.normal((1, 15, 32, channels))
        layer.build(x.shape)

        @tf.function
        def differentiate(x=x, layer=layer):
            with tf.GradientTape() as tape:
                y = layer(x)
                loss = tf.reduce_sum(y**2) / 2
            return y, tape.gradient(loss, layer.kernel.value)

        for _ in range(100):
            y, gradient = differentiate()
        want = x[:, ::2, ::2] @ layer.kernel[0, 0]
        np.testing.assert_allclose(y, want, atol=1e-4)
        want = tf.einsum("bhwi,bhwo->io", x[:, ::2, ::2], want)
        np.testing.assert_allclose(gradient[0, 0], want, atol=1e-2)
    print("done")


if __name__ == "__main__":
    {"gradients": gradients, "narrow": narrow}[sys.argv[1]]()
