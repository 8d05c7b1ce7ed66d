"""Box formats, IoU and offsets against Keras and brute force."""

import keras
import numpy as np
import pytest
import reference
from keras import ops

from keras_resnest.boxes.formats import (
    BOX_FORMATS,
    check_box_format,
    clip_boxes,
    convert_boxes,
    scale_boxes,
)
from keras_resnest.boxes.offsets import decode_boxes, encode_boxes
from keras_resnest.boxes.overlap import paired_iou, pairwise_diou, pairwise_iou


def random_boxes(rng, *shape, size=100.0):
    corner = rng.uniform(0, size * 0.7, (*shape, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, size * 0.3, (*shape, 2))], axis=-1)
    return boxes.astype("f4")


def test_pairwise_iou_equals_brute_force():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 2, 5), random_boxes(rng, 2, 7)
    b[0, 0], b[1, 1] = a[0, 0], [5, 5, 5, 5]  # identical, and without area
    got = pairwise_iou(a, b)
    assert isinstance(got, np.ndarray) and got.dtype == "float32"
    np.testing.assert_allclose(got, [reference.iou(a[i], b[i]) for i in range(2)], atol=1e-6)
    assert got[0, 0, 0] == pytest.approx(1.0)
    tensor = pairwise_iou(ops.convert_to_tensor(a), b)
    assert ops.is_tensor(tensor)
    np.testing.assert_array_equal(ops.convert_to_numpy(tensor), got)


def overlapping_boxes(seed, count=40):
    corners = np.random.default_rng(seed).uniform(0, 50, (2, count, 2, 2)).astype("f4")
    return np.sort(corners, axis=2).reshape(2, count, 4)


def enclosing_boxes(a, b):
    return np.concatenate([np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:])], 1)


def test_generalized_iou_by_hand():
    """IoU minus the uncovered part of the enclosing box, arXiv 1902.09630."""
    a, b = overlapping_boxes(0)
    iou = np.diag(reference.iou(a, b))
    area = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    hull = enclosing_boxes(a, b)
    hull = (hull[:, 2:] - hull[:, :2]).prod(1)
    union = sum(area) / (1 + iou)
    np.testing.assert_allclose(np.array(paired_iou(a, b)), iou, atol=1e-6)
    got = np.array(paired_iou(a, b, generalized=True))
    np.testing.assert_allclose(got, iou - (hull - union) / hull, atol=1e-6)
    assert got.min() < 0 < got.max()
    assert np.isclose(float(paired_iou(np.eye(4)[:1] * 0, np.eye(4)[:1] * 0)[0]), 0.0)


def test_distance_iou_by_hand():
    """IoU minus squared distance of the centers over squared diagonal, arXiv 1911.08287."""
    a, b = overlapping_boxes(1)
    hull = enclosing_boxes(a, b)
    centers = [(x[:, :2] + x[:, 2:]) / 2 for x in (a, b)]
    distance = ((centers[0] - centers[1]) ** 2).sum(1) / ((hull[:, 2:] - hull[:, :2]) ** 2).sum(1)
    want = np.diag(reference.iou(a, b)) - distance
    np.testing.assert_allclose(np.diag(pairwise_diou(a, b)), want, atol=1e-5)
    tensors = ops.convert_to_tensor(a), ops.convert_to_tensor(b)
    np.testing.assert_allclose(np.array(pairwise_diou(*tensors)), pairwise_diou(a, b), atol=1e-5)
    assert pairwise_diou(a[:1] * 0, a[:1] * 0).tolist() == [[0.0]]


@pytest.mark.parametrize("convert", [np.asarray, ops.convert_to_tensor])
def test_pairwise_iou_of_no_boxes(convert):
    none, some = convert(np.zeros((2, 0, 4), "f4")), convert(np.ones((9, 4), "f4"))
    assert pairwise_iou(none, some).shape == (2, 0, 9)


def test_encode_equals_keras_and_brute_force():
    rng = np.random.default_rng(1)
    anchors, boxes = random_boxes(rng, 50), random_boxes(rng, 50)
    want = keras.utils.bounding_boxes.encode_box_to_deltas(
        anchors, boxes, anchor_format="xyxy", box_format="xyxy", variance=[0.1, 0.1, 0.2, 0.2]
    )
    got = np.array(encode_boxes(boxes, anchors, epsilon=0.0))
    want = np.array(want)[:, [1, 0, 3, 2]]  # Keras returns dy, dx, dh, dw
    np.testing.assert_allclose(got, want, atol=1e-3)
    got = np.array(encode_boxes(boxes, anchors))
    np.testing.assert_allclose(got, reference.encode(boxes, anchors), atol=1e-3)


def test_decode_inverts_encode():
    rng = np.random.default_rng(2)
    anchors, boxes = random_boxes(rng, 3, 40), random_boxes(rng, 3, 40)
    back = decode_boxes(encode_boxes(boxes, anchors), anchors)
    np.testing.assert_allclose(np.array(back), boxes, atol=2e-3)


@pytest.mark.parametrize("box", [[3, 3, 3, 3], [0, 0, 1e-4, 1e-4], [0, 0, 1e5, 1e5]])
def test_encode_stays_finite(box):
    anchors = np.array([[10, 10, 42, 42], [5, 5, 5, 5]], "f4")
    assert np.isfinite(np.array(encode_boxes(np.array([box], "f4"), anchors))).all()


def test_decode_limits_growth():
    got = np.array(decode_boxes(np.full((1, 4), 1e6, "f4"), np.array([[0, 0, 16, 16]], "f4")))
    assert np.isfinite(got).all()
    assert got[0, 2] - got[0, 0] == pytest.approx(1000.0, rel=1e-4)


@pytest.mark.parametrize("target", BOX_FORMATS)
def test_scale_boxes_in_every_format(target):
    """Scaling in a format equals scaling the corners."""
    boxes = np.array([[10, 20, 50, 90]], "f4")
    scaled = scale_boxes(convert_boxes(boxes, "xyxy", target, 100, 200), target, 2.0, 3.0)
    back = convert_boxes(scaled, target, "xyxy", 300, 400)
    np.testing.assert_allclose(np.array(back), [[20, 60, 100, 270]], rtol=1e-5)


def test_clip_boxes():
    got = clip_boxes(np.array([[-5, -6, 70, 80], [1, 2, 3, 4]], "f4"), height=40, width=60)
    np.testing.assert_array_equal(np.array(got), [[0, 0, 60, 40], [1, 2, 3, 4]])


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match=r"bounding_box_format.*coco"):
        check_box_format("coco")
