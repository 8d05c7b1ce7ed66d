"""The oracle decomposition against algebra and a loop over all detections."""

import numpy as np
import pytest
import reference

from keras_resnest.evaluation import coco_average_precision, oracle_decomposition

ROWS = ("as it is", "boxes", "classes", "confidence times IoU", "confidence is IoU")
ROWS += ("no duplicates", "no background")


def ap(ground_truth, detections, num_classes=3):
    metrics = oracle_decomposition(ground_truth, detections, num_classes=num_classes).metrics
    return {name: values["AP"] for name, values in metrics.items()}


def grid_truth(num_images=4, num_classes=3, seed=0):
    """Five objects per image that do not touch, at least one of each class."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        corner = np.stack([np.arange(5) * 100.0, rng.uniform(0, 200, 5)], axis=1)
        boxes = np.concatenate([corner, corner + rng.uniform(40, 80, (5, 2))], axis=1)
        images.append({"boxes": boxes, "labels": rng.permutation(5) % num_classes})
    return images


def found_as(ground_truth, seed=1):
    """The truth as detections of random confidence."""
    rng = np.random.default_rng(seed)
    return [{**image, "confidence": rng.random(len(image["labels"]))} for image in ground_truth]


def shifted(boxes, part):
    return boxes + part * (boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]] * [1, 0, 1, 0]


# === Algebra ===


def test_perfect_detections_stay_perfect():
    truth = grid_truth()
    result = oracle_decomposition(truth, found_as(truth), ["a", "b", "c"])
    assert tuple(result.metrics) == ROWS
    assert all(value == 1.0 for row in result.metrics.values() for value in row.values())
    assert result.most_confident_iou == result.best_iou == 1.0
    lines = str(result).splitlines()
    assert lines[0].split() == ["replaced", "AP", "AP50", "AP75"]
    assert lines[1].split() == ["as", "it", "is", "1.0000", "1.0000", "1.0000"]
    assert len(lines) == 2 + len(ROWS) and lines[-1].count("1.0000") == 2


def test_shifted_boxes():
    """Shifted by a fifth, the IoU is 0.8 / 1.2."""
    truth = grid_truth()
    found = [{**image, "boxes": shifted(image["boxes"], 0.2)} for image in found_as(truth)]
    result = oracle_decomposition(truth, found, num_classes=3)
    assert {name: row["AP"] for name, row in result.metrics.items()} == pytest.approx(
        {**dict.fromkeys(ROWS, 0.4), "boxes": 1.0}  # 0.50, 0.55, 0.60, 0.65 of ten thresholds
    )
    assert result.metrics["as it is"] == pytest.approx({"AP": 0.4, "AP50": 1.0, "AP75": 0.0})
    assert result.best_iou == pytest.approx(2 / 3)


def test_swapped_classes():
    truth = grid_truth()
    found = [{**image, "labels": (image["labels"] + 1) % 3} for image in found_as(truth)]
    assert ap(truth, found) == {**dict.fromkeys(ROWS, 0.0), "classes": 1.0}
    # An object of the own class with the same IoU wins: both classes stay right.
    twice = [{"boxes": np.repeat(t["boxes"], 2, 0), "labels": [0, 1] * 5} for t in truth]
    assert ap(twice, found_as(twice), 2)["classes"] == 1.0


def test_threshold_of_boxes_is_exclusive_and_of_classes_inclusive():
    truth = [{"boxes": [[0, 0, 10, 10]], "labels": [0]}]
    half = {"boxes": [[0, 0, 10, 5]], "confidence": [0.9]}
    assert ap(truth, [{**half, "labels": [0]}])["boxes"] == pytest.approx(0.1)
    assert ap(truth, [{**half, "labels": [1]}])["classes"] == pytest.approx(0.1)


def test_confidence_is_iou_orders_duplicates():
    """Perfect boxes of random confidence and worse duplicates that are surer."""
    truth = grid_truth()
    perfect = found_as(truth)
    found = [
        {
            "boxes": np.concatenate([image["boxes"], shifted(image["boxes"], 0.2)]),
            "labels": np.tile(image["labels"], 2),
            "confidence": np.append(image["confidence"], image["confidence"] + 0.5),
        }
        for image in perfect
    ]
    values = ap(truth, found)
    assert values["as it is"] < 0.7
    assert values["confidence is IoU"] == 1.0
    assert values["no duplicates"] == pytest.approx(0.4)
    result = oracle_decomposition(truth, found, num_classes=3)
    assert result.best_iou == 1.0 and result.most_confident_iou == pytest.approx(2 / 3)


def test_background_and_images_without_objects():
    truth = [*grid_truth(2), {"boxes": [], "labels": []}]
    found = found_as(truth)
    found[2] = {"boxes": [[0, 0, 50, 50]] * 9, "labels": [0, 1, 2] * 3, "confidence": [2.0] * 9}
    values = ap(truth, found)
    assert values["as it is"] == values["boxes"] == values["classes"] < 0.9
    assert values["no background"] == values["confidence is IoU"] == 1.0
    assert values["confidence times IoU"] == 1.0


def test_crowds_are_ignored_and_difficult_objects_count():
    truth = grid_truth(2)
    crowd = {"boxes": [[0, 400, 300, 500]], "labels": [0], "iscrowd": [True]}
    inside = {"boxes": [[10, 410, 60, 460]] * 3, "labels": [0] * 3, "confidence": [3.0] * 3}

    def joined(image, other):
        return {k: np.concatenate([image[k], other[k]]) for k in image}

    with_crowd = [
        joined({**image, "iscrowd": np.zeros(5, bool), "difficult": np.ones(5, bool)}, other)
        for image, other in zip(truth, [{**crowd, "difficult": [False]}] * 2, strict=True)
    ]
    found = [joined(image, inside) for image in found_as(truth)]
    assert ap(truth, found)["as it is"] < 0.9
    assert ap(with_crowd, found) == dict.fromkeys(ROWS, 1.0)
    result = oracle_decomposition(with_crowd, found, num_classes=3)
    assert result.best_iou == 1.0


def test_nothing_to_compare():
    truth = grid_truth(1)
    nothing = {"boxes": [], "labels": [], "confidence": []}
    result = oracle_decomposition(truth, [nothing], num_classes=4)
    assert {name: row["AP"] for name, row in result.metrics.items()} == dict.fromkeys(ROWS, 0.0)
    assert np.isnan(result.average_precision["boxes"][:, 3]).all()
    assert np.isnan(result.best_iou) and np.isnan(result.most_confident_iou)
    for found in (found_as(truth)[0], nothing):
        values = ap([{"boxes": [], "labels": []}], [found])
        assert all(np.isnan(value) for value in values.values())
    assert all(np.isnan(value) for value in ap([], []).values())
    with pytest.raises(ValueError, match="1 and 2 images"):
        oracle_decomposition(truth, [nothing] * 2, num_classes=3)


# === Brute force ===


def replaced_one_by_one(truth, found):
    """Detections with each replacement, and both mean IoUs, by a loop."""
    rows = {name: [] for name in ROWS}
    sure, best = [], []
    for objects, image in zip(truth, found, strict=True):
        new = {name: [] for name in ROWS}
        own_of_object = {}
        order = sorted(range(len(image["labels"])), key=lambda i: -image["confidence"][i])
        for i in order:
            box, label, confidence = (image[k][i] for k in ("boxes", "labels", "confidence"))
            ious = reference.iou(box, objects["boxes"])[0]
            own = {j: v for j, v in enumerate(ious) if objects["labels"][j] == label}
            nearest = max(own, key=own.get, default=None)
            iou = own.get(nearest, 0.0)
            any_nearest = int(np.argmax(ious)) if len(ious) else None
            same = (box, label, confidence)
            new["as it is"].append(same)
            snapped = objects["boxes"][nearest] if iou > 0.5 else box
            new["boxes"].append((snapped, label, confidence))
            right = any_nearest is not None and ious[any_nearest] >= 0.5
            true_label = objects["labels"][any_nearest] if right else label
            new["classes"].append((box, true_label, confidence))
            new["confidence times IoU"].append((box, label, confidence * iou))
            new["confidence is IoU"].append((box, label, iou))
            if iou <= 0.5 or nearest not in own_of_object:
                new["no duplicates"].append(same)
            if max(ious, default=0.0) >= 0.1:
                new["no background"].append(same)
            if iou > 0.5:
                own_of_object.setdefault(nearest, []).append(iou)
        for name, values in new.items():
            columns = zip(*values, strict=True) if values else ((), (), ())
            keys = ("boxes", "labels", "confidence")
            rows[name].append(dict(zip(keys, map(np.array, columns), strict=True)))
        sure += [values[0] for values in own_of_object.values()]
        best += [max(values) for values in own_of_object.values()]
    return rows, np.mean(sure), np.mean(best)


@pytest.mark.parametrize(("seed", "num_classes"), [(0, 1), (1, 3), (2, 5)])
def test_brute_force(seed, num_classes):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for count in rng.integers(0, 7, 12):
        corner = rng.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, 60, (count, 2))], axis=1)
        labels = rng.integers(0, num_classes, count)
        truth.append({"boxes": boxes, "labels": labels})
        near = np.repeat(boxes, 3, axis=0) + rng.uniform(-8, 8, (3 * count, 4))
        far = rng.uniform(0, 60, (4, 2))
        near = np.concatenate([near, np.concatenate([far, far + 30], axis=1)])
        wrong = rng.random(len(near)) < 0.3
        guess = np.append(np.repeat(labels, 3), rng.integers(0, num_classes, 4))
        guess[wrong] = rng.integers(0, num_classes, wrong.sum())
        found.append({"boxes": near, "labels": guess, "confidence": rng.random(len(near))})
    result = oracle_decomposition(truth, found, num_classes=num_classes)
    expected, sure, best = replaced_one_by_one(truth, found)
    assert (result.most_confident_iou, result.best_iou) == pytest.approx((sure, best))
    for name, detections in expected.items():
        coco = coco_average_precision(truth, detections, num_classes=num_classes)
        np.testing.assert_array_equal(result.average_precision[name], coco.average_precision)
        metrics = {key: coco.metrics[key] for key in ("AP", "AP50", "AP75")}
        assert result.metrics[name] == pytest.approx(metrics, abs=1e-12)
    # Each replacement changes something; one class is always right.
    values = [row["AP"] for row in result.metrics.values()]
    assert len(set(values)) >= len(values) - (num_classes == 1)
