"""Frozen and synchronized batch normalization, and statistics that stay finite."""

import keras
import numpy as np
import pytest
from detectors import WHOLE, rectangles, small_backbone, small_detector

from keras_resnest.detection.refinedet import RefineDet
from keras_resnest.layers import BatchNormalization
from keras_resnest.layers.normalization import set_batch_norm


def batch_norm_layers(model):
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def test_frozen_batch_norm_keeps_its_four_variables_while_the_rest_learns():
    model = small_detector((64, 64, 3), WHOLE, freeze_batch_norm=True)
    model.compile(keras.optimizers.SGD(1e-2, momentum=0.9), run_eagerly=True)  # faster than tracing
    frozen = {id(v) for layer in batch_norm_layers(model) for v in layer.variables}
    assert len(frozen) % 4 == 0 and len(frozen) > 80
    before = model.get_weights()
    images, truth = rectangles(4, (64, 64, 3), objects=1)
    model.fit(images, truth, batch_size=2, epochs=2, verbose=0)
    changed = {
        id(variable)
        for variable, old, new in zip(model.weights, before, model.get_weights(), strict=True)
        if not np.array_equal(old, new)
    }
    assert not changed & frozen
    kernels = {id(w) for w in model.backbone.weights if w.name == "kernel"}
    assert len(kernels) > 8 and kernels <= changed
    again = RefineDet.from_config(model.get_config())
    assert again.freeze_batch_norm
    assert len(again.trainable_weights) == len(model.trainable_weights)


def test_synchronized_batch_norm_reaches_every_layer_and_the_config():
    model = small_detector((64, 64, 3), synchronized_batch_norm=True)
    for detector in (model, RefineDet.from_config(model.get_config())):
        layers = batch_norm_layers(detector)
        assert len(layers) > 10 and all(layer.synchronized for layer in layers)
        assert detector.synchronized_batch_norm and not detector.freeze_batch_norm
    plain = batch_norm_layers(small_detector((64, 64, 3)))
    assert len(plain) == len(layers) and not any(layer.synchronized for layer in plain)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("synchronized", [False, True])
def test_set_batch_norm_of_a_backbone(freeze, synchronized):
    backbone = small_backbone()
    others = len(backbone.trainable_weights) - 2 * len(batch_norm_layers(backbone))
    set_batch_norm(keras.Sequential([backbone]), freeze, synchronized)  # one level down
    for layer in batch_norm_layers(backbone):
        assert layer.trainable != freeze and layer.synchronized == synchronized
    trainable = others + (0 if freeze else 2 * len(batch_norm_layers(backbone)))
    assert len(backbone.trainable_weights) == trainable > 0


KINDS = {
    "fused": ((6, 5, 4, 3), {}),
    "synchronized": ((6, 5, 4, 3), {"synchronized": True}),
    "no scale": ((6, 5, 4, 3), {"scale": False}),
    "no offset": ((6, 5, 4, 3), {"center": False}),
    "channels first": ((6, 3, 5, 4), {"axis": 1}),
    "vectors": ((60, 3), {}),
    "float64": ((6, 5, 4, 3), {"dtype": "float64"}),
}


def used_layer(shape, options):
    """A layer whose statistics are not the initial ones, which the first batch replaces."""
    initial = {"moving_mean_initializer": "ones"}
    layer = BatchNormalization(momentum=0.75, epsilon=1e-3, **initial, **options)
    layer.build(shape)
    return layer


@pytest.mark.parametrize("shape, options", KINDS.values(), ids=KINDS)
def test_a_training_step_equals_the_formula(shape, options):
    """Also shows that `synchronized` equals the plain layer on one device."""
    layer = used_layer(shape, options)
    x = np.random.default_rng(0).normal(3.0, 2.0, shape)
    axis = options.get("axis", -1)
    axes = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    y = keras.ops.convert_to_numpy(layer(x.astype(layer.compute_dtype), training=True))
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-3), atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, 0.75 + 0.25 * mean.ravel(), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, 0.75 + 0.25 * variance.ravel(), rtol=1e-5)


@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
@pytest.mark.parametrize("shape, options", KINDS.values(), ids=KINDS)
def test_a_channel_that_is_not_finite_leaves_its_statistics_alone(shape, options, value):
    if value == 3e38 and options.get("dtype") == "float64":
        pytest.skip("no overflow in float64")
    layer = used_layer(shape, options)
    axis = options.get("axis", -1)
    x = np.random.default_rng(0).normal(3.0, 2.0, shape)
    channels = np.moveaxis(x, axis, -1)  # a view
    channels[..., 1].flat[0] = value
    channels[0, ..., 1] *= -1.0 if value == 3e38 else 1.0
    if value == 3e38:
        channels[1, ..., 1] = value  # squared deviations exceed float32
    layer(x.astype(layer.compute_dtype), training=True)
    moving = np.stack([layer.moving_mean, layer.moving_variance])
    assert np.isfinite(moving).all()
    assert moving[1, 1] == 1.0
    good = channels[..., [0, 2]].reshape(-1, 2)
    want = [0.75 + 0.25 * good.mean(0), 0.75 + 0.25 * good.var(0)]
    np.testing.assert_allclose(moving[:, [0, 2]], want, rtol=1e-5)


@pytest.mark.parametrize("dtype, exact", [("float16", 2e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("synchronized", [False, True])
def test_half_precision_keeps_float32_statistics(dtype, exact, synchronized):
    """The sum of 40 000 numbers near 200 overflows float16 and rounds in bfloat16."""
    layer = BatchNormalization(
        momentum=0.0, epsilon=1e-3, dtype=f"mixed_{dtype}", synchronized=synchronized
    )
    x = np.random.default_rng(0).normal(200.0, 20.0, (4, 100, 100, 2))
    rounded = keras.ops.cast(x, dtype)
    x = keras.ops.convert_to_numpy(keras.ops.cast(rounded, "float32")).astype("float64")
    y = layer(rounded, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert {v.dtype for v in layer.variables} == {"float32"}
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-4)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-3)
    want = (x - mean) / np.sqrt(variance + 1e-3)
    got = keras.ops.convert_to_numpy(keras.ops.cast(y, "float32"))
    np.testing.assert_allclose(got, want, atol=2 * exact, rtol=exact)
