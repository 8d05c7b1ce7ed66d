"""Training augmentation of classifiers, as TensorFlow graph code for `tf.data`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from keras_resnest.checks import check_fractions, check_image_shape, checked
from keras_resnest.data.augmentation.geometry import checked_call
from keras_resnest.data.augmentation.rand_augment import (
    RandAugment,
    as_uint8,
    brighten,
    contrast,
    saturate,
)

# Principal components of the colors of ImageNet (AlexNet, section 4.1).
_COLOR_VALUES = (55.46, 4.794, 1.148)
_COLOR_VECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


@checked
@dataclass(frozen=True)
class ClassificationAugmentation:
    """Randomly crops, flips, and recolors an image.

    Call it with a uint8 image (h, w, 3) and a `seed`, an integer tensor (2,); the same image and
    seed give the same result.

    Args:
        image_shape: (side, side) or (side, side, 3) of the result in pixels.
        area: (low, high) of the crop's area, as a fraction of the image.
        aspect_ratio: (low, high) of the crop's width / height.
        flip: probability of a left-right flip.
        rand_augment: a `RandAugment`, or None.
        color_jitter: largest deviation from 1 of the brightness, contrast, and saturation factors.
        lighting: standard deviation of AlexNet's noise along the principal colors of ImageNet.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> augmentation = ClassificationAugmentation((224, 224), color_jitter=0.4)
        >>> image = augmentation(load_image("photo.jpg"), seed=(1, 2))

    Source: the crop of GoogLeNet (arXiv 1409.4842, section 6), drawn as by torchvision's
    `RandomResizedCrop`; the steps are in the order of torchvision's reference training.
    """

    image_shape: tuple[int, ...]
    area: tuple[float, float] = (0.08, 1.0)
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rand_augment: RandAugment | None = None
    color_jitter: float = 0.0
    lighting: float = 0.0

    def __post_init__(self):
        check_square(self.image_shape)
        check_fractions(flip=self.flip, color_jitter=self.color_jitter)
        low, high = self.area
        narrow, wide = self.aspect_ratio
        if not 0 < low <= high <= 1 or not 0 < narrow <= wide or self.lighting < 0:
            raise ValueError(
                "`area` must be (low, high) within 0 to 1, `aspect_ratio` (low, high) above 0, and "
                f"`lighting` at least 0. Received: {self}"
            )

    @checked_call
    def __call__(self, image: tf.Tensor, seed) -> tf.Tensor:
        """Returns the augmented image: float32 of `image_shape`, 0 to 255."""
        image = tf.convert_to_tensor(image)
        seeds = tf.unstack(tf.random.split(tf.cast(seed, tf.int64), 5))
        top, left, height, width = tf.unstack(self.window(tf.shape(image)[:2], seeds[0]))
        image = image[top : top + height, left : left + width]
        # Antialiased, as in evaluation.
        image = tf.image.resize(image, self.image_shape[:2], antialias=True)
        flips = tf.random.stateless_uniform([], seeds[1]) < self.flip
        image = tf.cond(flips, lambda: image[:, ::-1], lambda: image)
        if self.rand_augment is not None:
            image = tf.cast(self.rand_augment(as_uint8(image), seeds[2]), tf.float32)
        if self.color_jitter:
            factors = 1.0 + self.color_jitter * tf.random.stateless_uniform([3], seeds[3], -1.0)
            image = brighten(image, factors[0])
            image = saturate(contrast(image, factors[1]), factors[2])
        if self.lighting:
            amounts = tf.random.stateless_normal([3], seeds[4], 0, self.lighting)
            image += tf.linalg.matvec(tf.constant(_COLOR_VECTORS), amounts * _COLOR_VALUES)
        return tf.ensure_shape(tf.clip_by_value(image, 0.0, 255.0), (*self.image_shape[:2], 3))

    def window(self, size: tf.Tensor, seed) -> tf.Tensor:
        """Draws the crop of an image of int32 `size` (height, width).

        Returns int32 (top, left, height, width) in pixels; if none of ten draws fits into the
        image, the largest central crop that `aspect_ratio` allows.
        """
        height, width = tf.unstack(tf.cast(size, tf.float32))
        draws = tf.random.stateless_uniform([10, 4], seed)
        narrow, wide = self.aspect_ratio
        areas = height * width * (self.area[0] + (self.area[1] - self.area[0]) * draws[:, 0])
        log_range = math.log(wide) - math.log(narrow)
        ratios = tf.exp(math.log(narrow) + log_range * draws[:, 1])
        sizes = tf.round(tf.sqrt(tf.stack([areas / ratios, areas * ratios], axis=1)))
        sizes = tf.maximum(sizes, 1.0)  # (10, 2), height and width
        largest = tf.stack(
            [tf.minimum(height, tf.round(width / narrow)), tf.minimum(width, height * wide)]
        )
        sizes = tf.concat([sizes, tf.maximum(tf.round(largest), 1.0)[None]], axis=0)
        places = tf.concat([draws[:, 2:], [[0.5, 0.5]]], axis=0)
        chosen = tf.argmax(tf.reduce_all(sizes <= [height, width], axis=1))
        room = [height, width] - sizes[chosen]
        corner = tf.minimum(tf.floor(places[chosen] * (room + 1.0)), room)
        return tf.cast(tf.concat([corner, sizes[chosen]], axis=0), tf.int32)


#: Arguments of `ClassificationAugmentation` by name. "none" crops as in evaluation.
CLASSIFICATION_AUGMENTATIONS: dict[str, dict | None] = {
    "none": None,
    "mild": {"area": (0.5, 1.0)},
    "inception": {"color_jitter": 0.4, "lighting": 0.1},
    "rand_augment": {"color_jitter": 0.4, "lighting": 0.1, "rand_augment": RandAugment()},
}


@checked
def mix_up(images: tf.Tensor, labels: tf.Tensor, alpha: float, seed) -> tuple:
    """Blends each image and label of a batch with those before them; returns both.

    Unlike with `keras.layers.MixUp`, the draws depend only on the seed, not on earlier batches, so
    that resumed training repeats them.

    Args:
        images: (B, h, w, 3), float.
        labels: (B, classes), float, one-hot.
        alpha: parameter of the beta distribution; a weight is drawn for each image.
        seed: integer tensor (2,).

    Source: https://arxiv.org/abs/1710.09412
    """
    count = tf.shape(images)[0]
    # float64, because both gamma variables may be tiny for a small alpha.
    alpha = tf.cast(alpha, tf.float64)
    gammas = tf.random.stateless_gamma([count, 2], seed, alpha, dtype="float64")
    weights = gammas[:, 0] / tf.maximum(tf.reduce_sum(gammas, axis=1), 1e-300)

    def mixed(values):
        shape = [-1] + [1] * (values.shape.rank - 1)
        own = tf.reshape(tf.cast(weights, values.dtype), shape)
        return own * values + (1 - own) * tf.roll(values, 1, axis=0)

    return mixed(images), mixed(labels)


def check_square(image_shape: Sequence[int]) -> int:
    """Returns the side of a square `image_shape`; raises ValueError if it is not square."""
    height, width = check_image_shape(image_shape)
    if height != width:
        raise ValueError(f"`image_shape` must be square. Received: image_shape={image_shape!r}")
    return height
