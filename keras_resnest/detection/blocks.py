"""The residual block that RefineDet's ResNet models have behind their backbone."""

import keras

from keras_resnest.backbones.graph import GraphBuilder


def bottleneck_block(x, filters: int, out_filters: int, strides: int = 1, *, dtype, name: str):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, each batch normalized.

    Unlike the blocks of our backbones, its shortcut always has a convolution, and the
    stride is in the first 1x1 convolution, both as in the authors' code.

    Args:
        x: feature map (batch, height, width, channels).
        filters: channels of the first two convolutions.
        out_filters: channels of the result.
        strides: stride of the block.
        dtype: dtype policy of its layers.
        name: beginning of the names of its layers.

    Returns:
        Feature map (batch, height / strides, width / strides, out_filters).

    Source: `ResBody` in the authors' code, github.com/sfzhang15/RefineDet.
    """
    graph = GraphBuilder(keras.config.image_data_format(), dtype)
    shortcut = graph.convolution(x, out_filters, 1, f"{name}_shortcut", strides)
    shortcut = graph.norm(shortcut, f"{name}_shortcut_bn")
    x = graph.convolution(x, filters, 1, f"{name}_conv1", strides)
    x = graph.relu(graph.norm(x, f"{name}_bn1"), f"{name}_relu1")
    x = graph.convolution(x, filters, 3, f"{name}_conv2")
    x = graph.relu(graph.norm(x, f"{name}_bn2"), f"{name}_relu2")
    x = graph.convolution(x, out_filters, 1, f"{name}_conv3")
    x = graph.norm(x, f"{name}_bn3")
    return graph.relu(graph.add(x, shortcut, f"{name}_add"), f"{name}_relu")
