"""Squeeze-and-excitation and selective kernels against their definitions in NumPy."""

import numpy as np
import pytest
from scipy import ndimage

from keras_resnest.layers import SelectiveKernel, SqueezeExcitation
from keras_resnest.layers.channel_attention import round_channels


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def random_weights(layer, rng):
    """Gives a built layer weights far from any default; variances stay positive."""
    for variable in layer.weights:
        if variable.name == "seed_generator_state":
            continue
        low = 0.5 if variable.name in ("moving_variance", "gamma") else -0.6
        variable.assign(rng.uniform(low, 1.0, variable.shape))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_squeeze_excitation_equals_its_definition(data_format):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 6)).astype("float32")
    layer = SqueezeExcitation(4, data_format=data_format)
    first = data_format == "channels_first"
    inputs = x.transpose(0, 3, 1, 2) if first else x
    layer.build(inputs.shape)
    random_weights(layer, rng)
    kernel1, bias1, kernel2, bias2 = (np.squeeze(w) for w in layer.get_weights())
    hidden = np.maximum(x.mean(axis=(1, 2)) @ kernel1 + bias1, 0)
    want = x * sigmoid(hidden @ kernel2 + bias2)[:, None, None, :]
    got = np.asarray(layer(inputs))
    got = got.transpose(0, 2, 3, 1) if first else got
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def convolve(x, kernel, dilation, strides, groups):
    """3x3 convolution with zeros around, of an (h, w, c) map, by SciPy."""
    width, filters = kernel.shape[2], kernel.shape[3]
    spread = np.zeros((2 * dilation + 1, 2 * dilation + 1, width, filters))
    spread[::dilation, ::dilation] = kernel
    y = np.zeros((*x.shape[:2], filters))
    for out in range(filters):
        start = out // (filters // groups) * width
        for i in range(width):
            y[..., out] += ndimage.correlate(
                x[..., start + i].astype("float64"), spread[:, :, i, out], mode="constant"
            )
    return y[::strides, ::strides]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_paths": 2},
        {"num_paths": 2, "strides": 2},
        {"num_paths": 2, "strides": 2, "split_input": True, "groups": 2},
        {"num_paths": 3, "groups": 4},
        {"num_paths": 1},
    ],
    ids=str,
)
def test_selective_kernel_equals_its_definition(options, data_format):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 9, 6, 8)).astype("float32")
    layer = SelectiveKernel(8, reduction_ratio=0.5, divisor=2, data_format=data_format, **options)
    first = data_format == "channels_first"
    inputs = x.transpose(0, 3, 1, 2) if first else x
    layer.build(inputs.shape)
    random_weights(layer, rng)

    def norm(y, norm_layer):
        gamma, beta, mean, variance = norm_layer.get_weights()
        return (y - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    num_paths = options["num_paths"]
    parts = [x[0]] * num_paths
    if options.get("split_input"):
        parts = np.split(x[0], num_paths, axis=-1)
    maps = []
    for i, part in enumerate(parts):
        kernel = layer.convs[i].kernel.numpy()
        y = convolve(part, kernel, i + 1, options.get("strides", 1), options.get("groups", 1))
        maps.append(np.maximum(norm(y, layer.norms[i]), 0))
    hidden = sum(maps).mean(axis=(0, 1)) @ layer.fc_reduce.kernel.numpy()[0, 0]
    hidden = np.maximum(norm(hidden, layer.attention_norm), 0)
    logits = (hidden @ layer.fc_select.kernel.numpy()[0, 0]).reshape(num_paths, 8)
    attention = np.exp(logits) / np.exp(logits).sum(axis=0) if num_paths > 1 else sigmoid(logits)
    want = sum(m * a for m, a in zip(maps, attention, strict=True))

    got = np.asarray(layer(inputs))
    assert got.shape == layer.compute_output_shape(inputs.shape)
    got = got.transpose(0, 2, 3, 1) if first else got
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"strides": 3}, "`strides` must be 1 or 2"),
        ({"num_paths": 3, "strides": 2}, "at most 2"),
        ({"num_paths": 0}, "num_paths=0"),
    ],
)
def test_selective_kernel_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        SelectiveKernel(8, **options)


def test_refuses_inputs_that_do_not_split():
    with pytest.raises(ValueError, match="divisible by `num_paths`"):
        SelectiveKernel(8, split_input=True).build((None, 8, 8, 7))
    with pytest.raises(ValueError, match="hidden_channels=0"):
        SqueezeExcitation(0)


def test_hidden_channels_are_rounded():
    # The multiple nearest by, halves up, at least one.
    for channels, divisor, want in ((4, 8, 8), (16, 8, 16), (11.9, 8, 8), (12, 8, 16), (8, 32, 32)):
        assert round_channels(channels, divisor) == want
