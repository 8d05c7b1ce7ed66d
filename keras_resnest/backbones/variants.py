"""The published networks: one row of arguments, and so one builder, for each."""

import difflib
import fnmatch
import os
from collections.abc import Callable
from typing import NamedTuple

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.regnet import regnet_arguments
from keras_resnest.backbones.resnet import ResNet
from keras_resnest.backbones.shufflenet import ShuffleNet
from keras_resnest.backbones.vgg import VGG
from keras_resnest.backbones.weights.fetching import load_pretrained


class Variant(NamedTuple):
    """A network class and the arguments that make one of its published members."""

    network: type[Backbone]
    arguments: dict


# All that `create_backbone` knows, by name. Filled by `_variant`.
VARIANTS: dict[str, Variant] = {}

_DOCSTRING = """Builds {title}.

    Args:
        include_top: whether the model ends with the classifier.
        weights: `"imagenet"`, or another tag of `list_models({name!r})`, for published weights;
            the path of a `.safetensors`, `.weights.h5` or PyTorch `state_dict` file; or None
            for random weights.
        input_shape: shape of one image, by default `(None, None, 3)`: any size.
        pooling: without classifier, `"avg"` or `"max"` for a feature vector, None for a map.
        classes: integer, number of classes of the classifier.
        classifier_activation: activation of the classifier; None for logits.
        include_rescaling: whether images are RGB with values 0 to 255, uint8 or float, and are
            normalized by the model; otherwise they are expected normalized.
        name: name of the model, by default `{name!r}`.
        **kwargs: more arguments of `{network}`, such as `dropout_rate`, `data_format`, `dtype`.

    Returns:
        A `{network}`, which is a `keras.Model`.

    Raises:
        ValueError: if an argument does not fit, or `weights` do not fit the network.
        ConnectionError: if published weights cannot be fetched.

    Example:
        >>> model = {title}(include_top=False)
        >>> features = model.pyramid_outputs["P3"]
    """


def _variant(
    variant: str,
    title: str,
    arguments: dict,
    network: type[Backbone] = ResNet,
    has_top: bool = True,
) -> Callable[..., Backbone]:
    """Adds a row to the table. Returns its builder, in the manner of `keras.applications`."""

    def build(
        include_top: bool = has_top,
        weights: str | os.PathLike | None = None,
        input_shape=None,
        pooling: str | None = None,
        classes: int = 1000,
        classifier_activation="softmax",
        include_rescaling: bool = True,
        name: str | None = None,
        **kwargs,
    ) -> Backbone:
        model = network(
            **{
                **arguments,
                "include_top": include_top,
                "image_shape": input_shape,
                "pooling": pooling,
                "classes": classes,
                "classifier_activation": classifier_activation,
                "include_rescaling": include_rescaling,
                "name": name or variant,
                **kwargs,
            }
        )
        if weights is not None:
            load_pretrained(model, weights, variant)
        return model

    VARIANTS[variant] = Variant(network, arguments)
    _BUILDERS[variant] = build
    build.__name__ = build.__qualname__ = title
    build.__doc__ = _DOCSTRING.format(title=title, name=variant, network=network.__name__)
    return build


_BUILDERS: dict[str, Callable[..., Backbone]] = {}


# --- ResNet and its refinements --------------------------------------------------------------

_14, _18, _26, _50 = [1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2], [3, 4, 6, 3]
_101, _152 = [3, 4, 23, 3], [3, 8, 36, 3]


def _resnet(num_blocks: list, **arguments) -> dict:
    return {
        "stackwise_num_filters": [64, 128, 256, 512],
        "stackwise_num_blocks": num_blocks,
        **arguments,
    }


_BASIC = {"block_type": "basic"}
_C = {"stem_width": 32, "deep_stem": True}  # deep stem
_D = {**_C, "avg_down": True}  # and average pooling in the shortcuts
_SE = {"se_ratio": 1 / 16}

ResNet18 = _variant("resnet18", "ResNet18", _resnet(_18, **_BASIC))
ResNet34 = _variant("resnet34", "ResNet34", _resnet(_50, **_BASIC))
# As all implementations today, B: the stride is in the 3x3 convolution.
ResNet50 = _variant("resnet50", "ResNet50", _resnet(_50))
ResNet101 = _variant("resnet101", "ResNet101", _resnet(_101))
ResNet152 = _variant("resnet152", "ResNet152", _resnet(_152))
ResNet50C = _variant("resnet50c", "ResNet50C", _resnet(_50, **_C))
ResNet26D = _variant("resnet26d", "ResNet26D", _resnet(_26, **_D))
ResNet50D = _variant("resnet50d", "ResNet50D", _resnet(_50, **_D))
ResNet101D = _variant("resnet101d", "ResNet101D", _resnet(_101, **_D))
SEResNet18 = _variant("seresnet18", "SEResNet18", _resnet(_18, **_BASIC, **_SE))
SEResNet34 = _variant("seresnet34", "SEResNet34", _resnet(_50, **_BASIC, **_SE))
SEResNet50 = _variant("seresnet50", "SEResNet50", _resnet(_50, **_SE))
SEResNet101 = _variant("seresnet101", "SEResNet101", _resnet(_101, **_SE))
SEResNet152 = _variant("seresnet152", "SEResNet152", _resnet(_152, **_SE))
# <cardinality>x<base width>d
ResNeXt50_32x4d = _variant(
    "resnext50_32x4d", "ResNeXt50_32x4d", _resnet(_50, cardinality=32, base_width=4)
)
ResNeXt101_32x8d = _variant(
    "resnext101_32x8d", "ResNeXt101_32x8d", _resnet(_101, cardinality=32, base_width=8)
)

# --- SKNet and Res2Net -----------------------------------------------------------------------

_SK = {"selective_kernel": {"reduction_ratio": 1 / 8, "divisor": 16, "split_input": True}}
SKResNet18 = _variant("skresnet18", "SKResNet18", _resnet(_18, **_BASIC, **_SK))
SKResNet34 = _variant("skresnet34", "SKResNet34", _resnet(_50, **_BASIC, **_SK))
SKResNeXt50_32x4d = _variant(
    "skresnext50_32x4d",
    "SKResNeXt50_32x4d",
    _resnet(
        _50,
        cardinality=32,
        base_width=4,
        selective_kernel={"reduction_ratio": 1 / 16, "divisor": 32},
    ),
)
# <base width>w_<scale>s
Res2Net50_26w_4s = _variant(
    "res2net50_26w_4s", "Res2Net50_26w_4s", _resnet(_50, base_width=26, scale=4)
)
Res2Net50_14w_8s = _variant(
    "res2net50_14w_8s", "Res2Net50_14w_8s", _resnet(_50, base_width=14, scale=8)
)
Res2Net101_26w_4s = _variant(
    "res2net101_26w_4s", "Res2Net101_26w_4s", _resnet(_101, base_width=26, scale=4)
)

# --- ResNeSt ---------------------------------------------------------------------------------

_RESNEST = {"radix": 2, "deep_stem": True, "stem_width": 32, "avg_down": True, "avd": "after"}
_RESNEST_LARGE = {**_RESNEST, "stem_width": 64}
_FAST = {**_RESNEST, "avd": "before"}

ResNeSt14 = _variant("resnest14", "ResNeSt14", _resnet(_14, **_RESNEST))
ResNeSt26 = _variant("resnest26", "ResNeSt26", _resnet(_26, **_RESNEST))
ResNeSt50 = _variant("resnest50", "ResNeSt50", _resnet(_50, **_RESNEST))
ResNeSt101 = _variant("resnest101", "ResNeSt101", _resnet(_101, **_RESNEST_LARGE))
ResNeSt200 = _variant("resnest200", "ResNeSt200", _resnet([3, 24, 36, 3], **_RESNEST_LARGE))
ResNeSt269 = _variant("resnest269", "ResNeSt269", _resnet([3, 30, 48, 8], **_RESNEST_LARGE))
# <radix>s<cardinality>x<base width>d
ResNeSt50Fast1s1x64d = _variant(
    "resnest50_fast_1s1x64d", "ResNeSt50Fast1s1x64d", _resnet(_50, **{**_FAST, "radix": 1})
)
ResNeSt50Fast2s1x64d = _variant(
    "resnest50_fast_2s1x64d", "ResNeSt50Fast2s1x64d", _resnet(_50, **_FAST)
)
ResNeSt50Fast4s1x64d = _variant(
    "resnest50_fast_4s1x64d", "ResNeSt50Fast4s1x64d", _resnet(_50, **{**_FAST, "radix": 4})
)
ResNeSt50Fast1s2x40d = _variant(
    "resnest50_fast_1s2x40d",
    "ResNeSt50Fast1s2x40d",
    _resnet(_50, **{**_FAST, "radix": 1}, cardinality=2, base_width=40),
)
ResNeSt50Fast2s2x40d = _variant(
    "resnest50_fast_2s2x40d",
    "ResNeSt50Fast2s2x40d",
    _resnet(_50, **_FAST, cardinality=2, base_width=40),
)
ResNeSt50Fast4s2x40d = _variant(
    "resnest50_fast_4s2x40d",
    "ResNeSt50Fast4s2x40d",
    _resnet(_50, **{**_FAST, "radix": 4}, cardinality=2, base_width=40),
)
ResNeSt50Fast1s4x24d = _variant(
    "resnest50_fast_1s4x24d",
    "ResNeSt50Fast1s4x24d",
    _resnet(_50, **{**_FAST, "radix": 1}, cardinality=4, base_width=24),
)
# Not published: ResNeSt-14 with a quarter of the channels, to be trained on a CPU.
ResNeSt14Tiny = _variant(
    "resnest14_tiny",
    "ResNeSt14Tiny",
    {
        **_resnet(_14, **{**_RESNEST, "stem_width": 8}),
        "stackwise_num_filters": [16, 32, 64, 128],
    },
)

# --- RegNet: depth, initial width, slope, multiplier, group width ----------------------------

RegNetX002 = _variant("regnetx_002", "RegNetX002", regnet_arguments(13, 24, 36.44, 2.49, 8))
RegNetX004 = _variant("regnetx_004", "RegNetX004", regnet_arguments(22, 24, 24.48, 2.54, 16))
RegNetX006 = _variant("regnetx_006", "RegNetX006", regnet_arguments(16, 48, 36.97, 2.24, 24))
RegNetX008 = _variant("regnetx_008", "RegNetX008", regnet_arguments(16, 56, 35.73, 2.28, 16))
RegNetX016 = _variant("regnetx_016", "RegNetX016", regnet_arguments(18, 80, 34.01, 2.25, 24))
RegNetX032 = _variant("regnetx_032", "RegNetX032", regnet_arguments(25, 88, 26.31, 2.25, 48))
RegNetY002 = _variant("regnety_002", "RegNetY002", regnet_arguments(13, 24, 36.44, 2.49, 8, 0.25))
RegNetY004 = _variant("regnety_004", "RegNetY004", regnet_arguments(16, 48, 27.89, 2.09, 8, 0.25))
RegNetY006 = _variant("regnety_006", "RegNetY006", regnet_arguments(15, 48, 32.54, 2.32, 16, 0.25))
RegNetY008 = _variant("regnety_008", "RegNetY008", regnet_arguments(14, 56, 38.84, 2.4, 16, 0.25))
RegNetY016 = _variant("regnety_016", "RegNetY016", regnet_arguments(27, 48, 20.71, 2.65, 24, 0.25))
RegNetY032 = _variant("regnety_032", "RegNetY032", regnet_arguments(21, 80, 42.63, 2.66, 24, 0.25))

# --- VGG -------------------------------------------------------------------------------------

_VGG16 = {
    "stackwise_num_filters": [64, 128, 256, 512, 512],
    "stackwise_num_blocks": [2, 2, 3, 3, 3],
}
VGG16 = _variant("vgg16", "VGG16", _VGG16, VGG)
# With the dense layers of SSD and RefineDet, and without classifier.
VGG16Reduced = _variant(
    "vgg16_reduced", "VGG16Reduced", {**_VGG16, "reduced_top": True}, VGG, has_top=False
)


# --- ShuffleNet ------------------------------------------------------------------------------


def _shufflenet_v1(groups: int, scale: float, stem_width: int) -> dict:
    width = int({3: 240, 8: 384}[groups] * scale)  # table 1 of the paper
    return {
        "stackwise_num_filters": [width, 2 * width, 4 * width],
        "stackwise_num_blocks": [4, 8, 4],
        "groups": groups,
        "stem_width": stem_width,
        "use_classifier_bias": False,
        "trained_on_bgr": True,
    }


def _shufflenet_v2(width: int, head_filters: int = 1024, **arguments) -> dict:
    return {
        "stackwise_num_filters": [width, 2 * width, 4 * width],
        "stackwise_num_blocks": [4, 8, 4],
        "head_filters": head_filters,
        **arguments,
    }


_MEGVII = {"channel_split": "alternate", "use_classifier_bias": False, "trained_on_bgr": True}


def _shufflenet_v2_plus(*widths: int) -> dict:
    return {
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


ShuffleNetV1G3_0_5x = _variant(
    "shufflenet_v1_g3_0_5x",
    "ShuffleNetV1G3_0_5x",
    _shufflenet_v1(3, 0.5, 12),
    ShuffleNet,
)
ShuffleNetV1G3_1_0x = _variant(
    "shufflenet_v1_g3_1_0x",
    "ShuffleNetV1G3_1_0x",
    _shufflenet_v1(3, 1.0, 24),
    ShuffleNet,
)
ShuffleNetV1G3_1_5x = _variant(
    "shufflenet_v1_g3_1_5x",
    "ShuffleNetV1G3_1_5x",
    _shufflenet_v1(3, 1.5, 24),
    ShuffleNet,
)
ShuffleNetV1G3_2_0x = _variant(
    "shufflenet_v1_g3_2_0x",
    "ShuffleNetV1G3_2_0x",
    _shufflenet_v1(3, 2.0, 48),
    ShuffleNet,
)
ShuffleNetV1G8_0_5x = _variant(
    "shufflenet_v1_g8_0_5x",
    "ShuffleNetV1G8_0_5x",
    _shufflenet_v1(8, 0.5, 16),
    ShuffleNet,
)
ShuffleNetV1G8_1_0x = _variant(
    "shufflenet_v1_g8_1_0x",
    "ShuffleNetV1G8_1_0x",
    _shufflenet_v1(8, 1.0, 24),
    ShuffleNet,
)
ShuffleNetV1G8_1_5x = _variant(
    "shufflenet_v1_g8_1_5x",
    "ShuffleNetV1G8_1_5x",
    _shufflenet_v1(8, 1.5, 24),
    ShuffleNet,
)
ShuffleNetV1G8_2_0x = _variant(
    "shufflenet_v1_g8_2_0x",
    "ShuffleNetV1G8_2_0x",
    _shufflenet_v1(8, 2.0, 48),
    ShuffleNet,
)
# As in torchvision.
ShuffleNetV2_0_5x = _variant(
    "shufflenet_v2_0_5x", "ShuffleNetV2_0_5x", _shufflenet_v2(48), ShuffleNet
)
ShuffleNetV2_1_0x = _variant(
    "shufflenet_v2_1_0x", "ShuffleNetV2_1_0x", _shufflenet_v2(116), ShuffleNet
)
ShuffleNetV2_1_5x = _variant(
    "shufflenet_v2_1_5x", "ShuffleNetV2_1_5x", _shufflenet_v2(176), ShuffleNet
)
ShuffleNetV2_2_0x = _variant(
    "shufflenet_v2_2_0x", "ShuffleNetV2_2_0x", _shufflenet_v2(244, 2048), ShuffleNet
)
# As in megvii's implementation.
ShuffleNetV2_0_5x_megvii = _variant(
    "shufflenet_v2_0_5x_megvii",
    "ShuffleNetV2_0_5x_megvii",
    _shufflenet_v2(48, **_MEGVII),
    ShuffleNet,
)
ShuffleNetV2_1_0x_megvii = _variant(
    "shufflenet_v2_1_0x_megvii",
    "ShuffleNetV2_1_0x_megvii",
    _shufflenet_v2(116, **_MEGVII),
    ShuffleNet,
)
ShuffleNetV2_1_5x_megvii = _variant(
    "shufflenet_v2_1_5x_megvii",
    "ShuffleNetV2_1_5x_megvii",
    _shufflenet_v2(176, **_MEGVII),
    ShuffleNet,
)
ShuffleNetV2_2_0x_megvii = _variant(
    "shufflenet_v2_2_0x_megvii",
    "ShuffleNetV2_2_0x_megvii",
    _shufflenet_v2(244, 2048, **_MEGVII),
    ShuffleNet,
)
ShuffleNetV2PlusSmall = _variant(
    "shufflenet_v2_plus_small",
    "ShuffleNetV2PlusSmall",
    _shufflenet_v2_plus(36, 104, 208, 416),
    ShuffleNet,
)
ShuffleNetV2PlusMedium = _variant(
    "shufflenet_v2_plus_medium",
    "ShuffleNetV2PlusMedium",
    _shufflenet_v2_plus(48, 128, 256, 512),
    ShuffleNet,
)
ShuffleNetV2PlusLarge = _variant(
    "shufflenet_v2_plus_large",
    "ShuffleNetV2PlusLarge",
    _shufflenet_v2_plus(68, 168, 336, 672),
    ShuffleNet,
)


def list_backbones(pattern: str = "*") -> list[str]:
    """Returns the names that `create_backbone` knows.

    Args:
        pattern: shell pattern, such as `"resnest*"`. Case does not matter.

    Returns:
        List of names in the order of the table.

    Example:
        >>> list_backbones("*vgg*")
        ['vgg16', 'vgg16_reduced']
    """
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern.lower())]


def create_backbone(name: str, **kwargs) -> Backbone:
    """Builds a backbone by name.

    Args:
        name: one of `list_backbones()`. Case does not matter.
        **kwargs: arguments of the builder, see `ResNeSt50`.

    Returns:
        A `Backbone`, which is a `keras.Model`.

    Raises:
        ValueError: if no backbone has this name, or an argument has a wrong value.

    Example:
        >>> backbone = create_backbone("resnest50", include_top=False)
        >>> list(backbone.pyramid_outputs)
        ['P2', 'P3', 'P4', 'P5']
    """
    variant = str(name).lower()
    if variant not in VARIANTS:
        nearest = difflib.get_close_matches(variant, VARIANTS, n=3, cutoff=0.0)
        raise ValueError(
            f"Unknown backbone. Received: name={name!r}. Nearest names: {', '.join(nearest)}. "
            "`list_backbones()` returns all."
        )
    return _BUILDERS[variant](**kwargs)
