"""AnchorGenerator: the grid of boxes that a detector starts from."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_resnest.checks import checked
from keras_resnest.configurable import Configurable


def height_and_width(image_shape: Sequence) -> tuple:
    """Returns the first two sides of an image (height, width, ...)."""
    if len(image_shape) < 2:
        raise ValueError(f"`image_shape` must be (height, width, ...). Received: {image_shape}")
    return tuple(image_shape[:2])


@checked
@keras.saving.register_keras_serializable("keras_resnest")
class AnchorGenerator(Configurable):
    """Generates the anchors of every cell of every feature map.

    On a level with stride `s`, the anchors of a cell are centered at
    `((column + offset) * s, (row + offset) * s)`. An anchor of size `a` and aspect ratio `r`
    has width `a * sqrt(r)` and height `a / sqrt(r)`. Anchors are ordered by level, row, column,
    size and aspect ratio, as the prediction heads flatten their outputs.

    Args:
        strides: stride of each level in pixels.
        sizes: size in pixels, or sequence of sizes, of each level.
        aspect_ratios: ratios of width to height, used on every level.
        offset: position of the center within its cell, as a fraction of the cell.
        clip: whether to clip centers and sizes (not corners) to the image, as the PyTorch ports
            of RefineDet do. The authors' code does not clip.

    Example:
        >>> anchors = AnchorGenerator()((320, 320, 3))
        >>> anchors.shape
        (6375, 4)

    Source: RefineDet (arXiv 1711.06897) section 3.3, "Anchors Design and Matching".
    """

    def __init__(
        self,
        strides: Sequence[int] = (8, 16, 32, 64),
        sizes: Sequence[float | Sequence[float]] = (32, 64, 128, 256),
        aspect_ratios: Sequence[float] = (1.0, 2.0, 0.5),
        offset: float = 0.5,
        clip: bool = False,
    ):
        self.strides = tuple(int(s) for s in strides)
        self.sizes = tuple(tuple(float(s) for s in np.ravel(level)) for level in sizes)
        self.aspect_ratios = tuple(float(r) for r in aspect_ratios)
        self.offset = float(offset)
        self.clip = bool(clip)
        if len(self.strides) != len(self.sizes):
            raise ValueError(
                "`strides` and `sizes` must have one entry per level. "
                f"Received: {len(self.strides)} strides and {len(self.sizes)} sizes"
            )
        if not self.aspect_ratios or min(self.aspect_ratios) <= 0:
            raise ValueError(
                f"`aspect_ratios` must be positive. Received: aspect_ratios={aspect_ratios}"
            )
        if any(not level or min(level) <= 0 for level in self.sizes):
            raise ValueError(f"`sizes` must be positive, in pixels. Received: sizes={sizes}")

    @property
    def num_anchors_per_cell(self) -> tuple[int, ...]:
        """Number of anchors per cell of each level."""
        return tuple(len(level) * len(self.aspect_ratios) for level in self.sizes)

    @checked
    def level_sizes(self, image_shape: Sequence[int]) -> list:
        """Returns the number of anchors of each level in an image (height, width, ...)."""
        height, width = height_and_width(image_shape)
        return [
            n * -(-height // stride) * -(-width // stride)
            for n, stride in zip(self.num_anchors_per_cell, self.strides, strict=True)
        ]

    @checked
    def __call__(self, image_shape: Sequence[int]):
        """Returns the anchors of an image.

        Args:
            image_shape: `(height, width)` or `(height, width, channels)` in pixels. Height and
                width may be integer tensors.

        Returns:
            float32 `"xyxy"` boxes in pixels, of shape `(anchors, 4)`: a NumPy array, or a tensor
            if height or width is a tensor.
        """
        height, width = height_and_width(image_shape)
        static = isinstance(height, int | np.integer) and isinstance(width, int | np.integer)
        xp, dtype = (np, "float64") if static else (ops, "float32")
        sides = xp.array([width, height], dtype=dtype)
        levels = [
            self._level(xp, dtype, stride, sizes, height, width)
            for stride, sizes in zip(self.strides, self.sizes, strict=True)
        ]
        centers, sizes = (xp.concatenate(parts) for parts in zip(*levels, strict=True))
        if self.clip:
            centers, sizes = xp.clip(centers, 0.0, sides), xp.clip(sizes, 0.0, sides)
        boxes = xp.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1)
        return boxes.astype("float32") if static else boxes

    def _level(self, xp, dtype, stride, sizes, height, width):
        """Centers and sizes of the anchors of one level, (anchors, 2) each."""
        shapes = [(s * np.sqrt(r), s / np.sqrt(r)) for s in sizes for r in self.aspect_ratios]
        shapes = xp.array(shapes, dtype=dtype)  # (K, 2)
        x, y = (
            (xp.arange(-(-side // stride), dtype=dtype) + self.offset) * stride
            for side in (width, height)
        )
        grid = xp.stack(xp.meshgrid(x, y), axis=-1)[:, :, None]  # (rows, columns, 1, 2)
        centers, sizes = grid + xp.zeros_like(shapes), xp.zeros_like(grid) + shapes
        return xp.reshape(centers, (-1, 2)), xp.reshape(sizes, (-1, 2))
