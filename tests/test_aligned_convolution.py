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


def test_no_images():
    x, boxes = np.zeros((0, HEIGHT, WIDTH, CHANNELS)), np.zeros((0, *BOXES[1:]))
    assert layer_of()([x, boxes]).shape == (0, BOXES[1], FILTERS)


def test_gradients_are_finite_differences():
    import tensorflow as tf

    rng = np.random.default_rng(3)
    layer, boxes = layer_of(), random_boxes()
    layer.build([features().shape, BOXES])
    weights = rng.normal(size=(BATCH, BOXES[1], FILTERS))
    variables = [tf.Variable(features()), layer.kernel.value, layer.bias.value]

    def loss():
        return ops.sum(ops.square(layer([variables[0], boxes])) * weights)

    with tf.GradientTape() as tape:
        value = loss()
    for variable, gradient in zip(variables, tape.gradient(value, variables), strict=True):
        for _ in range(5):
            step = rng.normal(size=variable.shape) * 1e-4
            variable.assign_add(step)
            above = loss()
            variable.assign_sub(2 * step)
            below = loss()
            variable.assign_add(step)
            np.testing.assert_allclose(np.sum(gradient * step), (above - below) / 2, rtol=1e-6)


HOSTILE = (0.0, -1.0, 2.5, 6e4, -1e6, 1e30, -1e30, 3e38, -3e38, np.inf, -np.inf, np.nan)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_any_box_is_finite(dtype):
    import tensorflow as tf

    rng = np.random.default_rng(4)
    boxes = random_boxes().astype("float32")
    boxes[0] = rng.choice(HOSTILE, BOXES[1:])
    layer, x = layer_of(dtype=dtype), tf.constant(features(), "float32")
    layer.build([x.shape, BOXES])
    layer.bias.assign(np.arange(1.0, 1 + ANCHORS * FILTERS))
    with tf.GradientTape(persistent=True) as tape:
        given = tf.constant(boxes)
        tape.watch([x, given])
        outputs = layer([x, given])
        loss = ops.sum(ops.square(ops.cast(outputs, "float32")))
    assert np.isfinite(ops.cast(outputs, "float32")).all()
    gradients = tape.gradient(loss, [x, layer.kernel.value, layer.bias.value])
    assert all(np.isfinite(g).all() and np.any(g) for g in gradients)
    assert tape.gradient(loss, given) is None
    nowhere = ~np.isfinite(boxes).all(axis=-1)  # nothing is read but the bias
    bias = np.tile(numpy(layer.bias).reshape(ANCHORS, FILTERS), (BATCH, HEIGHT * WIDTH, 1))
    np.testing.assert_array_equal(numpy(ops.cast(outputs, "float32"))[nowhere], bias[nowhere])


def test_far_boxes_equal_brute_force():
    """Large coordinates keep their meaning: the middle lies inside of the map."""
    rng = np.random.default_rng(5)
    centers, half = (
        rng.uniform(0, 4, (*BOXES[:2], 2)),
        rng.choice([1.0, 60.0, 1e6], (*BOXES[:2], 2)),
    )
    boxes = np.concatenate([centers - half, centers + half], axis=-1)
    layer = layer_of(use_bias=False)
    got = numpy(layer([features(), boxes]))
    want = aligned_convolution(features(), boxes, numpy(layer.kernel), np.zeros(6), ANCHORS)
    np.testing.assert_allclose(got, want, atol=1e-8)
    assert np.median(np.abs(want)) > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_anchors": 0}, "`num_anchors` must be a positive integer.*0"),
        ({"filters": -1}, "`filters` must be a positive integer.*-1"),
        ({"filters": 2.5}, r"`filters` must be int.*2\.5"),
        ({"kernel_initializer": "unknown"}, "unknown"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlignedConvolution(**{"num_anchors": 1, "filters": 1, **arguments})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 5, 3), (1, 39, 4)), r"height \* width \* 2, 4.*\(1, 4, 5, 3\).*\(1, 39, 4\)"),
        (((1, 4, 5, 3), (1, 40, 5)), r"\(1, 40, 5\)"),
        (((1, 4, 5, None), (1, 40, 4)), "channels must be known"),
    ],
)
def test_bad_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        layer_of().build(shapes)
