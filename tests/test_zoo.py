"""The table of networks: what it says is what is built, and what others count."""

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

# What timm's benchmarks print for its networks (thousand millions of multiply-adds, two digits)
# with the side of the pictures.
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
    # megvii's tables
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
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(7)(x))
    cells = 10 * 15
    want = cells * 8 * 9 * 6 + cells * 12 * 9 * 4 + cells * 12 * 25 + 12 * 7
    assert count_multiply_adds(model, (20, 30, 6)) == want


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
    assert resnest.licences == ("apache-2.0", "apache-2.0")
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
