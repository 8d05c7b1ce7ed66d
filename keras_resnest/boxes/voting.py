"""Non-maximum suppression and box voting over the detections of one image.

Pure functions of numpy arrays: one image has a few thousand rows, for which the eager
operations of a backend would cost more than the arithmetic.
"""

import numpy as np


def suppress_boxes(boxes, confidence, labels, iou_threshold: float = 0.45) -> np.ndarray:
    """Greedy non-maximum suppression, each class for itself.

    Args:
        boxes: `"xyxy"`, (n, 4).
        confidence: (n,).
        labels: int, (n,); rows of label -1 are padding and never kept.
        iou_threshold: of two boxes of one class whose IoU is above, the less confident
            one is dropped.

    Returns:
        Indices of the rows that are kept, by falling confidence.

    Example:

    >>> suppress_boxes([[0, 0, 9, 9], [0, 0, 9, 10]], [0.8, 0.9], [0, 0])
    array([1])
    """
    boxes, confidence, labels = _arrays(boxes, confidence, labels)
    kept = []
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(-confidence[rows], kind="stable")]
        while len(rows):
            kept.append(rows[0])
            rows = rows[1:][_iou(boxes[rows[:1]], boxes[rows[1:]])[0] <= iou_threshold]
    kept = np.array(kept, int)
    return kept[np.argsort(-confidence[kept], kind="stable")]


def vote_boxes(
    kept_boxes, kept_labels, boxes, confidence, labels, voting_iou: float = 0.5
) -> np.ndarray:
    """Moves each kept box to the mean of the boxes that agree with it.

    The mean is weighted by confidence and taken over all boxes of the same class whose IoU
    with the kept box is at least `voting_iou`, itself among them.

    Args:
        kept_boxes: `"xyxy"`, (k, 4): what non-maximum suppression kept.
        kept_labels: int, (k,); rows of label -1 are padding and stay as they are.
        boxes: `"xyxy"`, (n, 4): all boxes, before suppression.
        confidence: (n,), not negative.
        labels: int, (n,); rows of label -1 are padding and have no vote.
        voting_iou: lowest IoU of a vote, 0 to 1.

    Returns:
        float64 boxes (k, 4). A box that nobody votes for stays where it is.

    Source: Gidaris and Komodakis, "Object detection via a multi-region and semantic
    segmentation-aware CNN model", arXiv 1505.01749, section 5. RefineDet's `bbox_vote` has
    both thresholds at 0.45, and a box votes for the most confident of its neighbors alone.

    Example:

    >>> vote_boxes([[0, 0, 8, 8]], [0], [[0, 0, 8, 8], [0, 0, 8, 10]], [0.6, 0.2], [0, 0])
    array([[0. , 0. , 8. , 8.5]])
    """
    boxes, confidence, labels = _arrays(boxes, confidence, labels)
    kept_boxes, kept_labels = np.asarray(kept_boxes, "float64"), np.asarray(kept_labels)
    kept_boxes = kept_boxes.reshape(-1, 4)
    voted = kept_boxes.copy()
    for label in np.unique(kept_labels[kept_labels >= 0]):
        kept, voters = kept_labels == label, labels == label
        weights = (_iou(kept_boxes[kept], boxes[voters]) >= voting_iou) * confidence[voters]
        total = weights.sum(axis=1, keepdims=True)
        mean = weights @ boxes[voters] / np.where(total > 0, total, 1.0)
        voted[kept] = np.where(total > 0, mean, kept_boxes[kept])
    return voted


def _arrays(boxes, confidence, labels):
    boxes = np.asarray(boxes, "float64").reshape(-1, 4)
    confidence, labels = np.asarray(confidence, "float64"), np.asarray(labels)
    if not confidence.shape == labels.shape == (len(boxes),):
        raise ValueError(
            "`boxes`, `confidence` and `labels` must have as many rows. Received: "
            f"{len(boxes)} boxes, confidence {confidence.shape}, labels {labels.shape}"
        )
    return boxes, confidence, labels


def _iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """(k, n) IoU; 0 where a box has no area."""
    corner1 = np.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    corner2 = np.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    intersection = np.maximum(corner2 - corner1, 0.0).prod(axis=-1)
    area1, area2 = (np.maximum(b[:, 2:] - b[:, :2], 0.0).prod(axis=1) for b in (boxes1, boxes2))
    union = area1[:, None] + area2[None] - intersection
    return np.where(intersection > 0.0, intersection / np.where(union > 0.0, union, 1.0), 0.0)
