"""Shapes: a synthetic detection dataset, which needs no download.

Six kinds of figures, rotated, stretched and overlapping, each kind in its range of hues, on
textured grayish backgrounds. The dataset is drawn in seconds and trains a detector on a CPU in
minutes.

`draw_scene(plan_scene(seed))` draws one image. `Shapes` is the TFDS builder; importing this module
registers it for `tfds.load("shapes")`. `keras_resnest.data.read_shapes` draws and reads it.
"""

import colorsys
import dataclasses
import functools
import io
import math

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from keras_resnest.checks import check_counts
from keras_resnest.images import encode_image

CLASS_NAMES = ("circle", "square", "triangle", "star", "cross", "ring")
SPLITS = ("train", "validation", "test")

_HUE_SPREAD = 0.07  # standard deviation of the hue of a class; classes are 1 / 6 apart
_SUPERSAMPLING = 4  # for smooth edges
_MIN_VISIBLE = 0.4  # visible fraction below which a figure is moved or omitted
_DIFFICULT_BELOW = 0.6  # visible fraction below which a figure is difficult


# === Planning ===


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """One figure of a scene."""

    label: int  # index into CLASS_NAMES
    # float32 (n, 2), corners (x, y) in pixels, possibly outside the image; a ring has two outlines
    outlines: tuple[np.ndarray, ...]
    color: np.ndarray  # float32 (3,), RGB, 0 to 255
    seed: int  # of light and grain


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """Plan of an image."""

    size: int  # side of the image in pixels
    seed: int  # of the background
    figures: tuple[Figure, ...]  # from back to front
    difficult: np.ndarray  # bool (n,): others hide over 40 % of the part inside the image

    @property
    def labels(self) -> np.ndarray:
        """int32 (n,), indices into `CLASS_NAMES`."""
        return np.asarray([figure.label for figure in self.figures], "int32")

    @property
    def boxes(self) -> np.ndarray:
        """float32 (n, 4), "xyxy" in pixels: extents inside the image, ignoring occlusion."""
        inside = [_clip(figure.outlines[0], self.size) for figure in self.figures]
        corners = [(*points.min(axis=0), *points.max(axis=0)) for points in inside]
        return np.asarray(corners, "float32").reshape(-1, 4)


def plan_scene(seed, size: int = 192) -> Scene:
    """Plans a random scene.

    One image in 25 is empty; the others have 1 to 6 figures. The longer side of a figure is 12 to
    60 % of the image; one figure in six is small (from 16 pixels to 12 %). A figure may cross the
    border by a quarter of its sides, and may hide others if 40 % of each (of its part inside the
    image) stays visible.

    Args:
        seed: Integer or sequence of integers.
        size: Side of the image in pixels, at least 48.

    Raises:
        ValueError: if `size` is below 48.

    Example:
        >>> scene = plan_scene(7)
        >>> image, boxes = draw_scene(scene), scene.boxes
    """
    if size < 48:
        raise ValueError(f"`size` must be at least 48 pixels. Received: {size}")
    rng = np.random.default_rng(seed)
    background_seed = int(rng.integers(2**31))
    colors = list(_background_colors(np.random.default_rng(background_seed)))
    count = 0 if rng.random() < 0.04 else int(rng.integers(1, 7))
    figures, masks = [], []
    for _ in range(count):
        for _ in range(10):  # attempts to find a free place
            figure = _random_figure(rng, size, colors)
            mask = _mask(figure, size)
            if min(_visible_fractions([*masks, mask])) >= _MIN_VISIBLE:
                figures.append(figure)
                masks.append(mask)
                colors.append(figure.color)
                break
    difficult = np.asarray(_visible_fractions(masks)) < _DIFFICULT_BELOW
    return Scene(size, background_seed, tuple(figures), difficult)


def _clip(points: np.ndarray, size: int) -> np.ndarray:
    """Clips a polygon (n, 2) to the image (Sutherland and Hodgman, 1974)."""
    for axis, limit, sign in ((0, 0, 1), (0, size, -1), (1, 0, 1), (1, size, -1)):
        depth = sign * (points[:, axis] - limit)  # negative: beyond the border
        if depth.min() >= 0:
            continue
        ahead, depth_ahead = np.roll(points, -1, axis=0), np.roll(depth, -1)
        crosses = (depth < 0) != (depth_ahead < 0)
        part = depth / np.where(crosses, depth - depth_ahead, 1)
        crossings = points + part[:, None] * (ahead - points)
        # Each corner is followed by the crossing between it and the next one.
        keep = np.stack([depth >= 0, crosses], axis=1)
        points = np.stack([points, crossings], axis=1)[keep]
    return points.clip(0, size)  # crossings are rounded


def _visible_fractions(masks: list[np.ndarray]) -> list[float]:
    """Fraction of each figure that no figure in front of it (later in the list) covers."""
    fractions = []
    in_front = np.zeros_like(masks[0]) if masks else None
    for mask in reversed(masks):
        fractions.append(np.count_nonzero(mask & ~in_front) / max(np.count_nonzero(mask), 1))
        in_front |= mask
    return fractions[::-1]


def _random_figure(rng: np.random.Generator, size: int, colors: list[np.ndarray]) -> Figure:
    label = int(rng.integers(len(CLASS_NAMES)))
    medium = 0.12 * size
    if rng.random() < 1 / 6:
        side = rng.uniform(min(16.0, medium), max(16.0, medium))
    else:
        side = medium * 5 ** rng.random()  # up to 0.6, log-uniform
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 1.2)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    outlines = [points * (stretch, 1.0) @ rotation for points in _unit_outlines(label)]
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    scale = side / (high - low).max()
    extent = scale * (high - low)
    corner = rng.uniform(-0.25 * extent, size - 0.75 * extent)  # top left of the box
    return Figure(
        label=label,
        outlines=tuple(((o - low) * scale + corner).astype("float32") for o in outlines),
        color=_contrasting_color(rng, label, colors),
        seed=int(rng.integers(2**31)),
    )


@functools.cache
def _unit_outlines(label: int) -> tuple[np.ndarray, ...]:
    """Corners (n, 2) of a figure around the origin; for a ring, also of its hole."""
    name = CLASS_NAMES[label]
    if name in ("circle", "ring"):
        circle = _polygon(np.ones(96))
        return (circle,) if name == "circle" else (circle, 0.55 * circle)
    if name == "star":
        return (_polygon(np.tile([1.0, 0.42], 5)),)
    if name == "cross":
        a, b = 0.34, 1.0
        quarter = [(a, b), (a, a), (b, a)]
        corners = quarter + [(x, -y) for x, y in quarter[::-1]]
        return (np.array(corners + [(-x, -y) for x, y in corners]),)
    return (_polygon(np.ones({"triangle": 3, "square": 4}[name])),)


def _polygon(radii: np.ndarray) -> np.ndarray:
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)


def _contrasting_color(
    rng: np.random.Generator, label: int, others: list[np.ndarray]
) -> np.ndarray:
    """Draws four colors of a class and returns the one farthest from all others.

    The hues of neighboring classes overlap: color helps, shape decides.
    """
    hues = label / len(CLASS_NAMES) + rng.normal(0.0, _HUE_SPREAD, 4)
    strengths = rng.uniform((0.55, 0.45), 1.0, (4, 2))  # saturation, value
    pairs = zip(hues, strengths, strict=True)
    candidates = np.asarray([colorsys.hsv_to_rgb(h % 1.0, *sv) for h, sv in pairs])
    candidates = (255 * candidates).astype("float32")
    distances = np.linalg.norm(candidates[:, None] - np.asarray(others)[None], axis=-1)
    return candidates[distances.min(axis=1).argmax()]


# === Drawing ===
# Images are float32 with channels first, (3, h, w), which is faster in NumPy.


def draw_scene(scene: Scene) -> np.ndarray:
    """Draws a scene as a uint8 array (size, size, 3), RGB.

    Background and figures have separate seeds: removing a figure changes nothing else.
    """
    image = _background(scene.seed, scene.size)
    for figure in scene.figures:
        coverage, (left, top) = _coverage(figure, scene.size, _SUPERSAMPLING)
        height, width = coverage.shape
        patch = image[:, top : top + height, left : left + width]
        patch += coverage * (_surface(figure, height, width) - patch)
    image += 0.5  # round, as the cast truncates
    pixels = np.clip(image, 0, 255, out=image).astype("uint8")
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _coverage(figure: Figure, size: int, supersampling: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Fraction (h, w) of each pixel that a figure covers, and (x, y) of the first pixel."""
    from PIL import Image, ImageDraw

    outline = figure.outlines[0]
    left, top = np.floor(outline.min(axis=0)).astype(int).clip(0, size - 1).tolist()
    right, bottom = np.ceil(outline.max(axis=0)).astype(int).clip(1, size).tolist()
    canvas = Image.new("L", (supersampling * (right - left), supersampling * (bottom - top)))
    draw = ImageDraw.Draw(canvas)
    for points, fill in zip(figure.outlines, (255, 0), strict=False):
        # Pillow's coordinates start at the center of a pixel, box coordinates at its border.
        corners = (points - (left, top)) * supersampling - 0.5
        draw.polygon(corners.ravel().tolist(), fill=fill)
    if supersampling > 1:
        canvas = canvas.reduce(supersampling)
    return np.asarray(canvas, "float32") / 255, (left, top)


def _mask(figure: Figure, size: int) -> np.ndarray:
    """bool (size, size): pixels of the image that a figure mostly covers."""
    mask = np.zeros((size, size), bool)
    coverage, (left, top) = _coverage(figure, size, supersampling=1)
    height, width = coverage.shape
    mask[top : top + height, left : left + width] = coverage > 0.5
    return mask


def _surface(figure: Figure, height: int, width: int) -> np.ndarray:
    """Color of a figure (3, h, w), lit from one side, with grain."""
    rng = np.random.default_rng(figure.seed)
    light = rng.uniform(0, 45) * _ramp(rng, height, width)
    light += _noise(rng, (height, width), rng.uniform(0, 20))
    return figure.color[:, None, None] + light


def _background_colors(rng: np.random.Generator) -> np.ndarray:
    """The two colors (2, 3) of a background; must be the first draw from `rng`."""
    first, second = rng.uniform(40, 215, 2)[:, None] + rng.uniform(-25, 25, (2, 3))
    second = first + (second - first) * rng.uniform(0.2, 0.6)
    return np.stack([first, second]).clip(0, 255).astype("float32")


def _background(seed: int, size: int) -> np.ndarray:
    """Textured background (3, size, size)."""
    rng = np.random.default_rng(seed)
    first, second = _background_colors(rng)[:, :, None, None]
    texture = (_ramp, _stripes, _clouds, _clouds)[rng.integers(4)]
    image = (texture(rng, size, size) + np.float32(0.5)) * (second - first) + first
    if rng.random() < 0.6:
        _add_speckles(rng, image)
    if rng.random() < 0.5:
        _add_lines(rng, image)
    channels = (1, 3)[rng.integers(2)]  # gray or colored noise
    image += _noise(rng, (channels, size, size), rng.uniform(0, 40))
    return image


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Linear gradient (h, w) in a random direction, -0.5 to 0.5."""
    angle = rng.uniform(0, 2 * np.pi)
    direction = np.array([np.sin(angle), np.cos(angle)])
    dy, dx = direction / np.abs(direction).sum()
    y = np.linspace(-0.5 * dy, 0.5 * dy, height, dtype="float32")
    x = np.linspace(-0.5 * dx, 0.5 * dx, width, dtype="float32")
    return y[:, None] + x


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    cycles = rng.uniform(3, 20)
    return np.float32(0.5) * np.sin(np.float32(2 * np.pi * cycles) * _ramp(rng, height, width))


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coarse noise (h, w), smoothly enlarged."""
    from PIL import Image

    coarse = rng.random((int(rng.integers(3, 16)),) * 2, dtype="float32") - np.float32(0.5)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _noise(rng: np.random.Generator, shape: tuple[int, ...], amplitude: float) -> np.ndarray:
    """Uniform noise within +-amplitude, from raw bytes, which are drawn fastest."""
    noise = np.frombuffer(rng.bytes(math.prod(shape)), "int8").reshape(shape)
    return noise * np.float32(amplitude / 128)


def _add_speckles(rng: np.random.Generator, image: np.ndarray) -> None:
    color = rng.uniform(0, 255, (3, 1, 1))
    count = int(rng.integers(10, 80))
    corners = rng.integers(0, image.shape[-1], (count, 2)).tolist()
    for (x, y), side in zip(corners, rng.integers(1, 4, count).tolist(), strict=True):
        image[:, y : y + side, x : x + side] = color


def _add_lines(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draws a few thin lines as distractors."""
    from PIL import Image, ImageDraw

    size = image.shape[-1]
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 5))):
        draw.line(rng.uniform(-0.2 * size, 1.2 * size, 4).tolist(), 255, int(rng.integers(1, 3)))
    image[:, np.asarray(canvas) > 0] = rng.uniform(0, 255, (3, 1))


# === The TFDS builder ===


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """Size of the images and number of images of a Shapes dataset."""

    name: str = ""  # default: derived from the other values, so that datasets never mix
    size: int = 192  # side of the images in pixels
    num_train: int = 1600  # images in "train"; 0 omits a split
    num_validation: int = 200
    num_test: int = 200
    seed: int = 0  # of all random numbers

    @property
    def numbers(self) -> tuple[int, ...]:
        """The attributes that define the images."""
        return self.size, self.num_train, self.num_validation, self.num_test, self.seed

    def __post_init__(self):
        check_counts(size=self.size)
        counts = {f"num_{split}": getattr(self, f"num_{split}") for split in SPLITS}
        check_counts(minimum=0, **counts, seed=self.seed)
        counts = f"{self.num_train}-{self.num_validation}-{self.num_test}"
        self.name = self.name or f"size{self.size}_{counts}_seed{self.seed}"
        self.description = f"{self.size} x {self.size} pixels; {counts} images; seed {self.seed}"


class Shapes(tfds.core.GeneratorBasedBuilder):
    """TFDS dataset of drawn figures: circle, square, triangle, star, cross, ring.

    Predefined configurations: "small" (default: 192 x 192; 1600 training, 200 validation, 200 test
    images), "medium" (320 x 320; the same numbers) and "tiny" (96 x 96; 48, 16, 16). Pass a
    `ShapesConfig` for others. Images are JPEG (quality 95).

    Features of an example: `image`, `image_id` ("train_00000"), and `objects` with `bbox` (relative
    yxyx, see `Scene.boxes`), `label` and `is_difficult` (see `Scene.difficult`).

    Example:
        >>> train = tfds.load("shapes", split="train")
        >>> builder = Shapes(config=ShapesConfig(size=256, num_train=500), data_dir="data")
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        ShapesConfig(name="small"),
        ShapesConfig(name="medium", size=320),
        ShapesConfig(name="tiny", size=96, num_train=48, num_validation=16, num_test=16),
    ]
    # The default needs importlib_resources, which TFDS does not install.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        objects = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
            "is_difficult": np.bool_,
        }
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg"),
            "image_id": tfds.features.Text(),
            "objects": tfds.features.Sequence(objects),
        }
        description = "Drawn figures on textured backgrounds."
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, description=description, features=features)

    def _split_generators(self, dl_manager):
        counts = {name: getattr(self.builder_config, f"num_{name}") for name in SPLITS}
        # TFDS does not allow empty splits.
        return {name: self._generate_examples(name, n) for name, n in counts.items() if n}

    def _generate_examples(self, split: str, count: int):
        config = self.builder_config
        for index in range(count):
            scene = plan_scene((config.seed, SPLITS.index(split), index), config.size)
            boxes = scene.boxes[:, [1, 0, 3, 2]] / config.size  # relative yxyx
            rows = zip(boxes.tolist(), scene.labels.tolist(), scene.difficult.tolist(), strict=True)
            objects = [
                {"bbox": tfds.features.BBox(*box), "label": label, "is_difficult": difficult}
                for box, label, difficult in rows
            ]
            jpeg = encode_image(draw_scene(scene), "JPEG", quality=95, subsampling=0)
            image_id = f"{split}_{index:05d}"
            yield index, {"image": io.BytesIO(jpeg), "image_id": image_id, "objects": objects}
