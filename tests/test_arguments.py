"""Arguments of another kind than their type hints end in one sentence that names them."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tensorflow as tf

import keras_resnest as kr
from keras_resnest.checks import checked

MODULES = (kr, kr.layers, kr.callbacks, kr.data, kr.evaluation, kr.visualization, kr.serving)
MODULES += (kr.recipes, kr.training, kr.detection, kr.backbones)
# Results and tables, which users do not make; a configuration of another library.
OTHERS = {"AveragePrecision", "COCOAveragePrecision", "DetectionReport", "OracleDecomposition"}
OTHERS |= {"AnchorCoverage", "Shapes", "ShapesConfig", "Backbone"}
PUBLIC = {
    name: value
    for module in MODULES
    for name in getattr(module, "__all__", vars(module))
    if callable(value := getattr(module, name)) and "keras_resnest" in str(value.__module__)
    if hasattr(module, "__all__") or value.__module__.startswith(module.__name__)
    if name not in OTHERS and name[0] != "_"
}
for owner in (kr.data.DetectionDataset, kr.recipes.Recipe, kr.detection.AnchorGenerator):
    PUBLIC |= {n: f for n, f in vars(owner).items() if inspect.isfunction(f) and n[0] != "_"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_name_an_argument_of_another_kind(name):
    function = PUBLIC[name]
    for parameter in inspect.signature(function).parameters.values():
        untyped = parameter.annotation in (parameter.empty, Any)
        if untyped or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        with pytest.raises(ValueError, match=rf"^`{parameter.name}` must be .* Received: "):
            function(**{parameter.name: object()})


NAN = float("nan")
NUMBERS = (3, 2.0, np.float32(1), np.int64(1), np.array(1), tf.constant(1.0))
LISTS = ([1, 2], (1, 2), np.array([1, 2]), tf.constant([1, 2]))
FIT = [
    (int, NUMBERS, (None, "3", [3], object(), 2.5, True, NAN, float("inf"), 1e30)),
    (float, (*NUMBERS, 2.5, float("inf")), (None, "3", [3], True, NAN, np.array("a"))),
    (bool, (True, np.bool_(True), 0, 1, np.array(True)), (None, "yes", 2, NAN)),
    (int | None, (None, 3), ("3", [])),
    (str, ("a",), (None, 3, ["a"], Path("a"))),
    (Sequence[int], (*LISTS, []), (None, 3, "12", ["1", "2"], [None], {1, 2}, {1: 2}, np.array(1))),
    (Sequence[str], (["a"], "a", ()), (None, 3, [3], Path("a"), {"a", "b"})),
    (tuple[float, float], LISTS, ([1], np.ones(3), [1, NAN], (1, 2, 3), "12", 3, ["a", "b"])),
    (tuple[int, ...], (*LISTS, [1], ()), (3, "a", None)),
    (np.ndarray, (*LISTS, [[1]]), (None, "a", 3, Path("a"), np.array("a"), np.array([None]))),
    (Iterable, (*LISTS, iter([]), {}), (3, None, "a", np.array(1))),
    (Mapping[str, int], ({}, {"a": 1}), ([], "a", None)),
    (Callable[..., dict] | str, (print, "a"), (3, None)),
    (Any, (None, 3, "a"), ()),
    (kr.data.Mosaic | None, (None, kr.data.Mosaic()), ("a", 3)),
    (Literal["a", "b"], ("a", "b"), (None, "c", "", 3, ["a"], Path("a"), np.array(["a"]))),
    (Literal["a", "b"] | None, (None, "a"), ("c", 3)),
]


@pytest.mark.parametrize("hint, good, bad", FIT, ids=lambda value: str(value)[:30])
def test_kinds_of_type_hints(hint, good, bad):
    @checked
    def public(value: hint, *args, other=None):
        return "works"

    for value in good:
        assert public(value) == public(value=value, other=3) == "works"
    for value in bad:
        with pytest.raises(ValueError, match=r"^`value` must be .* Received: value="):
            public(value)


def test_arguments_of_keras_before_those_with_hints():
    optimizer = kr.recipes.SGDWithL2(0.5, excluded_variables={"bias"})
    assert float(optimizer.learning_rate) == 0.5
    with pytest.raises(ValueError, match=r"^`excluded_variables` must be .* Received: "):
        kr.recipes.SGDWithL2(0.5, excluded_variables=3)
    with pytest.raises(ValueError, match="GroupedConv2D is not valid"):  # Keras' has no hints
        kr.layers.GroupedConv2D("4", 3)


JUNK = (None, -1, 2.5, "junk", {}, {"a": 1}, object(), NAN, np.zeros((2, 2)), np.zeros((2,) * 5))
LAYERS = (
    kr.layers.AlignedConvolution(3, 4),
    *(kr.layers.ChannelShuffle(2), kr.layers.DropBlock2D(0.1), kr.layers.GroupedConv2D(4, 3)),
    *(kr.layers.RadixSoftmax(2), kr.layers.SelectiveKernel(8), kr.layers.SplitAttention(4)),
    *(kr.layers.SqueezeExcitation(4), kr.layers.TransferConnectionBlock(4)),
)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layers_refuse_what_is_no_feature_map(layer):
    for junk in JUNK:
        with pytest.raises(ValueError, match=r"\w"):
            layer(junk)


@pytest.mark.parametrize("name", ["RandAugment", "RandomFlip", "TrainingAugmentation", "MixUp"])
def test_augmentations_refuse_other_elements_and_seeds(name):
    class_ = getattr(kr.data, name)
    augmentation = (
        class_((32, 32)) if "image_shape" in inspect.signature(class_).parameters else class_()
    )
    (first, *_) = inspect.signature(augmentation).parameters
    rows = {"boxes": np.zeros((0, 4), "float32"), "labels": np.zeros(0, "int32")}
    image = np.zeros((8, 8, 3), "uint8")
    good = image if first == "image" else {"images": image, "bounding_boxes": rows}
    for junk in JUNK:
        with pytest.raises(ValueError, match=f"^`{first}` must be "):
            augmentation(junk, (1, 2))
        with pytest.raises(ValueError, match=r"^`seed` must be two integers"):
            augmentation(good, junk)
