"""Prints the multiply-adds of a small network, on any backend."""

import keras

import keras_resnest as kr

inputs = keras.Input((8, 8, 4))
x = kr.layers.GroupedConv2D(6, 3, strides=2, padding="same", groups=2)(inputs)
model = keras.Model(inputs, keras.layers.DepthwiseConv2D(3)(x))
print(kr.backbones.count_multiply_adds(model, (8, 8, 4)))
