"""MultiScaleDetector: one detector on images of several sizes, merged by box voting."""

import keras
import numpy as np

from keras_resnest.boxes.formats import convert_boxes
from keras_resnest.boxes.suppression import suppress_boxes, vote_boxes
from keras_resnest.checks import check_images, value_errors
from keras_resnest.detection.detect import detect_images
from keras_resnest.images import resize_image

SIDE_MULTIPLE = 64  # of the detector
PADDING = -1

# The authors' settings (test/lib/fast_rcnn/test.py) for VOC; for COCO they add 640 with
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


@keras.saving.register_keras_serializable("keras_resnest")
class MultiScaleDetector:
    """Detects in several sizes of an image and in its mirror image, and merges what is found.

    The same weights look at the image once per size, and once more mirrored. The detections of
    all passes go through non-maximum suppression, class by class, and each box that is kept
    moves to the confidence-weighted mean of all that agree with it (box voting). This costs as
    many times the computation as there are passes, and finds small and large objects better:
    RefineDet320+ and RefineDet512+ of the paper.

    It has what `evaluate_detections` and `collect_detections` ask of a model.

    Args:
        model: a `RefineDet`.
        image_sizes: sizes the network sees: (height, width) or one side of a square, in
            pixels, multiples of 64.
        box_sizes: None, or for each of `image_sizes` None or (lowest, highest): of that size
            only detections count whose longer side is above `lowest` and whose shorter side is
            below `highest` (None: no limit), in pixels of the image as given.
        flip: whether the mirror image is looked at too.
        turn_sizes: whether a size that is no square is turned, so that its longer side lies
            along that of the image.
        iou_threshold: of two boxes of one class whose IoU is above, the less confident one is
            dropped.
        voting_iou: lowest IoU of a box that votes; None for no voting.
        max_detections: detections of one image; that of the model's decoder by default.

    Raises:
        ValueError: if a size is no multiple of 64, or `box_sizes` does not fit `image_sizes`.

    Source: RefineDet (arXiv 1711.06897) section 4.2; Gidaris and Komodakis, arXiv 1505.01749.

    Example:

    >>> detector = MultiScaleDetector(model, image_sizes=(256, 320, 448))
    >>> detector.detect("photo.jpg")["boxes"]
    >>> print(evaluate_detections(detector, test_batches))
    >>> plus = MultiScaleDetector(model, **REFINEDET320_PLUS)  # the authors' settings
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
        for name, value in (("iou_threshold", iou_threshold), ("voting_iou", voting_iou)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"`{name}` must be between 0 and 1. Received: {name}={value}")
        self.model = model
        self.image_sizes = _check_image_sizes(image_sizes)
        self.box_sizes = _check_box_sizes(box_sizes, len(self.image_sizes))
        self.flip = bool(flip)
        self.turn_sizes = bool(turn_sizes)
        self.iou_threshold = float(iou_threshold)
        self.voting_iou = None if voting_iou is None else float(voting_iou)
        self.max_detections = int(max_detections or model.decoder.max_detections)
        self._functions = {}

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

    def detect(self, images, confidence_threshold: float = 0.3):
        """As `RefineDet.detect`: images of any size, boxes in their own pixels."""

        def detect_batch(pictures):
            return [
                self._named(self._merged(p[None])[0], p, confidence_threshold) for p in pictures
            ]

        return detect_images(images, detect_batch, batch_size=1)

    def predict_on_batch(self, x) -> dict:
        """Detections of a batch of images.

        Args:
            x: images (batch, height, width, 3), RGB, 0 to 255, of any height and width.

        Returns:
            As `RefineDet.predict`, with boxes in pixels of these images.
        """
        images = np.asarray(x)
        with value_errors():
            check_images(images)
        rows = self._merged(images)
        counts = [len(r["labels"]) for r in rows]
        shape = (len(rows), self.max_detections)
        result = {
            "boxes": np.full((*shape, 4), PADDING, "float32"),
            "confidence": np.full(shape, PADDING, "float32"),
            "labels": np.full(shape, PADDING, "int32"),
        }
        for i, row in enumerate(rows):
            for name, values in self._formatted(row, images.shape[1:3]).items():
                result[name][i, : counts[i]] = values
        return {**result, "num_detections": np.array(counts, "int32")}

    def _merged(self, images: np.ndarray) -> list[dict]:
        """Detections of images (B, H, W, 3): "xyxy" in their pixels, by falling confidence."""
        passes = []
        for size, limits in zip(self.image_sizes, self.box_sizes, strict=True):
            for mirrored in (False, True)[: 1 + self.flip]:
                found = self._look(images, self._turned(size, images.shape[1:3]), mirrored)
                passes.append([_within(rows, limits) for rows in found])
        return [self._merge(rows) for rows in zip(*passes, strict=True)]

    def _turned(self, size: tuple[int, int], image: tuple[int, int]) -> tuple[int, int]:
        (height, width), is_portrait = size, image[0] >= image[1]
        if self.turn_sizes and height != width and (height > width) != is_portrait:
            return width, height
        return size

    def _look(self, images: np.ndarray, size: tuple[int, int], mirrored: bool) -> list[dict]:
        """One pass: detections of each image, "xyxy" in its pixels, without padding."""
        height, width = images.shape[1:3]
        resized = resize_image(images, *size)
        if mirrored:
            resized = resized[:, :, ::-1]
        network_input = keras.ops.convert_to_tensor(np.ascontiguousarray(resized))
        found = self._function(size)(network_input)
        found = {name: keras.ops.convert_to_numpy(value) for name, value in found.items()}
        boxes = convert_boxes(found["boxes"], self.bounding_box_format, "xyxy", *size)
        boxes = np.array(keras.ops.convert_to_numpy(boxes), "float64")
        boxes *= np.array([width / size[1], height / size[0]] * 2)
        if mirrored:
            boxes[..., [0, 2]] = width - boxes[..., [2, 0]]
        return [
            {"boxes": boxes[i, :n], **{k: found[k][i, :n] for k in ("confidence", "labels")}}
            for i, n in enumerate(found["num_detections"])
        ]

    def _function(self, size: tuple[int, int]):
        """The network and its decoder for images of one size."""

        def detect(images):
            return self.model.decode(self.model(images, training=False), size)

        if keras.backend.backend() != "tensorflow":
            return detect
        import tensorflow as tf

        if size not in self._functions:
            images = tf.TensorSpec((None, *size, 3), tf.float32)
            self._functions[size] = tf.function(detect).get_concrete_function(images)
        return self._functions[size]

    def _merge(self, passes) -> dict:
        rows = {name: np.concatenate([p[name] for p in passes]) for name in passes[0]}
        kept = suppress_boxes(**rows, iou_threshold=self.iou_threshold)[: self.max_detections]
        merged = {name: values[kept] for name, values in rows.items()}
        if self.voting_iou is not None:
            merged["boxes"] = vote_boxes(
                merged["boxes"], merged["labels"], **rows, voting_iou=self.voting_iou
            )
        return merged

    def _formatted(self, rows: dict, image: tuple[int, int]) -> dict:
        boxes = convert_boxes(rows["boxes"], "xyxy", self.bounding_box_format, *image)
        return {**rows, "boxes": keras.ops.convert_to_numpy(boxes)}

    def _named(self, rows: dict, image: np.ndarray, confidence_threshold: float) -> dict:
        sure = rows["confidence"] >= confidence_threshold
        rows = self._formatted({k: v[sure] for k, v in rows.items()}, image.shape[:2])
        return {**rows, "class_names": [self.model.class_name(label) for label in rows["labels"]]}

    def get_config(self) -> dict:
        return {
            "model": keras.saving.serialize_keras_object(self.model),
            "image_sizes": self.image_sizes,
            "box_sizes": self.box_sizes,
            "flip": self.flip,
            "turn_sizes": self.turn_sizes,
            "iou_threshold": self.iou_threshold,
            "voting_iou": self.voting_iou,
            "max_detections": self.max_detections,
        }

    @classmethod
    def from_config(cls, config: dict) -> "MultiScaleDetector":
        config = dict(config)
        if isinstance(config["model"], dict):
            config["model"] = keras.saving.deserialize_keras_object(config["model"])
        return cls(**config)


def _within(rows: dict, limits) -> dict:
    """The detections that one size of the image is there for."""
    if limits is None:
        return rows
    lowest, highest = limits
    sides = rows["boxes"][:, 2:] - rows["boxes"][:, :2]
    fits = sides.max(axis=1) > lowest
    if highest is not None:
        fits &= sides.min(axis=1) < highest
    return {name: values[fits] for name, values in rows.items()}


def _check_image_sizes(image_sizes) -> tuple[tuple[int, int], ...]:
    try:
        sizes = tuple(
            (int(s), int(s)) if isinstance(s, int | np.integer) else (int(s[0]), int(s[1]))
            for s in image_sizes
        )
    except (TypeError, IndexError, ValueError):
        sizes = ()
    if not sizes or any(side < SIDE_MULTIPLE or side % SIDE_MULTIPLE for s in sizes for side in s):
        raise ValueError(
            "`image_sizes` must be a list of (height, width) or of sides of squares, multiples of "
            f"{SIDE_MULTIPLE}. Received: image_sizes={image_sizes}"
        )
    return sizes


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
