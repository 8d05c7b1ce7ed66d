"""From images of any size to boxes in their own pixels, at one scale, several, or in tiles.

`CompiledDetector` is the network and its decoder as one compiled function. `RefineDet.detect`,
evaluation, `MultiScaleDetector` and `TiledDetector` all go through it.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import keras
import numpy as np

from keras_resnest.boxes.formats import convert_boxes, scale_boxes
from keras_resnest.boxes.suppression import lower_confidence, suppress_boxes, vote_boxes
from keras_resnest.checks import (
    check_counts,
    check_fractions,
    check_image_shape,
    check_images,
    check_overlap,
    checked,
    class_thresholds,
    value_errors,
)
from keras_resnest.configurable import Configurable
from keras_resnest.detection.decoding import PADDING
from keras_resnest.detection.heads import STRIDES
from keras_resnest.images import MAX_PIXELS, MEAN_COLOR, find_images, load_image, resize_image
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


CUT_MARGIN = 4  # pixels between a border and a box that it cuts, which is placed to a few pixels


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


@checked
def to_supervision(detections: Mapping):
    """Returns detections as `supervision.Detections`, for its annotators, trackers and zones.

    Args:
        detections: those of one image, as `RefineDet.detect` returns them, with "xyxy" boxes.

    Example:
        >>> tracked = supervision.ByteTrack().update_with_detections(to_supervision(detections))
    """
    import supervision

    return supervision.Detections(
        xyxy=np.asarray(detections["boxes"], "float32").reshape(-1, 4),
        confidence=np.asarray(detections["confidence"], "float32"),
        class_id=np.asarray(detections["labels"], int),
        data={"class_name": np.array(detections["class_names"], str)},
    )


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


# === Several passes ===


class _SeveralPasses(Configurable):
    """A detector that sees an image in several passes and merges their detections.

    A subclass has `model`, and `_detect`, which returns the merged detections of images
    (B, H, W, 3), "xyxy" in their pixels.
    """

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

    def detect(
        self,
        images,
        confidence_threshold: float | Mapping[str, float] = 0.3,
        max_pixels: int = MAX_PIXELS,
    ):
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

        return detect_images(images, detect_batch, batch_size=1, max_pixels=max_pixels)

    def predict_on_batch(self, x) -> dict:
        """Detects in a batch of images.

        Args:
            x: images (batch, height, width, 3), RGB, 0 to 255, of any height and width.

        Returns:
            As `RefineDet.predict`, with boxes in pixels of these images. Without a
            `max_detections`, there are as many rows as the image with most detections needs.
        """
        images = np.asarray(x)
        if images.shape[3:] != (3,) or images.dtype.kind not in "uif":
            raise ValueError(
                "`x` must be images (batch, height, width, 3), 0 to 255. "
                f"Received: {images.dtype} {images.shape}"
            )
        with value_errors():
            check_images(images)
        rows = self._detect(images)
        counts = [len(r["labels"]) for r in rows]
        shape = (len(rows), self.max_detections or max(counts, default=0))
        result = {
            "boxes": np.full((*shape, 4), PADDING, "float32"),
            "confidence": np.full(shape, PADDING, "float32"),
            "labels": np.full(shape, PADDING, "int32"),
        }
        for i, row in enumerate(rows):
            for name, values in self._to_model_format(row, images.shape[1:3]).items():
                result[name][i, : counts[i]] = values
        return {**result, "num_detections": np.array(counts, "int32")}

    def _detect_at(self, size: tuple[int, int], images: np.ndarray, mirrored=False) -> list[dict]:
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

    def _merge(self, rows: dict) -> dict:
        """Suppresses the detections of all passes together; `"passes"` numbers them."""
        rows, decoder = dict(rows), self.model.decoder
        passes = rows.pop("passes")
        options = {"iou_threshold": self.iou_threshold, "class_agnostic": decoder.class_agnostic}
        confidence = rows["confidence"]
        if decoder.suppression == "soft":
            confidence = lower_confidence(**rows, **options, passes=passes)
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
    def from_config(cls, config: dict) -> Self:
        return cls(**{**config, "model": keras.saving.deserialize_keras_object(config["model"])})


def _concatenate(passes) -> dict:
    """The detections of all passes, and `"passes"`, the number of the pass of each."""
    rows = {name: np.concatenate([p[name] for p in passes]) for name in passes[0]}
    return {**rows, "passes": np.repeat(np.arange(len(passes)), [len(p["labels"]) for p in passes])}


# === Several scales ===


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class MultiScaleDetector(_SeveralPasses):
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
        model: keras.Model,
        image_sizes: Sequence,
        box_sizes: Sequence | None = None,
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

    def _detect(self, images: np.ndarray) -> list[dict]:
        passes = []
        for size, limits in zip(self.image_sizes, self.box_sizes, strict=True):
            size = self._orient_size(size, images.shape[1:3])
            for mirrored in (False, True)[: 1 + self.flip]:
                found = self._detect_at(size, images, mirrored)
                passes.append([_select_sizes(rows, limits) for rows in found])
        return [self._merge(_concatenate(rows)) for rows in zip(*passes, strict=True)]

    def _orient_size(self, size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
        (height, width), is_portrait = size, image_size[0] >= image_size[1]
        if self.turn_sizes and height != width and (height > width) != is_portrait:
            return width, height
        return size


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


# === Tiles ===


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class TiledDetector(_SeveralPasses):
    """Detects in overlapping tiles at native resolution and in the whole image: for small objects.

    The tiles are seen pixel by pixel, the whole image is resized as in `RefineDet.detect`. All
    detections go through non-maximum suppression, of the kind that the model's decoder has. Before,
    boxes that end at the border of their tile are put right: parts of an object that two tiles cut
    are joined, and a part is dropped if the whole object was found too. An image that fits into one
    tile is not tiled. There is no limit to the detections of an image.

    `RefineDet.detect(..., tiles=...)` is the short form; `evaluate_detections` and
    `collect_detections` accept this detector as a model, with
    `kr.data.evaluation_batches(dataset, None, 1)` for images in their own size.

    Args:
        model: a `RefineDet`.
        tiles: (height, width) of the tiles in pixels, multiples of 64; best the size that the
            model was trained on. Tiles beyond a shorter side of the image are filled up.
        overlap: smallest overlap of neighboring tiles, as a fraction of their sides, below 1.
            Smaller objects are whole in at least one tile.
        batch_size: tiles that pass through the network together.

    Raises:
        ValueError: if `tiles` are not multiples of 64, or `overlap` is not in [0, 1).

    Example:
        >>> detector = TiledDetector(model, tiles=(320, 320), overlap=0.2)
        >>> detector.detect("satellite.png")["boxes"]
        >>> batches = kr.data.evaluation_batches(dataset, None, 1)
        >>> print(evaluate_detections(detector, batches))

    Source: Akyon et al., "Slicing Aided Hyper Inference", arXiv 2202.06934.
    """

    max_detections = voting_iou = None  # all are kept, where the decoder puts them

    def __init__(
        self, model, tiles: Sequence[int] = (320, 320), overlap: float = 0.2, batch_size: int = 8
    ):
        self.model = model
        self.tiles = check_image_shape(tiles, STRIDES[-1], "tiles")
        self.overlap = check_overlap(overlap)
        check_counts(batch_size=batch_size)
        self.batch_size = int(batch_size)

    @property
    def iou_threshold(self) -> float:
        """Threshold of the suppression, that of the model's decoder."""
        return self.model.decoder.iou_threshold

    def _detect(self, images: np.ndarray) -> list[dict]:
        return [self._detect_in(image) for image in images]

    def _detect_in(self, image: np.ndarray) -> dict:
        whole = self._detect_at(self.model.image_shape[:2], image[None])[0]
        sides, tile = np.array(image.shape[1::-1]), np.array(self.tiles[::-1])  # (width, height)
        if (sides <= tile).all():
            return whole
        xs, ys = (_tile_starts(*pair, self.overlap) for pair in zip(sides, tile, strict=True))
        corners = np.array([(x, y) for y in ys for x in xs])
        passes = [whole]
        for start in range(0, len(corners), self.batch_size):
            batch = corners[start : start + self.batch_size]
            found = self._detect_at(self.tiles, np.stack([self._crop(image, *c) for c in batch]))
            for corner, rows in zip(batch, found, strict=True):
                passes.append({**rows, "boxes": rows["boxes"] + np.tile(corner, 2)})
        rows = _concatenate(passes)
        if self.model.decoder.clip_to_image:
            rows["boxes"] = np.clip(rows["boxes"], 0, np.tile(sides, 2))
        # The sides of the image cut nothing, nor does the whole image.
        low = np.where(corners > 0, corners, -np.inf)
        high = np.where(corners + tile < sides, corners + tile, np.inf)
        borders = np.concatenate([[[-np.inf] * 2 + [np.inf] * 2], np.hstack([low, high])])
        return self._merge(self._join_cut_boxes(rows, borders[rows["passes"]]))

    def _join_cut_boxes(self, rows: dict, borders: np.ndarray) -> dict:
        """Joins the parts of objects that tiles cut, and drops those of objects found whole.

        Args:
            rows: detections of all passes, "xyxy" in pixels of the image.
            borders: for each the tile it was found in, "xyxy" (n, 4); infinite where that ends
                with the image.
        """
        is_agnostic = self.model.decoder.class_agnostic
        group = np.minimum(rows["labels"], 0) if is_agnostic else rows["labels"]
        order = np.argsort(-rows["confidence"], kind="stable")
        cut = order[_cut_sides(rows["boxes"], borders)[order].any(axis=1)]
        parts = rows["boxes"][cut], borders[cut], rows["confidence"][cut], group[cut]
        kept = np.ones(len(order), bool)
        kept[cut] = _join_parts(*parts)
        boxes, confidence = rows["boxes"].copy(), rows["confidence"].copy()
        boxes[cut], borders[cut], confidence[cut] = parts[:3]
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        for i in cut[kept[cut] & _cut_sides(boxes[cut], borders[cut]).any(axis=1)]:
            common = np.minimum(boxes[:, 2:], boxes[i, 2:]) - np.maximum(boxes[:, :2], boxes[i, :2])
            covers = np.prod(np.maximum(common, 0.0), axis=1) >= 0.5 * areas[i]
            covers &= (areas > areas[i]) & (confidence >= 0.5 * confidence[i]) & (group == group[i])
            kept[i] = not (covers & kept).any()
        rows = {**rows, "boxes": boxes, "confidence": confidence}
        return {name: values[kept] for name, values in rows.items()}

    def _crop(self, image: np.ndarray, left: int, top: int) -> np.ndarray:
        height, width = self.tiles
        part = image[top : top + height, left : left + width]
        if part.shape[:2] == self.tiles:
            return part
        tile = np.full((height, width, 3), MEAN_COLOR, "float32")
        tile[: part.shape[0], : part.shape[1]] = part
        return tile


def _tile_starts(side: int, tile: int, overlap: float) -> np.ndarray:
    """First pixels of the fewest tiles that cover a side and overlap enough, evenly spaced."""
    step = max(1, int(tile * (1.0 - overlap)))
    rest = max(0, side - tile)
    return np.linspace(0, rest, 1 + -(-rest // step)).astype(int)


def _cut_sides(boxes: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Whether each side of the boxes (n, 4) ends at the border of its tile."""
    gaps = np.hstack([boxes[:, :2] - borders[:, :2], borders[:, 2:] - boxes[:, 2:]])
    return gaps < CUT_MARGIN


def _join_parts(boxes, borders, confidence, group) -> np.ndarray:
    """Joins, in place, cut boxes (n, 4) of falling confidence; returns which remain (n,)."""
    remain, waiting = np.ones(len(boxes), bool), list(range(len(boxes)))[::-1]
    while waiting:
        i = waiting.pop()
        if not remain[i]:
            continue
        others = np.flatnonzero(remain & (group == group[i]))
        ratio = confidence[others] / confidence[i]
        others = others[(ratio >= 0.5) & (ratio <= 2.0) & (others != i)]
        others = others[_continues(boxes[others], borders[others], boxes[i], borders[i])]
        if len(others):
            j = others[np.argmax(confidence[others])]
            extends = np.hstack([boxes[j, :2] < boxes[i, :2], boxes[j, 2:] > boxes[i, 2:]])
            boxes[i] = np.where(extends, boxes[j], boxes[i])
            borders[i] = np.where(extends, borders[j], borders[i])
            confidence[i], remain[j] = max(confidence[i], confidence[j]), False
            waiting.append(i)  # it may continue in a third tile
    return remain


def _continues(boxes, borders, box, border) -> np.ndarray:
    """Which boxes (n,) are the continuation of a box in the next tile.

    Both fill the overlap of their tiles, are cut by its far end, and agree along it.
    """
    cut, own_cut = _cut_sides(boxes, borders), _cut_sides(box[None], border[None])[0]
    common = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    hull = np.maximum(boxes[:, 2:], box[2:]) - np.minimum(boxes[:, :2], box[:2])
    agree, result = common >= 0.5 * hull, np.zeros(len(boxes), bool)
    for low, high in ((0, 2), (1, 3)):
        before = cut[:, high] & own_cut[low] & (border[low] <= borders[:, high])
        before &= boxes[:, low] <= border[low] + CUT_MARGIN
        before &= box[high] >= borders[:, high] - CUT_MARGIN
        after = cut[:, low] & own_cut[high] & (borders[:, low] <= border[high])
        after &= box[low] <= borders[:, low] + CUT_MARGIN
        after &= boxes[:, high] >= border[high] - CUT_MARGIN
        result |= (before | after) & agree[:, 1 - low]
    return result
