"""RandAugment and the color changes of classifiers, as TensorFlow graph code for `tf.data`.

`keras.layers.RandAugment` is another thing: at the same strength it turns images by up to 144
degrees, to one side only, and only brightens. KerasCV's has no rotation, posterization and
sharpness, and its draws depend on the order of the threads. The operations here are Pillow's, as
in ResNeSt's code and torchvision's: the tests compare their pixels.

Images are (h, w, 3), RGB, 0 to 255. The same image and seed always give the same result.
"""

from dataclasses import dataclass

import tensorflow as tf

# Pillow's weights of red, green and blue in a gray value.
_GRAY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class RandAugment:
    """A few operations after each other, drawn at random, all of one strength.

    The operations: nothing, shear and translation along x and y, rotation, brightness, color,
    contrast, sharpness, posterization, solarization, automatic contrast, equalization. Those that
    have a direction get a random one. What enters from outside is black.

    Args:
        num_ops: how many operations an image goes through, N of the paper.
        magnitude: strength from 0 to 30, M of the paper. At 30: shear 0.3, translation 0.45 of
            the side, rotation 30 degrees, factors of colors 0.1 or 1.9, 4 bits, threshold 0.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> image = RandAugment(num_ops=2, magnitude=12)(image, seed=(1, 2))

    Source: https://arxiv.org/abs/1909.13719; N = 2 and M = 12 are ResNeSt's.
    """

    num_ops: int = 2
    magnitude: float = 12.0

    def __post_init__(self):
        if self.num_ops < 0 or not 0 <= self.magnitude <= 30:
            raise ValueError(
                "`num_ops` must not be negative, `magnitude` must lie within 0 to 30. "
                f"Received: num_ops={self.num_ops}, magnitude={self.magnitude}"
            )

    def __call__(self, image: tf.Tensor, seed) -> tf.Tensor:
        """Returns the augmented image: uint8, of the same size."""
        image = as_uint8(image)
        seed = tf.cast(seed, tf.int64)
        names = list(OPERATIONS)
        drawn = tf.random.stateless_uniform([self.num_ops], seed, 0, len(names), tf.int32)
        signs = tf.random.stateless_uniform([self.num_ops], seed + 1, 0, 2, tf.int32) * 2 - 1
        for i in range(self.num_ops):
            image = self._apply(image, drawn[i], tf.cast(signs[i], tf.float32))
        return image

    def _apply(self, image, drawn, sign):
        share = self.magnitude / 30.0
        branches = [lambda op=op: op(image, share, sign) for op in OPERATIONS.values()]
        result = tf.switch_case(drawn, branches)
        return tf.ensure_shape(result, image.shape)


def as_uint8(image: tf.Tensor) -> tf.Tensor:
    """Rounds an image of 0..255 to uint8."""
    if image.dtype == tf.uint8:
        return image
    return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)


# --- Colors ---------------------------------------------------------------------------------


def brighten(image: tf.Tensor, factor) -> tf.Tensor:
    """Moves an image from black (factor 0) over itself (1) to brighter; float32, 0..255."""
    return _blend(tf.zeros_like(image, tf.float32), image, factor)


def saturate(image: tf.Tensor, factor) -> tf.Tensor:
    """Moves an image from gray (factor 0) over itself (1) to stronger colors; float32."""
    return _blend(_gray(image), image, factor)


def contrast(image: tf.Tensor, factor) -> tf.Tensor:
    """Moves an image from its mean gray (factor 0) over itself (1) to more contrast; float32."""
    mean = tf.round(tf.reduce_mean(_gray(image)))
    return _blend(tf.fill(tf.shape(image), mean), image, factor)


def sharpen(image: tf.Tensor, factor) -> tf.Tensor:
    """Moves an image from blurred (factor 0) over itself (1) to sharper; float32, 0..255."""
    image = tf.cast(image, tf.float32)
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13.0
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    blurred = tf.nn.depthwise_conv2d(image[None], kernel, [1, 1, 1, 1], "VALID")[0]
    # Pillow leaves the outermost pixels as they are.
    inside = tf.pad(tf.ones_like(blurred), [[1, 1], [1, 1], [0, 0]])
    blurred = tf.where(inside > 0, tf.pad(tf.round(blurred), [[1, 1], [1, 1], [0, 0]]), image)
    return _blend(blurred, image, factor)


def _gray(image):
    gray = tf.round(tf.tensordot(tf.cast(image, tf.float32), tf.constant(_GRAY), 1))
    return tf.repeat(gray[..., None], 3, axis=-1)


def _blend(start, image, factor):
    start, image = tf.cast(start, tf.float32), tf.cast(image, tf.float32)
    return tf.clip_by_value(start + (image - start) * factor, 0.0, 255.0)


def _enhance(change):
    # At strength 1 the factor is 0.1 or 1.9.
    return lambda image, share, sign: as_uint8(change(image, 1.0 + 0.9 * share * sign))


# --- Values ----------------------------------------------------------------------------------


def posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    """Keeps the highest bits of each value (uint8)."""
    mask = tf.constant(0xFF & ~(2 ** (8 - bits) - 1), tf.uint8)
    return tf.bitwise.bitwise_and(image, mask)


def solarize(image: tf.Tensor, threshold: float) -> tf.Tensor:
    """Inverts the values (uint8) that are not below a threshold."""
    return tf.where(tf.cast(image, tf.float32) < threshold, image, 255 - image)


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretches each channel (uint8) to the values 0 to 255."""
    values = tf.cast(image, tf.float32)
    low = tf.reduce_min(values, axis=(0, 1))
    high = tf.reduce_max(values, axis=(0, 1))
    stretched = tf.floor((values - low) * (255.0 / tf.maximum(high - low, 1.0)) + 1e-3)
    return tf.where(high > low, tf.cast(stretched, tf.uint8), image)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Makes all values of each channel (uint8) equally frequent, as far as that goes."""

    def channel(values):
        values = tf.cast(values, tf.int32)
        counts = tf.math.bincount(tf.reshape(values, [-1]), minlength=256, maxlength=256)
        highest = tf.reduce_max(values)
        step = (tf.reduce_sum(counts) - counts[highest]) // 255
        table = (tf.cumsum(counts, exclusive=True) + step // 2) // tf.maximum(step, 1)
        table = tf.where(step > 0, tf.minimum(table, 255), tf.range(256))
        return tf.cast(tf.gather(table, values), tf.uint8)

    return tf.stack([channel(image[..., i]) for i in range(3)], axis=-1)


# --- Geometry --------------------------------------------------------------------------------


def affine(image: tf.Tensor, a, b, c, d, e, f) -> tf.Tensor:
    """What lies at (x, y) comes from (a x + b y + c, d x + e y + f); bilinear, black outside.

    Args:
        image: image (h, w, 3), uint8.
        a: first of the six numbers, in pixels with the corner of the image at (0, 0), as in
            `PIL.Image.transform` with `AFFINE`.
        b: second number.
        c: third number.
        d: fourth number.
        e: fifth number.
        f: sixth number.

    Returns:
        uint8 image of the same size.
    """
    # TensorFlow counts from the middle of the first pixel.
    c, f = c + 0.5 * (a + b) - 0.5, f + 0.5 * (d + e) - 0.5
    numbers = [a, b, c, d, e, f, 0.0, 0.0]
    transform = tf.stack([tf.cast(number, tf.float32) for number in numbers])
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(image[None], tf.float32),
        transforms=transform[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return as_uint8(moved[0])


def rotate(image: tf.Tensor, degrees) -> tf.Tensor:
    """Turns an image about its middle, counter-clockwise as `PIL.Image.rotate`."""
    angle = -degrees * (3.141592653589793 / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    height, width = tf.unstack(tf.cast(tf.shape(image)[:2], tf.float32))
    x, y = width / 2.0, height / 2.0
    return affine(image, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _translate(axis):
    def move(image, share, sign):
        offset = sign * share * 0.45 * tf.cast(tf.shape(image)[1 - axis], tf.float32)
        offsets = (offset, 0.0) if axis == 0 else (0.0, offset)
        return affine(image, 1.0, 0.0, offsets[0], 0.0, 1.0, offsets[1])

    return move


# Each takes a uint8 image, a strength of 0 to 1 and a sign, and returns a uint8 image.
OPERATIONS = {
    "identity": lambda image, share, sign: image,
    "shear_x": lambda image, share, sign: affine(image, 1, sign * share * 0.3, 0, 0, 1, 0),
    "shear_y": lambda image, share, sign: affine(image, 1, 0, 0, sign * share * 0.3, 1, 0),
    "translate_x": _translate(0),
    "translate_y": _translate(1),
    "rotate": lambda image, share, sign: rotate(image, sign * share * 30.0),
    "brightness": _enhance(brighten),
    "color": _enhance(saturate),
    "contrast": _enhance(contrast),
    "sharpness": _enhance(sharpen),
    "posterize": lambda image, share, sign: posterize(image, 8 - round(4 * share)),
    "solarize": lambda image, share, sign: solarize(image, 256.0 * (1.0 - share)),
    "auto_contrast": lambda image, share, sign: auto_contrast(image),
    "equalize": lambda image, share, sign: equalize(image),
}
