"""The published networks: a table of arguments, and a builder for each row."""

import difflib
import fnmatch
import os
from collections.abc import Callable

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.resnet import ResNet
from keras_resnest.backbones.vgg import VGG

_RESNEST = {
    "stackwise_num_filters": [64, 128, 256, 512],
    "radix": 2,
    "stem_width": 32,
    "deep_stem": True,
    "avg_down": True,
    "avd": "after",
}
_RESNEST_FAST = {**_RESNEST, "stackwise_num_blocks": [3, 4, 6, 3], "avd": "before"}
_RESNET = {"stackwise_num_filters": [64, 128, 256, 512]}
_DEEP_STEM = {"stem_width": 32, "deep_stem": True}
_RESNET_D = {**_RESNET, **_DEEP_STEM, "avg_down": True}

# The arguments of `ResNet` (or `VGG`) that make each network.
VARIANTS = {
    "resnest14": {**_RESNEST, "stackwise_num_blocks": [1, 1, 1, 1]},
    "resnest26": {**_RESNEST, "stackwise_num_blocks": [2, 2, 2, 2]},
    "resnest50": {**_RESNEST, "stackwise_num_blocks": [3, 4, 6, 3]},
    "resnest101": {**_RESNEST, "stackwise_num_blocks": [3, 4, 23, 3], "stem_width": 64},
    "resnest200": {**_RESNEST, "stackwise_num_blocks": [3, 24, 36, 3], "stem_width": 64},
    "resnest269": {**_RESNEST, "stackwise_num_blocks": [3, 30, 48, 8], "stem_width": 64},
    # <radix>s<cardinality>x<base width>d
    "resnest50_fast_1s1x64d": {**_RESNEST_FAST, "radix": 1},
    "resnest50_fast_2s1x64d": {**_RESNEST_FAST},
    "resnest50_fast_4s1x64d": {**_RESNEST_FAST, "radix": 4},
    "resnest50_fast_1s2x40d": {**_RESNEST_FAST, "radix": 1, "cardinality": 2, "base_width": 40},
    "resnest50_fast_2s2x40d": {**_RESNEST_FAST, "cardinality": 2, "base_width": 40},
    "resnest50_fast_4s2x40d": {**_RESNEST_FAST, "radix": 4, "cardinality": 2, "base_width": 40},
    "resnest50_fast_1s4x24d": {**_RESNEST_FAST, "radix": 1, "cardinality": 4, "base_width": 24},
    # Not published: ResNeSt-14 with a quarter of the channels, to be trained on a CPU.
    "resnest14_tiny": {
        **_RESNEST,
        "stackwise_num_filters": [16, 32, 64, 128],
        "stackwise_num_blocks": [1, 1, 1, 1],
        "stem_width": 8,
    },
    "resnet18": {**_RESNET, "stackwise_num_blocks": [2, 2, 2, 2], "block_type": "basic"},
    "resnet34": {**_RESNET, "stackwise_num_blocks": [3, 4, 6, 3], "block_type": "basic"},
    "resnet50": {**_RESNET, "stackwise_num_blocks": [3, 4, 6, 3]},
    "resnet101": {**_RESNET, "stackwise_num_blocks": [3, 4, 23, 3]},
    "resnet152": {**_RESNET, "stackwise_num_blocks": [3, 8, 36, 3]},
    # C: deep stem; D: and average pooling in the shortcuts. ResNeXt: <cardinality>x<base width>d
    "resnet50c": {**_RESNET, **_DEEP_STEM, "stackwise_num_blocks": [3, 4, 6, 3]},
    "resnet26d": {**_RESNET_D, "stackwise_num_blocks": [2, 2, 2, 2]},
    "resnet50d": {**_RESNET_D, "stackwise_num_blocks": [3, 4, 6, 3]},
    "resnet101d": {**_RESNET_D, "stackwise_num_blocks": [3, 4, 23, 3]},
    "resnext50_32x4d": {
        **_RESNET,
        "stackwise_num_blocks": [3, 4, 6, 3],
        "cardinality": 32,
        "base_width": 4,
    },
    "resnext101_32x8d": {
        **_RESNET,
        "stackwise_num_blocks": [3, 4, 23, 3],
        "cardinality": 32,
        "base_width": 8,
    },
    "vgg16_reduced": {
        "stackwise_num_filters": [64, 128, 256, 512, 512],
        "stackwise_num_blocks": [2, 2, 3, 3, 3],
    },
}

_RESNET_DOCSTRING = """Builds {title}.

    Args:
        include_top: whether the model ends with the classifier.
        weights: path of a `.weights.h5` file of this network, or None for random weights.
        input_shape: shape of one image, by default `(None, None, 3)`: any size.
        pooling: without classifier, `"avg"` or `"max"` for a feature vector, None for a map.
        classes: integer, number of classes of the classifier.
        classifier_activation: activation of the classifier; None for logits.
        include_rescaling: whether images are RGB with values 0 to 255, uint8 or float, and are
            normalized by the model; otherwise they are expected normalized.
        name: name of the model, by default `{variant!r}`.
        **kwargs: more arguments of `ResNet`, such as `dropblock_rate`, `data_format`, `dtype`.

    Returns:
        A `ResNet`, which is a `keras.Model`.

    Raises:
        ValueError: if `weights` is neither None nor an existing `.weights.h5` file.

    Example:
        >>> model = {title}(classes=10)
    """


_VGG_DOCSTRING = """Builds {title}, the backbone of the published SSD and RefineDet.

    Args:
        include_top: must be False: the network has no classifier.
        weights: path of a `.weights.h5` file of this network, or None for random weights.
        input_shape: shape of one image, by default `(None, None, 3)`: any size.
        include_rescaling: whether images are RGB with values 0 to 255, uint8 or float, and the
            model subtracts the mean (123, 117, 104); otherwise it is expected subtracted.
        name: name of the model, by default `{variant!r}`.
        **kwargs: more arguments of `VGG`: `data_format`, `dtype`.

    Returns:
        A `VGG`, which is a `keras.Model`.

    Raises:
        ValueError: if `include_top` is true, or `weights` is neither None nor an existing
            `.weights.h5` file.

    Example:
        >>> model = {title}(input_shape=(320, 320, 3))
    """


def _resnet_builder(variant: str, title: str) -> Callable[..., Backbone]:
    def build(
        include_top: bool = True,
        weights: str | os.PathLike | None = None,
        input_shape=None,
        pooling: str | None = None,
        classes: int = 1000,
        classifier_activation="softmax",
        include_rescaling: bool = True,
        name: str | None = None,
        **kwargs,
    ) -> Backbone:
        arguments = {
            **VARIANTS[variant],
            "include_top": include_top,
            "image_shape": input_shape,
            "pooling": pooling,
            "classes": classes,
            "classifier_activation": classifier_activation,
            "include_rescaling": include_rescaling,
            "name": name or variant,
            **kwargs,
        }
        return _with_weights(ResNet(**arguments), weights)

    build.__name__ = build.__qualname__ = title
    build.__doc__ = _RESNET_DOCSTRING.format(title=title, variant=variant)
    return build


def _vgg_builder(variant: str, title: str) -> Callable[..., Backbone]:
    def build(
        include_top: bool = False,
        weights: str | os.PathLike | None = None,
        input_shape=None,
        include_rescaling: bool = True,
        name: str | None = None,
        **kwargs,
    ) -> Backbone:
        if include_top:
            raise ValueError(
                f"{title} has no classifier: `include_top` must be False. "
                f"Received: include_top={include_top}"
            )
        arguments = {
            **VARIANTS[variant],
            "image_shape": input_shape,
            "include_rescaling": include_rescaling,
            "name": name or variant,
            **kwargs,
        }
        return _with_weights(VGG(**arguments), weights)

    build.__name__ = build.__qualname__ = title
    build.__doc__ = _VGG_DOCSTRING.format(title=title, variant=variant)
    return build


def _with_weights(model, weights):
    if weights is None:
        return model
    path = os.fspath(weights)
    if not path.endswith(".weights.h5") or not os.path.isfile(path):
        raise ValueError(
            "`weights` must be None or the path of an existing `.weights.h5` file. "
            f"Received: weights={path!r}"
        )
    model.load_weights(path)
    return model


ResNeSt14 = _resnet_builder("resnest14", "ResNeSt14")
ResNeSt26 = _resnet_builder("resnest26", "ResNeSt26")
ResNeSt50 = _resnet_builder("resnest50", "ResNeSt50")
ResNeSt101 = _resnet_builder("resnest101", "ResNeSt101")
ResNeSt200 = _resnet_builder("resnest200", "ResNeSt200")
ResNeSt269 = _resnet_builder("resnest269", "ResNeSt269")
ResNet18 = _resnet_builder("resnet18", "ResNet18")
ResNet34 = _resnet_builder("resnet34", "ResNet34")
ResNet50 = _resnet_builder("resnet50", "ResNet50")
ResNet101 = _resnet_builder("resnet101", "ResNet101")
ResNet152 = _resnet_builder("resnet152", "ResNet152")
VGG16Reduced = _vgg_builder("vgg16_reduced", "VGG16Reduced")


def list_backbones(pattern: str = "*") -> list[str]:
    """Returns the names that `create_backbone` knows.

    Args:
        pattern: shell pattern, such as `"resnest*"`. Case does not matter.

    Returns:
        List of names in the order of the table.

    Example:
        >>> list_backbones("*vgg*")
        ['vgg16_reduced']
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
    builder = _vgg_builder if variant.startswith("vgg") else _resnet_builder
    return builder(variant, variant)(**kwargs)
