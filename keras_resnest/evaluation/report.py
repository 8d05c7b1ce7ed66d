"""Error analysis of a detector: where it is wrong, what that costs, and which labels look wrong."""

import collections
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_resnest.atomic import atomic_file
from keras_resnest.checks import checked, class_thresholds
from keras_resnest.evaluation.box_table import BoxTable, read_tables
from keras_resnest.evaluation.collect import detect_batches, resolve_class_names
from keras_resnest.evaluation.errors import FOREGROUND, ErrorAnalysis, analyze_errors
from keras_resnest.evaluation.matching import (
    ANY_AREA,
    SIZES,
    Pairs,
    assign_objects,
    average_precision,
    by_confidence,
    of_same_class,
    overlapping_pairs,
    rank_in_group,
)
from keras_resnest.evaluation.suspicions import LabelSuspicion, find_suspicious_labels
from keras_resnest.evaluation.voc import nan_mean
from keras_resnest.images import encode_image, load_image, resize_image

SIDES = (0, 16, 32, 64, 128, 256, 1e5)  # of an object: the root of its area in pixels
NUM_BINS = 10  # of the confidence, for calibration
BATCH_SIZE = 16
DEFAULT_THRESHOLD = 0.5  # where neither a class nor all of them together have a best one

NUM_WORST, NUM_LABELS = 12, 24  # images that the page shows
NUM_CLASSES, NUM_EXAMPLES = 8, 6  # of the contact sheets: classes, and crops of each kind
WHOLE_SIDE, CROP_SIDE = 480, 160  # longer side of an image and of a crop, in pixels
MARGIN = 0.6  # around the box of a crop, in sides of the box


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """An image or a part of it, as small as the page shows it."""

    image: int  # index of the image
    pixels: np.ndarray  # uint8 (height, width, 3)
    corner: np.ndarray  # (x, y) of its upper left corner in the image
    scale: float  # pixels of the view for a pixel of the image


@dataclasses.dataclass(frozen=True, eq=False)
class DetectionReport:
    """Result of `analyze` for C classes, D detections and N objects."""

    class_names: tuple[str, ...]
    images: tuple[str, ...]  # name of each image: its file, or its id
    files: bool  # whether the names are files
    objects: BoxTable  # "xyxy" in pixels
    detections: BoxTable  # by falling confidence
    # For "all", "small", "medium" and "large" objects (10, C) values for the IoU thresholds 0.50,
    # 0.55, ..., 0.95; nan without objects
    average_precision: dict[str, np.ndarray]
    # AP at IoU 0.5 of objects by the root of their area: {"from", "to", "objects", "AP50"}
    side_precision: list[dict]
    assigned: np.ndarray  # (D,) row of the object that a detection has found (IoU 0.5), or -1
    curves: list[dict[str, np.ndarray]]  # "confidence", "precision", "recall", "f1" of each class
    best_thresholds: dict[str, float]  # confidence with the highest F1 by class name
    # By class name, from which on a detection counts in `confusion`, `image_costs` and the examples
    confidence_threshold: dict[str, float]
    errors: ErrorAnalysis  # kinds of error and their cost
    calibration: dict[str, np.ndarray]  # "count", "confidence", "precision" of bins of confidence
    suspicions: list[LabelSuspicion]  # labels that look wrong, the most suspicious first
    speed: dict  # parameters, megabytes, milliseconds per image and devices
    pairs: Pairs = dataclasses.field(repr=False)
    views: dict[str, list] = dataclasses.field(repr=False, default_factory=dict)

    # === Numbers ===

    @property
    def metrics(self) -> dict[str, float]:
        """COCO's AP, AP50, AP75, APsmall, APmedium and APlarge; nan if undefined."""
        overall = self.average_precision["all"]
        values = {"AP": overall, "AP50": overall[0], "AP75": overall[5]}
        values |= {f"AP{size}": self.average_precision[size] for size in SIZES}
        return {name: nan_mean(value) for name, value in values.items()}

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of confidence against precision at IoU 0.5; nan if none."""
        bins = self.calibration
        distance = np.abs(bins["confidence"] - bins["precision"])
        total = bins["count"].sum()
        return float(np.nansum(bins["count"] * distance) / total) if total else float("nan")

    @property
    def confusion(self) -> np.ndarray:
        """The confusion matrix at `confidence_threshold`."""
        return self.confusion_matrix()

    @property
    def image_costs(self) -> np.ndarray:
        """(images,) missed objects plus the confidence of false positives."""
        false, missed = self.mistakes()
        count = len(self.images)
        costs = np.bincount(self.objects.image[missed], minlength=count).astype(float)
        confidence = self.detections.confidence[false]
        return costs + np.bincount(self.detections.image[false], confidence, minlength=count)

    def confusion_matrix(self, confidence_threshold=None) -> np.ndarray:
        """Counts objects by their class and the class that was detected.

        A detection belongs to an object of its class (IoU 0.5); the others and the objects that
        remain are then assigned whatever their class.

        Args:
            confidence_threshold: lowest confidence of a detection, or a dictionary with one for
                each class name; default `self.confidence_threshold`.

        Returns:
            int (C + 1, C + 1): rows are true classes, columns detected ones; the last row is
            background that was detected, the last column objects that were missed.
        """
        false, missed = self.mistakes(confidence_threshold)
        objects, found, background = self.objects, self.detections, len(self.class_names)
        right = self.kept(confidence_threshold) & self._found_one
        matrix = np.zeros((background + 1, background + 1), int)
        np.add.at(matrix, (found.labels[right], found.labels[right]), 1)
        left = np.zeros(len(found.labels), bool), np.zeros(len(objects.labels), bool)
        left[0][false], left[1][missed] = True, True
        pairs = self.pairs.take(left[0][self.pairs.found] & left[1][self.pairs.objects])
        swapped = assign_objects(pairs, objects, found, [FOREGROUND])[0]
        rows = np.flatnonzero(swapped >= 0)
        np.add.at(matrix, (objects.labels[swapped[rows]], found.labels[rows]), 1)
        left[0][rows], left[1][swapped[rows]] = False, False
        matrix[background, :background] = np.bincount(found.labels[left[0]], minlength=background)
        matrix[:background, background] = np.bincount(objects.labels[left[1]], minlength=background)
        return matrix

    def mistakes(self, confidence_threshold=None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of false positives, the surest first, and of missed objects."""
        kept = self.kept(confidence_threshold)
        is_missed = ~self.objects.iscrowd
        is_missed[self.assigned[kept & self._found_one]] = False
        return np.flatnonzero(kept & (self.assigned < 0)), np.flatnonzero(is_missed)

    def kept(self, confidence_threshold=None) -> np.ndarray:
        """Returns whether the confidence of each detection reaches the threshold of its class."""
        given = self.confidence_threshold if confidence_threshold is None else confidence_threshold
        limits = class_thresholds(given, self.class_names)
        return self.detections.confidence >= np.asarray(limits)[self.detections.labels]

    @property
    def _found_one(self) -> np.ndarray:
        """Whether a detection is a true positive; one on a crowd is neither true nor false."""
        return (self.assigned >= 0) & ~np.append(self.objects.iscrowd, False)[self.assigned]

    # === Output ===

    def per_class(self) -> dict[str, dict]:
        """Returns AP and the best threshold, with its precision and recall, by class name."""
        counts = np.bincount(
            self.objects.labels[~self.objects.iscrowd], minlength=len(self.class_names)
        )
        rows = {}
        for label, name in enumerate(self.class_names):
            values = {size: self.average_precision[size][:, label] for size in ("all", *SIZES)}
            threshold = self.best_thresholds[name]
            rows[name] = {
                "objects": int(counts[label]),
                "AP": nan_mean(values["all"]),
                "AP50": float(values["all"][0]),
                "AP75": float(values["all"][5]),
                **{f"AP{size}": nan_mean(values[size]) for size in SIZES},
                "best_threshold": threshold,
                **_at_threshold(self.curves[label], threshold),
            }
        return rows

    @checked
    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """Returns the numbers as JSON, undefined ones as null, and writes them to `path`."""
        objects, found = self.objects, self.detections
        content = {
            "class_names": self.class_names,
            "images": len(self.images),
            "objects": len(objects.labels),
            "detections": len(found.labels),
            "metrics": self.metrics,
            "classes": self.per_class(),
            "by_side": self.side_precision,
            "best_thresholds": self.best_thresholds,
            "confidence_threshold": self.confidence_threshold,
            "confusion_matrix": self.confusion.tolist(),
            "errors": {
                name: {"count": self.errors.counts.get(name), "cost": cost}
                for name, cost in self.errors.costs.items()
            },
            "calibration": {name: v.tolist() for name, v in self.calibration.items()},
            "calibration_error": self.calibration_error,
            "image_costs": dict(zip(self.images, self.image_costs.tolist(), strict=True)),
            "suspicious_labels": [
                {
                    "image": self.images[s.image],
                    "kind": s.kind,
                    "score": round(s.score, 4),
                    "label": self.class_names[objects.labels[s.object]] if s.object >= 0 else None,
                    "box": objects.boxes[s.object].round(2).tolist() if s.object >= 0 else None,
                    "detected_label": self.class_names[found.labels[s.detection]],
                    "detected_box": found.boxes[s.detection].round(2).tolist(),
                    "confidence": float(found.confidence[s.detection]),
                }
                for s in self.suspicions
            ],
            "speed": self.speed,
        }
        text = json.dumps(_without_nan(content), indent=1, ensure_ascii=False)
        _write(path, text)
        return text

    @checked
    def to_html(self, path: str | os.PathLike | None = None, title: str = "Detector") -> str:
        """Returns one self-contained page with all results, and writes it to `path`.

        Args:
            path: file to write; links to the images are relative to its folder.
            title: first words of the page.
        """
        from keras_resnest.evaluation.report_html import render

        text = render(self, title, None if path is None else os.path.dirname(os.path.abspath(path)))
        _write(path, text)
        return text

    def __str__(self) -> str:
        costs = {name: self.errors.costs[name] for name in self.errors.counts}
        lines = [f"{name:8} {value:6.3f}" for name, value in self.metrics.items()]
        lines.append(
            "cost of errors in AP50: " + ", ".join(f"{k} {v:.3f}" for k, v in costs.items())
        )
        best = ", ".join(f"{name} {value:.2f}" for name, value in self.best_thresholds.items())
        lines.append(f"best confidence thresholds: {best}")
        return "\n".join(lines)


@checked
def analyze(
    model,
    dataset,
    class_names: Sequence[str] | None = None,
    *,
    confidence_threshold: float | Mapping[str, float] | None = None,
    bounding_box_format: str | None = None,
    steps: int | None = None,
    verbose: bool = True,
) -> DetectionReport:
    """Runs a detector on annotated images and analyzes its errors.

    Args:
        model: a `RefineDet`, or another detector as in `collect_detections`.
        dataset: a dataset of `keras_resnest.data`, so that the report names the files; or batches
            as in `collect_detections`.
        class_names: names of the classes; default `model.class_names`.
        confidence_threshold: lowest confidence of the detections in the confusion matrix and in the
            examples, or a dictionary with one for each class name; default the best thresholds.
        bounding_box_format: format of the boxes in batches; default the model's.
        steps: number of batches; required for an infinite dataset.
        verbose: whether to show a progress bar.

    Returns:
        `DetectionReport`: `.metrics`, `.best_thresholds`, `.errors`, `.to_html(path)`.

    Raises:
        ValueError: if the dataset has other classes than the model, or no objects.

    Example:
        >>> report = analyze(model, kr.data.read_detection("my_folder", "test"))
        >>> report.to_html("report.html")
        >>> model.detect("photo.jpg", confidence_threshold=report.best_thresholds)
    """
    names = resolve_class_names(model, class_names, dataset)
    if confidence_threshold is not None:
        class_thresholds(confidence_threshold, names)
    records = getattr(dataset, "records", ())
    if any(record.image is None for record in records):  # in a file of TFDS
        records = ()
    if hasattr(dataset, "as_dataset"):
        from keras_resnest.data.batches import evaluation_batches

        shape = getattr(model, "model", model).image_shape  # also of a `MultiScaleDetector`
        dataset = evaluation_batches(dataset, shape, BATCH_SIZE, cache=False, include_source=True)
        bounding_box_format = "xyxy"
    truth, detections, sources, sizes, first = [], [], [], [], None
    for images, own_sizes, objects, found in _with_progress(
        detect_batches(model, dataset, bounding_box_format, steps), dataset, steps, verbose
    ):
        first = images[:1] if first is None else first
        truth += objects
        detections += found
        sizes += own_sizes.tolist()
        sources += [None if records else _encode(image) for image in images]
    if records:
        sources = [record.image for record in records[: len(truth)]]
    objects, found = read_tables(truth, detections, len(names))
    if objects.iscrowd.all():
        raise ValueError(
            "`dataset` must have objects to compare detections with. "
            f"Received: {len(truth)} images without any"
        )
    is_path = [isinstance(source, str) for source in sources]
    ids = [r.image_id for r in records] if records else [f"image {i}" for i in range(len(truth))]
    report = _analyze_tables(
        names,
        tuple(s if is_file else i for s, i, is_file in zip(sources, ids, is_path, strict=True)),
        all(is_path),
        objects,
        by_confidence(found),
        confidence_threshold,
        _measure_speed(model, first),
    )
    report.views.update(_make_views(report, sources, sizes))
    return report


def _analyze_tables(
    names, images, files, objects: BoxTable, found: BoxTable, confidence_threshold, speed
) -> DetectionReport:
    """Matches once, and computes every number from that."""
    count = len(names)
    pairs = overlapping_pairs(objects, found)
    same = of_same_class(pairs, objects, found)
    assigned = assign_objects(same, objects, found, [FOREGROUND])[0]
    is_crowd = np.append(objects.iscrowd, False)[assigned]
    positive, counted = (assigned >= 0) & ~is_crowd, ~is_crowd
    num_objects = np.bincount(objects.labels[~objects.iscrowd], minlength=count)
    curves = [
        _confidence_curve(found, positive, counted & (found.labels == label), number)
        for label, number in enumerate(num_objects)
    ]
    pooled = _best_threshold(_confidence_curve(found, positive, counted, num_objects.sum()))
    best = {
        name: _best_threshold(curve) or pooled or DEFAULT_THRESHOLD
        for name, curve in zip(names, curves, strict=True)
    }
    given = best if confidence_threshold is None else confidence_threshold
    limits = np.broadcast_to(class_thresholds(given, names), count).tolist()
    return DetectionReport(
        class_names=names,
        images=images,
        files=files,
        objects=objects,
        detections=found,
        average_precision={
            size: average_precision(objects, found, count, same, area)
            for size, area in {"all": ANY_AREA, **SIZES}.items()
        },
        side_precision=_precision_by_side(objects, found, count, same),
        assigned=assigned,
        curves=curves,
        best_thresholds=best,
        confidence_threshold=dict(zip(names, limits, strict=True)),
        errors=analyze_errors(objects, found, pairs, assigned, count),
        calibration=_calibration(found.confidence[counted], positive[counted]),
        suspicions=find_suspicious_labels(objects, found, pairs),
        speed=speed,
        pairs=pairs,
    )


# === Numbers ===


def _confidence_curve(found: BoxTable, positive, rows, num_objects: int) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of the detections down to each confidence that occurs."""
    confidence, hits = found.confidence[rows], positive[rows]
    last = np.flatnonzero(np.diff(confidence, append=-np.inf))  # of equal ones
    tp, total = np.cumsum(hits)[last], last + 1
    recall = tp / num_objects if num_objects else np.full(len(last), np.nan)
    return {
        "confidence": confidence[last],
        "precision": tp / total,
        "recall": recall,
        "f1": 2 * tp / (total + num_objects),
    }


def _best_threshold(curve: dict[str, np.ndarray]) -> float | None:
    """The middle between the last confidence that belongs to the highest F1 and the next one."""
    f1, confidence = curve["f1"], curve["confidence"]
    if not np.any(f1 > 0):
        return None
    best = int(np.argmax(f1))
    below = confidence[best + 1] if best + 1 < len(f1) else 0.99 * confidence[best]
    return float((confidence[best] + below) / 2)


def _at_threshold(curve: dict[str, np.ndarray], threshold: float) -> dict[str, float]:
    row = int(np.sum(curve["confidence"] >= threshold)) - 1
    if row < 0:
        return {"precision": float("nan"), "recall": 0.0, "f1": 0.0}
    return {name: float(curve[name][row]) for name in ("precision", "recall", "f1")}


def _precision_by_side(objects, found, num_classes: int, pairs: Pairs) -> list[dict]:
    rows = []
    for low, high in itertools.pairwise(SIDES):
        area = (low**2, np.nextafter(high**2, 0))  # COCO's limits are inclusive
        precision = average_precision(objects, found, num_classes, pairs, area, [FOREGROUND])
        inside = ~objects.iscrowd & (objects.area >= area[0]) & (objects.area <= area[1])
        values = int(inside.sum()), nan_mean(precision[0])
        rows.append(dict(zip(("from", "to", "objects", "AP50"), (low, high, *values), strict=True)))
    return rows


def _calibration(confidence: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(bins, v, NUM_BINS) / count for v in (confidence, positive)]
    return {"count": count, "confidence": means[0], "precision": means[1]}


def _measure_speed(model, images: np.ndarray) -> dict:
    """Size of a model, and the median time of ten predictions of one image."""
    network = getattr(model, "model", model)
    model.predict_on_batch(images)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        model.predict_on_batch(images)
        seconds.append(time.perf_counter() - start)
    weights = [(math.prod(w.shape), np.dtype(w.dtype)) for w in getattr(network, "weights", ())]
    return {
        "parameters": sum(count for count, _ in weights),
        "megabytes": sum(count * dtype.itemsize for count, dtype in weights) / 1e6,
        "milliseconds": 1000 * statistics.median(seconds),
        "image_shape": list(images.shape[1:]),
        "devices": f"{', '.join(keras.distribution.list_devices())} ({os.cpu_count()} CPU cores)",
    }


# === Images ===


def _make_views(report: DetectionReport, sources: list, sizes: list) -> dict[str, list]:
    """The images and crops that the page shows; each image is read once."""
    costs = report.image_costs
    worst = [i for i in np.argsort(-costs, kind="stable")[:NUM_WORST].tolist() if costs[i] > 0]
    wanted = [("worst", image, None, image) for image in worst]
    found, objects = report.detections, report.objects
    for suspicion in report.suspicions[:NUM_LABELS]:
        boxes = [found.boxes[suspicion.detection]]
        boxes += [objects.boxes[suspicion.object]] if suspicion.object >= 0 else []
        wanted.append(("labels", suspicion.image, _around(np.stack(boxes)), suspicion))
    false, missed = report.mistakes()
    mistakes = np.bincount(found.labels[false], minlength=len(report.class_names))
    mistakes = mistakes + np.bincount(objects.labels[missed], minlength=len(report.class_names))
    for label in np.argsort(-mistakes, kind="stable")[:NUM_CLASSES].tolist():
        for kind, table, rows in (("false", found, false), ("missed", objects, missed)):
            rows = rows[table.labels[rows] == label]
            if kind == "missed":  # from as many images as possible; the others are ordered
                rows = rows[np.argsort(rank_in_group(table.image[rows]), kind="stable")]
            for row in rows[:NUM_EXAMPLES].tolist():
                box = _around(table.boxes[row][None])
                wanted.append((kind, int(table.image[row]), box, (label, row)))
    made, current, pixels = {}, None, None
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i][1]):
        _, image, box, _ = wanted[i]
        if image != current:
            current, pixels = image, load_image(sources[image])
            if pixels.shape[:2] != tuple(sizes[image]):  # a batch has stretched it
                pixels = np.asarray(resize_image(pixels, *sizes[image])).astype("uint8")
        made[i] = _view(image, pixels, box)
    views = collections.defaultdict(list)
    for i, (name, _, _, about) in enumerate(wanted):
        views[name].append((made[i], about))
    return views


def _around(boxes: np.ndarray) -> np.ndarray:
    """The square around boxes, with a margin."""
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    half = (0.5 + MARGIN) * max((high - low).max(), 1.0)
    center = (low + high) / 2
    return np.concatenate([center - half, center + half])


def _view(image: int, pixels: np.ndarray, box: np.ndarray | None) -> View:
    from PIL import Image

    corner = np.zeros(2)
    if box is not None:
        sides = pixels.shape[1::-1]
        x1, y1 = np.floor(np.clip(box[:2], 0, np.array(sides) - 1)).astype(int)
        x2, y2 = np.ceil(np.clip(box[2:], (x1 + 1, y1 + 1), sides)).astype(int)
        corner, pixels = np.array([x1, y1], float), pixels[y1:y2, x1:x2]
    scale = (WHOLE_SIDE if box is None else CROP_SIDE) / max(pixels.shape[:2])
    size = [max(1, round(scale * side)) for side in pixels.shape[1::-1]]
    pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    return View(image, pixels, corner, scale)


def _encode(image: np.ndarray) -> bytes:
    """An image of a batch in as few bytes as a thousand of them need to fit into memory."""
    return encode_image(np.clip(image, 0, 255).astype("uint8"), "JPEG", quality=90)


# === Output ===


def _with_progress(batches, dataset, steps: int | None, verbose: bool):
    cardinality = getattr(dataset, "cardinality", None)
    total = steps or (int(cardinality()) if cardinality else -1)
    bar = keras.utils.Progbar(total if total > 0 else None, verbose=int(verbose), unit_name="batch")
    for batch in batches:
        yield batch
        bar.add(1)


def _without_nan(value):
    """The value for JSON, which has no nan."""
    if isinstance(value, Mapping):
        return {name: _without_nan(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _write(path, text: str) -> None:
    if path is not None:
        with atomic_file(path) as file:
            file.write_text(text, encoding="utf-8")
