"""One residual network, which its arguments turn into ResNet, ResNeXt, ResNeSt and others."""

import keras
from keras import layers

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.graph import GraphBuilder, check_choices, complete_config
from keras_resnest.layers import SplitAttention


@keras.saving.register_keras_serializable("keras_resnest")
class ResNet(Backbone):
    """Residual network described by its arguments.

    Layers are named after the modules of the PyTorch implementations: `layer2_0_conv1` is
    `layer2.0.conv1` there. See `keras_resnest.backbones.VARIANTS` for the arguments of the
    published networks and `create_backbone` to build them by name.

    Args:
        stackwise_num_filters: list of integers, width of the blocks of each stage before
            `base_width`, `cardinality` and the expansion (4 in bottleneck blocks) are applied.
        stackwise_num_blocks: list of integers, blocks of each stage.
        stackwise_num_strides: list of 1 or 2, stride of each stage's first block.
        block_type: `"bottleneck"` (1x1, 3x3, 1x1 convolution) or `"basic"` (two 3x3).
        radix: integer, splits of Split-Attention in place of the 3x3 convolution of bottleneck
            blocks. 0 for a plain convolution.
        cardinality: integer, channel groups of the 3x3 convolution of bottleneck blocks.
        base_width: integer. The 3x3 convolution of a bottleneck block has
            `int(filters * base_width / 64) * cardinality` channels.
        stem_width: integer, channels of the first convolution.
        deep_stem: whether the stem is three 3x3 convolutions of `stem_width`, `stem_width` and
            `2 * stem_width` channels, or one 7x7 of `stem_width`.
        avg_down: whether shortcuts are downsampled by 2x2 average pooling before their 1x1
            convolution, or by the strides of that.
        avd: `"after"` or `"before"`, to downsample a bottleneck block by 3x3 average pooling
            after or before its 3x3 convolution (Split-Attention), or None for strides.
        zero_init_last_gamma: whether the last batch normalization of every block starts with
            a scale of zero, so that the block starts as its shortcut.
        dropblock_rate: float in [0, 1), share of values dropped in 3x3 blocks after every
            convolution of bottleneck blocks in the last two stages, while training.
        dropout_rate: float in [0, 1), dropout before the classifier.
        include_top: whether the model ends with the classifier.
        classes: integer, number of classes.
        classifier_activation: activation of the classifier; None for logits.
        pooling: without classifier, `"avg"` or `"max"` for a feature vector, None for the last
            feature map.
        include_rescaling: whether images are RGB with values 0 to 255, uint8 or float, and are
            normalized by the model; otherwise they are expected normalized.
        image_shape: shape of one image, `(height, width, 3)`, or `(3, height, width)` with
            `channels_first`. Height and width may be None. Any size works, odd ones too.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        dtype: dtype or dtype policy of all layers.
        **kwargs: `name` and `trainable` of `keras.Model`.

    Returns:
        A `keras.Model`: class probabilities `(batch, classes)` with `include_top`, otherwise
        features. `pyramid_outputs` has a level for the last map of every stride.

    Raises:
        ValueError: if an argument has a value that no network can be built from.

    Example:
        >>> model = ResNet([64, 128], [1, 1], [1, 2], radix=2, stem_width=32, deep_stem=True)
        >>> list(model.pyramid_outputs)
        ['P2', 'P3']

    Source: ResNet, https://arxiv.org/abs/1512.03385; deep stem and `avg_down`,
    https://arxiv.org/abs/1812.01187, section 4; ResNeSt, https://arxiv.org/abs/2004.08955.
    """

    def __init__(
        self,
        stackwise_num_filters,
        stackwise_num_blocks,
        stackwise_num_strides=(1, 2, 2, 2),
        block_type: str = "bottleneck",
        radix: int = 0,
        cardinality: int = 1,
        base_width: int = 64,
        stem_width: int = 64,
        deep_stem: bool = False,
        avg_down: bool = False,
        avd: str | None = None,
        zero_init_last_gamma: bool = False,
        dropblock_rate: float = 0.0,
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
            "stackwise_num_strides": list(stackwise_num_strides),
            "block_type": block_type,
            "radix": radix,
            "cardinality": cardinality,
            "base_width": base_width,
            "stem_width": stem_width,
            "deep_stem": deep_stem,
            "avg_down": avg_down,
            "avd": avd,
            "zero_init_last_gamma": zero_init_last_gamma,
            "dropblock_rate": dropblock_rate,
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
        outputs, pyramid_outputs = _residual_network(
            GraphBuilder(config["data_format"], dtype), inputs, config
        )
        super().__init__(inputs, outputs, pyramid_outputs, config, dtype, **kwargs)


def _residual_network(graph, inputs, config):
    """Returns the output of the whole network and its feature maps by pyramid level."""
    x = graph.rescale(inputs) if config["include_rescaling"] else inputs
    stem = deep_stem if config["deep_stem"] else plain_stem
    x = graph.max_pool(stem(graph, x, config["stem_width"]), "maxpool")
    block = BLOCKS[config["block_type"]]
    stages = zip(
        config["stackwise_num_filters"],
        config["stackwise_num_blocks"],
        config["stackwise_num_strides"],
        strict=True,
    )
    stride = 4
    pyramid_outputs = {}
    for stage, (filters, num_blocks, strides) in enumerate(stages, start=1):
        stride *= strides
        # As the authors train: the early maps stay whole.
        drop = stage > len(config["stackwise_num_blocks"]) - 2
        block_config = {**config, "dropblock_rate": config["dropblock_rate"] if drop else 0.0}
        for index in range(num_blocks):
            name = f"layer{stage}_{index}"
            x = block(graph, x, filters, strides if index == 0 else 1, name, block_config)
        pyramid_outputs[f"P{stride.bit_length() - 1}"] = x
    return graph.top(x, config), pyramid_outputs


def basic_block(graph, x, filters, strides, name, config):
    """Two 3x3 convolutions beside a shortcut."""
    rate = config["dropblock_rate"]
    shortcut = shortcut_of(graph, x, filters, strides, config["avg_down"], name)
    x = graph.convolution(x, filters, 3, f"{name}_conv1", strides=strides)
    x = graph.dropblock(graph.norm(x, f"{name}_bn1"), rate, f"{name}_dropblock1")
    x = graph.relu(x, f"{name}_relu1")
    x = graph.convolution(x, filters, 3, f"{name}_conv2")
    x = graph.norm(x, f"{name}_bn2", zero_init=config["zero_init_last_gamma"])
    x = graph.dropblock(x, rate, f"{name}_dropblock2")
    return graph.relu(graph.add(x, shortcut, f"{name}_add"), f"{name}_relu")


def bottleneck_block(graph, x, filters, strides, name, config):
    """1x1 convolution, 3x3 convolution or Split-Attention, 1x1 convolution beside a shortcut."""
    rate, avd, cardinality = config["dropblock_rate"], config["avd"], config["cardinality"]
    width = int(filters * (config["base_width"] / 64)) * cardinality
    pool_strides, conv_strides = (strides, 1) if avd and strides > 1 else (1, strides)
    shortcut = shortcut_of(graph, x, filters * 4, strides, config["avg_down"], name)
    x = graph.convolution(x, width, 1, f"{name}_conv1")
    x = graph.dropblock(graph.norm(x, f"{name}_bn1"), rate, f"{name}_dropblock1")
    x = graph.relu(x, f"{name}_relu1")
    if pool_strides > 1 and avd == "before":
        x = graph.average_pool(x, pool_strides, f"{name}_avd")
    if config["radix"]:
        x = split_attention(graph, x, width, conv_strides, config, f"{name}_conv2")
    else:
        x = graph.convolution(x, width, 3, f"{name}_conv2", conv_strides, groups=cardinality)
        x = graph.dropblock(graph.norm(x, f"{name}_bn2"), rate, f"{name}_dropblock2")
        x = graph.relu(x, f"{name}_relu2")
    if pool_strides > 1 and avd == "after":
        x = graph.average_pool(x, pool_strides, f"{name}_avd")
    x = graph.convolution(x, filters * 4, 1, f"{name}_conv3")
    x = graph.norm(x, f"{name}_bn3", zero_init=config["zero_init_last_gamma"])
    x = graph.dropblock(x, rate, f"{name}_dropblock3")
    return graph.relu(graph.add(x, shortcut, f"{name}_add"), f"{name}_relu")


BLOCKS = {"basic": basic_block, "bottleneck": bottleneck_block}


def plain_stem(graph, x, width):
    x = graph.convolution(x, width, 7, strides=2, name="conv1")
    return graph.relu(graph.norm(x, "bn1"), "relu")


def deep_stem(graph, x, width):
    # The numbers are the places in PyTorch's sequence of convolutions, norms and ReLUs.
    x = graph.convolution(x, width, 3, strides=2, name="conv1_0")
    x = graph.relu(graph.norm(x, "conv1_1"), "conv1_2")
    x = graph.convolution(x, width, 3, name="conv1_3")
    x = graph.relu(graph.norm(x, "conv1_4"), "conv1_5")
    x = graph.convolution(x, width * 2, 3, name="conv1_6")
    return graph.relu(graph.norm(x, "bn1"), "relu")


def split_attention(graph, x, filters, strides, config, name):
    padding = "same"
    if strides > 1:
        x = graph.pad(x, 1, f"{name}_pad")
        padding = "valid"
    return SplitAttention(
        filters,
        strides=strides,
        padding=padding,
        radix=config["radix"],
        cardinality=config["cardinality"],
        dropblock_rate=config["dropblock_rate"],
        name=name,
        **graph.image_options,
    )(x)


def shortcut_of(graph, x, filters, strides, avg_down, name):
    """The block's input, in the shape of its output."""
    if strides == 1 and graph.channels(x) == filters:
        return x
    first = 0
    if avg_down:
        first = 1
        if strides > 1:
            # "same" averages the cells inside of the map only, also where its side is odd.
            x = layers.AveragePooling2D(
                strides, padding="same", name=f"{name}_downsample_0", **graph.image_options
            )(x)
            strides = 1
    x = graph.convolution(x, filters, 1, strides=strides, name=f"{name}_downsample_{first}")
    return graph.norm(x, f"{name}_downsample_{first + 1}")


def _check_config(config):
    stages = [config[f"stackwise_num_{what}"] for what in ("filters", "blocks", "strides")]
    if len({len(numbers) for numbers in stages}) > 1 or not stages[0]:
        raise ValueError(
            "`stackwise_num_filters`, `stackwise_num_blocks` and `stackwise_num_strides` must "
            f"have one number per stage. Received: {stages[0]}, {stages[1]}, {stages[2]}"
        )
    if not set(stages[2]) <= {1, 2}:
        raise ValueError(f"`stackwise_num_strides` must be 1 or 2. Received: {stages[2]}")
    check_choices(config, block_type=tuple(BLOCKS), avd=(None, "before", "after"))
    bottleneck_only = {"radix": 0, "cardinality": 1, "base_width": 64, "avd": None}
    wrong = {name: config[name] for name, value in bottleneck_only.items() if config[name] != value}
    if config["block_type"] == "basic" and wrong:
        raise ValueError(f"Basic blocks have no {', '.join(bottleneck_only)}. Received: {wrong}")
