"""Decodes image files inside a TensorFlow graph; invalid files raise no error."""

import tensorflow as tf

# Reject larger images, as Pillow does: a small file can hold a huge image.
MAX_PIXELS = 178_956_970


def decode_images(image_bytes, preprocess, image_shape):
    """Decodes a batch of encoded images of any size into one tensor.

    Invalid files (not an image, truncated, empty, above `MAX_PIXELS`) become black images and are
    reported, so that other requests of the same batch do not fail.

    Args:
        image_bytes: string tensor (batch,), JPEG, PNG, GIF (first frame), BMP or WebP files.
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
    pixels = tf.reduce_prod(tf.cast(_header_size(encoded, is_jpeg), tf.int64))
    checks = [
        tf.debugging.assert_less_equal(pixels, tf.constant(MAX_PIXELS, tf.int64)),
        tf.debugging.assert_equal(_is_misread(encoded, is_jpeg), False),
    ]
    with tf.control_dependencies(checks):
        # TensorFlow decodes all frames of a GIF before it takes the first.
        is_gif = tf.strings.substr(encoded, 0, 2) == b"GI"
        encoded = tf.cond(is_gif, lambda: _first_gif_frame(encoded), lambda: encoded)
    image = tf.cond(
        is_jpeg,
        # The default JPEG decoding is faster, but off by up to 7 gray levels.
        lambda: tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, expand_animations=False),
    )
    image.set_shape((None, None, None))
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


# === Headers ===


def _header_size(encoded, is_jpeg):
    """Reads both sides of an image from its header, int64 (2,)."""

    def webp():
        # Lossy, lossless and extended headers: sides of 14, 14 and 24 bits, the last two minus 1.
        packed = tf.reduce_sum(_integers(encoded, 21, tf.uint8, 4) * [1, 2**8, 2**16, 2**24])
        octets = _integers(encoded, 24, tf.uint8, 6)
        canvas = tf.reduce_sum(tf.reshape(octets, (2, 3)) * [1, 2**8, 2**16], axis=1) + 1
        kind = tf.strings.substr(encoded, 12, 4)
        return tf.case(
            [
                (kind == b"VP8 ", lambda: _integers(encoded, 26, tf.uint16, 2) % 2**14),
                (kind == b"VP8L", lambda: tf.stack([packed, packed // 2**14]) % 2**14 + 1),
            ],
            default=lambda: canvas,
        )

    kind = tf.strings.substr(encoded, 0, 2)
    return tf.case(
        [
            (is_jpeg, lambda: tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64)),
            (kind == b"\x89P", lambda: _integers(encoded, 16, tf.int32, 2, little_endian=False)),
            (kind == b"GI", lambda: _integers(encoded, 6, tf.uint16, 2)),
            (kind == b"BM", lambda: tf.abs(_integers(encoded, 18, tf.int32, 2))),
            (kind == b"RI", webp),
        ],
        default=lambda: tf.zeros((2,), tf.int64),
    )


def _is_misread(encoded, is_jpeg):
    """Returns whether TensorFlow would decode the image wrongly.

    These are JPEGs of four components without Adobe's marker, PNGs with a transparent color but no
    alpha channel, BMPs of other than 24 bits, GIFs whose first frame does not cover the image, and
    WebP animations, for which TensorFlow 2.21 writes out of bounds.
    """
    header = tf.strings.substr(encoded, 0, 2**20)

    def contains(mark: str):
        return tf.strings.regex_full_match(header, rf"(?s)\C*{mark}\C*")

    def jpeg():
        return (tf.image.extract_jpeg_shape(encoded)[2] == 4) & ~contains(r"\x00\x0eAdobe")

    def png():
        color_type = _byte(encoded, 25)
        clear_gray = (color_type == 0) & contains(r"\x00\x00\x00\x02tRNS")
        return clear_gray | (color_type == 2) & contains(r"\x00\x00\x00\x06tRNS")

    def gif():
        screen = tf.concat([[0, 0], _integers(encoded, 6, tf.uint16, 2)], 0)
        frame = _integers(encoded, _gif_frame_position(encoded) + 1, tf.uint16, 4)
        return tf.reduce_any(screen != frame)

    def webp():
        is_animated = _byte(encoded, 20) // 2 % 2 == 1
        return (tf.strings.substr(encoded, 12, 4) == b"VP8X") & is_animated

    kind = tf.strings.substr(encoded, 0, 2)
    return tf.case(
        [
            (is_jpeg, jpeg),
            (kind == b"\x89P", png),
            (kind == b"GI", gif),
            (kind == b"BM", lambda: _byte(encoded, 28) != 24),
            (kind == b"RI", webp),
        ],
        default=lambda: tf.constant(False),
    )


def _first_gif_frame(encoded):
    """Cuts a GIF after its first frame."""
    frame = _gif_frame_position(encoded)
    blocks = frame + 11 + _gif_palette_size(_byte(encoded, frame + 9))
    return tf.strings.substr(encoded, 0, _skip_gif_blocks(encoded, blocks)) + b";"


def _gif_frame_position(encoded):
    """Finds the first image descriptor, which follows the palette and the extensions."""
    return tf.while_loop(
        lambda position: _byte(encoded, position) == 0x21,  # an extension
        lambda position: (_skip_gif_blocks(encoded, position + 2),),
        (13 + _gif_palette_size(_byte(encoded, 10)),),
    )[0]


def _skip_gif_blocks(encoded, position):
    """Returns the end of a sequence of blocks: length and content, up to a block of length 0."""
    last = tf.while_loop(
        lambda position: _byte(encoded, position) > 0,
        lambda position: (position + 1 + _byte(encoded, position),),
        (position,),
    )[0]
    return last + 1


def _gif_palette_size(flags):
    """Returns the size of a palette in bytes, given its flags."""
    return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(2, flags % 8), 0)


def _byte(encoded, position):
    return tf.cast(_integers(encoded, position, tf.uint8, 1)[0], tf.int32)


def _integers(encoded, position, dtype, count: int, little_endian: bool = True):
    """Reads `count` integers as int64; fails where the file is too short."""
    part = tf.strings.substr(encoded, position, count * tf.as_dtype(dtype).size)
    integers = tf.io.decode_raw(part, dtype, little_endian=little_endian)
    return tf.ensure_shape(tf.cast(integers, tf.int64), (count,))
