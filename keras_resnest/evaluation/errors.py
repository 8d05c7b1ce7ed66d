"""Kinds of error and what each costs in average precision (TIDE)."""

import dataclasses

import numpy as np

from keras_resnest.evaluation.box_table import BoxTable
from keras_resnest.evaluation.matching import (
    MAX_DETECTIONS,
    Pairs,
    rank_in_group,
    sampled_precision,
)
from keras_resnest.evaluation.voc import nan_mean

FOREGROUND = 0.5  # lowest IoU of a detection with its object
BACKGROUND = 0.1  # highest IoU of a detection on background
KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
DESCRIPTIONS = (
    "the box is right, the class is not",
    "the class is right, the IoU with the object is 0.1 to 0.5",
    "neither the class nor the box is right",
    "the object has a more confident detection",
    "there is no object",
    "no detection is near the object",
)


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """Kinds of error of D detections and N objects."""

    kind: np.ndarray  # (D,) index of `KINDS`; -1 for a detection that is right or does not count
    missed: np.ndarray  # (N,) bool, whether no detection is near the object
    counts: dict[str, int]  # number of errors by name of the kind
    # Gain in AP at IoU 0.5, 0 to 1, if the errors of a kind were mended, by name; also "false
    # positives" and "false negatives", if all of these were
    costs: dict[str, float]
    average_precision: float  # AP at IoU 0.5 of the detections as they are


def analyze_errors(
    objects: BoxTable, found: BoxTable, pairs: Pairs, assigned: np.ndarray, num_classes: int
) -> ErrorAnalysis:
    """Sorts errors by kind and computes what each kind costs.

    A kind is mended thus: a wrong class or box becomes right if it is the most confident one at
    an object without detection, and disappears otherwise; duplicates, background and detections
    of which neither is right disappear; missed objects are not counted. As in TIDE, the 100 most
    confident detections of each image count.

    The detections must be by falling confidence. `pairs` are all that overlap, of whatever classes;
    `assigned` has the row of the object that each detection has at IoU 0.5, or -1.

    Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors",
    arXiv 2008.08115.
    """
    regular = pairs.take(~objects.iscrowd[pairs.objects])
    same = objects.labels[regular.objects] == found.labels[regular.found]
    count = len(found.labels)
    own_iou, own = regular.take(same).best(count)
    other_iou, other = regular.take(~same).best(count)
    considered = rank_in_group(found.image) < MAX_DETECTIONS
    positive = considered & (assigned >= 0) & ~np.append(objects.iscrowd, False)[assigned]
    is_error = considered & (assigned < 0)
    conditions = {
        "localization": (own_iou >= BACKGROUND) & (own_iou <= FOREGROUND),
        "classification": other_iou >= FOREGROUND,
        "duplicate": own_iou >= FOREGROUND,
        "background": np.maximum(own_iou, other_iou) <= BACKGROUND,
    }
    kind = np.select(list(conditions.values()), [KINDS.index(k) for k in conditions], 2)
    kind = np.where(is_error, kind, -1)

    # The object that a wrong class or box could have, and the surest detection of each.
    near = np.where(kind == 0, other, np.where(kind == 1, own, -1))
    is_free = ~objects.iscrowd
    is_free[assigned[positive]] = False
    candidates = np.flatnonzero((near >= 0) & is_free[near])
    usable, first = np.unique(near[candidates], return_index=True)
    is_mendable = np.zeros(count, bool)
    is_mendable[candidates[first]] = True
    missed = is_free.copy()
    missed[usable] = False

    num_objects = np.bincount(objects.labels[~objects.iscrowd], minlength=num_classes)
    exists = num_objects > 0

    def precision(labels, positive, counted, fewer=missed & False, order=slice(None)):
        remaining = num_objects - np.bincount(objects.labels[fewer], minlength=num_classes)
        columns = labels[order], positive[None, order], counted[None, order]
        values = sampled_precision(*columns, remaining)[0]
        has_rows = np.bincount(labels[counted], minlength=num_classes) > 0
        return nan_mean(np.where((remaining == 0) & has_rows, 0.0, values)[exists])

    columns = found.labels, positive, positive | is_error
    base = precision(*columns)
    mended = {}
    for number, name in enumerate(KINDS[:-1]):
        right = is_mendable & (kind == number)
        labels = np.where(right, objects.labels[near], found.labels) if count else found.labels
        mended[name] = precision(labels, positive | right, columns[2] & ((kind != number) | right))
    mended["missed"] = precision(*columns, fewer=missed)
    mended["false positives"] = precision(*columns, order=np.argsort(~positive, kind="stable"))
    mended["false negatives"] = precision(*columns, fewer=is_free)
    counts = np.append(np.bincount(kind[is_error], minlength=5), missed.sum())
    return ErrorAnalysis(
        kind,
        missed,
        dict(zip(KINDS, counts.tolist(), strict=True)),
        {name: max(value - base, 0.0) for name, value in mended.items()},
        base,
    )
