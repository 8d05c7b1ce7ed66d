"""Decodes the raw outputs of RefineDet with numpy alone.

This file imports only numpy and the standard library: copy it to wherever onnxruntime, OpenVINO or
LiteRT runs an exported network.
"""

import collections.abc
import json
import numbers
import os
import pathlib

import numpy as np

# As in `keras_resnest.boxes`, which this file must not import.
VARIANCES = (0.1, 0.2)
MAX_LOG_SIZE_RATIO = float(np.log(1000.0 / 16.0))
BOX_FORMATS = (
    *("xyxy", "yxyx", "xywh", "center_xywh", "center_yxhw"),
    *("rel_xyxy", "rel_yxyx", "rel_xywh", "rel_center_xywh"),
)
Y_FIRST = ("yxyx", "center_yxhw", "rel_yxyx")

EPSILON = 1e-7  # smallest squared diagonal that divides
PADDING = -1  # fills the rows beyond `num_detections`
SUPPRESSIONS = ("greedy", "diou", "soft")
NMS_BLOCK = 128  # boxes compared at once, which bounds the memory for any `pre_nms_top_k`

# Part of "decoder" in a JSON file; at the top level in earlier exports.
SWITCHES = ("two_step_regression", "negative_anchor_filtering")


class NumpyDetectionDecoder:
    """Decodes like `RefineDet.decode`, without Keras.

    The first stage (ARM) refines the anchors, the second (ODM) refines them again. Anchors whose
    ARM objectness is at most `objectness_threshold` are discarded. For each class, the
    `pre_nms_top_k` most confident boxes above `confidence_threshold` go through non-maximum
    suppression; the `max_detections` best of all classes remain.

    Unlike `keras_resnest.detection.DetectionDecoder`, it discards non-finite boxes. Equal
    confidences are ordered by label, then by anchor; TensorFlow leaves their order undefined.

    Args:
        anchors: `"xyxy"` in pixels, (anchors, 4): `model.anchors`.
        image_shape: (height, width, ...) of the network's images, in pixels.
        bounding_box_format: format of the detections, one of `BOX_FORMATS`.
        objectness_threshold: lowest ARM objectness, exclusive, 0 to 1.
        confidence_threshold: lowest class probability, exclusive, 0 to 1; or a dictionary with one
            for each class name (`"0"`, `"1"`, ... without names).
        iou_threshold: IoU above which the less confident of two boxes of a class is dropped.
        pre_nms_top_k: boxes of each class that enter suppression.
        max_detections: detections of one image, all classes together.
        clip_to_image: whether to clip boxes to the image.
        variances: scales of center offsets and of log sizes, as in training.
        two_step_regression: whether the ODM refines the anchors that the ARM refined, instead of
            the original ones. If False, `"arm_boxes"` is not required.
        negative_anchor_filtering: whether to discard anchors of low objectness. If False,
            `"arm_objectness"` is not required.
        class_names: names of the labels, or None; the logits must match their number.
        suppression: `"greedy"`; `"diou"`, which subtracts from the IoU the distance of the centers;
            or `"soft"`, which multiplies the confidence of a box by 1 - IoU instead of dropping it.
        class_agnostic: whether each box keeps only its best class, and all classes count as one.
        alpha: exponent, 0 to 1, of the class probability p where there is an output `"odm_iou"`:
            the confidence is `p**alpha * iou**(1 - alpha)`.
        voting_iou: if not None, each box that remains moves to the mean, weighted by confidence, of
            all boxes of its class that entered suppression and whose IoU with it is at least this.
        exclusive_classes: whether the confidence of a box is multiplied by the square root of 1 - p
            for each box of another class that has a higher confidence p and an IoU with it above
            `iou_threshold`.

    Raises:
        ValueError: if an argument is out of range or has a wrong shape.

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
        suppression="greedy",
        class_agnostic=False,
        alpha=0.5,
        voting_iou=None,
        exclusive_classes=False,
    ):
        _require(np.shape(variances) == (2,), "`variances` must be two numbers", variances)
        is_list = class_names is None or isinstance(class_names, (list, tuple))
        _require(is_list, "`class_names` must be a list or None", class_names)
        _check_choice("suppression", suppression, SUPPRESSIONS)
        self.anchors = _check_anchors(anchors)
        self.image_shape = _check_image_shape(image_shape)
        self.bounding_box_format = str(bounding_box_format).lower()
        _check_choice("bounding_box_format", self.bounding_box_format, BOX_FORMATS)
        self.objectness_threshold = _check_fraction("objectness_threshold", objectness_threshold)
        self.confidence_threshold = confidence_threshold
        self._limits = _check_thresholds(confidence_threshold, class_names)  # (classes,) or (1,)
        self.iou_threshold = _check_fraction("iou_threshold", iou_threshold)
        self.pre_nms_top_k = _check_count("pre_nms_top_k", pre_nms_top_k)
        self.max_detections = _check_count("max_detections", max_detections)
        self.clip_to_image = bool(clip_to_image)
        self.variances = tuple(float(v) for v in variances)
        self.two_step_regression = bool(two_step_regression)
        self.negative_anchor_filtering = bool(negative_anchor_filtering)
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.suppression = suppression
        self.class_agnostic = bool(class_agnostic)
        self.alpha = _check_fraction("alpha", alpha)
        self.voting_iou = voting_iou
        if voting_iou is not None:
            self.voting_iou = _check_fraction("voting_iou", voting_iou)
        self.exclusive_classes = bool(exclusive_classes)

    @classmethod
    def from_files(cls, path):
        """Reads the decoder of an exported network.

        Args:
            path: JSON file with `"image_shape"`, `"bounding_box_format"`, `"anchors"` (name of an
                .npy file in the same folder), `"decoder"` (arguments of this class, possibly only
                some) and optionally `"class_names"`. Other keys are ignored.

        Raises:
            FileNotFoundError: if one of the two files is missing.
            ValueError: if the JSON file lacks a key or has an invalid value.
        """
        _require(isinstance(path, (str, os.PathLike)), "`path` must be a path", path)
        path = pathlib.Path(path)
        metadata = _read_json(path)
        settings = metadata.get("decoder", {})
        _require(isinstance(settings, dict), f'"decoder" in {path} must be an object', settings)
        settings = {**{name: metadata[name] for name in SWITCHES if name in metadata}, **settings}
        required = ("image_shape", "bounding_box_format", "anchors", "decoder", *SWITCHES)
        missing = [key for key in required if key not in {**metadata, **settings}]
        if missing:
            raise ValueError(f"{path} must have the keys {', '.join(required)}. Missing: {missing}")
        for name in ("clip_to_image", "class_agnostic", "exclusive_classes", *SWITCHES):
            value = settings.get(name, True)
            _require(isinstance(value, bool), f'"{name}" in {path} must be true or false', value)
        anchors = _read_anchors(path, metadata["anchors"])
        shape, box_format = metadata["image_shape"], metadata["bounding_box_format"]
        try:
            return cls(
                anchors, shape, box_format, class_names=metadata.get("class_names"), **settings
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} has an invalid value: {error}") from error

    def __call__(self, raw_outputs):
        """Decodes a batch.

        Args:
            raw_outputs: outputs of the network, a dictionary of arrays of any float type:
                `"arm_boxes"` (batch, anchors, 4), `"arm_objectness"` (batch, anchors, 2),
                `"odm_boxes"` (batch, anchors, 4), `"odm_logits"` (batch, anchors, classes + 1),
                and `"odm_iou"` (batch, anchors, 1) if the network has it.

        Returns:
            The same as `RefineDet.predict`, a dictionary of arrays: `"boxes"` (batch,
            max_detections, 4) float32 in `bounding_box_format`, `"confidence"` float32 and
            `"labels"` int32 (batch, max_detections), in descending order of confidence, and
            `"num_detections"` (batch,) int32. Rows beyond `"num_detections"` are -1.

        Raises:
            ValueError: if an output is missing or has a wrong shape or type.
        """
        raw = self._check_outputs(raw_outputs)
        batch = len(raw["odm_boxes"])
        rows = (batch, self.max_detections)
        result = {
            "boxes": np.full((*rows, 4), PADDING, np.float32),
            "confidence": np.full(rows, PADDING, np.float32),
            "labels": np.full(rows, PADDING, np.int32),
            "num_detections": np.zeros(batch, np.int32),
        }
        with np.errstate(all="ignore"):  # a diverging network overflows
            for i in range(batch):
                detections = self._decode_image({k: v[i] for k, v in raw.items()})
                count = result["num_detections"][i] = len(detections["labels"])
                for name, value in detections.items():
                    result[name][i, :count] = value
        return result

    def scale_to_image(self, detections, image_height, image_width):
        """Converts boxes from pixels of the network's image to pixels of the original image.

        Args:
            detections: result of this decoder, for images that were stretched to `image_shape`.
            image_height: height of the original image in pixels; a number, or an array (batch,).
            image_width: width of the original image, in the same form.

        Returns:
            A new dictionary; padding rows and boxes in `"rel_*"` formats are unchanged.
        """
        is_result = isinstance(detections, dict) and {"boxes", "labels"} <= set(detections)
        _require(is_result, "`detections` must be a result of the decoder", detections)
        if self.bounding_box_format.startswith("rel_"):
            return dict(detections)
        height, width = self.image_shape[:2]
        y = np.asarray(image_height, np.float32) / np.float32(height)
        x = np.asarray(image_width, np.float32) / np.float32(width)
        wanted = "`image_height` and `image_width` must be positive"
        _require(np.all(y > 0) and np.all(x > 0), wanted, (image_height, image_width))
        y, x = np.broadcast_arrays(y, x)
        sides = (y, x, y, x) if self.bounding_box_format in Y_FIRST else (x, y, x, y)
        boxes = np.asarray(detections["boxes"], np.float32)
        is_detection = np.asarray(detections["labels"])[..., None] >= 0
        scaled = boxes * np.stack(sides, axis=-1)[..., None, :]
        return {**detections, "boxes": np.where(is_detection, scaled, boxes)}

    def _decode_image(self, raw):
        """Decodes one image; boxes (n, 4), confidence (n,) and labels (n,) have no padding."""
        boxes, confidence = self._candidates(raw)  # (candidates, 4), (classes, candidates)
        limits = of_class = np.broadcast_to(self._limits, len(confidence))
        classes = None
        if self.class_agnostic:
            classes = confidence.argmax(axis=0).astype(np.int32)
            limits = of_class[None, classes]  # of each box
            confidence = confidence.max(axis=0, keepdims=True)
        found = []
        best = np.zeros(0, np.float32)  # the `max_detections` highest so far
        for label, values in enumerate(confidence):
            # Only boxes above the last of `max_detections` others can remain, but others vote.
            full = len(best) == self.max_detections
            floor = np.maximum(limits[label], best[0] if full else np.float32(0.0))
            rows = self._most_confident(values, floor if self.voting_iou is None else limits[label])
            chosen, values = boxes[rows], values[rows]
            if len(rows):
                floor = np.broadcast_to(floor, len(confidence[label]))[rows]
                kept, lowered = self._suppress(chosen, values, floor)
                rows, chosen = rows[kept], self._vote(chosen, values, kept)
                values = lowered
                best = np.sort(np.concatenate([best, values]))[-self.max_detections :]
            labels = np.full(len(rows), label, np.int32) if classes is None else classes[rows]
            found.append((chosen, values, labels))
        boxes, confidence, labels = (np.concatenate([f[i] for f in found]) for i in range(3))
        order = np.argsort(-confidence, kind="stable")[: self.max_detections]
        boxes, confidence, labels = boxes[order], confidence[order], labels[order]
        if self.exclusive_classes:
            confidence = self._compete(boxes, confidence, labels)
            order = np.argsort(-confidence, kind="stable")
            order = order[confidence[order] > of_class[labels[order]]]
            boxes, confidence, labels = boxes[order], confidence[order], labels[order]
        return {"boxes": self._format(boxes), "confidence": confidence, "labels": labels}

    def _compete(self, boxes, confidence, labels):
        """Lowers the confidence of boxes (n, 4) where another class is more confident."""
        rivals = (labels[:, None] != labels) & (confidence > confidence[:, None])
        rivals &= _pairwise_iou(boxes, boxes) > self.iou_threshold
        chances = np.where(rivals, 1 - confidence, np.float32(1.0))
        return confidence * np.sqrt(chances.prod(axis=1))

    def _candidates(self, raw):
        """Returns boxes (n, 4) of the anchors that remain, and confidence (classes, n)."""
        anchors = self.anchors
        if self.negative_anchor_filtering:
            objectness = _softmax(raw["arm_objectness"])[:, 1]
            rows = np.flatnonzero(objectness > self.objectness_threshold)
            raw = {name: value[rows] for name, value in raw.items()}
            anchors = anchors[rows]
        if self.two_step_regression:
            anchors = _decode_boxes(raw["arm_boxes"], anchors, self.variances)
        boxes = _decode_boxes(raw["odm_boxes"], anchors, self.variances)
        if "odm_iou" in raw:
            log_iou = -np.logaddexp(np.float32(0.0), -raw["odm_iou"])
            log_p = _log_softmax(raw["odm_logits"])[:, 1:]
            confidence = np.exp(self.alpha * log_p + (1.0 - self.alpha) * log_iou)
        else:
            confidence = _softmax(raw["odm_logits"])[:, 1:]
        finite = np.isfinite(boxes).all(axis=1)
        if not finite.all():  # a copy takes time
            boxes, confidence = boxes[finite], confidence[finite]
        return boxes, np.ascontiguousarray(confidence.T)

    def _most_confident(self, confidence, floor):
        """Returns at most `pre_nms_top_k` rows above `floor`, most confident first."""
        rows = np.flatnonzero(confidence > floor)  # excludes NaN
        k = self.pre_nms_top_k
        if len(rows) > k:  # sorting all of them would be slow
            lowest = np.partition(confidence[rows], len(rows) - k)[len(rows) - k]
            rows = rows[confidence[rows] >= lowest]
        return rows[np.argsort(-confidence[rows], kind="stable")[:k]]

    def _suppress(self, boxes, confidence, floor):
        """Returns the indices of boxes that remain, most confident first, and their confidence."""
        limits = self.iou_threshold, self.max_detections
        if self.suppression == "soft":
            return _soften(boxes, confidence, floor, *limits)
        overlap = _pairwise_diou if self.suppression == "diou" else _pairwise_iou
        kept = _suppress(boxes, *limits, overlap)
        return kept, confidence[kept]

    def _vote(self, boxes, confidence, kept):
        """Returns the kept boxes, or the mean of each with its neighbors."""
        if self.voting_iou is None:
            return boxes[kept]
        iou = _pairwise_iou(boxes[kept], boxes)
        weights = np.where(iou >= self.voting_iou, confidence, np.float32(0.0))
        total = weights.sum(axis=1, keepdims=True)
        return np.where(total > 0, weights @ boxes / np.where(total > 0, total, 1), boxes[kept])

    def _format(self, boxes):
        """Clips `"xyxy"` boxes (n, 4) and converts them to `bounding_box_format`."""
        height, width = self.image_shape[:2]
        sides = np.array([width, height, width, height], np.float32)
        if self.clip_to_image:
            boxes = np.clip(boxes, np.float32(0.0), sides)
        if self.bounding_box_format.endswith(("wh", "hw")):
            sizes = boxes[:, 2:] - boxes[:, :2]
            centered = "center" in self.bounding_box_format
            start = boxes[:, :2] + sizes / 2.0 if centered else boxes[:, :2]
            boxes = np.concatenate([start, sizes], axis=1)
        if self.bounding_box_format.startswith("rel_"):
            boxes = boxes / sides
        return boxes[:, [1, 0, 3, 2]] if self.bounding_box_format in Y_FIRST else boxes

    def _check_outputs(self, raw_outputs):
        """Returns the outputs that are needed, as float32 arrays."""
        classes = None if self.class_names is None else len(self.class_names) + 1
        if len(self._limits) > 1:
            classes = len(self._limits) + 1
        channels = {"odm_boxes": 4, "odm_logits": classes}
        if self.two_step_regression:
            channels["arm_boxes"] = 4
        if self.negative_anchor_filtering:
            channels["arm_objectness"] = 2
        # Look up each name: OpenVINO's dictionary accepts names that it does not list.
        is_mapping = isinstance(raw_outputs, collections.abc.Mapping)
        missing = [name for name in channels if not is_mapping or name not in raw_outputs]
        if missing:
            raise ValueError(
                f"`raw_outputs` must be a dictionary with the keys {', '.join(channels)}. Missing: "
                f"{missing}. Received: {list(raw_outputs) if is_mapping else type(raw_outputs)}"
            )
        if "odm_iou" in raw_outputs:
            channels["odm_iou"] = 1
        raw = {name: np.asarray(raw_outputs[name]) for name in channels}
        start = (*raw["odm_boxes"].shape[:1], len(self.anchors))
        for name, value in raw.items():
            width = value.shape[-1] if value.ndim == 3 else 0
            fits = value.shape[:-1] == start and width == (channels[name] or max(width, 2))
            shape = f"(batch, {len(self.anchors)}, {channels[name] or 'classes + 1'})"
            wanted = f"`{name}` must have shape {shape}, with the batch size of `odm_boxes`"
            _require(fits, wanted, value.shape)
            wanted = f"`{name}` must have a float type; dequantize integers first"
            # "V" is bfloat16, which numpy does not know.
            _require(value.dtype.kind in "fV", wanted, value.dtype)
        with np.errstate(over="ignore"):  # values beyond float32 become infinite
            return {name: value.astype(np.float32, copy=False) for name, value in raw.items()}


# === Boxes ===


def _softmax(x):
    """Softmax over the last axis; NaN for rows that contain NaN or +inf."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def _log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _decode_boxes(offsets, anchors, variances):
    """Applies offsets dx, dy, dw, dh (n, 4) to `"xyxy"` anchors (n, 4)."""
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2.0
    sizes = anchors[:, 2:] - anchors[:, :2]
    centers = centers + offsets[:, :2] * variances[0] * sizes
    half = sizes * np.exp(np.minimum(offsets[:, 2:] * variances[1], MAX_LOG_SIZE_RATIO)) / 2.0
    return np.concatenate([centers - half, centers + half], axis=1)


def _pairwise_iou(boxes1, boxes2):
    """IoU (m, n) of `"xyxy"` boxes (m, 4) and (n, 4); 0 for a box without area."""
    left1, top1, right1, bottom1 = boxes1.T[:, :, None]
    left2, top2, right2, bottom2 = boxes2.T
    width = np.minimum(right1, right2) - np.maximum(left1, left2)
    height = np.minimum(bottom1, bottom2) - np.maximum(top1, top2)
    intersection = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    area1 = np.maximum(right1 - left1, 0.0) * np.maximum(bottom1 - top1, 0.0)
    area2 = np.maximum(right2 - left2, 0.0) * np.maximum(bottom2 - top2, 0.0)
    union = area1 + area2 - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0.0)


def _pairwise_diou(boxes1, boxes2):
    """IoU minus the squared distance of the centers, relative to the enclosing diagonal."""
    distance = diagonal = 0.0
    for low, high in ((0, 2), (1, 3)):
        low1, high1 = boxes1[:, low, None], boxes1[:, high, None]
        low2, high2 = boxes2[:, low], boxes2[:, high]
        distance = distance + ((low1 + high1 - low2 - high2) / 2.0) ** 2
        diagonal = diagonal + (np.maximum(high1, high2) - np.minimum(low1, low2)) ** 2
    return _pairwise_iou(boxes1, boxes2) - distance / np.maximum(diagonal, EPSILON)


def _suppress(boxes, iou_threshold, limit, overlap=_pairwise_iou):
    """Returns the indices of the first `limit` boxes that overlap no earlier kept box."""
    kept = np.zeros(0, int)
    for start in range(0, len(boxes), NMS_BLOCK):
        block = boxes[start : start + NMS_BLOCK]
        alive = ~(overlap(boxes[kept], block) > iou_threshold).any(axis=0)
        separate = ~(overlap(block, block) > iou_threshold)
        for i in range(len(block)):
            if alive[i]:
                alive[i + 1 :] &= separate[i, i + 1 :]
        kept = np.concatenate([kept, start + np.flatnonzero(alive)])
        if len(kept) >= limit:
            break
    return kept[:limit]


def _soften(boxes, confidence, floor, iou_threshold, limit):
    """Soft NMS: returns the indices of at most `limit` boxes and their lowered confidence."""
    waiting, kept, final = confidence.copy(), [], []
    while len(waiting) and len(kept) < limit:
        waiting[waiting <= floor] = -1.0
        if waiting.max() < 0.0:
            break
        kept.append(int(waiting.argmax()))
        final.append(waiting[kept[-1]])
        iou = _pairwise_iou(boxes[kept[-1:]], boxes)[0]
        waiting *= np.where(iou > iou_threshold, 1.0 - iou, np.float32(1.0))
        waiting[kept[-1]] = -1.0
    return np.array(kept, int), np.array(final, np.float32)


# === Arguments and files ===


def _require(condition, wanted, received):
    if not condition:
        raise ValueError(f"{wanted}. Received: {received}")


def _check_choice(name, value, choices):
    _require(value in choices, f"`{name}` must be one of {', '.join(choices)}", repr(value))


def _check_fraction(name, value):
    is_fraction = isinstance(value, numbers.Real) and 0.0 <= value <= 1.0
    _require(is_fraction, f"`{name}` must be between 0 and 1", value)
    return float(value)


def _check_thresholds(threshold, class_names):
    """Returns the lowest confidence of each class, or one for all of them."""
    if not isinstance(threshold, collections.abc.Mapping):
        return np.array([_check_fraction("confidence_threshold", threshold)], np.float32)
    names = class_names or [str(label) for label in range(len(threshold))]
    wanted = "`confidence_threshold` must have a number for each class, "
    _require(set(threshold) == set(names), wanted + ", ".join(map(str, names)), threshold)
    values = [_check_fraction(f"confidence_threshold[{n!r}]", threshold[n]) for n in names]
    return np.array(values, np.float32)


def _check_count(name, value):
    is_count = isinstance(value, numbers.Real) and 1 <= value < 2**63 and value % 1 == 0
    _require(is_count, f"`{name}` must be a positive integer", value)
    return int(value)


def _check_anchors(anchors):
    anchors = np.asarray(anchors)
    fits = anchors.ndim == 2 and anchors.shape[1] == 4 and anchors.dtype.kind in "fiu"
    wanted = '`anchors` must be numbers of shape (anchors, 4), "xyxy" in pixels'
    _require(fits, wanted, f"anchors of shape {anchors.shape} and type {anchors.dtype}")
    _require(np.isfinite(anchors).all(), "`anchors` must be finite", "NaN or infinite numbers")
    return anchors.astype(np.float32)


def _check_image_shape(image_shape):
    shape = tuple(image_shape) if isinstance(image_shape, (list, tuple, np.ndarray)) else ()
    integers = all(isinstance(s, (int, np.integer)) and s is not True for s in shape[:2])
    wanted = "`image_shape` must be (height, width, ...) in pixels, positive integers"
    _require(len(shape) >= 2 and integers and min(shape[:2]) >= 1, wanted, image_shape)
    return shape


def _read_json(path):
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON file. Received: {error}") from error
    wanted = f"{path} must hold a JSON object"
    _require(isinstance(metadata, dict), wanted, type(metadata).__name__)
    return metadata


def _read_anchors(path, name):
    """Reads an .npy file in the folder of the JSON file `path`."""
    # An untrusted JSON file must not make this program read other folders.
    is_name = isinstance(name, str) and name not in ("", "..") and os.path.basename(name) == name
    _require(is_name, f'"anchors" in {path} must be the name of a file beside it', repr(name))
    file = path.parent / name
    try:
        anchors = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} must be an .npy file of numbers. Received: {error}") from error
    is_array = isinstance(anchors, np.ndarray)
    _require(is_array, f"{file} must be an .npy file with one array", "an .npz file")
    return anchors
