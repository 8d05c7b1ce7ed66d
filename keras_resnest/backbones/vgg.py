"""VGG, as published and as SSD and RefineDet use it."""

import keras
from keras import layers

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.graph import CAFFE_RESCALING, Pooling
from keras_resnest.checks import checked
from keras_resnest.layers import GroupedConv2D
from keras_resnest.layers.base import DataFormat


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class VGG(Backbone):
    """VGG with its dense layers as convolutions.

    The pyramid levels are the maps after ReLU, before pooling: in VGG-16 P2 is conv3_3, P3
    conv4_3 and P4 conv5_3. P5 is the last pooled map, or fc7 with `reduced_top`.

    With `reduced_top` the network is that of SSD and RefineDet: fc6 is a 3x3 convolution with
    dilation 3 and fc7 a 1x1 convolution, each of 1024 channels; there is no classifier; and
    pooling rounds odd sizes up, as in Caffe. Otherwise pooling rounds down. With `include_top`
    fc6 is a 7x7 convolution of 4096 channels; for images larger than 224 x 224, the results are
    averaged before the classifier.

    Args:
        stackwise_num_filters: list of integers, channels of each stage.
        stackwise_num_blocks: list of integers, 3x3 convolutions of each stage.
        reduced_top: whether to use the reduced dense layers of SSD. `include_rescaling` then
            subtracts (123, 117, 104).
        **kwargs: `name` and `trainable` of `keras.Model`.

    The other arguments are those of `Backbone`; `dropout_rate` also applies after fc6. The
    classifier requires images of at least 224 x 224.

    Raises:
        ValueError: if there is not one number per stage, `reduced_top` is combined with
            `include_top`, or images are too small for the classifier.

    Example:
        >>> backbone = VGG([64, 128, 256, 512, 512], [2, 2, 3, 3, 3], image_shape=(320, 320, 3))
        >>> backbone.pyramid_outputs["P3"].shape
        (None, 40, 40, 512)

    Source: VGG, https://arxiv.org/abs/1409.1556, configuration D; reduced dense layers, SSD,
    https://arxiv.org/abs/1512.02325, section 3; RefineDet, https://arxiv.org/abs/1711.06897,
    section 3.2.
    """

    def __init__(
        self,
        stackwise_num_filters,
        stackwise_num_blocks,
        reduced_top: bool = False,
        dropout_rate: float = 0.0,
        include_top: bool = False,
        classes: int = 1000,
        classifier_activation="softmax",
        pooling: Pooling | None = None,
        include_rescaling: bool = True,
        image_shape=None,
        data_format: DataFormat | None = None,
        dtype=None,
        **kwargs,
    ):
        super().__init__(_build_graph, locals(), dtype, **kwargs)


def _build_graph(graph, x, config):
    _check_config(config)
    reduced = config["reduced_top"]
    if config["include_rescaling"]:
        x = graph.rescale(x, *(CAFFE_RESCALING if reduced else ()))
    padding = "same" if reduced else "valid"
    pyramid_outputs = {}
    stages = zip(config["stackwise_num_filters"], config["stackwise_num_blocks"], strict=True)
    for stage, (filters, num_convolutions) in enumerate(stages, start=1):
        for index in range(1, num_convolutions + 1):
            x = _convolution(graph, x, filters, 3, f"conv{stage}_{index}")
        if stage > 2:  # detectors do not use strides 1 and 2
            pyramid_outputs[f"P{stage - 1}"] = x
        x = layers.MaxPooling2D(2, padding=padding, name=f"pool{stage}", **graph.image_options)(x)
    if reduced:
        x = _convolution(graph, x, 1024, 3, "fc6", dilation_rate=3)
        x = _convolution(graph, x, 1024, 1, "fc7")
    pyramid_outputs[f"P{stage}"] = x
    if config["include_top"]:
        x = _convolution(graph, x, 4096, 7, "fc6", padding="valid")
        if config["dropout_rate"]:
            x = layers.Dropout(config["dropout_rate"], name="fc6_dropout", **graph.options)(x)
        x = _convolution(graph, x, 4096, 1, "fc7")
    return graph.top(x, config), pyramid_outputs


def _convolution(graph, x, filters, kernel_size, name, dilation_rate=1, padding="same"):
    return GroupedConv2D(
        filters,
        kernel_size,
        padding=padding,
        dilation_rate=dilation_rate,
        activation="relu",
        kernel_initializer="he_normal",
        name=name,
        **graph.image_options,
    )(x)


def _check_config(config):
    filters, blocks = config["stackwise_num_filters"], config["stackwise_num_blocks"]
    if len(filters) != len(blocks) or not filters:
        raise ValueError(
            "`stackwise_num_filters` and `stackwise_num_blocks` must have one number per stage. "
            f"Received: {filters}, {blocks}"
        )
    if not config["include_top"]:
        return
    if config["reduced_top"]:
        raise ValueError("VGG with `reduced_top` has no classifier. Received: include_top=True")
    smallest = 7 * 2 ** len(filters)
    rows = 0 if config["data_format"] == "channels_last" else 1
    sides = config["image_shape"][rows : rows + 2]
    if any(side is not None and side < smallest for side in sides):
        raise ValueError(
            f"The classifier requires images of at least {smallest} x {smallest} pixels; "
            f"include_top=False accepts smaller ones. Received: image_shape={config['image_shape']}"
        )
