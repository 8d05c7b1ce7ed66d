"""AnchorGenerator: the regular boxes that a detector starts from."""

import keras
import numpy as np
from keras import ops

from keras_resnest.boxes.formats import check_box_format


@keras.saving.register_keras_serializable("keras_resnest")
class AnchorGenerator:
    """Anchors of every cell of every feature map.

    A cell of a level with stride `s` has its anchors centerd on
    `(column + offset) * s, (row + offset) * s`. An anchor of size `a` and aspect
    ratio `r` is `a * sqrt(r)` wide and `a / sqrt(r)` high. The order is level,
    row, column, size, ratio, the order in which the prediction heads flatten.

    Args:
        strides: stride in pixels of each level.
        sizes: for each level one side in pixels, or a sequence of several.
        aspect_ratios: width over height, used on every level.
        offset: position of the center inside its cell, as a fraction of the cell.
        clip: whether center and size are clipped to the image, as the PyTorch
            ports of RefineDet do. The authors' code does not clip.
        bounding_box_format: format of the result.

    Source: RefineDet (arXiv 1711.06897) section 3.3, "Anchors Design".

    Example:

    >>> anchors = AnchorGenerator()((320, 320, 3))
    >>> anchors.shape
    (6375, 4)
    """

    def __init__(
        self,
        strides=(8, 16, 32, 64),
        sizes=(32, 64, 128, 256),
        aspect_ratios=(1.0, 2.0, 0.5),
        offset: float = 0.5,
        clip: bool = False,
        bounding_box_format: str = "xyxy",
    ):
        self.strides = tuple(int(s) for s in strides)
        self.sizes = tuple(_as_tuple(s) for s in sizes)
        self.aspect_ratios = tuple(float(r) for r in aspect_ratios)
        self.offset = float(offset)
        self.clip = bool(clip)
        self.bounding_box_format = check_box_format(bounding_box_format)
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
        """Number of anchors of one cell, for each level."""
        return tuple(len(level) * len(self.aspect_ratios) for level in self.sizes)

    def __call__(self, image_shape) -> np.ndarray:
        """Anchors of an image.

        Args:
            image_shape: (height, width) or (height, width, channels) in pixels; the
                sides may also be integer tensors.

        Returns:
            float32 array of shape (num_anchors, 4) in `bounding_box_format`; a tensor
            where the sides are tensors.
        """
        height, width = image_shape[:2]
        if all(isinstance(side, int | np.integer) for side in (height, width)):
            boxes = self._boxes(np, int(height), int(width))
            return boxes.astype("float32")
        return ops.cast(self._boxes(ops, height, width), "float32")

    def _boxes(self, xp, height, width):
        """Anchors by numpy, or by `keras.ops` where the sides are known in the graph alone."""
        sides = [float(s) if xp is np else ops.cast(s, "float32") for s in (width, height)]
        scale = xp.stack(sides * 2)
        levels = [
            self._level(xp, *level, height, width)
            for level in zip(self.strides, self.sizes, strict=True)
        ]
        # (cx, cy, w, h) as fractions: the unit in which `clip` is defined.
        boxes = xp.concatenate(levels) / scale
        if self.clip:
            boxes = xp.clip(boxes, 0.0, 1.0)
        return _from_relative_centers(xp, boxes, self.bounding_box_format, scale)

    def _level(self, xp, stride: int, sizes, height, width):
        shapes = np.array(
            [(s * np.sqrt(r), s / np.sqrt(r)) for s in sizes for r in self.aspect_ratios]
        )
        cx, cy = (
            xp.multiply(xp.add(xp.arange(-(-side // stride)), self.offset), float(stride))
            for side in (width, height)
        )
        grid = xp.stack(xp.meshgrid(cx, cy), axis=-1)  # (rows, columns, 2)
        shapes = shapes if xp is np else ops.convert_to_tensor(shapes, "float32")
        centers = xp.add(grid[:, :, None, :], xp.zeros_like(shapes))
        boxes = xp.concatenate([centers, xp.add(xp.zeros_like(centers), shapes)], axis=-1)
        return xp.reshape(boxes, (-1, 4))

    def get_config(self) -> dict:
        return {
            "strides": self.strides,
            "sizes": self.sizes,
            "aspect_ratios": self.aspect_ratios,
            "offset": self.offset,
            "clip": self.clip,
            "bounding_box_format": self.bounding_box_format,
        }

    @classmethod
    def from_config(cls, config: dict) -> "AnchorGenerator":
        return cls(**config)


def _as_tuple(sizes) -> tuple[float, ...]:
    return tuple(float(s) for s in (sizes if isinstance(sizes, list | tuple) else (sizes,)))


def _from_relative_centers(xp, boxes, target: str, scale):
    """Conversion with numpy, so that anchors are a constant on every device, or `keras.ops`."""
    if not target.startswith("rel_"):
        boxes = boxes * scale
    kind = target.removeprefix("rel_")
    centers, sizes = boxes[:, :2], boxes[:, 2:]
    corners = xp.concatenate([centers - sizes / 2, centers + sizes / 2], axis=1)
    return {
        "xyxy": lambda: corners,
        "yxyx": lambda: xp.take(corners, (1, 0, 3, 2), axis=1),
        "xywh": lambda: xp.concatenate([corners[:, :2], sizes], axis=1),
        "center_xywh": lambda: boxes,
        "center_yxhw": lambda: xp.take(boxes, (1, 0, 3, 2), axis=1),
    }[kind]()
