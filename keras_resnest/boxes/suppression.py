"""Non-maximum suppression (NMS) of a batch, and of the detections of one image with NumPy."""

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.overlap import pairwise_diou, pairwise_iou

SUPPRESSIONS = ("greedy", "diou", "soft")

# === A batch, in the graph ===


def suppress_batch(
    boxes,
    confidence,
    confidence_threshold: float,
    iou_threshold: float,
    pre_nms_top_k: int,
    max_detections: int,
    portable: bool = False,
    suppression: str = "greedy",
    class_agnostic: bool = False,
):
    """Applies NMS to each class of each image of a batch.

    Args:
        boxes: `"xyxy"` boxes of shape `(batch, anchors, 4)`.
        confidence: tensor of shape `(batch, anchors, classes)`.
        confidence_threshold: lowest confidence of a detection, exclusive.
        iou_threshold: a box is dropped if its IoU with a more confident box of its class
            exceeds this.
        pre_nms_top_k: number of most confident boxes per class that enter NMS.
        max_detections: number of detections per image, over all classes.
        portable: whether to use elementary operations, which every runtime has, instead of
            TensorFlow's NMS operation. The results are equal.
        suppression: one of `SUPPRESSIONS`, see `DetectionDecoder`.
        class_agnostic: whether boxes of different classes suppress each other.

    Returns:
        Boxes `(batch, max_detections, 4)`, confidence and int32 labels
        `(batch, max_detections)`, by falling confidence, and the number of detections
        `(batch,)`. The values of further rows are arbitrary.
    """
    if class_agnostic:
        # A box loses its other classes to its best one. The label travels as a fifth column.
        labels = ops.cast(ops.argmax(confidence, axis=-1), boxes.dtype)[..., None]
        boxes = ops.concatenate([boxes, labels], axis=-1)
        confidence = ops.max(confidence, axis=-1, keepdims=True)
    k = min(pre_nms_top_k, confidence.shape[1])
    on_tensorflow = keras.backend.backend() == "tensorflow"
    native = on_tensorflow and suppression == "greedy" and not (portable or class_agnostic)
    if on_tensorflow and not native:
        boxes, confidence = _drop_other_anchors(boxes, confidence, confidence_threshold, k)
    boxes, confidence = _top_k_per_class(boxes, confidence, k)
    thresholds = confidence_threshold, iou_threshold
    if native:
        return _suppress_native(boxes, confidence, *thresholds, max_detections)
    boxes, confidence, labels, count = _suppress_portable(
        boxes, confidence, *thresholds, max_detections, suppression
    )
    if class_agnostic:
        boxes, labels = boxes[..., :4], ops.cast(boxes[..., 4], "int32")
    return boxes, confidence, labels, count


def _drop_other_anchors(boxes, confidence, confidence_threshold, k: int):
    """Keeps the anchors that are candidates in any image and class, padded to at least k.

    TensorFlow graphs may run in other runtimes, which sort slowly: sorting all anchors took three
    quarters of OpenVINO's time for decoding and NMS.
    """
    import tensorflow as tf

    chosen = tf.where(tf.reduce_any(confidence > confidence_threshold, axis=(0, 2)))[:, 0]
    missing = [[0, 0], [0, tf.maximum(k - tf.shape(chosen)[0], 0)], [0, 0]]
    return [tf.pad(tf.gather(x, chosen, axis=1), missing) for x in (boxes, confidence)]


def _top_k_per_class(boxes, confidence, k: int):
    """The k most confident boxes of every class: (B, C, k, 4) and (B, C, k)."""
    num_classes = confidence.shape[2]
    values, index = ops.top_k(ops.transpose(confidence, (0, 2, 1)), k)  # (B, C, k)
    flat = ops.reshape(index, (-1, num_classes * k, 1))
    chosen = ops.take_along_axis(boxes, flat, axis=1)
    return ops.reshape(chosen, (-1, num_classes, k, boxes.shape[-1])), values


def _suppress_native(boxes, confidence, confidence_threshold, iou_threshold, max_detections):
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


def _suppress_portable(
    boxes, confidence, confidence_threshold, iou_threshold, max_detections, suppression
):
    """Uses elementary operations, for other backends and runtimes."""
    num_classes, k, columns = boxes.shape[1:]
    if suppression == "soft":
        confidence = _softened(boxes, confidence, confidence_threshold, iou_threshold)
    else:
        overlap = pairwise_diou if suppression == "diou" else pairwise_iou
        candidates = confidence > confidence_threshold
        alive = _survivors(boxes, candidates, iou_threshold, overlap)
        confidence = ops.where(alive, confidence, 0.0)
    confidence = ops.reshape(confidence, (-1, num_classes * k))
    missing = max(0, max_detections - num_classes * k)
    confidence, index = ops.top_k(confidence, max_detections - missing)
    boxes = ops.reshape(boxes, (-1, num_classes * k, columns))
    boxes = ops.take_along_axis(boxes, index[..., None], 1)
    labels = ops.cast(index // k, "int32")
    count = ops.sum(ops.cast(confidence > confidence_threshold, "int32"), axis=1)
    boxes = ops.pad(boxes, [[0, 0], [0, missing], [0, 0]])
    confidence, labels = (ops.pad(x, [[0, 0], [0, missing]]) for x in (confidence, labels))
    return boxes, confidence, labels, count


def _softened(boxes, confidence, confidence_threshold, iou_threshold):
    """Soft NMS with the linear weight: each choice lowers the confidence of its neighbors."""
    num_classes, k, columns = boxes.shape[1:]
    boxes = ops.reshape(boxes, (-1, k, columns))
    ranks = ops.arange(k, dtype="int32")

    def choose(confidence, waiting):
        rank = ops.argmax(ops.where(waiting, confidence, -1.0), axis=1)[:, None]  # (B * C, 1)
        chosen = ops.take_along_axis(boxes, rank[:, :, None], axis=1)
        iou = pairwise_iou(chosen, boxes)[:, 0]  # (B * C, k)
        waiting = waiting & (ranks != ops.cast(rank, "int32"))
        near = waiting & (iou > iou_threshold)
        confidence = ops.where(near, confidence * (1.0 - iou), confidence)
        return confidence, waiting & (confidence > confidence_threshold)

    confidence = ops.reshape(confidence, (-1, k))
    waiting = confidence > confidence_threshold
    confidence, _ = ops.while_loop(
        lambda _, waiting: ops.any(waiting), choose, (confidence, waiting), maximum_iterations=k
    )
    return ops.reshape(confidence, (-1, num_classes, k))


def _survivors(boxes, candidates, iou_threshold, overlap=pairwise_iou):
    """Greedy NMS in a few large steps: many small ones are slow on accelerators and other runtimes.

    Repeats "a candidate survives if no survivor suppresses it" until nothing changes. After n
    rounds the first n boxes of a class are final; in practice all are after a few. `boxes`
    (B, C, k, 4) and `candidates` (B, C, k) are sorted by falling confidence.
    """
    num_classes, k = candidates.shape[1:]
    # LiteRT slices only tensors with few axes, so images and classes share one.
    boxes = ops.reshape(boxes, (-1, k, boxes.shape[-1]))
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


def suppress_boxes(boxes, confidence, labels, iou_threshold: float = 0.45) -> np.ndarray:
    """Applies greedy NMS to each class of the detections of one image.

    Args:
        boxes: `"xyxy"` boxes of shape `(n, 4)`.
        confidence: array of shape `(n,)`.
        labels: int array of shape `(n,)`; rows with label -1 are padding and never kept.
        iou_threshold: a box is dropped if its IoU with a more confident box of its class
            exceeds this.

    Returns:
        Indices of the kept rows, by falling confidence.

    Example:
        >>> suppress_boxes([[0, 0, 9, 9], [0, 0, 9, 10]], [0.8, 0.9], [0, 0])
        array([1])
    """
    boxes, confidence, labels = _as_arrays(boxes, confidence, labels)
    kept = []
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(-confidence[rows], kind="stable")]
        while len(rows):
            kept.append(rows[0])
            iou = pairwise_iou(boxes[rows[:1]], boxes[rows[1:]])[0]
            rows = rows[1:][iou <= iou_threshold]
    kept = np.array(kept, int)
    return kept[np.argsort(-confidence[kept], kind="stable")]


def vote_boxes(
    kept_boxes, kept_labels, boxes, confidence, labels, voting_iou: float = 0.5
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
