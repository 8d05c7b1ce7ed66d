"""One residual network, which its arguments turn into ResNet, ResNeXt, ResNeSt and others."""

import keras
from keras import layers

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.graph import GraphBuilder, check_choices, complete_config
from keras_resnest.layers import SelectiveKernel, SplitAttention, SqueezeExcitation
from keras_resnest.layers.channel_attention import rounded_channels


@keras.saving.register_keras_serializable("keras_resnest")
class ResNet(Backbone):
    """Residual network described by its arguments.

    Layers are named after the modules of the PyTorch implementations: `layer2_0_conv1` is
    `layer2.0.conv1` there. See `keras_resnest.backbones.VARIANTS` for the arguments of the
    published networks and `create_backbone` to build them by name.

    Args:
        stackwise_num_filters: list of integers, width of the blocks of each stage before
            `base_width`, `cardinality` and `expansion` are applied.
        stackwise_num_blocks: list of integers, blocks of each stage.
        stackwise_num_strides: list of 1 or 2, stride of each stage's first block.
        block_type: `"bottleneck"` (1x1, 3x3, 1x1 convolution) or `"basic"` (two 3x3).
        expansion: integer. A bottleneck block has `filters * expansion` output channels.
        radix: integer, splits of Split-Attention in place of the 3x3 convolution of bottleneck
            blocks. 0 for a plain convolution.
        scale: integer. From 2 on, the 3x3 convolution of bottleneck blocks is one of Res2Net:
            the channels in `scale` parts, each but the last convolved together with the result
            of the part before it.
        selective_kernel: dict of arguments of `SelectiveKernel`, which then takes the place of
            the 3x3 convolution (of the first one in basic blocks), or None.
        se_ratio: float. If not 0, blocks have squeeze-and-excitation with hidden channels of
            this share.
        se_position: `"output"`, squeeze-and-excitation of the block's result before the
            addition, its hidden channels a share of that rounded to a multiple of 8 (SE-ResNet);
            or `"middle"`, after the 3x3 convolution, a share of the block's input (RegNetY).
        cardinality: integer, channel groups of the 3x3 convolution of bottleneck blocks.
        base_width: integer. The 3x3 convolution of a bottleneck block has
            `int(filters * base_width / 64) * cardinality` channels, times `scale` if given.
        group_width: integer, channels of each group of the 3x3 convolution of bottleneck
            blocks, as another way to say `cardinality`; or None.
        stem_width: integer, channels of the first convolution.
        stem_kernel_size: integer, size of the stem's convolution, if that is not deep.
        stem_pooling: whether 3x3 max pooling of stride 2 ends the stem.
        deep_stem: whether the stem is three 3x3 convolutions of `stem_width`, `stem_width` and
            `2 * stem_width` channels ("C"), or one of `stem_width`.
        stride_in_1x1: whether bottleneck blocks have their stride in the first 1x1 convolution,
            as the first publication, or in the 3x3 convolution ("B").
        avg_down: whether shortcuts are downsampled by 2x2 average pooling before their 1x1
            convolution ("D"), or by the strides of that.
        avd: `"after"` or `"before"`, to downsample a bottleneck block by 3x3 average pooling
            after or before its 3x3 convolution (Split-Attention), or None for strides.
        zero_init_last_gamma: whether the last batch normalization of every block starts with
            a scale of zero, so that the block starts as its shortcut.
        dropblock_rate: float in [0, 1), share of values dropped in 3x3 blocks after the
            convolutions of the last two stages, while training.
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
        block_type: str = "bottleneck",
        expansion: int = 4,
        radix: int = 0,
        scale: int = 1,
        selective_kernel: dict | None = None,
        se_ratio: float = 0.0,
        se_position: str = "output",
        cardinality: int = 1,
        base_width: int = 64,
        group_width: int | None = None,
        stem_width: int = 64,
        stem_kernel_size: int = 7,
        stem_pooling: bool = True,
        deep_stem: bool = False,
        stride_in_1x1: bool = False,
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
            "expansion": expansion,
            "radix": radix,
            "scale": scale,
            "selective_kernel": None if selective_kernel is None else dict(selective_kernel),
            "se_ratio": se_ratio,
            "se_position": se_position,
            "cardinality": cardinality,
            "base_width": base_width,
            "group_width": group_width,
            "stem_width": stem_width,
            "stem_kernel_size": stem_kernel_size,
            "stem_pooling": stem_pooling,
            "deep_stem": deep_stem,
            "stride_in_1x1": stride_in_1x1,
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
    x, stride = stem(graph, x, config)
    stages = zip(
        config["stackwise_num_filters"],
        config["stackwise_num_blocks"],
        config["stackwise_num_strides"],
        strict=True,
    )
    pyramid_outputs = {}
    for stage, (filters, num_blocks, strides) in enumerate(stages, start=1):
        stride *= strides
        # As the authors train: the early maps stay whole.
        drop = stage > len(config["stackwise_num_blocks"]) - 2
        block_config = {**config, "dropblock_rate": config["dropblock_rate"] if drop else 0.0}
        for index in range(num_blocks):
            name = f"layer{stage}_{index}"
            x = residual_block(graph, x, filters, strides if index == 0 else 1, name, block_config)
        pyramid_outputs[f"P{stride.bit_length() - 1}"] = x
    return graph.top(x, config), pyramid_outputs


def stem(graph, x, config):
    """The layers before the first stage. Returns their map and its stride."""
    width = config["stem_width"]
    if config["deep_stem"]:
        # The numbers are the places in PyTorch's sequence of convolutions, norms and ReLUs.
        x = graph.convolution(x, width, 3, strides=2, name="conv1_0")
        x = graph.relu(graph.norm(x, "conv1_1"), "conv1_2")
        x = graph.convolution(x, width, 3, name="conv1_3")
        x = graph.relu(graph.norm(x, "conv1_4"), "conv1_5")
        x = graph.convolution(x, width * 2, 3, name="conv1_6")
    else:
        x = graph.convolution(x, width, config["stem_kernel_size"], strides=2, name="conv1")
    x = graph.relu(graph.norm(x, "bn1"), "relu")
    if config["stem_pooling"]:
        return graph.max_pool(x, "maxpool"), 4
    return x, 2


def residual_block(graph, x, filters, strides, name, config):
    """A branch of two (basic) or three (bottleneck) convolutions beside a shortcut."""
    bottleneck = config["block_type"] == "bottleneck"
    out_channels = filters * config["expansion"] if bottleneck else filters
    in_channels = graph.channels(x)
    projects = strides > 1 or in_channels != out_channels
    shortcut = shortcut_of(graph, x, out_channels, strides, config["avg_down"], name)
    last = 3 if bottleneck else 2
    if bottleneck:
        filters = int(filters * (config["base_width"] / 64)) * config["cardinality"]
        first_strides, strides = (strides, 1) if config["stride_in_1x1"] else (1, strides)
        x = graph.convolution(x, filters * config["scale"], 1, f"{name}_conv1", first_strides)
        x = norm_relu(graph, x, 1, name, config)
    x = spatial_convolution(graph, x, filters, strides, projects, last - 1, name, config)
    if config["se_ratio"] and config["se_position"] == "middle":
        x = squeeze_excitation(graph, x, round(in_channels * config["se_ratio"]), name)
    x = graph.convolution(x, out_channels, 1 if bottleneck else 3, f"{name}_conv{last}")
    x = graph.norm(x, f"{name}_bn{last}", zero_init=config["zero_init_last_gamma"])
    x = graph.dropblock(x, config["dropblock_rate"], f"{name}_dropblock{last}")
    if config["se_ratio"] and config["se_position"] == "output":
        hidden = rounded_channels(out_channels * config["se_ratio"], 8)
        x = squeeze_excitation(graph, x, hidden, name)
    return graph.relu(graph.add(x, shortcut, f"{name}_add"), f"{name}_relu")


def norm_relu(graph, x, place, name, config):
    """What follows convolution number `place` of a block."""
    x = graph.norm(x, f"{name}_bn{place}")
    x = graph.dropblock(x, config["dropblock_rate"], f"{name}_dropblock{place}")
    return graph.relu(x, f"{name}_relu{place}")


def spatial_convolution(graph, x, filters, strides, projects, place, name, config):
    """The 3x3 convolution that a block is about, or what takes its place; ends with ReLU."""
    pool_strides = 1
    if config["avd"] is not None:
        pool_strides, strides = strides, 1
    if pool_strides > 1 and config["avd"] == "before":
        x = graph.average_pool(x, pool_strides, f"{name}_avd")
    if config["radix"]:
        x = split_attention(graph, x, filters, strides, config, f"{name}_conv{place}")
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
        x = hierarchical_convolution(graph, x, filters, strides, projects, name, config)
    else:
        groups = config["cardinality"]
        if config["group_width"] is not None:
            groups = filters // config["group_width"]
        x = graph.convolution(x, filters, 3, f"{name}_conv{place}", strides, groups=groups)
        x = norm_relu(graph, x, place, name, config)
    if pool_strides > 1 and config["avd"] == "after":
        x = graph.average_pool(x, pool_strides, f"{name}_avd")
    return x


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


def hierarchical_convolution(graph, x, filters, strides, projects, name, config):
    """The 3x3 convolutions of Res2Net, over `scale` parts of the channels, and their results."""
    parts = graph.split(x, config["scale"])
    results = []
    for i, part in enumerate(parts[:-1]):
        # The first block of a stage convolves the parts one by one: their sides may change.
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


def squeeze_excitation(graph, x, hidden_channels, name):
    return SqueezeExcitation(hidden_channels, name=f"{name}_se", **graph.image_options)(x)


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
    if min(stages[1]) < 1:
        raise ValueError(
            f"`stackwise_num_blocks` must be at least 1 in every stage. Received: {stages[1]}"
        )
    if not set(stages[2]) <= {1, 2}:
        raise ValueError(f"`stackwise_num_strides` must be 1 or 2. Received: {stages[2]}")
    check_choices(
        config,
        block_type=("basic", "bottleneck"),
        avd=(None, "before", "after"),
        se_position=("output", "middle"),
    )
    _check_block(config)


def _check_block(config):
    spatial = {"radix": 0, "scale": 1, "selective_kernel": None}
    given = _different(config, spatial)
    if len(given) > 1:
        raise ValueError(
            "Only one of `radix`, `scale` and `selective_kernel` can take the place of the 3x3 "
            f"convolution. Received: {given}"
        )
    groups = _different(config, {"cardinality": 1, **spatial})
    if config["group_width"] is not None and groups:
        raise ValueError(f"`group_width` goes with plain convolutions only. Received: {groups}")
    bottleneck_only = {"radix": 0, "scale": 1, "cardinality": 1, "base_width": 64, "avd": None}
    bottleneck_only |= {"group_width": None, "stride_in_1x1": False}
    wrong = _different(config, bottleneck_only)
    if config["block_type"] == "basic" and wrong:
        raise ValueError(f"Basic blocks have no {', '.join(bottleneck_only)}. Received: {wrong}")
    if config["group_width"] is not None:
        for filters in config["stackwise_num_filters"]:
            width = int(filters * (config["base_width"] / 64))
            if width % config["group_width"]:
                raise ValueError(
                    "The channels of the 3x3 convolution must be divisible by `group_width`. "
                    f"Received: {width} channels, group_width={config['group_width']}"
                )


def _different(config, values):
    return {name: config[name] for name, value in values.items() if config[name] != value}
