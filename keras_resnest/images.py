"""Images from files, bytes and arrays to RGB arrays; image headers; resizing.

An image is a uint8 array (height, width, 3), RGB, 0 to 255, upright (EXIF orientation applied).
TensorFlow's decoders ignore EXIF, drop alpha and round JPEG differently; `ImageInfo.plain` marks
the files that they decode correctly.
"""

import contextlib
import dataclasses
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from keras_resnest.checks import check_counts, checked

# Suffixes, in lower case, of the files that `find_images` returns.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

#: Mean color of ImageNet (red, green, blue), which fills what lies outside of an image, as in SSD.
MEAN_COLOR = (123.0, 117.0, 104.0)

# A small file can hold a huge image: larger ones are refused, as Pillow does.
MAX_PIXELS = 178_956_970

# Pillow reads more formats, but some start other programs (EPS: Ghostscript).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_ORIENTATION_TAG = 0x0112
_STRIP = 2**20  # pixels that are converted at a time


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """Header of an image file; height and width are those of the upright image."""

    height: int
    width: int
    orientation: int = 1  # EXIF orientation, 1 to 8; 1 is upright
    # Whether tf.io.decode_jpeg(..., channels=3, dct_method="INTEGER_ACCURATE") returns the same
    # pixels as Pillow, except for orientation: 8-bit RGB or gray JPEG, PNG without alpha
    plain: bool = False


def orientation_flags(orientation: int) -> tuple[bool, bool, bool]:
    """Returns whether to transpose, flip columns, and flip rows for an EXIF orientation, 1 to 8."""
    return orientation >= 5, orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)


@checked
def load_image(source: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads one image.

    Pillow decodes files and bytes: JPEG, PNG, GIF (first frame), BMP, WebP, TIFF and PPM. Gray,
    palette, CMYK and 16-bit images become 8-bit RGB, EXIF orientation is applied, and transparent
    images are composited over white.

    Args:
        source: Path, bytes of an encoded image, Pillow image, or array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4: RGBA) with values 0 to 255; floats are rounded.
        max_pixels: Height times width above which a file is refused. Decoding takes up to 8 bytes
            per pixel. Pillow has a limit of its own, `PIL.Image.MAX_IMAGE_PIXELS`.

    Returns:
        uint8 array (H, W, 3), RGB, 0 to 255.

    Raises:
        ValueError: if a file is missing, empty, truncated, not an image, or too large for
            `max_pixels` or the memory; or if an array has a wrong shape, NaN, or values outside 0
            to 255.

    Example:
        >>> load_image(np.zeros((4, 5), "uint8")).shape
        (4, 5, 3)
    """
    from PIL import Image

    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        with _open(source) as image:
            return _decode(image, max_pixels)
    if isinstance(source, Image.Image):
        with _naming("the Pillow image"):
            return _decode(source, max_pixels)
    return _from_array(source)


def read_image_info(source: str | os.PathLike | bytes) -> ImageInfo:
    """Reads the header of an image file, given as a path or bytes.

    Decodes only files without an end marker, to detect truncation. Raises ValueError as
    `load_image`.
    """
    with _open(source) as image:
        modes, end = (), b""
        if image.format in ("JPEG", "MPO"):
            modes, end = ("RGB", "L"), b"\xff\xd9"
        elif image.format == "PNG":
            modes, end = ("RGB", "L", "P", "1"), _PNG_END
        is_ended = bool(end) and _tail(source).endswith(end)
        if not is_ended:
            image.load()
        plain = image.mode in modes and not _has_alpha(image)
        if image.format == "PNG":  # Pillow reads one without an end, TensorFlow does not
            plain &= is_ended
        orientation = _orientation(image)
        width, height = image.size
    if orientation_flags(orientation)[0]:
        width, height = height, width
    return ImageInfo(height, width, orientation, plain)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, such as ".ipynb_checkpoints" and macOS' "._photo.jpg"."""
    return name.startswith(".")


@checked
def find_images(folder: str | os.PathLike) -> list[Path]:
    """Returns the paths of the images directly in a folder, sorted by name, without hidden files.

    Args:
        folder: Folder of images, recognized by their suffixes (`IMAGE_SUFFIXES`, in any case).

    Raises:
        ValueError: if there is no such folder, or no image in it.

    Example:
        >>> images = [load_image(path) for path in find_images("photos")]
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"Expected a folder of images. Received: {folder} (no such folder)")
    files = [path for path in folder.iterdir() if not is_hidden(path.name)]
    paths = sorted(p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(
            f"No images in {folder}: expected files ending in {', '.join(IMAGE_SUFFIXES)}. "
            f"Received: {len(files)} other files or folders"
        )
    return paths


def encode_image(image: np.ndarray, format: str, **options) -> bytes:
    """Returns a uint8 image (height, width, 3) as the bytes of a file, with Pillow's options."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format, **options)
    return stream.getvalue()


# === Resizing ===


@checked
def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image without keeping its aspect ratio, as the exported model does.

    Bilinear with half-pixel centers, without antialiasing: the same numbers as
    `tf.image.resize(image, (height, width), method="bilinear", antialias=False)`.

    Args:
        image: Array (H, W, 3) or batch (B, H, W, 3), 0 to 255.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        float32 array (height, width, 3) or (B, height, width, 3), 0 to 255.

    Raises:
        ValueError: if `image` has another rank, or a size is not a positive integer.
    """
    if min(height, width) < 1:
        raise ValueError(f"`height, width` must be positive integers. Received: {height}, {width}")
    image = np.asarray(image)
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise ValueError(f"`image` must be (H, W, 3) or (B, H, W, 3). Received: {image.shape}")
    # Only the pixels that are needed become floats: large images stay 3 bytes per pixel.
    top, bottom, y = _neighbors(int(height), image.shape[-3])
    left, right, x = _neighbors(int(width), image.shape[-2])

    def between(start, end, fraction):
        end -= start  # in place, which is twice as fast
        end *= fraction
        end += start
        return end

    def resize_rows(rows):
        rows = image.take(rows, -3)
        pair = (rows.take(columns, -2).astype("float32", copy=False) for columns in (left, right))
        return between(*pair, x[:, None])

    return between(resize_rows(top), resize_rows(bottom), y[:, None, None])


def _neighbors(size: int, source_size: int):
    """For each resized pixel the two source pixels around it, and its distance from the first."""
    scale = np.float32(source_size) / np.float32(size)
    center = (np.arange(size, dtype="float32") + np.float32(0.5)) * scale - np.float32(0.5)
    first = np.floor(center)
    pair = np.clip([first, np.ceil(center)], 0, source_size - 1).astype(int)
    return *pair, center - first


@checked
def center_crop_image(
    image: np.ndarray,
    crop_size: int,
    crop_ratio: float = 0.875,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> np.ndarray:
    """Resizes the shorter side of an image and crops its center, as in evaluating classifiers.

    Args:
        image: uint8 array (height, width, 3), RGB.
        crop_size: Side of the result in pixels.
        crop_ratio: Ratio of the crop to the resized shorter side, above 0, at most 1.
        interpolation: "bilinear" or "bicubic", antialiased.

    Returns:
        uint8 array (crop_size, crop_size, 3).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> center_crop_image(load_image("photo.jpg"), 224).shape
        (224, 224, 3)
    """
    from PIL import Image

    check_counts(crop_size=crop_size)
    check_crop_ratio(crop_ratio)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(
            "`image` must be a uint8 array (height, width, 3). "
            f"Received: {image.dtype} of shape {image.shape}"
        )
    height, width = image.shape[:2]
    # Rounded as in torchvision, which the published accuracies were measured with.
    short = max(int(crop_size / crop_ratio), crop_size)
    long = int(short * max(height, width) / min(height, width))
    size = (short, long) if height > width else (long, short)
    resized = Image.fromarray(image).resize(size, Image.Resampling[interpolation.upper()])
    left, top = (round((side - crop_size) / 2) for side in size)
    return np.asarray(resized.crop((left, top, left + crop_size, top + crop_size)))


def check_crop_ratio(crop_ratio: float) -> None:
    """Raises `ValueError` unless `crop_ratio` is above 0 and at most 1."""
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"`crop_ratio` must be above 0 and at most 1. Received: {crop_ratio}")


# === Files and bytes ===


@contextlib.contextmanager
def _open(source):
    """Opens a path or bytes with Pillow; errors in the block name the file."""
    from PIL import Image, UnidentifiedImageError

    is_bytes = isinstance(source, bytes | bytearray | memoryview)
    source = bytes(source) if is_bytes else os.fspath(source)
    with _naming(f"{len(source)} bytes" if is_bytes else source):
        if not (is_bytes or os.path.isfile(source)):
            raise ValueError("it is a folder" if os.path.isdir(source) else "no such file")
        if not (source if is_bytes else os.path.getsize(source)):
            raise ValueError("it is empty (0 bytes)")
        try:
            image = Image.open(io.BytesIO(source) if is_bytes else source, formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"it is not an image ({', '.join(_FORMATS)})") from error
        with image:
            yield image


@contextlib.contextmanager
def _naming(image: str):
    """Turns Pillow's errors for damaged images into a `ValueError` that names the image."""
    try:
        yield
    except _pillow_errors() as error:
        reason = str(error) or type(error).__name__
        if type(error).__name__ == "DecompressionBombError":
            reason = reason.partition(", could be")[0]
            reason += ". Set PIL.Image.MAX_IMAGE_PIXELS and `max_pixels` to read a file you trust"
        raise ValueError(f"Cannot read the image {image!r}: {reason}") from error


def _pillow_errors() -> tuple[type[Exception], ...]:
    """Exceptions that Pillow raises for damaged files."""
    from PIL import Image

    python_errors = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError)
    others = (MemoryError, struct.error, zlib.error, Image.DecompressionBombError)
    return *python_errors, *others


def _tail(source: str | bytes) -> bytes:
    """The last bytes of a file, where JPEG and PNG have their end markers."""
    if isinstance(source, bytes):
        return source[-len(_PNG_END) :]
    with open(source, "rb") as file:
        file.seek(max(0, os.path.getsize(source) - len(_PNG_END)))
        return file.read()


def _orientation(image) -> int:
    """EXIF orientation 1 to 8; 1 if it is missing or damaged."""
    from PIL import Image

    try:
        # The method of the base class, as the PNG one would decode the whole file.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except _pillow_errors():
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_alpha(image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _decode(image, max_pixels: int) -> np.ndarray:
    """Pixels of a Pillow image: 8-bit RGB, upright, contiguous and writable."""
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than max_pixels={max_pixels}")
    image.load()
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    pixels = np.empty((height, width, 3), "uint8")
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):  # Pillow converts to 4 bytes per pixel, over and over
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = _to_rgb(strip, is_16_bit)
    transpose, flip_columns, flip_rows = orientation_flags(_orientation(image))
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    if flip_columns:
        pixels = pixels[:, ::-1]
    if flip_rows:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _to_rgb(image, is_16_bit: bool) -> np.ndarray:
    from PIL import Image

    if is_16_bit:
        # 65535 / 255 = 257; Pillow's own convert("RGB") would clip at 255.
        gray = np.rint(np.asarray(image) / 257.0).clip(0, 255).astype("uint8")
        return gray[..., None]
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range: use 8 or 16 bits")
    if _has_alpha(image):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


# === Arrays ===


def _from_array(source) -> np.ndarray:
    array = _to_numpy(source)
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        hint = " (channels first?)" if array.ndim == 3 and shape[0] in (1, 3, 4) else ""
        raise ValueError(
            "One image must be an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). "
            f"Received: shape {shape}{hint}"
        )
    array = _check_range(array)
    if array.shape[-1] == 4:
        alpha = array[..., 3:] / 255.0
        array = array[..., :3] * alpha + 255.0 * (1.0 - alpha)  # over white, as for files
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return np.array(np.rint(array) if array.dtype.kind == "f" else array, "uint8", order="C")


def _to_numpy(source) -> np.ndarray:
    if keras.ops.is_tensor(source):
        source = keras.ops.convert_to_numpy(source)
    try:
        array = np.asarray(source)
    except (TypeError, ValueError):
        array = np.empty((), object)
    if array.dtype.name == "bfloat16":  # of kind "V"
        return array.astype("float32")
    if array.dtype.kind not in "uif":
        raise ValueError(
            "An image must be a path, bytes, a Pillow image or an array of numbers 0 to 255. "
            f"Received: {type(source).__name__} ({array.dtype})"
        )
    return array


def _check_range(array: np.ndarray) -> np.ndarray:
    """Returns values 0 to 255: uint8 unchanged, others as float64."""
    if array.dtype == np.uint8:
        return array
    array = array.astype("float64")
    if not np.isfinite(array).all():
        raise ValueError("Images are 0 to 255. Received: an array with NaN or infinite values")
    low, high = array.min(), array.max()
    # Resampling filters overshoot: tolerate half a gray level.
    if low < -0.5 or high > 255.5:
        raise ValueError(f"Images are 0 to 255. Received: values from {low:g} to {high:g}")
    if high <= 1.0 and not np.array_equal(array, np.rint(array)):
        raise ValueError(
            f"Images are 0 to 255. Received: 0 to 1 ({low:g} to {high:g}). Multiply by 255"
        )
    return array.clip(0.0, 255.0)
