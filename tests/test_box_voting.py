"""Suppression and voting against loops; several image sizes merged by one detector."""

import numpy as np
import pytest
import reference
from detectors import CLASS_NAMES, rectangles, small_detector

import keras_resnest as kr
from keras_resnest.boxes.suppression import lower_confidence, suppress_boxes, vote_boxes
from keras_resnest.detection.decoding import DetectionDecoder
from keras_resnest.detection.detect import (
    REFINEDET320_PLUS,
    REFINEDET512_PLUS,
    MultiScaleDetector,
)


def random_rows(n=60, seed=0):
    """Boxes in three clusters, so that many overlap."""
    rng = np.random.default_rng(seed)
    corner = rng.choice([0.0, 40.0, 55.0], (n, 1)) + rng.uniform(0, 8, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(15, 25, (n, 2))], axis=1)
    return {"boxes": boxes, "confidence": rng.uniform(0.01, 1, n), "labels": rng.integers(0, 3, n)}


def vote_by_loops(kept_boxes, kept_labels, boxes, confidence, labels, voting_iou):
    voted = []
    for box, label in zip(kept_boxes, kept_labels, strict=True):
        total, weight = np.zeros(4), 0.0
        for other, c, other_label in zip(boxes, confidence, labels, strict=True):
            if other_label == label and reference.iou(box, other)[0, 0] >= voting_iou:
                total, weight = total + c * other, weight + c
        voted.append(total / weight)
    return np.array(voted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.3, 0.45, 0.7])
def test_suppression_and_voting_equal_loops(seed, threshold):
    rows = random_rows(seed=seed)
    kept = suppress_boxes(**rows, iou_threshold=threshold)
    assert kept.tolist() == reference.suppress(**rows, iou_threshold=threshold)
    assert 3 <= len(kept) < 60
    arguments = rows["boxes"][kept], rows["labels"][kept]
    got = vote_boxes(*arguments, **rows, voting_iou=threshold)
    np.testing.assert_allclose(got, vote_by_loops(*arguments, **rows, voting_iou=threshold))
    assert np.abs(got - arguments[0]).max() > 0.5  # they did move


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_other_suppressions_equal_loops(class_agnostic):
    rows, options = random_rows(), {"iou_threshold": 0.45, "class_agnostic": class_agnostic}
    greedy = suppress_boxes(**rows, **options).tolist()
    diou = suppress_boxes(**rows, **options, suppression="diou").tolist()
    assert greedy == reference.suppress(**rows, **options)
    assert diou == reference.suppress(**rows, **options, suppression="diou") != greedy
    for passes in (None, np.arange(60) // 20):
        loops = {"confidence_threshold": 0.0, "passes": passes}
        chosen, want = reference.soften(**rows, **options, **loops)
        got = lower_confidence(**rows, **options, passes=passes)
        np.testing.assert_allclose(got, want)
        assert len(chosen) > len(diou) and (got < rows["confidence"]).sum() > 10
    chosen, _ = reference.soften(**rows, **options, confidence_threshold=0.0)
    assert suppress_boxes(**rows, **options, suppression="soft").tolist() == chosen


def test_a_single_box_votes_for_itself():
    box = np.array([[3.0, 4.0, 20.0, 30.0]])
    np.testing.assert_allclose(vote_boxes(box, [1], box, [0.3], [1]), box)


def test_duplicates_change_nothing():
    rows = random_rows()
    kept = suppress_boxes(**rows)
    twice = {name: np.concatenate([values, values]) for name, values in rows.items()}
    once = vote_boxes(rows["boxes"][kept], rows["labels"][kept], **rows)
    again = vote_boxes(rows["boxes"][kept], rows["labels"][kept], **twice)
    np.testing.assert_allclose(again, once)
    np.testing.assert_allclose(
        rows["boxes"][kept], twice["boxes"][suppress_boxes(**twice)], err_msg="kept"
    )


def test_padding_rows_are_ignored():
    rows = random_rows()
    padded = {
        "boxes": np.concatenate([rows["boxes"], rows["boxes"] + 1.0]),
        "confidence": np.concatenate([rows["confidence"], np.ones(60)]),
        "labels": np.concatenate([rows["labels"], np.full(60, -1)]),
    }
    kept = suppress_boxes(**rows)
    assert suppress_boxes(**padded).tolist() == kept.tolist()
    arguments = rows["boxes"][kept], rows["labels"][kept]
    np.testing.assert_allclose(vote_boxes(*arguments, **padded), vote_boxes(*arguments, **rows))
    untouched = vote_boxes([[0, 0, 9, 9.0]], [-1], **rows)
    np.testing.assert_array_equal(untouched, [[0, 0, 9, 9]])


def test_classes_do_not_mix():
    """Identical boxes of two classes are both kept; a far more confident rival has no vote."""
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 12.0]])
    confidence, labels = np.array([0.01, 0.99]), np.array([0, 1])
    assert suppress_boxes(boxes, confidence, labels).tolist() == [1, 0]
    np.testing.assert_allclose(vote_boxes(boxes, labels, boxes, confidence, labels), boxes)


def test_nothing_to_merge():
    assert len(suppress_boxes(np.zeros((0, 4)), [], np.zeros(0, int))) == 0
    empty = vote_boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros((0, 4)), [], np.zeros(0, int))
    assert empty.shape == (0, 4)
    flat = [[5, 5, 5, 9.0]]  # without area
    np.testing.assert_array_equal(vote_boxes(flat, [0], flat, [0.5], [0]), flat)
    assert lower_confidence(np.zeros((0, 4)), [], np.zeros(0, int)).shape == (0,)
    assert lower_confidence([[0, 0, 9, 9]] * 2, [0.5, 0.9], [0, -1]).tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match="same number of rows"):
        suppress_boxes([[0, 0, 1, 1]], [0.5, 0.6], [0])
    with pytest.raises(ValueError, match=r"suppression.*'hard'"):
        suppress_boxes([[0, 0, 1, 1]], [0.5], [0], suppression="hard")


# === The detector ===


@pytest.fixture(scope="module")
def detector():
    """A detector with random weights, which finds objects of every class everywhere.

    Clipping changes the IoU of boxes after suppression. Without it, suppressing twice equals
    suppressing once.
    """
    model = small_detector(decoder=DetectionDecoder(clip_to_image=False))
    for weight in model.trainable_weights:  # make predictions vary
        if "odm" in weight.path and weight.path.endswith("kernel"):
            weight.assign(weight * 2.0)
    return model


@pytest.fixture(scope="module")
def both_views(detector):
    """The detector's own size, each image and its mirror image."""
    return MultiScaleDetector(detector, [(64, 128)])


def test_one_size_without_mirror_and_voting_is_the_detector_itself(detector):
    images, _ = rectangles(3, seed=5)
    single = MultiScaleDetector(detector, [(64, 128)], flip=False, voting_iou=None)
    got, want = single.predict_on_batch(images), detector.predict(images, verbose=0)
    np.testing.assert_array_equal(got["num_detections"], want["num_detections"])
    assert want["num_detections"].min() > 10
    np.testing.assert_allclose(got["confidence"], want["confidence"], atol=1e-5)
    np.testing.assert_allclose(got["boxes"], want["boxes"], atol=2e-3)
    own = detector.detect(images[0], confidence_threshold=0.4)
    through = single.detect(images[0], confidence_threshold=0.4)
    np.testing.assert_allclose(through["boxes"], own["boxes"], atol=1e-3)
    assert through["class_names"] == own["class_names"] and len(own["class_names"])


@pytest.mark.parametrize("suppression", ["greedy", "diou", "soft"])
def test_suppresses_as_the_decoder(detector, monkeypatch, suppression):
    """One view gives the decoder's detections; two views suppress each other in the same way."""
    options = {"suppression": suppression, "class_agnostic": True, "clip_to_image": False}
    decoder = DetectionDecoder(confidence_threshold=0.3, iou_threshold=0.2, **options)
    monkeypatch.setattr(detector, "decoder", decoder)
    images, _ = rectangles(2, seed=5)
    want = detector.predict(images, verbose=0)
    options = {"image_sizes": [(64, 128)], "voting_iou": None, "iou_threshold": 0.2}
    got = MultiScaleDetector(detector, **options, flip=False).predict_on_batch(images)
    np.testing.assert_array_equal(got["num_detections"], want["num_detections"])
    np.testing.assert_allclose(got["confidence"], want["confidence"], atol=1e-5)
    np.testing.assert_allclose(got["boxes"], want["boxes"], atol=2e-3)
    both = MultiScaleDetector(detector, **options).predict_on_batch(images)
    for row in range(2):
        boxes = both["boxes"][row, : both["num_detections"][row]]
        confidence = both["confidence"][row, : len(boxes)]
        assert len(boxes) and confidence.dtype == "float32" and (confidence > 0.3).all()
        overlaps = (reference.diou if suppression == "diou" else reference.iou)(boxes, boxes)
        np.fill_diagonal(overlaps, 0)
        assert (overlaps.max() > 0.21) == (suppression == "soft")


def test_a_mirrored_image_gives_mirrored_detections(both_views):
    """The detector sees the same two views of an image and of its mirror image."""
    image = rectangles(1, seed=6)[0][0]
    got, mirror = (
        {k: v[:20] for k, v in both_views.detect(i).items()} for i in (image, image[:, ::-1])
    )
    assert len(got["boxes"]) > 3
    np.testing.assert_allclose(mirror["confidence"], got["confidence"], atol=1e-4)
    boxes = mirror["boxes"].copy()
    boxes[:, [0, 2]] = 128 - boxes[:, [2, 0]]
    np.testing.assert_allclose(boxes, got["boxes"], atol=0.05)


def test_two_sizes_are_two_detectors_merged(detector):
    """Detectors built for each size, with the same weights, merged by brute force."""
    large = small_detector((128, 192, 3), decoder=detector.decoder)
    large.set_weights(detector.get_weights())
    image = rectangles(1, (80, 160, 3), seed=4)[0][0]
    found = [model.detect(image, confidence_threshold=0.0) for model in (detector, large)]
    rows = {k: np.concatenate([f[k] for f in found]) for k in ("boxes", "confidence", "labels")}
    kept = reference.suppress(**rows, iou_threshold=0.45)[:200]
    want = vote_by_loops(rows["boxes"][kept], rows["labels"][kept], **rows, voting_iou=0.5)
    two = MultiScaleDetector(detector, [(64, 128), (128, 192)], flip=False)
    got = two.detect(image, confidence_threshold=0.0)
    assert len(found[0]["boxes"]) and len(found[1]["boxes"])
    np.testing.assert_allclose(got["confidence"], rows["confidence"][kept], atol=1e-5)
    np.testing.assert_allclose(got["boxes"][:50], want[:50], atol=0.01)  # later ones nearly tie


def test_evaluates_like_a_model(detector):
    images, truth = rectangles(4)
    result = kr.evaluation.evaluate_detections(
        MultiScaleDetector(detector, [64, (64, 128)]), [(images, truth)]
    )
    assert result.class_names == tuple(CLASS_NAMES) and 0.0 <= result.mAP <= 1.0


def test_sizes_of_boxes_and_turned_images(detector):
    image = rectangles(1, seed=7)[0][0]
    found = MultiScaleDetector(detector, [(64, 128)], box_sizes=[(25, 30)], voting_iou=None).detect(
        image, confidence_threshold=0.0
    )
    sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
    assert len(sides) and sides.max(axis=1).min() > 25 and sides.min(axis=1).max() < 30
    several = MultiScaleDetector(detector, [(64, 128)], turn_sizes=True)
    assert several._orient_size((64, 128), (300, 200)) == (128, 64)
    assert several._orient_size((64, 128), (200, 300)) == (64, 128)
    assert np.isfinite(several.detect(image.transpose(1, 0, 2), 0.0)["boxes"]).all()


def test_relative_format(detector, both_views):
    relative = small_detector(bounding_box_format="rel_yxyx", decoder=detector.decoder)
    relative.set_weights(detector.get_weights())
    image = rectangles(1, seed=8)[0][0]
    want = both_views.detect(image, 0.4)["boxes"]
    got = MultiScaleDetector(relative, [(64, 128)]).detect(image, 0.4)["boxes"]
    np.testing.assert_allclose(got[:, [1, 0, 3, 2]] * [128, 64, 128, 64], want, atol=1e-2)


def test_published_settings_and_config(detector):
    for options in (REFINEDET320_PLUS, REFINEDET512_PLUS):
        several = MultiScaleDetector(detector, **options)
        again = MultiScaleDetector.from_config(several.get_config())
        config, again = several.get_config(), again.get_config()
        assert {k: v for k, v in again.items() if k != "model"} == {
            k: v for k, v in config.items() if k != "model"
        }
        assert again["model"]["config"]["num_classes"] == 3


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"image_sizes": [(64, 100)]}, "multiples of 64"),
        ({"image_sizes": []}, "image_sizes"),
        ({"image_sizes": 320}, "image_sizes"),
        ({"image_sizes": [64], "box_sizes": [(0, 9), None]}, "box_sizes"),
        ({"image_sizes": [64], "voting_iou": 1.5}, "voting_iou"),
    ],
)
def test_bad_arguments(detector, arguments, word):
    with pytest.raises(ValueError, match=word):
        MultiScaleDetector(detector, **arguments)
