"""The loss of one detection stage: smooth L1 plus cross entropy with hard negative mining."""

import keras
from keras import ops

from keras_resnest.boxes.matching import BACKGROUND, BoxMatcher
from keras_resnest.boxes.offsets import VARIANCES, encode_boxes


def smooth_l1(targets, predictions):
    """Smooth L1 (Fast R-CNN eq. 3), summed over the last axis.

    Args:
        targets: shape (..., 4).
        predictions: shape (..., 4).

    Returns:
        Tensor of shape (...).
    """
    error = ops.abs(targets - predictions)
    return ops.sum(ops.where(error < 1.0, 0.5 * error * error, error - 0.5), axis=-1)


def hard_negatives(loss, candidates, num_wanted):
    """Marks the hardest candidates of each image.

    Args:
        loss: shape (batch, anchors), any finite values.
        candidates: boolean, shape (batch, anchors).
        num_wanted: int32, shape (batch,).

    Returns:
        Boolean, shape (batch, anchors): the `num_wanted` candidates of largest
        loss, all candidates where there are fewer.
    """
    loss = ops.where(candidates, loss, -float("inf"))
    order = ops.argsort(-loss, axis=1)
    rank = ops.argsort(order, axis=1)  # position of each anchor in falling order
    return candidates & (ops.cast(rank, "int32") < num_wanted[:, None])


@keras.saving.register_keras_serializable("keras_resnest")
class MultiBoxLoss:
    """Sums of the box and the class loss of one stage over a batch.

    Positives get a smooth L1 loss on their offsets and a cross entropy on their
    class. Of the negatives only the hardest of each image count, at most
    `negative_ratio` per positive of that image.

    Sums, not means, are returned together with the number of positives: the
    caller divides by the positives of the *global* batch, which one replica
    alone cannot know.

    Args:
        negative_ratio: hard negatives per positive.

    Source: SSD section 2.2 eq. 1, RefineDet section 3.4 eq. 1.

    Example:

    >>> box_sum, class_sum, positives = MultiBoxLoss()(offsets, classes, boxes, logits)
    """

    def __init__(self, negative_ratio: float = 3.0):
        if negative_ratio < 0:
            raise ValueError(f"`negative_ratio` must not be negative. Received: {negative_ratio}")
        self.negative_ratio = float(negative_ratio)

    def __call__(self, target_offsets, target_classes, offsets, logits, negative_mask=None):
        """Loss sums of a batch.

        Args:
            target_offsets: (batch, anchors, 4), used where the class is not 0.
            target_classes: int, (batch, anchors), 0 is background.
            offsets: predictions, (batch, anchors, 4).
            logits: predictions, (batch, anchors, classes + 1), background first.
            negative_mask: optional boolean (batch, anchors); negatives outside it
                are never mined (RefineDet's negative anchor filtering).

        Returns:
            Sum of the box loss, sum of the class loss, number of positives
            (three float32 scalars).
        """
        offsets, logits = ops.cast(offsets, "float32"), ops.cast(logits, "float32")
        positive = target_classes != BACKGROUND
        mask = ops.cast(positive, "float32")
        # The target of a negative is the prediction itself: exactly zero loss, and
        # no 0 * inf where an unmatched target is extreme.
        target_offsets = ops.where(positive[:, :, None], target_offsets, offsets)
        box_loss = ops.sum(mask * smooth_l1(ops.stop_gradient(target_offsets), offsets))

        log_probability = ops.log_softmax(logits, axis=-1)
        one_hot = ops.one_hot(target_classes, logits.shape[-1], dtype="float32")
        class_loss = -ops.sum(one_hot * log_probability, axis=-1)  # (B, A)
        candidates = ops.logical_not(positive)
        if negative_mask is not None:
            candidates = ops.logical_and(candidates, negative_mask)
        num_wanted = ops.cast(self.negative_ratio * ops.sum(mask, axis=1), "int32")
        mined = hard_negatives(ops.stop_gradient(class_loss), candidates, num_wanted)
        counted = ops.logical_or(positive, mined)
        class_loss = ops.sum(ops.where(counted, class_loss, 0.0))
        return box_loss, class_loss, ops.sum(mask)

    def get_config(self) -> dict:
        return {"negative_ratio": self.negative_ratio}

    @classmethod
    def from_config(cls, config: dict) -> "MultiBoxLoss":
        return cls(**config)


def encode_targets(boxes, labels, anchors, matcher: BoxMatcher, variances=VARIANCES):
    """Training targets of one stage.

    Args:
        boxes: ground truth, `"xyxy"`, shape (batch, objects, 4).
        labels: int, shape (batch, objects); 0 to num_classes - 1, padding is -1.
        anchors: `"xyxy"` in the unit of `boxes`: (anchors, 4), or (batch, anchors, 4)
            for the refined anchors of the second stage.
        matcher: the `BoxMatcher`.
        variances: see `encode_boxes`.

    Returns:
        offsets (batch, anchors, 4), meaningful where positive, and classes
        (batch, anchors) int32: 0 for background, label + 1 for positives.
    """
    matches = matcher(boxes, labels >= 0, anchors)  # (B, A)
    # One more row stands for "no object", so that the lookup needs no special case.
    boxes = ops.pad(ops.cast(boxes, "float32"), [[0, 0], [1, 0], [0, 0]])
    labels = ops.pad(ops.cast(labels, "int32"), [[0, 0], [1, 0]], constant_values=BACKGROUND - 1)
    rows = matches + 1
    matched_boxes = ops.take_along_axis(boxes, rows[:, :, None], axis=1)
    classes = ops.take_along_axis(labels, rows, axis=1) + 1
    positive = (classes != BACKGROUND)[:, :, None]
    offsets = encode_boxes(ops.where(positive, matched_boxes, anchors), anchors, variances)
    return offsets, classes
