"""Box arithmetic against Keras' own and against brute force."""

import keras
import numpy as np
import pytest

from keras_resnest.boxes import offsets as kb


def random_boxes(rng, *shape, size=100.0):
    corner = rng.uniform(0, size * 0.7, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(1, size * 0.3, (*shape, 2))], -1).astype(
        "f4"
    )


def iou_of_two(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union else 0.0


def test_pairwise_iou_equals_brute_force():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 2, 5), random_boxes(rng, 2, 7)
    b[0, 0], b[1, 1] = a[0, 0], [5, 5, 5, 5]  # identical, and without area
    got = np.array(kb.pairwise_iou(a, b))
    want = [[[iou_of_two(x, y) for y in b[i]] for x in a[i]] for i in range(2)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got[0, 0, 0] == pytest.approx(1.0)


def test_pairwise_iou_of_no_boxes():
    assert kb.pairwise_iou(np.zeros((2, 0, 4), "f4"), np.ones((9, 4), "f4")).shape == (2, 0, 9)


def test_encode_equals_keras():
    rng = np.random.default_rng(1)
    anchors, boxes = random_boxes(rng, 50), random_boxes(rng, 50)
    want = keras.utils.bounding_boxes.encode_box_to_deltas(
        anchors, boxes, anchor_format="xyxy", box_format="xyxy", variance=[0.1, 0.1, 0.2, 0.2]
    )
    # Keras orders center_yxhw by default.
    want = np.array(want)
    got = np.array(kb.encode_boxes(boxes, anchors, epsilon=0.0))
    if not np.allclose(got, want, atol=1e-3):
        want = want[:, [1, 0, 3, 2]]
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_decode_inverts_encode():
    rng = np.random.default_rng(2)
    anchors, boxes = random_boxes(rng, 3, 40), random_boxes(rng, 3, 40)
    back = kb.decode_boxes(kb.encode_boxes(boxes, anchors), anchors)
    np.testing.assert_allclose(np.array(back), boxes, atol=2e-3)


@pytest.mark.parametrize("box", [[3, 3, 3, 3], [0, 0, 1e-4, 1e-4], [0, 0, 1e5, 1e5]])
def test_encode_stays_finite(box):
    got = kb.encode_boxes(np.array([box], "f4"), np.array([[10, 10, 42, 42], [5, 5, 5, 5]], "f4"))
    assert np.isfinite(np.array(got)).all()


def test_decode_limits_growth():
    got = np.array(kb.decode_boxes(np.full((1, 4), 1e6, "f4"), np.array([[0, 0, 16, 16]], "f4")))
    assert np.isfinite(got).all()
    assert got[0, 2] - got[0, 0] == pytest.approx(1000.0, rel=1e-4)


@pytest.mark.parametrize("target", kb.BOX_FORMATS)
def test_scale_boxes_in_every_format(target):
    """Scaling in a format equals scaling the corners."""
    boxes = np.array([[10, 20, 50, 90]], "f4")
    converted = kb.convert_boxes(boxes, "xyxy", target, 100, 200)
    scaled = kb.scale_boxes(converted, target, 2.0, 3.0)
    back = kb.convert_boxes(scaled, target, "xyxy", 300, 400)
    np.testing.assert_allclose(np.array(back), [[20, 60, 100, 270]], rtol=1e-5)


def test_clip_boxes():
    got = kb.clip_boxes(np.array([[-5, -6, 70, 80], [1, 2, 3, 4]], "f4"), height=40, width=60)
    np.testing.assert_array_equal(np.array(got), [[0, 0, 60, 40], [1, 2, 3, 4]])


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match=r"bounding_box_format.*coco"):
        kb.check_box_format("coco")
