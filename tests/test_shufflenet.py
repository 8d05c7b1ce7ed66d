"""The shuffle, the depthwise convolution and ShuffleNet's own options."""

import keras
import numpy as np
import pytest

from keras_resnest.backbones import ShuffleNet, create_backbone
from keras_resnest.layers import ChannelShuffle, DepthwiseConv2D


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("groups, channels", [(2, 4), (3, 12), (4, 4), (1, 5)])
def test_channel_shuffle_deals_the_channels_out(groups, channels, data_format):
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


def test_rescaling_gives_megviis_networks_bgr():
    """Its first convolution sees the pixels as they are, blue first."""
    model = create_backbone("shufflenet_v2_0_5x_megvii", include_top=False)
    plain = create_backbone("shufflenet_v2_0_5x_megvii", include_top=False, include_rescaling=False)
    plain.set_weights(model.get_weights()[-len(plain.get_weights()) :])
    x = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype="uint8")
    want = np.asarray(plain(x[..., ::-1].astype("float32"), training=False))
    assert np.array_equal(model(x, training=False), want)


SMALL = {"stackwise_num_filters": [24, 48], "stackwise_num_blocks": [2, 1]}


@pytest.mark.parametrize(
    "options, match",
    [
        ({"stackwise_num_blocks": [2]}, "one entry per stage"),
        ({"stackwise_se": [True]}, "one entry per stage"),
        ({"channel_split": "thirds"}, "`channel_split` must be one of"),
        ({"block_kinds": [3, 3]}, "for each of the 3 blocks"),
        ({"block_kinds": [3, 4, 3]}, "one of 3, 5, 7"),
        ({"block_kinds": [3, 3, "xception"]}, "cannot be 'xception'"),
        ({"groups": 5}, "multiples of"),
        ({"classes": 0}, "`classes` must be a positive integer"),
        ({"dropout_rate": 1.0}, "`dropout_rate` must be"),
        ({"image_shape": (32, 32)}, "shape of one image"),
    ],
)
def test_shufflenet_refuses(options, match):
    with pytest.raises(ValueError, match=match) as error:
        ShuffleNet(**{**SMALL, **options})
    assert "Received" in str(error.value)
