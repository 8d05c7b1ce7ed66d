"""The table of networks against the built networks and published figures."""

import importlib.util
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import keras_resnest as kr
from keras_resnest.backbones import PRETRAINED, VARIANTS, ResNet, count_multiply_adds
from keras_resnest.backbones.figures import FIGURES
from keras_resnest.backbones.zoo import count_parameters, crop_size

ROOT = Path(__file__).resolve().parents[1]

# What timm's benchmarks print for its networks (billions of multiply-adds, two digits)
# with the side of the images. Their counter counts batch normalizations too: up to 1 % more.
TIMM = {
    "resnest14": (2.76, 224),
    "resnest26": (3.64, 224),
    "resnest50": (5.40, 224),
    "resnest101": (13.38, 256),
    "resnest200": (35.69, 320),
    "resnest269": (77.69, 416),
    "resnest50_fast_4s2x40d": (4.40, 224),
    "resnest50_fast_1s4x24d": (4.43, 224),
    "resnet18": (1.82, 224),
    "resnet34": (3.67, 224),
    "resnet50": (4.11, 224),
    "resnet101": (7.83, 224),
    "resnet152": (11.56, 224),
    "resnet26d": (2.60, 224),
    "resnet50d": (4.35, 224),
    "resnet101d": (16.48, 320),
    "seresnet50": (4.11, 224),
    "skresnet18": (1.82, 224),
    "skresnet34": (3.67, 224),
    "resnext50_32x4d": (4.26, 224),
    "resnext101_32x8d": (16.48, 224),
    "res2net50_26w_4s": (4.28, 224),
    "res2net50_14w_8s": (4.21, 224),
    "res2net101_26w_4s": (8.10, 224),
    "regnetx_004": (0.40, 224),
    "regnetx_006": (0.61, 224),
    "regnetx_008": (0.81, 224),
    "regnetx_016": (1.62, 224),
    "regnetx_032": (3.20, 224),
    "regnety_004": (0.41, 224),
    "regnety_008": (0.81, 224),
    "regnety_016": (1.63, 224),
    "regnety_032": (5.29, 288),
    "vgg16": (15.47, 224),
}
# Of the ResNeSt paper and its repository's ablation table.
PAPER = {
    "resnest50": 5.39,
    "resnest50_fast_1s1x64d": 4.34,
    "resnest50_fast_2s1x64d": 4.34,
    "resnest50_fast_4s1x64d": 4.35,
    "resnest50_fast_1s2x40d": 4.38,
    "resnest50_fast_2s2x40d": 4.38,
    "resnest50_fast_4s2x40d": 4.41,
    "resnest50_fast_1s4x24d": 4.42,
    # pycls' tables, one digit
    "regnetx_002": 0.2,
    "regnetx_004": 0.4,
    "regnetx_006": 0.6,
    "regnetx_008": 0.8,
    "regnetx_016": 1.6,
    "regnetx_032": 3.2,
    "regnety_002": 0.2,
    "regnety_004": 0.4,
    "regnety_006": 0.6,
    "regnety_008": 0.8,
    "regnety_016": 1.6,
    "regnety_032": 3.2,
    # megvii's tables
    "shufflenet_v1_g3_0_5x": 0.038,
    "shufflenet_v1_g3_1_0x": 0.138,
    "shufflenet_v1_g3_1_5x": 0.292,
    "shufflenet_v1_g3_2_0x": 0.524,
    "shufflenet_v1_g8_0_5x": 0.040,
    "shufflenet_v1_g8_1_0x": 0.138,
    "shufflenet_v1_g8_1_5x": 0.290,
    "shufflenet_v1_g8_2_0x": 0.522,
    "shufflenet_v2_0_5x_megvii": 0.041,
    "shufflenet_v2_1_0x_megvii": 0.146,
    "shufflenet_v2_1_5x_megvii": 0.299,
    "shufflenet_v2_2_0x_megvii": 0.591,
    "shufflenet_v2_plus_small": 0.156,
    "shufflenet_v2_plus_medium": 0.222,
    "shufflenet_v2_plus_large": 0.360,
}


@pytest.mark.parametrize("name", TIMM)
def test_figures_agree_with_timm(name):
    published, size = TIMM[name]
    ours = FIGURES[name][1] * (size / crop_size(name)) ** 2
    # 1 %, and half a digit of the published figure.
    assert abs(ours - published) < 0.01 * published + 0.005


@pytest.mark.parametrize("name", PAPER)
def test_figures_agree_with_the_papers(name):
    digit = 0.005 if PAPER[name] > 1 else 0.0005
    assert abs(FIGURES[name][1] - PAPER[name]) < 0.01 * PAPER[name] + digit


def test_multiply_adds_of_layers_by_hand():
    inputs = keras.Input((20, 30, 6))
    x = layers.Conv2D(8, 3, strides=2, padding="same")(inputs)
    x = kr.layers.GroupedConv2D(12, 3, padding="same", groups=2)(x)
    x = layers.DepthwiseConv2D(5, padding="same")(x)
    x = layers.Conv2D(4, 3, padding="same", dilation_rate=3)(x)
    x = layers.Conv2DTranspose(5, 2, strides=2)(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(7)(x))
    cells = 10 * 15
    want = cells * 8 * 9 * 6 + cells * 12 * 9 * 4 + cells * 12 * 25 + cells * 4 * 9 * 12
    want += cells * 4 * 4 * 5 + 5 * 7  # each value becomes 2 x 2 x 5 others
    assert count_multiply_adds(model, (20, 30, 6)) == want
    # Counting leaves the model as it was.
    assert all("call" not in vars(layer) for layer in model._flatten_layers())
    assert model(np.ones((1, 20, 30, 6), "float32")).shape == (1, 7)


def test_multiply_adds_inside_layers_and_of_shared_layers():
    inputs = keras.Input((8, 8, 16))
    # Two 3x3 convolutions of 12 channels as one, and two dense layers of a pooled map.
    attention = kr.layers.SplitAttention(12, radix=2)
    x = attention(attention_input := layers.Dense(12)(inputs))
    model = keras.Model(inputs, layers.Add()([attention(x), attention_input]))
    hidden = attention.get_weights()
    dense = sum(w.size for w in hidden if w.ndim == 4 and w.shape[:2] == (1, 1))
    dense += sum(w.size for w in hidden if w.ndim == 2)
    once = 64 * 9 * (12 // 2) * (2 * 12) + dense
    assert count_multiply_adds(model, (8, 8, 16)) == 64 * 16 * 12 + 2 * once


def test_multiply_adds_of_vgg16_reduced_by_hand():
    # 3x3 convolutions of maps of 224, 112, 56, 28 and 14 pixels, then of 7 pixels: 3x3 with
    # dilation and 1x1.
    widths = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)]
    widths += [(256, 512), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512)]
    sides = [224] * 2 + [112] * 2 + [56] * 3 + [28] * 3 + [14] * 3
    want = sum(9 * i * o * side**2 for (i, o), side in zip(widths, sides, strict=True))
    want += 49 * (9 * 512 * 1024 + 1024 * 1024)
    assert FIGURES["vgg16_reduced"][1] == round(want / 1e9, 4)


@pytest.mark.parametrize("shape", [(224, 224), (None, None, 3), (0, 64, 3), (64, 64, 4)])
def test_counting_refuses_other_shapes(shape):
    model = ResNet([8], [1], [1], stem_width=8)
    with pytest.raises(ValueError):
        count_multiply_adds(model, shape)
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


def build(name):
    size = crop_size(name)
    return kr.create_backbone(name, input_shape=(size, size, 3)), (size, size, 3)


def check_figures(name):
    model, shape = build(name)
    assert count_parameters(model) == FIGURES[name][0]
    assert count_multiply_adds(model, shape) / 1e9 == pytest.approx(FIGURES[name][1], rel=1e-3)


@pytest.mark.parametrize("name", ["resnest14_tiny", "skresnet18", "shufflenet_v1_g3_0_5x"])
def test_figures_are_those_of_what_is_built(name):
    check_figures(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_all_figures_are_those_of_what_is_built(name):
    check_figures(name)


def test_every_network_has_figures():
    assert list(FIGURES) == list(VARIANTS)


def test_list_models():
    models = kr.list_models()
    assert [model.name for model in models] == list(VARIANTS)
    (resnest,) = kr.list_models("ResNeSt101")
    assert resnest.parameters == 48_275_016 and resnest.crop_size == 256
    assert resnest.weights == ("in1k", "official")
    assert resnest.licenses == ("apache-2.0", "apache-2.0")
    assert resnest.sources[0] == "timm/resnest101e.in1k"
    assert kr.list_models("nothing*") == []
    text = str(kr.list_models("resnest50_fast*"))
    assert text.count("\n") == 8 and "| resnest50_fast_2s1x64d | 27.48 M |" in text
    for model in models:
        assert model.weights == tuple(PRETRAINED.get(model.name, ()))


def test_the_written_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate_zoo", ROOT / "docs/generate_zoo.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    whole, part = generator.tables()
    assert (ROOT / "docs/zoo.md").read_text() == whole
    assert part in (ROOT / "README.md").read_text()


def test_counting_needs_no_fixed_input_shape():
    model = ResNet([8], [1], [1], stem_width=8)
    one, two = (count_multiply_adds(model, (side, side, 3)) for side in (64, 128))
    assert two == 4 * one and isinstance(one, int | np.integer)
