"""Matching and average precision of all images at once against pycocotools."""

import numpy as np
import pytest

from keras_resnest.evaluation import coco_average_precision
from keras_resnest.evaluation.box_table import read_tables
from keras_resnest.evaluation.matching import average_precision
from keras_resnest.evaluation.voc import nan_mean

SIZES = {"": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


def noisy_detections(num_images, num_classes, objects, detections, seed=0):
    """Objects of all sizes, and detections near them or anywhere, many with equal confidence."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for count in rng.integers(0, objects + 1, num_images):
        sides = np.exp(rng.uniform(np.log(10), np.log(150), (count, 2)))
        corner = rng.uniform(0, 320 - sides)
        boxes, labels = np.hstack([corner, corner + sides]), rng.integers(0, num_classes, count)
        near = rng.integers(0, count, detections) if count else np.zeros(0, int)
        corner = rng.uniform(0, 280, (detections // 3, 2))
        far = np.hstack([corner, corner + rng.uniform(8, 90, corner.shape)])
        moved = boxes[near] + rng.normal(0, 5, (len(near), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        guess = np.append(labels[near], rng.integers(0, num_classes, len(far)))
        wrong = rng.random(len(guess)) < 0.2
        guess[wrong] = rng.integers(0, num_classes, wrong.sum())
        confidence = rng.random(len(guess)).round(2)
        truth.append({"boxes": boxes, "labels": labels, "iscrowd": rng.random(count) < 0.1})
        found.append({"boxes": np.vstack([moved, far]), "labels": guess, "confidence": confidence})
    return truth, found


@pytest.mark.parametrize(
    ("num_classes", "objects", "detections"),
    [(1, 9, 30), (3, 9, 40), (1, 6, 150)],
    ids=["one class", "three classes", "more than 100 detections"],
)
def test_average_precision_equals_pycocotools(num_classes, objects, detections):
    truth, found = noisy_detections(12, num_classes, objects, detections)
    expected = coco_average_precision(truth, found, num_classes=num_classes)
    tables = read_tables(truth, found, num_classes)
    ours = average_precision(*tables, num_classes)
    np.testing.assert_array_equal(ours, expected.average_precision)
    for name, area in SIZES.items():
        got = nan_mean(average_precision(*tables, num_classes, area=area))
        assert got == pytest.approx(expected.metrics[f"AP{name}"], abs=1e-12, nan_ok=True)
