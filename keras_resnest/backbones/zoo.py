"""What networks there are: their size, their cost, their published weights."""

import fnmatch
import math
from typing import NamedTuple

import keras
import numpy as np

from keras_resnest.backbones.figures import FIGURES
from keras_resnest.backbones.variants import VARIANTS
from keras_resnest.backbones.weights.table import PRETRAINED


class ModelSummary(NamedTuple):
    """One network of the table.

    `parameters` are the trainable ones with classifier, where there is one; `gflops` are
    thousand millions of multiply-adds for one image of `crop_size`; `top1` (per cent) is what
    the publishers of the weights measured on ImageNet; `weights` are the tags for `weights=`,
    the first of which is `"imagenet"`; `licenses` and `sources` belong to the tags.
    """

    name: str
    parameters: int
    gflops: float
    crop_size: int
    top1: float | None
    weights: tuple[str, ...]
    licenses: tuple[str, ...]
    sources: tuple[str, ...]


class ModelTable(list):
    """List of `ModelSummary` that prints as a table."""

    def __str__(self):
        lines = [
            "| name | parameters | GFLOPs | at | top-1 | weights | license |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for model in self:
            top1 = "" if model.top1 is None else f"{model.top1:.2f}"
            licenses = ", ".join(dict.fromkeys(model.licenses))
            lines.append(
                f"| {model.name} | {model.parameters / 1e6:.2f} M | {model.gflops:.2f} | "
                f"{model.crop_size} | {top1} | {', '.join(model.weights)} | {licenses} |"
            )
        return "\n".join(lines)


def list_models(pattern: str = "*") -> ModelTable:
    """The networks that `create_backbone` builds, with their figures and published weights.

    Args:
        pattern: shell pattern, such as `"resnest*"`. Case does not matter.

    Returns:
        List of `ModelSummary`, in the order of the table. `print` shows it as one.

    Example:
        >>> list_models("resnest50")[0].weights
        ('in1k', 'official')
    """
    return ModelTable(
        _summary(name) for name in VARIANTS if fnmatch.fnmatchcase(name, pattern.lower())
    )


def _summary(name):
    tags = PRETRAINED.get(name, {})
    first = next(iter(tags.values()), None)
    parameters, gflops = FIGURES[name]
    return ModelSummary(
        name,
        parameters,
        gflops,
        crop_size(name),
        None if first is None else first.top1,
        tuple(tags),
        tuple(row.license for row in tags.values()),
        tuple(row.source for row in tags.values()),
    )


def crop_size(name: str) -> int:
    """Side of the square images, in pixels, on which a network is measured."""
    tags = PRETRAINED.get(name)
    return next(iter(tags.values())).crop_size if tags else 224


def count_parameters(model: keras.Model) -> int:
    """Number of trainable parameters."""
    return int(sum(np.prod(variable.shape) for variable in model.trainable_variables))


def count_multiply_adds(model: keras.Model, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of all convolution and dense layers for one image.

    This is what papers call FLOPs. Layers inside other layers are counted too, and layers that
    are called several times as often as that. Nothing is computed: shapes are enough.

    Args:
        model: a network on images.
        image_shape: shape of one image in pixels and channels, in the model's data format.

    Returns:
        Number of multiply-adds.

    Raises:
        ValueError: if `image_shape` is not three positive integers, or not one of the model's.

    Example:
        >>> count_multiply_adds(ResNet50(), (224, 224, 3)) / 1e9
        4.089184256
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(
            f"`image_shape` must be three positive integers. Received: image_shape={image_shape!r}"
        )
    counts = []
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, _COUNTED_LAYERS)]
    try:
        for layer in layers:
            # Past Keras' tracking of attributes; a call looks the method up on the instance.
            object.__setattr__(layer, "call", _counting_call(layer, counts))
        _Inference(model).symbolic_call(keras.KerasTensor((1, *shape)))
    finally:
        for layer in layers:
            layer.__dict__.pop("call", None)
    return sum(counts)


_COUNTED_LAYERS = (
    keras.layers.Conv2D,
    keras.layers.Conv2DTranspose,
    keras.layers.DepthwiseConv2D,
    keras.layers.Dense,
)


class _Inference(keras.Operation):
    """A call of the model, so that Keras traces it on any backend without computing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, images):
        return self.model(images, training=False)


def _counting_call(layer, counts):
    call = layer.call

    def counting_call(inputs, *args, **kwargs):
        outputs = call(inputs, *args, **kwargs)
        counts.append(_multiply_adds(layer, inputs.shape, outputs.shape))
        return outputs

    return counting_call


def _multiply_adds(layer, input_shape, output_shape) -> int:
    kernel = layer.kernel.shape
    if isinstance(layer, keras.layers.Conv2DTranspose):
        # Every value of the input is spread over a window of all filters.
        return math.prod(input_shape) * math.prod(kernel[:3])
    # Each value of the result takes one for every value of the input that it sees.
    seen = kernel[:2] if isinstance(layer, keras.layers.DepthwiseConv2D) else kernel[:-1]
    return math.prod(output_shape) * math.prod(seen)
