"""Matching of ground truth to anchors, and the training targets that follow from it.

A batch has objects x anchors pairs by the million. Their IoU is looked at a few objects at a
time and never held as a whole, so that memory does not grow with the number of objects.
"""

import keras
from keras import ops

from keras_resnest.boxes.overlap import pairwise_iou

NOT_MATCHED = -1
BACKGROUND = 0  # column of the background in class targets and logits

OBJECTS_AT_ONCE = 16
CANDIDATES = 8  # best anchors that are noted of each object; more are looked up when they run out


@keras.saving.register_keras_serializable("keras_resnest")
class BoxMatcher:
    """Decides which anchor answers for which object.

    An anchor is positive when its best object has an IoU of at least
    `iou_threshold`. With `force_match`, every object also keeps the best anchor
    that no object with a higher IoU claims: pairs are taken greedily by falling
    IoU, one anchor per object, as in the authors' code. Objects that overlap no
    anchor at all stay unmatched. Of equal IoUs the first object, then the first
    anchor wins (which of equally good anchors is left to PyTorch on PyTorch).

    Args:
        iou_threshold: between 0 and 1.
        force_match: whether each object keeps its best anchor below the threshold.

    Source: SSD (arXiv 1512.02325) section 2.2, RefineDet section 3.3.

    Example:

    >>> matches = BoxMatcher().match_boxes(boxes, labels >= 0, anchors)  # (batch, anchors)
    """

    def __init__(self, iou_threshold: float = 0.5, force_match: bool = True):
        if not 0.0 < iou_threshold <= 1.0:
            raise ValueError(
                f"`iou_threshold` must be in (0, 1]. Received: iou_threshold={iou_threshold}"
            )
        self.iou_threshold = float(iou_threshold)
        self.force_match = bool(force_match)

    def __call__(self, iou, valid):
        """Matches a batch whose IoU is known.

        Args:
            iou: shape (batch, objects, anchors).
            valid: boolean, shape (batch, objects); False marks padding rows.

        Returns:
            int32, shape (batch, anchors): index of the object, or -1.
        """
        return self._match(_ObjectChunks.of_array(ops.where(valid[:, :, None], iou, 0.0)))

    def match_boxes(self, boxes, valid, anchors):
        """Matches a batch without an array of all pairs.

        Args:
            boxes: ground truth, `"xyxy"`, shape (batch, objects, 4).
            valid: boolean, shape (batch, objects); False marks padding rows.
            anchors: `"xyxy"`, shape (anchors, 4) or (batch, anchors, 4).

        Returns:
            As `__call__` for the `pairwise_iou` of boxes and anchors.
        """
        return self._match(_ObjectChunks.of_boxes(boxes, valid, anchors))

    def _match(self, chunks):
        best_iou, best, *candidates = chunks.survey()
        matches = ops.where(best_iou >= self.iou_threshold, best, NOT_MATCHED)
        if self.force_match:
            forced = _pair_one_to_one(chunks, candidates)
            matches = ops.where(forced > NOT_MATCHED, forced, matches)
        return matches

    def get_config(self) -> dict:
        return {"iou_threshold": self.iou_threshold, "force_match": self.force_match}

    @classmethod
    def from_config(cls, config: dict) -> "BoxMatcher":
        return cls(**config)


def greedy_one_to_one(iou):
    """Pairs objects and anchors one to one by falling IoU, over the whole batch at once.

    Args:
        iou: shape (batch, objects, anchors). Of equal values the first object, then
            the first anchor wins. Pairs of IoU 0 are never taken.

    Returns:
        int32, shape (batch, anchors): index of the object, or -1.
    """
    chunks = _ObjectChunks.of_array(iou)
    _, _, *candidates = chunks.survey()
    return _pair_one_to_one(chunks, candidates)


class _ObjectChunks:
    """IoU of all objects with all anchors, read a few objects at a time.

    Args:
        read: function from the number of a chunk to the IoU of its objects,
            (batch, `size`, anchors). Rows beyond the last object are zero.
        number: number of chunks.
        size: objects of a chunk.
        batch: number of images.
        num_anchors: anchors of an image.
    """

    def __init__(self, read, number, size, batch, num_anchors):
        self.read = read
        self.number, self.size = number, size
        self.batch, self.num_anchors = batch, num_anchors

    @classmethod
    def of_array(cls, iou):
        """Chunks of an array (batch, objects, anchors)."""
        batch, num_objects, num_anchors = ops.shape(iou)
        rows, number, size = _in_chunks(iou, num_objects)
        return cls(lambda i: ops.take(rows, i, axis=1), number, size, batch, num_anchors)

    @classmethod
    def of_boxes(cls, boxes, valid, anchors):
        """Chunks that are computed when they are read; arguments as `match_boxes`."""
        # A box without area has no IoU with anything, as padding shall have none.
        boxes = ops.where(valid[:, :, None], ops.cast(boxes, "float32"), 0.0)
        boxes, anchors = ops.stop_gradient(boxes), ops.stop_gradient(anchors)
        batch, num_objects, _ = ops.shape(boxes)
        rows, number, size = _in_chunks(boxes, num_objects)

        def read(i):
            return pairwise_iou(ops.take(rows, i, axis=1), anchors)

        return cls(read, number, size, batch, ops.shape(anchors)[-2])

    def survey(self, holder=None, held_iou=None):
        """Reads all chunks once.

        Args:
            holder: int32, (batch, anchors): the object that holds the anchor, or -1.
                None as long as nobody holds any.
            held_iou: (batch, anchors): IoU of the two, 0 where there is no holder.

        Returns:
            Highest IoU of each anchor and its object, both (batch, anchors). Then, of
            the anchors that an object can still get, the best few: their IoU (batch,
            objects, candidates) in falling order, 0 where there are no more, and their
            indices. The last rows of objects may be padding.
        """
        # Where only the graph knows how many anchors there are, there are more than a few.
        known = isinstance(self.num_anchors, int)
        num_candidates = min(CANDIDATES, self.num_anchors) if known else CANDIDATES

        def read_next(i, best_iou, best, values, indices):
            iou = self.read(i)  # (B, size, A)
            first = i * self.size
            highest = ops.max(iou, axis=1)
            object_ids = first + ops.cast(ops.argmax(iou, axis=1), "int32")
            # Strictly better: the first of equals stays.
            best = ops.where(highest > best_iou, object_ids, best)
            if holder is not None:
                rows = first + ops.arange(self.size, dtype="int32")[None, :, None]
                is_open = _is_open(iou, rows, held_iou[:, None, :], holder[:, None, :])
                iou = ops.where(is_open, iou, 0.0)
            new_values, new_indices = ops.top_k(iou, num_candidates)
            return (
                i + 1,
                ops.maximum(best_iou, highest),
                best,
                _push(values, new_values, self.size),
                _push(indices, ops.cast(new_indices, "int32"), self.size),
            )

        nobody, no_iou = self.nobody()
        shape = (self.batch, self.number * self.size, num_candidates)
        start = (
            ops.zeros((), dtype="int32"),
            no_iou,
            nobody,
            ops.zeros(shape, dtype=no_iou.dtype),
            ops.zeros(shape, dtype="int32"),
        )
        return ops.while_loop(lambda i, *_: i < self.number, read_next, start)[1:]

    def nobody(self):
        """No anchor has an object: objects and IoU, (batch, anchors)."""
        shape = (self.batch, self.num_anchors)
        return ops.full(shape, NOT_MATCHED, dtype="int32"), ops.zeros(shape, dtype="float32")


def _in_chunks(array, num_objects):
    """(batch, objects, n) as (batch, number, size, n); also number and size.

    The chunks are of equal size. A row of zeros more than needed makes sure that there is one.
    """
    rows = num_objects + 1
    number = (rows + OBJECTS_AT_ONCE - 1) // OBJECTS_AT_ONCE
    size = (rows + number - 1) // number
    padded = ops.pad(array, [[0, 0], [0, OBJECTS_AT_ONCE], [0, 0]])[:, : number * size]
    batch, _, width = ops.shape(array)
    return ops.reshape(padded, (batch, number, size, width)), number, size


def _push(queue, rows, size):
    """Adds `size` rows at the end of a queue of constant length, as many leave at the front."""
    return ops.concatenate([queue[:, size:], rows], axis=1)


def _is_open(iou, object_ids, held_iou, holder):
    """Whether an object gets an anchor that another holds: by IoU, then by its place."""
    return (iou > held_iou) | ((iou == held_iou) & (object_ids < holder))


def _pair_one_to_one(chunks: _ObjectChunks, candidates):
    """`greedy_one_to_one` of chunks and the candidates of their first survey.

    Picking the highest remaining pair again and again gives the one stable assignment of a
    symmetric preference, so deferred acceptance gives the same: every free object proposes to
    the best anchor that is not held by a better object, and every anchor keeps its best
    proposal. That needs a handful of rounds instead of one per object. A new survey is needed
    only if an object lost all its candidates.
    """

    def settle(holder, held_iou, anchor_of, values, indices):
        def propose(*state):
            return _propose(*state[:3], values, indices)

        *state, _ = ops.while_loop(
            lambda *state: state[-1],
            propose,
            (holder, held_iou, anchor_of, ops.convert_to_tensor(True)),
        )
        return (*state, _any_ran_out(*state, values, indices))

    def survey_again(holder, held_iou, anchor_of, _):
        _, _, *candidates = chunks.survey(holder, held_iou)
        return settle(holder, held_iou, anchor_of, *candidates)

    nobody, no_iou = chunks.nobody()
    anchor_of = ops.zeros(ops.shape(candidates[0])[:2], dtype="int32")
    state = settle(nobody, no_iou, anchor_of, *candidates)
    return ops.while_loop(lambda *state: state[-1], survey_again, state)[0]


def _propose(holder, held_iou, anchor_of, values, indices):
    """One round of proposals.

    Args:
        holder: int32, (batch, anchors): the object that holds the anchor, or -1.
        held_iou: (batch, anchors): IoU of the two, 0 where there is no holder.
        anchor_of: int32, (batch, objects): the anchor the object proposed to last.
        values: (batch, objects, candidates): IoU with the candidates, falling.
        indices: int32, the same shape: the candidates.

    Returns:
        The first three after the round, and whether any proposal was accepted.
    """
    batch, num_objects, _ = ops.shape(values)
    num_anchors = ops.shape(holder)[1]
    objects = ops.arange(num_objects, dtype="int32")[None, :]  # (1, M)
    first_anchor = ops.arange(batch, dtype="int32")[:, None] * num_anchors

    def per_anchor_max(values, anchor_of):
        """Largest of the objects' values (B, M) at each anchor, 0 where none: (B, A)."""
        ids = ops.reshape(first_anchor + anchor_of, (-1,))
        highest = ops.segment_max(ops.reshape(values, (-1,)), ids, batch * num_anchors)
        return ops.maximum(ops.reshape(highest, (batch, num_anchors)), 0)

    is_free = ops.take_along_axis(holder, anchor_of, axis=1) != objects
    is_open = _open_candidates(holder, held_iou, values, indices)
    first_open = ops.argmax(ops.cast(is_open, "int32"), axis=-1)[..., None]
    choice = ops.take_along_axis(indices, first_open, axis=-1)[..., 0]
    value = ops.take_along_axis(values, first_open, axis=-1)[..., 0]
    choice = ops.where(is_free, choice, anchor_of)
    value = ops.where(is_free & ops.any(is_open, axis=-1), value, 0.0)
    best = per_anchor_max(value, choice)
    wins = (value > 0.0) & (value == ops.take_along_axis(best, choice, axis=1))
    # The first of equals wins: the largest `num_objects - index`.
    countdown = per_anchor_max(ops.where(wins, num_objects - objects, 0), choice)
    accepted = countdown > 0
    holder = ops.where(accepted, num_objects - countdown, holder)
    held_iou = ops.where(accepted, best, held_iou)
    return holder, held_iou, choice, ops.any(accepted)


def _open_candidates(holder, held_iou, values, indices):
    """Which candidates (batch, objects, candidates) an object can still get."""
    batch, num_objects, num_candidates = ops.shape(values)
    flat = ops.reshape(indices, (batch, num_objects * num_candidates))
    held_iou = ops.reshape(ops.take_along_axis(held_iou, flat, axis=1), ops.shape(values))
    holder = ops.reshape(ops.take_along_axis(holder, flat, axis=1), ops.shape(values))
    objects = ops.arange(num_objects, dtype="int32")[None, :, None]
    return _is_open(values, objects, held_iou, holder)


def _any_ran_out(holder, held_iou, anchor_of, values, indices):
    """Whether a free object has no candidate left, but may have more anchors."""
    objects = ops.arange(ops.shape(values)[1], dtype="int32")[None, :]
    is_free = ops.take_along_axis(holder, anchor_of, axis=1) != objects
    has_none = ops.logical_not(ops.any(_open_candidates(holder, held_iou, values, indices), -1))
    return ops.any(is_free & has_none & (values[..., -1] > 0.0))
