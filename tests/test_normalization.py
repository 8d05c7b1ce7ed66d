"""The fused batch normalization against Keras' own layer."""

import keras
import numpy as np
import pytest

from keras_resnest.layers import BatchNormalization

OPTIONS = {"momentum": 0.8, "epsilon": 1e-3}


def twins(shape, **options):
    """Our layer and Keras' with the same random weights."""
    rng = np.random.default_rng(0)
    layers = [
        cls(**{**OPTIONS, **options})
        for cls in (BatchNormalization, keras.layers.BatchNormalization)
    ]
    for layer in layers:
        layer.build(shape)
    weights = [rng.uniform(0.5, 2.0, w.shape).astype("float32") for w in layers[0].weights]
    for layer in layers:
        layer.set_weights(weights)
    return layers


@pytest.mark.parametrize(
    "shape, options",
    [
        ((4, 6, 5, 7), {}),
        ((8, 1, 1, 7), {}),
        ((4, 7, 6, 5), {"axis": 1}),
        ((4, 6, 5, 7), {"scale": False}),
        ((4, 6, 5, 7), {"center": False}),
        ((5, 7), {}),
        ((2, 3, 4, 5, 6), {}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_equals_keras(shape, options, training):
    ours, theirs = twins(shape, **options)
    x = np.random.default_rng(1).normal(3.0, 2.0, shape).astype("float32")
    np.testing.assert_allclose(ours(x, training=training), theirs(x, training=training), atol=2e-4)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes gradients with a tape")
def test_gradients_equal_keras():
    import tensorflow as tf

    shape = (4, 6, 5, 7)
    x = tf.constant(np.random.default_rng(2).normal(size=shape).astype("float32"))
    weight = tf.constant(np.random.default_rng(3).normal(size=shape).astype("float32"))
    gradients = []
    for layer in twins(shape):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) * weight)
        sources = [x, *(v.value for v in layer.trainable_variables)]
        gradients.append(tape.gradient(loss, sources))
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_frozen_layer_uses_moving_statistics():
    ours, theirs = twins((4, 6, 5, 7))
    ours.trainable = theirs.trainable = False
    x = np.random.default_rng(4).normal(size=(4, 6, 5, 7)).astype("float32")
    before = ours.get_weights()
    np.testing.assert_allclose(ours(x, training=True), theirs(x, training=True), atol=1e-5)
    for a, b in zip(before, ours.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(dtype):
    """Close to float32, in the compute dtype."""
    ours, theirs = twins((4, 6, 5, 7))
    mixed = BatchNormalization(**OPTIONS, dtype=dtype)
    mixed.build((4, 6, 5, 7))
    mixed.set_weights(ours.get_weights())
    x = np.random.default_rng(5).normal(size=(4, 6, 5, 7)).astype("float32")
    got = mixed(x, training=True)
    assert keras.backend.standardize_dtype(got.dtype) == dtype.removeprefix("mixed_")
    want = keras.ops.convert_to_numpy(theirs(x, training=True))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(keras.ops.cast(got, "float32")), want, atol=0.05
    )


def test_the_first_batch_sets_the_statistics_of_an_untrained_layer():
    """Inference after one step is what was trained; in Keras it still has 0.8 of 0 and 1."""
    layer = BatchNormalization(**OPTIONS)
    x = np.random.default_rng(6).normal(5.0, 9.0, (4, 6, 5, 7)).astype("float32")
    trained = layer(x, training=True)
    np.testing.assert_allclose(layer(x, training=False), trained, atol=1e-4)
    layer(3.0 * x, training=True)
    mean = (0.8 + 0.2 * 3.0) * x.mean((0, 1, 2))
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-4)


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (4, 6, 5, 7)])
def test_batches_without_variance_keep_the_moving_variance(synchronized, shape):
    """Such as one image on a 1 x 1 map, or a black one; 0 would scale others by 30."""
    if synchronized and keras.backend.backend() != "tensorflow":
        pytest.skip("Keras synchronizes on TensorFlow only")
    ours = BatchNormalization(**OPTIONS, synchronized=synchronized)
    theirs = keras.layers.BatchNormalization(**OPTIONS)
    x = np.full(shape, 3.0, "float32")
    for layer in (ours, theirs):
        layer(x, training=True)
        layer(x, training=True)
    np.testing.assert_allclose(ours.moving_mean, theirs.moving_mean, rtol=1e-6)
    np.testing.assert_array_equal(ours.moving_variance, np.ones(7))
