"""Augmentation that combines the images of a batch, as TensorFlow graph code for `tf.data`.

`Mosaic` and `MixUp` check their arguments (ValueError) and take a batch of images of one size

    {"images": (B, H, W, 3), "bounding_boxes": {"boxes": (B, M, 4), "labels": (B, M), ...}}

and a `seed`, an integer tensor (2,); the same batch and seed give the same result. Images are RGB,
0 to 255, and keep their dtype; boxes are "xyxy" in pixels; label -1 marks padding rows. Images are
combined within a batch, so nothing is decoded or augmented twice. The result has as many rows as
the image with the most boxes, at least one. Use `training_batches(mosaic=..., mixup=...)`.
"""

from dataclasses import dataclass

import tensorflow as tf

from keras_resnest.checks import check_fractions, checked
from keras_resnest.data.augmentation.geometry import (
    PADDING,
    between,
    centers_inside,
    check_range,
    checked_call,
    pad_rows,
    split_seed,
    view,
)


@checked
@dataclass(frozen=True)
class Mosaic:
    """Combines four images into one (YOLOv4, arXiv 2004.10934, section 3.3).

    A random center divides the image into four quadrants. Each shows a random crop of one image,
    at the smallest scale that fills the quadrant without changing the aspect ratio. Objects are
    kept if their center is visible, and clipped to their quadrant. Batches of fewer than four
    images repeat images.

    Args:
        probability: probability that an image becomes a mosaic.
        center: (low, high) of the center, as fractions of height and width.
        min_box_size: boxes with a side shorter than this many pixels are dropped.

    Example:
        >>> batches = training_batches(dataset, (320, 320), 16, mosaic=Mosaic(0.5))
    """

    probability: float = 0.5
    center: tuple[float, float] = (0.3, 0.7)
    min_box_size: float = 1.0

    def __post_init__(self):
        check_fractions(probability=self.probability)
        if not 0.0 < self.center[0] <= self.center[1] < 1.0:
            raise ValueError(
                f"`center` must be (low, high) between 0 and 1. Received: center={self.center!r}"
            )
        check_range("min_box_size", (0.0, self.min_box_size), 0.0, float("inf"))

    @checked_call
    def __call__(self, batch: dict, seed) -> dict:
        """Returns the batch with some images replaced by mosaics."""
        seeds = split_seed(seed, 3)
        batch = tf.nest.map_structure(tf.convert_to_tensor, batch)
        images, rows = batch["images"], batch["bounding_boxes"]
        count = tf.shape(images)[0]
        shifts = _distinct_shifts(count, 3, seeds[0])
        members = (tf.range(count)[:, None] + tf.pad(shifts, [[1, 0]])) % count  # (B, 4)
        happens = tf.random.stateless_uniform([count], seeds[1]) < self.probability
        member_seeds = tf.random.split(seeds[2], count)

        def one(i):
            def mosaic():
                own_rows = {name: tf.gather(values, members[i]) for name, values in rows.items()}
                return self._mosaic(tf.gather(images, members[i]), own_rows, member_seeds[i])

            def unchanged():
                own_rows = {name: values[i] for name, values in rows.items()}
                return images[i], pad_rows(own_rows, 3 * tf.shape(rows["labels"])[1])

            image, new_rows = tf.cond(happens[i], mosaic, unchanged)
            return tf.ensure_shape(image, images.shape[1:]), new_rows

        signature = (
            tf.TensorSpec(images.shape[1:], images.dtype),
            {k: tf.TensorSpec([None, *v.shape[2:]], v.dtype) for k, v in rows.items()},
        )
        images, rows = tf.map_fn(one, tf.range(count), fn_output_signature=signature)
        return dict(batch, images=images, bounding_boxes=compact_rows(rows))

    def _mosaic(self, images: tf.Tensor, rows: dict, seed) -> tuple[tf.Tensor, dict]:
        """Combines four images (4, H, W, 3) into one with 4 M rows."""
        size = tf.shape(images)[1:3]
        draws = tf.random.stateless_uniform([5, 2], seed)
        center = tf.round(between(*self.center, draws[0]) * tf.cast(size, tf.float32))
        center = tf.clip_by_value(tf.cast(center, tf.int32), 1, tf.maximum(size - 1, 1))
        tiles, tile_rows = [], []
        for i, (lower, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            corner = center * tf.constant([lower, right])
            extent = tf.abs(tf.constant([lower, right]) * size - center)
            own_rows = {name: values[i] for name, values in rows.items()}
            element = {"images": images[i], "bounding_boxes": own_rows}
            tile, own_rows = self._tile(element, corner, extent, draws[i + 1])
            tiles.append(tile)
            tile_rows.append(own_rows)
        upper, lower = tf.concat(tiles[:2], axis=1), tf.concat(tiles[2:], axis=1)
        image = _cast(tf.concat([upper, lower], axis=0), images.dtype)
        return image, {k: tf.concat([own[k] for own in tile_rows], axis=0) for k in rows}

    def _tile(self, element: dict, corner, extent, draw) -> tuple[tf.Tensor, dict]:
        """Crops a quadrant (height, width) = `extent`; moves its rows to its `corner`."""
        size = tf.cast(tf.shape(element["images"])[:2], tf.float32)
        target = tf.cast(extent, tf.float32)
        # The largest window with the aspect ratio of the quadrant, at a random position.
        crop = tf.clip_by_value(tf.round(target / tf.reduce_max(target / size)), 1.0, size)
        start = tf.floor(draw * (size - crop + 1.0))
        window = tf.cast(tf.concat([start[::-1], (start + crop)[::-1]], axis=0), tf.int32)
        image, boxes = view(element, window, extent)

        rows = element["bounding_boxes"]
        is_large = tf.reduce_all(boxes[:, 2:] - boxes[:, :2] >= self.min_box_size, axis=-1)
        keep = is_large & centers_inside(rows["boxes"], window) & (rows["labels"] >= 0)
        offset = tf.cast(tf.tile(corner[::-1], [2]), tf.float32)
        return image, _masked(dict(rows, boxes=boxes + offset), keep)


@checked
@dataclass(frozen=True)
class MixUp:
    """Blends two images of a batch and keeps the boxes of both.

    Mixup for detection (arXiv 1710.09412; arXiv 1902.04103, section 3.1): `weight` of one image
    plus `1 - weight` of another, with `weight` drawn from Beta(alpha, alpha). Every object counts
    fully, however faint; with the default `alpha`, both images stay clearly visible.

    Args:
        probability: probability that an image is blended with another one.
        alpha: parameter of the beta distribution, at least 0.1; 1.5 in arXiv 1902.04103. Large
            values blend about half of each image.

    Example:
        >>> batches = training_batches(dataset, (320, 320), 16, mixup=MixUp(0.15))
    """

    probability: float = 0.15
    alpha: float = 32.0

    def __post_init__(self):
        check_fractions(probability=self.probability)
        # With a smaller alpha, float32 gamma draws are often zero.
        if not 0.1 <= self.alpha < float("inf"):
            raise ValueError(f"`alpha` must be at least 0.1. Received: alpha={self.alpha!r}")

    @checked_call
    def __call__(self, batch: dict, seed) -> dict:
        """Returns the batch with some images blended."""
        seeds = split_seed(seed, 3)
        batch = tf.nest.map_structure(tf.convert_to_tensor, batch)
        images, rows = batch["images"], batch["bounding_boxes"]
        count = tf.shape(images)[0]
        partners = (tf.range(count) + _distinct_shifts(count, 1, seeds[0])) % count
        happens = tf.random.stateless_uniform([count], seeds[1]) < self.probability
        happens &= partners != tf.range(count)  # do not repeat its own boxes
        gamma = tf.random.stateless_gamma([count, 2], seeds[2], self.alpha)
        weight = tf.math.divide_no_nan(gamma[:, 0], gamma[:, 0] + gamma[:, 1])
        weight = tf.where(happens, weight, 1.0)[:, None, None, None]

        as_float = tf.cast(images, tf.float32)
        mixed = weight * as_float + (1.0 - weight) * tf.gather(as_float, partners)
        added = {name: tf.gather(values, partners) for name, values in rows.items()}
        added["labels"] = tf.where(happens[:, None], added["labels"], PADDING["labels"])
        rows = {name: tf.concat([rows[name], added[name]], axis=1) for name in rows}
        return dict(batch, images=_cast(mixed, images.dtype), bounding_boxes=compact_rows(rows))


def compact_rows(rows: dict) -> dict:
    """Moves padding rows to the end and trims (B, M, ...) to the most boxes of an image, or 1."""
    is_box = rows["labels"] >= 0
    longest = tf.maximum(tf.reduce_max(tf.reduce_sum(tf.cast(is_box, tf.int32), axis=1)), 1)
    order = tf.argsort(tf.cast(~is_box, tf.int32), axis=1, stable=True)[:, :longest]
    rows = {name: tf.gather(values, order, batch_dims=1) for name, values in rows.items()}
    return _masked(rows, tf.gather(is_box, order, batch_dims=1))


def _distinct_shifts(count: tf.Tensor, number: int, seed) -> tf.Tensor:
    """Draws `number` different nonzero shifts for a batch of `count` images.

    In a batch that is too small, some images are combined with themselves.
    """
    shifts = tf.maximum(count, number + 1) - 1
    return 1 + tf.argsort(tf.random.stateless_uniform([shifts], seed))[:number]


def _masked(rows: dict, keep: tf.Tensor) -> dict:
    """Replaces rows (..., n) with padding where `keep` (..., n) is False."""
    masked = {}
    for name, values in rows.items():
        condition = keep[..., None] if name == "boxes" else keep
        masked[name] = tf.where(condition, values, tf.cast(PADDING[name], values.dtype))
    return masked


def _cast(images: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return images if dtype.is_floating else tf.cast(tf.round(images), dtype)
