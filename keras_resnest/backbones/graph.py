"""The layers that all networks consist of, and the checks of their arguments."""

from collections.abc import Sequence
from typing import Literal

import keras
from keras import layers

from keras_resnest.layers import BatchNormalization, DepthwiseConv2D, DropBlock2D, GroupedConv2D

Pooling = Literal["avg", "max"]
# Mean and standard deviation of ImageNet's training images, RGB, 0 to 255.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STANDARD_DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)
# What Caffe's networks subtract from RGB images, 0 to 255; nothing is divided.
CAFFE_RESCALING = (123.0, 117.0, 104.0), (1.0, 1.0, 1.0)


class GraphBuilder:
    """Adds layers that share one data format and dtype, with PyTorch's symmetric padding."""

    def __init__(self, data_format: str, dtype):
        self.channel_axis = -1 if data_format == "channels_last" else 1
        self.image_options = {"data_format": data_format, "dtype": dtype}
        self.options = {"dtype": dtype}

    def rescale(self, x, mean=IMAGENET_MEAN, standard_deviation=IMAGENET_STANDARD_DEVIATION):
        return layers.Normalization(
            axis=self.channel_axis,
            mean=mean,
            variance=[s**2 for s in standard_deviation],
            name="rescaling",
            **self.options,
        )(x)

    def channels(self, x) -> int:
        return x.shape[self.channel_axis]

    def convolution(self, x, filters, kernel_size, name, strides=1, groups=1, use_bias=False):
        padding = "same"
        if strides > 1 and kernel_size > 1:
            x = self.pad(x, kernel_size // 2, f"{name}_pad")
            padding = "valid"
        return GroupedConv2D(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            groups=groups,
            use_bias=use_bias,
            kernel_initializer="he_normal",
            name=name,
            **self.image_options,
        )(x)

    def depthwise_convolution(self, x, kernel_size, name, strides=1):
        x = self.pad(x, kernel_size // 2, f"{name}_pad")
        return DepthwiseConv2D(
            kernel_size,
            strides=strides,
            use_bias=False,
            depthwise_initializer="he_normal",
            name=name,
            **self.image_options,
        )(x)

    def norm(self, x, name, zero_init=False):
        return BatchNormalization(
            axis=self.channel_axis,
            momentum=0.9,
            epsilon=1e-5,
            gamma_initializer="zeros" if zero_init else "ones",
            name=name,
            **self.options,
        )(x)

    def relu(self, x, name):
        return layers.ReLU(name=name, **self.options)(x)

    def activation(self, x, activation, name):
        return layers.Activation(activation, name=name, **self.options)(x)

    def add(self, x, shortcut, name):
        return layers.Add(name=name, **self.options)([x, shortcut])

    def split(self, x, parts):
        width = self.channels(x) // parts
        return [self.channels_of(x, slice(i * width, (i + 1) * width)) for i in range(parts)]

    def channels_of(self, x, channels: slice):
        return x[..., channels] if self.channel_axis == -1 else x[:, channels]

    def concatenate(self, maps, name):
        return layers.Concatenate(axis=self.channel_axis, name=name, **self.options)(maps)

    def dropblock(self, x, rate, name):
        if rate == 0:
            return x
        return DropBlock2D(rate, block_size=3, name=name, **self.image_options)(x)

    def pad(self, x, size, name):
        return layers.ZeroPadding2D(size, name=name, **self.image_options)(x)

    def max_pool(self, x, name, padding=1):
        """3x3 max pooling with stride 2. The map must have no negative values."""
        # Without negative values, zeros pad like minus infinity.
        x = self.pad(x, padding, f"{name}_pad")
        return layers.MaxPooling2D(3, strides=2, name=name, **self.image_options)(x)

    def average_pool(self, x, strides, name):
        """3x3 average pooling that includes the zeros of the padding."""
        x = self.pad(x, 1, f"{name}_pad")
        return layers.AveragePooling2D(3, strides=strides, name=name, **self.image_options)(x)

    def pool(self, x, pooling):
        pools = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}
        return pools[pooling](name=f"{pooling}_pool", **self.image_options)(x)

    def top(self, x, config, use_bias=True):
        """Adds the classifier, global pooling or nothing."""
        if not config["include_top"]:
            return x if config["pooling"] is None else self.pool(x, config["pooling"])
        return self.classifier(self.pool(x, "avg"), config, use_bias)

    def classifier(self, x, config, use_bias=True):
        if config["dropout_rate"]:
            x = layers.Dropout(config["dropout_rate"], name="dropout", **self.options)(x)
        x = layers.Dense(config["classes"], use_bias=use_bias, name="fc", **self.options)(x)
        # Half precision is too coarse for a loss.
        activation = config["classifier_activation"]
        return layers.Activation(activation, dtype="float32", name="predictions")(x)


def complete_config(config: dict) -> dict:
    """Checks the arguments that all networks share and fills in their defaults.

    Returns a copy of `config`; raises ValueError if an argument is out of range.
    """
    config = {k: list(v) if k.startswith("stackwise") else v for k, v in config.items()}
    if config["data_format"] is None:
        config["data_format"] = keras.config.image_data_format()
    channel_axis = -1 if config["data_format"] == "channels_last" else 0
    config["image_shape"] = _complete_image_shape(config["image_shape"], channel_axis)
    if config["include_rescaling"] and config["image_shape"][channel_axis] != 3:
        raise ValueError(
            "`include_rescaling` requires images of 3 channels; use include_rescaling=False for "
            f"others. Received: image_shape={config['image_shape']}"
        )
    config["classifier_activation"] = keras.activations.get(config["classifier_activation"])
    if not isinstance(config["classes"], int) or config["classes"] < 1:
        classes = config["classes"]
        raise ValueError(f"`classes` must be a positive integer. Received: classes={classes!r}")
    if not 0.0 <= config["dropout_rate"] < 1.0:
        rate = config["dropout_rate"]
        raise ValueError(f"`dropout_rate` must be in [0, 1). Received: dropout_rate={rate!r}")
    return config


def _complete_image_shape(image_shape, channel_axis: int) -> tuple:
    if image_shape is None:
        return (None, None, 3) if channel_axis == -1 else (3, None, None)
    image_shape = tuple(image_shape) if isinstance(image_shape, Sequence) else (image_shape,)
    if len(image_shape) != 3 or image_shape[channel_axis] is None:
        wanted = "(height, width, channels)" if channel_axis else "(channels, height, width)"
        raise ValueError(
            f"The shape of one image must be {wanted}; height and width may be None. "
            f"Received: {image_shape}"
        )
    return image_shape


def different_from(config: dict, defaults: dict) -> dict:
    """Returns the entries of `config` that differ from `defaults`."""
    return {name: config[name] for name, value in defaults.items() if config[name] != value}
