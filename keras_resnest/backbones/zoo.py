"""Lists the networks with their size, cost and published weights."""

import fnmatch
import math
from typing import Literal, NamedTuple

import keras
import numpy as np

from keras_resnest.backbones.figures import FIGURES
from keras_resnest.backbones.registry import VARIANTS
from keras_resnest.backbones.weights.detector_files import DETECTOR_FILES, DetectorFile
from keras_resnest.backbones.weights.table import PRETRAINED
from keras_resnest.checks import checked


class ModelSummary(NamedTuple):
    """Size, cost, accuracy and published weights of a network.

    `parameters` counts trainable parameters, including the classifier. `gflops` are billions of
    multiply-adds for one image of `crop_size`. `weights` are the tags for `weights=`; `"imagenet"`
    selects the first, whose published ImageNet accuracy (percent) is `top1`. `licenses` and
    `sources` have one entry per tag.
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
    """List of `ModelSummary` or `DetectorFile` that prints as a table."""

    def __str__(self):
        header = ("name", "parameters", "GFLOPs", "at", "top-1", "weights", "license")
        if self and isinstance(self[0], DetectorFile):
            header = ("name", "weights", "data", "test", "mAP", "file", "source", "license")
        rows = [header, ["---"] * len(header), *(_cells(model) for model in self)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(model) -> tuple:
    if isinstance(model, DetectorFile):
        return tuple("" if value is None else str(value) for value in model)
    return (
        model.name,
        f"{model.parameters / 1e6:.2f} M",
        f"{model.gflops:.2f}",
        str(model.crop_size),
        "" if model.top1 is None else f"{model.top1:.2f}",
        ", ".join(model.weights),
        ", ".join(dict.fromkeys(model.licenses)),
    )


@checked
def list_models(
    pattern: str = "*", kind: Literal["backbone", "detector"] = "backbone"
) -> ModelTable:
    """Lists the networks that `create_backbone` builds, or the files of published detectors.

    Args:
        pattern: shell pattern, such as `"resnest*"`. Case does not matter.
        kind: `"backbone"` or `"detector"`.

    Returns:
        List of `ModelSummary`, in the order of the table, or of `DetectorFile`. `print` shows a
        table.

    Raises:
        ValueError: if `kind` is another.

    Example:
        >>> list_models("resnest50")[0].weights
        ('in1k', 'official')
        >>> list_models("refinedet512_resnet101", kind="detector")[0].map
        36.4
    """
    if kind == "detector":
        found = [f for f in DETECTOR_FILES if fnmatch.fnmatchcase(f.name, pattern.lower())]
        return ModelTable(found)
    return ModelTable(
        _summary(name) for name in VARIANTS if fnmatch.fnmatchcase(name, pattern.lower())
    )


def _summary(name: str) -> ModelSummary:
    tags = PRETRAINED.get(name, {})
    parameters, gflops = FIGURES[name]
    return ModelSummary(
        name=name,
        parameters=parameters,
        gflops=gflops,
        crop_size=crop_size(name),
        top1=next((row.top1 for row in tags.values()), None),
        weights=tuple(tags),
        licenses=tuple(row.license for row in tags.values()),
        sources=tuple(row.source for row in tags.values()),
    )


def crop_size(name: str) -> int:
    """Returns the side, in pixels, of the images that a network is measured on."""
    return next((row.crop_size for row in PRETRAINED.get(name, {}).values()), 224)


def count_parameters(model: keras.Model) -> int:
    """Returns the number of trainable parameters."""
    return int(sum(np.prod(variable.shape) for variable in model.trainable_variables))


@checked
def count_multiply_adds(model: keras.Model, image_shape: tuple[int, int, int]) -> int:
    """Counts the multiply-adds of all convolution and dense layers for one image.

    Papers call this FLOPs. The count covers nested layers, and counts a layer once per call. Only
    shapes are computed.

    Args:
        model: a network on images.
        image_shape: shape of one image, in the model's data format.

    Returns:
        Number of multiply-adds.

    Raises:
        ValueError: if `image_shape` is not three positive integers, or does not fit the model.

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
            # Bypass Keras' attribute tracking; calling looks `call` up on the instance.
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
    """Calls the model, so that Keras traces it on any backend without computing."""

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
        # Every input value contributes to a window of all filters.
        return math.prod(input_shape) * math.prod(kernel[:3])
    # Every output value takes one multiply-add per input value in its window.
    window = kernel[:2] if isinstance(layer, keras.layers.DepthwiseConv2D) else kernel[:-1]
    return math.prod(output_shape) * math.prod(window)
