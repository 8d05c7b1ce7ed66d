"""DetectionDecoder: from the raw outputs of RefineDet to detections."""

from collections.abc import Mapping, Sequence

import keras
from keras import ops

from keras_resnest.boxes.formats import clip_boxes, convert_boxes
from keras_resnest.boxes.offsets import VARIANCES, check_variances, decode_boxes
from keras_resnest.boxes.suppression import Suppression, suppress_batch
from keras_resnest.checks import (
    check_counts,
    check_fractions,
    checked,
    class_thresholds,
    float_outputs,
)
from keras_resnest.configurable import Configurable

PADDING = -1  # fills the rows beyond `num_detections`


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class DetectionDecoder(Configurable):
    """Cascade decoding, filtering and non-maximum suppression of a batch.

    The first stage (ARM) refines the anchors, the second (ODM) refines them again. Anchors whose
    ARM objectness is at most `objectness_threshold` are discarded. For each class, the
    `pre_nms_top_k` most confident boxes above `confidence_threshold` go through non-maximum
    suppression (NMS); the `max_detections` most confident ones of all classes are kept.

    Args:
        objectness_threshold: lowest ARM objectness, exclusive, 0 to 1.
        confidence_threshold: lowest class probability, exclusive, 0 to 1; or a dictionary with one
            for each class name (`"0"`, `"1"`, ... for a model without names), such as
            `DetectionReport.best_thresholds`.
        iou_threshold: of two boxes of a class with a higher IoU, NMS drops the less confident one.
        pre_nms_top_k: candidates per class and image that enter NMS.
        max_detections: detections per image, all classes together.
        clip_to_image: whether the resulting boxes are clipped to the image.
        negative_anchor_filtering: whether `objectness_threshold` applies.
        two_step_regression: whether the ODM refines the ARM's boxes, or the regular anchors.
        variances: as in training, see `encode_boxes`.
        suppression: `"greedy"` NMS; `"diou"`, which subtracts from the IoU the distance of the
            centers, so that crowded objects survive; or `"soft"`, which multiplies the confidence
            of a box by 1 - IoU instead of dropping it.
        class_agnostic: whether each box keeps only its best class, and all classes count as one,
            so that an object is found once.
        alpha: exponent, 0 to 1, of the class probability p where the network predicts the IoU of
            its boxes: the confidence is `p**alpha * iou**(1 - alpha)`.
        voting_iou: if not None, each box that remains moves to the mean, weighted by confidence, of
            all candidates of its class whose IoU with it is at least this ("box voting"). Boxes
            are placed better.
        exclusive_classes: whether an object is of one class. The confidence of a box is multiplied
            by the square root of 1 - p for each box of another class that has a higher confidence p
            and an IoU with it above `iou_threshold`. Unlike `class_agnostic`, the second most
            likely class remains, with low confidence.

    Raises:
        ValueError: if a threshold or `alpha` is not in [0, 1], a count is not a positive integer,
            or `suppression` is unknown.

    Example:
        >>> decoder = DetectionDecoder(max_detections=100)
        >>> detections = decoder(model(images), model.anchors, (320, 320))
        >>> detections["boxes"].shape
        (batch, 100, 4)

    Source: RefineDet (arXiv 1711.06897) section 3.4, "Inference". The defaults of
    `pre_nms_top_k` and `max_detections` are the paper's; the authors' code has 1000 and 500.
    DIoU: arXiv 1911.08287 section 3.4; soft: arXiv 1704.04503; `alpha`: arXiv 1912.05992 eq. 7;
    voting: arXiv 1505.01749 section 5.
    """

    def __init__(
        self,
        objectness_threshold: float = 0.01,
        confidence_threshold: float | Mapping[str, float] = 0.01,
        iou_threshold: float = 0.45,
        pre_nms_top_k: int = 400,
        max_detections: int = 200,
        clip_to_image: bool = True,
        negative_anchor_filtering: bool = True,
        two_step_regression: bool = True,
        variances=VARIANCES,
        suppression: Suppression = "greedy",
        class_agnostic: bool = False,
        alpha: float = 0.5,
        voting_iou: float | None = None,
        exclusive_classes: bool = False,
    ):
        check_fractions(
            alpha=alpha,
            voting_iou=voting_iou or 0.0,
            objectness_threshold=objectness_threshold,
            iou_threshold=iou_threshold,
        )
        names = confidence_threshold if isinstance(confidence_threshold, Mapping) else [""]
        limits = class_thresholds(confidence_threshold, list(names))
        check_counts(pre_nms_top_k=pre_nms_top_k, max_detections=max_detections)
        self.objectness_threshold = float(objectness_threshold)
        is_per_class = isinstance(confidence_threshold, Mapping)
        thresholds = dict(zip(names, limits, strict=True))
        self.confidence_threshold = thresholds if is_per_class else limits[0]
        self.iou_threshold = float(iou_threshold)
        self.pre_nms_top_k = int(pre_nms_top_k)
        self.max_detections = int(max_detections)
        self.clip_to_image = bool(clip_to_image)
        self.negative_anchor_filtering = bool(negative_anchor_filtering)
        self.two_step_regression = bool(two_step_regression)
        self.variances = check_variances(variances)
        self.suppression = suppression
        self.class_agnostic = bool(class_agnostic)
        self.alpha = float(alpha)
        self.voting_iou = None if voting_iou is None else float(voting_iou)
        self.exclusive_classes = bool(exclusive_classes)

    def __call__(
        self,
        outputs: dict,
        anchors,
        image_shape,
        bounding_box_format: str = "xyxy",
        portable: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> dict:
        """Decodes a batch.

        Args:
            outputs: raw outputs of the model, as in `RefineDetLoss`.
            anchors: `"xyxy"` in pixels, (anchors, 4).
            image_shape: (height, width, ...) in pixels.
            bounding_box_format: format of the resulting boxes.
            portable: whether NMS uses elementary operations, which every runtime has, instead of
                TensorFlow's NMS operation. The results are equal.
            class_names: names of the classes, which a `confidence_threshold` of each class needs.

        Returns:
            Dictionary of `"boxes"` (batch, max_detections, 4) in `bounding_box_format`,
            `"confidence"` and `"labels"` (batch, max_detections), by falling confidence, and
            `"num_detections"` (batch,). Rows beyond `num_detections` are -1.
        """
        boxes, confidence = self.candidates(outputs, anchors)
        boxes, confidence, labels, count = suppress_batch(
            boxes,
            confidence,
            self.thresholds(class_names, confidence.shape[-1]),
            self.iou_threshold,
            self.pre_nms_top_k,
            self.max_detections,
            portable,
            self.suppression,
            self.class_agnostic,
            self.voting_iou,
            self.exclusive_classes,
        )
        height, width = image_shape[:2]
        if self.clip_to_image:
            boxes = clip_boxes(boxes, height, width)
        boxes = convert_boxes(boxes, "xyxy", bounding_box_format, height, width)
        return self._pad(boxes, confidence, labels, count)

    def thresholds(self, class_names: Sequence[str] | None, num_classes: int):
        """Returns `confidence_threshold`; as a list in the order of the labels if it is per class.

        Raises:
            ValueError: if it has other classes.
        """
        if not isinstance(self.confidence_threshold, dict):
            return self.confidence_threshold
        return class_thresholds(
            self.confidence_threshold, class_names or [str(i) for i in range(num_classes)]
        )

    def candidates(self, outputs: dict, anchors):
        """Returns boxes (batch, anchors, 4) and confidence (batch, anchors, classes) before NMS."""
        raw = float_outputs(outputs)
        anchors = ops.convert_to_tensor(anchors, dtype="float32")
        if self.two_step_regression:
            anchors = decode_boxes(raw["arm_boxes"], anchors, self.variances)  # (B, A, 4)
        boxes = decode_boxes(raw["odm_boxes"], anchors, self.variances)
        if "odm_iou" in raw:
            # Logarithms are faster than powers, and there is no 0 ** 0.
            iou = raw["odm_iou"]  # (B, A, 1)
            # LiteRT's `log_sigmoid` is -inf below -88.
            log_iou = ops.minimum(iou, 0.0) - ops.log(1.0 + ops.exp(-ops.abs(iou)))
            log_p = ops.log_softmax(raw["odm_logits"], axis=-1)[..., 1:]
            confidence = ops.exp(self.alpha * log_p + (1.0 - self.alpha) * log_iou)
        else:
            confidence = ops.softmax(raw["odm_logits"], axis=-1)[..., 1:]
        if self.negative_anchor_filtering:
            objectness = ops.softmax(raw["arm_objectness"], axis=-1)[..., 1:]
            confidence = ops.where(objectness > self.objectness_threshold, confidence, 0.0)
        return boxes, confidence

    def _pad(self, boxes, confidence, labels, count) -> dict:
        real = ops.arange(self.max_detections, dtype="int32")[None] < count[:, None]
        return {
            "boxes": ops.where(real[:, :, None], boxes, float(PADDING)),
            "confidence": ops.where(real, confidence, float(PADDING)),
            "labels": ops.where(real, labels, PADDING),
            "num_detections": count,
        }
