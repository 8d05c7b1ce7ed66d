"""Non-maximum suppression (NMS) of a batch, and of the detections of one image with NumPy."""

import functools
from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.overlap import pairwise_diou, pairwise_iou
from keras_resnest.checks import checked

Suppression = Literal["greedy", "diou", "soft"]


# === A batch, in the graph ===


def suppress_batch(
    boxes,
    confidence,
    confidence_threshold: float | Sequence[float],
    iou_threshold: float,
    pre_nms_top_k: int,
    max_detections: int,
    portable: bool = False,
    suppression: Suppression = "greedy",
    class_agnostic: bool = False,
    voting_iou: float | None = None,
    exclusive_classes: bool = False,
):
    """Applies NMS to each class of each image of a batch.

    Args:
        boxes: `"xyxy"` boxes of shape `(batch, anchors, 4)`.
        confidence: tensor of shape `(batch, anchors, classes)`.
        confidence_threshold: lowest confidence of a detection, exclusive; or one for each class.
        iou_threshold: a box is dropped if its IoU with a more confident box of its class
            exceeds this.
        pre_nms_top_k: number of most confident boxes per class that enter NMS.
        max_detections: number of detections per image, over all classes.
        portable: whether to use elementary operations, which every runtime has, instead of
            TensorFlow's NMS operation. The results are equal.
        suppression: see `DetectionDecoder`.
        class_agnostic: whether each box keeps only its best class, and all classes count as one.
        voting_iou: lowest IoU of the boxes that vote, or None, see `DetectionDecoder`.
        exclusive_classes: whether classes compete for an object, see `DetectionDecoder`.

    Returns:
        Boxes `(batch, max_detections, 4)`, confidence and int32 labels
        `(batch, max_detections)`, by falling confidence, and the number of detections
        `(batch,)`. The values of further rows are arbitrary.
    """
    limits = None
    if not isinstance(confidence_threshold, float):
        limits = ops.convert_to_tensor(confidence_threshold, "float32")
        confidence_threshold = min(confidence_threshold)
        if not class_agnostic:
            confidence = ops.where(confidence > limits, confidence, 0.0)
    k = min(pre_nms_top_k, confidence.shape[1])
    thresholds = confidence_threshold, iou_threshold
    on_tensorflow = keras.backend.backend() == "tensorflow"
    native = on_tensorflow and suppression == "greedy" and not (portable or class_agnostic)
    if on_tensorflow and not native:
        boxes, confidence = _drop_other_anchors(boxes, confidence, confidence_threshold, k)
    rows = [boxes]
    if class_agnostic:
        confidence, labels = ops.top_k(confidence, 1)  # (B, A, 1)
        rows.append(ops.cast(labels, "int32"))
        if limits is not None:
            confidence = ops.where(confidence > ops.take(limits, rows[1]), confidence, 0.0)
    rows, confidence = _top_k_per_class(rows, confidence, k)
    if native:
        found = _suppress_native(rows[0], confidence, *thresholds, max_detections)
    else:
        if suppression == "soft":
            lowest = confidence_threshold
            if limits is not None:  # (B, C, k) or (C, 1)
                lowest = ops.take(limits, rows[1][..., 0]) if class_agnostic else limits[:, None]
            lower = functools.partial(
                _lower_neighbors, rows[0], lowest, iou_threshold, max_detections
            )
        else:
            overlap = pairwise_diou if suppression == "diou" else pairwise_iou
            lower = functools.partial(_drop_neighbors, rows[0], *thresholds, overlap)
        if on_tensorflow and not portable:
            lowered = _lower_in_two_steps(lower, confidence, confidence_threshold, max_detections)
        else:
            lowered = lower(confidence)
        found = _most_confident(rows, lowered, confidence_threshold, max_detections)
    if voting_iou is not None:
        kept, *others = found
        group = ops.zeros_like(others[1]) if class_agnostic else others[1]
        voters = rows[0], ops.where(confidence > confidence_threshold, confidence, 0.0)
        found = _vote(kept, group, *voters, voting_iou), *others
    if exclusive_classes:
        found = _compete(*found, confidence_threshold if limits is None else limits, iou_threshold)
    return found


def _compete(boxes, confidence, labels, count, limits, iou_threshold: float):
    """Lets classes compete; detections (B, n) that fall to their limit or below are dropped."""
    n = confidence.shape[1]
    real = ops.arange(n, dtype="int32") < count[:, None]
    confidence = ops.where(real, confidence, 0.0)
    others = ops.not_equal(labels[:, :, None], labels[:, None])  # (B, n, n)
    rivals = others & (confidence[:, None] > confidence[:, :, None])
    rivals = rivals & (pairwise_iou(boxes, boxes) > iou_threshold)
    chances = ops.where(rivals, 1.0 - confidence[:, None], 1.0)
    confidence = confidence * ops.sqrt(ops.prod(chances, axis=2))
    if not isinstance(limits, float):
        limits = ops.take(limits, labels)
    confidence, order = ops.top_k(ops.where(confidence > limits, confidence, 0.0), n)
    boxes = ops.take_along_axis(boxes, order[..., None], axis=1)
    labels = ops.take_along_axis(labels, order, axis=1)
    return boxes, confidence, labels, ops.sum(ops.cast(confidence > 0.0, "int32"), axis=1)


def _vote(kept, group, boxes, confidence, voting_iou: float):
    """As `vote_boxes`: `kept` (B, n, 4) of the classes `group` (B, n), voters (B, C, k, 4)."""
    num_classes, k = confidence.shape[1:]
    first = num_classes * ops.arange(ops.shape(kept)[0], dtype="int32")[:, None]
    group = ops.reshape(group + first, (-1,))  # (B * n,)
    # Rows are taken whole: gathering single boxes is slow.
    boxes = ops.take(ops.reshape(boxes, (-1, k * 4)), group, axis=0)
    boxes = ops.reshape(boxes, (-1, k, 4))
    confidence = ops.take(ops.reshape(confidence, (-1, k)), group, axis=0)
    single = ops.reshape(kept, (-1, 1, 4))
    near = pairwise_iou(single, boxes)[:, 0] >= voting_iou  # (B * n, k)
    weights = ops.where(near, confidence, 0.0)[:, None]
    total = ops.sum(weights, axis=2, keepdims=True)
    # A diverged box has no weight, and must not enter as 0 * inf.
    mean = ops.matmul(weights, ops.where(near[..., None], boxes, 0.0))
    voted = ops.where(total > 0.0, mean / ops.where(total > 0.0, total, 1.0), single)
    return ops.reshape(voted, ops.shape(kept))


def _drop_other_anchors(boxes, confidence, confidence_threshold, k: int):
    """Keeps the anchors that are candidates in any image and class, padded to at least k.

    TensorFlow graphs may run in other runtimes, which sort slowly: sorting all anchors took three
    quarters of OpenVINO's time for decoding and NMS.
    """
    import tensorflow as tf

    chosen = tf.where(tf.reduce_any(confidence > confidence_threshold, axis=(0, 2)))[:, 0]
    missing = [[0, 0], [0, tf.maximum(k - tf.shape(chosen)[0], 0)], [0, 0]]
    return [tf.pad(tf.gather(x, chosen, axis=1), missing) for x in (boxes, confidence)]


def _top_k_per_class(rows, confidence, k: int):
    """The k most confident rows of every class: each (B, C, k, columns), confidence (B, C, k)."""
    num_classes = confidence.shape[2]
    values, index = ops.top_k(ops.transpose(confidence, (0, 2, 1)), k)  # (B, C, k)
    flat = ops.reshape(index, (-1, num_classes * k, 1))
    chosen = [ops.take_along_axis(x, flat, axis=1) for x in rows]
    return [ops.reshape(x, (-1, num_classes, k, x.shape[-1])) for x in chosen], values


def _suppress_native(boxes, confidence, confidence_threshold, iou_threshold, max_detections: int):
    """Uses TensorFlow's batched NMS: fast, and part of every TensorFlow Serving."""
    import tensorflow as tf

    boxes, confidence, labels, count = tf.image.combined_non_max_suppression(
        tf.transpose(boxes, (0, 2, 1, 3)),  # (B, k, C, 4)
        tf.transpose(confidence, (0, 2, 1)),  # (B, k, C)
        max_output_size_per_class=boxes.shape[2],
        max_total_size=max_detections,
        iou_threshold=iou_threshold,
        score_threshold=confidence_threshold,
        pad_per_class=False,
        clip_boxes=False,
    )
    return boxes, confidence, tf.cast(labels, "int32"), count


def _most_confident(rows, confidence, confidence_threshold, max_detections: int):
    """The most confident rows of all classes. `rows` are boxes, and labels if there are any."""
    num_classes, k = confidence.shape[1:]
    total = num_classes * k
    missing = max(0, max_detections - total)
    confidence, index = ops.top_k(ops.reshape(confidence, (-1, total)), max_detections - missing)
    boxes, *labels = (
        ops.take_along_axis(ops.reshape(x, (-1, total, x.shape[-1])), index[..., None], axis=1)
        for x in rows
    )
    labels = labels[0][..., 0] if labels else ops.cast(index // k, "int32")
    count = ops.sum(ops.cast(confidence > confidence_threshold, "int32"), axis=1)
    boxes = ops.pad(boxes, [[0, 0], [0, missing], [0, 0]])
    confidence, labels = (ops.pad(x, [[0, 0], [0, missing]]) for x in (confidence, labels))
    return boxes, confidence, labels, count


def _lower_in_two_steps(lower, confidence, confidence_threshold, max_detections: int):
    """Lets all candidates compete only if the most confident ones are not enough.

    Where each anchor is a candidate of each of 80 classes, few of them take a tenth of the time.
    """
    import tensorflow as tf

    total, few = confidence.shape[1] * confidence.shape[2], 4 * max_detections
    if total <= few:
        return lower(confidence)
    lowest = tf.math.top_k(tf.reshape(confidence, (-1, total)), few)[0][:, -1, None, None]
    lowered = lower(tf.where(confidence >= lowest, confidence, 0.0))
    others = (confidence < lowest) & (confidence > confidence_threshold)
    enough = tf.math.count_nonzero(lowered >= lowest, axis=(1, 2)) >= max_detections
    enough = tf.reduce_all(enough | ~tf.reduce_any(others, axis=(1, 2)))
    return tf.cond(enough, lambda: lowered, lambda: lower(confidence))


def _lower_neighbors(boxes, confidence_threshold, iou_threshold, max_detections: int, confidence):
    """Soft NMS with the linear weight: each choice lowers the confidence of its neighbors.

    After `max_detections` choices no other box of the class can become a detection.
    """
    num_classes, k = confidence.shape[1:]
    boxes = ops.reshape(boxes, (-1, k, 4))
    ranks = ops.arange(k, dtype="int32")
    limits = ops.reshape(confidence * 0.0 + confidence_threshold, (-1, k))

    def choose(confidence, waiting):
        # `argmax` of Keras is unknown to other runtimes.
        rank = ops.top_k(ops.where(waiting, confidence, -1.0), 1)[1]  # (B * C, 1)
        chosen = ops.take_along_axis(boxes, rank[:, :, None], axis=1)
        iou = pairwise_iou(chosen, boxes)[:, 0]  # (B * C, k)
        waiting = waiting & ops.not_equal(ranks, ops.cast(rank, "int32"))
        near = waiting & (iou > iou_threshold)
        confidence = ops.where(near, confidence * (1.0 - iou), confidence)
        return confidence, waiting & (confidence > limits)

    confidence = ops.reshape(confidence, (-1, k))
    waiting = confidence > limits
    confidence, _ = ops.while_loop(
        lambda _, waiting: ops.any(waiting),
        choose,
        (confidence, waiting),
        maximum_iterations=min(k, max_detections),
    )
    confidence = ops.where(confidence > limits, confidence, 0.0)
    return ops.reshape(confidence, (-1, num_classes, k))


def _drop_neighbors(boxes, confidence_threshold, iou_threshold, overlap, confidence):
    """NMS: the confidence of suppressed boxes is 0."""
    alive = _survivors(boxes, confidence > confidence_threshold, iou_threshold, overlap)
    return ops.where(alive, confidence, 0.0)


def _survivors(boxes, candidates, iou_threshold, overlap):
    """Greedy NMS in a few large steps: many small ones are slow on accelerators and other runtimes.

    Repeats "a candidate survives if no survivor suppresses it" until nothing changes. After n
    rounds the first n boxes of a class are final; in practice all are after a few. `boxes`
    (B, C, k, 4) and `candidates` (B, C, k) are sorted by falling confidence.
    """
    num_classes, k = candidates.shape[1:]
    # LiteRT slices only tensors with few axes, so images and classes share one.
    boxes = ops.reshape(boxes, (-1, k, 4))
    candidates = ops.reshape(candidates, (-1, k))
    ranks = chosen = ops.arange(k, dtype="int32")
    on_tensorflow = keras.backend.backend() == "tensorflow"
    if on_tensorflow:
        boxes, candidates, chosen = _drop_other_ranks(boxes, candidates)
    comes_later = chosen[None, :] > chosen[:, None]
    suppresses = (overlap(boxes, boxes) > iou_threshold) & comes_later
    if on_tensorflow:  # which, like the runtimes of its exports, is slow at reducing booleans
        suppresses = ops.cast(suppresses, "float32")  # (B * C, chosen, chosen)

    def settle(alive, _):
        if on_tensorflow:
            suppressed = ops.matmul(ops.cast(alive, "float32")[:, None], suppresses)[:, 0] > 0.5
        else:
            suppressed = ops.any(alive[:, :, None] & suppresses, axis=1)
        return candidates & ~suppressed, alive

    def changed(alive, before):
        return ops.any(ops.not_equal(alive, before))  # LiteRT does not support `!=`

    alive, _ = ops.while_loop(changed, settle, settle(candidates, None), maximum_iterations=k)
    places = ops.cast(chosen[:, None] == ranks, "float32")
    alive = ops.matmul(ops.cast(alive, "float32"), places) > 0.5
    return ops.reshape(alive, (-1, num_classes, k))


def _drop_other_ranks(boxes, candidates):
    """Keeps the ranks that have a candidate in any class; also returns these ranks.

    They are gathered, not sliced: OpenVINO keeps everything a slice depends on, the whole
    network, in float32.
    """
    import tensorflow as tf

    wanted = tf.reduce_any(candidates, axis=0) | (tf.range(tf.shape(candidates)[1]) == 0)
    chosen = tf.where(wanted)[:, 0]
    boxes, candidates = (tf.gather(x, chosen, axis=1) for x in (boxes, candidates))
    return boxes, candidates, tf.cast(chosen, "int32")


# === The detections of one image, with NumPy ===


@checked
def suppress_boxes(
    boxes: np.ndarray,
    confidence: np.ndarray,
    labels: np.ndarray,
    iou_threshold: float = 0.45,
    suppression: Suppression = "greedy",
    class_agnostic: bool = False,
) -> np.ndarray:
    """Applies NMS to each class of the detections of one image.

    Args:
        boxes: `"xyxy"` boxes of shape `(n, 4)`.
        confidence: array of shape `(n,)`.
        labels: int array of shape `(n,)`; rows with label -1 are padding and never kept.
        iou_threshold: a box is dropped if its IoU with a more confident box of its class
            exceeds this.
        suppression: see `DetectionDecoder`. `"soft"` keeps all boxes that
            `lower_confidence` leaves above 0.
        class_agnostic: whether boxes of different classes suppress each other.

    Returns:
        Indices of the kept rows, by falling confidence.

    Raises:
        ValueError: if the numbers of rows differ.

    Example:
        >>> suppress_boxes([[0, 0, 9, 9], [0, 0, 9, 10]], [0.8, 0.9], [0, 0])
        array([1])
    """
    if suppression == "soft":
        confidence = lower_confidence(boxes, confidence, labels, iou_threshold, class_agnostic)
        order = np.argsort(-confidence, kind="stable")
        return order[confidence[order] > 0]
    boxes, confidence, labels = _as_arrays(boxes, confidence, labels)
    overlap = pairwise_diou if suppression == "diou" else pairwise_iou
    groups = np.minimum(labels, 0) if class_agnostic else labels
    kept = []
    for group in np.unique(groups[groups >= 0]):
        rows = np.flatnonzero(groups == group)
        rows = rows[np.argsort(-confidence[rows], kind="stable")]
        while len(rows):
            kept.append(rows[0])
            overlaps = overlap(boxes[rows[:1]], boxes[rows[1:]])[0]
            rows = rows[1:][overlaps <= iou_threshold]
    kept = np.array(kept, int)
    return kept[np.argsort(-confidence[kept], kind="stable")]


@checked
def lower_confidence(
    boxes: np.ndarray,
    confidence: np.ndarray,
    labels: np.ndarray,
    iou_threshold: float = 0.45,
    class_agnostic: bool = False,
    passes=None,
) -> np.ndarray:
    """Applies soft NMS with the linear weight to the detections of one image.

    The most confident box multiplies the confidence of each other box of its class whose IoU
    exceeds `iou_threshold` by 1 - IoU; then the most confident one of the others, and so on.

    Args:
        boxes: `"xyxy"` boxes of shape `(n, 4)`.
        confidence: array of shape `(n,)`.
        labels: int array of shape `(n,)`; rows with label -1 are padding.
        iou_threshold: lowest IoU, exclusive, of boxes that count as neighbors.
        class_agnostic: whether boxes of different classes are neighbors.
        passes: optional int array of shape `(n,)`: boxes of the same pass do not lower each other,
            because a decoder has done this.

    Returns:
        float64 confidence of shape `(n,)`; 0 for padding.

    Example:
        >>> lower_confidence([[0, 0, 9, 9], [0, 0, 9, 10]], [0.8, 0.9], [0, 0])
        array([0.08, 0.9 ])

    Source: Bodla et al., "Soft-NMS", arXiv 1704.04503, section 3, equation for `s_i`.
    """
    boxes, confidence, labels = _as_arrays(boxes, confidence, labels)
    groups = np.minimum(labels, 0) if class_agnostic else labels
    passes = np.arange(len(labels)) if passes is None else np.asarray(passes)
    confidence = np.where(labels >= 0, confidence, 0.0)
    waiting = confidence > 0
    while waiting.any():
        best = np.argmax(np.where(waiting, confidence, -1.0))
        waiting[best] = False
        others = waiting & (groups == groups[best]) & (passes != passes[best])
        iou = pairwise_iou(boxes[best : best + 1], boxes[others])[0]
        confidence[others] *= np.where(iou > iou_threshold, 1.0 - iou, 1.0)
        waiting &= confidence > 0
    return confidence


@checked
def vote_boxes(
    kept_boxes: np.ndarray,
    kept_labels: np.ndarray,
    boxes: np.ndarray,
    confidence: np.ndarray,
    labels: np.ndarray,
    voting_iou: float = 0.5,
) -> np.ndarray:
    """Replaces each box that survived NMS by the mean of its neighbors ("box voting").

    The mean is weighted by confidence, over all boxes of the same class whose IoU with the kept
    box is at least `voting_iou`, including the box itself.

    Args:
        kept_boxes: `"xyxy"` boxes of shape `(k, 4)` that survived NMS.
        kept_labels: int array of shape `(k,)`; rows with label -1 are padding and do not change.
        boxes: `"xyxy"` boxes of shape `(n, 4)` before NMS.
        confidence: array of shape `(n,)`, not negative.
        labels: int array of shape `(n,)`; rows with label -1 are padding and have no vote.
        voting_iou: lowest IoU of a voter, 0 to 1.

    Returns:
        float64 boxes of shape `(k, 4)`. A box without voters does not change.

    Example:
        >>> vote_boxes([[0, 0, 8, 8]], [0], [[0, 0, 8, 8], [0, 0, 8, 10]], [0.6, 0.2], [0, 0])
        array([[0. , 0. , 8. , 8.5]])

    Source: Gidaris and Komodakis, "Object detection via a multi-region and semantic
    segmentation-aware CNN model" (arXiv 1505.01749) section 5. RefineDet's `bbox_vote` has both
    thresholds at 0.45 and lets a box vote only for its most confident neighbor.
    """
    boxes, confidence, labels = _as_arrays(boxes, confidence, labels)
    kept_boxes = np.asarray(kept_boxes, "float64").reshape(-1, 4)
    kept_labels = np.asarray(kept_labels)
    voted = kept_boxes.copy()
    for label in np.unique(kept_labels[kept_labels >= 0]):
        kept, voters = kept_labels == label, labels == label
        iou = pairwise_iou(kept_boxes[kept], boxes[voters])
        weights = (iou >= voting_iou) * confidence[voters]
        total = weights.sum(axis=1, keepdims=True)
        mean = weights @ boxes[voters] / np.where(total > 0, total, 1.0)
        voted[kept] = np.where(total > 0, mean, kept_boxes[kept])
    return voted


def _as_arrays(boxes, confidence, labels):
    boxes = np.asarray(boxes, "float64").reshape(-1, 4)
    confidence, labels = np.asarray(confidence, "float64"), np.asarray(labels)
    if not confidence.shape == labels.shape == (len(boxes),):
        raise ValueError(
            "`boxes`, `confidence` and `labels` must have the same number of rows. Received: "
            f"{len(boxes)} boxes, confidence {confidence.shape}, labels {labels.shape}"
        )
    return boxes, confidence, labels
