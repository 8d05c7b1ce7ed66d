"""Matching and average precision of all images at once against pycocotools."""

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from keras_resnest.evaluation import coco_average_precision
from keras_resnest.evaluation.box_table import read_tables
from keras_resnest.evaluation.matching import average_precision


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


def by_pycocotools(truth, found, num_classes):
    """AP by IoU threshold and class, and the twelve metrics."""
    sides = []
    for images in (truth, found):
        rows = [
            (i, image, row) for i, image in enumerate(images) for row in range(len(image["labels"]))
        ]
        annotations = []
        for number, (i, image, row) in enumerate(rows, 1):
            x1, y1, x2, y2 = image["boxes"][row].tolist()
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            box |= {"id": number, "image_id": i, "category_id": int(image["labels"][row])}
            box["iscrowd"] = int(image["iscrowd"][row]) if "iscrowd" in image else 0
            box["score"] = float(image["confidence"][row]) if "confidence" in image else 0.0
            annotations.append(box)
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(len(images))],
            "annotations": annotations,
        }
        coco.dataset["categories"] = [{"id": label} for label in range(num_classes)]
        coco.createIndex()
        sides.append(coco)
    evaluation = COCOeval(*sides, "bbox")
    evaluation.params.imgIds = list(range(len(truth)))
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = np.where(evaluation.stats < 0, np.nan, evaluation.stats)
    return evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=1), metrics


@pytest.mark.parametrize(
    ("num_classes", "objects", "detections"),
    [(1, 9, 30), (3, 9, 40), (1, 6, 150)],
    ids=["one class", "three classes", "more than 100 detections"],
)
def test_average_precision_equals_pycocotools(num_classes, objects, detections):
    truth, found = noisy_detections(12, num_classes, objects, detections)
    precision, metrics = by_pycocotools(truth, found, num_classes)
    ours = coco_average_precision(truth, found, num_classes=num_classes)
    np.testing.assert_array_equal(ours.average_precision, precision)
    np.testing.assert_allclose(list(ours.metrics.values()), metrics, rtol=0, atol=1e-12)
    tables = read_tables(truth, found, num_classes)
    np.testing.assert_array_equal(average_precision(*tables, num_classes), precision)
