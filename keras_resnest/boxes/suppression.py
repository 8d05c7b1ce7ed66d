"""Non-maximum suppression and box voting over the detections of one image.

Pure functions of numpy arrays: one image has a few thousand rows, for which the eager
operations of a backend would cost more than the arithmetic.
"""

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.overlap import pairwise_iou


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


def only_candidates(boxes, confidence, confidence_threshold, k: int):
    """Anchors that are candidates of any image and class, filled up with zeros to k.

    TensorFlow graphs only, where runtimes sort slowly: of OpenVINO's time for decoding and
    suppression three quarters went into sorting all anchors.
    """
    import tensorflow as tf

    chosen = tf.where(tf.reduce_any(confidence > confidence_threshold, axis=(0, 2)))[:, 0]
    missing = [[0, 0], [0, tf.maximum(k - tf.shape(chosen)[0], 0)], [0, 0]]
    return [tf.pad(tf.gather(x, chosen, axis=1), missing) for x in (boxes, confidence)]


def top_k_per_class(boxes, confidence, k: int):
    """The k most confident anchors of every class: (B, C, k, 4) and (B, C, k), falling."""
    num_classes = confidence.shape[2]
    by_class = ops.transpose(confidence, (0, 2, 1))  # (B, C, A)
    values, index = ops.top_k(by_class, k)  # (B, C, k)
    flat = ops.reshape(index, (-1, num_classes * k, 1))
    chosen = ops.take_along_axis(boxes, flat, axis=1)
    return ops.reshape(chosen, (-1, num_classes, k, 4)), values


def suppress_tensorflow(boxes, confidence, confidence_threshold, iou_threshold, max_detections):
    """NMS by TensorFlow's own batched op: standard in every TF Serving, and fast."""
    import tensorflow as tf

    kept = tf.image.combined_non_max_suppression(
        tf.transpose(boxes, (0, 2, 1, 3)),  # (B, k, C, 4)
        tf.transpose(confidence, (0, 2, 1)),  # (B, k, C)
        max_output_size_per_class=boxes.shape[2],
        max_total_size=max_detections,
        iou_threshold=iou_threshold,
        score_threshold=confidence_threshold,
        pad_per_class=False,
        clip_boxes=False,
    )
    return kept[0], kept[1], tf.cast(kept[2], "int32"), kept[3]


def suppress_portable(boxes, confidence, confidence_threshold, iou_threshold, max_detections):
    """The same in `keras.ops`, for the backends and runtimes without such an op."""
    num_classes, k = confidence.shape[1:]
    on_tensorflow = keras.backend.backend() == "tensorflow"
    choose = _survivors_by_matrix if on_tensorflow else _survivors_by_loop
    alive = choose(boxes, confidence > confidence_threshold, iou_threshold)
    scores = ops.reshape(ops.where(alive, confidence, 0.0), (-1, num_classes * k))
    missing = max(0, max_detections - num_classes * k)
    values, index = ops.top_k(scores, max_detections - missing)
    boxes = ops.take_along_axis(ops.reshape(boxes, (-1, num_classes * k, 4)), index[..., None], 1)
    labels = ops.cast(index // k, "int32")
    count = ops.sum(ops.cast(values > confidence_threshold, "int32"), axis=1)
    padded = (ops.pad(x, [[0, 0], [0, missing]]) for x in (values, labels))
    return ops.pad(boxes, [[0, 0], [0, missing], [0, 0]]), *padded, count


def _survivors_by_loop(boxes, candidates, iou_threshold):
    """Greedy suppression, box after box: little memory. Candidates (B, C, k) come first."""
    k = candidates.shape[2]
    position = ops.arange(k, dtype="int32")

    def drop_neighbors(i, alive):
        box = ops.take(boxes, ops.reshape(i, (1,)), axis=2)  # (B, C, 1, 4)
        iou = pairwise_iou(box, boxes)[:, :, 0]  # (B, C, k)
        is_alive = ops.take(alive, ops.reshape(i, (1,)), axis=2)  # (B, C, 1)
        return alive & ~(is_alive & (iou > iou_threshold) & (position > i))

    return ops.fori_loop(0, k, drop_neighbors, candidates)


def _survivors_by_matrix(boxes, candidates, iou_threshold):
    """The same in few steps, for runtimes in which every step costs. TensorFlow graphs only.

    All boxes that no survivor suppresses survive: this is repeated until it changes nothing.
    After n times at least the first n boxes of a class are settled, in practice all soon are.
    """
    import tensorflow as tf

    num_classes, k = candidates.shape[1:]
    # LiteRT slices tensors of few axes only: images and classes are one axis here.
    boxes, candidates = tf.reshape(boxes, (-1, k, 4)), tf.reshape(candidates, (-1, k))
    # Confidence falls, so that behind the last candidate of all classes there is none. They are
    # gathered, not sliced: OpenVINO keeps what slices depend on, the whole network, in float32.
    ranks = tf.range(k)
    chosen = tf.where(tf.reduce_any(candidates, axis=0) | (ranks == 0))[:, 0]
    boxes, candidates = (tf.gather(x, chosen, axis=1) for x in (boxes, candidates))
    comes_later = chosen[None, :] > chosen[:, None]
    overlaps = (pairwise_iou(boxes, boxes) > iou_threshold) & comes_later
    overlaps = tf.cast(overlaps, tf.float32)  # (B * C, chosen, chosen)

    def settle(alive, _):
        suppressed = tf.matmul(tf.cast(alive, tf.float32)[:, None], overlaps)[:, 0] > 0.5
        return candidates & ~suppressed, alive

    def unsettled(alive, before):
        return tf.reduce_any(tf.not_equal(alive, before))

    alive, _ = tf.while_loop(
        unsettled, settle, settle(candidates, None), maximum_iterations=k, parallel_iterations=1
    )
    places = tf.cast(chosen[:, None] == tf.cast(ranks, chosen.dtype)[None], tf.float32)
    alive = tf.matmul(tf.cast(alive, tf.float32), places) > 0.5
    return tf.reshape(alive, (-1, num_classes, k))
