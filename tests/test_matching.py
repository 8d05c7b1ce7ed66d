"""Matching and targets against brute force and the reference."""

import numpy as np
import pytest
from golden.recipe import make_array
from golden_data import load_arrays, load_cases
from keras import ops

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.matching import CANDIDATES, BoxMatcher, greedy_one_to_one
from keras_resnest.boxes.offsets import decode_boxes, encode_boxes
from keras_resnest.boxes.overlap import pairwise_iou
from keras_resnest.detection.loss import encode_targets


def greedy_by_hand(iou):
    """Takes the highest remaining pair, again and again, as the authors' Caffe code does."""
    iou = iou.copy()
    holder = np.full(iou.shape[1], -1)
    for _ in range(iou.shape[0]):
        g, a = np.unravel_index(np.argmax(iou), iou.shape)
        if iou[g, a] <= 0:
            break
        holder[a] = g
        iou[g, :], iou[:, a] = -1, -1
    return holder


@pytest.mark.parametrize(
    "objects, anchors, density", [(1, 5, 1.0), (6, 8, 1.0), (12, 9, 0.6), (40, 60, 0.2)]
)
def test_greedy_equals_brute_force(objects, anchors, density):
    rng = np.random.default_rng(objects)
    iou = rng.random((20, objects, anchors)).astype("f4")
    iou *= rng.random(iou.shape) < density
    got = np.array(greedy_one_to_one(ops.convert_to_tensor(iou)))
    np.testing.assert_array_equal(got, [greedy_by_hand(i) for i in iou])


def test_duplicated_boxes_get_different_anchors():
    iou = np.tile(np.array([0.9, 0.5, 0.3, 0.0], "f4"), (1, 3, 1))
    assert np.array(greedy_one_to_one(ops.convert_to_tensor(iou)))[0].tolist() == [0, 1, 2, -1]


@pytest.mark.parametrize("levels", [2, 3, 6])
def test_ties_go_to_the_first_object_and_its_first_anchor(levels):
    """Few different values, so that nearly every choice is one between equals."""
    rng = np.random.default_rng(levels)
    iou = (rng.integers(0, levels, (12, 25, 40)) / levels).astype("f4")
    got = np.array(greedy_one_to_one(ops.convert_to_tensor(iou)))
    np.testing.assert_array_equal(got, [greedy_by_hand(i) for i in iou])


def test_many_objects_that_want_the_same_anchors():
    """Every object likes the same anchors best, in the same order: all but one lose again."""
    rng = np.random.default_rng(0)
    objects, anchors = 5 * CANDIDATES, 6 * CANDIDATES
    iou = np.linspace(0.9, 0.1, anchors)[None, None] * rng.uniform(0.99, 1.0, (2, objects, 1))
    iou = iou.astype("f4")
    got = np.array(greedy_one_to_one(ops.convert_to_tensor(iou)))
    np.testing.assert_array_equal(got, [greedy_by_hand(i) for i in iou])
    assert ((got >= 0).sum(axis=1) == objects).all()


@pytest.mark.parametrize("objects", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("per_image", [False, True])
def test_matching_boxes_equals_matching_their_iou(objects, per_image):
    """Duplicates, boxes without area and padding between them, in chunks of every length."""
    rng = np.random.default_rng(objects)
    boxes = rng.uniform(0, 60, (3, objects, 4)).astype("f4")
    boxes[..., 2:] = boxes[..., :2] + rng.choice([0.0, 0.5, 20.0, 50.0], (3, objects, 2))
    boxes[:, 1::3] = boxes[:, : len(boxes[0, 1::3])]
    valid = rng.random((3, objects)) < 0.8
    anchors = np.asarray(AnchorGenerator()((64, 64)))
    if per_image:
        anchors = anchors + rng.normal(0, 2, (3, *anchors.shape)).astype("f4")
    iou = np.array(pairwise_iou(boxes, anchors)) * valid[..., None]
    got = np.array(BoxMatcher().match_boxes(boxes, ops.convert_to_tensor(valid), anchors))
    for b in range(3):
        want = match_by_hand(iou[b], 0.5) if objects else np.full(anchors.shape[-2], -1)
        np.testing.assert_array_equal(got[b], want)


def test_more_objects_than_anchors():
    iou = np.array([[[0.2], [0.8], [0.5]]], "f4")
    assert np.array(greedy_one_to_one(ops.convert_to_tensor(iou)))[0].tolist() == [1]


def match_by_hand(iou, threshold):
    matches = np.where(iou.max(0) >= threshold, iou.argmax(0), -1)
    forced = greedy_by_hand(iou)
    return np.where(forced >= 0, forced, matches)


def test_matcher_equals_brute_force_and_ignores_padding():
    rng = np.random.default_rng(3)
    iou = rng.random((6, 5, 30)).astype("f4") ** 2
    valid = rng.random((6, 5)) < 0.6
    got = np.array(BoxMatcher(0.5)(ops.convert_to_tensor(iou), ops.convert_to_tensor(valid)))
    for b in range(6):
        want = match_by_hand(iou[b] * valid[b][:, None], 0.5)
        np.testing.assert_array_equal(got[b], want)


def test_without_forced_matches():
    iou = ops.convert_to_tensor(np.array([[[0.4, 0.6]]], "f4"))
    valid = ops.convert_to_tensor([[True]])
    assert np.array(BoxMatcher(0.5, force_match=False)(iou, valid))[0].tolist() == [-1, 0]
    assert np.array(BoxMatcher(0.7, force_match=False)(iou, valid))[0].tolist() == [-1, -1]
    assert np.array(BoxMatcher(0.7)(iou, valid))[0].tolist() == [-1, 0]


@pytest.mark.parametrize("objects", [0, 3])
def test_no_objects(objects):
    """No rows at all, or only padding rows, in every image."""
    boxes, labels = np.zeros((2, objects, 4), "f4"), np.full((2, objects), -1, "i4")
    anchors = AnchorGenerator()((64, 64))
    offsets, classes = encode_targets(
        ops.convert_to_tensor(boxes), ops.convert_to_tensor(labels), anchors, BoxMatcher()
    )
    assert np.array(classes).sum() == 0
    assert np.isfinite(np.array(offsets)).all()


def test_object_far_away_stays_unmatched():
    boxes = np.array([[[1000, 1000, 1010, 1010], [3, 3, 3, 3]]], "f4")
    labels = np.array([[1, 1]], "i4")
    _, classes = encode_targets(
        ops.convert_to_tensor(boxes),
        ops.convert_to_tensor(labels),
        AnchorGenerator()((64, 64)),
        BoxMatcher(),
    )
    assert np.array(classes).max() == 0


def targets_of_case(case, arrays):
    name = case["case"]
    boxes = ops.convert_to_tensor(arrays[f"{name}_truths"][None].astype("f4"))
    labels = arrays[f"{name}_labels"][None].astype("i4")
    anchors = AnchorGenerator(clip=True, bounding_box_format="rel_xyxy")((320, 320))
    if case["mode"] == "arm":
        anchors = decode_boxes(make_array(**case["arm_loc"]), anchors)[None]
    else:
        labels = np.minimum(labels, 0)  # the first stage knows one class
    iou = np.array(pairwise_iou(boxes, anchors))[0]
    offsets, classes = encode_targets(boxes, ops.convert_to_tensor(labels), anchors, BoxMatcher())
    return np.array(offsets)[0], np.array(classes)[0], iou, np.array(boxes)[0], np.array(anchors)


def test_golden_matching():
    cases, arrays = load_cases("matching"), load_arrays("matching")
    compared = 0
    for name, case in cases.items():
        # Ties and the reference's last-one-wins bug have tests of their own.
        if name == "tiny_ties_prior" or name.startswith("shared_best_prior"):
            continue
        offsets, classes, *_ = targets_of_case(case, arrays)
        positives = np.flatnonzero(classes)
        np.testing.assert_array_equal(positives, arrays[f"{name}_pos_index"], err_msg=name)
        want = arrays[f"{name}_pos_class"]
        want = np.ones_like(want) if case["mode"] == "prior" else want
        np.testing.assert_array_equal(classes[positives], want, err_msg=name)
        np.testing.assert_allclose(
            offsets[positives], arrays[f"{name}_pos_loc"], atol=1e-5, err_msg=name
        )
        compared += 1
    assert compared == len(cases) - 3


def test_golden_ties():
    """A box inside several anchors of equal area: any of the equally good ones is right."""
    case = load_cases("matching")["tiny_ties_prior"]
    _, classes, iou, _, _ = targets_of_case(case, load_arrays("matching"))
    positives = np.flatnonzero(classes)
    assert len(positives) == case["num_positives"]
    best = iou.max(axis=1)
    holders = [int(iou[:, a].argmax()) for a in positives]
    assert sorted(holders) == list(range(len(best)))
    np.testing.assert_allclose(
        [iou[g, a] for g, a in zip(holders, positives, strict=True)], best[holders], rtol=1e-5
    )


def test_golden_shared_best_anchor():
    """The reference lets the last object take a shared best anchor and drops the other.

    Here, as in the authors' code, the one with the higher IoU takes it and the other
    its next best, so every object has at least one anchor.
    """
    for name in ("shared_best_prior_prior", "shared_best_prior_arm"):
        case = load_cases("matching")[name]
        offsets, classes, iou, boxes, anchors = targets_of_case(case, load_arrays("matching"))
        anchors = np.broadcast_to(anchors.reshape(-1, 4), (6375, 4))
        want = match_by_hand(iou, 0.5)
        np.testing.assert_array_equal(classes > 0, want >= 0)
        assert set(want[want >= 0]) == set(range(len(boxes)))
        positives = np.flatnonzero(classes)
        expected = encode_boxes(boxes[want[positives]], anchors[positives])
        np.testing.assert_allclose(offsets[positives], np.array(expected), atol=1e-4)
