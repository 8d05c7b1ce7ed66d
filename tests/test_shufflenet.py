"""Channel shuffle, depthwise convolution and the options of ShuffleNet."""

import keras
import numpy as np
import pytest

from keras_resnest.backbones import ShuffleNet
from keras_resnest.layers import ChannelShuffle, DepthwiseConv2D


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("groups, channels", [(2, 4), (3, 12), (4, 4), (1, 5)])
def test_channel_shuffle_interleaves_the_groups(groups, channels, data_format):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, channels)).astype("float32")
    want = np.zeros_like(x)
    for group in range(groups):
        for place in range(channels // groups):
            want[..., place * groups + group] = x[..., group * (channels // groups) + place]
    first = data_format == "channels_first"
    inputs = x.transpose(0, 3, 1, 2) if first else x
    shuffled = ChannelShuffle(groups, data_format=data_format)(inputs)
    back = ChannelShuffle(channels // groups, data_format=data_format)(shuffled)
    assert np.array_equal(back, inputs)
    got = np.asarray(shuffled).transpose(0, 2, 3, 1) if first else np.asarray(shuffled)
    assert np.array_equal(got, want)


def test_channel_shuffle_refuses():
    with pytest.raises(ValueError, match="groups=0"):
        ChannelShuffle(0)
    with pytest.raises(ValueError, match="must divide the number of channels"):
        ChannelShuffle(3)(np.zeros((1, 2, 2, 4), "float32"))


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"depth_multiplier": 2}], ids=str)
def test_depthwise_convolution_of_channels_first(options):
    options = {"kernel_size": 3, "strides": 2, "bias_initializer": "ones", **options}
    last = keras.layers.DepthwiseConv2D(**options)
    first = DepthwiseConv2D(**options, data_format="channels_first")
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 4)).astype("float32")
    want = np.asarray(last(x))
    first.build((None, 4, 9, 7))
    first.set_weights(last.get_weights())
    got = np.asarray(first(x.transpose(0, 3, 1, 2))).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


SMALL = {"stackwise_num_filters": [24, 48], "stackwise_num_blocks": [2, 1]}
V1 = {"groups": 3, "stem_width": 12}


def test_rescaling_gives_megviis_networks_bgr():
    """The first convolution sees the pixels unchanged, blue first."""
    options = {**SMALL, "channel_split": "alternate", "stem_width": 8, "trained_on_bgr": True}
    model, plain = ShuffleNet(**options), ShuffleNet(**options, include_rescaling=False)
    plain.set_weights(model.get_weights()[-len(plain.get_weights()) :])
    x = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype="uint8")
    want = np.asarray(plain(x[..., ::-1].astype("float32"), training=False))
    assert np.array_equal(model(x, training=False), want)


@pytest.mark.parametrize(
    "options",
    [V1, {"stackwise_num_filters": [48, 24]}, {"channel_split": "alternate", "stem_width": 7}],
    ids=str,
)
def test_widths_at_the_limits_are_built(options):
    """With halves, widths may fall; where channels are added, one more suffices."""
    model = ShuffleNet(**{**SMALL, **options})
    x = np.zeros((1, 33, 47, 3), "float32")
    assert model(x).shape == (1, 3, 3, {**SMALL, **options}["stackwise_num_filters"][-1])
    assert model.pyramid_strides == {"P2": 4, "P3": 8, "P4": 16}


def test_mixed_precision_trains_and_predicts_in_float32():
    model = ShuffleNet(
        **SMALL,
        channel_split="alternate",
        stackwise_activations=["relu", "hard_swish"],
        stackwise_se=[False, True],
        stem_width=8,
        head_filters=24,
        head_units=12,
        trained_on_bgr=True,
        include_top=True,
        classes=3,
        dtype="mixed_float16",
    )
    computed = {layer.name: layer.compute_dtype for layer in model.layers}
    assert computed.pop("predictions") == "float32"
    computed.pop("images")
    assert set(computed.values()) == {"float16"}
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype="uint8")
    before = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    history = model.fit(x, np.array([0, 1, 2, 0]), verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    after = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    assert all(np.isfinite(v).all() for v in after)
    assert any(not np.array_equal(v, old) for v, old in zip(after, before, strict=True))
    assert np.asarray(model(x, training=False)).dtype == "float32"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"stackwise_num_blocks": [2]}, "one entry per stage"),
        ({"stackwise_se": [True]}, "one entry per stage"),
        ({"channel_split": "thirds"}, "`channel_split` must be one of"),
        ({"block_kinds": [3, 3]}, "for each of the 3 blocks"),
        ({"block_kinds": [3, 4, 3]}, "one of 3, 5, 7"),
        ({"block_kinds": [3, 3, "xception"]}, "cannot be 'xception'"),
        ({"block_kinds": [3, [3], 3]}, "one of 3, 5, 7"),
        ({"groups": 5}, "multiples of"),
        ({"groups": -1}, "`groups` must be"),
        ({"groups": 1.5}, "`groups` must be"),
        ({"stem_width": 0}, "`stem_width` must be"),
        ({"head_units": -1}, "`head_units` must be"),
        ({"stackwise_num_filters": [0, 48]}, "`stackwise_num_filters` must be"),
        # A stage without blocks has no strides: the levels after it would be misnamed.
        ({"stackwise_num_blocks": [0, 1]}, "`stackwise_num_blocks` must be"),
        ({"stackwise_num_blocks": [1, 0]}, "`stackwise_num_blocks` must be"),
        ({**V1, "block_kinds": [5, 5, 5]}, "V1.*have no"),
        ({**V1, "stackwise_se": [True, True]}, "V1.*have no"),
        ({**V1, "stackwise_activations": ["relu", "silu"]}, "V1.*have no"),
        ({**V1, "channel_split": "alternate"}, "V1.*have no"),
        ({**V1, "stem_width": 11}, "must rise"),
        ({**V1, "stackwise_num_filters": [24, 24]}, "must rise"),
        ({"channel_split": "alternate", "stem_width": 24}, "must rise"),
        ({"classes": 0}, "`classes` must be a positive integer"),
        ({"dropout_rate": 1.0}, "`dropout_rate` must be"),
        ({"image_shape": (32, 32)}, "shape of one image"),
    ],
)
def test_shufflenet_refuses(options, match):
    with pytest.raises(ValueError, match=match) as error:
        ShuffleNet(**{**SMALL, **options})
    assert "Received" in str(error.value)
