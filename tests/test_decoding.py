"""Decoding and NMS against a plain numpy detector and the reference's detections."""

import keras
import numpy as np
import pytest
from golden_data import detection_case
from keras import ops

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.detection import decoding
from keras_resnest.detection.decoding import DetectionDecoder

IMPLEMENTATIONS = ["_suppress", "_suppress_tensorflow"]


@pytest.fixture(params=IMPLEMENTATIONS)
def suppression(request, monkeypatch):
    """Runs a test with the `keras.ops` NMS and with TensorFlow's."""
    if keras.backend.backend() != "tensorflow" and request.param != "_suppress":
        pytest.skip("needs TensorFlow")
    if keras.backend.backend() == "tensorflow":
        chosen = getattr(decoding, request.param)
        monkeypatch.setattr(decoding, "_suppress_tensorflow", chosen)
    return request.param


def random_outputs(seed, batch=2, classes=3, image_shape=(64, 128), sharp=2.0):
    rng = np.random.default_rng(seed)
    count = len(AnchorGenerator()(image_shape))
    widths = {"arm_boxes": 4, "arm_objectness": 2, "odm_boxes": 4, "odm_logits": classes + 1}
    return {n: rng.normal(size=(batch, count, w)).astype("f4") * sharp for n, w in widths.items()}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def decode_by_hand(offsets, boxes):
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    center = center + offsets[:, :2] * 0.1 * size
    size = size * np.exp(np.minimum(offsets[:, 2:] * 0.2, np.log(62.5)))
    return np.concatenate([center - size / 2, center + size / 2], 1)


def iou_matrix(a, b):
    low, high = (
        np.maximum(a[:, None, :2], b[None, :, :2]),
        np.minimum(a[:, None, 2:], b[None, :, 2:]),
    )
    inter = np.prod(np.clip(high - low, 0, None), -1)
    area = lambda x: np.prod(x[:, 2:] - x[:, :2], -1)  # noqa: E731
    return inter / (area(a)[:, None] + area(b)[None] - inter)


def detect_by_hand(outputs, anchors, i, decoder):
    """One image, one class and one box at a time, in float64."""
    o = {n: v[i].astype("f8") for n, v in outputs.items()}
    boxes = decode_by_hand(o["odm_boxes"], decode_by_hand(o["arm_boxes"], anchors.astype("f8")))
    scores = softmax(o["odm_logits"])
    scores[softmax(o["arm_objectness"])[:, 1] <= decoder.objectness_threshold] = 0
    rows = []
    for label in range(scores.shape[1] - 1):
        s = scores[:, label + 1]
        order = [a for a in np.argsort(-s, kind="stable") if s[a] > decoder.confidence_threshold]
        order, kept = order[: decoder.pre_nms_top_k], []
        for a in order:
            overlap = iou_matrix(boxes[a : a + 1], boxes[kept])[0] if kept else np.zeros(0)
            if not (overlap > decoder.iou_threshold).any():
                kept.append(a)
        rows += [(s[a], label, *boxes[a]) for a in kept]
    return sorted(rows, reverse=True)[: decoder.max_detections]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_detections": 7, "pre_nms_top_k": 20},
        {"objectness_threshold": 0.6, "confidence_threshold": 0.3, "iou_threshold": 0.2},
        {"max_detections": 2000, "pre_nms_top_k": 5},
    ],
)
def test_equals_plain_numpy(suppression, options):
    decoder = DetectionDecoder(clip_to_image=False, **options)
    outputs, anchors = random_outputs(5), AnchorGenerator()((64, 128))
    got = {k: ops.convert_to_numpy(v) for k, v in decoder(outputs, anchors, (64, 128)).items()}
    assert got["boxes"].shape == (2, decoder.max_detections, 4)
    for i in range(2):
        want = detect_by_hand(outputs, anchors, i, decoder)
        n = got["num_detections"][i]
        assert n == len(want)
        np.testing.assert_allclose(got["confidence"][i, :n], [r[0] for r in want], atol=1e-6)
        assert got["labels"][i, :n].tolist() == [r[1] for r in want]
        np.testing.assert_allclose(got["boxes"][i, :n], [r[2:] for r in want], rtol=1e-4, atol=1e-3)
        for value in (got["boxes"], got["confidence"], got["labels"]):
            assert (value[i, n:] == -1).all()


def test_nothing_above_the_thresholds(suppression):
    outputs = random_outputs(6)
    outputs["arm_objectness"][..., 0] = 100.0
    got = DetectionDecoder()(outputs, AnchorGenerator()((64, 128)), (64, 128))
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
def test_golden_detections(suppression, name):
    case, outputs, rows = detection_case(name)
    side = case["size"]
    anchors = AnchorGenerator(clip=True, bounding_box_format="rel_xyxy")((side, side))
    decoder = DetectionDecoder(pre_nms_top_k=1000, max_detections=500, clip_to_image=False)
    got = {k: ops.convert_to_numpy(v) for k, v in decoder(outputs, anchors, (1, 1)).items()}
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
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        DetectionDecoder(**arguments)
