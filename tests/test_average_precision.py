"""Average precision against published numbers, pycocotools and a naive implementation."""

import numpy as np
import pytest
import reference
from golden_data import average_precision_case

from keras_resnest.evaluation import coco_average_precision, voc_average_precision

VOC_CASES = ["voc_padilla_sample2", "voc_cartucho_example", "voc_difficult_bccd"]


def voc_images(case):
    """The lists of a golden case as one dictionary per image, and the class names."""
    rows = case["ground_truth"] + case["detections"]
    names = sorted({row["class"] for row in rows})
    # Images in the order of the detections, which decides between equal confidences.
    images = list(dict.fromkeys(row["image"] for row in case["detections"] + case["ground_truth"]))

    def group(rows, keys):
        grouped = []
        for image in images:
            own = [row for row in rows if row["image"] == image]
            columns = {ours: np.array([row[theirs] for row in own]) for ours, theirs in keys}
            columns["labels"] = np.array([names.index(row["class"]) for row in own], "int32")
            grouped.append(columns)
        return grouped

    ground_truth = group(case["ground_truth"], [("boxes", "box"), ("difficult", "difficult")])
    detections = group(case["detections"], [("boxes", "box"), ("confidence", "score")])
    return ground_truth, detections, names


@pytest.mark.parametrize("name", VOC_CASES)
@pytest.mark.parametrize("interpolation", ["every_point", "eleven_point"])
@pytest.mark.parametrize("convention", ["plus_one", "continuous"])
def test_golden_voc(name, interpolation, convention):
    case = average_precision_case(name)
    ground_truth, detections, names = voc_images(case)
    result = voc_average_precision(
        ground_truth,
        detections,
        names,
        iou_threshold=case["iou"],
        interpolation=interpolation,
        plus_one=convention == "plus_one",
    )
    for threshold in case["iou"]:
        expected = case["expected"][str(threshold)][convention]
        at = result.at(threshold)
        assert at.mAP == pytest.approx(expected[f"mAP_{interpolation}"], abs=1e-12)
        per_class = at.per_class()
        for class_name, numbers in expected["per_class"].items():
            ours = per_class[class_name]
            assert ours["num_objects"] == numbers["npos"]
            assert ours["true_positives"] == numbers["tp"]
            assert ours["false_positives"] == numbers["fp"]
            wanted = numbers[f"ap_{interpolation}"]
            if wanted is None:
                assert ours["average_precision"] is None
            else:
                assert ours["average_precision"] == pytest.approx(wanted, abs=1e-12)
        for class_name in set(names) - set(expected["per_class"]):
            assert per_class[class_name]["average_precision"] is None


def test_published_figures():
    """What the sources print, to the digits they print."""
    ground_truth, detections, names = voc_images(average_precision_case("voc_padilla_sample2"))
    options = {"class_names": names, "iou_threshold": 0.3, "plus_one": True}
    assert round(voc_average_precision(ground_truth, detections, **options).mAP, 4) == 0.2457
    eleven = voc_average_precision(
        ground_truth, detections, interpolation="eleven_point", **options
    )
    assert round(eleven.mAP, 4) == 0.2684

    case = average_precision_case("voc_cartucho_example")
    ground_truth, detections, names = voc_images(case)
    result = voc_average_precision(ground_truth, detections, names, plus_one=True)
    assert round(100 * result.mAP, 2) == case["published"]["mAP_percent"]
    for name, percent in case["published"]["every_point_percent"].items():
        assert round(100 * result.per_class()[name]["average_precision"], 2) == percent


# --- A second implementation ---------------------------------------------------------------


def random_images(rng, num_images, num_classes, most=6, difficult=0.2, digits=1):
    """Random objects and jittered, doubled, confused and free detections; many ties."""
    ground_truth, detections = [], []
    for _ in range(num_images):
        count = rng.integers(0, most)
        corner, size = rng.uniform(0, 60, (count, 2)), rng.uniform(5, 50, (count, 2))
        boxes = np.concatenate([corner, corner + size], axis=1).round()
        boxes = np.concatenate([boxes, boxes[:1]])  # two objects in the same place
        labels = rng.integers(0, num_classes, len(boxes))
        ground_truth.append(
            {"boxes": boxes, "labels": labels, "difficult": rng.random(len(boxes)) < difficult}
        )
        chosen = rng.integers(0, len(boxes), 2 * len(boxes)) if len(boxes) else []
        found = boxes[chosen] + rng.integers(-4, 5, (len(chosen), 4))
        found = np.concatenate([np.sort(found.reshape(-1, 2, 2), axis=1).reshape(-1, 4), boxes])
        own = np.concatenate([labels[chosen], labels])
        confused = rng.random(len(own)) < 0.2
        own = np.where(confused, rng.integers(0, num_classes, len(own)), own)
        confidence = rng.random(len(found)).round(digits)
        detections.append({"boxes": found, "labels": own, "confidence": confidence})
    return ground_truth, detections


@pytest.mark.parametrize("interpolation", ["every_point", "eleven_point"])
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_naive_implementation(monkeypatch, interpolation, seed):
    # Few pairs at once, to test the chunks too.
    monkeypatch.setattr("keras_resnest.evaluation.voc.MAX_PAIRS", 37)
    ground_truth, detections = random_images(np.random.default_rng(seed), 25, 4)
    thresholds = [0.1, 0.5, 0.75, 1.0]
    result = voc_average_precision(
        ground_truth,
        detections,
        num_classes=5,  # the last class has no objects
        iou_threshold=thresholds,
        interpolation=interpolation,
    )
    for threshold in thresholds:
        defined = []
        for label, ours in enumerate(result.per_class(threshold).values()):
            average_precision, tp, fp = reference.average_precision(
                ground_truth, detections, label, threshold, interpolation
            )
            assert (ours["true_positives"], ours["false_positives"]) == (tp, fp)
            assert ours["average_precision"] == pytest.approx(average_precision, abs=1e-12)
            defined += [] if average_precision is None else [average_precision]
        assert result.at(threshold).mAP == pytest.approx(np.mean(defined), abs=1e-12)
    assert result.mAP == pytest.approx(np.mean([result.at(t).mAP for t in thresholds]))


def test_rules_one_by_one():
    def measure(truth, boxes, confidence, **options):
        found = {"boxes": boxes, "labels": [0] * len(boxes), "confidence": confidence}
        result = voc_average_precision([truth], [found], num_classes=1, **options)
        return tuple(result.per_class()["0"].values())

    one = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    # An IoU of exactly the threshold is enough.
    assert measure(one, [[0, 0, 10, 5]], [0.5]) == (1.0, 1, 1, 0)
    # The second detection of an object is wrong, also where it overlaps more.
    assert measure(one, [[0, 0, 10, 10], [0, 0, 10, 8]], [0.4, 0.6]) == (1.0, 1, 1, 1)
    # No second-best object: both detections prefer the left one.
    two = {"boxes": [[0, 0, 10, 10], [0, 0, 10, 9]], "labels": [0, 0]}
    assert measure(two, [[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8]) == (0.5, 2, 1, 1)
    # Detections of a difficult object count neither way, however many there are.
    hard = {**two, "boxes": [[0, 0, 10, 10], [50, 50, 60, 60]], "difficult": [True, False]}
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]
    assert measure(hard, boxes, [0.9, 0.8, 0.7]) == (1.0, 1, 1, 0)
    # Nothing found; nothing to find.
    assert measure(one, [], []) == (0.0, 1, 0, 0)
    assert measure({"boxes": [], "labels": []}, [[0, 0, 1, 1]], [0.5]) == (None, 0, 0, 1)


def test_curve_and_table():
    truth = [{"boxes": [[0, 0, 10, 10], [20, 0, 30, 10]], "labels": [0, 0]}]
    found = {
        "boxes": [[20, 0, 30, 10], [50, 50, 60, 60], [0, 0, 10, 10]],
        "labels": [0, 0, 0],
        "confidence": [0.5, 0.7, 0.9],
    }
    result = voc_average_precision(truth, [found], class_names=["cell", "dust"])
    curve = result.curve("cell")
    np.testing.assert_allclose(curve["confidence"], [0.9, 0.7, 0.5])
    np.testing.assert_allclose(curve["recall"], [0.5, 0.5, 1.0])
    np.testing.assert_allclose(curve["precision"], [1.0, 1 / 2, 2 / 3])
    assert result.mAP == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert result.curve("dust")["recall"].shape == (0,)
    lines = str(result).splitlines()
    assert lines[1].split() == ["cell", "2", "2", "1", "0.8333"]
    assert lines[2].split() == ["dust", "0", "0", "0", "-"]
    assert lines[3].split() == ["mAP", "2", "2", "1", "0.8333"]
    with pytest.raises(ValueError, match=r"class_name.*'dog'"):
        result.curve("dog")
    with pytest.raises(ValueError, match=r"iou_threshold.*0\.75"):
        result.at(0.75)


def test_padded_batch_equals_lists():
    """The result of `predict` can be passed directly; only the label marks padding."""
    ground_truth, detections = random_images(np.random.default_rng(3), 8, 3)

    def pad(images, fill):
        most = max(len(p["labels"]) for p in images) + 2
        padded = {}
        for name, first in images[0].items():
            rows = np.full((len(images), most, *first.shape[1:]), fill, first.dtype)
            if name == "labels":
                rows[:] = -1
            for row, image in zip(rows, images, strict=True):
                row[: len(image[name])] = image[name]
            padded[name] = rows
        return padded

    wanted = voc_average_precision(ground_truth, detections, num_classes=3)
    padded = pad(detections, -1) | {"num_detections": [len(d["labels"]) for d in detections]}
    for fill in (0, -1, 7):
        result = voc_average_precision(pad(ground_truth, fill), padded, num_classes=3)
        np.testing.assert_array_equal(result.average_precision, wanted.average_precision)
        np.testing.assert_array_equal(result.false_positives, wanted.false_positives)


def test_many_images():
    """1000 images with 100 detections of 20 classes."""
    rng = np.random.default_rng(0)
    ground_truth, detections = [], []
    for _ in range(1000):
        corner, size = rng.uniform(0, 400, (105, 2)), rng.uniform(10, 100, (105, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        labels = rng.integers(0, 20, 105)
        ground_truth.append({"boxes": boxes[:5], "labels": labels[:5]})
        detections.append({"boxes": boxes[5:], "labels": labels[5:], "confidence": rng.random(100)})
    result = voc_average_precision(ground_truth, detections, num_classes=20)
    assert result.num_objects.sum() == 5000


# --- COCO ----------------------------------------------------------------------------------


def coco_images(case):
    ids = [image["id"] for image in case["ground_truth"]["images"]]
    categories = [category["id"] for category in case["ground_truth"]["categories"]]
    names = [category["name"] for category in case["ground_truth"]["categories"]]

    def group(rows, extra):
        images = []
        for image in ids:
            own = [row for row in rows if row["image_id"] == image]
            x, y, width, height = np.array([row["bbox"] for row in own]).reshape(-1, 4).T
            columns = {ours: [row[theirs] for row in own] for ours, theirs in extra.items()}
            columns["boxes"] = np.stack([x, y, x + width, y + height], axis=1)
            labels = [categories.index(row["category_id"]) for row in own]
            columns["labels"] = np.array(labels, "int32")
            images.append(columns)
        return images

    annotations = case["ground_truth"]["annotations"]
    ground_truth = group(annotations, {"iscrowd": "iscrowd", "area": "area"})
    return ground_truth, group(case["detections"], {"confidence": "score"}), names


def test_golden_coco(capfd):
    case = average_precision_case("coco_bccd_jitter")
    ground_truth, detections, names = coco_images(case)
    result = coco_average_precision(ground_truth, detections, names)
    assert capfd.readouterr().out == ""
    assert list(result.metrics) == list(case["expected"])
    assert result.metrics == pytest.approx(case["expected"], abs=1e-9)
    expected = case["expected_per_category_AP"]
    assert {n for n, v in expected.items() if v is None} == {
        n for n, v in result.per_class().items() if v is None
    }
    assert {n: v for n, v in result.per_class().items() if v is not None} == pytest.approx(
        {n: v for n, v in expected.items() if v is not None}, abs=1e-9
    )
    per_iou = np.nanmean(result.average_precision, axis=1)
    for threshold, value in zip(result.iou_thresholds, per_iou, strict=True):
        assert value == pytest.approx(case["expected_per_iou_AP"][f"{threshold:.2f}"], abs=1e-9)
    # Without `area` that of the box counts, which is the same here.
    for image in ground_truth:
        del image["area"]
    again = coco_average_precision(ground_truth, detections, names).metrics
    assert again == pytest.approx(result.metrics, abs=1e-12)
    # Without `iscrowd` the note of the case gives this number.
    for image in ground_truth:
        del image["iscrowd"]
    plain = coco_average_precision(ground_truth, detections, names).metrics
    assert plain["AP"] == pytest.approx(0.462396, abs=1e-6)


def test_coco_agrees_with_voc_curves():
    """Where no two objects overlap both rules match alike; only the interpolation differs."""
    rng = np.random.default_rng(5)
    ground_truth, detections = [], []
    for _ in range(40):
        cells = rng.permutation(16)[: rng.integers(0, 9)]
        corner = np.stack([cells % 4, cells // 4], axis=1) * 100.0
        boxes = np.concatenate([corner, corner + rng.uniform(30, 80, corner.shape)], axis=1)
        labels = rng.integers(0, 3, len(boxes))
        ground_truth.append({"boxes": boxes, "labels": labels})
        found = np.repeat(boxes, 2, axis=0) + rng.normal(0, 4, (2 * len(boxes), 4))
        confidence = rng.random(len(found))
        detections.append(
            {"boxes": found, "labels": np.repeat(labels, 2), "confidence": confidence}
        )
    coco = coco_average_precision(ground_truth, detections, num_classes=3)
    voc = voc_average_precision(
        ground_truth, detections, num_classes=3, iou_threshold=coco.iou_thresholds
    )
    recall_grid = np.linspace(0, 1, 101)
    for row, threshold in enumerate(coco.iou_thresholds):
        for label in range(3):
            curve = voc.curve(str(label), threshold)
            envelope = np.maximum.accumulate(curve["precision"][::-1])[::-1]
            reached = np.searchsorted(curve["recall"], recall_grid)
            expected = np.append(envelope, 0.0)[reached].mean()
            assert coco.average_precision[row, label] == pytest.approx(expected, abs=1e-9)
    assert 0.2 < coco.metrics["AP"] < 0.9  # the case is neither trivial nor hopeless


def test_coco_without_detections_and_without_objects():
    truth = [{"boxes": [[0, 0, 50, 50]], "labels": [0]}, {"boxes": [], "labels": []}]
    nothing = {"boxes": np.zeros((0, 4)), "labels": [], "confidence": []}
    result = coco_average_precision(truth, [nothing, nothing], num_classes=2)
    assert result.metrics["AP"] == 0.0 and result.metrics["AR100"] == 0.0
    assert np.isnan(result.metrics["APsmall"])
    assert result.per_class() == {"0": 0.0, "1": None}
    found = {"boxes": [[0, 0, 50, 50]], "labels": [0], "confidence": [0.5]}
    empty = coco_average_precision([truth[1]], [found], num_classes=2)
    assert all(np.isnan(value) for value in empty.metrics.values())
    # A detection in an image without objects is a false positive.
    first = {**found, "confidence": [0.9]}
    both = coco_average_precision(truth, [found, first], num_classes=1)
    assert both.metrics["AP"] == pytest.approx(0.5)
    assert np.isnan(coco_average_precision([], [], num_classes=1).metrics["AP"])


# --- Bad input -----------------------------------------------------------------------------

TRUTH = [{"boxes": [[0, 0, 10, 10]], "labels": [0]}]
FOUND = [{"boxes": [[0, 0, 10, 10]], "labels": [0], "confidence": [0.5]}]


@pytest.mark.parametrize("measure", [voc_average_precision, coco_average_precision])
@pytest.mark.parametrize(
    ("truth", "found", "message"),
    [
        (TRUTH, FOUND * 2, "1 and 2 images"),
        ([{"labels": [0]}], FOUND, r"ground_truth\[0\].*lacks boxes"),
        (TRUTH, TRUTH, r"detections\[0\].*lacks confidence"),
        ([{"boxes": [[5, 0, 1, 9]], "labels": [0]}], FOUND, r"ground_truth\[0\].*x1 <= x2"),
        ([{"boxes": [[0, 0, 9]], "labels": [0]}], FOUND, r"shape \(n, 4\)"),
        ([{"boxes": [[0, 0, 9, 9]], "labels": [0, 1]}], FOUND, r"labels.*shape \(1,\)"),
        ([{"boxes": [[0, 0, 9, 9]], "labels": [2]}], FOUND, "0 to 1, or -1"),
        ([{"boxes": [[0, 0, 9, 9]], "labels": [0.5]}], FOUND, "integers.*float64"),
        (TRUTH, [{**FOUND[0], "boxes": [[0, 0, np.nan, 10]]}], "finite"),
        (TRUTH, [{**FOUND[0], "confidence": [np.nan]}], "confidence.*finite"),
        ({"boxes": np.zeros((1, 2, 4))}, FOUND, "lacks 'labels'"),
        (TRUTH, {**FOUND[0], "confidence": np.zeros((3, 1))}, "as many images"),
    ],
)
def test_bad_boxes(measure, truth, found, message):
    with pytest.raises(ValueError, match=message):
        measure(truth, found, num_classes=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "class_names.*num_classes"),
        ({"num_classes": 0}, "positive `num_classes`"),
        ({"class_names": "cat", "num_classes": 2}, "list of 2 different names.*cat"),
        ({"class_names": []}, "list of different names"),
        ({"class_names": ["cat", "cat"]}, "different names.*cat"),
        ({"class_names": ["cat"], "num_classes": 2}, "list of 2 different names.*cat"),
        ({"num_classes": 1, "iou_threshold": 50}, "iou_threshold=50"),
        ({"num_classes": 1, "iou_threshold": []}, "iou_threshold"),
        ({"num_classes": 1, "interpolation": "linear"}, "interpolation='linear'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        voc_average_precision(TRUTH, FOUND, **arguments)


def test_relative_boxes_are_reported():
    relative = [{**FOUND[0], "boxes": [[0.0, 0.0, 0.5, 0.5]]}]
    with pytest.warns(UserWarning, match="between 0 and 1"):
        voc_average_precision(TRUTH, relative, num_classes=1)
    with pytest.raises(ValueError, match="plus_one"):
        voc_average_precision(relative, relative, num_classes=1, plus_one=True)
