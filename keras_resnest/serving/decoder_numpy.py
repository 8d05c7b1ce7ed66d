"""NumpyDetectionDecoder: from the raw outputs of RefineDet to detections, by numpy alone.

This file imports nothing but the standard library and numpy. Copied beside an exported
network it makes detections of what onnxruntime, OpenVINO or LiteRT return.
"""

import collections.abc
import json
import os
import pathlib

import numpy as np

# As in `keras_resnest.boxes.offsets`, which this file must not import.
VARIANCES = (0.1, 0.2)
MAX_LOG_SIZE_RATIO = float(np.log(1000.0 / 16.0))

PADDING = -1  # fills the rows beyond `num_detections`
NMS_BLOCK = 128  # boxes compared at once: bounds the memory, whatever `pre_nms_top_k` is

# (left, top, right, bottom) to every format; "rel_" is divided by the sides afterwards.
_FROM_CORNERS = {
    "xyxy": lambda x1, y1, x2, y2: (x1, y1, x2, y2),
    "yxyx": lambda x1, y1, x2, y2: (y1, x1, y2, x2),
    "xywh": lambda x1, y1, x2, y2: (x1, y1, x2 - x1, y2 - y1),
    "center_xywh": lambda x1, y1, x2, y2: (
        x1 + (x2 - x1) / 2.0,
        y1 + (y2 - y1) / 2.0,
        x2 - x1,
        y2 - y1,
    ),
    "center_yxhw": lambda x1, y1, x2, y2: (
        y1 + (y2 - y1) / 2.0,
        x1 + (x2 - x1) / 2.0,
        y2 - y1,
        x2 - x1,
    ),
}
_Y_FIRST = ("yxyx", "center_yxhw")
BOX_FORMATS = (*_FROM_CORNERS, "rel_xyxy", "rel_yxyx", "rel_xywh", "rel_center_xywh")


class NumpyDetectionDecoder:
    """What `RefineDet.decode` does, without Keras.

    The anchors are refined by the first stage (ARM) and again by the second (ODM). Anchors
    whose ARM objectness is at most `objectness_threshold` are discarded. Then, for each class,
    the `pre_nms_top_k` most confident boxes above `confidence_threshold` go through
    non-maximum suppression, and the `max_detections` best of all classes are kept.

    Args:
        anchors: `"xyxy"` in pixels, (anchors, 4): `model.anchors`.
        image_shape: (height, width, ...) in pixels, of the images that the network takes.
        bounding_box_format: format of the resulting boxes, one of `BOX_FORMATS`.
        objectness_threshold: lowest ARM objectness, exclusive, 0 to 1.
        confidence_threshold: lowest class probability, exclusive, 0 to 1.
        iou_threshold: of two boxes of one class whose IoU is above, the less confident one is
            dropped.
        pre_nms_top_k: candidates of each class of each image that enter suppression.
        max_detections: detections of one image, all classes together.
        clip_to_image: whether the resulting boxes are clipped to the image.
        variances: scale of center offsets and of log sizes, as in training.
        two_step_regression: whether the ODM starts from the anchors as the ARM refines them;
            otherwise it starts from the anchors, and `"arm_boxes"` is not needed.
        negative_anchor_filtering: whether anchors of low objectness are discarded; otherwise
            none is, and `"arm_objectness"` is not needed.
        class_names: names of the classes by label, or None. The logits must be of as many.

    Differences from `keras_resnest.detection.DetectionDecoder`: an anchor whose box is not
    finite, because the network overflowed or diverged, is discarded (there its box is a
    detection with NaN in it, or, if merely infinite, a line at the border); a NaN confidence is
    never a detection (as there), nor does it take a place among the `pre_nms_top_k`. Of equal
    confidences the lower label comes first, then the lower anchor; there TensorFlow decides.

    Raises:
        ValueError: if an argument is out of its range or has a wrong shape.

    Example:

    >>> decoder = NumpyDetectionDecoder.from_files("exported/detector.onnx.json")
    >>> detections = decoder(dict(zip(names, session.run(names, {"images": images}))))
    >>> detections = decoder.scale_to_image(detections, 480, 640)
    >>> detections["boxes"].shape
    (batch, 200, 4)

    Source: RefineDet (arXiv 1711.06897) section 3.4, "Inference".
    """

    def __init__(
        self,
        anchors,
        image_shape,
        bounding_box_format="xyxy",
        objectness_threshold=0.01,
        confidence_threshold=0.01,
        iou_threshold=0.45,
        pre_nms_top_k=400,
        max_detections=200,
        clip_to_image=True,
        variances=VARIANCES,
        two_step_regression=True,
        negative_anchor_filtering=True,
        class_names=None,
    ):
        self.anchors = _checked_anchors(anchors)
        self.image_shape = _checked_image_shape(image_shape)
        self.bounding_box_format = _checked_box_format(bounding_box_format)
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
        if np.shape(variances) != (2,):
            raise ValueError(
                "`variances` must be two numbers, of centers and of log sizes. "
                f"Received: variances={variances}"
            )
        self.objectness_threshold = float(objectness_threshold)
        self.confidence_threshold = float(confidence_threshold)
        self.iou_threshold = float(iou_threshold)
        self.pre_nms_top_k = int(pre_nms_top_k)
        self.max_detections = int(max_detections)
        self.clip_to_image = bool(clip_to_image)
        self.variances = tuple(float(v) for v in variances)
        self.two_step_regression = bool(two_step_regression)
        self.negative_anchor_filtering = bool(negative_anchor_filtering)
        if class_names is not None and not isinstance(class_names, (list, tuple)):
            raise ValueError(
                f"`class_names` must be a list of names or None. Received: {class_names!r}"
            )
        self.class_names = None if class_names is None else [str(name) for name in class_names]

    @classmethod
    def from_files(cls, path):
        """Reads a decoder that was written beside an exported network.

        Args:
            path: JSON file `{"image_shape": [height, width, 3], "bounding_box_format": "xyxy",
                "anchors": "anchors.npy", "decoder": {...}, "two_step_regression": true,
                "negative_anchor_filtering": true, "class_names": [...] or null}`, where
                `"anchors"` is a file beside it, `"decoder"` holds the fields of
                `DetectionDecoder.get_config()` (absent ones have their defaults) and
                `"class_names"` may be absent. Other keys are ignored.

        Returns:
            A `NumpyDetectionDecoder`.

        Raises:
            FileNotFoundError: if one of the two files is missing.
            ValueError: if the JSON file lacks a key or has a wrong value.

        Example:

        >>> decoder = NumpyDetectionDecoder.from_files("exported/detector.onnx.json")
        """
        path = pathlib.Path(path)
        facts = _read_json(path)
        needed = (
            "image_shape",
            "bounding_box_format",
            "anchors",
            "decoder",
            "two_step_regression",
            "negative_anchor_filtering",
        )
        missing = [key for key in needed if key not in facts]
        if missing:
            raise ValueError(f"{path} must have the keys {', '.join(needed)}. Missing: {missing}")
        settings = _checked_settings(path, facts["decoder"])
        switches = {name: facts[name] for name in needed[-2:]}
        for name, value in {"clip_to_image": True, **settings, **switches}.items():
            if name in ("clip_to_image", *switches) and not isinstance(value, bool):
                raise ValueError(f'"{name}" in {path} must be true or false. Received: {value!r}')
        anchors = _read_anchors(path, facts["anchors"])
        try:
            return cls(
                anchors,
                facts["image_shape"],
                facts["bounding_box_format"],
                class_names=facts.get("class_names"),
                **switches,
                **settings,
            )
        except (TypeError, ValueError, OverflowError) as error:  # a word for a number is the first
            raise ValueError(f"{path} holds a wrong value: {error}") from error

    def __call__(self, raw_outputs):
        """Detections of a batch.

        Args:
            raw_outputs: what the network returns, a dictionary of arrays of any float type:
                `"arm_boxes"` (batch, anchors, 4), `"arm_objectness"` (batch, anchors, 2),
                `"odm_boxes"` (batch, anchors, 4), `"odm_logits"` (batch, anchors, classes + 1).
                Other keys are ignored.

        Returns:
            As `RefineDet.predict`, a dictionary of arrays: `"boxes"` (batch, max_detections, 4)
            float32 in `bounding_box_format`, `"confidence"` float32 and `"labels"` int32
            (batch, max_detections), by falling confidence, and `"num_detections"` int32
            (batch,). Rows beyond are -1.

        Raises:
            ValueError: if an output is missing or has a wrong shape or type.
        """
        raw = self._checked_outputs(raw_outputs)
        batch = len(raw["odm_boxes"])
        result = {
            "boxes": np.full((batch, self.max_detections, 4), PADDING, np.float32),
            "confidence": np.full((batch, self.max_detections), PADDING, np.float32),
            "labels": np.full((batch, self.max_detections), PADDING, np.int32),
            "num_detections": np.zeros(batch, np.int32),
        }
        # Overflow is expected of a diverging network, and handled.
        with np.errstate(all="ignore"):
            for i in range(batch):
                image = {name: value[i] for name, value in raw.items()}
                boxes, confidence, labels = self._detect(image)
                count = len(labels)
                result["boxes"][i, :count] = boxes
                result["confidence"][i, :count] = confidence
                result["labels"][i, :count] = labels
                result["num_detections"][i] = count
        return result

    def scale_to_image(self, detections, image_height, image_width):
        """Moves boxes from the pixels of the network's image to those of the image itself.

        Args:
            detections: what this decoder returned, of images that were stretched to
                `image_shape`.
            image_height: height of the image before that, in pixels; a number, or an array
                (batch,).
            image_width: width, likewise.

        Returns:
            A new dictionary, with other `"boxes"`. Padding rows and the boxes of `"rel_*"`
            formats stay as they are.

        Example:

        >>> decoder.scale_to_image(detections, 480, 640)["boxes"][0, 0]
        array([ 12.5,  40. , 210. , 300. ], dtype=float32)
        """
        if self.bounding_box_format.startswith("rel_"):
            return dict(detections)
        height, width = self.image_shape[:2]
        y = np.asarray(image_height, np.float32) / np.float32(height)
        x = np.asarray(image_width, np.float32) / np.float32(width)
        if np.any(~(y > 0)) or np.any(~(x > 0)):
            raise ValueError(
                "`image_height` and `image_width` must be positive. Received: "
                f"image_height={image_height}, image_width={image_width}"
            )
        y, x = np.broadcast_arrays(y, x)
        sides = (y, x, y, x) if self.bounding_box_format in _Y_FIRST else (x, y, x, y)
        boxes = np.asarray(detections["boxes"], np.float32)
        real = np.asarray(detections["labels"])[..., None] >= 0
        scaled = boxes * np.stack(sides, axis=-1)[..., None, :]
        return {**detections, "boxes": np.where(real, scaled, boxes)}

    # === One image ===

    def _detect(self, raw):
        """Boxes (n, 4), confidence (n,) and labels (n,) of one image, by falling confidence."""
        boxes, confidence = self._candidates(raw)
        kept, scores, labels = [], [], []
        best = np.zeros(0, np.float32)  # the `max_detections` best so far
        for label, of_class in enumerate(confidence):
            # What does not beat the last of `max_detections` others cannot be among the best.
            floor = best[0] if len(best) == self.max_detections else self.confidence_threshold
            rows = self._most_confident(of_class, floor)
            if not len(rows):
                continue
            rows = rows[_suppress(boxes[rows], self.iou_threshold, self.max_detections)]
            kept.append(rows)
            scores.append(of_class[rows])
            labels.append(np.full(len(rows), label, np.int32))
            best = np.sort(np.concatenate([best, scores[-1]]))[-self.max_detections :]
        if not kept:
            return boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int32)
        kept, scores, labels = (np.concatenate(x) for x in (kept, scores, labels))
        order = np.argsort(-scores, kind="stable")[: self.max_detections]
        return self._finished(boxes[kept[order]]), scores[order], labels[order]

    def _candidates(self, raw):
        """Boxes (n, 4) of the anchors that are not discarded, and confidence (classes, n)."""
        anchors = self.anchors
        if self.negative_anchor_filtering:
            objectness = _softmax(raw["arm_objectness"])[:, 1]
            rows = np.flatnonzero(objectness > self.objectness_threshold)
            raw = {name: value[rows] for name, value in raw.items()}
            anchors = anchors[rows]
        if self.two_step_regression:
            anchors = _decode_boxes(raw["arm_boxes"], anchors, self.variances)
        boxes = _decode_boxes(raw["odm_boxes"], anchors, self.variances)
        confidence = _softmax(raw["odm_logits"])[:, 1:]
        finite = np.isfinite(boxes).all(axis=1)
        if not finite.all():
            boxes, confidence = boxes[finite], confidence[finite]
        return boxes, np.ascontiguousarray(confidence.T)

    def _most_confident(self, confidence, floor):
        """At most `pre_nms_top_k` rows whose confidence is above `floor`, falling."""
        rows = np.flatnonzero(confidence > floor)  # NaN is not
        k = self.pre_nms_top_k
        if len(rows) > k:  # partition first: sorting all would take most of the time
            lowest = np.partition(confidence[rows], len(rows) - k)[len(rows) - k]
            rows = rows[confidence[rows] >= lowest]
        return rows[np.argsort(-confidence[rows], kind="stable")[:k]]

    def _finished(self, boxes):
        """`"xyxy"` boxes clipped and in `bounding_box_format`."""
        height, width = self.image_shape[:2]
        sides = np.array([width, height, width, height], np.float32)
        if self.clip_to_image:
            boxes = np.clip(boxes, np.float32(0.0), sides)
        name = self.bounding_box_format
        relative = name.startswith("rel_")
        kind = name[len("rel_") :] if relative else name
        boxes = np.stack(_FROM_CORNERS[kind](*boxes.T), axis=-1)
        if relative:
            boxes = boxes / (sides[[1, 0, 3, 2]] if kind in _Y_FIRST else sides)
        return boxes

    # === Checks ===

    def _checked_outputs(self, raw_outputs):
        """The outputs that are used, as float32 arrays."""
        classes = None if self.class_names is None else len(self.class_names) + 1
        channels = {"odm_boxes": 4, "odm_logits": classes}
        if self.two_step_regression:
            channels["arm_boxes"] = 4
        if self.negative_anchor_filtering:
            channels["arm_objectness"] = 2
        if not isinstance(raw_outputs, collections.abc.Mapping):
            raise ValueError(
                f"`raw_outputs` must be a dictionary with the keys {', '.join(sorted(channels))}. "
                f"Received: {type(raw_outputs).__name__}"
            )
        # Asked for one by one: OpenVINO's dictionary knows names that it does not list.
        missing = sorted(name for name in channels if name not in raw_outputs)
        if missing:
            raise ValueError(
                f"`raw_outputs` must have the keys {', '.join(sorted(channels))}. "
                f"Missing: {missing}. Received: {sorted(map(str, raw_outputs))}"
            )
        raw = {name: np.asarray(raw_outputs[name]) for name in channels}
        start = (*raw["odm_boxes"].shape[:1], len(self.anchors))
        for name, value in raw.items():
            width = value.shape[-1] if value.ndim == 3 else 0
            if value.shape[:-1] != start or width < 2 or width != (channels[name] or width):
                raise ValueError(
                    f"`{name}` must have shape (batch, {len(self.anchors)}, "
                    f"{channels[name] or 'classes + 1'}), batch as in `odm_boxes`. "
                    f"Received: {name}.shape={value.shape}"
                )
            # "V" is bfloat16, which numpy does not know. Integers are a quantized network's.
            if value.dtype.kind not in "fV":
                raise ValueError(
                    f"`{name}` must be of a float type; dequantize integers first. "
                    f"Received: {name}.dtype={value.dtype}"
                )
        # Values beyond float32 become infinite, and are handled like others that are.
        with np.errstate(over="ignore"):
            return {name: value.astype(np.float32, copy=False) for name, value in raw.items()}


def _softmax(x):
    """Over the last axis; NaN for a row with NaN or +inf in it."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def _decode_boxes(offsets, anchors, variances):
    """Applies offsets dx, dy, dw, dh (n, 4) to `"xyxy"` anchors (n, 4)."""
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2.0
    sizes = anchors[:, 2:] - anchors[:, :2]
    centers = centers + offsets[:, :2] * variances[0] * sizes
    half = sizes * np.exp(np.minimum(offsets[:, 2:] * variances[1], MAX_LOG_SIZE_RATIO)) / 2.0
    return np.concatenate([centers - half, centers + half], axis=1)


def _suppress(boxes, iou_threshold, limit):
    """Indices of the first `limit` boxes (n, 4) whose IoU with all kept before is not above."""
    kept = np.zeros(0, int)
    for start in range(0, len(boxes), NMS_BLOCK):
        block = boxes[start : start + NMS_BLOCK]
        alive = ~(_pairwise_iou(boxes[kept], block) > iou_threshold).any(axis=0)
        apart = ~(_pairwise_iou(block, block) > iou_threshold)
        for i in range(len(block)):
            if alive[i]:
                alive[i + 1 :] &= apart[i, i + 1 :]
        kept = np.concatenate([kept, start + np.flatnonzero(alive)])
        if len(kept) >= limit:
            break
    return kept[:limit]


def _pairwise_iou(boxes1, boxes2):
    """(m, n) IoU of `"xyxy"` boxes (m, 4) and (n, 4); 0 for a box without area."""
    left1, top1, right1, bottom1 = boxes1.T[:, :, None]
    left2, top2, right2, bottom2 = boxes2.T
    width = np.minimum(right1, right2) - np.maximum(left1, left2)
    height = np.minimum(bottom1, bottom2) - np.maximum(top1, top2)
    intersection = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    area1 = np.maximum(right1 - left1, 0.0) * np.maximum(bottom1 - top1, 0.0)
    area2 = np.maximum(right2 - left2, 0.0) * np.maximum(bottom2 - top2, 0.0)
    union = area1 + area2 - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0.0)


def _checked_anchors(anchors):
    anchors = np.asarray(anchors)
    if anchors.ndim != 2 or anchors.shape[1] != 4 or anchors.dtype.kind not in "fiu":
        raise ValueError(
            '`anchors` must be numbers of shape (anchors, 4), "xyxy" in pixels. Received: '
            f"anchors.shape={anchors.shape}, anchors.dtype={anchors.dtype}"
        )
    if not np.isfinite(anchors).all():
        raise ValueError("`anchors` must be finite. Received: NaN or infinite numbers")
    return anchors.astype(np.float32)


def _checked_image_shape(image_shape):
    shape = tuple(image_shape) if isinstance(image_shape, (list, tuple, np.ndarray)) else ()
    sides = shape[:2]
    if len(sides) != 2 or any(
        isinstance(s, bool) or not isinstance(s, (int, np.integer)) or s < 1 for s in sides
    ):
        raise ValueError(
            "`image_shape` must be (height, width, ...) in pixels, positive integers. "
            f"Received: image_shape={image_shape}"
        )
    return shape


def _checked_box_format(bounding_box_format):
    name = str(bounding_box_format).lower()
    if name not in BOX_FORMATS:
        raise ValueError(
            f"`bounding_box_format` must be one of {', '.join(BOX_FORMATS)}. "
            f"Received: bounding_box_format={bounding_box_format!r}"
        )
    return name


def _checked_settings(path, settings):
    """The fields of `DetectionDecoder.get_config()`."""
    known = (
        "objectness_threshold",
        "confidence_threshold",
        "iou_threshold",
        "pre_nms_top_k",
        "max_detections",
        "clip_to_image",
        "variances",
    )
    if not isinstance(settings, dict) or not set(settings) <= set(known):
        raise ValueError(
            f'"decoder" in {path} must be an object with the keys {", ".join(known)}. '
            f"Received: {settings}"
        )
    return settings


def _read_json(path):
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file. Received: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} must hold a JSON object. Received: {type(facts).__name__}")
    return facts


def _read_anchors(path, name):
    """The array of a file beside the JSON file `path`."""
    # A name alone: a file from elsewhere must not make this one read other folders.
    if not isinstance(name, str) or name in ("", "..") or os.path.basename(name) != name:
        raise ValueError(
            f'"anchors" in {path} must be the name of a file beside it. Received: {name!r}'
        )
    file = path.parent / name
    try:
        anchors = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} must be an .npy file of numbers. Received: {error}") from error
    if not isinstance(anchors, np.ndarray):
        raise ValueError(f"{file} must be an .npy file of one array. Received: an .npz file")
    return anchors
