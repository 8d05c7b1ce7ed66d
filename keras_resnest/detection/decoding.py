"""DetectionDecoder: from the raw outputs of RefineDet to detections."""

import keras
from keras import ops

from keras_resnest.boxes.formats import clip_boxes, convert_boxes
from keras_resnest.boxes.offsets import VARIANCES, decode_boxes
from keras_resnest.boxes.overlap import pairwise_iou

PADDING = -1  # fills the rows beyond `num_detections`


@keras.saving.register_keras_serializable("keras_resnest")
class DetectionDecoder:
    """Cascade decoding, filtering and non-maximum suppression of a batch.

    The first stage (ARM) refines the anchors, the second (ODM) refines them again. Anchors whose
    ARM objectness is at most `objectness_threshold` are discarded. For each class, the
    `pre_nms_top_k` most confident boxes above `confidence_threshold` go through non-maximum
    suppression (NMS); the `max_detections` most confident ones of all classes are kept.

    Args:
        objectness_threshold: lowest ARM objectness, exclusive, 0 to 1.
        confidence_threshold: lowest class probability, exclusive, 0 to 1.
        iou_threshold: of two boxes of a class with a higher IoU, NMS drops the less confident one.
        pre_nms_top_k: candidates per class and image that enter NMS.
        max_detections: detections per image, all classes together.
        clip_to_image: whether the resulting boxes are clipped to the image.
        negative_anchor_filtering: whether `objectness_threshold` applies.
        two_step_regression: whether the ODM refines the ARM's boxes; otherwise it refines the
            regular anchors.
        variances: as in training, see `encode_boxes`.

    Raises:
        ValueError: if a threshold is not in [0, 1] or a count is not a positive integer.

    Source: RefineDet (arXiv 1711.06897) section 3.4, "Inference". The defaults of
    `pre_nms_top_k` and `max_detections` are the paper's; the authors' code has 1000 and 500.

    Example:

    >>> decoder = DetectionDecoder(max_detections=100)
    >>> detections = decoder(model(images), model.anchors, (320, 320))
    >>> detections["boxes"].shape
    (batch, 100, 4)
    """

    def __init__(
        self,
        objectness_threshold: float = 0.01,
        confidence_threshold: float = 0.01,
        iou_threshold: float = 0.45,
        pre_nms_top_k: int = 400,
        max_detections: int = 200,
        clip_to_image: bool = True,
        negative_anchor_filtering: bool = True,
        two_step_regression: bool = True,
        variances=VARIANCES,
    ):
        for name, value in (
            ("objectness_threshold", objectness_threshold),
            ("confidence_threshold", confidence_threshold),
            ("iou_threshold", iou_threshold),
        ):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` must be between 0 and 1. Received: {name}={value}")
        for name, value in (("pre_nms_top_k", pre_nms_top_k), ("max_detections", max_detections)):
            if int(value) != value or value < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value}")
        self.objectness_threshold = float(objectness_threshold)
        self.confidence_threshold = float(confidence_threshold)
        self.iou_threshold = float(iou_threshold)
        self.pre_nms_top_k = int(pre_nms_top_k)
        self.max_detections = int(max_detections)
        self.clip_to_image = bool(clip_to_image)
        self.negative_anchor_filtering = bool(negative_anchor_filtering)
        self.two_step_regression = bool(two_step_regression)
        self.variances = tuple(variances)

    def __call__(
        self,
        outputs: dict,
        anchors,
        image_shape,
        bounding_box_format: str = "xyxy",
        portable: bool = False,
    ) -> dict:
        """Decodes a batch.

        Args:
            outputs: raw outputs of the model: `"arm_boxes"` (batch, anchors, 4),
                `"arm_objectness"` (batch, anchors, 2), `"odm_boxes"` (batch, anchors, 4) and
                `"odm_logits"` (batch, anchors, classes + 1).
            anchors: `"xyxy"` in pixels, (anchors, 4).
            image_shape: (height, width, ...) in pixels.
            bounding_box_format: format of the resulting boxes.
            portable: whether NMS consists of elementary operations that every runtime has, where
                TensorFlow has an operation of its own. The results are equal.

        Returns:
            Dictionary of `"boxes"` (batch, max_detections, 4) in `bounding_box_format`,
            `"confidence"` and `"labels"` (batch, max_detections), by falling confidence, and
            `"num_detections"` (batch,). Rows beyond are -1.
        """
        boxes, confidence = self.candidates(outputs, anchors)  # (B, A, 4), (B, A, C)
        k = min(self.pre_nms_top_k, confidence.shape[1])
        if keras.backend.backend() == "tensorflow" and portable:
            boxes, confidence = _only_candidates(boxes, confidence, self.confidence_threshold, k)
        boxes, confidence = _top_k_per_class(boxes, confidence, k)  # (B, C, k, 4), (B, C, k)
        native = keras.backend.backend() == "tensorflow" and not portable
        suppress = _suppress_tensorflow if native else _suppress
        boxes, confidence, labels, count = suppress(
            boxes, confidence, self.confidence_threshold, self.iou_threshold, self.max_detections
        )
        height, width = image_shape[:2]
        if self.clip_to_image:
            boxes = clip_boxes(boxes, height, width)
        boxes = convert_boxes(boxes, "xyxy", bounding_box_format, height, width)
        return self._pad(boxes, confidence, labels, count)

    def candidates(self, outputs: dict, anchors):
        """Returns boxes (batch, anchors, 4) and confidence (batch, anchors, classes) before NMS."""
        raw = {name: ops.cast(value, "float32") for name, value in outputs.items()}
        anchors = ops.convert_to_tensor(anchors, dtype="float32")
        if self.two_step_regression:
            anchors = decode_boxes(raw["arm_boxes"], anchors, self.variances)  # (B, A, 4)
        boxes = decode_boxes(raw["odm_boxes"], anchors, self.variances)
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

    def get_config(self) -> dict:
        return {
            "objectness_threshold": self.objectness_threshold,
            "confidence_threshold": self.confidence_threshold,
            "iou_threshold": self.iou_threshold,
            "pre_nms_top_k": self.pre_nms_top_k,
            "max_detections": self.max_detections,
            "clip_to_image": self.clip_to_image,
            "negative_anchor_filtering": self.negative_anchor_filtering,
            "two_step_regression": self.two_step_regression,
            "variances": self.variances,
        }

    @classmethod
    def from_config(cls, config: dict) -> "DetectionDecoder":
        return cls(**config)


def _only_candidates(boxes, confidence, confidence_threshold, k: int):
    """Anchors that are candidates of any image and class, filled up with zeros to k.

    TensorFlow graphs only, where runtimes sort slowly: of OpenVINO's time for decoding and
    suppression three quarters went into sorting all anchors.
    """
    import tensorflow as tf

    chosen = tf.where(tf.reduce_any(confidence > confidence_threshold, axis=(0, 2)))[:, 0]
    missing = [[0, 0], [0, tf.maximum(k - tf.shape(chosen)[0], 0)], [0, 0]]
    return [tf.pad(tf.gather(x, chosen, axis=1), missing) for x in (boxes, confidence)]


def _top_k_per_class(boxes, confidence, k: int):
    """The k most confident anchors of every class: (B, C, k, 4) and (B, C, k), falling."""
    num_classes = confidence.shape[2]
    by_class = ops.transpose(confidence, (0, 2, 1))  # (B, C, A)
    values, index = ops.top_k(by_class, k)  # (B, C, k)
    flat = ops.reshape(index, (-1, num_classes * k, 1))
    chosen = ops.take_along_axis(boxes, flat, axis=1)
    return ops.reshape(chosen, (-1, num_classes, k, 4)), values


def _suppress_tensorflow(boxes, confidence, confidence_threshold, iou_threshold, max_detections):
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


def _suppress(boxes, confidence, confidence_threshold, iou_threshold, max_detections):
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
