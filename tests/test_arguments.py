"""Arguments of another kind than their type hints end in one sentence that names them."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import keras_resnest as kr
from keras_resnest.checks import checked

PUBLIC = {
    **{n: getattr(kr.data, n) for n in kr.data.__all__ if n[:5] in ("read_", "find_", "load_")},
    **{n: f for n, f in vars(kr.visualization).items() if n.startswith("plot_")},
    **{n: f for n, f in vars(kr.evaluation).items() if n.endswith(("_precision", "_detections"))},
    **{n: getattr(kr.detection, n) for n in ("class_sources", "fit_anchors", "suppress_boxes")},
    **{n: getattr(kr.detection, n) for n in ("RefineDetHeads", "RefineDetLoss", "AnchorGenerator")},
    **{n: getattr(kr.callbacks, n) for n in ("ResumeTraining", "DetectionPlot")},
    **{n: getattr(kr.data, n) for n in ("resize_image", "center_crop_image", "training_batches")},
    **{n: getattr(kr.data, n) for n in ("RandAugment", "Mosaic", "TrainingAugmentation")},
    **{n: getattr(kr, n) for n in ("list_models", "create_backbone", "ResNeSt50")},
    "ImageRecord": kr.data.ImageRecord,
    "DetectionDataset": kr.data.DetectionDataset,
    "shard": kr.data.DetectionDataset.shard,
    "export_model": kr.serving.export_model,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_name_an_argument_of_another_kind(name):
    function = PUBLIC[name]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.annotation not in (parameter.empty, Any):
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
