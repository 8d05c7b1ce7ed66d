"""Matching and training targets against brute force and the reference."""

import functools

import keras
import numpy as np
import pytest
import reference
from golden.recipe import make_array
from golden_data import load_arrays, load_cases
from keras import ops

from keras_resnest.boxes.anchors import AnchorGenerator
from keras_resnest.boxes.matching import CHUNK_SIZE, ATSSMatcher, BoxMatcher
from keras_resnest.boxes.offsets import decode_boxes, encode_boxes
from keras_resnest.boxes.overlap import pairwise_iou
from keras_resnest.detection.loss import assign_targets

ANCHORS = AnchorGenerator()((64, 64))


@functools.cache
def compiled_matcher(iou_threshold, force_match, anchor_rank):
    """The matcher in a graph that knows no size; on JAX and PyTorch, the matcher itself."""
    matcher = BoxMatcher(iou_threshold, force_match)
    if keras.backend.backend() != "tensorflow":
        return matcher
    import tensorflow as tf

    shapes = ([None, None, 4], [None, None], [None] * (anchor_rank - 1) + [4])
    dtypes = ("float32", "bool", "float32")
    specs = [tf.TensorSpec(*spec) for spec in zip(shapes, dtypes, strict=True)]
    return tf.function(matcher.__call__, specs)


def match(boxes, anchors, valid=None, iou_threshold=0.5, force_match=True):
    """Object of each anchor as the package finds it, (batch, anchors)."""
    valid = np.ones(np.shape(boxes)[:2], bool) if valid is None else valid
    boxes, valid, anchors = (ops.convert_to_tensor(x) for x in (boxes, valid, anchors))
    matcher = compiled_matcher(iou_threshold, force_match, len(anchors.shape))
    return ops.convert_to_numpy(matcher(boxes, valid, anchors))


def assert_equals_brute_force(boxes, anchors, valid=None, iou_threshold=0.5, force_match=True):
    got = match(boxes, anchors, valid, iou_threshold, force_match)
    iou = pairwise_iou(boxes, anchors)  # rounded as in the package, so that ties are the same
    for i in range(len(boxes)):
        rows = True if valid is None else valid[i]
        want = reference.match(iou[i], rows, iou_threshold, force_match)
        np.testing.assert_array_equal(got[i], want)
    return got


def boxes_in_strips(lengths, height=1.0):
    """Boxes of given lengths that start at 0: they overlap in proportion to their lengths."""
    lengths = np.asarray(lengths, "f4")
    zeros = np.zeros_like(lengths)
    return np.stack([zeros, zeros, lengths, zeros + height], axis=-1)


def random_boxes(rng, *shape, corners=60, sides=(4, 50)):
    """Boxes of whole pixels; few different `corners` and `sides` give many equal IoUs."""
    corner = rng.integers(0, corners, (*shape, 2))
    return np.concatenate([corner, corner + rng.integers(*sides, (*shape, 2))], -1).astype("f4")


@pytest.mark.parametrize("objects, anchors", [(1, 20), (6, 8), (12, 9), (40, 60)])
@pytest.mark.parametrize("force_match", [True, False])
def test_equals_brute_force(objects, anchors, force_match):
    rng = np.random.default_rng(objects)
    boxes, anchors = random_boxes(rng, 20, objects), random_boxes(rng, 20, anchors)
    got = assert_equals_brute_force(boxes, anchors, force_match=force_match)
    assert got.max() >= 0


@pytest.mark.parametrize("corners", [1, 2, 4])
def test_ties_go_to_the_first_object_and_its_first_anchor(corners):
    """Few different boxes, so that nearly every choice is one between equals."""
    rng = np.random.default_rng(corners)
    boxes, anchors = (
        random_boxes(rng, 12, count, corners=corners, sides=(1, 4)) for count in (25, 40)
    )
    assert_equals_brute_force(boxes, anchors)


def test_duplicated_boxes_get_different_anchors():
    boxes, anchors = boxes_in_strips([10, 10, 10]), boxes_in_strips([9, 5, 3, 0])
    assert match(boxes[None], anchors, iou_threshold=0.95)[0].tolist() == [0, 1, 2, -1]


def test_many_objects_that_want_the_same_anchors():
    """All objects prefer the same anchors, in the same order: all but one lose, every time."""
    objects = 3 * CHUNK_SIZE
    boxes = boxes_in_strips(np.random.default_rng(0).uniform(99, 100, (2, objects)))
    anchors = boxes_in_strips(np.linspace(95, 10, objects + 10))
    got = assert_equals_brute_force(boxes, anchors, iou_threshold=1.0)
    assert ((got >= 0).sum(axis=1) == objects).all()


@pytest.mark.parametrize("objects", [0, 1, CHUNK_SIZE, 40])
@pytest.mark.parametrize("per_image", [False, True])
def test_regular_and_refined_anchors(objects, per_image):
    """Duplicates, boxes without area and padding between them, in one chunk or several."""
    rng = np.random.default_rng(objects)
    boxes = rng.uniform(0, 60, (3, objects, 4)).astype("f4")
    boxes[..., 2:] = boxes[..., :2] + rng.choice([0.0, 0.5, 20.0, 50.0], (3, objects, 2))
    boxes[:, 1::3] = boxes[:, : len(boxes[0, 1::3])]
    anchors = ANCHORS
    if per_image:
        anchors = anchors + rng.normal(0, 2, (3, *anchors.shape)).astype("f4")
    assert_equals_brute_force(boxes, anchors, valid=rng.random((3, objects)) < 0.8)


def test_more_objects_than_anchors():
    boxes = boxes_in_strips([2, 8, 5])
    assert match(boxes[None], boxes_in_strips([10]))[0].tolist() == [1]


def test_threshold():
    box, anchors = boxes_in_strips([[10]]), boxes_in_strips([4, 6])
    assert match(box, anchors, iou_threshold=0.5, force_match=False)[0].tolist() == [-1, 0]
    assert match(box, anchors, iou_threshold=0.7, force_match=False)[0].tolist() == [-1, -1]
    assert match(box, anchors, iou_threshold=0.7)[0].tolist() == [-1, 0]


def test_infinite_boxes():
    """No IoU is NaN, which no anchor would prefer to another: the search would never end."""
    boxes = np.array([[[0, 0, np.inf, np.inf], [0, 0, 9, 9]]], "f4")
    anchors = np.array([[0, 0, np.inf, np.inf], [0, 0, 9, 9], [np.nan] * 4], "f4")
    assert not np.isnan(np.array(pairwise_iou(ops.convert_to_tensor(boxes), anchors))).any()
    assert match(boxes, anchors)[0].tolist() == [0, 1, -1]


@pytest.mark.parametrize("objects", [0, 3])
def test_no_objects(objects):
    """No rows at all, or only padding rows, in every image."""
    boxes, labels = np.zeros((2, objects, 4), "f4"), np.full((2, objects), -1, "i4")
    boxes, labels = ops.convert_to_tensor(boxes), ops.convert_to_tensor(labels)
    targets, classes = assign_targets(boxes, labels, ANCHORS, BoxMatcher())
    assert np.array(classes).sum() == 0
    np.testing.assert_array_equal(np.array(targets), np.broadcast_to(ANCHORS, targets.shape))


def test_object_far_away_stays_unmatched():
    boxes = np.array([[[1000, 1000, 1010, 1010], [3, 3, 3, 3]]], "f4")
    boxes, labels = ops.convert_to_tensor(boxes), ops.convert_to_tensor([[1, 1]])
    _, classes = assign_targets(boxes, labels, ANCHORS, BoxMatcher())
    assert np.array(classes).max() == 0


def targets_of_case(case, arrays):
    name = case["case"]
    boxes = ops.convert_to_tensor(arrays[f"{name}_truths"][None].astype("f4"))
    labels = arrays[f"{name}_labels"][None].astype("i4")
    anchors = AnchorGenerator(clip=True)((320, 320)) / 320
    if case["mode"] == "arm":
        anchors = decode_boxes(make_array(**case["arm_loc"]), anchors)[None]
    else:
        labels = np.minimum(labels, 0)  # the first stage knows one class
    iou = np.array(pairwise_iou(boxes, anchors))[0]
    targets, classes = assign_targets(boxes, ops.convert_to_tensor(labels), anchors, BoxMatcher())
    offsets = encode_boxes(targets, anchors)
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
        want = reference.match(iou)
        np.testing.assert_array_equal(classes > 0, want >= 0)
        assert set(want[want >= 0]) == set(range(len(boxes)))
        positives = np.flatnonzero(classes)
        expected = encode_boxes(boxes[want[positives]], anchors[positives])
        np.testing.assert_allclose(offsets[positives], np.array(expected), atol=1e-4)


def atss_by_hand(boxes, valid, anchors, level_sizes, num_candidates):
    """ATSS (arXiv 1912.02424, algorithm 1) of one image, as a loop over objects and levels."""
    centers = reference.centers_and_sizes(anchors)[0]
    best = {}  # anchor: (IoU, -object)
    for i in np.flatnonzero(valid):
        distance = ((centers - reference.centers_and_sizes(boxes[i])[0]) ** 2).sum(-1)
        candidates, start = [], 0
        for size in level_sizes:
            level = start + np.argsort(distance[start : start + size], kind="stable")
            candidates += level[:num_candidates].tolist()
            start += size
        iou = reference.iou(boxes[i], anchors[candidates])[0]
        threshold = iou.mean() + iou.std(ddof=1)
        for anchor, value in zip(candidates, iou, strict=True):
            inside = (centers[anchor] > boxes[i, :2]).all() & (centers[anchor] < boxes[i, 2:]).all()
            if value > 0 and (value == iou.max() or (inside and value >= threshold)):
                best[anchor] = max(best.get(anchor, (0, 0)), (value, -i))
    return [-best[a][1] if a in best else -1 for a in range(len(anchors))]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("num_candidates", [5, 27])
def test_atss_equals_brute_force(per_image, num_candidates):
    """More candidates than the upper levels have anchors; padding between objects."""
    rng = np.random.default_rng(num_candidates)
    boxes = rng.uniform(-10, 100, (3, 6, 4)).astype("f4")
    boxes[..., 2:] = boxes[..., :2] + rng.uniform(2, 90, (3, 6, 2))
    valid = rng.random((3, 6)) < 0.7
    generator = AnchorGenerator()
    anchors, level_sizes = generator((64, 128)), generator.level_sizes((64, 128))
    assert sum(level_sizes) == len(anchors)
    # Without ties between distances, which are broken differently on PyTorch.
    anchors = anchors + rng.normal(0, 1, anchors.shape).astype("f4")
    if per_image:
        anchors = anchors + rng.normal(0, 2, (3, *anchors.shape)).astype("f4")
    matcher = ATSSMatcher(num_candidates)
    got = np.array(matcher(*map(ops.convert_to_tensor, (boxes, valid, anchors)), level_sizes))
    for i in range(3):
        own = anchors[i] if per_image else anchors
        want = atss_by_hand(boxes[i], valid[i], own, level_sizes, num_candidates)
        assert got[i].tolist() == want
    assert (got >= 0).any(axis=1).all()


def test_atss_of_odd_boxes():
    """No objects, objects without area, tiny ones between the centers, infinite ones."""
    generator = AnchorGenerator()
    anchors, sizes = generator((64, 64)), generator.level_sizes((64, 64))
    nothing = ATSSMatcher()(ops.zeros((2, 0, 4)), ops.zeros((2, 0), "bool"), anchors, sizes)
    assert (np.array(nothing) == -1).all()
    odd = np.array([[[3, 3, 3, 3], [9, 9, 11, 11], [0, 0, np.inf, np.inf], [99, 99, 98, 98]]], "f4")
    got = np.array(ATSSMatcher()(odd, np.ones((1, 4), bool), anchors, sizes))[0]
    assert set(got[got >= 0]) == {1}
    with pytest.raises(ValueError, match="num_candidates"):
        ATSSMatcher(0)
