"""Encoded images to tensors inside a TensorFlow graph, without ever failing."""

import tensorflow as tf

# Images of more pixels are refused, as Pillow does: a small file can be a huge image.
MAX_PIXELS = 178_956_970


def decode_images(image_bytes, fit_image, image_shape):
    """A batch of encoded images of any sizes as one tensor.

    What cannot be decoded (no image, cut, empty, more than `MAX_PIXELS` pixels) becomes a
    black image and is reported: it must not make the other requests of its batch fail.

    Args:
        image_bytes: string tensor (batch,), JPEG, PNG, GIF (first frame), BMP or WebP files.
        fit_image: function of a uint8 image (height, width, 3) that returns float32 of
            `image_shape`.
        image_shape: (height, width, channels) of the result.

    Returns:
        Images (batch, *image_shape), float32, 0 to 255; their own sizes (batch, 2), int32,
        height and width, 1 and 1 for those that cannot be decoded; whether each could be
        decoded, bool (batch,).
    """
    signature = (
        tf.TensorSpec(image_shape, tf.float32),
        tf.TensorSpec((2,), tf.int32),
        tf.TensorSpec((), tf.bool),
    )

    def decode(encoded):
        image = _decode(encoded)
        fitted = tf.ensure_shape(fit_image(image), image_shape)
        return fitted, tf.shape(image)[:2], True

    def decode_or_blank(encoded):
        # A graph has no other way to go on after an error than that of tf.data.
        blank = (tf.zeros(image_shape), tf.ones((2,), tf.int32), False)
        decoded = tf.data.Dataset.from_tensors(encoded).map(decode).ignore_errors()
        return decoded.concatenate(tf.data.Dataset.from_tensors(blank)).take(1).get_single_element()

    return tf.map_fn(decode_or_blank, image_bytes, fn_output_signature=signature)


def _decode(encoded):
    """One image, uint8 (height, width, 3). Fails for what is no image or too large."""
    is_jpeg = tf.io.is_jpeg(encoded)
    pixels = tf.reduce_prod(tf.cast(_stated_size(encoded, is_jpeg), tf.int64))
    checks = [
        tf.debugging.assert_less_equal(pixels, tf.constant(MAX_PIXELS, tf.int64)),
        tf.debugging.assert_equal(_is_misread(encoded, is_jpeg), False),
    ]
    with tf.control_dependencies(checks):
        # TensorFlow decodes all frames of a GIF before it takes the first.
        is_gif = tf.strings.substr(encoded, 0, 2) == b"GI"
        encoded = tf.cond(is_gif, lambda: _first_frame_alone(encoded), lambda: encoded)
    image = tf.cond(
        is_jpeg,
        # TensorFlow's default JPEG decoding is fast and up to 7 gray levels off.
        lambda: tf.io.decode_jpeg(encoded, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, expand_animations=False),
    )
    image.set_shape((None, None, None))
    has_alpha = tf.shape(image)[2] % 2 == 0  # gray, gray + alpha, RGB or RGB + alpha
    image = tf.cond(has_alpha, lambda: _over_white(image), lambda: image)
    size = tf.shape(image)[:2]
    return tf.broadcast_to(image, tf.concat([size, [3]], 0))  # gray to RGB


def _stated_size(encoded, is_jpeg):
    """Two sides as the header of a file tells them."""

    def numbers(position: int, dtype, little_endian: bool, count: int = 2):
        return _numbers(encoded, position, dtype, little_endian, count)

    def webp():
        # Lossy, lossless or with features; sides of 14, 14 and 24 bits, the last two less one.
        packed = tf.reduce_sum(numbers(21, tf.uint8, True, 4) * [1, 2**8, 2**16, 2**24])
        octets = numbers(24, tf.uint8, True, 6)
        canvas = tf.reduce_sum(tf.reshape(octets, (2, 3)) * [1, 2**8, 2**16], axis=1) + 1
        kind = tf.strings.substr(encoded, 12, 4)
        return tf.case(
            [
                (kind == b"VP8 ", lambda: numbers(26, tf.uint16, True) % 2**14),
                (kind == b"VP8L", lambda: tf.stack([packed, packed // 2**14]) % 2**14 + 1),
            ],
            default=lambda: canvas,
        )

    kind = tf.strings.substr(encoded, 0, 2)
    return tf.case(
        [
            (is_jpeg, lambda: tf.cast(tf.image.extract_jpeg_shape(encoded)[:2], tf.int64)),
            (kind == b"\x89P", lambda: numbers(16, tf.int32, False)),
            (kind == b"GI", lambda: numbers(6, tf.uint16, True)),
            (kind == b"BM", lambda: tf.abs(numbers(18, tf.int32, True))),
            (kind == b"RI", webp),
        ],
        default=lambda: tf.zeros((2,), tf.int64),
    )


def _is_misread(encoded, is_jpeg):
    """Whether TensorFlow would take the image for another: rather none than a wrong one.

    These are JPEGs of four components without Adobe's marker, PNGs with a transparent color but
    no alpha, BMPs that are not of 24 bits, GIFs whose first frame is not the whole image, and
    WebP animations, for which TensorFlow 2.21 writes beyond its memory.
    """
    header = tf.strings.substr(encoded, 0, 2**20)

    def byte(position: int):
        return tf.strings.substr(encoded, position, 1)

    def holds(mark: str):
        return tf.strings.regex_full_match(header, rf"(?s)\C*{mark}\C*")

    def strange_jpeg():
        return (tf.image.extract_jpeg_shape(encoded)[2] == 4) & ~holds(r"\x00\x0eAdobe")

    def strange_png():
        clear_gray = (byte(25) == b"\x00") & holds(r"\x00\x00\x00\x02tRNS")
        return clear_gray | (byte(25) == b"\x02") & holds(r"\x00\x00\x00\x06tRNS")

    def strange_gif():
        screen = tf.concat([[0, 0], _numbers(encoded, 6, tf.uint16, True, 2)], 0)
        frame = _numbers(encoded, _first_gif_frame(encoded) + 1, tf.uint16, True, 4)
        return tf.reduce_any(screen != frame)

    def strange_webp():
        flags = _numbers(encoded, 20, tf.uint8, True, 1)[0]
        return (tf.strings.substr(encoded, 12, 4) == b"VP8X") & (flags // 2 % 2 == 1)

    kind = tf.strings.substr(encoded, 0, 2)
    return tf.case(
        [
            (is_jpeg, strange_jpeg),
            (kind == b"\x89P", strange_png),
            (kind == b"GI", strange_gif),
            (kind == b"BM", lambda: byte(28) != b"\x18"),
            (kind == b"RI", strange_webp),
        ],
        default=lambda: tf.constant(False),
    )


def _first_gif_frame(encoded):
    """Place of the first image descriptor: behind the colors and the extensions."""

    def is_extension(position):
        return _octet(encoded, position) == 0x21

    start = 13 + _gif_colors(_octet(encoded, 10))
    # An extension is two bytes and blocks.
    return tf.while_loop(is_extension, lambda p: (_after_blocks(encoded, p + 2),), (start,))[0]


def _first_frame_alone(encoded):
    """A GIF that ends behind its first frame."""
    frame = _first_gif_frame(encoded)
    blocks = frame + 11 + _gif_colors(_octet(encoded, frame + 9))
    return tf.strings.substr(encoded, 0, _after_blocks(encoded, blocks)) + b";"


def _after_blocks(encoded, position):
    """Where a sequence of blocks ends; each begins with its length, the last is of length 0."""

    def is_block(position):
        return _octet(encoded, position) > 0

    def next_block(position):
        return (position + 1 + _octet(encoded, position),)

    return tf.while_loop(is_block, next_block, (position,))[0] + 1


def _gif_colors(flags):
    """Bytes of a table of colors, as the flags before it tell."""
    return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(2, flags % 8), 0)


def _octet(encoded, position):
    return tf.cast(_numbers(encoded, position, tf.uint8, True, 1)[0], tf.int32)


def _numbers(encoded, position, dtype, little_endian: bool, count: int):
    """Some integers of a file, int64. An error where the file is too short."""
    part = tf.strings.substr(encoded, position, count * tf.as_dtype(dtype).size)
    numbers = tf.io.decode_raw(part, dtype, little_endian=little_endian)
    return tf.ensure_shape(tf.cast(numbers, tf.int64), (count,))


def _over_white(image):
    """Lays uint8 (h, w, colors + alpha) over white, as `load_image` does."""
    image = tf.cast(image, tf.uint16)  # a large image in float32 would take 36 bytes a pixel
    alpha = image[..., -1:]
    total = image[..., :-1] * alpha + 255 * (255 - alpha) + 128
    # x / 255, rounded, for all x up to 255 * 255; 128 is in the total already.
    shifted = tf.bitwise.right_shift(total, tf.constant(8, tf.uint16))
    return tf.cast(tf.bitwise.right_shift(total + shifted, tf.constant(8, tf.uint16)), tf.uint8)
