"""Reading images: odd files, files made with Pillow and TensorFlow, and arrays."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sample_images import photograph

from keras_resnest.data.dataset import decode_plain_image
from keras_resnest.images import (
    find_images,
    load_image,
    orientation_flags,
    read_image_info,
    resize_image,
)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype="uint8")


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_orientation(pixels, orientation, kind="PNG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    return encode(Image.fromarray(pixels), kind, exif=exif, **options)


# === Odd files ===


def test_grayscale_file_has_three_equal_channels(odd_images):
    image = load_image(odd_images / "grayscale.jpg")
    assert image.shape == (213, 320, 3) and image.dtype == np.uint8
    assert (image == image[..., :1]).all() and image.std() > 20


def test_rgba_file_lies_over_white(odd_images):
    path = odd_images / "rgba.png"
    rgba = np.asarray(Image.open(path)).astype("float64")
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    image = load_image(str(path))
    assert image.shape == (160, 240, 3)
    np.testing.assert_allclose(image, expected, atol=1.0)
    assert (image[alpha[..., 0] == 0] == 255).all() and (alpha == 0).any()


def test_cmyk_file_has_the_colors_of_the_photograph(odd_images):
    image = load_image(odd_images / "cmyk.jpg")
    expected = np.asarray(photograph(240, 320), "float64")
    assert image.shape == (240, 320, 3)
    assert np.abs(image - expected).mean() < 8


def test_exif_rotated_file_is_upright(odd_images):
    image = load_image(odd_images / "exif_orientation6.jpg")
    expected = np.asarray(photograph(212, 320), "float64")
    assert image.shape == (212, 320, 3)
    assert np.abs(image - expected).mean() < 8


def test_one_pixel_file(odd_images):
    assert load_image(odd_images / "one_pixel.png").shape == (1, 1, 3)


@pytest.mark.parametrize("name", ["truncated.jpg", "text_not_image.jpg", "absent.jpg"])
def test_bad_files_are_named(odd_images, name):
    path = odd_images / name
    for read in (load_image, read_image_info):
        with pytest.raises(ValueError, match=name):
            read(path)
    if path.exists():
        with pytest.raises(ValueError, match="bytes"):
            load_image(path.read_bytes())


def test_empty_files_folders_and_cut_png(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(encode(Image.fromarray(noise(40, 40, 3)))[:-500])
    for name, message in {"empty.png": "0 bytes", "cut.png": "cut.png", "": "folder"}.items():
        for read in (load_image, read_image_info):
            with pytest.raises(ValueError, match=message):
                read(tmp_path / name)
    with pytest.raises(ValueError, match="0 bytes"):
        load_image(b"")


def test_decompression_bomb_is_refused_at_once():
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="exceeds limit"):
        load_image(bomb)


@pytest.fixture(scope="module")
def large_png():
    """49 megapixels of one color in a few kB."""
    image = Image.new("RGBA", (7000, 7000), (200, 30, 30, 255))
    return encode(image, "PNG", compress_level=9)


def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_large_images_take_8_bytes_per_pixel(large_png):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory("VmRSS")
    resized = resize_image(load_image(large_png), 64, 64)
    assert memory("VmHWM") - before < 8.5 * 49e6
    assert (resized == np.array([200, 30, 30], "float32")).all()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_images_that_do_not_fit_into_memory_cannot_be_read(large_png):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**26, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"Cannot read the image .*(MemoryError|allocate)"):
            load_image(large_png)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_max_pixels(large_png):
    with pytest.raises(ValueError, match=r"7000 x 7000 pixels .*max_pixels=48000000"):
        load_image(large_png, max_pixels=48_000_000)
    assert load_image(noise(4, 5, 3), max_pixels=1).shape == (4, 5, 3)  # arrays are there already


def test_formats_that_start_other_programs_are_refused():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match="not an image"):
        load_image(eps)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation, kind):
    encoded = with_orientation(noise(24, 40, 3), orientation, kind)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    image = load_image(encoded)
    np.testing.assert_array_equal(image, expected)
    info = read_image_info(encoded)
    assert (info.height, info.width) == expected.shape[:2]
    assert info.orientation == orientation and info.plain
    assert orientation_flags(orientation)[0] == (expected.shape[0] == 40)


def test_damaged_exif_is_upright():
    pixels = noise(8, 9, 3)
    np.testing.assert_array_equal(load_image(with_orientation(pixels, 77)), pixels)
    damaged = encode(Image.fromarray(pixels), exif=b"Exif\x00\x00garbage")
    np.testing.assert_array_equal(load_image(damaged), pixels)


# === Pixel formats ===


def test_16_bit_png_is_scaled_not_clipped():
    values = np.arange(0, 65536, 13, dtype="uint16")[: 70 * 70].reshape(70, 70)
    image = load_image(encode(Image.fromarray(values)))
    np.testing.assert_array_equal(image[..., 0], np.rint(values / 257))
    assert image[..., 0].max() > 240 and (image == image[..., :1]).all()


def test_16_bit_rgb_png():
    import tensorflow as tf

    values = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype="uint16")
    image = load_image(tf.io.encode_png(values).numpy())
    np.testing.assert_allclose(image, values / 257, atol=1.01)


def test_palette_gray_alpha_and_gif():
    pixels = noise(16, 20, 3) // 64 * 80
    palette = Image.fromarray(pixels).quantize(64)
    np.testing.assert_array_equal(load_image(encode(palette)), np.asarray(palette.convert("RGB")))
    clear = encode(palette, transparency=int(np.asarray(palette)[3, 4]))
    assert (load_image(clear)[3, 4] == 255).all()

    gray_alpha = np.stack([noise(5, 6), np.full((5, 6), 51, "uint8")], axis=-1)
    expected = gray_alpha[..., :1] * 0.2 + 255 * 0.8
    np.testing.assert_allclose(
        load_image(Image.fromarray(gray_alpha, "LA")), np.repeat(expected, 3, axis=-1), atol=1
    )
    frames = [Image.new("RGB", (7, 5), color) for color in ("red", "blue")]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (load_image(gif) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "TIFF", "PPM", "PNG"])
def test_lossless_formats(kind):
    pixels = noise(11, 13, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(Image.fromarray(pixels), kind, **options)
    np.testing.assert_array_equal(load_image(bytearray(encoded)), pixels)
    info = read_image_info(encoded)
    assert (info.height, info.width, info.plain) == (11, 13, kind == "PNG")


def test_32_bit_images_are_refused():
    image = Image.fromarray(np.ones((4, 4), "float32"))
    for source in (image, encode(image, "TIFF")):
        with pytest.raises(ValueError, match="32-bit"):
            load_image(source)


def test_pillow_images_become_writable_arrays():
    pixels = noise(6, 7, 3)
    image = load_image(Image.fromarray(pixels))
    image[0, 0] = 0
    assert image.flags.c_contiguous and image.flags.writeable


# === TensorFlow decodes "plain" files to the same pixels ===


def plain_files():
    pixels = noise(40, 30, 3) // 32 * 32
    yield encode(Image.fromarray(pixels[..., 0]))
    yield encode(Image.fromarray(pixels))
    yield encode(Image.fromarray(pixels).quantize(16))
    yield encode(Image.fromarray(pixels[..., 0]).convert("1"))
    for options in ({}, {"progressive": True}, {"subsampling": 2, "quality": 40}):
        yield encode(Image.fromarray(pixels), "JPEG", **options)


def test_plain_files_agree_with_tensorflow(odd_images):
    files = list(plain_files())
    files += [encode(photograph(seed=seed), "JPEG", quality=88) for seed in range(4)]
    files.append((odd_images / "grayscale.jpg").read_bytes())
    for encoded in files:
        assert read_image_info(encoded).plain
        np.testing.assert_array_equal(decode_plain_image(encoded), load_image(encoded))


def test_files_for_pillow_are_not_plain(odd_images):
    assert not read_image_info(odd_images / "cmyk.jpg").plain
    assert not read_image_info(odd_images / "rgba.png").plain
    assert not read_image_info(encode(Image.fromarray(noise(3, 3).astype("uint16")))).plain
    pixels = noise(5, 6, 3)
    without_end = encode(Image.fromarray(pixels))[:-12]  # Pillow does not miss it
    assert not read_image_info(without_end).plain
    np.testing.assert_array_equal(load_image(without_end), pixels)


def test_bytes_after_the_end_marker_are_ignored():
    encoded = encode(Image.fromarray(noise(30, 20, 3)), "JPEG")
    assert read_image_info(encoded + b"\0" * 300) == read_image_info(encoded)


# === Arrays ===


def test_arrays():
    pixels = noise(6, 7, 3)
    np.testing.assert_array_equal(load_image(pixels), pixels)
    np.testing.assert_array_equal(load_image(pixels.astype("float32") + 0.3), pixels)
    np.testing.assert_array_equal(load_image(pixels.astype("int64").tolist()), pixels)
    for gray in (pixels[..., 0], pixels[..., :1]):
        np.testing.assert_array_equal(load_image(gray), np.repeat(pixels[..., :1], 3, axis=-1))
    half = np.concatenate([pixels, np.full((6, 7, 1), 127.5)], axis=-1)
    np.testing.assert_allclose(load_image(half), pixels / 2 + 127.5, atol=0.51)
    opaque = np.concatenate([pixels, np.full((6, 7, 1), 255, "uint8")], axis=-1)
    np.testing.assert_array_equal(load_image(opaque), pixels)
    assert load_image(np.zeros((3, 3, 3))).max() == 0  # black, not "0 to 1"


def test_tensors_of_keras():
    import keras

    pixels = noise(4, 5, 3)
    np.testing.assert_array_equal(load_image(keras.ops.convert_to_tensor(pixels)), pixels)
    half = keras.ops.cast(pixels // 2, "bfloat16")
    np.testing.assert_allclose(load_image(half), pixels // 2, atol=1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 3, 3), np.nan), "NaN"),
        (np.full((3, 3, 3), np.inf), "infinite"),
        (np.full((3, 3, 3), 0.5), "0 to 1"),
        (np.full((3, 3, 3), -3.0), "from -3"),
        (np.full((3, 3, 3), 300), "300"),
        (np.zeros((3, 20, 30)), "channels first"),
        (np.zeros((2, 20, 30, 3)), "shape"),
        (np.zeros((0, 20, 3)), "shape"),
        (np.zeros((20, 30, 2)), "shape"),
        (np.zeros((4, 4, 3), bool), "bool"),
        (None, "NoneType"),
        ({"image": 1}, "dict"),
    ],
)
def test_wrong_arrays(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


# === Folders ===


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "c.txt", "d.jpeg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in find_images(str(tmp_path))] == ["a.png", "b.JPG", "d.jpeg"]
    with pytest.raises(ValueError, match=r"No images in .*folder\.png"):
        find_images(tmp_path / "folder.png")
    with pytest.raises(ValueError, match="no such folder"):
        find_images(tmp_path / "absent")


# === Resizing ===


@pytest.mark.parametrize("size", [(32, 32), (7, 90), (61, 45), (200, 20)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_resize_is_the_op_of_the_exported_model(size, dtype):
    import tensorflow as tf

    image = noise(61, 45, 3).astype(dtype)
    expected = tf.image.resize(image, size, method="bilinear", antialias=False)
    resized = resize_image(image, *size)
    assert resized.dtype == np.float32
    np.testing.assert_array_equal(resized, expected)
    np.testing.assert_array_equal(resize_image(image[None], *size)[0], expected)


def test_resize_has_half_pixel_centers():
    ramp = np.tile(np.arange(4.0)[None, :, None] * 60, (1, 1, 3))
    resized = resize_image(ramp, 1, 8)[0, :, 0]
    # center of output pixel i: (i + 0.5) / 2 - 0.5 input pixels, clamped
    expected = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3) * 60
    np.testing.assert_allclose(resized, expected, atol=1e-4)


def test_resize_rejects_wrong_arguments():
    for height, width in ((0, 5), (5, -1), (2.5, 2)):
        with pytest.raises(ValueError, match=r"positive integers|must be int"):
            resize_image(noise(4, 4, 3), height, width)
    with pytest.raises(ValueError, match="image"):
        resize_image(noise(4, 4), 2, 2)
