"""The published networks: a row of arguments makes the builder of each."""

from keras_resnest.backbones.registry import register as _register
from keras_resnest.backbones.regnet import regnet_arguments as _regnet_arguments
from keras_resnest.backbones.resnet import ResNet
from keras_resnest.backbones.shufflenet import ShuffleNet
from keras_resnest.backbones.vgg import VGG

# === ResNet and its refinements ===


def _resnet(name: str, title: str, num_blocks: list, filters=(64, 128, 256, 512), **arguments):
    stages = {"stackwise_num_filters": list(filters), "stackwise_num_blocks": num_blocks}
    return _register(name, title, ResNet, {**stages, **arguments})


_14, _18, _26, _50 = [1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2], [3, 4, 6, 3]
_101, _152 = [3, 4, 23, 3], [3, 8, 36, 3]
_BASIC = {"block_type": "basic"}
_C = {"stem_width": 32, "deep_stem": True}  # deep stem
_D = {**_C, "avg_down": True}  # and average pooling in the shortcuts
_SE = {"se_ratio": 1 / 16}

ResNet18 = _resnet("resnet18", "ResNet18", _18, **_BASIC)
ResNet34 = _resnet("resnet34", "ResNet34", _50, **_BASIC)
# "B", as in all implementations today: the stride is in the 3x3 convolution.
ResNet50 = _resnet("resnet50", "ResNet50", _50)
ResNet101 = _resnet("resnet101", "ResNet101", _101)
ResNet152 = _resnet("resnet152", "ResNet152", _152)
ResNet50C = _resnet("resnet50c", "ResNet50C", _50, **_C)
ResNet26D = _resnet("resnet26d", "ResNet26D", _26, **_D)
ResNet50D = _resnet("resnet50d", "ResNet50D", _50, **_D)
ResNet101D = _resnet("resnet101d", "ResNet101D", _101, **_D)
SEResNet18 = _resnet("seresnet18", "SEResNet18", _18, **_BASIC, **_SE)
SEResNet34 = _resnet("seresnet34", "SEResNet34", _50, **_BASIC, **_SE)
SEResNet50 = _resnet("seresnet50", "SEResNet50", _50, **_SE)
SEResNet101 = _resnet("seresnet101", "SEResNet101", _101, **_SE)
SEResNet152 = _resnet("seresnet152", "SEResNet152", _152, **_SE)

# ResNeXt: <cardinality>x<base width>d
_32x4d = {"cardinality": 32, "base_width": 4}
_32x8d = {"cardinality": 32, "base_width": 8}
ResNeXt50_32x4d = _resnet("resnext50_32x4d", "ResNeXt50_32x4d", _50, **_32x4d)
ResNeXt101_32x8d = _resnet("resnext101_32x8d", "ResNeXt101_32x8d", _101, **_32x8d)

# === SKNet and Res2Net ===

_SK = {"selective_kernel": {"reduction_ratio": 1 / 8, "divisor": 16, "split_input": True}}
_SKX = {"selective_kernel": {"reduction_ratio": 1 / 16, "divisor": 32}}
SKResNet18 = _resnet("skresnet18", "SKResNet18", _18, **_BASIC, **_SK)
SKResNet34 = _resnet("skresnet34", "SKResNet34", _50, **_BASIC, **_SK)
SKResNeXt50_32x4d = _resnet("skresnext50_32x4d", "SKResNeXt50_32x4d", _50, **_32x4d, **_SKX)

# Res2Net: <base width>w_<scale>s
_26w_4s = {"base_width": 26, "scale": 4}
_14w_8s = {"base_width": 14, "scale": 8}
Res2Net50_26w_4s = _resnet("res2net50_26w_4s", "Res2Net50_26w_4s", _50, **_26w_4s)
Res2Net50_14w_8s = _resnet("res2net50_14w_8s", "Res2Net50_14w_8s", _50, **_14w_8s)
Res2Net101_26w_4s = _resnet("res2net101_26w_4s", "Res2Net101_26w_4s", _101, **_26w_4s)

# === ResNeSt ===

_RESNEST = {"radix": 2, "deep_stem": True, "stem_width": 32, "avg_down": True, "avd": "after"}
_LARGE = {**_RESNEST, "stem_width": 64}
ResNeSt14 = _resnet("resnest14", "ResNeSt14", _14, **_RESNEST)
ResNeSt26 = _resnet("resnest26", "ResNeSt26", _26, **_RESNEST)
ResNeSt50 = _resnet("resnest50", "ResNeSt50", _50, **_RESNEST)
ResNeSt101 = _resnet("resnest101", "ResNeSt101", _101, **_LARGE)
ResNeSt200 = _resnet("resnest200", "ResNeSt200", [3, 24, 36, 3], **_LARGE)
ResNeSt269 = _resnet("resnest269", "ResNeSt269", [3, 30, 48, 8], **_LARGE)


# ResNeSt-50-fast: <radix>s<cardinality>x<base width>d
def _fast(name: str, title: str, radix: int, cardinality: int, base_width: int):
    groups = {"radix": radix, "cardinality": cardinality, "base_width": base_width}
    return _resnet(name, title, _50, **{**_RESNEST, "avd": "before", **groups})


ResNeSt50Fast1s1x64d = _fast("resnest50_fast_1s1x64d", "ResNeSt50Fast1s1x64d", 1, 1, 64)
ResNeSt50Fast2s1x64d = _fast("resnest50_fast_2s1x64d", "ResNeSt50Fast2s1x64d", 2, 1, 64)
ResNeSt50Fast4s1x64d = _fast("resnest50_fast_4s1x64d", "ResNeSt50Fast4s1x64d", 4, 1, 64)
ResNeSt50Fast1s2x40d = _fast("resnest50_fast_1s2x40d", "ResNeSt50Fast1s2x40d", 1, 2, 40)
ResNeSt50Fast2s2x40d = _fast("resnest50_fast_2s2x40d", "ResNeSt50Fast2s2x40d", 2, 2, 40)
ResNeSt50Fast4s2x40d = _fast("resnest50_fast_4s2x40d", "ResNeSt50Fast4s2x40d", 4, 2, 40)
ResNeSt50Fast1s4x24d = _fast("resnest50_fast_1s4x24d", "ResNeSt50Fast1s4x24d", 1, 4, 24)

# Not published: ResNeSt-14 with a quarter of the channels, for training on a CPU.
_TINY = {**_RESNEST, "stem_width": 8, "filters": (16, 32, 64, 128)}
ResNeSt14Tiny = _resnet("resnest14_tiny", "ResNeSt14Tiny", _14, **_TINY)

# === RegNet: depth, initial width, slope, multiplier, group width, SE ratio ===


def _regnet(name: str, title: str, *arguments):
    return _register(name, title, ResNet, _regnet_arguments(*arguments))


RegNetX002 = _regnet("regnetx_002", "RegNetX002", 13, 24, 36.44, 2.49, 8)
RegNetX004 = _regnet("regnetx_004", "RegNetX004", 22, 24, 24.48, 2.54, 16)
RegNetX006 = _regnet("regnetx_006", "RegNetX006", 16, 48, 36.97, 2.24, 24)
RegNetX008 = _regnet("regnetx_008", "RegNetX008", 16, 56, 35.73, 2.28, 16)
RegNetX016 = _regnet("regnetx_016", "RegNetX016", 18, 80, 34.01, 2.25, 24)
RegNetX032 = _regnet("regnetx_032", "RegNetX032", 25, 88, 26.31, 2.25, 48)
RegNetY002 = _regnet("regnety_002", "RegNetY002", 13, 24, 36.44, 2.49, 8, 0.25)
RegNetY004 = _regnet("regnety_004", "RegNetY004", 16, 48, 27.89, 2.09, 8, 0.25)
RegNetY006 = _regnet("regnety_006", "RegNetY006", 15, 48, 32.54, 2.32, 16, 0.25)
RegNetY008 = _regnet("regnety_008", "RegNetY008", 14, 56, 38.84, 2.4, 16, 0.25)
RegNetY016 = _regnet("regnety_016", "RegNetY016", 27, 48, 20.71, 2.65, 24, 0.25)
RegNetY032 = _regnet("regnety_032", "RegNetY032", 21, 80, 42.63, 2.66, 24, 0.25)

# === VGG ===

_VGG16 = {
    "stackwise_num_filters": [64, 128, 256, 512, 512],
    "stackwise_num_blocks": [2, 2, 3, 3, 3],
}
VGG16 = _register("vgg16", "VGG16", VGG, _VGG16)
# With the dense layers of SSD and RefineDet, without a classifier.
VGG16Reduced = _register(
    "vgg16_reduced", "VGG16Reduced", VGG, {**_VGG16, "reduced_top": True}, has_top=False
)

# === ShuffleNet ===


def _shufflenet_v1(name: str, title: str, groups: int, scale: float, stem_width: int):
    width = int({3: 240, 8: 384}[groups] * scale)  # table 1 of the paper
    arguments = {
        "stackwise_num_filters": [width, 2 * width, 4 * width],
        "stackwise_num_blocks": [4, 8, 4],
        "groups": groups,
        "stem_width": stem_width,
        "use_classifier_bias": False,
        "trained_on_bgr": True,
    }
    return _register(name, title, ShuffleNet, arguments)


def _shufflenet_v2(name: str, title: str, width: int, head_filters: int = 1024, **arguments):
    arguments = {
        "stackwise_num_filters": [width, 2 * width, 4 * width],
        "stackwise_num_blocks": [4, 8, 4],
        "head_filters": head_filters,
        **arguments,
    }
    return _register(name, title, ShuffleNet, arguments)


_MEGVII = {"channel_split": "alternate", "use_classifier_bias": False, "trained_on_bgr": True}


def _v2_megvii(name: str, title: str, width: int, head_filters: int = 1024):
    return _shufflenet_v2(name, title, width, head_filters, **_MEGVII)


def _v2_plus(name: str, title: str, *widths: int):
    arguments = {
        "stackwise_num_filters": list(widths),
        "stackwise_num_blocks": [4, 4, 8, 4],
        "block_kinds": [
            *(3, 3, "xception", 5),
            *(5, 5, 3, 3),
            *(7, 3, 7, 5, 5, 3, 7, 3),
            *(7, 5, "xception", 7),
        ],
        "stackwise_activations": ["relu", "hard_swish", "hard_swish", "hard_swish"],
        "stackwise_se": [False, False, True, True],
        "stem_width": 16,
        "stem_activation": "hard_swish",
        "stem_pooling": False,
        "head_filters": 1280,
        "head_units": 1280,
        **_MEGVII,
    }
    return _register(name, title, ShuffleNet, arguments)


ShuffleNetV1G3_0_5x = _shufflenet_v1("shufflenet_v1_g3_0_5x", "ShuffleNetV1G3_0_5x", 3, 0.5, 12)
ShuffleNetV1G3_1_0x = _shufflenet_v1("shufflenet_v1_g3_1_0x", "ShuffleNetV1G3_1_0x", 3, 1.0, 24)
ShuffleNetV1G3_1_5x = _shufflenet_v1("shufflenet_v1_g3_1_5x", "ShuffleNetV1G3_1_5x", 3, 1.5, 24)
ShuffleNetV1G3_2_0x = _shufflenet_v1("shufflenet_v1_g3_2_0x", "ShuffleNetV1G3_2_0x", 3, 2.0, 48)
ShuffleNetV1G8_0_5x = _shufflenet_v1("shufflenet_v1_g8_0_5x", "ShuffleNetV1G8_0_5x", 8, 0.5, 16)
ShuffleNetV1G8_1_0x = _shufflenet_v1("shufflenet_v1_g8_1_0x", "ShuffleNetV1G8_1_0x", 8, 1.0, 24)
ShuffleNetV1G8_1_5x = _shufflenet_v1("shufflenet_v1_g8_1_5x", "ShuffleNetV1G8_1_5x", 8, 1.5, 24)
ShuffleNetV1G8_2_0x = _shufflenet_v1("shufflenet_v1_g8_2_0x", "ShuffleNetV1G8_2_0x", 8, 2.0, 48)
# As in torchvision.
ShuffleNetV2_0_5x = _shufflenet_v2("shufflenet_v2_0_5x", "ShuffleNetV2_0_5x", 48)
ShuffleNetV2_1_0x = _shufflenet_v2("shufflenet_v2_1_0x", "ShuffleNetV2_1_0x", 116)
ShuffleNetV2_1_5x = _shufflenet_v2("shufflenet_v2_1_5x", "ShuffleNetV2_1_5x", 176)
ShuffleNetV2_2_0x = _shufflenet_v2("shufflenet_v2_2_0x", "ShuffleNetV2_2_0x", 244, 2048)
# As in megvii's implementation.
ShuffleNetV2_0_5x_megvii = _v2_megvii("shufflenet_v2_0_5x_megvii", "ShuffleNetV2_0_5x_megvii", 48)
ShuffleNetV2_1_0x_megvii = _v2_megvii("shufflenet_v2_1_0x_megvii", "ShuffleNetV2_1_0x_megvii", 116)
ShuffleNetV2_1_5x_megvii = _v2_megvii("shufflenet_v2_1_5x_megvii", "ShuffleNetV2_1_5x_megvii", 176)
ShuffleNetV2_2_0x_megvii = _v2_megvii(
    "shufflenet_v2_2_0x_megvii", "ShuffleNetV2_2_0x_megvii", 244, 2048
)
ShuffleNetV2PlusSmall = _v2_plus(
    "shufflenet_v2_plus_small", "ShuffleNetV2PlusSmall", 36, 104, 208, 416
)
ShuffleNetV2PlusMedium = _v2_plus(
    "shufflenet_v2_plus_medium", "ShuffleNetV2PlusMedium", 48, 128, 256, 512
)
ShuffleNetV2PlusLarge = _v2_plus(
    "shufflenet_v2_plus_large", "ShuffleNetV2PlusLarge", 68, 168, 336, 672
)
