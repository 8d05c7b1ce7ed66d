"""COCO's assignment of detections to objects and its average precision, for all images at once.

The numbers are those of pycocotools, without its loops over images and thresholds in Python.
"""

import dataclasses

import numpy as np

from keras_resnest.evaluation.box_table import BoxTable
from keras_resnest.evaluation.voc import paired_boxes

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).round(2)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100  # per image and class
ANY_AREA = (0.0, 1e10)  # in square pixels
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The P pairs of a detection and an object of the same image that overlap."""

    found: np.ndarray  # (P,) rows of the detections, rising
    objects: np.ndarray  # (P,) rows of the objects
    iou: np.ndarray  # (P,); with a crowd the share of the detection inside it

    def take(self, rows: np.ndarray) -> "Pairs":
        """Returns the given pairs, by bool mask or index."""
        return Pairs(self.found[rows], self.objects[rows], self.iou[rows])

    def best(self, num_found: int) -> tuple[np.ndarray, np.ndarray]:
        """For each detection the highest IoU and the row of the object; 0 and -1 without one."""
        iou, objects = np.zeros(num_found), np.full(num_found, -1)
        order = np.lexsort((self.objects, -self.iou, self.found))
        rows, first = np.unique(self.found[order], return_index=True)
        iou[rows], objects[rows] = self.iou[order[first]], self.objects[order[first]]
        return iou, objects


def by_confidence(found: BoxTable) -> BoxTable:
    """Returns the detections by falling confidence; ties keep their order."""
    return found.take(np.argsort(-found.confidence, kind="stable"))


def rank_in_group(*columns: np.ndarray) -> np.ndarray:
    """How many earlier rows have the same values in all of these columns, for each row."""
    order = np.lexsort(columns)
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.any([np.diff(column[order]) != 0 for column in columns], axis=0)
    first = np.flatnonzero(is_first)
    ranks = np.empty(len(order), int)
    ranks[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return ranks


def overlapping_pairs(objects: BoxTable, found: BoxTable) -> Pairs:
    """Returns all pairs of an image, of whatever classes, that overlap."""
    parts = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for rows, others, iou in paired_boxes(objects, found, objects.image, found.image):
        near = iou > 0.0
        parts.append((rows[near], others[near], iou[near]))
    pairs = Pairs(*map(np.concatenate, zip(*parts, strict=True)))
    crowd = objects.iscrowd[pairs.objects]
    if crowd.any():
        boxes, regions = found.boxes[pairs.found[crowd]], objects.boxes[pairs.objects[crowd]]
        sides = np.minimum(boxes[:, 2:], regions[:, 2:]) - np.maximum(boxes[:, :2], regions[:, :2])
        own_area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        pairs.iou[crowd] = sides.prod(axis=1) / own_area
    return pairs


def of_same_class(pairs: Pairs, objects: BoxTable, found: BoxTable) -> Pairs:
    """Returns the pairs whose detection has the class of the object."""
    return pairs.take(objects.labels[pairs.objects] == found.labels[pairs.found])


def assign_objects(
    pairs: Pairs, objects: BoxTable, found: BoxTable, thresholds, ignored: np.ndarray | None = None
) -> np.ndarray:
    """Assigns objects to detections, the most confident first, as COCO does.

    Each detection takes, of the objects that no earlier one has, the one with the highest IoU that
    reaches the threshold; an ignored one only if there is no other. Crowds can be taken again.

    Args:
        pairs: the pairs that may be assigned.
        objects: N objects.
        found: D detections by falling confidence.
        thresholds: T IoU thresholds.
        ignored: bool (N,); default the crowds.

    Returns:
        (T, D) rows of the assigned objects, -1 for none.
    """
    limits = np.minimum(np.asarray(thresholds), 1 - 1e-10)[:, None]
    ignored = objects.iscrowd if ignored is None else ignored
    assigned = np.full((len(limits), len(found.labels)), -1)
    free = np.ones((len(limits), len(objects.labels)), bool)
    pairs = pairs.take(pairs.iou >= limits.min())
    # COCO prefers the later of objects with the same IoU.
    order = np.lexsort((-pairs.objects, -pairs.iou, pairs.found))
    pairs = pairs.take(order)
    candidates = np.unique(pairs.found)
    turn = np.zeros(len(found.labels), int)
    turn[candidates] = rank_in_group(found.image[candidates])
    # The pairs of one step are of different images, so that all of them are decided at once.
    step = (turn[pairs.found], ignored[pairs.objects], rank_in_group(pairs.found))
    order = np.lexsort(step[::-1])
    changes = np.any([np.diff(column[order]) != 0 for column in step], axis=0)
    for rows in np.split(order, np.flatnonzero(changes) + 1):
        own, wanted = pairs.found[rows], pairs.objects[rows]
        takes = (pairs.iou[rows] >= limits) & free[:, wanted] & (assigned[:, own] < 0)
        assigned[:, own] = np.where(takes, wanted, assigned[:, own])
        free[:, wanted] &= ~takes | objects.iscrowd[wanted]
    return assigned


def sampled_precision(
    labels: np.ndarray, positive: np.ndarray, counted: np.ndarray, num_objects: np.ndarray
) -> np.ndarray:
    """COCO's average precision: the mean precision at 101 recalls.

    Args:
        labels: (D,) classes of the detections, by falling confidence.
        positive: (T, D) bool, whether a detection is a true positive.
        counted: (T, D) bool, whether it counts at all.
        num_objects: (C,) objects of each class.

    Returns:
        (T, C) values; nan for a class without objects.
    """
    precision = np.zeros((len(positive), len(RECALLS), len(num_objects)))
    for label, count in enumerate(num_objects):
        own = np.flatnonzero(labels == label)
        for row in range(len(positive)):
            hits = positive[row, own[counted[row, own]]]
            tp = np.cumsum(hits)
            values = tp / (np.arange(1, len(tp) + 1) + np.spacing(1))
            envelope = np.maximum.accumulate(values[::-1])[::-1]
            at = np.searchsorted(tp / max(count, 1), RECALLS, side="left")
            precision[row, :, label] = np.append(envelope, 0.0)[at]
    return np.where(num_objects == 0, np.nan, precision.mean(axis=1))


def average_precision(
    objects: BoxTable,
    found: BoxTable,
    num_classes: int,
    pairs: Pairs | None = None,
    area: tuple[float, float] = ANY_AREA,
    thresholds=IOU_THRESHOLDS,
) -> np.ndarray:
    """Returns COCO's average precision (T thresholds, classes); nan for a class without objects.

    `found` must be by falling confidence if their `pairs` of the same class are given. Objects
    count whose area, in square pixels, is within `area`.
    """
    if pairs is None:
        found = by_confidence(found)
        pairs = of_same_class(overlapping_pairs(objects, found), objects, found)
    outcomes = count_outcomes(objects, found, num_classes, pairs, area, thresholds)
    return sampled_precision(found.labels, *outcomes)


def count_outcomes(
    objects: BoxTable,
    found: BoxTable,
    num_classes: int,
    pairs: Pairs,
    area: tuple[float, float],
    thresholds=IOU_THRESHOLDS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arguments as in `average_precision`; returns the last three of `sampled_precision`."""
    considered = rank_in_group(found.image, found.labels) < MAX_DETECTIONS
    ignored = objects.iscrowd | (objects.area < area[0]) | (objects.area > area[1])
    pairs = pairs.take(considered[pairs.found])
    assigned = assign_objects(pairs, objects, found, thresholds, ignored)
    is_assigned = assigned >= 0
    takes_ignored = is_assigned & np.append(ignored, False)[assigned]
    outside = (found.area < area[0]) | (found.area > area[1])
    counted = considered & ~takes_ignored & (is_assigned | ~outside)
    num_objects = np.bincount(objects.labels[~ignored], minlength=num_classes)
    return is_assigned & counted, counted, num_objects
