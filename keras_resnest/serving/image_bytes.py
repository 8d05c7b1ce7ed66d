"""Decodes image files inside a TensorFlow graph; invalid files raise no error."""

import tensorflow as tf

from keras_resnest.images import MAX_PIXELS


def decode_images(image_bytes, preprocess, image_shape):
    """Decodes a batch of encoded images of any size into one tensor.

    Invalid files (not a JPEG or PNG, truncated, empty, above `MAX_PIXELS`) become black images and
    are reported, so that other requests of the same batch do not fail.

    Args:
        image_bytes: string tensor (batch,), JPEG or PNG files.
        preprocess: function of a uint8 image (height, width, 3) that returns float32 of
            `image_shape`.
        image_shape: (height, width, 3) of the results.

    Returns:
        Images (batch, *image_shape), float32, 0 to 255; original heights and widths (batch, 2),
        int32, 1 and 1 for invalid files; and whether each was decoded (batch,), bool.
    """

    def decode(encoded):
        image = _decode(encoded)
        fitted = tf.ensure_shape(preprocess(image), image_shape)
        return fitted, tf.shape(image)[:2], True

    def decode_or_blank(encoded):
        # Inside a graph, only tf.data can continue after an error.
        blank = (tf.zeros(image_shape), tf.ones((2,), tf.int32), False)
        decoded = tf.data.Dataset.from_tensors(encoded).map(decode).ignore_errors()
        return decoded.concatenate(tf.data.Dataset.from_tensors(blank)).take(1).get_single_element()

    specs = (tf.TensorSpec(image_shape), tf.TensorSpec((2,), tf.int32), tf.TensorSpec((), tf.bool))
    return tf.map_fn(decode_or_blank, image_bytes, fn_output_signature=specs)


def _decode(encoded):
    """Decodes one image to uint8 (height, width, 3); fails if it is unreadable or too large."""
    is_jpeg = tf.io.is_jpeg(encoded)
    is_png = tf.strings.substr(encoded, 0, 8) == b"\x89PNG\r\n\x1a\n"
    # Other formats cost more code than they are worth: TensorFlow decodes all frames of a GIF
    # before it takes the first, and writes out of bounds for some WebP files.
    checks = [tf.debugging.assert_equal(is_jpeg | is_png, True)]
    with tf.control_dependencies(checks):
        pixels, misread = tf.cond(
            is_jpeg, lambda: _jpeg_header(encoded), lambda: _png_header(encoded)
        )
    checks = [
        tf.debugging.assert_less_equal(pixels, tf.constant(MAX_PIXELS, tf.int64)),
        tf.debugging.assert_equal(misread, False),
    ]
    with tf.control_dependencies(checks):
        image = tf.cond(
            is_jpeg,
            # The default JPEG decoding is faster, but off by up to 7 gray levels.
            lambda: tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE"),
            lambda: tf.io.decode_png(encoded),
        )
    has_alpha = tf.shape(image)[2] % 2 == 0  # gray, gray + alpha, RGB or RGB + alpha
    image = tf.cond(has_alpha, lambda: _blend_over_white(image), lambda: image)
    size = tf.shape(image)[:2]
    return tf.broadcast_to(image, tf.concat([size, [3]], 0))  # gray to RGB


def _blend_over_white(image):
    """Blends uint8 (height, width, colors + alpha) over white, as `load_image` does."""
    image = tf.cast(image, tf.uint16)  # float32 would take 36 bytes per pixel
    alpha = image[..., -1:]
    total = image[..., :-1] * alpha + 255 * (255 - alpha) + 128
    # Rounded division by 255 of any number up to 255 * 255; `total` includes the 128.
    shifted = tf.bitwise.right_shift(total, tf.constant(8, tf.uint16))
    return tf.cast(tf.bitwise.right_shift(total + shifted, tf.constant(8, tf.uint16)), tf.uint8)


# === Headers: the number of pixels, and whether TensorFlow would decode them wrongly ===


def _jpeg_header(encoded):
    height, width, channels = tf.unstack(tf.cast(tf.image.extract_jpeg_shape(encoded), tf.int64))
    return height * width, (channels == 4) & ~_contains(encoded, r"\x00\x0eAdobe")


def _png_header(encoded):
    """A transparent color without an alpha channel would be ignored."""
    width, height = tf.unstack(_integers(encoded, 16, tf.int32, 2))
    (color_type,) = tf.unstack(_integers(encoded, 25, tf.uint8, 1))
    clear_gray = (color_type == 0) & _contains(encoded, r"\x00\x00\x00\x02tRNS")
    clear_color = (color_type == 2) & _contains(encoded, r"\x00\x00\x00\x06tRNS")
    return height * width, clear_gray | clear_color


def _contains(encoded, mark: str):
    header = tf.strings.substr(encoded, 0, 2**20)
    return tf.strings.regex_full_match(header, rf"(?s)\C*{mark}\C*")


def _integers(encoded, position: int, dtype, count: int):
    """Reads `count` big-endian integers as int64; fails where the file is too short."""
    part = tf.strings.substr(encoded, position, count * dtype.size)
    integers = tf.io.decode_raw(part, dtype, little_endian=False)
    return tf.ensure_shape(tf.cast(integers, tf.int64), (count,))
