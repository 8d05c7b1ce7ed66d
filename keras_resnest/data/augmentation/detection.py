"""Training augmentation of single-shot detectors, as TensorFlow graph code for `tf.data`.

The recipe is SSD's (arXiv 1512.02325, section 2.2, and the expansion of section 3.6), which
RefineDet took over: color distortion, zooming out, a crop that keeps a given overlap with an
object, mirroring, and stretching to the size of the network.

Every class here is a small immutable recipe that is called on one unbatched data-set element

    {"images": (h, w, 3), "bounding_boxes": {"boxes": (n, 4), "labels": (n,), "difficult": (n,)}}

and a `seed`, an integer tensor of shape (2,): the same element and seed always give the same
result. Images are RGB, 0 to 255; boxes are "xyxy" in pixels of the image they come with. Other
keys of the element pass through untouched, and every entry of `bounding_boxes` (of length n) is
filtered together with the boxes.

Boxes may disappear, by these rules only: padding rows (label -1) and boxes without area always;
after a crop, boxes whose center is outside; at the end of `TrainingAugmentation`, boxes that are
smaller than `min_box_size`. `Resize`, the evaluation's counterpart, keeps every row.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from keras_resnest.checks import check_image_shape
from keras_resnest.data.augmentation.geometry import (
    MEAN_COLOR,
    apply_if,
    between,
    centers_inside,
    intersection,
    orient,
    size_of,
    split_seed,
    updated,
    view,
    whole_window,
    window_iou,
)


def _check_range(name: str, values: tuple, low: float, high: float):
    pair = isinstance(values, Sequence) and len(values) == 2
    if not pair or not low <= values[0] <= values[1] <= high:
        received = values[1] if pair and values[0] == low else values
        raise ValueError(f"`{name}` must lie within {low} to {high}. Received: {name}={received!r}")


def _check_probabilities(recipe, *names: str):
    for name in names:
        if not 0.0 <= getattr(recipe, name) <= 1.0:
            raise ValueError(
                f"`{name}` is a chance from 0 to 1. Received: {name}={getattr(recipe, name)!r}"
            )


def _check_dtype(dtype: str):
    if dtype not in ("float32", "uint8"):
        raise ValueError(f'`dtype` must be "float32" or "uint8". Received: dtype={dtype!r}')


def drop_empty_boxes(element: dict) -> dict:
    """Clips boxes to the image and drops those without area, and padding rows (label -1).

    Args:
        element: data-set element as described at the top of this module.

    Returns:
        The element with boxes of positive area inside the image; the image is untouched.

    Example:
        ```python
        dataset = dataset.map(drop_empty_boxes)
        ```
    """
    annotations = element["bounding_boxes"]
    height, width = tf.unstack(size_of(element["images"]))
    limits = tf.cast(tf.stack([width, height, width, height]), tf.float32)
    boxes = tf.clip_by_value(annotations["boxes"], 0.0, limits)
    has_area = tf.reduce_all(boxes[:, 2:] > boxes[:, :2], axis=-1)
    return updated(element, element["images"], boxes, has_area & (annotations["labels"] >= 0))


@dataclass(frozen=True)
class PhotometricDistortion:
    """Random brightness, contrast, saturation, hue and order of the color channels.

    Each change happens with its own chance. Contrast comes right after brightness in half of the
    images and last in the other half. Values are clipped to 0..255 after every step. Boxes
    stay as they are.

    Args:
        brightness: largest amount added to or taken from all values (of 0..255).
        contrast: (low, high) of the factor on all values.
        saturation: (low, high) of the factor on the saturation of HSV.
        hue: largest turn of the hue of HSV, in degrees. (SSD's Caffe code adds up to 18 to hues
            counted in OpenCV's 0..180, so 36 degrees; its ports use 18 degrees.)
        probability: chance of each of these four changes.
        channel_probability: chance of a random order of the three channels. 0 in the code of SSD
            and RefineDet, 0.5 in some ports; leave it 0 where color tells the classes apart.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        ```python
        element = PhotometricDistortion(hue=0)(element, seed=(1, 2))
        ```
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 18.0
    probability: float = 0.5
    channel_probability: float = 0.0

    def __post_init__(self):
        _check_range("brightness", (0.0, self.brightness), 0.0, 255.0)
        _check_range("contrast", self.contrast, 0.0, float("inf"))
        _check_range("saturation", self.saturation, 0.0, float("inf"))
        _check_range("hue", (0.0, self.hue), 0.0, 180.0)
        _check_probabilities(self, "probability", "channel_probability")

    def __call__(self, element: dict, seed) -> dict:
        """Returns the element with a distorted float32 image, 0..255."""
        return dict(element, images=self.distort(element["images"], seed))

    def distort(self, image: tf.Tensor, seed) -> tf.Tensor:
        """Distorts the colors of one image (h, w, 3), 0..255; returns float32, 0..255."""
        draws = tf.random.stateless_uniform([11], seed)
        happens = draws[:4] < self.probability
        contrast_is_first = draws[4] < 0.5
        amount = draws[5:]

        def brightness(image):
            return _clip_colors(image + between(-self.brightness, self.brightness, amount[0]))

        def contrast(image):
            return _clip_colors(image * between(*self.contrast, amount[1]))

        # Saturation and hue of HSV do not depend on the scale of the values: no division by 255.
        def saturation(image):
            return _clip_colors(
                tf.image.adjust_saturation(image, between(*self.saturation, amount[2]))
            )

        def hue(image):
            turn = between(-self.hue, self.hue, amount[3]) / 360.0
            return _clip_colors(tf.image.adjust_hue(image, turn))

        image = tf.cast(image, tf.float32)
        image = apply_if(happens[0], brightness, image)
        image = apply_if(happens[1] & contrast_is_first, contrast, image)
        image = apply_if(happens[2], saturation, image)
        image = apply_if(happens[3], hue, image)
        image = apply_if(happens[1] & ~contrast_is_first, contrast, image)
        if self.channel_probability:
            image = apply_if(
                amount[4] < self.channel_probability,
                lambda image: _permute_channels(image, amount[5]),
                image,
            )
        return image


@dataclass(frozen=True)
class RandomExpand:
    """Random zooming out: the image at a random place on a larger canvas of one color.

    SSD's way to small objects ("expansion", arXiv 1512.02325, section 3.6).

    Args:
        max_ratio: largest ratio of the sides of canvas and image; drawn from 1 to this.
        probability: chance that it happens.
        fill_color: (red, green, blue) of the canvas, 0..255.

    Raises:
        ValueError: if `max_ratio` is below 1 or another argument is outside its range.

    Example:
        ```python
        element = RandomExpand(max_ratio=2.0)(element, seed=(1, 2))
        ```
    """

    max_ratio: float = 4.0
    probability: float = 0.5
    fill_color: tuple[float, float, float] = MEAN_COLOR

    def __post_init__(self):
        _check_range("max_ratio", (1.0, self.max_ratio), 1.0, float("inf"))
        _check_probabilities(self, "probability")
        if len(self.fill_color) != 3 or not all(0 <= value <= 255 for value in self.fill_color):
            raise ValueError(
                "`fill_color` must be three numbers (red, green, blue) from 0 to 255. "
                f"Received: fill_color={self.fill_color!r}"
            )

    def __call__(self, element: dict, seed) -> dict:
        """Returns the element on its canvas: float32 image, boxes moved along."""
        element = drop_empty_boxes(element)
        window = self.window(size_of(element["images"]), seed)
        image, boxes = view(element, window, fill_color=self.fill_color)
        return updated(element, image, boxes)

    def window(self, size: tf.Tensor, seed) -> tf.Tensor:
        """Draws the canvas around an image.

        Args:
            size: (height, width) of the image, int32.
            seed: integer tensor (2,).

        Returns:
            The canvas in pixels of the image: int32 (x1, y1, x2, y2), with x1, y1 <= 0.
        """
        draws = tf.random.stateless_uniform([4], seed)
        ratio = tf.where(draws[0] < self.probability, between(1.0, self.max_ratio, draws[1]), 1.0)
        size = tf.cast(size[::-1], tf.float32)  # (width, height)
        canvas = tf.round(size * ratio)
        corner = -tf.floor(draws[2:] * (canvas - size + 1.0))
        return tf.cast(tf.concat([corner, corner + canvas], axis=0), tf.int32)


@dataclass(frozen=True)
class RandomIoUCrop:
    """Random crop that overlaps some object by a required IoU (SSD, section 2.2).

    As in SSD's own code, every option of `min_ious` is tried `trials` times, and one of the
    options that succeeded is drawn. A trial succeeds when the crop reaches the required IoU with
    at least one object and holds the center of at least one object; in an image without objects
    every crop succeeds. Objects stay when their center is in the crop, and are clipped to it.

    Args:
        min_ious: the options. None keeps the whole image; 0.0 asks for no overlap.
        scale: (low, high) of the square root of the crop's share of the area.
        aspect_ratio: (low, high) of width / height, where the image itself counts as 1.
        trials: number of random crops for each option.
        probability: chance that it happens.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        ```python
        element = RandomIoUCrop(min_ious=(0.5,))(element, seed=(1, 2))
        ```
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
        _check_range("scale", self.scale, 1e-3, 1.0)
        _check_range("aspect_ratio", self.aspect_ratio, 1e-3, float("inf"))
        if not self.aspect_ratio[0] <= 1.0 <= self.aspect_ratio[1]:
            raise ValueError(
                "`aspect_ratio` must be (low, high) with low <= 1 <= high. "
                f"Received: aspect_ratio={self.aspect_ratio!r}"
            )
        if self.trials < 1:
            raise ValueError(f"`trials` must be at least 1. Received: trials={self.trials!r}")
        _check_probabilities(self, "probability")

    def __call__(self, element: dict, seed) -> dict:
        """Returns the cropped element (float32 image); see the class for which boxes stay."""
        element = drop_empty_boxes(element)
        size, boxes = size_of(element["images"]), element["bounding_boxes"]["boxes"]
        window = self.window(whole_window(size), size, boxes, seed)
        inside = centers_inside(boxes, window)
        image, boxes = view(element, window)
        return updated(element, image, boxes, inside)

    def window(self, canvas: tf.Tensor, size: tf.Tensor, boxes: tf.Tensor, seed) -> tf.Tensor:
        """Draws a crop of a canvas.

        Args:
            canvas: int32 (x1, y1, x2, y2) in pixels of the image, may reach beyond it.
            size: (height, width) of the image; the crop shows at least one pixel of it.
            boxes: (n, 4) "xyxy" pixels of the image, each with an area.
            seed: integer tensor (2,).

        Returns:
            The crop, int32 (x1, y1, x2, y2) within the canvas; the canvas itself where the
            option None was drawn or no trial succeeded.
        """
        required = [m for m in self.min_ious if m is not None]
        seeds = split_seed(seed, 2)
        crops = self._trials(canvas, len(required), seeds[0])
        shows = intersection(crops, whole_window(size)) > 0.0
        # An image without objects asks for nothing.
        no_objects = tf.equal(tf.shape(boxes)[0], 0)
        best = tf.reduce_max(window_iou(crops, boxes), axis=-1)
        overlaps = (best >= tf.constant(required, shape=[len(required), 1])) | no_objects
        holds = tf.reduce_any(centers_inside(boxes, crops[..., None, :]), axis=-1) | no_objects
        valid = shows & overlaps & holds  # (options, trials)

        # The whole canvas is the last row: chosen by the option None, and when nothing succeeds.
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
        # The limits keep both sides of the crop within the canvas.
        low = tf.maximum(self.aspect_ratio[0], scale**2)
        high = tf.minimum(self.aspect_ratio[1], 1.0 / scale**2)
        stretch = tf.sqrt(between(low, high, draws[..., 1]))
        sides = tf.stack([scale * stretch, scale / stretch], axis=-1)
        extent = tf.cast(canvas[2:] - canvas[:2], tf.float32)
        sides = tf.clip_by_value(tf.round(sides * extent), 1.0, extent)
        corner = tf.floor(draws[..., 2:] * (extent - sides + 1.0))
        corner = tf.minimum(corner, extent - sides) + tf.cast(canvas[:2], tf.float32)
        return tf.cast(tf.concat([corner, corner + sides], axis=-1), tf.int32)


@dataclass(frozen=True)
class RandomFlip:
    """Random mirroring.

    Args:
        horizontal: chance of swapping left and right.
        vertical: chance of swapping top and bottom; for images without an up, such as those
            of a microscope or from the air.

    Raises:
        ValueError: if a chance is not within 0 to 1.

    Example:
        ```python
        element = RandomFlip(vertical=0.5)(element, seed=(1, 2))
        ```
    """

    horizontal: float = 0.5
    vertical: float = 0.0

    def __post_init__(self):
        _check_probabilities(self, "horizontal", "vertical")

    def __call__(self, element: dict, seed) -> dict:
        """Returns the element, mirrored or not; the image keeps its size and data type."""
        element = drop_empty_boxes(element)
        boxes = element["bounding_boxes"]["boxes"]
        return updated(element, *orient(element["images"], boxes, *self.orientation(seed)))

    def orientation(self, seed) -> tuple:
        """Draws (transpose, flip_x, flip_y), booleans; this class never transposes."""
        draws = tf.random.stateless_uniform([2], seed)
        return False, draws[0] < self.horizontal, draws[1] < self.vertical


@dataclass(frozen=True)
class RandomRotate90:
    """Random rotation by 90, 180 or 270 degrees, for images without an up.

    Args:
        probability: chance of a rotation; the three angles are equally likely. With 0.75, all
            four directions are.

    Raises:
        ValueError: if `probability` is not within 0 to 1.

    Example:
        ```python
        element = RandomRotate90()(element, seed=(1, 2))   # a (h, w, 3) image may become (w, h, 3)
        ```
    """

    probability: float = 0.75

    def __post_init__(self):
        _check_probabilities(self, "probability")

    def __call__(self, element: dict, seed) -> dict:
        """Returns the element, rotated or not; the image keeps its data type."""
        element = drop_empty_boxes(element)
        boxes = element["bounding_boxes"]["boxes"]
        return updated(element, *orient(element["images"], boxes, *self.orientation(seed)))

    def orientation(self, seed) -> tuple:
        """Draws (transpose, flip_x, flip_y), booleans: a quarter turn transposes, then flips."""
        draws = tf.random.stateless_uniform([2], seed)
        turns = tf.where(draws[0] < self.probability, 1.0 + tf.floor(3.0 * draws[1]), 0.0)
        is_quarter = (turns == 1.0) | (turns == 3.0)
        return is_quarter, (turns == 1.0) | (turns == 2.0), (turns == 2.0) | (turns == 3.0)


@dataclass(frozen=True)
class Resize:
    """Stretches the image to the size of the network: what evaluation and prediction do.

    Bilinear with half-pixel centers, without keeping the aspect ratio and without antialiasing,
    as in the RefineDet paper. Boxes are stretched along; none is clipped or dropped.

    Args:
        image_shape: (height, width) or (height, width, 3) of the result.
        dtype: "float32", or "uint8" (rounded) to save memory.

    Raises:
        ValueError: if an argument is not one of these.

    Example:
        ```python
        dataset = dataset.map(Resize((320, 320)))
        ```
    """

    image_shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self):
        check_image_shape(self.image_shape)
        _check_dtype(self.dtype)

    def __call__(self, element: dict, seed=None, image_size=None) -> dict:
        """Returns the stretched element; `seed` is taken, and ignored, to fit any pipeline.

        `image_size`, an int32 tensor (height, width), takes the place of `image_shape`.
        """
        height, width = _height_and_width(self.image_shape, image_size)
        scale = tf.cast([height, width], tf.float32) / tf.cast(
            size_of(element["images"]), tf.float32
        )
        scale = tf.stack([scale[1], scale[0], scale[1], scale[0]])
        image = tf.image.resize(element["images"], tf.stack([height, width]))
        boxes = element["bounding_boxes"]["boxes"] * scale
        return updated(element, _cast_image(image, self.dtype, height, width), boxes)


@dataclass(frozen=True)
class TrainingAugmentation:
    """SSD's and RefineDet's training augmentation, from any image to the network's size.

    Expansion, crop, mirroring and stretching are drawn first and carried out in one go: only
    the part of the image that is seen is resized, only once, and only its colors are
    distorted (so the canvas around a zoomed-out image keeps its plain color). The seen part
    is placed on whole output pixels, which moves its edges by at most half an output pixel; the
    boxes follow exactly.

    Args:
        image_shape: (height, width) or (height, width, 3) of the result.
        photometric: color distortion, or None for none.
        expand: zooming out, or None.
        crop: crop, or None.
        flip: mirroring, or None.
        rotation: rotation by quarter turns, or None (default).
        min_box_size: boxes with a side shorter than this many output pixels are dropped, with
            their labels. 0 keeps all.
        antialias: average the source pixels in images that are zoomed out and shrunk to less
            than half, where bilinear sampling would skip pixels. Images that are not zoomed
            out are always sampled as `Resize` does, so that the network sees in training what
            it sees in use.
        dtype: "float32", or "uint8" (rounded) to save memory.

    Returns:
        When called with an element and a seed: the element with an image (height, width, 3) of
        `dtype`, 0..255, and (m, 4) boxes "xyxy" in its pixels, m <= n.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        ```python
        augmentation = TrainingAugmentation((320, 320), flip=RandomFlip(vertical=0.5))
        seeds = tf.data.Dataset.random(1, rerandomize_each_iteration=True).batch(2)
        dataset = tf.data.Dataset.zip(dataset, seeds).map(augmentation)
        ```
        `training_batches` does this, with shuffling and batching around it.
    """

    image_shape: tuple[int, ...]
    photometric: PhotometricDistortion | None = PhotometricDistortion()
    expand: RandomExpand | None = RandomExpand()
    crop: RandomIoUCrop | None = RandomIoUCrop()
    flip: RandomFlip | None = RandomFlip()
    rotation: RandomRotate90 | None = None
    min_box_size: float = 1.0
    antialias: bool = True
    dtype: str = "float32"

    def __post_init__(self):
        check_image_shape(self.image_shape)
        _check_dtype(self.dtype)
        _check_range("min_box_size", (0.0, self.min_box_size), 0.0, float("inf"))

    def __call__(self, element: dict, seed, image_size=None) -> dict:
        """Returns the augmented element for an integer `seed` of shape (2,).

        `image_size`, an int32 tensor (height, width), takes the place of `image_shape`.
        """
        element = drop_empty_boxes(element)
        boxes = element["bounding_boxes"]["boxes"]
        seeds = split_seed(seed, 5)
        window = self._window(size_of(element["images"]), boxes, seeds)
        inside = centers_inside(boxes, window)
        transpose, flip_x, flip_y = self._orientation(seeds)

        height, width = _height_and_width(self.image_shape, image_size)
        # A quarter turn comes last, so the window is shown at the size before it.
        size = tf.where(transpose, [width, height], [height, width])
        image, boxes = view(
            element,
            window,
            size,
            fill_color=self.expand.fill_color if self.expand else MEAN_COLOR,
            antialias=self.antialias,
            distort=lambda image: (
                self.photometric.distort(image, seeds[4]) if self.photometric else image
            ),
        )
        image, boxes = orient(image, boxes, transpose, flip_x, flip_y)
        is_large = tf.reduce_all(boxes[:, 2:] - boxes[:, :2] >= self.min_box_size, axis=-1)
        image = _cast_image(image, self.dtype, height, width)
        return updated(element, image, boxes, inside & is_large)

    def _window(self, size: tf.Tensor, boxes: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        """Draws the part of the plane, in pixels of the image, that the result shows."""
        window = whole_window(size)
        if self.expand:
            window = self.expand.window(size, seeds[0])
        if self.crop:
            window = self.crop.window(window, size, boxes, seeds[1])
        return window

    def _orientation(self, seeds: tf.Tensor) -> tuple:
        """Draws (transpose, flip_x, flip_y): the rotation, then the mirroring."""
        transpose, flip_x, flip_y = False, False, False
        if self.rotation:
            transpose, flip_x, flip_y = self.rotation.orientation(seeds[2])
        if self.flip:
            _, mirror_x, mirror_y = self.flip.orientation(seeds[3])
            flip_x, flip_y = flip_x ^ mirror_x, flip_y ^ mirror_y
        return transpose, flip_x, flip_y


# Small helpers.


def _clip_colors(image: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(image, 0.0, 255.0)


def _permute_channels(image: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """One of the five other orders of the channels, as a product with a 0/1 matrix (fast)."""
    orders = tf.constant(list(itertools.permutations(range(3)))[1:])
    order = orders[tf.minimum(tf.cast(draw * 5.0, tf.int32), 4)]
    return tf.tensordot(image, tf.one_hot(order, 3, axis=0), axes=1)


def _height_and_width(image_shape: Sequence[int], image_size: tf.Tensor | None) -> Sequence:
    """Two integers, or two int32 tensors where the size is known only when the graph runs."""
    return check_image_shape(image_shape) if image_size is None else tf.unstack(image_size, 2)


def _cast_image(image: tf.Tensor, dtype: str, height, width) -> tf.Tensor:
    known = isinstance(height, int)
    image = tf.ensure_shape(image, [height, width, 3] if known else [None, None, 3])
    return tf.cast(tf.round(image), tf.uint8) if dtype == "uint8" else image
