"""ShuffleNet V1, V2 and V2+."""

import itertools
from functools import partial
from typing import Literal

import keras
from keras import layers, ops

from keras_resnest.backbones.backbone import Backbone
from keras_resnest.backbones.graph import Pooling, different_from
from keras_resnest.checks import checked
from keras_resnest.layers import ChannelShuffle
from keras_resnest.layers.base import DataFormat


@keras.saving.register_keras_serializable("keras_resnest")
@checked
class ShuffleNet(Backbone):
    """ShuffleNet V1, V2 or V2+.

    `groups` selects the blocks of V1: a grouped 1x1 convolution, a shuffle, a depthwise
    convolution and a grouped 1x1 convolution with a shortcut. In the blocks of V2, half of the
    channels bypass the block and the other half pass a 1x1, a depthwise and a 1x1 convolution.
    P2 is the output of the stem in V1 and V2, of the first stage in V2+. Layers are named after
    the modules of megvii's implementation.

    Args:
        stackwise_num_filters: list of integers, output channels of each stage.
        stackwise_num_blocks: list of integers, blocks of each stage; the first has stride 2.
        groups: integer, groups of the 1x1 convolutions of V1; 0 for the blocks of V2.
        channel_split: how blocks of V2 divide the channels: `"halves"` takes the first and the
            second half and shuffles at the end of the block (torchvision), `"alternate"` takes
            even and odd channels (megvii). Weights fit only one of them.
        block_kinds: list with the depthwise kernel size of each block, or `"xception"` for three
            depthwise and 1x1 convolutions. None for 3 everywhere.
        stackwise_activations: activation of each stage; None for `"relu"` everywhere.
        stackwise_se: list of booleans, whether the blocks of a stage end with
            squeeze-and-excitation; None for no stage.
        stem_width: integer, channels of the stem's 3x3 convolution.
        stem_activation: activation of the stem.
        stem_pooling: whether 3x3 max pooling with stride 2 ends the stem.
        head_filters: integer, channels of a 1x1 convolution after the last stage; 0 for none.
        head_units: integer, units of a dense layer that follows global pooling and
            squeeze-and-excitation (V2+); 0 for none.
        use_classifier_bias: whether the classifier has a bias.
        trained_on_bgr: whether the weights expect BGR images, 0 to 255, as megvii's do.
            `include_rescaling` then reverses the channels instead of normalizing.
        **kwargs: `name` and `trainable` of `keras.Model`.

    The other arguments are those of `Backbone`. Images may have any size.

    Raises:
        ValueError: if an argument is out of range or does not fit the others.

    Example:
        >>> model = ShuffleNet([116, 232, 464], [4, 8, 4], include_top=False)
        >>> list(model.pyramid_outputs)
        ['P2', 'P3', 'P4', 'P5']

    Source: V1, https://arxiv.org/abs/1707.01083; V2, https://arxiv.org/abs/1807.11164; V2+ is
    unpublished, https://github.com/megvii-model/ShuffleNet-Series.
    """

    def __init__(
        self,
        stackwise_num_filters,
        stackwise_num_blocks,
        groups: int = 0,
        channel_split: Literal["halves", "alternate"] = "halves",
        block_kinds=None,
        stackwise_activations=None,
        stackwise_se=None,
        stem_width: int = 24,
        stem_activation: str = "relu",
        stem_pooling: bool = True,
        head_filters: int = 0,
        head_units: int = 0,
        use_classifier_bias: bool = True,
        trained_on_bgr: bool = False,
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
        block_kinds = list(block_kinds or [3] * sum(stackwise_num_blocks))
        stackwise_activations = stackwise_activations or ["relu"] * len(stackwise_num_filters)
        stackwise_se = stackwise_se or [False] * len(stackwise_num_filters)
        super().__init__(_build_graph, locals(), dtype, **kwargs)


def _build_graph(graph, x, config):
    _check_config(config)
    bgr = config["trained_on_bgr"]
    if config["include_rescaling"]:
        # In BGR networks, rescaling only turns integers into floats.
        x = graph.rescale(x, (0.0,) * 3, (1.0,) * 3) if bgr else graph.rescale(x)
        x = ops.flip(x, axis=graph.channel_axis) if bgr else x
    x = graph.convolution(x, config["stem_width"], 3, "first_conv_0", strides=2)
    x = graph.norm(x, "first_conv_1")
    x = graph.activation(x, config["stem_activation"], "first_conv_2")
    stride, pyramid_outputs = 2, {}
    if config["stem_pooling"]:
        x = graph.max_pool(x, "maxpool")
        stride, pyramid_outputs = 4, {"P2": x}
    block = _group_block if config["groups"] else _split_block
    place = 0  # counts the blocks of all stages
    for stage, num_blocks in enumerate(config["stackwise_num_blocks"]):
        for index in range(num_blocks):
            options = {
                "filters": config["stackwise_num_filters"][stage],
                "strides": 2 if index == 0 else 1,
                "kind": config["block_kinds"][place],
                "activation": config["stackwise_activations"][stage],
                "use_se": config["stackwise_se"][stage],
                # The stem has too few channels for groups.
                "groups": 1 if place == 0 else config["groups"],
                "config": config,
            }
            x = block(graph, x, name=f"features_{place}", **options)
            place += 1
        stride *= 2
        pyramid_outputs[f"P{stride.bit_length() - 1}"] = x
    return _head(graph, x, config), pyramid_outputs


def _group_block(graph, x, filters, strides, groups, config, name, **_):
    """Adds a block of V1; with strides, it concatenates the pooled input and the branch."""
    shortcut, out_channels = x, filters
    if strides > 1:
        out_channels = filters - graph.channels(x)
        shortcut = graph.average_pool(x, strides, f"{name}_branch_proj")
    hidden = filters // 4
    branch = [*_pointwise(graph, hidden, "relu", groups), *_depthwise(graph, 3, strides)]
    x = _sequence(x, branch, f"{name}_branch_main_1")
    # megvii's shuffle is the inverse of the paper's.
    x = _shuffle(graph, x, hidden // config["groups"], f"{name}_shuffle")
    branch = _pointwise(graph, out_channels, None, config["groups"])
    x = _sequence(x, branch, f"{name}_branch_main_2")
    if strides > 1:
        return graph.concatenate([shortcut, graph.relu(x, f"{name}_relu")], f"{name}_concatenate")
    return graph.relu(graph.add(x, shortcut, f"{name}_add"), f"{name}_relu")


def _split_block(graph, x, filters, strides, kind, activation, use_se, config, name, **_):
    """Adds a block of V2: half of the channels bypass the branch."""
    halves = config["channel_split"] == "halves"
    if strides > 1:
        # megvii's shortcut keeps its channels; torchvision's makes half of the output.
        kept = filters // 2 if halves else graph.channels(x)
        branch = [*_depthwise(graph, kind, strides), *_pointwise(graph, kept, activation)]
        shortcut = _sequence(x, branch, f"{name}_branch_proj")
    else:
        kept = filters // 2
        if halves:
            shortcut, x = graph.split(x, 2)
        else:
            even, odd = slice(None, None, 2), slice(1, None, 2)
            shortcut, x = graph.channels_of(x, even), graph.channels_of(x, odd)
    hidden, out_channels = filters // 2, filters - kept
    if kind == "xception":
        branch = []
        for width in (hidden, hidden, out_channels):
            branch += [*_depthwise(graph, 3), *_pointwise(graph, width, activation)]
    else:
        branch = [*_pointwise(graph, hidden, activation), *_depthwise(graph, kind, strides)]
        branch += _pointwise(graph, out_channels, activation)
    x = _sequence(x, branch, f"{name}_branch_main")
    if use_se:
        x = _squeeze_excitation(graph, x, f"{name}_branch_main_{len(branch)}_SE_opr")
    x = graph.concatenate([shortcut, x], f"{name}_concatenate")
    return _shuffle(graph, x, 2, f"{name}_shuffle") if halves else x


def _pointwise(graph, filters, activation=None, groups=1):
    """Returns a 1x1 convolution, normalization and optional activation for `_sequence`."""
    convolution = partial(graph.convolution, filters=filters, kernel_size=1, groups=groups)
    steps = [convolution, graph.norm]
    return steps + ([partial(graph.activation, activation=activation)] if activation else [])


def _depthwise(graph, kernel_size, strides=1):
    """Returns a depthwise convolution and normalization for `_sequence`."""
    convolution = partial(graph.depthwise_convolution, kernel_size=kernel_size, strides=strides)
    return [convolution, graph.norm]


def _sequence(x, steps, name):
    """Adds layers one after another, numbered as in PyTorch's sequences."""
    for place, step in enumerate(steps):
        x = step(x, name=f"{name}_{place}")
    return x


def _shuffle(graph, x, groups, name):
    return ChannelShuffle(groups, name=name, **graph.image_options)(x)


def _squeeze_excitation(graph, x, name):
    """Adds the variant of V2+: no biases, normalization and a hard sigmoid."""
    channels = graph.channels(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True, name=f"{name}_0", **graph.image_options)(x)
    gate = graph.convolution(gate, channels // 4, 1, f"{name}_1")
    gate = graph.relu(graph.norm(gate, f"{name}_2"), f"{name}_3")
    gate = graph.convolution(gate, channels, 1, f"{name}_4")
    gate = graph.activation(gate, "hard_sigmoid", f"{name}_5")
    return layers.Multiply(name=f"{name}_6", **graph.options)([x, gate])


def _head(graph, x, config):
    last = config["stackwise_activations"][-1]
    if config["head_filters"]:
        x = _sequence(x, _pointwise(graph, config["head_filters"], last), "conv_last")
    if not config["include_top"] or not config["head_units"]:
        return graph.top(x, config, use_bias=config["use_classifier_bias"])
    x = layers.GlobalAveragePooling2D(keepdims=True, name="globalpool", **graph.image_options)(x)
    x = _squeeze_excitation(graph, x, "LastSE_SE_opr")
    x = layers.Flatten(name="flatten", **graph.options)(x)
    x = layers.Dense(config["head_units"], use_bias=False, name="fc_0", **graph.options)(x)
    x = graph.activation(x, last, "fc_1")
    return graph.classifier(x, config, use_bias=config["use_classifier_bias"])


def _check_config(config):
    filters = config["stackwise_num_filters"]
    names = ("stackwise_num_filters", "stackwise_num_blocks", "stackwise_activations")
    if len({len(config[name]) for name in (*names, "stackwise_se")}) > 1 or not filters:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in names)} and `stackwise_se` must have one entry "
            f"per stage. Received: {[config[name] for name in (*names, 'stackwise_se')]}"
        )
    _check_integers(config, 1, "stackwise_num_filters", "stackwise_num_blocks", "stem_width")
    _check_integers(config, 0, "groups", "head_filters", "head_units")
    _check_blocks(config)
    _check_widths(config)


def _check_integers(config, least, *names):
    for name in names:
        stackwise = isinstance(config[name], list)
        numbers = config[name] if stackwise else [config[name]]
        if not all(isinstance(number, int) and number >= least for number in numbers):
            kind = "integers" if stackwise else "an integer"
            raise ValueError(
                f"`{name}` must be {kind} of at least {least}. Received: {name}={config[name]!r}"
            )


def _check_blocks(config):
    kinds, blocks = config["block_kinds"], config["stackwise_num_blocks"]
    if len(kinds) != sum(blocks) or not all(kind in (3, 5, 7, "xception") for kind in kinds):
        raise ValueError(
            "`block_kinds` must have one of 3, 5, 7 and 'xception' for each of the "
            f"{sum(blocks)} blocks. Received: block_kinds={kinds}"
        )
    firsts = [kinds[sum(blocks[:stage])] for stage in range(len(blocks))]
    if "xception" in firsts:
        raise ValueError(
            "The first block of a stage has strides and cannot be 'xception'. "
            f"Received: first blocks {firsts}"
        )
    plain = {
        "channel_split": "halves",
        "block_kinds": [3] * len(kinds),
        "stackwise_activations": ["relu"] * len(blocks),
        "stackwise_se": [False] * len(blocks),
    }
    wrong = different_from(config, plain)
    if config["groups"] and wrong:
        raise ValueError(
            f"The blocks of V1 (`groups` > 0) have no {', '.join(plain)}. Received: {wrong}"
        )


def _check_widths(config):
    groups, filters = config["groups"], config["stackwise_num_filters"]
    divisor = 4 * max(groups, 1)
    if any(width % divisor for width in filters):
        raise ValueError(
            f"`stackwise_num_filters` must be multiples of 4 * max(groups, 1) = {divisor}. "
            f"Received: stackwise_num_filters={filters}"
        )
    if not groups and config["channel_split"] == "halves":
        return
    # The first block of a stage keeps the channels of its input and adds others to them.
    widths = [config["stem_width"], *filters]
    added = [width - before for before, width in itertools.pairwise(widths)]
    if min(added) < 1 or added[0] % max(groups, 1):
        raise ValueError(
            "`stem_width` and `stackwise_num_filters` must rise from stage to stage, in the first "
            "by a multiple of `groups`: the first block of a stage adds channels to its input. "
            f"Received: stem_width={widths[0]}, stackwise_num_filters={filters}, groups={groups}"
        )
