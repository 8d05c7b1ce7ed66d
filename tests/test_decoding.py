"""Decoding and NMS against brute force and the reference's detections."""

import keras
import numpy as np
import pytest
import reference
from detectors import small_detector
from golden_data import detection_case
from keras import ops

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.detection.decoding import DetectionDecoder


@pytest.fixture(params=[False, True], ids=["native", "portable"])
def portable(request):
    """Runs a test with the suppression of TensorFlow and with that of elementary operations."""
    if keras.backend.backend() != "tensorflow" and not request.param:
        pytest.skip("native suppression needs TensorFlow")
    return request.param


PER_CLASS = {"2": 0.3, "0": 0.6, "1": 0.02}


def random_outputs(seed, batch=2, classes=3, image_shape=(64, 128), sharp=2.0, iou=False):
    rng = np.random.default_rng(seed)
    count = len(AnchorGenerator()(image_shape))
    widths = {"arm_boxes": 4, "arm_objectness": 2, "odm_boxes": 4, "odm_logits": classes + 1}
    widths |= {"odm_iou": 1} if iou else {}
    return {n: rng.normal(size=(batch, count, w)).astype("f4") * sharp for n, w in widths.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_detections": 7, "pre_nms_top_k": 20},
        {"objectness_threshold": 0.6, "confidence_threshold": 0.3, "iou_threshold": 0.2},
        {"max_detections": 2000, "pre_nms_top_k": 5},
        {"suppression": "diou"},
        {"suppression": "diou", "max_detections": 30, "iou_threshold": 0.0},
        {"suppression": "soft", "max_detections": 10, "pre_nms_top_k": 40},
        {"suppression": "soft", "max_detections": 900, "confidence_threshold": 0.5},
        {"class_agnostic": True},
        {"class_agnostic": True, "suppression": "diou", "max_detections": 900},
        {"class_agnostic": True, "suppression": "soft", "alpha": 0.3, "pre_nms_top_k": 40},
        {"alpha": 0.3},
        {"alpha": 1.0},
        {"voting_iou": 0.6},
        {"voting_iou": 0.3, "suppression": "soft", "max_detections": 30},
        {"voting_iou": 0.5, "class_agnostic": True, "max_detections": 900},
        {"confidence_threshold": PER_CLASS, "voting_iou": 0.5},
        {"exclusive_classes": True, "max_detections": 30},
        {"exclusive_classes": True, "max_detections": 900, "suppression": "diou"},
        {"exclusive_classes": True, "confidence_threshold": PER_CLASS, "voting_iou": 0.6},
        {"confidence_threshold": PER_CLASS, "suppression": "soft", "max_detections": 900},
        {"confidence_threshold": PER_CLASS, "class_agnostic": True, "pre_nms_top_k": 40},
        {"confidence_threshold": PER_CLASS, "class_agnostic": True, "suppression": "soft"},
    ],
    ids=str,
)
def test_equals_plain_numpy(portable, options):
    decoder = DetectionDecoder(clip_to_image=False, **options)
    outputs, anchors = random_outputs(5, iou="alpha" in options), AnchorGenerator()((64, 128))
    got = {
        k: ops.convert_to_numpy(v)
        for k, v in decoder(outputs, anchors, (64, 128), portable=portable).items()
    }
    assert got["boxes"].shape == (2, decoder.max_detections, 4)
    for i in range(2):
        raw = {name: value[i] for name, value in outputs.items()}
        want = reference.decode_detections(raw, anchors, **options)
        n = got["num_detections"][i]
        assert n == len(want)
        np.testing.assert_allclose(got["confidence"][i, :n], [r[0] for r in want], atol=1e-6)
        assert got["labels"][i, :n].tolist() == [r[1] for r in want]
        np.testing.assert_allclose(got["boxes"][i, :n], [r[2] for r in want], rtol=1e-4, atol=1e-3)
        for value in (got["boxes"], got["confidence"], got["labels"]):
            assert (value[i, n:] == -1).all()


def test_thresholds_by_name_follow_the_names_of_the_model():
    model = small_detector((64, 64, 3), class_names=["red", "green", "blue"])
    outputs = random_outputs(8, image_shape=(64, 64))
    model.decoder = DetectionDecoder(confidence_threshold={"blue": 0.7, "red": 0.1, "green": 1.0})
    got = model.decode(outputs)
    labels, confidence = (ops.convert_to_numpy(got[name]) for name in ("labels", "confidence"))
    everything = DetectionDecoder(max_detections=900)(outputs, model.anchors, (64, 64))
    all_labels, own = (ops.convert_to_numpy(everything[n]) for n in ("labels", "confidence"))
    for label, limit in ((0, 0.1), (2, 0.7)):
        want = own[(all_labels == label) & (own > limit)]
        np.testing.assert_allclose(np.sort(confidence[labels == label]), np.sort(want), atol=1e-6)
        assert len(want) > 3
    assert not np.any(labels == 1)
    assert DetectionDecoder.from_config(model.decoder.get_config()).get_config() == (
        model.decoder.get_config()
    )
    for wrong in ({"red": 0.5}, {"red": 0.5, "green": 0.5, "blue": 0.5, "cat": 0.5}):
        model.decoder = DetectionDecoder(confidence_threshold=wrong)
        with pytest.raises(ValueError, match=r"for each class, red, green, blue. Received: \{'red"):
            model.decode(outputs)
    with pytest.raises(ValueError, match=r"confidence_threshold\['red'\]` must be between.*1.5"):
        DetectionDecoder(confidence_threshold={"red": 1.5})


def test_nothing_above_the_thresholds(portable):
    outputs = random_outputs(6)
    outputs["arm_objectness"][..., 0] = 100.0
    got = DetectionDecoder()(outputs, AnchorGenerator()((64, 128)), (64, 128), portable=portable)
    assert ops.convert_to_numpy(got["num_detections"]).tolist() == [0, 0]
    assert (ops.convert_to_numpy(got["boxes"]) == -1).all()


@pytest.mark.parametrize("target", ["yxyx", "rel_xyxy", "center_xywh", "rel_center_xywh"])
def test_formats(target):
    outputs, anchors = random_outputs(7), AnchorGenerator()((64, 128))
    decoder = DetectionDecoder(max_detections=20)
    corners = ops.convert_to_numpy(decoder(outputs, anchors, (64, 128))["boxes"])
    got = ops.convert_to_numpy(decoder(outputs, anchors, (64, 128), target)["boxes"])
    back = ops.convert_to_numpy(convert_boxes(got, target, "xyxy", 64, 128))
    real = corners[..., 2] >= 0
    np.testing.assert_allclose(back[real], corners[real], atol=1e-3)


def test_clips_to_the_image():
    outputs, anchors = random_outputs(8), AnchorGenerator()((64, 128))
    got = DetectionDecoder(max_detections=20)(outputs, anchors, (64, 128))
    boxes = ops.convert_to_numpy(got["boxes"])[0][: int(got["num_detections"][0])]
    assert boxes.min() >= 0 and (boxes <= [128, 64, 128, 64]).all()


@pytest.mark.parametrize("name", ["few_clean", "many_noisy", "dense", "size512"])
def test_golden_detections(portable, name):
    case, outputs, rows = detection_case(name)
    side = case["size"]
    anchors = AnchorGenerator(clip=True)((side, side)) / side
    decoder = DetectionDecoder(pre_nms_top_k=1000, max_detections=500, clip_to_image=False)
    got = {
        k: ops.convert_to_numpy(v)
        for k, v in decoder(outputs, anchors, (1, 1), portable=portable).items()
    }
    for image in range(case["batch"]):
        want, n = rows[rows[:, 0] == image], got["num_detections"][image]
        assert n == len(want)
        for row in want:
            distance = np.abs(got["boxes"][image, :n] - row[3:]).max(1)
            distance += np.abs(got["confidence"][image, :n] - row[2])
            distance += got["labels"][image, :n] + 1 != row[1]
            assert distance.min() < 1e-4


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"confidence_threshold": 1.5}, "confidence_threshold"),
        ({"iou_threshold": -0.1}, "iou_threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"pre_nms_top_k": 2.5}, "pre_nms_top_k"),
        ({"suppression": "hard"}, "suppression.*greedy, diou, soft.*'hard'"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        DetectionDecoder(**arguments)
