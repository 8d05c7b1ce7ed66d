"""The decoder of plain numpy against the Keras decoder, brute force and golden detections."""

import inspect
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import reference
from detectors import CLASS_NAMES, rectangles, small_detector
from golden_data import detection_case
from keras import ops

from keras_resnest.boxes import offsets
from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.formats import BOX_FORMATS, scale_boxes
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.serving import NumpyDetectionDecoder, decoder_numpy

SHAPE = (64, 128, 3)
ANCHORS = AnchorGenerator()(SHAPE)
PER_CLASS = {"2": 0.3, "0": 0.6, "1": 0.02}
NAMES = ("arm_boxes", "arm_objectness", "odm_boxes", "odm_logits")
SWITCHES = ("two_step_regression", "negative_anchor_filtering")
ON = dict.fromkeys(SWITCHES, True)


def random_outputs(seed, batch=2, classes=3, anchors=ANCHORS, sharp=2.0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=(batch, len(anchors), width)) * sharp).astype(dtype)
        for name, width in zip(NAMES, (4, 2, 4, classes + 1), strict=True)
    }


def with_iou(outputs):
    """Adds `odm_iou`, with logits of an IoU of exactly 0 and 1 in float32."""
    rng = np.random.default_rng(20)
    iou = (rng.normal(size=(*outputs["odm_boxes"].shape[:2], 1)) * 2).astype("f4")
    iou[:, ::50], iou[:, 1::50] = -300, 300
    return {**outputs, "odm_iou": iou}


def by_keras(outputs, anchors=ANCHORS, shape=SHAPE, target="xyxy", **options):
    got = DetectionDecoder(**options)(outputs, anchors, shape, target)
    return {name: ops.convert_to_numpy(value) for name, value in got.items()}


def by_numpy(outputs, anchors=ANCHORS, shape=SHAPE, target="xyxy", **options):
    return NumpyDetectionDecoder(anchors, shape, target, **options)(outputs)


def assert_same(got, want, atol=1e-3):
    """Equal up to rounding, which may swap detections of nearly the same confidence."""
    assert list(got) == list(want)
    for name, value in got.items():
        assert value.shape == want[name].shape and value.dtype == want[name].dtype, name
    np.testing.assert_array_equal(got["num_detections"], want["num_detections"])
    np.testing.assert_allclose(got["confidence"], want["confidence"], atol=2e-6)
    for i, n in enumerate(got["num_detections"]):
        a, b = ({k: v[i, :n] for k, v in x.items() if v.ndim > 1} for x in (got, want))
        pairs = a["labels"][:, None] == b["labels"]
        pairs &= np.abs(a["confidence"][:, None] - b["confidence"]) < 4e-6
        near = atol + 1e-5 * np.abs(b["boxes"])
        pairs &= (np.abs(a["boxes"][:, None] - b["boxes"]) < near).all(axis=-1)
        assert pairs.any(axis=0).all() and pairs.any(axis=1).all()
        for name in ("boxes", "confidence", "labels"):
            assert (got[name][i, n:] == -1).all(), name


# === The Keras decoder ===


def test_constants_and_defaults_are_those_of_the_package():
    assert decoder_numpy.BOX_FORMATS == BOX_FORMATS
    assert decoder_numpy.VARIANCES == offsets.VARIANCES
    assert decoder_numpy.MAX_LOG_SIZE_RATIO == offsets.MAX_LOG_SIZE_RATIO
    ours = inspect.signature(NumpyDetectionDecoder).parameters
    for name, parameter in inspect.signature(DetectionDecoder).parameters.items():
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_detections": 7, "pre_nms_top_k": 20},
        {"max_detections": 1, "pre_nms_top_k": 1},
        {"objectness_threshold": 0.6, "confidence_threshold": 0.3, "iou_threshold": 0.2},
        {"objectness_threshold": 0.0, "confidence_threshold": 0.0, "max_detections": 900},
        {"max_detections": 2000, "pre_nms_top_k": 5},
        {"pre_nms_top_k": 10**6, "iou_threshold": 0.0},
        {"iou_threshold": 1.0, "clip_to_image": False},
        {"variances": (0.2, 0.1), "clip_to_image": False},
        {"suppression": "diou"},
        {"suppression": "soft", "max_detections": 20},
        {"suppression": "soft", "class_agnostic": True, "confidence_threshold": 0.2},
        {"class_agnostic": True, "alpha": 0.3},
        {"suppression": "diou", "iou_threshold": 0.0, "alpha": 1.0},
        {"voting_iou": 0.6, "max_detections": 30},
        {"voting_iou": 0.4, "class_agnostic": True, "suppression": "soft"},
        {"confidence_threshold": PER_CLASS, "max_detections": 20, "voting_iou": 0.5},
        {"exclusive_classes": True, "max_detections": 900, "iou_threshold": 0.3},
        {"exclusive_classes": True, "confidence_threshold": PER_CLASS, "voting_iou": 0.6},
        {"confidence_threshold": PER_CLASS, "suppression": "soft"},
        {"confidence_threshold": PER_CLASS, "class_agnostic": True, "suppression": "soft"},
    ],
    ids=str,
)
def test_equals_keras(seed, options):
    outputs = with_iou(random_outputs(seed)) if "alpha" in options else random_outputs(seed)
    assert_same(by_numpy(outputs, **options), by_keras(outputs, **options))


@pytest.mark.parametrize("classes, sharp", [(1, 2.0), (20, 2.0), (80, 1.0), (80, 3.0)])
def test_equals_keras_at_full_size(classes, sharp):
    shape = (320, 320, 3)
    anchors = AnchorGenerator()(shape)
    outputs = random_outputs(10, 1, classes, anchors, sharp)
    got = by_numpy(outputs, anchors, shape)
    assert got["num_detections"].tolist() == [200]
    assert_same(got, by_keras(outputs, anchors, shape))


@pytest.mark.parametrize("target", [*BOX_FORMATS, "XYWH"])
@pytest.mark.parametrize("clip", [True, False])
def test_formats(target, clip):
    outputs = random_outputs(3)
    got = by_numpy(outputs, target=target, clip_to_image=clip)
    want = by_keras(outputs, target=target, clip_to_image=clip)
    assert_same(got, want, atol=1e-5 if target.startswith("rel_") else 1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_float_types(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    outputs = random_outputs(4, dtype=dtype)
    in_float32 = {name: value.astype("float32") for name, value in outputs.items()}
    assert_same(by_numpy(outputs), by_keras(in_float32))


def test_reads_and_keeps_what_it_is_given():
    outputs = random_outputs(5)
    before = {name: value.copy() for name, value in outputs.items()}
    for value in outputs.values():
        value.flags.writeable = False
    decoder = NumpyDetectionDecoder(ANCHORS, SHAPE)
    first, second = decoder({**outputs, "another": None}), decoder(outputs)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    for name, value in before.items():
        np.testing.assert_array_equal(value, outputs[name])


@pytest.fixture(scope="module")
def detector():
    return small_detector(SHAPE, bounding_box_format="rel_yxyx")


def test_equals_predict(detector):
    images, _ = rectangles(3, SHAPE)
    raw = {k: ops.convert_to_numpy(v) for k, v in detector(images, training=False).items()}
    decoder = NumpyDetectionDecoder(
        detector.anchors,
        detector.image_shape,
        detector.bounding_box_format,
        class_names=detector.class_names,
        **detector.decoder.get_config(),
    )
    assert_same(decoder(raw), detector.predict(images, verbose=0), atol=1e-5)


@pytest.mark.parametrize(
    "two_step, filtering", [(False, True), (True, False), (False, False), (True, True)]
)
def test_switches(detector, monkeypatch, two_step, filtering):
    options = {
        "objectness_threshold": 0.4,
        "confidence_threshold": 0.1,
        "two_step_regression": two_step,
        "negative_anchor_filtering": filtering,
    }
    monkeypatch.setattr(detector, "decoder", DetectionDecoder(**options))
    outputs = random_outputs(6)
    want = {k: ops.convert_to_numpy(v) for k, v in detector.decode(outputs).items()}
    if not two_step:
        del outputs["arm_boxes"]
    if not filtering:
        outputs["arm_objectness"] = None  # there, and not looked at
    got = by_numpy(outputs, detector.anchors, target="rel_yxyx", **options)
    assert_same(got, want, atol=1e-5)


# === Brute force ===


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "setting",
    [
        (0.01, 0.01, 0.45, 400, 200),
        (0.3, 0.2, 0.1, 10, 30),
        (0.01, 0.05, 0.3, 400, 3),
        (0.5, 0.0, 0.6, 3, 100),
    ],
)
def test_equals_brute_force(seed, setting):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 40, (60, 2))
    anchors = np.concatenate([corner, corner + rng.uniform(10, 50, (60, 2))], 1).astype("f4")
    outputs = random_outputs(seed, 1, 4, anchors)
    raw = {name: value[0] for name, value in outputs.items()}
    want = reference.decode_detections(raw, anchors, *setting)
    names = ("objectness_threshold", "confidence_threshold", "iou_threshold")
    names = (*names, "pre_nms_top_k", "max_detections")
    options = dict(zip(names, setting, strict=True))
    got = by_numpy(outputs, anchors, clip_to_image=False, **options)
    n = got["num_detections"][0]
    assert n == len(want) > 0
    assert got["labels"][0, :n].tolist() == [label for _, label, _ in want]
    np.testing.assert_allclose(got["confidence"][0, :n], [s for s, _, _ in want], rtol=1e-5)
    np.testing.assert_allclose(got["boxes"][0, :n], [b for _, _, b in want], rtol=1e-4, atol=1e-3)


def test_suppression_does_not_depend_on_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (300, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (300, 2))], 1)
    kept = reference.suppress(boxes, -np.arange(300), np.zeros(300), iou_threshold=0.3)
    assert len(kept) > 20
    for block in (1, 7, 128, 1000):
        monkeypatch.setattr(decoder_numpy, "NMS_BLOCK", block)
        assert decoder_numpy._suppress(boxes, 0.3, 1000).tolist() == kept
        assert decoder_numpy._suppress(boxes, 0.3, 9).tolist() == kept[:9]


def test_equal_confidences_go_by_label_then_anchor():
    anchors = np.array([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]], "f4")
    outputs = {n: np.zeros((1, 3, w), "f4") for n, w in zip(NAMES, (4, 2, 4, 3), strict=True)}
    got = by_numpy(outputs, anchors, max_detections=5)
    assert got["labels"].tolist() == [[0, 0, 0, 1, 1]]
    assert got["boxes"][0, :, 0].tolist() == [0, 20, 40, 0, 20]
    got = by_numpy(outputs, anchors, pre_nms_top_k=2)
    assert got["boxes"][0, :4, 0].tolist() == [0, 20, 0, 20]


def test_thresholds_are_exclusive():
    # Exactly representable: two logits of 0 are confidences of 0.5, the IoU of the boxes is 0.5.
    anchors = np.array([[0, 0, 10, 10], [0, 0, 10, 20]], "f4")
    outputs = {n: np.zeros((1, 2, w), "f4") for n, w in zip(NAMES, (4, 2, 4, 2), strict=True)}
    count = lambda **options: by_numpy(outputs, anchors, **options)["num_detections"].tolist()  # noqa: E731
    assert count(iou_threshold=0.5) == [2]
    assert count(iou_threshold=0.499) == [1]
    assert count(confidence_threshold=0.5) == count(objectness_threshold=0.5) == [0]
    assert count(confidence_threshold=0.499, objectness_threshold=0.499, iou_threshold=0.5) == [2]


# === The predicted IoU ===


@pytest.mark.parametrize("classes", [1, 3, 1000])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_confidence_of_probability_and_iou(alpha, classes):
    """Also of probabilities and an IoU of exactly 0 in float32: 0 ** 0 is 1, as in numpy."""
    anchors = ANCHORS[:12]
    outputs = with_iou(random_outputs(4, 1, classes, anchors))
    outputs["odm_logits"][0, 2::4, 1] = -300.0
    options = {"alpha": alpha, "class_agnostic": True, "iou_threshold": 1.0}
    options |= {"confidence_threshold": 0.0, "negative_anchor_filtering": False}
    p = reference.softmax(outputs["odm_logits"])[0, :, 1:].max(axis=1)
    iou = 1 / (1 + np.exp(-outputs["odm_iou"][0, :, 0].astype("float64")))
    want = np.sort((p**alpha * iou ** (1 - alpha)).astype("float32"))[::-1]
    for decode in (by_numpy, by_keras):
        got = decode(outputs, anchors, **options)
        count = (want > 0).sum()
        assert got["num_detections"].tolist() == [count]
        np.testing.assert_allclose(got["confidence"][0, :count], want[:count], rtol=1e-5)


def test_nan_of_the_iou_is_never_a_detection():
    for alpha in (0.0, 0.5, 1.0):
        outputs = with_iou(random_outputs(4))
        outputs["odm_iou"][0], outputs["odm_logits"][1, ::2] = np.nan, np.nan
        got = by_numpy(outputs, alpha=alpha)
        assert got["num_detections"][0] == 0 < got["num_detections"][1]
        assert np.isfinite(got["confidence"]).all()


# === Golden detections of the reference implementation ===


@pytest.mark.parametrize("name", ["few_clean", "many_noisy", "dense", "size512"])
def test_golden_detections(name):
    case, outputs, rows = detection_case(name)
    side = case["size"]
    anchors = AnchorGenerator(clip=True)((side, side)) / side
    options = {"pre_nms_top_k": 1000, "max_detections": 500, "clip_to_image": False}
    got = by_numpy(outputs, anchors, (1, 1), **options)
    for image in range(case["batch"]):
        want, n = rows[rows[:, 0] == image], got["num_detections"][image]
        assert n == len(want)
        distance = np.abs(got["boxes"][image, :n] - want[:, None, 3:]).max(axis=-1)
        distance += np.abs(got["confidence"][image, :n] - want[:, None, 2])
        distance += got["labels"][image, :n] + 1 != want[:, None, 1]
        assert distance.min(axis=1).max() < 1e-4


# === Nothing, and nonsense ===


@pytest.mark.parametrize("name", ["arm_objectness", "odm_logits"])
def test_nothing_above_the_thresholds(name):
    outputs = random_outputs(7)
    outputs[name][0, :, 0] = 100.0
    got = by_numpy(outputs)
    assert got["num_detections"].tolist() == [0, 200]
    assert_same(got, by_keras(outputs))


@pytest.mark.parametrize("target", ["xyxy", "rel_center_xywh"])
def test_empty_batch(target):
    got = by_numpy(random_outputs(0, batch=0), target=target, max_detections=9)
    shapes = {name: (value.shape, str(value.dtype)) for name, value in got.items()}
    assert shapes == {
        "boxes": ((0, 9, 4), "float32"),
        "confidence": ((0, 9), "float32"),
        "labels": ((0, 9), "int32"),
        "num_detections": ((0,), "int32"),
    }
    decoder = NumpyDetectionDecoder(ANCHORS, SHAPE, target)
    assert decoder.scale_to_image(got, [], [])["boxes"].shape == (0, 9, 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_not_finite_numbers_are_never_detections(name, value, clip):
    for where in (np.s_[0], np.s_[0, ::3, 1], np.s_[:, :5, 0], np.s_[1, 7, -1]):
        outputs = random_outputs(8)
        outputs[name][where] = value
        for target in ("xyxy", "center_xywh"):
            got = by_numpy(outputs, target=target, clip_to_image=clip)
            for result in got.values():
                assert np.isfinite(result).all()


@pytest.mark.parametrize(
    "name, value, channel",
    [
        *((name, np.nan, 1) for name in NAMES),
        ("arm_boxes", np.inf, 0),
        ("odm_boxes", -np.inf, 1),
        ("odm_logits", np.inf, 2),
        ("arm_objectness", np.inf, 1),
    ],
)
def test_other_anchors_do_not_suffer(name, value, channel):
    """As if the ARM had discarded the anchors whose numbers are not finite."""
    outputs, bad = random_outputs(9), np.s_[:, ::3]
    spoiled = {k: v.copy() for k, v in outputs.items()}
    spoiled[name][(*bad, channel)] = value
    outputs["arm_objectness"][(*bad, 0)] = 100.0
    for options in ({}, {"pre_nms_top_k": 20}):
        assert_same(by_numpy(spoiled, **options), by_keras(outputs, **options))


def test_numbers_beyond_float32():
    clean = random_outputs(9)
    outputs = {name: value.astype("float64") for name, value in clean.items()}
    outputs["odm_boxes"][:, ::3, 0] = 1e300
    outputs["arm_boxes"][:, 1::3, 0] = 3e38  # itself within, but not the box
    options = {"iou_threshold": 1.0, "max_detections": 1500}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = by_numpy(outputs, **options)
    clean["arm_objectness"][:, np.arange(len(ANCHORS)) % 3 < 2] = [100.0, 0.0]
    assert_same(got, by_keras(clean, **options))


def test_infinite_sizes_and_logits_are_as_in_keras():
    outputs = random_outputs(10)
    outputs["odm_boxes"][:, ::4, 2] = np.inf  # 62.5 times the anchor
    outputs["arm_boxes"][:, ::5, 3] = -np.inf  # without height
    outputs["odm_logits"][:, ::3, 1] = -np.inf  # surely not this class
    assert_same(by_numpy(outputs), by_keras(outputs))


# === Pixels of the image ===


@pytest.mark.parametrize("target", BOX_FORMATS)
def test_scale_to_image(target):
    outputs = random_outputs(11)
    decoder = NumpyDetectionDecoder(ANCHORS, SHAPE, target, confidence_threshold=0.9)
    detections = decoder(outputs)
    before = detections["boxes"].copy()
    got = decoder.scale_to_image(detections, 48, np.array([640, 64]))
    np.testing.assert_array_equal(detections["boxes"], before)
    for i, width in enumerate((640, 64)):
        n = detections["num_detections"][i]
        assert 0 < n < 200
        want = scale_boxes(before[i, :n], target, width / 128, 48 / 64)
        np.testing.assert_allclose(got["boxes"][i, :n], ops.convert_to_numpy(want), rtol=1e-5)
        assert (got["boxes"][i, n:] == -1).all()
        one = decoder.scale_to_image({k: v[i] for k, v in detections.items()}, 48, width)
        np.testing.assert_array_equal(one["boxes"], got["boxes"][i])
    assert got["boxes"].dtype == np.float32
    np.testing.assert_array_equal(got["labels"], detections["labels"])


def test_scale_to_image_wants_sides():
    decoder = NumpyDetectionDecoder(ANCHORS, SHAPE)
    with pytest.raises(ValueError, match="image_height"):
        decoder.scale_to_image(decoder(random_outputs(0)), 0, 100)


# === Files ===


def written(folder, **changes):
    """Writes a decoder's files as an export does; None leaves a key out."""
    options = {"pre_nms_top_k": 50, "max_detections": 40, "variances": (0.1, 0.2)}
    metadata = {
        "image_shape": list(SHAPE),
        "bounding_box_format": "center_yxhw",
        "anchors": "anchors.npy",
        "decoder": DetectionDecoder(**options).get_config(),
        "class_names": CLASS_NAMES,
        "made_by": "a later version",
        **changes,
    }
    np.save(folder / "anchors.npy", ANCHORS)
    path = folder / "decoder.json"
    path.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))
    return path


def test_from_files(tmp_path):
    decoder = NumpyDetectionDecoder.from_files(str(written(tmp_path)))
    assert decoder.class_names == CLASS_NAMES
    outputs = random_outputs(12)
    want = by_keras(outputs, target="center_yxhw", pre_nms_top_k=50, max_detections=40)
    assert_same(decoder(outputs), want)

    switches = {"two_step_regression": False, "negative_anchor_filtering": True}
    want = by_keras(outputs, target="center_yxhw", **switches)
    del outputs["arm_boxes"]
    # Earlier exports have the switches beside the decoder.
    for changes in ({"decoder": switches}, {"decoder": {}, **switches}):
        path = written(tmp_path, class_names=None, **changes)
        decoder = NumpyDetectionDecoder.from_files(path)
        assert decoder.class_names is None and not decoder.two_step_regression
        assert_same(decoder(outputs), want)


@pytest.mark.parametrize(
    "changes, word",
    [
        *(({key: None}, f"Missing: .*{key}") for key in ("image_shape", "anchors", "decoder")),
        ({"decoder": {SWITCHES[0]: True}}, "Missing: .*negative_anchor_filtering"),
        ({"decoder": {}, SWITCHES[1]: True}, "Missing: .*two_step_regression"),
        ({"decoder": {SWITCHES[0]: "no"}, SWITCHES[1]: True}, "two_step_regression.*true or false"),
        ({"decoder": {}, SWITCHES[0]: "no", SWITCHES[1]: True}, "two_step_regression.*true or fal"),
        ({"bounding_box_format": "rel_center_yxhw"}, "bounding_box_format.*rel_center_yxhw"),
        ({"image_shape": [64]}, "image_shape"),
        ({"image_shape": "64x128"}, "image_shape"),
        ({"anchors": "../anchors.npy"}, "beside"),
        ({"anchors": ".."}, "beside"),
        ({"anchors": [[0, 0, 1, 1]]}, "beside"),
        ({"decoder": {**ON, "soft": 1}}, "decoder.*soft"),
        ({"decoder": [1]}, "decoder"),
        ({"decoder": {**ON, "iou_threshold": 2}}, "iou_threshold"),
        ({"decoder": {**ON, "iou_threshold": "high"}}, r"decoder\.json"),
        ({"decoder": {**ON, "clip_to_image": 1}}, "clip_to_image"),
        ({"decoder": {**ON, "class_agnostic": "no"}}, "class_agnostic.*true or false"),
        ({"decoder": {**ON, "alpha": 2}}, "alpha"),
        ({"decoder": {**ON, "suppression": ["soft"]}}, "suppression"),
        ({"decoder": {**ON, "variances": [0.1, 0.1, 0.2, 0.2]}}, "variances"),
        ({"class_names": "red"}, "class_names"),
    ],
)
def test_wrong_files(tmp_path, changes, word):
    with pytest.raises(ValueError, match=word):
        NumpyDetectionDecoder.from_files(written(tmp_path, **changes))


def test_unreadable_files(tmp_path):
    path = written(tmp_path)
    np.save(tmp_path / "anchors.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"anchors\.npy"):
        NumpyDetectionDecoder.from_files(path)
    (tmp_path / "anchors.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"anchors\.npy"):
        NumpyDetectionDecoder.from_files(path)
    with open(tmp_path / "anchors.npy", "wb") as file:
        np.savez(file, anchors=ANCHORS)
    with pytest.raises(ValueError, match="npz"):
        NumpyDetectionDecoder.from_files(path)
    (tmp_path / "anchors.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"anchors\.npy"):
        NumpyDetectionDecoder.from_files(path)
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"decoder\.json"):
            NumpyDetectionDecoder.from_files(path)


# === Errors ===


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"anchors": np.zeros((3, 5))}, "anchors"),
        ({"anchors": [["a"] * 4]}, "anchors"),
        ({"anchors": np.full((3, 4), np.nan)}, "finite"),
        ({"image_shape": (0, 128)}, "image_shape"),
        ({"image_shape": (64.5, 128)}, "image_shape"),
        ({"bounding_box_format": "corners"}, "bounding_box_format"),
        ({"confidence_threshold": 1.5}, "confidence_threshold"),
        ({"confidence_threshold": {"0": 1.5}}, r"confidence_threshold\['0'\]"),
        ({"confidence_threshold": {"a": 0.5}}, "for each class, 0. Received"),
        ({"objectness_threshold": float("nan")}, "objectness_threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"pre_nms_top_k": 2.5}, "pre_nms_top_k"),
        ({"variances": 0.1}, "variances"),
        ({"suppression": "hard"}, "suppression.*greedy, diou, soft.*'hard'"),
        ({"alpha": -0.1}, "alpha"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        NumpyDetectionDecoder(**{"anchors": ANCHORS, "image_shape": SHAPE, **arguments})


@pytest.mark.parametrize(
    "change, word",
    [
        *((lambda o, n=n: o.pop(n), f"Missing: .*{n}") for n in NAMES),
        (lambda o: o.update(arm_boxes=o["arm_boxes"][:1]), "arm_boxes"),
        (lambda o: o.update(odm_boxes=o["odm_boxes"][:, :-1]), r"odm_boxes.*\(2, 509, 4\)"),
        (lambda o: o.update(arm_objectness=o["arm_objectness"][..., :1]), "arm_objectness"),
        (lambda o: o.update(odm_logits=o["odm_logits"][..., :1]), "odm_logits"),
        (lambda o: o.update(odm_logits=o["odm_logits"][..., :3]), "odm_logits.* 4"),
        (lambda o: o.update(odm_logits=o["odm_logits"][0]), "odm_logits"),
        (lambda o: o.update(odm_boxes=np.float32(3)), r"odm_boxes.*\(\)"),
        (lambda o: o.update(arm_boxes=o["arm_boxes"].astype("int8")), "arm_boxes.*int8"),
        (lambda o: o.update(odm_iou=o["arm_objectness"]), r"odm_iou.*\(batch, 510, 1\)"),
    ],
)
def test_bad_outputs(change, word):
    outputs = random_outputs(13)
    change(outputs)
    with pytest.raises(ValueError, match=word):
        by_numpy(outputs, class_names=CLASS_NAMES)


def test_list_of_outputs():
    with pytest.raises(ValueError, match="dictionary"):
        by_numpy(list(random_outputs(0).values()))


# === Without Keras ===

PROGRAM = Path(__file__).parent / "programs" / "decode_with_numpy_alone.py"


def test_runs_alone(tmp_path):
    written(tmp_path)
    shutil.copy(decoder_numpy.__file__, tmp_path)
    outputs = random_outputs(14)
    np.savez(tmp_path / "raw.npz", **outputs)
    command = [sys.executable, "-I", "-W", "error", str(PROGRAM)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    with np.load(tmp_path / "detections.npz") as arrays:
        got = dict(arrays)
    want = by_keras(outputs, target="center_yxhw", pre_nms_top_k=50, max_detections=40)
    assert_same(got, want)
