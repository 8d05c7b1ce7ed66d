"""Labels that look wrong, given the detections of a trained model."""

import dataclasses

import numpy as np

from keras_resnest.evaluation.box_table import BoxTable
from keras_resnest.evaluation.errors import FOREGROUND
from keras_resnest.evaluation.matching import Pairs

NEAR = 0.1  # lowest IoU of a detection of the same class with a badly placed box
PLACED = 0.7  # IoU from which on a box is well placed
LOWEST_SCORE = 0.2  # of a suspicion
MISSING = 0.3  # highest IoU, with any object, of a detection of an object without label


@dataclasses.dataclass(frozen=True)
class LabelSuspicion:
    """A label that looks wrong."""

    kind: str  # "missing", "wrong class" or "badly placed"
    score: float  # 0 to 1, from less to more suspicious
    image: int  # index of the image
    detection: int  # row of the detection that contradicts
    object: int  # row of the object, -1 for a missing label


def find_suspicious_labels(
    objects: BoxTable, found: BoxTable, pairs: Pairs
) -> list[LabelSuspicion]:
    """Ranks labels that confident detections contradict.

    - Missing: a detection that overlaps no object; its confidence, times 1 - IoU with the nearest.
    - Wrong class: a detection of another class at the object (IoU at least 0.5); its confidence,
      times 1 - confidence of the best detection of the object's own class, and less for two classes
      that contradict each other more often than the average, which the model confuses.
    - Badly placed: the most confident detection of the object's class near it is below IoU 0.7; its
      confidence, times 1 - IoU.

    Each detection and each object appears once, scores below 0.2 and crowds do not. The detections
    must be by falling confidence; `pairs` are all that overlap, of whatever classes.

    Source: the three scores follow Tkachenko et al., "ObjectLab" (arXiv 2309.00832).
    """
    iou, _ = pairs.best(len(found.labels))
    regular = pairs.take(~objects.iscrowd[pairs.objects])
    same = objects.labels[regular.objects] == found.labels[regular.found]
    own_iou, own_object = regular.take(same).best(len(found.labels))
    confidence = found.confidence

    # The most confident pair of each object comes first. A detection contradicts only the object
    # of its class that it is nearest to, and no other class where it has found its own.
    own = regular.take(same & (own_object[regular.found] == regular.objects))
    own = own.take(own.iou >= NEAR)
    placed, first = np.unique(own.objects, return_index=True)
    other = regular.take(
        ~same & (regular.iou >= FOREGROUND) & (own_iou[regular.found] < FOREGROUND)
    )
    swapped, other_first = np.unique(other.objects, return_index=True)
    own_confidence = np.zeros(len(objects.labels))
    at_object = own.take(own.iou >= FOREGROUND)
    np.maximum.at(own_confidence, at_object.objects, confidence[at_object.found])

    missing = np.flatnonzero(iou < MISSING)
    badly = own.iou[first] < PLACED
    rows, near_rows = other.found[other_first], own.found[first][badly]
    wrong = confidence[rows] * (1 - own_confidence[swapped])
    wrong *= _rarity(objects.labels[swapped], found.labels[rows], wrong > 0.5)
    parts = {
        "missing": (confidence[missing] * (1 - iou[missing]), missing, np.full(len(missing), -1)),
        "wrong class": (wrong, rows, swapped),
        "badly placed": (
            confidence[near_rows] * (1 - own.iou[first][badly]),
            near_rows,
            placed[badly],
        ),
    }
    ranked = sorted(
        (-score, kind, row, thing)
        for kind, columns in parts.items()
        for score, row, thing in zip(*(c.tolist() for c in columns), strict=True)
    )
    ranked = [row for row in ranked if -row[0] >= LOWEST_SCORE]
    chosen, used_rows, used_objects = [], set(), {-1}
    for negative, kind, row, thing in ranked:
        is_new = thing == -1 or thing not in used_objects
        if row not in used_rows and is_new:
            chosen.append(LabelSuspicion(kind, -negative, int(found.image[row]), row, thing))
            used_rows.add(row)
            used_objects.add(thing)
    return chosen


def _rarity(labels: np.ndarray, detected: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """How rare each pair of label and detected class is: mean count of all pairs by its own."""
    classes = max(labels.max(initial=0), detected.max(initial=0)) + 1
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels[counted], detected[counted]), 1)
    mean = 1 + counts.sum() / max(classes * (classes - 1), 1)
    return np.minimum(1.0, mean / (1 + counts[labels, detected]))
