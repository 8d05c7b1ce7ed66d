"""Images of any kind to RGB arrays: reading, looking at headers, resizing.

One rule holds everywhere: an image is a uint8 array (height, width, 3), RGB, 0 to 255, upright
(EXIF orientation applied). TensorFlow's own decoders ignore EXIF, drop alpha and round JPEG
differently, so `read_image_info` says which files they can be trusted with.
"""

import dataclasses
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

#: Suffixes (lower case) of the files that `find_images` takes for images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# Pillow knows more formats, but some of them start other programs (EPS: Ghostscript).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_ORIENTATION_TAG = 0x0112


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """What the header of an image file tells.

    Attributes:
        height: Rows of the upright image.
        width: Columns of the upright image.
        orientation: EXIF orientation, 1 to 8; 1 is upright. See `orientation_flags`.
        plain: True where `tf.io.decode_jpeg(..., channels=3, dct_method="INTEGER_ACCURATE")` gives
            the same pixels as Pillow (apart from the orientation): 8-bit RGB or gray JPEG, and PNG
            without alpha.
    """

    height: int
    width: int
    orientation: int = 1
    plain: bool = False


def orientation_flags(orientation: int) -> tuple[bool, bool, bool]:
    """Steps, in this order, that turn a stored image upright: transpose, flip columns, flip rows.

    Args:
        orientation: EXIF orientation, 1 to 8 (TIFF 6.0, tag 0x0112).
    """
    return orientation >= 5, orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)


def load_image(source: Any) -> np.ndarray:
    """Reads one image.

    Files and bytes are decoded by Pillow: JPEG, PNG, GIF (first frame), BMP, WebP, TIFF and
    PPM; gray, palette, CMYK and 16-bit images are converted to 8-bit RGB, and EXIF orientation is
    applied. Transparent images are laid over white, as a browser shows them. Arrays with four
    channels are RGBA.

    Args:
        source: Path of a file (str or PathLike), the bytes of an encoded image, a Pillow image,
            or an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with values 0 to 255
            (floats are rounded).

    Returns:
        uint8 array (H, W, 3), RGB, 0 to 255.

    Raises:
        ValueError: The file is missing, empty, truncated, not an image or far too large; or the
            array has a wrong shape, NaN, or values that are not 0 to 255.

    Example:

    >>> load_image(np.zeros((4, 5), "uint8")).shape
    (4, 5, 3)
    """
    from PIL import Image

    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        encoded = _as_path_or_bytes(source)
        with _open(encoded) as image:
            return _decode(image, _describe(encoded))
    if isinstance(source, Image.Image):
        return _decode(source, "the Pillow image")
    return _from_array(source)


def read_image_info(source: str | os.PathLike | bytes) -> ImageInfo:
    """Looks at the header of an image without decoding it.

    A cut file is found as well: files without their end marker, and the formats that have none,
    are decoded completely as a check.

    Args:
        source: Path of a file, or the bytes of an encoded image.

    Raises:
        ValueError: As `load_image`.
    """
    source = _as_path_or_bytes(source)
    with _open(source) as image:
        is_jpeg, is_png = image.format in ("JPEG", "MPO"), image.format == "PNG"
        has_end = (is_jpeg and _tail(source).endswith(b"\xff\xd9")) or (
            is_png and _tail(source).endswith(_PNG_END)
        )
        plain = (is_jpeg and image.mode in ("RGB", "L")) or (
            is_png and image.mode in ("RGB", "L", "P", "1") and not _has_alpha(image)
        )
        if not has_end:
            _load(image, _describe(source))
        orientation = _orientation(image)
        width, height = image.size
    if orientation_flags(orientation)[0]:
        width, height = height, width
    return ImageInfo(height, width, orientation, plain)


def find_images(folder: str | os.PathLike) -> list[Path]:
    """Paths of the images directly in a folder, sorted by name.

    Args:
        folder: The folder; images are told by their suffix (`IMAGE_SUFFIXES`), in any case.

    Raises:
        ValueError: There is no such folder, or no image in it.

    Example: `for path in find_images("photos"): image = load_image(path)`
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"Expected a folder of images. Received: {folder} (no such folder)")
    files = list(folder.iterdir())
    paths = sorted(p for p in files if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(
            f"No images in {folder}: expected files ending in {', '.join(IMAGE_SUFFIXES)}. "
            f"Received: {len(files)} other files or folders"
        )
    return paths


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Stretches an image to the given size, as the network and its exported form do.

    Bilinear with half-pixel centers and without antialiasing: the same numbers as
    `tf.image.resize(image, (height, width), method="bilinear", antialias=False)`.

    Args:
        image: Array (H, W, 3), or a batch (B, H, W, 3), 0 to 255.
        height: Rows wanted.
        width: Columns wanted.

    Returns:
        float32 array (height, width, 3), or (B, height, width, 3), 0 to 255.

    Raises:
        ValueError: `image` has another rank, or a size is not a positive integer.
    """
    from keras import ops

    if min(height, width) < 1 or int(height) != height or int(width) != width:
        raise ValueError(
            "`height` and `width` must be positive integers. "
            f"Received: height={height}, width={width}"
        )
    image = np.asarray(image, "float32")
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise ValueError(f"`image` must be (H, W, 3) or (B, H, W, 3). Received: {image.shape}")
    # float32 goes in because Keras rounds a resized uint8 image back to uint8.
    resized = ops.image.resize(
        image, (int(height), int(width)), "bilinear", antialias=False, data_format="channels_last"
    )
    return ops.convert_to_numpy(resized)


# === Files and bytes ===


def center_crop_image(
    image: np.ndarray,
    crop_size: int,
    crop_share: float = 0.875,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """The middle of an image, as classifiers are evaluated: resize the shorter side, then cut.

    Args:
        image: Image (height, width, 3), uint8, RGB.
        crop_size: Side of the result in pixels.
        crop_share: The crop as a share of the resized shorter side, above 0, at most 1.
        interpolation: `"bilinear"` or `"bicubic"`, antialiased.

    Returns:
        Image (crop_size, crop_size, 3), uint8.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> center_crop_image(load_image("photo.jpg"), 224).shape
        (224, 224, 3)
    """
    from PIL import Image

    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    if crop_size < 1 or not 0 < crop_share <= 1 or interpolation not in filters:
        raise ValueError(
            "`crop_size` must be positive, `crop_share` above 0 and at most 1, `interpolation` "
            f"one of {tuple(filters)}. Received: crop_size={crop_size}, "
            f"crop_share={crop_share}, interpolation={interpolation!r}"
        )
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    # The roundings are those of torchvision, with which the figures were measured.
    resized_short = max(int(crop_size / crop_share), crop_size)
    resized_long = int(resized_short * long / short)
    portrait = height > width
    size = (resized_short, resized_long) if portrait else (resized_long, resized_short)
    resized = Image.fromarray(image).resize(size, filters[interpolation])
    left, top = (round((side - crop_size) / 2) for side in size)
    return np.asarray(resized.crop((left, top, left + crop_size, top + crop_size)))


def _as_path_or_bytes(source):
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    return source if isinstance(source, bytes) else os.fspath(source)


def _describe(source: str | bytes) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def _open(source: str | bytes):
    """Opens an image with Pillow, header only; every failure is a ValueError naming the file."""
    from PIL import Image, UnidentifiedImageError

    what = _describe(source)
    if isinstance(source, str):
        if not os.path.isfile(source):
            kind = "it is a folder, not a file" if os.path.isdir(source) else "no such file"
            raise ValueError(f"Cannot read the image {what!r}: {kind}")
        is_empty = os.path.getsize(source) == 0
    else:
        is_empty = not source
    if is_empty:
        raise ValueError(f"Cannot read the image {what!r}: it is empty (0 bytes)")
    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        return Image.open(stream, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"Cannot read the image {what!r}: it is not an image. Wanted: {', '.join(_FORMATS)}"
        ) from error
    except _pillow_errors() as error:
        raise ValueError(f"Cannot read the image {what!r}: {error}") from error


def _pillow_errors() -> tuple[type[Exception], ...]:
    """What Pillow raises on damaged files, beside its own OSError."""
    from PIL import Image

    return (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        OverflowError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    )


def _load(image, what: str) -> None:
    try:
        image.load()
    except _pillow_errors() as error:
        raise ValueError(f"Cannot read the image {what!r}: {error}") from error


def _tail(source: str | bytes) -> bytes:
    """The last bytes of a file, where JPEG and PNG have their end markers."""
    if isinstance(source, bytes):
        return source[-len(_PNG_END) :]
    with open(source, "rb") as file:
        file.seek(max(0, os.path.getsize(source) - len(_PNG_END)))
        return file.read()


def _orientation(image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none or it is damaged."""
    from PIL import Image

    try:
        # The method of the base class: the one for PNG would decode the whole file.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except _pillow_errors():
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_alpha(image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _decode(image, what: str) -> np.ndarray:
    """Pixels of an opened Pillow image: 8-bit RGB, upright, contiguous and writable."""
    _load(image, what)
    pixels = _to_rgb(image, what)
    transpose, flip_columns, flip_rows = orientation_flags(_orientation(image))
    if transpose:
        pixels = pixels.transpose(1, 0, 2)
    if flip_columns:
        pixels = pixels[:, ::-1]
    if flip_rows:
        pixels = pixels[::-1]
    return np.array(pixels, order="C")


def _to_rgb(image, what: str) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # 65535 / 255 = 257; Pillow's own convert("RGB") would clip at 255 instead.
        gray = np.rint(np.asarray(image) / 257.0).clip(0, 255).astype("uint8")
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"Cannot read the image {what!r}: its pixels are 32-bit numbers (Pillow mode "
            f"{image.mode}), whose range nobody knows. Save it with 8 or 16 bits"
        )
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
    import keras

    if keras.ops.is_tensor(source):
        source = keras.ops.convert_to_numpy(source)
    try:
        array = np.asarray(source)
    except (TypeError, ValueError):
        array = np.empty((), object)
    if array.dtype.kind not in "uif":
        # bfloat16 is a float with dtype kind "V"
        if array.dtype.name == "bfloat16":
            return array.astype("float32")
        raise ValueError(
            "An image must be a path, bytes, a Pillow image or an array of numbers 0 to 255. "
            f"Received: {type(source).__name__} ({array.dtype})"
        )
    return array


def _check_range(array: np.ndarray) -> np.ndarray:
    """Values 0 to 255; uint8 as it is, everything else as floats."""
    if array.dtype == np.uint8:
        return array
    array = array.astype("float64")
    if not np.isfinite(array).all():
        raise ValueError("Images are 0 to 255. Received: an array with NaN or infinite values")
    low, high = array.min(), array.max()
    # Resampling filters overshoot a little: half a gray level is let through.
    if low < -0.5 or high > 255.5:
        raise ValueError(f"Images are 0 to 255. Received: values from {low:g} to {high:g}")
    if high <= 1.0 and not np.array_equal(array, np.rint(array)):
        raise ValueError(
            f"Images are 0 to 255. Received: values from {low:g} to {high:g}, which look like "
            "0 to 1. Multiply the image by 255"
        )
    return array.clip(0.0, 255.0)
