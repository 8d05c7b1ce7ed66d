"""One residual network whose arguments make it ResNet, ResNeXt, ResNeSt and others."""

from typing import Literal

import keras
from keras import layers

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.graph import CAFFE_RESCALING, Pooling, different_from
from keras_resnest.checks import checked
from keras_resnest.layers import SelectiveKernel, SplitAttention, SqueezeExcitation
from keras_resnest.layers.base import DataFormat
from keras_resnest.layers.channel_attention import round_channels


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class ResNet(Backbone):
    """Residual network.

    Layers are named after the modules of the PyTorch implementations: `layer2_0_conv1` is
    `layer2.0.conv1` there. `keras_resnest.backbones.VARIANTS` lists the arguments of the
    published networks, and `create_backbone` builds them by name.

    Args:
        stackwise_num_filters: list of integers, width of the blocks of each stage before
            `base_width`, `cardinality` and `expansion` apply.
        stackwise_num_blocks: list of integers, blocks of each stage.
        stackwise_num_strides: list of 1 or 2, stride of each stage's first block.
        block_type: `"bottleneck"` (1x1, 3x3, 1x1 convolution) or `"basic"` (two 3x3).
        expansion: integer. A bottleneck block has `filters * expansion` output channels.
        radix: integer, splits of the Split-Attention that replaces the 3x3 convolution of
            bottleneck blocks. 0 for a plain convolution.
        scale: integer. From 2 on, Res2Net replaces the 3x3 convolution of bottleneck blocks: the
            channels form `scale` parts, and each part but the last is convolved together with
            the result of the previous one.
        selective_kernel: dict of arguments of the `SelectiveKernel` that replaces the 3x3
            convolution (the first one of basic blocks), or None.
        se_ratio: float, ratio of hidden channels of squeeze-and-excitation, 0 for none.
        se_position: `"output"` places squeeze-and-excitation before the addition, its hidden
            channels relative to the block's output and rounded to a multiple of 8 (SE-ResNet);
            `"middle"` after the 3x3 convolution, relative to the block's input (RegNetY).
        cardinality: integer, channel groups of the 3x3 convolution of bottleneck blocks.
        base_width: integer. The 3x3 convolution of a bottleneck block has
            `int(filters * base_width / 64) * cardinality` channels, multiplied by `scale`.
        group_width: integer, channels per group of the 3x3 convolution of bottleneck blocks, as
            an alternative to `cardinality`; or None.
        stem_width: integer, channels of the first convolution.
        stem_kernel_size: integer, kernel size of the stem without `deep_stem`.
        stem_pooling: whether 3x3 max pooling with stride 2 ends the stem.
        deep_stem: whether the stem has three 3x3 convolutions of `stem_width`, `stem_width` and
            `2 * stem_width` channels ("C") instead of one of `stem_width`.
        caffe_stem: whether the stem is that of the first published networks, in Caffe:
            `include_rescaling` subtracts (123, 117, 104), and pooling is not padded and rounds
            sizes up.
        stride_in_1x1: whether bottleneck blocks have their stride in the first 1x1 convolution,
            as first published, instead of the 3x3 convolution ("B").
        avg_down: whether 2x2 average pooling downsamples the shortcut before its 1x1
            convolution ("D"), instead of the stride of that convolution.
        avd: `"after"` or `"before"` to downsample bottleneck blocks by 3x3 average pooling after
            or before the 3x3 convolution, None to downsample by its stride.
        zero_init_last_gamma: whether the last batch normalization of every block starts with
            a scale of zero, so that the block starts as its shortcut.
        dropblock_rate: float in [0, 1), rate of `DropBlock2D` after the convolutions of the last
            two stages.
        **kwargs: `name` and `trainable` of `keras.Model`.

    The other arguments are those of `Backbone`. Images may have any size.

    Raises:
        ValueError: if an argument is out of range or does not fit the others.

    Example:
        >>> model = ResNet([64, 128], [1, 1], [1, 2], radix=2, stem_width=32, deep_stem=True)
        >>> list(model.pyramid_outputs)
        ['P2', 'P3']

    Source: ResNet, https://arxiv.org/abs/1512.03385; refinements B, C and D,
    https://arxiv.org/abs/1812.01187, section 4; ResNeXt, https://arxiv.org/abs/1611.05431;
    SE-ResNet, https://arxiv.org/abs/1709.01507; SKNet, https://arxiv.org/abs/1903.06586;
    Res2Net, https://arxiv.org/abs/1904.01169; RegNet, https://arxiv.org/abs/2003.13678;
    ResNeSt, https://arxiv.org/abs/2004.08955.
    """

    def __init__(
        self,
        stackwise_num_filters,
        stackwise_num_blocks,
        stackwise_num_strides=(1, 2, 2, 2),
        block_type: Literal["basic", "bottleneck"] = "bottleneck",
        expansion: int = 4,
        radix: int = 0,
        scale: int = 1,
        selective_kernel: dict | None = None,
        se_ratio: float = 0.0,
        se_position: Literal["output", "middle"] = "output",
        cardinality: int = 1,
        base_width: int = 64,
        group_width: int | None = None,
        stem_width: int = 64,
        stem_kernel_size: int = 7,
        stem_pooling: bool = True,
        deep_stem: bool = False,
        caffe_stem: bool = False,
        stride_in_1x1: bool = False,
        avg_down: bool = False,
        avd: Literal["before", "after"] | None = None,
        zero_init_last_gamma: bool = False,
        dropblock_rate: float = 0.0,
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
        selective_kernel = None if selective_kernel is None else dict(selective_kernel)
        super().__init__(_build_graph, locals(), dtype, **kwargs)


def _build_graph(graph, x, config):
    _check_config(config)
    if config["include_rescaling"]:
        x = graph.rescale(x, *(CAFFE_RESCALING if config["caffe_stem"] else ()))
    x, stride = _stem(graph, x, config)
    stages = zip(
        config["stackwise_num_filters"],
        config["stackwise_num_blocks"],
        config["stackwise_num_strides"],
        strict=True,
    )
    pyramid_outputs = {}
    for stage, (filters, num_blocks, strides) in enumerate(stages, start=1):
        stride *= strides
        # As the authors train: no DropBlock in the early stages.
        drop = stage > len(config["stackwise_num_blocks"]) - 2
        block_config = {**config, "dropblock_rate": config["dropblock_rate"] if drop else 0.0}
        for index in range(num_blocks):
            name = f"layer{stage}_{index}"
            block_strides = strides if index == 0 else 1
            x = _residual_block(graph, x, filters, block_strides, name, block_config)
        pyramid_outputs[f"P{stride.bit_length() - 1}"] = x
    return graph.top(x, config), pyramid_outputs


def _stem(graph, x, config):
    """Returns the map before the first stage and its stride."""
    width = config["stem_width"]
    if config["deep_stem"]:
        # Numbered like PyTorch's sequence of convolutions, norms and ReLUs.
        x = graph.convolution(x, width, 3, strides=2, name="conv1_0")
        x = graph.relu(graph.norm(x, "conv1_1"), "conv1_2")
        x = graph.convolution(x, width, 3, name="conv1_3")
        x = graph.relu(graph.norm(x, "conv1_4"), "conv1_5")
        x = graph.convolution(x, width * 2, 3, name="conv1_6")
    else:
        x = graph.convolution(x, width, config["stem_kernel_size"], strides=2, name="conv1")
    x = graph.relu(graph.norm(x, "bn1"), "relu")
    if config["stem_pooling"]:
        # A last row and column of zeros rounds even sizes up and changes nothing for odd ones.
        padding = ((0, 1), (0, 1)) if config["caffe_stem"] else 1
        return graph.max_pool(x, "maxpool", padding), 4
    return x, 2


def _residual_block(graph, x, filters, strides, name, config):
    """Adds a branch of two (basic) or three (bottleneck) convolutions to a shortcut."""
    bottleneck = config["block_type"] == "bottleneck"
    out_channels = filters * config["expansion"] if bottleneck else filters
    in_channels = graph.channels(x)
    projects = strides > 1 or in_channels != out_channels
    shortcut = _shortcut(graph, x, out_channels, strides, config["avg_down"], name)
    last = 3 if bottleneck else 2
    if bottleneck:
        filters = int(filters * (config["base_width"] / 64)) * config["cardinality"]
        first_strides, strides = (strides, 1) if config["stride_in_1x1"] else (1, strides)
        x = graph.convolution(x, filters * config["scale"], 1, f"{name}_conv1", first_strides)
        x = _norm_relu(graph, x, 1, name, config)
    x = _spatial_convolution(graph, x, filters, strides, projects, last - 1, name, config)
    if config["se_ratio"] and config["se_position"] == "middle":
        x = _squeeze_excitation(graph, x, round(in_channels * config["se_ratio"]), name)
    x = graph.convolution(x, out_channels, 1 if bottleneck else 3, f"{name}_conv{last}")
    x = graph.norm(x, f"{name}_bn{last}", zero_init=config["zero_init_last_gamma"])
    x = graph.dropblock(x, config["dropblock_rate"], f"{name}_dropblock{last}")
    if config["se_ratio"] and config["se_position"] == "output":
        hidden = round_channels(out_channels * config["se_ratio"], 8)
        x = _squeeze_excitation(graph, x, hidden, name)
    return graph.relu(graph.add(x, shortcut, f"{name}_add"), f"{name}_relu")


def _norm_relu(graph, x, place, name, config):
    """Adds normalization, DropBlock and ReLU after convolution number `place` of a block."""
    x = graph.norm(x, f"{name}_bn{place}")
    x = graph.dropblock(x, config["dropblock_rate"], f"{name}_dropblock{place}")
    return graph.relu(x, f"{name}_relu{place}")


def _spatial_convolution(graph, x, filters, strides, projects, place, name, config):
    """Adds the 3x3 convolution of a block, or its replacement, up to ReLU."""
    pool_strides = 1
    if config["avd"] is not None:
        pool_strides, strides = strides, 1
    if pool_strides > 1 and config["avd"] == "before":
        x = graph.average_pool(x, pool_strides, f"{name}_avd")
    if config["radix"]:
        x = _split_attention(graph, x, filters, strides, config, f"{name}_conv{place}")
    elif config["selective_kernel"] is not None:
        x = SelectiveKernel(
            filters,
            strides=strides,
            groups=config["cardinality"],
            name=f"{name}_conv{place}",
            **config["selective_kernel"],
            **graph.image_options,
        )(x)
    elif config["scale"] > 1:
        x = _hierarchical_convolution(graph, x, filters, strides, projects, name, config)
    else:
        groups = config["cardinality"]
        if config["group_width"] is not None:
            groups = filters // config["group_width"]
        x = graph.convolution(x, filters, 3, f"{name}_conv{place}", strides, groups=groups)
        x = _norm_relu(graph, x, place, name, config)
    if pool_strides > 1 and config["avd"] == "after":
        x = graph.average_pool(x, pool_strides, f"{name}_avd")
    return x


def _split_attention(graph, x, filters, strides, config, name):
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


def _hierarchical_convolution(graph, x, filters, strides, projects, name, config):
    """Adds the 3x3 convolutions of Res2Net over `scale` parts of the channels."""
    parts = graph.split(x, config["scale"])
    results = []
    for i, part in enumerate(parts[:-1]):
        # The first block of a stage may change the size: it convolves the parts separately.
        if results and not projects:
            part = graph.add(part, results[-1], f"{name}_add{i}")
        part = graph.convolution(part, filters, 3, f"{name}_convs_{i}", strides)
        part = graph.norm(part, f"{name}_bns_{i}")
        part = graph.dropblock(part, config["dropblock_rate"], f"{name}_dropblock2_{i}")
        results.append(graph.relu(part, f"{name}_relus_{i}"))
    if projects:
        results.append(graph.average_pool(parts[-1], strides, f"{name}_pool"))
    else:
        results.append(parts[-1])
    return graph.concatenate(results, f"{name}_concatenate")


def _squeeze_excitation(graph, x, hidden_channels, name):
    return SqueezeExcitation(hidden_channels, name=f"{name}_se", **graph.image_options)(x)


def _shortcut(graph, x, filters, strides, avg_down, name):
    """Returns the block's input in the shape of its output."""
    if strides == 1 and graph.channels(x) == filters:
        return x
    if avg_down and strides > 1:
        # "same" averages only cells inside the map, even where its side is odd.
        x = layers.AveragePooling2D(
            strides, padding="same", name=f"{name}_downsample_0", **graph.image_options
        )(x)
        strides = 1
    first = 1 if avg_down else 0
    x = graph.convolution(x, filters, 1, strides=strides, name=f"{name}_downsample_{first}")
    return graph.norm(x, f"{name}_downsample_{first + 1}")


def _check_config(config):
    filters, blocks, strides = stages = [
        config[f"stackwise_num_{what}"] for what in ("filters", "blocks", "strides")
    ]
    if len({len(numbers) for numbers in stages}) > 1 or not filters:
        raise ValueError(
            "`stackwise_num_filters`, `stackwise_num_blocks` and `stackwise_num_strides` must "
            f"have one number per stage. Received: {filters}, {blocks}, {strides}"
        )
    if min(blocks) < 1:
        raise ValueError(
            f"`stackwise_num_blocks` must be at least 1 in every stage. Received: {blocks}"
        )
    if not set(strides) <= {1, 2}:
        raise ValueError(f"`stackwise_num_strides` must be 1 or 2. Received: {strides}")
    _check_block(config)


def _check_block(config):
    spatial = {"radix": 0, "scale": 1, "selective_kernel": None}
    given = different_from(config, spatial)
    if len(given) > 1:
        raise ValueError(
            "Only one of `radix`, `scale` and `selective_kernel` can replace the 3x3 convolution. "
            f"Received: {given}"
        )
    grouped = different_from(config, {"cardinality": 1, **spatial})
    if config["group_width"] is not None and grouped:
        raise ValueError(f"`group_width` requires plain convolutions. Received: {grouped}")
    bottleneck_only = {"radix": 0, "scale": 1, "cardinality": 1, "base_width": 64, "avd": None}
    bottleneck_only |= {"group_width": None, "stride_in_1x1": False}
    wrong = different_from(config, bottleneck_only)
    if config["block_type"] == "basic" and wrong:
        raise ValueError(f"Basic blocks have no {', '.join(bottleneck_only)}. Received: {wrong}")
    if config["group_width"] is not None:
        for filters in config["stackwise_num_filters"]:
            width = int(filters * (config["base_width"] / 64))
            if width % config["group_width"]:
                raise ValueError(
                    "`group_width` must divide the channels of the 3x3 convolution. "
                    f"Received: {width} channels, group_width={config['group_width']}"
                )
