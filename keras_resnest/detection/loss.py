"""RefineDetLoss: matching, hard negative mining and the losses of both stages.

The loss knows raw outputs, ground truth and anchors. It never sees an image or a weight.
"""

import keras
from keras import ops

from keras_resnest.boxes.matching import BACKGROUND, BoxMatcher
from keras_resnest.boxes.offsets import VARIANCES, check_variances, decode_boxes, encode_boxes
from keras_resnest.checks import check_fractions, is_number
from keras_resnest.configurable import Configurable
from keras_resnest.replicas import sum_over_replicas

LOSS_NAMES = (
    "arm_box_loss",
    "arm_classification_loss",
    "odm_box_loss",
    "odm_classification_loss",
)


@keras.saving.register_keras_serializable("keras_resnest")
class RefineDetLoss(Configurable):
    """The two-stage loss of RefineDet.

    Each stage has a smooth L1 loss on the offsets of its positive anchors and a cross entropy on
    positives and mined negatives, both divided by its positives in the global batch. The ARM
    separates objects from background on the regular anchors; the ODM learns classes and offsets
    on the anchors that the ARM has refined. No gradient flows through the refined anchors.

    An image of weight 2 counts as two images: its losses and its positives count twice.

    Args:
        matcher: `BoxMatcher` that assigns anchors to objects, in both stages.
        negative_ratio: hard negatives per positive, for each image.
        objectness_threshold: anchors with an ARM objectness up to this, 0 to 1, are not mined as
            negatives of the ODM.
        negative_anchor_filtering: whether `objectness_threshold` applies (table 3 of the paper).
        two_step_regression: whether the ODM starts from the refined anchors, or from the regular
            ones (table 3). `DetectionDecoder` must have the same.
        variances: scale of center offsets and of log sizes, see `encode_boxes`.

    Raises:
        ValueError: if `negative_ratio` is negative or `objectness_threshold` is not in [0, 1].

    Example:
        >>> losses = RefineDetLoss()(model(images), boxes, labels, model.anchors)
        >>> sorted(losses)
        ['arm_box_loss', 'arm_classification_loss', 'odm_box_loss', 'odm_classification_loss']

    Source: RefineDet (arXiv 1711.06897) section 3.4 eq. 1; mining from SSD (arXiv 1512.02325)
    section 2.2.
    """

    def __init__(
        self,
        matcher: BoxMatcher | None = None,
        negative_ratio: float = 3.0,
        objectness_threshold: float = 0.01,
        negative_anchor_filtering: bool = True,
        two_step_regression: bool = True,
        variances=VARIANCES,
    ):
        if not is_number(negative_ratio) or negative_ratio < 0:
            raise ValueError(
                "`negative_ratio` must be a number that is not negative. "
                f"Received: {negative_ratio!r}"
            )
        check_fractions(objectness_threshold=objectness_threshold)
        self.matcher = matcher or BoxMatcher()
        self.negative_ratio = float(negative_ratio)
        self.objectness_threshold = float(objectness_threshold)
        self.negative_anchor_filtering = bool(negative_anchor_filtering)
        self.two_step_regression = bool(two_step_regression)
        self.variances = check_variances(variances)

    def __call__(self, outputs: dict, boxes, labels, anchors, sample_weight=None) -> dict:
        """Computes the four losses of a batch.

        Args:
            outputs: raw outputs of the model: `"arm_boxes"` (batch, anchors, 4),
                `"arm_objectness"` (batch, anchors, 2), `"odm_boxes"` (batch, anchors, 4) and
                `"odm_logits"` (batch, anchors, num_classes + 1), background first.
            boxes: ground truth, `"xyxy"` in pixels, (batch, objects, 4).
            labels: int, (batch, objects): 0 to num_classes - 1, or -1 for padding.
            anchors: `"xyxy"` in pixels, (anchors, 4).
            sample_weight: optional weights of the images, (batch,), not negative.

        Returns:
            Dictionary of float32 scalars, one for each of `LOSS_NAMES`.
        """
        outputs = {name: ops.cast(value, "float32") for name, value in outputs.items()}
        anchors = ops.convert_to_tensor(anchors, "float32")
        any_object = ops.minimum(labels, 0)  # the ARM knows a single class
        truth = boxes, any_object, sample_weight
        arm = self._stage(truth, anchors, outputs["arm_boxes"], outputs["arm_objectness"])

        if self.two_step_regression:
            refined = decode_boxes(outputs["arm_boxes"], anchors, self.variances)
            anchors = ops.stop_gradient(refined)  # (B, A, 4)
        minable = None
        if self.negative_anchor_filtering:
            objectness = ops.softmax(ops.stop_gradient(outputs["arm_objectness"]), axis=-1)[..., 1]
            minable = objectness > self.objectness_threshold
        truth = boxes, labels, sample_weight
        odm = self._stage(truth, anchors, outputs["odm_boxes"], outputs["odm_logits"], minable)
        return dict(zip(LOSS_NAMES, (*arm, *odm), strict=True))

    def _stage(self, truth: tuple, anchors, offsets, logits, negative_mask=None) -> tuple:
        """Box and classification loss of one stage."""
        boxes, labels, sample_weight = truth
        target_offsets, target_classes = encode_targets(
            boxes, labels, anchors, self.matcher, self.variances
        )
        box_sum, class_sum, positives = multibox_loss(
            target_offsets,
            target_classes,
            offsets,
            logits,
            self.negative_ratio,
            negative_mask,
            sample_weight,
        )
        count = sum_over_replicas(positives)
        count = ops.where(count > 0.0, count, 1.0)
        return box_sum / count, class_sum / count

    def get_config(self) -> dict:
        matcher = keras.saving.serialize_keras_object(self.matcher)
        return {**super().get_config(), "matcher": matcher}

    @classmethod
    def from_config(cls, config: dict) -> "RefineDetLoss":
        matcher = keras.saving.deserialize_keras_object(config["matcher"])
        return cls(**{**config, "matcher": matcher})


def encode_targets(boxes, labels, anchors, matcher: BoxMatcher, variances=VARIANCES):
    """Returns the training targets of one stage.

    Args:
        boxes: ground truth, `"xyxy"`, (batch, objects, 4).
        labels: int, (batch, objects); padding is -1.
        anchors: `"xyxy"`, (anchors, 4), or (batch, anchors, 4) for refined anchors.
        matcher: the `BoxMatcher`.
        variances: see `encode_boxes`.

    Returns:
        Offsets (batch, anchors, 4), meaningful where positive, and int32 classes (batch, anchors):
        0 for background, label + 1 for positives.
    """
    matches = matcher(boxes, labels >= 0, anchors)  # (B, A)
    # Row 0 stands for "no object", so that the lookup needs no special case.
    boxes = ops.pad(ops.cast(boxes, "float32"), [[0, 0], [1, 0], [0, 0]])
    labels = ops.pad(ops.cast(labels, "int32"), [[0, 0], [1, 0]], constant_values=BACKGROUND - 1)
    rows = matches + 1
    matched_boxes = ops.take_along_axis(boxes, rows[:, :, None], axis=1)  # (B, A, 4)
    classes = ops.take_along_axis(labels, rows, axis=1) + 1
    positive = (classes != BACKGROUND)[:, :, None]
    offsets = encode_boxes(ops.where(positive, matched_boxes, anchors), anchors, variances)
    return offsets, classes


def multibox_loss(
    target_offsets,
    target_classes,
    offsets,
    logits,
    negative_ratio,
    negative_mask=None,
    sample_weight=None,
):
    """Sums the box and the classification loss of one stage over a batch.

    Returns sums, not means: the caller divides by the positives of the global batch, which a
    single replica does not know.

    Args:
        target_offsets: (batch, anchors, 4), used where the class is not 0.
        target_classes: int, (batch, anchors), 0 is background.
        offsets: predictions, (batch, anchors, 4).
        logits: predictions, (batch, anchors, classes + 1), background first.
        negative_ratio: hard negatives per positive, for each image.
        negative_mask: optional boolean (batch, anchors); negatives outside are never mined.
        sample_weight: optional float (batch,), how often each image counts.

    Returns:
        Box loss, classification loss and number of positives, three float32 scalars.
    """
    positive = target_classes != BACKGROUND
    mask = ops.cast(positive, "float32")
    # A negative's target is its own prediction: the loss is exactly zero, never 0 * inf.
    target_offsets = ops.where(positive[:, :, None], target_offsets, offsets)
    box_loss = mask * smooth_l1(ops.stop_gradient(target_offsets), offsets)  # (B, A)

    log_probability = ops.log_softmax(logits, axis=-1)
    one_hot = ops.one_hot(target_classes, logits.shape[-1], dtype="float32")
    class_loss = -ops.sum(one_hot * log_probability, axis=-1)  # (B, A)
    candidates = ops.logical_not(positive)
    if negative_mask is not None:
        candidates = ops.logical_and(candidates, negative_mask)
    num_wanted = ops.cast(negative_ratio * ops.sum(mask, axis=1), "int32")
    mined = hard_negatives(ops.stop_gradient(class_loss), candidates, num_wanted)
    class_loss = ops.where(ops.logical_or(positive, mined), class_loss, 0.0)
    weight = 1.0 if sample_weight is None else sample_weight[:, None]
    return tuple(ops.sum(weight * values) for values in (box_loss, class_loss, mask))


def smooth_l1(targets, predictions):
    """Smooth L1 loss (Fast R-CNN eq. 3) of (..., 4) arrays, summed over the last axis."""
    error = ops.abs(targets - predictions)
    return ops.sum(ops.where(error < 1.0, 0.5 * error * error, error - 0.5), axis=-1)


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
