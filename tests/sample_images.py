"""Images made on the spot: something like a photograph, and files that readers find odd."""

import io

import numpy as np
from PIL import Image


def photograph(height=424, width=640, seed=0):
    """Return smooth colors with sharp-edged rectangles on them, as an RGB image of Pillow."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype="uint8"))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(4):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        pixels[top : top + height // 4, left : left + width // 4] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def write_odd_images(folder):
    """Write five odd files that can be read, and two that cannot.

    exif_orientation6.jpg is stored turned: 320 wide and 212 high when upright.
    """
    photograph(213, 320).convert("L").save(folder / "grayscale.jpg", quality=88)
    photograph(240, 320).convert("CMYK").save(folder / "cmyk.jpg", quality=88)
    Image.new("RGB", (1, 1), (200, 30, 60)).save(folder / "one_pixel.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = photograph(212, 320).transpose(Image.Transpose.ROTATE_90)
    turned.save(folder / "exif_orientation6.jpg", quality=88, exif=exif)
    transparent = photograph(160, 240).convert("RGBA")
    # Transparent on the left, then ever more opaque.
    alpha = np.clip(np.arange(240) * 2 - 40, 0, 255).astype("uint8")
    transparent.putalpha(Image.fromarray(np.tile(alpha, (160, 1))))
    transparent.save(folder / "rgba.png")

    stream = io.BytesIO()
    photograph(212, 320, seed=1).save(stream, "JPEG", quality=88)
    content = stream.getvalue()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "text_not_image.jpg").write_text("This is a text, whatever the file name says.\n")
