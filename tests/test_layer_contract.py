"""What Keras expects of a layer, for every public layer, both data formats and four dtypes."""

import json

import keras
import numpy as np
import pytest

import keras_resnest as kr
from keras_resnest.detection.heads import PredictionHead

SHAPE = (2, 6, 8, 8)  # channels last
AXIS = {"channels_last": -1, "channels_first": 1}
LAYERS = {
    "BatchNormalization": {"axis": None},
    "ChannelShuffle": {"groups": 4},
    "DepthwiseConv2D": {"kernel_size": 3, "padding": "same"},
    "DropBlock2D": {"rate": 0.2, "block_size": 3, "seed": 1},
    "GroupedConv2D": {"filters": 4, "kernel_size": 3, "groups": 2},
    "L2Normalization": {"axis": None},
    "RadixSoftmax": {"radix": 2, "cardinality": 2},
    "SelectiveKernel": {"filters": 8, "num_paths": 2},
    "SplitAttention": {"filters": 4, "radix": 2, "cardinality": 2, "strides": 2, "padding": "same"},
    "SqueezeExcitation": {"hidden_channels": 4},
    "TransferConnectionBlock": {"filters": 4, "use_batch_norm": True},
}
# Two layers of a chain round to half precision; the sum over a kernel in another order, too.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "mixed_bfloat16": 0.1, "mixed_float16": 0.02}


def make(name: str, data_format: str, dtype: str):
    keras.utils.set_random_seed(0)
    options = dict(LAYERS[name])
    if "axis" in options:
        options["axis"] = AXIS[data_format]
    else:
        options["data_format"] = data_format
    return getattr(kr.layers, name)(**options, dtype=dtype)


def as_format(x, data_format: str):
    return x if data_format == "channels_last" else np.transpose(x, (0, 3, 1, 2))


def numpy(x):
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float64"))


def check_layer(layer, x, path):
    """Returns the output, once everything that Keras derives from it agrees."""

    def inputs_like(x):
        return keras.tree.map_structure(lambda v: keras.Input(v.shape[1:], dtype=v.dtype.name), x)

    symbolic = type(layer).from_config(layer.get_config())(inputs_like(x))
    outputs = layer(x)
    shapes = [v.shape for v in x] if isinstance(x, list) else x.shape
    assert outputs.shape == layer.compute_output_shape(shapes)
    assert (None, *outputs.shape[1:]) == symbolic.shape
    dtypes = {keras.backend.standardize_dtype(y.dtype) for y in (outputs, symbolic)}
    assert dtypes == {layer.compute_dtype}
    assert {w.dtype for w in layer.weights} <= {layer.variable_dtype}

    inputs = inputs_like(x)
    model = keras.Model(inputs, layer(inputs))
    model.save(path)
    again = keras.saving.load_model(path)
    np.testing.assert_array_equal(numpy(again(x)), numpy(outputs))
    config = layer.get_config()
    copy = type(layer).from_config(json.loads(json.dumps(config)))
    assert json.dumps(copy.get_config()) == json.dumps(config)

    model.compile(keras.optimizers.SGD(1e-2), "mse", run_eagerly=True)
    before = [w.numpy() for w in layer.trainable_weights]
    loss = model.train_on_batch(x, np.ones(outputs.shape, "float32"))
    assert np.isfinite(loss)
    for old, new in zip(before, layer.trainable_weights, strict=True):
        assert np.isfinite(new.numpy()).all(), new.path
        # A bias before batch normalization has no gradient.
        assert (new.numpy() != old).any() or "fc1/bias" in new.path, new.path
    layer.trainable = False
    frozen = [v.numpy() for v in layer.weights]
    layer(x, training=True)
    for old, new in zip(frozen, layer.weights, strict=True):
        np.testing.assert_array_equal(new.numpy(), old)
    return numpy(outputs)


def test_every_public_layer_is_checked():
    public = {getattr(kr.layers, name).__name__ for name in kr.layers.__all__}
    assert {*LAYERS, "AlignedConvolution"} == public


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, dtype, tmp_path):
    shape = (2, 1, 1, 8) if name == "RadixSoftmax" else SHAPE
    x = np.random.default_rng(0).normal(1.0, 2.0, shape)
    found = {}
    for data_format in AXIS:
        layer = make(name, data_format, dtype)
        given = as_format(x, data_format).astype(
            layer.compute_dtype if dtype == "float64" else "f4"
        )
        found[data_format] = check_layer(layer, given, tmp_path / f"{data_format}.keras")
    want = as_format(found["channels_last"], "channels_first")
    scale = np.abs(want).max()
    np.testing.assert_allclose(found["channels_first"], want, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_aligned_convolution(dtype, tmp_path):
    """Channels last only; its boxes are float32 in half precision too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 100, 4, 8)), rng.uniform(0, 100, (1, 100 * 4 * 2, 4))
    weights, found = [rng.normal(size=(3, 3, 8, 2 * 3)), rng.normal(size=2 * 3)], {}
    for policy in ("float64", dtype):
        layer = kr.layers.AlignedConvolution(2, 3, dtype=policy)
        layer.build([v.shape for v in x])
        layer.set_weights(weights)
        given = [v.astype("f8" if policy == "float64" else "f4") for v in x]
        found[policy] = check_layer(layer, given, tmp_path / "layer.keras")
    want = found["float64"]
    np.testing.assert_allclose(found[dtype], want, atol=TOLERANCE[dtype] / 5 * np.abs(want).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_prediction_head(dtype):
    keras.utils.set_random_seed(0)
    head = PredictionHead((2, 3), 4, dtype=dtype)
    maps = [np.ones((1, side, side, 4), "f4") for side in (4, 2)]
    outputs = head(maps)
    symbolic = PredictionHead((2, 3), 4, dtype=dtype)([keras.Input((s, s, 4)) for s in (4, 2)])
    for got, wanted, columns in zip(outputs, symbolic, (4, 4), strict=True):
        assert got.shape == (1, 2 * 16 + 3 * 4, columns) and wanted.shape == (None, *got.shape[1:])
        assert keras.backend.standardize_dtype(got.dtype) == head.compute_dtype == wanted.dtype
