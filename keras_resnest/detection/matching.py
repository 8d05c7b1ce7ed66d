"""Matching of ground truth to anchors, and the training targets that follow from it."""

import keras
from keras import ops

from keras_resnest.detection.boxes import VARIANCES, encode_boxes, pairwise_iou

NOT_MATCHED = -1
BACKGROUND = 0  # column of the background in class targets and logits


@keras.saving.register_keras_serializable("keras_resnest")
class BoxMatcher:
    """Decides which anchor answers for which object.

    An anchor is positive when its best object has an IoU of at least
    `iou_threshold`. With `force_match`, every object also keeps the best anchor
    that no object with a higher IoU claims: pairs are taken greedily by falling
    IoU, one anchor per object, as in the authors' code. Objects that overlap no
    anchor at all stay unmatched.

    Args:
        iou_threshold: between 0 and 1.
        force_match: whether each object keeps its best anchor below the threshold.

    Source: SSD (arXiv 1512.02325) section 2.2, RefineDet section 3.3.

    Example:

    >>> iou = pairwise_iou(boxes, anchors)             # (batch, objects, anchors)
    >>> matches = BoxMatcher()(iou, labels >= 0)       # (batch, anchors)
    """

    def __init__(self, iou_threshold: float = 0.5, force_match: bool = True):
        if not 0.0 < iou_threshold <= 1.0:
            raise ValueError(
                f"`iou_threshold` must be in (0, 1]. Received: iou_threshold={iou_threshold}"
            )
        self.iou_threshold = float(iou_threshold)
        self.force_match = bool(force_match)

    def __call__(self, iou, valid):
        """Matches a batch.

        Args:
            iou: shape (batch, objects, anchors).
            valid: boolean, shape (batch, objects); False marks padding rows.

        Returns:
            int32, shape (batch, anchors): index of the object, or -1.
        """
        iou = ops.where(valid[:, :, None], iou, 0.0)
        # A row of zeros in front: argmax works without objects, and index 0 means none.
        padded = ops.pad(iou, [[0, 0], [1, 0], [0, 0]])  # (B, 1 + M, A)
        best = ops.cast(ops.argmax(padded, axis=1), "int32") - 1
        matches = ops.where(ops.max(padded, axis=1) >= self.iou_threshold, best, NOT_MATCHED)
        if self.force_match:
            forced = greedy_one_to_one(iou)
            matches = ops.where(forced > NOT_MATCHED, forced, matches)
        return matches

    def get_config(self) -> dict:
        return {"iou_threshold": self.iou_threshold, "force_match": self.force_match}

    @classmethod
    def from_config(cls, config: dict) -> "BoxMatcher":
        return cls(**config)


def greedy_one_to_one(iou):
    """Pairs objects and anchors one to one by falling IoU, over the whole batch at once.

    Picking the highest remaining pair again and again gives the one stable
    assignment of a symmetric preference, so deferred acceptance gives the same:
    every free object proposes to the best anchor that is not held by a better
    object, and every anchor keeps its best proposal. That needs a handful of
    rounds instead of one per object.

    Args:
        iou: shape (batch, objects, anchors). Equal values: the first object wins.

    Returns:
        int32, shape (batch, anchors): index of the object, or -1.
    """
    batch, num_objects, num_anchors = ops.shape(iou)
    objects = ops.arange(num_objects, dtype="int32")[None, :]  # (1, M)
    first_anchor = ops.arange(batch, dtype="int32")[:, None] * num_anchors

    def per_anchor_max(values, anchor_of):
        """Largest of the objects' values (B, M) at each anchor, 0 where none: (B, A)."""
        ids = ops.reshape(first_anchor + anchor_of, (-1,))
        highest = ops.segment_max(ops.reshape(values, (-1,)), ids, batch * num_anchors)
        return ops.maximum(ops.reshape(highest, (batch, num_anchors)), 0)

    def propose(holder, held_iou, anchor_of, _):
        is_held = ops.take_along_axis(holder, anchor_of, axis=1) == objects  # (B, M)
        open_iou = ops.where(iou > held_iou[:, None, :], iou, 0.0)  # (B, M, A)
        value, choice = (best[..., 0] for best in ops.top_k(open_iou, 1))
        choice = ops.where(is_held, anchor_of, ops.cast(choice, "int32"))
        value = ops.where(is_held, 0.0, value)
        best = per_anchor_max(value, choice)
        wins = (value > 0.0) & (value == ops.take_along_axis(best, choice, axis=1))
        # The first of equals wins: the largest `num_objects - index`.
        countdown = per_anchor_max(ops.where(wins, num_objects - objects, 0), choice)
        accepted = countdown > 0
        holder = ops.where(accepted, num_objects - countdown, holder)
        held_iou = ops.where(accepted, best, held_iou)
        return holder, held_iou, choice, ops.any(accepted)

    nobody = ops.full((batch, num_anchors), NOT_MATCHED, dtype="int32")
    start = (
        nobody,
        ops.zeros((batch, num_anchors), dtype=iou.dtype),
        ops.zeros((batch, num_objects), dtype="int32"),
        ops.convert_to_tensor(True),
    )
    holder, _, _, _ = ops.while_loop(lambda *state: state[-1], propose, start)
    return holder


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
    iou = pairwise_iou(boxes, anchors)
    matches = matcher(iou, labels >= 0)  # (B, A)
    # One more row stands for "no object", so that the lookup needs no special case.
    boxes = ops.pad(ops.cast(boxes, "float32"), [[0, 0], [1, 0], [0, 0]])
    labels = ops.pad(ops.cast(labels, "int32"), [[0, 0], [1, 0]], constant_values=BACKGROUND - 1)
    rows = matches + 1
    matched_boxes = ops.take_along_axis(boxes, rows[:, :, None], axis=1)
    classes = ops.take_along_axis(labels, rows, axis=1) + 1
    positive = (classes != BACKGROUND)[:, :, None]
    offsets = encode_boxes(ops.where(positive, matched_boxes, anchors), anchors, variances)
    return offsets, classes
