"""Training augmentation of single-shot detectors, as TensorFlow graph code for `tf.data`.

The recipe is SSD's (arXiv 1512.02325, sections 2.2 and 3.6), which RefineDet adopted: color
distortion, expansion, a crop that overlaps an object by a given IoU, flipping, and stretching to
the input size of the network.

Each class is an immutable callable, checks its arguments (ValueError), and takes one unbatched
dataset element

    {"images": (h, w, 3), "bounding_boxes": {"boxes": (n, 4), "labels": (n,), "difficult": (n,)}}

and a `seed`, an integer tensor (2,); the same element and seed give the same result. Images are
RGB, 0 to 255; boxes are "xyxy" in pixels. Other keys are passed through, and all entries of
`bounding_boxes` are filtered together.

Padding rows (label -1) and boxes without area are always dropped, a crop drops boxes whose center
is outside, and `TrainingAugmentation` drops boxes smaller than `min_box_size`. `Resize`, used for
evaluation, keeps every row.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tensorflow as tf

from keras_resnest.checks import check_counts, check_fractions, check_image_shape, checked
from keras_resnest.data.augmentation.geometry import (
    MEAN_COLOR,
    apply_if,
    between,
    centers_inside,
    check_range,
    checked_call,
    intersection,
    orient,
    size_of,
    split_seed,
    update_element,
    view,
    whole_window,
    window_iou,
)


def drop_empty_boxes(element: dict) -> dict:
    """Clips boxes to the image and drops padding rows (label -1) and boxes without area.

    Example:
        >>> dataset = dataset.map(drop_empty_boxes)
    """
    rows = element["bounding_boxes"]
    height, width = tf.unstack(size_of(element["images"]))
    limits = tf.cast(tf.stack([width, height, width, height]), tf.float32)
    boxes = tf.clip_by_value(rows["boxes"], 0.0, limits)
    has_area = tf.reduce_all(boxes[:, 2:] > boxes[:, :2], axis=-1)
    return update_element(element, element["images"], boxes, has_area & (rows["labels"] >= 0))


@checked
@dataclass(frozen=True)
class PhotometricDistortion:
    """Randomly changes brightness, contrast, saturation, hue, and the order of color channels.

    Contrast follows brightness in half of the images and comes last in the other half. Values are
    clipped to 0..255 after every step.

    Args:
        brightness: largest amount added to or subtracted from all values (of 0..255).
        contrast: (low, high) of the factor applied to all values.
        saturation: (low, high) of the factor applied to the HSV saturation.
        hue: largest rotation of the HSV hue, in degrees. (SSD's Caffe code adds up to 18 to hues
            in OpenCV's range of 0..180, that is 36 degrees; its ports use 18 degrees.)
        probability: probability of each of these four changes, independently.
        channel_probability: probability of a random channel order, 0 in the code of SSD and
            RefineDet and 0.5 in some ports; keep 0 if color distinguishes the classes.

    Example:
        >>> element = PhotometricDistortion(hue=0)(element, seed=(1, 2))
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 18.0
    probability: float = 0.5
    channel_probability: float = 0.0

    def __post_init__(self):
        check_range("brightness", (0.0, self.brightness), 0.0, 255.0)
        check_range("contrast", self.contrast, 0.0, float("inf"))
        check_range("saturation", self.saturation, 0.0, float("inf"))
        check_range("hue", (0.0, self.hue), 0.0, 180.0)
        check_fractions(probability=self.probability, channel_probability=self.channel_probability)

    @checked_call
    def __call__(self, element: dict, seed) -> dict:
        """Returns the element with a distorted float32 image, 0..255."""
        return dict(element, images=self.distort(element["images"], seed))

    def distort(self, image: tf.Tensor, seed) -> tf.Tensor:
        """Distorts one image (h, w, 3), 0..255; returns float32, 0..255."""
        draws = tf.random.stateless_uniform([11], seed)
        happens, amount = draws[:4] < self.probability, draws[5:]
        contrast_is_first = draws[4] < 0.5

        def brightness(image):
            return _clip_colors(image + between(-self.brightness, self.brightness, amount[0]))

        def contrast(image):
            return _clip_colors(image * between(*self.contrast, amount[1]))

        # HSV saturation and hue do not depend on the scale of the values: no division by 255.
        def saturation(image):
            factor = between(*self.saturation, amount[2])
            return _clip_colors(tf.image.adjust_saturation(image, factor))

        def hue(image):
            delta = between(-self.hue, self.hue, amount[3]) / 360.0
            return _clip_colors(tf.image.adjust_hue(image, delta))

        image = tf.cast(image, tf.float32)
        image = apply_if(happens[0], brightness, image)
        image = apply_if(happens[1] & contrast_is_first, contrast, image)
        image = apply_if(happens[2], saturation, image)
        image = apply_if(happens[3], hue, image)
        image = apply_if(happens[1] & ~contrast_is_first, contrast, image)
        if self.channel_probability:
            permutes = amount[4] < self.channel_probability
            image = apply_if(permutes, lambda image: _permute_channels(image, amount[5]), image)
        return image


@checked
@dataclass(frozen=True)
class RandomExpand:
    """Places the image at a random position on a larger canvas of one color ("zoom out").

    SSD's expansion, which creates small objects (arXiv 1512.02325, section 3.6).

    Args:
        max_ratio: largest ratio of canvas side to image side.
        probability: probability of an expansion.
        fill_color: (red, green, blue) of the canvas, 0..255.

    Example:
        >>> element = RandomExpand(max_ratio=2.0)(element, seed=(1, 2))
    """

    max_ratio: float = 4.0
    probability: float = 0.5
    fill_color: tuple[float, float, float] = MEAN_COLOR

    def __post_init__(self):
        check_range("max_ratio", (1.0, self.max_ratio), 1.0, float("inf"))
        check_fractions(probability=self.probability)
        if len(self.fill_color) != 3 or not all(0 <= value <= 255 for value in self.fill_color):
            raise ValueError(
                "`fill_color` must be (red, green, blue) from 0 to 255. "
                f"Received: fill_color={self.fill_color!r}"
            )

    @checked_call
    def __call__(self, element: dict, seed) -> dict:
        """Returns the element on its canvas: float32 image and shifted boxes."""
        element = drop_empty_boxes(element)
        window = self.window(size_of(element["images"]), seed)
        image, boxes = view(element, window, fill_color=self.fill_color)
        return update_element(element, image, boxes)

    def window(self, size: tf.Tensor, seed) -> tf.Tensor:
        """Draws the canvas around an image of int32 `size` (height, width).

        Returns int32 (x1, y1, x2, y2) in pixels of the image, with x1, y1 <= 0.
        """
        draws = tf.random.stateless_uniform([4], seed)
        ratio = tf.where(draws[0] < self.probability, between(1.0, self.max_ratio, draws[1]), 1.0)
        size = tf.cast(size[::-1], tf.float32)  # (width, height)
        canvas = tf.round(size * ratio)
        corner = -tf.floor(draws[2:] * (canvas - size + 1.0))
        return tf.cast(tf.concat([corner, corner + canvas], axis=0), tf.int32)


@checked
@dataclass(frozen=True)
class RandomIoUCrop:
    """Crops the image so that some object overlaps the crop by a required IoU (SSD, section 2.2).

    As in SSD's code, each option of `min_ious` gets `trials` attempts, and one of the successful
    options is drawn. An attempt succeeds if the crop reaches the required IoU with an object and
    contains the center of an object; without objects, every crop succeeds. Objects are kept if
    their center is in the crop, and clipped to it.

    Args:
        min_ious: the options. None keeps the whole image; 0.0 requires no overlap.
        scale: (low, high) of the square root of the crop's area, as a fraction of the image.
        aspect_ratio: (low, high) of width / height, relative to that of the image.
        trials: random crops per option.
        probability: probability of a crop.

    Example:
        >>> element = RandomIoUCrop(min_ious=(0.5,))(element, seed=(1, 2))
    """

    min_ious: tuple[float | None, ...] = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    scale: tuple[float, float] = (0.3, 1.0)
    aspect_ratio: tuple[float, float] = (0.5, 2.0)
    trials: int = 50
    probability: float = 1.0

    def __post_init__(self):
        if not self.min_ious or not all(m is None or 0 <= m <= 1 for m in self.min_ious):
            raise ValueError(
                "`min_ious` must be one or more of None and numbers from 0 to 1. "
                f"Received: min_ious={self.min_ious!r}"
            )
        check_range("scale", self.scale, 1e-3, 1.0)
        check_range("aspect_ratio", self.aspect_ratio, 1e-3, float("inf"))
        if not self.aspect_ratio[0] <= 1.0 <= self.aspect_ratio[1]:
            raise ValueError(
                "`aspect_ratio` must be (low, high) with low <= 1 <= high. "
                f"Received: aspect_ratio={self.aspect_ratio!r}"
            )
        check_counts(trials=self.trials)
        check_fractions(probability=self.probability)

    @checked_call
    def __call__(self, element: dict, seed) -> dict:
        """Returns the cropped element (float32 image)."""
        element = drop_empty_boxes(element)
        size, boxes = size_of(element["images"]), element["bounding_boxes"]["boxes"]
        window = self.window(whole_window(size), size, boxes, seed)
        inside = centers_inside(boxes, window)
        image, boxes = view(element, window)
        return update_element(element, image, boxes, inside)

    def window(self, canvas: tf.Tensor, size: tf.Tensor, boxes: tf.Tensor, seed) -> tf.Tensor:
        """Draws a crop of a canvas, which may extend beyond the image but always overlaps it.

        Args:
            canvas: int32 (x1, y1, x2, y2) in pixels of the image.
            size: (height, width) of the image.
            boxes: (n, 4) "xyxy" in pixels of the image, each with an area.
            seed: integer tensor (2,).

        Returns:
            int32 (x1, y1, x2, y2); the canvas if None is drawn or no attempt succeeds.
        """
        required = [m for m in self.min_ious if m is not None]
        seeds = split_seed(seed, 2)
        crops = self._trials(canvas, len(required), seeds[0])  # (options, trials, 4)
        shows_image = intersection(crops, whole_window(size)) > 0.0
        no_objects = tf.equal(tf.shape(boxes)[0], 0)
        best = tf.reduce_max(window_iou(crops, boxes), axis=-1)
        overlaps = best >= tf.constant(required, shape=[len(required), 1])
        has_center = tf.reduce_any(centers_inside(boxes, crops[..., None, :]), axis=-1)
        valid = shows_image & (overlaps & has_center | no_objects)  # (options, trials)

        # The canvas is the last candidate, for the option None and if no attempt succeeds.
        possible = tf.concat([tf.reduce_any(valid, axis=1), [None in self.min_ious]], axis=0)
        draws = tf.random.stateless_uniform([len(required) + 2], seeds[1])
        option = tf.argmax(tf.where(possible, draws[1:], [-1.0] * len(required) + [-0.5]))
        first = tf.argmax(tf.cast(valid, tf.int32), axis=1)
        candidates = tf.concat([tf.gather(crops, first, batch_dims=1), canvas[None]], axis=0)
        return tf.where(draws[0] < self.probability, candidates[option], canvas)

    def _trials(self, canvas: tf.Tensor, options: int, seed) -> tf.Tensor:
        """Draws all crops at once: int32 (options, trials, 4)."""
        draws = tf.random.stateless_uniform([options, self.trials, 4], seed)
        scale = between(*self.scale, draws[..., 0])
        # These limits keep both sides of the crop within the canvas.
        low = tf.maximum(self.aspect_ratio[0], scale**2)
        high = tf.minimum(self.aspect_ratio[1], 1.0 / scale**2)
        stretch = tf.sqrt(between(low, high, draws[..., 1]))
        sides = tf.stack([scale * stretch, scale / stretch], axis=-1)
        extent = tf.cast(canvas[2:] - canvas[:2], tf.float32)
        sides = tf.clip_by_value(tf.round(sides * extent), 1.0, extent)
        corner = tf.floor(draws[..., 2:] * (extent - sides + 1.0))
        corner = tf.minimum(corner, extent - sides) + tf.cast(canvas[:2], tf.float32)
        return tf.cast(tf.concat([corner, corner + sides], axis=-1), tf.int32)


@checked
@dataclass(frozen=True)
class RandomTile:
    """Cuts a tile out of a large image, pixel by pixel, for small objects.

    Half of the tiles contain the center of a random object; the others lie anywhere, so that
    background is learned too. Objects are clipped to the tile, and dropped if less than half of
    their area is in it. A tile larger than the image is filled up on the right and below.

    Args:
        tile_shape: (height, width) of the tiles in pixels.

    Example:
        >>> element = RandomTile((320, 320))(element, seed=(1, 2))
    """

    tile_shape: tuple[int, ...]

    def __post_init__(self):
        check_image_shape(self.tile_shape, name="tiles")

    @checked_call
    def __call__(self, element: dict, seed) -> dict:
        """Returns the element of the tile: float32 image and clipped boxes."""
        element = drop_empty_boxes(element)
        boxes = element["bounding_boxes"]["boxes"]
        window = self.window(size_of(element["images"]), boxes, seed)
        is_visible = intersection(boxes, window) >= 0.5 * intersection(boxes, boxes)
        image, boxes = view(element, window)
        return update_element(element, image, boxes, is_visible)

    def window(self, size: tf.Tensor, boxes: tf.Tensor, seed) -> tf.Tensor:
        """Draws a tile of an image of `size` (height, width) with (n, 4) boxes.

        Returns int32 (x1, y1, x2, y2), inside the image along each side that is long enough.
        """
        draws = tf.random.stateless_uniform([4], seed)
        height, width = check_image_shape(self.tile_shape)
        extent = tf.constant([width, height])
        room = tf.cast(tf.maximum(size[::-1] - extent, 0), tf.float32)
        anywhere = tf.floor(draws[2:] * (room + 1.0))
        count = tf.shape(boxes)[0]
        box = tf.pad(boxes, [[0, 1], [0, 0]])[
            tf.cast(draws[1] * tf.cast(count, tf.float32), tf.int32)
        ]
        center = (box[:2] + box[2:]) / 2.0
        around = tf.round(center - draws[2:] * tf.cast(extent, tf.float32))
        shows_object = (draws[0] < 0.5) & (count > 0)
        corner = tf.where(
            shows_object, tf.clip_by_value(around, 0.0, room), tf.minimum(anywhere, room)
        )
        corner = tf.cast(corner, tf.int32)
        return tf.concat([corner, corner + extent], axis=0)


class _Orientation:
    """Base class of transpositions and flips; a subclass draws the `orientation`."""

    @checked_call
    def __call__(self, element: dict, seed) -> dict:
        """Returns the reoriented element; the image keeps its dtype."""
        element = drop_empty_boxes(element)
        boxes = element["bounding_boxes"]["boxes"]
        return update_element(element, *orient(element["images"], boxes, *self.orientation(seed)))


@checked
@dataclass(frozen=True)
class RandomFlip(_Orientation):
    """Randomly flips the image.

    Args:
        horizontal: probability of a left-right flip.
        vertical: probability of a top-bottom flip, for images without a natural orientation, such
            as microscope or aerial images.

    Example:
        >>> element = RandomFlip(vertical=0.5)(element, seed=(1, 2))
    """

    horizontal: float = 0.5
    vertical: float = 0.0

    def __post_init__(self):
        check_fractions(horizontal=self.horizontal, vertical=self.vertical)

    def orientation(self, seed) -> tuple:
        """Draws (transpose, flip_x, flip_y); a flip never transposes."""
        draws = tf.random.stateless_uniform([2], seed)
        return False, draws[0] < self.horizontal, draws[1] < self.vertical


@checked
@dataclass(frozen=True)
class RandomRotate90(_Orientation):
    """Rotates the image by 90, 180, or 270 degrees, for images without a natural orientation.

    Args:
        probability: probability of a rotation; at 0.75, all four orientations are equally likely.

    Example:
        >>> element = RandomRotate90()(element, seed=(1, 2))  # (h, w, 3) may become (w, h, 3)
    """

    probability: float = 0.75

    def __post_init__(self):
        check_fractions(probability=self.probability)

    def orientation(self, seed) -> tuple:
        """Draws (transpose, flip_x, flip_y); a quarter turn transposes, then flips."""
        draws = tf.random.stateless_uniform([2], seed)
        turns = tf.where(draws[0] < self.probability, 1.0 + tf.floor(3.0 * draws[1]), 0.0)
        is_quarter = (turns == 1.0) | (turns == 3.0)
        return is_quarter, (turns == 1.0) | (turns == 2.0), (turns == 2.0) | (turns == 3.0)


@checked
@dataclass(frozen=True)
class Resize:
    """Stretches the image to the input size of the network, as in evaluation and prediction.

    Bilinear with half-pixel centers, without preserving the aspect ratio and without antialiasing,
    as in the RefineDet paper. Boxes are scaled too; none is clipped or dropped.

    Args:
        image_shape: (height, width) or (height, width, 3) of the result.
        dtype: "float32", or "uint8" (rounded) to save memory.

    Example:
        >>> dataset = dataset.map(Resize((320, 320)))
    """

    image_shape: tuple[int, ...]
    dtype: Literal["float32", "uint8"] = "float32"

    def __post_init__(self):
        check_image_shape(self.image_shape)

    @checked_call
    def __call__(self, element: dict, seed=None, image_size=None) -> dict:
        """Returns the resized element; an int32 `image_size` replaces `image_shape`."""
        height, width = _height_and_width(self.image_shape, image_size)
        size = tf.cast(size_of(element["images"]), tf.float32)
        scale = tf.cast([height, width], tf.float32) / size
        scale = tf.stack([scale[1], scale[0], scale[1], scale[0]])
        image = tf.image.resize(element["images"], tf.stack([height, width]))
        boxes = element["bounding_boxes"]["boxes"] * scale
        return update_element(element, _cast_image(image, self.dtype, height, width), boxes)


@checked
@dataclass(frozen=True)
class TrainingAugmentation:
    """The training augmentation of SSD and RefineDet, from any image to the network's input size.

    Expansion, crop, flip, and resizing are drawn first and applied in one step: only the visible
    part of the image is resized, once, and only its colors are distorted (not the canvas around an
    expanded image). The visible part is aligned with output pixels, which moves its edges by at
    most half an output pixel; the boxes follow exactly.

    Args:
        image_shape: (height, width) or (height, width, 3) of the result.
        photometric: color distortion, or None.
        expand: expansion, or None.
        crop: crop, or None.
        flip: flip, or None.
        rotation: rotation by multiples of 90 degrees, or None.
        min_box_size: boxes with a side shorter than this many output pixels are dropped.
        antialias: average source pixels in images that are expanded and shrunk to less than half,
            where bilinear sampling would skip pixels. Other images are always sampled as by
            `Resize`, as in prediction.
        dtype: "float32", or "uint8" (rounded) to save memory.

    Example:
        >>> element = TrainingAugmentation((320, 320), crop=None)(element, seed=(1, 2))
    """

    image_shape: tuple[int, ...]
    photometric: PhotometricDistortion | None = PhotometricDistortion()
    expand: RandomExpand | None = RandomExpand()
    crop: RandomIoUCrop | None = RandomIoUCrop()
    flip: RandomFlip | None = RandomFlip()
    rotation: RandomRotate90 | None = None
    min_box_size: float = 1.0
    antialias: bool = True
    dtype: Literal["float32", "uint8"] = "float32"

    def __post_init__(self):
        check_image_shape(self.image_shape)
        check_range("min_box_size", (0.0, self.min_box_size), 0.0, float("inf"))

    @checked_call
    def __call__(self, element: dict, seed, image_size=None) -> dict:
        """Returns the augmented element, with an image of `dtype`, 0..255.

        An int32 `image_size` replaces `image_shape`.
        """
        element = drop_empty_boxes(element)
        boxes = element["bounding_boxes"]["boxes"]
        seeds = split_seed(seed, 5)
        size = size_of(element["images"])
        window = self.expand.window(size, seeds[0]) if self.expand else whole_window(size)
        window = self.crop.window(window, size, boxes, seeds[1]) if self.crop else window
        inside = centers_inside(boxes, window)
        transpose, flip_x, flip_y = self._orientation(seeds)

        height, width = _height_and_width(self.image_shape, image_size)
        image, boxes = view(
            element,
            window,
            # A quarter turn comes last, so the view has the size before it.
            tf.where(transpose, [width, height], [height, width]),
            fill_color=self.expand.fill_color if self.expand else MEAN_COLOR,
            antialias=self.antialias,
            distort=lambda image: (
                self.photometric.distort(image, seeds[4]) if self.photometric else image
            ),
        )
        image, boxes = orient(image, boxes, transpose, flip_x, flip_y)
        is_large = tf.reduce_all(boxes[:, 2:] - boxes[:, :2] >= self.min_box_size, axis=-1)
        image = _cast_image(image, self.dtype, height, width)
        return update_element(element, image, boxes, inside & is_large)

    def _orientation(self, seeds: tf.Tensor) -> tuple:
        """Draws (transpose, flip_x, flip_y): the rotation, then the flip."""
        transpose, flip_x, flip_y = False, False, False
        if self.rotation:
            transpose, flip_x, flip_y = self.rotation.orientation(seeds[2])
        if self.flip:
            _, also_x, also_y = self.flip.orientation(seeds[3])
            flip_x, flip_y = flip_x ^ also_x, flip_y ^ also_y
        return transpose, flip_x, flip_y


#: Arguments of `TrainingAugmentation` by name. "none" only resizes; "ssd", the published
#: augmentation, is strong and needs long training.
DETECTION_AUGMENTATIONS: dict[str, dict | None] = {
    "none": None,
    "flip": {"photometric": None, "expand": None, "crop": None},
    "mild": {
        "expand": RandomExpand(max_ratio=1.5, probability=0.3),
        "crop": RandomIoUCrop(min_ious=(None, 0.5, 0.7, 0.9), scale=(0.5, 1.0)),
    },
    "ssd": {},
}


# === Helpers ===


def _clip_colors(image: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(image, 0.0, 255.0)


def _permute_channels(image: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """Applies one of the five other channel orders, as a product with a 0/1 matrix (fast)."""
    orders = tf.constant(list(itertools.permutations(range(3)))[1:])
    order = orders[tf.minimum(tf.cast(draw * 5.0, tf.int32), 4)]
    return tf.tensordot(image, tf.one_hot(order, 3, axis=0), axes=1)


def _height_and_width(image_shape: Sequence[int], image_size: tf.Tensor | None) -> Sequence:
    """Two integers, or two int32 tensors for an `image_size` known only at run time."""
    return check_image_shape(image_shape) if image_size is None else tf.unstack(image_size, 2)


def _cast_image(image: tf.Tensor, dtype: str, height, width) -> tf.Tensor:
    is_static = isinstance(height, int)
    image = tf.ensure_shape(image, [height, width, 3] if is_static else [None, None, 3])
    return tf.cast(tf.round(image), tf.uint8) if dtype == "uint8" else image
