"""Encoded pictures to tensors inside a TensorFlow graph, without ever failing."""

import tensorflow as tf

# Pictures of more pixels are refused, as Pillow does: a small file can be a huge picture.
MAX_PIXELS = 178_956_970


def decode_pictures(image_bytes, fit_picture, image_shape):
    """A batch of encoded pictures of any sizes as one tensor.

    What cannot be decoded (no picture, cut, empty, more than `MAX_PIXELS` pixels) becomes a
    black picture and is reported: it must not make the other requests of its batch fail.

    Args:
        image_bytes: string tensor (batch,), JPEG, PNG, GIF (first frame), BMP or WebP files.
        fit_picture: function of a uint8 picture (height, width, 3) that returns float32 of
            `image_shape`.
        image_shape: (height, width, channels) of the result.

    Returns:
        Pictures (batch, *image_shape), float32, 0 to 255; their own sizes (batch, 2), int32,
        height and width, 1 and 1 for those that cannot be decoded; whether each could be
        decoded, bool (batch,).
    """
    signature = (
        tf.TensorSpec(image_shape, tf.float32),
        tf.TensorSpec((2,), tf.int32),
        tf.TensorSpec((), tf.bool),
    )

    def decode(encoded):
        picture = _decode(encoded)
        fitted = tf.ensure_shape(fit_picture(picture), image_shape)
        return fitted, tf.shape(picture)[:2], True

    def decode_or_blank(encoded):
        # A graph has no other way to go on after an error than that of tf.data.
        blank = (tf.zeros(image_shape), tf.ones((2,), tf.int32), False)
        decoded = tf.data.Dataset.from_tensors(encoded).map(decode).ignore_errors()
        return decoded.concatenate(tf.data.Dataset.from_tensors(blank)).take(1).get_single_element()

    return tf.map_fn(decode_or_blank, image_bytes, fn_output_signature=signature)


def _decode(encoded):
    """One picture, uint8 (height, width, 3). Fails for what is no picture or too large."""
    is_jpeg = tf.io.is_jpeg(encoded)
    pixels = tf.reduce_prod(tf.cast(_stated_size(encoded, is_jpeg), tf.int64))
    with tf.control_dependencies(
        [tf.debugging.assert_less_equal(pixels, tf.constant(MAX_PIXELS, tf.int64))]
    ):
        encoded = tf.identity(encoded)
    image = tf.cond(
        is_jpeg,
        # TensorFlow's default JPEG decoding is fast and up to 7 grey levels off.
        lambda: tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, expand_animations=False),
    )
    image.set_shape((None, None, None))
    has_alpha = tf.shape(image)[2] % 2 == 0  # grey, grey + alpha, RGB or RGB + alpha
    image = tf.cond(has_alpha, lambda: _over_white(image), lambda: image)
    size = tf.shape(image)[:2]
    return tf.broadcast_to(image, tf.concat([size, [3]], 0))  # grey to RGB


def _stated_size(encoded, is_jpeg):
    """Two sides as the header of a file tells them; zeros for WebP, which limits itself."""
    header = tf.strings.substr(encoded, 0, 26)
    kind = tf.strings.substr(header, 0, 2)

    def sides(start: int, dtype, little_endian: bool):
        part = tf.strings.substr(header, start, 2 * tf.as_dtype(dtype).size)
        return tf.cast(tf.io.decode_raw(part, dtype, little_endian=little_endian), tf.int64)

    return tf.case(
        [
            (is_jpeg, lambda: tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64)),
            (kind == b"\x89P", lambda: sides(16, tf.int32, False)),
            (kind == b"GI", lambda: sides(6, tf.uint16, True)),
            (kind == b"BM", lambda: tf.abs(sides(18, tf.int32, True))),
        ],
        default=lambda: tf.zeros((2,), tf.int64),
    )


def _over_white(image):
    """Lays uint8 (h, w, colours + alpha) over white, as `load_image` does."""
    image = tf.cast(image, tf.float32)
    alpha = image[..., -1:] / 255.0
    return tf.cast(tf.round(image[..., :-1] * alpha + 255.0 * (1.0 - alpha)), tf.uint8)
