"""BoxMatcher and ATSSMatcher: assign ground-truth boxes to anchors."""

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.overlap import pairwise_iou
from keras_resnest.checks import check_counts, check_fractions, check_positive, checked
from keras_resnest.configurable import Configurable

NOT_MATCHED = -1
BACKGROUND = 0  # column of the background in class targets and logits
CHUNK_SIZE = 16  # objects per image that are compared with all anchors at a time


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class BoxMatcher(Configurable):
    """Assigns each anchor to an object or to the background.

    An anchor is positive if its best object has an IoU of at least `iou_threshold`. With
    `force_match`, every object also keeps an anchor below the threshold: (object, anchor)
    pairs are taken greedily by falling IoU, each object and each anchor once, as in the
    authors' code. Ties go to the first object, then to the first anchor. An object that
    overlaps no anchor stays unmatched.

    Args:
        iou_threshold: lowest IoU of a positive anchor, in (0, 1].
        force_match: whether every object keeps its best anchor.

    Example:
        >>> matches = BoxMatcher()(boxes, labels >= 0, anchors)  # (batch, anchors)

    Source: SSD (arXiv 1512.02325) section 2.2, RefineDet (arXiv 1711.06897) section 3.3.
    """

    def __init__(self, iou_threshold: float = 0.5, force_match: bool = True):
        check_fractions(iou_threshold=iou_threshold)
        check_positive(iou_threshold=iou_threshold)
        self.iou_threshold = float(iou_threshold)
        self.force_match = bool(force_match)

    def __call__(self, boxes, valid, anchors, level_sizes=None):
        """Matches a batch.

        The greedy pairs are the only stable assignment between objects and anchors that all
        prefer high IoU. Deferred acceptance finds it: each free object proposes to the best
        anchor that would take it, and each anchor keeps its best proposal and frees the object
        it held before. Free objects take turns, a chunk at a time, so that memory does not grow
        with the number of objects.

        Args:
            boxes: ground-truth `"xyxy"` boxes of shape `(batch, objects, 4)`.
            valid: boolean tensor of shape `(batch, objects)`, False for padding rows.
            anchors: `"xyxy"` boxes of shape `(anchors, 4)` or `(batch, anchors, 4)`.
            level_sizes: not used; see `ATSSMatcher`.

        Returns:
            int32 tensor of shape `(batch, anchors)`: the index of the object, or -1.
        """
        # The padding fills up the last chunk.
        boxes = ops.pad(ops.cast(boxes, "float32"), [[0, 0], [0, CHUNK_SIZE], [0, 0]])
        boxes, anchors = map(ops.stop_gradient, (boxes, ops.convert_to_tensor(anchors)))
        free = ops.pad(ops.cast(valid, "bool"), [[0, 0], [0, CHUNK_SIZE]])
        (batch, num_objects), num_anchors = ops.shape(free), ops.shape(anchors)[-2]
        object_ids = ops.arange(num_objects, dtype="int32")
        anchor_ids = ops.arange(num_anchors, dtype="int32")

        # `best` and `held` are pairs (IoU, object id) of (B, A) arrays: the best object of each
        # anchor so far, and the object that it holds.
        def match_chunk(free, best, held):
            # The first free objects of each image; the priority is 0 where none is left.
            priority, ids = ops.top_k(ops.where(free, num_objects - object_ids, 0), CHUNK_SIZE)
            ids = ops.cast(ids, "int32")  # (B, K)
            iou = pairwise_iou(ops.take_along_axis(boxes, ids[:, :, None], axis=1), anchors)
            iou = ops.where(priority[:, :, None] > 0, iou, 0.0)  # (B, K, A)
            # Each object proposes to the best anchor that would take it.
            held_iou, holder = (x[:, None] for x in held)  # (B, 1, A)
            wanted = ops.where(_is_better(iou, ids[:, :, None], held_iou, holder), iou, 0.0)
            highest, choice = _first_max(wanted, anchor_ids, axis=2)  # (B, K)
            proposals = ops.where(anchor_ids == choice[:, :, None], wanted, 0.0)
            # Each anchor keeps its best proposal. Losers and displaced objects stay free.
            new_held = _keep_better(*held, proposals, ids)
            won = (highest > 0.0) & (ops.take_along_axis(new_held[1], choice, axis=1) == ids)
            settled = ops.where(won | (highest == 0.0), ids, -1)
            freed = ops.where(won, ops.take_along_axis(held[1], choice, axis=1), -1)
            free = (free & ~_contains(settled, object_ids)) | _contains(freed, object_ids)
            return free, _keep_better(*best, iou, ids), new_held

        shape = (batch, num_anchors)
        nothing = (ops.zeros(shape, "float32"), ops.full(shape, NOT_MATCHED, dtype="int32"))
        _, (best_iou, matches), (_, forced) = ops.while_loop(
            lambda free, *_: ops.any(free), match_chunk, (free, nothing, nothing)
        )
        matches = ops.where(best_iou >= self.iou_threshold, matches, NOT_MATCHED)
        return ops.where(forced >= 0, forced, matches) if self.force_match else matches


def _first_max(values, ids, axis):
    """The maximum and the lowest id that has it. (PyTorch's `argmax` returns any of them.)"""
    highest = ops.max(values, axis=axis, keepdims=True)
    first = ops.min(ops.where(values == highest, ids, 2**31 - 1), axis=axis)
    return ops.squeeze(highest, axis), first


def _is_better(iou, objects, held_iou, holder):
    """Whether an anchor prefers an object to the one it holds."""
    return (iou > held_iou) | ((iou == held_iou) & (objects < holder))


def _keep_better(held_iou, holder, iou, ids):
    """Updates what each anchor holds by the IoU (B, K, A) of the objects `ids` (B, K)."""
    highest, objects = _first_max(iou, ids[:, :, None], axis=1)
    better = _is_better(highest, objects, held_iou, holder)
    return ops.where(better, highest, held_iou), ops.where(better, objects, holder)


def _contains(ids, object_ids):
    """Whether each object of an image (B, M) is among the `ids` (B, K)."""
    return ops.any(ids[:, :, None] == object_ids, axis=1)


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class ATSSMatcher(Configurable):
    """Assigns anchors to objects with a threshold for each object (ATSS).

    On every level, the anchors whose centers are nearest to the center of an object are its
    candidates. An anchor is positive if it is a candidate, its IoU reaches mean plus standard
    deviation of the candidates' IoU, and its center lies in the object. Unlike in the paper, the
    candidate of the highest IoU is always positive, so that tiny objects are trained too. An
    anchor of several objects goes to the one of the highest IoU.

    Args:
        num_candidates: candidates of an object on each level. The paper has 9 for one anchor in
            each cell; its code multiplies it by the anchors of a cell.

    Raises:
        ValueError: if `num_candidates` is not a positive integer.

    Example:
        >>> generator = AnchorGenerator()
        >>> sizes = generator.level_sizes((320, 320))
        >>> matches = ATSSMatcher()(boxes, labels >= 0, generator((320, 320)), sizes)

    Source: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via
    Adaptive Training Sample Selection", arXiv 1912.02424, alg. 1.
    """

    def __init__(self, num_candidates: int = 27):
        check_counts(num_candidates=num_candidates)
        self.num_candidates = int(num_candidates)

    def __call__(self, boxes, valid, anchors, level_sizes):
        """Matches a batch, one image at a time, which bounds the memory.

        Args:
            boxes: ground-truth `"xyxy"` boxes of shape `(batch, objects, 4)`.
            valid: boolean tensor of shape `(batch, objects)`, False for padding rows.
            anchors: `"xyxy"` boxes of shape `(anchors, 4)` or `(batch, anchors, 4)`.
            level_sizes: number of anchors of each level.

        Returns:
            int32 tensor of shape `(batch, anchors)`: the index of the object, or -1.
        """
        boxes, anchors = (ops.stop_gradient(ops.cast(x, "float32")) for x in (boxes, anchors))
        anchors = ops.broadcast_to(anchors, (ops.shape(boxes)[0], *ops.shape(anchors)[-2:]))
        # At least one row, so that every reduction has a value.
        boxes = ops.pad(boxes, [[0, 0], [0, 1], [0, 0]])
        valid = ops.pad(ops.cast(valid, "bool"), [[0, 0], [0, 1]])
        return ops.map(lambda image: self._match(*image, level_sizes), (boxes, valid, anchors))

    def _match(self, boxes, valid, anchors, level_sizes):
        """The object of each anchor (A,) of one image."""
        num_objects, num_anchors = ops.shape(valid)[0], ops.shape(anchors)[0]
        ids, near = self._candidates(boxes, anchors, level_sizes)  # (M, K)
        near = near & valid[:, None]
        chosen = ops.take(anchors, ids, axis=0)  # (M, K, 4)
        iou = ops.where(near, pairwise_iou(boxes[:, None], chosen)[:, 0], 0.0)

        count = ops.maximum(ops.sum(ops.cast(near, "float32"), axis=1, keepdims=True), 1.0)
        mean = ops.sum(iou, axis=1, keepdims=True) / count
        spread = ops.where(near, iou - mean, 0.0)
        # The deviation of a sample, as in the authors' code.
        variance = ops.sum(ops.square(spread), axis=1, keepdims=True) / ops.maximum(count - 1, 1.0)
        centers = (chosen[..., :2] + chosen[..., 2:]) / 2.0
        inside = (centers > boxes[:, None, :2]) & (centers < boxes[:, None, 2:])
        positive = (iou >= mean + ops.sqrt(variance)) & ops.all(inside, axis=-1)
        positive |= iou == ops.max(iou, axis=1, keepdims=True)
        iou = ops.where(positive & (iou > 0.0), iou, 0.0)

        # Each anchor takes the best of its objects, the first one of equals.
        best = ops.segment_max(ops.reshape(iou, (-1,)), ops.reshape(ids, (-1,)), num_anchors)
        is_best = (iou > 0.0) & (iou == ops.take(best, ids))
        objects = ops.arange(num_objects, dtype="int32")[:, None]
        rank = ops.where(is_best, num_objects - objects, 0)
        rank = ops.segment_max(ops.reshape(rank, (-1,)), ops.reshape(ids, (-1,)), num_anchors)
        return ops.where(rank > 0, num_objects - rank, NOT_MATCHED)

    def _candidates(self, boxes, anchors, level_sizes):
        """Anchors (M, K) nearest to each object on each level, and whether there are so many."""
        middles, centers = ((x[:, :2] + x[:, 2:]) / 2.0 for x in (boxes, anchors))
        distance = ops.sum(ops.square(middles[:, None] - centers), axis=-1)  # (M, A)
        ids, near, start = [], [], 0
        for size in level_sizes:
            level = distance[:, start : start + size]
            level = ops.pad(level, [[0, 0], [0, self.num_candidates]], constant_values=np.inf)
            nearest, index = ops.top_k(-level, self.num_candidates)
            ids.append(ops.where(nearest > -np.inf, ops.cast(index, "int32") + start, 0))
            near.append(nearest > -np.inf)
            start += size
        return ops.concatenate(ids, axis=1), ops.concatenate(near, axis=1)
