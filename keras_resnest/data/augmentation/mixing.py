"""Augmentation that mixes the images of a batch, as TensorFlow graph code for `tf.data`.

`Mosaic` and `MixUp` are small immutable recipes that are called on a batch of images of one size

    {"images": (B, H, W, 3), "bounding_boxes": {"boxes": (B, M, 4), "labels": (B, M), ...}}

and a `seed`, an integer tensor of shape (2,): the same batch and seed always give the same result.
Images are RGB, 0 to 255, and keep their data type; boxes are "xyxy" in pixels; rows with label -1
are padding. The partners of an image come from its own batch, so that nothing is decoded or
augmented twice; each image is used equally often. The result has as many rows as its fullest
image needs, at least one. `training_batches(mosaic=..., mixup=...)` applies them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from keras_resnest.data.augmentation.geometry import (
    PADDING,
    between,
    centers_inside,
    split_seed,
    view,
)


@dataclass(frozen=True)
class Mosaic:
    """Four images in one (YOLOv4, arXiv 2004.10934, section 3.3).

    The image is cut into four quadrants at a random center. Each shows one image, at the
    smallest scale that covers the quadrant without changing the aspect ratio (objects become
    smaller, none is stretched); what does not fit is cut off at a random place. Objects stay when
    their center is seen, and are clipped to their quadrant. With fewer than four images in the
    batch, images are repeated.

    Args:
        probability: chance of each image of the batch to become a mosaic.
        center: (low, high) of the center, as parts of height and width.
        min_box_size: boxes with a side shorter than this many pixels are dropped.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        ```python
        batches = training_batches(dataset, (320, 320), 16, mosaic=Mosaic(probability=0.5))
        ```
    """

    probability: float = 0.5
    center: tuple[float, float] = (0.3, 0.7)
    min_box_size: float = 1.0

    def __post_init__(self):
        _check_probability(self.probability)
        pair = isinstance(self.center, Sequence) and len(self.center) == 2
        if not pair or not 0.0 < self.center[0] <= self.center[1] < 1.0:
            raise ValueError(
                "`center` must be (low, high) with 0 < low <= high < 1. "
                f"Received: center={self.center!r}"
            )
        if not 0.0 <= self.min_box_size < float("inf"):
            raise ValueError(
                f"`min_box_size` must be at least 0. Received: min_box_size={self.min_box_size!r}"
            )

    def __call__(self, batch: dict, seed) -> dict:
        """Returns the batch with mosaics in it."""
        seeds = split_seed(seed, 3)
        batch = tf.nest.map_structure(tf.convert_to_tensor, batch)
        images, rows = batch["images"], batch["bounding_boxes"]
        count = tf.shape(images)[0]
        shifts = _distinct_shifts(count, 3, seeds[0])
        members = (tf.range(count)[:, None] + tf.pad(shifts, [[1, 0]])) % count  # (B, 4)
        happens = tf.random.stateless_uniform([count], seeds[1]) < self.probability
        member_seeds = tf.random.split(seeds[2], count)

        def mosaic(number):
            return self._mosaic(
                tf.gather(images, members[number]),
                {name: tf.gather(values, members[number]) for name, values in rows.items()},
                member_seeds[number],
            )

        def one(number):
            image, new_rows = tf.cond(
                happens[number],
                lambda: mosaic(number),
                lambda: (images[number], {k: _padded(v[number], k, 4) for k, v in rows.items()}),
            )
            return tf.ensure_shape(image, images.shape[1:]), new_rows

        signature = (
            tf.TensorSpec(images.shape[1:], images.dtype),
            {k: tf.TensorSpec([None, *v.shape[2:]], v.dtype) for k, v in rows.items()},
        )
        images, rows = tf.map_fn(one, tf.range(count), fn_output_signature=signature)
        return dict(batch, images=images, bounding_boxes=fit_rows(rows))

    def _mosaic(self, images: tf.Tensor, rows: dict, seed) -> tuple[tf.Tensor, dict]:
        """One image of four (4, H, W, 3), and the 4 M rows of their boxes."""
        size = tf.shape(images)[1:3]
        draws = tf.random.stateless_uniform([5, 2], seed)
        center = tf.round(between(*self.center, draws[0]) * tf.cast(size, tf.float32))
        center = tf.clip_by_value(tf.cast(center, tf.int32), 1, tf.maximum(size - 1, 1))
        tiles, parts = [], []
        for number, (lower, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            corner = center * tf.constant([lower, right])
            extent = tf.abs(tf.constant([lower, right]) * size - center)
            element = {
                "images": images[number],
                "bounding_boxes": {name: values[number] for name, values in rows.items()},
            }
            tile, part = self._tile(element, corner, extent, draws[number + 1])
            tiles.append(tile)
            parts.append(part)
        upper, lower = tf.concat(tiles[:2], axis=1), tf.concat(tiles[2:], axis=1)
        image = _as_type(tf.concat([upper, lower], axis=0), images.dtype)
        return image, {k: tf.concat([part[k] for part in parts], axis=0) for k in rows}

    def _tile(self, element: dict, corner, extent, draw) -> tuple[tf.Tensor, dict]:
        """One quadrant (height, width) = `extent`, and the rows, moved to its `corner`."""
        size = tf.cast(tf.shape(element["images"])[:2], tf.float32)
        wanted = tf.cast(extent, tf.float32)
        # The largest window of the quadrant's aspect ratio, at a random place of the image.
        seen = tf.clip_by_value(tf.round(wanted / tf.reduce_max(wanted / size)), 1.0, size)
        start = tf.floor(draw * (size - seen + 1.0))
        window = tf.cast(tf.concat([start[::-1], (start + seen)[::-1]], axis=0), tf.int32)
        image, boxes = view(element, window, extent)

        rows = element["bounding_boxes"]
        is_large = tf.reduce_all(boxes[:, 2:] - boxes[:, :2] >= self.min_box_size, axis=-1)
        keep = is_large & centers_inside(rows["boxes"], window) & (rows["labels"] >= 0)
        offset = tf.cast(tf.tile(corner[::-1], [2]), tf.float32)
        moved = dict(rows, boxes=boxes + offset)
        return image, {name: _masked(values, keep, name) for name, values in moved.items()}


@dataclass(frozen=True)
class MixUp:
    """Two images, one shining through the other, with the boxes of both.

    Detection's form of mixup (arXiv 1710.09412; arXiv 1902.04103, section 3.1): `share` of one
    image plus `1 - share` of another one of the batch, with `share` from Beta(alpha, alpha).
    Every object counts fully, however faint it is; the default keeps both images well visible.

    Args:
        probability: chance of each image of the batch to be mixed.
        alpha: of the beta distribution, 0.1 or more. 1.5 in arXiv 1902.04103; large values mean
            about half of each.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        ```python
        batches = training_batches(dataset, (320, 320), 16, mixup=MixUp(probability=0.15))
        ```
    """

    probability: float = 0.15
    alpha: float = 32.0

    def __post_init__(self):
        _check_probability(self.probability)
        # float32 gamma draws of smaller shapes are often zero.
        if not 0.1 <= self.alpha < float("inf"):
            raise ValueError(f"`alpha` must be at least 0.1. Received: alpha={self.alpha!r}")

    def __call__(self, batch: dict, seed) -> dict:
        """Returns the batch with mixed images in it."""
        seeds = split_seed(seed, 3)
        batch = tf.nest.map_structure(tf.convert_to_tensor, batch)
        images, rows = batch["images"], batch["bounding_boxes"]
        count = tf.shape(images)[0]
        partners = (tf.range(count) + _distinct_shifts(count, 1, seeds[0])) % count
        # An image mixed with itself is itself; its boxes must not come twice.
        happens = tf.random.stateless_uniform([count], seeds[1]) < self.probability
        happens &= partners != tf.range(count)
        gamma = tf.random.stateless_gamma([count, 2], seeds[2], self.alpha)
        share = tf.math.divide_no_nan(gamma[:, 0], gamma[:, 0] + gamma[:, 1])
        share = tf.where(happens, share, 1.0)[:, None, None, None]

        as_float = tf.cast(images, tf.float32)
        mixed = share * as_float + (1.0 - share) * tf.gather(as_float, partners)
        added = {name: tf.gather(values, partners) for name, values in rows.items()}
        added["labels"] = tf.where(happens[:, None], added["labels"], PADDING["labels"])
        rows = {name: tf.concat([rows[name], added[name]], axis=1) for name in rows}
        return dict(batch, images=_as_type(mixed, images.dtype), bounding_boxes=fit_rows(rows))


def fit_rows(rows: dict) -> dict:
    """Moves padding rows to the end and cuts those that no image of the batch needs.

    Args:
        rows: `{"boxes": (B, M, 4), "labels": (B, M), ...}`; label -1 marks padding.

    Returns:
        The same keys with (B, m, ...), 1 <= m: the order of the boxes is kept, and padding rows
        hold the values of `PADDING`.
    """
    is_box = rows["labels"] >= 0
    longest = tf.maximum(tf.reduce_max(tf.reduce_sum(tf.cast(is_box, tf.int32), axis=1)), 1)
    order = tf.argsort(tf.cast(~is_box, tf.int32), axis=1, stable=True)[:, :longest]
    is_box = tf.gather(is_box, order, batch_dims=1)
    return {
        name: _masked(tf.gather(values, order, batch_dims=1), is_box, name)
        for name, values in rows.items()
    }


def _check_probability(probability: float):
    if not 0.0 <= probability <= 1.0:
        raise ValueError(
            f"`probability` is a chance from 0 to 1. Received: probability={probability!r}"
        )


def _distinct_shifts(count: tf.Tensor, number: int, seed) -> tf.Tensor:
    """`number` different ways to move on in a batch of `count`, none of them standing still.

    In a batch that has too few, images meet themselves.
    """
    ways = tf.maximum(count, number + 1) - 1
    return 1 + tf.argsort(tf.random.stateless_uniform([ways], seed))[:number]


def _masked(values: tf.Tensor, keep: tf.Tensor, name: str) -> tf.Tensor:
    """`values` (..., n) or (..., n, 4), with padding where `keep` (..., n) is False."""
    keep = keep[..., None] if name == "boxes" else keep
    return tf.where(keep, values, tf.cast(PADDING[name], values.dtype))


def _padded(values: tf.Tensor, name: str, times: int) -> tf.Tensor:
    """`values` (n, ...) with padding up to `times` n rows."""
    missing = (times - 1) * tf.shape(values)[0]
    paddings = [[0, missing]] + [[0, 0]] * (values.shape.rank - 1)
    return tf.pad(values, paddings, constant_values=tf.cast(PADDING[name], values.dtype))


def _as_type(images: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return images if dtype.is_floating else tf.cast(tf.round(images), dtype)
