"""AlignedConvolution equals a loop over boxes, points and pixels, and an ordinary convolution."""

import keras
import numpy as np
import pytest
from keras import ops
from reference import aligned_convolution

from keras_resnest.layers import AlignedConvolution

BATCH, HEIGHT, WIDTH, CHANNELS, ANCHORS, FILTERS = 2, 4, 5, 3, 2, 3
BOXES = BATCH, HEIGHT * WIDTH * ANCHORS, 4


def layer_of(**options):
    return AlignedConvolution(
        ANCHORS, FILTERS, **{"kernel_initializer": "glorot_normal", "dtype": "float64", **options}
    )


def features(seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, HEIGHT, WIDTH, CHANNELS))


def random_boxes(seed=1):
    """Around the map, some beyond its borders, some without size, some inverted."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(-4, 6, (*BOXES[:2], 2))
    sizes = rng.choice([-2.0, 0.0, 0.4, 1.0, 3.0, 9.0], start.shape) * rng.uniform(0.5, 1.5)
    return np.concatenate([start, start + sizes], axis=-1)


def cells(sides=(3.0, 3.0)):
    """Boxes of a size around the cells."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    centers = np.repeat(np.stack([x, y], -1).reshape(1, -1, 2), ANCHORS, axis=1)
    half = np.array(sides) / 2
    return np.repeat(np.concatenate([centers - half, centers + half], -1), BATCH, axis=0)


def numpy(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize("use_bias", [True, False])
def test_equals_brute_force(use_bias):
    layer, x, boxes = layer_of(use_bias=use_bias), features(), random_boxes()
    layer([x, boxes])
    if use_bias:
        layer.bias.assign(np.arange(ANCHORS * FILTERS))
    bias = numpy(layer.bias) if use_bias else np.zeros(ANCHORS * FILTERS)
    want = aligned_convolution(x, boxes, numpy(layer.kernel), bias, ANCHORS)
    np.testing.assert_allclose(numpy(layer([x, boxes])), want, atol=1e-12)
    assert np.abs(want).min(axis=-1).max() > 0.1


def test_boxes_around_the_cells_give_a_convolution():
    convolution = keras.layers.Conv2D(ANCHORS * FILTERS, 3, padding="same", dtype="float64")
    want = numpy(convolution(features())).reshape(BATCH, -1, FILTERS)
    layer = layer_of()
    layer.build([features().shape, BOXES])
    layer.set_weights(convolution.get_weights())
    np.testing.assert_allclose(numpy(layer([features(), cells()])), want, atol=1e-12)


def test_boxes_of_twice_the_size_give_a_dilated_convolution():
    kernel = np.random.default_rng(2).normal(size=(3, 3, CHANNELS, ANCHORS * FILTERS))
    x = np.pad(features(), ((0, 0), (2, 2), (2, 2), (0, 0)))
    want = numpy(ops.conv(x, kernel, dilation_rate=2)).reshape(BATCH, -1, FILTERS)
    layer = layer_of(use_bias=False)
    layer.build([features().shape, BOXES])
    layer.set_weights([kernel])
    np.testing.assert_allclose(numpy(layer([features(), cells((6, 6))])), want, atol=1e-12)
