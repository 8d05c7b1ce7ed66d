"""From images of any size to boxes in their own pixels, at one scale or several.

`CompiledDetector` is the network and its decoder as one compiled function. `RefineDet.detect`,
evaluation and `MultiScaleDetector` all go through it.
"""

import os
import warnings
from collections.abc import Callable, Mapping

import keras
import numpy as np

from keras_resnest.boxes.formats import convert_boxes, scale_boxes
from keras_resnest.boxes.suppression import lower_confidence, suppress_boxes, vote_boxes
from keras_resnest.checks import (
    check_counts,
    check_fractions,
    check_image_shape,
    check_images,
    checked,
    class_thresholds,
    value_errors,
)
from keras_resnest.configurable import Configurable
from keras_resnest.detection.decoding import PADDING
from keras_resnest.detection.heads import STRIDES
from keras_resnest.images import MAX_PIXELS, find_images, load_image, resize_image
from keras_resnest.trainer import check_not_forked

# The authors' settings for VOC (test/lib/fast_rcnn/test.py). For COCO they add 640 with
# (0, 48), and 640, 1024 and 1152 with (0, 224), (0, 96) and (0, 64).
REFINEDET320_PLUS = {
    "image_sizes": (320, (192, 320), 192, 384, 448, 512, 576, 704),
    "box_sizes": (None, None, (32, None), (0, 160), (0, 128), (0, 96), (0, 64), (0, 32)),
    "turn_sizes": True,
    "iou_threshold": 0.45,
    "voting_iou": 0.45,
}
REFINEDET512_PLUS = {
    "image_sizes": (512, (384, 512), 256, 384, 768, 896),
    "box_sizes": (None, None, None, None, (0, 192), (0, 128)),
    "turn_sizes": True,
    "iou_threshold": 0.45,
    "voting_iou": 0.45,
}


class CompiledDetector:
    """Network and decoder of a `RefineDet`, compiled once for each image size.

    It runs only in this process, under any strategy, and is recompiled after the decoder has
    changed.

    Args:
        model: a `RefineDet`.
    """

    def __init__(self, model):
        self.model = model
        self._functions = {}
        self._decoder_config = model.decoder.get_config()

    def discard_stale(self) -> None:
        """Discards compiled functions, those of Keras too, if the decoder has changed."""
        config = self.model.decoder.get_config()
        if config != self._decoder_config:
            self._decoder_config = config
            self._functions.clear()
            self.model.predict_function = None

    def __call__(self, images) -> dict:
        """Returns detections, as `RefineDet.predict`, of images (batch, height, width, 3)."""
        check_not_forked()
        self.discard_stale()
        size = tuple(int(side) for side in images.shape[1:3])
        if keras.backend.backend() == "tensorflow":
            found = self._function(size)(keras.ops.convert_to_tensor(images, "float32"))
        elif size == self.model.image_shape[:2]:
            found = keras.Model.predict_on_batch(self.model, images)
        else:
            images = keras.ops.convert_to_tensor(images)
            found = self.model.decode(self.model(images, training=False), size)
        return {name: keras.ops.convert_to_numpy(value) for name, value in found.items()}

    def _function(self, size: tuple[int, int]):
        import tensorflow as tf

        def detect(images):
            return self.model.decode(self.model(images, training=False), size)

        if size not in self._functions:
            images = tf.TensorSpec((None, *size, 3), tf.float32)
            self._functions[size] = tf.function(detect).get_concrete_function(images)
        return self._functions[size]


# === One scale ===


def detect_images(
    images, detect_batch: Callable[[list], list], batch_size: int, max_pixels: int = MAX_PIXELS
):
    """Loads images and runs a detector on them, batch by batch.

    Args:
        images: a path, an encoded image (bytes), a PIL image, an array (height, width,
            channels) 0 to 255, a folder, or a list or 4-D array of images.
        detect_batch: maps a list of arrays (height, width, 3) to a list of detections.
        batch_size: images that are loaded and passed on together.
        max_pixels: as in `load_image`.

    Returns:
        Detections of a single image, or a list of them. An image of a list that cannot be read
        gives None and a warning.

    Raises:
        ValueError: if a single image cannot be read.
    """
    check_counts(batch_size=batch_size, max_pixels=max_pixels)
    if isinstance(images, str | os.PathLike) and os.path.isdir(images):
        images = find_images(images)
    if not isinstance(images, list | tuple) and getattr(images, "ndim", 0) != 4:
        return detect_batch([load_image(images, max_pixels)])[0]
    results = []
    for start in range(0, len(images), batch_size):
        loaded = [_load_or_warn(i, max_pixels) for i in images[start : start + batch_size]]
        readable = [image for image in loaded if image is not None]
        found = iter(detect_batch(readable) if readable else ())
        results += [None if image is None else next(found) for image in loaded]
    return results


def _load_or_warn(image, max_pixels: int):
    try:
        return load_image(image, max_pixels)
    except ValueError as error:
        warnings.warn(f"Skipped an image: {error}", stacklevel=4)
        return None


def detect_resized(model, images: list, confidence_threshold) -> list[dict]:
    """Detects in images of any size, stretched to the size of the model.

    Args:
        model: a `RefineDet`.
        images: arrays (height, width, 3).
        confidence_threshold: as in `RefineDet.detect`.

    Returns:
        A dictionary per image, boxes in `model.bounding_box_format` and its own pixels.
    """
    height, width = model.image_shape[:2]
    resized = [keras.ops.convert_to_numpy(resize_image(i, height, width)) for i in images]
    batch = model.compiled_detector(np.stack(resized))
    results = []
    for number, image in enumerate(images):
        rows = _rows(batch, number)
        scale = image.shape[1] / width, image.shape[0] / height
        boxes = scale_boxes(rows["boxes"], model.bounding_box_format, *scale)
        rows["boxes"] = keras.ops.convert_to_numpy(boxes)
        results.append(_select_confident(model, rows, confidence_threshold))
    return results


def _rows(batch: dict, number: int) -> dict:
    """Detections of one image of a batch, without padding."""
    count = batch["num_detections"][number]
    return {name: batch[name][number, :count] for name in ("boxes", "confidence", "labels")}


def _select_confident(model, rows: dict, confidence_threshold) -> dict:
    """The confident detections, with class names."""
    limits = class_thresholds(confidence_threshold, model.label_names)
    chosen = rows["confidence"] >= np.array(limits, "float32")[rows["labels"]]
    rows = {name: values[chosen] for name, values in rows.items()}
    return {**rows, "class_names": [model.class_name(label) for label in rows["labels"]]}


# === Several scales ===


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class MultiScaleDetector(Configurable):
    """Detects at several image sizes and in the mirror image, and merges the detections.

    The network sees the image once per size, and once more mirrored. The detections of all passes
    go through non-maximum suppression, of the kind that the model's decoder has, and each remaining
    box moves to the confidence-weighted mean of all boxes that agree with it (box voting). This
    detects small and large objects better, at the cost of one prediction per pass. It is
    RefineDet320+ and RefineDet512+ of the paper.

    `evaluate_detections` and `collect_detections` accept it as a model.

    Args:
        model: a `RefineDet`.
        image_sizes: sizes that the network sees: (height, width) or the side of a square, in
            pixels, multiples of 64.
        box_sizes: None, or for each of `image_sizes` None or (lowest, highest): at that size, a
            detection is kept if its longer side is above `lowest` and its shorter side below
            `highest` (None: no limit), in pixels of the given image.
        flip: whether to use the mirror image too.
        turn_sizes: whether to turn a size that is not square to the orientation of the image.
        iou_threshold: of two boxes of a class with a higher IoU, the less confident is dropped.
        voting_iou: lowest IoU of a box that votes; None for no voting.
        max_detections: detections per image; by default that of the model's decoder.

    Raises:
        ValueError: if a size is not a multiple of 64, or `box_sizes` does not fit `image_sizes`.

    Example:
        >>> detector = MultiScaleDetector(model, image_sizes=(256, 320, 448))
        >>> detector.detect("photo.jpg")["boxes"]
        >>> print(evaluate_detections(detector, test_batches))
        >>> plus = MultiScaleDetector(model, **REFINEDET320_PLUS)  # the authors' settings

    Source: RefineDet (arXiv 1711.06897) section 4.2; Gidaris and Komodakis, arXiv 1505.01749.
    """

    def __init__(
        self,
        model,
        image_sizes,
        box_sizes=None,
        flip: bool = True,
        turn_sizes: bool = False,
        iou_threshold: float = 0.45,
        voting_iou: float | None = 0.5,
        max_detections: int | None = None,
    ):
        check_fractions(iou_threshold=iou_threshold, voting_iou=voting_iou or 0.0)
        self.model = model
        self.image_sizes = _check_image_sizes(image_sizes)
        self.box_sizes = _check_box_sizes(box_sizes, len(self.image_sizes))
        self.flip = bool(flip)
        self.turn_sizes = bool(turn_sizes)
        self.iou_threshold = float(iou_threshold)
        self.voting_iou = None if voting_iou is None else float(voting_iou)
        self.max_detections = int(max_detections or model.decoder.max_detections)

    @property
    def num_classes(self) -> int:
        """Number of classes, without background."""
        return self.model.num_classes

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, if the model has them."""
        return self.model.class_names

    @property
    def bounding_box_format(self) -> str:
        """Format of the boxes that are returned."""
        return self.model.bounding_box_format

    def detect(self, images, confidence_threshold: float | Mapping[str, float] = 0.3):
        """As `RefineDet.detect`: images of any size, boxes in their own pixels."""

        def detect_batch(batch):
            return [
                _select_confident(
                    self.model,
                    self._to_model_format(self._detect(image[None])[0], image.shape[:2]),
                    confidence_threshold,
                )
                for image in batch
            ]

        return detect_images(images, detect_batch, batch_size=1)

    def predict_on_batch(self, x) -> dict:
        """Detects in a batch of images.

        Args:
            x: images (batch, height, width, 3), RGB, 0 to 255, of any height and width.

        Returns:
            As `RefineDet.predict`, with boxes in pixels of these images.
        """
        images = np.asarray(x)
        with value_errors():
            check_images(images)
        rows = self._detect(images)
        counts = [len(r["labels"]) for r in rows]
        shape = (len(rows), self.max_detections)
        result = {
            "boxes": np.full((*shape, 4), PADDING, "float32"),
            "confidence": np.full(shape, PADDING, "float32"),
            "labels": np.full(shape, PADDING, "int32"),
        }
        for i, row in enumerate(rows):
            for name, values in self._to_model_format(row, images.shape[1:3]).items():
                result[name][i, : counts[i]] = values
        return {**result, "num_detections": np.array(counts, "int32")}

    def _detect(self, images: np.ndarray) -> list[dict]:
        """Merged detections of images (B, H, W, 3), "xyxy" in their pixels."""
        passes = []
        for size, limits in zip(self.image_sizes, self.box_sizes, strict=True):
            size = self._orient_size(size, images.shape[1:3])
            for mirrored in (False, True)[: 1 + self.flip]:
                found = self._detect_at(size, images, mirrored)
                passes.append([_select_sizes(rows, limits) for rows in found])
        return [self._merge(rows) for rows in zip(*passes, strict=True)]

    def _orient_size(self, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
        (height, width), is_portrait = size, image_size[0] >= image_size[1]
        if self.turn_sizes and height != width and (height > width) != is_portrait:
            return width, height
        return size

    def _detect_at(self, size: tuple[int, int], images: np.ndarray, mirrored: bool) -> list[dict]:
        """One pass: detections of each image, "xyxy" in its pixels, without padding."""
        height, width = images.shape[1:3]
        resized = resize_image(images, *size)
        if mirrored:
            resized = resized[:, :, ::-1]
        found = self.model.compiled_detector(np.ascontiguousarray(resized))
        boxes = convert_boxes(found["boxes"], self.bounding_box_format, "xyxy", *size)
        boxes = np.array(keras.ops.convert_to_numpy(boxes), "float64")
        boxes *= np.array([width / size[1], height / size[0]] * 2)
        if mirrored:
            boxes[..., [0, 2]] = width - boxes[..., [2, 0]]
        return [_rows({**found, "boxes": boxes}, i) for i in range(len(images))]

    def _merge(self, passes) -> dict:
        rows = {name: np.concatenate([p[name] for p in passes]) for name in passes[0]}
        decoder = self.model.decoder
        options = {"iou_threshold": self.iou_threshold, "class_agnostic": decoder.class_agnostic}
        confidence = rows["confidence"]
        if decoder.suppression == "soft":
            number = np.repeat(np.arange(len(passes)), [len(p["labels"]) for p in passes])
            confidence = lower_confidence(**rows, **options, passes=number)
            kept = np.argsort(-confidence, kind="stable")
            limits = decoder.thresholds(self.class_names, self.num_classes)
            limits = np.broadcast_to(limits, self.num_classes)[rows["labels"]]
            kept = kept[confidence[kept] > limits[kept]]
        else:
            kept = suppress_boxes(**rows, **options, suppression=decoder.suppression)
        kept = kept[: self.max_detections]
        merged = {name: values[kept] for name, values in rows.items()}
        merged["confidence"] = confidence[kept].astype("float32")
        if self.voting_iou is not None:
            labels = rows["labels"]
            group = np.minimum(labels, 0) if decoder.class_agnostic else labels
            merged["boxes"] = vote_boxes(
                merged["boxes"],
                group[kept],
                **{**rows, "labels": group},
                voting_iou=self.voting_iou,
            )
        return merged

    def _to_model_format(self, rows: dict, image_size: tuple[int, int]) -> dict:
        boxes = convert_boxes(rows["boxes"], "xyxy", self.bounding_box_format, *image_size)
        return {**rows, "boxes": keras.ops.convert_to_numpy(boxes)}

    def get_config(self) -> dict:
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config: dict) -> "MultiScaleDetector":
        return cls(**{**config, "model": keras.saving.deserialize_keras_object(config["model"])})


def _select_sizes(rows: dict, limits) -> dict:
    """The detections whose sides are within `limits`."""
    if limits is None:
        return rows
    lowest, highest = limits
    sides = rows["boxes"][:, 2:] - rows["boxes"][:, :2]
    fits = sides.max(axis=1) > lowest
    if highest is not None:
        fits &= sides.min(axis=1) < highest
    return {name: values[fits] for name, values in rows.items()}


def _check_image_sizes(image_sizes) -> tuple[tuple[int, int], ...]:
    if not isinstance(image_sizes, list | tuple) or not image_sizes:
        raise ValueError(f"`image_sizes` must be a list of sizes. Received: {image_sizes}")
    sizes = ((s, s) if isinstance(s, int | np.integer) else s for s in image_sizes)
    return tuple(check_image_shape(size, STRIDES[-1], "image_sizes") for size in sizes)


def _check_box_sizes(box_sizes, count: int) -> tuple:
    if box_sizes is None:
        return (None,) * count
    limits = tuple(None if pair is None else tuple(pair) for pair in box_sizes)
    if len(limits) != count or any(pair is not None and len(pair) != 2 for pair in limits):
        raise ValueError(
            "`box_sizes` must have None or (lowest, highest) for each of `image_sizes`. "
            f"Received: box_sizes={box_sizes} for {count} sizes"
        )
    return limits
