"""VGG as SSD and RefineDet use it."""

import keras
from keras import layers

from keras_resnest.backbones.backbone import Backbone

# Mean of the training images of the published weights, RGB, 0 to 255.
VGG_MEAN = (123.0, 117.0, 104.0)


@keras.saving.register_keras_serializable("keras_resnest")
class VGG(Backbone):
    """VGG whose first two dense layers are convolutions of fewer channels.

    fc6 is a 3x3 convolution with dilation 3, fc7 a 1x1 convolution, both of 1024 channels. The
    pyramid is made of the maps after ReLU, before pooling: in VGG-16 P2 is conv3_3 (stride 4),
    P3 conv4_3, P4 conv5_3 and P5 fc7 (stride 32). Pooling rounds odd sizes up, as in Caffe.

    Args:
        stackwise_num_filters: list of integers, channels of the convolutions of each stage.
        stackwise_num_blocks: list of integers, 3x3 convolutions of each stage.
        include_rescaling: whether images are RGB with values 0 to 255, uint8 or float, and the
            model subtracts the mean (123, 117, 104); otherwise it is expected subtracted.
        image_shape: shape of one image, `(height, width, 3)`, or `(3, height, width)` with
            `channels_first`. Height and width may be None.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' default.
        dtype: dtype or dtype policy of all layers.
        **kwargs: `name` and `trainable` of `keras.Model`.

    Returns:
        A `keras.Model` from images to the map of fc7, `(batch, height / 32, width / 32, 1024)`.

    Raises:
        ValueError: if there is not one number per stage.

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
        include_rescaling: bool = True,
        image_shape=None,
        data_format: str | None = None,
        dtype=None,
        **kwargs,
    ):
        data_format = keras.config.image_data_format() if data_format is None else data_format
        if image_shape is None:
            image_shape = (None, None, 3) if data_format == "channels_last" else (3, None, None)
        if len(stackwise_num_filters) != len(stackwise_num_blocks) or not stackwise_num_filters:
            raise ValueError(
                "`stackwise_num_filters` and `stackwise_num_blocks` must have one number per "
                f"stage. Received: {stackwise_num_filters}, {stackwise_num_blocks}"
            )
        config = {
            "stackwise_num_filters": list(stackwise_num_filters),
            "stackwise_num_blocks": list(stackwise_num_blocks),
            "include_rescaling": include_rescaling,
            "image_shape": tuple(image_shape),
            "data_format": data_format,
        }
        dtype = keras.dtype_policies.get(dtype)
        inputs = keras.Input(image_shape, name="images")
        pyramid_outputs = _vgg_network(inputs, config, dtype)
        outputs = list(pyramid_outputs.values())[-1]
        super().__init__(inputs, outputs, pyramid_outputs, config, dtype, **kwargs)


def _vgg_network(inputs, config, dtype):
    """Returns the feature maps by pyramid level."""
    options = {"data_format": config["data_format"], "dtype": dtype}

    def convolution(x, filters, kernel_size, name, dilation_rate=1):
        return layers.Conv2D(
            filters,
            kernel_size,
            padding="same",
            dilation_rate=dilation_rate,
            activation="relu",
            kernel_initializer="he_normal",
            name=name,
            **options,
        )(x)

    x = inputs
    if config["include_rescaling"]:
        axis = -1 if config["data_format"] == "channels_last" else 1
        x = layers.Normalization(
            axis=axis, mean=VGG_MEAN, variance=(1.0, 1.0, 1.0), dtype=dtype, name="rescaling"
        )(x)
    pyramid_outputs = {}
    stages = zip(config["stackwise_num_filters"], config["stackwise_num_blocks"], strict=True)
    for stage, (filters, num_convolutions) in enumerate(stages, start=1):
        for index in range(1, num_convolutions + 1):
            x = convolution(x, filters, 3, f"conv{stage}_{index}")
        if stage > 2:  # the maps of stride 1 and 2 are of no use to a detector
            pyramid_outputs[f"P{stage - 1}"] = x
        x = layers.MaxPooling2D(2, padding="same", name=f"pool{stage}", **options)(x)
    x = convolution(x, 1024, 3, "fc6", dilation_rate=3)
    pyramid_outputs[f"P{stage}"] = convolution(x, 1024, 1, "fc7")
    return pyramid_outputs
