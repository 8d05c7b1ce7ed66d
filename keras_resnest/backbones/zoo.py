"""What networks there are: their size, their cost, their published weights."""

import fnmatch
from typing import NamedTuple

import keras
import numpy as np

from keras_resnest.backbones.figures import FIGURES
from keras_resnest.backbones.published_weights import PRETRAINED
from keras_resnest.backbones.variants import VARIANTS


class ModelSummary(NamedTuple):
    """One network of the table.

    `parameters` are the trainable ones with classifier, where there is one; `gflops` are
    thousand millions of multiply-adds for one picture of `crop_size`; `top1` (per cent) is what
    the publishers of the weights measured on ImageNet; `weights` are the tags for `weights=`,
    the first of which is `"imagenet"`; `licences` and `sources` belong to the tags.
    """

    name: str
    parameters: int
    gflops: float
    crop_size: int
    top1: float | None
    weights: tuple[str, ...]
    licences: tuple[str, ...]
    sources: tuple[str, ...]


class ModelTable(list):
    """List of `ModelSummary` that prints as a table."""

    def __str__(self):
        lines = [
            "| name | parameters | GFLOPs | at | top-1 | weights | licence |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for model in self:
            top1 = "" if model.top1 is None else f"{model.top1:.2f}"
            licences = ", ".join(dict.fromkeys(model.licences))
            lines.append(
                f"| {model.name} | {model.parameters / 1e6:.2f} M | {model.gflops:.2f} | "
                f"{model.crop_size} | {top1} | {', '.join(model.weights)} | {licences} |"
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
        tuple(row.licence for row in tags.values()),
        tuple(row.source for row in tags.values()),
    )


def crop_size(name: str) -> int:
    """Side of the square pictures, in pixels, on which a network is measured."""
    tags = PRETRAINED.get(name)
    return next(iter(tags.values())).crop_size if tags else 224


def count_parameters(model: keras.Model) -> int:
    """Number of trainable parameters."""
    return int(sum(np.prod(variable.shape) for variable in model.trainable_variables))


def count_multiply_adds(model: keras.Model, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of all convolutions and dense layers for one picture.

    This is what papers call FLOPs. They are counted in the graph that TensorFlow runs.

    Args:
        model: a network on images.
        image_shape: shape of one image, in the model's data format.

    Returns:
        Number of multiply-adds.

    Raises:
        RuntimeError: on another backend than TensorFlow.

    Example:
        >>> count_multiply_adds(ResNet50(), (224, 224, 3)) / 1e9
        4.09
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError("Multiply-adds are counted on the TensorFlow backend")
    import tensorflow as tf

    function = tf.function(lambda x: model(x, training=False))
    graph = function.get_concrete_function(tf.TensorSpec((1, *image_shape), "float32")).graph
    return sum(_multiply_adds(operation) for operation in graph.get_operations())


def _multiply_adds(operation) -> int:
    if operation.type not in ("Conv2D", "DepthwiseConv2dNative", "MatMul"):
        return 0
    kernel = operation.inputs[1].shape
    # Multiply-adds for each value of the result: one per input that it sees.
    inputs = {"MatMul": kernel[:1], "DepthwiseConv2dNative": kernel[:2]}
    seen = np.prod(inputs.get(operation.type, kernel[:3]), dtype="int64")
    return int(np.prod(operation.outputs[0].shape, dtype="int64") * seen)
