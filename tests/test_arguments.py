"""Arguments of another kind than their type hints end in one sentence that names them."""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import rectangles, small_backbone, small_detector

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
    (Sequence[str], (["a"], "a", ()), (None, 3, [3], Path("a"), b"a", {"a", "b"})),
    (tuple[float, float], LISTS, ([1], np.ones(3), [1, NAN], (1, 2, 3), "12", 3, ["a", "b"])),
    (tuple[int, ...], (*LISTS, [1], ()), (3, "a", None)),
    (os.PathLike | str, ("a", Path("a")), (3, np.array("a"))),
    (np.ndarray, (*LISTS, [[1]]), (None, "a", 3, Path("a"), np.array("a"), np.array([None]))),
    (Iterable, (*LISTS, iter([]), {}), (3, None, "a", np.array(1))),
    (Mapping[str, int], ({}, {"a": 1}), ([], "a", None)),
    (Callable[..., dict] | str, (print, "a"), (3, None)),
    (Any, (None, 3, "a", np.array("a")), ()),
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


def test_integers_arrive_as_integers():
    @checked
    def public(seed: int | None, *others, scale: float = 1):
        return (seed, *others, scale)

    for one in (1, 1.0, np.int64(1), np.array(1), np.array(1.0), tf.constant(1)):
        assert list(map(type, public(one, 2.0, scale=2))) == [int, float, int]
        assert type(public(seed=one)[0]) is int
    assert public(None, 3) == (None, 3, 1)
    assert tf.function(lambda x: public(x)[0] + 1)(tf.constant(1)).numpy() == 2


def test_arguments_of_keras_before_those_with_hints():
    optimizer = kr.recipes.SGDWithL2(0.5, excluded_variables={"bias"})
    assert float(optimizer.learning_rate) == 0.5
    with pytest.raises(ValueError, match=r"^`excluded_variables` must be .* Received: "):
        kr.recipes.SGDWithL2(0.5, excluded_variables=3)
    with pytest.raises(ValueError, match="GroupedConv2D is not valid"):  # Keras' has no hints
        kr.layers.GroupedConv2D("4", 3)


JUNK = (None, -1, 2.5, "junk", {}, {"a": 1}, object(), NAN, np.zeros((2, 2)), np.zeros((2,) * 5))
JUNK += (np.array(3), np.array("a"), [None], [], [{}], b"a", 10**30, {1}, tf.constant("a"), print)
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


# === Methods of models ===

IMAGES, TRUTH = rectangles(2, (64, 64, 3))
CALL = {"x": IMAGES, "verbose": 0}
FIT_CALL = {**CALL, "y": TRUTH}
METHODS = {
    "predict": CALL | dict.fromkeys(("batch_size", "steps", "callbacks")),
    "fit": FIT_CALL
    | {"epochs": 1, "validation_split": 0.0, "shuffle": False}
    | dict.fromkeys(("batch_size", "callbacks")),
    "evaluate": FIT_CALL | dict.fromkeys(("batch_size", "steps", "callbacks")),
    "train_on_batch": {"x": IMAGES, "y": TRUTH, "sample_weight": None},
    "predict_on_batch": {"x": IMAGES},
    "decode": {"outputs": {}, "image_shape": None},
    "anchors_for": {"image_shape": (64, 64)},
    "class_name": {"label": 1},
    "freeze_stages": {"num_stages": None},
    "replace_classes": {"class_names": ["a"], "mapping": None},
    "detect": {"images": IMAGES[0]},
}


@pytest.fixture(scope="module")
def model():
    detector = small_detector((64, 64, 3))
    detector.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
    return detector


def refuses(method, name, junk, **arguments):
    """Whether a method takes junk or refuses it in a sentence about the argument."""
    try:
        method(**{**arguments, name: junk})
    except ValueError as error:
        assert re.search(rf"\b({name}|x|images?|bounding_boxes|Ground truth)\b", str(error)), str(
            error
        )


@pytest.mark.parametrize(
    "method, name",
    [(m, name) for m, names in METHODS.items() for name in names if name != "verbose"],
)
def test_methods_of_a_detector_name_what_they_refuse(model, method, name):
    arguments = {**METHODS[method], **({"outputs": model(IMAGES)} if method == "decode" else {})}
    for junk in JUNK:
        if name != "epochs" or not isinstance(junk, int):  # some are very many
            refuses(getattr(model, method), name, junk, **arguments)
    model.freeze_stages(None)


def test_methods_of_other_objects_name_what_they_refuse(model, tmp_path):
    net = small_backbone(classes=2)
    net.compile("sgd", "mse", run_eagerly=True)
    voc = kr.evaluation.voc_average_precision([], [], class_names=["a"])
    tiles = kr.detection.TiledDetector(model, (64, 64))
    features = np.zeros((2, 2, 2, 16), "float32")
    for junk in ([None], {}):
        refuses(model.fit, "validation_data", junk, **FIT_CALL)
    for junk in JUNK:
        for name in ("x", "batch_size", "callbacks"):
            refuses(net.fit, name, junk, **{"x": IMAGES, "y": features, "verbose": 0})
        refuses(net.predict, "x", junk, verbose=0)
        for name in ("class_names", "crop_ratio"):
            refuses(net.export, name, junk, filepath=tmp_path / "x.onnx", format="onnx")
        refuses(voc.at, "iou_threshold", junk)
        refuses(tiles.predict_on_batch, "x", junk)
        refuses(kr.training.is_chief, "strategy", junk)
        refuses(kr.training.wait_for_workers, "strategy", junk)
        for name in ("strides", "sizes", "aspect_ratios"):
            refuses(kr.detection.AnchorGenerator, name, [junk] * 4)
