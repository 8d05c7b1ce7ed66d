"""Batches of annotated images for training and evaluation.

One pipeline serves detection and classification. Its elements, as the readers return them, are

    detection:       {"images": (h, w, 3), "bounding_boxes": {"boxes": (n, 4), "labels": (n,)}}
    classification:  {"images": (h, w, 3), "labels": ()}

with images in RGB, 0 to 255, and boxes "xyxy" in pixels of the image. "image_id" and, for boxes,
"difficult" (n,) are optional.
"""

import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import keras
import tensorflow as tf

from keras_resnest.boxes.formats import check_box_format
from keras_resnest.checks import PREFIX, check_counts, check_image_shape, checked
from keras_resnest.data.augmentation.classification import (
    CLASSIFICATION_AUGMENTATIONS,
    ClassificationAugmentation,
    check_square,
    mix_up,
)
from keras_resnest.data.augmentation.detection import (
    DETECTION_AUGMENTATIONS,
    RandomTile,
    Resize,
    TrainingAugmentation,
    drop_empty_boxes,
)
from keras_resnest.data.augmentation.geometry import PADDING, pad_rows, size_of, update_element
from keras_resnest.data.augmentation.mixing import MixUp, Mosaic
from keras_resnest.data.dataset import check_readable
from keras_resnest.data.epochs import EpochCounter, epoch_length, epoch_passes, fold_in
from keras_resnest.data.rare_classes import repeat_factors
from keras_resnest.images import center_crop_image, check_crop_ratio

# Shapes in the elements, and their ranks.
_DETECTION = {"images": "(h, w, 3)", "bounding_boxes": {"boxes": "(n, 4)", "labels": "(n,)"}}
_CLASSIFICATION = {"images": "(h, w, 3)", "labels": "()"}
_RANKS = {"()": 0, "(n,)": 1, "(n, 4)": 2, "(h, w, 3)": 3}

_CACHE_LIMIT = 1_000_000_000  # bytes of images that `classification_batches` caches by default


# === Detection ===


@checked
def training_batches(
    dataset,
    image_shape: Sequence[int],
    batch_size: int = 8,
    augmentation: str | Callable[..., dict] | None = "mild",
    *,
    mosaic: Mosaic | None = None,
    mixup: MixUp | None = None,
    image_sizes: Sequence[Sequence[int]] | None = None,
    repeat_threshold: float | None = None,
    tiles: Sequence[int] | None = None,
    shuffle_buffer: int | None = None,
    seed: int | None = None,
    initial_epoch: int = 0,
    cache: bool | str | os.PathLike = True,
    drop_remainder: bool = True,
    max_boxes: int | None = None,
    bounding_box_format: str = "xyxy",
    use_difficult: bool = True,
    num_parallel_calls: int = tf.data.AUTOTUNE,
    deterministic: bool = True,
) -> tf.data.Dataset:
    """Returns batches for training a detector, newly shuffled and augmented in every epoch.

    The order and augmentation of epoch k depend only on `seed`, k, and the images. Training resumed
    with `initial_epoch=k` (within an epoch: `.skip(steps)`) therefore sees, bit for bit, what an
    uninterrupted run would; see also `set_epoch`.

    All shards of a dataset (`DetectionDataset.shard`) yield as many batches as the smallest one can
    fill, so that no worker waits for another. Boxes without area are dropped.

    Args:
        dataset: a `DetectionDataset`, a `tf.data.Dataset` of unbatched elements (see the top of
            this module), or an object whose `as_dataset()` returns one.
        image_shape: (height, width) or (height, width, 3) of the network.
        batch_size: images per batch, over all replicas of a distributed dataset.
        augmentation: a name in `DETECTION_AUGMENTATIONS`, a `TrainingAugmentation`, or a function
            of an element and a seed (int64 tensor (2,)) that returns an element with an image of
            `image_shape`. None only resizes.
        mosaic: a `Mosaic`, to combine four images of the batch.
        mixup: a `MixUp`, to blend two images of the batch, after `mosaic`.
        image_sizes: for multi-scale training, a list of (height, width) that replaces
            `image_shape`: each batch draws one. `augmentation` then gets a third argument
            `image_size`, an int32 tensor (height, width).
        repeat_threshold: fraction of the images, up to 1; the images of classes that fewer images
            have are repeated, see `repeat_factors`. Fractions of a repetition are rounded at
            random in each epoch, each copy is augmented on its own, and an epoch has as many
            images as the sum of the factors, rounded down; of shards, as many as without
            repetitions. Needs a `DetectionDataset` and `deterministic=True`. Default: no
            repetition.
        tiles: (height, width) in pixels of a `RandomTile`, which replaces each image before
            `augmentation`: for small objects in large images. As `image_shape`, it keeps the native
            resolution, that of `RefineDet.detect(..., tiles=...)`.
        shuffle_buffer: number of images from which the next one is drawn; 0 keeps the order.
            Default: all images; 512 if they are cached in files, or neither cached nor loadable
            one by one.
        seed: seed of all random numbers. Default: drawn from Python's `random`, which
            `keras.utils.set_random_seed` sets.
        initial_epoch: epoch of the first pass, from 0.
        cache: True keeps decoded images in memory (height x width x 3 bytes each), a path keeps
            them in files with this prefix, also for later runs on the same data (files of other
            data stay: remove them yourself), False decodes them in every epoch. Of a
            `tf.data.Dataset` only the number and the types of its elements are compared.
        drop_remainder: whether to drop the last, smaller batch of an epoch. The dropped images
            differ from epoch to epoch.
        max_boxes: number of rows to pad boxes to; more boxes in an image are an error. Default: the
            most boxes in the batch, at least 1. Set it for `jit_compile=True`, which compiles for
            each new shape.
        bounding_box_format: format of the returned boxes, as in
            `keras.utils.bounding_boxes.convert_format`.
        use_difficult: whether to keep boxes marked as difficult.
        num_parallel_calls: number of images augmented in parallel.
        deterministic: False lets images overtake each other, which is slightly faster but not
            reproducible; must be True with `image_sizes` and `repeat_threshold`.

    Returns:
        Dataset of `{"images": (B, height, width, 3) float32 of 0..255 (or what the augmentation
        returns), "bounding_boxes": {"boxes": (B, M, 4) float32, "labels": (B, M) int32}}`. Padding
        rows have label -1. With `image_sizes`, the static height and width are None.

    Raises:
        ValueError: if an argument is invalid, or the dataset does not fill one batch.
        tf.errors.InvalidArgumentError: while iterating, if boxes have x1 > x2 or y1 > y2 or look
            like relative coordinates, or an image has more than `max_boxes`.

    Example:
        >>> model.fit(training_batches(dataset, (320, 320), 16, "ssd", seed=1), epochs=10)
    """
    size, box_format = check_image_shape(image_shape), check_box_format(bounding_box_format)
    batch_size, max_boxes = check_counts(batch_size=batch_size, max_boxes=max_boxes)
    source, load = _source(dataset, _DETECTION, batch_size, drop_remainder)
    augmentation = _detection_augmentation(augmentation, size, image_sizes)
    draw_size = _size_drawer(image_sizes, batch_size, deterministic)
    cut_tile = None if tiles is None else RandomTile(tiles)
    mixes = [mix for mix in (mosaic, mixup) if mix]

    clean = functools.partial(_clean_boxes, use_difficult=use_difficult)
    cache = _with_fingerprint(cache, dataset, source, "training", use_difficult)
    stored, load = _stored(source, load, clean, cache, num_parallel_calls)

    def augment(epoch_seed, position, index, item):
        element = load(item) if load else item
        name = tf.strings.to_hash_bucket_fast(element["image_id"], 2**62)
        own_seed = fold_in(epoch_seed, index, name)
        if cut_tile:
            element = cut_tile(element, fold_in(own_seed, -1))
        image_size = [draw_size(epoch_seed, position)] if draw_size else []
        return dict(augmentation(element, own_seed, *image_size), seed=own_seed)

    counter, repeats = EpochCounter(initial_epoch), None
    if repeat_threshold is not None:
        _check_deterministic("repeat_threshold", deterministic)
        repeats = repeat_factors(dataset, repeat_threshold, use_difficult)
    count = int(stored.cardinality()) if repeats is None else epoch_length(repeats)
    buffer = _shuffle_buffer(shuffle_buffer, count, None if cache is True or load else 512)
    passes = epoch_passes(stored, counter, seed, buffer, repeats)
    elements = passes.map(augment, num_parallel_calls)
    static_size, num_rows = (None, None) if image_sizes else size, None if mixes else max_boxes
    keys = ("boxes", "labels"), ("seed",)
    batches = _padded_batches(elements, static_size, batch_size, drop_remainder, num_rows, *keys)
    batches = batches.map(lambda batch: _mix(batch, mixes, max_boxes), num_parallel_calls)
    batches = batches.map(lambda batch: _convert_boxes(batch, box_format))
    batches = _take_smallest_shard(batches, dataset, batch_size, drop_remainder)
    settings = {"batch_size": batch_size, "seed": seed, "repeat_threshold": repeat_threshold}
    return _finish(batches, dataset, counter, deterministic, **settings)


@checked
def evaluation_batches(
    dataset,
    image_shape: Sequence[int] | None,
    batch_size: int = 8,
    *,
    cache: bool | str | os.PathLike = True,
    max_boxes: int | None = None,
    bounding_box_format: str = "xyxy",
    dtype: Literal["float32", "uint8"] = "float32",
    include_source: bool = False,
    num_parallel_calls: int = tf.data.AUTOTUNE,
) -> tf.data.Dataset:
    """Returns batches for evaluating a detector: every image once, in order, only resized.

    All boxes are kept, even difficult ones and those without area. The last batch may be smaller.

    Args:
        dataset: as in `training_batches`.
        image_shape: (height, width) or (height, width, 3) of the network. None keeps each image in
            its own size, for `TiledDetector` and `MultiScaleDetector`; `batch_size` must be 1.
        batch_size: images per batch.
        cache: as in `training_batches`.
        max_boxes: as in `training_batches`.
        bounding_box_format: as in `training_batches`.
        dtype: dtype of the images, "float32", or "uint8" (rounded) to save memory.
        include_source: whether to add "image_id" (B,) and "image_size" (B, 2), the int32 height and
            width of the original image, to convert detections back to its pixels.
        num_parallel_calls: number of images resized in parallel.

    Returns:
        Dataset as from `training_batches`, with boxes in pixels of the resized image unless the
        format is relative, and also `"difficult": (B, M) bool`.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: as in `training_batches`.

    Example:
        >>> model.evaluate(evaluation_batches(dataset, (320, 320), 16))
    """
    size, box_format = (None, None), check_box_format(bounding_box_format)
    if image_shape is not None:
        size = check_image_shape(image_shape)
    elif batch_size != 1:
        raise ValueError(
            "`batch_size` must be 1 with image_shape=None, as images may differ in size. "
            f"Received: batch_size={batch_size!r}"
        )
    batch_size, max_boxes = check_counts(batch_size=batch_size, max_boxes=max_boxes)
    source, _ = _source(dataset, _DETECTION, batch_size, whole_batch=False)
    resize = Resize((1, 1) if image_shape is None else size, dtype)

    def prepare(element):
        own_size = size_of(element["images"])
        resized = resize(element, image_size=own_size if image_shape is None else None)
        return dict(resized, image_size=own_size)

    cache = _with_fingerprint(cache, dataset, source, "evaluation")
    elements = _cached(source.map(_check_boxes, num_parallel_calls), cache)
    elements = elements.map(prepare, num_parallel_calls)
    keys = tuple(PADDING), ("image_id", "image_size") if include_source else ()
    batches = _padded_batches(elements, size, batch_size, False, max_boxes, *keys)
    batches = batches.map(lambda batch: _convert_boxes(batch, box_format))
    return _finish(batches, dataset, EpochCounter())


def _detection_augmentation(augmentation, size: tuple[int, int], image_sizes) -> Callable:
    def named(options):
        return Resize(size) if options is None else TrainingAugmentation(size, **options)

    arguments = ("element", "seed", "image_size") if image_sizes else ("element", "seed")
    return _augmentation(augmentation, DETECTION_AUGMENTATIONS, named, size, arguments)


def _size_drawer(image_sizes, batch_size: int, deterministic: bool) -> Callable | None:
    """Returns a function that draws the size of the batch that an image belongs to."""
    if image_sizes is None:
        return None
    if not image_sizes:
        raise ValueError("`image_sizes` must be a list of (height, width) in pixels. Received: []")
    _check_deterministic("image_sizes", deterministic)
    sizes = tf.constant([check_image_shape(size) for size in image_sizes])

    def draw(epoch_seed, position):
        seed = fold_in(epoch_seed, -1, position // batch_size)  # no image has the index -1
        choice = tf.random.stateless_uniform([], seed, 0, len(image_sizes), tf.int32)
        return sizes[choice]

    return draw


def _check_deterministic(argument: str, deterministic: bool) -> None:
    if not deterministic:
        raise ValueError(
            f"`{argument}` needs `deterministic=True`, which keeps the order of the images. "
            "Received: deterministic=False"
        )


def _check_boxes(element: dict) -> dict:
    """Checks the boxes; returns the element with all keys and dtypes, without padding rows."""
    image, rows = element["images"], element["bounding_boxes"]
    image.set_shape([None, None, 3])
    labels = tf.cast(tf.ensure_shape(rows["labels"], [None]), tf.int32)
    boxes = tf.cast(tf.ensure_shape(rows["boxes"], [None, 4]), tf.float32)
    difficult = tf.cast(rows.get("difficult", tf.zeros_like(labels)), tf.bool)
    image_id = tf.convert_to_tensor(element.get("image_id", ""))
    rows = {"boxes": boxes, "labels": labels, "difficult": difficult}
    rows = {name: tf.boolean_mask(values, labels >= 0) for name, values in rows.items()}
    error = element.get("error", tf.constant(""))

    boxes = rows["boxes"]
    is_ordered = tf.reduce_all(boxes[:, 2:] >= boxes[:, :2])
    message = "`dataset` must have boxes (x1, y1, x2, y2) in pixels with x1 <= x2 and y1 <= y2. "
    _assert(is_ordered, message + "Received (image_id, boxes):", image_id, boxes)
    largest = tf.reduce_max(boxes)  # -inf without boxes
    is_relative = (largest > 0.0) & (largest <= 1.0)
    is_tiny = tf.reduce_max(tf.shape(image)) <= 16  # the first pixel may contain all boxes
    message = "`dataset` must have boxes in pixels. Received only numbers within 0 to 1 "
    _assert(~is_relative | is_tiny, message + "(image_id, boxes):", image_id, boxes)
    return {"images": image, "image_id": image_id, "bounding_boxes": rows, "error": error}


def _clean_boxes(element: dict, use_difficult: bool) -> dict:
    element = drop_empty_boxes(_check_boxes(element))
    rows = element["bounding_boxes"]
    keep = None if use_difficult else ~rows["difficult"]
    return update_element(element, element["images"], rows["boxes"], keep)


def _assert(condition: tf.Tensor, message: str, *values):
    return tf.debugging.Assert(condition, [f"{PREFIX} {message}", *values])


def _padded_batches(
    elements: tf.data.Dataset,
    size: tuple[int | None, int | None],
    batch_size: int,
    drop_remainder: bool,
    max_boxes: int | None,
    box_keys: tuple[str, ...],
    extra_keys: tuple[str, ...],
) -> tf.data.Dataset:
    """Selects the keys of a batch, pads all boxes to the same number of rows, and batches."""

    def select(element):
        rows = {name: element["bounding_boxes"][name] for name in box_keys}
        count = tf.shape(rows["labels"])[0]
        if max_boxes is not None:
            message = f"an image has more boxes than max_boxes={max_boxes}. Received (boxes, id):"
            _assert(count <= max_boxes, message, count, element.get("image_id", ""))
        return {
            "images": tf.ensure_shape(element["images"], [*size, 3]),
            "bounding_boxes": pad_rows(rows, tf.maximum(1 - count, 0)),  # at least one row
            **{name: element[name] for name in extra_keys},
        }

    elements = elements.map(select)
    # None pads the number of boxes to the batch's maximum. Images of a batch have one size.
    padded_shapes = tf.nest.map_structure(lambda spec: spec.shape, elements.element_spec)
    padded_shapes["bounding_boxes"] = {
        name: [max_boxes, *shape[1:]] for name, shape in padded_shapes["bounding_boxes"].items()
    }
    padding = dict.fromkeys(elements.element_spec)
    padding["bounding_boxes"] = {name: PADDING[name] for name in box_keys}
    return elements.padded_batch(batch_size, padded_shapes, padding, bool(drop_remainder))


def _mix(batch: dict, mixes: list, max_boxes: int | None) -> dict:
    """Applies mosaic and mixup, and removes the seeds of the images."""
    batch = dict(batch)
    seeds = batch.pop("seed")
    for i, mix in enumerate(mixes):
        batch = mix(batch, fold_in(seeds[0], i))
    if mixes and max_boxes is not None:
        rows = batch["bounding_boxes"]
        count = tf.shape(rows["labels"])[1]
        message = f"a mixed image has more boxes than max_boxes={max_boxes}. Received (boxes):"
        with tf.control_dependencies([_assert(count <= max_boxes, message, count)]):
            rows = pad_rows(rows, max_boxes - count, axis=1)
        batch["bounding_boxes"] = {
            name: tf.ensure_shape(values, [None, max_boxes, *values.shape[2:]])
            for name, values in rows.items()
        }
    return batch


def _convert_boxes(batch: dict, bounding_box_format: str) -> dict:
    """Converts boxes from "xyxy" in pixels to `bounding_box_format`."""
    rows = batch["bounding_boxes"]
    height, width = tf.unstack(tf.cast(tf.shape(batch["images"])[1:3], tf.float32))
    boxes = keras.utils.bounding_boxes.convert_format(
        rows["boxes"], "xyxy", bounding_box_format, height=height, width=width
    )
    return dict(batch, bounding_boxes=dict(rows, boxes=boxes))


# === Classification ===


@checked
def classification_batches(
    dataset,
    image_shape: Sequence[int],
    batch_size: int,
    *,
    training: bool,
    augmentation: str | Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = "inception",
    mixup: float = 0.0,
    num_classes: int | None = None,
    seed: int | None = None,
    initial_epoch: int = 0,
    crop_ratio: float = 0.875,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    cache: bool | str | os.PathLike | None = None,
    drop_remainder: bool | None = None,
    num_parallel_calls: int = tf.data.AUTOTUNE,
    deterministic: bool = True,
) -> tf.data.Dataset:
    """Returns batches for training or evaluating a classifier.

    For training, epochs and shards behave as in `training_batches`. For evaluation, every image
    appears once, in order, resized and cropped as by `center_crop_image`.

    Args:
        dataset: a `ClassificationDataset`, or a `tf.data.Dataset` of unbatched elements
            `{"images": (h, w, 3) uint8, "labels": integer}`.
        image_shape: (side, side) or (side, side, 3) of the network.
        batch_size: images per batch.
        training: whether the batches are for training or for evaluation.
        augmentation: for training, a name in `CLASSIFICATION_AUGMENTATIONS`, a
            `ClassificationAugmentation`, or a function of an image and a seed (int64 tensor (2,))
            that returns an image of `image_shape`.
        mixup: for training, `alpha` of `mix_up`; 0 for none.
        num_classes: number of classes. Default: that of `dataset`.
        seed: as in `training_batches`.
        initial_epoch: as in `training_batches`.
        crop_ratio: for evaluation, ratio of the crop to the resized shorter side.
        interpolation: for evaluation, `"bilinear"` or `"bicubic"`.
        cache: as in `training_batches`; for evaluation, of cropped images. Default: in memory if
            that takes at most 1 GB.
        drop_remainder: as in `training_batches`. Default: for training.
        num_parallel_calls: number of images read and augmented in parallel.
        deterministic: as in `training_batches`.

    Returns:
        Dataset of `(images, labels)`: (B, side, side, 3) float32 of 0 to 255, and
        (B, num_classes) float32, one-hot or mixed.

    Raises:
        ValueError: if an argument is invalid, or an epoch would have no batch.

    Example:
        >>> batches = classification_batches(train, (224, 224), 32, training=True, mixup=0.2)
    """
    side = check_square(image_shape)
    check_crop_ratio(crop_ratio)
    batch_size, num_classes = check_counts(batch_size=batch_size, num_classes=num_classes)
    if not 0 <= mixup < float("inf"):
        raise ValueError(f"`mixup` must be a number of at least 0. Received: mixup={mixup!r}")
    drop_remainder = training if drop_remainder is None else drop_remainder
    source, load = _source(dataset, _CLASSIFICATION, batch_size, drop_remainder)
    num_classes = num_classes or getattr(dataset, "num_classes", None)
    if num_classes is None:
        raise ValueError("`num_classes` is needed with a tf.data.Dataset. Received: None")
    counter = EpochCounter(initial_epoch)
    crop = _center_crop(side, crop_ratio, interpolation)
    if training:
        augmentation = _classification_augmentation(augmentation, side, crop)
        cache = _num_bytes(dataset) <= _CACHE_LIMIT if cache is None else cache
        cache = _with_fingerprint(cache, dataset, source, "training")
        stored, load = _stored(source, load, _with_channels, cache, num_parallel_calls)

        def augment(epoch_seed, position, index, item):
            element, own_seed = load(item) if load else item, fold_in(epoch_seed, index)
            return dict(element, images=augmentation(element["images"], own_seed), seed=own_seed)

        buffer = _shuffle_buffer(None, int(stored.cardinality()), None if cache or load else 2048)
        passes = epoch_passes(stored, counter, seed, buffer)
        elements = passes.map(augment, num_parallel_calls)
    else:
        num_bytes = int(source.cardinality()) * side * side * 3  # negative if unknown
        cache = 0 <= num_bytes <= _CACHE_LIMIT if cache is None else cache
        elements = source.map(_with_channels).map(
            lambda element: dict(element, images=crop(element["images"])), num_parallel_calls
        )
        settings = "evaluation", side, crop_ratio, interpolation
        elements = _cached(elements, _with_fingerprint(cache, dataset, source, *settings))

    batches = _labeled_batches(
        elements, side, num_classes, batch_size, drop_remainder, mixup if training else 0.0
    )
    batches = _take_smallest_shard(batches, dataset, batch_size, drop_remainder)
    return _finish(batches, dataset, counter, deterministic, batch_size=batch_size, seed=seed)


def _center_crop(side: int, crop_ratio: float, interpolation: str) -> Callable:
    def on_pixels(pixels):
        return center_crop_image(pixels, side, crop_ratio, interpolation)

    def crop(image):
        return tf.ensure_shape(tf.numpy_function(on_pixels, [image], tf.uint8), (side, side, 3))

    return crop


def _classification_augmentation(augmentation, side: int, crop: Callable) -> Callable:
    size = (side, side)

    def named(options):
        if options is None:
            return lambda image, seed: crop(image)
        return ClassificationAugmentation(size, **options)

    arguments = ("image", "seed")
    return _augmentation(augmentation, CLASSIFICATION_AUGMENTATIONS, named, size, arguments)


def _labeled_batches(
    elements, side: int, num_classes: int, batch_size: int, drop_remainder: bool, mixup: float
) -> tf.data.Dataset:
    """Encodes the labels, batches, and applies mixup."""

    def to_pair(element):
        image = tf.ensure_shape(tf.cast(element["images"], tf.float32), (side, side, 3))
        label = tf.one_hot(tf.cast(element["labels"], tf.int32), num_classes)
        return image, label, element.get("seed", tf.zeros([2], tf.int64))

    def mix(images, labels, seeds):
        return mix_up(images, labels, mixup, seeds[0] + 1) if mixup else (images, labels)

    return elements.map(to_pair, tf.data.AUTOTUNE).batch(batch_size, bool(drop_remainder)).map(mix)


def _with_channels(element: dict) -> dict:
    return dict(element, images=tf.ensure_shape(element["images"], (None, None, 3)))


def _num_bytes(dataset) -> float:
    """Size of all decoded images; infinite if it is unknown."""
    records = getattr(dataset, "records", None)
    if not records:
        return float("inf")
    return sum(record.info.height * record.info.width * 3 for record in records)


# === Shared ===


def _source(
    dataset, layout: dict, batch_size: int, whole_batch: bool
) -> tuple[tf.data.Dataset, Callable | None]:
    """Checks a dataset; returns its elements and, if any, the function that loads one by index."""
    load = getattr(dataset, "element_loader", lambda: None)()
    if load is not None:
        dataset = tf.data.Dataset.range(len(dataset)).map(load, tf.data.AUTOTUNE)
    elif hasattr(dataset, "as_dataset"):
        dataset = getattr(dataset, "unchecked_elements", dataset.as_dataset)()
    if not isinstance(dataset, tf.data.Dataset):
        raise ValueError(
            "`dataset` must be a tf.data.Dataset or have `as_dataset()`. "
            f"Received: dataset={dataset!r}"
        )
    if not _has_layout(dataset.element_spec, layout):
        raise ValueError(
            f"`dataset` must give unbatched elements {layout}. "
            f"Received: elements of {dataset.element_spec}"
        )
    needed = batch_size if whole_batch else 1
    count = int(dataset.cardinality())
    if count == tf.data.UNKNOWN_CARDINALITY:
        count = sum(1 for _ in dataset.take(needed))
    if 0 <= count < needed:
        raise ValueError(
            f"`dataset` must have at least {needed} image(s) to fill a batch (batch_size="
            f"{batch_size}, drop_remainder={whole_batch}). Received: a dataset of {count} image(s)"
        )
    return dataset, load


def _has_layout(spec, layout: dict | str) -> bool:
    if isinstance(layout, dict):
        return isinstance(spec, Mapping) and all(
            key in spec and _has_layout(spec[key], value) for key, value in layout.items()
        )
    return isinstance(spec, tf.TensorSpec) and spec.shape.rank in (None, _RANKS[layout])


def _augmentation(
    augmentation, table: dict, named: Callable, size: tuple[int, int], arguments: tuple[str, ...]
) -> Callable:
    """Returns the augmentation, a function of `arguments`, for a name, a function, or None.

    `named` creates it from the options of a name in `table`; None is "none".
    """
    if augmentation is None or isinstance(augmentation, str):
        name = augmentation or "none"
        if name not in table:
            raise ValueError(
                f"`augmentation` must be one of {', '.join(map(repr, table))}, or a function. "
                f"Received: augmentation={name!r}"
            )
        return named(table[name])
    try:
        inspect.signature(augmentation).bind(*arguments)
    except TypeError:
        raise ValueError(
            f"`augmentation` must be a function of {', '.join(arguments)}. "
            f"Received: augmentation={augmentation!r}"
        ) from None
    own_shape = getattr(augmentation, "image_shape", None)
    if own_shape is not None and check_image_shape(own_shape) != size:
        raise ValueError(
            f"`augmentation` must make images of image_shape={size}. Received: {own_shape}"
        )
    return augmentation


def _stored(
    source: tf.data.Dataset, load: Callable | None, clean: Callable, cache: bool | str, calls: int
) -> tuple[tf.data.Dataset, Callable | None]:
    """Returns the dataset to shuffle, and the function that loads an element from its items.

    Without a cache, indices are shuffled if single images can be loaded. Otherwise, whole elements
    are shuffled and the function is None.
    """
    if cache or load is None:
        return _cached(source.map(clean, calls), cache), None
    indices = tf.data.Dataset.range(source.cardinality())
    return indices, lambda index: check_readable(clean(load(index)))


def _with_fingerprint(cache: bool | str, dataset, source, *settings) -> bool | str:
    """Adds to a path what decides the content of its files: no run reads those of others."""
    if not cache or cache is True:
        return cache
    elements = int(source.cardinality()), source.element_spec
    content = repr((elements, getattr(dataset, "fingerprint", str)(), settings))
    return f"{cache}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _cached(elements: tf.data.Dataset, cache: bool | str) -> tf.data.Dataset:
    if not cache:
        return elements.map(check_readable)
    count = int(elements.cardinality())
    if count == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            f"`cache` must be False for an infinite dataset (`repeat()`). Received: cache={cache!r}"
        )
    elements = elements.cache() if cache is True else elements.cache(str(cache))
    # After a pass that failed at an element, TensorFlow's cache holds all but that one.
    if count >= 0:
        elements = elements.apply(tf.data.experimental.assert_cardinality(count))
    return elements.map(check_readable)


def _shuffle_buffer(buffer: int | None, count: int, limit: int | None) -> int:
    """Checks the size of the shuffle buffer; the default is all items, up to `limit`."""
    if buffer is None:
        if count <= 0:  # unknown
            return limit or 100_000
        return min(count, limit or count)
    return check_counts(minimum=0, shuffle_buffer=buffer)[0]


def _take_smallest_shard(
    batches: tf.data.Dataset, dataset, batch_size: int, drop_remainder: bool
) -> tf.data.Dataset:
    """Limits an epoch of a shard to the number of batches that all shards can fill."""
    if getattr(dataset, "whole", dataset) is dataset:
        return batches
    images = dataset.smallest_shard
    steps = images // batch_size if drop_remainder else -(-images // batch_size)
    if not steps:
        raise ValueError(
            f"`dataset` must have at least {batch_size} images in each shard to fill a batch. "
            f"Received: a smallest shard of {images}"
        )
    return batches.take(steps)


def _finish(
    batches: tf.data.Dataset, dataset, counter: EpochCounter, deterministic: bool = True, **settings
) -> tf.data.Dataset:
    """Prefetches, and attaches the attributes that `fit` reads."""
    options = tf.data.Options()
    options.deterministic = bool(deterministic)
    # One thread per image: faster than all threads on one image, and leaves cores to `fit`.
    options.threading.max_intra_op_parallelism = 1
    batches = batches.prefetch(tf.data.AUTOTUNE).with_options(options)
    batches.epoch_counter = counter  # for `set_epoch`
    batches.class_names = getattr(dataset, "class_names", None)  # `fit` compares them
    batches.identity = {**getattr(dataset, "identity", {}), **settings}  # for a checkpoint
    return batches
