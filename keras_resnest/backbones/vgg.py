"""VGG, as published and as SSD and RefineDet use it."""

import keras
from keras import layers

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.graph import GraphBuilder, complete_config
from keras_resnest.layers import GroupedConv2D

# Mean of the training images of the published reduced weights, RGB, 0 to 255.
CAFFE_MEAN = (123.0, 117.0, 104.0)


@keras.saving.register_keras_serializable("keras_resnest")
class VGG(Backbone):
    """VGG, its dense layers as convolutions.

    The pyramid is made of the maps after ReLU, before pooling: in VGG-16 P2 is conv3_3 (stride
    4), P3 conv4_3, P4 conv5_3. P5 (stride 32) is the last pooled map, or fc7 with
    `reduced_top`.

    With `reduced_top` the network is the one of SSD and RefineDet: fc6 is a 3x3 convolution with
    dilation 3 and fc7 a 1x1 convolution, both of 1024 channels; there is no classifier, and
    pooling rounds odd sizes up, as in Caffe. Otherwise pooling rounds down, and with
    `include_top` fc6 is a 7x7 convolution of 4096 channels, whose results are averaged before
    the classifier where the image is larger than 224 x 224.

    Args:
        stackwise_num_filters: list of integers, channels of the convolutions of each stage.
        stackwise_num_blocks: list of integers, 3x3 convolutions of each stage.
        reduced_top: whether the dense layers are the reduced ones of SSD.
        dropout_rate: float in [0, 1), dropout after fc6 and before the classifier.
        include_top: whether the model ends with the classifier.
        classes: integer, number of classes.
        classifier_activation: activation of the classifier; None for logits.
        pooling: without classifier, `"avg"` or `"max"` for a feature vector, None for the last
            feature map.
        include_rescaling: whether images are RGB with values 0 to 255, uint8 or float, and are
            normalized by the model: by ImageNet's means and standard deviations, or with
            `reduced_top` by subtracting (123, 117, 104). Otherwise they are expected normalized.
        image_shape: shape of one image, `(height, width, 3)`, or `(3, height, width)` with
            `channels_first`. Height and width may be None. The classifier needs 224 x 224 at
            least.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        dtype: dtype or dtype policy of all layers.
        **kwargs: `name` and `trainable` of `keras.Model`.

    Returns:
        A `keras.Model`: class probabilities `(batch, classes)` with `include_top`, otherwise
        features.

    Raises:
        ValueError: if there is not one number per stage, if a classifier is asked for together
            with `reduced_top`, or if images are too small for it.

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
        pooling: str | None = None,
        include_rescaling: bool = True,
        image_shape=None,
        data_format: str | None = None,
        dtype=None,
        **kwargs,
    ):
        config = {
            "stackwise_num_filters": list(stackwise_num_filters),
            "stackwise_num_blocks": list(stackwise_num_blocks),
            "reduced_top": reduced_top,
            "dropout_rate": dropout_rate,
            "include_top": include_top,
            "classes": classes,
            "classifier_activation": classifier_activation,
            "pooling": pooling,
            "include_rescaling": include_rescaling,
            "image_shape": image_shape,
            "data_format": data_format,
        }
        config = complete_config(config)
        _check_config(config)
        dtype = keras.dtype_policies.get(dtype)
        inputs = keras.Input(config["image_shape"], name="images")
        graph = GraphBuilder(config["data_format"], dtype)
        x, pyramid_outputs = _convolutions(graph, inputs, config)
        outputs = _top(graph, x, config)
        super().__init__(inputs, outputs, pyramid_outputs, config, dtype, **kwargs)


def _convolutions(graph, x, config):
    """Returns the last feature map and all maps by pyramid level."""
    reduced = config["reduced_top"]
    if config["include_rescaling"]:
        x = graph.subtract_mean(x, CAFFE_MEAN) if reduced else graph.rescale(x)
    padding = "same" if reduced else "valid"
    pyramid_outputs = {}
    stages = zip(config["stackwise_num_filters"], config["stackwise_num_blocks"], strict=True)
    for stage, (filters, num_convolutions) in enumerate(stages, start=1):
        for index in range(1, num_convolutions + 1):
            x = _convolution(graph, x, filters, 3, f"conv{stage}_{index}")
        if stage > 2:  # the maps of stride 1 and 2 are of no use to a detector
            pyramid_outputs[f"P{stage - 1}"] = x
        x = layers.MaxPooling2D(2, padding=padding, name=f"pool{stage}", **graph.image_options)(x)
    if reduced:
        x = _convolution(graph, x, 1024, 3, "fc6", dilation_rate=3)
        x = _convolution(graph, x, 1024, 1, "fc7")
    pyramid_outputs[f"P{stage}"] = x
    return x, pyramid_outputs


def _top(graph, x, config):
    if config["include_top"]:
        x = _convolution(graph, x, 4096, 7, "fc6", padding="valid")
        if config["dropout_rate"]:
            x = layers.Dropout(config["dropout_rate"], name="fc6_dropout", **graph.options)(x)
        x = _convolution(graph, x, 4096, 1, "fc7")
    return graph.top(x, config)


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
        raise ValueError(
            "The network with `reduced_top` has no classifier: `include_top` must be False. "
            f"Received: include_top={config['include_top']}"
        )
    least = 7 * 2 ** len(filters)
    rows = 0 if config["data_format"] == "channels_last" else 1
    sides = config["image_shape"][rows : rows + 2]
    if any(side is not None and side < least for side in sides):
        raise ValueError(
            f"The classifier needs images of at least {least} x {least} pixels; features "
            f"(include_top=False) need less. Received: image_shape={config['image_shape']}"
        )
