"""RandAugment and color changes for classifiers, as TensorFlow graph code for `tf.data`.

The operations match Pillow's, as used in ResNeSt's code and torchvision; the tests compare pixels.
`keras.layers.RandAugment` differs: at the same magnitude it rotates by up to 144 degrees, in one
direction only, and only brightens. KerasCV's lacks rotation, posterization, and sharpness.

Images are (h, w, 3), RGB, 0 to 255. The same image and seed give the same result.
"""

import functools
import math
from dataclasses import dataclass

import tensorflow as tf

from keras_resnest.checks import checked
from keras_resnest.data.augmentation.geometry import checked_call

_GRAY = (0.299, 0.587, 0.114)  # Pillow's weights of red, green, and blue


@checked
@dataclass(frozen=True)
class RandAugment:
    """Applies randomly drawn operations in sequence, all of the same magnitude.

    The operations: identity, shear and translation along x and y, rotation, brightness, color,
    contrast, sharpness, posterize, solarize, auto contrast, equalize. Directions are random.
    Regions outside the image become black.

    Args:
        num_ops: number of operations per image, N in the paper.
        magnitude: strength from 0 to 30, M in the paper. At 30: shear 0.3, translation 0.45 of the
            side, rotation 30 degrees, color factors 0.1 or 1.9, 4 bits, threshold 0.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> image = RandAugment(num_ops=2, magnitude=12)(image, seed=(1, 2))

    Source: https://arxiv.org/abs/1909.13719; N = 2 and M = 12 as for ResNeSt.
    """

    num_ops: int = 2
    magnitude: float = 12.0

    def __post_init__(self):
        if self.num_ops < 0 or not 0 <= self.magnitude <= 30:
            raise ValueError(
                f"`num_ops` must be at least 0, `magnitude` within 0 to 30. Received: {self}"
            )

    @checked_call
    def __call__(self, image: tf.Tensor, seed) -> tf.Tensor:
        """Returns the augmented image: uint8, of the same size."""
        image = as_uint8(tf.convert_to_tensor(image))
        seed = tf.cast(seed, tf.int64)
        drawn = tf.random.stateless_uniform([self.num_ops], seed, 0, len(OPERATIONS), tf.int32)
        signs = tf.random.stateless_uniform([self.num_ops], seed + 1, 0, 2, tf.int32) * 2 - 1
        for i in range(self.num_ops):
            arguments = image, self.magnitude / 30.0, tf.cast(signs[i], tf.float32)
            branches = [functools.partial(op, *arguments) for op in OPERATIONS.values()]
            image = tf.ensure_shape(tf.switch_case(drawn[i], branches), image.shape)
        return image


def as_uint8(image: tf.Tensor) -> tf.Tensor:
    """Rounds an image of 0..255 to uint8."""
    if image.dtype == tf.uint8:
        return image
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)


# === Colors: a factor of 1 keeps the image; results are float32, 0..255 ===


def brighten(image: tf.Tensor, factor) -> tf.Tensor:
    """Blends the image with black (factor 0)."""
    return _blend(tf.zeros_like(image, tf.float32), image, factor)


def saturate(image: tf.Tensor, factor) -> tf.Tensor:
    """Blends the image with its gray values (factor 0)."""
    return _blend(_gray(image), image, factor)


def contrast(image: tf.Tensor, factor) -> tf.Tensor:
    """Blends the image with its mean gray value (factor 0)."""
    mean = tf.round(tf.reduce_mean(_gray(image)))
    return _blend(tf.fill(tf.shape(image), mean), image, factor)


def sharpen(image: tf.Tensor, factor) -> tf.Tensor:
    """Blends the image with a blurred copy (factor 0)."""
    image = tf.cast(image, tf.float32)
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13.0
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    blurred = tf.nn.depthwise_conv2d(image[None], kernel, [1, 1, 1, 1], "VALID")[0]
    # Pillow leaves the outermost pixels unchanged.
    inside = tf.pad(tf.ones_like(blurred), [[1, 1], [1, 1], [0, 0]])
    blurred = tf.where(inside > 0, tf.pad(tf.round(blurred), [[1, 1], [1, 1], [0, 0]]), image)
    return _blend(blurred, image, factor)


def _gray(image):
    gray = tf.round(tf.tensordot(tf.cast(image, tf.float32), tf.constant(_GRAY), 1))
    return tf.repeat(gray[..., None], 3, axis=-1)


def _blend(start, image, factor):
    start, image = tf.cast(start, tf.float32), tf.cast(image, tf.float32)
    return tf.clip_by_value(start + (image - start) * factor, 0.0, 255.0)


# === Values ===


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    """Keeps the highest bits of each value (uint8)."""
    mask = tf.constant(0xFF & ~(2 ** (8 - bits) - 1), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


def solarize(image: tf.Tensor, threshold: float) -> tf.Tensor:
    """Inverts the values (uint8) at or above a threshold."""
    return tf.where(tf.cast(image, tf.float32) < threshold, image, 255 - image)


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel (uint8) to the range 0 to 255."""
    values = tf.cast(image, tf.float32)
    low = tf.reduce_min(values, axis=(0, 1))
    high = tf.reduce_max(values, axis=(0, 1))
    stretched = tf.floor((values - low) * (255.0 / tf.maximum(high - low, 1.0)) + 1e-3)
    return tf.where(high > low, tf.cast(stretched, tf.uint8), image)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Equalizes the histogram of each channel (uint8)."""

    def channel(values):
        values = tf.cast(values, tf.int32)
        counts = tf.math.bincount(tf.reshape(values, [-1]), minlength=256, maxlength=256)
        highest = tf.reduce_max(values)
        step = (tf.reduce_sum(counts) - counts[highest]) // 255
        table = (tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1)
        table = tf.where(step > 0, tf.minimum(table, 255), tf.range(256))
        return tf.cast(tf.gather(table, values), tf.uint8)

    return tf.stack([channel(image[..., i]) for i in range(3)], axis=-1)


# === Geometry ===


def affine(image: tf.Tensor, a, b, c, d, e, f) -> tf.Tensor:
    """Samples the pixel at (x, y) from (a x + b y + c, d x + e y + f); bilinear, black outside.

    Coordinates are in pixels from the corner of the image, as for `PIL.Image.transform` with
    `AFFINE`. Takes and returns uint8 images of the same size.
    """
    # TensorFlow's coordinates start at the center of the first pixel.
    c, f = c + 0.5 * (a + b) - 0.5, f + 0.5 * (d + e) - 0.5
    numbers = [a, b, c, d, e, f, 0.0, 0.0]
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(image[None], tf.float32),
        transforms=tf.stack([tf.cast(number, tf.float32) for number in numbers])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return as_uint8(moved[0])


def rotate(image: tf.Tensor, degrees) -> tf.Tensor:
    """Rotates an image about its center, counterclockwise as `PIL.Image.rotate`."""
    angle = -degrees * (math.pi / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    x, y = width / 2.0, height / 2.0
    return affine(image, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _translate(image, strength, sign, axis: int):
    offset = sign * strength * 0.45 * tf.cast(tf.shape(image)[axis], tf.float32)
    return affine(image, 1.0, 0.0, offset * axis, 0.0, 1.0, offset * (1 - axis))


def _enhance(change):
    # At strength 1 the factor is 0.1 or 1.9.
    return lambda image, strength, sign: as_uint8(change(image, 1.0 + 0.9 * strength * sign))


# Each takes a uint8 image, a strength of 0 to 1, and a sign, and returns a uint8 image.
OPERATIONS = {
    "identity": lambda image, strength, sign: image,
    "shear_x": lambda image, strength, sign: affine(image, 1, sign * strength * 0.3, 0, 0, 1, 0),
    "shear_y": lambda image, strength, sign: affine(image, 1, 0, 0, sign * strength * 0.3, 1, 0),
    "translate_x": functools.partial(_translate, axis=1),
    "translate_y": functools.partial(_translate, axis=0),
    "rotate": lambda image, strength, sign: rotate(image, sign * strength * 30.0),
    "brightness": _enhance(brighten),
    "color": _enhance(saturate),
    "contrast": _enhance(contrast),
    "sharpness": _enhance(sharpen),
    "posterize": lambda image, strength, sign: posterize(image, 8 - round(4 * strength)),
    "solarize": lambda image, strength, sign: solarize(image, 256.0 * (1.0 - strength)),
    "auto_contrast": lambda image, strength, sign: auto_contrast(image),
    "equalize": lambda image, strength, sign: equalize(image),
}
