"""The error analysis against brute force, TIDE's own package, spoiled labels and a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import reference
from browser import browser
from detectors import CLASS_NAMES, rectangles, small_detector
from PIL import Image
from test_matching_coco import noisy_detections

from keras_resnest.cli import main
from keras_resnest.data import DetectionDataset, ImageRecord, evaluation_batches
from keras_resnest.detection import DetectionDecoder
from keras_resnest.evaluation import analyze, coco_average_precision, collect_detections
from keras_resnest.evaluation.errors import KINDS

NAMES = ("a", "b", "c")
TIDECV_AP = 31.343101541407304  # of tidecv 1.0.1 for the boxes of `noisy`, like the costs
TIDECV = {
    "classification": 1.0103062076,
    "localization": 13.9350120427,
    "both": 1.2919141379,
    "duplicate": 2.6654245405,
    "background": 6.7830114924,
    "missed": 8.1489207029,
    "false positives": 28.0628390527,
    "false negatives": 21.5696231455,
}


class Recorded:
    """A detector whose detections in each image are given."""

    bounding_box_format, image_shape, num_classes = "xyxy", (320, 320, 3), len(NAMES)

    def __init__(self, found, class_names):
        self.found, self.class_names = found, class_names

    def predict_on_batch(self, images):
        (index,) = {int(i) for i in images[:, 0, 0, 0]}
        return {name: np.asarray(v)[None] for name, v in self.found[index].items()}


def analyzed(truth, detections, names=NAMES, **options):
    """Analyzes these detections; the first pixel of an image is its number."""
    batches = []
    for i, objects in enumerate(truth):
        columns = {k: np.asarray(v)[None] for k, v in objects.items()}
        columns["boxes"] = columns["boxes"].reshape(1, -1, 4).astype("float64")
        columns["labels"] = columns["labels"].astype(int)
        batches.append({"images": np.full((1, 320, 320, 3), i), "bounding_boxes": columns})
    return analyze(Recorded(detections, names), batches, verbose=False, **options)


@pytest.fixture(scope="module")
def noisy():
    """Detections of different confidence: the packages order equal ones differently."""
    truth, found = noisy_detections(25, 3, 8, 9, seed=4)
    for image, one in enumerate(found):
        one["confidence"] = one["confidence"] + 1e-5 * np.arange(len(one["labels"])) + 1e-7 * image
    return [{k: v for k, v in t.items() if k != "iscrowd"} for t in truth], found


@pytest.fixture(scope="module")
def report(noisy):
    return analyzed(*noisy)


# === Numbers ===


def test_average_precision_is_that_of_coco(noisy, report):
    expected = coco_average_precision(*noisy, NAMES)
    np.testing.assert_array_equal(report.average_precision["all"], expected.average_precision)
    for name, value in report.metrics.items():
        assert value == pytest.approx(expected.metrics[name], abs=1e-12)
    for (low, high), row in zip([(0, 16), (16, 32), (32, 64)], report.side_precision, strict=False):
        inside = [np.sqrt((b[2] - b[0]) * (b[3] - b[1])) for t in noisy[0] for b in t["boxes"]]
        assert (row["from"], row["to"]) == (low, high)
        assert row["objects"] == sum(low <= side < high for side in inside)


def loop_over_detections(truth, found):
    """TIDE's kinds of error and their cost, one detection at a time."""
    rows, free_objects, usable = [], set(), {}
    for image, (objects, image_found) in enumerate(zip(truth, found, strict=True)):
        overlaps = reference.iou(image_found["boxes"], objects["boxes"])
        same = np.asarray(image_found["labels"])[:, None] == np.asarray(objects["labels"])
        used, own = set(), []
        for i in np.argsort(-image_found["confidence"], kind="stable"):
            options = [
                (overlaps[i, j], -j)
                for j in range(len(objects["labels"]))
                if same[i, j] and j not in used
            ]
            best = max(options, default=(0, 0))
            is_right = best[0] >= 0.5
            if is_right:
                used.add(-best[1])
            own.append((i, is_right))
        free = set(range(len(objects["labels"]))) - used
        free_objects |= {(image, j) for j in free}
        for i, is_right in own:
            values = overlaps[i] if len(objects["labels"]) else np.zeros(1)
            mask = same[i] if len(objects["labels"]) else np.zeros(1, bool)
            own_iou, other_iou = (values * mask).max(), (values * ~mask).max()
            near, kind = None, None
            if is_right:
                kind = "right"
            elif 0.1 <= own_iou <= 0.5:
                kind, near = "localization", int((values * mask).argmax())
            elif other_iou >= 0.5:
                kind, near = "classification", int((values * ~mask).argmax())
            elif own_iou >= 0.5:
                kind = "duplicate"
            elif values.max() <= 0.1:
                kind = "background"
            else:
                kind = "both"
            rows.append([image, i, kind, (image, near) if near in free else None])
    order = sorted(rows, key=lambda r: -found[r[0]]["confidence"][r[1]])
    for row in order:
        if row[3] is not None:
            usable.setdefault(row[3], (row[0], row[1]))
    return order, free_objects, usable


def mean_precision(points, counts):
    """Mean over classes of the mean precision at 101 recalls; `points` are (label, is right)."""
    means = []
    for label, count in enumerate(counts):
        hits = np.array([right for own, right in points if own == label], bool)
        tp = np.cumsum(hits)
        values = [
            max((tp[i] / (i + 1) for i in range(len(tp)) if tp[i] / count >= r - 1e-9), default=0.0)
            for r in np.linspace(0, 1, 101)
        ]
        means.append(np.mean(values))
    return np.mean(means)


def test_kinds_of_error_and_cost_equal_brute_force(noisy, report):
    truth, found = noisy
    rows, free, usable = loop_over_detections(truth, found)
    kinds = [row[2] for row in rows]
    counts = np.bincount(np.concatenate([t["labels"] for t in truth]), minlength=3)
    missed = [key for key in free if key not in usable]
    expected = {kind: kinds.count(kind) for kind in KINDS} | {"missed": len(missed)}
    assert report.errors.counts == expected and min(expected.values()) > 0
    got = [KINDS[k] if k >= 0 else "right" for k in report.errors.kind]
    assert got == kinds

    def points(mended=None):
        chosen = []
        for image, i, kind, near in rows:
            label, right = int(found[image]["labels"][i]), kind == "right"
            if kind == mended:
                if near is None or usable[near] != (image, i):
                    continue
                label, right = int(truth[image]["labels"][near[1]]), True
            chosen.append((label, right))
        return chosen

    base = mean_precision(points(), counts)
    assert report.errors.average_precision == pytest.approx(base, abs=1e-9)
    for kind in KINDS[:-1]:
        cost = max(mean_precision(points(kind), counts) - base, 0)
        assert report.errors.costs[kind] == pytest.approx(cost, abs=1e-9), kind
    fewer = counts - np.bincount([truth[i]["labels"][j] for i, j in missed], minlength=3)
    assert report.errors.costs["missed"] == pytest.approx(
        mean_precision(points(), fewer) - base, abs=1e-9
    )


def test_costs_equal_those_of_tidecv(report):
    """`TIDE().evaluate(truth, found).get_all_errors()`."""
    costs = {name: 100 * cost for name, cost in report.errors.costs.items()}
    assert 100 * report.errors.average_precision == pytest.approx(TIDECV_AP, abs=1e-6)
    assert costs == pytest.approx(TIDECV, abs=1e-6)


def test_curves_best_thresholds_and_confusion_equal_loops(noisy, report):
    truth, found = noisy
    rows, _, _ = loop_over_detections(truth, found)
    for label, name in enumerate(NAMES):
        total = sum(np.sum(t["labels"] == label) for t in truth)
        own = [
            (found[image]["confidence"][i], kind == "right")
            for image, i, kind, _ in rows
            if found[image]["labels"][i] == label
        ]

        def f1(threshold, own=own, total=total):
            kept = [right for confidence, right in own if confidence >= threshold]
            return 2 * sum(kept) / (len(kept) + total)

        best = report.best_thresholds[name]
        assert f1(best) == pytest.approx(max(f1(confidence) for confidence, _ in own))
        assert best not in [confidence for confidence, _ in own]  # `>` and `>=` are the same
        numbers = report.per_class()[name]
        assert numbers["f1"] == pytest.approx(f1(best))
        kept = [right for confidence, right in own if confidence >= best]
        assert numbers["precision"] == pytest.approx(np.mean(kept))
        assert numbers["recall"] == pytest.approx(sum(kept) / total)

    for threshold in (0.0, 0.6, {"a": 0.9, "c": 0.2, "b": 0.5}):
        limits = threshold if isinstance(threshold, dict) else dict.fromkeys(NAMES, threshold)
        matrix = report.confusion_matrix(threshold)
        kept = [
            (found[i]["labels"][j], kind)
            for i, j, kind, _ in rows
            if found[i]["confidence"][j] >= limits[NAMES[found[i]["labels"][j]]]
        ]
        for label in range(3):
            assert matrix[label, label] == kept.count((label, "right"))
            assert matrix[label].sum() == sum(np.sum(t["labels"] == label) for t in truth)
            assert matrix[:, label].sum() == sum(own == label for own, _ in kept)
        assert matrix[3, 3] == 0


def test_confusion_of_known_detections():
    truth = [{"boxes": [[0, 0, 10, 10], [50, 50, 60, 60]], "labels": [0, 1]}]
    boxes = [[0, 0, 10, 9], [50, 50, 60, 60], [100, 100, 120, 120], [0, 0, 10, 10]]
    found = [{"boxes": boxes, "labels": [0, 2, 2, 1], "confidence": [0.9, 0.8, 0.7, 0.2]}]
    report = analyzed(truth, found, confidence_threshold=0.5)
    expected = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert report.confusion.tolist() == expected
    assert report.confusion_matrix(0.75).tolist() == [*expected[:3], [0, 0, 0, 0]]
    assert report.image_costs.tolist() == pytest.approx([0.8 + 0.7 + 1])  # b is missed
    assert set(report.confidence_threshold.values()) == {0.5}


def test_examples_of_missed_objects_come_from_many_images():
    truth = [{"boxes": [[i, 0, i + 9, 9] for i in range(0, 80, 10)], "labels": [0] * 8}]
    truth += [{"boxes": [[0, 0, 9, 9]], "labels": [0]}] * 3
    found = [{"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int), "confidence": np.zeros(0)}]
    report = analyzed(truth, found * 4)
    assert sorted(view.image for view, _ in report.views["missed"]) == [0, 0, 0, 1, 2, 3]


def test_calibration():
    """Of ten detections in each of two bins, seven and two are right."""
    rng = np.random.default_rng(0)
    truth, found = [], []
    for count, low in ((7, 0.6), (2, 0.1)):
        boxes = np.arange(10)[:, None] * 30 + [0, 0, 20, 20]
        moved = boxes + np.where(np.arange(10)[:, None] < count, 0, 15)
        confidence = low + 0.1 * rng.random(10)
        truth.append({"boxes": boxes, "labels": [0] * 10})
        found.append({"boxes": moved, "labels": [0] * 10, "confidence": confidence})
    report = analyzed(truth, found)
    assert report.calibration["count"].tolist() == [0, 10, 0, 0, 0, 0, 10, 0, 0, 0]
    assert report.calibration["precision"][[1, 6]] == pytest.approx([0.2, 0.7])
    means = [f["confidence"].mean() for f in found]
    expected = (abs(means[0] - 0.7) + abs(means[1] - 0.2)) / 2
    assert report.calibration_error == pytest.approx(expected)


def test_spoiled_labels_are_found():
    """One label in twenty was removed, renamed or moved; the model is wrong in other places too."""
    rng = np.random.default_rng(3)
    truth, found, spoiled = [], [], set()
    for image in range(120):
        corner = np.stack([np.arange(10) % 5, np.arange(10) // 5], axis=1) * 60 + rng.random(
            (10, 2)
        )
        boxes = np.hstack([corner, corner + rng.uniform(20, 45, (10, 2))])
        labels = rng.integers(0, 3, 10)
        given, names, keep = boxes.copy(), labels.copy(), np.ones(10, bool)
        for i in np.flatnonzero(rng.random(10) < 0.05):
            spoiled.add((image, *np.floor(corner[i] / 60).astype(int)))
            kind = rng.integers(3)
            if kind == 0:
                keep[i] = False
            elif kind == 1:
                names[i] = (labels[i] + 1) % 3
            else:
                given[i] += rng.choice([-1, 1]) * 0.45 * np.tile(boxes[i, 2:] - boxes[i, :2], 2)
        truth.append({"boxes": given[keep], "labels": names[keep]})
        confidence = 0.4 + 0.6 * rng.random(10)
        guess = np.where(rng.random(10) < 0.06, (labels + 1) % 3, labels)  # b for a, c for b
        confidence = np.where(guess == labels, confidence, confidence - 0.3)
        seen = rng.random(10) > 0.1
        moved = boxes + rng.normal(0, 1.0, boxes.shape)
        image_found = {"boxes": moved, "labels": guess, "confidence": confidence}
        found.append({name: values[seen] for name, values in image_found.items()})
    assert 50 <= len(spoiled) <= 80
    suspicions = analyzed(truth, found).suspicions[:50]
    places = [place_of(found, s) for s in suspicions]
    assert np.mean([place in spoiled for place in places]) >= 0.8
    assert {s.kind for s in suspicions} == {"missing", "wrong class", "badly placed"}
    scores = [s.score for s in suspicions]
    assert scores == sorted(scores, reverse=True) and 0 <= scores[-1] <= scores[0] <= 1


def place_of(found, suspicion):
    """Image and cell of the grid."""
    rows = [(c, i, j) for i, f in enumerate(found) for j, c in enumerate(f["confidence"])]
    rows.sort(key=lambda row: -row[0])
    _, image, row = rows[suspicion.detection]
    assert image == suspicion.image
    center = found[image]["boxes"][row].reshape(2, 2).mean(axis=0)
    return image, *np.floor(center / 60).astype(int)


# === Files ===


@pytest.fixture(scope="module")
def model():
    """Finds many boxes everywhere, as an untrained network does."""
    return small_detector(decoder=DetectionDecoder(confidence_threshold=0.5, max_detections=20))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images & <more>")
    images, truth = rectangles(6)
    records = []
    for i, (pixels, boxes, labels) in enumerate(
        zip(images, truth["boxes"], truth["labels"], strict=True)
    ):
        path = folder / f"{i} %.png"
        Image.fromarray(pixels.astype("uint8")).resize((256, 128)).save(path)
        records.append(ImageRecord(path, str(i), boxes * 2, labels))
    return DetectionDataset(records, CLASS_NAMES)


@pytest.fixture(scope="module")
def from_files(model, dataset):
    return analyze(model, dataset, verbose=False)


@pytest.fixture(scope="module")
def page(from_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    from_files.to_html(path, "Rectangles & <more>")
    return path


class Elements(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(page, dataset):
    text = page.read_text("utf-8")
    elements = Elements(text).found
    assert "<more>" not in text and "://" not in text and "url(" not in text.replace("url(#", "")
    assert {"script", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in elements)
    sources = [a[name] for _, a in elements for name in ("src", "xlink:href") if name in a]
    assert len(sources) > 10 and all(s.startswith(("data:image/", "#")) for s in sources)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    links = {a["href"] for tag, a in elements if tag == "a" and not a["href"].startswith("#")}
    linked = {(page.parent / unquote(link)).resolve() for link in links}
    assert linked and linked <= {Path(record.image).resolve() for record in dataset.records}
    anchors = {a["href"][1:] for tag, a in elements if tag == "a" and a["href"].startswith("#")}
    assert anchors == {a["id"] for tag, a in elements if tag == "section"}


def test_numbers_from_files_equal_those_of_evaluation(model, dataset, from_files):
    report, batches = from_files, evaluation_batches(dataset, (64, 128), 4, include_source=True)
    truth, found = collect_detections(model, batches)
    boxes = np.concatenate([record.boxes for record in dataset.records])
    np.testing.assert_allclose(report.objects.boxes, boxes, atol=1e-3)  # in the files' pixels
    boxes, confidence = (np.concatenate([f[k] for f in found]) for k in ("boxes", "confidence"))
    order = np.argsort(-confidence, kind="stable")
    assert len(order) > 50
    np.testing.assert_allclose(report.detections.boxes, boxes[order], atol=1e-3)
    np.testing.assert_allclose(report.detections.confidence, confidence[order], atol=1e-6)
    expected = coco_average_precision(truth, found, CLASS_NAMES)
    assert report.metrics["AP50"] == pytest.approx(expected.metrics["AP50"], abs=1e-12)
    content = json.loads(report.to_json())
    assert content["metrics"]["AP50"] == pytest.approx(expected.metrics["AP50"], abs=1e-12)
    assert content["speed"]["parameters"] == model.count_params()
    assert content["speed"]["milliseconds"] > 0
    assert set(content["image_costs"]) == {str(record.image) for record in dataset.records}
    from_batches = analyze(model, batches, verbose=False)
    assert from_batches.metrics == pytest.approx(report.metrics, nan_ok=True)
    assert from_batches.images[0] == "image 0" and not from_batches.files
    best = report.best_thresholds
    for one in model.detect([r.image for r in dataset.records], confidence_threshold=best):
        limits = [best[name] for name in one["class_names"]]
        assert np.all(one["confidence"] >= np.array(limits) - 1e-6)


MEASURE = """<script>addEventListener("load", () => {
  const width = document.documentElement.clientWidth, found = [];
  for (const e of document.body.querySelectorAll("*")) {
    if (e.closest("svg") && e.tagName != "svg") continue;
    const box = e.getBoundingClientRect();
    if (box.right > width + 1 || box.left < -1 || e.scrollWidth > e.clientWidth + 1 &&
        getComputedStyle(e).display != "inline") found.push(e.tagName + "." + e.className);
    if (e.tagName == "IMG" && e.loading == "eager" && !e.naturalWidth) found.push("broken image");
  }
  document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth, found]);
})</script></head>"""


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_a_browser_shows_the_page_without_overflow(page, tmp_path, width):
    program = browser()
    text = page.read_text("utf-8").replace("</head>", MEASURE).replace('loading="lazy" ', "")
    copy = tmp_path / "report.html"
    copy.write_text(text, "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        [program, *options, copy.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL).group(1)
    shown, scrolled, overflowing = json.loads(title)
    assert shown == width and scrolled <= width and overflowing == []


def test_the_command(model, dataset, tmp_path, capsys):
    rows = ["image,x1,y1,x2,y2,label"]
    for record in dataset.records:
        shutil.copy(record.image, tmp_path)
        for box, label in zip(record.boxes, record.labels, strict=True):
            name = Path(record.image).name
            rows.append(f"{name},{','.join(map(str, box))},{CLASS_NAMES[label]}")
    (tmp_path / "objects.csv").write_text("\n".join(rows))
    model.save(tmp_path / "detector.keras")
    files, output = [tmp_path / "detector.keras", tmp_path / "objects.csv"], tmp_path / "out"
    assert main(["analyze", *files, "--confidence", 0.6, "--output", output]) == 0
    assert "report.html" in capsys.readouterr().out
    content = json.loads((output / "report.json").read_text("utf-8"))
    assert content["confidence_threshold"] == dict.fromkeys(CLASS_NAMES, 0.6)
    best = json.loads((output / "thresholds.json").read_text("utf-8"))
    assert best == content["best_thresholds"] and (output / "report.html").exists()

    image, thresholds = dataset.records[0].image, output / "thresholds.json"
    command = ["predict", files[0], image, "--confidence", thresholds, "--no-images"]
    assert main([*command, "--output", tmp_path / "found"]) == 0
    (record,) = json.loads((tmp_path / "found/detections.json").read_text())
    wanted = model.detect(image, confidence_threshold=best)
    assert [d["class_name"] for d in record["detections"]] == wanted["class_names"]
    assert main(["export", files[0], tmp_path / "saved", "--confidence", thresholds]) == 0
    facts = json.loads((tmp_path / "saved/assets.extra/model.json").read_text())
    assert facts["decoder"]["confidence_threshold"] == best
    capsys.readouterr()
    assert (
        main(
            [
                "predict",
                tmp_path / "saved",
                image,
                "--confidence",
                thresholds,
                "--no-images",
                "--output",
                tmp_path / "served",
            ]
        )
        == 0
    )
    (served,) = json.loads((tmp_path / "served/detections.json").read_text())
    assert [d["class_name"] for d in served["detections"]] == wanted["class_names"]

    names = (Path(record.image).name for record in dataset.records)
    (tmp_path / "empty.csv").write_text("\n".join([rows[0], *(f"{n},,,,," for n in names)]))
    for command in ("analyze", "evaluate"):
        assert main([command, files[0], tmp_path / "empty.csv", "--output", output]) == 2
        printed = capsys.readouterr()
        assert "empty.csv has no objects to compare" in printed.err and "batch" not in printed.out

    (tmp_path / "other.csv").write_text("\n".join(rows).replace("red", "cat"))
    assert main(["analyze", files[0], tmp_path / "other.csv", "--output", output]) == 2
    assert "cat" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["analyze", *files, "--confidence", tmp_path / "other.csv"])
    assert "other.csv must hold a number by class" in capsys.readouterr().err


# === Bad input ===


def test_no_detections(dataset):
    deaf = small_detector(decoder=DetectionDecoder(confidence_threshold=1.0))
    report = analyze(deaf, dataset, verbose=False)
    assert report.metrics["AP"] == 0.0 and report.suspicions == []
    assert report.best_thresholds == dict.fromkeys(CLASS_NAMES, 0.5)
    assert report.confusion[:3, 3].sum() == sum(len(r.labels) for r in dataset.records)
    assert np.isnan(report.calibration_error)
    assert "No label contradicts" in report.to_html() and "NaN" not in report.to_json()


def test_no_objects_and_other_classes(model, dataset):
    empty = [ImageRecord(r.image, r.image_id, [], []) for r in dataset.records[:2]]
    with pytest.raises(ValueError, match=r"must have objects.*Received: 2 images without any"):
        analyze(model, DetectionDataset(empty, CLASS_NAMES), verbose=False)
    others = DetectionDataset(dataset.records, ["cat", "dog", "cow"])
    with pytest.raises(ValueError, match=r"same classes.*Received: \['cat', 'dog', 'cow'\]"):
        analyze(model, others, verbose=False)
    with pytest.raises(ValueError, match="a number for each class, red, green, blue"):
        analyze(model, dataset, confidence_threshold={"red": 0.5}, verbose=False)
