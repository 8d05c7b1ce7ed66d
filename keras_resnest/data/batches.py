"""From a `tf.data.Dataset` of annotated images to batches for training and evaluation.

Elements are `{"images": (h, w, 3), "image_id": string, "bounding_boxes": {"boxes": (n, 4),
"labels": (n,), "difficult": (n,)}}` as the readers give them: RGB of 0 to 255, boxes "xyxy" in
pixels of the image. `image_id` and `difficult` may be missing.
"""

import inspect
import random
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from keras_resnest.boxes.formats import check_box_format
from keras_resnest.checks import PREFIX
from keras_resnest.data.augmentation.detection import (
    Resize,
    check_image_shape,
    drop_empty_boxes,
)
from keras_resnest.data.augmentation.geometry import PADDING
from keras_resnest.data.augmentation.mixing import MixUp, Mosaic, fit_rows
from keras_resnest.data.epochs import EpochCounter, epoch_passes, fold_in


def training_batches(
    dataset,
    image_shape: Sequence[int],
    batch_size: int,
    augmentation: Callable[[dict, tf.Tensor], dict] | None = None,
    *,
    mosaic: Mosaic | None = None,
    mixup: MixUp | None = None,
    image_sizes: Sequence[Sequence[int]] | None = None,
    shuffle_buffer: int | None = None,
    seed: int | None = None,
    initial_epoch: int = 0,
    cache: bool | str = True,
    drop_remainder: bool = True,
    max_boxes: int | None = None,
    bounding_box_format: str = "xyxy",
    use_difficult: bool = True,
    num_parallel_calls: int = tf.data.AUTOTUNE,
    deterministic: bool = True,
) -> tf.data.Dataset:
    """Batches for training: cached, shuffled anew and augmented anew in every epoch.

    The same arguments give the same batches in the same order, epoch by epoch, in every run:
    order and augmentation of epoch k depend on `seed`, k and the images only. So a training
    that was stopped goes on with `initial_epoch=k`, bit for bit as if it had not been stopped
    (inside of an epoch: with `.skip(steps)` for the rest of it). See also `set_epoch`.

    Boxes without area are left out; others are only dropped by `augmentation` and `mosaic`
    (their documentation says which).

    Of one shard of a dataset (`DetectionDataset.shard`), an epoch has as many batches as the
    smallest of the shards can fill, so that no worker waits for another one in vain.

    Args:
        dataset: `tf.data.Dataset` of unbatched elements (see the top of this module), or an
            object whose `as_dataset()` returns one.
        image_shape: (height, width) or (height, width, 3) of the network.
        batch_size: images per batch (over all replicas, for a distributed dataset).
        augmentation: called with an element and a seed (int64 tensor of shape (2,)), returns an
            element with an image of `image_shape`: a `TrainingAugmentation`, or your own
            function. Default: `Resize(image_shape)`, so no augmentation.
        mosaic: a `Mosaic`: images made of four of the batch. Default: none.
        mixup: a `MixUp`: images made of two of the batch, after `mosaic`. Default: none.
        image_sizes: multi-scale training: the (height, width) in pixels among which one is drawn
            for each batch, instead of `image_shape`. `augmentation` is then called with a third
            argument `image_size`, an int32 tensor (height, width), and makes images of that size.
        shuffle_buffer: number of images among which the next one is drawn; 0 keeps the order.
            Default: all of them when they are cached in memory, or are files of a
            `DetectionDataset` that are read anew in each epoch; else 512.
        seed: start of all random numbers. Default: drawn from Python's `random`, which
            `keras.utils.set_random_seed` sets.
        initial_epoch: epoch of the first pass, from 0; later passes are the epochs after it.
        cache: keep decoded images in memory (height x width x 3 bytes for each one); a path
            keeps them in files that begin with it; False reads and decodes in every epoch.
        drop_remainder: leave out the last, smaller batch of an epoch. Which images fall out
            changes with every epoch, because they are shuffled.
        max_boxes: pad boxes to this number of rows; an image with more raises an error. Default:
            the longest of the batch, at least 1. Give a number where every new shape costs a
            compilation (`jit_compile=True`).
        bounding_box_format: format of the boxes in the batches, one of those of
            `keras.utils.bounding_boxes.convert_format`.
        use_difficult: False leaves out boxes marked as difficult.
        num_parallel_calls: images that are augmented at the same time.
        deterministic: False lets a faster image overtake a slower one: a little quicker, but
            not reproducible (and not possible with `image_sizes`).

    Returns:
        Dataset of `{"images": (B, height, width, 3) float32 of 0..255 (or what the augmentation
        gives), "bounding_boxes": {"boxes": (B, M, 4) float32, "labels": (B, M) int32}}`. Padding
        rows have label -1. With `image_sizes`, height and width are None in its `element_spec`.

    Raises:
        ValueError: if an argument is unusable, or the dataset has no image, or fewer than
            `batch_size` with `drop_remainder`.
        tf.errors.InvalidArgumentError: while iterating, if boxes are upside down or look like
            relative coordinates, or an image has more than `max_boxes`.

    Example:
        ```python
        augmentation = TrainingAugmentation((320, 320))
        batches = training_batches(dataset, (320, 320), 16, augmentation, seed=1)
        model.fit(batches, epochs=10)
        ```
    """
    size, box_format = check_image_shape(image_shape), check_box_format(bounding_box_format)
    source = _source(dataset, batch_size, whole_batch=drop_remainder)
    augmentation = augmentation or Resize(size)
    draw_size = _size_drawer(image_sizes, batch_size)
    _check_augmentation(augmentation, size, image_sizes, deterministic)
    _check_mixing(mosaic, mixup)
    _check_max_boxes(max_boxes)
    seed = random.randrange(2**31) if seed is None else seed
    counter = EpochCounter(initial_epoch)

    stored, prepare = _stored(dataset, source, cache, use_difficult, num_parallel_calls)
    buffer = _shuffle_buffer(shuffle_buffer, stored, all_of_them=cache is True or prepare)

    def augment(epoch_seed, position, number, element):
        element = prepare(element) if prepare else element
        name = tf.strings.to_hash_bucket_fast(element["image_id"], 2**62)
        own_seed = fold_in(epoch_seed, number, name)
        sizes = draw_size(epoch_seed, position) if draw_size else ()
        return dict(augmentation(element, own_seed, *sizes), seed=own_seed)

    elements = epoch_passes(stored, counter, seed, buffer).map(augment, num_parallel_calls)
    mixes = [mix for mix in (mosaic, mixup) if mix]
    batches = _batched(
        elements,
        (None, None) if image_sizes else size,
        batch_size,
        drop_remainder,
        None if mixes else max_boxes,
        box_keys=("boxes", "labels"),
        extra_keys=("seed",),
    )
    batches = batches.map(lambda batch: _mixed(batch, mixes, max_boxes), num_parallel_calls)
    batches = _as_long_as_the_smallest_shard(batches, dataset, batch_size, drop_remainder)
    batches = _converted(batches, box_format).prefetch(tf.data.AUTOTUNE)
    batches = batches.with_options(_options(deterministic))
    batches.epoch_counter = counter  # for `set_epoch`
    batches.class_names = getattr(dataset, "class_names", None)  # `fit` compares them
    return batches


def evaluation_batches(
    dataset,
    image_shape: Sequence[int],
    batch_size: int,
    *,
    cache: bool | str = True,
    max_boxes: int | None = None,
    bounding_box_format: str = "xyxy",
    dtype: str = "float32",
    include_source: bool = False,
    num_parallel_calls: int = tf.data.AUTOTUNE,
) -> tf.data.Dataset:
    """Batches for evaluation: every image once, in the order of the dataset, only resized.

    Every box is kept, also difficult ones and those without area; only padding rows of the
    source (label -1) give way to padding of the batch. The last batch may be smaller.

    Args:
        dataset: as in `training_batches`.
        image_shape: (height, width) or (height, width, 3) of the network.
        batch_size: images per batch.
        cache: as in `training_batches`.
        max_boxes: as in `training_batches`.
        bounding_box_format: as in `training_batches`.
        dtype: of the images, "float32" or "uint8" (rounded; a quarter of the bytes).
        include_source: also give "image_id" (B,) and "image_size" (B, 2), int32 height and
            width of the image before resizing, in pixels: what is needed to express
            detections in its own pixels again.
        num_parallel_calls: images that are resized at the same time.

    Returns:
        Dataset of `{"images": (B, height, width, 3), "bounding_boxes": {"boxes": (B, M, 4)
        float32, "labels": (B, M) int32, "difficult": (B, M) bool}}`, boxes in pixels of the
        resized image unless the format is relative. Padding rows have label -1.

    Raises:
        ValueError: if an argument is unusable or the dataset has no image.
        tf.errors.InvalidArgumentError: as in `training_batches`.

    Example:
        ```python
        batches = evaluation_batches(validation_dataset, (320, 320), 16)
        model.evaluate(batches)
        ```
    """
    size, box_format = check_image_shape(image_shape), check_box_format(bounding_box_format)
    source = _source(dataset, batch_size, whole_batch=False)
    _check_max_boxes(max_boxes)
    resize = Resize(size, dtype)

    def prepare(element):
        return dict(resize(element), image_size=tf.shape(element["images"])[:2])

    elements = _cached(source.map(_checked, num_parallel_calls), cache)
    elements = elements.map(prepare, num_parallel_calls)
    extra_keys = ("image_id", "image_size") if include_source else ()
    batches = _batched(elements, size, batch_size, False, max_boxes, tuple(PADDING), extra_keys)
    batches = _converted(batches, box_format).prefetch(tf.data.AUTOTUNE)
    batches = batches.with_options(_options(deterministic=True))
    batches.class_names = getattr(dataset, "class_names", None)
    return batches


# What comes in.


def _source(dataset, batch_size: int, whole_batch: bool) -> tf.data.Dataset:
    """The `tf.data.Dataset` behind `dataset`, known to fit the contract and to fill a batch."""
    if hasattr(dataset, "as_dataset"):
        dataset = dataset.as_dataset()
    if not isinstance(dataset, tf.data.Dataset):
        raise ValueError(
            "`dataset` must be a tf.data.Dataset or have `as_dataset()`. "
            f"Received: dataset={dataset!r}"
        )
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"`batch_size` must be a positive integer. Received: batch_size={batch_size!r}"
        )
    _check_element_spec(dataset.element_spec)
    needed = batch_size if whole_batch else 1
    count = int(dataset.cardinality())
    if count == tf.data.UNKNOWN_CARDINALITY:
        count = sum(1 for _ in dataset.take(needed))
    if 0 <= count < needed:
        raise ValueError(
            f"`dataset` must have at least {needed} image(s): with fewer, an epoch would have "
            f"no batch (batch_size={batch_size}, drop_remainder={whole_batch}). "
            f"Received: a dataset of {count} image(s)"
        )
    return dataset


def _check_element_spec(spec):
    try:
        image, annotations = spec["images"], spec["bounding_boxes"]
        ranks = [
            image.shape.rank,
            annotations["boxes"].shape.rank,
            annotations["labels"].shape.rank,
        ]
        fits = all(rank in (None, wanted) for rank, wanted in zip(ranks, (3, 2, 1), strict=True))
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(
            "`dataset` must give unbatched elements {'images': (h, w, 3), 'bounding_boxes': "
            f"{{'boxes': (n, 4), 'labels': (n,)}}}}. Received: elements of {spec}"
        )


def _check_augmentation(augmentation, image_shape, image_sizes, deterministic: bool):
    names = ("element", "seed", "image_size") if image_sizes else ("element", "seed")
    try:
        inspect.signature(augmentation).bind(*names)
    except TypeError:
        raise ValueError(
            f"`augmentation` must be a function of {', '.join(names)}, such as "
            f"`lambda {', '.join(names)}: ...`. Received: augmentation={augmentation!r}"
        ) from None
    own_shape = getattr(augmentation, "image_shape", None)
    if own_shape is not None and check_image_shape(own_shape) != image_shape:
        raise ValueError(
            f"`augmentation` must make images of image_shape={image_shape}. "
            f"Received: augmentation.image_shape={own_shape}"
        )
    if image_sizes and not deterministic:
        raise ValueError(
            "`image_sizes` needs `deterministic=True`: an image that overtakes another one "
            "would land in a batch of another size. Received: deterministic=False"
        )


def _check_mixing(mosaic, mixup):
    for name, value, kind in (("mosaic", mosaic, Mosaic), ("mixup", mixup, MixUp)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"`{name}` must be None or a {kind.__name__}, such as `{kind.__name__}()`. "
                f"Received: {name}={value!r}"
            )


def _check_max_boxes(max_boxes: int | None):
    if max_boxes is not None and (not isinstance(max_boxes, int) or max_boxes < 1):
        raise ValueError(
            f"`max_boxes` must be None or a positive integer. Received: max_boxes={max_boxes!r}"
        )


def _checked(element: dict) -> dict:
    """The element with all contract keys and types, no padding rows, and plausible boxes."""
    image, annotations = element["images"], element["bounding_boxes"]
    image.set_shape([None, None, 3])
    labels = tf.cast(tf.ensure_shape(annotations["labels"], [None]), tf.int32)
    boxes = tf.cast(tf.ensure_shape(annotations["boxes"], [None, 4]), tf.float32)
    difficult = tf.cast(annotations.get("difficult", tf.zeros_like(labels)), tf.bool)
    image_id = tf.convert_to_tensor(element.get("image_id", ""))
    rows = {"boxes": boxes, "labels": labels, "difficult": difficult}
    rows = {name: tf.boolean_mask(values, labels >= 0) for name, values in rows.items()}

    boxes = rows["boxes"]
    tf.debugging.Assert(
        tf.reduce_all(boxes[:, 2:] >= boxes[:, :2]),
        [
            f"{PREFIX} `dataset` must have boxes (x1, y1, x2, y2) in pixels with x1 <= x2 and "
            "y1 <= y2. Received (image_id, boxes):",
            image_id,
            boxes,
        ],
    )
    # Only in a tiny image may all boxes lie in the first pixel.
    largest = tf.reduce_max(boxes)  # -inf without boxes
    is_relative = (largest > 0.0) & (largest <= 1.0)
    tf.debugging.Assert(
        ~is_relative | (tf.reduce_max(tf.shape(image)) <= 16),
        [
            f"{PREFIX} `dataset` must have boxes in pixels. Received only numbers within 0 to 1 "
            "(image_id, boxes):",
            image_id,
            boxes,
        ],
    )
    return {"images": image, "image_id": image_id, "bounding_boxes": rows}


def _without_difficult(element: dict) -> dict:
    rows = element["bounding_boxes"]
    easy = {name: tf.boolean_mask(values, ~rows["difficult"]) for name, values in rows.items()}
    return dict(element, bounding_boxes=easy)


# What happens to it.


def _cached(elements: tf.data.Dataset, cache: bool | str) -> tf.data.Dataset:
    if not cache:
        return elements
    if int(elements.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "`cache` must be False for an endless dataset (one with `repeat()`). "
            f"Received: cache={cache!r}"
        )
    return elements.cache() if cache is True else elements.cache(str(cache))


def _stored(
    dataset, source: tf.data.Dataset, cache: bool | str, use_difficult: bool, num_parallel_calls
) -> tuple[tf.data.Dataset, Callable | None]:
    """What is shuffled: whole elements, or only the numbers of images that are read later.

    Returns:
        The dataset of elements and None; or the dataset of numbers, and the function that
        makes an element of one.
    """

    def checked(element):
        element = drop_empty_boxes(_checked(element))
        return element if use_difficult else _without_difficult(element)

    load = getattr(dataset, "element_loader", lambda: None)() if not cache else None
    if load is None:
        return _cached(source.map(checked, num_parallel_calls), cache), None
    return tf.data.Dataset.range(len(dataset)), lambda number: checked(load(number))


def _shuffle_buffer(buffer: int | None, stored: tf.data.Dataset, all_of_them: bool) -> int:
    if buffer is not None:
        if not isinstance(buffer, int) or buffer < 0:
            raise ValueError(
                "`shuffle_buffer` must be None or an integer of at least 0. "
                f"Received: shuffle_buffer={buffer!r}"
            )
        return buffer
    # Images cached in memory are shared with the buffer, so a large one costs nothing.
    count = int(stored.cardinality())
    if all_of_them:
        return count if count > 0 else 100_000
    return min(count, 512) if count > 0 else 512


def _size_drawer(image_sizes, batch_size: int) -> Callable | None:
    """Function that draws one of the sizes for the batch of an image, as a tuple of one."""
    if image_sizes is None:
        return None
    if not isinstance(image_sizes, Sequence) or not image_sizes:
        raise ValueError(
            "`image_sizes` must be a list of (height, width) in pixels. "
            f"Received: image_sizes={image_sizes!r}"
        )
    sizes = tf.constant([check_image_shape(size) for size in image_sizes])

    def draw(epoch_seed, position):
        seed = fold_in(epoch_seed, -1, position // batch_size)  # no image has the number -1
        choice = tf.random.stateless_uniform([], seed, 0, len(image_sizes), tf.int32)
        return (sizes[choice],)

    return draw


def _mixed(batch: dict, mixes: list, max_boxes: int | None) -> dict:
    """The batch after mosaic and mixup, without the seeds of its images."""
    batch = dict(batch)
    seeds = batch.pop("seed")
    for number, mix in enumerate(mixes):
        batch = mix(batch, fold_in(seeds[0], number))
    if mixes and max_boxes is not None:
        batch["bounding_boxes"] = _padded_to(batch["bounding_boxes"], max_boxes)
    return batch


def _padded_to(rows: dict, max_boxes: int) -> dict:
    """Rows (B, M, ...) of mixed images, padded to `max_boxes`."""
    rows = fit_rows(rows)
    count = tf.shape(rows["labels"])[1]
    message = f"{PREFIX} a mixed image has more boxes than max_boxes={max_boxes}. Received (boxes):"
    tf.debugging.Assert(count <= max_boxes, [message, count])
    padded = {}
    for name, values in rows.items():
        paddings = [[0, 0], [0, max_boxes - count]] + [[0, 0]] * (values.shape.rank - 2)
        values = tf.pad(values, paddings, constant_values=PADDING[name])
        padded[name] = tf.ensure_shape(values, [None, max_boxes, *values.shape[2:]])
    return padded


def _as_long_as_the_smallest_shard(
    batches: tf.data.Dataset, dataset, batch_size: int, drop_remainder: bool
) -> tf.data.Dataset:
    images = getattr(dataset, "smallest_shard", None)
    if images is None or images == len(dataset):
        return batches
    steps = images // batch_size if drop_remainder else -(-images // batch_size)
    if not steps:
        raise ValueError(
            f"`dataset` must have at least {batch_size} images in each shard (batch_size="
            f"{batch_size}, drop_remainder=True). Received: a smallest shard of {images}"
        )
    return batches.take(steps)


def _batched(
    elements: tf.data.Dataset,
    size: tuple[int | None, int | None],
    batch_size: int,
    drop_remainder: bool,
    max_boxes: int | None,
    box_keys: tuple[str, ...],
    extra_keys: tuple[str, ...] = (),
) -> tf.data.Dataset:
    """Selects what a batch carries, pads the boxes to one number of rows, and batches."""

    def select(element):
        rows = _at_least_one_row(element, max_boxes)
        return {
            "images": tf.ensure_shape(element["images"], [*size, 3]),
            "bounding_boxes": {name: rows[name] for name in box_keys},
            **{name: element[name] for name in extra_keys},
        }

    elements = elements.map(select)
    # The number of boxes is the only open dimension; None pads it to the longest of the batch.
    padded_shapes = tf.nest.map_structure(
        lambda spec: [max_boxes if length is None else length for length in spec.shape],
        elements.element_spec,
    )
    padding = dict.fromkeys(elements.element_spec)
    padding["bounding_boxes"] = {name: PADDING[name] for name in box_keys}
    return elements.padded_batch(batch_size, padded_shapes, padding, drop_remainder)


def _converted(batches: tf.data.Dataset, bounding_box_format: str) -> tf.data.Dataset:
    """Brings the boxes of batches from "xyxy" pixels to `bounding_box_format`."""

    def convert(batch):
        rows = batch["bounding_boxes"]
        height, width = tf.unstack(tf.cast(tf.shape(batch["images"])[1:3], tf.float32))
        boxes = keras.utils.bounding_boxes.convert_format(
            rows["boxes"], "xyxy", bounding_box_format, height=height, width=width
        )
        return dict(batch, bounding_boxes=dict(rows, boxes=boxes))

    return batches.map(convert)


def _at_least_one_row(element: dict, max_boxes: int | None) -> dict:
    """Box entries, checked against `max_boxes`; an image without boxes gets a padding row."""
    rows = element["bounding_boxes"]
    count = tf.shape(rows["labels"])[0]
    if max_boxes is not None:
        message = (
            f"{PREFIX} an image has more boxes than max_boxes={max_boxes}. Received (boxes, id):"
        )
        tf.debugging.Assert(count <= max_boxes, [message, count, element.get("image_id", "")])
    missing = tf.cast(tf.equal(count, 0), tf.int32)
    return {
        name: tf.pad(
            values,
            [[0, missing]] + [[0, 0]] * (values.shape.rank - 1),
            constant_values=PADDING[name],
        )
        for name, values in rows.items()
        if name in PADDING
    }


def _options(deterministic: bool) -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = deterministic
    # One thread per image: quicker than all threads on one image, and leaves cores to fit().
    options.threading.max_intra_op_parallelism = 1
    return options
