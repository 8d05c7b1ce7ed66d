"""RefineDetLoss: matching, hard negative mining and the losses of both stages.

The loss knows raw outputs, ground truth and anchors. It never sees an image or a weight.
"""

from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.matching import BACKGROUND, ATSSMatcher, BoxMatcher
from keras_resnest.boxes.offsets import VARIANCES, check_variances, decode_boxes, encode_boxes
from keras_resnest.boxes.overlap import paired_iou
from keras_resnest.checks import (
    check_fractions,
    check_positive,
    checked,
    float_outputs,
    is_number,
)
from keras_resnest.configurable import Configurable
from keras_resnest.replicas import sum_over_replicas

LOSS_NAMES = (
    "arm_box_loss",
    "arm_classification_loss",
    "odm_box_loss",
    "odm_classification_loss",
)
BoxLoss = Literal["smooth_l1", "giou"]
MATCHERS = ("matcher", "odm_matcher")
MAX_PIXEL = 1e6  # keeps the areas of diverged boxes finite


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class RefineDetLoss(Configurable):
    """The two-stage loss of RefineDet.

    Each stage has a box loss on its positive anchors and a cross entropy on positives and mined
    negatives, both divided by its positives in the global batch. The ARM separates objects from
    background on the regular anchors; the ODM learns classes and offsets on the anchors that the
    ARM has refined, through which no gradient flows (but see `joint_regression`). If the ODM
    predicts the IoU of its boxes, the binary cross entropy of the positives is a fifth loss.

    An image of weight 2 counts as two images: its losses and its positives count twice.

    Args:
        matcher: `BoxMatcher` or `ATSSMatcher` that assigns anchors to objects.
        odm_matcher: matcher of the second stage, by default `matcher`.
        box_loss: `"smooth_l1"` of the offsets, or `"giou"` of the decoded boxes.
        odm_box_loss: box loss of the second stage, by default `box_loss`.
        box_loss_weight: factor of the box losses. GIoU, which is at most 2, needs about 2.
        smooth_l1_knee: error of an offset up to which smooth L1 is quadratic.
        class_weights: factors of the ODM's cross entropy of positives, one for each class without
            background, not negative; `kr.data.class_weights` gets them from a dataset. Background
            has the factor 1, so mining stays the same. Boxes and the ARM, which knows no classes,
            are not weighted, and the divisor remains the number of positives, not the sum of their
            weights. By default all are 1.
        negative_ratio: hard negatives per positive, for each image.
        objectness_threshold: anchors with an ARM objectness up to this, 0 to 1, are not mined as
            negatives of the ODM.
        negative_anchor_filtering: whether `objectness_threshold` applies (table 3 of the paper).
        two_step_regression: whether the ODM starts from the refined anchors, or from the regular
            ones (table 3). `DetectionDecoder` must have the same.
        joint_regression: whether the ODM's losses see both steps as one, from the regular anchors,
            so that both learn the final box. In the paper the ODM is matched anew, on refined
            anchors that move while it learns.
        variances: scale of center offsets and of log sizes, see `encode_boxes`.

    Raises:
        ValueError: if `negative_ratio` or a class weight is negative, `objectness_threshold` not in
            [0, 1], a box loss unknown, or its weight or knee not positive; in a call, if there is
            not one class weight for each class.

    Example:
        >>> losses = RefineDetLoss()(model(images), boxes, labels, model.anchors)
        >>> sorted(losses)
        ['arm_box_loss', 'arm_classification_loss', 'odm_box_loss', 'odm_classification_loss']

    Source: RefineDet (arXiv 1711.06897) section 3.4 eq. 1; mining from SSD (arXiv 1512.02325)
    section 2.2; GIoU from arXiv 1902.09630 alg. 2; IoU from arXiv 1912.05992 eq. 4.
    """

    def __init__(
        self,
        matcher: BoxMatcher | ATSSMatcher | None = None,
        negative_ratio: float = 3.0,
        objectness_threshold: float = 0.01,
        negative_anchor_filtering: bool = True,
        two_step_regression: bool = True,
        variances=VARIANCES,
        odm_matcher: BoxMatcher | ATSSMatcher | None = None,
        box_loss: BoxLoss = "smooth_l1",
        odm_box_loss: BoxLoss | None = None,
        box_loss_weight: float = 1.0,
        smooth_l1_knee: float = 1.0,
        joint_regression: bool = False,
        class_weights: Sequence[float] | None = None,
    ):
        check_positive(box_loss_weight=box_loss_weight, smooth_l1_knee=smooth_l1_knee)
        if negative_ratio < 0:
            raise ValueError(f"`negative_ratio` must not be negative. Received: {negative_ratio!r}")
        check_fractions(objectness_threshold=objectness_threshold)
        self.matcher = matcher or BoxMatcher()
        self.negative_ratio = float(negative_ratio)
        self.objectness_threshold = float(objectness_threshold)
        self.negative_anchor_filtering = bool(negative_anchor_filtering)
        self.two_step_regression = bool(two_step_regression)
        self.joint_regression = bool(joint_regression)
        self.variances = check_variances(variances)
        self.odm_matcher = odm_matcher
        self.box_loss, self.odm_box_loss = box_loss, odm_box_loss
        self.box_loss_weight, self.smooth_l1_knee = float(box_loss_weight), float(smooth_l1_knee)
        self.class_weights = _check_class_weights(class_weights)

    def __call__(
        self,
        outputs: dict,
        boxes,
        labels,
        anchors,
        sample_weight=None,
        level_sizes=None,
        positives=None,
    ) -> dict:
        """Computes the four losses of a batch.

        Args:
            outputs: raw outputs of the model: `"arm_boxes"` (batch, anchors, 4),
                `"arm_objectness"` (batch, anchors, 2), `"odm_boxes"` (batch, anchors, 4) and
                `"odm_logits"` (batch, anchors, num_classes + 1), background first.
            boxes: ground truth, `"xyxy"` in pixels, (batch, objects, 4).
            labels: int, (batch, objects): 0 to num_classes - 1, or -1 for padding.
            anchors: `"xyxy"` in pixels, (anchors, 4).
            sample_weight: optional weights of the images, (batch,), not negative.
            level_sizes: number of anchors of each level, which `ATSSMatcher` needs.
            positives: what `count_positives` returns for a batch that this one is a part of: then
                the losses of its parts add up to its own. Default: those of this batch.

        Returns:
            Dictionary of float32 scalars, one for each of `LOSS_NAMES`, and `"odm_iou_loss"` if
            the outputs have `"odm_iou"` (batch, anchors, 1).
        """
        stages = self._stages(outputs, boxes, labels, anchors, level_sizes)
        positives = positives or [_count_positives(s, sample_weight) for s in stages]
        return {
            f"{name}_{loss}_loss": value
            for name, stage, count in zip(("arm", "odm"), stages, positives, strict=True)
            for loss, value in _means_over_positives(stage, sample_weight, count).items()
        }

    def count_positives(
        self, outputs: dict, boxes, labels, anchors, sample_weight=None, level_sizes=None
    ) -> list:
        """Counts the positives of both stages in the global batch; arguments as of a call."""
        stages = self._stages(outputs, boxes, labels, anchors, level_sizes)
        return [_count_positives(stage, sample_weight) for stage in stages]

    def _stages(self, outputs: dict, boxes, labels, anchors, level_sizes) -> tuple:
        """What `_stage` returns for each stage."""
        outputs = float_outputs(outputs)
        self.check_num_classes(outputs["odm_logits"].shape[-1] - 1)
        anchors = ops.convert_to_tensor(anchors, "float32")
        any_object = ops.minimum(labels, 0)  # the ARM knows a single class
        arm = self._stage(
            *(boxes, any_object, anchors, level_sizes),
            *(outputs["arm_boxes"], outputs["arm_objectness"]),
            *(self.matcher, self.box_loss),
        )
        offsets = outputs["odm_boxes"]
        if self.two_step_regression:
            refined = decode_boxes(outputs["arm_boxes"], anchors, self.variances)  # (B, A, 4)
            if self.joint_regression:
                found = decode_boxes(offsets, refined, self.variances)
                found = ops.clip(found, -MAX_PIXEL, MAX_PIXEL)
                offsets = encode_boxes(found, anchors, self.variances)
            else:
                anchors = ops.stop_gradient(refined)
        minable = None
        if self.negative_anchor_filtering:
            objectness = ops.softmax(ops.stop_gradient(outputs["arm_objectness"]), axis=-1)[..., 1]
            minable = objectness > self.objectness_threshold
        odm = self._stage(
            *(boxes, labels, anchors, level_sizes),
            *(offsets, outputs["odm_logits"]),
            *(self.odm_matcher or self.matcher, self.odm_box_loss or self.box_loss),
            negative_mask=minable,
            iou_logits=outputs.get("odm_iou"),
            class_weights=self.class_weights,
        )
        return arm, odm

    def _stage(
        self,
        boxes,
        labels,
        anchors,
        level_sizes,
        offsets,
        logits,
        matcher,
        box_loss,
        negative_mask=None,
        iou_logits=None,
        class_weights=None,
    ) -> tuple:
        """The losses of each anchor (batch, anchors) by name, and where anchors are positive."""
        targets, classes = assign_targets(boxes, labels, anchors, matcher, level_sizes)
        positive = classes != BACKGROUND
        # A negative's target is its anchor, and it stays there: nothing is 0 * inf.
        offsets = ops.where(positive[:, :, None], offsets, 0.0)
        found = ops.clip(decode_boxes(offsets, anchors, self.variances), -MAX_PIXEL, MAX_PIXEL)
        if box_loss == "giou":
            box_losses = 1.0 - paired_iou(found, targets, generalized=True)
        else:
            wanted = ops.stop_gradient(encode_boxes(targets, anchors, self.variances))
            box_losses = smooth_l1(wanted, offsets, self.smooth_l1_knee)
        losses = {
            "box": self.box_loss_weight * ops.where(positive, box_losses, 0.0),
            "classification": mined_cross_entropy(
                classes, logits, self.negative_ratio, negative_mask
            ),
        }
        if class_weights is not None:
            weights = ops.convert_to_tensor([1.0, *class_weights], "float32")  # background first
            losses["classification"] *= ops.take(weights, classes)
        if iou_logits is not None:
            iou = ops.stop_gradient(paired_iou(found, targets))
            losses["iou"] = ops.where(positive, binary_cross_entropy(iou, iou_logits[..., 0]), 0.0)
        return losses, positive

    def check_num_classes(self, num_classes: int) -> None:
        """Raises ValueError if `class_weights` are for another number of classes."""
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"`class_weights` must be {num_classes} numbers, one for each class without "
                f"background. Received: {list(self.class_weights)}"
            )

    def get_config(self) -> dict:
        serialize = keras.saving.serialize_keras_object
        matchers = {name: serialize(getattr(self, name)) for name in MATCHERS}
        return {**super().get_config(), **matchers}

    @classmethod
    def from_config(cls, config: dict) -> "RefineDetLoss":
        deserialize = keras.saving.deserialize_keras_object
        matchers = {name: deserialize(config[name]) for name in MATCHERS if name in config}
        return cls(**{**config, **matchers})


def _check_class_weights(class_weights) -> tuple[float, ...] | None:
    if class_weights is None:
        return None
    sequence = isinstance(class_weights, Sequence | np.ndarray)
    if not sequence or not all(is_number(w) and 0 <= w < float("inf") for w in class_weights):
        raise ValueError(
            "`class_weights` must be a list of numbers that are not negative, in the order of the "
            "labels; `kr.data.class_weights` makes one of names. "
            f"Received: class_weights={class_weights!r}"
        )
    return tuple(float(w) for w in class_weights)


def _means_over_positives(stage: tuple, sample_weight, count) -> dict:
    """Sums the losses of the anchors, and divides by the positives of the global batch."""
    weight = 1.0 if sample_weight is None else sample_weight[:, None]
    count = ops.where(count > 0.0, count, 1.0)
    return {name: ops.sum(weight * loss) / count for name, loss in stage[0].items()}


def _count_positives(stage: tuple, sample_weight):
    weight = 1.0 if sample_weight is None else sample_weight[:, None]
    return sum_over_replicas(ops.sum(weight * ops.cast(stage[1], "float32")))


def assign_targets(boxes, labels, anchors, matcher, level_sizes=None):
    """Returns the object that each anchor of one stage shall find.

    Args:
        boxes: ground truth, `"xyxy"`, (batch, objects, 4).
        labels: int, (batch, objects); padding is -1.
        anchors: `"xyxy"`, (anchors, 4), or (batch, anchors, 4) for refined anchors.
        matcher: a `BoxMatcher` or an `ATSSMatcher`.
        level_sizes: number of anchors of each level.

    Returns:
        Boxes (batch, anchors, 4), the anchor itself where it has no object, and int32 classes
        (batch, anchors): 0 for background, label + 1 for positives.
    """
    matches = matcher(boxes, labels >= 0, anchors, level_sizes)  # (B, A)
    # Row 0 stands for "no object", so that the lookup needs no special case.
    boxes = ops.pad(ops.cast(boxes, "float32"), [[0, 0], [1, 0], [0, 0]])
    labels = ops.pad(ops.cast(labels, "int32"), [[0, 0], [1, 0]], constant_values=BACKGROUND - 1)
    rows = matches + 1
    matched_boxes = ops.take_along_axis(boxes, rows[:, :, None], axis=1)  # (B, A, 4)
    classes = ops.take_along_axis(labels, rows, axis=1) + 1
    return ops.where((classes != BACKGROUND)[:, :, None], matched_boxes, anchors), classes


def mined_cross_entropy(classes, logits, negative_ratio, negative_mask=None):
    """Cross entropy of positives and hard negatives.

    Args:
        classes: int, (batch, anchors), 0 is background.
        logits: predictions, (batch, anchors, classes + 1), background first.
        negative_ratio: hard negatives per positive, for each image.
        negative_mask: optional boolean (batch, anchors); negatives outside are never mined.

    Returns:
        Losses (batch, anchors), 0 for anchors that were not mined.
    """
    log_probability = ops.log_softmax(logits, axis=-1)
    one_hot = ops.one_hot(classes, logits.shape[-1], dtype="float32")
    loss = -ops.sum(one_hot * log_probability, axis=-1)  # (B, A)
    positive = classes != BACKGROUND
    candidates = ops.logical_not(positive)
    if negative_mask is not None:
        candidates = ops.logical_and(candidates, negative_mask)
    num_positive = ops.sum(ops.cast(positive, "float32"), axis=1)
    num_wanted = ops.cast(negative_ratio * num_positive, "int32")
    mined = hard_negatives(ops.stop_gradient(loss), candidates, num_wanted)
    return ops.where(ops.logical_or(positive, mined), loss, 0.0)


def smooth_l1(targets, predictions, knee: float = 1.0):
    """Smooth L1 loss (Fast R-CNN eq. 3) of (..., 4) arrays, summed over the last axis.

    Up to an error of `knee` the loss is quadratic, beyond it linear with slope 1.
    """
    error = ops.abs(targets - predictions)
    loss = ops.where(error < knee, 0.5 * error * error / knee, error - 0.5 * knee)
    return ops.sum(loss, axis=-1)


def binary_cross_entropy(targets, logits):
    """Binary cross entropy with logits, element by element."""
    return ops.relu(logits) - logits * targets + ops.softplus(-ops.abs(logits))


def hard_negatives(loss, candidates, num_wanted):
    """Selects the candidates of each image that have the largest loss.

    Args:
        loss: (batch, anchors), finite.
        candidates: boolean, (batch, anchors).
        num_wanted: int32, (batch,).

    Returns:
        Boolean (batch, anchors), true for `num_wanted` candidates or all if there are fewer.
    """
    loss = ops.where(candidates, loss, -float("inf"))
    order = ops.argsort(-loss, axis=1)
    rank = ops.argsort(order, axis=1)  # position of each anchor by falling loss
    return candidates & (ops.cast(rank, "int32") < num_wanted[:, None])
